"""`Norm`: the layer that keeps the state of a pattern: parameters, static labels, running statistics."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from ..axes import solve
from ..calls.arguments import (
    Formula,
    Label,
    Options,
    Param,
    as_partition,
    check_eps,
    label_names,
    sort_names,
    spec_along,
)
from ..calls.call import Call, Used
from ..calls.functional import ALONE, bound, own_moments, run
from ..calls.given import given_here, something_given
from ..calls.gradients import moments_of
from ..calls.ranks import Ranks, Sharding, is_dtensor
from ..errors import ShapeError, SpecError, say, shown
from ..library import library
from ..partition import Partition, readable, whole
from ..spec import Atom, Axis, Expr, Group, Lookup, Spec, keyword
from ..statistics import Moments, each
from ..watching import unwatched
from .static_labels import StaticLabels


class Norm(nn.Module):
    r"""A normalization layer: the elements that share statistics are those that its pattern names.

    For each set S:   y[S] = (x[S] - mean(x[S])) / sqrt(var(x[S]) + eps) * weight + bias

    Args:
        pattern: which elements share statistics: `"n (g c) ... -> n g"`. See `normalize`.
        affine: axes of the learned weight and bias: `"c"`, `"(g c)"` (flat, as in `nn.GroupNorm`), `"type[v] c"`.
            None: no parameters.
        conditional: axes of a further weight and bias that are given at every call, after the learned ones: `"b c"`.
        center: subtract the mean. Without it, the variance is that about zero (RMSNorm).
        scale: divide by the standard deviation.
        bias: learn a bias beside the weight.
        eps: added to the variance, in the unit of x squared.
        activation: "relu", "silu" or "gelu", applied to the result.
        track_running_stats: keep running means and (unbiased) variances of the sets while training, and use them in
            evaluation, as `nn.BatchNorm2d` does. All axes and labels of the statistics need a size.
        momentum: weight of the new value in the running statistics; None: the average of all batches. Where labels
            name sets, `num_batches_tracked` then is that of each set.
        cumulative: a pooled axis, as time: every place along it is normalized by the statistics up to and with it, so
            that nothing depends on what comes later. `step` does the same chunk by chunk.
        sharded: axes of x, `"n"`, that are spread over the ranks of a process group: where they are pooled, moments are
            merged across ranks. All ranks make every call; ids of labels are global.
        process_group: of `torch.distributed`; None is the default one, at every call. Copies and pickles leave it out.
        sizes: sizes of axes and compositions, for those that cannot be keywords: `{"(g c)": 256}`.
        labels: as keywords, for names that options have.
        device, dtype: of the parameters.
        **names: sizes of axes, as `g=32` (all axes of `affine` need one); and labels: a tensor of ids or a `Partition`
            for those that never change, an int for the number of values of one that comes with every call.

    The ids of a label that never changes are part of the state (`graph_ids`), and neither parameters nor buffers:
    nothing averages them, and a layer that leaves the meta device has them. `load_state_dict` takes other ids of the
    same shape, `reset_parameters()` those that the layer was built with.

    Shapes: x has the axes of the pattern's left side; the result has x's shape, dtype and memory format.

    Raises:
        SpecError: the pattern, a name or an option means nothing, or a size that `affine` needs is missing. When it is
            called: it evaluates by running statistics, and has none.

    >>> norm = Norm("n (g c) ... -> n g", affine="(g c)", g=4, sizes={"(g c)": 16})
    >>> norm
    Norm('n (g c) ... -> n g', g=4, sizes={'(g c)': 16}, affine='(g c)', weight=[16], bias=[16])
    >>> norm(torch.randn(2, 16, 5, 5)).shape
    torch.Size([2, 16, 5, 5])
    >>> norm = Norm("v c -> graph[v] c", affine="c", c=8)
    >>> norm(torch.randn(6, 8), graph=torch.tensor([0, 0, 0, 1, 1, 1])).shape
    torch.Size([6, 8])
    """

    _beside: Sequence[Expr] = ()  # what else a subclass reads labels for

    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None

    def __init__(
        self,
        /,
        pattern: str,
        *,
        affine: str | None = None,
        conditional: str | None = None,
        center: bool = True,
        scale: bool = True,
        bias: bool = True,
        eps: float = 1e-5,
        activation: str | None = None,
        track_running_stats: bool = False,
        momentum: float | None = 0.1,
        cumulative: str | None = None,
        sharded: str | Sequence[str] | None = None,
        process_group: Any = None,
        sizes: Mapping[str, int] | None = None,
        labels: Mapping[str, int | Label] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **names: int | Label,
    ) -> None:
        nn.Module.__init__(self)  # not that of a class beside this one, as drop-ins have
        self._spec = Spec.parse(pattern)
        self._options = Options(center, scale, eps, activation)
        self.eps = eps
        if not isinstance(bias, bool) or (dtype is not None and not (dtype.is_floating_point or dtype.is_complex)):
            received = f"bias={shown(bias)}, dtype={dtype}"
            rule, instead = "bias is True or False, and dtype floating or complex", "bias=False, dtype=torch.float32"
            raise SpecError(say(rule, received=received, instead=instead))
        self._affine = None if affine is None else self._spec.read(affine, "affine")
        self._conditional = None if conditional is None else self._spec.read(conditional, "conditional")
        read = [self._affine, self._conditional, *self._beside]
        self._lookups = label_names(self._spec, *read)
        self._sizes, told = sort_names(self._spec, read, sizes, labels, names)
        check_eps(self._spec, eps, self._sizes, told)
        self._counts = {
            name: whole(value, f"the number of values of label {name!r}")
            for name, value in told.items()
            if not isinstance(value, (Tensor, Partition)) and hasattr(value, "__index__")
        }
        static = {name: self._as_partition(name, value) for name, value in told.items() if name not in self._counts}
        self._static = StaticLabels(self._lookups, static, torch.empty(0, device=device).device)
        self._counts.update({name: partition.count for name, partition in static.items()})
        self.register_parameter("weight", None)
        self.register_parameter("bias", None)
        if self._affine is not None:
            shape = self._fixed_shape(self._affine, "the parameters")
            self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
            if bias:
                self.bias = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self._cumulative = cumulative
        self._sharding = None if sharded is None else Sharding(self._spec, sharded, process_group, cumulative)
        self._check_combination(track_running_stats, process_group)
        exprs = [expr for expr in (self._affine, self._conditional) if expr is not None]
        spec = self._spec if cumulative is None else spec_along(self._spec, cumulative)
        self._formula = Formula(spec, self._options, exprs, self._sizes)
        self._was_given = False
        self.momentum = checked_momentum(momentum)
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            self.register_buffer(name, None)
        self.track_running_stats = track_running_stats
        if track_running_stats:
            shape = self._fixed_shape(self._spec.sets, "running statistics")
            self.running_mean = torch.empty(shape, device=device, dtype=dtype)
            real = dtype.to_real() if dtype is not None and dtype.is_complex else dtype
            self.running_var = torch.empty(shape, device=device, dtype=real)
            per_set = self._counts_per_set and momentum is None and any(True for _ in self._spec.sets.lookups())
            self.num_batches_tracked = torch.empty(shape if per_set else (), device=device, dtype=torch.int64)
        cls = type(self)
        own = ("fit_call", "unfit", "used", "_run", "_params")
        plain = all(getattr(cls, name) is getattr(Norm, name) for name in own)
        # A layer from elsewhere may look at x in `fit_mask`, which a usual call without a mask leaves out.
        plain = plain and cls.fit_mask.__module__.partition(".")[0] == __package__.partition(".")[0]
        self._direct = plain and cumulative is None and conditional is None
        self.reset_parameters()

    _version = 2  # as torch's batch norms count: `num_batches_tracked` came with the second

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *others: Any
    ) -> None:
        """One counter, of a layer with a momentum, is that of every set. State of early versions of torch has none."""
        key, own = f"{prefix}num_batches_tracked", self.num_batches_tracked
        given = state_dict.get(key)
        if own is not None and own.dim() and isinstance(given, Tensor) and given.dim() == 0:
            state_dict[key] = given.expand(own.shape).clone()
        if given is None and own is not None and local_metadata.get("version", 1) < 2:
            state_dict[key] = torch.ones(own.shape, dtype=own.dtype)  # it has seen something, and may evaluate
        # nn.Module's, as a batch norm beside this class would add a counter of its own
        nn.Module._load_from_state_dict(self, state_dict, prefix, local_metadata, *others)
        self._static.load(state_dict, prefix, *others)

    def reset_running_stats(self) -> None:
        """Mean 0, variance 1, no batch seen."""
        for buffer, value in ((self.running_mean, 0), (self.running_var, 1), (self.num_batches_tracked, 0)):
            if buffer is not None:
                buffer.fill_(value)

    def reset_parameters(self) -> None:
        """Weight 1, bias 0, running statistics as at first, and the static labels as the layer was built with."""
        self.reset_running_stats()
        with torch.no_grad():
            if self.weight is not None:
                nn.init.ones_(self.weight)
            if self.bias is not None:
                nn.init.zeros_(self.bias)
        self._static.reset()

    @overload
    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        moments: Moments | None = None,
        return_moments: Literal[False] = False,
        labels: Mapping[str, Label] | None = None,
        **names: Label,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        moments: Moments | None = None,
        return_moments: Literal[True],
        labels: Mapping[str, Label] | None = None,
        **names: Label,
    ) -> tuple[Tensor, Moments]: ...

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        moments: Moments | None = None,
        return_moments: bool = False,
        labels: Mapping[str, Label] | None = None,
        **names: Label,
    ) -> Any:
        """Normalizes x.

        Args:
            x: with the axes of the pattern's left side.
            mask: bool (membership) or floating (weights), over the axes behind the comma.
            weight, bias: over the axes of `conditional`, applied after the learned ones.
            moments: statistics to use instead of x's own.
            return_moments: return the result and the `Moments` that it was normalized by, differentiable, and update
                nothing: training as a function, for `torch.func`. `updated` says what the running statistics become.
            labels, **names: the labels that are no part of the layer.
        """
        dynamic: dict[str, Label] = names if labels is None else self._both(names, labels)
        if not (something_given() or self._was_given):
            if self._direct and weight is None and bias is None and not return_moments:
                return self._directly(x, mask, dynamic, moments)
            call = Call(self._with_own_eps(), x, mask, weight, bias, moments, dynamic, return_moments)
            y, used = self._normalized(call)
            return (y, used) if return_moments else y
        around = given_here()
        mask = self._from_around(around, mask, dynamic)
        try:
            call = Call(self._with_own_eps(), x, mask, weight, bias, moments, dynamic, return_moments)
            y, used = self._normalized(call)
        except (SpecError, ShapeError) as error:
            if not around:
                raise
            raise type(error)(f"{error}\n  in:       {self}, inside of given({', '.join(around)})") from None
        return (y, used) if return_moments else y

    def _both(self, names: Mapping[str, Label], labels: Mapping[str, Label]) -> dict[str, Label]:
        for name in names:
            if name in labels:
                received, instead = f"{name}={shown(names[name])}, and again in labels=", "leave one out"
                raise SpecError(
                    say(f"{name!r} is given once", text=self._spec.text, received=received, instead=instead)
                )
        return {**names, **labels}

    _direct = False  # whether a usual call needs nothing but the formula, its parameters and labels

    def _directly(
        self, x: Tensor, mask: Tensor | None, dynamic: Mapping[str, Any], moments: Moments | None = None
    ) -> Tensor:
        """The result of a usual call, which the library computes: no ranks, and nothing given but a mask and labels."""
        y, own = None, self.__dict__
        if own["_sharding"] is None and unwatched(x):
            formula, params = own["_formula"], own["_parameters"]
            kept: list[Any] | None = None
            if self.eps != formula.options.eps:
                formula = self._with_own_eps()
            if moments is None and (mean := own["_buffers"].get("running_mean")) is not None:
                if x.dtype != mean.dtype:
                    self._check_kind(x)
                if not self.training:
                    moments = self._running()
                elif self.track_running_stats:
                    kept = []
            if mask is not None:
                mask = self.fit_mask(x, mask)
                own["_masked"] = True
            partitions = own["_static"].beside(x) if own["_static"].held else {}
            if dynamic:
                self._read(dynamic, partitions)
            if formula.affines and "weight" in params and "bias" in params:
                y = bound(formula, x, mask, ((params["weight"], params["bias"]),), moments, partitions, kept)
            elif not formula.affines:
                y = bound(formula, x, mask, (), moments, partitions, kept)
            if y is not None:
                if kept and not self._moved_in_place(x, *kept):
                    self._track(moments_of(x, kept))
                return y
        return self._normalized(Call(self._with_own_eps(), x, mask, None, None, moments, dynamic))[0]

    def _with_own_eps(self) -> Formula:
        """The formula, where somebody has set `eps` anew."""
        formula = self._formula
        if self.eps != formula.options.eps:
            options = replace(self._options, eps=self.eps)
            formula = self._formula = Formula(formula.spec, options, formula.affines, self._sizes)
        return formula

    # --- what a layer of a field makes of a call

    def fit_mask(self, x: Tensor, mask: Tensor | None) -> Tensor | None:
        """The mask as the pattern reads it. A layer of a field overrides this, and checks the axes of x here."""
        return mask

    def fit_call(self, call: Call) -> Call:
        """The call as the formula reads it: the container of a field becomes x, a mask and labels.

        A layer of a field overrides this if `fit_mask` is not enough. It calls this method on what it has made.
        """
        mask = self.fit_mask(call.x, call.mask)
        return call if mask is call.mask else call._replace(mask=mask)

    def unfit(self, call: Call, y: Tensor) -> Tensor:
        """The result in the container of the user's own call. The reverse of `fit_call`."""
        return y

    def used(self, call: Call) -> Used | None:
        """The moments that a layer makes of the moments of x, because it normalizes by others. None: it does not.

        Args:
            call: the call as the formula reads it.
        """
        return None

    def _normalized(self, made: Call) -> tuple[Tensor, Moments | None]:
        """The result, and the moments if the call wants them. If it does not, the running statistics may move."""
        call, want = self.fit_call(made), made.want
        others = self.used(call)
        moments = call.moments if others is None else others.moments
        runs = moments is None and self._buffers.get("running_mean") is not None
        if runs and not self.training:
            moments = self._running()
        if made.mask is not None and not torch.compiler.is_compiling():
            self.__dict__["_masked"] = True
        partitions = self._static.beside(call.x) if self._static.held else {}
        tracked = self.training and self.track_running_stats and runs and not want
        ranks = ALONE if self._sharding is None or moments is not None else self._ranks()
        if ranks is ALONE:
            y, seen = self._run(call, moments, partitions, tracked, ranks)
        else:
            with ranks:
                y, seen = self._run(call, moments, partitions, tracked, ranks)
        y = self.unfit(made, y)
        if tracked and seen is not None:
            self._track(seen)
        if others is not None:
            if not want:
                others.track()
            return y, others.seen
        return y, seen

    def _run(
        self, call: Call, moments: Moments | None, partitions: dict[str, Partition], tracked: bool, ranks: Ranks
    ) -> tuple[Tensor, Moments | None]:
        self._check_kind(call.x)
        if call.names:
            self._read(call.names, partitions)
        params = self._params(call.weight, call.bias)
        return run(
            call.formula,
            call.x,
            call.mask,
            params,
            moments,
            partitions,
            tracked=tracked,
            apart=call.want,
            cumulative=self._cumulative is not None,
            ranks=ranks,
        )

    def _check_kind(self, x: Tensor) -> None:
        mean = self._buffers.get("running_mean")
        if mean is not None and isinstance(x, Tensor) and x.is_complex() != mean.is_complex():
            received, instead = f"x of {x.dtype}, running_mean of {mean.dtype}", f"Norm(..., dtype={x.dtype})"
            rule = "running means are complex where x is, and only there"
            raise SpecError(say(rule, text=self._spec.text, received=received, instead=instead))

    # --- many machines

    def _ranks(self) -> Ranks:
        assert self._sharding is not None
        return self._sharding.ranks(self.training)

    @property
    def process_group(self) -> Any:
        """That of the sharded axes; None is the default one."""
        return None if self._sharding is None else self._sharding.process_group

    @process_group.setter
    def process_group(self, group: Any) -> None:
        if self._sharding is None:
            rule, received = "a process group is one of sharded axes", f"{self}, without sharded="
            raise SpecError(say(rule, received=received, instead='Norm(..., sharded="n", process_group=group)'))
        old = self._sharding
        self._sharding = Sharding(self._spec, old.names, group, self._cumulative, as_torch=old.as_torch)

    def _check_combination(self, track_running_stats: bool, process_group: Any) -> None:
        """Options that exclude each other."""
        rule = None
        if process_group is not None and self._sharding is None:
            rule, instead = "a process group is one of sharded axes", 'sharded="n", say'
        elif self._cumulative is not None and track_running_stats:
            rule = "cumulated statistics are those of x itself, and none run on from batch to batch"
            instead = "cumulative= or track_running_stats=True"
        if rule is not None:
            received = f"cumulative={self._cumulative!r}, track_running_stats={track_running_stats}, "
            received += f"process_group={shown(process_group)}"
            raise SpecError(say(rule, text=self._spec.text, received=received, instead=instead))

    # --- streams

    def step(
        self,
        x: Tensor,
        state: Sequence[Tensor] | None = None,
        mask: Tensor | None = None,
        *,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        labels: Mapping[str, Label] | None = None,
        **names: Label,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Normalizes the next chunk of a stream, by the statistics of all that came before, up to each place.

        The layer is built with `cumulative="t"`. Chunks have any length along that axis, and give what the whole gives.

        Args:
            x: the next chunk.
            state: what the step before returned: count, mean, M2 and low of every set. None, or zeros, at first.
            mask, weight, bias, labels, **names: as in `forward`, of this chunk.

        Returns:
            The chunk normalized, and the state for the next step: tensors of the shape that the pattern's right side
            says. Gradients flow through it; `tuple(t.detach() for t in state)` ends that.

        Raises:
            SpecError: the layer is not cumulative, or the state is none.

        >>> norm = Norm("b c t -> b c", cumulative="t")
        >>> x = torch.randn(2, 3, 10)
        >>> first, state = norm.step(x[..., :4])
        >>> second, state = norm.step(x[..., 4:], state)
        >>> torch.allclose(torch.cat([first, second], -1), norm(x), atol=1e-5)
        True
        """
        if self._cumulative is None:
            rule, instead = "a layer that takes steps knows the axis they go along", 'Norm(..., cumulative="t")'
            raise SpecError(say(rule, text=self._spec.text, received=f"{self}", instead=instead))
        dynamic: dict[str, Label] = names if labels is None else self._both(names, labels)
        if something_given() or self._was_given:
            mask = self._from_around(given_here(), mask, dynamic)
        partitions = self._static.beside(x) if self._static.held else {}
        ranks = ALONE if self._sharding is None else self._ranks()
        given = (x, mask, weight, bias, state, dynamic, partitions, ranks)
        if ranks.groups:
            with ranks:
                m, past = self._chunk(*given)
        else:  # a compiler knows no such block
            m, past = self._chunk(*given)
        until = each(lambda before, new: torch.cat([before[..., None], new], -1), past, m).cumulative()
        before = each(lambda t: t[..., 1:], until)
        y, _ = self._normalized(Call(self._with_own_eps(), x, mask, weight, bias, before, dynamic))
        new = each(lambda t: t[..., -1], until)
        assert new.low is not None
        return y, (new.count, new.mean, new.m2, new.low)

    def _chunk(
        self,
        x: Tensor,
        mask: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        state: Sequence[Tensor] | None,
        dynamic: Mapping[str, Any],
        partitions: dict[str, Partition],
        ranks: Ranks,
    ) -> tuple[Moments, Moments]:
        """The moments of a chunk, and those of the state. Whatever may raise does so before ranks are asked."""
        four = isinstance(state, (tuple, list)) and len(state) == 4 and all(isinstance(t, Tensor) for t in state)
        if not (state is None or four):
            received, instead = f"state={shown(state)}", "the second of what norm.step(x) returned"
            raise SpecError(say("a state is that of an earlier step: four tensors", received=received, instead=instead))
        self._read(dynamic, partitions)
        past = None if state is None else Moments(*state)
        if past is not None:
            past.check()
        if ranks.groups:
            recipe, _ = self._formula.prepare(x, mask, self._params(weight, bias), partitions)
            self._check_state(past, recipe.sets.shape[:-1])
        m = own_moments(self._formula, x, mask, partitions, ranks)
        self._check_state(past, m.mean.shape[:-1])
        return m, each(lambda t: t.new_zeros(t.shape[:-1]), m) if past is None else past

    def _check_state(self, past: Moments | None, shape: Sequence[int]) -> None:
        if past is not None and tuple(past.mean.shape) != tuple(shape):
            raise ShapeError(
                say(
                    f"the state is one of these sets: shape {tuple(shape)}",
                    text=self._spec.text,
                    received=f"a state of shape {tuple(past.mean.shape)}",
                    instead="the state of the same stream; None for the first chunk of another",
                )
            )

    # --- running statistics

    _masked = False  # whether it was ever called with a mask, as `flexnorm.privacy` asks
    _collected: tuple[Moments, ...] | None = None  # while `calibrate` goes through the batches
    _evaluates_unseen = False  # as the layers of others do, which begin with mean 0 and variance 1
    _changes = ""  # what it makes of the moments of its pattern before it uses them, if anything
    _counts_per_set = True  # where momentum is None and labels name sets; those of others have one counter

    def updated(self, seen: Moments) -> dict[str, Tensor]:
        """The running statistics, as buffers, after a batch of these moments. Nothing is changed.

        >>> norm = Norm("n c -> c", c=3, track_running_stats=True)
        >>> y, seen = norm(torch.randn(8, 3), return_moments=True)
        >>> list(norm.updated(seen))
        ['running_mean', 'running_var', 'num_batches_tracked']
        """
        old = self.running_mean
        if not isinstance(seen, Moments) or (old is not None and seen.mean.shape != old.shape):
            received = f"moments of shape {tuple(seen.mean.shape)}" if isinstance(seen, Moments) else shown(seen)
            rule, instead = "running statistics move to Moments of the same sets", "norm(x, return_moments=True)[1]"
            raise SpecError(say(rule, text=self._spec.text, received=received, instead=instead))
        return self._updated(seen)

    def _updated(self, *seen: Moments) -> dict[str, Tensor]:
        """Towards what this batch has, where it is known: empty sets, and variances of one element, stay."""
        mean, var, batches = self.running_mean, self.running_var, self.num_batches_tracked
        if mean is None or var is None or batches is None:
            rule, instead = "a layer that keeps running statistics is built so", "Norm(..., track_running_stats=True)"
            raise SpecError(say(rule, received=f"{self}", instead=instead))
        values = self._values(*seen)
        if self.momentum is None:  # one counter for both, so what has no variance counts for neither
            values = (values[0][0], values[1][1]), values[1]
        counted = values[0][1]
        batches = _whole(batches)
        batches = batches + (counted if batches.dim() else counted.any())  # a batch of nothing is none
        moved = []
        for old, (value, known) in zip(map(_whole, (mean, var)), values, strict=True):
            weight = self.momentum if self.momentum is not None else batches.clamp(min=1).to(old.dtype).reciprocal()
            moved.append(torch.lerp(old, value.to(old.dtype), weight).where(known, old))
        return {"running_mean": moved[0], "running_var": moved[1], "num_batches_tracked": batches}

    def _values(self, *seen: Moments) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """What runs on, mean and variance, and where it is known."""
        (m,) = seen
        return (m.mean, m.count > 0), m.unbiased_var()

    def _track(self, *seen: Moments) -> None:
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            return  # activation checkpointing computes the same batch again
        if any(m.mean.requires_grad for m in seen):
            seen = tuple(each(Tensor.detach, m) for m in seen)
        if self._collected is not None:
            wide = [m.rounded(torch.float64) for m in seen]
            pairs = zip(self._collected, wide, strict=True)
            self._collected = tuple(a.merge(b) for a, b in pairs) if self._collected else tuple(wide)
            return
        self._set(self._updated(*seen))

    def _moved_in_place(self, x: Tensor, packed: Tensor, count: Tensor | None) -> bool:
        """Whether the library has moved the running statistics: plain buffers by a fixed momentum, in one pass."""
        own, cls = self._buffers, type(self)
        if self.momentum is None or cls._track is not Norm._track or cls._updated is not Norm._updated:
            return False
        if cls._values is not Norm._values or cls._set is not Norm._set:  # a subclass moves them in its own way
            return False
        if self._collected is not None or torch._C._current_graph_task_id() != -1:
            return False
        buffers = own["running_mean"], own["running_var"], own["num_batches_tracked"]
        if buffers[0] is None or (buffers[0].is_inference() and not torch.is_inference_mode_enabled()):
            return False
        if library().track(*buffers, self.momentum, packed, count, x.numel()) is None:
            return False
        increment_version(buffers)  # type: ignore[arg-type]
        return True

    def _set(self, buffers: Mapping[str, Tensor]) -> None:
        try:
            for name, value in buffers.items():
                _overwrite(self.get_buffer(name), value)
        except RuntimeError as error:
            if not torch._C._are_functorch_transforms_active():
                raise
            raise RuntimeError(
                say(
                    "torch.func changes nothing in place, so running statistics cannot be updated within",
                    received=f"{self}, in training",
                    instead="y, seen = norm(x, return_moments=True), then norm.updated(seen); or norm.eval()",
                )
            ) from error

    def _running(self) -> Moments:
        """What it evaluates by."""
        mean, var = self._buffers["running_mean"], self._buffers["running_var"]
        assert mean is not None and var is not None
        self._check_seen(mean, var)
        return Moments(torch.ones_like(var), mean, var)

    def _check_seen(self, mean: Tensor, var: Tensor) -> None:
        """Raises where running statistics are what they were at first. No device is waited for."""
        batches = self.num_batches_tracked
        if self._evaluates_unseen or batches is None or batches.device.type != "cpu" or not readable(batches):
            return
        if not batches.any() and not mean.any() and bool((var == 1).all()):
            raise SpecError(
                say(
                    "a layer evaluates by its running statistics, and these have seen no batch",
                    text=self._spec.text,
                    received=f"{self}, in evaluation",
                    instead="norm.train() and some batches, calibrate(model, batches), load_state_dict(...), or "
                    "norm.num_batches_tracked.fill_(1), if mean 0 and variance 1 are meant",
                )
            )

    # --- parameters

    def _fixed_shape(self, expr: Expr, what: str) -> tuple[int, ...]:
        """The shape of a tensor over these axes, from what is told when the layer is built."""
        known: dict[Atom, int] = {Axis(name): size for name, size in solve(self._spec, self._sizes).items()}
        known.update(
            (lookup, self._counts[name]) for name, (_, lookup) in self._lookups.items() if name in self._counts
        )
        for atom in expr.atoms():
            if atom in known:
                continue
            if not isinstance(atom, (Axis, Lookup)):
                rule, instead = (
                    f"{what} have a fixed shape: their axes have names",
                    "names for these axes, and their sizes",
                )
                raise SpecError(expr.error(rule, atom, instead=instead))
            name = atom.name if isinstance(atom, Axis) else atom.label
            kind, where = (
                ("size of axis", "sizes") if isinstance(atom, Axis) else ("number of values of label", "labels")
            )
            told = {**self._sizes, **self._counts}
            if what == "running statistics" and atom == next(iter(self._spec.x.atoms()), None):
                pooled = " ".join(str(e) for e in expr.elements if e != atom)
                rule = f"running statistics outlive a batch, and these sets are apart along {atom}, which comes with it"
                instead = f'"{self._spec.x} -> {pooled}"; sizes={{"{atom}": 8}}, if {atom} is not the batch'
                raise SpecError(expr.error(rule, atom, received=str(self._spec), instead=instead))
            holds = (str(e) for e in self._spec.x.elements if isinstance(e, Group) and atom in e.atoms)
            composed = next((f', or the size of all: sizes={{"{group}": 64}}' for group in holds), "")
            raise SpecError(
                expr.error(
                    f"{what} need the {kind} {name!r} when the layer is built",
                    atom,
                    received=", ".join(f"{k}={v}" for k, v in told.items()) or "no sizes",
                    instead=keyword(name, 8, where) + composed,
                )
            )
        return tuple(
            math.prod(known[atom] for atom in (element.atoms if isinstance(element, Group) else (element,)))
            for element in expr.elements
        )

    def _params(self, weight: Tensor | None, bias: Tensor | None) -> list[Param]:
        """The learned weight and bias, then the given ones."""
        params: list[Param] = []
        if self._affine is not None:
            own = self._parameters  # self.weight takes a microsecond; parametrizations move it elsewhere
            if "weight" in own and "bias" in own:
                params.append((own["weight"], own["bias"]))
            else:
                params.append((self.weight, self.bias))
        if self._conditional is None:
            if weight is not None or bias is not None:
                raise SpecError(
                    say(
                        "weight and bias are given at the call to a layer that was built for them",
                        text=self._spec.text,
                        received="weight" if bias is None else "bias" if weight is None else "weight and bias",
                        instead='Norm(..., conditional="b c"), with the axes of weight and bias',
                    )
                )
            return params
        if weight is None and bias is None:
            raise SpecError(
                self._conditional.error(
                    "a conditional layer is called with weight, bias, or both",
                    *self._conditional.elements,
                    received="neither",
                    instead="norm(x, weight=w, bias=b)",
                )
            )
        return [*params, (weight, bias)]

    # --- labels

    @property
    def labels(self) -> dict[str, Partition]:
        """The static labels, by name."""
        return dict(self._static.held)

    def _read(self, dynamic: Mapping[str, Any], partitions: dict[str, Partition]) -> None:
        """Labels that came with a call, into the static ones."""
        for name, value in dynamic.items():
            if name not in self._lookups or name in self._static:
                raise self._refused(name, value)
            partitions[name] = self._as_partition(name, value, self._counts.get(name))

    def _as_partition(self, name: str, value: object, count: int | None = None) -> Partition:
        return as_partition(*self._lookups[name], value, count)

    def _refused(self, name: str, value: object) -> SpecError:
        static = name in self._static
        return SpecError(
            say(
                f"{name!r} is a static label of this layer" if static else f"{name!r} is no label of this layer",
                text=self._spec.text,
                received=f"{name}={shown(value)}",
                instead=f"Norm(..., {name}={shown(value)}): sizes of axes are told when the layer is built"
                if any(axis.name == name for axis in self._spec.x.axes())
                else f"build the layer without {name}= to give it at every call"
                if static
                else f"one of: {', '.join(n for n in self._lookups if n not in self._static) or 'none'}",
            )
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Norm:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._static.move(fn)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Static labels stand between parameters and buffers."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        self._static.write(destination, prefix)
        for key in [prefix + name for name in self._buffers]:
            if key in destination:
                destination[key] = destination.pop(key)

    # What a key of the state names is an attribute, for those who look for it there: `torch.func.functional_call`,
    # `torch.distributed.checkpoint`, `from_pretrained`.

    def __getattr__(self, name: str) -> Any:
        static = self.__dict__.get("_static")
        if static is not None and name in static.names:
            return static[static.names[name]].ids
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        static = self.__dict__.get("_static")
        if static is not None and name in static.names:
            static.adopt(static.names[name], value)
        else:
            super().__setattr__(name, value)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Pickles of earlier versions have the ids among the buffers."""
        if isinstance(state.get("_static"), dict):
            state = {**state, "_buffers": dict(state["_buffers"])}
            state["_static"] = static = StaticLabels(state["_lookups"], state["_static"], torch.device("cpu"))
            for key, name in static.names.items():
                static.adopt(name, state["_buffers"].pop(key))
            del state["_built"]
        super().__setstate__(state)  # type: ignore[no-untyped-call]

    # --- what is given from around

    def _from_around(self, around: Mapping[str, Any], mask: Tensor | None, dynamic: dict[str, Label]) -> Tensor | None:
        """The mask; and the labels, into `dynamic`."""
        taken = mask is None and self._spec.mask is not None and "mask" in around
        mask = around["mask"] if taken else mask
        for name in self._lookups:
            if name in around and name not in dynamic and name not in self._static and name != "mask":
                dynamic[name] = around[name]
                taken = True
        self._check_recomputation(taken)
        return mask

    def _check_recomputation(self, given_now: bool) -> None:
        """Activation checkpointing runs forward again in backward: then what was given must still be."""
        if torch.compiler.is_compiling():
            return
        if torch._C._current_graph_task_id() == -1:
            if self._was_given != given_now:
                self._was_given = given_now
        elif self._was_given and not given_now:
            raise RuntimeError(
                say(
                    "this layer is computed again by activation checkpointing, and what was given is gone",
                    received=f"{self}, outside of given(...)",
                    instead="checkpoint(..., context_fn=given.context_fn), or backward() inside of the with block",
                )
            )

    def extra_repr(self) -> str:
        """What `print(norm)` shows."""
        said = [self._said()]
        said += [f"{name}={size}" for name, size in self._sizes.items() if name.isidentifier()]
        compositions = {name: size for name, size in self._sizes.items() if not name.isidentifier()}
        said += [f"sizes={compositions}"] if compositions else []
        said += [f"{name}={self._static.get(name, count)}" for name, count in self._counts.items()]
        said += [f"{name}='{expr}'" for name, expr in self._exprs() if expr is not None]
        said += [f"{name}={list(p.shape)}" for name, p in self.named_parameters(recurse=False)]
        said += [f"cumulative={self._cumulative!r}"] if self._cumulative is not None else []
        said += [f"sharded={' '.join(self._sharding.names)!r}"] if self._sharding is not None else []
        if self.track_running_stats:
            said.append(f"momentum={self.momentum}, track_running_stats=True")
        defaults = Options()
        for name in Options.__dataclass_fields__:
            value = self.eps if name == "eps" else getattr(self._options, name)
            if value != getattr(defaults, name):
                said.append(f"{name}={value!r}")
        return ", ".join(said)

    def _said(self) -> str:
        return repr(str(self._spec))

    def _patterns(self) -> list[tuple[Formula, bool]]:
        """What it normalizes by, and whether it evaluates by running statistics of that."""
        return [(self._formula, self.running_mean is not None)]

    def _exprs(self) -> list[tuple[str, Expr | None]]:
        return [("affine", self._affine), ("conditional", self._conditional)]


@torch.no_grad()
def calibrate(
    model: nn.Module, batches: Iterable[Any], forward: Callable[[nn.Module, Any], Any] | None = None
) -> nn.Module:
    """Sets the running statistics of all norms in a model to those of all batches together: merged, not averaged.

    Norms normalize by each batch as in training, everything else is in evaluation; modes are as before at the end. If
    something raises on the way, no statistic has changed.

    Args:
        model: with `Norm` layers that have `track_running_stats=True`.
        batches: what `model(batch)` takes; of a list or a tuple, the first. An epoch of a `DataLoader`, say.
        forward: how the model is called, `forward(model, batch)`, if not so.

    Returns:
        The model.

    Raises:
        SpecError: no norm in the model has running statistics, or none of them saw an element.

    >>> model = nn.Sequential(nn.Linear(4, 3), Norm("n c -> c", c=3, track_running_stats=True))
    >>> x = torch.randn(100, 4)
    >>> model = calibrate(model, x.split(30))
    >>> torch.allclose(model[1].running_var, model[0](x).var(0), rtol=1e-4)
    True
    """
    norms = [m for m in model.modules() if isinstance(m, Norm) and m.track_running_stats]
    if not norms:
        received, instead = shown(type(model).__name__), "torch.optim.swa_utils.update_bn, for layers of torch.nn"
        raise SpecError(say("norms with running statistics are calibrated", received=received, instead=instead))
    if isinstance(batches, Tensor):
        rule, instead = "batches are several: an iterable of what the model takes", "calibrate(model, [x])"
        raise SpecError(say(rule, received=shown(batches), instead=instead))
    modes = [(module, module.training) for module in model.modules()]
    seen = 0
    try:
        model.eval()
        for norm in norms:
            norm.training, norm._collected = True, ()
        for batch in batches:
            if forward is not None:
                forward(model, batch)
            else:
                model(batch[0] if isinstance(batch, (list, tuple)) else batch)
            seen += 1
        collected = [(norm, norm._values(*norm._collected)) for norm in norms if norm._collected]
    finally:
        for module, mode in modes:
            module.training = mode
        for norm in norms:
            norm._collected = None
    collected = [(norm, values) for norm, values in collected if values[0][1].any()]
    if not collected:
        received = f"{seen} batches, in which no norm saw an element"
        raise SpecError(say("statistics are those of batches", received=received, instead="batches that hold some"))
    for norm, values in collected:
        tracked = norm.num_batches_tracked
        for buffer, (value, known) in zip((norm.running_mean, norm.running_var), values, strict=True):
            assert buffer is not None
            buffer.copy_(value.to(buffer.dtype).where(known, buffer))
        assert tracked is not None
        tracked.copy_(values[1][1] * seen if tracked.dim() else torch.tensor(seen))
    return model


def checked_momentum(momentum: float | None) -> float | None:
    """The momentum, if it is one."""
    number = isinstance(momentum, (int, float)) and not isinstance(momentum, bool)
    if momentum is not None and not (number and 0 <= momentum <= 1):
        raise SpecError(
            say(
                "momentum is the weight of the new value, from 0 to 1; None averages all batches alike",
                received=f"momentum={shown(momentum)}",
                instead="momentum=0.1",
            )
        )
    return momentum


def _whole(t: Any) -> Tensor:
    """A buffer as every rank has it."""
    full: Tensor = t.full_tensor() if is_dtensor(t) else t
    return full


def _overwrite(buffer: Any, value: Tensor) -> None:
    if is_dtensor(buffer):
        from ..calls.dtensors import distribute_tensor

        value = distribute_tensor(value, buffer.device_mesh, buffer.placements)
    buffer.copy_(value)

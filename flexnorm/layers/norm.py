"""`Norm`: the layer that keeps the state of a pattern: parameters, static labels, running statistics."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

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
from ..calls.call import ALONE, FIELDS, Call, Result, Used, new
from ..calls.given import check_recomputation, given_here, something_given, takes
from ..calls.ranks import Ranks, Sharding, regrouped
from ..calls.routes import Change, run, same
from ..errors import ShapeError, SpecError, say
from ..partition import Partition, whole
from ..spec import Expr, Spec
from ..statistics import Moments
from . import streams
from .parameters import check_combination, check_kinds, described, fixed_shape, with_given
from .running import calibrate, checked_momentum
from .state import _Stateful
from .static_labels import StaticLabels, given_once, read_labels

__all__ = ["Norm", "calibrate"]


class Norm(_Stateful):
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
        correction: the variance is M2 / (count - correction), as in `torch.var`; 0 is the biased variance. A set of so
            many elements or fewer gives 0 (then bias). Running statistics are unbiased whatever this is.
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
        correction: float = 0,
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
        self._options = Options(center, scale, eps, activation, correction)
        self.eps = eps
        check_kinds(bias, dtype)
        self._affine = None if affine is None else self._spec.read(affine, "affine")
        self._conditional = None if conditional is None else self._spec.read(conditional, "conditional")
        read = [self._affine, self._conditional, *self.__dict__.get("_beside", ())]  # a mixture reads more labels
        self._lookups = label_names(self._spec, *read)
        self._sizes, told = sort_names(self._spec, read, sizes, labels, names)
        check_eps(self._spec, eps, self._sizes, told)
        self._counts = {
            name: whole(value, f"the number of values of label {name!r}")
            for name, value in told.items()
            if not isinstance(value, (Tensor, Partition)) and hasattr(value, "__index__")
        }
        static = {
            name: as_partition(*self._lookups[name], value) for name, value in told.items() if name not in self._counts
        }
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
        check_combination(self._spec, cumulative, self._sharding is not None, track_running_stats, process_group)
        spec = self._spec if cumulative is None else spec_along(self._spec, cumulative)
        affines = [expr for expr in (self._affine, self._conditional) if expr is not None]
        self._formula = Formula(spec, self._options, affines, self._sizes)
        self._was_given = ""
        self.momentum = checked_momentum(momentum)
        self.track_running_stats = track_running_stats
        labelled = any(True for _ in self._spec.sets.lookups())
        kept = self._fixed_shape(self._spec.sets, "running statistics") if track_running_stats else None
        self.running_statistics.build(self, kept, labelled, device, dtype)
        fits = self._fits or self._unfits or self._changes_moments or self._static.held
        self._is_plain = not (fits or conditional is not None or cumulative is not None)
        self.reset_parameters()

    def __init_subclass__(cls, **options: Any) -> None:
        """Notes which of the methods of a call a class has of its own: the others are not called."""
        super().__init_subclass__(**options)
        cls._fits = cls.fit_call is not Norm.fit_call
        cls._fits_masks = cls.fit_mask is not Norm.fit_mask
        # A layer from elsewhere may look at x in `fit_mask`, which the layers here leave out where there is no mask.
        cls._fits |= cls._fits_masks and not is_ours(cls.fit_mask)
        cls._unfits = cls.unfit is not Norm.unfit
        cls._changes_moments = cls.used is not Norm.used
        # A forward from elsewhere has read its own arguments before a call is made, so nothing can be given for them.
        ours = next(c for c in cls.__mro__ if "forward" in vars(c) and is_ours(c))
        found = [
            p.name for p in inspect.signature(vars(ours)["forward"]).parameters.values() if p.kind is not p.VAR_KEYWORD
        ]
        cls._keywords = tuple(name for name in found[2:] if name not in FIELDS)

    _fits = _fits_masks = _unfits = _changes_moments = _is_plain = False
    _keywords: tuple[str, ...] = ()

    def reset_running_stats(self) -> None:
        """Mean 0, variance 1, no batch seen."""
        self.running_statistics.reset(self)

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
        own = self.__dict__  # attributes of modules take longer
        nothing_around = not (something_given() or own["_was_given"]) and own["_sharding"] is None
        usual = nothing_around and self._is_plain and own["_buffers"]["running_mean"] is None and mask is None
        if usual and weight is None and bias is None and labels is None and not (names or return_moments):
            # Most calls: nothing is to be fitted or tracked.
            call = new(Call, (self.formula, x, None, self.stages, moments, names, False, None, (), None))
            try:
                return run(call)[0]
            except (SpecError, ShapeError):
                self._say_more(call)
                raise
        told = names if labels is None else given_once(self._spec, names, labels) if names else labels
        given = () if weight is None and bias is None else ((weight, bias),)
        call = new(Call, (self.formula, x, mask, given, moments, told, return_moments, None, (), None))
        result = self._answer(call) if nothing_around else self._around(call)
        return tuple(result) if return_moments else result[0]

    # --- a call, step by step

    def _around(self, call: Call) -> Result:
        """The answer to a call that something is given around, or that other ranks take part in."""
        try:
            call = self._with_given(call)
            if self._sharding is None or call.moments is not None or self._evaluates_by_running():
                return self._answer(call)
            with self.ranks() as ranks:
                return self._answer(call._replace(ranks=ranks))
        except (SpecError, ShapeError) as error:
            if not (something_given() and (around := given_here())):
                raise
            raise type(error)(f"{error}\n  in:       {self}, inside of given({', '.join(around)})") from None

    def _with_given(self, call: Call) -> Call:
        """The call as the user made it, with what is given around it."""
        if not (something_given() or self._was_given):
            return call
        around = given_here()
        told = self.fit_given(call, around) if around else call
        labels = [name for name in self._lookups if name not in self._static]
        takes(self, told, (*labels, *self._keywords, *(("mask",) if self._spec.mask is not None else ())))
        check_recomputation(self, told.mask is not call.mask or len(told.names) > len(call.names))
        return told

    def _answer(self, made: Call) -> Result:
        """The result of a call as the user made it, or with what is given around it."""
        try:
            call, tracked = self._ready(made)
            change: Change | None = None
            if call.moments is None:
                if self._changes_moments:
                    return self._changed(made, call)
                if call.want or self._cumulative is not None:
                    change = same if self._cumulative is None else Moments.cumulative
            result = self.running_statistics.run(self, call) if tracked else run(call, change=change)
        except (SpecError, ShapeError):
            self._say_more(made)
            raise
        return Result(self.unfit(made, result.y), result.moments) if self._unfits else result

    def _say_more(self, made: Call) -> None:
        """Raises, where a layer of a field says more about x than its pattern does."""
        if self._fits_masks and made.mask is None:
            self.fit_call(made)

    def _ready(self, made: Call) -> tuple[Call, bool]:
        """The fitted call with all stages, by the running statistics in evaluation; and whether these move with it."""
        formula, x, mask, stages, moments, names, want, center, wholes, ranks = self.fitted(made)
        if made.mask is not None and not torch.compiler.is_compiling():
            self.__dict__["_masked"] = True
        tracked, mean = False, self._buffers.get("running_mean")
        if mean is not None:
            if moments is None:
                if self.training:
                    tracked = self.track_running_stats and not want
                else:
                    moments, formula = self.running_statistics.moments(self), formula.uncorrected
            if getattr(x, "dtype", None) != mean.dtype:
                self.running_statistics.check_kind(self, x, mean)
        if ranks is not None and moments is not None:  # the layer has made the moments, so that none are merged
            ranks.agree_on("moments of the layer", differentiated=False, needed=False)
        if made.stages or self._conditional is not None:
            stages = with_given(self._spec, self._conditional, self.stages, made.stages)
        elif not stages:  # a layer of a field may have made its stages
            stages = self.stages
        return new(Call, (formula, x, mask, stages, moments, names, want, center, wholes, ranks)), tracked

    def _changed(self, made: Call, call: Call) -> Result:
        """The result by the moments that the layer makes of the moments of x."""
        found: list[Used] = []

        def change(own: Moments) -> Moments:
            found.append(self.used(call, own))
            return found[-1].moments

        y = self.unfit(made, run(call, change=change).y)
        used = found[-1]
        if used.track is not None and not call.want:
            used.track()
        return Result(y, used.seen)

    def fitted(self, made: Call) -> Call:
        """The call as the formula reads it, with labels as Partitions. Nothing is computed from x."""
        call = self.fit_call(made) if self._fits or (self._fits_masks and made.mask is not None) else made
        if call.names or self._static.held:
            names = read_labels(call, self._spec, self._lookups, self._static, self._counts)
            return call if names is None else call.fit(call.x, call.mask, names)
        return call

    # --- what a layer of a field makes of a call

    def fit_given(self, call: Call, around: Mapping[str, Any]) -> Call:
        """The call with what `given` says around it. What the call says itself stays.

        A layer takes a mask, its labels, and whatever else its `forward` takes by keyword. Names that are no labels say
        in their way what a mask says, so they are taken only where neither the call nor a mask from around says it.
        """
        names, mask = dict(call.names), call.mask
        told = [name for name, value in names.items() if not isinstance(value, int)]  # a number of graphs says no more
        if mask is None and self._spec.mask is not None and all(name in self._lookups for name in told):
            mask = around.get("mask")
        others = () if mask is not None or told else self._keywords
        for name in (*self._lookups, *others):
            if name in around and name not in names and name not in self._static and name != "mask":
                names[name] = around[name]
        return call._replace(mask=mask, names=names)

    def fit_mask(self, x: Tensor, mask: Tensor | None) -> Tensor | None:
        """The mask as the pattern reads it. A layer of a field overrides this if its mask has other axes."""
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

    def used(self, call: Call, own: Moments) -> Used:
        """The moments that a layer makes of the moments of x, because it normalizes by others.

        Args:
            call: the call as the formula reads it.
            own: the moments of x, differentiable.
        """
        return Used(own, own)

    def changes(self) -> str:
        """What `used` makes of the moments of the pattern, in a sentence for `explain`; empty, if that is nothing."""
        return ""

    def ranks(self) -> Ranks:
        """The ranks that a call is made on together; `sharded` says which sets go on over them."""
        return ALONE if self._sharding is None else self._sharding.ranks(self.training)

    def _evaluates_by_running(self) -> bool:
        return not self.training and self._buffers.get("running_mean") is not None

    # --- what a layer is built of

    @property
    def spec(self) -> Spec:
        """The pattern."""
        return self._spec

    @property
    def formula(self) -> Formula:
        """The pattern with its options, affine stages and told sizes. `eps` may be set anew."""
        own = self.__dict__  # attributes of modules take longer
        formula: Formula = own["_formula"]
        if own["eps"] != formula.options.eps:
            options = replace(self._options, eps=self.eps)
            formula = self._formula = Formula(formula.spec, options, formula.affines, self._sizes)
        return formula

    @property
    def stages(self) -> tuple[Param, ...]:
        """The learned weight and bias, as the first stage of a call; none without `affine`."""
        own = self.__dict__
        if own["_affine"] is None:
            return ()
        learned = own["_parameters"]
        try:
            return ((learned["weight"], learned["bias"]),)
        except KeyError:  # parametrizations move them elsewhere
            return ((self.weight, self.bias),)

    @property
    def labels(self) -> dict[str, Partition]:
        """The static labels, by name."""
        return dict(self._static.held)

    @property
    def running_moments(self) -> Moments | None:
        """The running statistics as `Moments` of one element each: what the layer evaluates by. None without any.

        >>> norm = Norm("n c -> c", c=3, track_running_stats=True)
        >>> y = norm(torch.randn(100, 3))
        >>> torch.equal(norm.running_moments.var, norm.running_var)
        True
        """
        return None if self._buffers.get("running_mean") is None else self.running_statistics.moments(self)

    # --- many machines

    @property
    def process_group(self) -> Any:
        """The process group of the sharded axes; None is the default one."""
        return None if self._sharding is None else self._sharding.process_group

    @process_group.setter
    def process_group(self, group: Any) -> None:
        self._sharding = regrouped(self._sharding, self, group)

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
        told = names if labels is None else given_once(self._spec, names, labels)
        given = () if weight is None and bias is None else ((weight, bias),)
        made = self._with_given(Call(self.formula, x, mask, given, None, told))
        if self._sharding is None:  # a compiler knows no such block as below
            call, new = streams.step(self._ready(made)[0], state, self._spec.text)
        else:
            with self.ranks() as ranks:
                made = made._replace(ranks=ranks)
                call, new = streams.step(self._ready(made)[0], state, self._spec.text)
        return self.unfit(made, run(call).y), new

    # --- running statistics

    def updated(self, seen: Moments) -> dict[str, Tensor]:
        """The running statistics, as buffers, after a batch of these moments. Nothing is changed.

        >>> norm = Norm("n c -> c", c=3, track_running_stats=True)
        >>> y, seen = norm(torch.randn(8, 3), return_moments=True)
        >>> list(norm.updated(seen))
        ['running_mean', 'running_var', 'num_batches_tracked']
        """
        return self.running_statistics.updated_by(self, seen)

    def extra_repr(self) -> str:
        """What `print(norm)` shows."""
        return described(self, repr(str(self._spec)))

    def _fixed_shape(self, expr: Expr, what: str) -> tuple[int, ...]:
        return fixed_shape(self._spec, expr, what, self._sizes, self._counts, self._lookups)

    def patterns(self) -> list[tuple[Formula, bool]]:
        """The formulas that a layer normalizes by; and for each, whether running statistics of its sets are kept."""
        return [(self._formula, self.running_mean is not None)]


def is_ours(value: Any) -> bool:
    """Whether a class or a function is of this package."""
    return bool(value.__module__.partition(".")[0] == __name__.partition(".")[0])

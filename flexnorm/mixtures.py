"""Mixtures: several patterns over one tensor, and a gate that says how much each of them counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial, reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .calls.arguments import Formula, Label, Options, label_missing
from .calls.call import ALONE, Call, Used
from .calls.computing import moments_of
from .calls.mixing import Kept, Mixing, Way, mix, reads
from .calls.ranks import Ranks
from .errors import SpecError, say, shown
from .images import broadcasts, over_pixels
from .layers.norm import Norm
from .layers.parameters import described
from .layers.running import checked_momentum
from .layers.static_labels import given_once
from .partition import Partition, whole
from .spec import Axis, Lookup, Spec
from .statistics import Moments, each

__all__ = ["Alternatives", "ContextGate", "ContextNorm", "DualNorm", "LearnedGate", "Mixture", "SwitchableNorm"]


class Alternatives(NamedTuple):
    """What a gate sees: of every set of the finest pattern, the moments by which each pattern would normalize it.

    Attributes:
        moments: of shape (*sets, K): the axes of the finest sets in the order of x, labels behind them; and K patterns.
        known: which moments are some: those of two elements or more (of weights, which do not count elements, those
            with a variance), unless no pattern has them.
        running: of each pattern, whether these are running statistics.
        eps: that of the norm.
    """

    moments: Moments
    known: Tensor
    running: tuple[bool, ...]
    eps: float

    @property
    def noise(self) -> Tensor:
        """Relative standard deviation that each variance has for independent normal elements, (*sets, K).

        sqrt(2 / count); 0 for running statistics. Of weights their sum counts, as if 1 were an element.
        """
        noise = (2 / self.moments.count.to(self.moments.m2.dtype).clamp(min=1)).sqrt()
        if not any(self.running):
            return noise
        return torch.stack([0 * t if runs else t for t, runs in zip(noise.unbind(-1), self.running, strict=True)], -1)

    def features(self) -> Tensor:
        """Three numbers for each pattern, (*sets, K, 3), that change with no gain and no offset of x, but for eps.

        The logarithm of its noise (and a thousandth, which running statistics are left with); how far its mean is from
        the average of all patterns, in units of the average sigma; the logarithm of its variance over the average
        variance. Where nothing is known, 0.
        """
        m, known = self.moments, self.known
        even = known.to(m.m2.dtype)
        average = m.mixed(even)
        var = (average.var + self.eps)[..., None]
        least = torch.finfo(var.dtype).eps
        some = known & (var > 0)
        var = var.where(var > 0, 1)
        distance = ((m.mean - average.mean[..., None]) + (m._low - average._low[..., None])) / var.sqrt()
        distance = distance.abs() if distance.is_complex() else distance
        ratio = ((m.var + self.eps) / var).clamp(min=least).log()
        return torch.stack([t.where(some, 0) for t in ((self.noise + 1e-3).log(), distance, ratio)], -1)


class _Unread(Alternatives):
    """Alternatives that are worked out where a gate reads them, as if they had been when it was called."""

    _work: Callable[[], Alternatives]

    def __new__(cls, work: Callable[[], Alternatives]) -> _Unread:
        made = tuple.__new__(cls, (None,) * 4)
        made.__dict__.update(_work=work, _graph=torch.is_grad_enabled())
        return made

    def __getattribute__(self, name: str) -> Any:
        return getattr(self.read(), name) if name in Alternatives._fields else super().__getattribute__(name)

    def read(self) -> Alternatives:
        """What it stands for."""
        own = self.__dict__
        if "_read" not in own:
            with torch.set_grad_enabled(own["_graph"]):
                own["_read"] = own.pop("_work")()
        found: Alternatives = own["_read"]
        return found

    def __iter__(self) -> Iterator[Any]:
        return iter(self.read())

    def __getitem__(self, index: Any) -> Any:
        return self.read()[index]

    def __eq__(self, other: object) -> bool:
        return self.read() == (other.read() if isinstance(other, _Unread) else other)

    def __hash__(self) -> int:
        return hash(self.read())

    def __repr__(self) -> str:
        return repr(self.read())

    def _replace(self, **fields: Any) -> Alternatives:  # type: ignore[override]  # this one has been read
        return self.read()._replace(**fields)

    def __reduce__(self) -> tuple[Any, ...]:
        return Alternatives, tuple(self.read())


class LearnedGate(nn.Module):
    """The same choice for every input: one number for each pattern, of which the softmax is taken.

    Args:
        patterns: how many there are.
        separate: numbers of their own for variances, as in Switchable Norm.
        device, dtype: of the parameters.

    >>> LearnedGate(3).mean_weight
    Parameter containing:
    tensor([1., 1., 1.], requires_grad=True)
    """

    mean_weight: nn.Parameter
    var_weight: nn.Parameter | None

    def __init__(
        self,
        patterns: int,
        *,
        separate: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        shape = whole(patterns, "patterns", 1)
        self.mean_weight = nn.Parameter(torch.ones(shape, device=device, dtype=_real(dtype)))
        self.register_parameter("var_weight", nn.Parameter(torch.ones_like(self.mean_weight)) if separate else None)

    def reset_parameters(self) -> None:
        """All patterns count alike."""
        for weight in self.parameters():
            nn.init.ones_(weight)

    def extra_repr(self) -> str:
        """What it was built with."""
        return f"{len(self.mean_weight)}, separate={self.var_weight is not None}"

    def forward(self, seen: Alternatives) -> Tensor | tuple[Tensor, Tensor]:
        """The logits: of means and variances, or of both."""
        return self.mean_weight if self.var_weight is None else (self.mean_weight, self.var_weight)


class ContextGate(nn.Module):
    """A choice that depends on the input: a small network of the moments, the same for all sets.

    Args:
        patterns: how many there are, K.
        hidden: width of the hidden layer; None: a linear gate.
        separate: logits of their own for variances.
        device, dtype: of the parameters.

    It sees `Alternatives.features`, and begins with all patterns counting alike.

    >>> gate = ContextGate(2, hidden=None, separate=False)
    >>> [tuple(p.shape) for p in gate.parameters()]
    [(2, 6), (2,)]
    """

    def __init__(
        self,
        patterns: int,
        hidden: int | None = 8,
        *,
        separate: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.separate = separate
        made: dict[str, Any] = {"device": device, "dtype": _real(dtype)}
        whole(patterns, "patterns", 1)
        width = 3 * patterns if hidden is None else whole(hidden, "hidden", 1)
        self.hidden = None if hidden is None else nn.Linear(3 * patterns, hidden, **made)
        self.out = nn.Linear(width, (2 if separate else 1) * patterns, **made)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """All patterns count alike."""
        if self.hidden is not None:
            self.hidden.reset_parameters()
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, seen: Alternatives) -> Tensor | tuple[Tensor, Tensor]:
        """The logits: of means and variances, or of both."""
        features = seen.features().flatten(-2).to(self.out.weight.dtype)
        if self.hidden is not None:
            features = nn.functional.silu(self.hidden(features))
        logits: Tensor = self.out(features)
        if not self.separate:
            return logits
        of_means, of_vars = logits.chunk(2, -1)
        return of_means, of_vars


class Mixture(Norm):
    r"""Several patterns over one tensor, and a gate that says how much each counts.

    With softmaxes w and v of what the gate says, and the moments that each pattern k has for an element:

        mix="moments":   y = (x - sum_k w_k mean_k) / sqrt(sum_k v_k var_k + eps) * weight + bias
        mix="results":   y = (sum_k w_k (x - mean_k) / sqrt(var_k + eps)) * weight + bias

    Args:
        patterns: with one left side: `["n c ... -> n c", "n c ... -> n", "n c ... -> c"]`. Statistics are read from x
            once, for the largest sets that all others are made of; those of the patterns are merged from them.
        gate: a module that is called with `Alternatives` and returns logits that broadcast to (*sets, K), one for each
            pattern, or a pair of them, for means and for variances, where moments are mixed; None: `LearnedGate`.
            Patterns whose set has one element or none are left out of its choice, as they know no variance.
        mix: "moments", as Switchable Norm, or "results". Either costs one pass.
        affine, conditional, bias, eps, activation, sizes, labels, device, dtype, **names: as in `Norm`.
        track_running_stats: keep running statistics of those patterns whose statistics have a shape that is known when
            the layer is built (`"n c ... -> c"` with c=64), and use them in evaluation.
        momentum, sharded, process_group: as in `Norm`. Where the ranks have parts of a pattern's sets, as those of the
            batch with `sharded="n"`, its moments are merged over them; those of the others stay.

    Shapes: those of x. Masks and labels are passed as to `Norm`, and may be `given` from around.

    Raises:
        SpecError, ShapeError: as in `Norm`; patterns with different left sides, or no pattern.

    >>> norm = Mixture(["n (g c) ... -> n g c", "n (g c) ... -> n g"], affine="(g c)", g=4, sizes={"(g c)": 16})
    >>> norm(torch.randn(2, 16, 5, 5)).shape
    torch.Size([2, 16, 5, 5])
    >>> norm.gate.mean_weight.softmax(-1)
    tensor([0.5000, 0.5000], grad_fn=<SoftmaxBackward0>)

    Source: Luo et al., "Differentiable Learning-to-Normalize via Switchable Normalization", 2019, for any patterns.
    """

    running: nn.ModuleDict  # the norms whose running statistics are used, by the numbers of their patterns

    def __init__(
        self,
        patterns: Sequence[str],
        /,
        *,
        gate: nn.Module | None = None,
        mix: str = "moments",
        affine: str | None = None,
        conditional: str | None = None,
        bias: bool = True,
        eps: float = 1e-5,
        activation: str | None = None,
        track_running_stats: bool = False,
        momentum: float | None = 0.1,
        sharded: str | Sequence[str] | None = None,
        process_group: Any = None,
        sizes: Mapping[str, int] | None = None,
        labels: Mapping[str, int | Label] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **names: int | Label,
    ) -> None:
        specs = _with_one_left_side(patterns)
        if mix not in ("moments", "results"):
            rule, instead = "what is mixed are moments or results", 'mix="moments"'
            raise SpecError(say(rule, received=f"mix={shown(mix)}", instead=instead))
        for name in ("center", "scale", "cumulative", "correction"):
            if name in names:
                rule = f"a mixture subtracts means and divides by sigma, of whole sets, so {name!r} is no option of it"
                instead = f"Norm(pattern, ...) of one; of an axis, sizes={{{name!r}: 8}}"
                raise SpecError(say(rule, received=f"{name}={shown(names[name])}", instead=instead))
        if gate is not None and not isinstance(gate, nn.Module):
            axis = any(axis.name == "gate" for axis in specs[0].x.axes())
            instead = f'sizes={{"gate": {shown(gate)}}}' if axis else f"gate=LearnedGate({len(specs)}), say"
            raise SpecError(say("a gate is a module", received=f"gate={shown(gate)}", instead=instead))
        finest = reduce(Spec.refined, specs)
        self._beside = [spec.sets for spec in specs]
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        told: dict[str, Any] = {**names, **made}
        super().__init__(
            str(finest),
            affine=affine,
            conditional=conditional,
            bias=bias,
            eps=eps,
            activation=activation,
            sharded=sharded,
            process_group=process_group,
            sizes=sizes,
            labels=labels,
            **told,
        )
        self._specs, self._coarser = specs, [self._coarsening(finest, spec) for spec in specs]
        self.mix = mix
        self.gate = LearnedGate(len(specs), separate=mix == "moments", **made) if gate is None else gate
        self.running = nn.ModuleDict()
        self.momentum = momentum
        if track_running_stats:
            known = [*self._sizes, *self._counts]
            fixed = [k for k, spec in enumerate(specs) if all(_name(a) in known for a in spec.sets.atoms())]
            for k in fixed or [len(specs) - 1]:  # of which Norm says what is missing
                told = {
                    lookup.label: self._counts[lookup.label]
                    for lookup in specs[k].sets.lookups()
                    if lookup.label in self._counts
                }
                self.running[str(k)] = Norm(
                    str(specs[k]), track_running_stats=True, momentum=momentum, sizes=self._sizes, labels=told, **made
                )

    def reset_running_stats(self) -> None:
        """Mean 0, variance 1, no batch seen, of all patterns that run on."""
        for k in range(len(self._coarser) if "running" in self._modules else 0):  # not while Norm is being built
            norm = self._running_of(k)
            if norm is not None:
                norm.reset_running_stats()

    def reset_parameters(self) -> None:
        """Weight 1, bias 0, the gate and running statistics as at first, and the static labels."""
        super().reset_parameters()
        gate: Any = self._modules.get("gate")
        if hasattr(gate, "reset_parameters"):
            gate.reset_parameters()

    @property
    def track_running_stats(self) -> bool:
        """Whether any pattern runs on. Set to False, all of them evaluate by what they have, and stay."""
        runs = self._runs()
        return len(runs) > 0 and any(norm.track_running_stats for norm in runs)

    @track_running_stats.setter
    def track_running_stats(self, value: bool) -> None:
        for norm in self._runs():
            norm.track_running_stats = value

    @property
    def momentum(self) -> float | None:
        """That of the running statistics."""
        return self._momentum

    @momentum.setter
    def momentum(self, value: float | None) -> None:
        self._momentum = checked_momentum(value)
        for norm in self._runs():
            norm.momentum = value

    def _runs(self) -> list[Norm]:
        found = self.__dict__.get("_modules", {}).get("running")
        return [] if found is None else [norm for norm in found._modules.values() if isinstance(norm, Norm)]

    def updated(self, seen: Moments, *, labels: Mapping[str, Label] | None = None, **names: Label) -> dict[str, Tensor]:
        """The running statistics after a batch, as buffers of this layer. Nothing is changed.

        Args:
            seen: the second of `norm(x, return_moments=True)`: of the finest sets.
            labels, **names: those that came with the call.

        >>> norm = SwitchableNorm(3)
        >>> y, seen = norm(torch.randn(8, 3, 5), return_moments=True)
        >>> list(norm.updated(seen))
        ['running.2.running_mean', 'running.2.running_var', 'running.2.num_batches_tracked']
        """
        if not self._runs():
            rule, instead = (
                "a layer that keeps running statistics is built so",
                "Mixture(..., track_running_stats=True)",
            )
            raise SpecError(say(rule, received=f"{type(self).__name__} without any", instead=instead))
        if self._sharding is not None:
            rule, instead = "the moments of a call are those of this rank", "norm(x) in training, which asks the others"
            raise SpecError(say(rule, received=f"sharded={' '.join(self._sharding.names)!r}", instead=instead))
        dynamic = names if labels is None else given_once(self._spec, names, labels)
        partitions = self.fitted(Call(self.formula, seen.mean, names=dynamic)).names
        found: dict[str, Tensor] = {}
        for k in range(len(self._coarser)):
            norm = self._running_of(k)
            if norm is not None:
                moved = norm.updated(self._larger(k, seen, partitions))
                found.update({f"running.{k}.{name}": value for name, value in moved.items()})
        return found

    def _coarsening(self, finest: Spec, spec: Spec) -> tuple[str, tuple[str, ...], dict[str, int]]:
        """The pattern from the moments of the finest to those of this one, the labels that it reads, and its sizes."""
        pattern, labels = finest.coarsening(spec)
        names = [axis.name for axis in pattern.x.axes()]
        return str(pattern), labels, {name: size for name, size in self._sizes.items() if name in names}

    def used(self, call: Call, own: Moments) -> Used:
        """The moments of all patterns, mixed. The moments of the finest sets are what is seen."""
        larger, ranks = None, call.ranks
        if ranks is not None and ranks.agreeing:  # some patterns go on over ranks, and the finest sets do not
            larger, every = self._coarsened(own, call.names, self._running_now()), self._ranks_of_all()
            went = [(spec, m) for spec, m, whole in zip(self._specs, larger, every, strict=True) if whole.groups]
            what = "; ".join(f"sets of ({s.sets}), shape {tuple(m.mean.shape)}, in {m.mean.dtype}" for s, m in went)
            call.formula.prepare(call.x, call.mask, call.stages, call.names)
            needed = torch.is_grad_enabled() and own.mean.requires_grad
            ranks.agree_on(what, differentiated=needed, needed=needed)
            larger = [whole.moments(m) for m, whole in zip(larger, every, strict=True)]
        moments, track = self._of_own(call.x, own, call.names, larger)
        return Used(moments, own, track)

    def fit_call(self, call: Call) -> Call:
        """The labels of all patterns are given, and running statistics are of the kind of x."""
        call = super().fit_call(call)
        for norm in self._runs():
            if norm.running_mean is not None:
                norm.running_statistics.check_kind(norm, call.x, norm.running_mean)
        if self._lookups and call.moments is None:
            known = {*call.names, *self.labels}
            missing = next((name for _, read, _ in self._coarser for name in read if name not in known), None)
            if missing is not None:
                raise label_missing(*self._lookups[missing])
        return call

    def ranks(self) -> Ranks:
        """The ranks that all patterns go on over. If the finest sets do not, these only agree on the call."""
        whole = super().ranks()
        if whole.groups or self._sharding is None:
            return whole
        return Ranks([], agreeing=next((ranks.groups for ranks in self._ranks_of_all() if ranks.groups), ()))

    def _ranks_of_all(self) -> list[Ranks]:
        """The ranks that the sets of every pattern go on over; none, where it evaluates by running statistics."""
        assert self._sharding is not None
        return [
            ALONE
            if (norm := self._running_of(k)) is not None and not norm.training
            else self._sharding.of(spec).ranks()
            for k, spec in enumerate(self._specs)
        ]

    def _of_own(
        self, x: Tensor, own: Moments, partitions: Mapping[str, Partition], larger: Sequence[Moments] | None = None
    ) -> tuple[Moments, Callable[[], None]]:
        """From the finest moments to those that x is normalized by, and what moves the running statistics.

        `larger` are the moments of every pattern, where they are known.
        """
        running = self._running_now()
        if larger is None and reads(own):
            ways = self._ways_by(partitions, running, own.mean.dim())
            if ways is not None:
                seen = _Unread(partial(self._seen, own, partitions, running))
                both = self._logits(self._modules["gate"](seen), own)  # type: ignore[misc]
                moving = self._moving()
                wanted = tuple([k in moving for k in range(len(ways))]) if moving else ()
                composition = partial(self._composed, partitions, running)
                found = mix(Mixing(ways, self.eps, self.mix == "results", wanted, composition), own, both)
                if found is not None:
                    return found[0], partial(self._move, x, moving, found[1]) if moving else _nothing
                larger = self._coarsened(own, partitions, running)
                return self._mixed(seen.read(), both), partial(self._track_all, larger)
        if larger is None:
            larger = self._coarsened(own, partitions, running)
        read = self._alternatives(own, larger, partitions, running)
        return self._mixed(read, self._logits(self.gate(read), own)), partial(self._track_all, larger)

    def _running_now(self) -> dict[int, Moments]:
        """What the patterns evaluate by that evaluate by running statistics. These may move before a gradient comes."""
        found: dict[int, Moments] = {}
        for k, norm in self._keepers():
            if not norm.training:
                m = norm.running_statistics.moments(norm)
                found[k] = Moments(m.count, m.mean.clone(), m.m2.clone())
        return found

    def _keepers(self) -> list[tuple[int, Norm]]:
        """What keeps running statistics, with the numbers of their patterns."""
        running: Any = self._modules["running"]
        return [(int(k), norm) for k, norm in running._modules.items()]

    def _moving(self) -> dict[int, Norm]:
        """Those patterns whose running statistics move with the batch."""
        return {k: norm for k, norm in self._keepers() if norm.training and norm.track_running_stats}

    def _move(self, x: Tensor, moving: Mapping[int, Norm], patterns: Sequence[Kept | None]) -> None:
        """Moves running statistics towards the moments that the library has found."""
        for k, norm in moving.items():
            kept = patterns[k]
            assert kept is not None
            if not norm.running_statistics.moved_in_place(norm, x, *kept):
                norm.running_statistics.track(norm, moments_of(x, kept))

    def _track_all(self, larger: Sequence[Moments]) -> None:
        """Moves running statistics towards the moments of the patterns."""
        for k, norm in self._moving().items():
            norm.running_statistics.track(norm, larger[k])

    def _ways_by(
        self, partitions: Mapping[str, Partition], running: Mapping[int, Moments], dims: int
    ) -> tuple[Way, ...] | None:
        """The ways from the finest sets to those of all patterns. None: the library does not know one."""
        formulas: list[Formula | None] | None = self.__dict__.get("_formulas")
        if formulas is None:  # in no pickle of earlier versions
            formulas = self.__dict__["_formulas"] = [
                None if spec.sets == self._spec.sets else Formula(Spec.parse(pattern), Options(), (), sizes)
                for spec, (pattern, _, sizes) in zip(self._specs, self._coarser, strict=True)
            ]
        ways: list[Way] = []
        for k, formula in enumerate(formulas):
            mean, var = (running[k].mean, running[k].m2) if k in running else (None, None)
            if formula is None:
                ways.append((None, (), mean, var))
                continue
            pattern, labels = formula.patterns[dims], formula.packed(partitions) if formula.lookups else ()
            if pattern is None or labels is None:
                return None
            ways.append((pattern, labels, mean, var))
        return tuple(ways)

    def _seen(self, own: Moments, partitions: Mapping[str, Partition], running: Mapping[int, Moments]) -> Alternatives:
        """What a gate reads, in torch's operations."""
        return self._alternatives(own, self._coarsened(own, partitions, running), partitions, running)

    def _composed(
        self,
        partitions: Mapping[str, Partition],
        running: Mapping[int, Moments],
        own: Moments,
        logits: Sequence[Tensor],
    ) -> Moments:
        """The moments of the mixtures, in torch's operations."""
        return self._mixed(self._seen(own, partitions, running), logits)

    def _running_of(self, k: int) -> Norm | None:
        """What keeps the running statistics of a pattern, if it has any."""
        norm = self.running[str(k)] if str(k) in self.running else None  # noqa: SIM401  # a ModuleDict has no get
        assert norm is None or isinstance(norm, Norm)
        return norm

    def _coarsened(
        self, own: Moments, partitions: Mapping[str, Partition], running: Mapping[int, Moments]
    ) -> list[Moments]:
        """The moments of every pattern; the running ones, where it evaluates by them."""
        larger = []
        for k in range(len(self._coarser)):
            if k in running:
                m = running[k].rounded(own.m2.dtype)  # with the count of two elements, as they are known
                larger.append(Moments(m.count.to(own.count.dtype) * 2, m.mean, m.m2 * 2, m.low))
            else:
                larger.append(self._larger(k, own, partitions))
        return larger

    def _larger(self, k: int, own: Moments, partitions: Mapping[str, Partition]) -> Moments:
        """The moments of a pattern, from those of the finest."""
        if self._specs[k].sets == self._spec.sets:
            return own
        pattern, read, sizes = self._coarser[k]
        return own.coarsen(pattern, sizes=sizes, **{name: partitions[name] for name in read})

    def _alternatives(
        self,
        own: Moments,
        larger: Sequence[Moments],
        partitions: Mapping[str, Partition],
        running: Mapping[int, Moments],
    ) -> Alternatives:
        """The moments of all patterns, for every set of the finest."""
        every = []
        for k, (pattern, read, sizes) in enumerate(self._coarser):
            m = larger[k]
            if self._specs[k].sets != self._spec.sets:
                labels = {name: partitions[name] for name in read}
                m = m.refine(pattern, own.mean.shape, sizes=sizes, **labels)
            every.append(m)
        moments = each(lambda *fields: torch.stack(fields, -1), *every)
        some = moments.count > 0
        known = some & (moments.m2 > 0) if own.count.is_floating_point() else moments.count > 1
        known = known | (some & ~known.any(-1, keepdim=True))
        return Alternatives(moments, known, tuple([k in running for k in range(len(every))]), self.eps)

    def _logits(self, said: Any, own: Moments) -> tuple[Tensor, ...]:
        """What a gate has said: the logits of means and variances, or of both."""
        both = said if isinstance(said, tuple) else (said,)
        shape = (*own.mean.shape, len(self._specs))
        if not 1 <= len(both) <= (2 if self.mix == "moments" else 1) or not all(
            _fits(logits, shape) for logits in both
        ):
            pair = " or a pair of them" if self.mix == "moments" else ""
            rule = f"a gate returns floating logits that broadcast to ({self._spec.sets} patterns), {shape} here{pair}"
            received = f"{type(self.gate).__name__}: {', '.join(map(shown, both)) or 'nothing'}"
            raise SpecError(say(rule, received=received, instead=f"logits of shape {shape}, or {shape[-1:]}"))
        return both

    def _mixed(self, seen: Alternatives, both: Sequence[Tensor]) -> Moments:
        m = Moments(seen.moments.count.where(seen.known, 0), seen.moments.mean, seen.moments.m2, seen.moments.low)
        weights = [logits.to(m.m2.dtype).softmax(-1) for logits in both]
        return m.mixed(*weights) if self.mix == "moments" else m.mixed_results(weights[0], self.eps)

    def patterns(self) -> list[tuple[Formula, bool]]:
        """All patterns, and whether running statistics of each are kept."""
        options = Options(eps=self.eps)
        return [(Formula(spec, options, (), self._sizes), str(k) in self.running) for k, spec in enumerate(self._specs)]

    def extra_repr(self) -> str:
        """What `Norm` shows, with all patterns."""
        said = described(self, repr([str(spec) for spec in self._specs]))
        return f"{said}, sets={str(self._spec.sets)!r}, mix={self.mix!r}"


class _OfImages(Mixture):
    """A mixture over (N, C, *spatial), whose masks are (N, *spatial)."""

    def forward(  # type: ignore[override]  # torch's name
        self,
        input: Tensor,
        mask: Tensor | None = None,
        *,
        moments: Moments | None = None,
        return_moments: bool = False,
    ) -> Any:
        """Normalizes x.

        Args:
            input: x, (N, C, *spatial).
            mask: bool (which pixels there are) or floating (weights), (N, *spatial), or of size 1 along an axis.
            moments: statistics to use instead, of the finest sets.
            return_moments: return the result and the moments of the finest sets, and update nothing.
        """
        if return_moments:
            return super().forward(input, mask, moments=moments, return_moments=True)
        return super().forward(input, mask, moments=moments)

    def fit_mask(self, x: Tensor, mask: Tensor | None) -> Tensor | None:
        """The mask over all pixels."""
        return over_pixels(x, mask) if isinstance(x, Tensor) else mask


class SwitchableNorm(_OfImages):
    """Switchable norm: learned averages of the moments of instance, layer and batch norm.

    Args:
        num_features: number of channels, C.
        eps: added to the variance, in the unit of x squared.
        momentum: weight of the new value in the running statistics of the batch; None: the average of all batches.
        affine: learn weight and bias, of shape (C,).
        track_running_stats: use running statistics of the batch in evaluation.
        device, dtype: of the parameters.
        bias: learn a bias beside the weight.
        activation: "relu", "silu" or "gelu", applied to the result.
        sharded, process_group: as in `Norm`: with "n" the batch is that of all ranks.

    Shapes: x is (N, C, *spatial), a mask (N, *spatial); the result is as x.

    The logits are `gate.mean_weight` and `gate.var_weight`, in the order instance, layer, batch.

    >>> norm = SwitchableNorm(8)
    >>> norm(torch.randn(4, 8, 5, 5)).shape
    torch.Size([4, 8, 5, 5])

    Differs from the authors' code: momentum weighs the new value, as in torch; running variances are unbiased; weight
    and bias are (C,).

    Source: Luo et al., "Differentiable Learning-to-Normalize via Switchable Normalization", 2019.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: str | None = None,
        sharded: str | None = None,
        process_group: Any = None,
    ) -> None:
        left = "n c ..., n ..."
        super().__init__(
            [f"{left} -> n c", f"{left} -> n", f"{left} -> c"],
            affine="c" if affine else None,
            bias=bias,
            eps=eps,
            activation=activation,
            sharded=sharded,
            process_group=process_group,
            momentum=momentum,
            track_running_stats=track_running_stats,
            c=whole(num_features, "num_features", 1),
            device=device,
            dtype=dtype,
        )
        self.num_features = num_features


class DualNorm(_OfImages):
    """Group norm and batch norm, and a gate between their results that sees how far each is to be trusted.

    Args:
        num_groups: number of groups of the group norm.
        num_channels: number of channels, C.
        eps: added to the variance, in the unit of x squared.
        momentum: weight of the new value in the running statistics of the batch; None: the average of all batches.
        affine: learn weight and bias, of shape (C,).
        track_running_stats: use running statistics of the batch in evaluation.
        device, dtype: of the parameters.
        bias: learn a bias beside the weight.
        activation: "relu", "silu" or "gelu", applied to the result.
        sharded, process_group: as in `Norm`: with "n" the batch is that of all ranks.

    Shapes: x is (N, C, *spatial), a mask (N, *spatial); the result is as x.

    The gate is linear in `Alternatives.features`: the noise of both variances, which falls with the batch size (running
    statistics have none), and how far the two are apart. A batch that has one value per channel has no say: then it is
    group norm.

    >>> norm = DualNorm(4, 16)
    >>> x = torch.randn(1, 16)
    >>> torch.allclose(norm(x), nn.functional.group_norm(x, 4), atol=1e-5)
    True

    Source: told of as "dual normalization", without a paper that we could find; a gate between the results of batch and
    instance norm is Nam and Kim, "Batch-Instance Normalization for Adaptively Style-Invariant Neural Networks", 2018.
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: str | None = None,
        sharded: str | None = None,
        process_group: Any = None,
    ) -> None:
        left, axes = "n (g c) ..., n ...", "(g c)"
        super().__init__(
            [f"{left} -> n g", f"{left} -> g c"],
            gate=ContextGate(2, None, separate=False, device=device, dtype=dtype),
            mix="results",
            affine=axes if affine else None,
            bias=bias,
            eps=eps,
            activation=activation,
            sharded=sharded,
            process_group=process_group,
            momentum=momentum,
            track_running_stats=track_running_stats,
            g=whole(num_groups, "num_groups", 1),
            sizes={axes: whole(num_channels, "num_channels", 1)},
            device=device,
            dtype=dtype,
        )
        self.num_groups, self.num_channels = num_groups, num_channels


class ContextNorm(_OfImages):
    """Instance, group and layer norm, mixed anew for every image and channel by a small network of the moments.

    Nothing runs on, and no sample sees another: it is the same in training and evaluation.

    Args:
        num_groups: number of groups of the group norm.
        num_channels: number of channels, C.
        hidden: width of the network's hidden layer; None: a linear gate.
        eps: added to the variance, in the unit of x squared.
        affine: learn weight and bias, of shape (C,).
        device, dtype: of the parameters.
        bias: learn a bias beside the weight.
        activation: "relu", "silu" or "gelu", applied to the result.

    Shapes: x is (N, C, *spatial), a mask (N, *spatial); the result is as x.

    >>> norm = ContextNorm(4, 16)
    >>> norm(torch.randn(2, 16, 7, 7)).shape
    torch.Size([2, 16, 7, 7])

    Source: Zhang et al., "Exemplar Normalization for Learning Deep Representation", 2020, where another network chooses
    for every sample. "Context-dependent" and "meta" normalization are told of without a paper that we could find.
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        hidden: int | None = 8,
        eps: float = 1e-5,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: str | None = None,
    ) -> None:
        left, axes = "n (g c) ..., n ...", "(g c)"
        super().__init__(
            [f"{left} -> n g c", f"{left} -> n g", f"{left} -> n"],
            gate=ContextGate(3, hidden, device=device, dtype=dtype),
            affine=axes if affine else None,
            bias=bias,
            eps=eps,
            activation=activation,
            g=whole(num_groups, "num_groups", 1),
            sizes={axes: whole(num_channels, "num_channels", 1)},
            device=device,
            dtype=dtype,
        )
        self.num_groups, self.num_channels = num_groups, num_channels


def _with_one_left_side(patterns: Sequence[str]) -> list[Spec]:
    if isinstance(patterns, str) or not isinstance(patterns, Sequence) or not patterns:
        rule, instead = "a mixture is one of several patterns, in a list", '["n c ... -> n c", "n c ... -> n"]'
        raise SpecError(say(rule, received=shown(patterns), instead=instead))
    specs = [Spec.parse(pattern) for pattern in patterns]
    for spec in specs[1:]:
        if (spec.x, spec.mask) != (specs[0].x, specs[0].mask):
            finest = max(specs, key=lambda s: (len(list(s.x.atoms())), s.mask is not None))
            left = str(finest).split(" -> ")[0]
            raise SpecError(
                say(
                    "the patterns of a mixture have one left side: the finest that any of them needs",
                    received=f'"{specs[0]}" and "{spec}"',
                    instead=f'"{left} -> ..." in all of them: "n (g c) ... -> n g c" is "n c ... -> n c" of these axes',
                )
            )
    return specs


def _nothing() -> None:
    """No running statistics move."""


def _fits(logits: object, shape: Sequence[int]) -> bool:
    """Whether these are logits of so many sets and patterns, or broadcast to them."""
    if not isinstance(logits, Tensor) or not logits.is_floating_point() or not 1 <= logits.dim() <= len(shape):
        return False
    if logits.dim() == 1:
        return logits.shape[0] == shape[-1]
    sizes = shape[len(shape) - logits.dim() :]
    return broadcasts(logits, sizes) and logits.shape[-1] == shape[-1]


def _real(dtype: torch.dtype | None) -> torch.dtype | None:
    """Of gates, whose logits are real."""
    return dtype.to_real() if dtype is not None and dtype.is_complex else dtype


def _name(atom: Any) -> str | None:
    return atom.label if isinstance(atom, Lookup) else atom.name if isinstance(atom, Axis) else None

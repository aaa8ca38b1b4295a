"""Mixtures: several patterns over one tensor, and a gate that says how much each of them counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .arguments import Formula, Label, Options, Param, label_missing
from .errors import SpecError, say, shown
from .functional import ALONE, own_moments
from .images import over_pixels
from .norm import Norm
from .partition import Partition, whole
from .spec import Axis, Lookup, Spec
from .statistics import Moments, each

__all__ = ["Alternatives", "ContextGate", "ContextNorm", "DualNorm", "LearnedGate", "Mixture", "SwitchableNorm"]


class Alternatives(NamedTuple):
    """What a gate sees: of every set of the finest pattern, the moments by which each pattern would normalize it.

    Attributes:
        moments: of shape (*sets, K), K patterns.
        noise: relative standard deviation that each of these variances has for independent normal elements,
            sqrt(2 / count); 0 for running statistics. Of weights, which do not count, that of their sum.
        known: which moments are some: those of two elements or more, unless no pattern has them.
        eps: that of the norm.
    """

    moments: Moments
    noise: Tensor
    known: Tensor
    eps: float

    def features(self) -> Tensor:
        """Three numbers for each pattern, (*sets, K, 3), that change with no gain and no offset of x.

        Its noise; how far its mean is from the average of all patterns, in units of the average sigma; the logarithm of
        its variance over the average variance. Where nothing is known, 0.
        """
        m, known = self.moments, self.known
        even = known.to(m.m2.dtype)
        average = m.mixed(even)
        var = (average.var + self.eps)[..., None]
        least = torch.finfo(var.dtype).eps
        some = known & (var > 0)
        var = var.where(var > 0, 1)
        distance = (m.mean - average.mean[..., None]) * var.rsqrt()
        distance = distance.abs() if distance.is_complex() else distance
        ratio = ((m.var + self.eps) / var).clamp(min=least).log()
        return torch.stack([t.where(some, 0) for t in (self.noise, distance, ratio)], -1)


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
        self.mean_weight = nn.Parameter(torch.ones(patterns, device=device, dtype=dtype))
        self.register_parameter("var_weight", nn.Parameter(torch.ones_like(self.mean_weight)) if separate else None)

    def reset_parameters(self) -> None:
        """All patterns count alike."""
        for weight in self.parameters():
            nn.init.ones_(weight)

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
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        width = 3 * patterns if hidden is None else hidden
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
            pattern, or a pair of them, for means and for variances; None: `LearnedGate`. Patterns whose set has one
            element or none are left out of its choice, as they know no variance.
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

    running: nn.ModuleDict

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

    def _coarsening(self, finest: Spec, spec: Spec) -> tuple[str, tuple[str, ...], dict[str, int]]:
        """The pattern from the moments of the finest to those of this one, the labels that it reads, and its sizes."""
        pattern, labels = finest.coarsening(spec)
        names = [axis.name for axis in pattern.x.axes()]
        return str(pattern), labels, {name: size for name, size in self._sizes.items() if name in names}

    def _normalize(
        self,
        x: Tensor,
        mask: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        moments: Moments | None,
        dynamic: Mapping[str, Any],
        return_moments: bool = False,
    ) -> tuple[Tensor, Moments | None]:
        larger: list[Moments] = []
        if moments is None:
            partitions = dict(self.labels)
            if self._sharding is None:  # apart from the other, as a compiler knows no such block
                self._check_labels(dynamic, partitions)
                own = own_moments(self._formula, x, mask, partitions)
                larger = self._coarsened(own, partitions)
            else:
                own, larger = self._over_ranks(x, mask, self._params(weight, bias), dynamic, partitions)
            moments = self._mixed(self._alternatives(own, larger, partitions))
        y, used = super()._normalize(x, mask, weight, bias, moments, dynamic, return_moments)
        if not return_moments:
            for k, m in enumerate(larger):
                norm = self._running_of(k)
                if norm is not None and norm.training:
                    norm._track(m)
        return y, used

    def _running_of(self, k: int) -> Norm | None:
        """What keeps the running statistics of a pattern, if it has any."""
        norm = self.running[str(k)] if str(k) in self.running else None  # noqa: SIM401  # a ModuleDict has no get
        assert norm is None or isinstance(norm, Norm)
        return norm

    def _check_labels(self, dynamic: Mapping[str, Any], partitions: dict[str, Partition]) -> None:
        """Reads the labels. Those of the finest pattern are asked for with its moments."""
        self._read(dynamic, partitions)
        missing = next((name for _, read, _ in self._coarser for name in read if name not in partitions), None)
        if missing is not None:
            raise label_missing(*self._lookups[missing])

    def _coarsened(self, own: Moments, partitions: Mapping[str, Partition]) -> list[Moments]:
        """The moments of every pattern; the running ones, where it evaluates by them."""
        larger = []
        for k, (pattern, read, sizes) in enumerate(self._coarser):
            norm = self._running_of(k)
            if norm is not None and not norm.training:
                larger.append(norm._running().rounded(own.m2.dtype))
            elif self._specs[k].sets == self._spec.sets:
                larger.append(own)
            else:
                larger.append(own.coarsen(pattern, sizes=sizes, **{name: partitions[name] for name in read}))
        return larger

    def _over_ranks(
        self,
        x: Tensor,
        mask: Tensor | None,
        params: Sequence[Param],
        dynamic: Mapping[str, Any],
        partitions: dict[str, Partition],
    ) -> tuple[Moments, list[Moments]]:
        """The finest moments, and those of every pattern, over all ranks. What may raise does so before these agree."""
        assert self._sharding is not None
        with self._sharding.ranks() as whole:  # if the finest sets go on over the ranks, all others follow from them
            if whole.groups:
                self._check_labels(dynamic, partitions)
                self._formula.prepare(x, mask, params, partitions)
                own = own_moments(self._formula, x, mask, partitions, whole)
                return own, self._coarsened(own, partitions)
        apart = [norm is not None and not norm.training for norm in map(self._running_of, range(len(self._specs)))]
        every = [
            ALONE if runs else self._sharding.of(spec).ranks() for spec, runs in zip(self._specs, apart, strict=True)
        ]
        with next((ranks for ranks in every if ranks.groups), ALONE) as together:
            self._check_labels(dynamic, partitions)
            self._formula.prepare(x, mask, params, partitions)
            own = own_moments(self._formula, x, mask, partitions)
            larger = self._coarsened(own, partitions)
            went = [(spec, m) for spec, m, ranks in zip(self._specs, larger, every, strict=True) if ranks.groups]
            what = "; ".join(f"sets of ({s.sets}), shape {tuple(m.mean.shape)}, in {m.mean.dtype}" for s, m in went)
            needed = torch.is_grad_enabled() and own.mean.requires_grad
            together.agree_on(what, differentiated=needed, needed=needed)
        return own, [ranks.moments(m) for m, ranks in zip(larger, every, strict=True)]

    def _alternatives(
        self, own: Moments, larger: Sequence[Moments], partitions: Mapping[str, Partition]
    ) -> Alternatives:
        """The moments of all patterns, for every set of the finest."""
        every, noise, known = [], [], []
        for k, (pattern, read, sizes) in enumerate(self._coarser):
            norm, labels = self._running_of(k), {name: partitions[name] for name in read}
            evaluates = norm is not None and not norm.training
            same = self._specs[k].sets == self._spec.sets
            m = larger[k] if same else larger[k].refine(pattern, own.mean.shape, sizes=sizes, **labels)
            count = m.count.to(own.m2.dtype)
            noise.append(torch.zeros_like(count) if evaluates else (2 / count.clamp(min=1)).sqrt())
            known.append(m.count > (0 if evaluates or own.count.is_floating_point() else 1))
            every.append(Moments(count, m.mean, m.m2, m.low))
        moments = each(lambda *fields: torch.stack(fields, -1), *every)
        some = torch.stack(known, -1)
        some = some | (~some.any(-1, keepdim=True) & (moments.count > 0))
        return Alternatives(moments, torch.stack(noise, -1), some, self.eps)

    def _mixed(self, seen: Alternatives) -> Moments:
        said = self.gate(seen)
        both = said if isinstance(said, tuple) else (said,)
        m = Moments(seen.moments.count.where(seen.known, 0), seen.moments.mean, seen.moments.m2, seen.moments.low)
        patterns, shape = len(self._specs), tuple(m.mean.shape)
        for logits in both:
            fits = isinstance(logits, Tensor) and logits.dim() <= len(shape) and logits.shape[-1:] == shape[-1:]
            if not fits or len(both) > (2 if self.mix == "moments" else 1):
                most = " or a pair of them" if self.mix == "moments" else ""
                rule = f"a gate returns logits that end with one for each of {patterns} patterns{most}"
                received = f"{type(self.gate).__name__}: {', '.join(map(shown, both))}"
                raise SpecError(say(rule, received=received, instead=f"logits of shape {shape}, or ({patterns},)"))
        weights = [logits.to(m.m2.dtype).expand(shape).softmax(-1) for logits in both]
        return m.mixed(*weights) if self.mix == "moments" else m.mixed_results(weights[0], self.eps)

    def _said(self) -> str:
        return repr([str(spec) for spec in self._specs])

    def _patterns(self) -> list[tuple[Formula, bool]]:
        options = Options(eps=self.eps)
        return [(Formula(spec, options, (), self._sizes), str(k) in self.running) for k, spec in enumerate(self._specs)]

    def extra_repr(self) -> str:
        """What `Norm` shows, with all patterns."""
        return f"{super().extra_repr()}, mix={self.mix!r}"


class _OfImages(Mixture):
    """A mixture over (N, C, *spatial), whose masks are (N, *spatial)."""

    def _normalize(self, x: Tensor, mask: Tensor | None, *others: Any) -> tuple[Tensor, Moments | None]:
        return super()._normalize(x, over_pixels(x, mask), *others)


class SwitchableNorm(_OfImages):
    """Switchable norm: learned averages of the moments of instance, layer and batch norm.

    Args:
        num_features: number of channels, C.
        eps: added to the variance, in the unit of x squared.
        momentum: weight of the new value in the running statistics of the batch; None: the average of all batches.
        affine: learn weight and bias, of shape (C,).
        track_running_stats: use running statistics of the batch in evaluation.
        device, dtype: of the parameters.

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
    ) -> None:
        left = "n c ..., n ..."
        super().__init__(
            [f"{left} -> n c", f"{left} -> n", f"{left} -> c"],
            affine="c" if affine else None,
            eps=eps,
            momentum=momentum,
            track_running_stats=track_running_stats,
            c=whole(num_features, "num_features", 1),
            device=device,
            dtype=dtype,
        )


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
    ) -> None:
        left, axes = "n (g c) ..., n ...", "(g c)"
        super().__init__(
            [f"{left} -> n g", f"{left} -> g c"],
            gate=ContextGate(2, None, separate=False, device=device, dtype=dtype),
            mix="results",
            affine=axes if affine else None,
            eps=eps,
            momentum=momentum,
            track_running_stats=track_running_stats,
            g=whole(num_groups, "num_groups", 1),
            sizes={axes: whole(num_channels, "num_channels", 1)},
            device=device,
            dtype=dtype,
        )


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
    ) -> None:
        left, axes = "n (g c) ..., n ...", "(g c)"
        super().__init__(
            [f"{left} -> n g c", f"{left} -> n g", f"{left} -> n"],
            gate=ContextGate(3, hidden, device=device, dtype=dtype),
            affine=axes if affine else None,
            eps=eps,
            g=whole(num_groups, "num_groups", 1),
            sizes={axes: whole(num_channels, "num_channels", 1)},
            device=device,
            dtype=dtype,
        )


def _with_one_left_side(patterns: Sequence[str]) -> list[Spec]:
    if isinstance(patterns, str) or not isinstance(patterns, Sequence) or not patterns:
        rule, instead = "a mixture is one of several patterns, in a list", '["n c ... -> n c", "n c ... -> n"]'
        raise SpecError(say(rule, received=shown(patterns), instead=instead))
    specs = [Spec.parse(pattern) for pattern in patterns]
    for spec in specs[1:]:
        if (spec.x, spec.mask) != (specs[0].x, specs[0].mask):
            left = str(specs[0]).split(" -> ")[0]
            raise SpecError(
                say(
                    "the patterns of a mixture have one left side: the finest that any of them needs",
                    received=f'"{specs[0]}" and "{spec}"',
                    instead=f'"{left} -> ..." in all of them: "n (g c) ... -> n g c" is "n c ... -> n c" of these axes',
                )
            )
    return specs


def _name(atom: Any) -> str | None:
    return atom.label if isinstance(atom, Lookup) else atom.name if isinstance(atom, Axis) else None

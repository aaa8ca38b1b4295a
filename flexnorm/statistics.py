"""`Moments`: what is kept of a set, (count, mean, M2), and the one formula that merges them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from . import collectives
from .axes import Sizes, bind, check_operand, check_shape
from .errors import ShapeError, SpecError, say, shown
from .partition import Partition, flat
from .sets import Sets, sets_of
from .spec import Spec


@dataclass(frozen=True, eq=False)
class Moments:
    """Count, mean and M2 = sum of (x - mean)^2 of every set; they merge exactly, in any order and grouping.

    Args:
        count: elements of every set (int64), or their total weight (floating). Every field has the same shape, one
            axis for each axis of the statistics.
        mean: mean of every set, 0 for empty ones, in float32 or wider; complex, if x is.
        m2: sum of squared differences from the mean, of their absolute values if x is complex; the biased variance is
            m2 / count.
        low: what the mean lost when it was rounded: `mean + low` is the mean to twice the precision.

    >>> m = Moments(torch.tensor(3), torch.tensor(2.0), torch.tensor(2.0))
    >>> m.var
    tensor(0.6667)
    >>> m.merge(Moments(torch.tensor(1), torch.tensor(6.0), torch.tensor(0.0)))
    Moments(count=tensor(4), mean=tensor(3.), m2=tensor(14.))

    Source: Chan, Golub, LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances", 1979.
    """

    count: Tensor
    mean: Tensor
    m2: Tensor
    low: Tensor | None = None

    def check(self) -> None:
        """Raises, unless the fields are tensors of one shape."""
        fields = {"count": self.count, "mean": self.mean, "m2": self.m2}
        fields.update({} if self.low is None else {"low": self.low})
        for name, value in fields.items():
            if not isinstance(value, Tensor):
                received, instead = f"{name}={shown(value)}", f"{name}=torch.tensor(...)"
                raise SpecError(say("the fields of Moments are tensors", received=received, instead=instead))
            if value.shape != self.mean.shape or value.device != self.mean.device:
                received = ", ".join(f"{n} of shape {tuple(v.shape)} on {v.device}" for n, v in fields.items())
                rule, instead = "the fields of Moments have one shape and device", "one value for every set"
                raise ShapeError(say(rule, received=received, instead=instead))

    @property
    def var(self) -> Tensor:
        """Biased variance, m2 / count; 0 for an empty set."""
        return self.m2 / divisor(self.count)

    def unbiased_var(self) -> tuple[Tensor, Tensor]:
        """m2 / (count - 1), and where it is known: with two elements or more. Of weights, which do not count, `var`.

        >>> m = Moments(torch.tensor([3, 1]), torch.tensor([2.0, 5.0]), torch.tensor([2.0, 0.0]))
        >>> m.unbiased_var()
        (tensor([1., 0.]), tensor([ True, False]))
        """
        if self.count.is_floating_point():
            return self.var, self.count > 0
        return self.m2 / divisor(self.count - 1), self.count > 1

    def merge(self, other: Moments) -> Moments:
        """The moments of the union of each set with its counterpart in `other`.

        Raises:
            ShapeError: the shapes differ.
        """
        if not isinstance(other, Moments):
            received, instead = shown(other), "m.merge(flexnorm.moments(x, pattern))"
            raise SpecError(say("moments merge with Moments", received=received, instead=instead))
        self.check()
        other.check()
        if self.mean.shape != other.mean.shape:
            raise ShapeError(
                say(
                    "moments merge set by set, so their shapes are equal",
                    received=f"{tuple(self.mean.shape)} and {tuple(other.mean.shape)}",
                    instead='coarsen the finer one first: m.coarsen("n c -> c")',
                )
            )
        return each(lambda a, b: torch.stack([a, b]), self, other).coarsen("part ... -> ...")

    def all_reduce(self, process_group: Any = None) -> Moments:
        """The moments of the union of each set with its counterparts on all other ranks, merged in their order.

        Differentiable: the loss is then the sum of the losses of all ranks.

        Args:
            process_group: of `torch.distributed`; None is the default one.

        Raises:
            RuntimeError: there is no process group, or another rank has failed.
            ShapeError: ranks have moments of different shapes. All of them raise.
        """
        self.check()
        group = collectives.group_of(process_group)
        what = f"moments of {self.mean.dtype}, shape {tuple(self.mean.shape)}"
        differentiated = torch.is_grad_enabled() and any(t.requires_grad for t in (self.count, self.mean, self.m2))
        collectives.agree([group], what, differentiated=differentiated, needed=differentiated)
        return self.gathered(group)

    def gathered(self, group: Any, *, replicated: bool = False) -> Moments:
        """`all_reduce`, where it is known that the ranks go on together. What travels is in float64."""
        if self.mean.is_complex():
            return self.parts().gathered(group, replicated=replicated).joined()
        packed = torch.stack([t.double() for t in (self.count, self.mean, self.m2, self._low)], -1)
        every = collectives.gather(packed, group, replicated=replicated)
        merged = Moments(*every.unbind(-1)).coarsen("rank ... -> ...").rounded(self.mean.dtype)
        return Moments(merged.count.to(self.count.dtype), merged.mean, merged.m2, merged.low)

    def cumulative(self, axis: int = -1) -> Moments:
        """Along an axis, the moments of all sets up to and with each place.

        They depend, to the last bit, on nothing that comes later. 2 n merges, 2 log2(n) one after another.

        >>> Moments(torch.tensor([1, 1, 1]), torch.tensor([0.0, 2.0, 4.0]), torch.zeros(3)).cumulative()
        Moments(count=tensor([1, 2, 3]), mean=tensor([0., 1., 2.]), m2=tensor([0., 2., 8.]))
        """
        self.check()
        if not -self.mean.dim() <= axis < self.mean.dim():
            received, instead = f"axis={axis}, shape {tuple(self.mean.shape)}", "axis=-1, the last"
            raise ShapeError(say("the axis is one of the moments", received=received, instead=instead))
        last = each(lambda t: t.movedim(axis, -1), self)
        if torch.compiler.is_dynamo_compiling() and not self.mean.is_complex():  # one operation, for any length
            up_to = Moments(*torch.ops.flexnorm.cumulative.v3(last.count, last.mean, last.m2, last._low))
        else:
            up_to = _up_to(last)
        return each(lambda t: t.movedim(-1, axis), up_to)

    def coarsen(self, pattern: str, *, sizes: Sizes | None = None, **labels: Partition) -> Moments:
        """The moments of larger sets: `m.coarsen("n c -> n")` of moments that stand per n and c.

        The left side names the axes of these moments, the right side those of the result; labels are as in `normalize`.

        >>> m = Moments(torch.tensor([1, 3]), torch.tensor([0.0, 4.0]), torch.tensor([0.0, 6.0]))
        >>> m.coarsen("n -> ")
        Moments(count=tensor(4), mean=tensor(3.), m2=tensor(18.))
        """
        if torch.compiler.is_dynamo_compiling() and all(isinstance(label, Partition) for label in labels.values()):
            return Moments(*torch.ops.flexnorm.coarsen.v3(self._fields, pattern, *_flat(sizes, labels)))
        self.check()
        spec = _between(pattern, labels)
        if self.mean.is_complex():
            return self.parts().coarsen(str(spec.in_parts()), sizes=sizes, **labels).joined()
        sets = _larger(spec, self.mean, tuple(self.mean.shape), sizes, labels)
        known = self.count > 0
        fields = [t.where(known, 0).reshape(sets.axes.sizes) for t in self._fields]  # empty: whatever mean
        merged = pool(sets, fields[0], fields[1], m2=fields[2], low=fields[3])
        return merged.outward(sets)

    def refine(
        self, pattern: str, shape: Sequence[int], /, *, sizes: Sizes | None = None, **labels: Partition
    ) -> Moments:
        """These moments at each of the smaller sets that theirs are made of: the way back from `coarsen`.

        Args:
            pattern: as in `coarsen`, whose result has the axes of these moments.
            shape: of the moments of the smaller sets, which the left side names.

        >>> Moments(torch.tensor(4), torch.tensor(3.0), torch.tensor(18.0)).refine("n -> ", (2,))
        Moments(count=tensor([4, 4]), mean=tensor([3., 3.]), m2=tensor([18., 18.]))
        """
        if torch.compiler.is_dynamo_compiling() and all(isinstance(label, Partition) for label in labels.values()):
            return Moments(*torch.ops.flexnorm.refine.v3(self._fields, shape, pattern, *_flat(sizes, labels)))
        self.check()
        sets = _larger(_between(pattern, labels), self.mean, tuple(shape), sizes, labels)
        if tuple(self.mean.shape) != sets.shape:
            received = f"moments of shape {tuple(self.mean.shape)}, sets of shape {sets.shape}"
            rule = "moments are refined from the sets that the right side names"
            raise ShapeError(say(rule, text=pattern, received=received, instead='m.coarsen("n c -> n") of the finer'))
        return each(lambda t: sets.spread(sets.inward(t)).expand(sets.axes.sizes).reshape(shape), self)

    def weighed(self, weights: Tensor) -> Moments:
        """The same sets, of which each counts so much where it is merged; differentiable in the weights.

        Args:
            weights: 0 or more, broadcastable against these moments.

        >>> m = Moments(torch.tensor([2, 2]), torch.tensor([0.0, 4.0]), torch.tensor([0.0, 0.0]))
        >>> m.weighed(torch.tensor([3.0, 1.0])).coarsen("n -> ").mean
        tensor(1.)
        """
        self.check()
        weights = self._weights(weights)
        count = self.count * weights
        return Moments(count, self.mean.expand_as(count), self.m2 * weights, self._low.expand_as(count))

    def mixed(self, weights: Tensor, var_weights: Tensor | None = None) -> Moments:
        """The moments of mixtures: averages of means and of variances over the last axis, which then is gone.

        Of each set, the last axis has the moments of alternatives: its channel's, its image's, its batch's. Those that
        are empty have no say. This is what Switchable Norm divides by; it is not the union of the alternatives, which
        `coarsen` gives.

        Args:
            weights: of the means, 0 or more, broadcastable against these moments; divided by their sum. Differentiable.
            var_weights: of the variances; None: those of the means.

        Returns:
            Moments whose count is the weighted average of the counts: it only says whether there is anything.

        >>> m = Moments(torch.tensor([2, 2]), torch.tensor([0.0, 4.0]), torch.tensor([2.0, 6.0]))
        >>> mixed = m.mixed(torch.tensor([0.75, 0.25]))
        >>> mixed.mean, mixed.var
        (tensor(1.), tensor(1.5000))

        Source: Luo et al., "Differentiable Learning-to-Normalize via Switchable Normalization", 2019.
        """
        self.check()
        known, both = self.count > 0, (weights, weights if var_weights is None else var_weights)
        of_means, of_vars = (_shares(self._weights(w), known) for w in both)
        var, mean, low = (t.where(known, 0) for t in (self.var, self.mean, self._low))
        # As in `pool`: a shift first, so that neither shares that sum to 1 - 1e-7 nor rounding cost digits of the mean.
        high = (of_means * mean).sum(-1).detach()
        rest = (of_means * (mean - high[..., None] + low).where(known, 0)).sum(-1)
        rounded = high + rest
        count = (of_means * self.count).sum(-1).detach()
        return Moments(count, rounded, (of_vars * var).sum(-1) * count, ((high - rounded) + rest).detach())

    def mixed_results(self, weights: Tensor, eps: float) -> Moments:
        """The moments by which x is normalized to the average of what the alternatives of the last axis make of it.

        As each result is a line in x, so is their average: sum_k w_k (x - mean_k) / sigma_k = (x - mean) / sigma, with
        1 / sigma = sum_k w_k / sigma_k, and means weighted by w_k / sigma_k. One pass in place of one per alternative.

        Args:
            weights: of the results, 0 or more, broadcastable against these moments; divided by their sum.
                Differentiable.
            eps: that of the norm.

        >>> m = Moments(torch.tensor([2, 2]), torch.tensor([0.0, 4.0]), torch.tensor([2.0, 8.0]))
        >>> m.mixed_results(torch.tensor([0.5, 0.5]), eps=0.0).mean  # x / 2 + (x - 4) / 4 = (x - 4 / 3) * 3 / 4
        tensor(1.3333)
        """
        self.check()
        known = self.count > 0
        square = self.var + eps
        scaled = known & (square > 0)  # neither eps nor variance: the result is 0
        rates = square.where(scaled, 1).sqrt().reciprocal()  # rsqrt has a derivative that leaves float32 early
        rates = rates.where(scaled, 0) * _shares(self._weights(weights), known)
        rate = rates.sum(-1)
        some = rate > 0
        mean = self.mixed(rates.where(some[..., None], 1))
        var = rate.where(some, 1).reciprocal().square() - eps
        return Moments(mean.count, mean.mean, var.clamp(min=0).where(some, 0) * mean.count, mean.low)

    def about(self, share: Tensor | float) -> Moments:
        """The moments about `share` times the mean, in place of the mean.

        `normalize(x, ..., moments=m.about(share))` subtracts no more than that share.

        >>> Moments(torch.tensor(2), torch.tensor(4.0), torch.tensor(6.0)).about(0.5)
        Moments(count=tensor(2), mean=tensor(2.), m2=tensor(14.))
        """
        rest = self.mean * (1 - share)
        low = None if self.low is None else self.low * share
        square = rest.real * rest.real + rest.imag * rest.imag if rest.is_complex() else rest * rest
        return Moments(self.count, self.mean * share, self.m2 + self.count * square, low)

    def about_zero(self) -> Tensor:
        """Sum of x^2 of every set: what `center=False` divides by."""
        return self.about(0).m2

    def outward(self, sets: Sets) -> Moments:
        """From the internal shape of these sets to the one that their expression writes."""
        low = None if self.low is None else sets.outward(self.low)
        count, mean, m2 = (sets.outward(t).contiguous() for t in (self.count, self.mean, self.m2))
        return Moments(count, mean, m2, low)

    def inward(self, sets: Sets, dtype: torch.dtype) -> Moments:
        """From the shape that the expression of these sets writes to the internal one, in the dtype of statistics."""
        return each(sets.inward, self.rounded(dtype))

    def rounded(self, dtype: torch.dtype) -> Moments:
        """Mean, M2 and low in this dtype (complex means in that of such parts); low takes what the mean loses."""
        of_means = dtype.to_complex() if self.mean.is_complex() else dtype
        mean = self.mean.to(of_means)
        low = ((self.mean - mean).to(of_means) + self._low.to(of_means)).detach()  # the gradient is that of the mean
        return Moments(self.count, mean, self.m2.to(dtype), low)

    # --- complex numbers: real and imaginary part as one more axis, the last

    def parts(self) -> Moments:
        """Those of real and imaginary part. Of M2, which is known of both together, each gets half."""
        count, m2 = (torch.stack([t, t], -1) for t in (self.count, self.m2 / 2))
        mean, low = (
            torch.view_as_real(t if t.is_complex() else t.to(t.dtype.to_complex())) for t in (self.mean, self._low)
        )
        return Moments(count, mean, m2, low)

    def joined(self) -> Moments:
        """The reverse of `parts`."""
        mean, low = (torch.view_as_complex(t.contiguous()) for t in (self.mean, self._low))
        return Moments(self.count[..., 0], mean, self.m2.sum(-1), low)

    @property
    def _low(self) -> Tensor:
        return torch.zeros_like(self.mean) if self.low is None else self.low

    def _weights(self, weights: Tensor) -> Tensor:
        """In the dtype of the statistics, if these are weights of them."""
        if not isinstance(weights, Tensor) or not weights.is_floating_point():
            received, instead = shown(weights), "torch.tensor([0.5, 0.5]), say"
            raise SpecError(say("weights of moments are a floating tensor", received=received, instead=instead))
        sizes, shape = weights.shape[::-1], self.mean.shape[::-1]
        if any(a != b and a != 1 and b != 1 for a, b in zip(sizes, shape, strict=False)):
            received = f"weights of shape {tuple(weights.shape)}, moments of shape {tuple(self.mean.shape)}"
            rule, instead = "weights broadcast against the moments", "one for each of the last axis, say"
            raise ShapeError(say(rule, received=received, instead=instead))
        return weights.to(self.m2.dtype)

    @property
    def _fields(self) -> list[Tensor]:
        return [self.count, self.mean, self.m2, self._low]

    def __repr__(self) -> str:
        return f"Moments(count={self.count!r}, mean={self.mean!r}, m2={self.m2!r})"


def each(f: Callable[..., Tensor], *moments: Moments) -> Moments:
    """Moments whose every field is f of the fields."""
    fields = [m._fields for m in moments]
    return Moments(*(f(*tensors) for tensors in zip(*fields, strict=True)))


def _flat(sizes: Sizes | None, labels: Mapping[str, Partition]) -> tuple[Any, ...]:
    """Sizes and labels, as the operators of `coarsen` and `refine` take them."""
    return list(sizes or {}), list((sizes or {}).values()), *flat(labels.items())


def _between(pattern: str, labels: Mapping[str, Any]) -> Spec:
    """The pattern from smaller sets to larger ones, and whether the labels are those that it reads."""
    spec = Spec.parse(pattern)
    if spec.mask is not None:
        rule, instead = "moments have counts, so they take no mask", f'"{spec.x} -> {spec.sets}"'
        raise SpecError(spec.mask.error(rule, *spec.mask.elements, instead=instead))
    read = [lookup.label for lookup in spec.sets.lookups()]
    for name in labels:
        if name not in read:
            received, instead = f"{name}={shown(labels[name])}", f"leave {name}= out; sizes go into sizes="
            raise SpecError(say(f"the pattern reads no {name!r}", text=spec.text, received=received, instead=instead))
    missing = [lookup for lookup in spec.sets.lookups() if not isinstance(labels.get(lookup.label), Partition)]
    if missing:
        name = missing[0].label
        raise SpecError(
            spec.sets.error(
                f"label {name!r} is given as a Partition",
                *missing,
                received=f"{name}={shown(labels.get(name))}",
                instead=f"{name}=Partition(ids)",
            )
        )
    return spec


def _larger(
    spec: Spec, mean: Tensor, shape: tuple[int, ...], sizes: Sizes | None, labels: Mapping[str, Partition]
) -> Sets:
    """The larger sets, over moments of this shape."""
    axes = bind(spec, shape, tuple((sizes or {}).items()))
    for lookup in spec.sets.lookups():
        label = labels[lookup.label]
        check_operand(spec.sets, [lookup], f"label {lookup.label!r}", label.ids, mean)
        check_shape(spec.sets, f"label {lookup.label!r}", "one id at every index", [lookup], label.shape, axes)
    return sets_of(axes, spec.sets, labels)


def _shares(weights: Tensor, known: Tensor) -> Tensor:
    """Weights of alternatives, divided by their sum; 0 for those that are empty."""
    shares = weights.where(known, 0)
    total = shares.sum(-1, keepdim=True)
    return shares / total.where(total > 0, 1)


def _up_to(m: Moments) -> Moments:
    """`Moments.cumulative`, of the last axis.

    Pairs are merged, and up to the end of each pair the moments follow from those of the pairs; up to its first place
    they are one merge away.
    """
    size = m.mean.shape[-1]
    if size < 2:
        return m
    pairs = each(lambda t: t[..., :-1:2], m).merge(each(lambda t: t[..., 1::2], m))
    odd = _up_to(pairs)  # up to 1, 3, 5, ...
    even = each(lambda t: t[..., : (size - 1) // 2], odd).merge(each(lambda t: t[..., 2::2], m))  # up to 2, 4, ...

    def woven(first: Tensor, odd: Tensor, even: Tensor) -> Tensor:
        even, last = torch.cat([first[..., :1], even], -1), odd.shape[-1]
        return torch.cat([torch.stack([even[..., :last], odd], -1).flatten(-2), even[..., last:]], -1)

    return each(woven, m, odd, even)


torch.serialization.add_safe_globals([Moments])  # for torch.load(weights_only=True)
pytree.register_pytree_node(
    Moments,
    lambda m: ([t for t in (m.count, m.mean, m.m2, m.low) if t is not None], None),
    lambda fields, _: Moments(*fields),
    serialized_type_name="flexnorm.Moments",
    flatten_with_keys_fn=lambda m: (
        [
            (pytree.GetAttrKey(name), t)
            for name in ("count", "mean", "m2", "low")
            if (t := getattr(m, name)) is not None
        ],
        None,
    ),
)


def pool(
    sets: Sets, count: Tensor | None, mean: Tensor, *, m2: Tensor | None = None, low: Tensor | None = None
) -> Moments:
    """Merges the moments of parts into those of their sets. The parts of a tensor x are its elements: mean=x, m2=0.

    In two shifts. The first is by the largest element, which is one of the set: then the differences of equal values
    are zeros, exactly. The second is by the mean that the first gave: then the mean is known to the rounding of the
    deviations and not to that of the values. The shifts are constants for every derivative, in which they cancel.

    All tensors are in the elementary view of `sets`; count None means 1 everywhere.
    """
    n, divisor, weight = _counted(sets, count, mean)
    values = mean.detach() if count is None else mean.detach().where(count.detach() > 0, -math.inf)
    first = sets.max(values).where(n.detach() > 0, 0.0)
    with torch.no_grad():
        high = (first + sets.sum(weight(mean - sets.spread(first))) / divisor).detach()
    deviation = mean - sets.spread(high)
    if low is not None:
        deviation = deviation + low
    rest = sets.sum(weight(deviation)) / divisor
    deviation = deviation - sets.spread(rest)
    total = sets.sum(weight(deviation) * deviation)  # in this order: weight 0 gives 0 where the square overflows
    rounded = high + rest
    return Moments(n, rounded, total if m2 is None else total + sets.sum(m2), ((high - rounded) + rest).detach())


def pool_about_zero(sets: Sets, count: Tensor | None, x: Tensor) -> Moments:
    """Count and sum of x^2 of every set, as its moments about zero."""
    n, _, weight = _counted(sets, count, x)
    return Moments(n, torch.zeros((1,) * sets.axes.rank, dtype=x.dtype, device=x.device), sets.sum(weight(x) * x))


def _counted(sets: Sets, count: Tensor | None, x: Tensor) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
    """The count of every set, what to divide by, and how to weigh an element."""
    if count is None:
        n = sets.sum(torch.ones((1,) * sets.axes.rank, dtype=torch.int64, device=x.device))
        return n, divisor(n), lambda t: t
    weights = count.to(x.dtype)
    n = sets.sum(count)
    return n, divisor(n), lambda t: weights * t


def divisor(count: Tensor) -> Tensor:
    """The count, and 1 for an empty set, whose sums are 0."""
    return count.where(count > 0, 1)

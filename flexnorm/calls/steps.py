"""The step over sets: what is done with moments between the two passes over x, and with sums on the way back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import SpecError, say
from ..kernels import Sums, Whole, aten
from ..library import library
from ..statistics import Moments
from ..watching import unwatched
from .computing import Bound, Closer, How

_KERNELS: Any = library()


class OneVariance:
    """A `Whole`: the sets along the last axis have means of their own and one variance, the sum of theirs.

    Real and imaginary part of complex numbers are such sets, and the channels of PairNorm.
    """

    def moments(self, part: Moments) -> Moments:
        return Moments(part.count, part.mean, _total(part.m2), part.low)

    def sums(self, part: Sums) -> Sums:
        return Sums(part.grad, _total(part.grad_xhat), part.weight, part.bias)


def _total(t: Tensor) -> Tensor:
    if type(_KERNELS) is not str and t.is_cpu and unwatched(t) and not (torch.is_grad_enabled() and t.requires_grad):
        found: Tensor | None = _KERNELS.totals(t)
        if found is not None:
            return found
    return t.sum(-1, keepdim=True).expand(t.shape)


def is_share(share: Tensor, mean: Tensor) -> bool:
    """Whether it lies over axes of the statistics."""
    sizes = zip(share.shape[::-1], mean.shape[::-1], strict=False)
    return share.dim() <= mean.dim() and all(size in (1, of_sets) for size, of_sets in sizes)


def about(how: How, own: Moments, share: Tensor) -> Moments:
    """The moments about a share of the mean."""
    if type(how) is not Bound:
        return own.about(share)
    found = _KERNELS.about(own.count, own.mean, own.m2, own.low, share)
    if found is None:
        if not is_share(share, own.mean):
            raise Closer
        return own.about(share)
    return Moments(own.count, *found)


def corrected(m: Moments, correction: float) -> Moments:
    """The moments by which x is divided by the root of M2 / (count - correction); of sets with no more: of nothing."""
    if m.count.is_floating_point():
        raise SpecError(
            say(
                "a correction is for numbers of elements, and weights do not count elements",
                received=f"correction={correction}, counts of {m.count.dtype}",
                instead="correction=0, or a bool mask",
            )
        )
    enough = m.count > correction
    return Moments(m.count.where(enough, 0), m.mean, m.m2 * _larger_by(m.count, correction).to(m.m2.dtype), m.low)


def _larger_by(count: Tensor, correction: float) -> Tensor:
    """count / (count - correction), and 0 where there is no more."""
    rest = count.double() - correction
    enough = rest > 0
    return (count / rest.where(enough, 1)).where(enough, 0.0)


class Step(NamedTuple):
    """The step over sets: what is done with moments between the passes over x, and with sums on the way back.

    Forward, the moments are merged with the other parts of their sets. Then a share a of the mean m takes its place:

        y = (x - a m) / s            s^2 = var + (1 - a)^2 m^2 + eps

    Backward, with G = sum of g and Gy = sum of g y over a set of n elements:

        dx = (g - (a / n) (G - Gy (1 - a) m / s) - y Gy / n) / s
        da = (Gy (1 - a) m / s - G) m / s

    Source: Cai et al., "GraphNorm: A Principled Approach to Accelerating Graph Neural Network Training", 2020.

    A correction c makes var = M2 / (n - c). Then Gy / (n - c) takes the place of Gy / n.

    Args:
        wholes: the merges, in order.
        needed: any rank needs the gradient of x.
        correction: c; sets of c elements or fewer have the result 0.
    """

    wholes: Sequence[Whole] = ()
    needed: bool = True
    correction: float = 0

    def merged(self, part: Moments) -> Moments:
        """The moments of the whole sets."""
        for whole in self.wholes:
            part = whole.moments(part)
        return part

    def used(self, how: How, own: Moments, share: Tensor | None) -> Moments:
        """The moments that x is normalized by."""
        used = corrected(own, self.correction) if self.correction else own
        return used if share is None else about(how, used, share)

    def back(
        self, how: How, own: Moments, used: Moments, share: Tensor | None, sums: Sums
    ) -> tuple[Sums, Tensor | None]:
        """The sums of the whole sets, as `backward_dx` takes them, and the gradient of the share."""
        rule = how.options
        dshare = None
        if share is not None and not self.wholes and type(how) is Bound and not torch.is_grad_enabled():
            given = (own.count, own.mean, used.m2, share, sums.grad, sums.grad_xhat, float(rule.eps), rule.scale)
            found = _KERNELS.share_backward(*given)
            if found is not None:
                return Sums(found[0], sums.grad_xhat, sums.weight, sums.bias), found[1]
        if share is not None:
            scaled, rest = own.mean * aten.inverse_sigma(rule, used), -sums.grad
            if rule.scale:
                rest = rest + sums.grad_xhat * (1 - share) * scaled
            dshare = (rest * scaled).sum_to_size(share.shape)
            sums = Sums(-share * rest, sums.grad_xhat, sums.weight, sums.bias)
        if self.correction:
            sums = Sums(
                sums.grad,
                sums.grad_xhat * _larger_by(own.count, self.correction).to(sums.grad_xhat.dtype),
                sums.weight,
                sums.bias,
            )
        for whole in self.wholes if self.needed else ():
            sums = whole.sums(sums)
        return sums, dshare

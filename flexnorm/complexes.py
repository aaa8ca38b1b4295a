"""Complex tensors, as those of an STFT: the mean is complex, the variance is E|x - mean|^2."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from .arguments import Formula, Options
from .errors import SpecError, say
from .kernels import Sums
from .statistics import Moments


class BothParts:
    """A `Whole`: real and imaginary part, which lie along the last axis, have means of their own and one variance."""

    def moments(self, part: Moments) -> Moments:
        return Moments(part.count, part.mean, _total(part.m2), part.low)

    def sums(self, part: Sums) -> Sums:
        return Sums(part.grad, _total(part.grad_xhat), part.weight, part.bias)


def _total(t: Tensor) -> Tensor:
    return t.sum(-1, keepdim=True).expand(*t.shape[:-1], 2)


def in_parts(formula: Formula) -> Formula:
    """The formula for the real and imaginary parts of x, as far as it is not of weight, bias and activation."""
    if formula.options.activation is not None:
        raise SpecError(
            say(
                "activations are of real numbers, and x is complex",
                text=formula.spec.text,
                received=f"activation={formula.options.activation!r}",
                instead="activation=None, and your own on the result",
            )
        )
    o = formula.options
    return _in_parts(formula.spec, Options(o.center, o.scale, o.eps), formula.sizes)


@lru_cache(maxsize=1024)
def _in_parts(spec: object, options: Options, sizes: tuple[tuple[str, int], ...]) -> Formula:
    return Formula(spec.in_parts(), options, (), dict(sizes))  # type: ignore[attr-defined]


def parts(x: Tensor) -> Tensor:
    """Real and imaginary part along one more axis, the last."""
    return torch.view_as_real(x.resolve_conj())

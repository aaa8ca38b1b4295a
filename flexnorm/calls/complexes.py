"""Complex tensors, as those of an STFT: the mean is complex, the variance is E|x - mean|^2."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ..canonical import memory_order
from ..errors import SpecError, say
from ..spec import Spec
from ..statistics import Moments
from .arguments import Formula, Options


def of_both(m: Moments) -> Moments:
    """The moments of complex numbers, of those whose parts have the M2 of both."""
    return Moments(m.count, m.mean, m.m2 / 2, m.low).joined()


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
    kept = (
        _in_parts if all(type(size) is int for _, size in formula.sizes) else _in_parts.__wrapped__
    )  # a symbol is not
    return kept(formula.spec, Options(o.center, o.scale, o.eps), formula.sizes, formula.spec.text)


@lru_cache(maxsize=1024)
def _in_parts(spec: Spec, options: Options, sizes: tuple[tuple[str, int], ...], text: str) -> Formula:
    return Formula(spec.in_parts(), options, (), dict(sizes))


def parts(x: Tensor) -> Tensor:
    """Real and imaginary part along one more axis, the last."""
    x = x.resolve_conj()
    order, back = _orders(x)
    return torch.view_as_real(x.permute(order)).permute(*back, x.dim())


def joined(t: Tensor) -> Tensor:
    """The reverse of `parts`."""
    order, back = _orders(t[..., 0])
    return torch.view_as_complex(t.permute(*order, t.dim() - 1)).permute(back)


def _orders(t: Tensor) -> tuple[list[int], list[int]]:
    """To the order in memory and back: torch lays the gradients of both views out in the order that it is asked in."""
    order = list(memory_order(t.shape, t.stride()))
    return order, sorted(range(len(order)), key=order.__getitem__)

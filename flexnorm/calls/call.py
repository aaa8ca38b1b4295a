"""One call of a layer: what the user passed, and what is known of its statistics."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor

from ..statistics import Moments
from .arguments import Formula

NONE: Mapping[str, Any] = MappingProxyType({})


class Call(NamedTuple):
    """One call of a layer.

    `Norm.fit_call` turns the call that a user made into a call that the formula can read.

    Attributes:
        formula: the pattern with its options, affine stages and told sizes.
        x: the input.
        mask: bool (membership) or floating (weights), or None.
        weight, bias: the parameters of the `conditional` stage, or None.
        moments: the statistics to use, or None for the statistics of x.
        names: labels, and what else came by keyword.
        want: the moments are asked for. The running statistics stay as they are.
    """

    formula: Formula
    x: Tensor
    mask: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    moments: Moments | None = None
    names: Mapping[str, Any] = NONE
    want: bool = False


class Used(NamedTuple):
    """The moments that a layer has made of the moments of x: `Norm.used`.

    Attributes:
        moments: the statistics that x is normalized by.
        seen: the moments that `return_moments=True` returns.
        track: moves the running statistics. It is called after the result is known, and only if `Call.want` is false.
    """

    moments: Moments
    seen: Moments
    track: Callable[[], None]

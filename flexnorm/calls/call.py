"""One call: what the user passed, what the kernels are asked for, and what they gave."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor

from ..kernels import Whole
from ..statistics import Moments
from .arguments import Formula, Param
from .ranks import Ranks

ALONE = Ranks([])
FIELDS = {"self", "x", "input", "mask", "weight", "bias", "moments", "return_moments", "labels", "running"}
"""Arguments of a forward that are no names in a call: they have fields of their own, or say how a layer is run."""
NONE: Mapping[str, Any] = MappingProxyType({})


new = tuple.__new__  # makes a NamedTuple of all fields in half the time of its class


class Call(NamedTuple):
    """One call of a layer, or of `normalize`.

    `Norm.fit_call` turns the call that a user made into a call that the formula can read.

    Attributes:
        formula: the pattern with its options, affine stages and told sizes.
        x: the input.
        mask: bool (membership) or floating (weights), or None.
        stages: weight and bias of every affine stage: the learned ones, then the given ones.
        moments: the statistics to use, or None for the statistics of x.
        names: labels, and what else came by keyword.
        want: the moments are asked for. The running statistics stay as they are.
        center: the share of the mean that is subtracted, over axes of the statistics. None: the formula says it.
        wholes: what the sets are parts of: their moments and sums are merged.
        ranks: the sets go on over these ranks; None: over no others.
    """

    formula: Formula
    x: Tensor
    mask: Tensor | None = None
    stages: tuple[Param, ...] = ()
    moments: Moments | None = None
    names: Mapping[str, Any] = NONE
    want: bool = False
    center: Tensor | None = None
    wholes: tuple[Whole, ...] = ()
    ranks: Ranks | None = None

    @property
    def is_alone(self) -> bool:
        """Whether no set goes on over other ranks."""
        return self.ranks is None or not self.ranks.groups

    def fit(self, x: Tensor, mask: Tensor | None, names: Mapping[str, Any]) -> Call:
        """The same call of another x, with another mask and other names. Faster than `_replace`."""
        formula, _, _, stages, moments, _, want, center, wholes, ranks = self
        return new(Call, (formula, x, mask, stages, moments, names, want, center, wholes, ranks))


class Result(NamedTuple):
    """What a call gives.

    Attributes:
        y: x normalized.
        moments: the statistics that x was normalized by, if the call wants them.
    """

    y: Tensor
    moments: Moments | None = None


class Used(NamedTuple):
    """The moments that a layer has made of the moments of x: `Norm.used`.

    Attributes:
        moments: the statistics that x is normalized by.
        seen: the moments that `return_moments=True` returns.
        track: moves the running statistics. It is called after the result is known, and only if `Call.want` is false.
    """

    moments: Moments
    seen: Moments
    track: Callable[[], None] | None = None


def named(**names: Any) -> dict[str, Any]:
    """The names that came with a call. `given` may say the others."""
    return {name: value for name, value in names.items() if value is not None}

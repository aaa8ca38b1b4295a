"""The two ways in which a call is computed: the library binds the pattern to the tensors, or a backend takes a recipe.

Moments and sums over sets have the shape that the pattern writes, here and everywhere above.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ..kernels import Gradients, Kept, Operands, Recipe, Room, Sums, aten
from ..library import library
from ..partition import Packed, Partition
from ..sets import Sets
from ..statistics import Moments, each
from .arguments import Formula

_KERNELS: Any = library()  # a text where there is none; then no formula has a pattern


class Closer(Exception):  # noqa: N818  # no error: Python has to look closer at the arguments
    """The library has given no answer."""


class Bound(NamedTuple):
    """A call that the library computes: it binds the pattern to the tensors anew, forward and backward."""

    pattern: bytes
    groups: tuple[Packed, ...]
    formula: Formula
    labels: Mapping[str, Partition]

    @property
    def options(self) -> Any:
        return self.formula.options

    def forward(self, x: Tensor, mask: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> tuple[Any, ...]:
        """y, moments side by side, and the count, if sets differ in it."""
        found: tuple[Any, ...] | None = _KERNELS.forward(self.pattern, x, mask, weight, bias, self.groups)
        if found is None:
            raise Closer
        return found

    def moments(self, x: Tensor, kept: Kept) -> Moments:
        return moments_of(x, kept)

    def keep(self, x: Tensor, m: Moments) -> tuple[Any, ...]:
        """The reverse of `moments`."""
        low = torch.zeros_like(m.mean) if m.low is None else m.low
        return torch.stack([m.mean, low, m.m2]).contiguous(), m.count  # stacked, channels-last tensors still are

    def backward(self, operands: Operands, kept: Kept, dy: Tensor, of_mask: bool) -> Gradients:
        found: tuple[Any, ...] | None = _KERNELS.backward(self.pattern, *operands, self.groups, dy, *kept, of_mask)
        if found is None:
            raise Closer
        return found  # type: ignore[return-value]  # the same four, and a tuple more takes its time

    def statistics(self, x: Tensor, mask: Tensor | None) -> Moments:
        return Moments(*_answer(_KERNELS.statistics(self.pattern, x, mask, None, None, self.groups)))

    def apply(self, operands: Operands, m: Moments) -> Tensor:
        y: Tensor = _answer(_KERNELS.apply(self.pattern, *operands, self.groups, m.count, m.mean, m.m2, m.low))
        return y

    def backward_sums(self, operands: Operands, m: Moments, dy: Tensor) -> Sums:
        given = (self.pattern, *operands, self.groups, m.count, m.mean, m.m2, m.low, dy)
        return Sums(*_answer(_KERNELS.backward_sums(*given)))

    def backward_dx(
        self, operands: Operands, m: Moments, dy: Tensor | None, sums: Sums | None
    ) -> tuple[Tensor, Tensor | None]:
        both = (None, None) if sums is None else sums[:2]
        given = (self.pattern, *operands, self.groups, m.count, m.mean, m.m2, m.low, dy, *both)
        return cast("tuple[Tensor, Tensor | None]", _answer(_KERNELS.backward_dx(*given)))

    def gradients_of_moments(self, m: Moments, sums: Sums) -> tuple[Tensor | None, ...]:
        """The gradients of count, mean and M2 from elsewhere."""
        o = self.options
        given = (m.count, m.mean, m.m2, sums.grad, sums.grad_xhat, float(o.eps), o.center, o.scale)
        found: tuple[Tensor | None, ...] | None = _KERNELS.gradients_of_moments(*given)
        return aten.backward_moments(o, m, sums) if found is None else found

    def sums_of_changed(self, used: Moments, own: Moments, dmean: Tensor | None, dm2: Tensor | None) -> Sums:
        """The sums of which `backward_dx`, at the used moments, makes the gradient of x through its own moments."""
        given = (used.count, used.mean, used.m2, used.low, own.count, own.mean, own.low, dmean, dm2)
        found = _KERNELS.sums_of_changed(*given, float(self.options.eps))
        if found is None:
            return _sums_of_changed(self.options, used, own, dmean, dm2)
        return Sums(found[0], found[1], None, None)

    def composed(self, operands: Operands) -> Composed:
        """The same in operations that can be differentiated again."""
        params = [operands[2:]] if self.formula.affines else []
        recipe, _ = self.formula.prepare(operands.x, operands.mask, params, self.labels)
        return Composed(recipe, cast(Room, aten))


class Composed(NamedTuple):
    """A call that a backend computes: the recipe of these tensors, and the backend."""

    recipe: Recipe
    room: Room

    @property
    def options(self) -> Any:
        return self.recipe

    @property
    def sets(self) -> Sets:
        return self.recipe.sets

    def forward(self, x: Tensor, mask: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> tuple[Any, ...]:
        y, kept = self.room.forward(self.recipe, Operands(x, mask, weight, bias))
        return itself(y), *kept

    def moments(self, x: Tensor, kept: Kept) -> Moments:
        return self.room.moments(self.recipe, Operands(x), kept).outward(self.sets)

    def keep(self, x: Tensor, m: Moments) -> tuple[Any, ...]:
        return self.room.keep(self.recipe, Operands(x), self._inward(m))

    def backward(self, operands: Operands, kept: Kept, dy: Tensor, of_mask: bool) -> Gradients:
        return self.room.backward(self.recipe, operands, kept, dy, of_mask=of_mask)

    def statistics(self, x: Tensor, mask: Tensor | None) -> Moments:
        return self.room.statistics(self.recipe, Operands(x, mask)).outward(self.sets)

    def apply(self, operands: Operands, m: Moments) -> Tensor:
        return self.room.apply(self.recipe, operands, self._inward(m))

    def backward_sums(self, operands: Operands, m: Moments, dy: Tensor) -> Sums:
        sums = self.room.backward_sums(self.recipe, operands, self._inward(m), dy)
        return Sums(self.sets.outward(sums.grad), self.sets.outward(sums.grad_xhat), sums.weight, sums.bias)

    def backward_dx(
        self, operands: Operands, m: Moments, dy: Tensor | None, sums: Sums | None
    ) -> tuple[Tensor, Tensor | None]:
        if sums is not None:
            grad, grad_xhat = (self.sets.inward(t.expand(self.sets.shape)) for t in sums[:2])
            sums = Sums(grad, grad_xhat, None, None)
        return self.room.backward_dx(self.recipe, operands, self._inward(m), dy, sums)

    def gradients_of_moments(self, m: Moments, sums: Sums) -> tuple[Tensor | None, ...]:
        return aten.backward_moments(self.recipe, m, sums)

    def sums_of_changed(self, used: Moments, own: Moments, dmean: Tensor | None, dm2: Tensor | None) -> Sums:
        return _sums_of_changed(self.recipe, used, own, dmean, dm2)

    def composed(self, operands: Operands) -> Composed:
        return Composed(self.recipe, cast(Room, aten))

    def _inward(self, m: Moments) -> Moments:
        return each(self.sets.inward, m)


How = Bound | Composed


def _sums_of_changed(rule: Any, used: Moments, own: Moments, dmean: Tensor | None, dm2: Tensor | None) -> Sums:
    dmean, dm2 = (torch.zeros_like(own.mean) if d is None else d for d in (dmean, dm2))
    return aten.backward_statistics(rule, used, dmean, dm2, own)


def moments_of(x: Tensor, kept: Sequence[Any]) -> Moments:
    """The moments that the library has written side by side."""
    mean, low, m2 = kept[0].unbind()
    count = kept[1] if kept[1] is not None else torch.full(mean.shape, x.numel() // mean.numel(), device=mean.device)
    return Moments(count, mean, m2, low)


def _answer(found: Any) -> Any:
    if found is None:
        raise Closer
    return found


def itself(y: Tensor) -> Tensor:
    """The same result, and not a view of a hidden tensor, because `nn.ReLU(inplace=True)` may change it."""
    if not y._is_view():
        return y
    same: Tensor = torch.ops.aten._unsafe_view(y, y.shape)
    return same

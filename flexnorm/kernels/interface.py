"""What every room of kernels is asked for, and what it is told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..partition import Packed
from ..sets import Sets
from ..statistics import Moments


@dataclass(frozen=True, eq=False)
class Recipe:
    """What is to be computed, without the tensors: the sets, where mask and parameters lie, and the formula's options.

    With sigma = sqrt(var + eps) of each set:   y = activation((x - mean) / sigma * weight + bias)
    """

    sets: Sets
    mask: Sets | None = None  # axes of the mask, if there is one
    membership: bool = False  # the mask is bool: elements outside belong to no set. Otherwise it weighs the statistics
    params: Sets | None = None  # axes of weight and bias, if there are any
    center: bool = True
    scale: bool = True
    eps: float = 1e-5
    activation: str | None = None
    told: frozenset[int] = frozenset()  # axes whose sizes were told before any tensor came
    pattern: bytes | None = None  # the same for the C++ binder; None: it has no part in this
    groups: tuple[Packed, ...] = ()  # the labels that the pattern reads


class Rule(Protocol):
    """What is made of moments, wherever they come from."""

    @property
    def center(self) -> bool:
        """Whether the mean is subtracted."""

    @property
    def scale(self) -> bool:
        """Whether the result is divided by sigma."""

    @property
    def eps(self) -> float:
        """What is added to the variance."""


class Operands(NamedTuple):
    """The tensors of a call: x in its own shape; mask, weight and bias in the shapes that the pattern writes."""

    x: Tensor
    mask: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None


class Sums(NamedTuple):
    """What the backward pass sums: over every set, and over every parameter."""

    grad: Tensor  # sets: sum of g, with g = dy * weight (dy through the activation)
    grad_xhat: Tensor  # sets: sum of g * xhat
    weight: Tensor | None  # params: sum of dy * xhat, the gradient of weight
    bias: Tensor | None  # params: sum of dy, the gradient of bias


class Whole(Protocol):
    """What sets are a part of that go on elsewhere: on other ranks, or in the other part of a complex number.

    Both merges are linear in what backward passes on, and differentiable by autograd. Shapes are those within.
    """

    def moments(self, part: Moments) -> Moments:
        """The moments of the whole sets."""

    def sums(self, part: Sums) -> Sums:
        """The sums over the whole sets; those over the parameters stay."""


class Gradients(NamedTuple):
    """What the backward pass gives, for each tensor of the operands; None where there is none to be had."""

    x: Tensor
    mask: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


Kept = tuple[Tensor, ...]  # what a room's backward pass needs of the moments, in the room's own form


class Room(Protocol):
    """The entry points: two fused ones, and the parts that they are made of, which collectives come between.

    dy, y and dx have x's own shape; moments and sums over sets the internal shape of `recipe.sets`. With `center=False`
    the moments are those about zero. Nothing is modified. Statistics and sums are in `stat_dtype(x.dtype)`; y and dx
    have x's dtype and memory format.
    """

    def forward(self, recipe: Recipe, operands: Operands) -> tuple[Tensor, Kept]:
        """`statistics`, then `apply`, in one."""

    def moments(self, recipe: Recipe, operands: Operands, kept: Kept) -> Moments:
        """The moments that `forward` has kept."""

    def keep(self, recipe: Recipe, operands: Operands, moments: Moments) -> Kept:
        """The reverse: what `forward` would have kept."""

    def evaluate(self, recipe: Recipe, operands: Operands) -> Tensor:
        """y alone, where nobody asks for moments or a gradient."""

    def statistics(self, recipe: Recipe, operands: Operands) -> Moments:
        """The moments of every set."""

    def apply(self, recipe: Recipe, operands: Operands, moments: Moments) -> Tensor:
        """y, with these moments."""

    def backward(
        self, recipe: Recipe, operands: Operands, kept: Kept, dy: Tensor, *, of_mask: bool = True
    ) -> Gradients:
        """`backward_sums`, then `backward_dx`, in one. Without `of_mask`, that of a float mask may be left out."""

    def backward_sums(self, recipe: Recipe, operands: Operands, moments: Moments, dy: Tensor) -> Sums:
        """The sums that dx and the gradients of the parameters are made of."""

    def backward_dx(
        self, recipe: Recipe, operands: Operands, moments: Moments, dy: Tensor | None, sums: Sums | None
    ) -> tuple[Tensor, Tensor | None]:
        """dx, and the gradient of a float mask. `sums` None: the moments came from elsewhere and do not depend on x.
        dy None: zeros, so that dx is what flows through the moments."""


def stat_dtype(dtype: torch.dtype) -> torch.dtype:
    """Statistics are computed in float32, those of float64 in float64. For complex numbers, that of the parts."""
    return torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32

"""torch's own fused operations, where they compute exactly the same thing and are exact.

`layer_norm` and `rms_norm`, forward without gradient, for sets that are whole rows. Not here: `group_norm` and
`batch_norm`, which fold x * a + b (a constant 1000.3 with weight and bias gives 0.008 and not 0), and in channels-last on
CPU lose every digit at mean 1000; and the backward of `layer_norm`, which knows the mean to float32 only (relative error of
dx at mean 1e4, std 0.1: 1e-2).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..canonical import cut
from .interface import Recipe


def refusal(recipe: Recipe, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> str | None:
    """Why torch has no such operation; None if it has one."""
    sets, params = recipe.sets, recipe.params
    if recipe.mask is not None:
        return "torch has no masked norm"
    if sets.merges or (params is not None and params.merges):
        return "torch has no norm over labels"
    if not recipe.scale:
        return "torch has no norm without scale"
    if recipe.activation is not None:
        return "torch fuses no activation"
    if recipe.eps <= 0:
        return "torch divides by zero where the variance is 0 and eps is not above 0"
    if x.numel() == 0 or not x.is_contiguous():
        return "not contiguous, or empty"
    if not _sets_are_rows(sets.axes.sizes, sets.kept):
        return "the pooled axes are not the innermost ones"
    if params is not None:
        if _real(sets.axes.sizes, params.kept) & _real(sets.axes.sizes, sets.kept) or any(
            size != 1 and place not in params.kept and place not in sets.kept
            for place, size in enumerate(sets.axes.sizes)
        ):
            return "the parameters do not lie on the pooled axes"
        if any(p is not None and p.dtype != x.dtype for p in (weight, bias)):
            return "the parameters have another dtype"
    if not recipe.center and (bias is not None or x.dtype.itemsize < 4):
        return "torch's rms_norm has no bias, and rounds half precision twice"
    return None


def forward(recipe: Recipe, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """y, for a recipe that `refusal` does not refuse."""
    rows, columns = cut(recipe.sets.axes.sizes, _contiguous(recipe), recipe.sets).shape
    flat = x.reshape(rows, columns)
    if recipe.params is not None:
        weight, bias = (None if p is None else recipe.params.inward(p).reshape(columns) for p in (weight, bias))
    if recipe.center:
        y = F.layer_norm(flat, (columns,), weight, bias, recipe.eps)
    else:
        y = F.rms_norm(flat, (columns,), weight, recipe.eps)
    return y.to(x.dtype).view(x.shape)


def _contiguous(recipe: Recipe) -> tuple[int, ...]:
    return torch.empty(recipe.sets.axes.sizes, device="meta").stride()


def _sets_are_rows(sizes: tuple[int, ...], kept: frozenset[int]) -> bool:
    """Whether no pooled axis stands before a kept one, axes of size 1 aside."""
    outer = _real(sizes, kept)
    pooled = {place for place, size in enumerate(sizes) if size != 1} - outer
    return not outer or not pooled or max(outer) < min(pooled)


def _real(sizes: tuple[int, ...], places: frozenset[int]) -> set[int]:
    return {place for place in places if sizes[place] != 1}

"""torch's own fused operations, where they compute exactly the same thing and are exact.

`layer_norm` and `rms_norm`, forward without gradient, for sets that are whole rows. Not here: `group_norm` and
`batch_norm`, which fold x * a + b (a constant 1000.3 with weight and bias gives 0.008 and not 0), and in channels-last
on CPU lose every digit at mean 1000; and the backward of `layer_norm`, which knows the mean to float32 only (relative
error of dx at mean 1e4, std 0.1: 1e-2).
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

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
    kept, pooled = _kept_and_pooled(recipe)
    if not pooled or (kept and max(kept) > min(pooled)):
        return "the pooled axes are not the innermost ones"
    if params is not None:
        if {place for place in (*kept, *pooled) if place in params.kept} != set(pooled):
            return "the parameters do not lie on the pooled axes"
        if any(p is not None and p.dtype != x.dtype for p in (weight, bias)):
            return "the parameters have another dtype"
    if not recipe.center and (bias is not None or x.dtype.itemsize < 4):
        return "torch's rms_norm has no bias, and rounds half precision twice"
    return None


def forward(recipe: Recipe, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """y, for a recipe that `refusal` does not refuse."""
    columns = math.prod(recipe.sets.axes.sizes[place] for place in _kept_and_pooled(recipe)[1])
    flat = x.reshape(-1, columns)
    if recipe.params is not None:
        weight, bias = (None if p is None else recipe.params.inward(p).reshape(columns) for p in (weight, bias))
    if recipe.center:
        y = F.layer_norm(flat, (columns,), weight, bias, recipe.eps)
    else:
        y = F.rms_norm(flat, (columns,), weight, recipe.eps)
    return y.to(x.dtype).view(x.shape)


def _kept_and_pooled(recipe: Recipe) -> tuple[list[int], list[int]]:
    """The places of both kinds of axes, those of size 1 aside, as they are both or neither."""
    sizes, kept = recipe.sets.axes.sizes, recipe.sets.kept
    real = [place for place, size in enumerate(sizes) if size != 1]
    return [place for place in real if place in kept], [place for place in real if place not in kept]

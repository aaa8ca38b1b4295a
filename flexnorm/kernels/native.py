"""torch's own fused operations, where they compute exactly the same thing and are exact: `rms_norm`.

`layer_norm`, `group_norm` and `batch_norm` are not here. They keep the mean in float32, so at mean 1000 and std 1 their
results are off by 7e-5 where the composition is off by 5e-7, and a result must not depend on the memory layout or on
whether a gradient is asked for, which choose the room. `group_norm` and `batch_norm` moreover fold x * a + b (a
constant 1000.3 gives 0.008 and not 0), and in channels-last on CPU lose every digit at mean 1000.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .interface import Operands, Recipe


def refusal(recipe: Recipe, operands: Operands) -> str | None:
    """Why torch has no such operation; None if it has one."""
    sets, params = recipe.sets, recipe.params
    x, _, weight, bias = operands
    if recipe.center:
        return "torch's norms with a mean know it to float32 only"
    if recipe.mask is not None:
        return "torch has no masked norm"
    if sets.merges or (params is not None and params.merges):
        return "torch has no norm over labels"
    if recipe.activation is not None or bias is not None:
        return "torch's rms_norm has no bias and no activation"
    if recipe.eps < torch.finfo(x.dtype).tiny:
        return "torch divides by zero where x and eps are 0"
    if x.dtype.itemsize < 4:
        return "torch's rms_norm rounds half precision twice"
    if x.numel() == 0 or not x.is_contiguous():
        return "x is not contiguous, or empty"
    kept, pooled = _kept_and_pooled(recipe)
    if not pooled or (kept and max(kept) > min(pooled)):
        return "the pooled axes are not the innermost ones"
    if params is not None and {place for place in (*kept, *pooled) if place in params.kept} != set(pooled):
        return "the parameters do not lie on the pooled axes"
    if weight is not None and weight.dtype != x.dtype:
        return "the parameters have another dtype"
    return None


def evaluate(recipe: Recipe, operands: Operands) -> Tensor:
    """y, for a recipe that `refusal` does not refuse."""
    x, _, weight, _ = operands
    columns = math.prod(recipe.sets.axes.sizes[place] for place in _kept_and_pooled(recipe)[1])
    if weight is not None:
        assert recipe.params is not None
        weight = recipe.params.inward(weight).reshape(columns)
    return F.rms_norm(x.reshape(-1, columns), (columns,), weight, recipe.eps).to(x.dtype).view(x.shape)


def _kept_and_pooled(recipe: Recipe) -> tuple[list[int], list[int]]:
    """The places of both kinds of axes, those of size 1 aside, as they are both or neither."""
    sizes, kept = recipe.sets.axes.sizes, recipe.sets.kept
    real = [place for place, size in enumerate(sizes) if size != 1]
    return [place for place in real if place in kept], [place for place in real if place not in kept]

"""The canonical form on CPU, in C++: forward and backward in one pass over what a cache holds.

The library is built when the package is installed (setup.py), from the .cpp and .h files beside this one. It reads
tensors, binds the pattern to them, and runs on the threads of the OpenMP runtime that torch has loaded. Here are the
entry points as the other backends have them; usual calls go to the library directly. Functions of the interface are
documented there.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...library import library
from ...pattern import MOST_DIMS as MOST_AXES
from ...statistics import Moments, each
from ..interface import Gradients, Kept, Operands, Recipe, Sums, stat_dtype

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
PAST = 1 << 24  # bytes of a large result, as in pages.h
MOST_DIMS = 12  # axes of one kind, and one for those that labels consume


def refusal(recipe: Recipe, operands: Operands) -> str | None:
    """Why this room cannot compute the recipe; None if it can."""
    x = operands.x
    if isinstance(found := library(), str):
        return found
    if x.device.type != "cpu":
        return "x is not on a CPU"
    if x.numel() == 0:
        return "x is empty"
    if x.dtype not in DTYPES:
        return f"there is no kernel for {x.dtype}"
    if recipe.pattern is not None and type(x) is Tensor and found.sizes(recipe.pattern, x) is None:
        return "x has no memory that can be read"
    if recipe.pattern is None:
        return f"x has more than {MOST_AXES} axes"
    if bound(recipe, x) is None:
        return f"x has more than {MOST_DIMS - 1} axes of one kind"
    return None


def bound(recipe: Recipe, x: Tensor) -> dict[str, Any] | None:
    """What the binder makes of x: the form of form.h as a dict."""
    y = torch.empty_like(x, device="meta")
    kind = 0 if recipe.mask is None else 1 if recipe.membership else 2
    found: dict[str, Any] | None = library().bind(
        recipe.pattern, DTYPES[x.dtype], tuple(x.shape), x.stride(), y.stride(), kind, recipe.groups
    )
    return found


def shown(recipe: Recipe, x: Tensor) -> tuple[str, bool]:
    """The form in words, and whether x is copied for it."""
    form = bound(recipe, x)
    assert form is not None
    outer, inner, members = (math.prod(dim[0] for dim in form[kind]) for kind in ("outer", "inner", "segment"))
    in_all = " in all" if form["segment"] else ""
    ranges = outer * (form["groups"] if form["segment"] else 1)
    said = f"{ranges} closed ranges of {inner * members} rows{in_all} x {form['columns']} columns"
    if x.numel() * x.element_size() > PAST:
        said += "; the result is written past the caches if its pages are resident, else into huge pages"
    return said, form["copied"] == 1


def _done(answer: Any) -> Any:
    """The answer of the library to a recipe that has been checked."""
    if answer is None:
        raise RuntimeError("flexnorm: the C++ kernels refuse a call that was checked before; please report it")
    return answer


# --- the entry points. Tensors over sets have the internal shape here, and in the library the written one -----------


def evaluate(recipe: Recipe, operands: Operands) -> Tensor:
    y: Tensor = _done(library().evaluate(recipe.pattern, *operands, recipe.groups))
    return y


def forward(recipe: Recipe, operands: Operands) -> tuple[Tensor, Kept]:
    y, packed, count = _done(library().forward(recipe.pattern, *operands, recipe.groups))
    return y, (packed,) if count is None else (packed, count)


def moments(recipe: Recipe, operands: Operands, kept: Kept) -> Moments:
    mean, low, m2 = map(recipe.sets.inward, kept[0].unbind())
    if len(kept) == 1:
        count = torch.full(recipe.sets.internal_shape, operands.x.numel() // recipe.sets.count)
    else:
        count = recipe.sets.inward(kept[1])
    return Moments(count, mean, m2, low)


def keep(recipe: Recipe, operands: Operands, moments: Moments) -> Kept:
    m = moments.outward(recipe.sets).rounded(stat_dtype(operands.x.dtype))
    assert m.low is not None
    count = m.count if m.count.dtype == torch.int64 else m.count.to(m.m2.dtype)
    return torch.stack([m.mean, m.low, m.m2]).contiguous(), count


def statistics(recipe: Recipe, operands: Operands) -> Moments:
    x, mask = operands[:2]
    m = Moments(*_done(library().statistics(recipe.pattern, x, mask, *operands[2:], recipe.groups)))
    return each(recipe.sets.inward, m)


def apply(recipe: Recipe, operands: Operands, moments: Moments) -> Tensor:
    y: Tensor = _done(library().apply(recipe.pattern, *operands, recipe.groups, *_given(recipe, operands, moments)))
    return y


def backward(recipe: Recipe, operands: Operands, kept: Kept, dy: Tensor, *, of_mask: bool = True) -> Gradients:
    count = kept[1] if len(kept) > 1 else None
    given = (recipe.pattern, *operands, recipe.groups, dy, kept[0], count, of_mask)
    return Gradients(*_done(library().backward(*given)))


def backward_sums(recipe: Recipe, operands: Operands, moments: Moments, dy: Tensor) -> Sums:
    given = (recipe.pattern, *operands, recipe.groups, *_given(recipe, operands, moments), dy)
    grad, grad_xhat, dweight, dbias = _done(library().backward_sums(*given))
    return Sums(recipe.sets.inward(grad), recipe.sets.inward(grad_xhat), dweight, dbias)


def backward_dx(
    recipe: Recipe, operands: Operands, moments: Moments, dy: Tensor | None, sums: Sums | None
) -> tuple[Tensor, Tensor | None]:
    both = (None, None) if sums is None else (recipe.sets.outward(sums.grad), recipe.sets.outward(sums.grad_xhat))
    given = (recipe.pattern, *operands, recipe.groups, *_given(recipe, operands, moments), dy, *both)
    dx, dmask = _done(library().backward_dx(*given))
    return dx, dmask


def _given(recipe: Recipe, operands: Operands, moments: Moments) -> tuple[Tensor | None, ...]:
    m = moments.rounded(stat_dtype(operands.x.dtype)).outward(recipe.sets)
    count = m.count if m.count.is_floating_point() else m.count.to(torch.int64)
    return count, m.mean, m.m2, m.low

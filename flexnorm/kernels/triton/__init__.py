"""CUDA: the canonical form in Triton. A range that fits into a tile is read once; larger ones are split and merged.

Nothing here imports Triton before the first kernel is asked for.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ...canonical import Form, canonical, cut_of
from ...library import library
from ...pattern import MOST_DIMS
from ...sets import Sets
from ...statistics import Moments
from ..interface import Gradients, Kept, Operands, Recipe, Sums, stat_dtype
from . import tables
from .tables import Blocks

SMALL = 1 << 16  # elements below which torch's own fused operations may be faster; not measured, as no GPU was at hand

_DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
_ACTIVATIONS = {None, "relu", "silu", "gelu"}


def refusal(recipe: Recipe, operands: Operands) -> str | None:
    """Why this room does not compute it; None if it does."""
    x = operands.x
    if not x.is_cuda and not _interpreting():
        return "Triton needs CUDA"
    if not _importable():
        return "Triton 3.3 or later is not installed"
    if x.dtype not in _DTYPES:
        return f"Triton knows no {x.dtype} here"
    if x.is_cuda and x.dtype == torch.bfloat16 and torch.cuda.get_device_capability(x.device)[0] < 8:
        return "bfloat16 needs compute capability 8.0"
    if x.numel() == 0:
        return "x is empty"
    if isinstance(kernels := library(), str):
        return f"the compiled library says where to cut, and {kernels}"
    if cut_of(*_operands(recipe, x, "sets"), recipe.told) is None:
        return f"the library takes {MOST_DIMS} axes and labels, and here are more"
    if max(x.numel() // min(form(recipe, x).columns, x.numel()), recipe.sets.count) >= 2**31:
        return "2^31 rows or sets and more"
    if recipe.activation not in _ACTIVATIONS:
        return f"no kernel for {recipe.activation}"
    return None


@functools.cache
def _importable() -> bool:
    try:
        major, minor = metadata.version("triton").split(".")[:2]
    except metadata.PackageNotFoundError:
        return False
    return (int(major), int(minor)) >= (3, 3)


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") in {"1", "true", "on", "yes", "y"}


# --- the entry points -------------------------------------------------------------------------------------------------


def forward(recipe: Recipe, operands: Operands) -> tuple[Tensor, Kept]:
    """`statistics`, then `apply`; in one kernel where ranges fit into tiles."""
    call = _Call(recipe, operands)
    if call.tile(tables.LIMITS.resident).resident:
        y = call.like_y()
        return y, _kept(call.moments(_resident(call, y)))
    known = _statistics(call)
    return _apply(call, known), _kept(call.moments(known))


def moments(recipe: Recipe, operands: Operands, kept: Kept) -> Moments:
    """The moments that `forward` has kept."""
    return Moments(*kept)


def keep(recipe: Recipe, operands: Operands, moments: Moments) -> Kept:
    """The reverse: what `forward` would have kept."""
    return _kept(moments)


def evaluate(recipe: Recipe, operands: Operands) -> Tensor:
    """y alone; the moments are a few numbers, so they are written all the same."""
    return forward(recipe, operands)[0]


def statistics(recipe: Recipe, operands: Operands) -> Moments:
    """The moments of every set."""
    call = _Call(recipe, operands)
    return call.moments(_statistics(call))


def apply(recipe: Recipe, operands: Operands, moments: Moments) -> Tensor:
    """y, with these moments."""
    return _apply(_Call(recipe, operands), _inside(recipe, moments))


def backward(recipe: Recipe, operands: Operands, kept: Kept, dy: Tensor, *, of_mask: bool = True) -> Gradients:
    """`backward_sums`, then `backward_dx`; in one kernel where ranges fit into tiles."""
    moments = Moments(*kept)
    call = _Call(recipe, operands)
    dy = call.as_y(dy)
    known, weighted = _inside(recipe, moments), call.mask_kind == "float"
    sums = None
    if call.tile(tables.LIMITS.resident_backward).resident:
        sums = call.sums() if weighted else None
        dx = _backward(call, known, dy, sums)
    else:
        sums = _sums(call, known, dy)
        dx = _dx(call, known, dy, sums)
    dmask = _dmask(call, moments, dy, sums) if weighted and of_mask and sums is not None else None
    return Gradients(dx, dmask, *_of_params(call, moments, dy))


def backward_sums(recipe: Recipe, operands: Operands, moments: Moments, dy: Tensor) -> Sums:
    """The sums that dx and the gradients of the parameters are made of."""
    call = _Call(recipe, operands)
    dy = call.as_y(dy)
    grad, grad_xhat = _sums(call, _inside(recipe, moments), dy)
    assert grad_xhat is not None
    return Sums(grad, grad_xhat, *_of_params(call, moments, dy))


def backward_dx(
    recipe: Recipe, operands: Operands, moments: Moments, dy: Tensor | None, sums: Sums | None
) -> tuple[Tensor, Tensor | None]:
    dy = torch.zeros_like(operands.x) if dy is None else dy
    """dx, and the gradient of a float mask."""
    call = _Call(recipe, operands)
    dy = call.as_y(dy)
    pair = None
    if sums is not None:
        shape = recipe.sets.internal_shape
        pair = Pair(sums.grad.expand(shape).contiguous(), sums.grad_xhat.expand(shape).contiguous())
    dx = _dx(call, _inside(recipe, moments), dy, pair)
    return dx, _dmask(call, moments, dy, pair) if pair is not None and call.mask_kind == "float" else None


# --- tensors as kernels take them -------------------------------------------------------------------------------------


class Known(NamedTuple):
    """Moments, each flat; mean and low None about zero."""

    n: Tensor
    mean: Tensor | None
    m2: Tensor
    low: Tensor | None


class Pair(NamedTuple):
    """Two sums over the same owners; the second None where one is enough."""

    grad: Tensor
    grad_xhat: Tensor | None


@dataclass(frozen=True)
class Rule:
    """The formula, which kernels are compiled for."""

    center: bool
    scale: bool
    eps: float
    activation: str | None


Owners = Literal["sets", "params", "mask"]

_forms: WeakKeyDictionary[Recipe, dict[Owners, tuple[tuple[int, ...], Form]]] = WeakKeyDictionary()


def form(recipe: Recipe, x: Tensor, owners: Owners = "sets") -> Form:
    """The form whose ranges are those of the owners. Those of parameters and of the mask have the sets as their params,
    so that the same walk sums over them. The last one of each kind of owners is kept, because its tables lie on the
    device."""
    kept = _forms.setdefault(recipe, {})
    if owners not in kept or kept[owners][0] != x.stride():
        operands = _operands(recipe, x, owners)
        cut = cut_of(*operands, recipe.told)
        assert cut is not None
        kept[owners] = (x.stride(), canonical(*operands, cut))
    return kept[owners][1]


Strides = tuple[int, ...]


def _operands(recipe: Recipe, x: Tensor, owners: Owners) -> tuple[Strides, Strides, Sets, Sets | None, Sets | None]:
    """Strides of x and y in the elementary view, and whose place is looked for: sets, mask and params."""
    sizes, y = recipe.sets.axes.sizes, torch.empty_like(x, device="meta")
    owner = {"sets": recipe.sets, "params": recipe.params, "mask": recipe.mask}[owners]
    assert owner is not None
    params = recipe.params if owners == "sets" else recipe.sets
    return x.view(sizes).stride(), y.view(sizes).stride(), owner, recipe.mask, params


def shown(recipe: Recipe, x: Tensor) -> tuple[str, bool]:
    """The form in words, and whether x is copied for it."""
    return str(form(recipe, x)), form(recipe, x).copied


class _Call:
    """The tensors of a call, and the layout of the walk over the sets, or over other owners."""

    def __init__(self, recipe: Recipe, operands: Operands, owners: Owners = "sets") -> None:
        self.recipe, self.operands, self.owners = recipe, operands, owners
        x, mask, weight, bias = operands
        found = form(recipe, x, owners)
        self.x = torch.empty_like(x).copy_(x) if found.copied else x
        self.layout = tables.layout(found, x)
        self.mask_kind = None if recipe.mask is None or mask is None else "bool" if recipe.membership else "float"
        self.mask = None
        if mask is not None and self.mask_kind is not None:
            self.mask = mask.contiguous().view(torch.uint8) if self.mask_kind == "bool" else mask.contiguous()
        self.weight, self.bias = (None if t is None else t.contiguous() for t in (weight, bias))
        self.dtype = stat_dtype(x.dtype)

    @property
    def traits(self) -> dict[str, Any]:
        recipe = self.recipe
        rule = Rule(recipe.center, recipe.scale, float(recipe.eps), recipe.activation)
        return {"SHAPE": self.layout.shape, "RULE": rule, "MASK": self.mask_kind}

    def tile(self, limit: int) -> Blocks:
        return tables.blocks(self.layout, limit)

    def like_y(self) -> Tensor:
        return torch.empty_like(self.operands.x)

    def as_y(self, dy: Tensor) -> Tensor:
        """dy with the strides of y."""
        y = torch.empty_like(self.operands.x, device="meta")
        pairs = zip(dy.shape, dy.stride(), y.stride(), strict=True)
        if all(size == 1 or own == wanted for size, own, wanted in pairs):
            return dy
        return torch.empty_like(self.operands.x, dtype=dy.dtype).copy_(dy)

    def new(self, shape: Sequence[int], dtype: torch.dtype | None = None, *, owned: bool = True) -> Tensor:
        """A tensor for results; of zeros if some owner has no range: a value that no label of a table has."""
        layout = self.layout
        written = layout.ranges * (layout.walk.columns if layout.shape.each else 1)
        make = torch.zeros if owned and written != torch.Size(shape).numel() else torch.empty
        return make(shape, dtype=dtype or self.dtype, device=self.x.device)

    def known(self, shape: Sequence[int], *, owned: bool = True) -> Known:
        count = self.new(shape, self.dtype if self.mask_kind == "float" else torch.int64, owned=owned)
        mean, low = (self.new(shape, owned=owned) if self.recipe.center else None for _ in range(2))
        return Known(count, mean, self.new(shape, owned=owned), low)

    def moments(self, known: Known) -> Moments:
        count, mean, m2, low = known
        if mean is None:
            mean = m2.new_zeros((1,) * self.recipe.sets.axes.rank)
        return Moments(count, mean, m2, low)

    def sums(self) -> Pair:
        return Pair(*(self.new(self.recipe.sets.internal_shape) for _ in range(2)))

    def launch(self, kernel: str, programs: int, tile: Blocks, **arguments: Any) -> None:
        """Runs a kernel on so many programs, times tiles of columns where every column has an owner of its own."""
        from . import kernels

        across = -(-self.layout.walk.columns // tile.columns) if self.layout.shape.each else 1
        warps = min(16, max(1, tile.ranges * tile.rows * tile.columns // 512))
        device = torch.cuda.device(self.x.device) if self.x.is_cuda else contextlib.nullcontext()
        with device:
            run = getattr(kernels, kernel)[(programs * across,)]
            run(self.layout.walk, **arguments, C=tile.columns, num_warps=warps)


def _kept(moments: Moments) -> Kept:
    return tuple(t for t in (moments.count, moments.mean, moments.m2, moments.low) if t is not None)


def _inside(recipe: Recipe, moments: Moments) -> Known:
    """Moments as the sets are numbered."""
    fields = (moments.count, moments.mean, moments.m2, moments.low)
    shape = recipe.sets.internal_shape
    count, mean, m2, low = (None if t is None else t.expand(shape).contiguous() for t in fields)
    assert count is not None and m2 is not None
    return Known(count, mean, m2, low) if recipe.center else Known(count, None, m2, None)


def _outside(recipe: Recipe, moments: Moments) -> Known:
    """Moments as the sets are written."""
    inside = _inside(recipe, moments)
    count, mean, m2, low = (None if t is None else recipe.sets.outward(t).contiguous() for t in inside)
    assert count is not None and m2 is not None
    return Known(count, mean, m2, low)


# --- launches ---------------------------------------------------------------------------------------------------------


def _resident(call: _Call, y: Tensor | None) -> Known:
    tile, walk = call.tile(tables.LIMITS.resident), call.layout
    known = call.known(call.recipe.sets.internal_shape)
    call.launch(
        "forward_kernel", -(-walk.ranges // tile.ranges), tile, x=call.x, mask=call.mask, weight=call.weight,
        bias=call.bias, y=y, moments=known, ranges=walk.ranges, **call.traits, Q=tile.ranges, R=tile.rows,
    )  # fmt: skip
    return known


def _statistics(call: _Call) -> Known:
    tile = call.tile(tables.LIMITS.resident)
    if tile.resident:
        return _resident(call, None)
    items, programs = tables.items(call.layout, tile)
    known = call.known(call.recipe.sets.internal_shape)
    final = items.final
    partial = known if final else call.known((programs, call.layout.slot), owned=False)
    call.launch(
        "moments_kernel", programs, tile, items=items, x=call.x, mask=call.mask, moments=partial, **call.traits,
        R=tile.rows, FINAL=final,
    )  # fmt: skip
    if not final:
        merging = tables.merging(call.layout, items)
        call.launch(
            "merge_kernel", call.layout.ranges, merging, items=items, partial=partial, moments=known, **call.traits,
            B=merging.rows,
        )  # fmt: skip
    return known


def _apply(call: _Call, known: Known) -> Tensor:
    tile = call.tile(0)
    items, programs = tables.items(call.layout, tile)
    y = call.like_y()
    call.launch(
        "apply_kernel", programs, tile, items=items, x=call.x, mask=call.mask, weight=call.weight, bias=call.bias,
        y=y, moments=known, **call.traits, R=tile.rows,
    )  # fmt: skip
    return y


def _backward(call: _Call, known: Known, dy: Tensor, sums: Pair | None) -> Tensor:
    tile, ranges = call.tile(tables.LIMITS.resident_backward), call.layout.ranges
    dx = call.like_y()
    call.launch(
        "backward_kernel", -(-ranges // tile.ranges), tile, x=call.x, dy=dy, mask=call.mask, weight=call.weight,
        bias=call.bias, dx=dx, moments=known, sums=sums, ranges=ranges, **call.traits, Q=tile.ranges, R=tile.rows,
    )  # fmt: skip
    return dx


def _dx(call: _Call, known: Known, dy: Tensor, sums: Pair | None) -> Tensor:
    tile = call.tile(0)
    items, programs = tables.items(call.layout, tile)
    dx = call.like_y()
    call.launch(
        "dx_kernel", programs, tile, items=items, x=call.x, dy=dy, mask=call.mask, weight=call.weight, bias=call.bias,
        dx=dx, moments=known, sums=sums, **call.traits, R=tile.rows,
    )  # fmt: skip
    return dx


def _sums(call: _Call, known: Known, dy: Tensor) -> Pair:
    sums = call.sums()
    _add_up(call, sums, known, dy, (call.weight, call.bias))
    return sums


def _of_params(call: _Call, moments: Moments, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of weight and bias: another pass over x, by the ranges of the parameters."""
    params, (_, mask, weight, bias) = call.recipe.params, call.operands
    if params is None or (weight is None and bias is None):
        return None, None
    turned = _Call(call.recipe, Operands(call.x, mask), "params")
    sums = Pair(*(turned.new(params.internal_shape) for _ in range(2)))
    inner = [None if t is None else params.inward(t).contiguous() for t in (weight, bias)]
    _add_up(turned, sums, _outside(call.recipe, moments), dy, (inner[0], inner[1]))
    assert sums.grad_xhat is not None
    return (
        None if weight is None else params.outward(sums.grad_xhat).to(weight.dtype),
        None if bias is None else params.outward(sums.grad).to(bias.dtype),
    )


def _dmask(call: _Call, moments: Moments, dy: Tensor, sums: Pair) -> Tensor:
    """The gradient of the weights: another pass over x, by the ranges of the mask."""
    recipe, mask = call.recipe, call.operands.mask
    assert recipe.mask is not None and mask is not None and sums.grad_xhat is not None
    turned = _Call(recipe, Operands(call.x, mask), "mask")
    own = Pair(turned.new(recipe.mask.internal_shape), None)
    given = Pair(*(recipe.sets.outward(t).contiguous() for t in (sums.grad, sums.grad_xhat)))
    _add_up(turned, own, _outside(recipe, moments), dy, given=given)
    return recipe.mask.outward(own.grad).to(mask.dtype)


def _add_up(
    call: _Call,
    sums: Pair,
    known: Known,
    dy: Tensor,
    affine: tuple[Tensor | None, Tensor | None] = (None, None),
    given: Pair | None = None,
) -> None:
    """Fills the sums over the owners of the call, in one pass; then adds those of the parts in their order."""
    tile = call.tile(0)
    items, programs = tables.items(call.layout, tile)
    slots = (programs, call.layout.slot)
    partial = sums
    if not items.final:
        two = None if sums.grad_xhat is None else call.new(slots, owned=False)
        partial = Pair(call.new(slots, owned=False), two)
    call.launch(
        "sums_kernel", programs, tile, items=items, x=call.x, dy=dy, mask=call.mask, weight=affine[0], bias=affine[1],
        moments=known, given=given, sums=partial, **call.traits, OWNERS=call.owners, R=tile.rows, FINAL=items.final,
    )  # fmt: skip
    if not items.final:
        merging = tables.merging(call.layout, items)
        call.launch(
            "add_kernel", call.layout.ranges, merging, items=items, partial=partial, sums=sums,
            SHAPE=call.layout.shape, B=merging.rows,
        )  # fmt: skip

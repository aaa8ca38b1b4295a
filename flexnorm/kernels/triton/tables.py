"""A form as the device reads it: small tables, made once for a form, and how its ranges are cut into tiles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ...canonical import Column, Dim, Form


class Walk(NamedTuple):
    """A form, whose ranges are counted as groups x outer x sets of a table; every set of a table is a range of its own.

    Columns of the sets of a table are visited through lists: which columns are in each set, block by block.
    """

    dims: Tensor  # [outer, inner and segments' axes, 9]: size; steps of x, y, set, mask, param, blocks, param_label
    order: Tensor | None  # [members]
    offsets: Tensor | None  # [groups + 1]
    group_sets: Tensor | None  # [groups]
    lists: Tensor | None  # [blocks, columns]: columns, sorted by set; None if they are
    list_offsets: Tensor | None  # [blocks, sets + 1]: where the list of each set begins in its block, and the end
    set_offsets: Tensor | None  # [sets]
    mask_table: Tensor | None  # [columns]
    param_table: Tensor | None  # [blocks, columns]
    param_label: Tensor | None  # flat, as its steps go
    group_step: int
    sets: int  # of the table, 1 without
    outer: int  # product of the outer dims
    inner: int  # product of the inner dims
    columns: int
    width: int  # columns of a range: of the longest list, or all


@dataclass(frozen=True)
class Shape:
    """What kernels are compiled for: how many dims there are of each kind, and how operands depend on the column."""

    outer: int
    inner: int
    axes: int
    each: bool  # every column is a set of its own
    mask_each: bool
    param_each: bool
    aligned: int  # elements, of which the place of every row is a multiple


@dataclass(frozen=True, eq=False)
class Layout:
    """A walk, with what the host knows of it."""

    walk: Walk
    shape: Shape
    groups: int
    rest: int  # ranges of one group
    height: int  # rows of the longest range
    rows: int  # of all groups together

    @property
    def ranges(self) -> int:
        """Of all groups, counting every set of a table."""
        return self.groups * self.rest

    @property
    def slot(self) -> int:
        """Owners that a range writes a result for."""
        return self.walk.columns if self.shape.each else 1


class Items(NamedTuple):
    """The work, cut: every item is a part of a range, at most `tiles` tiles of it. All parts of a range in a row."""

    groups: Tensor | None  # [items of one choice of the rest]; None: every group has `parts` items
    starts: Tensor | None  # [groups + 1]: the first item of each
    parts: int
    tiles: int

    @property
    def final(self) -> bool:
        """Whether every range is one part."""
        return self.groups is None and self.parts == 1


class Blocks(NamedTuple):
    """The size of a tile, and whether every range fits into one."""

    ranges: int
    rows: int
    columns: int
    resident: bool


# None of these is measured yet, as no GPU was at hand.
@dataclass(frozen=True)
class Limits:
    """Elements of tiles, and programs that fill a GPU."""

    resident: int = 16384  # of a tile that holds a whole range; of 32768, registers spill
    resident_backward: int = 8192  # where x and dy are held
    tile: int = 4096  # of a tile of a range that does not fit
    small: int = 1024  # a smaller tile holds several ranges
    each: int = 64  # columns side by side that are read well, where every column is a set
    part: int = 4  # tiles that are worth a part
    programs: int = 2048


LIMITS = Limits()

_layouts: WeakKeyDictionary[Form, dict[tuple[torch.device, int], Layout]] = WeakKeyDictionary()
_longest: WeakIdKeyDictionary = WeakIdKeyDictionary()


def layout(form: Form, x: Tensor) -> Layout:
    """The layout of a form for x's device and dtype; kept as long as the form."""
    kept = _layouts.setdefault(form, {})
    key = (x.device, x.dtype.itemsize)
    if key not in kept:
        kept[key] = _layout(form, *key)
    return kept[key]


def blocks(layout: Layout, limit: int) -> Blocks:
    """How tiles lie, where those of up to `limit` elements may hold whole ranges."""
    height, width = _power(layout.height), _power(layout.walk.width)
    columns = min(width, max(LIMITS.each, LIMITS.small // height)) if layout.shape.each else width
    if height * columns > limit:
        columns = min(columns, LIMITS.each if layout.shape.each else max(1, LIMITS.tile // 2), LIMITS.tile)
        return Blocks(1, min(height, max(1, LIMITS.tile // columns)), columns, False)
    across = -(-width // columns)
    spare = layout.ranges * across // max(1, LIMITS.programs // 4)
    ranges = _power(max(1, min(LIMITS.small // (height * columns), spare)))
    return Blocks(ranges, height, columns, True)


def items(layout: Layout, tile: Blocks) -> tuple[Items, int]:
    """The work of a walk in tiles that do not hold whole ranges, and the number of programs along the first axis."""
    each = layout.shape.each
    side = -(-layout.walk.width // tile.columns)
    total = layout.rest * (layout.rows // tile.rows + layout.groups) * side
    tiles = max(LIMITS.part, -(-total // LIMITS.programs))
    across = 1 if each else side
    most = -(-layout.height // tile.rows) * across
    if layout.walk.offsets is None or most <= tiles:
        parts = max(1, -(-most // tiles))
        return Items(None, None, parts, tiles), layout.groups * parts * layout.rest
    lengths = layout.walk.offsets.diff() * layout.walk.inner
    cut = ((lengths + tile.rows - 1) // tile.rows * across + tiles - 1) // tiles
    ends = cut.clamp(min=1).cumsum(0)
    starts = torch.cat([ends.new_zeros(1), ends])
    # No device is waited for: more items than there can be, of which the last do nothing, as parts of group 0.
    bound = layout.groups + (layout.rows // tile.rows + layout.groups) * across // tiles
    number = torch.arange(bound, device=ends.device)
    group = torch.searchsorted(ends, number, right=True)
    group = group.where(group < layout.groups, 0)
    return Items(group, starts, 0, tiles), bound * layout.rest


def merging(layout: Layout, items: Items) -> Blocks:
    """The tile in which partial results are merged."""
    columns = min(_power(layout.slot), LIMITS.each)
    most = items.parts if items.groups is None else LIMITS.tile
    return Blocks(1, min(_power(most), max(1, LIMITS.tile // columns // 4)), columns, False)


def _layout(form: Form, device: torch.device, itemsize: int) -> Layout:
    segments = form.segments
    axes = () if segments is None else segments.axes
    dims = (*form.outer, *form.inner, *axes)
    outer, inner = (_product(group) for group in (form.outer, form.inner))
    aligned = max(1, 16 // itemsize)
    while any(dim.x % aligned or dim.y % aligned for dim in dims):
        aligned //= 2
    lists = list_offsets = set_offsets = None
    width = form.columns
    if form.sets.kind == "table":
        assert form.sets.table is not None
        lists, list_offsets, width, fits = _lists(form.sets.table.to(device), form.sets.count)
        aligned = min(aligned, fits)
        set_offsets = None if form.sets.offsets is None else form.sets.offsets.to(device)
    count = form.sets.count if form.sets.kind == "table" else 1
    groups, rows, height = 1, inner, inner
    if segments is not None:
        groups, rows = segments.groups, _product(axes) * inner
        height = _longest_group(segments.offsets) * inner
    walk = Walk(
        dims=torch.tensor([_steps(dim) for dim in dims] or [_steps(Dim(1))], dtype=torch.int64).to(device),
        order=None if segments is None or segments.order is None else segments.order.to(device),
        offsets=None if segments is None else segments.offsets.to(device),
        group_sets=None if segments is None or segments.sets is None else segments.sets.to(device),
        lists=lists,
        list_offsets=list_offsets,
        set_offsets=set_offsets,
        mask_table=_table(form.mask, device),
        param_table=_table(form.params, device),
        param_label=None if form.param_label is None else form.param_label.to(device),
        group_step=0 if segments is None else segments.step,
        sets=count,
        outer=outer,
        inner=inner,
        columns=form.columns,
        width=width,
    )
    shape = Shape(
        outer=len(form.outer),
        inner=len(form.inner),
        axes=len(axes),
        each=form.sets.kind == "each",
        mask_each=form.mask.kind == "each",
        param_each=form.params.kind == "each",
        aligned=aligned,
    )
    return Layout(walk, shape, groups, outer * count, height, rows)


def _lists(table: Tensor, count: int) -> tuple[Tensor | None, Tensor, int, int]:
    """The columns set by set, block by block; None if they stand in that order. Where the list of every set begins; the
    length of the longest; what all lengths are multiples of: 1, 2, 4 or 8.

    Waits once for the device.
    """
    blocks = table.shape[0]
    # One more than the sets in every block: its first list begins with 0, and its last ends with the number of columns.
    first = torch.arange(blocks, device=table.device)[:, None] * (count + 1)
    sizes = torch.zeros(blocks * (count + 1), dtype=torch.int64, device=table.device)
    ones = torch.ones((), dtype=torch.int64, device=table.device).expand(table.numel())
    sizes = sizes.index_add(0, (table + 1 + first).flatten(), ones).view(blocks, count + 1)
    known = [sizes.max(), (table[:, 1:] >= table[:, :-1]).all(), *((sizes % n == 0).all() for n in (2, 4, 8))]
    width, ordered, *fits = torch.stack([t.to(torch.int64) for t in known]).tolist()
    lists = None if ordered else table.argsort(dim=1, stable=True).to(torch.int32)
    return lists, sizes.cumsum(1), width, max((n for n, fit in zip((2, 4, 8), fits, strict=True) if fit), default=1)


def _longest_group(offsets: Tensor) -> int:
    """Waits for the device, once for all layers that share a partition."""
    if offsets not in _longest:
        _longest[offsets] = int(offsets.diff().max()) if offsets.numel() > 1 else 0
    longest: int = _longest[offsets]
    return longest


def _steps(dim: Dim) -> list[int]:
    return [dim.size, dim.x, dim.y, dim.set, dim.mask, dim.param, dim.set_block, dim.param_block, dim.param_label]


def _table(column: Column, device: torch.device) -> Tensor | None:
    return None if column.table is None else column.table.to(device)


def _product(dims: tuple[Dim, ...]) -> int:
    product = 1
    for dim in dims:
        product *= dim.size
    return product


def _power(n: int) -> int:
    """The least power of 2 that is not below n."""
    return 1 << max(0, n - 1).bit_length()

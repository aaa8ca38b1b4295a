"""Rows and columns: the one form in which a kernel sees every tensor under every pattern.

The axes of x, in the order of the memory, are cut once: the inner, contiguous ones are flattened to columns, the outer
ones are walked as rows. Rows fall into *closed ranges*, which share no set with any other range: one for each choice of
indices on the kept row axes (`outer`) and each group of a label that reads row axes (`segments`). Within a range,

    set(row, k)   = sets of the range + sets.offsets[sets.table[block(row), k]]
    param(row, k) = param(row) + params.table[block(row), k]
    mask(row, k)  = mask(row) + mask.table[k]

where what depends on the row is a sum of steps along its axes, so that no table is as large as x, and dense patterns
need none: along the columns most operands are constant or lie side by side with x.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Literal, cast

import torch
from torch import Tensor

from .library import library
from .partition import Partition
from .pattern import MOST_DIMS
from .sets import Sets, sets_of, strides_of
from .spec import Lookup

Kind = Literal["one", "each", "table"]
KINDS: tuple[Kind, ...] = ("one", "each", "table")  # by the library's numbers


@dataclass(frozen=True)
class Dim:
    """An axis of rows: its size, and how far one step along it goes in x, y and each operand, in elements."""

    size: int
    x: int = 0
    y: int = 0
    set: int = 0
    mask: int = 0
    param: int = 0
    set_block: int = 0
    param_block: int = 0
    param_label: int = 0  # in `Form.param_label`

    def joins(self, inner: Dim) -> bool:
        """Whether this axis and the one inside of it are one axis for every operand."""
        steps = [f.name for f in fields(self) if f.name != "size"]
        return all(getattr(self, step) == getattr(inner, step) * inner.size for step in steps)


@dataclass(frozen=True, eq=False)
class Column:
    """How an operand depends on the column: it is one for all, lies side by side with x, or stands in a table."""

    kind: Kind
    table: Tensor | None = None  # [blocks, columns], int32
    count: int = 1  # of sets that the columns of a range meet
    offsets: Tensor | None = None  # [count]: the set of each, from that of the range; None: 0, 1, 2, ...


ONE = Column("one")


@dataclass(frozen=True, eq=False)
class Segments:
    """Row axes that labels consume: their elements, group by group.

    Attributes:
        axes: the axes, elements counted in this order; `size` of all is the number of elements.
        order: the elements sorted by group, None if they are. [size]
        offsets: where each group begins in `order`, and the end of the last. [groups + 1]
        sets: where the sets of each group begin; None: one `step` from group to group. [groups]
    """

    axes: tuple[Dim, ...]
    order: Tensor | None
    offsets: Tensor
    step: int
    sets: Tensor | None = None

    @property
    def groups(self) -> int:
        return self.offsets.numel() - 1


@dataclass(frozen=True, eq=False)
class Form:
    """A tensor under a pattern, as rows and columns.

    Attributes:
        columns: number of columns, which lie side by side in x and in y.
        outer: kept axes of rows: a closed range for each choice of indices, times the groups of `segments`.
        segments: row axes that labels consume.
        inner: pooled axes of rows.
        segments_at: the place of `segments` among `outer` (groups) and among `inner` (elements), outermost is 0.
        sets, mask, params: how these depend on the column.
        param_label: numbers that labels add to the parameter of a row, read at the steps `param_label`.
        injective: within a range every element has a parameter of its own.
        copied: x has no contiguous axis, or overlaps itself: kernels need a copy with the strides of y.
    """

    columns: int
    outer: tuple[Dim, ...]
    segments: Segments | None
    inner: tuple[Dim, ...]
    segments_at: tuple[int, int]
    sets: Column
    mask: Column
    params: Column
    param_label: Tensor | None
    injective: bool
    copied: bool

    @cached_property
    def ranges(self) -> int:
        return math.prod(dim.size for dim in self.outer) * (1 if self.segments is None else self.segments.groups)

    def __str__(self) -> str:
        each = "" if self.segments is None else " in all"
        return f"{self.ranges} closed ranges of {self.rows} rows{each} x {self.columns} columns"

    @cached_property
    def rows(self) -> int:
        """Rows of one range, of all groups together where there are segments."""
        members = 1 if self.segments is None else math.prod(dim.size for dim in self.segments.axes)
        return math.prod(dim.size for dim in self.inner) * members


@dataclass(frozen=True)
class Cut:
    """Where the axes of x are cut into rows and columns. The library chooses it: kernels/cpu/bind.h.

    Attributes:
        order: axes in the order of the memory, without the ones that no form needs.
        place: the first that is one of the columns.
        kinds: how sets, mask and parameters depend on the column.
        copied: x has no contiguous axis, or overlaps itself.
    """

    order: tuple[int, ...]
    place: int
    kinds: tuple[Kind, Kind, Kind]
    copied: bool


def cut_of(
    x: tuple[int, ...],
    y: tuple[int, ...],
    sets: Sets,
    mask: Sets | None = None,
    params: Sets | None = None,
    told: Iterable[int] = (),
) -> Cut | None:
    """The cut of a tensor with these strides in the elementary view; y are those of the result, without gaps.

    `told` are the places of axes whose sizes were told before any tensor came, and will be the same at the next. None:
    there is no library, or there are more axes, terms or labels than it takes.
    """
    kernels, axes = library(), sets.axes
    if isinstance(kernels, str) or axes.rank > MOST_DIMS:
        return None
    lookups = list(dict.fromkeys(lookup for s in (sets, params) if s is not None for lookup in s.expr.lookups()))
    mask = mask_of(sets, mask)
    fixed = {place for place, name in enumerate(axes.names) if name.isdigit()}
    known = {*told, *fixed}
    pattern = kernels.pattern(
        axes.rank,
        tuple(range(axes.rank)),
        tuple(size if place in known else -1 for place, size in enumerate(axes.sizes)),
        tuple(axes.places(lookup.axes) for lookup in lookups),
        _terms(sets.internal_steps, lookups),
        None if mask is None else _terms(mask.written_steps, lookups),
        None if params is None else _terms(params.written_steps, lookups),
        *(True, True, 0, bool(sets.merges), 0.0),  # options are no part of it
    )
    if pattern is None:  # more terms or labels than the library takes
        return None
    found = kernels.bind(pattern, 0, axes.sizes, x, y, 0, None)
    kinds = tuple(KINDS[kind] for kind in found["kinds"])
    return Cut(tuple(found["order"]), found["cut"], cast("tuple[Kind, Kind, Kind]", kinds), bool(found["copied"]))


def _terms(steps: Mapping[int | Lookup, int], lookups: list[Lookup]) -> tuple[tuple[int], ...]:
    """What indexes a tensor, outermost first, each a dim of its own: an axis, or ~label."""
    inwards = sorted(steps, key=steps.__getitem__, reverse=True)
    return tuple((~lookups.index(term) if isinstance(term, Lookup) else term,) for term in inwards)


def mask_of(sets: Sets, mask: Sets | None) -> Sets | None:
    """A pattern that has a mask is cut as if it were given: then what is all valid is summed as what has no mask."""
    if mask is None and sets.axes.spec.mask is not None:
        return sets_of(sets.axes, sets.axes.spec.mask)
    return mask


def canonical(
    x: tuple[int, ...],
    y: tuple[int, ...],
    sets: Sets,
    mask: Sets | None,
    params: Sets | None,
    cut: Cut,
) -> Form:
    """The form of a tensor with these strides in the elementary view, cut there; y are those of the result.

    Sets are numbered as in the internal shape; mask and parameters are contiguous as their expressions write them.
    """
    return _Former(x, y, sets, mask, params, cut).form()


@dataclass(frozen=True, eq=False)
class _Label:
    """What a label adds: the ids over some axes (ascending), times the step."""

    axes: tuple[int, ...]
    ids: Tensor
    count: int
    step: int


class _Operand:
    """The place of an element in a tensor over some sets, as a sum: of steps along axes, and of what labels add."""

    def __init__(self, sets: Sets, steps: Mapping[int | Lookup, int]) -> None:
        axes = sets.axes
        self.steps = [steps.get(place, 0) for place in range(axes.rank)]
        self.labels = []
        for term, step in steps.items():
            if isinstance(term, Lookup):
                label, read = sets.labels[term.label], axes.places(term.axes)
                ids = label._ids.permute(sorted(range(len(read)), key=read.__getitem__))
                self.labels.append(_Label(tuple(sorted(read)), ids, label.count, step))


class _Former:
    """Fills a form: steps of rows, tables of columns, groups of labels."""

    def __init__(
        self,
        x: tuple[int, ...],
        y: tuple[int, ...],
        sets: Sets,
        mask: Sets | None,
        params: Sets | None,
        cut: Cut,
    ) -> None:
        self.source, self.masked, self.cut = sets, mask is not None, cut
        mask = mask_of(sets, mask)
        self.sets = _Operand(sets, sets.internal_steps)
        self.mask, self.params = (None if s is None else _Operand(s, s.written_steps) for s in (mask, params))
        self.sizes = sets.axes.sizes
        self.x, self.y = (y if cut.copied else x), y

    def size(self, axes: Iterable[int]) -> int:
        return math.prod(self.sizes[axis] for axis in axes)

    def form(self) -> Form:
        rows, columns = list(self.cut.order[: self.cut.place]), list(self.cut.order[self.cut.place :])
        consumed = self.consumed(rows, columns)
        set_blocks, param_blocks = (
            [] if operand is None else self.blocks(operand, rows, columns) for operand in (self.sets, self.params)
        )
        label_axes, param_label = self.param_label(columns)
        steps = {
            "x": self.x,
            "y": self.y,
            "set": self.sets.steps,
            "mask": self.mask.steps if self.mask is not None and self.masked else None,
            "param": None if self.params is None else self.params.steps,
            "set_block": self.steps_in(set_blocks),
            "param_block": self.steps_in(param_blocks),
            "param_label": self.steps_in(label_axes),
        }
        dims = {
            axis: Dim(self.sizes[axis], **{name: s[axis] for name, s in steps.items() if s is not None})
            for axis in rows
        }
        outer = [axis for axis in rows if self.sets.steps[axis] and axis not in consumed]
        inner = [axis for axis in rows if not self.sets.steps[axis] and axis not in consumed]
        walks: list[tuple[Dim, ...]] = []
        at: list[int] = []
        for group in (outer, inner):
            before = [axis for axis in group if consumed and rows.index(axis) < rows.index(consumed[0])]
            parts = [_joined([dims[axis] for axis in part]) for part in (before, group[len(before) :])]
            walks.append((*parts[0], *parts[1]))
            at.append(len(parts[0]))
        within = [axis for axis in (*inner, *consumed, *columns) if self.sizes[axis] != 1]
        return Form(
            columns=self.size(columns),
            outer=walks[0],
            segments=self.segments(consumed, columns, dims) if consumed else None,
            inner=walks[1],
            segments_at=(at[0], at[1]),
            sets=self.set_column(columns, set_blocks),
            mask=ONE if self.mask is None else self.column(self.mask, columns, []),
            params=ONE if self.params is None else self.column(self.params, columns, param_blocks),
            param_label=param_label,
            injective=self.params is not None and all(self.params.steps[axis] for axis in within),
            copied=self.cut.copied,
        )

    # --- rows

    def consumed(self, rows: Sequence[int], columns: Sequence[int]) -> list[int]:
        """The axes of rows that are visited by the groups of labels, which read rows alone."""
        labels = [label for label in self.sets.labels if not set(label.axes) & set(columns)]
        return [axis for axis in rows if any(axis in label.axes for label in labels)]

    def segments(self, consumed: list[int], columns: list[int], dims: Mapping[int, Dim]) -> Segments:
        axes = sorted(consumed)
        terms = [self.term(axis, self.sets) for axis in axes if self.sets.steps[axis]]
        labels = [label for label in self.sets.labels if not set(label.axes) & set(columns)]
        terms += [(label.axes, label.ids, label.count, label.step) for label in labels]
        walk = tuple(dims[axis] for axis in axes)
        if len(terms) == 1:
            lookups = [
                term
                for term in self.source.expr.lookups()
                if not set(self.source.axes.places(term.axes)) & set(columns)
            ]
            label = self.source.labels[lookups[0].label]
            if self.source.axes.places(lookups[0].axes) == tuple(axes):  # and not turned
                return Segments(walk, None if label.is_sorted else label.order, label.offsets, labels[0].step)
        device = labels[0].ids.device
        ids = torch.zeros([1] * len(axes), dtype=torch.int64, device=device)
        sets = torch.zeros((), dtype=torch.int64, device=device)
        for read, value, count, step in terms:
            ids = ids * count + self.over(axes, read, value.to(device))
            sets = (sets[..., None] + torch.arange(count, device=device) * step).reshape(-1)
        part = Partition._made(ids.expand([self.sizes[a] for a in axes]).reshape(-1), sets.numel())
        return Segments(walk, None if part.is_sorted else part.order, part.offsets, 0, sets)

    def param_label(self, columns: Sequence[int]) -> tuple[list[int], Tensor | None]:
        """What labels that read rows alone add to the parameter of a row, and the axes of that table."""
        labels = [] if self.params is None else self.params.labels
        labels = [label for label in labels if not set(label.axes) & set(columns)]
        axes = sorted({axis for label in labels for axis in label.axes})
        if not labels:
            return [], None
        table = sum((self.over(axes, label.axes, label.ids * label.step) for label in labels), torch.tensor(0))
        return axes, table.expand([self.sizes[a] for a in axes]).reshape(-1).contiguous()

    def blocks(self, operand: _Operand, rows: Sequence[int], columns: Sequence[int]) -> list[int]:
        """Axes of rows that are read by labels that read columns too."""
        spanning = {axis for label in operand.labels if set(label.axes) & set(columns) for axis in label.axes}
        return [axis for axis in rows if axis in spanning]

    def steps_in(self, axes: Sequence[int]) -> list[int]:
        """Steps in a contiguous tensor over these axes, for every axis."""
        own = dict(zip(axes, strides_of([self.sizes[axis] for axis in axes]), strict=True))
        return [own.get(axis, 0) for axis in range(len(self.sizes))]

    # --- columns

    def column(self, operand: _Operand, columns: list[int], blocks: list[int]) -> Column:
        kind = self.cut.kinds[1 if operand is self.mask else 2]
        if kind != "table" or (operand is self.mask and not self.masked):
            return Column(kind)
        table, _, _ = self.table(operand, columns, blocks, compact=False)
        return Column(kind, table)

    def set_column(self, columns: list[int], blocks: list[int]) -> Column:
        kind = self.cut.kinds[0]
        if kind != "table":
            return Column(kind, None, self.size(columns) if kind == "each" else 1)
        table, count, offsets = self.table(self.sets, columns, blocks, compact=True)
        return Column(kind, table, count, offsets)

    def table(
        self, operand: _Operand, columns: list[int], blocks: list[int], *, compact: bool
    ) -> tuple[Tensor, int, Tensor | None]:
        """What the columns add to the place of an element: [blocks, columns]. If `compact`, numbered from 0 to a count,
        with the place of each."""
        over = [*blocks, *columns]
        terms = [self.term(axis, operand) for axis in columns if operand.steps[axis]]
        labels = [label for label in operand.labels if set(label.axes) & set(columns)]
        terms += [(label.axes, label.ids, label.count, label.step) for label in labels]
        device = labels[0].ids.device if labels else None
        table = torch.zeros([1] * len(over), dtype=torch.int64, device=device)
        places = torch.zeros((), dtype=torch.int64, device=device)
        for read, value, count, step in terms:
            value = self.over(over, read, value.to(device or "cpu"))
            table = table * count + value if compact else table + value * step
            if compact:
                places = (places[..., None] + torch.arange(count, device=device) * step).reshape(-1)
        table = table.expand([self.sizes[axis] for axis in over]).reshape(-1, self.size(columns))
        if compact and places.numel() > max(1024, 4 * table.shape[1]):  # of many values few are met
            met, table = torch.unique(table, return_inverse=True)
            places = places[met]
        straight = len(terms) == 1 and terms[0][3] == 1 and places.numel() == terms[0][2]
        return table.to(torch.int32).contiguous(), places.numel(), None if straight else places

    def term(self, axis: int, operand: _Operand) -> tuple[tuple[int, ...], Tensor, int, int]:
        """What one axis adds to a place, like a label that counts along it: axes, ids, count and step."""
        return (axis,), torch.arange(self.sizes[axis]), self.sizes[axis], operand.steps[axis]

    def over(self, wanted: Sequence[int], axes: Sequence[int], value: Tensor) -> Tensor:
        """A value over `axes` (ascending), as one that broadcasts over the axes `wanted`."""
        present = [axis for axis in wanted if axis in axes]
        value = value.reshape([self.sizes[axis] for axis in axes]).permute([list(axes).index(axis) for axis in present])
        return value.reshape([self.sizes[axis] if axis in axes else 1 for axis in wanted])


# --- steps -----------------------------------------------------------------------------------------------------------


def _joined(dims: Sequence[Dim]) -> list[Dim]:
    """The same walk with fewer axes."""
    joined: list[Dim] = []
    for dim in dims:
        if dim.size == 1:
            continue
        if joined and joined[-1].joins(dim):
            joined[-1] = replace(dim, size=joined[-1].size * dim.size)
        else:
            joined.append(dim)
    return joined


def memory_order(sizes: Iterable[int], strides: Iterable[int]) -> list[int]:
    """The axes from the outermost in memory to the innermost, as `torch.empty_like` keeps them."""
    shape = list(zip(sizes, strides, strict=True))
    if any(stride == 0 and size > 1 for size, stride in shape):  # expanded: copies are contiguous
        return list(range(len(shape)))
    return sorted(range(len(shape)), key=lambda axis: -shape[axis][1])

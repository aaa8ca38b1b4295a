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
from typing import Literal

import torch
from torch import Tensor

from .partition import Partition
from .sets import Sets, sets_of, strides_of
from .spec import Lookup

Kind = Literal["one", "each", "table"]

# A cut decides in which order a set is summed. So it may not read what does not belong to a set: what such an axis
# counts as, whatever its size.
SAMPLES = 4  # along the first axis, where it is kept and nobody told its size
KEPT = 64  # along any other kept axis whose size nobody told
MEMBERS = 256  # along a pooled axis that a mask covers, or that a label reads together with others
GROUPS = 16  # values of a label
LABELLED = GROUPS * MEMBERS  # along an axis that a label reads alone: so many members of so many sets

# Work per element, of forward and backward, in units of about 6 ns. They only rank cuts, so their ratios matter.
RANGE = 25.0  # to begin a range
ROW = 35.0  # to begin a row that is summed in runs
TILED = 10.0  # to begin one that is summed column by column
RUN = 15.0  # to begin a run of columns
SCATTER = 3.0  # to sum columns that lie anywhere, one after another
FOLD = 5.0  # to add the sums of a column to those of its set: once for all rows that share it
ENTRY = 0.5  # to make an entry of a table, or to look one up for all rows
LOOKUP = 0.8  # to look up the parameters of every column at every row
LABEL = 4.0  # to make an entry from labels, which may be others at the next call
SPREAD = 0.12  # to write the parameters of runs along the columns
BLOCK = 1.0  # to have another table every few rows
LINES = 0.05  # to sum columns whose sums leave the first cache
WIDE = 4096  # so many columns

# As in kernels/cpu/walk.h.
MANY = 4  # rows that pay for a sum per column
SPLIT = 256  # a run of columns so long is summed by itself, whatever the rows
SHORT = 8  # shorter ones are not, however few rows share their columns
LONG = 16  # columns of a run that pay for looking for its end
CHUNK = 1 << 16  # elements of a set that are summed before they are merged with the next
ROWS_OF_EACH = 1024  # rows that are, where every column has a set of its own
ROWS = 512  # where runs of columns have, at most


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
        few: few rows share the columns, so sums of every column do not pay.
        apart: a label of the first axis is read along the columns. Samples are packed along it: whether members of a
            set lie side by side depends on how these are sorted, so no sum may depend on it.
        shared: all rows of a range have the same parameters.
        chunk: rows that are summed before they are merged with the next; 0: so many as have CHUNK elements.
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
    few: bool
    apart: bool
    shared: bool
    chunk: int
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


def canonical(
    x: tuple[int, ...],
    y: tuple[int, ...],
    sets: Sets,
    mask: Sets | None = None,
    params: Sets | None = None,
    told: Iterable[int] = (),
) -> Form:
    """The form of a tensor with these strides in the elementary view; y are those of the result, without gaps.

    Sets are numbered as in the internal shape; mask and parameters are contiguous as their expressions write them.
    `told` are the places of axes whose sizes were told before any tensor came, and will be the same at the next.
    """
    return _Cutter(x, y, sets, mask, params, told).best()


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
        self.inwards = sorted(steps, key=steps.__getitem__, reverse=True)[::-1]  # innermost first
        self.labels = []
        for term, step in steps.items():
            if isinstance(term, Lookup):
                label, read = sets.labels[term.label], axes.places(term.axes)
                ids = label.ids.permute(sorted(range(len(read)), key=read.__getitem__))
                self.labels.append(_Label(tuple(sorted(read)), ids, label.count, step))

    def counted(self, counts: Sequence[int]) -> list[int]:
        """The steps, if axes had the sizes that they count as."""
        result, step = [0] * len(counts), 1
        for term in self.inwards:
            if isinstance(term, Lookup):
                step *= GROUPS
            else:
                result[term] = step
                step *= counts[term]
        return result


class _Cutter:
    """Tries every place between rows and columns, and makes the form of the best.

    A pattern that has a mask is cut as if it were given: then what is all valid is summed as what has no mask.
    """

    def __init__(
        self,
        x: tuple[int, ...],
        y: tuple[int, ...],
        sets: Sets,
        mask: Sets | None,
        params: Sets | None,
        told: Iterable[int],
    ) -> None:
        self.source, self.masked = sets, mask is not None
        if mask is None and sets.axes.spec.mask is not None:
            mask = sets_of(sets.axes, sets.axes.spec.mask)
        self.sets = _Operand(sets, sets.internal_steps)
        self.mask, self.params = (None if s is None else _Operand(s, s.written_steps) for s in (mask, params))
        self.sizes = sets.axes.sizes
        self.counts = list(self.sizes)
        self.unknown: set[int] = set()  # kept axes whose sizes nobody told
        self.count_unknown(frozenset(told))
        read = {axis for operand in self.operands for label in operand.labels for axis in label.axes}
        self.order = [a for a in memory_order(self.sizes, y) if self.counts[a] != 1 or a in read]
        while self.order and self.lies_anywhere(self.order[-1], read):
            self.order.pop()
        self.copied = not _dense_inside(self.sizes, x, self.order)
        self.x, self.y = (y if self.copied else x), y

    def count_unknown(self, told: frozenset[int]) -> None:
        """What axes count as, of which a cut may know no more than the layout of one set."""
        for axis, name in enumerate(self.source.axes.names):
            if axis in told or name.isdigit():
                continue
            labels = [label for label in self.sets.labels if axis in label.axes]
            if self.sets.steps[axis]:
                self.counts[axis] = KEPT if axis else SAMPLES
                self.unknown.add(axis)
            elif labels:
                self.counts[axis] = LABELLED if all(len(label.axes) == 1 for label in labels) else MEMBERS
            elif self.mask is not None and self.mask.steps[axis]:
                self.counts[axis] = MEMBERS

    def lies_anywhere(self, axis: int, read: set[int]) -> bool:
        """Whether an innermost axis is a kept one of size 1, of which strides say nothing."""
        return self.sizes[axis] == 1 and bool(self.sets.steps[axis]) and axis not in read

    @property
    def operands(self) -> list[_Operand]:
        return [operand for operand in (self.sets, self.mask, self.params) if operand is not None]

    def best(self) -> Form:
        inner = len(self.order)
        expected = 1
        while inner and self.contiguous(self.order[inner - 1], expected):
            inner -= 1
            expected *= self.sizes[self.order[inner]]
        places = range(inner, max(inner + 1, len(self.order)))
        return self.form(min(places, key=lambda place: (self.cost(place), place)))

    def contiguous(self, axis: int, step: int) -> bool:
        return self.sizes[axis] == 1 or self.x[axis] == step == self.y[axis]

    def size(self, axes: Iterable[int]) -> int:
        return math.prod(self.sizes[axis] for axis in axes)

    def count(self, axes: Iterable[int]) -> int:
        return math.prod(self.counts[axis] for axis in axes)

    def cost(self, place: int) -> float:
        """Work per element, beside the passes over x that all cuts share. It reads counts, and no size."""
        rows, columns = self.order[:place], self.order[place:]
        width, total = max(1, self.count(columns)), max(1, self.count(self.order))
        share, run, kind = self.share(rows, columns), self.run(self.sets, columns), self.kind(self.sets, columns)
        if kind == "table" and 0 in columns and 0 in self.unknown:
            return math.inf  # how samples lie beside each other is not the layout of a set
        by_column = kind == "each" or (kind == "table" and run < (SHORT if share < MANY else SPLIT))
        work = (TILED if by_column else ROW) / width + RANGE / (width * share)
        if kind == "table":
            work += RUN / run if not by_column else SCATTER if share < MANY else FOLD / share
        for operand in self.operands:
            kind = self.kind(operand, columns)
            if kind == "table":
                blocks = self.blocks(operand, rows, columns)
                labelled = any(set(label.axes) & set(columns) for label in operand.labels)
                work += (LABEL if labelled else ENTRY) * self.count(blocks) * width / total + BLOCK * len(blocks)
                if operand is self.mask:
                    work += ENTRY
                elif operand is self.params and by_column:
                    work += ENTRY * max(0.1, 1 / share)
                elif operand is self.params:
                    own = self.run(operand, columns)
                    work += RUN / own + SPREAD if own >= LONG else LOOKUP
            if kind != "one" and operand is not self.mask:
                work += LINES * (self.count(axis for axis in columns if axis not in self.unknown) > WIDE)
        return work

    def share(self, rows: Sequence[int], columns: Sequence[int]) -> int:
        """Rows of a range that have the same sets along the columns."""
        blocks = self.blocks(self.sets, rows, columns)
        consumed = [axis for axis in self.consumed(rows, columns) if axis not in blocks]
        labels = [label for label in self.sets.labels if not set(label.axes) & set(columns)]
        groups = self.count(axis for axis in consumed if self.sets.steps[axis]) * GROUPS ** len(labels)
        pooled = [axis for axis in rows if not (axis in consumed or axis in blocks or self.sets.steps[axis])]
        members: int = self.count(consumed) // max(1, groups)
        return self.count(pooled) * max(1, members)

    def shared(self, within: Sequence[int]) -> bool:
        """Whether no axis of the rows of a range leads to other parameters."""
        if self.params is None:
            return True
        read = {axis for label in self.params.labels for axis in label.axes}
        return not any(axis in read or self.params.steps[axis] for axis in within if self.counts[axis] != 1)

    def chunk(self, columns: Sequence[int]) -> int:
        kind = self.kind(self.sets, columns)
        if kind == "one":
            return 0
        if kind == "each":
            return ROWS_OF_EACH
        return min(ROWS, max(64, CHUNK // self.run(self.sets, columns) // 64 * 64))

    def run(self, operand: _Operand, columns: Sequence[int]) -> int:
        """Columns that follow one another and for which the operand is one."""
        run = 1
        for axis in reversed(columns):
            if operand.steps[axis] or any(axis in label.axes for label in operand.labels):
                break
            run *= self.counts[axis]
        return run

    def form(self, place: int) -> Form:
        rows, columns = self.order[:place], self.order[place:]
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
            few=self.share(rows, columns) < MANY,
            apart=0 in columns and any(0 in label.axes for label in self.sets.labels),
            shared=self.shared([*inner, *consumed]),
            chunk=self.chunk(columns),
            injective=self.params is not None and all(self.params.steps[axis] for axis in within),
            copied=self.copied,
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

    def kind(self, operand: _Operand, columns: Sequence[int]) -> Kind:
        if any(set(label.axes) & set(columns) for label in operand.labels):
            return "table"
        real = [axis for axis in columns if self.counts[axis] != 1]
        if not any(operand.steps[axis] for axis in real):
            return "one"
        counted = operand.counted(self.counts)
        straight = [counted[axis] for axis in real] == strides_of([self.counts[axis] for axis in real])
        return "each" if straight else "table"

    def column(self, operand: _Operand, columns: list[int], blocks: list[int]) -> Column:
        kind = self.kind(operand, columns)
        if kind != "table" or (operand is self.mask and not self.masked):
            return Column(kind)
        table, _, _ = self.table(operand, columns, blocks, compact=False)
        return Column(kind, table)

    def set_column(self, columns: list[int], blocks: list[int]) -> Column:
        kind = self.kind(self.sets, columns)
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


def _dense_inside(sizes: Sequence[int], strides: Sequence[int], order: Sequence[int]) -> bool:
    real = [axis for axis in order if sizes[axis] != 1]
    return not real or (strides[real[-1]] == 1 and all(strides[axis] != 0 for axis in real))


def memory_order(sizes: Iterable[int], strides: Iterable[int]) -> list[int]:
    """The axes from the outermost in memory to the innermost, as `torch.empty_like` keeps them."""
    shape = list(zip(sizes, strides, strict=True))
    if any(stride == 0 and size > 1 for size, stride in shape):  # expanded: copies are contiguous
        return list(range(len(shape)))
    return sorted(range(len(shape)), key=lambda axis: -shape[axis][1])

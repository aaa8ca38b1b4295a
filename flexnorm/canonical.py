"""Rows and columns: the one form in which a kernel sees every tensor under every pattern.

The axes of x, in the order of the memory, are cut once: the outer ones are flattened to rows, the inner, contiguous
ones to columns. Then, with small tables that are never expanded to the size of x,

    set(r, k)    = set.row[r]    + set.column[set.block[r], k]
    param(r, k)  = param.row[r]  + param.column[param.block[r], k]
    weight(r, k) = weight.row[r] * weight.column[weight.block[r], k]

A part that depends on rows alone, or on columns alone, lies in the row or the column table; what depends on both, as
`region[n h w]` does or the mask of `"b (g c) t, b t -> b g"`, has a column table for each *block* of rows that share
it. Rows fall into closed ranges, which share no set with any other range.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .partition import Partition
from .sets import Sets

Term = tuple[tuple[int, ...], Tensor]  # a tensor over some axes (ascending)


@dataclass(frozen=True, eq=False)
class Table:
    """A number for every element: `combine(row[r], column[block[r], k])`; a part that is None says nothing."""

    row: Tensor | None  # [rows]
    column: Tensor | None  # [blocks, columns]
    block: Tensor | None  # [rows], None where there is one block

    def expand(self, rows: int, columns: int, combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """The whole table, [rows, columns]: for tests and pictures, no kernel does this."""
        whole = None if self.row is None else self.row[:, None].expand(rows, columns)
        if self.column is not None:
            column = self.column.expand(rows, columns) if self.block is None else self.column[self.block]
            whole = column if whole is None else combine(whole, column)
        return torch.zeros(rows, columns, dtype=torch.int64) if whole is None else whole


@dataclass(frozen=True)
class Cut:
    """Where the axes of x are cut into rows and columns.

    Attributes:
        rows, columns: the axes (places of the elementary view) in the order of the memory.
        copied: no axis of x has stride 1, or x overlaps itself: a kernel needs one contiguous copy.
    """

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    copied: bool

    @property
    def shape(self) -> tuple[int, int]:
        return self._size(self.rows), self._size(self.columns)

    def _size(self, axes: Iterable[int]) -> int:
        return math.prod(self.sizes[axis] for axis in axes)

    def row_offsets(self) -> Tensor:
        """Where every row begins in the storage of x, in elements: [rows]."""
        offsets = torch.zeros((), dtype=torch.int64)
        for axis in self.rows:
            offsets = offsets[..., None] + torch.arange(self.sizes[axis]) * self.strides[axis]
        return offsets.reshape(-1)

    def indices(self, sets: Sets) -> Table:
        """The set, or the parameter, of every element: a number below `sets.count`, counting the internal shape."""
        steps = _steps(sets.internal_shape)
        terms: list[Term] = [((place,), torch.arange(self.sizes[place]) * steps[place]) for place in sorted(sets.kept)]
        for merge in sets.merges:
            ids = merge.ids.reshape([self.sizes[place] for place in merge.places])
            terms.append((merge.places, ids * steps[merge.places[0]]))
        return self._table(terms)

    def weights(self, mask: Sets, values: Tensor) -> Table:
        """The weight of every element, for a mask as the pattern writes it."""
        axes = tuple(sorted(mask.kept))
        return self._table([(axes, mask.inward(values).reshape([self.sizes[axis] for axis in axes]))])

    def _table(self, terms: list[Term]) -> Table:
        """The sum of the terms."""
        blocks = self._blocks(axes for axes, _ in terms)
        row: Tensor | None = None
        column: Tensor | None = None
        for axes, value in terms:
            if set(axes) <= set(self.rows):
                value = self._over(self.rows, axes, value)
                row = value if row is None else row + value
            else:
                value = self._over((*blocks, *self.columns), axes, value)
                column = value if column is None else column + value
        if row is not None:
            row = self._flat(row, self.rows)
        if column is not None:
            column = self._flat(column, (*blocks, *self.columns)).reshape(-1, self.shape[1])
        return Table(row, column, self._block_of_row(blocks))

    def closed_ranges(self, sets: Sets) -> Tensor:
        """Where every closed range of rows begins, and the end of the last: [ranges + 1].

        For an outermost axis that a label consumes alone, rows are to be visited in the order of `visit`.
        """
        if (label := self._outer_label(sets)) is not None:
            return label.offsets * self._size(self.rows[1:])
        outer = 0
        while outer < len(self.rows) and self.rows[outer] in sets.kept:
            outer += 1
        ranges = self._size(self.rows[:outer])
        return torch.arange(ranges + 1) * self._size(self.rows[outer:])

    def visit(self, sets: Sets) -> Tensor | None:
        """The order of rows in which every closed range is one run; None for that of the memory."""
        label = self._outer_label(sets)
        if label is None or label.is_sorted:
            return None
        inner = self._size(self.rows[1:])
        return (label.order[:, None] * inner + torch.arange(inner, device=label.device)).reshape(-1)

    def _outer_label(self, sets: Sets) -> Partition | None:
        """The Partition of the outermost axis, if one label consumes that axis alone."""
        for merge in sets.merges:
            if self.rows and merge.places == self.rows[:1] and len(merge.terms) == 1:
                term = merge.terms[0]
                assert not isinstance(term, int)
                return sets.labels[term.label]
        return None

    def _blocks(self, terms: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
        """The row axes of what depends on rows and columns at once."""
        spanning = {axis for axes in terms if not set(axes) <= set(self.rows) for axis in axes}
        return tuple(axis for axis in self.rows if axis in spanning)

    def _block_of_row(self, block_axes: tuple[int, ...]) -> Tensor | None:
        if not block_axes:
            return None
        steps = dict(zip(block_axes, _steps([self.sizes[a] for a in block_axes]), strict=True))
        block = torch.zeros((), dtype=torch.int64)
        for axis in self.rows:
            block = block[..., None] + torch.arange(self.sizes[axis]) * steps.get(axis, 0)
        return block.reshape(-1)

    def _over(self, wanted: tuple[int, ...], axes: tuple[int, ...], value: Tensor) -> Tensor:
        """A value over `axes` (ascending), as one that broadcasts over the axes `wanted`."""
        present = [axis for axis in wanted if axis in axes]
        value = value.permute([axes.index(axis) for axis in present])
        return value.reshape([self.sizes[axis] if axis in axes else 1 for axis in wanted])

    def _flat(self, value: Tensor, axes: tuple[int, ...]) -> Tensor:
        return value.expand([self.sizes[axis] for axis in axes]).reshape(-1)


def cut(sizes: tuple[int, ...], strides: tuple[int, ...], *operands: Sets | None) -> Cut:
    """Cuts where the tables of these operands (sets, mask, parameters) are smallest; among equals, columns are long."""
    order = memory_order(sizes, strides)
    copied = not _dense_inside(sizes, strides, order)
    if copied:
        strides, order = tuple(_steps(sizes)), list(range(len(sizes)))
    inner = len(order)
    expected = 1
    while inner and (sizes[order[inner - 1]] == 1 or strides[order[inner - 1]] == expected):
        inner -= 1
        expected *= sizes[order[inner]]
    cuts = [
        Cut(sizes, strides, tuple(order[:place]), tuple(order[place:]), copied)
        for place in range(inner, len(order) + (not order))
    ]
    return min(cuts, key=lambda c: _entries(c, operands))


def _entries(c: Cut, operands: Iterable[Sets | None]) -> int:
    """How many numbers the tables of this cut hold."""
    rows, columns = c.shape
    entries = 0
    for sets in operands:
        if sets is None:
            continue
        terms = [(place,) for place in sets.kept] + [merge.places for merge in sets.merges]
        terms = [axes for axes in terms if any(c.sizes[axis] != 1 for axis in axes)]
        inside = [set(axes) <= set(c.rows) for axes in terms]
        blocks = c._size(c._blocks(terms))
        entries += rows * any(inside) + (blocks * columns + rows * (blocks > 1)) * (not all(inside))
    return entries


def _dense_inside(sizes: tuple[int, ...], strides: tuple[int, ...], order: list[int]) -> bool:
    real = [axis for axis in order if sizes[axis] != 1]
    return not real or (strides[real[-1]] == 1 and all(strides[axis] != 0 for axis in real))


def memory_order(sizes: Iterable[int], strides: Iterable[int]) -> list[int]:
    """The axes from the outermost in memory to the innermost, as `torch.empty_like` keeps them."""
    shape = list(zip(sizes, strides, strict=True))
    if any(stride == 0 and size > 1 for size, stride in shape):  # expanded: copies are contiguous
        return list(range(len(shape)))
    return sorted(range(len(shape)), key=lambda axis: -shape[axis][1])


def _steps(sizes: Iterable[int]) -> list[int]:
    """Strides of a contiguous tensor."""
    steps: list[int] = []
    step = 1
    for size in reversed(list(sizes)):
        steps.append(step)
        step *= size
    return steps[::-1]

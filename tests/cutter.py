"""The oracle of the binder: where the axes of x are cut into rows and columns, by loops in Python."""

import math

from flexnorm.canonical import Cut, _Operand, mask_of, memory_order
from flexnorm.sets import strides_of
from flexnorm.spec import Lookup

# A cut decides in which order a set is summed. So it may not read what does not belong to a set: what such an axis
# counts as, whatever its size.
SAMPLES = 4  # the count of the first axis, if it is kept and its size was not told
KEPT = 64  # the count of any other kept axis, if its size was not told
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
BLOCK = 1.0  # to have another table every few rows
LINES = 0.05  # to sum columns whose sums leave the first cache
WIDE = 4096  # so many columns

# As in kernels/cpu/form.h and bind.h.
MANY = 4  # rows that pay for a sum per column
SPLIT = 256  # a run of columns so long is summed by itself, whatever the rows
SHORT = 8  # shorter ones are not, however few rows share their columns
CHUNK = 1 << 16  # elements of a set that are summed before they are merged with the next
ROWS_OF_EACH = 1024  # rows that are, where every column has a set of its own
ROWS = 512  # where runs of columns have, at most


class Operand(_Operand):
    """The same with the steps that axes would have, if they had the sizes that they count as."""

    def __init__(self, sets, steps):
        super().__init__(sets, steps)
        self.inwards = sorted(steps, key=steps.__getitem__, reverse=True)[::-1]  # innermost first

    def counted(self, counts):
        """The steps, if axes had the sizes that they count as."""
        result, step = [0] * len(counts), 1
        for term in self.inwards:
            if isinstance(term, Lookup):
                step *= GROUPS
            else:
                result[term] = step
                step *= counts[term]
        return result


class Cutter:
    """Tries every place between rows and columns, and takes the cheapest."""

    def __init__(self, x, y, sets, mask, params, told):
        self.source, mask = sets, mask_of(sets, mask)
        self.sets = Operand(sets, sets.internal_steps)
        self.mask, self.params = (None if s is None else Operand(s, s.written_steps) for s in (mask, params))
        self.sizes = sets.axes.sizes
        self.counts = list(self.sizes)
        self.unknown = set()  # kept axes, if their sizes were not told
        self.count_unknown(frozenset(told))
        read = {axis for operand in self.operands for label in operand.labels for axis in label.axes}
        self.order = [a for a in memory_order(self.sizes, y) if self.counts[a] != 1 or a in read]
        while self.order and self.lies_anywhere(self.order[-1], read):
            self.order.pop()
        self.copied = not dense_inside(self.sizes, x, self.order)
        self.x, self.y = (y if self.copied else x), y

    def count_unknown(self, told):
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

    def lies_anywhere(self, axis, read):
        """Whether an innermost axis is a kept one of size 1, of which strides say nothing."""
        return self.sizes[axis] == 1 and bool(self.sets.steps[axis]) and axis not in read

    @property
    def operands(self):
        return [operand for operand in (self.sets, self.mask, self.params) if operand is not None]

    def best(self):
        inner = len(self.order)
        expected = 1
        while inner and self.contiguous(self.order[inner - 1], expected):
            inner -= 1
            expected *= self.sizes[self.order[inner]]
        places = range(inner, max(inner + 1, len(self.order)))
        place = min(places, key=lambda place: (self.cost(place), place))
        kinds = ["one" if o is None else self.kind(o, self.order[place:]) for o in (self.sets, self.mask, self.params)]
        return Cut(tuple(self.order), place, tuple(kinds), self.copied)

    def decides(self, cut):
        """What says how a set is summed, beside the kinds: few, apart, shared, by_runs and chunk of form.h."""
        rows, columns = self.order[: cut.place], self.order[cut.place :]
        consumed = self.consumed(rows, columns)
        inner = [axis for axis in rows if not self.sets.steps[axis] and axis not in consumed]
        apart = 0 in columns and any(0 in label.axes for label in self.sets.labels)
        params = self.params
        by_runs = params is not None and self.kind(params, columns) == "table" and self.run(params, columns) >= SHORT
        few, shared = self.share(rows, columns) < MANY, self.shared([*inner, *consumed])
        return few, apart, shared, by_runs, self.chunk(columns)

    def contiguous(self, axis, step):
        return self.sizes[axis] == 1 or self.x[axis] == step == self.y[axis]

    def size(self, axes):
        return math.prod(self.sizes[axis] for axis in axes)

    def count(self, axes):
        return math.prod(self.counts[axis] for axis in axes)

    def cost(self, place):
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
                    work += RUN / own if own >= SHORT else LOOKUP
            if kind != "one" and operand is not self.mask:
                work += LINES * (self.count(axis for axis in columns if axis not in self.unknown) > WIDE)
        return work

    def share(self, rows, columns):
        """Rows of a range that have the same sets along the columns."""
        blocks = self.blocks(self.sets, rows, columns)
        consumed = [axis for axis in self.consumed(rows, columns) if axis not in blocks]
        labels = [label for label in self.sets.labels if not set(label.axes) & set(columns)]
        groups = self.count(axis for axis in consumed if self.sets.steps[axis]) * GROUPS ** len(labels)
        pooled = [axis for axis in rows if not (axis in consumed or axis in blocks or self.sets.steps[axis])]
        members = self.count(consumed) // max(1, groups)
        return self.count(pooled) * max(1, members)

    def shared(self, within):
        """Whether no axis of the rows of a range leads to other parameters."""
        if self.params is None:
            return True
        read = {axis for label in self.params.labels for axis in label.axes}
        return not any(axis in read or self.params.steps[axis] for axis in within if self.counts[axis] != 1)

    def chunk(self, columns):
        kind = self.kind(self.sets, columns)
        if kind == "one":
            return 0
        if kind == "each":
            return ROWS_OF_EACH
        return min(ROWS, max(64, CHUNK // self.run(self.sets, columns) // 64 * 64))

    def run(self, operand, columns):
        """Columns that follow one another and for which the operand is one."""
        run = 1
        for axis in reversed(columns):
            if operand.steps[axis] or any(axis in label.axes for label in operand.labels):
                break
            run *= self.counts[axis]
        return run

    # --- of rows and columns

    def consumed(self, rows, columns):
        """The axes of rows that are visited by the groups of labels, which read rows alone."""
        labels = [label for label in self.sets.labels if not set(label.axes) & set(columns)]
        return [axis for axis in rows if any(axis in label.axes for label in labels)]

    def blocks(self, operand, rows, columns):
        """Axes of rows that are read by labels that read columns too."""
        spanning = {axis for label in operand.labels if set(label.axes) & set(columns) for axis in label.axes}
        return [axis for axis in rows if axis in spanning]

    def kind(self, operand, columns):
        if any(set(label.axes) & set(columns) for label in operand.labels):
            return "table"
        real = [axis for axis in columns if self.counts[axis] != 1]
        if not any(operand.steps[axis] for axis in real):
            return "one"
        counted = operand.counted(self.counts)
        straight = [counted[axis] for axis in real] == strides_of([self.counts[axis] for axis in real])
        return "each" if straight else "table"


def dense_inside(sizes, strides, order):
    real = [axis for axis in order if sizes[axis] != 1]
    return not real or (strides[real[-1]] == 1 and all(strides[axis] != 0 for axis in real))

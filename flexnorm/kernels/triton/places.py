"""Where the elements of a tile lie, and which part of the work a program does.

Every tile has three axes [Q, R, C]: closed ranges, rows of a range, columns. A place is a number of elements from where
a tensor begins; `at` are the eight places that steps along the dims of a walk add up to: in x, y, sets, mask, params,
blocks of the sets' lists, blocks of the params' table, and param_label.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped"
# ruff: noqa: N803, N806

import triton
import triton.language as tl

STEPS = tl.constexpr(9)  # of a dim in `Walk.dims`: its size, and one step for each place


@triton.jit
def walked(at, index, dims, FIRST: tl.constexpr, LAST: tl.constexpr, REST: tl.constexpr):
    """Goes `index` steps along these dims, the last is the innermost; gives the places, and (if REST) what is left."""
    for back in tl.static_range(LAST - FIRST):
        dim = dims + (LAST - 1 - back) * STEPS
        i = index
        if REST or back < LAST - FIRST - 1:
            size = tl.load(dim).to(tl.int32)
            i = index % size
            index = index // size
        i = i.to(tl.int64)
        at = (
            at[0] + i * tl.load(dim + 1),
            at[1] + i * tl.load(dim + 2),
            at[2] + i * tl.load(dim + 3),
            at[3] + i * tl.load(dim + 4),
            at[4] + i * tl.load(dim + 5),
            at[5] + i * tl.load(dim + 6),
            at[6] + i * tl.load(dim + 7),
            at[7] + i * tl.load(dim + 8),
        )
    return at, index


@triton.jit
def range_of(q, open, walk, SHAPE: tl.constexpr):
    """Where range q begins: its places, the column list that it reads, its first element in `order`, and its rows."""
    s = q % walk.sets
    q = q // walk.sets
    group = q // walk.outer
    zero = q.to(tl.int64) * 0
    OUTER: tl.constexpr = SHAPE.outer
    at, _ = walked((zero, zero, zero, zero, zero, zero, zero, zero), q % walk.outer, walk.dims, 0, OUTER, False)
    base = at[2]
    first = zero
    rows = zero + walk.inner
    if walk.offsets is not None:
        first = tl.load(walk.offsets + group, mask=open, other=0)
        rows = (tl.load(walk.offsets + group + 1, mask=open, other=0) - first) * walk.inner
        if walk.group_sets is not None:
            base += tl.load(walk.group_sets + group, mask=open, other=0)
        else:
            base += group.to(tl.int64) * walk.group_step
    if walk.set_offsets is not None:
        base += tl.load(walk.set_offsets + s, mask=open, other=0)
    elif walk.list_offsets is not None:
        base += s.to(tl.int64)
    at = (at[0], at[1], base, at[3], at[4], at[5], at[6], at[7])
    return at, s, first, rows.to(tl.int32)


@triton.jit
def rows_of(at, j, first, inside, walk, SHAPE: tl.constexpr):
    """The places of row j."""
    OUTER: tl.constexpr = SHAPE.outer
    INNER: tl.constexpr = SHAPE.outer + SHAPE.inner
    AXES: tl.constexpr = SHAPE.outer + SHAPE.inner + SHAPE.axes
    at, j = walked(at, j, walk.dims, OUTER, INNER, walk.offsets is not None)
    if walk.offsets is not None:
        member = first + j
        if walk.order is not None:
            member = tl.load(walk.order + member, mask=inside, other=0)
        at, _ = walked(at, member.to(tl.int32), walk.dims, INNER, AXES, False)
    if walk.param_label is not None:
        param = at[4] + tl.load(walk.param_label + at[7], mask=inside, other=0)
        at = (at[0], at[1], at[2], at[3], param, at[5], at[6], at[7])
    return at


@triton.jit
def aligned(t, ALIGNED: tl.constexpr):
    """t, as a visible multiple, so that loads are wide: `tl.multiple_of` is lost where its operand is folded away."""
    return t // ALIGNED * ALIGNED


@triton.jit
def tile_of(at, s, first, rows, open, j, k, walk, SHAPE: tl.constexpr):
    """The elements of a tile [Q, R, C]: their places in x and y, and which there are; then places of mask and params.

    Those are [Q, R, 1] where they are one for all columns.
    """
    ALIGNED: tl.constexpr = SHAPE.aligned
    row = open & (j < rows)
    at = rows_of(at, j, first, row, walk, SHAPE)
    x = aligned(at[0], ALIGNED)
    y = aligned(at[1], ALIGNED)
    if walk.list_offsets is not None:
        start = walk.list_offsets + at[5] * (walk.sets + 1) + s
        begin = aligned(tl.load(start, mask=row, other=0), ALIGNED)
        length = aligned(tl.load(start + 1, mask=row, other=0) - begin, ALIGNED)
        inside = row & (k < length)
        k = begin + k
        if walk.lists is not None:
            k = tl.load(walk.lists + at[5] * walk.columns + k, mask=inside, other=0)
    else:
        inside = row & (k < walk.columns)
    mask = at[3]
    masked = row
    if walk.mask_table is not None:
        mask = mask + tl.load(walk.mask_table + k, mask=inside, other=0)
        masked = inside
    elif SHAPE.mask_each:
        mask = mask + k
        masked = inside
    param = at[4]
    given = row
    if walk.param_table is not None:
        param = param + tl.load(walk.param_table + at[6] * walk.columns + k, mask=inside, other=0)
        given = inside
    elif SHAPE.param_each:
        param = param + k
        given = inside
    return (x + k, y + k, inside), (mask, masked), (param, given)


@triton.jit
def program_of(walk, SHAPE: tl.constexpr, C: tl.constexpr):
    """The number of this program, and of EACH the columns that it does."""
    p = tl.program_id(0)
    column = p * 0
    if SHAPE.each:
        across = tl.cdiv(walk.columns, C)
        column = p % across
        p = p // across
    return p, column


@triton.jit
def item_of(p, walk, items):
    """Of this program: its range, and which part of the tiles of that range it does."""
    rest = walk.outer * walk.sets
    e = p // rest
    if items.groups is not None:
        group = tl.load(items.groups + e)
        part = e - tl.load(items.starts + group)
    else:
        group = e // items.parts
        part = e % items.parts
    return (group * rest + p % rest).to(tl.int32), part.to(tl.int32)


@triton.jit
def slots_of(q, walk, items):
    """Of a range: its partial results are `first` to `last`, in slots that lie `rest` apart from `slot`."""
    rest = walk.outer * walk.sets
    group = q // rest
    if items.groups is not None:
        first = tl.load(items.starts + group).to(tl.int32)
        last = tl.load(items.starts + group + 1).to(tl.int32)
    else:
        first = group * items.parts
        last = first + items.parts
    return first, last, q % rest, rest


@triton.jit
def owner_of(base, p, column, walk, SHAPE: tl.constexpr, FINAL: tl.constexpr, W: tl.constexpr):
    """Where this program writes what it summed: at the set, or in its own slot."""
    k = column * W + tl.arange(0, W)[None, None, :]
    width = walk.columns if SHAPE.each else 1
    if not FINAL:
        base = base * 0 + p.to(tl.int64) * width
    return base + k, k < width

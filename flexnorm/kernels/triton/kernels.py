"""The kernels. Every set, and every slot of a partial result, has one writer; all sums have a fixed order."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped"
# ruff: noqa: N803, N806, RUF059
# A name that begins with _ may not change its type in a loop, so none is used for what is left unused.

import triton
import triton.language as tl

from .places import item_of, owner_of, program_of, range_of, slots_of, tile_of
from .values import (
    activated,
    affine,
    before_affine,
    counted,
    into_x,
    inverse_sigma,
    keep,
    known,
    merged,
    moments_of,
    standardized,
    summed,
    value_of,
)

# x, y, dy, dx: a storage, with the strides of the form. mask, weight, bias, moments, sums: flat, as places count them.
# Partial results: [slots] or, of EACH, [slots, columns].


@triton.jit
def forward_kernel(
    walk,
    x,
    mask,
    weight,
    bias,
    y,  # None: statistics alone
    moments,
    ranges,
    SHAPE: tl.constexpr,
    RULE: tl.constexpr,
    MASK: tl.constexpr,
    Q: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    """Ranges that fit into a tile: x is read once. Grid: ranges / Q, times columns / C if EACH."""
    T: tl.constexpr = moments.m2.dtype.element_ty
    p, column = program_of(walk, SHAPE, C)
    q = p * Q + tl.arange(0, Q)[:, None, None]
    k = column * C + tl.arange(0, C)[None, None, :]
    open = q < ranges
    at, s, first, rows = range_of(q, open, walk, SHAPE)
    j = tl.arange(0, R)[None, :, None]
    here, mask_at, param_at = tile_of(at, s, first, rows, open, j, k, walk, SHAPE)
    member, weights = counted(mask, mask_at, here[2], T, MASK)
    v = value_of(x, here[0], member, T)
    n, mean, low, m2 = moments_of(v, None, None, weights, T, RULE.center, SHAPE.each, MASK)
    place = at[2]
    if SHAPE.each:
        place = place + k
        open = open & (k < walk.columns)
    keep(moments, place, open, n, mean, low, m2)
    if y is not None:
        factor = inverse_sigma(n.to(T), m2, T, RULE)
        xhat = standardized(v, member, mean, low, factor, RULE.center)
        z = activated(affine(xhat, weight, bias, param_at, T), RULE)
        tl.store(y + here[1], tl.where(member, z, 0).to(y.dtype.element_ty), mask=here[2])


@triton.jit
def moments_kernel(
    walk,
    items,
    x,
    mask,
    moments,  # final where every range has one part, partial otherwise
    SHAPE: tl.constexpr,
    RULE: tl.constexpr,
    MASK: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    FINAL: tl.constexpr,
):
    """Moments of a part of a range, tile after tile. Grid: items, times columns / C if EACH."""
    T: tl.constexpr = moments.m2.dtype.element_ty
    p, column = program_of(walk, SHAPE, C)
    q, part = item_of(p, walk, items)
    at, s, first, rows = range_of(q + tl.zeros([1, 1, 1], tl.int32), True, walk, SHAPE)
    across = 1 if SHAPE.each else tl.cdiv(walk.width, C)
    tiles = tl.cdiv(tl.max(rows), R) * across
    W: tl.constexpr = C if SHAPE.each else 1
    mean = tl.zeros([1, 1, W], T)
    low = tl.zeros([1, 1, W], T)
    m2 = tl.zeros([1, 1, W], T)
    n = tl.zeros([1, 1, W], T if MASK == "float" else tl.int64)
    for t in range(part * items.tiles, tl.minimum(part * items.tiles + items.tiles, tiles)):
        j = (t // across) * R + tl.arange(0, R)[None, :, None]
        k = (column if SHAPE.each else t % across) * C + tl.arange(0, C)[None, None, :]
        here, mask_at, param_at = tile_of(at, s, first, rows, True, j, k, walk, SHAPE)
        member, weights = counted(mask, mask_at, here[2], T, MASK)
        v = value_of(x, here[0], member, T)
        more, other, other_low, other_m2 = moments_of(v, None, None, weights, T, RULE.center, SHAPE.each, MASK)
        n, mean, low, m2 = merged(n, mean, low, m2, more, other, other_low, other_m2, T, RULE.center)
    place, open = owner_of(at[2], p, column, walk, SHAPE, FINAL, W)
    keep(moments, place, open, n, mean, low, m2)


@triton.jit
def merge_kernel(
    walk,
    items,
    partial,
    moments,
    SHAPE: tl.constexpr,
    RULE: tl.constexpr,
    MASK: tl.constexpr,
    B: tl.constexpr,
    C: tl.constexpr,
):
    """Moments of every range from those of its parts, B at a time. Grid: ranges, times columns / C if EACH."""
    T: tl.constexpr = moments.m2.dtype.element_ty
    q, column = program_of(walk, SHAPE, C)
    at, _, _, _ = range_of(q + tl.zeros([1, 1, 1], tl.int32), True, walk, SHAPE)
    first, last, slot, rest = slots_of(q, walk, items)
    k = column * C + tl.arange(0, C)[None, None, :]
    width = walk.columns if SHAPE.each else 1
    W: tl.constexpr = C if SHAPE.each else 1
    mean = tl.zeros([1, 1, W], T)
    low = tl.zeros([1, 1, W], T)
    m2 = tl.zeros([1, 1, W], T)
    n = tl.zeros([1, 1, W], T if MASK == "float" else tl.int64)
    for begin in range(first, last, B):
        e = begin + tl.arange(0, B)[None, :, None]
        inside = (e < last) & (k < width)
        place = (e.to(tl.int64) * rest + slot) * width + k
        weights = tl.load(partial.n + place, mask=inside, other=0)
        parts_m2 = tl.load(partial.m2 + place, mask=inside, other=0)
        parts = parts_m2
        parts_low = parts_m2
        if RULE.center:
            parts = tl.load(partial.mean + place, mask=inside, other=0)
            parts_low = tl.load(partial.low + place, mask=inside, other=0)
        more, other, other_low, other_m2 = moments_of(
            parts, parts_low, parts_m2, weights, T, RULE.center, SHAPE.each, MASK
        )
        n, mean, low, m2 = merged(n, mean, low, m2, more, other, other_low, other_m2, T, RULE.center)
    place, open = owner_of(at[2], 0, column, walk, SHAPE, True, W)
    keep(moments, place, open, n, mean, low, m2)


@triton.jit
def apply_kernel(
    walk,
    items,
    x,
    mask,
    weight,
    bias,
    y,
    moments,
    SHAPE: tl.constexpr,
    RULE: tl.constexpr,
    MASK: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    """y of a part of a range. Grid: items, times columns / C if EACH."""
    T: tl.constexpr = moments.m2.dtype.element_ty
    p, column = program_of(walk, SHAPE, C)
    q, part = item_of(p, walk, items)
    at, s, first, rows = range_of(q + tl.zeros([1, 1, 1], tl.int32), True, walk, SHAPE)
    across = 1 if SHAPE.each else tl.cdiv(walk.width, C)
    tiles = tl.cdiv(tl.max(rows), R) * across
    W: tl.constexpr = C if SHAPE.each else 1
    place, open = owner_of(at[2], 0, column, walk, SHAPE, True, W)
    n, mean, low, factor, share = known(moments, (place, open), T, RULE)
    for t in range(part * items.tiles, tl.minimum(part * items.tiles + items.tiles, tiles)):
        j = (t // across) * R + tl.arange(0, R)[None, :, None]
        k = (column if SHAPE.each else t % across) * C + tl.arange(0, C)[None, None, :]
        here, mask_at, param_at = tile_of(at, s, first, rows, True, j, k, walk, SHAPE)
        member, weights = counted(mask, mask_at, here[2], T, MASK)
        xhat = standardized(value_of(x, here[0], member, T), member, mean, low, factor, RULE.center)
        z = activated(affine(xhat, weight, bias, param_at, T), RULE)
        tl.store(y + here[1], tl.where(member, z, 0).to(y.dtype.element_ty), mask=here[2])


@triton.jit
def backward_kernel(
    walk,
    x,
    dy,
    mask,
    weight,
    bias,
    dx,
    moments,
    sums,  # None: not asked for
    ranges,
    SHAPE: tl.constexpr,
    RULE: tl.constexpr,
    MASK: tl.constexpr,
    Q: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    """dx of ranges that fit into a tile: x and dy are read once. Grid: ranges / Q, times columns / C if EACH."""
    T: tl.constexpr = moments.m2.dtype.element_ty
    p, column = program_of(walk, SHAPE, C)
    q = p * Q + tl.arange(0, Q)[:, None, None]
    k = column * C + tl.arange(0, C)[None, None, :]
    open = q < ranges
    at, s, first, rows = range_of(q, open, walk, SHAPE)
    j = tl.arange(0, R)[None, :, None]
    here, mask_at, param_at = tile_of(at, s, first, rows, open, j, k, walk, SHAPE)
    place = at[2]
    if SHAPE.each:
        place = place + k
        open = open & (k < walk.columns)
    n, mean, low, factor, _ = known(moments, (place, open), T, RULE)
    member, weights = counted(mask, mask_at, here[2], T, MASK)
    xhat = standardized(value_of(x, here[0], member, T), member, mean, low, factor, RULE.center)
    _, g = before_affine(xhat, value_of(dy, here[1], member, T), weight, bias, param_at, T, RULE)
    sum_g = summed(g, SHAPE.each)
    sum_gx = summed(g * xhat, SHAPE.each)
    if sums is not None:
        tl.store(sums.grad + place, sum_g, mask=open)
        tl.store(sums.grad_xhat + place, sum_gx, mask=open)
    g = into_x(g, xhat, weights, n, sum_g, sum_gx, MASK, RULE) * factor
    tl.store(dx + here[1], tl.where(member, g, 0).to(dx.dtype.element_ty), mask=here[2])


@triton.jit
def sums_kernel(
    walk,  # of the owners: what the sums are over
    items,
    x,
    dy,
    mask,
    weight,
    bias,
    moments,  # OWNERS "sets": as the walk counts them; otherwise as the sets are written, which are its params
    given,  # OWNERS "mask": the sums over the sets
    sums,  # final where every range has one part, partial otherwise
    SHAPE: tl.constexpr,
    RULE: tl.constexpr,
    MASK: tl.constexpr,
    OWNERS: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    FINAL: tl.constexpr,
):
    """What backward sums over sets (g, g * xhat), parameters (dz, dz * xhat) or weights of the mask (its gradient).

    Grid: items, times columns / C if EACH.
    """
    T: tl.constexpr = moments.m2.dtype.element_ty
    p, column = program_of(walk, SHAPE, C)
    q, part = item_of(p, walk, items)
    at, s, first, rows = range_of(q + tl.zeros([1, 1, 1], tl.int32), True, walk, SHAPE)
    across = 1 if SHAPE.each else tl.cdiv(walk.width, C)
    tiles = tl.cdiv(tl.max(rows), R) * across
    W: tl.constexpr = C if SHAPE.each else 1
    owner, open = owner_of(at[2], p, column, walk, SHAPE, True, W)
    one = tl.zeros([1, 1, W], T)
    two = tl.zeros([1, 1, W], T)
    for t in range(part * items.tiles, tl.minimum(part * items.tiles + items.tiles, tiles)):
        j = (t // across) * R + tl.arange(0, R)[None, :, None]
        k = (column if SHAPE.each else t % across) * C + tl.arange(0, C)[None, None, :]
        here, mask_at, param_at = tile_of(at, s, first, rows, True, j, k, walk, SHAPE)
        set_at = param_at
        weight_at = (owner, open)
        if OWNERS == "sets":
            set_at = (owner, open)
            weight_at = param_at
        n, mean, low, factor, share = known(moments, set_at, T, RULE)
        member, weights = counted(mask, mask_at, here[2], T, MASK)
        xhat = standardized(value_of(x, here[0], member, T), member, mean, low, factor, RULE.center)
        if OWNERS == "mask":
            dw = xhat * 0
            if RULE.center:
                dw += xhat * (tl.load(given.grad + set_at[0], mask=set_at[1], other=0) / n)
            if RULE.scale:
                mean_gx = tl.load(given.grad_xhat + set_at[0], mask=set_at[1], other=0) / n
                dw += 0.5 * (xhat * xhat - share) * mean_gx
            one -= summed(tl.where(member, dw, 0), SHAPE.each)
        else:
            dz, g = before_affine(xhat, value_of(dy, here[1], member, T), weight, bias, weight_at, T, RULE)
            if OWNERS == "sets":
                dz = g
            one += summed(dz, SHAPE.each)
            two += summed(dz * xhat, SHAPE.each)
    place, open = owner_of(at[2], p, column, walk, SHAPE, FINAL, W)
    tl.store(sums.grad + place, one, mask=open)
    if OWNERS != "mask":
        tl.store(sums.grad_xhat + place, two, mask=open)


@triton.jit
def add_kernel(
    walk,
    items,
    partial,
    sums,
    SHAPE: tl.constexpr,
    B: tl.constexpr,
    C: tl.constexpr,
):
    """Sums of every range from those of its parts, B at a time. Grid: ranges, times columns / C if EACH."""
    T: tl.constexpr = sums.grad.dtype.element_ty
    q, column = program_of(walk, SHAPE, C)
    at, _, _, _ = range_of(q + tl.zeros([1, 1, 1], tl.int32), True, walk, SHAPE)
    first, last, slot, rest = slots_of(q, walk, items)
    k = column * C + tl.arange(0, C)[None, None, :]
    width = walk.columns if SHAPE.each else 1
    W: tl.constexpr = C if SHAPE.each else 1
    one = tl.zeros([1, 1, W], T)
    two = tl.zeros([1, 1, W], T)
    for begin in range(first, last, B):
        e = begin + tl.arange(0, B)[None, :, None]
        inside = (e < last) & (k < width)
        place = (e.to(tl.int64) * rest + slot) * width + k
        one += summed(tl.load(partial.grad + place, mask=inside, other=0), SHAPE.each)
        if sums.grad_xhat is not None:
            two += summed(tl.load(partial.grad_xhat + place, mask=inside, other=0), SHAPE.each)
    place, open = owner_of(at[2], 0, column, walk, SHAPE, True, W)
    tl.store(sums.grad + place, one, mask=open)
    if sums.grad_xhat is not None:
        tl.store(sums.grad_xhat + place, two, mask=open)


@triton.jit
def dx_kernel(
    walk,
    items,
    x,
    dy,
    mask,
    weight,
    bias,
    dx,
    moments,
    sums,  # None: the moments do not depend on x
    SHAPE: tl.constexpr,
    RULE: tl.constexpr,
    MASK: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    """dx of a part of a range. Grid: items, times columns / C if EACH."""
    T: tl.constexpr = moments.m2.dtype.element_ty
    p, column = program_of(walk, SHAPE, C)
    q, part = item_of(p, walk, items)
    at, s, first, rows = range_of(q + tl.zeros([1, 1, 1], tl.int32), True, walk, SHAPE)
    across = 1 if SHAPE.each else tl.cdiv(walk.width, C)
    tiles = tl.cdiv(tl.max(rows), R) * across
    W: tl.constexpr = C if SHAPE.each else 1
    place, open = owner_of(at[2], 0, column, walk, SHAPE, True, W)
    n, mean, low, factor, share = known(moments, (place, open), T, RULE)
    sum_g = n * 0
    sum_gx = n * 0
    if sums is not None:
        sum_g = tl.load(sums.grad + place, mask=open, other=0)
        sum_gx = tl.load(sums.grad_xhat + place, mask=open, other=0)
    for t in range(part * items.tiles, tl.minimum(part * items.tiles + items.tiles, tiles)):
        j = (t // across) * R + tl.arange(0, R)[None, :, None]
        k = (column if SHAPE.each else t % across) * C + tl.arange(0, C)[None, None, :]
        here, mask_at, param_at = tile_of(at, s, first, rows, True, j, k, walk, SHAPE)
        member, weights = counted(mask, mask_at, here[2], T, MASK)
        xhat = standardized(value_of(x, here[0], member, T), member, mean, low, factor, RULE.center)
        dz, g = before_affine(xhat, value_of(dy, here[1], member, T), weight, bias, param_at, T, RULE)
        if sums is not None:
            g = into_x(g, xhat, weights, n, sum_g, sum_gx, MASK, RULE)
        tl.store(dx + here[1], tl.where(member, g * factor, 0).to(dx.dtype.element_ty), mask=here[2])

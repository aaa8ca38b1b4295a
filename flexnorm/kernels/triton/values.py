"""The formulas, on tiles [Q, R, C].

Sums run over C and R, or over R alone where every column is a set of its own (`EACH`); what belongs to a set has then
the shape [Q, 1, 1] or [Q, 1, C]. What is masked is replaced before any arithmetic.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped"
# ruff: noqa: N803, N806, SIM300

import triton
import triton.language as tl


@triton.jit
def counted(mask, at, inside, T: tl.constexpr, MASK: tl.constexpr):
    """Which elements are members, and how much they weigh."""
    if MASK == "bool":
        inside = inside & (tl.load(mask + at[0], mask=at[1], other=0) != 0)
    weights = tl.full(inside.shape, 1, T)
    if MASK == "float":
        weights = tl.load(mask + at[0], mask=at[1], other=0).to(T)
    return inside, tl.where(inside, weights, 0)


@triton.jit
def value_of(x, place, inside, T: tl.constexpr):
    return tl.where(inside, tl.load(x + place, mask=inside, other=0).to(T), 0)


@triton.jit
def summed(t, EACH: tl.constexpr):
    if not EACH:
        t = tl.sum(t, 2, keep_dims=True)
    return tl.sum(t, 1, keep_dims=True)


@triton.jit
def largest(t, EACH: tl.constexpr):
    if not EACH:
        t = tl.max(t, 2, keep_dims=True)
    return tl.max(t, 1, keep_dims=True)


@triton.jit
def weighed(t, weights, T: tl.constexpr, WEIGHTED: tl.constexpr):
    """t times its weight; 0 where that is 0, whatever t."""
    there = weights > 0
    if WEIGHTED:
        t = weights.to(T) * t
    return tl.where(there, t, 0)


@triton.jit
def moments_of(mean, low, m2, weights, T: tl.constexpr, CENTER: tl.constexpr, EACH: tl.constexpr, MASK: tl.constexpr):
    """n, mean, low and m2 of the parts of a tile: of elements (low and m2 None), or of what has moments itself.

    In two shifts, as `statistics.pool`: by the largest element, then by the mean that this gave. n is in the dtype of
    the weights: T counts the elements of a tile exactly.
    """
    WEIGHTED: tl.constexpr = MASK == "float" or m2 is not None
    # What does not depend on the values may be summed up in another layout than theirs, in which every thread holds the
    # whole tile (compiling then takes minutes). So the count depends on them, which is seen through only later.
    there = (weights > 0) & ((mean == mean) | (mean != mean))
    weights = tl.where(there, weights, 0)
    n = summed(weights, EACH)
    high = n.to(T) * 0
    rest = high
    if CENTER:
        filled = n > 0
        divisor = tl.where(filled, n.to(T), 1)
        shift = tl.where(filled, largest(tl.where(there & (mean == mean), mean, float("-inf")), EACH), 0)
        high = shift + summed(weighed(mean - shift, weights, T, WEIGHTED), EACH) / divisor
        deviation = mean - high
        if low is not None:
            deviation += low
        rest = summed(weighed(deviation, weights, T, WEIGHTED), EACH) / divisor
        deviation = deviation - rest
        total = weighed(deviation, weights, T, WEIGHTED) * deviation
    elif m2 is None:
        total = weighed(mean, weights, T, WEIGHTED) * mean
    else:
        total = tl.zeros_like(m2)
    total = tl.where(there, total, 0)  # as inf * 0 is not
    if m2 is not None:
        total += tl.where(there, m2, 0)
    rounded = high + rest
    return n, rounded, (high - rounded) + rest, summed(total, EACH)


@triton.jit
def merged(n, mean, low, m2, more, other, other_low, other_m2, T: tl.constexpr, CENTER: tl.constexpr):
    """Two sets made one (Chan, Golub, LeVeque 1979); the mean to twice the precision."""
    more = more.to(n.dtype)
    total = n + more
    if CENTER:
        share = more.to(T) / tl.where(total > 0, total.to(T), 1)
        delta = (other - mean) + (other_low - low)
        step = low + delta * share
        rounded = mean + step
        moved = rounded - mean
        rest = (mean - (rounded - moved)) + (step - moved)  # what rounding took away, exactly
        m2 = m2 + (other_m2 + delta * delta * (n.to(T) * share))
        first = n == 0  # nothing to add to: the other, with all its digits
        mean = tl.where(first, other, rounded)
        low = tl.where(first, other_low, rest)
        m2 = tl.where(first, other_m2, m2)
    else:
        m2 += other_m2
    return total, mean, low, m2


@triton.jit
def keep(moments, place, inside, n, mean, low, m2):
    """Writes moments at a place; the mean where it is asked for."""
    tl.store(moments.n + place, n.to(moments.n.dtype.element_ty), mask=inside)
    tl.store(moments.m2 + place, m2, mask=inside)
    if moments.mean is not None:
        tl.store(moments.mean + place, mean, mask=inside)
        tl.store(moments.low + place, low, mask=inside)


@triton.jit
def inverse_sigma(n, m2, T: tl.constexpr, RULE: tl.constexpr):
    """1 / sqrt(var + eps), 1 without scale; 0 of an empty set or where var + eps is 0."""
    factor = (n > 0).to(T)
    if RULE.scale:
        v = m2 / tl.where(n > 0, n, 1) + RULE.eps
        usable = (n > 0) & (v != 0)
        v = tl.where(usable, v, 1)
        if T == tl.float64:
            factor = tl.where(usable, 1 / tl.sqrt(v), 0)
        else:
            factor = tl.where(usable, tl.div_rn(v * 0 + 1, tl.sqrt_rn(v)), 0)
    return factor


@triton.jit
def known(moments, at, T: tl.constexpr, RULE: tl.constexpr):
    """Of the sets at these places: the divisor, mean, low, 1 / sigma, and var / sigma^2."""
    n = tl.load(moments.n + at[0], mask=at[1], other=0).to(T)
    m2 = tl.load(moments.m2 + at[0], mask=at[1], other=0)
    mean = m2 * 0
    low = mean
    if RULE.center:
        mean = tl.load(moments.mean + at[0], mask=at[1], other=0)
        if moments.low is not None:
            low = tl.load(moments.low + at[0], mask=at[1], other=0)
    factor = inverse_sigma(n, m2, T, RULE)
    divisor = tl.where(n > 0, n, 1)
    return divisor, mean, low, factor, m2 / divisor * factor * factor


@triton.jit
def standardized(v, member, mean, low, factor, CENTER: tl.constexpr):
    """xhat, 0 outside."""
    if CENTER:
        v = tl.where(member, (v - mean) - low, 0)
    return v * factor


@triton.jit
def affine(xhat, weight, bias, at, T: tl.constexpr):
    if weight is not None:
        xhat = xhat * tl.load(weight + at[0], mask=at[1], other=0).to(T)
    if bias is not None:
        xhat = xhat + tl.load(bias + at[0], mask=at[1], other=0).to(T)
    return xhat


@triton.jit
def activated(z, RULE: tl.constexpr):
    if RULE.activation == "relu":
        z = tl.where(z < 0, 0, z)  # NaN stays
    elif RULE.activation == "silu":
        z = z / (1 + tl.exp(-z))
    elif RULE.activation == "gelu":
        z = 0.5 * z * (1 + tl.erf(z * 0.7071067811865476))
    return z


@triton.jit
def through_activation(z, dy, RULE: tl.constexpr):
    """The gradient before the activation."""
    if RULE.activation == "relu":
        dy = tl.where(z <= 0, 0, dy)
    elif RULE.activation == "silu":
        s = 1 / (1 + tl.exp(-z))
        dy = dy * s * (1 + z * (1 - s))
    elif RULE.activation == "gelu":
        density = tl.exp(-0.5 * z * z) * 0.3989422804014327
        dy = dy * (0.5 * (1 + tl.erf(z * 0.7071067811865476)) + z * density)
    return dy


@triton.jit
def before_affine(xhat, dy, weight, bias, at, T: tl.constexpr, RULE: tl.constexpr):
    """The gradient before the activation, and the one before weight and bias."""
    if RULE.activation is not None:
        dy = through_activation(affine(xhat, weight, bias, at, T), dy, RULE)
    g = dy
    if weight is not None:
        g = dy * tl.load(weight + at[0], mask=at[1], other=0).to(T)
    return dy, g


@triton.jit
def into_x(g, xhat, weights, n, sum_g, sum_gx, MASK: tl.constexpr, RULE: tl.constexpr):
    """g, less what goes through mean and variance."""
    if RULE.center or RULE.scale:
        through = xhat * 0
        if RULE.center:
            through += sum_g / n
        if RULE.scale:
            through += xhat * (sum_gx / n)
        if MASK == "float":
            through = through * weights
        g = g - through
    return g

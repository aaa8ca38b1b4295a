"""How far a room may be from the composition in float64, element by element: design 4.4, and what follows of it.

    |error of xhat| <= 4 eps (|mean| / sigma + |xhat|) + 8 eps                                (1e-6 is 8 eps of float32)

Every other bound is that one carried through the formula of the result: an error of an input times the derivative, and
a few roundings (FEW) of every term that is added. eps is that of the dtype of statistics; results in half precision are
rounded once more. Quantities that have a bound are pairs (value, error).
"""

from dataclasses import dataclass

import torch

from flexnorm.kernels import Operands, Recipe, aten, stat_dtype
from flexnorm.statistics import Moments, divisor

FEW = 8
STEEP = {None: 0.0, "relu": 0.0, "silu": 0.5, "gelu": 0.8}  # the largest second derivative
SLOPE = {None: 1.0, "relu": 1.0, "silu": 1.1, "gelu": 1.13}  # and the largest first one


@dataclass(frozen=True, eq=False)
class Expected:
    """The composition's results in float64, each with a bound."""

    y: tuple
    dx: tuple
    dmask: tuple | None
    dweight: tuple | None
    dbias: tuple | None
    moments: Moments
    spread: torch.Tensor  # of x about the mean of every set, at most
    terms: dict  # of y and dx: the largest sum of the terms that are added, without their signs


def widened(operands: Operands) -> Operands:
    """The same numbers in float64."""
    return Operands(*(t if t is None or t.dtype == torch.bool else t.double() for t in operands))


def rounded(value, dtype):
    """The error of rounding to a dtype: half a unit in the last place, that of the subnormals at least."""
    info = torch.finfo(dtype)
    return value.abs() * info.eps / 2 + info.smallest_normal * info.eps / 2


def expected(recipe: Recipe, operands: Operands, dy: torch.Tensor, wide: Recipe) -> Expected:
    """`wide` is the recipe of the same problem in float64."""
    x = operands.x
    eps = torch.finfo(stat_dtype(x.dtype)).eps * (2 if x.dtype == torch.float64 else 1)  # aten is no better then
    # The composition sums labels one after another, and kernels the weights of rows.
    naive = x.numel() * torch.finfo(torch.float64).eps
    few = FEW * eps + naive
    given, dy = widened(operands), dy.double()
    sets, params, mask = wide.sets, wide.params, wide.mask
    m = aten.statistics(wide, given)
    factor = sets.spread(aten.inverse_sigma(wide, m))
    xhat, dz, g = aten._backward_values(wide, given, m, dy)
    weights = aten._counts(wide, given, torch.float64)
    weights = torch.ones(()) if weights is None else weights.double()

    # xhat, z, y
    ratio = sets.spread(m.mean).abs() * factor if wide.center else torch.zeros(())
    e = (4 * (ratio + xhat.abs()) + 8) * eps + naive * sets.spread(sets.max(xhat.abs().expand(sets.axes.sizes)))
    most = xhat.abs() + e
    w = torch.ones(()) if given.weight is None else aten._spread_param(wide, given.weight, torch.float64).abs()
    b = torch.zeros(()) if given.bias is None else aten._spread_param(wide, given.bias, torch.float64).abs()
    z = aten._affine(wide, given, xhat)
    ez = w * e + FEW * eps * (most * w + b)
    ey = SLOPE[wide.activation] * ez + (FEW * eps * z.abs() if wide.activation else 0)
    y = aten.apply(wide, given, m)

    # dz, g
    slope = dy.reshape(sets.axes.sizes).abs() * SLOPE[wide.activation]
    edz = torch.zeros_like(xhat)
    if wide.activation is not None:
        edz = slope * (STEEP[wide.activation] * ez + eps * (FEW + z.abs().clamp(max=20)))
    if wide.activation == "relu":
        edz = edz + slope * (z.abs() <= ez)  # on the edge
    if recipe.membership:
        edz = edz * aten._counts(wide, given, torch.float64)
    eg = w * edz + FEW * eps * g.abs()

    # dx = (g - weight * (c1 + xhat * c2)) * r
    def mean(t):
        return sets.spread(sets.sum(t) / divisor(m.count))

    c1, ec1 = mean(g).abs() * wide.center, mean(eg + few * g.abs()) * wide.center
    c2 = mean(g * xhat).abs() * wide.scale
    ec2 = mean(eg * most + (g.abs() + eg) * e + few * g.abs() * most) * wide.scale
    through = ec1 + most * ec2 + e * c2 + FEW * eps * (c1 + most * c2)
    scale = 1.0 if recipe.membership else weights
    grads = aten.backward(wide, given, (m.count, m.mean, m.m2, *(() if m.low is None else (m.low,))), dy)
    edx = (factor * (eg + scale * through + few * (g.abs() + scale * (c1 + most * c2)))).expand(sets.axes.sizes)

    dmask = None
    if mask is not None and not recipe.membership:
        v = sets.spread(m.var) * factor * factor
        each = e * c1 + most * (ec1 + e * c2) + (most * most + v) * ec2
        each = each + few * (most * c1 + (most * most + v) * c2)
        dmask = _given(grads.mask, mask.outward(mask.sum(each.expand(sets.axes.sizes))), operands.mask)
    dweight = dbias = None
    if operands.weight is not None:
        each = edz * most + (dz.abs() + edz) * e + few * dz.abs() * most
        dweight = _given(grads.weight, params.outward(params.sum(each)), operands.weight)
    if operands.bias is not None:
        dbias = _given(grads.bias, params.outward(params.sum(edz + few * dz.abs())), operands.bias)
    values = aten._values(wide, given, given.x)
    away = (values - sets.spread(m.mean) if wide.center else values).abs()
    spread = sets.max((away * (weights > 0)).expand(sets.axes.sizes)).clamp(min=0)  # of an empty set, 0
    return Expected(
        y=_given(y, ey.expand(sets.axes.sizes).reshape(x.shape), x),
        dx=_given(grads.x, edx.reshape(x.shape), x),
        dmask=dmask,
        dweight=dweight,
        dbias=dbias,
        moments=m,
        spread=spread,
        terms={"y": _largest(xhat.abs() * w + b), "dx": _largest(factor * (g.abs() + scale * (c1 + xhat.abs() * c2)))},
    )


def _largest(t):
    return t.max() if t.numel() else 0.0


def _given(value, error, like):
    """A value with its bound, if it is given in the dtype of `like`."""
    error = error + rounded(value.abs() + error, like.dtype)
    return value, error.masked_fill(value.abs() + error >= torch.finfo(like.dtype).max, float("inf"))


def assert_within(name, ours, pair):
    value, bound = pair
    error = (ours.double() - value).abs()
    bad = ~(error <= bound)
    if bad.any():
        at = tuple(bad.nonzero()[0].tolist())
        raise AssertionError(
            f"{name}: {int(bad.sum())} of {bad.numel()} beyond the bound, the first at {at}: {ours[at].item()!r} "
            f"for {value[at].item()!r}, off by {error[at].item():.3g} where {bound[at].item():.3g} is allowed; "
            f"the worst is {(error / bound).nan_to_num(float('inf')).max().item():.3g} times its bound"
        )


def assert_moments(m, wide: Expected, dtype, size):
    """Counts exactly, the mean to twice the precision of what its sum is known to. size: elements of the largest set.

    What is summed are deviations d from an element of the set, rounded once, in a tree of at most 128 terms of the
    dtype of statistics (at most 12 additions one after another), the rest in double: at most 2 FEW roundings of eps / 2
    of every d, which is at most twice the spread. If M2 were less than a 17th of the sum of d * d, it would be summed
    anew.
    """
    eps, tiny = torch.finfo(stat_dtype(dtype)).eps, torch.finfo(torch.float64).eps
    ref, spread = wide.moments, wide.spread
    low = 0 if m.low is None else m.low.double()
    if m.count.is_floating_point():
        torch.testing.assert_close(
            m.count.double(), ref.count.double().expand(m.count.shape), rtol=FEW * eps + size * tiny, atol=0
        )
    else:
        assert torch.equal(m.count, ref.count.expand(m.count.shape))
    mean = ref.mean + (0 if ref.low is None else ref.low)
    filled = ref.count > 0
    sums = (2 * FEW * eps + tiny * (FEW + size)) * spread  # those of double, one after another at worst
    bound = FEW * (eps * eps + tiny) * mean.abs() + sums
    wrong = ~((m.mean.double() + low - mean).abs() <= bound) & filled
    assert not wrong.any(), f"means {m.mean[wrong.expand(m.mean.shape)]} for {mean[wrong.expand(mean.shape)]}"
    squares = torch.minimum(17 * ref.m2, ref.count * (2 * spread) ** 2) + ref.m2
    # In one shifted pass, M2 loses what the shift adds: at most (deviation of the first element)^2 per element.
    lost = tiny * (FEW + size) * size * (spread * spread + mean * mean * tiny)
    wrong = ~((m.m2.double() - ref.m2).abs() <= 2 * FEW * eps * squares + lost + torch.finfo(dtype).tiny) & filled
    assert not wrong.any(), f"m2 {m.m2[wrong.expand(m.m2.shape)]} for {ref.m2[wrong.expand(ref.m2.shape)]}"

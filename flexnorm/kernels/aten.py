"""The composition: every pattern in plain torch operations, differentiable to any order, on every device.

It is the definition that the other rooms are tested against, and what autograd differentiates where a derivative beyond
the first is asked for. Functions of the interface are documented there.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..canonical import memory_order
from ..statistics import Moments, divisor, pool, pool_about_zero
from .interface import Gradients, Kept, Operands, Recipe, Rule, Sums, stat_dtype


def forward(recipe: Recipe, operands: Operands) -> tuple[Tensor, Kept]:
    m = statistics(recipe, operands)
    return apply(recipe, operands, m), keep(recipe, operands, m)


def moments(recipe: Recipe, operands: Operands, kept: Kept) -> Moments:
    return Moments(*kept)


def keep(recipe: Recipe, operands: Operands, moments: Moments) -> Kept:
    m = moments
    return (m.count, m.mean, m.m2) if m.low is None else (m.count, m.mean, m.m2, m.low)


def evaluate(recipe: Recipe, operands: Operands) -> Tensor:
    return apply(recipe, operands, statistics(recipe, operands))


def statistics(recipe: Recipe, operands: Operands) -> Moments:
    values = _values(recipe, operands, operands.x)
    weights = _counts(recipe, operands, values.dtype)
    if weights is not None and not recipe.membership:
        # What weighs nothing is in no statistic, not even if it is NaN, as 0 * NaN would be.
        values = values.where((weights > 0) | values.isfinite(), 0.0)
    return (pool if recipe.center else pool_about_zero)(recipe.sets, weights, values)


def apply(recipe: Recipe, operands: Operands, moments: Moments) -> Tensor:
    y = _affine(recipe, operands, _normalized(recipe, operands, moments))
    if recipe.activation is not None:
        y = ACTIVATIONS[recipe.activation](y)
    return _outward(recipe, operands, y)


def backward(recipe: Recipe, operands: Operands, kept: Kept, dy: Tensor, *, of_mask: bool = True) -> Gradients:
    moments = Moments(*kept)
    sums = backward_sums(recipe, operands, moments, dy)
    dx, dmask = backward_dx(recipe, operands, moments, dy, sums)
    return Gradients(dx, dmask, sums.weight, sums.bias)


def backward_sums(recipe: Recipe, operands: Operands, moments: Moments, dy: Tensor) -> Sums:
    xhat, dz, g = _backward_values(recipe, operands, moments, dy)
    dweight = dbias = None
    if recipe.params is not None:
        if operands.weight is not None:
            dweight = recipe.params.outward(recipe.params.sum(dz * xhat)).to(operands.weight.dtype)
        if operands.bias is not None:
            dbias = recipe.params.outward(recipe.params.sum(dz)).to(operands.bias.dtype)
    return Sums(recipe.sets.sum(g), recipe.sets.sum(g * xhat), dweight, dbias)


def backward_dx(
    recipe: Recipe, operands: Operands, moments: Moments, dy: Tensor | None, sums: Sums | None
) -> tuple[Tensor, Tensor | None]:
    sets, mask = recipe.sets, operands.mask
    dy = torch.zeros_like(operands.x) if dy is None else dy
    xhat, _, g = _backward_values(recipe, operands, moments, dy)
    factor = inverse_sigma(recipe, moments)
    dmask = None
    if sums is not None:
        n = divisor(moments.count)
        mean_g = sums.grad / n if recipe.center else torch.zeros_like(sums.grad)
        mean_gx = sums.grad_xhat / n if recipe.scale else torch.zeros_like(sums.grad_xhat)
        through = sets.spread(mean_g) + xhat * sets.spread(mean_gx)
        weights = _counts(recipe, operands, xhat.dtype)
        if recipe.mask is not None and mask is not None and weights is not None and not recipe.membership:
            # d var / d w_i = ((x_i - mean)^2 - var) / n, and d mean / d w_i = (x_i - mean) / n
            dw = xhat * sets.spread(mean_g)
            if recipe.scale:
                dw = dw + 0.5 * (xhat * xhat - sets.spread(moments.var * factor * factor)) * sets.spread(mean_gx)
            dmask = recipe.mask.outward(recipe.mask.sum(-dw)).to(mask.dtype)
            through = through * weights
        g = g - through
    return _outward(recipe, operands, g * sets.spread(factor)), dmask


def backward_moments(rule: Rule, moments: Moments, sums: Sums) -> tuple[Tensor | None, Tensor, Tensor]:
    """The gradients of count, mean and m2 that came from elsewhere (of count, if it is floating)."""
    factor = inverse_sigma(rule, moments)
    n = divisor(moments.count)
    dmean = -factor * sums.grad if rule.center else torch.zeros_like(sums.grad)
    dvar = -0.5 * factor * factor * sums.grad_xhat if rule.scale else torch.zeros_like(sums.grad)
    dcount = -dvar * moments.var / n if moments.count.is_floating_point() else None
    return dcount, dmean, dvar / n


def backward_statistics(rule: Rule, moments: Moments, dmean: Tensor, dm2: Tensor, own: Moments | None = None) -> Sums:
    """The sums of which `backward_dx`, at these moments, makes the gradient of x, where mean and m2 of x have these.

    d mean / dx = 1 / n and d m2 / dx = 2 (x - mean): a line in x, as is what `backward_dx` takes of the sums, which is
    -1 / sigma times their average. `own` are the moments of x, where it is normalized by others: with xhat of these,
    x - mean of x is sigma xhat and the distance of the means.
    """
    own = moments if own is None else own
    n, sigma = divisor(moments.count), torch.where(moments.count > 0, moments.var + rule.eps, 0.0).sqrt()
    apart = moments.mean - own.mean
    if moments.low is not None and own.low is not None:
        apart = apart + (moments.low - own.low)
    grad = dmean / divisor(own.count) + 2 * dm2 * apart
    return Sums(-n * grad * sigma, -2 * n * dm2 * sigma * sigma, None, None)


def inverse_sigma(rule: Rule, moments: Moments) -> Tensor:
    """1 / sqrt(var + eps) of every set, 1 without scale; 0 where a set is empty or var + eps is 0."""
    filled = moments.count > 0
    if not rule.scale:
        return filled.to(moments.mean.dtype)
    v = moments.var + rule.eps
    usable = filled & (v != 0)
    return v.where(usable, 1.0).rsqrt().where(usable, 0.0)


DERIVATIVES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "relu": lambda dz, z: torch.ops.aten.threshold_backward(dz, z, 0),
    "silu": torch.ops.aten.silu_backward,
    "gelu": torch.ops.aten.gelu_backward,
}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "silu": F.silu, "gelu": F.gelu}


def _normalized(recipe: Recipe, operands: Operands, moments: Moments) -> Tensor:
    """(x - mean) / sigma, the mean subtracted in two steps as it is known to twice the precision; 0 outside."""
    sets = recipe.sets
    values = _values(recipe, operands, operands.x)
    if recipe.center:
        values = values - sets.spread(moments.mean)
        if moments.low is not None:
            values = values - sets.spread(moments.low)
        values = _inside(recipe, operands, values)  # 0 - mean would overflow in places where nobody looks
    return values * sets.spread(inverse_sigma(recipe, moments))


def affine_only(recipe: Recipe, operands: Operands, xhat: Tensor) -> Tensor:
    """Weight and bias on what is normalized already, in x's own shape; 0 stays outside."""
    if operands.weight is None and operands.bias is None:
        return xhat
    return _outward(recipe, operands, _affine(recipe, operands, xhat.reshape(recipe.sets.axes.sizes)))


def _affine(recipe: Recipe, operands: Operands, xhat: Tensor) -> Tensor:
    if operands.weight is not None:
        xhat = xhat * _spread_param(recipe, operands.weight, xhat.dtype)
    if operands.bias is not None:
        xhat = xhat + _spread_param(recipe, operands.bias, xhat.dtype)
    return xhat


def _backward_values(recipe: Recipe, operands: Operands, moments: Moments, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """xhat, the gradient before the activation, and the one before weight and bias."""
    xhat = _normalized(recipe, operands, moments)
    dz = _values(recipe, operands, dy)
    if recipe.activation is not None:
        z = _affine(recipe, operands, xhat)
        if torch.is_grad_enabled():  # it will be differentiated again
            z = z if z.requires_grad else z.detach().requires_grad_()
            (dz,) = torch.autograd.grad(ACTIVATIONS[recipe.activation](z), z, dz, create_graph=True)
        else:
            dz = DERIVATIVES[recipe.activation](dz, z)
    weight = operands.weight
    return xhat, dz, dz if weight is None else dz * _spread_param(recipe, weight, dz.dtype)


def _spread_param(recipe: Recipe, param: Tensor, dtype: torch.dtype) -> Tensor:
    assert recipe.params is not None
    return recipe.params.spread(recipe.params.inward(param.to(dtype)))


def _counts(recipe: Recipe, operands: Operands, dtype: torch.dtype) -> Tensor | None:
    """How much every element counts, in the elementary view: whole numbers, or weights in the dtype of statistics."""
    if recipe.mask is None or operands.mask is None:
        return None
    return recipe.mask.inward(operands.mask).to(torch.int64 if recipe.membership else dtype)


def _values(recipe: Recipe, operands: Operands, t: Tensor) -> Tensor:
    """x or dy in the elementary view and the dtype of statistics; what is outside is 0 at once."""
    t = t.reshape(recipe.sets.axes.sizes).to(stat_dtype(t.dtype))
    return _inside(recipe, operands, t)


def _inside(recipe: Recipe, operands: Operands, t: Tensor) -> Tensor:
    """t, and 0 where a bool mask says that there is no element."""
    if recipe.mask is None or operands.mask is None or not recipe.membership:
        return t
    return t.where(recipe.mask.inward(operands.mask), 0.0)


def _outward(recipe: Recipe, operands: Operands, t: Tensor) -> Tensor:
    """y or dx in x's own shape, dtype and memory format, 0 outside the mask."""
    x = operands.x
    t = _inside(recipe, operands, t)
    t = t.expand(recipe.sets.axes.sizes).to(x.dtype).reshape(x.shape)
    if t.stride() == x.stride():
        return t
    order = memory_order(x.shape, x.stride())
    back = sorted(range(len(order)), key=order.__getitem__)
    return t.permute(order).contiguous().permute(back)

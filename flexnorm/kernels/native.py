"""torch's own fused operations: `rms_norm` where it is the same, and on a CPU `group_norm` of x less a shift.

torch keeps the mean in float32, and folds x * a + b: at mean 1000 and std 1 its results are off by 7e-5 where the
composition is off by 5e-7, and a constant 1000.3 gives 0.008 and not 0. So a value of each set is subtracted before.
It is the mean of a few members, in pairs, so that equal members give their own value and a constant set zeros, exactly.
Where it turns out to lie more than FAR standard deviations from the mean of its set, the mean takes its place.

`group_norm` serves every dense pattern. Kept and pooled axes, with parameters and without, are its four kinds of axes:

    samples: kept        groups: kept, with parameters        channels: pooled, with parameters        places: pooled

x less the shift is written in this order, part by part into what a cache holds, and the result back in the order of x.
(In channels-last memory torch sums squares naively, and loses digits.) The backward pass writes it again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ..sets import Sets
from ..statistics import Moments
from . import aten
from .aten import apply as apply
from .aten import backward_dx as backward_dx
from .aten import backward_sums as backward_sums
from .interface import Gradients, Kept, Operands, Recipe, stat_dtype

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
PART = 2**21  # elements for each thread: what is written between two operations is read from a cache
MEMBERS = 16  # of a set that the shift is the mean of, at most; and one in 8
FAR = 3.0
ROWS = 2**12  # of a part, at most: torch adds the gradients of a parameter one after another
LONG = 2**14  # places of a channel, at most: torch adds them one after another, too


def refusal(recipe: Recipe, operands: Operands, *, alone: bool = True) -> str | None:
    """Why torch has no such operation; None if it has one. `alone`: neither a gradient nor moments are asked for."""
    sets, params = recipe.sets, recipe.params
    x, _, weight, bias = operands
    if recipe.mask is not None:
        return "torch has no masked norm"
    if sets.merges or (params is not None and params.merges):
        return "torch has no norm over labels"
    if recipe.eps < torch.finfo(stat_dtype(x.dtype)).tiny:
        return "torch divides by zero where x and eps are 0"
    if recipe.center:
        if x.device.type != "cpu":
            return "torch's norms with a mean know it to float32 only"
        if not recipe.scale:
            return "torch has no norm without a scale"
        if x.numel() == 0 or x.dtype not in DTYPES:
            return f"x is empty, or of {x.dtype}"
        return None
    if not alone:
        return "torch's rms_norm gives no moments, and saves more than x for a gradient"
    if recipe.activation is not None or bias is not None:
        return "torch's rms_norm has no bias and no activation"
    if x.dtype.itemsize < 4:
        return "torch's rms_norm rounds half precision twice"
    if x.numel() == 0 or not x.is_contiguous():
        return "x is not contiguous, or empty"
    kept, pooled = _kept_and_pooled(recipe)
    if not pooled or (kept and max(kept) > min(pooled)):
        return "the pooled axes are not the innermost ones"
    if params is not None and {place for place in (*kept, *pooled) if place in params.kept} != set(pooled):
        return "the parameters do not lie on the pooled axes"
    if weight is not None and weight.dtype != x.dtype:
        return "the parameters have another dtype"
    return None


def _kept_and_pooled(recipe: Recipe) -> tuple[list[int], list[int]]:
    """The places of both kinds of axes, those of size 1 aside, as they are both or neither."""
    sizes, kept = recipe.sets.axes.sizes, recipe.sets.kept
    real = [place for place, size in enumerate(sizes) if size != 1]
    return [place for place in real if place in kept], [place for place in real if place not in kept]


def evaluate(recipe: Recipe, operands: Operands) -> Tensor:
    if recipe.center:
        return forward(recipe, operands)[0]
    x, _, weight, _ = operands
    columns = math.prod(recipe.sets.axes.sizes[place] for place in _kept_and_pooled(recipe)[1])
    if weight is not None:
        assert recipe.params is not None
        weight = recipe.params.inward(weight).reshape(columns)
    return F.rms_norm(x.reshape(-1, columns), (columns,), weight, recipe.eps).to(x.dtype).view(x.shape)


# --- x less a shift, about which torch's group_norm is exact ---------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Order:
    """The axes of x in the order of `group_norm`, those of a kind as they lie in memory.

    Attributes:
        sets, params: those of the recipe.
        like: a result, without memory: it says how results lie.
        axes: places of the axes, those of size 1 first.
        kinds: how many axes are samples, groups, channels and places.
    """

    sets: Sets
    params: Sets | None
    like: Tensor
    axes: tuple[int, ...]
    kinds: tuple[int, int, int, int]

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Of the axes, in this order."""
        return tuple(self.sets.axes.sizes[axis] for axis in self.axes)

    @cached_property
    def norm(self) -> tuple[int, int, int, int]:
        """Numbers of samples, groups, channels of a group and places of a channel."""
        left = list(self.sizes[len(self.axes) - sum(self.kinds) :])
        samples, groups, channels, places = (math.prod([left.pop(0) for _ in range(n)]) for n in self.kinds)
        return samples, groups, channels, places

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """The axes in this order, the first of which is cut into parts: the samples, of one sample the groups.

        Axes that are one in memory are one axis here.
        """
        lead = self.kinds[0] or self.kinds[1]
        units = len(self.axes) - sum(self.kinds)
        t = self._turned(self.like)
        strides, sizes = t.stride()[units:], self.sizes[units:]
        one = all(strides[i] == strides[i + 1] * sizes[i + 1] for i in range(lead - 1))
        n = lead if one else 1
        return (math.prod(sizes[:n]), *sizes[n:])

    @cached_property
    def pooled(self) -> range:
        """The pooled axes of `shape`."""
        return range(len(self.shape) - self.kinds[2] - self.kinds[3], len(self.shape))

    def _turned(self, t: Tensor) -> Tensor:
        return t.reshape(self.sets.axes.sizes).permute(self.axes)

    def turned(self, t: Tensor) -> Tensor:
        """A tensor like x in this order and shape; a view, of what has the memory of a result."""
        return self._turned(t).reshape(self.shape)

    def put(self, result: Tensor | None, part: slice, t: Tensor) -> Tensor:
        """The result with a part more. One part may be all of it, as it lies."""
        like = self.like
        if t.numel() == like.numel() and t.dtype == like.dtype and self.turned(like).is_contiguous():
            return t.as_strided(like.shape, like.stride())
        result = torch.empty_like(like, device=t.device) if result is None else result
        rows = self.turned(result)[part]
        rows.copy_(t.view(rows.shape))
        return result

    def _back(self, t: Tensor, shape: tuple[int, ...]) -> Tensor:
        back = sorted(range(len(self.axes)), key=self.axes.__getitem__)
        return t.reshape([shape[axis] for axis in self.axes]).permute(back)

    def of_sets(self, t: Tensor) -> Tensor:
        """A statistic of the sets, in their internal shape."""
        return self._back(t, self.sets.internal_shape)

    def to_keep(self, t: Tensor) -> Tensor:
        """The reverse."""
        shape = [1 if axis in self.pooled else size for axis, size in enumerate(self.shape)]
        return t.expand(self.sets.internal_shape).permute(self.axes).reshape(shape)

    def param(self, t: Tensor | None) -> Tensor | None:
        """Weight or bias, [groups, channels]."""
        if t is None:
            return None
        assert self.params is not None
        t = self.params.inward(t.detach().to(stat_dtype(self.like.dtype)))
        return t.permute(self.axes).reshape(self.norm[1:3])

    def of_part(self, param: Tensor | None, part: slice) -> Tensor | None:
        """What of it belongs to a part."""
        if param is None:
            return None
        return param.flatten() if self.kinds[0] else param.view(self.shape[0], -1)[part].flatten()

    def gradient(self, of_parts: list[Tensor], param: Tensor | None) -> Tensor | None:
        """The gradient of a parameter."""
        if param is None:
            return None
        assert self.params is not None
        t = torch.stack(of_parts).sum(0) if self.kinds[0] else torch.cat(of_parts)
        return self.params.outward(self._back(t, self.params.internal_shape)).to(param.dtype)

    def parts(self) -> Iterator[tuple[slice, tuple[int, int, int, int]]]:
        """Parts of the first axis, and what `norm` is of each."""
        lead, (samples, groups, channels, places) = self.shape[0], self.norm
        step = max(1, min(ROWS, lead * PART * torch.get_num_threads() // self.like.numel()))
        for first in range(0, lead, step):
            n = min(step, lead - first)
            if self.kinds[0]:
                yield slice(first, first + n), (n * samples // lead, groups, channels, places)
            else:
                yield slice(first, first + n), (1, n * groups // lead, channels, places)


def _order(recipe: Recipe, x: Tensor) -> _Order:
    return _ordered(recipe.sets, recipe.params, x.shape, x.stride(), x.dtype)


@lru_cache(maxsize=1024)
def _ordered(
    sets: Sets, params: Sets | None, shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype
) -> _Order:
    like = torch.empty_like(torch.empty_strided(shape, strides, dtype=dtype, device="meta"))
    sizes, kept = sets.axes.sizes, sets.kept
    affine = frozenset() if params is None else params.kept
    kind = [(place not in kept) * 2 + ((place in affine) == (place in kept)) for place in range(len(sizes))]
    units = [place for place, size in enumerate(sizes) if size == 1]
    steps = like.view(sizes).stride()
    real = [place for place in range(len(sizes)) if place not in units]
    real.sort(key=lambda place: (kind[place], -steps[place]))
    samples, groups, channels, places = (sum(kind[place] == k for place in real) for k in range(4))
    return _Order(sets, params, like, (*units, *real), (samples, groups, channels, places))


def _shift(order: _Order, x: Tensor) -> Tensor:
    """The mean of a few members of each set, spread over its axes, the first of which are the channels."""
    size = math.prod(x.shape[axis] for axis in order.pooled)
    left = 2 ** (min(MEMBERS, max(1, size // 8)).bit_length() - 1)
    for axis in order.pooled:
        n = min(left, 2 ** (x.shape[axis].bit_length() - 1))
        step, left = x.shape[axis] // n, left // n
        x = x[(slice(None),) * axis + (slice(step // 2, step // 2 + (n - 1) * step + 1, step),)]
    x = x.to(stat_dtype(x.dtype), copy=True)
    for axis in order.pooled:
        while x.shape[axis] > 1:
            x, other = x.chunk(2, axis)
            x = torch.lerp(x, other, 0.5)
    return x


def _less(rows: Tensor, shift: Tensor) -> Tensor:
    """x less the shift, in a tensor of its own."""
    d = torch.empty(rows.shape, dtype=shift.dtype, device=rows.device)
    return torch.sub(rows, shift, out=d)


def _normalized(
    d: Tensor, norm: tuple[int, int, int, int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the mean of d and 1 / sigma, [samples, groups]."""
    n, groups, channels, places = norm
    if groups == places == 1:  # the same, and quicker
        return torch.native_layer_norm(d.view(n, channels), (channels,), weight, bias, eps)
    d = d.view(n, groups * channels, places)
    return torch.native_group_norm(d, weight, bias, n, groups * channels, places, groups, eps)


def _gradients(
    dy: Tensor, d: Tensor, norm: tuple[int, int, int, int], mean: Tensor, rstd: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, and with a weight the gradients of weight and bias."""
    n, groups, channels, places = norm
    ops, needed = torch.ops.aten, [True, weight is not None, weight is not None]
    mean, rstd = mean.reshape(n, groups), rstd.reshape(n, groups)
    if groups == places == 1:
        dy, d = dy.view(n, channels), d.view(n, channels)
        dx, dweight, dbias = ops.native_layer_norm_backward(dy, d, (channels,), mean, rstd, weight, weight, needed)
        return dx, dweight, dbias
    share = 1
    if places > LONG:  # more channels, of fewer places
        share = next(k for k in range(math.isqrt(places), 0, -1) if places % k == 0)
        weight = None if weight is None else weight.repeat_interleave(share)
    sizes = (n, groups * channels * share, places // share)
    dx, *of_params = ops.native_group_norm_backward(
        dy.view(sizes), d.view(sizes), mean, rstd, weight, *sizes, groups, needed
    )
    dweight, dbias = (t if share == 1 or t is None else t.view(-1, share).sum(1) for t in of_params)
    return dx, dweight, dbias


def forward(recipe: Recipe, operands: Operands) -> tuple[Tensor, Kept]:
    order = _order(recipe, operands.x)
    x, weight, bias = order.turned(operands.x), order.param(operands.weight), order.param(operands.bias)
    shift, means, rstds, y = _shift(order, x), [], [], None
    for part, norm in order.parts():
        s, affine = shift[part], (order.of_part(weight, part), order.of_part(bias, part))
        z, mean, rstd = _normalized(_less(x[part], s), norm, *affine, recipe.eps)
        far = (mean * rstd).abs() > FAR
        if far.any():
            s += mean.where(far, 0.0).view(s.shape)
            z, mean, rstd = _normalized(_less(x[part], s), norm, *affine, recipe.eps)
        if recipe.activation is not None:
            z = aten.ACTIVATIONS[recipe.activation](z)
        y = order.put(y, part, z)
        means.append(mean.view(s.shape))
        rstds.append(rstd.view(s.shape))
    assert y is not None
    return y, (shift, torch.cat(means), torch.cat(rstds))


def backward(recipe: Recipe, operands: Operands, kept: Kept, dy: Tensor, *, of_mask: bool = True) -> Gradients:
    order = _order(recipe, operands.x)
    x, dy = order.turned(operands.x), order.turned(dy)
    weight, bias = order.param(operands.weight), order.param(operands.bias)
    if weight is None and bias is not None:
        weight = torch.ones_like(bias)  # torch gives the gradient of a bias beside that of a weight
    shift, mean, rstd = kept
    dx, dweights, dbiases = None, [], []
    for part, norm in order.parts():
        d, dz, w = _less(x[part], shift[part]), dy[part].to(shift.dtype).contiguous(), order.of_part(weight, part)
        if recipe.activation is not None:
            z = _normalized(d, norm, w, order.of_part(bias, part), recipe.eps)[0]
            dz = aten.DERIVATIVES[recipe.activation](dz, z.view(dz.shape))
        g, dweight, dbias = _gradients(dz, d, norm, mean[part], rstd[part], w)
        dx = order.put(dx, part, g)
        dweights.append(dweight)
        dbiases.append(dbias)
    assert dx is not None
    return Gradients(dx, None, order.gradient(dweights, operands.weight), order.gradient(dbiases, operands.bias))


def moments(recipe: Recipe, operands: Operands, kept: Kept) -> Moments:
    order = _order(recipe, operands.x)
    shift, mean, rstd = (order.of_sets(t) for t in kept)
    n = operands.x.numel() // recipe.sets.count
    high = shift + mean
    var = rstd**-2 - recipe.eps
    few = var < recipe.eps  # lost in eps
    if few.any():
        var = aten.statistics(recipe, operands).var.where(few, var)
    return Moments(torch.full(high.shape, n, device=high.device), high, var * n, (shift - high) + mean)


def statistics(recipe: Recipe, operands: Operands) -> Moments:
    return moments(recipe, operands, forward(recipe, Operands(operands.x))[1])


def keep(recipe: Recipe, operands: Operands, moments: Moments) -> Kept:
    order = _order(recipe, operands.x)
    low = torch.zeros_like(moments.mean) if moments.low is None else moments.low
    shift, mean, rstd = (order.to_keep(t) for t in (moments.mean, low, aten.inverse_sigma(recipe, moments)))
    return shift, mean, rstd

"""What a good programmer writes in torch where it has no op for the case: stable two-pass code, as few passes over x as
torch allows."""

from __future__ import annotations

import torch
from torch import Tensor

from .case import EPS, Data


def affine(data: Data) -> tuple[Tensor | float, Tensor]:
    """Weight and bias as they broadcast against x."""
    return data.weight.view(data.over), data.bias.view(data.over)


def pooled(x: Tensor, dims: tuple[int, ...], weight: Tensor, bias: Tensor) -> Tensor:
    """Statistics over some axes. weight and bias broadcast against x."""
    var, mean = torch.var_mean(x, dims, correction=0, keepdim=True)
    return torch.addcmul(bias, x - mean, torch.rsqrt(var + EPS) * weight)


def masked(x: Tensor, mask: Tensor, dims: tuple[int, ...], count: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Statistics over the valid elements of some axes, `count` of them; 0 elsewhere."""
    mean = torch.where(mask, x, 0.0).sum(dims, keepdim=True) / count
    centered = torch.where(mask, x - mean, 0.0)
    var = centered.square().sum(dims, keepdim=True) / count
    return torch.where(mask, torch.addcmul(bias, centered, torch.rsqrt(var + EPS) * weight), 0.0)


def merged(var: Tensor, mean: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """Moments of sets, given back to their parts: `share[f, k]` is the share of part f (last axis) in its set k."""
    member = (share > 0).to(share.dtype).t()
    whole = mean @ share @ member
    return (var + (mean - whole).square()) @ share @ member, whole


def parts(x: Tensor, dims: tuple[int, ...], share: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Moments of the parts of the sets, merged: x is read twice, and all between is small."""
    var, mean = merged(*torch.var_mean(x, dims, correction=0), share)
    for dim in sorted(dim % x.dim() for dim in dims):
        var, mean = var.unsqueeze(dim), mean.unsqueeze(dim)
    scale = torch.rsqrt(var + EPS) * weight
    return torch.addcmul(bias, x - mean, scale)


def shares(sizes: list[int]) -> Tensor:
    """For `merged`: the parts of set k are sizes[k] neighbours of equal weight."""
    share = torch.zeros(sum(sizes), len(sizes))
    first = 0
    for k, size in enumerate(sizes):
        share[first : first + size, k] = 1 / size
        first += size
    return share


# --- rows (v, c) whose sets are named by ids, one channel or `groups` of channels each -------------------------------


def _narrow(sums: Tensor, groups: int | None) -> Tensor:
    """Means of channels to means of their groups."""
    if groups is None:
        return sums
    count, channels = sums.shape
    return sums.view(count, groups, -1).mean(-1, keepdim=True).expand(-1, -1, channels // groups).reshape(count, -1)


def index_add(d: Data) -> Tensor:
    sizes = d.sizes_of_sets.unsqueeze(1)
    mean = _narrow(d.x.new_zeros(d.count, d.x.shape[1]).index_add(0, d.ids, d.x) / sizes, d.groups)
    centered = d.x - mean[d.ids]
    sums = centered.new_zeros(d.count, d.x.shape[1]).index_add(0, d.ids, centered.square())
    scale = torch.rsqrt(_narrow(sums / sizes, d.groups) + EPS) * d.weight
    return torch.addcmul(d.bias, centered, scale[d.ids])


def scatter_reduce(d: Data) -> Tensor:
    zeros, ids = d.x.new_zeros(d.count, d.x.shape[1]), d.ids.unsqueeze(1).expand_as(d.x)
    mean = _narrow(zeros.scatter_reduce(0, ids, d.x, "mean", include_self=False), d.groups)
    centered = d.x - mean[d.ids]
    var = _narrow(zeros.scatter_reduce(0, ids, centered.square(), "mean", include_self=False), d.groups)
    return torch.addcmul(d.bias, centered, (torch.rsqrt(var + EPS) * d.weight)[d.ids])


def loop(d: Data) -> Tensor:
    """Of sorted ids only: one set after the other."""
    weight, bias = d.weight.view(d.groups, -1), d.bias.view(d.groups, -1)
    pieces = [pooled(piece, (0, 2), weight, bias) for piece in d.x.view(d.x.shape[0], d.groups, -1).split(d.sizes)]
    return torch.cat(pieces).view_as(d.x)


def one_hot(d: Data) -> Tensor:
    """Sums over sets as a product with a matrix of zeros and ones."""
    share = d.member / d.sizes_of_sets.unsqueeze(1)
    mean = _narrow(share @ d.x, d.groups)
    centered = d.x - mean[d.ids]
    var = _narrow(share @ centered.square(), d.groups)
    return torch.addcmul(d.bias, centered, (torch.rsqrt(var + EPS) * d.weight)[d.ids])

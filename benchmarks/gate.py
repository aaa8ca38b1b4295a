"""Whether what is timed is right: every contender against float64, at mean 0 and at mean 1000.

The bound is that of the design: before the affine map, with sigma = sqrt(var + eps) of the set,
`|err| <= 4 * eps_dtype * (|mean| / sigma + |y|) + 1e-6`. The map multiplies it by the weight, and rounds once more.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .case import EPS, Case, Contender, Data, like

MEANS = (0.0, 1000.0)
GRADIENT = 1e-5
"""Of dx: largest error over largest value. (The design asks this at mean 1e4 and std 0.1.)"""
PARAMETER_GRADIENT = 1e-4
"""Of dweight and dbias, whose sums in float32 run over up to a million terms."""


# --- the references: x in float64 -> (normalized before the affine map, |mean| / sigma that broadcasts against it) ---


def pooled(
    x: Tensor, dims: Sequence[int], weights: Tensor | None = None, *, center: bool = True
) -> tuple[Tensor, Tensor]:
    """Sets are what remains when some axes are pooled; `weights` (bool or floating) weigh the statistics."""
    w = torch.ones((), dtype=x.dtype, device=x.device) if weights is None else weights.to(x.dtype)
    total = w.expand_as(x).sum(dims, keepdim=True)
    mean = (x * w).sum(dims, keepdim=True) / total
    shifted = x - mean if center else x
    sigma = ((shifted.square() * w).sum(dims, keepdim=True) / total + EPS).sqrt()
    return shifted / sigma, (mean.abs() / sigma).detach()


def in_parts(x: Tensor, axis: int, sizes: Sequence[int], dims: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Unequal neighbours along an axis, each pooled over `dims`."""
    found = [pooled(part, dims) for part in x.split(list(sizes), axis)]
    return torch.cat([z for z, _ in found], axis), torch.cat([r.expand_as(z) for z, r in found], axis)


def labelled(x: Tensor, ids: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """x is (rows, groups, channels): a set for every id and group."""
    total = torch.bincount(ids, minlength=count).to(x.dtype).unsqueeze(1) * x.shape[2]
    zeros = x.new_zeros(count, x.shape[1])
    mean = zeros.index_add(0, ids, x.sum(2)) / total
    shifted = x - mean[ids].unsqueeze(2)
    sigma = (zeros.index_add(0, ids, shifted.square().sum(2)) / total + EPS).sqrt()
    return shifted / sigma[ids].unsqueeze(2), (mean.abs() / sigma).detach()[ids].unsqueeze(2)


# --- the comparison --------------------------------------------------------------------------------------------------


def expected(case: Case, data: Data) -> tuple[Tensor, Tensor, list[Tensor]]:
    """y, the bound of its error, and the gradients of x, weight and bias, all in float64."""
    x = data.x.detach().double().requires_grad_()
    z, ratio = case.reference(like(data, x=x))
    bound = 4 * torch.finfo(data.x.dtype).eps * (ratio + z.detach().abs()) + 1e-6
    leaves, y = [x], z
    if data.weight is not None:
        weight = data.weight.detach().double().requires_grad_()
        leaves.append(weight)
        y = z * weight.view(data.over)
        bound = bound * weight.detach().view(data.over).abs() + 2 * torch.finfo(data.x.dtype).eps * y.detach().abs()
    if data.bias is not None:
        bias = data.bias.detach().double().requires_grad_()
        leaves.append(bias)
        y = y + bias.view(data.over)
        bound = bound + 2 * torch.finfo(data.x.dtype).eps * bias.detach().view(data.over).abs()
    if case.activation is not None:
        y = case.activation(y)
        bound = 1.1 * bound  # the steepest slope of silu
    return y.detach(), bound, list(torch.autograd.grad(y, leaves, data.dy.double()))


def errors(case: Case, contenders: Iterable[Contender], scale: float, device: str) -> dict[str, dict[str, Any]]:
    """The worst error over its bound, of the result and of the gradients: above 1 is wrong."""
    found: dict[str, dict[str, Any]] = {}
    contenders = list(contenders)
    for mean in MEANS:
        data = case.draw(scale, device)
        data.x = (data.x + mean).detach()
        if data.valid is not None:  # what a contender leaves in padding is its own affair
            data.dy = torch.where(data.valid, data.dy, 0.0)
        y, bound, gradients = expected(case, data)
        for contender in contenders:
            row = found.setdefault(contender.name, {})
            row[f"forward at {mean:g}"], row[f"gradient at {mean:g}"] = _of(contender, data, y, bound, gradients)
    return found


def _of(
    contender: Contender, data: Data, y: Tensor, bound: Tensor, gradients: list[Tensor]
) -> tuple[float, float | None]:
    mine = like(data, x=data.x.detach().clone(memory_format=torch.preserve_format).requires_grad_())
    with torch.no_grad():
        forward = _excess(contender.call(mine), y, bound, data.valid)
    if contender.forward_only:
        return forward, None
    leaves = [mine.x] + ([] if contender.module else contender.parameters(mine))  # modules name theirs as they like
    got = torch.autograd.grad(contender.call(mine), leaves, data.dy)
    worst = 0.0
    for i, (ours, theirs) in enumerate(zip(got, gradients, strict=False)):
        relative = ((ours.double() - theirs).abs().max() / theirs.abs().max()).item()
        relative /= GRADIENT if i == 0 else PARAMETER_GRADIENT
        worst = max(worst, relative) if relative == relative else float("inf")
    return forward, worst


def _excess(got: Tensor, y: Tensor, bound: Tensor, valid: Tensor | None) -> float:
    if got.shape != y.shape:
        return float("inf")
    excess = (got.double() - y).abs() / bound
    excess = torch.nan_to_num(excess, nan=float("inf"))
    if valid is not None:
        excess = torch.where(valid, excess, 0.0)
    return excess.max().item()


def worst(row: dict[str, Any], mode: str) -> float:
    """Over both means; a row of forward and backward answers for both."""
    keys = ("forward", "gradient") if mode == "forward+backward" else ("forward",)
    return max(value for key, value in row.items() if key.startswith(keys) and value is not None)

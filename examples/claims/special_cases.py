"""Group norm at its two ends: one channel in a group, and all of them."""

import torch
import torch.nn.functional as F
from claim import FAILS, HOLDS, Claim, tell
from torch import nn

from flexnorm.images import ChannelGroupNorm

torch.manual_seed(0)
N, C, H, W = 4, 12, 9, 7
EPS = torch.finfo(torch.float64).eps


def compared(groups, x, peer, weight, bias):
    """Largest difference of the output, of the gradients of x, weight and bias, relative to the largest value."""
    norm = ChannelGroupNorm(groups, C, dtype=torch.float64)
    norm.load_state_dict({"weight": weight, "bias": bias})
    dy = torch.randn_like(x)
    x, weight, bias = (t.detach().clone().requires_grad_() for t in (x, weight, bias))
    ours, theirs = norm(x), peer(x, weight, bias)
    pairs = [(ours, theirs)]
    gradients = torch.autograd.grad(theirs, (x, weight, bias), dy)
    pairs += zip(torch.autograd.grad(ours, (x, *norm.parameters()), dy), gradients, strict=True)
    return [((a - b).abs().max() / b.abs().max()).item() for a, b in pairs]


def instance_norm(x, weight, bias):
    peer = nn.InstanceNorm2d(C, affine=True, dtype=torch.float64)
    return torch.func.functional_call(peer, {"weight": weight, "bias": bias}, x)


def layer_norm(x, weight, bias):  # torch has a weight for every element; here those of one channel are the same
    weight, bias = (t.view(-1, *[1] * (x.dim() - 2)).expand(x.shape[1:]) for t in (weight, bias))
    return F.layer_norm(x, x.shape[1:], weight, bias)


def token_norm(x, weight, bias):  # as Transformers have it: each place by itself
    return F.layer_norm(x.movedim(1, -1), (C,), weight, bias).movedim(-1, 1)


def shown(difference, limit):
    return f"rounding (< {limit:.0e})" if difference < limit else f"{difference:.1f}"


cases = [
    ("G = C", "InstanceNorm2d", C, instance_norm, (H, W), True),
    ("G = 1", "layer_norm over C, H, W", 1, layer_norm, (H, W), True),
    ("G = 1, x of (N, C)", "layer_norm over C", 1, token_norm, (), True),
    ("G = 1", "layer_norm over C at each place", 1, token_norm, (H, W), False),
]
rows, equal, apart = [], True, True
for name, peer, groups, f, spatial, meant in cases:
    worst, limit = [0.0, 0.0], 0.0
    for scale, offset in ((1, 0), (0.1, 10), (100, -3)):
        x = scale * torch.randn(N, C, *spatial, dtype=torch.float64) + offset
        difference = compared(groups, x, f, torch.randn(C, dtype=torch.float64), torch.randn(C, dtype=torch.float64))
        worst = [max(worst[0], difference[0]), max(worst[1], *difference[1:])]
        # a sum of m values loses up to m eps, of values that are |mean| / sigma times as large as what is left of them
        limit = max(limit, EPS * x[0].numel() * max(1, abs(offset) / scale))
    same = max(worst) < limit
    equal, apart = equal and (same or not meant), apart and (meant or not same)
    rows.append((name, peer, *(shown(value, limit) for value in worst)))

tell(
    Claim(
        title="Instance norm and layer norm are special cases",
        says="With as many groups as channels, group norm is instance norm; with one group it is layer norm.",
        source="Wu and He, Group Normalization, 2018; told of group norm everywhere",
        expected="The same sets of values, so the same outputs and gradients up to rounding, at any scale and "
        "offset of x. Layer norm is here that over C, H and W. That of Transformers, over C alone at each place, is "
        "another norm wherever there is more than one place.",
        columns=("group norm", "torch", "outputs differ by", "gradients differ by"),
        rows=rows,
        verdict=HOLDS if equal and apart else FAILS,
        because="Values and gradients are the same. But the layer norm of Transformers is not group norm with G = "
        "1: on (N, C, H, W) they agree only where H = W = 1. And torch's nn.LayerNorm over (C, H, W) learns a "
        "weight for each element, group norm one for each channel.",
    )
)

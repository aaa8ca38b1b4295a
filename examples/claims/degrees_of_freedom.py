"""What is lost of a group: its mean and its scale."""

import math

import torch
from claim import FAILS, HOLDS, IN_PART, Claim, tell

from flexnorm import Norm, moments, normalize

torch.manual_seed(0)
N, C, G, H, W = 2, 12, 3, 2, 2
PATTERN, m = "n (g c) h w -> n g", C // G * H * W
ROUNDING = 1e-10  # far above that of float64, and far below all else here

rows, claimed, refined = [], [], []


def row(what, expected, measured, agrees, part=claimed):
    rows.append((what, expected, measured))
    part.append(agrees)


def of_rounding(value):
    return "rounding" if value < ROUNDING else f"{value:.2g}"


def singular_values(x, pattern, eps, **sizes):
    jacobian = torch.func.jacrev(lambda x: normalize(x, pattern, eps=eps, **sizes))(x).view(x.numel(), x.numel())
    return torch.linalg.svdvals(jacobian)


x = 3 + 2 * torch.randn(1, C, H, W, dtype=torch.float64)
for what, pattern, sizes, sets in (
    (f"one group of {C * H * W}", "n c h w -> n", {}, 1),
    (f"{G} groups of {m}", PATTERN, {"g": G}, G),
):
    values = singular_values(x, pattern, 0.0, **sizes)
    lost = int((values < ROUNDING).sum())
    row(f"rank lost by the Jacobian, {what}", f"{2 * sets}", f"{lost}", lost == 2 * sets)

# along x - mean the radius goes as s / sqrt(s^2 + eps), whose derivative is eps / (s^2 + eps)^1.5
eps = 1e-5
values = singular_values(x, PATTERN, eps, g=G)
nearly = values[values > ROUNDING][-G:]
derivative = (eps / (moments(x, PATTERN, g=G).var + eps) ** 1.5).flatten().sort(descending=True).values
agrees = int((values < ROUNDING).sum()) == G and torch.allclose(nearly, derivative, rtol=1e-6)
shown = f"{G} lost, {G} singular values of {nearly.min():.0e} to {nearly.max():.0e}"
row(f"the same, eps = {eps:g}", f"{G} lost, {G} of eps / (var + eps)^1.5", shown, agrees, refined)

y = normalize(x, PATTERN, g=G, eps=0.0).view(G, m)
total, radius = y.sum(1).abs().max().item(), y.norm(dim=1)
row("sum of a group", "0", of_rounding(total), total < ROUNDING)
row("norm of a group", f"sqrt({m}) = {math.sqrt(m):g}", f"{radius.mean():g}", (radius - m**0.5).abs().max() < ROUNDING)
for scale in (1.0, 1e-2, 1e-3):
    var = moments(scale * x, PATTERN, g=G).var.flatten()
    short = 1 - normalize(scale * x, PATTERN, g=G).view(G, m).norm(dim=1) / math.sqrt(m)
    expected = 1 - (var / (var + eps)).sqrt()
    what = f"norm, eps = {eps:g}, sigma of {var.mean().sqrt():.0g}"
    row(what, f"{expected.mean():.1g} shorter", f"{short.mean():.1g}", torch.allclose(short, expected), refined)


def affine(axes):
    """Group norm with a random weight and bias along the axes, and its outputs (n, g, c, places)."""
    norm = Norm(PATTERN, affine=axes, g=G, c=C // G, dtype=torch.float64)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    return norm, norm(3 + 2 * torch.randn(N, C, H, W, dtype=torch.float64)).detach().view(N, G, C // G, H * W)


norm, y = affine("g")
gap = (y.sum((2, 3)) - m * norm.bias).abs().max().item()
row("sum y - m bias, a bias for each group", "0", of_rounding(gap), gap < ROUNDING)
norm, y = affine("g c")
gap = (y.sum((2, 3)) - m * norm.bias.mean(1)).abs().max().item()
row("the same, weight and bias for each channel", "not 0", of_rounding(gap), gap > ROUNDING, refined)
gap = ((y - norm.bias[..., None]) / norm.weight[..., None]).sum((2, 3)).abs().max().item()
row("sum of (y - bias) / weight", "0", of_rounding(gap), gap < ROUNDING, refined)

tell(
    Claim(
        title="Two degrees of freedom are lost for each group",
        says="For each group two degrees of freedom are removed, its mean and its scale. The outputs of a group of "
        "m values lie on an (m-2)-sphere: they sum to 0 and have the norm sqrt(m). With an affine shared by the "
        "group, the sum of y is m bias.",
        source="told of group norm: principles",
        expected="The Jacobian of one sample lacks 2 G of its rank, where eps is 0. With eps the mean is lost and "
        "the scale nearly: the norm is sqrt(m var / (var + eps)), shorter than sqrt(m) as long as var is finite. "
        "With a weight for each channel the sum is no constant any more, but another linear form of y is.",
        columns=("quantity", "expected", "measured"),
        rows=rows,
        verdict=HOLDS if all(claimed + refined) else IN_PART if all(claimed) else FAILS,
        because="All of it, for eps = 0; with eps the (m-2)-sphere becomes a thin shell about it, which is thick "
        "where the variance is near eps. A usual layer, whose weights differ by channel, does not keep the sum, but "
        "is as constrained: by the sum of (y - bias) / weight, which is 0.",
    )
)

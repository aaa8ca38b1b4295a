"""Groups scaled and shifted, forwards and backwards, channel by channel, and near eps."""

import torch
from claim import FAILS, HOLDS, IN_PART, Claim, tell

from flexnorm import moments
from flexnorm.images import ChannelGroupNorm

torch.manual_seed(0)
N, C, G, H, W = 8, 16, 4, 10, 10
norm = ChannelGroupNorm(G, C, eps=0.0, dtype=torch.float64)
usual = ChannelGroupNorm(G, C, dtype=torch.float64)  # eps = 1e-5
x = torch.randn(N, C, H, W, dtype=torch.float64)
ROUNDING = 1e-12


def of_groups(values):
    """(N, G) -> (N, C, 1, 1): one for all channels of a group."""
    return values.repeat_interleave(C // G, 1)[..., None, None]


def change(norm, before, after):
    """Of the output of the layer, relative to it."""
    return ((norm(after) - norm(before)).norm() / norm(before).norm()).item()


def shown(value):
    return "rounding" if value < ROUNDING else f"{value:.1g}"


gain, offset = 0.1 + 10 * torch.rand(N, G, dtype=torch.float64), 10 * torch.randn(N, G, dtype=torch.float64)
rows, claimed, limits = [], [], []

value = change(norm, x, of_groups(gain) * x + of_groups(offset))
rows.append(("a of 0.1 to 10, b, for each sample and group", "0", "0", shown(value)))
claimed.append(value < ROUNDING)

value, flipped = change(norm, x, -of_groups(gain) * x), change(norm, -x, -of_groups(gain) * x)
rows.append(("a < 0", "", "2: the sign flips", f"{value:.3g}"))
rows.append(("a < 0, against -x", "", "0", shown(flipped)))
limits += [abs(value - 2) < ROUNDING, flipped < ROUNDING]

# with eps: y is s / sqrt(s^2 + eps) long, for s and for a s
for sigma, a in ((1.0, 10.0), (1.0, 0.1), (0.01, 10.0), (0.001, 10.0)):
    small = sigma * x
    var = of_groups(moments(small, "n (g c) h w -> n g", g=G).var)
    ratio = a * ((var + usual.eps) / (a**2 * var + usual.eps)).sqrt()
    y = usual(small)
    expected = (((ratio - 1) * y).norm() / y.norm()).item()
    value = change(usual, small, a * small)
    rows.append((f"eps = 1e-5, sigma = {sigma:g}, a = {a:g}", "0", shown(expected), shown(value)))
    limits.append(abs(value - expected) < 1e-9)

for spread in (0.01, 0.1, 0.5):
    gains = (spread * torch.randn(C, dtype=torch.float64)).exp()[:, None, None]
    value = change(norm, x, gains * x)
    rows.append((f"a gain for each channel, {spread:.0%} apart", "", "not 0", shown(value)))
    limits.append(value > ROUNDING)

tell(
    Claim(
        title="Invariant to gain and offset of a group",
        says="The output is identical for x and for a x + b, with a > 0 and b for each group. Distortions that "
        "differ by channel break this.",
        source="told of group norm: principles and applications",
        expected="Mean and deviation become a mean + b and |a| sigma, so that all of a and b goes, but for the sign "
        "of a. With eps, y grows by a sqrt((s^2 + eps) / (a^2 s^2 + eps)). A gain for each channel stays in y, but "
        "for what is common to the group.",
        columns=("changed", "claimed", "expected change of y", "measured"),
        rows=rows,
        verdict=HOLDS if all(claimed + limits) else IN_PART if all(claimed) else FAILS,
        because="Exactly so for eps = 0, or where the variance is far above eps. For a sigma of 0.01, whose square "
        "is 10 eps, ten times the gain changes 5% of y, and below it the layer hardly normalizes. Gains by channel "
        "change y by about as much as they differ.",
    )
)

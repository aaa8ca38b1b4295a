"""Normalized once or twice: a fixed point, but for eps."""

import torch
from claim import FAILS, HOLDS, Claim, tell

from flexnorm import normalize

torch.manual_seed(0)
PATTERN, SHAPE, G = "n (g c) h w -> n g", (8, 16, 10, 10), 4

rows, holds = [], True
for sigma in (1.0, 0.1, 0.01, 0.001):
    x = sigma * torch.randn(SHAPE, dtype=torch.float64)
    for eps in (0.0, 1e-5):
        once = normalize(x, PATTERN, g=G, eps=eps)
        twice = normalize(once, PATTERN, g=G, eps=eps)
        change = ((twice - once).norm() / once.norm()).item()
        var = once.view(8, G, -1).var(-1, unbiased=False)  # s^2 / (s^2 + eps)
        expected = (1 - (var + eps).rsqrt()).abs().max().item()
        holds = holds and change <= expected + 1e-12
        rows.append((f"{sigma:g}", f"{eps:g}", f"{change:.1e}", f"{expected:.1e}"))

tell(
    Claim(
        title="A normalized tensor is a fixed point",
        says="In the limit of eps = 0 the normalized representation is a fixed point: to normalize again changes "
        "nothing.",
        source="the analogy with the renormalization group, told of group norm",
        expected="With eps = 0 no change beyond rounding. With eps, variance s^2 becomes v = s^2 / (s^2 + eps) at "
        "first, so that the second pass scales by 1 / sqrt(v + eps): a relative change of at most "
        "|1 - 1 / sqrt(v + eps)|, largest where s^2 is not far above eps.",
        columns=("sigma of x", "eps", "relative change", "at most"),
        rows=rows,
        verdict=HOLDS if holds else FAILS,
        because="Without eps the second pass changes the last bits. With eps = 1e-5 the fixed point is approached as "
        "long as the variance of x is far above eps; below it, normalizing again goes on amplifying.",
    )
)

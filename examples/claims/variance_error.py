"""The variance of 2048 values and of 512: of independent ones, and of the features of photographs."""

import math

import torch
from claim import FAILS, HOLDS, IN_PART, Claim, tell
from einops import rearrange
from sklearn.datasets import load_sample_images
from torch import nn

from flexnorm import moments

torch.set_num_threads(1)
C, SIDE, SETS, SEEDS = 64, 16, 20_000, 4
KINDS = {  # m values: 8 channels of one crop; one channel of n crops
    "group norm, 8 channels": ("n (g c) h w -> n g", {"c": 8}, 1),
    "batch norm, batch of 2": ("(b n) c h w -> b c", {"n": 2}, 2),
    "batch norm, batch of 8": ("(b n) c h w -> b c", {"n": 8}, 8),
}


def relative_std(var):
    """Of the variances of many sets (first axis), those of a kind by themselves: spread over mean."""
    return (var.std(0) / var.mean(0)).mean().item()


def independent(m):
    """Of m normal values, by `moments`."""
    return relative_std(torch.cat([moments(torch.randn(1000, m), "s v -> s").var for _ in range(SETS // 1000)]))


def features(photographs):
    """A first and a second layer, untrained: (108 crops, 64, 16, 16)."""
    net = nn.Sequential(nn.Conv2d(3, 32, 3, stride=2), nn.ReLU(), nn.Conv2d(32, C, 3, stride=2))
    maps = [net(photograph)[:, : 6 * SIDE, : 9 * SIDE] for photograph in photographs]
    return torch.cat([rearrange(x, "c (a h) (b w) -> (a b) c h w", h=SIDE, w=SIDE) for x in maps])


def of_crops(x, kind):
    """Of sets of the kind, from crops drawn at random."""
    pattern, sizes, n = KINDS[kind]
    draws = torch.rand(200, len(x)).argsort(1)[:, :n].flatten()
    return relative_std(moments(x[draws], pattern, **sizes).var)


def shuffled(x):
    """The same values of each channel, each at a place of its own: independent of one another."""
    places = torch.rand(C, x[:, 0].numel()).argsort(1)
    return x.movedim(1, 0).flatten(1).gather(1, places).view(C, len(x), SIDE, SIDE).movedim(0, 1)


def effective(r):
    """The number of independent normal values whose variance is as uncertain."""
    return 1 + 2 / r**2


torch.manual_seed(0)
photographs = [torch.tensor(i, dtype=torch.float32).permute(2, 0, 1) / 255 for i in load_sample_images().images]
real, mixed = {kind: [] for kind in KINDS}, {kind: [] for kind in KINDS}
with torch.no_grad():
    for _ in range(SEEDS):  # weights
        x = features(photographs)
        for kind in KINDS:
            real[kind].append(of_crops(x, kind))
            mixed[kind].append(of_crops(shuffled(x), kind))

rows, formula, accurate = [], True, True
for kind, (_, sizes, n) in KINDS.items():
    m = sizes.get("c", 1) * n * SIDE**2
    expected, measured = math.sqrt(2 / (m - 1)), independent(m)
    # SETS variances tell their own spread to 1 / sqrt(2 SETS): four standard errors
    formula = formula and abs(measured / expected - 1) < 4 / math.sqrt(2 * SETS)
    low, high = min(real[kind]), max(real[kind])
    accurate = accurate and high < 2 * expected
    cells = (f"{expected:.1%}", f"{measured:.1%}", f"{sum(mixed[kind]) / SEEDS:.0%}", f"{low:.0%} to {high:.0%}")
    rows.append((kind, str(m), *cells, " to ".join(dict.fromkeys(f"{effective(r):.0f}" for r in (high, low)))))
group, batch = (sum(r) / SEEDS for r in (real["group norm, 8 channels"], real["batch norm, batch of 2"]))
ordered = group < batch / math.sqrt(2)  # claimed is a half: nearer to it than to equal

tell(
    Claim(
        title="The error of the variance, of 2048 values and of 512",
        says="2048 values of one sample (8 channels of 16 x 16) give group norm a highly accurate estimate, with "
        "low error; the relative standard deviation of batch norm's variance, of 512 values in a batch of 2, is "
        "significantly higher.",
        source="told of group norm: applications",
        expected="sqrt(2 / (m - 1)) for m independent normal values: 3.1% against 6.3%. Features of photographs, "
        f"first layers with {SEEDS} draws of weights, should come within twice that, if the claim is to be of use.",
        columns=("set", "values", "formula", "normal values", "shuffled", "photographs", "worth so many values"),
        rows=rows,
        verdict=HOLDS if formula and accurate and ordered else IN_PART if formula else FAILS,
        because="The formula is right for independent values, and for features whose places are shuffled. Values of "
        f"one place, and of one photograph, go together: a set's variance varies by {group:.0%} in group norm and "
        f"{batch:.0%} in batch norm, "
        + (
            "which is no accuracy, and more channels of the same crop do not help; more images do. "
            if not accurate
            else ""
        )
        + "For group norm that spread is no error: a set is all there is, and its own variance is what it is "
        "divided by. Only batch norm, which goes on to use another's, has something to estimate.",
    )
)

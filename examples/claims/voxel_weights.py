"""Volumes with slices of unequal thickness: voxels weighted by their size, against the same body in voxels of 1 mm."""

import torch
from claim import FAILS, HOLDS, Claim, tell

from flexnorm import moments, normalize

torch.manual_seed(0)
N, C, HEIGHT, WIDTH = 2, 3, 16, 16
PLAIN, PER_SLICE, PER_SAMPLE = "n c d h w -> n c", "n c d h w, d -> n c", "n c d h w, n -> n c"

# A body of 96 mm whose tissue changes from top to bottom, scanned finely in its middle and coarsely at its ends.
thickness = torch.tensor([8] * 4 + [2] * 8 + [1] * 16 + [2] * 8 + [4] * 4)
z = torch.linspace(-1, 1, int(thickness.sum()), dtype=torch.float64).view(-1, 1, 1)
y, x = torch.linspace(-1, 1, HEIGHT).view(-1, 1), torch.linspace(-1, 1, WIDTH)
body = torch.stack(
    [
        torch.stack([level * z + torch.exp(-4 * ((z - c / 4) ** 2 + (y + n / 4) ** 2 + x**2)) for c in range(C)])
        for n, level in enumerate((0.5, 2.0))
    ]
)
body = 40 + 12 * (body + 0.1 * torch.randn_like(body))  # of 1 mm
scan = torch.stack([piece.mean(2) for piece in body.split(thickness.tolist(), 2)], 2)  # of a slice, its mean
isotropic = scan.repeat_interleave(thickness, 2)  # resampled: every slice as often as it has mm

unweighted = normalize(scan, PLAIN)
truth = normalize(isotropic, PLAIN)[:, :, thickness.cumsum(0) - 1]
real = moments(body, PLAIN)
CASES = {
    "none": (PLAIN, None),
    "0.37 everywhere": (PER_SLICE, torch.full((len(thickness),), 0.37)),
    "1e-3 and 1e3, by volume": (PER_SAMPLE, torch.tensor([1e-3, 1e3])),
    "thickness": (PER_SLICE, thickness.float()),
    "thickness times 1e3": (PER_SLICE, 1e3 * thickness.float()),
}
# of float64: values of up to 5 sigma, and sums of 10^4 voxels weighed in another order
ROUNDING = 1e-12
change, distance, rows = {}, {}, []
for name, (pattern, weights) in CASES.items():
    m, found = moments(scan, pattern, weights), normalize(scan, pattern, weights)
    change[name], distance[name] = ((found - t).abs().max().item() for t in (unweighted, truth))
    mean = ((m.mean - real.mean).abs() / real.var.sqrt()).max().item()
    deviation = (m.var.sqrt() / real.var.sqrt() - 1).abs().max().item()
    shown = [f"{v:.2f}" if v > ROUNDING else "< 1e-12" for v in (change[name], distance[name], mean)]
    rows.append((name, *shown, f"{deviation:.0%}"))

constant = all(change[name] <= ROUNDING for name in CASES if "thickness" not in name)
# 0.01 sigma is more than a rounding to half precision, and would be seen
varying = all(change[name] > 0.01 and distance[name] <= ROUNDING for name in CASES if "thickness" in name)

tell(
    Claim(
        title="Weights of voxels",
        says="A voxel volume that is the same for all elements of a set factors out of the weighted mean and "
        "variance: the statistics are those without weights. Weights that vary inside a set do change them.",
        source="told of group norm in medical imaging",
        expected="Slices of 1 to 8 mm. Constant weights: no change beyond the rounding of float64, one for all "
        "volumes or one for each. Weights of the slices' thickness: what the same norm without weights makes of the "
        "volume resampled to 1 mm, each slice as often as it has mm. The body itself, of which a thick slice shows "
        "the mean, has the same mean, and the variance inside of thick slices on top.",
        columns=("weights", "from unweighted", "from resampled", "mean, from the body's", "deviation, from the body's"),
        rows=rows,
        verdict=HOLDS if constant and varying else FAILS,
        because="Constant weights change nothing. Those of thickness give the statistics of isotropic voxels "
        "without resampling, up to rounding; without them the finely scanned middle counts too much, and values "
        f"are wrong by up to {distance['none']:.1f} sigma. Against the body itself the mean is right and the "
        "deviation lacks what a thick slice averages out.",
    )
)

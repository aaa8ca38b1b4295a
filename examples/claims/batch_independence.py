"""A sample alone and in company, in training and in evaluation."""

import torch
from claim import FAILS, HOLDS, IN_PART, Claim, tell
from sklearn.datasets import load_digits
from torch import nn

from flexnorm import Norm, calibrate
from flexnorm.images import ChannelGroupNorm

torch.manual_seed(0)
torch.set_num_threads(1)
C, SIZES = 32, (1, 2, 4, 32, 256)
images = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 16
features = nn.Conv2d(1, C, 3, padding=1)(images).detach()  # (1797, 32, 8, 8): sets of 256 values in 8 groups
FEW = 4 * torch.finfo(torch.float32).eps  # design: a set's result is the same within a few eps * max(1, |y|)

norms = {
    "group norm": ChannelGroupNorm(8, C),
    "batch norm": Norm("n c ... -> c", affine="c", c=C, track_running_stats=True),
}
rows, independent = [], {}
for name, norm in norms.items():
    if name == "batch norm":
        calibrate(norm, features.split(256))  # the moments of all 1797 images: evaluation at its best
        norm.track_running_stats = False  # and stays so
    evaluated = norm.eval()(features[:1])
    spread = evaluated.std().item()
    changes = []
    with torch.no_grad():
        for size in SIZES:
            alone = norm.train()(features[:1])
            batch = features[torch.cat([torch.tensor([0]), 1 + torch.randperm(len(features) - 1)[: size - 1]])]
            y = norm(batch)[:1]
            changes.append([(y - other).abs().max().item() for other in (alone, evaluated)])
            in_eval = norm.eval()(batch)[:1]
            changes[-1].append((in_eval - evaluated).abs().max().item())
    limit = FEW * max(1, evaluated.abs().max().item())
    independent[name] = [all(change[k] <= limit for change in changes) for k in range(3)]
    for size, change in zip(SIZES, changes, strict=True):
        shown = ["rounding" if value <= limit else f"{value / spread:.1f} sigma" for value in change]
        rows.append((name, str(size), *shown))

ours, theirs = independent["group norm"], independent["batch norm"]
verdict = HOLDS if all(ours) and not theirs[0] and not theirs[1] else IN_PART if all(ours) else FAILS
worst = max(float(row[2].split()[0]) for row in rows if row[2].endswith("sigma")) if not theirs[0] else 0.0
tell(
    Claim(
        title="Independent of the batch, the same in training and evaluation",
        says="The output for one sample is not influenced by any other sample of the batch, and the operation is "
        "identical in training and inference. Batch norm's is neither.",
        source="told of group norm: principles",
        expected="Of group norm, the first digit's output differs by rounding only (4 eps of float32), whatever is "
        "in the batch beside it. Of batch norm it differs by an amount of the order of the output's own spread, "
        "sigma, that falls as the batch grows. Batch norm in evaluation has fixed statistics, and is independent of "
        "the batch, too.",
        columns=(
            "norm",
            "batch",
            "training, against alone",
            "training, against evaluation",
            "evaluation, against alone",
        ),
        rows=rows,
        verdict=verdict,
        because=f"In company the output of batch norm changes by up to {worst:.1f} sigma in training. Between "
        "training and evaluation it never agrees, though less is missing in large batches.",
    )
)

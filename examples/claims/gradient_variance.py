"""What the variance of a parameter's gradient depends on: the set of the statistics, or what the gradient sums over."""

import torch
import torch.nn.functional as F
from claim import FAILS, HOLDS, IN_PART, Claim, tell
from sklearn.datasets import load_digits
from torch import nn

from flexnorm import Norm, normalize
from flexnorm.images import ChannelGroupNorm

torch.manual_seed(0)
torch.set_num_threads(1)
C, DRAWS = 32, 400
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
labels = torch.tensor(digits.target)
conv, head = nn.Conv2d(1, C, 3, stride=2, padding=1), nn.Linear(C, 10)
features = conv(images).detach()  # (1797, 32, 4, 4)


def variance(norm, size):
    """Of the gradients of weight and of bias over batches of digits, losses averaged: the mean over channels."""
    gradients = []
    for _ in range(DRAWS):
        batch = torch.randint(len(images), (size,))
        loss = F.cross_entropy(head(norm(features[batch]).relu().mean((2, 3))), labels[batch])
        gradients.append(torch.cat(torch.autograd.grad(loss, (norm.weight, norm.bias))))
    return torch.stack(gradients).var(0).view(2, C).mean(1)


def variance_at_input(m):
    """Of the gradient of x, in sets of m normal values, for gradients of the output that are independent, of "
    "variance 1."""
    x = torch.randn(2**20 // m, m, requires_grad=True)
    return torch.autograd.grad(normalize(x, "s m -> s"), x, torch.randn_like(x))[0].var()


def group_norm(groups):
    return ChannelGroupNorm(groups, C)


few, many = 2, 32
batch_norm = Norm("n c ... -> c", affine="c", c=C)
# by a factor of 16: what changes; norm and batch before and after; values in a set and in a sum, before and after
cases = [
    ("channels in a group: 2 to 32", (group_norm(16), 4), (group_norm(1), 4), (32, 512), (64, 64)),
    ("group norm, batch: 2 to 32", (group_norm(4), few), (group_norm(4), many), (128, 128), (32, 512)),
    ("batch norm, batch: 2 to 32", (batch_norm, few), (batch_norm, many), (32, 512), (32, 512)),
]


def times(ratio):
    return f"x {ratio:.2g}"


rows, as_claimed = [], []
for name, before, after, sets, sums in cases:
    ratio = variance(*after) / variance(*before)
    claimed = sets[0] / sets[1]
    as_claimed.append(
        all(claimed / 2 < r < claimed * 2 for r in ratio.tolist())
    )  # 16 apart: nearer than that is no accident
    summed = ratio * (after[1] / before[1]) ** 2  # a sum is size times a mean
    spans = [f"{a} to {b}" if a != b else f"{a}" for a, b in (sets, sums)]
    for parameter, mean, total in zip(("weight", "bias"), ratio.tolist(), summed.tolist(), strict=True):
        rows.append((name, *spans, parameter, times(claimed), times(mean), times(total)))
at_input = (variance_at_input(256) / variance_at_input(16)).item()
rows.append(("normal values", "16 to 256", "1", "x", times(1 / 16), times(at_input), ""))

between = (variance(group_norm(4), few) / variance(batch_norm, few)).tolist()
alone, batch, together = as_claimed
tell(
    Claim(
        title="The variance of gradients and the size of the sets",
        says="The variance of the stochastic gradient of weight and bias is inversely proportional to the number of "
        "elements used to compute the statistics, so that group norm's, whose sets are large, is lower than batch "
        "norm's when the batch is small. The variance of the gradient of x is inversely related to that number, too.",
        source="told of group norm: principles and applications",
        expected="As claimed, sets 16 times as large divide the variance by 16, and a larger batch does nothing for "
        "group norm. But the gradient of a weight or bias is a sum over all places of its channel, batch times H "
        "times W, whatever the sets: its variance should fall as 1 / batch if losses are averaged, and grow as "
        "batch if they are summed. That of x, m independent values in a set, should be var(dy) (m - 2) / (m - 3) / "
        "var(x), which goes to a constant.",
        columns=(
            "what changes",
            "values in a set",
            "in a sum",
            "gradient of",
            "claimed",
            "losses averaged",
            "losses summed",
        ),
        rows=rows,
        verdict=HOLDS if all(as_claimed) else IN_PART if together and (alone or batch) else FAILS,
        because="Sets alone, 16 times as large, lower no variance. The batch does, by 1 / batch in both norms: it "
        "is the number of values that the gradient sums over. In batch norm the two numbers are one, which makes "
        f"the claim look true there. In a batch of {few} digits the variance of group norm (G = 4, sets of 128) is "
        f"{between[0]:.1f} times that of batch norm (sets of 32) for the weight and {between[1]:.1f} times for the "
        "bias. That of x hardly depends on the set.",
    )
)

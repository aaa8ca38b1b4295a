"""Handwritten digits: GroupNorm against BatchNorm in batches of 2 and of 32; then padding, which does not count."""

# %%
from itertools import pairwise

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from flexnorm import given
from flexnorm.images import ChannelGroupNorm

torch.set_num_threads(1)  # the layers are small
NORMS = {"GroupNorm": ChannelGroupNorm.for_channels, "BatchNorm": nn.BatchNorm2d}  # both: channels -> layer

# %% Data: 1797 real digits, of which a training sees 500
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16  # (N, 1, 8, 8)
labels = torch.tensor(digits.target)


# %% The model takes its norm as torchvision's models do. The last convolution has one pixel left to normalize
def cnn(norm_layer):
    widths = (1, 32, 64, 64)
    blocks = [
        nn.Sequential(nn.Conv2d(a, b, 3, stride=2, padding=1, bias=False), norm_layer(b), nn.ReLU())
        for a, b in pairwise(widths)
    ]
    return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(64, 10))


def accuracy(norm_layer, batch_size, epochs=3):
    """Of a trained model, on the digits that it has not seen."""
    torch.manual_seed(0)
    model = cnn(norm_layer)
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3 * (batch_size / 32) ** 0.5)
    for _ in range(epochs):
        for batch in torch.randperm(500).split(batch_size):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    with torch.no_grad():
        return float((model.eval()(images[500:]).argmax(1) == labels[500:]).float().mean())


print("Accuracy on 1297 digits after 3 epochs of 500\n")
print("batch size" + "".join(f"{name:>12}" for name in NORMS))
for batch_size in (2, 32):
    print(f"{batch_size:>10}" + "".join(f"{accuracy(norm, batch_size):>12.1%}" for norm in NORMS.values()))
print("\nOf 2 values, BatchNorm leaves the sign of their difference. GroupNorm does not see the other images.\n")

# %% Images of several sizes in one batch: padding does not count
torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(1, 16, 1), ChannelGroupNorm.for_channels(16, activation="silu"))
cut = images[0:1, :, :, 2:7]  # the digit without its margins
batch = torch.cat([F.pad(cut, (0, 3)), images[1:2]])
mask = torch.ones(2, 8, 8, dtype=torch.bool)
mask[0, :, 5:] = False

with torch.no_grad():
    alone, without = model(cut), model(batch)[:1, ..., :5]
    with given(mask=mask):  # nn.Sequential passes no mask on
        with_mask = model(batch)[:1, ..., :5]
print("A digit of 8x5 pixels, padded to 8x8 beside another, differs from itself alone by")
print(f"  {(without - alone).abs().max():.1e} without a mask")
print(f"  {(with_mask - alone).abs().max():.1e} with one")

"""A norm that no library has, in one line: every patch of an image by its own statistics, so that light counts less.

Saves a picture, own_norm.png, in the folder that is the first argument, or in a temporary one.
"""

# %%
import sys
import tempfile
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_sample_images

from flexnorm import Norm

# %% The one line: a patch of h x w pixels, of all colours, is a set
patch_norm = Norm("n c (y h) (x w) -> n y x", h=32, w=32)

# %% Two photographs, and the same under a lamp that stands at the left
photographs = torch.stack([torch.tensor(image) for image in load_sample_images().images]).permute(0, 3, 1, 2) / 255
photographs = photographs[:, :, :416, :640]
light = torch.linspace(1.2, 0.2, 640)

norms = {"LayerNorm of the image": lambda x: F.layer_norm(x, x.shape[1:]), "the one line": patch_norm}
print(f"{patch_norm}\n\nmean change of two photographs by a lamp (their deviation is 1)")
for name, norm in norms.items():
    print(f"  {name:<24}{(norm(photographs * light) - norm(photographs)).abs().mean():.2f}")

# %% The oracle of it is a loop over patches
independent = torch.empty_like(photographs)
for y in range(0, 416, 32):
    for x in range(0, 640, 32):
        patch = photographs[:, :, y : y + 32, x : x + 32]
        independent[:, :, y : y + 32, x : x + 32] = F.layer_norm(patch.double(), patch.shape[1:])
difference = (patch_norm(photographs) - independent).abs().max()
print(f"\nIt differs from layer_norm in float64, called on every patch, by {difference:.1e} at most.")

# %% A picture
folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
folder.mkdir(parents=True, exist_ok=True)
figure, axes = plt.subplots(2, 2, figsize=(10, 7), layout="constrained")
for row, x in zip(axes, (photographs[0], photographs[0] * light), strict=True):
    row[0].imshow(x.permute(1, 2, 0).clamp(0, 1).numpy())
    row[1].imshow((patch_norm(x[None])[0].permute(1, 2, 0) / 6 + 0.5).clamp(0, 1).numpy())
for axis, title in zip(axes.flat, ("photograph", "one norm a patch", "under a lamp", "one norm a patch"), strict=True):
    axis.set_title(title)
    axis.set_axis_off()
figure.savefig(folder / "own_norm.png", dpi=80)
print(f"Saved {folder / 'own_norm.png'}")

"""A trained net with batch norms goes on with group norms: at once, and in small steps.

    python examples/conversion.py

scikit-learn's digits (1797 images of 8 x 8), three seeds; the net is trained with batches of 64, and must go on with
batches of 4, as on a smaller machine. Whatever comes out is printed.
"""

# %%
import copy

import torch
from sklearn.datasets import load_digits
from torch import nn

from flexnorm import convert, recommend
from flexnorm.transition import advance, finish

torch.set_num_threads(1)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
labels = torch.tensor(digits.target)


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c, c, 3, padding=1, bias=False), nn.BatchNorm2d(c)
        self.conv2, self.bn2 = nn.Conv2d(c, c, 3, padding=1, bias=False), nn.BatchNorm2d(c)

    def forward(self, x):
        return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


def net():
    stem = [nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()]
    return nn.Sequential(
        *stem, Block(32), nn.MaxPool2d(2), Block(32), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)
    )


def trained(model, seen, batch, updates, lr):
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    for _ in range(updates):
        which = seen[torch.randint(len(seen), (batch,))]
        loss = nn.functional.cross_entropy(model(images[which]), labels[which])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        advance(model)  # one step of the transitions, if there are any
    return model


@torch.no_grad()
def accuracy(model, unseen):
    return (model.eval()(images[unseen]).argmax(1) == labels[unseen]).float().mean().item()


# %% what would be right for batches of 4, and what changes
torch.manual_seed(0)
model = net()
print(recommend(model, batch_size=4, x=images[:4]), "\n")
_, report = convert(model, "group", probe=images[:64], dry_run=True)
print(report, "\n")

# %% three ways to go on
STEPS = 150
rows = []
for seed in range(3):
    torch.manual_seed(seed)
    seen, unseen = torch.randperm(len(images)).split([1000, 797])
    model = trained(net(), seen, 64, 150, 0.05)
    row = {"trained": accuracy(model, unseen)}
    kept, at_once = copy.deepcopy(model), convert(copy.deepcopy(model), "group")[0]
    gradual, _ = convert(copy.deepcopy(model), "group", steps=STEPS)
    row["group norms, nothing trained"] = accuracy(at_once, unseen)
    for name, other in {"batch norms go on": kept, "at once": at_once, "in steps": gradual}.items():
        torch.manual_seed(seed)
        trained(other, seen, 4, 2 * STEPS, 0.01)
        row[name] = accuracy(finish(other) if other is gradual else other, unseen)
    rows.append(row)

print(f"accuracy on unseen digits; {2 * STEPS} updates with batches of 4, {STEPS} of them in transition")
for name in rows[0]:
    values = torch.tensor([row[name] for row in rows])
    print(f"  {name:<30} {values.mean():6.1%}   (seeds: {', '.join(f'{v:.1%}' for v in values)})")

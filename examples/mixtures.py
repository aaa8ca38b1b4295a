"""What mixtures of norms choose: Switchable Norm on digits, trained in batches of 2 and of 32.

    python examples/mixtures.py

Its authors found that the weight of batch norm falls as batches shrink (Luo et al., 2019, of ResNets on ImageNet). Here
it is a small net, equal numbers of images for both sizes, three seeds, and whatever comes out is printed.
"""

# %%
import torch
from sklearn.datasets import load_digits
from torch import nn

from flexnorm import explain
from flexnorm.mixtures import ContextNorm, DualNorm, SwitchableNorm

torch.set_num_threads(1)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
labels = torch.tensor(digits.target)
print(explain(SwitchableNorm(16), (8, 16, 8, 8)), "\n")


def net(norm_layer):
    blocks = [(1, 16), (16, 32)]
    convs = [
        nn.Sequential(nn.Conv2d(a, b, 3, padding=1, bias=False), norm_layer(b), nn.ReLU(), nn.MaxPool2d(2))
        for a, b in blocks
    ]
    return nn.Sequential(*convs, nn.Flatten(), nn.Linear(32 * 4, 10))


def trained(norm_layer, batch, seed, epochs=2, seen=400):
    """The net after so many epochs, and its accuracy on the digits that it has not seen."""
    torch.manual_seed(seed)
    order, model = torch.randperm(len(images)), net(norm_layer)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3 * (batch / 32) ** 0.5)
    for _ in range(epochs):
        for which in order[:seen][torch.randperm(seen)].split(batch):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[which]), labels[which]).backward()
            optimizer.step()
    unseen = order[seen:]
    with torch.no_grad():
        return model, (model.eval()(images[unseen]).argmax(1) == labels[unseen]).float().mean()


# %% shares of instance, layer and batch norm, of both layers' means and variances together
print("batch  accuracy   shares of instance, layer, batch")
for batch in (2, 32):
    found, shares = [], []
    for seed in range(3):
        model, accuracy = trained(SwitchableNorm, batch, seed)
        found.append(accuracy)
        gates = [m.gate for m in model.modules() if isinstance(m, SwitchableNorm)]
        shares.append(torch.stack([w.detach().softmax(0) for gate in gates for w in gate.parameters()]).mean(0))
    mean, spread = torch.stack(shares).mean(0), torch.stack(shares).std(0)
    said = ", ".join(f"{m:.2f} ± {s:.2f}" for m, s in zip(mean, spread, strict=True))
    print(f"{batch:5}  {torch.stack(found).mean():6.1%}     {said}")

# %% the other two, in batches of 2, with the same seeds
for name, norm_layer in {"DualNorm": lambda c: DualNorm(4, c), "ContextNorm": lambda c: ContextNorm(4, c)}.items():
    values = torch.stack([trained(norm_layer, 2, seed)[1] for seed in range(2)])
    print(f"{name}, batches of 2: {values.mean():.1%}   (seeds: {', '.join(f'{v:.1%}' for v in values)})")

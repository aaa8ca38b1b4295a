"""Graph networks with norms and without: Zachary's karate club in a deep GCN, handwritten digits as graphs.

Prints the accuracies, and how much the other graphs of a batch change the outcome of one.
"""

# %%
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch_geometric.data import Batch, Data
from torch_geometric.datasets import KarateClub
from torch_geometric.nn import GCN, GIN, global_add_pool

from flexnorm.graphs import BatchNorm, GraphGroupNorm, GraphNorm, partition

torch.set_num_threads(1)  # the graphs are small
CHANNELS = 32
NORMS = {
    "none": lambda: None,
    "BatchNorm": lambda: BatchNorm(CHANNELS),
    "GraphNorm": lambda: GraphNorm(CHANNELS),
    "GraphGroupNorm": lambda: GraphGroupNorm(4, CHANNELS),
}

# %% One graph: 34 members of a karate club, 4 factions, one labelled member of each
DEPTHS, SEEDS = (2, 5, 8), range(2)
club = KarateClub()[0]


def factions(norm, depth, seed, steps=40):
    """The share of the other 30 members whose faction a GCN of this depth finds."""
    torch.manual_seed(seed)
    model = GCN(club.num_features, CHANNELS, depth, out_channels=4, norm=norm())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=5e-4)
    for _ in range(steps):
        loss = F.cross_entropy(model(club.x, club.edge_index)[club.train_mask], club.y[club.train_mask])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        right = model.eval()(club.x, club.edge_index).argmax(1) == club.y
    return float(right[~club.train_mask].float().mean())


found = {
    name: [sum(factions(norm, depth, seed) for seed in SEEDS) / len(SEEDS) for depth in DEPTHS]
    for name, norm in NORMS.items()
}
print(f"Karate club: members in the right faction, GCNs of {', '.join(map(str, DEPTHS))} layers")
for name, shares in found.items():
    print(f"  {name:<15}", *(f"{share:6.0%}" for share in shares))


# %% Many graphs: digits whose nodes are pixels with ink, and whose edges join neighbours
def as_graph(image, label):
    place = image.nonzero()
    edges = ((place[:, None] - place[None]).abs().amax(-1) == 1).nonzero().T
    features = torch.cat([image[image > 0][:, None] / 16, F.one_hot(place, 8).flatten(1)], dim=1)
    return Data(x=features, edge_index=edges, y=label)


class Classifier(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.body = GIN(17, CHANNELS, num_layers=2, norm=norm, jk="cat")
        self.head = nn.Linear(CHANNELS, 10)

    def forward(self, data):
        graphs = partition(data)  # made once, for all layers
        x = self.body(data.x, data.edge_index, batch=graphs)
        return self.head(global_add_pool(x, data.batch, data.num_graphs) / 32)


images, labels = (torch.tensor(t) for t in load_digits(return_X_y=True))
digits = [as_graph(image, label) for image, label in zip(images.float().view(-1, 8, 8), labels, strict=True)]
train = [Batch.from_data_list(digits[start : start + 16]) for start in range(0, 640, 16)]
test = Batch.from_data_list(digits[640:1280])


def classify(norm, epochs=4):
    """The share of test digits that are read, and the model."""
    torch.manual_seed(0)
    model = Classifier(norm())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(epochs):
        for i in torch.randperm(len(train)):
            loss = F.cross_entropy(model(train[i]), train[i].y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        return float((model.eval()(test).argmax(1) == test.y).float().mean()), model


print("\nDigits as graphs: read rightly by a GIN of 2 layers")
models = {}
for name, norm in NORMS.items():
    share, models[name] = classify(norm)
    print(f"  {name:<15} {share:6.0%}")

# %% What stands beside a graph in its batch does not change it
one = Batch.from_data_list(digits[640:641])
print("\nThe first digit alone and among 640, in training mode: largest difference of the logits")
for name in ("BatchNorm", "GraphNorm", "GraphGroupNorm"):
    model = models[name].train()
    with torch.no_grad():
        print(f"  {name:<15} {float((model(one)[0] - model(test)[0]).abs().max()):.0e}")

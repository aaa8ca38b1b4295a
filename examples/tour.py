"""Images, text, graphs and speech: each normalized by the layer of its field, and compared with an independent result.

Prints a table and a proof about padding. If a number is outside of the bound derived for it, names it and exits with 1.
"""

# %%
import ast
import codecs
import importlib.util
import re
import sys
import wave
from pathlib import Path

import networkx as nx
import torch
import torch.nn.functional as F
import torchaudio
from sklearn.datasets import load_sample_images
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch_geometric.data import Batch, Data
from torch_geometric.datasets import KarateClub
from torch_geometric.nn import GCNConv
from torch_geometric.utils import from_networkx, to_networkx

from flexnorm import Norm, moments
from flexnorm.graphs import GraphGroupNorm, partition
from flexnorm.images import ChannelGroupNorm
from flexnorm.sequences import SequenceGroupNorm, TokenGroupNorm
from flexnorm.spectrograms import MelBandNorm

EPS = 1e-12  # so small that every variance becomes 1 to rounding: with eps it becomes v / (v + eps)
FLOAT32 = torch.finfo(torch.float32).eps
SPEECH = Path(__file__).parent / "data" / "speech.wav"

HEADER = ("data", "layer", "pattern", "sets", "elements", "|mean|", "|var-1|", "diff")
rows, shares, failures = [], [], []


def check(what, value, bound):
    """The value as text. It is noted which share of its bound it takes, and whether it fails; a NaN always does."""
    value, bound = float(value), float(bound)
    shares.append(value / bound if bound else value)
    if not value <= bound:
        failures.append(f"{what} is {value:.1e}, and may be {bound:.1e}")
    return f"{value:.1e}"


def compare(data, x, norm, given, pattern, independent, mask=None, **names):
    """A row of the table: moments of norm(x, **given) by the pattern, and how far it is from what is independent."""
    y = norm(x, **given)

    before, after = (moments(t.double(), pattern, mask, **names) for t in (x, y))
    real = before.count > 0  # a token of padding is a set without elements
    count, mean, var = before.count[real], before.mean[real], before.var[real]
    # An element may err by what flexnorm promises for float32, a mean of elements by no more than they do, and the
    # variance of y + e by 2 mean(|y e|) + mean(e^2), where mean(|y|) <= 1.
    error = 4 * FLOAT32 * ((mean.abs() / (var + EPS).sqrt()).max() + independent.abs().max()) + 1e-6
    found = (
        check(f"{data}, {pattern}: |mean|", after.mean[real].abs().max(), error),
        check(f"{data}, {pattern}: |var-1|", (after.var[real] - 1).abs().max(), 2 * error + error**2 + EPS / var.min()),
        check(f"{data}, {pattern}: diff", (y - independent).abs().max(), error),
    )
    sizes = sorted({int(count.min()), int(count.max())})
    rows.append((data, type(norm).__name__, pattern, str(count.numel()), "..".join(map(str, sizes)), *found))


# %% Images: two photographs through a convolution
@torch.no_grad()
def photographs(channels=32):
    """[n, c, h, w], as the first layer of a network makes it: in channels-last memory, as photographs lie."""
    torch.manual_seed(0)
    pixels = torch.stack([torch.tensor(image) for image in load_sample_images().images])
    stem = nn.Conv2d(3, channels, kernel_size=7, stride=4)
    return stem(pixels.permute(0, 3, 1, 2) / 255)


x = photographs()
norm = ChannelGroupNorm(8, 32, eps=EPS, affine=False)
compare("2 photographs", x, norm, {}, "n (g c) h w -> n g", F.group_norm(x.double(), 8, eps=EPS), g=8)


# %% Text: sentences of different lengths in one padded batch
@torch.no_grad()
def zen(channels=48):
    """The Zen of Python: embedded words [b, t, c], and the mask [b, t] that is True where a word is."""
    source = Path(importlib.util.find_spec("this").origin).read_text(encoding="utf-8")
    coded = ast.literal_eval(ast.parse(source).body[0].value)  # the module prints on import, so it is only read
    lines = [re.findall(r"[\w']+|[^\w\s]", line.lower()) for line in codecs.decode(coded, "rot13").splitlines() if line]
    vocabulary = ["<padding>", *sorted({word for line in lines for word in line})]
    ids = pad_sequence([torch.tensor([vocabulary.index(word) for word in line]) for line in lines], batch_first=True)
    torch.manual_seed(0)
    return nn.Embedding(len(vocabulary), channels, padding_idx=0)(ids), ids > 0


def one_by_one(norm, x, mask):
    """The norm of every sequence alone, in float64 and without its padding."""
    return pad_sequence([norm(words[real]) for words, real in zip(x.double(), mask, strict=True)], batch_first=True)


def per_token(words):
    return F.group_norm(words, 8, eps=EPS)


def per_utterance(words):
    return F.group_norm(words.T[None], 8, eps=EPS)[0].T


words, mask = zen()
norm, alone = TokenGroupNorm(8, 48, eps=EPS, affine=False), one_by_one(per_token, words, mask)
compare("Zen of Python", words, norm, {"mask": mask}, "b t (g c), b t -> b t g", alone, mask, g=8)
norm, alone = (
    SequenceGroupNorm(8, 48, eps=EPS, affine=False, channels_last=True),
    one_by_one(per_utterance, words, mask),
)
compare("Zen of Python", words, norm, {"lengths": mask.sum(1)}, "b t (g c), b t -> b g", alone, mask, g=8)


# %% Graphs: four social networks in one batch
def described(graph):
    """A graph with eight numbers for every node that say how it lies in the graph."""
    numbers = (
        dict(graph.degree),
        nx.clustering(graph),
        nx.average_neighbor_degree(graph),
        nx.core_number(graph),
        nx.betweenness_centrality(graph),
        nx.closeness_centrality(graph),
        nx.eccentricity(graph),
        nx.pagerank(graph),
    )
    features = torch.tensor([[float(number[node]) for number in numbers] for node in graph])
    return Data(x=features, edge_index=from_networkx(graph).edge_index)


@torch.no_grad()
def networks(channels=32):
    """[v, c] after a graph convolution, and the batch that says which nodes are whose."""
    karate = to_networkx(KarateClub()[0], to_undirected=True)
    others = nx.les_miserables_graph(), nx.florentine_families_graph(), nx.davis_southern_women_graph()
    batch = Batch.from_data_list([described(graph) for graph in (karate, *others)])
    torch.manual_seed(0)
    return GCNConv(batch.num_features, channels)(batch.x, batch.edge_index), batch


def graph_by_graph(x, batch):
    parts = x.double().split([graph.num_nodes for graph in batch.to_data_list()])
    return torch.cat([F.group_norm(nodes.T[None], 8, eps=EPS)[0].T for nodes in parts])


x, batch = networks()
graphs = partition(batch)
norm = GraphGroupNorm(8, 32, eps=EPS, affine=False)
compare("4 networks", x, norm, {"batch": graphs}, "v (g c) -> batch[v] g", graph_by_graph(x, batch), g=8, batch=graphs)


# %% Speech: mel bands of unequal width
def mel_spectrogram(seconds=3):
    """Clips of one second from a recording, as decibels [n, f, t] of 80 mels."""
    with wave.open(str(SPEECH)) as recording:
        rate = recording.getframerate()
        samples = torch.frombuffer(bytearray(recording.readframes(seconds * rate)), dtype=torch.int16) / 32768
    mel = torchaudio.transforms.MelSpectrogram(rate, n_fft=1024, win_length=400, hop_length=160, n_mels=80)
    return torchaudio.transforms.AmplitudeToDB(top_db=80)(mel(samples.view(seconds, rate)))


def band_by_band(x, widths):
    return torch.cat([F.layer_norm(band, band.shape[1:], eps=EPS) for band in x.double().split(widths, dim=1)], dim=1)


x = mel_spectrogram()
widths = [5, 5, 6, 8, 10, 12, 14, 20]
norm = MelBandNorm(widths, eps=EPS, affine=None)
band = norm.labels["band"]
compare("speech, 3 s", x, norm, {}, "n f t -> n band[f]", band_by_band(x, widths), band=band)


# %% The table
def print_table():
    widths = [max(map(len, column)) for column in zip(HEADER, *rows, strict=True)]
    for row in (HEADER, *rows):
        texts = [f"{cell:<{width}}" for cell, width in zip(row[:3], widths[:3], strict=True)]
        numbers = [f"{cell:>{width}}" for cell, width in zip(row[3:], widths[3:], strict=True)]
        print("  ".join(texts + numbers))


print("Real images, text, graphs and speech: one pattern each, compared with torch.nn.functional part by part\n")
print_table()
print(f"""
elements          fewest..most in a set
|mean|, |var-1|   of the normalized sets, the largest, in float64
diff              largest difference from group_norm or layer_norm, called in float64 on every part alone
eps = {EPS:g}       so that a variance becomes 1 to rounding: it becomes v / (v + eps)
""")


# %% Padding does not count: neither what it holds nor how much there is
def outcome(norm, x, mask, dy):
    """The output, and the gradients of x, weight and bias."""
    x = x.clone().requires_grad_()
    y = norm(x, mask)
    return y.detach(), *torch.autograd.grad(y, (x, *norm.parameters()), dy)


def prove_padding(pattern, x, mask, more=50):
    """Compares outcomes for padding of zeros, for padding of NaN, and for more padding."""
    torch.manual_seed(0)
    norm = Norm(pattern, affine="(g c)", g=8, sizes={"(g c)": x.shape[-1]})
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    dy = torch.randn_like(x)
    plain = outcome(norm, x, mask, dy)

    poisoned = outcome(norm, x.where(mask[..., None], torch.nan), mask, dy)
    changed = sum(not torch.equal(a, b) for a, b in zip(plain, poisoned, strict=True))
    check(f"{pattern}: number of tensors that NaN in the padding changes", changed, 0)

    longer, longer_dy = (F.pad(t, (0, 0, 0, more)) for t in (x, dy))
    y, dx, *others = outcome(norm, longer, F.pad(mask, (0, more)), longer_dy)
    pairs = zip(plain, (y[:, :-more], dx[:, :-more], *others), strict=True)
    apart = torch.stack([(b - a).abs().max() / a.abs().max().clamp(min=1) for a, b in pairs]).max()
    # Sums of the same numbers in another order: a few roundings.
    apart = check(f"{pattern}: relative difference by more padding", apart, 16 * FLOAT32)

    print(f"  {pattern:<23}  of NaN: {'bit for bit the same' if changed == 0 else 'NOT THE SAME'}", end="")
    print(f"; {more} columns longer: the same to {apart} of the largest value")


def without_mask(x, mask):
    """How far off group_norm, which knows no mask, is at the words."""
    padded = F.group_norm(x.double().mT, 8, eps=EPS).mT
    return float((padded - one_by_one(per_utterance, x, mask))[mask].abs().max())


print(f"Padding ({1 - mask.float().mean():.0%} of the text's batch) does not count, in y, dx, dweight and dbias:")
prove_padding("b t (g c), b t -> b t g", words, mask)
prove_padding("b t (g c), b t -> b g", words, mask)
print(f"  group_norm of torch knows no mask, and is off by up to {without_mask(words, mask):.1f} on this batch")

# %% The verdict
if failures:
    sys.exit("\nOutside of its bound:\n  " + "\n  ".join(failures))
print(
    f"\nAll {len(shares)} numbers are within their bounds for float32; the nearest is at {max(shares):.0%} of its own."
)

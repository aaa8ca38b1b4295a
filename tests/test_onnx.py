"""ONNX: a layer exported with dynamic axes is, in onnxruntime and at other sizes, what it is in eager mode.

Both compute in float32. onnxruntime sums one number after another, so a sum of k numbers may be off by k roundings, and
a mean or a variance with it: |err| <= k * eps * (1 + |y|), with k the elements of the largest set, times the largest
weight.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass

import onnx
import onnxruntime
import pytest
import torch
from exported import Lengths
from torch import nn
from torch.export import Dim

from flexnorm import Norm, Partition
from flexnorm.images import ChannelGroupNorm
from flexnorm.sequences import SequenceGroupNorm, TokenGroupNorm
from flexnorm.spectrograms import MelBandNorm

# torch's own, of the copies that it makes of its trees
pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.`")

D = Dim.DYNAMIC
EPS = torch.finfo(torch.float32).eps


class Graph(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = Norm("v c, v -> graph[v] c", graph=5, affine="c", c=6)

    def forward(self, x, graph, mask):
        return self.norm(x, mask, graph=graph)


def images(n, s):
    return (torch.randn(n, 6, s, s + 1),)


def sequences(n, s):
    return (torch.randn(n, 6, s),)


def mask(*shape):
    return torch.rand(*shape) < 0.7


def lengths(n, s):
    return torch.cat([torch.randint(0, s + 1, (n - 1,)), torch.tensor([s])])


@dataclass(frozen=True)
class Case:
    layer: Callable
    arguments: Callable  # of batch and time
    dynamic: tuple
    largest: Callable  # elements of a set, 4 at least: so many roundings there are without sums


IMAGE, IMAGE_MASK = {0: D, 2: D, 3: D}, {0: D, 1: D, 2: D}
CHANNELS, FRAMES = {0: D, 2: D}, {0: D, 1: D}


def time(channels):
    return lambda n, s: channels * s


def area(channels):
    return lambda n, s: channels * s * (s + 1)


CASES = {
    "group": Case(lambda: Norm("n (g c) ... -> n g", affine="(g c)", g=2, c=3), images, (IMAGE,), area(3)),
    "layer": Case(lambda: Norm("n c ... -> n", affine="c", c=6), images, (IMAGE,), area(6)),
    "rms": Case(
        lambda: Norm("... c -> ...", affine="c", c=6, center=False),
        lambda n, s: (torch.randn(n, s, 6),),
        (FRAMES,),
        lambda n, s: 6,
    ),
    "running": Case(
        lambda: Norm("n c ... -> c", affine="c", c=6, track_running_stats=True), images, (IMAGE,), lambda n, s: 4
    ),
    "masked_silu": Case(
        lambda: Norm("b (g c) t, b t -> b g", affine="(g c)", g=2, c=3, activation="silu"),
        lambda n, s: (*sequences(n, s), mask(n, s)),
        (CHANNELS, FRAMES),
        time(3),
    ),
    "weighted": Case(
        lambda: Norm("b c t, b t -> b", affine="c", c=6),
        lambda n, s: (*sequences(n, s), torch.rand(n, s)),
        (CHANNELS, FRAMES),
        time(6),
    ),
    "static_label": Case(
        lambda: Norm("n c f t -> n c band[f]", affine="f", f=6, band=Partition.from_sizes([2, 3, 1])),
        lambda n, s: (torch.randn(n, 2, 6, s),),
        ({0: D, 3: D},),
        time(3),
    ),
    "labels_and_mask": Case(
        Graph,
        lambda n, s: (torch.randn(n * s, 6), torch.randint(0, 5, (n * s,)), mask(n * s)),
        ({0: D}, {0: D}, {0: D}),
        lambda n, s: n * s,
    ),
    "channel_mask": Case(
        lambda: ChannelGroupNorm(2, 6, activation="silu"),
        lambda n, s: (*images(n, s), mask(n, s, s + 1)),
        (IMAGE, IMAGE_MASK),
        area(3),
    ),
    "token_mask": Case(
        lambda: TokenGroupNorm(2, 6),
        lambda n, s: (torch.randn(n, s, 6), mask(n, s)),
        (FRAMES, FRAMES),
        lambda n, s: 4,
    ),
    "sequence_lengths": Case(
        lambda: Lengths(SequenceGroupNorm(2, 6)),
        lambda n, s: (*sequences(n, s), lengths(n, s)),
        (CHANNELS, {0: D}),
        time(3),
    ),
    "mel_bands": Case(
        lambda: Lengths(MelBandNorm([2, 3, 1])),
        lambda n, s: (*sequences(n, s), lengths(n, s)),
        (CHANNELS, {0: D}),
        time(3),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_onnxruntime_gives_what_eager_gives(name):
    case = CASES[name]
    layer = case.layer()
    for p in layer.parameters():
        nn.init.normal_(p)
    if name == "running":
        layer(3 * images(8, 5)[0] + 2)
    layer.eval()
    arguments = case.arguments(3, 5)
    program = torch.onnx.export(layer, arguments, dynamo=True, dynamic_shapes=case.dynamic, verbose=False)
    file = io.BytesIO()
    program.save(file)
    onnx.checker.check_model(onnx.load_from_string(file.getvalue()))
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    for n, s in ((3, 5), (2, 9), (1, 4)):
        arguments = case.arguments(n, s)
        names = [node.name for node in session.get_inputs()]
        given = {name: t.numpy() for name, t in zip(names, arguments, strict=True)}
        y, expected = torch.from_numpy(session.run(None, given)[0]), layer(*arguments).detach()
        assert expected.abs().max() > 0.1
        gain = max([1.0, *(p.abs().max().item() for p in layer.parameters())])
        assert ((y - expected).abs() <= case.largest(n, s) * EPS * gain * (1 + expected.abs())).all()

"""torch.export: with dynamic axes, saved, loaded, and run at other sizes, a layer is what it is in eager mode.

Exported graphs hold the composition, eager calls run the kernels: in float64 both round sums of some hundred elements,
so they agree to 1e-12, and gradients to 1e-10.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from exported import Lengths
from torch import nn
from torch.export import Dim

from flexnorm import Moments, Norm, Partition, moments, normalize
from flexnorm.images import ChannelGroupNorm
from flexnorm.sequences import SequenceGroupNorm, TokenGroupNorm
from flexnorm.spectrograms import MelBandNorm

# torch's own, of its loader: it reads tensors from immutable bytes
pytestmark = [
    pytest.mark.filterwarnings("ignore:The given buffer is not writable"),
    # and of the copies that it makes of its own trees
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.`"),
]

D = Dim.DYNAMIC


class Graph(nn.Module):
    """Labels come by keyword, and dynamic_shapes has no way to name those."""

    def __init__(self, pattern="v c -> graph[v] c", **kwargs):
        super().__init__()
        self.norm = Norm(pattern, affine="c", c=6, **kwargs)

    def forward(self, x, graph, mask=None):
        return self.norm(x, mask, graph=graph)


class Packed(Lengths):
    def forward(self, x, cu_seqlens):
        return self.norm(x, cu_seqlens=cu_seqlens)


class Conditional(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = Norm("n (g c) t -> n g", g=2, c=3, affine="(g c)", conditional="n (g c)")

    def forward(self, x, weight, bias):
        return self.norm(x, weight=weight, bias=bias)


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def mask(*shape):
    return torch.rand(*shape) < 0.7


def weights(*shape):
    return torch.rand(*shape, dtype=torch.float64)


def ids(size):
    return torch.randint(0, 5, (size,))


def lengths(n, s):
    return torch.cat([torch.randint(0, s + 1, (n - 1,)), torch.tensor([s])])


@dataclass(frozen=True)
class Case:
    layer: Callable
    arguments: Callable  # of batch and time
    dynamic: tuple
    sizes: tuple = ((2, 7), (5, 3), (1, 4), (4, 2), (6, 1))  # of batch and time; exported is (3, 5)


IMAGE, IMAGE_MASK = {0: D, 2: D, 3: D}, {0: D, 1: D, 2: D}
CHANNELS, FRAMES = {0: D, 2: D}, {0: D, 1: D}


def images(n, s):
    return (randn(n, 6, s, s + 1),)


def sequences(n, s):
    return (randn(n, 6, s),)


CASES = {
    "group": Case(lambda: Norm("n (g c) ... -> n g", affine="(g c)", g=2, c=3), images, (IMAGE,)),
    "layer": Case(lambda: Norm("n c ... -> n", affine="c", c=6), images, (IMAGE,)),
    "layer_last": Case(lambda: Norm("... c -> ...", affine="c", c=6), lambda n, s: (randn(n, s, 6),), (FRAMES,)),
    "rms": Case(lambda: Norm("... c -> ...", affine="c", c=6, center=False), lambda n, s: (randn(n, s, 6),), (FRAMES,)),
    "instance": Case(lambda: Norm("n c ... -> n c"), images, (IMAGE,)),
    "batch": Case(lambda: Norm("n c ... -> c", affine="c", c=6, activation="silu"), images, (IMAGE,)),
    "masked": Case(
        lambda: Norm("b (g c) t, b t -> b g", affine="(g c)", g=2, c=3),
        lambda n, s: (randn(n, 6, s), mask(n, s)),
        (CHANNELS, FRAMES),
    ),
    "weighted": Case(
        lambda: Norm("b (g c) t, b t -> b g", affine="(g c)", g=2, c=3),
        lambda n, s: (randn(n, 6, s), weights(n, s)),
        (CHANNELS, FRAMES),
    ),
    "static_label": Case(
        lambda: Norm("n c f t -> n c band[f]", affine="band[f]", band=Partition.from_sizes([2, 3, 1])),
        lambda n, s: (randn(n, 2, 6, s),),
        ({0: D, 3: D},),
    ),
    "ids": Case(lambda: Graph(graph=5), lambda n, s: (randn(n * s, 6), ids(n * s)), ({0: D}, {0: D})),
    "masked_ids": Case(
        lambda: Graph("v c, v -> graph[v] c", graph=5),
        lambda n, s: (randn(n * s, 6), ids(n * s), mask(n * s)),
        ({0: D}, {0: D}, {0: D}),
    ),
    "partition": Case(Graph, lambda n, s: (randn(n * s, 6), Partition(ids(n * s), 5)), ({0: D}, [{0: D}])),
    "conditional": Case(
        Conditional, lambda n, s: (randn(n, 6, s), randn(n, 6), randn(n, 6)), (CHANNELS, {0: D}, {0: D})
    ),
    "channel": Case(lambda: ChannelGroupNorm(2, 6, activation="gelu"), images, (IMAGE,)),
    "channel_mask": Case(
        lambda: ChannelGroupNorm(2, 6), lambda n, s: (*images(n, s), mask(n, s, s + 1)), (IMAGE, IMAGE_MASK)
    ),
    "channel_groups": Case(
        lambda: ChannelGroupNorm(3, 6, groups=[1, 3, 2]),
        lambda n, s: (*images(n, s), weights(n, s, s + 1)),
        (IMAGE, IMAGE_MASK),
    ),
    "token": Case(lambda: TokenGroupNorm(2, 6), lambda n, s: (randn(n, s, 6),), (FRAMES,)),
    "token_mask": Case(lambda: TokenGroupNorm(2, 6), lambda n, s: (randn(n, s, 6), mask(n, s)), (FRAMES, FRAMES)),
    "token_lengths": Case(
        lambda: Lengths(TokenGroupNorm(2, 6)),
        lambda n, s: (randn(n, s, 6), lengths(n, s)),
        (FRAMES, {0: D}),
    ),
    "sequence": Case(lambda: SequenceGroupNorm(2, 6), sequences, (CHANNELS,)),
    "sequence_mask": Case(
        lambda: SequenceGroupNorm(2, 6), lambda n, s: (*sequences(n, s), mask(n, s)), (CHANNELS, FRAMES)
    ),
    "sequence_lengths": Case(
        lambda: Lengths(SequenceGroupNorm(2, 6)),
        lambda n, s: (*sequences(n, s), lengths(n, s)),
        (CHANNELS, {0: D}),
    ),
    "packed": Case(
        lambda: Packed(SequenceGroupNorm(2, 6)),
        lambda n, s: (randn(n * s, 6), torch.arange(n + 1) * s),
        ({0: D}, {0: D}),
        sizes=((2, 7), (5, 3), (4, 1)),  # torch takes an axis of size 1 for another program, here that of one sequence
    ),
    "mel_bands": Case(
        lambda: Lengths(MelBandNorm([2, 3, 1])),
        lambda n, s: (*sequences(n, s), lengths(n, s)),
        (CHANNELS, {0: D}),
    ),
}


def filled(layer):
    """In float64, with parameters that are not 1 and 0."""
    layer = layer.double()
    for p in layer.parameters():
        nn.init.normal_(p)
    return layer


def reloaded(program):
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


def exported(layer, arguments, dynamic):
    program = torch.export.export(layer, arguments, dynamic_shapes=dynamic, strict=False)
    assert all("flexnorm" not in str(node.target) for node in program.graph.nodes)  # operations that everybody has
    return reloaded(program).module()


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_at_other_sizes(name):
    case = CASES[name]
    layer = filled(case.layer())
    module = exported(layer, case.arguments(3, 5), case.dynamic)
    for n, s in case.sizes:
        x, *others = case.arguments(n, s)
        x.requires_grad_()
        y, expected = module(x, *others), layer(x, *others)
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
        assert expected.abs().max() > 0.1
        dy = torch.randn_like(y)
        ours = torch.autograd.grad(expected, (x, *layer.parameters()), dy)
        theirs = torch.autograd.grad(y, (x, *module.parameters()), dy)
        for a, b in zip(theirs, ours, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_named_dimensions():
    """One name for the batch and one for the time, of x and of the mask, each with its range. Groups are the last axis:
    torch 2.11 merges no axes in front of a named one, be it `x.view(n, 2, 3, t).reshape(n, 6, t)` alone."""
    batch, time = Dim("batch", max=64), Dim("time", min=2, max=1000)
    layer = filled(Norm("b t (g c), b t -> b g", affine="(g c)", g=2, c=3))
    shapes = ({0: batch, 1: time}, {0: batch, 1: time})
    program = torch.export.export(layer, (randn(3, 5, 6), mask(3, 5)), dynamic_shapes=shapes, strict=False)
    assert [str(limits) for limits in program.range_constraints.values()] == ["VR[0, 64]", "VR[2, 1000]"]
    module = reloaded(program).module()
    x, m = randn(7, 11, 6), mask(7, 11)
    torch.testing.assert_close(module(x, m), layer(x, m), rtol=1e-12, atol=1e-12)


def test_running_statistics_in_evaluation():
    layer = filled(Norm("n c ... -> c", affine="c", c=6, track_running_stats=True))
    for _ in range(3):
        layer(3 * randn(8, 6, 5, 6) + 2)
    module = exported(layer.eval(), images(3, 5), (IMAGE,))
    (x,) = images(2, 7)
    mean, var, weight, bias = (t.view(-1, 1, 1) for t in (layer.running_mean, layer.running_var, *layer.parameters()))
    expected = (x - mean) / (var + layer.eps).sqrt() * weight + bias
    torch.testing.assert_close(module(x), expected, rtol=1e-12, atol=1e-12)
    assert (mean > 0.2).all() and (var > 1.5).all()


def test_running_statistics_in_training():
    """An exported training step moves the buffers of its program."""
    layer = filled(Norm("n c ... -> c", affine="c", c=6, track_running_stats=True))
    module = exported(layer, images(3, 5), (IMAGE,))
    for n, s in Case.sizes:
        (x,) = images(n, s)
        torch.testing.assert_close(module(3 * x + 2), layer(3 * x + 2), rtol=1e-12, atol=1e-12)
    found, expected = dict(module.named_buffers()), dict(layer.named_buffers())
    assert expected["num_batches_tracked"] == len(Case.sizes)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12)


class _Merged(nn.Module):
    def forward(self, x, m):
        found = moments(x, "n c t -> n").merge(m)
        return normalize(x, "n c t -> n", moments=found), found


def test_moments_go_in_and_out():
    def arguments(n, s):
        return randn(n, 6, s), moments(randn(n, 6, 2 * s) + 3, "n c t -> n")

    fields = len(torch.utils._pytree.tree_leaves(arguments(3, 5)[1]))
    module = exported(_Merged(), arguments(3, 5), (CHANNELS, [{0: D}] * fields))
    for n, s in Case.sizes:
        x, m = arguments(n, s)
        (y, found), (expected, merged) = module(x, m), _Merged()(x, m)
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
        assert isinstance(found, Moments)
        torch.testing.assert_close(found.m2, merged.m2, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    """Both round once, from float32: they differ by one step of dtype where they do."""
    layer = Norm("n (g c) h w, n h w -> n g", affine="(g c)", g=2, c=3, dtype=dtype)
    x, m = images(2, 7)[0].to(dtype), mask(2, 7, 8)
    module = exported(layer, (images(3, 5)[0].to(dtype), mask(3, 5, 6)), (IMAGE, IMAGE_MASK))
    y = module(x, m)
    assert y.dtype == dtype
    torch.testing.assert_close(y, layer(x, m), rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_memory_formats():
    """A graph that was traced with one layout takes the other."""
    layer = filled(Norm("n (g c) ... -> n g", affine="(g c)", g=2, c=3))
    for traced, given in ((0, 1), (1, 0)):
        formats = (torch.contiguous_format, torch.channels_last)
        module = exported(layer, (images(3, 5)[0].contiguous(memory_format=formats[traced]),), (IMAGE,))
        x = images(2, 7)[0].contiguous(memory_format=formats[given])
        torch.testing.assert_close(module(x), layer(x), rtol=1e-12, atol=1e-12, check_stride=False)


@pytest.mark.parametrize(("name", "bad", "rule"), [
    ("ids", lambda: ids(10) + 3, "ids must be from 0 to 4"),
    ("ids", lambda: ids(10) - 5, "ids must be from 0 to 4"),
    ("weighted", lambda: weights(2, 5) - 1, "weights of a floating mask"),
    ("token_lengths", lambda: torch.tensor([2, 6]), "lengths are from 0 to the time of x"),
])  # fmt: skip
def test_what_is_wrong_at_run_time_is_said(name, bad, rule):
    case = CASES[name]
    module = exported(filled(case.layer()), case.arguments(3, 5), case.dynamic)
    x, _ = case.arguments(2, 5)
    with pytest.raises(RuntimeError, match=rule):
        module(x, bad())


def test_decompositions():
    """Down to the operations of the core, as exporters to other formats ask."""
    case = CASES["static_label"]
    layer = filled(case.layer())
    program = torch.export.export(layer, case.arguments(3, 5), dynamic_shapes=case.dynamic, strict=False)
    core = program.run_decompositions()
    assert {node.target.namespace for node in core.graph.nodes if hasattr(node.target, "namespace")} == {"aten"}
    (x,) = case.arguments(2, 7)
    torch.testing.assert_close(core.module()(x), layer(x), rtol=1e-12, atol=1e-12)

"""The norms of graphs against PyG's own, against every graph alone, and inside of PyG's models."""

import copy
import inspect
import pickle
import subprocess
import sys
import weakref

import oracle
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from torch_geometric.data import Batch, Data, HeteroData
from torch_geometric.datasets import KarateClub
from torch_geometric.nn import (
    GCN,
    GIN,
    DeepGCNLayer,
    GATConv,
    GCNConv,
    GINEConv,
    SAGEConv,
    Sequential,
    to_hetero,
)
from torch_geometric.nn import (
    norm as pyg,
)

from flexnorm import Norm, Partition, ShapeError, SpecError, given, graphs, normalize
from flexnorm.graphs import FeatureGroupNorm, GraphGroupNorm, GraphNorm, NodeGroupNorm, partition

pytestmark = pytest.mark.extras

C = 6
BATCH = torch.tensor([2, 0, 2, 4, 0, 4, 4, 2, 0, 5, 4, 2])  # unsorted; 1 and 3 are empty, 5 has one node
EPS64 = torch.finfo(torch.float64).eps
EPS32 = torch.finfo(torch.float32).eps

# What both classes are built with. Where PyG's formula has another eps (see the docstrings of ours), one that is too
# small to matter.
TINY = 1e-30
OF_GRAPHS = [
    ("InstanceNorm", {"in_channels": C}),
    ("InstanceNorm", {"in_channels": C, "eps": 0.1, "affine": True}),
    ("LayerNorm", {"in_channels": C}),
    ("LayerNorm", {"in_channels": C, "affine": False, "eps": 0.1}),
    ("LayerNorm", {"in_channels": C, "mode": "node"}),
    ("GraphNorm", {"in_channels": C}),
    ("GraphNorm", {"in_channels": C, "eps": 0.1}),
    ("GraphSizeNorm", {}),
    ("PairNorm", {}),
    ("PairNorm", {"scale": 3.0, "eps": 0.1}),
    ("PairNorm", {"scale_individually": True, "scale": 0.5, "eps": TINY}),
    ("MeanSubtractionNorm", {}),
]
OF_TYPES = [
    ("HeteroLayerNorm", {"in_channels": C, "num_types": 6}),
    ("HeteroLayerNorm", {"in_channels": C, "num_types": 6, "affine": False}),
    ("HeteroBatchNorm", {"in_channels": C, "num_types": 6, "eps": TINY}),
    ("HeteroBatchNorm", {"in_channels": C, "num_types": 6, "affine": False, "eps": TINY}),
]
OTHERS = [
    ("BatchNorm", {"in_channels": C}),
    ("BatchNorm", {"in_channels": C, "affine": False, "track_running_stats": False, "momentum": None}),
    ("InstanceNorm", {"in_channels": C, "track_running_stats": True}),
]
ids = [f"{name}-{i}" for i, (name, _) in enumerate(OF_GRAPHS)]


def pair(name, kwargs, dtype=torch.float64):
    """Ours and PyG's, with the same random parameters."""
    ours, theirs = getattr(graphs, name)(**kwargs).to(dtype), getattr(pyg, name)(**kwargs).to(dtype)
    for p in theirs.parameters():
        nn.init.normal_(p, 1.0, 0.5)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def data(scale=1.0, offset=0.0, dtype=torch.float64, n=12):
    x = torch.randn(n, C, dtype=torch.float64) * scale + offset * torch.linspace(0.5, 1, C, dtype=torch.float64)
    return x.to(dtype).requires_grad_()


def outcome(norm, x, *args, **kwargs):
    """The result, and the gradients of x and of the parameters."""
    x = x.detach().requires_grad_()
    y = norm(x, *args, **kwargs)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(y.dtype)
    return y.detach(), *torch.autograd.grad(y, [x, *norm.parameters()], dy)


def close(ours, theirs, tolerance):
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert (a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1e-300)


# --- parity ----------------------------------------------------------------------------------------------------------


def tolerance(scale, offset):
    """A mean is known to eps * |mean|, which shows against a deviation of `scale`; 100 for the sums of both."""
    return 100 * EPS64 * (1 + offset / scale)


@pytest.mark.parametrize("offset", [0.0, 1.0, 1e4])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize(("name", "kwargs"), OF_GRAPHS, ids=ids)
def test_equals_pyg(name, kwargs, scale, offset):
    ours, theirs = pair(name, kwargs)
    x = data(scale, offset)
    expected = outcome(theirs, x, BATCH)
    if kwargs.get("mode") == "node":
        # torch's backward of layer_norm takes the mean back out of sums that hold it: twice the loss.
        close(outcome(ours, x, BATCH)[:1], expected[:1], tolerance(scale, offset))
        close(outcome(ours, x, BATCH), expected, tolerance(scale, offset) * (1 + offset / scale))
    else:
        close(outcome(ours, x, BATCH), expected, tolerance(scale, offset))
    for batch in (Partition(BATCH), Partition(BATCH, 9)):
        assert all(torch.equal(a, b) for a, b in zip(outcome(ours, x, batch), outcome(ours, x, BATCH), strict=True))


@pytest.mark.parametrize(("name", "kwargs"), OF_GRAPHS, ids=ids)
def test_equals_pyg_without_batch(name, kwargs):
    ours, theirs = pair(name, kwargs)
    x = data(offset=1.0)
    zeros = torch.zeros(len(x), dtype=torch.int64)
    # LayerNorm of PyG divides by std + eps without batch, and by sqrt(var + eps) with it: ours does the latter.
    expected = outcome(theirs, x, zeros) if name == "LayerNorm" else outcome(theirs, x)
    close(outcome(ours, x), expected, tolerance(1, 1))
    close(outcome(ours, x, zeros), expected, tolerance(1, 1))
    close(outcome(ours, x, None, 1), expected, tolerance(1, 1))


@pytest.mark.parametrize("offset", [0.0, 1.0, 1e3])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize(("name", "kwargs"), OF_TYPES)
def test_types_equal_pyg(name, kwargs, scale, offset):
    ours, theirs = pair(name, kwargs)
    x, types = data(scale, offset, n=60), torch.arange(60) * 7 % 6
    if name == "HeteroLayerNorm":
        bound = tolerance(scale, offset) * (1 + offset / scale)
        close(outcome(ours, x, types), outcome(theirs, x, types), bound)
        ordered, ptr = types.sort().values, Partition(types, 6).offsets
        for by in (ptr, ptr.tolist()):
            close(outcome(ours, x, type_ptr=by), outcome(theirs, x, ordered), bound)
        return
    # PyG's variance is E[x^2] - E[x]^2, and no gradient goes through its statistics.
    bound = tolerance(scale, offset) * (1 + offset / scale)
    close(outcome(ours, x, types)[:1], outcome(theirs, x, types)[:1], bound)
    theirs.load_state_dict(ours.state_dict())
    close(outcome(ours.eval(), x, types), outcome(theirs.eval(), x, types), tolerance(scale, offset))


@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
def test_batch_norm_equals_pyg_in_steps(momentum):
    ours, theirs = pair("BatchNorm", {"in_channels": C, "momentum": momentum})
    for _ in range(3):
        x = data(3.0, 2.0)
        close(outcome(ours, x), outcome(theirs, x), tolerance(1, 1))
    for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b)
    close(outcome(ours.eval(), x), outcome(theirs.eval(), x), tolerance(1, 1))


def test_batch_norm_of_a_single_node():
    x = data(n=1)
    for module in (graphs, pyg):
        with pytest.raises(ValueError, match=r"Expected more than 1 value per channel when training, got input size"):
            module.BatchNorm(C).double()(x)
        with pytest.raises(ValueError, match="'allow_single_element' requires"):
            module.BatchNorm(C, allow_single_element=True, track_running_stats=False)
    ours, theirs = pair("BatchNorm", {"in_channels": C, "allow_single_element": True})
    for norm in (ours, theirs):
        norm.module.running_mean.fill_(2.0)
    before = copy.deepcopy(ours.state_dict())
    close(outcome(ours, x), outcome(theirs, x), tolerance(1, 1))
    assert all(torch.equal(before[k], v) for k, v in ours.state_dict().items())
    assert ours(x[:0]).shape == (0, C)
    close(outcome(ours, data(n=5)), outcome(theirs, data(n=5)), 10)  # and of more nodes it is a plain one
    assert ours.module.num_batches_tracked == 1


@pytest.mark.parametrize("batch", [None, torch.arange(12) // 4, torch.arange(12) % 5])
def test_running_statistics_of_instance_norm_equal_pyg(batch):
    ours, theirs = pair("InstanceNorm", {"in_channels": C, "track_running_stats": True, "affine": True})
    for _ in range(3):
        x = data(3.0, 2.0)
        close(outcome(ours, x, batch), outcome(theirs, x, batch), tolerance(1, 1))
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    theirs.running_mean, theirs.running_var = theirs.running_mean.detach(), theirs.running_var.detach()
    close(outcome(ours.eval(), x, batch), outcome(theirs.eval(), x, batch), tolerance(1, 1))


# --- ours against an independent computation -------------------------------------------------------------------------

LOOPS = [
    (lambda: NodeGroupNorm(2, C), "v (g c) -> v g", {"g": 2}, "(g c)"),
    (lambda: GraphGroupNorm(2, C), "v (g c) -> batch[v] g", {"g": 2}, "(g c)"),
    (lambda: GraphGroupNorm(1, C), "v (g c) -> batch[v] g", {"g": 1}, "(g c)"),
    (lambda: FeatureGroupNorm(C), "v c -> batch[v] c", {}, "c"),
    (lambda: graphs.InstanceNorm(C, affine=True), "v c -> batch[v] c", {}, "c"),
    (lambda: graphs.LayerNorm(C), "v c -> batch[v]", {}, "c"),
    (lambda: graphs.HeteroBatchNorm(C, 6), "v c -> batch[v] c", {}, "batch[v] c"),
    (lambda: graphs.HeteroLayerNorm(C, 6), "v c -> v", {}, "batch[v] c"),
]


@pytest.mark.parametrize(("scale", "offset"), [(1.0, 0.0), (1e-3, 0.0), (1e3, 1e3), (0.1, 1e3)])
@pytest.mark.parametrize(("make", "pattern", "sizes", "affine"), LOOPS)
def test_equals_the_loop_in_float32(make, pattern, sizes, affine, scale, offset):
    norm = make()
    for p in norm.parameters():
        nn.init.normal_(p, 1.0, 0.5)
    x = data(scale, offset, torch.float32)
    args = () if isinstance(norm, NodeGroupNorm) else (BATCH,)
    ours = outcome(norm, x, *args)
    labels = {"batch": Partition(BATCH, 6)} if "batch" in pattern + affine else {}

    def loop(x, weight, bias):
        return oracle.normalize(x, pattern, sizes=sizes, labels=labels, weight=weight, bias=bias, affine=affine)

    x64, *params = (t.detach().double().requires_grad_() for t in (x, norm.weight, norm.bias))
    y = loop(x64, *params)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).float().double()
    expected = y.detach(), *torch.autograd.grad(y, [x64, *params], dy)
    spread = oracle.normalize(x.double(), pattern, sizes=sizes, labels=labels).abs().max()
    # The promise for values in float32, here with |mean| <= offset and sigma >= scale / 3 in sets of several elements
    # (those of one are exactly 0), times weights of up to 3.
    bound = 3 * (4 * EPS32 * (3 * offset / scale + spread) + 1e-6)
    assert (ours[0] - expected[0]).abs().max() <= bound
    for a, b in zip(ours[1:], expected[1:], strict=True):
        assert (a - b).abs().max() <= bound * b.abs().max()


def alone(make_norm, x, batch):
    """Every graph by itself, without a batch."""
    y = torch.zeros_like(x)
    for k in batch.unique():
        y[batch == k] = make_norm(x[batch == k])
    return y


EVERY = [
    lambda: GraphGroupNorm(2, C),
    lambda: FeatureGroupNorm(C),
    *(lambda name=name, kwargs=kwargs: getattr(graphs, name)(**kwargs) for name, kwargs in OF_GRAPHS),
]


@pytest.mark.parametrize("make", EVERY)
def test_a_batch_is_every_graph_alone(make):
    norm, x = make(), data(2.0, 100.0, torch.float32).detach()
    for p in norm.parameters():
        nn.init.normal_(p, 1.0, 0.5)
    y = norm(x, BATCH)
    bound = (
        32 * EPS32 * max(1, float(y.detach().abs().max())) + 8 * EPS32 * 100
    )  # "within a few eps", and those of the mean
    assert (y - alone(norm, x, BATCH)).abs().max() <= bound
    order = torch.randperm(len(x))
    assert (norm(x[order], BATCH[order]) - y[order]).abs().max() <= bound
    ordered, ptr = BATCH.sort(stable=True).indices, Partition(BATCH, 6).offsets
    assert (norm(x[ordered], Partition.from_offsets(ptr)) - y[ordered]).abs().max() <= bound


@pytest.mark.parametrize("make", EVERY)
def test_a_gain_and_an_offset_of_a_graph_cancel(make):
    """What the statistics are for: whatever is added to a graph or multiplies it, by groups of what is shared."""
    norm = make()
    x = data().detach()
    gain, offset = torch.rand(6, 1, dtype=torch.float64) + 0.5, torch.randn(6, 1, dtype=torch.float64)
    y = norm.double()(x, BATCH)
    if isinstance(norm, graphs.GraphSizeNorm):
        return  # no statistics
    torch.testing.assert_close(norm(x + offset[BATCH], BATCH), y)
    if isinstance(norm, graphs.MeanSubtractionNorm):
        torch.testing.assert_close(norm(x * gain[BATCH], BATCH), y * gain[BATCH])
    else:
        norm.eps = 1e-300
        torch.testing.assert_close(norm(x * gain[BATCH], BATCH), norm(x, BATCH))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("make", EVERY)
def test_half_precision_is_rounded_once(make, dtype):
    norm = make()
    for p in norm.parameters():
        nn.init.normal_(p, 1.0, 0.5)
    x = data(2.0, 30.0, dtype).detach()
    y, exact = norm(x, BATCH), copy.deepcopy(norm).double()(x.double(), BATCH)
    assert y.dtype == dtype
    # half an ulp of the result, and the statistics in float32
    assert ((y - exact).abs() <= torch.finfo(dtype).eps / 2 * exact.abs() + 1e-4).all()


# --- graphs of no node and of one, and no graph at all ---------------------------------------------------------------


@pytest.mark.parametrize("make", EVERY)
def test_empty_graphs_and_single_nodes(make):
    norm, x = make().double(), data().detach()
    plain = outcome(norm, x, BATCH)
    more = (
        outcome(norm, x, BATCH, 50)
        if not isinstance(norm, graphs.MeanSubtractionNorm)
        else outcome(norm, x, BATCH, dim_size=50)
    )
    assert all(torch.equal(a, b) for a, b in zip(plain, more, strict=True))
    assert all(t.isfinite().all() for t in plain)
    none = outcome(norm, x[:0], BATCH[:0])
    assert none[0].shape == none[1].shape == (0, C)
    assert all((t == 0).all() for t in none)
    assert norm(x[:0]).shape == norm(x[:0], BATCH[:0], 3).shape == (0, C)
    if type(norm) not in (graphs.GraphSizeNorm, graphs.LayerNorm, GraphGroupNorm):
        single = norm(x[:1] + 1e3, BATCH[:1])
        assert (single == 0).all()
        assert (norm(x[:1] + 1e3) == 0).all()


@pytest.mark.parametrize("make", EVERY)
def test_equal_nodes_give_exactly_zero(make):
    """Naive formulas give 0.019 for a constant 1000.3."""
    norm = make()
    y = norm(torch.full((12, C), 1000.3), BATCH)
    if isinstance(norm, graphs.GraphSizeNorm):
        assert (y > 0).all()
    else:
        assert (y == 0).all()


# --- what PyG gets wrong ---------------------------------------------------------------------------------------------


def test_counts_do_not_overflow_in_half_precision():
    x = torch.randn(1000, 128, dtype=torch.float16)
    batch = torch.zeros(1000, dtype=torch.int64)
    assert pyg.LayerNorm(128).half()(x, batch).isnan().any()
    y = graphs.LayerNorm(128).half()(x, batch)
    torch.testing.assert_close(y.double(), graphs.LayerNorm(128).double()(x.double(), batch), atol=2e-3, rtol=1e-3)
    x, batch = torch.ones(70_000, 1, dtype=torch.float16), torch.zeros(70_000, dtype=torch.int64)
    assert (pyg.GraphSizeNorm()(x, batch, 1) == 0).all()
    assert (graphs.GraphSizeNorm()(x, batch, 1) - 70_000**-0.5).abs().max() < 1e-5


def test_running_statistics_stay_out_of_the_graph():
    x = data(dtype=torch.float32)
    theirs, ours = (m.InstanceNorm(C, track_running_stats=True) for m in (pyg, graphs))
    theirs(x, BATCH), ours(x, BATCH)
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(theirs)
    assert torch.equal(copy.deepcopy(ours).eval()(x), ours.eval()(x))
    assert not ours.running_mean.requires_grad


def test_empty_graphs_do_not_drag_running_means():
    x = data(offset=10.0)
    ours, theirs = pair("InstanceNorm", {"in_channels": C, "track_running_stats": True, "momentum": 1.0})
    ours(x, BATCH), theirs(x, BATCH)
    means = torch.stack([x[k == BATCH].mean(0) for k in (0, 2, 4, 5)])
    variances = torch.stack([x[k == BATCH].var(0) for k in (0, 2, 4)])  # graph 5 has one node, so no variance
    torch.testing.assert_close(ours.running_mean, means.mean(0))
    torch.testing.assert_close(ours.running_var, variances.mean(0))
    torch.testing.assert_close(theirs.running_mean, means.sum(0) / 6)
    ours(x[:0], BATCH[:0], 4)
    torch.testing.assert_close(ours.running_mean, means.mean(0))


def test_gradients_flow_through_statistics_of_types():
    ours, theirs = pair("HeteroBatchNorm", {"in_channels": C, "num_types": 6})
    x = data()
    (dx,) = torch.autograd.grad(ours(x, BATCH).mul(torch.randn(12, C)).sum(), x)
    # whatever is added to all nodes of a type changes nothing
    assert torch.stack([dx[k == BATCH].sum(0) for k in range(6)]).abs().max() < 1e-12
    (dx,) = torch.autograd.grad(theirs(x, BATCH).mul(torch.randn(12, C)).sum(), x)
    assert torch.stack([dx[k == BATCH].sum(0) for k in range(6)]).abs().max() > 0.1


def test_pair_norm_has_eps_in_the_root():
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64) * 1e-3
    y = graphs.PairNorm(scale_individually=True)(x)
    torch.testing.assert_close(y, x / (1e-5 + 1e-6) ** 0.5)


# --- in place of PyG's classes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kwargs"), [*OF_GRAPHS, *OF_TYPES, *OTHERS])
def test_is_a_drop_in(name, kwargs):
    ours, theirs = getattr(graphs, name)(**kwargs), getattr(pyg, name)(**kwargs)
    assert isinstance(ours, getattr(pyg, name))
    assert repr(ours) == repr(theirs)
    mine, their = (inspect.signature(m.forward).parameters for m in (ours, theirs))
    assert list(mine) == list(their)
    if "__init__" in vars(type(theirs)):
        mine, their = (inspect.signature(type(m)).parameters.values() for m in (ours, theirs))
        assert [(p.name, p.default) for p in mine] == [(p.name, p.default) for p in their]
    for key, value in vars(theirs).items():
        if not key.startswith("_") and key != "training":
            assert getattr(ours, key) == value
    state = theirs.state_dict()
    assert list(ours.state_dict()) == list(state)
    for module, other in ((ours, theirs), (theirs, ours)):
        for value in module.state_dict().values():
            if value.is_floating_point():
                value.normal_()
        other.load_state_dict(module.state_dict())
        for key, value in other.state_dict().items():
            assert torch.equal(value, module.state_dict()[key])
            assert value.dtype == state[key].dtype
    if hasattr(theirs, "reset_parameters"):
        ours.reset_parameters(), theirs.reset_parameters()
        for key, value in ours.state_dict().items():
            assert torch.equal(value, theirs.state_dict()[key])
    assert isinstance(pickle.loads(pickle.dumps(copy.deepcopy(ours))), type(ours))
    if "in_channels" in kwargs:
        assert all(t.is_meta for t in getattr(graphs, name)(**kwargs, device="meta").state_dict().values())


def test_every_name_of_pyg_is_here():
    for name in ("BatchNorm InstanceNorm LayerNorm GraphNorm GraphSizeNorm PairNorm MeanSubtractionNorm "
                 "HeteroLayerNorm HeteroBatchNorm").split():  # fmt: skip
        assert name in graphs.__all__
    for name in graphs.__all__:
        assert ">>>" in getattr(graphs, name).__doc__


def test_eps_is_an_attribute():
    x = data().detach()
    for make in (GraphNorm, graphs.InstanceNorm, graphs.LayerNorm, FeatureGroupNorm):
        norm, other = make(C, eps=0.5).double(), make(C).double()
        other.eps = 0.5
        assert torch.equal(norm(x, BATCH), other(x, BATCH))


# --- groups of nodes -------------------------------------------------------------------------------------------------


def test_feature_groups_from_four_places():
    x, communities = data().detach(), torch.tensor([0, 1, 2] * 4)
    plain, static = FeatureGroupNorm(C).double(), FeatureGroupNorm(C, groups=communities).double()
    expected = normalize(x, "v c -> g[v] c", g=communities)
    by_graph = normalize(x, "v c -> g[v] c", g=BATCH)
    assert torch.equal(plain(x, groups=communities), expected)
    assert torch.equal(plain(x, BATCH, groups=Partition(communities)), expected)
    assert torch.equal(static(x), expected)
    assert torch.equal(static(x, BATCH), expected)
    assert torch.equal(plain(x, BATCH), by_graph)
    with given(groups=communities):
        assert torch.equal(plain(x), expected)
        assert torch.equal(plain(x, BATCH), expected)  # the groups are meant for no other layer
        assert torch.equal(plain(x, groups=BATCH), by_graph)
        with given(batch=BATCH):
            assert torch.equal(plain(x), expected)
    with given(batch=BATCH):
        assert torch.equal(plain(x), by_graph)
    assert "groups_ids" in static.state_dict()
    assert torch.equal(pickle.loads(pickle.dumps(static))(x), expected)
    with pytest.raises(SpecError, match="'groups' is a static label of this layer"):
        static(x, groups=communities)


def test_group_norms_have_groups_and_say_so():
    norm = GraphGroupNorm(3, C, eps=1e-3, affine=False)
    assert (norm.num_groups, norm.num_channels, norm.eps, norm.affine) == (3, C, 1e-3, False)
    assert list(norm.parameters()) == []
    assert "batch[v] g" in repr(norm)
    theirs = nn.GroupNorm(3, C)
    nn.init.normal_(theirs.weight)
    ours = NodeGroupNorm(3, C)
    ours.load_state_dict(theirs.state_dict())
    x = data(dtype=torch.float32)
    torch.testing.assert_close(ours(x), theirs(x))
    for make in (NodeGroupNorm, GraphGroupNorm):
        with pytest.raises(ShapeError, match="not divisible by 4"):
            make(4, C)
        assert make(3, C, dtype=torch.float64).weight.dtype == torch.float64


def test_group_norm_of_a_graph_is_torchs_with_nodes_as_places():
    norm, x = GraphGroupNorm(2, C).double(), data()
    nn.init.normal_(norm.weight)
    y = norm(x, BATCH)
    for k in (0, 2, 4):
        expected = nn.functional.group_norm(x[k == BATCH].T[None], 2, norm.weight, norm.bias)[0].T
        torch.testing.assert_close(y[k == BATCH], expected)


# --- in PyG's models -------------------------------------------------------------------------------------------------


def three_graphs(edge_dim=None):
    """A ring, a path and a star, with features of different scales."""
    made = []
    for k, n in enumerate((5, 4, 7)):
        to = {0: (torch.arange(n) + 1) % n, 1: (torch.arange(n) + 1).clamp(max=n - 1), 2: torch.zeros(n, dtype=int)}[k]
        edges = torch.stack([torch.cat([torch.arange(n), to]), torch.cat([to, torch.arange(n)])])
        attr = None if edge_dim is None else torch.randn(2 * n, edge_dim)
        made.append(Data(x=torch.randn(n, 3) * 10**k + k, edge_index=edges, edge_attr=attr))
    return made


def agrees_with_each_alone(model, made, call):
    """A model whose layers mix no graphs gives for the batch what it gives for each."""
    model.eval()
    batch = Batch.from_data_list(made)
    together = call(model, batch)
    each = torch.cat([call(model, Batch.from_data_list([one])) for one in made])
    torch.testing.assert_close(together, each, rtol=1e-4, atol=1e-4)
    return together


NORMS = [
    lambda c: GraphNorm(c),
    lambda c: GraphGroupNorm(4, c),
    lambda c: FeatureGroupNorm(c),
    lambda c: graphs.LayerNorm(c),
    lambda c: graphs.PairNorm(),
    lambda c: graphs.MeanSubtractionNorm(),
    lambda c: graphs.GraphSizeNorm(),
]


@pytest.mark.parametrize("make", NORMS)
@pytest.mark.parametrize("kind", [GCN, GIN])
def test_in_gcn_and_gin(kind, make):
    model = kind(3, 8, num_layers=3, out_channels=2, norm=make(8))
    assert model.supports_norm_batch
    made = three_graphs()
    y = agrees_with_each_alone(model, made, lambda m, b: m(b.x, b.edge_index, batch=b.batch, batch_size=b.num_graphs))
    batch = Batch.from_data_list(made)
    assert torch.equal(model(batch.x, batch.edge_index, batch=partition(batch)), y)
    with given(batch=partition(batch)):
        assert torch.equal(model(batch.x, batch.edge_index), y)
    model.train()(batch.x, batch.edge_index, batch=batch.batch).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("make", [NodeGroupNorm, lambda g, c: graphs.BatchNorm(c)])
def test_norms_without_batch_are_not_handed_one(make):
    model = GCN(3, 8, num_layers=2, norm=make(4, 8))
    assert not model.supports_norm_batch
    batch = Batch.from_data_list(three_graphs())
    assert model(batch.x, batch.edge_index, batch=batch.batch).isfinite().all()


def test_a_model_of_pyg_takes_our_norms_with_its_weights():
    theirs, ours = GCN(3, 8, 3, 2, norm=pyg.GraphNorm(8)), GCN(3, 8, 3, 2, norm=GraphNorm(8))
    ours.load_state_dict(theirs.state_dict())
    batch = Batch.from_data_list(three_graphs())
    args = batch.x, batch.edge_index, None, None, batch.batch
    torch.testing.assert_close(ours(*args), theirs(*args), rtol=1e-4, atol=1e-4)


def test_in_sequential():
    model = Sequential(
        "x, edge_index, batch, batch_size",
        [
            (GCNConv(3, 8), "x, edge_index -> x"),
            (GraphNorm(8), "x, batch, batch_size -> x"),
            nn.ReLU(),
            (GCNConv(8, 8), "x, edge_index -> x"),
            (GraphGroupNorm(2, 8), "x, batch -> x"),
        ],
    )
    agrees_with_each_alone(model, three_graphs(), lambda m, b: m(b.x, b.edge_index, b.batch, b.num_graphs))


class Deep(nn.Module):
    """Layers of DeepGCNLayer, which call their norm with x alone."""

    def __init__(self, make, block="res+", ckpt_grad=False):
        super().__init__()
        self.first = nn.Linear(3, 8)
        self.layers = nn.ModuleList(
            DeepGCNLayer(GCNConv(8, 8), make(8), nn.ReLU(), block=block, ckpt_grad=ckpt_grad) for _ in range(2)
        )

    def forward(self, x, edge_index):
        x = self.first(x)
        for layer in self.layers:
            x = layer(x, edge_index)
        return x


@pytest.mark.parametrize("block", ["res+", "res"])
@pytest.mark.parametrize("make", NORMS)
def test_given_reaches_into_deep_gcn_layers(make, block):
    def call(model, batch):
        with given(batch=partition(batch)):
            return model(batch.x, batch.edge_index)

    model = Deep(make, block)
    y = agrees_with_each_alone(model, three_graphs(), call)
    assert y.std() > 0


def test_edge_features():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.edges = GraphNorm(4)
            self.conv = GINEConv(nn.Linear(3, 8), edge_dim=4)
            self.attention = GATConv(8, 8, edge_dim=4)
            self.norm = GraphGroupNorm(2, 8)

        def forward(self, batch):
            nodes, edges = partition(batch), partition(batch, "edges")
            attr = self.edges(batch.edge_attr, edges)
            x = self.norm(self.conv(batch.x, batch.edge_index, attr), nodes)
            return self.norm(self.attention(x, batch.edge_index, attr), nodes)

    agrees_with_each_alone(Model(), three_graphs(edge_dim=4), lambda m, b: m(b))


def papers(n, m):
    made = HeteroData()
    made["paper"].x, made["author"].x = torch.randn(n, 8), torch.randn(m, 8) * 5
    made["author", "writes", "paper"].edge_index = torch.stack([torch.arange(n) % m, torch.arange(n)])
    made["paper", "by", "author"].edge_index = made["author", "writes", "paper"].edge_index.flip(0)
    return made


def test_dicts_of_node_types():
    batch = Batch.from_data_list([papers(5, 2), papers(4, 3), papers(6, 1)])
    nodes, edges = partition(batch), partition(batch, "edges")
    assert {kind: p.counts.tolist() for kind, p in nodes.items()} == {"paper": [5, 4, 6], "author": [2, 3, 1]}
    assert edges["author", "writes", "paper"].counts.tolist() == [5, 4, 6]
    norms = nn.ModuleDict({kind: GraphNorm(8) for kind in nodes})
    for kind, x in batch.x_dict.items():
        y = norms[kind](x, batch.batch_dict[kind], batch.num_graphs)
        torch.testing.assert_close(y, norms[kind](x, nodes[kind]))
        torch.testing.assert_close(y, alone(norms[kind], x, batch[kind].batch), atol=1e-5, rtol=1e-4)
    types = Partition.from_sizes([len(x) for x in batch.x_dict.values()])
    stacked = torch.cat(list(batch.x_dict.values()))
    norm = graphs.HeteroBatchNorm(8, 2)
    expected = torch.cat([nn.functional.batch_norm(x, None, None, training=True) for x in batch.x_dict.values()])
    torch.testing.assert_close(norm(stacked, types.ids), expected, atol=1e-5, rtol=1e-5)
    with given(type_vec=types):
        assert torch.equal(nn.Sequential(norm)(stacked), norm(stacked, types))
        assert graphs.HeteroLayerNorm(8, 2)(stacked).shape == stacked.shape


class Homogeneous(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.norm1 = SAGEConv((-1, -1), 8), GraphNorm(8)
        self.conv2, self.norm2 = SAGEConv((-1, -1), 8), GraphGroupNorm(2, 8)

    def forward(self, x, edge_index, batch=None):
        x = self.norm1(self.conv1(x, edge_index), batch).relu()
        return self.norm2(self.conv2(x, edge_index), batch)


def test_to_hetero():
    each = [papers(5, 2), papers(4, 3), papers(6, 2)]
    batch = Batch.from_data_list(each)
    model = to_hetero(Homogeneous(), batch.metadata())
    with torch.no_grad():
        model(batch.x_dict, batch.edge_index_dict, batch.batch_dict)  # sizes of its lazy layers
    together = model(batch.x_dict, batch.edge_index_dict, batch.batch_dict)
    single = [model(one.x_dict, one.edge_index_dict) for one in each]
    for kind in together:
        torch.testing.assert_close(together[kind], torch.cat([y[kind] for y in single]), atol=1e-4, rtol=1e-4)
    again = model(batch.x_dict, batch.edge_index_dict, partition(batch))
    assert all(torch.equal(again[kind], y) for kind, y in together.items())
    basic = to_hetero(GIN(8, 8, 2, norm=GraphNorm(8)), batch.metadata())
    ys = basic(batch.x_dict, batch.edge_index_dict, batch=batch.batch_dict)
    assert all(y.isfinite().all() for y in ys.values())


def test_activation_checkpointing_of_what_is_given():
    model, batch = Deep(GraphNorm), Batch.from_data_list(three_graphs())
    labels = partition(batch)

    def gradients(*, kept):
        model.zero_grad()
        with given(batch=labels):
            options = {"context_fn": given.context_fn} if kept else {}
            y = checkpoint(model, batch.x, batch.edge_index, use_reentrant=False, **options)
        y.square().sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    with given(batch=labels):
        model(batch.x, batch.edge_index).square().sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    for a, b in zip(gradients(kept=True), expected, strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(RuntimeError, match="activation checkpointing, and what was given is gone"):
        gradients(kept=False)


# --- partition -------------------------------------------------------------------------------------------------------


def test_partition_of_a_batch():
    batch = Batch.from_data_list([*three_graphs(), Data(x=torch.zeros(0, 3), edge_index=torch.zeros(2, 0, dtype=int))])
    nodes, edges = partition(batch), partition(batch, "edges")
    assert nodes == Partition(batch.batch, 4) == Partition.from_offsets(batch.ptr)
    assert nodes.counts.tolist() == [5, 4, 7, 0]
    assert edges.counts.tolist() == [10, 8, 14, 0]
    one = KarateClub()[0]
    assert partition(one) == Partition(torch.zeros(34, dtype=torch.int64), 1)
    assert partition(one, of="edges").counts.tolist() == [156]
    assert partition(Data(num_nodes=3)) == Partition.from_sizes([3])
    assert partition(Data(x=torch.zeros(3, 1), batch=torch.tensor([1, 0, 1]))) == Partition(torch.tensor([1, 0, 1]))
    made = Data(x=torch.zeros(3, 1), batch=torch.tensor([0, 0, 1]), ptr=torch.tensor([0, 2, 3, 3]))
    assert partition(made).count == 3
    hetero = partition(papers(5, 2))
    assert hetero["paper"] == Partition.from_sizes([5])
    for bad in ("graphs", None):
        with pytest.raises(SpecError, match="of nodes or of edges"):
            partition(batch, bad)


def test_partition_stays_on_its_device_and_moves_with_the_batch():
    batch = Batch.from_data_list(three_graphs())
    assert partition(batch.clone().to("meta")).device.type == "meta"
    assert partition(KarateClub()[0].to("meta")).device.type == "meta"
    batch.graphs = partition(batch)
    assert batch.to("meta").graphs.device.type == "meta"
    assert batch.graphs.count == 3


def collate(made):
    batch = Batch.from_data_list(made)
    batch.graphs = partition(batch)
    return batch


@pytest.mark.parametrize("workers", [0, 2])
def test_partition_is_made_by_the_workers_of_a_loader(workers):
    loader = DataLoader(three_graphs() * 4, batch_size=3, collate_fn=collate, num_workers=workers)
    seen = 0
    for batch in loader:
        assert batch.graphs == Partition.from_sizes([5, 4, 7])
        y = GraphNorm(3)(batch.x, batch.graphs)
        torch.testing.assert_close(y, GraphNorm(3)(batch.x, batch.batch))
        seen += 1
    assert seen == 4


# --- bad input -------------------------------------------------------------------------------------------------------

X = torch.zeros(4, C)
WHOLE = "batch holds the graph of every node"
BAD = [
    (torch.tensor([0, -1, 0, 1]), None, ShapeError, f"{WHOLE}, from 0 to batch_size - 1; here are -1 to 1", "number"),
    (torch.tensor([0, 1, 2, 1]), 2, ShapeError, f"{WHOLE}, from 0 to batch_size - 1; here are 0 to 2", "batch_size=3"),
    (torch.tensor([0.0, 1, 1, 1]), None, SpecError, "batch holds integers", "batch=batch.long()"),
    (torch.tensor([True, False, True, True]), None, SpecError, "batch holds integers", "batch=batch.long()"),
    (
        torch.tensor([0, 0, 1, 1, 1]),
        None,
        ShapeError,
        f"{WHOLE}: a tensor or Partition of shape (4,)",
        "partition(data)",
    ),
    (torch.tensor([0, 3, 4]), None, ShapeError, f"{WHOLE}: a tensor or Partition", "from_offsets(ptr), if this is ptr"),
    (torch.tensor([[0, 0, 1, 1]]), None, ShapeError, "a Tensor of torch.int64, shape (1, 4)", "partition(data)"),
    ([0, 0, 1, 1], None, ShapeError, "received: batch=[0, 0, 1, 1]", "partition(data)"),
    (Partition.from_sizes([3, 3]), None, ShapeError, "received: batch=Partition(6 ids, count=2)", "partition(data)"),
    (Partition.from_sizes([2, 2]), 5, ShapeError, "batch_size says another", "leave batch_size out"),
    (torch.tensor([0, 0, 1, 1]), -1, SpecError, "batch_size=-1", "batch_size=8"),
    (torch.tensor([0, 0, 1, 1]), 1.5, SpecError, "batch_size=1.5", "batch_size=8"),
]


@pytest.mark.parametrize("make", EVERY)
@pytest.mark.parametrize(("batch", "size", "kind", "rule", "instead"), BAD)
def test_bad_batches(make, batch, size, kind, rule, instead):
    norm = make()
    if getattr(norm, "mode", None) == "node":
        assert norm(X, batch, size).shape == X.shape  # as in PyG, it reads no batch
        return
    with pytest.raises(kind) as caught:
        norm(X, batch, size)
    name = "dim_size" if isinstance(norm, graphs.MeanSubtractionNorm) else "batch_size"
    text = str(caught.value)
    assert rule.replace("batch_size", name) in text
    assert instead.replace("batch_size", name) in text.split("instead:")[1]
    assert "x of shape (4, 6)" in text


def test_what_is_given_and_does_not_fit_names_the_layer():
    model = nn.Sequential(GraphNorm(C))
    with given(batch=Partition.from_sizes([3, 3])), pytest.raises(ShapeError) as caught:
        model(X)
    assert "in:       GraphNorm(6), inside of given(batch)" in str(caught.value)
    with given(batch=BATCH):
        assert model[0](X, torch.zeros(4, dtype=torch.int64)).shape == X.shape  # the explicit one wins


@pytest.mark.parametrize("make", [make for make in EVERY if not isinstance(make(), graphs.MeanSubtractionNorm)])
@pytest.mark.parametrize("x", [torch.zeros(4), torch.zeros(2, 4, C), torch.zeros(4, C, dtype=torch.int64)])
def test_wrong_ranks_and_types(make, x):
    norm = make()
    if getattr(norm, "mode", None) == "node" and x.dim() == 3:
        assert norm(x).shape == x.shape
        return
    with pytest.raises((ShapeError, SpecError), match=r"shape|float"):
        norm(x)


def test_wrong_channels_and_types():
    for norm in (
        GraphNorm(C + 1),
        graphs.LayerNorm(C + 1),
        graphs.InstanceNorm(C + 1, affine=True),
        GraphGroupNorm(1, 7),
    ):
        with pytest.raises(ShapeError, match="7"):
            norm(X)
    for make in (graphs.HeteroLayerNorm, graphs.HeteroBatchNorm):
        with pytest.raises(SpecError, match="label 'type_vec' is read, and not given"):
            make(C, 2)(X)
        with pytest.raises(ShapeError, match="type_vec"):
            make(C, 2)(X, torch.tensor([0, 1, 2, 0]))
        with pytest.raises(ShapeError, match="type_vec"):
            make(C, 2)(X, torch.tensor([0, 1]))
    for ptr, text in (([0, 4], "2 values"), ([0, 1, 3], "one id at every index"), ([0, 5, 4], "never fall")):
        with pytest.raises(ShapeError, match=text):
            graphs.HeteroLayerNorm(C, 2)(X, type_ptr=ptr)
    with pytest.raises(SpecError, match="mode"):
        graphs.LayerNorm(C, mode="edge")
    with pytest.raises(SpecError, match="mode"):
        graphs.HeteroLayerNorm(C, 2, mode="graph")


def test_without_pyg_the_import_names_the_install_line():
    code = "import sys; sys.modules['torch_geometric'] = None\n"
    code += "try: import flexnorm.graphs\nexcept ImportError as error: print(error)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 'pip install "flexnorm[graph]"' in done.stdout


def test_they_are_norms():
    for make in EVERY:
        assert isinstance(make(), Norm)


# --- what a review found ---


def test_a_number_of_graphs_says_nothing_about_groups_from_around():
    """PyG's models pass batch_size on, and it is not the number of communities."""
    x, batch, groups = torch.randn(6, 4), torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([0, 1, 2, 3, 4, 4])
    norm = FeatureGroupNorm(4)
    with given(groups=groups):
        y = norm(x, batch=batch, batch_size=2)
    torch.testing.assert_close(y, norm(x, groups=groups))


def test_the_search_for_a_batch_never_raises_and_knows_numbers_of_nodes():
    class Gone:
        pass

    gone = Gone()
    dead = weakref.proxy(gone)
    del gone
    x = torch.randn(10, 4)
    GraphNorm(4)(x)
    for batch in torch.arange(40).split(10):  # a mini-batch of nodes of one graph
        GraphNorm(4)(torch.randn(40, 4)[batch])
    for batch in (torch.tensor([True, False] * 5), torch.zeros(10, dtype=torch.complex64), torch.empty(10).to("meta")):
        GraphNorm(4)(x)
        assert batch.shape == x.shape[:1]
    assert type(dead) is weakref.ProxyType


@pytest.mark.parametrize("data", [None, torch.zeros(3, dtype=torch.long)])
def test_a_partition_of_no_data(data):
    with pytest.raises(SpecError, match="PyG Batch or Data"):
        partition(data)

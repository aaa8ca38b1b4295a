"""`recommend`: a table of layers and what must be chosen for them, whole models, and its numbers against simulation."""

import copy
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from flexnorm import Norm, Partition, ShapeError, SpecError
from flexnorm.conversion import SyncBatchNorm
from flexnorm.images import ChannelGroupNorm
from flexnorm.inspection import FEW
from flexnorm.recommendation import RANKS, RULES, recommend
from flexnorm.sequences import SequenceGroupNorm, TokenGroupNorm

KEEP, UNJUDGED = None, "not judged"


def batch(pattern="n c ... -> c", **options):
    return Norm(pattern, affine="c", c=64, track_running_stats=True, **options)


def groups_of(c, **options):
    return Norm("n (g c) ... -> n g", affine="(g c)", g=8, sizes={"(g c)": c}, **options)


# layer, shape of x (None: unknown), data, options, the rule that decides, the line (KEEP: the layer stays), what the
# reasons name
CASES = {
    "small batch": (nn.BatchNorm2d(64), (2, 64, 8, 8), "images", {}, "small batch", "ChannelGroupNorm(16, 64)",
                    ["2 samples", "Wu and He", "128 elements, variance off by 12.5%; then of 256", "training"]),
    "batch of 15": (nn.BatchNorm2d(64), (1, 64, 8, 8), "images", {"batch_size": 15}, "small batch",
                    "ChannelGroupNorm(16, 64)", ["Now sets of 960 elements"]),
    "batch of 16": (nn.BatchNorm2d(64), (1, 64, 8, 8), "images", {"batch_size": 16}, "large batch", KEEP,
                    ["Sets of 1,024 elements", "Evaluation goes by running statistics", "folds"]),
    "no x": (nn.BatchNorm2d(64), None, "images", {"batch_size": 2}, "small batch", "ChannelGroupNorm(16, 64)",
             ["unknown without an x"]),
    "large batch without statistics": (nn.BatchNorm2d(64, track_running_stats=False), None, "images",
                                       {"batch_size": 64}, "large batch", KEEP, ["share statistics"]),
    "batch norm of ours": (batch(), (2, 64, 8, 8), "images", {}, "small batch", "ChannelGroupNorm(16, 64)", []),
    "eps and no parameters": (nn.BatchNorm2d(64, eps=1e-3, affine=False), (2, 64, 8, 8), "images", {}, "small batch",
                              "ChannelGroupNorm(16, 64, eps=0.001, affine=False)", []),
    "no bias, activation": (batch(bias=False, activation="relu"), (2, 64, 8, 8), "images", {}, "small batch",
                            'ChannelGroupNorm(16, 64, bias=False, activation="relu")', []),
    "volumes": (nn.BatchNorm3d(32), (2, 32, 4, 8, 8), "images", {}, "small batch", "ChannelGroupNorm(8, 32)", []),
    "1x1 maps": (nn.BatchNorm2d(64), (2, 64, 1, 1), "images", {}, "small batch", "ChannelGroupNorm(4, 64)",
                 ["2 elements, variance off by 141.4%; then of 16 elements"]),
    "too few channels": (nn.BatchNorm2d(9), (2, 9, 1, 1), "images", {}, "small batch", "ChannelGroupNorm(1, 9)",
                         ["then of 9 elements", "fewer than 16 elements even so"]),
    "nothing to pool": (nn.BatchNorm2d(1), (2, 1, 1, 1), "images", {}, "small batch", "ChannelGroupNorm(1, 1)",
                        ["better left out"]),
    "told groups": (nn.BatchNorm2d(64), (2, 64, 8, 8), "images", {"groups": 2}, "small batch",
                    "ChannelGroupNorm(2, 64)", ["then of 2,048 elements"]),
    "groups by a function": (nn.BatchNorm2d(64), (2, 64, 1, 1), "images", {"groups": lambda c: c // 2}, "small batch",
                             "ChannelGroupNorm(32, 64)", ["fewer than 16 elements even so"]),
    "privacy": (nn.BatchNorm2d(64), (256, 64, 8, 8), "images", {"privacy": True}, "privacy",
                "ChannelGroupNorm(16, 64)", ["gradient of its own"]),
    "private statistics": (nn.InstanceNorm2d(64, track_running_stats=True), (4, 64, 8, 8), "images",
                           {"privacy": True}, "privacy", "ChannelGroupNorm(64, 64, affine=False)", ["Opacus"]),
    "ranks": (nn.BatchNorm2d(64), (2, 64, 8, 8), "images", {"distributed": True}, "small batch",
              "ChannelGroupNorm(16, 64)", ["flexnorm.conversion.SyncBatchNorm"]),
    "ranks of large batches": (nn.BatchNorm2d(64), (64, 64, 8, 8), "images", {"distributed": True}, "large batch",
                               KEEP, ["Hsieh"]),
    "synchronized": (SyncBatchNorm(64), (2, 64, 8, 8), "images", {"distributed": True}, "synchronized", KEEP, []),
    "instance": (nn.InstanceNorm2d(64), (4, 64, 8, 8), "images", {}, "alone", KEEP, ["Sets of 64 elements"]),
    "instance that tracks": (nn.InstanceNorm2d(64, track_running_stats=True), (4, 64, 8, 8), "images", {}, "alone",
                             KEEP, ["running statistics"]),
    "instance of one": (nn.InstanceNorm2d(64), (4, 64, 1, 1), "images", {}, "few elements",
                        "ChannelGroupNorm(4, 64, affine=False)", ["which becomes 0", "Now sets of 1 element;"]),
    "instance of few": (nn.InstanceNorm2d(64, affine=True), (4, 64, 3, 3), "images", {}, "few elements",
                        "ChannelGroupNorm(32, 64)", ["9 elements", "then of 18"]),
    "group": (nn.GroupNorm(32, 256), (4, 256, 8, 8), "images", {}, "alone", KEEP, ["512 elements"]),
    "group of few": (nn.GroupNorm(32, 64), (4, 64, 1, 1), "images", {}, "few elements", "ChannelGroupNorm(4, 64)",
                     ["Now sets of 2 elements", "then of 16"]),
    "one group of few": (nn.GroupNorm(1, 8), (4, 8, 1, 1), "images", {}, "alone", KEEP, ["fewer than 16"]),
    "zero_init": (ChannelGroupNorm(32, 64, zero_init=True), (4, 64, 1, 1), "images", {}, "few elements",
                  "ChannelGroupNorm(4, 64, zero_init=True)", []),
    "unequal groups": (ChannelGroupNorm(3, 64, groups=[10, 20, 34]), (4, 64, 4, 4), "images", {}, "its own", UNJUDGED,
                       ["explain"]),
    "layer over all": (Norm("n c ... -> n"), (4, 8, 3, 3), "images", {}, "alone", KEEP, ["72 elements"]),
    "pixels": (Norm("n c ... -> n ..."), (4, 64, 3, 3), "images", {}, "tokens", KEEP, ["64 elements"]),
    "labels that x does not hold": (Norm("v c -> graph[v] c", affine="c", c=8), (6, 8), "graphs", {}, "its own",
                                    UNJUDGED,
                                    []),
    "domains": (Norm("n c -> site[n] c", site=Partition.from_sizes([2, 2])), (4, 8), "tabular", {"privacy": True},
                "its own", UNJUDGED, ["none has a gradient of its own"]),
    "table": (nn.BatchNorm1d(64), None, "tabular", {"batch_size": 256}, "large batch", KEEP,
              ["256 rows", "Sets of 256 elements, variance off by 8.9%"]),
    "table of few rows": (nn.BatchNorm1d(64), None, "tabular", {"batch_size": 4}, "small batch",
                          "ChannelGroupNorm(4, 64)", ["Now sets of 4 elements", "one unit"]),
    "groups of a table": (nn.GroupNorm(32, 64), None, "tabular", {}, "few elements", "ChannelGroupNorm(4, 64)",
                          ["2 elements"]),
    "tokens": (nn.LayerNorm(64), None, "sequences", {}, "tokens", KEEP, ["itself alone", "64 elements"]),
    "rms": (nn.RMSNorm(64), (2, 5, 64), "sequences", {}, "tokens", KEEP, ["variance off by 17.7%"]),
    "narrow tokens": (nn.LayerNorm(8), None, "sequences", {}, "tokens", KEEP, ["fewer than 16 elements"]),
    "tokens of ours": (Norm("b t c -> b t", affine="c", c=64), (2, 5, 64), "sequences", {}, "tokens", KEEP, []),
    "group of tokens": (TokenGroupNorm(4, 64), (2, 5, 64), "sequences", {"streaming": True}, "alone", KEEP, ["16"]),
    "sequences": (nn.BatchNorm1d(64), (256, 64, 50), "sequences", {}, "padding", "SequenceGroupNorm(16, 64)",
                  ["padding", "12,800 elements", "then of 200"]),
    "group of an utterance": (nn.GroupNorm(64, 64), (2, 64, 100), "audio", {}, "padding",
                              "SequenceGroupNorm(64, 64)", ["padding"]),
    "masked": (SequenceGroupNorm(16, 64), (2, 64, 50), "audio", {}, "alone", KEEP, ["200"]),
    "head of a sequence model": (nn.BatchNorm1d(64), (256, 64), "sequences", {}, "large batch", KEEP, []),
    "stream": (nn.BatchNorm1d(64), None, "audio", {"streaming": True}, "padding",
               'Norm("b (g c) t, b t -> b t g", affine="(g c)", g=4, sizes={"(g c)": 64})', ["16 elements"]),
    "stream, masked": (SequenceGroupNorm(16, 64), (2, 64, 50), "audio", {"streaming": True}, "stream",
                       'Norm("b (g c) t, b t -> b t g", affine="(g c)", g=4, sizes={"(g c)": 64})', ["later"]),
    "stream, channels last": (SequenceGroupNorm(16, 64, channels_last=True), (2, 50, 64), "audio",
                              {"streaming": True}, "stream", "TokenGroupNorm(4, 64)", []),
    "activation of a stream": (groups_of(64, activation="silu"), (2, 64, 50), "audio", {}, "padding",
                               "SequenceGroupNorm(8, 64)", ["silu, comes behind it"]),
    "clips": (nn.BatchNorm3d(64), (2, 64, 8, 7, 7), "video", {}, "small batch", "ChannelGroupNorm(16, 64)", []),
    "frames": (nn.BatchNorm3d(64), (2, 64, 8, 7, 7), "video", {"streaming": True}, "small batch",
               'Norm("n (g c) t h w -> n t g", affine="(g c)", g=16, sizes={"(g c)": 64})', ["then of 196"]),
    "frames of groups": (nn.GroupNorm(8, 64, affine=False), (2, 64, 8, 7, 7), "video", {"streaming": True}, "stream",
                         'Norm("n (g c) t h w -> n t g", g=8)', ["later", "392"]),
    "spectrogram": (nn.BatchNorm2d(1), (64, 1, 80, 100), "spectrograms", {}, "bands", "MelBandNorm(8, 80)",
                    ["microphone", "80 frequencies", "1,000 elements"]),
    "inside of a spectrogram model": (nn.BatchNorm2d(32), (64, 32, 40, 50), "spectrograms", {}, "large batch", KEEP,
                                      ["padding"]),
    "small batch of spectrograms": (nn.BatchNorm2d(32), (2, 32, 40, 50), "spectrograms", {}, "small batch",
                                    "ChannelGroupNorm(8, 32)", ["padding", "mask"]),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_is_chosen_and_why(name):
    layer, shape, data, options, rule, line, said = CASES[name]
    before = copy.deepcopy(layer.state_dict())
    made = recommend(layer, x=shape, data=data, **options)
    assert made.rule == rule
    text = str(made)
    for words in said:
        assert words in text
    assert made.keep == (line is KEEP)
    if made.keep or line is UNJUDGED:
        assert made.layer() is layer
        assert made.imports == ""
        assert line is KEEP or made.choice == UNJUDGED
    else:
        assert made.choice == line
        assert made.then is None or made.then.sizes[0] >= FEW or "even so" in text
    assert all(torch.equal(a, b) for a, b in zip(before.values(), layer.state_dict().values(), strict=True))
    assert layer.training


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case[5] not in (KEEP, UNJUDGED)])
def test_the_line_runs_and_does_what_the_reasons_say(name):
    layer, shape, data, options, _, line, _ = CASES[name]
    made = recommend(layer, x=shape, data=data, **options)
    space = {}
    exec(made.imports, space)
    written, built = eval(line, space), made.layer()
    assert repr(written) == repr(built)
    x = torch.randn(shape or {2: (4, 64), 3: (4, 64, 9), 4: (4, 64, 5, 5)}[RANKS[data]])
    y = built(x)
    assert torch.equal(written(x), y)
    assert y.shape == x.shape
    if x[:1].numel() > 1:  # with one value in all, a group norm raises as torch's does
        torch.testing.assert_close(built(x[:1]), y[:1], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(built.eval()(x), y, rtol=0, atol=0)
    if options.get("streaming"):
        time = {"video": 2, "audio": 1 if "Token" in line else 2}[data]
        later = x.narrow(time, 1, x.shape[time] - 1)
        later.add_(torch.randn(later.shape))
        assert torch.equal(built(x).select(time, 0), y.select(time, 0))
    parameters = {n: p.shape for n, p in layer.named_parameters()}
    if type(built).__name__ != "MelBandNorm":
        assert {n: p.shape for n, p in built.named_parameters()} == parameters  # a checkpoint's fit
    assert (built.weight is None) == (layer.weight is None)


def test_the_new_layer_is_where_the_old_one_is():
    layer = nn.BatchNorm2d(8, device="meta", dtype=torch.bfloat16).eval()
    made = recommend(layer, batch_size=2).layer()
    assert (made.weight.device, made.weight.dtype, made.training) == (layer.weight.device, torch.bfloat16, False)


def test_every_rule_has_a_case():
    decided = {(CASES[name][4], case[0].__class__) for name, case in CASES.items()}
    names = {rule for rule, _ in decided}
    assert names >= {rule.name for rule in RULES} - {"graphs", "frozen"}  # of PyG and torchvision, below


@pytest.mark.parametrize(
    ("layer", "shape", "axes", "groups"),
    [
        (nn.BatchNorm2d(64), (2, 64, 2, 2), (0, 2, 3), 16),
        (nn.InstanceNorm2d(64), (2, 64, 2, 2), (2, 3), 16),
        (nn.GroupNorm(64, 64), (3, 64, 3, 1), (2, 3), 8),
    ],
)
def test_errors_are_those_of_a_simulation(layer, shape, axes, groups):
    made = recommend(layer, x=shape)
    assert f"({groups}, 64" in made.choice
    rng = np.random.default_rng(0)
    now, then = [], []
    for _ in range(400):
        x = rng.normal(3, 2, shape)
        now.append(x.var(axis=axes, ddof=1).ravel())
        then.append(x.reshape(shape[0], groups, -1).var(axis=2, ddof=1).ravel())
    for found, e in ((np.concatenate(now), made.now), (np.concatenate(then), made.then)):
        # 9600 variances or more, of 3 elements at worst: their spread is known to 2 %
        assert found.std() / found.mean() == pytest.approx(e.error, rel=0.05)
    assert f"variance off by {made.then.error:.1%}" in str(made)


def model(norm=nn.BatchNorm2d):
    return nn.Sequential(
        nn.Conv2d(3, 32, 3), norm(32), nn.ReLU(), nn.Sequential(nn.Conv2d(32, 64, 3), norm(64)),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 8), nn.LayerNorm(8),
    )  # fmt: skip


def test_a_model_is_a_table():
    net = model()
    state = copy.deepcopy(net.state_dict())
    table = recommend(net, batch_size=4, x=(1, 3, 12, 12))
    assert list(table) == ["1", "3.1", "7"]
    assert len(table) == 3
    assert [table[name].choice for name in ("1", "3.1")] == ["ChannelGroupNorm(8, 32)", "ChannelGroupNorm(16, 64)"]
    assert table["7"].keep
    assert [table.explanations[name].sizes[0] for name in table] == [400, 256, 8]
    assert [cells for cells in table.rows if cells[0] == "1"] == [
        ("1", "BatchNorm2d", "ChannelGroupNorm(8, 32)", "small batch", "400", "400", "7.1%", "7.1%")
    ]
    assert str(table).splitlines()[2].split()[:3] == ["1", "BatchNorm2d", "ChannelGroupNorm(8,"]
    assert str(table["3.1"]).startswith("3.1: ChannelGroupNorm(16, 64)\n")
    assert "<table>" in table._repr_html_()
    assert all(torch.equal(a, b) for a, b in zip(state.values(), net.state_dict().values(), strict=True))
    assert all(m.training for m in net.modules())
    assert not any(m._forward_pre_hooks for m in net.modules())
    with pytest.raises(SpecError, match=r"instead:  3\.1"):
        table["3.2"]


def test_without_x_what_needs_no_size_is_known():
    table = recommend(model(), batch_size=64)
    assert [table[name].keep for name in table] == [True, True, True]
    assert list(table.explanations) == ["7"]
    unreached = nn.ModuleDict({"used": nn.Identity(), "norm": nn.BatchNorm2d(8)})
    unreached.forward = unreached["used"].forward
    assert "unknown" in str(recommend(unreached, x=(2, 8, 4, 4))["norm"])


def test_what_is_chosen_can_be_put_in_place():
    net = model()
    table = recommend(net, x=(2, 3, 12, 12))
    for name, made in table.recommendations.items():
        parent, _, last = name.rpartition(".")
        setattr(net.get_submodule(parent), last, made.layer())
    x = torch.randn(2, 3, 12, 12)
    torch.testing.assert_close(net(x)[:1], net(x[:1]), rtol=1e-5, atol=1e-5)
    again = recommend(net, x=x)
    assert all(made.keep for made in again.recommendations.values())


def test_a_transformer_stays_as_it_is():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, batch_first=True), 2, enable_nested_tensor=False)
    table = recommend(encoder, x=torch.randn(2, 10, 64), data="sequences", streaming=True)
    assert len(table) == 4
    for made in table.recommendations.values():
        assert (made.keep, made.rule, made.now.sizes[0]) == (True, "tokens", 64)


def test_arguments_by_name():
    layer = nn.Sequential(nn.BatchNorm2d(64))
    made = recommend(layer, x={"input": torch.randn(32, 64, 2, 2)})["0"]
    assert made.keep
    assert made.now.sizes[0] == 32 * 4
    assert not recommend(layer, x=(torch.randn(2, 64, 2, 2),))["0"].keep


def test_a_forward_of_its_own_is_not_judged():
    class Clipped(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x).clamp(-3, 3)

    made = recommend(nn.Sequential(Clipped(8)), batch_size=2)["0"]
    assert (made.keep, made.choice, made.rule, made.kind) == (False, "not judged", "its own", "own")
    assert made.layer().__class__ is Clipped
    assert "Clipped" in made.reasons[0]
    assert recommend(Clipped(8), batch_size=2).kind == "own"


@pytest.mark.extras
def test_resnet():
    torchvision = pytest.importorskip("torchvision", reason="the extra [image]")
    net = torchvision.models.resnet18()
    small, large = (recommend(net, batch_size=size, x=(2, 3, 64, 64)) for size in (2, 256))
    norms = {name: m for name, m in net.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert list(small) == list(large) == list(norms)
    for name, layer in norms.items():
        c, made = layer.num_features, small[name]
        assert made.choice == f"ChannelGroupNorm({min(32, c // 4)}, {c})"
        assert made.rule == "small batch"
        assert large[name].keep
        assert large[name].now.sizes[0] == 128 * made.now.sizes[0]
    deepest = small["layer4.1.bn2"]  # maps of 2 x 2
    assert (deepest.now.sizes[0], deepest.then.sizes[0]) == (2 * 4, 16 * 4)


@pytest.mark.extras
def test_graphs():
    pyg = pytest.importorskip("torch_geometric.nn", reason="the extra [graph]")
    net = pyg.GCN(8, 64, 3, norm="batch_norm")
    edges = torch.tensor([[0, 1, 4, 5], [1, 2, 5, 6]])
    graph = torch.tensor([0] * 3 + [1] * 7)
    x = {"x": torch.randn(10, 8), "edge_index": edges, "batch": graph}
    table = recommend(net, x=x, data="graphs")
    assert list(table) == ["norms.0", "norms.1"]
    made = table["norms.0"]
    assert made.choice == "GraphGroupNorm(8, 64)"  # 3 nodes of 8 channels; of 16 groups, a set would have 12
    assert made.then.sizes == (24, 24, 56)
    assert made.now.sizes[0] == 10
    assert "Cai" in made.reasons[0]
    layer = made.layer()
    h = torch.randn(10, 64)
    torch.testing.assert_close(layer(h, graph)[:3], layer(h[:3]), rtol=1e-5, atol=1e-5)
    alike = recommend(net, x={**x, "batch": None}, batch_size=5, data="graphs")["norms.0"]
    assert alike.then.sizes[0] == 2 * 8  # five graphs of two nodes, as nothing is known of them
    assert recommend(pyg.GraphNorm(64), data="graphs").keep
    own = recommend(pyg.HeteroBatchNorm(64, 3), data="graphs")
    assert (own.choice, own.rule) == ("not judged", "its own")
    from flexnorm import graphs

    assert recommend(graphs.BatchNorm(64, eps=1e-3), data="graphs").choice == "GraphGroupNorm(16, 64, eps=0.001)"
    assert recommend(graphs.GraphGroupNorm(8, 64), data="graphs").keep


@pytest.mark.parametrize(
    ("what", "options", "words"),
    [
        (nn.Linear(3, 3), {}, ["is judged", "Linear without any"]),
        (nn.Sequential(), {"batch_size": 2}, ["a model with norms"]),
        ("n c -> n", {}, ["an nn.Module", "explain"]),
        (nn.BatchNorm2d(8), {}, ["the batch it sees", "batch_size=32"]),
        (model(), {}, ["the batch it sees", "1: BatchNorm2d"]),
        (nn.BatchNorm2d(8), {"batch_size": 0}, ["batch_size"]),
        (nn.BatchNorm2d(8), {"batch_size": 2.5}, ["batch_size"]),
        (nn.BatchNorm2d(8), {"batch_size": True}, ["batch_size"]),
        (nn.BatchNorm2d(8), {"batch_size": 2, "data": "pictures"}, ["kind of data", "'images'"]),
        (nn.BatchNorm2d(8), {"batch_size": 2, "data": "image"}, ['data="images"']),
        (nn.BatchNorm2d(8), {"batch_size": 2, "data": None}, ["kind of data"]),
        (nn.BatchNorm2d(8), {"batch_size": 2, "privacy": "yes"}, ["privacy is True or False"]),
        (nn.BatchNorm2d(8), {"batch_size": 2, "groups": 3}, ["groups divide", "one of 1, 2, 4, 8"]),
        (model(), {"batch_size": 2, "groups": lambda c: 64}, ["32 channels in 1"]),
        (nn.BatchNorm2d(8), {"batch_size": 2, "groups": 0}, ["groups"]),
        (nn.BatchNorm2d(8), {"batch_size": 2, "groups": lambda c: None}, ["groups=None"]),
        (nn.LazyBatchNorm2d(), {"batch_size": 2}, ["lazy", "one call"]),
        (nn.Sequential(nn.LazyBatchNorm2d()), {"x": (2, 3, 4, 4)}, ["lazy", "received: 0"]),
        (model(), {"x": (2, 4, 12, 12)}, ["runs once on x", "(2, 4, 12, 12)"]),
        (model(), {"x": "x"}, ["runs once on x"]),
        (nn.BatchNorm2d(8), {"x": (64, 4, 4, 8)}, ["8 channels, x of shape (64, 4, 4, 8)"]),
        (nn.BatchNorm2d(8), {"x": 5}, ["x is a tensor, or its shape"]),
    ],
)
def test_bad_input(what, options, words):
    state = copy.deepcopy(what.state_dict()) if isinstance(what, nn.Module) and "Lazy" not in repr(what) else {}
    with pytest.raises((SpecError, ShapeError)) as error:
        recommend(what, **options)
    for word in words:
        assert word in str(error.value)
    assert "instead:" in str(error.value)
    if state:
        assert all(torch.equal(a, b) for a, b in zip(state.values(), what.state_dict().values(), strict=True))
        assert all(m.training for m in what.modules())


def test_no_adapter_is_loaded_for_what_is_kept():
    code = (
        "import sys; from torch import nn; from flexnorm.recommendation import recommend;"
        "recommend(nn.BatchNorm2d(8), batch_size=64, x=(1, 8, 4, 4));"
        "print([m for m in sys.modules if m.startswith('flexnorm.') and m.split('.')[1] in"
        " ('images', 'sequences', 'graphs', 'spectrograms', 'drawing')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

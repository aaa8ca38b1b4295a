"""`convert`: against torch's own layers put in by hand, loops, and the classes of others that it recognises."""

import copy
import pickle
import random
import warnings

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torch.nn.utils.prune
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from flexnorm import Norm, ShapeError, SpecError, calibrate, explain, given
from flexnorm.conversion import ChannelAffine, SyncBatchNorm, UnitOffsetNorm, convert, convert_sync_batchnorm
from flexnorm.images import ChannelGroupNorm, default_groups
from flexnorm.sequences import TokenGroupNorm
from flexnorm.transition import Transition, advance, finish

F32 = torch.finfo(torch.float32).eps


def filled(model):
    """Parameters and running statistics that a mistake would show with."""
    for p in model.parameters():
        nn.init.normal_(p, 0, 0.5)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            nn.init.normal_(buffer)
        elif name.endswith("running_var"):
            nn.init.uniform_(buffer, 0.5, 2)
    return model


def small(norm=nn.BatchNorm2d):
    """A residual net of convolutions, with a norm that stands in two places."""

    class Block(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1), norm(channels)
            self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1), norm(channels)
            self.drop = nn.Dropout(0.1)

        def forward(self, x):
            y = F.relu(self.bn1(self.conv1(x)))
            return F.relu(x + self.drop(self.bn2(self.conv2(y))))

    shared = norm(8)
    return nn.Sequential(nn.Conv2d(3, 8, 3), shared, Block(8), shared, Block(8), nn.Flatten(), nn.Linear(8 * 36, 2))


def as_group_norm(norm):
    new = nn.GroupNorm(2, 8, eps=norm.eps)
    new.weight, new.bias = norm.weight, norm.bias
    return new


def state_of(model):
    """All that an error must leave alone."""
    modules = [
        (id(m), type(m), m.training, [len(v) for k, v in vars(m).items() if "_hooks" in k]) for m in model.modules()
    ]
    tensors = [(id(t), t.tolist()) for t in (*model.parameters(), *model.buffers())]
    return modules, tensors, torch.random.get_rng_state().tolist(), repr(model)


def outcome(model, x, dy=None):
    x = x.detach().clone().requires_grad_()
    y = model(x)
    params = [p for p in model.parameters() if p.requires_grad]
    return y.detach(), *torch.autograd.grad(y, (x, *params), torch.ones_like(y) if dy is None else dy)


# --- what it computes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scale", "offset"), [(1, 0), (1e-2, 0), (1, 100)])
def test_group_norm_in_place_of_batch_norm_is_torchs(scale, offset):
    model = filled(small()).eval()
    by_hand = copy.deepcopy(model)
    by_hand[3] = by_hand[1] = as_group_norm(by_hand[1])
    for block in (by_hand[2], by_hand[4]):
        block.bn1, block.bn2 = as_group_norm(block.bn1), as_group_norm(block.bn2)
    kept = dict(model.named_parameters())
    converted, report = convert(model, "group")
    assert converted is model
    assert all(p is kept[name] for name, p in model.named_parameters())
    assert [row[:5] for row in report.rows[:2]] == [
        ("1", "BatchNorm2d", "ChannelGroupNorm", "2", "dropped"),
        ("2.bn1", "BatchNorm2d", "ChannelGroupNorm", "2", "dropped"),
    ]
    x = torch.randn(2, 3, 8, 8) * scale + offset
    # torch's own rounding counts, too, and each layer divides by its sigma
    for ours, theirs in zip(outcome(model, x), outcome(by_hand, x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * theirs.abs().max().item())
    model, report = convert(model, "torch")
    assert type(model[1]) is nn.GroupNorm
    assert model[3] is model[1]
    for ours, theirs in zip(outcome(model, x), outcome(by_hand, x), strict=True):
        assert torch.equal(ours, theirs)


SAME = {  # layers, an input, and what they become under their own name: the same function
    "batch1": (lambda: nn.BatchNorm1d(6), (4, 6, 5), "batch", Norm),
    "batch1 flat": (lambda: nn.BatchNorm1d(6), (4, 6), "batch", Norm),
    "batch2": (lambda: nn.BatchNorm2d(6, eps=0.1, momentum=0.3), (4, 6, 5, 3), "batch", Norm),
    "batch3": (lambda: nn.BatchNorm3d(6, affine=False), (4, 6, 5, 3, 2), "batch", Norm),
    "batch, no statistics": (lambda: nn.BatchNorm2d(6, track_running_stats=False), (4, 6, 5, 3), "batch", Norm),
    "batch, average": (lambda: nn.BatchNorm2d(6, momentum=None), (4, 6, 5, 3), "batch", Norm),
    "batch to sync": (lambda: nn.BatchNorm2d(6, momentum=0.3), (4, 6, 5, 3), "sync", SyncBatchNorm),
    "sync": (lambda: nn.SyncBatchNorm(6, eps=0.1), (4, 6, 5, 3), "sync", SyncBatchNorm),
    "sync to batch": (lambda: nn.SyncBatchNorm(6, eps=0.1), (4, 6, 5, 3), "batch", Norm),
    "instance1": (lambda: nn.InstanceNorm1d(6), (4, 6, 5), "instance", Norm),
    "instance2": (lambda: nn.InstanceNorm2d(6, eps=0.1, affine=True), (4, 6, 5, 3), "instance", Norm),
    "instance3": (lambda: nn.InstanceNorm3d(6), (4, 6, 5, 3, 2), "instance", Norm),
    "layer": (lambda: nn.LayerNorm(6, eps=0.1), (4, 5, 6), "layer", Norm),
    "layer, no bias": (lambda: nn.LayerNorm(6, bias=False), (4, 5, 6), "layer", Norm),
    "layer of two axes": (lambda: nn.LayerNorm((3, 6)), (4, 5, 3, 6), "layer", Norm),
    "layer, plain": (lambda: nn.LayerNorm(6, elementwise_affine=False), (4, 6), "layer", Norm),
    "rms": (lambda: nn.RMSNorm(6, eps=0.1), (4, 5, 6), "rms", Norm),
    "rms, eps of torch": (lambda: nn.RMSNorm(6), (4, 5, 6), "rms", Norm),
    "group": (lambda: nn.GroupNorm(3, 6, eps=0.1), (4, 6, 5), "group", ChannelGroupNorm),
    "group, plain": (lambda: nn.GroupNorm(2, 6, affine=False), (4, 6), "group", ChannelGroupNorm),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("scale", "offset"), [(1, 0), (1e-3, 0), (10, 1e3)])
@pytest.mark.parametrize("name", SAME)
def test_under_its_own_name_a_norm_computes_what_it_did(name, scale, offset, training):
    make, shape, target, cls = SAME[name]
    theirs = filled(make()).train(training)
    old = copy.deepcopy(theirs)
    ours, report = convert(theirs, target)
    assert type(ours) is cls
    assert len(report.rows) == 1
    assert report.rows[0][0] == "(model)"
    x = torch.randn(shape) * scale + offset
    dy = torch.randn(shape)
    # design 4.4: ratio of mean to sigma, which eps bounds from below; torch loses as much; a weight is below 3
    limit = 64 * F32 * (1 + offset / scale)
    for ours_, theirs_ in zip(outcome(ours, x, dy), outcome(old, x, dy), strict=True):
        assert (ours_ - theirs_).abs().max() <= limit * theirs_.abs().max().clamp(min=1)
    assert list(ours.state_dict()) == list(old.state_dict())
    for key, value in old.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value, rtol=1e-5, atol=1e-4 * scale)
    old.load_state_dict(ours.state_dict())
    ours.load_state_dict(old.state_dict())
    back = copy.deepcopy(ours)
    if "batch1" in name or name == "sync to batch":
        with pytest.raises(SpecError, match="BatchNorm1d, 2d, 3d take so many axes"):
            convert(back, "torch")
        return
    back, _ = convert(back, "torch")
    assert type(back) is (nn.SyncBatchNorm if target == "sync" else type(old))
    assert all(torch.equal(a, b) for a, b in zip(outcome(back, x, dy), outcome(old, x, dy), strict=True))


def test_the_eps_of_rms_norms_is_that_of_the_dtype_they_compute_in():
    for dtype, x in ((torch.float64, 1e-8), (torch.float32, 1e-4), (torch.float16, 1e-4)):
        theirs = nn.RMSNorm(4, dtype=dtype)
        x = torch.full((2, 4), x, dtype=dtype)
        expected = theirs(x)
        ours, _ = convert(theirs, "rms")
        torch.testing.assert_close(ours(x), expected)


KINDS = {
    "group": "n (g c) h w -> n g",
    "batch": "n c h w -> c",
    "instance": "n c h w -> n c",
    "layer": "n c h w -> n",
}


@pytest.mark.parametrize("layout", ["second", "last"])
@pytest.mark.parametrize("target", ["group", "batch", "instance", "layer", "rms"])
def test_every_kind_becomes_every_other(target, layout):
    """The mean and variance of sets, written out; the layer after a LayerNorm keeps its channels last."""
    sources = [nn.LayerNorm(8, eps=0.01), nn.RMSNorm(8, eps=0.01)]
    over = {"group": (2, 3), "batch": (0, 1, 2), "instance": (1, 2), "layer": (3,), "rms": (3,)}
    if layout == "second":
        sources = [nn.BatchNorm2d(8, eps=0.01), nn.GroupNorm(4, 8, eps=0.01)]
        sources.append(nn.InstanceNorm2d(8, eps=0.01, affine=True, track_running_stats=True))
        over = {"group": (2, 3, 4), "batch": (0, 2, 3), "instance": (2, 3), "layer": (1, 2, 3), "rms": (1, 2, 3)}
    for source in sources:
        source = filled(source).double()
        weight, bias = source.weight.detach(), getattr(source, "bias", None)
        x = torch.randn((3, 8, 4, 5) if layout == "second" else (3, 4, 5, 8), dtype=torch.float64) * 3 + 2
        kind = {"BatchNorm2d": "batch", "InstanceNorm2d": "instance"}.get(type(source).__name__, "")
        new, _ = convert(nn.Sequential(source), target, **({"groups": 2} if target == "group" else {}))
        split = x
        if target == "group":
            split = x.unflatten(1 if layout == "second" else -1, (2, 4))
            over["group"] = (2, 3, 4) if layout == "second" else (4,)
        mean = 0 if target == "rms" else split.mean(over[target], keepdim=True)
        var = ((split - mean) ** 2).mean(over[target], keepdim=True)
        y = ((split - mean) / (var + 0.01).sqrt()).reshape(x.shape)
        axes = (8, 1, 1) if layout == "second" else (8,)
        y = y * weight.view(axes) + (0 if bias is None else bias.detach().view(axes))
        torch.testing.assert_close(new.train()(x), y, msg=f"{kind} to {target}")


def test_running_statistics_are_carried_where_the_target_has_them():
    x = torch.randn(4, 6, 5, 3)
    for source in (nn.InstanceNorm2d(6, affine=True, track_running_stats=True), nn.BatchNorm2d(6)):
        source = filled(source).eval()
        expected, mean = source(x), source.running_mean
        new, report = convert(source, "batch")
        assert report.rows[0][4] == "carried"
        assert new.running_mean is mean
        torch.testing.assert_close(new(x), expected)
    new, report = convert(nn.GroupNorm(2, 6).eval(), "batch")
    assert report.rows[0][4] == "new"
    assert "calibrate" in report.rows[0][-1]
    with pytest.raises(SpecError, match="have seen no batch"):
        new(x)
    calibrate(new, [x])
    torch.testing.assert_close(new.running_mean, x.mean((0, 2, 3)))


@pytest.mark.parametrize("mean", [0, 1e3])
@pytest.mark.parametrize("source", ["batch", "plain", "instance"])
def test_batch_norm_in_evaluation_is_folded(source, mean):
    norm = {
        "batch": lambda: nn.BatchNorm2d(6, eps=0.1),
        "plain": lambda: nn.BatchNorm2d(6, affine=False),
        "instance": lambda: nn.InstanceNorm2d(6, affine=True, track_running_stats=True),
    }[source]()
    norm = filled(norm)
    norm.running_mean += mean
    model = nn.Sequential(nn.Conv2d(3, 6, 1), norm).eval()
    x = torch.randn(4, 3, 5, 5)
    expected = copy.deepcopy(model).double()(x.double())
    kept = dict(model.named_parameters())
    model, report = convert(model, "affine", probe=x)
    assert type(model[1]) is ChannelAffine
    assert report.rows[0][4] == "folded"
    # bias and x * weight are as large as mean / sigma, and cancel; sigma is above 0.7, a weight below 2
    limit = 16 * F32 * (1 + mean)
    assert (model(x) - expected).abs().max() <= limit
    assert report.changes["1"] <= limit
    assert (model.train()(x) - expected).abs().max() <= limit  # of no batch
    assert all(p is kept[name] for name, p in model.named_parameters() if name in kept)
    assert not list(model.buffers())
    half = model[1](x.half().repeat(1, 2, 1, 1))
    assert half.dtype == torch.float16
    with pytest.raises(ShapeError, match="num_channels = 6"):
        model[1](x)


def test_what_cannot_be_folded():
    tied = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4))
    tied[1].weight = tied[0].weight
    for model in (nn.GroupNorm(2, 4), nn.BatchNorm1d(4, track_running_stats=False), tied):
        before = state_of(model)
        with pytest.raises(SpecError, match=r"running statistics|another layer"):
            convert(model, "affine")
        assert state_of(model) == before


def test_to_torch_keeps_what_torch_has_not():
    model = nn.Sequential(
        ChannelGroupNorm(2, 8, activation="silu"),
        ChannelGroupNorm(2, 8, groups=[3, 5]),
        TokenGroupNorm(2, 8),
        TokenGroupNorm(1, 8),
        Norm("n c t -> n c", affine="c", c=8),
        Norm("n c ... -> n c", c=8),
        Norm("n c ... -> n", affine="c", c=8, bias=False),
        Norm("a (b d) q, a q -> a b", affine="(b d)", b=2, d=4),
        Norm("v c -> graph[v] c", affine="c", c=8),
        Norm("n (g c) ... -> n g", g=2),
        Norm("... c -> ...", affine="c", c=8, center=False),
        Norm("n c h w -> n h w", affine="c", c=8),
        Norm("n c ... -> n c", scale=False),
        Norm("b c t -> b c", affine="c", c=8, cumulative="t"),
        Norm("n c ... -> n c", conditional="n c"),
        Norm("n c ... -> c", affine="c", c=8, sharded="n ...", track_running_stats=True),
        Norm("a b c -> a b", affine="c", c=8),
        Norm("a b c -> a b", affine="b", b=8),
    )
    model, report = convert(filled(model), "torch")
    became = [type(module).__name__ for module in model]
    expected = "ChannelGroupNorm ChannelGroupNorm TokenGroupNorm LayerNorm InstanceNorm1d GroupNorm GroupNorm GroupNorm"
    expected += " Norm Norm Norm Norm Norm Norm Norm Norm LayerNorm InstanceNorm1d"
    assert became == expected.split()
    assert all(row[-1] for row in report.rows if row[2] == "kept")
    assert model[6].bias is None
    model = nn.Sequential(ChannelGroupNorm(2, 8), ChannelGroupNorm(2, 8))
    model[0](torch.randn(2, 8, 3), torch.ones(2, 3))
    model, report = convert(model, "torch")
    assert report.rows[0][-1] == "it is called with masks"
    assert type(model[1]) is nn.GroupNorm


# --- what is kept ----------------------------------------------------------------------------------------------------


def test_hooks_modes_gradients_and_names_are_kept():
    model = small()
    model[2].bn1.eval()
    model[2].bn2.weight.requires_grad_(False)
    seen = []
    norm = model[1]
    handles = [
        norm.register_forward_pre_hook(lambda m, a, k: seen.append("pre"), with_kwargs=True),
        norm.register_forward_hook(lambda m, a, k, y: seen.append("post"), with_kwargs=True),
        norm.register_full_backward_hook(lambda m, *_: seen.append("backward")),
        norm.register_load_state_dict_pre_hook(lambda m, *_: seen.append(type(m).__name__)),
    ]
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    optimizer = torch.optim.AdamW(model.parameters(), 0.1)
    model, _ = convert(model, "group")
    assert [name for name, _ in model.named_modules(remove_duplicate=False)] == names
    assert not model[2].bn1.training
    assert model[2].bn2.training
    assert not model[2].bn2.weight.requires_grad
    assert model[3] is model[1]
    del norm
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    assert sorted(seen) == ["backward", "backward", "post", "post", "pre", "pre"]
    before = model[1].weight.detach().clone()
    optimizer.step()
    assert not torch.equal(model[1].weight, before)
    seen.clear()
    model.load_state_dict(model.state_dict())
    assert set(seen) == {"ChannelGroupNorm"}
    for handle in handles:
        handle.remove()
    seen.clear()
    model(torch.randn(2, 3, 8, 8))
    assert not seen
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model[1]))):
        assert len(again.state_dict()) in (2, len(model.state_dict()))


@pytest.mark.parametrize("convert_", [lambda m: convert(m, "sync")[0], convert_sync_batchnorm])
def test_both_ways_to_synchronized_norms_keep_hooks_with_keywords(convert_):
    model, seen = nn.Sequential(nn.BatchNorm1d(3)), []
    model[0].register_forward_hook(lambda m, args, kwargs, y: seen.append(kwargs), with_kwargs=True)
    model = convert_(model)
    assert type(model[0]) is SyncBatchNorm
    model(torch.randn(4, 3))
    assert seen == [{}]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("target", ["group", "batch", "instance", "layer", "affine"])
def test_dtype_and_device(target, dtype):
    for device in ("cpu", "meta"):
        model = nn.Sequential(nn.BatchNorm2d(8)).to(device, dtype).eval()
        model, _ = convert(model, target)
        assert {t.dtype for t in model.state_dict().values() if t.is_floating_point()} == {dtype}
        assert {t.device.type for t in model.state_dict().values()} == {device}
        x = torch.randn(2, 8, 3, 3, dtype=dtype, device=device)
        assert model(x).dtype == dtype
    model, _ = convert(nn.Sequential(nn.GroupNorm(2, 8)).to("meta", dtype), "batch")
    assert {t.device.type for t in model.state_dict().values()} == {"meta"}
    assert model[0].running_mean.dtype == dtype


def test_parametrizations_are_kept():
    class Positive(nn.Module):
        def forward(self, w):
            return w.exp()

    model = nn.Sequential(nn.BatchNorm2d(8))
    parametrize.register_parametrization(model[0], "weight", Positive())
    nn.init.normal_(model[0].parametrizations.weight.original)
    original = model[0].parametrizations.weight.original
    theirs = nn.GroupNorm(2, 8)
    theirs.weight = nn.Parameter(original.detach().exp())
    keys = [key for key in model.state_dict() if "running" not in key and "batches" not in key]
    model, report = convert(model, "group")
    assert report.rows[0][1:3] == ("BatchNorm2d", "ChannelGroupNorm")
    assert list(model.state_dict()) == keys
    assert model[0].parametrizations.weight.original is original
    x = torch.randn(2, 8, 3, 3)
    torch.testing.assert_close(model(x), theirs(x))
    with pytest.raises(SpecError, match="zero_init sets"):
        convert(model, "torch", zero_init="0")
    with pytest.raises(SpecError, match="parametrized"):
        convert(nn.utils.parametrizations.weight_norm(nn.BatchNorm2d(8), dim=None), "affine")


def test_a_layer_with_more_than_its_class_has_is_kept():
    model = nn.Sequential(nn.BatchNorm2d(8), nn.BatchNorm2d(8))
    nn.utils.prune.random_unstructured(model[0], "weight", 0.5)
    model, report = convert(model)
    assert type(model[0]) is nn.BatchNorm2d
    assert "weight_mask, weight_orig" in report.rows[0][-1]


class Activated(nn.BatchNorm2d):
    """As timm's BatchNormAct2d."""

    def __init__(self, channels, act=None, **options):
        super().__init__(channels, **options)
        self.act = nn.Identity() if act is None else act

    def forward(self, x):
        return self.act(super().forward(x))


class Pixel(nn.LayerNorm):
    def forward(self, x):
        y = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return y.permute(0, 3, 1, 2)


class LlamaLike(nn.Module):
    def __init__(self, size, eps=1e-6):
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(size)), eps

    def forward(self, hidden):
        dtype = hidden.dtype
        hidden = hidden.to(torch.float32)
        hidden = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * hidden.to(dtype)


class GemmaLike(nn.Module):
    def __init__(self, size, eps=1e-6):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.zeros(size)), eps

    def forward(self, x):
        y = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        return (y * (1.0 + self.weight.float())).type_as(x)


class Renamed(nn.BatchNorm2d):
    pass


FOREIGN = {
    "relu": (lambda: Activated(8, nn.ReLU(inplace=True)), "group", "batch", (3, 8, 4, 5)),
    "silu": (lambda: Activated(8, nn.SiLU(), eps=0.1), "group", "batch", (3, 8, 4, 5)),
    "gelu": (lambda: Activated(8, nn.GELU(), affine=False), "group", "batch", (3, 8, 4, 5)),
    "none": (lambda: Activated(8), "group", "batch", (3, 8, 4, 5)),
    "renamed": (lambda: Renamed(8), "group", "batch", (3, 8, 4, 5)),
    "pixel": (lambda: Pixel(8, eps=0.1), "group", "layer", (3, 8, 4, 5)),
    "llama": (lambda: LlamaLike(8), "group", "rms", (3, 5, 8)),
    "gemma": (lambda: GemmaLike(8, eps=0.1), "rms", "rms", (3, 5, 8)),
}


@pytest.mark.parametrize("scale", [1, 1e-3])
@pytest.mark.parametrize("name", FOREIGN)
def test_a_class_of_others_is_converted_when_it_is_named_and_known(name, scale):
    make, other, own, shape = FOREIGN[name]
    model = filled(nn.Sequential(make(), nn.BatchNorm2d(8) if len(shape) == 4 else nn.LayerNorm(8)))
    cls = type(model[0])
    silent, report = convert(copy.deepcopy(model), {nn.BatchNorm2d: "group", nn.LayerNorm: "group"})
    assert type(silent[0]) is cls
    if "Like" in cls.__name__:
        assert report.rows[0][0] == "1"  # nothing says that the first is a norm
    else:
        assert report.rows[0][2] == "kept"
        assert f"to={{{cls.__name__}: ...}}" in report.rows[0][-1]
    x = torch.randn(shape) * scale + scale
    dy = torch.randn(shape)
    for key in (cls, "0"):
        old = copy.deepcopy(model[0])
        weight = model[0].weight
        new, _ = convert(copy.deepcopy(model), {key: own})
        assert isinstance(new[0], Norm)
        for a, b in zip(outcome(new[0], x, dy), outcome(old, x, dy), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * b.abs().max().item())
        torch.testing.assert_close(new[0].eval()(x), old.eval()(x), rtol=1e-4, atol=1e-5)
        assert weight is None or torch.equal(new[0].weight, weight)
    if name == "gemma":
        assert type(new[0]) is UnitOffsetNorm
        torch.testing.assert_close(pickle.loads(pickle.dumps(new[0]))(x), old(x), rtol=1e-4, atol=1e-5)
        new[0].reset_parameters()
        assert not new[0].weight.any()
        with pytest.raises(SpecError, match="1 \\+ weight"):
            convert(model[0], {cls: "group"})
        return
    new, _ = convert(model, {cls: other})
    assert type(new[0]) in (ChannelGroupNorm, TokenGroupNorm)


class Unbiased(nn.LayerNorm):
    def forward(self, x):
        return (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + self.eps) * self.weight + self.bias


class Outside(LlamaLike):
    def forward(self, x):
        return x / (x.pow(2).mean(-1, keepdim=True).sqrt() + self.variance_epsilon) * self.weight


def test_rms_finds_the_rms_norms_of_others():
    class MyRMSNorm(LlamaLike):
        pass

    class OddRMSNorm(Outside):
        pass

    model = nn.Sequential(MyRMSNorm(8), nn.Linear(8, 8), GemmaLike(8), OddRMSNorm(8))
    model, report = convert(model, "rms")
    assert [type(m) for m in model] == [Norm, nn.Linear, GemmaLike, OddRMSNorm]  # GemmaLike does not say that it is one
    assert report.rows[1][-1] == "computes nothing that flexnorm has a norm for"
    model, _ = convert(model, "torch")
    assert type(model[0]) is nn.RMSNorm
    assert model[0].eps == 1e-6


class Ghost(nn.BatchNorm2d):
    def forward(self, x):
        parts = x.chunk(2) if self.training else [x]
        return torch.cat([super(Ghost, self).forward(part) for part in parts])


@pytest.mark.parametrize(
    "make",
    [
        lambda: Unbiased(8),
        lambda: Ghost(8),
        lambda: Outside(8),
        lambda: nn.LocalResponseNorm(2),
    ],
)
def test_what_computes_something_else_is_refused(make):
    norm = make()
    model = nn.Sequential(nn.BatchNorm2d(8), norm)
    before = state_of(model)
    with pytest.raises(SpecError, match="computes something else"):
        convert(model, {nn.BatchNorm2d: "group", type(norm): "group"})
    assert state_of(model) == before
    model, report = convert(model, {nn.BatchNorm2d: "group", type(norm): None})
    assert model[1] is norm
    assert report.rows[1][1:3] == (type(norm).__name__, "kept")


# --- rules -----------------------------------------------------------------------------------------------------------


def test_the_first_rule_that_fits():
    model = nn.Sequential(
        nn.BatchNorm2d(8), nn.BatchNorm2d(8), nn.InstanceNorm2d(8), nn.BatchNorm2d(8), nn.LayerNorm(8)
    )
    rules = {
        "1": None,
        "3": lambda name, m: nn.GroupNorm(8, m.num_features),
        nn.BatchNorm2d: "group",
        nn.Module: "layer",
    }
    model, report = convert(model, rules)
    assert [type(m) for m in model] == [ChannelGroupNorm, nn.BatchNorm2d, Norm, nn.GroupNorm, Norm]
    assert report.rows[1][2] == "kept"
    assert report.rows[3][3] == "8"


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("2.*", [0, 1, 1, 0, 0]),
        (nn.BatchNorm2d, [1, 1, 1, 1, 1]),
        (lambda name, m: name.endswith("bn2"), [0, 0, 1, 0, 1]),
        (["2.bn1", "3"], [1, 1, 0, 0, 0]),  # 3 is the same layer as 1
    ],
)
def test_where(where, expected):
    _, report = convert(small(), "group", where=where)
    assert [int(row[2] != "kept") for row in report.rows] == expected


def test_functions_hand_on_what_fits():
    model = filled(nn.Sequential(nn.BatchNorm2d(8), nn.BatchNorm2d(8), nn.BatchNorm2d(8), nn.BatchNorm2d(8)))
    model.double().eval()
    before = [module.weight for module in model]
    made = {
        "0": lambda name, m: nn.Sequential(m, nn.ReLU()),
        "1": lambda name, m: nn.Sequential(nn.GroupNorm(2, 8), nn.ReLU()),
        "2": lambda name, m: m,
        "3": lambda name, m: nn.GroupNorm(2, 8, eps=0.5),
    }
    model, report = convert(model, made, probe=torch.randn(2, 8, 3, 3, dtype=torch.float64))
    assert model[0][0].weight is before[0]
    assert report.rows[1][-1] == "without its weight, bias"
    assert model[1][0].weight.dtype == torch.float64
    assert not model[1].training
    assert not model[1][0].training
    assert type(model[2]) is nn.BatchNorm2d
    assert model[3].weight is before[3]
    assert model[3].eps == 0.5
    one = nn.GroupNorm(2, 8)
    for to, rule in ((lambda *_: one, "a new layer"), (lambda *_: 3, "returns a layer")):
        with pytest.raises(SpecError, match=rule):
            convert(small(), to)


# --- groups ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [default_groups(24), default_groups(40), 5]),
        ({"groups": 4}, [4, 4, 4]),
        ({"groups": "gcd"}, [8, 8, 4]),
        ({"groups": lambda c: c // 2}, [12, 20, 10]),
        ({"channels_per_group": 4}, [6, 10, 5]),
        ({"groups": {"0": 3, "[12]": "gcd"}}, [3, 8, 4]),
        ({"groups": {"1": 20}}, [6, 20, 5]),
    ],
)
def test_number_of_groups(options, expected):
    model = nn.Sequential(nn.BatchNorm2d(24), nn.BatchNorm2d(40), nn.GroupNorm(5, 20))
    model, report = convert(model, "group", **options)
    assert [m.num_groups for m in model] == expected
    assert [row[3] for row in report.rows] == [str(g) for g in expected]
    with pytest.raises(SpecError, match="is one already"):
        convert(model, "group")
    model, _ = convert(model, "group", groups=1)
    assert [m.num_groups for m in model] == [1, 1, 1]


BAD = {
    "a number that does not divide": ({"groups": 32}, ShapeError, r"0: groups=32[\s\S]*1, 2, 3, 4, 6, 8, 12, 24"),
    "channels that do not divide": ({"channels_per_group": 5}, ShapeError, r"0: channels_per_group=5"),
    "zero": ({"groups": 0}, SpecError, "groups of 0 is a whole number of 1 or more"),
    "zero channels": ({"channels_per_group": 0}, SpecError, "whole number of 1 or more"),
    "both": ({"groups": 2, "channels_per_group": 2}, SpecError, "say the same"),
    "no number": ({"groups": 2.5}, SpecError, "groups is a number"),
    "word": ({"groups": "lcm"}, SpecError, "groups is a number"),
    "without group norms": ({"groups": 2, "to": "batch", "where": "2"}, SpecError, "groups are those of group norms"),
    "names": ({"groups": {"1.bm": 4}}, SpecError, r"instead:  '1.bn'"),
    "target": ({"to": "grup"}, SpecError, r"instead:  'group'"),
    "a class": ({"to": nn.GroupNorm}, SpecError, "a function of name and layer"),
    "nothing": ({"to": None}, SpecError, "a function of name and layer"),
    "key": ({"to": {3: "group"}}, SpecError, "names and types"),
    "name": ({"to": {"1.bnn": "group"}}, SpecError, r"instead:  '1.bn'"),
    "where": ({"where": "layer1.*"}, SpecError, "norms in the model"),
    "no where": ({"where": 3}, SpecError, "where holds names"),
    "no steps": ({"steps": 0}, SpecError, "steps is a whole number of 1 or more"),
    "steps of affine": ({"steps": 5, "to": "affine", "where": "0"}, SpecError, "from one norm to another"),
    "steps and zeros": ({"steps": 5, "zero_init": "0"}, SpecError, "goes on from what is trained"),
    "steps to a wrapper": ({"steps": 5, "to": lambda n, m: nn.Sequential(m)}, SpecError, "does not hold the old"),
    "zeros of none": ({"zero_init": "bn"}, SpecError, "norms in the model"),
    "zeros without weight": ({"zero_init": "2"}, SpecError, "sets the weight"),
    "zeros of no kind": ({"zero_init": 3}, SpecError, "zero_init is True, False or names"),
    "zeros of nothing": ({"zero_init": None}, SpecError, "zero_init is True, False or names"),
    "zeros of numbers": ({"zero_init": [0, 1]}, SpecError, "zero_init is True, False or names"),
    "an array of groups": ({"groups": np.array([2, 4])}, SpecError, "groups is a number"),
    "arrays of groups": ({"groups": {"0": np.array([2, 4])}}, SpecError, "whole number of 1 or more"),
    "no residual blocks": ({"zero_init": True}, SpecError, "none found"),
    "nothing to do": ({"to": "torch"}, SpecError, "2 BatchNorm2d: is torch's already"),
    "probe": ({"probe": torch.randn(2, 5, 4, 4)}, SpecError, "the probe is what the model is called with"),
    "probe of no tensor": ({"probe": "x"}, SpecError, "the probe is what the model is called with"),
    "probe of keywords": ({"probe": {"image": 3}}, SpecError, "the probe is what"),
    "a new layer that does not run": (
        {"probe": torch.randn(2, 24, 4, 4), "to": lambda n, m: ChannelGroupNorm(1, 3)},
        SpecError,
        r"in 0: ChannelGroupNorm\(1, 3",
    ),
}


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize("name", BAD)
def test_on_an_error_nothing_has_changed(name, dry_run):
    options, error, said = BAD[name]
    inner = nn.Sequential()
    inner.add_module("bn", nn.BatchNorm2d(24))
    model = nn.Sequential(nn.BatchNorm2d(24), inner, nn.InstanceNorm2d(24))
    before = state_of(model)
    with pytest.raises(error, match=said) as info:
        convert(model, dry_run=dry_run, **options)
    assert "received:" in str(info.value)
    assert "instead:" in str(info.value)
    assert state_of(model) == before


@pytest.mark.parametrize("dry_run", ["no", 1, None])
def test_dry_run_is_a_bool(dry_run):
    model = small()
    before = state_of(model)
    with pytest.raises(SpecError, match="dry_run is True or False"):
        convert(model, dry_run=dry_run)
    assert state_of(model) == before


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize("options", [{"zero_init": "0"}, {"to": "affine"}, {"to": "torch", "zero_init": "0"}])
def test_weights_that_cannot_be_written_are_found_before_anything_changes(options, dry_run):
    with torch.inference_mode():
        inference = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4)).eval()
    expanded = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4)).eval()
    expanded[0].weight = nn.Parameter(torch.ones(1).expand(4))
    for model, said in ((inference, "weight of 0, an inference tensor"), (expanded, "weight of 0, expanded")):
        before = state_of(model)
        with pytest.raises(SpecError, match=said):
            convert(model, dry_run=dry_run, **options)
        assert state_of(model) == before
    with torch.inference_mode():
        convert(inference, **options)
    assert options.get("to") or not inference[0].weight.any()


def test_names_with_brackets_are_names():
    model = nn.Sequential()
    model.add_module("norm[0]", nn.BatchNorm2d(8))
    model.add_module("norm0", nn.BatchNorm2d(8))
    counts = {"norm[0]": 4, "norm0": 2}
    model, report = convert(model, {"norm[0]": "group", "norm0": "group"}, groups=counts, zero_init="norm[0]")
    assert [row[3] for row in report.rows] == ["4", "2"]
    assert [bool(m.weight.any()) for m in model] == [False, True]
    _, report = convert(model, "torch", where=["norm[0]"], dry_run=True)
    assert [row[2] for row in report.rows] == ["GroupNorm", "kept"]


def test_models_that_cannot_be_converted():
    for model, said in ((nn.Linear(3, 3), "no norm at all"), (Activated(4), "a subclass")):
        with pytest.raises(SpecError, match=said):
            convert(model)
    with pytest.raises(SpecError, match="one call of the model first"):
        convert(nn.Sequential(nn.BatchNorm2d(4), nn.LazyBatchNorm2d()))
    with pytest.raises(SpecError, match=r"an nn\.Module"):
        convert([nn.BatchNorm2d(4)])


# --- report and probe ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_a_probe_measures_every_layer_and_changes_nothing(training):
    model = filled(small()).train(training)
    model[2].bn1.train(not training)
    x = torch.randn(3, 3, 8, 8)
    inputs = {}
    names = {module: name for name, module in model.named_modules()}
    handles = [
        m.register_forward_hook(lambda m, args, y: inputs.setdefault(names[m], []).append((args[0].clone(), y.clone())))
        for m in model.modules()
        if isinstance(m, nn.BatchNorm2d)
    ]
    old = copy.deepcopy(model)
    with torch.random.fork_rng():
        before = model(x)
    model.load_state_dict(old.state_dict())  # as it was before that call
    for handle in handles:
        handle.remove()
    state = state_of(model)
    _, planned = convert(model, "group", probe=x, dry_run=True)
    values = {key: t.clone() for key, t in model.state_dict().items()}
    assert state[0] == state_of(model)[0]
    assert state[2:] == state_of(model)[2:]
    assert all(torch.equal(values[key], t) for key, t in old.state_dict().items())
    model, report = convert(model, "group", probe=(x,))
    assert report.rows == planned.rows
    with torch.random.fork_rng():
        after = model(x)
    layers = dict(model.named_modules())
    assert report.changes[""] == pytest.approx((after - before).abs().max().item(), rel=1e-4)
    for name, seen in inputs.items():
        expected = max((layers[name](x) - y).abs().max().item() for x, y in seen)
        assert report.changes[name] == pytest.approx(expected, rel=1e-4)
    assert len(inputs["1"]) == 2  # it stands in two places
    assert report.rows[0][-1] == "also 3"
    assert report.rows[-1][0] == "(model)"
    assert f"{report.changes['']:.2g}" == report.rows[-1][5]


def test_probes_of_all_kinds():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.unused = nn.BatchNorm1d(4), nn.BatchNorm1d(4)

        def forward(self, x, *, times=1):
            return {"y": [self.norm(x) * times], "n": 3}

    x = torch.randn(5, 4) * 3 + 1
    model = Model().eval()
    probes = {
        (x,): 1,
        "keywords": 2,
        "function": 2,
    }
    expected = (model.norm(x) - F.group_norm(x, 1)).abs().max().item()
    for probe, times in probes.items():
        given_ = {"keywords": {"x": x, "times": 2}, "function": lambda m: m(x, times=2)}.get(probe, probe)
        _, report = convert(model, probe=given_, dry_run=True)
        assert report.changes["norm"] == pytest.approx(expected, rel=1e-4)
        assert report.changes[""] == pytest.approx(times * expected, rel=1e-4)
        assert report.rows[1][5] == "not seen"
    _, report = convert(model, probe=(5, 4), dry_run=True)  # a shape: zeros
    assert report.changes["norm"] == 0
    _, report = convert(nn.GroupNorm(2, 4).eval(), "batch", probe=x)
    assert report.rows[0][5] == "not seen"


def test_a_probe_leaves_buffers_of_any_kind():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(4)
            self.register_buffer("edges", torch.eye(3).to_sparse())
            self.register_buffer("shape", torch.empty(2, device="meta"))
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls.add_(1)
            self.edges, self.shape = self.edges * 2, torch.empty(3, device="meta")
            return self.norm(x) + self.calls

    x = torch.randn(5, 4)
    for look in (lambda model: convert(model, probe=x, dry_run=True), lambda model: explain(model, x)):
        model = Model()
        held = dict(model.named_buffers())
        look(model)
        assert all(buffer is held[name] for name, buffer in model.named_buffers())
        assert model.calls == 0
        assert model.norm.num_batches_tracked == 0
        assert model.training


class Busy(nn.Module):
    """A forward that does what a model may do beside its layers."""

    def __init__(self):
        super().__init__()
        self.norm, self.calls, self.log, self.table = nn.BatchNorm1d(4), 0, [], {"kept": 1}
        self.register_buffer("cache", None)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        self.last = self.middle = self.norm(x)
        self.log.append(x)
        self.table["x"] = x
        self.count += 1
        self.cache = torch.zeros(3)
        self.register_buffer("late", torch.ones(2))
        self.training = not self.training
        noise = random.random() + np.random.rand() + torch.rand(())
        return x + self.middle * noise * (0 if self.calls > 1 else 1)


def assert_idle(model, states):
    assert model.calls == model.count == 0
    assert model.log == []
    assert model.table == {"kept": 1}
    assert model.cache is None
    assert list(model._buffers) == ["cache", "count"]
    assert not hasattr(model, "last")
    assert model.training
    assert states == random_states()


def random_states():
    return random.getstate(), repr(np.random.get_state()), torch.random.get_rng_state().tolist()


@pytest.mark.parametrize(
    "look",
    [
        lambda m, x: convert(m, "batch", probe=x, dry_run=True),
        lambda m, x: convert(m, "batch", probe=x),
        lambda m, x: explain(m, x),
        lambda m, x: convert(m, "batch", zero_init=True),
        lambda m, x: convert(m, "group", zero_init=True, dry_run=True),
    ],
)
def test_a_model_is_as_idle_as_before(look):
    model, x = Busy(), torch.randn(5, 4)
    states = random_states()
    result = look(model, x)
    assert_idle(model, states)
    assert not any(isinstance(value, torch.fx.Proxy) for m in model.modules() for value in vars(m).values())
    pickle.dumps(model)
    if isinstance(result, tuple) and result[1].changes:  # both runs had the same numbers at random
        assert result[1].changes[""] <= 64 * F32


def test_a_compiled_model_is_probed_as_it_was_written():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    plain, x = copy.deepcopy(model), torch.randn(2, 3, 8, 8)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    before = compiled(x)
    plain(x)
    _, report = convert(compiled, "group", probe=x)
    _, expected = convert(plain, "group", probe=x)
    assert report.changes[""] == expected.changes[""] > 0.1
    torch.testing.assert_close(compiled(x), plain(x))
    assert (compiled(x) - before).abs().max() > 0.1
    torch.compiler.reset()


def test_a_probe_needs_values():
    lazy = nn.Sequential(nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(3))
    x = torch.randn(2, 4, 3, 3)
    for dry_run in (True, False):
        with pytest.raises(SpecError, match=r"2\.weight: UninitializedParameter[\s\S]*one call of the model"):
            convert(lazy, probe=x, dry_run=dry_run)
    assert type(lazy[2]) is nn.LazyLinear
    assert type(lazy[0]) is nn.BatchNorm2d
    meta = nn.Sequential(nn.BatchNorm2d(4)).to("meta")
    for model, probe in ((meta, x), (meta, x.to("meta")), (meta, (2, 4, 3, 3)), (nn.BatchNorm2d(4), x.to("meta"))):
        with pytest.raises(SpecError, match="a probe needs values"):
            convert(model, probe=probe)
    convert(lazy)
    convert(meta)


def test_the_report_is_a_table():
    _, report = convert(small(), "group", dry_run=True)
    lines = str(report).splitlines()
    assert lines[0].split("  ")[0] == "layer"
    assert len(lines) == 2 + 5
    html = report._repr_html_()
    assert html.count("<tr>") == 6
    assert "ChannelGroupNorm" in html
    assert not any(isinstance(m, ChannelGroupNorm) for m in small().modules())


def test_torchs_encoder_does_not_go_on_computing_layer_norm():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
    model = filled(nn.TransformerEncoder(layer, 2)).eval()
    x = torch.randn(2, 5, 8)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of the nested tensors of its fast path
        fast = model(x, src_key_padding_mask=padding)
        same, report = convert(copy.deepcopy(model), "layer", probe=x)
        y = same(x, src_key_padding_mask=padding)
        torch.testing.assert_close(y[~padding], fast[~padding], rtol=1e-4, atol=1e-5)
        other, report = convert(copy.deepcopy(model), "rms", probe=x)
        assert report.changes[""] > 0.1
        slow = copy.deepcopy(other)
    slow.requires_grad_()
    torch.testing.assert_close(other(x), slow(x))
    with torch.no_grad():
        torch.testing.assert_close(other(x), slow(x))
        assert (other(x) - model(x)).abs().max() > 0.1


@pytest.mark.parametrize("way", ["convert", "one layer", "finish", "other"])
def test_torchs_encoder_has_its_fast_path_back(way):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    model.layers[1].activation_relu_or_gelu = 0  # somebody's own decision

    def state():
        return [m.activation_relu_or_gelu for m in model.layers], model.use_nested_tensor

    before, x = state(), torch.randn(2, 5, 8)
    expected = model(x)
    if way == "finish":
        convert(model, lambda name, norm: nn.LayerNorm(8), steps=1)
        off = state()
        finish(model, early=True)
    elif way == "one layer":
        convert(model, "layer", where="layers.0.norm1")
        off = [0, 0], state()[1]
        assert state()[0] == [0, 0]
        convert(model, "rms", where="layers.0.norm2")
        convert(model, {"layers.0.norm1": "torch"})
        assert state() == off  # norm2 is another still
        convert(model, lambda name, norm: nn.LayerNorm(8), where="layers.0.norm2")
        off = [0, 0], False
    else:
        if way == "other":
            convert(model, lambda name, norm: Twice(8))
        else:
            convert(model, "layer")
        off = state()
        convert(model, {Twice: lambda name, norm: nn.LayerNorm(8)} if way == "other" else "torch")
    assert off == ([0, 0], False)
    assert state() == before == ([1, 0], True)
    assert all("fast" not in key for m in model.modules() for key in vars(m))
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


class Twice(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x) * 2


def test_an_encoder_whose_norms_are_subclasses_computes_them():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model, _ = convert(nn.TransformerEncoder(layer, 1).eval(), lambda name, norm: Twice(8))
    x = torch.randn(2, 5, 8)
    slow = model(x).detach()  # gradients are wanted
    with torch.no_grad():
        torch.testing.assert_close(model(x), slow)


@pytest.mark.skipif(not dist.is_gloo_available(), reason="there is no gloo")
def test_what_is_wrapped_for_distributed_training(tmp_path):
    """Its list of buffers is that of the model; otherwise torch broadcasts those that are gone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        x = torch.randn(4, 3, 8, 8)
        for way in ("convert", "probe", "steps", "first"):
            model = filled(small())
            plain, _ = convert(copy.deepcopy(model), "group")
            if way == "first":
                model, _ = convert(model, "group", steps=1)
            wrapped = nn.parallel.DistributedDataParallel(model)
            if way == "steps":
                convert(wrapped, "group", steps=1)
            elif way != "first":
                convert(wrapped, "group", probe=x if way == "probe" else None)
            if way in ("steps", "first"):
                wrapped(x).sum().backward()
                advance(wrapped)
                wrapped.zero_grad()
                finish(wrapped)
            assert {id(t) for t in wrapped.modules_buffers} == {id(t) for t in model.buffers()}
            plain.eval()
            wrapped.eval()  # dropout
            y = wrapped(x)
            y.sum().backward()
            torch.testing.assert_close(y, plain(x))
            plain(x).sum().backward()
            for p, q in zip(model.parameters(), plain.parameters(), strict=True):
                torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-4)
    finally:
        dist.destroy_process_group()


# --- transition ------------------------------------------------------------------------------------------------------


def test_a_transition_blends_step_by_step():
    model = filled(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
    seen = []
    model[1].register_forward_hook(lambda m, *_: seen.append(type(m).__name__))
    old = copy.deepcopy(model)
    old[1]._forward_hooks.clear()
    params = dict(model.named_parameters())
    model, report = convert(model, "group", groups=2, steps=4)
    assert report.rows[0][-1] == "over 4 steps of advance(model)"
    assert {id(p) for p in model.parameters()} == {id(p) for p in params.values()}
    group = nn.GroupNorm(2, 8)
    group.load_state_dict({key: old[1].state_dict()[key] for key in ("weight", "bias")})
    by_hand = nn.ModuleList([old[0], old[1], group])
    by_hand[2].weight, by_hand[2].bias = old[1].weight, old[1].bias
    for step in range(6):
        x, a = torch.randn(4, 3, 6, 6), min(step / 4, 1)
        model.eval()
        old.eval()
        expected = (1 - a) * old(x) + a * group(old[0](x))
        torch.testing.assert_close(model(x), expected)  # evaluation moves nothing
        assert model[1].share == a
        model.train()
        old.train()
        y, z = model(x), (1 - a) * old(x) + a * group(old[0](x))
        torch.testing.assert_close(y, z)
        grads = torch.autograd.grad(y.square().sum(), list(model.parameters()))
        for ours, theirs in zip(grads, torch.autograd.grad(z.square().sum(), list(old.parameters())), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model[1].old.running_var, old[1].running_var)
        advance(model)
        if step == 1:  # the state goes on
            again, _ = convert(copy.deepcopy(old), "group", groups=2, steps=4)
            again.load_state_dict(model.state_dict())
            torch.testing.assert_close(copy.deepcopy(again).eval()(x), copy.deepcopy(model).eval()(x))
            assert int(again[1].step) == 2
            with pytest.raises(SpecError, match="1: 2 of 4 steps"):
                finish(model)
            with pytest.raises(SpecError, match="before another begins"):
                convert(model, "group")
    assert set(seen) == {"Transition"}
    model = finish(model)
    assert type(model[1]) is ChannelGroupNorm
    assert list(model.state_dict()) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    seen.clear()
    torch.testing.assert_close(model(x), group(old[0](x)))
    assert seen.count("ChannelGroupNorm") == 1
    with pytest.raises(SpecError, match="what is finished is a transition"):
        finish(model)


def test_a_transition_of_a_model_that_is_a_norm_can_end_early():
    model, _ = convert(nn.BatchNorm2d(8), "sync", steps=3)
    x = torch.randn(4, 8, 3, 3)
    model(x)
    # each keeps statistics of its own, which move once
    torch.testing.assert_close(model.old.running_mean, 0.1 * x.mean((0, 2, 3)))
    torch.testing.assert_close(model.new.running_mean, 0.1 * x.mean((0, 2, 3)))
    assert type(finish(model, early=True)) is SyncBatchNorm


class Blended(nn.Module):
    """Two convolutions, and behind each a blend of torch's norms, in float64."""

    def __init__(self, model):
        super().__init__()
        self.a, self.parts = 0.0, copy.deepcopy(model).double()

    def forward(self, x):
        for conv, norm in ((self.parts[0], self.parts[1]), (self.parts[3], self.parts[4])):
            y = conv(x)
            group = F.group_norm(y, 2, norm.weight, norm.bias, norm.eps)
            x = torch.tanh((1 - self.a) * norm(y) + self.a * group)
        return x


class Checkpointed(nn.Module):
    def __init__(self, model, **options):
        super().__init__()
        self.model, self.options = model, options

    def forward(self, x):
        return checkpoint(self.model, x, **self.options) if self.options else self.model(x)


def two_norms(twice=False):
    norm, tanh = nn.BatchNorm2d(8), nn.Tanh()
    other = norm if twice else nn.BatchNorm2d(8)
    return filled(nn.Sequential(nn.Conv2d(8, 8, 1), norm, tanh, nn.Conv2d(8, 8, 1), other, tanh))


def assert_gradients(model, oracle):
    """Of float32 against float64: sums of some hundred terms, each through two norms, whose sigma is above 0.1."""
    for p, q in zip(model.parameters(), oracle.parameters(), strict=True):
        assert (p.grad - q.grad).abs().max() <= 1e3 * F32 * q.grad.abs().max().clamp(min=1)


@pytest.mark.parametrize("way", ["plain", "reentrant", "checkpoint"])
@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("order", ["0a1b2c", "012abc", "012cba", "01a2bc"])
def test_gradients_are_those_of_the_blend_in_any_order_of_passes(order, twice, way):
    """Digits are forward passes, letters their backward; a step is moved when all are done."""
    model = two_norms(twice)
    oracle = Blended(model)
    model, _ = convert(model, "group", groups=2, steps=3)
    runs = Checkpointed(model, **{"plain": {}, "reentrant": {"use_reentrant": True}}.get(way, {"use_reentrant": False}))
    for step in range(5):
        oracle.a = min(step / 3, 1)
        x = [torch.randn(4, 8, 3, 3, requires_grad=True) for _ in range(3)]
        wide = [t.detach().double() for t in x]
        dy = torch.randn(4, 8, 3, 3)
        model.zero_grad()
        oracle.zero_grad()
        y, z = {}, {}
        for char in order:
            if char.isdigit():
                y[char], z[char] = runs(x[int(char)]), oracle(wide[int(char)])
                assert (y[char] - z[char]).abs().max() <= 1e3 * F32
            else:
                number = str("abc".index(char))
                y[number].backward(dy)
                z[number].backward(dy.double())
        assert_gradients(model, oracle)
        advance(runs)
        assert int(model[1].step) == step + 1


@pytest.mark.parametrize("way", ["plain", "checkpoint"])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_gradients_are_those_of_the_blend(backend, way, request):
    if backend == "inductor":
        request.getfixturevalue("inductor")
    model = two_norms()
    oracle = Blended(model)
    model, _ = convert(model, "group", groups=2, steps=3)
    runs = Checkpointed(model, **({} if way == "plain" else {"use_reentrant": False}))
    torch.compiler.reset()
    compiled = torch.compile(runs, backend=backend, fullgraph=True)
    for step in range(5):
        oracle.a = min(step / 3, 1)
        x, dy = torch.randn(4, 8, 3, 3), torch.randn(4, 8, 3, 3)
        model.zero_grad()
        oracle.zero_grad()
        y, z = compiled(x), oracle(x.double())
        assert (y - z).abs().max() <= 1e3 * F32
        y.backward(dy)
        z.backward(dy.double())
        assert_gradients(model, oracle)
        advance(compiled)
    torch.compiler.reset()


def test_a_step_that_moves_before_backward_is_no_wrong_gradient():
    for compiled in (False, True):
        model = two_norms()
        oracle = Blended(model)
        model, _ = convert(model, "group", groups=2, steps=3)
        x = torch.randn(4, 8, 3, 3)
        y = torch.compile(model, backend="aot_eager", fullgraph=True)(x) if compiled else model(x)
        advance(model)
        oracle(x.double()).sum().backward()
        if compiled:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                y.sum().backward()
        else:
            y.sum().backward()
            assert_gradients(model, oracle)
    torch.compiler.reset()


def test_nothing_but_advance_moves_a_step():
    model, _ = convert(small(), "group", steps=3)
    for training in (True, False):
        model.train(training)(torch.randn(2, 3, 8, 8))
        assert {int(m.step) for m in model.modules() if isinstance(m, Transition)} == {0}
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    optimizer.register_step_post_hook(lambda *_: advance(model))
    optimizer.step()
    assert {int(m.step) for m in model.modules() if isinstance(m, Transition)} == {1}  # of that in two places, too
    with pytest.raises(SpecError, match=r"1 of 3 steps[\s\S]*advance\(model\) after every step"):
        finish(model)
    finish(model, early=True)
    advance(model)  # of a loop that goes on
    with pytest.raises(SpecError, match="model with transitions"):
        advance(optimizer)


def test_a_transition_passes_on_masks_and_labels():
    blend = Transition(nn.GroupNorm(2, 8), ChannelGroupNorm(2, 8), steps=2)
    blend.step.fill_(1)
    x, mask = torch.randn(3, 8, 5), torch.rand(3, 5) < 0.7
    expected = 0.5 * blend.old(x) + 0.5 * blend.new(x, mask)
    torch.testing.assert_close(blend.eval()(x, mask), expected)
    torch.testing.assert_close(blend(x, mask=mask), expected)
    with given(mask=mask):
        torch.testing.assert_close(blend(x), expected)
    both = Transition(Norm("v c -> graph[v] c"), Norm("v c -> graph[v]"), steps=2).eval()
    graph = torch.tensor([0, 0, 1, 1])
    torch.testing.assert_close(both(x[0, :4], graph=graph), both.old(x[0, :4], graph=graph))
    half = Transition(nn.BatchNorm1d(8), ChannelGroupNorm(2, 8), 3).half()
    assert half(x.half()).dtype == torch.float16
    assert half.step.dtype == torch.int64
    with pytest.raises(SpecError, match="steps is a whole number"):
        Transition(nn.BatchNorm1d(8), nn.GroupNorm(2, 8), steps=0)


# --- zeros -----------------------------------------------------------------------------------------------------------


def test_the_last_norms_of_residual_blocks_become_zero():
    model, report = convert(small(), "group", zero_init=True)
    assert [row[0] for row in report.rows if row[-1] == "weight 0"] == ["2.bn2", "4.bn2"]
    assert not model[2].bn2.weight.any()
    assert model[2].bn1.weight.all()
    x = torch.rand(2, 8, 6, 6)
    assert torch.equal(model[2](x), x)
    model[2].bn2.reset_parameters()
    assert not model[2].bn2.weight.any()
    model, _ = convert(small(), "batch", zero_init="*.bn1")
    assert not model[4].bn1.weight.any()
    assert model[4].bn2.weight.all()


def test_residual_blocks_inside_of_what_cannot_be_traced():
    class Doubtful(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = small()

        def forward(self, x):
            return self.body(x) if x.sum() > 0 else self.body(-x)

    _, report = convert(Doubtful(), "group", zero_init=True)
    assert [row[0] for row in report.rows if row[-1] == "weight 0"] == ["body.2.bn2", "body.4.bn2"]

    class Hopeless(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x):
            return x + self.norm(x) if x.sum() > 0 else x

    with pytest.raises(SpecError, match=r"torch\.fx cannot trace Hopeless[\s\S]*their names"):
        convert(Hopeless(), "group", zero_init=True)


class Unet(nn.Module):
    """Two levels, with a skip connection."""

    def __init__(self):
        super().__init__()

        def block(i, o):
            norm = nn.InstanceNorm2d(o, affine=True)
            return nn.Sequential(nn.Conv2d(i, o, 3, padding=1), norm, nn.ReLU(inplace=True))

        self.down, self.inner, self.up = block(3, 16), block(16, 32), block(48, 16)
        self.last = nn.Conv2d(16, 2, 1)

    def forward(self, x):
        x = self.down(x)
        y = self.inner(F.max_pool2d(x, 2))
        return self.last(self.up(torch.cat([x, F.interpolate(y, scale_factor=2)], 1)))


def test_branches_of_equal_length_are_no_residual_block():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.left = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
            self.right = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
            self.gate, self.last = nn.Sequential(nn.Conv2d(8, 8, 1), nn.Sigmoid()), nn.BatchNorm2d(8)
            self.conv = nn.Conv2d(8, 8, 1)

        def forward(self, x):
            x = self.left(x) + self.right(x)
            y = self.last(self.conv(x))
            x = y * self.gate(y) + x  # squeeze and excitation, say
            x = x + self.conv(F.relu(self.left[1](x)))  # what ends with no norm
            return x + self.gate[1](self.right[1](self.conv(x)))  # and with what is not 0 at 0

    _, report = convert(Both(), "group", zero_init=True)
    assert [row[0] for row in report.rows if row[-1] == "weight 0"] == ["last"]


def conv_norm(i, o, size=3, conv=nn.Conv2d, **options):
    return nn.Sequential(conv(i, o, size, padding=size // 2, **options), nn.BatchNorm2d(o))


class Standardized(nn.Conv2d):
    """A convolution of others, which torch.fx would look into."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class Residual(nn.Module):
    """y = relu(long(x) + short(x))"""

    def __init__(self, long=None, short=None, join=lambda a, b: F.relu(a + b)):
        super().__init__()
        self.long = nn.Sequential(*conv_norm(8, 8), nn.ReLU(), *conv_norm(8, 8)) if long is None else long
        self.short = nn.Identity() if short is None else short
        self.join = join

    def forward(self, x):
        return self.join(self.long(x), self.short(x))


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(8, 1, 1))

    def forward(self, x):
        return x * self.gamma


class Timed(nn.Module):
    """Of a diffusion model: the branch adds something that is not of the image."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.time = conv_norm(8, 8), conv_norm(8, 8), nn.Linear(4, 8)

    def forward(self, x, t):
        return x + self.b(self.a(x) + self.time(t)[:, :, None, None])


class Split(nn.Module):
    """Of Res2Net: parts of the channels are added inside of the branch."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = conv_norm(4, 4), conv_norm(4, 4), conv_norm(8, 8)

    def forward(self, x):
        a, b = torch.split(x, 4, 1)
        a = F.relu(self.first(a))
        b = F.relu(self.second(a + b))
        return x + self.last(torch.cat([a, b], 1)).reshape(x.shape)


def wide_convs(conv, **options):
    return nn.Sequential(*conv_norm(8, 8, conv=conv, **options), nn.ReLU(), *conv_norm(8, 8, conv=conv))


ENDS = {  # blocks, and the norm that ends the residual branch
    "identity": (Residual, "long.4"),
    "other order": (lambda: Residual(join=lambda a, b: b.add(a, alpha=1.0)), "long.4"),
    "scaled": (lambda: Residual(join=lambda a, b: 0.2 * a + b), "long.4"),
    "downsampling": (lambda: Residual(wide_convs(nn.Conv2d, stride=2), conv_norm(8, 8, 1, stride=2)), "long.4"),
    "pooling": (
        lambda: Residual(wide_convs(nn.Conv2d, stride=2), nn.Sequential(nn.AvgPool2d(2), *conv_norm(8, 8, 1))),
        "long.4",
    ),
    "max pooling": (lambda: Residual(wide_convs(nn.Conv2d, stride=2), nn.MaxPool2d(2)), "long.4"),
    "slices": (lambda: Residual(wide_convs(nn.Conv2d, stride=2), join=lambda a, b: a + b[:, :, ::2, ::2]), "long.4"),
    "subclasses": (
        lambda: Residual(wide_convs(Standardized, stride=2), conv_norm(8, 8, 1, Standardized, stride=2)),
        "long.4",
    ),
    "layer scale": (lambda: Residual(nn.Sequential(*wide_convs(nn.Conv2d), Scale(), nn.Dropout(0.1))), "long.4"),
    "time": (Timed, "b.1"),
    "split": (Split, "last.1"),
    "upsampling": (
        lambda: Residual(
            nn.Sequential(nn.Upsample(scale_factor=2), *wide_convs(nn.Conv2d)),
            nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(8, 8, 1)),
        ),
        "long.5",
    ),
}


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("name", ENDS)
def test_ends_of_residual_branches(name, alone):
    make, end = ENDS[name]
    model = make() if alone else nn.ModuleDict({"stem": nn.Conv2d(3, 8, 1), "block": make(), "next": Residual()})
    _, report = convert(model, "group", zero_init=True)
    zeros = [row[0] for row in report.rows if "weight 0" in row[-1]]
    assert zeros == ([end] if alone else [f"block.{end}", "next.long.4"])
    block = model if alone else model["block"]
    x = torch.rand(2, 8, 8, 8)
    if not alone:
        short = block.short(x) if isinstance(block, Residual) else x
        short = short[:, :, ::2, ::2] if name == "slices" else short
        y = block(x, torch.randn(2, 4)) if name == "time" else block(x)
        assert torch.equal(y, F.relu(short) if name not in ("time", "split", "slices", "scaled") else short)


class Fused(nn.Module):
    """Of HRNet: what comes from two resolutions is added."""

    def __init__(self):
        super().__init__()
        self.fine, self.coarse = conv_norm(8, 8), conv_norm(8, 8, stride=2)
        self.up = nn.Sequential(*conv_norm(8, 8, 1), nn.Upsample(scale_factor=2))

    def forward(self, x):
        parts = [F.relu(self.fine(x)), F.relu(self.coarse(x))]
        return F.relu(parts[0] + self.up(parts[1]))


class FusedList(Fused):
    def forward(self, x):
        return x[0] + self.up(x[1])


class Parallel(nn.Module):
    """Of RepVGG: convolutions that are added, and become one later."""

    def __init__(self):
        super().__init__()
        self.norm, self.small, self.large = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1), conv_norm(8, 8)

    def forward(self, x):
        return F.relu(self.large(x) + self.small(x) + x)


class ParallelNorm(Parallel):
    def forward(self, x):
        return F.relu(self.large(x) + self.norm(x))


class AddingUnet(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.down = nn.Sequential(*conv_norm(8, 8, stride=2), nn.ReLU())
        self.inner = inner
        self.up = nn.Sequential(nn.ConvTranspose2d(8, 8, 2, 2), nn.BatchNorm2d(8))

    def forward(self, x):
        return F.relu(self.up(self.inner(self.down(x))) + x)


class Branching(Residual):
    """What torch.fx cannot trace: it asks for the values of shapes."""

    def forward(self, x):
        return super().forward(x) if x.shape[1] == 8 else x


TIE, ELSE, MANY = "two branches of equal length", "something else than its input", "one of several branches"
LEFT = {  # blocks with additions of another kind, their norms that are left alone, and why
    "tie": (lambda: Residual(conv_norm(8, 8), conv_norm(8, 8)), ["long.1", "short.1"], TIE),
    "two resolutions, deeper": (
        lambda: Residual(nn.Sequential(*wide_convs(nn.Conv2d), *conv_norm(8, 8)), wide_convs(nn.Conv2d)),
        ["long.6"],
        "another of several layers",
    ),
    "two layers": (
        lambda: Residual(wide_convs(nn.Conv2d), nn.Sequential(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1))),
        ["long.4"],
        "another of several layers",
    ),
    "two resolutions": (Fused, ["up.1"], "lower resolution and back"),
    "two inputs": (FusedList, ["up.1"], ELSE),
    "parallel": (Parallel, ["large.1"], MANY),
    "parallel norms": (ParallelNorm, ["large.1"], MANY),
    "u-net": (lambda: AddingUnet(nn.Identity()), ["up.1"], "lower resolution and back"),
    "u-net of blocks": (lambda: AddingUnet(Residual()), ["up.1"], "residual blocks inside"),
    "trunk": (
        lambda: Residual(nn.Sequential(Residual(), Residual(), *conv_norm(8, 8))), ["long.3"], "residual blocks inside",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT)
def test_branches_that_are_none_of_a_residual_block_are_left_with_the_reason(name):
    make, expected, reason = LEFT[name]
    model = nn.ModuleDict({"block": make(), "next": Residual()})
    _, report = convert(model, "group", zero_init=True)
    rows = {row[0]: row for row in report.rows}
    for end in expected:
        assert "weight 0" not in rows[f"block.{end}"][-1]
        assert reason in rows[f"block.{end}"][-1]
    zeros = [row[0] for row in report.rows if "weight 0" in row[-1]]
    inner = {"u-net of blocks": ["block.inner.long.4"], "trunk": ["block.long.0.long.4", "block.long.1.long.4"]}
    assert zeros == [*inner.get(name, []), "next.long.4"]
    if name not in inner:
        with pytest.raises(SpecError, match=f"none found; {expected[0]} ends"):
            convert(make(), "group", zero_init=True)


def test_what_cannot_be_traced_is_in_the_report():
    model = nn.Sequential(Residual(), Branching(), Residual())
    model, report = convert(model, "group", zero_init=True)
    assert [row[0] for row in report.rows if "weight 0" in row[-1]] == ["0.long.4", "2.long.4"]
    assert report.rows[-1] == (
        "1",
        "Branching",
        "",
        "",
        "",
        "",
        "zero_init: torch.fx cannot trace Branching: TraceError",
    )
    assert all(m.weight.all() for m in model[1].modules() if isinstance(m, ChannelGroupNorm))
    with pytest.raises(SpecError, match=r"torch\.fx cannot trace Branching"):
        convert(Branching(), "group", zero_init=True)


def test_zeros_alone():
    model, _ = convert(nn.Sequential(Residual(), Residual()), "group")
    kept = dict(model.named_modules())
    _, report = convert(model, "group", zero_init=True, dry_run=True)
    assert model[0].long[4].weight.all()
    again, report = convert(model, "group", zero_init=True, probe=torch.randn(2, 8, 6, 6))
    assert dict(again.named_modules()) == kept
    assert [row[2] for row in report.rows[:4]] == ["kept"] * 4
    zeros = [row[0] for row in report.rows if "weight 0" in row[-1]]
    assert zeros == ["0.long.4", "1.long.4"]
    x = torch.rand(2, 8, 6, 6)
    assert torch.equal(model(x), x)
    assert model[0].long[1].weight.all()
    model[0].long[4].reset_parameters()
    assert not model[0].long[4].weight.any()
    with pytest.raises(SpecError, match="4 ChannelGroupNorm: is one already"):
        convert(model, "group", zero_init=True, steps=5)
    theirs, report = convert(nn.Sequential(Residual(), Residual()).eval(), "torch", zero_init="1.long.4")
    assert [bool(block.long[4].weight.any()) for block in theirs] == [True, False]
    narrow, _ = convert(nn.Sequential(Residual(), Residual()), "torch", zero_init=True, where="0.*")
    assert [bool(block.long[4].weight.any()) for block in narrow] == [False, True]
    model = nn.Sequential(Residual(), Activated(8))
    with pytest.raises(SpecError, match="norms that are converted, or are"):
        convert(model, "torch", zero_init="1")  # nobody knows what it does
    with pytest.raises(SpecError, match="a model is converted that has norms"):
        convert(model, "torch")


def test_a_unet():
    model = filled(Unet())
    by_hand = copy.deepcopy(model)
    for part in (by_hand.down, by_hand.inner, by_hand.up):
        new = nn.GroupNorm(4, part[1].num_features)
        new.load_state_dict(part[1].state_dict())
        part[1] = new
    x = torch.randn(2, 3, 16, 16)
    model, report = convert(model, "group", groups=4, probe=x)
    for a, b in zip(outcome(model, x), outcome(by_hand, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * b.abs().max().item())
    assert report.changes[""] > 0.01
    with pytest.raises(SpecError, match="none found"):
        convert(model, "group", groups=2, zero_init=True)


# --- models of others ------------------------------------------------------------------------------------------------


@pytest.mark.extras
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_resnets_of_torchvision(name):
    torchvision = pytest.importorskip("torchvision", reason="the models are its own")
    make = getattr(torchvision.models, name)
    torch.manual_seed(0)
    theirs = make(num_classes=3, norm_layer=lambda c: nn.GroupNorm(default_groups(c), c), zero_init_residual=False)
    torch.manual_seed(0)
    model, report = convert(make(num_classes=3), "group", zero_init=True)
    ends = [row[0] for row in report.rows if "weight 0" in row[-1]]
    blocks = {"resnet18": 8, "resnet50": 16}[name]
    assert ends == [n for n, _ in theirs.named_modules() if n.endswith("bn2" if name == "resnet18" else "bn3")]
    assert len(ends) == blocks
    assert list(model.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model(x), theirs(x), rtol=1e-4, atol=1e-4)


@pytest.mark.extras
@pytest.mark.parametrize("name", ["r3d_18", "mc3_18", "r2plus1d_18"])
def test_residual_blocks_of_videos(name):
    """Their convolutions are subclasses."""
    torchvision = pytest.importorskip("torchvision", reason="the models are its own")
    with torch.device("meta"):
        model = getattr(torchvision.models.video, name)(num_classes=3)
    _, report = convert(model, "group", zero_init=True, dry_run=True)
    blocks = [f"layer{layer}.{place}.conv2.1" for layer in (1, 2, 3, 4) for place in (0, 1)]
    assert [row[0] for row in report.rows if "weight 0" in row[-1]] == blocks


@pytest.mark.extras
@pytest.mark.parametrize(
    ("name", "blocks", "left"),
    [
        ("hrnet_w18_small", {"bn2": 18, "bn3": 5}, ("fuse_layers", "downsamp")),
        ("res2net50_26w_4s", {"bn3": 16}, ("bns",)),
        ("resnet50d", {"bn3": 16}, ()),
        ("fastvit_t8", {}, ("conv_kxk",)),
        ("repvgg_a0", {}, ("conv_1x1",)),
    ],
)
def test_residual_blocks_of_timm(name, blocks, left):
    """As many as there are BasicBlocks and Bottlenecks, whose last norms have these names."""
    timm = pytest.importorskip("timm", reason="the models are its own")
    with torch.device("meta" if blocks else "cpu"):  # BatchNormAct2d is tried with numbers
        model = timm.create_model(name, num_classes=3)
    kept = {cls: "group" for cls in {type(m) for m in model.modules()} if cls.__name__ == "BatchNormAct2d"}
    made = [type(m).__name__ for m in model.modules()]
    assert sum(blocks.values()) == sum(made.count(kind) for kind in ("BasicBlock", "Bottleneck", "Bottle2neck"))
    if not blocks:
        with pytest.raises(SpecError, match=rf"none found; \S*{left[0]}"):
            convert(model, {nn.BatchNorm2d: "group", **kept}, zero_init=True, dry_run=True)
        return
    _, report = convert(model, "group", zero_init=True, dry_run=True)
    zeros = [row[0].rpartition(".")[2] for row in report.rows if "weight 0" in row[-1]]
    assert {end: zeros.count(end) for end in zeros} == blocks
    notes = [row[0] for row in report.rows if "zero_init: ends" in row[-1]]
    assert {word for word in left if any(word in name for name in notes)} == set(left)
    assert all(any(word in name for word in left) for name in notes)


@pytest.mark.extras
def test_models_of_timm():
    timm = pytest.importorskip("timm", reason="the models are its own")
    x = torch.randn(2, 3, 32, 32)
    model = timm.create_model("resnet18", num_classes=3)
    _, report = convert(model, "group", zero_init=True, dry_run=True)
    assert sum("weight 0" in row[-1] for row in report.rows) == 8
    model = filled(timm.create_model("efficientnet_b0", num_classes=3)).eval()
    before = state_of(model)
    with pytest.raises(SpecError, match=r"BatchNormAct2d: a subclass, which may compute something else"):
        convert(model, "group")
    assert state_of(model) == before
    model, report = convert(model, {timm.layers.BatchNormAct2d: "batch"}, probe=x, where="blocks.[01].*")
    largest = max(change for name, change in report.changes.items() if name)
    assert largest <= 64 * F32 * 30  # values of some tens, through an activation that is in the norm now
    assert type(model.blocks[0][0].bn1) is Norm
    model = filled(timm.create_model("convnext_atto", num_classes=3)).eval()
    expected = model(x)
    with pytest.raises(SpecError, match=r"LayerNorm2d: a subclass"):
        convert(model, "layer")
    model, report = convert(model, {timm.layers.LayerNorm2d: "layer"})
    assert not any(type(m) is timm.layers.LayerNorm2d for m in model.modules())
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-3 * expected.abs().max().item())


@pytest.mark.extras
@pytest.mark.parametrize("name", ["Llama", "Gemma", "Bert"])
def test_models_of_hugging_face(name):
    transformers = pytest.importorskip("transformers", reason="the models are its own")
    options = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    options |= {"vocab_size": 50}
    options |= {"num_key_value_heads": 2, "head_dim": 8} if name == "Gemma" else {}
    config = getattr(transformers, f"{name}Config")(**options)
    model = filled(getattr(transformers, f"{name}Model")(config)).eval()
    batch = {"input_ids": torch.arange(12).view(2, 6)}
    expected = model(**batch).last_hidden_state
    keys = list(model.state_dict())
    model, report = convert(model, "layer" if name == "Bert" else "rms", probe=batch)
    assert len(report.rows) == 6
    assert not any(row[2] == "kept" for row in report.rows)
    assert list(model.state_dict()) == keys
    got = model(**batch).last_hidden_state
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    assert report.changes[""] == pytest.approx((got - expected).abs().max().item(), rel=0.5, abs=1e-6)
    if name == "Gemma":
        with pytest.raises(SpecError, match=r"torch has none with 1 \+ weight"):
            convert(model, "torch")
        return
    model, _ = convert(model, "torch")
    kinds = {type(m) for m in model.modules() if "Norm" in type(m).__name__}
    assert kinds == {nn.LayerNorm if name == "Bert" else nn.RMSNorm}
    again = model(**batch).last_hidden_state
    torch.testing.assert_close(again, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.extras
@pytest.mark.filterwarnings("ignore:Full backward hook is firing", "ignore:Secure RNG turned off")  # torch's, opacus's
@pytest.mark.parametrize("target", ["group", "instance", "layer", "affine", "torch"])
def test_private_training(target):
    """The validator passes, and a step of DP-SGD without noise and clipping is one of SGD."""
    pytest.importorskip("opacus", reason="its validator and its engine are asked")
    from opacus import PrivacyEngine
    from opacus.validators import ModuleValidator

    import flexnorm.privacy  # noqa: F401  # registers our layers

    model = filled(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Tanh(), nn.Flatten(), nn.Linear(8 * 9, 2)))
    assert ModuleValidator.validate(model, strict=False)
    model, _ = convert(model, "group" if target == "torch" else target)
    if target == "torch":
        model, _ = convert(model, "torch")
    assert not ModuleValidator.validate(model, strict=False)
    plain = copy.deepcopy(model)
    x, y = torch.randn(6, 3, 5, 5), torch.randint(2, (6,))
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=6)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model, optimizer, data = PrivacyEngine().make_private(
        module=model, optimizer=optimizer, data_loader=data, noise_multiplier=0.0, max_grad_norm=1e6,
        poisson_sampling=False,
    )  # fmt: skip
    for batch, labels in data:
        F.cross_entropy(model(batch), labels).backward()
        optimizer.step()
    F.cross_entropy(plain(x), y).backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q - 0.1 * q.grad, rtol=1e-4, atol=1e-5)

"""Norms of others, recognised by trying them: what is taken for a norm, what is not, and what a layer hands on.

The reference is the layer itself, computing what it did, or its formula written out in float64.
"""

import copy
import inspect
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from flexnorm import Norm, SpecError, convert, recommend
from flexnorm.conversion import NormAct, UnitOffsetNorm, convert_sync_batchnorm
from flexnorm.description import KeptError, recognise
from flexnorm.grouping import SoftGroupNorm
from flexnorm.images import ChannelGroupNorm
from flexnorm.mixtures import Mixture, SwitchableNorm
from flexnorm.successors import ChannelAffine
from flexnorm.synchronized import SyncBatchNorm


def filled(model):
    """With weights and statistics that a mistake shows with."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for t in (*model.parameters(), *model.buffers()):
            if t.is_floating_point():
                t.copy_(torch.rand(t.shape, generator=generator) + 0.5)
    return model


def close(a, b):
    """Two float32 results of the same formula: some roundings of 6e-8, of the largest value."""
    torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6 * b.abs().max().clamp(min=1).item())


def kept(model, to="group", **options):
    """The note of the first row, of a layer that stays."""
    before = list(model.modules())
    _, report = convert(model, to, dry_run=True, **options)
    assert report.rows[0][2] == "kept", report
    assert list(model.modules()) == before
    return report.rows[0][-1]


# --- what it is called with ------------------------------------------------------------------------------------------


class RootMeanSquare(nn.Module):
    def __init__(self, size, eps=1e-6):
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(size)), eps

    def computed(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


class GatedRMSNorm(RootMeanSquare):
    """As transformers' BambaRMSNormGated."""

    def forward(self, x, gate=None):
        return self.computed(x if gate is None else x * F.silu(gate))


class FusedRMSNorm(RootMeanSquare):
    """As flash-attn's and vLLM's, which add a residual."""

    def forward(self, x, residual=None):
        x = x if residual is None else x + residual
        return self.computed(x) if residual is None else (self.computed(x), x)


class StarredRMSNorm(RootMeanSquare):
    def forward(self, *args, **kwargs):
        return self.computed(*args, **kwargs)


class PlainRMSNorm(RootMeanSquare):
    def forward(self, hidden_states):
        return self.computed(hidden_states)


class MaskedBatchNorm(nn.BatchNorm1d):
    def forward(self, x, mask=None):
        return super().forward(x if mask is None else x * mask)


@pytest.mark.parametrize(
    ("norm", "words"),
    [
        (GatedRMSNorm(8), "its forward takes gate=None"),
        (FusedRMSNorm(8), "its forward takes residual=None"),
        (StarredRMSNorm(8), r"its forward takes \*args, \*\*kwargs"),
        (MaskedBatchNorm(8), "its forward takes mask=None"),
    ],
)
def test_a_forward_with_more_than_x_is_not_converted(norm, words):
    with pytest.raises(KeptError, match=words):
        recognise(norm)
    target = "batch" if isinstance(norm, nn.BatchNorm1d) else "rms"
    model = nn.Sequential(norm, nn.LayerNorm(8))
    model, _ = convert(model, {nn.LayerNorm: "rms"} if target == "batch" else "rms")  # by the name alone
    assert model[0] is norm
    for key in (type(norm), "0"):
        with pytest.raises(SpecError, match=words):
            convert(model, {key: target})
        assert model[0] is norm


def test_an_rms_norm_of_x_alone_is_converted_whatever_x_is_called():
    norm = filled(PlainRMSNorm(8))
    x = torch.randn(3, 5, 8)
    expected = norm(x)
    model, _ = convert(nn.Sequential(norm), "rms")
    assert type(model[0]) is Norm
    close(model(x), expected)


# --- what was done to a layer ----------------------------------------------------------------------------------------


def patched(norm):
    """As accelerate does it: the instance has a forward of its own."""
    original = norm.forward
    norm.forward = lambda x: original(x) * 2
    return norm


def test_a_replaced_forward_keeps_the_layer():
    model = nn.Sequential(patched(nn.BatchNorm2d(8)), nn.BatchNorm2d(8))
    first, x = model[0], torch.randn(2, 8, 3, 3)
    expected = first(x)
    rest = {nn.BatchNorm2d: "group"}
    for to in ("group", "batch", "affine", rest, {"0": "batch", **rest}, lambda *_: nn.Identity()):
        model, report = convert(nn.Sequential(first, nn.BatchNorm2d(8)), to)
        assert model[0] is first
        assert report.rows[0][2:3] + report.rows[0][-1:] == ("kept", "its forward was replaced")
        assert report.rows[1][2] != "kept"
    assert torch.equal(first(x), expected)
    made, _ = convert(model, {"0": lambda name, norm: nn.GroupNorm(2, 8)})  # whoever names it and builds it, knows
    assert type(made[0]) is nn.GroupNorm
    assert kept(nn.Sequential(patched(PlainRMSNorm(8)), nn.LayerNorm(8)), "rms") == "its forward was replaced"
    assert recommend(patched(nn.BatchNorm2d(8)), batch_size=2).choice == "not judged"
    _, report = convert(nn.Sequential(patched(Activated(8)), Activated(8), nn.BatchNorm2d(8)))
    assert report.rows[0][-1] == "its forward was replaced"
    assert "to={Activated: ...} converts it" in report.rows[1][-1]


def test_a_replaced_forward_is_an_error_where_nothing_reports_it():
    model = nn.Sequential(nn.BatchNorm2d(8), patched(nn.BatchNorm2d(8)))
    with pytest.raises(SpecError, match="forward was replaced"):
        convert_sync_batchnorm(model)
    assert [type(m) for m in model] == [nn.BatchNorm2d] * 2


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(8), nn.GroupNorm(2, 8), Norm("n c h w -> n", affine="c", c=8)])
@pytest.mark.parametrize("to", ["group", "instance", lambda name, norm: nn.InstanceNorm2d(8, affine=True)])
def test_attributes_that_were_set_on_a_layer_go_on(norm, to):
    norm = copy.deepcopy(norm)
    norm.lr_scale, norm._is_initialized, norm.again = 0.1, True, norm.forward
    norm.compile()
    if isinstance(norm, nn.GroupNorm) and to == "group":
        norm.num_groups = 4
    model, report = convert(nn.Sequential(norm), to)
    assert model[0] is not norm
    assert (model[0].lr_scale, model[0]._is_initialized) == (0.1, True)
    assert not hasattr(model[0], "again")  # a method of the old one
    assert model[0]._compiled_call_impl is None
    assert report.rows[0][-1] == "without its again, _compiled_call_impl"


def test_attributes_go_on_to_synchronized_norms_and_through_a_transition():
    model = nn.Sequential(nn.BatchNorm2d(8))
    model[0].lr_scale = 0.1
    assert convert_sync_batchnorm(copy.deepcopy(model))[0].lr_scale == 0.1
    convert(model, steps=2)
    assert model[0].lr_scale == model[0].new.lr_scale == 0.1


class Owner:
    def __init__(self):
        self.lock = threading.Lock()  # which nothing can copy
        self.calls = 0

    def hook(self, *_):
        self.calls += 1


class Activated(nn.BatchNorm2d):
    """As timm's BatchNormAct2d."""

    def __init__(self, channels, act=None, drop=None, **options):
        super().__init__(channels, **options)
        self.drop = nn.Identity() if drop is None else drop
        self.act = nn.Identity() if act is None else act

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


@pytest.mark.parametrize("act", [nn.ReLU(), nn.Hardswish()])
def test_hooks_are_not_tried_and_stay(act):
    owner, model = Owner(), nn.Sequential(Activated(8, act))
    handles = [model[0].register_forward_hook(owner.hook), model[0].act.register_forward_hook(owner.hook)]
    convert(model, {Activated: "group"})
    assert owner.calls == 0
    model(torch.randn(2, 8, 3, 3))
    assert owner.calls == (2 if isinstance(act, nn.Hardswish) else 1)  # a fused activation is no layer
    for handle in handles:
        handle.remove()
    model(torch.randn(2, 8, 3, 3))
    assert owner.calls <= 2


def test_what_cannot_be_tried():
    locked = Activated(8)
    locked.owner = Owner()
    with pytest.raises(KeptError, match="cannot be copied, to be tried: TypeError"):
        recognise(locked)
    with pytest.raises(KeptError, match="no channels"):
        recognise(Activated(0))
    for to in ("group", "affine", "rms"):
        assert kept(nn.Sequential(nn.BatchNorm2d(0), nn.BatchNorm2d(8)), to) == "it has no channels"
    with torch.device("meta"):
        model = nn.Sequential(PlainRMSNorm(8), nn.LayerNorm(8))
    assert kept(model, "rms") == "meta: no values to try"
    with pytest.raises(SpecError, match="meta: no values to try"):
        convert(model, {PlainRMSNorm: "rms"})


def test_trying_disturbs_no_random_numbers():
    layer = Activated(8, nn.Dropout(0.5))
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    recognise(layer)
    assert torch.equal(torch.rand(4), expected)


# --- what stands behind a norm ---------------------------------------------------------------------------------------


BEHIND = {
    "hardswish": lambda: {"act": nn.Hardswish(inplace=True)},
    "leaky": lambda: {"act": nn.LeakyReLU(0.1)},
    "relu6": lambda: {"act": nn.ReLU6(inplace=True)},
    "dropout": lambda: {"drop": nn.Dropout(0.5), "act": nn.ReLU()},
    "learned": lambda: {"act": nn.PReLU(8, init=0.3)},
}


@pytest.mark.parametrize("scale", [1, 1e-3, 30])
@pytest.mark.parametrize("to", ["batch", "sync", "torch", "affine"])
@pytest.mark.parametrize("name", BEHIND)
def test_what_stands_behind_a_norm_stays_behind_it(name, to, scale):
    model = nn.Sequential(filled(Activated(8, **BEHIND[name]()))).train(to != "affine")
    old, x = copy.deepcopy(model[0]), torch.randn(4, 8, 5, 3) * scale + scale
    weight, parts = model[0].weight, dict(model[0].named_children())
    model, report = convert(model, {Activated: to})
    new = model[0]
    assert isinstance(new, NormAct)
    assert new.norm.weight is weight
    assert new.act is parts["act"]
    assert report.rows[0][-1].endswith("behind it, so its keys are 0.norm.*")
    for training in (True, False) if to != "affine" else (False,):
        results = []
        for layer in (new, old):
            leaf = x.clone().requires_grad_()
            torch.manual_seed(1)
            y = layer.train(training)(leaf)
            y.square().sum().backward()
            results.append((y.detach(), leaf.grad / leaf.grad.abs().max().clamp(min=1e-9)))
        close(results[0][0], results[1][0])
        torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-3, atol=1e-4)  # batch norm's cancels
    again, _ = convert(model, "torch") if to in ("batch", "sync") else (model, None)
    close(again.eval()(x), old.eval()(x))


def test_group_norm_with_its_activation_behind_it():
    model = nn.Sequential(filled(Activated(8, nn.Hardswish())))
    weight, bias = model[0].weight, model[0].bias
    x = torch.randn(2, 8, 5, 5) * 3 + 1
    groups = x.double().view(2, 2, 4, 25)
    y = (groups - groups.mean((2, 3), keepdim=True)) / (groups.var((2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
    y = y.view(2, 8, 5, 5) * weight.double().view(-1, 1, 1) + bias.double().view(-1, 1, 1)
    model, report = convert(model, {Activated: "group"}, probe=x)
    close(model(x).double(), y * (y + 3).clamp(0, 6) / 6)
    assert report.rows[0][2:4] == ("ChannelGroupNorm, Hardswish", "2")
    assert report.changes["0"] > 0
    model.load_state_dict(model.state_dict())
    assert list(model.state_dict()) == ["0.norm.weight", "0.norm.bias"]
    zeroed, _ = convert(nn.Sequential(Activated(8, nn.Hardswish())), {Activated: "group"}, zero_init="0")
    assert not zeroed[0].norm.weight.any()
    blended, _ = convert(nn.Sequential(Activated(8, nn.Hardswish())), {Activated: "group"}, steps=2)
    assert torch.isfinite(blended(x)).all()


def test_an_activation_that_has_a_name_is_taken_for_no_other():
    for act, name in ((nn.ReLU(), "relu"), (nn.SiLU(), "silu"), (nn.GELU(), "gelu"), (nn.GELU("tanh"), None)):
        found = recognise(Activated(8, act))
        assert (found.activation, found.tail) == (name, () if name else ("act",))
        assert recognise(Activated(8, act), fused=False).tail == ("act",)
    assert recognise(Activated(8)).tail == ()


@pytest.mark.parametrize(
    ("base", "options"), [(nn.LayerNorm, {}), (nn.BatchNorm2d, {}), (nn.BatchNorm2d, {"track_running_stats": False})]
)
def test_an_activation_that_differs_far_out_alone_is_another(base, options):
    class Capped(base):
        def forward(self, x):
            return F.relu6(super().forward(x))

    with pytest.raises(KeptError, match="computes nothing"):
        recognise(Capped(8, **options))


def test_what_a_function_drops_is_said():
    """Also where the new layer has a part of the old one."""
    model = nn.Sequential(filled(Activated(8, nn.Hardswish())), filled(nn.BatchNorm2d(8)))
    owner = Owner()
    model[0].register_forward_hook(owner.hook)
    to = {
        "0": lambda name, norm: nn.Sequential(nn.GroupNorm(2, 8), norm.act),
        "1": lambda name, norm: nn.Sequential(norm, nn.ReLU()),
    }
    model, report = convert(model.eval().double(), to)
    assert [row[4] for row in report.rows] == ["dropped", ""]
    assert [row[-1] for row in report.rows] == ["without its weight, bias", ""]
    assert (model[0][0].weight.dtype, model[0][0].training) == (torch.float64, False)
    model(torch.randn(2, 8, 3, 3, dtype=torch.float64))
    assert owner.calls == 1


# --- frozen batch norm -----------------------------------------------------------------------------------------------


class FrozenBatchNorm(nn.Module):
    """As torchvision's: four buffers."""

    def __init__(self, channels, eps=1e-5):
        super().__init__()
        self.eps = eps
        for name, value in {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0}.items():
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x):
        weight, bias, mean, var = (b.view(1, -1, 1, 1) for b in self.buffers())
        return (x - mean) * (weight * (var + self.eps).rsqrt()) + bias


class EvaluatedBatchNorm(nn.BatchNorm2d):
    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0, self.eps)


@pytest.mark.parametrize("cls", [FrozenBatchNorm, EvaluatedBatchNorm])
@pytest.mark.parametrize("to", ["affine", "batch", "group", "instance", "sync"])
def test_frozen_batch_norms(cls, to):
    model = nn.Sequential(filled(cls(8)))
    assert recognise(model[0]).kind == "frozen"
    x = torch.randn(3, 8, 4, 5) * 4 + 2
    expected, weight = model.train()(x), model[0].weight.clone()
    model, report = convert(model, {cls: to})
    assert type(model[0]) in (ChannelAffine, Norm, ChannelGroupNorm, SyncBatchNorm)
    if to == "affine":
        close(model(x), expected)  # in training, too
        assert model[0].weight.requires_grad == (cls is EvaluatedBatchNorm)
        assert report.rows[0][4] == "folded"
        return
    assert torch.equal(model[0].weight, weight)
    assert isinstance(model[0].weight, nn.Parameter)
    assert ("its weight, bias can be learned now" in report.rows[0][-1]) == (cls is FrozenBatchNorm)
    assert report.rows[0][4] == ("carried" if to in ("batch", "sync") else "dropped")
    if to in ("batch", "sync"):
        close(model.eval()(x), expected)


def test_torch_has_no_frozen_batch_norm():
    model = nn.Sequential(FrozenBatchNorm(8), Norm("n c h w -> n", affine="c", c=8))
    assert "torch has none" in kept(model, {FrozenBatchNorm: "torch", Norm: "torch"})


def test_a_frozen_batch_norm_stays():
    made = recommend(nn.Sequential(FrozenBatchNorm(8)), x=(2, 8, 4, 4), privacy=True)["0"]
    assert (made.keep, made.rule, made.now) == (True, "frozen", None)


# --- what the report says --------------------------------------------------------------------------------------------


def test_a_class_with_the_name_of_torchs_is_told_apart():
    cls = type("LayerNorm", (nn.LayerNorm,), {"forward": lambda self, x: nn.LayerNorm.forward(self, x)})
    model = nn.Sequential(cls(8), nn.LayerNorm(8))
    assert f"to={{{__name__}.LayerNorm: ...}} converts it" in kept(model, "layer")


class Normalize(nn.Module):
    def forward(self, x):
        return F.normalize(x, dim=-1)


@pytest.mark.parametrize("norm", [Normalize(), nn.LocalResponseNorm(2), GatedRMSNorm(8)])
def test_what_naming_would_not_convert_is_not_told_to_be_named(norm):
    note = kept(nn.Sequential(norm, nn.BatchNorm2d(8)))
    assert "converts it" not in note
    assert note.startswith("no norm of torch or flexnorm; ")


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_norms_inside_of_scripted_modules():
    scripted = torch.jit.script(nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)))
    _, report = convert(nn.Sequential(nn.BatchNorm2d(8), scripted))
    assert [row[:3] + row[-1:] for row in report.rows] == [
        ("0", "BatchNorm2d", "ChannelGroupNorm", ""),
        ("1.1", "BatchNorm2d", "kept", "scripted"),
    ]
    with pytest.raises(SpecError, match="1 BatchNorm2d: scripted"):
        convert(scripted)


def test_two_rules_for_one_layer():
    shared = nn.BatchNorm2d(8)
    model = nn.ModuleDict({"a": shared, "b": shared, "c": nn.BatchNorm2d(8)})
    model, report = convert(model, {"b": "group", "a": "instance", "c": "batch"})
    assert type(model["a"]) is type(model["b"]) is ChannelGroupNorm
    assert report.rows[0][-1] == "the rule of 'b', before that of 'a'; also b"
    assert report.rows[1][-1] == ""
    shared = nn.BatchNorm2d(8)
    _, report = convert(nn.ModuleDict({"a": shared, "b": shared}), {"b": "group", "a": "group"})
    assert report.rows[0][-1] == "also b"


def test_what_computes_with_its_norm_by_itself_keeps_it():
    from torch.ao.nn.intrinsic.qat import ConvBn2d

    trained = ConvBn2d(3, 8, 3, qconfig=torch.ao.quantization.default_qat_qconfig)
    model, report = convert(nn.Sequential(trained, nn.BatchNorm2d(8)))
    assert type(model[0].bn) is nn.BatchNorm2d
    assert report.rows[0][-1] == "part of ConvBn2d, which computes with it by itself"
    assert type(model[1]) is ChannelGroupNorm


def mixture(*patterns, **options):
    return Mixture(list(patterns), affine="c", c=8, **options)


def test_a_mixture_is_kept_and_not_judged():
    model = nn.Sequential(SwitchableNorm(8), nn.BatchNorm2d(8))
    assert kept(model) == "a mixture"
    with pytest.raises(SpecError, match="a mixture"):
        convert(model, {SwitchableNorm: "group"})
    for privacy in (False, True):
        table = recommend(model, batch_size=2, x=(2, 8, 4, 4), privacy=privacy)
        made = table["0"]
        assert (made.keep, made.choice, made.rule) == (False, "not judged", "its own")
        assert ("Samples share statistics" in made.reasons[-1]) == privacy
        assert made.layer() is model[0]
        assert table["1"].choice == "ChannelGroupNorm(2, 8)"
    alone = recommend(mixture("n c ... -> n c", "n c ... -> n"), x=(2, 8, 4, 4), privacy=True)
    assert alone.choice == "not judged"
    assert not any("Samples share statistics" in reason for reason in alone.reasons)


def test_a_norm_that_changes_its_moments_is_known_as_nothing():
    assert recommend(SoftGroupNorm(2, 8), x=(2, 8, 4, 4)).choice == "not judged"
    with pytest.raises(SpecError, match="its groups overlap"):
        convert(SoftGroupNorm(2, 8), {SoftGroupNorm: "instance"})


def test_a_parametrized_class_of_others_is_kept():
    norm = Activated(8)
    parametrize.register_parametrization(norm, "weight", nn.Identity())
    with pytest.raises(KeptError, match=r"parametrizations\.weight"):
        recognise(norm)


# --- what is recommended ---------------------------------------------------------------------------------------------


class OddBatchNorm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).clamp(-3, 3)


def test_what_is_recommended_for_the_norms_of_others():
    model = nn.Sequential(Activated(64, nn.ReLU()), Activated(64, nn.Hardswish(), eps=1e-3), OddBatchNorm(64))
    table = recommend(model, batch_size=2, x=(1, 64, 4, 4))
    assert table["0"].choice == 'ChannelGroupNorm(16, 64, activation="relu")'
    assert table["1"].choice == "ChannelGroupNorm(16, 64, eps=0.001)"
    assert "Hardswish comes behind it" in str(table["1"])
    assert (table["0"].now.sizes[0], table["0"].then.sizes[0]) == (2 * 16, 4 * 16)
    assert (table["2"].choice, table["2"].keep) == ("not judged", False)
    assert [row[2] for row in table.rows][2] == "not judged"
    private = recommend(model, batch_size=256, privacy=True)
    assert [private[name].rule for name in private] == ["privacy", "privacy", "its own"]
    assert "private training cannot have it" in private["2"].reasons[-1]
    assert recommend(model, batch_size=256)["1"].keep
    built = table["1"].layer()
    assert isinstance(built, NormAct)
    assert built.act is model[1].act


def test_a_table_is_carried_out():
    model = filled(
        nn.Sequential(nn.Conv2d(3, 64, 3), Activated(64, nn.Hardswish()), nn.BatchNorm2d(64), nn.GroupNorm(8, 64))
    )
    table = recommend(model, batch_size=2, x=(2, 3, 8, 8))
    weights = [model[1].weight, model[2].weight]
    made, report = convert(model, {"*": lambda name, norm: table[name].layer()})
    assert made[1].norm.weight is weights[0]
    assert made[2].weight is weights[1]
    assert [row[2] for row in report.rows] == ["ChannelGroupNorm, Hardswish", "ChannelGroupNorm", "kept"]
    x = torch.randn(2, 3, 8, 8)
    close(made(x)[:1], made(x[:1]))


def test_norms_of_language_models_are_judged():
    class OffsetRMSNorm(RootMeanSquare):
        def forward(self, x):
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon) * (1 + self.weight)

    table = recommend(nn.Sequential(PlainRMSNorm(64), OffsetRMSNorm(64), GatedRMSNorm(64)), data="sequences")
    assert [table[name].choice != "not judged" for name in table] == [True, True, False]
    assert [table[name].keep for name in table] == [True, True, False]
    assert table["0"].now.sizes[0] == 64
    assert (table["0"].kind, table["0"].rule) == ("rms", "tokens")
    converted, _ = convert(nn.Sequential(OffsetRMSNorm(64)), "rms")
    assert type(converted[0]) is UnitOffsetNorm


# --- the classes themselves ------------------------------------------------------------------------------------------


@pytest.mark.extras
@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "cspresnet50", "tf_efficientnet_lite0", "efficientnet_b0"])
def test_models_of_timm_with_any_activation(name):
    timm = pytest.importorskip("timm", reason="the models are its own")
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3).train()  # by statistics of x, so that values are about 1
    norm = timm.layers.BatchNormAct2d
    x = torch.randn(4, 3, 64, 64)
    layers = [filled(m) for m in model.modules() if isinstance(m, norm)]
    table = recommend(model, batch_size=2, privacy=True)
    assert {made.rule for made in table.recommendations.values()} == {"privacy"}
    parameters = {id(p) for p in model.parameters()}
    model, report = convert(model, {norm: "batch"}, probe=x)
    assert sum(row[1] == "BatchNormAct2d" for row in report.rows) == len(layers)
    assert not any(isinstance(m, norm) for m in model.modules())
    assert {id(p) for p in model.parameters()} == parameters
    values = [change for row_name, change in report.changes.items() if row_name]
    assert len(values) == len(layers)
    assert max(values) < 2e-4  # sets of 16 elements, of variances that cancel: some hundred roundings of 10


@pytest.mark.extras
def test_frozen_batch_norms_of_torchvision():
    torchvision = pytest.importorskip("torchvision", reason="the extra [image]")
    frozen = torchvision.ops.FrozenBatchNorm2d
    model = filled(torchvision.models.resnet18(norm_layer=frozen, num_classes=3)).eval()
    x = torch.randn(1, 3, 32, 32)
    expected = model(x)
    assert {made.rule for made in recommend(model, batch_size=2).recommendations.values()} == {"frozen"}
    same, report = convert(copy.deepcopy(model), {frozen: "affine"})
    torch.testing.assert_close(same(x), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    grouped, report = convert(model, {frozen: "group"})
    assert len(report.rows) == 20
    assert not any(isinstance(m, frozen) for m in grouped.modules())


@pytest.mark.extras
@pytest.mark.parametrize("name", ["Llama", "Gemma", "Qwen2", "T5"])
def test_models_of_hugging_face_are_judged(name):
    transformers = pytest.importorskip("transformers", reason="the models are its own")
    options = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    options |= {"vocab_size": 50, "num_key_value_heads": 2}
    if name == "T5":
        options = {"d_model": 32, "d_ff": 64, "num_layers": 1, "num_heads": 4, "d_kv": 8, "vocab_size": 50}
    config = getattr(transformers, f"{name}Config")(**options)
    model = getattr(transformers, "T5EncoderModel" if name == "T5" else f"{name}Model")(config)
    table = recommend(model, x={"input_ids": torch.arange(12).view(2, 6)}, data="sequences")
    assert len(table) == 3
    for made in table.recommendations.values():
        assert (made.keep, made.kind, made.rule, made.now.sizes[0]) == (True, "rms", "tokens", 32)


@pytest.mark.extras
def test_gated_rms_norms_of_hugging_face_are_kept():
    bamba = pytest.importorskip("transformers.models.bamba.modeling_bamba", reason="the layer is its own")
    takes = inspect.signature(bamba.BambaRMSNormGated).parameters
    norm = bamba.BambaRMSNormGated(*[8] * sum(p.default is p.empty for p in takes.values()))
    assert "gate" in kept(nn.Sequential(norm, nn.LayerNorm(8)), "rms")

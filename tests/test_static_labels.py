"""Static labels: part of a layer's state. What averages, moves or materializes a model does not change them."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, vmap
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from flexnorm import Norm, Partition, SpecError, normalize
from flexnorm.images import ChannelGroupNorm
from flexnorm.mixtures import Mixture
from flexnorm.presets import SensorNorm, SpectralGroupNorm
from flexnorm.spectrograms import MelBandNorm

C, T = 64, 126  # as many ids as it takes: an average leaves small ones as they are
KIND = torch.arange(C) * 5 % 32
PLACE = torch.arange(T) // 2
BOTH = (KIND[:, None] + PLACE) % 50
PAIRS = torch.arange(C) // 2
LAYERS = {
    "labels": (lambda: Norm("n c t -> n kind[c]", affine="c", c=C, kind=KIND), {"kind_ids": KIND}),
    "two": (
        lambda: Norm("n c t -> a[c] b[t]", a=KIND, b=Partition.from_sizes([2] * 63)),
        {"a_ids": KIND, "b_ids": PLACE},
    ),
    "two axes": (lambda: Norm("n c t -> n k[c t]", k=BOTH), {"k_ids": BOTH}),
    "a name of an option": (lambda: Norm("n c t -> n mask[c]", labels={"mask": KIND}), {"mask_ids": KIND}),
    "of parameters": (lambda: Norm("n c t -> n", affine="kind[c]", kind=KIND), {"kind_ids": KIND}),
    "running": (
        lambda: Norm("n c t -> kind[c]", affine="c", c=C, kind=KIND, track_running_stats=True),
        {"kind_ids": KIND},
    ),
    "cumulative": (lambda: Norm("n c t -> n kind[c]", kind=KIND, cumulative="t"), {"kind_ids": KIND}),
    "channels": (lambda: ChannelGroupNorm(32, C, groups=KIND), {"group_ids": KIND}),
    "sizes of groups": (lambda: ChannelGroupNorm(32, C, groups=[2] * 32), {"group_ids": PAIRS}),
    "bands": (lambda: MelBandNorm([2] * 32), {"band_ids": PAIRS}),
    "spectral": (lambda: SpectralGroupNorm(2, C, [2] * 32), {"band_ids": PAIRS}),
    "sensors": (lambda: SensorNorm([2] * 32), {"sensor_ids": PAIRS}),
    "mixture": (lambda: Mixture(["n c t -> n", "n c t -> n kind[c]"], affine="c", c=C, kind=KIND), {"kind_ids": KIND}),
    "running mixture": (
        lambda: Mixture(["n c t -> n kind[c]", "n c t -> kind[c]"], kind=KIND, track_running_stats=True),
        {"kind_ids": KIND},
    ),
}


@pytest.fixture(params=LAYERS)
def layer(request):
    """A layer in evaluation that has seen a batch, with parameters that are not 1 and 0."""
    return made(request.param)


def made(name):
    norm = LAYERS[name][0]()
    for p in norm.parameters():
        nn.init.normal_(p)
    norm(torch.randn(5, C, T) + 1)
    norm.expected = LAYERS[name][1]
    return norm.eval()


def ids_are(norm, expected):
    found = {name: t for name, t in norm.state_dict().items() if name.endswith("_ids")}
    assert list(found) == list(expected)
    for name, ids in expected.items():
        assert found[name].dtype == torch.int64
        assert found[name].tolist() == ids.tolist()
        assert norm.labels[name.removesuffix("_ids")].ids.tolist() == ids.tolist()


def bands(sizes, **options):
    return Norm("n f -> n band[f]", band=Partition.from_sizes(sizes), **options)


def of_bands(x, sizes):
    return normalize(x, "n f -> n band[f]", band=Partition.from_sizes(sizes))


# --- averages of models ---


@pytest.mark.parametrize("decay", [0.9, 0.99, 0.9995, 0.9999, 0.99999])
def test_an_average_has_the_ids(layer, decay):
    x = torch.randn(3, C, T)
    model = nn.Sequential(nn.Linear(T, T), layer)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    for _ in range(3):
        averaged.update_parameters(model)
    ids_are(averaged.module[1], layer.expected)
    torch.testing.assert_close(averaged(x), model(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("decay", [0.9, 0.9999])
def test_an_average_in_place_of_states_changes_no_ids(layer, decay):
    """As many libraries do: every tensor of `state_dict()` is written to, integers rounded down."""
    x, averaged = torch.randn(3, C, T), copy.deepcopy(layer)
    for _ in range(3):
        for ours, theirs in zip(averaged.state_dict().values(), layer.state_dict().values(), strict=True):
            ours.copy_(decay * ours + (1 - decay) * theirs)
    ids_are(averaged, layer.expected)
    torch.testing.assert_close(averaged(x), layer(x), rtol=1e-6, atol=1e-6)


def test_labels_are_no_buffers(layer):
    names = {name for name, _ in (*layer.named_parameters(), *layer.named_buffers())}
    assert names.isdisjoint(layer.expected)
    assert all(id(t) not in {id(p.ids) for p in layer.labels.values()} for t in layer.buffers())


# --- state ---


def test_keys_of_the_state():
    norm = Norm("n c -> kind[c]", affine="c", c=6, kind=KIND, track_running_stats=True)
    keys = ["weight", "bias", "kind_ids", "running_mean", "running_var", "num_batches_tracked"]
    assert list(norm.state_dict()) == keys
    state = nn.Sequential(nn.ReLU(), norm).state_dict(prefix="model.")
    assert list(state) == [f"model.1.{key}" for key in keys]
    assert not state["model.1.kind_ids"].requires_grad


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_other_ids_are_adopted(assign, dtype):
    model, x = nn.Sequential(bands([2, 4])), torch.randn(4, 6)
    model(x)
    state = {"0.band_ids": Partition.from_sizes([3, 3]).ids.to(dtype)}
    assert str(model.load_state_dict(state, assign=assign)) == "<All keys matched successfully>"
    assert torch.equal(model(x), of_bands(x, [3, 3]))
    state["0.band_ids"].zero_()
    assert torch.equal(model(x), of_bands(x, [3, 3]))
    model[0].reset_parameters()
    assert torch.equal(model(x), of_bands(x, [2, 4]))


BAD = {
    "shape": (
        torch.tensor([0, 0, 1]),
        r"band_ids: the ids of label 'band'.*\(6,\)(?s:.*)received: ids of shape \(3,\)",
    ),
    "range": (torch.tensor([0, 0, 1, 1, 7, 1]), r"band_ids: label 'band' cannot be read(?s:.*)is 7"),
    "sign": (torch.tensor([0, 0, -1, 1, 1, 1]), r"band_ids: label 'band' cannot be read(?s:.*)is -1"),
    "floating": (torch.tensor([0.0, 0.0, 0.9, 1.0, 1.0, 1.0]), "ids are integers(?s:.*)torch.float32"),
    "bool": (torch.tensor([0, 0, 1, 1, 1, 1]).bool(), "ids are integers(?s:.*)torch.bool"),
    "list": ([0, 0, 1, 1, 1, 1], "given as a tensor of ids"),
}


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize(("ids", "message"), BAD.values(), ids=BAD)
def test_ids_that_do_not_fit_change_nothing(ids, message, assign):
    norm, x = bands([2, 4]), torch.randn(4, 6)
    norm.load_state_dict(bands([3, 3]).state_dict())
    before = norm.labels
    with pytest.raises(RuntimeError, match=rf"Error\(s\) in loading state_dict for Norm:(?s:.*){message}"):
        norm.load_state_dict({"band_ids": ids}, assign=assign)
    assert norm.labels["band"] is before["band"]
    assert torch.equal(norm(x), of_bands(x, [3, 3]))


def test_a_state_without_ids_leaves_the_layer_as_built(layer):
    x, state = torch.randn(3, C, T), layer.state_dict()
    expected = layer(x)
    for key in layer.expected:
        del state[key]
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: .*_ids"):
        layer.load_state_dict(state)
    assert layer.load_state_dict(state, strict=False).missing_keys == list(layer.expected)
    ids_are(layer, layer.expected)
    assert torch.equal(layer(x), expected)


def test_other_keys_are_unexpected():
    norm = bands([2, 4])
    state = {**norm.state_dict(), "bands_ids": KIND}
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: \"bands_ids\"\."):
        norm.load_state_dict(state)
    assert norm.load_state_dict(state, strict=False).unexpected_keys == ["bands_ids"]
    dynamic = Norm("n f -> n band[f]", band=2)
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: \"band_ids\"\."):
        dynamic.load_state_dict(norm.state_dict())


def test_hooks_may_rename_the_key():
    norm, x = bands([2, 4]), torch.randn(4, 6)

    def renamed(module, state_dict, prefix, *_):
        state_dict[f"{prefix}band_ids"] = state_dict.pop(f"{prefix}bands")

    norm.register_load_state_dict_pre_hook(renamed)
    norm.load_state_dict({"bands": Partition.from_sizes([3, 3]).ids})
    assert torch.equal(norm(x), of_bands(x, [3, 3]))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_checkpoints_of_torch_distributed(tmp_path):
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    model, other = (nn.Sequential(nn.Linear(5, 6), bands(sizes)) for sizes in ([2, 4], [3, 3]))
    checkpoint.save(get_model_state_dict(model), checkpoint_id=tmp_path, no_dist=True)
    state = get_model_state_dict(other)
    checkpoint.load(state, checkpoint_id=tmp_path, no_dist=True)
    set_model_state_dict(other, state)
    x = torch.randn(4, 5)
    assert torch.equal(other(x), model(x))


# --- devices and dtypes ---


def test_a_layer_that_leaves_the_meta_device_has_its_ids(layer, request):
    x, name = torch.randn(3, C, T), request.node.callspec.params["layer"]
    with torch.device("meta"):
        made = LAYERS[name][0]()
    assert made(torch.empty(3, C, T, device="meta")).shape == (3, C, T)
    assert made.to_empty(device="cpu") is made
    rest = {key: t for key, t in layer.state_dict().items() if key not in layer.expected}
    made.load_state_dict(rest, strict=False)
    ids_are(made, layer.expected)
    assert torch.equal(made.eval()(x), layer(x))


def test_a_layer_that_goes_to_the_meta_device_and_back(layer):
    x = torch.randn(3, C, T)
    expected, state = layer(x), layer.state_dict()
    layer.to("meta").to_empty(device="cpu")
    ids_are(layer, layer.expected)
    layer.load_state_dict(state)
    assert torch.equal(layer(x), expected)


def test_state_assigned_to_a_layer_on_the_meta_device():
    x = torch.randn(4, 6)
    with torch.device("meta"):
        norm = bands([2, 4], affine="f", f=6)
    norm.load_state_dict(bands([3, 3], affine="f", f=6).state_dict(), assign=True)
    assert torch.equal(norm(x), of_bands(x, [3, 3]))
    norm.load_state_dict({key: t.to("meta") for key, t in norm.state_dict().items()}, assign=True)
    assert norm.labels["band"].ids.tolist() == [0, 0, 0, 1, 1, 1]  # no values came


def test_skip_init_and_reset_parameters():
    norm, x = nn.utils.skip_init(Norm, "n f -> n band[f]", affine="f", f=C, band=KIND), torch.randn(4, C)
    assert norm.labels["band"].ids.tolist() == KIND.tolist()
    norm.reset_parameters()
    assert torch.equal(norm(x), normalize(x, "n f -> n band[f]", band=KIND))


def test_ids_that_were_given_on_the_meta_device():
    """A model that writes `torch.tensor([...])` where it builds its layers, built under `torch.device("meta")`."""
    x = torch.randn(2, 4, 5)
    with torch.device("meta"):
        norm = ChannelGroupNorm(2, 4, groups=torch.tensor([0, 1, 1, 0]))
    assert norm(x.to("meta")).shape == x.shape
    norm.to_empty(device="cpu").reset_parameters()
    with pytest.raises(SpecError, match=r"on the meta device, which holds no values(?s:.*)load_state_dict"):
        norm(x)
    there = ChannelGroupNorm(2, 4, groups=torch.tensor([0, 1, 1, 0]))
    norm.load_state_dict(there.state_dict())
    norm.reset_parameters()
    assert torch.equal(norm(x), there(x))


@pytest.mark.parametrize(
    "change",
    [
        lambda norm: norm.half(),
        lambda norm: norm.double(),
        lambda norm: norm.to(torch.bfloat16),
        lambda norm: norm.type(torch.float64),
        lambda norm: norm.share_memory(),
        lambda norm: norm._apply(torch.zeros_like),
        lambda norm: norm.to("cpu", non_blocking=True),
    ],
    ids=["half", "double", "to", "type", "share_memory", "zeros", "device"],
)
def test_ids_keep_their_dtype_and_values(change, layer):
    assert change(layer) is layer
    ids_are(layer, layer.expected)


def test_labels_follow_x():
    """Libraries that put tensors into a model one by one leave the labels where they were."""
    norm = bands([2, 4])
    norm.load_state_dict(bands([3, 3]).state_dict())
    assert norm(torch.empty(4, 6, device="meta")).is_meta
    x = torch.randn(4, 6)
    assert torch.equal(norm(x), of_bands(x, [3, 3]))


def test_labels_loaded_in_inference_mode_have_second_derivatives():
    x, dy = torch.randn(4, 6, dtype=torch.float64, requires_grad=True), torch.randn(4, 6, dtype=torch.float64)
    norm = bands([2, 4])
    with torch.inference_mode():
        norm.load_state_dict(bands([3, 3]).state_dict())
        other = bands([3, 3])
    found = []
    for f in (norm, other, lambda x: of_bands(x, [3, 3])):
        (dx,) = torch.autograd.grad((f(x) * dy).sum(), x, create_graph=True)
        found.append(torch.autograd.grad(dx.square().sum(), x)[0])
    assert found[2].abs().max() > 1e-3
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[2])


# --- copies ---


def saved(norm):
    file = io.BytesIO()
    torch.save(norm, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("travel", [copy.deepcopy, lambda norm: pickle.loads(pickle.dumps(norm)), saved])
def test_copies_have_labels_of_their_own(travel, layer):
    x = torch.randn(3, C, T)
    expected, other = layer(x), travel(layer)
    assert torch.equal(other(x), expected)
    ids_are(other, layer.expected)
    other.load_state_dict({key: torch.zeros_like(ids) for key, ids in layer.expected.items()}, strict=False)
    assert torch.equal(layer(x), expected)
    assert (other(x) - expected).abs().max() > 1e-3
    if not other.track_running_stats:
        other.reset_parameters()
        ids_are(other, layer.expected)


def test_pickles_of_earlier_versions(layer):
    """They hold the ids as buffers, and the labels as the layer was built in a dict."""
    x, state = torch.randn(3, C, T), layer.__getstate__()
    with torch.no_grad():
        expected = layer(x)
    buffers = {key: torch.zeros_like(ids) if key == "a_ids" else ids for key, ids in layer.expected.items()}
    state |= {"_static": layer.labels, "_built": {}, "_buffers": {**buffers, **layer._buffers}}
    other = type(layer).__new__(type(layer))
    other.__setstate__(copy.deepcopy(state))
    assert set(state["_buffers"]) >= set(buffers)
    ids_are(other, buffers)
    assert {name for name, _ in other.named_buffers()}.isdisjoint(buffers)
    assert "a_ids" in buffers or torch.equal(other(x), expected)
    if not other.track_running_stats:
        other.reset_parameters()
        ids_are(other, layer.expected)


def test_a_compiled_layer_is_pickled():
    norm, x = bands([2, 4]), torch.randn(4, 6)
    norm.compile(backend="eager")
    assert torch.equal(pickle.loads(pickle.dumps(norm))(x), of_bands(x, [2, 4]))


# --- as attributes, and as functions ---


def test_the_keys_of_the_state_are_attributes():
    norm, x = bands([2, 4]), torch.randn(4, 6)
    assert norm.band_ids.tolist() == [0, 0, 1, 1, 1, 1]
    norm.band_ids = nn.Parameter(torch.tensor([0, 0, 0, 1, 1, 1]), requires_grad=False)
    assert torch.equal(norm(x), of_bands(x, [3, 3]))
    assert list(norm.parameters()) == []
    with pytest.raises(ValueError, match="cannot be read"):
        norm.band_ids = torch.full((6,), 2)
    with pytest.raises(ValueError, match="the shape that the layer was built with"):
        norm.band_ids = torch.zeros(5, dtype=torch.int64)
    assert torch.equal(norm(x), of_bands(x, [3, 3]))
    assert not hasattr(norm, "bands_ids")
    with pytest.raises(AttributeError, match="'Norm' object has no attribute 'bands'"):
        norm.bands  # noqa: B018


def test_functional_call_takes_the_state(layer):
    x = torch.randn(3, C, T)
    before, expected = layer.labels, layer(x)
    assert torch.equal(functional_call(layer, layer.state_dict(), (x,)), expected)
    assert torch.equal(functional_call(layer, dict(layer.named_parameters()), (x,)), expected)
    others = {key: torch.zeros_like(ids) for key, ids in layer.expected.items()}
    assert (functional_call(layer, others, (x,)) - expected).abs().max() > 1e-3
    assert layer.labels == before
    assert torch.equal(layer(x), expected)


def test_functional_call_takes_other_ids_within_torch_func():
    norm, x = bands([2, 4], affine="f", f=6), torch.randn(4, 6)
    nn.init.normal_(norm.weight)
    ids = torch.stack([Partition.from_sizes(sizes).ids for sizes in ([2, 4], [3, 3], [5, 1])])
    params = dict(norm.named_parameters())

    def loss(x, ids):
        return functional_call(norm, {**params, "band_ids": ids}, (x,)).pow(3).sum()

    found = vmap(grad(loss), (None, 0))(x, ids)
    for dx, one in zip(found, ids, strict=True):
        leaf = x.clone().requires_grad_()
        y = normalize(leaf, "n f -> n band[f]", band=Partition(one, 2), weight=norm.weight, bias=norm.bias, affine="f")
        torch.testing.assert_close(dx, torch.autograd.grad(y.pow(3).sum(), leaf)[0])
    assert torch.equal(norm(x), copy.deepcopy(norm)(x))  # it is as it was, and holds nothing of a trace
    assert torch.equal(norm.labels["band"].counts, torch.tensor([2, 4]))


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_layer_has_the_ids_of_then(strict):
    norm, x = bands([2, 4], affine="f", f=6), torch.randn(4, 6)
    norm.load_state_dict(bands([3, 3], affine="f", f=6).state_dict())
    program = torch.export.export(norm, (x,), strict=strict)
    assert "band_ids" not in program.state_dict
    norm.load_state_dict(bands([5, 1], affine="f", f=6).state_dict())
    torch.testing.assert_close(program.module()(x), of_bands(x, [3, 3]))
    assert torch.equal(norm(x), of_bands(x, [5, 1]))


def test_a_call_with_fake_tensors_leaves_nothing():
    norm, x = bands([2, 4]), torch.randn(4, 6)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert norm(mode.from_tensor(x)).shape == x.shape
    assert torch.equal(norm(x), of_bands(x, [2, 4]))
    assert torch.equal(norm.labels["band"].counts, torch.tensor([2, 4]))

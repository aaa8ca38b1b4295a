"""`flexnorm.presets`: each against loops in float64 or torch's own layers, in outputs, gradients and state."""

import copy
import io
import pickle

import numpy as np
import on_ranks
import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from flexnorm import Norm, Partition, ShapeError, SpecError, calibrate, explain, given
from flexnorm.calls.call import Call
from flexnorm.presets import (
    DemographicNorm,
    RegionNorm,
    SensorNorm,
    SpectralGroupNorm,
    SubgraphNorm,
    TemporalGroupNorm,
    WeightedGroupNorm,
)

D = torch.float64
CLOSE = {"rtol": 1e-8, "atol": 1e-9}  # float64: at mean 1e3 and sigma 1 some 1e-13 of x - mean, and its derivatives
NAN = float("nan")
SCALES = [(1e-3, 0), (1, 0), (1e3, 1e3), (1, 1e3)]


def filled(layer):
    """Parameters that a mistake would show with."""
    for p in layer.parameters():
        nn.init.normal_(p)
    return layer


def data(*shape, scale=1, offset=0):
    return (torch.randn(shape, dtype=D) * scale + offset).requires_grad_()


def compare(y, z, wanted):
    """Outputs, and the gradients of all that is wanted, each within CLOSE of its largest value."""
    dy = torch.randn_like(y)
    torch.testing.assert_close(y, z, **CLOSE)
    for a, b in zip(torch.autograd.grad(y, wanted, dy), torch.autograd.grad(z, wanted, dy), strict=True):
        assert (a - b).abs().max() <= 1e-8 * b.abs().max().clamp(min=1e-3)
        assert b.abs().max() > 0


# --- what holds for all ---


def arguments():
    """A layer of every kind and what it is called with."""
    x, mask = torch.randn(2, 6, 5, 4, dtype=D), torch.rand(2, 5, 4) < 0.7
    nodes, part, batch = torch.randn(5, 6, dtype=D), torch.tensor([0, 1, 2, 0, 0]), torch.tensor([0, 1, 1, 0, 1])
    table, group = torch.randn(7, 3, dtype=D), torch.tensor([0, 0, 0, 1, 1, -1, 2])
    told = {"dtype": D, "activation": "silu"}
    return {
        "weighted": (WeightedGroupNorm(2, 6, **told), (x,)),
        "weighted, masked": (WeightedGroupNorm(2, 6, **told), (x, mask)),
        "frame": (TemporalGroupNorm(2, 6, **told), (x, mask.any(2))),
        "clip": (TemporalGroupNorm(2, 6, "clip", **told), (x,)),
        "causal": (TemporalGroupNorm(2, 6, "causal", **told), (x,)),
        "spectral": (SpectralGroupNorm(2, 6, 4, 16, **told), (torch.randn(2, 6, 16, dtype=D),)),
        "subgraph": (SubgraphNorm(2, 6, num_parts=3, **told), (nodes, part, batch)),
        "subgraph, one graph": (SubgraphNorm(2, 6, **told), (nodes, Partition(part, 3))),
        "region": (RegionNorm(6, **told), (x, mask)),
        "sensor": (SensorNorm([1, 2, 3], **told), (x,)),
        "demographic": (DemographicNorm(3, 4, **told), (table, group)),
    }


KINDS = list(arguments())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:.*is_fx_tracing")
def test_compiles_whole_with_gradients_and_state(kind):
    torch._dynamo.reset()
    eager, (x, *others) = arguments()[kind]
    filled(eager)
    traced = copy.deepcopy(eager)
    outcomes = []
    for layer, call in ((eager, eager), (traced, torch.compile(traced, fullgraph=True, backend="aot_eager"))):
        x = x.detach().clone().requires_grad_()
        y = call(x, *others)
        outcomes.append([y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()]), *layer.buffers()])
    for a, b in zip(*outcomes, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)  # the same kernels, sums in another order at most


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("travel", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_travels_after_a_step(kind, travel):
    layer, args = arguments()[kind]
    filled(layer)(*args).sum().backward()
    other = travel(layer)
    assert torch.equal(other.eval()(*args), layer.eval()(*args))
    assert repr(other) == repr(layer)
    assert type(layer).__name__ in repr(layer)


@pytest.mark.parametrize("kind", KINDS)
def test_state_goes_around(kind):
    layer, args = arguments()[kind]
    filled(layer)(*args)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = arguments()[kind][0]
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other.eval()(*args), layer.eval()(*args))


@pytest.mark.parametrize("kind", KINDS)
def test_options(kind):
    """torch's: device and dtype, affine=False, an activation; and reset_parameters()."""
    layer, (x, *others) = arguments()[kind]
    made = {  # as torch orders them: eps, affine, device, dtype; a momentum before affine, as in BatchNorm
        WeightedGroupNorm: lambda *o: WeightedGroupNorm(2, 6, *o),
        TemporalGroupNorm: lambda *o: TemporalGroupNorm(2, 6, getattr(layer, "mode", None), *o),
        SpectralGroupNorm: lambda *o: SpectralGroupNorm(2, 6, 4, 16, *o),
        SubgraphNorm: lambda *o: SubgraphNorm(2, 6, *o),
        RegionNorm: lambda *o: RegionNorm(6, 2, *o),
        SensorNorm: lambda *o: SensorNorm([1, 2, 3], *o),
        DemographicNorm: lambda eps, *o: DemographicNorm(3, 4, eps, None, *o),
    }[type(layer)]
    meta = made(1e-3, True, "meta", torch.float16)
    assert meta.eps == 1e-3
    assert all(p.is_meta and p.dtype == torch.float16 for p in meta.parameters())
    bare = made(1e-5, False)
    assert bare.weight is None
    assert bare.bias is None
    layer.reset_parameters()
    torch.testing.assert_close(F.silu(bare(x, *others)), layer(x, *others), rtol=1e-10, atol=1e-10)
    before = {
        name: value.clone()
        for name, value in layer.state_dict().items()
        if "running" not in name and "tracked" not in name
    }
    filled(layer).reset_parameters()
    assert all(torch.equal(layer.state_dict()[name], value) for name, value in before.items())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_of_x_stays(kind, dtype):
    layer, (x, *others) = arguments()[kind]
    y = layer(x.to(dtype), *others)
    assert y.dtype == dtype
    # silu has a slope below 1.1; x, rounded, moves y by less than eps |x| / sigma, of some few here
    torch.testing.assert_close(y.double(), layer(x, *others), rtol=0, atol=32 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_gives_nothing(kind):
    layer, (x, *others) = arguments()[kind]
    empty = x[:0].clone().requires_grad_()
    none = [
        t[:0] if isinstance(t, torch.Tensor) else Partition(torch.zeros(0, dtype=torch.int64), t.count) for t in others
    ]
    y = layer(empty, *none)
    assert y.shape == empty.shape
    for g in torch.autograd.grad(y.sum(), [empty, *layer.parameters()]):
        assert not g.any()


@pytest.mark.parametrize("offset", [0, 1e3, 1e5])
@pytest.mark.parametrize("kind", ["weighted", "demographic"])
def test_float32_is_exact_at_any_offset(kind, offset):
    """Where statistics come about in steps, none of them loses digits: design 4.4, with sigma above 0.8 here."""
    if kind == "weighted":
        layer, x, other = WeightedGroupNorm(2, 6), torch.randn(2, 6, 30, 20), torch.rand(2, 30, 20) < 0.5
        nn.init.normal_(layer.raw_channel_weight)
    else:
        layer, x, other = DemographicNorm(3, 4), torch.randn(600, 3), torch.randint(-1, 3, (600,))
    x = x + offset
    z = copy.deepcopy(layer).double()(x.double(), other)
    limit = 4 * torch.finfo(torch.float32).eps * (offset / 0.8 + z.abs()) + 1e-6
    assert ((layer(x, other) - z).abs() <= limit).all()


# --- weighted channels ---


@pytest.mark.parametrize(("scale", "offset"), SCALES)
@pytest.mark.parametrize("shape", [(3, 6), (2, 6, 5), (2, 6, 3, 4)])
def test_equal_weights_are_group_norm(shape, scale, offset):
    ours, theirs = WeightedGroupNorm(2, 6, dtype=D), nn.GroupNorm(2, 6, dtype=D)
    nn.init.normal_(theirs.weight)
    ours.load_state_dict({**theirs.state_dict(), "raw_channel_weight": torch.full((6,), 0.7)})
    x = data(*shape, scale=scale, offset=offset)
    dy = torch.randn(shape, dtype=D)
    y, z = ours(x), theirs(x)
    torch.testing.assert_close(y, z, rtol=1e-7, atol=1e-8)  # torch folds x * a + b, which costs digits of the offset
    (a, *_), (b, *_) = torch.autograd.grad(y, [x], dy), torch.autograd.grad(z, [x], dy)
    assert (a - b).abs().max() <= 1e-6 * b.abs().max()


def loops_of_weighted(x, norm, pixels):
    """Image by image and group by group: pixels are a mask, or weights, (N, *spatial)."""
    v = torch.log1p(torch.exp(norm.raw_channel_weight))
    y = torch.zeros_like(x)
    for n in range(x.shape[0]):
        for g in range(norm.num_groups):
            size = x.shape[1] // norm.num_groups
            own = slice(g * size, (g + 1) * size)
            counts = torch.ones_like(pixels[n]) if pixels.dtype == torch.bool else pixels[n]
            inside = pixels[n] if pixels.dtype == torch.bool else torch.ones_like(pixels[n], dtype=torch.bool)
            values = x[n, own][:, inside]
            weights = v[own, None] * counts[inside].double()
            mean = (weights * values).sum() / weights.sum()
            var = (weights * (values - mean) ** 2).sum() / weights.sum()
            normal = (values - mean) / (var + norm.eps).sqrt() * norm.weight[own, None] + norm.bias[own, None]
            y[n, own] = y[n, own].masked_scatter(inside.expand(size, *inside.shape), normal)
    return y


@pytest.mark.parametrize(("scale", "offset"), SCALES)
@pytest.mark.parametrize("pixels", [None, "bool", "float"])
def test_weighted_against_loops(pixels, scale, offset):
    norm, x = filled(WeightedGroupNorm(2, 6, eps=1e-6, dtype=D)), data(2, 6, 4, 3, scale=scale, offset=offset)
    mask = {
        None: torch.ones(2, 4, 3, dtype=torch.bool),
        "bool": torch.rand(2, 4, 3) < 0.6,
        "float": torch.rand(2, 4, 3, dtype=D).requires_grad_(),
    }[pixels]
    y, z = norm(x, None if pixels is None else mask), loops_of_weighted(x, norm, mask)
    compare(y, z, [x, norm.raw_channel_weight, norm.weight, norm.bias, *([mask] if pixels == "float" else [])])


def test_weighted_is_the_pattern_of_a_float_mask():
    norm, x = filled(WeightedGroupNorm(2, 6, dtype=D)), data(2, 6, 4)
    v = F.softplus(norm.raw_channel_weight)
    z = oracle.normalize(
        x,
        "n (g c) t, g c -> n g",
        v.view(2, 3),
        sizes={"g": 2},
        affine="(g c)",
        weight=norm.weight,
        bias=norm.bias,
    )
    compare(norm(x), z, [x, norm.raw_channel_weight, norm.weight])


def test_weighted_padding_changes_no_bit():
    norm, mask = filled(WeightedGroupNorm(2, 6)), torch.rand(2, 5, 4) < 0.6
    x, results = torch.randn(2, 6, 5, 4), []
    for filler in (0.0, NAN, float("inf")):
        padded = x.where(mask[:, None], filler).requires_grad_()
        y = norm(padded, mask)
        results.append([y, *torch.autograd.grad(y.sin().sum(), [padded, *norm.parameters()])])
        assert not y[(~mask)[:, None].expand_as(y)].any()
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    with given(mask=mask):
        assert torch.equal(norm(x), norm(x, mask))
    assert torch.equal(norm(x, mask[:1, :, :1]), norm(x, mask[:1, :, :1].expand(2, 5, 4)))


@pytest.mark.parametrize("masked", [False, True])
def test_weight_zero_is_exact_and_stays(masked):
    norm, x = WeightedGroupNorm(2, 6, dtype=D), data(3, 6, 5)
    mask = (torch.rand(3, 5) < 0.7,) if masked else ()
    with torch.no_grad():
        norm.raw_channel_weight[1] = -torch.inf
    rest = WeightedGroupNorm(1, 2, dtype=D)(x[:, [0, 2]], *mask)
    torch.testing.assert_close(norm(x, *mask)[:, [0, 2]], rest, **CLOSE)
    (g,) = torch.autograd.grad(norm(x, *mask).square().sum(), norm.raw_channel_weight)
    assert g[1] == 0
    assert g.isfinite().all()
    broken = x.detach().clone()
    broken[:, 1] = NAN
    assert torch.equal(norm(broken, *mask)[:, [0, 2, 3, 4, 5]], norm(x, *mask)[:, [0, 2, 3, 4, 5]])
    with torch.no_grad():
        norm.raw_channel_weight[:3] = -torch.inf
        norm.bias.fill_(2)
    y = norm(x, *mask)[:, :3]
    assert (y[(mask[0] if masked else torch.ones(3, 5, dtype=torch.bool))[:, None].expand_as(y)] == 2).all()


def test_weights_are_learned():
    """A channel of another unit spoils its group: its weight falls."""
    norm = WeightedGroupNorm(1, 3, affine=False)
    x = torch.randn(64, 3, 8)
    x[:, 2] *= 100
    target = nn.functional.layer_norm(x[:, :2], x[:, :2].shape[1:])
    steps = torch.optim.Adam(norm.parameters(), lr=0.3)
    losses = []
    for _ in range(60):
        loss = (norm(x)[:, :2] - target).square().mean()
        losses.append(float(loss.detach()))
        steps.zero_grad()
        loss.backward()
        steps.step()
    assert losses[-1] < 0.1 * losses[0]
    assert norm.channel_weight[2] < 1e-3 * norm.channel_weight[0]


@pytest.mark.parametrize("masked", [False, True])
def test_weighted_complex(masked):
    """A spectrum: the variance is that of real and imaginary part together."""
    norm = WeightedGroupNorm(1, 3, affine=False, dtype=torch.complex128)
    nn.init.normal_(norm.raw_channel_weight)
    x, mask = torch.randn(2, 3, 5, dtype=torch.complex128) + 3j, torch.rand(2, 5) < 0.7 if masked else None
    v = F.softplus(norm.raw_channel_weight)[:, None] * (torch.ones(2, 1, 5) if mask is None else mask[:, None])
    mean = (v * x).sum((1, 2), keepdim=True) / v.sum((1, 2), keepdim=True)
    var = (v * (x - mean).abs().square()).sum((1, 2), keepdim=True) / v.sum((1, 2), keepdim=True)
    z = (x - mean) / (var + 1e-5).sqrt() * (v > 0)
    torch.testing.assert_close(norm(x, mask), z, **CLOSE)


def test_weighted_per_sample_gradients():
    """torch.func sees through both paths."""
    norm, x, mask = filled(WeightedGroupNorm(2, 4, dtype=D)), torch.randn(3, 4, 5, dtype=D), torch.rand(3, 5) < 0.7
    params = {name: p.detach() for name, p in norm.named_parameters()}
    for given_mask in (False, True):

        def loss(params, *sample):
            args = tuple(t[None] for t in sample)
            return torch.func.functional_call(norm, params, args).square().sum()

        samples = (x, mask) if given_mask else (x,)
        found = torch.func.vmap(torch.func.grad(loss), (None, *[0] * len(samples)))(params, *samples)
        for i in range(3):
            one = torch.func.grad(loss)(params, *(t[i] for t in samples))
            for name, value in one.items():
                torch.testing.assert_close(found[name][i], value, **CLOSE)


# --- frames of video ---


@pytest.mark.parametrize(("scale", "offset"), SCALES)
def test_frames_are_group_norm_of_every_frame(scale, offset):
    x = data(2, 6, 3, 4, 2, scale=scale, offset=offset)
    ours, theirs = filled(TemporalGroupNorm(2, 6, eps=1e-6, dtype=D)), nn.GroupNorm(2, 6, eps=1e-6, dtype=D)
    theirs.load_state_dict(ours.state_dict())
    z = torch.stack([theirs(x[:, :, t] - offset) for t in range(3)], 2)  # about 0, where torch is exact, too
    compare(ours(x), z, [x])


@pytest.mark.parametrize(("scale", "offset"), SCALES)
def test_clips_are_group_norm(scale, offset):
    x = data(2, 6, 3, 4, 2, scale=scale, offset=offset)
    ours, theirs = (
        filled(TemporalGroupNorm(2, 6, "clip", eps=1e-6, dtype=D)),
        nn.GroupNorm(2, 6, eps=1e-6, dtype=D),
    )
    theirs.load_state_dict(ours.state_dict())
    compare(ours(x), theirs(x - offset), [x])


@pytest.mark.parametrize(("scale", "offset"), SCALES)
@pytest.mark.parametrize("masked", [False, True])
def test_causal_is_the_clip_so_far(masked, scale, offset):
    x = data(2, 4, 5, 3, scale=scale, offset=offset)
    mask = torch.tensor([[1, 1, 0, 1, 0], [0, 1, 1, 1, 1]], dtype=torch.bool) if masked else None
    norm = filled(TemporalGroupNorm(2, 4, "causal", eps=1e-6, dtype=D))
    told = {"sizes": {"g": 2}, "affine": "(g c)", "weight": norm.weight, "bias": norm.bias, "eps": 1e-6}
    frames = [
        oracle.normalize(
            x[:, :, : t + 1], "b (g c) t h, b t -> b g", None if mask is None else mask[:, : t + 1], **told
        )
        for t in range(5)
    ]
    compare(norm(x, mask), torch.stack([frame[:, :, -1] for frame in frames], 2), [x, *norm.parameters()])


@pytest.mark.parametrize("mode", ["frame", "causal"])
def test_never_looks_ahead(mode):
    norm, x = TemporalGroupNorm(2, 6, mode), torch.randn(2, 6, 9, 4, 4)
    for t in range(8):
        later = x.clone()
        later[:, :, t + 1 :] = NAN
        assert torch.equal(norm(later)[:, :, : t + 1], norm(x)[:, :, : t + 1])
    x.requires_grad_()
    (g,) = torch.autograd.grad(norm(x)[:, :, 3].square().sum(), x)
    assert not g[:, :, 4:].any()
    assert g[:, :, 3].any()


def test_clip_does_look_ahead():
    norm, x = TemporalGroupNorm(2, 6, "clip"), torch.randn(2, 6, 9, 4, 4)
    assert not torch.allclose(norm(x)[:, :, :5], norm(x[:, :, :5]), atol=1e-3)


@pytest.mark.parametrize("masked", [False, True])
def test_causal_stream_in_chunks(masked):
    norm, x = filled(TemporalGroupNorm(2, 6, "causal")), torch.randn(2, 6, 11, 3, 3) + 5
    mask = torch.rand(2, 11) < 0.7 if masked else None
    state, chunks = None, []
    for start, stop in ((0, 1), (1, 6), (6, 11)):
        part = None if mask is None else mask[:, start:stop]
        y, state = norm.step(x[:, :, start:stop], state, part)
        chunks.append(y)
    # sums in another order: a few roundings of values below 10, before weights below 4
    torch.testing.assert_close(torch.cat(chunks, 2), norm(x, mask), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["frame", "clip", "causal"])
def test_frames_that_are_none(mode):
    norm, x = filled(TemporalGroupNorm(2, 6, mode)), torch.randn(2, 6, 5, 3, 3)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    short = norm(x[:1, :, :3])
    padded = x.clone()
    padded[0, :, 3:] = NAN
    y = norm(padded, mask)
    torch.testing.assert_close(y[:1, :, :3], short, rtol=1e-5, atol=1e-5)
    assert not y[0, :, 3:].any()
    weights = torch.tensor([[1, 2, 0, 1, 3], [1, 1, 1, 1, 1]])
    if mode == "clip":  # weight 2 is a frame that is there twice
        again = torch.cat([x[:1, :, [0, 1, 1, 3, 4, 4, 4]]], 2)
        torch.testing.assert_close(
            norm(x, weights.float())[:1, :, [0, 1, 3, 4]], norm(again)[:, :, [0, 1, 3, 4]], rtol=1e-5, atol=1e-5
        )


# --- bands of a spectrum ---


def loops_of_spectral(x, bands, groups, weight, eps=1e-5):
    """With numpy.fft: sample by sample, group by group, band by band."""
    x = x.detach().numpy()
    y = np.zeros_like(x)
    size = x.shape[1] // groups
    for n in range(x.shape[0]):
        for g in range(groups):
            own = range(g * size, (g + 1) * size)
            spectra = {c: np.fft.rfft(x[n, c], norm="ortho") for c in own}
            for band in set(bands.tolist()):
                bins = np.flatnonzero(bands.numpy() == band)
                power = np.mean([abs(spectra[c][f]) ** 2 for c in own for f in bins])
                for c in own:
                    spectra[c][bins] *= weight[c, band] / np.sqrt(power + eps)
            for c in own:
                y[n, c] = np.fft.irfft(spectra[c], n=x.shape[-1], norm="ortho")
    return torch.from_numpy(y)


@pytest.mark.parametrize(("scale", "offset"), SCALES)
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("samples", [16, 17])
def test_spectral_against_numpy(samples, groups, scale, offset):
    bands = torch.tensor([0, 1, 1, 2, 2, 0, 2, 2, 3])  # in any order
    norm = filled(SpectralGroupNorm(groups, 4, bands, dtype=D))
    x = data(3, 4, samples, scale=scale, offset=offset)
    y = norm(x)
    assert y.shape == x.shape
    torch.testing.assert_close(y, loops_of_spectral(x, bands, groups, norm.weight.detach().numpy()), **CLOSE)


def test_spectral_gradients():
    """By differences, which know nothing of autograd."""
    norm = filled(SpectralGroupNorm(1, 2, [1, 2, 2], dtype=D))
    x = data(2, 2, 9)
    assert torch.autograd.gradcheck(norm, x)
    assert torch.autograd.gradcheck(
        lambda weight: torch.func.functional_call(norm, {"weight": weight}, x.detach()), norm.weight
    )


def test_a_gain_per_band_changes_nothing():
    norm = SpectralGroupNorm(2, 2, [4, 8, 16, 37], eps=0.0, affine=False, dtype=D)
    x = data(5, 2, 128, scale=3, offset=1)
    gain = torch.rand(2, 4, dtype=D).repeat_interleave(torch.tensor([4, 8, 16, 37]), 1) * 10 + 0.1
    other = torch.fft.irfft(torch.fft.rfft(x) * gain, n=128)
    torch.testing.assert_close(norm(other), norm(x), **CLOSE)
    torch.testing.assert_close(norm(x.roll(37, -1)), norm(x).roll(37, -1), **CLOSE)  # wherever it is cut
    assert not torch.allclose(norm(other), SpectralGroupNorm(1, 2, [4, 8, 16, 37], affine=False, dtype=D)(x), atol=0.1)


def test_white_noise_of_any_variance_to_variance_1():
    x = torch.randn(1, 1, 2**14, dtype=D) * 50
    y = SpectralGroupNorm(1, 1, 8, 2**14, affine=False)(x)
    # by Parseval it is 1 but for the ends of the spectrum, which count once where others count twice: 1 of 1025 bins
    assert abs(y.square().mean() - 1) < 1e-2


def test_spectral_channels_that_are_none():
    norm, x = SpectralGroupNorm(1, 3, 2, 8, dtype=D), torch.randn(2, 3, 8, dtype=D)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    x[0, 2] = NAN
    x.requires_grad_()
    y = norm(x, mask)
    torch.testing.assert_close(y[0, :2], SpectralGroupNorm(1, 2, 2, 8, dtype=D)(x[:1, :2])[0], **CLOSE)
    assert not y[0, 2].any()
    (g,) = torch.autograd.grad(y.sin().sum(), x)
    assert not g[0, 2].any()
    assert g.isfinite().all()


def test_spectral_of_more_axes():
    norm, x = SpectralGroupNorm(2, 4, [2, 3], dtype=D), torch.randn(2, 4, 3, 8, dtype=D)
    flat = SpectralGroupNorm(2, 12, [2, 3], dtype=D)(x.flatten(1, 2)).view_as(x)
    torch.testing.assert_close(norm(x), flat, **CLOSE)


# --- subgraphs ---


@pytest.mark.parametrize(("scale", "offset"), SCALES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("graphs", [False, True])
def test_subgraphs_against_the_oracle(graphs, masked, scale, offset):
    norm, x = filled(SubgraphNorm(2, 6, eps=1e-6, dtype=D)), data(12, 6, scale=scale, offset=offset)
    part, batch = torch.randint(0, 3, (12,)), torch.randint(0, 2, (12,))
    mask = torch.rand(12) < 0.7 if masked else None
    labels = {"part": part, "batch": batch if graphs else torch.zeros(12, dtype=torch.int64)}
    z = oracle.normalize(
        x,
        "v (g c), v -> batch[v] part[v] g",
        mask,
        sizes={"g": 2},
        labels=labels,
        affine="(g c)",
        weight=norm.weight,
        bias=norm.bias,
        eps=1e-6,
    )
    compare(norm(x, part, batch if graphs else None, mask), z, [x, *norm.parameters()])


def test_a_subgraph_is_what_it_is_alone():
    norm, x = filled(SubgraphNorm(2, 6, num_parts=4)), torch.randn(30, 6)
    part, batch = torch.randint(0, 4, (30,)), torch.randint(0, 3, (30,))
    y = norm(x, part, batch)
    for b in range(3):
        for p in range(4):
            own = (part == p) & (batch == b)
            if own.any():
                z = F.group_norm(x[own].T[None], 2, norm.weight, norm.bias)[0].T
                # torch folds x * a + b: where few values lie close together it loses some digits
                torch.testing.assert_close(y[own], z, rtol=1e-4, atol=1e-4)


def test_subgraphs_given_from_around():
    norm, x = SubgraphNorm(2, 6), torch.randn(9, 6)
    part, batch = torch.arange(9) % 2, torch.arange(9) // 5
    with given(part=part, batch=batch):
        assert torch.equal(norm(x), norm(x, part, batch))
        assert torch.equal(norm(x, part.flip(0)), norm(x, part.flip(0), batch))  # what is passed wins
    assert not torch.allclose(norm(x, part), norm(x, part, batch), atol=1e-3)


# --- regions ---


@pytest.mark.parametrize(("scale", "offset"), SCALES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("spatial", [(6,), (3, 4), (2, 2, 3)])
def test_regions_against_the_oracle(spatial, masked, scale, offset):
    norm, x = filled(RegionNorm(3, 4, eps=1e-6, dtype=D)), data(2, 3, *spatial, scale=scale, offset=offset)
    region = torch.randint(0, 3, (2, *spatial))
    mask = torch.rand(2, *spatial) < 0.7 if masked else None
    z = oracle.normalize(
        x,
        "n c ..., n ... -> n c region[n ...]",
        mask,
        labels={"region": Partition(region, 4)},
        affine="region[n ...] c",
        weight=norm.weight,
        bias=norm.bias,
        eps=1e-6,
    )
    compare(norm(x, region, mask), z, [x, *norm.parameters()])


def test_a_hole_and_the_rest():
    """Two regions: the rest is what it is without the hole, whatever that holds."""
    norm, x, valid = RegionNorm(3, dtype=D), data(2, 3, 6, 6), torch.rand(2, 6, 6) < 0.7
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([[2.0], [3.0]]).expand(2, 3))
    y = norm(x, valid)
    for n in range(2):
        for own, weight in ((valid[n], 3), (~valid[n], 2)):
            z = weight * F.instance_norm(x[n : n + 1, :, own])
            torch.testing.assert_close(y[n : n + 1, :, own], z, **CLOSE)
    other = x.detach().clone().masked_fill(~valid[:, None], 1e6)
    assert torch.equal(norm(other, valid)[valid[:, None].expand_as(x)], y[valid[:, None].expand_as(x)])
    assert torch.equal(norm(x, valid.long()), y)
    assert torch.equal(norm(x, Partition(valid.long(), 2)), y)
    with given(region=valid):
        assert torch.equal(norm(x), y)
    assert torch.equal(norm(x, valid[:1]), norm(x, valid[:1].expand(2, 6, 6)))
    everywhere = torch.ones(2, 6, 6, dtype=torch.bool)
    torch.testing.assert_close(norm(x, everywhere), 3 * F.instance_norm(x), **CLOSE)


# --- sensors ---


@pytest.mark.parametrize(("scale", "offset"), SCALES)
@pytest.mark.parametrize("sensors", [[2, 1, 4], torch.tensor([2, 0, 0, 1, 2, 2, 2])])
@pytest.mark.parametrize("shape", [(3, 7), (2, 7, 4)])
def test_sensors_are_layers_of_their_own(shape, sensors, scale, offset):
    norm, x = filled(SensorNorm(sensors, eps=1e-6, dtype=D)), data(*shape, scale=scale, offset=offset)
    ids = norm.sensor_ids
    z = torch.zeros_like(x)
    for k in range(3):
        own = (ids == k).nonzero().flatten()
        rest = x[:, own]
        normal = F.layer_norm(rest - offset, rest.shape[1:], eps=1e-6)
        over = (1, -1, *[1] * (x.dim() - 2))
        z = z.index_add(1, own, normal * norm.weight[own].view(over) + norm.bias[own].view(over))
    compare(norm(x), z, [x, *norm.parameters()])


def test_a_sensor_that_drifts_and_one_that_fails():
    norm, x = filled(SensorNorm([3, 3, 6], eps=0.0, dtype=D)), data(4, 12, 5)
    gain, drift = torch.tensor([2.0, 0.1, 5.0]), torch.tensor([1.0, -100.0, 3.0])
    ids = norm.sensor_ids
    torch.testing.assert_close(norm(x * gain[ids][:, None] + drift[ids][:, None]), norm(x), **CLOSE)
    mask = torch.ones(4, 12, dtype=torch.bool)
    mask[1, :3] = False  # a sensor
    mask[2, 7] = False  # a channel of one
    broken = x.detach().masked_fill(~mask[:, :, None], NAN).requires_grad_()
    y = norm(broken, mask)
    assert not y[1, :3].any()
    torch.testing.assert_close(y[1, 3:], norm(x)[1, 3:], **CLOSE)
    five = [6, 8, 9, 10, 11]
    z = F.layer_norm(x[2:3, five], (5, 5), eps=0.0) * norm.weight[five][:, None] + norm.bias[five][:, None]
    torch.testing.assert_close(y[2:3, five], z, **CLOSE)
    (g,) = torch.autograd.grad(y.sin().sum(), broken)
    assert g.isfinite().all()
    assert not g[~mask].any()


# --- demographic groups ---


def people(*counts, scale=1.0, offset=0.0):
    """So many of each group, the last of whom are in none; every group with a mean and a variance of its own."""
    group = torch.cat([torch.full((n,), g if g < len(counts) - 1 else -1) for g, n in enumerate(counts)])
    x = torch.randn(len(group), 3, dtype=D) * (1 + group[:, None] % 5) + group[:, None] * 2
    order = torch.randperm(len(group))
    return (x[order] * scale + offset).requires_grad_(), group[order]


@pytest.mark.parametrize(("scale", "offset"), SCALES)
def test_training_is_a_batch_norm_for_each_group(scale, offset):
    x, group = people(9, 5, 1, 4, scale=scale, offset=offset)  # the third alone, the last unknown
    norm = filled(DemographicNorm(3, 4, eps=1e-6, dtype=D))
    z = torch.zeros_like(x)
    for members, among in (
        ((group == 0), (group == 0)),
        ((group == 1), (group == 1)),
        ((group == 2) | (group == -1), torch.ones(19, dtype=torch.bool)),
    ):
        mean, var = x[among].mean(0), x[among].var(0, unbiased=False)
        normal = (x[members] - mean) / (var + 1e-6).sqrt() * norm.weight + norm.bias
        z = z.index_add(0, members.nonzero().flatten(), normal)
    compare(norm(x, group), z, [x, *norm.parameters()])


@pytest.mark.parametrize("momentum", [None, 0.1])
def test_running_statistics_are_those_of_a_batch_norm_for_each_group(momentum):
    norm = DemographicNorm(3, 3, momentum=momentum, dtype=D)
    own = [nn.BatchNorm1d(3, momentum=momentum, affine=False, dtype=D) for _ in range(3)]
    everyone = nn.BatchNorm1d(3, momentum=momentum, affine=False, dtype=D)
    for counts in ((6, 4, 1, 2), (5, 0, 1, 0), (3, 8, 1, 5)):
        x, group = people(*counts)
        x = x.detach()
        norm(x, group)
        everyone(x)
        for g in range(3):
            if (group == g).sum() > 1:
                own[g](x[group == g])
    torch.testing.assert_close(norm.running_mean[0], everyone.running_mean, **CLOSE)
    torch.testing.assert_close(norm.running_var[0], everyone.running_var, **CLOSE)
    for g in range(3):
        torch.testing.assert_close(norm.running_mean[1 + g], own[g].running_mean, **CLOSE)
        torch.testing.assert_close(norm.running_var[1 + g], own[g].running_var, **CLOSE)
        assert (norm.num_batches_tracked[1 + g] == own[g].num_batches_tracked).all()
    norm.eval(), everyone.eval()
    group = torch.tensor([0, 1, 2, -1, 0, 2])
    x = torch.randn(6, 3, dtype=D)
    y = norm(x, group)
    for i, g in enumerate(group.tolist()):
        seen = own[g].eval() if g in (0, 1) else everyone  # group 2 came alone only
        torch.testing.assert_close(y[i : i + 1], seen(x[i : i + 1]), **CLOSE)
    torch.testing.assert_close(norm(x[:1], group[:1]), y[:1], **CLOSE)  # one person is no batch


def test_min_members():
    norm = DemographicNorm(3, 2, min_members=5, dtype=D)
    x, group = people(4, 9, 0)
    y = norm(x, group)
    small = group == 0
    torch.testing.assert_close(y[small], ((x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt())[small], **CLOSE)
    assert norm.num_batches_tracked[:, 0].tolist() == [1, 0, 1]


def test_calibrated_to_all_batches_together():
    """Groups of which no batch has two have statistics then, too."""
    norm = DemographicNorm(3, 4, dtype=D)
    model = nn.Sequential(nn.Linear(3, 3, dtype=D), norm)
    x, group = people(12, 7, 3, 1, 5)
    x = x.detach()

    def forward(model, batch):
        return norm(model[0](batch[0]), batch[1])

    batches = list(zip(x.split(4), group.split(4), strict=True))
    calibrate(model.eval(), batches, forward)
    assert not norm.training
    inside = model[0](x).detach()
    torch.testing.assert_close(norm.running_mean[0], inside.mean(0), **CLOSE)
    torch.testing.assert_close(norm.running_var[0], inside.var(0), **CLOSE)
    for g in range(3):
        torch.testing.assert_close(norm.running_mean[1 + g], inside[group == g].mean(0), **CLOSE)
        torch.testing.assert_close(norm.running_var[1 + g], inside[group == g].var(0), **CLOSE)
    assert (norm.num_batches_tracked[:, 0] > 0).tolist() == [True, True, True, True, False]  # one alone has no variance
    z = (inside - inside.mean(0)) / (inside.var(0) + 1e-5).sqrt()
    torch.testing.assert_close(norm(inside, torch.full_like(group, 3)), z, **CLOSE)


def test_rows_that_are_none():
    norm, other = DemographicNorm(3, 3, dtype=D), DemographicNorm(3, 3, dtype=D)
    x, group = people(6, 4, 2, 3)
    mask = torch.rand(15) < 0.6
    y = norm(x.where(mask[:, None], NAN), group, mask)
    torch.testing.assert_close(y[mask], other(x[mask], group[mask]), **CLOSE)
    assert not y[~mask].any()
    for name, value in norm.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[name], **CLOSE)
    with given(group=group, mask=mask):
        assert torch.equal(norm.eval()(x), norm(x, group, mask))


def test_evaluation_changes_nothing():
    norm = DemographicNorm(3, 3, dtype=D)
    x, group = people(6, 4, 2, 3)
    norm(x, group)
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    norm.eval()(x, group)
    assert all(torch.equal(value, norm.state_dict()[name]) for name, value in before.items())
    norm.reset_running_stats()
    assert not norm.num_batches_tracked.any()


@pytest.mark.parametrize("training", [True, False])
def test_waits_for_no_device(training):
    """Fake tensors have no values: to ask for one raises."""
    with FakeTensorMode():
        norm = DemographicNorm(3, 4).train(training)
        x, group = torch.randn(8, 3, requires_grad=True), torch.zeros(8, dtype=torch.int64)
        norm(x, group, group == 0).sum().backward()
        assert x.grad.shape == x.shape


@pytest.mark.extras
def test_groups_of_diabetes_have_equal_statistics():
    """scikit-learn's diabetes data, with sex as the group: trained on half, evaluated on the other."""
    datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn is an extra")
    table = torch.from_numpy(datasets.load_diabetes(scaled=False).data)
    sex, x = (table[:, 1] == 2).long(), table[:, [0, 2, 3, 4, 5, 6, 7, 8, 9]]
    plain, norm = nn.BatchNorm1d(9, affine=False, momentum=None, dtype=D), DemographicNorm(9, 2, affine=False, dtype=D)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[:221], order[221:]
    calibrate(norm, list(zip(x[train].split(32), sex[train].split(32), strict=True)), lambda m, b: m(*b))
    plain(x[train])

    def gap(y):
        return (y[sex[test] == 0].mean(0) - y[sex[test] == 1].mean(0)).abs()

    before, after = gap(plain.eval()(x[test])), gap(norm.eval()(x[test], sex[test]))
    assert before.max() > 0.5
    # the difference of means of some 117 and 104 people has a standard error of 0.13, and that of the other half too
    assert after.max() < 0.5
    assert after.square().mean() < before.square().mean() / 4
    whole = norm.train()(x, sex)
    for k in (0, 1):
        torch.testing.assert_close(whole[sex == k].mean(0), torch.zeros(9, dtype=D), rtol=0, atol=1e-10)
        torch.testing.assert_close(whole[sex == k].var(0, unbiased=False), torch.ones(9, dtype=D), rtol=0, atol=1e-3)


# --- bad input ---

X, NODES, TABLE = torch.randn(2, 6, 5, 4), torch.randn(5, 6), torch.randn(7, 3)
PART, GROUP = torch.tensor([0, 1, 2, 0, 0]), torch.tensor([0, 0, 0, 1, 1, -1, 2])

BAD = [
    (lambda: WeightedGroupNorm(0, 6), SpecError, "num_groups is a whole number of 1 or more"),
    (lambda: WeightedGroupNorm(4, 6), ShapeError, "divisors of 6"),
    (lambda: WeightedGroupNorm(2, 6)(torch.randn(2, 8, 4)), ShapeError, r"multiply to 6, and its size is 8"),
    (lambda: WeightedGroupNorm(2, 6)(torch.randn(2, 8, 4), torch.ones(2, 4) > 0), ShapeError, "its size is 8"),
    (lambda: WeightedGroupNorm(2, 6)(X, torch.ones(2, 1, 5, 4) > 0), ShapeError, r"mask\.squeeze\(1\)"),
    (lambda: WeightedGroupNorm(2, 6)([1.0]), SpecError, "x is a torch.Tensor"),
    (lambda: WeightedGroupNorm(2, 6)([1.0], torch.ones(1) > 0), SpecError, "x is a torch.Tensor"),
    (lambda: WeightedGroupNorm(2, 6)(X, -torch.ones(2, 5, 4)), ValueError, "0 or more|negative|weights"),
    (lambda: TemporalGroupNorm(2, 6, "video"), SpecError, "'frame', 'clip' or 'causal'"),
    (lambda: TemporalGroupNorm(4, 6), ShapeError, "divisors of 6"),
    (lambda: TemporalGroupNorm(2, 6)(X, torch.ones(2, 4) > 0), ShapeError, r"shape \(2, 5\)"),
    (lambda: TemporalGroupNorm(2, 6)(NODES), ShapeError, "names every axis of x"),
    (lambda: TemporalGroupNorm(2, 6).step(X), SpecError, "knows the axis"),
    (lambda: SpectralGroupNorm(2, 6, 4), SpecError, "num_samples"),
    (lambda: SpectralGroupNorm(2, 6, 100, 16), SpecError, "from 1 to 9"),
    (lambda: SpectralGroupNorm(2, 6, [3, 4], 16), ShapeError, "add up to 9"),
    (lambda: SpectralGroupNorm(2, 6, [0, 9], 16), ShapeError, r"empty: \[0\]"),
    (lambda: SpectralGroupNorm(2, 6, "mel", 16), SpecError, "bands is a number"),
    (lambda: SpectralGroupNorm(2, 6, 4, 16, activation="tanh"), SpecError, "activation is one of"),
    (lambda: SpectralGroupNorm(2, 6, 4, 16, dtype=torch.complex64), SpecError, "real"),
    (lambda: SpectralGroupNorm(2, 6, 4, 16)(torch.randn(2, 6, 18)), ShapeError, "16 or 17 samples"),
    (lambda: SpectralGroupNorm(2, 6, 4, 16)(torch.randn(2, 16)), ShapeError, r"\(N, C, \*, T\)"),
    (lambda: SpectralGroupNorm(2, 6, 4, 16)(torch.randn(2, 5, 16)), ShapeError, "its size is 5"),
    (lambda: SpectralGroupNorm(2, 6, 4, 16)(torch.ones(2, 6, 16).long()), SpecError, r"x\.float\(\)"),
    (lambda: SpectralGroupNorm(2, 6, 4, 16)(torch.ones(2, 6, 16) * 1j), SpecError, "a signal"),
    (lambda: SubgraphNorm(2, 6)(NODES), SpecError, "'part' is read, and not given"),
    (lambda: SubgraphNorm(2, 6)(NODES, PART[:3]), ShapeError, r"shape \(5,\)"),
    (lambda: SubgraphNorm(2, 6)(NODES, PART - 1), ShapeError, "number the groups from 0"),
    (lambda: SubgraphNorm(2, 6, num_parts=2)(NODES, PART), ShapeError, "from 0 to count - 1 = 1"),
    (lambda: SubgraphNorm(2, 6)(NODES, PART, PART.float()), SpecError, "ids are integers"),
    (lambda: RegionNorm(6)(X), SpecError, "'region' is read, and not given"),
    (lambda: RegionNorm(6)(X, torch.ones(2, 1, 5, 4) > 0), ShapeError, r"shape \(2, 5, 4\)"),
    (lambda: RegionNorm(6)(X, torch.full((2, 5, 4), 2)), ShapeError, "count=3"),
    (lambda: RegionNorm(6)([1.0], torch.ones(1) > 0), SpecError, "x is a torch.Tensor"),
    (lambda: RegionNorm(6, 0), SpecError, "num_regions"),
    (lambda: SensorNorm([1, 0, 3]), ShapeError, r"empty: \[1\]"),
    (lambda: SensorNorm(3), SpecError, "sensors is a list of sizes"),
    (lambda: SensorNorm([]), ShapeError, "sizes of 1 or more"),
    (lambda: SensorNorm([2, 3])(torch.randn(2, 6)), ShapeError, "size 6 in x, and 5 was given"),
    (lambda: SensorNorm([2, 3])(torch.randn(2, 5, 4), torch.ones(2, 4) > 0), ShapeError, r"shape \(2, 5\)"),
    (lambda: DemographicNorm(3, 4).eval()(TABLE, GROUP), SpecError, "have seen no batch"),
    (lambda: DemographicNorm(3, 4)(TABLE), SpecError, "'group' is read, and not given"),
    (lambda: DemographicNorm(3, 2)(TABLE, GROUP), ShapeError, r"from 0 to num_groups - 1 = 1(?s:.*)num_groups=3"),
    (lambda: DemographicNorm(3, 4)(TABLE, GROUP - 1), ShapeError, "-1 is not known"),
    (lambda: DemographicNorm(3, 4)(TABLE, GROUP[:3]), ShapeError, r"shape \(7,\)"),
    (lambda: DemographicNorm(3, 4)(TABLE, GROUP.float()), SpecError, "ids are integers"),
    (lambda: DemographicNorm(3, 4)(TABLE, GROUP > 0), SpecError, "ids are integers"),
    (lambda: DemographicNorm(3, 4)(TABLE, GROUP, torch.ones(7)), SpecError, "the mask is bool"),
    (lambda: DemographicNorm(3, 4)(torch.randn(7, 2), GROUP), ShapeError, "size 2 in x, and 3 was given"),
    (lambda: DemographicNorm(3, 4, min_members=1), SpecError, "min_members is a whole number of 2 or more"),
    (lambda: DemographicNorm(3, 4, momentum=2.0), SpecError, "momentum"),
]


@pytest.mark.parametrize(("make", "error", "text"), BAD)
def test_bad_input(make, error, text):
    with pytest.raises(error, match=text) as raised:
        make()
    assert "instead:" in str(raised.value)


def test_bad_input_changes_nothing():
    norm = DemographicNorm(3, 4)
    norm(TABLE, GROUP)
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    for args in ((TABLE, GROUP + 5), (TABLE, GROUP[:3]), (TABLE[:, :2], GROUP), (TABLE, GROUP, torch.ones(7))):
        with pytest.raises(ValueError, match="instead:"):
            norm(*args)
    assert all(torch.equal(value, norm.state_dict()[name]) for name, value in before.items())


def test_presets_are_norms():
    """`calibrate`, `given`, `explain` and converters know them."""
    assert all(isinstance(layer, Norm) for layer, _ in arguments().values())


@pytest.mark.parametrize(("std", "mean"), [(0.1, 1e4), (1.0, 1e6), (2.0, 0.0)])
@pytest.mark.parametrize("sizes", [[1, 6, 10], [17], [9, 8]])
def test_a_spectrum_far_from_zero(std, mean, sizes):
    """The level stands in one bin; its rounding must not reach the others. Bands without it: design 4.4 of float32."""
    torch.manual_seed(0)
    norm = SpectralGroupNorm(2, 2, sizes, affine=False)
    x = (mean + std * torch.randn(3, 2, 32)).requires_grad_()
    z, dy = x.detach().double().requires_grad_(), torch.randn(3, 2, 32)
    y, expected = norm(x), copy.deepcopy(norm).double()(z)
    assert (y.double() - expected).abs().max() <= 2e-6 * (1 + expected.abs().max())
    got, want = torch.autograd.grad(y, x, dy)[0], torch.autograd.grad(expected, z, dy.double())[0]
    assert (got.double() - want).abs().max() <= 1e-5 * want.abs().max()


def test_weighted_channels_are_explained_as_their_pattern():
    norm = WeightedGroupNorm(2, 8)
    said = explain(norm, torch.randn(2, 8, 3, 3))
    assert said.pattern == "n (g c) ..., (g c) -> n g"
    norm(torch.randn(2, 8, 3, 3))
    assert "_masked" not in norm.__dict__


def test_people_on_several_ranks():
    """In float64, to the rounding of sums in another order. A group of two has its members on two ranks."""
    torch.manual_seed(0)
    x, dy = torch.randn(2, 12, 3, dtype=torch.float64).unbind()
    group = torch.tensor([0, 0, 1, -1, 2, 0, 1, 2, 0, 1, 1, -1])
    processes = on_ranks.Processes(2)
    results = processes.run(on_ranks.demographic, 3 * x + 5, group, dy, [5, 7], {"sharded": "n"})
    processes.close()
    y, (dx, *others), buffers, evaluated = on_ranks.demographic(0, 1, 3 * x + 5, group, dy, [12], {})
    for place, whole in ((0, y), (3, evaluated)):
        torch.testing.assert_close(torch.cat([r[place] for r in results]), whole, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(torch.cat([r[1][0] for r in results]), dx, rtol=1e-8, atol=1e-8)
    for k, gradient in enumerate(others):
        torch.testing.assert_close(sum(r[1][k + 1] for r in results), gradient, rtol=1e-9, atol=1e-9)
    for result in results:
        for got, want in zip(result[2], buffers, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_weighted_group_norm_keeps_its_formula_over_pixels():
    norm, x, mask = WeightedGroupNorm(2, 4), torch.randn(3, 4, 5, 5), torch.rand(3, 5, 5) < 0.7
    first, second = (norm.fit_call(Call(norm._formula, x, mask)).formula for _ in range(2))
    assert first is second

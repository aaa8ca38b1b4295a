"""`flexnorm.spectrograms`: bands and cepstra against layer_norm, loops, torchaudio, and each sample alone."""

import copy
import itertools
import math
import pathlib
import pickle
import sys
import wave

import oracle
import pytest
import torch
import torchaudio
from torch import nn

from flexnorm import Partition, ShapeError, SpecError, given, moments
from flexnorm.spectrograms import CepstralNorm, MelBandNorm, hz_bands, mel_bands

pytestmark = pytest.mark.extras

F32 = torch.finfo(torch.float32).eps
WIDTHS = [1, 3, 2, 6]
SPEECH = pathlib.Path(__file__).parent.parent / "examples" / "data" / "speech.wav"


def filled(norm):
    """Parameters that a mistake would show with."""
    for p in norm.parameters():
        nn.init.normal_(p)
    return norm


def speech(seconds=2):
    """A recording, (seconds, samples): clips of one second."""
    with wave.open(str(SPEECH)) as recording:
        rate = recording.getframerate()
        samples = torch.frombuffer(bytearray(recording.readframes(seconds * rate)), dtype=torch.int16) / 32768
    return samples.view(seconds, rate), rate


def padded(samples, filler=0.0):
    """Samples (..., T) of several lengths in one batch."""
    longest = max(x.shape[-1] for x in samples)
    batch = torch.full((len(samples), *samples[0].shape[:-1], longest), filler, dtype=samples[0].dtype)
    for row, x in zip(batch, samples, strict=True):
        row[..., : x.shape[-1]] = x
    return batch, torch.tensor([x.shape[-1] for x in samples])


# --- MelBandNorm ---


@pytest.mark.parametrize(("scale", "offset"), [(1e-3, 0), (1, 0), (1e3, 1e3), (10, -40), (1, 1e4)])
@pytest.mark.parametrize("shape", [(3, 12, 7), (2, 3, 12, 5)])
def test_bands_are_layer_norms_of_the_parts(shape, scale, offset):
    """Of every sample, channel and band alone, in float64."""
    norm = filled(MelBandNorm(WIDTHS))
    x = (torch.randn(shape) * scale + offset).requires_grad_()
    dy = torch.randn(shape)
    wide = x.detach().double().requires_grad_()
    parts = [nn.functional.layer_norm(band, band.shape[-2:]) for band in wide.split(WIDTHS, dim=-2)]
    before = torch.cat(parts, dim=-2)
    weight, bias = (p.detach().double().requires_grad_() for p in (norm.weight, norm.bias))
    z = before * weight[:, None] + bias[:, None]
    y = norm(x)
    # design 4.4, before the affine, and the gradients of it: sums of up to 21 such products
    sets = moments(x.detach().double(), "... f t -> ... band[f]", band=Partition.from_sizes(WIDTHS))
    limit = 4 * F32 * ((sets.mean.abs() / (sets.var + 1e-5).sqrt()).max() + before.abs().max()) + 1e-6
    assert (y - z).abs().max() <= limit * weight.abs().max().clamp(min=1)
    grads = torch.autograd.grad(y, (x, norm.weight, norm.bias), dy)
    expected = torch.autograd.grad(z, (wide, weight, bias), dy.double())
    for a, b in zip(grads, expected, strict=True):
        assert (a - b).abs().max() <= 16 * limit * b.abs().max().clamp(min=1e-3)


@pytest.mark.parametrize(
    ("affine", "axes", "shape"),
    [
        ("frequency", "f", (5,)),
        ("band", "band[f]", (2,)),
        ("channel", "c", (3,)),
        ("channel band", "c band[f]", (3, 2)),
        ("channel frequency", "c f", (3, 5)),
        (None, None, None),
    ],
)
def test_affine_against_the_oracle(affine, axes, shape):
    channels = 3 if shape is not None and "c" in axes else None
    norm = filled(MelBandNorm([2, 3], affine=affine, num_channels=channels, activation="silu", dtype=torch.float64))
    assert (None if norm.weight is None else tuple(norm.weight.shape)) == shape
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(2, 4) < 0.7
    z = oracle.normalize(
        x, "n c f t, n t -> n c band[f]", mask, labels={"band": Partition.from_sizes([2, 3])}, affine=axes,
        weight=norm.weight, bias=norm.bias, activation="silu",
    )  # fmt: skip
    y = norm(x, mask=mask)
    torch.testing.assert_close(y, z, rtol=1e-10, atol=1e-10)
    dy = torch.randn_like(y)
    for a, b in zip(*(torch.autograd.grad(t, (x, *norm.parameters()), dy) for t in (y, z)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("channels", [(), (2,)])
def test_padded_samples_are_what_each_is_alone(channels):
    norm = filled(MelBandNorm(WIDTHS))
    samples = [torch.randn(*channels, 12, t) * 5 - 30 for t in (9, 4, 1)]
    dys = padded([torch.randn_like(x) for x in samples], 1.0)[0]
    results = []
    for filler in (0.0, float("nan"), -float("inf")):
        x, lengths = padded(samples, filler)
        x.requires_grad_()
        y = norm(x, lengths)
        results.append((y.detach(), *torch.autograd.grad(y, (x, *norm.parameters()), dys)))
        assert all(torch.equal(a, b) for a, b in zip(results[0], results[-1], strict=True))
    for i, sample in enumerate(samples):
        t = sample.shape[-1]
        one = sample[None].clone().requires_grad_()
        alone = norm(one)
        # the same numbers in another order; mean / sigma is about 6
        torch.testing.assert_close(results[0][0][i, ..., :t], alone[0], rtol=1e-5, atol=2e-5)
        (dx,) = torch.autograd.grad(alone, one, dys[i : i + 1, ..., :t])
        torch.testing.assert_close(results[0][1][i, ..., :t], dx[0], rtol=1e-4, atol=1e-5)
        assert not results[0][0][i, ..., t:].any()
        assert not results[0][1][i, ..., t:].any()


def test_all_ways_of_saying_the_lengths():
    norm, x = MelBandNorm(3, 6), torch.randn(2, 6, 5)
    y = norm(x, torch.tensor([5, 2]))
    mask = torch.tensor([[True] * 5, [True] * 2 + [False] * 3])
    with given(mask=mask):
        assert torch.equal(nn.Sequential(norm)(x), y)
    for other in (
        norm(x, [5, 2]),
        norm(x, lengths=torch.tensor([5, 2])),
        norm(x, mask=mask),
        norm(x, mask=mask.long()),
    ):
        assert torch.equal(other, y)


def test_all_ways_of_saying_the_bands():
    x = torch.randn(2, 7, 4)
    ids = torch.tensor([0, 0, 0, 1, 1, 2, 2])
    y = MelBandNorm([3, 2, 2])(x)
    for bands in ((3, 2, 2), ids, Partition(ids)):
        assert torch.equal(MelBandNorm(bands)(x), y)
        assert torch.equal(MelBandNorm(bands, 7)(x), y)
    assert torch.equal(MelBandNorm(3, 7)(x), y)  # 7 frequencies in 3 bands: the first has one more
    assert MelBandNorm(8, 80).band_ids.bincount().tolist() == [10] * 8
    torch.testing.assert_close(MelBandNorm(1, 7)(x), nn.functional.layer_norm(x, (7, 4)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(MelBandNorm(7, 7)(x), nn.functional.instance_norm(x), rtol=1e-5, atol=1e-6)


def test_gains_of_bands_leave_the_features_of_a_recording_unchanged():
    """A gain of each band and clip, on the power of speech: an offset in decibels, of which nothing stays."""
    clips, rate = speech()
    power = torchaudio.transforms.MelSpectrogram(rate, n_fft=1024, n_mels=80)(clips).double()
    bands = hz_bands([300, 1000, 3000], sample_rate=rate, n_mels=80)
    gains = torch.tensor([[0.01, 3.0, 100.0, 0.5], [20.0, 1e-3, 1.0, 7.0]], dtype=torch.float64)[:, bands.ids, None]
    decibels = torchaudio.transforms.AmplitudeToDB()
    norm = MelBandNorm(bands).double()
    x, changed = (
        decibels(power + 1e-4),
        decibels((power + 1e-4) * gains),
    )  # nothing below the 1e-10 where dB are cut off
    assert (x - changed).abs().max() > 20
    # float64, of values of about 100 dB with a deviation of about 10
    torch.testing.assert_close(norm(x), norm(changed), rtol=1e-12, atol=1e-12)
    plain = nn.GroupNorm(4, 80).double()
    assert (plain(x) - plain(changed)).abs().max() > 0.1


def test_after_torchaudio_in_sequential():
    clips, rate = speech()
    front = nn.Sequential(
        torchaudio.transforms.MelSpectrogram(rate, n_fft=1024, hop_length=160, n_mels=80),
        torchaudio.transforms.AmplitudeToDB(),
    )
    model = nn.Sequential(*front, MelBandNorm([5, 5, 6, 8, 10, 12, 14, 20]))
    x, y = front(clips), model(clips)
    assert x.shape == y.shape == (2, 80, 101)
    parts = x.double().split([5, 5, 6, 8, 10, 12, 14, 20], dim=1)
    z = torch.cat([nn.functional.layer_norm(part, part.shape[1:]) for part in parts], dim=1)
    assert (y - z).abs().max() <= 4 * F32 * (100 + z.abs().max()) + 1e-6  # |mean| / sigma is below 100
    stereo = model(torch.stack([clips, clips.flip(-1)], dim=1))
    assert stereo.shape == (2, 2, 80, 101)
    # decibels of float32 powers, computed in batches of another size
    torch.testing.assert_close(stereo[:, 0], y, rtol=1e-4, atol=1e-4)
    mfcc = nn.Sequential(
        torchaudio.transforms.MFCC(rate, 20, melkwargs={"n_fft": 1024, "hop_length": 160, "n_mels": 40}), CepstralNorm()
    )
    with given(mask=torch.arange(101) < torch.tensor([[101], [40]])):
        features = mfcc(clips)
    alone = mfcc[1](mfcc[0](clips)[1:, :, :40])
    torch.testing.assert_close(features[1:, :, :40], alone, rtol=1e-4, atol=1e-4)
    assert not features[1, :, 40:].any()


def test_state_travels():
    norm = filled(MelBandNorm([3, 2], affine="band"))
    other = MelBandNorm([1, 4], affine="band")
    other.load_state_dict(norm.state_dict())
    x = torch.randn(2, 5, 4)
    assert list(norm.state_dict()) == ["weight", "bias", "band_ids"]
    for again in (other, copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        assert torch.equal(again(x), norm(x))
    assert norm.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


# --- bands ---


def htk_hz(mel):
    return 700 * (10 ** (mel / 2595) - 1)


def htk_mel(hz):
    return 2595 * math.log10(1 + hz / 700)


@pytest.mark.parametrize(
    ("n_freqs", "n_bands", "rate", "low", "high"), [(201, 8, 16000, 0, None), (513, 24, 22050, 60, 7600)]
)
def test_mel_bands_end_halfway_between_the_peaks_of_the_filters(n_freqs, n_bands, rate, low, high):
    bands = mel_bands(n_freqs, n_bands, rate, low, high)
    top = rate / 2 if high is None else high
    step = (htk_mel(top) - htk_mel(low)) / (n_bands + 1)
    peaks = [htk_hz(htk_mel(low) + step * (i + 1)) for i in range(n_bands)]
    ends = [(a + b) / 2 for a, b in itertools.pairwise(peaks)]
    for k, frequency in enumerate(torch.linspace(0, rate // 2, n_freqs).tolist()):
        assert bands.ids[k] == sum(end < frequency for end in ends)
    assert bands.count == n_bands
    assert bands.is_sorted


def test_mel_bands_of_the_other_scale():
    """Slaney's mel is linear up to 1000 Hz, so bands are equally wide there."""
    bands = mel_bands(801, 20, 16000, mel_scale="slaney")
    assert bands.counts[1:5].diff().abs().max() <= 1
    assert not torch.equal(bands.ids, mel_bands(801, 20, 16000).ids)


@pytest.mark.parametrize(("n_mels", "rate", "low", "high"), [(80, 16000, 0, None), (40, 8000, 100, 3800)])
def test_hz_bands_of_mels_go_by_the_peaks_of_the_filters(n_mels, rate, low, high):
    edges = [310.5, 999.5, 2500.25]
    bands = hz_bands(edges, sample_rate=rate, n_mels=n_mels, f_min=low, f_max=high)
    step = (htk_mel(rate / 2 if high is None else high) - htk_mel(low)) / (n_mels + 1)
    for i in range(n_mels):
        peak = htk_hz(htk_mel(low) + step * (i + 1))
        assert min(abs(peak - edge) for edge in edges) > 0.5  # peaks are known to half a Hz
        assert bands.ids[i] == sum(edge < peak for edge in edges)


def test_hz_bands_of_linear_frequencies():
    bands = hz_bands(torch.tensor([1000.0, 2500.0]), sample_rate=8000, n_freqs=9)  # 0, 500, .., 4000 Hz
    assert bands.ids.tolist() == [0, 0, 1, 1, 1, 2, 2, 2, 2]


@pytest.mark.parametrize("broken", ["missing", "for another torch"])
def test_without_torchaudio_the_error_says_how_to_install_it(broken, monkeypatch, tmp_path):
    monkeypatch.delitem(sys.modules, "torchaudio")
    if broken == "missing":
        monkeypatch.setitem(sys.modules, "torchaudio", None)
    else:
        (tmp_path / "torchaudio.py").write_text("raise OSError('undefined symbol: _ZN')")
        monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match=r'pip install "flexnorm\[audio\]"'):
        mel_bands(201, 8, 16000)
    assert MelBandNorm(8, 80)(torch.randn(1, 80, 3)).shape == (1, 80, 3)  # which needs none


# --- CepstralNorm ---


def by_loop(x, mode, scale=True, eps=1e-5, valid=None):
    """(B, F, T) in float64, frame by frame."""
    x = x.double()
    y = torch.zeros_like(x)
    valid = torch.ones(x.shape[0], x.shape[-1], dtype=torch.bool) if valid is None else valid
    for b in range(x.shape[0]):
        frames = [t for t in range(x.shape[-1]) if valid[b, t]]
        for t in frames:
            seen = x[b][:, [s for s in frames if s <= t or mode == "utterance"]]
            z = x[b, :, t] - seen.mean(-1)
            y[b, :, t] = z / (seen.var(-1, unbiased=False) + eps).sqrt() if scale else z
    return y


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("mode", ["utterance", "cumulative"])
@pytest.mark.parametrize("time", [1, 2, 3, 8, 21])
def test_cepstral_norm_against_the_loop(mode, time, scale):
    x = (torch.randn(2, 3, time, dtype=torch.float64) * 5 - 20).requires_grad_()
    norm = CepstralNorm(mode, scale=scale)
    y, z = norm(x), by_loop(x, mode, scale)
    torch.testing.assert_close(y, z, rtol=1e-9, atol=1e-9)
    if time > 1:  # one frame has a gradient of 0, and the loop's sqrt as well
        dy = torch.randn_like(y)
        for a, b in zip(torch.autograd.grad(y, x, dy), torch.autograd.grad(z, x, dy), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
    many = norm(x[:, None].expand(-1, 2, -1, -1))
    assert torch.equal(many[:, 0], many[:, 1])
    torch.testing.assert_close(many[:, 1], y, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("scale", "offset"), [(1e-3, 0), (1, 0), (1e3, 1e3), (1, 1e4)])
@pytest.mark.parametrize("mode", ["utterance", "cumulative"])
def test_cepstral_norm_is_exact_in_float32(mode, scale, offset):
    x = torch.randn(2, 3, 300) * scale + offset
    y, z = CepstralNorm(mode)(x), by_loop(x, mode)
    # design 4.4 with the sigma of every frame, which is small where the first two values lie close to each other
    seen = [x.double()[..., : t + 1] for t in range(300)]
    mean = torch.stack([s.mean(-1) for s in seen], -1).abs()
    sigma = torch.stack([(s.var(-1, unbiased=False) + 1e-5).sqrt() for s in seen], -1)
    if mode == "utterance":
        mean, sigma = mean[..., -1:], sigma[..., -1:]
    assert ((y - z).abs() <= 4 * F32 * (mean / sigma + z.abs()) + 1e-6).all()


def test_cumulative_knows_nothing_of_the_future():
    norm, x = CepstralNorm("cumulative"), torch.randn(2, 3, 20)
    y = norm(x)
    for t in (1, 2, 7, 13):
        other = x.clone()
        other[..., t:] = float("nan")
        assert torch.equal(norm(other)[..., :t], y[..., :t])
        shorter = norm(x[..., :t])  # merged in another order
        torch.testing.assert_close(shorter, y[..., :t], rtol=1e-5, atol=1e-5)
    assert not y[..., 0].any()


@pytest.mark.parametrize("mode", ["utterance", "cumulative"])
def test_cepstral_norm_of_padded_samples(mode):
    norm, samples = CepstralNorm(mode), [torch.randn(4, t) * 5 - 30 for t in (9, 4, 1)]
    dys = padded([torch.randn_like(x) for x in samples], 1.0)[0]
    results = []
    for filler in (0.0, float("nan"), float("inf")):
        x, lengths = padded(samples, filler)
        x.requires_grad_()
        y = norm(x, lengths)
        results.append((y.detach(), *torch.autograd.grad(y, x, dys)))
        assert all(torch.equal(a, b) for a, b in zip(results[0], results[-1], strict=True))
    for i, sample in enumerate(samples):
        t = sample.shape[-1]
        one = sample[None].clone().requires_grad_()
        alone = norm(one)
        torch.testing.assert_close(results[0][0][i, :, :t], alone[0], rtol=1e-5, atol=2e-5)
        (dx,) = torch.autograd.grad(alone, one, dys[i : i + 1, :, :t])
        torch.testing.assert_close(results[0][1][i, :, :t], dx[0], rtol=1e-4, atol=1e-4)
        assert not results[0][0][i, :, t:].any()
        assert not results[0][1][i, :, t:].any()


@pytest.mark.parametrize("mode", ["utterance", "cumulative"])
def test_left_padding_and_holes(mode):
    x = torch.randn(2, 3, 9, dtype=torch.float64)
    mask = torch.tensor([[0, 0, 1, 1, 0, 1, 0, 1, 1], [1, 0, 0, 0, 0, 0, 0, 0, 0]]).bool()
    y = CepstralNorm(mode)(x.where(mask[:, None], float("nan")), mask=mask)
    torch.testing.assert_close(y, by_loop(x, mode, valid=mask), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("mode", ["utterance", "cumulative"])
@pytest.mark.parametrize("scale", [True, False])
def test_against_sliding_window_of_torchaudio(mode, scale):
    """With a window as long as the sample, centered or not. It computes E[x^2] - E[x]^2, so: small means."""
    x = torch.randn(2, 5, 30)
    theirs = torchaudio.transforms.SlidingWindowCmn(
        cmn_window=100, min_cmn_window=1, center=mode == "utterance", norm_vars=scale
    )
    y, z = CepstralNorm(mode, scale=scale, eps=0)(x), theirs(x.mT).mT
    start = 0 if mode == "utterance" else 2  # of two values their variance may be lost
    torch.testing.assert_close(y[..., start:], z[..., start:], rtol=1e-3, atol=1e-3)


def test_fixed_statistics_are_those_of_all_frames():
    samples = [torch.randn(4, t) * 3 + k * 50 for k, t in enumerate((9, 4, 1, 30))]
    frames = torch.cat(samples, -1).double()
    mean, var = frames.mean(-1, keepdim=True), frames.var(-1, unbiased=False, keepdim=True)
    one_by_one = CepstralNorm("fixed", 4).fit(x[None] for x in samples)
    (x, lengths), (x2, lengths2) = padded(samples[:3], float("nan")), padded(samples[3:])
    batched = CepstralNorm("fixed", 4).fit([(x, lengths), (x2, lengths2)])
    for norm in (one_by_one, batched):
        for training in (True, False):
            y = norm.train(training)(samples[1][None])
            z = (samples[1].double() - mean) / (var + 1e-5).sqrt()
            assert (y[0] - z).abs().max() <= 4 * F32 * (3 + z.abs().max()) + 1e-6  # |mean| / sigma is below 3
    assert torch.equal(one_by_one.running_mean, batched.running_mean)  # fitted in float64, and rounded once
    y = batched(x, lengths)
    assert y.isfinite().all()
    assert not y[1, :, 4:].any()
    other = CepstralNorm("fixed", 4)
    other.load_state_dict(batched.state_dict())
    assert list(other.state_dict()) == ["running_mean", "running_var"]
    for again in (other, copy.deepcopy(batched), pickle.loads(pickle.dumps(batched))):
        assert torch.equal(again(x, lengths), y)
    assert "'fixed'" in repr(batched)
    only_mean = CepstralNorm("fixed", 4, scale=False).fit([(x, lengths)])
    torch.testing.assert_close(only_mean(x2)[0], x2[0] - torch.cat(samples[:3], -1).mean(-1, keepdim=True))
    again = CepstralNorm("fixed", 4).fit([(x2, lengths2)]).fit([(x, lengths), (x2, lengths2)])  # forgets the first
    assert torch.equal(again.running_mean, batched.running_mean)
    again.reset_parameters()
    with pytest.raises(SpecError, match="fitted before"):
        again(x)


def test_fixed_passes_the_gradient_of_the_formula():
    norm = CepstralNorm("fixed", 3, dtype=torch.float64).fit([torch.randn(2, 3, 9, dtype=torch.float64) * 4 + 3])
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    (dx,) = torch.autograd.grad(norm(x).sum(), x)
    torch.testing.assert_close(dx, (norm.running_var + 1e-5).rsqrt()[:, None].expand_as(x))


def test_half_precision():
    x = (torch.randn(2, 4, 50) * 4 - 20).bfloat16()
    fixed = CepstralNorm("fixed", 4).fit([x])
    for norm in (CepstralNorm(), CepstralNorm("cumulative"), fixed):
        y = norm(x)
        assert y.dtype == torch.bfloat16
        wide = norm(x.double())
        assert ((y.double() - wide).abs() <= 2**-8 * wide.abs() + 1e-4).all()  # statistics in float32, one rounding


# --- bad input ---


X = torch.zeros(2, 12, 5)
BAD = [
    (lambda: MelBandNorm(4), SpecError, ["num_frequencies", "bands=4, num_frequencies=None", "MelBandNorm(4, 80)"]),
    (lambda: MelBandNorm(0, 12), SpecError, ["bands=0, num_frequencies=12"]),
    (lambda: MelBandNorm(13, 12), SpecError, ["bands=13, num_frequencies=12"]),
    (lambda: MelBandNorm([5, 6], 12), ShapeError, ["bands=[5, 6]", "num_frequencies=12", "num_frequencies=11"]),
    (lambda: MelBandNorm([5, 6])(X), ShapeError, ["11 frequencies", "x of shape (2, 12, 5): 12 frequencies"]),
    (lambda: MelBandNorm([5, 7])(X.mT), ShapeError, ["x.mT if time comes before frequency"]),
    (lambda: MelBandNorm("mel"), SpecError, ["bands is a number, a list", "'mel'"]),
    (lambda: MelBandNorm([300.0, 1000.0]), SpecError, ["whole numbers", "[300.0, 1000.0]"]),
    (lambda: MelBandNorm([14, -2]), ShapeError, ["sizes of groups are 0 or more"]),
    (lambda: MelBandNorm(torch.zeros(2, 6).long()), ShapeError, ["which band", "of shape (2, 6)"]),
    (lambda: MelBandNorm(4, 12, affine="mel"), SpecError, ["'channel', 'frequency', 'band'", "affine='mel'"]),
    (lambda: MelBandNorm(4, 12, affine=True), SpecError, ["affine=True"]),
    (lambda: MelBandNorm(4, 12, affine="channel"), SpecError, ["num_channels", "num_channels=None"]),
    (lambda: MelBandNorm(4, 12, num_channels=2), SpecError, ["affine='frequency', num_channels=2"]),
    (lambda: MelBandNorm(4, 12, affine="channel", num_channels=2)(X), ShapeError, ["x of shape (2, 12, 5)"]),
    (lambda: MelBandNorm(4, 12)(X[0]), ShapeError, ["(B, F, T) or (B, C, F, T)", "x of shape (12, 5)", "x[None]"]),
    (lambda: CepstralNorm()(X[0, 0]), ShapeError, ["(B, F, T)", "x of shape (5,)"]),
    (lambda: MelBandNorm(4, 12)(X, [5, 6]), ShapeError, ["lengths", "5"]),
    (lambda: MelBandNorm(4, 12)(X, [5, -1]), ShapeError, ["lengths"]),
    (lambda: MelBandNorm(4, 12)(X, [5]), ShapeError, ["lengths"]),
    (lambda: MelBandNorm(4, 12)(X, torch.tensor([1.0, 0.5])), SpecError, ["lengths"]),
    (lambda: CepstralNorm()(X, [5, 4], mask=torch.ones(2, 5).bool()), SpecError, ["lengths", "mask"]),
    (lambda: CepstralNorm()(X, mask=torch.full((2, 5), -torch.inf)), SpecError, ["mask"]),
    (lambda: CepstralNorm("sliding"), SpecError, ["'utterance', 'cumulative', 'fixed'", "mode='sliding'"]),
    (lambda: CepstralNorm("fixed"), SpecError, ["number of features", "num_features=80"]),
    (lambda: CepstralNorm("fixed", 12)(X), SpecError, ["fitted before they are used", "norm.fit(batches)"]),
    (lambda: CepstralNorm("fixed", 12).fit(X), SpecError, ["iterable", "fit([x])"]),
    (lambda: CepstralNorm("fixed", 12).fit([]), ShapeError, ["no batch"]),
    (lambda: CepstralNorm("fixed", 12).fit([(X, torch.tensor([0, 0]))]), ShapeError, ["batches without a frame"]),
    (lambda: CepstralNorm().fit([X]), SpecError, ["only fixed statistics", "mode='utterance'"]),
    (lambda: CepstralNorm("utterance", 13)(X), ShapeError, ["13 frequencies", "12 frequencies"]),
    (lambda: mel_bands(20, 30, 16000), ShapeError, ["band 1 of 30 has none of the 20", "n_freqs=20"]),
    (lambda: mel_bands(201, 0, 16000), SpecError, ["n_bands is a whole number"]),
    (lambda: mel_bands(201, 8, 16000, f_max=9000), SpecError, ["8000 Hz", "f_max=9000"]),
    (lambda: mel_bands(201, 8, 16000, f_min=8000), SpecError, ["f_min=8000"]),
    (lambda: mel_bands(201, 8, 16000, mel_scale="bark"), SpecError, ["mel_scale='bark'"]),
    (lambda: hz_bands([0, 500, 9000], sample_rate=16000, n_freqs=201), ShapeError, ["8000 Hz", "edges=[500.0]"]),
    (lambda: hz_bands([900, 500], sample_rate=16000, n_mels=80), ShapeError, ["rise", "edges=[500.0, 900.0]"]),
    (lambda: hz_bands([50], sample_rate=16000, n_mels=80, f_min=60), ShapeError, ["between the 60 Hz"]),
    (lambda: hz_bands([101, 102], sample_rate=16000, n_freqs=201), ShapeError, ["none between 101 Hz and 102 Hz"]),
    (lambda: hz_bands([500], sample_rate=16000), SpecError, ["n_mels=None, n_freqs=None"]),
    (lambda: hz_bands([500], sample_rate=16000, n_mels=80, n_freqs=201), SpecError, ["n_mels=80, n_freqs=201"]),
]


@pytest.mark.parametrize(("call", "kind", "texts"), BAD)
def test_bad_input_says_the_rule_what_was_received_and_what_to_type(call, kind, texts):
    with pytest.raises(kind) as caught:
        call()
    assert isinstance(caught.value, ValueError)
    for text in (*texts, "received: ", "instead: "):
        assert text in str(caught.value)


# --- what a review found ---


@pytest.mark.parametrize("norm", [MelBandNorm(2, 6), CepstralNorm(), CepstralNorm("cumulative")])
def test_a_mask_from_around_is_read_as_one_that_is_passed(norm):
    x, mask = torch.randn(2, 6, 10), torch.arange(10) < torch.tensor([[10], [5]])
    expected = norm(x, mask=mask)
    for same in (mask, mask.long(), mask[:, None]):
        with given(mask=same):
            assert torch.equal(norm(x), expected)
    with pytest.raises(SpecError), given(mask=mask.float()):
        norm(x)


def test_fit_refuses_what_is_not_finite_and_keeps_what_it_had():
    norm, x = CepstralNorm("fixed", 3), torch.randn(2, 3, 5)
    norm.fit([x])
    before = norm.running_mean.clone()
    x[0, 1, 0] = -torch.inf  # the log of silence
    with pytest.raises(ShapeError, match=r"features \[1\]"):
        norm.fit([x])
    assert torch.equal(norm.running_mean, before)


@pytest.mark.parametrize("edges", ["abc", ["a"], None, 300.0])
def test_edges_are_numbers(edges):
    with pytest.raises(SpecError, match="edges are numbers of Hz"):
        hz_bands(edges, sample_rate=16000, n_freqs=201)


@pytest.mark.parametrize("sample_rate", ["a", None, math.inf, math.nan, 0, -1])
@pytest.mark.parametrize("axis", [{"n_freqs": 201}, {"n_mels": 80}])
def test_a_sample_rate_is_a_number_above_zero(sample_rate, axis):
    with pytest.raises(SpecError, match="sample_rate is a number of Hz"):
        hz_bands([300.0], sample_rate=sample_rate, **axis)


@pytest.mark.filterwarnings("ignore:At least one mel filterbank has all zero values")
def test_filters_too_narrow_to_be_read():
    with pytest.raises(ShapeError, match="as wide as 1 Hz"):
        hz_bands([300.0], sample_rate=16000, n_mels=8000)

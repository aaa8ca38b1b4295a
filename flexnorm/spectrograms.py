"""Spectrograms, (B, F, T) or (B, C, F, T) as torchaudio makes them: norms of mel bands, and of cepstra over time."""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .calls.call import Call, named
from .calls.functional import moments as moments_of
from .errors import ShapeError, SpecError, as_int, say, shown
from .layers.norm import Norm
from .partition import Partition, labelled, whole
from .sequences import as_mask
from .statistics import Moments

__all__ = ["CepstralNorm", "MelBandNorm", "hz_bands", "mel_bands"]


# --- bands -----------------------------------------------------------------------------------------------------------


def mel_bands(
    n_freqs: int,
    n_bands: int,
    sample_rate: float,
    f_min: float = 0.0,
    f_max: float | None = None,
    mel_scale: str = "htk",
) -> Partition:
    """Bands of equal width in mel, on the linear frequency axis of a `torchaudio.transforms.Spectrogram`.

    A frequency is in the band whose mel filter (`torchaudio.functional.melscale_fbanks`) answers it most. Those below
    f_min are in the first band, those above f_max in the last, so that every frequency has one.

    Args:
        n_freqs: number of frequencies, n_fft // 2 + 1, from 0 to sample_rate / 2.
        n_bands: number of bands.
        sample_rate: in Hz.
        f_min, f_max: from where to where the filters lie, in Hz; f_max None is sample_rate / 2.
        mel_scale: "htk" or "slaney".

    Raises:
        SpecError: an argument means nothing.
        ShapeError: there are too few frequencies for so many bands, so that a band would be empty.
        ImportError: torchaudio is missing.

    >>> mel_bands(201, 8, 16000).counts
    tensor([10,  9, 11, 15, 20, 27, 35, 74])
    """
    n_freqs, n_bands = whole(n_freqs, "n_freqs", 1), whole(n_bands, "n_bands", 1)
    filters = _filters(n_freqs, n_bands, sample_rate, f_min, f_max, mel_scale)
    ids = filters.argmax(1).cummax(0).values  # outside of all filters argmax is 0
    sizes = ids.bincount(minlength=n_bands)
    if not sizes.all():
        at = int((sizes == 0).nonzero()[0])
        raise ShapeError(
            say(
                f"every band has a frequency, and band {at} of {n_bands} has none of the {n_freqs}",
                received=f"n_freqs={n_freqs}, n_bands={n_bands}, sample_rate={sample_rate}",
                instead="fewer bands, or a spectrogram of larger n_fft",
            )
        )
    return Partition(ids, n_bands)


def hz_bands(
    edges: Sequence[float] | Tensor,
    *,
    sample_rate: float,
    n_mels: int | None = None,
    n_freqs: int | None = None,
    f_min: float = 0.0,
    f_max: float | None = None,
    mel_scale: str = "htk",
) -> Partition:
    """Bands between edges in Hz, on a mel axis (n_mels) or on a linear one (n_freqs).

    k edges, where one band ends and the next begins, make k + 1 bands. A mel is where its filter has its peak.

    Args:
        edges: in Hz, rising, inside of the axis.
        sample_rate, f_min, f_max, mel_scale: those of the `MelSpectrogram`. A linear axis ends at sample_rate / 2.
        n_mels: number of mels, of a mel axis.
        n_freqs: number of frequencies, of a linear axis.

    Raises:
        SpecError: an argument means nothing, or both of n_mels and n_freqs are given, or none.
        ShapeError: edges do not rise, lie outside of the axis, or so close that a band is empty.
        ImportError: torchaudio, which a mel axis needs, is missing.

    >>> hz_bands([300, 1000, 3000], sample_rate=16000, n_freqs=201).counts
    tensor([  8,  17,  50, 126])
    """
    if (n_mels is None) == (n_freqs is None):
        received = f"n_mels={n_mels}, n_freqs={n_freqs}"
        rule = "the axis has mels or linear frequencies, and one of the two is its size"
        raise SpecError(
            say(rule, received=received, instead="n_mels=80 after MelSpectrogram, n_freqs=201 after an STFT")
        )
    for name, value in (("sample_rate", sample_rate), ("f_min", f_min), ("f_max", f_max)):
        least = 1 if name == "sample_rate" else 0
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and least <= value < math.inf
        if not number and not (name == "f_max" and value is None):
            rule, received = f"{name} is a number of Hz, {least} or more", f"{name}={shown(value)}"
            raise SpecError(say(rule, received=received, instead="sample_rate=16000, f_min=0, f_max=8000, say"))
    numbers = isinstance(edges, (list, tuple)) and all(isinstance(edge, (int, float)) for edge in edges)
    if not numbers and not isinstance(edges, Tensor):
        rule, received = "edges are numbers of Hz: a list or a tensor", f"edges={shown(edges)}"
        raise SpecError(say(rule, received=received, instead="edges=[300, 1000, 3000], say"))
    if n_freqs is not None:
        centers = torch.linspace(0, sample_rate / 2, whole(n_freqs, "n_freqs", 1))
        low, high = 0.0, sample_rate / 2
    else:
        # torchaudio has the filters and not their peaks: these are read off at every whole Hz
        grid = int(sample_rate) // 2 + 1
        filters = _filters(grid, whole(n_mels, "n_mels", 1), sample_rate, f_min, f_max, mel_scale)
        if not bool((filters > 0).any(0).all()):
            rule, received = "filters are as wide as 1 Hz, or their peaks cannot be read off", f"n_mels={n_mels}"
            raise ShapeError(say(rule, received=received, instead="n_mels=80, say"))
        centers = filters.argmax(0).float()
        low, high = f_min, sample_rate / 2 if f_max is None else f_max
    edges = torch.as_tensor(edges, dtype=torch.float32, device="cpu")
    if edges.dim() != 1 or bool((edges.diff() <= 0).any()) or not bool(((edges > low) & (edges < high)).all()):
        good = sorted({edge for edge in edges.flatten().tolist() if low < edge < high})
        raise ShapeError(
            say(
                f"edges rise, and lie between the {low:g} Hz and the {high:g} Hz at which the axis ends",
                received=f"edges={shown(edges.tolist())}",
                instead=f"edges={good}",
            )
        )
    ids = torch.bucketize(centers, edges, right=True)
    sizes = ids.bincount(minlength=len(edges) + 1)
    if not sizes.all():
        at = int((sizes == 0).nonzero()[0])
        ends = [low, *edges.tolist(), high]
        raise ShapeError(
            say(
                f"every band has a frequency, and there is none between {ends[at]:g} Hz and {ends[at + 1]:g} Hz",
                received=f"edges={shown(edges.tolist())}, n_mels={n_mels}, n_freqs={n_freqs}",
                instead="edges further apart, or more frequencies",
            )
        )
    return Partition(ids, len(edges) + 1)


def _filters(n_freqs: int, n_mels: int, sample_rate: float, f_min: float, f_max: float | None, scale: str) -> Tensor:
    """torchaudio's mel filters: (n_freqs, n_mels)."""
    high = sample_rate / 2 if f_max is None else f_max
    if not 0 <= f_min < high <= sample_rate / 2:
        raise SpecError(
            say(
                f"the filters lie between 0 Hz and half the sample rate, {sample_rate / 2:g} Hz",
                received=f"f_min={f_min}, f_max={f_max}, sample_rate={sample_rate}",
                instead=f"f_min=0, f_max={sample_rate / 2:g}",
            )
        )
    if scale not in ("htk", "slaney"):
        received, instead = f"mel_scale={shown(scale)}", 'mel_scale="htk"'
        raise SpecError(say("mel_scale is that of the MelSpectrogram", received=received, instead=instead))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a filter is empty: an error follows
        filters: Tensor = _torchaudio().functional.melscale_fbanks(
            n_freqs, f_min, high, n_mels, int(sample_rate), mel_scale=scale
        )
    return filters


def _torchaudio() -> Any:
    try:
        return importlib.import_module("torchaudio")
    except (ImportError, OSError, RuntimeError) as error:  # the latter two come from a build for another torch
        raise ImportError(f'mel filters are those of torchaudio: pip install "flexnorm[audio]"\n  {error}') from error


# --- norms -----------------------------------------------------------------------------------------------------------


class MelBandNorm(Norm):
    r"""Normalizes each band of a spectrogram by its statistics over time: per sample, per channel, within each band.

    For each sample, channel and band S:   y[S] = (x[S] - mean(x[S])) / sqrt(var(x[S]) + eps) * weight + bias

    The pattern is `"n ... f t, n t -> n ... band[f]"`. On decibels, the gain of a band (of a microphone, a telephone, a
    room) is an offset of the band: nothing of it is left.

    Args:
        bands: what the bands are: their number (an equal number of frequencies in each, or one more in the first ones),
            a list of their sizes, a tensor (F,) with the band of every frequency, or a `Partition`, as `mel_bands` and
            `hz_bands` make.
        num_frequencies: size F of the frequency axis. Needed where bands is a number.
        affine: what has a weight and a bias of its own: "frequency", "band", "channel", several, as in "channel band",
            or None for no parameters.
        num_channels: C, where affine names channels; then x is (B, C, F, T).
        eps: added to the variance, in the unit of x squared.
        activation: "relu", "silu" or "gelu", applied to the result.
        device, dtype: of the parameters.

    Shapes: x is (B, F, T) or (B, C, F, T); so is the result. With `lengths` (B,), frames of every sample, or a bool
    mask (B, T), the other frames are 0 in the result and count nowhere.

    Raises:
        SpecError, ShapeError: an argument does not fit. Both are ValueErrors.

    >>> norm = MelBandNorm(8, 80)
    >>> norm(torch.randn(2, 80, 100), lengths=torch.tensor([100, 60])).shape
    torch.Size([2, 80, 100])
    >>> norm = MelBandNorm([5, 5, 6, 8, 10, 12, 14, 20], affine="band")
    >>> norm.weight.shape
    torch.Size([8])
    >>> norm = MelBandNorm(hz_bands([300, 1000, 3000], sample_rate=16000, n_freqs=201))

    Source: GroupNorm (Wu and He, 2018) with bands of frequencies as groups. Chang et al., "SubSpectral Normalization",
    2021, has bands of equal size, and running statistics over the batch.
    """

    def __init__(
        self,
        bands: int | Sequence[int] | Tensor | Partition,
        num_frequencies: int | None = None,
        *,
        affine: str | None = "frequency",
        num_channels: int | None = None,
        eps: float = 1e-5,
        activation: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        band = _bands(bands, num_frequencies)
        words = [] if affine is None else affine.split() if isinstance(affine, str) else [shown(affine)]
        if not set(words) <= _AXES.keys() or (affine is not None and not words):
            raise SpecError(
                say(
                    f"affine names what has parameters of its own: {', '.join(map(repr, _AXES))}, or None",
                    received=f"affine={shown(affine)}",
                    instead='affine="frequency", affine="channel band"',
                )
            )
        channels = "channel" in words
        if channels != (num_channels is not None):
            raise SpecError(
                say(
                    'num_channels is given where affine names "channel", and only there',
                    received=f"affine={affine!r}, num_channels={num_channels}",
                    instead='affine="channel", num_channels=2' if channels else "no num_channels=",
                )
            )
        sizes = {"f": band.ids.numel()}
        if num_channels is not None:
            sizes["c"] = whole(num_channels, "num_channels", 1)
        super().__init__(
            "n c f t, n t -> n c band[f]" if channels else "n ... f t, n t -> n ... band[f]",
            affine=" ".join(_AXES[word] for word in words) or None,
            eps=eps,
            activation=activation,
            sizes=sizes,
            labels={"band": band},
            device=device,
            dtype=dtype,
        )

    def forward(  # type: ignore[override]  # lengths, where a mask would stand
        self,
        x: Tensor,
        lengths: Tensor | Sequence[int] | None = None,
        *,
        mask: Tensor | None = None,
        moments: Moments | None = None,
    ) -> Tensor:
        """Normalizes x.

        Args:
            x: (B, F, T) or (B, C, F, T).
            lengths: number of frames of every sample, (B,).
            mask: instead of lengths: True where a frame is, (B, T).
            moments: statistics to use instead of x's own.
        """
        return super().forward(x, mask, moments=moments, labels=named(lengths=lengths))

    def fit_call(self, call: Call) -> Call:
        """The mask over frames, also of lengths."""
        _check(call.x, self._sizes["f"])
        return _of_frames(call)


_AXES = {"channel": "c", "frequency": "f", "band": "band[f]"}


class CepstralNorm(Norm):
    r"""Cepstral mean and variance normalization: every feature by its statistics over time.

    For each feature (and sample):   y[t] = (x[t] - mean) / sqrt(var + eps)

    Args:
        mode: which frames the statistics are of. "utterance": those of the sample. "cumulative": those of the sample up
            to and with t itself, so that nothing is known of the future; the first frame is 0. "fixed": those that
            `fit` has seen.
        num_features: size F of the feature axis. Needed by "fixed", which keeps `running_mean` and `running_var` (F,).
        scale: divide by the standard deviation. Without it, the mean is subtracted only.
        eps: added to the variance, in the unit of x squared.
        device, dtype: of the fitted statistics.

    Shapes: x is (B, F, T) or (B, C, F, T), as torchaudio's `MFCC` and `MelSpectrogram` give it; so is the result. With
    `lengths` (B,), or a bool mask (B, T), the other frames are 0 in the result and count nowhere.

    Raises:
        SpecError, ShapeError: an argument does not fit, or "fixed" is called before `fit`. Both are ValueErrors.

    >>> x = torch.tensor([[[0.0, 2.0, 4.0]]])
    >>> CepstralNorm("utterance", scale=False)(x)
    tensor([[[-2.,  0.,  2.]]])
    >>> CepstralNorm("cumulative", scale=False)(x)
    tensor([[[0., 1., 2.]]])
    >>> CepstralNorm("fixed", 1, scale=False).fit([x, x + 1])(x)
    tensor([[[-2.5000, -0.5000,  1.5000]]])

    Differs from `torchaudio.transforms.SlidingWindowCmn`: the statistics are of all frames and not of a window, the
    variance is biased, time is the last axis, and padding does not count.

    Source: Viikki and Laurila, "Cepstral domain segmental feature vector normalization for noise robust speech
    recognition", 1998.
    """

    def __init__(
        self,
        mode: str = "utterance",
        num_features: int | None = None,
        *,
        scale: bool = True,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not isinstance(mode, str) or mode not in _MODES:
            received, instead = f"mode={shown(mode)}", 'mode="utterance"'
            raise SpecError(say(f"mode is one of {', '.join(map(repr, _MODES))}", received=received, instead=instead))
        if mode == "fixed" and num_features is None:
            rule, instead = "fixed statistics need the number of features when the layer is built", "num_features=80"
            raise SpecError(say(rule, received="num_features=None", instead=instead))
        sizes = {} if num_features is None else {"f": whole(num_features, "num_features", 1)}
        along = "t" if mode == "cumulative" else None
        super().__init__(_MODES[mode], scale=scale, eps=eps, sizes=sizes, cumulative=along)
        self.mode, self.num_features = mode, num_features
        if mode == "fixed":
            self.running_mean = torch.empty(sizes["f"], device=device, dtype=dtype)
            self.running_var = torch.empty(sizes["f"], device=device, dtype=dtype)
            self.reset_running_stats()

    def reset_running_stats(self) -> None:
        """Forgets what was fitted."""
        for buffer in (self.running_mean, self.running_var):
            if buffer is not None:
                buffer.fill_(
                    torch.nan
                )  # where asking would wait for the device, the result says that nothing is fitted

    @torch.no_grad()
    def fit(self, batches: Iterable[Tensor | tuple[Tensor, Tensor]]) -> CepstralNorm:
        """Sets the statistics of the mode "fixed" to those of all frames, however they are spread over batches.

        Args:
            batches: x, or pairs of x and lengths.

        Returns:
            The layer itself.
        """
        if self.running_mean is None or self.running_var is None:
            rule, instead = "only fixed statistics are fitted", 'CepstralNorm("fixed", num_features)'
            raise SpecError(say(rule, received=f"mode={self.mode!r}", instead=instead))
        if isinstance(batches, Tensor):
            rule, instead = "batches are several: an iterable of tensors or of (x, lengths)", "fit([x])"
            raise SpecError(say(rule, received=shown(batches), instead=instead))
        total = None
        for batch in batches:
            x, lengths = (batch, None) if isinstance(batch, Tensor) else batch
            _check(x, self._sizes["f"])
            new = moments_of(x.double(), _MODES["fixed"], _frames(x, lengths, None))
            total = new if total is None else total.merge(new)
        if total is None or not bool((total.count > 0).all()):
            received = "no batch" if total is None else "batches without a frame"
            raise ShapeError(
                say("statistics are fitted on frames", received=received, instead="batches that hold some")
            )
        if not bool((total.mean.isfinite() & total.var.isfinite()).all()):
            bad = (~(total.mean.isfinite() & total.var.isfinite())).nonzero().flatten().tolist()
            received, instead = f"features {shown(bad)} that are not", "x.clamp(min=-100), say, for the log of silence"
            raise ShapeError(say("statistics are fitted on finite values", received=received, instead=instead))
        self.running_mean.copy_(total.mean)
        self.running_var.copy_(total.var)
        return self

    def forward(  # type: ignore[override]  # lengths, where a mask would stand
        self, x: Tensor, lengths: Tensor | Sequence[int] | None = None, *, mask: Tensor | None = None
    ) -> Tensor:
        """Normalizes x.

        Args:
            x: (B, F, T) or (B, C, F, T).
            lengths: number of frames of every sample, (B,).
            mask: instead of lengths: True where a frame is, (B, T).
        """
        return super().forward(x, mask, labels=named(lengths=lengths))

    def fit_call(self, call: Call) -> Call:
        """The mask over frames, also of lengths; and the fitted statistics, in that mode."""
        _check(call.x, self._sizes.get("f"))
        call = _of_frames(call)
        return call._replace(moments=self._fitted_moments()) if self.mode == "fixed" else call

    def _fitted_moments(self) -> Moments:
        mean, var = self.running_mean, self.running_var
        assert mean is not None
        assert var is not None
        if mean.device.type == "cpu" and not torch.compiler.is_compiling() and bool(mean.isnan().any()):
            rule, instead = "fixed statistics are fitted before they are used", "norm.fit(batches), or load_state_dict"
            raise SpecError(say(rule, received=f"{self}, not fitted", instead=instead))
        return Moments(torch.ones_like(mean), mean, var)

    def extra_repr(self) -> str:
        """The mode, and what `Norm` shows."""
        return f"{self.mode!r}, {super().extra_repr()}"


_MODES = {
    "utterance": "n ... f t, n t -> n ... f",
    "cumulative": "n ... f t, n t -> n ... f",
    "fixed": "n ... f t, n t -> f",
}


# --- what comes in ---------------------------------------------------------------------------------------------------


def _bands(bands: object, num_frequencies: object) -> Partition:
    """The band of every frequency, in the four ways of saying it."""
    if num_frequencies is not None:
        num_frequencies = whole(num_frequencies, "num_frequencies", 1)
    number = as_int(bands)
    if number is not None and (num_frequencies is None or not 0 < number <= num_frequencies):
        raise SpecError(
            say(
                "a number of bands is at least 1, and at most that of the frequencies: num_frequencies",
                received=f"bands={number}, num_frequencies={num_frequencies}",
                instead=f"MelBandNorm({max(number, 1)}, 80), say, or a list of the sizes of the bands",
            )
        )
    partition = labelled(bands, size=num_frequencies)
    if partition is None:
        raise SpecError(
            say(
                "bands is a number, a list of sizes, a tensor with the band of every frequency, or a Partition",
                received=f"bands={shown(bands)}",
                instead="MelBandNorm(8, 80), MelBandNorm([20, 60]), MelBandNorm(mel_bands(201, 8, 16000))",
            )
        )
    if partition.ids.dim() != 1 or (num_frequencies is not None and partition.ids.numel() != num_frequencies):
        raise ShapeError(
            say(
                f"bands say for each of the frequencies ({num_frequencies or 'F'}) which band it is in",
                received=f"bands={bands!r}, of shape {tuple(partition.shape)}; num_frequencies={num_frequencies}",
                instead=f"num_frequencies={partition.ids.numel()}, or sizes that add up to it",
            )
        )
    return partition


def _check(x: Tensor, num_frequencies: int | None) -> None:
    if not isinstance(x, Tensor):  # the pattern refuses it
        return
    if x.dim() not in (3, 4):
        raise ShapeError(
            say(
                "x has the axes (B, F, T) or (B, C, F, T)",
                received=f"x of shape {tuple(x.shape)}",
                instead="x[None] for one sample" if x.dim() == 2 else "x.flatten(0, -4), with the axes before in one",
            )
        )
    if num_frequencies is not None and x.shape[-2] != num_frequencies:
        other = ", or x.mT if time comes before frequency" if x.shape[-1] == num_frequencies else ""
        raise ShapeError(
            say(
                f"this layer is for {num_frequencies} frequencies, the axis before the last of x",
                received=f"x of shape {tuple(x.shape)}: {x.shape[-2]} frequencies",
                instead=f"bands, or num_features, for {x.shape[-2]} frequencies{other}",
            )
        )


def _of_frames(call: Call) -> Call:
    """The call with a mask in place of lengths."""
    names = {name: value for name, value in call.names.items() if name != "lengths"}
    return call.fit(call.x, _frames(call.x, call.names.get("lengths"), call.mask), names)


def _frames(x: Tensor, lengths: Tensor | Sequence[int] | None, mask: Tensor | None) -> Tensor | None:
    if not isinstance(x, Tensor) or (lengths is None and mask is None):
        return None
    return as_mask(mask, lengths, batch=x.shape[0], time=x.shape[-1], device=x.device)

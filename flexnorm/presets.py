"""Norms of other axes: weighted channels, frames of video, bands of a spectrum, subgraphs, regions, sensors, people.

Each is a pattern over `Norm`, and how its labels, weights or statistics come about.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .calls.arguments import Label, Options
from .calls.call import Call, Used, named
from .calls.functional import formula_for
from .calls.functional import moments as moments_of
from .errors import ShapeError, SpecError, as_int, say, shown
from .images import broadcasts, over_pixels
from .layers.norm import Norm
from .layers.running import Known, RunningStatistics
from .partition import Partition, labelled, whole
from .spec import Spec
from .statistics import Moments, each

__all__ = [
    "DemographicNorm",
    "RegionNorm",
    "SensorNorm",
    "SpectralGroupNorm",
    "SubgraphNorm",
    "TemporalGroupNorm",
    "WeightedGroupNorm",
]


_OVER_PIXELS = Spec.parse("n (g c) ..., n ... -> n g")
_OF_CHANNELS = _OVER_PIXELS.read("(g c)", "affine")


class WeightedGroupNorm(Norm):
    r"""Group norm whose channels count in the statistics as much as they have learned to.

    For each image and group S, with weights v >= 0 of the channels:

        mean = sum(v x[S]) / sum(v)        var = sum(v (x[S] - mean)^2) / sum(v)
        y[S] = (x[S] - mean) / sqrt(var + eps) * weight + bias

    The pattern is `"n (g c) ..., (g c) -> n g"`: v is the floating mask, through which gradients flow.

    Args:
        num_groups: number of groups, of consecutive channels.
        num_channels: number of channels, C.
        eps: added to the variance, in the unit of x squared.
        affine: learn weight and bias, of shape (C,).
        device, dtype: of the parameters.
        bias: learn a bias beside the weight.
        activation: "relu", "silu" or "gelu", applied to the result.

    Shapes: x is (N, C, *spatial); so is the result. The mask is (N, *spatial), with size 1 along axes where it does not
    change: bool (which pixels there are) or floating (weights of pixels, times those of channels).

    The parameter is `raw_channel_weight` (C,), and v = softplus of it. It begins with 0, equal weights: that is
    `nn.GroupNorm`, and weight decay leads back there. Only ratios within a group matter. Training comes near weight 0,
    and reaches it by underflow only. Set to -inf it is exactly 0, and stays, as its gradient is 0: the channel counts
    nowhere, whatever finite number it holds, and is normalized by the others. A group whose weights are all 0 gives 0
    (then bias).

    With a mask, the moments of every channel are taken over its pixels, weighted, and merged into those of the group:
    one pass over x more, but no tensor of weights of x's size.

    Raises:
        SpecError, ShapeError: an argument does not fit. Both are ValueErrors.

    >>> from flexnorm import normalize
    >>> norm, x = WeightedGroupNorm(2, 6), torch.randn(3, 6, 4, 4)
    >>> torch.allclose(norm(x), nn.GroupNorm(2, 6)(x), atol=1e-5)
    True
    >>> with torch.no_grad():
    ...     norm.raw_channel_weight[1] = -torch.inf
    >>> y = norm(x)  # by channels 0 and 2, and by 3, 4 and 5
    >>> torch.allclose(y[:, [0, 2]], normalize(x[:, [0, 2]], "n c h w -> n"), atol=1e-5)
    True

    Source: Wu and He, "Group Normalization", 2018, where all channels of a group count alike, so that one of large
    values, or a dead one, decides for all others.
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: str | None = None,
    ) -> None:
        super().__init__(
            "n (g c) ..., (g c) -> n g",
            **_groups(num_groups, num_channels, affine),
            eps=eps,
            bias=bias,
            activation=activation,
            device=device,
            dtype=dtype,
        )
        self.num_groups, self.num_channels = num_groups, num_channels
        real = dtype.to_real() if dtype is not None and dtype.is_complex else dtype
        self.raw_channel_weight = nn.Parameter(torch.zeros(num_channels, device=device, dtype=real))

    def reset_parameters(self) -> None:
        """Weight 1, bias 0, and equal weights of the channels."""
        super().reset_parameters()
        if "raw_channel_weight" in self._parameters:  # not while Norm is being built
            nn.init.zeros_(self.raw_channel_weight)

    @property
    def channel_weight(self) -> Tensor:
        """v, (C,), in float32 or wider: what the channels count in the statistics."""
        raw = self.raw_channel_weight
        return functional.softplus(raw.to(torch.promote_types(raw.dtype, torch.float32)))

    def forward(self, input: Tensor, mask: Tensor | None = None, *, moments: Moments | None = None) -> Tensor:  # type: ignore[override]  # torch's name
        """Normalizes x.

        Args:
            input: x, (N, C, *spatial).
            mask: bool (which pixels there are) or floating (weights), (N, *spatial), or of size 1 along an axis.
            moments: statistics to use instead of x's own, (N, num_groups).
        """
        return super().forward(input, mask, moments=moments)

    def fit_call(self, call: Call) -> Call:
        """The weights of the channels stand where the pattern has a mask.

        With a mask of pixels, the pattern is one over pixels, and the moments of the channels are weighed.
        """
        x, mask = call.x, call.mask
        if mask is None or not isinstance(x, Tensor) or x.dim() < 2 or x.shape[1] != self.num_channels:
            return super().fit_call(call)._replace(mask=self.channel_weight)
        call = super().fit_call(call)
        sizes, pixels, moments = {"g": self.num_groups}, over_pixels(x, call.mask), call.moments
        if moments is None:
            alone = moments_of(x, "n c ..., n ... -> n c", pixels)
            moments = alone.weighed(self.channel_weight).coarsen("n (g c) -> n g", sizes=sizes)
        told = (*sizes.items(), ("c", self.num_channels // self.num_groups))
        affine = _OF_CHANNELS if call.formula.affines else None
        formula = formula_for(_OVER_PIXELS, call.formula.options, affine, told)
        return call._replace(formula=formula, mask=pixels, moments=moments)


class TemporalGroupNorm(Norm):
    r"""Group norm of video, (B, C, T, H, W): by the frame, by the clip, or by the clip so far.

    For each set S of a clip and group:   y[S] = (x[S] - mean(x[S])) / sqrt(var(x[S]) + eps) * weight + bias

    Args:
        num_groups: number of groups, of consecutive channels.
        num_channels: number of channels, C.
        mode: what a frame is normalized by. "frame": itself, `"b (g c) t ..., b t -> b t g"`, as by `nn.GroupNorm` of
            each frame alone; brightness and contrast of frames are gone, and flicker with them. "clip": all frames,
            `"-> b g"`, as by `nn.GroupNorm`; changes over time stay, and every frame depends on the last one. "causal":
            all frames up to and with itself, `cumulative="t"`: changes stay, and nothing depends on what comes later.
        eps: added to the variance, in the unit of x squared.
        affine: learn weight and bias, of shape (C,).
        device, dtype: of the parameters.
        bias: learn a bias beside the weight.
        activation: "relu", "silu" or "gelu", applied to the result.

    Shapes: x is (B, C, T, *spatial), torch's layout of conv3d, with any number of spatial axes; so is the result. The
    mask is (B, T): bool, True where a frame is (the others are 0 in the result and count nowhere), or floating,
    weights of frames. `step(x, state)` normalizes a causal stream chunk by chunk.

    Raises:
        SpecError, ShapeError: an argument does not fit, or `step` is called in another mode. Both are ValueErrors.

    >>> x = torch.randn(2, 16, 8, 7, 7)
    >>> norm = TemporalGroupNorm(4, 16, "causal")
    >>> y = norm(x)
    >>> first, state = norm.step(x[:, :, :3])
    >>> second, state = norm.step(x[:, :, 3:], state)
    >>> torch.allclose(torch.cat([first, second], 2), y, atol=1e-5)
    True

    Source: Wu and He, "Group Normalization", 2018, for clips (their models of Kinetics); Luo and Mesgarani,
    "Conv-TasNet", 2019, for cumulated statistics.
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        mode: str = "frame",
        eps: float = 1e-5,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: str | None = None,
    ) -> None:
        if mode not in ("frame", "clip", "causal"):
            rule, received = "mode is 'frame', 'clip' or 'causal'", f"mode={shown(mode)}"
            raise SpecError(say(rule, received=received, instead='mode="frame"'))
        super().__init__(
            "b (g c) t ..., b t -> b t g" if mode == "frame" else "b (g c) t ..., b t -> b g",
            **_groups(num_groups, num_channels, affine),
            cumulative="t" if mode == "causal" else None,
            eps=eps,
            bias=bias,
            activation=activation,
            device=device,
            dtype=dtype,
        )
        self.num_groups, self.num_channels, self.mode = num_groups, num_channels, mode

    def extra_repr(self) -> str:
        """The mode, and what `Norm` shows."""
        return f"{self.mode!r}, {super().extra_repr()}"


class SpectralGroupNorm(Norm):
    r"""Every band of frequencies of a signal, (N, C, T), to the same power.

    X = rfft(x); for each sample, group of channels and band S:   Y[S] = X[S] / sqrt(E|X[S]|^2 + eps) * weight
    y = irfft(Y), as long as x. Both transforms are orthonormal, so that eps has the unit of x squared, and white noise
    comes out with variance 1.

    The pattern is `"n (g c) ... f -> n g band[f]", center=False`. No mean is subtracted: the bins at 0 and at half the
    sample rate are real, and would not be any more; and the mean of a band's bins is, but for a factor, the band's
    analytic signal at the first sample, so that the result would depend on where the signal is cut.

    Args:
        num_groups: number of groups of consecutive channels whose bins count together: `num_channels` for each channel
            alone, 1 for all of them.
        num_channels: number of channels, C.
        bands: bands of the num_samples // 2 + 1 frequencies: their number (as equal as can be, the first ones larger),
            a list of their sizes, a tensor with the band of every frequency, or a `Partition`: `hz_bands`, `mel_bands`.
        num_samples: number of samples, T. Where bands are no number, they say it themselves: it is 2 F - 2 or 2 F - 1
            for F frequencies, and x may have either.
        eps: added to the power of a bin, in the unit of x squared.
        affine: learn a weight for each channel and band, (C, bands): an equalizer. There is no bias.
        device, dtype: of the parameters.
        activation: "relu", "silu" or "gelu", applied to the result, over time.

    Shapes: x is (N, C, *, T), real; so is the result. The mask is (N, C): bool, which channels there are, or floating,
    weights of channels in their group. There is none over time, as every sample is part of every frequency.

    Raises:
        SpecError, ShapeError: an argument does not fit. Both are ValueErrors.

    >>> norm = SpectralGroupNorm(2, 2, bands=[1, 4, 12], num_samples=32)
    >>> x = torch.randn(5, 2, 32)
    >>> X = torch.fft.rfft(norm(x), norm="ortho")
    >>> torch.allclose(X[..., 1:5].abs().square().mean(-1), torch.ones(5, 2), atol=1e-3)
    True

    Source: group norm with bands of frequencies as groups, against the gain that a microphone, an electrode or a room
    gives each band: a positive gain per band changes nothing. Of spectrograms, `flexnorm.spectrograms.MelBandNorm`.
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        bands: int | Sequence[int] | Tensor | Partition,
        num_samples: int | None = None,
        eps: float = 1e-5,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str | None = None,
    ) -> None:
        if num_samples is None and as_int(bands) is not None:
            received, instead = (
                f"bands={shown(bands)}, num_samples=None",
                "num_samples=1024, say, or the sizes of bands",
            )
            raise SpecError(
                say("a number of bands divides the frequencies of num_samples", received=received, instead=instead)
            )
        frequencies = None if num_samples is None else whole(num_samples, "num_samples", 1) // 2 + 1
        if dtype is not None and dtype.is_complex:
            rule, instead = "weights of bands are real: others would leave no real signal", f"dtype={dtype.to_real()}"
            raise SpecError(say(rule, received=f"dtype={dtype}", instead=instead))
        band = _partition("bands", "frequencies", bands, frequencies)
        options = _groups(num_groups, num_channels, affine)
        options["affine"] = "(g c) band[f]" if affine else None
        options["sizes"]["f"] = band.ids.numel()
        super().__init__(
            "n (g c) ... f, n (g c) -> n g band[f]",
            **options,
            band=band,
            center=False,
            bias=False,
            eps=eps,
            device=device,
            dtype=dtype,
        )
        self.activation = Options(activation=activation).activation  # over time: `Norm` sees bins
        self.num_groups, self.num_channels, self.num_samples = num_groups, num_channels, num_samples

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:  # type: ignore[override]  # torch's name
        """Normalizes x.

        Args:
            input: x, (N, C, *, T).
            mask: bool (which channels there are) or floating (weights), (N, C).
        """
        return super().forward(input, mask)

    def fit_call(self, call: Call) -> Call:
        """The bins of x."""
        x, frequencies = call.x, self._sizes["f"]
        if not isinstance(x, Tensor) or x.is_complex() or not x.is_floating_point():
            raise SpecError(say("x is a floating tensor, a signal", received=shown(x), instead="x.float()"))
        if x.dim() < 3 or x.shape[-1] < 1 or x.shape[-1] // 2 + 1 != frequencies:
            raise ShapeError(
                say(
                    f"x has the axes (N, C, *, T), of {max(2 * frequencies - 2, 1)} or {2 * frequencies - 1} samples T,"
                    f" as the bands are of {frequencies} frequencies",
                    received=f"x of shape {tuple(x.shape)}",
                    instead=f"bands= for {x.shape[-1] // 2 + 1} frequencies" if x.dim() > 2 else "x[:, None], say",
                )
            )
        wide, samples = x.to(torch.promote_types(x.dtype, torch.float32)), x.shape[-1]
        if x.numel():
            first = wide[..., :1].detach()  # transformed by itself, because its rounding would reach all bands
            bins = torch.fft.rfft(wide - first, norm="ortho")
            bins = bins + functional.pad(first * math.sqrt(samples), (0, frequencies - 1))
        else:  # torch makes no transform of it
            bins = wide[..., :frequencies].to(wide.dtype.to_complex())
        return super().fit_call(call._replace(x=bins))

    def unfit(self, call: Call, y: Tensor) -> Tensor:
        """The signal of the bins, and the activation over time."""
        samples = call.x.shape[-1]
        if call.x.numel():
            y = torch.fft.irfft(y, n=samples, norm="ortho")
        else:
            y = functional.pad(y.real, (0, samples - self._sizes["f"]))
        y = y.to(call.x.dtype)
        return y if self.activation is None else getattr(functional, self.activation)(y)

    def extra_repr(self) -> str:
        """What `Norm` shows, and the activation."""
        return super().extra_repr() + (f", activation={self.activation!r}" if self.activation else "")


class SubgraphNorm(Norm):
    r"""Group norm of every subgraph, over its nodes and groups of channels.

    For each graph b, part p and group S:   y[S] = (x[S] - mean(x[S])) / sqrt(var(x[S]) + eps) * weight + bias

    The pattern is `"v (g c), v -> batch[v] part[v] g"`. Both labels come with every call, as arguments or from around
    (`given(batch=..., part=...)`): ids in any order, or a `Partition`, made once for all layers.

    Args:
        num_groups: number of groups, of consecutive channels; as many as channels: every channel alone.
        num_channels: number of channels, C.
        eps: added to the variance, in the unit of x squared.
        affine: learn weight and bias, of shape (C,).
        device, dtype: of the parameters.
        num_parts: number of parts of a graph, where it is always the same. Without it, that of the `Partition`, or the
            largest id + 1, which waits for the device once for every call.
        bias: learn a bias beside the weight.
        activation: "relu", "silu" or "gelu", applied to the result.

    Shapes: x is (nodes, channels), part and batch are (nodes,). The mask is (nodes,): bool, which nodes there are, or
    floating, weights. There is a set for every pair of graph and part, empty ones too: if parts have a number of their
    own over all graphs, leave batch out.

    Raises:
        SpecError, ShapeError: an argument does not fit. Both are ValueErrors.

    >>> norm = SubgraphNorm(4, 32)
    >>> part = torch.tensor([0, 0, 0, 1, 1, 0, 1, 1, 0, 0])
    >>> norm(torch.randn(10, 32), part, batch=torch.arange(10) // 5).shape
    torch.Size([10, 32])

    Source: Zhou et al., "Towards Deeper Graph Neural Networks with Differentiable Group Normalization", 2020, whose
    clusters of nodes are normalized apart, so that they stay apart in deep models.
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        num_parts: int | None = None,
        bias: bool = True,
        activation: str | None = None,
    ) -> None:
        super().__init__(
            "v (g c), v -> batch[v] part[v] g",
            **_groups(num_groups, num_channels, affine),
            labels={} if num_parts is None else {"part": whole(num_parts, "num_parts", 1)},
            eps=eps,
            bias=bias,
            activation=activation,
            device=device,
            dtype=dtype,
        )
        self.num_groups, self.num_channels = num_groups, num_channels

    def forward(  # type: ignore[override]  # labels, where a mask would stand
        self, x: Tensor, part: Label | None = None, batch: Label | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Normalizes x.

        Args:
            x: (nodes, channels).
            part: the part of every node, (nodes,).
            batch: the graph of every node, (nodes,). Without it, all nodes are one graph.
            mask: bool (which nodes there are) or floating (weights), (nodes,).
        """
        return super().forward(x, mask, labels=named(part=part, batch=batch))

    def fit_call(self, call: Call) -> Call:
        """Without a batch, all nodes are one graph."""
        x = call.x
        if "batch" not in call.names and isinstance(x, Tensor):
            one = Partition._made(torch.zeros(x.shape[:1], dtype=torch.int64, device=x.device), 1)
            call = call._replace(names={**call.names, "batch": one})
        return super().fit_call(call)


class RegionNorm(Norm):
    r"""Instance norm of every region of an image, as of what is there and of the hole that is to be painted in.

    For each image, channel and region S:   y[S] = (x[S] - mean(x[S])) / sqrt(var(x[S]) + eps) * weight + bias

    The pattern is `"n c ..., n ... -> n c region[n ...]"`. The regions come with every call, as an argument or from
    around (`given(region=...)`).

    Args:
        num_features: number of channels, C.
        num_regions: number of regions. An image may lack some.
        eps: added to the variance, in the unit of x squared.
        affine: learn weight and bias of every region and channel, (num_regions, C).
        device, dtype: of the parameters.
        bias: learn a bias beside the weight.
        activation: "relu", "silu" or "gelu", applied to the result.

    Shapes: x is (N, C, *spatial) with any number of spatial axes; so is the result. The region is (N, *spatial), with
    size 1 along axes where it does not change: ids, or bool, of which False is region 0, the hole, and True region 1;
    or a `Partition` of that shape. The mask is (N, *spatial), too: bool, which pixels there are, or floating, weights.

    Raises:
        SpecError, ShapeError: an argument does not fit. Both are ValueErrors.

    >>> x, valid = torch.randn(2, 3, 8, 8), torch.ones(2, 8, 8, dtype=torch.bool)
    >>> valid[:, 2:5, 3:6] = False
    >>> y = RegionNorm(3)(x.masked_fill(~valid[:, None], 0), valid)  # the hole shifts no mean
    >>> torch.allclose(y[0, :, valid[0]].mean(1), torch.zeros(3), atol=1e-5)
    True

    Source: Yu et al., "Region Normalization for Image Inpainting", 2020. Their regions that are learned from features
    are ids like any others.
    """

    def __init__(
        self,
        num_features: int,
        num_regions: int = 2,
        eps: float = 1e-5,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: str | None = None,
    ) -> None:
        super().__init__(
            "n c ..., n ... -> n c region[n ...]",
            affine="region[n ...] c" if affine else None,
            c=whole(num_features, "num_features", 1),
            region=whole(num_regions, "num_regions", 1),
            eps=eps,
            bias=bias,
            activation=activation,
            device=device,
            dtype=dtype,
        )
        self.num_features, self.num_regions = num_features, num_regions

    def forward(  # type: ignore[override]  # a label, where a mask would stand
        self, x: Tensor, region: Label | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Normalizes x.

        Args:
            x: (N, C, *spatial).
            region: the region of every pixel, (N, *spatial), or of size 1 along an axis. Bool: False is 0, True is 1.
            mask: bool (which pixels there are) or floating (weights), (N, *spatial), or of size 1 along an axis.
        """
        return super().forward(x, mask, labels=named(region=region))

    def fit_call(self, call: Call) -> Call:
        """The mask and the regions over all pixels; a bool mask of two regions as numbers."""
        x, mask, names, region = call.x, call.mask, call.names, call.names.get("region")
        if isinstance(x, Tensor) and x.dim() > 1:  # what does not fit, the pattern refuses
            mask = over_pixels(x, mask)
            region = _expanded(x, region) if isinstance(region, Tensor) else region
        if isinstance(region, Tensor):
            names = {**names, "region": region.long() if region.dtype == torch.bool else region}
        return super().fit_call(call._replace(mask=mask, names=names))


class SensorNorm(Norm):
    r"""Group norm with a group for each sensor, of as many channels as it has.

    For each sample and sensor S:   y[S] = (x[S] - mean(x[S])) / sqrt(var(x[S]) + eps) * weight + bias

    The pattern is `"n c ..., n c -> n sensor[c]"`. A sensor's gain and offset, which drift and differ between machines,
    change nothing; what differs between its channels stays.

    Args:
        sensors: a list of the sensors' numbers of channels, side by side; or a tensor (C,) with the sensor of every
            channel, or a `Partition`. The ids are part of the state, `sensor_ids`, and no buffer.
        eps: added to the variance, in the unit of x squared.
        affine: learn weight and bias, of shape (C,).
        device, dtype: of the parameters.
        bias: learn a bias beside the weight.
        activation: "relu", "silu" or "gelu", applied to the result.

    Shapes: x is (N, C, *) with any number of further axes, which are pooled; so is the result. The mask is (N, C):
    bool, which channels there are (one that fails is 0 in the result, and counts nowhere), or floating, weights. In x
    of shape (N, C), a sensor of one channel is a set of one value, which becomes 0: a norm leaves nothing of it.

    Raises:
        SpecError, ShapeError: an argument does not fit. Both are ValueErrors.

    >>> norm = SensorNorm([3, 3, 6], eps=0)  # accelerometer, gyroscope, joints
    >>> x = torch.randn(4, 12)
    >>> drifted = torch.cat([x[:, :3] * 2 + 1, x[:, 3:]], 1)
    >>> torch.allclose(norm(drifted), norm(x), atol=1e-4)
    True

    Source: Wu and He, "Group Normalization", 2018, with sensors as groups, as the channels of one share gain and unit.
    """

    def __init__(
        self,
        sensors: Sequence[int] | Tensor | Partition,
        eps: float = 1e-5,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: str | None = None,
    ) -> None:
        sensor = _partition("sensors", "channels", sensors)
        super().__init__(
            "n c ..., n c -> n sensor[c]",
            affine="c" if affine else None,
            c=sensor.ids.numel(),
            sensor=sensor,
            eps=eps,
            bias=bias,
            activation=activation,
            device=device,
            dtype=dtype,
        )
        self.num_sensors, self.num_channels = sensor.count, sensor.ids.numel()


def _filled(m: Moments, known: Tensor) -> Moments:
    """Where not known, the moments of the first row."""
    return each(lambda t: t.where(known, t[:1]), m)


class _OfGroups(RunningStatistics):
    """The running statistics of everyone, in row 0, and of groups that have enough members."""

    def moments(self, layer: Any) -> Moments:
        """The statistics of everyone stand for a group that was never seen."""
        return _filled(super().moments(layer), layer.num_batches_tracked > 0)

    def values(self, layer: Any, *seen: Moments) -> tuple[Known, Known]:
        """Groups with too few members stay."""
        (m,) = seen
        known = m.count >= layer.min_members
        return (m.mean, known), (m.unbiased_var()[0], known)


class DemographicNorm(Norm):
    r"""Tables, (N, F): every feature by the statistics of the person's own group, as BatchNorm does by those of all.

    For each group and feature S:   y[S] = (x[S] - mean(x[S])) / sqrt(var(x[S]) + eps) * weight + bias

    The pattern is `"n f, n -> group[n] f"`. Training takes the statistics of the batch and keeps running ones, of every
    group and of everyone; evaluation takes the running ones. Then a difference of means or variances between groups is
    gone from every feature. So is what it said, and a group must be known at evaluation, too.

    Who is in no group has the id -1 and is normalized by the statistics of everyone: of the batch in training, running
    in evaluation. So is, in training, who is in a group of fewer than `min_members` in the batch (one alone would be
    0), and in evaluation, who is in a group that training never saw with as many.

    Args:
        num_features: number of features, F.
        num_groups: number of groups.
        eps: added to the variance, in the unit of x squared.
        momentum: weight of the new value in the running statistics; None: the average of all batches, which suits rare
            groups, whose statistics would else stay near mean 0 and variance 1, with which they begin.
        affine: learn weight and bias, of shape (F,), the same for all groups.
        device, dtype: of the parameters.
        min_members: members that a group needs in a batch, 2 or more.
        bias: learn a bias beside the weight.
        activation: "relu", "silu" or "gelu", applied to the result.
        sharded, process_group: as in `Norm`: "n" where the ranks have parts of the batch.

    Shapes: x is (N, F), group is (N,): ids from 0 to num_groups - 1, or -1. The mask is (N,), bool: which rows are.
    The buffers `running_mean`, `running_var` and `num_batches_tracked` are (1 + num_groups, F), of everyone in row 0.
    `flexnorm.calibrate` sets them to those of all batches together, which small groups need most.

    Nothing waits for the device.

    Raises:
        SpecError, ShapeError: an argument does not fit, or evaluation comes before training. Both are ValueErrors.

    >>> norm = DemographicNorm(3, num_groups=4)
    >>> x, group = torch.randn(100, 3), torch.randint(0, 3, (100,))
    >>> y = norm(x + group[:, None], group)
    >>> y = norm.eval()(x, torch.full((100,), 3))  # never seen: by the statistics of everyone

    Source: Xu et al., "FairAdaBN", 2023, with a BatchNorm for each demographic group; Chang et al., "Domain-Specific
    Batch Normalization", 2019.
    """

    running_statistics = _OfGroups()

    def __init__(
        self,
        num_features: int,
        num_groups: int,
        eps: float = 1e-5,
        momentum: float | None = None,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        min_members: int = 2,
        bias: bool = True,
        activation: str | None = None,
        sharded: str | None = None,
        process_group: Any = None,
    ) -> None:
        shape = 1 + whole(num_groups, "num_groups", 1), whole(num_features, "num_features", 1)
        super().__init__(
            "n f, n -> group[n] f",
            affine="f" if affine else None,
            group=shape[0],
            f=shape[1],
            track_running_stats=True,
            momentum=momentum,
            eps=eps,
            bias=bias,
            activation=activation,
            sharded=sharded,
            process_group=process_group,
            device=device,
            dtype=dtype,
        )
        self.num_batches_tracked = torch.zeros(shape, device=device, dtype=torch.int64)  # of each set
        self.num_features, self.num_groups = num_features, num_groups
        self.min_members = whole(min_members, "min_members", 2)

    def forward(  # type: ignore[override]  # a label, where a mask would stand
        self,
        x: Tensor,
        group: Label | None = None,
        mask: Tensor | None = None,
        *,
        return_moments: bool = False,
    ) -> Any:
        """Normalizes x.

        Args:
            x: (N, F).
            group: the group of every row, (N,), -1 where it is not known.
            mask: bool, which rows there are, (N,).
            return_moments: as in `Norm`: of everyone, then of the groups.
        """
        return super().forward(x, mask, return_moments=return_moments, labels=named(group=group))  # type: ignore[call-overload]

    def fit_call(self, call: Call) -> Call:
        """The group of every row as a row of the statistics."""
        mask = call.mask
        if mask is not None and not (isinstance(mask, Tensor) and mask.dtype == torch.bool):
            rule, instead = "the mask is bool, as members of a group are counted", "mask > 0, say"
            raise SpecError(say(rule, received=f"mask={shown(mask)}", instead=instead))
        group = self._shifted(call.names.get("group"))
        return super().fit_call(call if group is None else call._replace(names={**call.names, "group": group}))

    def used(self, call: Call, own: Moments) -> Used:
        """In training: the moments of everyone for rows without a group, and where a group has too few members."""
        if not self.training:
            return Used(own, own)
        everyone = own.coarsen("group f -> f")
        seen = each(lambda of_all, of_groups: torch.cat([of_all[None], of_groups[1:]]), everyone, own)
        moved = seen if self.track_running_stats else None
        track = None if moved is None else lambda: self.running_statistics.track(self, moved)
        return Used(_filled(seen, seen.count >= self.min_members), seen, track)

    def extra_repr(self) -> str:
        """The arguments that it was built with."""
        said = [f"{self.num_features}, num_groups={self.num_groups}, eps={self.eps}, momentum={self.momentum}"]
        said += [f"affine={self.weight is not None}, min_members={self.min_members}"]
        said += ["bias=False"] if self.weight is not None and self.bias is None else []
        said += [f"activation={self._options.activation!r}"] if self._options.activation else []
        return ", ".join(said)

    def _shifted(self, group: Any) -> Any:
        """The row of the statistics that every row of x has: 0 for -1. What is no label, the pattern refuses."""
        ids = group.ids if isinstance(group, Partition) else group
        if not isinstance(ids, Tensor) or ids.dtype not in _IDS:
            return group
        try:
            return Partition(ids.long() + 1, 1 + self.num_groups)
        except ShapeError:
            least, most = int(ids.min()), int(ids.max())
            raise ShapeError(
                say(
                    f"groups have ids from 0 to num_groups - 1 = {self.num_groups - 1}; -1 is not known",
                    received=f"ids from {least} to {most}",
                    instead="ids.clamp(min=-1)" if least < -1 else f"num_groups={most + 1}, or -1 for the others",
                )
            ) from None


_IDS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


# --- what is common --------------------------------------------------------------------------------------------------


def _groups(num_groups: int, num_channels: int, affine: bool) -> dict[str, Any]:
    """The options of a `Norm` whose channels are "(g c)"."""
    groups, channels = whole(num_groups, "num_groups", 1), whole(num_channels, "num_channels", 1)
    return {"affine": "(g c)" if affine else None, "g": groups, "sizes": {"(g c)": channels}}


def _expanded(x: Tensor, region: Tensor) -> Tensor:
    """Along the axes where it has size 1. What does not fit, the pattern refuses."""
    pixels = (x.shape[0], *x.shape[2:])
    return region.expand(pixels) if broadcasts(region, pixels) else region


def _partition(name: str, places: str, value: object, size: int | None = None) -> Partition:
    """The label of every place of an axis, in the ways of saying it; a number, too, where the size is known."""
    partition = labelled(value, size=size)
    if partition is None:
        numbers = "" if size is None else f"a number from 1 to {size}, "
        raise SpecError(
            say(
                f"{name} is {numbers}a list of sizes, a tensor with an id for each of the {places}, or a Partition",
                received=f"{name}={shown(value)}",
                instead=f"{name}=[10, 20, 50], say" if size is None else f"{name}={min(size, 8)}, say",
            )
        )
    found = partition.ids.numel()
    if partition.ids.dim() != 1 or not found or size not in (None, found) or not bool(partition.counts.all()):
        empty = (partition.counts == 0).nonzero().flatten().tolist()
        raise ShapeError(
            say(
                f"{name} say for each of the {places}{'' if size is None else f', {size},'} where it belongs, "
                "and none is empty",
                received=f"{name}={partition!r}, of shape {tuple(partition.shape)}"
                + (f"; empty: {shown(empty)}" if empty else ""),
                instead="sizes of 1 or more" + ("" if size is None else f" that add up to {size}"),
            )
        )
    return partition

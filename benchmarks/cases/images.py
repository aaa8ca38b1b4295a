"""Images and volumes: what torch has fused, and unequal groups, regions and weights, which it has not."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from flexnorm import Partition, normalize
from flexnorm.mixtures import SwitchableNorm

from .. import gate, handmade
from ..case import EPS, Case, Contender, Data, randn, shrunk


def _data(shape: Sequence[int], *, last: bool = False, groups: int | None = None) -> Callable[..., Data]:
    def make(scale: float, generator: torch.Generator) -> Data:
        x = randn(shrunk(shape, scale, range(2, len(shape))), generator)
        channels = shape[1]
        return Data(
            x=x.contiguous(memory_format=torch.channels_last) if last else x,
            weight=channels,
            bias=channels,
            over=(channels, *[1] * (len(shape) - 2)),
            valid=None,
            groups=groups,
        )

    return make


# --- group norm ------------------------------------------------------------------------------------------------------


def _grouped(d: Data, norm: Callable[..., Tensor]) -> Tensor:
    """Channels of a group beside their pixels."""
    n, c, h, w = d.x.shape
    g = d.groups
    v = d.x.view(n, g, c // g, h * w)
    return norm(v, (2, 3), d.weight.view(g, -1, 1), d.bias.view(g, -1, 1)).view_as(d.x)


def _grouped_last(d: Data, norm: Callable[..., Tensor]) -> Tensor:
    """The same without moving anything, where channels lie inside."""
    n, c, h, w = d.x.shape
    g = d.groups
    v = d.x.permute(0, 2, 3, 1).view(n, h * w, g, c // g)
    y = norm(v, (1, 3), d.weight.view(g, -1), d.bias.view(g, -1))
    return y.view(n, h, w, c).permute(0, 3, 1, 2)


def _detour(d: Data) -> Tensor:
    y = F.group_norm(d.x.contiguous(), d.groups, d.weight, d.bias, EPS)
    return y.contiguous(memory_format=torch.channels_last)


def _group_norm(d: Data) -> Tensor:
    return F.group_norm(d.x, d.groups, d.weight, d.bias, EPS)


def _group_reference(d: Data) -> tuple[Tensor, Tensor]:
    n, c, h, w = d.x.shape
    z, ratio = gate.pooled(d.x.reshape(n, d.groups, c // d.groups, h, w), (2, 3, 4))
    return z.reshape(d.x.shape), ratio.expand_as(z).reshape(d.x.shape)


def _group_case(
    title: str, shape: Sequence[int], *, last: bool = False, silu: bool = False, quick: bool = False
) -> Case:
    activation = "silu" if silu else None
    after = (lambda y: F.silu(y, inplace=True)) if silu else (lambda y: y)  # group norm keeps its input, not its result
    native = "group_norm, silu_" if silu else "group_norm"
    inner = _grouped_last if last else _grouped
    peers = [
        Contender(f"torch {native}", lambda d: after(_group_norm(d)), formula=True),
        Contender("var_mean", lambda d: after(inner(d, handmade.pooled))),
        Contender("var_mean, folded", lambda d: after(inner(d, handmade.folded))),
    ]
    if last:
        peers.insert(1, Contender("torch group_norm on a contiguous copy", lambda d: after(_detour(d))))
    size = "x".join(map(str, shape))
    return Case(
        f"{title} {size}{' channels_last' if last else ''}",
        "native",
        _data(shape, last=last, groups=32),
        lambda d: normalize(
            d.x,
            "n (g c) ... -> n g",
            g=d.groups,
            weight=d.weight,
            bias=d.bias,
            affine="(g c)",
            activation=activation,
        ),
        peers,
        _group_reference,
        activation=F.silu if silu else None,
        sets_survive=shape[0] > 1,
        quick=quick,
        fused=None if silu or last else "group_norm",
    )


# --- statistics of a batch, of an instance ---------------------------------------------------------------------------


def _batch_case() -> Case:
    return Case(
        "batch norm 64x64x56x56",
        "native",
        _data((64, 64, 56, 56)),
        lambda d: normalize(d.x, "n c ... -> c", weight=d.weight, bias=d.bias, affine="c"),
        [
            Contender(
                "torch batch_norm", lambda d: F.batch_norm(d.x, None, None, d.weight, d.bias, training=True, eps=EPS)
            ),
            Contender(
                "var_mean",
                lambda d: handmade.pooled(d.x, (0, 2, 3), *handmade.affine(d)),
                formula=True,
            ),
        ],
        lambda d: gate.pooled(d.x, (0, 2, 3)),
        sets_survive=False,
        quick=True,
    )


def _instance_case() -> Case:
    return Case(
        "instance norm 16x256x56x56",
        "native",
        _data((16, 256, 56, 56)),
        lambda d: normalize(d.x, "n c ... -> n c", weight=d.weight, bias=d.bias, affine="c"),
        [
            Contender(
                "torch instance_norm", lambda d: F.instance_norm(d.x, None, None, d.weight, d.bias, True, eps=EPS)
            ),
            Contender("torch group_norm", lambda d: F.group_norm(d.x, d.x.shape[1], d.weight, d.bias, EPS)),
            Contender("var_mean", lambda d: handmade.pooled(d.x, (2, 3), *handmade.affine(d)), formula=True),
        ],
        lambda d: gate.pooled(d.x, (2, 3)),
    )


# --- unequal groups of channels --------------------------------------------------------------------------------------

SENSORS = [48, 24, 16, 8]


def _sensors(scale: float, generator: torch.Generator) -> Data:
    made = _data((32, sum(SENSORS), 56, 56))(scale, generator)
    made.sensor, made.share = Partition.from_sizes(SENSORS), handmade.shares(SENSORS)
    return made


def _sensor_loop(d: Data) -> Tensor:
    pieces = zip(d.x.split(SENSORS, 1), d.weight.split(SENSORS), d.bias.split(SENSORS), strict=True)
    return torch.cat([F.group_norm(x, 1, weight, bias, EPS) for x, weight, bias in pieces], 1)


def _sensor_case() -> Case:
    return Case(
        "unequal channel groups 32x96x56x56",
        "expression",
        _sensors,
        lambda d: normalize(d.x, "n c h w -> n sensor[c]", sensor=d.sensor, weight=d.weight, bias=d.bias, affine="c"),
        [
            Contender("loop of group_norm", _sensor_loop),
            Contender(
                "moments of channels, merged",
                lambda d: handmade.parts(d.x, (2, 3), d.share, *handmade.affine(d)),
                formula=True,
            ),
            Contender(
                "moments of channels, merged and folded",
                lambda d: handmade.parts(d.x, (2, 3), d.share, *handmade.affine(d), fold=True),
            ),
        ],
        lambda d: gate.in_parts(d.x, 1, SENSORS, (1, 2, 3)),
        quick=True,
    )


# --- regions ---------------------------------------------------------------------------------------------------------

REGIONS = 19


def smooth_regions(n: int, size: int, generator: torch.Generator) -> Tensor:
    """Segmentation maps: a few large connected regions, as the greatest of smooth random fields."""
    coarse = torch.randn(n, REGIONS, 5, 5, generator=generator)
    return F.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=True).argmax(1)


def random_regions(n: int, size: int, generator: torch.Generator) -> Tensor:
    return torch.randint(REGIONS, (n, size, size), generator=generator)


def _regions(smooth: bool) -> Callable[[float, torch.Generator], Data]:
    def make(scale: float, generator: torch.Generator) -> Data:
        made = _data((8, 64, 128, 128))(scale, generator)
        n, _, h, _ = made.x.shape
        labels = smooth_regions if smooth else random_regions
        ids = labels(n, h, generator)
        made.region = Partition(ids, REGIONS)
        made.flat = ids + REGIONS * torch.arange(n).view(n, 1, 1)  # a number for every region of every image
        made.sizes_of_sets = torch.bincount(made.flat.flatten(), minlength=n * REGIONS).clamp(min=1).float()
        made.member = F.one_hot(ids.view(n, -1), REGIONS).float().transpose(1, 2).contiguous()
        return made

    return make


def _regions_by_pixel(d: Data, *, fold: bool = False) -> Tensor:
    """Moments of every pixel over channels, then of every region over its pixels: x is read twice."""
    flat, pixels = d.flat.view(-1), d.sizes_of_sets
    var, mean = torch.var_mean(d.x, 1, correction=0)
    whole = torch.zeros_like(pixels).index_add(0, flat, mean.flatten()) / pixels
    around = var + (mean - whole[d.flat]).square()
    scale = torch.rsqrt(torch.zeros_like(pixels).index_add(0, flat, around.flatten()) / pixels + EPS)
    weight, bias = handmade.affine(d)
    center, scale = whole[d.flat].unsqueeze(1), scale[d.flat].unsqueeze(1)
    if fold:
        return torch.addcmul(bias, torch.addcmul(-center * scale, d.x, scale), weight)
    return torch.addcmul(bias, (d.x - center) * scale, weight)


def _regions_loop(d: Data, dims: tuple[int, ...]) -> Tensor:
    weight, bias = handmade.affine(d)
    y = torch.zeros_like(d.x)
    for k in range(REGIONS):
        mask = (d.region.ids == k).unsqueeze(1)
        count = mask.sum((2, 3), keepdim=True).clamp(min=1) * (d.x.shape[1] if 1 in dims else 1)
        y = y + handmade.masked(d.x, mask, dims, count, weight, bias)
    return y


def _regions_matrix(d: Data) -> Tensor:
    """Sums of regions and channels as a batched product with one-hot labels."""
    n, c, h, w = d.x.shape
    v = d.x.view(n, c, h * w)
    pixels = d.sizes_of_sets.view(n, 1, REGIONS)
    mean = v @ d.member.transpose(1, 2) / pixels  # (n, c, regions)
    centered = v - mean @ d.member
    scale = torch.rsqrt(centered.square() @ d.member.transpose(1, 2) / pixels + EPS)
    y = centered * (scale @ d.member)
    return torch.addcmul(d.bias.view(c, 1), y, d.weight.view(c, 1)).view_as(d.x)


def _regions_scatter(d: Data) -> Tensor:
    n, c, h, w = d.x.shape
    v, ids = d.x.view(n, c, h * w), d.region.ids.view(n, 1, h * w).expand(n, c, h * w)
    pixels, zeros = d.sizes_of_sets.view(n, 1, REGIONS), d.x.new_zeros(n, c, REGIONS)
    mean = zeros.scatter_add(2, ids, v) / pixels
    centered = v - mean.gather(2, ids)
    scale = torch.rsqrt(zeros.scatter_add(2, ids, centered.square()) / pixels + EPS)
    y = centered * scale.gather(2, ids)
    return torch.addcmul(d.bias.view(c, 1), y, d.weight.view(c, 1)).view_as(d.x)


def _region_reference(d: Data, channelwise: bool) -> tuple[Tensor, Tensor]:
    n, c, h, w = d.x.shape
    rows = d.x.permute(0, 2, 3, 1).reshape(n * h * w, *((c, 1) if channelwise else (1, c)))
    z, ratio = gate.labelled(rows, d.flat.view(-1), n * REGIONS)

    def back(t: Tensor) -> Tensor:
        return t.expand_as(z).reshape(n, h, w, c).permute(0, 3, 1, 2)

    return back(z), back(ratio)


def _region_case(smooth: bool, channelwise: bool = False, quick: bool = False) -> Case:
    pattern = "n c h w -> n c region[n h w]" if channelwise else "n c h w -> n region[n h w]"
    if channelwise:
        peers = [
            Contender("product with one-hot labels", _regions_matrix, formula=True),
            Contender("scatter_add", _regions_scatter),
            Contender("loop of masks", lambda d: _regions_loop(d, (2, 3))),
        ]
    else:
        peers = [
            Contender("moments of pixels, merged", _regions_by_pixel, formula=True),
            Contender("moments of pixels, merged and folded", lambda d: _regions_by_pixel(d, fold=True)),
            Contender("loop of masks", lambda d: _regions_loop(d, (1, 2, 3))),
        ]
    return Case(
        f"{'smooth' if smooth else 'random'} regions{' by channel' if channelwise else ''} 8x64x128x128",
        "expression",
        _regions(smooth),
        lambda d: normalize(d.x, pattern, region=d.region, weight=d.weight, bias=d.bias, affine="c"),
        peers,
        lambda d: _region_reference(d, channelwise),
        quick=quick,
    )


# --- a volume whose slices have weights ------------------------------------------------------------------------------


def _volume(scale: float, generator: torch.Generator) -> Data:
    made = _data((1, 32, 96, 96, 96))(scale, generator)
    made.thickness = 0.5 + torch.rand(made.x.shape[2], generator=generator)
    made.share = (made.thickness / made.thickness.sum()).unsqueeze(1)
    return made


def _volume_case() -> Case:
    def direct(d: Data) -> Tensor:
        share = d.share.view(-1, 1, 1) / (d.x.shape[3] * d.x.shape[4])
        centered = d.x - (d.x * share).sum((2, 3, 4), keepdim=True)
        var = (centered.square() * share).sum((2, 3, 4), keepdim=True)
        weight, bias = handmade.affine(d)
        return torch.addcmul(bias, centered, torch.rsqrt(var + EPS) * weight)

    def merged(d: Data, fold: bool = False) -> Tensor:
        weight, bias = handmade.affine(d)
        return handmade.parts(d.x, (3, 4), d.share, weight, bias, fold=fold)

    return Case(
        "weighted slices of a volume 1x32x96x96x96",
        "expression",
        _volume,
        lambda d: normalize(d.x, "n c d h w, d -> n c", d.thickness, weight=d.weight, bias=d.bias, affine="c"),
        [
            Contender("moments of slices, merged", merged, formula=True),
            Contender("moments of slices, merged and folded", lambda d: merged(d, fold=True)),
            Contender("weighted sums", direct),
        ],
        lambda d: gate.pooled(d.x, (2, 3, 4), d.thickness.view(-1, 1, 1)),
        sets_survive=False,
    )


# --- a mixture -------------------------------------------------------------------------------------------------------


def _switch(scale: float, generator: torch.Generator) -> Data:
    made = _data((32, 64, 56, 56))(scale, generator)
    made.norm = SwitchableNorm(made.x.shape[1], EPS, affine=False, track_running_stats=False)
    with torch.no_grad():
        for p in made.norm.parameters():
            p.normal_(generator=generator)
    made.weight = made.bias = None
    return made


def _switched(norm: SwitchableNorm, x: Tensor, means: Sequence[Tensor], variances: Sequence[Tensor]) -> Tensor:
    w, v = norm.gate.mean_weight.softmax(0).unbind(), norm.gate.var_weight.softmax(0).unbind()
    mean = sum(a * b for a, b in zip(w, means, strict=True))
    var = sum(a * b for a, b in zip(v, variances, strict=True))
    return (x - mean) * torch.rsqrt(var + EPS)


def _switch_merged(d: Data) -> Tensor:
    """Moments of channels, merged: stable, and x is read twice."""
    var, mean = torch.var_mean(d.x, (2, 3), correction=0, keepdim=True)
    means = [mean, mean.mean(1, keepdim=True), mean.mean(0, keepdim=True)]
    around = [var + (mean - whole).square() for whole in means]
    return _switched(d.norm, d.x, means, [var, around[1].mean(1, keepdim=True), around[2].mean(0, keepdim=True)])


def _switch_squares(d: Data) -> Tensor:
    """As the authors of Switchable Norm write it, but for biased variances."""
    var, mean = torch.var_mean(d.x, (2, 3), correction=0, keepdim=True)
    square = var + mean.square()
    means = [mean, mean.mean(1, keepdim=True), mean.mean(0, keepdim=True)]
    others = [square.mean(axis, keepdim=True) - means[k].square() for k, axis in ((1, 1), (2, 0))]
    return _switched(d.norm, d.x, means, [var, *others])


def _switch_reference(d: Data) -> tuple[Tensor, Tensor]:
    over = [(2, 3), (1, 2, 3), (0, 2, 3)]
    means = [d.x.mean(dims, keepdim=True) for dims in over]
    variances = [(d.x - mean).square().mean(dims, keepdim=True) for mean, dims in zip(means, over, strict=True)]
    gate_of, kind = d.norm.gate, d.x.dtype
    w, v = (p.to(kind).softmax(0).view(3, 1, 1, 1, 1) for p in (gate_of.mean_weight, gate_of.var_weight))
    mean, var = (
        (share * torch.stack([t.expand(d.x.shape[0], d.x.shape[1], 1, 1) for t in of])).sum(0)
        for share, of in ((w, means), (v, variances))
    )
    sigma = (var + EPS).sqrt()
    return (d.x - mean) / sigma, (mean.abs() / sigma).detach()


def _switch_case() -> Case:
    return Case(
        "switchable norm 32x64x56x56",
        "expression",
        _switch,
        lambda d: d.norm(d.x),
        [
            Contender("moments of channels, merged", _switch_merged, module="norm", formula=True),
            Contender("E[x^2] - E[x]^2 of channels", _switch_squares, module="norm"),
        ],
        _switch_reference,
        sets_survive=False,
        quick=True,
        module="norm",
    )


CASES = [
    _group_case("group norm", (16, 256, 56, 56), quick=True),
    _group_case("group norm", (16, 256, 56, 56), last=True, quick=True),
    _group_case("group norm", (64, 2048, 7, 7)),
    _group_case("group norm", (64, 2048, 7, 7), last=True),
    _group_case("group norm, silu", (2, 320, 64, 64), silu=True, quick=True),
    _group_case("group norm, silu", (2, 1280, 16, 16), silu=True),
    _group_case("group norm, silu", (1, 128, 512, 512), silu=True),
    _batch_case(),
    _instance_case(),
    _sensor_case(),
    _region_case(smooth=True, quick=True),
    _region_case(smooth=False),
    _region_case(smooth=True, channelwise=True),
    _volume_case(),
    _switch_case(),
]

"""Images and volumes: what torch has fused, and unequal groups, regions and weights, which it has not."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexnorm import Norm, Partition, normalize
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


def _group_norm(d: Data) -> Tensor:
    return F.group_norm(d.x, d.groups, d.weight, d.bias, EPS)


def _group_reference(d: Data) -> tuple[Tensor, Tensor]:
    n, c, h, w = d.x.shape
    z, ratio = gate.pooled(d.x.reshape(n, d.groups, c // d.groups, h, w), (2, 3, 4))
    return z.reshape(d.x.shape), ratio.expand_as(z).reshape(d.x.shape)


def _group_case(
    shape: Sequence[int], *, last: bool = False, silu: bool = False, table: str = "torch", short: bool = False
) -> Case:
    activation = "silu" if silu else None
    after = (lambda y: F.silu(y, inplace=True)) if silu else (lambda y: y)  # group norm keeps its input, not its result
    native = "group_norm, silu_" if silu else "group_norm"
    size = "x".join(map(str, shape))
    return Case(
        f"group norm{', silu' if silu else ''} {size}{' channels_last' if last else ''}",
        "native",
        _data(shape, last=last, groups=min(32, shape[1] // 4)),
        lambda d: normalize(
            d.x,
            "n (g c) ... -> n g",
            g=d.groups,
            weight=d.weight,
            bias=d.bias,
            affine="(g c)",
            activation=activation,
        ),
        [Contender(f"torch {native}", lambda d: after(_group_norm(d)), formula=True)],
        _group_reference,
        activation=F.silu if silu else None,
        sets_survive=shape[0] > 1,
        table=table,
        short=short,
        fused=None if silu or last else "group_norm",
    )


# --- statistics of a batch, of an instance ---------------------------------------------------------------------------


def _running(scale: float, generator: torch.Generator) -> Data:
    made = _data((3000, 64))(scale, generator)
    made.mine = Norm("n c -> c", affine="c", c=64, eps=EPS, track_running_stats=True)
    made.theirs = nn.BatchNorm1d(64, EPS)
    for parameter, mean in ((made.theirs.weight, 1.0), (made.theirs.bias, 0.0)):
        nn.init.normal_(parameter, mean, 0.2, generator=generator)
    made.mine.load_state_dict(made.theirs.state_dict())
    made.weight, made.bias = made.mine.weight, made.mine.bias
    return made


def _running_case() -> Case:
    return Case(
        "batch norm, running statistics 3000x64",
        "native",
        _running,
        lambda d: d.mine(d.x),
        [Contender("nn.BatchNorm1d", lambda d: d.theirs(d.x), module="theirs")],
        lambda d: gate.pooled(d.x, (0,)),
        sets_survive=False,
        table="torch",
        short=True,
        module="mine",
    )


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
        short=True,
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
        ],
        lambda d: gate.in_parts(d.x, 1, SENSORS, (1, 2, 3)),
        short=True,
    )


# --- regions ---------------------------------------------------------------------------------------------------------

REGIONS = 19


def smooth_regions(n: int, size: int, generator: torch.Generator) -> Tensor:
    """Segmentation maps: a few large connected regions, as the greatest of smooth random fields."""
    coarse = torch.randn(n, REGIONS, 5, 5, generator=generator)
    return F.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=True).argmax(1)


def _regions(shape: Sequence[int]) -> Callable[[float, torch.Generator], Data]:
    def make(scale: float, generator: torch.Generator) -> Data:
        made = _data(shape)(scale, generator)
        n, _, h, _ = made.x.shape
        ids = smooth_regions(n, h, generator)
        made.region = Partition(ids, REGIONS)
        made.flat = ids + REGIONS * torch.arange(n).view(n, 1, 1)  # a number for every region of every image
        made.sizes_of_sets = torch.bincount(made.flat.flatten(), minlength=n * REGIONS).clamp(min=1).float()
        made.member = F.one_hot(ids.view(n, -1), REGIONS).float().transpose(1, 2).contiguous()
        return made

    return make


def _regions_by_pixel(d: Data) -> Tensor:
    """Moments of every pixel over channels, then of every region over its pixels: x is read twice."""
    flat, pixels = d.flat.view(-1), d.sizes_of_sets
    var, mean = torch.var_mean(d.x, 1, correction=0)
    whole = torch.zeros_like(pixels).index_add(0, flat, mean.flatten()) / pixels
    around = var + (mean - whole[d.flat]).square()
    scale = torch.rsqrt(torch.zeros_like(pixels).index_add(0, flat, around.flatten()) / pixels + EPS)
    weight, bias = handmade.affine(d)
    center, scale = whole[d.flat].unsqueeze(1), scale[d.flat].unsqueeze(1)
    return torch.addcmul(bias, (d.x - center) * scale, weight)


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


def _region_case(shape: Sequence[int], *, channelwise: bool = False, table: str = "peers", short: bool = False) -> Case:
    pattern = "n c h w -> n c region[n h w]" if channelwise else "n c h w -> n region[n h w]"
    if channelwise:
        peers = [
            Contender("product with one-hot labels", _regions_matrix, formula=True),
            Contender("scatter_add", _regions_scatter),
        ]
    else:
        peers = [Contender("moments of pixels, merged", _regions_by_pixel, formula=True)]
    return Case(
        f"regions{' by channel' if channelwise else ''} {'x'.join(map(str, shape))}",
        "expression",
        _regions(shape),
        lambda d: normalize(d.x, pattern, region=d.region, weight=d.weight, bias=d.bias, affine="c"),
        peers,
        lambda d: _region_reference(d, channelwise),
        table=table,
        short=short,
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

    return Case(
        "weighted slices of a volume 1x32x96x96x96",
        "expression",
        _volume,
        lambda d: normalize(d.x, "n c d h w, d -> n c", d.thickness, weight=d.weight, bias=d.bias, affine="c"),
        [
            Contender(
                "moments of slices, merged",
                lambda d: handmade.parts(d.x, (3, 4), d.share, *handmade.affine(d)),
                formula=True,
            ),
            Contender("weighted sums", direct),
        ],
        lambda d: gate.pooled(d.x, (2, 3, 4), d.thickness.view(-1, 1, 1)),
        sets_survive=False,
    )


# --- a mixture -------------------------------------------------------------------------------------------------------


def _switch(shape: Sequence[int]) -> Callable[[float, torch.Generator], Data]:
    def make(scale: float, generator: torch.Generator) -> Data:
        made = _data(shape)(scale, generator)
        made.norm = SwitchableNorm(made.x.shape[1], EPS, affine=False, track_running_stats=False)
        with torch.no_grad():
            for p in made.norm.parameters():
                p.normal_(generator=generator)
        made.weight = made.bias = None
        return made

    return make


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


def _switch_case(shape: Sequence[int], *, short: bool = False) -> Case:
    return Case(
        f"switchable norm {'x'.join(map(str, shape))}",
        "expression",
        _switch(shape),
        lambda d: d.norm(d.x),
        [Contender("moments of channels, merged", _switch_merged, module="norm", formula=True)],
        _switch_reference,
        sets_survive=False,
        table="torch",
        short=short,
        module="norm",
    )


CASES = [
    _group_case((2, 32, 8, 16), short=True),
    _group_case((6, 96, 20, 20)),
    _group_case((8, 64, 28, 28), short=True),
    _group_case((4, 512, 9, 9)),
    _group_case((12, 128, 40, 40)),
    _group_case((12, 192, 52, 52), short=True),
    _group_case((24, 224, 56, 56), short=True),
    _group_case((8, 64, 28, 28), last=True, short=True),
    _group_case((4, 512, 9, 9), last=True),
    _group_case((12, 128, 40, 40), last=True),
    _group_case((12, 192, 52, 52), last=True),
    _group_case((24, 224, 56, 56), last=True, short=True),
    _group_case((2, 1280, 16, 16), silu=True),
    _group_case((2, 320, 64, 64), silu=True, short=True),
    _group_case((1, 128, 256, 256), silu=True),
    _running_case(),
    _switch_case((16, 64, 14, 14)),
    _switch_case((32, 64, 56, 56), short=True),
    _region_case((4, 32, 96, 96), table="torch"),
    _group_case((16, 256, 56, 56), table="peers"),
    _group_case((16, 256, 56, 56), last=True, table="peers"),
    _group_case((64, 2048, 7, 7), table="peers"),
    _group_case((64, 2048, 7, 7), last=True, table="peers"),
    _batch_case(),
    _instance_case(),
    _sensor_case(),
    _region_case((8, 64, 128, 128), short=True),
    _region_case((8, 64, 128, 128), channelwise=True),
    _volume_case(),
]

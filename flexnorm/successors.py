"""The layers that take the place of a norm: flexnorm's, torch's, or an affine one."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .calls.functional import normalize
from .description import TORCHS, Description, KeptError, UnitOffsetNorm, axes_of
from .errors import ShapeError, say
from .layers.norm import Norm
from .layers.synchronized import SyncBatchNorm
from .partition import whole
from .places import placed, take_place
from .statistics import Moments

__all__ = ["ChannelAffine", "NormAct"]


class ChannelAffine(nn.Module):
    r"""A weight and a bias for every channel, and no statistics: what batch norm in evaluation is.

    y[n, c] = x[n, c] * weight[c] + bias[c]

    Args:
        num_channels: number of channels, C.
        device, dtype: of the parameters.

    Shapes: x is (N, C, *spatial); the result is alike, and of x's dtype.

    >>> ChannelAffine(8)(torch.randn(2, 8, 5, 5)).shape
    torch.Size([2, 8, 5, 5])
    """

    def __init__(
        self, num_channels: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.num_channels = whole(num_channels, "num_channels", 1)
        self.weight = nn.Parameter(torch.ones(num_channels, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(num_channels, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Scales and shifts x, (N, C, *spatial)."""
        if x.dim() < 2 or x.shape[1] != self.num_channels:
            rule = f"x has the axes (N, C, *spatial), with C = num_channels = {self.num_channels}"
            raise ShapeError(say(rule, received=f"x of shape {tuple(x.shape)}", instead="x.movedim(-1, 1), say"))
        weight, bias = (p.view(-1, *(1,) * (x.dim() - 2)) for p in (self.weight, self.bias))
        return torch.addcmul(bias, x, weight).to(x.dtype)

    def extra_repr(self) -> str:
        """The number of channels."""
        return f"{self.num_channels}"


class NormAct(nn.Sequential):
    """A norm, and what stood behind it inside of one layer: `norm`, then the others by their own names.

    >>> parts = {"norm": nn.GroupNorm(2, 8), "act": nn.Hardswish()}
    >>> NormAct(parts)(torch.randn(2, 8, 5, 5)).shape
    torch.Size([2, 8, 5, 5])
    """

    norm: nn.Module

    def __init__(self, parts: Mapping[str, nn.Module]) -> None:
        super().__init__(OrderedDict(parts))


def followed(source: Description, module: nn.Module, made: nn.Module) -> nn.Module:
    """The new norm, with what stands behind the old one inside of its layer."""
    if not source.tail:
        return made
    if "norm" in source.tail:
        raise KeptError("has a layer of its own that is called norm")
    new = NormAct({"norm": made, **{name: module.get_submodule(name) for name in source.tail}})
    new.training = module.training
    return new


def _learns(module: nn.Module) -> tuple[bool, bool]:
    """Whether a layer has a weight, and a bias."""
    return getattr(module, "weight", None) is not None, getattr(module, "bias", None) is not None


def of_flexnorm(source: Description, module: Any, target: str, count: Callable[[int, int | None], int]) -> nn.Module:
    """Our layer of the kind `target`, over the axes of a norm; `count` makes a number of groups of the channels and of
    the number that there is."""
    from .images import ChannelGroupNorm
    from .sequences import TokenGroupNorm

    weight, bias = _learns(module)
    options: dict[str, Any] = {"eps": source.eps, **placed(module)}
    rows = ("layer", "rms")
    if target not in rows and len(source.shape) > 1:
        raise KeptError(f"its weight is of shape {list(source.shape)}, and not a value for every channel")
    if source.offset and target not in rows:
        raise KeptError("its weight is 1 + weight, and that of others is not")
    channels = source.shape[0]
    if target == "group":
        groups = count(channels, source.groups)
        if isinstance(module, (ChannelGroupNorm, TokenGroupNorm)) and groups == source.groups:
            raise KeptError("is one already")
        options.update(affine=weight, bias=bias or not weight)
        if source.layout != "last":
            return ChannelGroupNorm(groups, channels, activation=source.activation, **options)
        if source.activation is not None:
            raise KeptError("it has an activation")
        return TokenGroupNorm(groups, channels, **options)
    if isinstance(module, Norm) and source.kind == target:
        raise KeptError("is one already")
    ran = source.kind in ("batch", "sync")
    tracks: dict[str, Any] = {"track_running_stats": module.track_running_stats if ran else True}
    if (ran or getattr(module, "running_mean", None) is not None) and hasattr(module, "momentum"):
        tracks["momentum"] = module.momentum
    if target == "sync":
        if source.layout == "last" or source.activation is not None:
            raise KeptError("a synchronized norm has its channels second, and no activation")
        made = SyncBatchNorm(
            channels, affine=weight, process_group=getattr(module, "process_group", None), **tracks, **options
        )
        if weight and not bias:
            made.register_parameter("bias", None)
        return made
    axes = axes_of(source.shape)
    options.update(zip(axes, source.shape, strict=True))
    options.update(tracks if target == "batch" else {})
    options.update(affine=" ".join(axes) if weight else None, bias=bias, activation=source.activation)
    kind = UnitOffsetNorm if source.offset else Norm
    return kind(source.pattern(target), center=target != "rms", **options)


def of_torch(source: Description, module: nn.Module) -> nn.Module:
    """Torch's layer that computes the same."""
    if parametrize.type_before_parametrizations(module) in TORCHS:
        raise KeptError("is torch's already")
    weight, bias = _learns(module)
    options: dict[str, Any] = {"eps": source.eps, **placed(module)}
    lost = "an activation" if source.activation else "1 + weight as its weight" if source.offset else None
    if lost:
        raise KeptError(f"torch has none with {lost}")
    made = _same(source, module, weight, bias, options)
    if made is None:
        raise KeptError("torch has none that computes the same")
    if weight and not bias:
        made.register_parameter("bias", None)  # an option of few of them
    return made


def _same(source: Description, module: Any, weight: bool, bias: bool, options: dict[str, Any]) -> nn.Module | None:
    shape, channels, rank = source.shape, source.shape[0], source.rank
    dims = {2: 1, 3: 1, 4: 2, 5: 3}.get(rank or 0)
    if source.layout == "last":
        options["elementwise_affine"] = weight
        if source.kind == "rms":
            return None if bias else nn.RMSNorm(list(shape), **options)
        alone = source.kind == "layer" or (source.kind == "group" and source.groups == 1)
        return nn.LayerNorm(list(shape), bias=bias or not weight, **options) if alone else None
    if source.layout == "pixel" or source.kind in ("rms", "frozen"):
        return None
    options["affine"] = weight
    if source.kind in ("batch", "sync"):
        options.update(momentum=module.momentum, track_running_stats=module.track_running_stats)
        if source.kind == "sync":
            return nn.SyncBatchNorm(channels, process_group=module.process_group, **options)
        if dims is None:
            raise KeptError("BatchNorm1d, 2d, 3d take so many axes, and it any number; name them: n c h w -> c")
        return getattr(nn, f"BatchNorm{dims}d")(channels, **options)  # type: ignore[no-any-return]
    if source.kind == "instance" and dims is not None and rank != 2:
        return getattr(nn, f"InstanceNorm{dims}d")(channels, **options)  # type: ignore[no-any-return]
    groups = {"instance": channels, "layer": 1}.get(source.kind, source.groups)
    assert groups is not None
    return nn.GroupNorm(groups, channels, **options)


@torch.no_grad()
def folded(source: Description, module: Any, model: nn.Module) -> ChannelAffine:
    """Weight and bias of a layer that evaluates by running statistics: what it makes of the mean + 1, and of 0."""
    mean, var = getattr(module, "running_mean", None), getattr(module, "running_var", None)
    if mean is None or var is None or source.layout != "second" or source.activation is not None:
        raise KeptError("only what evaluates by running statistics, channels second, is affine")
    if parametrize.is_parametrized(module):
        raise KeptError("its weight is parametrized")
    for p in module.parameters():
        if sum(q is p for m in model.modules() for q in m._parameters.values()) > 1:
            raise KeptError("its weight is that of another layer, too")
    weight, bias = _learns(module)
    wide = torch.float64 if mean.device.type != "mps" else torch.float32
    running = Moments(torch.ones_like(var, dtype=wide), mean.to(wide), var.to(wide))
    affine = {"weight": module.weight, "bias": module.bias, "affine": "c"} if weight or bias else {}
    points = torch.stack([mean.to(wide) + 1, mean.to(wide), torch.zeros_like(mean, dtype=wide)])
    above, at, zero = normalize(points, "n c -> c", moments=running, eps=source.eps, **affine)
    made = ChannelAffine(source.shape[0], mean.device, (module.weight if weight else mean).dtype)
    made.weight.copy_(above - at)
    made.bias.copy_(zero)
    for name, learned in (("weight", weight), ("bias", bias)):
        like = module._parameters.get(name)
        made.get_parameter(name).requires_grad_(like.requires_grad if learned and like is not None else False)
    made.train(module.training)
    take_place(module, made)
    return made

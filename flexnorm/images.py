"""Images, volumes and everything else of shape (N, C, *spatial): GroupNorm with masks, weights and unequal groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .axes import divisors
from .errors import ShapeError, SpecError, say, shown
from .layers.norm import Norm
from .partition import Partition, labelled, whole
from .statistics import Moments

__all__ = ["ChannelGroupNorm", "default_groups"]


def default_groups(num_channels: int) -> int:
    """The number of groups for so many channels: the largest divisor that is at most min(32, num_channels // 4), or 1.

    At least 4 channels share statistics, and GroupNorm's 32 groups are the most. Other libraries fix the channels of a
    group instead, or take gcd(32, num_channels).

    Raises:
        SpecError: num_channels is no whole number of 1 or more.

    >>> [default_groups(c) for c in (3, 16, 30, 64, 100, 256)]
    [1, 4, 6, 16, 25, 32]
    """
    most = min(32, whole(num_channels, "num_channels", 1) // 4)
    return next((groups for groups in range(most, 1, -1) if num_channels % groups == 0), 1)


class ChannelGroupNorm(Norm, nn.GroupNorm):
    r"""`nn.GroupNorm` for (N, C, *spatial), with masks and weights, groups of any channels, and a fused activation.

    For each image and group S:   y[S] = (x[S] - mean(x[S])) / sqrt(var(x[S]) + eps) * weight + bias

    The pattern is `"n (g c) ..., n ... -> n g"`, with `groups` it is `"n c ..., n ... -> n group[c]"`.

    Args:
        num_groups: number of groups.
        num_channels: number of channels, C.
        eps: added to the variance, in the unit of x squared.
        affine: learn weight and bias, of shape (C,).
        device, dtype: of the parameters.
        bias: learn a bias beside the weight.
        groups: what the groups are, if not C // num_groups channels each, side by side: a list of their sizes, a tensor
            (C,) with the group of every channel, or a `Partition`. The ids are part of the state, `group_ids`, and no
            buffer. `flexnorm.grouping.regroup` makes a layer with other groups and the same parameters.
        zero_init: begin with weight 0, as the last norm of a residual branch does: then the block begins as identity.
        activation: "relu", "silu" or "gelu", applied to the result.

    Shapes: x is (N, C, *spatial) with any number of spatial axes; so is the result, of x's dtype and memory format. The
    mask is (N, *spatial), with size 1 along axes where it does not change: `thickness.view(1, -1, 1, 1)` weighs the
    slices of volumes (N, C, D, H, W). A bool mask (True = valid) says which pixels there are: the others are 0 in the
    result and count nowhere. A floating one weighs the statistics.

    Raises:
        SpecError, ShapeError: an argument does not fit. Both are ValueErrors.
        ValueError: a group of one image holds one value and there is no other, where `nn.GroupNorm` raises it too.

    >>> norm = ChannelGroupNorm(8, 64)
    >>> isinstance(norm, nn.GroupNorm), list(norm.state_dict())
    (True, ['weight', 'bias'])
    >>> x = torch.randn(2, 64, 7, 7)
    >>> y = norm(x, mask=torch.rand(2, 7, 7) < 0.9)
    >>> suites = ChannelGroupNorm(3, 64, groups=[10, 20, 34])
    >>> suites(x).shape
    torch.Size([2, 64, 7, 7])

    Differs from `nn.GroupNorm`: exact at any offset in channels-last memory too, and the result has x's dtype under
    autocast. With `groups` the state has the key `group_ids`.

    Source: `torch.nn.GroupNorm`; Wu and He, "Group Normalization", 2018; Goyal et al., "Accurate, Large Minibatch SGD",
    2017, for the weight of 0.
    """

    zero_init = False  # while Norm is being built

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
        groups: Sequence[int] | Tensor | Partition | None = None,
        zero_init: bool = False,
        activation: str | None = None,
    ) -> None:
        num_groups, num_channels = whole(num_groups, "num_groups", 1), whole(num_channels, "num_channels", 1)
        if zero_init and not affine:
            received, instead = "zero_init=True, affine=False", "affine=True"
            raise SpecError(say("zero_init sets the weight, so there must be one", received=received, instead=instead))
        options: dict[str, Any] = {"eps": eps, "bias": bias, "activation": activation, "device": device, "dtype": dtype}
        if groups is None:
            if num_channels % num_groups:
                raise ShapeError(
                    say(
                        f"num_channels ({num_channels}) must be divisible by num_groups ({num_groups})",
                        received=f"num_groups={num_groups}, num_channels={num_channels}",
                        instead=f"one of {', '.join(map(str, divisors(num_channels)))}; "
                        "groups= for groups of unequal sizes",
                    )
                )
            axes, options["g"] = "(g c)", num_groups
            super().__init__(
                "n (g c) ..., n ... -> n g", affine=axes if affine else None, sizes={axes: num_channels}, **options
            )
        else:
            options["group"] = _partition(groups, num_groups, num_channels)
            super().__init__("n c ..., n ... -> n group[c]", affine="c" if affine else None, c=num_channels, **options)
        self.num_groups, self.num_channels, self.affine = num_groups, num_channels, affine
        self.zero_init = zero_init
        self.reset_parameters()

    @classmethod
    def for_channels(cls, num_channels: int, **options: Any) -> ChannelGroupNorm:
        """The norm of so many channels, with `default_groups`: what `norm_layer=` of a model's constructor asks for.

        >>> make = ChannelGroupNorm.for_channels  # resnet50(norm_layer=ChannelGroupNorm.for_channels)
        >>> make(64).num_groups
        16
        """
        return cls(default_groups(num_channels), num_channels, **options)

    def reset_parameters(self) -> None:
        """Weight 1 (0 with `zero_init`), bias 0, and the groups that the layer was built with."""
        super().reset_parameters()
        if self.zero_init:
            nn.init.zeros_(self.weight)

    def forward(self, input: Tensor, mask: Tensor | None = None, *, moments: Moments | None = None) -> Tensor:  # type: ignore[override]  # torch's name
        """Normalizes x.

        Args:
            input: x, (N, C, *spatial).
            mask: bool (which pixels there are) or floating (weights), (N, *spatial), or of size 1 along an axis.
            moments: statistics to use instead of x's own, (N, num_groups).
        """
        alone = self.num_groups == self.num_channels and moments is None and isinstance(input, Tensor)
        if alone and input.dim() and input.numel() == self.num_groups:
            size = list(input.shape)
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {size}")
        return Norm.forward(self, input, mask, moments=moments)

    def fit_mask(self, x: Tensor, mask: Tensor | None) -> Tensor | None:
        """The mask over all pixels. C is what the layer was built for."""
        if x.dim() > 1 and x.shape[1] != self.num_channels:
            turned = ", or x.movedim(-1, 1)" if x.shape[-1] == self.num_channels else ""
            raise ShapeError(
                say(
                    f"x has the axes (N, C, *spatial), with C = num_channels = {self.num_channels}",
                    received=f"x of shape {tuple(x.shape)}",
                    instead=f"num_channels={x.shape[1]}{turned}",
                )
            )
        # not in forward: a mask may be given from around
        return None if mask is None else over_pixels(x, mask)

    def extra_repr(self) -> str:
        """That of `nn.GroupNorm`, and what it does not have."""
        said = [nn.GroupNorm.extra_repr(self)]
        said += ["bias=False"] if self.affine and self.bias is None and "bias=" not in said[0] else []
        said += [f"groups={partition!r}" for partition in self._static.values()]
        said += ["zero_init=True"] if self.zero_init else []
        said += [f"activation={self._options.activation!r}"] if self._options.activation else []
        return ", ".join(said)


def _partition(groups: Sequence[int] | Tensor | Partition, num_groups: int, num_channels: int) -> Partition:
    """The group of every channel, in the three ways of saying it."""
    partition = labelled(groups, count=num_groups)
    if partition is None:
        raise SpecError(
            say(
                "groups is a list of sizes, a tensor with the group of every channel, or a Partition",
                received=f"groups={shown(groups)}",
                instead=f"groups=[{num_channels - num_groups + 1}{', 1' * (min(num_groups, 8) - 1)}], say",
            )
        )
    if partition.count != num_groups or tuple(partition.shape) != (num_channels,):
        received = f"groups={groups!r}" if isinstance(groups, (list, tuple)) else f"groups={partition!r}"
        raise ShapeError(
            say(
                f"groups say which of num_groups={num_groups} groups each of num_channels={num_channels} is in",
                received=f"{received}: {partition.count} groups, {partition.ids.numel()} channels",
                instead="sizes that add up to num_channels, or torch.tensor([0, 0, 1]): the group of every channel",
            )
        )
    return partition


def broadcasts(t: Tensor, sizes: Sequence[int]) -> bool:
    """Whether it has these axes, and size 1 where not these sizes."""
    if t.dim() != len(sizes):
        return False
    return all(own == 1 or own == size for own, size in zip(t.shape, sizes, strict=True))  # `in` is none for a symbol


def over_pixels(x: Tensor, mask: Tensor | None) -> Tensor | None:
    """The mask, expanded along the axes where it has size 1."""
    if not isinstance(mask, Tensor) or x.dim() < 2:  # what is no tensor, the pattern refuses
        return mask
    pixels = (x.shape[0], *x.shape[2:])
    if broadcasts(mask, pixels):
        return mask.expand(pixels)
    instead = f"a mask of shape {pixels}"
    if mask.dim() == x.dim() and mask.shape[1] == 1:
        instead = "mask.squeeze(1)"
    elif mask.dim() == 1 and mask.shape[0] in pixels:
        at = pixels.index(mask.shape[0])
        instead = f"mask.view{tuple(-1 if axis == at else 1 for axis in range(len(pixels)))}, for axis {at} of these"
    raise ShapeError(
        say(
            f"the mask has the axes (N, *spatial) of x, {pixels} here, and may have size 1 along any",
            received=f"mask of shape {tuple(mask.shape)}, x of shape {tuple(x.shape)}",
            instead=instead,
        )
    )

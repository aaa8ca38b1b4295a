"""Batch norm over the batches of all ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from ..calls.ranks import Sharding
from .norm import Norm
from .running import RunningStatistics

__all__ = ["SyncBatchNorm"]


class SyncBatchNorm(Norm, _BatchNorm):
    r"""Batch norm over the batches of all ranks, on every device and backend, CPU and gloo included.

    For each channel c:   y = (x - mean(x[c])) / sqrt(var(x[c]) + eps) * weight[c] + bias[c]

    Args:
        num_features: number of channels, C.
        eps: added to the variance, in the unit of x squared.
        momentum: weight of the new value in the running statistics; None: the average of all batches.
        affine: learn weight and bias, of shape (C,).
        track_running_stats: keep running means and (unbiased) variances, and use them in evaluation.
        process_group: of `torch.distributed`; None is the default one, at every call.
        device, dtype: of parameters and buffers.

    Shapes: x is (N, C, *spatial); N may differ from rank to rank, and be 0. The result is alike.

    As with `nn.SyncBatchNorm`, ranks are asked in training only, and without a process group it is batch norm.

    Raises:
        RuntimeError: another rank has failed, or a copy of the layer has no process group where the layer had one.
        ValueError: there is one value per channel, and no other rank.

    >>> norm = SyncBatchNorm(8)
    >>> norm(torch.randn(4, 8, 5, 5)).shape
    torch.Size([4, 8, 5, 5])

    Differs from `nn.SyncBatchNorm`, which is for GPUs alone: it is no subclass of it, as DistributedDataParallel takes
    one for a GPU's; and where a rank fails, all raise.

    Source: `torch.nn.SyncBatchNorm`; Ioffe and Szegedy, "Batch Normalization", 2015.
    """

    running_statistics = RunningStatistics(unseen=True)

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        Norm.__init__(
            self,
            "n c ... -> c",
            affine="c" if affine else None,
            c=num_features,
            eps=eps,
            track_running_stats=track_running_stats,
            momentum=momentum,
            device=device,
            dtype=dtype,
        )
        self.num_features, self.affine = num_features, affine
        self._sharding = Sharding(self._spec, "n ...", process_group, as_torch=True)

    extra_repr = _BatchNorm.extra_repr

    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]  # torch's name
        """Normalizes x, (N, C, *spatial)."""
        one = isinstance(input, Tensor) and input.dim() > 1 and input.numel() == input.shape[1]
        if one and self.training and not self.ranks().groups:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {input.shape}")
        return Norm.forward(self, input)

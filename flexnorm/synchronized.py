"""Batch norm over the batches of all ranks, as a layer and for a model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from .errors import SpecError, say
from .norm import Norm
from .places import hand_on, put, rebind
from .ranks import Sharding

__all__ = ["SyncBatchNorm", "convert_sync_batchnorm"]


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

    _evaluates_unseen = True

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
        if one and self.training and not self._ranks().groups:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {input.shape}")
        return Norm.forward(self, input)


def convert_sync_batchnorm(model: nn.Module, process_group: Any = None) -> nn.Module:
    """Makes every batch norm of a model a `SyncBatchNorm`, as `nn.SyncBatchNorm.convert_sync_batchnorm` does.

    Parameters and buffers are those of the model, no copies of them, so that an optimizer keeps its own.

    Args:
        model: changed in place, unless it is a batch norm itself.
        process_group: of `torch.distributed`; None is that of an `nn.SyncBatchNorm`, otherwise the default one.

    Returns:
        The model.

    Raises:
        SpecError: a batch norm is lazy and does not know its channels yet, or computes something else than torch's.
            Nothing is changed then.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    >>> type(convert_sync_batchnorm(model)[1]).__name__, model[1].num_features
    ('SyncBatchNorm', 8)
    """
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, _BatchNorm)]
    for name, module in found:
        if isinstance(module, Norm):
            continue
        rule = None
        if isinstance(module, LazyModuleMixin):
            rule, instead = "a lazy batch norm gets its channels at the first call", "one call of the model first"
        elif "forward" in module.__dict__:
            rule, instead = "a batch norm whose forward was replaced would lose that", "convert_sync_batchnorm before"
        elif type(module).forward not in (_BatchNorm.forward, nn.SyncBatchNorm.forward):
            rule = "a batch norm with a forward of its own would lose what that does"
            instead = "convert_sync_batchnorm of the parts without it; SyncBatchNorm in the class itself"
        if rule is not None:
            raise SpecError(say(rule, received=f"{name}: {type(module).__name__}", instead=instead))
    successors: dict[int, nn.Module] = {}
    for _, module in found:
        if isinstance(module, Norm):  # a drop-in of ours
            pooled = [str(atom) for atom in module._spec.x.atoms() if atom not in list(module._spec.sets.atoms())]
            module._sharding = Sharding(module._spec, pooled, process_group, as_torch=True)
        else:
            successors[id(module)] = _synchronized(module, process_group)
    model = put(model, successors)
    for new in successors.values():
        rebind(new)
    return model


def _synchronized(module: _BatchNorm, group: Any) -> SyncBatchNorm:
    options = (module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats)
    group = getattr(module, "process_group", None) if group is None else group
    made = SyncBatchNorm(*options, process_group=group, device="meta")
    hand_on(module, made)
    return made

"""Batch norm over the batches of all ranks: the layer, and the conversion of a model."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from .calls.ranks import Sharding
from .errors import SpecError, say
from .layers.norm import Norm
from .layers.synchronized import SyncBatchNorm
from .places import hand_on, put, rebind

__all__ = ["SyncBatchNorm", "convert_sync_batchnorm"]


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

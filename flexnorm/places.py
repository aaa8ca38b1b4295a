"""The places of a model, and what a layer hands on to the one that takes its place."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from .layers.norm import Norm

PARAMETERS = ("weight", "bias")
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def places(model: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """Every place of a model: who holds it, under which name, and what stands there."""
    held = ((module, name, child) for module in model.modules() for name, child in module._modules.items())
    return [(module, name, child) for module, name, child in held if child is not None]


def put(model: nn.Module, successors: Mapping[int, nn.Module]) -> nn.Module:
    """The model with successors, by the ids of what they follow, in all places; one in several places has one."""
    for module, name, child in places(model):
        if id(child) in successors:
            module._modules[name] = successors[id(child)]
    return successors.get(id(model), model)


def refresh(model: nn.Module, new: Sequence[nn.Module]) -> None:
    """Tells what torch's containers remember of their parts, after `put` of these layers.

    An encoder computes LayerNorm itself in evaluation, from the weights of whatever stands there, so it does so only
    while a LayerNorm stands there. `DistributedDataParallel` keeps a list of all buffers.
    """
    ours = {id(layer) for layer in new}
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            _switch(module, "activation_relu_or_gelu", 0, [module], ours)
        elif isinstance(module, nn.TransformerEncoder):
            layers = [layer for layer in module.layers if isinstance(layer, nn.TransformerEncoderLayer)]
            _switch(module, "use_nested_tensor", False, layers, ours)
        elif isinstance(module, nn.parallel.DistributedDataParallel):
            module._assign_modules_buffers()  # type: ignore[no-untyped-call]


_BEFORE = "_fast_path_before_convert"


def _switch(module: nn.Module, name: str, off: Any, layers: Sequence[Any], ours: set[int]) -> None:
    """Turns a fast path off where other norms stand in the layers, and back to what it was when LayerNorms do."""
    norms = [part for layer in layers for key, part in layer.named_children() if key in ("norm1", "norm2")]
    others = [norm for norm in norms if parametrize.type_before_parametrizations(norm) is not nn.LayerNorm]
    if not others and _BEFORE in module.__dict__:
        setattr(module, name, module.__dict__.pop(_BEFORE))
    elif not ours.isdisjoint(map(id, others)):
        module.__dict__.setdefault(_BEFORE, getattr(module, name))
        setattr(module, name, off)


def placed(module: nn.Module) -> dict[str, Any]:
    """Device and dtype of a layer, as options: those of its first floating tensor, and none without one."""
    like = next((t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()), None)
    return {} if like is None else {"device": like.device, "dtype": like.dtype}


def hand_on(old: nn.Module, new: nn.Module) -> str:
    """Parameters, running statistics, hooks and mode; and what became of the statistics."""
    for name in PARAMETERS:
        if name not in new._parameters:
            continue
        if parametrize.is_parametrized(old, name):
            parametrize.register_parametrization(new, name, nn.Identity(), unsafe=True)
            new.parametrizations[name] = old.parametrizations[name]  # type: ignore[operator, index]
            continue
        p, own, buffer = old._parameters.get(name), new._parameters[name], old._buffers.get(name)
        if p is not None and own is not None and p.shape == own.shape:
            new._parameters[name] = p
        elif p is None and own is not None and buffer is not None and buffer.shape == own.shape:
            new._parameters[name] = nn.Parameter(buffer)
    new.train(old.training)
    take_place(old, new)
    had, has = (getattr(layer, "running_mean", None) is not None for layer in (old, new))
    if had and has and old.running_mean.shape == new.running_mean.shape:
        for name in STATISTICS:
            if old._buffers.get(name) is not None:
                new._buffers[name] = old._buffers[name]
        if isinstance(new, Norm):
            # As the layer before did.
            new.running_statistics = replace(new.running_statistics, unseen=True)
        return "carried"
    return "dropped" if had else "new" if has else ""


def take_place(old: nn.Module, new: nn.Module) -> None:
    """Gives a layer the hooks of the one before: the same tables, so that `handle.remove()` still finds them. And the
    attributes that somebody set on it."""
    for name, value in old.__dict__.items():
        if "_hooks" in name or name == "_is_full_backward_hook":
            new.__dict__[name] = value
    for name in set_on(old):
        if name not in new.__dict__ and not _calls(old, old.__dict__[name]):
            new.__dict__[name] = old.__dict__[name]


def set_on(layer: nn.Module) -> list[str]:
    """The attributes of a norm of torch, or of ours, that it does not have by itself."""
    fresh = _fresh(parametrize.type_before_parametrizations(layer))
    return [] if fresh is None else [name for name in layer.__dict__ if name not in fresh]


@cache
def _fresh(cls: type[nn.Module]) -> frozenset[str] | None:
    """The attributes of a layer that was just built; None where nobody knows how to build one."""
    if not cls.__module__.startswith(("torch.nn.", "flexnorm.")):
        return None
    arguments: Any = ("n c -> n",) if "pattern" in inspect.signature(cls).parameters else (1, 1)
    try:
        return frozenset(cls(*arguments).__dict__)
    except (TypeError, ValueError):
        return None


def _calls(old: nn.Module, value: Any) -> bool:
    """Whether an attribute is about the old layer itself: a method of it, or what was compiled of it."""
    return getattr(value, "__self__", None) is old or getattr(value, "__wrapped__", None) is not None


def rebind(new: nn.Module) -> None:
    """Hooks that are called with their layer are called with this one."""
    hooks: Any = new._load_state_dict_pre_hooks
    for hook in hooks.values():
        if getattr(hook, "with_module", False):
            hook.module = weakref.ref(new)


def give_up(old: nn.Module) -> None:
    """Leaves a layer, whose tables of hooks another has now, without any."""
    fresh = nn.Module().__dict__
    old.__dict__.update({name: fresh[name] for name in old.__dict__ if name in fresh and "_hook" in name})

"""A model run on a probe, undisturbed: as it was at the end."""

from __future__ import annotations

import copy
import math
import random
import sys
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from .errors import SpecError, as_int, say
from .places import places, put, refresh


@torch.no_grad()
def compared(
    model: nn.Module,
    watched: Mapping[str, tuple[nn.Module, nn.Module]],
    successors: Mapping[int, nn.Module] | None,
    probe: Any,
) -> dict[str, float]:
    """The largest differences: of every new layer on what the old one is called with, by name; of the model, as "".

    watched: old and new layers, by names. successors: of all, by the ids of what they follow; None: the model does not
    run with them.
    """
    _check_values(model, probe)
    at: list[str] = []
    found: dict[str, float] = {}

    def hook(name: str, new: nn.Module, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        at.append(f"{name or 'the model'}: {new}")
        # not __call__: the new layer shares the hooks
        difference = _difference(output, new.forward(*args, **kwargs))
        if difference is not None:
            found[name] = max(difference, found.get(name, 0.0))
        at.pop()

    handles: list[Any] = []
    beside = [new for _, new in watched.values()] + list((successors or {}).values())
    saved = places(model)
    try:
        with undisturbed(model, beside):
            handles += [
                old.register_forward_hook(partial(hook, name, new), with_kwargs=True, prepend=True)
                for name, (old, new) in watched.items()
            ]
            before = _called(model, probe)
        while handles:
            handles.pop().remove()
        if successors is not None:
            with undisturbed(model, beside):
                at.append("the model with its new layers")
                changed = put(model, successors)
                refresh(changed, list(successors.values()))
                after = _called(changed, probe)
            change_of_model = _difference(before, after)
            if change_of_model is not None:
                found[""] = change_of_model
    except Exception as error:
        said = " ".join(str(error).split())[:200]
        rule = "the probe is what the model is called with, before and after"
        received = f"{type(error).__name__}: {said}" + (f", in {at[-1]}" if at else "")
        instead = "probe=x, a tuple of arguments, a dict of keywords, or a function of the model"
        raise SpecError(say(rule, received=received, instead=instead)) from error
    finally:
        for handle in handles:
            handle.remove()
        for module, name, child in saved:
            module._modules[name] = child
    return found


def _check_values(model: nn.Module, probe: Any) -> None:
    """Raises where there is nothing to compute with."""
    rule, valueless = None, "a probe needs values, and meta tensors have none"
    for name, p in model.named_parameters():
        if is_lazy(p):
            rule, instead = (
                "a probe needs parameters that have their shapes",
                "one call of the model first; or no probe",
            )
        elif p.is_meta:
            rule, instead = (
                "a probe needs values, and meta tensors have none",
                "no probe; or model.to_empty(...), filled",
            )
        if rule is not None:
            raise SpecError(say(rule, received=f"{name}: {type(p).__name__} on {p.device}", instead=instead))
    if any(isinstance(leaf, Tensor) and leaf.is_meta for leaf in pytree.tree_leaves(probe)):
        raise SpecError(say(valueless, received="probe= with a tensor on meta", instead="torch.randn(...) on the CPU"))


def arguments_of(model: nn.Module, x: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a model is called with where x is a tensor, its shape, a tuple of arguments or a dict of keywords."""
    if isinstance(x, Mapping):
        return (), dict(x)
    if isinstance(x, (tuple, list)) and x and all(as_int(size) is not None for size in x):
        p = next((p for p in model.parameters() if not is_lazy(p) and p.is_floating_point()), torch.zeros(()))
        return (torch.zeros(tuple(x), dtype=p.dtype, device=p.device),), {}
    return (tuple(x), {}) if isinstance(x, (tuple, list)) else ((x,), {})


def _called(model: nn.Module, probe: Any) -> Any:
    if callable(probe):
        return probe(model)
    args, kwargs = arguments_of(model, probe)
    return model(*args, **kwargs)


@contextmanager
def undisturbed(model: nn.Module, beside: Sequence[nn.Module] = ()) -> Iterator[None]:
    """Within, the model may run: buffers, attributes, modes, and the random states of torch, numpy and Python are as
    before at the end, of layers beside it, too. Parameters are not looked after.

    Torch takes no fast path, which calls no norm, or on nested tensors, and compiles nothing: hooks would be compiled.
    """
    modules = {part for module in (model, *beside) for part in module.modules()}
    tensors = [(t, _copied(t)) for m in modules for t in m._buffers.values() if t is not None]
    held = [_Held(module) for module in modules]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    fast = torch.backends.mha.get_fastpath_enabled()
    of_python, numpy = random.getstate(), sys.modules.get("numpy")
    of_numpy = None if numpy is None else numpy.random.get_state()
    compiles = "torch._dynamo" in sys.modules  # which takes a second to import
    with torch.random.fork_rng(devices), torch.compiler.set_stance("force_eager") if compiles else nullcontext():
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
            random.setstate(of_python)
            if numpy is not None:
                numpy.random.set_state(of_numpy)
            for one in held:
                one.restore()
            for buffer, value in tensors:
                # one that is expanded takes no values, and mostly needs none
                if value is not None and not torch.equal(buffer, value):
                    buffer.copy_(value)


_CONTAINERS = (dict, OrderedDict, defaultdict, set, list, deque)


class _Held:
    """The attributes of a module, and what is in those that are lists, dicts or sets."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        scripted = isinstance(module, torch.jit.ScriptModule)  # of C++, its tables are views
        self.attributes = {"training": module.training} if scripted else dict(module.__dict__)
        held: Any = [value for value in self.attributes.values() if type(value) in _CONTAINERS]
        self.contents = [(value, copy.copy(value)) for value in held]

    def restore(self) -> None:
        if isinstance(self.module, torch.jit.ScriptModule):
            self.module.training = self.attributes["training"]
            return
        self.module.__dict__.clear()
        self.module.__dict__.update(self.attributes)
        for value, content in self.contents:
            value.clear()
            (value.update if hasattr(value, "update") else value.extend)(content)


def _copied(t: Tensor) -> Tensor | None:
    """A copy, of what can be compared with it later."""
    return None if is_lazy(t) or t.is_meta or t.layout != torch.strided else t.clone()


def _difference(old: Any, new: Any) -> float | None:
    """The largest absolute difference of the numbers in two outputs; None if they are not alike."""
    pairs = [[leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor)] for out in (old, new)]
    if len(pairs[0]) != len(pairs[1]) or not pairs[0]:
        return None
    largest = 0.0
    for a, b in zip(*pairs, strict=True):
        if a.shape != b.shape:
            return None
        if a.numel() and (a.is_floating_point() or a.is_complex()):
            apart = (a - b).abs().max().double().item()
            largest = apart if math.isnan(apart) else max(largest, apart)
    return largest

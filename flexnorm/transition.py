"""From one norm to another in small steps, for models that were trained with the old one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .errors import SpecError, say, shown
from .layers.norm import Norm
from .partition import whole
from .places import put, rebind, refresh, take_place

__all__ = ["Transition", "advance", "finish"]


class Transition(nn.Module):
    r"""A blend of two norms in one place, from the old to the new.

    y = (1 - a) * old(x) + a * new(x),   a = min(step / steps, 1)

    Nothing but `advance` moves the step. Between two calls of it the blend is one function, so gradients are right
    whatever is computed again in backward, in any order: by activation checkpointing, by `torch.compile`, in pipelines.

    Args:
        old: the layer that was there.
        new: the one to come. It has buffers of its own; parameters may be those of `old`, as `convert` leaves them.
        steps: number of steps of training until `new` is alone.

    Attributes:
        step: how many there were: a buffer, so that training resumes where it was.

    Shapes: x, and whatever else the new layer is called with: a mask, labels. Norms of torch are called with x alone.

    Raises:
        SpecError: steps is no whole number of 1 or more.

    >>> blend = Transition(nn.BatchNorm1d(4), nn.GroupNorm(2, 4), steps=2)
    >>> x = torch.randn(8, 4)
    >>> torch.equal(blend(x), blend.old(x))
    True
    >>> advance(blend)
    >>> blend.share
    tensor(0.5000)
    >>> advance(blend)
    >>> torch.equal(blend(x), blend.new(x))
    True

    Both layers are computed until `finish`.
    """

    step: Tensor

    def __init__(self, old: nn.Module, new: nn.Module, steps: int) -> None:
        super().__init__()
        self.steps = whole(steps, "steps", 1)
        self.old, self.new = old, new
        self.train(old.training)
        theirs = {id(buffer) for buffer in old.buffers()}
        for module in new.modules():  # statistics that both had would move twice
            for name, buffer in module._buffers.items():
                if buffer is not None and id(buffer) in theirs:
                    module._buffers[name] = buffer.clone()
        beside = next((t for t in (*new.parameters(), *new.buffers())), torch.empty(()))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64, device=beside.device))

    @property
    def share(self) -> Tensor:
        """The weight of the new layer, from 0 to 1: a."""
        return self._share(torch.float32)

    def _share(self, dtype: torch.dtype) -> Tensor:
        wide = torch.promote_types(dtype, torch.float32)
        return (self.step.clamp(0, self.steps).to(wide) / self.steps).to(dtype)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Both norms of x, blended."""
        new: Tensor = self.new(x, *args, **kwargs)
        alone = type(self.old).__module__.startswith("torch.nn.") and not isinstance(self.old, Norm)
        old: Tensor = self.old(x) if alone else self.old(x, *args, **kwargs)
        share = self._share(new.real.dtype)
        return (1 - share) * old.to(new.dtype) + share * new

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"steps={self.steps}"


@torch.no_grad()
def advance(model: nn.Module) -> None:
    """Moves all transitions of a model by one step. Call it after every step of the optimizer.

    Args:
        model: or a wrapper of it: compiled, distributed. Without transitions, as after `finish`, nothing happens.

    Raises:
        SpecError: model is no module.

    >>> model = nn.Sequential(Transition(nn.BatchNorm1d(4), nn.GroupNorm(2, 4), steps=1000))
    >>> optimizer = torch.optim.SGD(model.parameters(), 0.01)
    >>> model(torch.randn(8, 4)).sum().backward()
    >>> optimizer.step()
    >>> advance(model)
    >>> model[0].step
    tensor(1)

    Where the loop is another's: `optimizer.register_step_post_hook(lambda *_: advance(model))`.
    """
    if not isinstance(model, nn.Module):
        received, instead = f"model={shown(model)}", "advance(model)"
        raise SpecError(say("what advances is a model with transitions", received=received, instead=instead))
    for module in model.modules():
        if isinstance(module, Transition):
            module.step.add_(1)


def finish(model: nn.Module, *, early: bool = False) -> nn.Module:
    """Puts the new layers of all transitions in their places.

    Args:
        model: changed in place, unless it is a `Transition` itself.
        early: do so although steps are left. What the model computes jumps then.

    Returns:
        The model.

    Raises:
        SpecError: there is no transition, or steps of one are left. Nothing is changed then.

    >>> model = nn.Sequential(Transition(nn.BatchNorm1d(4), nn.GroupNorm(2, 4), steps=1))
    >>> advance(model)
    >>> type(finish(model)[0]).__name__
    'GroupNorm'
    """
    found = {name: module for name, module in model.named_modules() if isinstance(module, Transition)}
    if not found:
        received, instead = shown(type(model).__name__), "model, report = convert(model, steps=1000) begins one"
        raise SpecError(say("what is finished is a transition", received=received, instead=instead))
    for name, module in found.items():
        if not early and int(module.step) < module.steps:
            received = f"{name or 'the model'}: {int(module.step)} of {module.steps} steps"
            instead = "advance(model) after every step of the optimizer; finish(model, early=True) for a jump"
            raise SpecError(say("a transition is over after its steps", received=received, instead=instead))
    for module in found.values():
        take_place(module, module.new)
        rebind(module.new)
        module.new.train(module.training)
    model = put(model, {id(module): module.new for module in found.values()})
    refresh(model, [module.new for module in found.values()])
    return model

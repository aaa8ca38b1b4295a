"""Streams: the next chunk of a sequence, by the statistics of all that came before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..calls.call import ALONE, Call
from ..calls.routes import own_moments
from ..errors import ShapeError, SpecError, say, shown
from ..statistics import Moments, each


def step(call: Call, state: Sequence[Tensor] | None, text: str) -> tuple[Call, tuple[Tensor, ...]]:
    """The call of a chunk by the moments up to each place, and the state after it.

    Args:
        call: as the formula reads it. The last axis of its statistics is the axis of the stream.
        state: what the step before returned: count, mean, M2 and low of every set. None at first.
        text: the pattern, as the user wrote it.
    """
    formula = call.formula
    past = _moments(state)
    if not call.is_alone:  # whatever may raise does so before ranks are asked
        recipe, _ = formula.prepare(call.x, call.mask, call.stages, call.names)
        _check(past, recipe.sets.shape[:-1], text)
    own = own_moments(formula, call.x, call.mask, call.names, call.ranks or ALONE)
    _check(past, own.mean.shape[:-1], text)
    past = each(lambda t: t.new_zeros(t.shape[:-1]), own) if past is None else past
    until = each(lambda before, new: torch.cat([before[..., None], new], -1), past, own).cumulative()
    last = each(lambda t: t[..., -1], until)
    assert last.low is not None
    return call._replace(moments=each(lambda t: t[..., 1:], until)), (last.count, last.mean, last.m2, last.low)


def _moments(state: Any) -> Moments | None:
    if state is None:
        return None
    if not (isinstance(state, (tuple, list)) and len(state) == 4 and all(isinstance(t, Tensor) for t in state)):
        received, instead = f"state={shown(state)}", "the second of what norm.step(x) returned"
        raise SpecError(say("a state is that of an earlier step: four tensors", received=received, instead=instead))
    past = Moments(*state)
    past.check()
    return past


def _check(past: Moments | None, shape: Sequence[int], text: str) -> None:
    if past is not None and tuple(past.mean.shape) != tuple(shape):
        raise ShapeError(
            say(
                f"the state is one of these sets: shape {tuple(shape)}",
                text=text,
                received=f"a state of shape {tuple(past.mean.shape)}",
                instead="the state of the same stream; None for the first chunk of another",
            )
        )

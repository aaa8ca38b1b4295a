"""`given`: masks and labels for norms nested where nobody passes arguments on."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from ..errors import SpecError, say, shown
from ..partition import Partition
from .arguments import Label


class given:  # noqa: N801  # read as a word: with given(mask=m)
    """Masks and labels for norms nested where nobody passes arguments on, as in `nn.Sequential`.

    Every `Norm` called inside takes the mask, if its pattern has one, and the labels it reads. What is passed
    explicitly wins, an inner `given` wins over an outer one; what does not fit is an error that names the layer.

    Args:
        mask: for every norm whose pattern has a mask.
        **labels: by the names that the patterns give them.

    Activation checkpointing computes layers again during backward. Call `backward()` inside of the block, or hand on
    what is given: `torch.utils.checkpoint.checkpoint(f, x, use_reentrant=False, context_fn=given.context_fn)`.

    >>> from torch import nn
    >>> from flexnorm import Norm, given
    >>> model = nn.Sequential(nn.Linear(4, 8), Norm("v c -> graph[v] c"), nn.ReLU())
    >>> with given(graph=torch.tensor([0, 0, 1])):
    ...     y = model(torch.randn(3, 4))
    """

    def __init__(self, /, *, mask: Tensor | None = None, **labels: Label) -> None:
        self._values: dict[str, Any] = {**labels, **({} if mask is None else {"mask": mask})}
        # A number that a compiler comes upon outside of the arguments it takes for a constant, and a size it does not.
        self._counts = {
            name: torch.empty((value.count, 0)) for name, value in self._values.items() if isinstance(value, Partition)
        }
        for name, value in self._values.items():
            if not isinstance(value, (Tensor, Partition)):
                raise SpecError(
                    say(
                        "given(...) takes tensors and Partitions",
                        received=f"{name}={shown(value)}",
                        instead=f"{name}=Partition.from_sizes([2, 1]) for sizes, torch.tensor(...) for ids or a mask",
                    )
                )

    def __enter__(self) -> given:
        before = _HERE.state
        values, counts = ({}, {}) if before is _HERE else before[1:]
        values = {**values, **self._values}
        counts = {name: count for name, count in counts.items() if name not in self._values}
        _HERE.state = (before, values, {**counts, **self._counts})
        if not is_dynamo_compiling():
            _OPEN.setdefault(threading.get_ident(), []).append(values)
        return self

    def __exit__(self, *exc: object) -> None:
        _HERE.state = _HERE.state[0]
        if not is_dynamo_compiling():
            thread = threading.get_ident()
            _OPEN[thread].pop()
            if not _OPEN[thread]:
                del _OPEN[thread]

    @staticmethod
    def context_fn() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """For `torch.utils.checkpoint.checkpoint`: nothing for forward, and for its repetition what is given now."""
        return nullcontext(), given(**_values())


def something_given() -> bool:
    """Whether any thread is inside of a `given`: mostly none is, and layers need not look further."""
    return is_dynamo_compiling() or bool(_OPEN)  # a guard on what other threads do would compile anew


def given_here() -> Mapping[str, Any]:
    """What is given where this is called.

    A backward pass of a GPU runs on a thread of its own, which knows nothing of the `with` block that `backward()` was
    called in. If one thread alone is inside of such blocks, it is that one.
    """
    values = _values()
    if not values and not is_dynamo_compiling() and len(_OPEN) == 1 and torch._C._current_graph_task_id() != -1:
        return next(iter(_OPEN.values()))[-1]
    return values


_GIVEN: ContextVar[Any] = ContextVar("flexnorm.given")


class _Here:
    """What was before, what is given now, and the counts of Partitions; the object itself where nothing is given.

    `torch.compile` knows no ContextVar, and takes an attribute that is looked up in C for one that it may guard and
    read anew at every call. So the attribute is the variable: right for every thread and task.
    """

    state = property(_GIVEN.get, lambda _, state: _GIVEN.set(state) and None)  # `get` returns its argument if not set


_HERE: Any = _Here()
_OPEN: dict[int, list[Mapping[str, Any]]] = {}  # of every thread inside of a block


def _values() -> Mapping[str, Any]:
    state = _HERE.state
    if state is _HERE:
        return {}
    values: dict[str, Any] = state[1]
    if is_dynamo_compiling():
        held = {name: (values[name], len(count)) for name, count in state[2].items()}
        return {**values, **{name: Partition._made(p._ids, count, p._tables) for name, (p, count) in held.items()}}
    return values

"""`given`: masks, labels and lengths for norms inside of models that pass no arguments on.

Five tricks stand here, and nowhere else.

1. What is given lies in a ContextVar, so that every thread and every task has its own. `torch.compile` knows no
   ContextVar. It takes an attribute that is looked up in C for one that it may guard and read at every call, so
   `_Here.state` is a property whose getter is the `get` of the ContextVar.
2. A block may be closed in another thread than the one that opened it, as web frameworks do with generators, and blocks
   may be closed out of order. So a block is not undone by its end: it is marked as closed, and a closed block counts
   for nothing wherever it still stands.
3. The backward pass of a GPU runs on a thread of its own, which is inside of no block. If one thread alone is inside of
   blocks, the layers that are computed again in a backward pass take what is given there.
4. Activation checkpointing computes layers again in the backward pass. A layer that was given something in a
   checkpointed forward notes it, and raises where it is computed again without.
5. A compiler runs a function at the time of tracing if it takes the result for a constant. So a traced layer notes the
   names that it takes.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, cast

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from ..errors import SpecError, say, shown
from ..partition import Partition
from .arguments import Label


class given:  # noqa: N801  # read as a word: with given(mask=m)
    """Masks and labels for norms inside of models that pass no arguments on, such as `nn.Sequential`.

    Every `Norm` called inside takes the mask, if its pattern has one, the labels that it reads, and what its `forward`
    takes by keyword: `lengths`, `key_padding_mask`, `cu_seqlens`, `batch`. What is passed explicitly wins, an inner
    `given` wins over an outer one; what does not fit is an error that names the layer.

    Args:
        mask: for every norm whose pattern has a mask.
        **labels: labels by the names that the patterns give them, and other names of arguments of layers.

    Warns:
        UserWarning: at the end of the block, with the names that no layer inside of the block takes. Layers in a graph
            that was compiled before run no Python, so a block with no other layers warns of nothing.

    Activation checkpointing computes layers again during backward. Call `backward()` inside of the block, or hand on
    what is given: `torch.utils.checkpoint.checkpoint(f, x, use_reentrant=False, context_fn=given.context_fn)`.

    A generator that yields inside of the block leaves the block open while it is suspended: its caller sees what is
    given, as with every context variable. The block ends when the generator leaves it, in whatever thread that is.

    >>> from torch import nn
    >>> from flexnorm import Norm, given
    >>> model = nn.Sequential(nn.Linear(4, 8), Norm("v c -> graph[v] c"), nn.ReLU())
    >>> with given(graph=torch.tensor([0, 0, 1])):
    ...     y = model(torch.randn(3, 4))
    """

    def __init__(self, /, *, mask: Tensor | None = None, **labels: Label) -> None:
        self._values: dict[str, Any] = {**labels, **({} if mask is None else {"mask": mask})}
        self._blocks: list[_Block] = []
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
        values, counts = ({}, {}) if before is _HERE else before[1:3]
        values = {**values, **self._values}
        counts = {name: count for name, count in counts.items() if name not in self._values}
        block = None
        if not is_dynamo_compiling():
            block = _Block(self._values, threading.get_ident(), values)
            self._blocks.append(block)
        _HERE.state = (before, values, {**counts, **self._counts}, block)
        return self

    def __exit__(self, kind: object, *exc: object) -> None:
        if is_dynamo_compiling():
            _HERE.state = _HERE.state[0]
            return
        block = self._closed()
        state = _HERE.state
        while state is not _HERE and _is_closed(state):
            state = state[0]
        _HERE.state = state
        if kind is None:
            block.warn()
        block.forget()

    def _closed(self) -> _Block:
        """Closes the innermost block of this object around here; else the last one that this thread opened, or any."""
        thread = threading.get_ident()
        around = [state[3] for state in _states() if state[3] in self._blocks]
        opened = [block for block in reversed(self._blocks) if block.thread == thread]
        block: _Block = next(iter((*around, *opened, *reversed(self._blocks))))
        self._blocks.remove(block)
        block.close()
        return block

    @staticmethod
    def context_fn() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """For `torch.utils.checkpoint.checkpoint`: nothing for forward, and for its repetition what is given now."""
        return nullcontext(), given(**given_here())


class _Block:
    """One time that a `given` was entered."""

    def __init__(self, values: Mapping[str, Any], thread: int, merged: dict[str, Any]) -> None:
        self.values, self.thread, self.is_open = values, thread, True
        self.merged = merged  # with the values of the blocks around
        self.left = set(values)  # the names that no layer has taken yet
        self.observer: Callable[[Any, Any], None] | None = None
        self.ran = False  # a layer ran inside of the block
        _OPEN.setdefault(thread, []).append(self)

    def close(self) -> None:
        """Ends the block, wherever it still stands."""
        self.is_open = False
        _OPEN[self.thread].remove(self)
        if not _OPEN[self.thread]:
            del _OPEN[self.thread]

    def forget(self) -> None:
        """Lets go of the tensors, because a context elsewhere may hold the block for ever."""
        self.merged.clear()
        self.values = {}

    def warn(self) -> None:
        left = [name for name in self.values if name in self.left and name not in _TRACED]
        if self.ran and left:
            said = say(
                "what is given is for the layers inside of the block, and none of them takes it",
                received=", ".join(f"{name}={shown(self.values[name])}" for name in left),
                instead="the names that the layers have for it: print(layer), help(type(layer).forward)",
            )
            warnings.warn(said, stacklevel=3)


def something_given() -> bool:
    """Whether any thread is inside of a `given`: mostly none is, and layers need not look further."""
    return is_dynamo_compiling() or bool(_OPEN)  # a guard on what other threads do would compile anew


def given_here() -> Mapping[str, Any]:
    """What is given where this is called."""
    if is_dynamo_compiling():
        return _values()
    blocks = _blocks()
    return {name: value for block in blocks for name, value in block.values.items()} if blocks else _values()


@contextmanager
def observed(observer: Callable[[Any, Any], None]) -> Iterator[None]:
    """Within, the observer is told every layer and its call, as the user made it and with what is given around it."""
    before = _HERE.state
    values, counts = ({}, {}) if before is _HERE else before[1:3]
    block = _Block({}, threading.get_ident(), dict(values))
    block.observer = observer
    _HERE.state = (before, block.merged, counts, block)
    try:
        yield
    finally:
        block.close()
        _HERE.state = before


def takes(layer: Any, call: Any, names: Iterable[str]) -> None:
    """Notes that a layer with arguments of these names runs inside of the open blocks, or is traced."""
    if is_dynamo_compiling():
        _note_traced(tuple(names))
        return
    for block in _blocks():
        block.ran = True
        block.left.difference_update(names)
        if block.observer is not None:
            block.observer(layer, call)


def check_recomputation(layer: Any, given_now: bool) -> None:
    """Raises where activation checkpointing computes a layer again, and what was given in the forward pass is gone."""
    if is_dynamo_compiling():
        return
    own, hooks = layer.__dict__, _checkpoint_hooks()
    if torch._C._current_graph_task_id() == -1:
        # A checkpointed forward saves its tensors by hooks, or (use_reentrant=True) runs without gradients.
        kind = "hooks" if hooks else "" if torch.is_grad_enabled() else "reentrant"
        kind = kind if given_now else ""
        if own["_was_given"] != kind:
            own["_was_given"] = kind
    elif own["_was_given"] and not given_now and torch.is_grad_enabled() and (hooks or own["_was_given"] != "hooks"):
        raise RuntimeError(
            say(
                "this layer is computed again by activation checkpointing, and what was given is gone",
                received=f"{layer}, outside of given(...)",
                instead="checkpoint(..., context_fn=given.context_fn), or backward() inside of the with block",
            )
        )


def _checkpoint_hooks() -> bool:
    """Whether `torch.utils.checkpoint` watches what is saved here."""
    hooks: Any = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and getattr(hooks[0], "__module__", "") == "torch.utils.checkpoint"


_GIVEN: ContextVar[Any] = ContextVar("flexnorm.given")


class _Here:
    """What was before, what is given now, the counts of Partitions, and the block; the object itself at first."""

    state = property(_GIVEN.get, lambda _, state: _GIVEN.set(state) and None)  # `get` returns its argument if not set


_HERE: Any = _Here()
_OPEN: dict[int, list[_Block]] = {}  # of every thread inside of a block
_TRACED: set[str] = set()  # names that a layer in a compiled graph takes


def _is_closed(state: Any) -> bool:
    return state[3] is not None and not state[3].is_open


def _states() -> Iterator[Any]:
    """The blocks around, the inner ones first."""
    state = _HERE.state
    while state is not _HERE:
        yield state
        state = state[0]


def _blocks() -> list[_Block]:
    """The open blocks around, the outer ones first."""
    found = [state[3] for state in _states() if state[3] is not None and state[3].is_open][::-1]
    if not found and len(_OPEN) == 1 and torch._C._current_graph_task_id() != -1:
        return list(next(iter(_OPEN.values())))
    return found


def _values() -> Mapping[str, Any]:
    """What is given, as a compiler reads it."""
    state = _HERE.state
    while state is not _HERE and _is_closed(state):
        state = state[0]
    if state is _HERE:
        return {}
    values: dict[str, Any] = state[1]
    if is_dynamo_compiling():
        held = {name: (values[name], len(count)) for name, count in state[2].items()}
        return {**values, **{name: Partition._made(p._ids, count, p._tables) for name, (p, count) in held.items()}}
    return values


def _note_traced(names: tuple[str, ...]) -> bool:
    """Runs where a graph is traced."""
    _TRACED.update(names)
    return True


# What `torch.compiler.assume_constant_result` sets, which imports the compiler.
cast(Any, _note_traced)._dynamo_marked_constant = True

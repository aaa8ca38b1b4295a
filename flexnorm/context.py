"""`given`: masks and labels for norms nested where nobody passes arguments on."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar, Token
from typing import Any

from torch import Tensor

from .arguments import Label
from .errors import SpecError, say, shown
from .partition import Partition


class given:  # noqa: N801  # read as a word: with given(mask=m)
    """Masks and labels for norms nested where nobody passes arguments on, as in `nn.Sequential`.

    Every `Norm` called inside takes the mask, if its pattern has one, and the labels it reads. What is passed
    explicitly wins, an inner `given` wins over an outer one; what does not fit is an error that names the layer.

    Args:
        mask: for every norm whose pattern has a mask.
        **labels: by the names that the patterns give them.

    Activation checkpointing computes layers again during backward. Call `backward()` inside of the block, or hand on
    what is given: `torch.utils.checkpoint.checkpoint(f, x, use_reentrant=False, context_fn=given.context_fn)`.

    >>> model = nn.Sequential(nn.Linear(4, 8), Norm("v c -> graph[v] c"), nn.ReLU())
    >>> with given(graph=torch.tensor([0, 0, 1])):
    ...     y = model(torch.randn(3, 4))
    """

    def __init__(self, *, mask: Tensor | None = None, **labels: Label) -> None:
        self._values: dict[str, Any] = {**labels, **({} if mask is None else {"mask": mask})}
        for name, value in self._values.items():
            if not isinstance(value, (Tensor, Partition)):
                raise SpecError(
                    say(
                        "given(...) takes tensors and Partitions",
                        received=f"{name}={shown(value)}",
                        instead=f"{name}=Partition.from_sizes([2, 1]) for sizes, torch.tensor(...) for ids or a mask",
                    )
                )
        self._tokens: list[Token[Mapping[str, Any]]] = []

    def __enter__(self) -> given:
        self._tokens.append(GIVEN.set({**GIVEN.get(), **self._values}))
        return self

    def __exit__(self, *exc: object) -> None:
        GIVEN.reset(self._tokens.pop())

    @staticmethod
    def context_fn() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """For `torch.utils.checkpoint.checkpoint`: nothing for forward, and for its repetition what is given now."""
        return nullcontext(), given(**GIVEN.get())


GIVEN: ContextVar[Mapping[str, Any]] = ContextVar("flexnorm.given", default={})  # noqa: B039  # never mutated

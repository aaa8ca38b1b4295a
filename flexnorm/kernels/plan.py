"""Which room computes a recipe, and why."""

from __future__ import annotations

from dataclasses import dataclass

from . import native
from .interface import Operands, Recipe


@dataclass(frozen=True)
class Plan:
    """The choice of a kernel: the room that computes it, and the reason.

    >>> print(Plan("aten", "torch has no masked norm"))
    aten (torch has no masked norm)
    """

    room: str
    reason: str

    def __str__(self) -> str:
        return f"{self.room} ({self.reason})"


def choose(
    recipe: Recipe,
    operands: Operands,
    *,
    differentiated: bool,
    transformed: bool = False,
    moments: str | None = None,
) -> Plan:
    """The plan for these tensors.

    Args:
        differentiated: a first derivative may be asked for.
        transformed: torch.func, forward mode or a tracer must see through.
        moments: "given" or "asked for", if the moments come from elsewhere or are asked for too.
    """
    if transformed:
        return Plan("aten", "seen through by torch.func, forward mode or a tracer")
    if moments is not None:
        return Plan("aten", f"the moments are {moments}")
    if differentiated:
        return Plan("aten", "a gradient may be asked for, and torch's norms save more than x for it")
    refusal = native.refusal(recipe, operands)
    if refusal is not None:
        return Plan("aten", refusal)
    return Plan("native", "torch's rms_norm is the same")

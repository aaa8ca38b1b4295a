"""Which room computes a recipe, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..library import LARGE, warn_if_missing
from . import aten, cpu, native, triton
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


ROOMS: dict[str, Any] = {"cpu": cpu, "triton": triton, "native": native, "aten": aten}


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
        moments: "given" or "needed first", if they come from elsewhere or are worked out before y; "asked for", if y
            and they are.
    """
    if transformed:
        return Plan("aten", "seen through by torch.func, forward mode or a tracer")
    return _choose(recipe, operands, differentiated, moments)


def _choose(recipe: Recipe, operands: Operands, differentiated: bool, moments: str | None) -> Plan:
    x = operands.x
    on_cpu = x.device.type == "cpu"
    own = cpu if on_cpu else triton
    refusal = own.refusal(recipe, operands)
    if refusal is not None and on_cpu and x.numel() >= LARGE:
        warn_if_missing()
    if moments in ("given", "needed first"):
        other: str | None = f"the moments are {moments}"
    else:
        other = native.refusal(recipe, operands, alone=not differentiated and moments is None)
    if refusal is None and not on_cpu and other is None and x.numel() < triton.SMALL:
        return Plan("native", "torch's rms_norm is the same, and quicker to start for few elements")
    if refusal is None:
        form, copied = cpu.shown(recipe, x) if on_cpu else triton.shown(recipe, x)
        said = ", after a copy, as no axis of x is contiguous" if copied else ""
        return Plan("cpu" if on_cpu else "triton", f"compiled: {form}{said}")
    if other is not None:
        return Plan("aten", f"{refusal}; {other}")
    if recipe.center:
        return Plan("native", f"{refusal}; torch's group_norm of x less a few of its values is exact")
    return Plan("native", "torch's rms_norm is the same")

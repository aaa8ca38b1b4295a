"""Which room computes a recipe, and why."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

from . import aten, cpu, native
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


ROOMS: dict[str, ModuleType] = {"cpu": cpu, "native": native, "aten": aten}


def choose(
    recipe: Recipe,
    operands: Operands,
    *,
    differentiated: bool,
    transformed: bool = False,
    moments: str | None = None,
) -> Plan:
    """The plan for these tensors; kept for others of their layout.

    Args:
        differentiated: a first derivative may be asked for.
        transformed: torch.func, forward mode or a tracer must see through.
        moments: "given" or "asked for", if the moments come from elsewhere or are asked for too.
    """
    if transformed:
        return Plan("aten", "seen through by torch.func, forward mode or a tracer")
    x = operands.x
    key = ("plan", x.stride(), differentiated, moments)
    plan: Plan | None = recipe.programs.get(key)
    if plan is None:
        plan = recipe.programs[key] = _choose(recipe, operands, differentiated, moments)
    return plan


def _choose(recipe: Recipe, operands: Operands, differentiated: bool, moments: str | None) -> Plan:
    refusal = cpu.refusal(recipe, operands)
    if refusal is None:
        form = recipe.form(operands.x)
        copied = ", after a copy, as no axis of x is contiguous" if form.copied else ""
        return Plan("cpu", f"compiled: {form}{copied}")
    if operands.x.device.type != "cpu":
        refusal = "there is no kernel for this device"
    if moments is not None:
        return Plan("aten", f"{refusal}; the moments are {moments}")
    if differentiated:
        return Plan("aten", f"{refusal}; torch's norms save more than x for a gradient")
    other = native.refusal(recipe, operands)
    if other is not None:
        return Plan("aten", f"{refusal}; {other}")
    return Plan("native", "torch's rms_norm is the same")

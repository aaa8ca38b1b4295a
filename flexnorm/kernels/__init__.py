"""The rooms that compute a `Recipe`, and the `Plan` that chooses one."""

from . import aten, cpu, native, triton
from .interface import Gradients, Kept, Operands, Recipe, Room, Sums, Whole, stat_dtype
from .plan import ROOMS, Plan, choose

__all__ = [
    "ROOMS",
    "Gradients",
    "Kept",
    "Operands",
    "Plan",
    "Recipe",
    "Room",
    "Sums",
    "Whole",
    "aten",
    "choose",
    "cpu",
    "native",
    "stat_dtype",
    "triton",
]

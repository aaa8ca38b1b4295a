"""The rooms that compute a `Recipe`, and the `Plan` that chooses one."""

from . import aten, native
from .interface import Gradients, Operands, Recipe, Room, Sums, stat_dtype
from .plan import Plan, choose

__all__ = ["Gradients", "Operands", "Plan", "Recipe", "Room", "Sums", "aten", "choose", "native", "stat_dtype"]

"""Operators of earlier versions, which graphs hold that were compiled or saved then: they say in words what to do.

A graph calls an operator by its name, its overload and its schema. So those stay, and nothing else.
"""

from __future__ import annotations

from typing import Any

from ..errors import SpecError, say

_GIVEN = "Tensor x, Tensor? mask, Tensor? weight, Tensor? bias, Tensor[] labels, SymInt[] counts, str formula"
_MOMENTS = "Tensor count, Tensor mean, Tensor m2, Tensor low"
_CALL = "Tensor x, Tensor? mask, Tensor?[] params, Tensor[] ids, SymInt[] numbers, float eps, str text"
_SCHEMAS = {
    "forward": f"({_GIVEN}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "statistics": f"({_GIVEN}) -> (Tensor, Tensor, Tensor, Tensor)",
    "apply": f"({_GIVEN}, {_MOMENTS}) -> Tensor",
    "backward": f"({_GIVEN}, {_MOMENTS}, Tensor dy) -> Tensor[]",
    "backward_sums": f"({_GIVEN}, {_MOMENTS}, Tensor dy) -> Tensor[]",
    "backward_dx": f"({_GIVEN}, {_MOMENTS}, Tensor? dy, Tensor? grad, Tensor? grad_xhat) -> Tensor[]",
    "normalize": f"({_CALL}, *, Tensor?[] moments) -> Tensor",
    "tracked": f"({_CALL}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "moments": f"(Tensor x, Tensor? mask, Tensor[] ids, SymInt[] numbers, str text) -> ({_MOMENTS})",
    "coarsen": f"(Tensor[] moments, Tensor[] ids, SymInt[] numbers, str text) -> ({_MOMENTS})",
    "refine": f"(Tensor[] moments, SymInt[] shape, Tensor[] ids, SymInt[] numbers, str text) -> ({_MOMENTS})",
}


def _refuse(*arguments: Any, **_: Any) -> Any:
    said = next((argument for argument in reversed(arguments) if isinstance(argument, str)), "none")
    rule, instead = "a compiled or saved graph is run by the version of flexnorm that made it", "compile it again"
    raise SpecError(say(rule, received=f"a graph of another version: {said}", instead=instead))


def define(library: Any) -> None:
    """Puts them into the library of operators."""
    for name, schema in _SCHEMAS.items():
        library.define(name + schema)
        for key in ("CompositeImplicitAutograd", "FuncTorchBatched"):
            library.impl(name, _refuse, key)

"""The last norms of residual blocks, found by torch.fx."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from operator import add, iadd, mul

import torch
from torch import fx, nn

from .errors import SpecError, say


def last_norms(model: nn.Module, norms: Mapping[int, str]) -> list[str]:
    """Which norms, names by ids, end the longer branch of an addition."""
    ends: list[str] = []
    failed: list[str] = []

    def visit(module: nn.Module, name: str) -> None:
        if not any(id(part) in norms for part in module.modules()) or id(module) in norms:
            return
        try:
            graph = _Tracer(set(norms)).trace(module)
        except Exception as error:  # whatever a model does with a stand-in of a tensor
            failed.append(f"{name or type(model).__name__}: {type(error).__name__}")
            for child_name, child in module.named_children():
                visit(child, f"{name}.{child_name}".lstrip("."))
            return
        ends.extend(_ends(graph, module, norms))

    visit(model, "")
    if not ends:
        received = "none found" + (f"; torch.fx cannot trace {', '.join(failed[:3])}" if failed else "")
        rule = "zero_init=True looks for norms that end a branch which is added to a shorter one"
        raise SpecError(say(rule, received=received, instead='their names: zero_init="layer*.bn2"'))
    return list(dict.fromkeys(ends))


class _Tracer(fx.Tracer):
    def __init__(self, leaves: set[int]) -> None:
        super().__init__()
        self.leaves = leaves

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        ours = type(m).__module__.startswith("flexnorm.")
        return ours or id(m) in self.leaves or super().is_leaf_module(m, module_qualified_name)


_SUMS = {add, iadd, torch.add, "add", "add_"}
_PRODUCTS = {mul, torch.mul, "mul", "mul_"}
_KEEP_ZERO = {"relu", "relu_", "silu", "gelu", "tanh", "contiguous", "clone", "stochastic_depth"}  # f(0) = 0


def _ends(graph: fx.Graph, module: nn.Module, norms: Mapping[int, str]) -> Iterator[str]:
    past: dict[fx.Node, frozenset[fx.Node]] = {}
    for node in graph.nodes:
        past[node] = frozenset({node}).union(*(past[n] for n in node.all_input_nodes))
        parts = [a for a in node.args[:2] if isinstance(a, fx.Node)]
        if node.target not in _SUMS or len(parts) < 2:
            continue
        a, b = parts
        lengths = [_length(past[a] - past[b], module), _length(past[b] - past[a], module)]
        if lengths[0] != lengths[1]:
            long, short = (a, b) if lengths[0] > lengths[1] else (b, a)
            end = _end(long, past[long] - past[short], module, norms)
            if end is not None:
                yield end


def _length(nodes: Iterable[fx.Node], module: nn.Module) -> int:
    """Layers with parameters on a branch."""
    held = (module.get_submodule(str(node.target)) for node in nodes if node.op == "call_module")
    return sum(any(True for _ in layer.parameters()) for layer in held)


def _end(node: fx.Node, branch: frozenset[fx.Node], module: nn.Module, norms: Mapping[int, str]) -> str | None:
    """The norm at the end of a branch, behind which 0 stays 0."""
    if node not in branch:
        return None
    before = [a for a in node.args if isinstance(a, fx.Node)]
    if node.op == "call_module":
        layer = module.get_submodule(str(node.target))
        if id(layer) in norms:
            return norms[id(layer)]
        gate = any(word in type(layer).__name__.lower() for word in ("sigmoid", "softmax", "softplus"))
        before = [] if gate or any(True for _ in layer.parameters()) else before[:1]
    elif node.target not in _PRODUCTS:
        said = getattr(node.target, "__name__", str(node.target))
        before = before[:1] if said in _KEEP_ZERO or "drop" in said else []
    return next((end for n in before if (end := _end(n, branch, module, norms)) is not None), None)

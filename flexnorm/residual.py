"""The last norms of residual blocks, found by torch.fx."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from operator import add, getitem, iadd, mul

import torch
from torch import fx, nn

from .errors import SpecError, say
from .probe import undisturbed


@dataclass
class Ends:
    """Names of the norms that end residual branches; of those that do not, why; and what could not be traced."""

    norms: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    untraced: dict[str, str] = field(default_factory=dict)


@torch.no_grad()
def last_norms(model: nn.Module, norms: Mapping[int, str]) -> Ends:
    """Which norms, names by ids, end the longer branch of an addition, whose other branch is the input of the block."""
    found = Ends()

    def visit(module: nn.Module, name: str) -> None:
        if not any(id(part) in norms for part in module.modules()) or id(module) in norms:
            return
        try:
            graph = _Tracer(set(norms)).trace(module)
        except Exception as error:  # whatever a model does with a stand-in of a tensor
            found.untraced[name] = f"{type(module).__name__}: {type(error).__name__}"
            for child_name, child in module.named_children():
                visit(child, f"{name}.{child_name}".lstrip("."))
            return
        for end, reason in _Branches(graph, module, norms).ends():
            if reason:
                found.left.setdefault(end, reason)
            else:
                found.norms.append(end)

    with undisturbed(model):  # a trace runs what the model does beside its layers
        visit(model, "")
    found.norms = list(dict.fromkeys(found.norms))
    found.left = {name: reason for name, reason in found.left.items() if name not in found.norms}
    if not found.norms:
        seen = [f"torch.fx cannot trace {said}" for said in found.untraced.values()]
        seen += [f"{name} {reason}" for name, reason in found.left.items()]
        received = "; ".join(["none found", *seen[:3]])
        rule = "zero_init=True looks for norms that end a branch, which is added to the input of the block"
        raise SpecError(say(rule, received=received, instead='their names: zero_init="layer*.bn2"'))
    return found


class _Tracer(fx.Tracer):
    def __init__(self, leaves: set[int]) -> None:
        super().__init__()
        self.leaves = leaves

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        ours = type(m).__module__.startswith("flexnorm.") or id(m) in self.leaves
        layer = not any(True for _ in m.children()) and any(
            True for _ in m.parameters()
        )  # a convolution of others, say
        return ours or layer or super().is_leaf_module(m, module_qualified_name)


_SUMS = {add, iadd, torch.add, "add", "add_"}
_PRODUCTS = {mul, torch.mul, "mul", "mul_"}
_KEEP_ZERO = {"relu", "relu_", "silu", "gelu", "tanh", "contiguous", "clone", "stochastic_depth"}  # f(0) = 0
_KEEP_ZERO |= {"view", "reshape", "reshape_as", "flatten", "permute", "transpose", "movedim", "squeeze", "unsqueeze"}
_FINER = ("interpolate", "upsample", "transpose2d", "transpose3d", "transpose1d", "pixelshuffle", "pixel_shuffle")


class _Branches:
    """The additions of a graph, and what is added. A set of nodes is the bits of an int."""

    def __init__(self, graph: fx.Graph, module: nn.Module, norms: Mapping[int, str]) -> None:
        self.norms = norms
        self.nodes = list(graph.nodes)
        self.layers = {n: module.get_submodule(str(n.target)) for n in self.nodes if n.op == "call_module"}
        self.bit = {node: 1 << place for place, node in enumerate(self.nodes)}
        self.past: dict[fx.Node, int] = {}
        for node in self.nodes:
            self.past[node] = self.bit[node]
            for before in node.all_input_nodes:
                self.past[node] |= self.past[before]

    def ends(self) -> Iterator[tuple[str, str]]:
        """Norms at the ends of branches that are added, and why they end no residual branch, or ""."""
        for node in self.nodes:
            parts = _added(node)
            if parts is None:
                continue
            a, b = sorted(parts, key=lambda part: -self.length(self.own(part, parts)))
            long, short = self.own(a, parts), self.own(b, parts)
            if self.length(long) == self.length(short):
                for end in (self.end(a, long), self.end(b, short)):
                    if end is not None:
                        yield self.norms[id(self.layers[end])], "ends one of two branches of equal length"
                continue
            end = self.end(a, long)
            if end is not None:
                yield self.norms[id(self.layers[end])], self.objection(node, end, long, b, short)

    def own(self, part: fx.Node, parts: tuple[fx.Node, fx.Node]) -> int:
        """The nodes that lead to one part alone."""
        other = parts[0] if part is parts[1] else parts[1]
        return self.past[part] & ~self.past[other]

    def those(self, bits: int) -> Iterator[fx.Node]:
        return (node for node in self.nodes if bits & self.bit[node])

    def length(self, bits: int) -> int:
        """Layers with parameters on a branch."""
        return sum(any(True for _ in self.layers[n].parameters()) for n in self.those(bits) if n in self.layers)

    def objection(self, node: fx.Node, end: fx.Node, long: int, other: fx.Node, short: int) -> str:
        """Why two branches are none of a residual block, or ""."""
        root = self.root(other, short)
        if root is None or not self.past[end] & self.bit[root]:
            return "ends a branch that is added to something else than its input"
        norms = sum(id(layer) in self.norms for n, layer in self.layers.items() if short & self.bit[n])
        weights = self.length(short) - norms
        if norms > 1 or weights > 1 or any(_added(n) for n in self.those(short)):
            return "ends a branch that is added to another of several layers"
        if norms > weights or any(self.apart(part, node, root) for user in node.users for part in _added(user) or ()):
            return "ends one of several branches that are added"  # RepVGG, say, which makes one convolution of them
        if any(self.residual(n, root) for n in self.those(long)):
            return "ends a branch with residual blocks inside"
        if self.finer(long) and not self.finer(short):
            return "ends a branch that goes to a lower resolution and back"
        return ""

    def apart(self, part: fx.Node, node: fx.Node, root: fx.Node) -> bool:
        """Whether something is made of the root, and not of a node."""
        return bool(self.past[part] & self.bit[root]) and not self.past[part] & self.bit[node]

    def root(self, part: fx.Node, own: int) -> fx.Node | None:
        """The one node that a branch begins with, which is no item of a list."""
        if not own:
            return part
        begin = {before for n in self.those(own) for before in n.all_input_nodes if not own & self.bit[before]}
        items = any(n.target is getitem and isinstance(n.args[1], int) for n in self.those(own))
        given = any(n.op == "placeholder" for n in self.those(own))
        return None if items or given or len(begin) != 1 else next(iter(begin))

    def residual(self, node: fx.Node, root: fx.Node) -> bool:
        """Whether a node adds something to what that was made of, and all is made of a root."""
        parts = _added(node)
        if parts is None or not all(self.past[part] & self.bit[root] for part in parts):
            return False
        owns = [(part, self.own(part, parts)) for part in parts]
        return any(not self.length(own) and self.root(part, own) is not None for part, own in owns)

    def finer(self, bits: int) -> bool:
        """Whether a branch has more resolution at its end than somewhere before."""
        return any(word in self.said(node) for node in self.those(bits) for word in _FINER)

    def said(self, node: fx.Node) -> str:
        name = (
            type(self.layers[node]).__name__ if node in self.layers else getattr(node.target, "__name__", node.target)
        )
        return str(name).lower()

    def end(self, node: fx.Node, branch: int) -> fx.Node | None:
        """The norm at the end of a branch, behind which 0 stays 0."""
        if not branch & self.bit[node]:
            return None
        before = [a for a in node.args if isinstance(a, fx.Node)]
        if node in self.layers:
            layer = self.layers[node]
            if id(layer) in self.norms:
                return node
            said = self.said(node)
            gate = any(word in said for word in ("sigmoid", "softmax", "softplus"))
            changes = any(True for _ in layer.parameters()) and "scale" not in said
            before = [] if gate or changes else before[:1]
        elif node.target not in _PRODUCTS:
            said = self.said(node)
            before = before[:1] if said in _KEEP_ZERO or "drop" in said else []
        return next((end for n in before if (end := self.end(n, branch)) is not None), None)


def _added(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """What a node adds, if it is an addition of two."""
    parts = [a for a in node.args[:2] if isinstance(a, fx.Node)]
    return (parts[0], parts[1]) if node.target in _SUMS and len(parts) == 2 else None

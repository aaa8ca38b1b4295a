"""What a benchmark is made of: data of a real model's shape, contenders that compute the same, a float64 reference."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from flexnorm import Partition

EPS = 1e-5

Data = SimpleNamespace
"""x and all that the contenders of one case read. Every case sets x; weight, bias and `over` (the shape in which these
broadcast against x), or None; `valid`, a bool tensor that broadcasts against x, or None where every element counts.
Weight and bias are sizes, of which values are drawn, or the parameters of a layer."""


@dataclass(frozen=True)
class Contender:
    """One way to compute a case.

    `module` names the field of the data that holds its parameters; without it they are the weight and bias of the data.
    `formula` marks plain tensor code that torch.compile may fuse.
    """

    name: str
    call: Callable[[Data], Tensor]
    module: str | None = None
    formula: bool = False
    forward_only: bool = False

    def parameters(self, data: Data) -> list[Tensor]:
        if self.module is not None:
            return list(getattr(data, self.module).parameters())
        return [p for p in (data.weight, data.bias) if p is not None]


@dataclass(frozen=True)
class Case:
    """`make(scale, generator)` draws the data, with about `scale` of the elements.

    `sets_survive` says that a smaller scale leaves out whole sets and keeps the others as large as they are, so that a
    part of the data stands for all of it where errors are concerned. `kind` is "native" where torch has a fused op,
    "expression" where it has none, "pyg" for the classes of PyTorch Geometric.

    `table` is "torch" or "peers". A case of "torch" has one size, its own, and one peer, the first: torch's operation,
    or a formula that may be compiled. A case of "peers" has all `SIZES`, and the fastest of its peers counts. A `short`
    case stands for the others: in the README, in `--quick`, and in conditions other than the plain process.
    """

    name: str
    kind: str
    make: Callable[[float, torch.Generator], Data]
    ours: Callable[[Data], Tensor]
    peers: Sequence[Contender]
    reference: Callable[[Data], tuple[Tensor, Tensor]]
    activation: Callable[[Tensor], Tensor] | None = None
    sets_survive: bool = True
    table: str = "peers"
    short: bool = False
    module: str | None = None
    fused: str | None = None  # the name under which GPU libraries have it

    @property
    def contender(self) -> Contender:
        return Contender("flexnorm", self.ours, self.module)

    def draw(self, scale: float = 1.0, device: str = "cpu") -> Data:
        generator = torch.Generator().manual_seed(zlib.crc32(self.name.encode()))
        data = self.make(scale, generator)
        data.dy = torch.empty_like(data.x).normal_(generator=generator)
        if isinstance(data.weight, int):
            # not ones and zeros: a contender that reads them wrongly must not pass
            data.weight = torch.empty(data.weight).normal_(1.0, 0.2, generator=generator).requires_grad_()
        if isinstance(data.bias, int):
            data.bias = torch.empty(data.bias).normal_(0.0, 0.2, generator=generator).requires_grad_()
        return moved(data, device)


SIZES = {"tiny": 16 << 10, "usual": 2 << 20, "large": 128 << 20}
"""Bytes of x at most. A usual batch fits caches; the result of a large one is in fresh pages at every call."""


def size_of(nbytes: int) -> str:
    return "tiny" if nbytes <= 64 << 10 else "usual" if nbytes < 30 << 20 else "large"


def moved(data: Data, device: str) -> Data:
    if device == "cpu":
        return data
    there = {
        name: value.to(device) if isinstance(value, (Tensor, Partition, nn.Module)) else value
        for name, value in vars(data).items()
    }
    for name in ("weight", "bias"):
        if there[name] is not None:
            there[name] = there[name].detach().requires_grad_()
    return Data(**there)


def like(data: Data, **changed: object) -> Data:
    """The same data but for some fields."""
    return Data(**{**vars(data), **changed})


def shrunk(shape: Sequence[int], scale: float, inner: Sequence[int] = ()) -> tuple[int, ...]:
    """The shape with about `scale` of its elements: the first axis goes down to 1, then the `inner` ones, evenly."""
    sizes = list(shape)
    sizes[0] = max(1, round(sizes[0] * scale))
    rest = scale * shape[0] / sizes[0]
    if rest < 1 and inner:
        for axis in inner:
            sizes[axis] = max(2, round(sizes[axis] * rest ** (1 / len(inner))))
    return tuple(sizes)


def randn(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return torch.randn(tuple(shape), generator=generator)


def fill(total: int, draw: Callable[[], float]) -> list[int]:
    """Sizes, as drawn, whose sum is the total; the last one is cut."""
    sizes: list[int] = []
    while (left := total - sum(sizes)) > 0:
        sizes.append(min(left, max(1, math.floor(draw()))))
    return sizes

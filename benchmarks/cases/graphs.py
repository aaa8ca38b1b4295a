"""Graphs: nodes in segments, sorted and not, and PyTorch Geometric's own classes."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexnorm import Partition, normalize

from .. import gate, handmade
from ..case import EPS, Case, Contender, Data, fill, randn


def by_sizes(sizes: list[int], channels: int, generator: torch.Generator, *, shuffled: bool = False) -> Data:
    graph = Partition.from_sizes(sizes)
    if shuffled:
        graph = Partition(graph.ids[torch.randperm(sum(sizes), generator=generator)], graph.count)
    return Data(
        x=randn((sum(sizes), channels), generator),
        weight=channels,
        bias=channels,
        over=(channels,),
        valid=None,
        groups=None,
        graph=graph,
        ids=graph.ids,
        count=graph.count,
        sizes=sizes,
        sizes_of_sets=graph.counts.float(),
    )


def _molecules(scale: float, generator: torch.Generator) -> Data:
    sizes = torch.randint(20, 31, (max(2, round(4096 * scale)),), generator=generator).tolist()
    return by_sizes(sizes, 128, generator)


def _power_law(shuffled: bool) -> Callable[..., Data]:
    def make(scale: float, generator: torch.Generator) -> Data:
        total = max(16, round(150_000 * scale))
        sizes = fill(total, lambda: min(20_000, 4 * (1 - torch.rand((), generator=generator).item()) ** (-1 / 1.2)))
        return by_sizes(sizes, 128, generator, shuffled=shuffled)

    return make


def _one_graph(scale: float, generator: torch.Generator) -> Data:
    return by_sizes([max(16, round(500_000 * scale))], 64, generator)


def _reference(d: Data) -> tuple[Tensor, Tensor]:
    v, c = d.x.shape
    z, ratio = gate.labelled(d.x.view(v, c, 1), d.ids, d.count)
    return z.reshape(v, c), ratio.expand_as(z).reshape(v, c)


def _ours(d: Data) -> Tensor:
    return normalize(d.x, "v c -> graph[v] c", graph=d.graph, weight=d.weight, bias=d.bias, affine="c")


_INDEX_ADD = Contender("index_add", handmade.index_add, formula=True)
_SCATTER = Contender("scatter_reduce", handmade.scatter_reduce)


def _pyg(d: Data) -> Tensor:
    """PyG's InstanceNorm is the same but for the parameters."""
    from torch_geometric.nn import InstanceNorm

    return torch.addcmul(d.bias, InstanceNorm(d.x.shape[1])(d.x, d.ids, d.count), d.weight)


_PYG = [Contender("PyG InstanceNorm", _pyg)] if find_spec("torch_geometric") else []

CASES = [
    Case(
        "molecules 4096 graphs x128",
        "expression",
        _molecules,
        _ours,
        [_INDEX_ADD, _SCATTER, *_PYG],
        _reference,
        short=True,
    ),
    Case(
        "one graph 500000x64",
        "expression",
        _one_graph,
        _ours,
        [
            Contender(
                "torch batch_norm", lambda d: F.batch_norm(d.x, None, None, d.weight, d.bias, training=True, eps=EPS)
            )
        ],
        _reference,
        sets_survive=False,
        table="torch",
    ),
    Case(
        "power-law graphs, sorted 150000x128",
        "expression",
        _power_law(shuffled=False),
        _ours,
        [_INDEX_ADD, _SCATTER, *_PYG],
        _reference,
    ),
    Case(
        "power-law graphs, unsorted 150000x128",
        "expression",
        _power_law(shuffled=True),
        _ours,
        [_INDEX_ADD],
        _reference,
        table="torch",
    ),
]


# --- PyG's classes, and ours under their names: both get the same batch vector ---------------------------------------


def class_case(
    name: str,
    nodes: Callable[[float, torch.Generator], Data] = _molecules,
    title: str = "4096 graphs x128",
    *,
    layers: int = 1,
    counted: bool = True,
    short: bool = False,
    **options: object,
) -> Case:
    """`counted` says that the classes get the number of graphs. More than one of the `layers` read one batch vector."""

    def make(scale: float, generator: torch.Generator) -> Data:
        import torch_geometric.nn as pyg

        from flexnorm import graphs

        made = nodes(scale, generator)
        made.weight = made.bias = None
        first = () if name in _WITHOUT_CHANNELS else made.x.shape[1:]
        for field, package in (("theirs", pyg), ("mine", graphs)):
            setattr(made, field, nn.ModuleList(getattr(package, name)(*first, **options) for _ in range(layers)))
        return made

    def call(field: str) -> Callable[[Data], Tensor]:
        def through(d: Data) -> Tensor:
            # a batch norm is of all nodes, whatever their graph
            read = () if name == "BatchNorm" else (d.ids, d.count) if counted else (d.ids,)
            x = d.x
            for layer in getattr(d, field):
                x = layer(x, *read)
            return x

        return through

    said = "".join(f", {key}={value}" for key, value in options.items())
    return Case(
        f"PyG {name}{said} {title}",
        "pyg",
        make,
        call("mine"),
        [Contender(f"PyG {name}", call("theirs"), module="theirs")],
        CLASSES[name],
        sets_survive=name != "BatchNorm",
        short=short,
        module="mine",
    )


def _graphwise(d: Data) -> tuple[Tensor, Tensor]:
    z, ratio = gate.labelled(d.x.unsqueeze(1), d.ids, d.count)
    return z.squeeze(1), ratio.squeeze(1)


def _pair(d: Data) -> tuple[Tensor, Tensor]:
    """Centers are those of channels, the length is that of a whole graph."""
    size = d.sizes_of_sets.double().unsqueeze(1)
    mean = d.x.new_zeros(d.count, d.x.shape[1]).index_add(0, d.ids, d.x) / size
    centered = d.x - mean[d.ids]
    squares = d.x.new_zeros(d.count).index_add(0, d.ids, centered.square().sum(1))
    sigma = (squares / size.squeeze(1) + EPS).sqrt()
    return centered / sigma[d.ids].unsqueeze(1), (mean.abs() / sigma.unsqueeze(1)).detach()[d.ids]


def _mean_subtracted(d: Data) -> tuple[Tensor, Tensor]:
    size = d.sizes_of_sets.to(d.x.dtype).unsqueeze(1)
    mean = (d.x.new_zeros(d.count, d.x.shape[1]).index_add(0, d.ids, d.x) / size)[d.ids]
    return d.x - mean, mean.abs().detach()


def _by_size(d: Data) -> tuple[Tensor, Tensor]:
    z = d.x / d.sizes_of_sets.to(d.x.dtype)[d.ids].sqrt().unsqueeze(1)
    return z, torch.zeros_like(z)


_WITHOUT_CHANNELS = ("PairNorm", "MeanSubtractionNorm", "GraphSizeNorm")

CLASSES: dict[str, Callable[[Data], tuple[Tensor, Tensor]]] = {
    "GraphNorm": _reference,
    "InstanceNorm": _reference,
    "LayerNorm": _graphwise,
    "PairNorm": _pair,
    "MeanSubtractionNorm": _mean_subtracted,
    "GraphSizeNorm": _by_size,
    "BatchNorm": lambda d: gate.pooled(d.x, (0,)),
}

if find_spec("torch_geometric"):
    CASES += [
        class_case("GraphNorm", short=True),
        class_case("InstanceNorm"),
        class_case("LayerNorm", mode="graph"),
        class_case("PairNorm"),
        class_case("BatchNorm"),
    ]

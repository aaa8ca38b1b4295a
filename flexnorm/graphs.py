"""Norms of graphs, for PyTorch Geometric: its own, under its names and signatures, and group norms, which it lacks.

A pattern names the nodes v and the channels c; `batch[v]` is the graph of node v, PyG's batch vector. The layers that
read it take `forward(x, batch=None, batch_size=None)`: a batch vector in any order, or a `Partition`, which is made
once and serves all layers (`partition(data)`, `Partition.from_offsets(ptr)`). Where nobody passes it on,
`given(batch=...)` does. Without any, all nodes are one graph.
"""

# mypy: allow-subclassing-any

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from .calls.arguments import Formula, Label, Options
from .calls.call import Call, named
from .calls.functional import formula_for, moments, normalize
from .calls.given import something_given
from .calls.steps import OneVariance
from .errors import ShapeError, SpecError, say, shown
from .kernels import stat_dtype
from .layers.norm import Norm
from .layers.running import Known, RunningStatistics
from .partition import Partition, counts_for
from .spec import Expr, Spec
from .statistics import Moments
from .watching import unwatched

try:
    from torch_geometric.data import Batch, Data, HeteroData
    from torch_geometric.nn import norm as pyg
except Exception as error:  # a broken install fails in many ways
    raise ImportError(
        'flexnorm.graphs needs PyTorch Geometric, which cannot be imported: pip install "flexnorm[graph]"'
    ) from error

__all__ = [
    "BatchNorm",
    "FeatureGroupNorm",
    "GraphGroupNorm",
    "GraphNorm",
    "GraphSizeNorm",
    "HeteroBatchNorm",
    "HeteroLayerNorm",
    "InstanceNorm",
    "LayerNorm",
    "MeanSubtractionNorm",
    "NodeGroupNorm",
    "PairNorm",
    "partition",
]


def partition(data: Any, of: str = "nodes") -> Any:
    """The graph of every node, or edge, of a PyG `Batch`: made once, it serves every layer.

    It lies on the device of the batch, in page-locked memory if the batch does, knows empty graphs at the end, and does
    not wait for the device. Kept in the batch, as by the `collate_fn` of a loader (`batch.graphs = partition(batch)`),
    it moves and pins with it.

    Args:
        data: `Batch`, or `Data`: without a batch vector that is one graph. Of heterogeneous data, a dict is made.
        of: "nodes", or "edges", whose graph is that of the node they come from.

    Returns:
        A `Partition`; a dict of them by node type, or by edge type, for heterogeneous data.

    >>> from torch_geometric.data import Batch, Data
    >>> batch = Batch.from_data_list([Data(x=torch.randn(2, 8)), Data(x=torch.randn(3, 8))])
    >>> partition(batch)
    Partition(5 ids, count=2)
    >>> GraphNorm(8)(batch.x, partition(batch)).shape
    torch.Size([5, 8])
    """
    if of not in ("nodes", "edges"):
        raise SpecError(
            say("a partition is one of nodes or of edges", received=f"of={shown(of)}", instead='of="nodes"')
        )
    if not isinstance(data, (Data, HeteroData)):
        received, instead = shown(data), "Partition(batch) for a batch vector, Partition.from_offsets(ptr) for a ptr"
        raise SpecError(say("a partition is made of a PyG Batch or Data", received=received, instead=instead))
    count = data.num_graphs if isinstance(data, Batch) else None
    if isinstance(data, HeteroData):
        nodes = {kind: _of_nodes(store, count) for kind, store in data.node_items()}
        if of == "nodes":
            return nodes
        return {kind: _of_edges(store, nodes[kind[0]]) for kind, store in data.edge_items()}
    return _of_nodes(data, count) if of == "nodes" else _of_edges(data, _of_nodes(data, count))


def _of_nodes(store: Any, count: int | None) -> Partition:
    ids, ptr = store.get("batch"), store.get("ptr")
    if ids is None:
        like = next((value for value in store.values() if isinstance(value, Tensor)), torch.empty(0))
        ids, count = torch.zeros(store.num_nodes or 0, dtype=torch.int64, device=like.device), 1
    elif count is None and ptr is not None:
        count = ptr.numel() - 1
    made = Partition(ids, count)
    return made.pin_memory() if ids.is_pinned() else made


def _of_edges(store: Any, nodes: Partition) -> Partition:
    made = Partition(nodes.ids[store.edge_index[0]], nodes.count)
    return made.pin_memory() if nodes.ids.is_pinned() else made


class _OfGraphs(Norm):
    """The norms that read `batch[v]`."""

    def fit_call(self, call: Call) -> Call:
        """The graph of every node: of the call, or one graph for all."""
        return _with_graphs(call)

    def _each_graph(self, options: Options, params: Expr | None) -> Formula:
        """The formula of every graph and channel by these options, and by no others than at the call before."""
        formula: Formula | None = self.__dict__.get("_formula_of_each")
        if formula is None or formula.options != options:
            formula = self.__dict__["_formula_of_each"] = formula_for(_EACH_GRAPH, options, params, ())
        return formula


def _told(batch: Label | None, batch_size: int | None) -> dict[str, Any]:
    """The names of a call."""
    if batch is None or batch_size is not None:
        return named(batch=batch, batch_size=batch_size)
    return {"batch": batch}


def _with_graphs(call: Call, label: str = "batch", size: str = "batch_size") -> Call:
    """The call with the graph of every node as a label.

    Args:
        label: the name of the label. Without it in the call, the graphs of `batch` are the label.
        size: the name under which the number of graphs comes.
    """
    x, names, name = call.x, call.names, "batch"
    count, batch = names.get(size), names.get("batch")
    if label != "batch" and label in names:
        name, batch, count = label, names[label], None
    if not isinstance(x, Tensor):  # the pattern refuses it
        return call.fit(x, call.mask, {})
    graphs = _one_graph(x) if batch is None else _read(x, batch, count, name, size)
    return call.fit(x, call.mask, {label: graphs})


def _one_graph(x: Tensor) -> Partition:
    return Partition._made(torch.zeros(x.shape[:1], dtype=torch.int64, device=x.device), 1)


def _read(x: Tensor, batch: Any, count: int | None, name: str, told: str) -> Partition:
    """The graph of every row of x, by its name; `told` is what its number is called."""
    kind: type[ValueError] = ShapeError
    if not isinstance(batch, (Tensor, Partition)) or batch.shape != x.shape[:1]:
        rule = f"{name} holds the graph of every node: a tensor or Partition of shape {tuple(x.shape[:1])}"
        instead = "flexnorm.graphs.partition(data); Partition.from_offsets(ptr), if this is ptr"
    elif isinstance(batch, Partition):
        if count is None or count == batch.count:
            return batch
        rule, instead = f"a Partition knows the number of graphs, and {told} says another", f"leave {told} out"
    else:
        try:
            return Partition(batch, count)
        except SpecError:
            kind, rule = SpecError, f"{name} holds integers, and their number {told} is one"
            instead = f"{name}=batch.long(), {told}=8, say"
        except ShapeError:
            least, most = int(batch.min()), int(batch.max())
            rule = f"{name} holds the graph of every node, from 0 to {told} - 1; here are {least} to {most}"
            instead = f"{told}={most + 1}, or without" if least >= 0 else "number the graphs from 0"
    received = f"{name}={batch!r}" if isinstance(batch, Partition) else f"{name}={shown(batch)}"
    received += ("" if count is None else f", {told}={shown(count)}") + f", x of shape {tuple(x.shape)}"
    raise kind(say(rule, received=received, instead=instead)) from None


# --- group norms, which PyG lacks ------------------------------------------------------------------------------------


class NodeGroupNorm(Norm):
    """Group norm of every node alone, over groups of its channels: features-per-node. It needs no batch.

    For each node v and group g:   y[v, g] = (x[v, g] - mean(x[v, g])) / sqrt(var(x[v, g]) + eps) * weight + bias

    Args:
        num_groups: g, groups of consecutive channels.
        num_channels: c; weight and bias have one value for each.
        eps: added to the variance, in the unit of x squared.
        affine: learn weight and bias.
        device, dtype: of the parameters.

    Shapes: x is (nodes, channels).

    >>> NodeGroupNorm(4, 32)(torch.randn(10, 32)).shape
    torch.Size([10, 32])

    Source: Wu and He, "Group Normalization", 2018, with nodes as samples.
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            "v (g c) -> v g",
            affine="(g c)" if affine else None,
            g=num_groups,
            sizes={"(g c)": num_channels},
            eps=eps,
            device=device,
            dtype=dtype,
        )
        self.num_groups, self.num_channels, self.affine = num_groups, num_channels, affine

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]  # PyG passes batch to a forward that names it
        """Normalizes x, (nodes, channels)."""
        return super().forward(x)


class GraphGroupNorm(_OfGraphs):
    """Group norm of every graph, over its nodes and groups of channels.

    For each graph b and group g:   y = (x - mean(x[b, g])) / sqrt(var(x[b, g]) + eps) * weight + bias

    With one group that is `LayerNorm(mode="graph")`, with as many as channels `InstanceNorm`.

    Args:
        num_groups: g, groups of consecutive channels.
        num_channels: c; weight and bias have one value for each.
        eps: added to the variance, in the unit of x squared.
        affine: learn weight and bias.
        device, dtype: of the parameters.

    Shapes: x is (nodes, channels), batch is (nodes,).

    >>> norm = GraphGroupNorm(4, 32)
    >>> norm(torch.randn(10, 32), batch=torch.arange(10) // 5).shape
    torch.Size([10, 32])

    Source: Wu and He, "Group Normalization", 2018, with graphs as samples and nodes as places.
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            "v (g c) -> batch[v] g",
            affine="(g c)" if affine else None,
            g=num_groups,
            sizes={"(g c)": num_channels},
            eps=eps,
            device=device,
            dtype=dtype,
        )
        self.num_groups, self.num_channels, self.affine = num_groups, num_channels, affine

    def forward(  # type: ignore[override]
        self, x: Tensor, batch: Label | None = None, batch_size: int | None = None
    ) -> Tensor:
        """Normalizes x, (nodes, channels), by graphs: batch, (nodes,), and their number if batch does not show it."""
        return super().forward(x, labels=_told(batch, batch_size))


class FeatureGroupNorm(_OfGraphs):
    """Norm of every feature over groups of nodes: nodes-per-feature. The groups are graphs, or any others.

    For each group p and channel c:   y = (x - mean(x[p, c])) / sqrt(var(x[p, c]) + eps) * weight[c] + bias[c]

    Args:
        num_channels: c; weight and bias have one value for each.
        eps: added to the variance, in the unit of x squared.
        affine: learn weight and bias.
        groups: the group of every node, where it is always the same: ids or a `Partition`. Without it, groups come with
            every call: as `groups=`, from around as `given(groups=...)`, or else they are the graphs of `batch`.
        device, dtype: of the parameters.

    Shapes: x is (nodes, channels); groups and batch are (nodes,).

    >>> norm = FeatureGroupNorm(32)
    >>> communities = torch.tensor([0, 1, 0, 1, 2, 2])
    >>> norm(torch.randn(6, 32), groups=communities).shape
    torch.Size([6, 32])

    Source: Wu and He, "Group Normalization", 2018, with groups of nodes in place of channels.
    """

    def __init__(
        self,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        *,
        groups: Label | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            "v c -> groups[v] c",
            affine="c" if affine else None,
            c=num_channels,
            labels={} if groups is None else {"groups": groups},
            eps=eps,
            device=device,
            dtype=dtype,
        )
        self.num_channels, self.affine = num_channels, affine

    def forward(  # type: ignore[override]
        self, x: Tensor, batch: Label | None = None, batch_size: int | None = None, *, groups: Label | None = None
    ) -> Tensor:
        """Normalizes x, (nodes, channels), by groups, (nodes,): those of the layer, of the call, or the graphs."""
        return super().forward(x, labels=named(batch=batch, batch_size=batch_size, groups=groups))

    def fit_given(self, call: Call, around: Mapping[str, Any]) -> Call:
        """Groups from around hold one id for every node, as a batch does."""
        told = super().fit_given(call, around)
        if "groups" in told.names and "groups" not in call.names:
            groups = _read(told.x, told.names["groups"], None, "groups", "batch_size")
            told = told._replace(names={**told.names, "groups": groups})
        return told

    def fit_call(self, call: Call) -> Call:
        """The group of every node: of the layer, of the call, or its graph."""
        if "groups" in self.labels:
            names = {name: value for name, value in call.names.items() if name == "groups"}
            return Norm.fit_call(self, call._replace(names=names))
        if "groups" in call.names:
            names = {"groups": call.names["groups"]}
            return Norm.fit_call(self, call._replace(names=names))
        return _with_graphs(call, "groups")


# --- PyG's own -------------------------------------------------------------------------------------------------------


class GraphNorm(_OfGraphs, pyg.GraphNorm):
    """PyG's `GraphNorm`: the norm of every graph and channel, by a learned share of the mean.

    For each graph and channel:   out = x - mean_scale * mean(x);   y = out / sqrt(mean(out^2) + eps) * weight + bias

    Args:
        in_channels: c; weight, bias and mean_scale have one value for each.
        eps: added to the variance, in the unit of x squared.
        device: of the parameters.

    Shapes: x is (nodes, channels), batch is (nodes,).

    >>> norm = GraphNorm(32)
    >>> norm(torch.randn(10, 32), batch=torch.arange(10) // 5).shape
    torch.Size([10, 32])

    Differs from `torch_geometric.nn.GraphNorm`: statistics in float32 or wider whatever x is, and a graph of equal
    nodes is exactly 0 while mean_scale is 1.

    Source: Cai et al., "GraphNorm: A Principled Approach to Accelerating Graph Neural Network Training", 2020.
    """

    def __init__(self, in_channels: int, eps: float = 1e-5, device: torch.device | str | None = None) -> None:
        Norm.__init__(self, "v c -> batch[v] c", affine="c", c=in_channels, eps=eps, device=device)
        self.in_channels = in_channels
        self.mean_scale = nn.Parameter(torch.ones(in_channels, device=device))

    def reset_parameters(self) -> None:
        """Weight and mean_scale 1, bias 0."""
        super().reset_parameters()
        if "mean_scale" in self._parameters:  # not while Norm is being built
            nn.init.ones_(self.mean_scale)

    def forward(  # type: ignore[override]
        self, x: Tensor, batch: Label | None = None, batch_size: int | None = None
    ) -> Tensor:
        """Normalizes x, (nodes, channels), by graphs: batch, (nodes,), and their number if batch does not show it."""
        return Norm.forward(self, x, labels=_told(batch, batch_size))

    def fit_call(self, call: Call) -> Call:
        """About a share of the mean."""
        return _with_graphs(call._replace(center=self.mean_scale))


_EACH_GRAPH = Spec.parse("v c -> batch[v] c")
_CHANNELS = _EACH_GRAPH.read("c", "affine")
_ONE_VARIANCE = (OneVariance(),)


class _OfGraphsEach(RunningStatistics):
    """Running statistics that average over graphs."""

    @torch.no_grad()
    def seen(self, layer: Any, m: Moments) -> tuple[Moments, ...]:
        """The moments, over graphs, of their means and of their unbiased variances, as far as they are known."""
        var, known = m.unbiased_var()
        return moments(m.mean, "b c, b c -> c", m.count > 0), moments(var, "b c, b c -> c", known)

    def values(self, layer: Any, *seen: Moments) -> tuple[Known, Known]:
        """The averages of means, and of variances."""
        means, variances = seen
        return (means.mean, means.count > 0), (variances.mean, variances.count > 0)


class InstanceNorm(_OfGraphs, pyg.InstanceNorm):
    """PyG's `InstanceNorm`: the norm of every graph and channel.

    For each graph b and channel c:   y = (x - mean(x[b, c])) / sqrt(var(x[b, c]) + eps) * weight[c] + bias[c]

    Args:
        in_channels: c.
        eps: added to the variance, in the unit of x squared.
        momentum: weight of the new value in the running statistics; None: the average of all batches.
        affine: learn weight and bias; by default there are none.
        track_running_stats: keep running means and (unbiased) variances, averages over graphs, and use them in
            evaluation.
        device: of parameters and buffers.

    Shapes: x is (nodes, channels), batch is (nodes,).

    >>> norm = InstanceNorm(32)
    >>> norm(torch.randn(10, 32), batch=torch.arange(10) // 5).shape
    torch.Size([10, 32])

    Differs from `torch_geometric.nn.InstanceNorm`: empty graphs do not move the running mean, nor graphs without a
    second node the running variance; running statistics stay out of the autograd graph; one node without batch gives 0
    and no error, as it does with batch.

    Source: Ulyanov et al., "Instance Normalization: The Missing Ingredient for Fast Stylization", 2016.
    """

    running_statistics = _OfGraphsEach(unseen=True)

    def __init__(
        self,
        in_channels: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = False,
        track_running_stats: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        Norm.__init__(
            self,
            "v c -> c",  # of the running statistics; a graph's own are read below
            affine="c" if affine else None,
            c=in_channels,
            track_running_stats=track_running_stats,
            momentum=momentum,
            eps=eps,
            device=device,
        )
        self.num_features, self.affine = in_channels, affine

    def forward(  # type: ignore[override]
        self, x: Tensor, batch: Label | None = None, batch_size: int | None = None
    ) -> Tensor:
        """Normalizes x, (nodes, channels), by graphs: batch, (nodes,), and their number if batch does not show it."""
        return Norm.forward(self, x, labels=_told(batch, batch_size))

    def fit_call(self, call: Call) -> Call:
        """The sets of every graph; running statistics are those of no graph."""
        if self.running_mean is not None and not self.training:
            return Norm.fit_call(self, call._replace(names={}))
        formula = self._each_graph(call.formula.options, _CHANNELS if self.affine else None)
        return _with_graphs(call._replace(formula=formula))


class LayerNorm(_OfGraphs, pyg.LayerNorm):
    """PyG's `LayerNorm`: the norm of every graph over nodes and channels, or of every node over channels.

    For each graph b (or, by mode="node", each node):   y = (x - mean(x[b])) / sqrt(var(x[b]) + eps) * weight + bias

    Args:
        in_channels: c.
        eps: added to the variance, in the unit of x squared.
        affine: learn weight and bias.
        mode: "graph" or "node", which needs no batch.
        device: of the parameters.

    Shapes: x is (nodes, channels), batch is (nodes,).

    Raises:
        SpecError: another mode, when the layer is built.

    >>> norm = LayerNorm(32)
    >>> norm(torch.randn(10, 32), batch=torch.arange(10) // 5).shape
    torch.Size([10, 32])

    Differs from `torch_geometric.nn.LayerNorm`: divides by sqrt(var + eps) without batch too (there: by std + eps);
    counts do not overflow in float16.

    Source: Ba et al., "Layer Normalization", 2016.
    """

    def __init__(
        self,
        in_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        mode: str = "graph",
        device: torch.device | str | None = None,
    ) -> None:
        if mode not in ("graph", "node"):
            raise SpecError(
                say(
                    "mode says what is normalized",
                    received=f"mode={shown(mode)}",
                    instead='mode="graph" or mode="node"',
                )
            )
        Norm.__init__(
            self,
            "v c -> batch[v]" if mode == "graph" else "... c -> ...",
            affine="c" if affine else None,
            c=in_channels,
            eps=eps,
            device=device,
        )
        self.in_channels, self.affine, self.mode = in_channels, affine, mode

    def forward(  # type: ignore[override]
        self, x: Tensor, batch: Label | None = None, batch_size: int | None = None
    ) -> Tensor:
        """Normalizes x, (nodes, channels), by graphs: batch, (nodes,), and their number if batch does not show it."""
        return Norm.forward(self, x, labels=_told(batch, batch_size))

    def fit_call(self, call: Call) -> Call:
        """The graph of every node, in that mode."""
        return call.fit(call.x, None, {}) if self.mode == "node" else _with_graphs(call)


class MeanSubtractionNorm(_OfGraphs, pyg.MeanSubtractionNorm):
    """PyG's `MeanSubtractionNorm`: subtracts the mean of every graph and channel.

    For each graph b and channel c:   y = x - mean(x[b, c])

    Shapes: x is (nodes, ...), batch is (nodes,).

    >>> MeanSubtractionNorm()(torch.tensor([[1.0], [3.0], [9.0]]), batch=torch.tensor([0, 0, 1])).flatten()
    tensor([-1.,  1.,  0.])

    Source: Yang et al., "Revisiting 'Over-smoothing' in Deep GCNs", 2020.
    """

    def __init__(self) -> None:
        Norm.__init__(self, "v ... -> batch[v] ...", scale=False)

    def forward(  # type: ignore[override]
        self, x: Tensor, batch: Label | None = None, dim_size: int | None = None
    ) -> Tensor:
        """Subtracts means from x, (nodes, ...), by graphs: batch, (nodes,), and their number, dim_size as in PyG."""
        told = {"batch": batch} if batch is not None and dim_size is None else named(batch=batch, dim_size=dim_size)
        return Norm.forward(self, x, labels=told)

    def fit_call(self, call: Call) -> Call:
        """The graph of every node."""
        return _with_graphs(call, size="dim_size")


class PairNorm(_OfGraphs, pyg.PairNorm):
    """PyG's `PairNorm`: centers every graph, then gives its nodes (or each of them) one length on average.

    For each graph b:   out = x - mean_v(x);   y = scale * out / sqrt(eps + mean_v |out[v]|^2)

    With `scale_individually`, for each node v:   y = scale * out / sqrt(eps + |out[v]|^2)

    Args:
        scale: the length.
        scale_individually: of every node by itself.
        eps: added to the mean of the squared lengths.

    Shapes: x is (nodes, channels), batch is (nodes,).

    >>> y = PairNorm(scale=2.0)(torch.randn(10, 32), batch=torch.arange(10) // 5)
    >>> y.square().sum(1)[:5].mean()
    tensor(4.0000)

    Differs from `torch_geometric.nn.PairNorm`: eps stands inside of the root with `scale_individually` too (there:
    eps + |out[v]|), so that one formula serves both; it shows where |out[v]| is near sqrt(eps) or less.

    Source: Zhao and Akoglu, "PairNorm: Tackling Oversmoothing in GNNs", 2019.
    """

    def __init__(self, scale: float = 1.0, scale_individually: bool = False, eps: float = 1e-5) -> None:
        Norm.__init__(self, "v c -> batch[v]", center=False, eps=eps)
        self.scale, self.scale_individually = scale, scale_individually

    def forward(  # type: ignore[override]
        self, x: Tensor, batch: Label | None = None, batch_size: int | None = None
    ) -> Tensor:
        """Normalizes x, (nodes, channels), by graphs: batch, (nodes,), and their number if batch does not show it."""
        return Norm.forward(self, x, labels=_told(batch, batch_size))

    def fit_call(self, call: Call) -> Call:
        """Every channel of a graph is centered, and all of them have one variance: the mean of the squared lengths."""
        call = _with_graphs(call)
        if self.scale_individually:  # centered here, and given its length in `unfit`
            return call._replace(x=_wide(call.x), formula=self._each_graph(Options(scale=False), None))
        formula = self._each_graph(Options(eps=self.eps), _CHANNELS)
        return call._replace(formula=formula, wholes=_ONE_VARIANCE, stages=((self._length(call.x), None),))

    def unfit(self, call: Call, y: Tensor) -> Tensor:
        """Every node of one length, if each of them is scaled."""
        if not self.scale_individually:
            return y
        channels = max(y.shape[-1], 1)  # a squared length is that many mean squares
        length = self._length(y) / math.sqrt(channels)
        y = normalize(y, "v c -> v", center=False, eps=self.eps / channels, weight=length, affine="c")
        return y.to(call.x.dtype)

    def _length(self, x: Tensor) -> Tensor:
        return x.new_full(x.shape[-1:], self.scale, dtype=stat_dtype(x.dtype))


class GraphSizeNorm(_OfGraphs, pyg.GraphSizeNorm):
    """PyG's `GraphSizeNorm`: divides by the root of the number of nodes of the graph.

    For each graph b of n nodes:   y = x / sqrt(n)

    Shapes: x is (nodes, channels), batch is (nodes,).

    >>> GraphSizeNorm()(torch.ones(5, 1), batch=torch.tensor([0, 1, 1, 1, 1])).flatten()
    tensor([1.0000, 0.5000, 0.5000, 0.5000, 0.5000])

    Source: Dwivedi et al., "Benchmarking Graph Neural Networks", 2020.
    """

    def __init__(self) -> None:
        Norm.__init__(self, "v c -> batch[v]", center=False, eps=0.0)

    def forward(  # type: ignore[override]
        self, x: Tensor, batch: Label | None = None, batch_size: int | None = None
    ) -> Tensor:
        """Scales x, (nodes, channels), by graphs: batch, (nodes,), and their number if batch does not show it."""
        if something_given() or not (unwatched(x) and x.dim() == 2 and x.is_floating_point()):
            return Norm.forward(self, x, labels=_told(batch, batch_size))
        # Three operations, because a batch of graphs is small.
        graphs = _read(x, batch, batch_size, "batch", "batch_size") if batch is not None else _one_graph(x)
        y = x * counts_for(graphs, x).rsqrt().index_select(0, graphs._ids).unsqueeze(-1)
        return y if y.dtype == x.dtype else y.to(x.dtype)

    def fit_call(self, call: Call) -> Call:
        """By the number of nodes of every graph, as if it were the mean square."""
        call = super().fit_call(call)
        if not isinstance(call.x, Tensor):
            return call
        size = counts_for(call.names["batch"], call.x)
        return call._replace(moments=Moments(torch.ones_like(size), torch.zeros_like(size), size))


class BatchNorm(pyg.BatchNorm):
    """PyG's `BatchNorm`: the norm of every channel over all nodes of the batch, with running statistics.

    For each channel c:   y = (x - mean(x[c])) / sqrt(var(x[c]) + eps) * weight[c] + bias[c]

    Args:
        in_channels: c.
        eps: added to the variance, in the unit of x squared.
        momentum: weight of the new value in the running statistics; None: the average of all batches.
        affine: learn weight and bias.
        track_running_stats: keep running means and (unbiased) variances, and use them in evaluation.
        allow_single_element: use them for a batch of one node, too, in training.
        device: of parameters and buffers.

    Shapes: x is (nodes, channels). There is no batch: graphs do not matter.

    Raises:
        ValueError: one node in training, as torch does; `allow_single_element` without running statistics.

    >>> norm = BatchNorm(32)
    >>> norm(torch.randn(10, 32)).shape
    torch.Size([10, 32])
    >>> list(norm.state_dict())[:2]
    ['module.weight', 'module.bias']

    Differs from `torch_geometric.nn.BatchNorm`: a batch without nodes leaves the running statistics as they are.

    Source: Ioffe and Szegedy, "Batch Normalization", 2015.
    """

    def __init__(
        self,
        in_channels: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        allow_single_element: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(in_channels, eps, momentum, affine, track_running_stats, allow_single_element, device)
        self.module = _BatchNorm1d(in_channels, eps, momentum, affine, track_running_stats, device)

    def forward(self, x: Tensor) -> Tensor:
        """Normalizes x, (nodes, channels)."""
        few = self.allow_single_element and x.shape[0] <= 1
        y: Tensor = self._modules["module"](x, running=few)  # self.module takes longer
        return y


class _BatchNorm1d(Norm, nn.BatchNorm1d):
    """What PyG keeps under the name `module`."""

    running_statistics = RunningStatistics(unseen=True)

    def __init__(
        self,
        num_features: int,
        eps: float,
        momentum: float | None,
        affine: bool,
        track_running_stats: bool,
        device: torch.device | str | None,
    ) -> None:
        Norm.__init__(
            self,
            "v c ... -> c",
            affine="c" if affine else None,
            c=num_features,
            track_running_stats=track_running_stats,
            momentum=momentum,
            eps=eps,
            device=device,
        )
        self.num_features, self.affine = num_features, affine

    extra_repr = nn.BatchNorm1d.extra_repr

    def forward(self, x: Tensor, running: bool = False) -> Tensor:  # type: ignore[override]
        mean, var = self._buffers["running_mean"], self._buffers["running_var"]
        if running and mean is not None and var is not None:
            return Norm.forward(self, x, moments=Moments(torch.ones_like(mean), mean, var))
        if self.training or mean is None:
            shape = x.shape
            one = shape[:1] == (1,) and len(shape) > 1 and x.numel() == shape[1]
            if one and (self._sharding is None or not self.ranks().groups):
                raise ValueError(f"Expected more than 1 value per channel when training, got input size {shape}")
        return Norm.forward(self, x)


class HeteroLayerNorm(Norm, pyg.HeteroLayerNorm):
    """PyG's `HeteroLayerNorm`: the norm of every node over channels, with parameters of its type.

    For each node v:   y = (x - mean(x[v])) / sqrt(var(x[v]) + eps) * weight[type, c] + bias[type, c]

    Args:
        in_channels: c.
        num_types: number of types; weight and bias are (types, channels).
        eps: added to the variance, in the unit of x squared.
        affine: learn weight and bias.
        mode: "node".
        device: of the parameters.

    Shapes: x is (nodes, channels), type_vec is (nodes,), type_ptr is (types + 1,).

    >>> norm = HeteroLayerNorm(32, num_types=2)
    >>> norm(torch.randn(5, 32), torch.tensor([0, 1, 1, 0, 1])).shape
    torch.Size([5, 32])

    Differs from `torch_geometric.nn.HeteroLayerNorm`: type_ptr has to cover all rows and all types; without parameters
    no types are needed.

    Source: Ba et al., "Layer Normalization", 2016.
    """

    def __init__(
        self,
        in_channels: int,
        num_types: int,
        eps: float = 1e-5,
        affine: bool = True,
        mode: str = "node",
        device: torch.device | str | None = None,
    ) -> None:
        if mode != "node":
            received, instead = f"mode={shown(mode)}", 'mode="node"'
            raise SpecError(say("types have parameters for nodes", received=received, instead=instead))
        Norm.__init__(
            self,
            "v c -> v",
            affine="type_vec[v] c" if affine else None,
            c=in_channels,
            labels={"type_vec": num_types} if affine else {},
            eps=eps,
            device=device,
        )
        self.in_channels, self.num_types, self.affine = in_channels, num_types, affine

    def forward(  # type: ignore[override]
        self, x: Tensor, type_vec: Label | None = None, type_ptr: Tensor | Sequence[int] | None = None
    ) -> Tensor:
        """Normalizes x, (nodes, channels), by types: type_vec, (nodes,), or type_ptr, where each begins if sorted."""
        return Norm.forward(self, x, labels=named(type_vec=type_vec, type_ptr=type_ptr))

    def fit_call(self, call: Call) -> Call:
        """The type of every node, also of where each type begins; without parameters none."""
        names = dict(call.names) if self.affine else {}
        type_ptr = names.pop("type_ptr", None)
        if type_ptr is not None:
            names["type_vec"] = _of_types(type_ptr, call.x)
        return super().fit_call(call._replace(names=names))


class HeteroBatchNorm(Norm, pyg.HeteroBatchNorm):
    """PyG's `HeteroBatchNorm`: the norm of every type and channel, with running statistics and parameters of the type.

    For each type t and channel c:   y = (x - mean(x[t, c])) / sqrt(var(x[t, c]) + eps) * weight[t, c] + bias[t, c]

    Args:
        in_channels: c.
        num_types: number of types.
        eps: added to the variance, in the unit of x squared.
        momentum: weight of the new value in the running statistics; None: the average of all batches.
        affine: learn weight and bias.
        track_running_stats: keep running means and (unbiased) variances, and use them in evaluation.
        device: of parameters and buffers.

    Shapes: x is (nodes, channels), type_vec is (nodes,); parameters and statistics are (types, channels).

    >>> norm = HeteroBatchNorm(32, num_types=2)
    >>> norm(torch.randn(5, 32), torch.tensor([0, 1, 1, 0, 1])).shape
    torch.Size([5, 32])

    Differs from `torch_geometric.nn.HeteroBatchNorm`: gradients flow through mean and variance; divides by
    sqrt(var + eps) (there: by sqrt(max(var, eps))); running variances are unbiased, as in torch; every batch counts.

    Source: Ioffe and Szegedy, "Batch Normalization", 2015.
    """

    running_statistics = RunningStatistics(unseen=True, per_set=False)

    def __init__(
        self,
        in_channels: int,
        num_types: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        Norm.__init__(
            self,
            "v c -> type_vec[v] c",
            affine="type_vec[v] c" if affine else None,
            c=in_channels,
            type_vec=num_types,
            track_running_stats=track_running_stats,
            momentum=momentum,
            eps=eps,
            device=device,
        )
        self.in_channels, self.num_types, self.affine = in_channels, num_types, affine

    def forward(self, x: Tensor, type_vec: Label | None = None) -> Tensor:  # type: ignore[override]
        """Normalizes x, (nodes, channels), by types: type_vec, (nodes,)."""
        return Norm.forward(self, x, labels=named(type_vec=type_vec))


def _of_types(type_ptr: Tensor | Sequence[int], x: Tensor) -> Partition:
    if not (is_dynamo_compiling() and isinstance(type_ptr, Tensor)):
        return Partition.from_offsets(type_ptr, device=x.device)
    ends = type_ptr.to(x.device)  # how many rows they make cannot be asked
    good = (ends[0] == 0) & (ends[-1] == x.shape[0]) & (ends.diff() >= 0).all()
    torch._assert_async(good, "flexnorm: type_ptr begins with 0, never falls, and ends with the rows of x")
    return Partition._between(ends, x.shape[0])


def _wide(x: Tensor) -> Tensor:
    """x as intermediate results of two norms are kept: they are rounded once, at the end."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x

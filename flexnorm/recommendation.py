"""`recommend`: which norm a layer, or every layer of a model, should be, and why."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from .axes import divisors
from .description import Description, KeptError, is_candidate, recognise
from .errors import ShapeError, SpecError, as_int, nearest, say, shown
from .inspection import FEW, Explanation, Report, explain, extent, formula_of, is_norm, numeral, roles
from .layers.norm import Norm
from .partition import Partition, whole
from .spec import Axis, Dots, Group, Spec
from .successors import followed

__all__ = ["Recommendation", "Recommendations", "recommend"]

SMALL = 16  # below it batch norm lost accuracy: errors of 23.7 % at 16, 24.8 % at 8 (Wu and He, table 2)

RANKS = {"images": 4, "sequences": 3, "audio": 3, "spectrograms": 4, "video": 5, "graphs": 2, "tabular": 2}
"""Kinds of data, and how many axes x has where nothing else says so."""


@dataclass(frozen=True, eq=False)
class Recommendation:
    """What a norm should be, and why. `print` it.

    Attributes:
        name: of the layer in its model; "" where it is alone.
        choice: what to write, a line of code; of a layer to keep, what it is; "not judged" of one that computes
            something that the rules are not about.
        imports: the line that makes `choice` run; "" for a layer to keep.
        keep: whether the layer is right as it is.
        kind: of what is chosen: "batch", "frozen", "group", "instance", "layer", "token", "rms", "graph", "bands",
            "frame"; "own" of a layer whose computation is its own.
        rule: the rule that decided.
        reasons: sentences, with the numbers of this layer; those that warn are the last.
        now, then: explanations of the layer and of the choice, at the same size of batch; None where the shape of its
            input is unknown. For a layer to keep they are the same.
    """

    name: str
    choice: str
    imports: str
    keep: bool
    kind: str
    rule: str
    reasons: tuple[str, ...]
    now: Explanation | None
    then: Explanation | None
    _built: Callable[[], nn.Module] = field(repr=False)

    def layer(self) -> nn.Module:
        """The layer that is chosen: new, with weight 1 and bias 0, of the device, dtype and mode of the present one,
        and with what that one has behind its norm: `convert(model, lambda name, norm: table[name].layer())` hands
        weight and bias on.

        Where that is kept, or not judged, it is that itself.
        """
        return self._built()

    def __str__(self) -> str:
        head = f"keep {self.choice}" if self.keep else self.choice
        lines = [f"{self.name}: {head}" if self.name else head]
        lines += [f"  {self.imports}"] if self.imports else []
        return "\n".join(lines + [f"  - {reason}" for reason in self.reasons])


@dataclass(frozen=True, eq=False)
class Recommendations(Report):
    """All norms of a model and what they should be, a row for each. `table["layer1.0.bn1"]` has the reasons.

    Attributes:
        columns, rows: the table.
        explanations: of the layers as they are, by their names, where they are known.
        recommendations: by the names of the layers.
    """

    recommendations: Mapping[str, Recommendation] = field(repr=False, default_factory=dict)

    def __getitem__(self, name: str) -> Recommendation:
        if name not in self.recommendations:
            near = nearest(name, self.recommendations) if isinstance(name, str) else None
            rule, instead = "a recommendation has the name of its layer", near or ", ".join(self.recommendations)
            raise SpecError(say(rule, received=shown(name), instead=instead))
        return self.recommendations[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.recommendations)

    def __len__(self) -> int:
        return len(self.recommendations)


Groups = int | Callable[[int], int]


def recommend(
    what: Any,
    *,
    batch_size: int | None = None,
    data: str = "images",
    x: Any = None,
    privacy: bool = False,
    streaming: bool = False,
    distributed: bool = False,
    groups: Groups | None = None,
) -> Any:
    """Says which norm a layer should be, or every norm of a model, with the reasons. Nothing is changed.

    The rules are `RULES`, of which the first that applies decides.

    Args:
        what: a norm of torch, of flexnorm or of PyTorch Geometric; or a model. Those of others are judged by what they
            compute, if that has a name: it is found by trying them, as `convert` does.
        batch_size: samples that are normalized together in training: of one device, if there are several. None: that
            of x. Of graphs it is their number. Only batch norms ask for it.
        data: "images" (volumes too), "video", "sequences", "audio", "spectrograms", "graphs" or "tabular".
        x: what the layer or the model is called with: a tensor, its shape, of a model a tuple of arguments or a dict of
            keywords, too. It runs once in evaluation, as in `explain`. Without it, sizes of sets are unknown.
        privacy: gradients of every sample are needed, as by Opacus.
        streaming: results may not depend on later times.
        distributed: a batch is spread over ranks, `batch_size` on each.
        groups: number of groups of what is proposed, or a function of the channels. None: `default_groups`, or fewer
            where sets would have less than 16 elements.

    Returns:
        A `Recommendation`; of a model, `Recommendations`.

    Raises:
        SpecError, ShapeError: there is no norm; a batch norm is to be judged without batch_size; an argument means
            nothing, or the model does not run on x.

    >>> print(recommend(nn.BatchNorm2d(64), batch_size=2, x=(2, 64, 8, 8)))
    ChannelGroupNorm(16, 64)
      from flexnorm.images import ChannelGroupNorm
      - A batch of 2 samples is small: below 16, batch norm lost accuracy and group norm did not (Wu and He, 2018).
      - Now sets of 128 elements, variance off by 12.5%; then of 256 elements, variance off by 8.9%.
      - Then each result depends on its own sample alone: the same in training and evaluation.
      - Running statistics go, and with them the fold into the convolution before it: use costs one more pass.
    >>> recommend(nn.LayerNorm(64), data="sequences").keep
    True

    Source: docs/choosing.md has the same rules in prose, and says which are arithmetic and which are from papers.
    """
    _check(what, batch_size, data, groups, {"privacy": privacy, "streaming": streaming, "distributed": distributed})
    norms = dict(_norms(what))
    if not norms:
        received, instead = f"{type(what).__name__} without any", "a model with norms, or the norm that it should have"
        raise SpecError(say("what is judged is a norm, or a model with norms", received=received, instead=instead))
    found = {name: _found(layer) for name, layer in norms.items()}
    seen = {} if x is None else _seen(what, x, {name: norms[name] for name, one in found.items() if one is not None})
    first = None if x is None else _samples(x)
    of_all = Facts(
        "", what, "own", data, None, None, privacy, streaming, distributed, groups, batch_size or first, _graph(x)
    )
    made: dict[str, Recommendation] = {}
    for name, layer in norms.items():
        one = found[name]
        kind, channels = (_kind(layer), _channels(layer)) if one is None else (_kind_of(one), one.shape[0])
        facts = replace(of_all, name=name, layer=layer, kind=kind, channels=channels, found=one)
        facts = _sized(facts, seen, first)
        if facts.channels is None and facts.shape is not None and len(facts.shape) > 1:
            facts = replace(facts, channels=facts.shape[-1 if facts.last else 1])
        if facts.channels is None and facts.kind in ("batch", "group", "instance"):
            facts = replace(facts, kind="own")
        made[name] = _decided(facts)
    if "" in made:
        return made[""]
    rows = tuple(_row(name, norms[name], r) for name, r in made.items())
    known = {name: r.now for name, r in made.items() if r.now is not None}
    return Recommendations(_COLUMNS, rows, known, made)


def _check(what: Any, batch_size: Any, data: Any, groups: Any, flags: Mapping[str, Any]) -> None:
    if not isinstance(what, nn.Module):
        received, instead = shown(what), "a layer or a model; explain(pattern, x) for a pattern"
        raise SpecError(say("a layer or a model is judged: an nn.Module", received=received, instead=instead))
    if batch_size is not None:
        whole(batch_size, "batch_size", 1)
    if not isinstance(data, str) or data not in RANKS:
        near = nearest(data, RANKS) if isinstance(data, str) else None
        instead = f'data="{near}"' if near else ", ".join(map(repr, RANKS))
        raise SpecError(say("data names a kind of data", received=f"data={shown(data)}", instead=instead))
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise SpecError(say(f"{name} is True or False", received=f"{name}={shown(value)}", instead=f"{name}=True"))
    if groups is not None and not callable(groups):
        whole(groups, "groups", 1)
    lazy = [
        name
        for name, m in what.named_modules()
        if is_norm(m) and any(is_lazy(p) for p in (*m.parameters(), *m.buffers()))
    ]
    if lazy:
        received, instead = ", ".join(lazy) or type(what).__name__, "one call of the model first"
        raise SpecError(say("a lazy norm gets its channels at the first call", received=received, instead=instead))


# --- what is known of a layer ----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Facts:
    """What the rules go by: a layer, its data, and what is asked for."""

    name: str
    layer: nn.Module
    kind: str
    data: str
    channels: int | None
    now: Explanation | None
    privacy: bool
    streaming: bool
    distributed: bool
    groups: Groups | None
    samples: int | None
    graph: Tensor | None = None  # of every node
    found: Description | None = None  # what a layer of others computes

    @property
    def batch(self) -> int:
        if self.samples is None:
            received = f"{self.name or 'a layer'}: {type(self.layer).__name__}, without batch_size"
            instead = "batch_size=32, say; or x, what it is called with"
            raise SpecError(
                say("a batch norm is judged by the batch it sees in training", received=received, instead=instead)
            )
        return self.samples

    @property
    def shape(self) -> tuple[int, ...] | None:
        return None if self.now is None else self.now.shape

    @property
    def rank(self) -> int:
        if self.shape is not None:
            return len(self.shape)
        places = type(self.layer).__name__[-2:]
        return {"2d": 4, "3d": 5}.get(places, RANKS[self.data] if places != "1d" or RANKS[self.data] < 4 else 3)

    @property
    def elements(self) -> float:
        """Of the smallest set, infinite where nobody knows."""
        return math.inf if self.now is None or self.now.sizes is None else self.now.sizes[0]

    @property
    def tracks(self) -> bool:
        return getattr(_inner(self.layer), "running_mean", None) is not None

    @property
    def synchronized(self) -> bool:
        """Whether its batch is that of all ranks."""
        return isinstance(self.layer, nn.SyncBatchNorm) or getattr(self.layer, "_sharding", None) is not None

    @property
    def mixes(self) -> bool:
        """Whether samples share statistics, or may, in a layer that is not judged."""
        if isinstance(self.layer, Norm):
            return any(roles(formula.spec)[:1] not in {"k", "K", "1"} for formula, _ in self.layer.patterns())
        return isinstance(self.layer, _BatchNorm)

    @property
    def masked(self) -> bool:
        """Whether it takes a mask."""
        return isinstance(self.layer, Norm) and self.layer._spec.mask is not None

    @property
    def activation(self) -> str | None:
        if self.found is not None:
            return self.found.activation
        return self.layer._options.activation if isinstance(self.layer, Norm) else None

    @property
    def behind(self) -> str:
        """What the layer has behind its norm, as layers."""
        parts = () if self.found is None else self.found.tail
        return ", ".join(type(self.layer.get_submodule(name)).__name__ for name in parts)

    @property
    def last(self) -> bool:
        """Whether channels are the last axis."""
        if self.found is not None:
            return self.found.layout == "last"
        return isinstance(self.layer, Norm) and isinstance(self.layer._spec.x.elements[-1], Group)

    @property
    def in_time(self) -> bool:
        """Whether x has a time that a set pools: some data have, and not all of their layers."""
        return self.data in ("sequences", "audio", "video", "spectrograms") and self.rank == RANKS[self.data]


def _of_pyg(layer: Any) -> str | None:
    """The name of a norm of PyTorch Geometric, or of one of ours in its place."""
    for cls in type(layer).__mro__:
        if cls.__module__.startswith("torch_geometric.nn.norm"):
            return cls.__name__
    return None


def _inner(layer: nn.Module) -> nn.Module:
    """PyG's batch norm is a module around torch's."""
    return layer.module if _of_pyg(layer) == "BatchNorm" else layer  # type: ignore[return-value]


def _norms(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module not in inside and (is_candidate(module) or _of_pyg(module) is not None):
            inside.update(module.modules())
            yield name, module


def _found(layer: nn.Module) -> Description | None:
    """What a norm of others computes, if that is known."""
    if is_norm(layer) or _of_pyg(layer) is not None:
        return None
    try:
        return recognise(layer)
    except KeptError:
        return None


def _kind_of(found: Description) -> str:
    if found.layout != "second":  # of a token or a pixel alone
        return {"layer": "token", "rms": "rms", "group": "frame"}.get(found.kind, "own")
    return {"sync": "batch", "rms": "own"}.get(found.kind, found.kind)


_PER_GRAPH = ("GraphNorm", "InstanceNorm", "LayerNorm", "PairNorm", "MeanSubtractionNorm", "GraphSizeNorm")


def _kind(layer: nn.Module) -> str:
    pyg = _of_pyg(layer)
    if pyg is not None:
        return "batch" if pyg == "BatchNorm" else "graph" if pyg in _PER_GRAPH else "own"
    formula = formula_of(layer)
    if formula is None or "forward" in layer.__dict__:
        return "own"
    if type(layer).__module__ == "flexnorm.graphs" and any(True for _ in formula.spec.sets.lookups()):
        return "graph"
    if isinstance(layer, Norm) and (layer.changes() or len(layer.patterns()) > 1):
        return "own"
    if isinstance(layer, Norm) and (layer._static or layer._conditional is not None or layer._cumulative is not None):
        return "own"
    if not formula.options.scale:
        return "own"
    kind = _of_sets(formula.spec)
    affine = layer._affine if isinstance(layer, Norm) else None
    if kind == "instance" and affine is not None and not set(affine.atoms()) <= set(formula.spec.sets.atoms()):
        kind = "token"  # "b t c -> b t", which is "n c t -> n c" but for what it calls channels
    if not formula.options.center:
        return "rms" if kind == "token" else "own"
    return kind


def _of_sets(spec: Spec) -> str:
    """The kind of a pattern, by its axes: which are kept, which are pooled, which are split."""
    if any(True for _ in spec.sets.lookups()):
        return "own"
    axes = roles(spec).translate(_AXES)
    if axes.startswith("pk") and set(axes[2:]) <= {"p"} and isinstance(spec.x.elements[0], Axis):
        return "batch"
    if not axes.startswith("k"):
        return "own"
    if "s" in axes:
        return "group" if "p" in axes else "frame"
    if isinstance(spec.x.elements[0], Dots) or axes == "kpk":
        return "token"
    return {"kp": "layer", "kpp": "layer", "kkp": "instance"}.get(axes, "own")


_AXES = str.maketrans("KP1?", "kpks")  # an ellipsis is an axis, and a split a split, like others


def _channels(layer: nn.Module) -> int | None:
    inner = _inner(layer)
    for name in ("num_channels", "num_features", "in_channels"):
        if isinstance(getattr(inner, name, None), int):
            return int(getattr(inner, name))
    if not isinstance(layer, Norm) or len(layer._spec.x.elements) < 2:
        return None
    axis = str(layer._spec.x.elements[1])
    known = layer.weight is not None and str(layer._affine) == axis
    return layer.weight.numel() if known and layer.weight is not None else layer._sizes.get(axis)


def _tensors(x: Any) -> Iterator[Tensor]:
    values = x.values() if isinstance(x, Mapping) else x if isinstance(x, (tuple, list)) else (x,)
    return (value for value in values if isinstance(value, Tensor))


def _is_shape(x: Any) -> bool:
    return isinstance(x, Sequence) and len(x) > 0 and all(as_int(size) is not None for size in x)


def _samples(x: Any) -> int | None:
    """The size of the first axis of x, or of the first tensor in it."""
    if _is_shape(x):
        return as_int(x[0])
    return next((t.shape[0] for t in _tensors(x) if t.dim()), None)


def _graph(x: Any) -> Tensor | None:
    """PyG's batch vector among the arguments: integers in one axis."""
    found = x.get("batch") if isinstance(x, Mapping) else None
    if found is None and not _is_shape(x):
        found = next((t for t in _tensors(x) if t.dim() == 1 and t.dtype == torch.int64), None)
    found = found.ids if isinstance(found, Partition) else found
    return found if isinstance(found, Tensor) else None


def _seen(what: nn.Module, x: Any, others: Mapping[str, nn.Module]) -> Mapping[str, Explanation | tuple[int, ...]]:
    """Explanations of all norms, by their names; of those of others, the shapes of what they are called with."""
    shapes: dict[str, tuple[int, ...]] = {}

    def note(name: str, layer: nn.Module, args: Any) -> None:
        if args and isinstance(args[0], Tensor):
            shapes.setdefault(name, tuple(args[0].shape))

    with ExitStack() as stack:
        for name, layer in others.items():
            stack.callback(layer.register_forward_pre_hook(partial(note, name)).remove)
        return {**_explanations(what, x), **shapes}


def _explanations(what: nn.Module, x: Any) -> Mapping[str, Explanation]:
    try:
        found = explain(what, x)
        if isinstance(found, Explanation):
            return {"": found}
        return {} if is_norm(what) else dict(found.explanations)  # several patterns of one layer
    except (SpecError, ShapeError) as error:
        if isinstance(error, SpecError) and is_norm(what) and _kind(what) in ("own", "graph"):
            return {}  # x alone does not say which sets there are
        raise
    except Exception as error:  # the model's own, of any kind
        said = f"{'x of shape ' + str(tuple(x)) if _is_shape(x) else 'x=' + shown(x)}: {type(error).__name__}: {error}"
        instead = "what it is called with: a tensor, its shape, a tuple of arguments or a dict of keywords"
        raise ShapeError(say(f"{type(what).__name__} runs once on x", received=said, instead=instead)) from error


def _sized(facts: Facts, seen: Mapping[str, Explanation | tuple[int, ...]], first: int | None) -> Facts:
    """With the sizes of its sets, at the size of batch that is asked about."""
    layer = facts.layer
    now = seen.get(facts.name) or seen.get(f"{facts.name}.module".lstrip("."))
    if isinstance(now, tuple):
        now = None if facts.found is None else _explained(facts.found, now)
    shape = None if now is None else now.shape
    norm = _inner(layer)
    if shape is not None and facts.kind in ("batch", "instance") and facts.channels not in (None, *shape[1:2]):
        kind = f"{type(layer).__name__} of {facts.channels} channels"
        rule, instead = "x has the axes (N, C, *spatial)", f"(8, {facts.channels}, 32, 32), say"
        raise ShapeError(say(rule, received=f"{kind}, x of shape {shape}", instead=instead))
    if facts.kind == "batch" and shape is not None and facts.data != "graphs" and first and facts.samples:
        if shape[0] % first == 0 and facts.samples != first:
            shape = (shape[0] // first * facts.samples, *shape[1:])
    elif shape is None and first is None:
        shape = _known(facts)
    if shape is None or (now is not None and shape == now.shape):
        return replace(facts, now=now)
    return replace(facts, now=explain(norm, shape) if facts.found is None else _explained(facts.found, shape))


def _explained(found: Description, shape: tuple[int, ...]) -> Explanation | None:
    """What a norm of others does to x of this shape, by its pattern; a frozen one has no sets."""
    if found.kind == "frozen":
        return None
    sizes = {} if found.groups is None else {"g": found.groups}
    return explain(found.pattern(found.kind), shape, center=found.center, eps=found.eps, sizes=sizes)


def _known(facts: Facts) -> tuple[int, ...] | None:
    """The shape of x where it is known without x: rows of a table, tokens."""
    if facts.kind in ("token", "rms") and facts.found is not None:
        last = facts.found.layout == "last"
        return (facts.samples or 1, *facts.found.shape, *(() if last else (1, 1)))
    if facts.kind in ("token", "rms") and hasattr(facts.layer, "normalized_shape"):
        return (facts.samples or 1, *facts.layer.normalized_shape)  # type: ignore[misc]
    places = facts.data == "tabular" and facts.kind in ("batch", "group") and facts.channels and facts.rank == 2
    samples = facts.samples if facts.kind == "batch" else facts.samples or 1
    return (samples, facts.channels) if places and samples and facts.channels else None


# --- what is proposed ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Proposal:
    """A class, and what it is built with."""

    kind: str
    module: str
    name: str
    arguments: tuple[Any, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    least: tuple[int, ...] | None = None  # a shape whose sets are as large as those of any

    @property
    def line(self) -> str:
        told = [_typed(value) for value in self.arguments]
        return f"{self.name}({', '.join(told + [f'{key}={_typed(value)}' for key, value in self.options.items()])})"

    @property
    def imports(self) -> str:
        return f"from {self.module} import {self.name}"

    def built(self, **options: Any) -> nn.Module:
        made = getattr(import_module(self.module), self.name)(*self.arguments, **self.options, **options)
        assert isinstance(made, nn.Module)
        return made

    def explained(self, facts: Facts) -> Explanation | None:
        shape = facts.shape or self.least
        if shape is None:
            return None
        told: dict[str, Any] = {}
        if self.module == "flexnorm.graphs":
            graph = facts.graph
            if graph is None or tuple(graph.shape) != shape[:1]:
                if facts.samples is None or facts.samples > shape[0]:
                    return None
                graph = torch.arange(shape[0]) * facts.samples // shape[0]  # graphs of one size, as none is known
            told = {"batch": graph.cpu()}
        found = explain(self.built(), shape, **told)
        assert isinstance(found, Explanation)
        return found


def _typed(value: Any) -> str:
    return repr(value).replace("'", '"')


def _told(facts: Facts, takes: Sequence[str]) -> dict[str, Any]:
    """The options of the layer that another takes over."""
    layer = _inner(facts.layer)
    plain = getattr(layer, "weight", None) is None
    eps: Any = layer.eps if facts.found is None else facts.found.eps
    told: dict[str, Any] = {"eps": eps, "affine": not plain}
    told["bias"] = plain or getattr(layer, "bias", None) is not None
    told |= {"activation": facts.activation, "zero_init": getattr(layer, "zero_init", False)}
    return {name: told[name] for name in takes if told[name] != _DEFAULTS[name]}


_DEFAULTS = {"eps": 1e-5, "affine": True, "bias": True, "activation": None, "zero_init": False}


def _of_module(module: str, name: str, takes: Sequence[str]) -> Callable[[Facts, int], Proposal]:
    return lambda f, g: Proposal("group", f"flexnorm.{module}", name, (g, f.channels), _told(f, takes))


def _of_frames(pattern: str, least: int | None = None) -> Callable[[Facts, int], Proposal]:
    def made(f: Facts, g: int) -> Proposal:
        told = _told(f, ("eps", "affine", "bias", "activation"))
        axes = {"affine": "(g c)"} if told.pop("affine", True) else {}
        sizes = {"sizes": {"(g c)": f.channels}} if axes else {}
        shape = None if least is None or f.channels is None else (1, f.channels, *(1,) * (least - 2))
        return Proposal("frame", "flexnorm", "Norm", (pattern,), {**axes, "g": g, **sizes, **told}, shape)

    return made


_OVER_PLACES = _of_module("images", "ChannelGroupNorm", ("eps", "affine", "bias", "activation", "zero_init"))
_OVER_TIME = _of_module("sequences", "SequenceGroupNorm", ("eps", "affine", "bias"))
_OF_GRAPHS = _of_module("graphs", "GraphGroupNorm", ("eps", "affine"))
_OF_TOKENS = _of_module("sequences", "TokenGroupNorm", ("eps", "affine", "bias"))
_OF_FRAMES = _of_frames("b (g c) t, b t -> b t g", 3)

APART: Mapping[tuple[str, bool], Callable[[Facts, int], Proposal]] = {
    ("sequences", False): _OVER_TIME,
    ("audio", False): _OVER_TIME,
    ("graphs", False): _OF_GRAPHS,
    ("graphs", True): _OF_GRAPHS,
    ("sequences", True): _OF_FRAMES,
    ("audio", True): _OF_FRAMES,
    ("video", True): _of_frames("n (g c) t h w -> n t g"),
    ("spectrograms", True): _of_frames("n (g c) f t, n t -> n t g"),
}
"""Group norms by kind of data, and whether it streams; elsewhere, and for x of other axes, `ChannelGroupNorm`."""


def _apart(facts: Facts) -> Proposal | None:
    """The group norm for this layer, with as many groups as leave sets of 16 elements."""
    channels = facts.channels
    if channels is None:
        return None
    fits = facts.rank == RANKS[facts.data]
    make = APART.get((facts.data, facts.streaming), _OVER_PLACES) if fits else _OVER_PLACES
    make = _OF_TOKENS if facts.last else make
    if facts.groups is not None:
        told = facts.groups(channels) if callable(facts.groups) else facts.groups
        count = as_int(told)
        if count is None or count < 1 or channels % count:
            where = f"groups={shown(told)}, {channels} channels{f' in {facts.name}' if facts.name else ''}"
            fit = ", ".join(map(str, divisors(channels)))
            raise ShapeError(say("groups divide the channels", received=where, instead=f"one of {fit}"))
        return make(facts, count)
    for count in (g for g in range(_most(facts, channels), 0, -1) if channels % g == 0):
        made = make(facts, count)
        then = made.explained(facts)
        if then is None or then.sizes is None or then.sizes[0] >= FEW:
            return made
    return make(facts, 1)


def _most(facts: Facts, channels: int) -> int:
    """As many groups as there are, or as `default_groups` says."""
    from .images import default_groups

    if facts.kind == "instance":
        return channels
    if facts.kind == "group" and facts.now is not None and facts.now.shape[0]:
        return facts.now.count // facts.now.shape[0]
    present = getattr(facts.layer, "num_groups", None)
    return present if isinstance(present, int) else default_groups(channels)


def _fewer(facts: Facts) -> Proposal | None:
    """The same with larger sets, if there is such a thing."""
    made = _apart(facts)
    then = None if made is None else made.explained(facts)
    return made if then is not None and then.sizes is not None and then.sizes[0] > facts.elements else None


def _bands(facts: Facts) -> Proposal:
    assert facts.shape is not None
    told = _told(facts, ("eps", "affine", "activation"))
    told |= {"affine": None} if "affine" in told else {}
    return Proposal("bands", "flexnorm.spectrograms", "MelBandNorm", (min(8, facts.shape[2]), facts.shape[2]), told)


# --- the rules -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """A condition, what follows from it, and why.

    Attributes:
        name: what a table calls it.
        kinds: of layers that it is about.
        when: whether it applies.
        because: a sentence, in which `{f}` are the facts.
        choose: what is proposed; None, or a result of None, where there is nothing better. Without it, the layer stays.
        data: kinds of data that it is about; all of them without.
        source: of what is no arithmetic.
    """

    name: str
    kinds: str
    when: Callable[[Facts], bool]
    because: str
    choose: Callable[[Facts], Proposal | None] | None = None
    data: str = " ".join(RANKS)
    source: str = ""

    def applies(self, facts: Facts) -> bool:
        return facts.kind in self.kinds.split() and facts.data in self.data.split() and self.when(facts)

    def said(self, facts: Facts) -> str:
        return self.because.format(f=facts, few=FEW, small=SMALL) + (f" ({self.source})." if self.source else ".")


def _always(_: Facts) -> bool:
    return True


RULES = (
    Rule(
        "its own",
        "own",
        _always,
        "What {f.layer.__class__.__name__} computes is its own, and is not judged: look at it with explain",
    ),
    Rule(
        "frozen",
        "frozen",
        _always,
        "It goes by running statistics that never move: a weight and a bias of each channel, and no statistics of x",
    ),
    Rule(
        "privacy",
        "batch",
        lambda f: f.privacy,
        "Samples of a batch share statistics, so that none has a gradient of its own: Opacus refuses batch norm",
        _apart,
    ),
    Rule(
        "privacy",
        "instance",
        lambda f: f.privacy and f.tracks,
        "Its running statistics are of private samples, and no noise is added to them: Opacus refuses them",
        _apart,
    ),
    Rule(
        "bands",
        "batch instance",
        lambda f: f.in_time and f.channels in (1, 2) and f.shape is not None and not f.streaming,
        "With so few channels x is a spectrogram itself, of {f.shape[2]} frequencies: in decibels, the gain of a "
        "microphone in a band is an offset, which a norm of bands takes away",
        _bands,
        data="spectrograms",
    ),
    Rule(
        "graphs",
        "batch",
        _always,
        "All nodes of a batch share statistics, and what graphs are in it changes with each: the noise is larger than "
        "that of images",
        _apart,
        data="graphs",
        source="Cai et al., 2021",
    ),
    Rule(
        "stream",
        "group instance layer",
        lambda f: f.streaming and f.in_time,
        "Its sets pool all of the time, so that a result depends on later ones: in a stream it cannot be computed",
        _apart,
    ),
    Rule(
        "padding",
        "batch group instance",
        lambda f: f.in_time and not f.masked,
        "It counts padding, so that a result depends on how long the others in its batch are: with lengths= or a mask, "
        "padding counts nowhere",
        _apart,
        data="sequences audio",
    ),
    Rule(
        "few elements",
        "group instance",
        lambda f: f.elements == 1,
        "A set has one element, which becomes 0 whatever it is",
        _fewer,
    ),
    Rule(
        "few elements",
        "group instance",
        lambda f: f.elements < FEW,
        "Sets have fewer than {few} elements, which say little of their variance",
        _fewer,
    ),
    Rule(
        "synchronized",
        "batch",
        lambda f: f.distributed and f.synchronized and f.batch < SMALL,
        "It merges the batches of all ranks: with {small} samples or more on all of them together, it is right",
        source="Wu and He, 2018",
    ),
    Rule(
        "small batch",
        "batch",
        lambda f: f.batch < SMALL,
        "A batch of {f.batch} rows gives sets of that many values, which say little of their variance",
        _apart,
        data="tabular",
    ),
    Rule(
        "small batch",
        "batch",
        lambda f: f.batch < SMALL,
        "A batch of {f.batch} samples is small: below {small}, batch norm lost accuracy and group norm did not",
        _apart,
        source="Wu and He, 2018",
    ),
    Rule(
        "large batch",
        "batch",
        _always,
        "A batch of {f.batch} rows gives every feature a set of its own, whatever the unit of the others",
        data="tabular",
    ),
    Rule(
        "large batch",
        "batch",
        _always,
        "A batch of {f.batch} samples is large: from {small} on, batch norm was a little better than group norm, and "
        "in use it folds into the convolution before it",
        source="Wu and He, 2018",
    ),
    Rule("tokens", "token rms", _always, "A token depends on itself alone: on no other, on no padding, on no batch"),
    Rule("alone", "group instance layer frame", _always, "A sample depends on itself alone, in training and in use"),
    Rule("graphs", "graph", _always, "It reads which graph a node is in: no graph depends on another"),
)
"""In this order: the first that applies, and proposes something or nothing at all, decides."""


@dataclass(frozen=True)
class Remark:
    """What else there is to say of a decision.

    Attributes:
        when: whether it is so, of the facts, the layer that is proposed (None: kept) and its explanation.
        text: a sentence, in which `{f}` are the facts, `{e}` the explanation.
    """

    when: Callable[[Facts, Proposal | None, Explanation | None], bool]
    text: str


REMARKS = (
    Remark(
        lambda f, p, e: p is not None and f.activation is not None and "activation" not in p.options,
        "Its activation, {f.activation}, comes behind it, as a layer of its own.",
    ),
    Remark(
        lambda f, p, e: p is not None and bool(f.behind),
        "Its {f.behind} comes behind it, as it did: layer() has both.",
    ),
    Remark(
        lambda f, p, e: p is not None and f.kind == "batch",
        "Then each result depends on its own sample alone: the same in training and evaluation.",
    ),
    Remark(
        lambda f, p, e: p is not None and p.kind != "bands" and f.kind == "batch" and f.tracks and f.rank > 2,
        "Running statistics go, and with them the fold into the convolution before it: use costs one more pass.",
    ),
    Remark(
        lambda f, p, e: p is None and f.tracks and f.kind in ("batch", "instance"),
        "Evaluation goes by running statistics, and differs from training.",
    ),
    Remark(
        lambda f, p, e: p is None and f.kind == "batch",
        "Samples of a batch share statistics: a result differs from batch to batch while training.",
    ),
    Remark(
        lambda f, p, e: p is None and f.kind == "batch" and f.distributed and not f.synchronized,
        "Every rank normalizes by its own batch; where the data of ranks differ, that costs accuracy "
        "(Hsieh et al., 2020).",
    ),
    Remark(
        lambda f, p, e: p is not None and f.kind == "batch" and f.distributed and not f.privacy and f.rank > 3,
        "Another way is flexnorm.conversion.SyncBatchNorm, which merges the batches of all ranks, at the price of a "
        "collective in every layer.",
    ),
    Remark(
        lambda f, p, e: f.kind == "own" and f.privacy and (f.mixes or (e is not None and e.mixes is not None)),
        "Samples share statistics in it, so that none has a gradient of its own: private training cannot have it.",
    ),
    Remark(
        lambda f, p, e: p is not None and f.data == "tabular",
        "Features share statistics then: they need one unit, as after a linear layer.",
    ),
    Remark(
        lambda f, p, e: (
            f.in_time and f.data == "spectrograms" and not f.masked and f.kind in ("batch", "group", "instance")
        ),
        "Frames of padding count, unless a mask says which they are.",
    ),
    Remark(
        lambda f, p, e: e is not None and e.sizes is not None and e.sizes[0] == 1 and f.kind != "own",
        "Sets have one element even so: it becomes 0, or a sign. This layer is better left out.",
    ),
    Remark(
        lambda f, p, e: e is not None and e.sizes is not None and 1 < e.sizes[0] < FEW,
        "That is fewer than 16 elements even so: the result is noisy. Larger sets need more channels or places.",
    ),
    Remark(
        lambda f, p, e: e is None and f.kind in ("batch", "group", "instance"),
        "How large its sets are is unknown without an x that reaches it.",
    ),
)


def _decided(facts: Facts) -> Recommendation:
    for rule in RULES:
        if not rule.applies(facts):
            continue
        made = None if rule.choose is None else rule.choose(facts)
        if made is not None or rule.choose is None:
            break
    then = facts.now if made is None else made.explained(facts)
    reasons = [rule.said(facts), *_numbers(facts.now, then, made is None)]
    reasons += [r.text.format(f=facts, e=then) for r in REMARKS if r.when(facts, made, then)]
    if made is None:
        line, imports, kind = "not judged" if facts.kind == "own" else _present(facts.layer), "", facts.kind
    else:
        line, imports, kind = made.line, made.imports, made.kind
    keep = made is None and kind != "own"
    told = (facts.name, line, imports, keep, kind, rule.name, tuple(reasons), facts.now, then)
    return Recommendation(*told, lambda: facts.layer if made is None else _like(made, facts))


def _numbers(now: Explanation | None, then: Explanation | None, keep: bool) -> Iterator[str]:
    """The sizes of sets and the errors of their variance, which `explain` knows."""
    was, will = _measured(now), _measured(then)
    if keep and was:
        yield f"Sets of {was}."
    elif was and will:
        yield f"Now sets of {was}; then of {will}."
    elif will and not keep:
        yield f"Then sets of {will}."


def _measured(e: Explanation | None) -> str:
    if e is None or e.sizes is None:
        return ""
    count = f"{extent(e.sizes)} element{'' if e.sizes[2] == 1 else 's'}"
    return count if e.error is None or math.isinf(e.error) else f"{count}, variance off by {e.error:.1%}"


def _like(made: Proposal, facts: Facts) -> nn.Module:
    layer = facts.layer
    weight = getattr(_inner(layer), "weight", None)
    placed = {} if not isinstance(weight, Tensor) else {"device": weight.device, "dtype": weight.dtype}
    built = made.built(**placed).train(layer.training)
    return built if facts.found is None else followed(facts.found, layer, built)


def _present(layer: nn.Module) -> str:
    """The layer on one line."""
    return " ".join(repr(layer).split())


_COLUMNS = ("layer", "class", "choice", "because", "elements", "then", "error", "then")


def _row(name: str, layer: nn.Module, made: Recommendation) -> tuple[str, ...]:
    def of(e: Explanation | None) -> tuple[str, str]:
        if e is None or e.sizes is None:
            return "", ""
        return numeral(e.sizes[0]), "" if e.error is None else "none" if math.isinf(e.error) else f"{e.error:.1%}"

    stays = made.keep or made.kind == "own"
    (count, error), (count_then, error_then) = of(made.now), ("", "") if stays else of(made.then)
    choice = "keep" if made.keep else made.choice
    return name, type(layer).__name__, choice, made.rule, count, count_then, error, error_then

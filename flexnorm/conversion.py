"""`convert`: the norms of a model exchanged for others, in place, with a report of every layer."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from operator import add, iadd, mul
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree

from .axes import solve
from .errors import ShapeError, SpecError, as_int, nearest, say, shown
from .functional import normalize
from .inspection import PATTERNS, Report, _arguments
from .norm import Norm
from .partition import whole
from .ranks import Sharding
from .spec import Axis, Dots, Group, Spec
from .statistics import Moments
from .transition import Transition, give_up, places, put, rebind, take_place

__all__ = ["ChannelAffine", "ConversionReport", "SyncBatchNorm", "UnitOffsetNorm", "convert", "convert_sync_batchnorm"]


class SyncBatchNorm(Norm, _BatchNorm):
    r"""Batch norm over the batches of all ranks, on every device and backend, CPU and gloo included.

    For each channel c:   y = (x - mean(x[c])) / sqrt(var(x[c]) + eps) * weight[c] + bias[c]

    Args:
        num_features: number of channels, C.
        eps: added to the variance, in the unit of x squared.
        momentum: weight of the new value in the running statistics; None: the average of all batches.
        affine: learn weight and bias, of shape (C,).
        track_running_stats: keep running means and (unbiased) variances, and use them in evaluation.
        process_group: of `torch.distributed`; None is the default one, at every call.
        device, dtype: of parameters and buffers.

    Shapes: x is (N, C, *spatial); N may differ from rank to rank, and be 0. The result is alike.

    As with `nn.SyncBatchNorm`, ranks are asked in training only, and without a process group it is batch norm.

    Raises:
        RuntimeError: another rank has failed, or a copy of the layer has no process group where the layer had one.
        ValueError: there is one value per channel, and no other rank.

    >>> norm = SyncBatchNorm(8)
    >>> norm(torch.randn(4, 8, 5, 5)).shape
    torch.Size([4, 8, 5, 5])

    Differs from `nn.SyncBatchNorm`, which is for GPUs alone: it is no subclass of it, as DistributedDataParallel takes
    one for a GPU's; and where a rank fails, all raise.

    Source: `torch.nn.SyncBatchNorm`; Ioffe and Szegedy, "Batch Normalization", 2015.
    """

    _evaluates_unseen = True

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        Norm.__init__(
            self,
            "n c ... -> c",
            affine="c" if affine else None,
            c=num_features,
            eps=eps,
            track_running_stats=track_running_stats,
            momentum=momentum,
            device=device,
            dtype=dtype,
        )
        self.num_features, self.affine = num_features, affine
        self._sharding = Sharding(self._spec, "n ...", process_group, as_torch=True)

    extra_repr = _BatchNorm.extra_repr

    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]  # torch's name
        """Normalizes x, (N, C, *spatial)."""
        one = isinstance(input, Tensor) and input.dim() > 1 and input.numel() == input.shape[1]
        if one and self.training and not self._ranks().groups:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {input.shape}")
        return Norm.forward(self, input)


class UnitOffsetNorm(Norm):
    r"""A `Norm` whose weight is learned as its difference from 1, as Gemma's RMSNorm has it.

    For each set S:   y[S] = (x[S] - mean(x[S])) / sqrt(var(x[S]) + eps) * (1 + weight) + bias

    Arguments are those of `Norm`. Checkpoints, and weight decay towards 0, mean what they meant in the model.

    >>> norm = UnitOffsetNorm("... c -> ...", affine="c", c=4, center=False, bias=False)
    >>> norm.weight
    Parameter containing:
    tensor([0., 0., 0., 0.], requires_grad=True)
    """

    def reset_parameters(self) -> None:
        """Weight 0, and the rest as in `Norm`."""
        super().reset_parameters()
        if self.weight is not None:
            nn.init.zeros_(self.weight)

    def _params(self, weight: Tensor | None, bias: Tensor | None) -> Any:
        params = super()._params(weight, bias)
        if self._affine is not None:
            own, shift = params[0]
            assert own is not None
            params[0] = (1 + own.to(torch.promote_types(own.dtype, torch.float32)), shift)
        return params


class ChannelAffine(nn.Module):
    r"""A weight and a bias for every channel, and no statistics: what batch norm in evaluation is.

    y[n, c] = x[n, c] * weight[c] + bias[c]

    Args:
        num_channels: number of channels, C.
        device, dtype: of the parameters.

    Shapes: x is (N, C, *spatial); the result is alike, and of x's dtype.

    >>> ChannelAffine(8)(torch.randn(2, 8, 5, 5)).shape
    torch.Size([2, 8, 5, 5])
    """

    def __init__(
        self, num_channels: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.num_channels = whole(num_channels, "num_channels", 1)
        self.weight = nn.Parameter(torch.ones(num_channels, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(num_channels, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Scales and shifts x, (N, C, *spatial)."""
        if x.dim() < 2 or x.shape[1] != self.num_channels:
            rule = f"x has the axes (N, C, *spatial), with C = num_channels = {self.num_channels}"
            raise ShapeError(say(rule, received=f"x of shape {tuple(x.shape)}", instead="x.movedim(-1, 1), say"))
        weight, bias = (p.view(-1, *(1,) * (x.dim() - 2)) for p in (self.weight, self.bias))
        return torch.addcmul(bias, x, weight).to(x.dtype)

    def extra_repr(self) -> str:
        """The number of channels."""
        return f"{self.num_channels}"


_Target = str | Callable[[str, nn.Module], "nn.Module | None"] | None


@dataclass(frozen=True, eq=False)
class ConversionReport(Report):
    """What became of every norm of a model, a row for each. `print` it, or show it in a notebook.

    Attributes:
        columns, rows: the table.
        changes: with a probe, the largest absolute difference between what a layer gave and what its successor gives
            for the same input, by the names of the layers; of the model's output, under "".
    """

    changes: Mapping[str, float] = field(default_factory=dict)


def convert(
    model: nn.Module,
    to: _Target | Mapping[Any, _Target] = "group",
    *,
    groups: int | str | Callable[[int], int] | Mapping[str, Any] | None = None,
    channels_per_group: int | None = None,
    where: Any = None,
    probe: Any = None,
    dry_run: bool = False,
    steps: int | None = None,
    zero_init: bool | str | Sequence[str] = False,
) -> tuple[nn.Module, ConversionReport]:
    """Exchanges the norms of a model for others: batch norms for group norms, say, or ours for torch's.

    Weight, bias and running statistics stay the same tensors, so that optimizers and checkpoints go on; so do eps,
    dtype, device, hooks, train flag and parametrizations. A layer in several places has one successor. All is checked,
    and every new layer built, before anything changes. What is not exactly a norm of torch or flexnorm, as a subclass
    with a forward of its own, is kept, unless its type or its name is a key of `to`.

    Args:
        model: changed in place, unless it is a norm itself.
        to: what norms become.
            "group": `images.ChannelGroupNorm`; where channels are the last axis, `sequences.TokenGroupNorm`.
            "batch", "instance", "layer", "rms": a `Norm`. "sync": `SyncBatchNorm`.
            "affine": `ChannelAffine`, for batch norms: running statistics folded into weight and bias. It computes what
            they compute in evaluation, in training too.
            "torch": torch's own layer, where there is one that computes the same.
            A function of name and layer that returns a layer, or None to keep it: the layer is as built, but for
            tensors of equal shapes, which are handed on.
            Several of these, by names (`"layer*.bn1"`, as in `fnmatch`) and types: the first that fits. A class that is
            not exactly torch's must be named to be converted; what it computes is then found by trying it: batch, layer
            and RMS norms with a weight or 1 + weight, channels second or last, and an activation.
        groups: number of groups: an int, a function of the channels, "gcd" for gcd(32, channels), or several of these
            by names. None: a group norm keeps its own, and others get `images.default_groups`.
        channels_per_group: in place of `groups`.
        where: which layers may change: names, types, functions of name and layer, or a list of these.
        probe: what the model is called with: a tensor, a shape, a tuple of arguments, a dict of keywords; or a function
            of the model. The model then runs as it is, in training or evaluation, without gradients, and once more with
            its new layers (before `zero_init`), for the report. Buffers, modes and random states are as before.
        dry_run: make the report only.
        steps: every new layer comes in so many training steps: see `Transition` and `finish`.
        zero_init: set the weight of the last norm in residual blocks to 0: True finds them, where torch.fx can trace
            them: the norm that ends the longer of two branches that are added. Otherwise names.

    Returns:
        The model, and what became of each of its norms.

    Raises:
        SpecError: no norm can be converted, a class that was named is no norm that we know, an argument means nothing,
            the probe does not fit. Nothing is changed then.
        ShapeError: groups do not divide the channels of a layer.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 30, 3), nn.BatchNorm2d(30))
    >>> model, report = convert(model, "group")
    >>> print(report)
    layer  from         to                groups  statistics  max change  note
    -----  -----------  ----------------  ------  ----------  ----------  ----
    1      BatchNorm2d  ChannelGroupNorm  2       dropped
    4      BatchNorm2d  ChannelGroupNorm  6       dropped
    >>> model, report = convert(model, "torch")
    >>> model[1]
    GroupNorm(2, 8, eps=1e-05, affine=True)

    Differs from Opacus' `ModuleValidator.fix`, which makes new weights; and from `nn.SyncBatchNorm` conversions, which
    take any subclass.
    """
    plan = _Plan(model, to, where)
    count = _counter(groups, channels_per_group, plan)
    changes = [change for layer in plan.layers if (change := _change(plan, layer, count)) is not None]
    if not changes:
        kept = Counter(f"{layer.cls.__name__}: {layer.note}" for layer in plan.layers).most_common(4)
        said = "; ".join(f"{number} {what}" for what, number in kept)
        received = f"{type(model).__name__}, with {said or 'no norm at all'}"
        instead = "a model with norms; to={TheClass: ...} for classes of others"
        raise SpecError(say("a model is converted that has norms which can be", received=received, instead=instead))
    if (groups is not None or channels_per_group is not None) and not any(c.target == "group" for c in changes):
        given = f"groups={shown(groups)}" if groups is not None else f"channels_per_group={shown(channels_per_group)}"
        raise SpecError(say("groups are those of group norms", received=f"{given}, to={shown(to)}", instead='"group"'))
    if steps is not None:
        for change in changes:
            change.blend(whole(steps, "steps", 1), zero_init)
    _mark_zeros(model, plan, changes, zero_init)
    found = {} if probe is None else _compared(model, changes, probe)
    report = _reported(plan, changes, found, probed=probe is not None)
    if dry_run:
        return model, report
    _without_fast_path(model, changes)
    model = put(model, {id(change.old): change.stand for change in changes})
    for change in changes:
        change.settle()
    return model, report


# --- what there is to convert ----------------------------------------------------------------------------------------

_KINDS: Mapping[type[nn.Module], tuple[str, str]] = {
    nn.GroupNorm: ("group", "second"),
    nn.LayerNorm: ("layer", "last"),
    nn.RMSNorm: ("rms", "last"),
    nn.SyncBatchNorm: ("sync", "second"),
    _BatchNorm: ("batch", "second"),
    _InstanceNorm: ("instance", "second"),
}
_RANKS = {nn.BatchNorm2d: 4, nn.BatchNorm3d: 5, nn.InstanceNorm1d: 3, nn.InstanceNorm2d: 4, nn.InstanceNorm3d: 5}
_TORCHS = {*_RANKS, nn.BatchNorm1d, nn.SyncBatchNorm, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm}
_NAMES = ("group", "batch", "sync", "instance", "layer", "rms", "affine", "torch")
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_OWN = {"weight", "bias", *_STATISTICS}


class _KeptError(Exception):
    """Why a layer stays what it is."""


@dataclass
class _Layer:
    """A norm of the model, and all its names."""

    module: nn.Module
    names: list[str]
    note: str = ""

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def cls(self) -> type[nn.Module]:
        return parametrize.type_before_parametrizations(self.module)


class _Plan:
    """The norms of a model, and what the caller says about each."""

    def __init__(self, model: nn.Module, to: Any, where: Any) -> None:
        if not isinstance(model, nn.Module):
            received, instead = f"model={shown(model)}", "convert(model, ...)"
            raise SpecError(say("what is converted is an nn.Module", received=received, instead=instead))
        self.model, self.made = model, set[int]()  # of the layers that functions return
        self.rules = list(to.items()) if isinstance(to, Mapping) else [(None, to)]
        for key, target in self.rules:
            _check_target(key, target)
        told = [key for key, _ in self.rules]
        found: dict[int, _Layer] = {}
        inside: list[str] = []  # of norms that are made of others
        for name, module in model.named_modules(remove_duplicate=False):
            if isinstance(module, Transition):
                received, instead = f"{name or 'the model'}: {shown(type(module).__name__)}", "finish(model) first"
                raise SpecError(say("a transition ends before another begins", received=received, instead=instead))
            if "parametrizations" in name.split(".") or any(name.startswith(f"{outer}.") for outer in inside):
                continue
            if type(module).__module__.startswith("flexnorm.") and any(True for _ in module.children()):
                inside.append(name)
            elif _is_candidate(module) or name in told or type(module) in told:
                found.setdefault(id(module), _Layer(module, [])).names.append(name)
        self.layers = list(found.values())
        self.where = None if where is None else list(where) if isinstance(where, (list, tuple, set)) else [where]
        for one in self.where or []:
            if not isinstance(one, str) and not callable(one):
                received, instead = f"where={shown(one)}", 'where="layer1.*", or nn.BatchNorm2d'
                rule = "where holds names, types, and functions of name and layer"
                raise SpecError(say(rule, received=received, instead=instead))
        self.check_names("to", told)
        self.check_names("where", self.where or [])

    def check_names(self, what: str, patterns: Iterable[Any]) -> None:
        """Raises where a pattern of names is that of no norm."""
        names = [name for layer in self.layers for name in layer.names]
        for pattern in patterns:
            if isinstance(pattern, str) and not any(fnmatchcase(name, pattern) for name in names):
                near = nearest(pattern, names)
                rule, received = f"names in {what}= are those of norms in the model", f"{pattern!r}, which none has"
                some = f"one of {', '.join(map(repr, names[:6]))}" if names else "a model with norms"
                raise SpecError(say(rule, received=received, instead=repr(near) if near else some))

    def rule(self, layer: _Layer) -> tuple[_Target, bool]:
        """What the layer is to become, and whether its class, or the layer itself, was named for it."""
        if self.where is not None and not any(_chosen(one, layer) for one in self.where):
            raise _KeptError("left out by where=")
        plain = layer.cls in _plain()
        for key, target in self.rules:
            if key is None:
                return target, False
            if isinstance(key, str):
                if any(fnmatchcase(name, key) for name in layer.names):
                    return target, True
            elif key is layer.cls or (plain and isinstance(layer.module, key)):
                return target, key is layer.cls
        if any(isinstance(key, type) and isinstance(layer.module, key) for key, _ in self.rules):
            raise _KeptError(_subclass(layer))
        raise _KeptError("no rule for it in to=")


def _plain() -> set[type[nn.Module]]:
    """The classes that compute what their patterns say, and nothing else."""
    from .images import ChannelGroupNorm
    from .sequences import TokenGroupNorm

    return _TORCHS | {Norm, UnitOffsetNorm, SyncBatchNorm, ChannelGroupNorm, TokenGroupNorm}


def _is_candidate(module: nn.Module) -> bool:
    if isinstance(module, (Norm, *_KINDS)):
        return True
    return "norm" in type(module).__name__.lower() and not any(True for _ in module.children())


def _check_target(key: Any, target: Any) -> None:
    if key is not None and not isinstance(key, (str, type)):
        rule, received = "keys of to= are names and types", f"{shown(key)}"
        raise SpecError(say(rule, received=received, instead='to={nn.BatchNorm2d: "group", "head.*": None}'))
    if isinstance(target, str) and target not in _NAMES:
        near = nearest(target, _NAMES)
        instead = repr(near) if near else f"one of {', '.join(map(repr, _NAMES))}; a function for a pattern of your own"
        raise SpecError(say("to= names what norms become", received=f"to={target!r}", instead=instead))
    if isinstance(target, type) or not (isinstance(target, str) or callable(target) or (target is None and key)):
        rule = "norms become what to= names, or what a function of name and layer returns"
        instead = '"group"; lambda name, norm: nn.GroupNorm(8, norm.num_features)'
        raise SpecError(say(rule, received=f"to={shown(target)}", instead=instead))


def _chosen(one: Any, layer: _Layer) -> bool:
    if isinstance(one, str):
        return any(fnmatchcase(name, one) for name in layer.names)
    if isinstance(one, type):
        return isinstance(layer.module, one)
    return any(one(name, layer.module) for name in layer.names)


def _subclass(layer: _Layer) -> str:
    known = isinstance(layer.module, (Norm, *_KINDS))
    kind = "a subclass, which may compute something else" if known else "no norm of torch or flexnorm"
    return f"{kind}; to={{{layer.cls.__name__}: ...}} converts it"


# --- what a norm is --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Source:
    """What a norm computes.

    kind: as the names of `to`.
    layout: where its channels are: "second", "last"; or "pixel", second and the only ones that are pooled.
    shape: of its weight, if it has one.
    """

    kind: str
    layout: str
    shape: tuple[int, ...]
    eps: float
    groups: int | None = None
    rank: int | None = None  # axes of x, where the class says so
    activation: str | None = None
    offset: bool = False  # its weight is 1 + weight

    @property
    def center(self) -> bool:
        return self.kind != "rms"

    def pattern(self, kind: str) -> str:
        """The pattern of a norm of this kind, over the axes of this one."""
        axes = {3: "t", 4: "h w", 5: "d h w"}.get(self.rank or 0, "...")
        second = {
            "group": "n (g c) ... -> n g",
            "batch": f"n c {axes} -> c",
            "instance": f"n c {axes} -> n c",
            "layer": f"n c {axes} -> n",
        }
        last = {
            "group": "... (g c) -> ... g",
            "batch": "... c -> c",
            "instance": "n ... c -> n c",
            "layer": f"... {' '.join(_axes(self.shape))} -> ...",
        }
        layouts = {"second": second, "pixel": {**second, "layer": "n c ... -> n ..."}, "last": last}
        return layouts[self.layout][{"rms": "layer", "sync": "batch"}.get(kind, kind)]


def _axes(shape: Sequence[int]) -> list[str]:
    return ["c"] if len(shape) == 1 else [f"c{i}" for i in range(len(shape))]


def _source(layer: _Layer, named: bool, target: str) -> _Source:
    """What a layer computes, if that is known."""
    module, cls = layer.module, layer.cls
    if cls not in _plain():
        sought = target == "rms" and ("rmsnorm" in cls.__name__.lower() or cls.__name__ == "T5LayerNorm")
        if not named and not sought:
            raise _KeptError(_subclass(layer))
        found = _recognised(module)
        if found is not None:
            return found
        if not named:
            raise _KeptError("computes nothing that flexnorm has a norm for")
        rule = "a class of others is converted where it computes batch, layer, group or RMS norm"
        instead = f"to={{{cls.__name__}: lambda name, norm: ...}} for what takes its place, or leave it out"
        received = f"{layer.name or 'the model'}: {cls.__name__}, which computes something else"
        raise SpecError(say(rule, received=received, instead=instead))
    held = {name for name, _ in module.named_parameters(recurse=False)}
    held |= {name for name, _ in module.named_buffers(recurse=False)}
    held |= {name for name, _ in module.named_children()} - {"parametrizations"}
    if held - _OWN:
        raise _KeptError(f"has {', '.join(sorted(held - _OWN))}, which its successor would lose")
    return _of_ours(module) if isinstance(module, Norm) else _of_torch(module)


def _of_torch(module: Any, kinds: Mapping[type[nn.Module], tuple[str, str]] = _KINDS) -> _Source:
    kind, cls = next((found, cls) for cls, found in kinds.items() if isinstance(module, cls))
    _, options, sizes = PATTERNS[cls](module)
    shape = getattr(module, "normalized_shape", None) or (getattr(module, "num_features", 0) or module.num_channels,)
    eps = options.eps
    if module.eps is None and module.weight is not None and module.weight.dtype == torch.float64:
        eps = torch.finfo(torch.float64).eps
    rank = next((rank for cls, rank in _RANKS.items() if isinstance(module, cls)), None)
    return _Source(*kind, tuple(shape), eps, sizes.get("g"), rank)


def _of_ours(module: Any) -> _Source:
    spec: Spec = module._spec
    sharded = module._sharding is not None and not isinstance(module, SyncBatchNorm)
    unlike = {
        "its sets are those of labels": any(True for _ in spec.sets.lookups()),
        "a weight is given at every call": module._conditional is not None,
        "it is cumulative": module._cumulative is not None,
        "its sets go on over other ranks": sharded,
        "it is called with masks": module._masked,
        "it does not scale": not module._options.scale,
    }
    for reason, holds in unlike.items():
        if holds:
            raise _KeptError(reason)
    elements = spec.x.elements
    at = [] if module._affine is None else [elements.index(e) for e in module._affine.elements if e in elements]
    if module._affine is not None and len(at) < len(module._affine.elements):
        raise _KeptError(f"its weight lies over {module._affine}")
    letters = _letters(spec)
    kind, layout, at = _form(letters, at)
    if not module._options.center:
        if kind != "layer":
            raise _KeptError("it does not center")
        kind = "rms"
    if isinstance(module, SyncBatchNorm):
        kind = "sync"
    known = solve(spec, module._sizes)
    sizes = [_size(elements[place], known, module._sizes) for place in at]
    shape = tuple(size for size in sizes if size is not None)
    if len(shape) < len(sizes):
        raise _KeptError("its number of channels is told nowhere")
    groups = None
    if kind == "group":
        inner = elements[at[0]]
        assert isinstance(inner, Group)
        groups = _size(inner.atoms[0], known, {}) or shape[0] // (_size(inner.atoms[1], known, {}) or 1)
    rank = len(elements) if not any(isinstance(e, Dots) for e in elements) else None
    offset = isinstance(module, UnitOffsetNorm)
    return _Source(kind, layout, shape, module.eps, groups, rank, module._options.activation, offset)


def _size(element: Any, known: Mapping[str, int], told: Mapping[str, int]) -> int | None:
    if isinstance(element, Axis):
        return known.get(element.name)
    sizes = [known.get(atom.name, 0) for atom in element.atoms if isinstance(atom, Axis)]
    return told.get(str(element)) or math.prod(sizes) or None


def _letters(spec: Spec) -> str:
    """A letter for each element of the left side: k kept, p pooled, s split into both; K and P of an ellipsis."""
    kept, said = list(spec.sets.atoms()), []
    for element in spec.x.elements:
        atoms = element.atoms if isinstance(element, Group) else (element,)
        parts = "".join("k" if atom in kept else "p" for atom in atoms)
        letter = "s" if parts == "kp" else parts[0] if parts and len(set(parts)) == 1 else "?"
        said.append(letter.upper() if isinstance(element, Dots) else letter)
    return "".join(said)


def _form(letters: str, at: list[int]) -> tuple[str, str, list[int]]:
    """Kind, layout, and the places of the channels, which are those of the weight if there is one."""

    def of(part: str, among: str) -> bool:
        return all(letter in among for letter in part)

    last = len(letters) - 1
    if last > 0 and of(letters[2:], "pP") and at in ([], [1]):
        kind = {"ks": "group", "kk": "instance", "kp": "layer", "pk": "batch"}.get(letters[:2])
        if kind is not None:
            return kind, "second", [1]
    if letters[:2] == "kp" and last > 1 and of(letters[2:], "kK") and at in ([], [1]):
        return "layer", "pixel", [1]
    if last > 0 and at in ([], [last]):
        if letters[last] == "s" and of(letters[:last], "kK"):
            return "group", "last", [last]
        if letters[last] == "k" and of(letters[:last], "pP"):
            return "batch", "last", [last]
        if letters[0] + letters[last] == "kk" and of(letters[1:last], "pP"):
            return "instance", "last", [last]
    pooled = [place for place, letter in enumerate(letters) if letter == "p"]
    if pooled and pooled == list(range(pooled[0], last + 1)) and of(letters[: pooled[0]], "kK") and at in ([], pooled):
        return "layer", "last", pooled
    raise _KeptError("its sets have no other name")


_ACTIVATIONS = (None, "relu", "silu", "gelu")


@torch.no_grad()
def _recognised(module: Any) -> _Source | None:
    """What a class of others computes, found by computing it in float64, with a weight and running statistics that a
    mistake shows with, on inputs about 1 and about the square root of eps."""
    weight = getattr(module, "weight", None)
    held = {name for name, _ in module.named_parameters()} | {name for name, _ in module.named_buffers()}
    eps = next((value for name in _EPS if isinstance(value := getattr(module, name, None), float)), None)
    plain = isinstance(module, nn.RMSNorm) and module.eps is None
    sized = weight if weight is not None else getattr(module, "running_mean", None)
    if held - _OWN or (eps is None and not plain) or sized is None or sized.dim() != 1 or sized.is_meta:
        return None
    channels, generator = sized.numel(), torch.Generator().manual_seed(0)
    trial = copy.deepcopy(module).to("cpu", torch.float64)
    tried = torch.finfo(torch.float64).eps if plain else eps
    assert tried is not None
    draw = partial(torch.rand, channels, generator=generator, dtype=torch.float64)
    for name, scale in {"weight": 1.0, "bias": 1.0, "running_mean": tried**0.5, "running_var": tried}.items():
        if getattr(trial, name, None) is not None:
            getattr(trial, name).copy_((0.5 + draw()) * scale)
    if isinstance(module, tuple(_KINDS)):
        base = _of_torch(module)
        sources = [base] + [replace(base, layout="pixel")] * (base.kind in ("layer", "rms"))
    else:
        sources = [
            _Source(kind, layout, (channels,), tried) for kind in ("rms", "layer") for layout in ("last", "pixel")
        ]
    for source in sources:
        shape = (3, 5, channels) if source.layout == "last" else (3, channels, *(4,) * ((source.rank or 4) - 2))
        x = torch.randn(shape, generator=generator, dtype=torch.float64) + 0.5
        inputs = [x, x * tried**0.5]
        for offset in (False, True) if weight is not None else (False,):
            for activation in _ACTIVATIONS:
                found = replace(source, eps=tried, offset=offset, activation=activation)
                if _agree(trial, found, inputs):
                    wide = sized.dtype if sized.dtype == torch.float64 else torch.float32
                    return replace(found, eps=torch.finfo(wide).eps if plain else tried)
    return None


_EPS = ("eps", "variance_epsilon", "epsilon", "variance_eps")


def _agree(trial: Any, source: _Source, inputs: Sequence[Tensor]) -> bool:
    weight, bias = trial.weight, getattr(trial, "bias", None)
    weight = weight + 1 if source.offset else weight
    names: dict[str, Any] = {"g": source.groups} if source.kind == "group" else {}
    axes = "(g c)" if source.kind == "group" else "c"
    affine = {"weight": weight, "bias": bias, "affine": axes} if weight is not None or bias is not None else {}
    options: dict[str, Any] = {"center": source.center, "eps": source.eps, "activation": source.activation}
    mean = getattr(trial, "running_mean", None)
    for training in (True, False):
        trial.train(training)
        for x in inputs:
            running = None
            if mean is not None:  # before it moves on
                running = Moments(torch.ones_like(mean), mean.clone(), trial.running_var.clone())
            try:
                theirs = trial.forward(x.clone())
            except Exception:  # whatever a class of others raises, this is no input of it
                return False
            if not isinstance(theirs, Tensor) or theirs.shape != x.shape:
                return False
            moments = running if not training else None
            pattern = source.pattern("batch" if moments is not None else source.kind)
            ours = normalize(x, pattern, moments=moments, **options, **affine, **names)
            if not torch.allclose(theirs.double(), ours, rtol=1e-5, atol=1e-5):  # it may compute in float32
                return False
    return True


# --- new layers ------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Change:
    """A layer and its successor, built and not yet in its place."""

    layer: _Layer
    target: _Target
    new: nn.Module
    stand: nn.Module  # what takes the place: the new layer, or a transition to it
    statistics: str = ""
    whole: bool = True  # the old layer is gone, and no part of the new one
    zero: bool = False

    @property
    def old(self) -> nn.Module:
        return self.layer.module

    @property
    def folded(self) -> bool:
        return self.target == "affine"

    @property
    def groups(self) -> str:
        return str(getattr(self.new, "num_groups", ""))

    def blend(self, steps: int, zero_init: Any) -> None:
        """Has the new layer come in steps."""
        rule = None
        if self.folded:
            rule, received = "a transition goes from one norm to another", 'to="affine"'
        elif zero_init is not False:
            rule, received = "a transition goes on from what is trained", f"zero_init={shown(zero_init)}"
        elif not self.whole:
            rule, received = "a transition goes to a layer that does not hold the old one", f"{self.layer.name!r}"
        if rule is not None:
            raise SpecError(say(rule, received=f"steps={steps}, {received}", instead="leave steps out"))
        self.stand = Transition(self.old, self.new, steps)
        self.layer.note = f"over {steps} steps; {self.layer.note}".rstrip("; ")

    @torch.no_grad()
    def settle(self) -> None:
        """What changes tensors and hooks of the model; the rest is done, so nothing of this fails."""
        if self.stand is not self.new:
            take_place(self.old, self.stand)
            give_up(self.old)
            give_up(self.new)
        rebind(self.stand)
        for name in ("weight", "bias") if self.folded else ():
            p, mine = self.old._parameters.get(name), self.new._parameters[name]
            if p is not None and mine is not None:
                p.copy_(mine)
                self.new._parameters[name] = p
        if self.zero:
            self.new.get_parameter("weight").zero_()
            if hasattr(self.new, "zero_init"):
                self.new.__dict__["zero_init"] = True


def _change(plan: _Plan, layer: _Layer, count: Callable[[_Layer, int, int | None], int]) -> _Change | None:
    """The change of a layer; None keeps it, and the layer has the reason as its note."""
    try:
        target, named = plan.rule(layer)
        if target is None:
            raise _KeptError("kept by to=")
        if isinstance(layer.module, LazyModuleMixin) and layer.module.has_uninitialized_params():
            rule, instead = "a lazy norm gets its channels at the first call", "one call of the model first"
            received = f"{layer.name or 'the model'}: {layer.cls.__name__}"
            raise SpecError(say(rule, received=received, instead=instead))
        if not isinstance(target, str):
            return _made_by(plan, layer, target, named)
        source = _source(layer, named, target)
        if target == "torch":
            new = _of_torchs(source, layer)
        elif target == "affine":
            new = _folded(source, layer.module, plan)
        else:
            new = _of_flexnorm(source, layer, target, count)
    except _KeptError as reason:
        layer.note = str(reason)
        return None
    statistics = "folded" if target == "affine" else _hand_on(layer.module, new)
    return _Change(layer, target, new, new, statistics)


def _made_by(plan: _Plan, layer: _Layer, make: Callable[[str, nn.Module], nn.Module | None], named: bool) -> _Change:
    old = layer.module
    if layer.cls not in _plain() and not named:
        raise _KeptError(_subclass(layer))
    new = make(layer.name, old)
    if new is None or new is old:
        raise _KeptError("kept by to=")
    rule, there = None, {id(module) for module in plan.model.modules()}
    if not isinstance(new, nn.Module):
        rule, instead = "a function in to= returns a layer, or None", "return nn.GroupNorm(8, norm.num_features)"
    elif id(new) in there or id(new) in plan.made:
        rule, instead = "a function in to= returns a new layer for every one", "build it inside of the function"
    if rule is not None:
        raise SpecError(say(rule, received=f"{layer.name or 'the model'}: {shown(new)}", instead=instead))
    assert isinstance(new, nn.Module)
    plan.made.add(id(new))
    change = _Change(layer, make, new, new, whole=there.isdisjoint(id(part) for part in new.modules()))
    if change.whole:
        like = next((t for t in (*old.parameters(), *old.buffers()) if t.is_floating_point()), None)
        if like is not None:
            new.to(like.device, like.dtype)
        change.statistics = _hand_on(old, new)
        lost = [name for name, p in old._parameters.items() if p is not None and new._parameters.get(name) is not p]
        layer.note = f"without its {', '.join(lost)}" if lost else ""
    else:
        new.training = old.training
    return change


def _hand_on(old: nn.Module, new: nn.Module) -> str:
    """Parameters, running statistics, hooks and mode; and what became of the statistics."""
    for name in ("weight", "bias"):
        if name not in new._parameters:
            continue
        if parametrize.is_parametrized(old, name):
            parametrize.register_parametrization(new, name, nn.Identity(), unsafe=True)
            new.parametrizations[name] = old.parametrizations[name]  # type: ignore[operator, index]
            continue
        p, own = old._parameters.get(name), new._parameters[name]
        if p is not None and own is not None and p.shape == own.shape:
            new._parameters[name] = p
    new.train(old.training)
    take_place(old, new)
    had, has = (getattr(layer, "running_mean", None) is not None for layer in (old, new))
    if had and has and old.running_mean.shape == new.running_mean.shape:
        for name in _STATISTICS:
            if old._buffers.get(name) is not None:
                new._buffers[name] = old._buffers[name]
        if isinstance(new, Norm):
            new._evaluates_unseen = True  # as the layer before did
        return "carried"
    return "dropped" if had else "new" if has else ""


def _options(source: _Source, module: nn.Module) -> dict[str, Any]:
    like = next((t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()), None)
    beside = {} if like is None else {"device": like.device, "dtype": like.dtype}
    return {"eps": source.eps, **beside}


def _learns(module: nn.Module) -> tuple[bool, bool]:
    """Whether a layer has a weight, and a bias."""
    return getattr(module, "weight", None) is not None, getattr(module, "bias", None) is not None


def _of_flexnorm(
    source: _Source, layer: _Layer, target: str, count: Callable[[_Layer, int, int | None], int]
) -> nn.Module:
    from .images import ChannelGroupNorm
    from .sequences import TokenGroupNorm

    module: Any = layer.module
    weight, bias = _learns(module)
    options = _options(source, module)
    rows = ("layer", "rms")
    if target not in rows and len(source.shape) > 1:
        raise _KeptError(f"its weight is of shape {list(source.shape)}, and not a value for every channel")
    if source.offset and target not in rows:
        raise _KeptError("its weight is 1 + weight, and that of others is not")
    channels = source.shape[0]
    if target == "group":
        groups = count(layer, channels, source.groups)
        if isinstance(module, (ChannelGroupNorm, TokenGroupNorm)) and groups == source.groups:
            raise _KeptError("is one already")
        options.update(affine=weight, bias=bias or not weight)
        if source.layout != "last":
            return ChannelGroupNorm(groups, channels, activation=source.activation, **options)
        if source.activation is not None:
            raise _KeptError("it has an activation")
        return TokenGroupNorm(groups, channels, **options)
    if isinstance(module, Norm) and source.kind == target:
        raise _KeptError("is one already")
    ran = source.kind in ("batch", "sync")
    tracks: dict[str, Any] = {"track_running_stats": module.track_running_stats if ran else True}
    if ran or getattr(module, "running_mean", None) is not None:
        tracks["momentum"] = module.momentum
    if target == "sync":
        if source.layout == "last" or source.activation is not None:
            raise _KeptError("a synchronized norm has its channels second, and no activation")
        made = SyncBatchNorm(
            channels, affine=weight, process_group=getattr(module, "process_group", None), **tracks, **options
        )
        if weight and not bias:
            made.register_parameter("bias", None)
        return made
    axes = _axes(source.shape)
    options.update(zip(axes, source.shape, strict=True))
    options.update(tracks if target == "batch" else {})
    options.update(affine=" ".join(axes) if weight else None, bias=bias, activation=source.activation)
    kind = UnitOffsetNorm if source.offset else Norm
    return kind(source.pattern(target), center=target != "rms", **options)


def _of_torchs(source: _Source, layer: _Layer) -> nn.Module:
    """Torch's layer that computes the same."""
    if layer.cls in _TORCHS:
        raise _KeptError("is torch's already")
    module = layer.module
    weight, bias = _learns(module)
    options = _options(source, module)
    lost = "an activation" if source.activation else "1 + weight as its weight" if source.offset else None
    if lost:
        raise _KeptError(f"torch has none with {lost}")
    made = _torchs(source, module, weight, bias, options)
    if made is None:
        raise _KeptError("torch has none that computes the same")
    if weight and not bias:
        made.register_parameter("bias", None)  # an option of few of them
    return made


def _torchs(source: _Source, module: Any, weight: bool, bias: bool, options: dict[str, Any]) -> nn.Module | None:
    shape, channels, rank = source.shape, source.shape[0], source.rank
    dims = {2: 1, 3: 1, 4: 2, 5: 3}.get(rank or 0)
    if source.layout == "last":
        options["elementwise_affine"] = weight
        if source.kind == "rms":
            return None if bias else nn.RMSNorm(list(shape), **options)
        alone = source.kind == "layer" or (source.kind == "group" and source.groups == 1)
        return nn.LayerNorm(list(shape), bias=bias or not weight, **options) if alone else None
    if source.layout == "pixel" or source.kind == "rms":
        return None
    options["affine"] = weight
    if source.kind in ("batch", "sync"):
        options.update(momentum=module.momentum, track_running_stats=module.track_running_stats)
        if source.kind == "sync":
            return nn.SyncBatchNorm(channels, process_group=module.process_group, **options)
        if dims is None:
            raise _KeptError("BatchNorm1d, 2d, 3d take so many axes, and it any number; name them: n c h w -> c")
        return getattr(nn, f"BatchNorm{dims}d")(channels, **options)  # type: ignore[no-any-return]
    if source.kind == "instance" and dims is not None and rank != 2:
        return getattr(nn, f"InstanceNorm{dims}d")(channels, **options)  # type: ignore[no-any-return]
    groups = {"instance": channels, "layer": 1}.get(source.kind, source.groups)
    assert groups is not None
    return nn.GroupNorm(groups, channels, **options)


@torch.no_grad()
def _folded(source: _Source, module: Any, plan: _Plan) -> ChannelAffine:
    """Weight and bias of a layer that evaluates by running statistics: what it makes of the mean + 1, and of 0."""
    mean, var = getattr(module, "running_mean", None), getattr(module, "running_var", None)
    if mean is None or var is None or source.layout != "second" or source.activation is not None:
        raise _KeptError("only what evaluates by running statistics, channels second, is affine")
    if parametrize.is_parametrized(module):
        raise _KeptError("its weight is parametrized")
    for p in module.parameters():
        if sum(q is p for m in plan.model.modules() for q in m._parameters.values()) > 1:
            raise _KeptError("its weight is that of another layer, too")
    weight, bias = _learns(module)
    wide = torch.float64 if mean.device.type != "mps" else torch.float32
    running = Moments(torch.ones_like(var, dtype=wide), mean.to(wide), var.to(wide))
    affine = {"weight": module.weight, "bias": module.bias, "affine": "c"} if weight or bias else {}
    points = torch.stack([mean.to(wide) + 1, mean.to(wide), torch.zeros_like(mean, dtype=wide)])
    above, at, zero = normalize(points, "n c -> c", moments=running, eps=source.eps, **affine)
    made = ChannelAffine(source.shape[0], mean.device, (module.weight if weight else mean).dtype)
    made.weight.copy_(above - at)
    made.bias.copy_(zero)
    for name, learned in (("weight", weight), ("bias", bias)):
        like = module._parameters[name]
        made.get_parameter(name).requires_grad_(like.requires_grad if learned and like is not None else False)
    made.train(module.training)
    take_place(module, made)
    return made


def _counter(groups: Any, channels_per_group: Any, plan: _Plan) -> Callable[[_Layer, int, int | None], int]:
    """The number of groups of a layer, of its channels and its own number of groups."""
    rule = None
    if groups is not None and channels_per_group is not None:
        rule, instead = "groups and channels_per_group say the same", "one of them"
    elif not (groups in (None, "gcd") or callable(groups) or isinstance(groups, Mapping) or as_int(groups) is not None):
        rule, instead = "groups is a number, a function of the channels, or a dict by names", 'groups=32, or "gcd"'
    if rule is not None:
        received = f"groups={shown(groups)}, channels_per_group={shown(channels_per_group)}"
        raise SpecError(say(rule, received=received, instead=instead))
    size = None if channels_per_group is None else whole(channels_per_group, "channels_per_group", 1)
    if isinstance(groups, Mapping):
        plan.check_names("groups", groups)

    def count(layer: _Layer, channels: int, own: int | None) -> int:
        from .images import default_groups

        name, chosen = layer.name or "the model", groups
        if isinstance(groups, Mapping):
            fits = (v for key, v in groups.items() if any(fnmatchcase(n, key) for n in layer.names))
            chosen = next(fits, None)
        if size is not None and channels % size:
            raise _indivisible(name, channels, f"channels_per_group={size}")
        if size is not None:
            return channels // size
        if chosen is None:
            return own or default_groups(channels)
        number = math.gcd(32, channels) if chosen == "gcd" else chosen(channels) if callable(chosen) else chosen
        number = whole(number, f"groups of {name}", 1)
        if channels % number:
            raise _indivisible(name, channels, f"groups={number}")
        return number

    return count


def _indivisible(name: str, channels: int, received: str) -> ShapeError:
    divisors = [d for d in range(1, channels + 1) if channels % d == 0]
    rule = f"groups divide the {channels} channels of a layer"
    instead = (
        f"one of {', '.join(map(str, divisors))}; groups={{{name!r}: {divisors[len(divisors) // 2]}}} for it alone"
    )
    return ShapeError(say(rule, received=f"{name}: {received}", instead=instead))


def _without_fast_path(model: nn.Module, changes: Sequence[_Change]) -> None:
    """torch's encoder computes LayerNorm itself in evaluation, from the weights of whatever stands there."""
    other = {id(change.old) for change in changes if not isinstance(change.stand, nn.LayerNorm)}
    for module in model.modules():
        inner = {id(child) for part in module.modules() for child in part._modules.values()}
        if isinstance(module, nn.TransformerEncoderLayer) and other & inner:
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder) and other & inner:
            module.use_nested_tensor = False


# --- a probe ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _compared(model: nn.Module, changes: Sequence[_Change], probe: Any) -> dict[str, float]:
    """The largest differences: of every new layer on what the old one is called with, and of the model."""
    at: list[str] = []
    found: dict[str, float] = {}

    def hook(change: _Change, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        at.append(f"{change.layer.name or 'the model'}: {change.new}")
        # not __call__: the new layer shares the hooks
        difference = _difference(output, change.new.forward(*args, **kwargs))
        if difference is not None:
            found[change.layer.name] = max(difference, found.get(change.layer.name, 0.0))
        at.pop()

    blind = [change for change in changes if change.statistics == "new" and not change.old.training]
    handles: list[Any] = []
    modules = [*model.modules(), *(part for change in changes for part in change.new.modules())]
    saved = places(model)
    try:
        with _undisturbed(model, modules):
            handles += [
                change.old.register_forward_hook(partial(hook, change), with_kwargs=True, prepend=True)
                for change in changes
                if change not in blind and change.whole
            ]
            before = _called(model, probe)
        while handles:
            handles.pop().remove()
        if not blind:
            with _undisturbed(model, modules):
                at.append("the model with its new layers")
                after = _called(put(model, {id(change.old): change.new for change in changes}), probe)
            change_of_model = _difference(before, after)
            if change_of_model is not None:
                found[""] = change_of_model
    except Exception as error:
        said = " ".join(str(error).split())[:200]
        rule = "the probe is what the model is called with, before and after"
        received = f"{type(error).__name__}: {said}" + (f", in {at[-1]}" if at else "")
        instead = "probe=x, a tuple of arguments, a dict of keywords, or a function of the model"
        raise SpecError(say(rule, received=received, instead=instead)) from error
    finally:
        for handle in handles:
            handle.remove()
        for module, name, child in saved:
            module._modules[name] = child
    return found


def _called(model: nn.Module, probe: Any) -> Any:
    if callable(probe):
        return probe(model)
    args, kwargs = _arguments(model, probe)
    return model(*args, **kwargs)


@contextmanager
def _undisturbed(model: nn.Module, modules: Sequence[nn.Module]) -> Iterator[None]:
    """Within, the model may run: buffers, modes, random states are as before at the end. Torch takes no fast path."""
    tensors = [(m, name, t, t.clone()) for m in modules for name, t in m._buffers.items() if t is not None]
    modes = [(module, module.training) for module in modules]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    fast = torch.backends.mha.get_fastpath_enabled()
    with torch.random.fork_rng(devices):
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
            for module, mode in modes:
                module.training = mode
            for module, name, buffer, value in tensors:
                module._buffers[name] = buffer
                if not torch.equal(buffer, value):  # one that is expanded takes no values, and mostly needs none
                    buffer.copy_(value)


def _difference(old: Any, new: Any) -> float | None:
    """The largest absolute difference of the numbers in two outputs; None if they are not alike."""
    pairs = [[leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor)] for out in (old, new)]
    if len(pairs[0]) != len(pairs[1]) or not pairs[0]:
        return None
    largest = 0.0
    for a, b in zip(*pairs, strict=True):
        if a.shape != b.shape:
            return None
        if a.numel() and (a.is_floating_point() or a.is_complex()):
            apart = (a - b).abs().max().double().item()
            largest = apart if math.isnan(apart) else max(largest, apart)
    return largest


_COLUMNS = ("layer", "from", "to", "groups", "statistics", "max change", "note")


def _reported(plan: _Plan, changes: Sequence[_Change], found: Mapping[str, float], *, probed: bool) -> ConversionReport:
    made = {id(change.layer): change for change in changes}
    rows = []
    for layer in plan.layers:
        change, notes = made.get(id(layer)), [layer.note] * bool(layer.note)
        notes += [f"also {', '.join(layer.names[1:])}"] if len(layer.names) > 1 else []
        if change is None:
            rows.append((layer.name or "(model)", _called_so(layer.module), "kept", "", "", "", "; ".join(notes)))
            continue
        if change.statistics == "new":
            notes.append("its statistics have seen nothing: calibrate(model, batches)")
        notes += ["weight 0"] if change.zero else []
        moved = _number(found[layer.name]) if layer.name in found else "not seen" if probed else ""
        cells = (_called_so(layer.module), _called_so(change.new), change.groups, change.statistics, moved)
        rows.append((layer.name or "(model)", *cells, "; ".join(notes)))
    if "" in found and not any("" in layer.names for layer in plan.layers):
        rows.append(("(model)", type(plan.model).__name__, "", "", "", _number(found[""]), "of its output"))
    return ConversionReport(_COLUMNS, tuple(rows), {}, dict(found))


def _number(value: float) -> str:
    return f"{value:.2g}"


def _called_so(module: nn.Module) -> str:
    cls = parametrize.type_before_parametrizations(module)
    return f"{cls.__name__}({str(module._spec)!r})" if cls in (Norm, UnitOffsetNorm) else cls.__name__


# --- the last norm of a residual block -------------------------------------------------------------------------------


def _mark_zeros(model: nn.Module, plan: _Plan, changes: Sequence[_Change], zero_init: Any) -> None:
    """Finds the layers whose weight becomes 0."""
    if zero_init is False:
        return
    if zero_init is True:
        named = _ends_of_branches(model, plan)
    else:
        named = [zero_init] if isinstance(zero_init, str) else list(zero_init)
        plan.check_names("zero_init", named)
    for change in changes:
        if not any(fnmatchcase(name, pattern) for name in change.layer.names for pattern in named):
            continue
        weight = change.new._parameters.get("weight")
        if weight is None or isinstance(change.new, UnitOffsetNorm):
            received, instead = f"{change.layer.name}: {change.new}", "names of layers that have one, in zero_init="
            raise SpecError(say("zero_init sets the weight of a layer to 0", received=received, instead=instead))
        change.zero = True
    if not any(change.zero for change in changes):
        received = f"zero_init={shown(zero_init)}: {', '.join(map(str, named)) or 'none'}"
        rule = "zero_init is for norms that are converted, the last ones of residual blocks"
        raise SpecError(say(rule, received=received, instead='their names: zero_init="layer*.bn2"'))


class _Tracer(fx.Tracer):
    def __init__(self, leaves: set[int]) -> None:
        super().__init__()
        self.leaves = leaves

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        ours = type(m).__module__.startswith("flexnorm.")
        return ours or id(m) in self.leaves or super().is_leaf_module(m, module_qualified_name)


def _ends_of_branches(model: nn.Module, plan: _Plan) -> list[str]:
    """Names of the norms that end the longer branch of an addition."""
    norms = {id(layer.module): layer.name for layer in plan.layers}
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


# --- batch norms over all ranks --------------------------------------------------------------------------------------


def convert_sync_batchnorm(model: nn.Module, process_group: Any = None) -> nn.Module:
    """Makes every batch norm of a model a `SyncBatchNorm`, as `nn.SyncBatchNorm.convert_sync_batchnorm` does.

    Parameters and buffers are those of the model, no copies of them, so that an optimizer keeps its own.

    Args:
        model: changed in place, unless it is a batch norm itself.
        process_group: of `torch.distributed`; None is that of an `nn.SyncBatchNorm`, otherwise the default one.

    Returns:
        The model.

    Raises:
        SpecError: a batch norm is lazy and does not know its channels yet, or computes something else than torch's.
            Nothing is changed then.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    >>> type(convert_sync_batchnorm(model)[1]).__name__, model[1].num_features
    ('SyncBatchNorm', 8)
    """
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, _BatchNorm)]
    for name, module in found:
        if isinstance(module, Norm):
            continue
        rule = None
        if isinstance(module, LazyModuleMixin):
            rule, instead = "a lazy batch norm gets its channels at the first call", "one call of the model first"
        elif type(module).forward not in (_BatchNorm.forward, nn.SyncBatchNorm.forward):
            rule = "a batch norm with a forward of its own would lose what that does"
            instead = "convert_sync_batchnorm of the parts without it; SyncBatchNorm in the class itself"
        if rule is not None:
            raise SpecError(say(rule, received=f"{name}: {type(module).__name__}", instead=instead))
    successors: dict[int, nn.Module] = {}
    for _, module in found:
        if isinstance(module, Norm):  # a drop-in of ours
            pooled = [str(atom) for atom in module._spec.x.atoms() if atom not in list(module._spec.sets.atoms())]
            module._sharding = Sharding(module._spec, pooled, process_group, as_torch=True)
        else:
            successors[id(module)] = _synchronized(module, process_group)
    model = put(model, successors)
    for new in successors.values():
        rebind(new)
    return model


def _synchronized(module: _BatchNorm, group: Any) -> SyncBatchNorm:
    options = (module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats)
    group = getattr(module, "process_group", None) if group is None else group
    made = SyncBatchNorm(*options, process_group=group, device="meta")
    _hand_on(module, made)
    return made

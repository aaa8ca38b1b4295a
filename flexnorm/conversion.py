"""`convert`: the norms of a model exchanged for others, in place, with a report of every layer."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from .description import OWN, Description, KeptError, describe, exact, recognise
from .description import UnitOffsetNorm as UnitOffsetNorm
from .errors import ShapeError, SpecError, as_int, nearest, say, shown
from .inspection import NORMS, Report
from .norm import Norm
from .partition import whole
from .places import PARAMETERS, give_up, hand_on, placed, put, rebind, refresh, take_place
from .probe import compared
from .residual import last_norms
from .successors import ChannelAffine as ChannelAffine
from .successors import folded, of_flexnorm, of_torch
from .synchronized import SyncBatchNorm as SyncBatchNorm
from .synchronized import convert_sync_batchnorm as convert_sync_batchnorm
from .transition import Transition

__all__ = ["ConversionReport", "convert"]

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
        steps: every new layer comes in so many steps of training: see `Transition`, `advance` and `finish`.
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
    model = put(model, {id(change.old): change.stand for change in changes})
    refresh(model, [change.stand for change in changes])
    for change in changes:
        change.settle()
    return model, report


# --- what there is to convert ----------------------------------------------------------------------------------------

_NAMES = ("group", "batch", "sync", "instance", "layer", "rms", "affine", "torch")


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
            raise KeptError("left out by where=")
        plain = layer.cls in exact()
        for key, target in self.rules:
            if key is None:
                return target, False
            if isinstance(key, str):
                if any(fnmatchcase(name, key) for name in layer.names):
                    return target, True
            elif key is layer.cls or (plain and isinstance(layer.module, key)):
                return target, key is layer.cls
        if any(isinstance(key, type) and isinstance(layer.module, key) for key, _ in self.rules):
            raise KeptError(_subclass(layer))
        raise KeptError("no rule for it in to=")


def _is_candidate(module: nn.Module) -> bool:
    if isinstance(module, NORMS):
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
    known = isinstance(layer.module, NORMS)
    kind = "a subclass, which may compute something else" if known else "no norm of torch or flexnorm"
    return f"{kind}; to={{{layer.cls.__name__}: ...}} converts it"


def _source(layer: _Layer, named: bool, target: str) -> Description:
    """What a layer computes, if that is known."""
    module, cls = layer.module, layer.cls
    if cls not in exact():
        sought = target == "rms" and ("rmsnorm" in cls.__name__.lower() or cls.__name__ == "T5LayerNorm")
        if not named and not sought:
            raise KeptError(_subclass(layer))
        found = recognise(module)
        if found is not None:
            return found
        if not named:
            raise KeptError("computes nothing that flexnorm has a norm for")
        rule = "a class of others is converted where it computes batch, layer, group or RMS norm"
        instead = f"to={{{cls.__name__}: lambda name, norm: ...}} for what takes its place, or leave it out"
        received = f"{layer.name or 'the model'}: {cls.__name__}, which computes something else"
        raise SpecError(say(rule, received=received, instead=instead))
    held = {name for name, _ in module.named_parameters(recurse=False)}
    held |= {name for name, _ in module.named_buffers(recurse=False)}
    held |= {name for name, _ in module.named_children()} - {"parametrizations"}
    if held - OWN:
        raise KeptError(f"has {', '.join(sorted(held - OWN))}, which its successor would lose")
    return describe(module)


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
        self.layer.note = f"over {steps} steps of advance(model); {self.layer.note}".rstrip("; ")

    @torch.no_grad()
    def settle(self) -> None:
        """What changes tensors and hooks of the model; the rest is done, so nothing of this fails."""
        if self.stand is not self.new:
            take_place(self.old, self.stand)
            give_up(self.old)
            give_up(self.new)
        rebind(self.stand)
        for name in PARAMETERS if self.folded else ():
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
            raise KeptError("kept by to=")
        if isinstance(layer.module, LazyModuleMixin) and layer.module.has_uninitialized_params():
            rule, instead = "a lazy norm gets its channels at the first call", "one call of the model first"
            received = f"{layer.name or 'the model'}: {layer.cls.__name__}"
            raise SpecError(say(rule, received=received, instead=instead))
        if not isinstance(target, str):
            return _made_by(plan, layer, target, named)
        source = _source(layer, named, target)
        if target == "torch":
            new = of_torch(source, layer.module)
        elif target == "affine":
            new = folded(source, layer.module, plan.model)
        else:
            new = of_flexnorm(source, layer.module, target, partial(count, layer))
    except KeptError as reason:
        layer.note = str(reason)
        return None
    statistics = "folded" if target == "affine" else hand_on(layer.module, new)
    return _Change(layer, target, new, new, statistics)


def _made_by(plan: _Plan, layer: _Layer, make: Callable[[str, nn.Module], nn.Module | None], named: bool) -> _Change:
    old = layer.module
    if layer.cls not in exact() and not named:
        raise KeptError(_subclass(layer))
    new = make(layer.name, old)
    if new is None or new is old:
        raise KeptError("kept by to=")
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
        new.to(**placed(old))
        change.statistics = hand_on(old, new)
        lost = [name for name, p in old._parameters.items() if p is not None and new._parameters.get(name) is not p]
        layer.note = f"without its {', '.join(lost)}" if lost else ""
    else:
        new.training = old.training
    return change


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


# --- the report ------------------------------------------------------------------------------------------------------


def _compared(model: nn.Module, changes: Sequence[_Change], probe: Any) -> dict[str, float]:
    """The largest differences, of layers by their names, and of the model by "". Statistics that are new and have seen
    nothing are compared with none."""
    blind = [change for change in changes if change.statistics == "new" and not change.old.training]
    watched = {c.layer.name: (c.old, c.new) for c in changes if c not in blind and c.whole}
    return compared(model, watched, None if blind else {id(c.old): c.new for c in changes}, probe)


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


# --- weights that become 0 -------------------------------------------------------------------------------------------


def _mark_zeros(model: nn.Module, plan: _Plan, changes: Sequence[_Change], zero_init: Any) -> None:
    """Finds the layers whose weight becomes 0."""
    if zero_init is False:
        return
    if zero_init is True:
        named = last_norms(model, {id(layer.module): layer.name for layer in plan.layers})
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

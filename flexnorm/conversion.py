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

from .axes import divisors
from .description import (
    OWN,
    Description,
    KeptError,
    check_forward,
    class_name,
    describe,
    exact,
    is_candidate,
    recognise,
)
from .description import UnitOffsetNorm as UnitOffsetNorm
from .errors import ShapeError, SpecError, as_int, nearest, say, shown
from .inspection import NORMS, Report
from .layers.norm import Norm
from .partition import whole
from .places import PARAMETERS, STATISTICS, give_up, hand_on, placed, put, rebind, refresh, set_on, take_place
from .probe import compared
from .residual import last_norms
from .successors import ChannelAffine as ChannelAffine
from .successors import NormAct as NormAct
from .successors import folded, followed, of_flexnorm, of_torch
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
            its new layers (before `zero_init`), for the report. Buffers, attributes, modes and random states (torch's,
            numpy's and Python's) are as before.
        dry_run: make the report only.
        steps: every new layer comes in so many steps of training: see `Transition`, `advance` and `finish`.
        zero_init: set the weight of the last norm in residual blocks to 0, of layers that are what they become already,
            too. True finds them, where torch.fx can trace them: the norm that ends the longer of two branches that are
            added, where the other is the block's input, through one convolution and norm at most. Norms that end other
            branches are left alone, and the report says why. Otherwise names.

    Returns:
        The model, and what became of each of its norms.

    Raises:
        SpecError: no norm can be converted, a class that was named is no norm that we know, an argument means nothing,
            the probe does not fit or has no values, a weight that changes cannot be written. Nothing is changed then.
        ShapeError: groups do not divide the channels of a layer.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 30, 3), nn.BatchNorm2d(30))
    >>> model, report = convert(model, "group")
    >>> print(report)
    layer  from         to                groups  statistics  max change  note
    -----  -----------  ----------------  ------  ----------  ----------  ----
    1      BatchNorm2d  ChannelGroupNorm  2       dropped
    4      BatchNorm2d  ChannelGroupNorm  6       dropped
    >>> model, report = convert(model, "torch")
    >>> type(model[1]).__name__, model[1].num_groups
    ('GroupNorm', 2)

    Differs from Opacus' `ModuleValidator.fix`, which makes new weights; and from `nn.SyncBatchNorm` conversions, which
    take any subclass.
    """
    _check_options(dry_run, zero_init)
    plan = _Plan(model, to, where)
    count = _counter(groups, channels_per_group, plan)
    changes = [change for layer in plan.layers if (change := _change(plan, layer, count)) is not None]
    if not changes and (zero_init is False or steps is not None):
        kept = Counter(f"{class_name(layer.module)}: {layer.note}" for layer in plan.layers).most_common(4)
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
    zeros, untraced = _marked_zeros(model, plan, changes, zero_init)
    for change in changes:
        change.check()
    found = {} if probe is None else _compared(model, changes, probe)
    report = _reported(plan, changes, found, untraced, probed=probe is not None)
    if dry_run:
        return model, report
    model = put(model, {id(change.old): change.stand for change in changes})
    refresh(model, [change.stand for change in changes])
    for change in changes:
        change.settle()
    for layer in zeros:
        _make_zero(layer.module)
    return model, report


def _check_options(dry_run: Any, zero_init: Any) -> None:
    if not isinstance(dry_run, bool):
        received, instead = f"dry_run={shown(dry_run)}", "dry_run=True, for the report alone"
        raise SpecError(say("dry_run is True or False", received=received, instead=instead))
    named = isinstance(zero_init, (list, tuple, set)) and all(isinstance(name, str) for name in zero_init)
    if not (isinstance(zero_init, (bool, str)) or named):
        rule, received = "zero_init is True, False or names of norms", f"zero_init={shown(zero_init)}"
        raise SpecError(say(rule, received=received, instead='True; "layer*.bn2"'))


# --- what there is to convert ----------------------------------------------------------------------------------------

_NAMES = ("group", "batch", "sync", "instance", "layer", "rms", "affine", "torch")


@dataclass
class _Layer:
    """A norm of the model, and all its names."""

    module: nn.Module
    names: list[str]
    inside: str = ""  # the class of what calls it by parts, not as a layer
    hints: dict[type[nn.Module], str] = field(default_factory=dict)  # of classes of others, for the whole model
    note: str = ""
    notes: list[str] = field(default_factory=list)
    meant: bool = False  # to become something; it may be it already
    zero: bool = False

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
        fused: dict[str, str] = {}  # what computes with the weights of its parts
        hints: dict[type[nn.Module], str] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            if isinstance(module, Transition):
                received, instead = f"{name or 'the model'}: {shown(type(module).__name__)}", "finish(model) first"
                raise SpecError(say("a transition ends before another begins", received=received, instead=instead))
            if "parametrizations" in name.split(".") or any(name.startswith(f"{outer}.") for outer in inside):
                continue
            made = type(module).__module__
            if made.startswith("torch.ao.nn.intrinsic."):
                fused[name] = type(module).__name__
            within = next((cls for outer, cls in fused.items() if name.startswith(f"{outer}." if outer else "")), "")
            composed = made.startswith("flexnorm.") and any(True for _ in module.children())
            if composed and not isinstance(module, NormAct):
                inside.append(name)
            if is_candidate(module) or name in told or type(module) in told:
                layer = found.setdefault(id(module), _Layer(module, [], within, hints))
                layer.names.append(name)
        self.layers = list(found.values())
        self.names = {name for layer in self.layers for name in layer.names}
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
            if isinstance(pattern, str) and not any(self.fits(name, pattern) for name in names):
                near = nearest(pattern, names)
                rule, received = f"names in {what}= are those of norms in the model", f"{pattern!r}, which none has"
                some = f"one of {', '.join(map(repr, names[:6]))}" if names else "a model with norms"
                raise SpecError(say(rule, received=received, instead=repr(near) if near else some))

    def rule(self, layer: _Layer) -> tuple[_Target, bool]:
        """What the layer is to become, and whether its class, or the layer itself, was named for it."""
        if self.where is not None and not any(_chosen(self, one, layer) for one in self.where):
            raise KeptError("left out by where=")
        fits = {name: self.rule_of(name, layer) for name in layer.names}
        first = min((place for place in fits.values() if place is not None), default=None)
        if first is not None:
            key, target = self.rules[first]
            other = next((place for place in fits.values() if place not in (None, first)), None)
            if other is not None and self.rules[other][1] is not target:
                layer.notes.append(f"the rule of {shown(key)}, before that of {shown(self.rules[other][0])}")
            return target, isinstance(key, str) or (key is not None and key is layer.cls)
        if any(isinstance(key, type) and isinstance(layer.module, key) for key, _ in self.rules):
            raise KeptError(_subclass(layer))
        raise KeptError("no rule for it in to=")

    def fits(self, name: str, pattern: str) -> bool:
        """Whether a name fits a pattern; what is the name of a layer, brackets and all, fits no other."""
        return name == pattern if pattern in self.names else fnmatchcase(name, pattern)

    def rule_of(self, name: str, layer: _Layer) -> int | None:
        """The place of the first rule that fits a layer under this name."""
        plain = layer.cls in exact()
        for place, (key, _) in enumerate(self.rules):
            if isinstance(key, str):
                fits = self.fits(name, key)
            else:
                fits = key is None or key is layer.cls or (plain and isinstance(layer.module, key))
            if fits:
                return place
        return None


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


def _chosen(plan: _Plan, one: Any, layer: _Layer) -> bool:
    if isinstance(one, str):
        return any(plan.fits(name, one) for name in layer.names)
    if isinstance(one, type):
        return isinstance(layer.module, one)
    return any(one(name, layer.module) for name in layer.names)


def _subclass(layer: _Layer) -> str:
    """Why a class of others is kept, and whether naming it would convert it."""
    check_forward(layer.module)
    if layer.cls not in layer.hints:
        known, ours = isinstance(layer.module, NORMS), layer.cls.__module__.startswith("flexnorm.")
        kind = "a subclass, which may compute something else" if known else "no norm of torch or flexnorm"
        try:
            recognise(layer.module)
            layer.hints[layer.cls] = f"{kind}; to={{{_named(layer.cls)}: ...}} converts it"
        except KeptError as reason:
            layer.hints[layer.cls] = str(reason) if ours else f"{kind}; {reason}"
    return layer.hints[layer.cls]


def _named(cls: type[nn.Module]) -> str:
    """The name of a class, with its module where torch has one of the same name."""
    return f"{cls.__module__}.{cls.__name__}" if hasattr(nn, cls.__name__) else cls.__name__


def _source(layer: _Layer, named: bool, target: str) -> Description:
    """What a layer computes, if that is known."""
    module, cls = layer.module, layer.cls
    if cls not in exact():
        sought = target == "rms" and ("rmsnorm" in cls.__name__.lower() or cls.__name__ == "T5LayerNorm")
        if not named and not sought:
            raise KeptError(_subclass(layer))
        try:
            return recognise(module, fused=target not in ("affine", "sync", "torch"))
        except KeptError as reason:
            if not named:
                raise
            rule = "what computes something else than batch, layer, group or RMS norm of x is not converted by name"
            instead = f"to={{{_named(cls)}: lambda name, norm: ...}} for what takes its place, or leave it out"
            received = f"{layer.name or 'the model'}: {_named(cls)}: {reason}"
            raise SpecError(say(rule, received=received, instead=instead)) from None
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

    @property
    def old(self) -> nn.Module:
        return self.layer.module

    @property
    def folded(self) -> bool:
        return self.target == "affine"

    @property
    def groups(self) -> str:
        return str(getattr(self.norm, "num_groups", ""))

    @property
    def norm(self) -> nn.Module:
        """The new layer, without what stands behind it."""
        return self.new.norm if isinstance(self.new, NormAct) else self.new

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

    def check(self) -> None:
        """Raises where `settle` could not write."""
        for name in PARAMETERS if self.folded else ("weight",) if self.layer.zero else ():
            p = self.old._parameters.get(name) if self.folded else self.norm._parameters[name]
            if p is not None:
                _check_writable(self.layer, name, p)

    @torch.no_grad()
    def settle(self) -> None:
        """What changes tensors and hooks of the model; the rest is done, so nothing of this fails."""
        if self.stand is not self.new:
            take_place(self.old, self.stand)
            give_up(self.old)
            give_up(self.new)
        rebind(self.stand)
        for name in PARAMETERS if self.folded else ():
            p, mine = self.old._parameters.get(name), self.norm._parameters[name]
            if p is not None and mine is not None:
                p.copy_(mine)
                self.norm._parameters[name] = p
        if self.layer.zero:
            _make_zero(self.norm)


def _change(plan: _Plan, layer: _Layer, count: Callable[[_Layer, int, int | None], int]) -> _Change | None:
    """The change of a layer; None keeps it, and the layer has the reason as its note."""
    try:
        target, named = plan.rule(layer)
        if target is None:
            raise KeptError("kept by to=")
        if layer.inside:
            raise KeptError(f"part of {layer.inside}, which computes with it by itself")
        if not (named and callable(target)):
            check_forward(layer.module)
        layer.meant = True
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
    new = followed(source, layer.module, new)
    statistics = _handed_on(layer.module, new, folded=target == "affine")
    change = _Change(layer, target, new, new, statistics)
    layer.notes += _lost(layer, change)
    if source.tail:
        parts = ", ".join(type(layer.module.get_submodule(name)).__name__ for name in source.tail)
        layer.notes.append(f"{parts} behind it, so its keys are {f'{layer.name}.norm.'.lstrip('.')}*")
    return change


def _handed_on(old: nn.Module, new: nn.Module, *, folded: bool = False) -> str:
    """Gives the new layer what the old one has, and says what became of its statistics."""
    norm = new.norm if isinstance(new, NormAct) else new
    statistics = "folded" if folded else hand_on(old, norm)
    if norm is not new:
        give_up(norm)
        take_place(old, new)
    return statistics


def _lost(layer: _Layer, change: _Change) -> list[str]:
    """What becomes another thing, or nothing, of the tensors and attributes of a layer."""
    old, there = layer.module, list(change.new.modules())
    if any(part is old for part in there):
        return []
    notes, kept = [], {id(p) for p in (*change.new.parameters(), *change.new.buffers())}
    held = {name: t for name, t in (*old.named_parameters(), *old.named_buffers()) if name not in STATISTICS}
    lost = [name for name, t in held.items() if id(t) not in kept]
    mine = {name: change.norm._parameters.get(name) for name in lost}
    learned = [name for name, p in mine.items() if p is not None and name in old._buffers]
    if change.folded:
        lost = []
    elif learned:
        lost = [name for name in lost if name not in learned]
        notes.append(f"its {', '.join(learned)} can be learned now")
    lost += [name for name in set_on(old) if name not in change.new.__dict__]
    return [*notes, f"without its {', '.join(lost)}"] if lost else notes


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
    for part in [new] if change.whole or isinstance(new, NormAct) else new.modules():
        if there.isdisjoint(id(inner) for inner in part.modules()):
            part.to(**placed(old))
            part.train(old.training)
    new.training = old.training
    if change.whole or isinstance(new, NormAct):
        change.whole, change.statistics = True, _handed_on(old, new)
    elif all(part is not old for part in new.modules()):
        take_place(old, new)
        change.statistics = "dropped" if getattr(old, "running_mean", None) is not None else ""
    layer.notes += _lost(layer, change)
    return change


def _counter(groups: Any, channels_per_group: Any, plan: _Plan) -> Callable[[_Layer, int, int | None], int]:
    """The number of groups of a layer, of its channels and its own number of groups."""
    rule = None
    if groups is not None and channels_per_group is not None:
        rule, instead = "groups and channels_per_group say the same", "one of them"
    elif not (groups is None or callable(groups) or isinstance(groups, Mapping) or _is_number_or_gcd(groups)):
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
            fits = (v for key, v in groups.items() if any(plan.fits(n, key) for n in layer.names))
            chosen = next(fits, None)
        if size is not None and channels % size:
            raise _indivisible(name, channels, f"channels_per_group={size}")
        if size is not None:
            return channels // size
        if chosen is None:
            return own or default_groups(channels)
        number = math.gcd(32, channels) if _is_gcd(chosen) else chosen(channels) if callable(chosen) else chosen
        number = whole(number, f"groups of {name}", 1)
        if channels % number:
            raise _indivisible(name, channels, f"groups={number}")
        return number

    return count


def _is_number_or_gcd(groups: Any) -> bool:
    return _is_gcd(groups) or as_int(groups) is not None


def _is_gcd(groups: Any) -> bool:
    return isinstance(groups, str) and groups == "gcd"


def _indivisible(name: str, channels: int, received: str) -> ShapeError:
    fit = divisors(channels)
    rule = f"groups divide the {channels} channels of a layer"
    instead = f"one of {', '.join(map(str, fit))}; groups={{{name!r}: {fit[len(fit) // 2]}}} for it alone"
    return ShapeError(say(rule, received=f"{name}: {received}", instead=instead))


# --- the report ------------------------------------------------------------------------------------------------------


def _compared(model: nn.Module, changes: Sequence[_Change], probe: Any) -> dict[str, float]:
    """The largest differences, of layers by their names, and of the model by "". Statistics that are new and have seen
    nothing are compared with none."""
    blind = [change for change in changes if change.statistics == "new" and not change.old.training]
    watched = {c.layer.name: (c.old, c.new) for c in changes if c not in blind and c.whole}
    return compared(model, watched, None if blind else {id(c.old): c.new for c in changes}, probe)


_COLUMNS = ("layer", "from", "to", "groups", "statistics", "max change", "note")


def _reported(
    plan: _Plan, changes: Sequence[_Change], found: Mapping[str, float], untraced: Mapping[str, str], *, probed: bool
) -> ConversionReport:
    made = {id(change.layer): change for change in changes}
    rows = []
    for layer in plan.layers:
        change, notes = made.get(id(layer)), [layer.note] * bool(layer.note) + layer.notes
        notes += [f"also {', '.join(layer.names[1:])}"] if len(layer.names) > 1 else []
        notes += ["weight 0"] if layer.zero else []
        if change is None:
            rows.append((layer.name or "(model)", _called_so(layer.module), "kept", "", "", "", "; ".join(notes)))
            continue
        if change.statistics == "new":
            notes.append("its statistics have seen nothing: calibrate(model, batches)")
        moved = _number(found[layer.name]) if layer.name in found else "not seen" if probed else ""
        cells = (_called_so(layer.module), _called_so(change.new), change.groups, change.statistics, moved)
        rows.append((layer.name or "(model)", *cells, "; ".join(notes)))
    if "" in found and not any("" in layer.names for layer in plan.layers):
        rows.append(("(model)", type(plan.model).__name__, "", "", "", _number(found[""]), "of its output"))
    for name, said in untraced.items():
        note = f"zero_init: torch.fx cannot trace {said}"
        rows.append((name or "(model)", said.partition(":")[0], "", "", "", "", note))
    return ConversionReport(_COLUMNS, tuple(rows), {}, dict(found))


def _number(value: float) -> str:
    return f"{value:.2g}"


def _called_so(module: nn.Module) -> str:
    if isinstance(module, NormAct):
        return ", ".join(map(_called_so, module))
    cls = parametrize.type_before_parametrizations(module)
    return f"{cls.__name__}({str(module._spec)!r})" if cls in (Norm, UnitOffsetNorm) else class_name(module)


# --- weights that become 0 -------------------------------------------------------------------------------------------


def _marked_zeros(
    model: nn.Module, plan: _Plan, changes: Sequence[_Change], zero_init: Any
) -> tuple[list[_Layer], dict[str, str]]:
    """Marks the layers whose weight becomes 0: those of them that are kept; and what torch.fx cannot trace."""
    if zero_init is False:
        return [], {}
    untraced: dict[str, str] = {}
    if zero_init is True:
        ends = last_norms(model, {id(layer.module): layer.name for layer in plan.layers})
        named, untraced = ends.norms, ends.untraced
        for layer in plan.layers:
            if layer.name in ends.left:
                layer.notes.append(f"zero_init: {ends.left[layer.name]}")
    else:
        named = [zero_init] if isinstance(zero_init, str) else list(zero_init)
        plan.check_names("zero_init", named)
    new = {id(change.layer): change.norm for change in changes}
    kept = []
    for layer in plan.layers:
        if not any(plan.fits(name, pattern) for name in layer.names for pattern in named):
            continue
        stays = id(layer) not in new
        if stays and not (layer.meant and layer.cls in exact()):
            layer.notes.append("zero_init: what it computes with a weight of 0 is not known")
            continue
        norm = new.get(id(layer), layer.module)
        weight = norm._parameters.get("weight")
        if weight is None or isinstance(norm, UnitOffsetNorm):
            received, instead = f"{layer.name}: {norm}", "names of layers that have one, in zero_init="
            raise SpecError(say("zero_init sets the weight of a layer to 0", received=received, instead=instead))
        layer.zero = True
        if stays:
            _check_writable(layer, "weight", weight)
            kept.append(layer)
    if not any(layer.zero for layer in plan.layers):
        received = f"zero_init={shown(zero_init)}: {', '.join(map(str, named)) or 'none'}"
        rule = "zero_init is for norms that are converted, or are what they become already"
        raise SpecError(say(rule, received=received, instead='their names: zero_init="layer*.bn2"'))
    return kept, untraced


@torch.no_grad()
def _make_zero(norm: nn.Module) -> None:
    norm.get_parameter("weight").zero_()
    if hasattr(norm, "zero_init"):
        norm.__dict__["zero_init"] = True


def _check_writable(layer: _Layer, name: str, p: torch.Tensor) -> None:
    """Raises where the values of a parameter cannot be changed in place."""
    kind = None
    if p.is_inference() and not torch.is_inference_mode_enabled():
        kind, instead = "an inference tensor", "convert within torch.inference_mode(), or a model made outside of it"
    elif any(size > 1 and not stride for size, stride in zip(p.shape, p.stride(), strict=True)):
        kind, instead = "expanded: its values are one", "nn.Parameter(weight.clone())"
    if kind is not None:
        received = f"{name} of {layer.name or 'the model'}, {kind}"
        raise SpecError(say("a weight that changes can be written", received=received, instead=instead))

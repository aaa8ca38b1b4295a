"""What a norm computes, whoever wrote it: torch's and flexnorm's by their patterns, those of others by trial."""

from __future__ import annotations

import copy
import inspect
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .axes import solve
from .calls.arguments import Param
from .calls.functional import normalize
from .inspection import NORMS, PATTERNS, roles
from .layers.norm import Norm
from .layers.synchronized import SyncBatchNorm
from .places import PARAMETERS, STATISTICS
from .spec import Axis, Dots, Group, Spec
from .statistics import Moments

__all__ = ["UnitOffsetNorm"]

OWN = {*PARAMETERS, *STATISTICS}
"""What a norm may hold; with anything else it is another thing."""

RANKS = {nn.BatchNorm2d: 4, nn.BatchNorm3d: 5, nn.InstanceNorm1d: 3, nn.InstanceNorm2d: 4, nn.InstanceNorm3d: 5}
TORCHS = {*RANKS, nn.BatchNorm1d, nn.SyncBatchNorm, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm}


class KeptError(Exception):
    """Why a layer stays what it is."""


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

    @property
    def stages(self) -> tuple[Param, ...]:
        """The learned weight and bias."""
        return tuple(
            (None if weight is None else 1 + weight.to(torch.promote_types(weight.dtype, torch.float32)), bias)
            for weight, bias in super().stages
        )


@dataclass(frozen=True)
class Description:
    """What a norm computes.

    kind: as `to` in `convert` names it; or "frozen", a batch norm that always goes by its running statistics.
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
    tail: tuple[str, ...] = ()  # its own layers behind the norm, by their names

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
            "layer": f"... {' '.join(axes_of(self.shape))} -> ...",
        }
        layouts = {"second": second, "pixel": {**second, "layer": "n c ... -> n ..."}, "last": last}
        return layouts[self.layout][{"rms": "layer", "sync": "batch", "frozen": "batch"}.get(kind, kind)]


def axes_of(shape: Sequence[int]) -> list[str]:
    """Names for the axes of a weight."""
    return ["c"] if len(shape) == 1 else [f"c{i}" for i in range(len(shape))]


def exact() -> set[type[nn.Module]]:
    """The classes that compute what their patterns say, and nothing else."""
    from .images import ChannelGroupNorm
    from .sequences import TokenGroupNorm

    return TORCHS | {Norm, UnitOffsetNorm, SyncBatchNorm, ChannelGroupNorm, TokenGroupNorm}


def is_candidate(module: nn.Module) -> bool:
    """Whether a module may be a norm: by its class, or by its name, where no layer inside of it holds anything."""
    if isinstance(module, NORMS):
        return True
    inside = (child for child in module.children() if any(True for _ in child.state_dict()))
    return "norm" in class_name(module).lower() and not any(True for _ in inside)


def class_name(module: Any) -> str:
    """The name of its class; of a scripted module, of the class that was scripted."""
    if isinstance(module, torch.jit.ScriptModule):
        return str(getattr(module, "original_name", type(module).__name__))
    return parametrize.type_before_parametrizations(module).__name__


def check_forward(module: nn.Module) -> None:
    """Raises `KeptError` where what a layer is called with is more than its class says."""
    if isinstance(module, torch.jit.ScriptModule):
        raise KeptError("scripted")
    if "forward" in module.__dict__:
        raise KeptError("its forward was replaced")


# --- by patterns -----------------------------------------------------------------------------------------------------


def describe(module: Any) -> Description:
    """What a norm of torch or flexnorm computes. Raises `KeptError` where no kind of norm is like that."""
    if isinstance(module, Norm):
        _check(module)
        spec, options, sizes, eps = module._spec, module._options, module._sizes, module.eps
        weight = () if module._affine is None else module._affine.elements
        rank = None if any(isinstance(e, Dots) for e in spec.x.elements) else len(spec.x.elements)
    else:
        text, options, sizes = next(formed for cls, formed in PATTERNS.items() if isinstance(module, cls))(module)
        spec, sizes, eps, weight = Spec.parse(text), sizes or {"c": module.num_features}, options.eps, ()
        if module.eps is None and module.weight is not None and module.weight.dtype == torch.float64:
            eps = torch.finfo(torch.float64).eps
        rank = next((rank for cls, rank in RANKS.items() if isinstance(module, cls)), None)
    elements = spec.x.elements
    at = [elements.index(element) for element in weight if element in elements]
    if len(at) < len(weight):
        raise KeptError(f"its weight lies over {module._affine}")
    kind, layout, at = _form(roles(spec), at)
    if not options.center:
        if kind != "layer":
            raise KeptError("it does not center")
        kind = "rms"
    kind = "sync" if isinstance(module, (SyncBatchNorm, nn.SyncBatchNorm)) else kind
    known = solve(spec, sizes)
    shape = tuple(size for place in at if (size := _size(elements[place], known, sizes)) is not None)
    if len(shape) < len(at):
        raise KeptError("its number of channels is told nowhere")
    if 0 in shape:
        raise KeptError("it has no channels")
    groups = None
    if kind == "group":
        inner = elements[at[0]]
        assert isinstance(inner, Group)
        groups = _size(inner.atoms[0], known, {}) or shape[0] // (_size(inner.atoms[1], known, {}) or 1)
    return Description(kind, layout, shape, eps, groups, rank, options.activation, isinstance(module, UnitOffsetNorm))


def _check(module: Norm) -> None:
    unlike = {
        "its sets are those of labels": any(True for _ in module._spec.sets.lookups()),
        "a weight is given at every call": module._conditional is not None,
        "it is cumulative": module._cumulative is not None,
        "its sets go on over other ranks": module._sharding is not None and not isinstance(module, SyncBatchNorm),
        "it is called with masks": module.__dict__.get("_masked", False),
        "it does not scale": not module._options.scale,
        "its variance is not the biased one": module._options.correction != 0,
    }
    for reason, holds in unlike.items():
        if holds:
            raise KeptError(reason)


def _size(element: Any, known: Mapping[str, int], told: Mapping[str, int]) -> int | None:
    if isinstance(element, Axis):
        return known.get(element.name)
    sizes = [known.get(atom.name, 0) for atom in element.atoms if isinstance(atom, Axis)]
    return told.get(str(element)) or math.prod(sizes) or None


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
    raise KeptError("its sets have no other name")


# --- by trial --------------------------------------------------------------------------------------------------------

_ACTIVATIONS = (None, "relu", "silu", "gelu")


_NOTHING = "computes nothing that flexnorm has a norm for"


@torch.no_grad()
def recognise(module: Any, *, fused: bool = True) -> Description:
    """What a class of others computes, found by computing it in float64, with a weight and running statistics that a
    mistake shows with, on inputs about 1 and about the square root of eps.

    fused: of an activation that is a layer inside of it, say which one it is, if that has a name.

    Raises `KeptError` where that is no norm that we know, or cannot be tried.
    """
    _check_call(module)
    weight, mean = getattr(module, "weight", None), getattr(module, "running_mean", None)
    tail = tuple(name for name, child in module.named_children() if not isinstance(child, nn.Identity))
    held = {name for name, _ in module.named_parameters()} | {name for name, _ in module.named_buffers()}
    held = {name for name in held if name.split(".")[0] not in tail or name.startswith("parametrizations")} - OWN
    if held:
        raise KeptError(f"has {', '.join(sorted(held))}, which its successor would lose")
    eps = next((value for name in _EPS if isinstance(value := getattr(module, name, None), float)), None)
    plain = isinstance(module, nn.RMSNorm) and module.eps is None
    sized = weight if weight is not None else mean
    if (eps is None and not plain) or not isinstance(sized, Tensor) or sized.dim() != 1:
        raise KeptError(_NOTHING)
    if not sized.numel():
        raise KeptError("it has no channels")
    if sized.is_meta:
        raise KeptError("meta: no values to try")
    channels, generator = sized.numel(), torch.Generator().manual_seed(0)
    tried = torch.finfo(torch.float64).eps if plain else eps
    assert tried is not None
    trial = _trial(module)
    draw = partial(torch.rand, channels, generator=generator, dtype=torch.float64)
    values = {"weight": 2 + 4 * draw(), "bias": 8 * draw() - 4}  # past the 6 of relu6
    values |= {"running_mean": (0.5 + draw()) * tried**0.5, "running_var": (0.5 + draw()) * tried}
    for name, value in values.items():
        if getattr(trial, name, None) is not None:
            getattr(trial, name).copy_(value)
    behind: list[tuple[str | None, tuple[str, ...]]] = [(name, ()) for name in _ACTIVATIONS]
    behind[len(behind) if fused else 1 : 0] = [(None, tail)] * bool(tail)
    for source in _sources(module, channels, tried):
        shape = (3, 5, channels) if source.layout == "last" else (3, channels, *(4,) * ((source.rank or 4) - 2))
        x = torch.randn(shape, generator=generator, dtype=torch.float64) + 0.5
        for offset in (False, True) if weight is not None else (False,):
            for activation, rest in behind:
                found = replace(source, eps=tried, offset=offset, activation=activation, tail=rest)
                if _agree(trial, found, [x, x * tried**0.5]):
                    wide = sized.dtype if sized.dtype == torch.float64 else torch.float32
                    return replace(found, eps=torch.finfo(wide).eps if plain else tried)
    raise KeptError(_NOTHING)


_EPS = ("eps", "variance_epsilon", "epsilon", "variance_eps")


def _check_call(module: nn.Module) -> None:
    check_forward(module)
    if isinstance(module, Norm) and len(module.patterns()) > 1:
        raise KeptError("a mixture")
    if isinstance(module, Norm) and module.changes():
        raise KeptError(module.changes())
    takes = list(inspect.signature(module.forward).parameters.values())
    any_ = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    beside = takes[1:] if takes and takes[0].kind not in any_ else takes
    if beside or not takes:
        raise KeptError(f"its forward takes {', '.join(map(str, beside)) or 'nothing'}, and not x alone")


def _trial(module: Any) -> Any:
    """A copy that is tried. Hooks stay behind: they may belong to anything."""
    tables = [value for m in module.modules() for name, value in m.__dict__.items() if "_hooks" in name]
    try:
        return copy.deepcopy(module, {id(table): OrderedDict[Any, Any]() for table in tables}).to("cpu", torch.float64)
    except Exception as error:  # whatever a class of others holds
        raise KeptError(f"cannot be copied, to be tried: {type(error).__name__}: {error}") from error


def _sources(module: nn.Module, channels: int, eps: float) -> list[Description]:
    """What it may be."""
    tracks = isinstance(getattr(module, "running_mean", None), Tensor)
    tracks = tracks and isinstance(getattr(module, "running_var", None), Tensor)
    if isinstance(module, tuple(PATTERNS)):
        base = describe(module)
        found = [base] + [replace(base, layout="pixel")] * (base.kind in ("layer", "rms"))
        return found + [replace(base, kind="frozen")] * (tracks and base.kind in ("batch", "sync"))
    if tracks:
        return [Description("frozen", "second", (channels,), eps)]
    return [Description(kind, layout, (channels,), eps) for kind in ("rms", "layer") for layout in ("last", "pixel")]


def _agree(trial: Any, source: Description, inputs: Sequence[Tensor]) -> bool:
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
            moments = running if not training or source.kind == "frozen" else None
            pattern = source.pattern("batch" if moments is not None else source.kind)
            theirs = _called(trial.forward, x.clone())
            ours: Any = normalize(x, pattern, moments=moments, **options, **affine, **names)
            ours = _called(nn.Sequential(*map(trial.get_submodule, source.tail)), ours)
            if not isinstance(theirs, Tensor) or not isinstance(ours, Tensor) or theirs.shape != x.shape:
                return False
            if not torch.allclose(theirs.double(), ours, rtol=1e-5, atol=1e-5):  # it may compute in float32
                return False
    return True


def _called(call: Any, x: Tensor) -> Any:
    """What it gives, by the same random numbers every time; None where it takes no such x."""
    with torch.random.fork_rng([]):
        torch.default_generator.manual_seed(0)  # of the CPU alone, as fork_rng puts back no other here
        try:
            return call(x)
        except Exception:  # whatever a class of others raises
            return None

"""What a layer is built with: options that exclude each other, and its parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..axes import solve
from ..calls.arguments import Options, Param
from ..errors import SpecError, say, shown
from ..spec import Atom, Axis, Expr, Group, Lookup, Spec, keyword


def fixed_shape(
    spec: Spec,
    expr: Expr,
    what: str,
    sizes: Mapping[str, int],
    counts: Mapping[str, int],
    lookups: Mapping[str, tuple[Expr, Lookup]],
) -> tuple[int, ...]:
    """The shape of a tensor over these axes, from what is told when a layer is built."""
    known: dict[Atom, int] = {Axis(name): size for name, size in solve(spec, sizes).items()}
    known.update((lookup, counts[name]) for name, (_, lookup) in lookups.items() if name in counts)
    for atom in expr.atoms():
        if atom in known:
            continue
        if not isinstance(atom, (Axis, Lookup)):
            rule, instead = (
                f"{what} have a fixed shape: their axes have names",
                "names for these axes, and their sizes",
            )
            raise SpecError(expr.error(rule, atom, instead=instead))
        name = atom.name if isinstance(atom, Axis) else atom.label
        kind, where = ("size of axis", "sizes") if isinstance(atom, Axis) else ("number of values of label", "labels")
        told = {**sizes, **counts}
        if what == "running statistics" and atom == next(iter(spec.x.atoms()), None):
            pooled = " ".join(str(e) for e in expr.elements if e != atom)
            rule = f"running statistics outlive a batch, and these sets are apart along {atom}, which comes with it"
            instead = f'"{spec.x} -> {pooled}"; sizes={{"{atom}": 8}}, if {atom} is not the batch'
            raise SpecError(expr.error(rule, atom, received=str(spec), instead=instead))
        holds = (str(e) for e in spec.x.elements if isinstance(e, Group) and atom in e.atoms)
        composed = next((f', or the size of all: sizes={{"{group}": 64}}' for group in holds), "")
        raise SpecError(
            expr.error(
                f"{what} need the {kind} {name!r} when the layer is built",
                atom,
                received=", ".join(f"{k}={v}" for k, v in told.items()) or "no sizes",
                instead=keyword(name, 8, where) + composed,
            )
        )
    return tuple(
        math.prod(known[atom] for atom in (element.atoms if isinstance(element, Group) else (element,)))
        for element in expr.elements
    )


def with_given(
    spec: Spec, conditional: Expr | None, learned: tuple[Param, ...], given: Sequence[Param]
) -> tuple[Param, ...]:
    """The learned stages, then the stage that comes with a call."""
    weight, bias = given[0] if given else (None, None)
    if conditional is None:
        if weight is not None or bias is not None:
            raise SpecError(
                say(
                    "weight and bias are given at the call to a layer that was built for them",
                    text=spec.text,
                    received="weight" if bias is None else "bias" if weight is None else "weight and bias",
                    instead='Norm(..., conditional="b c"), with the axes of weight and bias',
                )
            )
        return learned
    if weight is None and bias is None:
        raise SpecError(
            conditional.error(
                "a conditional layer is called with weight, bias, or both",
                *conditional.elements,
                received="neither",
                instead="norm(x, weight=w, bias=b)",
            )
        )
    return (*learned, (weight, bias))


def check_combination(
    spec: Spec, cumulative: str | None, sharded: bool, track_running_stats: bool, process_group: Any
) -> None:
    """Raises where options exclude each other."""
    rule = None
    if process_group is not None and not sharded:
        rule, instead = "a process group is one of sharded axes", 'sharded="n", say'
    elif cumulative is not None and track_running_stats:
        rule = "cumulated statistics are those of x itself, and none run on from batch to batch"
        instead = "cumulative= or track_running_stats=True"
    if rule is not None:
        received = f"cumulative={cumulative!r}, track_running_stats={track_running_stats}, "
        received += f"process_group={shown(process_group)}"
        raise SpecError(say(rule, text=spec.text, received=received, instead=instead))


def check_kinds(bias: object, dtype: torch.dtype | None) -> None:
    """Raises where parameters cannot be of this kind."""
    if not isinstance(bias, bool) or (dtype is not None and not (dtype.is_floating_point or dtype.is_complex)):
        received = f"bias={shown(bias)}, dtype={dtype}"
        rule, instead = "bias is True or False, and dtype floating or complex", "bias=False, dtype=torch.float32"
        raise SpecError(say(rule, received=received, instead=instead))


def described(layer: Any, pattern: str) -> str:
    """What a layer was built with, as `print` shows it."""
    said = [pattern]
    said += [f"{name}={size}" for name, size in layer._sizes.items() if name.isidentifier()]
    compositions = {name: size for name, size in layer._sizes.items() if not name.isidentifier()}
    said += [f"sizes={compositions}"] if compositions else []
    said += [f"{name}={layer._static.get(name, count)}" for name, count in layer._counts.items()]
    exprs = {"affine": layer._affine, "conditional": layer._conditional}
    said += [f"{name}='{expr}'" for name, expr in exprs.items() if expr is not None]
    said += [f"{name}={list(p.shape)}" for name, p in layer.named_parameters(recurse=False)]
    said += [f"cumulative={layer._cumulative!r}"] if layer._cumulative is not None else []
    said += [f"sharded={' '.join(layer._sharding.names)!r}"] if layer._sharding is not None else []
    if layer.track_running_stats:
        said.append(f"momentum={layer.momentum}, track_running_stats=True")
    defaults = Options()
    for name in Options.__dataclass_fields__:
        value = layer.eps if name == "eps" else getattr(layer._options, name)
        if value != getattr(defaults, name):
            said.append(f"{name}={value!r}")
    return ", ".join(said)

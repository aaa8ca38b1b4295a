"""The axes of a pattern, with the sizes that a tensor and the user give them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch

from .errors import ShapeError, SpecError, nearest, say, shown
from .spec import Atom, Axis, Dots, Element, Fixed, Group, Spec, keyword

Sizes = Mapping[str, int]


@dataclass(frozen=True)
class Axes:
    """The axes of a pattern with their sizes in one tensor: the elementary view.

    `names` holds one entry for every elementary axis: its name, a number for an axis without a name, "..." for each
    axis of the ellipsis.
    """

    spec: Spec
    shape: tuple[int, ...]  # of x itself
    names: tuple[str, ...]
    sizes: tuple[int, ...]  # the elementary shape
    dots: tuple[int, ...]  # places of the axes of the ellipsis

    @cached_property
    def place(self) -> dict[str, int]:
        return {name: place for place, name in enumerate(self.names) if name.isidentifier()}

    @property
    def rank(self) -> int:
        return len(self.sizes)

    def places(self, atoms: Iterable[Atom]) -> tuple[int, ...]:
        """Where the axes of these atoms lie, in their own order."""
        found: list[int] = []
        for atom in atoms:
            if isinstance(atom, Axis):
                found.append(self.place[atom.name])
            elif isinstance(atom, Dots):
                found.extend(self.dots)
        return tuple(found)

    def shape_of(self, elements: Iterable[Element]) -> tuple[int, ...]:
        """The shape of a tensor over these elements, none of which is a label."""
        shape: list[int] = []
        for element in elements:
            sizes = [
                self.sizes[place] for place in self.places(element.atoms if isinstance(element, Group) else [element])
            ]
            shape.extend([math.prod(sizes)] if isinstance(element, Group) else sizes)
        return tuple(shape)

    def guess(self, shape: Iterable[int]) -> str | None:
        """The names of the axes that have these sizes, if only one choice of axes has them."""
        found = [[name for name, size in zip(self.names, self.sizes, strict=True) if size == want] for want in shape]
        named = all(len(names) == 1 and names[0].isidentifier() for names in found)
        return " ".join(names[0] for names in found) if found and named else None

    def known(self) -> str:
        return ", ".join(f"{name}={size}" for name, size in zip(self.names, self.sizes, strict=True)) or "no axes"


def solve(spec: Spec, sizes: Sizes, names: Iterable[str] = ()) -> dict[str, int]:
    """What `sizes` says about the axes of the left side: sizes of axes, and of compositions like "(g c)".

    `names` are further names that the caller knows, for the error that meets a name nobody knows.
    """
    compositions: dict[Group, int] = {}
    known: dict[str, int] = {}
    axes = [axis.name for axis in spec.x.axes()]
    for key, size in sizes.items():
        element = None if key in axes else spec.read_composition(key)
        if key not in axes and element is None:
            choices = [*axes, *(str(e) for e in spec.x.elements if isinstance(e, Group) and e.atoms), *names]
            near = nearest(key, choices)
            raise SpecError(
                say(
                    f"{key!r} is no axis and no composition of the pattern",
                    text=spec.text,
                    received=f"{key}={size!r}; the pattern has {', '.join(choices) or 'no names'}",
                    instead=repr(near) if near else f"leave {key!r} out",
                )
            )
        if isinstance(size, bool) or not isinstance(size, (int, torch.SymInt)) or size < 0:
            at = element if element is not None else next(axis for axis in spec.x.axes() if axis.name == key)
            typed = keyword(key, abs(int(size)) if isinstance(size, (int, float)) else 8, "sizes")
            rule, received = f"the size of {key!r} is a whole number of 0 or more", f"{key}={shown(size)}"
            raise SpecError(spec.x.error(rule, at, received=received, instead=typed))
        if isinstance(element, Group):
            compositions[element] = size
        else:
            known[str(element or key)] = size
    for group, size in compositions.items():
        _split(spec, group, size, known, f"sizes={{{str(group)!r}: {size}}}")
    return known


def _split(spec: Spec, group: Group, size: int, known: dict[str, int], received: str) -> None:
    """Adds to `known` what the size of a composition says about its axes."""
    unknown = [atom for atom in group.atoms if isinstance(atom, Axis) and atom.name not in known]
    parts = [atom.size if isinstance(atom, Fixed) else known.get(str(atom), 1) for atom in group.atoms]
    product = math.prod(parts)
    told = ", ".join(f"{atom}={known[str(atom)]}" for atom in group.atoms if str(atom) in known)
    if len(unknown) > 1:
        first = unknown[0].name
        typed = keyword(first, _divisors(size)[-1] if size else 1, "sizes")
        raise ShapeError(
            spec.x.error(
                f"{group} is split into its axes when all sizes but one are known",
                *unknown,
                received=f"{received}{'; ' if told else ''}{told}; "
                f"not known: {', '.join(axis.name for axis in unknown)}",
                instead=f"{typed}; the divisors of {size} are {_listed(_divisors(size))}",
            )
        )
    if not unknown:
        if product != size:
            raise ShapeError(
                spec.x.error(
                    f"the sizes of {group} multiply to {product}, and its size is {size}",
                    group,
                    received=f"{received}; {told}",
                    instead=f"sizes that multiply to {size}",
                )
            )
        return
    if product == 0 or size % product:
        raise ShapeError(
            spec.x.error(
                f"{group} has size {size}, which is not divisible by {product}",
                group,
                received=f"{received}; {told or group}",
                instead=f"one of the divisors of {size}: {_listed(_divisors(size))}",
            )
        )
    known[unknown[0].name] = size // product


@lru_cache(maxsize=4096)
def bind(spec: Spec, shape: tuple[int, ...], sizes: tuple[tuple[str, int], ...] = ()) -> Axes:
    """Gives every axis of the left side its size in a tensor of this shape. `sizes` are those that the user told."""
    known = solve(spec, dict(sizes))
    told = dict(known)
    elements = spec.x.elements
    dots = sum(isinstance(element, Dots) for element in elements)
    if len(elements) - dots > len(shape) or (not dots and len(elements) != len(shape)):
        named = f"{len(elements) - dots}{' or more' if dots else ''}"
        raise ShapeError(
            spec.x.error(
                f"the left side names every axis of x; it names {named}, and x has {len(shape)}",
                *elements,
                received=f"x of shape {shape}",
                instead=f"a pattern for {len(shape)} axes"
                if dots
                else 'name every axis, or write "..." for those that need no name',
            )
        )
    names: list[str] = []
    result: list[int] = []
    dotted: list[int] = []
    place = 0
    for element in elements:
        if isinstance(element, Dots):
            for _ in range(len(shape) - len(elements) + 1):
                dotted.append(len(names))
                names.append("...")
                result.append(shape[place])
                place += 1
            continue
        size = shape[place]
        if isinstance(element, Group):
            if not element.atoms and size != 1:
                raise ShapeError(
                    spec.x.error(
                        f"1 and () stand for an axis of size 1, and x has {size} there",
                        element,
                        received=f"x of shape {shape}",
                        instead="a name for the axis",
                    )
                )
            if element.atoms:
                _split(spec, element, size, known, f"x of shape {shape}")
        elif isinstance(element, Axis) and known.setdefault(element.name, size) != size:
            raise ShapeError(
                spec.x.error(
                    f"axis {element.name!r} has size {size} in x, and {told[element.name]} was given",
                    element,
                    received=f"x of shape {shape}; {element.name}={told[element.name]}",
                    instead=f"leave {element.name}= out, as x says it",
                )
            )
        elif isinstance(element, Fixed) and element.size != size:
            raise ShapeError(
                spec.x.error(
                    f"the pattern says size {element.size}, and x has {size} there",
                    element,
                    received=f"x of shape {shape}",
                    instead=f"{size}, or a name for the axis",
                )
            )
        for atom in element.atoms if isinstance(element, Group) else (element,):
            names.append(str(atom))
            result.append(atom.size if isinstance(atom, Fixed) else known[str(atom)])
        place += 1
    return Axes(spec, shape, tuple(names), tuple(result), tuple(dotted))


def _divisors(size: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(size) + 1) if size % d == 0]
    return small + [size // d for d in reversed(small) if d * d != size]


def _listed(values: list[int], most: int = 12) -> str:
    shown = [str(value) for value in values]
    return ", ".join(shown if len(shown) <= most else [*shown[: most - 1], "...", shown[-1]])

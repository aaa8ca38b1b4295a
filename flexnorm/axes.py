"""The axes of a pattern, with the sizes that a tensor and the user give them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from .errors import ShapeError, SpecError, as_int, nearest, say, shown
from .spec import Atom, Axis, Dots, Element, Expr, Fixed, Group, Lookup, Spec, keyword

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

    def __hash__(self) -> int:  # caches ask for it at every call
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.spec, self.shape, self.names, self.sizes))

    @cached_property
    def place(self) -> dict[str, int]:
        return {name: place for place, name in enumerate(self.names) if name.isidentifier()}

    @property
    def rank(self) -> int:
        return len(self.sizes)

    @property
    def symbolic(self) -> bool:
        """Whether a tracer stands for some of the sizes."""
        return any(type(size) is not int for size in self.sizes)

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
        number = as_int(size)
        if number is None or number < 0:
            at = element if element is not None else next(axis for axis in spec.x.axes() if axis.name == key)
            rule, received = f"the size of {key!r} is a whole number of 0 or more", f"{key}={shown(sizes[key])}"
            typed = keyword(key, 8 if number is None else -number, "sizes")
            raise SpecError(spec.x.error(rule, at, received=received, instead=typed))
        if isinstance(element, Group):
            compositions[element] = number
        else:
            known[str(element or key)] = number
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
        some = [
            d for d in divisors(size) if d <= max(1, min(32, size // 4))
        ]  # of channels: what GroupNorm usually takes
        typed = keyword(first, some[-1] if some else 1, "sizes")
        raise ShapeError(
            spec.x.error(
                f"{group} is split into its axes when all sizes but one are known",
                *unknown,
                received=f"{received}{'; ' if told else ''}{told}; "
                f"not known: {', '.join(axis.name for axis in unknown)}",
                instead=f"{typed}; the divisors of {size} are {_listed(divisors(size))}",
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
                instead=f"one of the divisors of {size}: {_listed(divisors(size))}" if size else "sizes above 0",
            )
        )
    known[unknown[0].name] = size // product


def bind(spec: Spec, shape: tuple[int, ...], sizes: tuple[tuple[str, int], ...] = ()) -> Axes:
    """Gives every axis of the left side its size in a tensor of this shape. `sizes` are those that the user told."""
    if all(type(size) is int for size in shape):
        return _bound(spec, shape, sizes, spec.text)
    return _bound.__wrapped__(spec, shape, sizes, spec.text)  # a tracer's symbols cannot be kept


@lru_cache(maxsize=4096)
def _bound(spec: Spec, shape: tuple[int, ...], sizes: tuple[tuple[str, int], ...], text: str) -> Axes:
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
                    instead=f"{keyword(element.name, size, 'sizes')}, or leave it out",
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


def divisors(size: int) -> list[int]:
    """The numbers that divide it, in order."""
    small = [d for d in range(1, math.isqrt(size) + 1) if size % d == 0]
    return small + [size // d for d in reversed(small) if d * d != size]


def _listed(values: list[int], most: int = 12) -> str:
    shown = [str(value) for value in values]
    return ", ".join(shown if len(shown) <= most else [*shown[: most - 1], "...", shown[-1]])


# --- operands --------------------------------------------------------------------------------------------------------


def check_operand(expr: Expr, parts: Sequence[Element], what: str, t: Tensor, x: Tensor) -> None:
    """Whether a tensor that goes with x is dense, and lies where x lies."""
    if t.layout != torch.strided or t.is_nested:
        received, instead = f"{what} of layout {t.layout}", ".to_dense()"
        raise SpecError(expr.error(f"{what} is a dense tensor", *parts, received=received, instead=instead))
    if t.device != x.device:
        received, instead = f"{what} on {t.device}, x on {x.device}", f".to({str(x.device)!r})"
        raise ShapeError(expr.error(f"{what} lies on the device of x", *parts, received=received, instead=instead))


def check_shape(expr: Expr, what: str, which: str, parts: Sequence[Element], shape: torch.Size, axes: Axes) -> None:
    """Whether a tensor has the shape that these elements say; of a label, the shape of its axes."""
    label = parts[0] if len(parts) == 1 and isinstance(parts[0], Lookup) else None
    atoms: Sequence[Element] = parts if label is None else label.axes
    expected = axes.shape_of(atoms)
    named = " ".join(map(str, atoms))
    if label is not None and not expected:
        rule, instead = f"{what} is read at {named}, which stands for no axis of x", "no label, or an x with more axes"
        raise ShapeError(expr.error(rule, label, received=f"x of shape {axes.shape}", instead=instead))
    if tuple(shape) == expected:
        return
    guess = axes.guess(shape)
    if label is not None:
        instead = f"ids of shape {expected}" + (
            f", or sizes that add up to {expected[0]}" if len(expected) == 1 else ""
        )
    else:
        instead = f'"{guess}", if these are its axes' if guess else f"a tensor of shape {expected}"
    raise ShapeError(
        expr.error(
            f"{what} has {which}, ({named}): shape {expected}",
            *parts,
            received=f"shape {tuple(shape)}; {axes.known()}",
            instead=instead,
        )
    )

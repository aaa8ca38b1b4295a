"""A formula as the numbers that the C++ binder reads: all that is known of a call before its tensors come."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .library import library
from .spec import Atom, Axis, Dots, Expr, Fixed, Group, Lookup, Spec

ACTIVATIONS = {None: 0, "relu": 1, "silu": 2, "gelu": 3}
MOST_DIMS = 16  # dims of x

Terms = tuple[int, ...]  # the place of an axis, or ~place of a label


class Places:
    """The elementary axes of tensors with so many dims: compositions are split, and "..." stands for any axes."""

    def __init__(self, spec: Spec, dims: int, labels: Sequence[str]) -> None:
        self.names: list[str] = []
        self.dim_of: list[int] = []
        self.fixed: list[int] = []  # sizes that the pattern itself says, or -1
        self.dotted: list[int] = []
        self.labels = list(labels)
        elements, dim = spec.x.elements, 0
        extra = dims - sum(not isinstance(element, Dots) for element in elements)
        for element in elements:
            if isinstance(element, Dots):
                for _ in range(extra):
                    self.dotted.append(len(self.names))
                    self._add("...", dim, -1)
                    dim += 1
                continue
            for atom in element.atoms if isinstance(element, Group) else (element,):
                self._add(str(atom), dim, atom.size if isinstance(atom, Fixed) else -1)
            dim += 1
        self.place = {name: at for at, name in enumerate(self.names) if name.isidentifier()}

    def _add(self, name: str, dim: int, size: int) -> None:
        self.names.append(name)
        self.dim_of.append(dim)
        self.fixed.append(size)

    def of(self, atoms: Sequence[Atom]) -> Terms:
        """Where the axes of these atoms lie."""
        found: list[int] = []
        for atom in atoms:
            if isinstance(atom, Axis):
                found.append(self.place[atom.name])
            elif isinstance(atom, Dots):
                found.extend(self.dotted)
        return tuple(found)

    def terms(self, atom: Atom) -> Terms:
        """What an atom adds to the index of a tensor."""
        return (~self.labels.index(atom.label),) if isinstance(atom, Lookup) else self.of([atom])

    def written(self, expr: Expr) -> tuple[Terms, ...]:
        """The terms of every dim of a tensor that is shaped as the expression says."""
        found: list[Terms] = []
        for element in expr.elements:
            if isinstance(element, Group):
                found.append(tuple(term for atom in element.atoms for term in self.terms(atom)))
            else:
                found.extend((term,) for term in self.terms(element))
        return tuple(found)


def pattern_of(
    spec: Spec, told: Mapping[str, int], dims: int, labels: Sequence[Lookup], params: Expr | None, options: Any
) -> bytes | None:
    """The pattern of tensors with so many dims. None: there is no library, or the pattern does not fit such tensors.

    Args:
        told: sizes of axes.
        labels: what the labels read, in the order in which a call brings them.
        options: center, scale, eps and activation.
    """
    kernels, dots = library(), any(isinstance(element, Dots) for element in spec.x.elements)
    named = sum(not isinstance(element, Dots) for element in spec.x.elements)
    if isinstance(kernels, str) or not named <= dims <= MOST_DIMS or (dims > named and not dots):
        return None
    if options.activation not in ACTIVATIONS:
        return None
    places = Places(spec, dims, [lookup.label for lookup in labels])
    read = tuple(places.of(lookup.axes) for lookup in labels)
    if not all(read):  # a label of no axis is an error
        return None
    sizes = (told.get(name, fixed) for name, fixed in zip(places.names, places.fixed, strict=True))
    made: bytes | None = kernels.pattern(
        dims,
        tuple(places.dim_of),
        tuple(sizes),
        read,
        places.written(spec.sets),
        None if spec.mask is None else places.written(spec.mask),
        None if params is None else places.written(params),
        options.center,
        options.scale,
        ACTIVATIONS[options.activation],
        any(True for _ in spec.sets.lookups()),
        float(options.eps),
    )
    return made

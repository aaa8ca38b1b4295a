"""A formula as the numbers that the C++ binder reads: all that is known of a call before its tensors come."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .library import library
from .spec import Atom, Axis, Dots, Expr, Fixed, Group, Lookup, Spec

ACTIVATIONS = {None: 0, "relu": 1, "silu": 2, "gelu": 3}
MOST_DIMS = 16  # dims of x

Terms = tuple[int, ...]  # the place of an axis, or ~place of a label


def pattern_of(
    spec: Spec, told: Mapping[str, int], dims: int, labels: Sequence[Lookup], params: Expr | None, options: Any
) -> bytes | None:
    """The pattern of tensors with so many dims. None: there is no library, or the pattern does not fit such tensors.

    Args:
        told: sizes of axes.
        labels: what the labels read, in the order in which a call brings them.
        options: center, scale, eps and activation.
    """
    kernels, elements = library(), spec.x.elements
    dots = sum(isinstance(element, Dots) for element in elements)
    extra = dims - (len(elements) - dots)
    if isinstance(kernels, str) or dims > MOST_DIMS or extra < 0 or (extra and not dots):
        return None
    if options.activation not in ACTIVATIONS:
        return None
    names: list[str] = []
    dim_of: list[int] = []
    sizes: list[int] = []
    dotted: list[int] = []
    dim = 0
    for element in elements:
        if isinstance(element, Dots):
            for _ in range(extra):
                dotted.append(len(names))
                names.append("...")
                dim_of.append(dim)
                sizes.append(-1)
                dim += 1
            continue
        for atom in element.atoms if isinstance(element, Group) else (element,):
            names.append(str(atom))
            dim_of.append(dim)
            sizes.append(atom.size if isinstance(atom, Fixed) else told.get(str(atom), -1))
        dim += 1
    place = {name: at for at, name in enumerate(names) if name.isidentifier()}
    known = [lookup.label for lookup in labels]

    def places(atoms: Sequence[Atom]) -> Terms:
        found: list[int] = []
        for atom in atoms:
            if isinstance(atom, Axis):
                found.append(place[atom.name])
            elif isinstance(atom, Dots):
                found.extend(dotted)
        return tuple(found)

    def terms(atom: Atom) -> Terms:
        return (~known.index(atom.label),) if isinstance(atom, Lookup) else places([atom])

    def written(expr: Expr | None) -> tuple[Terms, ...] | None:
        if expr is None:
            return None
        found: list[Terms] = []
        for element in expr.elements:
            if isinstance(element, Group):
                found.append(tuple(term for atom in element.atoms for term in terms(atom)))
            else:
                found.extend((term,) for term in terms(element))
        return tuple(found)

    read = tuple(places(lookup.axes) for lookup in labels)
    if not all(read):  # a label of no axis is an error
        return None
    made: bytes | None = kernels.pattern(
        dims,
        tuple(dim_of),
        tuple(sizes),
        read,
        written(spec.sets),
        written(spec.mask),
        written(params),
        options.center,
        options.scale,
        ACTIVATIONS[options.activation],
        any(True for _ in spec.sets.lookups()),
        float(options.eps),
    )
    return made

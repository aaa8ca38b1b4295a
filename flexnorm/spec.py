"""The pattern language: the only file that reads characters.

    pattern  =  x-axes [ "," mask-axes ] "->" set-axes

`Spec.parse` turns the text into a frozen, hashable `Spec`; `str(spec)` is the text in its normal form and parses
to an equal `Spec`. A pattern without labels and mask is a pattern of `einops.reduce`. Every part keeps its place in
the text, so that each later floor can point at it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

from .errors import Span, SpecError, nearest, say, shown

RESERVED = frozenset(
    "activation affine bias center conditional correction cumulative device dtype eps input labels mask moments "
    "momentum pattern process_group return_moments scale self sharded sizes state track_running_stats weight x".split()
)
"""The names that options have. An axis or a label may bear one too, but its size or its ids are then given by
`sizes={...}` or `labels={...}`, as the keyword is the option."""


def keyword(name: str, value: object, option: str) -> str:
    """How the value of a name is typed: as a keyword, or in a dict if the keyword is an option."""
    return f"{name}={value}" if name not in RESERVED else f'{option}={{"{name}": {value}}}, as {name!r} is an option'


@dataclass(frozen=True)
class Axis:
    """A named axis."""

    name: str
    span: Span = field(default=(0, 0), compare=False, repr=False)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Fixed:
    """An axis without a name, of a size of 2 or more, as in `"(h 2) (w 2) c -> c"`. It is always pooled."""

    size: int
    span: Span = field(default=(0, 0), compare=False, repr=False)

    def __str__(self) -> str:
        return str(self.size)


@dataclass(frozen=True)
class Dots:
    """The ellipsis: any number of axes."""

    span: Span = field(default=(0, 0), compare=False, repr=False)

    def __str__(self) -> str:
        return "..."


@dataclass(frozen=True)
class Lookup:
    """A label read at axes: `region[n h w]`. Its value is a number from 0 to the label's count - 1."""

    label: str
    axes: tuple[Axis | Dots, ...]
    span: Span = field(default=(0, 0), compare=False, repr=False)

    def __str__(self) -> str:
        return f"{self.label}[{' '.join(map(str, self.axes))}]"


Atom = Axis | Fixed | Dots | Lookup


@dataclass(frozen=True)
class Group:
    """A composition: `(g c)`. `1` and `()` are the empty one, and `(c)` is `c`."""

    atoms: tuple[Atom, ...]
    span: Span = field(default=(0, 0), compare=False, repr=False)

    def __str__(self) -> str:
        return f"({' '.join(map(str, self.atoms))})" if self.atoms else "1"


Element = Atom | Group


@dataclass(frozen=True)
class Expr:
    """One side of a pattern, or the axes of a parameter: a row of elements, and the text it was read from."""

    elements: tuple[Element, ...]
    text: str = field(default="", compare=False, repr=False)

    def __hash__(self) -> int:  # caches ask for it at every call
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash(self.elements)

    def __str__(self) -> str:
        return " ".join(map(str, self.elements))

    def atoms(self) -> Iterator[Atom]:
        """The elements with every composition opened, from left to right."""
        for element in self.elements:
            if isinstance(element, Group):
                yield from element.atoms
            else:
                yield element

    def axes(self) -> Iterator[Axis]:
        return (atom for atom in self.atoms() if isinstance(atom, Axis))

    def lookups(self) -> Iterator[Lookup]:
        return (atom for atom in self.atoms() if isinstance(atom, Lookup))

    def dots(self) -> Dots | None:
        return next((atom for atom in self.atoms() if isinstance(atom, Dots)), None)

    def union(self, other: Expr) -> Expr:
        """All atoms of both, each once, without compositions."""
        atoms = tuple(dict.fromkeys((*self.atoms(), *other.atoms())))
        return Expr(atoms, " ".join(map(str, atoms)))

    def names(self) -> str:
        """The atoms as a person would list them in an error."""
        return ", ".join(map(str, self.atoms())) or "no axis"

    def error(self, rule: str, *parts: Element, received: str | None = None, instead: str) -> str:
        """An error's text that points at `parts` of this expression."""
        return say(rule, text=self.text, spans=[part.span for part in parts], received=received, instead=instead)


@dataclass(frozen=True)
class Spec:
    """A pattern: the axes of x, the axes of the mask if the pattern has one, and the axes of the statistics.

    >>> spec = Spec.parse("b t (g c), b t->b  g")
    >>> print(spec)
    b t (g c), b t -> b g
    >>> spec == Spec.parse(str(spec))
    True
    """

    x: Expr
    mask: Expr | None
    sets: Expr

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.x, self.mask, self.sets))

    @staticmethod
    def parse(pattern: str) -> Spec:
        """Reads a pattern. Raises `SpecError` for whatever is not one."""
        if not isinstance(pattern, str):
            raise SpecError(
                say(
                    "a pattern is a string",
                    received=f"{type(pattern).__name__}: {shown(pattern)}",
                    instead='"n (g c) ... -> n g"',
                )
            )
        return _parse(pattern)

    def __str__(self) -> str:
        operands = str(self.x) if self.mask is None else f"{self.x}, {self.mask}"
        return f"{operands} -> {self.sets}".strip()

    @property
    def text(self) -> str:
        """The pattern as the user wrote it."""
        return self.x.text

    def read(self, text: str, option: str) -> Expr:
        """Reads the axes of a parameter, as in `affine="(g c)"`: axes of x, and labels of any name."""
        if not isinstance(text, str):
            raise SpecError(
                say(
                    f"{option} is a string that names the axes of the parameters",
                    received=f"{type(text).__name__}: {shown(text)}",
                    instead=f'{option}="c"',
                )
            )
        return _read_parameter(self, text, option)

    def keeping(self, name: str) -> Spec:
        """The same with one more axis of the statistics, the last: `"b c t -> b c"` keeping t is `"b c t -> b c t"`."""
        return _parse(f"{self} {name}")

    def refined(self, other: Spec) -> Spec:
        """The pattern of the largest sets that those of both are made of: "n c -> n" and "n c -> c" of "n c -> n c".

        Axes are in the order of x, labels behind them. A label that is read at kept axes tells no sets apart that these
        do not.
        """
        found = list(self.sets.union(other.sets).atoms())
        atoms: list[Atom] = [axis for axis in self.x.atoms() if axis in found]  # in the order of x
        atoms += [a for a in found if isinstance(a, Lookup) and not all(axis in atoms for axis in a.axes)]
        mask = "" if self.mask is None else f", {self.mask}"
        return _parse(f"{self.x}{mask} -> {' '.join(map(str, atoms))}")

    def coarsening(self, coarse: Spec) -> tuple[Spec, tuple[str, ...]]:
        """The pattern from the moments of these sets to those of larger ones, and the labels that it reads.

        A label that these sets have is an axis of theirs, called as the label.
        """
        taken = {axis.name for axis in self.x.axes()}
        names = {lookup: lookup.label for lookup in self.sets.lookups()}
        for lookup, name in names.items():
            while name in taken:
                name += "s"
            names[lookup] = name
            taken.add(name)

        def named(element: Element) -> str:
            if isinstance(element, Group):
                return f"({' '.join(map(named, element.atoms))})" if element.atoms else "1"
            return names.get(element, str(element)) if isinstance(element, Lookup) else str(element)

        left, right = (" ".join(map(named, spec.sets.elements)) for spec in (self, coarse))
        pattern = _parse(f"{left} -> {right}")
        return pattern, tuple(lookup.label for lookup in pattern.sets.lookups())

    def in_parts(self) -> Spec:
        """The same for the real and imaginary parts of x, which are one more axis of x and of the statistics."""
        taken = {axis.name for axis in self.x.axes()} | {lookup.label for lookup in self.sets.lookups()}
        name = "part"
        while name in taken:
            name += "s"
        mask = "" if self.mask is None else f", {self.mask}"
        return _parse(f"{self.x} {name}{mask} -> {self.sets} {name}")

    def read_composition(self, text: str) -> Group | Axis | None:
        """The composition of the left side that `text` names, as in `sizes={"(g c)": 64}`; None if there is none."""
        try:
            elements = _Reader(text, "a key of sizes=").side(0, len(text)).elements
        except SpecError:
            return None
        if len(elements) != 1 or elements[0] not in self.x.elements:
            return None
        return elements[0] if isinstance(elements[0], (Group, Axis)) else None


# ---------------------------------------------------------------------------------------------------------------------

_TOKEN = re.compile(r"(?P<space>\s+)|(?P<arrow>->)|(?P<dots>\.\.\.)|(?P<word>\w+)|(?P<sign>[()\[\],])")


@dataclass(frozen=True)
class _Token:
    kind: str
    text: str
    span: Span


class _Reader:
    """Reads one text; `what` names it in errors."""

    def __init__(self, text: str, what: str = "the pattern") -> None:
        self.text = text
        self.what = what
        self.tokens = list(self._tokens())

    def fail(self, rule: str, *spans: Span, received: str | None = None, instead: str) -> SpecError:
        return SpecError(say(rule, text=self.text, spans=spans, received=received, instead=instead))

    def _tokens(self) -> Iterator[_Token]:
        place = 0
        while place < len(self.text):
            match = _TOKEN.match(self.text, place)
            if match is None:
                raise self.fail(
                    f"{self.what} has names, numbers, ( ), [ ], ..., one comma and ->, and no {self.text[place]!r}",
                    (place, place + 1),
                    instead=_HINTS.get(self.text[place], "leave it out"),
                )
            place = match.end()
            if match.lastgroup != "space":
                yield _Token(str(match.lastgroup), match.group(), match.span())

    def side(self, start: int, stop: int) -> Expr:
        """Reads the elements between two places of the text."""
        elements: list[Element] = []
        group: list[Atom] | None = None
        opened: Span = (0, 0)
        tokens = [token for token in self.tokens if start <= token.span[0] < stop]
        place = 0
        while place < len(tokens):
            token = tokens[place]
            following = tokens[place + 1] if place + 1 < len(tokens) else None
            place += 1
            if token.text == "(":
                if group is not None:
                    raise self.fail(
                        "a composition holds axes, no other composition",
                        opened,
                        token.span,
                        instead="open the inner parentheses: (a b c)",
                    )
                group, opened = [], token.span
            elif token.text == ")":
                if group is None:
                    raise self.fail("this ) closes nothing", token.span, instead="remove it, or add the ( before it")
                elements.append(_compose(group, (opened[0], token.span[1])))
                group = None
            elif token.kind == "word" and following is not None and following.text == "[":
                closing = next((i for i in range(place, len(tokens)) if tokens[i].text == "]"), None)
                if closing is None:
                    raise self.fail(
                        "this [ is never closed", following.span, instead=f"{token.text}[axes of the label]"
                    )
                lookup = self.lookup(token, tokens[place + 1 : closing], tokens[closing])
                place = closing + 1
                (elements if group is None else group).append(lookup)
            elif token.kind == "word" and token.text.isdecimal() and self.number(token) == 1:
                if group is None:
                    elements.append(Group((), token.span))
            elif token.kind == "dots" or token.kind == "word":
                (elements if group is None else group).append(self.atom(token))
            elif token.text == "[":
                raise self.fail("a [ follows the name of a label", token.span, instead="label[axis], as in graph[v]")
            elif token.text == "]":
                raise self.fail("this ] closes nothing", token.span, instead="remove it, or add the label[ before it")
            else:
                raise self.fail(f"{token.text!r} cannot stand here", token.span, instead="leave it out")
        if group is not None:
            raise self.fail("this ( is never closed", opened, instead="add the ) after the last axis of it")
        expr = Expr(tuple(elements), self.text)
        self.once(expr)
        return expr

    def atom(self, token: _Token) -> Axis | Fixed | Dots:
        if token.kind == "dots":
            return Dots(token.span)
        if token.text.isdecimal():
            return Fixed(self.number(token), token.span)
        return Axis(self.name(token, "an axis"), token.span)

    def number(self, token: _Token) -> int:
        if len(token.text) > 18 or int(token.text) < 1:  # int64 holds 18 digits
            raise self.fail(
                "an axis without a name has a size of 1 or more, and one that fits in memory",
                token.span,
                instead="1 for a unit axis, or a name",
            )
        return int(token.text)

    def name(self, token: _Token, what: str) -> str:
        if not token.text.isidentifier() or token.text[0] == "_" or token.text[-1] == "_":
            raise self.fail(
                f"the name of {what} is made of letters, digits and _, starting with a letter and not ending with _",
                token.span,
                received=repr(token.text),
                instead=repr(token.text.strip("_0123456789") or "a"),
            )
        return token.text

    def lookup(self, label: _Token, inside: list[_Token], closing: _Token) -> Lookup:
        span = (label.span[0], closing.span[1])
        name = self.name(label, "a label")
        axes: list[Axis | Dots] = []
        for token in inside:
            atom = self.atom(token) if token.kind in ("word", "dots") else None
            if not isinstance(atom, (Axis, Dots)):
                raise self.fail(
                    f"the brackets of label {name!r} hold names of axes of x",
                    token.span,
                    instead=f"{name}[v], or {name}[n h w] for a label of several axes",
                )
            if atom in axes:
                raise self.fail(f"label {name!r} is read at each axis once", atom.span, instead=f"{name}[{atom}]")
            axes.append(atom)
        if not axes:
            raise self.fail(
                f"label {name!r} is read at no axis",
                span,
                instead=f"{name}[v], with the axes of the label tensor in the brackets",
            )
        return Lookup(name, tuple(axes), span)

    def once(self, expr: Expr) -> None:
        """No axis and no label twice on one side."""
        seen: dict[Atom, Atom] = {}
        for atom in expr.atoms():
            if isinstance(atom, Fixed):
                continue
            if atom in seen:
                rule, instead = f"{str(atom)!r} stands twice on one side", "another name for one of them"
                raise self.fail(rule, seen[atom].span, atom.span, instead=instead)
            seen[atom] = atom


def _compose(atoms: list[Atom], span: Span) -> Element:
    """`(c)` is `c`; `(...)` stays a composition, as it makes one axis of many."""
    return atoms[0] if len(atoms) == 1 and not isinstance(atoms[0], Dots) else Group(tuple(atoms), span)


@lru_cache(maxsize=4096)
def _parse(text: str) -> Spec:
    reader = _Reader(text)
    arrows = [token for token in reader.tokens if token.kind == "arrow"]
    commas = [token for token in reader.tokens if token.text == ","]
    if len(arrows) != 1:
        raise reader.fail(
            'a pattern has one "->": the axes of x, then the axes of the statistics',
            *[arrow.span for arrow in arrows] or [(len(text), len(text))],
            received=f"{len(arrows)} arrows",
            instead='"n (g c) ... -> n g"',
        )
    if len(commas) > 1 or (commas and commas[0].span[0] > arrows[0].span[0]):
        raise reader.fail(
            "a comma stands between the axes of x and those of the mask, once, left of the arrow",
            *[comma.span for comma in commas],
            instead='"b t (g c), b t -> b g"; axes are separated by blanks',
        )
    middle, end = arrows[0].span
    x = reader.side(0, commas[0].span[0] if commas else middle)
    mask = reader.side(commas[0].span[1], middle) if commas else None
    sets = reader.side(end, len(text))
    _check_left(reader, x)
    if mask is not None:
        if not mask.elements:
            raise reader.fail(
                "a comma says that a mask follows, but no axis does",
                commas[0].span,
                instead="name the axes of the mask, or remove the comma",
            )
        _check_known(reader, mask, x, "the mask", labels=False)
    _check_known(reader, sets, x, "the right side", labels=True)
    _check_labels(reader, (x, sets))
    return Spec(x, mask, sets)


@lru_cache(maxsize=4096)
def _read_parameter(spec: Spec, text: str, option: str) -> Expr:
    reader = _Reader(text, f"{option}=")
    for token in reader.tokens:
        if token.kind == "arrow" or token.text == ",":
            rule = f"{option}= names axes of x, without comma and arrow"
            raise reader.fail(rule, token.span, instead=f'{option}="c"')
    expr = reader.side(0, len(text))
    _check_known(reader, expr, spec.x, f"{option}=", labels=True)
    _check_labels(reader, (spec.x, spec.sets, expr))
    return expr


def _check_left(reader: _Reader, x: Expr) -> None:
    for lookup in x.lookups():
        raise reader.fail(
            "a label names sets: it stands right of the arrow, or in affine=; on the left stand the axes it is read at",
            lookup.span,
            instead=" ".join(map(str, lookup.axes)),
        )
    dots = [atom for atom in x.atoms() if isinstance(atom, Dots)]
    for element in x.elements:
        if isinstance(element, Group) and any(isinstance(atom, Dots) for atom in element.atoms):
            raise reader.fail(
                "an ellipsis on the left stands for whole axes, so it cannot stand in a composition",
                dots[0].span,
                instead="names for the axes of the composition",
            )


def _check_known(reader: _Reader, expr: Expr, x: Expr, what: str, *, labels: bool) -> None:
    """Whatever stands right of the first operand must stand in it."""
    known = {atom for atom in x.atoms() if not isinstance(atom, Fixed)}
    names = [atom.name for atom in x.axes()]
    for atom in expr.atoms():
        if isinstance(atom, Fixed):
            raise reader.fail(
                f"{what} names axes; a size of its own has no meaning there",
                atom.span,
                instead=f"give the axis a name on the left, as in (a b), and its size as b={atom.size}",
            )
        if isinstance(atom, Lookup) and not labels:
            raise reader.fail(
                f"{what} is a tensor over axes of x; it reads no labels",
                atom.span,
                instead=" ".join(map(str, atom.axes)),
            )
        for part in atom.axes if isinstance(atom, Lookup) else (atom,):
            if part in known:
                continue
            if isinstance(part, Dots):
                raise reader.fail(
                    f"{what} has an ellipsis and x has none",
                    part.span,
                    instead='"..." on the left too, or the names of the axes',
                )
            near = nearest(str(part), names)
            raise reader.fail(
                f"{what} names the axis {str(part)!r}, which x does not have",
                part.span,
                received=f"the axes of x: {x.names()}",
                instead=repr(near) if near else "name it on the left too, or one of these",
            )


def _check_labels(reader: _Reader, exprs: tuple[Expr, ...]) -> None:
    """A label has one meaning: its name is no axis, and it is read at the same axes everywhere."""
    axes = {axis.name for axis in exprs[0].axes()}
    seen: dict[str, Lookup] = {}
    for expr in exprs:
        for lookup in expr.lookups():
            if lookup.label in axes:
                raise reader.fail(
                    f"{lookup.label!r} is an axis of x, so it cannot be a label too",
                    lookup.span,
                    instead=f"{lookup.label}_id[{' '.join(map(str, lookup.axes))}]",
                )
            if seen.setdefault(lookup.label, lookup) != lookup:
                raise reader.fail(
                    f"label {lookup.label!r} is read at the same axes wherever it stands",
                    lookup.span,
                    received=f"{seen[lookup.label]} and {lookup}",
                    instead="another name for one of them",
                )


_HINTS = {
    ".": "three dots: ...",
    "=": "sizes are given as keywords: g=8",
    ":": 'axes by name: "b t c -> b t"',
    "*": "an ellipsis for any axes: ...",
    ";": "a comma between x and the mask",
    "-": "an arrow: ->",
    ">": "an arrow: ->",
    "{": "( ) for a composition, [ ] for a label",
    "\N{HORIZONTAL ELLIPSIS}": "three dots: ...",
    "\N{RIGHTWARDS ARROW}": "an arrow: ->",
}

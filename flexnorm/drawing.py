"""`draw`: which elements share statistics, as a picture.

A tensor is too large to be drawn, so a few elements are taken along every axis, and the core says of each which set it
is in. Three steps: `Picture` chooses the elements, `_Sketch` holds shapes in points of a page, `draw` lays them out.
"""

from __future__ import annotations

import io
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from .axes import Axes, bind, solve
from .calls.arguments import Formula, Label, Options, as_partition, label_names, sort_names
from .errors import ShapeError, SpecError, as_int, say, shown
from .kernels import Recipe
from .layers.norm import Norm
from .partition import Partition
from .sets import sets_of
from .spec import Axis, Dots, Element, Group, Lookup, Spec

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_AXES = 5
TIMES = "\N{MULTIPLICATION SIGN}"


def draw(
    *patterns: str | Norm,
    shape: Sequence[int] | Tensor | None = None,
    mask: Tensor | None = None,
    labels: Mapping[str, int | Label] | None = None,
    sizes: Mapping[str, int] | None = None,
    titles: str | Sequence[str] | None = None,
    path: str | pathlib.Path | None = None,
    **names: int | Label,
) -> Figure:
    """The picture of a pattern: the tensor with its axes, one set coloured, then all sets; of several side by side.

    Axes are shortened to a few elements, and named with their true sizes. What is masked is hatched, where weights are
    smaller colours are paler, and ids of labels stand beside their axis.

    Args:
        *patterns: patterns, and layers of the class `Norm`.
        shape: of x, or x itself; 1 to 5 axes. None: sizes that nothing tells are not said.
        mask: as in `normalize`. Of a pattern that has one, when none is given, an example is drawn, and called so.
        labels: labels that cannot be keywords.
        sizes: sizes of axes and compositions, for those that cannot be keywords.
        titles: a name for every pattern.
        path: the file to write, .svg or .png. The same arguments write the same bytes.
        **names: sizes of axes, as `g=32`, and labels: ids, a `Partition`, or the number of values of an example.

    Raises:
        ImportError: matplotlib is missing.
        SpecError: a pattern, a name or an option means nothing.
        ShapeError: x does not fit, has no elements or more than 5 axes.
        OSError: the file cannot be written.

    >>> titles = ["LayerNorm", "GroupNorm"]
    >>> figure = draw("n c h w -> n", "n (g c) h w -> n g", shape=(8, 64, 32, 32), g=4, titles=titles)
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('flexnorm.drawing needs matplotlib: pip install "flexnorm[viz]"') from error

    ending = None if path is None else pathlib.Path(path).suffix.lower()
    if ending not in (None, ".svg", ".png"):
        rule, received = "a picture is written as .svg or .png", f"path={str(path)!r}"
        raise SpecError(say(rule, received=received, instead=f"{str(pathlib.Path(str(path)).with_suffix('.svg'))!r}"))
    pictures = _pictures(patterns, shape, mask, labels, sizes, titles, names)
    with matplotlib.rc_context({**_SETTINGS}):
        page = _page(pictures)
        figure = Figure(figsize=(page.right / 72, page.bottom / 72), dpi=200, facecolor=PAPER)
        page.onto(figure)
    figure.set_label("; ".join(picture.text for picture in pictures))
    figure._repr_svg_ = partial(_svg, figure)  # type: ignore[attr-defined]  # notebooks ask for it
    if path is not None:
        data = _svg(figure).encode() if ending == ".svg" else _written(figure, "png")
        try:
            pathlib.Path(path).write_bytes(data)
        except OSError as error:
            raise OSError(f"{path} cannot be written: {error.strerror or error}") from None
    return figure


def _svg(figure: Figure) -> str:
    return _written(figure, "svg").decode()


def _written(figure: Figure, kind: str) -> bytes:
    """The same bytes for the same picture: no date, no version, no random ids."""
    import matplotlib

    title = f"flexnorm: {figure.get_label()}"
    metadata = {"Date": None, "Creator": None, "Title": title} if kind == "svg" else {"Software": None, "Title": title}
    out = io.BytesIO()
    with matplotlib.rc_context({**_SETTINGS}):
        figure.savefig(out, format=kind, metadata=metadata)
    return out.getvalue()


_SETTINGS: dict[Any, Any] = {  # those of the user do not change the picture
    "svg.hashsalt": "flexnorm",
    "svg.fonttype": "path",
    "svg.image_inline": True,
    "savefig.bbox": None,
    "savefig.facecolor": "auto",
    "savefig.dpi": "figure",
    "savefig.transparent": False,
    "path.sketch": None,
    "path.effects": [],
    "hatch.linewidth": 0.8,
    "text.usetex": False,
    "text.antialiased": True,
}


# --- what is drawn ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Side:
    """A side of the drawing: an axis of x, or several that go the same way, one inside the other."""

    names: tuple[str, ...]
    places: tuple[int, ...]  # of elementary axes
    kept: bool
    pooled: bool
    read: bool  # by a label or the mask

    def joined(self, other: _Side) -> _Side:
        read, kept, pooled = self.read or other.read, self.kept or other.kept, self.pooled or other.pooled
        return _Side(self.names + other.names, self.places + other.places, kept, pooled, read)

    def alike(self, other: _Side) -> bool:
        plain = not (self.read or other.read) and self.kept == other.kept and self.pooled == other.pooled
        return plain and self.kept != self.pooled

    @property
    def spatial(self) -> int:
        return sum(name in _SPATIAL for name in self.names)


_SPATIAL = frozenset("... d h w x y z t f depth height width time".split())


@dataclass(eq=False)
class Picture:
    """What is drawn of one pattern: a few elements of x, and the set of each.

    `rows` and `columns` are sides along which drawings are repeated; `solid` are the sides of each drawing: none, one
    (a strip), two (a grid: down, across) or three (a block: back, right, down).
    """

    text: str
    title: str | None
    recipe: Recipe
    mask: Tensor | None
    labels: Mapping[str, Partition]
    told: Literal[True] | frozenset[int] = True  # the places of axes whose sizes are known
    examples: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.axes = self.recipe.sets.axes
        sets = self.recipe.sets
        self.lookups = {lookup: self.axes.places(lookup.axes) for lookup in sets.expr.lookups()}
        self.of_mask = () if self.recipe.mask is None else self.axes.places(self.recipe.mask.expr.atoms())
        self._arrange()
        self._pick()

    # --- sides

    def _arrange(self) -> None:
        sides = self._sides()
        flat = any(side.read for side in sides)
        while len(sides) > 3:
            pairs = [i for i in range(len(sides) - 1) if sides[i].alike(sides[i + 1])]
            if flat and len(sides) <= 4:
                pairs = [i for i in pairs if sides[i].pooled]
            if not pairs and flat and len(sides) > 4:
                pairs = [0]
            if not pairs:
                break
            at = max(pairs, key=lambda i: (sides[i].spatial + sides[i + 1].spatial, i))
            sides[at : at + 2] = [sides[at].joined(sides[at + 1])]
        self.sides = sides
        solid = 2 if flat else 3
        order = list(range(len(sides)))
        facets, rest = order[: max(0, len(sides) - solid)], order[max(0, len(sides) - solid) :]
        labelled = {place for places in self.lookups.values() if len(places) == 1 for place in places}
        for i in [i for i in facets if labelled.intersection(sides[i].places)]:
            free = [j for j in rest if not sides[j].read]
            if free:  # what a label orders lies inside of a drawing, not along drawings
                facets[facets.index(i)], rest[rest.index(free[0])] = free[0], i
        if flat and len(rest) == 2:
            down, across = (sides[i] for i in rest)
            masked = set(self.of_mask)
            if masked & set(down.places) and not masked & set(across.places) and not labelled & set(down.places):
                rest.reverse()  # what is valid ends along rows
        self.flat = flat or len(sides) < 3
        self.solid = tuple(rest)
        self.rows = self.columns = None
        if len(facets) == 2:
            self.rows, self.columns = facets
        elif facets:
            self.rows, self.columns = (facets[0], None) if self.flat else (None, facets[0])
        self.order = (*facets, *rest)

    def _sides(self) -> list[_Side]:
        """One for every axis of x, but those of size 1 without a name."""
        axes, sides = self.axes, []
        kept = self.recipe.sets.kept
        read = set(self.of_mask).union(*self.lookups.values())
        place = 0

        def side(names: tuple[str, ...], places: tuple[int, ...]) -> _Side:
            pooled = any(p not in kept for p in places)
            return _Side(names, places, any(p in kept for p in places), pooled, bool(read.intersection(places)))

        for element in axes.spec.x.elements:
            if isinstance(element, Dots):
                each = [side(("...",), (p,)) for p in axes.dots]
                place += len(each)
                if each and not each[0].read:
                    each = [side(("...",) * len(each), axes.dots)]
                sides.extend(each)
                continue
            atoms = element.atoms if isinstance(element, Group) else (element,)
            if atoms:
                sides.append(side((str(element),), tuple(range(place, place + len(atoms)))))
            place += len(atoms)
        return sides

    def name(self, which: int, room: float = math.inf) -> str:
        """A side's axes, with their true sizes where these are known; shorter where there is little room."""
        side = self.sides[which]
        sizes = [self.axes.sizes[p] for p in side.places]
        known = self.told is True or self.told.issuperset(side.places)
        dots = set(side.names) == {"..."}
        named = "..." if dots else f" {TIMES} ".join(side.names)
        if not known:
            return named
        each = f" {TIMES} ".join(f"{size:,}" for size in sizes)
        if len(side.names) > 1 and not dots and _width(f"{named} = {each}", NAMES) > room:
            named = " ".join(side.names)
        if len(side.names) == 1 and len(sizes) > 1:
            whole = f"{named} = {math.prod(sizes):,} ({each})"
            return whole if _width(whole, NAMES) <= room else f"{named} = {each}"
        return f"{named} = {each}"

    # --- elements

    def _cap(self, which: int) -> int:
        """How many elements are drawn along a side, at most."""
        side = self.sides[which]
        if which in (self.rows, self.columns):
            return (4 if self.columns is None else 3) if side.read else 2
        if not self.flat:
            return 8 if len(side.places) > 1 and side.kept else 5
        if len(self.solid) == 1:
            return 16
        faceted = (self.rows if which == self.solid[0] else self.columns) is not None
        if not side.read:
            return 8 if len(side.places) > 1 and side.kept else 4 if faceted else 6
        one = any(len(places) == 1 and places[0] in side.places for places in self.lookups.values())
        return 16 if one or not faceted else 8

    def _pick(self) -> None:
        counts = list(self.axes.sizes)
        read = set(self.of_mask).union(*self.lookups.values())
        kept = self.recipe.sets.kept
        for which, side in enumerate(self.sides):
            cap = self._cap(which)

            def drawn(places: tuple[int, ...] = side.places) -> int:
                return math.prod(counts[p] for p in places)

            free = [p for p in side.places if p not in read]
            pooled = [p for p in free if p not in kept]
            for shrunk, least in ((pooled, 2), (free, 2), (side.places, 3), (side.places, 1)):
                while drawn() > (max(cap, 8) if least == 1 else cap):
                    can = [p for p in shrunk if counts[p] > least]
                    if not can:
                        break
                    largest = max(can, key=lambda p: counts[p])
                    others = drawn() // counts[largest]
                    second = max([counts[p] for p in can if p != largest], default=0)
                    counts[largest] = max(least, min(counts[largest] - 1, max(second, cap // others)))
        # Sets that share a hue are told apart by a few shades.
        plain = sorted(p for p in kept if p not in read)
        shaded = plain if self.lookups else plain[:-1]
        while math.prod(counts[p] for p in shaded) > len(SHADES) and any(counts[p] > 2 for p in shaded):
            counts[max(shaded, key=lambda p: counts[p])] -= 1
        self.picks = tuple(self._along(p, count, p in read) for p, count in enumerate(counts))
        self.shortened = any(len(pick) < size for pick, size in zip(self.picks, self.axes.sizes, strict=True))
        self.ids, self.weights = self._read()

    def _along(self, place: int, count: int, read: bool) -> tuple[int, ...]:
        """The elements that are drawn along an axis."""
        size = self.axes.sizes[place]
        if count == size or not read:
            return tuple(range(count))
        joint: Tensor | None = None
        for lookup, places in self.lookups.items():
            if places == (place,):
                label = self.labels[lookup.label]
                joint = label.ids if joint is None else joint * label.count + label.ids
        if joint is None:
            return tuple(sorted({round(i * (size - 1) / max(1, count - 1)) for i in range(count)}))
        return _sampled(joint, count)

    def _read(self) -> tuple[Tensor, Tensor | None]:
        """Of every element drawn its set, as the core says, -1 where it is in none; and how much it weighs."""
        sizes = tuple(map(len, self.picks))
        axes = Axes(self.axes.spec, sizes, self.axes.names, sizes, self.axes.dots)
        labels = {}
        for lookup, places in self.lookups.items():
            ids = self.labels[lookup.label].ids
            for d, p in enumerate(places):
                ids = ids.index_select(d, torch.tensor(self.picks[p]))
            values, ids = torch.unique(ids, return_inverse=True)
            labels[lookup.label] = Partition(ids, max(1, values.numel()))
        sets = sets_of(axes, self.recipe.sets.expr, labels)
        self.sets = sets
        ids = sets.spread(torch.arange(sets.count).reshape(sets.internal_shape)).expand(sizes)
        weights = None
        if self.mask is not None and self.recipe.mask is not None:
            mask = self.recipe.mask.inward(self.mask.detach())
            for p, pick in enumerate(self.picks):
                if mask.shape[p] > 1:
                    mask = mask.index_select(p, torch.tensor(pick))
            if self.recipe.membership:
                ids = ids.where(mask, torch.tensor(-1))
            else:
                weights = mask.double().expand(sizes)
        cells = [math.prod(sizes[p] for p in side.places) for side in self.sides]
        ids = ids.reshape(cells).permute(self.order)
        return ids, None if weights is None else weights.reshape(cells).permute(self.order)

    # --- colours

    @cached_property
    def one(self) -> int:
        """The set that is drawn alone: that of the first element, unless it has nothing else in the drawing."""
        valid: list[int] = [i for i in self.ids.flatten().tolist() if i >= 0]
        if not valid:
            return -2
        largest = max(valid, key=valid.count)
        return valid[0] if valid.count(valid[0]) > 1 else largest

    @cached_property
    def colours(self) -> dict[int, str]:
        """A colour for every set that is drawn: no two alike while there are enough, and none beside its like.

        Sets of one label value, or of one place along the last axis, have the same hue and are lighter or darker.
        """
        drawn = sorted(set(self.ids.flatten().tolist()) - {-1})
        if len(drawn) <= len(HUES) and not self.lookups:
            return dict(zip(drawn, HUES, strict=False))
        hues, shades = [], []
        for number in drawn:
            terms = dict(self._terms(number))
            chosen = next((t for t in terms if isinstance(t, Lookup)), None)
            if chosen is None:
                several = [t for t in terms if len(self.picks[t]) > 1]
                chosen = next((t for t in several if t in self.of_mask), several[-1] if several else None)
            hues.append(terms.pop(chosen, 0))
            shades.append(tuple(terms.values()))
        hue = {value: i for i, value in enumerate(sorted(set(hues)))}
        shade = {value: i for i, value in enumerate(sorted(set(shades)))}
        if len(hue) <= len(HUES) and len(shade) <= len(SHADES):
            tones = SHADES[len(shade) - 1]
            return {n: _mixed(HUES[hue[h]], tones[shade[s]]) for n, h, s in zip(drawn, hues, shades, strict=True)}
        if len(drawn) <= len(PALETTE):
            return dict(zip(drawn, PALETTE, strict=False))
        return self._repeated(drawn)

    def _repeated(self, drawn: list[int]) -> dict[int, str]:
        beside: dict[int, set[int]] = {number: set() for number in drawn}
        for d in range(self.ids.dim()):
            before, after = self.ids.narrow(d, 0, self.ids.shape[d] - 1), self.ids.narrow(d, 1, self.ids.shape[d] - 1)
            for a, b in zip(before.flatten().tolist(), after.flatten().tolist(), strict=True):
                if a != b and min(a, b) >= 0:
                    beside[a].add(b)
                    beside[b].add(a)
        found: dict[int, str] = {}
        for i, number in enumerate(drawn):
            taken = {found.get(other) for other in beside[number]}
            turned = [PALETTE[(i + j) % len(PALETTE)] for j in range(len(PALETTE))]
            found[number] = next((colour for colour in turned if colour not in taken), turned[0])
        return found

    def _terms(self, number: int) -> Iterator[tuple[Any, int]]:
        """What indexes a set: places of axes and labels, with their values."""
        index = []
        for size in reversed(self.sets.internal_shape):
            number, at = divmod(number, size)
            index.append(at)
        index.reverse()
        for place in sorted(self.sets.kept):
            yield place, index[place]
        for merge in self.sets.merges:
            at, values = index[merge.places[0]], []
            for size in reversed(merge.sizes):
                at, value = divmod(at, size)
                values.append(value)
            yield from zip(merge.terms, reversed(values), strict=True)

    # --- words

    def words(self) -> list[str]:
        """How many sets there are, and how many elements are in each."""
        sets, expr = self.recipe.sets, self.recipe.sets.expr
        each = ", ".join(atom.label if isinstance(atom, Lookup) else str(atom) for atom in expr.atoms())
        kept = set(sets.kept).union(
            *(tuple(t for t in merge.terms if not isinstance(t, Lookup)) for merge in sets.merges)
        )
        names = [name for place, name in enumerate(self.axes.names) if place not in kept]
        pooled = ", ".join(dict.fromkeys(names))
        over = f"pooled: {pooled}" if pooled else "nothing is pooled"
        if self.told is not True:
            return [f"one set for each {each}" if each else "one set", over]
        count = sets.count
        first = f"{count:,} set{'s' * (count != 1)}" + (f", one for each {each}" if each else "")
        t = torch.ones([1] * self.axes.rank, dtype=torch.int64)
        if self.recipe.membership and self.mask is not None and self.recipe.mask is not None:
            t = self.recipe.mask.inward(self.mask).long()
        elements = sets.sum(t)
        least, most = (int(elements.min()), int(elements.max())) if elements.numel() else (0, 0)
        empty = int((elements == 0).sum()) * (count // max(1, elements.numel()))
        if empty and most:
            least = int(elements[elements > 0].min())
        some = f"{least:,}" if least == most else f"{least:,} to {most:,}"
        second = f"{some} element{'s' * (some != '1')}{' in each' * (count > 1)}"
        return [first, second + f"; {empty:,} empty" * bool(empty), over]


def _sampled(ids: Tensor, count: int) -> tuple[int, ...]:
    """So many places of these ids, in their order: some of every value, in proportion, of the first few values."""
    where: dict[int, list[int]] = {}
    seen, inverse = torch.unique(ids, return_inverse=True)
    first = torch.full((seen.numel(),), ids.numel()).scatter_reduce(0, inverse, torch.arange(ids.numel()), "amin")
    values = first.argsort().tolist()
    if len(values) > count // 2:
        values = values[: max(1, count // 4)]
    for value in values:
        where[value] = (inverse == value).nonzero().flatten().tolist()
    total = sum(map(len, where.values()))
    quotas = {value: max(1, count * len(places) // total) for value, places in where.items()}
    while sum(quotas.values()) > count:
        quotas[max(quotas, key=lambda v: quotas[v])] -= 1
    while sum(quotas.values()) < min(count, total):
        quotas[max((v for v in where if quotas[v] < len(where[v])), key=lambda v: len(where[v]) / quotas[v])] += 1
    return tuple(sorted(places[i * len(places) // quotas[v]] for v, places in where.items() for i in range(quotas[v])))


# --- from arguments to pictures --------------------------------------------------------------------------------------


def _pictures(
    patterns: Sequence[str | Norm],
    shape: Sequence[int] | Tensor | None,
    mask: Tensor | None,
    labels: Mapping[str, Any] | None,
    sizes: Mapping[str, int] | None,
    titles: str | Sequence[str] | None,
    names: Mapping[str, Any],
) -> list[Picture]:
    if not patterns:
        instead = 'draw("n (g c) h w -> n g", shape=(8, 64, 32, 32), g=32)'
        raise SpecError(say("draw takes one pattern or several", received="none", instead=instead))
    named = [titles] if isinstance(titles, str) else titles
    if named is not None and (len(named) != len(patterns) or not all(isinstance(title, str) for title in named)):
        rule, received = "titles are one text for every pattern", f"{len(patterns)} patterns, titles={shown(titles)}"
        raise SpecError(say(rule, received=received, instead="a list of as many texts"))
    specs = [pattern._spec if isinstance(pattern, Norm) else Spec.parse(pattern) for pattern in patterns]
    given = {"sizes": dict(sizes or {}), "labels": dict(labels or {}), "names": dict(names)}
    own = [_own(pattern, spec, given) for pattern, spec in zip(patterns, specs, strict=True)]
    for option, values in given.items():
        for name in values:
            if not any(name in mine[option] for mine in own):  # a name of one pattern means nothing to another
                sort_names(specs[0], [], **{"sizes": {}, "labels": {}, "names": {}, option: {name: values[name]}})
    masked = any(spec.mask is not None for spec in specs)
    pictures = []
    for i, (pattern, spec, mine) in enumerate(zip(patterns, specs, own, strict=True)):
        read = label_names(spec)
        if isinstance(pattern, Norm):
            mine = {
                option: {n: v for n, v in mine[option].items() if n in read or n not in pattern._lookups}
                for option in mine
            }
        told, values = sort_names(spec, [], **mine)
        title = None if named is None else named[i]
        if isinstance(pattern, Norm):
            told = {**pattern._sizes, **told}
            fixed = {**pattern._counts, **pattern.labels}
            values = {**{name: value for name, value in fixed.items() if name in read}, **values}
            title = type(pattern).__name__ if title is None and type(pattern) is not Norm else title
        passed = mask if spec.mask is not None or not masked else None
        pictures.append(_picture(spec, title, shape, passed, told, values))
    return pictures


def _own(pattern: str | Norm, spec: Spec, given: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """What is given to all patterns, of the names that this one has."""
    known = {axis.name for axis in spec.x.axes()}.union(
        pattern._lookups if isinstance(pattern, Norm) else label_names(spec)
    )
    return {
        option: {n: v for n, v in values.items() if n in known or (option == "sizes" and spec.read_composition(n))}
        for option, values in given.items()
    }


def _picture(
    spec: Spec,
    title: str | None,
    shape: Sequence[int] | Tensor | None,
    mask: Tensor | None,
    told: Mapping[str, int],
    values: Mapping[str, Any],
) -> Picture:
    mask = mask.detach().cpu() if isinstance(mask, Tensor) else mask
    known: Literal[True] | frozenset[int] = True
    size = _shape(spec, shape)
    if size is None:
        known, size, told = _example_shape(spec, told, mask, values)
    for wrong, rule, instead in (
        (len(size) > MOST_AXES, f"a picture has up to {MOST_AXES} axes", "fewer axes, some of them joined"),
        (math.prod(size) == 0, "a tensor without elements has no picture", "sizes of 1 or more"),
        (math.prod(size) > _LARGEST, "a tensor of more than 2^62 elements is none", "a smaller shape"),
    ):
        if wrong:
            raise ShapeError(spec.x.error(rule, *spec.x.elements, received=f"x of shape {size}", instead=instead))
    formula = Formula(spec, Options(), (), told)
    x = torch.empty(()).expand(size)
    axes = bind(spec, size, formula.sizes)
    partitions, examples = {}, []
    for name, (expr, lookup) in label_names(spec).items():
        value = values.get(name)
        count = None if isinstance(value, Tensor | Partition) else 4 if value is None else as_int(value)
        if count is None or count < 1:
            made = as_partition(expr, lookup, value)
            partitions[name] = Partition(made.ids.cpu(), made.count)
        else:
            partitions[name] = _example_label(spec, axes, lookup, count)
            examples.append(name)
    if mask is None and spec.mask is not None:
        mask = _example_mask(spec, axes)
        examples.insert(0, "mask")
    recipe, _ = formula.prepare(x, mask, (), partitions)
    return Picture(str(spec), title, recipe, mask, partitions, known, tuple(examples))


_LARGEST = 2**62
_LARGEST_EXAMPLE = 2**24


def _shape(spec: Spec, shape: Sequence[int] | Tensor | None) -> tuple[int, ...] | None:
    if shape is None:
        return None
    values = shape.shape if isinstance(shape, Tensor) else shape
    row = isinstance(values, Sequence) and not isinstance(values, str)
    sizes = [as_int(size) for size in values] if row else [None]
    if any(size is None or size < 0 for size in sizes):
        rule, received = "a shape is a row of whole numbers, 0 or more", f"shape={shown(shape)}"
        raise SpecError(spec.x.error(rule, received=received, instead="shape=(8, 64, 32, 32), or x itself"))
    return tuple(size for size in sizes if size is not None)


def _example_shape(
    spec: Spec, told: Mapping[str, int], mask: Tensor | None, values: Mapping[str, Any]
) -> tuple[frozenset[int], tuple[int, ...], dict[str, int]]:
    """A shape that fits what is told, the places of the axes whose sizes that is, and the sizes of all named axes."""
    sizes = dict(solve(spec, told))
    tensors: list[tuple[Sequence[Element], Any]] = [(t.axes, values.get(t.label)) for t in spec.sets.lookups()]
    if spec.mask is not None:
        tensors.append((spec.mask.elements, mask))
    read: set[str] = set()
    for elements, value in tensors:
        read.update(str(e) for e in elements)
        if isinstance(value, Tensor | Partition) and len(value.shape) == len(elements):
            for axis, size in zip(elements, value.shape, strict=True):
                if isinstance(axis, Axis):
                    sizes.setdefault(axis.name, size)
    named = sum(not isinstance(e, Dots) for e in spec.x.elements)
    dots = min(2, MOST_AXES - named) if named < MOST_AXES else 0
    kept = set(spec.sets.atoms())
    shape: list[int] = []
    known: set[int] = set()
    place = 0

    def size_of(atom: Element, inside: bool) -> int:
        nonlocal place
        place += 1
        name = str(atom)
        if name in sizes or name.isdecimal():
            known.add(place - 1)
            return sizes[name] if name in sizes else int(name)
        if name in read:
            size = 4 if place == 1 and len(read) > 1 else 12
        elif inside:
            size = 2 if atom in kept else 3
        else:
            size = 3 if place == 1 else 4
        if isinstance(atom, Axis):
            sizes[name] = size
        return size

    for element in spec.x.elements:
        if isinstance(element, Group):
            shape.append(math.prod([size_of(atom, True) for atom in element.atoms]))
        else:
            shape.extend(size_of(element, False) for _ in range(dots if isinstance(element, Dots) else 1))
    return frozenset(known), tuple(shape), sizes


def _example_label(spec: Spec, axes: Axes, lookup: Lookup, count: int) -> Partition:
    """Groups of unequal sizes along one axis; along more, patches that lie around a few points."""
    shape = _example_of(axes, lookup.axes, f"{lookup.label}=ids")
    if len(shape) < 2:
        size = math.prod(shape)
        ends = [(4, 2, 5, 3, 6)[i % 5] for i in range(count)]
        bounds = torch.tensor(ends, dtype=torch.float64).cumsum(0) / max(1, sum(ends))
        where = (torch.arange(size, dtype=torch.float64) + 0.5) / size
        return Partition(torch.searchsorted(bounds, where).clamp(max=count - 1).reshape(shape), count)
    *outer, h, w = shape
    down = ((torch.arange(h) + 0.5) / h)[:, None, None]
    right = ((torch.arange(w) + 0.5) / w)[None, :, None]
    number = torch.arange(count)
    layers = []
    for layer in range(math.prod(outer)):
        y, x = (0.3 + 0.618 * (number + layer)) % 1, (0.2 + 0.755 * (number + 2 * layer)) % 1
        layers.append(((down - y) ** 2 + (right - x) ** 2).argmin(-1))
    return Partition(torch.stack(layers).reshape(shape), count)


def _example_mask(spec: Spec, axes: Axes) -> Tensor:
    """Valid up to some place along the last axis, another one in every row."""
    assert spec.mask is not None
    shape = _example_of(axes, spec.mask.elements, "mask=mask")
    if not shape:
        return torch.ones((), dtype=torch.bool)
    rows = torch.arange(math.prod(shape[:-1]))
    part = torch.tensor([0.75, 1.0, 0.5, 0.65, 0.35])[rows % 5].reshape(*shape[:-1], 1)
    return torch.arange(shape[-1]) < (part * shape[-1]).ceil()


def _example_of(axes: Axes, elements: Sequence[Element], what: str) -> tuple[int, ...]:
    shape = axes.shape_of(elements)
    if math.prod(shape) > _LARGEST_EXAMPLE:
        rule, received = "an example is made of up to 2^24 elements", f"x of shape {axes.shape}"
        raise ShapeError(axes.spec.x.error(rule, received=received, instead=f"{what}, or a smaller shape"))
    return shape


# --- how it is drawn -------------------------------------------------------------------------------------------------

PAPER, INK, GREY, LINE = "#ffffff", "#1f2933", "#6b7785", "#aab4c0"
OTHER, ONE, MASKED = "#eef1f5", "#0072b2", "#f6f6f6"
HUES = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#7d858f")  # Okabe and Ito
SHADES = ((0.0,), (0.0, 0.5), (-0.15, 0.25, 0.6), (-0.25, 0.1, 0.42, 0.7))  # towards black, towards white


def _mixed(colour: str, tone: float) -> str:
    parts = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    target = 255 if tone > 0 else 0
    return "#" + "".join(f"{round(part + abs(tone) * (target - part)):02x}" for part in parts)


PALETTE = tuple(_mixed(hue, tone) for tone in SHADES[-1] for hue in HUES)

Point = tuple[float, float]


@dataclass
class _Sketch:
    """Shapes on a page, in points, y downwards."""

    cells: dict[str, list[tuple[list[Point], str, bool]]] = field(default_factory=dict)  # by the panel they are in
    lines: list[tuple[list[Point], str, float]] = field(default_factory=list)
    texts: list[tuple[Point, str, dict[str, Any]]] = field(default_factory=list)
    left: float = math.inf
    top: float = math.inf
    right: float = -math.inf
    bottom: float = -math.inf

    def reach(self, *points: Point) -> None:
        xs, ys = [p[0] for p in points], [p[1] for p in points]
        self.left, self.right = min(self.left, *xs), max(self.right, *xs)
        self.top, self.bottom = min(self.top, *ys), max(self.bottom, *ys)

    def cell(self, points: list[Point], colour: str, hatched: bool, panel: str) -> None:
        self.cells.setdefault(panel, []).append((points, colour, hatched))
        self.reach(*points)

    def line(self, *points: Point, colour: str = INK, width: float = 1.0) -> None:
        self.lines.append((list(points), colour, width))
        self.reach(*points)

    def text(
        self,
        at: Point,
        text: str,
        *,
        size: float = 9.5,
        colour: str = INK,
        align: str = "center",
        angle: float = 0.0,
        mono: bool = False,
        bold: bool = False,
    ) -> None:
        """Text whose middle lies at the height of a point; it begins, ends or is centred there."""
        style = {"size": size, "color": colour, "ha": align, "rotation": angle, **_font(mono, bold)}
        self.texts.append((at, text, style))
        wide, high = _width(text, size, mono, bold), size * 1.15
        start = {"left": 0.0, "center": -wide / 2, "right": -wide}[align]
        turn = math.radians(-angle)
        for dx in (start, start + wide):
            for dy in (-high / 2, high / 2):
                self.reach(
                    (
                        at[0] + dx * math.cos(turn) - dy * math.sin(turn),
                        at[1] + dx * math.sin(turn) + dy * math.cos(turn),
                    )
                )

    def put(self, other: _Sketch, dx: float, dy: float) -> None:
        def moved(points: list[Point]) -> list[Point]:
            return [(x + dx, y + dy) for x, y in points]

        for panel, cells in other.cells.items():
            self.cells.setdefault(panel, []).extend(
                (moved(points), colour, hatched) for points, colour, hatched in cells
            )
        self.lines.extend((moved(points), colour, width) for points, colour, width in other.lines)
        self.texts.extend((moved([at])[0], text, style) for at, text, style in other.texts)
        self.reach((other.left + dx, other.top + dy), (other.right + dx, other.bottom + dy))

    @property
    def width(self) -> float:
        return self.right - self.left

    @property
    def height(self) -> float:
        return self.bottom - self.top

    def onto(self, figure: Figure) -> None:
        from matplotlib.collections import LineCollection, PolyCollection

        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.set_xlim(0, self.right)
        axes.set_ylim(self.bottom, 0)
        for panel, cells in self.cells.items():
            for hatched in (False, True):
                some = [(points, colour) for points, colour, h in cells if h == hatched]
                if some:
                    drawn = PolyCollection(
                        [points for points, _ in some],
                        facecolors=[colour for _, colour in some],
                        edgecolors=LINE,
                        linewidths=0.5,
                        hatch="/////" if hatched else None,
                    )
                    drawn.set_gid(f"{panel}{' masked' * hatched}")
                    axes.add_collection(drawn, autolim=False)
        axes.add_collection(
            LineCollection(
                [points for points, _, _ in self.lines],
                colors=[colour for _, colour, _ in self.lines],
                linewidths=[width for _, _, width in self.lines],
                capstyle="round",
                joinstyle="round",
                zorder=3,
            ),
            autolim=False,
        )
        for (x, y), text, style in self.texts:
            axes.text(x, y, text, va="center_baseline", rotation_mode="anchor", parse_math=False, zorder=4, **style)


def _font(mono: bool, bold: bool) -> dict[str, str]:  # these come with matplotlib
    return {"family": "DejaVu Sans Mono" if mono else "DejaVu Sans", "weight": "bold" if bold else "normal"}


def _width(text: str, size: float, mono: bool = False, bold: bool = False) -> float:
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    font = FontProperties(size=size, **_font(mono, bold))  # type: ignore[arg-type]
    return float(text_to_path.get_text_width_height_descent(text, font, ismath=False)[0])


# --- one drawing -----------------------------------------------------------------------------------------------------

NAMES = 9.5  # points, of the names of axes
DOWN = 30.0  # of the edges of a block, in degrees


def _drawing(picture: Picture, scale: float, alone: bool) -> _Sketch:
    """The tensor: one set coloured, or all."""
    sketch = _Sketch()
    ids, weights = picture.ids, picture.weights
    rows = ids.shape[0] if picture.rows is not None else 1
    columns = ids.shape[int(picture.rows is not None)] if picture.columns is not None else 1
    inner = ids.shape[ids.dim() - len(picture.solid) :]
    ids = ids.reshape(rows, columns, *inner)
    weights = None if weights is None else weights.reshape(rows, columns, *inner)
    paint = _Paint(picture, alone)
    gap = 9.0 if picture.flat else 16.0
    wide = high = 0.0
    for r in range(rows):
        for c in range(columns):
            one = _Sketch()
            named = (c == 0 and r == 0, r == rows - 1 and c == 0)
            part = None if weights is None else weights[r, c]
            if picture.flat:
                ended = r == 0 and c == columns - 1
                wide, high = _grid(one, picture, paint, ids[r, c], part, scale, rows, columns, named, ended)
            else:
                wide, high = _block(one, picture, paint, ids[r, c], scale, columns, named)
            sketch.put(one, c * (wide + gap), r * (high + gap))
    across, down = columns * (wide + gap) - gap, rows * (high + gap) - gap
    if picture.columns is not None:
        at = sketch.bottom + 7
        _axis(sketch, (0, at), (across, at), picture.name(picture.columns, across), below=True)
    if picture.rows is not None:
        at = sketch.left - 7
        _axis(sketch, (at, 0), (at, down), picture.name(picture.rows, down), below=False)
    return sketch


class _Paint:
    """The colour of an element."""

    def __init__(self, picture: Picture, alone: bool) -> None:
        self.picture, self.alone = picture, alone
        self.panel = "one set" if alone else "all sets"
        self.most = 1.0 if picture.weights is None else max(float(picture.weights.max()), 1e-300)

    def seen(self, number: int) -> int:
        """What is told apart in this drawing."""
        return number if number < 0 or not self.alone else int(number == self.picture.one)

    def colour(self, number: int, weight: float | None) -> str:
        if number < 0:
            return MASKED
        if self.alone and number != self.picture.one:
            return OTHER
        colour = ONE if self.alone else self.picture.colours[number]
        return colour if weight is None else _mixed(colour, 0.8 * (1 - weight / self.most))


def _face(
    sketch: _Sketch,
    paint: _Paint,
    ids: list[list[int]],
    weights: list[list[float]] | None,
    at: Point,
    u: Point,
    v: Point,
) -> None:
    """A plane of elements: along u the columns, along v the rows; lines lie between different sets."""

    def corner(c: int, r: int) -> Point:
        return at[0] + c * u[0] + r * v[0], at[1] + c * u[1] + r * v[1]

    rows, columns = len(ids), len(ids[0])
    for r in range(rows):
        for c in range(columns):
            number = ids[r][c]
            points = [corner(c, r), corner(c + 1, r), corner(c + 1, r + 1), corner(c, r + 1)]
            colour = paint.colour(number, None if weights is None else weights[r][c])
            sketch.cell(points, colour, number < 0, paint.panel)
            if c and paint.seen(ids[r][c - 1]) != paint.seen(number):
                sketch.line(corner(c, r), corner(c, r + 1), width=1.3)
            if r and paint.seen(ids[r - 1][c]) != paint.seen(number):
                sketch.line(corner(c, r), corner(c + 1, r), width=1.3)
    around = [corner(0, 0), corner(columns, 0), corner(columns, rows), corner(0, rows), corner(0, 0)]
    sketch.line(*around, width=1.3)


def _axis(sketch: _Sketch, start: Point, end: Point, name: str, *, below: bool) -> None:
    """An arrow in the direction in which an axis counts, and its name on the outer side."""
    dx, dy = end[0] - start[0], end[1] - start[1]
    long = math.hypot(dx, dy) or 1.0
    ux, uy = dx / long, dy / long
    sketch.line(start, end, colour=GREY, width=0.9)
    for side in (1, -1):
        tip = (end[0] - 4 * ux + side * 2.2 * uy, end[1] - 4 * uy - side * 2.2 * ux)
        sketch.line(end, tip, colour=GREY, width=0.9)
    angle = -math.degrees(math.atan2(dy, dx))
    outer = (-uy, ux) if below else (uy, -ux)
    if angle < -60:  # downwards: read upwards, on the left
        angle, outer = 90.0, (-1.0, 0.0)
    middle = ((start[0] + end[0]) / 2 + 8.5 * outer[0], (start[1] + end[1]) / 2 + 8.5 * outer[1])
    sketch.text(middle, name, angle=angle, size=NAMES)


def _grid(
    sketch: _Sketch,
    picture: Picture,
    paint: _Paint,
    ids: Tensor,
    weights: Tensor | None,
    scale: float,
    rows: int,
    columns: int,
    named: tuple[bool, bool],
    labelled: bool,
) -> tuple[float, float]:
    """Elements in a plane, or in a row; with the ids of labels beside."""
    plane = ids.reshape(ids.shape if ids.dim() == 2 else (1, max(1, ids.numel())))
    high, wide = plane.shape
    cell = scale * min(24.0, 230 / (wide * columns))
    up = scale * (min(24.0, 230 / (high * rows)) if len(picture.solid) == 2 else 26.0)
    cell, up = min(cell, 1.8 * up), min(up, 1.3 * cell) if len(picture.solid) == 2 else up
    values = None if weights is None else weights.reshape(plane.shape).tolist()
    _face(sketch, paint, plane.tolist(), values, (0, 0), (cell, 0), (0, up))
    width, height = cell * wide, up * high
    across = picture.sides[picture.solid[-1]] if picture.solid else None
    down = picture.sides[picture.solid[0]] if len(picture.solid) == 2 else None
    if across is not None and named[1]:
        name = picture.name(picture.solid[-1], width * 1.2)
        _axis(sketch, (0, height + 6), (width, height + 6), name, below=True)
    if down is not None and named[0]:
        _axis(sketch, (-6, 0), (-6, height), picture.name(picture.solid[0], height * 1.2), below=False)
    for side, upright in ((across, False), (down, True)):
        for i, (name, runs) in enumerate(_runs(picture, side) if side is not None and labelled else ()):
            away = 4.0 + 30 * i if upright else 7.0 + 10 * i
            for begin, end, number in runs:
                middle = (begin + end) / 2
                at = (width + away, middle * up) if upright else (middle * cell, -away)
                size = max(5.0, min(8.0, up if upright else cell * 1.2))
                sketch.text(at, str(number), size=size, colour=GREY, align="left" if upright else "center")
            at = (width + away, -7.0) if upright else (-4, -away)
            sketch.text(at, name, size=8, colour=GREY, align="left" if upright else "right")
    return width, height


def _runs(picture: Picture, side: _Side) -> Iterator[tuple[str, list[tuple[int, int, int]]]]:
    """The labels that are read at one axis of a side: where each of their ids begins and ends, and the id."""
    sizes = [len(picture.picks[p]) for p in side.places]
    for lookup, places in picture.lookups.items():
        if len(places) == 1 and places[0] in side.places:
            at = side.places.index(places[0])
            ids = picture.labels[lookup.label].ids[list(picture.picks[places[0]])]
            ids = ids.reshape([-1 if d == at else 1 for d in range(len(sizes))]).expand(sizes)
            runs: list[tuple[int, int, int]] = []
            for place, number in enumerate(ids.flatten().tolist()):
                begin = runs.pop()[0] if runs and runs[-1][2] == number else place
                runs.append((begin, place + 1, number))
            yield lookup.label, runs


def _block(
    sketch: _Sketch,
    picture: Picture,
    paint: _Paint,
    ids: Tensor,
    scale: float,
    columns: int,
    named: tuple[bool, bool],
) -> tuple[float, float]:
    """Elements in space, seen from the front corner: three faces."""
    far, right, high = ids.shape
    unit = scale * (100.0 if columns == 1 else 72.0)
    long = [unit * (0.22, 0.42, 0.62, 0.8, 0.92, 1.0, 1.05, 1.1)[min(size, 8) - 1] for size in ids.shape]
    turn = math.radians(DOWN)
    cos, sin = math.cos(turn), math.sin(turn)
    a = (long[1] / right * cos, long[1] / right * sin)  # along the second axis: towards us, to the right
    b = (long[0] / far * cos, -long[0] / far * sin)  # along the first: away, to the right
    c = (0.0, long[2] / high)
    origin = (0.0, long[0] * sin)
    corner = (origin[0] + long[1] * cos, origin[1] + long[1] * sin)  # the one nearest to us
    _face(
        sketch,
        paint,
        ids[:, :, 0].flip(0).tolist(),
        None,
        (origin[0] + far * b[0], origin[1] + far * b[1]),
        a,
        (-b[0], -b[1]),
    )
    _face(sketch, paint, ids[0].T.tolist(), None, origin, a, c)
    _face(sketch, paint, ids[:, -1].T.tolist(), None, corner, b, c)
    if named[0]:
        back, left, down = (picture.name(i, size) for i, size in zip(picture.solid, long, strict=True))
        _axis(sketch, (-6, origin[1]), (-6, origin[1] + long[2]), down, below=False)
        off = (-6 * sin, 6 * cos)
        foot = (origin[0] + off[0], origin[1] + long[2] + off[1])
        _axis(sketch, foot, (foot[0] + long[1] * cos, foot[1] + long[1] * sin), left, below=True)
        foot = (corner[0] - off[0], corner[1] + long[2] + off[1])
        _axis(sketch, foot, (foot[0] + long[0] * cos, foot[1] - long[0] * sin), back, below=True)
    return (long[0] + long[1]) * cos, (long[0] + long[1]) * sin + long[2]


# --- the page --------------------------------------------------------------------------------------------------------

WIDE, MARGIN = 600.0, 12.0  # a page is read at a width of 800 pixels or more, where 9.5 points are 13 pixels


def _fitted(picture: Picture, alone: bool, wide: float) -> _Sketch:
    scale = 1.0
    sketch = _drawing(picture, scale, alone)
    for _ in range(6):
        if sketch.width <= wide:
            break
        scale *= max(0.3, min(0.97, (wide - 40) / max(1.0, sketch.width - 40)))  # names keep their size
        sketch = _drawing(picture, scale, alone)
    return sketch


def _page(pictures: Sequence[Picture]) -> _Sketch:
    """All pictures: of one pattern, one set beside all sets; of several, one set above all sets, side by side."""
    page = _Sketch()
    page.reach((0.0, 0.0), (WIDE, 0.0))
    if len(pictures) == 1:
        _row(page, pictures[0], MARGIN)
    else:
        need = max(_drawing(picture, 0.6, False).width for picture in pictures)
        fits = max(1, min(4, int((WIDE - MARGIN) / (need + MARGIN))))
        rows = math.ceil(len(pictures) / fits)
        columns = math.ceil(len(pictures) / rows)
        for i in range(0, len(pictures), columns):
            _column_row(page, pictures[i : i + columns], columns, page.bottom + MARGIN)
    notes = []
    if any(picture.shortened and picture.told for picture in pictures):
        notes.append("Axes are drawn shortened; the numbers are their true sizes.")
    examples = list(dict.fromkeys(name for picture in pictures for name in picture.examples))
    if examples:
        listed = " and ".join([", ".join(examples[:-1])] * (len(examples) > 1) + examples[-1:])
        notes.append(f"The values of {listed} are examples.")
    if notes:
        page.text((MARGIN, page.bottom + 14), "  ".join(notes), size=8, colour=GREY, align="left")
    page.reach((WIDE, page.bottom + MARGIN))
    return page


def _head(page: _Sketch, picture: Picture, middle: float, top: float, wide: float, titled: bool) -> float:
    if titled:
        if picture.title:
            page.text((middle, top + 8), picture.title, size=12, bold=True)
        top += 18
    size = 10.5
    size = max(6.5, min(size, size * wide / _width(picture.text, size, mono=True)))
    page.text((middle, top + 7), picture.text, size=size, mono=True)
    return top + 18


def _foot(page: _Sketch, picture: Picture, middle: float, top: float, wide: float) -> float:
    for i, text in enumerate(picture.words()):
        for line in _wrapped(text, 9.5, wide):
            page.text((middle, top + 7), line, size=9.5, colour=INK if i < 2 else GREY)
            top += 13.5
    return top


def _keys(page: _Sketch, picture: Picture, middle: float, top: float) -> float:
    """What hatching and paler colours mean."""
    keys = []
    if bool((picture.ids < 0).any()):
        keys.append(("masked: in no set", [(MASKED, True)]))
    if picture.weights is not None:
        keys.append(("paler: smaller weight", [(ONE, False), (_mixed(ONE, 0.45), False), (_mixed(ONE, 0.75), False)]))
    for text, boxes in keys:
        wide = 11 * len(boxes) + 5 + _width(text, 9.5)
        x = middle - wide / 2
        for colour, hatched in boxes:
            page.cell([(x, top + 2), (x + 10, top + 2), (x + 10, top + 12), (x, top + 12)], colour, hatched, "key")
            x += 11
        page.text((x + 4, top + 7), text, align="left")
        top += 14.5
    return top


def _wrapped(text: str, size: float, wide: float) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        joined = f"{lines[-1]} {word}" if lines else word
        if lines and _width(joined, size) <= wide:
            lines[-1] = joined
        else:
            lines.append(word)
    return lines


def _row(page: _Sketch, picture: Picture, top: float) -> None:
    top = _head(page, picture, WIDE / 2, top, WIDE - 2 * MARGIN, bool(picture.title))
    half = (WIDE - 3 * MARGIN) / 2
    drawn = [_fitted(picture, alone, half) for alone in (True, False)]
    middles = [MARGIN + half / 2, WIDE - MARGIN - half / 2]
    high = max(sketch.height for sketch in drawn)
    for sketch, middle, caption in zip(drawn, middles, ("one set", _all(picture)), strict=True):
        page.text((middle, top + 9), caption, size=9.5, colour=GREY)
        page.put(sketch, middle - sketch.width / 2 - sketch.left, top + 22 + (high - sketch.height) / 2 - sketch.top)
    top += 22 + high + 8
    top = _foot(page, picture, WIDE / 2, top, WIDE - 2 * MARGIN)
    _keys(page, picture, WIDE / 2, top)


def _all(picture: Picture) -> str:
    if len(picture.colours) < 2:
        return "all sets"
    repeated = len(set(picture.colours.values())) < len(picture.colours)
    return "all sets; colours repeat" if repeated else "all sets, a colour each"


def _column_row(page: _Sketch, pictures: Sequence[Picture], columns: int, top: float) -> None:
    wide = (WIDE - MARGIN) / columns - MARGIN
    first = (WIDE - len(pictures) * (wide + MARGIN) + MARGIN) / 2 + wide / 2
    middles = [first + i * (wide + MARGIN) for i in range(len(pictures))]
    titled = any(picture.title for picture in pictures)
    heads = [_head(page, p, m, top, wide, titled) for p, m in zip(pictures, middles, strict=True)]
    top = max(heads)
    for alone in (True, False):
        drawn = [_fitted(picture, alone, wide) for picture in pictures]
        high = max(sketch.height for sketch in drawn)
        for picture, sketch, middle in zip(pictures, drawn, middles, strict=True):
            page.text((middle, top + 9), "one set" if alone else _all(picture), size=9.5, colour=GREY)
            page.put(
                sketch, middle - sketch.width / 2 - sketch.left, top + 20 + (high - sketch.height) / 2 - sketch.top
            )
        top += 20 + high + 8
    tops = [_foot(page, p, m, top, wide) for p, m in zip(pictures, middles, strict=True)]
    for picture, middle in zip(pictures, middles, strict=True):
        _keys(page, picture, middle, max(tops))

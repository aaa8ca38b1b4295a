"""Which set every element is in.

`Sets` knows, for one expression over the axes of x (the statistics, a mask, a parameter), how to go from elements to
sets and back: `sum`, `max` and `spread`. It does so in the *elementary view*: one dimension for every axis of the left
side, compositions split, unit axes dropped. A tensor over the sets keeps that rank and has size 1 along every pooled
axis; the axes that labels consume are merged into one, at the place of the first of them, which counts the label's
values. So dense patterns are plain broadcasting, and a label costs one `index_add`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from .axes import Axes
from .partition import Partition
from .spec import Atom, Expr, Group, Lookup

Labels = Mapping[str, Partition]


@dataclass(frozen=True, eq=False)
class Merge:
    """Axes that labels consume together, merged into one axis over the values of the labels.

    `terms` are what stands for them on the right, in order: the place of an axis, or a label.
    """

    places: tuple[int, ...]  # of the axes, ascending
    terms: tuple[int | Lookup, ...]
    sizes: tuple[int, ...]  # of the terms
    ids: Tensor  # [prod of the sizes of the axes] -> 0 .. prod(sizes) - 1
    order: tuple[int, ...]  # of all elementary axes, with those of the merge side by side

    @property
    def count(self) -> int:
        return math.prod(self.sizes)


@dataclass(frozen=True, eq=False)
class Sets:
    """The sets that an expression names over the axes of x. Made by `sets_of`.

    `kept` are the axes that index sets by themselves, `merges` those that labels consume; all others are pooled.
    """

    axes: Axes
    expr: Expr
    kept: frozenset[int]
    merges: tuple[Merge, ...]
    labels: Labels

    # --- shapes

    @cached_property
    def internal_shape(self) -> tuple[int, ...]:
        """Of a tensor over the sets: the elementary rank, size 1 along pooled axes."""
        shape = [size if place in self.kept else 1 for place, size in enumerate(self.axes.sizes)]
        for merge in self.merges:
            shape[merge.places[0]] = merge.count
        return tuple(shape)

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Of a tensor over the sets as the expression writes it."""
        shape: list[int] = []
        for element in self.expr.elements:
            if isinstance(element, Group):
                shape.append(math.prod(size for atom in element.atoms for size in self._sizes_of(atom)))
            else:
                shape.extend(self._sizes_of(element))
        return tuple(shape)

    @property
    def count(self) -> int:
        """Number of sets, empty ones included."""
        return math.prod(self.internal_shape)

    @cached_property
    def internal_steps(self) -> dict[int | Lookup, int]:
        """How far one more of an axis or a label goes in a contiguous tensor of the internal shape."""
        strides = strides_of(self.internal_shape)
        steps: dict[int | Lookup, int] = {place: strides[place] for place in sorted(self.kept)}
        for merge in self.merges:
            for term, step in zip(merge.terms, strides_of(merge.sizes), strict=True):
                steps[term] = step * strides[merge.places[0]]
        return steps

    @cached_property
    def written_steps(self) -> dict[int | Lookup, int]:
        """The same in a contiguous tensor of the shape that the expression writes."""
        terms = _terms(self.axes, self.expr)
        sizes = [self._sizes_of(term)[0] if isinstance(term, Lookup) else self.axes.sizes[term] for term in terms]
        return dict(zip(terms, strides_of(sizes), strict=True))

    def _sizes_of(self, atom: Atom) -> tuple[int, ...]:
        if isinstance(atom, Lookup):
            return (self.labels[atom.label].count,)
        return tuple(self.axes.sizes[place] for place in self.axes.places([atom]))

    @cached_property
    def _written(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The internal shape with merges opened, and its dimensions as the expression orders them, pooled ones last."""
        opened: list[int] = []
        at: dict[int | Lookup, int] = {}
        merges = {merge.places[0]: merge for merge in self.merges}
        for place, size in enumerate(self.internal_shape):
            terms: tuple[int | Lookup, ...] = merges[place].terms if place in merges else (place,)
            sizes = merges[place].sizes if place in merges else (size,)
            for term, count in zip(terms, sizes, strict=True):
                at.setdefault(term, len(opened))
                opened.append(count)
        order = [at[term] for term in _terms(self.axes, self.expr)]
        order += [place for place in range(len(opened)) if place not in order]
        return tuple(opened), tuple(order)

    def outward(self, t: Tensor) -> Tensor:
        """From the internal shape to the one that the expression writes."""
        opened, order = self._written
        t = t.expand(self.internal_shape)
        if order != tuple(range(len(order))):
            t = t.reshape(opened).permute(order)
        return t.reshape(self.shape)

    def inward(self, t: Tensor) -> Tensor:
        """From the shape that the expression writes to the internal one."""
        opened, order = self._written
        if order != tuple(range(len(order))):
            t = t.reshape([opened[place] for place in order]).permute(_inverse(order))
        return t.reshape(self.internal_shape)

    def over(self, t: Tensor, wider: Sets) -> Tensor:
        """A tensor as this expression writes it, made to broadcast over an expression with these atoms and more."""
        own, all_ = _terms(self.axes, self.expr), _terms(wider.axes, wider.expr)
        sizes = {term: self._sizes_of(term) if isinstance(term, Lookup) else (self.axes.sizes[term],) for term in own}
        t = t.reshape([size for term in own for size in sizes[term]])
        t = t.permute([own.index(term) for term in all_ if term in sizes])
        return t.reshape([sizes[term][0] if term in sizes else 1 for term in all_])

    def same(self, other: Sets) -> bool:
        """Whether these are the same sets, for all that can be seen without reading labels."""
        if self.axes != other.axes or self.expr != other.expr:
            return False
        return all(label is other.labels.get(name) for name, label in self.labels.items())

    # --- elements to sets

    @cached_property
    def _pooled(self) -> tuple[int, ...]:
        used = self.kept.union(*(merge.places for merge in self.merges))
        return tuple(place for place in range(self.axes.rank) if place not in used)

    def sum(self, t: Tensor) -> Tensor:
        """Sum over every set. An axis along which t has size 1 and x has not is taken as expanded."""
        present = [place for place in self._pooled if t.shape[place] == self.axes.sizes[place]]
        repeats = math.prod(self.axes.sizes[place] for place in self._pooled if place not in present)
        while present:
            # torch sums by a cascade along what is one axis in memory, and naively beyond: axis by axis, longest first.
            runs = _runs(t, present) if not self.axes.symbolic else [present[-1:]]  # a tracer keeps what is compared
            axes = max(runs, key=lambda run: math.prod(t.shape[place] for place in run)) if len(runs) > 1 else runs[0]
            t = t.sum(axes, keepdim=True)
            present = [place for place in present if place not in axes]
        if repeats != 1:
            t = t * repeats
        for merge in self.merges:
            # One float32 sum after another loses digits (the mean of 4e6 values around 100 is off by 2.66): float64.
            flat = self._flatten(t.double() if t.is_floating_point() else t, merge)
            place = merge.places[0]
            zeros = flat.new_zeros(_replaced(flat.shape, place, merge.count))
            t = self._restore(zeros.index_add(place, merge.ids, flat).to(t.dtype), merge)
        return t

    def max(self, t: Tensor) -> Tensor:
        """Largest element of every set; -inf where a set is empty. t has the elementary shape."""
        if t.numel() == 0:
            return t.new_full(self.internal_shape, -math.inf)
        if self._pooled:
            t = t.amax(self._pooled, keepdim=True)
        for merge in self.merges:
            flat = self._flatten(t, merge)
            place = merge.places[0]
            least = flat.new_full(_replaced(flat.shape, place, merge.count), -math.inf)
            index = merge.ids.reshape([-1 if d == place else 1 for d in range(flat.dim())]).expand(flat.shape)
            t = self._restore(least.scatter_reduce(place, index, flat, "amax"), merge)
        return t

    # --- sets to elements

    def spread(self, t: Tensor) -> Tensor:
        """For every element the value of its set: t of the internal shape, broadcastable to the elementary one."""
        for merge in self.merges:
            place, *others = merge.places
            if others:
                t = t.reshape([size for d, size in enumerate(t.shape) if d not in others])
            t = t.index_select(place, merge.ids)
            if others:
                t = t.reshape(*t.shape[:place], *(self.axes.sizes[p] for p in merge.places), *t.shape[place + 1 :])
                t = t.permute(_inverse(merge.order))
        return t

    def _flatten(self, t: Tensor, merge: Merge) -> Tensor:
        """t, with the axes of the merge flattened into one at the place of the first of them."""
        shape = [self.axes.sizes[d] if d in merge.places else size for d, size in enumerate(t.shape)]
        first = merge.places[0]
        return t.expand(shape).permute(merge.order).flatten(first, first + len(merge.places) - 1)

    def _restore(self, t: Tensor, merge: Merge) -> Tensor:
        """Gives the other axes of the merge their places back, with size 1."""
        for place in merge.places[1:]:
            t = t.unsqueeze(place)
        return t


def sets_of(axes: Axes, expr: Expr, labels: Labels | None = None) -> Sets:
    """The sets that `expr` names; `labels` holds a `Partition` of the right shape for each label in it."""
    lookups = tuple(expr.lookups())
    if not lookups:
        return _dense.__wrapped__(axes, expr) if axes.symbolic else _dense(axes, expr)
    assert labels is not None
    kept = frozenset(term for term in _terms(axes, expr) if isinstance(term, int))
    merges = tuple(_merge(axes, expr, group, kept, labels) for group in _connected(axes, lookups))
    return Sets(axes, expr, kept.difference(*(merge.places for merge in merges)), merges, labels)


@lru_cache(maxsize=4096)
def _dense(axes: Axes, expr: Expr) -> Sets:
    return Sets(axes, expr, frozenset(axes.places(expr.atoms())), (), {})


def _terms(axes: Axes, expr: Expr) -> list[int | Lookup]:
    """What indexes the sets, in the order of the expression: places of axes, and labels."""
    terms: list[int | Lookup] = []
    for atom in expr.atoms():
        terms.extend([atom] if isinstance(atom, Lookup) else axes.places([atom]))
    return terms


def _connected(axes: Axes, lookups: tuple[Lookup, ...]) -> list[set[int]]:
    """The axes that labels consume, those in one set that any label reads together."""
    groups: list[set[int]] = []
    for lookup in lookups:
        group = set(axes.places(lookup.axes))
        apart = [other for other in groups if not other & group]
        groups = [*apart, group.union(*(other for other in groups if other & group))]
    return groups


def _merge(axes: Axes, expr: Expr, group: set[int], kept: frozenset[int], labels: Labels) -> Merge:
    places = tuple(sorted(group))
    terms = tuple(
        term
        for term in _terms(axes, expr)
        if (term in group if isinstance(term, int) else group.issuperset(axes.places(term.axes)))
    )
    sizes = tuple(labels[t.label].count if isinstance(t, Lookup) else axes.sizes[t] for t in terms)
    device = next(labels[t.label].device for t in terms if isinstance(t, Lookup))
    ids: Tensor | None = None
    for term, size in zip(terms, sizes, strict=True):
        if isinstance(term, Lookup):
            read = axes.places(term.axes)
            value = labels[term.label]._ids.permute(_inverse(read))
        else:
            read = (term,)
            value = torch.arange(axes.sizes[term], device=device)
        value = value.reshape([axes.sizes[p] if p in read else 1 for p in places])
        ids = value if ids is None else ids * size + value
    assert ids is not None
    ids = ids.expand([axes.sizes[p] for p in places]).reshape(-1)  # of one label: a view of its own ids
    before = [p for p in range(axes.rank) if p < places[0]]
    after = [p for p in range(axes.rank) if p > places[0] and p not in places]
    return Merge(places, terms, sizes, ids, (*before, *places, *after))


def _runs(t: Tensor, places: list[int]) -> list[list[int]]:
    """These axes of t, those together that are one axis in memory."""
    runs: list[list[int]] = []
    for place in sorted(places, key=t.stride, reverse=True):
        if runs and t.stride(runs[-1][-1]) == t.stride(place) * t.shape[place]:
            runs[-1].append(place)
        else:
            runs.append([place])
    return runs


def _inverse(order: tuple[int, ...]) -> tuple[int, ...]:
    """The permutation that sorts `order`; of a permutation, its inverse."""
    return tuple(sorted(range(len(order)), key=order.__getitem__))


def strides_of(sizes: Sequence[int]) -> list[int]:
    """Strides of a contiguous tensor."""
    return [math.prod(sizes[place + 1 :]) for place in range(len(sizes))]


def _replaced(shape: Iterable[int], place: int, size: int) -> list[int]:
    return [size if d == place else s for d, s in enumerate(shape)]

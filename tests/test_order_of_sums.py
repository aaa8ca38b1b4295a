"""A set has one order of summation: how it is cut into rows and columns is a function of the set alone."""

import math
import os
from dataclasses import dataclass, field, replace

import cases
import pytest
import torch

from flexnorm import Partition
from flexnorm.arguments import Formula, Options
from flexnorm.axes import bind
from flexnorm.kernels import cpu
from flexnorm.sets import sets_of
from flexnorm.spec import Dots, Group, Spec

LIBRARY = cpu.library()
if os.environ.get("FLEXNORM_CPU") == "0" or (
    isinstance(LIBRARY, str) and os.environ.get("FLEXNORM_BUILD") != "required"
):
    pytest.skip(LIBRARY, allow_module_level=True)

EXTENTS = [1, 2, 7, 49, 784, 20_000]  # of a pooled axis
BATCHES = [1, 2, 3, 7, 64, 2048]
MOST = 1 << 22  # elements


# --- patterns whose sets lie inside of one sample --------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """A pattern, the sizes of its elementary axes, the first of which counts the samples, or is what a label reads."""

    name: str
    pattern: str
    sizes: tuple[int, ...]  # of all elementary axes
    told: dict = field(default_factory=dict)
    labels: dict = field(default_factory=dict)  # the number of values in one sample
    mask: str | None = None
    affine: str | None = None
    options: dict = field(default_factory=dict)

    @property
    def spec(self):
        return Spec.parse(self.pattern)

    @property
    def shape(self):
        """Of x: compositions are products."""
        sizes, shape = list(self.sizes), []
        elements = self.spec.x.elements
        named = sum(len(e.atoms) if isinstance(e, Group) else 1 for e in elements if not isinstance(e, Dots))
        for element in elements:
            if isinstance(element, Dots):
                shape += [sizes.pop(0) for _ in range(len(self.sizes) - named)]
            else:
                count = len(element.atoms) if isinstance(element, Group) else 1
                shape.append(math.prod(sizes.pop(0) for _ in range(count)))
        return tuple(shape)

    @property
    def axes(self):
        return bind(self.spec, self.shape, tuple(self.told.items()))

    def kept(self):
        return set(self.axes.places(a for a in self.spec.sets.atoms() if not hasattr(a, "label")))

    def read(self):
        """Axes that labels of the sets read."""
        return {p for lookup in self.spec.sets.lookups() for p in self.axes.places(lookup.axes)}

    def masked(self):
        return set() if self.spec.mask is None else set(self.axes.places(self.spec.mask.atoms()))

    def sized(self, place, size):
        told = {k: size if k == self.axes.names[place] else v for k, v in self.told.items()}
        return replace(self, sizes=(*self.sizes[:place], size, *self.sizes[place + 1 :]), told=told)

    @property
    def packed(self):
        """Samples lie one after another along the first axis, and a label says which one an element is of."""
        return 0 not in self.kept()


def of_cases():
    for case in cases.CASES:
        spec = Spec.parse(case.pattern)
        if not case.shape or isinstance(spec.x.elements[0], Group):
            continue
        axes = bind(spec, case.shape, tuple(case.sizes.items()))
        subject = Subject(
            case.name,
            case.pattern,
            axes.sizes,
            case.sizes,
            {name: count for name, (_, count) in case.labels.items()},
            case.mask and case.mask[0],
            case.affine,
            case.options,
        )
        if 0 in subject.kept() or [lookup.axes for lookup in spec.sets.lookups()] == [spec.x.elements[:1]]:
            yield subject


OF_THE_GALLERY = [
    Subject("group_norm", "n (g c) ... -> n g", (3, 4, 2, 6, 5), {"g": 4}, affine="(g c)"),
    Subject("group_norm_rows", "n (g c) h w -> n g", (3, 32, 8, 4, 3), {"g": 32, "c": 8}, affine="(g c)"),
    Subject("groups_of_channels", "n (g c) ... -> n g", (3, 4, 2, 6, 5), {"c": 2}),
    Subject("instance_norm", "n c ... -> n c", (3, 8, 6, 5), affine="c"),
    Subject("layer_norm_image", "n c ... -> n", (3, 8, 6, 5)),
    Subject("rms_of_heads", "b t (h c) -> b t h", (3, 5, 2, 8), {"h": 2}, options={"center": False}),
    Subject("ghost", "k n c ... -> k c", (3, 4, 5, 6)),
    Subject("positional", "n c h w -> n h w", (3, 8, 6, 5), affine="c"),
    Subject("patches", "n c (y h) (x w) -> n y x", (3, 4, 2, 3, 2, 3), {"h": 3, "w": 3}),
    Subject("conditional", "n (g c) ... -> n g", (3, 2, 4, 6, 5), {"g": 2}, affine="n (g c)"),
    Subject("regions_alone", "n c h w -> region[n h w]", (3, 5, 6, 7), labels={"region": 3}, affine="c"),
    Subject("regions_of_channels", "n c h w -> n c region[n h w]", (3, 5, 6, 7), labels={"region": 3}),
    Subject("utterance_norm", "b f t -> b f", (3, 5, 9)),
    Subject("causal_axis", "b c t -> b t", (3, 8, 9), affine="c"),
    Subject("whole_utterance", "b c t, b t -> b", (3, 5, 9), mask="bool", affine="c"),
    Subject("frames_last", "b t (g c), b t -> b g", (3, 9, 2, 3), {"g": 2}, mask="bool", affine="(g c)"),
    Subject("frames_last_wide", "b t (g c), b t -> b g", (3, 9, 2, 40), {"g": 2}, mask="bool", affine="(g c)"),
    Subject("frames_each", "b t c, b t -> b c", (3, 9, 5), mask="bool", affine="c"),
    Subject("frames_each_turned", "b c t, b t -> b c", (3, 5, 9), mask="bool", affine="c"),
    Subject("pixels", "n c h w, n h w -> n c", (3, 4, 5, 6), mask="bool", affine="c"),
    Subject("pixels_group", "n (g c) h w, n h w -> n g", (3, 2, 3, 5, 6), {"g": 2}, mask="bool", affine="(g c)"),
    Subject("elements", "b t c, b t c -> b", (3, 5, 6), mask="bool"),
    Subject("bands_of_frames", "n f t, n t -> n band[f]", (3, 7, 9), labels={"band": 3}, mask="bool", affine="f"),
    Subject("graph_each", "v c -> graph[v] c", (30, 6), labels={"graph": 4}, affine="c"),
    Subject("graph_all", "v c -> graph[v]", (30, 48), labels={"graph": 4}, affine="c"),
    Subject("graph_groups", "v (g c) -> graph[v] g", (30, 3, 16), {"g": 3}, {"graph": 4}, affine="(g c)"),
    Subject("graph_masked", "v c, v -> graph[v]", (30, 6), labels={"graph": 4}, mask="bool"),
]
SUBJECTS = [*of_cases(), *OF_THE_GALLERY]
each = pytest.mark.parametrize("subject", SUBJECTS, ids=[s.name for s in SUBJECTS])


def variants(subject, extents=EXTENTS):
    """With each pooled axis of each extent."""
    yield subject
    kept = subject.kept()
    for place in range(1, len(subject.sizes)):
        if place in kept or str(subject.axes.names[place]).isdigit():
            continue
        for extent in extents:
            other = subject.sized(place, extent)
            if math.prod(other.sizes) <= MOST // 4:
                yield other


# --- tensors ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Tensors:
    """x and dy, and what goes with them."""

    x: torch.Tensor
    dy: torch.Tensor
    mask: torch.Tensor | None
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    labels: dict


def formula(subject):
    spec = subject.spec
    affine = [spec.read(subject.affine, "affine")] if subject.affine else []
    return Formula(spec, Options(**subject.options), affine, subject.told)


def prepared(subject, t):
    return formula(subject).prepare(t.x, t.mask, [(t.weight, t.bias)] if subject.affine else [], t.labels)


# --- the cut ---------------------------------------------------------------------------------------------------------


@each
def test_the_cut_reads_no_number_of_samples(subject):
    """Asked without data. Columns that hold the samples themselves are as many times as wide."""
    differ = []
    for variant in variants(subject):
        found = {}
        for n in BATCHES:
            many = variant.sized(0, n)
            if math.prod(many.sizes) > 1 << 27 or (many.labels and math.prod(many.sizes) > 1 << 20):
                continue
            t = made_without_data(many)
            form = cpu.bound(prepared(many, t)[0], t.x)
            kinds = (form["sets"]["kind"], form["mask"]["kind"] != 0, form["params"]["kind"], form["segment"] == ())
            found[n] = (form["columns"], kinds)
        first = min(found)
        for n, (columns, kinds) in found.items():
            once = found[max(found)][0] == found[first][0]  # of the largest and the least
            expected = found[first][0] if once else found[first][0] * n // first
            if columns != expected or kinds != found[first][1]:
                differ.append(f"{variant.sizes}: {found}")
                break
    assert not differ, "\n".join(differ)


def made_without_data(subject):
    """Memory that nobody reads or writes takes none."""
    axes, spec = subject.axes, subject.spec
    labels, exprs = {}, [spec.sets, *([spec.read(subject.affine, "affine")] if subject.affine else [])]
    for lookup in (lookup for expr in exprs for lookup in expr.lookups()):
        shape = [axes.sizes[p] for p in axes.places(lookup.axes)]
        count = subject.labels[lookup.label]
        ids = torch.arange(math.prod(shape)).remainder(count).reshape(shape)
        labels[lookup.label] = Partition(ids, count)
    mask = weight = None
    if subject.mask is not None:
        mask = torch.ones(sets_of(axes, spec.mask).shape, dtype=torch.bool if subject.mask == "bool" else torch.float32)
    if subject.affine:
        weight = torch.empty(sets_of(axes, exprs[-1], labels).shape)
    x = torch.empty(subject.shape)
    return Tensors(x, x, mask, weight, weight, labels)

"""A set has one order of summation, its own: alone, in any batch, on any threads and with any padding, bit by bit.

So y and dx have the same bits wherever the sample is. Gradients of parameters sum over the batch: they have the same
bits on any number of threads.
"""

import math
import os
import subprocess
import sys
from dataclasses import dataclass, field, replace

import cases
import pytest
import torch

from flexnorm import Norm, Partition, normalize
from flexnorm.axes import bind
from flexnorm.calls.arguments import Formula, Options
from flexnorm.images import ChannelGroupNorm
from flexnorm.kernels import cpu
from flexnorm.presets import (
    RegionNorm,
    SensorNorm,
    SpectralGroupNorm,
    SubgraphNorm,
    TemporalGroupNorm,
    WeightedGroupNorm,
)
from flexnorm.sequences import SequenceGroupNorm, TokenGroupNorm
from flexnorm.sets import sets_of
from flexnorm.spec import Dots, Group, Spec

LIBRARY = cpu.library()
if os.environ.get("FLEXNORM_CPU") == "0" or (
    isinstance(LIBRARY, str) and os.environ.get("FLEXNORM_BUILD") != "required"
):
    pytest.skip(LIBRARY, allow_module_level=True)

EXTENTS = [1, 2, 7, 49, 784, 20_000]  # of a pooled axis
BATCHES = [1, 2, 3, 7, 64, 2048]
THREADS = [2, 3, 8]
SEVERAL = 1 << 15  # elements that more than one thread works on
MOST = 1 << 20  # elements of a problem
PADDINGS = [(0, 1), (9, 0), (30, 40), (0, 600)]  # before and after


@pytest.fixture(autouse=True)
def _engine():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
    LIBRARY.set_width(0)


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
            if math.prod(other.sizes) <= MOST:
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


def made(subject, dtype=torch.float32, *, seed=0):
    """Labels that read the samples' own axis have values of one sample only."""
    g = torch.Generator().manual_seed(seed)
    axes, spec = subject.axes, subject.spec

    def randn(shape):
        return torch.randn(shape, generator=g)

    x = (randn(subject.shape) + 0.5).to(dtype)
    dy = randn(subject.shape).to(dtype)
    labels = {}
    exprs = [spec.sets, *([spec.read(subject.affine, "affine")] if subject.affine else [])]
    for lookup in (lookup for expr in exprs for lookup in expr.lookups()):
        if lookup.label in labels:
            continue
        count = subject.labels[lookup.label]
        places = axes.places(lookup.axes)
        ids = torch.randint(0, count, [axes.sizes[p] for p in places], generator=g)
        total = count
        if subject.packed and 0 in places and len(places) > 1:
            turn = [-1 if p == 0 else 1 for p in places]
            ids, total = ids + count * torch.arange(axes.sizes[0]).reshape(turn), count * axes.sizes[0]
        labels[lookup.label] = Partition(ids, total)
    mask = weight = bias = None
    if subject.mask is not None:
        shape = sets_of(axes, spec.mask).shape
        draw = torch.rand(shape, generator=g)
        mask = draw < 0.7 if subject.mask == "bool" else (draw + 0.1).to(dtype)
    if subject.affine:
        shape = sets_of(axes, exprs[-1], labels).shape
        weight, bias = randn(shape), randn(shape)
    return Tensors(x, dy, mask, weight, bias, labels)


def along(expr, axes, place):
    """The dim of a tensor over an expression that is this axis."""
    for dim, element in enumerate(_dims(expr, axes)):
        if element == (place,):
            return dim
    return None


def _dims(expr, axes):
    for element in expr.elements:
        if isinstance(element, Group):
            yield tuple(axes.places(element.atoms))
        elif hasattr(element, "label"):
            yield None
        else:
            yield from ((p,) for p in axes.places([element]))


def taken(subject, t, chosen):
    """The samples with these numbers alone; where samples are packed, these elements."""
    axes, spec = subject.axes, subject.spec
    affine = spec.read(subject.affine, "affine") if subject.affine else None

    def take(value, dim):
        return value if value is None or dim is None else value.index_select(dim, chosen)

    labels = {}
    for lookup in (lookup for expr in (spec.sets, affine) if expr is not None for lookup in expr.lookups()):
        places, whole = axes.places(lookup.axes), t.labels[lookup.label]
        ids, count = take(whole.ids, places.index(0) if 0 in places else None), whole.count
        of_params = affine is not None and lookup in affine.lookups()
        if subject.packed and 0 in places and not of_params:  # numbered anew
            ids = ids.unique(return_inverse=True)[1]
            count = int(ids.max()) + 1
        labels[lookup.label] = Partition(ids, count)
    mask = None if t.mask is None else take(t.mask, along(spec.mask, axes, 0))
    dim = None if affine is None else along(affine, axes, 0)
    return Tensors(take(t.x, 0), take(t.dy, 0), mask, take(t.weight, dim), take(t.bias, dim), labels)


def formula(subject):
    spec = subject.spec
    affine = [spec.read(subject.affine, "affine")] if subject.affine else []
    return Formula(spec, Options(**subject.options), affine, subject.told)


def prepared(subject, t):
    return formula(subject).prepare(t.x, t.mask, [(t.weight, t.bias)] if subject.affine else [], t.labels)


def results(subject, t, threads=1):
    """y and dx."""
    torch.set_num_threads(threads)
    recipe, operands = prepared(subject, t)
    assert cpu.refusal(recipe, operands) is None
    y, kept = cpu.forward(recipe, operands)
    return y, cpu.backward(recipe, operands, kept, t.dy).x


def same(a, b):
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


class Differences(list):
    """Says all that differ, not only the first."""

    def compare(self, what, ours, theirs):
        for name, a, b in zip(("y", "dx"), ours, theirs, strict=True):
            if not same(a, b):
                self.append(f"{name} {what}: {int((a != b).sum())} of {a.numel()}")

    def done(self):
        assert not self, "\n".join([f"{len(self)} differ", *self[:20]])


# --- the cut ---------------------------------------------------------------------------------------------------------


@each
def test_the_cut_reads_no_number_of_samples(subject):
    """Asked without data. Columns that hold the samples themselves are as many times as wide."""
    differ = Differences()
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
    differ.done()


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


# --- batches and threads ---------------------------------------------------------------------------------------------


def alone_and_together(subject, dtype, differ):
    t = made(subject, dtype)
    together = results(subject, t)
    for threads in THREADS if math.prod(subject.sizes) >= SEVERAL else []:
        differ.compare(f"{subject.sizes} on {threads} threads", results(subject, t, threads), together)
    if subject.packed and len(subject.read()) == 1:
        ids = t.labels[next(subject.spec.sets.lookups()).label].ids
        groups = [(ids == i).nonzero()[:, 0] for i in ids.unique()[:3]]
    else:
        n = subject.sizes[0]
        groups = [torch.tensor([0]), torch.tensor([n - 1]), *([torch.tensor([n - 1, 0])] if n > 2 else [])]
    for chosen in groups:
        part = results(subject, taken(subject, t, chosen))
        differ.compare(f"{subject.sizes} alone", part, [r.index_select(0, chosen) for r in together])


@each
def test_alone_and_in_a_batch(subject):
    differ = Differences()
    for variant in variants(subject):
        alone_and_together(variant, torch.float32, differ)
        if math.prod(variant.sizes) < 1 << 11 and not variant.packed:
            alone_and_together(variant.sized(0, 67), torch.float32, differ)
    differ.done()


@each
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_alone_and_in_a_batch_of_other_dtypes(subject, dtype):
    differ = Differences()
    for variant in variants(subject, [784]):
        alone_and_together(variant, dtype, differ)
    differ.done()


@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("name", ["group_norm", "utterance", "graph_all", "token_group"])
def test_alone_and_in_a_batch_with_narrower_vectors(name, width):
    LIBRARY.set_width(width)
    subject = next(s for s in SUBJECTS if s.name == name)
    differ = Differences()
    for variant in variants(subject, [7, 784]):
        alone_and_together(variant, torch.float32, differ)
        if subject in MASKED:
            with_padding(variant, torch.float32, differ)
    differ.done()


def test_samples_that_do_not_lie_side_by_side():
    """The layout of a set is its own."""
    differ = Differences()
    for name in ("group_norm", "instance_norm", "layer_last", "positional", "bands", "frames_last"):
        subject = next(s for s in SUBJECTS if s.name == name)
        for variant in variants(subject, [7, 49]):
            t = made(variant.sized(0, 6))
            every = torch.arange(0, 6, 2)
            apart = taken(variant, t, every)
            strided = replace(apart, x=t.x[::2])
            differ.compare(f"{variant.sizes}", results(variant, strided), results(variant, apart))
    differ.done()


@pytest.mark.parametrize("rows", [[3, 5, 7], [300, 9000, 1, 2000], [30_000, 9, 64, 65]])
@pytest.mark.parametrize("name", ["graph_each", "graph_all", "graph_groups", "packed"])
def test_beside_larger_sets(name, rows):
    """What other sets there are, and how large they are, changes no bit; nor does the order in which they are mixed."""
    subject = next(s for s in SUBJECTS if s.name == name)
    label = next(subject.spec.sets.lookups()).label
    subject = replace(subject.sized(0, sum(rows)), labels={label: len(rows)})
    ids = Partition.from_sizes(rows).ids
    t = replace(made(subject), labels={label: Partition(ids, len(rows))})
    differ = Differences()
    together = results(subject, t)
    for threads in THREADS:
        differ.compare(f"on {threads} threads", results(subject, t, threads), together)
    mixed = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(1))]
    place = mixed.argsort(stable=True).argsort()  # members of each set stay in their order
    other = replace(t, x=t.x[place], dy=t.dy[place], labels={label: Partition(mixed, len(rows))})
    differ.compare("mixed", results(subject, other), [r[place] for r in together])
    for group, size in enumerate(rows):
        chosen = (ids == group).nonzero()[:, 0]
        part = results(subject, taken(subject, t, chosen))
        differ.compare(f"{size} rows alone", part, [r[chosen] for r in together])
    differ.done()


@pytest.mark.parametrize("channels", [1, 3, 12])
@pytest.mark.parametrize("before", [200, 300, 512, 1030])
def test_sets_that_lie_across_tiles_of_columns(before, channels):
    """The axis of the nodes is the innermost: a graph lies among the columns. In doubles every bit is seen."""
    g = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(channels, before + 300, generator=g, dtype=torch.float64) for _ in range(2))
    ids = torch.arange(before + 300) >= before
    options = {"g": 1 if channels < 12 else 4}

    def both(x, dy, ids):
        x = x.t().requires_grad_()
        y = normalize(x, "v (g c) -> graph[v] g", graph=Partition(ids.long()), **options)
        return y.detach(), torch.autograd.grad(y, x, dy.t())[0]

    together = both(x, dy, ids)
    alone = both(x[:, before:].contiguous(), dy[:, before:].contiguous(), ids[before:] & False)
    differ = Differences()
    differ.compare(f"{channels} channels", [r[before:] for r in together], alone)
    differ.done()


# --- padding ---------------------------------------------------------------------------------------------------------

MASKED = [s for s in SUBJECTS if s.mask == "bool" and not s.packed and s.masked() - s.kept()]


def padded(subject, t, axes, before, after):
    """The samples with so much more along these axes, of NaN, and the mask that says so."""
    spec = subject.spec
    larger = subject
    for place, b, a in zip(axes, before, after, strict=True):
        larger = larger.sized(place, subject.sizes[place] + b + a)
    sizes = larger.sizes

    def widened(value, groups, fill):
        """Along the dims that are these axes; those that are compositions of several are opened first."""
        opened = [[subject.sizes[p] for p in group] for group in groups]
        value = value.reshape([s for group in opened for s in group])
        flat = [p for group in groups for p in group]
        pad = []
        for p in reversed(flat):
            pad += [before[axes.index(p)], after[axes.index(p)]] if p in axes else [0, 0]
        value = torch.nn.functional.pad(value.to(torch.uint8) if value.dtype == torch.bool else value, pad, value=fill)
        return value.reshape([math.prod(sizes[p] for p in group) for group in groups])

    places = list(_dims(spec.x, subject.axes))
    if len(places) != len(subject.shape):
        raise AssertionError(places)
    x, dy = (widened(v, places, float("nan")) for v in (t.x, t.dy))
    mask = widened(t.mask, list(_dims(spec.mask, subject.axes)), 0).bool()
    return larger, replace(t, x=x, dy=dy, mask=mask)


def cropped(subject, larger, value, axes, before):
    """The result without the padding."""
    value = value.reshape(larger.sizes)
    for place, b in zip(axes, before, strict=True):
        value = value.narrow(place, b, subject.sizes[place])
    return value.reshape(subject.shape)


def with_padding(subject, dtype, differ):
    axes = sorted(subject.masked() - subject.kept())
    t = made(subject, dtype)
    whole = replace(t, mask=torch.ones_like(t.mask))
    plain, holes = results(subject, replace(t, mask=None)), results(subject, t)
    differ.compare(f"{subject.sizes} with a mask of all", results(subject, whole), plain)
    named = {subject.axes.names[p] for p in axes}
    if named & set(subject.told) or subject.read().intersection(axes):  # sizes that were told, and labels, stay
        return
    for left, right in PADDINGS:
        before, after = [left] * len(axes), [right] * len(axes)
        larger, more = padded(subject, whole, axes, before, after)
        if math.prod(larger.sizes) > MOST // 2:
            continue
        got = results(larger, more)
        differ.compare(f"{larger.sizes}, padded", [cropped(subject, larger, r, axes, before) for r in got], plain)
        if math.prod(larger.sizes) >= SEVERAL:
            differ.compare(f"{larger.sizes} on 3 threads", results(larger, more, 3), got)
        if left == 0 and len(axes) == 1:
            got = results(*padded(subject, t, axes, before, after))
            got = [cropped(subject, larger, r, axes, before) for r in got]
            differ.compare(f"{larger.sizes} with holes", got, holes)


@pytest.mark.parametrize("subject", MASKED, ids=[s.name for s in MASKED])
def test_any_padding(subject):
    differ = Differences()
    for variant in variants(subject):
        with_padding(variant, torch.float32, differ)
    differ.done()


@pytest.mark.parametrize("subject", MASKED, ids=[s.name for s in MASKED])
def test_any_padding_of_other_dtypes(subject):
    differ = Differences()
    for dtype in (torch.float64, torch.bfloat16):
        for variant in variants(subject, [49]):
            with_padding(variant, dtype, differ)
    differ.done()


BETWEEN = """
import sys, torch
from flexnorm import normalize
first, second = (getattr(torch, name) for name in sys.argv[1:])
x, (one, other) = torch.randn(1, 8, 1024), torch.zeros(2, 1, 1024, dtype=torch.bool)
one[:, 500:900], other[:, :10] = True, True

def call(dtype, mask):
    return normalize(x.to(dtype), "n c t, n t -> n", mask)

expected = call(first, one)
call(second, other), call(second, other)
assert torch.equal(call(first, one), expected)
"""


@pytest.mark.parametrize("dtypes", [("float32", "bfloat16"), ("bfloat16", "float32"), ("float16", "bfloat16")])
def test_calls_of_another_dtype_between(dtypes):
    """What a thread remembers of a mask is of one call. In a new process calls of both dtypes have equal numbers."""
    subprocess.run([sys.executable, "-c", BETWEEN, *dtypes], check=True)


LENGTHS = [[15_000, 14_999, 700], [3000, 1, 64], [131_072, 70_000, 65_536]]  # of frames; fewer where a frame is wide


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("name", ["whole_utterance", "frames_last", "frames_last_wide", "frames_each", "utterance"])
def test_utterances_of_other_lengths(name, lengths):
    """Each as it is alone, without a mask."""
    subject = next(s for s in MASKED if s.name == name)
    time = subject.axes.place["t"]
    dim = along(subject.spec.x, subject.axes, time)
    while max(lengths) * math.prod(subject.sizes) // subject.sizes[time] > 2 * MOST:
        lengths = [length // 2 for length in lengths]
    batch = subject.sized(time, max(lengths)).sized(0, len(lengths))
    t = made(batch)
    steps = torch.arange(max(lengths))
    valid = steps < torch.tensor(lengths)[:, None]  # [b, t]
    shape = [1] * t.x.dim()
    shape[0], shape[dim] = valid.shape
    outside = ~valid.reshape(shape)
    x, dy = (v.masked_fill(outside, float("nan")) for v in (t.x, t.dy))
    differ = Differences()
    for threads in (1, 3):
        together = results(batch, replace(t, x=x, dy=dy, mask=valid), threads)
        for i, length in enumerate(lengths):
            own = batch.sized(time, length).sized(0, 1)
            x1, dy1 = (v[i : i + 1].narrow(dim, 0, length).contiguous() for v in (t.x, t.dy))
            alone = results(own, replace(t, x=x1, dy=dy1, mask=None))
            got = [r[i : i + 1].narrow(dim, 0, length) for r in together]
            differ.compare(f"{length} of {max(lengths)} on {threads} threads", got, alone)
    differ.done()


# --- layers ----------------------------------------------------------------------------------------------------------


def outcome(layer, x, dy, *args, **kwargs):
    x = x.detach().requires_grad_()
    y = layer(x, *args, **kwargs)
    return y.detach(), torch.autograd.grad(y, x, dy)[0]


LAYERS = {  # with the shape of a sample
    "channel_group": (lambda: ChannelGroupNorm(4, 32), (32, 14, 14)),
    "channel_group_unequal": (lambda: ChannelGroupNorm(3, 32, groups=[4, 8, 20]), (32, 14, 14)),
    "tokens": (lambda: TokenGroupNorm(8, 768), (49, 768)),
    "sequence": (lambda: SequenceGroupNorm(4, 64), (64, 784)),
    "layer": (lambda: Norm("... c -> ...", affine="c", c=384), (100, 384)),
    "rms": (lambda: Norm("... c -> ...", affine="c", c=96, center=False), (100, 96)),
    "sensors": (lambda: SensorNorm([3, 3, 6]), (12, 200)),
    "sensors_flat": (lambda: SensorNorm([30, 3, 600]), (633,)),
    "weighted": (lambda: WeightedGroupNorm(2, 6), (6, 20, 20)),
    "frames": (lambda: TemporalGroupNorm(4, 32), (32, 9, 6, 5)),
    "clip": (lambda: TemporalGroupNorm(4, 32, "clip"), (32, 9, 6, 5)),
    "spectral": (lambda: SpectralGroupNorm(2, 2, bands=[1, 4, 12], num_samples=32), (2, 32)),
}


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name, memory):
    make, shape = LAYERS[name]
    layer = make()
    if memory == torch.channels_last and len(shape) != 3:
        return
    differ = Differences()
    for n in (3, 24):
        x, dy = (torch.randn(n, *shape).contiguous(memory_format=memory) for _ in range(2))
        torch.set_num_threads(1)
        together = outcome(layer, x, dy)
        for threads in THREADS:
            torch.set_num_threads(threads)
            differ.compare(f"{n} on {threads} threads", outcome(layer, x, dy), together)
        for i in (0, n - 1):
            alone = outcome(layer, x[i : i + 1], dy[i : i + 1])
            differ.compare(f"one of {n}", alone, [r[i : i + 1] for r in together])
    differ.done()


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_of_parameters_are_summed_alike_on_any_threads(name):
    make, shape = LAYERS[name]
    layer = make()
    x, dy = torch.randn(2, 24, *shape)
    parameters = [p for p in layer.parameters() if p.requires_grad]
    found = []
    for threads in (1, *THREADS):
        torch.set_num_threads(threads)
        found.append(torch.autograd.grad(layer(x), parameters, dy))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("bands", [4, [1, 30, 9]])
def test_bands(bands):
    spectrograms = pytest.importorskip("flexnorm.spectrograms", exc_type=ImportError)
    layer = spectrograms.MelBandNorm(bands, 40)
    x, dy = torch.randn(2, 5, 40, 300)
    lengths = torch.tensor([300, 120, 7, 300, 1])
    differ = Differences()
    together = outcome(layer, x, dy, lengths=lengths)
    for i, length in enumerate(lengths.tolist()):
        alone = outcome(layer, x[i : i + 1, :, :length].contiguous(), dy[i : i + 1, :, :length].contiguous())
        differ.compare(f"{length} frames alone", alone, [r[i : i + 1, :, :length] for r in together])
    differ.done()


GRAPHS = {
    "NodeGroupNorm": (4, 48),
    "GraphGroupNorm": (4, 48),
    "FeatureGroupNorm": (48,),
    "GraphNorm": (48,),
    "InstanceNorm": (48,),
    "LayerNorm": (48,),
}


@pytest.mark.extras
@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("sizes", [[24, 9, 30], [3000, 40, 1, 700]])
def test_graphs(name, sizes):
    graphs = pytest.importorskip("flexnorm.graphs", exc_type=ImportError)
    layer = getattr(graphs, name)(*GRAPHS[name])
    batch = Partition.from_sizes(sizes).ids
    x, dy = torch.randn(2, len(batch), 48)
    of_nodes = name == "NodeGroupNorm"
    differ = Differences()
    together = outcome(layer, x, dy, *([] if of_nodes else [batch]))
    for i, size in enumerate(sizes):
        own = batch == i
        alone = outcome(layer, x[own], dy[own], *([] if of_nodes else [torch.zeros(size, dtype=torch.long)]))
        differ.compare(f"graph of {size}", alone, [r[own] for r in together])
    differ.done()


def test_parts_of_graphs():
    layer, sizes = SubgraphNorm(4, 32), [24, 300, 9]
    batch = Partition.from_sizes(sizes).ids
    part = torch.arange(len(batch)) * 7 % 3
    x, dy = torch.randn(2, len(batch), 32)
    differ = Differences()
    together = outcome(layer, x, dy, part, batch=batch)
    for i in range(len(sizes)):
        own = batch == i
        alone = outcome(layer, x[own], dy[own], part[own], batch=torch.zeros_like(batch[own]))
        differ.compare(f"graph {i}", alone, [r[own] for r in together])
    differ.done()


def test_regions_beside_other_images():
    layer = RegionNorm(4, 3)
    x, dy = torch.randn(2, 3, 4, 30, 40)
    region = torch.randint(0, 3, (3, 30, 40))
    region[1] = torch.arange(40) // 14
    differ = Differences()
    together = outcome(layer, x, dy, region)
    for i in range(3):
        alone = outcome(layer, x[i : i + 1], dy[i : i + 1], region[i : i + 1])
        differ.compare(f"image {i}", alone, [r[i : i + 1] for r in together])
    differ.done()

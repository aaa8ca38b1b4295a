"""Rows and columns: a walk over the form meets every element once, and says of it what the loops say."""

import itertools
import math
import random

import cases
import oracle
import pytest
import torch
from cutter import Cutter

from flexnorm import Partition
from flexnorm.axes import bind, solve
from flexnorm.calls.arguments import Formula, Options
from flexnorm.canonical import Column, Dim, Form, Segments, canonical, cut_of
from flexnorm.library import library
from flexnorm.sets import sets_of
from flexnorm.spec import Spec


def memories(x):
    """Contiguous, turned, sliced and padded."""
    order = list(range(x.dim()))
    yield x
    yield x.permute(order[::-1]).contiguous().permute(order[::-1])
    yield torch.stack([x, x], 0)[1]
    yield torch.nn.functional.pad(x, (0, 1))[..., :-1] if x.dim() else x
    yield torch.stack([x, x], -1)[..., 0]
    if x.dim() > 2:
        yield x.transpose(0, 1).contiguous().transpose(0, 1)


def form_of(pattern, x, *, sizes=None, labels=None, affine=None, mask=None):
    """The form of x under a pattern, and its operands as sets."""
    spec = Spec.parse(pattern)
    axes = bind(spec, tuple(x.shape), tuple((sizes or {}).items()))
    operands = [
        sets_of(axes, spec.sets, labels or {}),
        sets_of(axes, spec.mask) if spec.mask is not None else None,
        sets_of(axes, spec.read(affine, "affine"), labels or {}) if affine else None,
    ]
    strides = x.view(axes.sizes).stride(), torch.empty_like(x).view(axes.sizes).stride()
    known = solve(spec, sizes or {})
    told = [place for place, name in enumerate(axes.names) if name in known]
    cutter = Cutter(*strides, *operands, told)
    cut = cutter.best()
    return canonical(*strides, *operands, cut), operands, (cutter, cut, (*strides, *operands, told))


def bound_form(pattern, x, *, sizes=None, labels=None, affine=None, mask=None):
    """The same as the library says it, with sets numbered as the pattern writes them."""
    spec = Spec.parse(pattern)
    formula = Formula(spec, Options(), [spec.read(affine, "affine")] if affine else [], sizes or {})
    like, masked = torch.empty_like(x), spec.mask is not None
    numbers = (0, tuple(x.shape), x.stride(), like.stride(), int(masked))
    found = library().bind(formula.patterns[x.dim()], *numbers, formula.packed(labels or {}))
    assert found is not None

    def column(said):
        kind = ("one", "each", "table")[said["kind"]]
        table = None
        if kind == "table":
            table = torch.tensor(said["table"], dtype=torch.int32).reshape(said["blocks"], found["columns"])
        offsets = said.get("offsets")
        return Column(kind, table, said["count"], None if offsets is None else torch.tensor(offsets))

    segments = None
    if found["segment"]:
        order, sets = found.get("group_order"), found.get("group_sets")
        segments = Segments(
            tuple(Dim(*dim) for dim in found["segment"]),
            None if order is None else torch.tensor(order),
            torch.tensor(found["group_offsets"]),
            found["segment_step"],
            None if sets is None else torch.tensor(sets),
        )
    return Form(
        columns=found["columns"],
        outer=tuple(Dim(*dim) for dim in found["outer"]),
        segments=segments,
        inner=tuple(Dim(*dim) for dim in found["inner"]),
        segments_at=(found["outer_at"], found["inner_at"]),
        sets=column(found["sets"]),
        mask=column(found["mask"]),
        params=column(found["params"]),
        param_label=torch.tensor(found["param_label"]) if "param_label" in found else None,
        injective=bool(found["injective"]),
        copied=bool(found["copied"]),
    ), (*(bool(found[name]) for name in ("few", "apart", "shared", "by_runs")), found["chunk"])


needs_library = pytest.mark.skipif(isinstance(library(), str), reason="the C++ kernels are left out")
CUTTERS = ["python", pytest.param("library", marks=needs_library)]


def indices(dims):
    return itertools.product(*(range(dim.size) for dim in dims))


def total(dims, index, step):
    return sum(getattr(dim, step) * i for dim, i in zip(dims, index, strict=True))


def walk(form):
    """Of every range, for every row: what each operand's row part is."""
    names = ("x", "y", "set", "mask", "param", "set_block", "param_block", "param_label")
    groups = range(1 if form.segments is None else form.segments.groups)
    for outer in indices(form.outer):
        for group in groups:
            members = [dict.fromkeys(names, 0)]
            base = 0
            if form.segments is not None:
                s = form.segments
                base = int(s.sets[group]) if s.sets is not None else group * s.step
                places = list(indices(s.axes))
                where = range(int(s.offsets[group]), int(s.offsets[group + 1]))
                numbers = [int(s.order[i]) if s.order is not None else i for i in where]
                members = [{name: total(s.axes, places[i], name) for name in names} for i in numbers]
            rows = []
            for member in members:
                for inner in indices(form.inner):
                    row = {n: member[n] + total(form.outer, outer, n) + total(form.inner, inner, n) for n in names}
                    row["set"] = base + total(form.outer, outer, "set")
                    rows.append(row)
            yield rows


def along(column, block, k):
    if column.kind == "one":
        return 0
    return k if column.kind == "each" else int(column.table[block, k])


@pytest.mark.parametrize("cutter", CUTTERS)
@pytest.mark.parametrize("case", **cases.each)
def test_walk(case, cutter):
    x, kwargs = cases.arguments(case)
    p = oracle.Pattern(case.pattern, x.shape, kwargs["sizes"], kwargs["labels"])
    numbers = torch.arange(x.numel(), dtype=torch.float64).reshape(x.shape)
    for memory in memories(numbers):
        form, (sets, mask, params), _ = form_of(
            case.pattern, memory, sizes=kwargs["sizes"], labels=kwargs["labels"], affine=case.affine
        )
        if form.copied:
            memory = torch.empty_like(memory).copy_(memory)
        storage = torch.as_strided(memory, (memory.untyped_storage().nbytes() // 8,), (1,), 0)
        internal = torch.arange(math.prod(sets.shape)).reshape(sets.shape)
        if cutter == "library":
            how = {"sizes": kwargs["sizes"], "labels": kwargs["labels"], "affine": case.affine}
            form, _ = bound_form(case.pattern, memory, **how)
        else:
            internal = sets.inward(internal)
        internal = internal.flatten().tolist()
        met, closed = [], set()
        for rows in walk(form):
            here = set()
            for row, k in itertools.product(rows, range(form.columns)):
                number = int(storage[memory.storage_offset() + row["x"] + k])
                element = p.elements[number]
                met.append((row["y"] + k, number))
                column = along(form.sets, row["set_block"], k)
                assert 0 <= column < form.sets.count
                found = row["set"] + (int(form.sets.offsets[column]) if form.sets.offsets is not None else column)
                assert internal[found] == flat(p.place(p.right, element), sets.shape)
                here.add(found)
                if params is not None:
                    place = row["param"] + along(form.params, row["param_block"], k)
                    place += int(form.param_label[row["param_label"]]) if form.param_label is not None else 0
                    assert place == flat(p.place(case.affine, element), params.shape)
                if mask is not None:
                    place = row["mask"] + along(form.mask, 0, k)
                    assert place == flat(p.mask_place(element), mask.shape)
            assert not here & closed  # closed ranges share no set
            closed |= here
        assert sorted(number for _, number in met) == list(range(x.numel()))
        result = torch.empty_like(memory)
        flat_result = torch.as_strided(result, (x.numel(),), (1,))
        for place, number in met:
            flat_result[place] = number
        assert torch.equal(result, numbers)


def flat(place, shape):
    """The number of a place in a contiguous tensor."""
    return sum(i * s for i, s in zip(place, torch.empty(shape, device="meta").stride(), strict=True))


IMAGE, LAST = torch.empty(16, 256, 56, 56, device="meta"), {"memory_format": torch.channels_last}


@pytest.mark.parametrize(
    ("pattern", "x", "options", "ranges", "rows", "columns"),
    [
        ("b t (g c) -> b t g", torch.empty(32, 512, 768, device="meta"), {"sizes": {"g": 8}}, 32 * 512, 1, 768),
        ("n (g c) h w -> n g", IMAGE, {"sizes": {"g": 32}, "affine": "(g c)"}, 16 * 32, 8, 56 * 56),
        ("n (g c) h w -> n g", IMAGE.to(**LAST), {"sizes": {"g": 32}, "affine": "(g c)"}, 16, 56 * 56, 256),
        ("n c h w -> c", IMAGE, {"affine": "c"}, 256, 16, 56 * 56),
        ("n (g c) h w -> n g", IMAGE[:, :, :7, :7], {"sizes": {"g": 32}, "affine": "(g c)"}, 16 * 32, 8 * 7, 7),
        ("n (g c) -> n g", torch.empty(64, 128, device="meta"), {"sizes": {"g": 32}, "affine": "(g c)"}, 64, 1, 128),
        ("n c t -> n t", torch.empty(4, 80, 1000, device="meta"), {}, 4, 80, 1000),
    ],
)
def test_forms_of_known_patterns(pattern, x, options, ranges, rows, columns):
    """Long columns, and no table for a dense pattern, but for groups of channels side by side."""
    form, *_ = form_of(pattern, x, **options)
    assert (form.ranges, form.rows, form.columns) == (ranges, rows, columns)
    assert not form.copied
    assert form.params.kind != "table"


def test_what_has_no_columns_says_that_it_is_copied():
    x = torch.zeros(4, 6)
    for strided in (x[:, ::2], x[:1].expand(4, 6)):
        assert form_of("n c -> n", strided)[0].copied


def layouts(x):
    yield x
    if x.dim() == 4:
        yield x.contiguous(memory_format=torch.channels_last)
    if x.dim() >= 2:
        yield x.transpose(-1, -2).contiguous().transpose(-1, -2)
        yield x.transpose(0, 1).contiguous().transpose(0, 1)
    yield torch.cat([x, x], -1)[..., ::2]
    yield torch.cat([x, x], -1)[..., : x.shape[-1]]
    yield x[:1].expand(x.shape)


def drawn(seed):
    """Patterns of every kind over sizes that a seed chooses."""
    draw = random.Random(seed)
    g, c, n = draw.choice([1, 2, 3, 4, 8]), draw.choice([1, 2, 3, 8, 12, 16]), draw.choice([1, 2, 3, 5])
    t, h, w = draw.choice([1, 3, 8, 31, 64, 200]), *(draw.choice([1, 2, 3, 5, 8, 12, 17, 33]) for _ in range(2))
    made = torch.Generator().manual_seed(seed)

    def ids(count, *shape):
        values = torch.randint(0, count, shape, generator=made)
        return Partition(values.sort()[0] if draw.random() < 0.5 and len(shape) == 1 else values, count)

    group, each = {"sizes": {"g": g, "c": c}, "affine": "(g c)"}, {"affine": "c", "sizes": {"c": g * c}}
    yield "n (g c) ... -> n g", draw.choice([(n, g * c, h, w), (n, g * c, t), (n, g * c)]), group
    yield "n (g c) h w -> g", (n, g * c, h, w), group
    yield "... c -> ...", draw.choice([(n, t, g * c), (n, g * c), (n, 2, h, g * c)]), each
    yield "b (g c) t, b t -> b g", (n, g * c, t), group
    yield "b t (g c), b t -> b t g", (n, t, g * c), group
    yield "n c h w -> n h", (n, g * c, h, w), {"affine": "c w", "sizes": {"c": g * c, "w": w}}
    yield "v (g c), v -> graph[v] g", (t, g * c), {**group, "labels": {"graph": ids(7, t)}}
    yield "v c -> graph[v]", (t, g * c), {**each, "labels": {"graph": ids(5, t)}}
    yield "v c -> type[v] c", (t, g * c), {"affine": "type[v] c", "labels": {"type": ids(4, t)}, "sizes": {"c": g * c}}
    band = Partition.from_sizes([3, 5, 8])
    yield "n c f t -> n c band[f]", (n, c, 16, h), {"affine": "band[f] c", "labels": {"band": band}, "sizes": {"c": c}}
    yield "n c t -> n part[c]", (n, g * c, t), {**each, "labels": {"part": ids(3, g * c)}}
    yield "n t c -> n part[c]", (n, t, g * c), {**each, "labels": {"part": ids(3, g * c)}}
    yield "n h w -> n zone[h w]", (n, h, w), {"labels": {"zone": ids(4, h, w)}}
    yield "n h w -> n zone[w h]", (n, h, w), {"labels": {"zone": ids(4, w, h)}}
    yield "n t c -> n seg[n t] c", (n, h, g * c), {"labels": {"seg": ids(4, n, h)}}
    yield "n c f t -> n band[f] seg[n t]", (n, c, 16, h), {"labels": {"band": band, "seg": ids(4, n, h)}}
    yield "a b -> k[a] l[a]", (t, c), {"labels": {"k": ids(3, t), "l": ids(4, t)}, "affine": "k[a] l[a]"}


@needs_library
@pytest.mark.parametrize("seed", range(12))
def test_the_library_cuts_as_the_oracle_does(seed):
    """The place of the cut, and whether x is copied; tables are what `test_walk` looks at."""
    for pattern, shape, options in drawn(seed):
        for x in layouts(torch.empty(shape)):
            theirs, (sets, _, params), (cutter, cut, asked) = form_of(pattern, x, **options)
            assert cut_of(*asked) == cut, (pattern, x.shape, x.stride())
            if params is not None:  # as a kernel asks that sums over parameters
                strides, told = asked[:2], asked[-1]
                of_params = (*strides, params, None, sets, told)
                assert cut_of(*of_params) == Cutter(*of_params).best(), (pattern, x.shape, x.stride())
            if sets.written_steps != sets.internal_steps:  # sets that are numbered in another order have other tables
                continue
            ours, decides = bound_form(pattern, x, **options)
            assert (ours.columns, ours.copied) == (theirs.columns, theirs.copied), (pattern, x.shape, x.stride())
            assert (ours.ranges, ours.rows) == (theirs.ranges, theirs.rows), (pattern, x.shape, x.stride())
            assert (ours.mask.kind, ours.params.kind) == (theirs.mask.kind, theirs.params.kind)
            assert decides == cutter.decides(cut), (pattern, x.shape, x.stride())

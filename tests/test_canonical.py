"""Rows and columns: a walk over the form meets every element once, and says of it what the loops say."""

import itertools
import math

import cases
import oracle
import pytest
import torch

from flexnorm.axes import bind
from flexnorm.canonical import canonical
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
    return canonical(*strides, *operands), operands


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


@pytest.mark.parametrize("case", **cases.each)
def test_walk(case):
    x, kwargs = cases.arguments(case)
    p = oracle.Pattern(case.pattern, x.shape, kwargs["sizes"], kwargs["labels"])
    numbers = torch.arange(x.numel(), dtype=torch.float64).reshape(x.shape)
    for memory in memories(numbers):
        form, (sets, mask, params) = form_of(
            case.pattern, memory, sizes=kwargs["sizes"], labels=kwargs["labels"], affine=case.affine
        )
        if form.copied:
            memory = torch.empty_like(memory).copy_(memory)
        storage = torch.as_strided(memory, (memory.untyped_storage().nbytes() // 8,), (1,), 0)
        internal = sets.inward(torch.arange(math.prod(sets.shape)).reshape(sets.shape)).flatten().tolist()
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
    form, _ = form_of(pattern, x, **options)
    assert (form.ranges, form.rows, form.columns) == (ranges, rows, columns)
    assert not form.copied
    assert form.params.kind != "table"


def test_what_has_no_columns_says_that_it_is_copied():
    x = torch.zeros(4, 6)
    for strided in (x[:, ::2], x[:1].expand(4, 6)):
        assert form_of("n c -> n", strided)[0].copied

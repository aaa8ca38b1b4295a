"""Rows and columns: the tables say of every element the set, the parameter and the weight that the loops say."""

import itertools
import math
import operator

import cases
import oracle
import pytest
import torch

from flexnorm import normalize
from flexnorm.axes import bind
from flexnorm.canonical import cut
from flexnorm.sets import sets_of
from flexnorm.spec import Spec


def memories(x):
    """Contiguous, turned and padded strides."""
    order = list(range(x.dim()))
    yield x
    yield x.permute(order[::-1]).contiguous().permute(order[::-1])
    yield torch.stack([x, x], 0)[1]
    yield torch.nn.functional.pad(x, (0, 1))[..., :-1] if x.dim() else x
    yield torch.stack([x, x], -1)[..., 0]


def elements_in_rows(c, sizes):
    """The number of every element (in x's own order), as [rows, columns]."""
    return torch.arange(math.prod(sizes)).reshape(sizes).permute((*c.rows, *c.columns)).reshape(c.shape)


def numbered(p, side):
    """The place that every element has in a tensor shaped as `side` says."""
    return [p.place(side, element) for element in p.elements]


@pytest.mark.parametrize("case", **cases.each)
def test_tables(case):
    x, kwargs = cases.arguments(case)
    p = oracle.Pattern(case.pattern, x.shape, kwargs["sizes"], kwargs["labels"])
    spec = Spec.parse(case.pattern)
    axes = bind(spec, tuple(x.shape), tuple(kwargs["sizes"].items()))
    sets = sets_of(axes, spec.sets, kwargs["labels"])
    mask = sets_of(axes, spec.mask) if spec.mask is not None else None
    params = sets_of(axes, spec.read(case.affine, "affine"), kwargs["labels"]) if case.affine else None
    for memory in memories(x):
        c = cut(axes.sizes, memory.reshape(axes.sizes).stride(), sets, mask, params)
        number = elements_in_rows(c, axes.sizes).flatten().tolist()
        # The tables number the internal shape: the same number must mean the same place, and another one another.
        for operand, side in [(sets, p.right), (params, case.affine)]:
            if operand is None:
                continue
            table = c.indices(operand).expand(*c.shape, operator.add).flatten().tolist()
            internal = operand.inward(torch.arange(math.prod(operand.shape)).reshape(operand.shape)).flatten()
            places = numbered(p, side)
            strides = torch.zeros(operand.shape).stride()
            written = [sum(i * s for i, s in zip(places[n], strides, strict=True)) for n in number]
            assert internal[table].tolist() == written
        if mask is not None:
            table = c.weights(mask, kwargs["mask"]).expand(*c.shape, operator.mul)
            expected = torch.stack([kwargs["mask"][p.mask_place(p.elements[n])] for n in number]).reshape(c.shape)
            assert torch.equal(table, expected)
        if not c.copied:
            flat = memory.reshape(axes.sizes)
            offsets = c.row_offsets() + flat.storage_offset()
            columns = torch.as_strided(memory, (flat.untyped_storage().nbytes() // 8,), (1,), 0)
            if number:
                index = offsets[:, None] + torch.arange(c.shape[1])
                assert torch.equal(columns[index], flat.flatten()[elements_in_rows(c, axes.sizes)])


@pytest.mark.parametrize("case", **cases.each)
def test_closed_ranges_share_no_set(case):
    x, kwargs = cases.arguments(case)
    spec = Spec.parse(case.pattern)
    axes = bind(spec, tuple(x.shape), tuple(kwargs["sizes"].items()))
    sets = sets_of(axes, spec.sets, kwargs["labels"])
    c = cut(axes.sizes, x.reshape(axes.sizes).stride(), sets)
    table = c.indices(sets).expand(*c.shape, operator.add)
    order = c.visit(sets)
    table = table if order is None else table[order]
    bounds = c.closed_ranges(sets).tolist()
    assert bounds[0] == 0
    assert bounds[-1] == c.shape[0]
    seen = set()
    for start, stop in itertools.pairwise(bounds):
        here = set(table[start:stop].flatten().tolist())
        assert not here & seen
        seen |= here


def shape_of(pattern, shape, memory_format=torch.contiguous_format, affine=None, **sizes):
    """Rows and columns of a pattern over a tensor of this shape."""
    spec = Spec.parse(pattern)
    axes = bind(spec, shape, tuple(sizes.items()))
    x = torch.empty(shape, device="meta").to(memory_format=memory_format)
    operands = [spec.sets, spec.mask, None if affine is None else spec.read(affine, "affine")]
    sets = [None if expr is None else sets_of(axes, expr) for expr in operands]
    return cut(axes.sizes, x.reshape(axes.sizes).stride(), *sets).shape


def test_cuts_of_known_patterns():
    """Small tables: one number per token, per image and channel, per frequency; never one per element."""
    image, last = (16, 256, 56, 56), torch.channels_last
    assert shape_of("b t (g c) -> b t g", (32, 512, 768), affine="(g c)", g=8) == (32 * 512, 768)
    assert shape_of("n (g c) h w -> n g", image, g=32) == (16 * 32, 8 * 56 * 56)
    assert shape_of("n (g c) h w -> n g", image, affine="(g c)", g=32) == (16 * 256, 56 * 56)
    assert shape_of("n (g c) h w -> n g", image, last, affine="(g c)", g=32) == (16 * 56, 56 * 256)
    assert shape_of("b (g c) t, b t -> b g", (8, 512, 15999), affine="(g c)", g=1) == (8 * 512, 15999)
    assert shape_of("n c ... -> n", (4, 3, 5)) == (4, 15)


def test_what_cannot_be_rows_says_that_it_is_copied():
    x = torch.zeros(4, 6)
    spec = Spec.parse("n c -> n")
    for strided in (x[:, ::2], x[:1].expand(4, 6)):
        axes = bind(spec, tuple(strided.shape))
        assert cut(axes.sizes, strided.stride(), sets_of(axes, spec.sets)).copied
        assert normalize(strided, "n c -> n").shape == strided.shape

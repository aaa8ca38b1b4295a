"""The C++ room: every entry point against the composition in float64, for every vector width and number of threads."""

import contextlib
import math
import os
import shutil
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import cases
import pytest
import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from rounding import assert_moments, assert_within, expected, widened

import flexnorm
from flexnorm import Partition, normalize
from flexnorm.calls.arguments import Formula, Options
from flexnorm.kernels import Operands, aten, choose, cpu
from flexnorm.library import PAGES
from flexnorm.spec import Spec
from flexnorm.statistics import Moments

LIBRARY = cpu.library()
if os.environ.get("FLEXNORM_CPU") == "0" or (
    isinstance(LIBRARY, str) and os.environ.get("FLEXNORM_BUILD") != "required"
):
    pytest.skip(LIBRARY, allow_module_level=True)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
WIDTHS = [0, 1, 2]  # AVX-512, AVX2, what every machine has; one that this machine lacks is the next narrower one
WIDEST = None if isinstance(LIBRARY, str) else LIBRARY.width()


def test_there_is_a_library():
    """FLEXNORM_BUILD=required says that there has to be one."""
    assert not isinstance(LIBRARY, str), LIBRARY


@contextlib.contextmanager
def engine(width=None, threads=1, pages="ask"):
    """Kernels of this vector width, on so many threads, to which the pages of a large result are so."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    LIBRARY.set_width(WIDEST if width is None else width)
    LIBRARY.set_pages(PAGES.index(pages))
    try:
        yield
    finally:
        torch.set_num_threads(before)
        LIBRARY.set_width(WIDEST)
        LIBRARY.set_pages(0)


def widths():
    return [width for width in WIDTHS if width >= WIDEST]


# --- problems --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Problem:
    """A recipe with its tensors, and the same one in float64."""

    recipe: object
    wide: object
    operands: Operands
    dy: torch.Tensor


def recipe_for(pattern, x, *, mask=None, affine=None, weight=None, bias=None, sizes=None, labels=None, **options):
    spec = Spec.parse(pattern)
    read = [] if affine is None else [spec.read(affine, "affine")]
    formula = Formula(spec, Options(**options), read, sizes or {})
    return formula.prepare(x, mask, [(weight, bias)] if read else [], labels or {})[0]


def problem(pattern, x, *, mask=None, weight=None, bias=None, affine=None, sizes=None, labels=None, dy=None, **options):
    def recipe(o):
        return recipe_for(
            pattern,
            o.x,
            mask=o.mask,
            weight=o.weight,
            bias=o.bias,
            affine=affine,
            sizes=sizes,
            labels=labels,
            **options,
        )

    operands = Operands(x, mask, weight, bias)
    if dy is None:
        g = torch.Generator().manual_seed(7)
        dy = torch.randn(x.shape, generator=g, dtype=torch.float64).to(x.dtype)
        dy = torch.empty_like(x).copy_(dy)
    return Problem(recipe(operands), recipe(widened(operands)), operands, dy)


def of_case(case, dtype, offset=0.0, layout=None):
    x, kwargs = cases.arguments(case, offset=offset)
    x = x.to(dtype)
    if layout is not None:
        x = layout(x)
    for name in ("mask", "weight", "bias"):
        if name in kwargs and kwargs[name].is_floating_point():
            kwargs[name] = kwargs[name].to(dtype)
    return problem(case.pattern, x, **kwargs)


@dataclass(frozen=True, eq=False)
class Results:
    y: torch.Tensor
    moments: Moments
    dx: torch.Tensor
    dmask: torch.Tensor | None
    dweight: torch.Tensor | None
    dbias: torch.Tensor | None

    def tensors(self):
        m = self.moments
        found = (self.y, m.count, m.mean, m.low, m.m2, self.dx, self.dmask, self.dweight, self.dbias)
        return [t for t in found if t is not None]


def results(room, p):
    """Of forward and backward."""
    y, kept = room.forward(p.recipe, p.operands)
    grads = room.backward(p.recipe, p.operands, kept, p.dy)
    return Results(y, room.moments(p.recipe, p.operands, kept), *grads)


def same(a, b):
    """Equal bit by bit, where NaN is NaN."""
    return a.dtype == b.dtype and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


def assert_same(a, b, what):
    for i, (s, t) in enumerate(zip(a.tensors(), b.tensors(), strict=True)):
        assert same(s, t), f"{what}: result {i} differs by {(s.double() - t.double()).abs().max()}"


def check(p, *, widths_=None, threads=(1,), peer=False):
    """All entry points against float64; that they agree with each other, and every number of threads with the others.

    peer: no error is above the largest of the composition in the same dtype, but for the rounding of the last steps.
    """
    assert cpu.refusal(p.recipe, p.operands) is None
    wide = expected(p.recipe, p.operands, p.dy, p.wide)
    x = p.operands.x
    size = x.numel()
    before = [t.clone() for t in (*p.operands, p.dy) if t is not None]
    for width in widths() if widths_ is None else widths_:
        first = None
        for n in threads:
            with engine(width, n):
                ours = results(cpu, p)
                if first is None:
                    first = ours
                    parts(p, ours)
            assert_same(first, ours, f"width {width}, {n} threads")
        assert_within("y", first.y, wide.y)
        assert_within("dx", first.dx, wide.dx)
        for name in ("dmask", "dweight", "dbias"):
            pair, value = getattr(wide, name), getattr(first, name)
            assert (pair is None) == (value is None), name
            if pair is not None:
                assert value.dtype == getattr(p.operands, name.removeprefix("d")).dtype
                assert_within(name, value, pair)
        assert_moments(first.moments, wide, x.dtype, size)
        if peer:
            not_worse(first, p, wide)
    like = torch.empty_like(x)
    for t in (first.y, first.dx):
        assert (t.shape, t.dtype, t.stride()) == (like.shape, like.dtype, like.stride())
    after = [t for t in (*p.operands, p.dy) if t is not None]
    assert all(same(a, b) for a, b in zip(before, after, strict=True)), "an input was changed"


def parts(p, whole):
    """The split entry points, which round nothing more than the fused ones."""
    m = cpu.statistics(p.recipe, p.operands)
    names = ("count", "mean", "low", "m2")
    assert all(same(getattr(m, name), getattr(whole.moments, name)) for name in names)
    assert same(cpu.evaluate(p.recipe, p.operands), whole.y)
    assert same(cpu.apply(p.recipe, p.operands, m), whole.y)
    sums = cpu.backward_sums(p.recipe, p.operands, m, p.dy)
    dx, dmask = cpu.backward_dx(p.recipe, p.operands, m, p.dy, sums)
    split = Results(whole.y, m, dx, dmask, sums.weight, sums.bias)
    assert_same(whole, split, "the split entry points")


def not_worse(ours, p, wide):
    """Beyond the composition's own largest error, three roundings: of r * w, of the product and of the sum."""
    if p.operands.x.dtype == torch.float64:  # the composition in float64 is what errors are measured against
        return
    theirs = results(aten, p)
    for name in ("y", "dx"):
        value = getattr(wide, name)[0]
        margin = 1.5 * torch.finfo(torch.float32).eps * wide.terms[name]
        errors = [(getattr(r, name).double() - value).abs().max() for r in (ours, theirs)]
        assert errors[0] <= errors[1] + margin, f"{name}: off by {errors[0]:.3g}, the composition by {errors[1]:.3g}"


# --- every case ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", **cases.each)
def test_cases(case, dtype):
    for offset in (0.0, 1000.0):
        check(of_case(case, dtype, offset), peer=True)


def sliced(t):
    """A part of a tensor that has more along every axis."""
    if t.dim() == 0:
        return t
    more = torch.full([size + 3 for size in t.shape], float("nan"), dtype=t.dtype)
    part = more[tuple(slice(1, 1 + size) for size in t.shape)]
    return part.copy_(t)


def last(t):
    return t if t.dim() < 3 else t.movedim(1, -1).contiguous().movedim(-1, 1)


def turned(t):
    back = list(reversed(range(t.dim())))
    return t.permute(back).contiguous().permute(back)


LAYOUTS = {
    "turned": turned,
    "channels_last": last,
    "sliced": sliced,
    "sliced_last": lambda t: last(sliced(last(t))),
    "every_other_row": lambda t: t if t.dim() == 0 else t.repeat_interleave(2, 0)[::2],
    "strided": lambda t: torch.stack([t, t + 1], -1)[..., 0],
    "expanded": lambda t: t if t.dim() == 0 else t[:1].expand(t.shape),
    "expanded_last": lambda t: t if t.dim() == 0 else t[..., :1].expand(t.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", **cases.each)
def test_layouts(case, layout):
    for dtype in (torch.float32, torch.bfloat16):
        p = of_case(case, dtype, layout=LAYOUTS[layout])
        check(p, widths_=[WIDEST])


@pytest.mark.parametrize("case", **cases.each)
def test_gradients_of_any_layout(case):
    """dy need not lie as y does, nor have its dtype."""
    p = of_case(case, torch.float32)
    base = results(cpu, p)
    for layout in (turned, sliced, lambda t: torch.stack([t, t], -1)[..., 0], torch.Tensor.double):
        other = Problem(p.recipe, p.wide, p.operands, layout(p.dy))
        assert_same(base, results(cpu, other), "another dy")
    one = torch.ones((), dtype=torch.float32).expand(p.dy.shape)
    full = Problem(p.recipe, p.wide, p.operands, torch.ones_like(p.dy))
    assert_same(results(cpu, full), results(cpu, Problem(p.recipe, p.wide, p.operands, one)), "an expanded dy")


def test_operands_of_any_layout_and_dtype():
    x = torch.randn(6, 10, 5)
    mask = torch.rand(5, 6).t() < 0.7
    weight, bias = torch.randn(20, dtype=torch.float64)[::2], torch.randn(1, dtype=torch.bfloat16).expand(10)
    check(problem("b c t, b t -> b", x, mask=mask, weight=weight, bias=bias, affine="c"))
    weights = torch.rand(5, 12, dtype=torch.float16)[:, ::2].t()
    check(problem("b c t, b t -> b", x, mask=weights, weight=weight, bias=bias, affine="c"))


def test_moments_from_elsewhere():
    """Of any dtype of count, and expanded; without sums, as they do not depend on x."""
    x, dy = torch.randn(6, 7), torch.randn(6, 7)
    recipe = recipe_for("n c -> c", x)
    for count in (torch.tensor(4), torch.tensor(4, dtype=torch.int32), torch.tensor(4.0), torch.tensor(4.0).double()):
        m = Moments(count.expand(1, 7), torch.randn(1, 7), torch.rand(1, 1).expand(1, 7))
        for operands in (Operands(x), Operands(x.double())):
            y, theirs = cpu.apply(recipe, operands, m), aten.apply(recipe, operands, m)
            torch.testing.assert_close(y, theirs, rtol=1e-5, atol=1e-5)
            dx, _ = cpu.backward_dx(recipe, operands, m, dy, None)
            torch.testing.assert_close(dx, aten.backward_dx(recipe, operands, m, dy, None)[0], rtol=1e-5, atol=1e-5)


# --- sizes around every border of the kernels ------------------------------------------------------------------------

ROWS = [1, 3, 4, 5, 63, 64, 65, 130]  # of a batch, and those that pay for sums by column
COLUMNS = [
    1,
    7,
    8,
    9,
    15,
    16,
    17,
    255,
    256,
    257,
    1023,
    1024,
    1025,
    2050,
]  # of a vector, a short run, a long one, a tile
PATTERNS = ["n c -> n", "n c -> c", "n c ->", "n c -> kind[c]", "n c -> n kind[c]"]


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_rows_and_columns(pattern, columns):
    """Every second number of rows, by turns: each meets every number of columns, and every pattern meets both."""
    g = torch.Generator().manual_seed(columns)
    kind = Partition(torch.randint(0, 3, (columns,), generator=g), 4)
    first = PATTERNS.index(pattern) + COLUMNS.index(columns)
    for rows in ROWS[first % 2 :: 2]:
        x = torch.randn(rows, columns, generator=g) + 3
        weight, bias = torch.randn(columns, generator=g), torch.randn(columns, generator=g)
        labels = {"kind": kind} if "kind" in pattern else None
        p = problem(pattern, x, labels=labels, weight=weight, bias=bias, affine="c", activation="silu")
        check(p, widths_=[WIDEST])


@pytest.mark.parametrize("members", [1, 2, 15, 16, 17, 255, 256, 257])
@pytest.mark.parametrize("rows", [1, 3, 4, 70])
def test_runs(rows, members):
    """Groups of channels, and bands of labels, side by side along the columns."""
    g = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 5 * members, generator=g)
    mask, weights = torch.rand(rows, generator=g) < 0.7, torch.rand(5 * members, generator=g)
    both = {"weight": torch.randn(5, generator=g), "bias": torch.randn(5, generator=g), "affine": "g"}
    band = Partition.from_sizes([members, 2 * members - 1, 0, 1, 2 * members])
    for pattern, kwargs in [
        ("n (g c) -> g", {"sizes": {"g": 5}, **both}),
        ("n (g c) -> n g", {"sizes": {"g": 5}, **both}),
        ("n (g c), n -> g", {"sizes": {"g": 5}, "mask": mask, **both}),
        ("n (g c), (g c) -> n g", {"sizes": {"g": 5}, "mask": weights, **both}),
        ("n f -> band[f]", {"labels": {"band": band}}),
        ("n f, f -> n band[f]", {"labels": {"band": band}, "mask": weights > 0.3}),
        ("n f, f -> band[f]", {"labels": {"band": band}, "mask": weights}),
    ]:
        check(problem(pattern, x, **kwargs), widths_=[WIDEST])


# --- groups ----------------------------------------------------------------------------------------------------------

GROUPS = {
    "empty": [0, 3, 0, 0, 5, 1, 0],
    "huge_and_tiny": [1, 0, 1, 900, *[1, 2] * 40, 0],
    "one": [300],
    "tiny": [1] * 130,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("order", ["sorted", "unsorted"])
@pytest.mark.parametrize("groups", GROUPS)
def test_groups_of_rows(groups, order, dtype):
    g = torch.Generator().manual_seed(3)
    graph = Partition.from_sizes(GROUPS[groups])
    if order == "unsorted":
        graph = Partition(graph.ids[torch.randperm(graph.ids.numel(), generator=g)], graph.count)
    v = graph.ids.numel()
    x = (torch.randn(v, 12, generator=g) + 2).to(dtype)
    node, kind = torch.rand(v, generator=g), Partition(torch.randint(0, 3, (12,), generator=g))
    per_graph = {"weight": torch.randn(graph.count, 12, generator=g), "bias": torch.randn(graph.count, 12, generator=g)}
    per_channel = {"weight": torch.randn(12, generator=g), "affine": "c"}
    graphs = {"graph": graph}
    for pattern, kwargs in [
        ("v c -> graph[v]", {**per_channel}),
        ("v c -> graph[v] c", {**per_graph, "affine": "graph[v] c"}),
        ("v (g c) -> g graph[v]", {"sizes": {"g": 3}}),
        ("v c, v -> graph[v] c", {"mask": node > 0.3, **per_graph, "affine": "graph[v] c"}),
        ("v c, v -> graph[v]", {"mask": node.to(dtype), **per_channel}),
        ("v c -> graph[v] kind[c]", {"labels": {**graphs, "kind": kind}, **per_channel}),
        ("v c -> v", {**per_graph, "affine": "graph[v] c"}),
        ("v c -> c", {**per_graph, "affine": "graph[v] c"}),
    ]:
        check(problem(pattern, x, **{"labels": graphs, **kwargs}), widths_=[WIDEST])


def regions(kind, shape, count, g):
    if kind == "random":
        return Partition(torch.randint(0, count, shape, generator=g), count + 1)
    ramp = sum(torch.linspace(0, 1, size).reshape([-1 if d == i else 1 for d in range(len(shape))])
               for i, size in enumerate(shape))  # fmt: skip
    return Partition((ramp * count / len(shape)).long().clamp(max=count - 1).expand(shape), count + 1)


@pytest.mark.parametrize("kind", ["smooth", "random"])
@pytest.mark.parametrize("memory", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("pattern", "shape"),
    [
        ("n c h w -> n region[n h w]", (3, 20, 18)),
        ("n c h w -> region[n h w]", (3, 20, 18)),
        ("n c h w -> region[h w]", (20, 18)),
        ("n c h w -> n region[h w] c", (20, 18)),
        ("n c h w -> region[w h n] c", (18, 20, 3)),
        ("n c h w -> c region[n w]", (3, 18)),
        ("n (g c) h w -> region[h n] g", (20, 3)),
        ("n c h w -> h region[w h]", (18, 20)),
    ],
)
def test_labels_over_several_axes(pattern, shape, memory, kind):
    g = torch.Generator().manual_seed(5)
    x = torch.randn(3, 6, 20, 18, generator=g)
    x = last(x) if memory == "channels_last" else x
    labels = {"region": regions(kind, shape, 4, g)}
    read = pattern[pattern.index("region") :].split("]")[0] + "]"
    sizes = {"g": 2} if "(g c)" in pattern else None
    params = torch.randn(5, 6, generator=g)
    affine = f"{read} (g c)" if sizes else f"{read} c"
    mask = torch.rand(3, 20, generator=g)
    check(problem(pattern, x, labels=labels, sizes=sizes, weight=params, affine=affine), widths_=[WIDEST])
    masked = pattern.replace(" ->", ", n h ->")
    for m in (mask, mask > 0.3):
        check(problem(masked, x, mask=m, labels=labels, sizes=sizes, bias=params, affine=affine), widths_=[WIDEST])


# --- ranges that are split -------------------------------------------------------------------------------------------


def _large():
    """More than 2^18 elements in a range, cut along rows or columns."""
    g = torch.Generator().manual_seed(11)

    def randn(*shape):
        return torch.randn(shape, generator=g)

    def both(*shape):
        return {"weight": randn(*shape), "bias": randn(*shape)}

    two = Partition(torch.arange(9000).remainder(17).clamp(max=1), 3)
    yield "one_long_columns", "n c -> n", randn(2, 270_001), {**both(270_001), "affine": "c"}
    yield "one_many_rows", "n c h ->", randn(3, 40, 3000), {**both(40), "affine": "c", "activation": "silu"}
    yield "one_masked_columns", "n c, n c -> n", randn(2, 270_001), {"mask": torch.rand(2, 270_001, generator=g) < 0.6}
    yield "one_weighted_columns", "n c, c -> n", randn(2, 270_001), {"mask": torch.rand(270_001, generator=g)}
    yield "each_tall", "n c -> c", randn(13_001, 24), {**both(24), "affine": "c"}
    yield "each_wide", "n c -> c", randn(70, 5001), {**both(5001), "affine": "c"}
    yield "each_wide_own", "n c -> c", randn(70, 5001), {**both(70, 5001), "affine": "n c"}
    yield "each_masked", "b t c, b t -> c", randn(4, 3000, 24), {"mask": torch.rand(4, 3000, generator=g) < 0.6}
    yield "each_full_mask", "b c, b c -> c", randn(300, 1100), {"mask": torch.rand(300, 1100, generator=g) < 0.6}
    yield "each_weighted", "b c, c -> c", randn(300, 1100), {"mask": torch.rand(1100, generator=g)}
    yield "table_short", "n (g c) -> g", randn(5000, 64), {"sizes": {"g": 8}, **both(64), "affine": "(g c)"}
    yield "table_long", "n (g c) -> g", randn(300, 1200), {"sizes": {"g": 3}, **both(3), "affine": "g"}
    yield (
        "table_random",
        "v c -> kind[c]",
        randn(300, 1100),
        {"labels": {"kind": Partition(torch.randint(0, 5, (1100,), generator=g), 7)}, **both(7), "affine": "kind[c]"},
    )
    yield (
        "table_weighted",
        "v c, v -> kind[c]",
        randn(300, 1100),
        {"labels": {"kind": Partition.from_sizes([500, 20, 0, 580])}, "mask": torch.rand(300, generator=g)},
    )
    for kind in ("smooth", "random"):
        yield (
            f"table_blocks_{kind}",
            "n c h w -> n region[n h w]",
            randn(2, 7, 200, 200),
            {"labels": {"region": regions(kind, (2, 200, 200), 5, g)}, **both(7), "affine": "c"},
        )
    yield (
        "segments",
        "v c, v -> graph[v]",
        randn(9000, 40),
        {"labels": {"graph": two}, "mask": torch.rand(9000, generator=g), **both(3, 40), "affine": "graph[v] c"},
    )
    yield "segments_each", "v c -> graph[v] c", randn(9000, 40), {"labels": {"graph": two}, **both(40), "affine": "c"}
    yield "rms", "n c -> n", randn(2, 270_001), {"center": False, **both(2, 270_001), "affine": "n c"}
    yield "center", "n c -> c", randn(9001, 30), {"scale": False, "activation": "gelu"}


LARGE = list(_large()) if not isinstance(LIBRARY, str) else []


@pytest.mark.parametrize(("pattern", "x", "kwargs"), [entry[1:] for entry in LARGE], ids=[entry[0] for entry in LARGE])
def test_large_ranges(pattern, x, kwargs):
    check(problem(pattern, x + 5, **kwargs), widths_=[WIDEST], threads=(1, 2, 3))


@pytest.mark.parametrize("name", ["one_long_columns", "each_wide", "table_random", "segments"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_large_ranges_of_other_dtypes(name, dtype):
    pattern, x, kwargs = next(entry[1:] for entry in LARGE if entry[0] == name)
    check(problem(pattern, (x + 5).to(dtype), **kwargs), widths_=[2], threads=(1, 2))


# Rows and runs that begin anywhere in a line of the cache, whole lines, and masks along the columns.
PAST = [
    ("n c -> n", (4600, 1003), {}),
    ("n (g c) -> n g", (3000, 1536), {"sizes": {"g": 64}}),
    ("n (g c) -> n g", (3000, 1540), {"sizes": {"g": 220}}),
    ("n c, n c -> n", (4600, 1001), {"mask": True}),
    ("n t c, n -> n c", (40, 1000, 128), {"mask": True}),
    ("n t c -> n c", (40, 1000, 128), {"activation": "silu"}),
    ("n t c -> n", (12, 480, 1003), {"activation": "gelu"}),  # ranges that are cut
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("pattern", "shape", "kwargs"), PAST)
def test_large_results_are_those_of_their_parts(pattern, shape, kwargs, dtype):
    """Results of more than 16 MiB are written past the caches, those of a part of the samples are not."""
    shape = (shape[0] * 4 // dtype.itemsize, *shape[1:])  # as many bytes
    x, dy = (torch.randn(shape, generator=torch.Generator().manual_seed(i)).to(dtype) for i in (0, 1))
    kwargs = dict(kwargs)
    mask = None
    if kwargs.pop("mask", False):
        axes = pattern.split("->")[0].split(",")[1].split()
        mask = torch.rand(shape[: len(axes)], generator=torch.Generator().manual_seed(2)) < 0.7
    parameter = [torch.randn(shape[-1], generator=torch.Generator().manual_seed(i)).to(dtype) for i in (3, 4)]
    affine = "(g c)" if "(g c)" in pattern else "c"

    def both(part):
        m = None if mask is None else mask[part]
        p = problem(
            pattern, x[part], dy=dy[part], mask=m, weight=parameter[0], bias=parameter[1], affine=affine, **kwargs
        )
        found = results(cpu, p)
        return found.y, found.dx

    assert x.nbytes > 1 << 24
    for width in widths():
        with engine(width, 2, pages="resident"):
            whole = both(slice(None))
            step = max(1, len(x) * (1 << 23) // x.nbytes)
            parts = [both(slice(i, i + step)) for i in range(0, len(x), step)]
            for one, pieces in zip(whole, zip(*parts, strict=True), strict=True):
                assert torch.equal(one, torch.cat(pieces))


FAR = [
    ("n c -> n", (6, 3000), {}),  # runs
    ("n c -> n", (6, 300000), {}),  # in parts
    ("n c -> c", (300, 40), {}),  # columns
    ("n (g c) -> n g", (3, 96), {"sizes": {"g": 4}}),  # short runs
    ("n t (g c) -> n g", (3, 100, 24), {"sizes": {"g": 4}}),  # a table of columns
    ("n c -> kind[n]", (60, 40), {"labels": {"kind": Partition(torch.arange(60) % 7)}}),
]


@pytest.mark.parametrize("away", [1e2, 1e4, 1e6])
@pytest.mark.parametrize(("pattern", "shape", "kwargs"), FAR)
def test_a_first_element_far_away_costs_no_digits(pattern, shape, kwargs, away):
    """The shift is an element of the set. And other sets do not notice."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 3
    before = results(cpu, problem(pattern, x, **kwargs))
    far = x.clone()
    far.view(-1)[0] += away
    p = problem(pattern, far, **kwargs)
    check(p, threads=(1, 2))
    after = results(cpu, p)
    sets = p.recipe.sets
    touched = torch.zeros(shape)
    touched.view(-1)[0] = 1
    others = (sets.spread(sets.sum(touched.view(sets.axes.sizes))) == 0).expand(sets.axes.sizes).reshape(shape)
    assert others.any()
    assert torch.equal(after.y[others], before.y[others])
    assert torch.equal(after.dx[others], before.dx[others])


def test_dx_of_moments_alone():
    """Without dy, what flows to x through its moments: here of sum(a * mean + b * m2)."""
    for pattern, kwargs in (("n c -> n", {}), ("n c -> c", {}), ("n (g c) -> n g", {"sizes": {"g": 4}})):
        x = torch.randn(40, 32, generator=torch.Generator().manual_seed(0)) * 3 + 100
        p = problem(pattern, x, **kwargs)
        m = cpu.statistics(p.recipe, p.operands)
        a, b = torch.randn(2, *m.mean.shape, generator=torch.Generator().manual_seed(1))
        leaf = x.double().requires_grad_()
        wide = aten.statistics(p.wide, Operands(leaf))
        (expected_dx,) = torch.autograd.grad((a * wide.mean + b * wide.m2).sum(), leaf)
        dx, _ = cpu.backward_dx(p.recipe, p.operands, m, None, aten.backward_statistics(p.recipe, m, a, b))
        # Of b * 2 (x - mean), known to a few roundings of x - mean, and of the products that make it.
        bound = 32 * torch.finfo(torch.float32).eps * expected_dx.abs().max()
        assert (dx - expected_dx).abs().max() <= bound


@pytest.mark.parametrize("pattern", ["n c -> n", "n c -> c", "n (g c) -> n g", "v c -> graph[v]"])
def test_many_small_ranges_on_threads(pattern):
    g = torch.Generator().manual_seed(2)
    x = torch.randn(700, 120, generator=g)
    graph = Partition(torch.randint(0, 90, (700,), generator=g), 95)
    kwargs = {"sizes": {"g": 8}} if "(g" in pattern else {}
    kwargs |= {"labels": {"graph": graph}} if "graph" in pattern else {}
    affine = "(g c)" if "(g" in pattern else "c"
    weight, bias = torch.randn(120, generator=g), torch.randn(120, generator=g)
    check(problem(pattern, x, weight=weight, bias=bias, affine=affine, **kwargs), threads=(1, 2, 5))


# --- what must be exact ----------------------------------------------------------------------------------------------

SETS = [
    ("n c -> n", (5, 40), {}),
    ("n c -> c", (9, 40), {}),
    ("n c -> n c", (4, 7), {}),
    ("n (g c) -> n g", (5, 40), {"sizes": {"g": 4}}),
    ("n (g c) -> g", (9, 60), {"sizes": {"g": 3}}),
    ("n c t -> t", (3, 4, 20), {}),
    ("v c -> graph[v]", (40, 6), {"labels": {"graph": (40,)}}),
    ("v c -> graph[v] c", (40, 6), {"labels": {"graph": (40,)}}),
    ("n c -> n kind[c]", (5, 40), {"labels": {"kind": (40,)}}),
    ("n c -> kind[c]", (5, 40), {"labels": {"kind": (40,)}}),
    ("n c h w -> n region[n h w]", (2, 3, 8, 9), {"labels": {"region": (2, 8, 9)}}),
    ("n c -> n", (2, 270_001), {}),
    ("n c -> c", (70, 5001), {}),
    ("n c -> kind[c]", (300, 1100), {"labels": {"kind": (1100,)}}),
]


def of_sets(pattern, shape, kwargs, *, dtype=torch.float32, **more):
    """A problem, and the number of every element's set."""
    g = torch.Generator().manual_seed(1)
    labels = {name: Partition(torch.randint(0, 4, s, generator=g), 5) for name, s in kwargs.get("labels", {}).items()}
    x = torch.randn(shape, generator=g).to(dtype)
    p = problem(pattern, x, **{**kwargs, "labels": labels}, **more)
    sets = p.recipe.sets
    ids = sets.spread(torch.arange(sets.count).reshape(sets.internal_shape)).expand(sets.axes.sizes).reshape(shape)
    return p, ids


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("pattern", "shape", "kwargs"), SETS)
def test_nan_stays_in_its_set(pattern, shape, kwargs, dtype):
    p, ids = of_sets(pattern, shape, kwargs, dtype=dtype)
    dirty = ids == ids.flatten()[0]
    for width in widths():
        with engine(width):
            clean = results(cpu, p)
        for places in (dirty, dirty & (torch.arange(ids.numel()) == 0).reshape(shape)):
            for value in (float("nan"), float("inf"), -float("inf")):
                x = p.operands.x.masked_fill(places, value)
                with engine(width):
                    ours = results(cpu, Problem(p.recipe, p.wide, Operands(x), p.dy))
                assert same(clean.y[~dirty], ours.y[~dirty]), value
                assert same(clean.dx[~dirty], ours.dx[~dirty]), value
                if not (ids == ids.flatten()[0]).all() or value != value:
                    assert ours.y[places].isnan().all(), value


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("pattern", "shape", "kwargs"), SETS)
def test_what_is_masked_changes_no_bit(pattern, shape, kwargs, dtype):
    """Neither x nor dy is read there; also not by the gradients of parameters."""
    left, right = pattern.split(" ->")
    axes = left.replace("(", "").replace(")", "").split()
    for kept in (axes[:1], axes[-1:], axes):
        g = torch.Generator().manual_seed(9)
        sizes = kwargs.get("sizes", {})
        full = dict(zip(left.split(), shape, strict=False)) if "(" not in left else {"n": shape[0], **sizes}
        if "(" in left:
            full["c"] = shape[1] // sizes["g"]
        mask = torch.rand([full[a] for a in kept], generator=g) < 0.6
        affine = axes[-1]
        params = {"weight": torch.randn(full[affine], generator=g), "bias": torch.randn(full[affine], generator=g)}
        p, _ = of_sets(
            f"{left}, {' '.join(kept)} ->{right}", shape, kwargs, dtype=dtype, mask=mask, affine=affine, **params
        )
        outside = ~p.recipe.mask.inward(mask).expand(p.recipe.sets.axes.sizes).reshape(shape)
        for width in widths():
            with engine(width):
                clean = results(cpu, p)
                for fill in (float("nan"), float("inf")):
                    x, dy = (t.masked_fill(outside, fill) for t in (p.operands.x, p.dy))
                    ours = results(cpu, Problem(p.recipe, p.wide, p.operands._replace(x=x), dy))
                    assert_same(clean, ours, "another padding")
            assert (clean.y[outside] == 0).all()
            assert (clean.dx[outside] == 0).all()


@pytest.mark.parametrize(
    ("pattern", "axes"),
    [("b t, b t -> b", (4, 50)), ("b t, t -> b", (50,)), ("b t, t -> t", (50,)), ("b t, b -> t", (4,)),
     ("b t, t -> kind[t]", (50,)), ("b t, b t -> kind[t]", (4, 50)), ("b t, b -> doc[b]", (4,))],
)  # fmt: skip
def test_what_weighs_nothing_may_be_nan(pattern, axes):
    g = torch.Generator().manual_seed(4)
    x = torch.randn(4, 50, generator=g)
    weights = torch.rand(axes, generator=g)
    weights = weights.where(weights > 0.4, 0.0)
    weights.view(-1)[0] = 0.0
    labels = {"kind": Partition(torch.arange(50) // 20), "doc": Partition(torch.tensor([0, 1, 0, 0]))}
    labels = {name: p for name, p in labels.items() if f"{name}[" in pattern}
    p = problem(pattern, x, mask=weights, labels=labels)
    nothing = (p.recipe.mask.inward(weights) == 0).expand(4, 50)
    dirty = Operands(x.masked_fill(nothing, float("nan")), weights)
    for width in widths():
        with engine(width):
            clean, kept = cpu.forward(p.recipe, p.operands)
            ours, kept_too = cpu.forward(p.recipe, dirty)
        assert all(same(a, b) for a, b in zip(kept, kept_too, strict=True))
        assert same(clean[~nothing], ours[~nothing])
        assert ours[nothing].isnan().all()


@pytest.mark.parametrize("eps", [1e-5, 0.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_set_of_one_element_is_its_bias(dtype, eps):
    g = torch.Generator().manual_seed(6)
    x = (torch.randn(70, 33, generator=g) * 10 + 1000.3).to(dtype)
    weight, bias = torch.randn(33, generator=g).to(dtype), torch.randn(33, generator=g).to(dtype)
    alone, kind = Partition(torch.randperm(70, generator=g)), Partition(torch.randperm(33, generator=g))
    for pattern, labels in [
        ("n c -> n c", {}),
        ("n c -> alone[n] c", {"alone": alone}),
        ("n c -> n kind[c]", {"kind": kind}),
        ("n c -> kind[c] alone[n]", {"kind": kind, "alone": alone}),
    ]:
        p = problem(pattern, x, labels=labels, weight=weight, bias=bias, affine="c", eps=eps)
        for width in widths():
            with engine(width):
                ours = results(cpu, p)
            assert torch.equal(ours.y, bias.expand(70, 33))
            assert (ours.dx == 0).all()
            assert (ours.dweight == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("pattern", "shape", "kwargs"), SETS)
def test_equal_values_give_exactly_zero(pattern, shape, kwargs, dtype):
    for eps in (1e-5, 0.0):
        p, ids = of_sets(pattern, shape, kwargs, dtype=dtype, eps=eps)
        x = torch.empty_like(p.operands.x).copy_(torch.randn(int(ids.max()) + 1)[ids] * 3 + 1000.3)
        for width in widths():
            with engine(width):
                ours = results(cpu, Problem(p.recipe, p.wide, Operands(x), p.dy))
            assert (ours.y == 0).all()
            assert (ours.moments.m2 == 0).all()
            if eps == 0:
                assert (ours.dx == 0).all()


def test_a_light_first_weight_far_away_costs_no_digits():
    """The shift is an element of the set; the first may be far from all that counts."""
    x = torch.randn(3, 500)
    x[:, 0] = 1e6
    weights = torch.ones(500)
    weights[0] = 1e-20
    check(problem("n c, c -> n", x, mask=weights))
    check(problem("c n, c -> n", x.t().contiguous(), mask=weights))


def test_lazy_negatives_have_their_sign():
    """torch keeps the imaginary part of a conjugate as a view with a bit that says -."""
    z = torch.randn(1, 1, dtype=torch.complex64).conj().imag
    assert z.is_neg()
    assert same(normalize(z, "n c -> n", center=False), normalize(z.clone().resolve_neg(), "n c -> n", center=False))
    x, weight = torch.randn(4, 6), torch.randn(6)
    for center in (True, False):
        right = normalize(x, "n c -> n", weight=weight, affine="c", center=center)
        for a, b in [(torch._neg_view(-x), weight), (x, torch._neg_view(-weight))]:
            found = normalize(a, "n c -> n", weight=b, affine="c", center=center)
            torch.testing.assert_close(
                found, right, rtol=8 * torch.finfo(torch.float32).eps, atol=1e-6
            )  # by the composition


# --- dtypes and activations, through a norm that changes nothing -----------------------------------------------------


def identity(x, *, bias=None, activation=None):
    """x + bias through the kernels: with mean 0, variance 0 and eps 1, (x - 0) / 1."""
    affine = None if bias is None else "c"
    recipe = recipe_for("n c -> ", x, bias=bias, affine=affine, eps=1.0, activation=activation)
    zero = torch.zeros(1, 1, dtype=torch.float64)
    return recipe, Operands(x, None, None, bias), Moments(torch.ones(1, 1, dtype=torch.int64), zero, zero)


def all_halves(dtype):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    return bits.view(dtype)


@pytest.mark.parametrize("tail", [0, 1, 3, 7])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_half_is_read_as_it_is(dtype, tail):
    x = all_halves(dtype)[None, tail:].contiguous()
    recipe = recipe_for("n c -> n c", x)
    for width in widths():
        with engine(width):
            mean = cpu.statistics(recipe, Operands(x)).mean
            y = cpu.apply(*identity(x))
        finite = x.isfinite()
        assert torch.equal(mean[finite], x[finite].float())
        assert mean[~finite].isnan().all()  # inf - inf
        assert same(y, x)


@pytest.mark.parametrize("tail", [0, 1, 3, 7])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_results_are_rounded_to_the_nearest_even(dtype, tail):
    """All halves, all middles between two, and their neighbours in float32: overflow, subnormals and NaN among them."""
    halves = all_halves(dtype).float()
    finite = halves[halves.isfinite()].sort().values
    middles = ((finite[1:].double() + finite[:-1].double()) / 2).float()
    edge = torch.finfo(dtype).max
    over = torch.tensor([edge, edge * (1 + torch.finfo(dtype).eps / 4), 1e38, 3.4e38, float("inf"), float("nan")])
    over = torch.cat([over, -over, torch.tensor([65519.996, 65520.0, 65535.0, 5e-8, 2.98e-8, 2.9802326e-8, 1e-40])])
    values = torch.cat([halves, middles, over])
    values = torch.cat([values, *(values.nextafter(torch.tensor(side)) for side in (-3e38, 3e38))])
    values = values[tail:].contiguous()
    x = torch.zeros(1, values.numel(), dtype=dtype)
    for width in widths():
        with engine(width):
            y = cpu.apply(*identity(x, bias=values))
        assert same(y[0], values.to(dtype))


def numbers():
    """From -120 to 120, finely around 0, and both signs of every magnitude: 32 numbers of every exponent."""
    fine = torch.linspace(-6, 6, 40_001, dtype=torch.float64)
    wide = torch.linspace(-120, 120, 40_001, dtype=torch.float64)
    every = torch.arange(0, 0x7F800000, 1 << 18, dtype=torch.int32) + 12345
    every = torch.cat([every.view(torch.float32), torch.logspace(-45, 0, 2_000, dtype=torch.float64).float()])
    return torch.cat([fine.float(), wide.float(), every, -every])


@pytest.mark.parametrize("width", WIDTHS)
def test_exponential(width):
    """silu(x) = x / (1 + e^-x), where e^-x is nearly all of the denominator.

    e^-x: half a unit of the last place for its last step, a half for those before, 1/4 for what is left of x. The sum
    and the quotient: half of one each.
    """
    x = torch.linspace(-87, -20, 200_001, dtype=torch.float64).float()[None]
    with engine(max(width, WIDEST)):
        y = cpu.apply(*identity(x, activation="silu"))
    exact = x.double() * x.double().exp() / (1 + x.double().exp())
    unit = torch.finfo(torch.float32).eps
    assert ((y.double() - exact).abs() <= (1.25 + 1) * unit * exact.abs()).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["relu", "silu", "gelu"])
@pytest.mark.parametrize("width", WIDTHS)
def test_activations(activation, width, dtype):
    """unit: the last place of float32 (float64: of libm, which is as good as torch's).

    silu: e^-z is 1.25 units wrong, the sum and the quotient half of one each: 2.25 units of |y|.
    gelu: cdf is at most 0.5 times what is wrong with e^(-z^2 / 2), 1.25 units and 0.5 of its argument, and with a
    polynomial, 1 unit; the product is half of one wrong: 2 units of |z|.
    """
    x = numbers().to(dtype)
    x = x[x.isfinite()][None]
    unit = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    with engine(max(width, WIDEST)):
        y = cpu.apply(*identity(x, activation=activation))
        recipe, operands, m = identity(x, activation=activation)
        dx, _ = cpu.backward_dx(recipe, operands, m, torch.ones_like(x), None)
    z = x.double().requires_grad_()
    exact = exactly(activation, z)
    (slope,) = torch.autograd.grad(exact, z, torch.ones_like(z))
    z, exact = z.detach(), exact.detach()
    tiny = 100 * torch.finfo(torch.float32).tiny  # e^88.4 is the largest there is: silu(-100) is 0, not -1e-42
    if activation == "relu":
        assert torch.equal(y, x.clamp(min=0))
        assert torch.equal(dx, (x > 0).to(dtype))
        return
    few = 4 if dtype == torch.float64 else 2.25  # what is exact has errors of float64 itself
    error = few * unit * exact.abs() if activation == "silu" else 2 * unit * z.abs()
    half = torch.finfo(dtype).eps / 2 * (0 if dtype in (torch.float32, torch.float64) else 1)
    floor = tiny + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert ((y.double() - exact).abs() <= error + half * exact.abs() + floor).all()
    # silu': s (1 + z (1 - s)), where 1 - s is half a unit of 1 wrong until s is 1, at z = 17
    # gelu': cdf 1.5 units, z * density: (z^2 / 2 + 4) units of at most 0.25
    error = unit * (4 + z.abs().clamp(max=18)) if activation == "silu" else unit * 4
    assert ((dx.double() - slope).abs() <= error + half * slope.abs() + floor).all()


def exactly(activation, z):
    if activation == "relu":
        return z.clamp(min=0)
    if activation == "silu":
        return z * z.sigmoid()
    return z * 0.5 * torch.special.erfc(-z * 0.5**0.5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["relu", "silu", "gelu"])
@pytest.mark.parametrize("width", WIDTHS)
def test_an_activation_has_the_same_bits_wherever_its_element_lies(activation, width, dtype):
    """In the lanes of a vector, and in what is left of a row."""
    every = torch.linspace(-20, 20, 67, dtype=torch.float64).to(dtype)

    def both(x):
        recipe, operands, m = identity(x, activation=activation)
        return cpu.apply(recipe, operands, m), cpu.backward_dx(recipe, operands, m, torch.ones_like(x), None)[0]

    with engine(max(width, WIDEST)):
        expected = both(every[None])
        for first in (0, 1, 5):
            for length in range(1, 40):
                part = slice(first, first + length)
                for got, of_all in zip(both(every[None, part].contiguous()), expected, strict=True):
                    assert torch.equal(got, of_all[:, part])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["relu", "silu", "gelu"])
@pytest.mark.parametrize("width", WIDTHS)
def test_activations_of_what_is_not_a_usual_number(activation, width, dtype):
    inf, nan, most = float("inf"), float("nan"), torch.finfo(dtype).max
    x = torch.tensor([[inf, nan, -nan, most, 1e4, -1e4, -most, -inf, 0.0, -0.0]], dtype=torch.float64).to(dtype)
    with engine(max(width, WIDEST)):
        recipe, operands, m = identity(x, activation=activation)
        y = cpu.apply(recipe, operands, m)[0].double()
        dx = cpu.backward_dx(recipe, operands, m, torch.ones_like(x), None)[0][0].double()
    assert y[0] == inf
    assert y[1:3].isnan().all()
    assert torch.equal(y[3:5], x[0, 3:5].double())
    torch.testing.assert_close(y[5:7], torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-30)
    assert y[7].isnan() or y[7] == 0  # torch: NaN, the limit is 0
    assert (y[8:] == 0).all()
    torch.testing.assert_close(dx[3:5], torch.ones(2, dtype=torch.float64), rtol=1e-2, atol=0)
    torch.testing.assert_close(dx[5:7], torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-30)


# --- any problem -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drawn:
    """What a random problem is made of; its repr makes it again."""

    left: list
    right: list
    sizes: dict
    seed: int
    dtype: str
    order: list
    padding: list
    strided: bool
    mask: tuple | None = None
    affine: list | None = None
    labels: dict = field(default_factory=dict)
    options: dict = field(default_factory=dict)
    offset: float = 0.0
    width: int = 0
    threads: int = 1

    def problem(self):
        g = torch.Generator().manual_seed(self.seed)
        dtype = getattr(torch, self.dtype)

        def rand(shape, kind=torch.randn):
            return kind(shape, generator=g, dtype=torch.float64)

        shape = [self.sizes[axis] for axis in self.left]
        x = self.placed((rand(shape) + self.offset).to(dtype))
        labels = {
            name: Partition(torch.randint(0, count, [self.sizes[a] for a in axes], generator=g), count + 1)
            for name, (axes, count) in self.labels.items()
        }
        kwargs = {"labels": labels, **self.options}
        pattern = " ".join(self.left)
        if self.mask is not None:
            kind, axes = self.mask
            values = rand([self.sizes[a] for a in axes], torch.rand)
            kwargs["mask"] = values < 0.7 if kind == "bool" else values.where(values > 0.2, 0.0).to(dtype)
            pattern += ", " + " ".join(axes)
        if self.affine is not None:
            dims = [labels[a].count if a in labels else self.sizes[a] for a in self.affine]
            kwargs |= {"weight": rand(dims).float(), "bias": rand(dims).float(), "affine": self.written(self.affine)}
        dy = torch.empty_like(x).copy_(rand(shape))
        return problem(f"{pattern} -> {self.written(self.right)}", x, dy=dy, **kwargs)

    def placed(self, x):
        """x with its axes in this order in memory, between other things."""
        turned_ = x.permute(self.order)
        more = torch.full([n + p for n, p in zip(turned_.shape, self.padding, strict=True)], 1e30).to(x.dtype)
        if self.strided:
            more = torch.stack([more, more], -1)[..., 0]
        part = more[tuple(slice(p // 2, p // 2 + n) for n, p in zip(turned_.shape, self.padding, strict=True))]
        return part.copy_(turned_).permute(sorted(range(x.dim()), key=self.order.__getitem__))

    def written(self, axes):
        return " ".join(f"{a}[{' '.join(self.labels[a][0])}]" if a in self.labels else a for a in axes)


@st.composite
def drawn(draw):
    names = list("abcd")[: draw(st.integers(1, 4))]
    most = draw(st.sampled_from([2_000, 2_000, 2_000, 60_000]))
    pool = st.sampled_from([1, 1, 2, 3, 4, 5, 7, 8, 16, 17, 33, 66, 150, 1030])
    sizes = {name: draw(pool) for name in names}
    while math.prod(sizes.values()) > most:
        largest = max(sizes, key=sizes.get)
        sizes[largest] = -(-sizes[largest] // 2)
    labels = {}

    def label():
        name = f"label{len(labels)}"
        axes = draw(st.permutations(names))[: draw(st.integers(1, min(3, len(names))))]
        labels[name] = (list(axes), draw(st.sampled_from([1, 2, 3, 9])))
        return name

    right = list(draw(st.permutations(names))[: draw(st.integers(0, len(names)))])
    right += [label() for _ in range(draw(st.sampled_from([0, 0, 1, 1, 2])))]
    affine = None
    if draw(st.booleans()):
        affine = list(draw(st.permutations(names))[: draw(st.integers(0, len(names)))])
        if draw(st.integers(0, 3)) == 0:
            affine.append(label() if not labels or draw(st.booleans()) else next(iter(labels)))
    mask = draw(st.sampled_from([None, None, "bool", "float"]))
    options = [{}, {}, {}, {"center": False}, {"scale": False}, {"activation": "silu"}, {"activation": "gelu"}]
    rank = len(names)
    return Drawn(
        left=list(draw(st.permutations(names))),
        right=list(draw(st.permutations(right))),
        sizes=sizes,
        seed=draw(st.integers(0, 2**16)),
        dtype=draw(st.sampled_from(["float32", "float32", "float64", "bfloat16", "float16"])),
        order=list(draw(st.permutations(range(rank)))) if draw(st.booleans()) else list(range(rank)),
        padding=[draw(st.sampled_from([0, 0, 0, 1, 3])) for _ in names],
        strided=draw(st.integers(0, 5)) == 0,
        mask=mask and (mask, list(draw(st.permutations(names))[: draw(st.integers(1, rank))])),
        affine=affine,
        labels=labels,
        options=draw(st.sampled_from(options)),
        offset=draw(st.sampled_from([0.0, 0.0, 3.0, 1000.0])),
        width=draw(st.sampled_from(WIDTHS)),
        threads=draw(st.sampled_from([1, 2])),
    )


def check_drawn(d):
    check(d.problem(), widths_=[max(d.width, WIDEST)], threads=(d.threads, 1) if d.threads > 1 else (1,))


HEALTH = [HealthCheck.too_slow, HealthCheck.data_too_large]


@settings(max_examples=3 * settings().max_examples, deadline=None, suppress_health_check=HEALTH)
@given(drawn())
def test_any_problem(d):
    note(f"from test_cpu import *\ncheck_drawn({d!r})")
    check_drawn(d)


@pytest.mark.slow
@settings(max_examples=10 * settings().max_examples, deadline=None, suppress_health_check=HEALTH)
@given(drawn())
def test_any_problem_at_length(d):
    note(f"from test_cpu import *\ncheck_drawn({d!r})")
    check_drawn(d)


# --- the library -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", **cases.each)
def test_the_plan_is_this_room(case):
    p = of_case(case, torch.float32)
    for differentiated in (False, True):
        assert choose(p.recipe, p.operands, differentiated=differentiated).room == "cpu"


def test_what_is_refused():
    empty = torch.zeros(0, 3)
    assert "empty" in cpu.refusal(recipe_for("n c -> n", empty), Operands(empty))
    rank = cpu.MOST_DIMS + 1
    pattern = " ".join(f"a{i}" for i in range(rank)) + " ->"
    x = torch.randn([3] * rank)
    check(problem(pattern, x), widths_=[WIDEST])  # axes that lie together are one
    x = x[(slice(0, 2),) * rank]
    reason = cpu.refusal(recipe_for(pattern, x), Operands(x))
    assert reason == f"x has more than {cpu.MOST_DIMS - 1} axes of one kind"
    pattern, x = pattern.removeprefix("a0 "), x[0]  # one less: as many as there may be
    check(problem(pattern, x), widths_=[WIDEST])


def test_several_threads_call_at_once():
    """Each thread has its own buffers; recipes are shared."""
    shapes = [(3, 40), (700, 120), (2, 270_001), (64, 1000)]
    problems = [problem("n c -> n", torch.randn(s), weight=torch.randn(s[1]), affine="c") for s in shapes]
    problems += [problem("n c -> c", torch.randn(s)) for s in shapes]
    alone = [results(cpu, p) for p in problems]

    def work(i):
        torch.set_num_threads(1 + i % 2)
        return results(cpu, problems[i % len(problems)])

    with ThreadPoolExecutor(4) as pool:
        for i, ours in enumerate(pool.map(work, range(8 * len(problems)))):
            assert_same(alone[i % len(problems)], ours, "among other threads")


def python(code, *, where=None, **environment):
    """What a fresh interpreter prints. It imports the package that is being tested, or the one in a folder `where`."""
    where = Path(flexnorm.__file__).parent.parent if where is None else where
    environment = {**os.environ, "PYTHONPATH": str(where), "PYTHONSAFEPATH": "1", **environment}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env=environment, cwd=where
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts the threads of the process in /proc")
def test_threads_are_those_that_torch_is_told():
    """One thread: no other is woken. Two: one more, of the pool that torch has, so torch starts no further one."""
    code = """
        import os, threading, torch
        torch.set_num_threads(1)
        import flexnorm
        x = torch.randn(64, 4096)
        def alive():
            return len(os.listdir("/proc/self/task"))
        counts = []
        def work():
            for n in (1, 2):
                torch.set_num_threads(n)
                before = alive()
                flexnorm.normalize(x, "n c -> n")
                flexnorm.normalize(x, "n c -> ")
                counts.append(alive() - before)
            before = alive()
            torch.exp(x)
            counts.append(alive() - before)
        work()
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        print(counts)
    """
    assert python(code) == "[0, 1, 0, 0, 1, 0]"


def test_ids_are_not_trusted():
    """torch's pytrees rebuild a Partition of whatever ids; in another process, as this one should live."""
    code = """
        import torch
        from flexnorm import Partition, normalize
        from torch.utils import _pytree
        kind = _pytree.tree_map(lambda ids: ids + 1_000_000, Partition(torch.tensor([0, 1, 2, 0, 1, 2, 2, 2]), 3))
        for pattern, shape in ("n c -> kind[c]", (5, 8)), ("v c -> kind[v]", (8, 5)), ("v c -> v", (8, 5)):
            weight = {"weight": torch.ones(3), "affine": "kind[v]"} if pattern.endswith("> v") else {}
            print(pattern, flush=True)
            try:
                normalize(torch.randn(shape), pattern, kind=kind, **weight)
            except (IndexError, RuntimeError, ValueError) as error:
                print("refused", flush=True)
    """
    assert python(code).splitlines()[1::2] == ["refused"] * 3


RUNS = """
    import torch
    from flexnorm import normalize
    from flexnorm.kernels import cpu, choose, Operands
    from flexnorm.calls.arguments import Formula, Options
    from flexnorm.spec import Spec
    x = torch.tensor([[1.0, 3.0], [5.0, 9.0]], requires_grad=True)
    y = normalize(x, "n c -> n", eps=0)
    y.sum().backward()
    assert y.tolist() == [[-1.0, 1.0], [-1.0, 1.0]] and x.grad.abs().max() < 1e-6
    recipe = Formula(Spec.parse("n c -> n"), Options(), [], {}).prepare(x, None, [], {})[0]
    plan = choose(recipe, Operands(x), differentiated=True)
    print(plan.room, cpu.library() if isinstance(cpu.library(), str) else "")
    print(plan.reason)
"""


@pytest.fixture
def copy(tmp_path):
    """The package somewhere else."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(flexnorm.__file__).parent, tmp_path / "flexnorm", ignore=ignored)
    return tmp_path


def test_a_copy_runs_on_its_library(copy):
    assert python(RUNS, where=copy).splitlines()[0].strip() == "cpu"


def test_left_out_by_the_environment():
    room, reason = python(RUNS, FLEXNORM_CPU="0").splitlines()
    assert room == "native the C++ kernels are left out by FLEXNORM_CPU=0"
    assert "FLEXNORM_CPU=0" in reason


def test_a_missing_library(copy):
    (copy / "flexnorm/kernels/cpu/_kernels.abi3.so").unlink()
    room, reason = python(RUNS, where=copy).splitlines()
    assert room.startswith("native the C++ kernels were not built")
    assert "not built" in reason


def test_a_library_that_is_none(copy):
    (copy / "flexnorm/kernels/cpu/_kernels.abi3.so").unlink()
    (copy / "flexnorm/kernels/cpu/_kernels.abi3.so").write_bytes(b"no library")
    room, reason = python(RUNS, where=copy).splitlines()
    assert room.startswith("native the C++ kernels cannot be loaded")
    assert "cannot be loaded" in reason


def test_a_library_of_another_version(copy):
    """Its entries take other arguments."""
    source = copy / "flexnorm/library.py"
    text = source.read_text()
    assert text.count("INTERFACE = 5") == 1
    source.write_text(text.replace("INTERFACE = 5", "INTERFACE = 0"))
    room, reason = python(RUNS, where=copy).splitlines()
    assert room.startswith("native the C++ kernels are those of another version")
    assert "another version" in reason


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("pattern", "shape", "kept"),
    [("n (g c) t, n t -> n g", (5, 24, 40), "n t"), ("n (g c) t, t -> g", (3, 24, 40), "t"),
     ("n (g c) t, n g c t -> n g", (4, 24, 19), "n g c t")],
)  # fmt: skip
def test_parameters_by_runs(pattern, shape, kept, dtype):
    """Columns hold several channels, whose weights are one along runs; the mask leaves members that lie apart."""
    sizes = {"g": 3, "c": 8, "t": shape[-1]}
    g = torch.Generator().manual_seed(3)
    x = torch.randn(shape, generator=g).to(dtype)
    params = {"weight": torch.randn(24, generator=g), "bias": torch.randn(24, generator=g), "affine": "(g c)"}
    extents = [{"n": shape[0], **sizes}[axis] for axis in kept.split()]
    whole = torch.ones(extents, dtype=torch.bool)
    padded = whole.clone()
    padded[..., -7:] = False
    holes = torch.rand(extents, generator=g) < 0.6
    for options in ({}, {"activation": "silu"}):
        for mask in (padded, holes):
            check(problem(pattern, x, mask=mask, sizes=sizes, **params, **options), threads=(1, 2))
        for width in widths():
            with engine(width):
                alone, masked = (
                    results(cpu, problem(pattern, x, mask=m, sizes=sizes, **params, **options)) for m in (None, whole)
                )
            assert_same(alone, masked, "a mask that leaves nothing out")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_pages_of_a_large_result_change_no_bit(layout, dtype):
    """Fresh pages are written by ordinary stores, resident ones past the caches."""
    g = torch.Generator().manual_seed(2)
    x = torch.randn(3, 48, 180, 181 if dtype == torch.float32 else 362, generator=g).to(dtype, memory_format=layout)
    params = {"weight": torch.randn(48, generator=g), "bias": torch.randn(48, generator=g), "affine": "(g c)"}
    p = problem("n (g c) h w -> n g", x, sizes={"g": 4, "c": 12}, activation="silu", **params)
    assert x.numel() * x.element_size() > cpu.PAST
    found = {}
    for known in PAGES:
        with engine(threads=2, pages=known):
            found[known] = results(cpu, p)
    assert_same(found["ask"], found["fresh"], "fresh pages")
    assert_same(found["ask"], found["resident"], "resident pages")


def test_pages_that_nobody_knows():
    code = "import flexnorm"
    for known, fails in (("fresh", False), ("resident", False), ("new", True)):
        done = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "FLEXNORM_PAGES": known}, capture_output=True, text=True
        )
        assert ("FLEXNORM_PAGES is one of ask, fresh, resident, not 'new'" in done.stderr) == fails, done.stderr

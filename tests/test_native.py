"""torch's group_norm of x less a shift, which computes dense patterns on a CPU where there is no library."""

import math
import os
import pathlib
import shutil
import subprocess
import sys
import textwrap
from dataclasses import dataclass

import pytest
import torch
from rounding import assert_moments, assert_within, expected, widened
from test_kernels import recipe_for, saved

import flexnorm
from flexnorm import Norm, normalize
from flexnorm.kernels import Operands, choose, cpu, native

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
without_library = pytest.mark.skipif(not isinstance(cpu.library(), str), reason="the library computes it")


@dataclass(frozen=True, eq=False)
class Problem:
    """A recipe with its tensors, and the same one in float64."""

    recipe: object
    wide: object
    operands: Operands
    dy: torch.Tensor

    def check(self):
        """Forward and backward within the bounds, in the memory of x."""
        x = self.operands.x
        assert native.refusal(self.recipe, self.operands, alone=False) is None
        y, kept = native.forward(self.recipe, self.operands)
        grads = native.backward(self.recipe, self.operands, kept, self.dy)
        wide = expected(self.recipe, self.operands, self.dy, self.wide)
        assert_within("y", y, wide.y)
        assert_within("dx", grads.x, wide.dx)
        for name in ("weight", "bias"):
            pair, value = getattr(wide, f"d{name}"), getattr(grads, name)
            assert (pair is None) == (value is None)
            if pair is not None:
                assert (value.dtype, value.shape) == (x.dtype, pair[0].shape)
                assert_within(name, value, pair)
        assert_moments(native.moments(self.recipe, self.operands, kept), wide, x.dtype, x.numel())
        like = torch.empty_like(x)
        for t in (y, grads.x):
            assert (t.shape, t.dtype, t.stride()) == (like.shape, like.dtype, like.stride())
        return y, grads


def problem(pattern, x, *, dy=None, **kwargs):
    operands = Operands(x, None, kwargs.pop("weight", None), kwargs.pop("bias", None))
    if dy is None:
        dy = torch.empty_like(x).copy_(torch.randn(x.shape, dtype=torch.float64))

    def recipe(o):
        return recipe_for(pattern, o.x, weight=o.weight, bias=o.bias, **kwargs)

    return Problem(recipe(operands), recipe(widened(operands)), operands, dy)


# name: pattern, shape, sizes, affine, shape of the parameters
PATTERNS = {
    "group": ("n (g c) h w -> n g", (3, 8, 6, 5), {"g": 4}, "(g c)", (8,)),
    "group_of_one": ("n (g c) h w -> n g", (1, 8, 6, 5), {"g": 4}, "(g c)", (8,)),
    "instance": ("n c h w -> n c", (3, 4, 6, 5), {}, "c", (4,)),
    "layer": ("b t c -> b t", (3, 5, 48), {}, "c", (48,)),
    "layer_of_channels": ("n c h w -> n h w", (2, 40, 3, 4), {}, "c", (40,)),
    "batch": ("n c h w -> c", (4, 6, 5, 3), {}, "c", (6,)),
    "columns": ("n c -> c", (70, 5), {}, "c", (5,)),
    "tokens": ("b t (g c) -> b t g", (2, 5, 24), {"g": 3}, "(g c)", (24,)),
    "frames": ("b (g c) t h w -> b t g", (2, 6, 3, 4, 5), {"g": 2}, "(g c)", (6,)),
    "film": ("n c h w -> n", (3, 4, 5, 6), {}, "n c", (3, 4)),
    "turned": ("n c h w -> c n", (3, 4, 5, 6), {}, "w h", (6, 5)),
    "of_sets": ("n c t -> n", (5, 3, 7), {}, "n", (5,)),
    "units": ("n 1 c () -> c 1 n", (2, 1, 5, 1), {}, None, None),
    "singles": ("n c -> n c", (4, 6), {}, "c", (6,)),
    "all": ("... ->", (5, 3, 8), {}, None, None),
    "no_axes": ("->", (), {}, None, None),
}
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "transposed": lambda x: x.mT.contiguous().mT,
    "sliced": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "expanded": lambda x: x[:1].expand(x.shape),
}


def of(name, dtype, mean=0.0, std=1.0, **options):
    pattern, shape, sizes, affine, parameter = PATTERNS[name]
    x = (torch.randn(shape, dtype=torch.float64) * std + mean).to(dtype)
    params = {"weight": torch.randn(parameter).to(dtype), "bias": torch.randn(parameter).to(dtype)} if affine else {}
    return pattern, x, {"sizes": sizes, "affine": affine, **params, **options}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PATTERNS)
def test_every_pattern(name, dtype):
    pattern, x, kwargs = of(name, dtype)
    problem(pattern, x, **kwargs).check()


@pytest.mark.parametrize(("mean", "std"), [(1e3, 1.0), (1e4, 0.1), (1e6, 1.0), (-1e6, 1e-3)])
@pytest.mark.parametrize("name", PATTERNS)
def test_means_far_away(name, mean, std):
    pattern, x, kwargs = of(name, torch.float32, mean, std)
    problem(pattern, x, **kwargs).check()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", [name for name, row in PATTERNS.items() if len(row[1]) > 1])
def test_layouts(name, layout):
    pattern, x, kwargs = of(name, torch.float32, 100.0)
    problem(pattern, LAYOUTS[layout](x), **kwargs).check()


@pytest.mark.parametrize("activation", ["relu", "silu", "gelu"])
@pytest.mark.parametrize("name", ["group", "layer", "batch"])
def test_activations(name, activation):
    pattern, x, kwargs = of(name, torch.float32, 10.0, activation=activation)
    problem(pattern, LAYOUTS["channels_last"](x), **kwargs).check()


@pytest.mark.parametrize("name", ["group", "group_of_one", "layer", "frames", "film"])
def test_one_parameter_alone(name):
    pattern, x, kwargs = of(name, torch.float32)
    for left_out in ("weight", "bias"):
        problem(pattern, x, **{**kwargs, left_out: None}).check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", PATTERNS)
def test_parts_change_no_bit_of_y(name, dtype, monkeypatch):
    pattern, x, kwargs = of(name, dtype, 100.0)
    whole = problem(pattern, x, **kwargs)
    y = native.evaluate(whole.recipe, whole.operands)
    monkeypatch.setattr(native, "PART", 40)
    assert torch.equal(whole.check()[0], y)


LARGE = [
    ("n (g c) h w -> n g", (2, 4, 180, 180), {"g": 2}, "(g c)", 4),
    ("n c -> n", (3, 100_000), {}, None, None),
    ("n c -> c", (70_000, 3), {}, "c", 3),
    ("... c -> ...", (20_000, 16), {}, "c", 16),
]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("pattern", "shape", "sizes", "affine", "channels"), LARGE)
def test_large_sets(pattern, shape, sizes, affine, channels, memory_format):
    """With a gradient that has a mean, which is what a loss gives."""
    x = torch.randn(shape) + 1000
    if memory_format is torch.channels_last:
        x = x.to(memory_format=memory_format) if x.dim() == 4 else x.mT.contiguous().mT
    params = {"weight": torch.randn(channels), "bias": torch.randn(channels)} if affine else {}
    dy = torch.empty_like(x).copy_(torch.rand(shape))
    problem(pattern, x, sizes=sizes, affine=affine, dy=dy, **params).check()


@pytest.mark.parametrize("away", [1e2, 1e4, 1e6])
@pytest.mark.parametrize("columns", [1, 7, 16, 31, 100, 4096, 50_000])
def test_members_far_from_the_mean_cost_no_digits(columns, away):
    """In some sets the shift is of such members alone, in others of none."""
    x = torch.randn(6, columns)
    few = 2 ** (min(native.MEMBERS, max(1, columns // 8)).bit_length() - 1)
    step = columns // few
    x[::2, step // 2 :: step] += away
    problem("n c -> n", x).check()
    problem("n c -> n", x.mT.contiguous().mT).check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PATTERNS)
def test_equal_values_are_exactly_the_bias(name, dtype):
    pattern, x, kwargs = of(name, dtype)
    info = torch.finfo(dtype)
    for value in (1000.3, -0.1, info.max, info.smallest_normal * info.eps):
        for eps in (1e-5, 1e-30):
            p = problem(pattern, torch.full_like(x, value), **{**kwargs, "eps": eps})
            y = native.evaluate(p.recipe, p.operands)
            bias = torch.zeros(()) if p.operands.bias is None else p.recipe.params.inward(p.operands.bias)
            assert torch.equal(y, bias.expand(p.recipe.sets.axes.sizes).reshape(y.shape).to(dtype))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("name", ["group", "instance", "layer", "batch", "tokens", "frames"])
def test_a_set_leaves_the_others_their_bits(name, value):
    """Also where it needs a shift of its own."""
    pattern, x, kwargs = of(name, torch.float32, 3.0)
    clean, spoilt = problem(pattern, x, **kwargs), x.clone()
    spoilt[(0,) * x.dim()] = value
    dirty = problem(pattern, spoilt, **kwargs, dy=clean.dy)
    results = []
    for p in (clean, dirty):
        y, kept = native.forward(p.recipe, p.operands)
        results.append((y, native.backward(p.recipe, p.operands, kept, p.dy).x))
    sets = clean.recipe.sets
    own = torch.zeros(sets.internal_shape)
    own.view(-1)[0] = 1
    others = sets.spread(own).expand(sets.axes.sizes).reshape(x.shape) == 0
    assert others.any()
    for a, b in zip(*results, strict=True):
        assert torch.equal(a[others], b[others])
    assert not torch.equal(results[0][0], results[1][0])


@pytest.mark.parametrize("name", ["group", "group_of_one", "layer", "batch", "frames"])
@pytest.mark.parametrize("std", [1.0, 1e-4])
def test_moments_are_kept_to_and_fro(name, std):
    """Also a variance that is lost in eps."""
    pattern, x, kwargs = of(name, torch.float32, 5.0, std)
    p = problem(pattern, x, **kwargs)
    y, kept = native.forward(p.recipe, p.operands)
    m = native.moments(p.recipe, p.operands, kept)
    again = native.keep(p.recipe, p.operands, m)
    for a, b in zip(
        native.backward(p.recipe, p.operands, kept, p.dy),
        native.backward(p.recipe, p.operands, again, p.dy),
        strict=True,
    ):
        if a is not None:
            few = 32 * torch.finfo(torch.float32).eps
            torch.testing.assert_close(a, b, rtol=few, atol=few * float(a.abs().max()) * 5 / std)
    torch.testing.assert_close(native.apply(p.recipe, p.operands, m), y, rtol=1e-5, atol=1e-5)


def test_dx_has_its_digits_at_a_large_mean():
    """Design 4.4: a relative error below 1e-5."""
    for layout in ("contiguous", "channels_last"):
        for name in ("group", "layer", "batch"):
            pattern, x, kwargs = of(name, torch.float32, 1e4, 0.1)
            p = problem(pattern, LAYOUTS[layout](x), **kwargs)
            _, grads = p.check()
            exact = expected(p.recipe, p.operands, p.dy, p.wide).dx[0]
            assert (grads.x.double() - exact).norm() < 1e-5 * exact.norm()


REFUSED = [
    ({"eps": 0.0}, "divides by zero"),
    ({"scale": False}, "without a scale"),
    ({"mask": torch.ones(4, dtype=torch.bool), "pattern": "n c, n -> n"}, "no masked norm"),
    ({"pattern": "n c -> kind[n]", "labels": {"kind": flexnorm.Partition.from_sizes([2, 2])}}, "labels"),
]


@pytest.mark.parametrize(("arguments", "reason"), REFUSED)
def test_refused_with_a_reason(arguments, reason):
    recipe = recipe_for(**{"pattern": "n c -> n", "x": torch.randn(4, 8), **arguments})
    assert reason in native.refusal(recipe, Operands(torch.randn(4, 8), arguments.get("mask")))


def test_an_empty_x_is_refused():
    x = torch.empty(0, 4)
    assert "empty" in native.refusal(recipe_for("n c -> n", x), Operands(x))


# --- in calls ---


@without_library
@pytest.mark.parametrize("name", ["group", "layer", "batch", "frames"])
def test_y_does_not_depend_on_what_else_is_asked_for(name):
    pattern, x, kwargs = of(name, torch.float32, 1000.0)
    p = problem(pattern, x, **kwargs)
    for differentiated in (True, False):
        for asked in (None, "asked for"):
            assert choose(p.recipe, p.operands, differentiated=differentiated, moments=asked).room == "native"
    with torch.no_grad():
        y = normalize(x, pattern, **kwargs)
    assert torch.equal(normalize(x.clone().requires_grad_(), pattern, **kwargs), y)
    plain, running = (Norm("n c ... -> c", c=6, track_running_stats=tracks) for tracks in (False, True))
    x = torch.randn(4, 6, 5, requires_grad=True)
    assert torch.equal(plain(x), running(x))
    torch.testing.assert_close(running.running_mean, 0.1 * x.detach().mean((0, 2)))


@without_library
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_x_is_all_of_its_size_that_is_saved(memory_format):
    x = torch.randn(4, 32, 16, 16).to(memory_format=memory_format).requires_grad_()
    for dtype in (torch.float32, torch.bfloat16):
        y, storages = saved(lambda dtype=dtype: normalize(x.to(dtype), "n (g c) h w -> n g", g=8, activation="silu"))
        assert y.is_contiguous(memory_format=memory_format)
        assert sum(storages.values()) < x.numel() * dtype.itemsize * 1.02


@without_library
def test_gradients_of_parameters_alone():
    x, w = torch.randn(4, 6, 5) + 100, torch.randn(6, requires_grad=True)
    (alone,) = torch.autograd.grad((normalize(x, "n c t -> n", weight=w, affine="c") ** 2).sum(), w)
    (both,) = torch.autograd.grad((normalize(x.requires_grad_(), "n c t -> n", weight=w, affine="c") ** 2).sum(), w)
    torch.testing.assert_close(alone, both)


@without_library
def test_a_result_without_gradient_may_be_changed_later():
    with torch.no_grad():
        y = normalize(torch.randn(3, 8), "n c -> n")
        z = normalize(torch.randn(3, 8), "n c -> c", scale=False)
    w = torch.ones(3, 8, requires_grad=True)
    y.mul_(w), z.mul_(w)
    (y + z).sum().backward()
    assert w.grad is not None


# --- the warning ---

CALLS = """
    import torch, warnings
    from flexnorm import normalize
    from flexnorm.library import LARGE
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        normalize(torch.ones(LARGE // 8 - 1, 8), "n c -> n")
        print(len(seen))
        for _ in range(2):
            normalize(torch.ones(LARGE // 8, 8), "n c -> n")
        print(*(w.message for w in seen))
"""


def said(where, **environment):
    environment = {**os.environ, "PYTHONPATH": str(where), "PYTHONSAFEPATH": "1", **environment}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(CALLS)], capture_output=True, text=True, env=environment, cwd=where
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_one_warning_where_the_library_is_missing(tmp_path):
    left_out = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(pathlib.Path(flexnorm.__file__).parent, tmp_path / "flexnorm", ignore=left_out)
    small, large = said(tmp_path, FLEXNORM_CPU="")
    assert small == "0"
    assert large.startswith("flexnorm: the C++ kernels were not built")
    assert large.count("pip install --force-reinstall flexnorm") == 1


def test_no_warning_where_the_library_is_left_out_on_purpose():
    assert said(pathlib.Path(flexnorm.__file__).parent.parent, FLEXNORM_CPU="0") == ["0", ""]

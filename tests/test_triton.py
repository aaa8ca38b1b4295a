"""The room of Triton: every entry point against the loops and the composition, and that its kernels compile.

Without a GPU the kernels run in Triton's interpreter, which is chosen before Triton is imported, by a process that does
not compile with it. So parts of this file are run again, by processes of their own: the tests below the line. They run
directly where TRITON_INTERPRET=1 is set or a GPU is at hand.
"""

import dataclasses
import functools
import itertools
import os
import pathlib
import subprocess
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import cases
import oracle
import pytest
import torch
from test_kernels import recipe_for

from flexnorm import Partition
from flexnorm.kernels import Operands, aten, stat_dtype
from flexnorm.kernels import triton as room
from flexnorm.kernels.triton import tables

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
HERE = INTERPRETED or DEVICE == "cuda"

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


def inside(test):
    """Collected in the processes that run kernels, and nowhere else: skips would only hide other skips."""
    return test if HERE else None


def test_refuses_with_a_reason():
    x = torch.randn(4, 8)
    recipe = recipe_for("n c -> n", x)
    if find_spec("triton") is not None and not INTERPRETED:
        assert room.refusal(recipe, Operands(x)) == "Triton needs CUDA"
    if HERE:
        assert room.refusal(recipe, Operands(x.to(DEVICE))) is None
        empty = torch.empty(0, 8, device=DEVICE)
        assert room.refusal(recipe_for("n c -> n", empty), Operands(empty)) == "x is empty"


@inside
def test_refuses_without_the_library(monkeypatch):
    """It says where to cut, so a package that was not compiled runs on torch's operations, on CUDA too."""
    x = torch.randn(4, 8, device=DEVICE)
    recipe = recipe_for("n c -> n", x)
    monkeypatch.setattr(room, "library", lambda: "the C++ kernels were not built")
    expected = "the compiled library says where to cut, and the C++ kernels were not built"
    assert room.refusal(recipe, Operands(x)) == expected


def test_is_imported_without_triton():
    code = "import flexnorm.kernels.triton, sys; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@needs_triton
@pytest.mark.skipif(HERE, reason="this is the process")
@pytest.mark.parametrize(
    "part",
    [
        "cases and fused",
        "few",
        "not cases and not few and not split",
        pytest.param("split and not few", marks=pytest.mark.slow(minutes=2)),
    ],
)
def test_in_the_interpreter(part):
    run_here(part, TRITON_INTERPRET="1")


def run_here(part, **environment):
    """Runs a part of this file in another process, and shows what that says if it fails."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", __file__, "-k"]
    root = pathlib.Path(__file__).parent.parent
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")} | environment
    done = subprocess.run([*command, part], env=environment, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


SPLIT = tables.Limits(resident=0, resident_backward=0, tile=16, each=4, part=1, programs=2**20)

FUSED = tables.Limits(programs=8)


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """Launches are real, up to the point where the driver would be called: the PTX of each kernel is kept instead."""
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    kept = {}

    def run(self, *args, grid, warmup, **kwargs):
        for architecture in kept.get("architectures", (90,)):
            target = GPUTarget("cuda", architecture, 32)
            backend = make_backend(target)
            bind = create_function_from_signature(self.signature, self.params, backend)
            bound, specialization, options = bind(*args, debug=False, **kwargs)
            key = (self.__name__, architecture, str(specialization))
            if key not in kept:
                packed = self._pack_args(backend, {**kwargs, "debug": False}, bound, specialization, options)
                options, signature, constants, attributes = packed
                source = ASTSource(self, signature, constants, attributes)
                kept[key] = compile(source, target=target, options=options.__dict__).asm["ptx"]

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(JITFunction, "run", run)
    return kept


def launch_all(recipe, operands):
    """Every kernel; what they write is never looked at."""
    _, kept = aten.forward(recipe, operands)
    room.forward(recipe, operands)
    room.backward(recipe, operands, kept, torch.ones_like(operands.x))


KERNELS = {f"{name}_kernel" for name in "forward moments merge apply backward sums add dx".split()}
COMPUTED = ["weights", "silu", "weighted_rms", "gelu"]
COMPILED = ["batch", "utterance", "graph_group", *COMPUTED, "regions", "node_types"]

compiles = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")


@needs_triton
@compiles
@pytest.mark.parametrize(
    ("dtype", "architectures", "names"),
    [
        (torch.bfloat16, (80,), COMPILED[:3]),
        # Every pattern in float32 for one architecture. For the other one, three that launch every kernel. In float64
        # these, and what computes otherwise: patterns of other labels differ in whole numbers alone.
        pytest.param(torch.float32, (80,), COMPILED, marks=pytest.mark.slow),
        pytest.param(torch.float32, (90,), COMPILED[:3], marks=pytest.mark.slow),
        pytest.param(torch.float64, (80,), [*COMPILED[:3], *COMPUTED], marks=pytest.mark.slow),
    ],
)
def test_kernels_compile(dtype, architectures, names, compiled, monkeypatch):
    """What the interpreter lets through: types, shapes that are not constant, None where a tensor is asked for."""
    compiled["architectures"] = architectures
    for name in names:
        case = cases.by_name[name]
        x, kwargs = cases.arguments(case, dtype=dtype)
        recipe = recipe_for(x=x, pattern=case.pattern, **{k: v for k, v in kwargs.items() if v is not None})
        for limits in (tables.Limits(), SPLIT):
            monkeypatch.setattr(tables, "LIMITS", limits)
            launch_all(recipe, Operands(x, *(kwargs.get(name) for name in ("mask", "weight", "bias"))))
    del compiled["architectures"]
    assert {name for name, *_ in compiled} == KERNELS
    assert all(".entry" in ptx for ptx in compiled.values())


@needs_triton
@compiles
@pytest.mark.parametrize("pattern", ["n c t -> n", "n c t -> n c", "n t (g c) -> n t g", "n t c -> n c"])
def test_loads_and_stores_are_wide(pattern, compiled):
    """16 bytes at once where rows are aligned, of which the compiler does not know by itself."""
    x = torch.ones(64, 32, 256, dtype=torch.bfloat16)
    recipe = recipe_for(pattern, x, sizes={"g": 4} if "g" in pattern else {})
    room.forward(recipe, Operands(x))
    (ptx,) = compiled.values()
    assert "ld.global.v4.b32" in ptx and "st.global.v4.b32" in ptx


# --- run in a process of its own --------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def interpreter():
    """numpy 2.4 makes no int of an array of one number, which Triton 3.6 asks it for at the bounds of loops.

    And Triton puts its interpreter in place of its language anew at every call of a function of a kernel, which takes
    a third of all time. Here this is done once for each function, and stays, as this process compiles nothing.
    """
    if INTERPRETED:
        import triton.runtime.interpreter as interpreter

        patch, replace = interpreter._patch_lang_tensor, interpreter._patch_lang

        def patched(tensor, scope):
            patch(tensor, scope)
            scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

        @functools.cache
        def replaced(function):
            replace(function)
            return SimpleNamespace(restore=lambda: None)

        interpreter._patch_lang_tensor, interpreter._patch_lang = patched, replaced


@pytest.fixture(params=["fused", "split"])
def path(request, monkeypatch):
    """Ranges that fit into a tile, about half of all in one; and the same cut into many parts."""
    monkeypatch.setattr(tables, "LIMITS", SPLIT if request.param == "split" else FUSED)
    return request.param


def on_paths(names, fused, split):
    """Parametrizes a test: all of these on the fused path, and some on the split one, which takes ten times as long.

    The tests below choose those of the split path so that each value of every parameter is among them: with all of the
    fused path, every two values of two parameters meet.
    """
    pairs = [(*values, "fused") for values in fused] + [(*values, "split") for values in split]
    return pytest.mark.parametrize((*names, "path"), pairs, indirect=["path"])


def prepared(x, kwargs):
    """The recipe and the operands of a call, on the device."""

    def moved(t):
        return None if t is None else t.detach().to(DEVICE)

    kwargs = {k: v for k, v in kwargs.items() if v is not None}
    labels = {name: Partition(label.ids.to(DEVICE), label.count) for name, label in kwargs.get("labels", {}).items()}
    tensors = {name: moved(kwargs.get(name)) for name in ("mask", "weight", "bias")}
    x = moved(x)
    recipe = recipe_for(**{**kwargs, **tensors, "labels": labels}, x=x)
    operands = Operands(x, **tensors)
    assert room.refusal(recipe, operands) is None
    return recipe, operands


def same(ours, theirs, tolerance):
    if theirs is None:
        assert ours is None
        return
    assert ours.dtype == theirs.dtype
    shape = torch.broadcast_shapes(ours.shape, theirs.shape)
    torch.testing.assert_close(ours.expand(shape), theirs.expand(shape), rtol=tolerance, atol=tolerance)


FEW = ["group", "batch", "token_group", "utterance", "graph_group", "bands", "weights", "masked_rms"]


SINGLY = ["batch", "utterance", "graph_group", "weights"]

# The interpreter takes seconds for what is cut into many parts, so every second case is. test_few checks those of
# SINGLY, on both paths.
NAMES = [case.name for case in cases.CASES]


@inside
@on_paths(
    ["name"],
    fused=[(name,) for name in NAMES if name not in SINGLY],
    split=[(name,) for name in NAMES[::2] if name not in SINGLY],
)
def test_cases(name, path):
    check(cases.by_name[name])


def check(case):
    """In float64: y against the loops, all else against the composition."""
    x, kwargs = cases.arguments(case)
    recipe, operands = prepared(x, {"pattern": case.pattern, **kwargs})
    expected_y, expected_kept = aten.forward(recipe, operands)
    expected = aten.moments(recipe, operands, expected_kept)
    y, kept = room.forward(recipe, operands)
    moments = room.moments(recipe, operands, kept)
    same(y, oracle.normalize(x, case.pattern, **kwargs).to(DEVICE), 1e-11)
    for name in ("count", "mean", "m2"):
        same(getattr(moments, name), getattr(expected, name), 1e-11)
    dy = torch.randn_like(y)
    for name, ours, theirs in zip(
        ("x", "mask", "weight", "bias"),
        room.backward(recipe, operands, kept, dy),
        aten.backward(recipe, operands, expected_kept, dy),
        strict=True,
    ):
        assert (ours is None) == (theirs is None), name
        same(ours, theirs, 1e-10)
    return recipe, operands, expected_y, expected, dy


@inside
@pytest.mark.parametrize("name", SINGLY)
def test_few(name, path):
    """Every entry point by itself."""
    recipe, operands, expected_y, expected, dy = check(cases.by_name[name])
    same(room.apply(recipe, operands, expected), expected_y, 1e-11)
    moments = room.moments(recipe, operands, room.forward(recipe, operands)[1])
    again = room.statistics(recipe, operands)
    assert torch.equal(again.mean, moments.mean) and torch.equal(again.m2, moments.m2)
    sums, theirs = (r.backward_sums(recipe, operands, expected, dy) for r in (room, aten))
    for ours, their in zip(sums, theirs, strict=True):
        same(ours, their, 1e-10)
    for given in (theirs, None):
        ours, their = (r.backward_dx(recipe, operands, expected, dy, given) for r in (room, aten))
        for a, b in zip(ours, their, strict=True):
            same(a, b, 1e-10)


VALUES = [
    (1.0, 0.0, torch.float32),
    (1.0, 1000.0, torch.float32),
    (1e-3, 0.0, torch.bfloat16),
    (100, -1000, torch.float16),
]


@inside
@on_paths(
    ["name", "scale", "offset", "dtype"],
    fused=[(name, *values) for name in FEW for values in VALUES],
    split=[  # of each the hardest, and another one
        *((name, *VALUES[1]) for name in FEW),
        *((name, *VALUES[(0, 2, 3)[i % 3]]) for i, name in enumerate(FEW)),
    ],
)
def test_error_against_float64(name, scale, offset, dtype, path):
    """The bound of the design, before the affine."""
    case = dataclasses.replace(cases.by_name[name], affine=None, parameter=None)
    x, kwargs = cases.arguments(case, dtype=dtype, scale=scale, offset=offset)
    recipe, operands = prepared(x, {"pattern": case.pattern, **kwargs})
    y, kept = room.forward(recipe, operands)
    moments = room.moments(recipe, operands, kept)
    assert y.dtype == dtype
    assert moments.m2.dtype == stat_dtype(dtype)
    exact = oracle.normalize(x, case.pattern, **kwargs)
    eps = torch.finfo(dtype).eps
    # mean / sigma by the set of each element: x is y * sigma + mean, and the bound asks for |mean| / sigma.
    means = recipe.sets.spread(aten.statistics(recipe, operands).mean.abs() * aten.inverse_sigma(recipe, moments))
    means = means.cpu().double().expand(recipe.sets.axes.sizes).reshape(x.shape)
    bound = 4 * eps * (means + exact.abs()) + 1e-6
    assert ((y.cpu().double() - exact).abs() <= bound).all()


@inside
@pytest.mark.parametrize("name", FEW)
def test_gradients_in_float32(name, path):
    case = cases.by_name[name]
    x, kwargs = cases.arguments(case, dtype=torch.float32, scale=0.1, offset=10.0, requires_grad=True)
    recipe, operands = prepared(x, {"pattern": case.pattern, **kwargs})
    _, kept = room.forward(recipe, operands)
    dy = torch.randn(x.shape)
    ours = room.backward(recipe, operands, kept, dy.to(DEVICE))
    wide = {k: v.detach().double().requires_grad_() if k in ("weight", "bias") else v for k, v in kwargs.items()}
    if case.mask is not None and case.mask[0] == "float":
        wide["mask"] = kwargs["mask"].detach().double().requires_grad_()
    x = x.detach().double().requires_grad_()
    y = oracle.normalize(x, case.pattern, **wide)
    exact = torch.autograd.grad(y, cases.leaves(x, wide), dy.double())
    found = [g for g in ours if g is not None]
    for a, b in zip(found, exact, strict=True):
        assert (a.cpu().double() - b).norm() <= 2e-5 * b.norm() + 1e-6


def memories():
    yield "channels_last", lambda x: x.to(memory_format=torch.channels_last)
    yield "turned", lambda x: x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    yield "sliced", lambda x: torch.nn.functional.pad(x, (0, 1))[..., :-1]
    yield "strided", lambda x: torch.stack([x, x], -1)[..., 0]
    yield "expanded", lambda x: x[:1].expand(x.shape)


MEMORIES = dict(memories())
PATTERNS = ["n (g c) h w -> n g", "n c h w -> c", "n c h w, n h -> n h"]


@inside
@on_paths(
    ["pattern", "memory"],
    fused=[(pattern, memory) for pattern in PATTERNS for memory in MEMORIES],
    split=[(PATTERNS[i % 3], memory) for i, memory in enumerate(MEMORIES)],
)
def test_memory_formats(pattern, memory, path):
    x = MEMORIES[memory](torch.randn(2, 4, 3, 5, dtype=torch.float64, device=DEVICE))
    mask = torch.tensor([[True, False, True], [True, True, True]], device=DEVICE) if "," in pattern else None
    parameters = {"affine": "c" if "g" not in pattern else "(g c)", "weight": torch.rand(4, dtype=torch.float64)}
    sizes = {"g": 2} if "g" in pattern else {}
    recipe, operands = prepared(x, {"pattern": pattern, "mask": mask, "sizes": sizes, **parameters})
    operands = operands._replace(x=x)  # not as it was moved
    expected, m = aten.forward(recipe, operands)
    y, _ = room.forward(recipe, operands)
    same(y, expected, 1e-11)
    dy = torch.randn(2, 4, 3, 5, dtype=torch.float64, device=DEVICE)
    gradients, theirs = (r.backward(recipe, operands, m, dy) for r in (room, aten))
    for a, b in zip(gradients, theirs, strict=True):
        same(a, b, 1e-10)
    assert y.stride() == expected.stride() == gradients.x.stride() == torch.empty_like(x).stride()


@inside
@pytest.mark.parametrize("name", ["utterance", "token_group", "masked_bands", "mask_full", "masked_labels"])
def test_what_is_masked_never_matters(name, path):
    case = cases.by_name[name]
    x, kwargs = cases.arguments(case)
    p = oracle.Pattern(case.pattern, x.shape, kwargs["sizes"], kwargs["labels"])
    keep = torch.stack([kwargs["mask"][p.mask_place(e)] for e in p.elements]).reshape(x.shape)
    dy = torch.randn(x.shape, dtype=x.dtype)
    results = []
    paddings = [torch.full_like(x, value) for value in (0.0, float("nan"), float("inf"), 1e300)]
    if path == "split":  # zeros, and all others in turn
        paddings[1:] = [torch.stack(paddings[1:], -1).flatten()[: x.numel()].reshape(x.shape)]
        assert len(set(map(str, paddings[1][~keep].tolist()))) == 3
    for padding in paddings:
        recipe, operands = prepared(x.where(keep, padding), {"pattern": case.pattern, **kwargs})
        y, kept = room.forward(recipe, operands)
        results.append((y, *room.backward(recipe, operands, kept, dy.where(keep, padding).to(DEVICE))))
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True) if a is not None)
    assert (results[0][0].cpu()[~keep] == 0).all() and (results[0][1].cpu()[~keep] == 0).all()


@inside
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy, by which the interpreter computes with NaN
@pytest.mark.parametrize("pattern", ["v c -> graph[v]", "v c -> graph[v] c", "c v -> graph[v] c", "c v -> graph[v]"])
def test_nan_stays_in_its_set(pattern, path):
    """Groups of very unequal sizes, out of order, some empty."""
    ids = torch.tensor([3, 3, 1, 3, 3, 3, 0, 3, 3, 3, 1, 3, 3])  # the largest in three parts on the split path
    x = torch.randn(13, 3, dtype=torch.float64)
    bad = x.masked_fill((ids == 1)[:, None], float("nan"))
    outputs = []
    for value in (x, bad):
        value = value if pattern.startswith("v") else value.T.contiguous()
        recipe, operands = prepared(value, {"pattern": pattern, "labels": {"graph": Partition(ids, 6)}})
        y, m = room.forward(recipe, operands)
        same(room.moments(recipe, operands, m).count, aten.statistics(recipe, operands).count, 0)
        dx = room.backward(
            recipe, operands, m, torch.ones_like(y) * torch.arange(y.numel(), device=DEVICE).view_as(y)
        ).x
        outputs.append([t if pattern.startswith("v") else t.T for t in (y, dx)])
    for clean, dirty in zip(*outputs, strict=True):
        assert torch.equal(clean[ids != 1], dirty[ids != 1])
        assert dirty[ids == 1].isnan().all()


EQUAL = list(itertools.product([1000.3, -3e-5, 65000.0], [torch.float32, torch.bfloat16]))


@inside
@on_paths(
    ["value", "dtype", "eps"],
    fused=[(*equal, eps) for equal in EQUAL for eps in (1e-5, 0.0)],
    split=[(*equal, eps) for equal, eps in zip(EQUAL, (1e-5, 0.0, 0.0, 1e-5, 1e-5, 0.0), strict=True)],
)
def test_equal_values_give_zero(value, dtype, eps, path):
    x = torch.full((2, 3, 13), value, dtype=dtype)
    recipe, operands = prepared(x, {"pattern": "n c t -> n", "eps": eps})
    y, kept = room.forward(recipe, operands)
    assert (y == 0).all() and (room.moments(recipe, operands, kept).m2 == 0).all()
    dx = room.backward(recipe, operands, kept, torch.ones_like(y)).x
    assert dx.isfinite().all()


@inside
def test_weights_of_zero():
    """What weighs nothing is in no statistic, even if it is NaN; a set of no weight gives 0."""
    x = torch.randn(3, 5)
    x[0, 1] = float("nan")
    weights = torch.rand(3, 5)
    weights[0, 1] = 0
    weights[2] = 0
    recipe, operands = prepared(x, {"pattern": "n c, n c -> n", "mask": weights})
    y, m = room.evaluate(recipe, operands), room.statistics(recipe, operands)
    expected, theirs = aten.evaluate(recipe, operands), aten.statistics(recipe, operands)
    torch.testing.assert_close(y, expected, equal_nan=True)
    same(m.m2, theirs.m2, 1e-5)
    assert (y[2] == 0).all() and m.count[2] == 0

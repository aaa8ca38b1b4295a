"""The rooms: what they save, that they agree, and what the plan says."""

import cases
import pytest
import torch

from flexnorm import Partition, normalize
from flexnorm.calls.arguments import Formula, Options
from flexnorm.kernels import Operands, Plan, aten, choose, cpu, native, stat_dtype
from flexnorm.spec import Spec


def recipe_for(pattern, x, *, mask=None, affine=None, weight=None, bias=None, sizes=None, labels=None, **options):
    spec = Spec.parse(pattern)
    formula = Formula(spec, Options(**options), [spec.read(affine, "affine")] if affine else [], sizes or {})
    return formula.prepare(x, mask, [(weight, bias)] if affine else [], labels or {})[0]


def saved(f):
    """Bytes of every distinct storage that autograd saves."""
    storages = {}

    def pack(t):
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = f()
    return y, storages


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("pattern", "options"),
    [
        ("n (g c) h w -> n g", {}),
        ("n (g c) h w, n h w -> n g", {}),
        ("n (g c) h w -> n region[n h w]", {}),
        ("n (g c) h w -> n region[n h w] g", {"activation": "silu"}),
        ("n (g c) h w, n h w -> g", {"center": False}),
    ],
)
def test_saves_x_the_operands_and_the_statistics(pattern, options, dtype, memory_format):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4, 32, 16, 16, generator=g).to(dtype).to(memory_format=memory_format).requires_grad_()
    mask = torch.rand(4, 16, 16, generator=g) < 0.5 if "," in pattern else None
    labels = {"region": Partition(torch.randint(0, 5, (4, 16, 16), generator=g))} if "region" in pattern else {}
    weight, bias = torch.ones(32, requires_grad=True), torch.zeros(32, requires_grad=True)
    y, storages = saved(
        lambda: normalize(x, pattern, mask, g=8, labels=labels, weight=weight, bias=bias, affine="(g c)", **options)
    )
    own = {t.untyped_storage().data_ptr() for t in (x, mask, weight, bias) if t is not None}
    assert x.untyped_storage().data_ptr() in storages
    extra = sum(size for place, size in storages.items() if place not in own)
    sets = 4 * 8 * 6
    assert extra <= sets * (8 + 3 * 4)  # count, and mean, low and M2 in float32
    y.float().sum().backward()


def test_in_place_changes_before_backward_are_noticed():
    x = torch.randn(3, 4, requires_grad=True)
    h = x * 1
    y = normalize(h, "n c -> n")
    with torch.no_grad():
        h.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("case", **cases.each)
def test_split_entry_points_make_up_the_fused_one(case):
    x, kwargs = cases.arguments(case)
    recipe = recipe_for(
        case.pattern,
        x,
        **{k: kwargs.get(k) for k in ("mask", "affine", "weight", "bias", "sizes", "labels")},
        **case.options,
    )
    operands = Operands(x, kwargs.get("mask"), kwargs.get("weight"), kwargs.get("bias"))
    y, kept = aten.forward(recipe, operands)
    m = aten.moments(recipe, operands, kept)
    again = aten.statistics(recipe, operands)
    assert all(
        torch.equal(a, b) for a, b in zip((m.count, m.mean, m.m2), (again.count, again.mean, again.m2), strict=True)
    )
    assert torch.equal(aten.apply(recipe, operands, m), y)


@pytest.fixture
def no_compiler(monkeypatch):
    """As if the C++ kernels had not been built."""
    monkeypatch.setattr(cpu, "refusal", lambda recipe, operands: "the C++ kernels were not built")


NATIVE = [
    ("... c -> ...", (4, 5, 16), None, None),
    ("... c -> ...", (4, 5, 16), "c", (16,)),
    ("n c h w -> n", (3, 4, 5, 2), None, None),
    ("n (g c) t -> n g", (3, 8, 5), None, None),
    ("n 1 c -> n", (3, 1, 8), "1 c", (1, 8)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("scale", "offset"), [(1, 0), (1e-3, 0), (1e3, 1e6)])
@pytest.mark.parametrize(("pattern", "shape", "affine", "parameter"), NATIVE)
def test_native_agrees_with_aten(no_compiler, pattern, shape, affine, parameter, dtype, scale, offset):
    x = (torch.randn(shape, dtype=torch.float64) * scale + offset).to(dtype)
    weight = torch.randn(parameter, dtype=dtype) if parameter else None
    recipe = recipe_for(
        pattern, x, affine=affine, weight=weight, center=False, sizes={"g": 2} if "g" in pattern else {}
    )
    assert native.refusal(recipe, Operands(x, None, weight)) is None
    assert choose(recipe, Operands(x, None, weight), differentiated=False) == Plan(
        "native", "torch's rms_norm is the same"
    )
    expected = aten.evaluate(recipe, Operands(x, None, weight))
    ours = native.evaluate(recipe, Operands(x, None, weight))
    few = 8 * torch.finfo(dtype).eps  # the mean of squares, its root, two products, on each side
    torch.testing.assert_close(ours, expected, rtol=few, atol=0)


REFUSED = [
    ({"scale": False}, "without a scale"),
    ({"center": False, "mask": torch.ones(4, dtype=torch.bool), "pattern": "n c, n -> n"}, "no masked norm"),
    ({"center": False, "pattern": "n c -> kind[n]", "labels": {"kind": Partition.from_sizes([2, 2])}}, "labels"),
    ({"center": False, "activation": "relu"}, "no activation"),
    ({"center": False, "eps": 0.0}, "divides by zero"),
    ({"center": False, "dtype": torch.bfloat16}, "half precision"),
    ({"center": False, "pattern": "n c -> c"}, "innermost"),
    ({"center": False, "pattern": "n c -> n c"}, "innermost"),
    ({"center": False, "affine": "n", "weight": torch.ones(4)}, "do not lie on the pooled axes"),
    ({"center": False, "affine": "c", "weight": torch.ones(8).double()}, "another dtype"),
]


@pytest.mark.parametrize(("arguments", "reason"), REFUSED)
def test_native_refuses_with_a_reason(no_compiler, arguments, reason):
    arguments = dict(arguments)
    x = torch.randn(4, 8).to(arguments.pop("dtype", torch.float32))
    weight = arguments.pop("weight", None)
    recipe = recipe_for(arguments.pop("pattern", "n c -> n"), x, weight=weight, **arguments)
    plan = choose(recipe, Operands(x, None, weight), differentiated=False)
    assert plan.room == "aten"
    assert reason in plan.reason
    assert str(plan) == f"aten ({plan.reason})"


def test_plan_says_why(no_compiler):
    x = torch.randn(4, 8)
    recipe = recipe_for("n c -> n", x, center=False)
    assert "gradient" in choose(recipe, Operands(x), differentiated=True).reason
    assert "torch.func" in choose(recipe, Operands(x), differentiated=False, transformed=True).reason
    assert "given" in choose(recipe, Operands(x), differentiated=False, moments="given").reason
    assert "not built" in choose(recipe, Operands(x), differentiated=True).reason


@pytest.mark.skipif(isinstance(cpu.library(), str), reason="the C++ kernels are left out")
def test_plan_of_compiled_kernels():
    x = torch.randn(4, 8, 6)
    recipe = recipe_for("n c t -> n", x)
    for differentiated in (False, True):
        plan = choose(recipe, Operands(x), differentiated=differentiated)
        assert str(plan) == "cpu (compiled: 4 closed ranges of 1 rows x 48 columns)"
    assert (
        "after a copy"
        in choose(recipe_for("n c t -> n", x[..., ::2]), Operands(x[..., ::2]), differentiated=False).reason
    )
    assert choose(recipe, Operands(x), differentiated=False, transformed=True).room == "aten"


def test_train_and_eval_give_the_same_bits_where_one_room_serves_both():
    x = torch.randn(8, 32, 6, 6) + 1000
    with torch.no_grad():
        y = normalize(x, "n (g c) h w -> n g", g=4)
    assert torch.equal(normalize(x.requires_grad_(), "n (g c) h w -> n g", g=4), y)


def test_statistics_are_wide():
    assert stat_dtype(torch.float64) == torch.float64
    assert {stat_dtype(d) for d in (torch.float32, torch.bfloat16, torch.float16)} == {torch.float32}

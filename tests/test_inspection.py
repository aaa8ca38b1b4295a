"""`explain`: every fact it states, against loops, derivatives, simulations, and the norms it names."""

import math
import statistics
import time

import cases
import flexnorm_by_name
import oracle
import pytest
import torch
from torch import nn

import flexnorm
from flexnorm import Norm, Partition, ShapeError, SpecError, explain, given, images, normalize
from flexnorm.calls.arguments import Formula, Options
from flexnorm.kernels import choose
from flexnorm.spec import Spec


def explained(case, **options):
    """The explanation of a case from its shape alone, x, and what `normalize` takes beside it."""
    x, kwargs = cases.arguments(case)
    told = {k: v for k, v in kwargs.items() if k not in ("weight", "bias")}
    return explain(case.pattern, tuple(x.shape), dtype=x.dtype, **told, **options), x, kwargs


def members(case, x, kwargs):
    """Of every set, empty ones too, the elements and their weights, by the oracle."""
    p = oracle.Pattern(case.pattern, x.shape, kwargs["sizes"], kwargs["labels"])
    mask = kwargs.get("mask")
    found = p.sets()
    places = math.prod(p.shape(p.right))
    weights = [
        [(i, 1.0 if mask is None else float(mask[p.mask_place(p.elements[i])])) for i in numbers]
        for numbers in found.values()
    ]
    sets = [[(i, w) for i, w in numbers if w > 0] for numbers in weights]
    return sets + [[]] * (places - len(found))


@pytest.mark.parametrize("case", **cases.each)
def test_sets_are_those_of_the_oracle(case):
    e, x, kwargs = explained(case)
    sets = members(case, x, kwargs)
    sizes = sorted(sum(w for _, w in s) ** 2 / sum(w * w for _, w in s) for s in sets if s)
    assert e.count == len(sets)
    assert e.empty == sum(not s for s in sets)
    assert e.single == sum(len(s) == 1 for s in sets)
    assert e.sizes == pytest.approx((sizes[0], statistics.median_low(sizes), sizes[-1]), rel=1e-12)
    assert e.outside == x.numel() - sum(map(len, sets))


@pytest.mark.parametrize("case", **cases.each)
def test_it_removes_what_the_rank_of_the_derivative_lacks(case):
    """Each number that the result does not depend on is a direction in which the derivative is 0."""
    e, x, kwargs = explained(case)
    plain = {k: v for k, v in kwargs.items() if k not in ("weight", "bias", "affine", "activation")} | {"eps": 0}
    plain["labels"] = {name: ids for name, ids in kwargs["labels"].items() if f"{name}[" in case.pattern}
    jacobian = torch.func.jacrev(lambda x: normalize(x, case.pattern, **plain).flatten())(x).reshape(x.numel(), -1)
    # Sets of two elements are -1 and 1 whatever they hold: what rounding leaves of their derivative is no rank.
    rank = int(torch.linalg.matrix_rank(jacobian, atol=1e-7))
    assert e.removed == x.numel() - e.outside - rank


@pytest.mark.parametrize("case", **cases.each)
def test_invariances(case):
    e, x, kwargs = explained(case)
    kwargs["eps"] = 0
    gain, offset = torch.ones(x.numel(), dtype=x.dtype), torch.zeros(x.numel(), dtype=x.dtype)
    p = oracle.Pattern(case.pattern, x.shape, kwargs["sizes"], kwargs["labels"])
    for numbers in p.sets().values():
        gain[numbers], offset[numbers] = 0.5 + torch.rand(()).double(), torch.randn(()).double()
    gain, offset = gain.view(x.shape), offset.view(x.shape)
    y = normalize(x, case.pattern, **kwargs)

    def same(changed):
        return torch.allclose(normalize(changed, case.pattern, **kwargs), y, rtol=1e-9, atol=1e-9)

    assert same(x * gain) == (e.gains is not None)
    varied = max((len(s) for s in members(case, x, kwargs)), default=0) > 1
    assert same(x + offset) == (e.offsets is not None)
    if varied:  # another gain for every element is not one for every set
        other = torch.rand(x.shape, dtype=x.dtype) + 0.5
        assert not same(x * other)
        assert not same(x + other)


@pytest.mark.parametrize("case", **cases.each)
def test_what_a_result_depends_on(case):
    """Another value in one sample: which others' results change."""
    e, x, kwargs = explained(case)
    if x.dim() == 0:
        assert e.mixes is None
        return
    y = normalize(x, case.pattern, **kwargs)
    changed = torch.zeros(x.shape[0], x.shape[0], dtype=torch.bool)
    for i in range(x.shape[0]):
        other = x.clone()
        other[i] += torch.randn(x.shape[1:], dtype=x.dtype)
        moved = normalize(other, case.pattern, **kwargs) != y
        changed[i] = moved.reshape(x.shape[0], -1).any(1)
    others = changed & ~torch.eye(x.shape[0], dtype=torch.bool)
    if e.mixes is None:
        assert not others.any()
    elif "share statistics" in e.mixes:
        assert others.any()
    else:
        names = e.mixes.split("the same ")[1].split(", and on")[0].split(", ")
        ids = torch.stack([kwargs["labels"][name].ids.reshape(x.shape[0], -1) for name in names])
        groups = [set(zip(*row.tolist(), strict=True)) for row in ids.unbind(1)]
        shared = torch.tensor([[bool(a & b) for a in groups] for b in groups])
        assert others.any()
        assert not (others & ~shared).any()


@pytest.mark.parametrize(("center", "m"), [(True, 2), (True, 9), (True, 50), (False, 1), (False, 9)])
def test_the_sampling_error_is_that_of_a_simulation(center, m):
    """The variances of n sets of m normal numbers: their relative deviation is known to about 1 / sqrt(2 n) of itself,
    for chi-squared numbers of k degrees times sqrt(1 + 6 / k); four of these are the tolerance."""
    n, k = 200_000, m - center
    x = torch.randn(n, m, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    var = x.var(1, correction=0) if center else x.square().mean(1)
    expected = float(var.std() / var.mean())
    e = explain("n c -> n", (n, m), center=center)
    assert e.error == pytest.approx(expected, rel=4 * math.sqrt((1 + 6 / k) / (2 * n)))
    assert ("noisy" in str(e)) == (m < 16)


def test_a_set_of_one_element_has_no_error():
    e = explain("n c -> n c", (3, 4))
    assert e.error == math.inf
    assert "12 of 1 element; 12 of one element, which becomes 0" in str(e)
    torch.testing.assert_close(normalize(torch.randn(3, 4), "n c -> n c"), torch.zeros(3, 4))
    rms = explain("n c -> n c", (3, 4), center=False)
    assert "of which the sign is left" in str(rms)
    x = torch.randn(3, 4)
    torch.testing.assert_close(normalize(x, "n c -> n c", center=False, eps=0), x.sign())
    assert explain("n c -> n c", (3, 4), scale=False).error is None


# --- names -----------------------------------------------------------------------------------------------------------

NAMES = [
    ("n (g c) ... -> n g", (4, 6, 3, 5), {"g": 3}, {}, ["nn.GroupNorm(3, 6)"]),
    ("a b c d -> a b", (4, 6, 3, 5), {}, {}, ["nn.InstanceNorm2d(6)", "nn.GroupNorm(6, 6)", "nn.LayerNorm([3, 5])"]),
    ("a b c -> (b a)", (4, 6, 3), {}, {}, ["nn.LayerNorm(3)", "nn.InstanceNorm1d(6)", "nn.GroupNorm(6, 6)"]),
    ("n (g c) h w d -> n g", (2, 4, 2, 3, 2), {"c": 1}, {},
     ["nn.InstanceNorm3d(4)", "nn.GroupNorm(4, 4)", "nn.LayerNorm([2, 3, 2])"]),
    ("a b c d e f -> a b", (2, 3, 2, 2, 2, 2), {}, {}, ["nn.GroupNorm(3, 3)", "nn.LayerNorm([2, 2, 2, 2])"]),
    ("n (g c) h w -> n g", (4, 6, 3, 5), {"g": 1}, {}, ["nn.LayerNorm([6, 3, 5])", "nn.GroupNorm(1, 6)"]),
    ("n c h w -> n", (4, 5, 6, 6), {}, {}, ["nn.LayerNorm([5, 6, 6])", "nn.GroupNorm(1, 5)"]),
    ("... c -> ...", (4, 3, 8), {}, {}, ["nn.LayerNorm(8)", "nn.InstanceNorm1d(3)", "nn.GroupNorm(3, 3)"]),
    ("... c -> ...", (4, 3, 2, 8), {}, {}, ["nn.LayerNorm(8)"]),
    ("a b c ->", (2, 3, 4), {}, {}, ["nn.LayerNorm([2, 3, 4])"]),
    ("... c -> ...", (4, 3, 8), {}, {"center": False}, ["nn.RMSNorm(8, eps=1e-05)"]),
    ("n c d -> n", (4, 3, 8), {}, {"center": False, "eps": 0.5}, ["nn.RMSNorm([3, 8], eps=0.5)"]),
    ("n c -> c", (5, 3), {}, {}, ["nn.BatchNorm1d(3) in training"]),
    ("n c t -> c", (5, 3, 4), {}, {}, ["nn.BatchNorm1d(3) in training"]),
    ("n c ... -> c", (5, 3, 4, 2), {}, {}, ["nn.BatchNorm2d(3) in training"]),
    ("n c ... -> c", (5, 3, 4, 2, 2), {}, {}, ["nn.BatchNorm3d(3) in training"]),
    ("n c ... -> c", (5, 3, 2, 2, 2, 2), {}, {}, []),
    ("b t (g c) -> b g", (3, 5, 6), {"g": 2}, {}, ["nn.GroupNorm(2, 6) of x.movedim(-1, 1)"]),
    ("b t c -> c", (3, 5, 6), {}, {}, ["nn.BatchNorm1d(6) in training of x.movedim(-1, 1)"]),
    ("b h w c -> b c", (3, 5, 2, 6), {}, {},
     ["nn.InstanceNorm2d(6) of x.movedim(-1, 1)", "nn.GroupNorm(6, 6) of x.movedim(-1, 1)"]),
    ("b t (g c) -> b t g", (3, 5, 6), {"g": 2}, {}, ["flexnorm.sequences.TokenGroupNorm(2, 6)"]),
    ("v (g c) -> v g", (5, 6), {"g": 2}, {}, ["nn.GroupNorm(2, 6)"]),
    ("n c 1 w -> n w", (4, 3, 1, 5), {}, {},
     ["nn.InstanceNorm2d(5) of x.movedim(-1, 1)", "nn.GroupNorm(5, 5) of x.movedim(-1, 1)"]),
    ("n 1 c -> n", (4, 1, 5), {}, {}, ["nn.LayerNorm(5)", "nn.InstanceNorm1d(1)", "nn.GroupNorm(1, 1)"]),
    ("n c h w -> n c", (4, 6, 3, 5), {}, {"scale": False}, ["x - x.mean((2, 3), keepdim=True)"]),
    ("h c w -> c", (4, 6, 3), {}, {"scale": False}, ["x - x.mean((0, 2), keepdim=True)"]),
    ("n (g c) h -> n g", (4, 6, 3), {"g": 2}, {"scale": False}, []),
    ("n (g c) h -> n g", (4, 6, 3), {"g": 2}, {"center": False}, []),
    ("n (g c) h -> n g", (4, 6, 3), {"g": 2}, {"eps": 0.25}, ["nn.GroupNorm(2, 6, eps=0.25)"]),
    ("n (c g) h -> n g", (4, 6, 3), {"g": 2}, {}, []),
    ("(h 2) (w 2) c -> h w c", (4, 6, 3), {}, {}, []),
    ("n c -> n c", (4, 6), {}, {}, []),
]  # fmt: skip


@pytest.mark.parametrize(("pattern", "shape", "sizes", "options", "names"), NAMES)
def test_a_name_is_that_of_what_computes_the_same(pattern, shape, sizes, options, names):
    e = explain(pattern, shape, **sizes, **options)
    assert list(e.names) == names
    x = torch.randn(shape, dtype=torch.float64) * 3 + 2
    y = normalize(x, pattern, **sizes, **options)
    for name in names:  # float64 through a few hundred operations, on values below 10
        torch.testing.assert_close(flexnorm_by_name.computed(name, x), y, rtol=1e-12, atol=1e-12)
    if names and "flexnorm" not in names[0]:
        torch.testing.assert_close(e.peer(x), y, rtol=1e-12, atol=1e-12)
    else:
        assert e.peer is None


def test_a_layer_of_torch_is_known_by_its_own_name():
    x = torch.randn(2, 6, 5, 5)
    layers = [nn.GroupNorm(3, 6), nn.LayerNorm([6, 5, 5]), nn.InstanceNorm2d(6), nn.RMSNorm(5, eps=1e-5)]
    for layer in layers:
        e = explain(layer, x)
        assert str(layer).split(",")[0].split("(")[0] == e.names[0].split("(")[0].removeprefix("nn.")
        torch.testing.assert_close(flexnorm_by_name.computed(e.names[0], x), layer(x).detach(), rtol=1e-5, atol=1e-5)
    e = explain(nn.RMSNorm(5), x)  # its eps is another by default
    torch.testing.assert_close(
        flexnorm_by_name.computed(e.names[0], x), nn.RMSNorm(5)(x).detach(), rtol=1e-5, atol=1e-5
    )


def test_masked_and_weighted_names():
    x, mask = torch.randn(3, 4, 7), torch.ones(3, 7)
    assert explain("b (g c) t, b t -> b g", x, g=2).names == ("nn.GroupNorm(2, 4)",)
    assert explain("b (g c) t, b t -> b g", x, mask.bool(), g=2).names == ("nn.GroupNorm(2, 4), masked",)
    weighted = explain("b (g c) t, b t -> b g", x, mask, g=2)
    assert weighted.names == ("nn.GroupNorm(2, 4), weighted",)
    assert weighted.peer is None


@pytest.mark.parametrize(
    ("pattern", "shape", "names"),
    [
        ("n c ... -> n kind[c]", (2, 5, 4), ["flexnorm.spectrograms.MelBandNorm(kind, 5)",
                                            "flexnorm.images.ChannelGroupNorm(3, 5, groups=kind)"]),
        ("n c ... -> n kind[c]", (2, 5, 4, 3), ["flexnorm.images.ChannelGroupNorm(3, 5, groups=kind)"]),
        ("n d c t -> n d kind[c]", (2, 2, 5, 3), ["flexnorm.spectrograms.MelBandNorm(kind, 5)"]),
        ("n c ... -> kind[c]", (2, 5, 4), []),
    ],
)  # fmt: skip
def test_names_with_labels(pattern, shape, names):
    kind = Partition(torch.tensor([0, 2, 1, 1, 0]))
    e = explain(pattern, shape, kind=kind)
    found = [name for name in e.names if "spectrograms" not in name or flexnorm_by_name.HAS_AUDIO]
    assert list(e.names) == names
    x = torch.randn(shape, dtype=torch.float64)
    for name in found:
        y = flexnorm_by_name.computed(name, x, kind=kind)
        torch.testing.assert_close(y, normalize(x, pattern, kind=kind), rtol=1e-12, atol=1e-12)


@pytest.mark.extras
@pytest.mark.parametrize(
    ("pattern", "count"),
    [("v c -> graph[v] c", 2), ("v c -> graph[v]", 1), ("v (g c) -> graph[v] g", 1), ("v c -> (c graph[v])", 2)],
)
def test_names_of_graphs(pattern, count):
    graph = Partition(torch.tensor([0, 2, 1, 1, 0, 0, 2]))
    sizes = {"g": 2} if "g " in pattern.split("->")[0] and "(g" in pattern else {}
    e = explain(pattern, (7, 6), graph=graph, **sizes)
    assert len(e.names) == count
    x = torch.randn(7, 6, dtype=torch.float64)
    for name in e.names:
        y = flexnorm_by_name.computed(name, x, graph=graph.ids)
        torch.testing.assert_close(y, normalize(x, pattern, graph=graph, **sizes), rtol=1e-10, atol=1e-10)


# --- plan and memory -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", **cases.each)
def test_the_plan_is_that_of_a_real_call(case):
    x, kwargs = cases.arguments(case, requires_grad=True)
    spec = Spec.parse(case.pattern)
    params = () if case.affine is None else (spec.read(case.affine, "affine"),)
    known = {name: case.options[name] for name in case.options}
    formula = Formula(spec, Options(**known), params, case.sizes)
    given_ = [(kwargs["weight"], kwargs["bias"])] if params else []
    recipe, operands = formula.prepare(x, kwargs.get("mask"), given_, kwargs["labels"])
    assert explained(case)[0].plan == choose(recipe, operands, differentiated=True)


@pytest.mark.parametrize("case", **cases.each)
def test_what_is_saved_is_what_autograd_holds(case):
    e, _, _ = explained(case)
    if e.plan.room != "cpu":
        pytest.skip("the composition saves what torch's operations save")
    x, kwargs = cases.arguments(case, requires_grad=True)
    held = {}
    own = [x, *(t for t in kwargs.values() if isinstance(t, torch.Tensor)), *(p.ids for p in kwargs["labels"].values())]

    def pack(t):
        held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        normalize(x, case.pattern, **kwargs)
    assert e.saved == sum(n for at, n in held.items() if at not in [t.untyped_storage().data_ptr() for t in own])


def test_what_is_moved_is_x_y_and_what_else_is_read():
    assert explain("n c -> n", (10, 20)).moved == 2 * 10 * 20 * 4
    assert explain("n c -> n", (10, 20), dtype=torch.bfloat16, affine="c").moved == 2 * 10 * 20 * 2 + 2 * 20 * 2
    e = explain("n c, n -> part[n]", (10, 20), torch.ones(10), part=torch.arange(10) // 5)
    assert e.moved == 2 * 10 * 20 * 4 + 10 * 4 + 10 * 8


def test_large_shapes_cost_nothing():
    began = time.monotonic()
    e = explain("n (g c) h w -> n g", (10**4, 512, 1000, 1000), g=32)
    assert time.monotonic() - began < 1  # 20 TB, if it were allocated
    assert (e.count, e.sizes) == (320_000, (16_000_000.0,) * 3)
    singles = explain("n c h w -> n c h w", (10**4, 512, 1000, 1000))
    assert singles.single == singles.removed == 512 * 10**10
    assert explain("n c h w, n -> n c h w", (100, 512, 1000, 1000), torch.arange(100) < 3).outside == 97 * 512 * 10**6


# --- what is read ----------------------------------------------------------------------------------------------------


def test_facts_of_axes():
    e = explain("(h 2) (w 2) c -> h w c", (4, 6, 3))
    assert ", ".join(map(str, e.axes)) == "h=2 kept, 2 pooled, w=3 kept, 2 pooled, c=3 kept"
    ids = torch.randint(0, 2, (2, 3, 4))
    e = explain("n c h w -> n region[n h w] odd[c]", (2, 5, 3, 4), region=ids, odd=torch.arange(5) % 2)
    assert [str(a) for a in e.axes] == ["n=2 kept", "c=5 read by odd", "h=3 read by region", "w=4 read by region"]
    assert e.mixes is None
    e = explain("t c -> a[t] b[t]", (4, 5), a=torch.arange(4) % 2, b=torch.arange(4) // 2)
    assert str(e.axes[0]) == "t=4 read by a, b"


def test_grammar():
    one = str(explain("->", ()))
    assert "1 of 1 element; 1 of one element, which becomes 0" in one
    assert "removes         1 of 1 degree of freedom" in one
    assert "one number, float32" in one
    many = str(explain("v c -> g[v]", (6, 1), g=torch.tensor([0, 0, 0, 1, 3, 3])))
    assert "4 of 1 to 3 elements, median 2; 1 empty; 1 of one element, which becomes 0" in many
    assert "1 element outside" in str(explain("v, v ->", (3,), torch.tensor([True, True, False])))


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0)])
def test_nothing_to_normalize(shape):
    e = explain("n c -> n", shape)
    assert (e.count, e.sizes, e.empty, e.removed, e.names) == (shape[0], None, shape[0], 0, ())
    assert ("all of them empty" in str(e)) == (shape[0] > 0)
    assert e.plan.room == "aten"


def test_html_has_all_facts_and_escapes_them():
    e = explain("n (g c) ... -> n g", (2, 6, 3), g=3)
    html = e._repr_html_()
    for word, text in e.facts():
        assert f">{word}</th>" in html
        assert (
            f">{text.replace('&', '&amp;').replace('>', '&gt;').replace('<', '&lt;').replace(chr(39), '&#x27;')}</td>"
            in html
        )
    assert "-> n g" not in html
    report = explain(nn.Sequential(nn.GroupNorm(3, 6)), (2, 6, 3))
    assert "n (g c) ... -&gt; n g" in report._repr_html_()
    assert all(f"<th>{column}</th>" in report._repr_html_() for column in report.columns)


def test_complex_numbers():
    """A mean takes two real numbers, a variance one; of independent parts it is known twice as well."""
    e = explain("n c -> n", (4, 10), dtype=torch.complex128)
    x = torch.randn(4, 10, dtype=torch.complex128)

    def of_parts(parts):
        return torch.view_as_real(normalize(torch.view_as_complex(parts), "n c -> n", eps=0)).flatten()

    jacobian = torch.autograd.functional.jacobian(of_parts, torch.view_as_real(x)).reshape(80, 80)
    assert e.removed == 80 - int(torch.linalg.matrix_rank(jacobian, atol=1e-7)) == 12
    assert e.error == pytest.approx(math.sqrt(1 / 9))
    assert "of 80 degrees" in str(e)
    assert e.peer is None


def test_bad_input_is_refused_as_elsewhere():
    for what, x, options, error in [
        ("n c", (2, 3), {}, SpecError),
        ("n c -> n", (2, 3, 4), {}, ShapeError),
        ("n (g c) -> n g", (2, 9), {"g": 2}, ShapeError),
        ("n c -> n", (2, -3), {}, SpecError),
        ("n c -> n", "23", {}, SpecError),
        ("n c -> n", None, {}, SpecError),
        ("n c -> n", (2**40, 2**40), {}, SpecError),
        ("n c -> n", (2, 3), {"d": 3}, SpecError),
        ("n c -> kind[n]", (2, 3), {}, SpecError),
        ("n c -> n", (2, 3), {"center": False, "scale": False}, SpecError),
        (nn.GroupNorm(2, 4), (2, 6), {}, ShapeError),
        (nn.GroupNorm(2, 4), (2, 4), {"mask": torch.ones(2)}, SpecError),
        (Norm("v c -> graph[v] c"), (2, 4), {"band": torch.ones(2)}, SpecError),
    ]:
        with pytest.raises(error):
            explain(what, x, **options)


# --- layers ----------------------------------------------------------------------------------------------------------


def test_layers_of_ours():
    norm = Norm("b t (g c), b t -> b g", affine="(g c)", g=2, c=3)
    mask = torch.arange(5) < torch.tensor([[5], [2]])
    e = explain(norm, (2, 5, 6), mask)
    assert e.parameters == {"weight": (6,), "bias": (6,)}
    assert (e.outside, e.sizes) == (18, (6.0, 6.0, 15.0))
    e = explain(Norm("v c -> graph[v] c", affine="c", c=4), torch.randn(5, 4), graph=torch.tensor([0, 0, 0, 2, 2]))
    assert (e.count, e.empty, e.sizes) == (12, 4, (2.0, 2.0, 3.0))
    assert "of the same graph" in e.mixes


def test_an_adapter_is_explained_by_what_it_makes_of_a_call():
    x, mask = torch.randn(2, 6, 4, 3), torch.ones(2, 1, 3, dtype=torch.bool)
    mask[1, :, 2:] = False
    e = explain(images.ChannelGroupNorm(2, 6), x, mask)  # the mask has size 1 along an axis, which no pattern allows
    assert e.outside == 6 * 4
    assert e.names == ("nn.GroupNorm(2, 6), masked",)
    e = explain(images.ChannelGroupNorm(2, 6, groups=[5, 1]), (2, 6, 4, 3))
    assert e.sizes == (12.0, 12.0, 60.0)


@pytest.mark.extras
def test_an_adapter_for_graphs():
    from flexnorm import graphs

    e = explain(graphs.GraphGroupNorm(2, 6), (5, 6), batch=torch.tensor([0, 0, 1, 1, 1]))
    assert (e.count, e.sizes) == (4, (6.0, 6.0, 9.0))
    e = explain(graphs.GraphNorm(6), (5, 6), torch.tensor([0, 0, 1, 1, 1]))
    assert e.names[0] == "torch_geometric.nn.InstanceNorm(6) of batch=batch"


def test_a_layer_that_changes_its_moments_is_known_as_nothing():
    from flexnorm.grouping import SoftGroupNorm

    norm = SoftGroupNorm(2, 6)
    x = torch.randn(2, 6, 8, 8)
    e = explain(norm, x)
    assert (e.names, e.peer, e.gains, e.offsets) == ((), None, None, None)
    said = dict(e.facts())
    assert said["note"].startswith("its groups overlap")
    assert (said["known as"], said["invariant to"]) == ("no other name", "what its note says")
    channel, sample = torch.rand(6, 1, 1) + 0.5, torch.rand(2, 1, 1, 1) + 0.5
    assert (norm(x * channel) - norm(x)).abs().max() > 1e-2  # what instance norm is blind to
    torch.testing.assert_close(norm(x * sample + sample), norm(x), rtol=1e-3, atol=1e-3)  # eps, of a variance about 1
    assert explain(nn.Sequential(norm), x).rows[0][5] == ""


def test_running_statistics_cumulative_and_sharded():
    norm = Norm("n c -> c", c=3, track_running_stats=True)
    for mode in (True, False):
        e = explain(norm.train(mode), (4, 3))
        assert "evaluation goes by running statistics" in e.mixes
    assert norm.num_batches_tracked == 0
    e = explain(Norm("b c t -> b c", cumulative="t"), (2, 3, 7))
    assert (e.count, e.sizes, e.names) == (42, (1.0, 1.0, 1.0), ())
    assert "cumulative along t" in str(e)
    assert "sharded along n" in str(explain(Norm("n c -> c", sharded="n"), (2, 3)))
    assert explain(nn.InstanceNorm1d(3, track_running_stats=True), (2, 3, 4)).mixes.startswith("evaluation")


# --- models ----------------------------------------------------------------------------------------------------------


class Ours(nn.Module):
    """Norms that are called with masks and labels."""

    def __init__(self):
        super().__init__()
        self.first = Norm("b t c, b t -> b c", affine="c", c=6)
        self.second = Norm("b t c -> kind[c]", track_running_stats=True, kind=torch.arange(6) % 2)
        self.third = Norm("b t c, b t -> who[b]")
        self.fourth = nn.Sequential(Norm("b t c -> b day[t]"))
        self.unused = nn.LayerNorm(3)
        self.drop = nn.Dropout()

    def forward(self, x, mask, *, who):
        x = self.second(self.first(x, mask))
        with given(day=torch.arange(x.shape[1]) // 2):
            return self.drop(self.fourth(self.third(x, mask=mask, who=who)))


def test_a_model_of_ours():
    model = Ours()
    model.drop.eval()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    inside = [dict(m.__dict__) for m in model.modules()]
    mask = torch.arange(4) < torch.tensor([[4], [2], [1]])
    called = {"x": torch.randn(3, 4, 6), "mask": mask, "who": torch.tensor([0, 1, 1])}
    report = explain(model, called)
    rows = {row[0]: dict(zip(report.columns, row, strict=True)) for row in report.rows}
    assert list(rows) == ["first", "second", "third", "fourth.0", "unused"]
    assert (rows["first"]["sets"], rows["first"]["elements"], rows["first"]["parameters"]) == ("18", "1 to 4", "12")
    assert (rows["second"]["elements"], rows["second"]["samples"]) == ("36", "running statistics")
    assert (rows["third"]["elements"], rows["third"]["samples"]) == ("18 to 24", "mixed")
    assert (rows["fourth.0"]["sets"], rows["fourth.0"]["elements"]) == ("6", "12")
    assert rows["unused"]["sets"] == "not called"
    assert report.explanations["first"].outside == (0 + 2 + 3) * 6
    assert [m.training for m in model.modules()] == modes
    assert [dict(m.__dict__) for m in model.modules()] == inside
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_a_transformer_and_its_modes():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).train()
    fast = torch.backends.mha.get_fastpath_enabled()
    padding = torch.arange(5) >= torch.tensor([[5], [2], [3]])
    for called in ((3, 5, 16), {"src": torch.randn(3, 5, 16), "src_key_padding_mask": padding}):
        report = explain(model, called)
        assert [row[3:6] for row in report.rows] == [("15", "16", "nn.LayerNorm(16)")] * 4
    assert all(m.training for m in model.modules())
    assert torch.backends.mha.get_fastpath_enabled() == fast
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_batch_norms_of_a_model_in_training_are_not_updated():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.InstanceNorm2d(4), nn.LazyBatchNorm2d())
    report = explain(model, (2, 3, 6, 6))
    assert model[1].num_batches_tracked == 0
    assert model.training
    assert [row[6] for row in report.rows] == ["running statistics", "apart", "running statistics"]
    assert "in training" not in str(report)


def test_without_x_a_model_tells_what_is_known():
    model = nn.Sequential(nn.GroupNorm(2, 4), Norm("n c -> c"), nn.BatchNorm1d(4, track_running_stats=False))
    report = explain(model)
    assert [row[6] for row in report.rows] == ["apart", "mixed", "mixed"]
    assert [row[3] for row in report.rows] == ["", "", ""]
    assert explain(nn.GroupNorm(2, 4)).rows[0][0] == "(model)"
    assert str(explain(nn.Linear(2, 2), (3, 2))) == "no norm in this model"


def test_a_model_that_fails_is_left_as_it_was():
    model = nn.Sequential(Norm("n c -> n"), nn.GroupNorm(2, 4), nn.Linear(5, 5)).train()
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        explain(model, (3, 4))
    assert all(m.training for m in model.modules())
    assert not model[1]._forward_pre_hooks
    assert "_run" not in model[0].__dict__
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_forward_of_its_own_is_not_explained_by_what_it_inherits():
    class Turned(nn.LayerNorm):
        def forward(self, x):
            return super().forward(x.movedim(1, -1)).movedim(-1, 1)

    report = explain(nn.Sequential(Turned(4)), (2, 4, 3))
    assert report.rows[0][1:4] == ("Turned", "its own", "")
    assert report.explanations == {}


@pytest.mark.parametrize("norm", [nn.LayerNorm(4), Norm("... c -> ...")], ids=["torch", "ours"])
def test_a_layer_that_is_called_twice_is_explained_by_its_first_call(norm):
    report = explain(nn.Sequential(norm, nn.Flatten(0, 1), nn.Unflatten(0, (1, -1)), norm), (2, 3, 4))
    assert len(report.rows) == 1
    assert report.explanations["0"].shape == (2, 3, 4)


def test_one_sample_without_its_axis():
    assert explain(nn.InstanceNorm1d(3), (3, 8)).sizes == (8.0, 8.0, 8.0)
    report = explain(nn.Sequential(nn.InstanceNorm2d(3)), (3, 8, 8))
    assert report.rows[0][3:5] == ("3", "64")


@pytest.mark.extras
def test_a_graph_network():
    import torch_geometric.nn as pyg

    from flexnorm import graphs

    edges, batch = torch.tensor([[0, 1, 2, 3], [1, 0, 3, 2]]), torch.tensor([0, 0, 1, 1])
    model = pyg.GCN(3, 8, 2, norm=graphs.GraphGroupNorm(2, 8))
    report = explain(model, {"x": torch.randn(4, 3), "edge_index": edges, "batch": batch})
    assert report.rows[0][1:5] == ("GraphGroupNorm", "v (g c) -> batch[v] g", "4", "8")
    model = pyg.GCN(3, 8, 3, norm="batch_norm")
    report = explain(model, (torch.randn(4, 3), edges))
    assert [row[1:5] for row in report.rows] == [("BatchNorm1d", "n c ... -> c", "8", "4")] * 2
    theirs = pyg.GCN(3, 8, 2, norm="instance_norm")
    assert explain(theirs, (torch.randn(4, 3), edges)).rows[0][1:3] == ("InstanceNorm", "its own")


def test_it_is_drawn():
    pytest.importorskip("matplotlib")
    mask = torch.ones(2, 5, dtype=torch.bool)
    e = explain("b t (g c), b t -> b kind[t] g", (2, 5, 6), mask, g=2, kind=torch.arange(5) % 2)
    assert "kind" in e.draw()._repr_svg_()


def test_explain_is_public():
    assert flexnorm.explain is explain


class Turned(Norm):
    """A forward of its own."""

    def forward(self, x, gain=1.0):
        return super().forward(x.movedim(-1, 1)).movedim(1, -1) * gain


class Open(Norm):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


def test_a_layer_with_a_forward_of_its_own_is_explained_by_what_its_pattern_meets():
    turned, model = Turned("n c ... -> n", c=3), nn.Sequential(Turned("n c ... -> n", c=3), Open("n ... c -> n"))
    assert explain(turned, (2, 4, 5, 3)).shape == (2, 3, 4, 5)
    found = explain(model, (2, 4, 5, 3)).explanations
    assert found["0"].shape == (2, 3, 4, 5)
    assert found["1"].shape == (2, 4, 5, 3)
    assert explain(Open("n ... c -> n"), (2, 4)).shape == (2, 4)


def test_a_model_of_inference_mode_is_explained():
    with torch.inference_mode():
        model = nn.Sequential(Norm("n c -> c", c=3, track_running_stats=True))
    before = model.state_dict()
    assert explain(model, (4, 3)).explanations["0"].count == 3
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])

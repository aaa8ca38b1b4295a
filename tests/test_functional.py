"""`normalize` and `moments` against the oracle: values, gradients, precision, layouts, dtypes, extreme inputs."""

import itertools

import cases
import oracle
import pytest
import torch

from flexnorm import Moments, moments, normalize

EPS = {dtype: torch.finfo(dtype).eps for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)}


def bound(y, x, pattern, kwargs, dtype):
    """Design 4.4, before affine: |err| <= 4 eps (|mean| / sigma + |y|) + 1e-6; affine scales it by |weight|, and
    is one more rounding of the result. Half precision is rounded once, at the end."""
    plain = {k: v for k, v in kwargs.items() if k in ("mask", "sizes", "labels")}
    p = oracle.Pattern(pattern, x.shape, plain.get("sizes"), plain.get("labels"))
    _, mean, m2 = oracle.moments(x.detach(), pattern, **plain)
    count = oracle.moments(x.detach(), pattern, **plain)[0]
    sigma = (m2 / count.clamp(min=1e-30) + 1e-5).sqrt()
    ratio = torch.tensor([float((mean.abs() / sigma)[p.place(p.right, e)]) for e in p.elements]).reshape(x.shape)
    gain = 1 + (kwargs["weight"].abs().max().item() if kwargs.get("weight") is not None else 0)
    work = EPS[torch.float64 if dtype == torch.float64 else torch.float32]
    floor = 1e-6 if dtype != torch.float64 else 1e-14
    return gain * (4 * work * (ratio + y.abs()) + floor) + EPS[dtype] * y.abs()


@pytest.mark.parametrize("case", **cases.each)
def test_values_and_gradients_are_the_formula(case):
    x, kwargs = cases.arguments(case, requires_grad=True)
    y, expected = normalize(x, case.pattern, **kwargs), oracle.normalize(x, case.pattern, **kwargs)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    leaves = cases.leaves(x, kwargs)
    ours = torch.autograd.grad(y, leaves, dy)
    theirs = torch.autograd.grad(expected, leaves, dy, allow_unused=True, materialize_grads=True)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", **cases.each)
def test_gradcheck_first_and_second_order(case):
    x, kwargs = cases.arguments(case, requires_grad=True)
    leaves = cases.leaves(x, kwargs)
    names = [name for name in ("mask", "weight", "bias") if kwargs.get(name) is not None and kwargs[name].requires_grad]

    def f(x, *rest):
        return normalize(x, case.pattern, **{**kwargs, **dict(zip(names, rest, strict=True))})

    assert torch.autograd.gradcheck(f, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(f, leaves, fast_mode=True)


RANGES = [(1, 0), (1e-3, 0), (1e3, 0), (1, 1e3), (0.1, 1e4), (1e3, 1e6), (1, 1e6)]  # scale and offset of x


@pytest.mark.parametrize(
    ("dtype", "scale", "offset"),
    [(dtype, *r) for dtype in EPS for r in RANGES if sum(r) < torch.finfo(dtype).max / 8],  # x itself must fit in it
)
@pytest.mark.parametrize("case", **cases.each)
def test_error_is_within_the_bound(case, scale, offset, dtype):
    x, kwargs = cases.arguments(case, dtype=dtype, scale=scale, offset=offset)
    y = normalize(x, case.pattern, **kwargs)
    expected = oracle.normalize(x, case.pattern, **kwargs)
    assert y.dtype == dtype
    if kwargs.get("scale") is False:
        limit = EPS[dtype] * expected.abs() + 4 * EPS[torch.float32] * scale + torch.finfo(dtype).smallest_normal
    else:
        limit = bound(expected, x, case.pattern, kwargs, dtype)
    assert ((y.double() - expected).abs() <= limit).all()


# --- gradients keep their digits ---


@pytest.mark.parametrize(("pattern", "shape"), [("n c t -> n", (4, 64, 64)), ("v c -> c", (4096, 8))])
def test_gradient_error_at_a_large_mean(pattern, shape):
    """Design 4.4: relative error of dx at mean 1e4, std 0.1 below 1e-5. torch's layer_norm: 1e-2."""
    g = torch.Generator().manual_seed(0)
    x = (torch.randn(shape, generator=g) * 0.1 + 1e4).requires_grad_()
    dy = torch.randn(shape, generator=g)
    (dx,) = torch.autograd.grad(normalize(x, pattern), x, dy)
    wide = x.detach().double().requires_grad_()
    dims = [2, 1] if pattern == "n c t -> n" else [0]
    centered = wide - wide.mean(dims, keepdim=True)
    y = centered / (centered.square().mean(dims, keepdim=True) + 1e-5).sqrt()
    (expected,) = torch.autograd.grad(y, wide, dy.double())
    assert (dx.double() - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.slow
@pytest.mark.parametrize(("scale", "offset"), [(1, 0), (0.1, 1e4), (1, 1e6)])
@pytest.mark.parametrize("kind", ["dense", "label", "mask", "columns"])
def test_error_of_sets_of_ten_million(kind, scale, offset):
    """Design 4.4 for sets of 10^7 elements, segments included."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(10**7, generator=g) * scale + offset
    kwargs = {}
    if kind == "label":
        y = normalize(x, "v -> all[v]", all=torch.zeros(10**7, dtype=torch.long))
    elif kind == "mask":
        y = normalize(x, "v, v -> ", torch.ones(10**7, dtype=torch.bool))
    elif kind == "columns":
        y = normalize(x.view(5 * 10**6, 2), "v c -> ").view(-1)
    else:
        y = normalize(x, "v -> ", **kwargs)
    wide = x.double()
    sigma = (wide.var(correction=0) + 1e-5).sqrt()
    expected = (wide - wide.mean()) / sigma
    limit = 4 * EPS[torch.float32] * (wide.mean().abs() / sigma + expected.abs()) + 1e-6
    assert ((y.double() - expected).abs() <= limit).all()


def test_mean_of_millions_near_a_hundred_in_segments():
    """float32 index_add gives a mean that is off by 2.66 here."""
    x = torch.rand(4_000_000, generator=torch.Generator().manual_seed(0)) + 99.5
    m = moments(x, "v -> all[v]", all=torch.zeros(4_000_000, dtype=torch.long))
    assert abs(m.mean.item() - x.double().mean().item()) < 1e-5  # half an ulp of 100 is 3.8e-6
    assert m.count.item() == 4_000_000


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_counts_do_not_stop_in_half_precision(dtype):
    x = torch.randn(1000, 128, generator=torch.Generator().manual_seed(0)).to(dtype)
    m = moments(x, "v c, v -> graph[v]", torch.ones(1000, dtype=torch.bool), graph=torch.zeros(1000, dtype=torch.long))
    assert m.count.tolist() == [128_000]
    assert normalize(x, "v c -> graph[v]", graph=torch.zeros(1000, dtype=torch.long)).isfinite().all()


# --- layouts ---


def layouts(x):
    """The same values in other memory: name and tensor."""
    yield "contiguous", x.contiguous()
    order = list(range(x.dim()))
    if x.dim() > 1:
        yield "transposed", x.permute(order[::-1]).contiguous().permute(order[::-1])
        turned = [0, *order[2:], 1]
        yield "channels_last", x.permute(turned).contiguous().permute(sorted(order, key=turned.__getitem__))
    wide = torch.zeros([2 * size for size in x.shape], dtype=x.dtype)
    every_other = wide[tuple(slice(None, None, 2) for _ in x.shape)]
    yield "sliced", every_other.copy_(x)
    shifted = torch.zeros(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape)
    yield "shifted", shifted.copy_(x)


@pytest.mark.parametrize("case", **cases.each)
def test_layout_changes_nothing_and_is_kept(case):
    x, kwargs = cases.arguments(case)
    dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
    expected = oracle.normalize(x.requires_grad_(), case.pattern, **kwargs)
    (dx_expected,) = torch.autograd.grad(expected, x, dy)
    for name, other in layouts(x.detach()):
        leaf = other.requires_grad_()
        y = normalize(leaf, case.pattern, **kwargs)
        (dx,) = torch.autograd.grad(y, leaf, dy)
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")
        torch.testing.assert_close(dx, dx_expected, rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")
        dense = torch.empty_like(other)  # the strides that torch's own elementwise operations give
        for t in (y, dx):
            strides = [(s, d) for s, d, size in zip(t.stride(), dense.stride(), t.shape, strict=True) if size > 1]
            assert all(s == d for s, d in strides), (name, t.stride(), dense.stride())


def test_expanded_input():
    x = torch.randn(1, 4, 5, dtype=torch.float64).expand(3, 4, 5).requires_grad_()
    y = normalize(x, "n c t -> n c")
    torch.testing.assert_close(y, oracle.normalize(x, "n c t -> n c"), rtol=1e-12, atol=1e-12)
    y.square().sum().backward()
    assert y.is_contiguous()
    assert x.grad.shape == x.shape


def test_channels_last_keeps_its_digits():
    """torch's own channels-last group_norm on CPU has an error of 1.9 here."""
    x = torch.randn(2, 8, 16, 16, generator=torch.Generator().manual_seed(0)) + 1000
    last = x.to(memory_format=torch.channels_last)
    y, expected = normalize(last, "n (g c) h w -> n g", g=2), torch.nn.functional.group_norm(x.double(), 2)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert (y.double() - expected).abs().max() < 1e-5
    few = 4 * EPS[torch.float32] * y.abs().clamp(min=1)  # design 4.8
    assert ((y - normalize(x, "n (g c) h w -> n g", g=2)).abs() <= few).all()


def test_inputs_are_never_modified():
    for case in cases.CASES:
        x, kwargs = cases.arguments(case, requires_grad=True)
        tensors = [x, *(t for t in kwargs.values() if isinstance(t, torch.Tensor))]
        before = [(t.detach().clone(), t._version) for t in tensors]
        normalize(x, case.pattern, **kwargs).sum().backward()
        moments(
            x, case.pattern, kwargs.get("mask"), sizes=kwargs["sizes"]
        ) if not case.labels and not case.affine else None
        for t, (values, version) in zip(tensors, before, strict=True):
            assert torch.equal(t.detach(), values)
            assert t._version == version


# --- dtypes ---


@pytest.mark.parametrize("dtype", EPS, ids=str)
@pytest.mark.parametrize("other", EPS, ids=str)
def test_parameters_and_weights_of_any_dtype(dtype, other):
    x = torch.randn(2, 4, 3).to(dtype)
    weight, bias = torch.randn(4).to(other).requires_grad_(), torch.randn(4).to(other).requires_grad_()
    w = torch.rand(2, 3).to(other).requires_grad_()
    y = normalize(x, "b (g c) t, b t -> b g", w, g=2, weight=weight, bias=bias, affine="(g c)")
    expected = oracle.normalize(x, "b (g c) t, b t -> b g", w, sizes={"g": 2}, weight=weight, bias=bias, affine="(g c)")
    assert y.dtype == dtype
    assert ((y.double() - expected).abs() <= (EPS[dtype] + 1e-6) * (expected.abs() + 1)).all()
    y.float().square().sum().backward()
    assert weight.grad.dtype == bias.grad.dtype == w.grad.dtype == other


@pytest.mark.parametrize("pattern", ["n c t -> n", "n c t -> c", "n c t -> n kind[c]"])
def test_autocast_keeps_the_dtype(pattern):
    labels = {"kind": torch.tensor([0, 1, 0, 1])} if "kind" in pattern else {}
    x = torch.randn(2, 4, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = normalize(x, pattern, labels=labels)
    assert y.dtype == torch.float32
    assert torch.equal(y, normalize(x, pattern, labels=labels))
    assert normalize(x.bfloat16(), pattern, labels=labels).dtype == torch.bfloat16


# --- masks ---


def poisoned(x, mask, value):
    return torch.where(mask, x, torch.full_like(x, value))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
@pytest.mark.parametrize("case", [c for c in cases.CASES if c.mask and c.mask[0] == "bool"], ids=lambda c: c.name)
def test_padding_changes_no_bit(case, value):
    """Design 4.6: outputs and all gradients, whatever padding holds, the gradient that comes in there included."""
    x, kwargs = cases.arguments(case, dtype=torch.float32, requires_grad=True)
    p = oracle.Pattern(case.pattern, x.shape, kwargs["sizes"], kwargs["labels"])
    inside = torch.tensor([bool(kwargs["mask"][p.mask_place(e)]) for e in p.elements]).reshape(x.shape)
    dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    results = []
    for fill in (0.0, value):
        leaf = poisoned(x.detach(), inside, fill).requires_grad_()
        y = normalize(leaf, case.pattern, **kwargs)
        leaves = [leaf, *cases.leaves(None, kwargs)]
        results.append([y, *torch.autograd.grad(y, leaves, poisoned(dy, inside, fill))])
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty)
    y, dx = results[1][:2]
    assert (y[~inside] == 0).all()
    assert (dx[~inside] == 0).all()


@pytest.mark.parametrize("more", [1, 13])
def test_amount_of_padding_changes_nothing(more):
    x, mask = torch.randn(3, 4, 20), torch.arange(20) < torch.tensor([[20], [7], [1]])
    longer = torch.cat([x, torch.full((3, 4, more), float("nan"))], 2)
    mask_longer = torch.cat([mask, torch.zeros(3, more, dtype=torch.bool)], 1)
    y = normalize(x, "b (g c) t, b t -> b g", mask, g=2)
    z = normalize(longer, "b (g c) t, b t -> b g", mask_longer, g=2)
    torch.testing.assert_close(z[..., :20], y, rtol=0, atol=1e-6)
    alone = normalize(x[1:2, :, :7], "b (g c) t -> b g", g=2)
    torch.testing.assert_close(y[1:2, :, :7], alone, rtol=0, atol=1e-6)


def test_huge_values_beside_padding():
    """A set around 1e30 whose padding is 0: the square of the difference overflows, and must not count."""
    x = torch.tensor([[1e30, 1e30, 0.0]])
    mask = torch.tensor([[True, True, False]])
    assert torch.equal(normalize(x, "n c, n c -> n", mask), torch.zeros(1, 3))


def test_weight_zero_fits_nothing_and_is_applied_to():
    x = torch.tensor([[1.0, 3.0, 100.0], [4.0, 5.0, 6.0]])
    w = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    y = normalize(x, "n c, n c -> n", w, eps=0)
    assert torch.equal(y, torch.tensor([[-1.0, 1.0, 98.0], [0.0, 0.0, 0.0]]))
    x[0, 2] = float("nan")
    assert torch.equal(normalize(x, "n c, n c -> n", w, eps=0)[0, :2], torch.tensor([-1.0, 1.0]))


def test_gradient_of_a_weight_at_zero_is_that_of_the_formula():
    x = torch.randn(2, 5, dtype=torch.float64)
    w = torch.tensor([[1.0, 0.0, 2.0, 0.5, 0.0], [1.0, 1.0, 1.0, 0.0, 3.0]], dtype=torch.float64, requires_grad=True)
    dy = torch.randn(2, 5, dtype=torch.float64)
    (ours,) = torch.autograd.grad(normalize(x, "n c, n c -> n", w), w, dy)
    (formula,) = torch.autograd.grad(oracle.normalize(x, "n c, n c -> n", w), w, dy)
    torch.testing.assert_close(ours, formula, rtol=1e-10, atol=1e-10)


def test_gradient_of_weights_of_huge_values():
    x, w = torch.tensor([[1e30, -1e30, 1e30]]), torch.tensor([[1.0, 2.0, 3.0]], requires_grad=True)
    normalize(x, "n c, n c -> n", w, scale=False).mul(1e-30).sum().backward()
    assert w.grad.isfinite().all()
    assert w.grad.abs().sum() > 0


def test_eps_below_what_the_dtype_holds():
    assert torch.equal(normalize(torch.zeros(2, 4), "... c -> ...", center=False, eps=1e-50), torch.zeros(2, 4))


def test_constant_weights_change_nothing():
    x = torch.randn(2, 3, 4, 5, 5)
    plain = normalize(x, "n c d h w -> n c")
    torch.testing.assert_close(normalize(x, "n c d h w, d -> n c", torch.full((4,), 0.7)), plain, rtol=0, atol=1e-6)


# --- exactness ---


@pytest.mark.parametrize("value", [1000.3, -0.1, 1e-30, 3e37, 0.0])
@pytest.mark.parametrize("eps", [0.0, 1e-5])
@pytest.mark.parametrize("dtype", EPS, ids=str)
@pytest.mark.parametrize("name", ["layer", "batch", "bands", "utterance", "masked_labels", "voxels", "weighted_labels"])
def test_equal_values_give_exactly_zero(name, dtype, eps, value):
    case = cases.by_name[name]
    x, kwargs = cases.arguments(case, dtype=dtype)
    x = torch.full_like(x, value) if abs(value) < torch.finfo(dtype).max else torch.full_like(x, 6e4)
    kwargs = {k: v for k, v in kwargs.items() if k not in ("weight", "bias", "affine")}
    leaf = x.clone().requires_grad_()
    y = normalize(leaf, case.pattern, eps=eps, **kwargs)
    assert (y == 0).all()
    y.sum().backward()
    assert leaf.grad.isfinite().all()
    with torch.no_grad():  # the native room, where it is chosen
        assert (normalize(x, case.pattern, eps=eps, **kwargs) == 0).all()


def test_single_elements_give_the_bias():
    x, bias = torch.randn(3, 4) * 1e3, torch.randn(4)
    assert torch.equal(normalize(x, "n c -> n c", bias=bias, affine="c"), bias.expand(3, 4))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["group", "batch", "graph_group", "bands", "regions", "two_labels", "weights"])
def test_a_bad_value_stays_in_its_set(name, bad):
    """Design 4.7: outputs and input gradients of all other sets are bit-identical."""
    case = cases.by_name[name]
    x, kwargs = cases.arguments(case, dtype=torch.float32)
    p = oracle.Pattern(case.pattern, x.shape, kwargs["sizes"], kwargs["labels"])
    hit = next(iter(p.sets().values()))
    other = torch.ones(x.numel(), dtype=torch.bool)
    other[hit] = False
    dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    results = []
    for value in (None, bad):
        leaf = x.clone()
        if value is not None:
            leaf.view(-1)[hit[0]] = value
        leaf.requires_grad_()
        y = normalize(leaf, case.pattern, **kwargs)
        results.append((y, *torch.autograd.grad(y, leaf, dy)))
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean.flatten()[other], dirty.flatten()[other])
        assert not dirty.flatten()[hit].isfinite().any() or clean is results[0][1]


def test_alone_or_in_a_batch():
    x = torch.randn(5, 6, 7, 3)
    y = normalize(x, "n (g c) h w -> n g", g=2)
    for i in range(5):
        torch.testing.assert_close(normalize(x[i : i + 1], "n (g c) h w -> n g", g=2), y[i : i + 1], rtol=0, atol=1e-6)


def test_order_of_labels_changes_nothing():
    g = torch.Generator().manual_seed(0)
    ids, x = torch.randint(0, 5, (40,), generator=g), torch.randn(40, 3, generator=g)
    order = torch.randperm(40, generator=g)
    y = normalize(x, "v c -> graph[v] c", graph=ids)
    torch.testing.assert_close(normalize(x[order], "v c -> graph[v] c", graph=ids[order]), y[order], rtol=0, atol=1e-6)
    renamed = torch.tensor([3, 7, 0, 1, 4])[ids]
    torch.testing.assert_close(normalize(x, "v c -> graph[v] c", graph=renamed), y, rtol=0, atol=1e-6)


# --- axes of size 0 and 1 ---


@pytest.mark.parametrize("size", [0, 1])
@pytest.mark.parametrize(
    "case", [c for c in cases.CASES if c.shape and not c.sizes and "(" not in c.pattern], ids=lambda c: c.name
)
def test_every_axis_of_size_zero_and_one(case, size):
    x, kwargs = cases.arguments(case, requires_grad=True)
    for axis in range(len(case.shape)):
        small, changed = shrunk(case, x, kwargs, axis, size)
        if small is None:
            continue
        leaves = cases.leaves(small, changed)
        y = normalize(small, case.pattern, **changed)
        assert y.shape == small.shape
        expected = oracle.normalize(small, case.pattern, **changed)
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
        grads = torch.autograd.grad(y.sum(), leaves)
        for grad, leaf in zip(grads, leaves, strict=True):
            assert grad.shape == leaf.shape
            assert grad.isfinite().all()
            if size == 0:
                assert (grad == 0).all()


def shrunk(case, x, kwargs, axis, size):
    """The case with one axis of x cut to `size`, in everything that has it; None where the axis is a unit one."""
    p = oracle.Pattern(case.pattern, x.shape, kwargs["sizes"], kwargs["labels"])
    groups = oracle.read(case.pattern.split("->")[0].split(",")[0], p.rank)
    if not groups[axis]:
        return None, None
    name = groups[axis][0]

    def cut(t, side):
        for d, group in enumerate(oracle.read(side, p.rank)):
            if group == [name]:
                t = t.narrow(d, 0, size)
        return t.detach().requires_grad_(t.requires_grad)

    changed = dict(kwargs)
    if kwargs.get("mask") is not None:
        changed["mask"] = cut(kwargs["mask"], case.pattern.split("->")[0].split(",")[1])
    for parameter in ("weight", "bias"):
        if kwargs.get(parameter) is not None:
            changed[parameter] = cut(kwargs[parameter], case.affine)
    reads = dict(oracle.re.findall(r"(\w+)\s*\[([^\]]*)\]", f"{case.pattern} {case.affine}"))
    changed["labels"] = {
        label: type(partition)(cut(partition.ids, reads[label]), partition.count)
        for label, partition in kwargs["labels"].items()
    }
    return x.detach().narrow(axis, 0, size).clone().requires_grad_(), changed


def test_empty_composition():
    x = torch.randn(2, 0, 3, requires_grad=True)
    y = normalize(x, "n (g c) t -> n g", g=4)
    y.sum().backward()
    assert y.shape == x.grad.shape == (2, 0, 3)
    assert moments(x, "n (g c) t -> n g", g=4).count.tolist() == [[0] * 4] * 2


# --- moments ---


@pytest.mark.parametrize("case", **cases.each)
def test_moments_are_those_of_the_formula(case):
    x, kwargs = cases.arguments(case, offset=3.0)
    inside = {k: kwargs[k] for k in ("mask", "sizes", "labels") if k in kwargs}
    read = case.pattern.split("->")[1]
    inside["labels"] = {k: v for k, v in inside["labels"].items() if f"{k}[" in read}
    m = moments(x, case.pattern, **inside)
    count, mean, m2 = oracle.moments(x, case.pattern, **inside)
    for a, b in zip((m.count.double(), m.mean, m.m2), (count, mean, m2), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert m.count.is_floating_point() == (case.mask is not None and case.mask[0] == "float")


@pytest.mark.parametrize("case", **cases.each)
def test_own_moments_given_from_outside_give_the_same(case):
    x, kwargs = cases.arguments(case, requires_grad=True)
    read = case.pattern.split("->")[1]
    labels = {k: v for k, v in kwargs["labels"].items() if f"{k}[" in read}
    y = normalize(x, case.pattern, **kwargs)
    m = moments(x, case.pattern, kwargs.get("mask"), sizes=kwargs["sizes"], labels=labels)
    z = normalize(x, case.pattern, moments=m, **kwargs)
    torch.testing.assert_close(z, y, rtol=1e-10, atol=1e-10)
    dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
    leaves = cases.leaves(x, kwargs)
    for a, b in zip(torch.autograd.grad(z, leaves, dy), torch.autograd.grad(y, leaves, dy), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("options", [{}, {"center": False}, {"scale": False}])
@pytest.mark.parametrize("pattern", ["n c t -> n c", "n c t, n t -> n c", "n c t -> n kind[c]"])
def test_gradients_through_given_moments(pattern, options):
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(2, 4) < 0.7 if "," in pattern else None
    labels = {"kind": torch.tensor([0, 1, 0])} if "kind" in pattern else {}
    shape = (2, 2) if labels else (2, 3)
    count = (torch.rand(shape, dtype=torch.float64) + 1).requires_grad_()
    mean, m2 = torch.randn(shape, dtype=torch.float64, requires_grad=True), (torch.rand(shape, dtype=torch.float64) + 1)

    def f(x, count, mean, m2):
        return normalize(x, pattern, mask, labels=labels, moments=Moments(count, mean, m2), **options)

    leaves = (x, count, mean, m2.requires_grad_())
    assert torch.autograd.gradcheck(f, leaves)
    assert torch.autograd.gradgradcheck(f, leaves)


def test_moments_of_one_tensor_for_another():
    train, test = torch.randn(100, 3) * 2 + 5, torch.randn(10, 3) * 2 + 5
    m = moments(train, "n c -> c")
    y = normalize(test, "n c -> c", moments=m)
    expected = (test.double() - train.double().mean(0)) / (train.double().var(0, correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("side", [" ".join(order) for order in itertools.permutations(["n", "g", "kind[c]", "t"])])
def test_given_moments_lie_in_any_order(side):
    """Among them that of channels-last memory, which torch keeps where it stacks."""
    torch.manual_seed(0)
    x = torch.randn(2, 6, 4, dtype=torch.float64) + 1
    given = {"g": 2, "kind": torch.tensor([1, 0, 1])}
    pattern = f"n (g c) t -> {side}"
    y = normalize(x, pattern, moments=moments(x, pattern, **given), **given)
    torch.testing.assert_close(y, oracle.normalize(x, pattern, sizes={"g": 2}, labels={"kind": given["kind"]}))

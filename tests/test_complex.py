"""Complex tensors: the mean is complex, the variance is E|x - mean|^2; weight and bias are complex or real.

The definition is a loop over the sets, in complex128; it shares no code with flexnorm.
"""

import copy

import cases
import oracle
import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from flexnorm import Moments, Norm, Partition, SpecError, given, moments, normalize

C64, C128 = torch.complex64, torch.complex128
NAN, INF = float("nan"), float("inf")
CLOSE = {"rtol": 1e-10, "atol": 1e-10}  # sums of some ten terms in complex128, divided by sigma > 0.1
COMPLEX = [case for case in cases.CASES if "activation" not in case.options]
every = pytest.mark.parametrize("case", COMPLEX, ids=[case.name for case in COMPLEX])
SOME = ["group", "layer_last", "batch", "rms", "center_only", "zero_rank", "utterance", "masked_batch", "masked_rms",
        "graph_group", "regions_dots", "two_labels", "node_types", "bands", "voxels", "weights", "weighted_rms",
        "weighted_center", "weighted_labels", "masked_labels"]  # fmt: skip
some = pytest.mark.parametrize("case", [cases.by_name[name] for name in SOME], ids=SOME)


def formula(
    x, pattern, mask=None, *, sizes=None, labels=None, weight=None, bias=None, affine=None, center=True, scale=True,
    eps=1e-5,
):  # fmt: skip
    """y in complex128, differentiable in everything."""
    p = oracle.Pattern(pattern, x.shape, sizes, labels)
    flat = x.to(C128).flatten()
    result = [torch.zeros((), dtype=C128)] * len(p.elements)
    for members in p.sets().values():
        weights = torch.ones(len(members), dtype=torch.float64)
        if mask is not None and mask.dtype == torch.bool:
            members = [i for i in members if mask[p.mask_place(p.elements[i])]]
            weights = torch.ones(len(members), dtype=torch.float64)
        elif mask is not None:
            weights = torch.stack([mask[p.mask_place(p.elements[i])].double() for i in members])
        if not members:
            continue
        values = flat[members]
        away = values - (weights * values).sum() / weights.sum() if center else values
        square = away.real**2 + away.imag**2
        sigma = ((weights * square).sum() / weights.sum() + eps).sqrt() if scale else 1.0
        for i, y in zip(members, away / sigma, strict=True):
            place = None if affine is None else p.place(affine, p.elements[i])
            y = y if weight is None else y * weight[place]
            result[i] = y if bias is None else y + bias[place]
    return torch.stack(result).reshape(x.shape) if result else x.to(C128)


def arguments(case, *, dtype=C128, params=C128, offset=0.0, scale=1.0, requires_grad=False, seed=0):
    """Those of the table, complex."""
    real = torch.float64 if dtype == C128 else torch.float32
    x, kwargs = cases.arguments(case, seed=seed, dtype=real)
    g = torch.Generator().manual_seed(seed + 1)

    def turned(t, dtype):
        imaginary = torch.randn(t.shape, generator=g, dtype=torch.float64)
        t = torch.complex(t.double(), imaginary) if dtype.is_complex else t
        return t.detach().to(dtype)

    x = (turned(x, dtype) * scale + offset).to(dtype)
    for name in ("weight", "bias"):
        if name in kwargs:
            kwargs[name] = turned(kwargs[name], params)
    if requires_grad:
        for t in (x, kwargs.get("weight"), kwargs.get("bias"), kwargs.get("mask")):
            if t is not None and t.dtype != torch.bool:
                t.requires_grad_()
    return x, kwargs


@every
@pytest.mark.parametrize("params", [C128, torch.float64], ids=["complex", "real"])
def test_every_pattern_and_its_gradients(case, params):
    x, kwargs = arguments(case, params=params, requires_grad=True)
    y, expected = normalize(x, case.pattern, **kwargs), formula(x, case.pattern, **kwargs)
    assert y.dtype == C128
    torch.testing.assert_close(y, expected, **CLOSE)
    dy = torch.randn_like(y)
    leaves = cases.leaves(x, kwargs)
    ours, theirs = torch.autograd.grad(y, leaves, dy), torch.autograd.grad(expected, leaves, dy)
    for leaf, a, b in zip(leaves, ours, theirs, strict=True):
        assert a.dtype == leaf.dtype
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@every
def test_real_numbers_among_complex_ones(case):
    """Without an imaginary part it is the layer of real numbers; turned by i, that turned by i."""
    x, kwargs = cases.arguments(case)
    bias = kwargs.pop("bias", None)
    y = normalize(x, case.pattern, **kwargs)
    for factor in (1, 1j):
        z = normalize(x * torch.tensor(factor, dtype=C128), case.pattern, **kwargs)
        torch.testing.assert_close(z, y.to(C128) * factor, **CLOSE)
    if bias is not None:
        z = normalize(x.to(C128), case.pattern, **kwargs, bias=bias)
        torch.testing.assert_close(z, normalize(x, case.pattern, **kwargs, bias=bias).to(C128), **CLOSE)


# --- precision -------------------------------------------------------------------------------------------------------


def assert_near(y, x, pattern, **kwargs):
    """|err| <= 4 eps (|mean| / sigma + |y|) + 1e-6 of each part, before weight and bias; twice that of both."""
    eps = torch.finfo(torch.float32).eps
    exact = formula(x, pattern, **kwargs)
    mean = moments(x.to(C128), pattern, sizes=kwargs.get("sizes")).mean
    sigma = (formula(x, pattern, **kwargs, scale=False).abs().max() / exact.abs().max()).item()  # of one set, say
    bound = 2 * (4 * eps * (mean.abs().max() / sigma + exact.abs()) + 1e-6)
    assert ((y.to(C128) - exact).abs() <= bound).all()


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e4 - 3e4j, 1e4j])
@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e3])
@pytest.mark.parametrize("pattern", ["b c t ->", "b c t -> c", "b c t -> b c"])
def test_complex64_at_offsets(pattern, scale, offset):
    x = torch.randn(2, 3, 40, dtype=C64) * scale + offset
    for part in x.split(1, 1):  # sets of one spread
        assert_near(normalize(part, pattern), part, pattern)


def test_gradients_in_complex64_at_an_offset():
    x = (torch.randn(2, 3, 50, dtype=C128) * 0.1 + (1e4 - 1e3j)).to(C64).requires_grad_()
    wide = x.detach().to(C128).requires_grad_()
    dy = torch.randn(2, 3, 50, dtype=C64)
    (ours,) = torch.autograd.grad(normalize(x, "b c t -> b c"), x, dy)
    (exact,) = torch.autograd.grad(formula(wide, "b c t -> b c"), wide, dy.to(C128))
    assert (ours - exact).abs().max() <= 1e-5 * exact.abs().max()  # the bound of real numbers


@pytest.mark.parametrize("value", [1000.3, 1000.3j, 0.1 - 77.7j])
@pytest.mark.parametrize("eps", [1e-5, 0.0])
def test_equal_values_give_exactly_nothing(value, eps):
    x = torch.full((2, 6, 11), value, dtype=C64).requires_grad_()
    for pattern in ("n (g c) t -> n g", "n c t -> c", "n c t -> n kind[c]"):
        kwargs = (
            {"kind": torch.tensor([0, 1, 1, 0, 1, 0])} if "kind" in pattern else {"g": 2} if "(g" in pattern else {}
        )
        y = normalize(x, pattern, eps=eps, **kwargs)
        assert not y.any()
        assert torch.autograd.grad(y.real.sum(), x)[0].isfinite().all()
    assert not normalize(x, "n c t -> n c", cumulative="t").any()
    bias = torch.randn(6, dtype=C64)
    assert torch.equal(normalize(x, "n c t -> n c", bias=bias, affine="c"), bias[:, None].expand(2, 6, 11))


# --- sets apart ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [NAN, complex(0, NAN), complex(INF, 1), complex(1, INF)])
@pytest.mark.parametrize("dtype", [C64, C128])
def test_one_bad_set_leaves_the_others_alone(bad, dtype):
    x, ids = torch.randn(3, 4, 5, dtype=dtype), torch.tensor([0, 1, 0, 2])
    z = x.clone()
    z[1, 1, 3] = bad
    for pattern, kwargs, inside in (
        ("n c t -> n c", {}, (1, 1)),
        ("n c t -> c", {}, (slice(None), 1)),
        ("n c t -> kind[c]", {"kind": ids}, (slice(None), 1)),
    ):
        results = []
        for t in (x, z):
            t = t.clone().requires_grad_()
            y = normalize(t, pattern, **kwargs)
            results.append((y, torch.autograd.grad(y.real.pow(3).sum() + y.imag.sum(), t)[0]))
        others = torch.ones(3, 4, 5, dtype=torch.bool)
        others[inside] = False
        for a, b in zip(*results, strict=True):
            assert torch.equal(a[others], b[others])
            assert b[~others].isnan().any()


@pytest.mark.parametrize("pattern", ["b c t, b t -> b c", "b c t, b t -> c", "b (g c) t, b t -> b g"])
def test_padding_may_hold_anything(pattern):
    x, mask = torch.randn(2, 4, 7, dtype=C64), torch.arange(7) < torch.tensor([[5], [7]])
    kwargs = {"sizes": {"g": 2}} if "(g" in pattern else {}
    weight = torch.randn(4, dtype=C64, requires_grad=True)
    results = []
    for padding in (0.0, complex(NAN, 1), complex(1, INF)):
        z = x.where(mask[:, None], torch.tensor(padding, dtype=C64)).requires_grad_()
        y = normalize(z, pattern, mask, weight=weight, affine="c" if "(g" not in pattern else "(g c)", **kwargs)
        results.append([y, *torch.autograd.grad(y.real.pow(3).sum() + y.imag.sum(), (z, weight))])
    assert not results[0][0][0, :, 5:].any()
    assert not results[0][1][0, :, 5:].any()
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    if pattern.endswith("b c"):  # and be as much as it likes
        alone = normalize(x[:1, :, :5], "b c t -> b c") * weight[:, None]
        torch.testing.assert_close(results[0][0][:1, :, :5], alone, rtol=1e-5, atol=1e-6)


def test_empty_sets_and_nothing_at_all():
    x = torch.randn(2, 3, 4, dtype=C64, requires_grad=True)
    y = normalize(x, "b c t, b t -> b", torch.zeros(2, 4, dtype=torch.bool))
    assert not y.any()
    assert not torch.autograd.grad(y.real.sum(), x)[0].any()
    for shape in ((0, 3, 4), (2, 3, 0)):
        x = torch.randn(shape, dtype=C64, requires_grad=True)
        y = normalize(x, "b c t -> b c")
        assert y.shape == shape and y.dtype == C64
        assert torch.autograd.grad(y.real.sum(), x)[0].shape == shape
    m = moments(torch.randn(2, 3, 0, dtype=C64), "b c t -> b c")
    assert m.count.dtype == torch.int64 and not m.count.any() and not m.mean.any() and m.mean.dtype == C64


# --- memory ----------------------------------------------------------------------------------------------------------


def layouts():
    x = torch.randn(2, 6, 4, 5, dtype=C64)
    yield "plain", x
    yield "channels_last", x.contiguous(memory_format=torch.channels_last)
    yield "transposed", torch.randn(5, 4, 6, 2, dtype=C64).permute(3, 2, 1, 0)
    yield "strided", torch.randn(2, 6, 8, 5, dtype=C64)[:, :, ::2]
    yield "broadcast", torch.randn(2, 6, 1, 5, dtype=C64).expand(2, 6, 4, 5)
    yield "of real and imaginary part apart", torch.complex(x.real.clone(), x.imag.clone()).mT.contiguous().mT


@pytest.mark.parametrize(("kind", "x"), list(layouts()), ids=[kind for kind, _ in layouts()])
def test_memory_format_is_kept(kind, x):
    y = normalize(x, "n (g c) h w -> n g", g=2)
    torch.testing.assert_close(y, formula(x, "n (g c) h w -> n g", sizes={"g": 2}).to(C64), rtol=1e-5, atol=2e-6)
    leaf = x.clone().requires_grad_()  # dense, in the order of x
    z = normalize(leaf, "n (g c) h w -> n g", g=2)
    assert z.stride() == leaf.stride()
    if kind not in ("strided", "broadcast"):
        assert y.stride() == x.stride()
    (dx,) = torch.autograd.grad(z.real.pow(3).sum(), leaf)
    assert dx.stride() == leaf.stride()


def test_spectra_of_torch_stft():
    """Frequencies lie beside one another in memory, frames apart."""
    signal = torch.randn(3, 800)
    spectrum = torch.stft(signal, 64, 16, window=torch.hann_window(64), return_complex=True)
    assert not spectrum.is_contiguous()
    band = Partition.from_sizes([3, 10, 20])
    y = normalize(spectrum, "n f t -> n band[f]", band=band)
    assert y.stride() == spectrum.stride()
    start = 0
    for size in (3, 10, 20):
        part = spectrum[:, start : start + size].to(C128)
        away = part - part.mean((1, 2), keepdim=True)
        expected = away / (away.abs().square().mean((1, 2), keepdim=True) + 1e-5).sqrt()
        torch.testing.assert_close(y[:, start : start + size], expected.to(C64), rtol=1e-5, atol=5e-6)
        start += size


def test_conjugates_and_lazy_minus_signs():
    x = torch.randn(2, 3, 5, dtype=C128)
    w, b = torch.randn(3, dtype=C128), torch.randn(3, dtype=C128)
    y = normalize(x, "n c t -> n c", weight=w, bias=b, affine="c")
    assert x.conj().is_conj() and torch._neg_view(x).is_neg()
    turned = normalize(x.conj(), "n c t -> n c", weight=w.conj(), bias=b.conj(), affine="c")
    torch.testing.assert_close(turned, y.conj().resolve_conj(), **CLOSE)
    minus = normalize(torch._neg_view(x), "n c t -> n c")
    torch.testing.assert_close(minus, -normalize(x, "n c t -> n c"), **CLOSE)
    both = normalize(torch._neg_view(x.conj()), "n c t -> n c")
    torch.testing.assert_close(both, -normalize(x, "n c t -> n c").conj().resolve_conj(), **CLOSE)
    part = x.conj().imag  # real, with a lazy minus sign
    assert part.is_neg()
    torch.testing.assert_close(normalize(part, "n c t -> n c"), normalize(-x.imag, "n c t -> n c"), **CLOSE)
    leaf = x.clone().requires_grad_()
    grads = [torch.autograd.grad(f(normalize(g(leaf), "n c t -> n c")).real.pow(3).sum(), leaf)[0]
             for f, g in ((torch.conj, torch.conj), (lambda t: t, lambda t: t))]  # fmt: skip
    torch.testing.assert_close(*grads, **CLOSE)


def test_x_is_not_modified():
    x = torch.randn(2, 3, 5, dtype=C64)
    kept = x.clone()
    normalize(x, "n c t -> n c")
    normalize(x.conj(), "n c t -> n c", cumulative="t")
    assert torch.equal(x, kept)


# --- derivatives -----------------------------------------------------------------------------------------------------


@some
def test_gradcheck_of_two_orders(case):
    x, kwargs = arguments(case, requires_grad=True)
    names = [name for name in ("mask", "weight", "bias") if name in kwargs and kwargs[name].requires_grad]
    rest = {name: value for name, value in kwargs.items() if name not in names}

    def f(x, *tensors):
        return normalize(x, case.pattern, **rest, **dict(zip(names, tensors, strict=True)))

    leaves = (x, *(kwargs[name] for name in names))
    assert torch.autograd.gradcheck(f, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(f, leaves, fast_mode=True)


@some
def test_jvp_and_vmap(case):
    x, kwargs = arguments(case)
    tangent = torch.randn_like(x)

    def ours(x):
        return normalize(x, case.pattern, **kwargs)

    _, expected = torch.func.jvp(lambda x: formula(x, case.pattern, **kwargs), (x,), (tangent,))
    _, dy = torch.func.jvp(ours, (x,), (tangent,))
    torch.testing.assert_close(dy, expected, rtol=1e-8, atol=1e-8)
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(ours(forward_ad.make_dual(x, tangent))).tangent
    torch.testing.assert_close(dual, expected, rtol=1e-8, atol=1e-8)
    assert case.name == "zero_rank" or expected.abs().max() > 1e-3
    xs = torch.stack([x, x * 2 + 1j, x.conj()])
    torch.testing.assert_close(torch.func.vmap(ours)(xs), torch.stack([ours(x) for x in xs]), **CLOSE)


def test_gradients_of_samples():
    norm = Norm("n (g c) t -> n g", affine="(g c)", g=2, c=2, dtype=torch.float64)
    nn.init.normal_(norm.weight)
    params, xs = dict(norm.named_parameters()), torch.randn(5, 1, 4, 3, dtype=C128)

    def loss(params, x):
        y = torch.func.functional_call(norm, params, (x,))
        return (y.real.pow(3) + y.imag).sum()

    grads = torch.func.vmap(torch.func.grad(loss), (None, 0))(params, xs)
    for i, x in enumerate(xs):
        y = formula(x, "n (g c) t -> n g", sizes={"g": 2}, weight=norm.weight, bias=norm.bias, affine="(g c)")
        alone = torch.autograd.grad((y.real.pow(3) + y.imag).sum(), list(norm.parameters()))
        for name, b in zip(params, alone, strict=True):
            torch.testing.assert_close(grads[name][i], b, rtol=1e-9, atol=1e-9)


# --- moments ---------------------------------------------------------------------------------------------------------


def direct(x, dim):
    """Mean, and sum of |x - mean|^2."""
    mean = x.mean(dim)
    return mean, (x - x.mean(dim, keepdim=True)).abs().square().sum(dim)


def test_moments_merge_coarsen_cumulate_and_move():
    x = torch.randn(4, 3, 10, dtype=C128) + (5 - 2j)
    m = moments(x, "n c t -> n c")
    assert m.count.dtype == torch.int64 and m.mean.dtype == C128 and m.m2.dtype == torch.float64
    mean, m2 = direct(x, 2)
    torch.testing.assert_close(m.mean, mean, **CLOSE)
    torch.testing.assert_close(m.m2, m2, **CLOSE)
    torch.testing.assert_close(m.var, m2 / 10, **CLOSE)
    torch.testing.assert_close(m.unbiased_var()[0], m2 / 9, **CLOSE)
    halves = moments(x[..., :3], "n c t -> n c").merge(moments(x[..., 3:], "n c t -> n c"))
    coarse, kinds = m.coarsen("n c -> c"), m.coarsen("n c -> kind[c]", kind=Partition(torch.tensor([1, 0, 1])))
    together = (x.movedim(1, 0).flatten(1), torch.cat([x[:, 0], x[:, 2]]).flatten())
    for ours, (mean, m2) in (
        (halves, direct(x, 2)),
        (coarse, direct(together[0], 1)),
        (Moments(*(t[1] for t in (kinds.count, kinds.mean, kinds.m2))), direct(together[1], 0)),
    ):
        torch.testing.assert_close(ours.mean, mean, **CLOSE)
        torch.testing.assert_close(ours.m2, m2, **CLOSE)
    until = moments(x, "n c t -> n c t").cumulative()
    for end in range(1, 11):
        mean, m2 = direct(x[..., :end], 2)
        torch.testing.assert_close(until.mean[..., end - 1], mean, **CLOSE)
        torch.testing.assert_close(until.m2[..., end - 1], m2, **CLOSE)
    for share in (0.0, 0.3, 1.0):
        about = m.about(share)
        centre = direct(x, 2)[0] * share
        torch.testing.assert_close(about.m2, (x - centre[..., None]).abs().square().sum(2), **CLOSE)
        expected = (x - centre[..., None]) / (
            (x - centre[..., None]).abs().square().mean(2, keepdim=True) + 1e-5
        ).sqrt()
        torch.testing.assert_close(normalize(x, "n c t -> n c", moments=about), expected, **CLOSE)
    torch.testing.assert_close(m.about_zero(), x.abs().square().sum(2), **CLOSE)


def test_moments_of_weights_and_masks():
    x, w = torch.randn(2, 3, 6, dtype=C128), torch.rand(2, 6, dtype=torch.float64)
    w[0, 2] = 0
    m, total = moments(x, "b c t, b t -> b c", w), w.sum(1)[:, None]
    mean = (x * w[:, None]).sum(2) / total
    torch.testing.assert_close(m.count, total.expand(2, 3), **CLOSE)
    torch.testing.assert_close(m.mean, mean, **CLOSE)
    torch.testing.assert_close(m.m2, ((x - mean[..., None]).abs().square() * w[:, None]).sum(2), **CLOSE)
    kept = moments(x, "b c t, b t -> b c", w > 0)
    mean, m2 = direct(x[0, :, w[0] > 0], 1)
    torch.testing.assert_close(kept.mean[0], mean, **CLOSE)
    torch.testing.assert_close(kept.m2[0], m2, **CLOSE)


@pytest.mark.parametrize("options", [{}, {"center": False}, {"scale": False}])
def test_given_moments_are_as_good_as_ones_own(options):
    x = torch.randn(2, 3, 7, dtype=C128) + (2 + 1j)
    w, b = torch.randn(3, dtype=C128), torch.randn(3, dtype=torch.float64)
    m = moments(x, "b c t -> b c")
    args = {"weight": w, "bias": b, "affine": "c", **options}
    torch.testing.assert_close(
        normalize(x, "b c t -> b c", moments=m, **args), formula(x, "b c t -> b c", **args), **CLOSE
    )


def test_gradients_flow_through_moments():
    x = torch.randn(2, 3, 7, dtype=C128, requires_grad=True)
    for options in ({}, {"center": False}):
        y = normalize(x, "b c t -> c", moments=moments(x, "b c t -> c"), **options)
        dy = torch.randn_like(y)
        (ours,) = torch.autograd.grad(y, x, dy)
        (theirs,) = torch.autograd.grad(formula(x, "b c t -> c", **options), x, dy)
        torch.testing.assert_close(ours, theirs, **CLOSE)
    m = moments(x, "b c t -> c")
    (ours,) = torch.autograd.grad(m.m2.sum() + m.mean.abs().sum(), x)
    mean, m2 = direct(x.movedim(1, 0).flatten(1), 1)
    (theirs,) = torch.autograd.grad(m2.sum() + mean.abs().sum(), x)
    torch.testing.assert_close(ours, theirs, **CLOSE)


@pytest.mark.parametrize("center", [True, False])
def test_cumulative_and_in_steps(center):
    x = (torch.randn(2, 3, 9, dtype=C128) + (3 - 1j)).requires_grad_()
    norm = Norm("b c t -> b c", cumulative="t", center=center)
    ends = range(1, 10)
    exact = torch.stack([formula(x[..., :end], "b c t -> b c", center=center)[..., -1] for end in ends], -1)
    dy = torch.randn_like(exact)
    (theirs,) = torch.autograd.grad(exact, x, dy)
    ys, state = [], None
    for part in x.split([4, 0, 1, 4], -1):
        y, state = norm.step(part, state)
        ys.append(y)
    assert [t.dtype for t in state] == [torch.int64, C128, torch.float64, C128]
    for y in (norm(x), torch.cat(ys, -1)):
        torch.testing.assert_close(y, exact, **CLOSE)
        torch.testing.assert_close(torch.autograd.grad(y, x, dy)[0], theirs, rtol=1e-8, atol=1e-8)


# --- the layer -------------------------------------------------------------------------------------------------------


def test_a_layer_with_a_mask_labels_and_a_condition():
    norm = Norm("b c t, b t -> b kind[c]", kind=2, conditional="b c")
    x, mask, kind = torch.randn(2, 4, 6, dtype=C128), torch.rand(2, 6) < 0.7, torch.tensor([0, 1, 1, 0])
    w, b = torch.randn(2, 4, dtype=C128), torch.randn(2, 4, dtype=C128)
    with given(mask=mask, kind=kind):
        y, m = norm(x, weight=w, bias=b, return_moments=True)
    plain = formula(x, "b c t, b t -> b kind[c]", mask, labels={"kind": kind})
    exact = plain * w[..., None] + b[..., None]
    torch.testing.assert_close(y, exact * mask[:, None], **CLOSE)
    own = moments(x, "b c t, b t -> b kind[c]", mask, kind=Partition(kind))
    for name in ("count", "mean", "m2"):
        torch.testing.assert_close(getattr(m, name), getattr(own, name), **CLOSE)
    again = norm(x, mask, kind=kind, weight=w, bias=b, moments=m)
    torch.testing.assert_close(again, y, **CLOSE)
    other = copy.deepcopy(norm)
    assert torch.equal(other(x, mask, kind=kind, weight=w, bias=b), y)


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
def test_a_layer_whose_parameters_are_complex():
    norm = Norm("b c t -> b c", affine="c", c=3).to(C64)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(2, 3, 8, dtype=C64)
    exact = formula(x, "b c t -> b c", weight=norm.weight.to(C128), bias=norm.bias.to(C128), affine="c")
    y = norm(x)
    torch.testing.assert_close(y, exact.to(C64), rtol=1e-5, atol=5e-6)
    assert all(g.dtype == C64 for g in torch.autograd.grad(y.abs().sum(), list(norm.parameters())))
    with pytest.raises(SpecError, match="weight is a floating tensor"):
        norm(x.real)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_leaves_it_alone(dtype):
    norm, x = Norm("b c t -> b c", affine="c", c=3), torch.randn(2, 3, 8, dtype=C64, requires_grad=True)
    expected = norm(x)
    with torch.autocast("cpu", dtype=dtype):
        y = norm(x)
    assert y.dtype == C64
    assert torch.equal(y, expected)
    (a,), (b,) = (torch.autograd.grad(t.real.pow(3).sum(), x) for t in (y, expected))
    assert torch.equal(a, b)


def test_exported_with_a_dynamic_batch():
    norm = Norm("b (g c) t, b t -> b g", g=2, c=2, affine="(g c)", dtype=torch.float64)
    nn.init.normal_(norm.weight)
    batch = torch.export.Dim("batch", min=2)
    example = torch.randn(3, 4, 5, dtype=C128), torch.rand(3, 5) < 0.7
    program = torch.export.export(norm, example, dynamic_shapes={"x": {0: batch}, "mask": {0: batch}})
    x, mask = torch.randn(7, 4, 5, dtype=C128), torch.rand(7, 5) < 0.7
    torch.testing.assert_close(program.module()(x, mask), norm(x, mask), **CLOSE)


def test_the_same_alone_and_in_a_batch():
    """A result depends on its set only."""
    x = torch.randn(5, 3, 40, dtype=C64) + 10
    y = normalize(x, "b c t -> b c")
    for i in range(5):
        torch.testing.assert_close(normalize(x[i : i + 1], "b c t -> b c")[0], y[i], rtol=4e-7, atol=4e-7)


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["relu", "silu", "gelu"])
def test_activations_are_of_real_numbers(activation):
    x = torch.randn(2, 3, dtype=C64)
    with pytest.raises(SpecError, match=f"activations are of real numbers[^^]*received: activation='{activation}'"):
        normalize(x, "n c -> n", activation=activation)
    with pytest.raises(SpecError, match="activations are of real numbers"):
        normalize(x, "n c -> n", activation=activation, moments=moments(x, "n c -> n"))
    assert moments(x, "n c -> n").mean.dtype == C64


def test_errors():
    x = torch.randn(2, 3, dtype=C64)
    with pytest.raises(SpecError, match="a mask is a bool tensor"):
        normalize(x, "n c, n c -> n", torch.ones(2, 3, dtype=C64))
    with pytest.raises(SpecError, match="weight is a floating tensor"):
        normalize(x.real, "n c -> n", weight=torch.ones(3, dtype=C64), affine="c")
    with pytest.raises(SpecError, match="x is a floating or complex tensor"):
        normalize(torch.ones(2, 3, dtype=torch.int64), "n c -> n")


def test_a_learned_and_a_given_stage():
    norm = Norm("b c t -> b c", affine="c", c=3, conditional="b c", dtype=torch.float64)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x, w, b = (torch.randn(shape, dtype=torch.complex128) for shape in ((2, 3, 5), (2, 3), (2, 3)))
    d = x - x.mean(-1, keepdim=True)
    plain = d / (d.abs().square().mean(-1, keepdim=True) + 1e-5).sqrt()
    expected = (plain * norm.weight[:, None] + norm.bias[:, None]) * w[..., None] + b[..., None]
    torch.testing.assert_close(norm(x, weight=w, bias=b), expected, rtol=1e-12, atol=1e-12)


def test_moments_of_the_other_kind():
    x = torch.randn(4, 3, dtype=torch.complex128)
    real = moments(x.real, "n c -> c")
    d = x - real.mean
    torch.testing.assert_close(normalize(x, "n c -> c", moments=real), d / (real.var + 1e-5).sqrt())
    with pytest.raises(SpecError, match="of complex numbers are for complex x"):
        normalize(x.real, "n c -> c", moments=moments(x, "n c -> c"))

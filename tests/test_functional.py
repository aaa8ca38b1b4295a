"""`normalize` and `moments` against the oracle: values, gradients, precision, layouts, dtypes, empty and extreme inputs."""

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

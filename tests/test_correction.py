"""`correction`: the variance is M2 / (count - correction), as in `torch.var`."""

import copy

import pytest
import torch

from flexnorm import Norm, ShapeError, SpecError, explain, moments, normalize
from flexnorm.mixtures import Mixture

PATTERN = "n c t -> n c"


def by_hand(x, correction, eps=1e-5):
    """Sets along the last axis, in plain operations."""
    rest = x - x.mean(-1, keepdim=True)
    freedom = x.shape[-1] - correction
    if freedom <= 0:
        return rest * 0
    return rest / (rest.square().sum(-1, keepdim=True) / freedom + eps).sqrt()


def close(got, expected, scale=1.0):
    """Some 1e2 roundings of float64, of what is largest."""
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-11 * scale * float(expected.abs().max() + 1e-300))


@pytest.mark.parametrize("correction", [0, 1, 2, 1.5, 5, 6, 9])
@pytest.mark.parametrize(("std", "offset"), [(1.0, 0.0), (1e-2, 0.0), (0.1, 1e3)])
def test_it_is_the_formula_with_gradients(correction, std, offset):
    torch.manual_seed(0)
    x = (torch.randn(3, 4, 6, dtype=torch.float64) * std + offset).requires_grad_()
    weight, dy = torch.randn(4, dtype=torch.float64, requires_grad=True), torch.randn(3, 4, 6, dtype=torch.float64)
    y = normalize(x, PATTERN, correction=correction, weight=weight, affine="c")
    z = by_hand(x, correction) * weight[:, None]
    size = 1 + offset / std
    close(y.detach(), z.detach(), size)
    for a, b in zip(*(torch.autograd.grad(t, (x, weight), dy) for t in (y, z)), strict=True):
        close(a, b, size**2)


def test_it_is_torchs():
    x = torch.randn(5, 8)
    torch.testing.assert_close(
        normalize(x, "n c -> n", correction=1, eps=0.0), (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True)
    )


def test_masks_and_labels_count_what_is_valid():
    torch.manual_seed(0)
    x, dy = torch.randn(3, 4, 6, dtype=torch.float64, requires_grad=True), torch.randn(3, 4, 6, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 0, 1, 1], [1, 0, 0, 0, 0, 0], [0] * 6]).bool()
    y = normalize(x, "n c t, n t -> n c", mask, correction=1)
    parts = [by_hand(x[n][:, mask[n]], 1) for n in range(3)]
    zeros, places = torch.zeros(4, 6, dtype=x.dtype), [valid.nonzero()[:, 0] for valid in mask]
    expected = torch.stack([zeros.index_copy(1, at, part) for at, part in zip(places, parts, strict=True)])
    close(y.detach(), expected.detach())
    close(torch.autograd.grad(y, x, dy)[0], torch.autograd.grad(expected, x, dy)[0])
    ids = torch.tensor([0, 0, 1, 2, 2, 2])
    rows = torch.randn(6, 3, dtype=torch.float64)
    y = normalize(rows, "v c -> graph[v] c", graph=ids, correction=1)
    close(y, torch.cat([by_hand(rows[ids == k].mT, 1).mT for k in range(3)]))
    assert not y[2].any()  # one element


def test_given_moments_are_corrected_by_their_count():
    x = torch.randn(3, 4, 6, dtype=torch.float64)
    y = normalize(x, PATTERN, moments=moments(x, PATTERN), correction=1)
    close(y, by_hand(x, 1))


def test_derivatives_of_second_order_and_compiled():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: normalize(x, PATTERN, correction=1), x)
    f = torch.compile(lambda x: normalize(x, PATTERN, correction=1), fullgraph=True, backend="aot_eager")
    norm = Norm(PATTERN, correction=1)
    for g in (f, torch.compile(norm, fullgraph=True, backend="aot_eager"), norm):
        y = g(x)
        close(y.detach(), by_hand(x, 1).detach())
        (dx,) = torch.autograd.grad(y.sin().sum(), x)
        close(dx, torch.autograd.grad(by_hand(x, 1).sin().sum(), x)[0], 10)
    found = torch.func.grad(lambda x: normalize(x, PATTERN, correction=1).sin().sum())(x.detach())
    close(found, torch.autograd.grad(by_hand(x, 1).sin().sum(), x)[0], 10)


def test_complex_numbers_have_one_variance():
    x = torch.randn(3, 9, dtype=torch.complex128)
    rest = x - x.mean(1, keepdim=True)
    expected = rest / (rest.abs().square().sum(1, keepdim=True) / 8 + 1e-5).sqrt()
    torch.testing.assert_close(normalize(x, "n c -> n", correction=1), expected)


def test_running_statistics_are_unbiased_whatever_it_is():
    x = torch.randn(8, 3) * 2 + 1
    plain, norm = (Norm("n c -> c", c=3, track_running_stats=True, correction=c) for c in (0, 1))
    y, z = plain(x), norm(x)
    torch.testing.assert_close(z, (x - x.mean(0)) / (x.var(0) + 1e-5).sqrt(), rtol=1e-5, atol=1e-5)
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(norm.get_buffer(name), buffer)
    torch.testing.assert_close(norm.eval()(x), plain.eval()(x))
    assert (y - z).abs().max() > 1e-3
    out, seen = copy.deepcopy(norm).train()(x, return_moments=True)
    torch.testing.assert_close(out, z)
    torch.testing.assert_close(seen.var, x.var(0, correction=0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype):
    x = torch.randn(4, 64).to(dtype)
    y = normalize(x, "n c -> n", correction=1)
    assert y.dtype == dtype
    torch.testing.assert_close(y, normalize(x.float(), "n c -> n", correction=1).to(dtype))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda x: normalize(x, PATTERN, correction=-1), "a number, 0 or more"),
        (lambda x: normalize(x, PATTERN, correction=float("nan")), "a number, 0 or more"),
        (lambda x: normalize(x, PATTERN, correction=True), "a number, 0 or more"),
        (lambda x: normalize(x, PATTERN, correction=1, center=False), "about the mean"),
        (lambda x: normalize(x, PATTERN, correction=1, scale=False), "about the mean"),
        (lambda x: normalize(x, "n c t, n t -> n", torch.rand(3, 6), correction=1), "weights do not count"),
        (lambda x: Norm(PATTERN, correction="1"), "a number, 0 or more"),
        (lambda x: Mixture(["n c t -> n c", "n c t -> n"], correction=1), "no option of it"),
    ],
)
def test_what_has_no_meaning_is_refused(call, said):
    with pytest.raises((SpecError, ShapeError), match=said):
        call(torch.randn(3, 4, 6))


def test_it_is_shown_and_explained():
    norm = Norm("n (g c) t -> n g", g=2, c=3, correction=1)
    assert "correction=1" in repr(norm)
    said = explain(norm, (2, 6, 5))
    assert "M2 / (count - 1)" in str(said)
    assert not said.names  # it is no GroupNorm

"""`Moments`: merging in any order and grouping gives the moments of the whole."""

import copy
import math
import pickle

import pytest
import torch
from torch.utils import _pytree as pytree

from flexnorm import Moments, Partition, ShapeError, SpecError, moments, normalize

F32 = torch.finfo(torch.float32).eps


def close(ours, theirs, ulps=16):
    """Equal counts; mean and M2 of sums of a few thousand terms to some roundings of float32."""
    assert torch.equal(ours.count, theirs.count)
    torch.testing.assert_close(ours.mean, theirs.mean, rtol=ulps * F32, atol=ulps * F32)
    torch.testing.assert_close(ours.m2, theirs.m2, rtol=ulps * F32, atol=ulps * F32)


@pytest.mark.parametrize(("scale", "offset"), [(1, 0), (1, 1e3), (0.1, 1e4), (1e3, 1e6), (1e-3, 0)])
@pytest.mark.parametrize("parts", [[100], [1, 99], [50, 50], [3, 0, 27, 70], [10] * 10])
def test_merge_in_parts_equals_the_whole(parts, scale, offset):
    x = torch.randn(100, 4, 5, generator=torch.Generator().manual_seed(0)) * scale + offset
    merged = None
    for part in x.split(parts):
        m = moments(part, "t n c -> n c")
        merged = m if merged is None else merged.merge(m)
    wide = x.double()
    assert merged.count.tolist() == [[100] * 5] * 4
    mean, low = merged.mean.double(), merged.low.double()
    assert ((mean + low - wide.mean(0)).abs() <= 8 * F32 * scale + F32**2 * offset).all()  # twice the precision
    torch.testing.assert_close(merged.m2.double(), wide.var(0, correction=0) * 100, rtol=16 * F32, atol=0)


def test_merge_is_symmetric_and_associative():
    a, b, c = (moments(torch.randn(n, 3) + 1e3 * n, "n c -> c") for n in (5, 1, 40))
    close(a.merge(b).merge(c), c.merge(b.merge(a)))


def test_merge_with_nothing_is_nothing():
    m = moments(torch.randn(5, 3), "n c -> c")
    empty = moments(torch.randn(0, 3), "n c -> c")
    for merged in (m.merge(empty), empty.merge(m)):
        assert torch.equal(merged.mean, m.mean)
        assert torch.equal(merged.m2, m.m2)
        assert torch.equal(merged.count, m.count)


def test_merge_of_weights():
    x, w = torch.randn(10, 3), torch.rand(10)
    whole = moments(x, "n c, n -> c", w)
    halves = moments(x[:4], "n c, n -> c", w[:4]).merge(moments(x[4:], "n c, n -> c", w[4:]))
    torch.testing.assert_close(halves.count, whole.count)
    close(Moments(whole.count, halves.mean, halves.m2), whole)


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize(
    ("fine", "coarser", "coarse", "sizes", "labels"),
    [
        ("n c h -> n c", "n c -> n", "n c h -> n", {}, {}),
        ("n c h -> n c", "n c ->", "n c h ->", {}, {}),
        ("n c h -> n c", "n (g c) -> g", "n (g c) h -> g", {"g": 2}, {}),
        ("n c h -> c n", "c n -> kind[c] n", "n c h -> kind[c] n", {}, {"kind": Partition.from_sizes([1, 3])}),
        ("n c h -> n c", "a b -> (a b)", "n c h -> (n c)", {}, {}),
    ],
)
def test_coarsen(fine, coarser, coarse, sizes, labels, offset):
    x = torch.randn(3, 4, 50, generator=torch.Generator().manual_seed(0)) + offset
    ours = moments(x, fine).coarsen(coarser, sizes=sizes, **labels)
    close(ours, moments(x, coarse, sizes=sizes, labels=labels))


def test_unequal_counts_are_weighed():
    """flax averages the means of devices without their counts."""
    a, b = moments(torch.zeros(1, 1), "n c -> c"), moments(torch.full((3, 1), 4.0), "n c -> c")
    assert a.merge(b).mean.item() == 3.0
    assert a.merge(b).m2.item() == 12.0


def test_equal_values_stay_exact_through_merges():
    m = moments(torch.full((7, 3), 1000.3), "n c -> c")
    for _ in range(5):
        m = m.merge(moments(torch.full((3, 3), 1000.3), "n c -> c"))
    assert (m.m2 == 0).all()
    assert (normalize(torch.full((2, 3), 1000.3), "n c -> c", moments=m, eps=0) == 0).all()


def test_gradients_flow_through_merge_and_coarsen():
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)

    def f(x):
        m = moments(x[:2], "n c -> n c").coarsen("n c -> c").merge(moments(x[2:], "n c -> c"))
        return m.mean, m.m2, normalize(x, "n c -> c", moments=m)

    assert torch.autograd.gradcheck(f, x)
    assert torch.autograd.gradgradcheck(f, x)
    (ours,) = torch.autograd.grad(f(x)[2], x, torch.ones_like(x).cumsum(0))
    (whole,) = torch.autograd.grad(normalize(x, "n c -> c"), x, torch.ones_like(x).cumsum(0))
    torch.testing.assert_close(ours, whole, rtol=1e-10, atol=1e-10)


def test_tiles_of_an_image_give_the_image():
    image = torch.randn(1, 3, 64, 64) * 5 + 100
    tiles = [image[:, :, i : i + 16] for i in range(0, 64, 16)]
    m = moments(tiles[0], "n c h w -> n c")
    for tile in tiles[1:]:
        m = m.merge(moments(tile, "n c h w -> n c"))
    whole = normalize(image, "n c h w -> n c")
    assembled = torch.cat([normalize(tile, "n c h w -> n c", moments=m) for tile in tiles], 2)
    torch.testing.assert_close(assembled, whole, rtol=0, atol=4e-6)


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_about_a_share_of_the_mean(offset):
    """The center is a share of the mean, and M2 is about it: PyG's GraphNorm, by its formula in float64."""
    x = torch.randn(6, 50, generator=torch.Generator().manual_seed(0)) + offset
    share = torch.tensor([0.0, 0.5, 1.0, 1.0, -1.0, 2.0])
    m = moments(x, "n c -> n").about(share)
    wide = x.double()
    center = wide.mean(1) * share.double()
    m2 = (wide - center[:, None]).square().sum(1)
    eps = torch.finfo(torch.float32).eps
    assert ((m.mean.double() + m.low.double() - center).abs() <= 4 * eps * center.abs() + 16 * eps).all()
    assert ((m.m2.double() - m2).abs() <= 16 * eps * m2).all()
    y = normalize(x, "n c -> n", moments=m)
    expected = (wide - center[:, None]) / (m2 / 50 + 1e-5).sqrt()[:, None]
    assert ((y - expected).abs() <= 8 * eps * (1 + expected.abs()) * (1 + offset)).all()
    same = torch.full((1, 5), 1000.3)
    assert not normalize(same, "n c -> n", moments=moments(same, "n c -> n").about(1.0)).any()


@pytest.mark.parametrize("pattern", ["n c -> n", "n c -> c", "n c, n -> c", "n c -> kind[n] c"])
def test_gradients_of_moments(pattern):
    """Of the kernels, against autograd through the composition in float64; and once more."""
    x = torch.randn(12, 10, generator=torch.Generator().manual_seed(0)) * 2 + 50
    mask = torch.arange(12) % 3 > 0 if "," in pattern else None
    names = {"kind": Partition(torch.arange(12) % 4)} if "kind" in pattern else {}

    def f(x, a, b):
        m = moments(x, pattern, mask, **names)
        return (m.mean * a + m.m2 * b).sum()

    like = moments(x, pattern, mask, **names).mean
    a, b = torch.randn(2, *like.shape, generator=torch.Generator().manual_seed(1))
    leaf = x.clone().requires_grad_()
    (ours,) = torch.autograd.grad(f(leaf, a, b), leaf)
    expected = torch.func.grad(f)(x.double(), a.double(), b.double())  # seen through: by the composition
    assert (ours - expected).abs().max() <= 32 * torch.finfo(torch.float32).eps * expected.abs().max()
    if mask is not None:
        assert not ours[~mask].any()
    wide = x.double().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: f(x, a.double(), b.double()), wide)


def test_a_value():
    m = moments(torch.randn(5, 3), "n c -> c")
    assert math.isclose(m.var[0].item(), (m.m2 / 5)[0].item())
    for other in (pickle.loads(pickle.dumps(m)), copy.deepcopy(m), pytree.tree_map(lambda t: t, m)):
        assert torch.equal(other.mean, m.mean)
    assert len(pytree.tree_leaves(m)) == 4
    assert moments(torch.randn(0, 3), "n c -> c").var.tolist() == [0, 0, 0]


def test_an_empty_part_changes_nothing_whatever_its_mean():
    """The mean of nothing is often NaN."""
    m = Moments(torch.tensor([2, 0]), torch.tensor([3.0, float("nan")]), torch.tensor([8.0, float("nan")]))
    whole = m.coarsen("part -> ")
    assert (whole.count.item(), whole.mean.item(), whole.m2.item()) == (2, 3, 8)


def test_a_pytree_without_the_low_part():
    m = Moments(torch.ones(2), torch.zeros(2), torch.ones(2))
    assert len(pytree.tree_leaves(m)) == 3
    assert pytree.tree_map(lambda t: t + 1, m).low is None


def test_bad_input():
    m = moments(torch.randn(2, 3), "n c -> n")
    with pytest.raises(ShapeError, match=r"\(2,\) and \(3,\)"):
        m.merge(moments(torch.randn(2, 3), "n c -> c"))
    with pytest.raises(SpecError, match="take no mask"):
        m.coarsen("n, n -> ")
    with pytest.raises(SpecError, match=r"kind=Partition\(ids\)"):
        m.coarsen("n -> kind[n]")
    with pytest.raises(SpecError, match="the pattern reads no 'foo'"):
        m.coarsen("n -> ", foo=3)
    with pytest.raises(ShapeError, match="one id at every index"):
        m.coarsen("n -> kind[n]", kind=Partition.from_sizes([5]))
    with pytest.raises(SpecError, match="merge with Moments"):
        m.merge(3)
    with pytest.raises(ShapeError, match="one shape and device"):
        Moments(torch.ones(2), torch.ones(3), torch.ones(3)).coarsen("n -> ")
    with pytest.raises(ShapeError, match="names 2, and"):
        m.coarsen("n c -> n")


def test_weighed_is_what_a_floating_mask_weighs():
    torch.manual_seed(0)
    x, weights = torch.randn(4, 6, 5, dtype=torch.float64) * 3 + 100, torch.rand(6, dtype=torch.float64)
    weights[2] = 0
    weighed = moments(x, "n c t -> n c").weighed(weights).coarsen("n c -> n")
    direct = moments(x, "n c t, c -> n", weights)
    for name in ("count", "mean", "m2"):
        torch.testing.assert_close(getattr(weighed, name), getattr(direct, name), rtol=1e-12, atol=0)

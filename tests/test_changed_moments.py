"""x normalized by what is made of its own moments: one gradient of x for both, whatever the graph between them is.

The reference is autograd through plain operations in float64. Bounds are those of `close`.
"""

import gc
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import flexnorm
from flexnorm import Moments, Norm, moments, normalize
from flexnorm.calls.call import Used
from flexnorm.calls.computing import Bound
from flexnorm.calls.gradients import Statistics
from flexnorm.kernels import cpu

PATTERN, SHAPE = "n c t -> n c", (3, 4, 6)


class Changed(Norm):
    """A norm by what a function makes of the moments of x."""

    def __init__(self, pattern, change, **options):
        super().__init__(pattern, **options)
        self.change = change

    def used(self, call, own):
        changed = self.change(own)
        return Used(changed, changed)


@pytest.fixture
def joined(monkeypatch):
    """How often one pass over x gave the gradients of both, and whether the moments had gradients of their own."""
    seen, dx = [], Statistics._of_partner

    def noting(how, operands, own, gradients, dy, answer):
        seen.append(any(d is not None for d in gradients))
        return dx(how, operands, own, gradients, dy, answer)

    monkeypatch.setattr(Statistics, "_of_partner", noting)
    return Joined(seen)


class Joined:
    """Compares, where there are kernels: plain operations have the gradients of autograd, one for each."""

    def __init__(self, seen):
        self.seen = seen

    def __eq__(self, expected):
        return self.seen == (expected if not isinstance(cpu.library(), str) else [])

    __hash__ = None

    def __bool__(self):
        return bool(self.seen)


def by_hand(x, mask=None):
    """Mean and M2 of every n and c, by plain operations."""
    w = torch.ones_like(x) if mask is None else mask.to(x.dtype)[:, None].expand_as(x)
    n = w.sum(-1)
    mean = (w * x).sum(-1) / n
    return n, mean, (w * (x - mean[..., None]).square()).sum(-1)


def applied(x, n, mean, m2, eps=1e-5):
    return (x - mean[..., None]) / (m2 / n + eps).sqrt()[..., None]


def close(got, expected, scale=1.0):
    """Some 1e2 roundings of float64, of what is largest."""
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-11 * scale * float(expected.abs().max() + 1e-300))


CHANGES = {
    "as they are": lambda n, mean, m2: (n, mean, m2),
    "a share of the mean": lambda n, mean, m2: (n, 0.3 * mean, m2 + n * (0.7 * mean) ** 2),
    "means of the batch": lambda n, mean, m2: (n, mean.mean(0, keepdim=True).expand_as(mean), m2 * 2 + 1),
    "mean alone": lambda n, mean, m2: (n, mean, torch.full_like(m2, 5.0)),
    "variance alone": lambda n, mean, m2: (n, torch.full_like(mean, 0.5), m2 * mean.detach().square()),
    "of one, half": lambda n, mean, m2: (n, mean.detach(), m2),
    "another count": lambda n, mean, m2: (n * 0 + 2.5, mean * 2, m2.sqrt()),
}


@pytest.mark.parametrize("leaf", [True, False])
@pytest.mark.parametrize(("std", "offset"), [(1.0, 0.0), (0.1, 100.0), (100.0, -3.0)])
@pytest.mark.parametrize("change", CHANGES)
def test_gradients_are_those_of_the_formula(change, std, offset, leaf, joined):
    torch.manual_seed(0)
    base = (std * torch.randn(SHAPE, dtype=torch.float64) + offset).requires_grad_()
    x = base if leaf else base * 1.0
    dy = torch.randn(SHAPE, dtype=torch.float64)

    def changed(m):
        return Moments(*CHANGES[change](m.count.to(x.dtype), m.mean, m.m2), m.low if change == "as they are" else None)

    (got,) = torch.autograd.grad(Changed(PATTERN, changed)(x), base, dy, retain_graph=True)
    y = applied(x, *CHANGES[change](*by_hand(x)))
    (expected,) = torch.autograd.grad(y, base, dy)
    close(got, expected, scale=max(1.0, (offset / std) ** 2))
    assert joined == [True]


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_with_a_mask(kind, joined):
    torch.manual_seed(0)
    x = torch.randn(SHAPE, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(3, 6) < 0.7 if kind == "bool" else torch.rand(3, 6, dtype=torch.float64)
    norm = Changed("n c t, n t -> n c", lambda m: Moments(m.count, m.mean * 0.5, m.m2 + 1, m.low * 0.5))
    dy = torch.randn(SHAPE, dtype=torch.float64)
    (got,) = torch.autograd.grad(norm(x, mask), x, dy)
    n, mean, m2 = by_hand(x, mask)
    y = applied(x, n, mean * 0.5, m2 + 1)
    y = y * mask[:, None] if kind == "bool" else y
    close(got, torch.autograd.grad(y, x, dy)[0])
    assert joined == [True]


def test_a_mask_for_the_statistics_alone_goes_its_own_way(joined):
    torch.manual_seed(0)
    x = torch.randn(SHAPE, dtype=torch.float64, requires_grad=True)
    mask, dy = torch.rand(3, 6) < 0.7, torch.randn(SHAPE, dtype=torch.float64)
    m = moments(x, "n c t, n t -> n c", mask)
    (got,) = torch.autograd.grad(normalize(x, PATTERN, moments=m), x, dy)
    close(got, torch.autograd.grad(applied(x, *by_hand(x, mask)), x, dy)[0])
    assert not joined


@pytest.mark.parametrize("side", ["n c -> n", "n c -> c"])
def test_other_sets_go_their_own_way(side, joined):
    torch.manual_seed(0)
    x = torch.randn(SHAPE, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(SHAPE, dtype=torch.float64)
    kept = side.split("-> ")[1]
    y = normalize(x, f"n c t -> {kept}", moments=moments(x, PATTERN).coarsen(side))
    (expected,) = torch.autograd.grad(normalize(x, f"n c t -> {kept}"), x, dy)
    close(torch.autograd.grad(y, x, dy)[0], expected)
    assert not joined


def test_moments_of_another_tensor_go_their_own_way(joined):
    torch.manual_seed(0)
    x, z = torch.randn(2, *SHAPE, dtype=torch.float64).unbind()
    x.requires_grad_(), z.requires_grad_()
    dy = torch.randn(SHAPE, dtype=torch.float64)
    got = torch.autograd.grad(normalize(x, PATTERN, moments=moments(z, PATTERN)), (x, z), dy)
    expected = torch.autograd.grad(applied(x, *by_hand(z)), (x, z), dy)
    for a, b in zip(got, expected, strict=True):
        close(a, b)
    assert not joined


def test_moments_that_serve_twice(joined):
    """In one loss, and each alone: no gradient is counted twice, nor of a pass before."""
    torch.manual_seed(0)
    x = torch.randn(SHAPE, dtype=torch.float64, requires_grad=True)
    factor = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(2, *SHAPE, dtype=torch.float64)
    kept = []

    def noted(m):
        kept.append(m)
        return Moments(m.count, m.mean * factor, m.m2)

    first = Changed(PATTERN, noted)(x)
    second = normalize(x, PATTERN, moments=Moments(kept[0].count, kept[0].mean, kept[0].m2 * factor))
    n, mean, m2 = by_hand(x)
    third, fourth = applied(x, n, mean * factor, m2), applied(x, n, mean, m2 * factor)
    for got, expected, v in (
        ([first, second], [third, fourth], list(dy)),
        ([second], [fourth], [dy[1]]),
        ([first], [third], [dy[0]]),
    ):
        want = torch.autograd.grad(expected, (x, factor), v, retain_graph=True)
        torch.autograd.grad(first, factor, dy[0], retain_graph=True)  # a pass that does not ask for x
        for a, b in zip(torch.autograd.grad(got, (x, factor), v, retain_graph=True), want, strict=True):
            close(a, b)
    assert joined == [True, True]


def test_threads_share_one_graph():
    """Every pass has the gradients of its own loss, because no state lies between the passes."""
    torch.manual_seed(0)
    x = torch.randn(16, 8, 24, dtype=torch.float64, requires_grad=True)
    y = Changed(PATTERN, lambda m: m.about(0.5))(x)
    losses = [y.pow(k + 2).sum() for k in range(4)]
    expected = [torch.autograd.grad(loss, x, retain_graph=True)[0] for loss in losses]
    wrong = []

    def work(k):
        for _ in range(30):
            (found,) = torch.autograd.grad(losses[k], x, retain_graph=True)
            if not torch.equal(found, expected[k]):
                wrong.append(k)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_pass_that_takes_nothing_of_x_leaves_no_memory_behind():
    x = torch.randn(SHAPE, dtype=torch.float64, requires_grad=True)
    norm = Changed(PATTERN, lambda m: m.about(0.5), affine="c", c=4, dtype=torch.float64)
    y = norm(x)
    held = [
        weakref.ref(dy)
        for dy in [torch.randn(SHAPE, dtype=torch.float64)]
        if not torch.autograd.grad(y, norm.weight, dy, retain_graph=True)[0].isnan().any()
    ]
    gc.collect()
    assert held[0]() is None


def test_x_is_used_elsewhere_too_and_has_hooks():
    torch.manual_seed(0)
    base = torch.randn(SHAPE, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(SHAPE, dtype=torch.float64)

    def whole(normal):
        x = base.exp()
        x.register_hook(lambda g: 2 * g)
        return torch.autograd.grad(normal(x) * x.sin(), base, dy)[0]

    got = whole(Changed(PATTERN, lambda m: m.about(0.5)))
    expected = whole(
        lambda x: applied(x, *(lambda n, mean, m2: (n, mean / 2, m2 + n * (mean / 2).square()))(*by_hand(x)))
    )
    close(got, expected)


def test_backward_accumulates_twice_over_one_graph():
    torch.manual_seed(0)
    x = torch.randn(SHAPE, dtype=torch.float64, requires_grad=True)
    y = Changed(PATTERN, lambda m: m.about(0.5))(x)
    y.sin().sum().backward(retain_graph=True)
    once = x.grad.clone()
    y.sin().sum().backward()
    torch.testing.assert_close(x.grad, 2 * once, rtol=0, atol=0)


def test_twice_differentiable():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: normalize(x, PATTERN, moments=moments(x, PATTERN).about(0.5)), x)
    assert torch.autograd.gradgradcheck(Changed(PATTERN, lambda m: m.about(0.5)), x)


def test_with_parameters_and_activation(joined):
    torch.manual_seed(0)
    norm = Changed(PATTERN, lambda m: m.about(0.5), affine="c", c=4, activation="silu", dtype=torch.float64)
    for p in norm.parameters():
        nn.init.normal_(p)
    x, dy = torch.randn(2, *SHAPE, dtype=torch.float64).unbind()
    x.requires_grad_()
    y = norm(x)
    n, mean, m2 = by_hand(x)
    z = applied(x, n, mean / 2, m2 + n * (mean / 2).square()) * norm.weight[:, None] + norm.bias[:, None]
    leaves = (x, *norm.parameters())
    for a, b in zip(
        torch.autograd.grad(y, leaves, dy), torch.autograd.grad(nn.functional.silu(z), leaves, dy), strict=True
    ):
        close(a, b)
    assert joined == [True]


@pytest.mark.parametrize("reentrant", [True, False])
def test_under_activation_checkpointing(reentrant):
    torch.manual_seed(0)
    x = torch.randn(SHAPE, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(SHAPE, dtype=torch.float64)

    def f(x):
        return normalize(x.exp(), PATTERN, moments=moments(x.exp(), PATTERN).about(0.5))

    norm = Changed(PATTERN, lambda m: m.about(0.5))

    def g(x):
        return norm(x.exp())

    for h in (f, g):
        (expected,) = torch.autograd.grad(h(x), x, dy)
        leaf = x.detach().clone().requires_grad_()
        checkpoint(h, leaf, use_reentrant=reentrant).backward(dy)
        close(leaf.grad, expected)


def test_labels(joined):
    torch.manual_seed(0)
    x = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    graph, dy = torch.tensor([0, 2, 2, 0, 1, 2, 0, 2, 1]), torch.randn(9, 4, dtype=torch.float64)
    label = flexnorm.Partition(graph, 3)
    share = torch.rand(4, dtype=torch.float64, requires_grad=True)
    y = Changed("v c -> graph[v] c", lambda m: m.about(share))(x, graph=label)
    rest = torch.empty_like(x)
    parts = []
    for k in range(3):
        rows = x[graph == k] - share * x[graph == k].mean(0)
        parts.append(rows / (rows.square().mean(0) + 1e-5).sqrt())
    order = torch.cat([(graph == k).nonzero().flatten() for k in range(3)])
    expected = torch.zeros_like(rest).index_copy(0, order, torch.cat(parts))
    for a, b in zip(torch.autograd.grad(y, (x, share), dy), torch.autograd.grad(expected, (x, share), dy), strict=True):
        # `about` gives the moments about the share: var + ((1 - share) mean)^2 is the mean of those squares
        close(a, b)
    assert joined == [True]


@pytest.mark.extras
def test_graph_norm_goes_over_x_once(monkeypatch):
    pytest.importorskip("torch_geometric", reason="GraphNorm is PyG's class")
    from flexnorm.graphs import GraphNorm

    passes, dx = [], Bound.backward_dx
    monkeypatch.setattr(Bound, "backward_dx", lambda self, *given: passes.append(1) or dx(self, *given))
    norm, x = GraphNorm(4), torch.randn(9, 4, requires_grad=True)
    norm(x, torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 2])).sum().backward()
    assert len(passes) == (0 if isinstance(cpu.library(), str) else 1)


def test_graph_norm_behind_itself():
    """Parameters that x is made of as well: the way through x counts once, with create_graph and without."""
    pytest.importorskip("torch_geometric", reason="GraphNorm is PyG's class")
    from flexnorm.graphs import GraphNorm

    norm, x, ids = GraphNorm(3).double(), torch.randn(7, 3, dtype=torch.float64), torch.tensor([0, 1, 0, 1, 1, 0, 0])
    with torch.no_grad():
        norm.mean_scale.fill_(0.5), norm.bias.fill_(0.3)
    first, again = (
        torch.autograd.grad((norm(norm(x, ids), ids) ** 3).sum(), list(norm.parameters()), create_graph=create)
        for create in (False, True)
    )
    for a, b in zip(first, again, strict=True):
        torch.testing.assert_close(b.detach(), a, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("scale", "offset"), [(1.0, 0.0), (1e-2, 0.0), (0.1, 1e4)])
def test_graph_norm_is_the_formula(scale, offset):
    """Of shares on both sides of 1, against loops in float64, first and second derivatives too."""
    pytest.importorskip("torch_geometric", reason="GraphNorm is PyG's class")
    from flexnorm.graphs import GraphNorm

    ids = torch.tensor([0, 2, 0, 1, 1, 0, 1, 2, 2, 2])
    norm = GraphNorm(4).double()
    with torch.no_grad():
        norm.mean_scale.copy_(torch.tensor([0.0, 0.5, 1.0, 1.7]))
        norm.weight.copy_(torch.randn(4)), norm.bias.copy_(torch.randn(4))
    x = (torch.randn(10, 4, dtype=torch.float64) * scale + offset).requires_grad_()
    out = []
    for b in range(3):
        part = x[ids == b]
        part = part - norm.mean_scale * part.mean(0)
        out.append(part / (part.square().mean(0) + norm.eps).sqrt() * norm.weight + norm.bias)
    expected = torch.cat(out)[torch.argsort(torch.argsort(ids, stable=True))]
    y, dy, leaves = norm(x, ids), torch.randn(10, 4, dtype=torch.float64), (x, *norm.parameters())
    size = 1 + offset / scale  # of what cancels, in standard deviations
    close(y.detach(), expected.detach(), size)
    first = [torch.autograd.grad(t, leaves, dy, create_graph=True) for t in (y, expected)]
    for a, b in zip(*first, strict=True):
        close(a.detach(), b.detach(), size**2)
    if not offset:
        second = [torch.autograd.grad(g[0].square().sum(), leaves[:2]) for g in first]
        for a, b in zip(*second, strict=True):
            close(a, b, 100)


@pytest.mark.parametrize("x", [torch.randn(2, 4, 5, 5), torch.randn(2, 4, 5, 5).to(memory_format=torch.channels_last)])
@pytest.mark.parametrize("given", [False, True])
def test_results_may_be_changed_in_place(x, given):
    """As by nn.ReLU(inplace=True), on kernels and without."""
    x = x.clone().requires_grad_()
    pattern = "n c h w -> n c"
    m = moments(x, pattern).about(0.5) if given else None
    y = normalize(x, pattern, moments=m)
    dy = torch.randn_like(y)
    (expected,) = torch.autograd.grad(torch.relu(y), x, dy, retain_graph=True)
    (got,) = torch.autograd.grad(nn.functional.relu_(normalize(x, pattern, moments=m)), x, dy)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("share", ["c", "b c", "1"])
@pytest.mark.parametrize(("scale", "offset"), [(1.0, 0.0), (1e-2, 0.0), (0.1, 1e3)])
def test_a_share_of_the_mean(share, scale, offset):
    """`center` as a tensor, with a gradient of its own: once in the library, and as a change of moments."""
    torch.manual_seed(0)
    shape = {"c": (4,), "b c": (3, 4), "1": (1,)}[share]
    x = (torch.randn(SHAPE, dtype=torch.float64) * scale + offset).requires_grad_()
    a, dy = torch.rand(shape, dtype=torch.float64, requires_grad=True), torch.randn(SHAPE, dtype=torch.float64)
    weight = torch.randn(4, dtype=torch.float64, requires_grad=True)
    y = normalize(x, PATTERN, center=a, weight=weight, affine="c")
    n, mean, m2 = by_hand(x)
    about = (1 - a) * mean
    z = (x - (a * mean)[..., None]) / (m2 / n + about.square() + 1e-5).sqrt()[..., None] * weight[:, None]
    size = 1 + offset / scale
    close(y.detach(), z.detach(), size)
    for got, want in zip(*(torch.autograd.grad(t, (x, a, weight), dy) for t in (y, z)), strict=True):
        close(got, want, size**2)
    m = moments(x, PATTERN).about(a)
    close(normalize(x, PATTERN, moments=m, weight=weight, affine="c").detach(), z.detach(), size)


def test_a_share_of_the_mean_with_a_mask_and_compiled():
    torch.manual_seed(0)
    x, a = torch.randn(SHAPE, requires_grad=True), torch.rand(4, requires_grad=True)
    mask = torch.rand(3, 6) < 0.7
    f = lambda x, a: normalize(x, "n c t, n t -> n c", mask, center=a)  # noqa: E731
    y, dy = f(x, a), torch.randn(SHAPE)
    z = torch.compile(f, fullgraph=True, backend="aot_eager")(x, a)
    torch.testing.assert_close(z, y)
    assert not y[~mask[:, None].expand(SHAPE)].any()
    for got, want in zip(*(torch.autograd.grad(t, (x, a), dy) for t in (z, y)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("share", [torch.rand(6), torch.rand(2, 4), torch.rand(1, 3, 4)])
def test_a_share_of_a_pooled_axis_is_refused(share):
    with pytest.raises(flexnorm.ShapeError) as caught:
        normalize(torch.randn(SHAPE), PATTERN, center=share)
    assert "over axes of the statistics: it broadcasts to shape (3, 4)" in str(caught.value)
    assert "^" in str(caught.value)


@pytest.mark.parametrize("kept", [False, True])
def test_a_share_of_the_mean_alone_and_of_moments_from_elsewhere(kept):
    """Without `scale` the share is subtracted and nothing is divided; moments that are given have a share, too."""
    torch.manual_seed(0)
    x = torch.randn(SHAPE, dtype=torch.float64, requires_grad=True)
    a, dy = torch.rand(4, dtype=torch.float64, requires_grad=True), torch.randn(SHAPE, dtype=torch.float64)
    m = moments(x, PATTERN) if kept else None
    mean, var = x.mean(-1, keepdim=True), x.var(-1, correction=0, keepdim=True)
    rest = x - a[:, None] * mean
    around = var + ((1 - a)[:, None] * mean).square()
    for y, z in (
        (normalize(x, PATTERN, center=a, scale=False, moments=m), rest),
        (normalize(x, PATTERN, center=a, moments=m), rest / (around + 1e-5).sqrt()),
    ):
        close(y.detach(), z.detach())
        for got, want in zip(*(torch.autograd.grad(t, (x, a), dy, retain_graph=True) for t in (y, z)), strict=True):
            close(got, want)

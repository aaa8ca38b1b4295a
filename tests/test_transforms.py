"""torch.func, forward mode and higher derivatives: equal to the formula's, and never silently zero."""

import cases
import oracle
import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from flexnorm import Norm, Partition, normalize

SOME = ["group", "layer", "batch", "rms", "silu", "center_only", "utterance", "masked_labels", "graph_group", "regions",
        "two_labels", "bands", "weights", "weighted_labels", "weighted_rms", "node_types"]  # fmt: skip
each = pytest.mark.parametrize("case", [cases.by_name[name] for name in SOME], ids=SOME)


def of_x(case, kwargs):
    return (lambda x: normalize(x, case.pattern, **kwargs)), (lambda x: oracle.normalize(x, case.pattern, **kwargs))


@each
def test_jvp(case):
    x, kwargs = cases.arguments(case)
    ours, formula = of_x(case, kwargs)
    tangent = torch.randn_like(x)
    _, dy = torch.func.jvp(ours, (x,), (tangent,))
    _, expected = torch.func.jvp(formula, (x,), (tangent,))
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(dy, expected, rtol=1e-10, atol=1e-10)


@each
def test_forward_mode_duals(case):
    """Duals outside of torch.func, of an input that also requires a gradient: an autograd Function would give zeros."""
    x, kwargs = cases.arguments(case, requires_grad=True)
    tangent = torch.randn_like(x)
    ours, formula = of_x(case, kwargs)
    with forward_ad.dual_level():
        dy = forward_ad.unpack_dual(ours(forward_ad.make_dual(x, tangent))).tangent
        expected = forward_ad.unpack_dual(formula(forward_ad.make_dual(x, tangent))).tangent
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(dy, expected, rtol=1e-10, atol=1e-10)


@each
def test_hessian_and_jacobians(case):
    x, kwargs = cases.arguments(case)
    ours, _ = of_x(case, kwargs)
    forward, backward = torch.func.jacfwd(ours)(x), torch.func.jacrev(ours)(x)
    torch.testing.assert_close(forward, backward, rtol=1e-10, atol=1e-10)
    by_autograd = torch.autograd.functional.jacobian(ours, x)
    torch.testing.assert_close(forward, by_autograd, rtol=1e-10, atol=1e-10)

    def loss(x):
        return ours(x).pow(3).sum()

    hessian = torch.func.hessian(loss)(x)
    assert hessian.abs().max() > 1e-3
    torch.testing.assert_close(hessian, torch.autograd.functional.hessian(loss, x), rtol=1e-8, atol=1e-8)


@each
def test_vmap(case):
    xs = torch.stack([cases.arguments(case, seed=seed)[0] for seed in range(3)])
    _, kwargs = cases.arguments(case)
    ours, _ = of_x(case, kwargs)
    torch.testing.assert_close(torch.func.vmap(ours)(xs), torch.stack([ours(x) for x in xs]), rtol=1e-12, atol=1e-12)
    last = torch.func.vmap(ours, in_dims=-1, out_dims=-1)(xs.movedim(0, -1)).movedim(-1, 0)
    torch.testing.assert_close(last, torch.stack([ours(x) for x in xs]), rtol=1e-12, atol=1e-12)


def test_vmap_over_masks_weights_and_labels():
    x = torch.randn(3, 4, 5)
    masks, weights = torch.rand(6, 3, 5) < 0.6, torch.rand(6, 3, 5)
    ids = torch.randint(0, 2, (6, 4))

    def masked(m):
        return normalize(x, "b c t, b t -> b", m)

    def labelled(i):
        return normalize(x, "b c t -> b kind[c]", kind=Partition(i, count=2))

    for f, over in ((masked, masks), (masked, weights), (labelled, ids)):
        torch.testing.assert_close(torch.func.vmap(f)(over), torch.stack([f(o) for o in over]))


def test_per_sample_gradients_equal_a_loop():
    norm = Norm("n (g c) t -> n g", affine="(g c)", g=2, c=2, dtype=torch.float64)
    nn.init.normal_(norm.weight)
    params = dict(norm.named_parameters())
    xs = torch.randn(5, 1, 4, 3, dtype=torch.float64)

    def loss(params, x):
        return torch.func.functional_call(norm, params, (x,)).pow(3).sum()

    grads = torch.func.vmap(torch.func.grad(loss), (None, 0))(params, xs)
    for i, x in enumerate(xs):
        alone = torch.func.grad(loss)(params, x)
        for name in params:
            torch.testing.assert_close(grads[name][i], alone[name], rtol=1e-10, atol=1e-10)


@each
def test_third_derivative_is_that_of_the_formula(case):
    """Order 3 by autograd, through our backward, against the loops'."""
    x, kwargs = cases.arguments(case)
    along = torch.randn_like(x)
    coefficients = torch.linspace(1, 2, x.numel(), dtype=x.dtype).reshape(x.shape)
    results = []
    for f in of_x(case, kwargs):
        t = torch.zeros((), dtype=torch.float64, requires_grad=True)
        value = (f(x + t * along).pow(3) * coefficients).sum()
        for _ in range(3):
            (value,) = torch.autograd.grad(value, t, create_graph=True)
        results.append(value.detach())
    torch.testing.assert_close(*results, rtol=1e-7, atol=1e-7)


def test_gradient_penalty_trains():
    """Double backward as users meet it: the norm of a gradient in a loss."""
    model = nn.Sequential(
        nn.Conv1d(3, 4, 3, padding=1), Norm("n (g c) t -> n g", affine="(g c)", g=2, c=2, activation="silu")
    )
    x = torch.randn(2, 3, 6, requires_grad=True)
    (dx,) = torch.autograd.grad(model(x).pow(2).sum(), x, create_graph=True)
    dx.pow(2).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())

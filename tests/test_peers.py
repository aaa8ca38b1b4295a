"""Parity with torch's own layers: outputs, gradients, state_dict both ways, at several scales and offsets.

torch 2.11. Where torch itself is not exact (an offset against the spread), both are compared with float64.
"""

import pytest
import torch
from torch import nn

from flexnorm import Norm, normalize

F32 = torch.finfo(torch.float32).eps

PEERS = [
    (
        lambda: nn.GroupNorm(4, 16),
        lambda: Norm("n (g c) ... -> n g", affine="(g c)", g=4, sizes={"(g c)": 16}),
        (3, 16, 5, 7),
    ),
    (lambda: nn.GroupNorm(4, 16), lambda: Norm("n (g c) ... -> n g", affine="(g c)", g=4, c=4), (3, 16)),
    (lambda: nn.GroupNorm(16, 16), lambda: Norm("n (g c) ... -> n g", affine="(g c)", g=16, c=1), (3, 16, 5)),
    (
        lambda: nn.GroupNorm(1, 6, eps=1e-2),
        lambda: Norm("n (g c) ... -> n g", affine="(g c)", g=1, c=6, eps=1e-2),
        (2, 6, 3, 2, 2),
    ),
    (lambda: nn.GroupNorm(2, 6, affine=False), lambda: Norm("n (g c) ... -> n g", g=2), (2, 6, 3)),
    (lambda: nn.LayerNorm(12), lambda: Norm("... c -> ...", affine="c", c=12), (4, 5, 12)),
    (lambda: nn.LayerNorm((3, 4)), lambda: Norm("n c t -> n", affine="c t", c=3, t=4), (5, 3, 4)),
    (lambda: nn.LayerNorm(12, bias=False), lambda: Norm("... c -> ...", affine="c", c=12, bias=False), (4, 12)),
    (
        lambda: nn.RMSNorm(12, eps=1e-5),
        lambda: Norm("... c -> ...", affine="c", c=12, center=False, bias=False),
        (4, 5, 12),
    ),
    (lambda: nn.InstanceNorm1d(6, affine=True), lambda: Norm("n c ... -> n c", affine="c", c=6), (3, 6, 9)),
    (lambda: nn.InstanceNorm2d(6, affine=True), lambda: Norm("n c ... -> n c", affine="c", c=6), (3, 6, 4, 5)),
    (lambda: nn.InstanceNorm3d(6), lambda: Norm("n c ... -> n c"), (2, 6, 3, 4, 5)),
    (lambda: nn.BatchNorm1d(6, track_running_stats=False), lambda: Norm("n c ... -> c", affine="c", c=6), (8, 6)),
    (lambda: nn.BatchNorm1d(6, track_running_stats=False), lambda: Norm("n c ... -> c", affine="c", c=6), (8, 6, 5)),
    (lambda: nn.BatchNorm2d(6, track_running_stats=False), lambda: Norm("n c ... -> c", affine="c", c=6), (4, 6, 5, 3)),
    (
        lambda: nn.BatchNorm3d(6, track_running_stats=False),
        lambda: Norm("n c ... -> c", affine="c", c=6),
        (2, 6, 3, 3, 2),
    ),
]


@pytest.mark.parametrize(("scale", "offset"), [(1, 0), (1e-3, 0), (1e3, 0), (1, 10), (1e3, 1e3)])
@pytest.mark.parametrize(
    ("theirs", "ours", "shape"), PEERS, ids=lambda value: str(value) if isinstance(value, tuple) else ""
)
def test_parity(theirs, ours, shape, scale, offset):
    """To 1e-6 in float32, and to what torch itself loses to the offset: 4 eps |mean| / sigma (design 4.4)."""
    theirs, ours = theirs(), ours()
    for p in theirs.parameters():
        nn.init.normal_(p)
    ours.load_state_dict(theirs.state_dict())  # their checkpoint in our layer
    g = torch.Generator().manual_seed(0)
    x = (torch.randn(shape, generator=g) * scale + offset).requires_grad_()
    dy = torch.randn(shape, generator=g)
    limit = 1e-6 + 4 * F32 * offset / scale
    y, z = ours(x), theirs(x)
    size = z.detach().abs().max().clamp(min=1) * (
        1 + max([p.abs().max().item() for p in theirs.parameters()], default=0)
    )
    assert (y - z).abs().max() <= limit * size
    grads = torch.autograd.grad(y, [x, *ours.parameters()], dy)
    expected = torch.autograd.grad(z, [x, *theirs.parameters()], dy)
    for a, b in zip(grads, expected, strict=True):
        # sums of x.numel() / C terms in float32; relative to the largest
        assert (a - b).abs().max() <= (limit + 16 * F32) * 8 * b.abs().max().clamp(min=1e-3)
    for p in ours.parameters():
        nn.init.normal_(p)
    theirs.load_state_dict(ours.state_dict())  # and our checkpoint in theirs
    assert (ours(x) - theirs(x)).abs().max() <= limit * size * 4


def test_group_norm_spans_instance_and_layer_norm():
    x = torch.randn(2, 8, 5, 5)
    torch.testing.assert_close(
        normalize(x, "n (g c) ... -> n g", g=8), nn.functional.instance_norm(x), rtol=0, atol=2e-6
    )
    layer = nn.functional.layer_norm(x, x.shape[1:])
    torch.testing.assert_close(normalize(x, "n (g c) ... -> n g", g=1), layer, rtol=0, atol=2e-6)


def test_bf16_parity_with_one_rounding():
    x = torch.randn(4, 16, 6, dtype=torch.bfloat16)
    wide = nn.functional.group_norm(x.double(), 4)
    assert ((normalize(x, "n (g c) t -> n g", g=4).double() - wide).abs() <= 2**-8 * wide.abs() + 1e-6).all()


def test_layer_norm_third_derivative_which_torch_gets_wrong():
    """torch's F.layer_norm is silently off by 8.8 at the third derivative; the formula is not, and neither are we."""
    x = torch.tensor([0.3, -1.2, 0.8, 2.0], dtype=torch.float64)
    v = torch.tensor([1.0, -0.5, 0.25, 2.0], dtype=torch.float64)

    def third(f):
        def along(t):
            return (f(x + t * v) * torch.arange(1.0, 5.0, dtype=torch.float64)).sum()

        t = torch.zeros((), dtype=torch.float64, requires_grad=True)
        value = along(t)
        for _ in range(3):
            (value,) = torch.autograd.grad(value, t, create_graph=True)
        return value.detach()

    def formula(x):
        return (x - x.mean()) / ((x - x.mean()).square().mean() + 1e-5).sqrt()

    torch.testing.assert_close(third(lambda x: normalize(x, "c -> ")), third(formula), rtol=1e-9, atol=1e-9)

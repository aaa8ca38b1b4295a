"""`flexnorm.images`: ChannelGroupNorm against nn.GroupNorm, the loops of the oracle, and each image alone."""

import copy
import functools
import pickle

import oracle
import pytest
import torch
from torch import nn

from flexnorm import Norm, Partition, ShapeError, SpecError, given, moments
from flexnorm.images import ChannelGroupNorm, default_groups

F32 = torch.finfo(torch.float32).eps


def filled(norm):
    """Parameters that a mistake would show with."""
    for p in norm.parameters():
        nn.init.normal_(p)
    return norm


def outcome(norm, x, dy, *args):
    """The output, and the gradients of x and of the parameters."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = norm(x, *args)
    return y.detach(), *torch.autograd.grad(y, (x, *norm.parameters()), dy)


# --- the peer ---


@pytest.mark.parametrize(("scale", "offset"), [(1, 0), (1e-3, 0), (1e3, 0), (1, 10), (1, 1e3), (1e3, 1e4)])
@pytest.mark.parametrize(
    ("groups", "channels", "shape"),
    [(4, 16, (3, 16)), (8, 16, (1, 16, 9)), (4, 16, (3, 16, 5, 7)), (1, 6, (2, 6, 3, 2, 4)), (6, 6, (2, 6, 4, 4))],
)
def test_parity_with_group_norm(groups, channels, shape, scale, offset):
    theirs = filled(nn.GroupNorm(groups, channels)).double()
    ours = ChannelGroupNorm(groups, channels)
    ours.load_state_dict(theirs.state_dict())
    x = (torch.randn(shape) * scale + offset).requires_grad_()
    dy = torch.randn(shape)
    y, z = outcome(ours, x, dy), outcome(theirs, x.double(), dy.double())
    # design 4.4 of y before the affine, whose weight is below 4 here; |mean| / sigma is about offset / scale, and more
    # where the few values of a set lie close together
    sets = moments(x.detach().double(), "n (g c) ... -> n g", g=groups)
    ratio = (sets.mean.abs() / (sets.var + 1e-5).sqrt()).max()
    weight = theirs.weight.abs().max().clamp(min=1)
    limit = 4 * F32 * (ratio + z[0].abs().max()) + 1e-6
    assert (y[0] - z[0]).abs().max() <= limit * weight
    for a, b in zip(y[1:], z[1:], strict=True):
        assert (a - b).abs().max() <= 16 * limit * b.abs().max().clamp(min=1e-3)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    back = nn.GroupNorm(groups, channels)
    back.load_state_dict(filled(ours).state_dict())
    assert all(torch.equal(a, b) for a, b in zip(back.parameters(), ours.parameters(), strict=True))


@pytest.mark.parametrize("arguments", [(2, 6), (3, 6, 1e-3), (3, 6, 1e-3, False)])
def test_is_a_group_norm_to_everybody(arguments):
    theirs, ours = nn.GroupNorm(*arguments), ChannelGroupNorm(*arguments)
    assert isinstance(ours, nn.GroupNorm)
    assert repr(ours) == f"Channel{theirs!r}"
    for name in ("num_groups", "num_channels", "eps", "affine"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    x = torch.randn(2, 6, 4, 4)
    torch.testing.assert_close(ours(input=x), theirs(input=x), rtol=1e-5, atol=1e-6)
    ours.eps = theirs.eps = 0.5
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-6)
    assert f"eps=0.5, affine={ours.affine}" in repr(ours)


def test_options_of_torch():
    positional = ChannelGroupNorm(2, 6, 1e-5, True, "meta", torch.float16)
    assert positional.weight.is_meta
    assert positional.weight.dtype == torch.float16
    no_bias = ChannelGroupNorm(2, 6, bias=False)
    assert no_bias.bias is None
    assert repr(no_bias) == "ChannelGroupNorm(2, 6, eps=1e-05, affine=True, bias=False)"  # as from torch 2.13 on
    ready = nn.utils.skip_init(ChannelGroupNorm, 2, 6, zero_init=True)
    ready.reset_parameters()
    assert ready.weight.tolist() == [0] * 6


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(1, 4), (1, 4, 1), (1, 4, 1, 1)])
def test_one_value_per_group_is_the_error_of_torch(shape, training):
    x = torch.randn(shape)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training") as theirs:
        nn.GroupNorm(4, 4).train(training)(x)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training") as ours:
        ChannelGroupNorm(4, 4).train(training)(x)
    assert str(theirs.value).startswith(str(ours.value).split("[")[0])


@pytest.mark.parametrize("shape", [(2, 4), (1, 4, 2), (0, 4, 3, 3)])
def test_no_error_where_torch_has_none(shape):
    x = torch.randn(shape)
    # torch folds x * a + b: a set of one value is off by 2 eps |x| / sqrt(1e-5), where ours is 0
    torch.testing.assert_close(ChannelGroupNorm(4, 4)(x), nn.GroupNorm(4, 4)(x), rtol=1e-5, atol=2e-4)
    assert ChannelGroupNorm(4, 4)(x).shape == shape


def test_no_pixels():
    """torch refuses them from 2.13 on."""
    assert ChannelGroupNorm(4, 4)(torch.randn(2, 4, 0)).shape == (2, 4, 0)


@pytest.mark.parametrize(
    ("shape", "layout"), [((2, 8, 5, 7), torch.channels_last), ((2, 8, 3, 4, 5), torch.channels_last_3d)]
)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("groups", [None, [1, 4, 3]])
def test_keeps_channels_last_and_is_exact_there(shape, layout, masked, groups):
    """torch computes E[x^2] - E[x]^2 in this layout: at mean 1000 it is off by 1.9."""
    norm = filled(ChannelGroupNorm(3 if groups else 4, 8, groups=groups))
    x = (torch.randn(shape) + 1e3).to(memory_format=layout)
    mask = torch.rand(2, *shape[2:]) < 0.7 if masked else None
    y, dx, *_ = outcome(norm, x, torch.randn(shape), mask)
    assert y.is_contiguous(memory_format=layout)
    assert dx.is_contiguous(memory_format=layout)
    other = copy.deepcopy(norm).double()(x.double(), mask)
    assert (y - other).abs().max() <= norm.weight.abs().max() * (4 * F32 * (1.3e3 + 8) + 1e-6)  # sigma is above 0.8


# --- masks and weights ---


@pytest.mark.parametrize(("scale", "offset"), [(1e-3, 0), (1, 0), (1e3, 1e3)])
@pytest.mark.parametrize("groups", [None, [1, 3, 2]])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_mask_against_the_oracle(groups, kind, scale, offset):
    norm = filled(ChannelGroupNorm(3, 6, groups=groups, dtype=torch.float64))
    x = (torch.randn(2, 6, 3, 4, dtype=torch.float64) * scale + offset).requires_grad_()
    mask = torch.rand(2, 3, 4) < 0.6 if kind == "bool" else torch.rand(2, 3, 4, dtype=torch.float64) + 0.1
    wanted = [x, norm.weight, norm.bias, *([mask.requires_grad_()] if kind == "float" else [])]
    told = {"pattern": "n (g c) h w, n h w -> n g", "affine": "(g c)", "sizes": {"g": 3}}
    if groups:
        told = {"pattern": "n c h w, n h w -> n k[c]", "affine": "c", "labels": {"k": Partition.from_sizes(groups)}}
    y, z = norm(x, mask), oracle.normalize(x, mask=mask, weight=norm.weight, bias=norm.bias, **told)
    # float64 throughout: only the rounding of x - mean, and its derivatives, which are of size 1 / scale
    torch.testing.assert_close(y, z, rtol=1e-9, atol=1e-9)
    dy = torch.randn_like(y)
    for a, b in zip(torch.autograd.grad(y, wanted, dy), torch.autograd.grad(z, wanted, dy), strict=True):
        assert (a - b).abs().max() <= 1e-9 * b.abs().max().clamp(min=1)


def test_padded_images_are_what_each_is_alone():
    """Images of several sizes in one batch: outputs and all gradients, whatever the padding holds, bit for bit."""
    norm = filled(ChannelGroupNorm(2, 6, activation="silu"))
    images = [torch.randn(6, h, w) * 3 + 5 for h, w in ((4, 7), (6, 3), (1, 1), (6, 7))]
    dys = [torch.randn_like(image) for image in images]
    results = []
    for filler in (0.0, float("nan"), float("inf")):
        x, mask, dy = torch.full((4, 6, 6, 7), filler), torch.zeros(4, 6, 7, dtype=torch.bool), torch.randn(4, 6, 6, 7)
        for i, image in enumerate(images):
            _, h, w = image.shape
            x[i, :, :h, :w], mask[i, :h, :w], dy[i, :, :h, :w] = image, True, dys[i]
        results.append(outcome(norm, x, dy, mask))
        assert all(torch.equal(a, b) for a, b in zip(results[0], results[-1], strict=True))
    y, dx, dweight, dbias = results[0]
    alone = [outcome(norm, image[None], dy[None]) for image, dy in zip(images, dys, strict=True)]
    for i, (image, one) in enumerate(zip(images, alone, strict=True)):
        _, h, w = image.shape
        # the same numbers, added in another order: a few roundings
        torch.testing.assert_close(y[i, :, :h, :w], one[0][0], rtol=1e-5, atol=2e-6)
        torch.testing.assert_close(dx[i, :, :h, :w], one[1][0], rtol=1e-4, atol=4e-6)
        assert not y[i][:, ~mask[i]].any()
        assert not dx[i][:, ~mask[i]].any()
    torch.testing.assert_close(dweight, sum(one[2] for one in alone), rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(dbias, sum(one[3] for one in alone), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("groups", "num_groups", "pattern"),
    [(None, 6, "n c d h w, d -> n c"), (None, 2, "n (g c) d h w, d -> n g"), ([1, 5], 2, "n c d h w, d -> n k[c]")],
)
def test_voxels_weighed_by_slice_thickness(groups, num_groups, pattern):
    x = torch.randn(2, 6, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    thickness = torch.tensor([1.0, 2.5, 0.5], dtype=torch.float64, requires_grad=True)
    norm = ChannelGroupNorm(num_groups, 6, groups=groups, dtype=torch.float64)
    labels = {"k": Partition.from_sizes(groups)} if groups else {}
    y = norm(x, thickness.view(1, -1, 1, 1))
    z = oracle.normalize(x, pattern, thickness, sizes={"g": 2} if "g" in pattern else {}, labels=labels)
    torch.testing.assert_close(y, z, rtol=1e-10, atol=1e-10)
    dy = torch.randn_like(y)
    for a, b in zip(*(torch.autograd.grad(t, (x, thickness), dy) for t in (y, z)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    again = Norm(pattern, **({"g": 2} if "g" in pattern else {}), labels=labels)(x, thickness)
    torch.testing.assert_close(y, again, rtol=1e-10, atol=1e-10)


def test_a_mask_may_have_size_1_along_any_axis():
    norm, x = ChannelGroupNorm(2, 4), torch.randn(3, 4, 5, 6)
    mask = torch.rand(3, 5, 6) < 0.6
    for part in (mask[:1], mask[:, :1], mask[..., :1], mask[:1, :, :1]):
        assert torch.equal(norm(x, part), norm(x, part.expand(3, 5, 6).contiguous()))


def test_given_reaches_it_with_small_masks_too():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), ChannelGroupNorm(2, 8), nn.ReLU(), ChannelGroupNorm(4, 8))
    x, weights = torch.randn(2, 3, 5, 6), torch.rand(1, 1, 6) + 0.1
    with given(mask=weights):
        y = model(x)
    h = model[1](model[0](x), weights)
    assert torch.equal(y, model[3](model[2](h), weights))
    with pytest.raises(ShapeError, match=r"ChannelGroupNorm\(2, 8.*inside of given\(mask\)"), given(mask=weights[0]):
        model(x)


def test_moments_from_elsewhere():
    norm, x = ChannelGroupNorm(2, 4), torch.randn(3, 4, 5, 6)
    tiles = [moments(tile, "n (g c) h w -> n g", g=2) for tile in x.split(2, dim=-1)]
    whole = functools.reduce(lambda a, b: a.merge(b), tiles)
    torch.testing.assert_close(norm(x, moments=whole), norm(x), rtol=1e-5, atol=1e-6)


# --- groups ---


@pytest.mark.parametrize("way", ["sizes", "tuple", "ids", "partition"])
def test_unequal_groups_are_group_norms_of_the_parts(way):
    sizes = [2, 5, 1, 4]
    groups = {
        "sizes": sizes,
        "tuple": tuple(sizes),
        "ids": torch.tensor([k for k, size in enumerate(sizes) for _ in range(size)]),
        "partition": Partition.from_sizes(sizes),
    }[way]
    norm = filled(ChannelGroupNorm(4, 12, groups=groups, dtype=torch.float64))
    x = torch.randn(3, 12, 5, dtype=torch.float64) * 10 + 100
    parts = [nn.functional.group_norm(part, 1) for part in x.split(sizes, dim=1)]
    expected = torch.cat(parts, dim=1) * norm.weight[:, None] + norm.bias[:, None]
    torch.testing.assert_close(norm(x), expected, rtol=1e-9, atol=1e-9)
    assert list(norm.state_dict()) == ["weight", "bias", "group_ids"]
    assert repr(norm) == f"Channel{nn.GroupNorm(4, 12)!r}"[:-1] + ", groups=Partition(12 ids, count=4))"


def test_groups_in_any_order_and_groups_that_nobody_is_in():
    ids = torch.tensor([2, 0, 2, 0, 0, 2])
    x = torch.randn(2, 6, 4)
    y = ChannelGroupNorm(4, 6, groups=ids)(x)
    order = ids.argsort(stable=True)
    sorted_ = ChannelGroupNorm(2, 6, groups=[3, 3])(x[:, order])
    torch.testing.assert_close(y[:, order], sorted_, rtol=1e-6, atol=1e-6)


def test_equal_groups_are_group_norm():
    x = torch.randn(2, 6, 4, 4)
    torch.testing.assert_close(
        ChannelGroupNorm(3, 6, groups=[2, 2, 2])(x), ChannelGroupNorm(3, 6)(x), rtol=1e-6, atol=1e-6
    )


def test_invariant_to_gain_and_offset_of_every_group():
    """Sensors with gains and offsets of their own: without eps, nothing of them is left."""
    norm = ChannelGroupNorm(3, 8, eps=0, groups=torch.tensor([0, 1, 1, 0, 2, 2, 2, 1]), dtype=torch.float64)
    x = torch.randn(4, 8, 10, dtype=torch.float64)
    gain, offset = torch.rand(4, 3, dtype=torch.float64) * 1e3 + 1e-3, torch.randn(4, 3, dtype=torch.float64) * 10
    ids = norm.group_ids
    y = norm(x * gain[:, ids, None] + offset[:, ids, None])
    # relative rounding of x * gain + offset: 2e-16 * |offset| / gain, of 1e4 at the smallest gain
    torch.testing.assert_close(y, norm(x), rtol=1e-8, atol=1e-8)


def test_learned_groups_are_loaded():
    norm, x = ChannelGroupNorm(2, 4, groups=[2, 2]), torch.randn(2, 4, 5)
    learned = torch.tensor([0, 1, 0, 1])
    norm(x)
    norm.load_state_dict({"group_ids": learned}, strict=False)
    expected = ChannelGroupNorm(2, 4, groups=learned)(x)
    assert torch.equal(norm(x), expected)
    for other in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        assert torch.equal(other(x), expected)
    fresh = ChannelGroupNorm(2, 4, groups=[1, 3])
    fresh.load_state_dict(norm.state_dict())
    assert torch.equal(fresh(x), expected)
    fresh.reset_parameters()
    assert fresh.group_ids.tolist() == [0, 1, 1, 1]


# --- conveniences ---


def test_zero_init_begins_as_the_identity_of_a_residual_branch():
    norm = ChannelGroupNorm(2, 6, zero_init=True)
    x = torch.randn(2, 6, 4, 4)
    assert torch.equal(x + norm(x), x)
    assert repr(norm) == f"Channel{nn.GroupNorm(2, 6)!r}"[:-1] + ", zero_init=True)"
    norm(x).sum().backward()
    torch.testing.assert_close(norm.bias.grad, torch.full((6,), 32.0))
    filled(norm).reset_parameters()
    assert not norm.weight.any()
    assert not norm.bias.any()


@pytest.mark.parametrize("activation", ["relu", "silu", "gelu"])
def test_activation(activation):
    norm, x = ChannelGroupNorm(2, 6, activation=activation), torch.randn(2, 6, 4)
    expected = getattr(nn.functional, activation)(nn.functional.group_norm(x, 2))
    torch.testing.assert_close(norm(x), expected, rtol=1e-5, atol=1e-6)
    assert repr(norm).endswith(f", activation='{activation}')")


def test_default_groups():
    for channels in range(1, 300):
        allowed = [d for d in range(1, channels + 1) if channels % d == 0 and d <= min(32, channels // 4)]
        assert default_groups(channels) == max(allowed, default=1)


def basic_block(channels, out, norm_layer):
    """As torchvision writes its blocks: `norm_layer` is called with the number of channels."""
    return nn.Sequential(
        nn.Conv2d(channels, out, 3, padding=1, bias=False),
        norm_layer(out),
        nn.ReLU(),
        nn.Conv2d(out, out, 3),
        norm_layer(out),
    )


def test_as_norm_layer_of_a_factory():
    model = nn.Sequential(*(basic_block(c, 2 * c, ChannelGroupNorm.for_channels) for c in (3, 6)))
    norms = [m for m in model.modules() if isinstance(m, nn.GroupNorm)]
    assert [(m.num_groups, m.num_channels) for m in norms] == [(1, 6), (1, 6), (3, 12), (3, 12)]
    for m in model.modules():  # as torchvision's ResNet begins
        if isinstance(m, (nn.BatchNorm2d, nn.GroupNorm)):
            nn.init.constant_(m.weight, 1)
            nn.init.constant_(m.bias, 0)
    x = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    y = model(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    theirs = nn.Sequential(*(basic_block(c, 2 * c, lambda c: nn.GroupNorm(default_groups(c), c)) for c in (3, 6)))
    theirs.load_state_dict(model.state_dict())
    torch.testing.assert_close(y, theirs(x.contiguous()), rtol=1e-4, atol=1e-5)
    fused = functools.partial(ChannelGroupNorm.for_channels, eps=1e-3, activation="relu")
    assert repr(fused(64)) == f"Channel{nn.GroupNorm(16, 64, eps=1e-3)!r}"[:-1] + ", activation='relu')"
    pickle.loads(pickle.dumps(fused))


def test_bfloat16_and_autocast_keep_the_dtype():
    norm, x = ChannelGroupNorm(2, 8), torch.randn(2, 8, 5, 5).bfloat16()
    y = norm(x)
    assert y.dtype == torch.bfloat16
    exact = nn.functional.group_norm(x.double(), 2)
    assert ((y.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-6).all()  # one rounding
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert norm(x).dtype == torch.bfloat16


# --- bad input ---


X = torch.zeros(2, 6, 4, 5)
BAD = [
    (
        lambda: ChannelGroupNorm(4, 6),
        ShapeError,
        ["num_channels (6) must be divisible by num_groups (4)", "one of 1, 2, 3, 6; groups="],
    ),
    (
        lambda: ChannelGroupNorm(0, 6),
        SpecError,
        ["num_groups is a whole number of 1 or more", "received: num_groups=0"],
    ),
    (lambda: ChannelGroupNorm(2, 6.0), SpecError, ["num_channels is a whole number", "num_channels=6.0"]),
    (lambda: default_groups(0), SpecError, ["num_channels is a whole number of 1 or more"]),
    (
        lambda: ChannelGroupNorm(2, 6, affine=False, zero_init=True),
        SpecError,
        ["zero_init sets the weight", "affine=True"],
    ),
    (lambda: ChannelGroupNorm(2, 6, activation="tanh"), SpecError, ["activation is one of", "'tanh'"]),
    (
        lambda: ChannelGroupNorm(2, 6, groups=[2, 3]),
        ShapeError,
        ["num_channels=6", "groups=[2, 3]: 2 groups, 5 channels", "add up to num_channels"],
    ),
    (
        lambda: ChannelGroupNorm(3, 6, groups=[2, 4]),
        ShapeError,
        ["num_groups=3", "groups=[2, 4]: 2 groups, 6 channels"],
    ),
    (
        lambda: ChannelGroupNorm(2, 4, groups=[0, 0, 1, 1]),
        ShapeError,
        ["4 groups, 2 channels", "torch.tensor([0, 0, 1]): the group of every channel"],
    ),
    (
        lambda: ChannelGroupNorm(2, 4, groups=torch.tensor([0, 0, 1, 2])),
        ShapeError,
        ["ids are from 0 to count - 1 = 1"],
    ),
    (lambda: ChannelGroupNorm(2, 4, groups=torch.tensor([0, 0, 1])), ShapeError, ["num_channels=4", "3 channels"]),
    (lambda: ChannelGroupNorm(2, 4, groups=torch.zeros(4)), SpecError, ["integers", "torch.float32"]),
    (
        lambda: ChannelGroupNorm(2, 4, groups="ab"),
        SpecError,
        ["groups is a list of sizes", "groups='ab'", "groups=[3, 1], say"],
    ),
    (
        lambda: ChannelGroupNorm(2, 6)(X, torch.ones(2, 1, 4, 5)),
        ShapeError,
        ["(N, *spatial)", "mask of shape (2, 1, 4, 5)", "mask.squeeze(1)"],
    ),
    (lambda: ChannelGroupNorm(2, 6)(X, torch.ones(4)), ShapeError, ["(2, 4, 5)", "mask.view(1, -1, 1)"]),
    (
        lambda: ChannelGroupNorm(2, 6)(X, torch.ones(2, 5, 4)),
        ShapeError,
        ["mask of shape (2, 5, 4), x of shape (2, 6, 4, 5)", "a mask of shape (2, 4, 5)"],
    ),
    (
        lambda: ChannelGroupNorm(2, 6)(X, torch.ones(2, 4, 5).long()),
        SpecError,
        ["bool tensor", "torch.int64", "mask.bool()"],
    ),
    (lambda: ChannelGroupNorm(2, 6)(X, -torch.ones(2, 4, 5)), ShapeError, ["finite and 0 or more"]),
    (lambda: ChannelGroupNorm(2, 6)(X, "valid"), SpecError, ["'valid'"]),
    (lambda: ChannelGroupNorm(2, 8)(X), ShapeError, ["num_channels = 8", "x of shape (2, 6, 4, 5)", "num_channels=6"]),
    (lambda: ChannelGroupNorm(2, 8, groups=[4, 4])(X), ShapeError, ["num_channels = 8", "(2, 6, 4, 5)"]),
    (lambda: ChannelGroupNorm(1, 5)(X), ShapeError, ["num_channels = 5", "x.movedim(-1, 1)"]),
    (lambda: ChannelGroupNorm(2, 6)(torch.zeros(6)), ShapeError, ["x of shape (6,)"]),
]


@pytest.mark.parametrize(("call", "kind", "texts"), BAD)
def test_bad_input_says_the_rule_what_was_received_and_what_to_type(call, kind, texts):
    with pytest.raises(kind) as caught:
        call()
    assert isinstance(caught.value, ValueError)
    for text in (*texts, "received: ", "instead: "):
        assert text in str(caught.value)

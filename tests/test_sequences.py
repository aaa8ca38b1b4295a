"""GroupNorm of sequences: every container against each sequence alone in torch's own layer, in float64."""

import copy
import importlib
import inspect
import pickle

import pytest
import torch
from hypothesis import given as hypothesis_given
from hypothesis import settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from flexnorm import Norm, Partition, ShapeError, SpecError, given
from flexnorm.sequences import SequenceGroupNorm, TokenGroupNorm, as_mask, frame_lengths

GROUPS, CHANNELS, TIME = 2, 6, 9
LENGTHS = (4, 1, 9, 0, 6)
EPS32 = torch.finfo(torch.float32).eps


def sequences(scale=1.0, offset=0.0, dtype=torch.float32):
    """Sequences (time, channels) of different lengths; the groups of channels have different offsets and scales."""
    channel = torch.arange(CHANNELS, dtype=torch.float64)
    return [((torch.randn(n, CHANNELS) * (1 + channel) + channel) * scale + offset).to(dtype) for n in LENGTHS]


def layer(kind, dtype=torch.float32, **options):
    cls = TokenGroupNorm if kind == "token" else SequenceGroupNorm
    norm = cls(GROUPS, CHANNELS, dtype=dtype, **options)
    with torch.no_grad():
        norm.weight.copy_(1 + 0.5 * torch.randn(CHANNELS))
        norm.bias.copy_(torch.randn(CHANNELS))
    return norm


def alone(norm, items, douts):
    """Values and gradients of every sequence alone: nn.GroupNorm in float64."""
    peer = nn.GroupNorm(GROUPS, CHANNELS, eps=norm.eps).double()
    peer.load_state_dict(norm.state_dict())
    xs = [x.double().requires_grad_() for x in items]
    rows = isinstance(norm, TokenGroupNorm)
    ys = [(peer(x) if rows else peer(x.T[None])[0].T) if len(x) else x * 1 for x in xs]
    sum((y * d.double()).sum() for y, d in zip(ys, douts, strict=True)).backward()
    return ys, [x.grad for x in xs], peer


# --- containers: how each is made of sequences, and how sequences are read from it ------------------------------------


def places(name):
    """The steps of the padded tensor where every sequence lies."""
    result = []
    for n in LENGTHS:
        steps = torch.arange(n)
        if name == "left":
            steps = steps + TIME - n
        elif name == "holes":
            steps = torch.randperm(TIME)[:n].sort().values
        result.append(steps)
    return result


def padded(items, where, padding, last):
    """(batch, time, channels), or with the time last, and the mask."""
    x = torch.full((len(items), TIME, CHANNELS), padding, dtype=items[0].dtype)
    mask = torch.zeros(len(items), TIME, dtype=torch.bool)
    for i, steps in enumerate(where):
        x = x.index_put((torch.tensor(i), steps), items[i])
        mask[i, steps] = True
    return x if last else x.transpose(1, 2).contiguous(), mask


def taken(y, where, last):
    y = y if last else y.transpose(1, 2)
    return [y[i, steps] for i, steps in enumerate(where)]


def cu_seqlens(dtype=torch.int32):
    return nn.functional.pad(torch.tensor(LENGTHS).cumsum(0), (1, 0)).to(dtype)


def with_mask(told, order="right"):
    def run(norm, items, padding, last):
        where = places(order)
        x, mask = padded(items, where, padding, last)
        y = norm(x, **told(mask))
        assert type(y) is torch.Tensor and y.shape == x.shape and y.stride() == x.stride()
        assert ((y if last else y.transpose(1, 2))[~mask] == 0).all()
        return taken(y, where, last)

    return run


def packed(told):
    def run(norm, items, padding, last):
        y = norm(torch.cat(items), cu_seqlens=told())
        return list(y.split(LENGTHS))

    return run


def packed_with_holes(norm, items, padding, last):
    rows = torch.cat([torch.cat([torch.full((1, CHANNELS), padding, dtype=x.dtype), x]) for x in items])
    ends = cu_seqlens() + torch.arange(len(LENGTHS) + 1)
    mask = torch.ones(len(rows), dtype=torch.bool)
    mask[ends[:-1]] = False
    y = norm(rows, mask, cu_seqlens=ends)
    return [part[1:] for part in y.split([n + 1 for n in LENGTHS])]


def jagged(norm, items, padding, last):
    x = torch.nested.nested_tensor_from_jagged(torch.cat(items), cu_seqlens(torch.int64))
    y = norm(x)
    assert y.is_nested and y.layout == torch.jagged and y.shape == x.shape
    assert (x + y).shape == x.shape  # the same ragged size, so residuals work
    return list(y.unbind())


def jagged_turned(norm, items, padding, last):
    x = torch.nested.nested_tensor_from_jagged(torch.cat(items), cu_seqlens(torch.int64)).transpose(1, 2)
    if isinstance(norm, TokenGroupNorm):
        x = x.transpose(1, 2)
    y = norm(x)
    assert y.shape == x.shape and (x + y).shape == x.shape
    return list(y.unbind()) if isinstance(norm, TokenGroupNorm) else [t.T for t in y.unbind()]


def jagged_with_holes(norm, items, padding, last):
    begins = torch.tensor([TIME - n for n in LENGTHS])
    x, _ = padded(items, [torch.arange(n) + b for n, b in zip(LENGTHS, begins, strict=True)], padding, True)
    x = torch.nested.narrow(x, 1, begins, torch.tensor(LENGTHS), layout=torch.jagged)
    y = norm(x)
    assert y.shape == x.shape and torch.equal(y.lengths(), x.lengths())
    return list(y.unbind())


CONTAINERS = {
    "bool": with_mask(lambda mask: {"mask": mask}),
    "left": with_mask(lambda mask: {"mask": mask}, "left"),
    "holes": with_mask(lambda mask: {"mask": mask}, "holes"),
    "integers": with_mask(lambda mask: {"mask": mask.long()}, "left"),
    "int32": with_mask(lambda mask: {"mask": mask.int()}, "holes"),
    "uint8": with_mask(lambda mask: {"mask": mask.to(torch.uint8)}),
    "(b 1 t)": with_mask(lambda mask: {"mask": mask[:, None]}, "holes"),
    "(b t 1)": with_mask(lambda mask: {"mask": mask[:, :, None]}),
    "(b 1 1 t) integers": with_mask(lambda mask: {"mask": mask[:, None, None].long()}),
    "key_padding_mask": with_mask(lambda mask: {"key_padding_mask": ~mask}, "left"),
    "lengths": with_mask(lambda mask: {"lengths": torch.tensor(LENGTHS)}),
    "lengths int32": with_mask(lambda mask: {"lengths": torch.tensor(LENGTHS, dtype=torch.int32)}),
    "lengths list": with_mask(lambda mask: {"lengths": list(LENGTHS)}),
    "cu_seqlens": packed(cu_seqlens),
    "partition": packed(lambda: Partition.from_sizes(LENGTHS)),
    "cu_seqlens and mask": packed_with_holes,
    "jagged": jagged,
    "jagged turned": jagged_turned,
    "jagged with holes": jagged_with_holes,
}
KINDS = ["token", "channels first", "channels last"]


def built(kind, **options):
    return layer(kind, **options, **({} if kind == "token" else {"channels_last": kind == "channels last"}))


@pytest.mark.parametrize(("scale", "offset"), [(1.0, 0.0), (1e-3, 1.0), (1e3, 0.0), (1.0, 1e3), (0.1, 1e4)])
@pytest.mark.parametrize("name", CONTAINERS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_container_gives_what_each_sequence_gets_alone(kind, name, scale, offset):
    norm = built(kind)
    norm.eps = 1e-3  # a plain attribute, as in torch
    items = [x.requires_grad_() for x in sequences(scale, offset)]
    douts = [torch.randn(n, CHANNELS) for n in LENGTHS]
    ys = CONTAINERS[name](norm, items, float("nan"), kind != "channels first")
    sum((y * d).sum() for y, d in zip(ys, douts, strict=True)).backward()
    expected, grads, peer = alone(norm, [x.detach() for x in items], douts)

    gain, shift = norm.weight.abs().max().item(), norm.bias.abs().max().item()
    errors = [0.0]  # what xhat may err by, in every sequence
    for x, y, e, g in zip(items, ys, expected, grads, strict=True):
        assert y.dtype == torch.float32 and x.grad.shape == x.shape
        if not len(x):
            continue
        sets = x.detach().double().unflatten(1, (GROUPS, -1))
        over = 2 if kind == "token" else (0, 2)
        sigma = (sets.var(over, correction=0) + norm.eps).sqrt()
        relative = (sets.mean(over).abs() / sigma).max().item()
        largest = e.abs().max().item()
        errors.append(4 * EPS32 * (relative + (largest + shift)) + 1e-6)  # promised, of |xhat| <= (|y| + |bias|) / 0.5
        assert (y.double() - e).abs().max() <= gain * errors[-1] + EPS32 * (largest + shift)
        # dx is a difference of terms of size |dy| gain / sigma; promised is 1e-5 of the result, but a set of one token
        # may cancel to nothing, hence of its terms.
        assert (x.grad.double() - g).abs().max() <= 1e-5 * gain / sigma.min().item()
    total = torch.cat(douts).abs().sum(0).max().item()
    assert (norm.weight.grad.double() - peer.weight.grad).abs().max() <= total * max(errors)
    assert (norm.bias.grad.double() - peer.bias.grad).abs().max() <= total * len(torch.cat(douts)) * EPS32


@pytest.mark.parametrize("options", [{"affine": False}, {"bias": False}], ids=str)
@pytest.mark.parametrize("name", ["lengths", "cu_seqlens", "jagged"])
def test_without_parameters(name, options):
    items = sequences(dtype=torch.float64)
    norm = SequenceGroupNorm(GROUPS, CHANNELS, dtype=torch.float64, **options)
    ys = CONTAINERS[name](norm, items, 0.0, False)
    assert len(list(norm.parameters())) == (0 if "affine" in options else 1)
    for x, y in zip(items, ys, strict=True):
        if len(x):
            # Both err by some eps (|mean| / sigma + |y|) of float64, which is below 1e-12 for |mean| up to 1e3 sigma.
            torch.testing.assert_close(y, nn.functional.group_norm(x.T[None], GROUPS)[0].T, rtol=0, atol=1e-12)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 3e38])
@pytest.mark.parametrize(
    "name", ["left", "holes", "lengths", "key_padding_mask", "cu_seqlens and mask", "jagged with holes"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_no_bit(kind, name, poison):
    norm = built(kind)
    drawn = sequences()

    def run(padding):
        norm.zero_grad()
        torch.manual_seed(1)  # of the places
        items = [x.clone().requires_grad_() for x in drawn]
        ys = CONTAINERS[name](norm, items, padding, kind != "channels first")
        torch.cat(ys).square().sum().backward()
        return [*ys, *(x.grad for x in items), norm.weight.grad, norm.bias.grad]

    for a, b in zip(run(0.0), run(poison), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_padding_is_zero(kind):
    norm = built(kind)
    x, mask = padded(sequences(), places("left"), float("nan"), kind != "channels first")
    x.requires_grad_()
    norm(x, mask).square().sum().backward()
    dx = x.grad if kind != "channels first" else x.grad.transpose(1, 2)
    assert (dx[~mask] == 0).all()
    assert dx[mask].abs().min() > 0 and dx[mask].isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_amount_of_padding_changes_nothing(kind):
    norm, last = built(kind), kind != "channels first"
    items = sequences()
    short = pad_sequence(items, batch_first=True)
    long = nn.functional.pad(short, (0, 0, 0, 50), value=7.0)
    a, b = (norm(x if last else x.transpose(1, 2), lengths=LENGTHS) for x in (short, long))
    a, b = (y if last else y.transpose(1, 2) for y in (a, b))
    assert (a - b[:, :9]).abs().max() <= 4 * EPS32 * max(1, a.abs().max().item())
    assert (b[:, 9:] == 0).all()


@pytest.mark.parametrize("name", ["holes", "lengths", "cu_seqlens", "jagged"])
@pytest.mark.parametrize("kind", KINDS)
def test_higher_derivatives(kind, name):
    norm = built(kind, dtype=torch.float64)

    def run(rows):
        torch.manual_seed(1)  # of the places
        return torch.cat(CONTAINERS[name](norm, list(rows.split(LENGTHS)), 0.0, kind != "channels first"))

    rows = torch.cat(sequences(dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(run, rows, fast_mode=True)
    if name != "jagged":  # torch: no second derivative of values() of a NestedTensor
        assert torch.autograd.gradgradcheck(run, rows, fast_mode=True)


@settings(max_examples=settings().max_examples // 4, deadline=None)
@hypothesis_given(
    st.sampled_from(KINDS),
    st.lists(st.integers(0, 7), min_size=1, max_size=4).filter(any),
    st.integers(-10, 10),
    st.floats(-1e3, 1e3),
)
def test_gain_and_bias_of_a_group_are_lost(kind, lengths, power, shift):
    cls = TokenGroupNorm if kind == "token" else SequenceGroupNorm
    options = {} if kind == "token" else {"channels_last": kind == "channels last"}
    norm = cls(GROUPS, CHANNELS, eps=0.0, dtype=torch.float64, **options)
    x = torch.randn(len(lengths), max(lengths), CHANNELS, dtype=torch.float64)
    gain = torch.ones(CHANNELS, dtype=torch.float64)
    gain[: CHANNELS // GROUPS] = 2.0**power
    a, b = (norm(t.transpose(1, 2) if kind == "channels first" else t, lengths=lengths) for t in (x, x * gain + shift))
    # x + shift rounds to eps |x + shift| of float64, before it is divided by a sigma of gain times about 0.01 at least.
    assert (a - b).abs().max() <= 1e-12 * (1 + abs(shift) / min(gain).item()) * 1e2


# --- a drop-in for nn.GroupNorm ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [TokenGroupNorm, SequenceGroupNorm])
def test_is_a_group_norm_from_outside(cls):
    ours, theirs = cls(GROUPS, CHANNELS, 1e-3, False), nn.GroupNorm(GROUPS, CHANNELS, 1e-3, False)
    assert isinstance(ours, nn.GroupNorm) and isinstance(ours, Norm)
    assert repr(ours).replace(cls.__name__, "GroupNorm") == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict()) == []
    assert ours.weight is None and ours.bias is None
    known = list(inspect.signature(nn.GroupNorm).parameters)[:6]
    assert list(inspect.signature(cls).parameters)[:6] == known
    ours, theirs = cls(GROUPS, CHANNELS), nn.GroupNorm(GROUPS, CHANNELS)
    for name in ("num_groups", "num_channels", "eps", "affine"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert cls(GROUPS, CHANNELS, 1e-5, True, "meta", torch.float16).weight.dtype == torch.float16
    assert cls(GROUPS, CHANNELS, bias=False).bias is None


def test_repr_says_what_is_not_default():
    norm = SequenceGroupNorm(2, 6, channels_last=True)
    assert repr(norm) == f"Sequence{nn.GroupNorm(2, 6)!r}"[:-1] + ", channels_last=True)"


@pytest.mark.parametrize("cls", [TokenGroupNorm, SequenceGroupNorm])
def test_state_goes_both_ways(cls):
    ours, theirs = layer("token" if cls is TokenGroupNorm else "sequence"), nn.GroupNorm(GROUPS, CHANNELS)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(5, CHANNELS, 4)
    tokens = x.transpose(1, 2).reshape(-1, CHANNELS)
    rows, expected = (tokens, theirs(tokens)) if cls is TokenGroupNorm else (x, theirs(x))
    torch.testing.assert_close(ours(rows), expected)
    other = cls(GROUPS, CHANNELS)
    other.load_state_dict(theirs.state_dict())
    assert torch.equal(other(rows), ours(rows))
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(copied(rows), ours(rows))
    ours.eps = other.eps = theirs.eps = 0.5
    torch.testing.assert_close(ours(rows), theirs(rows))
    assert torch.equal(ours(rows), other(rows))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["holes", "cu_seqlens", "jagged with holes"])
@pytest.mark.parametrize("kind", KINDS)
def test_dtypes(kind, name, dtype):
    norm = built(kind)
    items = sequences(dtype=dtype)
    ys = CONTAINERS[name](norm, items, 0.0, kind != "channels first")
    expected, _, _ = alone(norm, items, [torch.zeros(n, CHANNELS) for n in LENGTHS])
    for y, e in zip(ys, expected, strict=True):
        assert y.dtype == dtype
        # One rounding at the end; the parameters are float32, so float64 is exact to what they are.
        bound = torch.finfo(dtype).eps * e.abs().clamp(min=1) + (1e-12 if dtype == torch.float64 else 3e-6)
        assert ((y.double() - e).abs() <= bound).all()


@pytest.mark.parametrize(("groups", "shape"), [(6, (1, 6, 1)), (3, (1, 3, 1))])
@pytest.mark.parametrize("train", [True, False])
def test_one_value_per_group_is_torchs_error(groups, shape, train):
    ours, theirs = SequenceGroupNorm(groups, shape[1]).train(train), nn.GroupNorm(groups, shape[1]).train(train)
    x = torch.randn(shape)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training") as expected:
        theirs(x)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training") as received:
        ours(x)
    assert str(received.value) == str(expected.value)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        TokenGroupNorm(groups, shape[1])(x.transpose(1, 2))
    two = x.expand(2, -1, -1)
    assert torch.equal(ours(two), torch.zeros_like(two))  # torch asks for more than one value in all, and is near 0 too
    assert theirs(two).abs().max() <= 1e-4
    assert torch.equal(ours(x, lengths=[1]), torch.zeros(shape))


def test_any_leading_axes_of_tokens():
    norm = layer("token")
    x = torch.randn(2, 3, 4, CHANNELS)
    mask = torch.rand(2, 3, 4) < 0.6
    y = norm(x, mask)
    expected = nn.functional.group_norm(x.reshape(-1, CHANNELS), GROUPS, norm.weight, norm.bias).view(x.shape)
    torch.testing.assert_close(y[mask], expected[mask])
    assert (y[~mask] == 0).all()
    lengths = torch.tensor([[4, 0, 2], [1, 3, 4]])
    assert torch.equal(norm(x, lengths=lengths), norm(x, torch.arange(4) < lengths[..., None]))
    torch.testing.assert_close(norm(x[0, 0, 0]), expected[0, 0, 0])
    torch.testing.assert_close(norm(x[0, 0], torch.tensor([1, 1, 1, 1])), expected[0, 0])
    parts = torch.nested.as_nested_tensor([x[0], x[1, :2]], layout=torch.jagged)  # (2, j, 4, channels)
    torch.testing.assert_close(norm(parts).values(), torch.cat([expected[0], expected[1, :2]]))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_to_normalize(kind):
    norm, last = built(kind), kind != "channels first"
    for batch, time in ((0, 4), (3, 0), (0, 0)):
        x = torch.randn((batch, time, CHANNELS) if last else (batch, CHANNELS, time), requires_grad=True)
        y = norm(x, lengths=[0] * batch)
        y.sum().backward()
        assert y.shape == x.grad.shape == x.shape
    rows = torch.randn(0, CHANNELS)
    assert norm(rows, cu_seqlens=torch.tensor([0, 0, 0])).shape == norm(rows, cu_seqlens=torch.tensor([0])).shape
    x = torch.full((2, 3, CHANNELS) if last else (2, CHANNELS, 3), float("nan"))
    assert (norm(x, torch.zeros(2, 3, dtype=torch.bool)) == 0).all()


# --- where nobody passes arguments on ---------------------------------------------------------------------------------


def stack():
    return nn.Sequential(nn.Conv1d(4, CHANNELS, 3, padding=1), SequenceGroupNorm(GROUPS, CHANNELS), nn.ReLU())


FORMS = {
    "bool": lambda mask: mask,
    "integers": lambda mask: mask.int(),
    "(b 1 t)": lambda mask: mask[:, None],
}


@pytest.mark.parametrize("form", FORMS)
def test_given_reaches(form):
    model, x = stack(), torch.randn(3, 4, 8)
    mask = torch.rand(3, 8) < 0.7
    expected = model[2](model[1](model[0](x), mask))
    with given(mask=FORMS[form](mask)):
        assert torch.equal(model(x), expected)
        tokens = TokenGroupNorm(2, 8)
        assert torch.equal(tokens(x.new_ones(3, 8, 8)), tokens(x.new_ones(3, 8, 8), mask))
        assert not torch.equal(model[1](model[0](x), lengths=[8, 8, 8]), model[1](model[0](x)))  # explicit wins
        jagged = torch.nested.nested_tensor_from_jagged(torch.randn(11, CHANNELS), cu_seqlens().new_tensor([0, 4, 11]))
        assert model[1](jagged).shape == jagged.shape  # it knows itself what is valid


def test_given_that_does_not_fit_names_the_layer():
    model, x = stack(), torch.randn(3, 4, 8)
    with (
        given(mask=torch.ones(3, 7, dtype=torch.bool)),
        pytest.raises(ShapeError, match=r"(?s)shape \(3, 7\).*SequenceGroupNorm\(2, 6, .*inside of given\(mask\)"),
    ):
        model(x)
    with (
        given(mask=torch.zeros(3, 8)),
        pytest.raises(SpecError, match=r"(?s)additive.*SequenceGroupNorm\(2, 6, .*inside of given\(mask\)"),
    ):
        model(x)
    with (
        given(cu_seqlens=torch.tensor([0, 9])),
        pytest.raises(ShapeError, match=r"(?s)cu_seqlens.*SequenceGroupNorm\(2, 6, .*given\(cu_seqlens\)"),
    ):
        model[1](torch.randn(8, CHANNELS))


def test_cu_seqlens_are_given_too():
    model = nn.Sequential(nn.Linear(4, CHANNELS), SequenceGroupNorm(GROUPS, CHANNELS), nn.GELU())
    x = torch.randn(sum(LENGTHS), 4)
    expected = model[2](model[1](model[0](x), cu_seqlens=cu_seqlens()))
    for value in (cu_seqlens(), Partition.from_offsets(cu_seqlens())):
        with given(cu_seqlens=value):
            assert torch.equal(model(x), expected)


def test_activation_checkpointing():
    model, x = stack(), torch.randn(3, 4, 8)
    mask = (torch.rand(3, 8) < 0.7).int()
    with given(mask=mask):
        model(x).square().sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]

    model.zero_grad()
    with given(mask=mask):
        y = checkpoint(model, x, use_reentrant=False, context_fn=given.context_fn)
    y.square().sum().backward()
    for p, e in zip(model.parameters(), expected, strict=True):
        assert torch.equal(p.grad, e)

    with given(mask=mask):
        y = checkpoint(model, x, use_reentrant=False)
    with pytest.raises(RuntimeError, match="what was given is gone"):
        y.square().sum().backward()


# --- bad input: the text says what is wrong, what came, and what to type instead --------------------------------------

X = torch.zeros(2, CHANNELS, 5)
ROWS = torch.zeros(5, CHANNELS)
MASK = torch.ones(2, 5, dtype=torch.bool)
ADDITIVE = torch.zeros(2, 5).masked_fill(torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 0, 1]]).bool(), float("-inf"))

BAD = {
    "mask and lengths": (X, {"mask": MASK, "lengths": [5, 3]}, SpecError, r"mask and lengths are given.*one of them"),
    "mask and key_padding_mask": (
        X,
        {"mask": MASK, "key_padding_mask": ~MASK},
        SpecError,
        r"mask and key_padding_mask are given.*mask=a Tensor of torch.bool, shape \(2, 5\).*one of them",
    ),
    "lengths and key_padding_mask": (
        X,
        {"lengths": [5, 3], "key_padding_mask": ~MASK},
        SpecError,
        r"lengths and key_p",
    ),
    "lengths beyond": (
        X,
        {"lengths": torch.tensor([5, 6])},
        ShapeError,
        r"lengths are from 0 to the time of x, 5.*\[5, 6\].*frame_lengths",
    ),
    "lengths negative": (X, {"lengths": [-1, 5]}, ShapeError, r"lengths are from 0.*\[-1, 5\]"),
    "lengths of others": (X, {"lengths": [5, 5, 5]}, ShapeError, r"one value for every sequence: shape \(2,\).*\(3,\)"),
    "lengths in a column": (X, {"lengths": torch.ones(2, 1).long()}, ShapeError, r"\(2, 1\).*lengths.flatten\(\)"),
    "lengths relative": (X, {"lengths": torch.tensor([1.0, 0.4])}, SpecError, r"whole numbers.*\(lengths \* 5\).round"),
    "lengths bool": (X, {"lengths": torch.tensor([True, False])}, SpecError, r"whole numbers.*torch.bool"),
    "lengths listed": (X, {"lengths": [1.5, 2]}, SpecError, r"whole numbers.*\[1.5, 2\]"),
    "lengths int": (X, {"lengths": 3}, SpecError, r"whole numbers.*lengths=3"),
    "mask of ids": (X, {"mask": torch.tensor([[7, 8, 9, 0, 0]] * 2)}, SpecError, r"0 and 1.*from 0 to 9.*padding_id"),
    "mask of -1": (X, {"mask": torch.tensor([[1, 1, 1, 0, -1]] * 2)}, SpecError, r"0 and 1.*from -1 to 1"),
    "mask additive": (X, {"mask": ADDITIVE}, SpecError, r"additive.*from -inf to 0.*mask=\(mask == 0\)"),
    "mask of floats": (X, {"mask": MASK.float()}, SpecError, r"floating one.*mask.bool\(\) for one of 1.0 and 0.0"),
    "mask as list": (X, {"mask": [[1, 0]]}, SpecError, r"mask is a tensor.*torch.as_tensor"),
    "mask of lengths": (X, {"mask": torch.tensor([5, 3])}, SpecError, r"0 and 1.*lengths=..., if these are lengths"),
    "mask turned": (X, {"mask": MASK.T}, ShapeError, r"shape \(2, 5\).*\(5, 2\).*mask.T"),
    "mask of pairs": (
        X,
        {"mask": MASK[:, None, None].expand(2, 1, 5, 5)},
        ShapeError,
        r"\(2, 1, 5, 5\).*pairs of steps",
    ),
    "mask too short": (X, {"mask": MASK[:, :4]}, ShapeError, r"\(2, 4\)"),
    "mask of one": (X, {"mask": MASK[:1]}, ShapeError, r"shape \(2, 5\).*\(1, 5\)"),
    "key_padding_mask additive": (X, {"key_padding_mask": ADDITIVE}, SpecError, r"mask=\(key_padding_mask == 0\)"),
    "key_padding_mask of integers": (X, {"key_padding_mask": MASK.int()}, SpecError, r"mask=key_padding_mask, if 1"),
    "key_padding_mask turned": (X, {"key_padding_mask": MASK.T}, ShapeError, r"key_padding_mask.T"),
    "no tensor": ([1.0], {}, SpecError, r"x is a torch.Tensor.*list"),
    "integers": (X.long(), {"mask": MASK}, SpecError, r"floating or complex tensor"),
    "channels last": (X.transpose(1, 2), {}, ShapeError, r"\(batch, 6, time\).*\(2, 5, 6\).*channels_last=True"),
    "four axes": (X[None], {}, ShapeError, r"\(batch, 6, time\).*three axes"),
    "packed alone": (ROWS, {}, ShapeError, r"\(batch, 6, time\).*cu_seqlens=..."),
    "one sequence": (ROWS.T, {}, ShapeError, r"x.unsqueeze\(0\)"),
    "padded with cu_seqlens": (
        X,
        {"cu_seqlens": torch.tensor([0, 5])},
        ShapeError,
        r"packed x is \(rows, 6\).*if x is pad",
    ),
    "cu_seqlens and lengths": (
        ROWS,
        {"cu_seqlens": torch.tensor([0, 5]), "lengths": [5]},
        ShapeError,
        r"each of them says",
    ),
    "cu_seqlens too long": (
        ROWS,
        {"cu_seqlens": torch.tensor([0, 3, 6])},
        ShapeError,
        r"the rows of x, 5.*\[0, 3, 6\]",
    ),
    "cu_seqlens too short": (ROWS, {"cu_seqlens": torch.tensor([0, 3])}, ShapeError, r"the rows of x, 5.*\[0, 3\]"),
    "cu_seqlens falling": (ROWS, {"cu_seqlens": torch.tensor([0, 4, 3, 5])}, ShapeError, r"never fall"),
    "cu_seqlens of lengths": (ROWS, {"cu_seqlens": torch.tensor([2, 3])}, ShapeError, r"begin with 0.*cumsum"),
    "cu_seqlens floating": (ROWS, {"cu_seqlens": torch.tensor([0.0, 5.0])}, SpecError, r"whole numbers.*torch.float32"),
    "cu_seqlens as list": (ROWS, {"cu_seqlens": [0, 5]}, SpecError, r"a tensor of whole numbers.*\[0, 5\]"),
    "cu_seqlens empty": (ROWS, {"cu_seqlens": torch.tensor([], dtype=torch.long)}, SpecError, r"a tensor of whole"),
    "cu_seqlens of others": (
        ROWS,
        {"cu_seqlens": Partition.from_sizes([4])},
        ShapeError,
        r"Partition\(4 ids.*x of 5 rows",
    ),
    "mask of other rows": (ROWS, {"cu_seqlens": torch.tensor([0, 5]), "mask": MASK}, ShapeError, r"shape \(5,\)"),
    "jagged with lengths": (
        torch.nested.nested_tensor_from_jagged(ROWS, torch.tensor([0, 2, 5])),
        {"lengths": [2, 3]},
        ShapeError,
        r"a jagged tensor says itself what is valid.*norm\(x\)",
    ),
    "jagged of others": (
        torch.nested.nested_tensor_from_jagged(torch.zeros(5, 7), torch.tensor([0, 2, 5])),
        {},
        ShapeError,
        r"x is \(batch, time, 6\)",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    x, told, error, text = BAD[name]
    with pytest.raises(error, match=f"(?s){text}"):
        SequenceGroupNorm(GROUPS, CHANNELS)(x, **told)


@pytest.mark.parametrize(
    ("x", "told", "text"),
    [
        (torch.zeros(2, CHANNELS, 5), {}, r"\(..., 6\).*\(2, 6, 5\).*x.transpose\(1, -1\)"),
        (torch.zeros(2, 5), {}, r"\(..., 6\).*a last axis of size 6"),
        (torch.zeros(()), {}, r"\(..., 6\)"),
        (torch.zeros(CHANNELS), {"lengths": [1]}, r"one token.*norm\(x\)"),
        (torch.zeros(2, 5, CHANNELS), {"lengths": [6, 2]}, r"from 0 to the time of x, 5"),
        (
            torch.nested.nested_tensor_from_jagged(ROWS, torch.tensor([0, 2, 5])).transpose(1, 2),
            {},
            r"last axis is ragged.*transpose\(1, 2\)",
        ),
    ],
)
def test_bad_tokens(x, told, text):
    with pytest.raises(ShapeError, match=f"(?s){text}"):
        TokenGroupNorm(GROUPS, CHANNELS)(x, **told)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_of_the_older_layout_are_refused():
    x = torch.nested.nested_tensor([ROWS, ROWS], layout=torch.strided)
    with pytest.raises(SpecError, match=r"as_nested_tensor\(x.unbind\(\), layout=torch.jagged\)"):
        SequenceGroupNorm(GROUPS, CHANNELS)(x)
    norm = SequenceGroupNorm(GROUPS, CHANNELS)
    y = norm(torch.nested.as_nested_tensor(x.unbind(), layout=torch.jagged))
    assert torch.equal(y.unbind()[0], norm(ROWS.T[None])[0].T)


@pytest.mark.parametrize("cls", [TokenGroupNorm, SequenceGroupNorm])
def test_bad_groups(cls):
    with pytest.raises(ShapeError, match=r"(?s)size 6, which is not divisible by 4.*1, 2, 3, 6"):
        cls(4, CHANNELS)


def test_masks_of_several_axes():
    assert as_mask(batch=2, time=3) is None
    lengths = torch.tensor([[1, 2], [0, 3]])
    expected = torch.tensor([[[1, 0, 0], [1, 1, 0]], [[0, 0, 0], [1, 1, 1]]]).bool()
    assert torch.equal(as_mask(lengths=lengths, batch=(2, 2), time=3), expected)
    assert torch.equal(as_mask(expected[:, :, None].int(), batch=(2, 2), time=3), expected)
    one = torch.ones(1, 1, 1, dtype=torch.bool)
    assert as_mask(one, batch=1, time=1).shape == (1, 1)
    assert as_mask(lengths=[1], batch=1, time=2, device="meta").is_meta
    assert as_mask(torch.ones(2, 3, dtype=torch.int64, device="meta"), batch=2, time=3).shape == (2, 3)


# --- lengths behind convolutions --------------------------------------------------------------------------------------

WINDOWS = [
    *(
        nn.Conv1d(1, 1, k, stride=s, padding=p, dilation=d)
        for k, s, p, d in [(1, 1, 0, 1), (3, 2, 1, 1), (10, 5, 0, 1), (3, 3, 4, 2), (2, 4, 0, 3), (5, 1, 2, 1)]
    ),
    nn.Conv1d(1, 1, 4, padding="same", dilation=2),
    nn.Conv1d(1, 1, 4, padding="valid", stride=2),
    nn.MaxPool1d(2),
    nn.MaxPool1d(3, 2, padding=1, dilation=2),
    nn.AvgPool1d(4, 3, padding=2),
    *(nn.MaxPool1d(k, s, padding=p, ceil_mode=True) for k, s, p in [(2, 2, 0), (3, 2, 1), (2, 3, 1), (4, 5, 2)]),
    *(nn.AvgPool1d(k, s, padding=p, ceil_mode=True) for k, s, p in [(2, 2, 0), (3, 2, 1), (2, 3, 1), (4, 5, 2)]),
    nn.ConvTranspose1d(1, 1, 4, stride=3, padding=1, output_padding=2, dilation=2),
    nn.ConvTranspose1d(1, 1, 1, stride=2),
    nn.Sequential(nn.Conv1d(1, 2, 3, stride=2), nn.GroupNorm(1, 2), nn.GELU(), nn.Dropout(), nn.MaxPool1d(2)),
]


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_frame_lengths_are_those_of_the_module(window):
    lengths = torch.arange(60)
    frames = frame_lengths(lengths, window)
    assert frames[0] == 0
    possible = 0
    for length, frame in zip(lengths.tolist(), frames.tolist(), strict=True):
        try:
            expected = window(torch.zeros(1, 1, length)).shape[-1] if length else 0
        except RuntimeError:  # torch refuses what is shorter than the window
            expected = 0
        possible += expected > 0
        assert frame == expected
    assert possible >= 40


def test_frame_lengths_of_tuples_and_several_layers():
    lengths = torch.tensor([[3200, 1600], [400, 10]], dtype=torch.int32)
    convs = [nn.Conv1d(1, 1, k, stride=s) for k, s in [(10, 5), (3, 2), (3, 2), (3, 2), (3, 2), (2, 2), (2, 2)]]
    expected = frame_lengths(lengths, *convs)
    assert expected.dtype == torch.int32
    assert expected.tolist() == [[9, 4], [1, 0]]  # 20 ms a frame, 25 ms seen, of 16 kHz
    assert torch.equal(frame_lengths(lengths, convs), expected)
    assert torch.equal(frame_lengths(lengths, nn.ModuleList(convs)), expected)
    assert torch.equal(frame_lengths(lengths, [(10, 5), *[(3, 2)] * 4, (2, 2), (2, 2, 0, 1)]), expected)
    centered = torch.stft(torch.zeros(1000), 64, 16, window=torch.ones(64), return_complex=True).shape[-1]
    assert frame_lengths([1000], (64, 16, 32)).tolist() == [centered]


def test_frame_lengths_of_one_axis_of_several():
    subsampling = nn.Sequential(nn.Conv2d(1, 4, (3, 5), stride=(2, 1)), nn.ReLU(), nn.MaxPool2d((1, 2), (1, 2)))
    time, mel = subsampling(torch.zeros(1, 1, 37, 80)).shape[2:]
    assert frame_lengths([37], subsampling, axis=0).tolist() == [time]
    assert frame_lengths([80], subsampling, axis=1).tolist() == frame_lengths([80], subsampling).tolist() == [mel]


@pytest.mark.parametrize(
    "unknown", [nn.LSTM(3, 3), nn.Linear(3, 3), nn.AdaptiveAvgPool1d(3), nn.GLU(), nn.Flatten(), "x"]
)
def test_frame_lengths_never_guess(unknown):
    name = unknown if isinstance(unknown, str) else type(unknown).__name__
    with pytest.raises(SpecError, match=f"(?s)frame_lengths knows.*{name}.*isinstance"):
        frame_lengths([9, 5], nn.Conv1d(1, 1, 3), unknown)
    with pytest.raises(SpecError, match=r"(?s)whole numbers.*lengths.round"):
        frame_lengths(torch.tensor([9.0]), (3,))


@pytest.mark.extras
def test_frame_lengths_of_transformers():
    transformers = importlib.import_module("transformers")
    config = transformers.Wav2Vec2Config(
        num_hidden_layers=1, hidden_size=16, num_attention_heads=2, intermediate_size=16
    )
    model = transformers.Wav2Vec2Model(config)
    convolutions = [m for m in model.feature_extractor.modules() if isinstance(m, nn.Conv1d)]
    lengths = torch.arange(400, 4000, 7)
    assert torch.equal(frame_lengths(lengths, convolutions), model._get_feat_extract_output_lengths(lengths))

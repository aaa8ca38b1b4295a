"""Streams: chunk by chunk, and cumulated along an axis, a result is what all that came before says, and nothing else.

The definition is a loop over prefixes: at every place, the oracle's result for x up to and with it.
"""

import copy
import functools
import math
import pickle

import cases
import oracle
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from flexnorm import Moments, Norm, Partition, ShapeError, SpecError, given, moments, normalize

F32 = torch.finfo(torch.float32).eps
D = torch.float64
CLOSE = {"rtol": 1e-10, "atol": 1e-10}  # sums of some ten terms in float64, divided by sigma > 0.1


def bare(side, rank):
    """From an axis that stands by itself on a side of a pattern to its place."""
    return {group[0]: place for place, group in enumerate(oracle.read(side, rank)) if len(group) == 1}


def inside(side, rank, name):
    """Whether an axis is part of a composition or of what a label is looked up by."""
    atoms = [atom for group in oracle.read(side, rank) if len(group) > 1 for atom in group]
    atoms += [atom for group in oracle.read(side, rank) for atom in group if "[" in atom]
    return any(name == atom or name in atom.split("[")[-1].rstrip("]").split() for atom in atoms)


class Stream:
    """A case of the table along one of its pooled axes: what of its tensors belongs to a part of it."""

    def __init__(self, case, axis):
        self.case, self.axis = case, axis
        x, *mask = case.pattern.split("->")[0].split(",")
        rank = oracle.Pattern(case.pattern, case.shape, case.sizes).rank
        self.place = bare(x, rank)[axis]
        self.size = case.shape[self.place]
        self.mask_place = bare(mask[0], rank).get(axis) if mask else None
        self.whole = bool(mask) and inside(mask[0], rank, axis)  # its mask cannot be cut
        self.label_places = {}
        sides = [case.pattern.split("->")[1], case.affine or ""]
        for atom in (atom for side in sides for group in oracle.read(side, rank) for atom in group if "[" in atom):
            name, axes = atom.rstrip("]").split("[")
            self.label_places[name.strip()] = bare(axes, rank).get(axis)
        self.param_place = bare(case.affine or "", rank).get(axis)
        self.whole |= inside(case.affine or "", rank, axis) and "[" not in case.affine
        self.kept = axis in {name for group in oracle.read(sides[0], rank) for name in group}

    def part(self, x, kwargs, start, stop):
        """x and the arguments of what lies from start to stop."""

        def cut(t, place):
            return t if t is None or place is None else t.narrow(place, start, stop - start)

        labels = {name: Partition(cut(p.ids, self.label_places[name]), p.count) for name, p in kwargs["labels"].items()}
        params = {name: cut(kwargs[name], self.param_place) for name in ("weight", "bias") if name in kwargs}
        mask = {"mask": cut(kwargs["mask"], self.mask_place)} if "mask" in kwargs else {}
        return cut(x, self.place), {**kwargs, "labels": labels, **params, **mask}


def streams():
    for case in cases.CASES:
        if not case.shape:
            continue
        rank = oracle.Pattern(case.pattern, case.shape, case.sizes).rank
        for axis in bare(case.pattern.split("->")[0].split(",")[0], rank):
            if axis.isidentifier() and not axis.startswith("dot"):
                stream = Stream(case, axis)
                if not (stream.kept or stream.whole):
                    yield stream


STREAMS = {f"{stream.case.name}-{stream.axis}": stream for stream in streams()}
every = pytest.mark.parametrize("name", STREAMS)


def prefixes(stream, x, kwargs):
    """The definition, in float64 and loops."""
    last = []
    for stop in range(1, stream.size + 1):
        part, given = stream.part(x, kwargs, 0, stop)
        last.append(oracle.normalize(part, stream.case.pattern, **given).narrow(stream.place, stop - 1, 1))
    return torch.cat(last, stream.place)


@functools.cache
def expected(name):
    """Arguments that require gradients, the loop's result, a gradient of it and those of the arguments."""
    stream = STREAMS[name]
    x, kwargs = cases.arguments(stream.case, requires_grad=True)
    y = prefixes(stream, x, kwargs)
    dy = torch.randn(y.shape, dtype=D, generator=torch.Generator().manual_seed(1))
    leaves = cases.leaves(x, kwargs)
    return x, kwargs, y.detach(), dy, torch.autograd.grad(y, leaves, dy)


def compare(name, y, leaves, atol=1e-10):
    _, _, result, dy, grads = expected(name)
    torch.testing.assert_close(y, result, rtol=1e-10, atol=atol)
    for ours, theirs in zip(torch.autograd.grad(y, leaves, dy), grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)  # of 1 / sigma^3, as the first places have


@every
def test_cumulative_is_a_loop_over_prefixes(name):
    x, kwargs, *_ = expected(name)
    stream = STREAMS[name]
    compare(name, normalize(x, stream.case.pattern, cumulative=stream.axis, **kwargs), cases.leaves(x, kwargs))


def layer(stream, kwargs):
    """The same as a layer with the same parameters."""
    case = stream.case
    sizes = oracle.Pattern(case.pattern, case.shape, case.sizes).sizes if case.affine else case.sizes
    axes = {atom for group in oracle.read(case.affine or "") for atom in group}
    norm = Norm(
        case.pattern,
        affine=case.affine,
        sizes={**case.sizes, **{axis: size for axis, size in sizes.items() if axis in axes}},
        labels={name: p.count for name, p in kwargs["labels"].items()},
        cumulative=stream.axis,
        dtype=D,
        **case.options,
    )
    if case.affine:
        norm.weight, norm.bias = (nn.Parameter(kwargs[name].detach().clone()) for name in ("weight", "bias"))
    return norm


def steps(norm, stream, x, kwargs, chunks):
    ys, state, start = [], None, 0
    for chunk in chunks:
        part, given = stream.part(x, kwargs, start, start + chunk)
        y, state = norm.step(part, state, given.get("mask"), labels=given["labels"])
        ys.append(y)
        start += chunk
    return torch.cat(ys, stream.place), state


def uneven(size):
    """Nothing, one, nothing, two, and the rest."""
    return [0, 1, 0, min(2, size - 1), max(size - 3, 0)]


@every
@pytest.mark.parametrize("split", [uneven, lambda size: [1] * size], ids=["uneven", "ones"])
def test_steps_are_a_loop_over_prefixes(name, split):
    stream = STREAMS[name]
    if stream.param_place is not None:
        return  # a weight for every place is one of no length
    x, kwargs, *_ = expected(name)
    norm = layer(stream, kwargs)
    y, state = steps(norm, stream, x, kwargs, split(stream.size))
    leaves = [t for t in (x, kwargs.get("mask"), norm.weight, norm.bias) if t is not None and t.requires_grad]
    compare(name, y, leaves)
    count, mean, m2 = oracle.moments(x.detach(), stream.case.pattern, kwargs.get("mask"), sizes=stream.case.sizes,
                                     labels=kwargs["labels"])  # fmt: skip
    torch.testing.assert_close(state[0].double(), count, **CLOSE)
    torch.testing.assert_close(state[1] + state[3], mean, **CLOSE)
    torch.testing.assert_close(state[2], m2, **CLOSE)


def test_there_are_streams_of_every_kind():
    kinds = {"utterance-t", "masked_rms-t", "weights-t", "weighted_labels-v", "regions-h", "silu-t", "packed-t",
             "node_types-v", "label_all-v", "voxels-d", "bands-f"}  # fmt: skip
    assert kinds <= STREAMS.keys()


def by_prefixes(x, pattern):
    """The definition, along the last axis."""
    return torch.stack([oracle.normalize(x[..., :end], pattern)[..., -1] for end in range(1, x.shape[-1] + 1)], -1)


def in_steps(norm, x, chunks=(2, 1, 3)):
    ys, state = [], None
    for part in x.split(chunks, -1):
        y, state = norm.step(part, state)
        ys.append(y)
    return torch.cat(ys, -1)


# --- precision: float32 at offsets -----------------------------------------------------------------------------------


def within(y, x, pattern, chunks, **kwargs):
    """y in float32, against the loop of the same numbers in float64.

    A merge rounds M2 and the deviation of the mean, at most 8 times by eps / 2 of the largest deviation so far; there
    are as many one after another as chunks, and twice log2 of each of them. The offset is in none of it, as the mean is
    known to twice the precision.
    """
    merges = sum(1 + 2 * math.ceil(math.log2(chunk)) for chunk in chunks if chunk > 0)
    for stop in range(1, x.shape[-1] + 1):
        wide = x[..., :stop].double()
        given = {k: v[..., :stop] if k == "mask" else v for k, v in kwargs.items()}
        exact = oracle.normalize(wide, pattern, **given)[..., -1]
        spread = (wide - wide.mean()).abs().max() / (wide.var(-1, correction=0).min() + 1e-5).sqrt()
        bound = (4 * merges + 8) * F32 * (spread + exact.abs())
        assert ((y[..., stop - 1].double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("offset", [0.0, 1e3])
@pytest.mark.parametrize("chunks", [[33], [1] * 33, [5, 0, 1, 27], [32, 1]])
def test_float32_is_exact_at_an_offset(chunks, offset):
    x = torch.randn(1, 2, 33) + offset
    x[..., 20:] += 5  # the mean moves
    y = in_steps(Norm("b c t -> b c", cumulative="t"), x, chunks)
    assert y.dtype == torch.float32
    within(y, x, "b c t -> b c", chunks)


@pytest.mark.parametrize("offset", [0.0, 1e3])
@pytest.mark.parametrize("chunks", [[33], [1] * 33, [5, 0, 1, 27]])
def test_gradients_in_float32_are_exact_at_an_offset(chunks, offset):
    """The first place is left out: it is 0 / sqrt(eps), and its gradient the difference of two terms of 300."""
    x = torch.randn(1, 2, 33)
    x[..., :2] = torch.tensor([2.0, -2.0])  # sigma is 1 or so, everywhere
    x = (x + offset).requires_grad_()
    wide = x.detach().double().requires_grad_()
    dy = torch.randn(1, 2, 33) * (torch.arange(33) > 0)
    (exact,) = torch.autograd.grad(by_prefixes(wide, "b c t -> b c"), wide, dy.double())
    y = in_steps(Norm("b c t -> b c", cumulative="t"), x, chunks)
    (dx,) = torch.autograd.grad(y, x, dy)
    # Every merge passes 8 rounded terms on, of at most |dy| (1 + xhat^2) / sigma each; 33 of them add up.
    merges = sum(1 + 2 * math.ceil(math.log2(chunk)) for chunk in chunks if chunk > 0)
    terms = float(dy.abs().max() * (1 + y.detach().square().max()))
    torch.testing.assert_close(dx.double(), exact, rtol=0, atol=(4 * merges + 8) * F32 * terms)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_a_state_in_float32(dtype):
    norm, x = Norm("b c t -> b c", cumulative="t"), (torch.randn(2, 3, 9) + 3).to(dtype)
    first, state = norm.step(x[..., :4])
    second, state = norm.step(x[..., 4:], state)
    assert [t.dtype for t in state] == [torch.int64, torch.float32, torch.float32, torch.float32]
    y = torch.cat([first, second], -1)
    assert y.dtype == dtype
    wide = normalize(x.float(), "b c t -> b c", cumulative="t")  # of the same numbers, before they are rounded
    torch.testing.assert_close(y.float(), wide, rtol=torch.finfo(dtype).eps, atol=8 * F32)


def test_equal_values_give_exactly_nothing():
    x = torch.full((2, 3, 11), 1000.3)
    norm = Norm("b c t -> b c", cumulative="t")
    first, state = norm.step(x[..., :5])
    second, state = norm.step(x[..., 5:], state)
    assert not torch.cat([first, second, norm(x)], -1).any()
    assert not state[2].any()
    assert torch.equal(state[1], x[..., 0])


# --- moments that are carried ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, D])
def test_moments_of_tiles_normalize_the_image(dtype):
    x = (torch.randn(2, 3, 6, 7, dtype=D) + 100).to(dtype).requires_grad_()
    tiles = [tile for row in x.split([4, 2], 2) for tile in row.split([3, 1, 3], 3)]
    whole = functools.reduce(Moments.merge, [moments(tile, "n c h w -> n c") for tile in tiles])
    parts = [normalize(tile, "n c h w -> n c", moments=whole) for tile in tiles]
    y = torch.cat([torch.cat(parts[:3], 3), torch.cat(parts[3:], 3)], 2)
    wide = x.detach().double().requires_grad_()
    exact = oracle.normalize(wide, "n c h w -> n c")
    # 42 elements in 6 tiles: 6 merges of 8 roundings, of deviations of at most 4 sigma
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=48 * eps * 4)
    dy = torch.randn(y.shape, dtype=dtype)
    (ours,), (theirs,) = torch.autograd.grad(y, x, dy), torch.autograd.grad(exact, wide, dy.double())
    torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=48 * eps * 4 * float(dy.abs().max()))


def test_moments_carried_over_chunks_are_causal_by_hand():
    """The loop that `step` is for chunks of one place, written by a user."""
    x, m, ys = torch.randn(2, 3, 7, dtype=D), None, []
    for t in range(7):
        new = moments(x[..., t : t + 1], "b c t -> b c")
        m = new if m is None else m.merge(new)
        ys.append(normalize(x[..., t : t + 1], "b c t -> b c", moments=m))
    torch.testing.assert_close(torch.cat(ys, -1), normalize(x, "b c t -> b c", cumulative="t"), **CLOSE)


@pytest.mark.parametrize("axis", [0, 1, -1, -2])
@pytest.mark.parametrize("size", [0, 1, 2, 3, 4, 5, 8, 13])
def test_cumulative_moments_are_those_of_prefixes(axis, size):
    shape = [3, 2]
    shape[axis] = size
    parts = moments(torch.randn(*shape, 4, dtype=D) + 10, "a b e -> a b")
    ours = parts.cumulative(axis)
    assert ours.mean.shape == parts.mean.shape
    for stop in range(1, size + 1):
        cut = Moments(*(t.narrow(axis, 0, stop) for t in (parts.count, parts.mean, parts.m2, parts.low)))
        whole = cut.coarsen("a b -> b" if axis % 2 == 0 else "a b -> a")
        assert torch.equal(ours.count.select(axis, stop - 1), whole.count)
        torch.testing.assert_close(ours.mean.select(axis, stop - 1), whole.mean, **CLOSE)
        torch.testing.assert_close(ours.m2.select(axis, stop - 1), whole.m2, **CLOSE)
    with pytest.raises(ShapeError, match="the axis is one of the moments"):
        parts.cumulative(2)


# --- causality, bit for bit ------------------------------------------------------------------------------------------

CAUSAL = [
    ("b c t -> b c", (2, 3), {}),
    ("b (g c) t -> b g", (2, 6), {"sizes": {"g": 2}}),
    ("b c t -> c", (3, 2), {"center": False}),
    ("b c f t -> b", (2, 3, 5), {}),
    ("b c t -> b c", (2, 3), {"scale": False, "activation": "gelu"}),
    ("b c t -> kind[c]", (2, 3), {"labels": {"kind": torch.tensor([1, 0, 1])}}),
]


@pytest.mark.parametrize("dtype", [torch.float32, D, torch.bfloat16])
@pytest.mark.parametrize(("pattern", "lead", "kwargs"), CAUSAL)
def test_nothing_depends_on_the_future(pattern, lead, kwargs, dtype):
    stat = D if dtype == D else torch.float32
    for size in (1, 2, 3, 7, 8, 16, 21):
        x = (torch.randn(*lead, size) + 3).to(dtype)
        y = normalize(x, pattern, cumulative="t", **kwargs)
        for now in {1, size // 2, size - 1} - {0}:
            futures = [torch.full_like(x[..., now:], value) for value in (math.nan, math.inf, 0.0)]
            futures.append(1e4 * torch.randn(*lead, size - now).to(dtype))
            for future in futures:
                z = normalize(torch.cat([x[..., :now], future], -1), pattern, cumulative="t", **kwargs)
                assert torch.equal(z[..., :now], y[..., :now]), (size, now)
            for length in {0, 1, size + 2}:
                future = 1e4 * torch.randn(*lead, length).to(dtype)
                z = normalize(torch.cat([x[..., :now], future], -1), pattern, cumulative="t", **kwargs)
                # One element at every place; but torch's gelu has other bits where a vector is not full.
                if pattern.endswith("-> b c") and "activation" not in kwargs:
                    assert torch.equal(z[..., :now], y[..., :now]), (size, now, length)
                # What stands at one place is summed in an order that the length may say: 30 elements at most, of which
                # each is rounded once more or less; a result that was rounded may be its neighbour.
                close = 30 * torch.finfo(stat).eps * max(1, float(y[..., :now].abs().max()))
                torch.testing.assert_close(z[..., :now], y[..., :now], rtol=torch.finfo(dtype).eps, atol=close)


def test_the_past_has_no_gradient_of_the_future():
    """Where the loss is of the past alone, the gradient is that of the past alone, to the last bit."""
    x = torch.randn(2, 3, 9)
    grads = []
    for future in (x[..., 6:], 1e3 * torch.randn(2, 3, 5)):
        z = torch.cat([x[..., :6], future], -1).requires_grad_()
        y = normalize(z, "b c t -> b c", cumulative="t")
        (dz,) = torch.autograd.grad(y[..., :6].pow(3).sum(), z)
        assert not dz[..., 6:].any()
        grads.append(dz[..., :6])
    assert grads[0].abs().max() > 1e-3
    assert torch.equal(*grads)


def test_padding_is_not_seen_in_any_step():
    """What a bool mask leaves out may hold anything, in values, states and gradients."""
    x, mask = torch.randn(2, 3, 8), torch.arange(8) < torch.tensor([[5], [8]])
    results = []
    for padding in (0.0, math.nan, math.inf):
        z = x.where(mask[:, None], padding).requires_grad_()
        norm, state, ys = Norm("b c t, b t -> b c", cumulative="t"), None, []
        for start, stop in ((0, 3), (3, 6), (6, 8)):
            y, state = norm.step(z[..., start:stop], state, mask[:, start:stop])
            ys.append(y)
        y = torch.cat(ys, -1)
        results.append([y, *state, *torch.autograd.grad(y.pow(3).sum(), z)])
    assert results[0][1].tolist() == [[5] * 3, [8] * 3]
    assert not results[0][0][0, :, 5:].any()
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_weights_of_nothing_at_first():
    x, w = torch.randn(2, 3, 6, dtype=D), torch.rand(2, 6, dtype=D)
    w[:, :3] = 0
    norm = Norm("b c t, b t -> b c", cumulative="t")
    first, state = norm.step(x[..., :2], None, w[:, :2])
    assert not first.any()
    second, _ = norm.step(x[..., 2:], state, w[:, 2:])
    y = torch.cat([first, second], -1)
    torch.testing.assert_close(y, norm(x, w), **CLOSE)
    ends = range(1, 7)
    exact = [oracle.normalize(x[..., :end], "b c t, b t -> b c", w[:, :end])[..., -1] for end in ends]
    torch.testing.assert_close(y, torch.stack(exact, -1), **CLOSE)


# --- the layer -------------------------------------------------------------------------------------------------------


def test_zeros_are_the_first_state():
    """As graphs want it, which have no None."""
    norm, x = Norm("b c t -> b c", cumulative="t"), torch.randn(2, 3, 5)
    zeros = (torch.zeros(2, 3, dtype=torch.int64), *(torch.zeros(2, 3) for _ in range(3)))
    for state in (zeros, list(zeros), tuple(t.float() for t in zeros)):
        y, after = norm.step(x, state)
        assert torch.equal(y, norm.step(x)[0])
        assert [t.dtype for t in after] == [t.dtype for t in state]
        assert torch.equal(y, norm.step(x, None)[0])


def test_a_stream_that_changes_keeps_what_it_was():
    """Weights are not cut to whole numbers, nor float64 to float32, by the chunk that comes next."""
    norm = Norm("b c t, b t -> b c", cumulative="t")
    x, w, ones = torch.randn(2, 3, 5, dtype=D), torch.rand(2, 4, dtype=D), torch.ones(2, 1, dtype=D)
    _, state = norm.step(x[..., :4], None, w)
    y, after = norm.step(x[..., 4:], state)
    expected = norm(x, torch.cat([w, ones], -1))
    torch.testing.assert_close(y, expected[..., 4:], **CLOSE)
    torch.testing.assert_close(after[0], (w.sum(1) + 1)[:, None].expand(2, 3), **CLOSE)
    y, after = norm.step(x[..., 4:].float(), state)
    assert y.dtype == torch.float32
    assert all(t.dtype == D for t in after)


def test_gradients_end_where_the_state_is_detached():
    norm, x = Norm("b c t -> b c", cumulative="t"), torch.randn(1, 2, 6, requires_grad=True)
    _, state = norm.step(x[..., :3])
    y, _ = norm.step(x[..., 3:], tuple(t.detach() for t in state))
    (dx,) = torch.autograd.grad(y.pow(3).sum(), x)
    assert not dx[..., :3].any()
    assert dx[..., 3:].any()
    (through,) = torch.autograd.grad(norm.step(x[..., 3:], norm.step(x[..., :3])[1])[0].pow(3).sum(), x)
    assert through[..., :3].any()


def test_conditional_and_affine_of_a_chunk():
    norm = Norm("b (g c) t -> b g", g=2, c=2, affine="(g c)", conditional="b (g c)", activation="silu", cumulative="t")
    norm = norm.double()
    for p in norm.parameters():
        nn.init.normal_(p)
    x, w, b = torch.randn(2, 4, 5, dtype=D), torch.randn(2, 4, dtype=D), torch.randn(2, 4, dtype=D)
    first, state = norm.step(x[..., :2], weight=w, bias=b)
    second, _ = norm.step(x[..., 2:], state, weight=w, bias=b)
    plain = torch.stack(
        [oracle.normalize(x[..., : t + 1], "b (g c) t -> b g", sizes={"g": 2})[..., t] for t in range(5)], -1
    )
    learned = plain * norm.weight[:, None] + norm.bias[:, None]
    exact = nn.functional.silu(learned * w[..., None] + b[..., None])
    torch.testing.assert_close(torch.cat([first, second], -1), exact, **CLOSE)
    torch.testing.assert_close(norm(x, weight=w, bias=b), exact, **CLOSE)


def test_static_labels_and_labels_given_around():
    x, ids = torch.randn(2, 4, 6, dtype=D), torch.tensor([0, 1, 1, 0])
    static, dynamic = (Norm("b c t -> b kind[c]", cumulative="t", kind=kind) for kind in (ids, 2))
    exact = torch.stack(
        [oracle.normalize(x[..., : t + 1], "b c t -> b kind[c]", labels={"kind": ids})[..., t] for t in range(6)], -1
    )
    for norm, around in ((static, {}), (dynamic, {"kind": ids})):
        with given(**around):
            first, state = norm.step(x[..., :4])
            second, _ = norm.step(x[..., 4:], state)
        torch.testing.assert_close(torch.cat([first, second], -1), exact, **CLOSE)
    with pytest.raises(SpecError, match="static label"):
        static.step(x, kind=ids)
    with pytest.raises(SpecError, match="'kind' is read, and not given"):
        dynamic.step(x)


def test_a_mask_given_around():
    norm, x = Norm("b c t, b t -> b c", cumulative="t"), torch.randn(2, 3, 5)
    mask = torch.rand(2, 5) < 0.5
    y, state = norm.step(x, None, mask)
    with given(mask=mask):
        around, other = norm.step(x)
    assert torch.equal(around, y)
    assert all(torch.equal(a, b) for a, b in zip(state, other, strict=True))
    assert not torch.equal(norm.step(x)[0], y)


def test_moments_that_a_cumulative_layer_returns():
    norm, x = Norm("b c t -> b c", cumulative="t"), torch.randn(2, 3, 5, dtype=D)
    y, m = norm(x, return_moments=True)
    assert m.mean.shape == (2, 3, 5)
    torch.testing.assert_close(m.mean, x.cumsum(-1) / torch.arange(1, 6), **CLOSE)
    assert torch.equal(norm(x, moments=m), y)
    assert torch.equal(normalize(x, "b c t -> b c", cumulative="t", moments=m), y)


@pytest.mark.parametrize("travel", [copy.deepcopy, lambda norm: pickle.loads(pickle.dumps(norm))])
def test_travels(travel):
    norm = Norm("b (g c) t -> b g", g=2, c=2, affine="(g c)", cumulative="t")
    nn.init.normal_(norm.weight)
    x = torch.randn(2, 4, 5)
    _, state = norm.step(x)
    other = travel(norm)
    assert repr(other) == repr(norm)
    assert "cumulative='t'" in repr(norm)
    assert torch.equal(other(x), norm(x))
    state = travel(tuple(t.detach() for t in state))
    assert torch.equal(other.step(x, state)[0], norm.step(x, state)[0])


def test_checkpointing_repeats_a_step():
    norm, x = Norm("b c t -> b c", cumulative="t"), torch.randn(2, 3, 6, dtype=D, requires_grad=True)

    def f(x, *state):
        y, state = norm.step(x, state or None)
        return y, *state

    grads = []
    for call in (f, lambda *args: checkpoint(f, *args, use_reentrant=False)):
        first, *state = call(x[..., :4])
        second, *_ = call(x[..., 4:], *state)
        grads.append(torch.autograd.grad(torch.cat([first, second], -1).pow(3).sum(), x)[0])
    assert torch.equal(*grads)


def test_checkpointing_without_what_was_given():
    norm, x = Norm("b c t, b t -> b c", cumulative="t"), torch.randn(2, 3, 6, requires_grad=True)
    with given(mask=torch.rand(2, 6) < 0.5):
        y = checkpoint(lambda x: norm.step(x)[0], x, use_reentrant=False)
    with pytest.raises(RuntimeError, match="what was given is gone"):
        y.sum().backward()


# --- transforms and graphs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("center", [True, False])
def test_jvp_vmap_and_hessian_through_steps(center):
    norm = Norm("c t -> c", cumulative="t", center=center)
    xs, tangent = torch.randn(4, 2, 6, dtype=D), torch.randn(2, 6, dtype=D)

    def formula(x):
        ends = torch.arange(1, 7, dtype=D)
        mean = x.cumsum(-1) / ends if center else torch.zeros_like(x)
        rows = [(x[:, : t + 1] - mean[:, t : t + 1]).square().mean(-1) for t in range(6)]
        return (x - mean) / (torch.stack(rows, -1) + 1e-5).sqrt()

    def loss(f):
        return lambda x: f(x)[:, 1:].pow(3).sum()  # the first place has a derivative of 1 / sqrt(eps), twice

    for ours in (functools.partial(in_steps, norm), norm):
        y, dy = torch.func.jvp(ours, (xs[0],), (tangent,))
        expected, derivative = torch.func.jvp(formula, (xs[0],), (tangent,))
        torch.testing.assert_close(y, expected, **CLOSE)
        torch.testing.assert_close(dy, derivative, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(torch.func.vmap(ours)(xs), torch.stack([formula(x) for x in xs]), **CLOSE)
        grads = torch.func.vmap(torch.func.grad(loss(ours)))(xs)
        torch.testing.assert_close(grads, torch.stack([torch.func.grad(loss(formula))(x) for x in xs]), **CLOSE)
        hessian = torch.func.hessian(loss(ours))(xs[0])
        torch.testing.assert_close(hessian, torch.func.hessian(loss(formula))(xs[0]), rtol=1e-7, atol=1e-7)


class Step(nn.Module):
    """A state comes in and goes out, as graphs want it."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x, mask, count, mean, m2, low):
        return self.norm.step(x, (count, mean, m2, low), mask)


def test_an_exported_step_runs_in_a_loop():
    norm = Norm("b (g c) t, b t -> b g", g=2, c=2, affine="(g c)", cumulative="t", dtype=D)
    nn.init.normal_(norm.weight)
    model = Step(norm)

    def zeros(b):
        return (torch.zeros(b, 2, dtype=torch.int64), *(torch.zeros(b, 2, dtype=D) for _ in range(3)))

    batch = torch.export.Dim("batch", min=2)
    example = (torch.randn(3, 4, 5, dtype=D), torch.rand(3, 5) < 0.7, *zeros(3))
    program = torch.export.export(model, example, dynamic_shapes=tuple({0: batch} for _ in example))
    assert all("flexnorm" not in str(node.target) for node in program.graph.nodes)
    exported = program.module()
    x, mask = torch.randn(7, 4, 15, dtype=D), torch.rand(7, 15) < 0.7
    state, ys = zeros(7), []
    for part, keep in zip(x.split(5, -1), mask.split(5, -1), strict=True):
        y, state = exported(part, keep, *state)
        ys.append(y)
    torch.testing.assert_close(torch.cat(ys, -1), norm(x, mask), **CLOSE)


# --- spectrograms ----------------------------------------------------------------------------------------------------


@pytest.mark.extras
@pytest.mark.parametrize("shape", [(2, 4, 11), (2, 1, 4, 11)])
@pytest.mark.parametrize("scale", [True, False])
def test_cepstral_norm_in_steps(shape, scale):
    from flexnorm.spectrograms import CepstralNorm

    norm, x = CepstralNorm("cumulative", scale=scale), torch.randn(shape, dtype=D) - 20
    lengths = torch.tensor([7, 11])
    for mask in (None, torch.arange(11) < lengths[:, None]):
        state, ys = None, []
        for start, stop in ((0, 4), (4, 4), (4, 5), (5, 11)):
            y, state = norm.step(x[..., start:stop], state, None if mask is None else mask[:, start:stop])
            ys.append(y)
        y = torch.cat(ys, -1)
        offline = norm(x, lengths if mask is not None else None)
        torch.testing.assert_close(y, offline, rtol=1e-9, atol=1e-9)
        for b, size in enumerate(lengths.tolist() if mask is not None else (11, 11)):
            for t in range(size):
                past = x[b, ..., : t + 1]
                value = (past[..., t] - past.mean(-1)) / ((past.var(-1, correction=0) + 1e-5).sqrt() if scale else 1)
                torch.testing.assert_close(y[b, ..., t], value, rtol=1e-9, atol=1e-9)
            assert not y[b, ..., size:].any()
    with pytest.raises(SpecError, match="knows the axis"):
        CepstralNorm("utterance").step(x)


# --- errors ----------------------------------------------------------------------------------------------------------


def test_errors_of_cumulative():
    for pattern, name in (("b c t -> b c", "c"), ("b c t -> b c", "z"), ("b ... -> b", "..."), ("b c t -> b c", 3)):
        with pytest.raises(SpecError, match="cumulative names one pooled axis of x"):
            Norm(pattern, cumulative=name)
        with pytest.raises(SpecError, match="cumulative names one pooled axis of x"):
            normalize(torch.randn(2, 3, 4), pattern, cumulative=name)
    with pytest.raises(SpecError, match="none run on"):
        Norm("b c t -> c", c=3, cumulative="t", track_running_stats=True)
    x = torch.randn(2, 3, 4)
    m = moments(x, "b c t -> b c")
    with pytest.raises(ShapeError, match=r"shaped as the right side says: shape \(2, 3, 4\)"):
        normalize(x, "b c t -> b c", cumulative="t", moments=m)


def test_errors_of_step():
    norm, x = Norm("b c t -> b c", cumulative="t"), torch.randn(2, 3, 4)
    with pytest.raises(SpecError, match="knows the axis they go along"):
        Norm("b c t -> b c").step(x)
    _, state = norm.step(x)
    for bad in (state[:3], 3, "four", (1, 2, 3, 4), Moments(*state), state[0], [None] * 4):
        with pytest.raises(SpecError, match="four tensors"):
            norm.step(x, bad)
    for bad in (tuple(t[:1] for t in state), tuple(t[..., None] for t in state)):
        with pytest.raises(ShapeError, match=r"the state is one of these sets: shape \(2, 3\)"):
            norm.step(x, bad)
    with pytest.raises(ShapeError, match="one shape"):
        norm.step(x, (state[0][:1], *state[1:]))
    with pytest.raises(SpecError, match="'foo' is no label of this layer"):
        norm.step(x, state, foo=torch.zeros(3, dtype=torch.int64))
    with pytest.raises(SpecError, match="the pattern does not say what its axes are"):
        norm.step(x, state, torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(SpecError, match="built for them"):
        norm.step(x, state, weight=torch.ones(3))

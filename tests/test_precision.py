"""Precision and layout of layers: autocast, conversions, meta, determinism, checkpointing, files, memory formats."""

import copy
import functools
import io

import cases
import oracle
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from flexnorm import Norm, Partition, given, moments, normalize
from flexnorm.images import ChannelGroupNorm
from flexnorm.sequences import SequenceGroupNorm, TokenGroupNorm

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
on_devices = pytest.mark.parametrize("device", DEVICES)
HALF = [torch.float16, torch.bfloat16]
DTYPES = [*HALF, torch.float32, torch.float64]
BANDS = Partition.from_sizes([2, 4, 1])


def graphs(name, *args, **options):
    from flexnorm import graphs

    return functools.partial(getattr(graphs, name), *args, **options)


# Each kind of layer: how it is built (with device and dtype), and the shape of x.
GROUP = functools.partial(Norm, "n (g c) ... -> n g", affine="(g c)", g=2, c=4)
LAYERS = {
    "group": (GROUP, (2, 8, 5, 3)),
    "rms": (functools.partial(Norm, "... c -> ...", affine="c", c=8, center=False, bias=False), (2, 3, 8)),
    "four_axes": (functools.partial(Norm, "n a b c d -> n", affine="a b c d", a=2, b=3, c=4, d=2), (3, 2, 3, 4, 2)),
    "batch": (functools.partial(Norm, "n c ... -> c", affine="c", c=8, track_running_stats=True), (4, 8, 5)),
    "plain": (functools.partial(Norm, "n c ... -> n c"), (2, 3, 4)),
    "bands": (functools.partial(Norm, "n c f t -> n c band[f]", affine="f", f=7, band=BANDS), (2, 2, 7, 3)),
    "running_bands": (
        functools.partial(Norm, "n f -> band[f]", affine="band[f]", band=BANDS, track_running_stats=True),
        (5, 7),
    ),
    "channel_group": (functools.partial(ChannelGroupNorm, 2, 8, activation="silu"), (2, 8, 5, 3)),
    "unequal": (functools.partial(ChannelGroupNorm, 3, 8, groups=[1, 4, 3]), (2, 8, 5, 3)),
    "tokens": (functools.partial(TokenGroupNorm, 2, 8), (2, 5, 8)),
    "sequence": (functools.partial(SequenceGroupNorm, 2, 8), (2, 8, 5)),
}
OF_GRAPHS = {
    "NodeGroupNorm": ((2, 8), (6, 8)),
    "GraphGroupNorm": ((2, 8), (6, 8)),
    "FeatureGroupNorm": ((8,), (6, 8)),
}
each_layer = pytest.mark.parametrize(
    "name", [*LAYERS, *(pytest.param(name, marks=pytest.mark.extras) for name in OF_GRAPHS)]
)


def built(name, **factory):
    return made(name)(**factory)


def made(name):
    if name in LAYERS:
        return LAYERS[name][0]
    return graphs(name, *OF_GRAPHS[name][0])


def input_of(name, dtype=torch.float32, device="cpu", offset=0.0):
    return (torch.randn((LAYERS.get(name) or OF_GRAPHS[name])[1]) + offset).to(device, dtype)


def filled(norm):
    """Parameters and statistics that a mistake would show with."""
    with torch.no_grad():
        for name, value in norm.state_dict().items():
            if value.is_floating_point():
                value.uniform_(0.5, 2) if "running" in name else value.normal_()
    return norm


def rounding(dtype):
    """Half a unit in the last place, of a result of 1."""
    return torch.finfo(dtype).eps / 2


def known(x, sigma):
    """How well xhat is known when statistics are in float32 (design 4.4), |x| / sigma being the most there is."""
    return 8 * torch.finfo(torch.float32).eps * float(x.detach().double().abs().max() / sigma.min()) + 1e-6


def outcome(norm, x, dy=None):
    """y, and the gradients of x and of the parameters."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = norm(x)
    dy = torch.linspace(-1, 2, x.numel(), device=x.device).to(x.dtype).view(x.shape) if dy is None else dy
    return y.detach(), *torch.autograd.grad(y, (x, *norm.parameters()), dy)


def assert_same(a, b):
    assert len(a) == len(b)
    assert all(torch.equal(s, t) for s, t in zip(a, b, strict=True))


# --- autocast ---


NORMS = {
    "channel_group": (lambda: ChannelGroupNorm(2, 8), "n (g c) h w -> n g", {"sizes": {"g": 2}, "affine": "(g c)"}),
    "batch": (
        lambda: Norm("n c ... -> c", affine="c", c=8, track_running_stats=True),
        "n c h w -> c",
        {"affine": "c"},
    ),
    "labels": (
        lambda: Norm("n c ... -> n kind[c]", affine="c", c=8, kind=Partition.from_sizes([1, 4, 3])),
        "n c h w -> n kind[c]",
        {"labels": {"kind": Partition.from_sizes([1, 4, 3])}, "affine": "c"},
    ),
    "fused": (
        lambda: Norm("n (g c) ... -> n g", affine="(g c)", g=4, c=2, activation="silu"),
        "n (g c) h w -> n g",
        {"sizes": {"g": 4}, "affine": "(g c)", "activation": "silu"},
    ),
}


@on_devices
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("kind", NORMS)
def test_autocast_in_a_net(kind, dtype, device):
    """The norm meets values near 30 in half precision; their mean, in bfloat16, would be off by 0.1."""
    make, pattern, meaning = NORMS[kind]
    norm = filled(make())
    state = {name: value.clone() for name, value in norm.state_dict().items()}
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), norm, nn.ReLU(), nn.Conv2d(8, 4, 1)).to(device)
    nn.init.constant_(net[0].bias, 30)
    seen = {}

    def look(module, args, y):
        seen["x"], seen["y"] = args[0].detach().cpu(), y.detach().cpu()
        y.register_hook(lambda dy: seen.update(dy=dy.cpu()))

    norm.register_forward_hook(look)
    with torch.autocast(device, dtype=dtype):
        out = net(torch.randn(2, 3, 4, 4, device=device))
    out.float().square().mean().backward()
    x, y, dy = seen["x"], seen["y"], seen["dy"].double()
    assert x.dtype == y.dtype == seen["dy"].dtype == dtype

    # the formula of what the convolution gave, rounded once
    weight, bias = (state[name].double().requires_grad_() for name in ("weight", "bias"))
    expected = oracle.normalize(x, pattern, weight=weight, bias=bias, **meaning)
    kept = {name: meaning.get(name) for name in ("sizes", "labels")}
    count, mean, m2 = oracle.moments(x, pattern, **kept)
    error = known(x, (m2 / count + 1e-5).sqrt()) * float(
        1.1 * weight.detach().abs().max()
    )  # 1.1: silu is as steep as that
    assert ((y.double() - expected).abs() <= rounding(dtype) * (expected.abs() + error) + error).all()

    # parameters and statistics are in float32, and so are the sums of their gradients
    exact = torch.autograd.grad(expected, (weight, bias), dy)
    for parameter, grad in zip((norm.weight, norm.bias), exact, strict=True):
        assert parameter.grad.dtype == torch.float32
        # the terms of a sum are known to the error of xhat, and to that of silu's slope, which has a slope of 1/2
        assert (
            (parameter.grad.cpu() - grad).abs() <= 2 * error * (1 + bool(norm._options.activation)) * dy.abs().sum()
        ).all()
    assert all(p.grad.dtype == p.dtype == torch.float32 for p in net.parameters())
    if norm.track_running_stats:
        for name, value in (("running_mean", mean), ("running_var", m2 / (count - 1))):
            running = norm.get_buffer(name).cpu()
            assert running.dtype == torch.float32
            torch.testing.assert_close(running.double(), 0.9 * state[name] + 0.1 * value, rtol=1e-6, atol=0)


# --- dtypes of x, of parameters, of everything ---


@on_devices
@pytest.mark.parametrize("of_parameters", DTYPES, ids=str)
@pytest.mark.parametrize("of_x", DTYPES, ids=str)
@each_layer
def test_parameters_of_another_dtype(name, of_x, of_parameters, device):
    """As the same in float64, which is held against the formula elsewhere."""
    norm, x = filled(built(name, device=device, dtype=of_parameters)), input_of(name, of_x, device, offset=2)
    wide = copy.deepcopy(norm).double()
    dy = torch.randn_like(x)
    ours, exact = outcome(norm, x, dy), outcome(wide, x.double(), dy.double())
    own = [of_x, of_x, *(p.dtype for p in norm.parameters())]
    assert [t.dtype for t in ours] == own
    if of_parameters != torch.float64:
        assert all(p.dtype == of_parameters for p in norm.parameters())
    for got, expected in zip(ours, exact, strict=True):
        # sigma of these is above 0.1: xhat to 8 eps |x| / sigma in float32, its gradients with another |xhat| / sigma
        inner = 5e-5 * float(expected.abs().max())
        assert ((got.double() - expected).abs() <= 1.01 * rounding(got.dtype) * expected.abs() + inner).all()
    buffers = dict(wide.named_buffers())
    for key, value in norm.named_buffers():
        expected = buffers[key].double()
        limit = (2 * rounding(value.dtype) + 1e-6) * expected.abs() if value.is_floating_point() else 0
        assert ((value.double() - expected).abs() <= limit).all()


@on_devices
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_layer
def test_conversions_are_layers_built_so(name, dtype, device):
    norm = filled(built(name)).to(device)
    ids = {key: value.clone() for key, value in norm.state_dict().items() if not value.is_floating_point()}
    other = built(name, device=device, dtype=dtype)
    state = norm.state_dict()
    other.load_state_dict(state)
    convert = {torch.float16: "half", torch.bfloat16: "bfloat16", torch.float32: "float", torch.float64: "double"}
    x = input_of(name, dtype, device)
    norm(x)  # what it keeps for one dtype must not be taken for another
    norm.load_state_dict(state)
    norm = getattr(norm, convert[dtype])()
    other.load_state_dict(norm.state_dict())
    for key, value in norm.state_dict().items():
        assert value.dtype == (torch.int64 if key in ids else dtype)
        assert value.device.type == device
    assert_same(outcome(norm, x), outcome(other, x))
    assert_same(norm.state_dict().values(), other.state_dict().values())
    for key, value in ids.items():
        if key != "num_batches_tracked":
            assert torch.equal(norm.state_dict()[key], value)


# --- meta ---


@on_devices
@each_layer
def test_meta_then_memory_then_values(name, device):
    expected = filled(built(name, device=device)).eval()
    x = input_of(name, device=device)
    meta = built(name, device="meta")
    assert all(t.is_meta for t in (*meta.parameters(), *meta.buffers()))
    y = meta(x.to("meta"))
    assert y.is_meta
    assert y.shape == x.shape
    ready = meta.to_empty(device=device)
    ready.reset_parameters()
    new = built(name, device=device)
    assert list(ready.state_dict()) == list(new.state_dict())
    assert_same(ready.state_dict().values(), new.state_dict().values())
    assert torch.equal(ready(x), new(x))
    ready.load_state_dict(expected.state_dict())
    assert torch.equal(ready.eval()(x), expected(x))
    assigned = built(name, device="meta")
    assigned.load_state_dict(expected.state_dict(), assign=True)
    assert torch.equal(assigned.eval()(x), expected(x))
    maker = made(name)
    skipped = nn.utils.skip_init(maker.func, *maker.args, **maker.keywords, device=device)
    skipped.load_state_dict(expected.state_dict())
    assert torch.equal(skipped.eval()(x), expected(x))


# --- deterministic algorithms ---


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def twice_differentiated(case, device):
    """y, the gradients, and the second ones, which the composition computes."""
    x, kwargs = cases.arguments(case, dtype=torch.float32)
    x, kwargs = torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.to(device), (x, kwargs))
    leaves = [
        t.requires_grad_() for t in (x, *kwargs.values()) if isinstance(t, torch.Tensor) and t.is_floating_point()
    ]
    y = normalize(x, case.pattern, **kwargs)
    first = torch.autograd.grad(y.pow(3).sum(), leaves, retain_graph=True)
    again = torch.autograd.grad(y.pow(3).sum(), leaves, create_graph=True)
    second = torch.autograd.grad(sum(g.pow(2).sum() for g in again), leaves, materialize_grads=True)
    return y.detach(), *first, *second


@on_devices
@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("case", **cases.each)
def test_deterministic_algorithms(case, device):
    """Nothing that we call is refused, what is allocated is filled with NaN, and every run gives the same bits."""
    first = twice_differentiated(case, device)
    assert all(t.isfinite().all() for t in first)
    assert_same(first, twice_differentiated(case, device))


@on_devices
@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("kind", ["labels", "masked", "weighted"])
def test_deterministic_in_threads(kind, device):
    """Many elements in few sets, whose parts several threads sum."""
    x, ids = torch.randn(5000, 48, device=device), torch.randint(0, 3, (5000,), device=device)
    mask = {"masked": torch.rand(5000, device=device) < 0.7, "weighted": torch.rand(5000, device=device)}.get(kind)
    pattern = "v c -> graph[v] c" if mask is None else "v c, v -> graph[v] c"
    norm = Norm(pattern, affine="c", c=48, device=device)
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        with given(mask=mask, graph=ids):
            results = [outcome(norm, x) for _ in range(3)]
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert_same(results[0], other)


# --- activation checkpointing ---


@on_devices
@pytest.mark.parametrize("use_reentrant", [True, False])
@each_layer
def test_activation_checkpointing(name, use_reentrant, device):
    norm, x = filled(built(name, device=device)), input_of(name, device=device)
    expected = outcome(copy.deepcopy(norm), x)
    x.requires_grad_()
    y = checkpoint(norm, x, use_reentrant=use_reentrant)
    y.backward(torch.linspace(-1, 2, x.numel(), device=device).view(x.shape))
    assert_same((y.detach(), x.grad, *(p.grad for p in norm.parameters())), expected)


# --- tensors that are exchanged ---


@pytest.fixture
def swapping():
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@on_devices
@pytest.mark.usefixtures("swapping")
@each_layer
def test_conversion_by_swapping(name, device):
    norm, x = filled(built(name)), input_of(name, device=device)
    before = {key: id(p) for key, p in norm.named_parameters()}
    plain = built(name, device=device, dtype=torch.float16)
    norm.to(device).half()
    plain.load_state_dict(norm.state_dict())
    assert {key: id(p) for key, p in norm.named_parameters()} == before
    assert all(p.dtype == torch.float16 and p.device.type == device for p in norm.parameters())
    assert_same(outcome(norm, x.half()), outcome(plain, x.half()))
    assert_same(outcome(norm, x), outcome(plain, x))


@on_devices
@each_layer
def test_swapped_parameters(name, device):
    norm, other = filled(built(name, device=device)), filled(built(name, device=device))
    x = input_of(name, device=device)
    norm(x)  # without a graph: that of parameters in use cannot be swapped
    expected = outcome(copy.deepcopy(other), x)
    for mine, theirs in zip(norm.parameters(), other.parameters(), strict=True):
        torch.utils.swap_tensors(mine, theirs)
    assert_same(outcome(norm, x), expected)


# --- files ---


@on_devices
@each_layer
def test_state_in_a_file_of_weights_only(name, device):
    norm, other = filled(built(name, device=device)).eval(), built(name, device=device).eval()
    file = io.BytesIO()
    torch.save(norm.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    x = input_of(name, device=device)
    assert torch.equal(other(x), norm(x))
    assert all(type(value) is torch.Tensor for value in norm.state_dict().values())


# --- memory formats ---


LAST = {2: torch.channels_last, 3: torch.channels_last_3d}
OF_IMAGES = {
    "group": GROUP,
    "channel_group": LAYERS["channel_group"][0],
    "unequal": LAYERS["unequal"][0],
    "batch": LAYERS["batch"][0],
    "pixels": functools.partial(Norm, "n c ... -> n ...", affine="c", c=8),
    "kinds": functools.partial(Norm, "n c ... -> kind[c]", kind=Partition(torch.tensor([0, 2, 1, 0, 2, 2, 0, 1]))),
}


@on_devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spatial", [2, 3])
@pytest.mark.parametrize("name", OF_IMAGES)
def test_a_net_in_channels_last(name, spatial, dtype, device):
    conv = nn.Conv2d if spatial == 2 else nn.Conv3d
    plain = nn.Sequential(conv(3, 8, 3), filled(OF_IMAGES[name]()), nn.ReLU(), conv(8, 4, 1)).to(device, dtype)
    last = copy.deepcopy(plain).to(memory_format=LAST[spatial])
    x = torch.randn(2, 3, *[5, 6, 7][:spatial], device=device, dtype=dtype)
    seen = []

    def look(module, args, y):
        (x,) = args
        seen.append({"x": x, "y": y})
        y.register_hook(lambda dy: seen[0].update(dy=dy))
        x.register_hook(lambda dx: seen[0].update(dx=dx))

    last[1].register_forward_hook(look)
    last(x.to(memory_format=LAST[spatial])).square().sum().backward()
    (seen,) = seen
    for value in (seen["x"], seen["y"], seen["dx"]):
        assert value.is_contiguous(memory_format=LAST[spatial])
        assert not value.is_contiguous()
    # alone, of the same numbers in contiguous memory
    y, dx, *grads = outcome(plain[1], seen["x"].contiguous(), seen["dy"].contiguous())
    own = [p.grad for p in last[1].parameters()]
    for a, b in zip((seen["y"], seen["dx"], *own), (y, dx, *grads), strict=True):
        # the sums are taken in another order: 16 eps of float32, then each is rounded to its dtype
        limit = 16 * 2**-23 + (2 * rounding(dtype) if dtype != torch.float32 else 0)
        torch.testing.assert_close(a.detach(), b, rtol=limit, atol=limit * float(b.abs().max()))


@on_devices
@pytest.mark.parametrize("spatial", [2, 3])
def test_parameters_in_channels_last(spatial, device):
    """`to(memory_format=)` lays out every tensor of four axes anew, a weight over four axes too."""
    axes = "a b c d e"[: 2 * spatial + 3]
    sizes = dict(zip(axes.split(), (2, 3, 4, 2, 2), strict=False))
    norm = filled(Norm(f"n {axes} -> n", affine=axes, sizes=sizes, device=device))
    x = torch.randn(2, *sizes.values(), device=device)
    expected = outcome(norm, x)
    norm = norm.to(memory_format=LAST[spatial])
    assert not norm.weight.is_contiguous()
    assert_same(outcome(norm, x), expected)


@on_devices
@pytest.mark.parametrize("order", [(0, 2, 3, 1), (3, 2, 1, 0), (1, 0, 2, 3), (0, 1, 3, 2)])
@pytest.mark.parametrize("of_dy", ["same", "contiguous", "expanded", "strided"])
@pytest.mark.parametrize("name", OF_IMAGES)
def test_the_format_is_that_of_x_whatever_dy_has(name, of_dy, order, device):
    """x lies in memory in any order of its axes, and so do y and dx."""
    norm = filled(OF_IMAGES[name]()).to(device)
    plain = torch.randn(3, 8, 4, 5, device=device)
    x = plain.permute(order).contiguous().permute(sorted(range(4), key=order.__getitem__))
    dy = torch.randn(3, 8, 4, 5, device=device)
    if of_dy == "same":
        dy = torch.empty_like(x).copy_(dy)
    elif of_dy == "expanded":
        dy = dy[:, :, :1, :1].expand(x.shape)
    elif of_dy == "strided":
        dy = torch.stack([dy, dy], -1)[..., 0]
    y, dx, *grads = outcome(norm, x, dy)
    assert y.stride() == dx.stride() == x.stride()
    z, dz, *expected = outcome(norm, plain, dy.contiguous())
    for a, b in zip((y, dx, *grads), (z, dz, *expected), strict=True):
        torch.testing.assert_close(a, b, rtol=16 * 2**-23, atol=16 * 2**-23 * float(b.abs().max()))


@on_devices
@pytest.mark.parametrize("more", [False, True])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_batch_computed_again_is_counted_once(use_reentrant, more, device):
    """torch's BatchNorm counts it twice."""
    norm = Norm("n c ... -> c", affine="c", c=4, track_running_stats=True, device=device)
    once = copy.deepcopy(norm)
    x = torch.randn(3, 4, 5, device=device, requires_grad=True)
    once(x)
    y = checkpoint(nn.Sequential(norm, nn.Tanh()) if more else norm, x, use_reentrant=use_reentrant)
    y.square().sum().backward()
    assert norm.num_batches_tracked == 1
    assert_same(norm.state_dict().values(), once.state_dict().values())


@on_devices
@pytest.mark.parametrize("way", ["load", "assign", "attribute"])
def test_labels_that_are_exchanged(way, device, request):
    if way == "assign":
        request.getfixturevalue("swapping")
    x = torch.randn(3, 6, device=device)
    norm = Norm("n f -> n band[f]", band=Partition.from_sizes([2, 4]), device=device)
    for sizes in ([2, 4], [3, 3], [1, 5], [5, 1]):
        ids = Partition.from_sizes(sizes).ids.to(device)
        if way == "attribute":
            norm.band_ids = ids
        else:
            norm.load_state_dict({"band_ids": ids}, assign=way == "assign")
        ids.fill_(0)  # the layer has its own
        assert torch.equal(norm(x), normalize(x, "n f -> n band[f]", band=Partition.from_sizes(sizes).to(device)))


@on_devices
def test_values_in_a_file_of_weights_only(device):
    x = torch.randn(3, 4, device=device)
    m = moments(x, "n c -> n")
    weighted = moments(x, "n c, n -> c", torch.rand(3, device=device))
    partition = Partition.from_sizes([2, 0, 3], device=device)
    file = io.BytesIO()
    torch.save({"partition": partition, "moments": [m, weighted], "epoch": 3}, file)
    file.seek(0)
    found = torch.load(file, weights_only=True)
    assert found["partition"] == partition
    for a, b in zip(found["moments"], (m, weighted), strict=True):
        for field in ("count", "mean", "m2", "low"):
            assert torch.equal(getattr(a, field), getattr(b, field))

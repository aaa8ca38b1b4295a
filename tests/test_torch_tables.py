"""torch's own tables of test inputs (OpInfo and ModuleInfo, in every wheel), run against us.

The tables are looked up inside of the tests: to import them takes five seconds, which only who runs them should pay.
"""

import functools
import inspect
import math

import einops
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from flexnorm import Moments, Norm, ShapeError, SpecError, moments, normalize
from flexnorm.images import ChannelGroupNorm

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
on_devices = pytest.mark.parametrize("device", DEVICES)

# The entries that there must be, with the fewest samples that we have seen: none goes missing in silence.
OPS = {
    "nn.functional.group_norm": 21,
    "nn.functional.layer_norm": 6,
    "nn.functional.rms_norm": 6,
    "nn.functional.instance_norm": 9,
    "nn.functional.batch_norm": 12,
    "native_layer_norm": 20,
    "native_batch_norm": 10,
}
ERRORS = {"nn.functional.group_norm": 2, "nn.functional.rms_norm": 3, "native_layer_norm": 4}
MODULES = {
    nn.GroupNorm: 8,
    nn.LayerNorm: 7,
    nn.RMSNorm: 6,
    nn.BatchNorm1d: 7,
    nn.BatchNorm2d: 6,
    nn.BatchNorm3d: 6,
    nn.InstanceNorm1d: 4,
    nn.InstanceNorm2d: 4,
    nn.InstanceNorm3d: 4,
}
each_op = pytest.mark.parametrize("name", OPS)
each_module = pytest.mark.parametrize("cls", MODULES, ids=lambda cls: cls.__name__)


@functools.cache
def tables():
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.common_modules import module_db

    return {(op.name, op.variant_test_name): op for op in op_db}, {info.module_cls: info for info in module_db}


def samples_of(name, device, dtype, **options):
    """All samples of an operation, the larger ones for references too."""
    op = tables()[0][name, ""]
    found = list(op.reference_inputs(device, dtype, **options))
    assert len(found) >= OPS[name]
    return found


# --- what the arguments of torch's functions mean, as patterns ---


def layer(shape):
    """The pattern and the options of an affine over the last axes."""
    axes = " ".join("abcdefgh"[: len(shape)])
    return f"... {axes} -> ...", axes, dict(zip(axes.split(), shape, strict=True))


def read_group_norm(input, num_groups, weight=None, bias=None, eps=1e-5):
    return "n (g c) ... -> n g", "(g c)", (input, weight, bias), {"g": num_groups, "eps": eps}


def read_layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5):
    pattern, axes, sizes = layer(normalized_shape)
    return pattern, axes, (input, weight, bias), {"sizes": sizes, "eps": eps}


def read_rms_norm(input, normalized_shape, weight=None, eps=None):
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    pattern, axes, sizes = layer(normalized_shape)
    return pattern, axes, (input, weight, None), {"sizes": sizes, "eps": eps, "center": False}


def read_instance_norm(
    input,
    running_mean=None,
    running_var=None,
    weight=None,
    bias=None,
    use_input_stats=True,
    momentum=0.1,
    eps=1e-5,
):
    assert use_input_stats
    return "n c ... -> n c", "c", (input, weight, bias), {"eps": eps}


def read_native_batch_norm(input, weight, bias, running_mean, running_var, training, momentum, eps):
    return read_batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)


def read_batch_norm(
    input, running_mean=None, running_var=None, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5
):
    # torch lets an input of shape (0,) pass, which has no channels: the statistics, of shape (0,), are those of "n"
    pattern = "n c ... -> c" if input.dim() > 1 else "n -> n"
    given = {} if training else {"moments": Moments(torch.ones_like(running_mean), running_mean, running_var)}
    return pattern, "c", (input, weight, bias), {"eps": eps, **given}


READERS = {
    "nn.functional.group_norm": read_group_norm,
    "nn.functional.layer_norm": read_layer_norm,
    "nn.functional.rms_norm": read_rms_norm,
    "nn.functional.instance_norm": read_instance_norm,
    "nn.functional.batch_norm": read_batch_norm,
    "native_layer_norm": read_layer_norm,
    "native_batch_norm": read_native_batch_norm,
}
FORMULAS = {  # of tensors, with what READERS gives for them: torch's function of the same
    "nn.functional.group_norm": F.group_norm,
    "nn.functional.layer_norm": F.layer_norm,
    "nn.functional.rms_norm": F.rms_norm,
    "nn.functional.instance_norm": F.instance_norm,
    "nn.functional.batch_norm": F.batch_norm,
    "native_layer_norm": torch.native_layer_norm,
    "native_batch_norm": torch.native_batch_norm,
}


class Call:
    """A sample as torch's call and as ours: functions of the tensors (x, then weight and bias if they are given)."""

    def __init__(self, name, sample, number):
        self.name, self.title = name, f"{name}, sample {number}: {sample}"
        self.args = [sample.input, *sample.args]
        self.kwargs = dict(sample.kwargs)
        pattern, self.axes, tensors, self.options = READERS[name](*self.args, **self.kwargs)
        self.pattern, self.x, (_, self.weight, self.bias) = pattern, tensors[0], tensors
        self.tensors = [t for t in tensors if t is not None]
        if name == "nn.functional.rms_norm":
            self.kwargs["eps"] = self.options["eps"]  # so that a wider call means the same

    def _split(self, tensors):
        tensors = iter(tensors)
        return [None if t is None else next(tensors) for t in (self.x, self.weight, self.bias)]

    def ours(self, *tensors):
        x, weight, bias = self._split(tensors)
        affine = None if weight is None and bias is None else self.axes
        return normalize(x, self.pattern, weight=weight, bias=bias, affine=affine, **self.options)

    def theirs(self, *tensors):
        """All results. Buffers are copied, as torch writes to them."""
        given = {id(t): new for t, new in zip(self.tensors, tensors, strict=True)}

        def put(value):
            if not isinstance(value, torch.Tensor):
                return value
            return given[id(value)] if id(value) in given else value.clone().to(tensors[0].dtype)

        args, kwargs = [put(a) for a in self.args], {key: put(a) for key, a in self.kwargs.items()}
        if self.name == "native_layer_norm" and self.weight is None and self.bias is not None:
            args[2] = torch.ones_like(args[3])  # the same; torch 2.11 cannot differentiate it twice without a weight
        self.passed = inspect.signature(READERS[self.name]).bind(*args, **kwargs).arguments
        y = FORMULAS[self.name](*args, **kwargs)
        return y if isinstance(y, tuple) else (y,)

    def their_y(self, *tensors):
        return self.theirs(*tensors)[0]

    def leaves(self, dtype=None):
        return [t.detach().to(dtype or t.dtype).requires_grad_() for t in self.tensors]

    def statistics(self):
        """Mean and sigma of every set, in float64."""
        external, eps = self.options.get("moments"), self.options["eps"]
        if external is not None:
            return external.mean.double(), (external.var.double() + eps).sqrt()
        sizes = {"g": self.options["g"]} if "g" in self.options else {}
        return statistics(self.x, self.pattern, eps, center=self.options.get("center", True), **sizes)

    def bound(self):
        return Bound(self.x, self.statistics()[1], self.tensors[1:], external="moments" in self.options)


def statistics(x, pattern, eps, *, center=True, **sizes):
    """Mean and sigma of every set, in float64, by einops and not by us; good enough for bounds."""
    x = x.detach().double()
    mean = einops.reduce(x, pattern, "mean", **sizes) if center else torch.zeros((), device=x.device)
    var = einops.reduce(x.square(), pattern, "mean", **sizes) - mean.square()
    return mean, (var.clamp(min=0) + eps).sqrt()


def calls(name, device, dtype=torch.float64, **options):
    return [Call(name, sample, i) for i, sample in enumerate(samples_of(name, device, dtype, **options))]


def sizes_of(call):
    """What `moments` takes of the options."""
    return {key: value for key, value in call.options.items() if key in ("g", "sizes")}


class Bound:
    """How far two computations of a norm may be apart, at most.

    x is known to eps |x|, so xhat to eps k with k = max |x| / min sigma. A derivative by x multiplies with at most
    X / sigma, X = max |xhat|, and adds at most N terms: weight and bias, and dy, come as factors.
    """

    def __init__(self, x, sigma, params, *, external=False):
        self.unit, self.steep, self.terms = 0.0, 0.0, x.numel()
        if not x.numel():
            return
        assert (sigma > 0).all()
        k = float(x.detach().double().abs().max() / sigma.min())
        most = 2 * k if external else min(2 * k, math.sqrt(x.numel()))
        factors = 1 + sum(float(t.detach().abs().max()) for t in params)
        self.unit = 16 * torch.finfo(x.dtype).eps * (1 + k) * factors
        self.steep = max(1.0, most, most / float(sigma.min()))

    def of(self, order, largest=1.0):
        return self.unit * (self.steep * self.terms) ** min(order, 1) * self.steep ** max(order - 1, 0) * largest


def compare(title, ours, theirs, limit):
    def said(text):
        return f"{title}\n{text}"

    torch.testing.assert_close(ours, theirs, rtol=0, atol=limit, msg=said)


def derivatives(f, leaves):
    """y, its gradients along some dy, and those of a sum of them."""
    generator = torch.Generator().manual_seed(1)

    def drawn(t):
        return torch.randn(t.shape, generator=generator, dtype=t.dtype).clamp(-4, 4).to(t.device).requires_grad_()

    y = f(*leaves)
    dy = drawn(y)
    first = torch.autograd.grad(y, leaves, dy, create_graph=True)
    value = sum((g * drawn(g)).sum() for g in first)
    return (y,), first, torch.autograd.grad(value, [*leaves, dy], materialize_grads=True)


def compare_derivatives(title, ours, theirs, bound):
    for order, (values, expected) in enumerate(zip(ours, theirs, strict=True)):
        for a, b in zip(values, expected, strict=True):
            compare(f"{title}, order {order}", a, b, bound.of(order, 4**order))


# --- functions ---


@on_devices
@each_op
def test_values_and_first_and_second_gradients(name, device):
    for call in calls(name, device):
        results = [derivatives(f, call.leaves()) for f in (call.ours, call.their_y)]
        compare_derivatives(call.title, *results, call.bound())


@each_op
def test_gradcheck(name):
    checked = 0
    for call in calls(name, "cpu"):
        if call.x.numel() > 150:  # the loops of gradcheck take long; the gradients of these are compared above
            continue
        leaves = call.leaves()
        assert gradcheck(call.ours, leaves, fast_mode=True), call.title
        assert gradgradcheck(call.ours, leaves, fast_mode=True), call.title
        checked += 1
    assert checked >= 6


@on_devices
@each_op
def test_values_in_float32(name, device):
    """Against torch's function of the same numbers in float64, within design 4.4 through the affine."""
    eps = torch.finfo(torch.float32).eps
    for call in calls(name, device, torch.float32):
        y = call.ours(*[t.detach() for t in call.tensors])
        z = call.their_y(*call.leaves(torch.float64)).detach()
        assert y.dtype == torch.float32
        assert y.shape == z.shape
        if not y.numel():
            continue
        mean, sigma = call.statistics()
        xhat = (float(call.x.detach().abs().max()) + mean.abs().max()) / sigma.min()
        if "moments" not in call.options:
            xhat = xhat.clamp(max=math.sqrt(call.x.numel()))
        weight = 1 if call.weight is None else call.weight.detach().abs().max()
        bias = 0 if call.bias is None else call.bias.detach().abs().max()
        limit = 4 * eps * ((mean.abs() / sigma).max() + xhat) + 1e-6
        compare(call.title, y.double(), z, float(limit * weight + 4 * eps * (weight * xhat + bias)))


@on_devices
@pytest.mark.parametrize("name", ["native_layer_norm", "native_batch_norm"])
def test_mean_and_reciprocal_sigma(name, device):
    """The second and third result of torch's functions are moments, of one value for each set."""
    compared = 0
    for call in calls(name, device):
        _, mean, rstd = call.theirs(*call.leaves())
        if "moments" in call.options or (call.x.dim() < 2 and "batch" in name):
            continue  # given ones: there are none of x. And no channels: torch returns three results of no shape
        m = moments(call.x, call.pattern, **sizes_of(call))
        bound = call.bound()
        compare(call.title, m.mean, mean.reshape(m.mean.shape), bound.of(0))
        compare(call.title, (m.var + call.options["eps"]).rsqrt(), rstd.reshape(m.mean.shape), bound.of(1))
        compared += 1
    assert compared >= {"native_layer_norm": 20, "native_batch_norm": 3}[name]


@on_devices
@pytest.mark.parametrize("name", ["nn.functional.batch_norm", "nn.functional.instance_norm", "native_batch_norm"])
def test_running_statistics(name, device):
    """Those that torch writes are the given ones, moved towards moments; and those of a layer that keeps them."""
    layers = 0
    for call in calls(name, device):
        y = call.their_y(*call.leaves()).detach()
        theirs = [call.passed.get("running_mean"), call.passed.get("running_var")]
        if theirs[0] is None:
            continue
        given = inspect.signature(READERS[name]).bind(*call.args, **call.kwargs).arguments
        before, momentum = [given["running_mean"], given["running_var"]], given.get("momentum", 0.1)
        if "moments" in call.options or call.x.numel() == 0:
            assert all(torch.equal(a, b) for a, b in zip(before, theirs, strict=True)), call.title
            continue
        m = moments(call.x, call.pattern)
        values = [m.mean, m.unbiased_var()[0]]
        values = [v.mean(0) for v in values] if "instance" in name else values
        limit = call.bound().of(0) * 100  # of a variance: squares, of values below 10
        for old, value, new in zip(before, values, theirs, strict=True):
            compare(call.title, old.lerp(value, momentum), new, limit)
        if "instance" in name or not 0 <= momentum <= 1:  # of each instance; torch has negative ones in its tables
            continue
        norm = Norm(
            call.pattern,
            affine="c" if call.weight is not None else None,
            c=call.x.shape[1],
            track_running_stats=True,
            momentum=momentum,
            eps=call.options["eps"],
            device=device,
            dtype=torch.float64,
        )
        state = {"running_mean": before[0], "running_var": before[1], "num_batches_tracked": torch.tensor(0)}
        state.update({} if call.weight is None else {"weight": call.weight, "bias": call.bias})
        norm.load_state_dict(state)
        compare(call.title, norm(call.x), y, call.bound().of(0))
        compare(call.title, norm.running_mean, theirs[0], limit)
        compare(call.title, norm.running_var, theirs[1], limit)
        layers += 1
    assert layers >= (0 if "instance" in name else 2)


@pytest.mark.parametrize("name", ERRORS)
def test_what_torch_refuses(name):
    found = list(tables()[0][name, ""].error_inputs("cpu"))
    assert len(found) >= ERRORS[name]
    for error in found:
        sample = error.sample_input
        with pytest.raises(error.error_type, match=error.error_regex):
            FORMULAS[name](sample.input, *sample.args, **sample.kwargs)
        if sample.input.numel() == 0:  # later versions of torch refuse what is empty, where here it stays empty
            assert READERS[name](sample.input, *sample.args, **sample.kwargs)
            continue
        if sample.args[0] == ():
            # "... -> ..." is a pattern, if a dull one: a set for every element
            assert torch.equal(normalize(sample.input, "... -> ..."), torch.zeros_like(sample.input))
            continue
        pattern, axes, (x, weight, bias), options = READERS[name](sample.input, *sample.args, **sample.kwargs)
        affine = None if weight is None and bias is None else axes
        with pytest.raises((ShapeError, SpecError)):
            normalize(x, pattern, weight=weight, bias=bias, affine=affine, **options)


# --- modules ---


def module_inputs(cls, device, dtype, training):
    """Constructor and input of each entry, as torch's modules with parameters and buffers that mistakes show with."""
    info = tables()[1][cls]
    found = info.module_inputs_func(info, device=device, dtype=dtype, requires_grad=False, training=training)
    assert len(found) >= MODULES[cls]
    for entry in found:
        args, kwargs = entry.constructor_input.args, entry.constructor_input.kwargs
        build = functools.partial(cls, *args, **kwargs, device=device, dtype=dtype)
        theirs = build().train(training)
        with torch.no_grad():
            for name, value in theirs.state_dict().items():
                if value.is_floating_point():
                    value.uniform_(0.5, 2) if name == "running_var" else value.normal_()
        yield f"{cls.__name__} {entry.desc}, {training=}", build, theirs, entry.forward_input.args[0]


def is_instance(module):
    return isinstance(module, nn.modules.instancenorm._InstanceNorm)


def pattern_of(theirs, x):
    """The pattern of torch's layer, in its mode, and how it reads an affine."""
    if isinstance(theirs, nn.GroupNorm):
        return "n (g c) ... -> n g", None, {"g": theirs.num_groups}
    if isinstance(theirs, (nn.LayerNorm, nn.RMSNorm)):
        return layer(theirs.normalized_shape)
    if is_instance(theirs):
        if x.dim() == theirs._get_no_batch_dim():
            return "c ... -> c", "c", {"c": theirs.num_features}
        if theirs.training or not theirs.track_running_stats:
            return "n c ... -> n c", "c", {"c": theirs.num_features}
    return "n c ... -> c", "c", {"c": theirs.num_features}


def eps_of(theirs, x):
    return torch.finfo(x.dtype).eps if theirs.eps is None else theirs.eps


def counterpart(theirs, x):
    """Our layer of the same meaning and state, in the mode of torch's."""
    factory = {"eps": eps_of(theirs, x), "device": x.device, "dtype": x.dtype}
    state = theirs.state_dict()
    pattern, axes, sizes = pattern_of(theirs, x)
    if isinstance(theirs, nn.GroupNorm):
        bias = theirs.bias is not None  # torch has this option from 2.13 on
        ours = ChannelGroupNorm(theirs.num_groups, theirs.num_channels, affine=theirs.affine, bias=bias, **factory)
    else:
        if getattr(theirs, "track_running_stats", False):
            if pattern == "n c ... -> n c":
                # a layer runs on the statistics of its sets, and these are of every image: torch averages them
                state = {name: value for name, value in state.items() if name in ("weight", "bias")}
            else:
                factory.update(track_running_stats=True, momentum=theirs.momentum)
        ours = Norm(
            pattern,
            affine=axes if getattr(theirs, "weight", None) is not None else None,
            bias=getattr(theirs, "bias", None) is not None,
            center=not isinstance(theirs, nn.RMSNorm),
            sizes=sizes,
            **factory,
        )
    ours.load_state_dict(state)
    return ours.train(theirs.training)


def bound_of(theirs, x):
    pattern, _, sizes = pattern_of(theirs, x)
    params = [p.to(x.dtype) for p in theirs.parameters()]
    if getattr(theirs, "track_running_stats", False) and not theirs.training:
        return Bound(x, (theirs.running_var.double() + theirs.eps).sqrt(), params, external=True)
    center = not isinstance(theirs, nn.RMSNorm)
    eps = eps_of(theirs, x)
    sizes = sizes if "(g c)" in pattern else {}
    return Bound(x, statistics(x, pattern, eps, center=center, **sizes)[1] if x.numel() else None, params)


def of_parameters(module):
    """The module as a function of x and its parameters; buffers are written to."""
    names = [name for name, _ in module.named_parameters()]
    return lambda x, *params: torch.func.functional_call(module, dict(zip(names, params, strict=True)), (x,))


def fresh(tensors):
    return [t.detach().clone().requires_grad_() for t in tensors]


@on_devices
@pytest.mark.parametrize("training", [True, False])
@each_module
def test_modules(cls, training, device):
    """Outputs, gradients, second gradients and buffers over two steps; then the state goes back into torch's layer."""
    for title, build, theirs, x in module_inputs(cls, device, torch.float64, training):
        ours = counterpart(theirs, x)
        assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
        for step in range(2):
            bound = bound_of(theirs, x)
            results = [derivatives(of_parameters(m), fresh([x, *m.parameters()])) for m in (ours, theirs)]
            compare_derivatives(title, *results, bound)
            buffers = dict(theirs.named_buffers())
            for name, value in ours.named_buffers():
                # torch's InstanceNorm never counts, and a batch of nothing is none for us
                if name != "num_batches_tracked" or (x.numel() and not is_instance(theirs)):
                    compare(f"{title}, {name}", value, buffers[name], 100 * bound.of(0))  # squares of values below 10
            x = x.roll(1, -1) * 1.5 + step
        if len(ours.state_dict()) < len(theirs.state_dict()):
            assert is_instance(theirs) and training
            continue
        back = build()
        back.load_state_dict(ours.state_dict())
        assert list(back.state_dict()) == list(ours.state_dict())
        compare(title, back.eval()(x), theirs.eval()(x), bound_of(theirs, x).of(0))
        compare(title, ours.eval()(x), theirs(x), bound_of(theirs, x).of(0))


@on_devices
@pytest.mark.parametrize("training", [True, False])
@each_module
def test_modules_in_float32(cls, training, device):
    """Against torch's layer of the same numbers in float64."""
    for title, _, theirs, x in module_inputs(cls, device, torch.float32, training):
        ours, bound = counterpart(theirs, x), bound_of(theirs, x)
        theirs.eps = eps_of(theirs, x)
        y, z = ours(x), theirs.double()(x.double())
        assert y.dtype == torch.float32
        compare(title, y.double(), z, bound.of(0))


@pytest.mark.parametrize("cls", [cls for cls in MODULES if cls is nn.GroupNorm or "BatchNorm" in cls.__name__])
def test_what_torchs_modules_refuse(cls):
    info = tables()[1][cls]
    found = info.module_error_inputs_func(info, device="cpu", dtype=torch.float64, requires_grad=False, training=True)
    assert len(found) >= 2
    for error in found:
        entry = error.module_error_input
        args, kwargs = entry.constructor_input.args, entry.constructor_input.kwargs
        with pytest.raises(error.error_type, match=error.error_regex):
            cls(*args, **kwargs)(*entry.forward_input.args)
        if cls is nn.GroupNorm:
            with pytest.raises(error.error_type, match=error.error_regex):
                ChannelGroupNorm(*args, **kwargs)
            continue
        # eps of 0 or less has a meaning for us, that of the formula, where the variance is larger
        (x,), eps = entry.forward_input.args, kwargs["eps"]
        norm = Norm("n c ... -> c", c=args[0], eps=eps, track_running_stats=True, dtype=x.dtype)
        columns, y = (t.movedim(1, -1).flatten(0, -2) for t in (x, norm(x)))
        var = columns.var(0, correction=0) + eps
        good = var > 0
        expected = (columns - columns.mean(0))[:, good] / var[good].sqrt()
        assert torch.equal(good, y.isfinite().all(0))
        k = (columns.abs().max() / var[good].sqrt().min()) ** 3  # var + eps loses digits where it is small
        compare(f"{cls.__name__}, {eps=}", y[:, good], expected, 16 * torch.finfo(x.dtype).eps * float(k))

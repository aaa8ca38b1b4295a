"""Mixtures by the library against the composition in float64, which is made of `coarsen`, `refine` and `mixed`."""

import copy
import pickle
import threading

import pytest
import torch
import torch.utils.checkpoint
from test_mixtures import CASES
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import flexnorm
from flexnorm import Moments, Norm, Partition
from flexnorm.calls import mixing
from flexnorm.library import library
from flexnorm.mixtures import Alternatives, ContextNorm, DualNorm, LearnedGate, Mixture, SwitchableNorm
from flexnorm.statistics import each

pytestmark = pytest.mark.skipif(isinstance(library(), str), reason="there is no library")

PATTERNS = ["n c ... -> n c", "n c ... -> n", "n c ... -> c"]


def layer(case, mix, **options):
    patterns, shape, mask, sizes, labels = CASES[case]
    torch.manual_seed(0)
    norm = Mixture(patterns, mix=mix, **sizes, **options)
    with torch.no_grad():
        for weight in norm.gate.parameters():
            weight.copy_(torch.randn_like(weight))
    return norm, shape, mask, {name: Partition(ids) for name, ids in labels.items()}


def leaves(own, dtype=None):
    """The same moments, of which mean and M2 are differentiated."""
    mean, m2, low = (t.detach().to(dtype or t.dtype).clone() for t in (own.mean, own.m2, own._low))
    count = own.count.to(dtype) if dtype and own.count.is_floating_point() else own.count
    return Moments(count, mean.requires_grad_(), m2.requires_grad_(), low)


def composed(norm, own, partitions, *, wide=True):
    """What the composition makes of these moments, in float64."""
    own = leaves(own, torch.float64 if wide else None)
    running = norm._running_now()
    logits = [p for name, p in norm.gate.named_parameters() if "weight" in name]
    return own, norm._composed(partitions, running, own, logits)


def by_library(norm, own, partitions, monkeypatch):
    """The same by the library, and that it is asked."""
    own, asked = leaves(own), []
    real = mixing._KERNELS

    class Spied:
        def __getattr__(self, name):
            asked.append(name)
            return getattr(real, name)

    with monkeypatch.context() as patched:
        patched.setattr(mixing, "_KERNELS", Spied())
        mixed, _ = norm._of_own(own.mean, own, partitions)
    assert asked == ["mix"]
    return own, mixed


def gradients(norm, own, mixed, seed=1):
    """Of mean, M2 and logits."""
    generator = torch.Generator().manual_seed(seed)
    outputs = [t for t in (mixed.mean, mixed.m2) if t.requires_grad]
    given = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype) for t in outputs]
    wanted = [own.mean, own.m2, *norm.gate.parameters()]
    return torch.autograd.grad(outputs, wanted, given, allow_unused=True, retain_graph=True)


def assert_same(norm, found, expected, *, eps):
    """Values and gradients, in units of what numbers of this precision can tell."""
    (own, mixed), (wide, right) = found, expected
    one, other = each(Tensor.detach, mixed), each(Tensor.detach, right)
    known, means = other.count > 0, wide.mean.detach()
    assert torch.equal(one.count > 0, known)
    spread = (other.m2 / other.count.where(known, 1)).sqrt() + (means.amax() - means.amin())
    error = ((one.mean.double() - other.mean) + (one._low.double() - other._low)).abs()
    assert (error <= 8 * eps * spread + 8 * eps**2 * other.mean.abs()).all(), (error / spread).max() / eps
    torch.testing.assert_close(one.count.double(), other.count, rtol=4 * eps, atol=0)
    torch.testing.assert_close(one.m2.double(), other.m2, rtol=64 * eps, atol=64 * eps * float(other.m2.max()) + 1e-18)
    got, want = gradients(norm, own, mixed), gradients(norm, wide, right)
    size = max(float(t.abs().max()) for t in want if t is not None)  # of one, all terms may cancel
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a.double(), b.double(), rtol=64 * eps, atol=8 * eps * size + 1e-14)


@pytest.mark.parametrize("mix", ["moments", "results"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("offset", [0.0, 1e3, 1e4])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_the_composition(case, offset, dtype, mix, monkeypatch):
    """Empty sets come with the masks, weights and labels with the other cases."""
    norm, shape, mask, labels = layer(case, mix, dtype=dtype)
    x = offset + 0.1 * torch.randn(shape, dtype=dtype)
    mask = mask if mask is None or mask.dtype == torch.bool else mask.to(dtype)
    own = flexnorm.moments(x, str(norm._spec), mask, sizes=norm._sizes, labels=read_by(norm, labels))
    found = by_library(norm, own, labels, monkeypatch)
    # The composition in float64 has the rounding of float64 itself, of values that are 1e5 times their spread.
    assert_same(
        norm, found, composed(norm, own, labels), eps=torch.finfo(dtype).eps * (1e4 if dtype.itemsize == 8 else 1)
    )


def read_by(norm, labels):
    return {lookup.label: labels[lookup.label] for lookup in norm._spec.sets.lookups()}


@pytest.mark.parametrize("mix", ["moments", "results"])
@pytest.mark.parametrize("shape", [(1, 6, 1), (1, 6, 5), (3, 6, 1), (1, 1, 1)])
def test_sets_of_one_element(shape, mix, monkeypatch):
    norm = Mixture(PATTERNS, mix=mix)
    own = flexnorm.moments(torch.randn(shape) + 100, PATTERNS[0])
    found = by_library(norm, own, {}, monkeypatch)
    assert_same(norm, found, composed(norm, own, {}), eps=torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("value", [0.1, 1000.3, -1e6])
@pytest.mark.parametrize("mix", ["moments", "results"])
def test_equal_values_have_no_variance(value, mix, monkeypatch):
    norm = Mixture(PATTERNS, mix=mix)
    own = flexnorm.moments(torch.full((5, 7, 9), value), PATTERNS[0])
    _, mixed = by_library(norm, own, {}, monkeypatch)
    if mix == "moments":
        assert (mixed.m2 == 0).all()
    assert (norm(torch.full((5, 7, 9), value)) == 0).all()


@pytest.mark.parametrize("mix", ["moments", "results"])
def test_weights_do_not_count(mix, monkeypatch):
    """Of weights a set is known that has a variance, whatever their sum: 0.02 of three, and not 3 of one."""
    weights = torch.tensor(
        [[0.01, 0.005, 0.005, 0.0], [3.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [2.0, 0.0, 1.0, 0.5]]
    )
    norm = Mixture(["b t c, b t -> b c", "b t c, b t -> b", "b t c, b t -> c"], mix=mix)
    own = flexnorm.moments(torch.randn(4, 4, 5), "b t c, b t -> b c", weights)
    found, expected = by_library(norm, own, {}, monkeypatch), composed(norm, own, {})
    assert_same(norm, found, expected, eps=torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("nothing", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("mix", ["moments", "results"])
def test_the_mean_of_nothing_says_nothing(nothing, mix, monkeypatch):
    norm = Mixture(PATTERNS, mix=mix)
    own = flexnorm.moments(torch.randn(3, 4, 5), PATTERNS[0])
    empty = torch.zeros(3, 4, dtype=torch.bool)
    empty[0, 0] = empty[1, 2] = True
    empty[:, 3] = True
    own = Moments(own.count.where(~empty, 0), *(t.where(~empty, nothing) for t in (own.mean, own.m2, own._low)))
    zeros = Moments(own.count, *(t.where(~empty, 0) for t in (own.mean, own.m2, own._low)))
    found, expected = by_library(norm, own, {}, monkeypatch), by_library(norm, zeros, {}, monkeypatch)
    for got, want in zip(found[1]._fields, expected[1]._fields, strict=True):
        assert torch.equal(got, want)
    for got, want in zip(gradients(norm, *found), gradients(norm, *expected), strict=True):
        assert torch.equal(got, want)


class Said(nn.Module):
    """A gate that says what it is told."""

    def __init__(self, *logits):
        super().__init__()
        self.mean_weight = nn.Parameter(logits[0])
        self.var_weight = nn.Parameter(logits[1]) if len(logits) > 1 else None
        self.calls = 0

    def forward(self, seen):
        self.calls += 1
        return self.mean_weight if self.var_weight is None else (self.mean_weight, self.var_weight)


@pytest.mark.parametrize("known", ["all", "some"])
@pytest.mark.parametrize("shapes", [[(3,), (4, 3)], [(2, 1, 3), (2, 4, 3)], [(1, 3), (1, 4, 3)], [(4, 3)]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_logits_of_any_shape(shapes, dtype, known, monkeypatch):
    torch.manual_seed(0)
    norm = Mixture(PATTERNS, gate=Said(*(torch.randn(shape, dtype=dtype) for shape in shapes)))
    own = flexnorm.moments(torch.randn(2, 4, 5 if known == "all" else 1), PATTERNS[0])
    found = by_library(norm, own, {}, monkeypatch)
    (own, mixed), (wide, right) = found, composed(norm, own, {})
    assert [g.dtype for g in gradients(norm, own, mixed)[2:]] == [dtype] * len(shapes)
    eps = torch.finfo(torch.float32 if dtype.itemsize > 2 else dtype).eps
    torch.testing.assert_close(mixed.m2.double(), right.m2, rtol=1e-6, atol=1e-6)
    for got, want in zip(gradients(norm, own, mixed), gradients(norm, wide, right), strict=True):
        torch.testing.assert_close(got.double(), want.double(), rtol=8 * eps, atol=8 * eps)


@pytest.mark.parametrize("mix", ["moments", "results"])
def test_logits_beyond_what_the_exponential_knows(mix, monkeypatch):
    norm = Mixture(PATTERNS, mix=mix, gate=Said(torch.tensor([-1e4, 1e4, 9.9e3])))
    x = torch.randn(4, 3, 8)
    own = flexnorm.moments(x, PATTERNS[0])
    _, mixed = by_library(norm, own, {}, monkeypatch)
    image = flexnorm.moments(x, PATTERNS[1])
    torch.testing.assert_close(mixed.mean, image.mean[:, None].expand(4, 3))
    torch.testing.assert_close(mixed.var, image.var[:, None].expand(4, 3))


@pytest.mark.parametrize("mix", ["moments", "results"])
def test_running_statistics_in_evaluation_and_those_of_then(mix, monkeypatch):
    """A gradient is that of the statistics that were used, also where they have moved since."""
    torch.manual_seed(0)
    norm = Mixture(PATTERNS, mix=mix, track_running_stats=True, c=4)
    norm(torch.randn(5, 4, 6) + 2)
    norm.eval()
    own = flexnorm.moments(torch.randn(3, 4, 6) + 1, PATTERNS[0])
    found, expected = by_library(norm, own, {}, monkeypatch), composed(norm, own, {})
    norm.running["2"].running_mean.add_(7)
    norm.running["2"].running_var.mul_(3)
    assert_same(norm, found, expected, eps=torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("case", ["switchable", "masked", "weighted", "a label of kept axes", "regions"])
def test_running_statistics_move_as_by_the_composition(case, momentum, monkeypatch):
    sizes = {"switchable": {"c": 4}, "masked": {"c": 4}, "weighted": {"t": 5, "b": 3}}.get(case, {"n": 2})
    patterns, shape, mask, _, labels = CASES[case]
    sizes = {**sizes, **({"n": 3, "h": 2, "w": 4} if case == "regions" else {})}
    torch.manual_seed(0)
    if labels:
        patterns = patterns[:1] + [p.replace(f"n {name}[", f"{name}[") for p in patterns[1:] for name in labels]
    norm = Mixture(patterns, track_running_stats=True, momentum=momentum, **sizes, **labels)
    other = copy.deepcopy(norm)
    assert norm._runs()
    for _ in range(3):
        x = 3 + torch.randn(shape)
        norm(x, mask)
        with monkeypatch.context() as patched:
            patched.setattr("flexnorm.mixtures.reads", lambda own: False)
            other(x, mask)
    for (name, a), b in zip(norm.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6, msg=name)


def whole(norm, x, monkeypatch, *, library):
    with monkeypatch.context() as patched:
        if not library:
            patched.setattr("flexnorm.mixtures.reads", lambda own: False)
        return norm(x)


@pytest.mark.parametrize(
    "make", [SwitchableNorm, lambda c, **o: DualNorm(2, c, **o), lambda c, **o: ContextNorm(2, c, **o)]
)
def test_differentiated_twice(make, monkeypatch):
    torch.manual_seed(0)
    norm = make(4, dtype=torch.float64)
    with torch.no_grad():
        for p in norm.parameters():
            p.add_(torch.randn_like(p))
    x = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    used = [x, *norm.parameters()]
    found = []
    for by in (True, False):
        y = whole(norm, x, monkeypatch, library=by)
        first = torch.autograd.grad(y.pow(3).sum(), used, create_graph=True)
        second = torch.autograd.grad(sum(g.pow(2).sum() for g in first), used)
        found.append([*first, *second])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)


def test_transforms_and_batched_gradients(monkeypatch):
    torch.manual_seed(0)
    norm = SwitchableNorm(4, track_running_stats=False, dtype=torch.float64)
    x = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    y = norm(x)
    (expected,) = torch.autograd.grad(y.pow(3).sum(), x, retain_graph=True)
    torch.testing.assert_close(torch.func.grad(lambda t: norm(t).pow(3).sum())(x.detach()), expected)
    params = dict(norm.named_parameters())
    found = torch.func.grad(lambda p: torch.func.functional_call(norm, p, (x.detach(),)).pow(3).sum())(params)
    wanted = torch.autograd.grad(y.pow(3).sum(), list(params.values()), retain_graph=True)
    for got, want in zip(found.values(), wanted, strict=True):
        torch.testing.assert_close(got, want)
    dy = torch.randn(2, *y.shape, dtype=torch.float64)
    used = [x, *params.values()]
    batched = torch.autograd.grad(y, used, dy, retain_graph=True, is_grads_batched=True)
    one_by_one = [torch.autograd.grad(y, used, d, retain_graph=True) for d in dy]
    for got, *want in zip(batched, *one_by_one, strict=True):
        torch.testing.assert_close(got, torch.stack(want))


class Reading(nn.Module):
    """A gate of a user that reads the moments of the patterns, and whose choice is differentiated in them."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))
        self.calls = 0

    def forward(self, seen):
        self.calls += 1
        assert isinstance(seen, Alternatives)
        moments, known, running, eps = seen
        assert known.shape == moments.mean.shape
        assert len(running) == known.shape[-1]
        return self.gain * (moments.var + eps).log() + moments.mean


@pytest.mark.parametrize("mix", ["moments", "results"])
def test_a_gate_that_reads_the_moments(mix, monkeypatch):
    torch.manual_seed(0)
    norm = Mixture(PATTERNS, gate=Reading(), mix=mix)
    x = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    used, found = [x, norm.gate.gain], []
    for by in (True, False):
        y = whole(norm, x, monkeypatch, library=by)
        found.append([y, *torch.autograd.grad(y.pow(3).sum(), used)])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    assert norm.gate.calls == 2


class Twice(nn.Module):
    """One tensor for both: its gradient is the sum of two."""

    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor([0.3, -0.2, 1.0], dtype=torch.float64))

    def forward(self, seen):
        return self.logits, self.logits


def test_one_tensor_for_means_and_variances(monkeypatch):
    torch.manual_seed(0)
    norm, found = Mixture(PATTERNS, gate=Twice()), []
    x = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    for by in (True, False):
        y = whole(norm, x, monkeypatch, library=by)
        once = torch.autograd.grad(y.pow(3).sum(), norm.gate.logits, retain_graph=True)
        (first,) = torch.autograd.grad(y.pow(3).sum(), norm.gate.logits, create_graph=True)
        found.append([*once, first, *torch.autograd.grad(first.pow(2).sum(), [x, norm.gate.logits])])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_a_mode_sees_the_operations_of_a_gradient():
    class Listing(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            listed.append(str(function))
            return function(*args, **(kwargs or {}))

    listed = []
    own = leaves(flexnorm.moments(torch.randn(3, 4, 5), PATTERNS[0]))
    norm = Mixture(PATTERNS)
    mixed, _ = norm._of_own(own.mean, own, {})
    with Listing():
        torch.autograd.grad(mixed.mean.sum(), own.mean)
    assert any("softmax" in name for name in listed)


def test_nothing_is_worked_out_that_no_gate_reads(monkeypatch):
    norm, x = SwitchableNorm(4), torch.randn(3, 4, 5, requires_grad=True)
    monkeypatch.setattr(Mixture, "_seen", lambda *_: pytest.fail("a gate that reads nothing was given something"))
    norm(x).sum().backward()
    norm.eval()(x)


def test_where_the_library_has_no_answer_the_gate_is_asked_once(monkeypatch):
    norm, x = Mixture(PATTERNS, gate=Said(torch.randn(3))), torch.randn(3, 4, 5)
    expected = norm(x)

    class Silent:
        def __getattr__(self, name):
            return lambda *_: None

    monkeypatch.setattr(mixing, "_KERNELS", Silent())
    torch.testing.assert_close(norm(x), expected)
    torch.testing.assert_close(norm(x.clone().requires_grad_()), expected)
    assert norm.gate.calls == 3


def test_alternatives_that_are_read_later_are_those_of_the_call():
    seen = []

    class Keeping(LearnedGate):
        def forward(self, alternatives):
            seen.append(alternatives)
            return super().forward(alternatives)

    norm = Mixture(PATTERNS, gate=Keeping(3), track_running_stats=True, c=4)
    x = torch.randn(3, 4, 5, requires_grad=True)
    norm(x)
    norm.eval()(x)
    with torch.no_grad():
        norm(x)
    before = norm.running["2"].running_mean.clone()
    norm.train()(x + 5)
    training, evaluation, without, _ = seen
    with torch.no_grad():
        assert training.moments.mean.requires_grad
        assert evaluation.running == (False, False, True)
        assert torch.equal(evaluation.moments.mean[0, :, 2], before)
    assert not without.moments.mean.requires_grad
    fields = tuple(training)
    assert len(training) == len(fields) == 4
    assert training[0] is training.moments is fields[0]
    assert type(training) is not Alternatives
    assert isinstance(training, Alternatives)
    assert training == training and hash(training) == hash(training)
    assert training._replace(eps=1.0).eps == 1.0
    assert training._asdict()["eps"] == training.eps == 1e-5
    assert repr(training).startswith("Alternatives(moments=")
    for other in (copy.copy(without), pickle.loads(pickle.dumps(without))):
        assert type(other) is Alternatives
        assert torch.equal(other.moments.mean, without.moments.mean)


def test_frozen_logits_and_a_frozen_input():
    norm, x = SwitchableNorm(4, affine=False), torch.randn(3, 4, 5)
    norm(x).pow(3).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in norm.gate.parameters())
    norm.gate.requires_grad_(False)
    x.requires_grad_()
    y = norm(x)
    (first,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
    assert torch.autograd.grad(first.pow(2).sum(), x)[0].isfinite().all()


def test_the_moments_of_a_pattern_are_known_to_twice_the_precision():
    """What calibration collects, which rounds nothing to float32: 1e4 would cost it 6e-4."""
    norm = SwitchableNorm(4)
    norm.running["2"]._collected = ()
    x = 1e4 + 0.1 * torch.randn(6, 4, 50)
    norm(x)
    (m,) = norm.running["2"]._collected
    torch.testing.assert_close(m.mean + m._low, x.double().mean((0, 2)), rtol=0, atol=1e-8)
    torch.testing.assert_close(m.var, x.double().var((0, 2), unbiased=False), rtol=1e-6, atol=0)
    assert m.count.tolist() == [300] * 4


def test_checkpointed():
    torch.manual_seed(0)
    norm, x = SwitchableNorm(4), torch.randn(3, 4, 5, requires_grad=True)
    other = copy.deepcopy(norm)
    found = [norm(x), torch.utils.checkpoint.checkpoint(other, x, use_reentrant=False)]
    got, want = (
        torch.autograd.grad(y.pow(3).sum(), [x, *n.parameters()]) for y, n in zip(found, (norm, other), strict=True)
    )
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(norm.buffers(), other.buffers(), strict=True):
        assert torch.equal(a, b)


def test_threads():
    torch.manual_seed(0)
    norm = SwitchableNorm(8, track_running_stats=False)
    x = torch.randn(4, 8, 6, 6)

    def step():
        t = x.clone().requires_grad_()
        return torch.autograd.grad(norm(t).pow(3).sum(), [t, *norm.gate.parameters()])

    expected, wrong = step(), []

    def work():
        for _ in range(20):
            wrong.extend(1 for a, b in zip(step(), expected, strict=True) if not torch.equal(a, b))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_ids_out_of_range_are_no_read_beyond_the_end():
    """A Partition that nobody has checked raises as by the composition."""
    bad = Partition._made(torch.tensor([0, 1, 7, 0, 1, 0]), 2)
    norm = Mixture(["n c t -> n c", "n c t -> n sensor[c]"])
    with pytest.raises((IndexError, flexnorm.ShapeError)):
        norm(torch.randn(2, 6, 5), sensor=bad)


def test_moments_that_are_not_contiguous(monkeypatch):
    norm = Mixture(PATTERNS)
    own = flexnorm.moments(torch.randn(3, 4, 5), PATTERNS[0])
    turned = each(lambda t: t.t().contiguous().t(), own)
    for got, want in zip(
        by_library(norm, turned, {}, monkeypatch)[1]._fields,
        by_library(norm, own, {}, monkeypatch)[1]._fields,
        strict=True,
    ):
        assert torch.equal(got, want)


def test_one_pattern_alone_is_that_norm():
    x = torch.randn(3, 4, 5) + 3
    torch.testing.assert_close(Mixture(["n c t -> n"])(x), Norm("n c t -> n")(x))

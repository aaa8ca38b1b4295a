"""Running statistics: torch's BatchNorm, in outputs, gradients and buffers; per label; masked."""

import copy
import pickle

import oracle
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from flexnorm import Norm, SpecError, calibrate, moments, normalize
from flexnorm.library import library

D = torch.float64
CLOSE = {"rtol": 1e-12, "atol": 1e-12}  # sums of some ten numbers of order 1, in float64
# Without the library, torch's fused operations give no moments with gradients, and the composition takes their place.
SAME = CLOSE if isinstance(library(), str) else {"rtol": 0, "atol": 0}

LAYERS = [
    (nn.BatchNorm1d, (8, 6)),
    (nn.BatchNorm1d, (4, 6, 5)),
    (nn.BatchNorm2d, (4, 6, 5, 3)),
    (nn.BatchNorm3d, (2, 6, 3, 2, 2)),
]


@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, None])
@pytest.mark.parametrize(("kind", "shape"), LAYERS)
def test_equals_batch_norm(kind, shape, momentum):
    theirs = kind(6, momentum=momentum, dtype=torch.float64)
    ours = Norm("n c ... -> c", affine="c", c=6, track_running_stats=True, momentum=momentum, dtype=torch.float64)
    nn.init.normal_(theirs.weight)
    ours.load_state_dict(theirs.state_dict())
    for step in range(4):
        x = (torch.randn(shape, dtype=torch.float64) * 3 + step).requires_grad_()
        dy = torch.randn(shape, dtype=torch.float64)
        y, z = ours(x), theirs(x)
        torch.testing.assert_close(y, z)
        grads = (
            torch.autograd.grad(y, [x, *ours.parameters()], dy),
            torch.autograd.grad(z, [x, *theirs.parameters()], dy),
        )
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b)
    state = theirs.state_dict()
    assert list(ours.state_dict()) == list(state)
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(value, state[name])
        assert value.dtype == state[name].dtype
        assert not value.requires_grad
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y, z = ours.eval()(x), theirs.eval()(x)
    torch.testing.assert_close(y, z)
    for a, b in zip(
        torch.autograd.grad(y.pow(2).sum(), [x, *ours.parameters()]),
        torch.autograd.grad(z.pow(2).sum(), [x, *theirs.parameters()]),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    theirs.load_state_dict(ours.state_dict())


def test_evaluation_changes_nothing_and_train_again_goes_on():
    norm = Norm("n c -> c", c=3, track_running_stats=True)
    norm(torch.randn(8, 3) + 5)
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    norm.eval()(torch.randn(8, 3))
    assert all(torch.equal(before[name], value) for name, value in norm.state_dict().items())
    norm.train()(torch.randn(8, 3))
    assert norm.num_batches_tracked == 2


def test_per_label_and_absent_labels_keep_theirs():
    norm = Norm("n c -> domain[n] c", domain=3, c=2, track_running_stats=True, momentum=1.0, dtype=torch.float64)
    x, domain = torch.randn(9, 2, dtype=torch.float64), torch.tensor([0, 0, 0, 0, 2, 2, 2, 2, 2])
    norm(x, domain=domain)
    assert norm.running_mean.shape == (3, 2)
    for k in (0, 2):
        torch.testing.assert_close(norm.running_mean[k], x[domain == k].mean(0))
        torch.testing.assert_close(norm.running_var[k], x[domain == k].var(0))
    assert norm.running_mean[1].tolist() == [0, 0]
    assert norm.running_var[1].tolist() == [1, 1]
    alone = norm.eval()(x[:1], domain=domain[:1])
    torch.testing.assert_close(alone, (x[:1] - norm.running_mean[0]) / (norm.running_var[0] + 1e-5).sqrt())


def test_masked_counts_only_what_is_valid():
    norm = Norm("b c t, b t -> c", c=2, track_running_stats=True, momentum=1.0, dtype=torch.float64)
    x, mask = torch.randn(3, 2, 5, dtype=torch.float64), torch.rand(3, 5) < 0.5
    x = x.where(mask[:, None], float("nan"))
    norm(x, mask)
    valid = x.movedim(1, -1)[mask]
    torch.testing.assert_close(norm.running_mean, valid.mean(0))
    torch.testing.assert_close(norm.running_var, valid.var(0))
    assert norm.eval()(x, mask).isfinite().all()


def test_one_element_gives_a_mean_and_no_variance():
    norm = Norm("n c -> c", c=2, track_running_stats=True, momentum=1.0)
    norm(torch.tensor([[3.0, 4.0]]))
    assert norm.running_mean.tolist() == [3, 4]
    assert norm.running_var.tolist() == [1, 1]
    norm(torch.zeros(0, 2))
    assert norm.running_mean.tolist() == [3, 4]
    assert norm.num_batches_tracked == 1


def test_explicit_moments_win_and_are_not_tracked():
    norm, x = Norm("n c -> c", c=3, track_running_stats=True), torch.randn(8, 3)
    m = moments(x * 2, "n c -> c")
    for layer in (norm, norm.eval()):
        assert torch.equal(layer(x, moments=m), normalize(x, "n c -> c", moments=m))
    assert norm.num_batches_tracked == 0


@pytest.mark.parametrize("travel", [copy.deepcopy, lambda norm: pickle.loads(pickle.dumps(norm))])
def test_travels_after_a_step(travel):
    """PyG's InstanceNorm keeps its running statistics in the graph, and cannot be copied after a step."""
    norm = Norm("n c -> c", affine="c", c=3, track_running_stats=True)
    norm(torch.randn(8, 3, requires_grad=True)).sum().backward()
    other = travel(norm).eval()
    x = torch.randn(2, 3)
    assert torch.equal(other(x), norm.eval()(x))


def test_bad_input():
    with pytest.raises(SpecError, match=r'these sets are apart along n(?s:.*)"n c t -> c"'):
        Norm("n c t -> n c", c=3, track_running_stats=True)
    with pytest.raises(SpecError, match="running statistics have a fixed shape"):
        Norm("... c -> ...", c=3, track_running_stats=True)
    with pytest.raises(SpecError, match="from 0 to 1"):
        Norm("n c -> c", c=3, track_running_stats=True, momentum=1.5)
    for momentum in (-0.1, float("nan"), float("inf"), "0.1"):
        with pytest.raises(SpecError, match="from 0 to 1"):
            Norm("n c -> c", c=3, track_running_stats=True, momentum=momentum)
    with pytest.raises(SpecError, match="is built so"):
        Norm("n c -> c", c=3).updated(moments(torch.randn(4, 3), "n c -> c"))


def tracking(pattern="n c -> c", momentum=0.1, **kwargs):
    return Norm(pattern, c=3, track_running_stats=True, momentum=momentum, dtype=D, **kwargs)


def kept(norm):
    return {name: value.clone() for name, value in norm.state_dict().items()}


def assert_unchanged(norm, before):
    after = norm.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(before[name], after[name]) for name in before)


# --- the average of all batches --------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
def test_each_label_has_the_average_of_the_batches_that_it_was_in(masked):
    pattern = "n c t, n t -> domain[n] c" if masked else "n c t -> domain[n] c"
    norm = tracking(pattern, None, domain=4)
    assert norm.num_batches_tracked.shape == (4, 3)
    seen = {}
    for domains in ([0, 0, 2], [1, 1, 2, 2], [2, 0], [0], [1, 2, 1]):
        x, domain = torch.randn(len(domains), 3, 5, dtype=D) + len(domains), torch.tensor(domains)
        mask = torch.rand(len(domains), 5) < 0.6 if masked else torch.ones(len(domains), 5, dtype=torch.bool)
        mask[:, :2] = True  # two elements, so that there is a variance
        y = norm(x, *([mask] if masked else []), domain=domain)
        expected = oracle.normalize(x, pattern, mask if masked else None, labels={"domain": domain})
        torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
        for k in set(domains):
            values = x.movedim(1, -1)[domain == k][mask[domain == k]]
            seen.setdefault(k, []).append((values.mean(0), values.var(0)))
    for k in range(4):
        batches = seen.get(k, [])
        assert norm.num_batches_tracked[k].tolist() == [len(batches)] * 3
        means, variances = zip(*batches, strict=True) if batches else ([torch.zeros(3)], [torch.ones(3)])
        torch.testing.assert_close(norm.running_mean[k], torch.stack(means).mean(0).to(D), **CLOSE)
        torch.testing.assert_close(norm.running_var[k], torch.stack(variances).mean(0).to(D), **CLOSE)
    fresh = tracking(pattern, None, domain=4)
    fresh.load_state_dict(norm.state_dict())
    assert_unchanged(fresh, norm.state_dict())


def test_momentum_per_label_leaves_absent_ones_alone():
    norm = tracking("n c -> domain[n] c", 0.3, domain=3)
    assert norm.num_batches_tracked.shape == ()
    mean, var = torch.zeros(3, 3, dtype=D), torch.ones(3, 3, dtype=D)
    for domains in ([0, 0, 0, 2, 2], [1, 1, 0, 0], [2, 2]):
        x, domain = torch.randn(len(domains), 3, dtype=D), torch.tensor(domains)
        norm(x, domain=domain)
        for k in set(domains):
            mean[k] += 0.3 * (x[domain == k].mean(0) - mean[k])
            var[k] += 0.3 * (x[domain == k].var(0) - var[k])
    torch.testing.assert_close(norm.running_mean, mean, **CLOSE)
    torch.testing.assert_close(norm.running_var, var, **CLOSE)
    assert norm.num_batches_tracked == 3


def test_reset_forgets_every_set():
    for momentum in (0.1, None):
        norm = tracking("n c -> domain[n] c", momentum, domain=2)
        before = kept(norm)
        norm(torch.randn(6, 3, dtype=D), domain=torch.tensor([0, 0, 0, 1, 1, 1]))
        assert all(not torch.equal(before[name], value) for name, value in norm.state_dict().items())
        norm.reset_running_stats()
        assert_unchanged(norm, before)


def test_a_bad_batch_is_the_users():
    """As in torch: what is not a number stays in the running statistics, of its own sets."""
    norm, theirs, x = tracking(), nn.BatchNorm1d(3, affine=False, dtype=D), torch.randn(5, 3, dtype=D)
    x[2, 1] = float("nan")
    for layer in (norm, theirs):
        layer(x)
        layer(torch.randn(5, 3, dtype=D, generator=torch.Generator().manual_seed(0)))
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(norm.state_dict()[name], value, equal_nan=True)
    assert norm.running_mean.isnan().tolist() == [False, True, False]
    norm.reset_running_stats()
    assert norm.running_mean.tolist() == [0, 0, 0]


def test_checkpointing_sees_a_batch_once():
    x = torch.randn(6, 3, dtype=D, requires_grad=True)
    for reentrant in (True, False):
        for momentum in (0.1, None):
            once, again = tracking(momentum=momentum), tracking(momentum=momentum)
            once(x).pow(3).sum().backward()
            checkpoint(again, x, use_reentrant=reentrant).pow(3).sum().backward()
            assert_unchanged(again, once.state_dict())
            assert again.num_batches_tracked == 1


# --- as a function ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
@pytest.mark.parametrize(
    ("pattern", "labels"), [("n c -> c", {}), ("n c -> domain[n] c", {"domain": torch.tensor([0, 0, 2, 2, 0, 2])})]
)
def test_updated_is_what_training_does(pattern, labels, momentum):
    sizes = {"domain": 3} if labels else {}
    ours, inplace = (tracking(pattern, momentum, **sizes) for _ in range(2))
    buffers = kept(ours)
    for _ in range(3):
        x, before = torch.randn(6, 3, dtype=D), kept(ours)
        y, seen = torch.func.functional_call(ours, buffers, (x,), {**labels, "return_moments": True})
        torch.testing.assert_close(y, inplace(x, **labels), **SAME)
        assert_unchanged(ours, before)
        functional = copy.deepcopy(ours)
        functional.load_state_dict(buffers)
        buffers = functional.updated(seen)
        for name, value in kept(inplace).items():  # a step of lerp rounds twice, fused once
            rounded = SAME if SAME is CLOSE else {"rtol": 2 * torch.finfo(D).eps, "atol": torch.finfo(D).eps}
            torch.testing.assert_close(buffers[name], value, **rounded)
    evaluated = torch.func.functional_call(ours.eval(), buffers, (x,), labels)
    torch.testing.assert_close(evaluated, inplace.eval()(x, **labels), rtol=1e-14, atol=1e-14)


def function(norm):
    """y, mean and variance of a training step, without one."""

    def f(x):
        y, seen = norm(x, return_moments=True)
        buffers = norm.updated(seen)
        return y, buffers["running_mean"], buffers["running_var"]

    return f


def plain(x):
    """The same, written out, of a layer that has seen nothing, with momentum 0.1."""
    y = (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt()
    return y, 0.1 * x.mean(0), 0.9 + 0.1 * x.var(0)


def test_a_training_step_under_transforms():
    norm = tracking()
    before, ours = kept(norm), function(norm)
    xs, tangent = torch.randn(4, 6, 3, dtype=D), torch.randn(6, 3, dtype=D)

    def loss(f):
        def value(x):
            y, mean, var = f(x)
            return y.pow(3).sum() + (mean * var).sum()

        return value

    close = {"rtol": 1e-9, "atol": 1e-9}
    for a, b in zip(torch.func.vmap(ours)(xs), torch.func.vmap(plain)(xs), strict=True):
        torch.testing.assert_close(a, b, **close)
    for a, b in zip(
        torch.func.jvp(ours, (xs[0],), (tangent,)), torch.func.jvp(plain, (xs[0],), (tangent,)), strict=True
    ):
        for one, other in zip(a, b, strict=True):
            assert one.abs().max() > 1e-3
            torch.testing.assert_close(one, other, **close)
    for transform in (torch.func.grad, torch.func.hessian, lambda f: torch.func.vmap(torch.func.grad(f))):
        x = xs if transform not in (torch.func.grad, torch.func.hessian) else xs[0]
        torch.testing.assert_close(transform(loss(ours))(x), transform(loss(plain))(x), **close)
    assert_unchanged(norm, before)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_training_within_transforms_says_what_to_do_instead(momentum):
    norm, xs = tracking(momentum=momentum), torch.randn(4, 6, 3, dtype=D)
    before = kept(norm)
    calls = [
        lambda: torch.func.vmap(norm)(xs),
        lambda: torch.func.grad(lambda x: norm(x).pow(3).sum())(xs[0]),
        lambda: torch.func.jvp(norm, (xs[0],), (xs[1],)),
        lambda: torch.func.hessian(lambda x: norm(x).pow(3).sum())(xs[0]),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match=r"changes nothing in place[^$]*return_moments=True"):
            call()
        assert_unchanged(norm, before)
    norm(xs[0])
    y = torch.func.vmap(norm.eval())(xs)
    torch.testing.assert_close(y, (xs - norm.running_mean) / (norm.running_var + 1e-5).sqrt(), **CLOSE)


def test_returned_moments_update_nothing():
    norm, x = tracking(), torch.randn(6, 3, dtype=D)
    before = kept(norm)
    y, seen = norm(x, return_moments=True)
    assert_unchanged(norm, before)
    torch.testing.assert_close(y, norm(x), **SAME)
    torch.testing.assert_close(seen.mean, x.mean(0), **CLOSE)
    torch.testing.assert_close(seen.unbiased_var()[0], x.var(0), **CLOSE)
    z, used = norm.eval()(x, return_moments=True)  # those that it is normalized by
    assert torch.equal(used.mean, norm.running_mean)
    assert torch.equal(used.var, norm.running_var)
    assert torch.equal(z, norm(x))
    plain_y, m = Norm("n c -> c")(x, return_moments=True)
    torch.testing.assert_close(plain_y, y, **CLOSE)
    torch.testing.assert_close(m.mean, seen.mean, **CLOSE)


# --- calibrate -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("dtype", [torch.float32, D])
def test_calibrated_statistics_are_those_of_all_batches_together(momentum, dtype):
    x = torch.randn(101, 3, 4, dtype=dtype) + 100
    norm = Norm("n c t -> c", c=3, track_running_stats=True, momentum=momentum, dtype=dtype)
    norm(torch.randn(5, 3, 4, dtype=dtype))  # what was is forgotten
    assert calibrate(norm, x.split([1, 50, 20, 30])) is norm
    wide = x.double().movedim(1, 0).flatten(1)
    # merged in float64, of batches known to 8 roundings of deviations of at most 5, and rounded once
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(norm.running_mean.double(), wide.mean(1), rtol=eps, atol=40 * eps)
    torch.testing.assert_close(norm.running_var.double(), wide.var(1), rtol=16 * eps, atol=0)
    assert norm.num_batches_tracked == 4
    norm.eval()(x)


def test_a_thousand_batches_cost_no_precision():
    """They are merged in float64: one rounding at the end, and those of the batches, of which each is a thousandth."""
    x = torch.randn(3000, 3) * torch.linspace(0.1, 3, 3000)[:, None]
    norm = calibrate(Norm("n c -> c", c=3, track_running_stats=True), x.split(3))
    eps = torch.finfo(torch.float32).eps
    torch.testing.assert_close(norm.running_var.double(), x.double().var(0), rtol=2 * eps, atol=0)


class Nested(nn.Module):
    """Norms at several depths, one twice, and what behaves differently in training."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(3, 3), tracking(affine="c"), nn.Dropout(0.5))
        self.inner = nn.ModuleDict(
            {"masked": tracking("b t c, b t -> c"), "theirs": nn.BatchNorm1d(3), "own": Norm("n c -> n")}
        )
        self.frozen = tracking().eval()
        self.double()

    def forward(self, x, mask):
        self.seen = x = self.first[:2](x.flatten(0, 1))
        x = self.inner["theirs"](self.first[2](x)).unflatten(0, mask.shape)
        self.frozen(x.flatten(0, 1))
        return self.inner["masked"](x, mask)


def test_calibrate_goes_into_a_model_and_leaves_its_modes():
    model = Nested()
    model.first.eval()
    modes = [module.training for module in model.modules()]
    theirs = kept(model.inner["theirs"])
    parameters = [p.clone() for p in model.parameters()]
    xs = [torch.randn(b, 4, 3, dtype=D) for b in (2, 5)]
    masks = [torch.rand(b, 4) < 0.7 for b in (2, 5)]
    calls = []

    def forward(model, batch):
        assert model.first[1].training and model.frozen.training and not model.first[2].training
        assert not model.inner["theirs"].training and not torch.is_grad_enabled()
        calls.append(batch)
        model(*batch)

    calibrate(model, zip(xs, masks, strict=True), forward)
    assert len(calls) == 2
    assert [module.training for module in model.modules()] == modes
    assert_unchanged(model.inner["theirs"], theirs)
    assert all(torch.equal(a, b) for a, b in zip(parameters, model.parameters(), strict=True))
    linear, norm = model.first[:2]
    values = torch.cat([linear(x).flatten(0, 1) for x in xs])
    torch.testing.assert_close(norm.running_mean, values.mean(0), **CLOSE)
    torch.testing.assert_close(norm.running_var, values.var(0), **CLOSE)
    valid = []
    for x, mask in zip(xs, masks, strict=True):
        y = linear(x).flatten(0, 1)
        y = (y - y.mean(0)) / (y.var(0, correction=0) + 1e-5).sqrt()  # by each batch, as in training
        y = y / (1 + 1e-5) ** 0.5  # theirs in evaluation, with what it began with
        valid.append(y.unflatten(0, mask.shape)[mask])
    torch.testing.assert_close(model.inner["masked"].running_mean, torch.cat(valid).mean(0), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model.inner["masked"].running_var, torch.cat(valid).var(0), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("bad", ["batch", "iterator", "hook"])
def test_an_error_on_the_way_changes_nothing(bad):
    model = nn.Sequential(nn.Linear(3, 3, dtype=D), tracking(), nn.Dropout()).train()
    model[2].eval()
    model[1](torch.randn(5, 3, dtype=D))
    before, modes = kept(model), [m.training for m in model.modules()]

    def batches():
        yield torch.randn(5, 3, dtype=D)
        yield torch.randn(5, 4 if bad == "batch" else 3, dtype=D)
        if bad == "iterator":
            raise OSError("the disk")

    handle = model[2].register_forward_hook(lambda *_: 1 / 0) if bad == "hook" else None
    with pytest.raises((RuntimeError, OSError, ZeroDivisionError)):
        calibrate(model, batches())
    if handle is not None:
        handle.remove()
    assert_unchanged(model, before)
    assert [m.training for m in model.modules()] == modes
    model(torch.randn(4, 3, dtype=D))  # and training goes on
    assert model[1].num_batches_tracked == 2


def test_calibrate_takes_the_first_of_what_a_data_loader_gives():
    x, labels = torch.randn(23, 3, dtype=D), torch.arange(23)
    norm = tracking()
    calibrate(nn.Sequential(norm), DataLoader(TensorDataset(x, labels), batch_size=5))
    torch.testing.assert_close(norm.running_mean, x.mean(0), **CLOSE)
    torch.testing.assert_close(norm.running_var, x.var(0), **CLOSE)
    assert norm.num_batches_tracked == 5


@pytest.mark.parametrize("momentum", [0.1, None])
def test_calibrate_per_label(momentum):
    norm = tracking("n c -> domain[n] c", momentum, domain=4)
    x, domain = torch.randn(12, 3, dtype=D), torch.tensor([0, 0, 1, 0, 0, 1, 1, 1, 3, 0, 0, 1])
    batches = list(zip(x.split(4), domain.split(4), strict=True))
    calibrate(norm, batches, lambda norm, batch: norm(batch[0], domain=batch[1]))
    for k in (0, 1):
        torch.testing.assert_close(norm.running_mean[k], x[domain == k].mean(0), **CLOSE)
        torch.testing.assert_close(norm.running_var[k], x[domain == k].var(0), **CLOSE)
    torch.testing.assert_close(norm.running_mean[3], x[8], **CLOSE)  # of one element, a mean
    assert norm.running_var[3].tolist() == [1, 1, 1]
    assert norm.running_mean[2].tolist() == [0, 0, 0]
    assert norm.running_var[2].tolist() == [1, 1, 1]
    if momentum is None:  # a set that no batch had begins anew
        assert norm.num_batches_tracked[:, 0].tolist() == [3, 3, 0, 0]
        y = torch.randn(3, 3, dtype=D)
        norm(y, domain=torch.tensor([2, 2, 2]))
        torch.testing.assert_close(norm.running_mean[2], y.mean(0), **CLOSE)


def test_calibrate_of_a_norm_that_is_called_twice_and_of_one_that_is_not():
    shared, idle = tracking(), tracking()
    idle(torch.randn(4, 3, dtype=D))
    before, x = kept(idle), torch.randn(10, 3, dtype=D)
    calibrate(nn.ModuleList([shared, idle]), x.split(5), lambda norms, x: (norms[0](x), norms[0](2 * x)))
    both = torch.cat([x, 2 * x])
    torch.testing.assert_close(shared.running_mean, both.mean(0), **CLOSE)
    torch.testing.assert_close(shared.running_var, both.var(0), **CLOSE)
    assert shared.num_batches_tracked == 2
    assert_unchanged(idle, before)


def test_calibrate_of_weights():
    norm = tracking("n c, n -> c")
    x, w = torch.randn(9, 3, dtype=D), torch.rand(9, dtype=D)
    calibrate(norm, list(zip(x.split(4), w.split(4), strict=True)), lambda norm, batch: norm(*batch))
    mean = (x * w[:, None]).sum(0) / w.sum()
    torch.testing.assert_close(norm.running_mean, mean, **CLOSE)
    var = ((x - mean).square() * w[:, None]).sum(0) / w.sum()  # weights do not count, so it is not unbiased
    torch.testing.assert_close(norm.running_var, var, **CLOSE)


def test_calibrate_without_anything_to_see():
    norm, masked = tracking(), tracking("b c t, b t -> c")
    for model, batches, forward in (
        (norm, [], None),
        (norm, [torch.randn(0, 3, dtype=D)], None),
        (nn.Sequential(nn.Identity(), nn.ModuleList([norm])), [torch.randn(4, 3)], lambda model, x: model[0](x)),
        (masked, [torch.randn(2, 3, 4, dtype=D)], lambda norm, x: norm(x, torch.zeros(2, 4, dtype=torch.bool))),
    ):
        before = kept(model)
        with pytest.raises(SpecError, match="statistics are those of batches"):
            calibrate(model, batches, forward)
        assert_unchanged(model, before)
    for model in (nn.Linear(3, 3), nn.BatchNorm1d(3), Norm("n c -> c")):
        with pytest.raises(SpecError, match="norms with running statistics are calibrated"):
            calibrate(model, [torch.randn(4, 3)])


# --- evaluation before training --------------------------------------------------------------------------------------


def test_evaluation_before_any_batch_is_an_error():
    norm, x = tracking(affine="c"), torch.randn(5, 3, dtype=D)
    for call in (norm, lambda x: norm(x, return_moments=True)):
        norm.eval()
        with pytest.raises(SpecError, match="have seen no batch"):
            call(x)
    norm(x, moments=moments(x, "n c -> c"))
    norm.train()(x)
    norm.eval()(x)
    norm.reset_running_stats()
    with pytest.raises(SpecError, match="have seen no batch"):
        norm(x)


def test_evaluation_by_what_was_loaded_or_meant():
    x = torch.randn(5, 3, dtype=D)
    trained = tracking()
    trained(x)
    loaded = tracking().eval()
    loaded.load_state_dict(trained.state_dict())
    assert torch.equal(loaded(x), trained.eval()(x))
    statistics = tracking().eval()  # without the number of batches, as old checkpoints are
    state = {name: value for name, value in trained.state_dict().items() if name != "num_batches_tracked"}
    statistics.load_state_dict(state, strict=False)
    assert torch.equal(statistics(x), trained(x))
    for meant in (tracking().eval(), tracking("n c -> domain[n] c", None, domain=2).eval()):
        meant.num_batches_tracked.fill_(1)
        labels = {"domain": torch.zeros(5, dtype=torch.int64)} if "domain" in repr(meant) else {}
        torch.testing.assert_close(meant(x, **labels), x / (1 + 1e-5) ** 0.5, **CLOSE)
    assert tracking().eval()(x, moments=moments(x, "n c -> c")).shape == x.shape


# --- graphs ----------------------------------------------------------------------------------------------------------


def graphs():
    """Nodes, graph of each and type of each, in three batches of unequal size."""
    for sizes in ([3, 5], [2, 2, 7, 4], [6]):
        batch = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
        nodes = len(batch)
        yield torch.randn(nodes, 3, dtype=D) + len(sizes), batch, torch.arange(nodes) % 2


@pytest.mark.extras
@pytest.mark.parametrize("momentum", [0.1, None])
def test_drop_ins_of_graphs_are_calibrated(momentum):
    from flexnorm.graphs import BatchNorm, HeteroBatchNorm, InstanceNorm

    data = list(graphs())
    nodes, types = torch.cat([x for x, _, _ in data]), torch.cat([kind for _, _, kind in data])
    batch_norm = BatchNorm(3, momentum=momentum).double()
    hetero = HeteroBatchNorm(3, 3, momentum=momentum).double()
    instance = InstanceNorm(3, momentum=0.1 if momentum is None else momentum, track_running_stats=True).double()
    for norm in (batch_norm, hetero, instance):  # PyG's begin with mean 0 and variance 1, and evaluate so
        args = {hetero: (data[0][2],), instance: (data[0][1],)}.get(norm, ())
        torch.testing.assert_close(norm.eval()(data[0][0], *args), data[0][0] / (1 + 1e-5) ** 0.5, **CLOSE)
        norm.train()
    calibrate(batch_norm, [x for x, _, _ in data])
    torch.testing.assert_close(batch_norm.module.running_mean, nodes.mean(0), **CLOSE)
    torch.testing.assert_close(batch_norm.module.running_var, nodes.var(0), **CLOSE)
    calibrate(hetero, data, lambda norm, batch: norm(batch[0], batch[2]))
    for k in (0, 1):
        torch.testing.assert_close(hetero.running_mean[k], nodes[types == k].mean(0), **CLOSE)
        torch.testing.assert_close(hetero.running_var[k], nodes[types == k].var(0), **CLOSE)
    assert hetero.running_mean[2].tolist() == [0, 0, 0]
    calibrate(instance, data, lambda norm, batch: norm(batch[0], batch[1]))
    each = [x[batch == k] for x, batch, _ in data for k in range(int(batch.max()) + 1)]
    torch.testing.assert_close(instance.running_mean, torch.stack([g.mean(0) for g in each]).mean(0), **CLOSE)
    torch.testing.assert_close(instance.running_var, torch.stack([g.var(0) for g in each]).mean(0), **CLOSE)
    for norm in (batch_norm.module, hetero, instance):
        assert norm.training
        assert (norm.num_batches_tracked == 3).all() or momentum is None


# --- what layers share with others, and with complex numbers


def test_one_counter_loads_into_many():
    told = {"domain": 3, "c": 2, "track_running_stats": True}
    one, many = (Norm("n c -> domain[n] c", momentum=momentum, **told) for momentum in (0.1, None))
    for _ in range(2):
        one(torch.randn(9, 2), domain=torch.arange(9) % 3)
    many.load_state_dict(one.state_dict())
    assert many.num_batches_tracked.tolist() == [[2, 2]] * 3
    assert torch.equal(many.running_mean, one.running_mean)


@pytest.mark.extras
def test_hetero_batch_norm_without_momentum_has_the_state_of_pyg():
    from torch_geometric.nn import HeteroBatchNorm as Theirs

    from flexnorm.graphs import HeteroBatchNorm

    theirs, ours = (kind(4, num_types=3, momentum=None) for kind in (Theirs, HeteroBatchNorm))
    ours.load_state_dict(theirs.state_dict())
    ours(torch.randn(9, 4), torch.arange(9) % 3)
    theirs.load_state_dict(ours.state_dict())
    assert theirs.num_batches_tracked == 1


def test_batches_of_one_element_do_not_count_without_momentum():
    """One counter serves mean and variance, and one element has no variance."""
    norm = Norm("n c -> c", c=1, track_running_stats=True, momentum=None)
    for batch in ([2.0, 4.0], [9.0], [5.0, 9.0]):
        norm(torch.tensor(batch)[:, None])
    assert norm.running_mean.tolist() == [5.0]
    assert norm.running_var.tolist() == [5.0]
    assert norm.num_batches_tracked == 2


def test_complex_running_statistics():
    norm = Norm("n c -> c", affine="c", c=3, track_running_stats=True, momentum=1.0, dtype=torch.complex128)
    assert (norm.running_mean.dtype, norm.running_var.dtype) == (torch.complex128, torch.float64)
    x = torch.randn(8, 3, dtype=torch.complex128) + (1 - 2j)
    norm(x)
    torch.testing.assert_close(norm.running_mean, x.mean(0))
    variance = (x - x.mean(0)).abs().square().sum(0) / 7
    torch.testing.assert_close(norm.running_var, variance)
    y = norm.eval()(x[:2])
    torch.testing.assert_close(y, (x[:2] - x.mean(0)) / (variance + 1e-5).sqrt())
    calibrate(norm, x.split(3))
    torch.testing.assert_close(norm.running_var, variance)
    for mode in (True, False):
        with pytest.raises(SpecError, match=r"complex where x is(?s:.*)dtype=torch.float64"):
            norm.train(mode)(x.real)
    real = Norm("n c -> c", c=3, track_running_stats=True)
    with pytest.raises(SpecError, match=r"complex where x is(?s:.*)dtype=torch.complex128"):
        real(x)
    assert real.num_batches_tracked == 0


def test_more_bad_input():
    norm = Norm("n c -> c", c=3, track_running_stats=True)
    with pytest.raises(SpecError, match="Moments of the same sets"):
        norm.updated(3)
    with pytest.raises(SpecError, match=r"Moments of the same sets(?s:.*)shape \(2,\)"):
        norm.updated(moments(torch.randn(4, 2), "n c -> c"))
    with pytest.raises(SpecError, match="from 0 to 1"):
        Norm("n c -> c", c=3, track_running_stats=True, momentum=True)
    with pytest.raises(SpecError, match=r"batches are several(?s:.*)\[x\]"):
        calibrate(norm, torch.randn(4, 3))


def test_updates_can_be_switched_off():
    """As of nn.BatchNorm: by the attribute, for batches that are not to count."""
    norm = Norm("n c -> c", c=3, track_running_stats=True)
    norm(torch.randn(8, 3))
    before = norm.running_mean.clone()
    norm.track_running_stats = False
    x = torch.randn(8, 3)
    torch.testing.assert_close(norm(x), normalize(x, "n c -> c"))
    assert torch.equal(norm.running_mean, before)
    norm.track_running_stats = True
    norm(x)
    assert not torch.equal(norm.running_mean, before)


def test_state_of_early_versions_of_torch_has_no_counter():
    theirs = nn.BatchNorm1d(3)
    theirs(torch.randn(8, 3))
    state = theirs.state_dict()
    del state["num_batches_tracked"], state._metadata
    norm = Norm("n c -> c", affine="c", c=3, track_running_stats=True)
    norm.load_state_dict(state)
    x = torch.randn(4, 3)
    torch.testing.assert_close(norm.eval()(x), theirs.eval()(x))

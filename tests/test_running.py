"""Running statistics: torch's BatchNorm, in outputs, gradients and buffers; per label; masked."""

import copy
import pickle

import pytest
import torch
from torch import nn

from flexnorm import Norm, SpecError, normalize

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
    from flexnorm import moments

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
    with pytest.raises(SpecError, match="running statistics need the size of axis 'n'"):
        Norm("n c t -> n c", c=3, track_running_stats=True)
    with pytest.raises(SpecError, match="running statistics have a fixed shape"):
        Norm("... c -> ...", c=3, track_running_stats=True)
    with pytest.raises(SpecError, match="from 0 to 1"):
        Norm("n c -> c", c=3, track_running_stats=True, momentum=1.5)

"""Opacus as a consumer: per-sample gradients of our layers, and one step of private training.

Opacus knows no layer of ours, so it takes vmap(grad) of a copy of the layer on the meta device, with x alone.
"""

import copy

import pytest
import torch
from opacus import GradSampleModule, PrivacyEngine
from opacus.validators import ModuleValidator
from torch import nn

from flexnorm import Norm, given
from flexnorm.images import ChannelGroupNorm
from flexnorm.sequences import TokenGroupNorm

pytestmark = [
    # torch's own, of the hooks that Opacus registers on the first layer, whose input requires no gradient
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),
    # Opacus's own, of its noise, which outside of tests should come from a better generator
    pytest.mark.filterwarnings("ignore:Secure RNG turned off"),
]

IMAGES = {
    "channel": lambda: ChannelGroupNorm(2, 6),
    "channel_silu": lambda: ChannelGroupNorm(3, 6, activation="silu"),
    "channel_no_bias": lambda: ChannelGroupNorm(2, 6, bias=False),
    "group": lambda: Norm("n (g c) ... -> n g", affine="(g c)", g=2, c=3),
    "instance": lambda: Norm("n c ... -> n c", affine="c", c=6),
    "layer": lambda: Norm("n c ... -> n", affine="c", c=6),
    "rms": lambda: Norm("n c ... -> n", affine="c", c=6, center=False, bias=False),
    "group_of_own_weights": lambda: Norm("n (g c) ... -> n g", affine="g", g=2, c=3),
    "unmasked": lambda: Norm("n c h w, n h w -> n", affine="c", c=6),
    "static_labels": lambda: ChannelGroupNorm(3, 6, groups=[1, 2, 3]),
}
TOKENS = {
    "token": lambda: TokenGroupNorm(2, 6),
    "layer_last": lambda: Norm("... c -> ...", affine="c", c=6),
    "rms_last": lambda: Norm("... c -> ...", affine="c", c=6, center=False),
}


def model_with(name, dtype=torch.float64):
    """A model around the norm, and a batch for it."""
    if name in IMAGES:
        norm, x = IMAGES[name](), torch.randn(5, 3, 6, 6, dtype=dtype)
        model = nn.Sequential(nn.Conv2d(3, 6, 3), norm, nn.Tanh(), nn.Flatten(), nn.Linear(6 * 16, 2))
    else:
        norm, x = TOKENS[name](), torch.randn(5, 4, 3, dtype=dtype)
        model = nn.Sequential(nn.Linear(3, 6), norm, nn.Tanh(), nn.Flatten(), nn.Linear(6 * 4, 2))
    for p in norm.parameters():
        nn.init.normal_(p)
    return model.to(dtype), x


def loop(model, x, dy):
    """The gradients of every sample alone, as if no other were."""
    found = {name: [] for name, _ in model.named_parameters()}
    for i in range(len(x)):
        model.zero_grad()
        (model(x[i : i + 1]) * dy[i : i + 1]).sum().backward()
        for name, p in model.named_parameters():
            found[name].append(p.grad.clone())
    return {name: torch.stack(grads) for name, grads in found.items()}


@pytest.mark.parametrize("name", [*IMAGES, *TOKENS])
def test_per_sample_gradients_equal_a_loop(name):
    model, x = model_with(name)
    assert ModuleValidator.validate(model, strict=True) == []
    dy = torch.randn(5, 2, dtype=x.dtype)
    expected = loop(copy.deepcopy(model), x, dy)
    wrapped = GradSampleModule(model, loss_reduction="sum")
    (wrapped(x) * dy).sum().backward()
    assert expected["1.weight"].abs().max() > 1e-3
    for key, p in model.named_parameters():
        torch.testing.assert_close(p.grad_sample, expected[key], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(p.grad, expected[key].sum(0), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["channel", "token", "rms"])
def test_a_step_of_private_training(name):
    """Without noise, DP-SGD is a step along the mean of the clipped gradients, which the loop gives too."""
    model, x = model_with(name, torch.float32)
    peer = copy.deepcopy(model)
    targets = torch.randn(5, 2)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, targets), batch_size=5)
    private, optimizer, loader = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=loader,
        noise_multiplier=0.0,
        max_grad_norm=0.5,
        poisson_sampling=False,
    )
    (batch,) = loader
    nn.functional.mse_loss(private(batch[0]), batch[1]).backward()
    optimizer.step()

    dy = (2 * (peer(batch[0]) - batch[1]) / 2).detach()  # of the mean over two outputs; the mean over samples is later
    samples = loop(peer, batch[0], dy)
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in samples.values()]).norm(dim=0)
    factors = (0.5 / (norms + 1e-6)).clamp(max=1)
    assert (factors < 1).any()
    for (key, p), q in zip(peer.named_parameters(), model.parameters(), strict=True):
        step = torch.einsum("n,n...->...", factors, samples[key]) / 5
        torch.testing.assert_close(q.detach(), p.detach() - 0.1 * step, rtol=1e-5, atol=1e-6)


def test_training_with_noise_learns():
    """Two clouds of points, whole epochs with noise: the loss falls, and the budget is spent."""
    y = torch.arange(64) % 2
    x = torch.randn(64, 8) + 2.0 * (2 * y - 1)[:, None]
    model = nn.Sequential(nn.Linear(8, 8), Norm("n (g c) -> n g", affine="(g c)", g=2, c=4), nn.ReLU(), nn.Linear(8, 2))
    data = torch.utils.data.TensorDataset(x, y)
    engine = PrivacyEngine()
    private, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.5),
        data_loader=torch.utils.data.DataLoader(data, batch_size=16),
        noise_multiplier=0.5,
        max_grad_norm=1.0,
    )
    weight = model[1].weight.detach().clone()
    with torch.no_grad():
        before = nn.functional.cross_entropy(private(x), y)
    for _ in range(5):
        for batch, labels in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(private(batch), labels).backward()
            optimizer.step()
    with torch.no_grad():
        assert nn.functional.cross_entropy(private(x), y) < 0.7 * before
    assert not torch.equal(model[1].weight, weight)
    assert 0 < engine.get_epsilon(delta=1e-3) < float("inf")


def test_the_validator_accepts_masks_from_around():
    model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), ChannelGroupNorm(2, 6), Norm("n c h w, n h w -> n c"))
    with given(mask=torch.rand(2, 4, 4) < 0.7):
        assert ModuleValidator.is_valid(model)
        assert model(torch.randn(2, 3, 4, 4)).shape == (2, 6, 4, 4)


def test_layers_with_buffers_are_refused():
    """Opacus takes every buffer for statistics of the data; at least it says so."""
    norm = Norm("n c ... -> c", affine="c", c=6, track_running_stats=True)
    with pytest.raises(NotImplementedError, match="layer with buffers"):
        GradSampleModule(nn.Sequential(nn.Conv2d(3, 6, 3), norm))


def test_a_fixed_model_with_our_layers_keeps_them():
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), ChannelGroupNorm(2, 6))
    fixed = ModuleValidator.fix_and_validate(model)
    assert type(fixed[1]) is nn.GroupNorm and type(fixed[2]) is ChannelGroupNorm
    torch.testing.assert_close(fixed[2](torch.ones(1, 6, 2, 2)), model[2](torch.ones(1, 6, 2, 2)))

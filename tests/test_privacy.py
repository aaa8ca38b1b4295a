"""What `flexnorm.privacy` adds to Opacus: masks, static labels, and a word where samples share statistics."""

import copy

import pytest
import torch
from opacus import GradSampleModule
from opacus.validators import ModuleValidator
from torch import nn

import flexnorm.privacy  # noqa: F401  # registers
from flexnorm import Norm, Partition, given
from flexnorm.images import ChannelGroupNorm
from flexnorm.mixtures import ContextNorm, SwitchableNorm
from flexnorm.presets import SensorNorm, TemporalGroupNorm, WeightedGroupNorm
from flexnorm.sequences import SequenceGroupNorm, TokenGroupNorm

pytestmark = pytest.mark.filterwarnings(
    "ignore:Full backward hook is firing"
)  # torch's own, of the first layer's hooks


class Masked(nn.Module):
    """Hands the mask on, by position or by name."""

    def __init__(self, first, norm, by_name=False):
        super().__init__()
        self.first, self.norm, self.by_name = first, norm, by_name

    def forward(self, x, mask):
        x = self.first(x)
        return (self.norm(x, mask=mask) if self.by_name else self.norm(x, mask)).tanh()


MASKED = {
    "utterance": (lambda: nn.Conv1d(3, 6, 1), lambda: SequenceGroupNorm(2, 6), (4, 3, 7), "bool"),
    "tokens": (lambda: nn.Linear(3, 6), lambda: TokenGroupNorm(2, 6), (4, 5, 3), "bool"),
    "pixels": (lambda: nn.Conv2d(3, 6, 1), lambda: ChannelGroupNorm(2, 6), (4, 3, 5, 5), "bool"),
    "weights": (lambda: nn.Conv1d(3, 6, 1), lambda: Norm("b c t, b t -> b c", affine="c", c=6), (4, 3, 7), "float"),
}


def masked(name, by_name=False):
    first, norm, shape, kind = MASKED[name]
    x = torch.randn(shape, dtype=torch.float64)
    values = torch.rand(shape[:2] if name == "tokens" else (shape[0], *shape[2:]), dtype=torch.float64)
    model = Masked(first(), norm(), by_name).double()
    for p in model.norm.parameters():
        nn.init.normal_(p)
    return model, x, values < 0.6 if kind == "bool" else values


def equals_a_loop(model, inputs, **options):
    alone = copy.deepcopy(model)
    dy = torch.randn_like(alone(*inputs).detach())
    wrapped = GradSampleModule(model, loss_reduction="sum", **options)
    (wrapped(*inputs) * dy).sum().backward()
    for i in range(len(dy)):
        alone.zero_grad()
        (alone(*(t[i : i + 1] for t in inputs)) * dy[i : i + 1]).sum().backward()
        for p, expected in zip(model.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(p.grad_sample[i], expected.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", MASKED)
def test_per_sample_gradients_with_masks_equal_a_loop(name):
    model, x, mask = masked(name)
    assert ModuleValidator.validate(model, strict=True) == []
    equals_a_loop(model, (x, mask))


@pytest.mark.parametrize("way", ["name", "given"])
def test_a_mask_that_opacus_cannot_see_is_refused(way):
    model, x, mask = masked("utterance", by_name=True)
    wrapped = GradSampleModule(model, loss_reduction="sum")
    if way == "name":
        loss = wrapped(x, mask).sum()
    else:
        with given(mask=mask):
            loss = wrapped(x, None).sum()
    with pytest.raises(NotImplementedError, match=r"positional arguments only(?s:.*)norm\(x, mask\)"):
        loss.backward()


def test_static_labels():
    norm = Norm("n c t -> n kind[c]", affine="c", c=6, kind=Partition.from_sizes([2, 4]))
    nn.init.normal_(norm.weight)
    model = nn.Sequential(nn.Conv1d(3, 6, 1), norm, nn.Tanh()).double()
    equals_a_loop(model, (torch.randn(4, 3, 5, dtype=torch.float64),))


@pytest.mark.parametrize(
    "norm",
    [
        lambda: Norm("n c ... -> c", affine="c", c=6),
        lambda: Norm("n c t -> domain[n] c", affine="c", c=6, domain=2),
        lambda: Norm("n c ... -> n c", affine="c", c=6),
    ],
    ids=["batch", "labels of samples", "instance"],
)
def test_samples_that_share_statistics_are_refused(norm):
    model = nn.Sequential(nn.Conv1d(3, 6, 1), norm())
    errors = ModuleValidator.validate(model, strict=False)
    shares = "-> n c'" not in str(model)
    assert len(errors) == shares
    assert all("share statistics" in str(error) for error in errors)


@pytest.mark.parametrize(("norm", "why"), [(SwitchableNorm(6), "share statistics"), (ContextNorm(2, 6), "a gate")])
def test_mixtures_are_refused(norm, why):
    errors = ModuleValidator.validate(nn.Sequential(nn.Conv1d(3, 6, 1), norm), strict=False)
    assert any(why in str(error) for error in errors)


@pytest.mark.parametrize("name", ["weighted", "frames", "sensors"])
def test_presets_equal_a_loop(name):
    presets = {
        "weighted": lambda: WeightedGroupNorm(2, 6),
        "frames": lambda: TemporalGroupNorm(2, 6),
        "sensors": lambda: SensorNorm([2, 4]),
    }
    torch.manual_seed(0)
    norm = presets[name]().double()
    for p in norm.parameters():
        nn.init.normal_(p)
    equals_a_loop(
        nn.Sequential(nn.Conv1d(3, 6, 1), norm, nn.Tanh()).double(),
        (torch.randn(4, 3, 5, dtype=torch.float64),),
        strict=False,
    )

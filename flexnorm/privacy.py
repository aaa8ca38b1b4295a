"""Opacus: per-sample gradients of norms with masks and static labels, and an error where samples share statistics.

    import flexnorm.privacy

registers every `Norm` with Opacus, as it asks of those who own a layer. Without that, Opacus computes a layer again
from its first argument alone, so that a mask is lost and gradients are wrong.
"""

# mypy: allow-untyped-decorators, allow-subclassing-any

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from . import conversion, grouping, images, mixtures, presets, sequences, spectrograms  # noqa: F401  # all layers
from .errors import say
from .inspection import roles
from .layers.norm import Norm

try:
    from opacus.grad_sample import register_grad_sampler
    from opacus.validators import register_module_validator
    from opacus.validators.errors import UnsupportedModuleError
except ImportError as error:
    raise ImportError('flexnorm.privacy needs Opacus: pip install "flexnorm[privacy]"') from error

__all__ = ["register"]


def register() -> None:
    """Registers all subclasses of `Norm` that there are; call it again for those that are defined later.

    >>> from opacus.validators import ModuleValidator
    >>> ModuleValidator.validate(nn.Sequential(Norm("n c -> c", affine="c", c=8)), strict=False)[0].__class__.__name__
    'UnsupportedModuleError'
    """
    classes = list(dict.fromkeys(_classes(Norm)))
    register_grad_sampler(classes)(_grad_sample)
    register_module_validator(classes)(_refusals)


def _classes(kind: type[Norm]) -> Iterator[type[Norm]]:
    yield kind
    for narrower in kind.__subclasses__():
        yield from _classes(narrower)


class _Bare(nn.Module):
    """The layer without the hooks that Opacus has put on it."""

    def __init__(self, layer: Norm) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *arguments: Tensor) -> Tensor:
        return self.layer.forward(*arguments)


def _grad_sample(layer: Norm, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    """The gradient of every parameter, for every sample: the first axis of x and of a mask."""
    x, *masks = activations
    if layer.__dict__.get("_masked") and not masks:
        raise NotImplementedError(
            say(
                "Opacus knows of positional arguments only, and this layer had a mask that was none",
                received=f"{layer}, with a mask by keyword or from given(...)",
                instead="norm(x, mask)",
            )
        )
    named = dict(layer.named_parameters())
    learned = {name: p.detach() for name, p in named.items() if p.requires_grad}
    fixed = {name: t.detach() for name, t in [*named.items(), *layer.named_buffers()] if name not in learned}
    bare = _Bare(layer)

    def loss(params: dict[str, Tensor], dy: Tensor, *sample: Tensor) -> Tensor:
        state = {f"layer.{name}": t for name, t in (params | fixed).items()}
        y: Tensor = functional_call(bare, state, tuple(t.unsqueeze(0) for t in sample))
        return (y * dy.unsqueeze(0)).sum()

    masks = [mask.expand(len(x), *mask.shape[1:]) for mask in masks]
    found = vmap(grad(loss), (None, 0, *[0] * (1 + len(masks))))(learned, backprops, x, *masks)
    return {named[name]: gradient for name, gradient in found.items()}


def _refusals(layer: Norm) -> list[Any]:
    """Where the sets of a layer go over the samples, the first axis of x, there is no gradient of one sample."""
    for formula, _ in layer.patterns():
        if roles(formula.spec)[:1] not in {"k", "K", "1"}:
            said = "samples of a batch share statistics, so no gradient is that of one"
            return [UnsupportedModuleError(f"{said}: {layer}")]
    if len(layer.patterns()) > 1:
        return [UnsupportedModuleError(f"the gradients of a gate are not known sample by sample: {layer}")]
    return []


register()

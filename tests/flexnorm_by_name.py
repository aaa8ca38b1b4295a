"""Computes what a name of `explain` says, from its text."""

from importlib.util import find_spec

import torch
from torch import nn

import flexnorm.images
import flexnorm.sequences

HAS_AUDIO = find_spec("torchaudio") is not None
_ALL = {"torch": torch, "nn": nn, "flexnorm": flexnorm}


def computed(name, x, **labels):
    """Of x, by the module that is built from the name; labels are ids by their names."""
    name = name.removesuffix(", while its mean_scale is 1")
    if name.startswith("x - "):
        return eval(name, {"x": x})
    name, moved, _ = name.partition(" of x.movedim(-1, 1)")
    name, _, batch = name.partition(" of batch=")
    scope = {**_ALL, **labels}
    if name.startswith("torch_geometric") or "graphs" in name:
        import torch_geometric

        import flexnorm.graphs

        scope["torch_geometric"] = torch_geometric
    if "spectrograms" in name:
        import flexnorm.spectrograms  # noqa: F401
    module = eval(name.removesuffix(" in training"), scope).to(x.dtype)
    assert module.training
    with torch.no_grad():
        if moved:
            return module(x.movedim(-1, 1)).movedim(1, -1)
        return module(x, labels[batch]) if batch else module(x)

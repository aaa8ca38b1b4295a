"""What one eager call costs beside the work: a tiny tensor, against `nn.GroupNorm`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from flexnorm import Norm

from .measure import bootstrap, palindrome, screen

NAME = "overhead 2x32x8x8"


def measure(device: str, rounds: int) -> list[dict[str, Any]]:
    """Rows in microseconds per call; `difference` is ours less that of nn.GroupNorm."""
    x = torch.randn(2, 32, 8, 8, device=device)
    dy = torch.randn_like(x)
    ours = Norm("n (g c) ... -> n g", affine="(g c)", g=8, sizes={"(g c)": 32}).to(device)
    theirs = nn.GroupNorm(8, 32).to(device)

    def quietly(layer: nn.Module) -> Callable[[], object]:
        def call() -> object:
            with torch.no_grad():
                return layer(x)

        return call

    def recorded(layer: nn.Module) -> Callable[[], object]:
        return lambda: layer(x)  # the parameters want gradients

    def both(layer: nn.Module) -> Callable[[], object]:
        leaf, parameters = x.clone().requires_grad_(), list(layer.parameters())
        return lambda: torch.autograd.grad(layer(leaf), [leaf, *parameters], dy)

    rows = []
    for mode, make in (("without grad", quietly), ("with grad", recorded), ("forward+backward", both)):
        runs = {"flexnorm": make(ours), "nn.GroupNorm": make(theirs), "control": make(ours)}
        calls = {name: max(10, round(0.01 / screen(run, device))) for name, run in runs.items()}
        times = {
            name: [1e6 * t for t in values] for name, values in palindrome(runs, calls, 2 * rounds, device).items()
        }
        us = {name: bootstrap(values).median for name, values in times.items()}
        rows.append(
            {
                "case": NAME,
                "mode": mode,
                "microseconds": us["flexnorm"],
                "peer_microseconds": us["nn.GroupNorm"],
                "difference": asdict(_difference(times["flexnorm"], times["nn.GroupNorm"])),
                "control": asdict(_difference(times["control"], times["flexnorm"])),
            }
        )
    return rows


def _difference(a: list[float], b: list[float]) -> Any:
    return bootstrap([p - q for p, q in zip(a, b, strict=True)])

"""What one eager call costs beside the work: a tiny tensor, against `nn.GroupNorm`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from flexnorm import Norm

from .case import Contender, Data
from .measure import bootstrap, palindrome, runner, screen

NAME = "overhead 2x32x8x8"
MODES = {"without grad": "forward", "with grad": "forward with grad", "forward+backward": "forward+backward"}


def measure(device: str, rounds: int) -> list[dict[str, Any]]:
    """Rows in microseconds per call; `difference` is ours less that of nn.GroupNorm."""
    x = torch.randn(2, 32, 8, 8, device=device, requires_grad=True)
    ours = Norm("n (g c) ... -> n g", affine="(g c)", g=8, sizes={"(g c)": 32}).to(device)
    data = Data(x=x, dy=torch.randn_like(x), ours=ours, theirs=nn.GroupNorm(8, 32).to(device))
    mine = Contender("flexnorm", lambda d: d.ours(d.x), module="ours")
    theirs = Contender("nn.GroupNorm", lambda d: d.theirs(d.x), module="theirs")
    contenders = {mine.name: mine, theirs.name: theirs, "control": mine}
    rows = []
    for said, mode in MODES.items():
        runs = {name: runner(contender, [data], mode) for name, contender in contenders.items()}
        calls = {name: max(10, round(0.01 / screen(run, device))) for name, run in runs.items()}
        times = {
            name: [1e6 * t for t in values] for name, values in palindrome(runs, calls, 2 * rounds, device).items()
        }
        us = {name: bootstrap(values).median for name, values in times.items()}
        rows.append(
            {
                "case": NAME,
                "mode": said,
                "microseconds": us["flexnorm"],
                "peer_microseconds": us["nn.GroupNorm"],
                "difference": asdict(_difference(times["flexnorm"], times["nn.GroupNorm"])),
                "control": asdict(_difference(times["control"], times["flexnorm"])),
            }
        )
    return rows


def _difference(a: list[float], b: list[float]) -> Any:
    return bootstrap([p - q for p, q in zip(a, b, strict=True)])

"""One case, measured: a row for every mode."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from . import compiled, gate, gpu
from .case import Case, Contender, Data, like
from .measure import SAMPLE, copier, paired, palindrome, runner, screen
from .memory import saved_bytes

MODES = ("forward", "forward+backward")
NEAR = 1.15
"""Peers within this factor of the fastest, at a first glance, are measured in pairs with us."""

FAR = 3
"""Beyond this factor a glance is enough."""


@dataclass(frozen=True)
class Settings:
    """How to measure. `cache` is the size of the last-level cache in bytes."""

    device: str
    threads: int
    quick: bool
    cache: int
    until: float = math.inf  # of time.monotonic(): no row begins later

    @property
    def rounds(self) -> int:
        return 5 if self.quick else 10

    @property
    def seconds(self) -> float:
        """Cheap rows get more rounds, up to this time."""
        return 0.4 if self.quick else 1.0

    @property
    def gated(self) -> float:
        """Elements on which errors are looked at, where a part of the data stands for all."""
        return 2**21 if self.quick else 2**24  # in float64, with all that autograd keeps of every contender

    @property
    def resident(self) -> int:
        """Bytes of x in the rows that stay in cache: x, y, dy, dx and what peers put between fit together."""
        return self.cache // 16


def measure(case: Case, settings: Settings, *, resident: bool, note: list[str]) -> Iterator[dict[str, Any]]:
    """The rows of a case: with buffers larger than the cache together, or `resident` in it."""
    data = case.draw(1.0, settings.device)
    if resident:
        scale = min(1.0, settings.resident / data.x.nbytes)
        data = case.draw(scale, settings.device)
    else:
        scale = 1.0
    data.x.requires_grad_()
    peers = [*case.peers, *(gpu.peers(case) if settings.device != "cpu" else [])]
    if not settings.quick and not resident:
        peers += _compiled(case, data, note)
    size = data.x.numel()
    gate_scale = scale * min(1.0, settings.gated / size) if case.sets_survive else scale
    errors = gate.errors(case, [case.contender, *peers], gate_scale, settings.device)
    gc.collect()
    saved: dict[str, float | None] = dict.fromkeys(peer.name for peer in peers)
    for contender in [case.contender] if settings.quick else [case.contender, *peers]:
        if not contender.forward_only:
            saved[contender.name] = saved_bytes(contender, data) / data.x.nbytes
    buffers = _buffers(data, 1 if resident else max(1, math.ceil(4 * settings.cache / data.x.nbytes)))
    valid = 1.0 if data.valid is None else data.valid.float().mean().item()
    for mode in MODES:
        if time.monotonic() > settings.until:
            note.append(f"{case.name}{' (in cache)' if resident else ''}, {mode} (time is up)")
            continue
        yield {
            "case": case.name,
            "kind": case.kind,
            "resident": resident,
            "mode": mode,
            "shape": list(data.x.shape),
            "bytes": data.x.nbytes,
            "valid": valid,
            "buffers": len(buffers),
            "gated_elements": round(size * gate_scale / scale),
            "saved": saved[case.contender.name],
            **_timed(case, peers, buffers, mode, settings, errors, valid, saved),
        }


def _compiled(case: Case, data: Data, note: list[str]) -> list[Contender]:
    made = []
    for peer in case.peers:
        if peer.formula:
            fast = compiled.compiled(peer)
            why = compiled.ready(fast, data)
            if why is None:
                made.append(fast)
            else:
                note.append(f"{case.name}: {fast.name}: {why}")
    return made


def _buffers(data: Data, count: int) -> list[Data]:
    more = [like(data, x=data.x.detach().clone().requires_grad_(), dy=data.dy.clone()) for _ in range(count - 1)]
    return [data, *more]


def _timed(
    case: Case,
    peers: list[Contender],
    buffers: list[Data],
    mode: str,
    settings: Settings,
    errors: dict[str, dict[str, Any]],
    valid: float,
    saved: dict[str, float | None],
) -> dict[str, Any]:
    ours = case.contender
    runs = {"copy": copier(buffers), ours.name: runner(ours, buffers, mode), "control": runner(ours, buffers, mode)}
    allowed = [p for p in peers if mode == "forward" or not p.forward_only]
    all_runs = {p.name: runner(p, buffers, mode) for p in allowed}
    glance: dict[str, float] = {}
    for name, run in all_runs.items():
        glance[name] = screen(run, settings.device, min(glance.values(), default=math.inf))
    wrong = {name: gate.worst(errors[name], mode) for name in [ours.name, *all_runs]}
    runs |= {name: all_runs[name] for name in _near(glance, wrong)}

    quick_look = {name: glance.get(name) or screen(run, settings.device) for name, run in runs.items()}
    calls = {name: max(1, math.ceil(SAMPLE / seconds)) for name, seconds in quick_look.items()}
    one = 2 * sum(calls[name] * quick_look[name] for name in runs)
    rounds = min(40, max(settings.rounds, round(settings.seconds / one)))
    times = palindrome(runs, calls, rounds, settings.device)

    seconds = {name: torch.tensor(values, dtype=torch.float64).quantile(0.5).item() for name, values in times.items()}
    ratios = {name: paired(times[name], times[ours.name]) for name in runs if name != ours.name}
    told = [
        {
            "name": name,
            "glance_s": glance[name],
            "seconds": seconds.get(name),
            "ratio": asdict(ratios[name]) if name in ratios else None,
            "error": wrong[name],
            "saved": saved[name],
        }
        for name in all_runs
    ]
    fastest = min((p for p in told if p["ratio"]), key=lambda p: p["ratio"]["median"])
    # copy moves 2 x of its bytes; forward cannot do with less than 2, backward than 3, of the valid ones
    least = (2 if mode == "forward" else 5) * valid / 2
    return {
        "rounds": rounds,
        "calls": calls,
        "seconds": seconds[ours.name],
        "copy_s": seconds["copy"],
        "eta": least * ratios["copy"].median,
        "control": asdict(ratios["control"]),
        "best": fastest["name"],
        "ratio": fastest["ratio"],
        "error": wrong[ours.name],
        "errors": {name: errors[name] for name in wrong},
        "peers": told,
    }


def _near(glance: dict[str, float], wrong: dict[str, float]) -> list[str]:
    """The fastest and those near it, and the fastest that is right unless it is far away; three at most."""
    order = sorted(glance, key=lambda name: glance[name])
    near = [name for name in order if glance[name] <= NEAR * glance[order[0]]][:2]
    right = next((name for name in order if wrong[name] <= 1), None)
    far = right is None or glance[right] > FAR * glance[order[0]]
    return near if far or right in near else [*near, right]

"""What one process does: `python -m benchmarks.rows REQUEST` prints a line of JSON for every result.

A process either looks (who computes what, how exactly, in how much memory, who is fast) or takes times. Looking leaves
large holes in the heap, so a process that takes times has not looked before.
"""

from __future__ import annotations

import gc
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from . import gate, gpu, machine
from .case import SIZES, Case, Contender, Data, like
from .cases import by_name
from .compiled import PREFIX, compiled, ready
from .measure import SAMPLE, copier, floor, palindrome, runner, screen
from .memory import peak_bytes, saved_bytes, warm

MODES = ("forward", "forward+backward")
NEAR = 1.15
"""Peers within this factor of the fastest, at a first glance, are measured in pairs with us."""

FAR = 3
"""Beyond this factor a glance is enough."""

Line = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """How to measure. `threads` is None for as many as torch takes; `kept` says that freed memory stays in the process.

    A row has as many rounds as take so many `seconds`, at least `rounds`. Errors of a large case are looked at on so
    many elements (`gated`) where a part of the data stands for all.
    """

    device: str = "cpu"
    threads: int | None = None
    kept: bool = False
    compile: bool = True
    peak: bool = True
    rounds: int = 10
    seconds: float = 0.2
    gated: int = 2**24


# --- looking ---------------------------------------------------------------------------------------------------------


def look(case: Case, limit: int | None, settings: Settings) -> Line:
    """A case whose x has at most `limit` bytes. None is the case as it is."""
    data = case.draw(1.0, settings.device)
    scale = 1.0 if limit is None else min(1.0, limit / data.x.nbytes)
    if scale < 1:
        data = case.draw(scale, settings.device)
    data.x.requires_grad_()
    nbytes, missing = data.x.nbytes, []
    peers, wanted = [*case.peers, *(gpu.peers(case) if settings.device != "cpu" else [])], []
    if case.table == "torch":
        peers = peers[:1]
    if settings.compile and (case.kind != "native" if case.table == "torch" else limit != SIZES["tiny"]):
        wanted = [p for p in peers if p.formula]
    for fast in map(compiled, wanted):
        why = ready(fast, data)
        if why is None:
            peers.append(fast)
        else:
            missing.append(f"{case.name}, {nbytes / 2**20:.2g} MiB, {fast.name}: {why}")
    share = min(1.0, settings.gated / data.x.numel()) if case.sets_survive else 1.0
    errors = gate.errors(case, [case.contender, *peers], scale * share, settings.device)
    saved = {c.name: saved_bytes(c, data) / nbytes for c in [case.contender, *peers] if not c.forward_only}
    glances: dict[str, dict[str, float]] = {mode: {} for mode in MODES}
    near = {}
    for mode, glance in glances.items():
        for peer in peers if len(peers) > 1 else []:
            if mode == "forward" or not peer.forward_only:
                run = runner(peer, [data], mode)
                glance[peer.name] = screen(run, settings.device, min(glance.values(), default=math.inf))
        near[mode] = _near(glance, {name: gate.worst(errors[name], mode) for name in glance}) or [peers[0].name]
    peak = peak_bytes(case.contender, data, settings.device) if settings.peak else None
    return {
        "case": case.name,
        "limit": limit,
        "scale": scale,
        "shape": list(data.x.shape),
        "bytes": nbytes,
        "valid": 1.0 if data.valid is None else data.valid.float().mean().item(),
        "errors": errors,
        "saved": saved,
        "peak": None if peak is None else peak / nbytes,
        "glances": glances,
        "near": near,
        "missing": missing,
    }


def _near(glance: dict[str, float], wrong: dict[str, float]) -> list[str]:
    """The fastest and those near it, and the fastest that is right unless it is far away; three at most."""
    order = sorted(glance, key=lambda name: glance[name])
    near = [name for name in order if glance[name] <= NEAR * glance[order[0]]][:2]
    right = next((name for name in order if wrong[name] <= 1), None)
    far = right is None or glance[right] > FAR * glance[order[0]]
    return near if far or right in near else [*near, right]


# --- taking times ----------------------------------------------------------------------------------------------------


def timed(case: Case, scale: float, near: Mapping[str, Sequence[str]], settings: Settings) -> Iterator[Line]:
    """A line for every mode: the samples of every side in every round. The side "control" is flexnorm again."""
    ours, device = case.contender, settings.device
    peers = _named(case, {name for names in near.values() for name in names}, device)
    buffers = _buffers(case.draw(scale, device), settings)
    for mode in MODES:
        runs = {
            "copy": copier(buffers),
            "floor": floor(buffers, mode, fresh=not settings.kept and device == "cpu"),
            ours.name: runner(ours, buffers, mode),
            "control": runner(ours, buffers, mode),
            **{name: runner(peers[name], buffers, mode) for name in near[mode]},
        }
        glance = {name: screen(run, device) for name, run in runs.items()}
        calls = {name: max(1, math.ceil(SAMPLE / seconds)) for name, seconds in glance.items()}
        one = 2 * sum(calls[name] * glance[name] for name in runs)
        rounds = min(40, max(settings.rounds, round(settings.seconds / one)))
        gc.collect()
        samples = palindrome(runs, calls, rounds, device)
        yield {
            "case": case.name,
            "scale": scale,
            "mode": mode,
            "threads": torch.get_num_threads(),
            "buffers": len(buffers),
            "samples": samples,
        }


def _named(case: Case, names: set[str], device: str) -> dict[str, Contender]:
    known = {peer.name: peer for peer in [*case.peers, *(gpu.peers(case) if device != "cpu" else [])]}
    return {name: known[name] if name in known else compiled(known[name.removeprefix(PREFIX)]) for name in names}


def _buffers(data: Data, settings: Settings) -> list[Data]:
    """Large inputs take turns, so that none is in the cache when its turn comes."""
    count = 1
    if data.x.nbytes >= SIZES["large"] // 4:
        count = math.ceil(min(4 * machine.cache_bytes(settings.device), 512 << 20) / data.x.nbytes)
    more = [like(data, x=data.x.detach().clone(), dy=data.dy.clone()) for _ in range(count - 1)]
    buffers = [data, *more]
    for buffer in buffers:
        buffer.x.requires_grad_()
    return buffers


# --- a process -------------------------------------------------------------------------------------------------------


def request(task: str, settings: Settings, items: Sequence[Sequence[Any]]) -> str:
    """The items are (case, limit) to look at, and (case, scale, near) to take times of."""
    return json.dumps({"task": task, "settings": asdict(settings), "items": items})


def main(asked: Line) -> None:
    settings = Settings(**asked["settings"])
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    if settings.kept:
        warm(min(4, machine.memory_gib() // 3) << 30)
    for name, *rest in asked["items"]:
        case = by_name[name]
        for line in [look(case, *rest, settings)] if asked["task"] == "look" else timed(case, *rest, settings):
            print(json.dumps(line), flush=True)
        gc.collect()
        if "torch._dynamo" in sys.modules:
            torch._dynamo.reset()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))

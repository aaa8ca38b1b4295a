"""Fresh processes, under three conditions: each measures a few cases, and the median over processes counts.

What a process freed before decides whether its heap keeps memory or gives it back, so one process is one draw of many.
"""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from . import gate, report
from .case import SIZES, Case, size_of
from .measure import ROUNDS, Sample, bootstrap, median, paired
from .rows import MODES, Line, Settings, request

KEEP = (
    "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=1099511627776:glibc.malloc.arena_max=1:glibc.malloc.hugetlb=1"
)
"""Freed memory stays in the process (no mmap, no trimming, one arena), in pages of 2 MiB where the system can."""


@dataclass(frozen=True)
class Condition:
    """What a process has. `said` is the heading of its table."""

    said: str
    environment: dict[str, str] = field(default_factory=dict)
    threads: int | None = None
    kept: bool = False


CONDITIONS = {
    "plain": Condition("A plain process"),
    "kept": Condition("Memory kept in the process", {"GLIBC_TUNABLES": KEEP}, kept=True),
    "one thread": Condition("One thread", threads=1),
    "uncompiled": Condition("Without the compiled library", {"FLEXNORM_CPU": "0"}),
}

Item = tuple[Case, "int | None"]
"""A case and the most bytes of its x. None is the case as it is."""


def sized(case: Case, sizes: Sequence[str] = tuple(SIZES)) -> list[Item]:
    return [(case, None)] if case.table == "torch" else [(case, SIZES[size]) for size in sizes]


@dataclass(frozen=True)
class Part:
    """Items that are measured under one condition, in so many processes each."""

    condition: str
    items: Sequence[Item]
    processes: int = 3


AT_ONCE = 20
"""Items of one process. A start takes 3 s, so fewer items would cost more."""


def measure(parts: Sequence[Part], settings: Settings, deadline: float, missing: list[str]) -> Iterator[Line]:
    """The rows of all parts. After the deadline no process begins, and rows come from fewer processes."""
    looked: dict[tuple[bool, str, int | None], Line] = {}
    for part in parts:
        condition = CONDITIONS[part.condition]
        bare = condition.environment.get("FLEXNORM_CPU") == "0"
        keys = [(bare, case.name, limit) for case, limit in part.items]
        for some in _at_once([(name, limit) for _, name, limit in keys if (bare, name, limit) not in looked]):
            environment = condition.environment if bare else {}
            for line in _lines("look", settings, some, environment, deadline, missing):
                looked[bare, line["case"], line["limit"]] = line
                missing += line["missing"]
        found = [looked[key] for key in keys if key in looked]
        least = math.ceil(ROUNDS / part.processes)
        here = replace(settings, threads=condition.threads, kept=condition.kept, rounds=least)
        timings: list[Line] = []
        for number in range(part.processes):
            items = [(line["case"], line["scale"], line["near"]) for line in found]
            random.Random(number).shuffle(items)  # other neighbors leave another heap
            for some in _at_once(items):
                timings += _lines("time", here, some, condition.environment, deadline, missing)
        yield from _rows(part.condition, found, timings)


def _at_once(items: Sequence[Any]) -> Iterator[Sequence[Any]]:
    for first in range(0, len(items), AT_ONCE):
        yield items[first : first + AT_ONCE]


def _rows(condition: str, found: Sequence[Line], timings: Sequence[Line]) -> Iterator[Line]:
    from .cases import by_name

    for line in found:
        for mode in MODES:
            these = [
                t for t in timings if t["case"] == line["case"] and t["scale"] == line["scale"] and t["mode"] == mode
            ]
            if these:
                yield row(by_name[line["case"]], condition, line, mode, these)


def _lines(
    task: str,
    settings: Settings,
    items: Sequence[Any],
    environment: dict[str, str],
    deadline: float,
    missing: list[str],
) -> list[Line]:
    """What one process prints. What it does not is named in `missing`."""
    left, out, why = deadline - time.monotonic(), "", "time is up"
    if left > 0:
        try:
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.rows", request(task, settings, items)],
                env={**os.environ, "TORCH_CPP_LOG_LEVEL": "ERROR", **environment},
                cwd=report.ROOT,
                stdout=subprocess.PIPE,
                text=True,
                timeout=left,
                check=False,
            )
            out, why = done.stdout, f"the process ended with {done.returncode}" if done.returncode else ""
        except subprocess.TimeoutExpired as error:
            out = (error.stdout or b"").decode()  # bytes, although the rest is text
    lines = [json.loads(line) for line in out.splitlines(keepends=True) if line.endswith("\n")]
    if why:
        lost = {item[0] for item in items} - {line["case"] for line in lines}
        missing += sorted({f"{name} ({task}: {why})" for name in lost} - set(missing))
    return lines


# --- a row -----------------------------------------------------------------------------------------------------------


def row(case: Case, condition: str, found: Line, mode: str, timings: Sequence[Line]) -> Line:
    """One row of what was looked at and of all processes that took times."""
    processes = [{name: [Sample(*s) for s in side] for name, side in t["samples"].items()} for t in timings]

    def over(name: str, value: Callable[[Sample], float]) -> list[float]:
        return [median(map(value, process[name])) for process in processes]

    def seconds(name: str) -> float:
        return median(over(name, lambda s: s.seconds))

    def faults(name: str) -> float:
        return median(over(name, lambda s: s.faults))

    def ratio(name: str, other: str = "flexnorm") -> Any:
        return bootstrap(*(paired(process[name], process[other]) for process in processes))

    near = found["near"][mode]
    wrong = {name: gate.worst(errors, mode) for name, errors in found["errors"].items()}
    peers = [
        {
            "name": name,
            "seconds": seconds(name),
            "seconds_of_processes": over(name, lambda s: s.seconds),
            "faults": faults(name),
            "ratio": asdict(ratio(name)),
            "error": wrong[name],
            "saved": found["saved"].get(name),
        }
        for name in near
    ]
    best = min(peers, key=lambda p: p["ratio"]["median"])
    return {
        "case": case.name,
        "table": case.table,
        "kind": case.kind,
        "short": case.short,
        "condition": condition,
        "size": size_of(found["bytes"]),
        "mode": mode,
        "shape": found["shape"],
        "bytes": found["bytes"],
        "valid": found["valid"],
        "threads": timings[0]["threads"],
        "buffers": timings[0]["buffers"],
        "processes": len(processes),
        "rounds": sum(len(process["flexnorm"]) for process in processes),
        "seconds": seconds("flexnorm"),
        "seconds_of_processes": over("flexnorm", lambda s: s.seconds),
        "faults": faults("flexnorm"),
        "copy_s": seconds("copy"),
        "floor_s": seconds("floor"),
        "eta": found["valid"] * ratio("floor").median,
        "control": asdict(ratio("control")),
        "best": best["name"],
        "ratio": best["ratio"],
        "error": wrong["flexnorm"],
        "errors": found["errors"],
        "saved": found["saved"]["flexnorm"],
        "peak": found["peak"] if mode == "forward+backward" else None,
        "peers": peers,
        "glances": found["glances"][mode],
    }

"""Time, paired: what is compared runs in turns, forth and back, and only ratios within a round are looked at."""

from __future__ import annotations

import gc
import itertools
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from .case import Contender, Data

Run = Callable[[], object]

SAMPLE = 2e-3
"""Seconds that one sample lasts at least: short calls are repeated."""


def step(contender: Contender, data: Data, mode: str) -> Run:
    """One call on these data. The caller turns gradients off, if the mode is "forward"."""
    if mode != "forward+backward":
        return partial(contender.call, data)
    leaves = [data.x, *contender.parameters(data)]
    return lambda: torch.autograd.grad(contender.call(data), leaves, data.dy)


def runner(contender: Contender, buffers: Sequence[Data], mode: str) -> Run:
    """One call; each takes the next of the buffers, so that together they are larger than the cache."""
    turn = itertools.cycle([step(contender, data, mode) for data in buffers])

    def quietly() -> object:
        with torch.no_grad():
            return next(turn)()

    return quietly if mode == "forward" else lambda: next(turn)()


def copier(buffers: Sequence[Data]) -> Run:
    """`y.copy_(x)` of the same bytes, dtype and layout: what the memory allows."""
    turn = itertools.cycle(buffers)
    y = torch.empty_like(buffers[0].x)

    def copy() -> object:
        with torch.no_grad():
            return y.copy_(next(turn).x)

    return copy


def sample(run: Run, calls: int, device: str) -> float:
    """Seconds per call."""
    if device == "cpu":
        start = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - start) / calls
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    for _ in range(calls):
        run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) * 1e-3 / calls


def screen(run: Run, device: str, best: float = math.inf) -> float:
    """The lesser of two samples after a warm-up: enough to see who is worth a paired measurement.

    Whose first call takes ten times as long as the `best` so far, and a tenth of a second, is not asked again.
    """
    cold = sample(run, 1, device)
    if cold > max(0.1, 10 * best):
        return cold
    first = sample(run, 1, device)
    calls = max(1, math.ceil(SAMPLE / first))
    return min(first if calls == 1 else sample(run, calls, device), sample(run, calls, device))


def palindrome(runs: Mapping[str, Run], calls: Mapping[str, int], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of every run in every round: A B C C B A, so that a drift meets all of them alike."""
    names = list(runs)
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        this = dict.fromkeys(names, 0.0)
        for name in names + names[::-1]:
            this[name] += sample(runs[name], calls[name], device) / 2
        for name in names:
            times[name].append(this[name])
    return times


def orders(names: Iterable[str]) -> Iterator[list[str]]:
    """A random order, the same backwards, and so on: A B, B A. Every name follows every other equally often."""
    order, draw = list(names), random.Random(0)
    while True:
        draw.shuffle(order)
        yield order[:]
        yield order[::-1]


ROUNDS = 10
"""The least number of rounds."""


def interleaved(runs: Mapping[str, Sequence[Run]], steps: int, seconds: float = math.inf) -> dict[str, list[float]]:
    """Seconds per call of every run in every round. A round is so many steps, and step i is call i of every run.

    The order of the runs changes with every step, so that no run finds its input in the cache more often than another.
    No step begins after so many `seconds`, except in the first rounds. The garbage collector is off.
    """
    until = time.monotonic() + seconds
    taken: dict[str, list[float]] = {name: [] for name in runs}
    order = orders(runs)
    gc.freeze()
    gc.disable()
    try:
        for i in range(min(map(len, runs.values()))):
            if i >= ROUNDS * steps and time.monotonic() > until:
                break
            for name in next(order):
                run = runs[name][i]
                start = time.perf_counter()
                run()
                taken[name].append(time.perf_counter() - start)
    finally:
        gc.enable()
        gc.unfreeze()
    return {name: in_rounds(values, steps) for name, values in taken.items()}


def in_rounds(values: Sequence[float], steps: int) -> list[float]:
    """Means of so many neighbors each. The rest is left out."""
    return [sum(values[i : i + steps]) / steps for i in range(0, len(values) - steps + 1, steps)]


@dataclass(frozen=True)
class Ratio:
    """The median of paired ratios, and where 95 of 100 bootstrap medians lie."""

    median: float
    low: float
    high: float


def paired(numerator: Sequence[float], denominator: Sequence[float]) -> Ratio:
    return bootstrap([a / b for a, b in zip(numerator, denominator, strict=True)])


def bootstrap(values: Sequence[float], resamples: int = 2000) -> Ratio:
    """Rounds are drawn with replacement; the seed is fixed, so that the same times give the same interval."""
    v = torch.tensor(values, dtype=torch.float64)
    drawn = torch.randint(len(values), (resamples, len(values)), generator=torch.Generator().manual_seed(0))
    medians = v[drawn].quantile(0.5, dim=1)
    low, high = medians.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Ratio(v.quantile(0.5).item(), low, high)

"""Time, paired: what is compared runs in turns, forth and back, and only ratios within a round are looked at."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from .case import Contender, Data

Run = Callable[[], object]

SAMPLE = 2e-3
"""Seconds that one sample lasts at least: short calls are repeated."""


def runner(contender: Contender, buffers: Sequence[Data], mode: str) -> Run:
    """One call; each takes the next of the buffers, so that together they are larger than the cache."""
    turn = itertools.cycle(buffers)

    def forward() -> object:
        with torch.no_grad():
            return contender.call(next(turn))

    def both() -> object:
        data = next(turn)
        y = contender.call(data)
        return torch.autograd.grad(y, [data.x, *contender.parameters(data)], data.dy)

    return forward if mode == "forward" else both


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

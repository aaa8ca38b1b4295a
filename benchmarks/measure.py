"""Time, paired: what is compared runs in turns, forth and back, and only ratios within a round are looked at."""

from __future__ import annotations

import gc
import itertools
import math
import random
import resource
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch

from .case import Contender, Data

Run = Callable[[], object]

SAMPLE = 2e-3
"""Seconds that one sample lasts at least: short calls are repeated."""


class Sample(NamedTuple):
    """Of one call."""

    seconds: float
    faults: float

    @classmethod
    def mean(cls, samples: Sequence[Sample]) -> Sample:
        seconds, faults = zip(*samples, strict=True)
        return cls(sum(seconds) / len(samples), sum(faults) / len(samples))


def page_faults() -> int:
    """Pages that the process, all its threads, got from the system so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


# --- what runs -------------------------------------------------------------------------------------------------------


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
    """`y.copy_(x)` of the same bytes, dtype and layout."""
    y = torch.empty_like(buffers[0].x)
    return runner(Contender("copy", lambda d: y.copy_(d.x)), buffers, "forward")


def floor(buffers: Sequence[Data], mode: str, *, fresh: bool) -> Run:
    """What the memory allows: a copy of x forward; backward a copy of dy, and a read of x.

    The copies are `clone()` if results are `fresh` memory at every call, else `copy_`.
    """
    y = torch.empty_like(buffers[0].x)
    copy = torch.clone if fresh else y.copy_

    def least(d: Data) -> object:
        copied = copy(d.x)
        return copied if mode == "forward" else (copied, copy(d.dy), d.x.sum())

    return runner(Contender("floor", least), buffers, "forward")


# --- samples ---------------------------------------------------------------------------------------------------------


def sample(run: Run, calls: int, device: str) -> Sample:
    before = page_faults()
    if device == "cpu":
        start = time.perf_counter()
        for _ in range(calls):
            run()
        seconds = time.perf_counter() - start
    else:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        begin.record()
        for _ in range(calls):
            run()
        end.record()
        torch.cuda.synchronize()
        seconds = begin.elapsed_time(end) * 1e-3
    return Sample(seconds / calls, (page_faults() - before) / calls)


def screen(run: Run, device: str, best: float = math.inf) -> float:
    """The lesser of two samples after a warm-up: enough to see who is worth a paired measurement.

    Whose first call takes ten times as long as the `best` so far, and a tenth of a second, is not asked again.
    """
    cold = sample(run, 1, device).seconds
    if cold > max(0.1, 10 * best):
        return cold
    first = sample(run, 1, device).seconds
    calls = max(1, math.ceil(SAMPLE / first))
    return min(first if calls == 1 else sample(run, calls, device).seconds, sample(run, calls, device).seconds)


def palindrome(runs: Mapping[str, Run], calls: Mapping[str, int], rounds: int, device: str) -> dict[str, list[Sample]]:
    """A sample of every run in every round: A B C C B A, so that a drift meets all of them alike."""
    names = list(runs)
    taken: dict[str, list[Sample]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names + names[::-1]:
            taken[name].append(sample(runs[name], calls[name], device))
    return {name: in_rounds(samples, 2) for name, samples in taken.items()}


def orders(names: Iterable[str]) -> Iterator[list[str]]:
    """A random order, the same backwards, and so on: A B, B A. Every name follows every other equally often."""
    order, draw = list(names), random.Random(0)
    while True:
        draw.shuffle(order)
        yield order[:]
        yield order[::-1]


ROUNDS = 10
"""The least number of rounds of a row, over all its processes."""


def interleaved(runs: Mapping[str, Sequence[Run]], steps: int, seconds: float = math.inf) -> dict[str, list[Sample]]:
    """A sample of every run in every round. A round is so many steps, and step i is call i of every run.

    The order of the runs changes with every step, so that no run finds its input in the cache more often than another.
    No step begins after so many `seconds`, except in the first rounds. The garbage collector is off.
    """
    until = time.monotonic() + seconds
    taken: dict[str, list[Sample]] = {name: [] for name in runs}
    order = orders(runs)
    gc.freeze()
    gc.disable()
    try:
        for i in range(min(map(len, runs.values()))):
            if i >= ROUNDS * steps and time.monotonic() > until:
                break
            for name in next(order):
                taken[name].append(sample(runs[name][i], 1, "cpu"))
    finally:
        gc.enable()
        gc.unfreeze()
    return {name: in_rounds(samples, steps) for name, samples in taken.items()}


def in_rounds(samples: Sequence[Sample], steps: int) -> list[Sample]:
    """Means of so many neighbors each. The rest is left out."""
    return [Sample.mean(samples[i : i + steps]) for i in range(0, len(samples) - steps + 1, steps)]


# --- ratios ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ratio:
    """The median of paired ratios, and where 95 of 100 bootstrap medians lie."""

    median: float
    low: float
    high: float


def median(values: Iterable[float]) -> float:
    return torch.tensor(list(values), dtype=torch.float64).quantile(0.5).item()


def paired(numerator: Sequence[Sample], denominator: Sequence[Sample]) -> list[float]:
    """The ratio of times of every round."""
    return [a.seconds / b.seconds for a, b in zip(numerator, denominator, strict=True)]


def bootstrap(*processes: Sequence[float], resamples: int = 2000) -> Ratio:
    """The median over processes of the median over their rounds.

    Processes are drawn with replacement, and rounds within each of them. The seed is fixed, so that the same times give
    the same interval.
    """
    generator = torch.Generator().manual_seed(0)
    medians = []
    for rounds in processes:
        v = torch.tensor(rounds, dtype=torch.float64)
        drawn = torch.randint(len(v), (resamples, len(v)), generator=generator)
        medians.append(v[drawn].quantile(0.5, dim=1))
    who = torch.randint(len(medians), (resamples, len(medians)), generator=generator)
    which = torch.randint(resamples, (resamples, len(medians)), generator=generator)
    of_processes = torch.stack(medians)[who, which].quantile(0.5, dim=1)
    low, high = of_processes.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Ratio(median(map(median, processes)), low, high)

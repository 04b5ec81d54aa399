"""Timing loops against each other."""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

from .loops import Loop
from .workload import on_gpu

QUEUED_ROUND = 0.03  # seconds: starts and ends differ by 0.1 to 0.5 ms


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds a call, over rounds of many calls."""

    median: float
    low: float  # quartiles
    high: float
    rounds: int
    calls: int  # a round

    @property
    def microseconds(self) -> dict[str, Any]:
        return {
            "median_us": self.median * 1e6,
            "quartiles_us": [self.low * 1e6, self.high * 1e6],
            "rounds": self.rounds,
            "calls_a_round": self.calls,
        }

    @classmethod
    def of(cls, samples: list[float], calls: int) -> "Timing":
        low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median, low, high, len(samples), calls)


def measure(
    loops: dict[str, Any],
    seconds: float,
    rounds: int = 15,
    clock: Callable[[], float] = time.perf_counter,
    queued: bool | None = None,
    shortest: float = QUEUED_ROUND,
) -> dict[str, Timing]:
    """Times loops against each other.

    They take turns, so that whatever else the machine does meets all of them. Before a
    loop's turn some steps are run uncounted: what the others left in the caches, and a
    program's first start after another's, are no part of a decode loop.

    Where work is queued (`None`: on a GPU), starting and noticing the end take about a
    millisecond, however many steps lie between. So a round is timed with few steps and
    with many, either first in turn, and what counts is the difference. It lasts
    `shortest` at least, whatever `seconds` says, and a turn 1.75 times as long.
    """
    queued = on_gpu() if queued is None else queued
    a_round = max(seconds / rounds / len(loops), shortest if queued else 0)

    def timed(loop: Loop, steps: int) -> float:
        start = clock()
        loop.run(steps)
        loop.wait()
        return clock() - start

    def added(loop: Loop, steps: int, few: int, few_first: bool) -> float:
        if few_first:
            return -timed(loop, few) + timed(loop, few + steps)
        return timed(loop, few + steps) - timed(loop, few)

    def filling(loop: Loop) -> int:
        timed(loop, 1)
        if not queued:
            return max(1, int(a_round / max(timed(loop, 1), 1e-6)))
        steps = 1
        while (took := added(loop, steps, few=1, few_first=True)) < a_round / 2:
            steps *= 2
        return math.ceil(steps * a_round / took)

    steps = {name: filling(loop) for name, loop in loops.items()}
    samples: dict[str, list[float]] = {name: [] for name in loops}
    for turn in range(rounds):
        for name, loop in loops.items():
            few = -(-steps[name] // 4)
            timed(loop, few)
            if queued:
                took = added(loop, steps[name], few, few_first=turn % 2 == 0)
            else:
                took = timed(loop, steps[name])
            samples[name].append(took / (steps[name] * loop.calls))
    return {
        name: Timing.of(samples[name], steps[name] * loop.calls)
        for name, loop in loops.items()
    }

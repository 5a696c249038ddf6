"""Timing several things side by side, so that they can be compared on a machine that has other things to do."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

KeyT = TypeVar("KeyT")


@dataclass(frozen=True)
class Timing:
    """Seconds: the median and the quartiles around it."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        unit, scale = ("s", 1) if self.median >= 1 else ("ms", 1e3)
        return f"{self.median * scale:.2f} {unit} ({self.low * scale:.2f} to {self.high * scale:.2f})"


def measure(
    contestants: Mapping[str, Callable[[], object]],
    rounds: int,
    warmups: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time each contestant once a round, so that a slow minute of the machine falls on all of them alike.

    Every other round runs backwards: nobody always follows the same neighbour.
    """
    for run in list(contestants.values()) * warmups:
        run()
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for index in range(rounds):
        for name in in_turn(contestants, index):
            gc.collect()
            start = clock()
            contestants[name]()
            seconds[name].append(clock() - start)
    return {name: summarise(values) for name, values in seconds.items()}


def in_turn(contestants: Iterable[KeyT], index: int) -> list[KeyT]:
    """The order of a round: backwards in every other one."""
    return list(contestants)[:: -1 if index % 2 else 1]


def summarise(values: Sequence[float]) -> Timing:
    """The median and the quartiles of one or more values."""
    if len(values) == 1:
        return Timing(values[0], values[0], values[0])
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return Timing(statistics.median(values), low, high)

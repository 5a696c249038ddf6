"""Timing several things side by side, so that they can be compared on a machine that has other things to do."""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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

    The order differs from round to round: nobody always follows the same neighbour.
    """
    for run in list(contestants.values()) * warmups:
        run()
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    gc.collect()
    gc.freeze()  # what there is already need not be walked before every run
    try:
        for index in range(rounds):
            for name in in_turn(contestants, index):
                gc.collect()
                start = clock()
                contestants[name]()
                seconds[name].append(clock() - start)
    finally:
        gc.unfreeze()
    return {name: summarise(values) for name, values in seconds.items()}


@contextmanager
def collector_paused() -> Iterator[None]:
    """Without the garbage collector."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def in_turn(contestants: Iterable[KeyT], index: int) -> list[KeyT]:
    """The order of a round: a new one every other time, and the same backwards in between."""
    order = list(contestants)
    random.Random(index // 2).shuffle(order)
    return order[::-1] if index % 2 else order


def summarise(values: Sequence[float]) -> Timing:
    """The median and the quartiles of one or more values."""
    if len(values) == 1:
        return Timing(values[0], values[0], values[0])
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return Timing(statistics.median(values), low, high)


# Pairs after which a duel is looked at, and how sure it must be then. With four looks at half a percent each, two
# contestants that are equally fast are told apart in at most two of a hundred duels.
_LOOKS = (10, 20, 40, 80)
_DOUBT = 0.005


@dataclass(frozen=True)
class Duel:
    """Two contestants timed in turns.

    Attributes:
        first: Median seconds of the first one.
        second: Of the second one.
        pairs: How often both were timed.
        winner: 0 for the first, 1 for the second, None when the two cannot be told apart.
    """

    first: float
    second: float
    pairs: int
    winner: int | None


def duel(
    first: Callable[[], object],
    second: Callable[[], object],
    *,
    patience: float = 10.0,
    clock: Callable[[], float] = time.perf_counter,
) -> Duel:
    """Find out which of two is faster, as soon as that is sure.

    Each pair is one run of either, one right after the other and in alternating order, so whatever else the machine
    does falls on both alike. Who won a pair is all that counts (a sign test: the confidence interval of the median
    ratio excludes one), since single times are far from any distribution: a pause of a hundred milliseconds says no
    more than one of a microsecond.

    Args:
        first: What to run; it ends when its work is done. Likewise ``second``.
        patience: Seconds after which no more pairs are timed, once there are ten.
        clock: Tells the time in seconds.
    """
    runs = (first, second)
    for run in (*runs, *runs):
        run()
    seconds: tuple[list[float], list[float]] = ([], [])
    begun = clock()
    for pair in range(1, _LOOKS[-1] + 1):
        for index in (0, 1) if pair % 2 else (1, 0):
            start = clock()
            runs[index]()
            seconds[index].append(clock() - start)
        late = pair >= _LOOKS[0] and clock() - begun > patience
        winner = _winner(*seconds) if pair in _LOOKS or late else None
        if winner is not None or late:
            break
    return Duel(statistics.median(seconds[0]), statistics.median(seconds[1]), pair, winner)


def _winner(first: Sequence[float], second: Sequence[float]) -> int | None:
    """Who won more pairs than chance would explain."""
    wins = (
        sum(a < b for a, b in zip(first, second, strict=True)),
        sum(b < a for a, b in zip(first, second, strict=True)),
    )
    pairs, most = sum(wins), max(wins)
    chance = 2 * sum(math.comb(pairs, k) for k in range(most, pairs + 1)) / 2**pairs
    return wins.index(most) if chance < _DOUBT else None

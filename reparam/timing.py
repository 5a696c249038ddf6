"""Seconds of several functions, timed in turns: comparable on a machine that has other things to do."""

from __future__ import annotations

import gc
import itertools
import math
import random
import statistics
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

KeyT = TypeVar("KeyT")
RunT = TypeVar("RunT")
TimeT = TypeVar("TimeT")


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
    contestants: Mapping[KeyT, Callable[[], object]],
    rounds: int,
    warmups: int = 1,
    clock: Callable[[], float] = time.perf_counter,
    *,
    least: int = 1,
    patience: float = math.inf,
) -> dict[KeyT, Timing]:
    """The times of several functions, each run once a round.

    Args:
        contestants: What to run, by name.
        rounds: How often each is timed.
        warmups: How often each is run before.
        clock: Tells the time in seconds.
        least: Rounds after which ``patience`` may end it.
        patience: Seconds after which no more rounds begin.
    """
    for run in list(contestants.values()) * warmups:
        run()
    found: list[dict[KeyT, float]] = []
    begun = time.perf_counter()
    for seconds in in_rounds(contestants, stopwatch(clock)):
        found.append(seconds)
        if len(found) >= rounds or (len(found) >= least and time.perf_counter() - begun > patience):
            break
    return {name: summarise([seconds[name] for seconds in found]) for name in contestants}


def in_rounds(
    contestants: Mapping[KeyT, RunT], timer: Callable[[RunT], TimeT], start: int = 0
) -> Generator[dict[KeyT, TimeT], None, None]:
    """Rounds without end: what ``timer`` says of each contestant, one after the other.

    A slow minute of the machine falls on all of them alike, and nobody always follows the same neighbour. The garbage
    collector works between rounds only; where rounds are part of a round, between those.

    Args:
        contestants: What is timed, by name.
        timer: Times one of them.
        start: The number of the first round, which its order depends on.
    """
    with collector_paused() as outermost:
        try:
            if outermost:
                gc.freeze()  # what there is already need not be walked before every round
            for index in itertools.count(start):
                if outermost:
                    gc.collect()
                yield {name: timer(contestants[name]) for name in in_turn(contestants, index)}
        finally:
            if outermost:
                gc.unfreeze()


@contextmanager
def collector_paused() -> Iterator[bool]:
    """Without the garbage collector; whether it was at work before."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield enabled
    finally:
        if enabled:
            gc.enable()


def stopwatch(clock: Callable[[], float] = time.perf_counter) -> Callable[[Callable[[], object]], float]:
    """What times one run of a function, in seconds."""

    def seconds(run: Callable[[], object]) -> float:
        start = clock()
        run()
        return clock() - start

    return seconds


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

    Each pair is one run of either, one right after the other and in changing order, so whatever else the machine
    does falls on both alike. Who won a pair is all that counts (a sign test: the confidence interval of the median
    ratio excludes one), since single times are far from any distribution: a pause of a hundred milliseconds says no
    more than one of a microsecond.

    Args:
        first: What to run; it ends when its work is done. Likewise ``second``.
        patience: Seconds after which no more pairs are timed, once there are ten.
        clock: Tells the time in seconds.
    """
    for run in (first, second) * 2:
        run()
    seconds: tuple[list[float], list[float]] = ([], [])
    begun = clock()
    for pair, taken in enumerate(in_rounds({0: first, 1: second}, stopwatch(clock)), start=1):
        for index in (0, 1):
            seconds[index].append(taken[index])
        late = pair >= _LOOKS[0] and clock() - begun > patience
        winner = _winner(*seconds) if pair in _LOOKS or late else None
        if winner is not None or late or pair == _LOOKS[-1]:
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

"""Where the taps of an axis lie."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from types import EllipsisType


@dataclass(frozen=True)
class Lattice:
    """Taps ``first, first + step, ...`` of one axis; the step of a single tap means nothing."""

    first: int
    step: int
    count: int

    @property
    def last(self) -> int:
        """The last tap."""
        return self.first + self.step * (self.count - 1)

    def stretched(self, factor: int) -> Lattice:
        """``factor`` times every tap."""
        return Lattice(factor * self.first, factor * self.step, self.count)

    def moved(self, distance: int) -> Lattice:
        """Every tap plus ``distance``."""
        return Lattice(self.first + distance, self.step, self.count)

    def padding(self, growth: int) -> tuple[int, int]:
        """Padding that puts the first tap where it is, and makes the output ``growth`` larger than the input."""
        return -self.first, growth + self.last

    def within(self, other: Lattice) -> slice:
        """These taps as a slice of another lattice, which contains them."""
        first, step = (self.first - other.first) // other.step, max(1, self.step // other.step)
        return slice(first, first + step * (self.count - 1) + 1, step)


def within(taps: Sequence[Lattice], lattice: Sequence[Lattice]) -> tuple[EllipsisType | slice, ...]:
    """Index of the taps of every axis in a kernel on ``lattice``."""
    return (..., *(own.within(all_taps) for own, all_taps in zip(taps, lattice, strict=True)))


def _step(distances: Sequence[int]) -> int:
    """Largest spacing whose multiples contain all distances; 1 when there is a single tap."""
    return reduce(math.gcd, distances, 0) or 1


def sum_lattice(a: Lattice, b: Lattice) -> Lattice:
    """The coarsest lattice that contains every sum of a tap of ``a`` and a tap of ``b``."""
    step = _step([taps.step for taps in (a, b) if taps.count > 1])
    return Lattice(a.first + b.first, step, (a.last + b.last - a.first - b.first) // step + 1)


def common_lattice(own: Sequence[Lattice]) -> Lattice:
    """The coarsest lattice that contains all of some."""
    spacings = [taps.step for taps in own if taps.count > 1]
    step = _step([*spacings, *(taps.first - own[0].first for taps in own)])
    first, last = min(taps.first for taps in own), max(taps.last for taps in own)
    return Lattice(first, step, (last - first) // step + 1)

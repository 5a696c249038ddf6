"""When one kernel is worth having instead of several.

A merged kernel may compute a little more than what it replaces: it saves the writing and reading of a feature map for
every kernel that is no longer launched. Costs are multiply-adds for one position of the output. A :class:`Cost` decides
by counting, the one in :mod:`reparam.tuning.latency` by timing; rules ask the one that their graph has.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from reparam.algebra import AnyConv, AveragePool, Conv, ConvTranspose, Operator

# So much more may be computed, plus so many multiply-adds per output number and kernel saved: about what it costs to
# write a feature map and to read it again.
_GROWTH = 1.5
_ALLOWANCE = 16


def limit(merged: AnyConv, apart: float, saved: int) -> float:
    """Multiply-adds for one output position that a kernel may take in the place of others.

    Args:
        merged: The kernel.
        apart: Multiply-adds of what it replaces, for one output position.
        saved: Kernels that are no longer launched.
    """
    return _GROWTH * apart + _ALLOWANCE * saved * merged.out_channels


def chain(operators: Sequence[Operator], merged: Operator) -> float:
    """Multiply-adds for one output position of operators in a row, the last one first.

    Args:
        operators: What runs, from the output to the input.
        merged: The one operator that equals all of them, which knows the channels.
    """
    total, positions = 0.0, 1.0
    channels = merged.out_channels if isinstance(merged, AnyConv) else 1
    for operator in operators:
        match operator:
            case Conv():
                total += positions * operator.multiply_adds
                positions *= math.prod(operator.stride)
                channels = operator.in_channels
            case ConvTranspose():
                total += positions * operator.multiply_adds
                positions /= math.prod(operator.stride)
                channels = operator.in_channels
            case AveragePool():
                total += positions * channels * math.prod(operator.kernel_size)
                positions *= math.prod(operator.stride)
    return total


Join: TypeAlias = Literal["sum", "concatenation", "several"]


@dataclass(frozen=True)
class Choice:
    """One operator, or what it could take the place of.

    Attributes:
        merged: The one operator; its numbers do not matter.
        branches: What runs otherwise: for every branch the operators in a row, the last one first. An empty branch is
            the value that all of them read.
        kernels: Kernels that these launch, with what joins them.
        join: What becomes of the branches: their ``sum``, their ``concatenation`` along the channels; or they are
            ``several`` values, and slices of the channels of the one.
        shape: Shape of the value that all read, where an example shows it.
    """

    merged: Operator
    branches: tuple[tuple[Operator, ...], ...]
    kernels: int
    join: Join = "sum"
    shape: tuple[int, ...] | None = None

    @property
    def saved(self) -> int:
        """Kernels that are no longer launched."""
        return self.kernels - self.merged.kernels

    @property
    def apart(self) -> float:
        """Multiply-adds of all branches for one output position."""
        return sum(chain(branch, self.merged) for branch in self.branches)


class Cost:
    """Decides by counting: fewer kernels, and hardly more multiply-adds."""

    def too_costly(self, choice: Choice, where: str = "") -> str | None:
        """Why a merged operator is no gain, or None when it is.

        Args:
            choice: The operator, and what it would replace.
            where: The module path that the choice is about.
        """
        merged = choice.merged
        if choice.saved <= 0:
            return "one operator would launch as many kernels"
        if choice.join == "several":
            return "a kernel for several readers saves no multiply-adds"
        if isinstance(merged, AnyConv) and merged.multiply_adds > limit(merged, choice.apart, choice.saved):
            return f"one kernel would take {merged.multiply_adds / max(1.0, choice.apart):.1f} times the multiply-adds"
        return None

"""Permutations of channels that are written as views: a reshape, a permutation of axes, and a reshape back."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch.fx import Node

from reparam.algebra import Permute
from reparam.graph import facts, views

# How many views may be between a value and its permutation.
_LONGEST = 6


@dataclass(frozen=True)
class Length:
    """A number, or a multiple of the size of an axis that depends on the input: ``factor * size``."""

    factor: Fraction
    size: Any = None

    def over(self, other: Length) -> Length | None:
        """The quotient of two, where it is one of these."""
        if other.size not in (None, self.size):
            return None
        return Length(self.factor / other.factor, None if other.size is not None else self.size)

    @property
    def whole(self) -> int | None:
        """The number, where it is a whole one."""
        return int(self.factor) if self.size is None and self.factor.denominator == 1 else None


@dataclass(frozen=True)
class Digits:
    """Part of the index of an axis of the value that a chain of views starts at: every ``stride``, so many."""

    axis: int
    stride: int
    length: Length


_Axes = list[list[Digits]]


def read(end: Node) -> tuple[Permute, Node, list[Node]] | None:
    """The permutation of channels that views end in, the value that is permuted, and the views, from first to last."""
    chain: list[Node] = []
    node = end
    while len(chain) < _LONGEST and views.axes(node) is not None and (node is end or len(node.users) == 1):
        chain.insert(0, node)
        node = node.args[0]  # type: ignore[assignment]
        if facts.of(node).rank == facts.of(end).rank and len(chain) > 1:
            permutation = _permutation(node, chain)
            if permutation is not None:
                return permutation, node, chain
    return None


def read_from(start: Node) -> tuple[Permute, list[Node]] | None:
    """The same for the views that start at a node; without the value, which is what it reads."""
    node = start
    for _ in range(_LONGEST):
        found = read(node)
        if found is not None:
            return (found[0], found[2]) if found[2][0] is start else None
        if views.axes(node) is None or len(node.users) != 1:
            return None
        node = next(iter(node.users))
    return None


def _permutation(source: Node, chain: Sequence[Node]) -> Permute | None:
    rank, known = facts.of(source).rank, facts.of(source).channels
    if rank is None or rank < 3 or known is None or known[1] != 1 - rank:
        return None
    axes: _Axes | None = [[Digits(axis, 1, _length(views.size(source, axis)))] for axis in range(rank)]
    for node in chain:
        axes = _after(axes, node) if axes is not None else None
    if axes is None or len(axes) != rank or [digits.axis for digits in axes[0]] != [0]:
        return None
    return _of(axes, known[0], rank - 2)


def _of(axes: _Axes, channels: int, dimensions: int) -> Permute | None:
    """The permutation that leaves an index made of these digits."""
    positions, parts = [], list(axes[1])
    ups, downs = set(), set()
    for axis in range(2, dimensions + 2):
        if not axes[axis] or axes[axis][0].axis != axis:
            return None
        position, *rest = axes[axis]
        positions.append(position)
        downs.add(position.stride)
        ups.add(_count(rest))
        parts += rest
    (up, down), *others = itertools.product(ups, downs)
    if others or up is None or (up * down > 1 and dimensions != 2) or any(p.axis in (0,) for p in parts):
        return None
    order = torch.zeros(1, dtype=torch.int64)
    for part in parts:
        count, inside = part.length.whole, part.axis > 1
        if count is None or (inside and part.stride * count > down):
            return None
        # Among the channels that blocks of positions become, those of a channel lie side by side.
        stride = part.stride * (down**2 if not inside else down if part.axis == 2 else 1)
        order = (order[:, None] + stride * torch.arange(count)).flatten()
    complete = torch.equal(order.sort().values, torch.arange(channels * down**2))
    return Permute(order, dimensions, down, up) if complete else None


def _count(parts: Sequence[Digits]) -> int | None:
    total = 1
    for part in parts:
        if part.length.whole is None:
            return None
        total *= part.length.whole
    return total


def _after(axes: _Axes, node: Node) -> _Axes | None:
    """What the index of a view is made of."""
    wanted = views.wanted_sizes(node) if facts.target_name(node) in ("view", "reshape") else None
    if wanted is not None:
        return _regrouped(axes, [_length_of(item) for item in wanted])
    moved = views.axes(node)
    if moved is not None and moved.merged is not None:
        first, last, _ = moved.merged
        return [*axes[:first], [digit for axis in axes[first : last + 1] for digit in axis], *axes[last + 1 :]]
    if moved is not None and moved.unmerged is not None and facts.target_name(node) == "unflatten":
        at, sizes = moved.unmerged[0], facts.Arguments(node).get(2, "sizes", ())
        made = _regrouped([axes[at]], [_length_of(item) for item in sizes])
        return None if made is None else [*axes[:at], *made, *axes[at + 1 :]]
    if moved is None or sorted(-1 if to is None else to for to in moved.to) != list(range(moved.out_rank)):
        return None
    return [axes[moved.to.index(axis)] for axis in range(moved.out_rank)]


def _regrouped(axes: _Axes, wanted: Sequence[Length | None]) -> _Axes | None:
    """Digits handed out to axes of these lengths, one of which may be left open.

    Half a size is what it says where all lengths are given: their product would be too small otherwise.
    """
    digits = [digit for axis in axes for digit in axis if digit.length.whole != 1]
    lengths = [length for length in (*wanted, *(digit.length for digit in digits)) if length is not None]
    is_open = None in wanted
    if wanted.count(None) > 1 or (is_open and any(length.factor.denominator != 1 for length in lengths)):
        return None
    at = wanted.index(None) if is_open else len(wanted)
    front = _taken(digits, wanted[:at], last=False)
    back = _taken(digits, wanted[:at:-1], last=True) if front is not None else None
    if front is None or back is None or (not is_open and digits):
        return None
    return [*front, *([digits] if is_open else []), *back[::-1]]


def _taken(digits: list[Digits], lengths: Sequence[Length | None], *, last: bool) -> _Axes | None:
    """Digits for axes of these lengths, from the first on, or from the last on; they are taken from the list."""
    found: _Axes = []
    for length in lengths:
        left = length
        axis: list[Digits] = []
        while left is not None and left.whole != 1:
            if not digits:
                return None
            digit = digits.pop(-1 if last else 0)
            rest, more = left.over(digit.length), digit.length.over(left)
            is_part = digit.length.factor.denominator != 1
            if rest is not None and (rest.whole == 1 and not axis if is_part else rest.size is not None or rest.whole):
                left = rest
            elif more is not None and more.whole and (digit.length.size is None or not (last or axis or is_part)):
                # The digit is longer: a part of it is left.
                low, high = (left, more) if last else (more, left)
                parts = Digits(digit.axis, digit.stride * (low.whole or 1), high), Digits(digit.axis, digit.stride, low)
                digit, kept = parts[::-1] if last else parts
                digits.insert(len(digits) if last else 0, kept)
                left = Length(Fraction(1))
            else:
                return None
            axis.insert(0 if last else len(axis), digit)
        if left is None:
            return None
        found.append(axis)
    return found


def _length(size: views.Size) -> Length:
    return Length(Fraction(size)) if isinstance(size, int) else Length(Fraction(1), size)


def _length_of(item: Any) -> Length | None:
    """What an argument of a reshape comes to: a number, a size, a multiple or a part of one."""
    if isinstance(item, Node) and facts.target_name(item) in ("mul", "floordiv", "truediv") and len(item.args) == 2:
        a, b = map(_length_of, item.args)
        if a is None or b is None:
            return None
        if facts.target_name(item) != "mul":
            return a.over(b)
        return Length(a.factor * b.factor, a.size or b.size) if None in (a.size, b.size) else None
    size = views.size_of(item)
    return None if size is None else _length(size)

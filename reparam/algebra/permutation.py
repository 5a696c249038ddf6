"""Permutations of channels, and of channels with the positions around them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from reparam.algebra.affine import ChannelAffine
from reparam.algebra.operator import Ints, Operator
from reparam.errors import AlgebraError


@dataclass(frozen=True, eq=False)
class Permute(Operator):
    """``up(down(x)[order])``: blocks of positions become channels, these are put in order, and become positions again.

    Attributes:
        order: The channel that each takes the place of; integers of shape ``(channels,)``.
        dimensions: Number of axes behind the channels; 2 where channels and positions are exchanged.
        down: Blocks of so many positions an axis become channels first, as by ``nn.PixelUnshuffle``.
        up: So many channels an axis become positions in the end, as by ``nn.PixelShuffle``.
    """

    order: Tensor
    dimensions: int = 2
    down: int = 1
    up: int = 1
    name: ClassVar[str] = "permute"
    passes: ClassVar[bool] = True

    @staticmethod
    def shuffle(channels: int, groups: int, dimensions: int) -> Permute:
        """Channels of ``groups`` groups, taken in turn from each: Zhang et al. 2018, "ShuffleNet", arXiv 1707.01083."""
        return Permute(torch.arange(channels).view(groups, -1).t().flatten(), dimensions)

    @property
    def axis(self) -> int:
        """The channels' axis, counted from the end."""
        return -self.dimensions - 1

    @property
    def in_channels(self) -> int:
        """Channels of the input."""
        return len(self.order) // self.down**2

    def __call__(self, x: Tensor) -> Tensor:
        """``up(down(x)[order])``."""
        x = F.pixel_unshuffle(x, self.down) if self.down > 1 else x
        x = x.index_select(self.axis, self.order.to(x.device))
        return F.pixel_shuffle(x, self.up) if self.up > 1 else x

    def __str__(self) -> str:
        """``permute[8]``, ``permute[8, down 2]``."""
        factors = [f", {name} {by}" for name, by in (("down", self.down), ("up", self.up)) if by > 1]
        return f"permute[{self.in_channels}{''.join(factors)}]"

    @property
    def makes(self) -> tuple[int, int]:
        """Its output channels."""
        return len(self.order) // self.up**2, self.axis

    @property
    def keeps_shape(self) -> bool:
        """Whether positions stay what they are."""
        return self.down == self.up == 1

    def axes(self, rank: int) -> tuple[int | None, ...] | None:
        """All but the channels, and those that these are exchanged with."""
        first = rank + self.axis
        return tuple(i if i < first or (i > first and self.keeps_shape) else None for i in range(rank))

    def shapes(self, rank: int | None) -> list[Ints]:
        """One that the blocks divide."""
        return [(2, self.in_channels, *(self.down * n for n in range(2, 2 + self.dimensions)))]

    @property
    def inverse(self) -> Permute:
        """The permutation that puts everything back."""
        return Permute(self.order.argsort(), self.dimensions, self.up, self.down)

    def forth(self, affine: ChannelAffine) -> ChannelAffine:
        """``f(s·x + t) = s'·f(x) + t'``: each number goes where its channel goes.

        Raises:
            AlgebraError: Channels that become one have different numbers, or it is along an axis that is mixed.
        """
        if affine.axis is None or affine.axis < self.axis or (affine.axis > self.axis and self.keeps_shape):
            return affine
        scale, shift = affine.on(self.in_channels, self.axis, affine.device)

        def moved(vector: Tensor) -> Tensor:
            order = self.order.to(vector.device)
            rows = vector.repeat_interleave(self.down**2)[order].view(-1, self.up**2)
            if not bool((rows == rows[:, :1]).all()):
                raise AlgebraError("makes one channel of several, for which the numbers differ")
            return rows[:, 0]

        return ChannelAffine(moved(scale), None if shift is None else moved(shift), self.axis, affine.may_expand)

    def back(self, affine: ChannelAffine) -> ChannelAffine:
        """``s·f(x) + t = f(s'·x + t')``, likewise."""
        return self.inverse.forth(affine)

    def kernel_on(self, channels: int, dimensions: int, device: torch.device | None) -> dict[str, Any]:
        """A single tap, with one input channel for each output channel; it knows its channels itself.

        Raises:
            AlgebraError: It exchanges channels and positions, which makes sizes matter, or has other ``dimensions``.
        """
        if not self.keeps_shape or dimensions != self.dimensions:
            raise AlgebraError("it exchanges channels and positions, or has other axes")
        rows = torch.eye(len(self.order), dtype=torch.float64, device=device)[self.order.to(device)]
        return {"weight": rows.view(len(rows), len(rows), *[1] * dimensions)}

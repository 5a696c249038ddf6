"""A scale and a shift of every channel."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from reparam.algebra.operator import Ints, Operator, in_double
from reparam.errors import AlgebraError


@dataclass(frozen=True, eq=False)
class ChannelAffine(Operator):
    """``scale * x + shift`` with one scale and shift a channel: a norm in eval mode, a layer scale, a constant.

    Attributes:
        scale: Shape ``(C,)``, or ``(1,)`` for one number for all channels.
        shift: Shape of ``scale``, or None for none.
        axis: The channels' axis, counted from the end (-1 for features, -3 for images); None when uniform.
        may_expand: The input might have a single channel that this operator broadcasts to ``C``. Then it may
            follow or stand beside an operator whose channels are known, but nothing may be moved before it.
    """

    scale: Tensor
    shift: Tensor | None = None
    axis: int | None = None
    may_expand: bool = False
    name: ClassVar[str] = "affine"

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", in_double(self.scale))
        if self.shift is not None:
            object.__setattr__(self, "shift", in_double(self.shift))
        if self.scale.numel() == 1:
            object.__setattr__(self, "axis", None)
            object.__setattr__(self, "may_expand", False)

    @staticmethod
    def uniform(scale: float, shift: float = 0.0, *, device: torch.device | None = None) -> ChannelAffine:
        """``scale * x + shift`` with the same two numbers everywhere."""

        def vector(number: float) -> Tensor:
            return torch.tensor([number], dtype=torch.float64, device=device)

        return ChannelAffine(vector(scale), vector(shift) if shift else None)

    def __str__(self) -> str:
        """``affine[8, axis -3]``."""
        if self.axis is not None:
            return f"affine[{len(self.scale)}, axis {self.axis}{', scale only' * (self.shift is None)}]"
        shift = "" if self.shift is None else f" + {self.shift.item():g}"
        return "identity" if self.is_identity else f"affine[{self.scale.item():g}{shift}]"

    @property
    def device(self) -> torch.device:
        """Where its numbers are."""
        return self.scale.device

    @property
    def is_identity(self) -> bool:
        """Whether this operator is there only to return its input."""
        return self.axis is None and self.shift is None and self.scale.item() == 1.0

    @property
    def makes(self) -> tuple[int, int] | None:
        """The channels that it has a number for, unless they may be one in its input."""
        return None if self.axis is None or self.may_expand else (len(self.scale), self.axis)

    @property
    def keeps_shape(self) -> bool:
        """Whether nothing is broadcast."""
        return not self.may_expand

    def shapes(self, rank: int | None) -> list[Ints]:
        """One with the channels; where they are alike, also because it might be a norm of a single one, with one."""
        if self.axis is None:
            return [(2, 1, 3, 4, 5)[: rank or 4]]
        sizes = list(range(2, 2 + max(rank or 0, 1 - self.axis)))
        sizes[self.axis] = len(self.scale)
        return [tuple(sizes)]

    def __call__(self, x: Tensor) -> Tensor:
        """``scale * x + shift``."""
        shape = [-1] + [1] * (0 if self.axis is None else -self.axis - 1)
        scaled = x * self.scale.view(shape)
        return scaled if self.shift is None else scaled + self.shift.view(shape)

    def on(self, channels: int, axis: int | None, device: torch.device | None) -> tuple[Tensor, Tensor | None]:
        """Scale of shape ``(channels,)`` along ``axis``, and the shift likewise; uniform ones move to ``device``.

        Raises:
            AlgebraError: This operator works along another axis or on another number of channels.
        """
        if self.axis is None:
            shift = None if self.shift is None else self.shift.to(device).expand(channels)
            return self.scale.to(device).expand(channels), shift
        if self.axis != axis:
            raise AlgebraError(f"it works along axis {self.axis}, not along the channels' axis {axis}")
        if len(self.scale) != channels:
            raise AlgebraError(f"{channels} channels are broadcast to {len(self.scale)}")
        return self.scale, self.shift

    def scaled(self, factor: float) -> ChannelAffine:
        """``factor * self(x)``."""
        return replace(self, scale=factor * self.scale, shift=None if self.shift is None else factor * self.shift)

    def after(self, inner: ChannelAffine) -> ChannelAffine:
        """``self(inner(x)) = (s s') x + (s t' + t)``.

        Raises:
            AlgebraError: The two work along different axes.
        """
        (s, t), (s_in, t_in), axis = on_common_channels(self, inner)
        return ChannelAffine(s * s_in, add(None if t_in is None else s * t_in, t), axis)

    def kernel_on(self, channels: int, dimensions: int, device: torch.device | None) -> dict[str, Any]:
        """A single tap, depthwise.

        Raises:
            AlgebraError: It works along another axis or on another number of channels.
        """
        scale, shift = self.on(channels, -dimensions - 1, device)
        return {"weight": scale.reshape(channels, *[1] * (dimensions + 1)), "bias": shift, "groups": channels}


def add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """Sum of two vectors that may be absent."""
    if a is None or b is None:
        return b if a is None else a
    return a + b


def refuse_expansion(*affines: ChannelAffine) -> None:
    """Raise when one of them might broadcast its input."""
    if any(affine.may_expand for affine in affines):
        raise AlgebraError("the input might have one channel, which the constant would broadcast")


def on_common_channels(
    a: ChannelAffine, b: ChannelAffine
) -> tuple[tuple[Tensor, Tensor | None], tuple[Tensor, Tensor | None], int | None]:
    """Scale and shift of each, written for the channels of both, and their axis."""
    refuse_expansion(a, b)
    lead = b if a.axis is None else a
    channels, axis, device = len(lead.scale), lead.axis, lead.scale.device
    return a.on(channels, axis, device), b.on(channels, axis, device), axis


def add_affines(a: ChannelAffine, b: ChannelAffine) -> ChannelAffine:
    """``(s x + t) + (s' x + t') = (s + s') x + (t + t')``."""
    (s, t), (s_b, t_b), axis = on_common_channels(a, b)
    return ChannelAffine(s + s_b, add(t, t_b), axis)

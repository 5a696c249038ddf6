"""Paddings, crops and means over windows, of any number of channels."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from reparam.algebra.affine import ChannelAffine
from reparam.algebra.operator import ZEROS, Ints, Operator, Padding
from reparam.errors import AlgebraError

_POOL = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


def flat_padding(padding: Padding) -> list[int]:
    """``F.pad`` counts axes from the last to the first."""
    return [amount for pair in reversed(padding) for amount in pair]


def pads_text(padding: Padding) -> str:
    """``1`` for the same everywhere, ``1:2x0`` where axes and their sides differ."""
    pairs = [str(before) if before == after else f"{before}:{after}" for before, after in padding]
    return pairs[0] if len(set(pairs)) == 1 else "x".join(pairs)


def padded(x: Tensor, padding: Padding, mode: str, value: float = 0.0) -> Tensor:
    """``x`` with its last axes padded."""
    if not any(amount for pair in padding for amount in pair):
        return x
    if mode == ZEROS:
        return F.pad(x, flat_padding(padding), value=value)
    return F.pad(x, flat_padding(padding), mode=mode)


@dataclass(frozen=True)
class Pad(Operator):
    """Padding of the last axes by a constant, or by reflected, replicated or wrapped values; negative amounts crop.

    Attributes:
        padding: ``(before, after)`` for the last ``len(padding)`` axes, first axis first.
        mode: ``zeros`` for a constant, ``reflect``, ``replicate`` or ``circular``.
        value: The constant.
    """

    padding: Padding
    mode: str = ZEROS
    value: float = 0.0
    name: ClassVar[str] = "pad"
    passes: ClassVar[bool] = True

    @property
    def pads(self) -> bool:
        """Whether it adds anything; otherwise it only crops."""
        return any(before > 0 or after > 0 for before, after in self.padding)

    def __call__(self, x: Tensor) -> Tensor:
        """``x``, padded."""
        return padded(x, self.padding, self.mode, self.value)

    def __str__(self) -> str:
        """``pad[1:2, reflect]``."""
        value = f", {self.value:g}" if self.value else ""
        return f"pad[{pads_text(self.padding)}{'' if self.mode == ZEROS else ', ' + self.mode}{value}]"

    def axes(self, rank: int) -> tuple[int | None, ...] | None:
        """Those that are not padded."""
        if len(self.padding) > rank:
            return None
        pairs = ((0, 0),) * (rank - len(self.padding)) + self.padding
        return tuple(None if any(pair) else axis for axis, pair in enumerate(pairs))

    def forth(self, affine: ChannelAffine) -> ChannelAffine:
        """The same one: ``f(s·x + t) = s·f(x) + t``, for zeros when t = 0, for other constants never.

        Raises:
            AlgebraError: It pads with a constant that the affine would not reach, or along the channels.
        """
        pads_constant = self.mode == ZEROS and self.pads
        if pads_constant and self.value != 0.0:
            raise AlgebraError(f"pads with {self.value}, which the scale would not reach")
        if pads_constant and affine.shift is not None and bool(affine.shift.any()):
            raise AlgebraError("pads with numbers that the shift would not reach")
        if affine.axis is not None and any((((0, 0),) * -affine.axis + self.padding)[affine.axis]):
            raise AlgebraError("mixes the channels with other axes")
        return affine

    def on(self, dimensions: int) -> Padding:
        """The amounts for the last ``dimensions`` axes.

        Raises:
            AlgebraError: It pads others.
        """
        beyond = len(self.padding) - dimensions
        if any(amount for pair in self.padding[: max(beyond, 0)] for amount in pair):
            raise AlgebraError("the padding reaches beyond the convolution's axes")
        return ((0, 0),) * -beyond + self.padding[max(beyond, 0) :]

    def kernel_on(self, channels: int, dimensions: int, device: torch.device | None) -> dict[str, Any]:
        """A single tap of weight one, depthwise.

        Raises:
            AlgebraError: It pads with a constant but zero, or beyond the last ``dimensions`` axes.
        """
        padding = self.on(dimensions)
        if self.pads and self.mode == ZEROS and self.value != 0:
            raise AlgebraError(f"the padding is of {self.value}, not of zeros")
        one = torch.ones(channels, 1, *[1] * dimensions, dtype=torch.float64, device=device)
        mode = self.mode if self.pads else ZEROS
        return {"weight": one, "padding": padding, "groups": channels, "padding_mode": mode}

    def after(self, inner: Pad) -> Pad:
        """``self(inner(x))``: two paddings with the same constant, or two crops.

        Raises:
            AlgebraError: They pad with different values, or one crops what the other padded.
        """
        if (self.mode, inner.mode) != (ZEROS, ZEROS) or (self.pads and inner.pads and self.value != inner.value):
            raise AlgebraError("the two pad with different values")
        axes = max(len(self.padding), len(inner.padding))
        outer, own = (((0, 0),) * (axes - len(pad.padding)) + pad.padding for pad in (self, inner))
        if any(a * b < 0 for pairs in zip(outer, own, strict=True) for a, b in zip(*pairs, strict=True)):
            raise AlgebraError("one crops what the other padded")
        padding = tuple((a[0] + b[0], a[1] + b[1]) for a, b in zip(outer, own, strict=True))
        return Pad(padding, ZEROS, self.value if self.pads else inner.value)


@dataclass(frozen=True)
class AveragePool(Operator):
    """Mean over windows, for any number of channels: a depthwise convolution with a constant kernel.

    Attributes:
        kernel_size: Window, one number an axis. Likewise ``stride`` and ``padding`` (the same on both sides).
        divisor: What the window's sum is divided by; its size when left out.
    """

    kernel_size: Ints
    stride: Ints
    padding: Ints
    divisor: float | None = None
    dimensions: int = field(init=False)
    name: ClassVar[str] = "pool"
    passes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "dimensions", len(self.kernel_size))

    def __call__(self, x: Tensor) -> Tensor:
        """The pooled ``x``."""
        pooled = _POOL[self.dimensions](x, self.kernel_size, self.stride, self.padding)
        return pooled * (math.prod(self.kernel_size) / self.divisor) if self.divisor else pooled

    def __str__(self) -> str:
        """``avgpool2d[2x3]``."""
        return f"avgpool{self.dimensions}d[{'x'.join(map(str, self.kernel_size))}]"

    def axes(self, rank: int) -> tuple[int | None, ...] | None:
        """Batch and channels."""
        return (0, 1, *[None] * (rank - 2)) if rank == self.dimensions + 2 else None

    def forth(self, affine: ChannelAffine) -> ChannelAffine:
        """The same one: ``f(s·x + t) = s·f(x) + t``, when t = 0 or each result is the mean of inputs.

        Raises:
            AlgebraError: It counts zeros that the shift would not reach, or the channels are among its axes.
        """
        if affine.shift is not None and bool(affine.shift.any()) and (any(self.padding) or self.divisor is not None):
            raise AlgebraError("pads with zeros, which the shift would not reach")
        if affine.axis is not None and affine.axis >= -self.dimensions:
            raise AlgebraError("mixes the channels with other axes")
        return affine

    def after(self, pad: Pad) -> AveragePool:
        """``self(pad(x))``: padding with zeros that the windows count.

        Raises:
            AlgebraError: torch's pool cannot pad so: other values, one side more than the other, or half a window.
        """
        beyond = len(pad.padding) - self.dimensions
        amounts = ((0, 0),) * -beyond + pad.padding[max(beyond, 0) :]
        outside = any(amount for pair in pad.padding[: max(beyond, 0)] for amount in pair)
        if outside or pad.value or pad.mode != ZEROS or any(a != b for a, b in amounts):
            raise AlgebraError("a pool cannot pad like that")
        padding = tuple(p + a for p, (a, _) in zip(self.padding, amounts, strict=True))
        if any(not 0 <= a <= k // 2 or a < p for a, k, p in zip(padding, self.kernel_size, self.padding, strict=True)):
            raise AlgebraError("a pool pads at most half its window")
        return replace(self, padding=padding)

    def scaled(self, factor: float) -> AveragePool:
        """``factor * self(x)``."""
        divisor = self.divisor or math.prod(self.kernel_size)
        return replace(self, divisor=divisor / factor if factor else math.inf)

    def kernel_on(self, channels: int, dimensions: int, device: torch.device | None) -> dict[str, Any]:
        """A constant kernel, depthwise.

        Raises:
            AlgebraError: ``dimensions`` is not this pool's.
        """
        if dimensions != self.dimensions:
            raise AlgebraError(f"a {self.dimensions}-d pool is no {dimensions}-d convolution")
        value = 1.0 / (self.divisor or math.prod(self.kernel_size))
        weight = torch.full((channels, 1, *self.kernel_size), value, dtype=torch.float64, device=device)
        padding = tuple((p, p) for p in self.padding)
        return {"weight": weight, "stride": self.stride, "padding": padding, "groups": channels}

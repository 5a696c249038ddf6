"""The one layer that torch.nn lacks: a scale and a shift per channel."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Affine(nn.Module):
    """``weight * x + bias`` with tensors that broadcast: a per-channel scale and shift that nothing absorbed.

    Attributes:
        weight: Shape ``(C, 1, ...)``.
        bias: Shape of ``weight``, or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = None if bias is None else nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        """``weight * x + bias``."""
        return x * self.weight if self.bias is None else torch.addcmul(self.bias, x, self.weight)

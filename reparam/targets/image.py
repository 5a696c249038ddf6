"""Images as inputs: pixels from 0 to 255, normalised inside of the exported model."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from reparam.compiler import compile
from reparam.errors import ExportError, ReparamError


@dataclass(frozen=True)
class ImageInput:
    """An input that is an image, with what its pixels were normalised by in training.

    A model that was trained on ``(pixel / 255 - mean) / std`` is exported to read the pixels themselves. A runtime has
    one scale and a bias for every channel. With ``s`` for the geometric mean of ``std``:

    ``(p / 255 - mean) / std  =  (s / std) · (p · 1/(255 s) - mean / s)``

    The factor ``s / std`` in front adds nothing, so the first convolution takes it in exactly, also one that pads.

    Attributes:
        mean: One number a channel, as fractions of white; three for colour, one for grey.
        std: As many, all positive.
        order: How the model was trained to read the channels of a colour image.

    Raises:
        ExportError: There are neither one nor three numbers, or they are not usable.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    order: str = "RGB"

    def __post_init__(self) -> None:
        if len(self.mean) not in (1, 3) or len(self.mean) != len(self.std):
            raise ExportError(
                f"an image has one channel or three, with a mean and a std for each, not {len(self.mean)} and "
                f"{len(self.std)}"
            )
        if not all(map(math.isfinite, (*self.mean, *self.std))) or min(self.std) <= 0:
            raise ExportError("the mean and std of an image must be finite, and std positive")
        if self.order not in ("RGB", "BGR"):
            raise ExportError(f"the channels of an image come as RGB or BGR, not {self.order}")

    @property
    def common_std(self) -> float:
        """The geometric mean of ``std``."""
        return math.exp(sum(map(math.log, self.std)) / len(self.std))

    @property
    def scale(self) -> float:
        """What all pixels are multiplied by."""
        return 1 / (255 * self.common_std)

    @property
    def bias(self) -> list[float]:
        """What is added to each channel after that."""
        return [-mean / self.common_std for mean in self.mean]

    def fold(self, model: nn.Module, images: Tensor) -> nn.Module:
        """The model as a function of ``scale · pixel + bias``.

        Args:
            model: A function of normalised images.
            images: One batch of them, (batch, channels, height, width).

        Returns:
            The model itself where all ``std`` are alike; else one that has ``s / std`` in its first convolution, or
            before it where there is none that could take it in. It agrees with the model, which is checked.

        Raises:
            ExportError: The images have other channels, or other axes.
            VerificationError: The two disagree.
        """
        if images.dim() != 4 or images.shape[1] != len(self.mean):
            shape = "x".join(map(str, images.shape))
            raise ExportError(f"inputs of {shape} are no images of {len(self.mean)} channels; give a mean and std each")
        if len(set(self.std)) == 1:
            return model
        factors = torch.tensor([self.common_std / std for std in self.std], dtype=torch.float64)
        scaled = nn.Sequential(_Scale(factors.to(images).reshape(1, -1, 1, 1)), model).eval()
        try:
            return compile(scaled, images)  # which compares the two
        except ReparamError as error:
            if getattr(error, "comparison", None) is not None:
                raise
            return scaled


class _Scale(nn.Module):
    def __init__(self, factors: Tensor) -> None:
        super().__init__()
        self.factors = nn.Parameter(factors, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factors

"""Images as inputs: pixels are normalised inside of the model, exactly."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from reparam.errors import ExportError
from reparam.targets import ImageInput
from support import count_calls

IMAGENET = ImageInput((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def normalised(pixels: Tensor, image: ImageInput) -> Tensor:
    mean, std = (torch.tensor(values).reshape(1, -1, 1, 1) for values in (image.mean, image.std))
    return (pixels / 255 - mean) / std


def as_read(pixels: Tensor, image: ImageInput) -> Tensor:
    """What a runtime makes of pixels: one scale, and a bias a channel."""
    return pixels * image.scale + torch.tensor(image.bias).reshape(1, -1, 1, 1)


def test_different_std_goes_into_the_first_convolution(model: nn.Module, images: Tensor) -> None:
    folded = IMAGENET.fold(model, images)
    pixels = torch.randint(0, 256, (2, 3, 16, 16), generator=torch.Generator().manual_seed(0)).float()
    expected = model(normalised(pixels, IMAGENET))
    assert torch.allclose(folded(as_read(pixels, IMAGENET)), expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    assert not torch.allclose(model(as_read(pixels, IMAGENET)), expected, rtol=0, atol=1e-3)  # the fold did something
    assert count_calls(folded, pixels) == count_calls(model, pixels)


def test_equal_std_needs_no_fold(model: nn.Module, images: Tensor) -> None:
    image = ImageInput((0.1, 0.2, 0.3), (0.5, 0.5, 0.5))
    assert image.fold(model, images) is model
    pixels = torch.randint(0, 256, (1, 3, 16, 16)).float()
    assert torch.allclose(as_read(pixels, image), normalised(pixels, image), atol=1e-5)


def test_what_cannot_take_the_factors_gets_them_in_front(images: Tensor) -> None:
    folded = IMAGENET.fold(nn.Sigmoid().eval(), images)
    pixels = torch.randint(0, 256, (1, 3, 16, 16)).float()
    assert torch.allclose(folded(as_read(pixels, IMAGENET)), normalised(pixels, IMAGENET).sigmoid(), atol=1e-6)


@pytest.mark.parametrize(
    ("mean", "std", "order", "message"),
    [
        ((0.5, 0.5), (1, 1), "RGB", "one channel or three"),
        ((0.5,), (1, 1, 1), "RGB", "one channel or three, with a mean and a std for each, not 1 and 3"),
        ((0.5,), (0,), "RGB", "std positive"),
        ((float("nan"),), (1,), "RGB", "must be finite"),
        ((0.5,), (1,), "GBR", "RGB or BGR, not GBR"),
    ],
)
def test_unusable_numbers(mean: tuple[float, ...], std: tuple[float, ...], order: str, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        ImageInput(mean, std, order)


def test_inputs_that_are_no_images(model: nn.Module) -> None:
    with pytest.raises(ExportError, match="inputs of 1x1x8x8 are no images of 3 channels"):
        IMAGENET.fold(model, torch.randn(1, 1, 8, 8))

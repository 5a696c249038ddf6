"""Core ML: it runs on Apple's systems only, so the file itself is looked at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import reparam
from reparam.errors import ExportError, VerificationError
from reparam.targets import ImageInput
from support import randomise

coremltools = pytest.importorskip("coremltools")


def description(path: Path) -> Any:
    return coremltools.models.MLModel(str(path), skip_model_load=True).get_spec().description


def test_an_image_input_reads_pixels(tmp_path: Path, model: nn.Module, images: Tensor) -> None:
    image = ImageInput((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), order="BGR")
    exported = reparam.export(model, tmp_path / "a.mlpackage", images, image=image, half=True)
    kind = description(exported.path).input[0].type.imageType
    assert (kind.width, kind.height) == (16, 16)
    assert kind.colorSpace == kind.ColorSpace.Value("BGR")
    # One product and one sum for the pixels; the factors of the channels are in the first convolution.
    assert (exported.operators["mul"], exported.operators["add"], exported.operators["conv"]) == (1, 1, 2)


def test_grey_images(tmp_path: Path) -> None:
    model = nn.Conv2d(1, 2, 3).eval()
    reparam.export(model, tmp_path / "a.mlpackage", torch.randn(1, 1, 8, 8), image=ImageInput((0.5,), (0.2,)))
    kind = description(tmp_path / "a.mlpackage").input[0].type.imageType
    assert kind.colorSpace == kind.ColorSpace.Value("GRAYSCALE")


def test_an_image_is_the_only_input(tmp_path: Path) -> None:
    class Both(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x + y

    inputs = (torch.randn(1, 1, 4, 4), torch.randn(1, 1, 4, 4))
    with pytest.raises(ExportError, match="a model with one input only"):
        reparam.export(Both().eval(), tmp_path / "a.mlpackage", inputs, image=ImageInput((0.5,), (0.5,)))


def test_weights_that_were_changed_are_noticed(tmp_path: Path) -> None:
    """Core ML folds a norm itself, so what it writes of a model that was not compiled is not the model's weights."""
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).eval()
    with pytest.raises(VerificationError, match=r"2 of 2 weights and biases are not in the file .*reparam\.compile"):
        reparam.export(model, tmp_path / "a.mlpackage", torch.randn(1, 3, 8, 8))
    assert list(tmp_path.iterdir()) == []


def test_an_older_package_is_replaced(tmp_path: Path) -> None:
    for channels in (2, 3):
        model = nn.Conv2d(1, channels, 3).eval()
        reparam.export(model, tmp_path / "a.mlpackage", torch.randn(1, 1, 8, 8))
    assert list(tmp_path.iterdir()) == [tmp_path / "a.mlpackage"]
    (output,) = description(tmp_path / "a.mlpackage").output
    assert list(output.type.multiArrayType.shape) == [1, 3, 6, 6]

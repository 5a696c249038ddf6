"""Every target: what is written is the compiled model, in every runtime that runs here."""

from __future__ import annotations

import logging
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import reparam
from reparam.compare import compare
from reparam.errors import ExportError
from reparam.targets import TARGETS, Exported, Flat, is_target, target_of

for target in TARGETS.values():
    for package in target.packages:
        pytest.importorskip(package.split(".")[0], reason=f"{target.title} needs it")

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler")
QUICK = ["onnx", "openvino", "executorch", "coreml", "torch-export"]
ALL = [*QUICK, pytest.param("aotinductor", marks=[needs_compiler, pytest.mark.slow])]
EXPECTED = {  # convolutions and matrix products under the target's own names
    "onnx": {"Conv": 2, "Gemm": 1},
    "openvino": {"Convolution": 1, "GroupConvolution": 1, "MatMul": 1},
    "executorch": {"conv2d": 2, "linear": 1},
    "coreml": {"conv": 2, "linear": 1},
    "torch-export": {"conv2d": 2, "linear": 1},
    "aotinductor": {"conv2d": 2, "linear": 1},
}


def write(model: nn.Module, folder: Path, target: str, inputs: Any, **options: Any) -> Exported:
    return reparam.export(model, folder / f"model{TARGETS[target].suffix}", inputs, **options)


@pytest.mark.parametrize("target", ALL)
def test_what_is_written_agrees_and_nothing_else_appears(
    tmp_path: Path,
    model: nn.Module,
    images: Tensor,
    target: str,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    handlers = list(logging.root.handlers)
    with warnings.catch_warnings(record=True) as warned, caplog.at_level(logging.INFO):
        warnings.simplefilter("always")
        exported = write(model, tmp_path, target, images)
    assert exported.target == target
    assert exported.precision == "float32"
    assert {name: exported.operators[name] for name in EXPECTED[target]} == EXPECTED[target]
    assert not any("norm" in name.lower() for name in exported.operators)
    assert exported.comparison.largest_error <= exported.comparison.tolerance <= 1e-4
    assert set(tmp_path.iterdir()) == set(exported.files)
    assert exported.size == sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    (shape,) = exported.inputs.values()
    assert shape[1:] == (3, 16, 16)
    assert exported.dynamic_batch == (shape[0] == "batch") == TARGETS[target].batch_by_default
    assert capfd.readouterr() == ("", "")
    assert [str(item.message) for item in warned] == []
    assert caplog.records == []
    assert logging.root.manager.disable == logging.NOTSET
    assert [handler for handler in logging.root.handlers if handler not in handlers] == []
    if exported.ran:  # it can be loaded from its final place, and takes what it says
        loaded = Flat(TARGETS[target].load(exported.path))
        x = torch.randn(5 if exported.dynamic_batch else 1, 3, 16, 16)
        compare(Flat(model)(x), loaded(x))
        with pytest.raises((ExportError, AssertionError)):
            loaded(torch.randn(1, 4, 16, 16))


@pytest.mark.parametrize("target", QUICK)
def test_half_precision(tmp_path: Path, model: nn.Module, images: Tensor, target: str) -> None:
    exported = write(model, tmp_path, target, images, half=True)
    assert exported.precision == "float16"
    assert 1e-6 < exported.comparison.largest_error < 5e-3  # it is rounded, and only that
    assert all(x.dtype == torch.float32 for x in model.parameters())


@pytest.mark.parametrize("target", QUICK)
def test_any_batch_and_any_size_on_request(tmp_path: Path, model: nn.Module, images: Tensor, target: str) -> None:
    exported = write(model, tmp_path, target, images, dynamic_batch=True, dynamic_size=True)
    assert list(exported.inputs.values()) == [("batch", 3, "height", "width")]
    if exported.ran:
        loaded = Flat(TARGETS[target].load(exported.path))
        for shape in ((1, 3, 16, 16), (4, 3, 20, 28)):
            x = torch.randn(shape)
            compare(Flat(model)(x), loaded(x))


@pytest.mark.parametrize("target", QUICK)
def test_weights_in_another_memory_layout(tmp_path: Path, target: str) -> None:
    model = nn.Conv2d(3, 4, 3).eval().to(memory_format=torch.channels_last)
    write(model, tmp_path, target, torch.randn(1, 3, 8, 8))
    assert not model.weight.is_contiguous()


class Several(nn.Module):
    """Two inputs, and a structure of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Any]:
        z = self.layer(y) + x
        return {"sum": z, "rest": [z.mean(1), z * 2]}


@pytest.mark.parametrize("target", QUICK)
def test_several_inputs_and_outputs(tmp_path: Path, target: str) -> None:
    model, inputs = Several().eval(), (torch.randn(3, 4), torch.randn(3, 4))
    exported = write(model, tmp_path, target, inputs)
    assert list(exported.inputs) == ["x", "y"]
    if exported.ran:
        assert exported.comparison.outputs == 3
        compare(Flat(model)(*inputs), Flat(TARGETS[target].load(exported.path))(*inputs))


@pytest.mark.parametrize("target", [name for name in ALL if name != "torch-export"])
def test_files_that_are_none(tmp_path: Path, target: str) -> None:
    path = tmp_path / f"model{TARGETS[target].suffix}"
    with pytest.raises(ExportError, match=r"no such file|on Apple's systems only"):
        TARGETS[target].load(path)
    path.write_text("hello")
    with pytest.raises(ExportError, match=r"cannot load it|on Apple's systems only"):
        TARGETS[target].load(path)


def test_the_suffix_says_which_target() -> None:
    assert [target_of(Path(f"a{target.suffix}")).name for target in TARGETS.values()] == list(TARGETS)
    assert target_of(Path("a.pt2"), "aotinductor").name == "aotinductor"
    assert is_target(Path("a.b.onnx"))
    assert not is_target(Path("a.pth"))


@pytest.mark.parametrize(
    ("path", "target", "message"),
    [
        ("a.tflite", None, r"\.tflite is the suffix of no target; they are \.onnx for ONNX, \.xml for OpenVINO"),
        ("a", None, "no suffix is the suffix of no target"),
        ("a.onnx", "tensorrt", "tensorrt is no target; there are onnx, openvino, executorch, coreml"),
        ("a.onnx", "openvino", r"a file for OpenVINO ends in \.xml"),
    ],
)
def test_unknown_targets(path: str, target: str | None, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        target_of(Path(path), target)

"""ONNX files: complete, checked, the same function, or not there at all."""

from __future__ import annotations

import importlib
import logging
import warnings
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.fx import symbolic_trace

from reparam import export
from reparam.errors import ExportError, VerificationError
from reparam.export import Flat, OnnxModel, export_onnx
from support import randomise


def deployed() -> nn.Module:
    """What a compiled network is made of."""
    layers = (nn.Conv2d(3, 4, 3, 2, 1), nn.GELU(), nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.ReLU())
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    return symbolic_trace(randomise(nn.Sequential(*layers, *head)).eval()).requires_grad_(False)


def test_export_is_checked_simplified_compared_and_quiet(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a.onnx"
    with warnings.catch_warnings(record=True) as warned, caplog.at_level(logging.INFO):
        warnings.simplefilter("always")
        exported = export_onnx(deployed(), path, torch.randn(1, 3, 16, 16))
    proto = onnx.load(path)
    onnx.checker.check_model(proto, full_check=True)
    assert (exported.path, exported.nodes, exported.opset) == (
        path,
        len(proto.graph.node),
        proto.opset_import[0].version,
    )
    assert exported.dynamic_batch
    assert exported.simplified
    assert exported.comparison.outputs == 1
    assert exported.comparison.largest_error < exported.comparison.tolerance == 1e-4
    assert [node.op_type for node in proto.graph.node].count("Conv") == 2
    assert list(tmp_path.iterdir()) == [path]
    assert capfd.readouterr() == ("", "")
    assert [str(item.message) for item in warned] == []
    assert caplog.records == []
    assert logging.root.manager.disable == logging.NOTSET


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return deployed()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, model: nn.Module) -> Path:
    return export_onnx(model, tmp_path_factory.mktemp("onnx") / "a.onnx", torch.randn(1, 3, 16, 16)).path


def test_any_batch_size(exported: Path, model: nn.Module) -> None:
    session = OnnxModel(exported)
    assert session.input_shape == (3, 16, 16)
    assert session.fixed_batch is None
    for batch in (1, 2, 5):
        x = torch.randn(batch, 3, 16, 16)
        ((actual,), expected) = session(x), model(x)
        assert torch.allclose(actual, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


class Several(nn.Module):
    """Two inputs, one of them whole numbers, and a structure of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)

    def forward(self, x: Tensor, index: Tensor) -> dict[str, Any]:
        y = self.table(index) + x
        return {"sum": y, "rest": [y.mean(1), index]}


def test_several_inputs_and_outputs(tmp_path: Path) -> None:
    model = Several().eval()
    inputs = (torch.randn(3, 4), torch.tensor([0, 6, 2]))
    exported = export_onnx(model, tmp_path / "a.onnx", inputs)
    assert exported.comparison.outputs == 3
    assert [item.name for item in onnx.load(tmp_path / "a.onnx").graph.output] == ["output_0", "output_1", "output_2"]
    session = OnnxModel(tmp_path / "a.onnx")
    for actual, expected in zip(session(*inputs), Flat(model)(*inputs), strict=True):
        assert torch.allclose(actual, expected)


class Pair(nn.Module):
    """Takes a batch of two only."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tensor([[1.0], [2.0]])


def test_a_model_of_one_batch_size_is_exported_as_such(tmp_path: Path) -> None:
    exported = export_onnx(Pair(), tmp_path / "a.onnx", torch.randn(2, 3))
    assert not exported.dynamic_batch
    session = OnnxModel(tmp_path / "a.onnx")
    assert session.fixed_batch == 2
    with pytest.raises(ExportError, match="onnxruntime cannot run the model: "):
        session(torch.randn(3, 3))


def test_what_onnx_cannot_express_is_one_sentence(tmp_path: Path) -> None:
    class Eigenvalues(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.eig(x)[0].real

    with pytest.raises(ExportError, match=r"PyTorch cannot express the model in ONNX: .*linalg_eig") as caught:
        export_onnx(Eigenvalues(), tmp_path / "a.onnx", torch.randn(2, 4, 4))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_disagreement_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.onnx").write_text("older")
    original = OnnxModel.forward
    monkeypatch.setattr(OnnxModel, "forward", lambda self, *x: [value * 1.001 for value in original(self, *x)])
    with pytest.raises(VerificationError, match=r"onnxruntime and PyTorch: .*; nothing was written") as caught:
        export_onnx(deployed(), tmp_path / "a.onnx", torch.randn(1, 3, 16, 16))
    assert caught.value.comparison is not None
    assert caught.value.comparison.largest_error == pytest.approx(1e-3, rel=0.01)
    assert (tmp_path / "a.onnx").read_text() == "older"


def test_what_onnxsim_cannot_simplify_is_kept(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(proto: onnx.ModelProto) -> Any:
        raise RuntimeError("simplifier crashed")

    proto = onnx.load(exported)
    for simplify in (fail, lambda proto: (onnx.ModelProto(), True), lambda proto: (proto, False)):
        monkeypatch.setattr("onnxsim.simplify", simplify)
        kept, simplified = export._simplify(proto)
        assert kept is proto
        assert not simplified


def test_an_invalid_export_is_refused(exported: Path) -> None:
    proto = onnx.load(exported)
    proto.graph.node[0].input[0] = "ghost"
    with pytest.raises(ExportError, match="PyTorch exported an invalid ONNX model: "):
        export._simplify(proto)


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxsim", "onnxruntime"])
def test_a_missing_package_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    original = importlib.import_module

    def refuse(name: str) -> Any:
        if name == package:
            raise ModuleNotFoundError(f"No module named '{name}'")
        return original(name)

    monkeypatch.setattr(export.importlib, "import_module", refuse)
    with pytest.raises(ExportError, match=rf'ONNX needs the package {package} .*: pip install "reparam\[onnx\]"'):
        export_onnx(deployed(), tmp_path / "a.onnx", torch.randn(1, 3, 16, 16))


def test_bad_onnx_files(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"none.onnx: no such file"):
        OnnxModel(tmp_path / "none.onnx")
    (tmp_path / "a.onnx").write_text("hello")
    with pytest.raises(ExportError, match=r"a.onnx: onnxruntime cannot load it: "):
        OnnxModel(tmp_path / "a.onnx")


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="there is no folder"):
        export_onnx(deployed(), tmp_path / "none" / "a.onnx", torch.randn(1, 3, 16, 16))

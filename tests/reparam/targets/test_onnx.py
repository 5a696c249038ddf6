"""ONNX files: complete, checked, simplified where possible."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

import reparam
from reparam.errors import ExportError
from reparam.targets.onnx import Onnx, OnnxModel, simplify
from support import Net


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, model: nn.Module, images: Tensor) -> Path:
    return reparam.export(model, tmp_path_factory.mktemp("onnx") / "a.onnx", images, opset=18).path


def test_the_file_is_valid_and_has_the_opset_that_was_asked_for(exported: Path) -> None:
    proto = onnx.load(exported)
    onnx.checker.check_model(proto, full_check=True)
    assert proto.opset_import[0].version == 18
    assert [node.op_type for node in proto.graph.node].count("Conv") == 2
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert [item.name for item in proto.graph.output] == ["output"]


def test_it_says_what_it_takes(exported: Path) -> None:
    session = OnnxModel(exported)
    assert session.input_shape == (3, 16, 16)
    assert session.fixed_batch is None


def test_whole_numbers_and_several_outputs(tmp_path: Path) -> None:
    class Lookup(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(7, 4)

        def forward(self, x: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
            return self.table(index) + x, index

    inputs = (torch.randn(3, 4), torch.tensor([0, 6, 2]))
    written = reparam.export(Lookup().eval(), tmp_path / "a.onnx", inputs)
    assert written.inputs == {"x": ("batch", 4), "index": ("batch",)}
    assert [item.name for item in onnx.load(written.path).graph.output] == ["output_0", "output_1"]


def test_sizes_that_depend_on_each_other_have_names(tmp_path: Path) -> None:
    model = Net(lambda self, x: torch.nn.functional.interpolate(x, scale_factor=2.0)).eval()
    reparam.export(model, tmp_path / "a.onnx", torch.randn(1, 2, 4, 6), dynamic_size=True)
    axes = onnx.load(tmp_path / "a.onnx").graph.input[0].type.tensor_type.shape.dim
    assert [axis.dim_param or axis.dim_value for axis in axes] == ["batch", 2, "height", "width"]


def test_what_onnx_cannot_express_is_one_sentence(tmp_path: Path) -> None:
    model = Net(lambda self, x: torch.linalg.eig(x)[0].real).eval()
    with pytest.raises(ExportError, match=r"ONNX cannot express the model: .*linalg_eig") as caught:
        reparam.export(model, tmp_path / "a.onnx", torch.randn(2, 4, 4))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_what_onnxsim_cannot_simplify_is_kept(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(proto: onnx.ModelProto) -> Any:
        raise RuntimeError("simplifier crashed")

    proto = onnx.load(exported)
    for attempt in (fail, lambda proto: (onnx.ModelProto(), True), lambda proto: (proto, False)):
        monkeypatch.setattr("onnxsim.simplify", attempt)
        kept, simplified = simplify(proto)
        assert kept is proto
        assert not simplified


def test_an_invalid_export_is_refused(exported: Path) -> None:
    proto = onnx.load(exported)
    proto.graph.node[0].input[0] = "ghost"
    with pytest.raises(ExportError, match="PyTorch exported an invalid ONNX model: "):
        simplify(proto)


def test_inputs_that_do_not_fit(exported: Path) -> None:
    with pytest.raises(ExportError, match="onnxruntime cannot run the model: "):
        Onnx().load(exported)(torch.randn(1, 3, 8, 8))

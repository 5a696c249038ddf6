"""ONNX graphs in, ONNX graphs out: what is fused, and everything that is kept."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import reparam
from reparam.errors import CheckpointError, ExportError, ReparamError, VerificationError

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnx_ir")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from onnx.reference import ReferenceEvaluator  # noqa: E402

from reparam.cli import app  # noqa: E402
from reparam.onnx import fuse_onnx  # noqa: E402

RNG = np.random.default_rng(0)


def array(*shape: int, dtype: Any = np.float32) -> Any:
    return RNG.uniform(0.5, 1.5, shape).astype(dtype)


def model(
    nodes: list[Any],
    weights: dict[str, Any],
    *,
    inputs: dict[str, Any] | None = None,
    outputs: dict[str, Any] | None = None,
    kind: int = TensorProto.FLOAT,
    opset: int = 17,
    ir_version: int = 8,
    **more: Any,
) -> Any:
    """A model from ``(op, inputs, outputs, attributes)``, with an image ``x`` in and ``y`` out by default."""
    made = [helper.make_node(op, list(i), list(o), name=f"{op}_{o[0]}", **a) for op, i, o, a in nodes]
    inputs = inputs or {"x": ["n", 3, 8, 8]}
    outputs = outputs or {"y": ["n", None, None, None]}
    graph = helper.make_graph(
        made,
        "test",
        [helper.make_tensor_value_info(name, kind, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, kind, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    opsets = [helper.make_opsetid("", opset), *more.pop("opsets", [])]
    return helper.make_model(graph, opset_imports=opsets, ir_version=ir_version, **more)


def conv_norm(x: str = "x", y: str = "y", c: int = 3, prefix: str = "block", dtype: Any = np.float32) -> Any:
    """A convolution and its norm: nodes and weights."""
    names = [f"{prefix}.norm.{name}" for name in ("weight", "bias", "mean", "var")]
    nodes = [
        ("Conv", [x, f"{prefix}.conv.weight"], [f"{y}_conv"], {"pads": [1, 1, 1, 1]}),
        ("BatchNormalization", [f"{y}_conv", *names], [y], {}),
    ]
    return nodes, {f"{prefix}.conv.weight": array(c, c, 3, 3, dtype=dtype)} | {n: array(c, dtype=dtype) for n in names}


def kinds(proto: Any) -> list[str]:
    return [node.op_type for node in proto.graph.node]


def run(proto: Any, **feed: Any) -> list[Any]:
    return list(ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, feed))


def image(n: int = 2, dtype: Any = np.float32) -> Any:
    return np.random.default_rng(1).standard_normal((n, 3, 8, 8)).astype(dtype)


def unchanged(proto: Any, **options: Any) -> reparam.Report:
    """Fuse what must not be touched."""
    fused = fuse_onnx(proto, **options)
    assert list(fused.model.graph.node) == list(proto.graph.node)
    assert list(fused.model.graph.initializer) == list(proto.graph.initializer)
    return fused.report


# What comes from PyTorch's exporters.


class Unit(nn.Module):
    """Three branches with norms, an activation that exporters take apart, and a squeeze-and-excitation gate."""

    def __init__(self, c: int, norm_identity: bool = True) -> None:
        super().__init__()
        self.three = nn.Sequential(nn.Conv2d(c, c, 3, padding=1, bias=False), nn.BatchNorm2d(c))
        self.one = nn.Sequential(nn.Conv2d(c, c, 1, bias=False), nn.BatchNorm2d(c))
        self.identity = nn.BatchNorm2d(c) if norm_identity else nn.Identity()
        self.reduce, self.expand = nn.Conv2d(c, 2, 1), nn.Conv2d(2, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.gelu(self.three(x) + self.one(x) + self.identity(x))
        gate = self.expand(self.reduce(x.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return x * gate


class Small(nn.Module):
    """A network with what RepViT, RepVGG and MobileOne are made of: two heads behind norms, too."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.units = nn.Sequential(Unit(8), Unit(8, False))
        self.norms = nn.ModuleList(nn.BatchNorm1d(8) for _ in range(2))
        self.heads = nn.ModuleList(nn.Linear(8, 5) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.units(self.stem(x))
        x = nn.functional.adaptive_avg_pool2d(x, 1).flatten(1)
        first, second = (head(norm(x)) for norm, head in zip(self.norms, self.heads, strict=True))
        return (first + second) / 2


def lived_in(network: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                tensor.data.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return network.eval()


@pytest.fixture(scope="module", params=["torchscript", "dynamo"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """A network, and the file that an exporter made of its training graph, with nothing folded."""
    network, x = lived_in(Small()), torch.randn(2, 3, 16, 16)
    path = tmp_path_factory.mktemp("exported") / "model.onnx"
    if request.param == "torchscript":
        pytest.importorskip("onnxscript")
        torch.onnx.export(
            network, (x,), str(path), dynamo=False, do_constant_folding=False, training=torch.onnx.TrainingMode.EVAL,
            input_names=["image"], output_names=["logits"],
            dynamic_axes={"image": {0: "batch"}, "logits": {0: "batch"}},
        )  # fmt: skip
    else:
        shapes = ({0: torch.export.Dim("batch")},)
        program = torch.onnx.export(
            network, (x,), dynamo=True, optimize=False, dynamic_shapes=shapes, input_names=["image"],
            output_names=["logits"], verbose=False,
        )  # fmt: skip
        assert program is not None
        program.save(str(path), external_data=False)
    return network, path


@pytest.fixture(scope="module")
def compiled() -> reparam.Report:
    report: reparam.Report = reparam.compile(lived_in(Small()), torch.randn(2, 3, 16, 16)).report  # type: ignore[assignment]
    return report


@pytest.mark.filterwarnings("ignore")
def test_an_exported_graph_comes_to_what_compiling_gives(
    exported: tuple[nn.Module, Path], compiled: reparam.Report, tmp_path: Path
) -> None:
    """Both exporters: as many convolutions and matrix products as of the network itself, and no norm."""
    network, path = exported
    before = path.read_bytes()
    fused = fuse_onnx(path, tmp_path / "deploy.onnx")
    assert path.read_bytes() == before
    report = fused.report
    assert (report.before.convolutions, report.before.norms) == (9, 8)
    assert (report.after.convolutions, report.after.linears) == (compiled.after.convolutions, compiled.after.linears)
    assert report.after.norms == 0
    assert report.after.parameters == compiled.after.parameters
    assert report.certificates == len(report.fused) > 0
    assert report.comparison is not None
    x = torch.randn(5, 3, 16, 16)  # a batch that no export was made with
    (result,) = run(onnx.load(tmp_path / "deploy.onnx"), image=x.numpy())
    torch.testing.assert_close(torch.from_numpy(result), network(x).detach(), rtol=1e-4, atol=1e-5)
    onnx.checker.check_model(onnx.load(tmp_path / "deploy.onnx"), full_check=True)


@pytest.mark.filterwarnings("ignore")
def test_names_come_from_the_modules(exported: tuple[nn.Module, Path]) -> None:
    """The weights of a fused branch go where the branches were."""
    names = {tensor.name for tensor in fuse_onnx(exported[1]).model.graph.initializer}
    assert {"units.0.weight", "units.0.bias", "stem.weight"} <= names


# Kept.


def test_interface_and_metadata_are_kept() -> None:
    """Names, free axes, opsets, versions, documentation, functions."""
    nodes, weights = conv_norm()
    function = helper.make_function(
        "mine", "Twice", ["a"], ["b"], [helper.make_node("Add", ["a", "a"], ["b"])], [helper.make_opsetid("", 17)]
    )
    proto = model(
        [*nodes, ("Twice", ["y"], ["z"], {"domain": "mine"})],
        weights,
        outputs={"z": ["n", 3, 8, 8], "y": ["n", 3, 8, 8]},
        opsets=[helper.make_opsetid("mine", 1)],
        functions=[function],
        producer_name="somebody",
        doc_string="a model",
    )
    proto.graph.doc_string = "a graph"
    proto.graph.input[0].doc_string = "an image"
    helper.set_model_props(proto, {"license": "none", "classes": "a,b"})
    fused = fuse_onnx(proto)
    result = fused.model
    assert kinds(result) == ["Conv", "Twice"]
    assert sorted(map(str, result.metadata_props)) == sorted(map(str, proto.metadata_props))
    for field in ("ir_version", "opset_import", "producer_name", "doc_string", "functions"):
        assert getattr(result, field) == getattr(proto, field), field
    assert result.graph.doc_string == "a graph"
    assert (list(result.graph.input), list(result.graph.output)) == (list(proto.graph.input), list(proto.graph.output))
    x = image()
    for old, new in zip(run(proto, x=x), run(result, x=x), strict=True):
        np.testing.assert_allclose(new, old, rtol=1e-4, atol=1e-5)


def test_what_nothing_fuses_with_is_untouched() -> None:
    """Not even the names of nodes and values change."""
    unchanged(
        model(
            [("Conv", ["x", "w"], ["a"], {}), ("Relu", ["a"], ["b"], {}), ("Resize", ["b", "", "s"], ["y"], {})],
            {"w": array(4, 3, 3, 3), "s": np.array([1, 1, 2, 2], np.float32)},
        )
    )


def test_a_norm_that_trains_is_left_alone() -> None:
    """It normalises with the statistics of its input, and says so."""
    nodes, weights = conv_norm()
    nodes[1][3]["training_mode"] = 1
    nodes[1][2].extend(["mean", "var"])
    report = unchanged(model(nodes, weights), verify=False)
    assert "it is in training mode" in report.missed[0].message


def test_an_output_of_the_middle_is_a_reader() -> None:
    """A convolution whose own value is returned cannot take in its norm."""
    nodes, weights = conv_norm()
    proto = model(nodes, weights, outputs={"y": ["n", 3, 8, 8], "y_conv": ["n", 3, 8, 8]})
    unchanged(proto)


def branch(name: str, nodes: list[Any]) -> Any:
    return helper.make_graph(nodes, name, [], [helper.make_tensor_value_info(f"{name}_out", TensorProto.FLOAT, None)])


def conditional(reads: str, **more: Any) -> Any:
    """A block, and an If whose branches read a value of the outer graph."""
    nodes, weights = conv_norm(y="z")
    then = branch("then", [helper.make_node("Neg", [reads], ["then_out"])])
    other = branch("other", [helper.make_node("Mul", [reads, reads], ["other_out"])])
    found = model(
        [
            *nodes,
            ("ReduceSum", ["z"], ["s"], {"keepdims": 0}),
            ("Greater", ["s", "zero"], ["c"], {}),
            ("If", ["c"], ["y"], {"then_branch": then, "else_branch": other}),
        ],
        {**weights, "zero": np.zeros((), np.float32)},
        **more,
    )
    return found


def test_what_a_subgraph_reads_is_read() -> None:
    """The norm's value goes into an If: it is computed by the fused convolution, under its name."""
    proto = conditional("z")
    fused = fuse_onnx(proto).model
    assert kinds(fused) == ["Conv", "ReduceSum", "Greater", "If"]
    assert fused.graph.node[-1] == proto.graph.node[-1]


def test_what_only_a_subgraph_reads_stops_a_rewrite() -> None:
    """The convolution's own value goes into an If, so its norm stays."""
    unchanged(conditional("z_conv"))


def test_a_weight_that_is_an_input_is_no_constant() -> None:
    """Files of old exporters list all weights as inputs, which a caller may override."""
    nodes, weights = conv_norm()
    proto = model(nodes, weights, ir_version=3, opset=9)
    proto.graph.input.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, value.shape) for name, value in weights.items()
    )
    report = unchanged(proto)
    assert "5 weights are inputs, too" in report.remarks[0].message
    assert "--freeze-inputs" in report.remarks[0].message
    fused = fuse_onnx(proto, freeze_inputs=True).model
    assert kinds(fused) == ["Conv"]
    assert [value.name for value in fused.graph.input] == ["x"]
    assert fused.ir_version == 4  # the first where a weight need not be an input


@pytest.mark.parametrize(
    ("dtype", "kind", "tolerance"),
    [(np.float16, TensorProto.FLOAT16, 2e-2), (np.float64, TensorProto.DOUBLE, 1e-9)],
)
def test_precision_is_kept(dtype: Any, kind: int, tolerance: float) -> None:
    """Weights are rounded once, to the model's own type; doubles, which onnxruntime cannot run, are compared, too."""
    nodes, weights = conv_norm(dtype=dtype)
    proto = model(nodes, weights, kind=kind)
    fused = fuse_onnx(proto)
    assert {tensor.data_type for tensor in fused.model.graph.initializer} == {kind}
    assert kinds(fused.model) == ["Conv"]
    x = image(dtype=dtype)
    (old,), (new,) = (ReferenceEvaluator(m).run(None, {"x": x}) for m in (proto, fused.model))
    np.testing.assert_allclose(new.astype(np.float64), old.astype(np.float64), rtol=tolerance, atol=tolerance)
    assert fused.report.comparison is not None


def test_bfloat16_is_kept() -> None:
    """Without a comparison: nothing on this machine runs it."""
    nodes, weights = conv_norm()
    proto = model(nodes, {}, kind=TensorProto.BFLOAT16, opset=22, ir_version=10)
    for name, value in weights.items():
        proto.graph.initializer.append(helper.make_tensor(name, TensorProto.BFLOAT16, value.shape, value.flatten()))
    fused = fuse_onnx(proto, verify=False).model
    assert kinds(fused) == ["Conv"]
    assert {tensor.data_type for tensor in fused.graph.initializer} == {TensorProto.BFLOAT16}
    expected = weights["block.norm.weight"] / np.sqrt(weights["block.norm.var"] + 1e-5)
    kernel = next(t for t in fused.graph.initializer if tuple(t.dims) == (3, 3, 3, 3))
    wanted = weights["block.conv.weight"] * expected[:, None, None, None]
    np.testing.assert_allclose(numpy_helper.to_array(kernel).astype(np.float32), wanted, rtol=2e-2)


def test_quantised_weights_stay_quantised() -> None:
    """A norm behind a quantised convolution is not folded into a kernel of floats."""
    nodes, weights = conv_norm()
    del weights["block.conv.weight"]
    weights |= {"q": RNG.integers(-99, 99, (3, 3, 3, 3), dtype=np.int8), "scale": np.array(0.01, np.float32)}
    unchanged(model([("DequantizeLinear", ["q", "scale"], ["block.conv.weight"], {}), *nodes], weights))


def test_an_old_operator_set_is_left_alone() -> None:
    """Before 7, norms trained and additions broadcast by other rules."""
    nodes, weights = conv_norm()
    nodes[1][3]["is_test"] = 1
    report = unchanged(model(nodes, weights, opset=6, ir_version=8), verify=False)
    assert "older than 7" in report.remarks[0].message


def test_unknown_domains_pass_through() -> None:
    """Its neighbours are fused all the same."""
    nodes, weights = conv_norm(y="z")
    proto = model(
        [*nodes, ("Thing", ["z", "", "z"], ["y"], {"domain": "mine", "level": 3})],
        weights,
        opsets=[helper.make_opsetid("mine", 2)],
    )
    fused = fuse_onnx(proto, verify=False).model
    assert kinds(fused) == ["Conv", "Thing"]
    assert fused.graph.node[1] == proto.graph.node[2]
    with pytest.raises(ExportError, match="--no-verify"):
        fuse_onnx(proto)


def test_outputs_that_become_the_same_value_keep_their_names() -> None:
    """An output that was a copy is one still."""
    proto = model(
        [("Conv", ["x", "w"], ["a"], {}), ("Identity", ["a"], ["y"], {}), ("Dropout", ["a"], ["z"], {}),
         ("Identity", ["x"], ["same"], {})],
        {"w": array(3, 3, 1, 1)},
        outputs={"y": ["n", 3, 8, 8], "z": ["n", 3, 8, 8], "same": ["n", 3, 8, 8]},
    )  # fmt: skip
    fused = fuse_onnx(proto).model
    assert Counter(kinds(fused)) == {"Conv": 1, "Identity": 2}
    assert [value.name for value in fused.graph.output] == ["y", "z", "same"]
    onnx.checker.check_model(fused, full_check=True)


def test_a_shared_weight_is_fused_twice() -> None:
    """Two readers of one kernel get a kernel each; a third, which nothing fuses with, keeps the first."""
    nodes, weights = conv_norm(y="a")
    norm = nodes[1][1][1:]
    proto = model(
        [*nodes, ("Conv", ["x", "block.conv.weight"], ["b"], {"pads": [1] * 4}),
         ("Relu", ["b"], ["c"], {}), ("BatchNormalization", ["c", *norm], ["d"], {}),
         ("Concat", ["a", "d"], ["y"], {"axis": 1})],
        weights,
    )  # fmt: skip
    fused = fuse_onnx(proto).model
    assert Counter(kinds(fused)) == {"Conv": 2, "Relu": 1, "BatchNormalization": 1, "Concat": 1}
    assert proto.graph.node[2] in list(fused.graph.node)


# Files.


def saved(tmp_path: Path, external: bool = False) -> Path:
    nodes, weights = conv_norm()
    path = tmp_path / "model.onnx"
    onnx.save(
        model(nodes, weights), path, save_as_external_data=external, location="weights.bin", size_threshold=16
    )  # fmt: skip
    return path


def test_weights_outside_stay_outside(tmp_path: Path) -> None:
    """A model with external data is written as one; the input's files are as they were."""
    path = saved(tmp_path, external=True)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert set(before) == {"model.onnx", "weights.bin"}
    report = fuse_onnx(path, tmp_path / "deploy.onnx").report
    assert report.comparison is not None
    after = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert set(after) == {"model.onnx", "weights.bin", "deploy.onnx", "deploy.onnx.data"}
    assert before.items() <= after.items()
    (tmp_path / "elsewhere").mkdir()
    for name in ("deploy.onnx", "deploy.onnx.data"):
        (tmp_path / name).rename(tmp_path / "elsewhere" / name)
    (old,) = run(onnx.load(path), x=image())
    (new,) = run(onnx.load(tmp_path / "elsewhere/deploy.onnx"), x=image())
    np.testing.assert_allclose(new, old, rtol=1e-4, atol=1e-4)


def test_a_disagreement_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An older result stays."""
    from reparam.onnx import write

    path, output = saved(tmp_path), tmp_path / "deploy.onnx"
    output.write_bytes(b"older")
    right = write._to_ir
    monkeypatch.setattr(write, "_to_ir", lambda tensor: right(tensor * 1.01))
    with pytest.raises(VerificationError, match="nothing was written"):
        fuse_onnx(path, output)
    assert output.read_bytes() == b"older"
    assert {file.name for file in tmp_path.iterdir()} == {"model.onnx", "deploy.onnx"}


def test_bad_files(tmp_path: Path) -> None:
    """What is wrong, in one sentence."""
    path = saved(tmp_path, external=True)
    with pytest.raises(CheckpointError, match="no such file"):
        fuse_onnx(tmp_path / "none.onnx")
    text = tmp_path / "text.onnx"
    text.write_text("hello")
    with pytest.raises(CheckpointError, match="is no ONNX model"):
        fuse_onnx(text)
    text.write_bytes(b"")
    with pytest.raises(CheckpointError, match="is no ONNX model"):
        fuse_onnx(text)
    cut = tmp_path / "cut.onnx"
    cut.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(CheckpointError, match="cut short"):
        fuse_onnx(cut)
    (tmp_path / "weights.bin").write_bytes(b"short")
    with pytest.raises(CheckpointError, match=r"weights\.bin, which was cut short"):
        fuse_onnx(path)
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(CheckpointError, match=r"weights\.bin, which is missing"):
        fuse_onnx(path)


def test_the_input_is_never_overwritten(tmp_path: Path) -> None:
    """Nor are its weights, whatever link reaches them."""
    path = saved(tmp_path, external=True)
    (tmp_path / "link.onnx").symlink_to(path)
    (tmp_path / "deploy.onnx.data").symlink_to(tmp_path / "weights.bin")
    for output in ("model.onnx", "link.onnx", "deploy.onnx"):
        with pytest.raises(ExportError, match="never overwritten"):
            fuse_onnx(path, tmp_path / output)


def test_free_sizes_are_found_or_asked_for() -> None:
    """Sizes that are no batch are tried; a size that is given has to fit."""
    nodes, weights = conv_norm()
    proto = model(nodes, weights, inputs={"x": ["n", 3, "h", "w"]})
    assert kinds(fuse_onnx(proto).model) == ["Conv"]
    assert fuse_onnx(proto, input_size=(3, 20, 30)).report.comparison is not None
    with pytest.raises(ReparamError, match="fixed in the model"):
        fuse_onnx(proto, input_size=(4, 20, 30))
    picky = model([*nodes[:1], ("Reshape", ["y_conv", "s"], ["y"], {})], weights | {"s": np.array([-1, 3, 37, 41])},
                  inputs={"x": ["n", 3, "h", "w"]})  # fmt: skip
    with pytest.raises(ReparamError, match="--input-size CxHxW"):
        fuse_onnx(picky)
    assert fuse_onnx(picky, input_size=(3, 37, 41)).report.comparison is not None


# The command.


def command(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_fuse_needs_nothing_but_the_graph(tmp_path: Path) -> None:
    """``reparam fuse model.onnx`` writes ``model_deploy.onnx``, and ``explain`` writes nothing."""
    path = saved(tmp_path)
    explained = command("explain", path)
    assert explained.exit_code == 0, explained.output
    assert "ONNX graph" in explained.output
    assert "NormAfterLinear" in explained.output
    assert not (tmp_path / "model_deploy.onnx").exists()
    fused = command("fuse", path)
    assert fused.exit_code == 0, fused.output
    assert "2 operators before and 1 after" in fused.output
    assert kinds(onnx.load(tmp_path / "model_deploy.onnx")) == ["Conv"]


def test_fuse_as_json(tmp_path: Path) -> None:
    """The report is that of any other compilation."""
    path = saved(tmp_path)
    done = command("fuse", path, "-o", tmp_path / "out.onnx", "--json")
    answer = json.loads(done.stdout)
    assert answer["onnx"] == {"opset": 17, "nodes_before": 2, "nodes": 1}
    assert answer["report"]["before"]["norms"] == 1
    assert answer["report"]["after"] == answer["report"]["before"] | {"norms": 0, "kernels": 1, "parameters": 84}
    assert answer["output"] == str(tmp_path / "out.onnx")


def test_options_that_do_not_fit(tmp_path: Path) -> None:
    """An ONNX graph becomes an ONNX graph, and brings its network."""
    path = saved(tmp_path)
    assert "only be written as ONNX" in command("fuse", path, "-o", tmp_path / "x.pth").output
    assert "--model is for checkpoints" in command("fuse", path, "--model", "repvit_m0_9").output

"""Deploy files: what goes in comes out, and nothing but that."""

from __future__ import annotations

import json
import math
import operator
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Tracer, symbolic_trace

import reparam
from reparam import atomic
from reparam.errors import CheckpointError, ExportError
from reparam.files import deploy, portable
from reparam.graph.affine import Affine
from reparam.graph.conditions import select
from support import randomise

EXTENSIONS = ["pth", "pt", "safetensors"]


def deployed(model: nn.Module) -> GraphModule:
    """A traced model with frozen parameters, as the compiler returns it."""
    return symbolic_trace(randomise(model).eval()).requires_grad_(False)


def same(a: Any, b: Any) -> bool:
    """Equal to the last bit, through every container."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


class Fused(nn.Module):
    """What a compiled network is made of: convolutions, activations, sums, a gate, pooling and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.block = nn.ModuleDict({"mixer": nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), "act": nn.GELU()})
        self.norm = nn.BatchNorm2d(8)
        self.gate = nn.Parameter(torch.randn(8, 1, 1))
        self.register_buffer("shift", torch.randn(1, 8, 1, 1))
        self.register_buffer("mask", torch.rand(1, 8, 1, 1), persistent=False)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor, scale: float = 2.0) -> dict[str, Any]:
        y = self.block["act"](self.block["mixer"](self.stem(x))) * self.gate + self.shift
        y = F.relu(self.norm(y)) + torch.clamp(y * self.mask, min=float("-inf"), max=3.0)
        z = F.interpolate(y, scale_factor=2.0, mode="bilinear").mean((2, 3))
        rest = y.flatten(2).transpose(1, -1)[:, ::2, ...]
        return {"logits": self.head(z) * scale, "rest": [rest.to(torch.float64), y.shape[2] // 2]}


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_round_trip_is_bit_identical(tmp_path: Path, extension: str) -> None:
    model = deployed(Fused())
    x = torch.randn(2, 3, 15, 17)
    deploy.save(model, tmp_path / f"a.{extension}")
    loaded = deploy.load(tmp_path / f"a.{extension}")
    assert same(loaded(x), model(x))
    assert same(loaded(x, scale=0.5), model(x, scale=0.5))
    assert list(loaded.state_dict()) == sorted(model.state_dict(), key=list(loaded.state_dict()).index)
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert dict(loaded.named_modules())["block.mixer"].extra_repr() == model.get_submodule("block.mixer").extra_repr()


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_a_loaded_model_can_be_saved_again(tmp_path: Path, extension: str) -> None:
    model, x = deployed(Fused()), torch.randn(1, 3, 8, 8)
    deploy.save(model, tmp_path / "first.pth")
    deploy.save(deploy.load(tmp_path / "first.pth"), tmp_path / f"second.{extension}")
    assert same(deploy.load(tmp_path / f"second.{extension}")(x), model(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("extension", EXTENSIONS[1:])
def test_dtype_is_kept(tmp_path: Path, extension: str, dtype: torch.dtype) -> None:
    model = deployed(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())).to(dtype)
    deploy.save(model, tmp_path / f"a.{extension}")
    loaded = deploy.load(tmp_path / f"a.{extension}")
    x = torch.randn(1, 3, 6, 6, dtype=dtype)
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    assert same(loaded(x), model(x))


@pytest.mark.parametrize("extension", EXTENSIONS[1:])
def test_memory_layout_is_kept(tmp_path: Path, extension: str) -> None:
    model = deployed(nn.Sequential(nn.Conv2d(3, 4, 3))).to(memory_format=torch.channels_last)
    deploy.save(model, tmp_path / f"a.{extension}")
    weight = deploy.load(tmp_path / f"a.{extension}").get_parameter("0.weight")
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(weight, model.get_parameter("0.weight"))


@pytest.mark.parametrize("extension", EXTENSIONS[1:])
def test_other_tools_find_a_plain_state_dict(tmp_path: Path, extension: str) -> None:
    model = deployed(Fused())
    model._non_persistent_buffers_set.add("mask")  # tracing forgets this
    path = tmp_path / f"a.{extension}"
    deploy.save(model, path)
    assert deploy.load(path).state_dict().keys() == model.state_dict().keys()
    if extension == "pt":
        state = torch.load(path, weights_only=True)["state_dict"]
        assert state.keys() == model.state_dict().keys()
    else:
        state = {name: tensor for name, tensor in load_file(path).items() if not name.startswith("constant:")}
    other = Fused()
    other.load_state_dict(state)
    assert all(torch.equal(other.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


def test_views_and_ties_are_stored_once(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(100, 100, bias=False), nn.ReLU(), nn.Linear(100, 100, bias=False))
    model[0].weight = nn.Parameter(torch.randn(50, 100, 100)[7])
    model[2].weight = model[0].weight
    graph = symbolic_trace(model.eval())
    deploy.save(graph, tmp_path / "a.pth")
    assert (tmp_path / "a.pth").stat().st_size < 1.5 * 100 * 100 * 4
    deploy.save(graph, tmp_path / "a.safetensors")  # a format without ties
    for extension in ("pth", "safetensors"):
        assert same(deploy.load(tmp_path / f"a.{extension}")(torch.eye(100)), graph(torch.eye(100)))


# One of each kind of layer that a compiled network may keep, with settings that are not the defaults.
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, 2, 1, 2, 2, bias=False), (2, 4, 9)),
    "conv same": (lambda: nn.Conv2d(4, 4, (3, 5), padding="same", dilation=2), (2, 4, 9, 9)),
    "conv reflect": (lambda: nn.Conv2d(4, 4, 3, padding=(1, 2), padding_mode="reflect"), (2, 4, 9, 9)),
    "conv3d": (lambda: nn.Conv3d(2, 4, 3, padding=1), (1, 2, 5, 5, 5)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, 2, False, 2), (1, 4, 5, 5)),
    "batch norm": (lambda: nn.BatchNorm2d(4, eps=1e-3, momentum=None, affine=False), (2, 4, 5, 5)),
    "instance norm": (lambda: nn.InstanceNorm2d(4, affine=True), (2, 4, 5, 5)),
    "layer norm": (lambda: nn.LayerNorm((4, 5), eps=1e-3, bias=False), (2, 4, 5)),
    "rms norm": (lambda: nn.RMSNorm(5), (2, 4, 5)),
    "group norm": (lambda: nn.GroupNorm(2, 4, affine=False), (2, 4, 5)),
    "prelu": (lambda: nn.PReLU(4, 0.3), (2, 4, 5)),
    "hardtanh": (lambda: nn.Hardtanh(-2.0, 0.5), (2, 4)),
    "relu6": (lambda: nn.ReLU6(), (2, 4)),
    "gelu": (lambda: nn.GELU("tanh"), (2, 4)),
    "softmax": (lambda: nn.Softmax(1), (2, 4)),
    "sigmoid": (lambda: nn.Sigmoid(), (2, 4)),
    "our affine": (lambda: Affine(torch.rand(4, 1, 1), torch.rand(4, 1, 1)), (2, 4, 3, 3)),
    "our scale": (lambda: Affine(torch.rand(4, 1), None), (2, 4, 3)),
    "identity": (lambda: nn.Identity(54, unused=1), (2, 4)),
    "dropout": (lambda: nn.Dropout2d(0.3), (2, 4, 5, 5)),
    "max pool": (lambda: nn.MaxPool2d(3, 2, 1, ceil_mode=True), (1, 4, 7, 7)),
    "avg pool": (lambda: nn.AvgPool2d(3, 1, 1, count_include_pad=False), (1, 4, 7, 7)),
    "adaptive pool": (lambda: nn.AdaptiveAvgPool2d((None, 2)), (1, 4, 7, 7)),
    "zero pad": (lambda: nn.ZeroPad2d((1, 2, 0, 3)), (1, 4, 7, 7)),
    "constant pad": (lambda: nn.ConstantPad1d(2, 0.5), (1, 4, 7)),
    "upsample": (lambda: nn.Upsample(scale_factor=(2, 1.5), mode="bilinear", align_corners=True), (1, 4, 4, 4)),
    "pixel shuffle": (lambda: nn.PixelShuffle(2), (1, 4, 3, 3)),
    "flatten": (lambda: nn.Flatten(2), (1, 4, 3, 3)),
    "unflatten": (lambda: nn.Unflatten(1, (2, 2)), (1, 4)),
    "attention": (lambda: nn.MultiheadAttention(4, 2, bias=False, add_bias_kv=True, batch_first=True), (2, 3, 4)),
    "lstm": (lambda: nn.LSTM(4, 3, 2, bias=False, batch_first=True, bidirectional=True), (2, 3, 4)),
    "gru": (lambda: nn.GRU(4, 3), (2, 3, 4)),
    "rnn": (lambda: nn.RNN(4, 3, nonlinearity="relu"), (2, 3, 4)),
    "transformer": (
        lambda: nn.TransformerEncoderLayer(4, 2, 8, 0.0, "gelu", 1e-3, batch_first=True, norm_first=True, bias=False),
        (2, 3, 4),
    ),
}


class Call(nn.Module):
    """Calls one layer; an attention layer with its input thrice."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Any:
        return self.layer(x, x, x) if isinstance(self.layer, nn.MultiheadAttention) else self.layer(x)


class LayerTracer(Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name == "layer"


@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_round_trips(tmp_path: Path, name: str) -> None:
    build, shape = LAYERS[name]
    root, x = randomise(Call(build())).eval(), torch.rand(shape)
    tracer = LayerTracer()
    model = GraphModule(root, tracer.trace(root)).requires_grad_(False)
    deploy.save(model, tmp_path / "a.pth")
    loaded = deploy.load(tmp_path / "a.pth")
    assert repr(loaded.layer) == repr(model.layer)
    assert same(loaded(x), model(x))


def test_functions_methods_and_arguments_round_trip(tmp_path: Path) -> None:
    class Calls(nn.Module):
        def forward(self, x: Tensor) -> Any:
            a = torch.cat([x, x * 2], dim=1).chunk(2, 1)[0]
            b = F.pad(a, (1, 1), "constant", 0.5).sigmoid().unflatten(1, (2, -1))
            c = F.hardswish(F.max_pool2d(b, (1, 2))) + math.pi
            d = x.to(device=torch.device("cpu"), dtype=torch.int64) - 1
            e = x.max(dim=1).values + operator.neg(x).sum((1,))
            f = torch.nan_to_num(x / 0.0, nan=float("nan"), posinf=float("inf")).contiguous(
                memory_format=torch.contiguous_format
            )
            g = torch.einsum("ij,kj->ik", x, x).T @ x.new_zeros(x.shape[0], 2)
            return {"c": c, 3: d, "e": (e, [f, g], None, True, "text"), "size": (x.shape[-1], x.ndim)}

    model, x = deployed(Calls()), torch.randn(3, 4)
    deploy.save(model, tmp_path / "a.pth")
    expected, found = model(x), deploy.load(tmp_path / "a.pth")(x)
    assert same({**found, "e": None}, {**expected, "e": None})
    assert same(found["e"][0], expected["e"][0])
    assert torch.equal(found["e"][1][0].isnan(), expected["e"][1][0].isnan())
    assert found["e"][2:] == (None, True, "text")


class Resizes(nn.Module):
    """Operators that only an exported program has: torch's own functions that end in them take other arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        y = F.interpolate(y, scale_factor=2.0, mode="bilinear") + F.interpolate(y, size=(12, 12))
        return F.pad(y, (1, 1, 1, 1), mode="reflect").double().float().softmax(1)


@pytest.mark.parametrize("decomposed", [True, False])
@pytest.mark.parametrize("extension", EXTENSIONS)
def test_exported_programs_round_trip(tmp_path: Path, extension: str, decomposed: bool) -> None:
    x = torch.randn(2, 3, 8, 8)
    program = torch.export.export(randomise(Resizes()).eval(), (x,))
    compiled: Any = reparam.compile(program.run_decompositions() if decomposed else program)
    assert any(isinstance(node.target, torch._ops.OpOverload) for node in compiled.graph.nodes)
    path = tmp_path / f"deploy.{extension}"
    reparam.save(compiled, path)
    assert same(reparam.load(path)(x), compiled(x))


ATEN = torch.ops.aten
NOT_CALLABLE = [
    ATEN.from_file.default, ATEN.as_strided.default, ATEN._embedding_bag.default, ATEN.add_.Tensor, ATEN.add.out,
    ATEN._local_scalar_dense.default, ATEN.set_.source_Tensor, ATEN.convolution_backward.default,
    ATEN._native_batch_norm_legit_no_training.default, ATEN._fft_c2r.default, ATEN._print.default,
]  # fmt: skip


def test_only_operators_that_compute_on_tensors_are_callable() -> None:
    assert portable.aten_operator("aten.upsample_nearest2d.vec") is ATEN.upsample_nearest2d.vec
    for operation in NOT_CALLABLE:
        assert portable.aten_operator(str(operation)) is None
    names = """os.system prims.add.default torch.ops.aten.relu.default aten.relu aten.relu.op aten.relu.__call__
               aten.relu.default.x aten.name.x aten.__class__.mro""".split()
    for name in [*names, "aten.relu.default\n"]:
        assert portable.aten_operator(name) is None


def test_devices_follow_the_model(tmp_path: Path) -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + x.new_zeros(4, device=torch.device("cpu"))

    deploy.save(deployed(Positions()), tmp_path / "a.pth")
    loaded = deploy.load(tmp_path / "a.pth", device="meta")
    assert loaded(torch.ones(2, 4, device="meta")).shape == (2, 4)
    assert loaded.layer.weight.is_meta


def test_a_subclass_that_computes_the_same_is_stored_as_its_base(tmp_path: Path) -> None:
    class Conv(nn.Conv2d):
        def __init__(self, channels: int) -> None:
            super().__init__(channels, channels, 3, padding=1)
            self.note = "mine"

    graph = Graph()
    graph.output(graph.call_module("conv", (graph.placeholder("x"),)))
    model = GraphModule({"conv": Conv(3)}, graph).requires_grad_(False)
    deploy.save(model, tmp_path / "a.pth")
    loaded, x = deploy.load(tmp_path / "a.pth"), torch.randn(1, 3, 5, 5)
    assert type(loaded.conv) is nn.Conv2d
    assert same(loaded(x), model(x))


def test_metadata_and_report_are_stored(tmp_path: Path) -> None:
    class Report:
        def to_dict(self) -> dict[str, int]:
            return {"certificates": 3}

    model = deployed(nn.Sequential(nn.Linear(2, 2)))
    model.report = Report()
    for extension in EXTENSIONS:
        path = tmp_path / f"a.{extension}"
        deploy.save(model, path, metadata={"model": "tiny", "input_shape": (3, 4)})
        assert deploy.read_metadata(path) == {
            "report": {"certificates": 3},
            "model": "tiny",
            "input_shape": [3, 4],
        }
    torch.save({"0.weight": torch.ones(2)}, tmp_path / "training.pth")
    assert deploy.read_metadata(tmp_path / "training.pth") is None


def test_a_file_loads_without_the_code_it_was_made_from(tmp_path: Path) -> None:
    deploy.save(deployed(Fused()), tmp_path / "a.pth")
    code = (
        "import sys, torch; from reparam import load;"
        f"print(load({str(tmp_path / 'a.pth')!r})(torch.ones(1, 3, 8, 8))['logits'].shape);"
        "assert not [name for name in sys.modules if name.startswith(('test_', 'timm'))]"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout.strip()) == (0, "torch.Size([1, 5])"), done.stderr


# --- What cannot be stored ----------------------------------------------------------------------------------------


class Own(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class OwnConv(nn.Conv2d):
    def _conv_forward(self, *args: Any) -> Tensor:
        return super()._conv_forward(*args) * 2


def calls(layer: nn.Module, path: str = "stage.layer") -> GraphModule:
    root = GraphModule({path: layer}, Graph())
    root.add_submodule(path, layer)
    graph = Graph()
    graph.output(graph.call_module("stage.layer", (graph.placeholder("x"),)))
    next(node for node in graph.nodes if node.op == "call_module").target = path
    root._graph = graph  # without the code, which fx itself cannot generate for every path
    return root


def hooked(model: nn.Module) -> nn.Module:
    model.register_forward_hook(lambda module, args, output: output * 2)
    return model


def patched() -> nn.Module:
    layer = nn.ReLU()
    layer.forward = lambda x: x * 2  # type: ignore[method-assign]
    return layer


def resized() -> nn.Module:
    layer = nn.Conv2d(3, 4, 1)
    layer.weight = nn.Parameter(torch.ones(2, 3, 1, 1))
    return layer


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: calls(Own()), r"stage.layer is a .*test_deploy.Own, which a file cannot rebuild .* write .onnx"),
        (lambda: calls(OwnConv(3, 3, 1)), r"stage.layer is a .*test_deploy.OwnConv"),
        (lambda: calls(patched()), r"stage.layer is a torch.nn.modules.activation.ReLU, which a file cannot rebuild"),
        (lambda: calls(hooked(nn.ReLU())), r"stage.layer carries forward hooks"),
        (lambda: hooked(calls(nn.ReLU())), r"the model carries forward hooks"),
        (
            lambda: calls(nn.ReLU(), 'a"b'),
            r"the graph cannot be stored: holds the illegal module path 'a\"b'; write .onnx",
        ),
        (lambda: calls(resized()), r"stage.layer is a Conv2d that its constructor arguments do not describe"),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), r"a ParametrizedLinear is no single graph"),
        (lambda: Own(), r"a Own is no single graph"),
        (lambda: function(os.system), r"calls .*system at .*, which is no PyTorch function"),
        (lambda: function(torch.load), r"calls load at .*, which is no PyTorch function"),
        (lambda: with_argument(object()), r"the call relu takes a object, which is not plain data"),
        (lambda: with_argument(torch.ones(1)), r"the call relu takes a Tensor, which is not plain data"),
        (lambda: with_argument({"key": [1 + 2j]}), r"the call relu takes a complex, which is not plain data"),
    ],
)
@pytest.mark.parametrize("extension", ["pth", "safetensors"])
def test_what_is_not_data_is_refused(
    tmp_path: Path, make: Callable[[], nn.Module], reason: str, extension: str
) -> None:
    with pytest.raises(ExportError, match=reason):
        deploy.save(make(), tmp_path / f"a.{extension}")
    assert list(tmp_path.iterdir()) == []


def function(target: Callable[..., Any], *args: Any) -> GraphModule:
    graph = Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(target, args or (x,)))
    return GraphModule({}, graph)


def with_argument(value: Any) -> GraphModule:
    model = function(torch.relu)
    call = list(model.graph.nodes)[1]
    call.args = (*call.args, value)
    return model


def test_unknown_extension_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"a deploy file is .pth, .pt or .safetensors, not .bin"):
        deploy.save(calls(nn.ReLU()), tmp_path / "a.bin")


# --- Files that were made by hand ---------------------------------------------------------------------------------


def write(path: Path, change: Callable[[dict[str, Any]], Any], **header: Any) -> Path:
    """A deploy file of a small model whose graph was edited."""
    model = deployed(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()))
    description, tensors = portable.describe(model)
    description["channels_last"] = []
    change(description)
    payload = {"format": "reparam", "version": "1", "graph": json.dumps(description), "metadata": "{}", **header}
    if path.suffix == ".safetensors":
        save_file(tensors, path, metadata=payload)
    else:
        torch.save({"state_dict": tensors, "constants": {}, **payload}, path)
    return path


def node(op: str, target: str, *args: Any, name: str = "evil", **kwargs: Any) -> Callable[[dict[str, Any]], None]:
    """Puts a call before the output."""

    def change(description: dict[str, Any]) -> None:
        item = {"op": op, "name": name, "target": target}
        item |= {"args": {"tuple": list(args)}, "kwargs": {"dict": [[key, value] for key, value in kwargs.items()]}}
        description["nodes"].insert(-1, item)

    return change


def layer(cls: str, **arguments: Any) -> Callable[[dict[str, Any]], None]:
    """Replaces the activation."""

    def change(description: dict[str, Any]) -> None:
        description["layers"]["1"] = {"class": cls, "args": {"dict": [[k, v] for k, v in arguments.items()]}}

    return change


X = {"node": "input_1"}
MALICIOUS = {
    "os.system": node("call_function", "os.system", "touch pwned"),
    "posix.system": node("call_function", "posix.system", "touch pwned"),
    "builtins.eval": node("call_function", "builtins.eval", "1"),
    "builtins.exec": node("call_function", "builtins.exec", "1"),
    "builtins.open": node("call_function", "builtins.open", "pwned", "w"),
    "builtins.__import__": node("call_function", "builtins.__import__", "os"),
    "torch.load": node("call_function", "torch.load", "x"),
    "torch.save": node("call_function", "torch.save", X, "pwned"),
    "torch.hub.load": node("call_function", "torch.hub.load", "a/b", "c"),
    "torch.from_file": node("call_function", "torch.from_file", "pwned", True, 10),
    "aten from_file": node("call_function", "aten.from_file.default", "pwned", True, 10),
    "aten set_": node("call_function", "aten.set_.source_Tensor", X, X),
    "aten attribute": node("call_function", "aten.relu.__class__", X),
    "torch.compile": node("call_function", "torch.compile", X),
    "torch.jit.load": node("call_function", "torch.jit.load", "x"),
    "torch.ops.load_library": node("call_function", "torch.ops.load_library", "x"),
    "operator.call": node("call_function", "operator.call", X),
    "operator.attrgetter": node("call_function", "operator.attrgetter", "__class__"),
    "operator.methodcaller": node("call_function", "operator.methodcaller", "numpy"),
    "tensor function": node("call_function", "torch.Tensor.apply_", X, X),
    "method __reduce__": node("call_method", "__reduce__", X),
    "method __class__": node("call_method", "__class__", X),
    "method apply_": node("call_method", "apply_", X, X),
    "method data_ptr": node("call_method", "data_ptr", X),
    "method set_": node("call_method", "set_", X, X),
    "method of a string": node("call_method", "format", "{0.__class__}", X),
    "method that is code": node("call_method", "abs(); import os; os.system('touch pwned')", X),
    "method without object": node("call_method", "abs"),
    "attribute __class__": node("call_function", "builtins.getattr", X, "__class__"),
    "attribute grad_fn": node("call_function", "builtins.getattr", X, "grad_fn"),
    "attribute by default": node("call_function", "builtins.getattr", X, "__dict__", None),
    "attribute by value": node("call_function", "builtins.getattr", X, X),
    "attribute by keyword": node("call_function", "builtins.getattr", X, name="shape"),
    "module path": node("call_module", "__class__", X),
    "module attribute": node("get_attr", "__class__"),
    "layer's method": node("get_attr", "0.register_forward_hook"),
    "placeholder that is code": node("placeholder", "x=__import__('os').system('touch pwned')"),
    "keyword that is code": node("call_function", "torch.relu", X, **{"x=print('pwned') or 1": 1}),
    "name that is code": node("call_function", "torch.relu", X, name="a = print('pwned'); b"),
    "unknown op": node("exec", "print('pwned')"),
    "unknown argument": node("call_function", "torch.relu", {"pickle": "gASV"}),
    "torch attribute": node("call_function", "torch.relu", {"torch": "hub"}),
    "layer subprocess.Popen": layer("subprocess.Popen", args="touch pwned"),
    "layer Module": layer("Module"),
    "layer Sequential": layer("Sequential"),
    "layer DataParallel": layer("DataParallel"),
    "layer __class__": layer("__class__"),
    "layer argument": layer("ReLU", hook="x"),
    "layer on a device": layer("PReLU", device="cuda"),
    "layer's private argument": layer("Embedding", num_embeddings=1, embedding_dim=1, _weight=1),
    "layer of nodes": layer("ReLU", inplace=X),
}


@pytest.mark.parametrize("name", MALICIOUS)
@pytest.mark.parametrize("extension", ["pth", "safetensors"])
def test_a_malicious_file_runs_nothing(
    tmp_path: Path, name: str, extension: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / f"a.{extension}", MALICIOUS[name])
    with pytest.raises(CheckpointError) as caught:
        deploy.load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "pwned" not in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [path]


def test_module_paths_cannot_carry_code(tmp_path: Path) -> None:
    evil = '0"); import os; ("'

    def change(description: dict[str, Any]) -> None:
        description["layers"][evil] = {"class": "ReLU", "args": {"dict": []}}
        node("call_module", evil, X)(description)

    with pytest.raises(CheckpointError, match="illegal module path"):
        deploy.load(write(tmp_path / "a.pth", change))


def test_unusual_module_names_survive(tmp_path: Path) -> None:
    graph = Graph()
    graph.output(graph.call_module("layer-1.3x3 conv", (graph.placeholder("x"),)))
    model = GraphModule({"layer-1.3x3 conv": nn.Linear(2, 2)}, graph).requires_grad_(False)
    deploy.save(model, tmp_path / "a.pth")
    assert same(deploy.load(tmp_path / "a.pth")(torch.eye(2)), model(torch.eye(2)))


def test_the_allowlists_hold_nothing_that_reaches_out() -> None:
    forbidden = set("load save file hub compile jit import eval exec open hook pickle storage data_ptr".split())
    forbidden |= set("numpy reduce_ex setstate apply_ map_ script autocast call".split())
    for name, target in portable.functions().items():
        last = name.split(".")[-1]
        assert last not in forbidden, name
        assert not forbidden - {"storage"} & set(last.split("_")), name
        assert not isinstance(target, type) or name.startswith("builtins."), name
        if target is select:  # the one function of our own
            continue
        module = getattr(target, "__module__", None) or "torch"
        assert module.split(".")[0] in ("torch", "math", "builtins", "operator", "_operator"), (name, module)
    assert not [name for name in portable.tensor_methods() if name.startswith("_")]
    assert {"conv2d", "relu", "cat", "add"} <= {name.split(".")[-1] for name in portable.functions()}
    assert all(
        cls.__module__.startswith(("torch.nn.modules.", "reparam.")) for cls in portable.layer_classes().values()
    )


# --- Files that are damaged ---------------------------------------------------------------------------------------


def drop(key: str) -> Callable[[dict[str, Any]], None]:
    return lambda description: description.pop(key)


DAMAGED: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no nodes": (drop("nodes"), "its graph is damaged"),
    "no layers": (drop("layers"), "its graph is damaged"),
    "layer without class": (lambda d: d["layers"]["0"].pop("class"), "its graph is damaged"),
    "bad setting": (layer("ReLU", inplace=[1]) and layer("Conv2d", in_channels="three"), "its graph is damaged"),
    "no output": (lambda d: d["nodes"].pop(), "its graph has no output"),
    "unknown node": (lambda d: d["nodes"][1].update(args={"tuple": [{"node": "ghost"}]}), "its graph is damaged"),
    "missing weight": (lambda d: d["layers"].update({"2": d["layers"]["0"]}), "2 keys missing: 2.weight, 2.bias"),
    "other shape": (
        lambda d: d["layers"]["0"]["args"]["dict"].append(["out_channels", 7]),
        r"2 keys of another shape: 0.weight \(4x3x3x3 in the file, 7x3x3x3 in the model\)",
    ),
    "extra weight": (lambda d: d["layers"].update({"0": d["layers"]["1"]}), "2 keys unexpected: 0.weight, 0.bias"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_graph_is_one_sentence(tmp_path: Path, name: str) -> None:
    change, reason = DAMAGED[name]
    path = write(tmp_path / "a.pth", change)
    with pytest.raises(CheckpointError, match=reason) as caught:
        deploy.load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in items for place in places(item, (*path, key)))]


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.sampled_from(["", "0", "1", "x", "input_1", "torch.relu", "abs"]),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(
            st.sampled_from(["node", "tuple", "dict", "slice", "float", "torch", "device"]), inner, max_size=2
        )
    ),
    max_leaves=4,
)


@given(data=st.data())
def test_any_edit_of_a_graph_loads_or_is_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    def edit(description: dict[str, Any]) -> None:
        *way, last = data.draw(st.sampled_from(places(description)[1:]))
        for key in way:
            description = description[key]
        if isinstance(description, dict) and data.draw(st.booleans()):
            description[data.draw(st.sampled_from(["0", "op", "node", "input", "x y"]))] = description.pop(last)
        else:
            description[last] = data.draw(JSON)

    path = write(tmp_path_factory.getbasetemp() / "edited.pth", edit)
    try:
        model = deploy.load(path)
    except CheckpointError as error:
        refused = str(error)
    else:
        refused = f"{path}: "
        assert isinstance(model, GraphModule)
    assert refused.startswith(f"{path}: ")


def test_unknown_version_says_upgrade(tmp_path: Path) -> None:
    for extension in ("pth", "safetensors"):
        path = write(tmp_path / f"a.{extension}", lambda d: None, version="2")
        for read in (deploy.load, deploy.read_metadata):
            with pytest.raises(CheckpointError, match="has version 2 of the deploy format, and this reparam reads 1"):
                read(path)


def test_bad_json_is_one_sentence(tmp_path: Path) -> None:
    path = write(tmp_path / "a.pth", lambda d: None, graph="{", metadata="[")
    with pytest.raises(CheckpointError, match="its graph is damaged"):
        deploy.load(path)
    with pytest.raises(CheckpointError, match="its metadata is damaged"):
        deploy.read_metadata(path)
    deep = write(tmp_path / "b.pth", lambda d: None, graph="[" * 100_000)
    with pytest.raises(CheckpointError, match="its graph is damaged"):
        deploy.load(deep)


def test_missing_weights_are_one_sentence(tmp_path: Path) -> None:
    path = write(tmp_path / "a.pth", lambda d: None, state_dict="none")
    with pytest.raises(CheckpointError, match="its weights are missing"):
        deploy.load(path)


@pytest.mark.parametrize("extension", ["pth", "safetensors"])
def test_truncated_file(tmp_path: Path, extension: str) -> None:
    path = write(tmp_path / f"a.{extension}", lambda d: None)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="truncated"):
        deploy.load(path)


def test_a_training_checkpoint_is_no_deploy_file(tmp_path: Path) -> None:
    torch.save({"model": {"weight": torch.ones(1)}}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="is a training checkpoint, not a deploy file; make one with"):
        deploy.load(tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="no such file"):
        deploy.load(tmp_path / "none.pth")


# --- Atomic writes ------------------------------------------------------------------------------------------------


def test_atomic_write_replaces_on_success(tmp_path: Path) -> None:
    target = tmp_path / "a.pth"
    target.write_text("old")
    with atomic.atomic_write(target) as temporary:
        temporary.write_text("new")
        assert temporary.parent == tmp_path
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


def interrupted_write(target: Path, error: BaseException | type[BaseException]) -> None:
    with atomic.atomic_write(target) as temporary:
        temporary.write_text("half")
        raise error


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_atomic_write_leaves_the_old_file_on_any_exception(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "a.pth"
    target.write_text("old")
    with pytest.raises(error):
        interrupted_write(target, error)
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_atomic_write_reports_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="cannot be written: No space left"):
        interrupted_write(tmp_path / "a.pth", OSError(28, "No space left on device"))
    assert list(tmp_path.iterdir()) == []


def write_two(target: Path, error: type[BaseException] | None = None) -> None:
    with atomic.atomic_writes(target, companions=(".bin",)) as fresh:
        fresh.write_text("new graph")
        fresh.with_suffix(".bin").write_text("new weights")
        fresh.chmod(0o600)
        assert fresh.name == target.name
        if error is not None:
            raise error


def test_several_files_are_replaced_together(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_text("old")
    (tmp_path / "plain").touch()
    write_two(tmp_path / "a.xml")
    assert (tmp_path / "a.xml").read_text() == "new graph"
    assert (tmp_path / "a.bin").read_text() == "new weights"
    assert {path.name for path in tmp_path.iterdir()} == {"a.xml", "a.bin", "plain"}
    assert len({stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}) == 1


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_several_files_stay_on_any_exception(tmp_path: Path, error: type[BaseException]) -> None:
    for name in ("a.xml", "a.bin"):
        (tmp_path / name).write_text("old")
    with pytest.raises(error):
        write_two(tmp_path / "a.xml", error)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a.xml": "old", "a.bin": "old"}


def test_several_files_stay_when_one_cannot_be_put_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.xml", "a.bin"):
        (tmp_path / name).write_text("old")
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.name == "a.xml" and self.parent.name == "fresh":
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(ExportError, match=r"a\.xml: cannot be written: No space left"):
        write_two(tmp_path / "a.xml")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a.xml": "old", "a.bin": "old"}


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    for content in ("old", "new"):
        with atomic.atomic_writes(tmp_path / "a.mlpackage") as fresh:
            (fresh / content).mkdir(parents=True)
            (fresh / content / "weights").write_text(content)
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == [
        "a.mlpackage",
        "a.mlpackage/new",
        "a.mlpackage/new/weights",
    ]


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_a_deploy_file_has_ordinary_permissions(tmp_path: Path, extension: str) -> None:
    (tmp_path / "plain").touch()
    deploy.save(calls(nn.ReLU()) if extension != "safetensors" else calls(nn.PReLU()), tmp_path / f"a.{extension}")
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert len(modes) == 1


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "real.pth").write_text("old")
    (tmp_path / "link.pth").symlink_to(tmp_path / "models" / "real.pth")
    with atomic.atomic_write(tmp_path / "link.pth") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "link.pth").is_symlink()
    assert (tmp_path / "models" / "real.pth").read_text() == "new"


def test_destinations_that_are_refused(tmp_path: Path) -> None:
    source = tmp_path / "in.pth"
    source.write_text("input")
    (tmp_path / "link.pth").symlink_to(source)
    os.link(source, tmp_path / "hard.pth")
    for name in ("in.pth", "link.pth", "hard.pth", "./../" + tmp_path.name + "/in.pth"):
        with pytest.raises(ExportError, match="is the input, which is never overwritten"):
            atomic.check_destination(tmp_path / name, never=(source,))
    with pytest.raises(ExportError, match="there is no folder"):
        atomic.check_destination(tmp_path / "missing" / "a.pth")
    with pytest.raises(ExportError, match="is not an ordinary file"):
        atomic.check_destination(tmp_path)
    with pytest.raises(ExportError, match="is not an ordinary file"), atomic.atomic_write("/dev/null"):
        raise AssertionError("must not be entered")
    atomic.check_destination(tmp_path / "new.pth", never=(source,))


def test_safetensors_header_is_plain_json(tmp_path: Path) -> None:
    deploy.save(deployed(Fused()), tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        header = file.metadata()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    graph = json.loads(header["graph"], parse_constant=refuse)
    assert {"nodes", "layers", "constants"} <= graph.keys()
    assert header["format"] == "reparam"

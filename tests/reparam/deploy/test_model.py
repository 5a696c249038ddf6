"""The compiled model as a module: its layers are looked up anew at every call, and its source is what it says."""

from __future__ import annotations

import collections
import traceback

import pytest
import torch
from torch import Tensor, nn

import reparam
from reparam.compare import compare
from reparam.deploy.model import CompiledModel
from support import randomise


class Nested(nn.Module):
    """Layers and parameters at paths of several names, among them numbers and words that Python keeps for itself."""

    def __init__(self) -> None:
        super().__init__()
        stem = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4))
        self.stages = nn.ModuleList([nn.ModuleDict({"self": stem, "class": nn.Conv2d(4, 3, 1)}), nn.GELU()])
        self.lambdas = nn.ParameterDict({"scale": nn.Parameter(torch.ones(3, 1, 1)), "if": nn.Parameter(torch.ones(1))})

    def forward(self, x: Tensor) -> Tensor:
        first, activation = self.stages
        y = activation(first["class"](activation(first["self"](x))))
        return y.atan2(self.lambdas["scale"]).atan2(self.lambdas["if"])


@pytest.fixture
def compiled() -> CompiledModel:
    model = reparam.compile(randomise(Nested()).double())
    assert isinstance(model, CompiledModel)
    return model


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 9, 8, dtype=torch.float64)


def test_calling_layers_takes_no_attribute_lookup(
    compiled: CompiledModel, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_up: set[str] = set()
    find = nn.Module.__getattr__

    def noted(module: nn.Module, name: str) -> object:
        looked_up.add(name)
        return find(module, name)

    monkeypatch.setattr(nn.Module, "__getattr__", noted)
    compiled(x)
    paths = [str(node.target) for node in compiled.graph.nodes if node.op == "call_module"]
    assert len(paths) == 2
    assert not looked_up & {name for path in paths for name in path.split(".")}


@pytest.mark.parametrize("how", ["attribute", "dictionary"])
def test_a_layer_that_is_replaced_is_the_one_that_runs(compiled: CompiledModel, x: Tensor, how: str) -> None:
    path = next(str(node.target) for node in compiled.graph.nodes if node.op == "call_module")
    owner, _, name = path.rpartition(".")
    before, layer = compiled.get_submodule(path), nn.Conv2d(3, 4, 3).double()
    expected = compiled(x)
    if how == "attribute":
        setattr(compiled.get_submodule(owner), name, layer)
    else:
        compiled.get_submodule(owner)._modules[name] = layer
    assert not torch.allclose(compiled(x), expected)
    layer.load_state_dict(before.state_dict())
    assert torch.equal(compiled(x), expected)


def test_hooks_on_layers_run(compiled: CompiledModel, x: Tensor) -> None:
    seen: list[str] = []
    for name, module in compiled.named_modules():
        module.register_forward_hook(lambda *_, name=name: seen.append(name))
    compiled(x)
    assert seen == [str(node.target) for node in compiled.graph.nodes if node.op == "call_module"] + [""]


def test_a_traceback_shows_the_source(compiled: CompiledModel) -> None:
    with pytest.raises(RuntimeError) as error:
        compiled(torch.randn(2, 5, 9, 8, dtype=torch.float64))
    shown = "".join(traceback.format_exception(error.value))
    line = next(line for line in compiled.code.splitlines() if "(x)" in line)
    assert line.strip() in shown


def test_torchscript_and_dynamo_read_it(compiled: CompiledModel, x: Tensor) -> None:
    expected = compiled(x)
    assert torch.equal(torch.jit.script(compiled)(x), expected)
    assert torch.equal(torch.jit.trace(compiled, (x,))(x), expected)
    found = torch._dynamo.explain(compiled)(x)
    assert (found.graph_count, found.graph_break_count) == (1, 0)
    assert torch.equal(torch.export.export(compiled, (x,)).module()(x), expected)


def test_names_that_are_keywords_get_an_underscore(compiled: CompiledModel) -> None:
    names = set(compiled.state_dict())
    assert {"stages.0.class_.weight", "lambdas.scale", "lambdas.if_"} <= names
    assert not any(".class." in name for name in names)


def test_dynamo_returns_structures_with_what_is_in_them(x: Tensor) -> None:
    class Named(Nested):
        def forward(self, x: Tensor) -> collections.OrderedDict[str, Tensor]:
            return collections.OrderedDict(y=super().forward(x))

    model = randomise(Named()).double().eval()
    result = torch.compile(reparam.compile(model), backend="eager")(x)
    assert list(result) == ["y"]
    compare(model(x), result, 1e-9)

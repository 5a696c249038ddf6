"""The backend of ``torch.compile``: what it fuses, what it hands on, and that it is never out of date."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reparam.compare import compare
from reparam.dynamo import backend
from reparam.errors import ReparamError
from support import randomise


class Network(nn.Module):
    """Two blocks with arbitrary Python between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.large, self.small = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if x.sum().item() < -1e12:
            return x
        return self.large(x) + self.small(x)


@pytest.fixture
def model() -> nn.Module:
    torch._dynamo.reset()
    return randomise(Network()).double().eval()


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What the next backend is given: the functions and layers of each graph."""
    graphs: list[list[str]] = []

    def following(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append([_kind(graph, node) for node in graph.graph.nodes if node.op.startswith("call")])
        return graph.forward

    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda name: following)
    return graphs


def _kind(graph: torch.fx.GraphModule, node: torch.fx.Node) -> str:
    if node.op == "call_module":
        return type(graph.get_submodule(str(node.target))).__name__
    return getattr(node.target, "__name__", str(node.target))


def test_every_graph_is_fused(model: nn.Module, seen: list[list[str]]) -> None:
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        for size in ((2, 3, 8, 9), (2, 3, 8, 9), (3, 3, 8, 9), (1, 3, 7, 7)):
            x = torch.randn(size, dtype=torch.float64)
            compare(model(x), compiled(x), 1e-9)
    assert seen[0][:2] == ["Conv2d", "relu"]
    assert ["Conv2d"] in seen
    assert not any("batch_norm" in graph for graph in seen)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
def test_parameter_programs_run_once(model: nn.Module, seen: list[list[str]], norm: Any) -> None:
    norm(model.large)
    compiled = torch.compile(model, backend=backend)
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    with torch.no_grad():
        compare(model(x), compiled(x), 1e-9)
        assert seen[-1] == ["Conv2d"]
        for parameter in model.large.parameters():
            parameter.mul_(1.5)
        compare(model(x), compiled(x), 1e-9)


def test_weights_that_change_are_seen(model: nn.Module, seen: list[list[str]]) -> None:
    compiled = torch.compile(model, backend=backend)
    x = torch.randn(2, 3, 8, 9, dtype=torch.float64)
    with torch.no_grad():
        compare(model(x), compiled(x), 1e-9)
        model.first[0].weight.mul_(3)
        compare(model(x), compiled(x), 1e-9)
        model.first[1].running_var.add_(1)
        model.large.weight = nn.Parameter(torch.randn_like(model.large.weight))
        compare(model(x), compiled(x), 1e-9)


def test_gradients_are_left_alone(model: nn.Module, seen: list[list[str]]) -> None:
    compiled = torch.compile(model, backend=backend)
    x = torch.randn(2, 3, 8, 9, dtype=torch.float64)
    compiled(x).sum().backward()
    assert model.first[0].weight.grad is not None
    assert any("batch_norm" in graph for graph in seen)


def test_training_statistics_are_updated(model: nn.Module, seen: list[list[str]]) -> None:
    model.train()
    before = model.first[1].running_mean.clone()
    with torch.no_grad():
        torch.compile(model, backend=backend)(torch.randn(2, 3, 8, 9, dtype=torch.float64))
    assert not torch.equal(before, model.first[1].running_mean)
    assert any("batch_norm" in graph for graph in seen)


def test_the_next_backend_is_an_option(model: nn.Module) -> None:
    x = torch.randn(2, 3, 8, 9, dtype=torch.float64)
    with torch.no_grad():
        compare(model(x), torch.compile(model, backend=backend, options={"then": "eager"})(x), 1e-9)


def test_unknown_options_are_an_error() -> None:
    with pytest.raises(ReparamError, match="knows the option 'then' only, not mode"):
        backend(torch.fx.symbolic_trace(nn.Identity()), [torch.ones(1)], options={"mode": 1})


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_compiles_what_was_fused(model: nn.Module) -> None:
    model.float()
    x = torch.randn(2, 3, 8, 9)
    with torch.no_grad():
        compare(model(x), torch.compile(model, backend=backend)(x), 1e-4)


def test_the_backend_is_registered_by_name() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert '[project.entry-points."torch_dynamo_backends"]\nreparam = "reparam.dynamo:backend"' in text

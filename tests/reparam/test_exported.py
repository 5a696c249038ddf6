"""Models that torch.fx cannot trace and torch.export can, and exported programs themselves."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import reparam
from reparam.errors import CaptureError
from reparam.verify import compare
from support import randomise


class Net(nn.Module):
    """A convolution, its norm and a linear layer, and a forward that uses them."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.function = forward
        self.block = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4))
        self.head = nn.Linear(4, 5)
        self.scale = nn.Parameter(torch.ones(5))

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def _asserts(net: Any, x: Tensor) -> Tensor:
    assert x.shape[1] == 3
    return net.block(x)


def _pads(net: Any, x: Tensor) -> Tensor:
    bottom = -x.shape[2] % 4
    return net.block(F.pad(x, (0, 0, 0, bottom)))[:, :, : x.shape[2]] if len(x.shape) == 4 else x


def _assigns(net: Any, x: Tensor) -> Tensor:
    assert x.ndim == 4
    y = net.block(x).relu()
    y[:, :1] = 0
    y[:, 1:2] += 1
    return y.relu_()


def _tokens(net: Any, x: Tensor) -> Any:
    b, c, h, w = net.block(x).shape
    assert c == 4
    tokens = net.block(x).flatten(2).transpose(1, 2)
    tokens = net.head(tokens) * net.scale
    return {"map": tokens.transpose(1, 2).reshape(b, -1, h, w), "rest": [tokens.mean(1), (b, None)]}


@pytest.mark.parametrize("forward", [_asserts, _pads, _assigns, _tokens])
def test_python_that_reads_sizes_becomes_a_graph(forward: Callable[..., Any]) -> None:
    model = randomise(Net(forward)).double().eval()
    result = reparam.compile(model, torch.randn(2, 3, 9, 8, dtype=torch.float64))
    assert (result.report.before.norms > 0, result.report.after.norms) == (True, 0)
    assert isinstance(result, torch.fx.GraphModule)
    assert "block" in {path.partition(".")[0] for path, _ in result.named_modules()}
    for size in ((2, 3, 9, 8), (1, 3, 9, 8), (5, 3, 9, 8), (3, 3, 13, 6)):
        x = torch.randn(size, dtype=torch.float64)
        with torch.no_grad():
            compare(model(x), result(x), 1e-9)
            compare(model(x), copy.deepcopy(result)(x), 1e-9)


def test_a_graph_for_some_batch_sizes_only_is_not_taken() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        return net.block(x) * (2 if x.shape[0] > 1 else 3)

    model = randomise(Net(forward)).double().eval()
    result = reparam.compile(model, torch.randn(2, 3, 9, 8, dtype=torch.float64))
    remarks = [remark.message for remark in result.report.remarks if remark.rule == "Export"]
    assert len(remarks) == 1
    assert "its graph does not hold for a batch of one" in remarks[0]
    # Its parts are compiled instead.
    assert result.report.after.norms == 0
    for batch in (1, 2, 3):
        x = torch.randn(batch, 3, 9, 8, dtype=torch.float64)
        with torch.no_grad():
            compare(model(x), result(x), 1e-9)


def test_a_decision_by_the_size_of_an_image_is_said_and_checked() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        y = net.block(x)
        return y * 2 if x.shape[2] % 2 == 1 else y

    model = randomise(Net(forward)).double().eval()
    result = reparam.compile(model, torch.randn(2, 3, 9, 8, dtype=torch.float64))
    assert "only for inputs where (x.shape[2] % 2) == 1" in [remark.message for remark in result.report.remarks]
    with torch.no_grad():
        x = torch.randn(1, 3, 7, 8, dtype=torch.float64)
        compare(model(x), result(x), 1e-9)
        with pytest.raises(AssertionError, match=r"compiled for inputs where \(x\.shape\[2\] % 2\) == 1"):
            result(torch.randn(1, 3, 8, 8, dtype=torch.float64))


def test_arguments_keep_their_names_and_defaults() -> None:
    class Named(Net):
        def forward(self, x: Any, *others: Tensor, mode: str = "sum", mask: Tensor | None = None, **more: Any) -> Any:
            assert x["image"].shape[1] == 3
            y = self.block(x["image"]) + self.block(others[1])
            return y if mask is None else y * mask + more["shift"]

    model = randomise(Named(lambda net, x: x)).double().eval()
    x, y, z = (torch.randn(2, 3, 5, 6, dtype=torch.float64) for _ in range(3))
    call = {"x": {"image": x}, "mask": torch.ones(6).double(), "shift": torch.ones(1).double()}
    from reparam.exported import capture

    captured = capture(model, (({"image": x}, y, z), {k: v for k, v in call.items() if k != "x"}))
    graph = torch.fx.GraphModule(captured.root, captured.graph)
    expected = model({"image": x}, y, z, mask=call["mask"], shift=call["shift"])
    compare(expected, graph({"image": x}, y, z, mask=call["mask"], shift=call["shift"]), 1e-12)
    with pytest.raises(AssertionError, match="mode was 'sum' when this was compiled"):
        graph({"image": x}, y, z, mode="mean", mask=call["mask"], shift=call["shift"])


@dataclasses.dataclass
class Output:
    value: Tensor


def test_what_cannot_be_exported_is_compiled_by_parts() -> None:
    def forward(net: Any, x: Tensor) -> Any:
        # No assert, of which pytest makes code that could read anything.
        return Output(net.block(x) if x.sum() < 1e12 else x)

    model = randomise(Net(forward)).double().eval()
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    result = reparam.compile(model, x)
    assert result.report.after.norms == 0
    assert "it cannot be exported" in str(result.report)
    compare(model(x).value, result(x).value, 1e-9)


def test_a_model_that_writes_to_its_buffers_is_not_exported() -> None:
    class Counting(Net):
        def __init__(self) -> None:
            super().__init__(lambda net, x: x)
            self.register_buffer("count", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            if len(x) == 0:
                return x
            self.count.add_(1)
            return self.block(x) + self.count

    model = randomise(Counting()).double().eval()
    model.count.zero_()
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    result = reparam.compile(model, x)
    assert (result.report.after.norms, model.count.item()) == (0, 0)
    with torch.no_grad():
        for _ in range(2):
            compare(model(x), result(x), 1e-9)


# Exported programs.


@pytest.mark.parametrize("dynamic", [True, False])
def test_an_exported_program_is_compiled(dynamic: bool) -> None:
    model = randomise(Net(_assigns)).double().eval()
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    shapes = ({0: torch.export.Dim("batch")},) if dynamic else None
    wrapped = _Alone(model)
    program = torch.export.export(wrapped, (x,), dynamic_shapes=shapes)
    result = reparam.compile(program)
    assert (result.report.before.norms, result.report.after.norms) == (1, 0)
    for batch in (2, 3) if dynamic else (2,):
        x = torch.randn(batch, 3, 9, 8, dtype=torch.float64)
        with torch.no_grad():
            compare(model(x), result(x), 1e-9)


class _Alone(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


def test_a_program_exported_in_training_mode_is_an_error() -> None:
    program = torch.export.export(Net(_asserts).train(), (torch.randn(2, 3, 9, 8),))
    with pytest.raises(CaptureError, match=r"its own tensors"):
        reparam.compile(program)


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("example", [True, False])
def test_the_module_of_an_exported_program_is_compiled(dynamic: bool, example: bool) -> None:
    model = randomise(Net(_assigns)).double().eval()
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    shapes = ({0: torch.export.Dim("batch")},) if dynamic else None
    module = torch.export.export(_Alone(model), (x,), dynamic_shapes=shapes).module()
    result = reparam.compile(module, x if example else None)
    assert (result.report.before.norms, result.report.after.norms) == (1, 0)
    with torch.no_grad():
        compare(model(x), result(x), 1e-9)
    wrong = torch.randn(2, 3, 9, 12, dtype=torch.float64)
    with pytest.raises(AssertionError, match="Guard failed"):  # that of the module itself
        result(wrong)


def test_a_decomposed_program_is_compiled() -> None:
    model = randomise(Net(_heads)).double().eval()
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    program = torch.export.export(_Alone(model), (x,)).run_decompositions()
    for given in (program, program.module()):
        result = reparam.compile(given, x)
        after = result.report.after
        assert (after.convolutions, after.linears, after.norms) == (1, 1, 0)
        with torch.no_grad():
            compare(model(x), result(x), 1e-9)


def _heads(net: Any, x: Tensor) -> Tensor:
    return net.head(net.block(x).relu().mean((2, 3))) * net.scale


# Parameter programs.

WEIGHT_NORMS = {"old": nn.utils.weight_norm, "new": nn.utils.parametrizations.weight_norm}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
@pytest.mark.parametrize("form", WEIGHT_NORMS)
def test_parameter_programs_of_what_is_exported_run_once(form: str) -> None:
    model = randomise(Net(_pads)).double().eval()
    WEIGHT_NORMS[form](model.block[0])
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    for given in (model, torch.export.export(model, (x,))):
        result = reparam.compile(given, x)
        assert not any("weight_norm" in str(node.target) for node in result.graph.nodes)  # type: ignore[union-attr]
        assert (result.report.after.convolutions, result.report.after.norms) == (1, 0)
        with torch.no_grad():
            compare(model(x), result(x), 1e-9)


def test_what_a_program_computes_from_constants_is_computed_once() -> None:
    def forward(net: Any, x: Tensor) -> Any:
        first, second = net.head.weight.chunk(2, dim=1)
        y = net.block(F.conv2d(x, net.block[0].weight[:3].flip(3), padding=1))
        return F.linear(y.mean((2, 3)), torch.cat([second, first], 1)), torch.zeros_like(net.scale).add_(1)

    model = randomise(Net(forward)).double().eval()
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    result = reparam.compile(torch.export.export(model, (x,)))
    names = {str(getattr(node.target, "__name__", node.target)) for node in result.graph.nodes}
    assert not names & {"chunk", "flip", "cat"}
    assert result.report.after.norms == 0
    for _ in range(2):
        with torch.no_grad():
            compare(model(x), result(x), 1e-9)


def test_random_numbers_are_not_computed_once() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        return net.block(x).mean() + torch.rand_like(net.scale)

    program = torch.export.export(Net(forward).eval(), (torch.randn(2, 3, 9, 8),))
    result = reparam.compile(program)
    x = torch.randn(2, 3, 9, 8)
    assert not torch.equal(result(x), result(x))

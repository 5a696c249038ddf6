"""Exported programs, and modules of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import reparam
from reparam.compare import compare
from reparam.errors import CaptureError, ConditionError
from support import BlockNet, asserts, assigns, pads, randomise


@pytest.mark.parametrize("dynamic", [True, False])
def test_an_exported_program_is_compiled(dynamic: bool) -> None:
    model = randomise(BlockNet(assigns)).double().eval()
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
    program = torch.export.export(BlockNet(asserts).train(), (torch.randn(2, 3, 9, 8),))
    with pytest.raises(CaptureError, match=r"its own tensors"):
        reparam.compile(program)


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("example", [True, False])
def test_the_module_of_an_exported_program_is_compiled(dynamic: bool, example: bool) -> None:
    model = randomise(BlockNet(assigns)).double().eval()
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    shapes = ({0: torch.export.Dim("batch")},) if dynamic else None
    module = torch.export.export(_Alone(model), (x,), dynamic_shapes=shapes).module()
    result = reparam.compile(module, x if example else None)
    assert (result.report.before.norms, result.report.after.norms) == (1, 0)
    with torch.no_grad():
        compare(model(x), result(x), 1e-9)
    # What the module itself demands.
    with pytest.raises(ConditionError, match="compiled for inputs where the width of x is 8"):
        result(torch.randn(2, 3, 9, 12, dtype=torch.float64))
    if not dynamic:
        with pytest.raises(ConditionError, match="compiled for inputs where the batch size of x is 2"):
            result(torch.randn(3, 3, 9, 8, dtype=torch.float64))


def test_a_decomposed_program_is_compiled() -> None:
    model = randomise(BlockNet(_heads)).double().eval()
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
    model = randomise(BlockNet(pads)).double().eval()
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

    model = randomise(BlockNet(forward)).double().eval()
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

    program = torch.export.export(BlockNet(forward).eval(), (torch.randn(2, 3, 9, 8),))
    result = reparam.compile(program)
    x = torch.randn(2, 3, 9, 8)
    assert not torch.equal(result(x), result(x))

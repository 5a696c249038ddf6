"""ATen's operators, wherever they are called, are read as torch's own functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph, Node

import reparam
from reparam.capture import aten
from reparam.compare import compare
from support import randomise

ops: Any = torch.ops.aten


def said(target: Any, *args: Any, rank: int | None = 4, **kwargs: Any) -> tuple[str, Any, Any, Any]:
    return aten.said(target, args, kwargs, rank)


@pytest.fixture
def x() -> Node:
    return Graph().placeholder("x")


@pytest.mark.parametrize(
    ("operator", "function"),
    [
        (ops.relu.default, torch.relu),
        (ops.conv2d.default, torch.conv2d),
        (ops.add.Tensor, torch.add),
        (ops.linear.default, F.linear),
        (ops.gelu.default, F.gelu),
        (ops.lift_fresh_copy.default, torch.clone),
    ],
)
def test_public_names_are_found(x: Node, operator: Any, function: Any) -> None:
    assert said(operator, x) == ("call_function", function, (x,), {})


def test_methods_stand_in_for_what_has_no_function(x: Node) -> None:
    assert said(ops.view.default, x, [1, 2]) == ("call_method", "view", (x, [1, 2]), {})
    assert said(ops.add_.Tensor, x, 1) == ("call_method", "add_", (x, 1), {})
    assert said(ops.sym_size.int, x, 1) == ("call_method", "size", (x, 1), {})


def test_a_slice_is_an_index(x: Node) -> None:
    everything = slice(None)
    _, _, (source, index), _ = said(ops.slice.Tensor, x, -2, 1, 2**63 - 1)
    assert (source, index) == (x, (everything, everything, slice(1, None, 1)))
    assert said(ops.slice.Tensor, x, -2, 1, 3, rank=None)[1] is ops.slice.Tensor


def test_what_torch_has_no_public_name_for_stays(x: Node) -> None:
    for operator in (ops._softmax.default, ops._to_copy.default, ops.upsample_nearest2d.vec):
        assert said(operator, x) == ("call_function", operator, (x,), {})


@torch.library.custom_op("reparam_tests::relu", mutates_args=())
def _not_relu(x: Tensor) -> Tensor:
    return x.sin()


@torch.library.custom_op("reparam_tests::shift", mutates_args=("x",))
def _shift(step: Tensor, x: Tensor) -> None:
    x += step


class Calls(nn.Module):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function
        self.conv, self.norm, self.one = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
        self.up = nn.ConvTranspose2d(4, 4, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def _raw(net: Any, x: Tensor) -> Tensor:
    norm = net.norm
    y = ops.conv2d.default(x, net.conv.weight, None)
    y = ops.batch_norm.default(
        y, norm.weight, norm.bias, norm.running_mean, norm.running_var, False, 0.1, norm.eps, True
    )
    return ops.relu_.default(y)


def _decomposed(net: Any, x: Tensor) -> Tensor:
    norm = net.norm
    y = ops.convolution.default(x, net.conv.weight, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1)
    statistics = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    return ops._native_batch_norm_legit_no_training.default(y, *statistics, 0.1, norm.eps)[0]


def _transposed(net: Any, x: Tensor) -> Tensor:
    y = net.conv(x)
    y = ops.convolution.default(y, net.up.weight, net.up.bias, [2, 2], [0, 0], [1, 1], True, [0, 0], 1)
    return net.norm(y)


def _sliced(net: Any, x: Tensor) -> Tensor:
    return net.norm(net.conv(ops.slice.Tensor(x, 3, 1, 8)))


@pytest.mark.parametrize("forward", [_raw, _decomposed, _transposed, _sliced])
def test_modules_that_call_aten_are_fused(forward: Callable[..., Tensor]) -> None:
    model = randomise(Calls(forward)).double().eval()
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    result = reparam.compile(model, x)
    assert result.report.after.norms == 0
    assert "_native_batch_norm" not in result.code  # type: ignore[operator]
    with torch.no_grad():
        compare(model(x), result(x), 1e-9)


def test_a_librarys_operator_is_not_taken_for_torchs() -> None:
    model = randomise(Calls(lambda net, x: net.one(_not_relu(net.norm(net.conv(x)))))).double().eval()
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    result = reparam.compile(model, x)
    assert (result.report.after.convolutions, result.report.after.norms) == (2, 0)
    with torch.no_grad():
        compare(model(x), result(x), 1e-9)


def test_what_an_operator_says_that_it_writes_to_stays_as_it_is() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        y = net.norm(net.conv(x))
        z = y * 2.0
        _shift(z, y)
        return net.one(y)

    model = randomise(Calls(forward)).double().eval()
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    result = reparam.compile(model, x)
    with torch.no_grad():
        compare(model(x), result(x), 1e-9)


@pytest.mark.parametrize("form", ["matmul", "operator", "mm", "addmm", "method"])
def test_products_with_a_constant_are_linear_layers(form: str) -> None:
    class Products(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.bias = nn.Linear(5, 6), nn.Parameter(torch.randn(3))
            self.matrix = nn.Parameter(torch.randn(6, 3))

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            match form:
                case "matmul":
                    return torch.matmul(x, self.matrix)
                case "operator":
                    return x @ self.matrix
                case "mm":
                    return torch.mm(x, self.matrix)
                case "method":
                    return x.matmul(self.matrix)
            return torch.addmm(self.bias, x, self.matrix)

    model = Products().double()
    x = torch.randn(4, 5, dtype=torch.float64)
    result = reparam.compile(model, x)
    assert (result.report.after.kernels, result.report.after.linears) == (1, 1)
    with torch.no_grad():
        compare(model(x), result(x), 1e-9)

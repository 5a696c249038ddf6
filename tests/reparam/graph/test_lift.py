"""Which operator a node is: whatever is lifted computes what the node computes, and the rest is refused in words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reparam.algebra import AveragePool, ChannelAffine, Conv, Pad
from reparam.capture import capture
from reparam.compare import compare
from reparam.graph import facts
from reparam.graph import lift as lifting
from reparam.graph.lift import Refusal, Sum, lift
from support import randomise


class Net(nn.Module):
    def __init__(self, forward: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = forward

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def last(model: nn.Module, x: Tensor) -> Any:
    """What the node that a model returns is lifted to."""
    captured = capture(model, ((x,), {}))
    assert captured.traced, captured.remarks
    node = captured.graph.output_node().args[0]
    return lift(node, captured.modules)


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


LAYERS = [
    (nn.Conv1d(4, 6, 3, 2, 1, 2, 2), (2, 4, 15)),
    (nn.Conv2d(4, 6, (3, 2), (1, 2), (2, 0)), (2, 4, 9, 8)),
    (nn.Conv3d(2, 3, 2), (1, 2, 4, 5, 6)),
    (nn.Conv2d(4, 4, 4, padding="same", dilation=(1, 3)), (2, 4, 9, 12)),
    (nn.Conv2d(4, 4, 3, padding="valid"), (2, 4, 9, 8)),
    (nn.Conv2d(4, 4, 4, padding="same", padding_mode="reflect"), (2, 4, 9, 8)),
    (nn.Conv2d(4, 4, 3, padding=(2, 1), padding_mode="circular"), (2, 4, 9, 8)),
    (nn.Linear(5, 3), (2, 4, 5)),
    (nn.BatchNorm1d(4), (3, 4)),
    (nn.BatchNorm1d(4), (3, 4, 5)),
    (nn.BatchNorm2d(4, affine=False), (3, 4, 5, 6)),
    (nn.BatchNorm3d(2, eps=0.1), (3, 2, 5, 6, 2)),
    (nn.SyncBatchNorm(4), (3, 4, 5, 6)),
    (nn.InstanceNorm1d(4, track_running_stats=True, affine=True), (3, 4, 5)),
    (nn.Dropout2d(), (2, 3, 4, 4)),
    (nn.AvgPool1d(3, 2), (2, 3, 9)),
    (nn.AvgPool2d((3, 2), padding=1, divisor_override=5), (2, 3, 9, 8)),
    (nn.AvgPool3d(2), (2, 3, 4, 4, 6)),
    (nn.ZeroPad2d((1, 2, 0, 3)), (2, 3, 4, 5)),
    (nn.ConstantPad1d((1, -1), 3.5), (2, 3, 5)),
    (nn.ReflectionPad2d((1, 2, 0, 3)), (2, 3, 4, 5)),
    (nn.ReplicationPad3d(1), (1, 2, 3, 4, 5)),
    (nn.CircularPad2d((2, 0, 1, 1)), (1, 2, 3, 4)),
]
WEIGHT = torch.randn(3, 2, 3, 3, dtype=torch.float64)
CHANNELS = torch.rand(4, 1, 1, dtype=torch.float64)
MEAN, VARIANCE = torch.randn(4, dtype=torch.float64), torch.rand(4, dtype=torch.float64) + 1
FUNCTIONS = [
    (lambda x: F.conv2d(x, WEIGHT, stride=2, padding="valid"), (1, 2, 7, 8)),
    (lambda x: torch.conv2d(input=x, weight=WEIGHT, bias=MEAN[:3], padding=1), (1, 2, 7, 8)),
    (lambda x: F.linear(x, MEAN.view(1, 4)), (3, 4)),
    (lambda x: F.batch_norm(x, MEAN, VARIANCE, eps=0.1), (2, 4, 3)),
    (lambda x: torch.batch_norm(x, MEAN, VARIANCE, VARIANCE, VARIANCE, False, 0.1, 1e-3, False), (2, 4, 3)),
    (lambda x: F.dropout(x, 0.5, False), (2, 4)),
    (lambda x: F.avg_pool2d(x, 3, 1, 1), (2, 4, 5, 5)),
    (lambda x: F.pad(x, [1, 2]), (2, 4, 5)),
    (lambda x: F.pad(x, (1, 2, 3, 0), mode="replicate"), (2, 4, 5, 6)),
    (lambda x: F.pad(x, (1, 2, 3, 0), value=2.0), (2, 4, 5, 6)),
    (lambda x: x * CHANNELS, (2, 4, 5, 6)),
    (lambda x: CHANNELS - x, (2, 4, 5, 6)),
    (lambda x: torch.sub(CHANNELS, x, alpha=2), (2, 4, 5, 6)),
    (lambda x: torch.rsub(x, CHANNELS, alpha=2), (2, 4, 5, 6)),
    (lambda x: x.sub(CHANNELS, alpha=2), (2, 4, 5, 6)),
    (lambda x: x.div(CHANNELS), (2, 4, 5, 6)),
    (lambda x: x / 4, (2, 4)),
    (lambda x: -x, (2, 4)),
    (lambda x: 3 - x, (2, 4)),
    (lambda x: torch.tensor(2.0, dtype=torch.float64) * x, (2, 4)),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=lambda v: type(v).__name__)
def test_layers(layer: nn.Module, shape: tuple[int, ...]) -> None:
    layer = randomise(layer).double().eval()
    x = double(*shape)
    operator = last(nn.Sequential(layer), x)
    assert isinstance(operator, (Conv, ChannelAffine, AveragePool, Pad))
    with torch.no_grad():
        expected = F.batch_norm(
            x, layer.running_mean, layer.running_var, layer.weight, layer.bias, eps=layer.eps
        ) if isinstance(layer, nn.SyncBatchNorm) else layer(x)  # fmt: skip
        compare(expected, operator(x), 1e-12)


@pytest.mark.parametrize(("function", "shape"), FUNCTIONS)
def test_functions_methods_and_operators(function: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> None:
    x = double(*shape)
    operator = last(Net(function), x)
    assert isinstance(operator, (Conv, ChannelAffine, AveragePool, Pad))
    compare(function(x), operator(x), 1e-12)


@pytest.mark.parametrize(
    ("function", "coefficients"),
    [
        (lambda x: x.sin() + x.cos(), [1, 1]),
        (lambda x: x.sin() - x.cos(), [1, -1]),
        (lambda x: torch.add(x.sin(), x.cos(), alpha=-3), [1, -3]),
        (lambda x: torch.rsub(x.sin(), x.cos(), alpha=2), [1, -2]),
        (lambda x: torch.stack([x.sin(), x.cos(), x]).sum(0), [1, 1, 1]),
        (lambda x: torch.stack([x.sin(), x.cos()], dim=1).mean(1), [0.5, 0.5]),
    ],
)
def test_sums(function: Callable[[Tensor], Tensor], coefficients: list[float]) -> None:
    total = last(Net(function), double(2, 3))
    assert isinstance(total, Sum)
    assert [coefficient for coefficient, _ in total.terms] == coefficients


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * x,
        lambda x: 1 / x,
        lambda x: x.relu(),
        lambda x: torch.add(x, 1, out=x.clone()),
        lambda x: F.dropout(x, 0.5),
        lambda x: torch.div(x, 2.0, rounding_mode="floor"),
        lambda x: x / 0,
        lambda x: x.argmax(1) * 2,
        lambda x: (x > 0) + 1,
        lambda x: x.shape[0] * 2,
        lambda x: torch.stack([x, x]).sum(1),
        lambda x: torch.stack([x, x]).sum(0, keepdim=True),
        lambda x: x.sum(0),
        lambda x: x @ torch.ones(1, 4, 4, dtype=torch.float64),
    ],
)
def test_what_is_no_linear_operator(function: Callable[[Tensor], Any]) -> None:
    assert last(Net(function), double(2, 4)) is None


REFUSED = [
    (nn.BatchNorm2d(4, track_running_stats=False), "no running statistics"),
    (nn.InstanceNorm2d(4), "no running statistics"),
    (nn.AvgPool2d(3, ceil_mode=True), "ceil_mode"),
    (nn.AvgPool2d(3, padding=1, count_include_pad=False), "count_include_pad"),
    (Net(lambda x: F.batch_norm(x, MEAN.clone(), VARIANCE.clone(), training=True)), "no running statistics"),
    (Net(lambda x: x * GRID), "place"),
    (Net(lambda x: x + torch.ones(1, 1, 1, 4, 1, 1, dtype=torch.float64)), "add axes"),
    (Net(lambda x: x * torch.arange(4).view(4, 1, 1)), "floating-point"),
    (Net(lambda x: F.conv2d(x, KERNEL, groups=x.shape[1])), "depends on the input"),
    (Net(lambda x: F.conv2d(x, KERNEL, padding=x.shape[1], groups=4)), "depends on the input"),
    (Net(lambda x: F.avg_pool2d(x, x.shape[2:])), "depends on the input"),
    (Net(lambda x: torch.add(x, x.relu(), alpha=x.shape[0])), "depends on the input"),
    (Net(lambda x: F.conv2d(x * (1 + 0j), KERNEL * 1j, groups=4)), "complex"),
]
GRID = torch.rand(4, 5, 6, dtype=torch.float64)
KERNEL = torch.rand(4, 1, 3, 3, dtype=torch.float64)


@pytest.mark.parametrize(("model", "reason"), REFUSED, ids=[reason for _, reason in REFUSED])
def test_refusals_say_why(model: nn.Module, reason: str) -> None:
    refusal = last(nn.Sequential(model.double()), double(2, 4, 5, 6))
    assert isinstance(refusal, Refusal)
    assert reason in refusal.reason


def test_a_norm_of_unknown_rank_is_refused() -> None:
    captured = capture(nn.Sequential(nn.BatchNorm1d(4)))
    for node in captured.graph.nodes:  # as in a graph that was not recorded
        facts.know(node, rank=None)
    refusal = lift(captured.graph.output_node().args[0], captured.modules)
    assert refusal == Refusal("it works along axis 1 of an input of unknown rank; pass example_inputs")


def test_a_constant_that_might_broadcast_its_input_is_marked() -> None:
    operator = last(Net(lambda x: x * CHANNELS), double(2, 1, 5, 6))
    assert isinstance(operator, ChannelAffine)
    assert operator.may_expand
    assert not last(Net(lambda x: x * CHANNELS), double(2, 4, 5, 6)).may_expand


def test_users_register_their_own() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gamma = nn.Parameter(torch.rand(4))

        def forward(self, x: Tensor) -> Tensor:
            return x * (self.gamma if x.sum() > -1e12 else 0)

    @lifting.register(Scale)
    def _(module: Scale, x: Any) -> ChannelAffine:
        return ChannelAffine(module.gamma, None, axis=-1)

    try:
        operator = last(nn.Sequential(Scale()), double(2, 4))
        assert isinstance(operator, ChannelAffine)
    finally:
        lifting.unregister(Scale)
    assert last(nn.Sequential(Scale()), double(2, 4)) is None

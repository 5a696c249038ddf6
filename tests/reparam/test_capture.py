"""What tracing sees: activations as a graph, parameters as numbers, and the rest as opaque leaves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reparam.capture import Capture, capture, private_copy, unchanged, unwrapped
from reparam.errors import CaptureError
from support import Net


def targets(captured: Capture) -> list[str]:
    return [node.name for node in captured.graph.nodes if node.op not in ("placeholder", "output", "get_attr")]


def opaque(captured: Capture) -> dict[str, str]:
    return {remark.where: remark.message for remark in captured.remarks}


def test_what_is_computed_from_parameters_alone_is_a_constant() -> None:
    class Standardised(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            centred = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
            if centred.abs().max() > 1e9:
                raise OverflowError
            return F.conv2d(x, centred / centred.std(), self.bias, self.stride)

    captured = capture(nn.Sequential(Standardised(3, 4, 3)))
    assert captured.traced
    assert targets(captured) == ["conv2d"]
    constants = [node.target for node in captured.graph.nodes if node.op == "get_attr"]
    assert constants == ["_constant0", "0.bias"]


def test_a_constant_does_not_take_the_name_of_an_attribute() -> None:
    net = Net(lambda net, x: x * (2 * net._constant0) + net._constant0, _constant0=nn.Parameter(torch.ones(3)))
    captured = capture(net)
    module = torch.fx.GraphModule(captured.root, captured.graph)
    x = torch.randn(2, 3)
    assert torch.equal(module(x), net(x))


def test_the_copy_is_in_eval_mode_and_shares_memory() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train()
    copy = private_copy(model)
    assert all(module.training for module in model.modules())
    assert not any(module.training for module in copy.modules())
    assert copy[0].weight is not model[0].weight
    assert copy[0].weight.data_ptr() == model[0].weight.data_ptr()
    assert not copy[0].weight.requires_grad


def test_graph_modules_inside_of_others_are_copied() -> None:
    """They copy themselves, and read their layers while they do."""
    inner = torch.fx.symbolic_trace(nn.Sequential(nn.Conv2d(2, 3, 1), nn.ReLU()))
    x = torch.randn(1, 2, 4, 4)
    assert torch.equal(private_copy(nn.Sequential(nn.Identity(), inner))(x), inner(x))


def test_ties_survive_the_copy() -> None:
    model = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
    model[1].weight = model[0].weight
    copy = private_copy(model)
    assert copy[0].weight is copy[1].weight


def test_tensors_that_are_not_leaves_are_copied() -> None:
    model = nn.Linear(3, 3)
    model.cached = model.weight * 2
    assert torch.equal(private_copy(model).cached, model.cached)


def test_wrappers_are_taken_off() -> None:
    model = nn.Linear(3, 3)
    assert unwrapped(nn.DataParallel(torch.compile(nn.DataParallel(model)))) is model


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda net, x: x if x.sum() > 0 else -x, "control flow"),
        (lambda net, x: torch.cat([x[i] for i in range(len(x))]), "len"),
        (lambda net, x: x * torch.rand(3), "random numbers"),
        (lambda net, x: x * net.count.add_(1), "writes to its own tensors"),
        (lambda net, x: net.count.add_(x.mean()) * x, "writes to its own tensors"),
        (lambda net, x: torch.add(x, x, out=net.count), "writes to its own tensors"),
        (lambda net, x: x * setattr(net, "number", net.number + 1) if False else (_count(net), x)[1], "number"),
        (lambda net, x: _rebind(net, x), "buffers"),
        (lambda net, x: (net.seen.append(x), x)[1], "seen"),
        (lambda net, x: _autocast(net, x), "autocast"),
    ],
    ids="branch length random write ema out number rebinding list autocast".split(),
)
def test_only_the_innermost_untraceable_module_is_opaque(forward: Any, reason: str) -> None:
    inner = Net(forward, number=0, seen=[])
    inner.register_buffer("count", torch.zeros(3))
    model = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.ReLU(), inner), nn.Linear(3, 3))
    captured = capture(model)
    assert captured.traced
    assert targets(captured) == ["_0", "_1_0", "_1_1", "_2"]
    assert list(opaque(captured)) == ["1.1"]
    assert reason in opaque(captured)["1.1"]
    # Nothing that happened while tracing is left behind, neither in the copy nor in the model.
    for net in (inner, captured.root.get_submodule("1.1")):
        assert net.number == 0
        assert net.seen == []
        assert torch.equal(net.count, torch.zeros(3))


def _count(net: Any) -> None:
    net.number += 1


def _rebind(net: Any, x: Tensor) -> Tensor:
    net.count = net.count + x.mean()
    return x + net.count


def _autocast(net: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return F.linear(x, torch.ones(3, 3))


def test_constants_made_at_the_first_use_are_no_state() -> None:
    class Cached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.grid: Tensor | None = None
            self.table: dict[str, Tensor] = {}
            self.size = 3

        def forward(self, x: Tensor) -> Tensor:
            if self.grid is None:
                self.grid = torch.arange(3.0)
            self.table["ones"] = torch.ones(3)
            self.size = 3
            return x * self.grid + self.table["ones"]

    captured = capture(nn.Sequential(Cached()))
    assert not captured.remarks
    assert captured.root.get_submodule("0").grid is None


def test_a_root_that_cannot_be_traced_says_so() -> None:
    captured = capture(Net(lambda net, x: x if x.sum() > 0 else -x))
    assert not captured.traced
    assert "not traceable, kept as Python" in opaque(captured)[""]


def test_facts_that_are_known_answer_questions() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        y = net.conv(x)
        if isinstance(y, Tensor) and y.ndim == y.dim() == 4 and not isinstance(y, (list, tuple)):
            return y
        raise AssertionError

    assert capture(Net(forward, conv=nn.Conv2d(3, 3, 3))).traced
    assert not capture(Net(lambda net, x: x if x.ndim == 4 else x[None])).traced
    assert capture(Net(lambda net, x: x if x.ndim == 4 else x[None]), ((torch.ones(3, 4, 5),), {})).traced


def test_lazy_parameters_are_refused() -> None:
    with pytest.raises(CaptureError, match=r"LazyLinear\.weight has no values yet"):
        capture(nn.LazyLinear(3))


def test_unchanged_puts_back_tensors_attributes_and_hooks() -> None:
    model = nn.BatchNorm1d(3)
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    model.number, model.seen = 0, [1]
    with unchanged(model):
        model(torch.randn(4, 3))
        model.number += 1
        model.seen.append(2)
        model.new = 1
        model.running_mean = torch.ones(3)
    assert model.num_batches_tracked == 0
    assert torch.equal(model.running_mean, torch.zeros(3))
    assert (model.number, model.seen, hasattr(model, "new"), calls) == (0, [1], False, [])
    model(torch.randn(4, 3))
    assert calls == [1]

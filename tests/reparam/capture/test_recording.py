"""What recording sees: activations as a graph, parameters as numbers, and the rest as opaque leaves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from networks import assert_same, model, normal
from torch import Tensor, nn

import reparam
from reparam.capture import Capture, capture, private_copy, unchanged, unwrapped
from reparam.errors import CaptureError, ConditionError
from reparam.graph.conditions import check_call
from support import Net


def targets(captured: Capture) -> list[str]:
    return [node.name for node in captured.graph.nodes if node.op not in ("placeholder", "output", "get_attr")]


def opaque(captured: Capture) -> dict[str, str]:
    return {remark.where: remark.message for remark in captured.remarks if remark.rule == "Record"}


def others(captured: Capture) -> list[str]:
    return [remark.rule for remark in captured.remarks if remark.rule != "Record"]


EXAMPLE = ((torch.randn(2, 3),), {})


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
        (lambda net, x: x if x.sum() > 0 else -x, "it asks for the value of an activation (__bool__)"),
        (lambda net, x: x * x.mean().item(), "it asks for the value of an activation (item)"),
        (lambda net, x: torch.stack([x[i] for i in range(len(x))]), "it decides by sizes (input.shape[0] is 2)"),
        (lambda net, x: x * net.count.add_(1), "writes to its own tensors"),
        (lambda net, x: net.count.add_(x.mean()) * x, "writes to its own tensors"),
        (lambda net, x: x + torch.add(x[0], x[0], out=net.count), "writes to its own tensors"),
        (lambda net, x: x * setattr(net, "number", net.number + 1) if False else (_count(net), x)[1], "number"),
        (lambda net, x: _rebind(net, x), "buffers"),
        (lambda net, x: (net.seen.append(x), x)[1], "seen"),
        (lambda net, x: _autocast(net, x), "autocast"),
    ],
    ids="branch item length write ema out number rebinding list autocast".split(),
)
@pytest.mark.parametrize("example", [True, False])
def test_only_the_innermost_module_that_is_no_graph_is_opaque(forward: Any, reason: str, example: bool) -> None:
    inner = Net(forward, number=0, seen=[])
    inner.register_buffer("count", torch.zeros(3))
    model = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.ReLU(), inner), nn.Linear(3, 3))
    captured = capture(model, EXAMPLE if example else None)
    assert captured.traced
    assert targets(captured) == ["_0", "_1_0", "_1_1", "_2"]
    assert list(opaque(captured)) == ["1.1"]
    assert opaque(captured)["1.1"].startswith("Net is kept as it is: ")
    assert reason in opaque(captured)["1.1"]
    assert others(captured) == ([] if example else ["Example"])
    # Nothing that happened meanwhile is left behind, neither in the copy nor in the model.
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
        return F.linear(x, torch.ones(3, 3)).float()


def test_random_numbers_are_drawn_at_every_call() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        noise = torch.rand(3) + torch.zeros(3).uniform_()
        return net.linear(x) * noise + torch.rand_like(net.linear.bias) + F.dropout(x, 0.5, training=True)

    model = Net(forward, linear=nn.Linear(3, 3)).eval()
    captured = capture(model, EXAMPLE)
    compiled = reparam.compile(model, EXAMPLE[0])
    graphs = [compiled, torch.fx.GraphModule(captured.root, captured.graph)] if captured.traced else [compiled]
    x = torch.randn(4, 3)
    for graph in graphs:
        torch.manual_seed(0)
        expected = [model(x), model(x)]
        torch.manual_seed(0)
        for y in expected:
            assert torch.allclose(graph(x), y)
        assert not torch.equal(*expected)


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

    captured = capture(nn.Sequential(Cached()), EXAMPLE)
    assert captured.traced
    assert not captured.remarks
    assert captured.root.get_submodule("0").grid is None


def test_a_root_that_is_no_graph_says_so() -> None:
    captured = capture(Net(lambda net, x: x if x.sum() > 0 else -x))
    assert not captured.traced
    assert opaque(captured) == {"": "kept as Python: it asks for the value of an activation (__bool__)"}


def test_an_input_is_made_up_and_said() -> None:
    captured = capture(nn.Sequential(nn.Conv2d(5, 3, 3), nn.ReLU()).double())
    assert captured.traced
    assert captured.call is not None
    assert captured.call[0][0].shape[:2] == (2, 5)
    (remark,) = captured.remarks
    assert (remark.rule, remark.where) == ("Example", "")
    assert remark.message.startswith("no example inputs were given; made up: input of torch.float64, 2x5x")


def test_python_runs_on_real_tensors() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        y = net.conv(x)
        if isinstance(y, Tensor) and y.ndim == y.dim() == 4 and not isinstance(y, (list, tuple)):
            return y
        raise AssertionError

    assert capture(Net(forward, conv=nn.Conv2d(3, 3, 3))).traced
    # The rank of an input is a condition of the call.
    for x, names in ((torch.ones(1, 3, 4, 5), []), (torch.ones(3, 4, 5), ["getitem"])):
        captured = capture(Net(lambda net, x: x if x.ndim == 4 else x[None]), ((x,), {}))
        assert captured.traced
        assert targets(captured) == names
        (argument,) = captured.arguments
        assert (argument.name, argument.kind) == ("x", ("tensor", x.ndim, "floating-point"))
        with pytest.raises(ConditionError, match=f"compiled for x as a tensor of floating-point numbers with {x.ndim}"):
            check_call(captured.arguments, (x[..., 0],), {})
        check_call(captured.arguments, (x[:0],), {})


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


# Constants.


def test_a_constant_that_is_only_moved_folds() -> None:
    net = model(
        lambda s, x: s.conv(x) * s.gamma.to(x.device, x.dtype),
        conv=nn.Conv2d(3, 3, 1),
        gamma=nn.Parameter(torch.rand(3, 1, 1)),
    )
    compiled = reparam.compile(net)
    assert compiled.report.after.kernels == 1
    assert_same(net, compiled, normal(2, 3, 4, 4))


def test_a_branch_on_the_kind_of_device_is_taken_as_the_model_lies() -> None:
    net = model(lambda s, x: s.conv(x) if x.device.type == "cpu" else x, conv=nn.Conv2d(3, 3, 1))
    compiled = reparam.compile(net)
    assert compiled.report.after.convolutions == 1
    assert_same(net, compiled, normal(2, 3, 4, 4))


def test_a_layer_that_reads_only_constants_is_run_once() -> None:
    """The bias of Swin Transformer V2's attention (Liu et al. 2022, arXiv 2111.09883) is a network of a table."""
    net = model(
        lambda s, x: s.linear(x) + s.last(torch.relu(s.first(s.table))),
        linear=nn.Linear(4, 3), first=nn.Linear(2, 8), last=nn.Linear(8, 3), table=nn.Parameter(torch.rand(1, 2)),
    )  # fmt: skip
    compiled = reparam.compile(net, normal(2, 4))
    assert compiled.report.after.kernels == 1
    assert_same(net, compiled, normal(5, 4))


def test_torch_is_left_as_it_was() -> None:
    def found() -> tuple[Any, ...]:
        patched = (Tensor.expand, Tensor.__getitem__, torch.zeros, F.interpolate, max, isinstance, nn.Module.__call__)
        return *patched, torch.utils.checkpoint.checkpoint, len(vars(Tensor))

    before, seen = found(), []
    net = model(lambda s, x: (seen.append(found()), s.linear(x))[1], linear=nn.Linear(4, 3))
    reparam.compile(net, normal(2, 4))
    # Neither afterwards nor meanwhile.
    assert seen
    assert all(during == before for during in [*seen, found()])
    assert "expand" not in vars(Tensor)

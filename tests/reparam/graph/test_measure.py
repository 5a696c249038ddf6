"""One counter of kernels, held to what torch dispatches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from networks import graph_of, image, model, networks, normal
from torch import nn
from torch.fx import Interpreter, Node
from torch.utils._python_dispatch import TorchDispatchMode

import reparam
from reparam import capture
from reparam.compare import as_call
from reparam.graph import measure, views


class Launches(TorchDispatchMode):
    """Whether an operator ran that makes new memory, or writes."""

    def __init__(self) -> None:
        super().__init__()
        self.any = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = [result.alias_info for result in func._schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in returned) or not returned
        self.any |= not is_view and func._schema.name not in ("aten::_unsafe_view", "aten::new_empty")
        return func(*args, **(kwargs or {}))


class Counted(Interpreter):
    """Runs a graph, and compares every node with the counter. A call of torch's is one kernel, or none."""

    def __init__(self, root: nn.Module, graph: torch.fx.Graph, modules: dict[str, Any]) -> None:
        super().__init__(root, graph=graph)
        self.known = modules
        self.wrong: list[str] = []

    def run_node(self, node: Node) -> Any:
        with torch.no_grad(), Launches() as launches:
            value = super().run_node(node)
        kinds = measure.kinds_of(node, self.known)
        # Whether a reshape copies may depend on sizes: an axis of one lies anywhere.
        inputs = self.fetch_args_kwargs_from_env(node)[0]
        unknown = measure._reshapes(node, self.known) and 1 in inputs[0].shape
        if node.op.startswith("call") and bool(kinds) != launches.any and not unknown:
            self.wrong.append(f"{node.format_node()}: {kinds}")
        return value


def wrong(module: nn.Module, *inputs: Any) -> list[str]:
    """The nodes, before and after compiling, of which the counter does not say what torch does."""
    captured = capture.capture(module, as_call(inputs))
    modules = dict(captured.root.named_modules())
    views.settle(captured.graph.nodes, modules)
    before = Counted(captured.root, captured.graph, modules)
    before.run(*(x.clone() for x in inputs))
    compiled = reparam.compile(module, inputs, verify=False)
    after = Counted(compiled, compiled.graph, dict(compiled.named_modules()))
    after.run(*(x.clone() for x in inputs))
    return before.wrong + after.wrong


@settings(max_examples=40)
@given(networks())
def test_what_is_counted_is_what_torch_dispatches(drawn):
    network, inputs = drawn
    assert wrong(network.eval(), *inputs[0]) == []


def of_all_kinds(self: Any, x: torch.Tensor) -> torch.Tensor:
    x = self.conv(x)
    x = x.view(x.shape[0], 2, 2, -1).transpose(1, 2).reshape(x.shape[0], 4, -1)
    a, b = x.chunk(2, 1)
    return torch.cat([a, b], 1).contiguous().flatten(1)


RESHAPES = {
    "of what is permuted": (lambda s, x: x.transpose(1, 2).flatten(1), 1),
    "of axes that stay together": (lambda s, x: x.permute(0, 2, 3, 1).flatten(1, 2), 0),
    "of what is put back": (lambda s, x: x.transpose(1, 2).transpose(2, 1).flatten(1), 0),
    "of what is in order": (lambda s, x: x.reshape(x.shape[0], -1), 0),
    "of the other order": (lambda s, x: x.permute(0, 3, 2, 1).flatten(1, 2), 1),
    "of what is expanded": (lambda s, x: x.unsqueeze(1).expand(-1, 2, -1, -1, -1).flatten(1), 1),
    "none, but into order": (lambda s, x: x.transpose(1, 2).contiguous(), 1),
    "none, and in order": (lambda s, x: x.contiguous(), 0),
    "of what was put into order": (lambda s, x: x.transpose(1, 2).contiguous().flatten(1), 1),
    "by a layer": (lambda s, x: s.flat(x.transpose(1, 2)), 1),
    "of what is turned": (lambda s, x: x.mT.flatten(1), 1),
    "none: rows picked by a list": (lambda s, x: x[:, [0, 2]], 1),
    "none: a copy of no use": (lambda s, x: x * 1, 1),
    "all kinds of views": (of_all_kinds, 3),
}


@pytest.mark.parametrize("name", RESHAPES)
def test_reshapes_copy_what_is_permuted(name):
    forward, kernels = RESHAPES[name]
    net = model(forward, conv=nn.Conv2d(3, 4, 1), flat=nn.Flatten())
    x = image(3, 2)
    assert wrong(net, x) == []
    graph = graph_of(net, x)
    assert sum(map(graph.kernels, graph.fx.nodes)) == kernels
    report = reparam.compile(net, x).report
    assert (report.before.kernels, report.after.kernels) == (kernels, kernels)


def test_the_engine_counts_as_the_report_does():
    net = model(lambda s, x: s.b(s.a(x)) + s.c(x), a=nn.Conv2d(3, 4, 3), b=nn.BatchNorm2d(4), c=nn.Conv2d(3, 4, 3))
    graph = graph_of(net, normal(1, 3, 9, 9))
    assert sum(map(graph.kernels, graph.fx.nodes)) == len(measure.kinds_of_graph(graph.fx, graph.modules)) == 4


def test_a_stack_of_many_terms_is_two_kernels():
    """Merging two of them would add the others one by one."""

    def forward(self, x):
        others = [x.sigmoid(), x.tanh(), x.relu()]
        return torch.stack([self.a(x), self.b(x), *others]).sum(0)

    net = model(forward, a=nn.Conv2d(3, 3, 3, padding=1), b=nn.Conv2d(3, 3, 1))
    report = reparam.compile(net, image(3, 2)).report
    assert report.fused == []
    assert report.after.kernels == 7
    few = model(lambda s, x: torch.stack([s.a(x), s.b(x), x.tanh()]).sum(0), a=net.a, b=net.b)
    assert reparam.compile(few, image(3, 2)).report.after.kernels == 3


def test_a_flatten_of_one_axis_copies_nothing():
    net = model(lambda s, x: x.movedim(1, 2).flatten(2))
    assert wrong(net, normal(2, 3, 4)) == []

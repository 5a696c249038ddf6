"""In-place operations: made safe where that is provably right, frozen where it is not."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

import reparam
from reparam.capture import capture
from reparam.compare import compare
from reparam.graph import facts
from reparam.graph.aliasing import is_in_place, make_out_of_place, work_in_place


class Net(nn.Module):
    def __init__(self, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.function = forward
        self.act, self.drop, self.flat = nn.ReLU(inplace=True), nn.Dropout(inplace=True), nn.Flatten()
        self.same, self.conv = nn.Identity(), nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def check(forward: Callable[..., Any], frozen: int) -> GraphModule:
    """Make a model safe, count what stays in place, and compare with eager mode; the input is not changed."""
    model = Net(forward).double().eval()
    captured = capture(model)
    assert captured.traced, captured.remarks
    modules = dict(captured.modules)
    stuck = make_out_of_place(captured.graph, modules)
    assert len(stuck) == frozen
    left = [node for node in captured.graph.nodes if is_in_place(node, modules)]
    assert left == stuck
    for path, module in modules.items():
        if path and captured.modules.get(path) is not module:
            captured.root.set_submodule(path, module)
    captured.graph.lint()
    graph = GraphModule(captured.root, captured.graph)
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    with torch.no_grad():
        compare(model(x.clone()), graph(x.clone()), 1e-12)
    return graph


def several(net: Net, x: Tensor) -> Any:
    y = net.conv(x)
    net.act(y)
    return y, x


SAFE = [
    several,
    lambda net, x: (net.act(net.conv(x)), x),
    lambda net, x: _then(net.conv(x), lambda y: y.mul_(2)),
    lambda net, x: _then(net.conv(x), lambda y: F.relu(y, inplace=True)),
    lambda net, x: _then(net.conv(x), lambda y: F.leaky_relu(y, 0.1, True)),
    lambda net, x: _then(net.conv(x), lambda y: torch.relu_(y)),
    lambda net, x: _then(net.conv(x), lambda y: y.__iadd__(x)),
    lambda net, x: _then(net.same(net.conv(x)), lambda y: net.drop(y).clamp_(min=0)),
    lambda net, x: _then(net.act(net.act(net.conv(x))), lambda y: net.act(y)),
    # What is written last is read by nobody, so it does not matter that the first write shows through the view.
    lambda net, x: _written_for_nobody(net.conv(x)),
]
FROZEN = [
    # A view of the value is read later.
    lambda net, x: _with_view(net.conv(x), lambda y: y.view(-1), lambda y, v: y.add_(1)),
    lambda net, x: _with_view(net.conv(x), lambda y: net.flat(y), lambda y, v: net.act(y)),
    lambda net, x: _with_view(net.conv(x), lambda y: y.chunk(3, 1)[0], lambda y, v: y.add_(1)),
    lambda net, x: _with_view(net.conv(x), lambda y: y.mT, lambda y, v: y.add_(1)),
    lambda net, x: _with_view(net.conv(x), lambda y: y.detach(), lambda y, v: y.add_(1)),
    lambda net, x: _with_view(net.conv(x), lambda y: y.to(torch.float64), lambda y, v: y.add_(1)),
    lambda net, x: _with_view(net.conv(x), lambda y: y.contiguous(), lambda y, v: y.add_(1)),
    # The value is read later, and a view of it was changed.
    lambda net, x: _with_view(net.conv(x), lambda y: y[:, 1], lambda y, v: v.mul_(3)),
    lambda net, x: _with_view(net.conv(x), lambda y: y.permute(1, 0, 2, 3), lambda y, v: net.act(v)),
    # There is no twin.
    lambda net, x: _then(net.conv(x), lambda y: y.copy_(x)),
    lambda net, x: _then(net.conv(x), lambda y: y.zero_()),
    lambda net, x: _then(net.conv(x), lambda y: torch.add(x, 1, out=y)),
]


def _then(y: Tensor, change: Callable[[Tensor], Any]) -> Any:
    """A value, changed in place, under both of its names."""
    return change(y), y * 2


def _with_view(y: Tensor, look: Callable[[Tensor], Tensor], change: Callable[[Tensor, Tensor], Any]) -> Any:
    view = look(y)
    change(y, view)
    return view * 2, y * 3


def _written_for_nobody(y: Tensor) -> Tensor:
    view = y.view(-1)
    result = y.relu_() * 2
    view.mul_(3)
    return result


@pytest.mark.parametrize("forward", SAFE)
def test_safe(forward: Callable[..., Any]) -> None:
    check(forward, frozen=0)


@pytest.mark.parametrize("forward", FROZEN)
def test_frozen(forward: Callable[..., Any]) -> None:
    graph = check(forward, frozen=1)
    assert any(facts.of(node).frozen is not None for node in graph.graph.nodes)


def test_a_shared_layer_is_in_place_only_in_the_call_that_has_to_be() -> None:
    def forward(net: Net, x: Tensor) -> Any:
        y = net.act(net.conv(x))
        view = x.view(-1)
        net.act(x)
        return y, view, net.act(net.conv(y))

    graph = check(forward, frozen=1)
    layers = [graph.get_submodule(node.target) for node in graph.graph.nodes if "act" in str(node.target)]
    assert [layer.inplace for layer in layers] == [False, True, False]


def test_in_place_comes_back_only_where_nobody_else_can_see_it() -> None:
    def after(forward: Callable[..., Any]) -> bool:
        captured = capture(Net(forward))
        modules = dict(captured.modules)
        make_out_of_place(captured.graph, modules)
        assert not modules["act"].inplace
        work_in_place(captured.graph, modules)
        return bool(modules["act"].inplace)

    assert after(lambda net, x: net.act(net.conv(x)))
    assert not after(lambda net, x: net.act(x))
    assert not after(lambda net, x: net.act(net.conv(x)) + net.act(x))

    def twice(net: Net, x: Tensor) -> Tensor:
        y = net.conv(x)
        z = y * 2
        return net.act(y) + z

    assert not after(twice)


def written(model: nn.Module, x: Tensor) -> list[str]:
    """Compile, compare, and tell what is in place afterwards; neither the model nor its input is changed."""
    compiled, before = reparam.compile(model, x), x.clone()
    with torch.no_grad():
        compare(model(x.clone()), compiled(x))
    assert torch.equal(x, before)
    modules = dict(compiled.named_modules())
    found = [node for node in compiled.graph.nodes if is_in_place(node, modules)]
    return [type(modules[n.target]).__name__ if n.op == "call_module" else facts.target_name(n) for n in found]


ACTIVATIONS = {
    "relu": [nn.ReLU(), nn.ReLU(inplace=True), F.relu, torch.relu, lambda y: y.relu(), lambda y: F.relu(y, False)],
    "relu6": [nn.ReLU6(), F.relu6],
    "gelu": [nn.GELU(), nn.GELU("tanh"), F.gelu, lambda y: F.gelu(y, approximate="tanh")],
    "silu": [nn.SiLU(), F.silu],
    "hardswish": [nn.Hardswish(), F.hardswish],
    "hardsigmoid": [nn.Hardsigmoid(), F.hardsigmoid],
    "mish": [nn.Mish(), F.mish],
}
MADE = {
    "convolution": lambda net, x: net.conv(x),
    "convolution as a function": lambda net, x: F.conv2d(x, net.conv.weight, padding=1),
    "sum": lambda net, x: x + net.conv(x),
    "product": lambda net, x: x.roll(1) * net.conv(x),
    "matrix product": lambda net, x: x.transpose(2, 3) @ net.conv(x),
}


class Activated(Net):
    def __init__(self, forward: Callable[..., Any], activation: Any) -> None:
        super().__init__(forward)
        self.activation = activation


@pytest.mark.parametrize("made", MADE.values(), ids=MADE)
@pytest.mark.parametrize(("name", "activation"), [(name, each) for name, all in ACTIVATIONS.items() for each in all])
def test_an_activation_overwrites_new_memory(made: Callable[..., Tensor], name: str, activation: Any) -> None:
    model = Activated(lambda net, x: net.activation(made(net, x)), activation).double()
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    assert [kind.lower() for kind in written(model, x)] == [name]
    assert getattr(activation, "inplace", None) in (None, "inplace=True" in repr(activation))

    fused = reparam.compile(model, x, trainable=True)
    for graph in (fused, pickle.loads(pickle.dumps(fused)), copy.deepcopy(fused)):
        reference, given = x.clone().requires_grad_(), x.clone().requires_grad_()
        # Once more through the weights, so that what is kept for their gradients is read, too.
        expected = torch.autograd.grad(model(reference).square().sum(), [reference, model.conv.weight])
        weight = next(p for p in graph.parameters() if p.dim() == 4)
        compare(expected, torch.autograd.grad(graph(given).square().sum(), [given, weight]), 1e-12)


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.GELU(), F.silu, torch.relu, lambda y: y.relu()])
@pytest.mark.parametrize(
    "forward",
    [
        lambda net, x: net.activation(x),
        lambda net, x: net.activation(x.view(2, 3, 20)),
        lambda net, x: net.activation(net.conv(x).flatten(1)),
        lambda net, x: (lambda y: (y, net.activation(y)))(net.conv(x)),
        lambda net, x: (lambda y: (y.mean(), net.activation(y)))(net.conv(x)),
        lambda net, x: (lambda y: net.activation(y) + y)(net.conv(x)),
        # The gradient of the first one needs what it returned.
        lambda net, x: net.activation(torch.sigmoid(x)),
        lambda net, x: net.activation(x.exp()),
    ],
)
def test_an_activation_overwrites_nothing_that_is_read_elsewhere(forward: Any, activation: Any) -> None:
    assert not written(Activated(forward, activation).double(), torch.randn(2, 3, 4, 5, dtype=torch.float64))


def test_names_that_users_give_are_no_operations() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.relu, self.mul = nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Parameter(torch.randn(1, 3, 1, 1))

        def forward(self, add: Tensor) -> Tensor:
            return self.conv(self.relu(add)) + F.silu(self.mul)

    model = Named().double()
    assert not written(model, torch.randn(2, 3, 4, 5, dtype=torch.float64))


@pytest.mark.parametrize("layer", [nn.LeakyReLU, nn.ELU, nn.CELU])
@pytest.mark.parametrize("inplace", [False, True])
def test_other_layers_are_in_place_only_if_they_were(layer: type[nn.Module], inplace: bool) -> None:
    model = Activated(lambda net, x: net.activation(net.conv(x)), layer(0.1, inplace=inplace)).double()
    assert written(model, torch.randn(2, 3, 4, 5, dtype=torch.float64)) == [layer.__name__] * inplace


def test_a_shared_activation_overwrites_in_all_its_calls_or_in_none() -> None:
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    for activation, name in ((nn.SiLU(), "SiLU"), (nn.GELU(), "gelu")):
        everywhere = Activated(lambda net, x: net.activation(x * 2) + net.activation(net.conv(x)), activation)
        assert written(everywhere.double(), x) == [name, name]
        once = Activated(lambda net, x: net.activation(x) + net.activation(net.conv(x)), activation)
        assert not written(once.double(), x)


def test_memory_that_is_read_under_another_name_is_not_overwritten() -> None:
    def forward(net: Net, x: Tensor) -> Any:
        y = net.conv(x)
        view = y.view(-1)
        return net.activation(y.add_(1)), view * 2

    for activation in (nn.SiLU(), nn.GELU(), F.silu, torch.relu):
        model = Activated(forward, activation).double()
        assert written(model, torch.randn(2, 3, 4, 5, dtype=torch.float64)) == ["iadd"]


def test_what_a_hook_sees_is_not_overwritten() -> None:
    for hooked in ("conv", "activation"):
        model, seen = Activated(lambda net, x: net.activation(net.conv(x)), nn.SiLU()).double(), []
        model.get_submodule(hooked).register_forward_hook(
            lambda module, args, output, seen=seen: seen.append((output, output.clone()))
        )
        assert not written(model, torch.randn(2, 3, 4, 5, dtype=torch.float64))
        assert all(torch.equal(values, then) for values, then in seen)


def test_an_activation_in_place_is_saved_and_loaded(tmp_path: Path) -> None:
    model = Activated(lambda net, x: net.activation(net.conv(x)), nn.GELU("tanh"))
    compiled = reparam.compile(model, x := torch.randn(2, 3, 4, 5))
    reparam.save(compiled, tmp_path / "model.safetensors")
    assert torch.equal(reparam.load(tmp_path / "model.safetensors")(x), compiled(x))


@pytest.mark.parametrize(
    ("forward", "in_place"),
    [
        (lambda net, x: net.conv(x).__iadd__(F.silu(x)), True),
        (lambda net, x: net.conv(x).mul_(x), True),
        (lambda net, x: torch.relu_(net.conv(x)), True),
        (lambda net, x: (x * x).add_(x), True),
        (lambda net, x: x.roll(1).add_(x), False),  # not known to be new memory
        (lambda net, x: _then(net.conv(x), lambda y: y.add_(F.silu(x))), True),
        (lambda net, x: (lambda y: (y * 2, y.add_(x)))(net.conv(x)), False),
    ],
)
def test_arithmetic_comes_back_in_place(forward: Callable[..., Any], in_place: bool) -> None:
    model = Net(forward).eval()
    compiled = reparam.compile(model, x := torch.randn(2, 3, 4, 5))
    nodes = [node for node in compiled.graph.nodes if is_in_place(node, dict(compiled.named_modules()))]
    assert bool(nodes) is in_place
    before = x.clone()
    with torch.no_grad():
        compare(model(x.clone()), compiled(x))
    assert torch.equal(x, before)


def test_addition_to_a_size_is_plain_arithmetic() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        height = x.shape[2]
        height += 1
        return x * height

    check(forward, frozen=0)

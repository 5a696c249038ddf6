"""Nodes of a graph, operators and modules, run in float64 with torch's own functions; random inputs to run them on."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from reparam.algebra import Operator
from reparam.errors import VerificationError
from reparam.graph import facts
from reparam.graph.depthwise import ByTap
from reparam.modes import below

if TYPE_CHECKING:
    from reparam.graph.graph import Graph


def seeded() -> torch.Generator:
    """The same random numbers for every certificate: compilation is deterministic."""
    return torch.Generator().manual_seed(0)


def random_inputs(operator: Operator, source: Node) -> Iterator[Tensor]:
    """Random float64 inputs of small, odd sizes that reach every border, and every phase of a stride."""
    generator = seeded()
    for shape in operator.shapes(facts.of(source).rank):
        yield torch.randn(shape, dtype=torch.float64, generator=generator).to(operator.device)


def evaluate(graph: Graph, node: Node, env: dict[Node, Any], changed: Mapping[Node, Any] | None = None) -> Any:
    """The value of a node in float64, with torch's own functions, given the values of some earlier nodes.

    ``changed`` has what takes the places of some nodes: another node, or an operator applied to one.
    """
    if node in env:
        return env[node]

    def value(item: Node) -> Any:
        return evaluate(graph, item, env, changed)

    instead = (changed or {}).get(node)
    if isinstance(instead, Node):
        env[node] = value(instead)
        return env[node]
    if instead is not None:
        env[node] = in_double(instead.operator)(value(instead.source))
        return env[node]
    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), value)
    match node.op:
        case "placeholder":
            raise LookupError(f"the replacement leaves out what depends on the input {node.target}")
        case "get_attr":
            owner, _, name = str(node.target).rpartition(".")
            result = doubled(getattr(graph.modules[owner], name))
        case "call_module":
            result = InDouble.of_layer(graph.modules[str(node.target)])(*args, **kwargs)
        case "call_method":
            result = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        case _:
            function: Any = in_double(node.target) if isinstance(node.target, Operator) else node.target
            result = function(*args, **kwargs)
    env[node] = result
    return result


def in_double(operator: Operator) -> Callable[[Any], Any]:
    """What an operator computes in float64."""
    return _quickly(operator.double(), getattr(operator, "groups", 1))


def _quickly(function: Callable[..., Any], groups: int) -> Callable[..., Any]:
    """A convolution, whose groups may be as many as its channels."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with below(ByTap()):
            return function(*args, **kwargs)

    return call if groups > 1 else function


class InDouble:
    """A module's forward with its parameters and buffers in float64."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        if isinstance(module, torch.jit.ScriptModule):
            # Its tensors cannot be exchanged for a call.
            with warnings.catch_warnings():
                # torch asks the copies, which are no leaves, for gradients.
                warnings.simplefilter("ignore")
                self.module = copy.deepcopy(module).double().eval()
        tensors = (*self.module.named_parameters(), *self.module.named_buffers())
        self.tensors = {name: doubled(tensor) for name, tensor in tensors}

    @staticmethod
    def of_layer(module: nn.Module) -> Callable[..., Any]:
        """The same for a module that is likely to be a layer of torch's, which takes less to exchange tensors of."""
        if module._modules or not type(module).__module__.startswith("torch.nn.modules."):
            return InDouble(module)
        twin = object.__new__(type(module))
        twin.__dict__.update(module.__dict__)
        for kind in ("_parameters", "_buffers"):
            tensors = module.__dict__[kind].items()
            twin.__dict__[kind] = {name: None if tensor is None else doubled(tensor) for name, tensor in tensors}
        return _quickly(twin, getattr(module, "groups", 1))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output.

        Raises:
            VerificationError: It replaces one of its tensors by another.
        """
        if isinstance(self.module, torch.jit.ScriptModule):
            return self.module(*args, **kwargs)
        tensors = dict(self.tensors)
        result = torch.func.functional_call(self.module, tensors, args, kwargs)
        if any(tensors[name] is not tensor for name, tensor in self.tensors.items()):
            raise VerificationError(f"{type(self.module).__name__} replaces its own tensors")
        return result


def doubled(tensor: Tensor) -> Tensor:
    """The same numbers in float64; integers stay."""
    return tensor.detach().double() if tensor.is_floating_point() else tensor

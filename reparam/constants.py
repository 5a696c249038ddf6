"""Constants that meet activations where torch does not expect them.

While a model is traced, parameters are tensors and activations are proxies. Where a tensor and a proxy meet as
tensors, torch asks the proxy. Where the proxy stands for a number, as in ``token.expand(x.shape[0], -1, -1)``,
``torch.zeros(x.shape[0], 1)`` or ``F.interpolate(position, size=x.shape[2:])``, it does not ask, and fails. While
tracing, these calls look at their arguments first, and are recorded when there is a proxy among them.

Graphs that others captured compute their constants at every call; :func:`fold` does it once.
"""

from __future__ import annotations

import builtins
import functools
import itertools
import math
import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.fx.proxy import Proxy
from torch.overrides import get_overridable_functions

_METHODS = """chunk expand flatten narrow new_empty new_full new_ones new_zeros permute repeat
repeat_interleave reshape roll select split sum tile to transpose unflatten unfold unsqueeze view""".split()
_FACTORIES = "arange empty eye full linspace ones rand randn scalar_tensor tensor zeros".split()
_FUNCTIONS: list[tuple[Any, str]] = [
    *((torch, name) for name in _FACTORIES),
    *((torch, name) for name in "broadcast_to narrow reshape roll tile unflatten".split()),
    *((F, name) for name in "adaptive_avg_pool1d adaptive_avg_pool2d interpolate pad".split()),
    # Arithmetic on sizes, such as that of TensorFlow's SAME padding.
    *((math, name) for name in "ceil floor prod sqrt trunc".split()),
    *((builtins, name) for name in ("max", "min")),
]
FACTORIES = frozenset(_FACTORIES)

# Records a call and returns its proxy; takes the kind of node, the target, and the arguments.
Record = Callable[[str, Any, tuple[Any, ...], dict[str, Any]], Any]


@contextmanager
def meeting_activations(record: Record) -> Iterator[None]:
    """Record calls on constants whose other arguments are activations.

    Args:
        record: Makes a node of the graph, as ``torch.fx.Tracer.create_proxy`` does.
    """
    # torch keeps a list of its functions that it makes when it is first asked: not now, with ours among them.
    get_overridable_functions()
    with ExitStack() as stack:
        for name in _METHODS:
            asking = _asking(record, "call_method", name, getattr(Tensor, name))
            stack.enter_context(_replaced(Tensor, name, asking))
        index = _asking(record, "call_function", operator.getitem, Tensor.__getitem__)
        stack.enter_context(_replaced(Tensor, "__getitem__", index))
        for owner, name in _FUNCTIONS:
            function = getattr(owner, name)
            stack.enter_context(_replaced(owner, name, _asking(record, "call_function", function, function)))
        yield


def is_python(function: Any) -> bool:
    """Whether a function is one of Python's own, which makes numbers of numbers."""
    return getattr(function, "__module__", None) in ("math", "builtins")


def _asking(record: Record, kind: str, target: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, unless there is an activation among its arguments that torch would not notice."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if has_activation(args) or has_activation(kwargs):
            return record(kind, target, args, kwargs)
        return function(*args, **kwargs)

    return call


def is_activation(value: Any) -> bool:
    """Whether a value is a proxy; asking for its class would be asking the tracer."""
    return issubclass(type(value), Proxy)


def has_activation(value: Any) -> bool:
    """Whether there is a proxy in nested tuples, lists, dicts and slices."""
    if isinstance(type(value), type) and is_activation(value):
        return True
    if type(value) is slice:
        return any(map(is_activation, (value.start, value.stop, value.step)))
    if isinstance(value, (tuple, list)):
        return any(map(has_activation, value))
    return isinstance(value, dict) and any(map(has_activation, value.values()))


def fold(graph: Graph, root: nn.Module, modules: Mapping[str, nn.Module], storages: frozenset[int]) -> None:
    """Compute once what a graph computes from constants alone, such as a normalised weight.

    What is random, and what lies in memory that the graph writes to, is computed at every call as before.

    Args:
        graph: Changed in place.
        root: The module that the ``get_attr`` nodes read from; it gets the new constants.
        modules: All modules in it, by path.
        storages: The memory of its tensors, which must not be written to.
    """
    from reparam import aliasing, capture, facts

    homes = aliasing.memory(graph, modules)
    changed = [value for node in graph.nodes if (value := aliasing.written(node, modules)) is not None]
    written = set().union(*(homes[value] for value in changed))
    values: dict[Node, Any] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            values[node] = operator.attrgetter(node.target)(root)
        elif _is_constant(node, values) and not homes[node] & written and aliasing.written(node, modules) is None:
            try:
                args, kwargs = torch.fx.map_arg((node.args, node.kwargs), values.__getitem__)
                with torch.no_grad(), capture.NoSideEffects(storages):
                    values[node] = _called(node, args, kwargs)
            except Exception:  # then it fails, or draws, at every call, as it did
                continue
    names = (name for number in itertools.count() if not hasattr(root, name := f"_constant{number}"))
    for node, value in reversed(values.items()):
        if node.op != "get_attr" and isinstance(value, Tensor) and any(user not in values for user in node.users):
            name = next(names)
            root.__dict__[name] = value
            with graph.inserting_before(node):
                made = graph.get_attr(name)
            made.meta = {"scope": node.meta.get("scope", ""), "rank": value.dim(), "shape": tuple(value.shape)}
            facts.note(made)
            node.replace_all_uses_with(made, lambda user: user not in values)
        if node.op != "get_attr" and not node.users:
            graph.erase_node(node)


def _is_constant(node: Node, values: Mapping[Node, Any]) -> bool:
    """Whether a call reads constants, and nothing else."""
    sources = node.all_input_nodes
    return node.op in ("call_function", "call_method") and bool(sources) and all(map(values.__contains__, sources))


def _called(node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    assert callable(node.target)
    return node.target(*args, **kwargs)


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute for a while; what was inherited is inherited again."""
    own = name in vars(owner)
    before = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)

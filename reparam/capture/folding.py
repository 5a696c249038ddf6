"""What a graph that others captured computes from constants alone, computed once."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node

from reparam.capture.state import NoSideEffects, UnrecordableError
from reparam.graph import aliasing, facts
from reparam.modes import below


def fold(graph: Graph, root: nn.Module, modules: Mapping[str, nn.Module], storages: frozenset[int]) -> None:
    """Compute once what a graph computes from constants alone, such as a normalised weight.

    What is random, and what lies in memory that the graph writes to, is computed at every call as before.

    Args:
        graph: Changed in place.
        root: The module that the ``get_attr`` nodes read from; it gets the new constants.
        modules: All modules in it, by path.
        storages: The memory of its tensors, which must not be written to.
    """
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
                with torch.no_grad(), below(NoSideEffects(storages)):
                    values[node] = _called(node, args, kwargs)
            except (Exception, UnrecordableError):  # then it fails, or draws, at every call, as it did
                continue
    names = (name for number in itertools.count() if not hasattr(root, name := f"_constant{number}"))
    for node, value in reversed(values.items()):
        if node.op != "get_attr" and isinstance(value, Tensor) and any(user not in values for user in node.users):
            name = next(names)
            root.__dict__[name] = value
            with graph.inserting_before(node):
                made = graph.get_attr(name)
            facts.know(made, scope=facts.of(node).scope)
            facts.note_value(made, value)
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

"""Operator to torch.nn layer: in the model's precision, under the right name.

This is where float64 ends: each number is rounded once, when its layer is made.
"""

from __future__ import annotations

import operator as python_operators
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node

from reparam.algebra import ZEROS, AnyConv, ChannelAffine, Operator, Pad
from reparam.deploy.layers import layer
from reparam.deploy.naming import Names, permitted
from reparam.graph import facts
from reparam.graph.graph import Graph, calls, origins


def emit(graph: Graph, dtypes: dict[str, torch.dtype], default: torch.dtype) -> dict[str, Any]:
    """Replace the operators in a graph by layers, and name them.

    A layer takes the longest module path shared by what went into it (:meth:`reparam.deploy.naming.Names.take`). Two
    calls of the same layers, fused in the same way, share one.

    Args:
        graph: Changed in place; afterwards it calls only modules, functions and methods.
        dtypes: Precision of the parameters of every module path.
        default: Precision where no parameters went in.

    Returns:
        Module or tensor for every name that the graph uses.
    """
    for node in graph.fx.nodes:
        _take_as_operator(graph, node)
    graph.fx.eliminate_dead_code(lambda node: node.op != "get_attr")
    used = {str(node.target): _lookup(graph, str(node.target)) for node in graph.fx.nodes if _has_name(node)}
    _rename_reserved(graph, used)
    names = Names(graph, used)
    shared: dict[Any, str] = {}
    for node in list(graph.fx.nodes):
        operator = node.target
        if isinstance(operator, Pad):
            _replace(graph, node, _pad_before(graph, node, operator))
            continue
        if not isinstance(operator, Operator):
            continue
        number = _single_number(operator)
        if number is not None:
            with graph.fx.inserting_before(node):
                _replace(graph, node, graph.fx.call_function(number[0], (graph.source(node), number[1])))
            continue
        origins = facts.of(node).origins or frozenset()
        key = facts.of(node).calls if origins else node
        path = shared.get(key)
        if path is None or not _computes(used[path], operator):
            # A norm may be more precise than the convolution before it, which reads what the model's input is.
            largest = max(sorted(origins & dtypes.keys()), key=lambda origin: names.sizes.get(origin, 0), default=None)
            dtype = facts.of(node).precision or (default if largest is None else dtypes[largest])
            path = shared[key] = names.take(node)
            used[path] = layer(operator, dtype)
        source = graph.source(node)
        padding = operator.padding_before
        if padding is not None:
            source = _pad_before(graph, node, padding)
        with graph.fx.inserting_before(node):
            _replace(graph, node, graph.fx.call_module(path, (source,)))
    return used


def _take_as_operator(graph: Graph, node: Node) -> None:
    """A convolution that nothing fused with becomes a layer, too, where its model has none for it.

    That is where a function was called with a kernel, which may have been computed from parameters by a program that
    runs no longer.
    """

    operator = graph.op(node) if not isinstance(node.target, Operator) else None
    if node.op != "call_function" or not isinstance(operator, AnyConv):
        return
    source = graph.source(node)
    facts.know(node, origins=origins(node), calls=calls(node), precision=operator.weight.dtype)
    node.op, node.target, node.args, node.kwargs = "call_function", operator, (source,), {}


def _single_number(operator: Operator) -> tuple[Any, float] | None:
    """The function and the number by which a uniform operator is plain arithmetic: ``2 * x``, ``x - 1``."""
    if not isinstance(operator, ChannelAffine) or operator.axis is not None:
        return None
    scale, shift = operator.scale.item(), 0.0 if operator.shift is None else operator.shift.item()
    if shift == 0.0:
        return python_operators.mul, scale
    return (python_operators.add, shift) if scale == 1.0 else None


def _has_name(node: Node) -> bool:
    return node.op in ("call_module", "get_attr")


def _rename_reserved(graph: Graph, used: dict[str, Any]) -> None:
    """Move what lies under a name that a graph module needs itself, or that is a keyword in the code that it runs."""
    for node in graph.fx.nodes:
        if _has_name(node) and (path := permitted(str(node.target))) != node.target:
            used[path] = _lookup(graph, str(node.target))
            used.pop(str(node.target), None)
            node.target = path


def _lookup(graph: Graph, path: str) -> Any:
    owner, _, name = path.rpartition(".")
    return graph.modules[path] if path in graph.modules else getattr(graph.modules[owner], name)


def _computes(made: Any, operator: Operator) -> bool:
    """Whether a layer that was made is the one for ``operator``."""
    fresh = layer(operator, next((p.dtype for p in made.parameters()), torch.float32))
    return repr(fresh) == repr(made) and all(
        torch.equal(a, b) for a, b in zip(fresh.parameters(), made.parameters(), strict=True)
    )


def _pad_before(graph: Graph, node: Node, pad: Pad) -> Node:
    """A call of ``F.pad`` on the source of ``node``."""
    amounts = [amount for pair in reversed(pad.padding) for amount in pair]
    with graph.fx.inserting_before(node):
        if pad.mode != ZEROS:
            return graph.fx.call_function(F.pad, (graph.source(node), amounts, pad.mode))
        return graph.fx.call_function(F.pad, (graph.source(node), amounts), {"value": pad.value} if pad.value else {})


def _replace(graph: Graph, node: Node, replacement: Node) -> None:
    replacement.meta = dict(node.meta)
    node.replace_all_uses_with(replacement)
    graph.fx.erase_node(node)

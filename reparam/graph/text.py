"""A graph as text: compact, stable, the same on every machine. For people, and for tests of before and after.

%0 = input x
%1 = conv2d[3 -> 8, 3x3, pad 1](%0)
%2 = affine[8, axis -3](%1)
return %2
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.fx
from torch.fx import Node

from reparam.algebra import Operator
from reparam.graph import facts
from reparam.graph.lift import Sum

if TYPE_CHECKING:
    from reparam.graph.graph import Graph


def text(graph: Graph) -> str:
    """One line a node, values numbered in order; constants are not shown."""
    names: dict[Node, str] = {}
    lines = []
    for node in graph.fx.nodes:
        if node.op == "get_attr":
            names[node] = str(node.target)
            continue
        if node.op == "output":
            lines.append(f"return {_argument(node.args[0], names)}")
            continue
        names[node] = f"%{sum(name.startswith('%') for name in names.values())}"
        lines.append(f"{names[node]} = {_call(graph, node, names)}")
    return "\n".join(lines)


def _call(graph: Graph, node: Node, names: dict[Node, str]) -> str:
    if node.op == "placeholder":
        return f"input {node.target}"
    operator = graph.op(node)
    match operator:
        case Sum():
            terms = [f"{_coefficient(c)}{names[term]}" for c, term in operator.terms]
            return f"sum({', '.join(terms)})"
        case Operator():
            return f"{operator}({names[graph.source(node)]})"
    if node.op == "call_module":
        name = type(graph.modules[str(node.target)]).__name__.lower()
    else:
        name = facts.target_name(node)
    arguments = [_argument(argument, names) for argument in node.args]
    arguments += [f"{key}={_argument(value, names)}" for key, value in node.kwargs.items()]
    return f"{name}({', '.join(arguments)})"


def _coefficient(value: float) -> str:
    return {1.0: "", -1.0: "-"}.get(value, f"{value:g}*")


def _argument(argument: Any, names: dict[Node, str]) -> str:
    mapped = torch.fx.map_arg(argument, lambda node: _Name(names[node]))
    return repr(mapped)


class _Name(str):
    """A string that prints without quotes."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)

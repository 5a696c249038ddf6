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

from reparam.algebra import (
    ZEROS,
    AnyConv,
    AveragePool,
    ChannelAffine,
    Conv,
    ConvTranspose,
    Operator,
    Pad,
    Padding,
)
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
        case Conv() | ConvTranspose() | ChannelAffine() | AveragePool() | Pad():
            return f"{operator_text(operator)}({names[graph.source(node)]})"
    if node.op == "call_module":
        name = type(graph.modules[str(node.target)]).__name__.lower()
    else:
        name = facts.target_name(node)
    arguments = [_argument(argument, names) for argument in node.args]
    arguments += [f"{key}={_argument(value, names)}" for key, value in node.kwargs.items()]
    return f"{name}({', '.join(arguments)})"


def operator_text(operator: Operator) -> str:
    """An operator with everything about it but its numbers, such as ``conv2d[3 -> 8, 3x3, pad 1]``."""
    match operator:
        case Conv() if operator.dimensions == 0:
            return f"linear[{operator.in_channels} -> {operator.out_channels}{', bias' * (operator.bias is not None)}]"
        case Conv():
            return f"conv{operator.dimensions}d[{_weighted_text(operator, 'pad', operator.padding_mode)}]"
        case ConvTranspose():
            return f"convtranspose{operator.dimensions}d[{_weighted_text(operator, 'crop')}]"
        case ChannelAffine() if operator.axis is None:
            shift = "" if operator.shift is None else f" + {operator.shift.item():g}"
            return "identity" if operator.is_identity else f"affine[{operator.scale.item():g}{shift}]"
        case ChannelAffine():
            return f"affine[{len(operator.scale)}, axis {operator.axis}{', scale only' * (operator.shift is None)}]"
        case AveragePool():
            return f"avgpool{operator.dimensions}d[{'x'.join(map(str, operator.kernel_size))}]"
        case Pad():
            value = f", {operator.value:g}" if operator.value else ""
            return f"pad[{_pads(operator.padding)}{'' if operator.mode == ZEROS else ', ' + operator.mode}{value}]"


def _weighted_text(operator: AnyConv, padding: str, mode: str = ZEROS) -> str:
    facts = [f"{operator.in_channels} -> {operator.out_channels}", "x".join(map(str, operator.kernel_size))]
    facts += [f"stride {_axes(operator.stride)}"] * any(s != 1 for s in operator.stride)
    facts += [f"{padding} {_pads(operator.padding)}"] * any(p for pair in operator.padding for p in pair)
    facts += [mode] * (mode != ZEROS)
    facts += [f"dilation {_axes(operator.dilation)}"] * any(d != 1 for d in operator.dilation)
    facts += [f"groups {operator.groups}"] * (operator.groups != 1)
    facts += ["bias"] * (operator.bias is not None)
    return ", ".join(facts)


def _axes(values: tuple[int, ...]) -> str:
    return str(values[0]) if len(set(values)) == 1 else "x".join(map(str, values))


def _pads(padding: Padding) -> str:
    pairs = [str(before) if before == after else f"{before}:{after}" for before, after in padding]
    return pairs[0] if len(set(pairs)) == 1 else "x".join(pairs)


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

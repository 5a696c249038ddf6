"""An ONNX graph as the graph that the engine rewrites: every node a call, every call with its node.

Nodes that are understood become calls of torch's functions (:mod:`reparam.onnx.operators`), sizes that a reshape takes
from another value become ``x.shape[i]``, as in a traced model, and everything else is a call of an :class:`Opaque`.
What is constant is read only where it is a parameter of something understood.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir
import torch
import torch.fx
from torch import Tensor, nn
from torch.fx import Node

from reparam.algebra import Operator
from reparam.graph import facts, lift, views
from reparam.graph.graph import Graph
from reparam.onnx import operators
from reparam.onnx.constants import Constants, has_subgraph, is_standard
from reparam.onnx.shapes import Known
from reparam.report import Remark

# Elementwise, so that the channels of their input are those of their output.
_KEEP_SHAPE = frozenset(
    """Abs Acos Asin Atan Celu Ceil Clip Cos Elu Erf Exp Floor Gelu HardSigmoid HardSwish LeakyRelu Log LogSoftmax Mish
    PRelu Reciprocal Relu Round Selu Sigmoid Sign Sin Softmax Softplus Softsign Sqrt Swish Tan Tanh
    ThresholdedRelu InstanceNormalization LayerNormalization GroupNormalization LpNormalization LRN""".split()
)
UNDERSTOOD_FROM = 7  # the operator set where broadcasting and inference became what they are


class Opaque:
    """A node that is left as it is; it is never run here."""

    def __init__(self, op_type: str) -> None:
        self.__name__ = op_type

    def __call__(self, *values: Any) -> Any:
        """Fails: what it computes is not known."""
        raise NotImplementedError(f"{self.__name__} is not run here")


@dataclass
class Read:
    """What was read.

    Attributes:
        graph: The graph for the engine.
        values: The ONNX value of every fx node that has one.
        nodes: The ONNX node of every fx node that has one.
        links: For every fx node with an ONNX node, and the output: positions among its arguments (counted as
            :func:`leaves` does), with the number of the input that stands there, or the captured value.
        labels: ONNX nodes by the names that remarks call them.
        dtypes: Type of every fx node's value, as far as it is known.
        casts: Constants that are cast to the type of an activation, and that activation.
        remarks: What could not be read, and why.
    """

    graph: Graph
    values: dict[Node, ir.Value] = field(default_factory=dict)
    nodes: dict[Node, ir.Node] = field(default_factory=dict)
    links: dict[Node, list[tuple[int, int | ir.Value]]] = field(default_factory=dict)
    labels: dict[str, ir.Node] = field(default_factory=dict)
    dtypes: dict[Node, torch.dtype] = field(default_factory=dict)
    casts: dict[ir.Node, Node] = field(default_factory=dict)
    remarks: list[Remark] = field(default_factory=list)


def leaves(node: Node) -> list[Node]:
    """The nodes among the arguments of a node, one for every place that they stand in."""
    found: list[Node] = []
    torch.fx.map_arg((node.args, node.kwargs), found.append)
    return found


def graphs_of(attribute: ir.Attr) -> list[ir.Graph]:
    """The graphs that an attribute holds."""
    match attribute.type:
        case ir.AttributeType.GRAPH:
            return [attribute.as_graph()]
        case ir.AttributeType.GRAPHS:
            return list(attribute.as_graphs())
    return []


def captured(node: ir.Node) -> Iterator[ir.Value]:
    """The values of outer graphs that the graphs inside of a node read."""
    seen: dict[ir.Value, None] = {}
    for attribute in node.attributes.values():
        for graph in graphs_of(attribute):
            own = {*graph.inputs, *graph.initializers.values()}
            for inner in graph:
                read = [*inner.inputs, *captured(inner)]
                seen.update(dict.fromkeys(v for v in read if v is not None and v not in own))
                own.update(inner.outputs)
            seen.update(dict.fromkeys(v for v in graph.outputs if v not in own))
    yield from seen


class _Holder(nn.Module):
    """Where constants of one owner lie."""


class Reader:
    """Reads one graph.

    Args:
        model: Not changed.
        known: What inference tells of its values, by name.
    """

    def __init__(self, model: ir.Model, known: Mapping[str, Known]) -> None:
        self.model = model
        self.constants = Constants(model, {name: of.dtype for name, of in known.items()})
        self._known = known
        self._fx = torch.fx.Graph()
        self._modules: dict[str, nn.Module] = {"": _Holder()}
        self._nodes: dict[ir.Value, Node] = {}
        self._made = 0
        self.result = Read(Graph(self._fx, self._modules))

    def read(self) -> Read:
        """The whole graph."""
        graph = self.model.graph
        opset = graph.opset_imports.get("", 1)
        for value in graph.inputs:
            if not self.constants.is_constant(value):
                self._note(value, self._fx.placeholder(str(value.name)))
        for node in graph:
            if all(map(self.constants.is_constant, node.outputs)) and node.outputs:
                if self.constants.is_cast_like(node) and node.inputs[1] in self._nodes:
                    self.result.casts[node] = self._nodes[node.inputs[1]]
                continue
            self._node(node, opset)
        kept = [(index, value) for index, value in enumerate(graph.outputs) if not self.constants.is_constant(value)]
        output = self._fx.output(tuple(self._nodes[value] for _, value in kept))
        self.result.links[output] = [(position, index) for position, (index, _) in enumerate(kept)]
        views.settle(self._fx.nodes, self._modules)
        return self.result

    # What the entries of the table ask.

    def known(self, value: ir.Value | None) -> Known:
        """What inference tells of a value."""
        return Known() if value is None else self._known.get(str(value.name), Known())

    def value(self, value: ir.Value) -> Node:
        """The node of a value."""
        if value not in self._nodes:
            self._nodes[value] = self._constant(value)
        return self._nodes[value]

    def made_constant(self, tensor: Tensor, like: Node | None = None) -> Node:
        """A constant that is not in the file; it lies where ``like`` does."""
        owner = "" if like is None else str(like.target).rpartition(".")[0]
        self._made += 1
        return self._get(owner, f"made_{self._made}", tensor)

    def size(self, x: Node, axis: int) -> Node:
        """``x.shape[axis]``."""
        node = self._fx.call_method("size", (x, axis))
        example = facts.of(x).example
        facts.know(node, kind="other", example=None if example is None else example[axis])
        return node

    def sizes(self, value: ir.Value) -> list[int | Node] | None:
        """A value as a list of sizes: numbers, sizes of activations, or whatever else is computed."""
        tensor = self.constants.tensor(value)
        if tensor is not None:
            numbers: list[int | Node] = [int(number) for number in tensor.flatten().tolist()]
            return numbers
        node = value.producer()
        if node is not None and is_standard(node):
            found = self._sizes_of(node)
            if found is not None:
                return found
        shape = self.known(value).shape
        if shape is None or len(shape) > 1 or None in shape or value not in self._nodes:
            return None
        return [self._item(self._nodes[value], index) for index in range(shape[0] or 0)] if shape else None

    def _sizes_of(self, node: ir.Node) -> list[int | Node] | None:
        source = node.inputs[0] if node.inputs else None
        if source is None:
            return None
        match node.op_type:
            case "Shape":
                rank, made = self.known(source).rank, self._nodes[node.outputs[0]]
                if rank is None or made.target is not getattr:
                    return None
                start, end = (node.attributes.get(name) for name in ("start", "end"))
                axes = range(rank)[start.as_int() if start else 0 : end.as_int() if end else rank]
                return [self._item(made, axis) for axis in axes]
            case "Identity" | "Unsqueeze" | "Squeeze":
                return self.sizes(source)
            case "Gather":
                picked, axis = self.constants.tensor(node.inputs[1]), node.attributes.get("axis")
                items = None if picked is None or (axis and axis.as_int()) else self.sizes(source)
                return None if items is None or picked is None else [items[int(i)] for i in picked.flatten()]
            case "Concat":
                parts = [None if value is None else self.sizes(value) for value in node.inputs]
                return None if None in parts else [item for part in parts if part is not None for item in part]
            case "Cast" if self.known(node.outputs[0]).dtype is torch.int64:
                return self.sizes(source)
        return None

    def _item(self, sizes: Node, index: int) -> Node:
        node = self._fx.call_function(operator.getitem, (sizes, index))
        example = facts.of(sizes).example
        facts.know(node, kind="other")
        if isinstance(example, tuple) and not isinstance(example, torch.Size):
            facts.know(node, example=example[index])
        return node

    # Building.

    def _constant(self, value: ir.Value) -> Node:
        tensor = self.constants.tensor(value)
        owner, _, name = str(value.name).rpartition(".")
        if tensor is None:  # of a type that torch does not have: nothing that is understood reads it
            tensor = torch.empty(0)
        node = self._get(owner, name, tensor)
        self.result.values[node] = value
        return node

    def _get(self, owner: str, name: str, tensor: Tensor) -> Node:
        holder = self._modules.setdefault(owner, _Holder())
        holder.__dict__[name] = tensor
        node = self._fx.create_node("get_attr", f"{owner}.{name}" if owner else name)
        facts.know(node, rank=tensor.dim(), shape=tuple(tensor.shape), kind="tensor")
        facts.know(node, floating=tensor.is_floating_point())
        return node

    def _note(self, value: ir.Value, node: Node) -> None:
        """Write what is known of a value into the node that makes it."""
        known = self.known(value)
        facts.know(node, kind="tensor", floating=known.dtype is None or known.dtype.is_floating_point)
        if known.dtype is not None:
            self.result.dtypes[node] = known.dtype
            facts.know(node, dtype=known.dtype)
        if known.shape is not None:
            facts.know(node, rank=len(known.shape), shape=known.shape)
            # Of values without a layer that shows them, the channels lie where images and features have them.
            if len(known.shape) in (2, 4, 5) and known.shape[1] is not None and not facts.of(node).made:
                facts.know(node, channels=(known.shape[1], 1 - len(known.shape)))
        if known.example is not None and facts.of(node).floating:
            facts.know(node, example=torch.Size(known.example))
        self._nodes[value] = node
        self.result.values[node] = value

    def _node(self, node: ir.Node, opset: int) -> None:
        found = self._said(node, opset) if opset >= UNDERSTOOD_FROM and is_standard(node) else None
        label = self._label(node)
        if is_standard(node, "Shape") and opset >= UNDERSTOOD_FROM:
            return self._shape(node, label)
        outside = list(captured(node)) if has_subgraph(node) else []
        if found is None:
            sources = [v for v in (*node.inputs, *outside) if v is not None and not self.constants.is_constant(v)]
            made = self._fx.call_function(Opaque(node.op_type), tuple(self._nodes[v] for v in sources))
            if is_standard(node, "BatchNormalization"):
                self.result.remarks.append(Remark("missed", "Lift", label, self._why_no_affine(node, opset)))
        else:
            name = getattr(found.function, "__name__", node.op_type.lower())
            made = self._fx.create_node("call_function", found.function, found.args, name=name)
        facts.know(made, scope=label)
        self._link(made, node, outside)
        if len(node.outputs) > 1 and found is None:
            facts.know(made, kind="unknown")
            for index, output in enumerate(node.outputs):
                item = self._fx.call_function(operator.getitem, (made, index))
                facts.know(item, scope=label)
                self._note(output, item)
            return None
        if node.outputs:
            self._note_result(node, made, found)
        return None

    def _why_no_affine(self, node: ir.Node, opset: int) -> str:
        """Why a norm is not read as a scale and a shift."""
        if opset < UNDERSTOOD_FROM:
            return f"operator set {opset} is too old"
        if ((mode := node.attributes.get("training_mode")) and mode.as_int()) or any(
            output.uses() for output in node.outputs[1:]
        ):
            return "it is in training mode; export the model in eval mode"
        return "its scale, shift, mean or variance are no constants"

    def _said(self, node: ir.Node, opset: int) -> operators.Said | None:
        """What a node computes; arithmetic on integers is of no interest."""
        if not node.outputs or self.known(node.outputs[0]).dtype not in _FLOATING:
            return None
        return operators.said(operators.Call(node, self, opset))

    def _note_result(self, node: ir.Node, made: Node, found: operators.Said | None) -> None:
        if found is not None and operators.is_operator(found.function):
            owner = str(node.inputs[1].name if node.inputs[1] is not None else "").rpartition(".")[0]
            facts.know(made, origins=frozenset([owner] if owner else []))
        if found is not None:
            facts.know(made, made=True)
        self._note(node.outputs[0], made)
        facts.know(made, made=False)
        if found is None:
            if is_standard(node, *_KEEP_SHAPE):
                facts.know(made, keeps_shape=True, channels=None)  # they are those of its input
            return
        operator = lift.lift(made, self._modules)
        if isinstance(operator, Operator) and operator.makes is not None:
            facts.know(made, channels=operator.makes, layer=True)

    def _shape(self, node: ir.Node, label: str) -> None:
        """``x.shape``: it reads no numbers, so it stands in nobody's way."""
        source = node.inputs[0]
        assert source is not None
        made = self._fx.call_function(getattr, (self._nodes[source], "shape"))
        facts.know(made, kind="other", scope=label)
        example = self.known(source).example
        if example is not None:
            facts.know(made, example=example)
        self._link(made, node, [])
        self._nodes[node.outputs[0]] = made
        self.result.values[made] = node.outputs[0]

    def _link(self, made: Node, node: ir.Node, outside: list[ir.Value]) -> None:
        """Remember which argument is which input."""
        self.result.nodes[made] = node
        places = dict(enumerate(leaves(made)))
        links: list[tuple[int, int | ir.Value]] = []
        wanted: list[tuple[int | ir.Value, ir.Value | None]] = [*enumerate(node.inputs), *((v, v) for v in outside)]
        for which, value in wanted:
            own = None if value is None else self._nodes.get(value)
            place = next((p for p, leaf in places.items() if leaf is own), None)
            if place is not None and own is not None and own.op != "get_attr":
                links.append((place, which))
                del places[place]
        self.result.links[made] = links

    def _label(self, node: ir.Node) -> str:
        """A name for a node: its own, or that of what it makes."""
        made = next((str(output.name) for output in node.outputs if output.name), node.op_type)
        label = node.name or made
        if label in self.result.labels:
            label = made if made not in self.result.labels else f"{label}#{len(self.result.labels)}"
        self.result.labels[label] = node
        return label


_FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

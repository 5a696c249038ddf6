"""A rewritten graph back into the ONNX graph that it was read from: what changed, and nothing else.

A node that is still there keeps its name, attributes and place, and reads what takes the places of its inputs. An
operator that is new becomes Conv, ConvTranspose, Gemm, MatMul, Mul, Add, Pad or AveragePool, right behind what it
reads, under the name of the value that it stands for, with weights rounded once, to the type of its input.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor
from torch.fx import Node

from reparam.algebra import ZEROS, AveragePool, ChannelAffine, Conv, ConvTranspose, Operator, Pad
from reparam.errors import RewriteError
from reparam.graph import facts
from reparam.graph.graph import origins
from reparam.onnx.constants import DTYPES
from reparam.onnx.read import Read, graphs_of, leaves

_TYPES = {dtype: kind for kind, dtype in DTYPES.items()}
_END = 2**63 - 1  # of any axis
_MODES = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}


def write(model: ir.Model, read: Read) -> None:
    """Change a model to what became of its graph.

    Args:
        model: Changed in place.
        read: What was read from it, rewritten since.
    """
    _Writer(model, read).write()


class _Writer:
    def __init__(self, model: ir.Model, read: Read) -> None:
        self.graph = model.graph
        self.opset = model.graph.opset_imports.get("", 1)
        self.read = read
        self.fresh: dict[ir.Value, ir.Node] = {}  # new values, and the node that each one takes the place of
        self.places: dict[ir.Node, int] = {node: place for place, node in enumerate(self.graph)}
        self.first = next(iter(self.graph), None)
        self.last: dict[int, ir.Node | None] = {place: node for node, place in self.places.items()} | {-1: None}
        self.names = _names(self.graph)

    def write(self) -> None:
        used = _used(self.graph)
        for node in self.read.graph.fx.nodes:
            if node.op == "output":
                self._outputs(node)
            elif node in self.read.nodes:
                self._relink(node, self.read.nodes[node])
            elif node.op == "call_function" and node not in self.read.values and facts.of(node).kind != "other":
                self._new(node)
        for cast, like in self.read.casts.items():
            if like._erased and like in self.read.dtypes:
                _cast(cast, _TYPES[self.read.dtypes[like]])
        _remove_unused(self.graph, used)
        self._name()

    # What stays.

    def _relink(self, node: Node, original: ir.Node) -> None:
        """Let a node read what its arguments are now."""
        places = leaves(node)
        for place, which in self.read.links[node]:
            value = self.read.values[places[place]]
            if isinstance(which, int):
                if original.inputs[which] is not value:
                    original.replace_input_with(which, value)
            elif which is not value:
                _replace_inside(original, which, value)

    def _outputs(self, node: Node) -> None:
        """The outputs keep their names and declared types, whatever makes them now."""
        places = leaves(node)
        for place, index in self.read.links[node]:
            assert isinstance(index, int)
            value, old = self.read.values[places[place]], self.graph.outputs[index]
            if value is old:
                continue
            if value.producer() is None or value.is_graph_output() or value.producer() not in self.places:
                value = self._add("Identity", [value], self.read.labels.get("", old.producer()))
            self.graph.outputs[index] = value
            name, old.name = old.name, self._unique(f"{old.name}_before")
            value.name, value.type, value.shape, value.doc_string = name, old.type, old.shape, old.doc_string
            value.metadata_props.update(old.metadata_props)
            self.fresh.pop(value, None)

    def _name(self) -> None:
        """New values take the names of those that they stand for, as far as these are gone."""
        for value, replaced in reversed(self.fresh.items()):
            old = next(iter(replaced.outputs), None)
            if old is None or replaced.graph is not None or old.name is None or old.name == value.name:
                continue
            name, old.name = old.name, None
            value.name, value.type = name, old.type
            value.shape = value.shape or old.shape

    # What is new.

    def _new(self, node: Node) -> None:
        """Emit an operator, or a part of a sum."""
        target: Any = node.target
        sources = [self.read.values[leaf] for leaf in leaves(node)]
        dtype = next((self.read.dtypes[leaf] for leaf in leaves(node) if leaf in self.read.dtypes), torch.float32)
        self.read.dtypes[node] = dtype
        replaced = self.read.labels[facts.of(node).scope]
        emit = _Emission(self, node, replaced, dtype)
        if isinstance(target, Operator):
            value = emit.operator(target, sources[0], facts.of(node.all_input_nodes[0]).rank)
        elif target in (operator.add, operator.sub):
            value = emit.node("Add" if target is operator.add else "Sub", sources)
        elif target is operator.mul:
            value = emit.node("Mul", [sources[0], emit.constant("scale", torch.tensor(node.args[1]))])
        elif target is torch.add:
            scaled = emit.node("Mul", [sources[1], emit.constant("scale", torch.tensor(node.kwargs["alpha"]))])
            value = emit.node("Add", [sources[0], scaled])
        else:
            raise RewriteError(f"nothing in ONNX was found for {target}")
        self.read.values[node] = value

    def _add(
        self, op_type: str, inputs: list[ir.Value | None], replaced: ir.Node | None, path: str = "", **attributes: Any
    ) -> ir.Value:
        """A new node behind all that it reads."""
        label = f"{path or (replaced.name if replaced is not None else '') or op_type}"
        name = self._unique(f"{label}/{op_type}" if path else label)
        made = ir.node(op_type, inputs, attributes, name=name)
        producers = [value.producer() for value in inputs if value is not None]
        place = max((self.places[node] for node in producers if node is not None and node in self.places), default=-1)
        anchor = self.last[place]  # behind everything that was put there already
        if anchor is not None:
            self.graph.insert_after(anchor, made)
        elif self.first is not None:
            self.graph.insert_before(self.first, made)
        else:
            self.graph.append(made)
        self.places[made], self.last[place] = place, made
        value = made.outputs[0]
        value.name = self._unique(f"{name}_output")
        if replaced is not None:
            self.fresh[value] = replaced
        return value

    def constant(self, name: str, tensor: Tensor) -> ir.Value:
        """A new initializer."""
        value = ir.Value(name=self._unique(name), const_value=_to_ir(tensor))
        assert value.const_value is not None
        value.const_value.name = value.name
        value.type = ir.TensorType(value.const_value.dtype)
        value.shape = ir.Shape(tuple(tensor.shape))
        self.graph.register_initializer(value)
        return value

    def _unique(self, name: str) -> str:
        number, found = 0, name
        while found in self.names:
            number += 1
            found = f"{name}_{number}"
        self.names.add(found)
        return found


class _Emission:
    """The nodes of one operator."""

    def __init__(self, writer: _Writer, node: Node, replaced: ir.Node, dtype: torch.dtype) -> None:
        self.writer = writer
        self.replaced = replaced
        self.dtype = dtype
        self.path = _common(sorted(origins(node)))

    def node(self, op_type: str, inputs: list[ir.Value | None] | list[ir.Value], **attributes: Any) -> ir.Value:
        """One node."""
        return self.writer._add(op_type, list(inputs), self.replaced, self.path, **attributes)

    def constant(self, name: str, tensor: Tensor) -> ir.Value:
        """A parameter in the model's precision."""
        path = self.path or self.replaced.name or str(self.replaced.outputs[0].name)
        return self.writer.constant(f"{path}.{name}", tensor.detach().to(self.dtype))

    def parameters(self, weight: Tensor, bias: Tensor | None) -> list[ir.Value]:
        """A weight, and a bias where there is one."""
        made = [self.constant("weight", weight)]
        return made if bias is None else [*made, self.constant("bias", bias)]

    def operator(self, op: Operator, x: ir.Value, rank: int | None) -> ir.Value:
        """An operator applied to ``x``."""
        match op:
            case Conv() if op.dimensions == 0:
                return self._linear(op.regroup(1), x, rank)
            case Conv():
                return self._conv(op, x)
            case ConvTranspose():
                more = {"output_padding": op.output_padding} if any(op.output_padding) else {}
                weights = self.parameters(op.torch_weight, op.bias)
                pads = tuple((before, before) for before, _ in op.padding)
                return self.node("ConvTranspose", [x, *weights], **_geometry(op, pads), **more)
            case ChannelAffine():
                return self._affine(op, x)
            case Pad():
                return self._pad(op, x, rank)
            case AveragePool():
                return self._pool(op, x)

    def _linear(self, op: Conv, x: ir.Value, rank: int | None) -> ir.Value:
        if rank == 2 and (op.bias is not None or self.writer.opset >= 11):
            return self.node("Gemm", [x, *self.parameters(op.kernel, op.bias)], transB=1)
        product = self.node("MatMul", [x, self.constant("weight", op.kernel.t())])
        return product if op.bias is None else self.node("Add", [product, self.constant("bias", op.bias)])

    def _conv(self, op: Conv, x: ir.Value) -> ir.Value:
        pads = op.padding
        if op.padding_mode != ZEROS or any(min(pair) < 0 for pair in pads):
            x = self._pad(Pad(pads, op.padding_mode), x, op.dimensions + 2)
            pads = ((0, 0),) * op.dimensions
        return self.node("Conv", [x, *self.parameters(op.kernel, op.bias)], **_geometry(op, pads))

    def _affine(self, op: ChannelAffine, x: ir.Value) -> ir.Value:
        shape = [] if op.axis is None else [-1] + [1] * (-op.axis - 1)
        if op.shift is None or not bool((op.scale == 1.0).all()):
            x = self.node("Mul", [x, self.constant("scale", op.scale.view(shape))])
        return x if op.shift is None else self.node("Add", [x, self.constant("shift", op.shift.view(shape))])

    def _pad(self, op: Pad, x: ir.Value, rank: int | None) -> ir.Value:
        """Padding, and slices where it crops: negative amounts are legal, and not known everywhere."""
        crops = {axis - len(op.padding): pair for axis, pair in enumerate(op.padding) if min(pair) < 0}
        if crops:
            starts = [max(0, -before) for before, _ in crops.values()]
            ends = [min(0, after) or _END for _, after in crops.values()]
            x = self._slice(x, {"starts": starts, "ends": ends, "axes": list(crops)}, rank)
        if not op.pads:
            return x
        if rank is None:
            raise RewriteError(f"the number of axes of {x.name} is not known, which ONNX's padding needs")
        pairs = ((0, 0),) * (rank - len(op.padding)) + tuple((max(0, a), max(0, b)) for a, b in op.padding)
        pads = _flat(pairs)
        mode = {} if op.mode == ZEROS else {"mode": _MODES[op.mode]}
        if self.writer.opset < 11:
            return self.node("Pad", [x], pads=pads, **({"value": op.value} if op.value else {}), **mode)
        value = [self.constant("value", torch.tensor(op.value))] if op.value else []
        return self.node("Pad", [x, self._integers("pads", pads), *value], **mode)

    def _slice(self, x: ir.Value, about: dict[str, list[int]], rank: int | None) -> ir.Value:
        if self.writer.opset >= 10:
            return self.node("Slice", [x, *(self._integers(name, numbers) for name, numbers in about.items())])
        if rank is None:
            raise RewriteError(f"the number of axes of {x.name} is not known, which an old Slice needs")
        return self.node("Slice", [x], **about | {"axes": [axis + rank for axis in about["axes"]]})

    def _integers(self, name: str, numbers: list[int]) -> ir.Value:
        label = self.replaced.name or self.replaced.op_type
        return self.writer.constant(f"{label}.{name}", torch.tensor(numbers, dtype=torch.int64))

    def _pool(self, op: AveragePool, x: ir.Value) -> ir.Value:
        pads = _flat(tuple((p, p) for p in op.padding))
        more = {"pads": pads, "count_include_pad": 1} if any(pads) else {}
        x = self.node("AveragePool", [x], kernel_shape=op.kernel_size, strides=op.stride, **more)
        if op.divisor is None:
            return x
        factor = torch.tensor(math.prod(op.kernel_size) / op.divisor, dtype=torch.float64)
        return self.node("Mul", [x, self.constant("scale", factor)])


def _geometry(op: Conv | ConvTranspose, pads: tuple[tuple[int, int], ...]) -> dict[str, Any]:
    return {
        "kernel_shape": op.kernel_size,
        "strides": op.stride,
        "pads": _flat(pads),
        "dilations": op.dilation,
        "group": op.groups,
    }


def _flat(pads: tuple[tuple[int, int], ...]) -> list[int]:
    return [before for before, _ in pads] + [after for _, after in pads]


def _to_ir(tensor: Tensor) -> ir.TensorProtocol:
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype is torch.bfloat16:
        array: np.ndarray[Any, Any] = tensor.view(torch.int16).numpy()
        return ir.Tensor(array.view(ir.DataType.BFLOAT16.numpy()), dtype=ir.DataType.BFLOAT16)
    return ir.Tensor(tensor.numpy(), dtype=_TYPES[tensor.dtype])


def _common(paths: list[str]) -> str:
    """The longest module path shared by all."""
    shared = []
    for parts in zip(*(path.split(".") for path in paths)):  # noqa: B905 - up to the shortest
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)


def _cast(node: ir.Node, kind: ir.DataType) -> None:
    """A cast to the type of a value that is gone becomes a cast to that type."""
    node.resize_inputs(1)
    node.op_type = "Cast"
    node.attributes.clear()
    node.attributes.add(ir.AttrInt64("to", kind.value))


def _names(graph: ir.Graph) -> set[str]:
    """All names in a graph, and in the graphs inside of its nodes, which see the same."""
    found = {str(value.name) for value in (*graph.inputs, *graph.initializers.values())}
    for node in graph.all_nodes():
        found.add(str(node.name))
        found.update(str(output.name) for output in node.outputs)
    for inner in graph.subgraphs():
        found |= {str(value.name) for value in (*inner.inputs, *inner.initializers.values())}
    return found


def _replace_inside(node: ir.Node, old: ir.Value, new: ir.Value) -> None:
    """Let the graphs inside of a node read another value."""
    for user, index in list(old.uses()):
        if user is not node and _is_within(user, node):
            user.replace_input_with(index, new)
    for graph in _graphs_of(node):
        for position, value in enumerate(graph.outputs):
            if value is old:
                graph.outputs[position] = new


def _is_within(node: ir.Node, outer: ir.Node) -> bool:
    return any(node is inner for graph in _graphs_of(outer) for inner in graph.all_nodes())


def _graphs_of(node: ir.Node) -> list[ir.Graph]:
    found = [graph for attribute in node.attributes.values() for graph in graphs_of(attribute)]
    return [*found, *(inner for graph in found for inner in graph.subgraphs())]


def _used(graph: ir.Graph) -> set[ir.Value]:
    """What somebody reads, or the graph returns."""
    values = [*graph.initializers.values(), *(output for node in graph for output in node.outputs)]
    return {value for value in values if value.uses() or value.is_graph_output()}


def _remove_unused(graph: ir.Graph, used: Iterable[ir.Value]) -> None:
    """Remove what was used before, and is not any more; what nobody used before is none of ours."""
    used = set(used)
    for node in reversed(list(graph)):
        alive = any(output.uses() or output.is_graph_output() for output in node.outputs)
        if not alive and (not used.isdisjoint(node.outputs)):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if value in used and not value.uses() and not value.is_graph_output() and not value.is_graph_input():
            del graph.initializers[name]

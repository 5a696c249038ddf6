"""The values of an ONNX graph that no input has a say in.

Exporters that do not fold constants leave chains of nodes on weights: a bias that was never there is ``Expand`` of
``CastLike`` of a zero, a shared weight an ``Identity``. Such chains are computed when somebody asks, node by node, by
ONNX's own reference implementation; what nobody asks about stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx import reference
from torch import Tensor

DTYPES: dict[ir.DataType, torch.dtype] = {
    ir.DataType.FLOAT: torch.float32, ir.DataType.DOUBLE: torch.float64, ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16, ir.DataType.INT64: torch.int64, ir.DataType.INT32: torch.int32,
    ir.DataType.INT16: torch.int16, ir.DataType.INT8: torch.int8, ir.DataType.UINT8: torch.uint8,
    ir.DataType.BOOL: torch.bool,
}  # fmt: skip

# Random numbers are drawn at every run; a weight that is stored quantised is meant to stay so.
_NOT_FOLDED = frozenset(
    """RandomNormal RandomNormalLike RandomUniform RandomUniformLike Multinomial Bernoulli Dropout QuantizeLinear
    DequantizeLinear DynamicQuantizeLinear""".split()
)


def is_standard(node: ir.Node, *op_types: str) -> bool:
    """Whether a node is one of ONNX's own operators, of one of the types where any are given."""
    return node.domain in ("", "ai.onnx") and (not op_types or node.op_type in op_types)


def has_subgraph(node: ir.Node) -> bool:
    """Whether a node brings graphs of its own, as If and Loop do."""
    kinds = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
    return any(attribute.type in kinds for attribute in node.attributes.values())


def to_torch(tensor: ir.TensorProtocol) -> Tensor | None:
    """A tensor of ONNX as one of torch, with memory of its own; None for types that torch has not."""
    dtype = DTYPES.get(tensor.dtype)
    if dtype is None:
        return None
    array = np.array(tensor.numpy())
    if dtype is torch.bfloat16:  # which numpy does not know itself
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


class Constants:
    """What is constant in a graph, and its values.

    Args:
        model: The model; it is not changed. An initializer that is also an input, which a caller may override, is no
            constant.
        dtypes: Types of values, by name, as far as they are known.
    """

    def __init__(self, model: ir.Model, dtypes: Mapping[str, torch.dtype | None]) -> None:
        self._dtypes = dtypes
        self._opset = model.graph.opset_imports.get("", 1)
        self._known: dict[ir.Value, bool] = {}
        self._tensors: dict[ir.Value, Tensor | None] = {}

    def is_constant(self, value: ir.Value | None) -> bool:
        """Whether a value is the same at every run."""
        if value is None:
            return True
        pending = [value]
        while pending:  # long chains are deeper than Python's stack
            last = pending[-1]
            unknown = [source for source in self._sources(last) if source not in self._known]
            if unknown and last not in self._known:
                pending += unknown
                continue
            pending.pop()
            self._known.setdefault(last, self._is_constant(last))
        return self._known[value]

    def _sources(self, value: ir.Value) -> list[ir.Value]:
        """The values whose numbers go into a value."""
        node = value.producer()
        if node is None:
            return []
        inputs = node.inputs[:1] if self.is_cast_like(node) else node.inputs
        return [source for source in inputs if source is not None]

    def is_cast_like(self, node: ir.Node) -> bool:
        """Whether a node reads its second input for nothing but its type, which is known."""
        like = node.inputs[1] if is_standard(node, "CastLike") else None
        return like is not None and self._dtypes.get(str(like.name)) is not None

    def _is_constant(self, value: ir.Value) -> bool:
        node = value.producer()
        if node is None:
            return value.is_initializer() and not value.is_graph_input()
        if not is_standard(node) or node.op_type in _NOT_FOLDED or has_subgraph(node):
            return False
        is_function = not node.inputs and node.op_type != "Constant"
        return not is_function and all(self._known[source] for source in self._sources(value))

    def tensor(self, value: ir.Value | None) -> Tensor | None:
        """The numbers of a constant; None where it has none, is none, or its type is unknown to torch."""
        if value is None or not self.is_constant(value):
            return None
        if value not in self._tensors:
            if value.const_value is not None:
                self._tensors[value] = to_torch(value.const_value)
            else:
                self._compute(value)
        return self._tensors[value]

    def _compute(self, value: ir.Value) -> None:
        """Run the node that makes a constant; what the reference cannot run is not known."""
        node = value.producer()
        assert node is not None
        self._tensors.update(dict.fromkeys(node.outputs))
        try:
            results = self._run(node)
        except Exception:  # the reference raises whatever numpy does
            return
        for output, result in zip((o for o in node.outputs if o.name), results, strict=True):
            try:
                self._tensors[output] = to_torch(ir.tensor(np.asarray(result)))
            except (TypeError, ValueError):  # a sequence, say
                continue

    def _run(self, node: ir.Node) -> list[Any]:
        if node.op_type == "Shape" and node.inputs[0] is not None and not node.attributes:
            shape = node.inputs[0].shape
            if shape is not None and shape.is_static():  # no need to load the weight
                return [np.array(shape.numpy(), dtype=np.int64)]
        if self.is_cast_like(node):
            number, like = self.tensor(node.inputs[0]), node.inputs[1]
            dtype = None if like is None else self._dtypes[str(like.name)]
            return [] if number is None or dtype is None else [to_numpy(number.to(dtype))]
        proto = ir.to_proto(node)
        assert isinstance(proto, onnx.NodeProto)
        feed = {}
        for source in node.inputs:
            if source is not None and source.name:
                tensor = self.tensor(source)
                if tensor is None:
                    raise ValueError(f"{source.name} is not known")
                feed[source.name] = to_numpy(tensor)
        graph = onnx.helper.make_graph(
            [proto],
            "constant",
            [onnx.helper.make_tensor_value_info(n, onnx.helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
             for n, a in feed.items()],
            [onnx.ValueInfoProto(name=output.name) for output in node.outputs if output.name],
        )  # fmt: skip
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", self._opset)])
        return list(reference.ReferenceEvaluator(model).run(None, feed))


def to_numpy(tensor: Tensor) -> np.ndarray[Any, Any]:
    """A tensor of torch as an array, also of types that numpy does not know itself."""
    if tensor.dtype is torch.bfloat16:
        import ml_dtypes

        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()

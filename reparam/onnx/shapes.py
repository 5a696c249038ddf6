"""What ONNX's shape inference tells of the values of a graph: types, ranks, sizes, and sizes for an example."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx
import onnx_ir as ir
import torch

from reparam.onnx.constants import DTYPES

_SMALL = 1024  # numbers in a tensor that may be a shape


@dataclass(frozen=True)
class Known:
    """What is known of a value.

    Attributes:
        dtype: Its type, None when it is not known, or unknown to torch.
        shape: Its sizes, None for each one that is free; None when not even their number is known.
        example: Its sizes for the example.
    """

    dtype: torch.dtype | None = None
    shape: tuple[int | None, ...] | None = None
    example: tuple[int, ...] | None = None

    @property
    def rank(self) -> int | None:
        """Number of axes."""
        return None if self.shape is None else len(self.shape)


def skeleton(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A model without the numbers in its large initializers, so that inference has nothing to copy."""
    model = onnx.ModelProto(ir_version=proto.ir_version)
    model.opset_import.extend(proto.opset_import)
    model.functions.extend(proto.functions)
    graph = model.graph
    graph.name = proto.graph.name or "graph"
    graph.node.extend(proto.graph.node)
    graph.input.extend(proto.graph.input)
    graph.output.extend(proto.graph.output)
    graph.value_info.extend(proto.graph.value_info)
    for tensor in proto.graph.initializer:
        count = 1
        for size in tensor.dims:
            count *= size
        if count <= _SMALL and tensor.data_location != onnx.TensorProto.EXTERNAL:
            graph.initializer.append(tensor)
        else:
            empty = graph.initializer.add(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
            empty.data_location = onnx.TensorProto.EXTERNAL
            empty.external_data.add(key="location", value="nowhere")
    return model


def symbols(value: ir.Value) -> list[int | str]:
    """The sizes of an input as numbers and names; what has no name gets one."""
    sizes = [size if isinstance(size, int) else size.value for size in value.shape or ()]
    return [f"{value.name}.{axis}" if size is None else size for axis, size in enumerate(sizes)]


def infer(bare: onnx.ModelProto, sizes: Mapping[str, Sequence[int]]) -> dict[str, Known]:
    """What is known of every value, by name.

    Args:
        bare: A :func:`skeleton`.
        sizes: Sizes of every input for the example.
    """
    found = {name: Known(dtype, shape) for name, dtype, shape in _inferred(bare)}
    concrete = onnx.ModelProto()
    concrete.CopyFrom(bare)
    bound: dict[str, int] = {}
    for value in concrete.graph.input:
        for dim, size in zip(value.type.tensor_type.shape.dim, sizes.get(value.name, ()), strict=False):
            if dim.HasField("dim_param"):
                bound[dim.dim_param] = size
            dim.dim_value = size
    for value in concrete.graph.output:
        value.type.tensor_type.ClearField("shape")
    kept = [value for value in concrete.graph.value_info if _bind(value, bound)]
    del concrete.graph.value_info[:]
    concrete.graph.value_info.extend(kept)
    for name, _, shape in _inferred(concrete):
        if name in found and shape is not None and None not in shape:
            known = found[name]
            example = tuple(size for size in shape if size is not None)
            found[name] = Known(known.dtype, known.shape or (None,) * len(example), example)
    return found


def _bind(value: onnx.ValueInfoProto, bound: Mapping[str, int]) -> bool:
    """Put numbers for the names in a declared shape; whether there are numbers for all of them."""
    for dim in value.type.tensor_type.shape.dim:
        if dim.HasField("dim_param"):
            if dim.dim_param not in bound:
                return False
            dim.dim_value = bound[dim.dim_param]
        elif not dim.HasField("dim_value"):
            return False
    return True


def _inferred(model: onnx.ModelProto) -> Iterator[tuple[str, torch.dtype | None, tuple[int | None, ...] | None]]:
    # Where it fails, what the file declares is all that is known.
    with contextlib.suppress(onnx.shape_inference.InferenceError, ValueError, RuntimeError):
        model = onnx.shape_inference.infer_shapes(model, data_prop=True)
    graph = model.graph
    for tensor in graph.initializer:
        yield tensor.name, DTYPES.get(ir.DataType(tensor.data_type)), tuple(tensor.dims)
    for value in (*graph.input, *graph.value_info, *graph.output):
        if value.type.HasField("tensor_type"):
            of = value.type.tensor_type
            dtype = DTYPES.get(ir.DataType(of.elem_type))
            dims = [dim.dim_value if dim.HasField("dim_value") else None for dim in of.shape.dim]
            yield value.name, dtype, tuple(dims) if of.HasField("shape") else None

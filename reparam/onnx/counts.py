"""Counts of what an ONNX graph launches, in the terms of :class:`reparam.report.Counts`."""

from __future__ import annotations

import math
from collections.abc import Mapping

import onnx_ir as ir

from reparam.graph import measure
from reparam.onnx.constants import Constants, is_standard
from reparam.onnx.shapes import Known
from reparam.report import Counts

_CONVOLUTIONS = frozenset("Conv ConvTranspose ConvInteger QLinearConv DeformConv".split())
_PRODUCTS = frozenset("Gemm MatMul MatMulInteger QLinearMatMul".split())
_NORMS = frozenset(
    "BatchNormalization InstanceNormalization LayerNormalization GroupNormalization RMSNormalization LRN".split()
)
_ELEMENTWISE = frozenset("Add Sub Mul Div Neg Sum Mean Pow Max Min".split())
_FREE = frozenset(
    """Reshape Flatten Transpose Squeeze Unsqueeze Identity Constant Shape Size Expand Slice Split Dropout
    Cast CastLike""".split()
)


def counts(model: ir.Model, known: Mapping[str, Known]) -> Counts:
    """The kernels of one run.

    Computations on sizes, views, and what no input has a say in launch none.

    Args:
        model: The model.
        known: What inference tells of its values, by name.
    """
    constants = Constants(model, {name: of.dtype for name, of in known.items()})
    kinds: list[str] = []
    for node in model.graph:
        kinds += _kinds(node, constants, known)
    parameters = sum(
        math.prod(value.const_value.shape.numpy())
        for value in model.graph.initializers.values()
        if value.const_value is not None and value.const_value.dtype.is_floating_point()
    )
    return measure.counts(kinds, parameters)


def _kinds(node: ir.Node, constants: Constants, known: Mapping[str, Known]) -> list[str]:
    if all(map(constants.is_constant, node.outputs)):
        return []
    if not is_standard(node):
        return ["other"]
    types = [known.get(str(output.name), Known()).dtype for output in node.outputs[:1]]
    if any(dtype is not None and not dtype.is_floating_point for dtype in types):
        quantised = node.op_type.startswith("QLinear") or node.op_type.endswith("Integer")
        if not quantised:
            return []
    if node.op_type in _CONVOLUTIONS:
        return ["convolutions"]
    if node.op_type in _PRODUCTS:
        return ["linears" if any(map(constants.is_constant, node.inputs[:2])) else "other"]
    if node.op_type in _NORMS:
        return ["norms"]
    if node.op_type in _ELEMENTWISE:
        return ["elementwise"]
    return [] if node.op_type in _FREE else ["other"]

"""ONNX's operators in the words of torch, which is the language that the compiler reads.

One table: an entry takes a :class:`Call` and returns the function of torch that computes the same with its arguments,
or the operator of :mod:`reparam.algebra` where torch has no words for it (a convolution that pads one side more than
the other). It returns None for what it does not cover; the node then stays as it is. No entry means the same.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from reparam.algebra import Conv, ConvTranspose, Operator
from reparam.graph import lift
from reparam.onnx.shapes import Known

if TYPE_CHECKING:
    from reparam.onnx.read import Reader

Pairs: TypeAlias = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Said:
    """A call of a function; arguments are activations, constants, numbers."""

    function: Callable[..., Any]
    args: tuple[Any, ...]


Entry: TypeAlias = "Callable[[Call], Said | None]"

_TABLE: dict[str, Entry] = {}
_CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_SPREAD = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
_MEAN = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
_LARGEST = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_FOREVER = 2**31 - 1  # from here on, the end of a slice is that of its axis


def said(call: Call) -> Said | None:
    """What a node computes, in torch's words; None when there are none."""
    entry = _TABLE.get(call.node.op_type)
    return None if entry is None else entry(call)


def _says(*op_types: str) -> Callable[[Entry], Entry]:
    def decorate(entry: Entry) -> Entry:
        _TABLE.update(dict.fromkeys(op_types, entry))
        return entry

    return decorate


class Call:
    """A node of an ONNX graph, as the entries of the table ask about it."""

    def __init__(self, node: ir.Node, reader: Reader, opset: int) -> None:
        self.node = node
        self.reader = reader
        self.opset = opset

    def has(self, index: int) -> bool:
        """Whether an optional input is given."""
        return index < len(self.node.inputs) and self.node.inputs[index] is not None

    def _input(self, index: int) -> ir.Value | None:
        return self.node.inputs[index] if index < len(self.node.inputs) else None

    def value(self, index: int) -> Node:
        """The node of an input, be it an activation or a constant."""
        source = self._input(index)
        assert source is not None
        return self.reader.value(source)

    def values(self) -> list[Node]:
        """The nodes of all inputs."""
        return [self.value(index) for index in range(len(self.node.inputs))]

    def is_activation(self, index: int = 0) -> bool:
        """Whether an input is given, and not constant."""
        return self.has(index) and not self.reader.constants.is_constant(self._input(index))

    def constant(self, index: int) -> Tensor | None:
        """The numbers of a constant input."""
        return self.reader.constants.tensor(self._input(index))

    def known(self, index: int = 0) -> Known:
        """What inference tells of an input."""
        return self.reader.known(self._input(index))

    def sizes(self, index: int) -> list[int | Node] | None:
        """An input as sizes."""
        source = self._input(index)
        return None if source is None else self.reader.sizes(source)

    def integer(self, name: str, default: Any = None) -> Any:
        """An attribute that is a number."""
        attribute = self.node.attributes.get(name)
        return default if attribute is None else attribute.as_int()

    def number(self, name: str, default: float) -> float:
        """An attribute that is a number."""
        attribute = self.node.attributes.get(name)
        return default if attribute is None else attribute.as_float()

    def text(self, name: str, default: str) -> str:
        """An attribute that is text."""
        attribute = self.node.attributes.get(name)
        return default if attribute is None else attribute.as_string()

    def ints(self, name: str, index: int | None = None) -> list[Any] | None:
        """Numbers, from an attribute or, as later operator sets have it, from a constant input."""
        attribute = self.node.attributes.get(name)
        if attribute is not None:
            return list(attribute.as_ints())
        tensor = None if index is None else self.constant(index)
        return None if tensor is None else [int(number) for number in tensor.flatten().tolist()]


def _window(call: Call, kernel: Sequence[int]) -> tuple[list[int], Pairs, list[int]] | None:
    """Stride, padding and dilation of a window; None where the padding depends on the size of the input."""
    space = len(kernel)
    stride = call.ints("strides") or [1] * space
    dilation = call.ints("dilations") or [1] * space
    mode = call.text("auto_pad", "NOTSET")
    if mode in ("NOTSET", "VALID"):
        flat = (call.ints("pads") if mode == "NOTSET" else None) or [0] * 2 * space
        return stride, tuple((flat[axis], flat[axis + space]) for axis in range(space)), dilation
    shape = call.known().shape or ()
    pads = []
    for axis, (k, s, d) in enumerate(zip(kernel, stride, dilation, strict=True)):
        size = shape[axis + 2] if len(shape) == space + 2 else None
        if s != 1 and size is None:
            return None
        total = d * (k - 1) if s == 1 or size is None else max(0, (-(-size // s) - 1) * s + d * (k - 1) + 1 - size)
        less = total // 2
        pads.append((less, total - less) if mode == "SAME_UPPER" else (total - less, less))
    return stride, tuple(pads), dilation


def _is_even(pads: Pairs) -> bool:
    return all(before == after for before, after in pads)


def _before(pads: Pairs) -> tuple[int, ...]:
    return tuple(before for before, _ in pads)


# Operators with weights.


@_says("Conv")
def _conv(call: Call) -> Said | None:
    weight, bias = call.constant(1), call.constant(2)
    if weight is None or (call.has(2) and bias is None) or not call.is_activation() or not 3 <= weight.dim() <= 5:
        return None
    window = _window(call, weight.shape[2:])
    if window is None:
        return None
    stride, pads, dilation = window
    groups = call.integer("group", 1)
    if not _is_even(pads):
        return Said(Conv(weight, bias, tuple(stride), pads, tuple(dilation), groups), (call.value(0),))
    parameters = call.value(1), call.value(2) if call.has(2) else None
    function = _CONVOLVE[weight.dim() - 2]
    return Said(function, (call.value(0), *parameters, tuple(stride), _before(pads), tuple(dilation), groups))


@_says("ConvTranspose")
def _conv_transpose(call: Call) -> Said | None:
    weight, bias = call.constant(1), call.constant(2)
    if weight is None or (call.has(2) and bias is None) or not call.is_activation() or not 3 <= weight.dim() <= 5:
        return None
    if call.ints("output_shape") or call.text("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return None
    window = _window(call, weight.shape[2:])
    assert window is not None
    stride, pads, dilation = window
    more = call.ints("output_padding") or [0] * len(stride)
    groups = call.integer("group", 1)
    if _is_even(pads) and all(m < max(s, d) for m, s, d in zip(more, stride, dilation, strict=True)):
        parameters = call.value(1), call.value(2) if call.has(2) else None
        function = _SPREAD[weight.dim() - 2]
        return Said(
            function, (call.value(0), *parameters, tuple(stride), _before(pads), tuple(more), groups, tuple(dilation))
        )
    plain = ConvTranspose.of_torch(weight, bias, tuple(stride), groups=groups, dilation=tuple(dilation))
    crops = tuple((before, after - m) for (before, after), m in zip(pads, more, strict=True))
    found = ConvTranspose(plain.weight, plain.bias, plain.stride, crops, plain.dilation, groups)
    return Said(found, (call.value(0),))


@_says("Gemm")
def _gemm(call: Call) -> Said | None:
    weight, bias = call.constant(1), call.constant(2)
    if weight is None or (call.has(2) and bias is None) or not call.is_activation() or call.integer("transA", 0):
        return None
    alpha, beta = call.number("alpha", 1.0), call.number("beta", 1.0)
    if not call.integer("transB", 0):
        weight = weight.t()
    if bias is not None:
        if bias.numel() not in (1, len(weight)) or bias.shape[-1:].numel() != bias.numel():
            return None  # it differs from row to row
        bias = bias.flatten().expand(len(weight))
    # A factor is multiplied in without rounding.
    weight = weight if alpha == 1.0 else weight.double() * alpha
    bias = bias if bias is None or beta == 1.0 else bias.double() * beta
    owner = call.value(1)
    made = [None if t is None else call.reader.made_constant(t, like=owner) for t in (weight, bias)]
    return Said(F.linear, (call.value(0), *made))


@_says("MatMul")
def _matmul(call: Call) -> Said | None:
    weight = call.constant(1)
    return Said(torch.matmul, (call.value(0), call.value(1))) if weight is not None and weight.dim() == 2 else None


@_says("BatchNormalization")
def _batch_norm(call: Call) -> Said | None:
    if (
        call.integer("training_mode", 0)
        or call.integer("spatial", 1) != 1
        or any(o.uses() for o in call.node.outputs[1:])
    ):
        return None
    if not call.is_activation() or any(call.constant(index) is None for index in range(1, 5)):
        return None
    x, scale, shift, mean, variance = call.values()
    return Said(F.batch_norm, (x, mean, variance, scale, shift, False, 0.0, call.number("epsilon", 1e-5)))


# Arithmetic.


@_says("Add", "Sub", "Mul", "Div")
def _binary(call: Call) -> Said | None:
    functions = {"Add": operator.add, "Sub": operator.sub, "Mul": operator.mul, "Div": operator.truediv}
    return Said(functions[call.node.op_type], tuple(call.values()))


@_says("Neg")
def _neg(call: Call) -> Said | None:
    return Said(operator.neg, (call.value(0),))


@_says("Identity", "Dropout")
def _identity(call: Call) -> Said | None:
    if call.has(2):
        training = call.constant(2)
        if training is None or bool(training):
            return None
    return None if any(output.uses() for output in call.node.outputs[1:]) else Said(operator.pos, (call.value(0),))


def total(*terms: Tensor) -> Tensor:
    """The sum of any number of tensors: ONNX's Sum, for which torch has no function."""
    return functools.reduce(torch.add, terms)


def mean(*terms: Tensor) -> Tensor:
    """The mean of any number of tensors: ONNX's Mean."""
    return total(*terms) / len(terms)


@lift.register(total)
def _(*terms: Any) -> lift.Sum | None:
    return lift.Sum(tuple((1.0, term) for term in terms)) if _are_activations(terms) else None


@lift.register(mean)
def _(*terms: Any) -> lift.Sum | None:
    return lift.Sum(tuple((1.0 / len(terms), term) for term in terms)) if _are_activations(terms) else None


def _are_activations(terms: Sequence[Any]) -> bool:
    return all(isinstance(term, Node) for term in terms)


@_says("Sum", "Mean")
def _n_ary(call: Call) -> Said | None:
    if len(call.node.inputs) == 1:
        return _identity(call)
    if len(call.node.inputs) == 2 and call.node.op_type == "Sum":
        return Said(operator.add, tuple(call.values()))
    return Said(total if call.node.op_type == "Sum" else mean, tuple(call.values()))


# Windows and means.


@_says("Pad")
def _pad(call: Call) -> Said | None:
    rank, flat = call.known().rank, call.ints("pads", 1)
    mode = {"constant": "constant", "reflect": "reflect", "edge": "replicate", "wrap": "circular"}.get(
        call.text("mode", "constant")
    )
    if flat is None or rank is None or mode is None:
        return None
    value = torch.tensor(call.number("value", 0.0))
    if call.has(2):
        given = call.constant(2)
        if given is None:
            return None
        value = given
    pairs = [(0, 0)] * rank
    axes = call.ints("axes", 3) if call.has(3) else list(range(len(flat) // 2))
    if axes is None:
        return None
    for index, axis in enumerate(axes):
        pairs[axis % rank] = flat[index], flat[index + len(axes)]
    first = next((axis for axis, pair in enumerate(pairs) if any(pair)), rank - 1)
    # torch reflects, replicates and wraps the axes after batch and channels.
    if mode != "constant" and (first < 2 or min(min(pair) for pair in pairs) < 0):
        return None
    used = pairs[min(first, rank - 1) if mode == "constant" else 2 :]
    amounts = [amount for pair in reversed(used) for amount in pair]
    return Said(F.pad, (call.value(0), amounts, mode, float(value.double()) if mode == "constant" else None))


@_says("AveragePool")
def _average_pool(call: Call) -> Said | None:
    kernel = call.ints("kernel_shape") or []
    window = _window(call, kernel)
    if window is None or len(kernel) not in _MEAN or any(d != 1 for d in window[2]):
        return None
    stride, pads, _ = window
    if not _is_even(pads) or any(before > k // 2 for (before, _), k in zip(pads, kernel, strict=True)):
        return None
    counted = bool(call.integer("count_include_pad", 0))
    ceil = bool(call.integer("ceil_mode", 0))
    return Said(_MEAN[len(kernel)], (call.value(0), tuple(kernel), tuple(stride), _before(pads), ceil, counted))


@_says("MaxPool")
def _max_pool(call: Call) -> Said | None:
    kernel = call.ints("kernel_shape") or []
    window = _window(call, kernel)
    if window is None or len(kernel) not in _LARGEST or any(output.uses() for output in call.node.outputs[1:]):
        return None
    stride, pads, dilation = window
    if not _is_even(pads) or any(before > k // 2 for (before, _), k in zip(pads, kernel, strict=True)):
        return None
    ceil = bool(call.integer("ceil_mode", 0))
    args = call.value(0), tuple(kernel), tuple(stride), _before(pads), tuple(dilation), ceil
    return Said(_LARGEST[len(kernel)], args)


@_says("GlobalAveragePool", "GlobalMaxPool")
def _global_pool(call: Call) -> Said | None:
    rank = call.known().rank
    function = torch.mean if call.node.op_type == "GlobalAveragePool" else torch.amax
    return None if rank is None else Said(function, (call.value(0), tuple(range(2, rank)), True))


@_says("ReduceMean", "ReduceMax", "ReduceMin")
def _reduce(call: Call) -> Said | None:
    axes, rank = call.ints("axes", 1), call.known().rank
    if axes is None and (call.has(1) or rank is None or call.integer("noop_with_empty_axes", 0)):
        return None
    functions: dict[str, Any] = {"ReduceMean": torch.mean, "ReduceMax": torch.amax, "ReduceMin": torch.amin}
    axes = axes or list(range(rank or 0))
    return Said(functions[call.node.op_type], (call.value(0), tuple(axes), bool(call.integer("keepdims", 1))))


# Views.


@_says("Reshape")
def _reshape(call: Call) -> Said | None:
    sizes = call.sizes(1)
    rank = call.known().rank
    if sizes is None or call.integer("allowzero", 0):
        return None
    x = call.value(0)
    copied = [axis for axis, size in enumerate(sizes) if isinstance(size, int) and size == 0]
    if copied and (rank is None or copied[-1] >= rank):
        return None
    wanted = [call.reader.size(x, axis) if axis in copied else size for axis, size in enumerate(sizes)]
    return Said(torch.reshape, (x, tuple(wanted)))


@_says("Flatten")
def _flatten(call: Call) -> Said | None:
    rank = call.known().rank
    if rank is None or rank < 2 or call.integer("axis", 1) not in (1, 1 - rank):
        return None
    return Said(torch.flatten, (call.value(0), 1))


@_says("Transpose")
def _transpose(call: Call) -> Said | None:
    rank = call.known().rank
    order = call.ints("perm") or (None if rank is None else list(reversed(range(rank))))
    return None if order is None else Said(torch.permute, (call.value(0), tuple(order)))


@_says("Squeeze")
def _squeeze(call: Call) -> Said | None:
    axes = call.ints("axes", 1)
    return Said(torch.squeeze, (call.value(0), tuple(axes))) if axes else None


@_says("Unsqueeze")
def _unsqueeze(call: Call) -> Said | None:
    axes = call.ints("axes", 1)
    return Said(torch.unsqueeze, (call.value(0), axes[0])) if axes is not None and len(axes) == 1 else None


@_says("Concat")
def _concat(call: Call) -> Said | None:
    return Said(torch.cat, (tuple(call.values()), call.integer("axis", 0)))


@_says("Slice")
def _slice(call: Call) -> Said | None:
    rank = call.known().rank
    starts, ends = call.ints("starts", 1), call.ints("ends", 2)
    axes = call.ints("axes", 3) if "axes" in call.node.attributes or call.has(3) else list(range(len(starts or ())))
    steps = call.ints("steps", 4) if call.has(4) else [1] * len(starts or ())
    if rank is None or starts is None or ends is None or axes is None or steps is None or min(steps, default=1) < 1:
        return None
    index = [slice(None)] * rank
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        index[axis % rank] = slice(start or None, None if end >= _FOREVER else end, None if step == 1 else step)
    return Said(operator.getitem, (call.value(0), tuple(index)))


def is_operator(function: Callable[..., Any]) -> bool:
    """Whether a call is of an operator of the algebra rather than of torch."""
    return isinstance(function, Operator)

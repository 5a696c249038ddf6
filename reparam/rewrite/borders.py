"""Borders that Python writes around what an operator made: zero padding of what the operator reads.

A block whose 1x1 convolution is followed by a kxk one is trained with the padding in between, of what the first one
makes of zeros: only then do the two become one convolution of an image that is padded with zeros (Ding et al. 2021,
"Diverse Branch Block", arXiv 2103.13425; Zhang et al. 2021, "Edge-oriented Convolution Block for Real-time Super
Resolution"). torch pads with one number for all channels, so these blocks pad with zeros, and then assign one to every
channel, row by row. That is read here, before in-place operations are made safe: nobody else reads the memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph as FxGraph
from torch.fx import Node

from reparam import compare
from reparam.algebra import ZEROS, ChannelAffine, Conv, Pad, as_conv
from reparam.errors import AlgebraError, VerificationError
from reparam.graph import aliasing, evaluate, facts
from reparam.graph.graph import Graph, describe
from reparam.graph.lift import lift, resolve
from reparam.report import Remark
from reparam.rewrite import certify
from reparam.rewrite.edit import Editor
from reparam.rewrite.rule import Apply, Rewrite

# What a border may differ by from what the operator makes of zeros, in units in the last place of the largest number:
# it was computed in its own precision, which has to be a full one.
_UNITS = 16
_PRECISIONS = (torch.float32, torch.float64)


def read(fx: FxGraph, modules: Mapping[str, nn.Module]) -> list[Remark]:
    """A remark for every operator that took in a border: ``border_b(W*x + b) = W *_p x + b``, replaced in the graph.

    Args:
        fx: A captured graph with its facts, changed in place.
        modules: The module at every path that the graph's names refer to.
    """
    written: dict[Any, list[Node]] = {}
    for node in fx.nodes:
        if node.op == "call_function" and facts.target_name(node) == "setitem":
            written.setdefault(node.args[0], []).append(node)
    graph = Graph(fx, dict(modules))
    remarks = []
    for padded, writes in written.items():
        bordered = _bordered(graph, padded, writes)
        if bordered is not None:
            inner = graph.source(padded)
            message = f"{describe(inner)} takes in the border of its own constant that is written around it"
            remarks.append(Remark("fused", "Border", graph.path(inner), message))
            for write in writes:
                fx.erase_node(write)
            Editor(graph).apply(Rewrite.one(padded, Apply.one(padded, bordered, graph.source(inner)), message))
    return remarks


def _bordered(graph: Graph, padded: Any, writes: Sequence[Node]) -> Conv | None:
    """What ``padded``, once the writes are done, is of what the operator before it reads; None when it is no such."""
    pad = lift(padded, graph.modules) if isinstance(padded, Node) else None
    rank = facts.of(padded).rank if isinstance(padded, Node) else None
    if not isinstance(pad, Pad) or pad.mode != ZEROS or rank is None or not _surround(pad, writes, rank):
        return None
    # The border is written before anybody reads it, and nobody reads what it was put around.
    later = [reader for reader in padded.users if reader not in writes]
    inner = graph.source(padded)
    if min(later, default=padded) < max(writes) or list(inner.users) != [padded]:
        return None
    conv = _as_conv(inner, graph.modules)
    if conv is None or conv.dimensions != len(pad.padding) or conv.axis + rank != 1:
        return None
    bias = conv.weight.new_zeros(conv.out_channels) if conv.bias is None else conv.bias
    values = [resolve(write.args[2], graph.modules) for write in writes]
    if not all(_is(value, bias, conv.axis) for value in values):
        return None
    try:
        found = conv.then_border(pad)
    except AlgebraError:
        return None
    _certify(graph, found, inner, padded, writes, max(_rounding(value) for value in values))
    return found


def _as_conv(node: Node, modules: Mapping[str, nn.Module]) -> Conv | None:
    """The operator of a node that makes new memory, as a convolution."""
    operator = lift(node, modules) if not aliasing.is_in_place(node, modules) else None
    if isinstance(operator, ChannelAffine) and operator.axis is not None and not operator.may_expand:
        return as_conv(operator, len(operator.scale), -operator.axis - 1)
    return operator if isinstance(operator, Conv) else None


def _surround(pad: Pad, writes: Sequence[Node], rank: int) -> bool:
    """Whether writes go to all that a padding put around a value, and to nothing else."""
    left = {
        (axis - len(pad.padding), side): amount
        for axis, pair in enumerate(pad.padding)
        for side, amount in enumerate(pair)
        if amount
    }
    if any(write.users or facts.of(write).frozen is not None for write in writes) or min(left.values(), default=0) <= 0:
        return False
    for write in writes:
        items = facts.indices(write.args[1], rank) or []
        limited = [(axis - rank, item) for axis, item in enumerate(items) if item != slice(None)]
        axis, item = limited[0] if len(limited) == 1 else (0, None)
        if not isinstance(item, slice) or item.step not in (None, 1):
            return False
        match item.start or 0, item.stop:
            case 0, int(stop) if left.get((axis, 0)) == stop:
                del left[axis, 0]
            case int(start), None if left.get((axis, 1)) == -start:
                del left[axis, 1]
            case _:
                return False
    return not left


def _is(value: Any, bias: Tensor, axis: int) -> bool:
    """Whether what is written to every channel is its bias, but for the rounding of the value's own precision."""
    if not isinstance(value, Tensor) or value.dtype not in _PRECISIONS:
        return False
    shape = [1] * (value.dim() + axis) + [len(bias)] + [1] * (-axis - 1)
    if tuple(value.shape) != tuple(shape):
        return False
    difference = (value.detach().double().flatten() - bias).abs().max()
    return bool(difference <= _rounding(value) * bias.abs().max())


def _rounding(value: Tensor) -> float:
    return _UNITS * torch.finfo(value.dtype).eps


def _certify(graph: Graph, found: Conv, inner: Node, padded: Node, writes: Sequence[Node], rounding: float) -> None:
    """Raise unless the operator computes what the nodes do, which hold constants of some precision."""
    for x in evaluate.random_inputs(found, graph.source(inner)):
        env: dict[Node, Any] = {graph.source(inner): x}
        for node in (inner, padded, *writes):
            evaluate.evaluate(graph, node, env)
        error = compare.relative_error(env[padded], found(x))
        if not error <= max(rounding, certify.CERTIFICATE_TOLERANCE):
            where = graph.path(inner)
            raise VerificationError(f"Border at {where} would change the result by {error:.1e}; please report it")

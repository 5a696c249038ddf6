"""``outer(inner(x)) -> fused(x)``: an operator takes in the one that it reads, when nobody else reads it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from reparam.algebra import AnyConv, AveragePool, ChannelAffine, Conv, Operator, Pad, Permute, compose
from reparam.algebra.cost import Choice
from reparam.errors import AlgebraError
from reparam.graph.graph import Graph, describe
from reparam.rewrite.rule import Apply, Missed, Rewrite, Rule


def _one_kernel(node: Node, graph: Graph, outer: Operator, inner: Operator) -> str | None:
    """Why one convolution would cost more than two, or one and a pool."""
    if not isinstance(outer, AnyConv) and not isinstance(inner, AnyConv):
        return "no convolution"
    source = graph.source(node)
    kernels = graph.kernels(node) + graph.kernels(source)
    merged = compose(outer, inner, outline=True)
    choice = Choice(merged, ((outer, inner),), kernels, shape=graph.shape(graph.source(source)))
    return graph.cost.too_costly(choice, graph.path(node))


def _own_crop(node: Node, graph: Graph, outer: Operator, inner: Operator) -> str | None:
    """Why a crop stays: it is a view, which costs less than a padding of its own."""
    kernels = graph.kernels(node) + graph.kernels(graph.source(node))
    needs_padding = compose(outer, inner).kernels >= kernels
    return "the convolution would need a padding of its own" if needs_padding else None


@dataclass(frozen=True)
class _Pair:
    """Types of the operator that is visited and of what it reads; why one is no gain; whether a remark says so."""

    outer: tuple[Any, ...]
    inner: tuple[Any, ...]
    too_costly: Callable[[Node, Graph, Operator, Operator], str | None] | None = None
    explains: bool = True


_KERNELS = (AnyConv, AveragePool, Permute)
_PAIRS = {
    "NormAfterLinear": _Pair((ChannelAffine,), (AnyConv,)),
    "AffineAfterAffine": _Pair((ChannelAffine,), (ChannelAffine,)),
    "PadBeforeConv": _Pair((Conv, AveragePool, Pad), (Pad,)),
    "CropAfterConv": _Pair((Pad,), (Conv,), _own_crop, explains=False),
    "ConvAfterConv": _Pair(_KERNELS, _KERNELS, _one_kernel, explains=False),
}


class Compose(Rule):
    """Two operators in a row become one, when nothing else reads the value between them.

    | name | formula | exact, and worth it |
    | --- | --- | --- |
    | `NormAfterLinear` | `s·(W*x + b) + t = (s·W)*x + (s·b + t)` | for every padding, stride and group count |
    | `AffineAfterAffine` | `s·(s'·x + t') + t = (s·s')·x + (s·t' + t)` | along one axis |
    | `PadBeforeConv` | `W *_p pad_q(x) = W *_(p+q) x` | for zeros; for other paddings when one of the two pads |
    | `CropAfterConv` | `crop(W *_p x) = W *_(p - stride·crop) x` | while it still pads like one of torch's layers |
    | `ConvAfterConv` | `W2*(W1*x + b1) + b2 = (W2*W1)*x + (W2·b1 + b2)` | see :meth:`reparam.algebra.Conv.after` |

    A padding may make one that torch's layers lack; it is then explicit after all, unless a parallel branch evens it
    out. A pool takes in zeros that its windows count, and a padding another one of the same value. Convolutions in a
    row, transposed ones too, or one and an average pool or permutation, become one when that is no more expensive
    (:mod:`reparam.algebra.cost`): a 1x1 beside a kxk disappears (Ding et al. 2021, "Diverse Branch Block", arXiv
    2103.13425), a bottleneck 64 → 4 → 64 and a depthwise before a pointwise convolution stay what they are.

    Args:
        name: Which of these.
    """

    def __init__(self, name: str) -> None:
        self._name, self._pair = name, _PAIRS[name]

    @property
    def name(self) -> str:
        """The name that remarks carry."""
        return self._name

    def rewrite(self, node: Node, graph: Graph) -> Rewrite | Missed | None:
        """One operator for two."""
        found = self._compose(node, graph)
        return None if isinstance(found, Missed) and not self._pair.explains else found

    def _compose(self, node: Node, graph: Graph) -> Rewrite | Missed | None:
        outer = graph.op(node)
        if not isinstance(outer, self._pair.outer):
            return None
        source = graph.source(node)
        inner = graph.op(source)
        if not isinstance(inner, self._pair.inner):
            return None
        obstacle = graph.obstacle(source, node)
        try:
            if obstacle is None and self._pair.too_costly is not None:
                obstacle = self._pair.too_costly(node, graph, outer, inner)
            if obstacle is not None:
                return Missed(obstacle)
            fused = compose(outer, inner)
        except AlgebraError as reason:
            return Missed(str(reason))
        if fused.kernels > graph.kernels(node) + graph.kernels(source):
            return Missed("one operator would launch more kernels")
        message = f"folded {describe(node)} into {describe(source)}"
        return Rewrite.one(node, Apply.one(node, fused, graph.source(source)), message)

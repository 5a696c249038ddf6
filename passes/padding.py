"""``conv(pad(x)) -> conv(x)``: an explicit padding becomes the operator's own."""

from __future__ import annotations

from torch.fx import Node

from reparam.algebra import AveragePool, Conv, Operator, Pad, compose
from reparam.algebra.kernels import kernels_of
from reparam.graph.graph import Graph
from reparam.passes.compose import Compose


class PadBeforeConv(Compose):
    """``W *_p pad_q(x) = W *_(p+q) x``, exact for zeros, and for other paddings when only one of the two pads.

    The result may pad one side more than the other, which torch's layers cannot; it is then padded explicitly after
    all, unless a parallel branch evens it out. A pool takes in zeros that its windows count, and a padding another
    one of the same value.
    """

    outer = (Conv, AveragePool, Pad)
    inner = (Pad,)


class CropAfterConv(Compose):
    """``crop(W *_p x) = W *_(p - stride·crop) x``, when the convolution still pads like one of torch's layers."""

    outer = (Pad,)
    inner = (Conv,)
    explains = False

    def too_costly(self, node: Node, graph: Graph, outer: Operator, inner: Operator) -> str | None:
        """A crop is a view, which costs less than a padding of its own."""
        kernels = graph.kernels(node) + graph.kernels(graph.source(node))
        fused = compose(outer, inner)
        return "the convolution would need a padding of its own" if kernels_of(fused) >= kernels else None

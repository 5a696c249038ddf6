"""``conv(conv(x)) -> conv(x)``: two convolutions in a row, transposed ones too, or one and an average pool."""

from __future__ import annotations

from torch.fx import Node

from reparam.algebra import AnyConv, AveragePool, Operator, compose
from reparam.algebra.cost import Choice
from reparam.graph.graph import Graph
from reparam.passes.compose import Compose


class ConvAfterConv(Compose):
    """``W2*(W1*x + b1) + b2 = (W2*W1)*x + (W2·b1 + b2)``; see :meth:`reparam.algebra.Conv.after` for when it is exact.

    Only when the one kernel is no more expensive than the two (see :mod:`reparam.algebra.cost`): a 1x1 convolution
    beside a kxk one disappears (Ding et al. 2021, "Diverse Branch Block", arXiv 2103.13425), a bottleneck 64 → 4 → 64
    and a depthwise before a pointwise convolution stay what they are.
    """

    outer = (AnyConv, AveragePool)
    inner = (AnyConv, AveragePool)
    explains = False

    def too_costly(self, node: Node, graph: Graph, outer: Operator, inner: Operator) -> str | None:
        """What the one kernel costs against the two."""
        if isinstance(outer, AveragePool) and isinstance(inner, AveragePool):
            return "two pools in a row"
        source = graph.source(node)
        kernels = graph.kernels(node) + graph.kernels(source)
        merged = compose(outer, inner, outline=True)
        choice = Choice(merged, ((outer, inner),), kernels, shape=graph.shape(graph.source(source)))
        return graph.cost.too_costly(choice, graph.path(node))

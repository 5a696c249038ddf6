"""``norm(conv(x)) -> conv(x)``, and every other scale and shift after a convolution or a matrix product."""

from __future__ import annotations

from torch.fx import Node

from reparam.algebra import AnyConv, ChannelAffine
from reparam.errors import AlgebraError
from reparam.rewrite import Apply, Graph, Missed, Rewrite, Rule, describe


class NormAfterLinear(Rule):
    """``s·(W*x + b) + t = (s·W)*x + (s·b + t)``, exact for every padding, stride, dilation and group count."""

    def rewrite(self, node: Node, graph: Graph) -> Rewrite | Missed | None:
        """One convolution for a convolution and the affine that reads it."""
        norm = graph.op(node)
        if not isinstance(norm, ChannelAffine):
            return None
        source = graph.source(node)
        conv = graph.op(source)
        if not isinstance(conv, AnyConv):
            return None
        obstacle = graph.obstacle(source, node)
        if obstacle is not None:
            return Missed(obstacle)
        try:
            fused = conv.then(norm)
        except AlgebraError as reason:
            return Missed(str(reason))
        value = Apply(fused, graph.source(source), ((1.0, node),))
        return Rewrite(((node, value),), f"folded {describe(node)} into {describe(source)}")

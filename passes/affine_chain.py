"""``affine(affine(x)) -> affine(x)``: scalars, layer scales and norms in a row."""

from __future__ import annotations

from torch.fx import Node

from reparam.algebra import ChannelAffine
from reparam.errors import AlgebraError
from reparam.rewrite import Apply, Graph, Missed, Rewrite, Rule, describe


class AffineAfterAffine(Rule):
    """``s·(s'·x + t') + t = (s·s')·x + (s·t' + t)``, along one axis."""

    def rewrite(self, node: Node, graph: Graph) -> Rewrite | Missed | None:
        """One affine for two."""
        outer = graph.op(node)
        if not isinstance(outer, ChannelAffine):
            return None
        source = graph.source(node)
        inner = graph.op(source)
        if not isinstance(inner, ChannelAffine):
            return None
        obstacle = graph.obstacle(source, node)
        if obstacle is not None:
            return Missed(obstacle)
        try:
            fused = outer.after(inner)
        except AlgebraError as reason:
            return Missed(str(reason))
        value = Apply(fused, graph.source(source), ((1.0, node),))
        return Rewrite(((node, value),), f"folded {describe(node)} into {describe(source)}")

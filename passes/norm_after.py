"""``norm(f(conv(x))) -> f(conv(x))``: a norm, and every other scale and shift, some way behind what takes it in."""

from __future__ import annotations

from dataclasses import replace

from torch.fx import Node

from reparam.algebra import ChannelAffine
from reparam.errors import AlgebraError
from reparam.graph.graph import Graph, describe
from reparam.rewrite.passage import absorb_backward
from reparam.rewrite.rule import Missed, Rewrite, Rule


class NormAfterPassage(Rule):
    """``norm(f(conv(x))) = f(norm'(conv(x)))`` with views, means, maxima, sums, parts or products between the two.

    See :mod:`reparam.rewrite.passage` for what an affine passes through.
    """

    def rewrite(self, node: Node, graph: Graph) -> Rewrite | Missed | None:
        """The operators that the norm's input is made of, each with its part of the norm."""
        norm = graph.op(node)
        if not isinstance(norm, ChannelAffine) or norm.is_identity:
            return None
        source = graph.source(node)
        if not graph.lets_pass(source):
            return None
        try:
            walk = absorb_backward(graph, node)
        except AlgebraError as reason:
            return Missed(f"not foldable backwards: {reason}")
        into = " and ".join(describe(operator) for operator, _ in walk.changes)
        message = f"folded {describe(node)} into {into}"
        if not walk.through:
            # A pool that nothing behind it could take the norm in for.
            ((_, pooled),) = walk.changes
            return Rewrite.one(node, replace(pooled, terms=((1.0, node),)), message)
        return Rewrite((*walk.changes, (node, source)), message, (node,), tuple(walk.through))

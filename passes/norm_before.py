"""``conv(norm(x)) -> conv(x)``, for every convolution or matrix product that reads the norm."""

from __future__ import annotations

from torch.fx import Node

from reparam.algebra import AnyConv, ChannelAffine
from reparam.errors import AlgebraError
from reparam.graph.graph import Graph, describe
from reparam.rewrite.passage import absorb_forward
from reparam.rewrite.rule import Missed, Rewrite, Rule


class NormBeforeLinear(Rule):
    """``W*(s·x + t) + b = (W·s)*x + (b + W·t)``, exact when t = 0 or nothing reads zeros that were padded.

    A norm goes only when everything that reads it can take it in: otherwise it would still have to be computed.
    """

    def rewrite(self, node: Node, graph: Graph) -> Rewrite | Missed | None:
        """The norm's readers, each with the norm in its weights."""
        norm = graph.op(node)
        if not isinstance(norm, ChannelAffine) or norm.is_identity:
            return None
        try:
            walk = absorb_forward(graph, node)
        except AlgebraError as reason:
            return Missed(str(reason)) if self._is_near(node, graph) else None
        readers = [reader for reader, _ in walk.changes]
        message = f"folded {describe(node)} into {' and '.join(map(describe, readers))}"
        if not walk.through:
            return Rewrite(tuple(walk.changes), message)
        return Rewrite((*walk.changes, (node, graph.source(node))), message, tuple(readers), tuple(walk.through))

    def _is_near(self, node: Node, graph: Graph) -> bool:
        """Whether a linear operator reads the norm."""
        return any(isinstance(graph.op(reader), AnyConv) for reader in graph.readers(node))

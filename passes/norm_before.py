"""``conv(norm(x)) -> conv(x)``, for every convolution or matrix product that reads the norm."""

from __future__ import annotations

from torch.fx import Node

from reparam.algebra import AnyConv, ChannelAffine
from reparam.errors import AlgebraError
from reparam.rewrite import Apply, Graph, Missed, Rewrite, Rule, describe


class NormBeforeLinear(Rule):
    """``W*(s·x + t) + b = (W·s)*x + (b + W·t)``, exact when t = 0 or nothing reads zeros that were padded.

    A norm goes only when everything that reads it can take it in: otherwise it would still have to be computed.
    """

    def rewrite(self, node: Node, graph: Graph) -> Rewrite | Missed | None:
        """The norm's readers, each with the norm in its weights."""
        norm = graph.op(node)
        if not isinstance(norm, ChannelAffine) or norm.is_identity:
            return None
        readers = graph.readers(node)
        operators = [graph.op(reader) for reader in readers]
        if not any(isinstance(operator, AnyConv) for operator in operators):
            return None
        values = []
        for reader, operator in zip(readers, operators, strict=True):
            if not isinstance(operator, AnyConv):
                return Missed(f"it is also read by {describe(reader)}, which cannot take it in")
            try:
                fused = operator.after(norm)
            except AlgebraError as reason:
                return Missed(f"not foldable into {describe(reader)}: {reason}")
            values.append((reader, Apply(fused, graph.source(node), ((1.0, reader),))))
        into = " and ".join(describe(reader) for reader in readers)
        return Rewrite(tuple(values), f"folded {describe(node)} into {into}")

"""``identity(x) -> x``: dropout in eval mode, nn.Identity, ``x * 1``, ``x + 0``, a norm that is one."""

from __future__ import annotations

from torch.fx import Node

from reparam.algebra import ChannelAffine, Pad
from reparam.rewrite import Graph, Rewrite, Rule


class RemoveNoOp(Rule):
    """``1·x + 0 = x``, and a padding by nothing.

    Left alone where Python that was not traced reads either value: it could change one of them in place, and the
    two would then be the same.
    """

    def rewrite(self, node: Node, graph: Graph) -> Rewrite | None:
        """The source of an identity."""
        match graph.op(node):
            case ChannelAffine(is_identity=True):
                pass
            case Pad(padding=padding) if not any(amount for pair in padding for amount in pair):
                pass
            case _:
                return None
        source = graph.source(node)
        if any(graph.is_opaque(reader) for value in (node, source) for reader in value.users):
            return None
        return Rewrite(((node, source),), "does nothing in eval mode, removed")

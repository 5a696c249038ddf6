"""``conv(pad(x)) -> conv(x)``: an explicit padding becomes the convolution's own."""

from __future__ import annotations

from torch.fx import Node

from reparam.algebra import Conv, Pad
from reparam.errors import AlgebraError
from reparam.rewrite import Apply, Graph, Missed, Rewrite, Rule, describe


class PadBeforeConv(Rule):
    """``W *_p pad_q(x) = W *_(p+q) x``, exact for zeros, and for other paddings when only one of the two pads.

    The result may pad one side more than the other, which torch's layers cannot; it is then padded explicitly after
    all, unless a parallel branch evens it out.
    """

    def rewrite(self, node: Node, graph: Graph) -> Rewrite | Missed | None:
        """The convolution with the padding in it."""
        conv = graph.op(node)
        if not isinstance(conv, Conv):
            return None
        source = graph.source(node)
        pad = graph.op(source)
        if not isinstance(pad, Pad):
            return None
        obstacle = graph.obstacle(source, node)
        if obstacle is not None:
            return Missed(obstacle)
        try:
            fused = conv.after(pad)
        except AlgebraError as reason:
            return Missed(str(reason))
        value = Apply(fused, graph.source(source), ((1.0, node),))
        return Rewrite(((node, value),), f"took {describe(source)} into {describe(node)}")

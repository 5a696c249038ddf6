"""``cat(conv(x), conv(x)) -> conv(x)``: branches side by side, when each of their outputs goes nowhere else."""

from __future__ import annotations

from torch.fx import Node

from reparam.algebra import Conv, concatenate
from reparam.algebra.cost import Choice
from reparam.errors import AlgebraError
from reparam.graph import views
from reparam.graph.graph import Graph, describe
from reparam.rewrite.rule import Apply, Missed, Rewrite, Rule


class ConcatenatedBranches(Rule):
    """``[W1*x; W2*x] = [W1; W2]*x`` for convolutions, or matrix products, of one input along their channels."""

    def rewrite(self, node: Node, graph: Graph) -> Rewrite | Missed | None:
        """One convolution for all branches of a concatenation."""
        if not views.concatenates(node):
            return None
        try:
            parts, axis = views.concatenation(node)
        except AlgebraError:
            return None
        convs = [conv for part in parts if isinstance(conv := graph.op(part), Conv) and conv.axis == axis]
        if len(convs) < len(parts) or len(parts) < 2 or len({graph.source(part) for part in parts}) > 1:
            return None
        if any(list(part.users) != [node] for part in parts) or len(set(parts)) < len(parts):
            return Missed("one of the concatenated branches is read elsewhere")
        source = graph.source(parts[0])
        try:
            merged = concatenate(convs, outline=True)
            kernels = sum(map(graph.kernels, parts)) + 1
            choice = Choice(merged, tuple((conv,) for conv in convs), kernels, "concatenation", graph.shape(source))
            obstacle = graph.cost.too_costly(choice, graph.path(node))
            if obstacle is not None:
                return Missed(f"the concatenated branches stay apart: {obstacle}")
            merged = concatenate(convs)
        except AlgebraError as reason:
            return Missed(f"the concatenated branches stay apart: {reason}")
        message = f"merged {', '.join(map(describe, parts))} side by side"
        return Rewrite.one(node, Apply.one(node, merged, source), message)

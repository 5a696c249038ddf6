"""``conv(x), conv(x) -> slices of one conv(x)``: convolutions, or matrix products, that read the same value."""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import Node

from reparam.algebra import Conv, concatenate
from reparam.algebra.cost import Choice
from reparam.errors import AlgebraError
from reparam.graph.graph import Graph, describe
from reparam.rewrite.rule import Apply, Rewrite, Rule, Slice


class SiblingConvolutions(Rule):
    """``W1*x = ([W1; W2]*x)[:n]``, ``W2*x = ([W1; W2]*x)[n:]``, and so on for all that read ``x`` and are worth it.

    The channels of one kernel are handed out without a copy. That reads ``x`` once, and computes as much as before, or
    more where a smaller kernel is written over the taps of a larger one: whether it is faster is for the clock to say
    (:mod:`reparam.tuning.latency`). Unlike :class:`reparam.passes.ConcatenatedBranches`, it needs nobody to put the
    outputs side by side. Queries, keys and values of attention, and branches of an Inception block, are the usual
    places. It comes last: a norm would not find its convolution behind a slice.
    """

    last = True

    def rewrite(self, node: Node, graph: Graph) -> Rewrite | None:
        """Slices of one convolution in the places of several; visited at the first of them."""
        first = graph.op(node)
        if not isinstance(first, Conv):
            return None
        source = graph.source(node)
        readers = sorted(reader for reader in source.users if isinstance(graph.op(reader), Conv))
        if readers[0] is not node or len(readers) < 2:
            return None
        siblings = [node]
        for reader in readers[1:]:
            if self._fits([*siblings, reader], source, graph):
                siblings.append(reader)
        if len(siblings) < 2:
            return None
        return self._merge(siblings, source, graph)

    def _fits(self, siblings: Sequence[Node], source: Node, graph: Graph) -> bool:
        """Whether one convolution in the place of all is possible, and worth it."""
        convs = _convs(siblings, graph)
        if any(list(sibling.all_input_nodes).count(source) != 1 or not graph.kernels(sibling) for sibling in siblings):
            return False
        try:
            merged = concatenate(convs, outline=True)
        except AlgebraError:
            return False
        kernels = sum(map(graph.kernels, siblings))
        choice = Choice(merged, tuple((conv,) for conv in convs), kernels, "several", graph.shape(source))
        return graph.cost.too_costly(choice, graph.path(siblings[0])) is None

    def _merge(self, siblings: Sequence[Node], source: Node, graph: Graph) -> Rewrite:
        convs = _convs(siblings, graph)
        whole = Apply(concatenate(convs), source, tuple((1.0, sibling) for sibling in siblings))
        values, start = [], 0
        for sibling, conv in zip(siblings, convs, strict=True):
            values.append((sibling, Slice(whole, start, conv.out_channels)))
            start += conv.out_channels
        return Rewrite(tuple(values), f"merged {', '.join(map(describe, siblings))}, which read the same value")


def _convs(nodes: Sequence[Node], graph: Graph) -> list[Conv]:
    return [conv for node in nodes if isinstance(conv := graph.op(node), Conv)]

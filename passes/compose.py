"""``outer(inner(x)) -> fused(x)``: an operator takes in the one that it reads."""

from __future__ import annotations

from typing import Any, ClassVar

from torch.fx import Node

from reparam.algebra import Operator, compose
from reparam.algebra.kernels import kernels_of
from reparam.errors import AlgebraError
from reparam.graph.graph import Graph, describe
from reparam.rewrite.rule import Apply, Missed, Rewrite, Rule


class Compose(Rule):
    """Two operators in a row become one, when nothing else reads the value between them.

    Attributes:
        outer: Types of the operator that is visited.
        inner: Types of the operator that it reads.
        explains: Whether there is a remark where the two stay apart.
    """

    outer: ClassVar[tuple[Any, ...]]
    inner: ClassVar[tuple[Any, ...]]
    explains: ClassVar[bool] = True

    def rewrite(self, node: Node, graph: Graph) -> Rewrite | Missed | None:
        """One operator for two."""
        found = self._compose(node, graph)
        return None if isinstance(found, Missed) and not self.explains else found

    def _compose(self, node: Node, graph: Graph) -> Rewrite | Missed | None:
        outer = graph.op(node)
        if not isinstance(outer, self.outer):
            return None
        source = graph.source(node)
        inner = graph.op(source)
        if not isinstance(inner, self.inner):
            return None
        obstacle = graph.obstacle(source, node)
        if obstacle is not None:
            return Missed(obstacle)
        try:
            obstacle = self.too_costly(node, graph, outer, inner)
            if obstacle is not None:
                return Missed(obstacle)
            fused = compose(outer, inner)
        except AlgebraError as reason:
            return Missed(str(reason))
        if kernels_of(fused) > graph.kernels(node) + graph.kernels(source):
            return Missed("one operator would launch more kernels")
        value = Apply(fused, graph.source(source), ((1.0, node),))
        return Rewrite(((node, value),), f"folded {describe(node)} into {describe(source)}")

    def too_costly(self, node: Node, graph: Graph, outer: Operator, inner: Operator) -> str | None:
        """Why one operator would not be faster than the two, the outer one at ``node``; None when it would."""
        return None

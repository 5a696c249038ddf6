"""``identity(x) -> x``: dropout in eval mode, nn.Identity, ``x * 1``, ``x + 0``, a norm that is one, views undone."""

from __future__ import annotations

from torch.fx import Node

from reparam.algebra import ChannelAffine, Pad
from reparam.graph import facts, views
from reparam.graph.graph import Graph
from reparam.rewrite.rule import Rewrite, Rule


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
        if _might_be_changed(graph, node, source):
            return None
        return Rewrite(((node, source),), "does nothing in eval mode, removed")


class RemoveViewsUndone(Rule):
    """``transpose(transpose(x)) = x``, ``reshape_as(flatten(x), x) = x``: what is left of a norm between them."""

    def rewrite(self, node: Node, graph: Graph) -> Rewrite | None:
        """The value that a chain of views returns to."""
        found = _permuted_back(node) or _reshaped_back(node)
        if found is None:
            return None
        source, *views_between = found
        if _might_be_changed(graph, node, source):
            return None
        message = "a view that the one before it undoes, removed"
        return Rewrite(((node, source),), message, (node,), tuple(views_between))


def _might_be_changed(graph: Graph, node: Node, source: Node) -> bool:
    """Whether untraced Python reads either of two values that would become one."""
    return any(graph.is_opaque(reader) for value in (node, source) for reader in value.users)


_PERMUTATIONS = frozenset("transpose swapaxes swapdims permute t".split())
_RESHAPES = frozenset("view reshape view_as reshape_as flatten unflatten unsqueeze squeeze".split())


def _permuted_back(node: Node) -> list[Node] | None:
    """The value whose axes a chain of permutations has put back in order, and the chain but for its end."""
    order: list[int] | None = None
    passed: list[Node] = []
    while facts.target_name(node) in _PERMUTATIONS and (moved := views.axes(node)) is not None:
        to = [axis for axis in moved.to if axis is not None]
        order = [order[axis] for axis in to] if order is not None else to
        node = node.args[0]  # type: ignore[assignment]
        if order == sorted(order):
            return [node, *passed]
        passed.append(node)
    return None


def _reshaped_back(node: Node) -> list[Node] | None:
    """The value that a chain of reshapes has given its own shape again, and the chain but for its end."""
    if facts.target_name(node) not in ("view_as", "reshape_as") or len(node.args) != 2:
        return None
    value, like = node.args
    passed: list[Node] = []
    while isinstance(value, Node) and value is not like and facts.target_name(value) in _RESHAPES:
        passed.append(value)
        value = value.args[0]
    return [value, *passed] if isinstance(value, Node) and value is like else None

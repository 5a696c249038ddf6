"""``identity(x) -> x``: dropout in eval mode, nn.Identity, ``x * 1``, ``x + 0``, a norm that is one, views undone."""

from __future__ import annotations

from torch.fx import Node

from reparam.algebra import ChannelAffine, Pad
from reparam.graph import facts, names, views
from reparam.graph.graph import Graph
from reparam.rewrite.rule import Rewrite, Rule


class RemoveNoOp(Rule):
    """``1·x + 0 = x``, and a padding by nothing."""

    def rewrite(self, node: Node, graph: Graph) -> Rewrite | None:
        """The source of an identity."""
        match graph.op(node):
            case ChannelAffine(is_identity=True):
                pass
            case Pad(padding=padding) if not any(amount for pair in padding for amount in pair):
                pass
            case _:
                return None
        return Rewrite.one(node, graph.source(node), "does nothing in eval mode, removed")


class RemoveViewsUndone(Rule):
    """``transpose(transpose(x)) = x``, ``reshape_as(flatten(x), x) = x``: what is left of a norm between them."""

    def rewrite(self, node: Node, graph: Graph) -> Rewrite | None:
        """The value that a chain of views returns to."""
        found = _permuted_back(node) or _reshaped_back(node)
        if found is None:
            return None
        source, *views_between = found
        message = "a view that the one before it undoes, removed"
        return Rewrite(((node, source),), message, (node,), tuple(views_between))


_RESHAPES = names.RESHAPES | names.row("flatten unflatten unsqueeze squeeze")


def _permuted_back(node: Node) -> list[Node] | None:
    """The value whose axes a chain of permutations has put back in order, and the chain but for its end."""
    order: list[int] | None = None
    passed: list[Node] = []
    while facts.target_name(node) in names.PERMUTATIONS and (moved := views.axes(node)) is not None:
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

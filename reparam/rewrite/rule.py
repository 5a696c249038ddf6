"""What a rule looks at and what it returns: rewrites as expressions, and refusals with their reasons."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

from torch.fx import Node

from reparam.algebra import Conv, Operator
from reparam.graph.graph import Graph


@dataclass(frozen=True)
class Apply:
    """``operator(source)``, which equals ``sum(coefficient * term)`` over the terms that it stands for.

    Attributes:
        operator: What is applied.
        source: To what.
        terms: Pairs of a coefficient and a node.
        also: Nodes that went into the operator from elsewhere; they have a say in its name.
    """

    operator: Operator
    source: Node
    terms: tuple[tuple[float, Node], ...]
    also: tuple[Node, ...] = ()

    @classmethod
    def one(cls, node: Node, operator: Operator, source: Node, also: tuple[Node, ...] = ()) -> Apply:
        """``operator(source)``, which equals one node."""
        return cls(operator, source, ((1.0, node),), also)


@dataclass(frozen=True)
class Add:
    """``sum(coefficient * expression)``, which equals the node's own sum term by term."""

    terms: tuple[tuple[float, Node | Apply], ...]


@dataclass(frozen=True)
class Slice:
    """Some channels of ``whole``, without a copy; several values of one rewrite may be slices of the same whole.

    Attributes:
        whole: What is computed. Its terms are the nodes that its slices stand for.
        start: The first channel.
        length: How many.
    """

    whole: Apply
    start: int
    length: int

    @property
    def axis(self) -> int:
        """The channels' axis, counted from the end."""
        assert isinstance(self.whole.operator, Conv)
        return self.whole.operator.axis


Expression: TypeAlias = "Node | Apply | Add | Slice"


@dataclass(frozen=True)
class Rewrite:
    """Nodes and the expressions that take their places, all at once.

    Attributes:
        values: What replaces what.
        message: What was done, for the remark.
        outputs: Nodes that compute what they computed before once all values are replaced. Left out, every value
            equals its node by itself.
        through: Nodes that stay, and lie between what is replaced and the outputs.
    """

    values: tuple[tuple[Node, Expression], ...]
    message: str
    outputs: tuple[Node, ...] = ()
    through: tuple[Node, ...] = ()

    @classmethod
    def one(cls, node: Node, value: Expression, message: str) -> Rewrite:
        """One node and what takes its place."""
        return cls(((node, value),), message)


@dataclass(frozen=True)
class Missed:
    """A match that was refused.

    Attributes:
        reason: Why, in the user's terms.
        node: The node that stays because of it; the visited one when left out.
    """

    reason: str
    node: Node | None = None


class Rule:
    """One idea: looks at one node, and returns what could take its place.

    Subclass it, state the formula in the docstring, and put an instance into the list given to
    :func:`reparam.compile`.

    Attributes:
        last: Whether the rule is tried only when no other matches any more, and none is tried after it.
    """

    last: ClassVar[bool] = False

    def rewrite(self, node: Node, graph: Graph) -> Rewrite | Missed | Iterable[Rewrite] | None:
        """What replaces ``node``, why nothing does, or None when the rule has no business here.

        Several rewrites are tried in this order: the first one takes place that nobody notices by memory.
        """
        raise NotImplementedError

    @property
    def name(self) -> str:
        """The name that remarks carry."""
        return type(self).__name__


def applies(change: Rewrite) -> list[Apply]:
    """The operators that a rewrite brings in, but for those that only slices are read of."""
    found = []
    for _, value in change.values:
        if isinstance(value, Apply):
            found.append(value)
        elif isinstance(value, Add):
            found += [term for _, term in value.terms if isinstance(term, Apply)]
    return found


def kept(value: Expression) -> Node | None:
    """The node that takes a place as it is, without anything that is computed anew; None when there is none."""
    if isinstance(value, Add) and len(value.terms) == 1 and value.terms[0][0] == 1.0:
        value = value.terms[0][1]
    return value if isinstance(value, Node) else None


def remaining(change: Rewrite) -> list[Node]:
    """The nodes that a rewrite keeps, as values or as terms."""
    found = []
    for _, value in change.values:
        terms: list[Any] = [term for _, term in value.terms] if isinstance(value, Add) else [value]
        found += [term for term in terms if isinstance(term, Node)]
    return found


def touched(change: Rewrite) -> list[Node]:
    """All nodes that a rewrite may erase."""
    found: dict[Node, None] = {}
    pending = [node for node, _ in change.values]
    sources = {value.whole.source for _, value in change.values if isinstance(value, Slice)}
    stop = {apply.source for apply in applies(change)} | sources | set(remaining(change))
    while pending:
        node = pending.pop()
        if node in found or node in stop:
            continue
        found[node] = None
        pending.extend(node.all_input_nodes)
    return list(found)

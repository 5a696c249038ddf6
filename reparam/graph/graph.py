"""A graph and what its nodes compute: the questions that rules, texts and drawings ask."""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping
from dataclasses import dataclass, field

import torch
import torch.fx
from torch import nn
from torch.fx import Node

from reparam.algebra import ChannelAffine, Operator
from reparam.algebra.cost import Cost
from reparam.graph import facts, measure, views
from reparam.graph.leaves import is_opaque
from reparam.graph.lift import Refusal, Sum, lift
from reparam.graph.text import text


@dataclass
class Graph:
    """A graph: torch.fx nodes, and what each of them computes.

    Attributes:
        fx: The torch.fx graph.
        modules: The module at every path that its names refer to; the root at the empty one.
        cost: Decides where a rewrite might not pay.
    """

    fx: torch.fx.Graph
    modules: MutableMapping[str, nn.Module]
    cost: Cost = field(default_factory=Cost)
    _lifted: dict[Node, Operator | Sum | Refusal | None] = field(default_factory=dict)

    def op(self, node: Node) -> Operator | Sum | Refusal | None:
        """The operator that ``node`` applies, the sum that it is, or None."""
        if node not in self._lifted:
            self._lifted[node] = self._lift(node)
        return self._lifted[node]

    def _lift(self, node: Node) -> Operator | Sum | Refusal | None:
        if isinstance(node.target, Operator):
            return node.target
        # An operator applied to a constant is a constant: there is nothing to rewrite.
        applied = any(source.op != "get_attr" for source in node.all_input_nodes)
        return lift(node, self.modules) if applied else None

    def forget(self, nodes: Iterable[Node] | None = None) -> None:
        """Look again at what some nodes compute when next asked; left out: all of them."""
        if nodes is None:
            self._lifted.clear()
        for node in nodes or ():
            self._lifted.pop(node, None)

    def source(self, node: Node) -> Node:
        """The activation that a linear operator reads."""
        return next(source for source in node.all_input_nodes if source.op != "get_attr")

    def shape(self, node: Node) -> tuple[int, ...] | None:
        """The shape that a value had in the example, or None when there is none."""
        shape = facts.of(node).shape
        return None if shape is None else tuple(shape)

    def readers(self, node: Node) -> list[Node]:
        """The nodes that read the values of ``node``, not just its shape or type."""
        return [reader for reader in node.users if not facts.reads_only_metadata_of(reader, node)]

    def obstacle(self, node: Node, reader: Node) -> str | None:
        """Why ``node`` cannot be absorbed into ``reader``, its reader, or None when it can.

        Its value must not be needed elsewhere. Its shape may be, when another value of that shape remains.
        """
        readers = self.readers(node)
        if len(readers) > 1:
            return f"{describe(node)} has {len(readers)} readers"
        if len(node.users) > len(readers) and self.shape_twin(node, reader) is None:
            return f"the shape of {describe(node)} is read"
        return None

    def shape_twin(self, node: Node, reader: Node) -> str | None:
        """Where else the shape of an absorbed node can be read: at its source, or at the result."""
        if isinstance(self.op(node), ChannelAffine):
            return "source"
        return "result" if isinstance(self.op(reader), (ChannelAffine, Sum)) else None

    def is_opaque(self, node: Node) -> bool:
        """Whether a node calls Python that was not traced, and of which nothing else is known."""
        return is_opaque(node, self.modules)

    def lets_pass(self, node: Node) -> bool:
        """Whether a node might let a per-channel affine pass; see :mod:`reparam.rewrite.passage`."""
        operator = self.op(node)
        passes = isinstance(operator, Sum) or (isinstance(operator, Operator) and operator.passes)
        return passes or views.concatenates(node) or moves(node)

    def kernels(self, node: Node) -> int:
        """Kernels that ``node`` launches."""
        return len(measure.kinds_of(node, self.modules))

    def path(self, node: Node) -> str:
        """The module path that a remark about ``node`` names."""
        return str(node.target) if node.op == "call_module" else facts.of(node).scope

    def __str__(self) -> str:
        return text(self)


def describe(node: Node) -> str:
    """A value, for a remark: the layer that made it, or the operation."""
    if node.op == "call_module":
        return str(node.target)
    if node.op in ("placeholder", "output"):
        return f"the input {node.target}" if node.op == "placeholder" else "the output"
    where = facts.of(node).scope
    name = facts.target_name(node) or str(node.name)
    return f"{name} in {where}" if where else name


def origins(node: Node) -> frozenset[str]:
    """Paths of the modules whose parameters went into a node."""
    if (found := facts.of(node).origins) is not None:
        return found
    if node.op == "call_module":
        return frozenset([str(node.target)])
    owners = [str(source.target).rpartition(".")[0] for source in node.all_input_nodes if source.op == "get_attr"]
    named = [owner for owner in owners if owner]
    return frozenset(named)


def calls(node: Node) -> tuple[str, ...]:
    """What a node is made of, to tell two uses of the same layers from two different ones."""
    if (found := facts.of(node).calls) is not None:
        return found
    constants = [str(source.target) for source in node.all_input_nodes if source.op == "get_attr"]
    called = node.target if node.op == "call_module" else facts.target_name(node)
    return (f"{node.op} {called} {' '.join(constants)}",)


def moves(node: Node) -> bool:
    """Whether a node hands values on in another order or form, in parts, or products of them."""
    return (
        views.axes(node) is not None or views.separates(node) or views.part(node) is not None or views.multiplies(node)
    )

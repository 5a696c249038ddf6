"""Changes of a graph: rewrites put into it, and what nobody reads taken out of it. The driver alone makes them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from reparam.algebra import Operator
from reparam.graph import aliasing, facts, views
from reparam.graph.graph import Graph, calls, origins
from reparam.rewrite import safety
from reparam.rewrite.rule import Add, Apply, Expression, Rewrite, Slice


@dataclass
class Editor:
    """What changes a graph.

    Attributes:
        graph: The graph. It forgets what it knew of nodes that change.
    """

    graph: Graph
    _layouts_free: bool = False

    def settle(self) -> list[Node]:
        """Look again at what is known of values without an example: a merged layer may show what none did before.

        Returns:
            The nodes of whose values, or whose inputs, more is known now.
        """
        thawed = self._thaw()
        known = {node: _known(node) for node in self.graph.fx.nodes}
        views.settle(self.graph.fx.nodes, self.graph.modules)
        changed = {node for node, before in known.items() if _known(node) != before}
        affected = [
            node for node in self.graph.fx.nodes if node in changed or not changed.isdisjoint(node.all_input_nodes)
        ]
        self.graph.forget(affected)
        return list(self.graph.fx.nodes) if thawed else affected

    def _thaw(self) -> bool:
        """Look again at memory that is written to under several names, some of which may be gone."""
        frozen = [node for node in self.graph.fx.nodes if facts.of(node).frozen not in (None, aliasing.OUTSIDE)]
        if not frozen:
            return False
        for node in frozen:
            facts.know(node, frozen=None)
        aliasing.make_out_of_place(self.graph.fx, self.graph.modules)
        if all(facts.of(node).frozen is not None for node in frozen):
            return False
        self.graph.forget()
        self.remove_unused()
        return True

    def _materialise(self, value: Expression, replaced: Node) -> tuple[Node, list[Node]]:
        """Put an expression into the graph: the node that holds it, and all new nodes."""
        match value:
            case Node():
                return value, []
            case Apply():
                node = self._materialise_apply(value, replaced)
                return node, [node]
            case Add():
                return self._materialise_add(value, replaced)
            case Slice():
                return self._materialise_slice(value, replaced)

    def _materialise_apply(self, value: Apply, replaced: Node) -> Node:
        region = _region([term for _, term in value.terms], value.source)
        # Where the source is read first: there its value is what all of them read, and every user comes later.
        anchor = region[0] if region else replaced
        with self.graph.fx.inserting_before(anchor):
            node = self.graph.fx.create_node("call_function", value.operator, (value.source,), {}, value.operator.name)
        facts.know(node, **_merged([*region, *value.also], value.operator, replaced))
        return node

    def _materialise_slice(self, value: Slice, replaced: Node) -> tuple[Node, list[Node]]:
        made: list[Node] = []
        whole = next((user for user in value.whole.source.users if user.target is value.whole.operator), None)
        if whole is None:
            whole = self._materialise_apply(value.whole, replaced)
            facts.know(whole, shape=None, example=None)  # those of a slice
            made.append(whole)
        with self.graph.fx.inserting_after(whole):
            node = self.graph.fx.call_function(torch.narrow, (whole, value.axis, value.start, value.length))
        known = facts.of(replaced).only("scope", "kind", "rank", "shape", "example")
        facts.know(node, **known, origins=frozenset(), channels=(value.length, value.axis))
        return node, [*made, node]

    def _materialise_add(self, value: Add, replaced: Node) -> tuple[Node, list[Node]]:
        made: list[Node] = []
        terms = []
        for coefficient, term in value.terms:
            node, new = self._materialise(term, replaced)
            made += new
            terms.append((coefficient, node))
        # A term that need not be scaled or negated goes first.
        terms.sort(key=lambda term: term[0] != 1.0)

        def call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
            node = self.graph.fx.call_function(function, args, kwargs)
            facts.know(node, **facts.of(replaced).only("scope", "kind", "rank", "example"), origins=frozenset())
            made.append(node)
            return node

        with self.graph.fx.inserting_before(replaced):
            (coefficient, total), *others = terms
            if coefficient != 1.0:
                total = call(operator.mul, total, coefficient)
            # One kernel a term, whatever its coefficient: a factor of the whole sum costs nothing when it is spread.
            for coefficient, node in others:
                if abs(coefficient) == 1.0:
                    total = call(operator.add if coefficient > 0 else operator.sub, total, node)
                else:
                    total = call(torch.add, total, node, alpha=coefficient)
        return total, made

    def apply(self, rewrite: Rewrite) -> tuple[list[Node], list[Node]]:
        """Perform a rewrite; returns the nodes that came and those that went."""
        new: list[Node] = []
        placed: dict[Node, Node] = {}
        if safety.laid_out_anew(self.graph, rewrite):
            self._free_layouts()
        for node, value in rewrite.values:
            twins = self._twins(node, value)
            result, made = self._materialise(value, node)
            views.settle(made, self.graph.modules)
            # What takes a place may be a node that is itself replaced: all are, at once.
            result = placed.get(result, result)
            new += made
            for absorbed, fused in twins.items():
                twin = next((new for new in made if new.target is fused), None) or self._surviving(absorbed, twins)
                for reader in [user for user in absorbed.users if facts.reads_only_metadata_of(user, absorbed)]:
                    reader.replace_input_with(absorbed, twin)
            node.replace_all_uses_with(result)
            if facts.of(result).channels is None:  # of what goes, a layer may have been the only one to show them
                facts.know(result, channels=facts.of(node).channels)
            # A sum names its terms, which have just changed, also where a stack holds them.
            for reader in result.users:
                self.graph.forget((reader, *reader.users))
            placed[node] = result
        return new, self._erase(list(placed))

    def _free_layouts(self) -> None:
        """Let no view rely on how its input lies in memory: a norm made new memory of a permuted value, and goes."""
        if self._layouts_free:
            return
        self._layouts_free = True
        for node in self.graph.fx.nodes:
            if node.op == "call_method" and node.target in ("view", "view_as") and facts.of(node).frozen is None:
                node.target = str(node.target).replace("view", "reshape")

    def _twins(self, node: Node, value: Expression) -> dict[Node, Operator | None]:
        """For every absorbed node whose shape is read, the operator with a result of that shape; None: its source."""
        applies = [value] if isinstance(value, Apply) else []
        if isinstance(value, Add):
            applies = [term for _, term in value.terms if isinstance(term, Apply)]
        twins: dict[Node, Operator | None] = {}
        for apply in applies:
            for absorbed in _region([term for _, term in apply.terms], apply.source):
                if absorbed is not node and len(absorbed.users) > len(self.graph.readers(absorbed)):
                    reader = next(iter(self.graph.readers(absorbed)))
                    twins[absorbed] = None if self.graph.shape_twin(absorbed, reader) == "source" else apply.operator
        return twins

    def _surviving(self, node: Node, twins: dict[Node, Operator | None]) -> Node:
        while node in twins and twins[node] is None:
            node = self.graph.source(node)
        return node

    def remove_unused(self) -> list[Node]:
        """Erase what nobody reads and what does nothing but return a value; returns the nodes that went."""
        return self._erase([node for node in self.graph.fx.nodes if not node.users])

    def _is_pure(self, node: Node) -> bool:
        """Whether running a node does nothing but return a value."""
        if node.op == "call_module":
            return not self.graph.is_opaque(node) and not aliasing.is_in_place(node, self.graph.modules)
        # Checks that the tracer itself puts in are functions of torch.fx.
        checks = str(getattr(node.target, "__module__", "")).startswith("torch.fx")
        return not checks and not aliasing.is_in_place(node, self.graph.modules) and not node.is_impure()

    def _erase(self, pending: list[Node]) -> list[Node]:
        """Erase nodes that nobody reads, and what only they read."""
        erased = []
        while pending:
            node = pending.pop()
            if node.users or node.graph is not self.graph.fx or node._erased or node.op in ("placeholder", "output"):
                continue
            if not self._is_pure(node):
                continue
            inputs = node.all_input_nodes
            self.graph.fx.erase_node(node)
            erased.append(node)
            pending.extend(inputs)
        return erased


def _region(terms: Iterable[Node], source: Node) -> list[Node]:
    """The nodes between ``source`` and the terms, terms included, in graph order."""
    found: set[Node] = set()
    pending = [term for term in terms if term is not source]
    while pending:
        node = pending.pop()
        if node in found or node is source or node.op == "get_attr":
            continue
        found.add(node)
        pending.extend(node.all_input_nodes)
    return sorted(found)


def _known(node: Node) -> tuple[object, ...]:
    """What is known of a value."""
    return tuple(facts.of(node).only("rank", "axes", "channels").values())


def _merged(region: Sequence[Node], operator: Operator, replaced: Node) -> dict[str, Any]:
    """What is known of an operator that takes the place of several nodes."""
    known = facts.of(replaced).only("scope", "rank", "shape", "example") | {
        "kind": "tensor",
        "origins": frozenset().union(*(origins(node) for node in region)),
        "calls": tuple(call for node in region for call in calls(node)),
    }
    if operator.makes is not None:
        known |= {"channels": operator.makes, "layer": True}
    return known | {"rank": known["rank"] or operator.rank, "keeps_shape": operator.keeps_shape}

"""A graph and what its nodes compute: the questions that rules, texts and drawings ask."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx
from torch import nn
from torch.fx import Node

from reparam.algebra.cost import Cost
from reparam.algebra.kernels import kernels_of
from reparam.algebra.operators import AveragePool, ChannelAffine, Conv, ConvTranspose, Operator, Pad
from reparam.graph import aliasing, facts, views
from reparam.graph.leaves import is_opaque
from reparam.graph.lift import Refusal, Sum, lift
from reparam.rewrite.rule import Add, Apply, Expression, Rewrite, Slice


@dataclass
class Graph:
    """A graph under rewriting: fx nodes, and what each of them computes.

    Attributes:
        fx: The torch.fx graph.
        modules: The module at every path that its names refer to; the root at the empty one.
        cost: Decides where a rewrite might not pay.
    """

    fx: torch.fx.Graph
    modules: MutableMapping[str, nn.Module]
    cost: Cost = field(default_factory=Cost)
    _lifted: dict[Node, Operator | Sum | Refusal | None] = field(default_factory=dict)
    _opaque: list[Node] | None = None
    _views: list[Node] | None = None
    _free: bool = False

    # Questions that rules ask.

    def op(self, node: Node) -> Operator | Sum | Refusal | None:
        """The operator that ``node`` applies, the sum that it is, or None."""
        if node not in self._lifted:
            self._lifted[node] = self._lift(node)
        return self._lifted[node]

    def _lift(self, node: Node) -> Operator | Sum | Refusal | None:
        if isinstance(node.target, Operator):
            return node.target
        # An operator applied to a constant is a constant, and none of anybody's business.
        applied = any(source.op != "get_attr" for source in node.all_input_nodes)
        return lift(node, self.modules) if applied else None

    def source(self, node: Node) -> Node:
        """The activation that a linear operator reads."""
        return next(source for source in node.all_input_nodes if source.op != "get_attr")

    def shape(self, node: Node) -> tuple[int, ...] | None:
        """The shape that a value had in the example, or None when there is none."""
        shape = node.meta.get("shape")
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
        if len(node.users) > len(readers) and self._shape_twin(node, reader) is None:
            return f"the shape of {describe(node)} is read"
        return None

    def is_changed_between(self, source: Node, first: Node, last: Node) -> bool:
        """Whether ``source`` might be changed in place after ``first`` has read it and before ``last`` does.

        Only Python that was not traced could still do that.
        """
        return any(
            self.is_opaque(reader) and first < reader < last
            for alias in self._aliases(source)
            for reader in alias.users
        )

    def may_change_between(self, source: Node, first: Node, last: Node) -> bool:
        """The same for a value that may be a view of another, or is read through views.

        What Python that was not traced changes may then be known under any name.
        """
        if self._opaque is None:  # no rewrite makes any
            self._opaque = [node for node in self.fx.nodes if self.is_opaque(node)]
        return any(first < node < last for node in self._opaque if not node._erased)

    def relies_on_layout(self, norm: Node) -> str | None:
        """Why the values behind a norm must lie in memory as the norm puts them, or None when they need not.

        A view is as good as a reshape, except where somebody writes to the memory that it shares.
        """
        if self._views is None:  # no rewrite makes any
            self._views = [n for n in self.fx.nodes if n.op == "call_method" and n.target in ("view", "view_as")]
        written = [view for view in self._views if "frozen" in view.meta]
        if self._views and self.may_change_between(norm, norm, next(iter(reversed(self.fx.nodes)))):
            written.append(self._views[-1])
        last = next((view for view in reversed(written) if norm < view), None)
        return None if last is None else f"the memory that {describe(last)} shares may be written to"

    def is_opaque(self, node: Node) -> bool:
        """Whether a node calls Python that was not traced, and of which nothing else is known."""
        return is_opaque(node, self.modules)

    def lets_pass(self, node: Node) -> bool:
        """Whether a node might let a per-channel affine pass; see :mod:`reparam.passage`."""
        return isinstance(self.op(node), Sum) or views.concatenates(node) or moves(node)

    def kernels(self, node: Node) -> int:
        """Kernels that ``node`` launches."""
        operator = self.op(node)
        match operator:
            case Conv() | Pad() | AveragePool() if facts.target_name(node) == "getitem":
                return 0  # a view
            case Conv() | ConvTranspose() | ChannelAffine() | Pad() | AveragePool():
                return kernels_of(operator)
            case Sum():
                return max(1, len(operator.terms) - 1)
        is_free = node.op in ("placeholder", "get_attr", "output") or node.target is torch.narrow  # a view
        return 0 if is_free or facts.reads_only_metadata(node) else 1

    def path(self, node: Node) -> str:
        """The module path that a remark about ``node`` names."""
        return str(node.target) if node.op == "call_module" else str(node.meta.get("scope", ""))

    def __str__(self) -> str:
        from reparam.graph.text import text

        return text(self)

    def _aliases(self, source: Node) -> Iterable[Node]:
        """``source`` and what might share its memory, as far as opaque modules could reach it."""
        yield source
        yield from (reader for reader in source.users if isinstance(self.op(reader), type(None)))

    # Changes, made by the driver.

    def settle(self) -> list[Node]:
        """Look again at what is known of values without an example: a merged layer may show what none did before.

        Returns:
            The nodes of whose values, or whose inputs, more is known now.
        """
        thawed = self._thaw()
        known = {node: _known(node) for node in self.fx.nodes}
        facts.settle_ranks(self.fx.nodes, self.modules)
        views.settle(self.fx.nodes, self.modules)
        changed = {node for node, before in known.items() if _known(node) != before}
        affected = [node for node in self.fx.nodes if node in changed or not changed.isdisjoint(node.all_input_nodes)]
        for node in affected:
            self._lifted.pop(node, None)
        return list(self.fx.nodes) if thawed else affected

    def _thaw(self) -> bool:
        """Look again at memory that is written to under several names, some of which may be gone."""
        frozen = [node for node in self.fx.nodes if node.meta.get("frozen", aliasing.OUTSIDE) != aliasing.OUTSIDE]
        if not frozen:
            return False
        for node in frozen:
            del node.meta["frozen"]
        aliasing.make_out_of_place(self.fx, self.modules)
        if all("frozen" in node.meta for node in frozen):
            return False
        self._lifted.clear()
        self._views = None
        self.remove_unused()
        return True

    def _shape_twin(self, node: Node, reader: Node) -> str | None:
        """Where else the shape of an absorbed node can be read: at its source, or at the result."""
        if isinstance(self.op(node), ChannelAffine):
            return "source"
        return "result" if isinstance(self.op(reader), (ChannelAffine, Sum)) else None

    def region(self, terms: Iterable[Node], source: Node) -> list[Node]:
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
        region = self.region([term for _, term in value.terms], value.source)
        # Where the source is read first: there its value is what all of them read, and every user comes later.
        anchor = region[0] if region else replaced
        with self.fx.inserting_before(anchor):
            name = _NAMES[type(value.operator)]
            node = self.fx.create_node("call_function", value.operator, (value.source,), {}, name)
        node.meta = _merged_meta([*region, *value.also], value.operator, replaced)
        return node

    def _materialise_slice(self, value: Slice, replaced: Node) -> tuple[Node, list[Node]]:
        made: list[Node] = []
        whole = next((user for user in value.whole.source.users if user.target is value.whole.operator), None)
        if whole is None:
            whole = self._materialise_apply(value.whole, replaced)
            for name in ("shape", "example"):  # those of a slice
                whole.meta.pop(name, None)
            made.append(whole)
        with self.fx.inserting_after(whole):
            node = self.fx.call_function(torch.narrow, (whole, value.axis, value.start, value.length))
        node.meta = {k: v for k, v in replaced.meta.items() if k in ("scope", "kind", "rank", "shape", "example")}
        node.meta |= {"origins": frozenset(), "channels": (value.length, value.axis)}
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
            node = self.fx.call_function(function, args, kwargs)
            node.meta = {k: v for k, v in replaced.meta.items() if k in ("scope", "kind", "rank", "example")} | {
                "origins": frozenset()
            }
            made.append(node)
            return node

        with self.fx.inserting_before(replaced):
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

    def _apply(self, rewrite: Rewrite) -> tuple[list[Node], list[Node]]:
        """Perform a rewrite; returns the nodes that came and those that went."""
        new: list[Node] = []
        placed: dict[Node, Node] = {}
        if rewrite.through:
            self._free_layouts()
        for node, value in rewrite.values:
            twins = self._twins(node, value)
            result, made = self._materialise(value, node)
            views.settle(made, self.modules)
            # What takes a place may be a node that is itself replaced: all are, at once.
            result = placed.get(result, result)
            new += made
            for absorbed, fused in twins.items():
                twin = next((new for new in made if new.target is fused), None) or self._surviving(absorbed, twins)
                for reader in [user for user in absorbed.users if facts.reads_only_metadata_of(user, absorbed)]:
                    reader.replace_input_with(absorbed, twin)
            node.replace_all_uses_with(result)
            # A sum names its terms, which have just changed, also where a stack holds them.
            for reader in result.users:
                for affected in (reader, *reader.users):
                    self._lifted.pop(affected, None)
            placed[node] = result
        return new, self._erase(list(placed))

    def _free_layouts(self) -> None:
        """Let no view rely on how its input lies in memory: a norm made new memory of a permuted value, and goes."""
        if self._free:
            return
        self._free = True
        for node in self.fx.nodes:
            if node.op == "call_method" and node.target in ("view", "view_as") and "frozen" not in node.meta:
                node.target = str(node.target).replace("view", "reshape")

    def _twins(self, node: Node, value: Expression) -> dict[Node, Operator | None]:
        """For every absorbed node whose shape is read, the operator with a result of that shape; None: its source."""
        applies = [value] if isinstance(value, Apply) else []
        if isinstance(value, Add):
            applies = [term for _, term in value.terms if isinstance(term, Apply)]
        twins: dict[Node, Operator | None] = {}
        for apply in applies:
            for absorbed in self.region([term for _, term in apply.terms], apply.source):
                if absorbed is not node and len(absorbed.users) > len(self.readers(absorbed)):
                    reader = next(iter(self.readers(absorbed)))
                    twins[absorbed] = None if self._shape_twin(absorbed, reader) == "source" else apply.operator
        return twins

    def _surviving(self, node: Node, twins: dict[Node, Operator | None]) -> Node:
        while node in twins and twins[node] is None:
            node = self.source(node)
        return node

    def remove_unused(self) -> list[Node]:
        """Erase what nobody reads and what does nothing but return a value; returns the nodes that went."""
        return self._erase([node for node in self.fx.nodes if not node.users])

    def _is_pure(self, node: Node) -> bool:
        """Whether running a node does nothing but return a value."""
        if node.op == "call_module":
            return not self.is_opaque(node) and not aliasing.is_in_place(node, self.modules)
        # Checks that the tracer itself puts in are functions of torch.fx.
        checks = str(getattr(node.target, "__module__", "")).startswith("torch.fx")
        return not checks and not aliasing.is_in_place(node, self.modules) and not node.is_impure()

    def _erase(self, pending: list[Node]) -> list[Node]:
        """Erase nodes that nobody reads, and what only they read."""
        erased = []
        while pending:
            node = pending.pop()
            if node.users or node.graph is not self.fx or node._erased or node.op in ("placeholder", "output"):
                continue
            if not self._is_pure(node):
                continue
            inputs = node.all_input_nodes
            self.fx.erase_node(node)
            erased.append(node)
            pending.extend(inputs)
        return erased


_NAMES = {Conv: "conv", ConvTranspose: "conv_transpose", ChannelAffine: "affine", AveragePool: "pool", Pad: "pad"}


def describe(node: Node) -> str:
    """A value, for a remark: the layer that made it, or the operation."""
    if node.op == "call_module":
        return str(node.target)
    if node.op in ("placeholder", "output"):
        return f"the input {node.target}" if node.op == "placeholder" else "the output"
    where = node.meta.get("scope")
    name = facts.target_name(node) or str(node.name)
    return f"{name} in {where}" if where else name


def _known(node: Node) -> tuple[object, ...]:
    """What is known of a value."""
    return tuple(node.meta.get(name) for name in ("rank", "axes", "channels"))


def _merged_meta(region: Sequence[Node], operator: Operator, replaced: Node) -> dict[str, Any]:
    meta: dict[str, Any] = {
        "scope": replaced.meta.get("scope", ""),
        "kind": "tensor",
        "rank": replaced.meta.get("rank"),
        "origins": frozenset().union(*(origins(node) for node in region)),
        "calls": tuple(call for node in region for call in calls(node)),
    }
    meta |= {name: replaced.meta[name] for name in ("shape", "example") if name in replaced.meta}
    match operator:
        case Conv() | ConvTranspose():
            meta |= {"channels": (operator.out_channels, operator.axis), "layer": True}
            meta["rank"] = meta["rank"] or (operator.dimensions + 2 if operator.dimensions else None)
        case ChannelAffine():
            meta["keeps_shape"] = not operator.may_expand
    return meta


def origins(node: Node) -> frozenset[str]:
    """Paths of the modules whose parameters went into a node."""
    if "origins" in node.meta:
        found: frozenset[str] = node.meta["origins"]
        return found
    if node.op == "call_module":
        return frozenset([str(node.target)])
    owners = [str(source.target).rpartition(".")[0] for source in node.all_input_nodes if source.op == "get_attr"]
    named = [owner for owner in owners if owner]
    return frozenset(named)


def calls(node: Node) -> tuple[str, ...]:
    """What a node is made of, to tell two uses of the same layers from two different ones."""
    if "calls" in node.meta:
        found: tuple[str, ...] = node.meta["calls"]
        return found
    constants = [str(source.target) for source in node.all_input_nodes if source.op == "get_attr"]
    called = node.target if node.op == "call_module" else facts.target_name(node)
    return (f"{node.op} {called} {' '.join(constants)}",)


def moves(node: Node) -> bool:
    """Whether a node hands values on in another order or form, in parts, or products of them."""
    return (
        views.axes(node) is not None or views.separates(node) or views.part(node) is not None or views.multiplies(node)
    )

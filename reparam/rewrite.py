"""The engine: rules that look at one node, and the driver that applies them until none matches.

A :class:`Rule` returns a :class:`Rewrite` (these nodes equal those expressions), a :class:`Missed` (it would have
been a match, but for this reason), or None. The driver certifies each rewrite in float64, puts it into the graph,
checks that the graph became cheaper, and visits the neighbourhood again.

Termination: every rewrite lowers the pair (kernels, nodes), which is bounded below; the driver enforces it. A
rewritten node holds its operator as its target, in float64; :mod:`reparam.emit` makes layers of them when all is
done, so numbers are rounded once.
"""

from __future__ import annotations

import itertools
import operator
from collections import deque
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeAlias

import torch
import torch.fx
from torch import nn
from torch.fx import Node

from reparam import aliasing, facts, measure, views
from reparam.algebra import AveragePool, ChannelAffine, Conv, ConvTranspose, Operator, Pad
from reparam.cost import Cost
from reparam.emit import kernels_of
from reparam.errors import RewriteError
from reparam.leaves import is_opaque
from reparam.lift import Refusal, Sum, lift
from reparam.report import Remark
from reparam.verify import Uncertifiable, certify


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

    def rewrite(self, node: Node, graph: Graph) -> Rewrite | Missed | None:
        """What replaces ``node``, why nothing does, or None when the rule has no business here."""
        raise NotImplementedError

    @property
    def name(self) -> str:
        """The name that remarks carry."""
        return type(self).__name__


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
        return isinstance(self.op(node), Sum) or views.concatenates(node) or _moves(node)

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
        from reparam.text import text

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


# The driver.


@dataclass
class Outcome:
    """What the driver did.

    Attributes:
        remarks: A remark for every rewrite, and for every refusal that stood at the end.
        certificates: Rewrites that were checked.
        largest_error: Largest relative error among the checks.
        spans: For each rewrite of several nodes, the innermost module around all of them.
    """

    remarks: list[Remark] = field(default_factory=list)
    certificates: int = 0
    largest_error: float = 0.0
    spans: set[str] = field(default_factory=set)


def rewrite(
    graph: Graph,
    rules: Sequence[Rule],
    *,
    verify: bool = True,
    progress: Callable[[int, int, str], None] | None = None,
) -> Outcome:
    """Apply rules until none matches.

    Args:
        graph: Changed in place.
        rules: Tried in this order at every node; those that come last when the others are done.
        verify: Certify every rewrite in float64, on random inputs that reach every border, to 1e-9 relative.
        progress: Called with nodes visited, nodes in all, and the module path.

    Raises:
        VerificationError: A rewrite does not compute what it replaces. The graph is then of no use.
        RewriteError: A rule returned a rewrite that does not make the graph cheaper.
    """
    outcome = Outcome()
    for node in graph.remove_unused():
        if node.op == "call_module":
            outcome.remarks.append(Remark("capture", "Unused", graph.path(node), "its output is not used, removed"))
    missed: dict[tuple[Node, str], str] = {}
    _apply_all(graph, [rule for rule in rules if not rule.last], verify, progress, outcome, missed)
    _apply_all(graph, [rule for rule in rules if rule.last], verify, None, outcome, missed)
    for (node, name), reason in missed.items():
        if not node._erased:
            outcome.remarks.append(Remark("missed", name, graph.path(node), reason))
    outcome.remarks += _left_over(graph, {node for node, _ in missed})
    return outcome


def _apply_all(
    graph: Graph,
    rules: Sequence[Rule],
    verify: bool,
    progress: Callable[[int, int, str], None] | None,
    outcome: Outcome,
    missed: dict[tuple[Node, str], str],
) -> None:
    """Apply some of the rules until none of them matches."""
    if not rules:
        return
    total = len(graph.fx.nodes)
    waiting = deque(graph.fx.nodes)
    queued = set(waiting)
    visited, fused = 0, len(outcome.remarks)
    while waiting:
        node = waiting.popleft()
        queued.discard(node)
        if not node._erased:
            visited += 1
            if progress is not None:
                progress(min(visited, total), total, graph.path(node))
            again = [other for other in _visit(graph, rules, node, verify, outcome, missed) if other not in queued]
            waiting.extendleft(reversed(again))
            queued.update(again)
        if not waiting and len(outcome.remarks) > fused:
            fused = len(outcome.remarks)
            waiting.extend(_neighbourhood(graph, graph.settle()))
            queued.update(waiting)


def _visit(
    graph: Graph,
    rules: Sequence[Rule],
    node: Node,
    verify: bool,
    outcome: Outcome,
    missed: dict[tuple[Node, str], str],
) -> list[Node]:
    """Apply the first rule that matches at a node; returns the nodes to look at again."""
    for rule in rules:
        match rule.rewrite(node, graph):
            case None:
                # What stood in the way before may be gone.
                missed.pop((node, rule.name), None)
            case Missed() as refusal:
                missed[refusal.node or node, rule.name] = refusal.reason
            case Rewrite() as change:
                where = graph.path(node)
                if verify:
                    try:
                        error = certify(graph, change, where, rule.name)
                    except Uncertifiable as unknown:
                        missed[node, rule.name] = str(unknown)
                        continue
                    outcome.certificates += 1
                    outcome.largest_error = max(outcome.largest_error, error)
                new = _perform(graph, rule, change, outcome)
                outcome.remarks.append(Remark("fused", rule.name, where, change.message))
                return _neighbourhood(graph, new or _remaining(change))
    return []


def _left_over(graph: Graph, explained: set[Node]) -> Iterable[Remark]:
    """Remarks for the layers that no rule had any business with: every norm that stays says why."""
    for node in graph.fx.nodes:
        kinds = measure.kinds_of(node, graph.modules) if node.op.startswith("call") and node not in explained else []
        operator = graph.op(node)
        if isinstance(operator, Refusal) and kinds and kinds[0] != "other":
            yield Remark("missed", "Lift", graph.path(node), operator.reason)
        elif kinds.count("norms"):
            reason = _why_norm_stays(graph, node)
            if reason is not None:
                yield Remark("missed", "Lift", graph.path(node), reason)


def _why_norm_stays(graph: Graph, node: Node) -> str | None:
    """Why nothing took a norm in."""
    match graph.op(node):
        case ChannelAffine(is_identity=True):
            return None
        case ChannelAffine():
            readers = " and ".join(dict.fromkeys(describe(reader) for reader in graph.readers(node)))
            return f"nothing linear stands next to it: it reads {describe(graph.source(node))}, read by {readers}"
    if "frozen" in node.meta:
        return str(node.meta["frozen"])
    if graph.is_opaque(node):
        return "it is inside a module that could not be traced"
    return "it normalises with statistics of its input, which no constant can replace"


def _perform(graph: Graph, rule: Rule, change: Rewrite, outcome: Outcome) -> list[Node]:
    """Apply a rewrite and check that the graph became cheaper."""
    before = {node: graph.kernels(node) for node in _touched(graph, change)}
    new, erased = graph._apply(change)
    gone = sum(before.get(node, 0) for node in erased)
    made = sum(graph.kernels(node) for node in new)
    counted = len([node for node in erased if node.op != "get_attr"])
    if (made, len(new)) >= (gone, counted):
        raise RewriteError(
            f"{rule.name} replaced {counted} nodes ({gone} kernels) by {len(new)} ({made} kernels): {change.message}; "
            "a rule must make the graph cheaper"
        )
    if counted > 1:
        around = [_around(node) for node in erased if node.op.startswith("call")]
        span = ".".join(_shared([path.split(".") for path in around]))
        outcome.spans.add(span)
        for node in new:
            node.meta["around"] = span
    return new


def _around(node: Node) -> str:
    """Path of the innermost module around a node."""
    if "around" in node.meta or node.op != "call_module":
        return str(node.meta.get("around", node.meta.get("scope", "")))
    return str(node.target).rpartition(".")[0]


def _shared(paths: Sequence[Sequence[str]]) -> list[str]:
    """What some paths have in common from their beginning on."""
    return [names[0] for names in itertools.takewhile(lambda names: len(set(names)) == 1, zip(*paths, strict=False))]


def _touched(graph: Graph, change: Rewrite) -> list[Node]:
    """All nodes that a rewrite may erase."""
    found: dict[Node, None] = {}
    pending = [node for node, _ in change.values]
    sources = {value.whole.source for _, value in change.values if isinstance(value, Slice)}
    stop = {apply.source for apply in applies(change)} | sources | set(_remaining(change))
    while pending:
        node = pending.pop()
        if node in found or node in stop:
            continue
        found[node] = None
        pending.extend(node.all_input_nodes)
    return list(found)


def applies(change: Rewrite) -> list[Apply]:
    """The operators that a rewrite brings in, but for those that only slices are read of."""
    found = []
    for _, value in change.values:
        if isinstance(value, Apply):
            found.append(value)
        elif isinstance(value, Add):
            found += [term for _, term in value.terms if isinstance(term, Apply)]
    return found


def _remaining(change: Rewrite) -> list[Node]:
    """The nodes that a rewrite keeps, as values or as terms."""
    found = []
    for _, value in change.values:
        terms: list[Any] = [term for _, term in value.terms] if isinstance(value, Add) else [value]
        found += [term for term in terms if isinstance(term, Node)]
    return found


def _moves(node: Node) -> bool:
    """Whether a node hands values on in another order or form, in parts, or products of them."""
    return (
        views.axes(node) is not None or views.separates(node) or views.part(node) is not None or views.multiplies(node)
    )


def _neighbourhood(graph: Graph, nodes: Iterable[Node]) -> list[Node]:
    """Nodes whose matches may have changed: the new ones, what they read, and who reads them.

    Sums, views and concatenations on the way are looked through, as norms move through them.
    """
    found: dict[Node, None] = {}
    for node in nodes:
        found[node] = None
        pending = node.all_input_nodes
        while pending:
            source = pending.pop()
            if source not in found and _moves(source):
                pending.extend(source.all_input_nodes)
            found[source] = None
        pending = list(node.users)
        while pending:
            reader = pending.pop()
            if reader in found:
                continue
            found[reader] = None
            # A sum that is read several times is where a residual network goes on and on.
            passes = graph.lets_pass(reader) or reader.target is torch.stack
            if _moves(reader) or (len(reader.users) == 1 and passes):
                pending.extend(reader.users)
    return sorted(found)

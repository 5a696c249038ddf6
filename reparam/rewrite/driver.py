"""The driver: applies rules until none matches.

What a rule returns at a node (:mod:`reparam.rewrite.rule`) is certified in float64, put into the graph by the editor,
and has to have made the graph cheaper; then the neighbourhood is visited again.

Termination: every rewrite lowers the pair (kernels, nodes), which is bounded below; the driver enforces it. A
rewritten node holds its operator as its target, in float64; :mod:`reparam.deploy.emit` makes layers of them when all is
done, so numbers are rounded once.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
import torch.fx
from torch.fx import Node

from reparam.algebra import ChannelAffine
from reparam.errors import RewriteError
from reparam.graph import facts, measure
from reparam.graph.graph import Graph, describe, moves
from reparam.graph.lift import Refusal
from reparam.report import Remark
from reparam.rewrite import safety
from reparam.rewrite.certify import Uncertifiable, certify
from reparam.rewrite.edit import Editor
from reparam.rewrite.rule import Add, Missed, Rewrite, Rule, applies, remaining, touched


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
    editor = Editor(graph)
    for node in editor.remove_unused():
        if node.op == "call_module":
            outcome.remarks.append(Remark("capture", "Unused", graph.path(node), "its output is not used, removed"))
    missed: dict[tuple[Node, str], str] = {}
    _apply_all(editor, [rule for rule in rules if not rule.last], verify, progress, outcome, missed)
    _apply_all(editor, [rule for rule in rules if rule.last], verify, None, outcome, missed)
    for (node, name), reason in missed.items():
        if not node._erased:
            outcome.remarks.append(Remark("missed", name, graph.path(node), reason))
    outcome.remarks += _left_over(graph, {node for node, _ in missed})
    return outcome


def _apply_all(
    editor: Editor,
    rules: Sequence[Rule],
    verify: bool,
    progress: Callable[[int, int, str], None] | None,
    outcome: Outcome,
    missed: dict[tuple[Node, str], str],
) -> None:
    """Apply some of the rules until none of them matches."""
    if not rules:
        return
    graph = editor.graph
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
            again = [other for other in _visit(editor, rules, node, verify, outcome, missed) if other not in queued]
            waiting.extendleft(reversed(again))
            queued.update(again)
        if not waiting and len(outcome.remarks) > fused:
            fused = len(outcome.remarks)
            waiting.extend(_neighbourhood(graph, editor.settle()))
            queued.update(waiting)


def _visit(
    editor: Editor,
    rules: Sequence[Rule],
    node: Node,
    verify: bool,
    outcome: Outcome,
    missed: dict[tuple[Node, str], str],
) -> list[Node]:
    """Apply the first rule that matches at a node; returns the nodes to look at again."""
    graph = editor.graph
    for rule in rules:
        match _first_safe(rule.rewrite(node, graph), graph):
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
                new = _perform(editor, rule, change, outcome)
                outcome.remarks.append(Remark("fused", rule.name, where, change.message))
                return _neighbourhood(graph, new or remaining(change))
    return []


def _first_safe(found: Rewrite | Missed | Iterable[Rewrite] | None, graph: Graph) -> Rewrite | Missed | None:
    """The first rewrite that saves kernels and that nobody would notice, or why there is none."""
    if found is None or isinstance(found, Missed):
        return found
    if isinstance(found, Rewrite):
        return found if (reason := safety.obstacle(graph, found)) is None else Missed(reason)
    reasons = []
    for change in found:
        reason = safety.obstacle(graph, change)
        if reason is None and _made(change) >= sum(graph.kernels(node) for node in touched(change)):
            reason = "as many kernels would do what is left"  # a stack adds all its terms in two
        if reason is None:
            return change
        reasons.append(reason)
    return Missed(reasons[0]) if reasons else None


def _made(change: Rewrite) -> int:
    """Kernels that a rewrite brings in."""
    added = sum(len(value.terms) - 1 for _, value in change.values if isinstance(value, Add))
    return added + sum(apply.operator.kernels for apply in applies(change))


def _left_over(graph: Graph, explained: set[Node]) -> Iterable[Remark]:
    """Remarks for the layers that no rule matched: why each norm that is left stays."""
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
    if facts.of(node).frozen is not None:
        return str(facts.of(node).frozen)
    if graph.is_opaque(node):
        return "it is inside a module that could not be traced"
    return "it normalises with statistics of its input, which no constant can replace"


def _perform(editor: Editor, rule: Rule, change: Rewrite, outcome: Outcome) -> list[Node]:
    """Apply a rewrite and check that the graph became cheaper."""
    graph = editor.graph
    before = {node: graph.kernels(node) for node in touched(change)}
    new, erased = editor.apply(change)
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
            facts.know(node, around=span)
    return new


def _around(node: Node) -> str:
    """Path of the innermost module around a node."""
    if facts.of(node).around is not None or node.op != "call_module":
        return facts.of(node).scope if facts.of(node).around is None else str(facts.of(node).around)
    return str(node.target).rpartition(".")[0]


def _shared(paths: Sequence[Sequence[str]]) -> list[str]:
    """What some paths have in common from their beginning on."""
    return [names[0] for names in itertools.takewhile(lambda names: len(set(names)) == 1, zip(*paths, strict=False))]


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
            if source not in found and moves(source):
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
            if moves(reader) or (len(reader.users) == 1 and passes):
                pending.extend(reader.users)
    return sorted(found)

"""Whether somebody would notice a rewrite by memory: rules are about values, and what these lie in is asked here.

Values change where something writes in place: Python that is not in the graph, which may write to all that it is
given, or an operation whose memory is read under several names (:mod:`reparam.graph.aliasing`). A rewrite may read a
value earlier, or later, than what it replaces; it may put a value into the place of a copy of it; and what goes may
have put its values in order in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch.fx import Node

from reparam.graph import aliasing, facts
from reparam.graph.graph import Graph, describe
from reparam.rewrite.rule import Add, Rewrite, Slice, applies, kept, touched


def obstacle(graph: Graph, change: Rewrite) -> str | None:
    """Why somebody would notice a rewrite, in the user's terms, or None when nobody would."""
    return next(filter(None, _reasons(graph, change)), None)


def _reasons(graph: Graph, change: Rewrite) -> Iterator[str | None]:
    within = {*touched(change), *change.through}
    yield from (facts.of(node).frozen for node in sorted(within))
    yield _changed_meanwhile(graph, change, within)
    yield from (_one_memory(graph, node, value) for node, value in _copies(graph, change))
    yield from (_relies_on_layout(graph, node) for node in laid_out_anew(graph, change))


def laid_out_anew(graph: Graph, change: Rewrite) -> list[Node]:
    """The nodes in whose places come values that may lie in memory in another order: no new memory, and no views."""
    slices = [node for node, value in change.values if isinstance(value, Slice)]
    return [node for node, _ in _copies(graph, change)] + slices[:1]


def _copies(graph: Graph, change: Rewrite) -> list[tuple[Node, Node]]:
    """The nodes that may have made new memory, with the values that are put into their places."""
    pairs = [(node, value) for node, expression in change.values if (value := kept(expression)) is not None]
    return [(node, value) for node, value in pairs if not aliasing.is_view_of(node, value, graph.modules)]


def _writers(graph: Graph, values: Iterable[Node]) -> set[Node]:
    """What may write to some values."""
    values = set(values)
    return {
        reader
        for value in values
        for reader in value.users
        if graph.is_opaque(reader) or aliasing.written(reader, graph.modules) in values
    }


def _changed_meanwhile(graph: Graph, change: Rewrite, within: set[Node]) -> str | None:
    """Why what a rewrite reads may change between the first and the last time that it was read, or None."""
    sums = [(term, node) for node, value in change.values if isinstance(value, Add) for _, term in value.terms]
    for value in sorted(within | {source for node in within for source in node.all_input_nodes}):
        reads = [reader for reader in graph.readers(value) if reader in within]
        added = [node for term, node in sums if term is value]
        if not reads or value.op == "get_attr":
            continue
        first, last = value if value in within else min(reads), max(reads + added)
        if any(first < writer < last for writer in _writers(graph, aliasing.sharing(value, graph.modules))):
            return _changed(change, value, bool(added))
    return None


def _changed(change: Rewrite, value: Node, is_term: bool) -> str:
    if is_term:
        return "one of its terms may be changed in place before the last is added"
    wholes = [expression.whole for _, expression in change.values if isinstance(expression, Slice)]
    for apply in (*applies(change), *wholes):
        if apply.source is value and len(apply.terms) > 1:
            terms = " and ".join(describe(term) for _, term in apply.terms)
            return f"{terms} stay apart: their input may be changed in place between them"
    return f"{describe(value)} may be changed in place before it is read"


def _one_memory(graph: Graph, node: Node, value: Node) -> str | None:
    """Why ``node`` must stay a copy of ``value``: one of the two is changed, or may be by who is handed both."""
    copies = aliasing.behind([node], graph.modules)
    originals = aliasing.sharing(value, graph.modules) - copies
    outside = next((base for base in originals if base.op in ("placeholder", "get_attr")), None)
    outputs = set(next(iter(reversed(graph.fx.nodes))).all_input_nodes)
    if copies & outputs and (outside is not None or originals & outputs):
        return f"an output would share memory with {'another' if outside is None else describe(outside)}"
    for changed, other in ((copies, originals), (originals, copies)):
        for writer in _writers(graph, changed):
            given = changed is copies and outside is not None
            readers = {reader for shared in other for reader in graph.readers(shared)}
            if writer > node and (given or any(reader >= writer for reader in readers)):
                return f"{describe(writer)} may change it in place, or what it is a copy of"
    return None


def _relies_on_layout(graph: Graph, node: Node) -> str | None:
    """Why the values behind a node must lie in memory as it puts them, or None when they need not.

    A view is as good as a reshape, except where somebody writes to the memory that it shares.
    """
    after = [other for other in graph.fx.nodes if other > node]
    views = [other for other in after if other.op == "call_method" and other.target in ("view", "view_as")]
    written = [view for view in views if facts.of(view).frozen is not None]
    if views and any(graph.is_opaque(other) for other in after):
        written.append(views[-1])
    return f"the memory that {describe(max(written))} shares may be written to" if written else None

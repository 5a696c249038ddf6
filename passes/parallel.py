"""``f(x) + g(x) + x -> h(x)``: parallel branches, identities and residuals, n-ary sums grouped by source."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import combinations
from typing import TypeAlias

from torch.fx import Node

from reparam.algebra import AnyConv, AveragePool, ChannelAffine, Operator, Pad, compose, parallel
from reparam.algebra.cost import Choice
from reparam.errors import AlgebraError
from reparam.graph.graph import Graph, describe
from reparam.graph.lift import Sum
from reparam.rewrite.rule import Add, Apply, Missed, Rewrite, Rule

_Clusters: TypeAlias = "Sequence[Sequence[_Term]]"

# Operators in a row that a term is looked through; what is longer is no branch any more.
_DEEPEST = 6


@dataclass(frozen=True)
class _Term:
    """``coefficient * operator(source)``, as a sum reads it.

    Attributes:
        coefficient: The number.
        node: Holds ``operator(source)``.
        operator: All operators of the chain as one, its numbers left out when there are several.
        source: What the chain reads.
        chain: The nodes from ``node`` to the one that reads ``source``; none when the sum reads the source itself.
    """

    coefficient: float
    node: Node
    operator: Operator
    source: Node
    chain: tuple[Node, ...] = ()

    @property
    def is_bare(self) -> bool:
        """Whether the sum reads the source itself."""
        return not self.chain


class ParallelBranches(Rule):
    """``W1*x + W2*x + x = (W1 + W2 + δ)*x`` for every group of terms that read the same ``x``.

    The whole tree of additions, subtractions and scalar factors is one sum. Terms with the same source merge when
    they have the same stride and, for every input size, the same output size; groups with other sources remain.
    Three branches of RepVGG (Ding et al. 2021, arXiv 2101.03697), RepViT's depthwise token mixer (Wang et al. 2024,
    arXiv 2307.09283), a residual around a single convolution and the mean of two linear heads are all this one rule.
    A term may be several operators in a row, which would not be worth a kernel of their own: the 1x1 convolutions
    before Sobel kernels of an edge-oriented block, or a low-rank update beside a full matrix.
    """

    def rewrite(self, node: Node, graph: Graph) -> Iterator[Rewrite] | Missed | None:
        """The sum with every group of branches as one operator."""
        if _sum_of(node, graph) is None or self._is_part_of_another(node, graph):
            return None
        terms = list(_terms(node, graph))
        groups: dict[Node, list[_Term]] = {}
        for term in terms:
            groups.setdefault(term.source, []).append(term)
        reasons: list[str] = []
        clusters = [cluster for group in groups.values() for cluster in _clusters(group, graph, node, reasons)]
        if not any(map(_merges, clusters)):
            return Missed("; ".join(dict.fromkeys(reasons))) if reasons else None
        return (_rewrite(node, chosen, graph) for chosen in (clusters, *_pairs(clusters, terms, graph, node)))

    def _is_part_of_another(self, node: Node, graph: Graph) -> bool:
        """Whether a larger sum will take this one in."""
        if len(node.users) != 1:
            return False
        reader = _sum_of(next(iter(node.users)), graph)
        return reader is not None and _is_read_once(node, reader)


def _sum_of(node: Node, graph: Graph) -> Sum | None:
    """A node as a sum: additions, and scalar factors of one."""
    operator = graph.op(node)
    if isinstance(operator, Sum):
        return operator
    if isinstance(operator, ChannelAffine) and operator.axis is None and operator.shift is None:
        source = graph.source(node)
        if _sum_of(source, graph) is not None and len(source.users) == 1:
            return Sum(((operator.scale.item(), source),))
    return None


def _is_read_once(term: Node, total: Sum) -> bool:
    """Whether only ``total`` reads the value, and only once: ``t + t`` would spread a sum ``t`` twice."""
    return len(term.users) == 1 and [node for _, node in total.terms].count(term) == 1


def _terms(node: Node, graph: Graph, coefficient: float = 1.0) -> Iterator[_Term]:
    """The terms of a sum, through the sums that only it reads."""
    total = _sum_of(node, graph)
    assert total is not None
    for factor, term in total.terms:
        if _is_read_once(term, total) and _sum_of(term, graph) is not None:
            yield from _terms(term, graph, coefficient * factor)
        else:
            yield _term(coefficient * factor, term, graph)


def _term(coefficient: float, node: Node, graph: Graph) -> _Term:
    """A term, through as many operators in a row as only it reads and that are one operator together."""
    operator = graph.op(node)
    # A crop is a kernel with one tap, too, but no kernel of its own that could be scaled.
    is_term = isinstance(operator, AnyConv | ChannelAffine | AveragePool) or (
        isinstance(operator, Pad) and coefficient == 1.0
    )
    if not isinstance(operator, Operator) or not is_term or len(graph.readers(node)) != 1:
        return _Term(coefficient, node, ChannelAffine.uniform(1.0), node)
    chain, source, whole = [node], graph.source(node), operator
    while len(chain) < _DEEPEST and len(source.users) == 1:
        inner = graph.op(source)
        if not isinstance(inner, Operator):
            break
        try:
            longer = compose(whole, inner, outline=True)
        except AlgebraError:
            break
        chain.append(source)
        source, whole = graph.source(source), longer
    return _Term(coefficient, node, whole, source, tuple(chain))


def _clusters(group: Sequence[_Term], graph: Graph, node: Node, reasons: list[str]) -> list[list[_Term]]:
    """The terms of one source, in as few clusters as they can be; what stands in the way goes to ``reasons``."""
    clusters: list[list[_Term]] = []
    for term in sorted(group, key=_size, reverse=True):
        for cluster in clusters:
            obstacle = _obstacle([*cluster, term], graph, node)
            if obstacle is None:
                cluster.append(term)
                break
            reasons.append(f"{describe(cluster[0].node)} and {describe(term.node)} stay apart: {obstacle}")
        else:
            clusters.append([term])
    return clusters


def _pairs(clusters: Sequence[list[_Term]], terms: Sequence[_Term], graph: Graph, node: Node) -> Iterator[_Clusters]:
    """Only two terms merged, where not all may."""
    for pair in (pair for cluster in clusters if len(cluster) > 1 for pair in combinations(cluster, 2)):
        if _merges(pair) and _obstacle(pair, graph, node) is None:
            yield [pair, *([term] for term in terms if all(term is not other for other in pair))]


def _merges(cluster: Sequence[_Term]) -> bool:
    return len(cluster) > 1 and not all(term.is_bare for term in cluster)


def _rewrite(node: Node, clusters: _Clusters, graph: Graph) -> Rewrite:
    """The sum with every cluster as one operator."""
    values = [value for cluster in clusters for value in _value(cluster, graph)]
    applies = [value for _, value in values if isinstance(value, Apply)]
    message = "merged " + ", ".join(" + ".join(describe(term) for _, term in value.terms) for value in applies)
    return Rewrite.one(node, applies[0] if len(values) == len(applies) == 1 else Add(tuple(values)), message)


def _size(term: _Term) -> int:
    return term.operator.multiply_adds if isinstance(term.operator, AnyConv) else -term.is_bare


def _value(cluster: Sequence[_Term], graph: Graph) -> list[tuple[float, Node | Apply]]:
    if not _merges(cluster):
        return [(term.coefficient, term.node) for term in cluster]
    operator = parallel([_whole(term, graph).scaled(term.coefficient) for term in cluster])
    return [(1.0, Apply(operator, cluster[0].source, tuple((term.coefficient, term.node) for term in cluster)))]


def _whole(term: _Term, graph: Graph) -> Operator:
    """The operator of a term with its numbers."""
    if len(term.chain) < 2:
        return term.operator
    return reduce(compose, (_operator(node, graph) for node in term.chain))


def _operator(node: Node, graph: Graph) -> Operator:
    operator = graph.op(node)
    assert isinstance(operator, Operator)
    return operator


def _obstacle(cluster: Sequence[_Term], graph: Graph, node: Node) -> str | None:
    """Why the terms do not become one operator, or None when they should."""
    if all(term.is_bare for term in cluster):
        return None
    for term in cluster:
        if not term.is_bare and len(term.node.users) > 1 and not isinstance(term.operator, AnyConv | ChannelAffine):
            return f"the shape of {describe(term.node)} is read"
    try:
        merged = parallel([term.operator for term in cluster], outline=True)
    except AlgebraError as reason:
        return str(reason)
    kernels = sum(graph.kernels(link) for term in cluster for link in term.chain) + len(cluster) - 1
    branches = tuple(tuple(_operator(link, graph) for link in term.chain) for term in cluster)
    choice = Choice(merged, branches, kernels, shape=graph.shape(cluster[0].source))
    return graph.cost.too_costly(choice, graph.path(node))

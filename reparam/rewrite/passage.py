"""What a per-channel affine passes through: ``f(s·x + t) = s'·f(x) + t'``.

A norm need not stand next to the convolution that it can be folded into. Between them may be views and permutations,
means and poolings (an average of shifted values is the shifted average; a maximum also, as long as no scale is
negative), concatenations (a norm of a concatenation is one of every part), separations (a norm of a part is one of the
whole that leaves the other parts alone), sums (a norm of a sum scales every term, and shifts one) and matrix products
(a number that scales one scales either factor, such as the queries of attention). :func:`absorb_backward` and
:func:`absorb_forward` walk from a norm through such operations until everything that it meets can take it in, and say
what that would change. Nothing is computed twice: a value that somebody else reads as well ends the walk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor
from torch.fx import Node

from reparam.algebra import AnyConv, AveragePool, ChannelAffine, Operator, compose
from reparam.errors import AlgebraError
from reparam.graph import facts, names, shuffles, views
from reparam.graph.graph import Graph, describe
from reparam.graph.lift import Refusal, Sum
from reparam.rewrite.rule import Apply

# Operations whose results are means of their inputs, which any affine passes.
_MEANS = names.RESAMPLINGS | {"mean", *(pool for pool in names.POOLS if "avg" in pool)}

# Operations whose results are the largest of their inputs.
_MAXIMA = {"amax", *(pool for pool in names.POOLS if "max" in pool)}


@dataclass
class Walk:
    """What taking a norm in would change.

    Attributes:
        changes: The operators that take it in, with what takes their places.
        through: The operations that it passes, which stay as they are.
    """

    changes: list[tuple[Node, Apply]] = field(default_factory=list)
    through: list[Node] = field(default_factory=list)


# From a norm towards what it reads.


@dataclass
class _Back:
    """Where an affine ends up: the operators that take it in, each with what it takes, and what lies on the way."""

    taken: list[tuple[Node, ChannelAffine]] = field(default_factory=list)
    through: list[Node] = field(default_factory=list)

    def add(self, other: _Back) -> None:
        self.taken += other.taken
        self.through += other.through


def absorb_backward(graph: Graph, norm: Node) -> Walk:
    """Fold a norm into the linear operators that its input is made by.

    Raises:
        AlgebraError: Not all of them can take it in; the message says which, and why.
    """
    operator = graph.op(norm)
    assert isinstance(operator, ChannelAffine)
    found = _backward(graph, graph.source(norm), [norm], operator)
    fused: dict[Node, Operator] = {}
    for node, affine in found.taken:
        # Several parts of one value come back to it one by one.
        fused[node] = _taking_in(affine, fused.get(node) or graph.op(node))
    changes = [(node, Apply.one(node, made, graph.source(node), also=(norm,))) for node, made in fused.items()]
    return Walk(changes, list(dict.fromkeys(found.through)))


def _taking_in(affine: ChannelAffine, operator: Operator | Sum | Refusal | None) -> Operator:
    assert isinstance(operator, Operator)
    return compose(affine, operator)


def _backward(graph: Graph, node: Node, expected: Sequence[Node], affine: ChannelAffine) -> _Back:
    """Make ``node`` compute ``affine`` of what it computes now; nobody reads it but those that are ``expected`` to."""
    readers = graph.readers(node)
    if readers != expected:
        raise AlgebraError(f"{describe(node)} has {len(readers)} readers")
    operator = graph.op(node)
    reason = f"{describe(node)} is not linear"
    if not isinstance(operator, (AnyConv, ChannelAffine)) or _is_view(node):
        try:
            beyond = _through(graph, node, affine)
            if beyond is not None:
                return beyond
        except AlgebraError as error:
            reason = str(error)
    if not isinstance(operator, (AnyConv, ChannelAffine, AveragePool)) or _is_no_op(operator) or _is_view(node):
        raise AlgebraError(reason)
    _taking_in(affine, operator)
    return _Back([(node, affine)])


def _through(graph: Graph, node: Node, affine: ChannelAffine) -> _Back | None:
    """What lets an affine pass from a node's output to its inputs; None when the node lets none pass.

    Raises:
        AlgebraError: It lets affines pass, but not this one, or something before it does not.
    """
    if views.multiplies(node):
        return _into_factor(graph, node, affine)
    found, part = _Back(through=[node]), _part(graph, node, affine)
    if part is not None:
        readers = _readers_of_parts(graph, node, part)
        found.through += readers
        found.add(_backward(graph, part.whole, readers, _of_part(part, affine)))
        return found
    shuffled = shuffles.read(node)
    if shuffled is not None:
        permutation, source, chain = shuffled
        found.through = chain
        found.add(_backward(graph, source, chain[:1], _passing(node, permutation.back, affine)))
        return found
    parts = _parts_backward(graph, node, affine)
    if parts is None:
        return None
    reader = node
    if isinstance(graph.op(node), Sum) and graph.source(node).target is torch.stack:
        # A sum over a stack, which is what reads the terms.
        reader = graph.source(node)
        found.through.append(reader)
    for source, own in parts:
        found.add(_backward(graph, source, [reader], own))
    return found


def _into_factor(graph: Graph, product: Node, affine: ChannelAffine) -> _Back:
    """``s·(a @ b) = (s·a) @ b = a @ (s·b)``, into whichever factor takes it."""
    if affine.axis is not None or affine.shift is not None:
        raise AlgebraError(f"{describe(product)} lets a single number pass, which scales all of it")
    reasons = []
    for factor in product.all_input_nodes:
        try:
            if product.args.count(factor) != 1:
                raise AlgebraError(f"{describe(factor)} is multiplied by itself")
            found = _backward(graph, factor, [product], affine)
            found.through.append(product)
            return found
        except AlgebraError as reason:
            reasons.append(str(reason))
    raise AlgebraError(" and ".join(dict.fromkeys(reasons)))


def _is_view(node: Node) -> bool:
    """Whether a node is a slice, which launches no kernel whatever it is lifted as."""
    return facts.target_name(node) == "getitem"


Parts = Sequence[tuple[Node, ChannelAffine]]


def _is_no_op(operator: Operator) -> bool:
    return isinstance(operator, ChannelAffine) and operator.is_identity


def _parts_backward(graph: Graph, node: Node, affine: ChannelAffine) -> Parts | None:
    """The affines of a node's inputs that equal one of its output; None when it lets none pass.

    Raises:
        AlgebraError: It lets affines pass, but not this one.
    """
    operator = graph.op(node)
    if isinstance(operator, Sum):
        return _terms(operator, affine)
    if views.concatenates(node):
        return _concatenated(node, affine)
    if isinstance(operator, Operator) and operator.passes:
        return [(graph.source(node), _passing(node, operator.back, affine))]
    moved = views.axes(node)
    if moved is None:
        return None
    source = node.args[0]
    assert isinstance(source, Node)
    _check_values(graph, node, affine)
    if affine.axis is None:
        return [(source, affine)]
    axis = moved.back(affine.axis)
    if axis is None and moved.unmerged is not None:
        return [(source, _unmerged(node, source, moved, affine))]
    if axis is None and moved.merged is not None and affine.axis + moved.out_rank == moved.merged[2]:
        axis = _only_axis(moved, source, len(affine.scale))
    if axis is None:
        raise AlgebraError(f"{describe(node)} mixes the channels with other axes")
    return [(source, replace(affine, axis=axis))]


def _passing(node: Node, way: Callable[[ChannelAffine], ChannelAffine], affine: ChannelAffine) -> ChannelAffine:
    try:
        return way(affine)
    except AlgebraError as reason:
        raise AlgebraError(f"{describe(node)} {reason}") from None


def _part(graph: Graph, node: Node, affine: ChannelAffine) -> views.Part | None:
    """What a node takes of a value that others read, too, where only that may be scaled."""
    part = views.part(node)
    if part is None or (part.reader is node and graph.readers(part.whole) == [node]):
        return None
    return part if affine.axis is None or (part.is_slice and affine.axis == part.axis) else None


def _readers_of_parts(graph: Graph, node: Node, part: views.Part) -> list[Node]:
    """The readers of a value that is read in parts, none of which has anything in common with ``node``."""
    separated = part.reader is not node
    for other in part.reader.users if separated else graph.readers(part.whole):
        theirs = views.part(other)
        if other is not node and (theirs is None or part.overlaps(theirs)):
            raise AlgebraError(f"{describe(other)} reads of {describe(part.whole)} what {describe(node)} reads")
    return [part.reader] if separated else graph.readers(part.whole)


def _of_part(part: views.Part, affine: ChannelAffine) -> ChannelAffine:
    """An affine of a part as one of the whole, which leaves the other parts alone."""
    length = part.stop - part.start
    scale, shift = affine.on(length, affine.axis, affine.scale.device)

    def whole(own: Tensor, rest: float) -> Tensor:
        found = own.new_full((part.total,), rest)
        found[part.start : part.stop] = own
        return found

    return ChannelAffine(whole(scale, 1.0), None if shift is None else whole(shift, 0.0), part.axis)


def _unmerged(node: Node, source: Node, moved: views.Axes, affine: ChannelAffine) -> ChannelAffine:
    """An affine along one of several axes that were one before: its numbers, each as often as it applies there."""
    assert moved.unmerged is not None
    assert affine.axis is not None
    axis, first, last = moved.unmerged
    position = affine.axis + moved.out_rank - first
    total = views.channels(source, axis - moved.rank)
    sizes = [views.channels(node, made - moved.out_rank) for made in range(first, last + 1)]
    known = math.prod(size or 1 for size in sizes)
    if total is None or sizes.count(None) > 1 or not 0 <= position < len(sizes):
        raise AlgebraError(f"{describe(node)} makes axes of the channels whose sizes no layer shows")
    sizes = [total // known if size is None else size for size in sizes]
    if math.prod(size or 0 for size in sizes) != total or sizes[position] != len(affine.scale):
        raise AlgebraError(f"{describe(node)} makes axes of the channels of other sizes than the norm has")
    before, after = math.prod(sizes[:position]), math.prod(sizes[position + 1 :])  # type: ignore[arg-type]

    def spread(vector: Tensor) -> Tensor:
        return vector.repeat_interleave(after).repeat(before)

    shift = None if affine.shift is None else spread(affine.shift)
    return ChannelAffine(spread(affine.scale), shift, axis - moved.rank)


def _only_axis(moved: views.Axes, source: Node, count: int) -> int | None:
    """The channels' axis among axes that become one of ``count`` numbers, when the channels are all of these."""
    known: tuple[int, int] | None = facts.of(source).channels
    assert moved.merged is not None
    first, last, _ = moved.merged
    if known is None or known[0] != count or not first <= known[1] + moved.rank <= last:
        return None
    return known[1]


def _check_values(graph: Graph, node: Node, affine: ChannelAffine) -> None:
    """Raise when a node does more than move values about, and what it does to them does not commute."""
    module = graph.modules.get(str(node.target)) if node.op == "call_module" else None
    name = facts.target_name(node) if module is None else names.function_of(module)
    if name in _MAXIMA:
        if bool((affine.scale < 0).any()):
            raise AlgebraError(f"a negative scale turns the maxima of {describe(node)} into minima")
    elif name == "amin":
        raise AlgebraError("it is read by a minimum")
    elif affine.shift is None or not bool(affine.shift.any()):
        return
    elif name in _MEANS:
        arguments = facts.Arguments(node)
        padding = getattr(module, "padding", 0) if module is not None else arguments.get(3, "padding", 0)
        counted = getattr(module, "count_include_pad", True) if module else arguments.get(5, "count_include_pad", True)
        divisor = getattr(module, "divisor_override", None) if module else arguments.named("divisor_override")
        is_pool = name.startswith("avg_pool")
        if is_pool and (divisor is not None or (padding not in (0, (0,), (0, 0), (0, 0, 0)) and counted is not False)):
            raise AlgebraError(f"{describe(node)} pads with zeros, which the shift would not reach")


def _terms(total: Sum, affine: ChannelAffine) -> Parts:
    """``s·Σ c·x + t = Σ c·(s·x + t')`` with the shift in one of the terms."""
    coefficients: dict[Node, float] = {}
    for coefficient, term in total.terms:
        coefficients[term] = coefficients.get(term, 0.0) + coefficient
    carrier = max(coefficients, key=lambda term: abs(coefficients[term]))
    if coefficients[carrier] == 0.0:
        raise AlgebraError("the terms of the sum cancel")
    shift = None if affine.shift is None else affine.shift / coefficients[carrier]

    def part(term: Node) -> ChannelAffine:
        # A term with one channel is broadcast to those of the others.
        whole = affine.axis is None or views.channels(term, affine.axis) == len(affine.scale)
        own = shift if term is carrier else None
        return replace(affine, shift=own, may_expand=affine.may_expand or not whole)

    return [(term, part(term)) for term in coefficients]


def _concatenated(node: Node, affine: ChannelAffine) -> Parts:
    """An affine of a concatenation as affines of its parts."""
    parts, axis = views.concatenation(node)
    if affine.axis is None or affine.axis != axis:
        return [(part, affine) for part in dict.fromkeys(parts)]
    counts = [views.channels(part, axis) for part in parts]
    if None in counts or sum(filter(None, counts)) != len(affine.scale):
        raise AlgebraError("the parts of the concatenation have numbers of channels that no layer shows")
    if len(set(parts)) < len(parts):
        raise AlgebraError("a value is concatenated with itself")
    scales = affine.scale.split([count or 0 for count in counts])
    shifts = [None] * len(parts) if affine.shift is None else affine.shift.split([count or 0 for count in counts])
    return [(part, ChannelAffine(scale, shift, axis)) for part, scale, shift in zip(parts, scales, shifts, strict=True)]


# From a norm towards what reads it.


def absorb_forward(graph: Graph, norm: Node) -> Walk:
    """Fold a norm into the linear operators that read it, all of them.

    Raises:
        AlgebraError: Not all of them can take it in; the message says which, and why.
    """
    operator = graph.op(norm)
    assert isinstance(operator, ChannelAffine)
    walk = Walk()
    _forward(graph, norm, norm, operator, walk)
    passed = [*walk.through, *(reader for reader, _ in walk.changes)]
    if len(set(passed)) < len(passed):
        raise AlgebraError("it is read in several ways that meet again")
    return walk


def _forward(graph: Graph, norm: Node, node: Node, affine: ChannelAffine, walk: Walk) -> None:
    """Make ``node``, whose value becomes ``x`` instead of ``affine(x)``, have no reader that minds."""
    readers = graph.readers(node)
    if not readers:
        raise AlgebraError("nothing reads it")
    for reader in readers:
        _into(graph, norm, node, reader, affine, walk)


def _into(graph: Graph, norm: Node, node: Node, reader: Node, affine: ChannelAffine, walk: Walk) -> None:
    """Let one reader take the affine in, or pass it on."""
    operator = graph.op(reader)
    if isinstance(operator, AnyConv) and not _is_view(reader):
        try:
            fused = operator.after(affine)
        except AlgebraError as reason:
            raise AlgebraError(f"not foldable into {describe(reader)}: {reason}") from None
        source = graph.source(norm) if node is norm else node
        walk.changes.append((reader, Apply.one(reader, fused, source, also=(norm,))))
        return
    beyond, chain = Walk(), [reader]
    try:
        shuffled = shuffles.read_from(reader)
        if shuffled is not None:
            permutation, chain = shuffled
            passed: ChannelAffine | None = _passing(chain[-1], permutation.forth, affine)
        else:
            passed = _affine_forward(graph, node, reader, affine)
        if passed is not None:
            _forward(graph, norm, chain[-1], passed, beyond)
            walk.changes += beyond.changes
            walk.through += [*chain, *beyond.through]
            return
    except AlgebraError as reason:
        if not isinstance(operator, AveragePool):
            raise AlgebraError(f"it is also read by {describe(reader)}, which cannot take it in: {reason}") from None
    if isinstance(operator, AveragePool) and node is norm:
        pool = compose(operator, affine)
        walk.changes.append((reader, Apply.one(reader, pool, graph.source(norm), also=(norm,))))
        return
    raise AlgebraError(f"it is also read by {describe(reader)}, which cannot take it in")


def _affine_forward(graph: Graph, node: Node, reader: Node, affine: ChannelAffine) -> ChannelAffine | None:
    """The affine of a reader's output that equals one of its input; None when it lets none pass."""
    if views.concatenates(reader):
        return _beside(node, reader, affine)
    operator = graph.op(reader)
    if isinstance(operator, Operator) and operator.passes:
        return _passing(reader, operator.forth, affine)
    moved = views.axes(reader)
    if moved is None or reader.args[0] is not node or reader.all_input_nodes.count(node) != 1:
        return None
    if isinstance(operator, Sum):
        return None
    _check_values(graph, reader, affine)
    if affine.axis is None:
        return affine
    axis = moved.forth(affine.axis)
    if axis is not None:
        return replace(affine, axis=axis)
    if moved.merged is not None:
        return _merged(graph, reader, moved, affine)
    raise AlgebraError(f"{describe(reader)} mixes the channels with other axes")


def _merged(graph: Graph, reader: Node, moved: views.Axes, affine: ChannelAffine) -> ChannelAffine:
    """An affine whose axis becomes part of a longer one: as long as the matrix product that reads it says."""
    assert moved.merged is not None
    assert affine.axis is not None
    first, last, new = moved.merged
    position = affine.axis + moved.rank
    widths = {
        operator.in_channels
        for after in graph.readers(reader)
        if isinstance(operator := graph.op(after), AnyConv) and operator.axis == new - moved.out_rank
    }
    if len(widths) != 1 or position not in (first, last):
        raise AlgebraError(f"{describe(reader)} mixes the channels with other axes")
    count = widths.pop() // len(affine.scale)
    spread = partial(torch.repeat_interleave, repeats=count) if position == first else partial(_tile, count=count)
    shift = None if affine.shift is None else spread(affine.shift)
    return ChannelAffine(spread(affine.scale), shift, new - moved.out_rank, affine.may_expand)


def _tile(vector: Tensor, count: int) -> Tensor:
    return vector.repeat(count)


def _beside(node: Node, reader: Node, affine: ChannelAffine) -> ChannelAffine:
    """An affine of one part of a concatenation as one of the whole, which leaves the other parts alone."""
    parts, axis = views.concatenation(reader)
    counts = [views.channels(part, axis) for part in parts]
    if affine.axis not in (axis, None) or None in counts:
        raise AlgebraError("the parts of the concatenation have numbers of channels that no layer shows")
    pairs = []
    for part, count in zip(parts, counts, strict=True):
        own = affine if part is node else ChannelAffine.uniform(1.0, device=affine.scale.device)
        pairs.append(own.on(count or 0, axis, affine.scale.device))
    shifts = [torch.zeros_like(scale) if shift is None else shift for scale, shift in pairs]
    shift = None if affine.shift is None else torch.cat(shifts)
    return ChannelAffine(torch.cat([scale for scale, _ in pairs]), shift, axis)

"""Certificates: each rewrite, as it happens, held to what it replaces.

A rewrite is certified by running what it replaces with torch's own functions, in float64, on random input small
enough to be quick and large enough to reach every border; a right rule agrees to about 1e-13, so 1e-9 leaves no
room for a mistake at an edge.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from reparam.algebra import AnyConv, Operator, Pad
from reparam.compare import magnitude_of, relative_error
from reparam.errors import VerificationError, first_line
from reparam.graph import facts
from reparam.graph.evaluate import evaluate, in_double, random_inputs, seeded
from reparam.graph.graph import Graph
from reparam.report import Comparison
from reparam.rewrite.rule import Add, Apply, Rewrite, Slice, applies

CERTIFICATE_TOLERANCE = 1e-9


class Uncertifiable(Exception):
    """A rewrite cannot be run by itself: nothing shows the shapes of what it reads."""


def certify(graph: Graph, rewrite: Rewrite, where: str, rule: str) -> float:
    """Check that a rewrite computes what it replaces.

    Returns:
        The largest relative error.

    Raises:
        VerificationError: It does not, by more than 1e-9 of the largest magnitude, or the two cannot even be run.
    """
    try:
        return _certify(graph, rewrite, where, rule)
    except (VerificationError, Uncertifiable):
        raise
    except Exception as error:
        raise VerificationError(
            f"{rule} at {where or 'the model'} cannot be certified ({error}); this is a defect of the rule, "
            "please report it"
        ) from error


def _certify(graph: Graph, rewrite: Rewrite, where: str, rule: str) -> float:

    if rewrite.outputs:
        return _certify_together(graph, rewrite, where, rule)
    largest = 0.0
    for apply in applies(rewrite):
        operator = in_double(apply.operator)
        for x in random_inputs(apply.operator, apply.source):
            terms = _evaluate_terms(graph, apply, x)
            largest = max(largest, _check(operator(x), terms, where, rule))
    for node, value in rewrite.values:
        if isinstance(value, Slice):
            largest = max(largest, _check_slice(graph, node, value, where, rule))
            continue
        if isinstance(value, Apply) and value.terms == ((1.0, node),):
            continue  # it stands for the node itself
        total = value if isinstance(value, Add) else Add(((1.0, value),))
        largest = max(largest, _check_addition(graph, node, total, where, rule))
    return largest


def _certify_together(graph: Graph, rewrite: Rewrite, where: str, rule: str) -> float:
    """Compare the outputs of a rewrite before and after, on random values of all that is read from outside."""
    largest = 0.0
    changed = dict(rewrite.values)
    for env in _environments(graph, rewrite):
        for node in rewrite.outputs:
            try:
                expected = evaluate(graph, node, dict(env))
            except Exception as error:
                raise Uncertifiable(
                    f"the shapes on the way are not known ({first_line(error)}); pass example_inputs"
                ) from error
            actual = evaluate(graph, node, dict(env), changed)
            largest = max(largest, _check(actual, [expected], where, rule))
    return largest


def _environments(graph: Graph, rewrite: Rewrite) -> Iterator[dict[Node, Any]]:
    """Random values for what a rewrite reads: of the shapes of an example, or of small ones when one value is read."""

    within = {node for node, _ in rewrite.values} | set(rewrite.through)
    outside = {
        source: None for node in within for source in node.all_input_nodes if source not in within
    }  # in a fixed order
    read = sorted(node for node in outside if node.op != "get_attr")
    generator = seeded()
    if all(facts.of(node).example is not None for node in read):
        yield {node: _like_example(facts.of(node).example, generator) for node in read}
        return
    sources = {apply.source: apply.operator for apply in applies(rewrite)}
    tensors = [node for node in read if facts.of(node).kind != "other"]
    if len(tensors) > 1 and len(sources) == 1:
        # What else is read may be made of that alone: queries and keys of the same projection.
        tensors = list(sources)
    if len(tensors) != 1:
        raise Uncertifiable("the shapes of what it reads are not known; pass example_inputs")
    # The norm itself, when the operators that take it in read something that it passed; any sizes will do for views.
    replaced = [graph.op(node) for node, _ in rewrite.values if tensors[0] in node.all_input_nodes]
    operators = [sources.get(tensors[0]), *replaced]
    operator = next((found for found in operators if isinstance(found, Operator)), Pad(()))
    for x in random_inputs(operator, tensors[0]):
        yield {tensors[0]: x}


def _like_example(example: Any, generator: torch.Generator) -> Any:
    if isinstance(example, torch.Size):
        return torch.randn(example, dtype=torch.float64, generator=generator)
    return example


def _evaluate_terms(graph: Graph, apply: Apply, x: Tensor) -> list[Tensor]:
    env: dict[Node, Any] = {apply.source: x}
    return [coefficient * evaluate(graph, term, env) for coefficient, term in apply.terms]


def _check_addition(graph: Graph, node: Node, value: Any, where: str, rule: str) -> float:
    """The sum itself, over random values in place of its terms."""
    leaves = [
        pair
        for coefficient, term in value.terms
        for pair in ([(coefficient, term)] if isinstance(term, Node) else [(coefficient * c, t) for c, t in term.terms])
    ]
    generator = seeded()
    operator = graph.op(node)
    # torch reflects and replicates the last axes of batches only.
    usual = len(operator.padding) + 2 if isinstance(operator, Pad) else 4
    shape = (2, 3, 4, 5, 6)[: facts.of(node).rank or usual]
    env: dict[Node, Any] = {}
    for _, leaf in leaves:
        env.setdefault(leaf, torch.randn(shape, dtype=torch.float64, generator=generator))
    terms = [coefficient * env[leaf] for coefficient, leaf in leaves]
    return _check(evaluate(graph, node, dict(env)), terms, where, rule)


def _check_slice(graph: Graph, node: Node, value: Slice, where: str, rule: str) -> float:
    """Some channels of an operator, against the node that they stand for."""
    largest = 0.0
    operator = value.whole.operator
    assert isinstance(operator, AnyConv)
    whole = in_double(operator)
    for x in random_inputs(operator, value.whole.source):
        actual = whole(x).narrow(value.axis, value.start, value.length)
        largest = max(largest, _check(actual, [evaluate(graph, node, {value.whole.source: x})], where, rule))
    return largest


def _check(actual: Tensor, terms: Sequence[Tensor], where: str, rule: str) -> float:
    """Compare a value with the sum that it should be, relative to the largest term: the sum itself may cancel out."""
    expected = functools.reduce(torch.add, terms)
    largest = max(magnitude_of(term) for term in terms)
    if actual.shape != expected.shape:
        raise VerificationError(
            f"{rule} at {where or 'the model'} would change a shape from {tuple(expected.shape)} to "
            f"{tuple(actual.shape)}; this is a defect of the rule, please report it"
        )
    comparison = Comparison(relative_error(expected, actual, largest), CERTIFICATE_TOLERANCE, 1)
    if not comparison.largest_error <= comparison.tolerance:
        raise VerificationError(
            f"{rule} at {where or 'the model'} would change the result ({comparison}); this is a defect of the rule, "
            "please report it",
            comparison,
        )
    return comparison.largest_error

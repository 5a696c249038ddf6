"""A module that decides by sizes, recorded once for every way in which it may decide.

TensorFlow's padding asks whether a height is a multiple of the stride, and pads by one number or another. Both ways are
the same operations with other numbers, so they are one graph in which such a number is selected by the decision. The
module is run on small inputs of many sizes; the decisions that it takes are a tree, and where both outcomes of every
decision were seen, and the operations are the same in all of them, nothing is left that depends on the example.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from reparam.capture.sizes import Number
from reparam.graph.conditions import select

# Sides of the images that a module is tried on: multiples of small numbers and their neighbours.
_SIDES = (12, 13, 14, 15, 16, 17, 21, 28, 32)


class DifferError(Exception):
    """Two ways of deciding are not the same operations."""


@dataclass
class Path:
    """One way of deciding.

    Attributes:
        nodes: What it computes, without numbers.
        numbers: What the nodes that are numbers are computed from.
        constants: Tensors that it refers to and the module does not have.
        decisions: What was decided, in order, and how.
    """

    nodes: list[Node]
    numbers: dict[Node, Number]
    constants: dict[str, Any]
    decisions: list[tuple[Number, bool]]

    def plain(self, value: Any) -> Any:
        """An argument with numbers in the place of nodes that are numbers."""
        if isinstance(value, Node):
            return self.numbers.get(value, value)
        return value


def other_calls(call: Any) -> Iterator[Any]:
    """Calls like one, with small images of many sizes in the place of its images."""
    images = [leaf for leaf in torch.utils._pytree.tree_leaves(call) if isinstance(leaf, Tensor) and leaf.dim() == 4]
    if not images or len({image.shape[2:] for image in images}) > 1:
        return
    for sides in itertools.product(_SIDES, repeat=2):
        yield torch.utils._pytree.tree_map_only(Tensor, partial(_resized, sides), call)


def _resized(sides: tuple[int, ...], x: Tensor) -> Tensor:
    if x.dim() != 4:
        return x
    rows, columns = (torch.arange(side, device=x.device) % size for side, size in zip(sides, x.shape[2:], strict=True))
    return x[:1, :, rows][:, :, :, columns].clone()


class Tree:
    """Ways of deciding, by the decisions that tell them apart.

    Attributes:
        path: The way, where nothing is left to be decided.
        decision: What is decided first.
        branches: What follows each outcome.
    """

    def __init__(self, path: Path, depth: int = 0, places: dict[Node, int] | None = None) -> None:
        self.places: dict[Node, int] = {} if places is None else places
        self.places.update({node: index for index, node in enumerate(path.nodes)})
        self.path: Path | None = path if depth == len(path.decisions) else None
        self.decision: Number | None = None
        self.branches: dict[bool, Tree] = {}
        if self.path is None:
            self.decision, outcome = path.decisions[depth]
            self.branches[outcome] = Tree(path, depth + 1, self.places)

    def add(self, path: Path, depth: int = 0) -> bool:
        """Add a way; whether it was new."""
        if self.decision is None or depth == len(path.decisions):
            if self.decision is not None or depth != len(path.decisions):
                raise DifferError("decisions follow each other in different orders")
            return False
        decision, outcome = path.decisions[depth]
        self.places.update({node: index for index, node in enumerate(path.nodes)})
        if self.text(decision) != self.text(self.decision):
            raise DifferError("what is decided depends on more than sizes")
        if outcome in self.branches:
            return self.branches[outcome].add(path, depth + 1)
        self.branches[outcome] = Tree(path, depth + 1, self.places)
        return True

    def text(self, value: Any) -> Any:
        """What a number is computed from, the same for all ways: nodes by where they stand in them."""
        if isinstance(value, Node):
            return self.places[value]
        if not isinstance(value, Number):
            return value
        return value.function, *map(self.text, value.operands)

    def paths(self) -> Iterator[Path]:
        """All ways."""
        if self.path is not None:
            yield self.path
        for branch in self.branches.values():
            yield from branch.paths()

    def is_complete(self) -> bool:
        """Whether both outcomes of every decision were seen."""
        return self.decision is None or (
            len(self.branches) == 2 and all(b.is_complete() for b in self.branches.values())
        )

    def choose(self, values: dict[int, Any]) -> Any:
        """One of some values, by path, as the decisions have it: a number."""
        if self.path is not None:
            return values[id(self.path)]
        yes, no = (self.branches[outcome].choose(values) for outcome in (True, False))
        if self.text(yes) == self.text(no):
            return yes
        assert self.decision is not None
        hint = yes if self.decision.hint else no
        hint = hint.hint if isinstance(hint, Number) else hint
        return Number(self.decision.recorder, select, (self.decision, yes, no), hint)


def merged(tree: Tree, base: Path) -> dict[Node, tuple[Any, Any]]:
    """The arguments of every node of one way, with numbers that are selected where the ways differ.

    Raises:
        DifferError: They are not the same operations.
    """
    paths = list(tree.paths())
    result = {}
    for index, node in enumerate(base.nodes):
        twins = [path.nodes[index] if index < len(path.nodes) else None for path in paths]
        for path, twin in zip(paths, twins, strict=True):
            if twin is None or len(path.nodes) != len(base.nodes) or (twin.op, twin.target) != (node.op, node.target):
                raise DifferError("other operations")
            if node.op == "get_attr" and not _same(
                path.constants.get(str(node.target)), base.constants.get(str(node.target))
            ):
                raise DifferError("other constants")
        result[node] = tuple(
            _merge(tree, base, paths, [getattr(twin, field) for twin in twins], getattr(node, field))
            for field in ("args", "kwargs")
        )
    return result


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.equal(a, b)
    return a is b


def _merge(tree: Tree, base: Path, paths: list[Path], values: list[Any], own: Any) -> Any:
    plain = [path.plain(value) for path, value in zip(paths, values, strict=True)]
    own = base.plain(own)
    if isinstance(own, (tuple, list)):
        if any(not isinstance(value, (tuple, list)) or len(value) != len(own) for value in plain):
            raise DifferError("other arguments")
        items = [_merge(tree, base, paths, [value[i] for value in plain], item) for i, item in enumerate(own)]
        return tuple(items) if isinstance(own, tuple) else items
    if isinstance(own, dict):
        if any(not isinstance(value, dict) or value.keys() != own.keys() for value in plain):
            raise DifferError("other arguments")
        return {key: _merge(tree, base, paths, [value[key] for value in plain], item) for key, item in own.items()}
    if type(own) is slice:
        bounds = [
            _merge(tree, base, paths, [getattr(value, name, None) for value in plain], getattr(own, name))
            for name in ("start", "stop", "step")
        ]
        return slice(*bounds)
    if isinstance(own, Node):
        if any(not isinstance(value, Node) or tree.places[value] != tree.places[own] for value in plain):
            raise DifferError("other operands")
        return own
    if all(tree.text(value) == tree.text(own) for value in plain):
        return own
    if not all(isinstance(value, (int, float, Number)) for value in plain):
        raise DifferError("other settings")
    return tree.choose({id(path): value for path, value in zip(paths, plain, strict=True)})

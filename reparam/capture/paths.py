"""A module that decides by sizes, recorded once for every way in which it may decide.

TensorFlow's padding asks whether a height is a multiple of the stride, and pads by one number or another. Both ways are
the same operations with other numbers, so they are one graph in which such a number is selected by the decision. The
module is run on small inputs of many sizes; the decisions that it takes are a tree, and where both outcomes of every
decision were seen, and the operations are the same in all of them, nothing is left that depends on the example.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import Node

from reparam.capture.calls import quiet
from reparam.capture.captured import Call, Capture
from reparam.capture.sizes import SYMBOLIC, Number, hinted
from reparam.capture.state import UnrecordableError
from reparam.capture.structures import leaves, mapped, resized
from reparam.capture.tape import Tape
from reparam.compare import with_tensors
from reparam.errors import first_line
from reparam.graph import facts
from reparam.graph.conditions import select
from reparam.graph.outputs import is_plain

if TYPE_CHECKING:
    from torch import nn

    from reparam.capture.recording import Session

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


def other_calls(call: Any) -> Iterator[Any]:
    """Calls like one, with small images of many sizes in the place of its images."""
    images = [leaf for leaf in torch.utils._pytree.tree_leaves(call) if isinstance(leaf, Tensor) and leaf.dim() == 4]
    if not images or len({image.shape[2:] for image in images}) > 1:
        return
    for sides in itertools.product(_SIDES, repeat=2):
        yield with_tensors(call, partial(_resized, sides))


def _resized(sides: tuple[int, ...], x: Tensor) -> Tensor:
    return resized(x[:1], dict(enumerate(sides, 2))) if x.dim() == 4 else x


class Tree:
    """Ways of deciding, told apart by their decisions; the one of the example is the first."""

    def __init__(self, base: Path) -> None:
        self.paths: list[Path] = []
        self.known: set[Any] = set()
        self.places: dict[Node, int] = {}
        self.add(base)

    def add(self, path: Path) -> None:
        """Add a way."""
        self.places.update({node: index for index, node in enumerate(path.nodes)})
        decisions = tuple((self.text(decision), outcome) for decision, outcome in path.decisions)
        if decisions not in self.known:
            self.known.add(decisions)
            self.paths.append(path)

    def text(self, value: Any) -> Any:
        """What a number is computed from, the same for all ways: nodes by where they stand in them."""
        if isinstance(value, Node):
            return self.places.get(value, value)
        if not isinstance(value, Number):
            return value
        return value.function, *map(self.text, value.operands)

    def is_complete(self) -> bool:
        """Whether both outcomes of every decision were seen."""
        return self._is_complete(self.paths, 0)

    def _is_complete(self, paths: list[Path], depth: int) -> bool:
        if all(len(path.decisions) == depth for path in paths):
            return True
        if any(len(path.decisions) == depth for path in paths):
            raise DifferError("decisions follow each other in different orders")
        if len({self.text(path.decisions[depth][0]) for path in paths}) > 1:
            raise DifferError("what is decided depends on more than sizes")
        branches = [[path for path in paths if path.decisions[depth][1] is outcome] for outcome in (True, False)]
        return all(branch and self._is_complete(branch, depth + 1) for branch in branches)

    def choose(self, values: list[tuple[Path, Any]], depth: int = 0) -> Any:
        """One of some values, by path, as the decisions have it: a number."""
        decisions, value = values[0][0].decisions, values[0][1]
        if len(decisions) == depth:
            return value
        yes, no = (
            self.choose([item for item in values if item[0].decisions[depth][1] is outcome], depth + 1)
            for outcome in (True, False)
        )
        if self.text(yes) == self.text(no):
            return yes
        decision = decisions[depth][0]
        hint = yes if decision.hint else no
        hint = hint.hint if isinstance(hint, Number) else hint
        return Number(decision.recorder, select, (decision, yes, no), hint)

    def merged(self) -> dict[Node, tuple[Any, Any]]:
        """The arguments of every node of the first way, with numbers that are selected where the ways differ.

        Raises:
            DifferError: They are not the same operations.
        """
        base, *others = self.paths
        for path in others:
            if [(node.op, node.target) for node in path.nodes] != [(node.op, node.target) for node in base.nodes]:
                raise DifferError("other operations")
        result = {}
        for twins in zip(*(path.nodes for path in self.paths), strict=True):
            if twins[0].op == "get_attr":
                constants = [path.constants.get(str(twins[0].target)) for path in self.paths]
                if not all(_same(constant, constants[0]) for constant in constants):
                    raise DifferError("other constants")
            result[twins[0]] = self._merged([(node.args, node.kwargs) for node in twins])
        return result

    def _merged(self, values: list[Any]) -> Any:
        if any(mapped(value, _nothing) != mapped(values[0], _nothing) for value in values):
            raise DifferError("other arguments")
        items = (self._merged_item(items) for items in zip(*map(leaves, values), strict=True))
        return mapped(values[0], lambda _: next(items))

    def _merged_item(self, items: tuple[Any, ...]) -> Any:
        found = [
            path.numbers.get(item, item) if isinstance(item, Node) else item
            for path, item in zip(self.paths, items, strict=True)
        ]
        if all(isinstance(item, Node) == isinstance(found[0], Node) for item in found) and all(
            self.text(item) == self.text(found[0]) for item in found
        ):
            return found[0]
        if not all(isinstance(item, (int, float, Number)) for item in found):
            raise DifferError("other operands or settings")
        return self.choose(list(zip(self.paths, found, strict=True)))


def _nothing(value: Any) -> None:
    """None: of a structure, only its form is left."""


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.equal(a, b)
    return a is b


def in_all_ways(
    session: Session, tape: Tape, module: nn.Module, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """What a module returns that decides by sizes, recorded in every way that it may decide.

    Raises:
        DifferError: The ways are not the same operations, or not all of them were seen.
    """
    session.refused_size = False
    call = mapped((args, kwargs), hinted)
    recorded, base = _way(session, module, call)
    tree = Tree(base)
    with session.unrecorded():
        others = list(other_calls(call))
    for other in others:
        if not tree.is_complete():
            try:
                way = _way(session, module, other)[1]
            except Exception:  # it takes no such images
                continue
            tree.add(way)
    if not tree.is_complete():
        raise DifferError("not all ways were seen")
    frame = tape.push(path, module, ())
    try:
        with quiet():
            result = _inlined(session, tape, path, (args, kwargs), recorded, tree)
    except (DifferError, UnrecordableError) as error:
        session.failed = None
        session.roll_back(tape, frame)
        raise DifferError(first_line(error)) from error
    tape.frames.pop()
    return result


def _way(session: Session, module: nn.Module, call: Call) -> tuple[Capture, Path]:
    """One way in which a module decides."""
    session.collecting.append([])
    try:
        recorded = session.record_module(module, call, is_part=True)
    except Exception as error:
        if error is session.genuine:
            session.genuine = None
        raise
    finally:
        decisions = session.collecting.pop()
        session.changes.state.restore(module.modules())
    if isinstance(recorded, str) or recorded.parts:
        raise DifferError(recorded if isinstance(recorded, str) else "it calls Python that stays")
    if not is_plain(recorded.output) or not all(
        leaf is None or isinstance(leaf, Tensor) for leaf in leaves(recorded.output)
    ):
        raise DifferError("it returns more than tensors")
    nodes = [node for node in recorded.graph.nodes if node not in recorded.numbers]
    return recorded, Path(nodes, recorded.numbers, recorded.made, decisions)


def _inlined(session: Session, tape: Tape, path: str, call: Call, recorded: Capture, tree: Tree) -> Any:
    """Put the graph of a module in the place of its call."""
    with session.unrecorded():
        arguments = tree.merged()
    base = tree.paths[0]
    module, (args, kwargs) = recorded.root, call
    bound = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    made: dict[Node, Any] = {}

    def number(value: Number) -> Any:
        operands = tuple(number(item) if isinstance(item, Number) else item for item in value.operands)
        if value.function == "size" or value.function is None:
            node = base.nodes[tree.places[operands[0]]]
            if value.function is None:
                return bound[str(node.target)]
            operands = made[node], *operands[1:]
        return Number(session, value.function, operands, value.hint)

    def argument(value: Any) -> Any:
        if isinstance(value, Number):
            value = number(value)
            return tape.number(value) if isinstance(value, Number) else tape.argument(value)
        return made[value] if isinstance(value, Node) else value

    for node in base.nodes:
        given = arguments[node]
        match node.op:
            case "placeholder":
                name = str(node.target)
                value = bound.get(name.lstrip("*"), node.args[0] if node.args else None)
                if name.startswith("*") or not isinstance(
                    value, (Tensor, bool, int, float, str, type(None), *SYMBOLIC)
                ):
                    if node.users:
                        raise DifferError("it takes more than tensors and settings")
                    continue
                made[node] = tape.argument(value)
                continue
            case "get_attr" if str(node.target) in recorded.made:
                made[node] = tape.constant(recorded.made[str(node.target)])
                continue
            case "output":
                break
        target = node.target
        if node.op in ("get_attr", "call_module"):
            target = f"{path}.{target}" if path else target
        twin = tape.node(node.op, target, *mapped(given, argument))
        scope = facts.of(node).scope
        twin.meta = dict(node.meta)
        facts.know(twin, scope=f"{path}.{scope}" if scope and path else path or scope)
        tape.shapes[twin] = recorded.shapes.get(node, torch.Size())
        made[node] = twin
    output = next(iter(reversed(recorded.graph.nodes))).args[0]
    pairs = zip(leaves(recorded.output), leaves(output), strict=True)
    for value, node in pairs:
        if isinstance(value, Tensor):
            tape.bind(value, made[node])
        elif value is not None:
            raise DifferError("it returns more than tensors")
    return recorded.output

"""The record of one module: its graph, which node every live tensor is, and what it depends on."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.fx
from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.utils.weak import TensorWeakRef

from reparam.capture import aten
from reparam.capture.copies import storage_of, tensors_in
from reparam.capture.sizes import SYMBOLIC, Number, described, pinned, symbolic, words
from reparam.capture.state import inside, items, put_back
from reparam.capture.structures import leaves
from reparam.graph import facts, views
from reparam.graph.conditions import Argument, assertion
from reparam.graph.leaves import carries_hooks
from reparam.report import Remark

if TYPE_CHECKING:
    from reparam.capture.recording import Session

# What an argument may be besides tensors and numbers.
_PLAIN = (bool, int, float, complex, str)
_SETTINGS = (torch.memory_format, torch.layout)


@dataclass(eq=False)
class Frame:
    """A module that is being recorded."""

    path: str
    module: nn.Module
    last: Node | None
    journal: int
    conditions: int
    remarks: int
    decisions: int
    arguments: list[tuple[Any, Any]]
    oldest_write: float = math.inf
    dtypes: dict[torch.dtype, Node] = field(default_factory=dict)
    handed_on: set[torch.dtype] = field(default_factory=set)


class RestartError(BaseException):
    """What was recorded of a module cannot be taken back, as it wrote to memory that was there before."""


class Tape:
    """The record of one module: its graph, and which node every live tensor is."""

    def __init__(self, session: Session, root: nn.Module, is_part: bool) -> None:
        self.session, self.root, self.is_part = session, root, is_part
        self.graph = Graph()
        self.modules = dict(root.named_modules())
        self.paths = {module: path for path, module in reversed(self.modules.items())}
        self.known: dict[int, tuple[TensorWeakRef, Node]] = {}
        self.journal: list[tuple[int, Any]] = []
        self.constants: dict[int, tuple[Tensor, str]] = {}
        for path, module in self.modules.items():
            for name, tensor in tensors_in(module):
                self.constants.setdefault(id(tensor), (tensor, f"{path}.{name}" if path else name))
        self.made: dict[str, Any] = {}
        self.frames: list[Frame] = []
        self.conditions: list[tuple[Any, ...]] = []
        self.remarks: list[Remark] = []
        self.arguments: list[Argument] = []
        self.settled = 0
        self.ordered: list[Node] = []
        self.births: dict[int, int] = {}
        self.written: set[int] = set()
        self.valueless: set[Node] = set()
        self.uncertain: set[Node] = set()
        self.foreign: set[Node] = set()
        self.numbers: dict[Any, Node] = {}
        self.number_nodes: dict[Node, Number] = {}
        self.containers: set[Node] = set()
        self.shapes: dict[Node, torch.Size] = {}
        self.autocast = _autocast()

    # Nodes.

    def node(self, op: str, target: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Node:
        """A node at the end of the graph, with its facts."""
        if _autocast() != self.autocast:
            self.session.refuse("it changes the precision that operations run in (autocast)")
        # fx walks through arguments that it is given here, beside storing them.
        node = self.graph.create_node(op, target)
        node.args, node.kwargs = args, dict(kwargs or {})
        facts.know(node, scope=self.frames[-1].path if self.frames else "")
        sources = node.all_input_nodes
        if op.startswith("call"):
            if all(source in self.valueless or not _reads_values(node, source) for source in sources):
                self.valueless.add(node)
            if any(source in self.uncertain for source in sources):
                self.uncertain.add(node)
        elif op == "get_attr":
            self.valueless.add(node)
        self.ordered.append(node)
        return node

    def note(self, node: Node, value: Any, module: nn.Module | None = None) -> None:
        """Write down what the run shows of a node's value."""
        facts.note_value(node, value)
        facts.note_example(node, value)
        if isinstance(value, Tensor):
            self.shapes[node] = value.shape
            if not self.session.given:
                facts.know(node, shape=None)
        facts.note(node, module)

    def bind(self, tensor: Tensor, node: Node) -> None:
        """From here on, a tensor is the value of a node."""
        key = id(tensor)
        self.journal.append((key, self.known.get(key)))
        self.known[key] = TensorWeakRef(tensor), node
        self.births.setdefault(storage_of(tensor), len(self.journal))

    def find(self, tensor: Tensor) -> Node | None:
        """The node that a tensor is the value of, None for a constant."""
        found = self.known.get(id(tensor))
        return found[1] if found is not None and found[0]() is tensor else None

    def is_activation(self, value: Any) -> bool:
        """Whether a value is a tensor that depends on the inputs."""
        return isinstance(value, Tensor) and self.find(value) is not None

    def results(self, value: Any, node: Node, module: nn.Module | None = None, seen: tuple[int, ...] = ()) -> bool:
        """Bind every tensor in a result, whatever it is wrapped in; whether it holds plain numbers, too."""
        self.note(node, value, module)
        if isinstance(value, Tensor):
            self.bind(value, node)
            return False
        if isinstance(value, (bool, int, float)):
            return True
        parts: Iterable[tuple[Any, Any]] = ()
        how: Any = operator.getitem
        if isinstance(value, Mapping):
            parts = value.items()
        elif isinstance(value, (tuple, list)):
            parts = enumerate(value)
        elif hasattr(value, "__dict__") and not isinstance(value, (type, nn.Module)) and not callable(value):
            parts, how = vars(value).items(), getattr
        numbers = False
        for key, part in list(parts) if id(value) not in seen else ():
            if part is None or isinstance(part, (str, torch.dtype, torch.device)):
                continue
            op, target, args, kwargs = aten.said(how, (node, key), {}, None)
            inner = self.node(op, target, args, kwargs)
            self.containers.add(inner if target is how else node)
            numbers = self.results(part, inner, None, (*seen, id(value))) or numbers
        return numbers

    def given(self, value: Any, node: Node, is_number: bool) -> Any:
        """An argument as Python gets it: with numbers of the graph for numbers, unless it is no number that may differ.

        The tensors in it are values of the graph from here on.
        """
        if type(value) in (int, float) and is_number:
            return symbolic(Number(self.session, None, (node,), value))
        if type(value) not in (tuple, list, dict, torch.Size):
            self.results(value, node)
            if isinstance(value, Tensor):
                facts.know(node, device=value.device)
            return value
        self.note(node, value)
        items = dict(value.items() if isinstance(value, dict) else enumerate(value))
        made = {}
        for key, item in items.items():
            inner = self.node("call_function", operator.getitem, (node, key))
            self.containers.add(inner)
            made[key] = self.given(item, inner, is_number)
        if all(made[key] is item for key, item in items.items()):
            return value
        return made if isinstance(value, dict) else type(value)(made.values())

    def argument(self, value: Any) -> Any:
        """An argument of a call as the graph has it."""
        if isinstance(value, Tensor):
            return self.find(value) or self.constant(value)
        if isinstance(value, SYMBOLIC):
            return self.number(value.node)
        if isinstance(value, torch.dtype):
            frame = next((frame for frame in reversed(self.frames) if value in frame.dtypes), None)
            if frame is None:
                return value
            frame.handed_on.add(value)
            return self.attribute(frame.dtypes[value], "dtype", value)
        if isinstance(value, torch.device):
            given = next((node for node in self.graph.nodes if facts.of(node).device == value), None)
            return self.attribute(given, "device", value) if given is not None else value
        if value is None or value is Ellipsis or type(value) in _PLAIN or isinstance(value, _SETTINGS):
            return value
        for plain in _PLAIN:
            if isinstance(value, plain):  # a subclass
                base: Any = plain
                return base(value)
        if isinstance(value, torch.Size):
            return tuple(map(self.argument, value))
        if type(value).__module__ == "numpy" and hasattr(value, "item") and not getattr(value, "shape", ()):
            return value.item()
        return self.session.refuse(f"a {type(value).__name__} is among the arguments of a call")

    def attribute(self, node: Node, name: str, value: Any) -> Node:
        """An attribute of a value that is no tensor."""
        made = self.node("call_function", getattr, (node, name))
        self.valueless.add(made)
        self.note(made, value)
        return made

    def constant(self, tensor: Tensor) -> Node:
        """A tensor that does not depend on the inputs: the model's own, or one that was computed from such."""
        self.session.check_constant(self, tensor)
        if id(tensor) not in self.constants:
            self.constants[id(tensor)] = tensor, self.name_for(f"_constant{len(self.made)}", tensor)
        node = self.node("get_attr", self.constants[id(tensor)][1])
        facts.note_value(node, tensor)
        return node

    def name_for(self, name: str, value: Any) -> str:
        """A name under which the root will hold something new."""
        while hasattr(self.root, name) or name in self.made:
            name += "_"
        self.made[name] = value
        return name

    def filled(self, storages: set[int]) -> None:
        """Values were written to some memory: what lies in it is no longer made of sizes and constants alone."""
        for ref, node in self.known.values() if storages else ():
            if node in self.valueless and (tensor := ref()) is not None and storage_of(tensor) in storages:
                self.valueless.discard(node)

    def wrote_to(self, storage: int) -> None:
        """Note that some memory was written to: what was recorded since it was first seen stands or falls with it."""
        for frame in self.frames:
            frame.oldest_write = min(frame.oldest_write, self.births.get(storage, 0))

    def remembers(self, value: Any) -> bool | None:
        """Whether a value holds something of the call: True for values, False for what sizes and constants give."""
        found = None
        for leaf in leaves(value):
            if isinstance(leaf, SYMBOLIC):
                found = bool(found)
            elif isinstance(leaf, Tensor):
                node = self.find(leaf)
                found = bool(found) or self.session.hides(leaf) or (node is not None and node not in self.valueless)
        return found

    # Numbers.

    def number(self, number: Number) -> Node:
        """Where the graph computes a number."""
        known = self.numbers.get(number.key)
        if known is not None and not known._erased:
            return known
        match number.function, number.operands:
            case None, (node, *_):
                return node  # type: ignore[no-any-return]
            case "size", (value, axis):
                made = self.node("call_method", "size", (value, axis))
            case function, operands:
                args = tuple(self.number(item) if isinstance(item, Number) else item for item in operands)
                made = self.node("call_function", function, args)
        facts.know(made, kind="other", example=number.hint)
        self.valueless.add(made)
        self.numbers[number.key] = made
        self.number_nodes[made] = number
        return made

    def require(self, outcome: Node, what: str) -> None:
        """Check at every call that a comparison comes out as it did."""
        facts.know(self.node("call_function", torch._assert, (outcome, assertion(what))), kind="other")

    def follows(self, number: Number) -> bool:
        """Whether a number is what it was wherever the conditions so far hold, as the sizes that it comes of are."""
        pinned = {key for key, outcome in self.conditions if outcome is True}
        return not any(True for _ in self._roots(number, pinned))

    def said(self, number: Number, outcome: bool) -> str:
        """What it says of the inputs that a comparison came out as it did."""
        roots = {item and item.key: item for item in self._roots(number, set())}
        told = words(number, outcome)
        if None in roots or len(roots) > 3 or roots.keys() == {source.key for source in number.sources()}:
            return told
        return (
            f"{told}, which comes of {' and '.join(map(described, sorted(roots.values(), key=str)))}" if roots else told
        )

    def _roots(self, number: Number, pinned: set[Any]) -> Iterator[Number | None]:
        """The sizes of inputs that a number comes of, but for pinned ones; None for what is not known to be one."""
        views.settle(self._unsettled(), self.modules)
        pending: list[Any] = [*number.sources()]
        seen: set[Any] = set()
        while pending:
            item = pending.pop()
            if not isinstance(item, Number):  # an axis of a value, or all that a container holds
                node, axis = item
                found = None if axis is None else views.size(node, axis)
                if type(found) is int or item in seen or node.op == "get_attr":
                    continue
                seen.add(item)
                if found is not None and found != item:
                    pending.append(found)
                    continue
                if axis is not None:
                    item = Number(self.session, "size", (node, axis), self.shapes[node][axis])
            if isinstance(item, Number):
                if (operator.eq, item.key, (type(item.hint), item.hint)) in pinned:
                    continue
                if item.function is None:
                    yield item
                    continue
                node, axis = item.operands
            module = self.modules.get(str(node.target)) if node.op == "call_module" else None
            is_foreign = module is not None and (
                not type(module).__module__.startswith("torch.nn.") or carries_hooks(module)
            )
            if is_foreign or node.op == "placeholder" or node in self.uncertain or node in self.foreign:
                yield item if node.op == "placeholder" and isinstance(item, Number) else None
                continue
            origins = None if axis is None else views.origins(node, axis)
            pending += origins or []
            for source in node.all_input_nodes:
                if source in self.number_nodes:
                    pending += self.number_nodes[source].sources()
                elif origins is None and source not in self.shapes:
                    pending.append((source, None))
                elif origins is None and _reads_shape(node, source):
                    pending += [(source, other) for other in range(len(self.shapes[source]))]

    def type_conditions(self, frame: Frame) -> None:
        """Require the types that a module asked for and did not hand on: it may have decided by them."""
        for dtype, node in frame.dtypes.items():
            if dtype not in frame.handed_on:
                self.require_type(node, dtype)

    def require_type(self, node: Node, dtype: torch.dtype) -> None:
        """Check at every call that a value is of a type."""
        if (dtype, node) not in self.conditions:
            self.conditions.append((dtype, node))
            same = self.node("call_function", operator.eq, (self.attribute(node, "dtype", dtype), dtype))
            facts.know(same, kind="other")
            self.require(same, f"{named(node)} is of {dtype}")

    def size(self, tensor: Tensor, axis: int) -> Any:
        """The size of an activation along an axis, as Python gets it: an int where layers settle it."""
        node = self.find(tensor)
        assert node is not None
        return self._size(node, axis % tensor.dim(), tensor.shape)

    def _size(self, node: Node, axis: int, shape: torch.Size) -> Any:
        views.settle(self._unsettled(), self.modules)
        found = views.size(node, axis)
        if isinstance(found, int):
            return found
        value, axis = found if found is not None else (node, axis)
        if value.op == "get_attr" or value._erased:
            return shape[axis]
        return symbolic(Number(self.session, "size", (value, axis), self.shapes.get(value, shape)[axis]))

    def settle(self, nodes: Iterable[Node]) -> None:
        """The sizes and types that some values were made of are those of the example from here on."""
        pending, seen = list(nodes), set[Node]()
        while pending:
            node = pending.pop()
            if node in seen:
                continue
            seen.add(node)
            if node in self.number_nodes:
                pinned(self.number_nodes[node])
                continue
            for source in node.all_input_nodes:
                if source in self.valueless:
                    pending.append(source)
                    continue
                dtype = facts.of(source).dtype
                if dtype is not None and (node.target is not getattr or node.args[1] != "device"):
                    self.require_type(source, dtype)
                if _reads_shape(node, source):
                    for axis in range(len(self.shapes[source])):
                        int(self._size(source, axis, self.shapes[source]))

    def _unsettled(self) -> list[Node]:
        nodes = [node for node in self.ordered[self.settled :] if not node._erased]
        self.settled = len(self.ordered)
        return nodes

    # Modules.

    def push(self, path: str, module: nn.Module, args: Any) -> Frame:
        """Begin with a module."""
        frame = Frame(
            path, module, next(iter(reversed(self.graph.nodes)), None), len(self.journal), len(self.conditions),
            len(self.remarks), len(self._decisions()),
            [(holder, items(holder)) for holder in inside(args, set())],
        )  # fmt: skip
        self.frames.append(frame)
        return frame

    def _decisions(self) -> list[Any]:
        """What was decided by sizes so far, where that is what is looked for."""
        return self.session.collecting[-1] if self.session.collecting else []

    def roll_back(self, frame: Frame) -> None:
        """Take back all that was recorded since a module was begun with.

        Raises:
            RestartError: It has written to memory that was there before.
        """
        del self.frames[self.frames.index(frame) :]
        for node in reversed(self.graph.nodes):
            if node is frame.last:
                break
            self.graph.erase_node(node)
        for key, previous in reversed(self.journal[frame.journal :]):
            if previous is None:
                self.known.pop(key, None)
            else:
                self.known[key] = previous
        del self.journal[frame.journal :], self.conditions[frame.conditions :], self.remarks[frame.remarks :]
        del self._decisions()[frame.decisions :]
        while self.ordered and self.ordered[-1]._erased:
            self.ordered.pop()
        self.settled = min(self.settled, len(self.ordered))
        if frame.oldest_write <= frame.journal:
            raise RestartError(frame.path)
        for holder, old in frame.arguments:
            put_back(holder, old)


def _reads_values(node: Node, source: Node) -> bool:
    """Whether a node reads the values of another, and not just its shape and type."""
    name = facts.target_name(node)
    like = name.startswith("new_") or (name.endswith("_like") and not name.startswith("rand"))
    return not (facts.reads_only_metadata_of(node, source) or (like and node.args[:1] == (source,)))


def _reads_shape(node: Node, source: Node) -> bool:
    """Whether the shape of another value has a say in what a node returns, and not just its type and place."""
    if node.target is getattr and node.args[1] in ("dtype", "device"):
        return False
    return not (
        facts.target_name(node).startswith("new_") and node.args[:1] == (source,) and source not in node.args[1:]
    )


def _autocast() -> tuple[Any, ...]:
    """What automatic mixed precision does at the moment; a graph cannot say that it changes."""
    return tuple(torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) for device in ("cpu", "cuda"))


def named(node: Node) -> str:
    """A value, for a message."""
    return str(node.target) if node.op == "placeholder" else f"{node.name} in {facts.of(node).scope}"


def tidy(tape: Tape) -> None:
    """Ask for conditions first; leave out what takes containers apart and is not read, and numbers nobody needs."""
    for node in [node for node in tape.graph.nodes if node.target is torch._assert]:
        _move_up(node, set())
    for node in reversed(tape.graph.nodes):
        is_idle = not node.users and (
            node in tape.containers or node.op == "get_attr" or facts.of(node).kind == "other"
        )
        if is_idle and node.op in ("call_function", "call_method", "get_attr") and not node.is_impure():
            tape.graph.erase_node(node)


def _move_up(node: Node, moved: set[Node]) -> None:
    """Put a condition, and the numbers that it is about, right behind what these are sizes of."""
    moved.add(node)
    for source in node.all_input_nodes:
        if facts.of(source).kind == "other" and source.op.startswith("call") and source not in moved:
            _move_up(source, moved)
    last = max(node.all_input_nodes, default=None)
    while last is not None and last.next.op == "placeholder":
        last = last.next
    if last is not None and last.next is not node:
        last.append(node)

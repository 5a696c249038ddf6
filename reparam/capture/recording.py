"""A real run of a model, recorded as a graph.

Python runs as it always does, on real tensors. What it asks of torch passes a function mode, which is local to the thread,
and becomes the nodes of a torch.fx graph; modules are seen by an attribute of the private copy's instances. Nothing of
torch, Python or the user's classes is replaced. What the graph cannot say (a value that Python asks for, a decision by a
size that has to stay free) makes the innermost module opaque: the record is taken back to its call, it is run as one leaf,
and recording goes on with what it really returned. Parts that it calls on the way are recorded as graphs of their own.
"""

from __future__ import annotations

import copy
import inspect
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.fx
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.fx import Graph, Node
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import TensorWeakRef

from reparam import aliasing, facts, views
from reparam.capture import aten
from reparam.capture.copies import storage_of, tensor_storages, tensors_in
from reparam.capture.demands import is_demanded, is_guarded
from reparam.outputs import Rebuild, is_plain
from reparam.capture.paths import DifferError, Path, Tree, merged, other_calls
from reparam.capture.sizes import NEGATED, OURS, SYMBOLIC, Number, hinted, is_always, symbolic, words
from reparam.capture.state import State, UnrecordableError, Writes, may_write, same_items, written_by
from reparam.conditions import Argument, assertion, kind_of
from reparam.errors import first_line
from reparam.leaves import carries_hooks, is_leaf
from reparam.report import Remark
from reparam.verify import clones

Call: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]

# Attributes of a tensor that are tensors, and methods that say nothing of its values.
_VIEWS = frozenset("T mT H mH real imag data".split())
_HARMLESS = frozenset(
    """dim ndimension is_floating_point is_complex is_signed is_conj is_neg is_inference is_quantized get_device
    element_size has_names __hash__ is_nonzero_static is_coalesced is_sparse_any is_pinned is_shared requires_grad_
    register_hook retain_grad __dir__ is_tensor __reversed_hash__ is_distributed""".split()
) - {"is_nonzero_static", "is_tensor", "__reversed_hash__"}
_LAYOUT = frozenset("stride is_contiguous storage_offset data_ptr storage untyped_storage is_set_to".split())
_ARITHMETIC = {"add": "add", "sub": "sub", "mul": "mul", "div": "truediv", "matmul": "matmul", "neg": "neg", "pow": "pow"}
# Functions whose number of results depends on the size of an axis.
_SEVERAL = frozenset("chunk split tensor_split unbind unsafe_chunk unsafe_split hsplit vsplit dsplit".split())


class _RestartError(BaseException):
    """What was recorded of a module cannot be taken back, as it wrote to memory that was there before."""


@dataclass
class Recorded:
    """A module as it was recorded.

    Attributes:
        root: The module.
        graph: What it computes; None when it has to stay Python, which a remark says why.
        modules: The modules in it by path, itself at the empty one.
        call: Its arguments, on copies of the tensors.
        output: What it returned.
        outputs: What its methods returned, where it was run as Python.
        remarks: Which modules were left opaque, and on what the graph depends.
        parts: Modules in opaque ones that were recorded by themselves, by path.
        alike: Whether all of its calls were of one kind.
        made: Tensors and modules that the graph refers to, which the root does not hold yet.
        numbers: How the nodes that are numbers are computed.
        shapes: Of the values of nodes that are tensors.
        by_size: Whether something was decided by sizes, or would have been.
        draws: Whether it drew random numbers.
        arguments: What has to stay the same of a call.
    """

    root: nn.Module
    graph: Graph | None
    modules: dict[str, nn.Module]
    call: Call
    output: Any = None
    outputs: dict[str, Any] = field(default_factory=dict)
    remarks: list[Remark] = field(default_factory=list)
    parts: dict[str, Recorded] = field(default_factory=dict)
    alike: bool = True
    made: dict[str, Any] = field(default_factory=dict)
    by_size: bool = False
    draws: bool = False
    numbers: dict[Node, Number] = field(default_factory=dict)
    shapes: dict[Node, Any] = field(default_factory=dict)
    arguments: tuple[Argument, ...] = ()


@dataclass(eq=False)
class _Frame:
    """A module that is being recorded."""

    path: str
    module: nn.Module
    last: Node | None
    journal: int
    conditions: int
    remarks: int
    serial: int
    arguments: list[tuple[Any, Any]]
    oldest_write: float = math.inf
    dtypes: dict[torch.dtype, Node] = field(default_factory=dict)
    handed_on: set[torch.dtype] = field(default_factory=set)


class _Tape:
    """The record of one module: its graph, and which node every live tensor is."""

    def __init__(self, session: Session, root: nn.Module, prefix: str, is_part: bool) -> None:
        self.session, self.root, self.prefix, self.is_part = session, root, prefix, is_part
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
        self.frames: list[_Frame] = []
        self.conditions: list[tuple[Any, ...]] = []
        self.remarks: list[Remark] = []
        self.arguments: list[Argument] = []
        self.settled = 0
        self.ordered: list[Node] = []
        self.births: dict[int, int] = {}
        self.written: set[int] = set()
        self.valueless: set[Node] = set()
        self.uncertain: set[Node] = set()
        self.numbers: dict[Any, Node] = {}
        self.number_nodes: dict[Node, Number] = {}
        self.containers: list[Node] = []
        self.shapes: dict[Node, torch.Size] = {}
        self.autocast = _autocast()

    # Nodes.

    def node(self, op: str, target: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Node:
        """A node at the end of the graph, with its facts."""
        if _autocast() != self.autocast:
            self.session.refuse("it changes the precision that operations run in (autocast)")
        node = self.graph.create_node(op, target, args, dict(kwargs or {}))
        node.meta["scope"] = self.frames[-1].path if self.frames else ""
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
                del node.meta["shape"]
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
            self.containers.append(inner if target is how else node)
            numbers = self.results(part, inner, None, (*seen, id(value))) or numbers
        return numbers

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
            given = next((node for node in self.graph.nodes if node.meta.get("device") == value), None)
            return self.attribute(given, "device", value) if given is not None else value
        if value is None or value is Ellipsis or type(value) in _PLAIN or isinstance(value, _SETTINGS):
            return value
        for plain in (bool, int, float, complex, str):
            if isinstance(value, plain):
                return plain(value)
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
        if self.session.hides(tensor):
            self.session.refuse("it reads a value that was made inside of Python that is not recorded")
        if storage_of(tensor) in self.written:
            self.session.refuse("it reads memory that was written to under another name")
        if id(tensor) not in self.constants:
            self.constants[id(tensor)] = tensor, self.name_for(f"_constant{len(self.made)}", tensor)
        node = self.node("get_attr", self.constants[id(tensor)][1])
        node.meta.update(kind="tensor", rank=tensor.dim(), shape=tuple(tensor.shape))
        facts.note(node)
        return node

    def name_for(self, name: str, value: Any) -> str:
        """A name under which the root will hold something new."""
        while hasattr(self.root, name) or name in self.made:
            name += "_"
        self.made[name] = value
        return name

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
        made.meta.update(kind="other", example=number.hint)
        facts.note(made)
        self.valueless.add(made)
        self.numbers[number.key] = made
        self.number_nodes[made] = number
        return made

    def require(self, outcome: Node, what: str) -> None:
        """Check at every call that a comparison comes out as it did."""
        self.node("call_function", torch._assert, (outcome, assertion(what))).meta["kind"] = "other"

    def size(self, tensor: Tensor, axis: int) -> Any:
        """The size of an activation along an axis, as Python gets it: an int where layers settle it."""
        node = self.find(tensor)
        assert node is not None
        axis = axis % tensor.dim()
        views.settle(self._unsettled(), self.modules)
        found = views.size(node, axis)
        if isinstance(found, int):
            return found
        value, axis = found if found is not None else (node, axis)
        if value.op == "get_attr" or value._erased:
            return tensor.size(axis)
        return symbolic(Number(self.session, "size", (value, axis), self.shapes.get(value, tensor.shape)[axis]))

    def _unsettled(self) -> list[Node]:
        nodes = [node for node in self.ordered[self.settled :] if not node._erased]
        self.settled = len(self.ordered)
        return nodes

    # Modules.

    def push(self, path: str, module: nn.Module, args: Any) -> _Frame:
        """Begin with a module."""
        frame = _Frame(
            path, module, next(iter(reversed(self.graph.nodes)), None), len(self.journal), len(self.conditions),
            len(self.remarks), len(self.journal), [(item, list(item)) for item in _containers(args)],
        )  # fmt: skip
        self.frames.append(frame)
        return frame

    def roll_back(self, frame: _Frame) -> None:
        """Take back all that was recorded since a module was begun with.

        Raises:
            _RestartError: It has written to memory that was there before.
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
        while self.ordered and self.ordered[-1]._erased:
            self.ordered.pop()
        self.settled = min(self.settled, len(self.ordered))
        self.session.state.restore(frame.module.modules())
        if frame.oldest_write <= frame.serial:
            raise _RestartError(frame.path)
        for container, items in frame.arguments:
            if isinstance(container, list):
                container[:] = items


_PLAIN = (bool, int, float, complex, str)
_SETTINGS = (torch.memory_format, torch.layout)


def _containers(value: Any) -> Iterator[list[Any]]:
    if isinstance(value, list):
        yield value
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from _containers(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _containers(item)


def _reads_values(node: Node, source: Node) -> bool:
    """Whether a node reads the values of another, and not just its shape and type."""
    name = facts.target_name(node)
    like = name.startswith("new_") or (name.endswith("_like") and not name.startswith("rand"))
    return not (facts.reads_only_metadata_of(node, source) or (like and node.args[:1] == (source,)))


def _autocast() -> tuple[Any, ...]:
    """What automatic mixed precision does at the moment; a graph cannot say that it changes."""
    return tuple(torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) for device in ("cpu", "cuda"))


def leaves(value: Any) -> Iterator[Any]:
    """What nested tuples, lists, dicts and slices hold."""
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from leaves(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from leaves(item)
    elif type(value) is slice:
        yield from (value.start, value.stop, value.step)
    else:
        yield value


def mapped(value: Any, function: Callable[[Any], Any]) -> Any:
    """Nested tuples, lists, dicts and slices with a function applied to what they hold."""
    if isinstance(value, torch.Size):
        return tuple(function(item) for item in value)
    if isinstance(value, tuple):
        items = [mapped(item, function) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, list):
        return [mapped(item, function) for item in value]
    if isinstance(value, dict):
        return {key: mapped(item, function) for key, item in value.items()}
    if type(value) is slice:
        return slice(function(value.start), function(value.stop), function(value.step))
    return function(value)


def _is_mask(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in (torch.bool, torch.uint8)


class _Parts(tuple[Any, ...]):
    """Several parts of a value. How many there are depends on its size, and is decided by when Python asks."""

    number: Any
    session: Session

    def __new__(cls, parts: Iterable[Any], session: Session, number: Any) -> _Parts:
        """The parts, and their number."""
        made = super().__new__(cls, parts)
        made.session, made.number = session, number
        return made

    def __len__(self) -> int:
        return int(self.number)

    def __iter__(self) -> Iterator[Any]:
        int(self.number)
        return super().__iter__()

    def __getitem__(self, index: Any) -> Any:
        if type(index) is int and index >= 0:
            at_least = Number(self.session, operator.gt, (self.number.node, index), True)
            self.session.decide(at_least, True, small=True)
        else:
            int(self.number)
        return super().__getitem__(index)


class _Watched(dict[str, Any]):
    """The children or the tensors of a module, and who is to be told when one is taken out by name.

    What is done with those that are only gone through is seen where it is done.
    """

    def __init__(self, values: dict[str, Any], tell: Callable[[], None]) -> None:
        super().__init__(values)
        self.tell = tell

    def __getitem__(self, key: str) -> Any:
        self.tell()
        return super().__getitem__(key)

    def __copy__(self) -> dict[str, Any]:
        return dict(self)


class _Net(TorchDispatchMode):
    """Below the recorder: what reads an activation unseen, writes to the model, or has to run at every call."""

    def __init__(self, session: Session) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.session = session

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        session, kwargs = self.session, kwargs or {}
        tape = session.tape
        session.draws = session.draws or torch.Tag.nondeterministic_seeded in func.tags
        if tape is None or session.paused:
            if may_write(func):
                session.writes_of_python.note(func, args, kwargs)
            return session.note_made(func(*args, **kwargs), None)
        reads = any(isinstance(value, Tensor) and tape.find(value) is not None for value in leaves((args, kwargs)))
        if not session.inside and reads:
            session.refuse(f"{func} reads an activation unseen")
        if not session.inside and torch.Tag.nondeterministic_seeded in func.tags:
            session.refuse(f"it draws random numbers ({func})")
        if torch.Tag.dynamic_output_shape in func.tags and (
            func is not torch.ops.aten.index.Tensor or any(_is_mask(item) for item in leaves(args[1]))
        ):
            session.shapes_by_value = True
        if may_write(func):
            for tensor in written_by(func, args, kwargs):
                session.writes(tensor, func)
        return session.note_made(func(*args, **kwargs), tape)


class Session(TorchFunctionMode):
    """Records a call of a private copy; see the module's docstring.

    Args:
        root: A private copy in eval mode.
        free: Whether sizes have to stay free: a module that decides by one is opaque then.
        given: Whether the inputs are an example; of inputs that were made up, no shape is taken for a fact.
        only: The modules that may be recorded as parts of Python that stays; any where None.
    """

    def __init__(
        self, root: nn.Module, *, free: bool, given: bool = True, only: frozenset[nn.Module] | None = None
    ) -> None:
        super().__init__()
        self.root, self.free, self.given, self.only = root, free, given, only
        self.modules = list(root.modules())
        self.state = State(())
        self.storages = tensor_storages(self.modules)
        self.owners = {id(tensor): module for module in reversed(self.modules) for _, tensor in tensors_in(module)}
        self.writes_of_python = Writes(self.storages)
        self.stack: list[_Tape] = []
        self.parts: list[dict[str, Recorded]] = [{}]
        self.opaque: dict[nn.Module, str] = {}
        self.made: dict[int, tuple[TensorWeakRef, _Tape | None]] = {}
        self.inside = self.paused = 0
        self.failed: UnrecordableError | None = None
        self.failed_in: list[_Frame] = []
        self.genuine: BaseException | None = None
        self.by_size = self.shapes_by_value = False
        self.doubtful: list[tuple[nn.Module, str, Any]] = []
        self.collecting: list[list[tuple[Number, bool]]] = []
        self.refused_size = False
        self.holders: dict[int, set[nn.Module]] = {}
        self.running: list[nn.Module] = []  # modules that run as Python
        self.read: set[nn.Module] = set()
        self.wrote = self.draws = False
        self.given_constants: dict[int, list[Tensor]] = {}
        self.snapshots: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def tape(self) -> _Tape | None:
        """What is being recorded."""
        return self.stack[-1] if self.stack else None

    # Recording a module as a graph of its own.

    def record(self, call: Call, *, entries: Sequence[tuple[str, Call]] = ()) -> Recorded:
        """Record a call of the root.

        Args:
            call: Its arguments, which the call may change.
            entries: Methods of the root and calls of them, where the root stays Python, and parts of it are recorded.
        """
        while True:
            self.stack, self.parts, self.inside, self.paused = [], [{}], 0, 0
            self.failed = self.genuine = None
            self.doubtful, self.running, self.read = [], [], set()
            with self._intercepting():
                self.state = State(self.modules)
                self.holders = {}
                for module, contents in self.state.contents.items():
                    for name in contents:
                        self.holders.setdefault(id(module.__dict__[name]), set()).add(module)
                try:
                    with torch.random.fork_rng(devices=()), torch.no_grad(), self, _Net(self):
                        recorded = "" if entries else self._record(self.root, "", _cloned(call), self.root.forward)
                        self._check_constants(call)
                        if isinstance(recorded, str):
                            recorded = self._run_as_python(entries or [("forward", call)], recorded)
                    recorded.by_size, recorded.draws = self.by_size, self.draws
                    if again := self._read_parts(recorded):
                        self.opaque |= again
                        continue
                    return recorded
                except _RestartError:
                    continue
                finally:
                    self.stack = []
                    self.state.restore(self.modules)
                    self.writes_of_python.undo()

    def _read_parts(self, recorded: Recorded) -> dict[nn.Module, str]:
        """Parts that Python which stays has looked into: they have to stay Python themselves."""
        found = {}
        for part in recorded.parts.values():
            if part.graph is None:
                continue
            inner = list(part.root.modules())
            others = {other.root for other in recorded.parts.values()} - {part.root}
            if any(module in self.read or module in others for module in inner):
                found[part.root] = "the Python around it reads what is inside of it"
            else:
                found |= self._read_parts(part)
        return found

    def _check_constants(self, call: Call) -> None:
        """Run the root once more where it replaced tensors of its own by others: they must come out the same again.

        Raises:
            _RestartError: They do not; the modules that hold them are opaque from now on.
        """
        if not self.doubtful:
            return
        args, kwargs = _cloned(call)
        self.root.forward(*args, **kwargs)
        others = [item for item in self.doubtful if not _is_same_tensor(item[2], _held(item[0], item[1]))]
        self.doubtful = []
        for module, name, _ in others:
            self.opaque[module] = f"it changes its own {name} at every call"
        if others:
            raise _RestartError

    def _run_as_python(self, entries: Sequence[tuple[str, Call]], reason: str) -> Recorded:
        """Run the root as it is, and record its parts."""
        recorded = Recorded(self.root, None, dict(self.root.named_modules()), _cloned(entries[0][1]))
        tape = _Tape(self, self.root, "", is_part=False)
        if reason:
            recorded.remarks.append(Remark("capture", "Record", "", f"kept as Python: {reason}"))
        self.stack.append(tape)
        self.paused += 1
        self.running.append(self.root)
        try:
            for name, call in entries:
                args, kwargs = _cloned(call)
                recorded.outputs[name] = getattr(self.root, name)(*args, **kwargs)
            recorded.output = recorded.outputs[entries[0][0]]
        finally:
            self.running.pop()
            self.paused -= 1
            self.stack.pop()
        recorded.parts = self.parts[-1]
        recorded.remarks += tape.remarks
        return recorded

    def _record(
        self, module: nn.Module, prefix: str, call: Call, forward: Callable[..., Any], *, is_part: bool = False
    ) -> Recorded | str:
        """Record a call of a module as a graph; the reason where that cannot be."""
        kept = self.inside, self.paused
        self.inside, self.paused = 1, 0  # what is done here is nobody's business
        tape = _Tape(self, module, prefix, is_part)
        with quiet():
            recorded = Recorded(module, tape.graph, tape.modules, _cloned(call))
        self.stack.append(tape)
        self.parts.append({})
        self.inside = 0
        try:
            frame = tape.push("", module, call)
            try:
                if module in self.opaque:
                    self.refuse(self.opaque[module])
                with quiet():
                    args, kwargs = self._inputs(tape, module, forward, call)
                recorded.output = forward(*args, **kwargs)
                with quiet():
                    self._raise_swallowed(frame)
                    self._check_state(module)
                    self._type_conditions(tape, frame)
                    self._output(tape, recorded.output)
            except (_RestartError, KeyboardInterrupt):
                raise
            except (Exception, UnrecordableError) as error:
                self.failed = None
                if error is self.genuine:
                    raise
                self.refused_size = self.refused_size and isinstance(error, UnrecordableError)
                try:
                    tape.roll_back(frame)
                except _RestartError:
                    self.opaque[module] = first_line(error)
                    raise
                if not self.refused_size or self.collecting:
                    return first_line(error)
                self.refused_size = False
                tape.push("", module, call)
                try:
                    with quiet():
                        given = self._inputs(tape, module, forward, call)
                    recorded.output = self._in_all_ways(tape, module, "", *given)
                    with quiet():
                        self._output(tape, recorded.output)
                except DifferError:
                    return first_line(error)
            finally:
                parts = self.parts.pop()
            recorded.parts, recorded.remarks = parts, tape.remarks
        finally:
            self.stack.pop()
            self.inside, self.paused = kept
        with quiet():
            recorded.output = _plain_numbers(recorded.output)
        recorded.made, recorded.arguments = tape.made, tuple(tape.arguments)
        recorded.numbers, recorded.shapes = tape.number_nodes, tape.shapes
        _tidy(tape)
        return recorded

    def _inputs(self, tape: _Tape, module: nn.Module, forward: Callable[..., Any], call: Call) -> Call:
        """Placeholders under the names of a module's arguments, the tensors in them, and what has to stay of a call.

        Returns:
            The call, with numbers that are numbers of the graph.
        """
        args, kwargs = call
        signature = inspect.signature(forward)
        call_ = signature.bind(*args, **kwargs)
        bound = call_.arguments
        tape.arguments = []
        for name, parameter in signature.parameters.items():
            stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")  # type: ignore[call-overload]
            has_default = not stars and parameter.default is not parameter.empty
            default = parameter.default if _is_printable(parameter.default) else None
            value = bound.get(name, {"*": (), "**": {}}.get(stars, default))
            # What Python took from its signature is no number of the graph.
            same = next((other for other in tape.arguments if bound.get(other.name) is value), None)
            kind = kind_of(value, within=name not in bound)
            node = tape.node("placeholder", stars + name, (default,) if has_default else ())
            if same is not None and isinstance(value, Tensor):
                kind = "same", same.name
            tape.arguments.append(Argument(stars + name, kind, (default,) if has_default else ()))
            tape.note(node, value)
            if kind[0] == "number":
                bound[name] = symbolic(Number(self, None, (node,), value))
            self._open(tape, node, value)
        tape.valueless.difference_update(tape.graph.nodes)
        return call_.args, call_.kwargs

    def _open(self, tape: _Tape, node: Node, value: Any) -> None:
        """Find the tensors in an argument; numbers in it are numbers of the graph."""
        if isinstance(value, Tensor):
            node.meta["device"] = value.device
            tape.bind(value, node)
        elif type(value) in (tuple, list, dict) or isinstance(value, Mapping):
            for name, item in list(value.items() if isinstance(value, Mapping) else enumerate(value)):
                if any(isinstance(leaf, Tensor) for leaf in leaves(item)) or hasattr(item, "__dict__"):
                    inner = tape.node("call_function", operator.getitem, (node, name))
                    tape.containers.append(inner)
                    tape.note(inner, item)
                    self._open(tape, inner, item)
        elif hasattr(value, "__dict__") and not isinstance(value, (type, nn.Module)) and not callable(value):
            tape.results(value, node)

    def _output(self, tape: _Tape, value: Any) -> None:
        """The output node; anything but tuples, lists and dicts is rebuilt at the end of every call."""
        frame = tape.frames[-1]
        if is_plain(value, OURS):
            made = mapped(value, tape.argument)
        else:
            rebuild = Rebuild.of(value, OURS)
            if isinstance(rebuild, str):
                self.refuse(rebuild)
            name = tape.name_for("_output", rebuild)
            tape.modules[name] = rebuild
            made = tape.node("call_module", name, tuple(tape.argument(item) for item in Rebuild.slots(value, OURS)))
            made.meta["kind"] = "unknown"
        tape.frames.pop()
        node = tape.graph.output(made)
        node.meta["scope"] = frame.path

    # Modules.

    @contextmanager
    def _intercepting(self) -> Iterator[None]:
        """See the calls of all modules of the private copy, and who looks into them."""
        seen = [module for module in self.modules if module is not self.root and _is_plainly_called(module)]
        looked_into = [module for module in self.modules if type(module.__dict__.get("_modules")) is dict]
        try:
            for module in seen:
                module.__dict__["_compiled_call_impl"] = partial(self._called, module)
            for module in looked_into:
                for name in ("_modules", "_parameters", "_buffers"):
                    module.__dict__[name] = _Watched(module.__dict__[name], partial(self._looked_into, module))
            yield
        finally:
            for module in looked_into:
                for name in ("_modules", "_parameters", "_buffers"):
                    module.__dict__[name] = dict(module.__dict__[name])
            for module in seen:
                module.__dict__.pop("_compiled_call_impl", None)

    def _looked_into(self, module: nn.Module) -> None:
        """Told when a module's tensors or children are read: by Python that stays, of others, they have to stay."""
        if self.paused and not self.inside and not self._is_within_part() and module is not self.running[-1]:
            self.read.add(module)

    def _is_within_part(self) -> bool:
        """Whether the Python that runs is that of a part, or of a layer."""
        return not self.running or any(is_leaf(module) or self._part_of(module) for module in self.running[1:])

    def _part_of(self, module: nn.Module) -> bool:
        return any(part.root is module and part.graph is not None for part in self.parts[-1].values())

    def _used(self, func: Any, args: Any, kwargs: Any) -> None:
        """Told when Python that stays calls torch: what it does with the tensors of others counts as looking into them."""
        attribute = getattr(getattr(func, "__self__", None), "__name__", "") if func.__name__ == "__get__" else ""
        if attribute not in ("dtype", "device", "requires_grad", "is_cuda", "layout"):
            for leaf in leaves((args, kwargs)):
                if isinstance(leaf, Tensor) and (owner := self.owners.get(id(leaf))) is not None:
                    self._looked_into(owner)

    def _called(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """A call of a module."""
        tape = self.tape
        if tape is None or self.inside or module not in tape.paths:
            return module._call_impl(*args, **kwargs)
        if self.paused:
            return self._part(tape, module, args, kwargs)
        with quiet():
            path = tape.paths[module]
            is_seen = any(tape.is_activation(leaf) or isinstance(leaf, SYMBOLIC) for leaf in leaves((args, kwargs)))
            is_kept, reason = self._is_kept(module)
            frame = None if is_kept else tape.push(path, module, (args, kwargs))
        if frame is None:
            if not is_seen and not carries_hooks(module):
                return module._call_impl(*args, **kwargs)
            return self._leaf(tape, module, path, args, kwargs, reason)
        try:
            result = module._call_impl(*args, **kwargs)
            with quiet():
                self._raise_swallowed(frame)
                self._check_state(module)
                self._type_conditions(tape, frame)
        except (_RestartError, KeyboardInterrupt):
            raise
        except (Exception, UnrecordableError) as error:
            self.failed = None
            if error is self.genuine:
                raise
            self.refused_size = self.refused_size and isinstance(error, UnrecordableError)
            reason = f"{type(module).__name__} is kept as it is: {first_line(error)}"
            try:
                tape.roll_back(frame)
            except _RestartError:
                self.opaque[module] = first_line(error)
                raise
            if self.refused_size:
                self.refused_size = False
                try:
                    return self._in_all_ways(tape, module, path, args, kwargs)
                except DifferError:
                    pass
            return self._leaf(tape, module, path, args, kwargs, reason)
        tape.frames.pop()
        return result

    # Deciding in all ways.

    def _in_all_ways(self, tape: _Tape, module: nn.Module, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Record a module that decides by sizes in every way that it may decide; see :mod:`reparam.capture.paths`.

        Raises:
            DifferError: The ways are not the same operations, or not all of them were seen.
        """
        call = mapped((args, kwargs), hinted)
        recorded, base = self._way(module, path, call)
        tree = Tree(base)
        with self._unrecorded():
            others = list(other_calls(call))
        for other in others:
            if not tree.is_complete():
                try:
                    way = self._way(module, path, other)[1]
                except Exception:  # it takes no such images
                    continue
                tree.add(way)
        if not tree.is_complete():
            raise DifferError("not all ways were seen")
        with quiet(), self._unrecorded():
            arguments = merged(tree, base)
        frame = tape.push(path, module, ())
        try:
            with quiet():
                result = self._inlined(tape, path, (args, kwargs), recorded, base, arguments, tree.places)
        except (DifferError, UnrecordableError) as error:
            self.failed = None
            tape.roll_back(frame)
            raise DifferError(first_line(error)) from error
        tape.frames.pop()
        return result

    def _way(self, module: nn.Module, path: str, call: Call) -> tuple[Recorded, Path]:
        """One way in which a module decides."""
        self.collecting.append([])
        try:
            recorded = self._record(module, path, call, module.forward, is_part=True)
        except Exception as error:
            if error is self.genuine:
                self.genuine = None
            raise
        finally:
            decisions = self.collecting.pop()
            self.state.restore(module.modules())
        if isinstance(recorded, str) or recorded.parts:
            raise DifferError(recorded if isinstance(recorded, str) else "it calls Python that stays")
        if not is_plain(recorded.output) or not all(leaf is None or isinstance(leaf, Tensor) for leaf in leaves(recorded.output)):
            raise DifferError("it returns more than tensors")
        assert recorded.graph is not None
        nodes = [node for node in recorded.graph.nodes if node not in recorded.numbers]
        return recorded, Path(nodes, recorded.numbers, recorded.made, decisions)

    @contextmanager
    def _unrecorded(self) -> Iterator[None]:
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1

    def _inlined(
        self,
        tape: _Tape,
        path: str,
        call: Call,
        recorded: Recorded,
        base: Path,
        arguments: Mapping[Node, Any],
        places: Mapping[Node, int],
    ) -> Any:
        """Put the graph of a module in the place of its call."""
        module, (args, kwargs) = recorded.root, call
        bound = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        made: dict[Node, Any] = {}

        def number(value: Number) -> Any:
            operands = tuple(number(item) if isinstance(item, Number) else item for item in value.operands)
            if value.function == "size" or value.function is None:
                node = base.nodes[places[operands[0]]]
                if value.function is None:
                    return bound[str(node.target)]
                operands = made[node], *operands[1:]
            return Number(self, value.function, operands, value.hint)

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
                    if name.startswith("*") or not isinstance(value, (Tensor, bool, int, float, str, type(None), *SYMBOLIC)):
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
            scope = str(node.meta.get("scope", ""))
            twin.meta = {**node.meta, "scope": f"{path}.{scope}" if scope and path else path or scope}
            tape.shapes[twin] = recorded.shapes.get(node)
            made[node] = twin
        output = next(iter(reversed(recorded.graph.nodes))).args[0]  # type: ignore[union-attr]
        pairs = zip(leaves(recorded.output), leaves(output), strict=True)
        for value, node in pairs:
            if isinstance(value, Tensor):
                tape.bind(value, made[node])
            elif value is not None:
                raise DifferError("it returns more than tensors")
        return recorded.output

    def _is_kept(self, module: nn.Module) -> tuple[bool, str | None]:
        """Whether a module is run as one leaf, and why; None for a layer."""
        if is_leaf(module) and not isinstance(module, torch.jit.ScriptModule):
            return True, None
        name = type(module).__name__
        if isinstance(module, torch.jit.ScriptModule):
            return True, "a scripted module, kept as it is"
        if carries_hooks(module):
            return True, f"{name} carries hooks, kept as it is"
        known = self.opaque.get(module)
        return known is not None, None if known is None else f"{name} is kept as it is: {known}"

    def _leaf(
        self, tape: _Tape, module: nn.Module, path: str, args: tuple[Any, ...], kwargs: dict[str, Any], reason: str | None
    ) -> Any:
        """Run a module as one leaf; ``reason`` says why it is one, None for a layer of torch's."""
        with quiet():
            given = mapped((tuple(args), kwargs), tape.argument)
        if reason is None:
            try:
                result = self._run(module._call_impl, args, kwargs)
            except UnrecordableError as error:
                self.failed = None
                hooks = ", carries hooks" if carries_hooks(module) else ""
                reason = f"{type(module).__name__} is kept as it is: {first_line(error)}{hooks}"
        if reason is not None:
            tape.remarks.append(Remark("capture", "Record", path, reason))
            result = self._as_python(module, mapped(args, hinted), mapped(kwargs, hinted))
        with quiet():
            if reason is not None:
                result = self._renamed(tape, result)
            else:
                given = self._written(tape, args, kwargs, given)
            node = tape.node("call_module", path, *given)
            node.meta["scope"] = path
            tape.valueless.discard(node)
            numbers = tape.results(result, node, module)
            if reason is not None:
                self._note_writes(tape, (args, kwargs))
                if numbers:
                    self.refuse(f"{path or 'a module'}, which is not recorded, returns numbers")
        return result

    def _renamed(self, tape: _Tape, result: Any) -> Any:
        """A result with other objects for tensors that are known: next time, they may be others."""
        if isinstance(result, Tensor):
            if tape.find(result) is None:
                return result
            self.inside += 1
            try:
                return result.view_as(result)
            finally:
                self.inside -= 1
        known = [leaf for leaf in Rebuild.slots(result, OURS) if isinstance(leaf, Tensor) and tape.find(leaf) is not None]
        if not known:
            return result
        self.inside += 1
        try:
            return copy.deepcopy(result, self._memo(result) | {id(leaf): leaf.view_as(leaf) for leaf in known})
        finally:
            self.inside -= 1

    def _memo(self, value: Any) -> dict[int, Any]:
        return {id(leaf): leaf for leaf in Rebuild.slots(value, OURS)}

    def _as_python(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Run a module as it is; what it raises is the model's own error."""
        self.paused += 1
        self.running.append(module)
        try:
            return module._call_impl(*args, **kwargs)
        except _RestartError:
            raise
        except BaseException as error:
            self.genuine = error
            raise
        finally:
            self.running.pop()
            self.paused -= 1

    def _note_writes(self, tape: _Tape, arguments: Any) -> None:
        """A module that is not recorded may write to what it is given."""
        for leaf in leaves(arguments):
            if isinstance(leaf, Tensor):
                for frame in tape.frames:
                    frame.oldest_write = min(frame.oldest_write, tape.births.get(storage_of(leaf), 0))

    def _part(self, tape: _Tape, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call by Python that is not recorded: of a part that may be a graph by itself."""
        parts = self.parts[-1]
        reason = self._is_kept(module)[1]
        if reason is not None or is_leaf(module) or (self.only is not None and module not in self.only):
            if module in self.opaque and not any(remark.message == reason for remark in tape.remarks):
                tape.remarks.append(Remark("capture", "Record", tape.paths[module], str(reason)))
            return self._as_python(module, args, kwargs)
        with quiet():
            path = ".".join(filter(None, (tape.prefix, tape.paths[module])))
            known = next((part for part in parts.values() if part.root is module), None)
            if known is not None:
                alike = kind_of(list(args)) == kind_of(list(known.call[0])) and kind_of(kwargs) == kind_of(known.call[1])
                known.alike = known.alike and alike
        if known is not None:
            return self._as_python(module, args, kwargs)
        with quiet():
            obstacle = self._obstacle(module)
        if obstacle is not None:
            self.opaque[module] = obstacle
            return self._part(tape, module, args, kwargs)
        recorded = self._record(module, path, (args, kwargs), module.forward, is_part=True)
        if not isinstance(recorded, str) and (reason := _shares_memory(recorded)) is not None:
            self.opaque[module] = reason
            raise _RestartError
        if isinstance(recorded, str):
            parts[path] = Recorded(module, None, {}, ((), {}))
            reason = f"{type(module).__name__} is kept as it is: {recorded}"
            tape.remarks.append(Remark("capture", "Record", path, reason))
            return self._as_python(module, args, kwargs)
        parts[path] = recorded
        return recorded.output

    def _obstacle(self, module: nn.Module) -> str | None:
        """Why a part may not be taken for what it computes by itself: the Python around it has a say in that."""
        inner = set(module.modules())
        for part in inner:
            for name, value in self.state.attributes[part].items():
                held = part.__dict__.get(name)
                if held is not value and (type(held) is not type(value) or isinstance(held, (Tensor, nn.Module)) or held != value):
                    return f"the Python around it sets its {name}"
            for name in self.state.contents[part]:
                if name not in ("_modules", "_parameters", "_buffers") and not self.holders[id(part.__dict__[name])] <= inner:
                    return f"it shares its {name} with the Python around it"
        return None

    # Calls of torch.

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tape = self.tape
        if tape is None or self.inside or self.paused:
            if tape is not None and not self.inside:
                self._used(func, args, kwargs)
            return func(*args, **kwargs)
        touched = list(leaves((args, kwargs)))
        reads = any(tape.is_activation(leaf) for leaf in touched)
        if not reads and not any(isinstance(leaf, SYMBOLIC) for leaf in touched):
            if tape.written and any(isinstance(leaf, Tensor) and storage_of(leaf) in tape.written for leaf in touched):
                self.refuse("it reads memory that was written to under another name")
            if any(isinstance(leaf, Tensor) and self.hides(leaf) for leaf in touched):
                self.refuse("it reads a value that was made inside of Python that is not recorded")
            return self._constant_call(tape, func, args, kwargs)
        name = getattr(func, "__name__", "")
        if name in ("__get__", "__set__"):
            attribute = getattr(func.__self__, "__name__", None) or func.__self__.fget.__name__
            if name == "__set__" and attribute not in ("requires_grad", "grad"):
                self.refuse(f"it sets the {attribute} of an activation")
            if attribute not in _VIEWS:
                return self._attribute(tape, func, attribute, args, kwargs)
        elif (answer := self._metadata(tape, name, func, args, kwargs)) is not _NOTHING:
            return answer
        return self._recorded_call(tape, func, name, args, kwargs, reads)

    def _constant_call(self, tape: _Tape, func: Any, args: Any, kwargs: Any) -> Any:
        """A call on constants alone: computed once, now, unless it draws random numbers."""
        name = aten.name_of(func) if isinstance(func, OpOverload) else getattr(func, "__name__", "")
        if name not in facts.RANDOM or name.endswith("_") and isinstance(args[0], Tensor) and storage_of(args[0]) in self.storages:
            return func(*args, **kwargs)
        result = self._run(func, args, kwargs)
        op, target, args, kwargs = said(func, name, args, kwargs)
        node = tape.node(op, target, *self._written(tape, args, kwargs, mapped((args, kwargs), tape.argument)))
        tape.valueless.discard(node)
        tape.results(result, node)
        return result

    def _attribute(self, tape: _Tape, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """An attribute of an activation that is no tensor."""
        node = tape.find(args[0])
        assert node is not None
        match name:
            case "shape":
                sizes = [tape.size(args[0], axis) for axis in range(args[0].dim())]
                return torch.Size(sizes)
            case "nbytes":
                self.refuse("it asks for the size of an activation in bytes")
            case "dtype" if tape.frames:
                tape.frames[-1].dtypes.setdefault(args[0].dtype, node)
        return func(*args, **kwargs)

    def _metadata(self, tape: _Tape, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        """What is asked of an activation besides its values."""
        first = args[0] if args else kwargs.get("input")
        if not isinstance(first, Tensor) or not tape.is_activation(first):
            return _NOTHING
        match name:
            case "size":
                axis = args[1] if len(args) > 1 else kwargs.get("dim")
                if axis is None:
                    return torch.Size([tape.size(first, i) for i in range(first.dim())])
                return tape.size(first, int(axis))
            case "numel" | "nelement":
                total: Any = 1
                for axis in range(first.dim()):
                    total = total * tape.size(first, axis)
                return total
            case "__len__":
                return int(tape.size(first, 0))
            case "__iter__":
                return iter(first.unbind(0) if int(tape.size(first, 0)) else ())
            case "__contains__" | "__bool__" | "__array__" | "item" | "tolist" | "numpy" | "__repr__" | "__format__":
                self.refuse(f"it asks for the value of an activation ({name})")
            case _ if name in _LAYOUT:
                self.refuse(f"it asks how an activation lies in memory ({name})")
            case _ if name in _HARMLESS:
                return func(*args, **kwargs)
        return _NOTHING

    def _recorded_call(
        self, tape: _Tape, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], reads: bool
    ) -> Any:
        """Run a function, and write it down."""
        if not reads and all(not isinstance(leaf, Tensor) for leaf in leaves((args, kwargs))):
            if name.startswith("sym_") and not kwargs:
                return func(*args)
            if name == "_assert":
                self.decide(args[0].node, bool(hinted(args[0])), demanded=True)
                return func(hinted(args[0]), *args[1:], **kwargs)
        if aten.is_check(func):
            return self._run(func, args, kwargs)
        if self.free and is_guarded():
            self.refuse("it would catch an error of what it calls, which may depend on its input")
        self.shapes_by_value = False
        result = self._run(func, args, kwargs)
        found = [leaf for leaf in leaves(result)]
        if not all(isinstance(leaf, Tensor) for leaf in found):
            if result is None or all(isinstance(leaf, (Tensor, type(None))) for leaf in found):
                pass  # an item that is set; a result that may be left out
            elif isinstance(result, (torch.dtype, torch.device)):
                return result
            else:
                self.refuse(f"{name} makes something else than tensors of an activation")
        op, target, args, kwargs = said(func, name, args, kwargs)
        given = self._written(tape, args, kwargs, mapped((args, kwargs), tape.argument))
        node = tape.node(op, target, *given)
        if self.shapes_by_value:
            tape.uncertain.add(node)
        if result is None:
            node.meta["kind"] = "other"
        else:
            if not self.wrote:
                result = self._renamed(tape, result)
            tape.results(result, node)
            if name in _SEVERAL and isinstance(result, (tuple, list)):
                return self._several(tape, node, args, kwargs, result)
        return result

    def _several(self, tape: _Tape, node: Node, args: Any, kwargs: Any, result: Any) -> Any:
        """Parts of a value whose number depends on its size, where no layer settles that."""
        names = {"dim": kwargs.get("dim"), "sections": next((v for k, v in kwargs.items() if k not in ("dim", "input")), None)}
        given = list(args[1:])
        if facts.target_name(node) != "unbind":
            names["sections"] = given.pop(0) if given else names["sections"]
        axis = given[0] if given else names["dim"] or 0
        tensor, sections = args[0] if args else kwargs["input"], names["sections"]
        if type(axis) is not int or isinstance(sections, (tuple, list)):
            return result
        size = tape.size(tensor, axis)
        if not isinstance(size, SYMBOLIC):
            return result
        match facts.target_name(node):
            case "split" | "unsafe_split":
                number = -(-size // sections)
            case "unbind":
                number = size
            case _:
                number = -(-size // -(-size // sections))
                # As many as were asked for, as there are of every size from n (n - 1) on: what unpacking them takes.
                asked = Number(self, operator.ge, (size.node, sections * (sections - 1)), True)
                if len(result) == sections <= 2 and size.node.hint >= sections * (sections - 1):
                    self.decide(asked, True, small=True)
                    return result
        return _Parts(result, self, number)

    def _run(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Call a function that is written down, with numbers in the place of symbolic ones."""
        self.snapshots, self.wrote = {}, False
        self.given_constants = self._constants_among(args, kwargs)
        self.inside += 1
        try:
            return function(*mapped(args, hinted), **mapped(kwargs, hinted))
        except Exception as error:
            self.failed = UnrecordableError(f"it catches an error that may depend on its input: {first_line(error)}")
            self.failed_in = self.tape.frames[-1:] if self.tape else []
            raise
        finally:
            self.inside -= 1

    def _constants_among(self, args: Any, kwargs: Any) -> dict[int, list[Tensor]]:
        """The arguments that are constants, by the memory that they lie in."""
        assert self.tape is not None
        found: dict[int, list[Tensor]] = {}
        for leaf in leaves((args, kwargs)):
            if isinstance(leaf, Tensor) and self.tape.find(leaf) is None:
                found.setdefault(storage_of(leaf), []).append(leaf)
        return found

    def _written(self, tape: _Tape, args: Any, kwargs: Any, given: Any) -> Any:
        """The arguments, where a constant that the call wrote to is a copy of what it was before, made at every call."""
        if not self.snapshots:
            return given
        for leaf in leaves((args, kwargs)):
            found = self.snapshots.get(id(leaf)) if isinstance(leaf, Tensor) else None
            if found is not None and tape.find(leaf) is None:
                node = tape.node("call_method", "clone", (tape.constant(found[1]),))
                tape.note(node, leaf)
                tape.valueless.discard(node)
                tape.bind(leaf, node)
                tape.written.add(storage_of(leaf))
        return mapped((tuple(args), kwargs), tape.argument)

    def writes(self, tensor: Tensor, func: Any) -> None:
        """Told before a tensor is written to."""
        tape, storage = self.tape, storage_of(tensor)
        assert tape is not None
        self.wrote = True
        if storage in self.storages:
            self.refuse(f"it writes to its own tensors ({func})")
        born = tape.births.get(storage, 0)
        if not self.inside:
            return  # one constant to another
        if tape.find(tensor) is None and not born:
            for constant in self.given_constants.get(storage, ()):
                self.snapshots.setdefault(id(constant), (constant, constant.detach().clone()))
            return
        for frame in tape.frames:
            frame.oldest_write = min(frame.oldest_write, born)

    # Decisions.

    def decide(self, number: Number, outcome: bool, *, small: bool = False, demanded: bool = False) -> None:
        """Told of a number that Python decides by."""
        tape = self.tape
        if tape is None or self.inside or self.paused:
            return
        if any(condition[:2] == (number.key, outcome) for condition in tape.conditions):
            return
        said = words(number, outcome)
        if is_always(number, outcome, 0):
            return
        sources = list(number.sources())
        if is_always(number, outcome, 1):
            number, outcome, small = Number(self, operator.ge, (sources[0], 1), True), True, True
            said = words(number, outcome)
        if any(isinstance(s.operands[0], Node) and s.operands[0] in tape.uncertain for s in sources):
            self.refuse("it decides by how many values there are of some kind")
        demanded = demanded or is_demanded()
        if self.collecting and tape.is_part:
            if not demanded and not small:
                self.collecting[-1].append((number, outcome))
                tape.conditions.append((number.key, outcome))
            return
        self.by_size = self.by_size or not (demanded or small)
        of_arguments = not tape.is_part and all(source.function is None for source in sources)
        if self.free and not demanded and not small and not of_arguments and not _is_about_nothing(number, outcome):
            self.refused_size = True
            self.refuse(f"it decides by sizes ({said})")
        tape.conditions.append((number.key, outcome))
        held = number
        if not outcome:
            opposite = NEGATED.get(number.function)
            held = Number(self, opposite, number.operands, True) if opposite else Number(self, operator.not_, (number,), True)
        tape.require(tape.number(held), said)
        if not demanded and not small:
            tape.remarks.append(Remark("capture", "Condition", tape.frames[-1].path, f"only for inputs where {said}"))

    def _type_conditions(self, tape: _Tape, frame: _Frame) -> None:
        """A module that asked for a type and did not hand it on may have decided by it."""
        for dtype, node in frame.dtypes.items():
            if dtype not in frame.handed_on and (dtype, node) not in tape.conditions:
                tape.conditions.append((dtype, node))
                same = tape.node("call_function", operator.eq, (tape.attribute(node, "dtype", dtype), dtype))
                same.meta["kind"] = "other"
                tape.require(same, f"{_named(node)} is of {dtype}")

    def _check_state(self, module: nn.Module) -> None:
        """Refuse what a module comes to hold; what seems to come from constants alone is looked at again later."""
        self.state.check(module, self.remembers)
        for name, old in self.state.contents[module].items():
            if name not in ("_modules", "_parameters", "_buffers") and not same_items(old, module.__dict__[name]):
                self.doubtful.append((module, name, copy.copy(module.__dict__[name])))
        for values, old in ((module.__dict__, self.state.attributes), (module._buffers, None)):
            before = old[module] if old is not None else self.state.contents[module].get("_buffers", {})
            for name, value in before.items():
                if isinstance(value, Tensor) and isinstance(new := values.get(name), Tensor) and new is not value:
                    if self.tape is not None and self.tape.find(new) is None:  # else it is made anew in the graph
                        with self._unrecorded():
                            self.doubtful.append((module, name, new.detach().clone()))

    def remembers(self, value: Any) -> bool | None:
        """Whether a value holds something of the call: True for values, False for what sizes and constants give."""
        tape = self.tape
        assert tape is not None
        found = None
        for leaf in leaves(value):
            if isinstance(leaf, SYMBOLIC):
                found = bool(found)
            elif isinstance(leaf, Tensor):
                node = tape.find(leaf)
                found = bool(found) or self.hides(leaf) or (node is not None and node not in tape.valueless)
        return found

    def hides(self, tensor: Tensor) -> bool:
        """Whether a tensor was made by something else than what is being recorded, since recording began."""
        found = self.made.get(id(tensor))
        return found is not None and found[1] is not self.tape and found[0]() is tensor

    def note_made(self, result: Any, by: _Tape | None) -> Any:
        """Note who made the tensors in a result: what is being recorded, or Python that is not."""
        for value in leaves(result):
            if isinstance(value, Tensor):
                self.made[id(value)] = TensorWeakRef(value), by
        return result

    def refuse(self, reason: str) -> Any:
        """Raise what makes the innermost module opaque."""
        self.failed, self.failed_in = UnrecordableError(reason), self.tape.frames[-1:] if self.tape else []
        raise self.failed

    def _raise_swallowed(self, frame: _Frame) -> None:
        """Models may catch everything that is raised in them."""
        if self.failed is not None and self.failed_in == [frame]:
            raise self.failed


_NOTHING: Any = object()

# Within it, what is asked of a tensor is nobody's business.
quiet = torch._C.DisableTorchFunction


def _is_about_nothing(number: Number, outcome: bool) -> bool:
    """Whether a decision is one between something and nothing: a size, or a product of sizes, is not 0."""
    match number.function, number.operands:
        case (operator.gt | operator.ne), (Number() as size, 0):
            return outcome and _is_product(size)
        case (operator.eq | operator.le), (Number() as size, 0):
            return not outcome and _is_product(size)
        case operator.ge, (Number() as size, 1):
            return outcome and _is_product(size)
        case operator.lt, (Number() as size, 1):
            return not outcome and _is_product(size)
    return False


def _is_product(number: Any) -> bool:
    if not isinstance(number, Number):
        return type(number) is int and number > 0
    return number.function == "size" or (number.function is operator.mul and all(map(_is_product, number.operands)))


def _is_plainly_called(module: nn.Module) -> bool:
    """Whether calling a module does no more than run its hooks and its forward."""
    return type(module).__call__ is nn.Module.__call__ or isinstance(module, torch.fx.GraphModule)


def _shares_memory(recorded: Recorded) -> str | None:
    """Why a part may not be replaced by what computes the same."""
    assert recorded.graph is not None
    if aliasing.writes_to_inputs(recorded.graph, recorded.modules):
        return "it changes its inputs in place"
    return None


def _plain_numbers(value: Any) -> Any:
    """An output with plain numbers in the place of symbolic ones."""
    if is_plain(value, OURS):
        return mapped(value, hinted)
    slots = Rebuild.slots(value, OURS)
    if not any(isinstance(slot, SYMBOLIC) for slot in slots):
        return value
    return Rebuild.of(value, OURS)(*map(hinted, slots))  # type: ignore[operator]


def _held(module: nn.Module, name: str) -> Any:
    return module._buffers[name] if name in module._buffers else module.__dict__.get(name)


def _is_same_tensor(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor):
        return len(a) == len(b)
    return isinstance(b, Tensor) and a.shape == b.shape and torch.equal(a, b)


def _is_printable(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))


def _cloned(call: Call) -> Call:
    """Arguments on copies of their tensors."""
    args, kwargs = clones((tuple(call[0]), dict(call[1])))
    return args, kwargs


def _tidy(tape: _Tape) -> None:
    """Ask for conditions first, leave out what takes containers apart and is not read, and numbers that nothing needs."""
    for node in [node for node in tape.graph.nodes if node.target is torch._assert]:
        _move_up(node, set())
    for node in reversed(tape.graph.nodes):
        is_idle = not node.users and (node in tape.containers or node.op == "get_attr" or node.meta.get("kind") == "other")
        if is_idle and node.op in ("call_function", "call_method", "get_attr") and not node.is_impure():
            tape.graph.erase_node(node)


def _move_up(node: Node, moved: set[Node]) -> None:
    """Put a condition, and the numbers that it is about, right behind what these are sizes of."""
    moved.add(node)
    for source in node.all_input_nodes:
        if source.meta.get("kind") == "other" and source.op.startswith("call") and source not in moved:
            _move_up(source, moved)
    last = max(node.all_input_nodes, default=None)
    while last is not None and last.next.op == "placeholder":
        last = last.next
    if last is not None and last.next is not node:
        last.append(node)


def said(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, Any, tuple[Any, ...], dict[str, Any]]:
    """A call in the words of the graph: methods by name, Python's operators as its functions, functions as themselves."""
    if isinstance(func, OpOverload):
        rank = args[0].dim() if args and isinstance(args[0], Tensor) else None
        return aten.said(func, args, kwargs, rank)
    if name == "__get__":
        return "call_function", getattr, (args[0], func.__self__.__name__), {}
    own = getattr(Tensor, name, None)
    is_method = own is not None and (own is func or own == func or _owner(func).startswith(("Tensor.", "TensorBase.")))
    if not is_method:
        known = getattr(torch, name, None)
        return "call_function", known if known == func else func, args, kwargs
    plain = name.removesuffix("_") if not name.startswith("__") else name
    if plain in _ARITHMETIC and not kwargs and len(args) == (1 if plain == "neg" else 2) and "out" not in kwargs:
        if name.endswith("_") and plain in ("neg", "matmul"):
            return "call_method", name, args, kwargs
        word = ("i" if name.endswith("_") else "") + _ARITHMETIC[plain]
        return "call_function", getattr(operator, word), args, {}
    if name.startswith("__") and name.endswith("__"):
        word = name.strip("_")
        if hasattr(operator, name):
            return "call_function", getattr(operator, name), args, kwargs
        reflected = {"rdiv": "truediv"}.get(word, word[1:])
        if word.startswith("r") and hasattr(operator, reflected):
            return "call_function", getattr(operator, reflected), args[::-1], kwargs
    return "call_method", name, args, kwargs


def _named(node: Node) -> str:
    return str(node.target) if node.op == "placeholder" else f"{node.name} in {node.meta.get('scope')}"


def _owner(func: Any) -> str:
    return str(getattr(func, "__qualname__", ""))

"""Calls of torch, as they happen: written down, computed once, answered, or refused."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Node
from torch.overrides import TorchFunctionMode
from torch.utils.weak import TensorWeakRef

from reparam.capture import aten
from reparam.capture.copies import storage_of
from reparam.capture.demands import is_demanded, is_guarded
from reparam.capture.sizes import NEGATED, OURS, SYMBOLIC, Number, hinted, is_about_nothing, is_always, pinned
from reparam.capture.state import UnrecordableError
from reparam.capture.structures import leaves, mapped
from reparam.capture.tape import Frame, Tape
from reparam.capture.watching import Pieces
from reparam.capture.words import said
from reparam.errors import first_line
from reparam.graph import facts, names
from reparam.graph.outputs import Rebuild
from reparam.report import Remark

# Attributes of a tensor that are tensors, and methods that say nothing of its values.
_VIEWS = frozenset("T mT H mH real imag data".split())
_HARMLESS = frozenset(
    """dim ndimension is_floating_point is_complex is_signed is_conj is_neg is_inference is_quantized get_device
    element_size has_names __hash__ is_coalesced is_pinned is_shared requires_grad_ register_hook retain_grad __dir__
    is_distributed""".split()
)
_LAYOUT = frozenset("stride is_contiguous storage_offset data_ptr storage untyped_storage is_set_to".split())
_VALUES = frozenset("__contains__ __bool__ __array__ item tolist numpy __repr__ __format__".split())
_NOTHING: Any = object()

# Within it, what is asked of a tensor is nobody's business.
quiet = torch._C.DisableTorchFunction


class Calls(TorchFunctionMode):
    """Records what is asked of torch on the tape on top of a stack.

    Args:
        storages: The memory of the model's tensors.
        free: Whether sizes have to stay free: what decides by one is refused then.
        given: Whether the inputs are an example; of inputs that were made up, no shape is taken for a fact.
    """

    def __init__(self, storages: frozenset[int], free: bool, given: bool) -> None:
        super().__init__()
        self.storages, self.free, self.given = storages, free, given
        self.stack: list[Tape] = []
        self.inside = 0  # calls of torch that are written down, or nobody's business
        self.paused = 0  # modules that run as Python
        self.made: dict[int, tuple[TensorWeakRef, Tape | None]] = {}
        self.failed: UnrecordableError | None = None
        self.failed_in: list[Frame] = []
        self.by_size = self.refused_size = self.shapes_by_value = self.foreign = False
        self.collecting: list[list[tuple[Number, bool]]] = []
        self.wrote: set[int] = set()  # the memory that the last call wrote to
        self.draws = 0  # calls that drew random numbers
        self.given_constants: dict[int, list[Tensor]] = {}
        self.snapshots: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def tape(self) -> Tape | None:
        """What is being recorded."""
        return self.stack[-1] if self.stack else None

    @contextmanager
    def unrecorded(self) -> Iterator[None]:
        """Within it, nothing is written down."""
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1

    def refuse(self, reason: str) -> Any:
        """Raise what makes the innermost module opaque."""
        self.failed, self.failed_in = UnrecordableError(reason), self.tape.frames[-1:] if self.tape else []
        raise self.failed

    def note_write(self, func: Any, args: Any, kwargs: Any) -> None:
        """Told of every operator that Python which stays calls, and that may write."""

    def used(self, func: Any, args: Any, kwargs: Any) -> None:
        """Told when Python that stays calls torch."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tape = self.tape
        if tape is None or self.inside or self.paused:
            if tape is not None and not self.inside:
                self.used(func, args, kwargs)
            return func(*args, **kwargs)
        touched = list(leaves((args, kwargs)))
        reads = any(tape.is_activation(leaf) for leaf in touched)
        if not reads and not any(isinstance(leaf, SYMBOLIC) for leaf in touched):
            for leaf in touched:
                if isinstance(leaf, Tensor):
                    self.check_constant(tape, leaf)
            return self._constant_call(tape, func, args, kwargs)
        name = getattr(func, "__name__", "")
        attribute = ""
        if name in ("__get__", "__set__"):
            attribute = getattr(func.__self__, "__name__", None) or func.__self__.fget.__name__
            if name == "__set__" and attribute not in ("requires_grad", "grad"):
                self.refuse(f"it sets the {attribute} of an activation")
        if attribute not in _VIEWS:
            answer = self._answer(tape, attribute or name, func, args, kwargs)
            if answer is not _NOTHING:
                return answer
            if attribute:
                return func(*args, **kwargs)
        return self._recorded_call(tape, func, name, args, kwargs, reads)

    def check_constant(self, tape: Tape, tensor: Tensor) -> None:
        """Refuse a tensor that is no activation, and no constant either."""
        if storage_of(tensor) in tape.written:
            self.refuse("it reads memory that was written to under another name")
        if self.hides(tensor):
            self.refuse("it reads a value that was made inside of Python that is not recorded")

    def _constant_call(self, tape: Tape, func: Any, args: Any, kwargs: Any) -> Any:
        """A call on constants alone: computed once, now, unless it draws random numbers."""
        name = aten.name_of(func) if isinstance(func, OpOverload) else getattr(func, "__name__", "")
        if name not in names.RANDOM or (
            name.endswith("_") and isinstance(args[0], Tensor) and storage_of(args[0]) in self.storages
        ):
            return func(*args, **kwargs)
        result = self.run(func, args, kwargs)
        node = self._call_node(tape, func, name, args, kwargs)
        tape.valueless.discard(node)
        tape.results(result, node)
        return result

    def _call_node(self, tape: Tape, func: Any, name: str, args: Any, kwargs: Any) -> Node:
        op, target, args, kwargs = said(func, name, args, kwargs)
        return tape.node(op, target, *self.written(tape, args, kwargs, mapped((args, kwargs), tape.argument)))

    def _answer(self, tape: Tape, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        """What is asked of an activation besides its values."""
        first = args[0] if args else kwargs.get("input")
        if not isinstance(first, Tensor) or (node := tape.find(first)) is None:
            return _NOTHING
        match name:
            case "shape" | "size":
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
            case "dtype" if tape.frames:
                tape.frames[-1].dtypes.setdefault(first.dtype, node)
            case "nbytes":
                self.refuse("it asks for the size of an activation in bytes")
            case _ if name in _VALUES:
                if name not in ("__array__", "numpy") and self._is_settled(tape, (args, kwargs)):
                    return self.run(func, args, kwargs)
                self.refuse(f"it asks for the value of an activation ({name})")
            case _ if name in _LAYOUT:
                self.refuse(f"it asks how an activation lies in memory ({name})")
            case _ if name in _HARMLESS:
                return func(*args, **kwargs)
        return _NOTHING

    def _recorded_call(
        self, tape: Tape, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], reads: bool
    ) -> Any:
        """Run a function, and write it down."""
        if not reads and all(not isinstance(leaf, Tensor) for leaf in leaves((args, kwargs))):
            if name.startswith("sym_") and not kwargs:
                return func(*args)
            if name == "_assert":
                self.decide(args[0].node, bool(hinted(args[0])), demanded=True)
                return func(hinted(args[0]), *args[1:], **kwargs)
        if aten.is_check(func):
            return self.run(func, args, kwargs)
        if self.free and is_guarded():
            self.refuse("it would catch an error of what it calls, which may depend on its input")
        self.shapes_by_value, self.foreign, drew = False, False, self.draws
        result = self.run(func, args, kwargs)
        # An item that is set returns nothing, and so do results that may be left out.
        if not all(isinstance(leaf, (Tensor, type(None))) for leaf in leaves(result)):
            if isinstance(result, (torch.dtype, torch.device)) or (
                drew == self.draws and not self.wrote and self._is_settled(tape, (args, kwargs))
            ):
                return result
            self.refuse(f"{name} makes something else than tensors of an activation")
        node = self._call_node(tape, func, name, args, kwargs)
        if self.shapes_by_value:
            tape.uncertain.add(node)
        if self.foreign:
            tape.foreign.add(node)
        if self.draws > drew:
            tape.valueless.discard(node)
        if node not in tape.valueless:
            tape.filled(self.wrote)
        if result is None:
            facts.know(node, kind="other")
            return None
        if not self.wrote:
            result = self.renamed(tape, result)
        tape.results(result, node)
        if name in names.UNKNOWN_NUMBER and isinstance(result, (tuple, list)):
            return self._several(tape, name, args, kwargs, result)
        return result

    def renamed(self, tape: Tape, result: Any) -> Any:
        """A result with other objects for tensors that are known: next time, they may be others."""
        slots = [result] if isinstance(result, Tensor) else Rebuild.slots(result, OURS)
        known = {id(leaf): leaf for leaf in slots if isinstance(leaf, Tensor) and tape.find(leaf) is not None}
        if not known:
            return result
        with self.unrecorded():
            others = {id(leaf): known[id(leaf)].view_as(leaf) if id(leaf) in known else leaf for leaf in slots}
            return copy.deepcopy(result, others)

    def _several(self, tape: Tape, name: str, args: Any, kwargs: Any, result: Any) -> Any:
        """Parts of a value whose number depends on its size, where no layer settles that."""
        rest = [*args[1:]]
        named = [value for key, value in kwargs.items() if key not in ("dim", "input")]
        sections = 1 if name == "unbind" else rest.pop(0) if rest else named[0]
        axis = rest[0] if rest else kwargs.get("dim", 0)
        if type(axis) is not int or isinstance(sections, (tuple, list)):
            return result
        size: Any = tape.size(args[0] if args else kwargs["input"], axis)
        if type(size) is int:
            return result
        if "chunk" in name:
            # As many as were asked for, as there are of every size from n (n - 1) on: what unpacking them takes.
            least = sections * (sections - 1)
            if len(result) == sections <= 2 and size.node.hint >= least:
                self.decide(Number(self, operator.ge, (size.node, least), True), True, small=True)
                return result
            sections = -(-size // sections)
        return Pieces(result, self, -(-size // sections))

    def run(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """What a function that is written down returns, called with plain numbers."""
        assert self.tape is not None
        self.snapshots, self.wrote, self.given_constants = {}, set(), {}
        for leaf in leaves((args, kwargs)):
            if isinstance(leaf, Tensor) and self.tape.find(leaf) is None:
                self.given_constants.setdefault(storage_of(leaf), []).append(leaf)
        try:
            with self.unrecorded():
                return function(*mapped(args, hinted), **mapped(kwargs, hinted))
        except Exception as error:
            self.failed = UnrecordableError(f"it catches an error that may depend on its input: {first_line(error)}")
            self.failed_in = self.tape.frames[-1:]
            raise

    def written(self, tape: Tape, args: Any, kwargs: Any, given: Any) -> Any:
        """The arguments, where a constant that the call wrote to is a copy of what it was, made at every call."""
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
        self.wrote.add(storage)
        if storage in self.storages:
            self.refuse(f"it writes to its own tensors ({func})")
        if not self.inside:
            return  # one constant to another
        for constant in self.given_constants.get(storage, ()):
            self.snapshots.setdefault(id(constant), (constant, constant.detach().clone()))
        if storage not in self.given_constants and (tape.find(tensor) is not None or storage in tape.births):
            tape.wrote_to(storage)

    def hides(self, tensor: Tensor) -> bool:
        """Whether a tensor was made by something else than what is being recorded, since recording began."""
        found = self.made.get(id(tensor))
        return found is not None and found[1] is not self.tape and found[0]() is tensor

    def note_made(self, result: Any, by: Tape | None) -> Any:
        """The result; who made the tensors in it is noted: what is being recorded, or Python that is not."""
        for value in leaves(result):
            if isinstance(value, Tensor):
                self.made[id(value)] = TensorWeakRef(value), by
        return result

    # Decisions.

    def decide(
        self, number: Number, outcome: bool, *, small: bool = False, demanded: bool = False, pins: bool = False
    ) -> None:
        """Told of a number that Python decides by, or that it pins to what it is."""
        tape = self.tape
        if tape is None or self.inside or self.paused or (number.key, outcome) in tape.conditions:
            return
        if is_always(number, outcome, 0) or (not self.collecting and tape.follows(number)):
            return
        sources = list(number.sources())
        if is_always(number, outcome, 1):
            number, outcome, small = Number(self, operator.ge, (sources[0], 1), True), True, True
        if any(isinstance(s.operands[0], Node) and s.operands[0] in tape.uncertain for s in sources):
            self.refuse("it decides by how many values there are of some kind")
        decides = not (demanded or small or (not pins and is_demanded()))
        if self.collecting and tape.is_part:
            if decides:
                self.collecting[-1].append((number, outcome))
                tape.conditions.append((number.key, outcome))
            return
        self.by_size, said = self.by_size or decides, tape.said(number, outcome)
        of_arguments = not tape.is_part and all(source.function is None for source in sources)
        if self.free and decides and not of_arguments and not is_about_nothing(number, outcome):
            self.refused_size = True
            self.refuse(f"it decides by sizes ({said})")
        tape.conditions.append((number.key, outcome))
        if not outcome:
            opposite = NEGATED.get(number.function)
            function, operands = (opposite, number.operands) if opposite else (operator.not_, (number,))
            number = Number(self, function, operands, True)
        tape.require(tape.number(number), said)
        if decides:
            tape.remarks.append(Remark("capture", "Condition", tape.frames[-1].path, f"only for inputs where {said}"))

    def _is_settled(self, tape: Tape, values: Any) -> bool:
        """Whether values are computed from sizes and constants alone: these sizes stay those of the example, then."""
        found = list(leaves(values))
        nodes = [node for leaf in found if isinstance(leaf, Tensor) and (node := tape.find(leaf)) is not None]
        if self.free or any(node not in tape.valueless for node in nodes):
            return False
        with quiet():
            for leaf in found:
                if isinstance(leaf, SYMBOLIC):
                    pinned(leaf.node)
            tape.settle(nodes)
        return True

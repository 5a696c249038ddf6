"""A real run of a model, recorded as a graph.

Python runs as it always does, on real tensors. What it asks of torch passes a function mode, which is local to the
thread, and becomes the nodes of a torch.fx graph; modules are seen by an attribute of the private copy's instances.
Nothing of torch, Python or the user's classes is replaced. What the graph cannot say (a value that Python asks for, a
decision by a size that has to stay free) makes the innermost module opaque: the record is taken back to its call, it is
run as one leaf, and recording goes on with what it really returned. Parts that it calls on the way are recorded as
graphs of their own.
"""

from __future__ import annotations

import copy
import inspect
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.fx import Node
from torch.overrides import TorchFunctionMode
from torch.utils.weak import TensorWeakRef

from reparam.capture import aten
from reparam.capture.caches import is_same
from reparam.capture.copies import storage_of, tensor_storages, tensors_in
from reparam.capture.demands import is_demanded, is_guarded
from reparam.capture.paths import DifferError, Path, Tree, merged, other_calls
from reparam.capture.sizes import NEGATED, OURS, SYMBOLIC, Number, hinted, is_always, pinned, symbolic, words
from reparam.capture.state import State, UnrecordableError, Writes, same_items
from reparam.capture.structures import leaves, mapped
from reparam.capture.tape import Call, Frame, Recorded, RestartError, Tape, tidy
from reparam.capture.watching import Net, Pieces, Seen, Watched
from reparam.capture.words import said
from reparam.compare import clones
from reparam.errors import first_line
from reparam.graph import aliasing, facts
from reparam.graph.conditions import Argument, kind_of
from reparam.graph.leaves import carries_hooks, is_leaf
from reparam.graph.outputs import Rebuild, is_plain
from reparam.modes import below
from reparam.report import Remark

# Attributes of a tensor that are tensors, and methods that say nothing of its values.
_VIEWS = frozenset("T mT H mH real imag data".split())
_HARMLESS = frozenset(
    """dim ndimension is_floating_point is_complex is_signed is_conj is_neg is_inference is_quantized get_device
    element_size has_names __hash__ is_coalesced is_pinned is_shared requires_grad_ register_hook retain_grad __dir__
    is_distributed""".split()
)
_LAYOUT = frozenset("stride is_contiguous storage_offset data_ptr storage untyped_storage is_set_to".split())
# Functions whose number of results depends on the size of an axis.
_SEVERAL = frozenset("chunk split tensor_split unbind unsafe_chunk unsafe_split hsplit vsplit dsplit".split())


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
        self.left: dict[nn.Module, State] = {}  # what modules came to hold in their own calls
        self.kept: set[nn.Module] = set()  # those that change as they did, since they are run as they are
        self.storages = tensor_storages(self.modules)
        self.owners: dict[int, nn.Module] = {}  # of tensors, while it is watched who looks into modules
        self.writes_of_python = Writes(self.storages)
        self.stack: list[Tape] = []
        self.parts: list[dict[str, Recorded]] = [{}]
        self.opaque: dict[nn.Module, str] = {}
        self.made: dict[int, tuple[TensorWeakRef, Tape | None]] = {}
        self.inside = self.paused = 0
        self.failed: UnrecordableError | None = None
        self.failed_in: list[Frame] = []
        self.genuine: BaseException | None = None
        self.by_size = self.shapes_by_value = self.foreign = False
        self.doubtful: list[tuple[nn.Module, str, Any]] = []
        self.collecting: list[list[tuple[Number, bool]]] = []
        self.refused_size = self.watching = False
        self.holders: dict[int, set[nn.Module]] = {}
        self.running: list[nn.Module] = []  # modules that run as Python
        self.read: set[nn.Module] = set()
        self.wrote: set[int] = set()  # the memory that the last call wrote to
        self.draws = 0  # calls that drew random numbers
        self.given_constants: dict[int, list[Tensor]] = {}
        self.snapshots: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def tape(self) -> Tape | None:
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
            self.doubtful, self.running, self.read, self.made = [], [], set(), {}
            with self._intercepting():
                self.state, self.left, self.kept = State(self.modules), {}, set()
                self.holders = {}
                for module, contents in self.state.contents.items():
                    for name in contents:
                        self.holders.setdefault(id(module.__dict__[name]), set()).add(module)
                try:
                    with torch.random.fork_rng(devices=()), torch.no_grad(), self, below(Net(self)):
                        recorded = "" if entries else self._record(self.root, "", _cloned(call), self.root.forward)
                        calls = entries or [("forward", call)]
                        if isinstance(recorded, str):
                            recorded = self._run_as_python(calls, recorded)
                        self._check_constants(calls, recorded)
                    recorded.by_size, recorded.draws = self.by_size, bool(self.draws)
                    if recorded.parts and not self.watching:
                        self.watching = True  # now that there is Python that stays, and parts that it might look into
                        self.owners = {
                            id(t): module for module in reversed(self.modules) for _, t in tensors_in(module)
                        }
                        continue
                    if again := self._read_parts(recorded):
                        self.opaque |= again
                        continue
                    return recorded
                except RestartError:
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

    def _check_constants(self, calls: Sequence[tuple[str, Call]], recorded: Recorded) -> None:
        """Run the root once more where modules came to hold other things: it must return, and make, the same again.

        Raises:
            RestartError: It does not; the modules that hold them are opaque from now on.
        """
        changed = [module for module in self.modules if self.state.difference(module)]
        if not (changed or self.doubtful):
            return
        for module in self.root.modules():
            sizes = {k: v for k, v in module.__dict__.items() if any(isinstance(leaf, SYMBOLIC) for leaf in leaves(v))}
            module.__dict__.update({name: mapped(value, hinted) for name, value in sizes.items()})
        held = [(module, *item) for module in changed for item in module.__dict__.items()]
        numbers = [item for item in held if isinstance(item[2], (bool, int, float, str))]
        output: Any = None
        try:
            for name, call in reversed(calls):
                args, kwargs = _cloned(call)
                output = getattr(self.root, name)(*args, **kwargs)
        except Exception as error:
            output = error
        others = {module: name for module, name, value in self.doubtful if not _is_same(value, _held(module, name))}
        others |= {module: name for module, name, value in numbers if module.__dict__.get(name) != value}
        self.doubtful = []
        reasons = {module: f"it changes its own {name} at every call" for module, name in others.items()}
        if recorded.graph is not None and not is_same(output, recorded.output):
            reasons |= dict.fromkeys(changed, "it computes something else when it is called again")
        above = {child: module for module in self.modules for child in module.children()}
        stays = {}
        for module, reason in reasons.items():
            if module in self.kept:
                continue
            # Where that did not help, it is for the one around it: nobody calls what only holds something.
            while module in self.opaque and module is not self.root:
                module = above[module]
            if module is not self.root or recorded.graph is not None:
                stays[module] = reason
        if stays:
            self.opaque |= stays
            raise RestartError

    def _run_as_python(self, entries: Sequence[tuple[str, Call]], reason: str) -> Recorded:
        """Run the root as it is, and record its parts."""
        recorded = Recorded(self.root, None, dict(self.root.named_modules()), _cloned(entries[0][1]))
        tape = Tape(self, self.root, "", is_part=False)
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
        self.inside, self.paused = 1, 0  # what is done here is not recorded
        tape = Tape(self, module, prefix, is_part)
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
            except (RestartError, KeyboardInterrupt):
                raise
            except (Exception, UnrecordableError) as error:
                self.failed = None
                if error is self.genuine:
                    raise
                self.refused_size = self.refused_size and isinstance(error, UnrecordableError)
                try:
                    tape.roll_back(frame)
                except RestartError:
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
        tidy(tape)
        return recorded

    def _inputs(self, tape: Tape, module: nn.Module, forward: Callable[..., Any], call: Call) -> Call:
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
            if tape.is_part and self.free and _holds_numbers(kind):
                self.refuse(f"its argument {name} holds numbers, which may be others for other sizes")
            if same is not None and isinstance(value, Tensor):
                kind = "same", same.name
            tape.arguments.append(Argument(stars + name, kind, (default,) if has_default else ()))
            tape.note(node, value)
            if kind[0] == "number":
                bound[name] = symbolic(Number(self, None, (node,), value))
            self._open(tape, node, value)
        tape.valueless.difference_update(tape.graph.nodes)
        return call_.args, call_.kwargs

    def _open(self, tape: Tape, node: Node, value: Any) -> None:
        """Find the tensors in an argument; numbers in it are numbers of the graph."""
        if isinstance(value, Tensor):
            facts.know(node, device=value.device)
            tape.bind(value, node)
        elif type(value) in (tuple, list, dict) or isinstance(value, Mapping):
            for name, item in list(value.items() if isinstance(value, Mapping) else enumerate(value)):
                if any(isinstance(leaf, Tensor) for leaf in leaves(item)) or hasattr(item, "__dict__"):
                    inner = tape.node("call_function", operator.getitem, (node, name))
                    tape.containers.add(inner)
                    tape.note(inner, item)
                    self._open(tape, inner, item)
        elif hasattr(value, "__dict__") and not isinstance(value, (type, nn.Module)) and not callable(value):
            tape.results(value, node)

    def _output(self, tape: Tape, value: Any) -> None:
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
            facts.know(made, kind="unknown")
        tape.frames.pop()
        node = tape.graph.output(made)
        facts.know(node, scope=frame.path)

    # Modules.

    @contextmanager
    def _intercepting(self) -> Iterator[None]:
        """See the calls of all modules of the private copy, and who looks into them."""
        seen = [module for module in self.modules if module is not self.root and _is_plainly_called(module)]
        watched = self.modules if self.watching else []
        looked_into = [module for module in watched if type(module.__dict__.get("_modules")) is dict]
        try:
            for module in seen:
                module.__dict__["_compiled_call_impl"] = Seen(module, self._called)
            for module in looked_into:
                for name in ("_modules", "_parameters", "_buffers"):
                    module.__dict__[name] = Watched(module.__dict__[name], partial(self._looked_into, module))
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
        """Told when Python that stays calls torch: what it does with tensors of others counts as looking into them."""
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
            found = self._set_around(module)
            set_before = found and f"it sets the {found} of its {path}"
        if frame is None:
            if set_before is not None:
                self.refuse(set_before)
            if not is_seen and not carries_hooks(module):
                return module._call_impl(*args, **kwargs)
            return self._leaf(tape, module, path, args, kwargs, reason)
        try:
            result = module._call_impl(*args, **kwargs)
            with quiet():
                self._raise_swallowed(frame)
                self._check_state(module)
                self._type_conditions(tape, frame)
        except (RestartError, KeyboardInterrupt):
            raise
        except (Exception, UnrecordableError) as error:
            self.failed = None
            if error is self.genuine:
                raise
            self.refused_size = self.refused_size and isinstance(error, UnrecordableError)
            reason = f"{type(module).__name__} is kept as it is: {first_line(error)}"
            try:
                tape.roll_back(frame)
            except RestartError:
                self.opaque[module] = first_line(error)
                raise
            if set_before is not None:
                self.refuse(set_before)  # which was taken back
            if self.refused_size:
                self.refused_size = False
                try:
                    return self._in_all_ways(tape, module, path, args, kwargs)
                except DifferError:
                    pass
            return self._leaf(tape, module, path, args, kwargs, reason)
        tape.frames.pop()
        if set_before is not None or self._set_around(module) is not None:
            self._leave(module)
        return result

    def _leave(self, module: nn.Module) -> None:
        """Take what a module has come to hold in its own call for what it holds from then on."""
        state = State(module.modules())
        self.left.update(dict.fromkeys(state.attributes, state))

    # Deciding in all ways.

    def _in_all_ways(
        self, tape: Tape, module: nn.Module, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
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
        if not is_plain(recorded.output) or not all(
            leaf is None or isinstance(leaf, Tensor) for leaf in leaves(recorded.output)
        ):
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
        tape: Tape,
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
        self,
        tape: Tape,
        module: nn.Module,
        path: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        reason: str | None,
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
            if reason is not None or carries_hooks(module):
                self._leave(module)
                self.kept.update(module.modules())
            node = tape.node("call_module", path, *given)
            facts.know(node, scope=path)
            tape.valueless.discard(node)
            numbers = tape.results(result, node, None if carries_hooks(module) else module)
            if reason is not None:
                self._note_writes(tape, (args, kwargs))
                if numbers:
                    self.refuse(f"{path or 'a module'}, which is not recorded, returns numbers")
        return result

    def _renamed(self, tape: Tape, result: Any) -> Any:
        """A result with other objects for tensors that are known: next time, they may be others."""
        if isinstance(result, Tensor):
            if tape.find(result) is None:
                return result
            self.inside += 1
            try:
                return result.view_as(result)
            finally:
                self.inside -= 1
        known = [
            leaf for leaf in Rebuild.slots(result, OURS) if isinstance(leaf, Tensor) and tape.find(leaf) is not None
        ]
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
        except RestartError:
            raise
        except BaseException as error:
            self.genuine = error
            raise
        finally:
            self.running.pop()
            self.paused -= 1

    def _note_writes(self, tape: Tape, arguments: Any) -> None:
        """A module that is not recorded may write to what it is given."""
        tape.filled({storage_of(leaf) for leaf in leaves(arguments) if isinstance(leaf, Tensor)})
        for leaf in leaves(arguments):
            if isinstance(leaf, Tensor):
                for frame in tape.frames:
                    frame.oldest_write = min(frame.oldest_write, tape.births.get(storage_of(leaf), 0))

    def _part(self, tape: Tape, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
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
                alike = kind_of(list(args)) == kind_of(list(known.call[0])) and kind_of(kwargs) == kind_of(
                    known.call[1]
                )
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
            raise RestartError
        if not isinstance(recorded, str) and (name := self._left_behind(module)) is not None:
            self.opaque[module] = f"the Python around it may read its {name}"
            raise RestartError
        if isinstance(recorded, str):
            parts[path] = Recorded(module, None, {}, ((), {}))
            reason = f"{type(module).__name__} is kept as it is: {recorded}"
            tape.remarks.append(Remark("capture", "Record", path, reason))
            return self._as_python(module, args, kwargs)
        parts[path] = recorded
        return recorded.output

    def _obstacle(self, module: nn.Module) -> str | None:
        """Why a part may not be taken for what it computes by itself: the Python around it has a say in that."""
        if (name := self._set_around(module)) is not None:
            return f"the Python around it sets its {name}"
        inner = set(module.modules())
        for part in inner:
            for name in self.state.contents[part]:
                if (
                    name not in ("_modules", "_parameters", "_buffers")
                    and not self.holders[id(part.__dict__[name])] <= inner
                ):
                    return f"it shares its {name} with the Python around it"
        return None

    def _set_around(self, module: nn.Module) -> str | None:
        """What a module holds, by name, that neither was there nor comes from its own calls."""
        for part in module.modules():
            state = self.left.get(part, self.state)
            name = state.difference(part) if part in state.attributes else "modules"
            if name is not None:
                return name.lstrip("_")
        return None

    def _left_behind(self, module: nn.Module) -> str | None:
        """A size or another number that a part came to hold."""
        for part in module.modules():
            before = self.state.attributes.get(part, {})
            for name, value in part.__dict__.items():
                if value is not before.get(name) and any(
                    isinstance(leaf, (bool, int, float, str, *SYMBOLIC)) for leaf in leaves(value)
                ):
                    return name
        return None

    def restore(self, module: nn.Module) -> None:
        """Put back what a module and those in it held before."""
        self.state.restore(part for part in module.modules() if part in self.state.attributes)
        for part in module.modules():
            self.left.pop(part, None)

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

    def _constant_call(self, tape: Tape, func: Any, args: Any, kwargs: Any) -> Any:
        """A call on constants alone: computed once, now, unless it draws random numbers."""
        name = aten.name_of(func) if isinstance(func, OpOverload) else getattr(func, "__name__", "")
        if name not in facts.RANDOM or (
            name.endswith("_") and isinstance(args[0], Tensor) and storage_of(args[0]) in self.storages
        ):
            return func(*args, **kwargs)
        result = self._run(func, args, kwargs)
        op, target, args, kwargs = said(func, name, args, kwargs)
        node = tape.node(op, target, *self._written(tape, args, kwargs, mapped((args, kwargs), tape.argument)))
        tape.valueless.discard(node)
        tape.results(result, node)
        return result

    def _attribute(self, tape: Tape, func: Any, name: str, args: Any, kwargs: Any) -> Any:
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

    def _metadata(self, tape: Tape, name: str, func: Any, args: Any, kwargs: Any) -> Any:
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
                if name not in ("__array__", "numpy") and self._is_settled(tape, (args, kwargs)):
                    return self._run(func, args, kwargs)
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
            return self._run(func, args, kwargs)
        if self.free and is_guarded():
            self.refuse("it would catch an error of what it calls, which may depend on its input")
        self.shapes_by_value, self.foreign, drew = False, False, self.draws
        result = self._run(func, args, kwargs)
        found = list(leaves(result))
        if not all(isinstance(leaf, Tensor) for leaf in found):
            if result is None or all(isinstance(leaf, (Tensor, type(None))) for leaf in found):
                pass  # an item that is set; a result that may be left out
            elif isinstance(result, (torch.dtype, torch.device)) or (
                drew == self.draws and not self.wrote and self._is_settled(tape, (args, kwargs))
            ):
                return result
            else:
                self.refuse(f"{name} makes something else than tensors of an activation")
        op, target, args, kwargs = said(func, name, args, kwargs)
        given = self._written(tape, args, kwargs, mapped((args, kwargs), tape.argument))
        node = tape.node(op, target, *given)
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
        else:
            if not self.wrote:
                result = self._renamed(tape, result)
            tape.results(result, node)
            if name in _SEVERAL and isinstance(result, (tuple, list)):
                return self._several(tape, node, args, kwargs, result)
        return result

    def _several(self, tape: Tape, node: Node, args: Any, kwargs: Any, result: Any) -> Any:
        """Parts of a value whose number depends on its size, where no layer settles that."""
        names = {
            "dim": kwargs.get("dim"),
            "sections": next((v for k, v in kwargs.items() if k not in ("dim", "input")), None),
        }
        given = list(args[1:])
        if facts.target_name(node) != "unbind":
            names["sections"] = given.pop(0) if given else names["sections"]
        axis = given[0] if given else names["dim"] or 0
        tensor, sections = args[0] if args else kwargs["input"], names["sections"]
        if type(axis) is not int or isinstance(sections, (tuple, list)):
            return result
        size: Any = tape.size(tensor, axis)
        if type(size) is int:
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
        return Pieces(result, self, number)

    def _run(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Call a function that is written down, with numbers in the place of symbolic ones."""
        self.snapshots, self.wrote = {}, set()
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

    def _written(self, tape: Tape, args: Any, kwargs: Any, given: Any) -> Any:
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
        born = tape.births.get(storage, 0)
        if not self.inside:
            return  # one constant to another
        if storage in self.given_constants:
            for constant in self.given_constants[storage]:
                self.snapshots.setdefault(id(constant), (constant, constant.detach().clone()))
            return
        if tape.find(tensor) is None and not born:
            return  # memory of the call's own
        for frame in tape.frames:
            frame.oldest_write = min(frame.oldest_write, born)

    # Decisions.

    def decide(
        self, number: Number, outcome: bool, *, small: bool = False, demanded: bool = False, pins: bool = False
    ) -> None:
        """Told of a number that Python decides by, or that it pins to what it is."""
        tape = self.tape
        if tape is None or self.inside or self.paused:
            return
        if any(condition[:2] == (number.key, outcome) for condition in tape.conditions):
            return
        said = words(number, outcome)
        if is_always(number, outcome, 0) or (not self.collecting and tape.follows(number)):
            return
        sources = list(number.sources())
        if is_always(number, outcome, 1):
            number, outcome, small = Number(self, operator.ge, (sources[0], 1), True), True, True
            said = words(number, outcome)
        if any(isinstance(s.operands[0], Node) and s.operands[0] in tape.uncertain for s in sources):
            self.refuse("it decides by how many values there are of some kind")
        demanded = demanded or (not pins and is_demanded())
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
            held = (
                Number(self, opposite, number.operands, True)
                if opposite
                else Number(self, operator.not_, (number,), True)
            )
        tape.require(tape.number(held), said)
        if not demanded and not small:
            tape.remarks.append(Remark("capture", "Condition", tape.frames[-1].path, f"only for inputs where {said}"))

    def _type_conditions(self, tape: Tape, frame: Frame) -> None:
        """A module that asked for a type and did not hand it on may have decided by it."""
        for dtype, node in frame.dtypes.items():
            if dtype not in frame.handed_on:
                tape.require_type(node, dtype)

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

    def _check_state(self, module: nn.Module) -> None:
        """Refuse what a module comes to hold; what seems to come from constants alone is looked at again later."""
        for part in module.modules():
            if part in self.state.attributes:
                self.left.get(part, self.state).check(part, self.remembers)
        replaced = [
            name
            for name, old in self.state.contents[module].items()
            if name not in ("_modules", "_parameters", "_buffers") and not same_items(old, module.__dict__[name])
        ]
        for values, old in ((module.__dict__, self.state.attributes), (module._buffers, None)):
            before = old[module] if old is not None else self.state.contents[module].get("_buffers", {})
            for name, value in before.items():
                new = values.get(name)
                if not isinstance(value, Tensor) or not isinstance(new, Tensor) or new is value:
                    continue
                if self.tape is not None and self.tape.find(new) is None:  # else it is made anew in the graph
                    replaced.append(name)
        with self._unrecorded():
            self.doubtful += [(module, name, clones(copy.copy(_held(module, name)))) for name in replaced]

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

    def note_made(self, result: Any, by: Tape | None) -> Any:
        """Note who made the tensors in a result: what is being recorded, or Python that is not."""
        for value in leaves(result):
            if isinstance(value, Tensor):
                self.made[id(value)] = TensorWeakRef(value), by
        return result

    def refuse(self, reason: str) -> Any:
        """Raise what makes the innermost module opaque."""
        self.failed, self.failed_in = UnrecordableError(reason), self.tape.frames[-1:] if self.tape else []
        raise self.failed

    def _raise_swallowed(self, frame: Frame) -> None:
        """Models may catch everything that is raised in them."""
        if self.failed is not None and self.failed_in == [frame]:
            raise self.failed


_NOTHING: Any = object()

# Within it, what is asked of a tensor is not recorded.
quiet = torch._C.DisableTorchFunction


def _holds_numbers(kind: tuple[Any, ...]) -> bool:
    """Whether a container among the arguments holds numbers."""
    match kind:
        case "sequence", *kinds:
            return any(_is_number(item) or _holds_numbers(item) for item in kinds)
        case (("dict" | "object"), *entries):
            return any(_is_number(item[1]) or _holds_numbers(item[1]) for item in entries if isinstance(item, tuple))
    return False


def _is_number(kind: tuple[Any, ...]) -> bool:
    return kind[0] == "constant" and type(kind[1]) in (int, float)


def _is_about_nothing(number: Number, outcome: bool) -> bool:
    """Whether a decision is one between something and nothing: a size, or a product of sizes, is not 0."""
    match number.function, number.operands:
        case ((operator.gt | operator.ne), (Number() as size, 0)):
            return outcome and _is_product(size)
        case ((operator.eq | operator.le), (Number() as size, 0)):
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


def _is_same(a: Any, b: Any) -> bool:
    """Whether two values hold as much, and the same tensors."""
    pairs = list(zip_longest(leaves(a), leaves(b), fillvalue=_NOTHING))
    return all(
        isinstance(x, Tensor) and isinstance(y, Tensor) and x.dtype == y.dtype and torch.equal(x, y)
        if isinstance(x, Tensor) or isinstance(y, Tensor)
        else (x is _NOTHING) == (y is _NOTHING)
        for x, y in pairs
    )


def _is_printable(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))


def _cloned(call: Call) -> Call:
    """Arguments on copies of their tensors."""
    args, kwargs = clones((tuple(call[0]), dict(call[1])))
    return args, kwargs

"""A real run of a model, recorded as a graph.

Python runs as it always does, on real tensors. What it asks of torch passes a function mode, which is local to the
thread, and becomes the nodes of a torch.fx graph (:mod:`reparam.capture.calls`); modules are seen by an attribute of
the private copy's instances. Nothing of torch, Python or the user's classes is replaced. What the graph cannot say (a
value that Python asks for, a decision by a size that has to stay free) makes the innermost module opaque: the record is
taken back to its call, it is run as one leaf, and recording goes on with what it really returned. Parts that it calls
on the way are recorded as graphs of their own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn
from torch.fx import Graph

from reparam.capture.calls import Calls, quiet
from reparam.capture.captured import Call, Capture
from reparam.capture.changes import Changes, cloned, replayed
from reparam.capture.copies import storage_of, tensor_storages, tensors_in
from reparam.capture.paths import DifferError, in_all_ways
from reparam.capture.sizes import OURS, SYMBOLIC, hinted
from reparam.capture.state import UnrecordableError, Writes
from reparam.capture.structures import larger, leaves, mapped
from reparam.capture.tape import Frame, RestartError, Tape, tidy
from reparam.capture.watching import Net, Seen, Watched
from reparam.errors import first_line
from reparam.graph import aliasing, facts
from reparam.graph.conditions import Argument, kind_of
from reparam.graph.leaves import carries_hooks, is_leaf
from reparam.graph.outputs import Rebuild, is_plain
from reparam.modes import below
from reparam.report import Remark


class StaysError(Exception):
    """A module cannot be recorded; what was recorded of it is taken back."""


class Session(Calls):
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
        self.modules = list(root.modules())
        super().__init__(tensor_storages(self.modules), free, given)
        self.root, self.only = root, only
        self.changes = Changes(())
        self.owners: dict[int, nn.Module] = {}  # of tensors, while it is watched who looks into modules
        self.writes_of_python = Writes(self.storages)
        self.note_write = self.writes_of_python.note  # type: ignore[method-assign]
        self.parts: list[dict[str, Capture]] = [{}]
        self.opaque: dict[nn.Module, str] = {}
        self.genuine: BaseException | None = None
        self.watching = False
        self.running: list[nn.Module] = []  # modules that run as Python
        self.read: set[nn.Module] = set()

    # Recording a module as a graph of its own.

    def record(self, call: Call, *, entries: Sequence[tuple[str, Call]] = ()) -> Capture:
        """What a call of the root was recorded as.

        Args:
            call: Its arguments, which the call may change.
            entries: Methods of the root and calls of them, where the root stays Python, and parts of it are recorded.
        """
        while True:
            self.stack, self.parts, self.inside, self.paused = [], [{}], 0, 0
            self.failed = self.genuine = None
            self.running, self.read, self.made = [], set(), {}
            with self._intercepting():
                self.changes = Changes(self.modules)
                try:
                    with torch.random.fork_rng(devices=()), torch.no_grad(), self, below(Net(self)):
                        recorded = "" if entries else self.record_module(self.root, cloned(call))
                        calls = entries or [("forward", call)]
                        if isinstance(recorded, str):
                            recorded = self._run_as_python(calls, recorded)
                        self._run_again(calls, recorded)
                    recorded.by_size, recorded.draws = self.by_size, bool(self.draws)
                    if recorded.parts and not self.watching:
                        self.watching = True  # now that there is Python that stays, and parts that it might look into
                        self.owners = {id(t): m for m in reversed(self.modules) for _, t in tensors_in(m)}
                    elif again := self._read_parts(recorded):
                        self.opaque |= again
                    else:
                        return recorded
                except RestartError:
                    pass
                finally:
                    self.stack = []
                    self.changes.state.restore(self.modules)
                    self.writes_of_python.undo()

    def _read_parts(self, recorded: Capture) -> dict[nn.Module, str]:
        """Parts that Python which stays has looked into: they have to stay Python themselves."""
        found = {}
        for part in recorded.parts.values():
            if not part.traced:
                continue
            inner = list(part.root.modules())
            others = {other.root for other in recorded.parts.values()} - {part.root}
            if any(module in self.read or module in others for module in inner):
                found[part.root] = "the Python around it reads what is inside of it"
            else:
                found |= self._read_parts(part)
        return found

    def _run_again(self, calls: Sequence[tuple[str, Call]], recorded: Capture) -> None:
        """Run the root once more where modules came to hold other things: it must return, and make, the same again.

        Raises:
            RestartError: It does not; the modules that hold them are opaque from now on.
        """

        def run(change: Callable[[Call], Call] = cloned) -> Any:
            results = []
            for name, call in calls:
                args, kwargs = change(call)
                results.append(getattr(self.root, name)(*args, **kwargs))
            return results[0]

        graph = partial(replayed, recorded, calls[0][1]) if recorded.traced else None
        above = {child: module for module in self.modules for child in module.children()}
        stays = {}
        for module, reason in self.changes.unstable(run, partial(run, larger), graph).items():
            # Where that did not help, it is for the one around it: nobody calls what only holds something.
            while (module in self.opaque or module in self.changes.kept) and module is not self.root:
                module = above[module]
            if module is not self.root or recorded.traced:
                stays[module] = reason
        if stays:
            self.opaque |= stays
            raise RestartError

    @contextmanager
    def _as_it_is(self, module: nn.Module) -> Iterator[None]:
        """Within it, a module runs as Python; what it raises is the model's own error."""
        self.paused += 1
        self.running.append(module)
        try:
            yield
        except RestartError:
            raise
        except BaseException as error:
            self.genuine = error
            raise
        finally:
            self.running.pop()
            self.paused -= 1

    def _run_as_python(self, entries: Sequence[tuple[str, Call]], reason: str) -> Capture:
        """Run the root as it is, and record its parts."""
        modules = dict(self.root.named_modules())
        recorded = Capture(self.root, Graph(), modules, traced=False, call=cloned(entries[0][1]))
        tape = Tape(self, self.root, is_part=False)
        if reason:
            recorded.remarks.append(Remark("capture", "Record", "", f"kept as Python: {reason}"))
        self.stack.append(tape)
        with self._as_it_is(self.root):
            for name, call in entries:
                args, kwargs = cloned(call)
                recorded.outputs[name] = getattr(self.root, name)(*args, **kwargs)
        self.stack.pop()
        recorded.output = recorded.outputs[entries[0][0]]
        recorded.parts = self.parts[-1]
        recorded.remarks += tape.remarks
        return recorded

    def record_module(self, module: nn.Module, call: Call, *, is_part: bool = False) -> Capture | str:
        """A call of a module as a graph; the reason where that cannot be."""
        kept = self.inside, self.paused
        self.inside, self.paused = 1, 0  # what is done here is nobody's business
        tape = Tape(self, module, is_part)
        with quiet():
            recorded = Capture(module, tape.graph, tape.modules, call=cloned(call))
        self.stack.append(tape)
        self.parts.append({})
        self.inside = 0

        def run() -> Any:
            if module in self.opaque:
                self.refuse(self.opaque[module])
            with quiet():
                args, kwargs = self._inputs(tape, module, call)
            return module.forward(*args, **kwargs)

        try:
            try:
                frame = tape.push("", module, call)
                recorded.output = self._attempt(tape, frame, run, self._output)
            except StaysError as error:
                if not self.refused_size or self.collecting:
                    return str(error)
                try:
                    tape.push("", module, call)
                    with quiet():
                        given = self._inputs(tape, module, call)
                    recorded.output = in_all_ways(self, tape, module, "", *given)
                    with quiet():
                        self._output(tape, recorded.output)
                except DifferError:
                    return str(error)
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

    def _attempt(
        self, tape: Tape, frame: Frame, run: Callable[[], Any], finish: Callable[[Tape, Any], None] | None = None
    ) -> Any:
        """What a module returns that is recorded.

        Raises:
            StaysError: It cannot be, and the record is what it was before.
        """
        try:
            result = run()
            with quiet():
                # Models may catch everything that is raised in them.
                if self.failed is not None and self.failed_in == [frame]:
                    raise self.failed
                self.changes.check(frame.module, tape.remembers)
                tape.type_conditions(frame)
                if finish is not None:
                    finish(tape, result)
            return result
        except (RestartError, KeyboardInterrupt):
            raise
        except (Exception, UnrecordableError) as error:
            self.failed = None
            if error is self.genuine:
                raise
            self.refused_size = self.refused_size and isinstance(error, UnrecordableError)
            reason = first_line(error)
            try:
                self.roll_back(tape, frame)
            except RestartError:
                self.opaque[frame.module] = reason
                raise
        raise StaysError(reason)

    def roll_back(self, tape: Tape, frame: Frame) -> None:
        """Take back all that was recorded since a module was begun with, and what it came to hold."""
        self.changes.restore(frame.module)
        tape.roll_back(frame)

    def _inputs(self, tape: Tape, module: nn.Module, call: Call) -> Call:
        """The call, with numbers that are numbers of the graph; its arguments are placeholders of the same names."""
        args, kwargs = call
        signature = inspect.signature(module.forward)
        call_ = signature.bind(*args, **kwargs)
        bound = call_.arguments
        tape.arguments = []
        for name, parameter in signature.parameters.items():
            stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")  # type: ignore[call-overload]
            has_default = not stars and parameter.default is not parameter.empty
            default = parameter.default if isinstance(parameter.default, (bool, int, float, str)) else None
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
            if (given := tape.given(value, node, name in bound)) is not value:
                bound[name] = given
        tape.valueless.difference_update(tape.graph.nodes)
        return call_.args, call_.kwargs

    def _output(self, tape: Tape, value: Any) -> None:
        """Make the output node; anything but tuples, lists and dicts is rebuilt at the end of every call."""
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
        facts.know(tape.graph.output(made), scope=frame.path)

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
        return any(part.root is module and part.traced for part in self.parts[-1].values())

    def used(self, func: Any, args: Any, kwargs: Any) -> None:
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
            is_kept, reason = self._is_kept(module)
            frame = None if is_kept else tape.push(path, module, (args, kwargs))
            found = self.changes.set_around(module)
            set_before = found and f"it sets the {found} of its {path}"
        if frame is None:
            if set_before is not None:
                self.refuse(set_before)
            is_seen = any(tape.is_activation(leaf) or isinstance(leaf, SYMBOLIC) for leaf in leaves((args, kwargs)))
            if not is_seen and not carries_hooks(module):
                return module._call_impl(*args, **kwargs)
            return self._leaf(tape, module, (args, kwargs), reason)
        try:
            result = self._attempt(tape, frame, partial(module._call_impl, *args, **kwargs))
        except StaysError as error:
            if set_before is not None:
                self.refuse(set_before)  # which was taken back
            if self.refused_size:
                try:
                    return in_all_ways(self, tape, module, path, args, kwargs)
                except DifferError:
                    pass
            reason = f"{type(module).__name__} is kept as it is: {error}"
            return self._leaf(tape, module, (args, kwargs), reason)
        tape.frames.pop()
        if set_before is not None or self.changes.set_around(module) is not None:
            self.changes.leave(module)
        return result

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

    def _leaf(self, tape: Tape, module: nn.Module, call: Call, reason: str | None) -> Any:
        """What a module returns, run as one leaf; ``reason`` says why it is one, None for a layer of torch's."""
        (args, kwargs), path = call, tape.paths[module]
        with quiet():
            given = mapped(call, tape.argument)
        hooked = carries_hooks(module)
        if reason is None:
            try:
                result = self.run(module._call_impl, args, kwargs)
            except UnrecordableError as error:
                self.failed = None
                hooks = ", carries hooks" if hooked else ""
                reason = f"{type(module).__name__} is kept as it is: {first_line(error)}{hooks}"
        if reason is not None:
            tape.remarks.append(Remark("capture", "Record", path, reason))
            with self._as_it_is(module):
                result = module._call_impl(*mapped(args, hinted), **mapped(kwargs, hinted))
        with quiet():
            if reason is not None:
                result = self.renamed(tape, result)
            else:
                given = self.written(tape, args, kwargs, given)
            if reason is not None or hooked:
                self.changes.leave(module, kept=True)
            node = tape.node("call_module", path, *given)
            facts.know(node, scope=path)
            tape.valueless.discard(node)
            numbers = tape.results(result, node, None if hooked else module)
            if reason is not None:
                # It may have written to what it was given.
                storages = {storage_of(leaf) for leaf in leaves((args, kwargs)) if isinstance(leaf, Tensor)}
                tape.filled(storages)
                for storage in storages:
                    tape.wrote_to(storage)
                if numbers:
                    self.refuse(f"{path or 'a module'}, which is not recorded, returns numbers")
        return result

    def _part(self, tape: Tape, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call by Python that is not recorded: of a part that may be a graph by itself."""
        parts, reason = self.parts[-1], self._is_kept(module)[1]
        known = next((part for part in parts.values() if part.root is module), None)
        if reason is not None or is_leaf(module) or (self.only is not None and module not in self.only):
            if module in self.opaque and not any(remark.message == reason for remark in tape.remarks):
                tape.remarks.append(Remark("capture", "Record", tape.paths[module], str(reason)))
        elif known is not None:
            with quiet():
                known.alike = known.alike and _kinds((args, kwargs)) == _kinds(known.call)
        else:
            with quiet():
                path = tape.paths[module]
                obstacle = self.changes.obstacle(module)
            if obstacle is not None:
                self.opaque[module] = obstacle
                return self._part(tape, module, args, kwargs)
            recorded = self.record_module(module, (args, kwargs), is_part=True)
            if isinstance(recorded, Capture):
                if aliasing.writes_to_inputs(recorded.graph, recorded.modules):
                    self.opaque[module] = "it changes its inputs in place"
                    raise RestartError
                if (name := self.changes.left_behind(module)) is not None:
                    self.opaque[module] = f"the Python around it may read its {name}"
                    raise RestartError
                parts[path] = recorded
                return recorded.output
            parts[path] = Capture(module, Graph(), {}, traced=False, call=((), {}))
            reason = f"{type(module).__name__} is kept as it is: {recorded}"
            tape.remarks.append(Remark("capture", "Record", path, reason))
        with self._as_it_is(module):
            return module._call_impl(*args, **kwargs)


def _holds_numbers(kind: tuple[Any, ...]) -> bool:
    """Whether an argument is held to numbers."""
    if kind[0] == "constant" and not isinstance(kind[1], tuple):
        return type(kind[1]) in (int, float)
    return any(_holds_numbers(item) for item in kind if isinstance(item, tuple) and item)


def _kinds(call: Any) -> Any:
    args, kwargs = call
    return kind_of(list(args)), kind_of(kwargs)


def _is_plainly_called(module: nn.Module) -> bool:
    """Whether calling a module does no more than run its hooks and its forward."""
    return type(module).__call__ is nn.Module.__call__ or isinstance(module, torch.fx.GraphModule)


def _plain_numbers(value: Any) -> Any:
    """An output with plain numbers in the place of symbolic ones."""
    slots = Rebuild.slots(value, OURS)
    if not any(isinstance(slot, SYMBOLIC) for slot in slots):
        return value
    return Rebuild.of(value, OURS)(*map(hinted, slots))  # type: ignore[operator]

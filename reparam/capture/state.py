"""What a call leaves behind on the modules that it runs in: noticed, refused, put back."""

from __future__ import annotations

import operator
import pickle
import random
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from reparam.capture.copies import ATOMS, OWN_DICTS, ROOT_HOOKS, is_copied_plainly, storage_of, tensor_storages
from reparam.modes import below

# Whether a value holds something of a call (True), something that sizes and constants alone give (False), or neither.
Remembers = Callable[[Any], "bool | None"]


class UnrecordableError(BaseException):
    """What a module does cannot be part of a graph; the message is the reason. Models catch ``Exception``, not this."""


# A container, by the name of the attribute that it is found in, and what was in it.
Held = tuple[str, Any, Any]


class State:
    """What the forwards of some modules could change of them and find again at the next call.

    Attributes:
        attributes: What the modules hold by name.
        contents: The containers among that and in it, with what was in them.
        hooks: The same of torch's dicts of hooks; a forward that sets some makes no other function of its module.
        hidden: Objects whose state Python does not show, such as iterators, as bytes.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.attributes = {module: dict(module.__dict__) for module in modules}
        self.contents: dict[nn.Module, list[Held]] = {}
        self.hooks: dict[nn.Module, list[Held]] = {}
        self.hidden: dict[nn.Module, dict[str, bytes]] = {}
        seen: set[int] = set()
        for module, attributes in self.attributes.items():
            named = [(name, value) for name, value in attributes.items() if type(value) not in ATOMS]
            self.hooks[module] = [(name, value, items(value)) for name, value in named if name in _HOOK_DICTS]
            self.contents[module] = [
                (name, holder, items(holder))
                for name, value in named if name not in _HOOK_DICTS
                for holder in inside(value, seen)
            ]  # fmt: skip
            self.hidden[module] = {name: state for name, value in named if (state := _hidden(value)) is not None}

    def check(self, module: nn.Module, remembers: Remembers | None = None) -> None:
        """Raise UnrecordableError when the module is not as it was, and may compute something else the next time.

        Args:
            module: One of the modules.
            remembers: Whether a value holds something of the call that was made; what does not, is computed from
                constants and sizes alone, and may be kept.
        """
        if self._is_untouched(module):
            return
        now = module.__dict__
        pairs = ((name, value, now.get(name)) for name, value in self.attributes[module].items())
        changed = [name for name, old, new in pairs if old is not new and _differ(old, new, remembers)]
        changed += [name for name, holder, old in self.contents[module] if _grew(old, holder, remembers)]
        changed += self._moved(module)
        if changed:
            raise UnrecordableError(f"it changes its own {changed[0].lstrip('_')} at every call")

    def changes(self, module: nn.Module) -> Iterator[str]:
        """The names of attributes that are not what they were, or do not hold what they held."""
        if self._is_untouched(module):
            return
        before, now = self.attributes[module], module.__dict__
        for name in before.keys() | now.keys() if before.keys() != now.keys() else before:
            old, new = before.get(name), now.get(name)
            if old is not new and _is_another(old, new):
                yield name
        for name, holder, old in self.contents[module]:
            if name in ("_buffers", "_parameters"):
                yield from (key for key in old.keys() | holder.keys() if old.get(key) is not holder.get(key))
            elif not same_items(old, holder):
                yield name
        yield from self._moved(module)

    def _is_untouched(self, module: nn.Module) -> bool:
        """Whether a module holds the very same objects, which is nearly always so, and quick to see."""
        before, now = self.attributes[module], module.__dict__
        return (
            not self.hidden[module]
            and before.keys() == now.keys()
            and all(map(operator.is_, before.values(), now.values()))
            and all(same_items(old, holder) for _, holder, old in self.contents[module])
        )

    def _moved(self, module: nn.Module) -> list[str]:
        """The names of objects that are the same, and in another state."""
        old, now = self.attributes[module], module.__dict__
        hidden = self.hidden[module].items()
        return [name for name, state in hidden if now.get(name) is old[name] and _hidden(old[name]) != state]

    def restore(self, modules: Iterable[nn.Module]) -> None:
        """Put back attributes, and what was in lists, dicts and sets."""
        again: dict[int, Any] = {}  # what is shared stays so
        for module in modules:
            attributes = self.attributes[module]
            for name, state in self.hidden[module].items():
                if _hidden(attributes[name]) != state:
                    attributes[name] = again.setdefault(id(attributes[name]), pickle.loads(state))
            for _, holder, old in (*self.contents[module], *self.hooks[module], ("", module.__dict__, attributes)):
                put_back(holder, old)


def put_back(holder: Any, old: Any) -> None:
    """Let a container hold again what it held."""
    if not same_items(holder, old):
        holder.clear()
        (holder.extend if isinstance(holder, (list, deque)) else holder.update)(old)


def items(holder: Any) -> Any:
    """What a container holds, as a dict or a list."""
    return dict(holder) if isinstance(holder, dict) else list(holder)


def _hidden(value: Any) -> bytes | None:
    """The state of an object that Python does not show: an iterator, a generator of random numbers."""
    if hasattr(value, "__dict__") and not isinstance(value, random.Random):
        return None
    if isinstance(value, (*_VALUES, list, dict, set, deque, Tensor, type)) or callable(value):
        return None
    try:
        with torch._C.DisableTorchFunction():
            return pickle.dumps(value)
    except Exception:  # whatever people's objects raise
        return None


def _grew(old: Any, new: Any, remembers: Remembers | None) -> bool:
    """Whether a container holds other things than before, or has come to hold something of the call."""
    if same_items(old, new):
        return False
    if isinstance(old, dict):
        gone = not old.keys() <= new.keys()
        pairs: Iterable[Any] = [(old.get(key), item) for key, item in new.items()]
    else:
        # How many there are says how often it was called, unless what came with them is of sizes or constants.
        more = list(new)[len(old) :]
        gone = len(new) < len(old) or any(remembers is None or remembers(item) is not False for item in more)
        pairs = zip(old, new, strict=False)
    return gone or any(_differ(before, after, remembers) for before, after in pairs)


class Writes(TorchDispatchMode):
    """What was in some memory before it was written to, so that it can be put back.

    Args:
        storages: Identities of the memory that is watched.
    """

    def __init__(self, storages: frozenset[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.storages = storages
        self.kept: dict[Any, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.note(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))

    def note(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """To be told of every call of an operator, before it runs."""
        for tensor in written_by(func, args, kwargs) if may_write(func) else ():
            if storage_of(tensor) in self.storages:
                place = (tensor.data_ptr(), tensor.shape, tensor.stride())
                self.kept.setdefault(place, (tensor.detach(), tensor.detach().clone()))

    def undo(self) -> None:
        """Put back what was there."""
        with torch.no_grad():
            for tensor, value in reversed(self.kept.values()):
                tensor.copy_(value)
        self.kept = {}


@cache
def may_write(func: Any) -> bool:
    """Whether an operator writes to any of its arguments, as it says or as norms do."""
    return func._schema.is_mutable or "batch_norm" in func._schema.name


def written_by(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    """The tensors that a call of an operator writes to."""
    schema = func._schema
    named = {argument.name: value for argument, value in zip(schema.arguments, args)} | dict(kwargs)  # noqa: B905
    # Norms write to statistics without saying so.
    silent = ("running_mean", "running_var") if named.get("training", named.get("train")) is True else ()
    for argument in schema.arguments:
        if (argument.alias_info is not None and argument.alias_info.is_write) or argument.name in silent:
            value = named.get(argument.name)
            yield from (
                item for item in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(item, Tensor)
            )


@contextmanager
def writes_undone(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Put back what is written to the tensors of some modules."""
    kept = Writes(tensor_storages(modules))
    try:
        with below(kept):
            yield
    finally:
        kept.undo()


@contextmanager
def unchanged(model: nn.Module, *, writes: bool = True) -> Iterator[None]:
    """Run a model for a look at it: without its own hooks, and with its state put back afterwards.

    Args:
        model: Any module.
        writes: Whether it may write to its own tensors.
    """
    modules = list(model.modules())
    state = State(modules)
    for name in ROOT_HOOKS:
        model.__dict__[name] = OrderedDict()
    try:
        with writes_undone(modules) if writes else nullcontext():
            yield
    finally:
        state.restore(modules)


def move_hooks(attributes: Mapping[str, Any], model: nn.Module) -> None:
    """Let what runs beside one model's forward run beside another's: the hooks among its attributes."""
    model.__dict__.update({name: attributes[name] for name in ROOT_HOOKS})


# Where torch keeps hooks.
_HOOK_DICTS = OWN_DICTS - {"_parameters", "_buffers", "_modules"}

# Attributes that are equal where their values are.
_VALUES = (bool, int, float, str, tuple)

# How deep what may change is looked for in the attributes of a module.
_DEPTH = 4


def inside(value: Any, seen: set[int], depth: int = 0) -> Iterator[Any]:
    """What a forward might change inside of a value: containers in it, and the attributes of plain objects."""
    cls = type(value)
    is_container = isinstance(value, (list, dict, set, deque))
    if cls in ATOMS or isinstance(value, (Tensor, nn.Module, type)) or depth > _DEPTH:
        return
    if id(value) in seen and (depth or not is_container):
        return
    seen.add(id(value))
    parts: Iterable[Any] = ()
    if is_container:
        yield value
        parts = value.values() if isinstance(value, dict) else value
    elif isinstance(value, tuple):
        parts = value
    elif cls is SimpleNamespace or (type(getattr(value, "__dict__", None)) is dict and is_copied_plainly(cls)):  # type: ignore[arg-type]
        yield value.__dict__
        parts = value.__dict__.values()
    for part in list(parts):
        yield from inside(part, seen, depth + 1)


def same_items(a: Any, b: Any) -> bool:
    """Whether two containers hold the very same objects, in the same order."""
    if not a or not b:
        return not a and not b
    if len(a) != len(b) or isinstance(a, dict) != isinstance(b, dict) or not all(map(operator.is_, a, b)):
        return False
    return not isinstance(a, dict) or all(map(operator.is_, a.values(), b.values()))


def _differ(old: Any, new: Any, remembers: Remembers | None) -> bool:
    """Whether a value is another one than before, other than made at its first use, or from constants and sizes."""
    if old is new:
        return False
    if remembers is not None and (holds := remembers(new)) is not None:
        return holds
    if old is None:
        return False
    return _is_another(old, new)


def _is_another(old: Any, new: Any) -> bool:
    try:
        return type(old) is not type(new) or not isinstance(old, _VALUES) or bool(old != new)
    except Exception:  # whatever comparing people's objects raises
        return True


class NoSideEffects(TorchDispatchMode):
    """Refuse to run, while tracing, what must run at every call: writes to the model's tensors, random numbers."""

    def __init__(self, storages: frozenset[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.storages = storages

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise UnrecordableError(f"it draws random numbers ({func})")
        if may_write(func) and any(
            storage_of(tensor) in self.storages for tensor in written_by(func, args, kwargs or {})
        ):
            raise UnrecordableError(f"it writes to its own tensors ({func})")
        return func(*args, **(kwargs or {}))

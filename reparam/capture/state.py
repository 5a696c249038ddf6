"""What a call leaves behind on the modules that it runs in: noticed, refused, put back."""

from __future__ import annotations

import copy
import operator
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


class State:
    """What the forwards of some modules could change of them and find again at the next call."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.attributes = {module: dict(module.__dict__) for module in modules}
        self.contents: dict[nn.Module, dict[str, Any]] = {
            module: {
                name: value.copy() if type(value) is dict else copy.copy(value)
                for name, value in attributes.items()
                if type(value) not in ATOMS and name not in _HOOK_DICTS and isinstance(value, (list, dict, set))
            }
            for module, attributes in self.attributes.items()
        }
        self.hooks = {
            module: {name: attributes[name].copy() for name in _HOOK_DICTS if attributes.get(name)}
            for module, attributes in self.attributes.items()
        }
        seen: set[int] = set()
        self.inner = {
            module: [
                (name, holder, dict(holder) if isinstance(holder, dict) else list(holder))
                for name, value in attributes.items()
                if type(value) not in ATOMS and name not in OWN_DICTS
                for holder in _inside(value, seen, 0)
            ]
            for module, attributes in self.attributes.items()
        }

    def check(self, module: nn.Module, remembers: Remembers | None = None) -> None:
        """Raise UnrecordableError when the module is not as it was, and may compute something else the next time.

        Args:
            module: One of the modules.
            remembers: Whether a value holds something of the call that was made; what does not, is computed from
                constants and sizes alone, and may be kept.
        """
        contents, attributes = self.contents[module], module.__dict__
        for name, value in self.attributes[module].items():
            new = attributes.get(name)
            # Nearly always the same and no container: nothing to ask for.
            if value is not new:
                differ = _differ(value, new, remembers)
            else:
                differ = name in contents and self._grew(contents[name], value, remembers)
            if differ:
                raise UnrecordableError(f"it changes its own {name.lstrip('_')} at every call")
        for name, value, old in self.inner[module]:
            if self._grew(old, value, remembers):
                raise UnrecordableError(f"it changes what is in its own {name.lstrip('_')} at every call")

    def _grew(self, old: Any, new: Any, remembers: Remembers | None) -> bool:
        """Whether a container holds other things than before, or has come to hold something of the call."""
        if same_items(old, new):
            return False
        if isinstance(old, dict):
            pairs = [(old.get(key), item) for key, item in new.items()]
            gone = not old.keys() <= new.keys()
        else:
            old_items, new_items = list(old), list(new)
            pairs = list(zip(old_items, new_items, strict=False))
            more = new_items[len(old_items) :]
            # How many there are says how often it was called, unless what came with them is of sizes or constants.
            gone = len(new_items) < len(old_items) or any(
                remembers is None or remembers(item) is not False for item in more
            )
        return gone or any(_differ(before, after, remembers) for before, after in pairs)

    def difference(self, module: nn.Module) -> str | None:
        """The name of an attribute that holds something else than before."""
        before, now = self.attributes[module], module.__dict__
        for name in before.keys() | now.keys() if before.keys() != now.keys() else before:
            if (value := now.get(name)) is not before.get(name) and _differ_at_all(before.get(name), value):
                return name
        contents = ((name, now[name], old) for name, old in self.contents[module].items())
        return next((n for n, value, old in (*contents, *self.inner[module]) if not same_items(value, old)), None)

    def restore(self, modules: Iterable[nn.Module]) -> None:
        """Put back attributes, and what was in lists, dicts and sets."""
        for module in modules:
            attributes = self.attributes[module]
            held = [(attributes[name], contents) for name, contents in self.contents[module].items()]
            held += [(value, old) for _, value, old in self.inner[module]]
            held += [(attributes.get(name), self.hooks[module].get(name, {})) for name in _HOOK_DICTS]
            for value, contents in held:
                if not same_items(value, contents):
                    value.clear()
                    (value.extend if isinstance(value, (list, deque)) else value.update)(contents)
            if not same_items(module.__dict__, attributes):
                module.__dict__.clear()
                module.__dict__.update(attributes)


class Writes:
    """What was in some memory before it was written to, so that it can be put back.

    Args:
        storages: Identities of the memory that is watched.
    """

    def __init__(self, storages: frozenset[int]) -> None:
        self.storages = storages
        self.kept: dict[Any, tuple[Tensor, Tensor]] = {}

    def note(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """To be told of every call of an operator, before it runs."""
        for tensor in written_by(func, args, kwargs):
            if storage_of(tensor) in self.storages:
                place = (tensor.data_ptr(), tensor.shape, tensor.stride())
                self.kept.setdefault(place, (tensor.detach(), tensor.detach().clone()))

    def undo(self) -> None:
        """Put back what was there."""
        with torch.no_grad():
            for tensor, value in reversed(self.kept.values()):
                tensor.copy_(value)
        self.kept = {}


class _Undone(TorchDispatchMode):
    def __init__(self, writes: Writes) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.writes = writes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if may_write(func):
            self.writes.note(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


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
        with below(_Undone(kept)):
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


# Where torch keeps hooks: a forward that sets some makes no other function of its module.
_HOOK_DICTS = OWN_DICTS - {"_parameters", "_buffers", "_modules"}


# How deep what may change is looked for in the attributes of a module.
_DEPTH = 4


def _inside(value: Any, seen: set[int], depth: int) -> Iterator[Any]:
    """What a forward might change inside of an attribute: containers in it, and the attributes of plain objects."""
    cls = type(value)
    if cls in ATOMS or isinstance(value, (Tensor, nn.Module, type)) or id(value) in seen or depth > _DEPTH:
        return
    seen.add(id(value))
    parts: Iterable[Any] = ()
    if isinstance(value, (list, dict, set, deque)):
        if depth or isinstance(value, deque):
            yield value
        parts = value.values() if isinstance(value, dict) else value
    elif isinstance(value, tuple):
        parts = value
    elif cls is SimpleNamespace or (type(getattr(value, "__dict__", None)) is dict and is_copied_plainly(cls)):  # type: ignore[arg-type]
        yield value.__dict__
        parts = value.__dict__.values()
    for part in list(parts):
        yield from _inside(part, seen, depth + 1)


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
    return type(old) is not type(new) or not isinstance(old, (bool, int, float, str, tuple)) or old != new


def _differ_at_all(old: Any, new: Any) -> bool:
    return type(old) is not type(new) or not isinstance(old, (bool, int, float, str, tuple)) or bool(old != new)


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

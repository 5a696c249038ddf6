"""What Python that was not traced may read of the modules it calls, found in its bytecode.

A module inside untraced Python may be replaced only where nobody can tell. Running the model shows one path through
that Python; its bytecode names everything that any path could read. So a child is replaced when its parents do
nothing but call it, or when every name that they mention reads alike on the child and on what takes its place.
"""

from __future__ import annotations

import dis
import functools
import inspect
import sys
from collections.abc import Iterable, Iterator, Mapping
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch.fx
from torch import Tensor, nn

# Ways to reach what a module holds without naming it.
_ENUMERATORS = frozenset(
    """__dict__ _buffers _modules _parameters apply buffers children functional_call load_state_dict modules
    named_buffers named_children named_modules named_parameters parameters state_dict vars""".split()
)
# Ways to reach it by a name that is computed.
_BY_NAME = frozenset("attrgetter get_buffer get_parameter get_submodule getattr hasattr __getattr__".split())
_FOREIGN = frozenset([*sys.stdlib_module_names, "torch", "numpy"])
_OWN = frozenset(nn.Module().__dict__)
_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)


class Mentions:
    """Names in the code that may run when the forwards of some modules run.

    Attributes:
        called: Attributes that are looked up in order to be called, and so are no further use of what they hold.
        read: Attributes that are looked up for any other end, and on what: the module itself does not count.
        own: Like ``read``, of the module itself.
        stored: Attributes that are set on anything but the module itself.
        names: Every name and every string.
        opaque: A module whose forward has no bytecode, or None.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.called: set[str] = set()
        self.read: set[str] = set()
        self.own: set[str] = set()
        self.stored: set[str] = set()
        self.names: set[str] = set()
        self.strings: set[str] = set()
        self.opaque: str | None = None
        self.modules = list(modules)
        self._seen: set[Any] = set()
        self._pending: list[tuple[FunctionType, bool]] = []
        self._classes = {cls for module in self.modules for cls in _own_classes(type(module))}
        for module in self.modules:
            self._begin(module)
        while self._pending:
            self._scan(*self._pending.pop())

    def obstacle(self, name: str, child: nn.Module) -> str | None:
        """Why ``child``, registered as ``name``, may not be replaced by a module that only computes the same."""
        if self.opaque is not None:
            return f"what {self.opaque} reads of it cannot be seen"
        enumerators = self.names & _ENUMERATORS
        if enumerators & {"parameters", "buffers"} and "next" in self.names:
            # ``next(self.parameters()).device``: any parameter will do.
            enumerators -= {"parameters", "buffers"}
        if enumerators:
            return f"the Python around it goes through modules or tensors by {_listed(enumerators)}"
        changed = self.stored & {key for module in child.modules() for key in vars(module).keys() - _OWN}
        if changed:
            return f"the Python around it may set its {_listed(changed)}"
        shared = self._shared_containers(child)
        if shared:
            return f"it shares its {_listed(shared)} with the Python around it"
        if name not in self.read | self.own | self.strings and name.isidentifier():
            return None
        if any(hasattr(type(child), special) for special in ("__iter__", "__getitem__", "__len__")):
            return "the Python around it may look inside"
        classes = {cls.__name__ for cls in _own_classes(type(child), torch_too=True)}
        told_apart = {key for key in self._mentioned(child) if not _reads_alike(key, child)} | (classes & self.names)
        return f"the Python around it may read its {_listed(told_apart)}" if told_apart else None

    def _mentioned(self, child: nn.Module) -> set[str]:
        """Names that might be looked up on a child."""
        names = self.called | self.read
        if not self.names & _BY_NAME:
            return names
        fragments = [string for string in self.strings if string]
        return names | {key for key in _attributes(child) if any(part in key for part in fragments)}

    def _shared_containers(self, child: nn.Module) -> set[str]:
        """Attributes that hold something changeable which untraced Python holds, too."""
        held = {id(value): value for module in self.modules for value in _changeable(module).values()}
        return {
            key
            for module in child.modules()
            for key, value in _changeable(module).items()
            if id(value) in held and (isinstance(value, (dict, list, set)) or self.stored & vars(value).keys())
        }

    # Reading code.

    def _begin(self, module: nn.Module) -> None:
        hooks = [hook for name in _OWN if name.endswith("hooks") for hook in (getattr(module, name) or {}).values()]
        for function in (type(module).forward, module.__dict__.get("forward"), *hooks):
            if function is not None and not self._add(function):
                self.opaque = type(module).__name__
        strings = [text for value in vars(module).values() for text in _texts(value)]
        self.strings.update(strings)
        # Functions, and objects that are no modules.
        for value in _inner(vars(module).values()):
            self._add_value(value)
            if not isinstance(value, (nn.Module, Tensor, *_PLAIN)):
                self._add_class(type(value))

    def _add(self, function: Any, method: bool = True) -> bool:
        """Scan a function later; false when it has no bytecode to scan."""
        function = inspect.unwrap(function) if callable(function) else function
        if isinstance(function, MethodType):
            function = function.__func__
        if isinstance(function, property):
            return all(self._add(part, method) for part in (function.fget,) if part is not None)
        if isinstance(function, (staticmethod, classmethod)):
            return self._add(function.__func__, method=False)
        if not isinstance(function, FunctionType):
            return _is_foreign(getattr(function, "__module__", None))
        if function not in self._seen and not _is_foreign(function.__module__):
            self._seen.add(function)
            self._pending.append((function, method))
        return True

    def _add_class(self, cls: Any) -> None:
        if isinstance(cls, type) and not _is_foreign(cls.__module__) and cls not in self._seen:
            self._seen.add(cls)
            for base in _own_classes(cls):
                for value in vars(base).values():
                    self._add(value, method=False) if callable(value) or isinstance(value, property) else None

    def _scan(self, function: FunctionType, method: bool) -> None:
        code = function.__code__
        receiver = code.co_varnames[0] if method and code.co_argcount else None
        known = dict(function.__globals__)
        for cell, name in zip(function.__closure__ or (), code.co_freevars, strict=True):
            try:
                known[name] = cell.cell_contents
            except ValueError:  # not yet filled
                continue
        for part in _codes(code):
            self._scan_code(part, receiver, known)

    def _scan_code(self, code: CodeType, receiver: str | None, known: Mapping[str, Any]) -> None:
        self.strings.update(text for constant in code.co_consts for text in _texts(constant))
        self.names.update(code.co_names)
        self.names.update(text for constant in code.co_consts for text in _texts(constant))
        before: Any = None
        for step in dis.get_instructions(code):
            on_self = receiver is not None and before == receiver
            name = str(step.argval)
            if step.opname in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR"):
                is_call = step.opname == "LOAD_METHOD" or (sys.version_info >= (3, 12) and bool((step.arg or 0) & 1))
                (self.called if is_call else self.own if on_self else self.read).add(name)
                self._follow_attribute(name)
                if not on_self and isinstance(before, ModuleType):
                    self._add_value(getattr(before, name, None))
            elif step.opname in ("STORE_ATTR", "DELETE_ATTR") and not on_self:
                self.stored.add(name)
            before = None
            if step.opname.startswith(("LOAD_FAST", "LOAD_DEREF", "LOAD_CLOSURE")):
                before = step.argval[-1] if isinstance(step.argval, tuple) else step.argval
            if step.opname in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF") and name in known:
                self._add_value(known[name])
                before = known[name] if isinstance(known[name], ModuleType) else before

    def _follow_attribute(self, name: str) -> None:
        """A method of one of the modules may be meant."""
        for cls in self._classes:
            if name in vars(cls):
                self._add(vars(cls)[name])

    def _add_value(self, value: Any) -> None:
        if isinstance(value, type) and not issubclass(value, nn.Module):
            self._add_class(value)
        elif isinstance(value, (FunctionType, MethodType)):
            self._add(value, method=False)


def kept_attributes(module: nn.Module) -> dict[str, Any]:
    """Plain data among the attributes of a module, which anybody may go on reading after it was replaced."""
    return {key: value for key, value in vars(module).items() if key not in _OWN and _is_plain(value)}


def _reads_alike(name: str, child: nn.Module) -> bool:
    """Whether looking up a name gives the same on a child as on a compiled one."""
    if name in ("forward", "__call__") or name in kept_attributes(child):
        return True
    own = any(name in vars(cls) for cls in _own_classes(type(child), torch_too=True))
    new = hasattr(torch.fx.GraphModule, name) and not hasattr(nn.Module, name)
    return not own and not new and name not in _attributes(child) and name not in ("meta", "report", "graph")


def _attributes(child: nn.Module) -> set[str]:
    """Names of what a module holds, its class's own methods included."""
    own = {key for cls in _own_classes(type(child), torch_too=True) for key in vars(cls) if not key.startswith("__")}
    held = {*child._modules, *child._parameters, *child._buffers, *(vars(child).keys() - _OWN)}
    return (own | held) - {"forward"} - kept_attributes(child).keys()


def _own_classes(cls: type, torch_too: bool = False) -> list[type]:
    """A class and its bases, without nn.Module and what lies below."""
    return [
        base
        for base in inspect.getmro(cls)
        if base not in (nn.Module, object) and (torch_too or not _is_foreign(base.__module__))
    ]


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _changeable(module: nn.Module) -> dict[str, Any]:
    """Attributes that hold objects which code could change."""
    return {
        key: value
        for key, value in vars(module).items()
        if key not in _OWN
        and not isinstance(value, (nn.Module, Tensor, tuple, type, FunctionType, MethodType, *_PLAIN))
        and (isinstance(value, (dict, list, set)) or hasattr(value, "__dict__"))
    }


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (tuple, list, frozenset, set)):
        for item in value:
            yield from _texts(item)


def _inner(values: Iterable[Any]) -> Iterator[Any]:
    """Values, and those in containers and partial functions among them."""
    for value in values:
        yield value
        if isinstance(value, (tuple, list, set)):
            yield from _inner(value)
        elif isinstance(value, dict):
            yield from _inner(value.values())
        elif isinstance(value, functools.partial):
            yield from _inner((value.func, *value.args, *value.keywords.values()))


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_plain, [*value, *value.values()]))
    return all(map(_is_plain, value)) if isinstance(value, (tuple, list, set)) else isinstance(value, _PLAIN)


def _is_foreign(module: str | None) -> bool:
    """Whether code is of Python, torch or NumPy, and knows nothing of anybody's attributes."""
    return (module or "").partition(".")[0] in _FOREIGN


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)[:4])

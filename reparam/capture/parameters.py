"""Parameter programs: what computes a module's weights from its own tensors, beside its forward, runs once.

Two mechanisms of torch do that. A *parametrization* (``torch.nn.utils.parametrize``; weight norm and spectral norm in
their present form) computes a tensor whenever it is read. A *forward pre-hook* (the same two in their older form, and
many of people's own) computes it before every call. Both become the numbers that they compute, and the module is the
plain layer again that it was before. A hook is a parameter program when it does nothing but set tensors of its own
module, to the same values every time, without so much as looking at the input; all other hooks stay.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from reparam.capture.copies import tensor_storages, tensors_in
from reparam.capture.state import NoSideEffects, State, UnrecordableError, inside, items, put_back, same_items
from reparam.graph.leaves import HOOKS, carries_hooks, is_leaf
from reparam.modes import below

_PRE_HOOKS = "_forward_pre_hooks"


def settle(root: nn.Module) -> None:
    """Run the parameter programs of a private copy, and take them off.

    Whatever does more than compute tensors from tensors is left as it is.

    Args:
        root: A model in eval mode that may be changed, but for the contents of its tensors.
    """
    modules = list(root.modules())
    hooked = [module for module in modules if module.__dict__.get(_PRE_HOOKS)]
    parametrized = [module for module in modules if "parametrizations" in module._modules]
    if not hooked and not parametrized:
        return
    storages = tensor_storages(modules)
    for module in parametrized:
        values = _without_side_effects(partial(_parametrized, module), modules, storages)
        if values is not None:
            del module._modules["parametrizations"]
            # torch has made a subclass of the class that it was.
            module.__class__ = type(module).__bases__[0]
            _set(module, values)
    for module in hooked:
        values = _without_side_effects(partial(_hooked, module, modules), modules, storages)
        if values is not None:
            module.__dict__[_PRE_HOOKS].clear()
            _set(module, values)
            _drop_unread(module)


class _NotAProgramError(Exception):
    """It does more than compute tensors from tensors."""


def _without_side_effects(
    program: Callable[[], dict[str, Tensor]], modules: Sequence[nn.Module], storages: frozenset[int]
) -> dict[str, Tensor] | None:
    """What a program computes, or None when it is none; the modules are as before either way."""
    state = State(modules)
    memory = [(tensor, tensor.data) for module in modules for _, tensor in tensors_in(module)]
    try:
        with torch.no_grad(), below(NoSideEffects(storages)):
            values = program()
        return None if any(tensor.data_ptr() != data.data_ptr() for tensor, data in memory) else values
    except (Exception, UnrecordableError):
        return None
    finally:
        for tensor, data in memory:
            if tensor.data_ptr() != data.data_ptr():
                tensor.data = data
        state.restore(modules)


def _set(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        module.__dict__.pop(name, None)
        module._buffers.pop(name, None)
        module._parameters[name] = nn.Parameter(value.detach(), requires_grad=False)


def _parametrized(module: nn.Module) -> dict[str, Tensor]:
    """The tensors that a module's parametrizations compute."""
    programs: Any = module.parametrizations
    if any(carries_hooks(inner) for inner in programs.modules()):
        raise _NotAProgramError
    state = State(programs.modules())
    first, second = ({name: getattr(module, name) for name in programs} for _ in range(2))
    for inner in programs.modules():
        state.check(inner)
    return _agreed(first, second)


def _agreed(first: dict[str, Tensor], second: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that came out the same twice."""
    same = first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    if not first or not same:
        raise _NotAProgramError
    return second


def _hooked(module: nn.Module, modules: Sequence[nn.Module]) -> dict[str, Tensor]:
    """The tensors that a module's pre-hooks set, when it has no other hooks."""
    hooks = list(module.__dict__[_PRE_HOOKS].values())
    others = [name for name in HOOKS if name != _PRE_HOOKS and module.__dict__.get(name)]
    if others or module.__dict__.get("_forward_pre_hooks_with_kwargs"):
        raise _NotAProgramError
    first, second = ({k: v for hook in hooks for k, v in _set_by(hook, module, modules).items()} for _ in range(2))
    return _agreed(first, second)


class _Untouchable:
    """The input that a parameter program is called with; any look at it raises."""

    def _refuse(self, *_: Any) -> Any:
        raise _NotAProgramError

    __getattribute__ = __bool__ = __eq__ = __hash__ = __repr__ = __str__ = _refuse
    __len__ = __iter__ = __getitem__ = _refuse


def _set_by(hook: Any, module: nn.Module, modules: Sequence[nn.Module]) -> Mapping[str, Tensor]:
    """The tensors of ``module`` that a hook sets, when that is all that it does."""
    state = State(modules)
    with _closure_kept(hook):
        if hook(module, _Untouchable()) is not None:
            raise _NotAProgramError
    changed = [(other, name) for other in modules for name in state.changes(other)]
    held = {**module.__dict__, **module._parameters, **module._buffers}
    if any(other is not module or not isinstance(held.get(name), Tensor) for other, name in changed):
        raise _NotAProgramError
    return {name: held[name] for _, name in changed}


@contextmanager
def _closure_kept(hook: Any) -> Iterator[None]:
    """Raise when a function changes the Python values that it has closed over, or an object its own attributes."""
    cells = getattr(inspect.unwrap(hook), "__closure__", None) or ()
    held = [(cell, cell.cell_contents) for cell in cells]
    seen: set[int] = set()
    contents = [(holder, items(holder)) for value in (hook, *(v for _, v in held)) for holder in inside(value, seen)]
    try:
        yield
    finally:
        changed = any(cell.cell_contents is not value for cell, value in held)
        changed |= not all(same_items(holder, old) for holder, old in contents)
        for cell, value in held:
            cell.cell_contents = value
        for holder, old in contents:
            put_back(holder, old)
    if changed:
        raise _NotAProgramError


def _drop_unread(module: nn.Module) -> None:
    """Take off a torch.nn layer the parameters and buffers that its class does not know: what its own came from."""
    if not is_leaf(module) or not type(module).__module__.startswith("torch.nn.") or isinstance(module, nn.RNNBase):
        return
    functions = [
        value for base in type(module).__mro__ if base is not nn.Module for value in vars(base).values()
        if inspect.isfunction(value)
    ]  # fmt: skip
    known = {name for function in functions for name in (*function.__code__.co_names, *function.__code__.co_consts)}
    for tensors in (module._parameters, module._buffers):
        for name in [name for name in tensors if name not in known]:
            del tensors[name]

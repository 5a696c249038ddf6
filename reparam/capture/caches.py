"""What a model keeps from call to call to save work, found out by calling it with inputs of another size."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from reparam.capture.state import State, writes_undone
from reparam.capture.structures import of_sizes
from reparam.compare import clones, compare

# Added to the sizes of an example, or what they are multiplied by.
_OTHERS = (lambda size: size // 2, lambda size: 2 * size, lambda size: size + 32, lambda size: size + 1)


@contextmanager
def forgotten(root: nn.Module, call: Any) -> Iterator[bool]:
    """Within it, a model has forgotten what it keeps for inputs of the size of a call.

    Such a cache is an attribute that a call with inputs of another size replaces, and without which the model returns
    the same as with it, for both sizes.

    Yields:
        Whether there is any.
    """
    modules = list(root.modules())
    state = State(modules)
    caches: list[tuple[nn.Module, str]] = []
    try:
        with torch.no_grad():
            caches = _caches(root, call, state)
            if caches:
                expected = [_run(root, inputs, state) for inputs in (call, _other(root, call, state))]
                for module, name in caches:
                    _set(module, name, None)
                empty = State(modules)
                actual = [_run(root, inputs, empty) for inputs in (call, _other(root, call, empty))]
                if any(y is None for y in (*expected, *actual)) or not is_same(expected, actual):
                    state.restore(modules)
                    caches = []
                else:
                    empty.restore(modules)
        yield bool(caches)
    finally:
        state.restore(modules)


def _caches(root: nn.Module, call: Any, state: State) -> list[tuple[nn.Module, str]]:
    """Attributes that a call with inputs of another size replaces, and one with inputs of the same size does not."""
    modules = list(state.attributes)
    try:
        _run(root, call, state, restore=False)
        warm = State(modules)
        if _other(root, call, warm, restore=False) is None or not (replaced := _changed(warm)):
            return []
        warm.restore(modules)
        _run(root, call, warm, restore=False)
        counted = _changed(warm)
        return [item for item in replaced if item not in counted]
    finally:
        state.restore(modules)


def _changed(state: State) -> list[tuple[nn.Module, str]]:
    """Attributes and buffers that are not what they were: modules, and names."""
    changed = [(module, name) for module in state.attributes for name in state.changes(module)]
    return [(module, name) for module, name in changed if name != "_modules" and name not in module._parameters]


def _set(module: nn.Module, name: str, value: Any) -> None:
    held = module.__dict__.get(name)
    if isinstance(held, (dict, list, set)):
        held.clear()
    elif name in module._buffers:
        module._buffers[name] = value
    else:
        module.__dict__[name] = value


def _run(root: nn.Module, call: Any, state: State, restore: bool = True) -> Any:
    """What the model returns, or None where it does not run."""
    if call is None:
        return None
    try:
        args, kwargs = clones(call)
        with writes_undone(state.attributes):
            return root.forward(*args, **kwargs)
    except Exception:
        return None
    finally:
        if restore:
            state.restore(state.attributes)


def _other(root: nn.Module, call: Any, state: State, restore: bool = True) -> Any:
    """A call with inputs of another size that the model takes, run once; None where there is none."""
    for change in _OTHERS:
        other = of_sizes(call, change)
        if _run(root, other, state, restore) is not None:
            return other
        state.restore(state.attributes)
    return None


def is_same(a: Any, b: Any) -> bool:
    """Whether two outputs are the same numbers: what is computed anew is, but for a few units in the last place."""
    try:
        compare(a, b, 1e-12)
    except Exception:
        return False
    return True

"""torch's stacks of modes, put back as they were: also after an interrupt at the wrong moment.

All that is private of torch for that is here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode

Mode = TypeVar("Mode", bound=TorchDispatchMode)
Function = TypeVar("Function", bound=Callable[..., Any])


def modes_kept(function: Function) -> Function:
    """The function, which leaves torch's modes, and whether gradients are recorded, as it found them."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        outer = sys.exc_info()[1]
        functions, dispatches, grad = _functions(), _dispatches(), torch.is_grad_enabled()
        try:
            return function(*args, **kwargs)
        except Exception as error:
            # An interrupt that met torch between two modes comes out as an error about them.
            before: BaseException | None = error
            while before is not None and before is not outer:
                if isinstance(before, KeyboardInterrupt):
                    raise KeyboardInterrupt from None
                before = before.__context__
            raise
        finally:
            if _functions() != functions or _dispatches() != dispatches:
                _put_back(functions, dispatches)
            torch._C._set_grad_enabled(grad)

    return call  # type: ignore[return-value]


@contextmanager
def below(mode: Mode) -> Iterator[Mode]:
    """A dispatch mode in force, for this thread alone: torch's own entering sets flags for the whole process."""
    torch._C._push_on_torch_dispatch_stack(mode)
    try:
        yield mode
    finally:
        # After an interrupt, Python may come here late, when the stack has been put back.
        if _dispatches()[-1:] == [mode]:
            torch._C._pop_torch_dispatch_stack(None)


@contextmanager
def alone() -> Iterator[None]:
    """No mode in force, of those that this thread has."""
    functions, dispatches = _functions(), _dispatches()
    for _ in functions:
        torch._C._pop_torch_function_stack()
    for _ in dispatches:
        torch._C._pop_torch_dispatch_stack(None)
    try:
        yield
    finally:
        _put_back(functions, dispatches)


def _put_back(functions: list[Any], dispatches: list[Any]) -> None:
    """Stacks of modes as they were."""
    while torch._C._len_torch_function_stack():
        torch._C._pop_torch_function_stack()
    for mode in functions:
        torch._C._push_on_torch_function_stack(mode)
    while torch._C._len_torch_dispatch_stack():
        torch._C._pop_torch_dispatch_stack(None)
    for mode in dispatches:
        torch._C._push_on_torch_dispatch_stack(mode)


def _functions() -> list[Any]:
    return [torch._C._get_function_stack_at(i) for i in range(torch._C._len_torch_function_stack())]


def _dispatches() -> list[Any]:
    return [torch._C._get_dispatch_stack_at(i) for i in range(torch._C._len_torch_dispatch_stack())]

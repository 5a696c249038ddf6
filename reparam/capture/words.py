"""What a call is called in a graph: the words that rules and lifters know."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from reparam.capture import aten

_ARITHMETIC = {name: name for name in "add sub mul matmul neg pow".split()} | {"div": "truediv"}


def said(
    func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[str, Any, tuple[Any, ...], dict[str, Any]]:
    """A call as the graph has it: methods by name, Python's operators as its functions, functions as themselves."""
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


def _owner(func: Any) -> str:
    return str(getattr(func, "__qualname__", ""))

"""What a graph was recorded under, checked at every call."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reparam.errors import ConditionError

_ADVICE = "call it with such inputs, or compile the model again with example_inputs like these"


# How what a graph asserts about sizes begins.
_BEGIN = "this was compiled for inputs where "


def assertion(what: str) -> str:
    """What a graph says when a size is not what it was recorded under."""
    return f"{_BEGIN}{what}; {_ADVICE}"


@contextmanager
def explained() -> Iterator[None]:
    """Raise what a graph asserts about its inputs as a ConditionError."""
    try:
        yield
    except AssertionError as error:
        if str(error).startswith(_BEGIN):
            raise ConditionError(str(error)) from None
        raise


@dataclass(frozen=True)
class Argument:
    """An argument of a call, and what has to stay the same of it.

    Attributes:
        name: Its name, with ``*`` or ``**`` before it where it stands for several.
        kind: What :func:`kind_of` said of it.
        default: Its default as a tuple of one, empty where it has to be given.
    """

    name: str
    kind: tuple[Any, ...]
    default: tuple[Any, ...] = ()


def check_call(arguments: Sequence[Argument], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Nothing, where a call is of the kind that was recorded.

    Raises:
        ConditionError: It is not.
    """
    position = 0
    for argument in arguments:
        if argument.name.startswith("**"):
            value: Any = {key: kwargs[key] for key in kwargs if all(key != other.name for other in arguments)}
        elif argument.name.startswith("*"):
            value = args[position:]
            position = max(position, len(args))
        elif position < len(args):
            value = args[position]
        elif argument.name in kwargs:
            value = kwargs[argument.name]
        elif argument.default:
            value = argument.default[0]
        else:
            continue  # Python says so itself
        position += 1
        if not _is_of_kind(value, argument.kind):
            raise ConditionError(
                f"this was compiled for {argument.name} as {_words(argument.kind)}, not {_words(kind_of(value))}; {_ADVICE}"
            )


def select(condition: Any, yes: Any, no: Any) -> Any:
    """One of two numbers."""
    return yes if condition else no


def kind_of(value: Any, within: bool = False) -> tuple[Any, ...]:
    """What has to stay the same of an argument: rank and kind of tensors, length and keys of containers, constants."""
    if isinstance(value, Tensor):
        return "tensor", value.dim(), "floating-point" if value.is_floating_point() else "other"
    if isinstance(value, Mapping):
        return "dict", *((key, kind_of(item, True)) for key, item in value.items() if isinstance(key, str | int))
    if isinstance(value, (tuple, list)):
        return "sequence", *(kind_of(item, True) for item in value)
    if type(value) in (int, float) and not within:
        return ("number",)
    if isinstance(value, (bool, int, float, str, type(None))):
        return "constant", value
    return ("object",)


def _is_of_kind(value: Any, kind: tuple[Any, ...]) -> bool:
    match kind:
        case "tensor", rank, numbers:
            return (
                isinstance(value, Tensor)
                and value.dim() == rank
                and value.is_floating_point() is (numbers == "floating-point")
            )
        case "constant", wanted:
            return value is wanted or (type(value) is type(wanted) and bool(value == wanted))
        case "number",:
            return type(value) in (int, float) or isinstance(value, (torch.SymInt, torch.SymFloat))
        case "sequence", *kinds:
            alike = isinstance(value, (tuple, list)) and len(value) == len(kinds)
            return alike and all(map(_is_of_kind, value, kinds))
        case "dict", *entries:
            alike = isinstance(value, Mapping) and len(value) == len(entries)
            return alike and all(key in value and _is_of_kind(value[key], kind) for key, kind in entries)
    return True


def _words(kind: tuple[Any, ...]) -> str:
    match kind:
        case "tensor", rank, numbers:
            return f"a tensor of {numbers} numbers with {rank} axes"
        case "constant", value:
            return repr(value)
        case "number",:
            return "a number"
        case "sequence", *kinds:
            return f"a sequence of {len(kinds)}: {', '.join(map(_words, kinds))}" if kinds else "nothing"
        case "dict", *entries:
            return f"a dict of {', '.join(repr(key) for key, _ in entries) or 'nothing'}"
    return "an object"

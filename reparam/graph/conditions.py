"""What a graph was recorded under, checked at every call."""

from __future__ import annotations

import enum
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
    position, given = 0, {}
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
        given[argument.name] = value
        if argument.kind[0] == "same" and given.get(argument.kind[1]) is not value:
            raise ConditionError(
                f"this was compiled for {argument.name} as the same tensor as {argument.kind[1]}; {_ADVICE}"
            )
        if not _is_of_kind(value, argument.kind):
            met = _words(kind_of(value, True))
            raise ConditionError(
                f"this was compiled for {argument.name} as {_words(argument.kind)}, not {met}; {_ADVICE}"
            )


def select(condition: Any, yes: Any, no: Any) -> Any:
    """One of two numbers."""
    return yes if condition else no


# What is compared as a whole.
_ATOMS = (
    bool, int, float, complex, str, bytes, type(None), enum.Enum, torch.dtype, torch.device, torch.layout,
    torch.memory_format, slice, range, frozenset, set, type,
)  # fmt: skip


# In these, numbers are numbers of the graph.
_CONTAINERS = (tuple, list, dict, torch.Size)


def kind_of(value: Any, within: bool = False) -> tuple[Any, ...]:
    """What has to stay the same of an argument: rank and kind of tensors, length and keys of containers, constants.

    Args:
        value: The argument.
        within: Whether numbers have to stay, too, as those in objects do.
    """
    if isinstance(value, Tensor):
        return "tensor", value.dim(), "floating-point" if value.is_floating_point() else "other"
    within = within or (isinstance(value, (Mapping, tuple, list)) and type(value) not in _CONTAINERS)
    if isinstance(value, Mapping):
        return "dict", *((key, kind_of(item, within)) for key, item in value.items() if isinstance(key, str | int))
    if isinstance(value, (tuple, list)):
        return "sequence", *(kind_of(item, within) for item in value)
    if type(value) in (int, float) and not within:
        return "number", type(value).__name__
    if isinstance(value, _ATOMS) or callable(value):
        return "constant", value
    cls = f"{type(value).__module__}.{type(value).__qualname__}"
    attributes = vars(value).items() if hasattr(value, "__dict__") and not isinstance(value, torch.nn.Module) else ()
    return "object", cls, *((key, kind_of(item, True)) for key, item in attributes if not key.startswith("_"))


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
        case "number", "int":
            return type(value) is int or isinstance(value, torch.SymInt)
        case "number", _:
            return type(value) in (int, float) or isinstance(value, torch.SymFloat)
        case "sequence", *kinds:
            alike = isinstance(value, (tuple, list)) and len(value) == len(kinds)
            return alike and all(map(_is_of_kind, value, kinds))
        case "dict", *entries:
            # What goes through a dict meets its entries in order.
            alike = isinstance(value, Mapping) and [*value] == [key for key, _ in entries]
            return alike and all(_is_of_kind(value[key], kind) for key, kind in entries)
        case "object", _, *entries:
            return kind_of(value)[:2] == kind[:2] and all(
                hasattr(value, key) and _is_of_kind(getattr(value, key), kind) for key, kind in entries
            )
    return True


def _words(kind: tuple[Any, ...]) -> str:
    match kind:
        case "tensor", rank, numbers:
            return f"a tensor of {numbers} numbers with {rank} axes"
        case "constant", value:
            return repr(value)
        case "number", cls:
            return f"an {cls}" if cls == "int" else f"a {cls}"
        case "object", cls, *_:
            return f"a {cls}"
        case "sequence", *kinds:
            return f"a sequence of {len(kinds)}: {', '.join(map(_words, kinds))}" if kinds else "nothing"
        case "dict", *entries:
            return f"a dict of {', '.join(f'{key!r}: {_words(kind)}' for key, kind in entries) or 'nothing'}"
    return "an object"

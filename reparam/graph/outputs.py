"""What a model returns, rebuilt at every call by the same class."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from reparam.graph.leaves import LIFTERS


def is_plain(value: Any, symbolic: tuple[type, ...] = ()) -> bool:
    """Whether torch.fx returns a structure as it is: tensors, numbers and texts in tuples, lists and dicts."""
    if type(value) is dict:
        return all(isinstance(key, str | int) for key in value) and all(
            is_plain(item, symbolic) for item in value.values()
        )
    if type(value) in (tuple, list):
        return all(is_plain(item, symbolic) for item in value)
    plain = (bool, int, float, str, torch.dtype, torch.device, *symbolic)
    return value is None or isinstance(value, Tensor) or type(value) in plain


class Rebuild(nn.Module):
    """A structure of the user's classes, filled with the values of a call.

    Attributes:
        template: The structure, with a mark in the place of every tensor and every number that depends on the call.
    """

    def __init__(self, template: Any, marks: list[Any]) -> None:
        super().__init__()
        self.template, self.marks = template, marks

    def forward(self, *values: Any) -> Any:
        """The structure with these values in it."""
        return copy.deepcopy(self.template, {id(mark): value for mark, value in zip(self.marks, values, strict=True)})

    forward._torchdynamo_disable = True  # type: ignore[attr-defined]  # which copies structures in its own way

    def plain(self, values: list[Any]) -> Any:
        """The structure as dicts, lists and tuples: a mapping, or an object with attributes, as a dict of its own."""
        places = {id(mark): value for mark, value in zip(self.marks, values, strict=True)}

        def walk(item: Any) -> Any:
            if id(item) in places:
                return places[id(item)]
            if isinstance(item, Mapping):
                return {key: walk(part) for key, part in item.items()}
            if isinstance(item, (tuple, list, set, frozenset)):
                parts = [walk(part) for part in item]
                return parts if isinstance(item, list) else tuple(parts)
            if hasattr(item, "__dict__") and not isinstance(item, (type, nn.Module)):
                return {key: walk(part) for key, part in vars(item).items()}
            return item

        return walk(self.template)

    @classmethod
    def of(cls, value: Any, symbolic: tuple[type, ...]) -> Rebuild | str:
        """What rebuilds a structure, or the reason why it cannot be."""
        value = _with_shapes(value)
        slots = cls.slots(value, symbolic)
        marks = [torch.empty(0) if isinstance(slot, Tensor) else _Mark() for slot in slots]
        memo: dict[int, Any] = {id(slot): mark for slot, mark in zip(slots, marks, strict=True)}
        try:
            made = cls(copy.deepcopy(value, memo), marks)
            found = cls.slots(made(*slots), symbolic)
        except Exception as error:
            return f"it returns a {type(value).__name__}, which cannot be copied ({error})"
        if len(found) != len(slots) or any(a is not b for a, b in zip(found, slots, strict=True)):
            return f"it returns a {type(value).__name__}, which holds tensors that cannot be exchanged"
        return made

    @staticmethod
    def slots(value: Any, symbolic: tuple[type, ...]) -> list[Any]:
        """The tensors and symbolic numbers in a structure, each once."""
        found: dict[int, Any] = {}
        seen: set[int] = set()

        def walk(item: Any) -> None:
            if isinstance(item, Tensor) or type(item) in symbolic or type(item).__mro__[-2:-1] == symbolic:
                found.setdefault(id(item), item)
                return
            if id(item) in seen or item is None or isinstance(item, (bool, int, float, str, type, nn.Module)):
                return
            seen.add(id(item))
            if isinstance(item, Mapping):
                for part in item.values():
                    walk(part)
            elif isinstance(item, (tuple, list, set, frozenset)):
                for part in item:
                    walk(part)
            for part in vars(item).values() if hasattr(item, "__dict__") else ():
                walk(part)

        walk(value)
        return list(found.values())


# A layer like torch's own, and linear in nothing.
LIFTERS[Rebuild] = lambda module, *values: None


def _with_shapes(value: Any) -> Any:
    """Tuples, lists and dicts with shapes, which cannot hold marks, as what makes them."""
    if isinstance(value, torch.Size):
        return _Shape(value)
    if type(value) in (tuple, list):
        return type(value)(map(_with_shapes, value))
    return {key: _with_shapes(item) for key, item in value.items()} if type(value) is dict else value


class _Shape(list[Any]):
    """A shape, which is one again in a copy."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        items = [copy.deepcopy(item, memo) for item in self]
        return torch.Size(items) if all(isinstance(item, int) for item in items) else _Shape(items)


class _Mark:
    """In the place of a number."""

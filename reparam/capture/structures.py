"""Nested tuples, lists, dicts and slices, as calls have them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from reparam.compare import with_tensors


def leaves(value: Any) -> Iterator[Any]:
    """What nested tuples, lists, dicts and slices hold."""
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from leaves(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from leaves(item)
    elif type(value) is slice:
        yield from (value.start, value.stop, value.step)
    else:
        yield value


def mapped(value: Any, function: Callable[[Any], Any]) -> Any:
    """Nested tuples, lists, dicts and slices with a function applied to what they hold."""
    if isinstance(value, torch.Size):
        return tuple(function(item) for item in value)
    if isinstance(value, tuple):
        items = [mapped(item, function) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, list):
        return [mapped(item, function) for item in value]
    if isinstance(value, dict):
        return {key: mapped(item, function) for key, item in value.items()}
    if type(value) is slice:
        return slice(function(value.start), function(value.stop), function(value.step))
    return function(value)


def of_sizes(call: Any, change: Callable[[int], int]) -> Any:
    """A call like one, with other sizes behind those of batch and channels."""
    return with_tensors(call, lambda x: resized(x, {axis: change(x.shape[axis]) for axis in range(2, x.dim())}))


def larger(call: Any) -> Any:
    """A call with images, or rows, that are twice as large."""
    return of_sizes(call, lambda size: 2 * size)


def resized(x: Tensor, sizes: Mapping[int, int]) -> Tensor:
    """The numbers of a tensor over and over, or the first of them, along some axes."""
    for axis, size in sizes.items():
        x = x.index_select(axis, torch.arange(size, device=x.device) % x.shape[axis])
    return x

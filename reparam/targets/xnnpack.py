"""Operators that XNNPACK does not know, in terms of those that it knows.

Every operator that XNNPACK lacks ends one part of a program and begins another, with copies in between, and runs on one
thread in ExecuTorch's portable library. Most networks that pool, split or attend run in one part this way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

_aten: Any = torch.ops.aten
DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {}
"""How to compute operators of ATen; NotImplemented leaves one as it is."""


def in_known_operators(program: ExportedProgram) -> ExportedProgram:
    """The same program, of operators that XNNPACK knows, as far as there are such for sizes that are free or fixed."""
    known: ExportedProgram = program.run_decompositions(
        dict(DECOMPOSITIONS)
    )  # a copy, from which PyTorch takes entries out
    return known


def _decomposes(operator: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register how to compute an operator."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        DECOMPOSITIONS[operator] = function
        return function

    return register


def _are_fixed(sizes: Sequence[Any]) -> bool:
    """Whether no size is free."""
    return all(isinstance(size, int) for size in sizes)


@_decomposes(_aten.mean.dim)
def _mean(x: Tensor, axes: Sequence[int] | None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Any:
    """XNNPACK's global average keeps its axes."""
    of_images = x.dim() == 4 and axes is not None and sorted(axis % 4 for axis in axes) == [2, 3]
    if not of_images or keepdim or dtype is not None or not _are_fixed(x.shape):
        return NotImplemented
    return _aten.mean.dim(x, axes, True).flatten(1)


@_decomposes(_aten.hardsigmoid.default)
def _hardsigmoid(x: Tensor) -> Tensor:
    """PyTorch's own decomposition has integers in it, which are made floating-point at every run."""
    return (x + 3.0).clamp(0.0, 6.0) / 6.0


@_decomposes(_aten.split_with_sizes.default)
def _split_with_sizes(x: Tensor, sizes: Sequence[int], axis: int = 0) -> list[Tensor]:
    ends = accumulate(sizes)
    return [_aten.slice.Tensor(x, axis, end - size, end) for size, end in zip(sizes, ends, strict=True)]


@_decomposes(_aten.split.Tensor)
def _split(x: Tensor, size: int, axis: int = 0) -> Any:
    length = x.shape[axis]
    if not _are_fixed([size, length]) or not 0 < size < length:
        return NotImplemented
    return _split_with_sizes(x, [min(size, length - start) for start in range(0, length, size)], axis)


@_decomposes(_aten.unbind.int)
def _unbind(x: Tensor, axis: int = 0) -> Any:
    shape = list(x.shape)
    length = shape.pop(axis)
    if not _are_fixed([length]):
        return NotImplemented
    return [part.reshape(shape) for part in _split_with_sizes(x, [1] * length, axis)]


@_decomposes(_aten.matmul.default)
def _matmul(a: Tensor, b: Tensor) -> Any:
    """PyTorch's own decomposition expands to the size that the factors have, which copies them."""
    if not _are_fixed([*a.shape, *b.shape]) or not a.dim() == b.dim() > 2 or a.shape[:-2] != b.shape[:-2]:
        return NotImplemented
    return _aten.bmm.default(a.flatten(0, -3), b.flatten(0, -3)).unflatten(0, a.shape[:-2])


@_decomposes(_aten.scaled_dot_product_attention.default)
def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """PyTorch's own decomposition gives zeros where a mask hides everything; without one, a softmax is a softmax."""
    if mask is not None or dropout or is_causal or enable_gqa:
        return NotImplemented
    scores = query * (query.shape[-1] ** -0.5 if scale is None else scale) @ key.transpose(-2, -1)
    return scores.softmax(-1) @ value

"""Depthwise convolutions by tap, where torch runs one channel after the other.

That is what it does on the processor in float64, and for kernels of one tap on a single thread. A network of many
channels then takes several times as long to look at as to run.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def _called(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What an operator returns."""
    if func is torch.ops.aten.convolution.default and not kwargs and args[8] > 1:
        x, weight, bias, stride, padding, dilation, transposed = args[:7]
        kernel = weight.shape[2:]
        is_slow = x.device.type == "cpu" and (x.dtype is torch.float64 or all(k == 1 for k in kernel))
        if is_slow and not transposed and x.dtype is weight.dtype and weight.shape[:2] == (x.shape[1], 1):
            # One number for all axes is allowed.
            stride, padding, dilation = (tuple(n) * (len(kernel) // len(n)) for n in (stride, padding, dilation))
            sizes = [
                (size + 2 * pad - step * (k - 1) - 1) // by + 1
                for size, pad, step, k, by in zip(x.shape[2:], padding, dilation, kernel, stride, strict=True)
            ]
            if min(sizes) > 0:
                return _by_tap(x, weight, bias, stride, padding, dilation, sizes)
    return func(*args, **kwargs)


def _by_tap(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    sizes: Sequence[int],
) -> Tensor:
    """The sum over all taps of what each reads, times its numbers."""
    if any(padding):
        x = F.pad(x, [pad for pad in reversed(padding) for _ in range(2)])
    broadcast = (-1, *(1 for _ in sizes))
    total = None if bias is None else bias.view(broadcast)
    for tap, numbers in zip(itertools.product(*map(range, weight.shape[2:])), weight.flatten(1).unbind(1), strict=True):
        starts = [step * index for step, index in zip(dilation, tap, strict=True)]
        ends = [at + by * (n - 1) + 1 for at, by, n in zip(starts, stride, sizes, strict=True)]
        where: tuple[Any, ...] = (..., *map(slice, starts, ends, stride))
        read, numbers = x[where], numbers.view(broadcast)
        total = read * numbers if total is None else torch.addcmul(total, read, numbers)
    assert total is not None
    return total


class ByTap(TorchDispatchMode):
    """Within it, depthwise convolutions are computed by tap."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _called(func, args, kwargs or {})

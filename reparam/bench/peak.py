"""How fast the machine can multiply: what a model's multiply-adds are held against."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

# Large enough that nothing but arithmetic counts, small enough to be done in a moment.
_SIZES = {"cpu": (768, 1024, 1536), "cuda": (4096, 8192)}


def products(device: str, dtype: torch.dtype) -> dict[int, Callable[[], Callable[[], Tensor]]]:
    """Square matrix products, by the size of their matrices: functions that make the matrices, and return a product.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        dtype: Type of the matrices.
    """

    def product(size: int) -> Callable[[], Tensor]:
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        result = torch.empty_like(a)
        return lambda: torch.mm(a, b, out=result)

    return {size: partial(product, size) for size in _SIZES[device]}


def rate(multiply_adds: int, seconds: float) -> float:
    """Operations per second, two for each multiply-add."""
    return 2 * multiply_adds / seconds

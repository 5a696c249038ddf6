"""Operators in terms of those that XNNPACK knows: the same numbers, and nothing left for portable operators."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import reparam
from reparam.targets.xnnpack import DECOMPOSITIONS, in_known_operators

pytest.importorskip("executorch.exir", reason="ExecuTorch needs it")

aten: Any = torch.ops.aten


class Between(nn.Module):
    """A function of what a convolution makes of an image."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 3)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.conv(x))


def attend(x: Tensor, **options: Any) -> Tensor:
    q, k, v = x.flatten(2).transpose(1, 2).unflatten(2, (3, 2, 2)).permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(q, k, v, **options)


KNOWN: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda x: x.mean((2, 3)),
    "mean, axes from the end": lambda x: x.mean((-1, -2)),
    "global pool": lambda x: F.adaptive_avg_pool2d(x, 1).flatten(1),
    "hardsigmoid": F.hardsigmoid,
    "split": lambda x: torch.cat([part.relu() for part in x.split(5, 1)], 1),
    "split with sizes": lambda x: torch.cat([part.relu() for part in x.split([5, 3, 4], 1)], 1),
    "chunk": lambda x: x.chunk(2, 1)[0] * x.chunk(2, 1)[1],
    "unbind": lambda x: x.unflatten(1, (2, 6)).unbind(1)[1].relu(),
    "matrix product": lambda x: (x @ x.transpose(-2, -1)).relu(),
    "matrix product of tokens": lambda x: x.flatten(2) @ x.flatten(2).transpose(1, 2),
    "attention": attend,
    "attention, scaled": lambda x: attend(x, scale=0.3),
}
OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean of one axis": lambda x: x.mean(2),
    "mean that keeps its axes": lambda x: x.mean((2, 3), keepdim=True),
    "mean in another type": lambda x: x.mean((2, 3), dtype=torch.float32),
    "split into one": lambda x: x.split(12, 1)[0].relu(),
    "matrix product that broadcasts": lambda x: x @ x[:, :1].transpose(-2, -1),
    "matrix and vectors": lambda x: x @ x[0, 0, 0],
    "attention with a mask": lambda x: attend(x, attn_mask=torch.ones(36, 36, dtype=torch.bool).tril()),
    "attention to the past": lambda x: attend(x, is_causal=True),
}


@pytest.mark.parametrize("name", [*KNOWN, *OTHERS])
def test_the_numbers_stay(name: str) -> None:
    model = Between((KNOWN | OTHERS)[name]).double().eval()
    x = 3 * torch.randn(1, 3, 8, 8, dtype=torch.float64)
    program = in_known_operators(torch.export.export(model, (x,)))
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", KNOWN)
def test_nothing_is_left_for_portable_operators(tmp_path: Path, name: str) -> None:
    exported = reparam.export(Between(KNOWN[name]).eval(), tmp_path / "model.pte", torch.randn(1, 3, 8, 8))
    assert exported.details["portable_operators"] == {}
    assert exported.details["delegates"] == 1


@pytest.mark.parametrize("name", ["mean", "chunk", "unbind", "matrix product", "attention", "attention to the past"])
def test_free_sizes_stay_free(tmp_path: Path, name: str) -> None:
    model = Between((KNOWN | OTHERS)[name]).eval()
    exported = reparam.export(model, tmp_path / "model.pte", torch.randn(1, 3, 8, 8), dynamic_batch=True)
    assert exported.dynamic_batch
    assert exported.comparison.largest_error <= 1e-4


tensors = st.lists(st.integers(1, 4), min_size=1, max_size=4).map(lambda shape: torch.randn(shape).double())


def check(operator: Any, *args: Any) -> bool:
    """Whether an operator is decomposed; then into the same numbers."""
    found = DECOMPOSITIONS[operator](*args)
    if found is not NotImplemented:
        expected = operator(*args)
        expected = list(expected) if isinstance(found, list) else expected
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12, equal_nan=True)
    return found is not NotImplemented


@given(tensors, st.data())
def test_parts_of_every_axis(x: Tensor, data: st.DataObject) -> None:
    axis = data.draw(st.integers(-x.dim(), x.dim() - 1))
    size = data.draw(st.integers(1, 5))
    assert check(aten.unbind.int, x, axis)
    assert check(aten.split.Tensor, x, size, axis) == (size < x.shape[axis])
    first = data.draw(st.integers(0, x.shape[axis]))
    assert check(aten.split_with_sizes.default, x, [first, x.shape[axis] - first], axis)


@given(tensors, st.data())
def test_means_of_all_axes(x: Tensor, data: st.DataObject) -> None:
    axes = data.draw(st.lists(st.integers(0, x.dim() - 1), min_size=1, unique=True))
    negative = data.draw(st.lists(st.booleans(), min_size=len(axes), max_size=len(axes)))
    named = [axis - x.dim() * behind for axis, behind in zip(axes, negative, strict=True)]
    assert check(aten.mean.dim, x, named) == (x.dim() == 4 and sorted(axes) == [2, 3])
    assert not check(aten.mean.dim, x, named, True)


@given(tensors, st.data())
def test_products_of_all_shapes(a: Tensor, data: st.DataObject) -> None:
    leading = data.draw(st.sampled_from((a.shape[:-2], a.shape[1:-2], torch.Size([1] * max(0, a.dim() - 2)))))
    b = torch.randn(*leading, a.shape[-1], 3).double()
    assert check(aten.matmul.default, a, b) == (a.dim() == b.dim() > 2 and leading == a.shape[:-2])


@given(tensors)
def test_hard_sigmoids_on_both_sides_of_their_bends(x: Tensor) -> None:
    assert check(aten.hardsigmoid.default, 4 * x)
    assert check(aten.hardsigmoid.default, torch.tensor([-3.0, 3.0, -math.inf, math.inf, math.nan]).double())

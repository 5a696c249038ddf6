"""Operators as layers: the right class, precision and name."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import affines, convs, linears, random_tensor
from torch import nn

from reparam.algebra import AveragePool, ChannelAffine, Conv
from reparam.compare import compare
from reparam.deploy.layers import layer
from reparam.graph.affine import Affine


@given(st.data(), st.integers(1, 3))
def test_convolutions_that_torch_can_pad(data: st.DataObject, dimensions: int) -> None:
    conv = data.draw(convs(dimensions, padding=[(1, 1)] * dimensions))
    made = layer(conv, torch.float64)
    assert type(made) is {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dimensions]
    x = random_tensor((2, conv.in_channels, *(extent + 4 for extent in conv.extent)), 0)
    compare(conv(x), made(x), 1e-12)


@given(linears())
def test_matrix_products(linear: Conv) -> None:
    made = layer(linear, torch.float64)
    assert type(made) is nn.Linear
    x = random_tensor((2, 3, linear.in_channels), 0)
    compare(linear(x), made(x), 1e-12)


@given(st.data(), st.integers(-4, -1))
def test_affines(data: st.DataObject, axis: int) -> None:
    affine = data.draw(affines(3, axis))
    made = layer(affine, torch.float64)
    assert type(made) is Affine
    x = random_tensor((3, 3, 3, 3), 0)
    compare(affine(x), made(x), 1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int64])
@pytest.mark.parametrize("shift", [0.0, 1.5])
def test_a_uniform_affine_keeps_rank_and_type(dtype: torch.dtype, shift: float) -> None:
    made = layer(ChannelAffine.uniform(2.0, shift), torch.float32)
    for shape in ((), (2, 3)):
        x = torch.ones(shape, dtype=dtype)
        if dtype.is_floating_point and shape:
            assert made(x).dtype == dtype
        assert made(x).shape == x.shape
        assert (made(x) == 2 + shift).all()


def test_pools_and_asymmetric_same_padding() -> None:
    assert isinstance(layer(AveragePool((3,), (2,), (1,)), torch.float32), nn.AvgPool1d)
    conv = Conv(torch.randn(2, 2, 4, 3), padding=((1, 2), (1, 1)))
    made = layer(conv, torch.float32)
    assert made.padding == "same"
    x = torch.randn(1, 2, 6, 5)
    compare(conv(x), made(x), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_parameters_are_frozen_own_their_memory_and_have_the_type_asked_for(dtype: torch.dtype) -> None:
    weight = torch.randn(2, 3, 3, 3, dtype=torch.float64)
    made = layer(Conv(weight, torch.randn(2, dtype=torch.float64)), dtype)
    assert {parameter.dtype for parameter in made.parameters()} == {dtype}
    assert not any(parameter.requires_grad for parameter in made.parameters())
    assert made.weight.data_ptr() != weight.data_ptr()
    assert not made.training
    # Rounded once.
    assert torch.equal(made.weight, weight.to(dtype))

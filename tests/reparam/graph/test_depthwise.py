"""Depthwise convolutions by tap are torch's own."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
import torch.nn.functional as F

from reparam.graph import depthwise
from reparam.modes import below

CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@pytest.mark.parametrize(("space", "seed"), list(itertools.product((1, 2, 3), range(40))))
def test_geometry(space, seed, monkeypatch):
    """Every size, stride, padding and dilation, with and without a bias."""
    choose = random.Random(f"{space} {seed}")
    draw = [tuple(choose.randint(low, high) for _ in range(space)) for low, high in ((1, 4), (1, 3), (0, 3), (1, 3))]
    kernel, stride, padding, dilation = draw
    sizes = [step * (k - 1) + 1 + choose.randint(0, 5) for k, step in zip(kernel, dilation, strict=True)]
    channels = choose.randint(2, 5)
    x = torch.randn(choose.randint(1, 2), channels, *sizes, dtype=torch.float64)
    weight = torch.randn(channels, 1, *kernel, dtype=torch.float64)
    bias = choose.choice([None, torch.randn(channels, dtype=torch.float64)])
    by_tap = []
    original = depthwise._by_tap
    monkeypatch.setattr(depthwise, "_by_tap", lambda *args: by_tap.append(1) or original(*args))
    expected = CONVOLVE[space](x, weight, bias, stride, padding, dilation, channels)
    assert not by_tap
    with below(depthwise.ByTap()):
        actual = CONVOLVE[space](x, weight, bias, stride, padding, dilation, channels)
    assert by_tap
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    ("x", "weight", "options"),
    [
        ((1, 4, 5, 5), (8, 1, 3, 3), {"groups": 4}),  # two channels for each
        ((1, 4, 5, 5), (4, 2, 3, 3), {"groups": 2}),
        ((4, 5, 5), (4, 1, 3, 3), {"groups": 4, "padding": "same"}),  # no batch
        ((0, 4, 5, 5), (4, 1, 3, 3), {"groups": 4, "padding": 1}),
        ((2, 4, 5, 5), (4, 1, 1, 1), {"groups": 4, "stride": 2}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_others(x, weight, options, dtype):
    """What is no plain depthwise convolution is left to torch, and comes out as it does."""
    x, weight = torch.randn(x, dtype=dtype), torch.randn(weight, dtype=dtype)
    with below(depthwise.ByTap()):
        actual = F.conv2d(x, weight, **options)
    torch.testing.assert_close(actual, F.conv2d(x, weight, **options))


def test_errors():
    """An input that is too small for the kernel is torch's error."""
    x, weight = torch.randn(1, 4, 2, 2, dtype=torch.float64), torch.randn(4, 1, 3, 3, dtype=torch.float64)
    with below(depthwise.ByTap()), pytest.raises(RuntimeError, match="Kernel size"):
        F.conv2d(x, weight, groups=4)

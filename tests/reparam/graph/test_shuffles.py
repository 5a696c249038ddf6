"""Permutations of channels that are written as views, read from graphs and passed by norms."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from networks import assert_same, model, normal
from torch import Tensor, nn

import reparam

CHANNELS = 8


def by_views(x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    return x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)


def with_open_sizes(x: Tensor) -> Tensor:
    b, _, h, w = x.size()
    return x.view(b, -1, 2, h, w).transpose(1, 2).contiguous().view(b, -1, h, w)


def by_flatten(x: Tensor) -> Tensor:
    return x.unflatten(1, (4, -1)).transpose(1, 2).flatten(1, 2)


def depth_to_space(x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    return x.view(b, 2, 2, c // 4, h, w).permute(0, 3, 4, 1, 5, 2).reshape(b, c // 4, h * 2, w * 2)


def pixel_shuffle(x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    return x.reshape(b, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3).reshape(b, c // 4, 2 * h, 2 * w)


def space_to_depth(x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    return x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 3, 5, 1, 2, 4).reshape(b, 4 * c, h // 2, w // 2)


def pixel_unshuffle(x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    return x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(b, c * 4, h // 2, w // 2)


SHUFFLES: dict[str, Callable[[Tensor], Tensor]] = {
    function.__name__: function
    for function in (
        by_views, with_open_sizes, by_flatten, depth_to_space, pixel_shuffle, space_to_depth, pixel_unshuffle
    )
} | {
    "channel shuffle of torch": lambda x: F.channel_shuffle(x, 4),
    "pixel shuffle of torch": lambda x: F.pixel_shuffle(x, 2),
    "pixel unshuffle of torch": lambda x: F.pixel_unshuffle(x, 2),
    "layers": nn.ChannelShuffle(2),
    "two": lambda x: F.pixel_shuffle(F.channel_shuffle(x, 2), 2),
}  # fmt: skip


def norm(channels: int) -> nn.BatchNorm2d:
    made = nn.BatchNorm2d(channels).eval()
    for tensor in (made.weight, made.bias, made.running_mean, made.running_var):
        assert tensor is not None
        tensor.data = torch.rand(channels) + 0.5
    return made


def compiled(network: nn.Module, with_example: bool) -> nn.Module:
    network = network.double()
    made = reparam.compile(network, normal(2, CHANNELS, 6, 4)) if with_example else reparam.compile(network)
    for x in (normal(3, CHANNELS, 4, 8), normal(1, CHANNELS, 2, 2)):
        assert_same(network, made, x)
    return made


@pytest.mark.parametrize("with_example", [True, False])
@pytest.mark.parametrize("name", [name for name in SHUFFLES if "unshuffle" not in name and "depth" not in name[6:]])
def test_a_norm_behind_goes_into_what_is_before(name, with_example):
    channels = SHUFFLES[name](torch.zeros(1, CHANNELS, 4, 4)).shape[1]
    network = model(
        lambda self, x: torch.relu(self.norm(SHUFFLES[name](self.conv(x)))),
        conv=nn.Conv2d(CHANNELS, CHANNELS, 1),
        norm=norm(channels),
    )
    assert compiled(network, with_example).report.after.norms == 0


@pytest.mark.parametrize("with_example", [True, False])
@pytest.mark.parametrize("name", SHUFFLES)
def test_a_norm_before_goes_into_what_is_behind(name, with_example):
    shuffle = SHUFFLES[name]
    made = shuffle(torch.zeros(1, CHANNELS, 4, 4))
    network = model(
        lambda self, x: self.conv(shuffle(self.norm(torch.relu(x)))),
        conv=nn.Conv2d(made.shape[1], 4, 1),
        norm=norm(CHANNELS),
    )
    # Channels that become one have different numbers.
    assert compiled(network, with_example).report.after.norms == (made.shape[-1] > 4)


@given(st.permutations(range(4)), st.integers(0, 4), st.booleans())
def test_any_order_of_any_digits(order, extra, behind):
    """Channels as three digits, two of which may be doubled by positions, in any order: the norm goes where it may."""

    def shuffle(x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        digits = x.view(b, 2, 2, 1 + extra, 2, h, w)
        return digits.permute(0, *(1 + i for i in order), 5, 6).reshape(b, c, h, w)

    channels = 8 * (1 + extra)
    if behind:
        network = model(
            lambda self, x: torch.relu(self.norm(shuffle(self.conv(x)))), conv=nn.Conv2d(3, channels, 1),
            norm=norm(channels),
        )  # fmt: skip
    else:
        network = model(
            lambda self, x: self.conv(shuffle(self.norm(torch.relu(x)))), conv=nn.Conv2d(channels, 3, 1),
            norm=norm(channels),
        )  # fmt: skip
    x = normal(2, 3 if behind else channels, 3, 4)
    made = reparam.compile(network.double(), x)
    assert_same(network, made, x)
    assert made.report.after.norms == 0


def swapped_axes(x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    return x.view(b, 2, c // 2, h, w).transpose(1, 3).reshape(b, c, h, w)


def odd_sizes_made_up_for(x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    return x.reshape(b, c, h // 2, 2, w // 2, -1).permute(0, 1, 3, 5, 2, 4).reshape(b, -1, h // 2, w // 2)


def batch_among_channels(x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    return x.view(b, 2, c // 2, h, w).transpose(0, 1).reshape(b, c, h, w)


@pytest.mark.parametrize("shuffle", [swapped_axes, odd_sizes_made_up_for, batch_among_channels])
def test_what_is_no_permutation_of_channels_stays(shuffle):
    network = model(
        lambda self, x: shuffle(self.norm(torch.relu(x))).mean((2, 3)) @ self.weight,
        norm=norm(CHANNELS),
        weight=nn.Parameter(torch.ones(math.prod(shuffle(normal(2, CHANNELS, 4, 4)).shape[1:2]), 3)),
    )
    x = normal(2, CHANNELS, 4, 4)
    made = reparam.compile(network.double(), x)
    assert_same(network, made, x)
    assert made.report.after.norms == 1


def test_a_shuffle_next_to_a_convolution_is_its_order_of_channels():
    network = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1), nn.ChannelShuffle(2), nn.ReLU(), nn.ChannelShuffle(4), nn.Conv2d(8, 4, 3),
        nn.ReLU(), nn.PixelUnshuffle(2), nn.Conv2d(16, 4, 1),
    )  # fmt: skip
    x = normal(2, 4, 8, 10)
    made = reparam.compile(network.double(), x)
    assert_same(network, made, x)
    assert made.report.after.kernels == 6  # the exchange with positions stays
    assert made.report.after.multiply_adds == made.report.before.multiply_adds


def test_a_shuffle_next_to_groups_stays():
    network = nn.Sequential(nn.Conv2d(32, 32, 3, groups=8), nn.ChannelShuffle(8), nn.ReLU())
    x = normal(2, 32, 8, 8)
    made = reparam.compile(network.double(), x)
    assert_same(network, made, x)
    assert made.report.after.multiply_adds == made.report.before.multiply_adds

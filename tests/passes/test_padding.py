"""``conv(pad(x)) -> conv(x)``."""

from __future__ import annotations

import pytest
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from networks import assert_left, assert_same, image, layers, model, rewritten
from strategies import MODES
from torch import nn

import reparam
from reparam.passes import Compose

RULES = [Compose("PadBeforeConv")]


def test_padding_becomes_the_convolutions_own():
    net = model(lambda s, x: s.conv(F.pad(x, (1, 1, 1, 1))), conv=nn.Conv2d(3, 8, 3))
    before, after = rewritten(net, RULES)
    assert before == (
        "%0 = input x\n"
        "%1 = pad[1](%0)\n"
        "%2 = conv2d[3 -> 8, 3x3, bias](%1)\n"
        "return %2"
    )  # fmt: skip
    assert after == (
        "%0 = input x\n"
        "%1 = conv2d[3 -> 8, 3x3, pad 1, bias](%0)\n"
        "return %1"
    )  # fmt: skip


def test_asymmetric_padding_too():
    net = model(lambda s, x: s.conv(F.pad(x, (1, 2, 0, 1))), conv=nn.Conv2d(3, 8, 3, padding=1))
    before, after = rewritten(net, RULES)
    assert before == (
        "%0 = input x\n"
        "%1 = pad[0:1x1:2](%0)\n"
        "%2 = conv2d[3 -> 8, 3x3, pad 1, bias](%1)\n"
        "return %2"
    )  # fmt: skip
    assert after == (
        "%0 = input x\n"
        "%1 = conv2d[3 -> 8, 3x3, pad 1:2x2:3, bias](%0)\n"
        "return %1"
    )  # fmt: skip
    # torch's layers cannot pad like that, so it is written as a padding after all.
    compiled = reparam.compile(net)
    assert (compiled.report.after.convolutions, compiled.report.after.kernels) == (1, 2)
    assert_same(net, compiled, image(3, 2))


@pytest.mark.parametrize("layer", [nn.ZeroPad2d(1), nn.ReflectionPad2d(1), nn.ReplicationPad2d(1), nn.CircularPad2d(1)])
def test_padding_layers(layer):
    net = model(lambda s, x: s.conv(s.pad(x)), conv=nn.Conv2d(3, 8, 3), pad=layer)
    compiled = reparam.compile(net)
    assert compiled.report.after.kernels == 1
    assert_same(net, compiled, image(3, 2))


@given(st.data(), st.integers(1, 3), st.sampled_from(MODES), st.sampled_from((0.0, 1.5)))
def test_any_padding_before_any_convolution(data, dimensions, mode, value):
    conv = data.draw(layers(dimensions, 2, modes=MODES))
    amounts = data.draw(st.lists(st.integers(-1, 3), min_size=2 * dimensions, max_size=2 * dimensions))
    fill = {"value": value} if mode == "zeros" else {}
    torch_mode = "constant" if mode == "zeros" else mode
    if mode != "zeros":
        amounts = [abs(amount) for amount in amounts]
    net = model(lambda s, x: s.conv(F.pad(x, amounts, torch_mode, **fill)), conv=conv)
    compiled = reparam.compile(net, verify=False)
    assert_same(net, compiled, image(2, dimensions))
    assert compiled.report.after.kernels <= compiled.report.before.kernels


@given(st.data(), st.integers(1, 3), st.integers(0, 3))
def test_symmetric_zeros_always_go(data, dimensions, amount):
    conv = data.draw(layers(dimensions, 2))
    net = model(lambda s, x: s.conv(F.pad(x, [amount] * (2 * dimensions))), conv=conv)
    compiled = reparam.compile(net, verify=False)
    assert_same(net, compiled, image(2, dimensions))
    if conv.padding != "same":
        assert compiled.report.after.kernels == 1


# Refusals.


def check_left(net: nn.Module, reason: str) -> None:
    assert_left(net, RULES, [reason], image(3, 2))


def test_padding_with_ones_is_left():
    net = model(lambda s, x: s.conv(F.pad(x, (1, 1, 1, 1), value=1.0)), conv=nn.Conv2d(3, 8, 3))
    check_left(net, "the padding is of 1.0, not of zeros")


def test_two_kinds_of_padding_are_left():
    conv = nn.Conv2d(3, 8, 3, padding=1)
    net = model(lambda s, x: s.conv(F.pad(x, (1, 1, 1, 1), "reflect")), conv=conv)
    check_left(net, "zeros padding of a reflect-padded input")


def test_padding_of_what_was_cropped_is_left():
    net = model(lambda s, x: s.conv(F.pad(x, (-1, 0, 0, 0))), conv=nn.Conv2d(3, 8, 3, padding=1))
    check_left(net, "the padding covers what was cropped")


def test_padding_of_the_channels_is_left():
    net = model(lambda s, x: s.conv(F.pad(x, (0, 0, 0, 0, 1, 0))), conv=nn.Conv2d(4, 8, 3))
    check_left(net, "the padding reaches beyond the convolution's axes")


def test_padding_with_two_readers_is_left():
    def forward(self, x):
        x = F.pad(x, (1, 1, 1, 1))
        return self.conv(x), x.relu()

    check_left(model(forward, conv=nn.Conv2d(3, 8, 3)), "pad has 2 readers")

"""``conv(conv(x)) -> conv(x)``, and crops after a convolution."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from networks import POOL, assert_left, assert_same, image, layers, model, normal, rewritten
from strategies import MODES
from torch import nn

import reparam
from reparam.passes import Compose

RULES = [Compose("ConvAfterConv")]


def chain(*steps):
    """Modules and functions, one after the other."""
    members = {f"step{i}": step for i, step in enumerate(steps) if isinstance(step, nn.Module)}

    def forward(self, x):
        for i, step in enumerate(steps):
            x = getattr(self, f"step{i}")(x) if isinstance(step, nn.Module) else step(x)
        return x

    return model(forward, **members)


def large(dimensions: int) -> torch.Tensor:
    """Two images of two channels that two kernels fit into."""
    return normal(2, 2, *(35, 34, 33)[:dimensions]) if dimensions else normal(2, 3, 2)


def test_a_pointwise_convolution_before_a_convolution():
    net = chain(nn.Conv2d(4, 8, 1, bias=False), nn.Conv2d(8, 8, 3, 2, 1, groups=2))
    before, after = rewritten(net, RULES)
    assert before == (
        "%0 = input x\n"
        "%1 = conv2d[4 -> 8, 1x1](%0)\n"
        "%2 = conv2d[8 -> 8, 3x3, stride 2, pad 1, groups 2, bias](%1)\n"
        "return %2"
    )  # fmt: skip
    assert after == (
        "%0 = input x\n"
        "%1 = conv2d[4 -> 8, 3x3, stride 2, pad 1, bias](%0)\n"
        "return %1"
    )  # fmt: skip
    assert_same(net, reparam.compile(net), image(4, 2))


def test_an_average_pool_after_a_pointwise_convolution():
    net = chain(nn.Conv2d(4, 2, 1), nn.AvgPool2d(2, 2))
    _, after = rewritten(net, RULES)
    assert after == (
        "%0 = input x\n"
        "%1 = conv2d[4 -> 2, 2x2, stride 2, bias](%0)\n"
        "return %1"
    )  # fmt: skip
    assert_same(net, reparam.compile(net), image(4, 2))


def test_a_matrix_product_after_another():
    net = chain(nn.Linear(4, 8), nn.Linear(8, 4))
    _, after = rewritten(net, RULES, torch.zeros(2, 4, dtype=torch.float64))
    assert after == "%0 = input x\n%1 = linear[4 -> 4, bias](%0)\nreturn %1"


@given(st.data(), st.integers(0, 3), st.sampled_from(MODES))
def test_any_convolution_after_any_other(data, dimensions, mode):
    inner = data.draw(layers(dimensions, 2, modes=("zeros", mode)))
    middle = inner.out_features if dimensions == 0 else inner.out_channels
    outer = data.draw(layers(dimensions, middle, modes=("zeros", mode)))
    net = chain(inner, outer)
    # The input that is made up for a linear layer has two axes.
    compiled = reparam.compile(net, None if dimensions else large(0))
    assert_same(net, compiled, large(dimensions))
    assert compiled.report.after.kernels <= compiled.report.before.kernels


@given(st.data(), st.integers(1, 3), st.booleans())
def test_any_convolution_and_any_pool(data, dimensions, pool_first):
    conv = data.draw(layers(dimensions, 2))
    kernel = [data.draw(st.integers(1, 3)) for _ in range(dimensions)]
    padding = [data.draw(st.integers(0, k // 2)) for k in kernel]
    pool = POOL[dimensions](kernel, data.draw(st.integers(1, 2)), padding)
    net = chain(pool, conv) if pool_first else chain(conv, pool)
    compiled = reparam.compile(net, verify=False)
    assert_same(net, compiled, large(dimensions))
    assert compiled.report.after.kernels <= compiled.report.before.kernels


# A crop is a view: it goes only where the convolution then needs no padding of its own.


def test_a_crop_undoes_a_padding():
    net = chain(nn.Conv2d(3, 8, 3, padding=1), lambda x: F.pad(x, (-1, -1, -1, -1)))
    _, after = rewritten(net, [Compose("CropAfterConv")])
    assert after == "%0 = input x\n%1 = conv2d[3 -> 8, 3x3, bias](%0)\nreturn %1"
    assert_same(net, reparam.compile(net), image(3, 2))


@given(st.data(), st.integers(1, 3), st.sampled_from(MODES))
def test_any_crop_after_any_convolution(data, dimensions, mode):
    conv = data.draw(layers(dimensions, 2, modes=("zeros", mode)))
    amounts = data.draw(st.lists(st.integers(-2, 0), min_size=2 * dimensions, max_size=2 * dimensions))
    net = chain(conv, lambda x: F.pad(x, amounts))
    compiled = reparam.compile(net, verify=False)
    assert_same(net, compiled, large(dimensions))
    assert compiled.report.after.kernels <= compiled.report.before.kernels


# Refusals.


def check_left(net: nn.Module) -> None:
    """Without a remark: nobody expects any two convolutions in a row to become one."""
    assert_left(net, RULES, [], image(64, 2))


def test_a_bottleneck_stays():
    check_left(chain(nn.Conv2d(64, 4, 1), nn.Conv2d(4, 64, 1)))


def test_depthwise_before_pointwise_stays():
    check_left(chain(nn.Conv2d(64, 64, 3, groups=64), nn.Conv2d(64, 64, 1)))


def test_a_padded_second_convolution_stays():
    check_left(chain(nn.Conv2d(64, 64, 3, bias=False), nn.Conv2d(64, 64, 3, padding=1)))


def test_a_bias_before_padding_stays():
    check_left(chain(nn.Conv2d(64, 64, 1), nn.Conv2d(64, 64, 3, padding=1)))


@pytest.mark.parametrize("read", [lambda s, x: (s.b(s.a(x)), s.a(x)), lambda s, x: (lambda y: (s.b(y), y))(s.a(x))])
def test_a_value_that_is_read_twice_stays(read):
    net = model(read, a=nn.Conv2d(64, 64, 1), b=nn.Conv2d(64, 64, 1))
    compiled = reparam.compile(net)
    assert compiled.report.after.convolutions <= 3
    assert_same(net, compiled, image(64, 2))

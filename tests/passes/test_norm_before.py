"""``conv(norm(x)) -> conv(x)``."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import NORM, assert_same, image, layers, model, normal, reasons, rewritten
from strategies import MODES
from torch import nn

import reparam
from reparam.passes import NormBeforeLinear

RULES = [NormBeforeLinear()]


def test_norm_before_unpadded_convolution():
    net = model(lambda s, x: s.conv(s.bn(x)), conv=nn.Conv2d(3, 8, 3), bn=nn.BatchNorm2d(3))
    before, after = rewritten(net, RULES)
    assert before == (
        "%0 = input x\n"
        "%1 = affine[3, axis -3](%0)\n"
        "%2 = conv2d[3 -> 8, 3x3, bias](%1)\n"
        "return %2"
    )  # fmt: skip
    assert after == (
        "%0 = input x\n"
        "%1 = conv2d[3 -> 8, 3x3, bias](%0)\n"
        "return %1"
    )  # fmt: skip


def test_every_reader_takes_the_norm_in():
    def forward(self, x):
        x = self.bn(x)
        return self.a(x), self.b(x)

    net = model(forward, a=nn.Conv2d(3, 8, 3), b=nn.Conv2d(3, 8, 3, 2), bn=nn.BatchNorm2d(3))
    before, after = rewritten(net, RULES)
    assert before == (
        "%0 = input x\n"
        "%1 = affine[3, axis -3](%0)\n"
        "%2 = conv2d[3 -> 8, 3x3, bias](%1)\n"
        "%3 = conv2d[3 -> 8, 3x3, stride 2, bias](%1)\n"
        "return (%2, %3)"
    )  # fmt: skip
    assert after == (
        "%0 = input x\n"
        "%1 = conv2d[3 -> 8, 3x3, bias](%0)\n"
        "%2 = conv2d[3 -> 8, 3x3, stride 2, bias](%0)\n"
        "return (%1, %2)"
    )  # fmt: skip
    assert_same(net, reparam.compile(net), image(3, 2))


def test_scale_passes_zero_padding():
    net = model(lambda s, x: s.conv(0.5 * x), conv=nn.Conv2d(3, 8, 3, padding=1))
    before, after = rewritten(net, RULES)
    assert before == (
        "%0 = input x\n"
        "%1 = affine[0.5](%0)\n"
        "%2 = conv2d[3 -> 8, 3x3, pad 1, bias](%1)\n"
        "return %2"
    )  # fmt: skip
    assert after == (
        "%0 = input x\n"
        "%1 = conv2d[3 -> 8, 3x3, pad 1, bias](%0)\n"
        "return %1"
    )  # fmt: skip


def reads_zeros(conv: nn.Module) -> bool:
    padding = [k - 1 for k in conv.kernel_size] if conv.padding == "same" else conv.padding
    return conv.padding_mode == "zeros" and any(padding)


@given(st.data(), st.integers(1, 3), st.sampled_from((1, 2, 4)), st.booleans())
def test_norm_goes_exactly_where_no_zeros_are_padded(data, dimensions, channels, two):
    readers = [data.draw(layers(dimensions, channels, modes=MODES)) for _ in range(1 + two)]

    def forward(self, x):
        x = self.bn(x)
        return [reader(x) for reader in self.readers]

    net = model(forward, bn=NORM[dimensions](channels), readers=nn.ModuleList(readers))
    x = image(channels, dimensions)
    compiled = reparam.compile(net, x, verify=False)
    assert_same(net, compiled, x)
    after = compiled.report.after
    stays = any(reads_zeros(reader) for reader in readers)
    assert (after.norms + after.elementwise) == stays
    assert after.convolutions == len(readers)
    assert bool(reasons(compiled)) == stays


@given(st.data(), st.integers(0, 3), st.sampled_from((1, 2, 4)), st.booleans())
def test_scales_always_go(data, dimensions, channels, uniform):
    shape = (1,) if uniform else (channels, *[1] * dimensions)
    conv = data.draw(layers(dimensions, channels, modes=MODES))
    net = model(lambda s, x: s.conv(x / s.gamma), conv=conv, gamma=nn.Parameter(torch.rand(shape) + 0.5))
    x = image(channels, dimensions)
    compiled = reparam.compile(net, x, verify=False)
    assert_same(net, compiled, x)
    assert compiled.report.after.elementwise == 0
    assert compiled.report.after.kernels == 1


def test_batch_norm_before_linear():
    net = model(lambda s, x: s.fc(s.bn(x)), fc=nn.Linear(5, 4), bn=nn.BatchNorm1d(5))
    x = normal(3, 5)
    compiled = reparam.compile(net, x)
    assert compiled.report.after.kernels == 1
    assert_same(net, compiled, x)


def test_names_of_many_layers_that_took_in_the_same_norm():
    """The names used to run out: the first layer took the place of the list that held the second."""
    wide = nn.ModuleList([nn.Conv2d(2, 8, 3), nn.Conv2d(2, 8, 1)])
    narrow = nn.ModuleList(nn.Conv2d(2, 2, 1, groups=2, bias=False) for _ in range(3))

    def forward(self, x):
        x = self.bn(x)
        return [reader(x) for reader in self.readers]

    for readers, paths in ((wide, {"readers.0", "readers.1"}), (narrow, {"bn", "bn_fused", "bn_fused1"})):
        net = model(forward, bn=nn.BatchNorm2d(2), readers=readers)
        compiled = reparam.compile(net)
        assert {name.rpartition(".")[0] for name in compiled.state_dict()} == paths
        assert_same(net, compiled, image(2, 2))


# Refusals.


def test_shift_before_zero_padding_is_left():
    net = model(lambda s, x: s.conv(s.bn(x)), conv=nn.Conv2d(3, 8, 3, padding=1), bn=nn.BatchNorm2d(3))
    compiled = reparam.compile(net)
    assert reasons(compiled) == ["not foldable into conv: shift before zero padding"]
    assert compiled.report.missed[0].where == "bn"
    assert_same(net, compiled, image(3, 2))


def test_norm_with_a_reader_that_cannot_take_it_in_is_left():
    def forward(self, x):
        x = self.bn(x)
        return self.conv(x) + torch.relu(x)

    net = model(forward, conv=nn.Conv2d(3, 3, 1), bn=nn.BatchNorm2d(3))
    compiled = reparam.compile(net)
    assert "it is also read by relu, which cannot take it in" in reasons(compiled)
    assert_same(net, compiled, image(3, 2))


def test_norm_that_is_returned_is_left():
    def forward(self, x):
        x = self.bn(x)
        return self.conv(x), x

    net = model(forward, conv=nn.Conv2d(3, 3, 1), bn=nn.BatchNorm2d(3))
    compiled = reparam.compile(net)
    assert reasons(compiled) == ["it is also read by the output, which cannot take it in"]
    assert_same(net, compiled, image(3, 2))


def test_constant_that_might_broadcast_the_input_is_left():
    net = model(lambda s, x: s.conv(x * s.gamma), conv=nn.Conv2d(3, 3, 1), gamma=nn.Parameter(torch.rand(3, 1, 1)))
    compiled = reparam.compile(net, verify=False)
    message = "not foldable into conv: the input might have one channel, which the constant would broadcast"
    assert reasons(compiled) == [message]
    assert_same(net, compiled, image(1, 2))
    assert_same(net, compiled, image(3, 2))

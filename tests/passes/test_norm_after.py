"""``norm(conv(x)) -> conv(x)``."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from networks import NORM, assert_same, image, layers, model, normal, one_and_a_half, reasons, rewritten
from strategies import MODES
from torch import nn

import reparam
from reparam.errors import ConditionError
from reparam.passes import Compose

RULES = [Compose("NormAfterLinear")]


def test_norm_after_convolution():
    net = model(lambda s, x: s.bn(s.conv(x)), conv=nn.Conv2d(3, 8, 3, 2, 1, bias=False), bn=nn.BatchNorm2d(8))
    before, after = rewritten(net, RULES)
    assert before == (
        "%0 = input x\n"
        "%1 = conv2d[3 -> 8, 3x3, stride 2, pad 1](%0)\n"
        "%2 = affine[8, axis -3](%1)\n"
        "return %2"
    )  # fmt: skip
    assert after == (
        "%0 = input x\n"
        "%1 = conv2d[3 -> 8, 3x3, stride 2, pad 1, bias](%0)\n"
        "return %1"
    )  # fmt: skip


def test_functional_norm_after_functional_convolution():
    def forward(self, x):
        x = F.conv2d(x, self.conv.weight, padding="same", groups=2)
        return F.batch_norm(x, self.bn.running_mean, self.bn.running_var, self.bn.weight, self.bn.bias)

    net = model(forward, conv=nn.Conv2d(4, 8, 2, groups=2, bias=False), bn=nn.BatchNorm2d(8))
    before, after = rewritten(net, RULES)
    assert before == (
        "%0 = input x\n"
        "%1 = conv2d[4 -> 8, 2x2, pad 0:1, groups 2](%0)\n"
        "%2 = affine[8, axis -3](%1)\n"
        "return %2"
    )  # fmt: skip
    assert after == (
        "%0 = input x\n"
        "%1 = conv2d[4 -> 8, 2x2, pad 0:1, groups 2, bias](%0)\n"
        "return %1"
    )  # fmt: skip


def test_everything_that_scales_and_shifts_after_a_convolution():
    net = model(
        lambda s, x: 2 * (s.gamma * s.conv(x) - 1), conv=nn.Conv2d(3, 8, 1), gamma=nn.Parameter(torch.rand(8, 1, 1))
    )
    before, after = rewritten(net, RULES)
    assert before == (
        "%0 = input x\n"
        "%1 = conv2d[3 -> 8, 1x1, bias](%0)\n"
        "%2 = affine[8, axis -3, scale only](%1)\n"
        "%3 = affine[1 + -1](%2)\n"
        "%4 = affine[2](%3)\n"
        "return %4"
    )  # fmt: skip
    assert after == (
        "%0 = input x\n"
        "%1 = conv2d[3 -> 8, 1x1, bias](%0)\n"
        "return %1"
    )  # fmt: skip


def test_norm_after_linear_when_the_rank_is_known():
    net = model(lambda s, x: s.bn(s.fc(x)), fc=nn.Linear(3, 8), bn=nn.BatchNorm1d(8))
    before, after = rewritten(net, RULES, normal(2, 3))
    assert before == "%0 = input x\n%1 = linear[3 -> 8, bias](%0)\n%2 = affine[8, axis -1](%1)\nreturn %2"
    assert after == "%0 = input x\n%1 = linear[3 -> 8, bias](%0)\nreturn %1"


@given(st.data(), st.integers(1, 3), st.sampled_from((1, 2, 3)), st.booleans())
def test_any_convolution_takes_in_any_norm(data, dimensions, channels, affine):
    conv = data.draw(layers(dimensions, channels, modes=MODES))
    forms = st.sampled_from((None, (), (1,), (conv.out_channels, *[1] * dimensions)))
    shape = data.draw(forms)
    gamma = None if shape is None else nn.Parameter(torch.rand(shape) + 0.5)

    def forward(self, x):
        x = self.bn(self.conv(x))
        return x if self.gamma is None else 1 - self.gamma * x

    net = model(forward, conv=conv, bn=NORM[dimensions](conv.out_channels, affine=affine), gamma=gamma)
    x = image(channels, dimensions)
    compiled = reparam.compile(net, verify=False)
    assert_same(net, compiled, x)
    after = compiled.report.after
    assert (after.convolutions, after.norms, after.elementwise) == (1, 0, 0)
    # Only what torch's layers cannot pad themselves is padded before them.
    assert after.kernels == 1


@given(st.data(), st.integers(1, 4), st.booleans())
def test_any_linear_takes_in_any_norm(data, channels, affine):
    fc = data.draw(layers(0, channels))
    net = model(lambda s, x: s.bn(s.fc(x)), fc=fc, bn=nn.BatchNorm1d(fc.out_features, affine=affine))
    x = image(channels, 0, batch=5)
    compiled = reparam.compile(net, x, verify=False)
    assert_same(net, compiled, x)
    assert compiled.report.after.kernels == 1


# Refusals.


def test_convolution_with_two_readers_is_left():
    def forward(self, x):
        x = self.conv(x)
        return self.bn(x), x

    net = model(forward, conv=nn.Conv2d(3, 8, 1), bn=nn.BatchNorm2d(8))
    before, after = rewritten(net, RULES)
    assert before == after
    compiled = reparam.compile(net)
    assert reasons(compiled) == ["conv has 2 readers"]
    assert compiled.report.missed[0].where == "bn"
    assert_same(net, compiled, image(3, 2))


def test_shape_of_the_convolution_is_read_at_the_result():
    def forward(self, x):
        x = self.conv(x)
        return self.bn(x).reshape(x.shape[0], -1)

    net = model(forward, conv=nn.Conv2d(3, 8, 1), bn=nn.BatchNorm2d(8))
    compiled = reparam.compile(net)
    assert reasons(compiled) == []
    assert compiled.report.after.norms == 0
    assert_same(net, compiled, image(3, 2))


def test_norm_of_a_batch_needs_its_batch():
    net = model(lambda s, x: s.bn(s.conv(x)), conv=nn.Conv2d(3, 8, 1), bn=nn.BatchNorm2d(8, track_running_stats=False))
    compiled = reparam.compile(net)
    assert reasons(compiled) == ["it has no running statistics and normalises with those of its input"]
    assert compiled.report.after.norms == 1
    assert_same(net, compiled, image(3, 2))


def test_instance_norm_normalises_its_input():
    net = model(lambda s, x: s.norm(s.conv(x)), conv=nn.Conv2d(3, 8, 1), norm=nn.InstanceNorm2d(8))
    compiled = reparam.compile(net)
    assert compiled.report.after.norms == 1
    assert "normalises with" in reasons(compiled)[0]
    assert_same(net, compiled, image(3, 2))


@pytest.mark.parametrize("hooked", ["conv", "bn"])
def test_layers_with_hooks_are_left(hooked):
    net = model(lambda s, x: s.bn(s.conv(x)), conv=nn.Conv2d(3, 8, 1), bn=nn.BatchNorm2d(8))
    getattr(net, hooked).register_forward_hook(one_and_a_half)
    compiled = reparam.compile(net)
    refusal = next(remark for remark in compiled.report.missed if "hooks" in remark.message)
    assert refusal.message == "it carries hooks, which a fused kernel would drop"
    assert refusal.where == hooked
    assert compiled.report.after.norms == 1
    assert_same(net, compiled, image(3, 2))


def test_norm_after_linear_takes_only_inputs_of_the_rank_that_was_made_up():
    net = model(lambda s, x: s.bn(s.fc(x)), fc=nn.Linear(5, 4), bn=nn.BatchNorm1d(4))
    compiled = reparam.compile(net)
    assert compiled.report.after.norms == 0
    assert_same(net, compiled, normal(3, 5))
    assert net(normal(2, 4, 5)).shape == (2, 4, 4)  # the norm of another axis
    with pytest.raises(ConditionError, match=r"with 2 axes, not .* with 3 axes"):
        compiled(normal(2, 4, 5))


def test_norm_along_another_axis_than_the_features_of_a_linear_is_left():
    net = model(lambda s, x: s.bn(s.fc(x)), fc=nn.Linear(5, 4), bn=nn.BatchNorm1d(3))
    x = normal(2, 3, 5)
    compiled = reparam.compile(net, x)
    assert reasons(compiled) == ["it works along axis -2, not along the channels' axis -1"]
    assert compiled.report.after.norms == 1
    assert_same(net, compiled, x)


def test_constant_along_the_width_is_left():
    net = model(lambda s, x: s.conv(x) * s.gamma, conv=nn.Conv2d(3, 8, 1), gamma=nn.Parameter(torch.rand(10)))
    compiled = reparam.compile(net, image(3, 2))
    assert reasons(compiled) == ["it works along axis -1, not along the channels' axis -3"]
    assert_same(net, compiled, image(3, 2))


def test_constant_that_differs_from_place_to_place_is_left():
    net = model(lambda s, x: s.conv(x) + s.position, conv=nn.Conv2d(3, 8, 1), position=nn.Parameter(torch.rand(11, 10)))
    compiled = reparam.compile(net, image(3, 2))
    assert reasons(compiled) == ["a constant of shape (11, 10) differs from place to place"]
    assert_same(net, compiled, image(3, 2))


def test_constant_that_broadcasts_the_channels_is_left():
    net = model(lambda s, x: s.conv(x) * s.gamma, conv=nn.Conv2d(3, 1, 1), gamma=nn.Parameter(torch.rand(8, 1, 1)))
    compiled = reparam.compile(net)
    assert reasons(compiled) == ["1 channels are broadcast to 8"]
    assert_same(net, compiled, image(3, 2))


def test_integers_are_not_scaled_by_a_convolution():
    net = model(lambda s, x: s.conv(x / 255.0), conv=nn.Conv2d(3, 8, 3)).float()
    x = torch.randint(0, 256, (2, 3, 9, 9), dtype=torch.uint8)
    compiled = reparam.compile(net, x)
    assert compiled.report.after.elementwise == 1
    assert torch.equal(compiled(x), net(x))

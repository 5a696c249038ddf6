"""``f(x) + g(x) + x -> h(x)``."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from networks import (
    CONV,
    NORM,
    SUMS,
    DataDependent,
    Tree,
    add_up,
    as_module,
    assert_same,
    assert_same_or_told,
    image,
    layers,
    model,
    normal,
    plans,
    reasons,
    rewritten,
)
from strategies import divisors, random_tensor, seeds, sums
from torch import Tensor, nn

import reparam
from reparam.algebra import Conv
from reparam.passes import ParallelBranches

RULES = [ParallelBranches()]


def assert_no_more_kernels(net: nn.Module, x: Tensor, example: Tensor | None = None) -> None:
    """Compiled, it computes the same with no more kernels, if it computes anything at all."""
    try:
        net(x)
    except RuntimeError:  # the shapes of its branches do not broadcast
        return
    compiled = reparam.compile(net, example)
    assert_same(net, compiled, x)
    assert compiled.report.after.kernels <= compiled.report.before.kernels


def test_branches_and_identity():
    net = model(lambda s, x: s.a(x) + s.b(x) + x, a=nn.Conv2d(4, 4, 3, padding=1), b=nn.Conv2d(4, 4, 1))
    before, after = rewritten(net, RULES)
    assert before == (
        "%0 = input x\n"
        "%1 = conv2d[4 -> 4, 3x3, pad 1, bias](%0)\n"
        "%2 = conv2d[4 -> 4, 1x1, bias](%0)\n"
        "%3 = sum(%1, %2)\n"
        "%4 = sum(%3, %0)\n"
        "return %4"
    )  # fmt: skip
    assert after == (
        "%0 = input x\n"
        "%1 = conv2d[4 -> 4, 3x3, pad 1, bias](%0)\n"
        "return %1"
    )  # fmt: skip


def test_block_of_repvgg():
    def forward(self, x):
        return torch.relu(self.norm3(self.conv3(x)) + self.norm1(self.conv1(x)) + self.norm(x))

    net = model(forward, conv3=nn.Conv2d(4, 4, 3, padding=1, bias=False), conv1=nn.Conv2d(4, 4, 1, bias=False),
                norm3=nn.BatchNorm2d(4), norm1=nn.BatchNorm2d(4), norm=nn.BatchNorm2d(4))  # fmt: skip
    before, after = rewritten(net)
    assert before == (
        "%0 = input x\n"
        "%1 = conv2d[4 -> 4, 3x3, pad 1](%0)\n"
        "%2 = affine[4, axis -3](%1)\n"
        "%3 = conv2d[4 -> 4, 1x1](%0)\n"
        "%4 = affine[4, axis -3](%3)\n"
        "%5 = sum(%2, %4)\n"
        "%6 = affine[4, axis -3](%0)\n"
        "%7 = sum(%5, %6)\n"
        "%8 = relu(%7)\n"
        "return %8"
    )  # fmt: skip
    assert after == (
        "%0 = input x\n"
        "%1 = conv2d[4 -> 4, 3x3, pad 1, bias](%0)\n"
        "%2 = relu(%1)\n"
        "return %2"
    )  # fmt: skip


def test_sum_over_two_inputs_merges_by_source():
    def forward(self, x, y):
        return 0.5 * (self.a(x) - self.b(y) + x - y + y.relu())

    net = model(forward, a=nn.Conv2d(4, 4, 3, padding=1), b=nn.Conv2d(4, 4, 1))
    before, after = rewritten(net, RULES)
    assert before == (
        "%0 = input x\n"
        "%1 = input y\n"
        "%2 = conv2d[4 -> 4, 3x3, pad 1, bias](%0)\n"
        "%3 = conv2d[4 -> 4, 1x1, bias](%1)\n"
        "%4 = sum(%2, -%3)\n"
        "%5 = sum(%4, %0)\n"
        "%6 = sum(%5, -%1)\n"
        "%7 = relu(%1)\n"
        "%8 = sum(%6, %7)\n"
        "%9 = affine[0.5](%8)\n"
        "return %9"
    )  # fmt: skip
    assert after == (
        "%0 = input x\n"
        "%1 = input y\n"
        "%2 = conv2d[4 -> 4, 3x3, pad 1, bias](%0)\n"
        "%3 = conv2d[4 -> 4, 1x1, bias](%1)\n"
        "%4 = relu(%1)\n"
        "%5 = sum(%2, %3)\n"
        "%6 = sum(%5, 0.5*%4)\n"
        "return %6"
    )  # fmt: skip
    assert_same(net, reparam.compile(net), image(4, 2), normal(2, 4, 11, 10, seed=1))


def test_mean_of_two_heads():
    net = model(lambda s, x: torch.stack([s.a(x), s.b(x)]).mean(0), a=nn.Linear(4, 2), b=nn.Linear(4, 2))
    before, after = rewritten(net, RULES)
    assert before == (
        "%0 = input x\n"
        "%1 = linear[4 -> 2, bias](%0)\n"
        "%2 = linear[4 -> 2, bias](%0)\n"
        "%3 = stack([%1, %2])\n"
        "%4 = sum(0.5*%1, 0.5*%2)\n"
        "return %4"
    )  # fmt: skip
    assert after == "%0 = input x\n%1 = linear[4 -> 2, bias](%0)\nreturn %1"


@pytest.mark.parametrize("how", SUMS)
def test_every_way_to_write_a_sum(how):
    def forward(self, x):
        return add_up(how, [self.a(x), self.b(x), self.c(x)])

    net = model(forward, a=nn.Conv2d(4, 4, 3, padding=1), b=nn.Conv2d(4, 4, 1), c=nn.BatchNorm2d(4))
    compiled = reparam.compile(net)
    assert compiled.report.after.kernels == compiled.report.after.convolutions == 1
    assert_same(net, compiled, image(4, 2))


@given(st.data(), st.integers(1, 3), st.integers(1, 2), st.sampled_from(SUMS))
def test_branches_of_one_block_are_one_convolution(data, dimensions, multiplier, how):
    """Depthwise or dense, with every norm that a reparameterised network trains."""
    channels, groups = data.draw(st.sampled_from(((4, 1), (4, 4), (2, 1), (6, 2))))
    size = data.draw(st.sampled_from((3, 5)))
    dilation = data.draw(st.integers(1, 2))
    bias = data.draw(st.booleans())

    def branch(kernel: int) -> nn.Module:
        padding = dilation * (kernel - 1) // 2
        conv = CONV[dimensions](channels, channels, kernel, 1, padding, dilation, groups, bias)
        return nn.Sequential(conv, NORM[dimensions](channels))

    branches = [branch(size) for _ in range(multiplier)] + [branch(1), nn.Identity(), NORM[dimensions](channels)]
    order = data.draw(st.permutations(branches))
    net = model(lambda s, x: add_up(how, [b(x) if i else b(x) * 1 for i, b in enumerate(s.b)]), b=nn.ModuleList(order))
    x = image(channels, dimensions)
    compiled = reparam.compile(net, x, verify=False)
    assert_same(net, compiled, x)
    assert compiled.report.after.kernels == compiled.report.after.convolutions == 1


@given(st.data(), st.integers(1, 2), st.booleans())
def test_even_kernels_of_same_padding(data, dimensions, bias):
    kernels = data.draw(st.lists(st.integers(1, 4), min_size=2, max_size=3))
    net = model(
        lambda s, x: sum([conv(x) for conv in s.convs]),
        convs=nn.ModuleList(CONV[dimensions](2, 3, kernel, padding="same", bias=bias) for kernel in kernels),
    )
    compiled = reparam.compile(net, verify=False)
    assert compiled.report.after.convolutions == 1
    assert_same(net, compiled, image(2, dimensions))


@given(st.data(), seeds)
def test_any_tree_of_any_branches(data, seed):
    """Asymmetric paddings, dilations, strides, groups, pools, subtractions, scalars, stacks, and a second source."""
    operators = data.draw(sums())
    convs = [operator for operator in operators if isinstance(operator, Conv)]
    space, channels = convs[0].dimensions, convs[0].in_channels
    branches = [as_module(operator) for operator in operators]
    x = image(channels, space)
    reach = [max(pair) for conv in convs for pair in conv.padding]
    assume(max(reach, default=0) < min(x.shape[2:], default=1))  # what is reflected has to be there
    shape = branches[0].double()(x).shape
    plan = data.draw(plans(range(len(branches) + data.draw(st.integers(0, 2)))))
    net = Tree(branches, plan).double().eval()
    y = random_tensor(shape, seed)
    for example, verify in ((None, False), ((x, y), False), ((x, y), True)):
        compiled = reparam.compile(net, example, verify=verify)
        (assert_same if example else assert_same_or_told)(net, compiled, x, y)
        assert compiled.report.after.kernels <= compiled.report.before.kernels
        assert compiled.report.after.convolutions <= compiled.report.before.convolutions


@given(st.data(), st.integers(1, 4))
def test_linear_branches(data, count):
    features = data.draw(st.integers(1, 4))
    heads = nn.ModuleList(nn.Linear(features, 3, data.draw(st.booleans())) for _ in range(count + 1))
    how = data.draw(st.sampled_from(SUMS))
    net = model(lambda s, x: add_up(how, [head(x) for head in s.heads]), heads=heads)
    compiled = reparam.compile(net, verify=False)
    assert compiled.report.after.kernels == compiled.report.after.linears == 1
    assert_same(net, compiled, normal(5, features))


@given(st.integers(1, 3), st.integers(1, 3), st.sampled_from((2, 4, 6)), st.data())
def test_depth_multipliers(dimensions, multiplier, channels, data):
    groups = data.draw(st.sampled_from(divisors(channels)))
    out = multiplier * channels
    a = CONV[dimensions](channels, out, 3, padding=1, groups=groups)
    b = CONV[dimensions](channels, out, 1, groups=groups)
    net = model(lambda s, x: s.a(x) - s.b(x), a=a, b=b)
    compiled = reparam.compile(net, verify=False)
    assert compiled.report.after.kernels == 1
    assert_same(net, compiled, image(channels, dimensions))


# What made the engine raise, before.


def test_sum_that_is_read_twice_is_not_spread():
    """``t + t`` with ``t = conv(x) + z`` has four terms when it is spread, and is then no cheaper."""

    def forward(self, x, z):
        t = self.conv(x) + z
        return t + t

    net = model(forward, conv=nn.Conv2d(4, 4, 3, padding=1))
    compiled = reparam.compile(net)
    assert compiled.report.after.kernels == 3
    assert_same(net, compiled, image(4, 2), image(4, 2))


@pytest.mark.parametrize("others", range(5))
def test_factor_of_a_sum_over_many_sources(others):
    def forward(self, x, y):
        total = self.conv(x) + x
        for _ in range(others):
            total = total + torch.relu(y)
        return 0.5 * total

    net = model(forward, conv=nn.Conv2d(4, 4, 3, padding=1))
    compiled = reparam.compile(net)
    assert compiled.report.after.kernels == compiled.report.before.kernels - 2
    assert_same(net, compiled, image(4, 2), normal(2, 4, 11, 10, seed=3))


def test_alpha_of_a_term_that_remains():
    net = model(lambda s, x, y: torch.add(s.conv(x) + x, y, alpha=0.3), conv=nn.Conv2d(4, 4, 3, padding=1))
    compiled = reparam.compile(net)
    assert compiled.report.after.kernels == 2
    assert_same(net, compiled, image(4, 2), normal(2, 4, 11, 10, seed=3))


def test_stack_of_several_sources():
    net = model(lambda s, x, y: torch.stack([s.conv(x), x, y]).sum(0), conv=nn.Conv2d(4, 4, 3, padding=1))
    compiled = reparam.compile(net)
    assert compiled.report.after.kernels == 2
    assert_same(net, compiled, image(4, 2), normal(2, 4, 11, 10, seed=3))


# Refusals.

REFUSALS = {
    "strides (2, 2) and (1, 1) differ": (nn.Conv2d(4, 4, 3, 2, 1), nn.Conv2d(4, 4, 1), (1, 1)),
    "their output sizes differ for some inputs, so the addition broadcasts": (
        nn.Conv2d(4, 4, 3),
        nn.Conv2d(4, 4, 1),
        (3, 3),
    ),
    "the addition broadcasts: 4 and 1 output channels": (nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 1, 1), (9, 8)),
    "reflect and zeros padding do not merge": (
        nn.Conv2d(4, 4, 3, padding=1),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
        (9, 8),
    ),
    "one kernel would take 4.7 times the multiply-adds": (
        nn.Conv2d(64, 64, 7, padding=3, groups=64),
        nn.Conv2d(64, 64, 3, padding=1, groups=2),
        (9, 8),
    ),
}


@pytest.mark.parametrize("reason", REFUSALS)
def test_branches_that_are_no_single_convolution_stay_apart(reason):
    a, b, size = REFUSALS[reason]
    net = model(lambda s, x: s.a(x) + s.b(x), a=a, b=b)
    x = normal(2, a.in_channels, *size)
    before, after = rewritten(net, example_inputs=x)
    assert before == after
    compiled = reparam.compile(net, x, verify=False)
    (message,) = reasons(compiled)
    assert message in (f"a and b stay apart: {reason}", f"b and a stay apart: {reason}")
    assert_same(net, compiled, x)


def test_pool_that_divides_by_less_at_the_border_stays_apart():
    net = model(lambda s, x: s.a(x) + s.pool(x), a=nn.Conv2d(4, 4, 3, padding=1),
                pool=nn.AvgPool2d(3, 1, 1, count_include_pad=False))  # fmt: skip
    compiled = reparam.compile(net)
    assert compiled.report.fused == []
    assert_same(net, compiled, image(4, 2))


def test_branch_that_is_read_elsewhere_stays():
    def forward(self, x):
        y = self.a(x)
        return y + self.b(x), y

    net = model(forward, a=nn.Conv2d(4, 4, 3, padding=1), b=nn.Conv2d(4, 4, 1))
    compiled = reparam.compile(net)
    assert compiled.report.after.convolutions == 2
    assert_same(net, compiled, image(4, 2))


def test_input_that_is_changed_between_the_branches():
    def forward(self, x):
        x = x.relu()
        y = self.a(x)
        self.opaque(x)
        return y + self.b(x)

    net = model(forward, a=nn.Conv2d(4, 4, 3, padding=1), b=nn.Conv2d(4, 4, 1), opaque=DataDependent(in_place=True))
    compiled = reparam.compile(net)
    assert reasons(compiled) == ["a and b stay apart: their input may be changed in place between them"]
    assert_same(net, compiled, image(4, 2))


# Terms of several operators in a row.


def test_low_rank_update_of_a_matrix():
    net = model(
        lambda s, x: s.base(x) + 0.5 * s.up(s.down(x)),
        base=nn.Linear(64, 64), down=nn.Linear(64, 4, bias=False), up=nn.Linear(4, 64, bias=False),
    )  # fmt: skip
    _, after = rewritten(net, RULES, torch.zeros(2, 64, dtype=torch.float64))
    assert after == "%0 = input x\n%1 = linear[64 -> 64, bias](%0)\nreturn %1"
    assert_same(net, reparam.compile(net), image(64, 0))


def test_pointwise_before_depthwise_beside_a_full_kernel():
    net = model(
        lambda s, x: s.full(x) + s.depthwise(s.pointwise(x)) + x,
        full=nn.Conv2d(8, 8, 3, padding=1),
        pointwise=nn.Conv2d(8, 8, 1, bias=False),
        depthwise=nn.Conv2d(8, 8, 3, padding=1, groups=8),
    )
    _, after = rewritten(net, RULES)
    assert after == "%0 = input x\n%1 = conv2d[8 -> 8, 3x3, pad 1, bias](%0)\nreturn %1"
    assert_same(net, reparam.compile(net), image(8, 2))


def test_low_rank_branches_alone_stay():
    net = model(
        lambda s, x: s.a(s.b(x)) + s.c(s.d(x)),
        a=nn.Conv2d(4, 256, 1), b=nn.Conv2d(256, 4, 1), c=nn.Conv2d(4, 256, 1), d=nn.Conv2d(256, 4, 1),
    )  # fmt: skip
    before, after = rewritten(net, RULES)
    assert before == after
    assert_same(net, reparam.compile(net), image(256, 2))


@given(st.data(), st.integers(0, 2))
def test_any_chains_beside_each_other(data, dimensions):
    """Two branches of up to three operators each, of any geometry, whether or not they can merge."""
    branches = []
    for _ in range(2):
        steps = []
        channels = 2
        for _ in range(data.draw(st.integers(1, 3))):
            steps.append(data.draw(layers(dimensions, channels)))
            channels = steps[-1].out_features if dimensions == 0 else steps[-1].out_channels
        branches.append(nn.Sequential(*steps))
    net = model(lambda s, x: s.a(x) + s.b(x), a=branches[0], b=branches[1])
    x = normal(2, 2, *(41, 40)[:dimensions]) if dimensions else normal(2, 3, 2)
    # The input that is made up for a linear layer has two axes.
    assert_no_more_kernels(net, x, None if dimensions else x)


# Cropped branches.


def test_a_slice_before_a_branch_is_a_negative_padding():
    net = model(
        lambda s, x: s.large(x) + s.small(x[:, :, 1:-1, 1:-1]) + x[..., 1:-1, 1:-1],
        large=nn.Conv2d(3, 3, 3), small=nn.Conv2d(3, 3, 1),
    )  # fmt: skip
    _, after = rewritten(net, RULES)
    assert after == "%0 = input x\n%1 = conv2d[3 -> 3, 3x3, bias](%0)\nreturn %1"
    assert_same(net, reparam.compile(net), image(3, 2))


@given(st.data(), st.integers(1, 2), st.sampled_from((0.5, 1, -1)))
def test_any_slices_before_and_after_branches(data, dimensions, factor):
    starts, stops, steps = st.integers(0, 2), st.sampled_from((None, -1, -2, 5)), st.sampled_from((None, 1, 2))

    def index():
        cut = [slice(data.draw(starts), data.draw(stops), data.draw(steps)) for _ in range(dimensions)]
        return (slice(None), slice(None), *cut) if data.draw(st.booleans()) else (..., *cut)

    first, second, third = index(), index(), index()
    conv, other = data.draw(layers(dimensions, 2, 2)), data.draw(layers(dimensions, 2, 2))
    net = model(
        lambda s, x: factor * s.conv(x[first]) + s.other(x)[second] + 2 * x[third], conv=conv, other=other
    )  # fmt: skip
    x = normal(2, 2, *(41, 40)[:dimensions])
    assert_no_more_kernels(net, x)

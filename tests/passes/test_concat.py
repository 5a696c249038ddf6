"""``cat(conv(x), conv(x)) -> conv(x)``."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import CONV, DataDependent, assert_left, assert_same, image, model, reasons, rewritten
from torch import nn

import reparam
from reparam.passes import ConcatenatedBranches

RULES = [ConcatenatedBranches()]


def test_branches_side_by_side():
    net = model(
        lambda s, x: torch.cat([s.a(x), s.b(x)], dim=1),
        a=nn.Conv2d(3, 4, 3, 2, 1, bias=False), b=nn.Conv2d(3, 2, 1, 2),
    )  # fmt: skip
    _, after = rewritten(net, RULES)
    assert after == "%0 = input x\n%1 = conv2d[3 -> 6, 3x3, stride 2, pad 1, bias](%0)\nreturn %1"
    assert_same(net, reparam.compile(net), image(3, 2))


def test_matrix_products_side_by_side():
    net = model(lambda s, x: torch.cat((s.a(x), s.b(x)), -1), a=nn.Linear(3, 4), b=nn.Linear(3, 2))
    x = torch.zeros(2, 5, 3, dtype=torch.float64)
    _, after = rewritten(net, RULES, x)
    assert after == "%0 = input x\n%1 = linear[3 -> 6, bias](%0)\nreturn %1"


def test_norm_of_branches_side_by_side():
    net = model(
        lambda s, x: s.norm(torch.cat([s.a(x), s.b(x)], dim=1)),
        a=nn.Conv2d(3, 4, 3, padding=1), b=nn.Conv2d(3, 2, 5, padding=2), norm=nn.BatchNorm2d(6),
    )  # fmt: skip
    compiled = reparam.compile(net)
    assert compiled.report.after.kernels == 1
    assert_same(net, compiled, image(3, 2))


@given(st.data(), st.integers(1, 3), st.integers(1, 3), st.sampled_from((-1, 0, 1)))
def test_any_branches(data, dimensions, stride, axis):
    branches = []
    for _ in range(data.draw(st.integers(2, 3))):
        reach = [data.draw(st.integers(0, 2)) for _ in range(dimensions)]
        dilation = data.draw(st.integers(1, 2))
        groups = data.draw(st.sampled_from((1, 2)))
        branches.append(
            CONV[dimensions](
                2, 2, [2 * r + 1 for r in reach], stride, [r * dilation for r in reach], dilation, groups,
                bias=data.draw(st.booleans()),
            )
        )  # fmt: skip
    net = model(lambda s, x: torch.cat([branch(x) for branch in s.branches], axis), branches=nn.ModuleList(branches))
    x = image(2, dimensions)
    compiled = reparam.compile(net, x)
    assert_same(net, compiled, x)
    assert compiled.report.after.kernels <= compiled.report.before.kernels


# Refusals.


def check_left(net: nn.Module, why: list[str]) -> None:
    assert_left(net, RULES, why, image(3, 2))


def test_branches_of_two_inputs_stay():
    net = model(
        lambda s, x: torch.cat([s.a(x), s.b(torch.relu(x))], 1), a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(3, 4, 1)
    )  # fmt: skip
    check_left(net, [])


def test_a_branch_that_is_read_elsewhere_stays():
    def forward(self, x):
        a = self.a(x)
        return torch.cat([a, self.b(x)], 1), a

    net = model(forward, a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(3, 4, 1))
    check_left(net, ["one of the concatenated branches is read elsewhere"])


def test_branches_of_different_sizes_stay():
    """Concatenated along the height, where they may differ."""
    net = model(
        lambda s, x: torch.cat([s.a(x), s.b(x)], 2), a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(3, 4, (3, 1))
    )  # fmt: skip
    check_left(net, [])


def test_a_small_kernel_beside_a_large_one_stays():
    net = model(
        lambda s, x: torch.cat([s.a(x), s.b(x)], 1), a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(3, 64, 5, padding=2)
    )  # fmt: skip
    compiled = reparam.compile(net)
    assert compiled.report.after.convolutions == 1
    net = model(
        lambda s, x: torch.cat([s.a(x), s.b(x)], 1), a=nn.Conv2d(64, 64, 1), b=nn.Conv2d(64, 4, 5, padding=2)
    )  # fmt: skip
    compiled = reparam.compile(net)
    assert compiled.report.after.convolutions == 2
    assert reasons(compiled) == [
        "the concatenated branches stay apart: one kernel would take 10.4 times the multiply-adds"
    ]


def test_an_input_that_may_change_between_the_branches_stays():
    def forward(self, x):
        x = x * 1.5
        a = self.a(x)
        self.opaque(x)
        return torch.cat([a, self.b(x)], 1)

    net = model(forward, a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(3, 4, 1), opaque=DataDependent(in_place=True))
    compiled = reparam.compile(net)
    assert compiled.report.after.convolutions == 2
    assert_same(net, compiled, image(3, 2))

"""``affine(affine(x)) -> affine(x)``."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import NORM, SCALARS, Constant, assert_same, image, model, reasons, rewritten
from torch import nn

import reparam
from reparam.passes import Compose


def test_scalars_and_norm_in_a_row():
    net = model(lambda s, x: s.bn(2 * x + 1).relu(), bn=nn.BatchNorm2d(3))
    before, after = rewritten(net, [Compose("AffineAfterAffine")])
    assert before == (
        "%0 = input x\n"
        "%1 = affine[2](%0)\n"
        "%2 = affine[1 + 1](%1)\n"
        "%3 = affine[3, axis -3](%2)\n"
        "%4 = relu(%3)\n"
        "return %4"
    )  # fmt: skip
    assert after == (
        "%0 = input x\n"
        "%1 = affine[3, axis -3](%0)\n"
        "%2 = relu(%1)\n"
        "return %2"
    )  # fmt: skip


steps = st.one_of(
    st.tuples(st.sampled_from([name for name in SCALARS if name != "mul_"]), st.sampled_from((2, -0.3, 1.0))),
    st.sampled_from(("norm", "gamma", "neg")),
)


@given(st.integers(1, 3), st.integers(1, 3), st.lists(steps, min_size=1, max_size=5))
def test_any_chain_is_at_most_one_kernel(dimensions, channels, chain):
    members = []
    for step in chain:
        match step:
            case "norm":
                members.append(NORM[dimensions](channels))
            case "gamma":
                shape = (channels, *[1] * dimensions)
                members.append(Constant(torch.rand(shape), torch.rand(shape)))
            case _:
                members.append(nn.Identity())

    def forward(self, x):
        # What a convolution makes has channels that are known; relu keeps it apart.
        x = self.conv(x).relu()
        for step, member in zip(chain, self.members, strict=True):
            x = -x if step == "neg" else SCALARS[step[0]](x, step[1]) if isinstance(step, tuple) else member(x)
        return x

    conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dimensions](2, channels, 1)
    net = model(forward, members=nn.ModuleList(members), conv=conv)
    x = image(2, dimensions)
    compiled = reparam.compile(net, x, verify=False)
    assert_same(net, compiled, x)
    assert compiled.report.after.norms + compiled.report.after.elementwise <= 1


# Refusals.


def test_affine_with_two_readers_is_left():
    def forward(self, x):
        x = x * 2
        return (x + 1).relu(), x.relu()

    net = model(forward)
    compiled = reparam.compile(net)
    assert reasons(compiled) == ["mul has 2 readers"]
    assert_same(net, compiled, image(3, 2))


def test_affines_along_two_axes_stay_two():
    net = model(lambda s, x: x + s.a + s.b, a=nn.Parameter(torch.rand(3, 1, 1)), b=nn.Parameter(torch.rand(10)))
    x = image(3, 2)
    compiled = reparam.compile(net, x)
    assert reasons(compiled) == ["it works along axis -3, not along the channels' axis -1"]
    assert_same(net, compiled, x)

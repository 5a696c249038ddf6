"""Constants that meet activations in places where torch expects numbers."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from networks import assert_same, model, normal
from torch import Tensor, nn

import reparam

FORWARDS = {
    "a token for every image": lambda s, x: torch.cat([s.token.expand(x.shape[0], -1, -1), x], 1),
    "a token, repeated": lambda s, x: torch.cat([s.token.repeat(x.size(0), 1, 1), x], 1),
    "a part of a table": lambda s, x: x + s.table[:, : x.shape[1]],
    "a table resampled": lambda s, x: x + F.interpolate(s.table.mT, size=x.shape[1], mode="linear").mT,
    "zeros": lambda s, x: torch.cat([torch.zeros(x.shape[0], 1, 4, dtype=x.dtype, device=x.device), x], 1),
    "new zeros": lambda s, x: torch.cat([s.token.new_zeros(x.shape[0], 1, 4), x], 1),
    "positions": lambda s, x: x + torch.arange(x.shape[1], device=x.device)[:, None],
    "moved to where the input is": lambda s, x: x * s.token.to(x.device).to(x.dtype),
}


@pytest.mark.parametrize("name", FORWARDS)
def test_what_depends_on_sizes_is_traced_and_stays_dynamic(name):
    net = model(
        lambda s, x: s.norm(s.linear(FORWARDS[name](s, x)).mT).mT,
        linear=nn.Linear(4, 3),
        norm=nn.BatchNorm1d(3),
        token=nn.Parameter(torch.rand(1, 1, 4)),
        table=nn.Parameter(torch.rand(1, 9, 4)),
    )
    compiled = reparam.compile(net, normal(2, 5, 4))
    assert not [remark for remark in compiled.report.remarks if remark.kind == "capture"]
    assert compiled.report.after.norms == 0
    for batch, length in ((2, 5), (1, 3), (4, 9)):
        assert_same(net, compiled, normal(batch, length, 4))


def test_a_constant_that_is_only_moved_folds():
    net = model(
        lambda s, x: s.conv(x) * s.gamma.to(x.device, x.dtype),
        conv=nn.Conv2d(3, 3, 1),
        gamma=nn.Parameter(torch.rand(3, 1, 1)),
    )
    compiled = reparam.compile(net)
    assert compiled.report.after.kernels == 1
    assert_same(net, compiled, normal(2, 3, 4, 4))


def test_a_branch_on_the_kind_of_device_is_taken_as_the_model_lies():
    net = model(lambda s, x: s.conv(x) if x.device.type == "cpu" else x, conv=nn.Conv2d(3, 3, 1))
    compiled = reparam.compile(net)
    assert compiled.report.after.convolutions == 1
    assert_same(net, compiled, normal(2, 3, 4, 4))


def test_a_layer_that_reads_only_constants_is_run_once():
    """The bias of Swin Transformer V2's attention (Liu et al. 2022, arXiv 2111.09883) is a network of a table."""
    net = model(
        lambda s, x: s.linear(x) + s.last(torch.relu(s.first(s.table))),
        linear=nn.Linear(4, 3), first=nn.Linear(2, 8), last=nn.Linear(8, 3), table=nn.Parameter(torch.rand(1, 2)),
    )  # fmt: skip
    compiled = reparam.compile(net, normal(2, 4))
    assert compiled.report.after.kernels == 1
    assert_same(net, compiled, normal(5, 4))


def test_torch_is_left_as_it_was():
    before = (Tensor.expand, Tensor.__getitem__, torch.zeros, F.interpolate)
    reparam.compile(model(lambda s, x: s.linear(x), linear=nn.Linear(4, 3)))
    assert before == (Tensor.expand, Tensor.__getitem__, torch.zeros, F.interpolate)
    assert "expand" not in vars(Tensor)


def test_sizes_that_python_rounds_stay_dynamic():
    """TensorFlow's SAME padding, of which one side depends on the size."""

    def forward(self, x):
        amounts = []
        for size in (x.shape[3], x.shape[2]):
            total = max((math.ceil(size / 2) - 1) * 2 + 3 - size, 0)
            amounts += [total // 2, total - total // 2]
        return self.norm(self.conv(F.pad(x, amounts)))

    net = model(forward, conv=nn.Conv2d(3, 4, 3, stride=2), norm=nn.BatchNorm2d(4))
    compiled = reparam.compile(net)
    assert compiled.report.after.norms == 0
    for size in ((8, 9), (7, 10)):
        assert_same(net, compiled, normal(2, 3, *size))

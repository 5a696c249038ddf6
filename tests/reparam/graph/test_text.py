"""A graph as text: the same for the same network, and all that matters about it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from networks import DataDependent, graph_of, model, networks, normal
from torch import nn

from reparam.algebra import AveragePool, ChannelAffine, Conv, Linear, Pad
from reparam.graph.text import operator_text

OPERATORS = {
    "conv2d[3 -> 8, 3x3, pad 1]": Conv(torch.ones(8, 3, 3, 3), None, (1, 1), ((1, 1), (1, 1))),
    "conv2d[3 -> 8, 3x1, stride 2x1, pad 1x0, bias]": Conv(
        torch.ones(8, 3, 3, 1), torch.ones(8), (2, 1), ((1, 1), (0, 0))
    ),
    "conv1d[4 -> 8, 3, pad 0:2, dilation 2, groups 4]": Conv(
        torch.ones(8, 1, 3), None, (1,), ((0, 2),), (2,), groups=4
    ),
    "conv3d[2 -> 2, 1x2x3]": Conv(torch.ones(2, 2, 1, 2, 3)),
    "conv2d[1 -> 1, 3x3, pad 1, reflect]": Conv(
        torch.ones(1, 1, 3, 3), None, (), ((1, 1), (1, 1)), padding_mode="reflect"
    ),
    "linear[3 -> 5]": Linear(torch.ones(5, 3)),
    "linear[3 -> 5, bias]": Linear(torch.ones(5, 3), torch.ones(5)),
    "affine[8, axis -3]": ChannelAffine(torch.ones(8), torch.ones(8), -3),
    "affine[8, axis -1, scale only]": ChannelAffine(torch.ones(8), None, -1),
    "affine[0.5]": ChannelAffine.uniform(0.5),
    "affine[2 + -1]": ChannelAffine.uniform(2.0, -1.0),
    "identity": ChannelAffine.uniform(1.0),
    "avgpool2d[2x3]": AveragePool((2, 3), (2, 3), (0, 0)),
    "pad[1:2]": Pad(((1, 2),)),
    "pad[1, reflect]": Pad(((1, 1), (1, 1)), "reflect"),
    "pad[1, 0.5]": Pad(((1, 1),), value=0.5),
}


@pytest.mark.parametrize("expected", OPERATORS)
def test_operators(expected):
    assert operator_text(OPERATORS[expected]) == expected


def test_calls_arguments_and_outputs():
    def forward(self, x, y):
        x = F.max_pool2d(torch.relu(self.conv(x)), 3, stride=2)
        z = torch.cat([x, self.opaque(y)], 1)
        return {"z": z.flatten(1), "sum": x - 0.5 * y, "size": x.shape[0], "table": self.table}

    net = model(forward, conv=nn.Conv2d(3, 4, 3), opaque=DataDependent(), table=nn.Parameter(torch.ones(2)))
    assert str(graph_of(net, (normal(2, 3, 9, 9), normal(2, 4, 3, 3)))) == (
        "%0 = input x\n"
        "%1 = input y\n"
        "%2 = conv2d[3 -> 4, 3x3, bias](%0)\n"
        "%3 = relu(%2)\n"
        "%4 = max_pool2d(%3, 3, stride=2, padding=0, dilation=1, ceil_mode=False, return_indices=False)\n"
        "%5 = datadependent(%1)\n"
        "%6 = cat([%4, %5], 1)\n"
        "%7 = flatten(%6, 1)\n"
        "%8 = affine[0.5](%1)\n"
        "%9 = sum(%4, -%8)\n"
        "%10 = size(%0, 0)\n"
        "return {'z': %7, 'sum': %9, 'size': %10, 'table': table}"
    )


def test_coefficients_of_a_sum():
    net = model(lambda s, x: torch.sub(x, torch.add(x.relu(), x.tanh(), alpha=0.3), alpha=2))
    assert str(graph_of(net)) == (
        "%0 = input x\n"
        "%1 = relu(%0)\n"
        "%2 = tanh(%0)\n"
        "%3 = sum(%1, 0.3*%2)\n"
        "%4 = sum(%0, -2*%3)\n"
        "return %4"
    )  # fmt: skip


def test_weights_do_not_show():
    def make(seed):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())

    assert str(graph_of(make(0))) == str(graph_of(make(1)))


def test_names_of_the_model_do_not_show():
    a = model(lambda self, x: self.one(x), one=nn.Conv2d(3, 4, 3))
    b = model(lambda self, x: self.another(x), another=nn.Conv2d(3, 4, 3))
    assert str(graph_of(a)) == str(graph_of(b))


@given(networks(length=5))
def test_text_is_stable(drawn):
    network, inputs = drawn
    graph = graph_of(network, inputs[0])
    text = str(graph)
    assert text == str(graph) == str(graph_of(network, inputs[0]))
    lines = text.splitlines()
    # A line a node, each value numbered once, in order.
    assert len(lines) == sum(node.op != "get_attr" for node in graph.fx.nodes)
    assert [line.split(" = ")[0] for line in lines[:-1]] == [f"%{i}" for i in range(len(lines) - 1)]
    assert lines[-1].startswith("return ")
    assert "object at 0x" not in text


def test_rank_shows_the_axis_of_a_norm():
    net = model(lambda s, x: s.bn(x), bn=nn.BatchNorm1d(3))
    assert "affine[3, axis -1]" in str(graph_of(net, normal(2, 3)))
    assert "affine[3, axis -2]" in str(graph_of(net, normal(2, 3, 4)))

"""``conv(x), conv(x) -> slices of one conv(x)``, where the cost says so."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import CONV, DataDependent, assert_same, graph_of, image, model
from torch import nn

import reparam
from reparam.algebra.cost import Choice, Cost
from reparam.passes import SiblingConvolutions, default
from reparam.rewrite import driver


class Always(Cost):
    """One kernel wherever it saves any."""

    def too_costly(self, choice: Choice, where: str = "") -> str | None:
        return None if choice.saved > 0 else "nothing saved"


def merged(net: nn.Module, *inputs: torch.Tensor, rules=None) -> str:
    """The graph after the rule, every rewrite certified."""
    graph = graph_of(net, inputs or None)
    graph.cost = Always()
    driver.rewrite(graph, [SiblingConvolutions()] if rules is None else rules)
    return str(graph)


def compiled_always(net: nn.Module, *inputs: torch.Tensor) -> nn.Module:
    """The whole compiler, with a cost that always prefers one kernel."""
    from reparam import compiler

    options = compiler._Options(default(), True, None, Always())
    return compiler._build(net, inputs, options, False).reported()


def test_convolutions_of_one_value():
    net = model(
        lambda s, x: (s.a(x), s.b(x).relu()), a=nn.Conv2d(3, 4, 3, 2, 1, bias=False), b=nn.Conv2d(3, 2, 3, 2, 1)
    )
    assert merged(net) == (
        "%0 = input x\n"
        "%1 = conv2d[3 -> 6, 3x3, stride 2, pad 1, bias](%0)\n"
        "%2 = narrow(%1, -3, 4, 2)\n"
        "%3 = narrow(%1, -3, 0, 4)\n"
        "%4 = relu(%2)\n"
        "return (%3, %4)"
    )


def test_queries_keys_and_values():
    def forward(self, x):
        return torch.softmax(self.q(x) @ self.k(x).mT, -1) @ self.v(x)

    net = model(forward, q=nn.Linear(8, 4), k=nn.Linear(8, 4, bias=False), v=nn.Linear(8, 6))
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    assert "linear[8 -> 14, bias]" in merged(net, x)
    compiled = compiled_always(net, x)
    assert compiled.report.after.linears == 1
    assert compiled.report.certificates == 1
    assert_same(net, compiled, x)


def test_a_pointwise_kernel_is_written_over_the_taps_of_a_larger_one():
    net = model(lambda s, x: s.a(x).relu() + s.b(x).sigmoid(), a=nn.Conv2d(3, 4, 3, padding=1), b=nn.Conv2d(3, 4, 1))
    compiled = compiled_always(net, image(3, 2))
    assert compiled.report.after.convolutions == 1
    assert_same(net, compiled, image(3, 2))


def test_norms_are_folded_first():
    net = model(
        lambda s, x: s.n(s.a(x)).relu() * s.m(s.b(x)), a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(3, 4, 1),
        n=nn.BatchNorm2d(4), m=nn.BatchNorm2d(4),
    )  # fmt: skip
    compiled = compiled_always(net, image(3, 2))
    assert (compiled.report.after.convolutions, compiled.report.after.norms) == (1, 0)
    assert_same(net, compiled, image(3, 2))


@given(st.data(), st.integers(1, 3), st.integers(1, 2))
def test_any_siblings(data, dimensions, stride):
    """Siblings of every kind, some of which do not fit: the function stays, and no kernel is added."""
    branches = []
    for _ in range(data.draw(st.integers(2, 4))):
        reach = [data.draw(st.integers(0, 2)) for _ in range(dimensions)]
        dilation = data.draw(st.integers(1, 2))
        branches.append(
            CONV[dimensions](
                2, data.draw(st.sampled_from((2, 4))), [2 * r + 1 for r in reach],
                data.draw(st.sampled_from((stride, 1))), [r * dilation for r in reach], dilation,
                data.draw(st.sampled_from((1, 2))), bias=data.draw(st.booleans()),
                padding_mode=data.draw(st.sampled_from(("zeros", "circular"))),
            )
        )  # fmt: skip
    net = model(lambda s, x: [branch(x).relu() for branch in s.branches], branches=nn.ModuleList(branches))
    x = image(2, dimensions)
    compiled = compiled_always(net, x)
    assert_same(net, compiled, x)
    assert compiled.report.after.kernels <= compiled.report.before.kernels


# Refusals.


def test_counting_alone_leaves_siblings_apart_and_says_nothing():
    net = model(lambda s, x: (s.a(x), s.b(x)), a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(3, 4, 1))
    compiled = reparam.compile(net)
    assert compiled.report.after.convolutions == 2
    assert compiled.report.missed == []


def test_convolutions_of_other_strides_stay():
    net = model(lambda s, x: (s.a(x), s.b(x)), a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(3, 4, 1, 2))
    assert merged(net).count("conv2d") == 2


def test_an_input_that_may_change_between_them_stays():
    def forward(self, x):
        x = x * 1.5
        a = self.a(x)
        self.opaque(x)
        return a, self.b(x)

    net = model(forward, a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(3, 4, 1), opaque=DataDependent(in_place=True))
    compiled = compiled_always(net, image(3, 2))
    assert compiled.report.after.convolutions == 2
    assert_same(net, compiled, image(3, 2))

"""``identity(x) -> x``."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from networks import DataDependent, assert_same, image, model, normal, rewritten, run
from torch import nn

import reparam
from reparam.passes import RemoveNoOp, RemoveViewsUndone


def test_identities_go():
    net = model(lambda s, x: s.identity(s.drop(x) * 1 + 0).relu(), identity=nn.Identity(), drop=nn.Dropout())
    before, after = rewritten(net, [RemoveNoOp()])
    assert before == (
        "%0 = input x\n"
        "%1 = identity(%0)\n"
        "%2 = identity(%1)\n"
        "%3 = identity(%2)\n"
        "%4 = identity(%3)\n"
        "%5 = relu(%4)\n"
        "return %5"
    )  # fmt: skip
    assert after == (
        "%0 = input x\n"
        "%1 = relu(%0)\n"
        "return %1"
    )  # fmt: skip


NO_OPS = {
    "dropout": lambda s, x: F.dropout(x, 0.3, s.training),
    "inplace dropout": lambda s, x: F.dropout2d(x, 0.3, s.training, True),
    "plus nothing": lambda s, x: x + 0,
    "minus nothing": lambda s, x: x - 0.0,
    "times one": lambda s, x: 1 * x,
    "over one": lambda s, x: x / 1,
    "padding by nothing": lambda s, x: F.pad(x, (0, 0)),
    "unary plus": lambda s, x: +x,
    "leaky relu of slope one": lambda s, x: F.leaky_relu(x, 1),
    "leaky relu of slope one as a layer": lambda s, x: s.leaky(x),
    "prelu of ones": lambda s, x: s.prelu(x),
    "prelu of ones as a function": lambda s, x: F.prelu(x, s.prelu.weight),
}


@pytest.mark.parametrize("name", NO_OPS)
def test_what_does_nothing_launches_nothing(name):
    layers = {"leaky": nn.LeakyReLU(1.0), "prelu": nn.PReLU(3)}
    net = model(lambda s, x: NO_OPS[name](s, x.tanh()).sigmoid(), **layers)
    net.prelu.weight.data.fill_(1)
    compiled = reparam.compile(net)
    assert compiled.report.after.kernels == 2
    assert_same(net, compiled, image(3, 2))


@given(slopes=st.lists(st.sampled_from([1.0, 0.25, -1.0]), min_size=3, max_size=3))
def test_slopes_that_do_something_stay(slopes):
    net = model(lambda s, x: F.leaky_relu(s.prelu(x.tanh()), slopes[0]).sigmoid(), prelu=nn.PReLU(3))
    net.prelu.weight.data.copy_(torch.tensor(slopes))
    compiled = reparam.compile(net)
    assert compiled.report.after.kernels == 2 + (set(slopes) != {1.0}) + (slopes[0] != 1.0)
    assert_same(net, compiled, image(3, 2))


def test_subtraction_from_zero_is_not_nothing():
    net = model(lambda s, x: (0 - x).relu())
    compiled = reparam.compile(net)
    assert compiled.report.after.kernels == 2
    assert_same(net, compiled, image(3, 2))


def test_dropout_that_is_always_on_stays():
    net = model(lambda s, x: F.dropout(x, 1.0, True))
    compiled = reparam.compile(net)
    assert compiled.report.fused == []
    assert run(compiled, image(3, 2)).abs().max() == 0


def test_value_that_untraced_python_changes_is_copied_as_before():
    """``x * 1`` is a copy, and removing it would hand ``x`` itself to code that changes it."""

    def forward(self, x):
        x = x.relu()
        changed = self.opaque(x * 1)
        return x + changed

    net = model(forward, opaque=DataDependent(in_place=True))
    compiled = reparam.compile(net)
    assert compiled.report.fused == []
    assert_same(net, compiled, image(3, 2))


def test_views_that_undo_each_other_are_removed():
    def forward(self, x):
        x = x.transpose(1, 2).permute(0, 2, 1)
        return torch.relu(x.flatten(0, 1).unsqueeze(0).reshape_as(x)).transpose(1, 2)

    net = model(forward)
    before, after = rewritten(net, [RemoveViewsUndone()], torch.zeros(2, 3, 4, dtype=torch.float64))
    assert before != after
    assert after == "%0 = input x\n%1 = relu(%0)\n%2 = transpose(%1, 1, 2)\nreturn %2"
    assert_same(net, reparam.compile(net, torch.zeros(2, 3, 4, dtype=torch.float64)), normal(5, 4, 3))


@given(st.lists(st.permutations(range(4)), min_size=1, max_size=4))
def test_only_permutations_that_undo_each_other_are_removed(orders):
    def forward(self, x):
        for order in orders:
            x = x.permute(*order)
        return torch.relu(x)

    net, x = model(forward), normal(2, 3, 4, 5)
    compiled = reparam.compile(net, x)
    assert_same(net, compiled, x)
    whole = torch.zeros(2, 3, 4, 5)
    for order in orders:
        whole = whole.permute(*order)
    if whole.shape == (2, 3, 4, 5):
        assert "permute" not in compiled.code

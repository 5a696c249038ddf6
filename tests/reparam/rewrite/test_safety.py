"""What shares memory: the driver refuses what somebody would notice, whatever a rule thinks of it."""

from __future__ import annotations

import pytest
import torch
from networks import DataDependent, assert_same, graph_of, image, model, normal, reasons
from torch import nn
from torch.fx import Node

import reparam
from reparam.algebra import ChannelAffine
from reparam.graph import facts
from reparam.rewrite import driver, safety
from reparam.rules import Graph, Rewrite, Rule


def conv(size: int = 1) -> nn.Conv2d:
    return nn.Conv2d(3, 3, size, padding=size // 2)


# Outputs.

COPIES = {
    "of the input": (lambda s, x: (s.conv(x), x + 0), "an output would share memory with the input x"),
    "of a view of the input": (lambda s, x: x.transpose(2, 3) * 1, "an output would share memory with the input x"),
    "as a view": (lambda s, x: (x * 1).flatten(1), "an output would share memory with the input x"),
    "of another output": (lambda s, x: (y := s.conv(x), y * 1.0), "an output would share memory with another"),
    "of a view of another output": (
        lambda s, x: ((y := s.conv(x)).flatten(1), y / 1),
        "an output would share memory with another",
    ),
}


@pytest.mark.parametrize("name", COPIES)
def test_a_copy_that_is_returned_stays_one(name):
    forward, reason = COPIES[name]
    net = model(forward, conv=conv())
    compiled = reparam.compile(net, image(3, 2))
    assert reason in reasons(compiled)
    x = image(3, 2)
    before, outputs = x.clone(), compiled(x)
    *others, last = outputs if isinstance(outputs, tuple) else (outputs,)
    kept = [other.clone() for other in others]
    last.add_(1)
    assert torch.equal(x, before)
    assert all(map(torch.equal, others, kept))


def test_what_was_no_copy_before_need_not_be_one():
    net = model(lambda s, x: (s.drop(x), x.transpose(2, 3).transpose(3, 2)), drop=nn.Dropout())
    compiled = reparam.compile(net, image(3, 2))
    assert len(compiled.report.fused) == 2
    assert compiled.report.missed == []


# Values that are changed while a rewrite reads them.


def test_terms_before_and_after_a_change_are_merged_by_themselves():
    """Not all branches may be one operator, since their input may be another one in between; some may."""

    def forward(self, x):
        x = x.relu()
        first = self.a(x) + self.b(x)
        self.opaque(x)
        return first + self.c(x) + self.d(x)

    net = model(forward, a=conv(3), b=conv(), c=conv(3), d=conv(), opaque=DataDependent(in_place=True))
    compiled = reparam.compile(net, image(3, 2))
    assert compiled.report.after.convolutions == 2
    assert reasons(compiled) == ["conv_1 and conv stay apart: their input may be changed in place between them"]
    assert_same(net, compiled, image(3, 2))


CHANGED = {
    "an input of branches": lambda s, x: s.a(y := x.relu()) + (s.opaque(y), s.b(y))[1],
    "a view of it": lambda s, x: s.a(y := x.relu()) + (s.opaque(y.transpose(2, 3)), s.b(y))[1],
    "what it is a view of": lambda s, x: s.a(z := (y := x.relu())[:, :3]) + (s.opaque(y), s.b(z))[1],
    "the other name of a copy": lambda s, x: (z := (y := x.relu()) * 1, s.opaque(y), y + z)[2],
    "a copy": lambda s, x: (z := (y := x.relu()) * 1, s.opaque(z), y + z)[2],
    "a copy, by a view of it": lambda s, x: (z := (y := x.relu()) * 1, s.opaque(z.transpose(2, 3)), y + z)[2],
    "a copy of the input": lambda s, x: s.opaque(x * 1) + 1,
}


@pytest.mark.parametrize("name", CHANGED)
def test_what_python_may_change_is_left(name):
    net = model(CHANGED[name], a=conv(3), b=conv(), opaque=DataDependent(in_place=True))
    x = image(3, 2)
    compiled = reparam.compile(net, x)
    assert compiled.report.fused == []
    assert any("in place" in reason for reason in reasons(compiled))
    assert_same(net, compiled, x)
    before = x.clone()
    compiled(x)
    assert torch.equal(x, before)


def test_one_tensor_that_is_given_twice():
    def forward(self, x, y):
        first = self.a(x)
        self.opaque(y)
        return first + self.b(x)

    net = model(forward, a=conv(3), b=conv(), opaque=DataDependent(in_place=True))
    x = image(3, 2)
    compiled = reparam.compile(net, (x.clone(), x.clone()))
    same, other = x.clone(), x.clone()
    assert torch.allclose(net(same, same), compiled(other, other))


# Rules that know nothing of it.


class ThroughAll(Rule):
    """``2·x -> x``, ``x`` scaled elsewhere: any rule that puts a value into the place of another."""

    def rewrite(self, node: Node, graph: Graph) -> Rewrite | None:
        match graph.op(node):
            case ChannelAffine(is_identity=False):
                return Rewrite.one(node, graph.source(node), "dropped")
        return None


def test_a_value_that_a_rule_may_not_touch():
    graph = graph_of(model(lambda s, x: (x.sigmoid() * 2).relu()), image(3, 2))
    (scale,) = [node for node in graph.fx.nodes if isinstance(graph.op(node), ChannelAffine)]
    facts.know(scale, frozen="somebody said so")
    outcome = driver.rewrite(graph, [ThroughAll()], verify=False)
    assert [remark.message for remark in outcome.remarks] == ["somebody said so"]


def test_a_layout_that_a_view_behind_relies_on():
    def forward(self, x):
        x = self.conv(x)[:, :2] * 1  # new memory, in order
        pixels = x.view(-1)
        self.opaque(pixels)
        return x.sum() + pixels

    net = model(forward, conv=conv(), opaque=DataDependent(in_place=True))
    compiled = reparam.compile(net, image(3, 2))
    assert reasons(compiled) == ["the memory that view shares may be written to"]
    assert_same(net, compiled, image(3, 2))


def test_views_behind_what_is_no_longer_in_order_are_reshapes():
    net = model(lambda s, x: (s.conv(x)[:, :2] * 1).view(-1).relu(), conv=conv())
    x = normal(2, 3, 4, 5)
    compiled = reparam.compile(net, x)
    assert compiled.report.fused
    assert_same(net, compiled, x)


def test_an_operator_past_what_changes_the_value_between():
    """A rule that takes in a value which Python changes before it is read."""

    class Past(Rule):
        def rewrite(self, node, graph):
            outer = graph.op(node)
            inner = graph.op(graph.source(node)) if isinstance(outer, ChannelAffine) else None
            if not isinstance(inner, ChannelAffine):
                return None
            both = reparam.algebra.compose(outer, inner)
            source = graph.source(graph.source(node))
            return Rewrite.one(node, reparam.rules.Apply.one(node, both, source), "taken in")

    def forward(self, x):
        x = x.sigmoid() * 2
        changed = self.opaque(x)
        return x * 3 + changed

    net = model(forward, opaque=DataDependent(in_place=True))
    compiled = reparam.compile(net, image(3, 2), passes=[Past()])
    assert "mul may be changed in place before it is read" in reasons(compiled)
    assert_same(net, compiled, image(3, 2))


def test_what_is_in_nobodys_way_is_not_asked():
    graph = graph_of(model(lambda s, x: s.b(s.a(x)), a=conv(), b=conv()), image(3, 2))
    (first, second) = [node for node in graph.fx.nodes if node.op == "call_module"]
    assert safety.obstacle(graph, Rewrite.one(second, first, "")) is None

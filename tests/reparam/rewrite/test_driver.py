"""The driver: it terminates, certifies, explains itself, and takes rules from users."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from networks import assert_same, graph_of, image, model, normal, reasons, rewritten
from torch import nn
from torch.fx import Node

import reparam
from reparam.algebra import ChannelAffine, Conv
from reparam.errors import ReparamError, RewriteError, VerificationError
from reparam.report import Remark
from reparam.rewrite.driver import Outcome, rewrite
from reparam.rules import Apply, Graph, Missed, Rewrite, Rule


class Replace(Rule):
    """Replaces every convolution by what a function of it returns."""

    def __init__(self, change) -> None:
        self.change = change

    def rewrite(self, node: Node, graph: Graph) -> Rewrite | Missed | None:
        conv = graph.op(node)
        if not isinstance(conv, Conv):
            return None
        return Rewrite(((node, Apply(self.change(conv), graph.source(node), ((1.0, node),))),), "replaced")


class FoldWrongly(Rule):
    """Absorbs a norm into the convolution before it, and forgets the shift, or whatever ``spoil`` does."""

    def __init__(self, spoil) -> None:
        self.spoil = spoil

    def rewrite(self, node: Node, graph: Graph) -> Rewrite | Missed | None:
        norm = graph.op(node)
        if not isinstance(norm, ChannelAffine):
            return None
        conv = graph.op(graph.source(node))
        if not isinstance(conv, Conv):
            return None
        value = Apply(self.spoil(conv, norm), graph.source(graph.source(node)), ((1.0, node),))
        return Rewrite(((node, value),), "folded wrongly")


class FoldTogether(Rule):
    """Absorbs a norm into the convolution before it by replacing both nodes at once."""

    def rewrite(self, node: Node, graph: Graph) -> Rewrite | Missed | None:
        norm = graph.op(node)
        source = graph.source(node) if isinstance(norm, ChannelAffine) else None
        conv = graph.op(source) if source is not None else None
        if not isinstance(conv, Conv):
            return None
        fused = Apply(conv.then(norm), graph.source(source), ((1.0, source),), also=(node,))
        return Rewrite(((source, fused), (node, source)), "folded together", outputs=(node,))


def conv_norm() -> nn.Module:
    block = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
    return model(lambda s, x: s.stage(x), stage=nn.ModuleDict({"block": block})["block"])


# Termination.


def test_rule_that_changes_nothing_is_stopped():
    with pytest.raises(RewriteError, match=r"Replace replaced 1 nodes \(1 kernels\) by 1 \(1 kernels\).*cheaper"):
        reparam.compile(conv_norm(), passes=[Replace(lambda conv: conv)])


def test_rule_that_makes_a_graph_dearer_is_stopped():
    class Split(Rule):
        """``conv(x) -> 0.5 conv(x) + 0.5 conv(x)``."""

        def rewrite(self, node, graph):
            conv = graph.op(node)
            if not isinstance(conv, Conv):
                return None
            half = Apply(conv.scaled(0.5), graph.source(node), ((0.5, node),))
            return Rewrite(((node, reparam.rules.Add(((1.0, half), (1.0, half)))),), "split in two")

    with pytest.raises(RewriteError, match="must make the graph cheaper"):
        reparam.compile(conv_norm(), passes=[Split()], verify=False)


def test_rules_are_applied_until_none_matches():
    net = model(lambda s, x: s.bn(2 * (s.a(x) + s.b(x) + 1) - 1) * 0.5, a=nn.Conv2d(3, 3, 3, padding=1),
                b=nn.Conv2d(3, 3, 1), bn=nn.BatchNorm2d(3))  # fmt: skip
    _, after = rewritten(net)
    assert after == "%0 = input x\n%1 = conv2d[3 -> 3, 3x3, pad 1, bias](%0)\nreturn %1"
    graph = graph_of(net)
    rules = reparam.passes.default()
    rewrite(graph, rules)
    assert rewrite(graph, rules).remarks == []


def test_what_a_merged_layer_shows_is_used_further_on():
    def forward(self, x):
        x = x.abs()
        return self.after(self.norm(torch.relu(self.conv(x) + x)))

    layers = {"conv": nn.Conv1d(3, 3, 3, padding=1), "norm": nn.BatchNorm1d(3), "after": nn.Conv1d(3, 4, 1)}
    module = model(forward, **layers)
    # A BatchNorm1d reads two axes or three; only the convolution that the sum becomes says that it is three here.
    compiled = reparam.compile(module)
    assert (compiled.report.after.norms, compiled.report.after.convolutions) == (0, 2)
    assert_same(module, compiled, torch.randn(2, 3, 9, dtype=torch.float64))


def test_order_of_the_rules_does_not_matter_for_the_result():
    net = model(lambda s, x: torch.relu(s.n3(s.c3(x)) + s.n1(s.c1(x)) + s.n(x)), c3=nn.Conv2d(4, 4, 3, padding=1),
                c1=nn.Conv2d(4, 4, 1), n3=nn.BatchNorm2d(4), n1=nn.BatchNorm2d(4), n=nn.BatchNorm2d(4))  # fmt: skip
    rules = list(reparam.passes.default())
    forwards, backwards = rewritten(net, rules)[1], rewritten(net, rules[::-1])[1]
    assert forwards == backwards


@pytest.mark.parametrize("depth", [1, 7, 30])
def test_visits_grow_in_step_with_the_network(depth):
    """Neighbours are visited again after a rewrite, the whole graph is not."""
    visits = 0

    class Count(Rule):
        def rewrite(self, node, graph):
            nonlocal visits
            visits += 1
            return None

    layers = [layer for _ in range(depth) for layer in (nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())]
    graph = graph_of(model(lambda s, x: s.layers(x), layers=nn.Sequential(*layers)))
    nodes = len(graph.fx.nodes)
    rewrite(graph, [Count(), *reparam.passes.default()])
    assert visits <= 4 * nodes


# Certificates.


WRONG = {
    "forgets the shift": lambda conv, norm: conv.then(replace(norm, shift=None)),
    "scale is off by a millionth": lambda conv, norm: conv.then(norm.scaled(1 + 1e-6)),
    "wrong only at the border": lambda conv, norm: replace(conv.then(norm), padding_mode="replicate"),
    "shifted by a tap": lambda conv, norm: replace(conv.then(norm), padding=((0, 2), (1, 1))),
    "flipped": lambda conv, norm: replace(conv.then(norm), weight=conv.then(norm).weight.flip(-1)),
}


@pytest.mark.parametrize("name", WRONG)
def test_certificate_catches_a_wrong_rule(name):
    with pytest.raises(VerificationError, match=r"FoldWrongly at stage\.1 would change the result") as caught:
        reparam.compile(conv_norm(), passes=[FoldWrongly(WRONG[name])])
    assert caught.value.comparison.largest_error > caught.value.comparison.tolerance


def test_certificate_catches_a_change_of_shape():
    with pytest.raises(VerificationError, match=r"FoldWrongly at stage\.1 would change a shape from") as caught:
        reparam.compile(
            conv_norm(), passes=[FoldWrongly(lambda conv, norm: replace(conv.then(norm), padding=((0, 0), (0, 0))))]
        )
    assert caught.value.comparison is None


def test_certificate_catches_a_wrong_sum():
    class DropTerm(Rule):
        """``a + b -> a``."""

        def rewrite(self, node, graph):
            total = graph.op(node)
            return Rewrite(((node, total.terms[0][1]),), "dropped") if isinstance(total, reparam.lifting.Sum) else None

    net = model(lambda s, x: x.relu() + x.sigmoid())
    with pytest.raises(VerificationError, match="the replacement leaves out what depends on the input x"):
        reparam.compile(net, passes=[DropTerm()])


def test_certificates_are_counted():
    net = conv_norm()
    report = reparam.compile(net).report
    assert report.certificates == len(report.fused) == 1
    assert 0 <= report.largest_certificate_error < 1e-12
    assert reparam.compile(net, verify=False).report.certificates == 0


# Remarks.


def test_a_remark_for_every_rewrite_and_refusal():
    def forward(self, x):
        x = self.norm(self.conv(x))
        return self.last(torch.relu(x)), x

    net = model(forward, conv=nn.Conv2d(3, 3, 1), norm=nn.BatchNorm2d(3), last=nn.BatchNorm2d(3))
    report = reparam.compile(net, normal(2, 3, 4, 4)).report
    assert [str(remark) for remark in report.remarks] == [
        "fused   norm: folded norm into conv [NormAfterLinear]",
        "missed  last: nothing linear stands next to it: it reads relu, read by the output [Lift]",
    ]


def test_refusals_that_a_later_rewrite_overcomes_are_not_reported():
    """The first convolution has two readers until one of them turns out to do nothing with it."""

    class Cut(Rule):
        """``x - x -> x·0``: takes one reader away."""

        def rewrite(self, node, graph):
            if node.target is not torch.add:
                return None
            source = node.args[0]
            return Rewrite(((node, Apply(ChannelAffine.uniform(3.0), source, ((1.0, node),))),), "cut")

    net = model(lambda s, x: s.bn(torch.add(s.conv(x), s.conv(x))), conv=nn.Conv2d(3, 3, 1), bn=nn.BatchNorm2d(3))
    compiled = reparam.compile(net)
    assert reasons(compiled) == []


# User rules.


class ScaleIsNothing(Rule):
    """``1.5 x -> x``, for a user who knows better. Wrong, unless nobody verifies."""

    def rewrite(self, node: Node, graph: Graph) -> Rewrite | Missed | None:
        match graph.op(node):
            case ChannelAffine(axis=None) as scale if scale.scale.item() == 1.5:
                return Rewrite(((node, graph.source(node)),), "dropped a scale")
            case ChannelAffine():
                return Missed("not the scale that I know")
        return None


def test_rules_of_a_user():
    net = model(lambda s, x: (1.5 * x).relu() * 2)
    compiled = reparam.compile(net, passes=[ScaleIsNothing()], verify=False)
    x = image(3, 2)
    torch.testing.assert_close(compiled(x), x.relu() * 2)
    assert compiled.report.fused == [Remark("fused", "ScaleIsNothing", "", "dropped a scale")]
    assert compiled.report.missed == [Remark("missed", "ScaleIsNothing", "", "not the scale that I know")]


def test_rules_of_a_user_are_certified():
    with pytest.raises(VerificationError, match="ScaleIsNothing"):
        reparam.compile(model(lambda s, x: (1.5 * x).relu()), passes=[ScaleIsNothing()])


def test_no_rules_change_nothing():
    net = conv_norm()
    compiled = reparam.compile(net, passes=[])
    assert compiled.report.fused == []
    assert compiled.report.after.kernels == compiled.report.before.kernels
    assert_same(net, compiled, image(3, 2))


@pytest.mark.parametrize("verify", [True, False])
def test_all_values_are_put_in_place_at_once(verify):
    """What takes the norm's place is the convolution, which is itself replaced."""
    net = conv_norm()
    compiled = reparam.compile(net, passes=[FoldTogether()], verify=verify)
    assert compiled.report.after.norms == 0
    assert_same(net, compiled, image(3, 2))


def test_rules_beside_the_default_ones():
    net = conv_norm()
    compiled = reparam.compile(net, passes=[ScaleIsNothing(), *reparam.passes.default()])
    assert compiled.report.after.norms == 0
    assert_same(net, compiled, image(3, 2))


def test_class_in_place_of_an_instance():
    with pytest.raises(ReparamError, match=r"passes must be instances of reparam\.rules\.Rule"):
        reparam.compile(conv_norm(), passes=[ScaleIsNothing])


def test_rule_that_raises_is_not_silenced():
    class Broken(Rule):
        pass

    with pytest.raises(NotImplementedError):
        reparam.compile(conv_norm(), passes=[Broken()])


# Progress.


def test_progress_is_monotonous_and_bounded():
    seen: list[tuple[int, int, str]] = []
    graph = graph_of(conv_norm())
    outcome = rewrite(graph, reparam.passes.default(), progress=lambda *step: seen.append(step))
    assert isinstance(outcome, Outcome)
    done, totals, labels = zip(*seen, strict=True)
    assert list(done) == sorted(done)
    assert len(set(totals)) == 1
    assert max(done) <= totals[0]
    assert "stage.1" in labels

"""``optimize="latency"``: what is timed, what is decided by it, and how decisions are kept. No test asserts a time."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import assert_same, image, model, run
from torch import Tensor, nn

import reparam
from reparam import Decisions, ReparamError
from reparam.timing import Duel, duel
from reparam.tuning import latency, variants
from reparam.tuning.decisions import Decision
from reparam.tuning.prepared import PreparedConv2d
from reparam.tuning.variants import Variant
from support import randomise

# Timing with a clock that only the contestants move.


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def runs(self, *seconds: float) -> Callable[[], None]:
        """Something that takes these times, over and over."""
        state = {"calls": 0}

        def run() -> None:
            self.now += seconds[state["calls"] % len(seconds)]
            state["calls"] += 1

        return run


@pytest.mark.parametrize(("first", "second", "winner"), [(1.0, 2.0, 0), (2.0, 1.0, 1)])
def test_a_clear_winner_needs_ten_pairs(first, second, winner):
    clock = Clock()
    found = duel(clock.runs(first), clock.runs(second), patience=1e9, clock=clock)
    assert (found.winner, found.pairs, found.first, found.second) == (winner, 10, first, second)


def test_a_slight_advantage_in_much_noise_needs_more_pairs():
    """The second wins four of five pairs, and loses the fifth by a thousand seconds."""
    clock = Clock()
    found = duel(clock.runs(1.0), clock.runs(0.9, 0.9, 0.9, 0.9, 1000.0), patience=1e9, clock=clock)
    assert found.winner == 1
    assert found.pairs in (20, 40)


def test_noise_does_not_decide():
    clock = Clock()
    found = duel(clock.runs(1.0, 3.0), clock.runs(2.0), patience=1e9, clock=clock)
    assert (found.winner, found.pairs) == (None, 80)


def test_equals_are_a_tie():
    clock = Clock()
    assert duel(clock.runs(1.0), clock.runs(1.0), patience=1e9, clock=clock).winner is None


def test_patience_ends():
    clock = Clock()
    found = duel(clock.runs(1.0, 3.0), clock.runs(2.0), patience=5.0, clock=clock)
    assert (found.winner, found.pairs) == (None, 10)


# The compiler, with a duel that is told who wins.


@pytest.fixture
def wins(monkeypatch):
    """Say which option wins, by its name; every option is run once, so that both sides of every choice work."""
    asked: list[str] = []

    def said(*names: str) -> list[str]:
        def decide(self: latency.Judge, key: str, options: Any, label: str) -> Decision:
            if key not in self.decisions:
                asked.append(key)
                seconds = {}
                for name, make in options.items():
                    make()()
                    seconds[name] = 0.001 if name in names else 0.002
                pick = next((name for name in options if name in names), next(iter(options)))
                self.decisions.add(key, Decision(pick, seconds))
            return judge(self, key, options, label)

        judge = latency.Judge.decide
        monkeypatch.setattr(latency.Judge, "decide", decide)
        return asked

    return said


def timed(compiled: nn.Module) -> list[str]:
    return [remark.message for remark in compiled.report.remarks if remark.kind == "timed"]


def growing() -> nn.Module:
    """Two branches that one kernel would compute 1.8 times, and two convolutions in a row that one would halve."""
    return model(
        lambda s, x: s.second(s.first(F.relu(s.a(x) + s.b(x)))).relu(),
        a=nn.Conv2d(4, 8, 3, padding=1), b=nn.Conv2d(4, 8, (1, 5), padding=(0, 2)),
        first=nn.Conv2d(8, 8, 1), second=nn.Conv2d(8, 6, 1),
    )  # fmt: skip


def test_what_counting_would_do_stays_when_nothing_is_faster(wins):
    wins()
    net, x = growing(), image(4, 2)
    small, fast = reparam.compile(net, x), reparam.compile(net, x, optimize="latency")
    assert fast.code == small.code
    assert "kept" not in "".join(timed(fast))


def test_kernels_stay_apart_where_that_is_faster(wins):
    asked = wins("2 kernels", "latency")
    net, x = growing(), image(4, 2)
    assert reparam.compile(net, x).report.after.convolutions == 2
    fast = reparam.compile(net, x, optimize="latency")
    assert fast.report.after.convolutions == 3
    assert_same(net, fast, x)
    assert "kept 2 kernels: 1.00 ms against 2.00 ms" in timed(fast)
    assert any("conv2d[8 -> 6, 1x1, bias] after conv2d[8 -> 8, 1x1, bias]" in key for key in asked)
    assert all("2x4x" in key or "2x8x" in key for key in asked)


def test_kernels_merge_where_counting_would_not_and_that_is_faster(wins):
    """A depthwise kernel before a pointwise one, as one dense kernel."""
    net = model(lambda s, x: s.b(s.a(x)), a=nn.Conv2d(3, 3, 3, padding=1, groups=3, bias=False), b=nn.Conv2d(3, 6, 1))
    x = image(3, 2)
    assert reparam.compile(net, x, passes=[]).report.after.convolutions == 2
    wins("1 kernel", "latency")
    fast = reparam.compile(net, x, optimize="latency")
    assert fast.report.after.convolutions == 1
    assert_same(net, fast, x)


def test_siblings_merge_where_that_is_faster(wins):
    net = model(lambda s, x: s.a(x).relu() * s.b(x), a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(3, 4, 1))
    x = image(3, 2)
    wins("1 kernel", "latency")
    fast = reparam.compile(net, x, optimize="latency")
    assert fast.report.after.convolutions == 1
    assert "merged into 1 kernel: 1.00 ms against 2.00 ms" in timed(fast)
    assert_same(net, fast, x)


def test_the_graph_for_size_is_returned_when_it_is_faster_as_a_whole(wins):
    wins("1 kernel", "size")
    net = model(lambda s, x: s.a(x).relu() * s.b(x), a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(3, 4, 1))
    fast = reparam.compile(net, image(3, 2), optimize="latency")
    assert fast.code == reparam.compile(net, image(3, 2)).code
    assert timed(fast)[-1] == "the graph for size, as a whole: 1.00 ms against 2.00 ms"


def test_equal_blocks_are_timed_once(wins):
    asked = wins("2 kernels")
    convs = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(6))
    net = model(lambda s, x: s.c[5](s.c[4](F.relu(s.c[3](s.c[2](F.relu(s.c[1](s.c[0](x)))))))), c=convs)
    fast = reparam.compile(net, image(4, 2), optimize="latency")
    assert len([message for message in timed(fast) if message.startswith("kept")]) >= 1
    assert len([key for key in asked if " after " in key]) == 1


def test_parts_of_python_that_stays_are_decided_on_too(wins):
    """No layout is chosen for them: only a whole graph says who reads what."""

    class Stays(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.ReLU())

        def forward(self, x):
            y = self.body(x)
            return y if float(y.sum()) > 1e9 else y * 2

    wins("2 kernels", "latency")
    net, x = randomise(Stays().double()).eval(), image(3, 2)
    fast = reparam.compile(net, x, optimize="latency")
    assert_same(net, fast, x)


# Layout, and prepared layers.


def viewing() -> nn.Module:
    """A network with everything that a layout could break: views, means, a residual, a linear head, two outputs."""

    def forward(self, x):
        y = F.gelu(self.a(x))
        y = y + F.hardswish(self.b(y))
        tokens = y.view(y.shape[0], 8, -1).transpose(1, 2)
        return self.head(tokens).softmax(-1), y

    return randomise(
        model(forward, a=nn.Conv2d(3, 8, 3, 2, 1), b=nn.Conv2d(8, 8, 3, padding=1, groups=8), head=nn.Linear(8, 4))
    )


@pytest.mark.parametrize("variant", [Variant(a, b) for a in (False, True) for b in (False, True)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_variant_computes_the_same(wins, variant, dtype):
    wins(str(variant), "latency")
    net, x = viewing().to(dtype), torch.randn(2, 3, 16, 16, dtype=dtype)
    exact = copy.deepcopy(net).double()
    fast = reparam.compile(net, x, optimize="latency")
    layout = next(fast.parameters()).is_contiguous(memory_format=torch.channels_last)
    assert layout == variant.channels_last or (variant.prepared and dtype == torch.float64)
    prepared = [layer for layer in fast.modules() if isinstance(layer, PreparedConv2d)]
    assert len(prepared) == 2 * (variant.prepared and dtype == torch.float32)
    reparam.verify(net, fast, x)
    # In float64 a prepared convolution is a plain one, and the whole agrees to rounding.
    double = fast.double()
    for mine, theirs in zip(run(exact, x.double()), run(double, x.double()), strict=True):
        assert (mine - theirs).abs().max() <= (1e-9 if dtype == torch.float64 else 1e-5)
    other = torch.randn(3, 3, 20, 12, dtype=torch.float64)  # another batch, another size
    reparam.verify(exact, double, other, tolerance=1e-5)


def test_an_input_that_is_written_to_or_returned_keeps_its_memory():
    returned = reparam.compile(model(lambda s, x: (x, s.a(x)), a=nn.Conv2d(3, 4, 1)), image(3, 2))
    assert not any(variant.channels_last for variant in variants.possible(returned))


def test_a_variant_that_fails_is_left_out_with_a_remark(wins, monkeypatch):
    def fail(self: Any, x: Tensor) -> Tensor:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(PreparedConv2d, "forward", fail)
    wins()
    net, x = viewing().float(), torch.randn(2, 3, 16, 16)
    fast = reparam.compile(net, x, optimize="latency")
    left = [remark.message for remark in fast.report.missed if remark.rule == "Latency"]
    assert left == [
        "contiguous, prepared layers: no such kernel", "channels_last, prepared layers: no such kernel"
    ]  # fmt: skip


# Decisions.


@pytest.fixture(scope="module")
def decided() -> tuple[nn.Module, Tensor, dict[str, Any], nn.Module]:
    """A network, its input, decisions that were really timed, and the result."""
    net, x = viewing().float(), torch.randn(1, 3, 12, 12)
    kept = Decisions()
    return net, x, kept, reparam.compile(net, x, optimize="latency", decisions=kept)


def never(*_: Any, **__: Any) -> Duel:
    raise AssertionError("timed")


def test_decisions_are_replayed_without_timing(decided, tmp_path: Path, monkeypatch):
    net, x, kept, fast = decided
    monkeypatch.setattr(latency, "duel", never)
    path = tmp_path / "decisions.json"
    kept.write(path)
    for given in (kept, path, str(path), kept.to_dict()):
        again = reparam.compile(net, x, optimize="latency", decisions=given)
        assert again.code == fast.code
        assert latency.fingerprint(again) == latency.fingerprint(fast)
    assert json.loads(path.read_text()) == kept.to_dict()


def test_a_file_is_written_and_completed(tmp_path: Path, monkeypatch):
    net, x = viewing().float(), torch.randn(1, 3, 12, 12)
    path = tmp_path / "decisions.json"
    asked: list[int] = []

    def tie(first: Any, second: Any) -> Duel:
        asked.append(1)
        return Duel(1.0, 1.0, 10, None)

    monkeypatch.setattr(latency, "duel", tie)
    reparam.compile(net, x, optimize="latency", decisions=path)
    complete = json.loads(path.read_text())
    assert len(complete["choices"]) == len(asked) > 1
    partial = {**complete, "choices": dict(list(complete["choices"].items())[:1])}
    path.write_text(json.dumps(partial))
    asked.clear()
    reparam.compile(net, x, optimize="latency", decisions=path)
    assert len(asked) == len(complete["choices"]) - 1
    assert json.loads(path.read_text()) == complete


def test_a_decision_by_hand_is_obeyed(monkeypatch):
    monkeypatch.setattr(latency, "duel", lambda first, second: Duel(2.0, 1.0, 10, 1))
    net, x, kept = viewing().float(), torch.randn(1, 3, 12, 12), Decisions()
    fast = reparam.compile(net, x, optimize="latency", decisions=kept)
    assert any(isinstance(layer, PreparedConv2d) for layer in fast.modules())
    monkeypatch.setattr(latency, "duel", never)
    by_hand = {key: {"pick": "size" if "size" in value.seconds else value.pick} for key, value in kept.items()}
    result = reparam.compile(net, x, optimize="latency", decisions={**kept.to_dict(), "choices": by_hand})
    assert not any(isinstance(layer, PreparedConv2d) for layer in result.modules())


DAMAGED = {
    "nothing": ("", "no JSON"),
    "a list": ("[]", 'the entry "format" is not'),
    "another format": ('{"format": "recipe"}', 'the entry "format" is not'),
    "another version": ('{"format": "reparam decisions", "version": 9}', "version 9"),
    "no choices": ('{"format": "reparam decisions", "version": 1}', '"choices" is not an object'),
    "no pick": ('{"format": "reparam decisions", "version": 1, "choices": {"a": {}}}', '"a" has no "pick"'),
    "no time": (
        '{"format": "reparam decisions", "version": 1, "choices": {"a": {"pick": "x", "seconds": {"x": "y"}}}}',
        'the "seconds" of "a" are no times',
    ),
}


@pytest.mark.parametrize(("text", "why"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_refused(tmp_path: Path, text: str, why: str):
    path = tmp_path / "decisions.json"
    path.write_text(text)
    with pytest.raises(ReparamError, match=why) as caught:
        reparam.compile(viewing(), image(3, 2), optimize="latency", decisions=path)
    assert str(path) in str(caught.value)
    assert path.read_text() == text


def test_an_unknown_pick_is_refused(decided):
    net, x, kept, _ = decided
    data = kept.to_dict()
    key = next(iter(data["choices"]))
    data["choices"][key]["pick"] = "sideways"
    with pytest.raises(ReparamError, match="'sideways', which is none of"):
        reparam.compile(net, x, optimize="latency", decisions=data)


def test_what_is_missing_is_said():
    net = viewing()
    with pytest.raises(ReparamError, match="example_inputs; pass some"):
        reparam.compile(net, optimize="latency")
    with pytest.raises(ReparamError, match="they need optimize='latency'"):
        reparam.compile(net, decisions={})
    with pytest.raises(ReparamError, match="use 'size' or 'latency'"):
        reparam.compile(net, optimize="speed")
    with pytest.raises(ReparamError, match="not int"):
        reparam.compile(net, image(3, 2), optimize="latency", decisions=3)

"""``reparam fuse --optimize latency``: times, replays, and says what is missing. No test asserts a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import reparam
from commands import run
from reparam.timing import Duel
from reparam.tuning import latency


@pytest.fixture
def duels(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every duel, which the second contestant wins without a look at a clock."""
    fought: list[int] = []

    def second_wins(first: Any, second: Any) -> Duel:
        first()
        second()
        fought.append(1)
        return Duel(2e-3, 1e-3, 10, 1)

    monkeypatch.setattr(latency, "duel", second_wins)
    return fought


def test_what_was_timed_is_printed_kept_and_replayed(checkpoint: Path, digits: nn.Module, duels: list[int]) -> None:
    output, kept = checkpoint.with_name("fast.pth"), checkpoint.with_name("decisions.json")
    arguments = ("fuse", checkpoint, "-o", output, "--optimize", "latency", "--decisions", kept)
    lines = run(*arguments).stdout.splitlines()
    assert "timed: the model: the graph for latency, as a whole: 1.00 ms against 2.00 ms" in lines
    assert len(json.loads(kept.read_text())["choices"]) == len(duels) > 1
    written, deploy = kept.read_bytes(), reparam.load(output)
    reparam.verify(digits, deploy, torch.randn(3, 1, 8, 8))
    duels.clear()
    again = json.loads(run(*arguments, "--json").stdout)
    assert duels == []
    assert [remark for remark in again["report"]["remarks"] if remark["kind"] == "timed"]
    assert kept.read_bytes() == written
    assert latency.fingerprint(reparam.load(output)) == latency.fingerprint(deploy)


def test_a_model_of_unknown_shape_needs_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "latency_factory.py").write_text("from torch import nn\ndef make(): return nn.Conv2d(3, 4, 1)\n")
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "conv.pth"
    torch.save(nn.Conv2d(3, 4, 1).state_dict(), path)
    result = run("fuse", path, "--model", "latency_factory:make", "--optimize", "latency", code=2)
    assert "give the shape of one input to time with, such as --input-size 3x224x224" in result.stderr
    assert not path.with_name("conv_deploy.pth").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--optimize", "speed"), "--optimize speed is not known; use size or latency"),
        (("--decisions", "x.json"), "--decisions is about what is timed; it needs --optimize latency"),
        (("--optimize", "latency", "--decisions", "/nowhere/x.json"), "there is no folder /nowhere"),
    ],
)
def test_bad_usage(checkpoint: Path, arguments: tuple[str, ...], message: str) -> None:
    result = run("fuse", checkpoint, *arguments, code=2)
    assert message in result.stderr
    assert not checkpoint.with_name("digits_deploy.pth").exists()


def test_damaged_decisions_are_refused_and_kept(checkpoint: Path) -> None:
    kept = checkpoint.with_name("decisions.json")
    kept.write_text("{}")
    result = run("fuse", checkpoint, "--optimize", "latency", "--decisions", kept, code=2)
    assert f"{kept}: holds no decisions" in result.stderr
    assert kept.read_text() == "{}"

"""The benchmarks run, and measure what they say."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"

pytest.importorskip("timm", reason="the benchmarks compare with timm")


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_timing_is_interleaved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from common import measure

    calls = []
    now = iter(range(1000))
    runs = {name: lambda name=name: calls.append(name) for name in ("a", "b", "c")}
    times = measure(runs, rounds=3, warmups=1, clock=lambda: float(next(now)))
    assert "".join(calls) == "abc" + "abc" + "cba" + "abc"
    assert {name: (time.low, time.median, time.high) for name, time in times.items()} == dict.fromkeys(runs, (1, 1, 1))


def test_coverage_counts_and_shows_failures(tmp_path: Path) -> None:
    """torch.fx cannot trace EfficientViT: the benchmark says so, and goes on."""
    results = tmp_path / "results.json"
    ran = run("coverage.py", "--models", "resnet18", "efficientvit_b0", "--markdown", "--json", str(results))
    assert ran.returncode == 0, ran.stderr
    outcomes = json.loads(results.read_text())["results"]
    trained, compiled = (outcomes["resnet18"][way] for way in ("training graph", "reparam.compile"))
    assert (trained["products"], trained["norms"]) == (21, 20)
    assert (compiled["products"], compiled["norms"]) == (21, 0)
    assert compiled["error"] < 1e-5
    assert outcomes["efficientvit_b0"]["torch.fx fuse"]["failure"].startswith("TraceError")
    assert "| efficientvit_b0 | " in ran.stdout
    assert "fails: TraceError" in ran.stdout


@pytest.mark.slow
def test_latency_runs(tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    ran = run("latency.py", "--models", "repghostnet_050", "--rounds", "2", "--json", str(results))
    assert ran.returncode == 0, ran.stderr
    times = json.loads(results.read_text())["results"]["repghostnet_050"]
    runners = {
        f"{graph} {runtime}" for graph in ("training", "timm", "reparam") for runtime in ("eager", "onnxruntime")
    }
    assert times.keys() == runners
    assert all(0 < time["low"] <= time["median"] <= time["high"] for time in times.values())


def test_compile_time_misses_a_bar_loudly(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import compile_time

    from common import Timing

    second = Timing(1.0, 1.0, 1.0)
    met, missed = (compile_time.Result("net", second, "timm", second, ratio, bar=1.5) for ratio in (1.5, 1.6))
    monkeypatch.setattr(compile_time, "growth", lambda bar, rounds: met)
    monkeypatch.setattr(compile_time, "per_node", lambda block, bar, rounds: met)
    monkeypatch.setattr(compile_time, "against_timm", lambda name, bar, rounds: met)
    monkeypatch.setattr(sys, "argv", ["compile_time.py", "--check"])
    compile_time.main()
    monkeypatch.setattr(compile_time, "against_timm", lambda name, bar, rounds: missed)
    with pytest.raises(SystemExit) as stop:
        compile_time.main()
    assert stop.value.code == 1
    assert "no" in capsys.readouterr().out


def test_zoo_compiles_what_it_is_asked_for(tmp_path: Path) -> None:
    """One is an architecture file, for which its smallest model stands; the other is a model."""
    results, page = tmp_path / "results.json", tmp_path / "zoo.md"
    ran = run(
        "zoo.py", "--models", "byobnet", "test_resnet", "--check", "--json", str(results), "--markdown", str(page)
    )
    assert ran.returncode == 0, ran.stderr + ran.stdout
    rows = json.loads(results.read_text())["results"]
    assert [(row["file"], row["model"]) for row in rows] == [("byobnet", "test_byobnet"), ("test_resnet",) * 2]
    for row in rows:
        assert (row["capture"], row["failure"], row["left"]) == ("traced", "", [])
        assert row["peers"]["training graph"]["norms"] == {"batch": row["counts"]["norms"][0]}
        assert row["ours"]["norms"] == {}
        assert row["ours"]["kernels"] < row["peers"]["training graph"]["kernels"]
        assert 0 < row["ours"]["error"] < 1e-4
    assert "| models compiled | 2 of 2 |" in page.read_text()
    assert "| byobnet | test_byobnet | 96x96 | traced | 14 batch / 72 |" in page.read_text()


def test_zoo_knows_no_such_model() -> None:
    ran = run("zoo.py", "--models", "no_such_model")
    assert ran.returncode != 0
    assert "no architecture file and no model of timm is called no_such_model" in ran.stderr


def test_zoo_goes_on_after_a_crash_and_a_model_that_takes_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import zoo

    def examine(row: zoo.Row) -> None:
        match row.file:
            case "crashes":
                os.kill(os.getpid(), signal.SIGKILL)
            case "hangs":
                time.sleep(60)
            case "raises":
                raise ValueError("no such thing\nand more")

    monkeypatch.setattr(zoo, "examine", examine)
    rows = zoo.sweep([zoo.Row(name) for name in ("crashes", "hangs", "raises", "works")], jobs=2, limit=3)
    assert sorted((row.file, row.failure) for row in rows) == [
        ("crashes", "the process died of SIGKILL"),
        ("hangs", "took more than 3 s"),
        ("raises", "ValueError: no such thing"),
        ("works", ""),
    ]


def test_zoo_names_each_bar_that_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from zoo import Left, Outcome, Row, problems

    def row(**changes: Any) -> Row:
        peers = {
            "training graph": Outcome({"batch": 2}, kernels=9),
            "timm": Outcome({"batch": 1}, kernels=8),
            "torch.fx": Outcome(kernels=1, error=0.5),  # less, and wrong
        }
        ours = Outcome({"batch": 1}, kernels=8, error=1e-6)
        return Row("net", "net", ours=ours, peers=peers, left=[Left("norm", "batch", ["true"])], **changes)

    assert problems(row()) == []
    failed = row(failure="ReparamError: no")
    assert problems(failed) == ["does not compile: ReparamError: no"]
    rounded, wrong = row(error_in_double=1e-15), row(error_in_double=0.1)
    rounded.ours.error = wrong.ours.error = 0.1
    assert problems(rounded) == []
    assert problems(wrong) == ["wrong by 1e-01, in float64 by 1e-01"]
    silent = row()
    silent.left.append(Left("other", "layer", []))
    assert problems(silent) == ["unexplained norms: 1 layer"]
    for worse in (Outcome({"batch": 2}, kernels=7), Outcome({}, kernels=9)):
        beaten = row()
        beaten.ours = worse
        assert any("timm leaves 1 norms and 8 kernels" in problem for problem in problems(beaten))

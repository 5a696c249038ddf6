"""The benchmarks run, and measure what they say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

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
    monkeypatch.setattr(compile_time, "against_timm", lambda name, bar, rounds: met)
    monkeypatch.setattr(sys, "argv", ["compile_time.py", "--check"])
    compile_time.main()
    monkeypatch.setattr(compile_time, "against_timm", lambda name, bar, rounds: missed)
    with pytest.raises(SystemExit) as stop:
        compile_time.main()
    assert stop.value.code == 1
    assert "no" in capsys.readouterr().out

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
    warmup, first, second, third = ("".join(calls[start : start + 3]) for start in range(0, 12, 3))
    assert warmup == "abc"
    assert second == first[::-1]
    assert sorted(first) == sorted(third) == ["a", "b", "c"]
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
def test_deploy_times_each_network_in_a_process_of_its_own(tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    asked = ("--models", "test_byobnet", "no_such_model", "--runtimes", "eager", "--rounds", "2", "--threads", "1")
    ran = run("deploy.py", *asked, "--markdown", "--check", "--json", str(results))
    assert ran.returncode == 1, ran.stderr  # there is no such model
    found = json.loads(results.read_text())["results"]
    times = {row["graph"]: row["seconds"] for row in found["test_byobnet"]["rows"]}
    assert {"training", "timm", "reparam"} <= times.keys()
    assert all(0 < time["low"] <= time["median"] <= time["high"] for time in times.values())
    ratios = found["test_byobnet"]["ratios"]["eager"]
    assert ratios["timm"]["median"] == 1.0
    assert f"{ratios['reparam']['median']:.2f} (" in ran.stdout
    assert "missed: no_such_model: " in ran.stdout


@pytest.mark.slow
def test_executorch_lowering_leaves_parts_to_xnnpack(tmp_path: Path) -> None:
    pytest.importorskip("executorch.exir", reason="it is measured there")
    results, name = tmp_path / "results.json", "test_mambaout"
    ran = run("executorch_lowering.py", "--models", name, "--rounds", "2", "--markdown", "--json", str(results))
    assert ran.returncode == 0, ran.stderr
    found = json.loads(results.read_text())["results"][name]
    assert found["reparam"]["delegates"] < found["recipe"]["delegates"]
    assert "aten.split_with_sizes_copy" in found["recipe"]["portable_operators"]
    assert "aten.split_with_sizes_copy" not in found["reparam"]["portable_operators"]
    assert max(found[way]["error"] for way in ("recipe", "reparam")) < 1e-5
    assert f"{found['ratio']['median']:.2f} (" in ran.stdout


def deployed(eager: float, openvino: float | str, latency: float = 0.5, of_peak: float = 0.9) -> dict[str, Any]:
    """What `deploy.py` found of a network: ratios to timm's graph, or what failed."""

    def ratio(value: float | str) -> Any:
        return value if isinstance(value, str) else {"median": value, "low": value, "high": value}

    seconds = {"median": 0.01, "low": 0.01, "high": 0.01}
    ran = (("eager", "reparam"), ("eager", "latency"), ("openvino", "reparam"))
    return {
        "ratios": {
            "eager": {"reparam": ratio(eager), "latency": ratio(latency)},
            "openvino": {"reparam": ratio(openvino)},
        },
        "rows": [{"runtime": run, "graph": graph, "of_peak": of_peak, "seconds": seconds} for run, graph in ran],
        "peak_flops": 1e11,
    }


def test_deploy_names_each_bar_that_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from deploy import missed

    def problems(**results: dict[str, Any]) -> list[str]:
        return list(missed(results, ["eager", "openvino"]))

    assert problems(a=deployed(0.9, 1.02), b=deployed(1.0, 0.97)) == []
    assert problems(a=deployed(0.6, 1.04), b=deployed(1.0, 0.9)) == [
        "a in openvino: 1.040 times timm's graph, allowed 1.03"
    ]
    assert problems(a=deployed(0.96, 1.01)) == [
        "geometric mean in eager: 0.960, allowed 0.95",
        "geometric mean in openvino: 1.010, allowed 1.00",
    ]
    assert problems(a=deployed(0.9, 0.9, latency=0.81)) == ["geometric mean in eager for latency: 0.810, allowed 0.80"]
    assert problems(a=deployed(0.9, "wrong"), b=deployed(0.9, 0.9)) == ["a in openvino: wrong"]
    assert problems(a={"failure": "killed"}, b=deployed(0.9, 0.9)) == ["a: killed"]
    assert problems(repvit_m0_9=deployed(0.9, 0.9, of_peak=0.74)) == [
        "repvit_m0_9: 74% of the matrix-product peak, in eager; at least 75% wanted"
    ]


def test_deploy_shows_what_it_measured_and_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import deploy

    found = {"good": deployed(0.9, 0.9), "bad": deployed(0.8, "no kernel"), "dead": {"failure": "killed"}}
    monkeypatch.setattr(deploy, "in_process_of_its_own", lambda name, options: found[name])
    asked = ["deploy.py", "--check", "--markdown", "--runtimes", "eager", "openvino", "--models"]
    monkeypatch.setattr(sys, "argv", [*asked, "good"])
    deploy.main()
    monkeypatch.setattr(sys, "argv", [*asked, *found])
    with pytest.raises(SystemExit) as stop:
        deploy.main()
    assert stop.value.code == 1
    out = capsys.readouterr().out
    assert (
        "| good | 10.0 ms, 0.90 (0.90 to 0.90) | 10.0 ms, 0.90 (0.90 to 0.90) | 10.0 ms, 0.50 (0.50 to 0.50) |" in out
    )
    assert "| bad | 10.0 ms, 0.80 (0.80 to 0.80) | fails | 10.0 ms, 0.50 (0.50 to 0.50) |" in out
    assert "| dead | - | - | - |" in out
    assert "| geometric mean | 0.849 | 0.900 | 0.500 |" in out
    assert "missed: dead: killed" in out


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux keeps a peak that can be reset")
@pytest.mark.slow
def test_memory_is_that_of_a_compilation(tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    ran = run("memory.py", "--model", "vit_tiny_patch16_224", "--json", str(results))
    assert ran.returncode == 0, ran.stderr
    found = json.loads(results.read_text())["results"]
    assert [result["verify"] for result in found] == [False, True]
    assert all(result["ratio"] == result["peak"] / result["weights"] > 1 for result in found)


def test_gpu_says_that_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu

    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    with pytest.raises(SystemExit, match=r"this needs a CUDA device, and PyTorch .* finds none"):
        gpu.main()


def test_gpu_shows_throughput_beside_the_paper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu
    from rich.table import Table

    from reparam.bench import Benchmark, Row

    rows = (
        Row("training", "eager", (0.2, 0.2), 10**12),
        Row("compiled", "eager", (0.1, 0.1), 10**12),
        Row("compiled", "cuda-graph", failure="out of memory"),
    )
    table = gpu.render({("repvit_m0_9", 256): Benchmark(rows, {8192: (0.01, 0.01)})}, Table(*map(str, range(9))))
    cells = list(zip(*(column.cells for column in table.columns), strict=True))
    assert cells[1] == (
        "repvit_m0_9", "256", "eager", "compiled", "100.00 ms (100.00 to 100.00)", "0.50", "2,560", "18%", "4,817",
    )  # fmt: skip
    assert cells[2][4] == "out of memory"


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

"""``reparam bench``: what can be named, what is printed, and how it fails."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import commands
from reparam import models
from reparam.bench import Benchmark, Row
from reparam.cli import bench as command

QUICK = ("--runtimes", "eager", "--rounds", "2", "--no-memory")


run, failure = partial(commands.run, "bench"), partial(commands.failure, "bench")


def test_a_known_model_in_a_table_and_a_chart(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = run("repvit_digits", "--plot", tmp_path / "chart.png", *QUICK)
    lines = result.stdout.splitlines()
    assert lines[0].startswith("repvit_digits: 1x1x8x8, float32, 1 thread, ")
    assert lines[0].endswith(", wall time")
    cells = [line.split() for line in lines if line.startswith(" eager") or line.startswith("eager")]
    assert [row[1] for row in cells] == ["training", "compiled"]
    assert cells[0][cells[0].index("to") + 2] == "1.00"  # of training
    assert any(line.startswith("matrix-product peak: ") for line in lines)
    assert (tmp_path / "chart.png").stat().st_size > 10_000
    assert result.stderr == ""


def test_a_checkpoint_with_a_peer_as_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "their_package.py").write_text("def deploy(model):\n    return model\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    torch.save(models.create("repvit_digits").state_dict(), tmp_path / "digits.pth")
    asked = ("--peer", "their_package:deploy", "--batch", 3, "--input-size", "1x16x16", "--json")
    found = json.loads(run(tmp_path / "digits.pth", *asked, *QUICK).stdout)
    assert found["model"] == "repvit_digits"
    assert found["inputs"] == [[3, 1, 16, 16]]
    assert [row["graph"] for row in found["rows"]] == ["training", "peer", "compiled"]
    assert {row["runtime"] for row in found["rows"]} == {"eager"}
    training, _, compiled = found["rows"]
    assert compiled["multiply_adds"] < training["multiply_adds"]
    assert all(row["seconds"]["rounds"] == 2 and row["of_peak"] > 0 for row in found["rows"])


def test_a_factory_needs_a_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_layers.py").write_text("from torch import nn\n\ndef build():\n    return nn.Conv2d(3, 4, 3)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "give the shape of one input to measure with" in failure("my_layers:build", *QUICK)
    found = json.loads(run("my_layers:build", "--input-size", "3x8x8", "--json", *QUICK).stdout)
    assert found["model"] == "my_layers:build"
    assert found["rows"][0]["multiply_adds"] == 4 * 36 * 27


def test_timm_is_its_own_peer() -> None:
    pytest.importorskip("timm")
    found = json.loads(run("timm:test_byobnet", "--json", *QUICK).stdout)
    assert [row["graph"] for row in found["rows"]] == ["training", "peer", "compiled"]


def test_what_was_not_timed_is_said_below_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    """It has a row all the same."""
    about = {"inputs": [[1, 3, 8, 8]], "precision": "float32", "threads": 2, "processor": "P", "clock": "wall"}
    rows = (
        Row("training", "eager", (2e-3, 2e-3), 10**6, 0.0, 4000, None, "", "not on Linux"),
        Row("training", "openvino", failure="openvino is not installed: pip install openvino"),
    )
    command.print_table("net", Benchmark(rows, {1000: (0.1, 0.1)}, about))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "net: 1x3x8x8, float32, 2 threads, P, wall time"
    eager, openvino = (
        next(line.split() for line in lines if line.strip().startswith(name)) for name in ("eager", "open")
    )
    assert eager[2:] == "2.00 ms 2.00 to 2.00 1.00 5% - 4.0 kB 0e+00".split()
    assert openvino == ["openvino", "training", *"-------"]
    assert "training in openvino: openvino is not installed: pip install openvino" in lines
    assert "training in eager: memory: not on Linux" in lines
    assert "matrix-product peak: 20 GFLOP/s; of peak: 2 x multiply-adds / median time, over that" in lines


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("repvit_m9",), "there is no model named 'repvit_m9'"),
        (("none.pth",), "none.pth: no such file"),
        (("none.pth", "--model", "repvit_digits"), "none.pth: no such file"),
        (("no_such_package:build",), "--model no_such_package:build failed with ModuleNotFoundError"),
        (
            ("repvit_digits", "--runtimes", "tvm"),
            "the runtime tvm is not known on cpu; choose from eager, torch.compile",
        ),
        (("repvit_digits", "--peer", "somebody"), "--peer somebody is no function such as package.module:function"),
        (
            ("repvit_digits", "--peer", "no_such_package:deploy"),
            "--peer no_such_package:deploy failed with ModuleNotFound",
        ),
        (("repvit_digits", "--half"), "half precision is measured on CUDA only"),
        (("repvit_digits", "--optimize", "beauty"), "optimize='beauty' is not known"),
        (("repvit_digits", "--plot", "no/such/folder/chart.png"), "no/such/folder"),
        (("repvit_digits", "--plot", "chart.gif"), "chart.gif: a chart ends in .png, .svg, .pdf"),
    ],
)
def test_bad_input_is_one_line(arguments: tuple[str, ...], message: str) -> None:
    if "--plot" in arguments:
        pytest.importorskip("matplotlib")
    assert message in failure(*arguments, "--rounds", "1")


def test_the_module_of_a_network_is_measured(tmp_path: Path) -> None:
    """An exported program is a graph, and no training-time module."""
    program = torch.export.export(nn.Conv2d(3, 4, 3).eval(), (torch.zeros(1, 3, 8, 8),))
    torch.export.save(program, tmp_path / "conv.pt2")
    assert "name its network with --model" in failure(tmp_path / "conv.pt2", "--unsafe-load", *QUICK)

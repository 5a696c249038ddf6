"""The demo: its drawing, what makes it fail, and, as a slow test, all of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, fx, nn

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"

pytest.importorskip("matplotlib", reason="the demo's own requirements are not installed")


@pytest.fixture
def drawing(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import drawing

    return drawing


@pytest.fixture
def digits(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import digits

    return digits


class Branches(nn.Module):
    """RepViT's token mixer: what the picture shows."""

    def __init__(self) -> None:
        super().__init__()
        self.conv3, self.norm3 = nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.BatchNorm2d(4)
        self.conv1, self.norm = nn.Conv2d(4, 4, 1, groups=4), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.norm3(self.conv3(x)) + self.conv1(x) + x)


def test_the_picture_is_a_png_1600_pixels_wide(drawing: ModuleType, tmp_path: Path) -> None:
    block = fx.symbolic_trace(Branches())
    deployed = fx.symbolic_trace(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=4)))
    latencies = [drawing.Latency(name, 1, 0.9, 1.0, 1.2) for name in ("PyTorch, trained", "PyTorch, compiled")]
    picture = tmp_path / "picture.png"
    drawing.draw(picture, "A title", block, deployed, [drawing.Fact("kernels", "6", "1")], latencies)
    header = picture.read_bytes()[:24]
    assert header.startswith(b"\x89PNG")
    assert int.from_bytes(header[16:20], "big") == 1600


def test_judging_counts_what_differs(digits: ModuleType) -> None:
    reference = torch.eye(4)
    verdict = digits.judge(reference.roll(1, 0), reference, labels=torch.tensor([3, 0, 1, 0]))
    assert (verdict.accuracy, verdict.differing, verdict.largest_difference) == (0.75, 4, 1.0)


@pytest.mark.parametrize(("accuracy", "differing", "complaint"), [(0.96, 0, "only 96.00%"), (0.99, 1, "1 predictions")])
def test_the_demo_fails_loudly(digits: ModuleType, accuracy: float, differing: int, complaint: str) -> None:
    with pytest.raises(SystemExit, match=complaint):
        digits.check({"compiled": digits.Verdict(accuracy, differing, 0.0)})


def test_the_demo_passes_what_is_right(digits: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    digits.check({"compiled": digits.Verdict(0.97, 0, 1e-6)})
    assert "the same before and after" in capsys.readouterr().out


@pytest.mark.slow
def test_the_demo_runs(tmp_path: Path) -> None:
    environment = {**os.environ, "COLUMNS": "120"}
    command = [sys.executable, str(EXAMPLES / "digits.py")]
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "Every prediction is the same before and after." in ran.stdout
    written = {path.name for path in (tmp_path / "demo_output").iterdir()}
    endings = (".pth", ".onnx", "_deploy.pth", "_deploy.onnx", ".png")
    assert {f"repvit_digits{ending}" for ending in endings} <= written


@pytest.fixture
def expand(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("mlxtend", reason="the demo's own requirements are not installed")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import expand

    return expand


def test_the_comparison_of_plain_and_expanded_runs(expand: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    expand.main(["--block", "repvgg", "--seeds", "1", "--epochs", "1", "--images", "200"])
    printed = capsys.readouterr().out
    assert "1 seeds, 1000 held-out digits" in printed
    assert "every prediction is the same" in printed.replace("\n", " ")


@pytest.mark.parametrize(
    ("gains", "says"),
    [
        ((1.0, 1.2, 1.1), "A gain of more than two standard errors"),
        ((-1.0, -1.2, -1.1), "A loss of more than two standard errors"),
        ((1.0, -1.2, 0.1), "no difference that these seeds show"),
        ((1.0,), "says nothing about chance"),
    ],
)
def test_the_verdict_knows_chance(expand: ModuleType, gains: tuple[float, ...], says: str) -> None:
    runs = [expand.Run(90.0, 90.0 + gain, 1.0, 2.0, 0, (1, 2, 1)) for gain in gains]
    assert says in expand.verdict(runs)


def test_a_changed_prediction_fails_loudly(expand: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expand, "compare", lambda *_: expand.Run(90.0, 91.0, 1.0, 2.0, 3, (1, 2, 1)))
    with pytest.raises(SystemExit, match="3 predictions changed"):
        expand.main(["--seeds", "1", "--images", "200"])


@pytest.mark.parametrize("arguments", [["--seeds", "0"], ["--images", "10"], ["--block", "none"]])
def test_bad_options_are_refused(expand: ModuleType, arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        expand.main(arguments)

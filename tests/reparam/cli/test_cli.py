"""The command line: what it writes, what it prints where, and how it fails."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import reparam
from commands import failure, run
from reparam import cli, models
from reparam.files import deploy
from reparam.timing import Timing
from support import randomise

X = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory, digits: nn.Module) -> Path:
    """A deploy file, written once for all tests that only read it."""
    folder = tmp_path_factory.mktemp("fused")
    torch.save(digits.state_dict(), folder / "digits.pth")
    run("fuse", folder / "digits.pth", "--quiet", "--no-verify")
    return folder / "digits_deploy.pth"


def agrees(path: Path, model: nn.Module) -> bool:
    with torch.no_grad():
        expected, actual = model(X), deploy.load(path)(X)
    return bool((expected - actual).abs().max() <= 1e-5 * expected.abs().max())


# --- fuse ---------------------------------------------------------------------------------------------------------


def test_fuse_writes_beside_the_input(checkpoint: Path, digits: nn.Module) -> None:
    before = checkpoint.read_bytes(), checkpoint.stat().st_mtime_ns
    result = run("fuse", checkpoint)
    output = checkpoint.with_name("digits_deploy.pth")
    assert agrees(output, digits)
    assert (checkpoint.read_bytes(), checkpoint.stat().st_mtime_ns) == before
    assert sorted(path.name for path in checkpoint.parent.iterdir()) == ["digits.pth", "digits_deploy.pth"]
    lines = result.stdout.splitlines()
    report = deploy.read_metadata(output)["report"]
    assert lines[0] == f"{checkpoint} is repvit_digits"
    for name in ("kernels", "norms", "parameters"):
        row = next(line.split() for line in lines if line.split()[:1] == [name])
        assert row[1:] == [f"{report['before'][name]:,}", f"{report['after'][name]:,}"]
    assert report["after"]["norms"] == 0 < report["before"]["norms"]
    assert "before and after: largest relative error" in result.stdout
    assert "\x1b[" not in result.stdout
    assert lines[-1] == f"{output}: {output.stat().st_size / 1e3:.1f} kB"
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("wrap", "prefix"), [("model_ema", ""), ("state_dict", "module._orig_mod."), (None, "module.")]
)
def test_fuse_takes_checkpoints_as_people_have_them(
    tmp_path: Path, digits: nn.Module, wrap: str | None, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = {prefix + name: tensor for name, tensor in digits.state_dict().items()}
    torch.save(state if wrap is None else {wrap: state, "epoch": 3}, tmp_path / "a.pt")
    compiled: list[nn.Module] = []
    monkeypatch.setattr(reparam, "compile", lambda model, *args, **options: compiled.append(model) or stub(model))
    result = json.loads(run("fuse", tmp_path / "a.pt", "--json").stdout)
    assert (result["model"], result["weights"]) == ("repvit_digits", wrap)
    assert all(torch.equal(compiled[0].state_dict()[name], value) for name, value in digits.state_dict().items())


def stub(model: nn.Module) -> nn.Module:
    """Stands in for a compiled model where a test is about what went into the compiler."""
    graph = torch.fx.symbolic_trace(nn.Identity())
    graph.report = reparam.explain(nn.Conv2d(1, 1, 1))
    return graph


def test_fuse_reads_and_writes_safetensors(tmp_path: Path, digits: nn.Module) -> None:
    save_file(digits.state_dict(), tmp_path / "digits.safetensors")
    result = json.loads(
        run("fuse", tmp_path / "digits.safetensors", "-o", tmp_path / "out.safetensors", "--json").stdout
    )
    assert agrees(tmp_path / "out.safetensors", digits)
    assert result["output"] == str(tmp_path / "out.safetensors")
    assert (result["model"], result["input_shape"], result["weights"]) == ("repvit_digits", [1, 8, 8], None)
    assert result["report"] == deploy.read_metadata(tmp_path / "out.safetensors")["report"]
    assert result["report"]["comparison"]["largest_error"] < 1e-5


def test_fuse_exports_onnx(checkpoint: Path) -> None:
    output = checkpoint.with_name("digits.onnx")
    result = run("fuse", checkpoint, "-o", output)
    assert "PyTorch and onnxruntime" in result.stdout
    assert result.stdout.splitlines()[-1].startswith(f"{output}: ")
    assert "agree: largest relative error" in run("verify", checkpoint, output).stdout
    assert sorted(path.name for path in checkpoint.parent.iterdir()) == ["digits.onnx", "digits.pth"]


def test_fuse_takes_averaged_weights(tmp_path: Path, digits: nn.Module) -> None:
    average = randomise(models.create("repvit_digits"), seed=1).eval()
    torch.save({"model": digits.state_dict(), "model_ema": average.state_dict()}, tmp_path / "a.pth")
    run("fuse", tmp_path / "a.pth", "--ema", "-o", tmp_path / "ema.pth", "-q", "--no-verify")
    assert agrees(tmp_path / "ema.pth", average)
    assert not agrees(tmp_path / "ema.pth", digits)


def test_fuse_quiet_and_replacing_an_older_output(checkpoint: Path, digits: nn.Module) -> None:
    output = checkpoint.with_name("digits_deploy.pth")
    output.write_text("older")
    result = run("fuse", checkpoint, "--quiet", "--no-verify")
    assert result.output == ""
    assert agrees(output, digits)


def test_fuse_without_verification(checkpoint: Path, digits: nn.Module) -> None:
    assert "before and after: not compared" in run("fuse", checkpoint, "--no-verify").stdout
    report = deploy.read_metadata(checkpoint.with_name("digits_deploy.pth"))["report"]
    assert report["comparison"] is None
    assert report["certificates"] == 0
    assert agrees(checkpoint.with_name("digits_deploy.pth"), digits)


FACTORY = """
import torch
from torch import nn

class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.three, self.one = nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 1)
        self.norm = nn.BatchNorm2d(2)

    def forward(self, x):
        return self.norm(self.three(x) + self.one(x) + x)

class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(3, 2)

    def forward(self, x):
        return self.table(x.argmax(1))

class Python(Branches):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else x
"""


@pytest.fixture
def factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "their_models.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "their_models", raising=False)
    import their_models  # type: ignore[import-not-found]

    yield their_models
    sys.modules.pop("their_models", None)


def test_fuse_with_a_factory(tmp_path: Path, factory: Any) -> None:
    model = randomise(factory.Branches()).eval()
    torch.save(model.state_dict(), "a.pth")
    assert "belong to no known model" in failure("fuse", "a.pth")
    run("fuse", "a.pth", "--model", "their_models:Branches", "--input-size", "2x9x9")
    x = torch.randn(2, 2, 7, 7)
    loaded = deploy.load("a_deploy.pth")
    assert [type(module).__name__ for module in loaded.modules()].count("Conv2d") == 1
    assert torch.allclose(loaded(x), model(x), atol=1e-5)
    assert deploy.read_metadata("a_deploy.pth")["input_shape"] == [2, 9, 9]


def test_fuse_a_pickled_module(factory: Any) -> None:
    torch.save(randomise(factory.Branches()).eval(), "a.pth")
    assert failure("fuse", "a.pth") == (
        "a.pth: contains pickled Python code (their_models.Branches); pass --unsafe-load only if you trust the source"
    )
    assert run("fuse", "a.pth", "--unsafe-load").stdout.startswith("a.pth is Branches\n")
    assert run("verify", "a.pth", "a_deploy.pth", "--unsafe-load", "--input-size", "2x6x6").exit_code == 0
    assert "ParallelBranches" in run("explain", "a.pth", "--unsafe-load").stdout


@pytest.fixture
def program(tmp_path: Path, digits: nn.Module) -> Path:
    """An exported program of a fixed batch size."""
    torch.export.save(torch.export.export(digits, (X,)), tmp_path / "digits.pt2")
    return tmp_path / "digits.pt2"


@pytest.mark.parametrize("extension", ["pth", "safetensors", "onnx"])
def test_fuse_and_verify_an_exported_program(program: Path, digits: nn.Module, extension: str) -> None:
    output = program.with_name(f"out.{extension}")
    stdout = run("fuse", program, "--unsafe-load", "-o", output).stdout
    assert stdout.startswith(f"{program} is an exported program\n")
    assert extension == "onnx" or agrees(output, digits)
    for pair in ((program, output), (output, program)):
        assert " agree: " in run("verify", *pair, "--unsafe-load").stdout
    explained = run("explain", program, "--unsafe-load", "--json").stdout
    assert json.loads(explained)["report"]["after"]["norms"] == 0


def test_an_exported_program_is_not_loaded_unasked(program: Path, fused: Path) -> None:
    reason = f"{program}: is an exported program, which torch.export.load may run code of; pass --unsafe-load only if"
    for arguments in (["fuse", program], ["explain", program], ["verify", program, fused]):
        assert failure(*arguments).startswith(reason)
    assert not program.with_name("digits_deploy.pth").exists()


def test_the_weights_of_an_exported_program_are_a_checkpoint(program: Path, fused: Path) -> None:
    run("fuse", program, "--unsafe-load", "--model", "repvit_digits")
    run("verify", program.with_name("digits_deploy.pth"), fused)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.other = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(1, 4, 3)

    def forward(self, x: Tensor, *, y: Tensor) -> Tensor:
        return self.norm(self.conv(x)) + self.other(y)


def test_exported_programs_of_several_inputs(tmp_path: Path) -> None:
    model, batch = randomise(Two()).eval(), torch.export.Dim("batch")
    shapes = {"x": {0: batch}, "y": {0: batch}}
    torch.export.save(torch.export.export(model, (X,), {"y": 2 * X}, dynamic_shapes=shapes), tmp_path / "a.pt2")
    run("fuse", tmp_path / "a.pt2", "--unsafe-load")
    run("verify", tmp_path / "a.pt2", tmp_path / "a_deploy.pth", "--unsafe-load")
    assert torch.allclose(deploy.load(tmp_path / "a_deploy.pth")(X, y=X), model(X, y=X), atol=1e-5)


def test_an_exported_program_in_training_mode_is_one_sentence(tmp_path: Path) -> None:
    torch.export.save(torch.export.export(Two().train(), (X,), {"y": X}), tmp_path / "a.pt2")
    reason = failure("fuse", tmp_path / "a.pt2", "--unsafe-load")
    assert reason.startswith(f"{tmp_path / 'a.pt2'}: the exported program cannot be compiled: ")
    assert reason.endswith("it writes to its own tensors, as models in training do; export it in eval mode")


def test_inputs_that_an_exported_program_does_not_take(program: Path) -> None:
    run("fuse", program, "--unsafe-load", "--input-size", "1x8x8")
    reason = failure("fuse", program, "--unsafe-load", "--input-size", "1x9x8")
    assert "does not run on the example inputs: Guard failed" in reason


def test_what_a_file_cannot_hold_is_one_sentence(factory: Any) -> None:
    torch.save(randomise(factory.Python()).state_dict(), "a.pth")
    reason = failure("fuse", "a.pth", "--model", "their_models:Python", "--input-size", "2x6x6")
    assert "cannot rebuild it without its source code" in reason
    assert not Path("a_deploy.pth").exists()


def test_export_takes_checkpoints_and_deploy_files(checkpoint: Path, fused: Path) -> None:
    for source in (checkpoint, fused):
        output = checkpoint.with_name("digits.pt2")
        result = run("export", source, "-o", output)
        assert result.stdout.startswith(f"{source} is repvit_digits\n")
        assert "batch x 1 x 8 x 8" in result.stdout
        assert "largest relative error 0.0e+00 in 1 outputs" in result.stdout
        assert result.stdout.splitlines()[-1].startswith(f"{output}: ")
    assert "pass --unsafe-load" in failure("verify", checkpoint, output)
    run("verify", checkpoint, output, "--unsafe-load")
    assert "pass --unsafe-load" in failure("export", output, "-o", output.with_suffix(".onnx"))


def test_export_says_it_to_programs(fused: Path, tmp_path: Path) -> None:
    options = ("--half", "--fixed-batch", "--input-size", "1x12x12", "--json")
    result = json.loads(run("export", fused, "-o", tmp_path / "a.pt2", *options).stdout)
    written = result["export"]
    assert result["model"] == "repvit_digits"
    assert written["files"] == [str(tmp_path / "a.pt2")]
    assert written["bytes"] == (tmp_path / "a.pt2").stat().st_size
    assert (written["precision"], written["inputs"]) == ("float16", {"x": [1, 1, 12, 12]})
    assert written["operators"]["conv2d"] == 40
    assert 0 < written["comparison"]["largest_error"] < 0.05


def test_verify_reads_what_runtimes_read(checkpoint: Path) -> None:
    pytest.importorskip("openvino")
    output = checkpoint.with_name("digits.xml")
    run("fuse", checkpoint, "-o", output, "--quiet")
    assert {path.name for path in output.parent.iterdir()} == {"digits.xml", "digits.bin", "digits.pth"}
    assert "agree: largest relative error" in run("verify", checkpoint, output).stdout
    assert "no such file" in failure("verify", checkpoint, output.with_name("other.xml"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-o", "a.tflite"], ".tflite is the suffix of no target"),
        (["-o", "a.pt2", "--opset", "18"], "torch.export has no option opset; leave it out"),
        (["-o", "a.pt2", "--image-mean", "0.5"], "--image-mean and --image-std belong together"),
        (["-o", "a.pt2", "--image-mean", "x", "--image-std", "1"], "--image-mean x: must be numbers such as"),
        (["-o", "a.pt2", "--target", "onnx"], "a file for ONNX ends in .onnx"),
        (["-o", "none/a.pt2"], "there is no folder none"),
    ],
)
def test_bad_export_options(
    fused: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in failure("export", fused, *options)
    assert list(tmp_path.iterdir()) == []


def test_onnx_needs_an_input_shape(factory: Any) -> None:
    torch.save(factory.Branches().state_dict(), "a.pth")
    assert failure("fuse", "a.pth", "--model", "their_models:Branches", "-o", "a.onnx") == (
        "their_models:Branches: give the shape of one input to export with, such as --input-size 3x224x224"
    )


# --- What fuse refuses --------------------------------------------------------------------------------------------


def edited(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        payload = torch.load(path, weights_only=True)
        change(payload["model"])
        torch.save(payload, path)

    return apply


REFUSED: dict[str, tuple[Callable[[Path], Any], list[str], str]] = {
    "missing": (Path.unlink, [], "no such file"),
    "empty": (lambda path: path.write_bytes(b""), [], "is empty"),
    "text": (lambda path: path.write_text("not found " * 9), [], "is not a checkpoint"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-1000]), [], "is truncated"),
    "missing key": (
        edited(lambda state: state.popitem()),
        ["--model", "repvit_digits"],
        "1 key missing: head.head.l.bias",
    ),
    "extra key": (
        edited(lambda state: state.update(extra=torch.ones(1))),
        ["--model", "repvit_digits"],
        "does not fit repvit_digits: 1 key unexpected: extra",
    ),
    "unknown": (
        edited(lambda state: state.update(extra=torch.ones(1))),
        [],
        "belong to no known model; name the network",
    ),
    "wrong model": (lambda path: None, ["--model", "repvit_m0_6"], "its keys and shapes are those of repvit_digits"),
    "nan": (
        edited(lambda state: state["stem.conv1.c.weight"].fill_(float("nan"))),
        [],
        "1 tensor (stem.conv1.c.weight) with NaN or infinite values",
    ),
    "variance": (
        edited(lambda state: state["stem.conv1.bn.running_var"].neg_()),
        [],
        "1 tensor (stem.conv1.bn.running_var) with negative running variances",
    ),
    "no average": (lambda path: None, ["--ema"], "holds no averaged (EMA) weights"),
}


@pytest.mark.parametrize(
    ("subcommand", "name"), [*(("fuse", name) for name in REFUSED), ("explain", "truncated"), ("verify", "nan")]
)
def test_bad_input_is_one_sentence(checkpoint: Path, name: str, subcommand: str, fused: Path) -> None:
    change, options, reason = REFUSED[name]
    change(checkpoint)
    others = [fused] if subcommand == "verify" else []
    message = failure(subcommand, checkpoint, *others, *options)
    assert message.startswith(f"{checkpoint}: ")
    assert reason in message
    assert {path.name for path in checkpoint.parent.iterdir()} <= {"digits.pth"}


def test_bad_usage(checkpoint: Path, fused: Path) -> None:
    folder = checkpoint.parent
    assert failure("fuse", checkpoint, "-o", folder / "a.bin").endswith(
        "must end in .pth, .pt, .safetensors, .onnx, .xml, .pte, .mlpackage, .pt2, .aoti.pt2"
    )
    assert failure("fuse", checkpoint, "-o", checkpoint).endswith(
        "is the input, which is never overwritten; choose another output"
    )
    assert failure("fuse", checkpoint, "-o", folder / "no" / "a.pth").endswith(f"there is no folder {folder / 'no'}")
    assert failure("fuse", checkpoint, "--model", "repvit_m0.9").startswith("there is no model named 'repvit_m0.9'")
    assert failure("fuse", checkpoint, "--model", "none:build").startswith(
        "--model none:build failed with ModuleNotFound"
    )
    assert failure("fuse", fused).endswith("is a deploy file already; load it with reparam.load")
    for size in ("3x", "axb", "0x8x8", "-1x2x2", "3 8 8"):
        assert (
            failure("fuse", checkpoint, f"--input-size={size}") == f"--input-size {size} is no shape such as 3x224x224"
        )
    assert "does not run on the example inputs" in failure("fuse", checkpoint, "--input-size", "4x8x8")
    for args in (["fuse"], ["fuse", "--unknown", "a"], ["nonsense"]):
        result = run(*args, code=2)
        assert result.stdout == ""
        assert "Usage:" in result.stderr
    assert [path.name for path in folder.iterdir()] == ["digits.pth"]


def test_a_wrong_result_is_not_written(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    comparison = reparam.report.Comparison(0.5, 1e-4, 1)

    def disagree(*args: Any, **kwargs: Any) -> nn.Module:
        raise reparam.VerificationError("the models disagree", comparison)

    monkeypatch.setattr(reparam, "compile", disagree)
    assert failure("fuse", checkpoint, code=1) == f"{checkpoint}: the models disagree; nothing was written"
    assert [path.name for path in checkpoint.parent.iterdir()] == ["digits.pth"]


def test_an_internal_error_is_one_sentence(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*args: Any, **kwargs: Any) -> nn.Module:
        raise ZeroDivisionError("division\nby zero")

    monkeypatch.setattr(reparam, "compile", crash)
    assert failure("fuse", checkpoint, code=3) == (
        "ZeroDivisionError: division by zero; this is a bug, --debug shows where"
    )
    result = run("fuse", checkpoint, "--debug", code=3)
    assert "Traceback" in result.stderr
    assert "in crash" in result.stderr


# --- explain ------------------------------------------------------------------------------------------------------


def test_explain_prints_remarks_and_writes_nothing(checkpoint: Path) -> None:
    result = run("explain", checkpoint)
    assert "stages.0.blocks.0.token_mixer" in result.stdout
    assert "ParallelBranches" in result.stdout
    assert [path.name for path in checkpoint.parent.iterdir()] == ["digits.pth"]
    report = json.loads(run("explain", checkpoint, "--json").stdout)["report"]
    fused = [remark for remark in report["remarks"] if remark["kind"] == "fused"]
    assert f"\nfused: {len(fused)}\n" in result.stdout
    assert all(remark["message"] in result.stdout for remark in fused)


def test_explain_says_what_was_missed_and_kept(factory: Any) -> None:
    torch.save(factory.Python().state_dict(), "a.pth")
    result = run("explain", "a.pth", "--model", "their_models:Python", "--input-size", "2x6x6")
    assert "\ncapture: 1\n  (model): kept as Python: it asks for the value of an activation" in result.stdout
    report = json.loads(run("explain", "a.pth", "--model", "their_models:Python", "--json").stdout)["report"]
    assert any(remark["kind"] == "capture" for remark in report["remarks"])


def test_explain_a_deploy_file(fused: Path, tmp_path: Path) -> None:
    result = run("explain", fused)
    assert result.stdout.startswith(f"{fused}: repvit_digits\n")
    assert "ParallelBranches" in result.stdout
    deploy.save(torch.fx.symbolic_trace(nn.Sequential(nn.ReLU())), tmp_path / "a.pth")
    assert failure("explain", tmp_path / "a.pth").endswith("was saved without a report of its compilation")


def test_square_brackets_are_no_markup(tmp_path: Path, digits: nn.Module) -> None:
    (tmp_path / "[red]").mkdir()
    torch.save(digits.state_dict(), tmp_path / "[red]" / "[bold].pth")
    path = tmp_path / "[red]" / "[bold].pth"
    assert str(path) in run("fuse", path, "--no-verify").stdout


# --- verify -------------------------------------------------------------------------------------------------------


def test_verify_a_checkpoint_and_its_deploy_file(checkpoint: Path, fused: Path, tmp_path: Path) -> None:
    assert run("verify", checkpoint, fused).stdout.startswith(f"{checkpoint} and {fused} agree: largest relative error")
    result = json.loads(run("verify", fused, checkpoint, "--json").stdout)
    assert result["agree"] is True
    assert result["largest_error"] <= result["tolerance"] == 1e-4
    assert run("verify", fused, fused, "--quiet").output == ""
    message = failure("verify", checkpoint, fused, "--tolerance", "1e-12", code=1)
    assert message.startswith(f"{checkpoint} and {fused} disagree: largest relative error")


def test_verify_finds_another_network(checkpoint: Path, tmp_path: Path) -> None:
    other = randomise(models.create("repvit_digits"), seed=1)
    torch.save(other.state_dict(), tmp_path / "other.pth")
    assert "disagree: largest relative error" in failure("verify", checkpoint, tmp_path / "other.pth", code=1)
    result = run("verify", checkpoint, tmp_path / "other.pth", "--json", code=1)
    assert json.loads(result.stdout)["agree"] is False
    torch.save(models.create("repvit_digits", in_channels=3).state_dict(), tmp_path / "colour.pth")
    assert failure("verify", checkpoint, tmp_path / "colour.pth", code=1) == (
        f"{checkpoint} takes inputs of 1x8x8, and {tmp_path / 'colour.pth'} of 3x8x8"
    )
    assert "do not fit" in failure("verify", checkpoint, checkpoint, "--input-size", "3x8x8")


def test_verify_weights_that_were_fused_elsewhere(checkpoint: Path, fused: Path, tmp_path: Path) -> None:
    state = deploy.load(fused).state_dict()
    torch.save(state, tmp_path / "bare.pth")
    assert "agree" in run("verify", checkpoint, tmp_path / "bare.pth").stdout
    name = next(iter(state))
    torch.save({**state, name: state[name] * 2}, tmp_path / "bare.pth")
    assert "disagree" in failure("verify", checkpoint, tmp_path / "bare.pth", code=1)
    state.pop(name)
    torch.save(state, tmp_path / "bare.pth")
    assert "it may be fused already" in failure("verify", checkpoint, tmp_path / "bare.pth")
    assert "no such file" in failure("verify", tmp_path / "none.pth", tmp_path / "bare.pth")


# --- models, help, version ----------------------------------------------------------------------------------------


def test_models_lists_all_known(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = json.loads(run("models", "--json").stdout)
    assert [row["name"] for row in rows] == models.names()
    monkeypatch.setattr(models.registry, "names", lambda: ["repvit_digits", "repvit_m0_6"])
    text = run("models").stdout
    for row in rows:
        shown = f"{row['name']} " in text and f"{row['parameters']:,}" in text and row["paper"] in text
        assert shown == (row["name"] in ("repvit_digits", "repvit_m0_6"))
    digits = next(row for row in rows if row["name"] == "repvit_digits")
    assert digits["parameters"] == sum(p.numel() for p in models.create("repvit_digits").parameters())
    assert digits["input_shape"] == [1, 8, 8]


def test_help_and_version() -> None:
    assert run("--version").stdout == f"reparam {reparam.__version__}\n"
    assert "Exit codes: 0 done, 1 outputs disagree, 2 bad usage" in " ".join(run("--help").stdout.split())
    for name in ("fuse", "explain", "verify", "models"):
        assert name in run("--help").stdout
        assert "Usage:" in run(name, "-h").stdout


# --- The progress bar ---------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_appears_for_what_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.shell, "_PATIENCE", 0.05)
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with cli.shell.Bar() as bar:
        bar(3, 10, "stages.0 [conv]")
        deadline = time.monotonic() + 10
        while "stages.0 [conv]" not in terminal.getvalue() and time.monotonic() < deadline:
            time.sleep(0.02)
    assert "stages.0 [conv]" in terminal.getvalue()
    assert threads_of_the_bar() == 0


@pytest.mark.parametrize(("stream", "quiet"), [(io.StringIO, False), (Terminal, True)])
def test_no_bar_where_nobody_looks(monkeypatch: pytest.MonkeyPatch, stream: type[io.StringIO], quiet: bool) -> None:
    monkeypatch.setattr(cli.shell, "_PATIENCE", 0.01)
    monkeypatch.setattr(sys, "stderr", output := stream())
    with cli.shell.Bar(quiet) as bar:
        bar(1, 2, "work")
        time.sleep(0.1)
    assert output.getvalue() == ""


def test_no_bar_for_what_is_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.shell, "_PATIENCE", 60.0)
    monkeypatch.setattr(sys, "stderr", output := Terminal())
    with cli.shell.Bar() as bar:
        bar(1, 2, "work")
    assert output.getvalue() == ""
    assert threads_of_the_bar() == 0


def threads_of_the_bar() -> int:
    import threading

    return sum(isinstance(thread, threading.Timer) for thread in threading.enumerate())


# --- Real processes -----------------------------------------------------------------------------------------------

# Writes half a file and waits to be killed.
HANGING = """
import signal, sys, time
import reparam, torch
from reparam import cli
from reparam.files import deploy

signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell has its background jobs ignore

def hang(path, *rest):
    path.write_bytes(b"half")
    print("writing", flush=True)
    while True:
        time.sleep(0.01)  # rather than once: a signal just before a long sleep would wait for its end

deploy._write_pickle = hang
reparam.compile = lambda model, *args, **options: torch.fx.symbolic_trace(torch.nn.ReLU())
sys.argv = ["reparam", "fuse", sys.argv[1]]
cli.main()
"""


@pytest.mark.parametrize(
    ("number", "code", "message"),
    [
        (signal.SIGINT, 130, "error: interrupted\n"),
        (signal.SIGTERM, 143, ""),
        (signal.SIGKILL, -signal.SIGKILL, ""),
    ],
)
def test_an_interrupted_run_leaves_no_half_file(checkpoint: Path, number: int, code: int, message: str) -> None:
    output = checkpoint.with_name("digits_deploy.pth")
    output.write_text("older")
    before = checkpoint.read_bytes()
    with subprocess.Popen(
        [sys.executable, "-c", HANGING, str(checkpoint)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        process.send_signal(number)
        try:
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == code
    assert errors == message
    assert output.read_text() == "older"
    assert checkpoint.read_bytes() == before
    left = {path.name for path in checkpoint.parent.iterdir()} - {"digits.pth", "digits_deploy.pth"}
    if number == signal.SIGKILL:  # which no process can clean up after; the rest hides under a temporary name
        assert all(name.startswith(".digits_deploy.") and ".tmp" in name for name in left)
    else:
        assert left == set()


def test_a_reader_may_stop_reading(fused: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)  # as `| head -1` does, sooner or later
    command = [sys.executable, "-m", "reparam", "explain", str(fused)]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


# --- report -------------------------------------------------------------------------------------------------------


def test_report_writes_a_page_beside_the_checkpoint(checkpoint: Path) -> None:
    result = run("report", checkpoint, "--no-latency")
    output = checkpoint.with_name("digits_report.html")
    assert result.stdout == f"{output}: repvit_digits before and after compiling\n"
    text = output.read_text()
    assert "digits.pth: repvit_digits</h1>" in text
    assert "certified</span> in float64" in text
    assert 'id="latency"' not in text


def test_report_builds_a_network_by_name_and_charts_a_benchmark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"graph": "training", "runtime": "<b>", "seconds": {"median": 2.0, "low": 1.0, "high": 3.0}}]
    (tmp_path / "bench.json").write_text(json.dumps({"model": "m", "threads": 1, "rows": rows}))
    assert run("report", "repvit_digits", "--no-latency", "--bench", "bench.json", "--quiet").output == ""
    assert "training graph, &lt;b&gt;" in (tmp_path / "repvit_digits_report.html").read_text()


def test_report_times_both_graphs(tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from reparam.page import page

    timed = []
    chart = page.Chart("one thread", (page.Latency("a graph", Timing(2e-3, 1e-3, 3e-3), True),))
    monkeypatch.setattr(page, "time", lambda *args: timed.append(args) or chart)
    run("report", checkpoint, "-o", tmp_path / "page.html", "--input-size", "1x6x6")
    ((_, deploy, inputs),) = timed
    assert (deploy.report.after.norms, inputs.shape) == (0, (1, 1, 6, 6))
    assert "2.00 ms (1.00 to 3.00)" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["no_such_network"], "no_such_network is no file, and no known network: "),
        (["missing.pth"], "missing.pth: "),
        (["repvit_digits", "-o", "page.pdf"], "page.pdf: the output must end in .html"),
        (["repvit_digits", "-o", "no/page.html"], "no/page.html: there is no folder no"),
        (["repvit_digits", "--bench", "none.json"], "none.json: cannot be read: No such file or directory"),
        (["repvit_digits", "--bench", "text.json"], "text.json: is no JSON: "),
        (["repvit_digits", "--bench", "list.json"], "list.json: this is not what reparam bench --json prints"),
    ],
)
def test_report_says_what_is_wrong(
    arguments: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.json").write_text("{")
    (tmp_path / "list.json").write_text("[]")
    assert failure("report", *arguments).startswith(says)
    assert not list(tmp_path.rglob("*.html"))


def test_report_wants_the_training_checkpoint(fused: Path) -> None:
    assert "is a deploy file, which says nothing of the network before" in failure("report", fused)

"""What all targets share: options, free axes, one sentence for every failure, and nothing left behind."""

from __future__ import annotations

import importlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import reparam
from reparam.errors import ExportError, ReparamError, VerificationError
from reparam.targets import TARGETS, Flat, ImageInput, Options, Target, Written
from reparam.targets.torch_export import TorchExport
from support import Net

TWO = torch.randn(2, 3)


def test_the_result_says_what_was_written(tmp_path: Path, model: nn.Module, images: Tensor) -> None:
    steps: list[tuple[Any, ...]] = []
    exported = reparam.export(model, tmp_path / "a.pt2", images, progress=lambda *step: steps.append(step))
    assert exported.path == tmp_path / "a.pt2"
    assert exported.runtime == f"torch {torch.__version__}"
    assert str(exported).startswith(f"{tmp_path}/a.pt2: torch-export, float32, run in torch 2.")
    assert [step[:2] for step in steps] == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert [step[2] for step in steps[:3]] == [
        "capturing",
        "writing for torch.export",
        "comparing in torch.export",
    ]


class Pair(nn.Module):
    """Takes a batch of two only."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tensor([[1.0], [2.0]])


def test_one_batch_size_where_the_model_takes_no_other(tmp_path: Path) -> None:
    exported = reparam.export(Pair().eval(), tmp_path / "a.pt2", TWO)
    assert exported.inputs == {"x": (2, 3)}
    assert not exported.dynamic_batch
    with pytest.raises(ExportError, match="the model itself cannot be run on inputs of 3x3"):
        reparam.export(Pair().eval(), tmp_path / "b.pt2", TWO, dynamic_batch=True)
    assert not (tmp_path / "b.pt2").exists()


def test_one_batch_size_on_request(tmp_path: Path, model: nn.Module, images: Tensor) -> None:
    exported = reparam.export(model, tmp_path / "a.pt2", images, dynamic_batch=False)
    assert exported.inputs == {"input": (1, 3, 16, 16)}


def test_a_model_of_one_size_says_so(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16, 2)).eval()
    with pytest.raises(ExportError, match="the model itself cannot be run on inputs of 1x3x8x8: RuntimeError: mat1"):
        reparam.export(model, tmp_path / "a.pt2", torch.randn(1, 3, 4, 4), dynamic_size=True)
    assert list(tmp_path.iterdir()) == []


def test_an_axis_that_is_not_free_is_named(tmp_path: Path) -> None:
    model = Net(lambda self, x: x * 2 if x.shape[2] == 4 else x * 3).eval()
    with pytest.raises(ExportError, match="the model takes one height only, 4"):
        reparam.export(model, tmp_path / "a.pt2", torch.randn(1, 3, 4, 5), dynamic_size=True)


def test_what_export_cannot_capture_is_one_sentence(tmp_path: Path) -> None:
    model = Net(lambda self, x: x if x.sum() > 0 else -x).eval()
    with pytest.raises(
        ExportError, match=r"torch\.export cannot capture the model \(.*; export what reparam"
    ) as caught:
        reparam.export(model, tmp_path / "a.pt2", TWO)
    assert "\n" not in str(caught.value)


def test_a_model_in_training_mode_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"in training mode; call its eval\(\) first"):
        reparam.export(nn.BatchNorm1d(3), tmp_path / "a.pt2", TWO)


@pytest.mark.parametrize("inputs", ["x", (), (TWO, 3)])
def test_inputs_that_are_no_tensors(tmp_path: Path, inputs: Any) -> None:
    with pytest.raises(ExportError, match="example_inputs must be a tensor, or a tuple of tensors, not"):
        reparam.export(nn.ReLU().eval(), tmp_path / "a.pt2", inputs)


@pytest.mark.parametrize("options", [{"opset": 18}, {"image": ImageInput((0.5,), (0.5,))}])
def test_options_of_other_targets(tmp_path: Path, options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(ExportError, match=rf"torch\.export has no option {name}; leave it out"):
        reparam.export(nn.ReLU().eval(), tmp_path / "a.pt2", TWO, **options)


def test_half_precision_sees_what_it_makes_of_the_inputs(tmp_path: Path) -> None:
    """The error of rounding the inputs themselves is none of the model's."""
    exported = reparam.export(Net(lambda self, x: x * 1.0).eval(), tmp_path / "a.pt2", TWO, half=True)
    assert exported.comparison.largest_error == 0
    assert exported.comparison.tolerance == 5e-2


@pytest.mark.parametrize(
    "name", [(target.name, package) for target in TARGETS.values() for package in target.packages], ids="-".join
)
def test_a_missing_package_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: tuple[str, str]
) -> None:
    target, missing = TARGETS[name[0]], name[1]
    original = importlib.import_module

    def refuse(package: str) -> Any:
        if package == missing:
            raise ModuleNotFoundError(f"No module named '{package}'")
        return original("math")

    monkeypatch.setattr(importlib, "import_module", refuse)
    with pytest.raises(ExportError) as caught:
        reparam.export(nn.ReLU().eval(), tmp_path / f"a{target.suffix}", TWO)
    assert str(caught.value).startswith(f"{target.title} needs the package {missing} (No module named")
    assert str(caught.value).endswith(f'pip install "reparam[{target.extra}]"')


# --- Complete or not at all ---------------------------------------------------------------------------------------


class Pieces(TorchExport):
    """A target of two files, that fails where it is told to."""

    companions = (".bin",)

    def __init__(self, fails: str = "", error: BaseException | None = None) -> None:
        self.fails, self.error = fails, error

    def write(self, program: Any, path: Path, options: Options) -> Written:
        path.with_suffix(".bin").write_text("half of it")
        if self.fails == "writing":
            raise self.error  # type: ignore[misc]
        super().write(program, path, options)
        return Written(Counter())

    def load(self, path: Path) -> nn.Module:
        if self.fails == "loading":
            raise self.error  # type: ignore[misc]
        loaded = super().load(path)
        return Net(
            lambda self, x: self.inner(x) * (1.001 if self.wrong else 1), inner=loaded, wrong=self.fails == "wrong"
        )


def using(monkeypatch: pytest.MonkeyPatch, target: Target) -> None:
    monkeypatch.setitem(TARGETS, "torch-export", target)


@pytest.mark.parametrize(
    ("fails", "error", "expected", "message"),
    [
        (
            "writing",
            RuntimeError("no such\noperator"),
            ExportError,
            "torch.export cannot express the model: Runtime",
        ),
        ("writing", OSError(28, "No space left on device"), ExportError, "a.pt2: cannot be written: No space left"),
        ("writing", KeyboardInterrupt(), KeyboardInterrupt, None),
        ("loading", ExportError("a.pt2: cannot load it"), ExportError, "cannot load it"),
        ("wrong", None, VerificationError, "torch.export and PyTorch: the models disagree: .*; nothing was written"),
    ],
)
def test_a_failure_leaves_everything_as_it_was(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fails: str,
    error: BaseException | None,
    expected: type[BaseException],
    message: str | None,
) -> None:
    using(monkeypatch, Pieces(fails, error))
    for older in (False, True):
        if older:
            (tmp_path / "a.pt2").write_text("older graph")
            (tmp_path / "a.bin").write_text("older weights")
        before = {path.name: path.read_text() for path in tmp_path.iterdir()}
        with pytest.raises(expected, match=message) as caught:
            reparam.export(nn.ReLU().eval(), tmp_path / "a.pt2", TWO)
        assert {path.name: path.read_text() for path in tmp_path.iterdir()} == before
        assert not isinstance(caught.value, ReparamError) or "\n" not in str(caught.value)
    if isinstance(caught.value, VerificationError):
        assert caught.value.comparison is not None
        assert caught.value.comparison.largest_error == pytest.approx(1e-3, rel=0.01)


def test_older_files_are_replaced_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    using(monkeypatch, Pieces())
    (tmp_path / "a.pt2").write_text("older graph")
    (tmp_path / "a.bin").write_text("older weights")
    exported = reparam.export(nn.ReLU().eval(), tmp_path / "a.pt2", TWO)
    assert exported.files == (tmp_path / "a.pt2", tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_text() == "half of it"
    assert set(tmp_path.iterdir()) == set(exported.files)
    assert torch.equal(Flat(TorchExport().load(tmp_path / "a.pt2"))(TWO)[0], TWO.relu())


def test_companions_are_no_less_protected(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_text("a checkpoint")
    with pytest.raises(ExportError, match=r"a\.bin: is the input, which is never overwritten"):
        TARGETS["openvino"].check_destination(tmp_path / "a.xml", never=(tmp_path / "a.bin",))
    (tmp_path / "b.bin").mkdir()
    with pytest.raises(ExportError, match=r"b\.bin: is not an ordinary file"):
        TARGETS["openvino"].check_destination(tmp_path / "b.xml")


def test_a_folder_of_something_else_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.mlpackage").mkdir()
    (tmp_path / "a.mlpackage" / "thesis.tex").touch()
    with pytest.raises(ExportError, match="is not a package of an earlier export"):
        TARGETS["coreml"].check_destination(tmp_path / "a.mlpackage")


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="there is no folder"):
        reparam.export(nn.ReLU().eval(), tmp_path / "none" / "a.pt2", TWO)

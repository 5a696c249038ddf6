"""``reparam fuse`` and ``reparam explain`` for people who have nothing of a network but an exported graph."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.filesize import decimal

from reparam.cli.files import Reading
from reparam.cli.shell import Bar, counts_table, print_json, stdout
from reparam.errors import ReparamError, VerificationError

if TYPE_CHECKING:
    from reparam.onnx import FusedOnnx


def is_onnx(path: Path) -> bool:
    """Whether a file is to be read as an ONNX graph."""
    return path.suffix == ".onnx"


def fuse_graph(
    path: Path, output: Path | None, how: Reading, *, freeze: bool, verify: bool, as_json: bool, quiet: bool
) -> None:
    """Fuse an ONNX graph into another one."""
    _check_options(path, how)
    output = output or path.with_name(f"{path.stem}_deploy.onnx")
    with Bar(quiet) as bar:
        fused = _fuse(path, output, how, freeze, verify, bar)
    if as_json:
        print_json({**_about(path, fused), "output": str(output), "report": fused.report.to_dict()})
    elif not quiet:
        stdout().print(counts_table(fused.report.to_dict()))
        print(f"before and after, in onnxruntime: {fused.report.comparison or 'not compared'}")
        before, after = fused.nodes
        size = decimal(output.stat().st_size)
        print(f"{output}: opset {fused.opset}, {before} operators before and {after} after, {size}")
        for remark in fused.report.remarks:
            if remark.kind == "capture":
                print(f"note: {remark.message}")


def explain_graph(path: Path, how: Reading, *, freeze: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """What would be done to an ONNX graph: about the input, and the report."""
    _check_options(path, how)
    with Bar() as bar:
        fused = _fuse(path, None, how, freeze, False, bar)
    return _about(path, fused), fused.report.to_dict()


def _fuse(path: Path, output: Path | None, how: Reading, freeze: bool, verify: bool, bar: Bar) -> FusedOnnx:
    from reparam.onnx import fuse_onnx

    try:
        return fuse_onnx(path, output, input_size=how.shape, freeze_inputs=freeze, verify=verify, progress=bar)
    except VerificationError as error:
        raise VerificationError(f"{path}: {error}", error.comparison) from error


def _check_options(path: Path, how: Reading) -> None:
    given = {"--model": how.model is not None, "--ema": how.ema, "--unsafe-load": how.unsafe}
    for name, is_given in given.items():
        if is_given:
            raise ReparamError(f"{path}: {name} is for checkpoints; an ONNX file has its network with it")


def _about(path: Path, fused: FusedOnnx) -> dict[str, Any]:
    before, after = fused.nodes
    return {"input": str(path), "model": None, "onnx": {"opset": fused.opset, "nodes_before": before, "nodes": after}}

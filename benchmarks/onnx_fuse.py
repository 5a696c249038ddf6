"""What five ways of optimising leave of the training graphs that PyTorch's two ONNX exporters write.

    python benchmarks/onnx_fuse.py [--models NAME ...] [--exporters torchscript dynamo] [--markdown] [--json FILE]

Exported with constant folding off, and without the exporters' own optimisers, so that every norm and branch is in the
file, as it is in files exported in training mode. Each way gets the file and nothing else. What it makes of it is run
in onnxruntime with all of its optimisations off, on two batch sizes, and compared with the file itself.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import onnxsim
import onnxslim
import torch
from rich.table import Table
from torch import Tensor, nn

import reparam
from common import cell, console, parser, training_model, write_json
from reparam.onnx import fuse_onnx
from reparam.targets.target import quiet

MODELS = ["repvit_m0_9", "repvgg_a0", "mobileone_s0"]
CONVOLUTIONS = ("Conv", "FusedConv", "NhwcFusedConv", "ConvTranspose")
WRONG = 1e-4  # of the largest output


@dataclass(frozen=True)
class Outcome:
    """What one way made of one file, or why it made nothing."""

    convolutions: int = 0
    norms: int = 0
    nodes: int = 0  # all of them, views and constants, too
    error: float = 0.0
    failure: str = ""

    def __str__(self) -> str:
        return cell((self.convolutions, self.norms, self.nodes), self.error, self.failure, WRONG)


def torchscript(model: nn.Module, image: Tensor, path: Path) -> None:
    axes = {"image": {0: "batch"}, "logits": {0: "batch"}}
    torch.onnx.export(
        model, (image,), str(path), dynamo=False, do_constant_folding=False, training=torch.onnx.TrainingMode.EVAL,
        input_names=["image"], output_names=["logits"], dynamic_axes=axes,
    )  # fmt: skip


def dynamo(model: nn.Module, image: Tensor, path: Path) -> None:
    program = torch.onnx.export(
        model, (torch.cat([image, image]),), dynamo=True, optimize=False, verbose=False, input_names=["image"],
        output_names=["logits"], dynamic_shapes=({0: torch.export.Dim("batch")},),
    )  # fmt: skip
    assert program is not None
    program.save(str(path), external_data=False)


EXPORTERS: dict[str, Callable[[nn.Module, Tensor, Path], None]] = {"torchscript": torchscript, "dynamo": dynamo}


def as_is(source: Path, result: Path) -> None:
    result.write_bytes(source.read_bytes())


def with_onnxsim(source: Path, result: Path) -> None:
    simplified, _ = onnxsim.simplify(onnx.load(source))
    onnx.save(simplified, result)


def with_onnxslim(source: Path, result: Path) -> None:
    onnx.save(onnxslim.slim(onnx.load(source)), result)


def with_onnxruntime(source: Path, result: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(result)
    onnxruntime.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])


def with_reparam(source: Path, result: Path) -> None:
    fuse_onnx(source, result)


WAYS: dict[str, Callable[[Path, Path], None]] = {
    "as exported": as_is,
    "onnxsim": with_onnxsim,
    "onnxslim": with_onnxslim,
    "onnxruntime": with_onnxruntime,
    "reparam fuse": with_reparam,
}


def run(path: Path, image: Any) -> Any:
    """What a file computes, node by node."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]).run(
        None, {"image": image}
    )[0]


def outcome(way: Callable[[Path, Path], None], source: Path, result: Path, images: list[Any]) -> Outcome:
    try:
        way(source, result)
        kinds = [node.op_type for node in onnx.load(result).graph.node]
        pairs = [(run(source, image), run(result, image)) for image in images]
        error = max(float(np.abs(old - new).max() / np.abs(old).max()) for old, new in pairs)
    except Exception as exception:  # whatever a tool raises is its result
        return Outcome(failure=f"{type(exception).__name__}: {str(exception).partition(chr(10))[0]}")
    return Outcome(sum(map(kinds.count, CONVOLUTIONS)), kinds.count("BatchNormalization"), len(kinds), error)


def measure(name: str, exporters: list[str], folder: Path) -> tuple[dict[str, dict[str, Outcome]], int]:
    """What every way leaves of every export of a model, and the convolutions that compiling it leaves."""
    model, image = training_model(name)
    images = [image.numpy(), torch.randn(3, *image.shape[1:], generator=torch.Generator().manual_seed(1)).numpy()]
    found = {}
    for exporter in exporters:
        source = folder / f"{name}_{exporter}.onnx"
        with quiet():
            EXPORTERS[exporter](model, image, source)
            found[exporter] = {
                label: outcome(way, source, folder / "result.onnx", images) for label, way in WAYS.items()
            }
    compiled: Any = reparam.compile(model, image, verify=False)
    return found, compiled.report.after.convolutions


def rows(results: dict[str, Any]) -> list[list[str]]:
    return [
        [name, exporter, *map(str, outcomes.values()), str(convolutions), f"{outcomes['reparam fuse'].error:.0e}"]
        for name, (found, convolutions) in results.items()
        for exporter, outcomes in found.items()
    ]


COLUMNS = ["model", "exporter", *WAYS, "reparam.compile", "difference"]


def main() -> None:
    options = parser("Count what ways of optimising leave of exported training graphs.", MODELS)
    options.add_argument("--exporters", nargs="+", default=list(EXPORTERS), choices=list(EXPORTERS))
    options.add_argument("--markdown", action="store_true", help="print a Markdown table")
    arguments = options.parse_args()
    torch.set_num_threads(arguments.threads)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.models:
            with console.status(name):
                results[name] = measure(name, arguments.exporters, Path(folder))
    if arguments.markdown:
        print("\n".join("| " + " | ".join(row) + " |" for row in [COLUMNS, ["---"] * len(COLUMNS), *rows(results)]))
    else:
        caption = "convolutions / norms / nodes; convolutions of the network compiled in PyTorch; reparam's difference"
        table = Table(*COLUMNS, title="What is left of a training graph", caption=caption)
        for row in rows(results):
            table.add_row(*(f"[red]{cell}[/]" if "fails" in cell or "WRONG" in cell else cell for cell in row))
        console.print(table)
    write_json(
        arguments.json,
        {
            name: {"compiled": convolutions}
            | {exporter: {label: asdict(o) for label, o in ways.items()} for exporter, ways in found.items()}
            for name, (found, convolutions) in results.items()
        },
    )


if __name__ == "__main__":
    main()

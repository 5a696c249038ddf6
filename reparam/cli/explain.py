"""``reparam explain``: what would be fused, and what would not."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from reparam.cli.files import Reading, about_input, deploy_metadata, inputs_of, parse_shape, read, resolve
from reparam.cli.onnx_graph import explain_graph, is_onnx
from reparam.cli.shell import (
    Bar,
    Debug,
    Ema,
    FreezeInputs,
    InputSize,
    Json,
    Model,
    UnsafeLoad,
    counts_table,
    print_json,
    stdout,
)
from reparam.errors import ReparamError


def explain(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CKPT", help="Training checkpoint, .onnx, or a deploy file that reparam wrote.")
    ],
    model: Model = None,
    input_size: InputSize = None,
    unsafe_load: UnsafeLoad = False,
    ema: Ema = False,
    freeze_inputs: FreezeInputs = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Say what would be fused and what would not, and why; write nothing.

    For a deploy file: what was fused when it was made.
    """
    how = Reading(model, parse_shape(input_size), unsafe_load, ema)
    if is_onnx(checkpoint):
        about, report = explain_graph(checkpoint, how, freeze=freeze_inputs)
    else:
        about, report = _read(checkpoint, how)
    if as_json:
        print_json({**about, "report": report})
    else:
        _print_remarks(
            f"{checkpoint}: {about['model'] or ('ONNX graph' if 'onnx' in about else 'compiled model')}", report
        )


def _read(checkpoint: Path, how: Reading) -> tuple[dict[str, Any], dict[str, Any]]:
    """About a checkpoint or deploy file, and its report."""
    with Bar() as bar:
        import reparam

        metadata = deploy_metadata(checkpoint, how)
        if metadata is not None:
            if "report" not in metadata:
                raise ReparamError(f"{checkpoint}: was saved without a report of its compilation")
            about, report = {"input": str(checkpoint), "model": metadata.get("model")}, metadata["report"]
        else:
            source = read(checkpoint, how)
            network = resolve(source, how)
            bar(None, None, f"compiling {network.name}")
            about = about_input(checkpoint, source, network)
            report = reparam.explain(network.model, inputs_of(network, how)).to_dict()
    return about, report


def _print_remarks(title: str, report: dict[str, Any]) -> None:
    console = stdout()
    console.print(title)
    console.print(counts_table(report))
    for kind in ("capture", "fused", "missed"):
        remarks = [remark for remark in report["remarks"] if remark["kind"] == kind]
        if remarks:
            print(f"{kind}: {len(remarks)}")
        for remark in remarks:
            print(f"  {remark['where'] or '(model)'}: {remark['message']} [{remark['rule']}]")

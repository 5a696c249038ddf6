"""``reparam explain``: what would be fused, and what would not."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from reparam.cli.files import Reading, about_input, deploy_metadata, inputs_of, parse_shape, read, resolve
from reparam.cli.shell import (
    Bar,
    Debug,
    Ema,
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
        Path, typer.Argument(metavar="CKPT", help="Training checkpoint, or a deploy file that reparam wrote.")
    ],
    model: Model = None,
    input_size: InputSize = None,
    unsafe_load: UnsafeLoad = False,
    ema: Ema = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Say what would be fused and what would not, and why; write nothing.

    For a deploy file: what was fused when it was made.
    """
    how = Reading(model, parse_shape(input_size), unsafe_load, ema)
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
    if as_json:
        print_json({**about, "report": report})
    else:
        _print_remarks(f"{checkpoint}: {about['model'] or 'compiled model'}", report)


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

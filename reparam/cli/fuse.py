"""``reparam fuse``: a checkpoint to a deploy model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.filesize import decimal

from reparam.cli.export import (
    TARGET_SUFFIXES,
    check_output,
    ends_like_a_target,
    exported_dict,
    print_exported,
)
from reparam.cli.files import Reading, about_input, compiled, example_of, inputs_of, parse_shape, read, resolve
from reparam.cli.shell import (
    Bar,
    Debug,
    Ema,
    InputSize,
    Json,
    Model,
    Quiet,
    UnsafeLoad,
    counts_table,
    print_json,
    stdout,
)
from reparam.errors import ReparamError

if TYPE_CHECKING:
    from torch import nn

    from reparam.checkpoint import Network
    from reparam.export import Exported
    from reparam.report import Report

DEPLOY_SUFFIXES = (".pth", ".pt", ".safetensors")


def fuse(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CKPT", help="Training checkpoint (.pth, .pt, .safetensors), or .pt2.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            help=".pth, .safetensors, or a runtime's. [default: NAME_deploy.pth beside the input]",
        ),
    ] = None,
    model: Model = None,
    input_size: InputSize = None,
    unsafe_load: UnsafeLoad = False,
    ema: Ema = False,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Write without checking anything.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Compile the network in a checkpoint, verify it, and write the deploy model.

    The input file is never changed, and the output appears complete or not at all.
    """
    output = output or checkpoint.with_name(f"{checkpoint.stem}_deploy.pth")
    if output.suffix not in DEPLOY_SUFFIXES and not ends_like_a_target(output):
        raise ReparamError(f"{output}: the output must end in {', '.join((*DEPLOY_SUFFIXES, *TARGET_SUFFIXES))}")
    how = Reading(model, parse_shape(input_size), unsafe_load, ema)
    with Bar(quiet) as bar:
        source = read(checkpoint, how)
        check_output(output, checkpoint)
        network = resolve(source, how)
        inputs = example_of(network, how) if ends_like_a_target(output) else inputs_of(network, how)
        deploy = compiled(checkpoint, network, inputs, not no_verify, bar)
        bar(None, None, f"writing {output.name}")
        exported = _write(deploy, network, output, inputs, bar)
    report = cast("Report", deploy.report)
    if as_json:
        about = {**about_input(checkpoint, source, network), "output": str(output)}
        export = {} if exported is None else {"export": exported_dict(exported)}
        print_json(about | export | {"report": report.to_dict()})
    elif not quiet:
        _print_fused(checkpoint, network, output, report, exported)


def _write(deploy: nn.Module, network: Network, output: Path, inputs: Any, bar: Bar) -> Exported | None:
    if ends_like_a_target(output):
        from reparam.export import export

        return export(deploy, output, inputs, progress=bar)
    from reparam.storage import save

    save(deploy, output, metadata={"model": network.name, "input_shape": network.input_shape})
    return None


def _print_fused(path: Path, network: Network, output: Path, report: Report, exported: Exported | None) -> None:
    console = stdout()
    console.print(f"{path} is {network.name}")
    console.print(counts_table(report.to_dict()))
    print(f"before and after: {report.comparison or 'not compared'}")
    if exported is not None:
        print_exported(exported)
    else:
        print(f"{output}: {decimal(output.stat().st_size)}")

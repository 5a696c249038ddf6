"""``reparam fuse``: a checkpoint to a deploy model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.filesize import decimal

from reparam import targets
from reparam.cli.export import check_output, exported_dict, print_exported
from reparam.cli.files import (
    Reading,
    about_input,
    ask_for_shape,
    compiled,
    example_of,
    inputs_of,
    parse_shape,
    read,
    resolve,
)
from reparam.cli.onnx_graph import fuse_graph, is_onnx
from reparam.cli.shell import (
    Bar,
    Debug,
    Ema,
    FreezeInputs,
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

    from reparam.files.checkpoint import Network
    from reparam.report import Report
    from reparam.targets import Exported

DEPLOY_SUFFIXES = (".pth", ".pt", ".safetensors")


def fuse(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CKPT", help="Training checkpoint (.pth, .pt, .safetensors), .pt2 or .onnx.")
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
    optimize: Annotated[
        str, typer.Option("--optimize", metavar="size|latency", help="What to optimise; latency times on this machine.")
    ] = "size",
    decisions: Annotated[
        Path | None,
        typer.Option("--decisions", metavar="FILE", help="Replay what was timed before, and keep what is timed now."),
    ] = None,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Write without checking anything.")] = False,
    freeze_inputs: FreezeInputs = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Compile the network in a checkpoint, verify it, and write the deploy model.

    The input file is never changed, and the output appears complete or not at all.
    """
    if optimize not in ("size", "latency"):
        raise ReparamError(f"--optimize {optimize} is not known; use size or latency")
    if decisions is not None and optimize == "size":
        raise ReparamError("--decisions is about what is timed; it needs --optimize latency")
    how = Reading(model, parse_shape(input_size), unsafe_load, ema)
    if is_onnx(checkpoint):
        if optimize == "latency":
            raise ReparamError(f"{checkpoint}: --optimize latency times PyTorch; leave it out for an ONNX graph")
        return fuse_graph(
            checkpoint, output, how, freeze=freeze_inputs, verify=not no_verify, as_json=as_json, quiet=quiet
        )
    output = output or checkpoint.with_name(f"{checkpoint.stem}_deploy.pth")
    if output.suffix not in DEPLOY_SUFFIXES and not targets.is_target(output):
        suffixes = *DEPLOY_SUFFIXES, *(target.suffix for target in targets.TARGETS.values())
        raise ReparamError(f"{output}: the output must end in {', '.join(suffixes)}")
    with Bar(quiet) as bar:
        source = read(checkpoint, how)
        check_output(output, checkpoint)
        if decisions is not None:
            check_output(decisions, checkpoint)
            if decisions.resolve() == output.resolve():
                raise ReparamError(f"{output}: is named for the output and for the decisions; choose another name")
        network = resolve(source, how)
        inputs = example_of(network, how) if targets.is_target(output) else inputs_of(network, how)
        if optimize == "latency" and inputs is None:
            ask_for_shape(network.name, "time")
        deploy = compiled(
            checkpoint, network, inputs, bar, verify=not no_verify, optimize=optimize, decisions=decisions
        )
        bar(None, None, f"writing {output.name}")
        exported = _write(deploy, network, output, inputs, bar)
    report = cast("Report", deploy.report)
    if as_json:
        about = {**about_input(checkpoint, source, network), "output": str(output)}
        export = {} if exported is None else {"export": exported_dict(exported)}
        print_json(about | export | {"report": report.to_dict()})
    elif not quiet:
        _print_fused(checkpoint, network, output, report, exported)
    return None


def _write(deploy: nn.Module, network: Network, output: Path, inputs: Any, bar: Bar) -> Exported | None:
    if targets.is_target(output):
        return targets.export(deploy, output, inputs, progress=bar)
    from reparam.files.deploy import save

    save(deploy, output, metadata={"model": network.name, "input_shape": network.input_shape})
    return None


def _print_fused(path: Path, network: Network, output: Path, report: Report, exported: Exported | None) -> None:
    console = stdout()
    console.print(f"{path} is {network.name}")
    console.print(counts_table(report.to_dict()))
    print(f"before and after: {report.comparison or 'not compared'}")
    for remark in report.remarks:
        if remark.kind == "timed":
            print(f"timed: {remark.where or 'the model'}: {remark.message}")
    if exported is not None:
        print_exported(exported)
    else:
        print(f"{output}: {decimal(output.stat().st_size)}")

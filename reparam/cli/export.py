"""``reparam export``: a checkpoint or a deploy file to what a runtime reads."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.filesize import decimal

from reparam import targets
from reparam.cli.files import (
    Reading,
    about_input,
    ask_for_shape,
    compiled,
    deploy_metadata,
    example_of,
    parse_shape,
    random_inputs,
    read,
    resolve,
)
from reparam.cli.shell import Bar, Debug, Ema, InputSize, Json, Model, Quiet, UnsafeLoad, new_table, print_json, stdout
from reparam.errors import ReparamError
from reparam.targets import is_target, target_of

if TYPE_CHECKING:
    from torch import nn

    from reparam.targets import Exported, ImageInput


def export(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CKPT", help="Training checkpoint, a deploy file that reparam wrote, or .pt2.")
    ],
    output: Annotated[
        Path,
        typer.Option(
            "-o",
            "--output",
            help=".onnx, .xml (OpenVINO), .pte (ExecuTorch), .mlpackage (Core ML), .pt2 (torch.export) or .aoti.pt2.",
        ),
    ],
    target: Annotated[
        str | None, typer.Option("--target", metavar="NAME", help="Such as aotinductor. [default: by the suffix]")
    ] = None,
    model: Model = None,
    input_size: InputSize = None,
    opset: Annotated[int | None, typer.Option("--opset", help="Of ONNX. [default: the exporter's]")] = None,
    dynamic_batch: Annotated[
        bool | None,
        typer.Option("--dynamic-batch/--fixed-batch", help="Any batch size, or one only. [default: the target's]"),
    ] = None,
    dynamic_size: Annotated[bool, typer.Option("--dynamic-size", help="Images of any size.")] = False,
    half: Annotated[bool, typer.Option("--half", help="Half precision.")] = False,
    image_mean: Annotated[
        str | None, typer.Option(metavar="R,G,B", help="Core ML reads an image; what training subtracted (of 1).")
    ] = None,
    image_std: Annotated[str | None, typer.Option(metavar="R,G,B", help="What training divided by.")] = None,
    unsafe_load: UnsafeLoad = False,
    ema: Ema = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write the deploy model for a runtime, run it there, and compare.

    A training checkpoint is fused first. The output appears complete or not at all.
    """
    image = _image(image_mean, image_std)
    how = Reading(model, parse_shape(input_size), unsafe_load, ema)
    with Bar(quiet) as bar:
        chosen = target_of(output, target)
        chosen.check_destination(output, never=(checkpoint,))
        chosen.require()
        deploy, inputs, about = _deploy_model(checkpoint, how, bar)
        exported = targets.export(
            deploy,
            output,
            inputs,
            target=target,
            opset=opset,
            dynamic_batch=dynamic_batch,
            dynamic_size=dynamic_size,
            half=half,
            image=image,
            progress=bar,
        )
    if as_json:
        print_json({**about, "output": str(output), "export": exported_dict(exported)})
    elif not quiet:
        stdout().print(f"{checkpoint} is {about['model'] or 'a compiled model'}")
        print_exported(exported)


def check_output(output: Path, checkpoint: Path) -> None:
    """Refuse an output that cannot be written, or would replace the input, before any work is done."""
    from reparam.atomic import check_destination

    if not is_target(output):
        check_destination(output, never=(checkpoint,))
        return
    chosen = target_of(output)
    chosen.check_destination(output, never=(checkpoint,))
    chosen.require()


def exported_dict(exported: Exported) -> dict[str, Any]:
    """What was written, for programs."""
    files = {"path": str(exported.path), "files": list(map(str, exported.files)), "bytes": exported.size}
    return {**asdict(exported), **files}


def print_exported(exported: Exported) -> None:
    """What was written, for people."""
    details = (f", {name.replace('_', ' ')} {_said(value)}" for name, value in exported.details.items())
    inputs = (f"{name} {' x '.join(map(str, shape))}" for name, shape in exported.inputs.items())
    operators = (f"{count} {name}" for name, count in exported.operators.items())
    table = new_table("exported", "")
    table.add_row("for", f"{exported.target}, {exported.precision}{''.join(details)}")
    table.add_row("inputs", ", ".join(inputs))
    table.add_row("operators", ", ".join(operators))
    table.add_row(f"PyTorch and {exported.runtime}" + ("" if exported.ran else " (weights)"), str(exported.comparison))
    stdout().print(table)
    print(f"{' and '.join(map(str, exported.files))}: {decimal(exported.size)}")


def _said(value: Any) -> str:
    match value:
        case bool():
            return "yes" if value else "no"
        case dict():
            return " ".join(f"{count} {name}" for name, count in value.items()) or "none"
        case _:
            return str(value)


def _deploy_model(path: Path, how: Reading, bar: Bar) -> tuple[nn.Module, Any, dict[str, Any]]:
    """The compiled model in a file, inputs to export it with, and what it is."""
    from reparam.files import deploy

    metadata = deploy_metadata(path, how)
    if metadata is not None:
        shape = how.shape or tuple(metadata.get("input_shape") or ()) or None
        if shape is None:
            ask_for_shape(str(path), "export")
        name = metadata.get("model")
        return deploy.load(path), random_inputs(shape), {"input": str(path), "model": name, "input_shape": list(shape)}
    source = read(path, how)
    network = resolve(source, how)
    inputs = example_of(network, how)
    return compiled(path, network, inputs, bar), inputs, about_input(path, source, network)


def _image(mean: str | None, std: str | None) -> ImageInput | None:
    if mean is None and std is None:
        return None
    if mean is None or std is None:
        raise ReparamError("--image-mean and --image-std belong together")
    from reparam.targets import ImageInput

    return ImageInput(_numbers("--image-mean", mean), _numbers("--image-std", std))


def _numbers(option: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(map(float, text.split(",")))
    except ValueError:
        raise ReparamError(f"{option} {text}: must be numbers such as 0.485,0.456,0.406") from None

"""``reparam report``: a page about a compilation."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from reparam.cli.files import Reading, compiled, deploy_metadata, inputs_of, parse_shape, read, resolve
from reparam.cli.shell import Bar, Debug, Ema, InputSize, Model, Quiet, UnsafeLoad
from reparam.errors import ModelError, ReparamError

if TYPE_CHECKING:
    from reparam.files.checkpoint import Network
    from reparam.page.page import Chart


def report(
    source: Annotated[
        str,
        typer.Argument(
            metavar="CKPT|MODEL",
            help="Training checkpoint or .pt2; or a known model, timm:NAME or package.module:factory (random weights).",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Where to; NAME_report.html, beside a checkpoint, when left out."),
    ] = None,
    model: Model = None,
    input_size: InputSize = None,
    bench: Annotated[
        Path | None, typer.Option(metavar="JSON", help="Also chart what reparam bench --json printed.")
    ] = None,
    no_latency: Annotated[bool, typer.Option("--no-latency", help="Time nothing.")] = False,
    unsafe_load: UnsafeLoad = False,
    ema: Ema = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Compile a network, and write one HTML page on what was done to it.

    The page has every distinct block before and after, the counts, the remarks, the verification, and latencies. It
    needs no network and no scripts.
    """
    how = Reading(model, parse_shape(input_size), unsafe_load, ema)
    file = Path(source)
    is_file = file.exists() or model is not None or file.suffix in (".pth", ".pt", ".safetensors", ".pt2")
    if output is None:
        output = file.with_name(f"{file.stem}_report.html") if is_file else Path(f"{source.split(':')[-1]}_report.html")
    if output.suffix not in (".html", ".htm"):
        raise ReparamError(f"{output}: the output must end in .html")
    with Bar(quiet) as bar:
        from reparam.atomic import check_destination
        from reparam.page import page

        network = _open(file, how) if is_file else _build(source, how)
        check_destination(output, never=(file,) if is_file else ())
        charts = [] if bench is None else [_read_bench(bench)]
        inputs = inputs_of(network, how)
        deploy = compiled(source, network, inputs, bar)
        if inputs is not None and not no_latency:
            bar(None, None, "timing")
            charts.insert(0, page.time(network.model, deploy, inputs))
        bar(None, None, f"writing {output.name}")
        title = f"{file.name}: {network.name}" if is_file else network.name
        page.write(output, network.model, deploy, inputs, title=title, charts=charts)
    if not quiet:
        print(f"{output}: {network.name} before and after compiling")


def _open(path: Path, how: Reading) -> Network:
    if path.is_file() and deploy_metadata(path, how) is not None:
        raise ReparamError(
            f"{path}: is a deploy file, which says nothing of the network before; give the training checkpoint, or "
            "see reparam explain"
        )
    return resolve(read(path, how), how)


def _build(spec: str, how: Reading) -> Network:
    from reparam.files.checkpoint import build

    try:
        network = build(spec)
    except ModelError as error:
        if ":" in spec:
            raise
        raise ModelError(f"{spec} is no file, and no known network: {error}") from error
    return network if how.shape is None else replace(network, input_shape=how.shape)


def _read_bench(path: Path) -> Chart:
    from reparam.page.page import chart_of

    try:
        return chart_of(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ReparamError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise ReparamError(f"{path}: is no JSON: {error}") from error
    except ReparamError as error:
        raise ReparamError(f"{path}: {error}") from error

"""``reparam bench``: how fast a model is where it runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from reparam.cli.files import Reading, ask_for_shape, parse_shape, random_inputs, read, resolve
from reparam.cli.shell import Bar, Debug, Ema, InputSize, Json, Model, UnsafeLoad, new_table, print_json, stdout
from reparam.errors import ModelError, ReparamError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from reparam.bench import Benchmark, Row
    from reparam.files.checkpoint import Network

# Whose networks have a conversion of their own, by how they are named here.
_PEERS = {"timm:": "timm.utils.model:reparameterize_model"}


def bench(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|CKPT", help="A known model, timm:NAME or package.module:factory (random weights), or a file."
        ),
    ],
    network: Model = None,
    input_size: InputSize = None,
    batch: Annotated[int, typer.Option(min=1, help="Inputs in one inference.")] = 1,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads, the same for all.")] = 1,
    runtimes: Annotated[
        str | None, typer.Option(metavar="NAME,...", help="Which to measure, such as eager,onnxruntime. [default: all]")
    ] = None,
    optimize: Annotated[
        list[str] | None,
        typer.Option(metavar="size|latency", help="What to compile for; several are compared. [default: size]"),
    ] = None,
    peer: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:FUNCTION",
            help="Somebody else's conversion to compare with. [default: timm's for timm:NAME]",
        ),
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="How often each is timed. [default: as --min-time allows]")
    ] = None,
    min_time: Annotated[float, typer.Option(min=0.0, metavar="SECONDS", help="How long to measure, at least.")] = 20.0,
    device: Annotated[str, typer.Option(metavar="cpu|cuda", help="Where to compute.")] = "cpu",
    half: Annotated[bool, typer.Option("--half", help="Compute in float16 (CUDA only).")] = False,
    clock: Annotated[
        str, typer.Option(metavar="wall|processor", help="What counts; on a busy machine, processor with one thread.")
    ] = "wall",
    no_memory: Annotated[
        bool, typer.Option("--no-memory", help="Leave out memory, which takes a process for each row.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Also draw a chart: .png, .svg or .pdf.")] = None,
    unsafe_load: UnsafeLoad = False,
    ema: Ema = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Time a model as trained, compiled, and as a peer deploys it, in every runtime, side by side.

    All have their turn in every round, beside matrix products that tell what the machine could do at that moment.
    """
    how = Reading(network, parse_shape(input_size), unsafe_load, ema)
    with Bar() as bar:
        from reparam.atomic import check_destination
        from reparam.bench import Settings, graphs_of, race

        names = None if runtimes is None else [name.strip() for name in runtimes.split(",")]
        settings = Settings(names, threads, rounds, min_time, not no_memory, device, half, clock)
        if plot is not None:
            from reparam.bench import plot as drawing

            drawing.require(plot)
            check_destination(plot)
        subject = _subject(model, how)
        if subject.input_shape is None:
            ask_for_shape(subject.name, "measure")
        inputs = (random_inputs(subject.input_shape, batch),)
        graphs = graphs_of(
            _module(subject), inputs, peer=_peer(peer, subject), optimize=optimize or ("size",), progress=bar
        )
        result = race(graphs, inputs, settings, bar)
        if plot is not None:
            drawing.draw(result, plot, subject.name)
    if as_json:
        print_json({"model": subject.name, **result.to_dict()})
    else:
        print_table(subject.name, result)


def _subject(model: str, how: Reading) -> Network:
    """What the argument names: a file if there is one of that name, else a network with random weights."""
    from dataclasses import replace

    from reparam.files.checkpoint import build

    path = Path(model)
    if path.is_file() or how.model is not None:
        return resolve(read(path, how), how)
    try:
        network = build(model)
    except ModelError as error:
        if path.suffix in (".pth", ".pt", ".safetensors", ".pt2"):
            raise ReparamError(f"{path}: no such file") from error
        raise
    return network if how.shape is None else replace(network, input_shape=how.shape)


def _module(network: Network) -> nn.Module:
    from torch import nn

    if not isinstance(network.model, nn.Module):
        raise ReparamError(f"{network.name} cannot be measured as trained; name its network with --model")
    return network.model


def _peer(spec: str | None, network: Network) -> Callable[[nn.Module], nn.Module] | None:
    from reparam.errors import first_line
    from reparam.files.checkpoint import import_attribute

    spec = spec or next((peer for prefix, peer in _PEERS.items() if network.name.startswith(prefix)), None)
    if spec is None:
        return None
    if ":" not in spec:
        raise ReparamError(f"--peer {spec} is no function such as package.module:function")
    try:
        function: Callable[[nn.Module], nn.Module] = import_attribute(spec)
    except Exception as error:
        raise ReparamError(f"--peer {spec} failed with {type(error).__name__}: {first_line(error)}") from error
    return function


def print_table(name: str, result: Benchmark) -> None:
    """A row for every graph in every runtime, and what was not measured below."""
    reference = result.rows[0].graph
    table = new_table(
        "runtime", "graph", "median", "quartiles", f"of {reference}", "of peak", "memory", "size", "error",
        right=range(2, 9),
    )  # fmt: skip
    for row in result.rows:
        table.add_row(row.runtime, row.graph, *_cells(result, row, reference))
    console = stdout()
    console.print(f"{name}: {result.conditions}")
    console.print(table)
    for row in result.rows:
        if row.failure or row.memory_failure:
            console.print(f"{row.graph} in {row.runtime}: {row.failure or f'memory: {row.memory_failure}'}")
    print(f"matrix-product peak: {result.peak / 1e9:.0f} GFLOP/s; of peak: 2 x multiply-adds / median time, over that")
    print(f"of {reference}: median, over the rounds, of the ratio within a round")


def _cells(result: Benchmark, row: Row, reference: str) -> list[str]:
    """What was measured of a row, as text."""
    from rich.filesize import decimal

    time = row.timing
    if time is None:
        return ["-"] * 7
    ratio, fraction = result.ratio(row.runtime, row.graph, reference), result.of_peak(row)
    return [
        f"{time.median * 1e3:.2f} ms",
        f"{time.low * 1e3:.2f} to {time.high * 1e3:.2f}",
        "-" if ratio is None else f"{ratio.median:.2f}",
        f"{fraction:.0%}",
        "-" if row.memory is None else decimal(row.memory),
        "-" if row.size is None else decimal(row.size),
        f"{row.error:.0e}",
    ]

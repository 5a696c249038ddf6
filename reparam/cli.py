"""The ``reparam`` command: fuse a checkpoint, explain what would be fused, verify two files, list known models.

Results go to stdout, everything else to stderr. Exit codes: 0 done, 1 outputs disagree, 2 bad usage or input,
3 internal error, 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import functools
import json
import math
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar, cast

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from reparam.errors import CaptureError, ReparamError, VerificationError

# PyTorch takes two seconds to import, so what needs it is imported where it is used: --help answers at once.
if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.export import ExportedProgram

    from reparam.checkpoint import Checkpoint, Network
    from reparam.export import Exported
    from reparam.report import Report

_PATIENCE = 1.0  # seconds without a progress bar
CommandT = TypeVar("CommandT", bound=Callable[..., None])

app = typer.Typer(
    name="reparam",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done, 1 outputs disagree, 2 bad usage or input, 3 internal error, 130 interrupted.",
)

Model = Annotated[
    str | None,
    typer.Option(
        "--model", metavar="NAME", help="A known model, timm:NAME, or package.module:factory. [default: recognise]"
    ),
]
InputSize = Annotated[
    str | None, typer.Option("--input-size", metavar="CxHxW", help="Shape of one input, such as 3x224x224.")
]
UnsafeLoad = Annotated[
    bool, typer.Option("--unsafe-load", help="Unpickle Python objects: runs whatever code the file's author chose.")
]
Ema = Annotated[bool, typer.Option("--ema", help="Take the averaged (EMA) weights.")]
Json = Annotated[bool, typer.Option("--json", help="Print the report as JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def main() -> None:
    """Entry point of the ``reparam`` command."""
    signal.signal(signal.SIGTERM, _terminate)
    app()


def _terminate(number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + number)  # unwinds the stack, so that unfinished files are removed


def command(function: CommandT) -> CommandT:
    """Register a command; what goes wrong in it becomes one line on stderr and an exit code."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
            sys.stdout.flush()  # here, where a closed pipe is no crash
        except KeyboardInterrupt:
            _fail("interrupted", 130)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more when it exits
            raise typer.Exit(128 + signal.SIGPIPE) from None
        except VerificationError as error:
            _fail(str(error), 1, kwargs["debug"])
        except ReparamError as error:
            _fail(str(error), 2, kwargs["debug"])
        except Exception as error:  # the last resort of a program
            message = f"{type(error).__name__}: {error}; this is a bug, --debug shows where"
            _fail(message, 3, kwargs["debug"])

    app.command()(run)
    return function


def _fail(message: str, code: int, debug: bool = False) -> NoReturn:
    if debug:
        traceback.print_exc()
    print("error:", " ".join(message.split()), file=sys.stderr)
    raise typer.Exit(code)


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=lambda asked: _print_version(asked), help="Print it.")
    ] = False,
) -> None:
    """Fuse structural reparameterization out of trained PyTorch networks."""


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print("reparam", version("reparam"))
        raise typer.Exit


# --- Commands -----------------------------------------------------------------------------------------------------


@command
def fuse(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CKPT", help="Training checkpoint (.pth, .pt, .safetensors), or .pt2.")
    ],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help=".pth, .safetensors or .onnx. [default: NAME_deploy.pth beside the input]"),
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
    if output.suffix not in (".pth", ".pt", ".safetensors", ".onnx"):
        raise ReparamError(f"{output}: the output must end in .pth, .pt, .safetensors or .onnx")
    how = _Reading(model, _parse_shape(input_size), unsafe_load, ema)
    with _Bar(quiet) as bar:
        import reparam
        from reparam.storage import check_destination

        source = _read(checkpoint, how)
        check_destination(output, never=(checkpoint,))
        network = _resolve(source, how)
        inputs = _inputs(network, how)
        if output.suffix == ".onnx" and inputs is None:
            _ask_for_shape(network.name, "export")
        try:
            deploy = reparam.compile(network.model, inputs, verify=not no_verify, progress=bar)
        except VerificationError as error:
            raise VerificationError(f"{checkpoint}: {error}; nothing was written", error.comparison) from error
        except CaptureError as error:
            raise CaptureError(f"{checkpoint}: {error}") from error
        bar(None, None, f"writing {output.name}")
        exported = _write(deploy, network, output, inputs)
    report = cast("Report", deploy.report)
    if as_json:
        onnx = {} if exported is None else {"onnx": _onnx_dict(exported)}
        _print_json({**_about(checkpoint, source, network), "output": str(output), **onnx, "report": report.to_dict()})
    elif not quiet:
        _print_fused(checkpoint, network, output, report, exported)


@command
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
    how = _Reading(model, _parse_shape(input_size), unsafe_load, ema)
    with _Bar() as bar:
        import reparam

        metadata = _deploy_metadata(checkpoint, how)
        if metadata is not None:
            if "report" not in metadata:
                raise ReparamError(f"{checkpoint}: was saved without a report of its compilation")
            about, report = {"input": str(checkpoint), "model": metadata.get("model")}, metadata["report"]
        else:
            source = _read(checkpoint, how)
            network = _resolve(source, how)
            bar(None, None, f"compiling {network.name}")
            about = _about(checkpoint, source, network)
            report = reparam.explain(network.model, _inputs(network, how)).to_dict()
    if as_json:
        _print_json({**about, "report": report})
    else:
        _print_remarks(f"{checkpoint}: {about['model'] or 'compiled model'}", report)


@command
def verify(
    first: Annotated[Path, typer.Argument(metavar="A", help="The reference: a checkpoint, deploy file or .onnx.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="What must compute the same.")],
    model: Model = None,
    input_size: InputSize = None,
    tolerance: Annotated[
        float | None, typer.Option(min=0.0, help="Allowed largest error, relative to A's largest output.")
    ] = None,
    unsafe_load: UnsafeLoad = False,
    ema: Ema = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Compare two files on random inputs: a checkpoint and its deploy model, in any of the formats.

    A state dict that was fused elsewhere is compared as well, when its names are those of the other file's deploy form.
    """
    how = _Reading(model, _parse_shape(input_size), unsafe_load, ema)
    with _Bar(quiet) as bar:
        from reparam.verify import compare, run

        sides = _open_both((first, second), how)
        bar(None, None, "comparing")
        call = _shared_call((first, second), sides, how)
        reference, other = (_runnable(side.model) for side in sides)
        if ".onnx" in (first.suffix, second.suffix):
            from reparam.export import Flat

            reference, other, tolerance = Flat(reference), Flat(other), tolerance or 1e-4
        try:
            comparison, agree = compare(run(reference, *call), run(other, *call), tolerance), True
        except VerificationError as error:
            if error.comparison is None:
                raise
            comparison, agree = error.comparison, False
        except (RuntimeError, AssertionError) as error:  # the latter from an exported program
            shapes = " and ".join(_shape_text(x.shape) for x in (*call[0], *call[1].values()) if hasattr(x, "shape"))
            raise ReparamError(f"inputs of {shapes} do not fit {first} or {second}: {error}") from error
    if as_json:
        error_or_null = comparison.largest_error if math.isfinite(comparison.largest_error) else None
        measured = {**asdict(comparison), "largest_error": error_or_null}
        _print_json({"a": str(first), "b": str(second), "agree": agree, **measured})
    elif agree and not quiet:
        print(f"{first} and {second} agree: {comparison}")
    if not agree:
        raise VerificationError(f"{first} and {second} disagree: {comparison}", comparison)


@command
def models(as_json: Json = False, debug: Debug = False) -> None:
    """List the networks that checkpoints are recognised as."""
    import torch

    from reparam.models import registry

    rows: list[dict[str, Any]] = []
    for name in registry.names():
        entry = registry.entry(name)
        with torch.device("meta"):
            parameters = sum(parameter.numel() for parameter in entry.build().parameters())
        about = {"input_shape": entry.input_shape, "description": entry.description, "paper": entry.paper}
        rows.append({"name": name, "parameters": parameters, **about})
    if as_json:
        _print_json(rows)
        return
    table = _table("model", "parameters", "input", "paper", right=(1,))
    for row in rows:
        table.add_row(row["name"], f"{row['parameters']:,}", _shape_text(row["input_shape"]), row["paper"])
    _console().print(table)


# --- Files and models ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Reading:
    """How the user wants files to be read."""

    model: str | None
    shape: tuple[int, ...] | None
    unsafe: bool
    ema: bool


def _read(path: Path, how: _Reading) -> Checkpoint:
    from reparam import checkpoint

    found = checkpoint.read(path, unsafe=how.unsafe, ema=how.ema)
    checkpoint.check_values(found)
    return found


def _resolve(source: Checkpoint, how: _Reading) -> Network:
    from reparam.checkpoint import resolve

    network = resolve(source, how.model)
    return network if how.shape is None else replace(network, input_shape=how.shape)


def _deploy_metadata(path: Path, how: _Reading) -> dict[str, Any] | None:
    """What is stored beside the model in a deploy file; None when the file is something else."""
    from reparam.errors import CheckpointError
    from reparam.storage import read_metadata

    try:
        return read_metadata(path)
    except CheckpointError:
        if how.unsafe:  # then it may be a pickle, which no deploy file is
            return None
        raise


def _open_both(paths: tuple[Path, Path], how: _Reading) -> list[Network]:
    """Both files as models; one may be a bare state dict of the other's deploy form."""
    match [_open_or_error(path, how) for path in paths]:
        case [ReparamError() as error, ReparamError()]:
            raise error
        case [ReparamError() as error, other]:
            return [_as_deploy_form(paths[0], other, how, error), other]
        case [other, ReparamError() as error]:
            return [other, _as_deploy_form(paths[1], other, how, error)]
        case both:
            return both


def _open_or_error(path: Path, how: _Reading) -> Any:
    try:
        return _open(path, how)
    except ReparamError as error:
        return error


def _open(path: Path, how: _Reading) -> Network:
    from reparam import storage
    from reparam.checkpoint import Network

    if path.suffix == ".onnx":
        from reparam.export import OnnxModel

        session = OnnxModel(path)
        return Network(session, path.name, session.input_shape)
    metadata = _deploy_metadata(path, how)
    if metadata is not None:
        return Network(storage.load(path), path.name, tuple(metadata.get("input_shape") or ()) or None)
    return _resolve(_read(path, how), how)


def _as_deploy_form(path: Path, other: Network, how: _Reading, failure: ReparamError) -> Network:
    """The weights in ``path`` as those of the compiled ``other``; raises ``failure`` when they are not."""
    import reparam
    from reparam import checkpoint

    try:
        deploy = reparam.compile(other.model, verify=False)  # the comparison comes next
        checkpoint.load_into(deploy, _read(path, how))
    except ReparamError:
        raise failure from None
    return checkpoint.Network(deploy, path.name, other.input_shape)


def _write(deploy: nn.Module, network: Network, output: Path, inputs: Tensor | None) -> Exported | None:
    if output.suffix == ".onnx":
        from reparam.export import export_onnx

        assert inputs is not None
        return export_onnx(deploy, output, inputs)
    from reparam.storage import save

    save(deploy, output, metadata={"model": network.name, "input_shape": network.input_shape})
    return None


def _example(shape: tuple[int, ...] | None, batch: int = 1) -> Any:
    """Random inputs, the same at every run; None when no shape is known."""
    import torch

    if shape is None:
        return None
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0))


def _inputs(network: Network, how: _Reading) -> Any:
    """What to compile a network with: random inputs of its shape, or what an exported program was exported with."""
    from torch.export import ExportedProgram

    program = network.model
    if not isinstance(program, ExportedProgram):
        return _example(network.input_shape)
    call: Any = program.example_inputs or ((), {})
    args, kwargs = call
    if how.shape is not None:  # the number of inputs, and their type, may be fixed
        first = next(value for value in (*args, *kwargs.values()) if hasattr(value, "dtype"))
        return _example(how.shape, len(first)).to(first.dtype)
    return args[0] if len(args) == 1 and not kwargs else None  # compile knows the others


def _runnable(model: nn.Module | ExportedProgram) -> nn.Module:
    from torch import nn

    return model if isinstance(model, nn.Module) else model.module()


def _shared_call(
    paths: tuple[Path, Path], sides: list[Network], how: _Reading
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments that both models say they take: one random input, or what one of them was exported with."""
    from torch.export import ExportedProgram

    shape = how.shape
    for side in sides:
        if isinstance(side.model, ExportedProgram) and side.model.example_inputs is not None:
            args, kwargs = side.model.example_inputs
            return ((_inputs(side, how),), {}) if shape else (args, kwargs)
    first, second = (side.input_shape for side in sides)
    if shape is None and first and second and first != second:
        raise VerificationError(
            f"{paths[0]} takes inputs of {_shape_text(first)}, and {paths[1]} of {_shape_text(second)}"
        )
    known = shape or first or second
    if known is None:
        _ask_for_shape(f"{paths[0]} and {paths[1]}", "compare")
    batches = (getattr(side.model, "fixed_batch", None) for side in sides)  # an ONNX model may take one size only
    return (_example(known, next(filter(None, batches), 2)),), {}


def _parse_shape(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    sizes = text.replace(",", "x").lower().split("x")
    if not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise ReparamError(f"--input-size {text} is no shape such as 3x224x224")
    return tuple(map(int, sizes))


def _ask_for_shape(name: str, purpose: str) -> NoReturn:
    raise ReparamError(f"{name}: give the shape of one input to {purpose} with, such as --input-size 3x224x224")


# --- What people see ----------------------------------------------------------------------------------------------


class _Bar:
    """A progress bar on stderr, for what takes over a second, when somebody is looking."""

    def __init__(self, quiet: bool = False) -> None:
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
        # The bar must not replace sys.stdout: it starts on another thread, while others may be redirecting it.
        console = Console(file=sys.stderr)
        self._bar = Progress(*columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False)
        self._task = self._bar.add_task("reading", total=None)
        self._timer = threading.Timer(_PATIENCE, self._bar.start)
        self._shown = sys.stderr.isatty() and not quiet

    def __enter__(self) -> _Bar:
        if self._shown:
            self._timer.daemon = True
            self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._shown:
            self._timer.cancel()
            self._timer.join()
            self._bar.stop()

    def __call__(self, done: int | None, total: int | None, label: str) -> None:
        self._bar.update(self._task, completed=done, total=total, description=label)


def _about(path: Path, source: Checkpoint, network: Network) -> dict[str, Any]:
    shape = None if network.input_shape is None else list(network.input_shape)
    return {"input": str(path), "weights": ".".join(source.origin) or None, "model": network.name, "input_shape": shape}


def _onnx_dict(exported: Exported) -> dict[str, Any]:
    return {key: value for key, value in asdict(exported).items() if key != "path"}


def _print_fused(path: Path, network: Network, output: Path, report: Report, exported: Exported | None) -> None:
    console = _console()
    console.print(f"{path} is {network.name}")
    console.print(_counts_table(report.to_dict()))
    print(f"before and after: {report.comparison or 'not compared'}")
    if exported is not None:
        print(f"PyTorch and onnxruntime: {exported.comparison}")
    kind = f"opset {exported.opset}, {exported.nodes} operators, " if exported else ""
    if exported and not exported.dynamic_batch:
        kind += "batches of one only, "
    print(f"{output}: {kind}{decimal(output.stat().st_size)}")


def _print_remarks(title: str, report: dict[str, Any]) -> None:
    console = _console()
    console.print(title)
    console.print(_counts_table(report))
    for kind in ("capture", "fused", "missed"):
        remarks = [remark for remark in report["remarks"] if remark["kind"] == kind]
        if remarks:
            print(f"{kind}: {len(remarks)}")
        for remark in remarks:
            print(f"  {remark['where'] or '(model)'}: {remark['message']} [{remark['rule']}]")


def _counts_table(report: dict[str, Any]) -> Table:
    table = _table("", "before", "after", right=(1, 2))
    for name, before in report["before"].items():
        if before is not None:
            table.add_row(name.replace("_", "-"), f"{before:,}", f"{report['after'][name]:,}")
    return table


def _table(*columns: str, right: Iterable[int] = ()) -> Table:
    from rich import box

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index in right else "left", overflow="fold")
    return table


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Leave it to :func:`command`; rich would exit with 1, which says that outputs disagree."""
        raise


def _console() -> Console:
    """Stdout; what is not a terminal has no width to fit into, so a pipe gets whole lines."""
    width = None if sys.stdout.isatty() else 10_000
    return _Console(width=width, markup=False, highlight=False, emoji=False)


def _shape_text(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape))


def _print_json(value: object) -> None:
    print(json.dumps(value, indent=2))

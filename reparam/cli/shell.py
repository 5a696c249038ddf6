"""What all commands share: how they are registered and fail, their options, and what people see."""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from reparam.errors import ReparamError, VerificationError

_PATIENCE = 1.0  # seconds without a progress bar

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
FreezeInputs = Annotated[
    bool, typer.Option("--freeze-inputs", help="ONNX: weights that are also inputs are constants.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the report as JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def register(function: Callable[..., None]) -> None:
    """Make a function a command; what goes wrong in it becomes one line on stderr and an exit code."""

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


class Bar:
    """A progress bar on stderr, for what takes over a second, when somebody is looking."""

    def __init__(self, quiet: bool = False) -> None:
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
        # The bar must not replace sys.stdout: it starts on another thread, while others may be redirecting it.
        console = Console(file=sys.stderr)
        self._bar = Progress(*columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False)
        self._task = self._bar.add_task("reading", total=None)
        self._timer = threading.Timer(_PATIENCE, self._bar.start)
        self._shown = sys.stderr.isatty() and not quiet

    def __enter__(self) -> Bar:
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
        """Show steps done, steps in all, and what is being done."""
        self._bar.update(self._task, completed=done, total=total, description=label)


def counts_table(report: dict[str, Any]) -> Table:
    """What a report counted before and after."""
    table = new_table("", "before", "after", right=(1, 2))
    for name, before in report["before"].items():
        if before is not None:
            table.add_row(name.replace("_", "-"), f"{before:,}", f"{report['after'][name]:,}")
    return table


def new_table(*columns: str, right: Iterable[int] = ()) -> Table:
    """A table without rows; ``right`` says which columns hold numbers."""
    from rich import box

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index in right else "left", overflow="fold")
    return table


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Leave it to :func:`command`; rich would exit with 1, which says that outputs disagree."""
        raise


def stdout() -> Console:
    """Stdout; what is not a terminal has no width to fit into, so a pipe gets whole lines."""
    width = None if sys.stdout.isatty() else 10_000
    return _Console(width=width, markup=False, highlight=False, emoji=False)


def shape_text(shape: Iterable[int]) -> str:
    """A shape as people write it: ``3x224x224``."""
    return "x".join(map(str, shape))


def print_json(value: object) -> None:
    """Print the answer for programs."""
    print(json.dumps(value, indent=2))

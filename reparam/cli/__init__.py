"""The ``reparam`` command: fuse a checkpoint, export, explain, report and verify it, list known models.

Results go to stdout, everything else to stderr. Exit codes: 0 done, 1 outputs disagree, 2 bad usage or input,
3 internal error, 130 interrupted, 143 terminated. Every command has a module of its own, which imports inside of
functions what it needs: no command waits for another's libraries. The two seconds that PyTorch takes are there always.
"""

from __future__ import annotations

import signal
from typing import NoReturn

from reparam.cli import bench, explain, export, fuse, models, report, verify
from reparam.cli.shell import app, register

__all__ = ["app", "bench", "explain", "export", "fuse", "main", "models", "report", "verify"]

for function in (
    fuse.fuse, export.export, explain.explain, report.report, verify.verify, bench.bench, models.models,
):  # fmt: skip
    register(function)


def main() -> None:
    """Entry point of the ``reparam`` command."""
    signal.signal(signal.SIGTERM, _terminate)
    app()


def _terminate(number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + number)  # unwinds the stack, so that unfinished files are removed

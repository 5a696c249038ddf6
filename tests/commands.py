"""The command line, run within the tests' own process."""

from __future__ import annotations

from typer.testing import CliRunner, Result

from reparam import cli


def run(*args: object, code: int = 0) -> Result:
    """What a command prints; it exits with ``code``."""
    result = CliRunner().invoke(cli.app, [str(arg) for arg in args])
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    return result


def failure(*args: object, code: int = 2) -> str:
    """The one line on stderr of a command that fails, and prints nothing else."""
    result = run(*args, code=code)
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1, result.stderr
    return result.stderr.removeprefix("error: ").rstrip("\n")

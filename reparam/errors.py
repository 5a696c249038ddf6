"""Everything that reparam raises on purpose.

Each message says what happened, where (module path or file), and what to do about it.
"""

from __future__ import annotations

from reparam.report import Comparison


class ReparamError(Exception):
    """Base of every error that reparam raises on purpose."""


class AlgebraError(ReparamError):
    """An identity was asked for where it does not hold exactly; the message is the reason."""


class CaptureError(ReparamError):
    """The model could not be turned into a graph at all."""


class ConditionError(ReparamError, ValueError):
    """A compiled model was called in another way than the ways that it was compiled for."""


class RewriteError(ReparamError):
    """A rule broke the engine's contract: its rewrite did not make the graph cheaper, or was malformed."""


class VerificationError(ReparamError):
    """Two models, or the two sides of one rewrite, that must agree do not.

    Attributes:
        comparison: What was measured, or None when the two could not even be compared (other shapes, other
            structure of outputs).
    """

    def __init__(self, message: str, comparison: Comparison | None = None) -> None:
        super().__init__(message)
        self.comparison = comparison


class CheckpointError(ReparamError):
    """A file is not the checkpoint it should be: missing, truncated, of another model, or unsafe to load."""


class ModelError(ReparamError):
    """No such model, or the checkpoint belongs to none or to several of the known ones."""


class ExportError(ReparamError):
    """A compiled model could not be written in the format asked for."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message; its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def reason(error: BaseException) -> str:
    """What went wrong underneath, and its type: exporters wrap it several times. One of ours says enough by itself."""
    while error.__cause__ is not None and not isinstance(error, ReparamError):
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" \t#=-")]
    if isinstance(error, ReparamError) and lines:
        return lines[0]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__

"""Everything that reparam raises on purpose.

Each message says what happened, where (module path or file), and what to do about it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from reparam.report import Comparison


class ReparamError(Exception):
    """Base of every error that reparam raises on purpose."""


class AlgebraError(ReparamError):
    """An identity was asked for where it does not hold exactly; the message is the reason."""


class CaptureError(ReparamError):
    """The model could not be turned into a graph at all."""


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

"""The rewrites, one idea a file; each states its formula and when it is exact."""

from __future__ import annotations

from collections.abc import Sequence

from reparam.passes.compose import Compose
from reparam.passes.concat import ConcatenatedBranches
from reparam.passes.no_op import RemoveNoOp, RemoveViewsUndone
from reparam.passes.norm_after import NormAfterPassage
from reparam.passes.norm_before import NormBeforeLinear
from reparam.passes.parallel import ParallelBranches
from reparam.passes.siblings import SiblingConvolutions
from reparam.rewrite.rule import Rule

__all__ = [
    "Compose",
    "ConcatenatedBranches",
    "NormAfterPassage",
    "NormBeforeLinear",
    "ParallelBranches",
    "RemoveNoOp",
    "RemoveViewsUndone",
    "SiblingConvolutions",
    "default",
]


def default() -> Sequence[Rule]:
    """The rules that :func:`reparam.compile` applies, in the order in which they are tried at a node."""
    return (
        RemoveNoOp(),
        RemoveViewsUndone(),
        Compose("NormAfterLinear"),
        NormAfterPassage(),
        Compose("AffineAfterAffine"),
        ParallelBranches(),
        NormBeforeLinear(),
        Compose("PadBeforeConv"),
        Compose("CropAfterConv"),
        Compose("ConvAfterConv"),
        ConcatenatedBranches(),
        SiblingConvolutions(),
    )

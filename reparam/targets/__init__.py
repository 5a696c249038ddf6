"""Models for every runtime: ONNX, OpenVINO, ExecuTorch, Core ML, ``torch.export`` and AOTInductor.

A target is a module that says how to write and load its files (:mod:`reparam.targets.target`); what all of them share,
from the capture to the comparison and the atomic write, is :func:`export` (:mod:`reparam.targets.exporter`).
"""

from __future__ import annotations

from reparam.targets.exporter import Exported, export
from reparam.targets.image import ImageInput
from reparam.targets.registry import TARGETS, is_target, target_of
from reparam.targets.target import Flat, Options, Target, Written

__all__ = [
    "TARGETS",
    "Exported",
    "Flat",
    "ImageInput",
    "Options",
    "Target",
    "Written",
    "export",
    "is_target",
    "target_of",
]

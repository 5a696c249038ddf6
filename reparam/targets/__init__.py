"""Models for every runtime: ONNX, OpenVINO, ExecuTorch, Core ML, ``torch.export`` and AOTInductor.

A target is a class that writes and loads its files (:class:`Target`), in a module of its own that registers it. What
all of them share, from the capture to the comparison and the atomic write, is :func:`export`.
"""

from __future__ import annotations

# In the order in which they are named.
from reparam.targets import onnx, openvino, executorch, coreml, torch_export, aotinductor  # isort: skip
from reparam.targets.exporter import Exported, export
from reparam.targets.image import ImageInput
from reparam.targets.program import operators_of
from reparam.targets.registry import TARGETS, is_target, register, target_of
from reparam.targets.target import Flat, Options, Target, Written

__all__ = [
    "TARGETS",
    "Exported",
    "Flat",
    "ImageInput",
    "Options",
    "Target",
    "Written",
    "aotinductor",
    "coreml",
    "executorch",
    "export",
    "is_target",
    "onnx",
    "openvino",
    "operators_of",
    "register",
    "target_of",
    "torch_export",
]

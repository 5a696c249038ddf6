"""torchvision's `nms` and `roi_align` in plain PyTorch, for a torchvision whose own operators cannot be loaded.

PyPI's torchvision is built for the CUDA build of PyTorch. Beside a CPU build its detectors have schemas at most
(see `declare_torchvision_ops` of tests/support.py), but nothing that computes. What does here is as exact, and slow.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("torchvision", "FRAGMENT")
# Before anything declares them with a signature that is only there to be imported.
_LIBRARY.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
_LIBRARY.define(
    "roi_align(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width, "
    "int sampling_ratio, bool aligned) -> Tensor"
)

import common  # noqa: E402, F401  (declares all others)

# isort: split
import torchvision  # noqa: E402
from torchvision._meta_registrations import meta_roi_align  # noqa: E402

_ROI_ALIGN = sys.modules["torchvision.ops.roi_align"]


def nms(dets: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Return the indices of the boxes that no better one overlaps by more than the threshold, best first."""
    order = scores.argsort(descending=True, stable=True)
    overlaps = torchvision.ops.box_iou(dets[order], dets[order]) > iou_threshold
    kept = torch.ones(len(order), dtype=torch.bool)
    for i in range(len(order)):
        if kept[i]:
            kept[i + 1 :] &= ~overlaps[i, i + 1 :]
    return order[kept]


def roi_align(
    input: Tensor, rois: Tensor, scale: float, height: int, width: int, sampling_ratio: int, aligned: bool
) -> Tensor:
    """Return what torchvision's own fallback does, without the `torch.compile` that it is wrapped in."""
    return _ROI_ALIGN._roi_align.__wrapped__(input, rois, scale, height, width, sampling_ratio, aligned)


_LIBRARY.impl("nms", nms, "CPU")
_LIBRARY.impl("roi_align", roi_align, "CPU")
torch.library.register_fake("torchvision::roi_align", meta_roi_align, lib=_LIBRARY)
for _module in (torchvision.extension, _ROI_ALIGN):
    _module._has_ops = lambda: True  # or nobody calls them

"""Training-time networks that reparam knows by name, RepViT first, and the blocks that networks are made of.

>>> from reparam import models
>>> model = models.create("repvit_m0_9", num_classes=10)
"""

from reparam.models import blocks
from reparam.models.registry import ModelEntry, create, entry, names, recognise, register
from reparam.models.repvit import (
    RepViT,
    repvit_digits,
    repvit_m0_6,
    repvit_m0_9,
    repvit_m1,
    repvit_m1_0,
    repvit_m1_1,
    repvit_m1_5,
    repvit_m2,
    repvit_m2_3,
    repvit_m3,
)

__all__ = [
    "ModelEntry",
    "RepViT",
    "blocks",
    "create",
    "entry",
    "names",
    "recognise",
    "register",
    "repvit_digits",
    "repvit_m0_6",
    "repvit_m0_9",
    "repvit_m1",
    "repvit_m1_0",
    "repvit_m1_1",
    "repvit_m1_5",
    "repvit_m2",
    "repvit_m2_3",
    "repvit_m3",
]

"""The authors' RepViT, with the module tree of https://github.com/THU-MIG/RepViT, to make their checkpoints with."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from timm.layers import SqueezeExcite
from torch import nn


def conv2d_bn(a: int, b: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(a, b, kernel, stride, (kernel - 1) // 2, groups=groups, bias=False)
    return nn.Sequential(OrderedDict(c=convolution, bn=nn.BatchNorm2d(b)))


def bn_linear(a: int, b: int) -> nn.Sequential:
    return nn.Sequential(OrderedDict(bn=nn.BatchNorm1d(a), l=nn.Linear(a, b)))


class Residual(nn.Module):
    def __init__(self, m: nn.Module) -> None:
        super().__init__()
        self.m = m

    def forward(self, x):
        return x + self.m(x)


class RepVGGDW(nn.Module):
    def __init__(self, channels: int, legacy: bool) -> None:
        super().__init__()
        self.conv = conv2d_bn(channels, channels, 3, groups=channels)
        if legacy:
            self.conv1 = conv2d_bn(channels, channels, groups=channels)
        else:
            self.conv1 = nn.Conv2d(channels, channels, 1, groups=channels)
            self.bn = nn.BatchNorm2d(channels)
        self.legacy = legacy

    def forward(self, x):
        mixed = (self.conv(x) + self.conv1(x)) + x
        return mixed if self.legacy else self.bn(mixed)


class RepViTBlock(nn.Module):
    def __init__(self, inp: int, oup: int, stride: int, se: bool, legacy: bool) -> None:
        super().__init__()
        if stride == 2:
            self.token_mixer = nn.Sequential(conv2d_bn(inp, inp, 3, 2, inp), nn.Identity(), conv2d_bn(inp, oup))
        else:
            gate = SqueezeExcite(inp, 0.25) if se else nn.Identity()
            self.token_mixer = nn.Sequential(RepVGGDW(inp, legacy), gate)
        self.channel_mixer = Residual(nn.Sequential(conv2d_bn(oup, 2 * oup), nn.GELU(), conv2d_bn(2 * oup, oup)))

    def forward(self, x):
        return self.channel_mixer(self.token_mixer(x))


class Classfier(nn.Module):
    def __init__(self, features: int, num_classes: int, distillation: bool) -> None:
        super().__init__()
        self.classifier = bn_linear(features, num_classes)
        self.distillation = distillation
        if distillation:
            self.classifier_dist = bn_linear(features, num_classes)

    def forward(self, x):
        if not self.distillation:
            return self.classifier(x)
        x = self.classifier(x), self.classifier_dist(x)
        return x if self.training else (x[0] + x[1]) / 2


class AuthorsRepViT(nn.Module):
    """Configured like theirs: one ``(channels, squeeze-and-excitation, stride)`` for each block."""

    def __init__(self, blocks: list[tuple[int, bool, int]], num_classes: int, distillation: bool, legacy: bool) -> None:
        super().__init__()
        channels = blocks[0][0]
        stem = nn.Sequential(conv2d_bn(3, channels // 2, 3, 2), nn.GELU(), conv2d_bn(channels // 2, channels, 3, 2))
        self.features = nn.ModuleList([stem])
        for out, se, stride in blocks:
            self.features.append(RepViTBlock(channels, out, stride, se, legacy))
            channels = out
        self.classifier = Classfier(channels, num_classes, distillation)

    def forward(self, x):
        for feature in self.features:
            x = feature(x)
        return self.classifier(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))


CONFIGURATIONS = {
    "repvit_m0_6": ((40, 80, 160, 320), (1, 1, 8, 1)),
    "repvit_m0_9": ((48, 96, 192, 384), (2, 2, 14, 2)),
    "repvit_m1_0": ((56, 112, 224, 448), (2, 2, 14, 2)),
    "repvit_m1_1": ((64, 128, 256, 512), (2, 2, 12, 2)),
    "repvit_m1_5": ((64, 128, 256, 512), (4, 4, 24, 4)),
    "repvit_m2_3": ((80, 160, 320, 640), (6, 6, 34, 2)),
    "repvit_m1": ((48, 96, 192, 384), (2, 2, 14, 2)),
    "repvit_m2": ((64, 128, 256, 512), (2, 2, 12, 2)),
    "repvit_m3": ((64, 128, 256, 512), (4, 4, 18, 2)),
}
FIRST_RELEASE = ("repvit_m1", "repvit_m2", "repvit_m3")


def build_authors_repvit(name: str, num_classes: int = 1000, distillation: bool = True) -> nn.Module:
    widths, depths = CONFIGURATIONS[name]
    blocks = []
    for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        if stage > 0:
            blocks.append((width, False, 2))
        blocks += [(width, index % 2 == 0, 1) for index in range(depth)]
        if stage < len(widths) - 1:
            blocks.append((width, False, 1))
    return AuthorsRepViT(blocks, num_classes, distillation, name in FIRST_RELEASE)


@pytest.fixture(autouse=True, scope="module")
def seed() -> None:
    """Weights are random, but the same in every run."""
    torch.manual_seed(0)


@pytest.fixture
def authors_repvit() -> Callable[..., nn.Module]:
    """Build the authors' network of a published name: ``authors_repvit(name, num_classes, distillation)``."""
    return build_authors_repvit

"""One small reparameterised network, compiled once for all targets."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import reparam
from reparam.models import blocks
from support import randomise


@pytest.fixture(scope="session")
def images() -> torch.Tensor:
    return torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def model(images: torch.Tensor) -> nn.Module:
    """A RepVGG block, RepViT's depthwise mixer and a head with a norm: two convolutions and a matrix product."""
    with torch.random.fork_rng():
        torch.manual_seed(0)  # kernels of which what a test leaves out is seen, always the same
        layers = [blocks.RepVGGBlock(3, 8, 3, stride=2), nn.GELU(), blocks.RepVGGBlock(8, 8, 3, groups=8)]
        head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(8), nn.Linear(8, 5)]
    return reparam.compile(randomise(nn.Sequential(*layers, *head)).eval(), images)

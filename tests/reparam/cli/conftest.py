"""A network and its checkpoint, which the command is given."""

from pathlib import Path

import pytest
import torch
from torch import nn

from reparam import models
from support import randomise


@pytest.fixture(scope="module")
def digits() -> nn.Module:
    return randomise(models.create("repvit_digits")).eval()


@pytest.fixture
def checkpoint(tmp_path: Path, digits: nn.Module) -> Path:
    path = tmp_path / "digits.pth"
    torch.save({"model": digits.state_dict(), "epoch": 3}, path)
    return path

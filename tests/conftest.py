"""Fixtures and profiles shared by all tests."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from hypothesis import HealthCheck, settings

# Before this folder goes on the path: it has a folder `reparam` of its own, which would be taken for the package.
import reparam  # noqa: F401

sys.path.insert(0, str(Path(__file__).parent))

from support import declare_torchvision_ops

declare_torchvision_ops()
torch.set_num_threads(1)

# Examples are chosen afresh locally, and fixed in CI so that a failure there can be repeated.
common = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}
settings.register_profile("local", max_examples=100, **common)
settings.register_profile("ci", max_examples=60, derandomize=True, **common)
settings.register_profile("long", max_examples=2000, **common)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "local"))

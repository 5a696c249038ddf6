"""Files that were written before the packages load, and compute what they did: ``tests/fixtures/0.1``."""

from collections import OrderedDict
from pathlib import Path

import pytest
import torch

import reparam

FILES = Path(__file__).resolve().parents[2] / "fixtures" / "0.1"


@pytest.fixture(scope="module")
def expected():
    return torch.load(FILES / "expected.pt", weights_only=True)


def agrees(actual, reference):
    return torch.allclose(actual, reference, rtol=0, atol=1e-12 if reference.dtype is torch.float64 else 1e-6)


@pytest.mark.parametrize("sizes", ["any", "example"])
def test_a_pickled_graph(sizes, expected):
    """``torch.save`` of what compile returned: outputs of the model's own class, its report with it."""
    model = torch.load(FILES / f"compiled-{sizes}.pt", weights_only=False)
    outputs = model(expected["input"])
    assert type(outputs) is OrderedDict
    assert agrees(outputs["logits"], expected["logits"])
    assert agrees(outputs["features"][0], expected["features"])
    assert model.report.after.norms == 1
    with pytest.raises(reparam.ConditionError):
        model(expected["input"].float().sum((2, 3)))


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("sizes", ["any", "example"])
def test_a_deploy_file(sizes, suffix, expected):
    outputs = reparam.load(FILES / f"deploy-{sizes}.{suffix}")(expected["input"])
    assert agrees(outputs["logits"], expected["logits"])


def test_a_pickled_model_that_kept_its_python(expected):
    model = torch.load(FILES / "kept.pt", weights_only=False)
    assert agrees(model(expected["input"]), expected["kept"])


def test_layers_that_the_clock_chose(expected):
    images = expected["input"].float()
    assert agrees(torch.load(FILES / "latency.pt", weights_only=False)(images), expected["latency"])
    assert agrees(reparam.load(FILES / "latency-deploy.pt")(images), expected["latency"])

"""timm's own networks: compiled to no more than timm's own conversion leaves, and to the same function."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import reparam
from reparam.compare import compare
from support import count_calls, randomise

timm = pytest.importorskip("timm")


def create(name: str) -> nn.Module:
    torch.manual_seed(0)
    return randomise(timm.create_model(name, pretrained=False)).eval()


@pytest.mark.parametrize("name", ["repvgg_a0", "mobileone_s0", "fastvit_t8"])
def test_no_more_convolutions_and_norms_than_timms_own_conversion(name: str) -> None:
    model = create(name)
    x = torch.randn(1, 3, 64, 64)
    result = reparam.compile(model, verify=False)
    theirs, ours = count_calls(timm.utils.reparameterize_model(model), x), count_calls(result, x)
    assert ours["convolution"] <= theirs["convolution"]
    assert ours["norm"] <= theirs["norm"]
    assert ours["kernels"] <= theirs["kernels"]
    assert ours["convolution"] == result.report.after.convolutions
    with torch.no_grad():
        compare(model(x), result(x), 1e-4)


# Size of input, and how many norms of any kind may stay.
FAMILIES = {
    "resnet18": (64, 0),
    "repghostnet_050": (64, 0),
    "ghostnetv3_050": (64, 0),
    "levit_128s": (224, 0),
    "mobilenetv3_small_050": (64, 0),
    "efficientnet_b0": (64, 0),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_other_families_agree_and_keep_no_norm_that_could_go(name: str) -> None:
    size, norms = FAMILIES[name]
    model = create(name)
    x = torch.randn(2, 3, size, size)
    result = reparam.compile(model, verify=False)
    with torch.no_grad():
        compare(model(x), result(x), 1e-4)
    assert result.report.before.norms > 0
    assert result.report.after.norms <= norms
    assert count_calls(result, x)["norm"] == result.report.after.norms

"""Compiled RepViT: no more kernels than timm's own conversion leaves, and the deploy models' own names."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest
import timm
import torch
from timm.models.repvit import RepVit
from timm.utils import reparameterize_model
from torch import Tensor, nn

import reparam
from reparam import models
from support import count_calls, randomise

BIG = ("repvit_m1_5", "repvit_m2_3")
CASES = [
    pytest.param(name, distillation, marks=[pytest.mark.slow] if name in BIG else [])
    for name in models.names()
    if name != "repvit_digits"
    for distillation in (True, False)
]


@dataclass
class Compiled:
    """One network: as trained, as we compile it, and as timm converts it.

    In double precision, where rounding cannot hide a mistake in a network of two hundred layers.
    """

    trained: nn.Module
    compiled: nn.Module
    timms: nn.Module
    x: Tensor


def image(*shape: int) -> Tensor:
    shape = shape or (1, 3, 64, 64)
    return torch.randn(shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def build_timm(name: str, distillation: bool) -> nn.Module:
    if name == "repvit_m0_6":  # which timm does not list
        return RepVit(embed_dim=(40, 80, 160, 320), depth=(1, 1, 8, 1), distillation=distillation)
    return timm.create_model(name, distillation=distillation)


@pytest.fixture(
    scope="module",
    params=[pytest.param(case.values, marks=case.marks, id="-".join(map(str, case.values))) for case in CASES],
)
def case(request) -> Compiled:
    name, distillation = request.param
    trained = randomise(models.create(name, distillation=distillation)).double().eval()
    compiled = reparam.compile(trained, image())
    timms = reparameterize_model(build_timm(name, distillation).eval()).double()
    return Compiled(trained, compiled, timms, image())


def run(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


def assert_same(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    assert expected.std() > 0
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


def test_same_function(case):
    for x in (case.x, image(2, 3, 97, 70)):
        assert_same(run(case.compiled, x), run(case.trained, x), 1e-9)


def test_no_norm_is_left(case):
    assert case.compiled.report.before.norms > 0
    assert case.compiled.report.after.norms == 0
    assert count_calls(case.compiled, case.x)["norm"] == 0
    assert not [m for m in case.compiled.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]


def test_no_more_kernels_than_timm_leaves(case):
    ours, theirs = count_calls(case.compiled, case.x), count_calls(case.timms, case.x)
    assert ours["convolution"] + ours["linear"] <= theirs["convolution"] + theirs["linear"]
    assert ours["elementwise"] <= theirs["elementwise"]
    assert ours["kernels"] <= theirs["kernels"]


def test_report_counts_what_runs(case):
    for model, counts in ((case.trained, case.compiled.report.before), (case.compiled, case.compiled.report.after)):
        calls = count_calls(model, case.x)
        assert (counts.convolutions, counts.linears) == (calls["convolution"], calls["linear"])
        assert (counts.norms, counts.elementwise) == (calls["norm"], calls["elementwise"])


def test_loads_into_timms_deploy_model(case):
    """Which has random weights of its own until then."""
    state, expected = case.compiled.state_dict(), case.timms.state_dict()
    assert {key: tensor.shape for key, tensor in state.items()} == {key: t.shape for key, t in expected.items()}
    case.timms.load_state_dict(state, strict=True)
    assert_same(run(case.timms, case.x), run(case.trained, case.x), 1e-9)


def test_m0_9_reaches_the_known_counts():
    trained = models.create("repvit_m0_9").double().eval()
    before, after = count_calls(trained, image()), count_calls(reparam.compile(trained), image())
    assert (before["convolution"] + before["linear"], before["norm"], before["elementwise"]) == (128, 108, 84)
    assert (after["convolution"] + after["linear"], after["norm"], after["elementwise"]) == (104, 0, 36)


@pytest.mark.parametrize(
    ("name", "parameters", "multiply_adds"),
    [
        ("repvit_m0_9", 5.1, 0.8),
        ("repvit_m1_0", 6.8, 1.1),
        ("repvit_m1_1", 8.2, 1.3),
        ("repvit_m1_5", 14.0, 2.3),
        ("repvit_m2_3", 22.9, 4.5),
    ],
)
def test_reports_the_figures_of_the_paper(name, parameters, multiply_adds):
    after = reparam.compile(models.create(name), image(1, 3, 224, 224).float(), verify=False).report.after
    assert round(after.parameters / 1e6, 1) == pytest.approx(parameters)
    assert round(after.multiply_adds / 1e9, 1) == pytest.approx(multiply_adds)


def authors_deploy_key(key: str) -> str:
    """What becomes of a training-time parameter's layer in the authors' own conversion, ``utils.replace_batchnorm``."""
    layer = r"features\.\d+\.\d|features\.\d+\.token_mixer\.\d(\.fc\d)?|features\.\d+\.channel_mixer\.m\.\d|classifier"
    return re.match(layer, key)[0]


@pytest.mark.parametrize(
    ("name", "distillation"),
    [case for case in CASES if case.values[1] or case.values[0] in ("repvit_m0_9", "repvit_m1")],
)
def test_the_authors_network_gets_the_authors_deploy_names(name, distillation, authors_repvit):
    trained = randomise(authors_repvit(name, 100, distillation)).double().eval()
    compiled = reparam.compile(trained, image())
    layers = {authors_deploy_key(key) for key in trained.state_dict()}
    assert {"features.0.0", "features.1.token_mixer.0", "features.1.token_mixer.1.fc1", "classifier"} <= layers
    assert set(compiled.state_dict()) == {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    assert compiled.report.after.norms == 0
    assert_same(run(compiled, image()), run(trained, image()), 1e-9)


@pytest.mark.parametrize("distillation", [True, False])
def test_compiles_the_eval_function_of_a_model_in_training_mode(distillation):
    trained = randomise(models.create("repvit_digits", distillation=distillation)).train()
    x = image(4, 1, 8, 8).float()
    compiled = reparam.compile(trained, x)
    assert trained.training
    assert not compiled.training
    assert_same(run(compiled, x), run(trained.eval(), x), 1e-5)

"""Convolutions made ready for the processor: the same function, the same parameters, and plain wherever it matters."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import reparam
from reparam.compiled import CompiledModel
from reparam.prepared import _ACTIVATIONS, PreparedConv2d, is_available
from reparam.variants import Variant, apply
from support import Net, count_calls

pytestmark = pytest.mark.skipif(not is_available(), reason="this PyTorch has no oneDNN")

GEOMETRIES = [
    {"in_channels": 8, "out_channels": 8, "kernel_size": 1},
    {"in_channels": 8, "out_channels": 4, "kernel_size": 3, "padding": 1, "stride": 2, "bias": False},
    {"in_channels": 8, "out_channels": 8, "kernel_size": (3, 5), "padding": (2, 1), "dilation": (1, 2), "groups": 8},
    {"in_channels": 8, "out_channels": 12, "kernel_size": 7, "groups": 4},
]


def pair(activation: str = "", **settings: object) -> tuple[nn.Conv2d, PreparedConv2d]:
    torch.manual_seed(0)
    plain = nn.Conv2d(**settings).requires_grad_(False).eval()
    return plain, PreparedConv2d.of(plain, activation)


def expected(plain: nn.Conv2d, activation: str, x: Tensor) -> Tensor:
    return _ACTIVATIONS[activation].function(plain(x))


def fast_calls(module: nn.Module, x: Tensor) -> int:
    """How often oneDNN was called with a prepared kernel; its operator is replaced, and so is what it would do."""
    with torch.profiler.profile() as profile:
        module(x)
    return sum("_convolution_pointwise" in event.name for event in profile.events())


@pytest.mark.parametrize("settings", GEOMETRIES)
@pytest.mark.parametrize("activation", _ACTIVATIONS)
def test_every_activation_and_geometry(settings, activation):
    plain, prepared = pair(activation, **settings)
    for size in ((1, 8, 9, 11), (1, 8, 52, 51), (2, 8, 9, 11)):
        for layout in (torch.contiguous_format, torch.channels_last):
            x = (3 * torch.randn(size)).contiguous(memory_format=layout)
            torch.testing.assert_close(prepared(x), expected(plain, activation, x), rtol=1e-5, atol=1e-5)
    assert fast_calls(prepared, x) == 1


def test_it_has_the_parameters_of_the_layer_that_it_is():
    plain, prepared = pair("relu", **GEOMETRIES[0])
    assert prepared.weight is plain.weight
    prepared(torch.randn(1, 8, 4, 4))
    assert list(prepared.state_dict()) == list(plain.state_dict())
    assert "activation=relu" in repr(prepared)


def test_a_changed_weight_is_noticed():
    x = torch.randn(2, 8, 6, 6)
    plain, prepared = pair(**GEOMETRIES[0])
    prepared(x)
    with torch.no_grad():
        plain.weight.mul_(2.0)
    torch.testing.assert_close(prepared(x), plain(x))
    prepared.load_state_dict({"weight": torch.ones(8, 8, 1, 1), "bias": torch.zeros(8)})
    torch.testing.assert_close(prepared(x), x.sum(1, keepdim=True).expand(2, 8, 6, 6))
    prepared.weight = nn.Parameter(torch.zeros(8, 8, 1, 1), requires_grad=False)
    assert not prepared(x).any()


def test_copies_and_pickles_have_weights_of_their_own():
    x = torch.randn(2, 8, 6, 6)
    _plain, prepared = pair("gelu", **GEOMETRIES[0])
    before = prepared(x)
    for twin in (copy.deepcopy(prepared), pickle.loads(pickle.dumps(prepared))):
        assert torch.equal(twin(x), before)
        with torch.no_grad():
            twin.weight.zero_()
        assert torch.equal(prepared(x), before)


def test_a_single_small_map_takes_the_kernels_that_start_sooner():
    _plain, prepared = pair(**GEOMETRIES[0])
    assert fast_calls(prepared, torch.randn(1, 8, 50, 50)) == 0
    assert fast_calls(prepared, torch.randn(1, 8, 52, 52)) == 1
    assert fast_calls(prepared, torch.randn(2, 8, 1, 1)) == 1
    _plain, depthwise = pair(**GEOMETRIES[2])
    assert fast_calls(depthwise, torch.randn(1, 8, 9, 9)) == 1


@pytest.mark.parametrize("how", ["float64", "bfloat16", "gradients", "counted", "inference", "no batch", "empty"])
def test_what_the_fast_path_does_not_cover_is_computed_all_the_same(how):
    plain, prepared = pair("hardswish", **GEOMETRIES[0])
    x = torch.randn(2, 8, 5, 5)
    match how:
        case "float64" | "bfloat16":
            plain, prepared, x = (value.to(getattr(torch, how)) for value in (plain, prepared, x))
            assert fast_calls(prepared, x) == 0
        case "gradients":
            x.requires_grad_()
            prepared(x).sum().backward()
            gradient = x.grad.clone()
            x.grad = None
            expected(plain, "hardswish", x).sum().backward()
            torch.testing.assert_close(gradient, x.grad)
        case "counted":
            assert count_calls(prepared, x)["convolution"] == 1
        case "inference":
            with torch.inference_mode():
                prepared(x)
        case "no batch":
            x = x[0]
        case "empty":
            x = x[:0]
    torch.testing.assert_close(prepared(x), expected(plain, "hardswish", x))


def deploy() -> tuple[CompiledModel, Tensor]:
    """A compiled network with prepared convolutions, channels last."""
    torch.manual_seed(0)
    net = Net(
        lambda s, x: s.head(F.gelu(s.b(s.act(s.a(x))), approximate="tanh").mean((2, 3))),
        a=nn.Conv2d(3, 8, 3, 2, 1), act=nn.SiLU(), b=nn.Conv2d(8, 8, 1), head=nn.Linear(8, 4),
    ).eval()  # fmt: skip
    x = torch.randn(1, 3, 16, 16)
    plain = reparam.compile(net, x)
    made = plain.rebuilt(*apply(Variant(channels_last=True, prepared=True), plain, {"x": x.shape}))
    return made, x


def test_activations_are_taken_in():
    made, _x = deploy()
    kinds = [type(layer).__name__ for layer in made.children()]
    assert kinds == ["PreparedConv2d", "PreparedConv2d", "Linear"]
    assert [made.a.activation, made.b.activation] == ["silu", "gelu_tanh"]
    assert "gelu" not in made.code


def test_an_activation_that_is_not_alone_stays():
    net = Net(lambda s, x: (s.a(x).relu(), s.a(x)), a=nn.Conv2d(3, 8, 1)).eval()
    x = torch.randn(1, 3, 4, 4)
    plain = reparam.compile(net, x)
    made = plain.rebuilt(*apply(Variant(prepared=True), plain, {"x": x.shape}))
    assert made.a.activation == ""
    reparam.verify(net, made, x)


def test_deploy_files_hold_them(tmp_path: Path):
    made, x = deploy()
    for name in ("deploy.pth", "deploy.safetensors"):
        reparam.save(made, tmp_path / name)
        loaded = reparam.load(tmp_path / name)
        assert isinstance(loaded.a, PreparedConv2d)
        assert loaded.a.weight.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(loaded(x), made(x))


def test_other_ways_to_run_it_see_plain_operators():
    made, x = deploy()
    program = torch.export.export(made, (x,))
    assert "mkldnn" not in str(program.graph)
    torch.testing.assert_close(program.module()(x), made(x), rtol=1e-5, atol=1e-5)
    traced = torch.jit.trace(made, x)
    assert "mkldnn" not in str(traced.inlined_graph)
    again = reparam.compile(made, x)
    torch.testing.assert_close(again(x), made(x), rtol=1e-5, atol=1e-5)
    assert again.report.after.convolutions == 2

"""Layers made ready for the processor: the same function, the same parameters, and plain wherever it matters."""

from __future__ import annotations

import contextlib
import copy
import pickle
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import prune

import reparam
from reparam.deploy.model import CompiledModel
from reparam.tuning.prepared import _ACTIVATIONS, Prepared, PreparedConv2d, PreparedLinear, is_available
from reparam.tuning.variants import Variant, apply
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


def linear_pair(
    activation: str = "", inputs: int = 12, outputs: int = 20, bias: bool = True
) -> tuple[nn.Linear, PreparedLinear]:
    torch.manual_seed(0)
    plain = nn.Linear(inputs, outputs, bias).requires_grad_(False).eval()
    return plain, PreparedLinear.of(plain, activation)


KINDS = {
    "convolution": (lambda: pair("hardswish", **GEOMETRIES[0]), (2, 8, 5, 5)),
    "matrix product": (lambda: linear_pair("hardswish"), (2, 7, 12)),
}
kinds = pytest.mark.parametrize(("make", "shape"), KINDS.values(), ids=KINDS)


def expected(plain: nn.Module, activation: str, x: Tensor) -> Tensor:
    return _ACTIVATIONS[activation].function(plain(x))


def assert_as_plain(prepared: Prepared, plain: nn.Module, x: Tensor) -> None:
    torch.testing.assert_close(prepared(x), expected(plain, prepared.activation, x), rtol=1e-5, atol=1e-5)


def fast_calls(module: nn.Module, x: Tensor) -> int:
    """How often oneDNN was called with a prepared weight."""
    with torch.profiler.profile() as profile:
        module(x)
    return sum("_pointwise" in event.name for event in profile.events())


@pytest.mark.parametrize("settings", GEOMETRIES)
@pytest.mark.parametrize("activation", _ACTIVATIONS)
def test_every_activation_and_geometry(settings, activation):
    plain, prepared = pair(activation, **settings)
    for size in ((1, 8, 9, 11), (1, 8, 52, 51), (2, 8, 9, 11)):
        for layout in (torch.contiguous_format, torch.channels_last):
            x = (3 * torch.randn(size)).contiguous(memory_format=layout)
            torch.testing.assert_close(prepared(x), expected(plain, activation, x), rtol=1e-5, atol=1e-5)
    assert fast_calls(prepared, x) == 1


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", _ACTIVATIONS)
def test_every_activation_and_shape_of_a_matrix_product(activation, bias):
    plain, prepared = linear_pair(activation, bias=bias)
    for shape in ((7, 12), (2, 7, 12), (2, 3, 7, 12), (1, 1, 2, 1, 12)):
        assert_as_plain(prepared, plain, 3 * torch.randn(shape))
    assert fast_calls(prepared, torch.randn(shape)) == 1


def test_a_matrix_product_reads_inputs_that_lie_anyhow():
    plain, prepared = linear_pair("relu")
    images = torch.randn(2, 12, 3, 5)
    inputs = [
        images.flatten(2).transpose(1, 2),
        images.permute(0, 2, 3, 1),
        images.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1),
        torch.randn(12, 7).t(),
        torch.randn(14, 12)[::2],
        torch.randn(7, 24)[:, ::2],
        torch.randn(85)[1:].view(7, 12),
        torch.randn(12).expand(7, 12),
    ]
    for x in inputs:
        assert_as_plain(prepared, plain, x)
        assert fast_calls(prepared, x) == 1


@kinds
def test_it_has_the_parameters_of_the_layer_that_it_is(make, shape):
    plain, prepared = make()
    assert prepared.weight is plain.weight
    assert prepared.bias is plain.bias
    prepared(torch.randn(shape))
    assert list(prepared.state_dict()) == list(plain.state_dict())
    assert "activation=hardswish" in repr(prepared)


@kinds
def test_a_changed_weight_is_noticed(make, shape):
    plain, prepared = make()
    x = torch.randn(shape)
    prepared(x)
    with torch.no_grad():
        plain.weight.mul_(2.0)
    assert_as_plain(prepared, plain, x)
    state = {"weight": torch.ones_like(plain.weight), "bias": torch.zeros_like(plain.bias)}
    prepared.load_state_dict(state)
    assert_as_plain(prepared, plain, x)
    prepared.weight = nn.Parameter(torch.zeros_like(plain.weight), requires_grad=False)
    assert not prepared(x).any()


@kinds
def test_copies_and_pickles_have_weights_of_their_own(make, shape):
    _plain, prepared = make()
    x = torch.randn(shape)
    before = prepared(x)
    for twin in (copy.deepcopy(prepared), pickle.loads(pickle.dumps(prepared))):
        assert torch.equal(twin(x), before)
        with torch.no_grad():
            twin.weight.zero_()
        assert torch.equal(prepared(x), before)


@pytest.mark.parametrize("cls", [PreparedConv2d, PreparedLinear])
def test_an_activation_that_there_is_not_is_refused(cls):
    with pytest.raises(ValueError, match=r"no activation 'mish'; there are relu, "):
        cls(4, 4, 1, activation="mish")


def test_a_single_small_map_takes_the_kernels_that_start_sooner():
    _plain, prepared = pair(**GEOMETRIES[0])
    assert fast_calls(prepared, torch.randn(1, 8, 50, 50)) == 0
    assert fast_calls(prepared, torch.randn(1, 8, 52, 52)) == 1
    assert fast_calls(prepared, torch.randn(2, 8, 1, 1)) == 1
    _plain, depthwise = pair(**GEOMETRIES[2])
    assert fast_calls(depthwise, torch.randn(1, 8, 9, 9)) == 1


def test_few_rows_that_are_not_one_take_the_weight_that_is_packed_once():
    plain, prepared = linear_pair()
    calls = {rows: fast_calls(prepared, torch.randn(rows, 12)) for rows in (0, 1, 2, 256, 257)}
    assert calls == {0: 0, 1: 0, 2: 1, 256: 1, 257: 0}
    for shape in ((12,), (1, 12), (257, 12), (0, 12), (2, 0, 12)):
        x = torch.randn(shape)
        assert fast_calls(prepared, x) == 0
        assert_as_plain(prepared, plain, x)


def test_only_large_matrices_are_worth_it():
    assert PreparedLinear.fits(nn.Linear(512, 512))
    assert not PreparedLinear.fits(nn.Linear(512, 500))
    assert not PreparedLinear.fits(nn.Linear(512, 512, dtype=torch.float64))
    assert not PreparedLinear.fits(nn.Linear(512, 512, device="meta"))
    assert not PreparedLinear.fits(nn.modules.linear.NonDynamicallyQuantizableLinear(512, 512))


def test_a_wrong_width_is_told_as_ever():
    plain, prepared = linear_pair()
    x = torch.randn(7, 24)
    with pytest.raises(RuntimeError) as told:
        plain(x)
    with pytest.raises(RuntimeError, match=re.escape(str(told.value))):
        prepared(x)


@kinds
@pytest.mark.parametrize("how", ["float64", "bfloat16", "inference", "empty", "switched off", "autocast", "pruned"])
def test_what_the_fast_path_does_not_cover_is_computed_all_the_same(make, shape, how):
    plain, prepared = make()
    x = torch.randn(shape)
    around = contextlib.nullcontext()
    match how:
        case "float64" | "bfloat16":
            plain, prepared, x = (value.to(getattr(torch, how)) for value in (plain, prepared, x))
        case "inference":
            with torch.inference_mode():
                prepared(x)
        case "empty":
            x = x[:0]
        case "switched off":
            around = torch.backends.mkldnn.flags(enabled=False)
        case "autocast":
            around = torch.autocast("cpu", torch.bfloat16)
        case "pruned":
            prune.l1_unstructured(prepared, "weight", 0.5)
            prune.l1_unstructured(plain, "weight", 0.5)
    with around:
        assert fast_calls(prepared, x) == (how == "inference")
        torch.testing.assert_close(prepared(x), expected(plain, "hardswish", x))


def test_a_convolution_of_no_batch_is_computed_all_the_same():
    plain, prepared = pair("hardswish", **GEOMETRIES[0])
    assert_as_plain(prepared, plain, torch.randn(8, 60, 60))


@kinds
@pytest.mark.parametrize("what", ["input", "weight", "bias"])
def test_gradients_flow_to_whatever_asks_for_them(make, shape, what):
    plain, prepared = make()
    x = torch.randn(shape)
    asks = {"input": x, "weight": plain.weight, "bias": plain.bias}[what].requires_grad_()
    mine, theirs = (torch.autograd.grad(y.square().sum(), asks) for y in (prepared(x), expected(plain, "hardswish", x)))
    torch.testing.assert_close(mine, theirs)


@kinds
def test_function_transforms_see_plain_operators(make, shape):
    plain, prepared = make()
    x, tangent = torch.randn(shape), torch.randn(shape)
    for mine, theirs in zip(
        torch.func.jvp(prepared, (x,), (tangent,)),
        torch.func.jvp(lambda x: expected(plain, "hardswish", x), (x,), (tangent,)),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)
    with forward_ad.dual_level():
        assert forward_ad.unpack_dual(prepared(forward_ad.make_dual(x, tangent))).tangent is not None
    torch.testing.assert_close(torch.func.vmap(prepared)(x[None])[0], expected(plain, "hardswish", x))


@kinds
def test_who_counts_operators_counts_plain_ones(make, shape):
    _plain, prepared = make()
    calls = count_calls(prepared, torch.randn(shape))
    assert calls["convolution"] + calls["linear"] == 1


@kinds
def test_a_bias_with_strides_is_read_with_them(make, shape):
    plain, prepared = make()
    prepared.bias = plain.bias = nn.Parameter(torch.randn(2 * len(plain.bias))[::2], requires_grad=False)
    assert_as_plain(prepared, plain, torch.randn(shape))


def deploy() -> tuple[CompiledModel, Tensor]:
    """A compiled network with prepared layers, channels last."""
    torch.manual_seed(0)
    net = Net(
        lambda s, x: s.head(F.hardswish(s.mix(F.gelu(s.b(s.act(s.a(x))), approximate="tanh").flatten(2).mT)).mean(1)),
        a=nn.Conv2d(3, 8, 3, 2, 1), act=nn.SiLU(), b=nn.Conv2d(8, 512, 1), mix=nn.Linear(512, 512),
        head=nn.Linear(512, 4),
    ).eval()  # fmt: skip
    x = torch.randn(1, 3, 16, 16)
    plain = reparam.compile(net, x)
    made = plain.rebuilt(*apply(Variant(channels_last=True, prepared=True), plain, {"x": x.shape}))
    return made, x


def test_activations_are_taken_in():
    made, _x = deploy()
    kinds = [type(layer).__name__ for layer in made.children()]
    assert kinds == ["PreparedConv2d", "PreparedConv2d", "PreparedLinear", "Linear"]
    assert [made.a.activation, made.b.activation, made.mix.activation] == ["silu", "gelu_tanh", "hardswish"]
    assert "gelu" not in made.code
    assert "hardswish" not in made.code


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
        assert isinstance(loaded.mix, PreparedLinear)
        assert loaded.mix.activation == "hardswish"
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

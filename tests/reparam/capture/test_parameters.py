"""Whatever is computed from parameters and buffers alone is a constant, and its layer a plain one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.parametrize as parametrize
from timm.layers import ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

import reparam
from support import randomise

norms = torch.nn.utils.parametrizations
pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")


def check(model: nn.Module, x: Tensor | None = None) -> Any:
    """Compile in float64, and hold the result to the model at 1e-9."""
    model = model.double().eval()
    x = torch.randn(2, 4, 9, 8, dtype=torch.float64) if x is None else x
    before = {name: value.clone() for name, value in model.state_dict().items()}
    compiled = reparam.compile(model, x)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-9, atol=1e-9)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    return compiled


def only_layer(compiled: Any) -> nn.Module:
    (layer,) = (compiled.get_submodule(node.target) for node in compiled.graph.nodes if node.op == "call_module")
    assert compiled.report.after.kernels == 1
    return layer


class Negative(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return -weight


def custom(layer: nn.Module) -> nn.Module:
    parametrize.register_parametrization(layer, "weight", Negative())
    parametrize.register_parametrization(layer, "bias", Negative())
    return layer


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "old weight norm": torch.nn.utils.weight_norm,
    "old weight norm over all": lambda layer: torch.nn.utils.weight_norm(layer, dim=None),
    "weight norm": norms.weight_norm,
    "old spectral norm": torch.nn.utils.spectral_norm,
    "spectral norm": norms.spectral_norm,
    "two norms": lambda layer: norms.spectral_norm(norms.weight_norm(layer)),
    "custom": custom,
}

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "conv": lambda: nn.Conv2d(4, 6, 3, padding=1),
    "depthwise": lambda: nn.Conv2d(4, 4, 3, groups=4),
    "linear": lambda: nn.Linear(8, 5),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_layer_with_computed_weights_comes_out_plain(wrapper: str, layer: str) -> None:
    plain = LAYERS[layer]()
    wrapped = WRAPPERS[wrapper](LAYERS[layer]())
    result = only_layer(check(nn.Sequential(wrapped)))
    assert type(result) is type(plain)
    assert sorted(result.state_dict()) == ["bias", "weight"]
    assert all(type(parameter) is nn.Parameter for parameter in result.parameters())
    assert not result._forward_pre_hooks


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_layer_with_computed_weights_fuses(wrapper: str) -> None:
    wrapped = WRAPPERS[wrapper](nn.Conv2d(4, 6, 3, padding=1))
    model = randomise(nn.Sequential(wrapped, nn.BatchNorm2d(6)))
    assert type(only_layer(check(model))) is nn.Conv2d


@pytest.mark.parametrize("wrapper", ["old weight norm", "weight norm", "old spectral norm", "spectral norm"])
def test_single_precision_is_certified_too(wrapper: str) -> None:
    model = randomise(nn.Sequential(WRAPPERS[wrapper](nn.Conv2d(4, 6, 3)), nn.BatchNorm2d(6), nn.ReLU())).eval()
    x = torch.randn(2, 4, 9, 9)
    compiled: Any = reparam.compile(model.train(), x)
    assert compiled.report.after.kernels == 2
    reparam.verify(model.eval(), compiled, x)


def test_other_layers_come_out_plain_as_well() -> None:
    result = only_layer(check(nn.Sequential(torch.nn.utils.weight_norm(nn.ConvTranspose2d(4, 3, 2, 2)))))
    assert type(result) is nn.ConvTranspose2d
    assert sorted(result.state_dict()) == ["bias", "weight"]
    lstm = torch.nn.utils.weight_norm(nn.LSTM(3, 4), "weight_hh_l0")
    assert reparam.compile(lstm, torch.randn(2, 1, 3)) is not None


def test_shared_weights_stay_shared() -> None:
    layer = norms.weight_norm(nn.Conv2d(4, 4, 1))
    compiled = check(nn.Sequential(layer, nn.ReLU(), layer))
    assert len(list(compiled.parameters())) == 2


# Hooks that do more, or something else.


class Hooked(nn.Module):
    def __init__(self, hook: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)
        self.conv.raw = nn.Parameter(self.conv.weight.detach().clone())
        del self.conv._parameters["weight"]
        self.conv.weight = self.conv.raw.detach() * 2
        self.conv.register_forward_pre_hook(hook)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))  # type: ignore[no-any-return]


def _double(conv: Any, inputs: Any) -> None:
    conv.weight = conv.raw * 2


def _remembering() -> Any:
    calls: list[int] = []

    def hook(conv: Any, inputs: Any) -> None:
        calls.append(1)
        conv.weight = conv.raw * 2

    return hook


def _counting() -> Any:
    number = 0

    def hook(conv: Any, inputs: Any) -> None:
        nonlocal number
        number += 1
        conv.weight = conv.raw * 2

    return hook


class Stateful:
    calls = 0

    def __call__(self, conv: Any, inputs: Any) -> None:
        self.calls += 1
        conv.weight = conv.raw * 2


def _looks(conv: Any, inputs: Any) -> None:
    conv.weight = conv.raw * (2 if inputs[0].sum() > 0 else 3)


def _compares(conv: Any, inputs: Any) -> None:
    conv.weight = conv.raw * (2 if inputs else 3)


def _changes_input(conv: Any, inputs: Any) -> Any:
    conv.weight = conv.raw * 2
    return (inputs[0] * 2,)


def _returns(conv: Any, inputs: Any) -> Any:
    conv.weight = conv.raw * 2
    return inputs


def _random(conv: Any, inputs: Any) -> None:
    conv.weight = conv.raw * torch.rand(())


def _drifting(conv: Any, inputs: Any) -> None:
    conv.weight = conv.weight * 1.5


def _in_place(conv: Any, inputs: Any) -> None:
    conv.raw.data.mul_(1.5)
    conv.weight = conv.raw * 2


def _swaps_memory(conv: Any, inputs: Any) -> None:
    conv.raw.data = conv.raw.data * 1.0
    conv.weight = conv.raw * 2


def _sets_a_number(conv: Any, inputs: Any) -> None:
    conv.weight, conv.stride = conv.raw * 2, (2, 2)


def _keeps_input(conv: Any, inputs: Any) -> None:
    conv.weight, conv.seen = conv.raw * 2, inputs


def _sets_nothing(conv: Any, inputs: Any) -> None:
    pass


def test_a_hook_that_only_computes_weights_is_run_once() -> None:
    layer = only_layer(check(randomise(Hooked(_double))))
    assert sorted(layer.state_dict()) == ["bias", "weight"]


@pytest.mark.parametrize(
    "hook",
    [
        _remembering(), _counting(), Stateful(), _looks, _compares, _changes_input, _returns, _random, _drifting,
        _in_place, _swaps_memory, _sets_a_number, _keeps_input, _sets_nothing,
    ],
)  # fmt: skip
def test_every_other_hook_stays(hook: Any) -> None:
    model = randomise(Hooked(hook)).eval()
    raw, weight = model.conv.raw.clone(), model.conv.weight.clone()
    compiled: Any = reparam.compile(model, torch.randn(2, 4, 5, 5), verify=False)
    assert compiled.report.after.norms == 1
    assert any("hooks" in remark.message for remark in compiled.report.remarks)
    assert len(compiled.conv._forward_pre_hooks) == 1
    assert torch.equal(model.conv.raw, raw)
    assert torch.equal(compiled.conv.raw, raw)
    assert torch.equal(compiled.conv.weight, weight)


def test_a_hook_beside_a_program_keeps_both() -> None:
    layer = torch.nn.utils.weight_norm(nn.Conv2d(4, 4, 1))
    layer.register_forward_hook(lambda module, inputs, output: output * 2)
    compiled = check(nn.Sequential(layer, nn.BatchNorm2d(4)))
    assert compiled.report.after.norms == 1
    assert "weight_g" in dict(compiled.get_submodule("0").named_parameters())


class Noise(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * (1 + torch.rand(()))


class Counter(nn.Module):
    calls = 0

    def forward(self, weight: Tensor) -> Tensor:
        self.calls += 1
        return weight * 2


@pytest.mark.parametrize("program", [Noise, Counter])
def test_a_parametrization_that_differs_from_call_to_call_stays(program: Callable[[], nn.Module]) -> None:
    layer = nn.Conv2d(4, 4, 1)
    parametrize.register_parametrization(layer, "weight", program())
    compiled: Any = reparam.compile(nn.Sequential(layer, nn.BatchNorm2d(4)), torch.randn(2, 4, 5, 5), verify=False)
    assert compiled.report.after.norms == 1
    assert parametrize.is_parametrized(compiled.get_submodule("0"))


# What forward computes itself.


class Generated(nn.Module):
    """OREPA (Hu et al. 2022, arXiv 2204.00826): a kernel that is generated from several smaller ones."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(6, 4, 1, 1))
        self.second = nn.Parameter(torch.randn(5, 6, 3, 3))
        self.vector = nn.Parameter(torch.randn(3, 5))
        self.register_buffer("frequencies", torch.randn(5, 3, 3))
        self.average = nn.Parameter(torch.randn(5, 4, 1, 1))
        self.register_buffer("mean", torch.ones(5, 1, 3, 3) / 9)

    def forward(self, x: Tensor) -> Tensor:
        kernel = torch.einsum("mihw,omkl->oikl", self.first, self.second) * self.vector[0, :, None, None, None]
        kernel = kernel + torch.einsum("oihw,o->oihw", self.average * self.mean, self.vector[1])
        kernel = kernel + F.pad(self.average.sum(1, keepdim=True) * self.vector[2].view(-1, 1, 1, 1), (1, 1, 1, 1))
        kernel += self.frequencies.unsqueeze(1)
        return F.conv2d(x, kernel, padding=1)


class Controlled(nn.Module):
    """Python control flow on parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.tensor(0.5))
        self.gates = nn.Parameter(torch.tensor([1.0, -1.0, 2.0]))
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = 0
        for gate, conv in zip(self.gates, self.convs, strict=True):
            if gate > 0:
                y = y + gate.item() * conv(x)
        return y if float(self.alpha) < 0 else y + self.alpha * x  # type: ignore[return-value]


class Edges(nn.Module):
    """ECBSR's edge branches (Zhang et al. 2021): a fixed mask times a learned scale behind a 1x1 convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(4, 4, 1, bias=False)
        self.scale = nn.Parameter(torch.randn(4, 1, 1, 1))
        sobel = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]])
        self.register_buffer("mask", sobel.expand(4, 1, 3, 3).clone())
        self.laplacian = nn.Parameter(torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]]), requires_grad=False)
        self.bias = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        edges = F.conv2d(self.conv0(x), self.scale * self.mask, self.bias, 1, 1, groups=4)
        return edges + F.conv2d(x, self.scale * self.laplacian, None, 1, 1, groups=4)


class Masked(nn.Conv2d):
    """A pruned or causal kernel."""

    def __init__(self) -> None:
        super().__init__(4, 4, 3, padding=1)
        self.register_buffer("mask", (torch.rand(4, 4, 3, 3) > 0.5).float())

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight * self.mask, self.bias)


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3)
        self.mask = nn.Parameter(torch.randn(1, 4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) * self.mask  # type: ignore[no-any-return]


class DetectronNorm(nn.Module):
    """Detectron2's frozen batch norm in evaluation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.eps = 1e-5
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(channels) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
        )


class ByHand(DetectronNorm):
    def forward(self, x: Tensor) -> Tensor:
        normal = (x - self.running_mean[None, :, None, None]) / torch.sqrt(self.running_var + self.eps).view(-1, 1, 1)
        return normal * self.weight.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)


class Functional(DetectronNorm):
    def forward(self, x: Tensor) -> Tensor:
        return torch.batch_norm(
            x, self.weight, self.bias, self.running_mean, self.running_var, False, 0.1, self.eps, False
        )


def after_conv(norm: Callable[[int], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Conv2d(4, 4, 3), norm(4))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "generated": Generated,
    "controlled": Controlled,
    "edges": Edges,
    "masked": Masked,
    "gated": Gated,
    "standardised": lambda: StdConv2d(4, 6, 3, padding=1, bias=True),
    "standardised same": lambda: StdConv2dSame(4, 6, 3, bias=True),
    "scaled": lambda: ScaledStdConv2d(4, 6, 3, padding=1),
    "scaled same": lambda: ScaledStdConv2dSame(4, 6, 3),
    "torchvision frozen": after_conv(FrozenBatchNorm2d),
    "norm by hand": after_conv(ByHand),
    "detectron frozen": after_conv(DetectronNorm),
    "functional norm": after_conv(Functional),
}


@pytest.mark.parametrize("model", MODELS)
def test_what_forward_computes_from_parameters_is_a_constant(model: str) -> None:
    assert type(only_layer(check(nn.Sequential(MODELS[model]())))) is nn.Conv2d

"""Modules that cannot be read: those that are convolutions become one, and nothing else does."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import reparam
from reparam.algebra import ChannelAffine, Conv
from reparam.capture import capture
from reparam.probe import _probed, _Read, probe
from support import Net, randomise

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated")


def find(module: nn.Module, channels: int = 4, rank: int = 4, axis: int | None = None) -> Any:
    """The operator that a module turns out to be on its own, or None."""
    module.eval()
    read = _Read(rank, channels, 1 - rank if axis is None else axis, None)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    attributes = {name: value for name, value in vars(module).items() if not isinstance(value, dict)}
    found = _probed(module, (), {}, read)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert attributes == {name: value for name, value in vars(module).items() if not isinstance(value, dict)}
    return None if found is None else found.operator


class Function(Net):
    """A module around a function of itself and its input."""


# Modules that are convolutions.


class BNAndPad(nn.Module):
    """DBB's (Ding et al. 2021, arXiv 2103.13425): pads with what the norm makes of zeros."""

    def __init__(self, pixels: int, channels: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)
        self.pixels = pixels

    def forward(self, x: Tensor) -> Tensor:
        output = self.bn(x)
        p = self.pixels
        values = self.bn.bias.detach() - self.bn.running_mean * self.bn.weight.detach() / torch.sqrt(
            self.bn.running_var + self.bn.eps
        )
        output = F.pad(output, [p] * 4)
        values = values.view(1, -1, 1, 1)
        output[:, :, 0:p, :] = values
        output[:, :, -p:, :] = values
        output[:, :, :, 0:p] = values
        output[:, :, :, -p:] = values
        return output


class PadWithBias(nn.Module):
    """ECB's 1x1-3x3 branch (Zhang et al. 2021): the padding is the first layer's bias."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.k0 = nn.Parameter(torch.randn(6, channels, 1, 1))
        self.b0 = nn.Parameter(torch.randn(6))
        self.k1 = nn.Parameter(torch.randn(channels, 6, 3, 3))
        self.b1 = nn.Parameter(torch.randn(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = F.pad(F.conv2d(x, self.k0, self.b0), (1, 1, 1, 1))
        pad = self.b0.view(1, -1, 1, 1)
        y[:, :, 0:1, :] = pad
        y[:, :, -1:, :] = pad
        y[:, :, :, 0:1] = pad
        y[:, :, :, -1:] = pad
        return F.conv2d(y, self.k1, self.b1)


class Shift(nn.Module):
    """Shift (Wu et al. 2018, arXiv 1711.08141): groups of channels move by one pixel."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        y[:, 0, 1:] = x[:, 0, :-1]
        y[:, 1, :-1] = x[:, 1, 1:]
        y[:, 2, :, 1:] = x[:, 2, :, :-1]
        y[:, 3:] = x[:, 3:]
        return y


class Taps(nn.Module):
    """A convolution of any stride, dilation and groups, as loops over slices."""

    def __init__(
        self, weight: Tensor, stride: int = 1, padding: tuple[int, int] = (0, 0), dilation: int = 1, groups: int = 1
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.randn(len(weight)))
        self.geometry = stride, padding, dilation, groups

    def forward(self, x: Tensor) -> Tensor:
        stride, padding, dilation, groups = self.geometry
        x = F.pad(x, padding * 2)
        extent = dilation * (self.weight.shape[2] - 1)
        rows = [range(0, size - extent, stride) for size in x.shape[2:]]
        out, inner = self.weight.shape[:2]
        y = x.new_zeros(len(x), out, *map(len, rows)) + self.bias.view(-1, 1, 1)
        for o in range(out):
            for c in range(inner):
                source = o // (out // groups) * inner + c
                for i in range(self.weight.shape[2]):
                    for j in range(self.weight.shape[3]):
                        top, left = i * dilation, j * dilation
                        part = x[:, source, top : top + x.shape[2] - extent, left : left + x.shape[3] - extent]
                        y[:, o] += float(self.weight[o, c, i, j]) * part[:, ::stride, ::stride]
        return y


class Unfolded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 9))

    def forward(self, x: Tensor) -> Tensor:
        assert bool(torch.isfinite(x).all()) or bool(x.sum() != 0) or True
        patches = F.unfold(x, 3, padding=1).view(len(x), 4, 9, -1)
        return torch.einsum("nckl,ck->ncl", patches, self.weight).view_as(x)


class FrozenNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(4) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            scale = self.weight * (self.running_var + 1e-5).rsqrt()
            return x * scale.view(1, -1, 1, 1) + (self.bias - self.running_mean * scale).view(1, -1, 1, 1)
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, eps=1e-5)


def border(mode: str) -> Function:
    def forward(net: Any, x: Tensor) -> Tensor:
        y = F.pad(x, (1, 1, 1, 1), mode)
        return sum(w * y[:, :, i : i + x.shape[2], i : i + x.shape[3]] for i, w in enumerate(net.taps.tolist()))  # type: ignore[return-value]

    return Function(forward, taps=torch.tensor([0.5, -2.0, 0.25]))


CONVOLUTIONS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, Any]]] = {
    "norm and pad": (lambda: randomise(BNAndPad(1, 4)), (4, 1, 1, 1), {"padding": ((1, 1), (1, 1)), "groups": 4}),
    "norm and wide pad": (lambda: randomise(BNAndPad(2, 4)), (4, 1, 1, 1), {"padding": ((2, 2), (2, 2))}),
    "pad with the bias": (PadWithBias, (4, 4, 3, 3), {"padding": ((1, 1), (1, 1))}),
    "shift": (Shift, (4, 1, 3, 2), {"groups": 4, "padding": ((1, 1), (1, 0))}),
    "unfold": (Unfolded, (4, 1, 3, 3), {"groups": 4, "padding": ((1, 1), (1, 1))}),
    "depthwise": (lambda: Taps(torch.randn(4, 1, 3, 3), padding=(1, 1), groups=4), (4, 1, 3, 3), {"groups": 4}),
    "grouped": (lambda: Taps(torch.randn(6, 2, 2, 2), groups=2), (6, 2, 2, 2), {"groups": 2}),
    "strided": (lambda: Taps(torch.randn(4, 1, 3, 3), 2, (1, 1), 1, 4), (4, 1, 3, 3), {"stride": (2, 2)}),
    "lopsided": (lambda: Taps(torch.randn(4, 1, 3, 3), 3, (0, 2), 1, 4), (4, 1, 3, 3), {"padding": ((0, 2), (0, 2))}),
    "patches": (lambda: Taps(torch.randn(4, 1, 4, 4), 4, groups=4), (4, 1, 4, 4), {"stride": (4, 4)}),
    "dilated": (lambda: Taps(torch.randn(4, 1, 3, 3), 1, (3, 3), 3, 4), (4, 1, 3, 3), {"dilation": (3, 3)}),
    "far away": (lambda: Taps(torch.randn(4, 1, 2, 2), 1, (25, 25), 50, 4), (4, 1, 2, 2), {"dilation": (50, 50)}),
    "reflected": (lambda: border("reflect"), (4, 1, 3, 3), {"padding_mode": "reflect"}),
    "replicated": (lambda: border("replicate"), (4, 1, 3, 3), {"padding_mode": "replicate"}),
    "wrapped": (lambda: border("circular"), (4, 1, 3, 3), {"padding_mode": "circular"}),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_in_python(name: str) -> None:
    torch.manual_seed(0)
    make, shape, geometry = CONVOLUTIONS[name]
    module = make().double()
    conv = find(module)
    assert isinstance(conv, Conv)
    assert tuple(conv.weight.shape) == shape
    assert {key: getattr(conv, key) for key in geometry} == geometry
    x = torch.randn(2, 4, 60, 61, dtype=torch.float64)
    torch.testing.assert_close(conv(x), module(x), rtol=1e-11, atol=1e-11)


def test_a_scale_of_every_channel() -> None:
    module = FrozenNorm()
    norm = find(module)
    assert isinstance(norm, ChannelAffine)
    assert norm.axis == -3
    x = torch.randn(2, 4, 5, 6)
    torch.testing.assert_close(norm(x.double()).float(), module(x))


def test_one_and_three_dimensions() -> None:
    def causal(net: Any, x: Tensor) -> Tensor:
        y = x.clone()
        y[:, :, 2:] += 0.5 * x[:, :, :-2]
        return y

    conv = find(Function(causal), rank=3)
    assert conv.padding == ((2, 0),)
    assert conv.dilation == (2,)
    assert conv.weight.flatten(1).tolist() == [[0.5, 1.0]] * 4

    def volume(net: Any, x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        y[:, :, 1:] = x[:, :, :-1]
        return y + x

    assert find(Function(volume), rank=5, channels=2).kernel_size == (2, 1, 1)


def test_a_matrix_product_on_the_last_axis() -> None:
    weight = torch.randn(3, 4, dtype=torch.float64)

    def product(net: Any, x: Tensor) -> Tensor:
        y = x.new_zeros(*x.shape[:-1], 3)
        for o in range(3):
            y[..., o] = (x * weight[o]).sum(-1) + o
        return y

    linear = find(Function(product), rank=3, axis=-1)
    assert linear.dimensions == 0
    torch.testing.assert_close(linear.weight, weight)
    assert linear.bias.tolist() == [0.0, 1.0, 2.0]
    assert find(Function(lambda net, x: x + x.mean(-2, keepdim=True)), rank=3, axis=-1) is None


def test_a_scripted_module() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)
            self.norm = nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(x)) + x

    model = nn.Sequential(
        nn.Conv2d(3, 4, 1, bias=False), torch.jit.script(randomise(Residual()).eval()), nn.BatchNorm2d(4)
    )
    x = torch.randn(2, 3, 9, 9)
    for mode in (True, False):
        compiled: Any = reparam.compile(model.train(mode), x)
        assert compiled.report.after.kernels == 1
        reparam.verify(model, compiled, x)


# Modules that are almost one. Each is a depthwise 3x3 convolution but for one thing.


def smooth(x: Tensor) -> Tensor:
    """An opaque depthwise convolution."""
    weight = torch.arange(1.0, 10.0, dtype=x.dtype).view(1, 1, 3, 3).expand(x.shape[1], 1, 3, 3)
    return F.conv2d(x, weight, padding=1, groups=x.shape[1])


def changed(index: Any, factor: float = 1.0 + 1e-6) -> Any:
    def forward(net: Any, x: Tensor) -> Tensor:
        y = smooth(x)
        y[index] = y[index] * factor
        return y

    return forward


def counts(net: Any, x: Tensor) -> Tensor:
    net.calls += 1
    return smooth(x)


def writes(net: Any, x: Tensor) -> Tensor:
    net.total += 1
    return smooth(x)


def rebinds(net: Any, x: Tensor) -> Tensor:
    net.total = net.total + x.mean()
    return smooth(x)


def remembers(net: Any, x: Tensor) -> Tensor:
    net.seen.append(x.shape)
    return smooth(x)


def alternates(net: Any, x: Tensor) -> Tensor:
    net.cell[0] = not net.cell[0]
    return smooth(x) if net.cell[0] else smooth(x) * (1 + 1e-6)


def in_place(net: Any, x: Tensor) -> Tensor:
    y = smooth(x)
    x.mul_(2)
    return y


def behind_its_back(net: Any, x: Tensor) -> Tensor:
    y = smooth(x)
    x.data[..., 0] = 1
    return y


def in_half(net: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return smooth(x)


def when(condition: Callable[[Tensor], Any]) -> Any:
    return lambda net, x: smooth(x) * (1.01 if bool(condition(x)) else 1.0)


class Subclass(Tensor):
    pass


NOT_CONVOLUTIONS: dict[str, Any] = {
    "top border": changed((..., 0, slice(None))),
    "left border": changed((..., 0)),
    "bottom border": changed((..., -1, slice(None))),
    "right border": changed((..., -1)),
    "corner": changed((..., 0, 0)),
    "last corner": changed((..., -1, -1)),
    "corner of one channel": changed((slice(None), 3, 0, -1)),
    "center": changed((..., 3, 3)),
    "one channel": lambda net, x: smooth(x) + 1e-6 * F.pad(x[:, 2:3].abs(), (0, 0, 0, 0, 2, 1)),
    "one sample": changed((0, ...)),
    "last sample": changed((-1, ...)),
    "bias in a corner": lambda net, x: F.pad(smooth(x)[:, :, 1:, 1:], (1, 0, 1, 0), value=1.0),
    "clamp": lambda net, x: smooth(x).clamp(-1e3, 1e3),
    "clamp far away": lambda net, x: smooth(x).clamp(max=1e8),
    "relu": lambda net, x: smooth(x).relu(),
    "relu6": lambda net, x: F.relu6(smooth(x)),
    "leaky": lambda net, x: F.leaky_relu(smooth(x), 1 - 1e-6),
    "relu of large": lambda net, x: smooth(x) + (x - 1e7).relu(),
    "deadzone": lambda net, x: smooth(F.hardshrink(x, 1e-5)),
    "abs": lambda net, x: smooth(x) + 1e-7 * x.abs(),
    "tanh": lambda net, x: torch.tanh(smooth(x)),
    "cube": lambda net, x: smooth(x) + 1e-8 * x**3,
    "rounding": lambda net, x: smooth(x.float().to(x.dtype)),
    "rounding to integers": lambda net, x: smooth((x * 1e6).round() / 1e6),
    "nan": lambda net, x: smooth(x.nan_to_num()),
    "odd": lambda net, x: smooth(x) * (1 + x.shape[-1] % 2),
    "even height": lambda net, x: smooth(x) * (2 - x.shape[-2] % 2),
    "single pixel": lambda net, x: smooth(x) * (1 + (x.shape[-1] == 1)),
    "square": lambda net, x: smooth(x) * (1 + (x.shape[-1] == x.shape[-2])),
    "large": lambda net, x: smooth(x) * (1 + (x.shape[-1] > 500)),
    "batch of one": lambda net, x: smooth(x) * (1 + (x.shape[0] == 1)),
    "large batch": lambda net, x: smooth(x) * (1 + (x.shape[0] > 20)),
    "small only": lambda net, x: smooth(x[:, :, :200, :200]),
    "size": lambda net, x: smooth(x) / x.shape[-1],
    "positive sum": when(lambda x: x.sum() > 0),
    "large sum": when(lambda x: x.sum() > 1e6),
    "mean": when(lambda x: x.mean() < -10),
    "all positive": when(lambda x: (x > 0).all()),
    "any zero": when(lambda x: (x[..., 0, 0] == 0).any() and x.any()),
    "constant": when(lambda x: (x == x.flatten()[0]).all() and x.any()),
    "maximum": when(lambda x: x.max() > 1e5),
    "norm": lambda net, x: smooth(x) / (1 + 1e-7 * x.std()),
    "instance statistics": lambda net, x: smooth(x) - x.mean((2, 3), keepdim=True),
    "batch statistics": lambda net, x: smooth(x) - x.mean(0, keepdim=True),
    "other samples": lambda net, x: smooth(x) + 1e-6 * x.roll(1, 0),
    "random": lambda net, x: smooth(x) * torch.rand(()),
    "random as Python's": lambda net, x: smooth(x) * random.random(),
    "dropout": lambda net, x: F.dropout(smooth(x), 0.1, training=True),
    "counts": counts,
    "writes": writes,
    "rebinds": rebinds,
    "remembers": remembers,
    "alternates": alternates,
    "in place": in_place,
    "behind its back": behind_its_back,
    "in half": in_half,
    "several outputs": lambda net, x: (smooth(x), x),
    "list": lambda net, x: [smooth(x)],
    "none": lambda net, x: None,
    "other type": lambda net, x: smooth(x).float(),
    "subclass": lambda net, x: smooth(x).as_subclass(Subclass),
    "raises": lambda net, x: 1 // 0,
    "raises below zero": lambda net, x: smooth(x) if (x >= 0).all() else 1 // 0,
    "raises when small": lambda net, x: smooth(x) if x.shape[-1] > 3 else 1 // 0,
    "constant output": lambda net, x: torch.ones_like(x),
    "position": lambda net, x: smooth(x) * torch.arange(x.shape[-1], dtype=x.dtype),
    "positional bias": lambda net, x: smooth(x) + torch.arange(x.shape[-1], dtype=x.dtype),
    "flip": lambda net, x: smooth(x.flip(-1)),
    "transpose": lambda net, x: smooth(x).transpose(2, 3),
    "upsampling": lambda net, x: smooth(x).repeat_interleave(2, -1),
    "flatten": lambda net, x: smooth(x).flatten(1),
    "pooled": lambda net, x: smooth(x).mean((2, 3), keepdim=True),
    "cumulative": lambda net, x: x.cumsum(-1),
    "channel shuffle": lambda net, x: x.view(len(x), 2, 2, *x.shape[2:]).transpose(1, 2).reshape(x.shape),
    "sort": lambda net, x: x.sort(1).values,
    "maximum of neighbours": lambda net, x: torch.maximum(x, x.roll(1, 1)),
}


@pytest.mark.parametrize("name", NOT_CONVOLUTIONS)
def test_what_is_no_convolution_is_refused(name: str) -> None:
    torch.manual_seed(0)
    module = Function(NOT_CONVOLUTIONS[name], calls=0, seen=[], cell=[False])
    module.register_buffer("total", torch.zeros(()))
    assert find(module) is None


def test_the_others_are_one_but_for_that() -> None:
    conv = find(Function(lambda net, x: smooth(x)))
    assert conv.kernel_size == (3, 3)
    assert conv.groups == 4


def test_hooks_inside_are_refused() -> None:
    module = Shift()
    module.inner = nn.Identity()
    module.inner.register_forward_hook(lambda module, inputs, output: output * 2)
    assert find(module) is None


def test_what_reaches_out_to_other_modules_is_refused() -> None:
    class Backbone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features: list[Tensor] = []
            self.conv = nn.Conv2d(4, 4, 1)
            self.part = Function(keeps, owner=[self])

        def forward(self, x: Tensor) -> list[Tensor]:
            self.features.clear()
            return [*self.features, self.part(self.conv(x))]

    def keeps(net: Any, x: Tensor) -> Tensor:
        y = smooth(x)
        y[:] = 2 * y
        net.owner[0].features.append(x)
        return y

    backbone = Backbone().eval()
    captured = capture(backbone)
    assert not captured.traced
    assert "changes its own features" in captured.remarks[-1].message
    read = _Read(4, 4, -3, None)
    assert _probed(backbone.part, (), {}, read, list(backbone.modules())) is None
    assert backbone.features == []


@pytest.mark.parametrize("layer", [nn.ReLU(), nn.InstanceNorm2d(4), nn.LayerNorm(4), nn.Softmax(1), nn.MaxPool2d(2)])
def test_a_layer_that_is_not_linear_refutes_its_module_before_it_runs(layer: nn.Module) -> None:
    calls: list[int] = []
    module = Function(lambda net, x: (calls.append(1), smooth(x))[1], layer=layer)
    assert find(module) is None
    assert not calls


def test_most_others_are_refuted_in_three_runs() -> None:
    calls: list[int] = []

    def attention(net: Any, x: Tensor) -> Tensor:
        calls.append(1)
        return x * (x * x).mean(1, keepdim=True).softmax(-1)

    assert find(Function(attention, query=nn.Conv2d(4, 4, 1))) is None
    assert len(calls) <= 4


# In models.


class OriginBlock(nn.Module):
    """DBB as its authors wrote it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6))
        self.point = nn.Sequential(nn.Conv2d(4, 6, 1, bias=False), nn.BatchNorm2d(6))
        self.average = nn.Sequential(
            nn.Conv2d(4, 6, 1, bias=False), BNAndPad(1, 6), nn.AvgPool2d(3, 1), nn.BatchNorm2d(6)
        )
        self.chain = nn.Sequential(
            nn.Conv2d(4, 4, 1, bias=False), BNAndPad(1, 4), nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6)
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x) + self.point(x) + self.average(x) + self.chain(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("examples", [False, True])
def test_the_published_dbb_becomes_one_convolution(dtype: torch.dtype, examples: bool) -> None:
    model = randomise(nn.Sequential(OriginBlock(), nn.Conv2d(6, 4, 1), OriginBlock())).to(dtype).eval()
    x = torch.randn(2, 4, 9, 10, dtype=dtype)
    compiled: Any = reparam.compile(model, x if examples else None)
    assert (compiled.report.after.convolutions, compiled.report.after.kernels) == (3, 5)
    assert sorted(compiled.state_dict()) == [f"{i}.{name}" for i in range(3) for name in ("bias", "weight")]
    reparam.verify(model, compiled, x)
    probed = [remark for remark in compiled.report.remarks if remark.rule == "Probe"]
    assert {remark.where for remark in probed} >= {"0.chain.1", "2.chain.1"}
    assert all("is a convolution: probed" in str(remark) for remark in probed)


def test_a_convolution_in_python_that_nothing_fuses_with_becomes_a_layer() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), Shift(), nn.ReLU()).eval()
    x = torch.randn(1, 3, 8, 8)
    compiled: Any = reparam.compile(model, x)
    assert type(compiled.get_submodule("2")) is nn.Conv2d
    assert compiled.get_submodule("2").groups == 4
    reparam.verify(model, compiled, x)


def test_channels_are_known_through_sums_activations_and_pools() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.pool, self.shift = nn.Conv2d(4, 4, 3, padding=1), nn.MaxPool2d(2), Shift()

        def forward(self, x: Tensor) -> Tensor:
            return self.shift(self.pool((x + self.conv(x)).relu()))  # type: ignore[no-any-return]

    captured = capture(Residual())
    assert [remark.where for remark in probe(captured.graph, captured.modules)] == ["shift"]


@pytest.mark.parametrize("inputs", [1, 2])
def test_a_module_with_several_inputs_is_not_probed(inputs: int) -> None:
    class Several(nn.Module):
        def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
            z = x.clone()
            z[:, 0] = 0
            return z if y is None else z + y

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.several = nn.Conv2d(4, 4, 1), Several()

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.several(y, *[x] * (inputs - 1))  # type: ignore[no-any-return]

    captured = capture(Net())
    assert len(probe(captured.graph, captured.modules)) == 2 - inputs


# Modules that can be traced, to operations that the algebra does not know.


def unfolded(net: Any, x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return (F.unfold(x, 3, padding=1).view(n, c, 9, h * w) * net.weight[:, :, None]).sum(2).view(n, c, h, w)


def mixed(net: Any, x: Tensor) -> Tensor:
    return torch.einsum("nchw,oc->nohw", x, net.weight[:, :4]) + net.weight[:, :1, None]


def rolled(net: Any, x: Tensor) -> Tensor:
    return x.roll(1, -1) + 0.5 * x.roll(-1, -2) + x


def stacked(net: Any, x: Tensor) -> Tensor:
    y = F.pad(x, (1, 1, 0, 0))
    return (torch.stack([y[..., :-2], y[..., 1:-1], y[..., 2:]], -1) * net.weight[0, :3]).sum(-1)


def permuted(net: Any, x: Tensor) -> Tensor:
    return x.index_select(1, net.order)


def attended(net: Any, x: Tensor) -> Tensor:
    return torch.einsum("nchw,nc->nchw", x, x.mean((2, 3)).sigmoid())


def squared(net: Any, x: Tensor) -> Tensor:
    return torch.einsum("nchw,oc->nohw", x, net.weight[:, :4]) * x


def changing(net: Any, x: Tensor) -> Tensor:
    return (x.roll(1, -1) + x.roll(2, -1)) * x.shape[-1]


class Around(nn.Module):
    """A module behind a convolution and before a norm."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.conv, self.inner, self.norm = nn.Conv2d(3, 4, 1), Function(function), nn.BatchNorm2d(4)
        self.inner.weight = nn.Parameter(torch.randn(4, 9))
        self.inner.register_buffer("order", torch.tensor([2, 0, 3, 1]))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.inner(self.conv(x).relu()))  # type: ignore[no-any-return]


@pytest.mark.parametrize("function", [unfolded, mixed, rolled, stacked])
@pytest.mark.parametrize("examples", [False, True])
def test_a_traced_module_that_is_a_convolution(function: Any, examples: bool) -> None:
    model = randomise(Around(function)).double().eval()
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    compiled: Any = reparam.compile(model, x if examples else None)
    assert compiled.report.after.convolutions == 2
    assert compiled.report.after.norms == 0
    assert "Function is a convolution: probed" in str(compiled.report)
    reparam.verify(model, compiled, x)


@pytest.mark.parametrize("function", [permuted, attended, squared, changing])
def test_a_traced_module_that_is_none_or_cheaper_as_it_is(function: Any) -> None:
    model = randomise(Around(function)).double().eval()
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    compiled: Any = reparam.compile(model, x)
    assert compiled.report.after.convolutions == 1
    assert "probed" not in str(compiled.report)
    reparam.verify(model, compiled, x)


def test_a_module_that_was_traced_with_other_arguments_is_held_to_its_trace() -> None:
    class Power(nn.Module):
        def forward(self, x: Tensor, factor: float = 1.0) -> Tensor:
            return factor * (x.roll(1, -1) + x.roll(2, -1)) + x

    class Net(Around):
        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.inner(self.conv(x), 3.0))  # type: ignore[no-any-return]

    net = Net(None)
    net.inner = Power()
    net = randomise(net).double().eval()  # type: ignore[assignment]
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    compiled: Any = reparam.compile(net, x)
    assert "probed" not in str(compiled.report)
    reparam.verify(net, compiled, x)

"""Borders that Python writes around what an operator made."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from networks import assert_same, layers, normal
from torch import Tensor, nn

import reparam
from support import Net, randomise


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
    reparam.verify(model, compiled, torch.randn(1, 4, 3, 7, dtype=dtype))
    taken_in = {remark.where for remark in compiled.report.fused if remark.rule == "Border"}
    assert taken_in == {f"{i}.{branch}.1.bn" for i in (0, 2) for branch in ("average", "chain")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_published_ecb_becomes_one_convolution(dtype: torch.dtype) -> None:
    model = PadWithBias().to(dtype).eval()
    x = torch.randn(2, 4, 9, 10, dtype=dtype)
    compiled: Any = reparam.compile(model, x)
    assert compiled.report.before.kernels == 3
    assert compiled.report.after.kernels == 1
    reparam.verify(model, compiled, x)
    reparam.verify(model, compiled, torch.randn(1, 4, 1, 2, dtype=dtype))


def test_a_border_that_nothing_else_fuses_with_is_the_padding_of_a_layer() -> None:
    model = randomise(nn.Sequential(nn.ReLU(), BNAndPad(2, 4), nn.ReLU())).double().eval()
    x = normal(2, 4, 5, 6)
    compiled: Any = reparam.compile(model, x)
    assert (compiled.report.before.kernels, compiled.report.after.kernels) == (4, 3)
    (layer,) = [module for module in compiled.modules() if isinstance(module, nn.Conv2d)]
    assert (layer.groups, layer.padding) == (4, (2, 2))
    reparam.verify(model, compiled, x)


def bordered(net: Any, x: Tensor) -> Tensor:
    """A border around a layer, side by side, in any order, of the layer's bias or of something close to it."""
    y = net.layer(x)
    y = F.pad(y, net.amounts, value=net.number)
    for index in net.indices:
        y[index] = net.values
    return net.after(y)  # type: ignore[no-any-return]


def sides(amounts: list[int], dimensions: int) -> list[tuple[Any, ...]]:
    """The indices of what F.pad puts around the last axes."""
    found = []
    for axis in range(dimensions):
        for side, amount in enumerate(amounts[2 * axis : 2 * axis + 2]):
            if amount:
                item = slice(-amount, None) if side else slice(0, amount)
                found.append((..., item, *[slice(None)] * axis))
    return found


def bias_of(layer: nn.Module, dimensions: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """What a pointwise layer makes of zeros, in the shape that broadcasts over images."""
    channels = layer.in_channels if isinstance(layer, nn.modules.conv._ConvNd) else layer.num_features  # type: ignore[union-attr]
    with torch.no_grad():
        made = layer(torch.zeros(1, channels, *[16] * dimensions, dtype=dtype))
    return made.flatten(2)[..., :1].reshape(1, -1, *[1] * dimensions)  # type: ignore[no-any-return]


@given(st.data(), st.integers(1, 3))
def test_any_border_around_any_layer(data: st.DataObject, dimensions: int) -> None:
    conv = [nn.Conv1d, nn.Conv2d, nn.Conv3d][dimensions - 1]
    norm = [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d][dimensions - 1]
    makers = [
        lambda: conv(3, 4, 1),
        lambda: conv(3, 4, 1, stride=2),
        lambda: conv(3, 4, 1, bias=False),
        lambda: conv(4, 4, 1, groups=2, padding=1),
        lambda: norm(4),
        lambda: data.draw(layers(dimensions, 4)),
    ]
    layer = randomise(data.draw(st.sampled_from(makers))()).double().eval()
    values = bias_of(layer, dimensions)
    amounts = data.draw(st.lists(st.integers(0, 2), min_size=2 * dimensions, max_size=2 * dimensions))
    indices = data.draw(st.permutations(sides(amounts, dimensions)))
    change = data.draw(st.sampled_from(["none", "none", "other value", "one missing", "too wide", "corner", "twice"]))
    if change == "other value":
        values = values + 1e-6
    elif change == "one missing":
        indices = indices[1:]
    elif change == "too wide" and indices:
        indices[0] = tuple(slice(0, 3) if item == slice(0, 2) else item for item in indices[0])
    elif change == "corner" and indices and dimensions > 1:
        indices[0] = (*indices[0][:-1], slice(0, 1)) if indices[0][-1] == slice(None) else indices[0]
    elif change == "twice":
        indices = [*indices, *indices[:1]]
    after = data.draw(st.sampled_from([nn.Identity(), nn.ReLU(), conv(values.shape[1], 2, 3)])).double()
    number = data.draw(st.sampled_from([0.0, 1.5]))
    net = Net(bordered, layer=layer, after=after, amounts=amounts, indices=indices, values=values, number=number).eval()
    x = normal(2, layer.in_channels if hasattr(layer, "in_channels") else 4, *range(12, 12 + dimensions))
    compiled: Any = reparam.compile(net, x)
    assert_same(net, compiled, x)
    fits = change == "none" and not isinstance(after, nn.Conv2d)
    if fits and isinstance(layer, norm) and any(amounts):
        assert any(remark.rule == "Border" for remark in compiled.report.fused)


def read_before(net: Any, x: Tensor) -> Tensor:
    y = F.pad(net.norm(x), (1, 1, 0, 0))
    z = y.sum()
    y[..., :1] = net.values
    y[..., -1:] = net.values
    return y * z


def read_between(net: Any, x: Tensor) -> Tensor:
    y = F.pad(net.norm(x), (1, 1, 0, 0))
    y[..., :1] = net.values
    z = y + 1
    y[..., -1:] = net.values
    return y * z


def read_as_a_view(net: Any, x: Tensor) -> Tensor:
    y = F.pad(net.norm(x), (1, 1, 0, 0))
    z = y[..., 1:]
    y[..., :1] = net.values
    y[..., -1:] = net.values
    return torch.cat([y, z], -1)


def norm_read_elsewhere(net: Any, x: Tensor) -> Tensor:
    n = net.norm(x)
    y = F.pad(n, (1, 1, 0, 0))
    y[..., :1] = net.values
    y[..., -1:] = net.values
    return y.sum() * n


def written_to_the_inside(net: Any, x: Tensor) -> Tensor:
    y = F.pad(net.norm(x), (1, 1, 0, 0))
    y[..., :1] = net.values
    y[..., 2:3] = net.values
    y[..., -1:] = net.values
    return y


def written_in_steps(net: Any, x: Tensor) -> Tensor:
    y = F.pad(net.norm(x), (2, 0, 0, 0))
    y[..., 0:2:2] = net.values
    return y


def in_place(net: Any, x: Tensor) -> Tensor:
    x = x + 1
    n = x.add_(net.values)
    y = F.pad(n, (1, 1, 0, 0))
    y[..., :1] = net.values
    y[..., -1:] = net.values
    return y * x.sum()


def cropped(net: Any, x: Tensor) -> Tensor:
    y = F.pad(net.norm(x), (1, -1, 0, 0))
    y[..., :1] = net.values
    return y


def written_later(net: Any, x: Tensor) -> Tensor:
    y = F.pad(net.norm(x), (1, 1, 0, 0))
    y[..., :1] = net.values
    y[..., -1:] = net.values
    z = y * 2
    y[..., :1] = 7.0
    return y + z


@pytest.mark.parametrize(
    "function",
    [
        read_before, read_between, read_as_a_view, norm_read_elsewhere, written_to_the_inside, written_in_steps,
        in_place, cropped, written_later,
    ],
)  # fmt: skip
def test_what_is_no_border_stays(function: Any) -> None:
    norm = randomise(nn.BatchNorm2d(4)).double().eval()
    net = Net(function, norm=norm, values=bias_of(norm, 2)).eval()
    x = normal(2, 4, 5, 6)
    compiled: Any = reparam.compile(net, x)
    assert not any(remark.rule == "Border" for remark in compiled.report.remarks)
    assert_same(net, compiled, x)


def test_another_dtype_or_shape_of_values_stays() -> None:
    norm = randomise(nn.BatchNorm2d(4)).eval()
    whole = bias_of(norm, 2, torch.float32)
    for values in (whole.half().float(), whole[:, :1], whole.flatten()[0].item()):
        net = Net(written_to_both, norm=norm, values=values).eval()
        x = torch.randn(2, 4, 5, 6)
        compiled: Any = reparam.compile(net, x)
        assert not any(remark.rule == "Border" for remark in compiled.report.remarks)
        reparam.verify(net, compiled, x)


def written_to_both(net: Any, x: Tensor) -> Tensor:
    y = F.pad(net.norm(x), (1, 1, 0, 0))
    y[..., :1] = net.values
    y[..., -1:] = net.values
    return y


def test_what_where_leaves_out_stays() -> None:
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 1), BNAndPad(1, 4), nn.Conv2d(4, 4, 3))).eval()
    x = torch.randn(2, 3, 5, 6)
    compiled: Any = reparam.compile(model, x, where="2")
    assert not compiled.report.fused
    reparam.verify(model, compiled, x)

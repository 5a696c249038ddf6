"""Blocks: each is the one convolution that its paper says, whatever its arguments, and compiles to it."""

from __future__ import annotations

import inspect

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import random_tensor, seeds
from torch import Tensor, nn
from torch.nn import functional as F

import reparam
from reparam import models
from reparam.errors import ModelError
from reparam.models import blocks, registry
from support import count_calls, randomise

# What each block leaves open: kernel sizes, and whether it can be dilated.
KERNELS = {
    "repvgg": (1, 2, 3, 4, 5),
    "qarepvgg": (1, 2, 3, 4, 5),
    "mobileone": (1, 2, 3, 4, 5),
    "acnet": (1, 2, 3, 4, 5),
    "replk": (6, 7, 9, 10),
    "dilated": (5, 7, 9),
    "dbb": (1, 2, 3, 4, 5),
    "ecb": (3,),
    "orepa": (1, 2, 3, 4, 5),
}
MIXERS = ("repmixer", "repvit", "repghost")


def same_padding(kernel: int, dilation: int) -> int | None:
    extent = dilation * (kernel - 1)
    return None if extent % 2 else extent // 2


@st.composite
def geometries(draw: st.DrawFn, name: str) -> dict[str, object]:
    """Any convolution that the block may stand for: also even and oblong kernels, and padding that does not fit."""
    groups = draw(st.sampled_from((1, 2, 3)))
    in_channels, out_channels = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
    if draw(st.booleans()):
        out_channels = in_channels
    oblong = name not in ("dilated", "ecb") and draw(st.booleans())
    kernel = draw(st.sampled_from(KERNELS[name]))
    kernels = (kernel, draw(st.sampled_from(KERNELS[name])) if oblong else kernel)
    dilation = 1 if name == "dbb" else draw(st.sampled_from((1, 1, 2)))
    paddings = [same_padding(k, dilation) for k in kernels]
    if None in paddings or draw(st.booleans()):
        paddings = [draw(st.integers(0, 4)) for _ in kernels]
    return {
        "in_channels": in_channels,
        "out_channels": out_channels,
        "kernel_size": kernels,
        "stride": (draw(st.integers(1, 2)), draw(st.integers(1, 2))),
        "padding": tuple(paddings),
        "dilation": dilation,
        "groups": groups,
    }


def image(channels: int, height: int, width: int, seed: int = 0) -> Tensor:
    return random_tensor((2, channels, height, width), seed)


def lived_in(block: nn.Module, seed: int = 0) -> nn.Module:
    return randomise(block, seed).double().eval()


def run(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


def assert_same(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    assert expected.std() > 0
    assert (actual - expected).abs().max() <= 1e-9 * expected.abs().max()


def assert_one_convolution(block: nn.Module, plain: nn.Conv2d, seed: int) -> None:
    """The block compiles to a convolution with the geometry of ``plain`` and nothing else, and computes the same."""
    compiled = reparam.compile(block)
    for size in ((32, 31), (23, 26)):
        x = image(plain.in_channels, *size, seed=seed)
        assert run(plain.double(), x).shape == run(block, x).shape
        assert_same(run(compiled, x), run(block, x))
        assert {kind: n for kind, n in count_calls(compiled, x).items() if n} == {"convolution": 1, "kernels": 1}
    [left] = [module for module in compiled.modules() if isinstance(module, nn.Conv2d)]
    assert compiled.report.after.norms == 0
    for fact in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "groups"):
        assert getattr(left, fact) == getattr(plain, fact), fact
    for ours, theirs, taps in zip(left.dilation, plain.dilation, plain.kernel_size, strict=True):
        assert ours == theirs or taps == 1, "one tap has no distance to the next"


@pytest.mark.parametrize("name", KERNELS)
@given(st.data(), seeds)
def test_every_block_is_one_convolution(name, data, seed):
    geometry = data.draw(geometries(name))
    block = lived_in(blocks.builder(name)(**geometry), seed)
    assert_one_convolution(block, nn.Conv2d(**geometry), seed)


@pytest.mark.parametrize("name", MIXERS)
@given(st.integers(1, 6), st.sampled_from((1, 3, 5, 7)), seeds)
def test_every_mixer_is_one_depthwise_convolution(name, channels, kernel, seed):
    plain = nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels)
    block = blocks.builder(name)(channels, channels, kernel, groups=channels)
    assert_one_convolution(lived_in(block, seed), plain, seed)


def test_a_repghost_module_is_a_pointwise_and_a_depthwise_convolution():
    """The block where the paper has it: behind a 1x1 convolution, between two ReLUs."""
    norm, block = nn.BatchNorm2d(6), blocks.builder("repghost")(6, 6, 3, groups=6)
    module = lived_in(nn.Sequential(nn.Conv2d(4, 6, 1, bias=False), norm, nn.ReLU(), block, nn.ReLU()))
    x = image(4, 9, 9)
    compiled = reparam.compile(module)
    assert_same(run(compiled, x), run(module, x))
    calls = count_calls(compiled, x)
    assert (calls["convolution"], calls["other"], calls["kernels"]) == (2, 2, 4), "two convolutions and two ReLUs"


@pytest.mark.parametrize("branches", [1, 2, 6])
def test_mobileone_with_any_number_of_kernels(branches):
    block = lived_in(blocks.MobileOneBlock(3, 4, branches=branches))
    assert sum(isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3) for m in block.modules()) == branches
    assert_one_convolution(block, nn.Conv2d(3, 4, 3, padding=1), 0)


def test_large_kernels_are_depthwise_unless_told_otherwise():
    for build in (blocks.RepLKBlock, blocks.DilatedBlock):
        assert build(6, 6).geometry.groups == 6
        assert build(6, 6, 9, groups=2).geometry.groups == 2
    assert blocks.RepLKBlock(2, 2).geometry.kernel_size == (31, 31)
    assert blocks.RepMixer(6, 6).geometry.groups == 6


@pytest.mark.parametrize("kernel", [5, 7, 9, 11, 13, 15, 17])
def test_every_published_dilated_block(kernel):
    assert_one_convolution(
        lived_in(blocks.DilatedBlock(3, 3, kernel)), nn.Conv2d(3, 3, kernel, padding=kernel // 2, groups=3), 0
    )


def test_the_dilated_branches_may_be_chosen():
    block = lived_in(blocks.DilatedBlock(2, 4, 19, groups=1, branches=[(3, 9), (7, 3)]))
    assert_one_convolution(block, nn.Conv2d(2, 4, 19, padding=9), 0)


# The formulas, written out once more with torch's functions.


def norm(bn: nn.BatchNorm2d, x: Tensor) -> Tensor:
    return F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=bn.eps)


@given(seeds)
def test_repvgg_is_its_papers_sum(seed):
    block = lived_in(blocks.RepVGGBlock(4, 4), seed)
    (conv3, bn3), (conv1, bn1), bn0 = block.branches
    x = image(4, 7, 8, seed)
    expected = norm(bn3, F.conv2d(x, conv3.weight, padding=1)) + norm(bn1, F.conv2d(x, conv1.weight)) + norm(bn0, x)
    assert_same(run(block, x), expected.detach())


@given(seeds)
def test_qarepvgg_norms_the_sum(seed):
    block = lived_in(blocks.QARepVGGBlock(4, 4), seed)
    (conv3, bn3), conv1, _ = block.branches
    x = image(4, 7, 8, seed)
    total = norm(bn3, F.conv2d(x, conv3.weight, padding=1)) + F.conv2d(x, conv1.weight) + x
    assert_same(run(block, x), norm(block.norm, total).detach())


@given(seeds)
def test_dbb_pads_with_the_norm_of_zero(seed):
    """As its authors compute it: norm first, then a border of the value that the norm gives to zero."""
    block = lived_in(blocks.DiverseBranchBlock(4, 6), seed)
    (convk, bnk), (conv1, bn1), (inner, bni, outer, bno), (point, bnp, pool, bna) = block.branches
    x = image(4, 7, 8, seed)

    def padded(bn: nn.BatchNorm2d, y: Tensor) -> Tensor:
        of_zero = norm(bn, torch.zeros(1, y.shape[1], 1, 1, dtype=y.dtype))
        border = F.pad(norm(bn, y) - of_zero, (1, 1, 1, 1))
        return border + of_zero

    deep = norm(bno, F.conv2d(padded(bni, F.conv2d(x, inner.weight)), outer.weight))
    mean = norm(bna, F.avg_pool2d(padded(bnp, F.conv2d(x, point.weight)), 3, 1))
    plain = norm(bnk, F.conv2d(x, convk.weight, padding=1)) + norm(bn1, F.conv2d(x, conv1.weight))
    assert (pool.kernel_size, pool.stride) == ((3, 3), (1, 1))
    assert_same(run(block, x), (plain + deep + mean).detach())


@given(seeds)
def test_ecb_filters_edges(seed):
    block = lived_in(blocks.EdgeBlock(3, 5), seed)
    plain, deep, *edges = block.branches
    x = image(3, 7, 8, seed)
    total = F.conv2d(x, plain.weight, plain.bias, padding=1)

    def padded(point: nn.Conv2d) -> Tensor:
        """As its authors compute it: a border of the bias."""
        bias = point.bias.view(1, -1, 1, 1)
        return F.pad(F.conv2d(x, point.weight, point.bias) - bias, (1, 1, 1, 1)) + bias

    total = total + F.conv2d(padded(deep[0]), deep[1].weight)
    filters = (
        [[1, 0, -1], [2, 0, -2], [1, 0, -1]],
        [[1, 2, 1], [0, 0, 0], [-1, -2, -1]],
        [[0, 1, 0], [1, -4, 1], [0, 1, 0]],
    )
    for edge, taps in zip(edges, filters, strict=True):
        total = total + F.conv2d(padded(edge.point), edge.scale * torch.tensor(taps, dtype=torch.float64), groups=5)
    assert_same(run(block, x), total.detach())


@given(seeds, st.sampled_from((1, 2)))
def test_orepas_kernel_is_the_sum_of_its_branches_run_on_the_image(seed, groups):
    """What the block computes as kernels, computed as feature maps."""
    block = blocks.OREPABlock(4, 6, groups=groups, expansion=2)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(random_tensor(parameter.shape, seed))
    block = lived_in(block, seed)
    x = image(4, 7, 8, seed)
    columns = 4 // groups

    def conv(y: Tensor, weight: Tensor, groups: int = groups) -> Tensor:
        return F.conv2d(y, weight, padding=weight.shape[-1] // 2, groups=groups)

    filters = [pattern.unsqueeze(1) for pattern in block.patterns]
    centre, mean, frequency = (
        conv(conv(x, w[..., None, None]), f, 6) for w, f in zip(block.point, filters, strict=True)
    )
    torch.testing.assert_close(
        mean, F.avg_pool2d(conv(x, block.point[1][..., None, None]), 3, 1, 1), rtol=1e-6, atol=1e-6
    )
    inner = block.inner + torch.eye(columns, dtype=torch.float64)
    deep = conv(conv(x, inner.reshape(4, columns, 1, 1)), block.outer)
    depthwise = conv(x, block.depthwise.reshape(8, 1, 3, 3), 4)
    separable = conv(depthwise, block.mix.reshape(6, columns * 2, 1, 1))
    branches = torch.stack([conv(x, block.kernel), centre, mean, frequency, deep, separable])
    total = (block.scales[..., None, None].unsqueeze(1) * branches).sum(0)
    assert_same(run(block, x), norm(block.norm, total).detach())


def test_orepas_frequencies_are_cosines_of_rows_then_columns():
    patterns = blocks.OREPABlock(2, 4).patterns[2].double()
    along = torch.tensor([0.5, 1.5, 2.5], dtype=torch.float64) * torch.pi / 3
    for channel, expected in enumerate(
        [along.cos().view(3, 1), (2 * along).cos().view(3, 1), along.cos(), (2 * along).cos()]
    ):
        torch.testing.assert_close(patterns[channel], expected.expand(3, 3), rtol=0, atol=1e-6)


@given(seeds)
def test_repmixer_mixes_what_is_not_the_norm(seed):
    block = lived_in(blocks.RepMixer(4, 4), seed)
    (conv3, bn3), (conv1, bn1), bn0 = block.mixer.branches
    x = image(4, 7, 8, seed)
    mixer = norm(bn3, F.conv2d(x, conv3.weight, padding=1, groups=4)) + norm(bn1, F.conv2d(x, conv1.weight, groups=4))
    expected = x + block.layer_scale * (mixer + norm(bn0, x) - norm(block.norm, x))
    assert_same(run(block, x), expected.detach())


def test_repvits_mixer_is_the_networks_own():
    assert type(blocks.builder("repvit")(4, 4, groups=4)) is models.repvit.TokenMixer


@pytest.mark.parametrize("name", ["repvgg", "mobileone", "qarepvgg"])
def test_an_identity_only_where_there_is_one(name):
    def branches(**geometry: object) -> int:
        return len(blocks.builder(name)(4, **geometry).branches)

    assert branches(out_channels=4) == branches(out_channels=8) + 1
    assert branches(out_channels=4) == branches(out_channels=4, stride=2) + 1 == branches(out_channels=4, padding=0) + 1


# Names, and bad arguments.


def test_names():
    assert sorted(blocks.names()) == sorted([*KERNELS, *MIXERS])
    for name in blocks.names():
        assert "arXiv:" in inspect.getdoc(blocks.builder(name)) or "doi:" in inspect.getdoc(blocks.builder(name))


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("MobileOne2", "did you mean mobileone?"),
        ("repvg", "did you mean .*repvgg"),
        ("xyz", "known are repvgg, .*orepa"),
    ],
)
def test_unknown_names_are_answered_with_known_ones(name, advice):
    with pytest.raises(ModelError, match=f"no block named '{name}': {advice}"):
        blocks.builder(name)


def test_a_block_of_your_own(monkeypatch):
    monkeypatch.setattr(blocks, "_BLOCKS", registry.Known("block"))
    assert blocks.register("plain")(nn.Conv2d) is nn.Conv2d
    assert blocks.builder("plain") is nn.Conv2d
    with pytest.raises(ModelError, match="registered already"):
        blocks.register("plain")(nn.Conv2d)


@pytest.mark.parametrize(
    ("name", "geometry", "complaint"),
    [
        ("repvgg", {"kernel_size": 0}, "at least 1"),
        ("repvgg", {"in_channels": 0}, "at least 1"),
        ("acnet", {"groups": 3}, "3 groups do not divide 4 input and 4 output channels"),
        ("acnet", {"kernel_size": 4}, "give the padding"),
        ("acnet", {"padding": -1}, "negative"),
        ("mobileone", {"branches": 0}, "at least one kernel"),
        ("replk", {"kernel_size": 5}, "less than the kernel"),
        ("replk", {"small_kernel": 0}, "at least 1"),
        ("dilated", {"kernel_size": 6, "padding": 0}, "no published dilated branches for a kernel of"),
        ("dilated", {"kernel_size": 7, "branches": [(3, 4)]}, "do not fit into a kernel"),
        ("dbb", {"dilation": 2}, "average pooling in a diverse branch block has none"),
        ("ecb", {"kernel_size": 5}, "edge filters are 3x3"),
        ("ecb", {"expansion": 0}, "between the two convolutions"),
        ("orepa", {"expansion": 0}, "every input channel"),
        ("repmixer", {"stride": 2}, "mixes positions only"),
        ("repmixer", {"out_channels": 8}, "mixes positions only"),
        ("repvit", {}, "mixes positions only"),
        ("repvit", {"groups": 4, "dilation": 2}, "square kernel of dilation 1"),
        ("repghost", {"groups": 4, "padding": 0}, "mixes positions only"),
    ],
)
def test_impossible_arguments(name, geometry, complaint):
    with pytest.raises(ModelError, match=complaint):
        blocks.builder(name)(**{"in_channels": 4, "out_channels": 4} | geometry)


# Blocks are there to be trained.


@pytest.mark.parametrize("name", blocks.names())
def test_every_parameter_learns_and_the_trained_block_still_compiles(name):
    torch.manual_seed(0)
    kernel = KERNELS.get(name, (3,))[-1]
    block = blocks.builder(name)(4, 4, kernel, padding=kernel // 2, groups=4).double()
    plain_size = image(4, 12, 12)
    optimizer = torch.optim.SGD(block.parameters(), 0.01)
    for seed in range(3):
        optimizer.zero_grad()
        output = block(image(4, 12, 12, seed))
        (output - image(*output.shape[1:], seed=seed + 9)).square().mean().backward()
        for path, parameter in block.named_parameters():
            assert parameter.grad is not None, path
        optimizer.step()
    assert all(bn.num_batches_tracked == 3 for bn in block.modules() if isinstance(bn, nn.BatchNorm2d))
    block.eval()
    assert_same(run(reparam.compile(block), plain_size), run(block, plain_size))

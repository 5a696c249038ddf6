"""Hypothesis strategies for linear operators, shared by the test modules.

They are constructive: what a test needs to hold (a common stride, a common output size) is given as an argument and
the rest is drawn around it, so that no example is thrown away and none is refused by accident.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor

from reparam.algebra import AveragePool, ChannelAffine, Conv, ConvTranspose, Operator, Pad

MODES = ("zeros", "reflect", "replicate", "circular")
CHANNELS = (1, 2, 3, 4, 6, 8)
LARGEST_KERNEL = {1: 5, 2: 4, 3: 3}
PRECISIONS = (torch.float64, torch.float32, torch.bfloat16)

dimensions = st.integers(1, 3)
borders = st.sampled_from(MODES[1:])
modes = st.just("zeros") | borders
seeds = st.integers(0, 2**32 - 1)


def random_tensor(shape: Sequence[int], seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal numbers that depend on the seed alone."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@st.composite
def tensors(draw: st.DrawFn, shape: Sequence[int]) -> Tensor:
    """Numbers of any precision, as a model's parameters have them: on the autograd tape."""
    return random_tensor(shape, draw(seeds), draw(st.sampled_from(PRECISIONS))).requires_grad_()


def divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


@st.composite
def paddings(draw: st.DrawFn, total: int, mode: str = "zeros") -> tuple[int, int]:
    """(before, after) with the given sum, like ``same`` or in any other way; only zero padding pads and crops."""
    if draw(st.booleans()):
        return total // 2, total - total // 2
    slack = 2 if mode == "zeros" else 0
    before = draw(st.integers(min(0, total) - slack, max(0, total) + slack))
    return before, total - before


@st.composite
def convs(
    draw: st.DrawFn,
    dimensions: int,
    *,
    in_channels: int | None = None,
    out_channels: int | None = None,
    groups: int | None = None,
    kernel_size: Sequence[int] | None = None,
    stride: Sequence[int] | None = None,
    dilation: Sequence[int] | None = None,
    growth: Sequence[int] | None = None,
    padding: Sequence[tuple[int, int]] | None = None,
    mode: str = "zeros",
    bias: bool | None = None,
) -> Conv:
    """Convolutions; an argument that is left out is drawn.

    ``growth`` is the output size minus the input size at stride 1; it leaves the position of the kernel open.
    """
    axes = range(dimensions)
    if groups is None:
        known = math.gcd(in_channels or 0, out_channels or 0)
        groups = draw(st.sampled_from(divisors(known) if known else (1, 2, 3)))
    in_channels = in_channels or groups * draw(st.integers(1, 3))
    out_channels = out_channels or groups * draw(st.integers(1, 3))
    if kernel_size is None:
        kernel_size = [draw(st.integers(1, LARGEST_KERNEL[dimensions])) for _ in axes]
    if dilation is None:
        dilation = [draw(st.sampled_from((1, 1, 2, 3))) for _ in axes]
    if stride is None:
        stride = [draw(st.integers(1, 3)) for _ in axes]
    extent = [d * (k - 1) for d, k in zip(dilation, kernel_size, strict=True)]
    if padding is None and growth is None:
        growth = [draw(st.integers(-e, 0) | st.integers(-e - 2, 2)) for e in extent]
    if padding is None:
        padding = [draw(paddings(g + e, mode)) for g, e in zip(growth or (), extent, strict=True)]
    weight = draw(tensors((out_channels, in_channels // groups, *kernel_size)))
    has_bias = draw(st.booleans()) if bias is None else bias
    return Conv(
        weight,
        draw(tensors((out_channels,))) if has_bias else None,
        tuple(stride),
        tuple(padding),
        tuple(dilation),
        groups,
        mode,
        gain=random_tensor((out_channels,), draw(seeds)) if draw(st.booleans()) else None,
    )


@st.composite
def transposes(
    draw: st.DrawFn,
    dimensions: int,
    *,
    in_channels: int | None = None,
    out_channels: int | None = None,
    stride: Sequence[int] | None = None,
    growth: Sequence[int] | None = None,
    padding: Sequence[tuple[int, int]] | None = None,
    bias: bool | None = None,
) -> ConvTranspose:
    """Transposed convolutions; an argument that is left out is drawn.

    ``growth`` is what the crop leaves of the kernel: the output size is ``stride * (input - 1) + 1 - growth``.
    """
    conv = draw(
        convs(
            dimensions,
            in_channels=in_channels,
            out_channels=out_channels,
            stride=stride,
            growth=growth,
            padding=padding,
            bias=bias,
        )
    )
    shared = {f: getattr(conv, f) for f in ("weight", "bias", "stride", "padding", "dilation", "groups", "gain")}
    return ConvTranspose(**shared)


@st.composite
def linears(draw: st.DrawFn, in_channels: int | None = None, out_channels: int | None = None) -> Conv:
    return draw(convs(0, in_channels=in_channels, out_channels=out_channels, groups=1))


@st.composite
def affines(draw: st.DrawFn, channels: int, axis: int, *, shift: bool | None = None) -> ChannelAffine:
    """Scales, with a shift or not, for every channel or uniform."""
    count = draw(st.sampled_from((1, channels, channels)))
    shifts = draw(st.booleans()) if shift is None else shift
    return ChannelAffine(draw(tensors((count,))), draw(tensors((count,))) if shifts else None, axis)


@st.composite
def pools(
    draw: st.DrawFn,
    dimensions: int,
    *,
    stride: Sequence[int] | None = None,
    growth: Sequence[int] | None = None,
    padded: bool = True,
) -> AveragePool:
    """Average pools; ``growth`` (at most 1 an axis, 0 when not padded) is kept by a choice of window and padding."""
    kernel_size, padding = [], []
    for axis in range(dimensions):
        windows = [(k, p) for k in range(1, 7) for p in range(k // 2 + 1 if padded else 1)]
        k, p = draw(st.sampled_from([(k, p) for k, p in windows if growth is None or 2 * p - k + 1 == growth[axis]]))
        kernel_size.append(k)
        padding.append(p)
    if stride is None:
        stride = [draw(st.integers(1, 3)) for _ in range(dimensions)]
    divisor = draw(st.none() | st.integers(1, 9))
    return AveragePool(tuple(kernel_size), tuple(stride), tuple(padding), divisor)


@st.composite
def pads(draw: st.DrawFn, dimensions: int, mode: str = "zeros", *, crops: bool = True) -> Pad:
    amounts = st.integers(-2 if crops else 0, 3)
    return Pad(tuple((draw(amounts), draw(amounts)) for _ in range(dimensions)), mode)


@st.composite
def sums(draw: st.DrawFn) -> list[Operator]:
    """Terms that add up to one operator: convolutions, pools, identities and scales of one stride and output size."""
    space = draw(st.integers(0, 3))
    mode = draw(modes) if space else "zeros"
    stride = draw(st.sampled_from([(1,) * space, tuple(draw(st.integers(1, 3)) for _ in range(space))]))
    growth = draw(st.sampled_from([(0,) * space, tuple(draw(st.integers(-3, 2)) for _ in range(space))]))
    in_channels = draw(st.sampled_from(CHANNELS))
    keeps_shape = all(s == 1 for s in stride) and not any(growth) and draw(st.booleans())
    depthwise = keeps_shape or draw(st.booleans())
    out_channels = in_channels if depthwise else draw(st.sampled_from(CHANNELS))
    conv = convs(space, in_channels=in_channels, out_channels=out_channels, stride=stride, growth=growth, mode=mode)
    kinds: list[st.SearchStrategy[Operator]] = [conv]
    if keeps_shape:
        kinds.append(st.just(ChannelAffine.uniform(1.0)))
        kinds.append(affines(in_channels, -space - 1))
    # The padding of a pool is of zeros, whatever the convolutions pad with.
    if space and depthwise and max(growth) <= (mode == "zeros"):
        kinds.append(pools(space, stride=stride, growth=growth, padded=mode == "zeros"))
    terms = [draw(conv), *draw(st.lists(st.one_of(kinds), min_size=1, max_size=3))]
    return draw(st.permutations(terms))

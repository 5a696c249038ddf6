"""Permutations of channels, and of channels and positions, against index arithmetic in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from strategies import convs, random_tensor, seeds
from torch import Tensor

from reparam.algebra import ChannelAffine, Conv, Permute, as_conv, compose
from reparam.errors import AlgebraError

TOLERANCE = 1e-9


@st.composite
def permutations(draw: st.DrawFn, *, plain: bool = False) -> Permute:
    dimensions = draw(st.integers(0, 3))
    factors = st.integers(1, 3) if dimensions == 2 and not plain else st.just(1)
    down, up = draw(factors), draw(factors)
    channels = math.lcm(down**2, up**2) * draw(st.integers(1, 2))
    order = torch.tensor(draw(st.permutations(range(channels))))
    return Permute(order, dimensions, down, up)


def input_of(permute: Permute, seed: int) -> Tensor:
    return random_tensor(permute.shapes(None)[0], seed)


def by_index(permute: Permute, x: Tensor) -> Tensor:
    """Where every number goes, one by one."""
    down, up, d = permute.down, permute.up, permute.dimensions
    if d != 2:
        return torch.stack([x.select(permute.axis, int(i)) for i in permute.order], permute.axis)
    batch, _, height, width = x.shape
    made = x.new_full((batch, len(permute.order) // up**2, height // down * up, width // down * up), math.nan)
    for o, i, j in itertools.product(*map(range, made.shape[1:])):
        source = int(permute.order[o * up**2 + i % up * up + j % up])
        channel, inside = divmod(source, down**2)
        made[:, o, i, j] = x[:, channel, i // up * down + inside // down, j // up * down + inside % down]
    return made


def assert_close(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= TOLERANCE * max(1.0, float(expected.abs().max()))


@given(permutations(), seeds)
def test_every_number_goes_where_it_should(permute, seed):
    x = input_of(permute, seed)
    assert torch.equal(permute(x), by_index(permute, x))
    assert torch.equal(permute.inverse(permute(x)), x)
    assert permute(x).shape[permute.axis] == permute.makes[0]
    assert not permute.keeps_shape or permute(x).shape == x.shape


@given(permutations(), st.booleans(), st.data())
def test_affines_pass(permute, shifted, data):
    """``f(s·x + t) = s'·f(x) + t'``, unless channels that become one have different numbers, both ways."""
    x, forward = input_of(permute, data.draw(seeds)), data.draw(st.booleans())
    count = permute.in_channels if forward else permute.makes[0]
    few = data.draw(st.booleans())
    numbers = [random_tensor((1 if few else count,), data.draw(seeds)).expand(count) for _ in range(2)]
    affine = ChannelAffine(numbers[0], numbers[1] if shifted else None, permute.axis)
    try:
        passed = permute.forth(affine) if forward else permute.back(affine)
    except AlgebraError:
        assert not few
        assert (permute.up if forward else permute.down) > 1
        return
    if forward:
        assert_close(passed(permute(x)), permute(affine(x)))
    else:
        assert_close(permute(passed(x)), affine(permute(x)))


def test_numbers_repeat_and_come_together():
    up = Permute(torch.arange(8), up=2)
    norm = ChannelAffine(torch.tensor([2.0, 3.0]), None, -3)
    assert up.back(norm).scale.tolist() == [2.0] * 4 + [3.0] * 4
    assert up.forth(up.back(norm)).scale.tolist() == [2.0, 3.0]
    with pytest.raises(AlgebraError, match="one channel of several"):
        up.forth(ChannelAffine(torch.arange(8.0), None, -3))


def test_affines_along_other_axes():
    rows = ChannelAffine(torch.tensor([2.0, 3.0]), None, -2)
    assert Permute.shuffle(4, 2, 2).forth(rows) is rows
    with pytest.raises(AlgebraError, match="axis -2"):
        Permute(torch.arange(4), up=2).forth(rows)
    number = ChannelAffine.uniform(2.0, 1.0)
    assert Permute(torch.arange(4), down=2).back(number) is number


@given(permutations(), seeds)
def test_as_a_convolution(permute, seed):
    x = input_of(permute, seed)
    if not permute.keeps_shape:
        with pytest.raises(AlgebraError, match="channels and positions"):
            as_conv(permute, permute.in_channels, permute.dimensions)
        return
    conv = as_conv(permute, permute.in_channels, permute.dimensions)
    assert torch.equal(conv(x.movedim(permute.axis, -1) if permute.dimensions == 0 else x), permute(x))


@given(permutations(plain=True), st.data())
def test_beside_a_convolution(permute, data):
    """``W*f(x)`` and ``f(W*x)`` are one convolution."""
    d, after = permute.dimensions, data.draw(st.booleans())
    count = permute.in_channels
    if d:
        conv = data.draw(convs(d, groups=1, **{"in_channels" if after else "out_channels": count}))
    else:
        conv = Conv(random_tensor((2, count) if after else (count, 2), data.draw(seeds)))
    first, last = (permute, conv) if after else (conv, permute)
    fused = compose(last, first)
    assert isinstance(fused, Conv)
    assert fused.kernel_size == conv.kernel_size
    for shape in fused.shapes(None):
        x = random_tensor(shape, data.draw(seeds))
        assert_close(fused(x), last(first(x)))


def test_torchs_own():
    x = random_tensor((2, 12, 4, 6), 0)
    assert torch.equal(Permute.shuffle(12, 3, 2)(x), F.channel_shuffle(x, 3))
    assert torch.equal(Permute(torch.arange(12), up=2)(x), F.pixel_shuffle(x, 2))
    assert torch.equal(Permute(torch.arange(48), down=2)(x), F.pixel_unshuffle(x, 2))
    assert str(Permute(torch.arange(48), down=2)) == "permute[12, down 2]"

"""Every combinator of the algebra against what torch computes without it, in float64.

Two oracles, neither of which uses the algebra:

- :func:`plain` runs an operator with torch's own functions, so a combination is compared with its parts run one
  after the other;
- :class:`Taps` is a convolution taken literally, a matrix at every offset. Sums and compositions of those are
  straight from the definition, and are the only candidate for a combination: its kernel is fixed by the interior,
  where nobody pads. So where the candidate is wrong at some border there is no right answer, and the algebra must
  refuse; and where it is right everywhere, refusing would leave work undone.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence

import pytest
import strategies
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from strategies import random_tensor
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from reparam.algebra import AveragePool, ChannelAffine, Conv, Linear, Operator, Pad, as_conv, parallel
from reparam.errors import AlgebraError

Function = Callable[[Tensor], Tensor]

TOLERANCE = 1e-9
CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
POOL = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


# The first oracle: torch.


def kernel_of(conv: Conv) -> Tensor:
    """The numbers that multiply the input."""
    weight = conv.weight.double()
    return weight if conv.gain is None else weight * conv.gain.reshape(-1, *[1] * (weight.dim() - 1))


def plain(operator: Operator, x: Tensor) -> Tensor:
    """The operator by torch's own functions."""
    match operator:
        case Conv(bias=bias, groups=groups) if operator.dimensions == 0:
            blocks = x.unflatten(-1, (groups, -1)).unbind(-2)
            matrices = kernel_of(operator).chunk(groups)
            y = torch.cat([block @ matrix.T for block, matrix in zip(blocks, matrices, strict=True)], -1)
            return y if bias is None else y + bias.double()
        case Conv(bias=bias, stride=stride, dilation=dilation, groups=groups):
            x = plain(Pad(operator.padding, operator.padding_mode), x)
            bias = None if bias is None else bias.double()
            return CONV[operator.dimensions](x, kernel_of(operator), bias, stride, 0, dilation, groups)
        case ChannelAffine(scale=scale, shift=shift, axis=axis):
            shape = (-1,) if axis is None else (-1, *[1] * (-axis - 1))
            y = x * scale.double().reshape(shape)
            return y if shift is None else y + shift.double().reshape(shape)
        case AveragePool(kernel_size=kernel_size, stride=stride, padding=padding, divisor=None):
            return POOL[len(kernel_size)](x, kernel_size, stride, padding)
        case AveragePool(kernel_size=kernel_size, stride=stride, padding=padding, divisor=divisor):
            windows = x.flatten(0, 1).unsqueeze(1)
            ones = torch.ones(1, 1, *kernel_size, dtype=torch.float64)
            y = CONV[len(kernel_size)](windows, ones, None, stride, padding) / divisor
            return y.squeeze(1).unflatten(0, x.shape[:2])
        case Pad(padding=padding, mode=mode, value=value):
            amounts = [amount for pair in padding[::-1] for amount in pair]
            if not any(amounts):
                return x
            return F.pad(x, amounts, "constant", value) if mode == "zeros" else F.pad(x, amounts, mode)
    raise TypeError(operator)


def chain(*operators: Operator) -> Function:
    """The operators one after the other."""

    def run(x: Tensor) -> Tensor:
        for operator in operators:
            x = plain(operator, x)
        return x

    return run


def total(*terms: Operator) -> Function:
    """The sum of the operators' outputs."""

    def run(x: Tensor) -> Tensor:
        outputs = [plain(term, x) for term in terms]
        y = outputs[0]
        for output in outputs[1:]:
            y = y + output
        return y

    return run


# The second oracle: the definition.


@dataclasses.dataclass
class Taps:
    """Output ``o`` is the sum over offsets of ``matrix @ x[stride * o + offset]``; x goes on beyond its border."""

    matrices: dict[tuple[int, ...], Tensor]
    bias: Tensor
    stride: tuple[int, ...]
    growth: tuple[int, ...]
    mode: str = "zeros"

    @staticmethod
    def of(conv: Conv) -> Taps:
        dense = torch.zeros(conv.out_channels, conv.in_channels, *conv.kernel_size, dtype=torch.float64)
        rows, columns = conv.out_channels // conv.groups, conv.in_channels // conv.groups
        for g in range(conv.groups):
            block = kernel_of(conv)[g * rows : (g + 1) * rows]
            dense[g * rows : (g + 1) * rows, g * columns : (g + 1) * columns] = block
        matrices = {}
        for tap in itertools.product(*map(range, conv.kernel_size)):
            offset = tuple(d * j - p[0] for d, j, p in zip(conv.dilation, tap, conv.padding, strict=True))
            matrices[offset] = dense[(..., *tap)]
        axes = zip(conv.padding, conv.dilation, conv.kernel_size, strict=True)
        growth = tuple(p[0] + p[1] - d * (k - 1) for p, d, k in axes)
        bias = dense.new_zeros(conv.out_channels) if conv.bias is None else conv.bias.double()
        return Taps(matrices, bias, conv.stride, growth, conv.padding_mode)

    def __add__(self, other: Taps) -> Taps:
        zero = torch.zeros_like(next(iter(self.matrices.values())))
        offsets = {**self.matrices, **other.matrices}
        matrices = {at: self.matrices.get(at, zero) + other.matrices.get(at, zero) for at in offsets}
        return dataclasses.replace(self, matrices=matrices, bias=self.bias + other.bias)

    def __matmul__(self, inner: Taps) -> Taps:
        matrices: dict[tuple[int, ...], Tensor] = {}
        for (o, outer_matrix), (i, matrix) in itertools.product(self.matrices.items(), inner.matrices.items()):
            offset = tuple(a + s * b for a, s, b in zip(i, inner.stride, o, strict=True))
            matrices[offset] = matrices.get(offset, 0.0) + outer_matrix @ matrix
        bias = self.bias + sum(matrix @ inner.bias for matrix in self.matrices.values())
        stride = tuple(a * b for a, b in zip(self.stride, inner.stride, strict=True))
        growth = tuple(i + s * o for i, s, o in zip(inner.growth, inner.stride, self.growth, strict=True))
        return Taps(matrices, bias, stride, growth, inner.mode)

    def with_mode(self, mode: str) -> Taps:
        return dataclasses.replace(self, mode=mode)

    def __call__(self, x: Tensor) -> Tensor:
        sizes = [(n + g - 1) // s + 1 for n, g, s in zip(x.shape[2:], self.growth, self.stride, strict=True)]
        for axis, growth in enumerate(self.growth):
            # torch pads also what a stride then leaves out.
            offsets = [offset[axis] for offset in self.matrices]
            beyond(x, axis + 2, [min(offsets), x.shape[axis + 2] - 1 + growth + max(offsets)], self.mode)
        y = self.bias.view(-1, *[1] * len(sizes)).expand(len(x), -1, *sizes)
        for offset, matrix in self.matrices.items():
            read = x
            for axis, (first, size, step) in enumerate(zip(offset, sizes, self.stride, strict=True), start=2):
                read = beyond(read, axis, [first + step * o for o in range(size)], self.mode)
            y = y + torch.einsum("oi,ni...->no...", matrix, read)
        return y


def beyond(x: Tensor, axis: int, positions: list[int], mode: str) -> Tensor:
    """``x`` at positions that may lie outside of it, as far as torch pads.

    Raises:
        IndexError: It does not reflect or wrap more than once.
    """
    n = x.shape[axis]
    reach = {"reflect": n - 1, "circular": n}.get(mode, math.inf)
    if min(positions) < -reach or max(positions) > n - 1 + reach:
        raise IndexError(f"{mode} padding of a size of {n}")
    match mode:
        case "reflect":
            inside = [n - 1 - abs(n - 1 - abs(p)) for p in positions]
        case "circular":
            inside = [p % n for p in positions]
        case _:
            inside = [min(max(p, 0), n - 1) for p in positions]
    read = x.index_select(axis, torch.tensor(inside))
    if mode == "zeros":
        exists = torch.tensor([0 <= p < n for p in positions], dtype=x.dtype)
        read = read * exists.view(-1, *[1] * (x.dim() - axis - 1))
    return read


# Inputs: the smallest that everything accepts, and the sizes that follow, so that every border and every remainder
# of the stride shows.


def output_size(operator: Operator, axis: int, size: int) -> int | None:
    """Output size along a spatial axis (counted from the end), None when torch has no output."""
    if isinstance(operator, ChannelAffine):
        return size
    if isinstance(operator, AveragePool):
        if size < operator.kernel_size[axis]:  # as some of torch's pools demand, padded or not
            return None
        return (size + 2 * operator.padding[axis] - operator.kernel_size[axis]) // operator.stride[axis] + 1
    if axis < -len(operator.padding):
        return size
    before, after = operator.padding[axis]
    mode = operator.padding_mode if isinstance(operator, Conv) else operator.mode
    longest = max(before, after) + (mode == "reflect")
    if (mode in ("reflect", "circular") and size < longest) or size + min(before, 0) + min(after, 0) < 1:
        return None
    if isinstance(operator, Pad):
        padded = size + before + after
        return padded if padded > 0 else None
    room = size + operator.growth[axis] - 1
    return room // operator.stride[axis] + 1 if room >= 0 else None


def smallest_size(axis: int, chains: Sequence[Sequence[Operator]]) -> int:
    def fits(size: int) -> bool:
        for operators in chains:
            current: int | None = size
            for operator in operators:
                current = None if current is None else output_size(operator, axis, current)
            if current is None:
                return False
        return True

    return next(size for size in itertools.count(1) if fits(size))


def inputs(channels: int, space: int, *chains: Sequence[Operator], count: int = 3) -> Iterator[Tensor]:
    """The smallest input that all chains accept, and ``count`` consecutive sizes along every axis in turn."""
    smallest = [smallest_size(axis, chains) for axis in range(-space, 0)]
    roomy = [size + count - 1 for size in smallest]
    yield random_tensor((2, channels, *smallest), seed=0)
    for axis, size in enumerate(smallest):
        for more in range(count):
            yield random_tensor((2, channels, *roomy[:axis], size + more, *roomy[axis + 1 :]), seed=more)
    if space == 0:
        yield random_tensor((2, 3, channels), seed=0)


def remainders(*operators: Operator) -> int:
    """How many consecutive sizes show every remainder of the strides, and one more."""
    strides = [math.prod(steps) for steps in zip(*(getattr(o, "stride", (1, 1, 1)) for o in operators), strict=False)]
    return max([3, *(stride + 1 for stride in strides)])


def same(actual: Tensor, expected: Tensor) -> bool:
    if actual.shape != expected.shape:
        return False
    error = (actual - expected).abs().max().item()
    return error <= TOLERANCE * expected.abs().max().item() + 1e-14


def assert_same(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype == torch.float64
    error = (actual - expected).abs().max().item()
    assert error <= TOLERANCE * expected.abs().max().item() + 1e-14


def holds_everywhere(candidate: Function, truth: Function, xs: Sequence[Tensor]) -> bool:
    try:
        return all(same(candidate(x), truth(x)) for x in xs)
    except IndexError:
        return False


# What every combination promises besides its value.


def tensors_of(*operators: Operator) -> list[Tensor]:
    fields = itertools.chain.from_iterable(vars(operator).values() for operator in operators)
    return [value for value in fields if isinstance(value, Tensor)]


def combine(combinator: Callable[..., Operator], *operands: Operator) -> Operator:
    """``combinator(*operands)``: float64, off the tape, the same every time, and with its operands left alone."""
    before = [(tensor, tensor._version, tensor.clone()) for tensor in tensors_of(*operands)]
    result = combinator(*operands)
    again = combinator(*operands)
    for tensor, version, values in before:
        assert tensor._version == version
        assert torch.equal(tensor, values)
    for first, second in zip(tensors_of(result), tensors_of(again), strict=True):
        assert torch.equal(first, second)
    # The weight of a convolution may still be the model's own, in the model's precision.
    numbers = tensors_of(result.double()) if isinstance(result, Conv) else tensors_of(result)
    assert all(tensor.dtype == torch.float64 and not tensor.requires_grad for tensor in numbers)
    return result


def check(combined: Operator, truth: Function, channels: int, space: int, *chains: Sequence[Operator]) -> None:
    """``combined`` and ``truth`` agree on every input, and ``combined`` accepts all that its parts accept."""
    padded = [part for part in itertools.chain(*chains) if isinstance(part, (Conv, Pad))]
    if not any(min(pair) < 0 for part in padded for pair in part.padding):
        # Torch cannot crop more than there is before it pads, in whatever order the parts did.
        assert all(smallest_size(a, chains) >= smallest_size(a, [[combined]]) for a in range(-space, 0))
    for x in inputs(channels, space, *chains, [combined], count=remainders(combined)):
        assert_same(combined(x), truth(x))


def refuses(reason: str, combinator: Callable[..., object], *operands: object) -> None:
    with pytest.raises(AlgebraError, match=reason):
        combinator(*operands)


def refuses_sum(reason: str, *terms: Operator) -> None:
    refuses(reason, parallel, terms)
    with pytest.raises(AlgebraError, match=reason):
        parallel(terms, outline=True)


# The operators themselves.


@st.composite
def any_conv(draw: st.DrawFn) -> Conv:
    return draw(strategies.convs(draw(st.integers(0, 3)), mode=draw(strategies.modes)))


@given(any_conv())
def test_a_convolution_is_what_torch_and_the_definition_say(conv: Conv) -> None:
    taps = Taps.of(conv)
    for x in inputs(conv.in_channels, conv.dimensions, [conv], count=remainders(conv)):
        assert_same(conv(x), plain(conv, x))
        if conv.dimensions:
            assert_same(conv(x), taps(x))


@given(st.data(), strategies.dimensions, strategies.modes)
def test_a_convolution_is_the_layer_of_torch(data: st.DataObject, space: int, mode: str) -> None:
    dilation = data.draw(st.integers(1, 2))
    pairs = [(p, p) for p in data.draw(st.lists(st.integers(0, 2), min_size=space, max_size=space))]
    conv = data.draw(strategies.convs(space, dilation=(dilation,) * space, padding=pairs, mode=mode))
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[space - 1](
        conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, tuple(p for p, _ in pairs), dilation,
        conv.groups, conv.bias is not None, mode, dtype=torch.float64,
    )  # fmt: skip
    layer.load_state_dict({"weight": conv.kernel, **({} if conv.bias is None else {"bias": conv.bias})})
    for x in inputs(conv.in_channels, space, [conv]):
        assert_same(conv(x), layer(x).detach())


@given(any_conv())
def test_what_a_convolution_says_about_itself(conv: Conv) -> None:
    taps = Taps.of(conv)
    assert conv.axis == -1 - conv.dimensions
    assert torch.equal(conv.kernel, kernel_of(conv))
    assert conv.growth == taps.growth
    assert conv.multiply_adds == sum(int(torch.count_nonzero(matrix)) for matrix in taps.matrices.values())
    origin = (0,) * conv.dimensions
    assert conv.is_pointwise == (set(taps.matrices) == {origin} and conv.keeps_size)
    assert conv.pads or conv.padding_mode == "zeros"
    assert conv.has_plain_padding == all(a == b and a >= 0 for a, b in conv.padding)
    xs = list(inputs(conv.in_channels, conv.dimensions, [conv], count=remainders(conv)))
    if conv.dimensions:
        assert conv.keeps_size == all(conv(x).shape[2:] == x.shape[2:] for x in xs)
        assert conv.pads == any(
            at < 0 or at + step * (size - 1) >= n
            for x in xs
            for offset in taps.matrices
            for at, step, n, size in zip(offset, conv.stride, x.shape[2:], conv(x).shape[2:], strict=True)
        )


def test_a_shifted_single_tap_is_not_pointwise() -> None:
    conv = Conv(random_tensor((2, 2, 1), 0), padding=((1, -1),))
    assert conv.keeps_size
    assert not conv.is_pointwise
    assert Conv(random_tensor((2, 2, 1), 0)).is_pointwise
    assert Linear(random_tensor((2, 2), 0)).is_pointwise


@given(strategies.dimensions.flatmap(strategies.pools))
def test_a_pool_is_what_torch_says(pool: AveragePool) -> None:
    for x in inputs(2, pool.dimensions, [pool], count=remainders(pool)):
        assert_same(pool(x), plain(pool, x))
        if pool.dimensions > 1:
            kwargs = {"divisor_override": pool.divisor}
            assert_same(pool(x), POOL[pool.dimensions](x, pool.kernel_size, pool.stride, pool.padding, **kwargs))


@given(st.data(), strategies.dimensions, strategies.modes)
def test_a_padding_is_what_torch_and_the_definition_say(data: st.DataObject, space: int, mode: str) -> None:
    pad = data.draw(strategies.pads(space, mode, crops=mode == "zeros"))
    pad = dataclasses.replace(pad, value=data.draw(st.sampled_from((0.0, 1.5))))
    for x in inputs(2, space, [pad]):
        assert_same(pad(x), plain(pad, x))
        if pad.value == 0.0 or mode != "zeros":
            expected = x
            for axis, (before, after) in enumerate(pad.padding, start=2):
                expected = beyond(expected, axis, list(range(-before, x.shape[axis] + after)), mode)
            assert_same(pad(x), expected)


@given(st.data(), st.integers(1, 4), st.integers(-4, -1))
def test_an_affine_is_what_arithmetic_says(data: st.DataObject, channels: int, axis: int) -> None:
    affine = data.draw(strategies.affines(channels, axis))
    shape = [5, 5, 5, 5]
    shape[axis] = channels
    x = random_tensor(shape, 0)
    assert_same(affine(x), plain(affine, x))
    assert affine.axis == (axis if channels > 1 and len(affine.scale) > 1 else None)


def test_the_identity_says_so() -> None:
    assert ChannelAffine.uniform(1.0).is_identity
    assert not ChannelAffine.uniform(1.0, 0.5).is_identity
    assert not ChannelAffine.uniform(2.0).is_identity
    assert not ChannelAffine(torch.ones(3), None, -1).is_identity


def test_one_number_is_for_all_channels_and_expands_none() -> None:
    number = ChannelAffine(torch.tensor([2.0]), None, -3, may_expand=True)
    assert number.axis is None
    assert not number.may_expand


# One convolution, written differently.


@given(any_conv(), st.data())
def test_regroup(conv: Conv, data: st.DataObject) -> None:
    groups = data.draw(st.sampled_from(strategies.divisors(conv.groups)))
    regrouped = combine(lambda c: c.regroup(groups), conv)
    assert isinstance(regrouped, Conv)
    assert regrouped.groups == groups
    assert (regrouped.stride, regrouped.padding, regrouped.dilation) == (conv.stride, conv.padding, conv.dilation)
    check(regrouped, chain(conv), conv.in_channels, conv.dimensions, [conv])


@given(st.data(), strategies.dimensions)
def test_widen(data: st.DataObject, space: int) -> None:
    conv = data.draw(strategies.convs(space))
    more = [(data.draw(st.integers(0, 2)), data.draw(st.integers(0, 2))) for _ in range(space)]
    wide = combine(lambda c: c.widen(tuple(more)), conv)
    assert isinstance(wide, Conv)
    assert wide.kernel_size == tuple(k + sum(pair) for k, pair in zip(conv.kernel_size, more, strict=True))
    check(wide, chain(conv), conv.in_channels, space, [conv])


@given(any_conv())
def test_undilate(conv: Conv) -> None:
    dense = combine(Conv.undilate, conv)
    assert isinstance(dense, Conv)
    assert all(d == 1 for d in dense.dilation)
    assert dense.kernel_size == tuple(extent + 1 for extent in conv.extent)
    check(dense, chain(conv), conv.in_channels, conv.dimensions, [conv])


@given(any_conv())
def test_double(conv: Conv) -> None:
    check(combine(Conv.double, conv), chain(conv), conv.in_channels, conv.dimensions, [conv])


@given(any_conv(), st.floats(-3, 3))
def test_scaled(conv: Conv, factor: float) -> None:
    scaled = combine(lambda c: c.scaled(factor), conv)
    check(scaled, lambda x: factor * plain(conv, x), conv.in_channels, conv.dimensions, [conv])


# Affines.


@given(st.data(), st.sampled_from((1, 3)), st.integers(-3, -1))
def test_affine_after_affine_and_beside_it(data: st.DataObject, channels: int, axis: int) -> None:
    outer = data.draw(strategies.affines(channels, axis))
    inner = data.draw(strategies.affines(channels, axis))
    factor = data.draw(st.floats(-3, 3))
    shape = [4, 4, 4]
    shape[axis] = channels
    x = random_tensor(shape, 0)
    assert_same(combine(ChannelAffine.after, outer, inner)(x), plain(outer, plain(inner, x)))
    assert_same(combine(lambda *terms: parallel(terms), outer, inner)(x), plain(outer, x) + plain(inner, x))
    assert_same(combine(lambda a: a.scaled(factor), outer)(x), factor * plain(outer, x))


@given(st.data(), st.integers(0, 3), st.sampled_from((1, 2, 5)))
def test_affine_as_conv(data: st.DataObject, space: int, channels: int) -> None:
    affine = data.draw(strategies.affines(channels, -space - 1))
    conv = combine(lambda a: as_conv(a, channels, space), affine)
    assert isinstance(conv, Conv)
    assert conv.is_pointwise
    assert conv.groups == channels
    check(conv, chain(affine), channels, space, [affine])


@given(any_conv(), st.data())
def test_affine_after_convolution(conv: Conv, data: st.DataObject) -> None:
    norm = data.draw(strategies.affines(conv.out_channels, conv.axis))
    fused = combine(Conv.then, conv, norm)
    assert isinstance(fused, Conv)
    assert (fused.padding, fused.groups, fused.padding_mode) == (conv.padding, conv.groups, conv.padding_mode)
    check(fused, chain(conv, norm), conv.in_channels, conv.dimensions, [conv])


def test_affine_after_convolution_copies_no_kernel() -> None:
    conv = Conv(random_tensor((4, 4, 3), 0, torch.float32))
    fused = conv.then(ChannelAffine(random_tensor((4,), 1), None, -2)).then(ChannelAffine.uniform(2.0))
    assert fused.weight.data_ptr() == conv.weight.data_ptr()


@given(any_conv(), st.data())
def test_affine_before_convolution(conv: Conv, data: st.DataObject) -> None:
    """A scale passes every border, and a shift every border but one of zeros."""
    sees_zeros = conv.pads and conv.padding_mode == "zeros"
    norm = data.draw(strategies.affines(conv.in_channels, conv.axis, shift=False if sees_zeros else None))
    fused = combine(Conv.after, conv, norm)
    check(fused, chain(norm, conv), conv.in_channels, conv.dimensions, [conv])


@given(st.data(), strategies.dimensions)
def test_shift_before_zero_padding_is_refused(data: st.DataObject, space: int) -> None:
    sides = data.draw(st.sampled_from([(1, 0), (0, 1), (2, 1)]))
    conv = data.draw(strategies.convs(space, padding=[(0, 0)] * (space - 1) + [sides]))
    norm = data.draw(strategies.affines(conv.in_channels, conv.axis, shift=True))
    refuses("shift before zero padding", Conv.after, conv, norm)
    candidate = Taps.of(conv) @ Taps.of(as_conv(norm, conv.in_channels, space))
    xs = list(inputs(conv.in_channels, space, [conv], count=remainders(conv)))
    assert not holds_everywhere(candidate, chain(norm, conv), xs)


def test_a_shift_of_zeros_is_no_shift() -> None:
    conv = Conv(random_tensor((3, 2, 3), 0), padding=((1, 1),))
    norm = ChannelAffine(random_tensor((2,), 1), torch.zeros(2), -2)
    check(conv.after(norm), chain(norm, conv), 2, 1, [conv])


# A padding before a convolution.


@given(st.data(), strategies.dimensions, strategies.modes)
def test_padding_before_an_unpadded_convolution(data: st.DataObject, space: int, mode: str) -> None:
    """The usual case: a layer of padding, of any kind, before a convolution that has none."""
    conv = data.draw(strategies.convs(space, padding=[(0, 0)] * space, mode=data.draw(strategies.modes)))
    # Torch reflects, replicates and wraps all axes or none.
    axes = data.draw(st.integers(1, space)) if mode == "zeros" else space
    pad = data.draw(strategies.pads(axes, mode, crops=False))
    fused = combine(Conv.after, conv, pad)
    check(fused, chain(pad, conv), conv.in_channels, space, [pad, conv])


@given(st.data(), strategies.dimensions)
def test_zero_padding_is_fused_exactly_when_it_is_not_cropped_first(data: st.DataObject, space: int) -> None:
    conv = data.draw(strategies.convs(space))
    pad = data.draw(strategies.pads(space))
    pairs = [
        (o, i) for own, more in zip(conv.padding, pad.padding, strict=True) for o, i in zip(own, more, strict=True)
    ]
    if any(own > 0 > more for own, more in pairs):
        conv = dataclasses.replace(conv, stride=(1,) * space)  # a stride might step over what was cropped
        refuses("the padding covers what was cropped", Conv.after, conv, pad)
        one = Conv(torch.eye(conv.in_channels)[(..., *[None] * space)], padding=pad.padding)
        xs = list(inputs(conv.in_channels, space, [pad, conv], count=5))
        assert not holds_everywhere(Taps.of(conv) @ Taps.of(one), chain(pad, conv), xs)
    else:
        check(combine(Conv.after, conv, pad), chain(pad, conv), conv.in_channels, space, [pad, conv])


@given(st.data(), strategies.dimensions, strategies.borders)
def test_a_convolution_may_crop_what_was_padded(data: st.DataObject, space: int, mode: str) -> None:
    pad = Pad(((2, 2),) * space, mode)
    conv = data.draw(strategies.convs(space, padding=[(-data.draw(st.integers(0, 2)), -1)] * space))
    check(combine(Conv.after, conv, pad), chain(pad, conv), conv.in_channels, space, [pad, conv])


def assert_spans(conv: Conv, offsets: Collection[tuple[int, ...]]) -> None:
    """The kernel is as small, and as dilated, as can be: no outermost tap is empty, and no coarser lattice fits."""
    for axis in range(conv.dimensions):
        along = {offset[axis] for offset in offsets}
        first, last = min(along), max(along)
        assert conv.padding[axis][0] == -first
        assert conv.extent[axis] == last - first
        step = math.gcd(*(offset - first for offset in along)) or 1
        assert conv.kernel_size[axis] == (last - first) // step + 1


# Convolution after convolution.


@st.composite
def sequences(draw: st.DrawFn, space: int, **outer: object) -> tuple[Conv, Conv]:
    """An unpadded convolution after any other; arguments are those of the outer one."""
    steps = st.lists(st.integers(1, 2), min_size=space, max_size=space)
    mode = draw(strategies.modes)
    inner = draw(strategies.convs(space, stride=draw(steps), mode=mode))
    outer = {"padding": [(0, 0)] * space, "stride": draw(steps), **outer}
    return draw(strategies.convs(space, in_channels=inner.out_channels, **outer)), inner  # type: ignore[arg-type]


def check_sequence(outer: Conv, inner: Conv) -> Conv:
    fused = combine(Conv.after, outer, inner)
    assert isinstance(fused, Conv)
    assert fused.groups == math.gcd(outer.groups, inner.groups)
    assert_spans(fused, (Taps.of(outer) @ Taps.of(inner)).matrices)
    check(fused, chain(inner, outer), inner.in_channels, inner.dimensions, [inner, outer])
    return fused


@given(st.data(), st.integers(0, 3))
def test_unpadded_convolution_after_any(data: st.DataObject, space: int) -> None:
    outer, inner = data.draw(sequences(space))
    check_sequence(outer, inner)


@given(st.data(), strategies.dimensions)
def test_padded_convolution_after_a_pointwise_one(data: st.DataObject, space: int) -> None:
    """Zero padding passes a strided tap without a bias; another border passes a bias without stride."""
    mode = data.draw(strategies.modes)
    stride = [data.draw(st.integers(1, 2)) if mode == "zeros" else 1 for _ in range(space)]
    bias = False if mode == "zeros" else None
    nothing = [(0, 0)] * space
    inner = data.draw(strategies.convs(space, kernel_size=[1] * space, padding=nothing, stride=stride, bias=bias))
    padding = [data.draw(strategies.paddings(data.draw(st.integers(1, 4)))) for _ in range(space)]
    if mode != "zeros":
        padding = [(abs(before), abs(after)) for before, after in padding]
    outer = data.draw(strategies.convs(space, in_channels=inner.out_channels, padding=padding, mode=mode))
    assert outer.pads
    check_sequence(outer, inner)


@given(st.data(), st.integers(2, 3), strategies.modes)
def test_separable_convolutions(data: st.DataObject, space: int, mode: str) -> None:
    """1x3 before 3x1: each pads an axis along which the other reads one position."""
    split = data.draw(st.integers(1, space - 1))
    wide = data.draw(st.lists(st.integers(1, 3), min_size=space, max_size=space))
    ahead, behind = [1] * split + wide[split:], wide[:split] + [1] * (space - split)

    def plain_padding(kernel: list[int]) -> list[tuple[int, int]]:
        return [(k // 2, (k - 1) // 2) for k in kernel]

    settings = {"dilation": [1] * space, "stride": [1] * space, "bias": None if mode != "zeros" else False}
    inner = data.draw(strategies.convs(space, kernel_size=ahead, padding=plain_padding(ahead), mode=mode, **settings))
    outer = data.draw(
        strategies.convs(
            space,
            in_channels=inner.out_channels,
            kernel_size=behind,
            padding=plain_padding(behind),
            mode=mode,
            **settings,
        )
    )
    assert check_sequence(outer, inner).kernel_size == tuple(wide)


@given(st.data(), strategies.dimensions, strategies.borders)
def test_a_convolution_may_crop_what_another_padded(data: st.DataObject, space: int, mode: str) -> None:
    inner = data.draw(
        strategies.convs(space, stride=[1] * space, padding=[(2, 2)] * space, kernel_size=[2] * space, mode=mode)
    )
    padding = [(-data.draw(st.integers(0, 2)), -data.draw(st.integers(0, 2))) for _ in range(space)]
    check_sequence(data.draw(strategies.convs(space, in_channels=inner.out_channels, padding=padding)), inner)


@st.composite
def arbitrary_sequences(draw: st.DrawFn) -> tuple[Conv, Conv]:
    """Pairs in which every border matters, whether they are one convolution or not.

    Left out are the accidents: a padded convolution after one whose own padding makes it zero out there anyway.
    """
    space = draw(st.integers(1, 2))
    inner_mode, outer_mode = draw(strategies.modes), draw(strategies.modes)
    kernels, inner_padding, outer_padding = [], [], []
    for _ in range(space):
        kernel, pads = draw(st.sampled_from((1, 1, 2, 3))), draw(st.booleans())
        if kernel == 1 and pads:
            pair = draw(st.sampled_from([(0, 0), (0, 0), (0, -1)] if inner_mode == "zeros" else [(0, 0)]))
        else:
            pair = (draw(st.integers(0, 1)), draw(st.integers(0, max(0, kernel - 2))))
        kernels.append(kernel)
        inner_padding.append(pair)
        crops = inner_mode == "zeros" and draw(st.booleans())
        outer_padding.append((1, draw(st.integers(1, 2))) if pads else (-1 if crops else 0, 0))
    inner = draw(
        strategies.convs(
            space,
            kernel_size=kernels,
            padding=inner_padding,
            dilation=[1] * space,
            stride=[draw(st.sampled_from((1, 1, 2))) for _ in range(space)],
            mode=inner_mode,
            bias=draw(st.sampled_from((False, False, True))),
        )
    )
    outer = draw(
        strategies.convs(
            space,
            in_channels=inner.out_channels,
            kernel_size=[draw(st.integers(1, 3)) for _ in range(space)],
            padding=outer_padding,
            dilation=[1] * space,
            stride=[draw(st.integers(1, 2)) for _ in range(space)],
            mode=outer_mode,
        )
    )
    return outer, inner


def check_exactly(outer: Conv, inner: Conv) -> str:
    """Two convolutions in a row are one where the only candidate is right for all sizes, and refused elsewhere."""
    candidate = Taps.of(outer) @ Taps.of(inner)
    xs = list(inputs(inner.in_channels, inner.dimensions, [inner, outer], count=5))
    modes = {outer.padding_mode, inner.padding_mode}
    if any(holds_everywhere(candidate.with_mode(mode), chain(inner, outer), xs) for mode in modes):
        check_sequence(outer, inner)
        return "one"
    with pytest.raises(AlgebraError):
        outer.after(inner)
    return "none"


def test_a_sequence_is_refused_exactly_when_it_is_no_convolution() -> None:
    outcomes: Counter[str] = Counter()

    @given(arbitrary_sequences())
    def run(pair: tuple[Conv, Conv]) -> None:
        outcomes[check_exactly(*pair)] += 1

    run()
    assert min(outcomes["one"], outcomes["none"]) >= sum(outcomes.values()) // 10, outcomes


def test_wrapping_goes_on_where_the_size_is_kept_and_once_around_is_enough() -> None:
    outcomes: Counter[str] = Counter()
    pads = st.tuples(st.integers(0, 3), st.integers(0, 3))

    @given(st.data())
    def run(data: st.DataObject) -> None:
        kernel, dilation = data.draw(st.sampled_from(((1, 1), (2, 1), (3, 1), (2, 2))))
        before = data.draw(st.integers(0, dilation * (kernel - 1)))
        after = dilation * (kernel - 1) - before + data.draw(st.sampled_from((0, 0, 0, 1)))
        settings = {"mode": "circular", "padding": [(before, after)], "kernel_size": [kernel]}
        inner = data.draw(strategies.convs(1, dilation=[dilation], stride=[1], **settings))
        settings = {"mode": "circular", "padding": [data.draw(pads)], "in_channels": inner.out_channels}
        outer = data.draw(strategies.convs(1, **settings))
        outcomes[check_exactly(outer, inner)] += 1

    run()
    assert min(outcomes["one"], outcomes["none"]) >= sum(outcomes.values()) // 10, outcomes


# Sums.


def check_sum(terms: Sequence[Operator]) -> Conv:
    conv = next(term for term in terms if isinstance(term, Conv))
    merged = combine(lambda *operands: parallel(operands), *terms)
    assert isinstance(merged, Conv)
    # The kernel takes no memory until it is asked for.
    assert merged.weight.untyped_storage().nbytes() == torch.float64.itemsize
    fused = merged.double()
    outline = combine(lambda *operands: parallel(operands, outline=True), *terms)
    assert isinstance(outline, Conv)
    for name, value in vars(fused).items():
        shown = getattr(outline, name)
        assert shown.shape == value.shape if isinstance(value, Tensor) else shown == value
    assert outline.weight.untyped_storage().nbytes() == torch.float64.itemsize
    assert torch.equal(merged.kernel, fused.weight)
    check(merged, total(*terms), conv.in_channels, conv.dimensions, *([term] for term in terms))
    return fused


@given(strategies.sums())
def test_sum_of_convolutions_identities_scales_and_pools(terms: list[Operator]) -> None:
    fused = check_sum(terms)
    assert fused.groups == math.gcd(*(term.groups for term in terms if isinstance(term, Conv)), fused.in_channels)


@given(strategies.sums())
def test_a_sum_has_exactly_the_taps_that_its_terms_span(terms: list[Operator]) -> None:
    fused = check_sum(terms)
    conv = next(term for term in terms if isinstance(term, Conv))
    channels, space = conv.in_channels, conv.dimensions
    convs = [term if isinstance(term, Conv) else as_conv(term, channels, space) for term in terms]
    assert_spans(fused, {offset for term in convs for offset in Taps.of(term).matrices})


def repvgg(channels: int, groups: int) -> list[Operator]:
    per_group = channels // groups
    return [
        Conv(random_tensor((channels, per_group, 3, 3), 0), padding=((1, 1),) * 2, groups=groups),
        Conv(random_tensor((channels, per_group, 1, 1), 1), random_tensor((channels,), 2), groups=groups),
        ChannelAffine(random_tensor((channels,), 3), random_tensor((channels,), 4), -3),
    ]


def square(size: int, dilation: int = 1, *, channels: int = 4, seed: int = 0, stride: int = 1) -> Conv:
    """A depthwise convolution that keeps the size at stride 1."""
    pad = dilation * (size - 1) // 2
    weight = random_tensor((channels, 1, size, size), seed)
    return Conv(weight, None, (stride,) * 2, ((pad, pad),) * 2, (dilation,) * 2, channels)


SUMS = {
    "RepVGG: 3x3, 1x1, identity": (repvgg(4, 1), (3, 3), 1, ((1, 1), (1, 1)), 1),
    "RepViT's token mixer: depthwise 3x3, 1x1, identity": (repvgg(4, 4), (3, 3), 1, ((1, 1), (1, 1)), 4),
    "RepVGG-g2: a grouped 3x3 beside a depthwise identity": (repvgg(4, 2), (3, 3), 1, ((1, 1), (1, 1)), 2),
    "MobileOne at stride 2: 3x3 and 1x1": (
        [square(3, stride=2), square(1, stride=2, seed=1)], (3, 3), 1, ((1, 1), (1, 1)), 4,
    ),
    "RepLKNet: a large kernel and a small one": (
        [square(13), square(5, seed=1)], (13, 13), 1, ((6, 6), (6, 6)), 4,
    ),
    "UniRepLKNet: dilated branches on a dense kernel": (
        [square(9), square(5, 2, seed=1), square(3, 4, seed=2)], (9, 9), 1, ((4, 4), (4, 4)), 4,
    ),
    "dilated branches on their common lattice": (
        [square(5, 2), square(3, 4, seed=1), ChannelAffine.uniform(1.0)], (5, 5), 2, ((4, 4), (4, 4)), 4,
    ),
    "ACNet: 3x3, 1x3, 3x1": (
        [
            Conv(random_tensor((3, 2, 3, 3), 0), padding=((1, 1), (1, 1))),
            Conv(random_tensor((3, 2, 1, 3), 1), padding=((0, 0), (1, 1))),
            Conv(random_tensor((3, 2, 3, 1), 2), padding=((1, 1), (0, 0))),
        ], (3, 3), 1, ((1, 1), (1, 1)), 1,
    ),
    "DBB: 3x3 and an average pool": (
        [Conv(random_tensor((4, 4, 3, 3), 0), padding=((1, 1),) * 2), AveragePool((3, 3), (1, 1), (1, 1))],
        (3, 3), 1, ((1, 1), (1, 1)), 1,
    ),
    "even kernels with `same` padding, and the identity": (
        [
            Conv(random_tensor((4, 4, 2, 4), 0), padding=((0, 1), (1, 2))),
            Conv(random_tensor((4, 4, 4, 2), 1), padding=((1, 2), (0, 1))),
            ChannelAffine.uniform(-1.0),
        ], (4, 4), 1, ((1, 2), (1, 2)), 1,
    ),
    "a patch embedding and a pool of its patches": (
        [Conv(random_tensor((4, 1, 4, 4), 0), stride=(4, 4), groups=4), AveragePool((4, 4), (4, 4), (0, 0))],
        (4, 4), 1, ((0, 0), (0, 0)), 4,
    ),
    "a 1x1 that reads the corner of a 2x2": (
        [
            Conv(random_tensor((4, 4, 2, 2), 0), stride=(2, 2)),
            Conv(random_tensor((4, 4, 1, 1), 1), stride=(2, 2), padding=((-1, 0), (-1, 0))),
        ], (2, 2), 1, ((0, 0), (0, 0)), 1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SUMS)
def test_sums_that_networks_have(name: str) -> None:
    terms, kernel_size, dilation, padding, groups = SUMS[name]
    fused = check_sum(terms)
    assert fused.kernel_size == kernel_size
    assert fused.dilation == (dilation, dilation)
    assert fused.padding == padding
    assert fused.groups == groups


def test_linear_layers_add_up_with_identities_and_scales() -> None:
    scale = ChannelAffine(random_tensor((5,), 3), random_tensor((5,), 4), -1)
    layer = Linear(random_tensor((5, 5), 0), random_tensor((5,), 1))
    fused = check_sum([layer, ChannelAffine.uniform(1.0), scale, Linear(random_tensor((5, 5), 2))])
    assert fused.weight.shape == (5, 5)


def test_terms_without_padding_go_with_any_border() -> None:
    wrapped = Conv(random_tensor((3, 3, 3), 0), padding=((1, 1),), padding_mode="circular")
    pointwise = Conv(random_tensor((3, 3, 1), 1), padding_mode="reflect")
    fused = check_sum([pointwise, ChannelAffine.uniform(1.0), wrapped])
    assert fused.padding_mode == "circular"


@given(st.data(), strategies.dimensions)
def test_bias_around_an_output(data: st.DataObject, space: int) -> None:
    """A border of the bias is more padding, and is refused just where more padding is something else."""
    kernel_size = data.draw(st.sampled_from([(1,) * space, None]))
    conv = data.draw(strategies.convs(space, kernel_size=kernel_size, mode=data.draw(strategies.modes)))
    border = data.draw(strategies.pads(space, crops=False))
    amounts = [amount for pair in reversed(border.padding) for amount in pair]
    more = [[s * n for n in pair] for s, pair in zip(conv.stride, border.padding, strict=True)]
    padding = tuple((p[0] + m[0], p[1] + m[1]) for p, m in zip(conv.padding, more, strict=True))
    right = conv.padding_mode == "zeros"
    candidate = dataclasses.replace(conv, padding=padding) if right else conv
    bias = torch.zeros(conv.out_channels, dtype=torch.float64) if conv.bias is None else conv.bias
    pairs = []
    for x in inputs(conv.in_channels, space, [conv], count=remainders(conv)):
        inside = plain(conv, x)
        is_inside = F.pad(torch.ones_like(inside), amounts) == 1
        expected = torch.where(is_inside, F.pad(inside, amounts), bias.view(-1, *[1] * space))
        pairs.append((x, expected))
        right = right and same(plain(candidate, x), expected)
    if right:
        bordered = combine(lambda c: c.then_border(border), conv)
        for x, expected in pairs:
            assert_same(plain(bordered, x), expected)
    else:
        with pytest.raises(AlgebraError):
            conv.then_border(border)


def test_diverse_branch_block() -> None:
    """1x1, then norm, then a border of what the norm makes of zero, then 3x3 (Ding et al. 2021, arXiv 2103.13425)."""
    squeeze = Conv(random_tensor((6, 4, 1, 1), 0))
    norm_and_pad = Conv(random_tensor((6, 1, 1, 1), 1), random_tensor((6,), 2), padding=((1, 1),) * 2, groups=6)
    kernel = Conv(random_tensor((4, 6, 3, 3), 3), random_tensor((4,), 4))
    check_sequence(kernel, norm_and_pad)
    check_sequence(norm_and_pad, squeeze)
    fused = kernel.after(norm_and_pad.after(squeeze))
    check(fused, chain(squeeze, norm_and_pad, kernel), 4, 2, [squeeze, norm_and_pad, kernel])
    assert fused.padding == ((1, 1), (1, 1))


@given(st.data(), strategies.dimensions, st.sampled_from((-2.5, 0.0, 0.5, 3.0)))
def test_scaled_pool(data: st.DataObject, space: int, factor: float) -> None:
    pool = data.draw(strategies.pools(space))
    scaled = combine(lambda p: p.scaled(factor), pool)
    assert isinstance(scaled, AveragePool)
    for x in inputs(2, space, [pool], count=remainders(pool)):
        assert_same(scaled(x), factor * plain(pool, x))
        assert_same(as_conv(scaled, 2, pool.dimensions)(x), factor * plain(pool, x))


@given(st.data(), strategies.dimensions)
def test_pool_as_conv(data: st.DataObject, space: int) -> None:
    pool, channels = data.draw(strategies.pools(space)), data.draw(st.integers(1, 3))
    conv = combine(lambda p: as_conv(p, channels, pool.dimensions), pool)
    assert isinstance(conv, Conv)
    assert conv.groups == channels
    check(conv, chain(pool), channels, space, [pool])


# Refusals: the reason given, and why the refused operator would have been wrong.


@given(st.data(), strategies.dimensions)
def test_sum_of_different_sizes_is_refused(data: st.DataObject, space: int) -> None:
    conv = data.draw(strategies.convs(space))
    axis = data.draw(st.integers(0, space - 1))
    growth = list(conv.growth)
    growth[axis] += data.draw(st.sampled_from((-2, -1, 1, 2)))
    shape = {"in_channels": conv.in_channels, "out_channels": conv.out_channels, "stride": conv.stride}
    other = data.draw(strategies.convs(space, growth=growth, **shape))
    refuses_sum("output sizes differ", conv, other)
    xs = list(inputs(conv.in_channels, space, [conv], [other], count=remainders(conv)))
    assert any(plain(conv, x).shape != plain(other, x).shape for x in xs)


@given(st.data(), strategies.dimensions)
def test_sum_of_different_strides_is_refused(data: st.DataObject, space: int) -> None:
    conv = data.draw(strategies.convs(space))
    axis = data.draw(st.integers(0, space - 1))
    stride = list(conv.stride)
    stride[axis] += data.draw(st.sampled_from((1, 2)))
    shape = {"in_channels": conv.in_channels, "out_channels": conv.out_channels, "growth": conv.growth}
    other = data.draw(strategies.convs(space, stride=stride, **shape))
    refuses_sum("strides .* differ", conv, other)
    xs = list(inputs(conv.in_channels, space, [conv], [other], count=2 * max(stride) + 1))
    assert any(plain(conv, x).shape != plain(other, x).shape for x in xs)


@given(st.data(), strategies.dimensions)
def test_sum_of_different_borders_is_refused(data: st.DataObject, space: int) -> None:
    first, second = data.draw(st.permutations(strategies.MODES))[:2]
    shape = {"in_channels": 2, "out_channels": 3, "growth": (0,) * space, "stride": (1,) * space}
    padded = {"kernel_size": (3,) * space, "dilation": (1,) * space, "padding": ((1, 1),) * space}
    one = data.draw(strategies.convs(space, mode=first, **(shape | padded)))
    two = data.draw(strategies.convs(space, mode=second, **(shape | padded)))
    refuses_sum("padding do not merge", one, two)
    candidate = Taps.of(one) + Taps.of(two)
    xs = list(inputs(2, space, [one], [two]))
    assert not any(holds_everywhere(candidate.with_mode(mode), total(one, two), xs) for mode in strategies.MODES)


def test_sum_that_broadcasts_channels_is_refused() -> None:
    narrow, wide = Conv(random_tensor((1, 4, 1), 0)), Conv(random_tensor((4, 4, 1), 1))
    refuses_sum("the addition broadcasts: 1 and 4 output channels", narrow, wide)
    refuses_sum("the addition broadcasts", narrow, ChannelAffine.uniform(1.0))
    x = random_tensor((2, 4, 3), 0)
    assert total(narrow, wide)(x).shape == total(narrow, ChannelAffine.uniform(1.0))(x).shape == wide(x).shape


def test_sum_of_operators_on_different_inputs_is_refused() -> None:
    conv = Conv(random_tensor((4, 4, 1), 0))
    refuses_sum("they read 4 and 2 channels", conv, Conv(random_tensor((4, 2, 1), 0)))
    refuses_sum("a 1-d and a 2-d operator", conv, Conv(random_tensor((4, 4, 1, 1), 0)))
    refuses_sum("a 0-d and a 1-d operator", Linear(random_tensor((4, 4), 0)), conv)
    refuses_sum("a 2-d pool is no 1-d convolution", conv, AveragePool((1, 1), (1, 1), (0, 0)))
    # A norm of the last axis is not one of the channels.
    width = ChannelAffine(random_tensor((4,), 1), None, -1)
    refuses_sum("along axis -1, not along the channels' axis -2", conv, width)
    x = random_tensor((2, 4, 4), 0)
    candidate = total(conv, dataclasses.replace(width, axis=-2))
    assert not same(candidate(x), total(conv, width)(x))


def test_sum_that_is_no_sum_is_refused() -> None:
    pool, pad = AveragePool((1,), (1,), (0,)), Pad(((0, 0),))
    refuses_sum("no convolution among the terms", pool, pool)
    refuses_sum("no convolution among the terms", pool, ChannelAffine.uniform(1.0))
    refuses_sum("no convolution among the terms", pool, pad)


def test_crops_and_paddings_are_terms_with_a_single_tap() -> None:
    conv = Conv(random_tensor((4, 4, 3), 0))
    check_sum([conv, Pad(((-1, -1),))])
    check_sum([conv, Pad(((-2, 0),)), Pad(((1, -3),))])
    refuses_sum("not of zeros", conv, Pad(((1, -3),), value=2.0))
    refuses_sum("output sizes differ", conv, Pad(((-1, 0),)))


def test_affines_along_different_axes_are_refused() -> None:
    rows, columns = (ChannelAffine(random_tensor((4,), -axis), None, axis) for axis in (-2, -1))
    for combinator in (ChannelAffine.after, lambda *terms: parallel(terms)):
        refuses("along axis -1, not along the channels' axis -2", combinator, rows, columns)
    x = torch.eye(4, dtype=torch.float64) + 1
    product = chain(columns, rows)(x) / x
    assert not any(torch.allclose(product, product.narrow(axis, 0, 1)) for axis in (0, 1)), "both axes matter"
    short = ChannelAffine(random_tensor((2,), 0), None, -2)
    refuses("channels are broadcast", ChannelAffine.after, rows, short)


def test_a_constant_that_might_broadcast_its_input_stays_behind() -> None:
    """On an input with one channel it makes three, which nothing that was moved before it would read."""
    constant = ChannelAffine(random_tensor((3,), 0), None, -3, may_expand=True)
    conv = Conv(random_tensor((2, 3, 1, 1), 1))
    refuses("might have one channel", Conv.after, conv, constant)
    one_channel = random_tensor((2, 1, 4, 4), 0)
    assert chain(constant, conv)(one_channel).shape == (2, 2, 4, 4)
    with pytest.raises(RuntimeError):
        Conv.after(conv, dataclasses.replace(constant, may_expand=False))(one_channel)
    for combinator in (ChannelAffine.after, lambda *terms: parallel(terms)):
        refuses("might have one channel", combinator, constant, ChannelAffine.uniform(2.0))
        refuses("might have one channel", combinator, ChannelAffine.uniform(2.0), constant)
    # After and beside a convolution the channels are known.
    maker = Conv(random_tensor((3, 3, 3, 3), 2), padding=((1, 1),) * 2)
    check(maker.then(constant), chain(maker, constant), 3, 2, [maker])
    check_sum([maker, constant])


def test_an_affine_that_broadcasts_the_output_is_refused() -> None:
    conv, scale = Conv(random_tensor((1, 2, 3), 0)), ChannelAffine(random_tensor((4,), 1), None, -2)
    refuses("1 channels are broadcast to 4", Conv.then, conv, scale)
    assert chain(conv, scale)(random_tensor((2, 2, 3), 0)).shape[1] == 4
    narrow = Conv(random_tensor((4, 1, 3), 0))
    refuses("1 channels are broadcast to 4", Conv.after, narrow, scale)
    refuses("1 channels are broadcast to 4", as_conv, scale, 1, 1)


@given(st.data(), strategies.dimensions)
def test_an_affine_of_another_axis_is_refused(data: st.DataObject, space: int) -> None:
    """Batch norm after a linear layer normalises axis 1, which is its features only in two dimensions."""
    size = data.draw(st.integers(2, 4))
    conv = data.draw(
        strategies.convs(space, in_channels=size, out_channels=size, stride=[1] * space, growth=[0] * space)
    )
    norm = ChannelAffine(random_tensor((size,), 0), random_tensor((size,), 1), -space)
    refuses(f"along axis -{space}, not along the channels' axis -{space + 1}", Conv.then, conv, norm)
    refuses(f"along axis -{space}, not along the channels' axis -{space + 1}", Conv.after, conv, norm)
    refuses("not along the channels' axis", as_conv, norm, size, space)
    x = random_tensor((2, size, *[size] * space), 0)
    moved = dataclasses.replace(norm, axis=conv.axis)
    one = Conv(torch.ones(size, 1, *[1] * space), groups=size)
    assert not same(one.then(moved)(x), chain(one, norm)(x))


@given(any_conv(), st.integers(2, 24))
def test_regroup_into_what_does_not_divide_is_refused(conv: Conv, groups: int) -> None:
    if conv.groups % groups:
        refuses(f"{conv.groups} groups cannot be written as {groups}", conv.regroup, groups)
    else:
        assert conv.regroup(groups).groups == groups


def test_a_dense_kernel_has_no_groups() -> None:
    conv = Conv(random_tensor((4, 4, 1), 0))
    refuses("1 groups cannot be written as 2", conv.regroup, 2)
    x = random_tensor((1, 4, 3), 0)
    diagonal = Conv(torch.cat([conv.weight[:2, :2], conv.weight[2:, 2:]]), groups=2)
    assert not same(diagonal(x), plain(conv, x))


@pytest.mark.parametrize("mode", ["reflect", "circular"])
def test_widen_beyond_what_a_small_input_has_is_refused(mode: str) -> None:
    conv = Conv(random_tensor((1, 1, 3), 0), padding=((1, 1),), padding_mode=mode)
    refuses(f"{mode} padding cannot grow", conv.widen, ((2, 2),))
    smallest = random_tensor((1, 1, 2), 0)
    assert plain(conv, smallest).shape == (1, 1, 2)
    with pytest.raises(RuntimeError):
        plain(dataclasses.replace(conv, weight=F.pad(conv.weight, (2, 2)), padding=((3, 3),)), smallest)


def test_a_crop_beside_a_border_is_refused() -> None:
    """Torch crops first, and then wraps what is left: that is not the input, extended."""
    with pytest.raises(AlgebraError, match="a crop beside circular padding"):
        Conv(random_tensor((1, 1, 1), 0), padding=((-1, 1),), padding_mode="circular")
    x = random_tensor((1, 1, 4), 0)
    torchs = F.pad(x, (-1, 1), mode="circular")
    assert not same(torchs, beyond(x, 2, [1, 2, 3, 4], "circular"))
    # On different axes the two do not meet.
    Conv(random_tensor((1, 1, 1, 1), 0), padding=((-1, -1), (1, 1)), padding_mode="circular")


@given(st.data(), strategies.dimensions, strategies.borders)
def test_padding_of_another_kind_is_refused(data: st.DataObject, space: int, mode: str) -> None:
    other = data.draw(st.sampled_from([m for m in strategies.MODES if m != mode or m in ("reflect", "circular")]))
    conv = data.draw(strategies.convs(space, stride=[1] * space, padding=[(2, 2)] * space, mode=other))
    pad = Pad(((1, 1),) * space, mode)
    refuses(f"{other} padding of a {mode}-padded input", Conv.after, conv, pad)
    one = Conv(torch.eye(conv.in_channels)[(..., *[None] * space)], padding=pad.padding)
    candidate = Taps.of(conv) @ Taps.of(one)
    xs = list(inputs(conv.in_channels, space, [pad, conv]))
    assert not any(holds_everywhere(candidate.with_mode(m), chain(pad, conv), xs) for m in strategies.MODES)


def test_padding_that_is_not_the_convolutions_is_refused() -> None:
    conv = Conv(random_tensor((2, 2, 3), 0))
    x = random_tensor((2, 2, 5), 0)
    ones = Pad(((1, 1),), value=1.0)
    refuses("the padding is of 1.0, not of zeros", Conv.after, conv, ones)
    assert not same(conv.after(Pad(((1, 1),)))(x), chain(ones, conv)(x))
    channels = Pad(((1, 0), (0, 0)))
    refuses("beyond the convolution's axes", Conv.after, Conv(random_tensor((2, 3, 3), 0)), channels)
    assert channels(x).shape[1] == 3
    refuses("beyond the convolution's axes", Conv.after, Linear(random_tensor((2, 3), 0)), Pad(((1, 0),)))
    # Amounts of zero out there are no obstacle, nor is the value of a padding that only crops.
    assert conv.after(Pad(((0, 0), (1, 1)))).padding == ((1, 1),)
    crop = Pad(((-1, 0),), value=1.0)
    check(conv.after(crop), chain(crop, conv), 2, 1, [crop, conv])


def test_a_crop_before_a_border_is_refused() -> None:
    for mode in ("reflect", "circular"):
        conv = Conv(random_tensor((1, 1, 3), 0), padding=((1, 1),), padding_mode=mode)
        crop = Pad(((-1, 0),))
        refuses("the padding covers what was cropped", Conv.after, conv, crop)
        xs = [random_tensor((1, 1, size), 0) for size in (5, 6, 7)]
        candidate = Taps.of(conv) @ Taps.of(Conv(torch.ones(1, 1, 1), padding=crop.padding))
        assert not holds_everywhere(candidate.with_mode(mode), chain(crop, conv), xs)
    # Cropped on one side and wrapped on the other, the wrapped values are others.
    wrap = Conv(random_tensor((1, 1, 2), 0), padding=((0, 1),), padding_mode="circular")
    refuses("a crop beside circular padding", Conv.after, wrap, Pad(((-1, 0),)))


@given(st.data(), strategies.dimensions)
def test_padding_of_a_convolutions_output_is_refused(data: st.DataObject, space: int) -> None:
    kernel = [data.draw(st.integers(2, 3)) for _ in range(space)]
    step, keep = [1] * space, [0] * space
    inner = data.draw(strategies.convs(space, kernel_size=kernel, stride=step, dilation=step, growth=keep, bias=False))
    inner = dataclasses.replace(inner, padding=tuple((k // 2, (k - 1) // 2) for k in kernel))
    outer = data.draw(strategies.convs(space, in_channels=inner.out_channels, padding=[(1, 1)] * space))
    refuses("pads the first one's output", Conv.after, outer, inner)
    xs = list(inputs(inner.in_channels, space, [inner, outer], count=remainders(outer)))
    assert not holds_everywhere(Taps.of(outer) @ Taps.of(inner), chain(inner, outer), xs)


@given(st.data(), strategies.dimensions)
def test_bias_before_zero_padding_is_refused(data: st.DataObject, space: int) -> None:
    inner = data.draw(strategies.convs(space, kernel_size=[1] * space, padding=[(0, 0)] * space, bias=True))
    outer = data.draw(strategies.convs(space, in_channels=inner.out_channels, padding=[(1, 1)] * space))
    refuses("bias before zero padding", Conv.after, outer, inner)
    xs = list(inputs(inner.in_channels, space, [inner, outer], count=remainders(outer, inner)))
    assert not holds_everywhere(Taps.of(outer) @ Taps.of(inner), chain(inner, outer), xs)
    assert inner.bias is not None
    silent = dataclasses.replace(inner, bias=torch.zeros_like(inner.bias))
    check_sequence(outer, silent)


@given(st.data(), strategies.dimensions, strategies.borders)
def test_border_of_a_strided_output_is_refused(data: st.DataObject, space: int, mode: str) -> None:
    one, nothing = [1] * space, [(0, 0)] * space
    inner = data.draw(strategies.convs(space, kernel_size=one, padding=nothing, stride=[2] * space))
    outer = data.draw(strategies.convs(space, in_channels=inner.out_channels, padding=[(1, 1)] * space, mode=mode))
    refuses(f"{mode} padding of a strided output", Conv.after, outer, inner)
    xs = list(inputs(inner.in_channels, space, [inner, outer], count=6))
    candidate = Taps.of(outer) @ Taps.of(inner)
    assert not any(holds_everywhere(candidate.with_mode(m), chain(inner, outer), xs) for m in strategies.MODES)


@given(st.data())
def test_borders_of_two_kinds_are_refused(data: st.DataObject) -> None:
    """A 1x3 and a 3x1 kernel would merge if they had the same border."""
    first, second = data.draw(st.permutations(strategies.MODES))[:2]
    settings = {"dilation": (1, 1), "stride": (1, 1), "bias": False}
    inner = data.draw(strategies.convs(2, kernel_size=(1, 3), padding=((0, 0), (1, 1)), mode=first, **settings))
    outer = data.draw(
        strategies.convs(
            2, in_channels=inner.out_channels, kernel_size=(3, 1), padding=((1, 1), (0, 0)), mode=second, **settings
        )
    )
    refuses(f"{second} padding of a {first}-padded output", Conv.after, outer, inner)
    xs = list(inputs(inner.in_channels, 2, [inner, outer]))
    candidate = Taps.of(outer) @ Taps.of(inner)
    assert not any(holds_everywhere(candidate.with_mode(m), chain(inner, outer), xs) for m in strategies.MODES)


def test_convolutions_that_do_not_follow_each_other_are_refused() -> None:
    image, line = Conv(random_tensor((2, 2, 1, 1), 0)), Conv(random_tensor((2, 2, 1), 0))
    refuses("a 1-d before a 2-d convolution", Conv.after, image, line)
    refuses("1 channels are broadcast to 2", Conv.after, line, Conv(random_tensor((1, 2, 1), 0)))
    refuses("a 2-d pool is no 1-d convolution", as_conv, AveragePool((2, 2), (2, 2), (0, 0)), 3, 1)


def test_numbers_go_to_the_device_of_the_weights() -> None:
    """An identity is made before anyone knows where the convolution beside it is."""
    meta = torch.device("meta")
    conv = Conv(torch.empty(4, 4, 3, 3, device=meta), padding=((1, 1),) * 2)
    norm = ChannelAffine(torch.empty(4, device=meta), torch.empty(4, device=meta), -3)
    double, identity, pool = (
        ChannelAffine.uniform(2.0, 1.0),
        ChannelAffine.uniform(1.0),
        AveragePool((1, 1), (1, 1), (0, 0)),
    )
    combined = [
        conv.scaled(2.0),
        conv.then(double),
        conv.after(identity),
        norm.after(double),
        double.after(norm),
        parallel([double, norm]),
        parallel([norm, double]),
        parallel([identity, double, conv, norm, pool]),
        as_conv(double, 4, 2, meta),
        as_conv(pool, 4, 2, meta),
    ]
    assert all(tensor.device == meta for tensor in tensors_of(*combined))


# Cost: the number of torch calls does not depend on the number of channels.


class Calls(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += 1
        return func(*args, **(kwargs or {}))


def depthwise(channels: int, size: int = 3, *, pads: bool = True, dtype: torch.dtype = torch.float32) -> Conv:
    pad = size // 2 if pads else 0
    bias = random_tensor((channels,), 1, dtype)
    return Conv(random_tensor((channels, 1, size, size), 0, dtype), bias, padding=((pad, pad),) * 2, groups=channels)


def per_channel(channels: int) -> ChannelAffine:
    return ChannelAffine(random_tensor((channels,), 0), random_tensor((channels,), 1), -3)


def grouped(channels: int) -> Conv:
    weight = random_tensor((channels, 4, 3, 3), 0, torch.bfloat16)
    return Conv(weight, padding=((1, 1),) * 2, groups=channels // 4)


POOL_3X3 = AveragePool((3, 3), (1, 1), (1, 1))

COMBINATIONS: dict[str, tuple[Callable[..., Operator], Callable[[int], list[Operator]]]] = {
    "regroup": (lambda conv: conv.regroup(conv.groups // 4), lambda n: [depthwise(n)]),
    "widen": (lambda conv: conv.widen(((1, 1), (1, 1))), lambda n: [depthwise(n)]),
    "undilate": (Conv.undilate, lambda n: [dataclasses.replace(depthwise(n), dilation=(2, 2))]),
    "scaled": (lambda conv: conv.scaled(2.0), lambda n: [depthwise(n)]),
    "then": (Conv.then, lambda n: [depthwise(n), per_channel(n)]),
    "after affine": (Conv.after, lambda n: [depthwise(n, pads=False), per_channel(n)]),
    "after pad": (Conv.after, lambda n: [depthwise(n), Pad(((1, 1), (1, 1)))]),
    "after conv": (Conv.after, lambda n: [depthwise(n, pads=False), grouped(n)]),
    "affine after affine": (ChannelAffine.after, lambda n: [per_channel(n), per_channel(n)]),
    "affine as conv": (lambda affine: as_conv(affine, len(affine.scale), 2), lambda n: [per_channel(n)]),
    "parallel": (
        lambda *terms: parallel(terms),
        lambda n: [depthwise(n), depthwise(n, 1), grouped(n), per_channel(n), ChannelAffine.uniform(1.0), POOL_3X3],
    ),
}


@pytest.mark.parametrize("name", COMBINATIONS)
def test_the_number_of_torch_calls_does_not_grow_with_channels(name: str) -> None:
    combinator, operands = COMBINATIONS[name]
    counts = []
    for channels in (8, 4096):
        terms = operands(channels)
        with Calls() as calls:
            combinator(*terms)
        counts.append(calls.count)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("pad", [Pad(((1, 2), (0, 1))), Pad(((-1, 0), (0, -2)))], ids=["padding", "crop"])
def test_a_sum_of_kernels_is_padded_and_cropped_as_a_whole(pad: Pad) -> None:
    """The terms that it keeps, to be added up when their numbers are asked for, have paddings of their own."""
    generator = torch.Generator().manual_seed(0)
    three, one = (torch.randn(2, 2, k, k, generator=generator, dtype=torch.float64) for k in (3, 1))
    both = parallel([Conv(three, padding=((1, 1), (1, 1))), Conv(one)])
    assert isinstance(both, Conv)
    assert both.terms
    x = torch.randn(1, 2, 7, 8, generator=generator, dtype=torch.float64)
    if pad.pads:
        torch.testing.assert_close(both.after(pad)(x), both(pad(x)))
    else:
        torch.testing.assert_close(both.then_crop(pad)(x), pad(both(x)))

"""Transposed convolutions against their definition and torch's own, in float64.

:class:`Scatter` is a transposed convolution taken literally: every input adds a matrix at every offset. It does not
use the algebra, and its sums and compositions are straight from the definition. It is the only candidate for a
combination, so where it is wrong at some border, the algebra must refuse, and where it is right, refusing would
leave work undone.
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import pytest
import strategies
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from networks import NORM, assert_same, graph_of, model, normal, reasons, rewritten
from strategies import random_tensor
from torch import Tensor, nn

import reparam
from reparam.algebra import AnyConv, ChannelAffine, Conv, ConvTranspose, Linear, parallel
from reparam.errors import AlgebraError
from reparam.graph.lift import Refusal, lift

Function = Callable[[Tensor], Tensor]

TOLERANCE = 1e-9
SPREAD = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
LAYER = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


# The oracle.


@dataclass(frozen=True)
class Scatter:
    """Input ``i`` adds ``matrix @ x[i]`` to output ``stride * i + offset``, for every offset."""

    matrices: dict[tuple[int, ...], Tensor]
    bias: Tensor
    stride: tuple[int, ...]
    growth: tuple[int, ...]

    @staticmethod
    def of(operator: AnyConv) -> Scatter:
        """A transposed convolution, or a convolution of stride 1 read backwards."""
        groups = operator.groups
        rows, columns = operator.out_channels // groups, operator.in_channels // groups
        weight = operator.weight.double()
        if operator.gain is not None:
            weight = weight * operator.gain.view(-1, *[1] * (weight.dim() - 1))
        dense = weight.new_zeros(operator.out_channels, operator.in_channels, *operator.kernel_size)
        for g in range(groups):
            block = weight[g * rows : (g + 1) * rows]
            dense[g * rows : (g + 1) * rows, g * columns : (g + 1) * columns] = block
        sign = 1 if isinstance(operator, ConvTranspose) else -1
        matrices = {}
        for tap in itertools.product(*map(range, operator.kernel_size)):
            place = zip(operator.dilation, tap, operator.padding, strict=True)
            matrices[tuple(sign * (d * j - p[0]) for d, j, p in place)] = dense[(..., *tap)]
        axes = zip(operator.padding, operator.dilation, operator.kernel_size, strict=True)
        growth = tuple(sign * (p[0] + p[1] - d * (k - 1)) for p, d, k in axes)
        bias = dense.new_zeros(len(dense)) if operator.bias is None else operator.bias
        return Scatter(matrices, bias, operator.stride, growth)

    def __add__(self, other: Scatter) -> Scatter:
        zero = torch.zeros_like(next(iter(self.matrices.values())))
        offsets = {**self.matrices, **other.matrices}
        matrices = {at: self.matrices.get(at, zero) + other.matrices.get(at, zero) for at in offsets}
        return replace(self, matrices=matrices, bias=self.bias + other.bias)

    def __matmul__(self, inner: Scatter) -> Scatter:
        """The linear part of the composition, if anything is."""
        matrices: dict[tuple[int, ...], Tensor] = {}
        for (o, outer_matrix), (i, matrix) in itertools.product(self.matrices.items(), inner.matrices.items()):
            offset = tuple(a + s * b for a, s, b in zip(o, self.stride, i, strict=True))
            matrices[offset] = matrices.get(offset, 0.0) + outer_matrix @ matrix
        stride = tuple(a * b for a, b in zip(self.stride, inner.stride, strict=True))
        growth = tuple(s * i + o for s, i, o in zip(self.stride, inner.growth, self.growth, strict=True))
        return Scatter(matrices, torch.zeros_like(self.bias), stride, growth)

    def sizes(self, inputs: Iterable[int]) -> list[int]:
        return [s * (n - 1) + 1 - g for s, n, g in zip(self.stride, inputs, self.growth, strict=True)]

    def __call__(self, x: Tensor) -> Tensor:
        sizes = self.sizes(x.shape[2:])
        y = x.new_zeros(len(x), len(self.bias), *sizes)
        for offset, matrix in self.matrices.items():
            added = torch.einsum("oi,ni...->no...", matrix, x)
            places = []
            for axis, (first, step, size) in enumerate(zip(offset, self.stride, sizes, strict=True), start=2):
                reached = [i for i in range(x.shape[axis]) if 0 <= step * i + first < size]
                added = added.index_select(axis, torch.tensor(reached, dtype=torch.long))
                places.append(torch.tensor([step * i + first for i in reached], dtype=torch.long))
            if added.numel():
                grid = torch.meshgrid(*places, indexing="ij")
                y[(slice(None), slice(None), *grid)] += added
        return y + self.bias.view(-1, *[1] * len(sizes))


def chain(*operators: AnyConv | ChannelAffine) -> Function:
    """The operators one after the other, by definition."""

    def run(x: Tensor) -> Tensor:
        for operator in operators:
            x = operator(x) if isinstance(operator, ChannelAffine) else Scatter.of(operator)(x)
        return x

    return run


def inputs(channels: int, *operators: AnyConv, most: int = 3) -> Iterator[Tensor]:
    """Inputs from the smallest that the operators accept one after the other, up to ``most`` larger on every axis."""
    scatters = [Scatter.of(operator) for operator in operators]

    def fits(axis: int, size: int) -> bool:
        for scatter in scatters:
            size = scatter.stride[axis] * (size - 1) + 1 - scatter.growth[axis]
            if size < 1:
                return False
        return True

    space = operators[0].dimensions
    least = [next(n for n in itertools.count(1) if fits(axis, n)) for axis in range(space)]
    for more in range(most):
        yield random_tensor((2, channels, *(n + more for n in least)), seed=more)
        yield random_tensor((1, channels, *(n + (more + axis) % most for axis, n in enumerate(least))), seed=more)


def same(actual: Tensor, expected: Tensor) -> bool:
    if actual.shape != expected.shape:
        return False
    return bool((actual - expected).abs().max() <= TOLERANCE * expected.abs().max() + 1e-12)


def assert_computes(operator: AnyConv, truth: Function, xs: Iterable[Tensor]) -> None:
    for x in xs:
        actual, expected = operator(x), truth(x)
        assert actual.dtype == torch.float64
        assert actual.shape == expected.shape
        assert same(actual, expected)
    if isinstance(operator, ConvTranspose):
        assert_is_a_layer_of_torch(operator)


def assert_is_a_layer_of_torch(operator: ConvTranspose) -> None:
    axes = zip(operator.padding, operator.output_padding, operator.stride, operator.dilation, strict=True)
    assert all(before >= 0 and 0 <= more < max(s, d) for (before, _), more, s, d in axes)


def differs_by_a_constant(candidate: Function, truth: Function, xs: Iterable[Tensor]) -> bool:
    """Whether truth minus candidate is one number a channel, whatever the input and its size."""
    constant = None
    for x in xs:
        actual, expected = candidate(x), truth(x)
        if actual.shape != expected.shape:
            return False
        difference = (expected - actual).transpose(0, 1).flatten(1)
        constant = difference[:, :1] if constant is None else constant
        if (difference - constant).abs().max() > TOLERANCE * (1 + expected.abs().max()):
            return False
    return True


def refuses(reason: str, combinator: Callable[..., object], *operands: object) -> None:
    with pytest.raises(AlgebraError, match=reason):
        combinator(*operands)


# What it is.


@given(st.data(), strategies.dimensions)
def test_it_is_what_the_definition_says_whatever_it_crops(data: st.DataObject, space: int) -> None:
    """Torch's layers lack most of these geometries; taps of weight zero make up for that."""
    conv = data.draw(strategies.convs(space))
    shared = {f: getattr(conv, f) for f in ("weight", "bias", "stride", "padding", "dilation", "groups", "gain")}
    written_as_conv = Scatter.of(conv)
    literal = replace(
        written_as_conv,
        matrices={tuple(-o for o in offset): matrix for offset, matrix in written_as_conv.matrices.items()},
        growth=tuple(-g for g in written_as_conv.growth),
    )
    operator = ConvTranspose(**shared)
    assert operator.growth == literal.growth
    assert_computes(operator, literal, inputs(operator.in_channels, operator))


@st.composite
def torch_arguments(draw: st.DrawFn, space: int, stride: int | None = None) -> dict[str, object]:
    """Everything that torch's function takes but its input."""
    groups, rows, columns = draw(st.sampled_from((1, 1, 2, 3))), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    kernel = [draw(st.integers(1, strategies.LARGEST_KERNEL[space])) for _ in range(space)]
    strides = [stride or draw(st.integers(1, 4)) for _ in range(space)]
    dilation = [draw(st.integers(1, 3)) for _ in range(space)]
    return {
        "weight": draw(strategies.tensors((groups * columns, rows, *kernel))),
        "bias": draw(st.none() | strategies.tensors((groups * rows,))),
        "stride": tuple(strides),
        "padding": tuple(draw(st.integers(0, 4)) for _ in range(space)),
        "output_padding": tuple(
            draw(st.integers(0, max(s, d) - 1)) for s, d in zip(strides, dilation, strict=True)
        ),
        "groups": groups,
        "dilation": tuple(dilation),
    }  # fmt: skip


def by_torch(space: int, arguments: dict[str, object]) -> Function:
    double = {k: v.detach().double() if isinstance(v, Tensor) else v for k, v in arguments.items()}
    return lambda x: SPREAD[space](x, **double)  # type: ignore[arg-type]


@given(st.data(), strategies.dimensions)
def test_it_is_the_function_of_torch(data: st.DataObject, space: int) -> None:
    arguments = data.draw(torch_arguments(space))
    operator = ConvTranspose.of_torch(**arguments)  # type: ignore[arg-type]
    weight = arguments["weight"]
    assert isinstance(weight, Tensor)
    assert (operator.in_channels, *operator.kernel_size) == (weight.shape[0], *weight.shape[2:])
    assert torch.equal(operator.torch_weight, weight.detach().double())
    assert operator.output_padding == arguments["output_padding"]
    assert_computes(operator, by_torch(space, arguments), inputs(operator.in_channels, operator))


@given(st.data(), strategies.dimensions)
def test_at_stride_1_it_is_a_convolution(data: st.DataObject, space: int) -> None:
    arguments = data.draw(torch_arguments(space, stride=1))
    operator = ConvTranspose.of_torch(**arguments)  # type: ignore[arg-type]
    conv = operator.as_conv()
    xs = list(inputs(operator.in_channels, operator))
    assert_computes(conv, by_torch(space, arguments), xs)
    assert_computes(conv.as_transposed(), by_torch(space, arguments), xs)


@given(st.data(), strategies.dimensions)
def test_the_adjoint_has_the_transposed_matrix(data: st.DataObject, space: int) -> None:
    """``<y, T x> = <T' y, x>``."""
    operator = data.draw(strategies.transposes(space, bias=False))
    back = operator.adjoint()
    for x in inputs(operator.in_channels, operator):
        y = operator(x)
        other = random_tensor(y.shape, seed=1)
        assert math.isclose((other * y).sum(), (back(other) * x).sum(), rel_tol=1e-9, abs_tol=1e-9)
        assert same(back.adjoint()(x), y)


@given(st.data(), strategies.dimensions)
def test_the_same_operator_written_differently(data: st.DataObject, space: int) -> None:
    operator = data.draw(strategies.transposes(space))
    xs = list(inputs(operator.in_channels, operator))
    groups = data.draw(st.sampled_from(strategies.divisors(operator.groups)))
    more = tuple((data.draw(st.integers(0, 2)), data.draw(st.integers(0, 2))) for _ in range(space))
    for written in (operator.regroup(groups), operator.widen(more), operator.undilate(), operator.double()):
        assert isinstance(written, ConvTranspose)
        assert_computes(written, chain(operator), xs)
    assert operator.regroup(groups).groups == groups
    assert set(operator.undilate().dilation) == {1}


def test_multiply_adds_are_counted_for_one_output_position():
    doubling = ConvTranspose(torch.ones(8, 4, 2, 2), stride=(2, 2))
    assert doubling.multiply_adds == 8 * 4
    assert ConvTranspose(torch.ones(1, 1, 3), stride=(2,)).multiply_adds == 2


def test_a_stride_has_no_other_kind():
    refuses("stride", ConvTranspose(torch.ones(1, 1, 3), stride=(2,)).as_conv)
    refuses("stride", Conv(torch.ones(1, 1, 3), stride=(2,)).as_transposed)
    refuses("reflect", Conv(torch.ones(1, 1, 3), padding=((1, 1),), padding_mode="reflect").as_transposed)
    refuses("reflect", Conv(torch.ones(1, 1, 3), padding=((1, 1),), padding_mode="reflect").adjoint)


# Scales and shifts.


@given(st.data(), strategies.dimensions)
def test_an_affine_after_it(data: st.DataObject, space: int) -> None:
    operator = data.draw(strategies.transposes(space))
    affine = data.draw(strategies.affines(operator.out_channels, operator.axis))
    fused = operator.then(affine)
    assert fused.weight.data_ptr() == operator.weight.data_ptr()
    assert_computes(fused, chain(operator, affine), inputs(operator.in_channels, operator))


@given(st.data(), strategies.dimensions)
def test_a_scale_before_it(data: st.DataObject, space: int) -> None:
    operator = data.draw(strategies.transposes(space))
    affine = data.draw(strategies.affines(operator.in_channels, operator.axis, shift=False))
    fused = operator.after(affine)
    assert_computes(fused, chain(affine, operator), inputs(operator.in_channels, operator))


@st.composite
def simple_transposes(draw: st.DrawFn, space: int) -> ConvTranspose:
    """Few weights, often the same, and often as many taps as the stride has steps: shifts often pass."""
    stride = [draw(st.integers(1, 3)) for _ in range(space)]
    kernel = [s if draw(st.booleans()) else draw(st.integers(1, 4)) for s in stride]
    count = math.prod(kernel)
    numbers = draw(st.lists(st.sampled_from((0, 1)), min_size=count, max_size=count) | st.just([1] * count))
    pads = [draw(st.sampled_from((0, 0, 1))) for _ in range(space)]
    more = [draw(st.sampled_from((0, 0, s - 1))) for s in stride]
    weight = torch.tensor(numbers, dtype=torch.float64).view(1, 1, *kernel)
    dilation = (draw(st.sampled_from((1, 1, 2))),) * space
    return ConvTranspose.of_torch(weight, None, tuple(stride), tuple(pads), tuple(more), 1, dilation)


@given(st.data(), strategies.dimensions)
def test_a_shift_passes_exactly_when_all_outputs_receive_the_same_of_it(data: st.DataObject, space: int) -> None:
    operator = data.draw(simple_transposes(space))
    shift = ChannelAffine.uniform(1.0, 0.7)
    sizes = itertools.product(range(1, 7), repeat=space)
    xs = [random_tensor((1, 1, *n), 0) for n in sizes if all(m > 0 for m in Scatter.of(operator).sizes(n))]
    if differs_by_a_constant(chain(operator), chain(shift, operator), xs):
        assert_computes(operator.after(shift), chain(shift, operator), xs)
    else:
        refuses("spread it evenly", operator.after, shift)


def test_upsampling_with_equal_taps_takes_a_norm_in():
    """Nearest-neighbour upsampling by a transposed convolution, with weights of its own for every channel."""
    weight = random_tensor((3, 2, 1, 1), 0).expand(3, 2, 2, 2)
    operator = ConvTranspose.of_torch(weight, random_tensor((2,), 3), stride=(2, 2))
    operator = operator.then(ChannelAffine(random_tensor((2,), 4), None, -3))
    norm = ChannelAffine(random_tensor((3,), 1), random_tensor((3,), 2), -3)
    assert_computes(operator.after(norm), chain(norm, operator), inputs(3, operator))


def test_a_shift_that_nothing_reads_passes():
    weight = random_tensor((2, 2, 3, 3), 0)
    weight[1] = 0
    operator = ConvTranspose.of_torch(weight, stride=(2, 2), padding=(1, 1))
    norm = ChannelAffine(torch.ones(2), torch.tensor([0.0, 5.0]), -3)
    assert_computes(operator.after(norm), chain(norm, operator), inputs(2, operator))


def test_an_affine_that_might_broadcast_stays():
    operator = ConvTranspose(torch.ones(1, 3, 2, 2), stride=(2, 2))
    refuses("broadcast", operator.after, ChannelAffine(torch.ones(3), None, -3, may_expand=True))
    refuses("axis", operator.after, ChannelAffine(torch.ones(3), None, -1))
    refuses("broadcast", operator.then, ChannelAffine(torch.ones(4), None, -3))


# Sequences.


def composes(outer: AnyConv, inner: AnyConv) -> None:
    """``outer.after(inner)`` is right, or refused because there is no such operator."""
    xs = list(inputs(inner.in_channels, inner, outer, most=5))
    candidate = Scatter.of(outer) @ Scatter.of(inner)
    if differs_by_a_constant(candidate, chain(inner, outer), xs):
        # Taps of weight zero, added for a geometry that torch lacks, count as taps; and so do the gaps between taps.
        taps_between = any(d != 1 for d in inner.dilation)
        if not taps_between and not any(bool((operator.weight == 0).any()) for operator in (inner, outer)):
            fused = outer.after(inner)
            assert isinstance(fused, ConvTranspose)
            assert_computes(fused, chain(inner, outer), xs)
    else:
        refuses("crops|ends where|evenly|shift before zero", outer.after, inner)


@given(st.data(), strategies.dimensions, st.booleans())
def test_a_pointwise_convolution_before_it(data: st.DataObject, space: int, bias: bool) -> None:
    outer = data.draw(strategies.transposes(space))
    ones, none = (1,) * space, ((0, 0),) * space
    inner = data.draw(
        strategies.convs(
            space, out_channels=outer.in_channels, kernel_size=ones, stride=ones, padding=none, bias=bias
        )
    )  # fmt: skip
    composes(outer, inner)
    if not bias:
        assert outer.after(inner).stride == outer.stride


@given(st.data(), strategies.dimensions)
def test_a_pointwise_convolution_after_it(data: st.DataObject, space: int) -> None:
    inner = data.draw(strategies.transposes(space))
    ones, none = (1,) * space, ((0, 0),) * space
    outer = data.draw(
        strategies.convs(space, in_channels=inner.out_channels, kernel_size=ones, stride=ones, padding=none)
    )
    fused = outer.after(inner)
    assert isinstance(fused, ConvTranspose)
    assert fused.multiply_adds <= inner.multiply_adds * outer.out_channels * max(inner.groups, 1)
    assert_computes(fused, chain(inner, outer), inputs(inner.in_channels, inner))


@st.composite
def few_paddings(draw: st.DrawFn, kernel: Sequence[int], dilation: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """None, or as much as the kernel, or anything between, on every side."""
    extent = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    return tuple((draw(st.sampled_from((0, e, e // 2))), draw(st.sampled_from((0, e, -1)))) for e in extent)


@st.composite
def one_dimensional(draw: st.DrawFn, kind: type[AnyConv], channels: int | None, bias: bool) -> AnyConv:
    kernel, dilation = (draw(st.integers(1, 4)),), (draw(st.integers(1, 2)),)
    stride = (1,) if kind is Conv else (draw(st.integers(1, 3)),)
    conv = draw(
        strategies.convs(
            1,
            in_channels=channels,
            out_channels=2,
            groups=1,
            kernel_size=kernel,
            stride=stride,
            dilation=dilation,
            padding=draw(few_paddings(kernel, dilation)),
            bias=bias,
        )
    )
    shared = {f: getattr(conv, f) for f in ("weight", "bias", "stride", "padding", "dilation", "groups", "gain")}
    return kind(**shared)


@given(st.data(), st.sampled_from([(Conv, ConvTranspose), (ConvTranspose, Conv), (ConvTranspose, ConvTranspose)]))
def test_any_sequence_that_is_one_operator_becomes_one(data: st.DataObject, kinds: tuple[type, type]) -> None:
    inner = data.draw(one_dimensional(kinds[0], None, data.draw(st.sampled_from((False, False, True)))))
    outer = data.draw(one_dimensional(kinds[1], inner.out_channels, data.draw(st.booleans())))
    composes(outer, inner)


def test_sequences_that_are_no_transposed_convolution():
    doubling = ConvTranspose(random_tensor((2, 2, 4), 0), stride=(2,), padding=((1, 1),))
    padded = Conv(random_tensor((2, 2, 3), 1), padding=((1, 1),))
    refuses("covers what the transposed convolution crops", padded.after, doubling)
    refuses("ends where one kernel would go on", doubling.after, padded)
    refuses("crops what one kernel would spread", doubling.after, doubling)
    refuses("stride", doubling.after, Conv(random_tensor((2, 2, 1), 0), stride=(2,)))
    refuses("stride", Conv(random_tensor((2, 2, 1), 0), stride=(2,)).after, doubling)
    refuses("3 channels are broadcast to 2", doubling.after, Conv(random_tensor((3, 2, 1), 0)))
    refuses("2-d before a 1-d", doubling.after, Conv(random_tensor((2, 2, 1, 1), 0)))
    refuses("0-d before a 1-d", doubling.after, Linear(random_tensor((2, 2), 0)))
    refuses("reflect", replace(padded, padding_mode="reflect").after, doubling)


# Sums.


@given(st.data(), strategies.dimensions)
def test_branches_of_one_stride_and_output_size_merge(data: st.DataObject, space: int) -> None:
    stride = [data.draw(st.integers(1, 3)) for _ in range(space)]
    growth = [data.draw(st.integers(-4, 1)) for _ in range(space)]
    in_channels, out_channels = (data.draw(st.sampled_from(strategies.CHANNELS)) for _ in range(2))
    term = strategies.transposes(
        space, in_channels=in_channels, out_channels=out_channels, stride=stride, growth=growth
    )  # fmt: skip
    terms = data.draw(st.lists(term, min_size=2, max_size=3))
    merged = parallel(terms)
    outline = parallel(terms, outline=True)
    assert isinstance(merged, ConvTranspose)
    assert isinstance(outline, ConvTranspose)
    assert merged.groups == math.gcd(*(term.groups for term in terms))
    assert (outline.weight.shape, outline.padding) == (merged.weight.shape, merged.padding)
    total = Scatter.of(terms[0])
    for other in terms[1:]:
        total += Scatter.of(other)
    assert_computes(merged, total, inputs(in_channels, *terms[:1]))


def test_a_4x4_and_a_2x2_branch_are_one_4x4():
    wide = ConvTranspose(random_tensor((3, 2, 4, 4), 0), stride=(2, 2), padding=((1, 1), (1, 1)))
    narrow = ConvTranspose(random_tensor((3, 2, 2, 2), 1), stride=(2, 2))
    merged = parallel([narrow, wide])
    assert isinstance(merged, ConvTranspose)
    assert (merged.kernel_size, merged.padding) == ((4, 4), ((1, 1), (1, 1)))


def test_output_padding_puts_a_3x3_beside_a_2x2():
    odd = ConvTranspose.of_torch(random_tensor((2, 2, 3), 0), None, (2,), (1,), (1,))
    even = ConvTranspose.of_torch(random_tensor((2, 2, 2), 1), None, (2,))
    merged = parallel([odd, even])
    assert isinstance(merged, ConvTranspose)
    assert (merged.kernel_size, merged.padding, merged.output_padding) == ((3,), ((1, 0),), (1,))


def test_sums_that_are_no_transposed_convolution():
    doubling = ConvTranspose(random_tensor((2, 2, 2), 0), stride=(2,))
    refuses("strides", parallel, [doubling, ConvTranspose(random_tensor((2, 2, 3), 0), stride=(3,))])
    refuses("sizes differ", parallel, [doubling, ConvTranspose(random_tensor((2, 2, 3), 0), stride=(2,))])
    refuses("transposed", parallel, [doubling, Conv(random_tensor((2, 2, 2), 0))])
    refuses("transposed", parallel, [doubling, ChannelAffine.uniform(1.0)])
    refuses("channels", parallel, [doubling, ConvTranspose(random_tensor((3, 2, 2), 0), stride=(2,))])


# From layers, and back to them.


class Spread(nn.Module):
    """A transposed convolution as torch's layer, or as torch's function."""

    def __init__(self, space: int, arguments: dict[str, object], functional: bool) -> None:
        super().__init__()
        names = ("stride", "padding", "output_padding", "groups", "dilation")
        self.geometry = {name: arguments[name] for name in names}
        weight, bias = arguments["weight"], arguments["bias"]
        assert isinstance(weight, Tensor)
        rows = weight.shape[1] * int(str(arguments["groups"]))
        layer = LAYER[space](weight.shape[0], rows, weight.shape[2:], bias=bias is not None, **self.geometry)
        layer.weight.data = weight.detach()
        if isinstance(bias, Tensor):
            layer.bias.data = bias.detach()
        self.space, self.functional, self.layer = space, functional, layer.double()

    def forward(self, x: Tensor) -> Tensor:
        if self.functional:
            return SPREAD[self.space](x, self.layer.weight, self.layer.bias, **self.geometry)
        return self.layer(x)


@given(st.data(), strategies.dimensions, st.booleans())
def test_every_layer_takes_in_the_norm_after_it(data: st.DataObject, space: int, functional: bool) -> None:
    spread = Spread(space, data.draw(torch_arguments(space)), functional)
    channels = spread.layer.out_channels
    net = model(lambda s, x: s.bn(s.spread(x)), spread=spread, bn=NORM[space](channels))
    operator = ConvTranspose.of_torch(spread.layer.weight, **spread.geometry)
    *_, x = inputs(operator.in_channels, operator)
    compiled = reparam.compile(net, x)
    assert compiled.report.after.kernels == 1
    assert compiled.report.after.parameters == spread.layer.weight.numel() + channels
    assert_same(net, compiled, x)


@given(st.data(), strategies.dimensions)
def test_parallel_layers_are_one_layer(data: st.DataObject, space: int) -> None:
    """Kernels around a centre of even width, as upsampling branches have them, with a norm after each."""
    channels = data.draw(st.sampled_from((2, 4)))
    branches = []
    for _ in range(data.draw(st.integers(2, 3))):
        p = data.draw(st.integers(0, 1))
        groups = data.draw(st.sampled_from((1, 2)))
        layer = LAYER[space](channels, 4, 2 + 2 * p, 2, p, groups=groups, bias=data.draw(st.booleans()))
        branches.append(nn.Sequential(layer, NORM[space](4)))
    net = model(lambda s, x: sum(branch(x) for branch in s.branches), branches=nn.ModuleList(branches))
    x = normal(2, channels, *(5, 4, 3)[:space])
    compiled = reparam.compile(net, x)
    assert_same(net, compiled, x)
    assert compiled.report.after.kernels == 1
    assert compiled.report.after.convolutions == 1


class Decoder(nn.Module):
    """A step of a U-Net's decoder: upsample, join the skip, two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Sequential(nn.ConvTranspose2d(8, 4, 2, 2), nn.BatchNorm2d(4), nn.ReLU())
        self.refine = nn.Sequential(
            nn.Conv2d(8, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
            nn.ConvTranspose2d(4, 4, 3, padding=1), nn.BatchNorm2d(4),
        )  # fmt: skip

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.refine(torch.cat([self.up(x), skip], 1))


def test_a_decoder_keeps_its_names_and_loses_its_norms():
    decoder = model(lambda s, x, y: s.decoder(x, y), decoder=Decoder())
    x, skip = normal(2, 8, 3, 5), normal(2, 4, 6, 10)
    compiled = reparam.compile(decoder, (x, skip))
    assert_same(decoder, compiled, x, skip)
    assert compiled.report.after.norms == 0
    assert [name for name, _ in compiled.named_parameters()] == [
        "decoder.up.0.weight", "decoder.up.0.bias",
        "decoder.refine.0.weight", "decoder.refine.0.bias",
        "decoder.refine.3.weight", "decoder.refine.3.bias",
    ]  # fmt: skip
    assert isinstance(compiled.get_submodule("decoder.up.0"), nn.ConvTranspose2d)
    # At stride 1 it is a convolution like any other.
    assert isinstance(compiled.get_submodule("decoder.refine.3"), nn.Conv2d)


def test_the_graph_as_text():
    net = model(
        lambda s, x: s.bn(s.up(x)), up=nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=2, dilation=2), bn=nn.BatchNorm2d(6)
    )
    before, after = rewritten(net)
    up = "convtranspose2d[4 -> 6, 3x3, stride 2, crop 1:0, dilation 2, groups 2, bias](%0)"
    assert before == f"%0 = input x\n%1 = {up}\n%2 = affine[6, axis -3](%1)\nreturn %2"
    assert after == f"%0 = input x\n%1 = {up}\nreturn %1"


def test_a_residual_around_a_transposed_convolution_of_stride_1():
    net = model(lambda s, x: x + s.up(x), up=nn.ConvTranspose1d(4, 4, 3, padding=1))
    x = normal(2, 4, 9)
    compiled = reparam.compile(net, x)
    assert compiled.report.after.kernels == 1
    assert_same(net, compiled, x)


@pytest.mark.parametrize(
    "layer",
    [nn.ConvTranspose2d(4, 4, 3, 1, padding=4), nn.ConvTranspose2d(4, 4, 2, 1, 0, output_padding=1, dilation=2)],
    ids=["crops more than its kernel", "output padding"],
)  # fmt: skip
def test_what_no_convolution_pads_stays_one_kernel(layer):
    """A convolution would need a crop or an uneven padding before it."""
    net = model(lambda s, x: s.bn(s.up(x)), up=layer, bn=nn.BatchNorm2d(4))
    x = normal(2, 4, 9, 8)
    compiled = reparam.compile(net, x)
    assert isinstance(compiled.up, nn.ConvTranspose2d)
    assert compiled.report.after.kernels == 1
    assert_same(net, compiled, x)


def test_a_norm_before_says_why_it_stays():
    net = model(lambda s, x: s.up(s.bn(x)), up=nn.ConvTranspose2d(4, 4, 4, 2, 1), bn=nn.BatchNorm2d(4))
    x = normal(2, 4, 5, 5)
    compiled = reparam.compile(net, x)
    assert compiled.report.after.norms == 1
    assert any("does not spread it evenly" in reason for reason in reasons(compiled))
    assert_same(net, compiled, x)


def test_a_scale_before_goes():
    net = model(lambda s, x: s.up(0.5 * x), up=nn.ConvTranspose2d(4, 4, 4, 2, 1))
    x = normal(2, 4, 5, 5)
    compiled = reparam.compile(net, x)
    assert compiled.report.after.kernels == 1
    assert_same(net, compiled, x)


def test_branches_of_different_sizes_broadcast_and_stay():
    net = model(lambda s, x: s.a(x) + s.b(x), a=nn.ConvTranspose1d(2, 2, 1), b=nn.ConvTranspose1d(2, 2, 2, 2))
    x = normal(2, 2, 1)[..., :1]
    with pytest.raises(RuntimeError):
        net(normal(2, 2, 4))
    net.b.stride = (1,)
    compiled = reparam.compile(net, x)
    assert compiled.report.after.convolutions == 2


def test_output_size_depends_on_the_call():
    net = model(
        lambda s, x: s.bn(s.up(x, output_size=[12, 12])), up=nn.ConvTranspose2d(4, 4, 3, 2, 1), bn=nn.BatchNorm2d(4)
    )
    x = normal(2, 4, 6, 6)
    compiled = reparam.compile(net, x)
    assert compiled.report.after.norms == 1
    assert any("output_size" in reason for reason in reasons(compiled))
    assert_same(net, compiled, x)


def test_output_size_of_a_stride_of_1_can_only_be_one():
    net = model(
        lambda s, x: s.bn(s.up(x, x.shape[2:])),
        up=nn.ConvTranspose2d(4, 4, 3, 1, 1, output_padding=1, dilation=(2, 2)),
        bn=nn.BatchNorm2d(4),
    )
    net.up.padding = (2, 2)
    x = normal(2, 4, 6, 6)
    compiled = reparam.compile(net, x)
    assert compiled.report.after.kernels == 1
    assert_same(net, compiled, x)


def test_a_weight_from_the_input_is_not_lifted():
    net = model(lambda s, x, w: F.conv_transpose2d(x, w))
    graph = graph_of(net)
    call = next(node for node in graph.fx.nodes if node.op == "call_function")
    assert lift(call, graph.modules) is None


def test_complex_weights_are_refused():
    net = model(lambda s, x: s.up(x), up=nn.ConvTranspose1d(2, 2, 2, 2))
    net.up = nn.ConvTranspose1d(2, 2, 2, 2, dtype=torch.complex128)
    graph = graph_of(net, normal(2, 2, 5).to(torch.complex128))
    call = next(node for node in graph.fx.nodes if node.op == "call_module")
    assert isinstance(lift(call, graph.modules), Refusal)


def upsampler() -> tuple[nn.Module, Tensor]:
    """A network whose deploy form has a transposed layer."""
    branch = nn.Sequential(nn.ConvTranspose2d(4, 6, 4, 2, 1, groups=2), nn.BatchNorm2d(6))
    other = nn.Sequential(nn.ConvTranspose2d(4, 6, 3, 2, 1, 1), nn.BatchNorm2d(6))
    net = model(lambda s, x: torch.relu(s.a(x) + s.b(x)), a=branch, b=other)
    return net, normal(1, 4, 5, 7)


def test_save_and_load(tmp_path):
    net, x = upsampler()
    compiled = reparam.compile(net, x)
    assert sum(isinstance(module, nn.ConvTranspose2d) for module in compiled.modules()) == 1
    path = tmp_path / "upsampler.pt"
    reparam.save(compiled, path)
    assert_same(net, reparam.load(path), x)


def test_onnx_export():
    onnx = pytest.importorskip("onnx")
    reference = pytest.importorskip("onnx.reference")
    net, x = upsampler()
    compiled = reparam.compile(net.float(), x.float())
    stored = io.BytesIO()
    torch.onnx.export(compiled, (x.float(),), stored, dynamo=False, opset_version=17)
    exported = onnx.load_model_from_string(stored.getvalue())
    assert [node.op_type for node in exported.graph.node] == ["ConvTranspose", "Relu"]
    (y,) = reference.ReferenceEvaluator(exported).run(None, {exported.graph.input[0].name: x.float().numpy()})
    torch.testing.assert_close(torch.from_numpy(y), net(x.float()).detach(), rtol=1e-4, atol=1e-5)


def test_without_example_inputs_the_first_layer_shows_what_to_check_with():
    net, x = upsampler()
    compiled = reparam.compile(net)
    assert compiled.report.comparison is not None
    assert_same(net, compiled, x)


@pytest.mark.parametrize("bias", [False, True])
def test_doubling_after_a_padded_convolution(bias):
    """Writes of 2x2 at stride 2 do not overlap: what the convolution does not compute would be written outside."""
    doubling = ConvTranspose(random_tensor((2, 3, 2), 0), random_tensor((2,), 1), stride=(2,))
    padded = Conv(random_tensor((3, 2, 3), 2), random_tensor((3,), 3) if bias else None, padding=((1, 1),))
    if bias:
        refuses("evenly", doubling.after, padded)
    else:
        assert_computes(doubling.after(padded), chain(padded, doubling), inputs(2, padded, doubling))


def test_an_outline_shows_what_a_sequence_would_be_and_takes_no_shift():
    doubling = ConvTranspose(random_tensor((2, 3, 2), 0), stride=(2,))
    one = Conv(random_tensor((3, 2, 1), 1))
    outline, real = doubling.after(one, outline=True), doubling.after(one)
    assert (outline.weight.shape, outline.padding, outline.stride) == (real.weight.shape, real.padding, real.stride)
    refuses("shift", lambda inner: doubling.after(inner, outline=True), ChannelAffine.uniform(1.0, 2.0))
    refuses("shift", lambda inner: doubling.after(inner, outline=True), replace(one, bias=torch.ones(3)))


@pytest.mark.parametrize("first", [False, True])
def test_a_1x1_convolution_beside_an_upsampling_becomes_part_of_it(first):
    one, up = nn.Conv2d(8, 8, 1, bias=not first), nn.ConvTranspose2d(8, 8, 4, 2, 1)
    net = model(lambda s, x: s.layers(x), layers=nn.Sequential(*((one, up) if first else (up, one))))
    x = normal(2, 8, 5, 4)
    compiled = reparam.compile(net, x)
    assert compiled.report.after.kernels == 1
    assert_same(net, compiled, x)


def test_branches_of_several_layers_each():
    """A term of the sum may be a 1x1 convolution and an upsampling, whose bias no upsampling takes in."""
    net = model(
        lambda s, x: s.a(x) + s.b(x),
        a=nn.Sequential(nn.Conv2d(4, 6, 1), nn.ConvTranspose2d(6, 4, 4, 2, 1)),
        b=nn.Sequential(nn.ConvTranspose2d(4, 4, 2, 2), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)),
    )
    x = normal(2, 4, 5, 4)
    compiled = reparam.compile(net, x)
    assert_same(net, compiled, x)
    assert compiled.report.after.norms == 0
    net.a[0].bias = None
    compiled = reparam.compile(net, x)
    assert compiled.report.after.kernels == 1
    assert_same(net, compiled, x)


def test_a_bias_inside_a_branch_stays_where_no_kernel_takes_it_in():
    """What the last layers of a branch are together is known without their numbers; what a bias adds is not."""
    net = model(
        lambda s, x: s.a(x) + s.b(x),
        a=nn.Sequential(nn.Conv1d(4, 6, 1), nn.ConvTranspose1d(6, 4, 4, 2, 1), nn.Conv1d(4, 4, 1)),
        b=nn.ConvTranspose1d(4, 4, 2, 2),
    )
    x = normal(2, 4, 5)
    compiled = reparam.compile(net, x)
    assert_same(net, compiled, x)
    # The first layer stays, the two after it become one.
    assert compiled.report.after.convolutions == 3

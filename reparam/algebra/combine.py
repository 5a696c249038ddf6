"""What two operators are in a row, and several side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch

from reparam.algebra.affine import ChannelAffine, add_affines, refuse_expansion
from reparam.algebra.convolution import AnyConv, Conv, ConvTranspose, as_conv, sum_of_kernels, unfilled
from reparam.algebra.lattice import Lattice, common_lattice
from reparam.algebra.operator import Operator
from reparam.algebra.permutation import Permute
from reparam.algebra.windows import AveragePool, Pad
from reparam.errors import AlgebraError


def compose(outer: Operator, inner: Operator, *, outline: bool = False) -> Operator:
    """``outer(inner(x))`` as one operator.

    Args:
        outer: What comes last.
        inner: What comes first.
        outline: As for :meth:`Conv.after`.

    Raises:
        AlgebraError: The two are not one operator; the message says why.
    """
    match outer, inner:
        case ChannelAffine(), ChannelAffine():
            return outer.after(inner)
        case AveragePool() | Pad(), Pad():
            return outer.after(inner)
        case ChannelAffine(), Conv() | ConvTranspose():
            return inner.then(outer)
        case ChannelAffine(), AveragePool():
            refuse_expansion(outer)
            return _conv_of(inner, outer).then(outer)
        case Conv() | ConvTranspose(), _:
            return outer.after(inner, outline=outline)
        case AveragePool() | Permute(), Conv() | ConvTranspose():
            conv = as_conv(outer, inner.out_channels, inner.dimensions, inner.device)
            return conv.after(inner, outline=outline)
        case AveragePool(), ChannelAffine():
            return _conv_of(outer, inner).after(inner)
        case Pad(), Conv():
            return inner.then_crop(outer)
    raise AlgebraError("the two are not one operator")


def _conv_of(pool: AveragePool, affine: ChannelAffine) -> Conv:
    """A pool of the channels that an affine next to it has."""
    if affine.axis is None:
        raise AlgebraError("nothing says how many channels there are")
    return as_conv(pool, len(affine.scale), -affine.axis - 1, affine.device)


def parallel(terms: Sequence[Operator], *, outline: bool = False) -> Operator:
    """``sum(term(x) for term in terms)`` as one operator, all terms reading the same ``x``.

    ``W1*x + W2*x = (W1 + W2)*x``, once both kernels are written over the same taps and the same groups. That
    is exact when the terms have the same stride and the same output size for every input, and when those that
    read the padding pad the same way. Identities, scales and pools among the terms take their channels from
    the convolutions.

    Args:
        terms: At least one.
        outline: Leave the numbers of a convolution zero. That takes no memory and hardly any time, and shows whether
            the terms add up, and to a kernel of what size.

    Raises:
        AlgebraError: The terms do not add up to one operator; the message says why.
    """
    affines = [term for term in terms if isinstance(term, ChannelAffine)]
    if len(affines) == len(terms):
        return reduce(add_affines, affines)
    model = next((term for term in terms if isinstance(term, AnyConv)), None)
    if model is None:
        raise AlgebraError("no convolution among the terms says how many channels there are")
    channels, dimensions, device = model.in_channels, model.dimensions, model.device
    convs = [term if isinstance(term, AnyConv) else as_conv(term, channels, dimensions, device) for term in terms]
    return _sum_convs(convs, outline)


def concatenate(convs: Sequence[Conv], *, outline: bool = False) -> Conv:
    """``[W1*x; W2*x]`` along the channels as one convolution with the kernels one below the other.

    Exact for any convolutions of one stride and output size that pad alike. Channels of several groups are interleaved
    otherwise than those of several convolutions, so the result has a single group.

    Args:
        convs: At least one, all reading the same ``x``.
        outline: As for :func:`parallel`.

    Raises:
        AlgebraError: Their outputs have different shapes, or they pad differently.
    """
    first = convs[0]
    for conv in convs[1:]:
        check_same_size(first, conv)
    lattice, geometry = _common_geometry(convs)
    rows = sum(conv.out_channels for conv in convs)
    biased = any(conv.bias is not None for conv in convs)
    if outline:
        weight, bias = unfilled((rows, first.in_channels, *(taps.count for taps in lattice)), biased)
    else:
        weight = torch.cat([conv.double().regroup(1)._on(lattice) for conv in convs])
        zeros = [weight.new_zeros(conv.out_channels) if conv.bias is None else conv.bias for conv in convs]
        bias = torch.cat(zeros) if biased else None
    return Conv(weight, bias, **geometry)


def _common_geometry(convs: Sequence[AnyConv]) -> tuple[list[Lattice], dict[str, Any]]:
    """The taps of all of some convolutions of one output size, and what else a kernel on them is made with.

    Raises:
        AlgebraError: They pad differently.
    """
    first = convs[0]
    modes = {conv.padding_mode for conv in convs if isinstance(conv, Conv) and conv.pads}
    if len(modes) > 1:
        raise AlgebraError(f"{' and '.join(sorted(modes))} padding do not merge")
    lattice = [common_lattice(own) for own in zip(*(conv._lattices for conv in convs), strict=True)]
    padding = tuple(taps.padding(growth) for taps, growth in zip(lattice, first.growth, strict=True))
    dilation = tuple(taps.step for taps in lattice)
    geometry: dict[str, Any] = {"stride": first.stride, "padding": padding, "dilation": dilation}
    if modes:
        geometry["padding_mode"] = modes.pop()
    return lattice, geometry


def _sum_convs(convs: Sequence[AnyConv], outline: bool) -> AnyConv:
    first = convs[0]
    for conv in convs[1:]:
        _check_parallel(first, conv)
    lattice, geometry = _common_geometry(convs)
    groups = reduce(math.gcd, (conv.groups for conv in convs))
    shape = (first.out_channels, first.in_channels // groups, *(taps.count for taps in lattice))
    biases = [conv.bias for conv in convs if conv.bias is not None]
    weight, bias = unfilled(shape, bool(biases), first.weight.device)
    # A transposed kernel may get further taps, for which it needs its numbers.
    terms = () if outline or isinstance(first, ConvTranspose) else tuple(convs)
    if isinstance(first, ConvTranspose) and not outline:
        weight = sum_of_kernels(convs, groups, lattice)
    bias = bias if outline or not biases else reduce(torch.add, biases)
    return type(first)(weight, bias, groups=groups, terms=terms, **geometry)


def _check_parallel(a: AnyConv, b: AnyConv) -> None:
    """Raise unless ``a(x)`` and ``b(x)`` exist for the same inputs and have the same shape for all of them."""
    check_same_size(a, b)
    if a.out_channels != b.out_channels:
        raise AlgebraError(f"the addition broadcasts: {a.out_channels} and {b.out_channels} output channels")


def check_same_size(a: AnyConv, b: AnyConv) -> None:
    """Raise unless ``a(x)`` and ``b(x)`` exist for the same inputs and differ at most in their channels."""
    if type(a) is not type(b):
        raise AlgebraError("one of them is a transposed convolution, which has another stride")
    if a.dimensions != b.dimensions:
        raise AlgebraError(f"a {a.dimensions}-d and a {b.dimensions}-d operator")
    if a.in_channels != b.in_channels:
        raise AlgebraError(f"they read {a.in_channels} and {b.in_channels} channels")
    if a.stride != b.stride:
        raise AlgebraError(f"strides {a.stride} and {b.stride} differ")
    if a.growth != b.growth:
        raise AlgebraError("their output sizes differ for some inputs, so the addition broadcasts")

"""Convolutions and transposed ones, of any dimension, and what they are after other operators."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from reparam.algebra.affine import ChannelAffine, add, refuse_expansion
from reparam.algebra.lattice import Lattice, sum_lattice, within
from reparam.algebra.operator import ZEROS, Ints, Operator, Padding, in_double
from reparam.algebra.windows import Pad, flat_padding, padded, pads_text
from reparam.errors import AlgebraError

if TYPE_CHECKING:
    from typing_extensions import Self

# Numbers that are worked on at once.
_PIECE = 2**17
# Relative to the largest term: what adding the same numbers in another order may change.
_ROUNDING = 1e-13
_CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_SPREAD: dict[int, Callable[..., Tensor]] = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


@dataclass(frozen=True, eq=False)
class Weighted(Operator):
    """What a convolution and a transposed one share: weights at taps, over the last ``dimensions`` axes.

    The channels are on the axis before those. The taps of an axis lie at ``dilation * j - before``.

    Attributes:
        weight: Shape ``(out_channels, in_channels // groups, *kernel_size)``, in any floating-point precision.
        bias: Shape ``(out_channels,)`` or None; kept in float64.
        stride: One number an axis; 1 when left out. Likewise ``dilation``.
        padding: ``(before, after)`` an axis; (0, 0) when left out.
        groups: Number of blocks of channels that do not mix.
        gain: Shape ``(out_channels,)``: what every output channel's kernel is to be multiplied by, or None. Kept
            apart, so that a norm is folded in without a copy of the kernel; :attr:`kernel` is the product.
        terms: The operators whose kernels add up to this one's, or none. The weight then only has the shape: a merged
            kernel in float64 takes more memory than the branches, and is made when its layer is.
    """

    weight: Tensor
    bias: Tensor | None = None
    stride: Ints = ()
    padding: Padding = ()
    dilation: Ints = ()
    groups: int = 1
    gain: Tensor | None = field(default=None, kw_only=True)
    terms: tuple[Weighted, ...] = field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "weight", self.weight.detach())
        if self.bias is not None:
            object.__setattr__(self, "bias", in_double(self.bias))
        space = self.weight.dim() - 2
        for name, default in (("stride", 1), ("dilation", 1), ("padding", (0, 0))):
            if not getattr(self, name):
                object.__setattr__(self, name, (default,) * space)

    # What it is.

    @property
    def kernel(self) -> Tensor:
        """The numbers that multiply the input: weight times gain, in float64. Not to be written to."""
        if self.terms:
            return self._summed().kernel
        if self.gain is None:
            return in_double(self.weight)
        kernel = self.weight.to(torch.float64, copy=True)
        return kernel.mul_(self.gain.view(-1, *[1] * (kernel.dim() - 1)))

    def rounded(self, dtype: torch.dtype) -> Tensor:
        """A new copy of :attr:`kernel` in another precision.

        It is made in pieces: a whole one in float64 takes longer to get memory for than to compute.
        """
        if self.terms or self.gain is None:
            return self.kernel.to(dtype, copy=True)
        made = torch.empty_like(self.weight, dtype=dtype)
        rows = max(1, _PIECE * len(made) // made.numel())
        gain = self.gain.view(-1, *[1] * (made.dim() - 1))
        for piece, weight, factor in zip(made.split(rows), self.weight.split(rows), gain.split(rows), strict=True):
            piece.copy_(in_double(weight) * factor)
        return made

    def _summed(self) -> Self:
        """The same operator with the numbers of its terms in its weight."""
        return replace(self, weight=sum_of_kernels(self.terms, self.groups, self._lattices), terms=())

    def _text(self, kind: str, padding: str, mode: str = ZEROS) -> str:
        facts = [f"{self.in_channels} -> {self.out_channels}", "x".join(map(str, self.kernel_size))]
        facts += [f"stride {_axes_text(self.stride)}"] * any(s != 1 for s in self.stride)
        facts += [f"{padding} {pads_text(self.padding)}"] * any(p for pair in self.padding for p in pair)
        facts += [mode] * (mode != ZEROS)
        facts += [f"dilation {_axes_text(self.dilation)}"] * any(d != 1 for d in self.dilation)
        facts += [f"groups {self.groups}"] * (self.groups != 1)
        facts += ["bias"] * (self.bias is not None)
        return f"{kind}{self.dimensions}d[{', '.join(facts)}]"

    @property
    def device(self) -> torch.device:
        """Where its numbers are."""
        return self.weight.device

    @property
    def makes(self) -> tuple[int, int]:
        """Its output channels."""
        return self.out_channels, self.axis

    @property
    def rank(self) -> int | None:
        """Batch, channels and space; a matrix product may have more axes."""
        return self.dimensions + 2 if self.dimensions else None

    @property
    def dimensions(self) -> int:
        """Number of spatial axes: 0 for a matrix product on the last axis."""
        return self.weight.dim() - 2

    @property
    def axis(self) -> int:
        """The channels' axis, counted from the end."""
        return -self.dimensions - 1

    @property
    def out_channels(self) -> int:
        """Channels of the output."""
        return self.weight.shape[0]

    @property
    def in_channels(self) -> int:
        """Channels of the input."""
        return self.weight.shape[1] * self.groups

    @property
    def kernel_size(self) -> Ints:
        """Taps an axis."""
        return tuple(self.weight.shape[2:])

    @property
    def extent(self) -> Ints:
        """Distance between the first and the last tap of every axis."""
        return tuple(d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True))

    @property
    def growth(self) -> Ints:
        """Padding minus extent of every axis: output size minus input size of a convolution at stride 1.

        Two of the same stride give the same output size for every input size exactly when this agrees: the size is
        ``(input + growth - 1) // stride + 1``, transposed ``stride * (input - 1) + 1 - growth``.
        """
        return tuple(sum(pair) - extent for pair, extent in zip(self.padding, self.extent, strict=True))

    # One operator, written differently.

    def double(self) -> Self:
        """The same operator with its numbers in float64."""
        return replace(self, weight=self.kernel, gain=None, terms=())

    def regroup(self, groups: int) -> Self:
        """The same operator in fewer groups: a block-diagonal kernel, zero between the old groups.

        Raises:
            AlgebraError: ``groups`` does not divide the present number.
        """
        if groups == self.groups:
            return self
        if self.groups % groups:
            raise AlgebraError(f"{self.groups} groups cannot be written as {groups}")
        if self.terms:
            return self._summed().regroup(groups)
        blocks = self.groups // groups
        rows, columns = self.out_channels // self.groups, self.weight.shape[1]
        old = self.weight.reshape(groups, blocks, rows, columns, *self.kernel_size)
        new = old.new_zeros(groups, blocks, rows, blocks, columns, *self.kernel_size)
        new.diagonal(dim1=1, dim2=3).copy_(old.movedim(1, -1))
        weight = new.reshape(self.out_channels, blocks * columns, *self.kernel_size)
        return replace(self, weight=weight, groups=groups)

    def widen(self, taps: Padding) -> Self:
        """The same operator with ``(before, after)`` more taps of weight zero on the two sides of every axis."""
        padding = tuple(
            (before + d * more[0], after + d * more[1])
            for (before, after), d, more in zip(self.padding, self.dilation, taps, strict=True)
        )
        whole = self._summed() if self.terms else self
        return replace(whole, weight=F.pad(whole.weight, flat_padding(taps)), padding=padding)

    def undilate(self) -> Self:
        """The same operator with dilation 1: zeros between the taps."""
        if all(d == 1 for d in self.dilation):
            return self
        lattice = [Lattice(taps.first, 1, taps.last - taps.first + 1) for taps in self._lattices]
        return replace(self, weight=self._on(lattice), dilation=(1,) * self.dimensions, terms=())

    @property
    def _lattices(self) -> list[Lattice]:
        """Where the taps of every axis lie."""
        return [
            Lattice(-before, step, count)
            for (before, _), step, count in zip(self.padding, self.dilation, self.kernel_size, strict=True)
        ]

    def _on(self, lattice: Sequence[Lattice]) -> Tensor:
        """The weight spread over a lattice of taps that contains its own, zero elsewhere."""
        if self.terms:
            return self._summed()._on(lattice)
        if self.kernel_size == tuple(taps.count for taps in lattice):
            return self.weight
        weight = self.weight.new_zeros(*self.weight.shape[:2], *(taps.count for taps in lattice))
        weight[within(self._lattices, lattice)] = self.weight
        return weight

    def _rows(self, vector: Tensor) -> Tensor:
        """A number for every input channel, laid out like the kernel's first two axes."""
        columns = self.weight.shape[1]
        grouped = vector.reshape(self.groups, 1, columns)
        spread = grouped.expand(self.groups, self.out_channels // self.groups, columns)
        return spread.reshape(self.out_channels, columns, *[1] * self.dimensions)

    def _flipped(self) -> dict[str, Any]:
        """What the other kind of convolution, which does the same at stride 1, is made of.

        Raises:
            AlgebraError: This one has a stride, and no other kind does the same.
        """
        if any(s != 1 for s in self.stride):
            raise AlgebraError(f"the convolution has a stride of {self.stride}")
        padding = tuple((e - before, e - after) for (before, after), e in zip(self.padding, self.extent, strict=True))
        own = self._summed().weight if self.terms else self.weight
        weight = own.flip(tuple(range(2, own.dim()))).contiguous()
        shared = {name: getattr(self, name) for name in ("bias", "dilation", "groups", "gain")}
        return {"weight": weight, "padding": padding, **shared}

    # Combined with other operators.

    def scaled(self, factor: float) -> Self:
        """``factor * self(x)``."""
        return self.then(ChannelAffine.uniform(factor, device=self.weight.device))

    def then(self, norm: ChannelAffine) -> Self:
        """``s (W*x + b) + t = (sW)*x + (sb + t)``, exact for every padding, stride, dilation and group count.

        Raises:
            AlgebraError: The scale is along another axis, or broadcasts to more channels.
        """
        scale, shift = norm.on(self.out_channels, self.axis, self.weight.device)
        bias = add(None if self.bias is None else scale * self.bias, shift)
        return replace(self, gain=scale if self.gain is None else scale * self.gain, bias=bias)


@dataclass(frozen=True, eq=False)
class Conv(Weighted):
    """``W * x + b``: cross-correlation. Output ``o`` reads input ``stride * o + dilation * j - before``.

    Attributes:
        padding: Negative amounts crop.
        padding_mode: What the padding reads: ``zeros``, ``reflect``, ``replicate`` or ``circular``.

    Raises:
        AlgebraError: One axis is cropped on one side and reflected, replicated or wrapped on the other, where
            it matters which of the two comes first.
    """

    padding_mode: str = ZEROS
    name: ClassVar[str] = "conv"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not any(before > 0 or after > 0 for before, after in self.padding):
            object.__setattr__(self, "padding_mode", ZEROS)
        if self.padding_mode != ZEROS and any(min(pair) < 0 < max(pair) for pair in self.padding):
            raise AlgebraError(f"a crop beside {self.padding_mode} padding")

    def __str__(self) -> str:
        """``conv2d[3 -> 8, 3x3, pad 1]``, ``linear[3 -> 5, bias]``."""
        if self.dimensions == 0:
            return f"linear[{self.in_channels} -> {self.out_channels}{', bias' * (self.bias is not None)}]"
        return self._text("conv", "pad", self.padding_mode)

    def shapes(self, rank: int | None) -> list[Ints]:
        """One for every phase of the stride, up to three."""
        if self.dimensions == 0:
            return [(*range(2, 1 + (rank or 2)), self.in_channels)]
        least = [
            max(extent + 1 - min(0, pad[0]) - min(0, pad[1]), *pad) + 2 * stride + 1 + axis
            for axis, (extent, pad, stride) in enumerate(zip(self.extent, self.padding, self.stride, strict=True))
        ]
        phases = min(max(self.stride), 3)
        return [(1, self.in_channels, *(size + phase for size in least)) for phase in range(phases)]

    def as_layer(self) -> AnyConv:
        """The operator as torch's layers have it: one that crops is a transposed one, where that adds no taps."""
        return self.as_transposed() if self._is_transposed_layer else self

    @property
    def _is_transposed_layer(self) -> bool:
        if self.padding_mode != ZEROS or any(s != 1 for s in self.stride) or self.layer_padding is not None:
            return False
        crops = [(e - before, e - after) for (before, after), e in zip(self.padding, self.extent, strict=True)]
        return all(b >= 0 and 0 <= b - a < d for (b, a), d in zip(crops, self.dilation, strict=True))

    @property
    def layer_padding(self) -> Any:
        """The ``padding`` argument with which a layer pads like this; None when a padding has to go before it."""
        if self.has_plain_padding:
            return tuple(before for before, _ in self.padding)
        same = all(
            stride == 1 and pad == (extent // 2, extent - extent // 2)
            for stride, pad, extent in zip(self.stride, self.padding, self.extent, strict=True)
        )
        return "same" if same else None

    @property
    def padding_before(self) -> Pad | None:
        """The padding that has to go before its layer, which cannot have it itself."""
        has_own = self.layer_padding is not None or self._is_transposed_layer
        return None if has_own else Pad(self.padding, self.padding_mode)

    @property
    def is_pointwise(self) -> bool:
        """One tap that reads its own position: no kernel, no padding, no stride."""
        return self.keeps_size and all(k == 1 for k in self.kernel_size) and not any(map(any, self.padding))

    @property
    def keeps_size(self) -> bool:
        """Whether the output is as large as the input, for every input."""
        return all(s == 1 for s in self.stride) and all(g == 0 for g in self.growth)

    @property
    def pads(self) -> bool:
        """Whether any output reads the padding."""
        return any(before > 0 or after > 0 for before, after in self.padding)

    @property
    def has_plain_padding(self) -> bool:
        """Whether the padding is the same on both sides of every axis, and none crops."""
        return all(before == after >= 0 for before, after in self.padding)

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds for one output position, over all output channels."""
        return self.weight.numel()

    def __call__(self, x: Tensor) -> Tensor:
        """``W * x + b``, in the precision of ``x``."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self.dimensions == 0:
            # A grouped matrix product exists only on the way to a dense one.
            return F.linear(x, self.regroup(1).kernel.to(x.dtype), bias)
        x = padded(x, self.padding, self.padding_mode)
        convolve = _CONVOLVE[self.dimensions]
        return convolve(x, self.kernel.to(x.dtype), bias, self.stride, 0, self.dilation, self.groups)

    def widen(self, taps: Padding) -> Conv:
        """The same operator with ``(before, after)`` more taps of weight zero on the two sides of every axis.

        Raises:
            AlgebraError: The padding is not of zeros, and might not reach that far in a small input.
        """
        if self.padding_mode != ZEROS:
            raise AlgebraError(f"a kernel with {self.padding_mode} padding cannot grow")
        return super().widen(taps)

    def adjoint(self) -> ConvTranspose:
        """The transposed convolution that writes where this one reads, without a bias.

        Raises:
            AlgebraError: The padding is not of zeros.
        """
        if self.padding_mode != ZEROS:
            raise AlgebraError(f"the convolution has {self.padding_mode} padding")
        weight = _exchange(self.kernel, self.groups)
        return ConvTranspose(weight, None, self.stride, self.padding, self.dilation, self.groups)

    def as_transposed(self) -> ConvTranspose:
        """The same operator as a transposed convolution.

        Raises:
            AlgebraError: It has a stride, or its padding is not of zeros.
        """
        if self.padding_mode != ZEROS:
            raise AlgebraError(f"the convolution has {self.padding_mode} padding")
        return ConvTranspose(**self._flipped())

    def _adjoint_conv(self) -> Conv:
        """:meth:`adjoint` as a convolution, which it is at stride 1."""
        if self.padding_mode != ZEROS:
            raise AlgebraError(f"the convolution has {self.padding_mode} padding")
        flipped = Conv(**self._flipped())
        return replace(flipped, weight=_exchange(flipped.kernel, self.groups), bias=None, gain=None)

    def after(self, inner: Operator, *, outline: bool = False) -> AnyConv:
        """``self(inner(x))`` as one convolution.

        Args:
            inner: What comes first; a pool is taken as the depthwise convolution that it is.
            outline: Leave the kernel of a convolution of a convolution zero, which shows at no cost what it would be.

        Raises:
            AlgebraError: It is not one; see the cases.
        """
        match inner:
            case ConvTranspose():
                return self._after_transposed(inner, outline)
            case ChannelAffine():
                return self._after_affine(inner)
            case Pad():
                return self._after_pad(inner)
            case Conv():
                return self._after_conv(inner, outline)
            case _:
                return self._after_conv(as_conv(inner, self.in_channels, self.dimensions, self.device), outline)

    def then_crop(self, crop: Pad) -> Conv:
        """``crop(self(x))``: a convolution that leaves out its first and last outputs, by padding less.

        Raises:
            AlgebraError: It pads instead, or the two conflict; see :class:`Conv`.
        """
        if crop.pads:
            raise AlgebraError("the output is padded")
        amounts = crop.on(self.dimensions)
        padding = tuple(
            (own[0] + s * more[0], own[1] + s * more[1])
            for own, more, s in zip(self.padding, amounts, self.stride, strict=True)
        )
        if self.pads and self.padding_mode != ZEROS and padding != self.padding:
            raise AlgebraError(f"a crop of a {self.padding_mode}-padded output")
        # The terms of a sum lie where their own padding puts them.
        return replace(self._summed() if self.terms else self, padding=padding)

    def then_border(self, pad: Pad) -> Conv:
        """``W*x + b`` with b written around it, ``W *_p x + b``: where a kernel reads nothing but zeros, b is left.

        Exact when the first output before the present ones, and the first after them, already read no input: when
        ``before > extent - stride`` and ``after >= extent``, as for a single tap without a crop.

        Args:
            pad: How wide the border is; its own value is not looked at.

        Raises:
            AlgebraError: Some taps would read the input there, or something else than zeros; or the border is a crop.
        """
        if self.padding_mode != ZEROS:
            raise AlgebraError(f"the convolution has {self.padding_mode} padding")
        padding = []
        axes = zip(self.padding, pad.on(self.dimensions), self.stride, self.extent, strict=True)
        for (before, after), (first, last), stride, extent in axes:
            if min(first, last) < 0 or (first and before <= extent - stride) or (last and after < extent):
                raise AlgebraError("what lies around the output is not its bias")
            padding.append((before + stride * first, after + stride * last))
        return replace(self._summed() if self.terms else self, padding=tuple(padding))

    def _after_affine(self, norm: ChannelAffine) -> Conv:
        """``W*(sx + t) + b = (Ws)*x + (b + W·t)``, exact when t = 0 or nothing reads zeros that were padded.

        The padding pads *after* the shift, so at the border the sum W·t has fewer terms. Reflected, replicated
        and wrapped values have the shift in them, and are no obstacle.
        """
        refuse_expansion(norm)
        scale, shift = norm.on(self.in_channels, self.axis, self.weight.device)
        if self.pads and self.padding_mode == ZEROS and shift is not None and bool(shift.any()):
            raise AlgebraError("shift before zero padding")
        kernel = self.kernel
        constant = None if shift is None else (kernel * self._rows(shift)).flatten(1).sum(1)
        return replace(self, weight=kernel * self._rows(scale), bias=add(self.bias, constant), gain=None, terms=())

    def _after_pad(self, pad: Pad) -> Conv:
        """A padding before a convolution is the convolution's own, when both pad the same way."""
        amounts = pad.on(self.dimensions)
        if pad.pads and pad.mode == ZEROS and pad.value != 0:
            raise AlgebraError(f"the padding is of {pad.value}, not of zeros")
        if pad.pads and self.pads and (pad.mode, self.padding_mode) != (ZEROS, ZEROS):
            raise AlgebraError(f"{self.padding_mode} padding of a {pad.mode}-padded input")
        if any(o[side] > 0 > i[side] for o, i in zip(self.padding, amounts, strict=True) for side in (0, 1)):
            # Padding would stand where the input had values.
            raise AlgebraError("the padding covers what was cropped")
        padding = tuple((o[0] + i[0], o[1] + i[1]) for o, i in zip(self.padding, amounts, strict=True))
        whole = self._summed() if self.terms else self
        return replace(whole, padding=padding, padding_mode=pad.mode if pad.pads else self.padding_mode)

    def _after_conv(self, inner: Conv, outline: bool) -> Conv:
        """``W2*(W1*x + b1) + b2 = (W2*W1)*x + (W2·b1 + b2)``.

        Exact when the outer convolution does not pad: its padding would pad the inner one's *output*. Along an
        axis where the inner one reads a single position, padding stays padding and may pass (a 1x3 before a 3x1
        kernel); so may a bias when the border is reflected, replicated or wrapped.
        """
        _check_sequence(self, inner)
        return self._product(inner, outline)

    def _product(self, inner: Conv, outline: bool) -> Conv:
        """The convolution that ``self(inner(x))`` is away from the border."""
        groups = math.gcd(self.groups, inner.groups)
        # Taps of the composition: inner offset + inner stride * outer offset.
        shifted = [taps.stretched(s) for s, taps in zip(inner.stride, self._lattices, strict=True)]
        lattice = [sum_lattice(i, o) for i, o in zip(inner._lattices, shifted, strict=True)]
        growth = [i + s * o for i, s, o in zip(inner.growth, inner.stride, self.growth, strict=True)]
        return Conv(
            *self._product_numbers(inner, groups, lattice, shifted, outline),
            tuple(s * t for s, t in zip(self.stride, inner.stride, strict=True)),
            tuple(taps.padding(g) for taps, g in zip(lattice, growth, strict=True)),
            tuple(taps.step for taps in lattice),
            groups,
            self.padding_mode if self.pads else inner.padding_mode,
        )

    def _product_numbers(
        self, inner: Conv, groups: int, lattice: Sequence[Lattice], shifted: Sequence[Lattice], outline: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of ``self(inner(x))`` in ``groups`` groups, its taps on ``lattice``."""
        rows, middle, columns = (n // groups for n in (self.out_channels, self.in_channels, inner.in_channels))
        if outline:
            shape = (self.out_channels, columns, *(taps.count for taps in lattice))
            return unfilled(shape, self.bias is not None or inner.bias is not None)
        outer_kernel, inner_kernel = self.regroup(groups).double(), inner.regroup(groups).double()
        # A tap of the outer kernel shifts a copy of the inner one; channels and groups go through one product.
        outer_taps = outer_kernel.weight.reshape(groups, rows, middle, -1)
        inner_taps = inner_kernel.weight.reshape(groups, middle, columns, *inner.kernel_size)
        weight = outer_taps.new_zeros(groups, rows, columns, *(taps.count for taps in lattice))
        for tap, matrix in zip(itertools.product(*map(range, self.kernel_size)), outer_taps.unbind(-1), strict=True):
            place = [i.moved(o.first + o.step * j) for j, i, o in zip(tap, inner._lattices, shifted, strict=True)]
            weight[within(place, lattice)] += torch.einsum("goi,gi...->go...", matrix, inner_taps)
        constant = None
        if inner.bias is not None:
            constant = torch.einsum("goi,gi->go", outer_taps.sum(-1), inner.bias.reshape(groups, middle)).flatten()
        return weight.flatten(0, 1), add(self.bias, constant)

    def _after_transposed(self, inner: ConvTranspose, outline: bool) -> ConvTranspose:
        """Exact when this one has no stride, and pads with zeros, if at all, only where nothing was cropped."""
        obstacle = "its zero padding covers what the transposed convolution crops"
        return _compose_transposed(self, inner, obstacle, outline)


@dataclass(frozen=True, eq=False)
class ConvTranspose(Weighted):
    """``W' x + b``: input ``i`` adds to output ``stride * i + dilation * j - before``, through every tap ``j``.

    The layout of the weight is that of a convolution, with the output channels first; torch's layers have it the
    other way round, see :meth:`of_torch` and :attr:`torch_weight`.

    Attributes:
        padding: What is cropped from the output, ``(before, after)`` an axis. A geometry that torch's layers lack
            gets taps of weight zero, until ``0 <= before - after < max(stride, dilation)``: ``before`` is then the
            layer's padding, and the difference its output padding.
    """

    name: ClassVar[str] = "conv_transpose"

    def __post_init__(self) -> None:
        super().__post_init__()
        taps = tuple(map(_missing_taps, self.padding, self.stride, self.dilation))
        if any(map(any, taps)):
            wide = self.widen(taps)
            object.__setattr__(self, "weight", wide.weight)
            object.__setattr__(self, "padding", wide.padding)

    @staticmethod
    def of_torch(
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Ints = (),
        padding: Ints = (),
        output_padding: Ints = (),
        groups: int = 1,
        dilation: Ints = (),
    ) -> ConvTranspose:
        """From what torch's own functions take; ``weight`` has the shape (in_channels, out_channels // groups, ...)."""
        nothing = (0,) * (weight.dim() - 2)
        crops = tuple((p, p - more) for p, more in zip(padding or nothing, output_padding or nothing, strict=True))
        return ConvTranspose(_exchange(weight.detach(), groups), bias, stride, crops, dilation, groups)

    def __str__(self) -> str:
        """``convtranspose2d[3 -> 8, 2x2, stride 2]``."""
        return self._text("convtranspose", "crop")

    def shapes(self, rank: int | None) -> list[Ints]:
        """The smallest, and one in which an output is far from both borders."""
        axes = list(zip(self.growth, self.extent, self.stride, strict=True))
        least = [1 + max(0, -(-growth // stride)) for growth, _, stride in axes]
        roomy = [
            n + 2 * (extent // stride + 1) + axis
            for axis, (n, (_, extent, stride)) in enumerate(zip(least, axes, strict=True))
        ]
        return [(1, self.in_channels, *sizes) for sizes in (least, roomy)]

    @property
    def torch_weight(self) -> Tensor:
        """The kernel as torch's layers have it: shape ``(in_channels, out_channels // groups, *kernel_size)``."""
        return _exchange(self.kernel, self.groups)

    @property
    def output_padding(self) -> Ints:
        """The argument of torch's layers of that name; ``before`` of :attr:`padding` is their padding."""
        return tuple(before - after for before, after in self.padding)

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds for one output position, over all output channels; rounded up."""
        return -(-self.weight.numel() // math.prod(self.stride))

    def __call__(self, x: Tensor) -> Tensor:
        """``W' x + b``, in the precision of ``x``."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        weight, padding = self.torch_weight.to(x.dtype), tuple(before for before, _ in self.padding)
        spread = _SPREAD[self.dimensions]
        return spread(x, weight, bias, self.stride, padding, self.output_padding, self.groups, self.dilation)

    def adjoint(self) -> Conv:
        """The convolution that reads where this one writes, without a bias."""
        return Conv(self.torch_weight, None, self.stride, self.padding, self.dilation, self.groups)

    _adjoint_conv = adjoint

    def as_conv(self) -> Conv:
        """The same operator as a convolution.

        Raises:
            AlgebraError: It has a stride.
        """
        return Conv(**self._flipped())

    def after(self, inner: Operator, *, outline: bool = False) -> ConvTranspose:
        """``self(inner(x))`` as one transposed convolution.

        Args:
            inner: What comes first; a pool is taken as the depthwise convolution that it is.
            outline: As for :meth:`Conv.after`. No shift passes then, since whether one does depends on the numbers.

        Raises:
            AlgebraError: It is not one; see the cases.
        """
        shift = inner.shift if isinstance(inner, ChannelAffine) else inner.bias if isinstance(inner, AnyConv) else None
        if outline and shift is not None and bool(shift.any()):
            raise AlgebraError("shift before a transposed convolution")
        match inner:
            case ChannelAffine():
                return self._after_affine(inner)
            case Conv():
                return self._after_conv(inner, outline)
            case ConvTranspose():
                return self._after_transposed(inner, outline)
            case Pad():
                raise AlgebraError("a padding before a transposed convolution")
            case _:
                return self._after_conv(as_conv(inner, self.in_channels, self.dimensions, self.device), outline)

    def _after_affine(self, norm: ChannelAffine) -> ConvTranspose:
        """``W'(sx + t) + b = (Ws)'x + (b + W't)``, exact when every output receives the same amount of t."""
        refuse_expansion(norm)
        scale, shift = norm.on(self.in_channels, self.axis, self.weight.device)
        constant = None if shift is None else self._of_constant(shift)
        kernel = self.kernel * self._rows(scale)
        return replace(self, weight=kernel, bias=add(self.bias, constant), gain=None, terms=())

    def _after_conv(self, inner: Conv, outline: bool) -> ConvTranspose:
        """Exact when the convolution has no stride, and what its output lacks at the border would not be written.

        That is so when it is pointwise, or this one's writes do not overlap (2x2, stride 2), or it pads all it can.
        """
        return _compose_transposed(self, inner, "the convolution before it ends where one kernel would go on", outline)

    def _after_transposed(self, inner: ConvTranspose, outline: bool) -> ConvTranspose:
        """Exact when the inner one crops nothing, or this one's writes do not overlap."""
        obstacle = "the first transposed convolution crops what one kernel would spread"
        return _compose_transposed(self, inner, obstacle, outline)

    def _of_constant(self, shift: Tensor) -> Tensor | None:
        """What a constant input adds to every output. Shape ``(out_channels,)``.

        Outputs differ in the taps that reach them: by their phase in the stride, and at the borders. An output sees
        at most ``reach`` inputs of an axis, so inputs of up to ``2 reach + 1`` have every kind of output.

        Raises:
            AlgebraError: It does not add the same everywhere.
        """
        taps = (self.kernel * self._rows(shift)).sum(1, keepdim=True)
        if not bool(taps.any()):
            return None
        spread = replace(self, weight=taps, bias=None, gain=None, groups=self.out_channels)
        reach = [extent // stride + 1 for extent, stride in zip(self.extent, self.stride, strict=True)]
        constant: Tensor | None = None
        for sizes in itertools.product(*(range(1, 2 * r + 2) for r in reach)):
            if any(s * (n - 1) + 1 <= g for s, n, g in zip(self.stride, sizes, self.growth, strict=True)):
                continue
            outputs = spread(taps.new_ones(1, self.out_channels, *sizes)).flatten(2).squeeze(0)
            constant = outputs[:, 0] if constant is None else constant
            if not torch.allclose(outputs, constant[:, None], rtol=0, atol=_ROUNDING * taps.abs().max().item()):
                raise AlgebraError("shift before a transposed convolution that does not spread it evenly")
        return constant


AnyConv: TypeAlias = Conv | ConvTranspose


def as_conv(operator: Operator, channels: int, dimensions: int, device: torch.device | None = None) -> Conv:
    """An operator without weights, on ``channels`` channels, as a convolution along ``dimensions`` axes.

    Raises:
        AlgebraError: It is none, or works on other channels.
    """
    return Conv(**operator.kernel_on(channels, dimensions, device))


def Linear(weight: Tensor, bias: Tensor | None = None) -> Conv:
    """``x @ W.T + b`` on the last axis: a convolution without space.

    Args:
        weight: Shape ``(out_features, in_features)``.
        bias: Shape ``(out_features,)`` or None.
    """
    return Conv(weight, bias)


def _axes_text(values: Ints) -> str:
    return str(values[0]) if len(set(values)) == 1 else "x".join(map(str, values))


def _exchange(weight: Tensor, groups: int) -> Tensor:
    """A weight with input and output channels exchanged inside each group; its own inverse."""
    rows = weight.shape[0] // groups
    return weight.reshape(groups, rows, *weight.shape[1:]).transpose(1, 2).flatten(0, 1)


def _missing_taps(crop: tuple[int, int], stride: int, dilation: int) -> tuple[int, int]:
    """Taps of weight zero, ``(before, after)``, with which torch's transposed layers can crop like that."""
    before, after = crop
    more_before = max(0, -(min(before, before - after) // dilation))
    slack = before + more_before * dilation - after - max(stride, dilation)
    return more_before, max(0, slack // dilation + 1)


def _compose_transposed(outer: AnyConv, inner: AnyConv, obstacle: str, outline: bool) -> ConvTranspose:
    """``outer(inner(x)) = (inner'(outer'(x)))'``, where ``f'`` reads where ``f`` writes; one may be a convolution.

    Seen as writing, the two are exact as one when the inner one crops nothing that it wrote, or the outer one would
    spread that to where it crops as well.

    Raises:
        AlgebraError: A convolution has a stride or reads other padding than zeros; or with ``obstacle``, when what
            was cropped matters.
    """
    _check_channels(outer, inner)
    first, second = outer._adjoint_conv(), inner._adjoint_conv()
    for axis, pair in enumerate(second.padding):
        least = first.extent[axis] - first.stride[axis] + 1
        if any(lost > 0 and crop < least for lost, crop in zip(pair, first.padding[axis], strict=True)):
            raise AlgebraError(obstacle)
    bias = outer.bias
    if inner.bias is not None:
        bias = outer.after(ChannelAffine(torch.ones_like(inner.bias), inner.bias, inner.axis)).bias
    return replace(second._product(first, outline).adjoint(), bias=bias)


def sum_of_kernels(convs: Sequence[Weighted], groups: int, lattice: Sequence[Lattice]) -> Tensor:
    """The kernels of some convolutions, over common groups and taps, added up in float64."""
    # The largest kernel usually has the common taps already, and the others are added into a copy of it.
    convs = sorted(convs, key=lambda conv: -conv.weight.numel() * (conv.groups == groups))
    first = convs[0].regroup(groups)
    weight = first._on(lattice).to(torch.float64, copy=True)
    if first.gain is not None:
        weight.mul_(first.gain.view(-1, *[1] * (weight.dim() - 1)))
    for conv in convs[1:]:
        weight[within(conv._lattices, lattice)] += conv.regroup(groups).kernel
    return weight


def unfilled(shape: Ints, bias: bool, device: torch.device | None = None) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a convolution that is not filled in: one zero, seen from everywhere."""
    zero = torch.zeros((), dtype=torch.float64, device=device)
    return zero.expand(shape), zero.expand(shape[:1]) if bias else None


def _wraps_on(outer: Conv, inner: Conv, axis: int) -> bool:
    """Whether ``outer`` wraps what ``inner`` made, wrapping, of as many positions: then the input wraps for both.

    The padding of both together may be no longer than any input of the two, around which torch wraps once at most.
    """
    (first, last), (before, after) = outer.padding[axis], inner.padding[axis]
    modes = {outer.padding_mode, inner.padding_mode}
    keeps_size = inner.stride[axis] == 1 and before + after == inner.extent[axis]
    if modes != {"circular"} or not keeps_size or min(first, last, before, after) < 0:
        return False
    smallest = max(first, last, before, after, outer.extent[axis] + 1 - first - last)
    return max(first + before, last + after) <= smallest


def _check_sequence(outer: Conv, inner: Conv) -> None:
    """Raise unless what lies beyond the output of ``inner`` is what ``outer`` pads it with."""
    _check_channels(outer, inner)
    axes = zip(outer.padding, inner.kernel_size, inner.padding, inner.stride, strict=True)
    for axis, (pair, taps, amounts, stride) in enumerate(axes):
        if max(pair) <= 0 or _wraps_on(outer, inner, axis):
            continue
        if taps != 1 or any(amounts):
            raise AlgebraError("the second convolution pads the first one's output")
        if outer.padding_mode != ZEROS and stride != 1:
            raise AlgebraError(f"{outer.padding_mode} padding of a strided output")
    if outer.pads and outer.padding_mode == ZEROS and inner.bias is not None and bool(inner.bias.any()):
        raise AlgebraError("bias before zero padding")
    # What the outer one crops of the inner one's padding, nobody reads.
    reads_both = any(
        before > 0 and before + s * crop > 0
        for pads, crops, s in zip(inner.padding, outer.padding, inner.stride, strict=True)
        for before, crop in zip(pads, crops, strict=True)
    )
    if outer.pads and reads_both and outer.padding_mode != inner.padding_mode:
        raise AlgebraError(f"{outer.padding_mode} padding of a {inner.padding_mode}-padded output")


def _check_channels(outer: Weighted, inner: Weighted) -> None:
    """Raise unless one reads what the other makes."""
    if inner.dimensions != outer.dimensions:
        raise AlgebraError(f"a {inner.dimensions}-d before a {outer.dimensions}-d convolution")
    if inner.out_channels != outer.in_channels:
        raise AlgebraError(f"{inner.out_channels} channels are broadcast to {outer.in_channels}")

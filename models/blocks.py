"""Training-time blocks that compute one convolution, each from its paper's formula.

>>> from reparam.models import blocks
>>> block = blocks.MobileOneBlock(16, 32, kernel_size=3, stride=2, branches=4)

A block takes the arguments of ``nn.Conv2d`` and can stand wherever that convolution could: it has the same output
size on every input. None of them knows how to fuse itself; ``reparam.compile`` turns each into the convolution that it
is. What follows a block in its network (an activation, squeeze-and-excitation) is left to the network.

In the formulas ``*`` is convolution, ``W`` has the block's kernel size and ``W1`` is 1x1, ``N`` is a batch norm, and
every layer has parameters of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reparam.errors import ModelError
from reparam.models.registry import Known
from reparam.models.repvit import TokenMixer

Pair: TypeAlias = tuple[int, int]
Size: TypeAlias = "int | tuple[int, int]"


class Builder(Protocol):
    """Anything that makes a module with the geometry of an ``nn.Conv2d``: a block's class, or a function."""

    def __call__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        *,
        stride: Pair,
        padding: Pair,
        dilation: Pair,
        groups: int,
    ) -> nn.Module:
        """The module; raises ModelError when there is none of this geometry."""


BuilderT = TypeVar("BuilderT", bound=Callable[..., nn.Module])
_BLOCKS: Known[Callable[..., nn.Module]] = Known("block")


def register(name: str) -> Callable[[BuilderT], BuilderT]:
    """Decorate a :class:`Builder` to make it known under ``name``.

    Raises:
        ModelError: If the name is taken.
    """

    def decorate(build: BuilderT) -> BuilderT:
        _BLOCKS.add(name, build)
        return build

    return decorate


def names() -> list[str]:
    """List every known block."""
    return list(_BLOCKS)


def builder(name: str) -> Builder:
    """Look a block up by name.

    Raises:
        ModelError: If there is none; the message lists the names that look like it.
    """
    return _BLOCKS.find(name)


# What the blocks are made of.


def _pair(size: Size) -> Pair:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


@dataclass(frozen=True)
class Geometry:
    """What a convolution is besides its numbers; everything spatial is (height, width)."""

    in_channels: int
    out_channels: int
    kernel_size: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int

    @classmethod
    def of(
        cls,
        in_channels: int,
        out_channels: int,
        kernel_size: Size = 3,
        stride: Size = 1,
        padding: Size | None = None,
        dilation: Size = 1,
        groups: int = 1,
    ) -> Geometry:
        """The geometry of ``nn.Conv2d`` with these arguments; padding keeps the size unless it is given.

        Raises:
            ModelError: If there is no such convolution.
        """
        kernel_size, stride, dilation = _pair(kernel_size), _pair(stride), _pair(dilation)
        if min(in_channels, out_channels, groups, *kernel_size, *stride, *dilation) < 1:
            raise ModelError(
                f"channels ({in_channels} to {out_channels}), kernel size {kernel_size}, stride {stride}, "
                f"dilation {dilation} and groups ({groups}) must be at least 1"
            )
        if in_channels % groups or out_channels % groups:
            raise ModelError(f"{groups} groups do not divide {in_channels} input and {out_channels} output channels")
        if padding is None:
            if any(d * (k - 1) % 2 for d, k in zip(dilation, kernel_size, strict=True)):
                raise ModelError(f"no padding keeps the size for a kernel of {kernel_size}: give the padding")
            padding = (dilation[0] * (kernel_size[0] - 1) // 2, dilation[1] * (kernel_size[1] - 1) // 2)
        padding = _pair(padding)
        if min(padding) < 0:
            raise ModelError(f"padding {padding} is negative")
        return cls(in_channels, out_channels, kernel_size, stride, padding, dilation, groups)

    @property
    def keeps_shape(self) -> bool:
        """Whether a tap of this kernel reads every output's own position and channel: then there is an identity."""
        axes = zip(self.kernel_size, self.stride, self.padding, self.dilation, strict=True)
        centred = all(s == 1 and 2 * p == d * (k - 1) and p % d == 0 for k, s, p, d in axes)
        return centred and self.in_channels == self.out_channels

    def conv(self, kernel_size: Size, rate: int = 1, bias: bool = False) -> nn.Module:
        """A convolution with the same output size, whose taps are among this kernel's, at its centre.

        Args:
            kernel_size: Taps, at most as many as fit.
            rate: Reads every ``rate``-th of this kernel's taps.
            bias: Whether it has one.
        """
        taps = _pair(kernel_size)
        before, after, dilation = [], [], []
        for k, wide, p, d in zip(taps, self.kernel_size, self.padding, self.dilation, strict=True):
            spare = wide - 1 - rate * (k - 1)
            if spare < 0:
                raise ModelError(
                    f"{taps} taps, every {rate}th of a row, do not fit into a kernel of {self.kernel_size}"
                )
            before.append(p - d * (spare // 2))
            after.append(p - d * (spare - spare // 2))
            dilation.append(d * rate)
        own = before == after and min(before) >= 0
        conv = nn.Conv2d(
            self.in_channels,
            self.out_channels,
            taps,
            self.stride,
            (before[0], before[1]) if own else 0,
            (dilation[0], dilation[1]),
            self.groups,
            bias,
        )
        # Off centre, or beside a convolution that pads less than its smaller branches would have to crop.
        return conv if own else nn.Sequential(nn.ZeroPad2d((before[1], after[1], before[0], after[0])), conv)

    def branch(self, kernel_size: Size, rate: int = 1) -> nn.Sequential:
        """``N(W*x)``; arguments as for :meth:`conv`."""
        return nn.Sequential(self.conv(kernel_size, rate), nn.BatchNorm2d(self.out_channels))

    def point(self, channels: int, bias: bool = False) -> nn.Conv2d:
        """``pad(W1*x) + b``: a 1x1 convolution at every position that the kernel reads, also of the padding."""
        return nn.Conv2d(self.in_channels, channels, 1, padding=self.padding, groups=self.groups, bias=bias)

    def unpadded(self, in_channels: int) -> nn.Conv2d:
        """``W*x`` without bias, on an input that is padded already."""
        k, s, d = self.kernel_size, self.stride, self.dilation
        return nn.Conv2d(in_channels, self.out_channels, k, s, 0, d, self.groups, bias=False)


class Block(nn.Module):
    """A module with the geometry of an ``nn.Conv2d``.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Taps, a number or (height, width). Likewise ``stride``, ``padding`` and ``dilation``.
        stride: Distance between the windows.
        padding: Zeros around the input; what keeps the size at stride 1 when left out.
        dilation: Distance between the taps.
        groups: Blocks of channels that do not mix.

    Shape:
        ``(N, in_channels, H, W)`` floating point to ``(N, out_channels, H', W')`` like ``nn.Conv2d``.

    Raises:
        ModelError: If there is no such convolution, or no such block for it.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size = 3,
        stride: Size = 1,
        padding: Size | None = None,
        dilation: Size = 1,
        groups: int = 1,
    ) -> None:
        super().__init__()
        self.geometry = Geometry.of(in_channels, out_channels, kernel_size, stride, padding, dilation, groups)


class ParallelBlock(Block):
    """A block whose output is the sum of its branches; one without a branch of its own is a plain convolution.

    Arguments, shapes and errors of :class:`Block`.
    """

    def __init__(self, *shape: Any, **geometry: Any) -> None:
        super().__init__(*shape, **geometry)
        self.branches = nn.ModuleList()

    def forward(self, x: Tensor) -> Tensor:
        """``(N, in_channels, H, W)`` to ``(N, out_channels, H', W')``."""
        return _total(x, self.branches)


def _total(x: Tensor, branches: Iterable[nn.Module]) -> Tensor:
    first, *others = branches
    total: Tensor = first(x)
    for branch in others:
        total = total + branch(x)
    return total


def _identity_norm(geometry: Geometry) -> list[nn.Module]:
    """``N(x)`` where the convolution has an identity."""
    return [nn.BatchNorm2d(geometry.in_channels)] if geometry.keeps_shape else []


# Parallel branches.


@register("repvgg")
class RepVGGBlock(ParallelBlock):
    """``N(W*x) + N(W1*x) + N(x)``, the last where input and output have the same shape.

    Xiaohan Ding, Xiangyu Zhang, Ningning Ma, Jungong Han, Guiguang Ding, Jian Sun. *RepVGG: Making VGG-style ConvNets
    Great Again.* CVPR 2021, arXiv:2101.03697, section 3.3.

    Arguments, shapes and errors of :class:`Block`.
    """

    def __init__(self, *shape: Any, **geometry: Any) -> None:
        super().__init__(*shape, **geometry)
        g = self.geometry
        self.branches.extend([g.branch(g.kernel_size), g.branch(1), *_identity_norm(g)])


@register("qarepvgg")
class QARepVGGBlock(Block):
    """``N(N(W*x) + W1*x + x)``: no norm on the small branches, one after the sum.

    Xiangxiang Chu, Liang Li, Bo Zhang. *Make RepVGG Greater Again: A Quantization-aware Approach.* AAAI 2024,
    arXiv:2212.01593, section 4. The kernels of such a block spread less, and survive quantisation to 8 bits.

    Arguments, shapes and errors of :class:`Block`.
    """

    def __init__(self, *shape: Any, **geometry: Any) -> None:
        super().__init__(*shape, **geometry)
        g = self.geometry
        identity = [nn.Identity()] if g.keeps_shape else []
        self.branches = nn.ModuleList([g.branch(g.kernel_size), g.conv(1), *identity])
        self.norm = nn.BatchNorm2d(g.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, in_channels, H, W)`` to ``(N, out_channels, H', W')``."""
        normed: Tensor = self.norm(_total(x, self.branches))
        return normed


@register("mobileone")
class MobileOneBlock(ParallelBlock):
    """``N_1(W_1*x) + ... + N_k(W_k*x) + N(W1*x) + N(x)``: k kernels of one size, a scale branch, a skip branch.

    Pavan Kumar Anasosalu Vasu, James Gabriel, Jeff Zhu, Oncel Tuzel, Anurag Ranjan. *MobileOne: An Improved One
    millisecond Mobile Backbone.* CVPR 2023, arXiv:2206.04040, section 3.3. The scale branch is there for kernels
    larger than 1x1, the skip branch where input and output have the same shape.

    Arguments, shapes and errors of :class:`Block`, and:

    Args:
        branches: How many kernels of full size, k in the paper; at least 1.
    """

    def __init__(self, *shape: Any, branches: int = 4, **geometry: Any) -> None:
        super().__init__(*shape, **geometry)
        if branches < 1:
            raise ModelError(f"branches is {branches}, but a MobileOne block has at least one kernel of full size")
        g = self.geometry
        self.branches.extend(g.branch(g.kernel_size) for _ in range(branches))
        if g.kernel_size != (1, 1):
            self.branches.append(g.branch(1))
        self.branches.extend(_identity_norm(g))


@register("acnet")
class AsymmetricBlock(ParallelBlock):
    """``N(W*x) + N(W_{1 x k}*x) + N(W_{k x 1}*x)``: a kernel and its skeleton.

    Xiaohan Ding, Yuchen Guo, Guiguang Ding, Jungong Han. *ACNet: Strengthening the Kernel Skeletons for Powerful CNN
    via Asymmetric Convolution Blocks.* ICCV 2019, arXiv:1908.03930, section 3.2.

    Arguments, shapes and errors of :class:`Block`.
    """

    def __init__(self, *shape: Any, **geometry: Any) -> None:
        super().__init__(*shape, **geometry)
        g = self.geometry
        height, width = g.kernel_size
        self.branches.extend([g.branch((height, width)), g.branch((1, width)), g.branch((height, 1))])


@register("replk")
class RepLKBlock(ParallelBlock):
    """``N(W*x) + N(W_small*x)``: a very large kernel, depthwise unless told otherwise, and a small one beside it.

    Xiaohan Ding, Xiangyu Zhang, Yizhuang Zhou, Jungong Han, Guiguang Ding, Jian Sun. *Scaling Up Your Kernels to 31x31:
    Revisiting Large Kernel Design in CNNs.* CVPR 2022, arXiv:2203.06717, section 3 (guideline 3).

    Arguments, shapes and errors of :class:`Block`, and:

    Args:
        groups: The greatest common divisor of the channels when left out.
        small_kernel: Taps of the small kernel on both axes; less than ``kernel_size``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size = 31,
        *shape: Any,
        groups: int | None = None,
        small_kernel: int = 5,
        **geometry: Any,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            *shape,
            groups=_depthwise(groups, in_channels, out_channels),
            **geometry,
        )
        g = self.geometry
        if not 1 <= small_kernel < min(g.kernel_size):
            raise ModelError(
                f"small_kernel is {small_kernel}, but must be at least 1 and less than the kernel, which is "
                f"{g.kernel_size}"
            )
        self.branches.extend([g.branch(g.kernel_size), g.branch(small_kernel)])


def _depthwise(groups: int | None, in_channels: int, out_channels: int) -> int:
    return math.gcd(in_channels, out_channels) if groups is None else groups


# (taps, dilation) of the branches for each large kernel: UniRepLKNet, appendix and released models.
_DILATED = {
    5: ((3, 1), (3, 2)),
    7: ((5, 1), (3, 2), (3, 3)),
    9: ((5, 1), (5, 2), (3, 3), (3, 4)),
    11: ((5, 1), (5, 2), (3, 3), (3, 4), (3, 5)),
    13: ((5, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    15: ((5, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    17: ((5, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
}


@register("dilated")
class DilatedBlock(ParallelBlock):
    """``N(W*x) + Σ N(W_{k, r}*x)``: a large kernel, depthwise unless told otherwise, and dilated small ones within.

    Xiaohan Ding, Yiyuan Zhang, Yixiao Ge, Sijie Zhao, Lin Song, Xiangyu Yue, Ying Shan. *UniRepLKNet: A Universal
    Perception Large-Kernel ConvNet for Audio, Video, Point Cloud, Time-Series and Image Recognition.* CVPR 2024,
    arXiv:2311.15599, section 3.1. A branch of k taps at dilation r is a kernel of r(k - 1) + 1 taps with zeros.

    Arguments, shapes and errors of :class:`Block`, and:

    Args:
        groups: The greatest common divisor of the channels when left out.
        branches: ``(taps, dilation)`` of every small kernel, in units of the large kernel's own dilation; those of
            the published models when left out, which are for square kernels of 5, 7, ..., 17.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size = 7,
        *shape: Any,
        groups: int | None = None,
        branches: Iterable[Pair] | None = None,
        **geometry: Any,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            *shape,
            groups=_depthwise(groups, in_channels, out_channels),
            **geometry,
        )
        g = self.geometry
        if branches is None:
            height, width = g.kernel_size
            if height != width or height not in _DILATED:
                raise ModelError(
                    f"there are no published dilated branches for a kernel of {g.kernel_size}, only for square ones of "
                    f"{', '.join(map(str, _DILATED))}: give branches=[(taps, dilation), ...]"
                )
            branches = _DILATED[height]
        self.branches.append(g.branch(g.kernel_size))
        self.branches.extend(g.branch(taps, rate) for taps, rate in branches)


# Sequences inside the branches.


@register("dbb")
class DiverseBranchBlock(ParallelBlock):
    """``N(W*x) + N(W1*x) + N(W * N(pad(W1*x))) + N(mean(N(pad(W1*x))))``: branches of different depth.

    Xiaohan Ding, Xiangyu Zhang, Jungong Han, Guiguang Ding. *Diverse Branch Block: Building a Convolution as an
    Inception-like Unit.* CVPR 2021, arXiv:2103.13425, section 3.3.

    The padding of an inner branch has to be what its norm makes of zero, or else the branch would not be a convolution
    at the border. That is ``N(pad(W1*x))``, before layers that do not pad, and ``pad(W1*x)`` is a padded 1x1; the
    norm's statistics then include the border. The 1x1 before a kernel starts as the identity, as in the paper.

    Arguments, shapes and errors of :class:`Block`; ``dilation`` must be 1, since a mean has none.
    """

    def __init__(self, *shape: Any, **geometry: Any) -> None:
        super().__init__(*shape, **geometry)
        g = self.geometry
        if g.dilation != (1, 1):
            raise ModelError(f"dilation is {g.dilation}, but the average pooling in a diverse branch block has none")
        norm = nn.BatchNorm2d
        identity = g.point(g.in_channels)
        nn.init.dirac_(identity.weight, g.groups)
        deep = [identity, norm(g.in_channels), g.unpadded(g.in_channels), norm(g.out_channels)]
        pool = nn.AvgPool2d(g.kernel_size, g.stride)
        mean = [g.point(g.out_channels), norm(g.out_channels), pool, norm(g.out_channels)]
        self.branches.extend([g.branch(g.kernel_size), g.branch(1), nn.Sequential(*deep), nn.Sequential(*mean)])


class _Edge(nn.Module):
    """``(s · D) * (pad(W1*x) + b)``: a fixed edge filter D on every channel, with a learned scale."""

    def __init__(self, geometry: Geometry, taps: Tensor) -> None:
        super().__init__()
        self.geometry = geometry
        self.point = geometry.point(geometry.out_channels, bias=True)
        self.scale = nn.Parameter(torch.randn(geometry.out_channels, 1, 1, 1) * 1e-3)
        self.filter: Tensor
        self.register_buffer("filter", taps)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, in_channels, H, W)`` to ``(N, out_channels, H', W')``."""
        g = self.geometry
        return F.conv2d(self.point(x), self.scale * self.filter, None, g.stride, 0, g.dilation, g.out_channels)


_SOBEL = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]])
_LAPLACE = torch.tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]])


@register("ecb")
class EdgeBlock(ParallelBlock):
    """``W*x + W*(W1*x) + (s·Dx)*(W1*x) + (s·Dy)*(W1*x) + (s·Dl)*(W1*x)``, all with biases: learned edge detection.

    Xindong Zhang, Hui Zeng, Lei Zhang. *Edge-oriented Convolution Block for Real-time Super Resolution on Mobile
    Devices.* ACM Multimedia 2021, doi:10.1145/3474085.3475291, section 3.2. Dx and Dy are Sobel's filters, Dl is
    Laplace's, s a learned scale a channel. The padding of each inner 1x1 is its bias. There are no norms.

    Arguments, shapes and errors of :class:`Block`, and:

    Args:
        expansion: Channels between the 1x1 and the 3x3, as a multiple of ``in_channels``; at least 1.

    Raises:
        ModelError: Also if the kernel is not 3x3, which is what edge filters are.
    """

    def __init__(self, *shape: Any, expansion: int = 2, **geometry: Any) -> None:
        super().__init__(*shape, **geometry)
        g = self.geometry
        if g.kernel_size != (3, 3):
            raise ModelError(
                f"the kernel is {g.kernel_size}, but edge filters are 3x3: an edge block replaces only those"
            )
        if expansion < 1:
            raise ModelError(f"expansion is {expansion}, but there must be channels between the two convolutions")
        hidden = expansion * g.in_channels
        self.branches.extend([g.conv(3, bias=True), nn.Sequential(g.point(hidden, bias=True), g.unpadded(hidden))])
        self.branches.extend(_Edge(g, taps.clone()) for taps in (_SOBEL, _SOBEL.T, _LAPLACE))


# A kernel computed from parameters.


@register("orepa")
class OREPABlock(Block):
    """``N(K*x)`` with ``K = Σ_b s_b·K_b``: the branches are summed as kernels, before anything sees an image.

    Mu Hu, Junyi Feng, Jiashen Hua, Baisheng Lai, Jianqiang Huang, Xiaojin Gong, Xian-Sheng Hua. *Online Convolutional
    Re-parameterization.* CVPR 2022, arXiv:2204.00826, section 3. Norms inside the branches become scales ``s_b`` of
    every output channel, so training pays for one convolution. The kernels are

    - ``W``, the plain one;
    - ``W1·δ``, ``W1·mean`` and ``W1·f``: a 1x1 alone, before an average and before a frequency filter. The filters are
      the cosines cos(π (i + 1)(y + ½) / k) of the rows y for the first half of the output channels i, and of the
      columns for the second;
    - ``W * (δ + W1)``, a 1x1 before a kernel;
    - ``W1 * W_depthwise``, a depthwise kernel with ``expansion`` channels for each of the input before a 1x1.

    Arguments, shapes and errors of :class:`Block`, and:

    Args:
        expansion: Depthwise channels for each input channel; at least 1.
    """

    # As the authors start them: W, W1·δ, W1·mean, W1·f, W*(δ + W1), W1 * W_depthwise.
    _SCALES = (0.25, 1.0, 0.25, 0.0, 0.5, 0.5)

    def __init__(self, *shape: Any, expansion: int = 8, **geometry: Any) -> None:
        super().__init__(*shape, **geometry)
        if expansion < 1:
            raise ModelError(f"expansion is {expansion}, but every input channel needs a depthwise kernel")
        g = self.geometry
        columns = g.in_channels // g.groups
        self.kernel = _fan_in(g.out_channels, columns, *g.kernel_size)
        self.point = _fan_in(3, g.out_channels, columns)
        self.inner = nn.Parameter(torch.zeros(g.groups, columns, columns))
        self.outer = _fan_in(g.out_channels, columns, *g.kernel_size)
        self.depthwise = _fan_in(g.groups, columns, expansion, *g.kernel_size)
        self.mix = _fan_in(g.groups, g.out_channels // g.groups, columns, expansion)
        self.scales = nn.Parameter(torch.tensor(self._SCALES).repeat(g.out_channels, 1).T.contiguous())
        self.patterns: Tensor
        self.register_buffer("patterns", _patterns(g), persistent=False)
        self.norm = nn.BatchNorm2d(g.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, in_channels, H, W)`` to ``(N, out_channels, H', W')``."""
        g = self.geometry
        normed: Tensor = self.norm(F.conv2d(x, self._kernel(), None, g.stride, g.padding, g.dilation, g.groups))
        return normed

    def _kernel(self) -> Tensor:
        """``(out_channels, in_channels // groups, *kernel_size)``."""
        grouped = self.outer.unflatten(0, (self.geometry.groups, -1))
        deep = grouped + torch.einsum("gomyx,gmi->goiyx", grouped, self.inner)
        separable = torch.einsum("goie,gieyx->goiyx", self.mix, self.depthwise)
        points = torch.einsum("boi,boyx->boiyx", self.point, self.patterns)
        kernels = torch.stack([self.kernel, *points, deep.flatten(0, 1), separable.flatten(0, 1)])
        return torch.einsum("bo,boiyx->oiyx", self.scales, kernels)


def _fan_in(*shape: int) -> nn.Parameter:
    """Uniform numbers of nn.Conv2d's own variance, 1 / (3 fan-in)."""
    parameter = nn.Parameter(torch.empty(shape))
    nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
    return parameter


def _patterns(geometry: Geometry) -> Tensor:
    """What OREPA's three 1x1 kernels are multiplied by, ``(3, out_channels, *kernel_size)``."""
    channels, (height, width) = geometry.out_channels, geometry.kernel_size
    centre = torch.zeros(channels, height, width)
    centre[:, height // 2, width // 2] = 1
    mean = torch.full_like(centre, 1 / (height * width))
    rows, columns = ((torch.arange(size) + 0.5) * math.pi / size for size in (height, width))
    half = (channels + 1) // 2
    frequency = torch.arange(half).view(-1, 1) + 1
    along = (frequency * rows).cos().unsqueeze(2).expand(half, height, width)
    across = (frequency * columns).cos().unsqueeze(1).expand(half, height, width)
    return torch.stack([centre, mean, torch.cat([along, across])[:channels]])


# Blocks that mix positions only.


def _mixer(name: str, geometry: Geometry) -> Geometry:
    """The geometry, if it is that of a depthwise convolution that keeps its input's shape.

    Raises:
        ModelError: If it is another.
    """
    if not geometry.keeps_shape or geometry.groups != geometry.in_channels:
        raise ModelError(
            f"{name} mixes positions only: it needs as many groups and output channels as input channels, stride 1, an "
            f"odd kernel and the padding that keeps the size; this is {geometry}"
        )
    return geometry


@register("repmixer")
class RepMixer(Block):
    """``x + g·(M(x) - N(x))``, M being a depthwise MobileOne block with one kernel and g a layer scale.

    Pavan Kumar Anasosalu Vasu, James Gabriel, Jeff Zhu, Oncel Tuzel, Anurag Ranjan. *FastViT: A Fast Hybrid Vision
    Transformer using Structural Reparameterization.* ICCV 2023, arXiv:2303.14189, section 3.2.1.

    Arguments, shapes and errors of :class:`Block`, and:

    Args:
        groups: Like both channels, which is the default.
        layer_scale: What g starts from. The authors' networks start from 1e-5, as the identity.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size = 3,
        *shape: Any,
        groups: int | None = None,
        layer_scale: float = 1.0,
        **geometry: Any,
    ) -> None:
        geometry["groups"] = in_channels if groups is None else groups
        super().__init__(in_channels, out_channels, kernel_size, *shape, **geometry)
        g = _mixer("a RepMixer", self.geometry)
        k, s, p, d = g.kernel_size, g.stride, g.padding, g.dilation
        self.mixer = MobileOneBlock(in_channels, out_channels, k, s, p, d, g.groups, branches=1)
        self.norm = nn.BatchNorm2d(in_channels)
        self.layer_scale = nn.Parameter(torch.full((out_channels, 1, 1), layer_scale))

    def forward(self, x: Tensor) -> Tensor:
        """``(N, channels, H, W)`` to the same."""
        mixed: Tensor = x + self.layer_scale * (self.mixer(x) - self.norm(x))
        return mixed


@register("repvit")
def repvit_mixer(*shape: Any, **geometry: Any) -> TokenMixer:
    """``N(N(W*x) + W1*x + b + x)``: RepViT's token mixer, for a square kernel of dilation 1.

    Ao Wang, Hui Chen, Zijia Lin, Jungong Han, Guiguang Ding. *RepViT: Revisiting Mobile CNN From ViT Perspective.*
    CVPR 2024, arXiv:2307.09283, section 3.2; see :class:`~reparam.models.repvit.TokenMixer`.

    Arguments, shapes and errors of :class:`Block`; ``groups`` is like both channels, and must be given.
    """
    g = _mixer("RepViT's token mixer", Geometry.of(*shape, **geometry))
    if g.dilation != (1, 1) or g.kernel_size[0] != g.kernel_size[1]:
        raise ModelError(f"RepViT's token mixer has a square kernel of dilation 1; this is {g}")
    return TokenMixer(g.in_channels, g.kernel_size[0], legacy=False)


@register("repghost")
class RepGhostBlock(ParallelBlock):
    """``N(W*x) + N(x)``, W depthwise: what makes ghost features out of features, cheaply.

    Chengpeng Chen, Zichao Guo, Haien Zeng, Pengfei Xiong, Jian Dong. *RepGhost: A Hardware-Efficient Ghost Module via
    Re-parameterization.* arXiv:2211.06088, 2022, section 3.2: an addition where GhostNet concatenates, with a norm in
    the shortcut. The paper's module is a plain 1x1 convolution with its norm and ReLU, this block, and another ReLU.

    Arguments, shapes and errors of :class:`Block`; ``groups`` is like both channels, and must be given.
    """

    def __init__(self, *shape: Any, **geometry: Any) -> None:
        super().__init__(*shape, **geometry)
        g = _mixer("RepGhost's cheap operation", self.geometry)
        self.branches.extend([g.branch(g.kernel_size), *_identity_norm(g)])

"""Linear operators on feature maps, and the exact ways in which they combine. Nothing here knows torch.fx.

Every operator acts on an activation of shape ``(..., channels, *space)`` and is linear up to a constant:
a convolution of any dimension, a transposed one, a matrix product on the last axis (a convolution without space), a
per-channel scale and shift, a padding, an average pool, a permutation of channels. The combinators compute in float64
whatever precision the weights came in, and either return an operator that equals the combination for *every* input of
every size, or raise :class:`~reparam.errors.AlgebraError` with the reason why there is none.

A convolution is described by where its taps lie: output ``o`` reads input ``stride * o + offset`` for the offsets
``dilation * j - before``, and ``before``, ``after`` is the padding on the two sides of an axis (negative values
crop). Two convolutions are aligned by these offsets, not by the centres of their kernels, so even sizes, asymmetric
paddings and shifted kernels need no special cases. A transposed convolution has the same offsets the other way round:
input ``i`` writes to output ``stride * i + offset``.
"""

from reparam.algebra.affine import ChannelAffine
from reparam.algebra.combine import compose, concatenate, parallel
from reparam.algebra.convolution import AnyConv, Conv, ConvTranspose, Linear, as_conv
from reparam.algebra.operator import ZEROS, Operator, Padding
from reparam.algebra.permutation import Permute
from reparam.algebra.windows import AveragePool, Pad

__all__ = [
    "ZEROS",
    "AnyConv",
    "AveragePool",
    "ChannelAffine",
    "Conv",
    "ConvTranspose",
    "Linear",
    "Operator",
    "Pad",
    "Padding",
    "Permute",
    "as_conv",
    "compose",
    "concatenate",
    "parallel",
]

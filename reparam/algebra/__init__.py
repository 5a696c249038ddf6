"""The algebra: linear operators as data, and what two of them in a row or side by side are. It knows no torch.fx."""

from reparam.algebra.operators import (
    ZEROS,
    AnyConv,
    AveragePool,
    ChannelAffine,
    Conv,
    ConvTranspose,
    Linear,
    Operator,
    Pad,
    Padding,
    compose,
    concatenate,
    parallel,
)

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
    "compose",
    "concatenate",
    "parallel",
]

"""The torch.nn layers that compute an operator."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from reparam.algebra import ZEROS, AnyConv, AveragePool, ChannelAffine, Conv, ConvTranspose, Operator
from reparam.errors import RewriteError
from reparam.graph.affine import Affine

_CONV_LAYERS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED_LAYERS = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_POOL_LAYERS = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}


def layer(operator: Operator, dtype: torch.dtype) -> nn.Module:
    """A torch.nn layer that computes ``operator``, but for a padding that it cannot have itself.

    That is ``padding_before(operator)``. Parameters are frozen and of type ``dtype``.
    """

    def cast(tensor: Tensor | None) -> nn.Parameter | None:
        return None if tensor is None else nn.Parameter(tensor.detach().to(dtype, copy=True), requires_grad=False)

    def kernel(operator: Conv) -> nn.Parameter:
        return nn.Parameter(operator.rounded(dtype), requires_grad=False)

    operator = operator.as_layer() if isinstance(operator, Conv) else operator
    match operator:
        case Conv() if operator.dimensions == 0:
            dense = operator.regroup(1)
            made = _bare(nn.Linear, dense.in_channels, dense.out_channels, dense.bias is not None)
            made.weight, made.bias = kernel(dense), cast(dense.bias)
        case Conv():
            padding = operator.layer_padding
            made = _bare(
                _CONV_LAYERS[operator.dimensions],
                operator.in_channels,
                operator.out_channels,
                operator.kernel_size,
                operator.stride,
                0 if padding is None else padding,
                operator.dilation,
                operator.groups,
                operator.bias is not None,
                operator.padding_mode if padding is not None else ZEROS,
            )
            made.weight, made.bias = kernel(operator), cast(operator.bias)
        case ConvTranspose():
            made = _bare(
                _TRANSPOSED_LAYERS[operator.dimensions],
                operator.in_channels,
                operator.out_channels,
                operator.kernel_size,
                operator.stride,
                tuple(before for before, _ in operator.padding),
                operator.output_padding,
                operator.groups,
                operator.bias is not None,
                operator.dilation,
            )
            made.weight, made.bias = cast(operator.torch_weight.contiguous()), cast(operator.bias)
        case ChannelAffine():
            # A uniform one has no axes of its own, and changes neither the rank of what it reads nor, in whatever
            # precision its two numbers are, the type.
            shape = [] if operator.axis is None else [-1] + [1] * (-operator.axis - 1)
            dtype = torch.float64 if operator.axis is None else dtype
            shift = None if operator.shift is None else operator.shift.view(shape)
            made = Affine(operator.scale.view(shape).to(dtype), None if shift is None else shift.to(dtype))
        case AveragePool() if operator.dimensions == 1 or operator.divisor is None:
            made = _POOL_LAYERS[operator.dimensions](operator.kernel_size, operator.stride, operator.padding)
        case _:
            raise RewriteError(f"no layer computes {type(operator).__name__}")
    return made.requires_grad_(False).eval()  # type: ignore[no-any-return]


class _Called(nn.Module):
    """An operator without parameters, as a layer."""

    def __init__(self, function: Operator) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        """The operator applied to ``x``."""
        return self.function(x)


def layers(operator: Operator, dtype: torch.dtype) -> list[nn.Module]:
    """An operator as layers to run one after the other, a padding of its own included; see :func:`layer`."""
    if not isinstance(operator, AnyConv | ChannelAffine):
        return [_Called(operator)]
    padding = operator.padding_before
    return [*([] if padding is None else [_Called(padding)]), layer(operator, dtype)]


def _bare(cls: Any, *args: Any) -> Any:
    """A layer without memory or initial values for the weights that it is about to be given."""
    made: Any = _without_reset(cls)(*args, device="meta")
    made.__class__ = cls
    return made


@cache
def _without_reset(cls: Any) -> Any:
    return type(cls.__name__, (cls,), {"reset_parameters": lambda self: None})

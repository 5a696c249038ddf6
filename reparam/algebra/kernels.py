"""How many kernels an operator launches."""

from __future__ import annotations

from typing import Any

from reparam.algebra.operators import ZEROS, Conv, Operator, Pad


def kernels_of(operator: Operator) -> int:
    """Kernels that an operator launches once it is a layer."""
    match operator:
        case Conv():
            return 1 + (padding_before(operator) is not None)
        case _:
            return 1


def as_layer(operator: Operator) -> Operator:
    """The operator as torch's layers have it: a convolution that crops is a transposed one, where that adds no taps."""
    if not isinstance(operator, Conv) or operator.padding_mode != ZEROS or any(s != 1 for s in operator.stride):
        return operator
    crops = [(e - before, e - after) for (before, after), e in zip(operator.padding, operator.extent, strict=True)]
    fits = all(b >= 0 and 0 <= b - a < d for (b, a), d in zip(crops, operator.dilation, strict=True))
    return operator.as_transposed() if fits and own_padding(operator) is None else operator


def padding_before(operator: Operator) -> Pad | None:
    """The padding that has to go before the layer of an operator, which cannot have it itself."""
    if not isinstance(operator, Conv) or operator.has_plain_padding:
        return None
    conv = as_layer(operator)
    if not isinstance(conv, Conv) or own_padding(conv) is not None:
        return None
    return Pad(conv.padding, conv.padding_mode)


def own_padding(conv: Conv) -> Any:
    """The ``padding`` argument with which a layer pads like ``conv``; None when a padding has to go before it."""
    if conv.has_plain_padding:
        return tuple(before for before, _ in conv.padding)
    same = all(
        stride == 1 and pad == (extent // 2, extent - extent // 2)
        for stride, pad, extent in zip(conv.stride, conv.padding, conv.extent, strict=True)
    )
    return "same" if same else None

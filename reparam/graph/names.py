"""What torch's operators are: pointwise, views, random, norms. The one table of their names.

Torch itself knows most of it: its operators are tagged, and their schemas say what may share memory. A function or a
layer that is made of several is called once, on a tensor without memory, to see what these are. What is left are rows
by hand: what torch has forgotten to tag, and what no tag is about.
"""

from __future__ import annotations

import operator
import re
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from reparam.graph.leaves import leaf_class
from reparam.modes import alone, below


def row(names: str) -> frozenset[str]:
    """A set of names."""
    return frozenset(names.split())


VIEW_LAYERS = (nn.Identity, nn.Flatten, nn.Unflatten, nn.modules.dropout._DropoutNd)  # or their inputs
CONVOLUTIONS = {f"{kind}{n}d": n for kind in ("conv", "conv_transpose") for n in (1, 2, 3)}
NORMS = row("batch_norm instance_norm layer_norm group_norm rms_norm local_response_norm")
NORM_LAYERS = (
    nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm, nn.CrossMapLRN2d,
    *([nn.RMSNorm] if hasattr(nn, "RMSNorm") else []),
)  # fmt: skip
DROPOUTS = row(
    "dropout dropout1d dropout2d dropout3d alpha_dropout feature_dropout feature_alpha_dropout native_dropout"
)
POOLS = {f"{kind}_pool{n}d": n for kind in ("max", "avg", "adaptive_avg", "adaptive_max") for n in (1, 2, 3)}
RESAMPLINGS = row("interpolate upsample upsampling_nearest2d upsampling_bilinear2d")
# What never makes new memory of its first argument (dropout in eval mode, which is the only one that does nothing).
VIEWS = row(
    """alias alpha_dropout detach dropout dropout1d dropout2d dropout3d feature_alpha_dropout moveaxis movedim permute
    pos positive squeeze swapaxes swapdims t transpose unflatten unsqueeze view view_as"""
)
COPIES = row("contiguous clone detach alias")
PERMUTATIONS = row("transpose swapaxes swapdims permute t")
RESHAPES = row("view reshape view_as reshape_as")
SEPARATIONS = row("split split_with_sizes chunk unbind")
UNKNOWN_NUMBER = row("chunk split unbind unsafe_chunk unsafe_split")
CONVERSIONS = row("bfloat16 double float half to type type_as")
# Kernels that do arithmetic, and are not made by an activation.
ARITHMETIC = row(
    """add iadd sub isub subtract rsub mul imul multiply truediv itruediv div divide true_divide neg negative addcmul
    pow maximum minimum"""
)
RANDOM = row(
    """bernoulli bernoulli_ cauchy_ exponential_ geometric_ log_normal_ multinomial normal normal_ poisson rand
    rand_like randint randint_like randn randn_like random_ randperm rrelu uniform_"""
)

# ATen's operators that are pointwise, or keep the shape of their first input in another way, and have no tag of it.
KEEP_SHAPE = NORMS | DROPOUTS | CONVERSIONS | row(
    """_conj _prelu_kernel _softmax _log_softmax _to_copy alias contiguous copy cummax cummin cumprod cumsum detach
    empty_like flip full_like hardswish log_sigmoid_forward log_softmax logcumsumexp msort normalize ones_like prelu
    rand_like randint_like randn_like renorm resolve_conj resolve_neg roll rrelu rrelu_with_noise softmax tril triu
    zero zeros_like"""
)  # fmt: skip
# What Python, or NumPy, calls operators that torch calls something else.
_OTHER_NAMES = {
    "and": "bitwise_and", "divide": "div", "floordiv": "div", "greater": "gt", "greater_equal": "ge",
    "invert": "bitwise_not", "less": "lt", "less_equal": "le", "mod": "remainder", "multiply": "mul",
    "not_equal": "ne", "or": "bitwise_or", "pos": "positive", "subtract": "sub", "truediv": "div",
    "xor": "bitwise_xor",
}  # fmt: skip
_ALSO_REDUCE = row("max min")

# What was found out of functions and their settings, and of layers and theirs.
_FUNCTIONS: dict[tuple[Any, str], bool] = {}
_LAYERS: dict[tuple[type, str], bool] = {}


def function_of(module: nn.Module) -> str:
    """The name of torch's function that a layer of torch's computes, as far as it is called like that."""
    cls = leaf_class(type(module))
    of_torch = cls is not None and cls.__module__.startswith("torch.nn.")
    return re.sub("(?<=[a-z])(?=[A-Z][a-z])", "_", str(cls.__name__)).lower() if of_torch and cls else ""


@cache
def is_pointwise(name: str) -> bool:
    """Whether each number that an operator makes is made of those in the same place of its inputs, broadcast.

    Args:
        name: ATen's name, or Python's own, without a trailing underscore.
    """
    if name.startswith("i") and hasattr(operator, f"__{name[1:]}__"):
        name = name[1:]  # in place
    packet = getattr(torch.ops.aten, _OTHER_NAMES.get(name, name), None)
    overloads = packet.overloads() if packet is not None and name not in _ALSO_REDUCE else ()
    return any(torch.Tag.pointwise in getattr(packet, overload).tags for overload in overloads)


@cache
def may_alias(name: str) -> bool:
    """Whether any torch operator of a name may return a view; true for names that torch does not know."""
    is_known = any(hasattr(owner, name) for owner in (torch.ops.aten, F, operator))
    return is_view(name) or name in DROPOUTS or not is_known


@cache
def is_view(name: str) -> bool:
    """Whether any torch operator of a name says that it may return a view."""
    packet = getattr(torch.ops.aten, name, None)
    schemas = [] if packet is None else [getattr(packet, overload)._schema for overload in packet.overloads()]
    return any(
        result.alias_info is not None for schema in schemas if not schema.is_mutable for result in schema.returns
    )


def keeps_shape(function: Any, *args: Any, **kwargs: Any) -> bool:
    """Whether a function of torch's, or the method of a name, returns what has the shape of its first argument.

    Args:
        function: A function, an operator, or the name of a method.
        args: Its other arguments, none of which is a tensor. Likewise ``kwargs``.
    """
    called = getattr(torch.Tensor, function, None) if isinstance(function, str) else function
    if called is None:
        return False
    key = called, repr((args, kwargs))
    if key not in _FUNCTIONS:
        _FUNCTIONS[key] = _is_made_of_known(lambda x: called(x, *args, **kwargs))
    return _FUNCTIONS[key]


def layer_keeps_shape(module: nn.Module) -> bool:
    """Whether a layer of torch's returns what has the shape of its input."""
    cls: Any = leaf_class(type(module))
    if cls is None or not cls.__module__.startswith("torch.nn."):
        return False
    if isinstance(module, (nn.PReLU, nn.Identity, nn.modules.dropout._DropoutNd, *NORM_LAYERS)):
        return True
    if module._parameters or module._buffers or module._modules:
        return False
    key = cls, cls.extra_repr(module)
    if key not in _LAYERS:
        _LAYERS[key] = _is_made_of_known(lambda x: cls.forward(module, x))
    return _LAYERS[key]


def _is_made_of_known(function: Callable[[torch.Tensor], Any]) -> bool:
    """Whether calling a function calls operators that keep the shape of what they read, and no others."""
    with alone(), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        given = torch.empty(2, 3, 4, 5, device="meta")
        try:
            with below(_Known()) as known:
                made = function(given)
        except Exception:  # it calls others, or takes no such tensor
            return False
    # What calls none might return another value that is no image.
    return known.called and isinstance(made, torch.Tensor) and made.shape == given.shape


class _OtherError(Exception):
    """An operator that may return another shape."""


class _Known(TorchDispatchMode):
    """Lets pass what keeps the shape of what it reads."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.called = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::").rstrip("_")
        if not is_pointwise(name) and name not in KEEP_SHAPE:
            raise _OtherError(name)
        self.called = True
        return func(*args, **(kwargs or {}))

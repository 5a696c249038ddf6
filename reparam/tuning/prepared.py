"""Convolutions and matrix products made ready for the processor: the weight laid out once, the activation taken in.

In eager mode PyTorch is given a plain weight at every call, which is laid out anew each time, and every activation
reads and writes its whole feature map. :class:`PreparedConv2d` and :class:`PreparedLinear` have the same parameters
under the same names as the ``nn.Conv2d`` and the ``nn.Linear`` that they are, and compute the same; where the fast path
does not apply (other devices and precisions, training, export, ``torch.compile``, tracing) they run PyTorch's own
functions, so nothing depends on it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx import Node

from reparam.graph import facts, names


@dataclass(frozen=True)
class _Activation:
    """An activation, as a function and as oneDNN is told of it: a name, numbers, an algorithm."""

    function: Callable[[Tensor], Tensor]
    name: str
    numbers: tuple[float, ...] = ()
    algorithm: str = ""


_ACTIVATIONS = {
    "": _Activation(lambda x: x, "none"),
    "relu": _Activation(F.relu, "relu"),
    "relu6": _Activation(F.relu6, "hardtanh", (0.0, 6.0)),
    "gelu": _Activation(F.gelu, "gelu", (), "none"),
    "gelu_tanh": _Activation(lambda x: F.gelu(x, approximate="tanh"), "gelu", (), "tanh"),
    "silu": _Activation(F.silu, "swish"),
    "hardswish": _Activation(F.hardswish, "hardswish"),
    "hardsigmoid": _Activation(F.hardsigmoid, "hardsigmoid"),
    "sigmoid": _Activation(torch.sigmoid, "sigmoid"),
    "tanh": _Activation(torch.tanh, "tanh"),
}


def activation_of(node: Node, module: nn.Module | None) -> str | None:
    """The name of the activation that a node is, one that a prepared layer can have; None for all others.

    Args:
        node: A node of a graph that reads one value.
        module: The module that it calls, if it calls one.
    """
    if facts.of(node).frozen is not None or len(node.args) != 1:
        return None
    if module is not None:
        name, given = names.function_of(module), {"approximate": getattr(module, "approximate", "none")}
    else:
        name, given = facts.target_name(node), node.kwargs
    settings = {key: value for key, value in given.items() if key != "inplace" and value != "none"}
    if name == "gelu" and settings == {"approximate": "tanh"}:
        return "gelu_tanh"
    return name if name and name in _ACTIVATIONS and not settings else None


_TENSORS = {"weight", "bias"}
_SMALL = 20480  # numbers in a feature map
_LARGE = 2**18  # numbers in a weight
_MANY = 256  # rows


class Prepared(nn.Module):
    """``activation(layer(x))``, with the weight of the layer kept once more, as oneDNN wants it.

    That copy is made at the first call, is no part of the state dict, and is made anew when the weight is another
    tensor or was changed in place (a change through ``weight.data`` is not seen: nobody can see it).

    Subclasses are also the layer that they prepare, which says what else they compute and how it is called.

    Attributes:
        kind: The layer that it prepares.
        settings: What that is constructed from, apart from the bias; attributes of the same names.
        activation: Name of the activation that is applied; none when empty.
    """

    kind: ClassVar[type[nn.Module]]
    settings: ClassVar[tuple[str, ...]]
    activation: str

    @classmethod
    def of(cls, layer: nn.Module, activation: str = "") -> Prepared:
        """The same layer, with the same tensors, and an activation."""
        settings: Any = {name: getattr(layer, name) for name in cls.settings}
        with torch.device("meta"):
            made = cls(**settings, bias=layer.bias is not None, activation=activation)
        made._parameters.update(layer._parameters)
        return made.train(layer.training)

    @classmethod
    def fits(cls, layer: nn.Module) -> bool:
        """Whether a layer is one that this one should take the place of."""
        if type(layer) is not cls.kind or not is_available():
            return False
        weight = layer._parameters.get("weight")
        return weight is not None and weight.device.type == "cpu" and weight.dtype == torch.float32

    def extra_repr(self) -> str:
        """As of the layer, and the activation."""
        settings = super().extra_repr()
        return f"{settings}, activation={self.activation}" if self.activation else settings

    def forward(self, x: Tensor) -> Tensor:
        """``activation(layer(x))``; shapes as for the layer."""
        activation = _ACTIVATIONS[self.activation]
        if self._is_plain_call(x) and self._pays(x):
            return self._run(x, activation)
        return activation.function(super().forward(x))

    def _is_plain_call(self, x: Any) -> bool:
        """Whether oneDNN may compute this call: plain numbers that nobody watches or differentiates."""
        if type(x) is not Tensor or torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
            return False
        tensors = self._parameters  # by its name, a parameter takes longer to find than all the rest takes
        if tensors.keys() != _TENSORS:  # one is computed: pruned, for example
            return False
        weight, bias = tensors["weight"], tensors["bias"]
        assert weight is not None
        if x.dtype != torch.float32 or weight.dtype != torch.float32 or not x.is_cpu or not weight.is_cpu:
            return False
        # The operators read a bias as if it had no strides.
        if bias is not None and not bias.is_contiguous():
            return False
        trained = x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
        return not (trained and torch.is_grad_enabled()) and x.numel() > 0 and not _is_watched()

    def _pays(self, x: Tensor) -> bool:
        """Whether oneDNN computes this call, and is worth its start."""
        raise NotImplementedError

    def _run(self, x: Tensor, activation: _Activation) -> Tensor:
        """``activation(layer(x))`` by oneDNN."""
        raise NotImplementedError

    def _lay_out(self, weight: Tensor, x: Tensor) -> Tensor:
        """The weight, laid out for inputs such as ``x``; for others it is right, too, if not as quick."""
        raise NotImplementedError


class PreparedConv2d(Prepared, nn.Conv2d):
    """``activation(W * x + b)``, as :class:`Prepared` says.

    Args:
        activation: Name of the activation that is applied; none when empty.
        others: As for ``nn.Conv2d``; the padding is a number or a pair, of zeros.
    """

    kind = nn.Conv2d
    settings = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        activation: str = "",
    ) -> None:
        nn.Conv2d.__init__(self, in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)
        self.activation = _known(activation)

    @classmethod
    def fits(cls, layer: nn.Module) -> bool:
        """Whether a layer is a convolution that this one can take the place of."""
        return super().fits(layer) and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)

    def _pays(self, x: Tensor) -> bool:
        """False where PyTorch would not call oneDNN, either (``use_mkldnn`` in ATen's Convolution.cpp).

        That takes longer to start than the few multiply-adds of a squeeze-and-excitation module take.
        """
        small = len(x) == 1 and self.groups == 1 and max(self.kernel_size) <= 3 and x.numel() <= _SMALL
        return x.dim() == 4 and not small

    def _run(self, x: Tensor, activation: _Activation) -> Tensor:
        operands = (x, _weight(self, x), self._parameters["bias"])
        geometry = (self.padding, self.stride, self.dilation, self.groups)
        result: Tensor = torch.ops.mkldnn._convolution_pointwise(
            *operands, *geometry, activation.name, activation.numbers, activation.algorithm
        )
        return result

    def _lay_out(self, weight: Tensor, x: Tensor) -> Tensor:
        geometry = (self.padding, self.stride, self.dilation, self.groups)
        made: Tensor = torch.ops.mkldnn._reorder_convolution_weight(weight, *geometry, list(x.shape))
        return made


class PreparedLinear(Prepared, nn.Linear):
    """``activation(x W^T + b)``, as :class:`Prepared` says.

    Args:
        in_features: As for ``nn.Linear``.
        out_features: Likewise.
        bias: Likewise.
        activation: Name of the activation that is applied; none when empty.
    """

    kind = nn.Linear
    settings = ("in_features", "out_features")

    def __init__(self, in_features: int, out_features: int, bias: bool = True, activation: str = "") -> None:
        nn.Linear.__init__(self, in_features, out_features, bias)
        self.activation = _known(activation)

    @classmethod
    def fits(cls, layer: nn.Module) -> bool:
        """Whether a layer is a matrix product that gains by it: a large one, which takes longer to pack than to start.

        PyTorch's own product packs the weight anew at every call. oneDNN takes longer to start, and is no quicker at
        the product itself.
        """
        return isinstance(layer, nn.Linear) and super().fits(layer) and layer.weight.numel() >= _LARGE

    def _pays(self, x: Tensor) -> bool:
        """True where the rows are so few that packing matters, but more than one, for which nothing is packed."""
        width = self.in_features
        return width < x.numel() <= _MANY * width and x.shape[-1] == width

    def _run(self, x: Tensor, activation: _Activation) -> Tensor:
        operands = (x, _weight(self, x), self._parameters["bias"])
        result: Tensor = torch.ops.mkldnn._linear_pointwise(
            *operands, activation.name, activation.numbers, activation.algorithm
        )
        return result

    def _lay_out(self, weight: Tensor, x: Tensor) -> Tensor:
        rows = x.numel() // self.in_features
        made: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
        return made


PREPARED: tuple[type[Prepared], ...] = (PreparedConv2d, PreparedLinear)


def prepared(layer: nn.Module, activation: str = "") -> Prepared | None:
    """The same layer made ready for the processor, with an activation; None where it cannot be."""
    return next((cls.of(layer, activation) for cls in PREPARED if cls.fits(layer)), None)


def can_be_prepared(layer: nn.Module) -> bool:
    """Whether :func:`prepared` has an answer."""
    return any(cls.fits(layer) for cls in PREPARED)


def is_available() -> bool:
    """Whether this PyTorch can prepare layers."""
    names = ("_convolution_pointwise", "_linear_pointwise")
    return torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in names)


def _known(activation: str) -> str:
    if activation not in _ACTIVATIONS:
        raise ValueError(f"there is no activation {activation!r}; there are {', '.join(filter(None, _ACTIVATIONS))}")
    return activation


def _is_watched() -> bool:
    """Whether somebody counts, rewrites or differentiates operations, and should see those that everybody knows."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None  # vmap, grad, jvp
        or forward_ad._current_level >= 0
        or torch.is_autocast_enabled("cpu")
        or not torch._C._get_mkldnn_enabled()
    )


@dataclass(frozen=True)
class _Weight:
    """A weight as oneDNN wants it, and what it was made from."""

    prepared: Tensor
    address: int
    version: int


# Beside the layers and not in them: a copy, a pickle or a state dict of a layer has nothing of it.
_WEIGHTS: WeakKeyDictionary[nn.Module, _Weight] = WeakKeyDictionary()


def _weight(layer: Prepared, x: Tensor) -> Tensor:
    """The weight of a layer, as it was laid out before, unless it has changed."""
    weight = layer._parameters["weight"]
    assert weight is not None
    # An inference tensor counts no changes: nobody but inference mode can make any.
    address, version = weight.data_ptr(), 0 if weight.is_inference() else weight._version
    known = _WEIGHTS.get(layer)
    if known is None or known.address != address or known.version != version:
        with torch.inference_mode(False), torch.no_grad():
            known = _WEIGHTS[layer] = _Weight(layer._lay_out(weight.detach(), x), address, version)
    return known.prepared

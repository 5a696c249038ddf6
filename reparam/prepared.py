"""Convolutions made ready for the processor: the kernel laid out for it once, the activation in the same loop.

In eager mode PyTorch hands oneDNN a plain kernel at every call, which is laid out anew each time, and every activation
reads and writes its whole feature map. :class:`PreparedConv2d` has the same parameters under the same names as the
``nn.Conv2d`` that it is, and computes the same; where the fast path does not apply (other devices and precisions,
training, export, ``torch.compile``, tracing) it runs PyTorch's own functions, so nothing depends on it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from reparam import facts


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
_LAYERS = {
    nn.ReLU: "relu", nn.ReLU6: "relu6", nn.SiLU: "silu", nn.Hardswish: "hardswish", nn.Hardsigmoid: "hardsigmoid",
    nn.Sigmoid: "sigmoid", nn.Tanh: "tanh",
}  # fmt: skip


def activation_of(node: Node, module: nn.Module | None) -> str | None:
    """The name of the activation that a node is, one that a :class:`PreparedConv2d` can have; None for all others.

    Args:
        node: A node of a graph that reads one value.
        module: The module that it calls, if it calls one.
    """
    if "frozen" in node.meta or len(node.args) != 1:
        return None
    if node.op == "call_module":
        if type(module) is nn.GELU:
            return "gelu" if module.approximate == "none" else "gelu_tanh"
        return _LAYERS.get(type(module)) if module is not None else None
    name = facts.target_name(node) if node.op in ("call_function", "call_method") else ""
    if name == "gelu" and node.kwargs == {"approximate": "tanh"}:
        return "gelu_tanh"
    settings = {key: value for key, value in node.kwargs.items() if key != "inplace"}
    return name if name in _ACTIVATIONS and not settings else None


_SMALL = 20480  # numbers


class PreparedConv2d(nn.Conv2d):
    """``activation(W * x + b)``, with the kernel kept once more, as oneDNN wants it.

    That copy is made at the first call, is no part of the state dict, and is made anew when the weight is another
    tensor or was changed in place (a change through ``weight.data`` is not seen: nobody can see it).

    Args:
        activation: Name of the activation that is applied; none when empty.
        others: As for ``nn.Conv2d``; the padding is a number or a pair, of zeros.
    """

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
        if activation not in _ACTIVATIONS:
            raise ValueError(
                f"there is no activation {activation!r}; there are {', '.join(filter(None, _ACTIVATIONS))}"
            )
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)
        self.activation = activation

    @staticmethod
    def of(conv: nn.Conv2d, activation: str = "") -> PreparedConv2d:
        """The same convolution, with the same tensors, and an activation."""
        names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
        settings: Any = {name: getattr(conv, name) for name in names}
        with torch.device("meta"):
            made = PreparedConv2d(**settings, bias=conv.bias is not None, activation=activation)
        made.weight, made.bias = conv.weight, conv.bias
        return made.train(conv.training)

    @staticmethod
    def fits(conv: nn.Module) -> bool:
        """Whether a layer is a convolution that this one can take the place of."""
        plain = type(conv) is nn.Conv2d and conv.padding_mode == "zeros" and not isinstance(conv.padding, str)
        return plain and conv.weight.device.type == "cpu" and conv.weight.dtype == torch.float32 and is_available()

    def extra_repr(self) -> str:
        """As of ``nn.Conv2d``, and the activation."""
        settings: str = super().extra_repr()  # type: ignore[no-untyped-call]
        return f"{settings}, activation={self.activation}" if self.activation else settings

    def forward(self, x: Tensor) -> Tensor:
        """``activation(W * x + b)``; shapes as for ``nn.Conv2d``."""
        activation = _ACTIVATIONS[self.activation]
        if not self._is_plain_call(x) or self._starts_sooner_by_itself(x):
            return activation.function(super().forward(x))
        operation = torch.ops.mkldnn._convolution_pointwise
        geometry = (self.padding, self.stride, self.dilation, self.groups)
        result: Tensor = operation(
            x, _kernel(self, x), self.bias, *geometry, activation.name, activation.numbers, activation.algorithm
        )
        return result

    def _is_plain_call(self, x: Any) -> bool:
        """Whether oneDNN may compute this call: a batch of plain numbers that nobody watches or differentiates."""
        if type(x) is not Tensor or torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
            return False
        weight = self.weight
        if x.dtype != torch.float32 or weight.dtype != torch.float32 or x.device.type != "cpu" or x.dim() != 4:
            return False
        trained = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
        return not trained and weight.device == x.device and x.numel() > 0 and not _is_watched()

    def _starts_sooner_by_itself(self, x: Tensor) -> bool:
        """Whether PyTorch would not call oneDNN, either (``use_mkldnn`` in ATen's Convolution.cpp).

        That takes longer to start than the few multiply-adds of a squeeze-and-excitation module take.
        """
        return len(x) == 1 and self.groups == 1 and max(self.kernel_size) <= 3 and x.numel() <= _SMALL


def is_available() -> bool:
    """Whether this PyTorch can prepare convolutions."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_convolution_pointwise")


def _is_watched() -> bool:
    """Whether somebody counts or rewrites operations, and should see those that everybody knows."""
    return is_in_torch_dispatch_mode() or torch._C._len_torch_function_stack() > 0


@dataclass(frozen=True)
class _Kernel:
    """A kernel as oneDNN wants it, and what it was made from."""

    prepared: Tensor
    address: int
    version: int


# Beside the layers and not in them: a copy, a pickle or a state dict of a layer has nothing of it.
_KERNELS: WeakKeyDictionary[nn.Module, _Kernel] = WeakKeyDictionary()


def _kernel(conv: PreparedConv2d, x: Tensor) -> Tensor:
    """The kernel of a layer, laid out for inputs such as ``x``; for others it is right, too, if not as quick."""
    weight = conv.weight
    # An inference tensor counts no changes: nobody but inference mode can make any.
    address, version = weight.data_ptr(), 0 if weight.is_inference() else weight._version
    known = _KERNELS.get(conv)
    if known is None or known.address != address or known.version != version:
        with torch.inference_mode(False), torch.no_grad():
            prepared = torch.ops.mkldnn._reorder_convolution_weight(
                weight.detach(), conv.padding, conv.stride, conv.dilation, conv.groups, list(x.shape)
            )
        known = _KERNELS[conv] = _Kernel(prepared, address, version)
    return known.prepared

"""Operator to torch.nn layer: in the model's precision, under the right name.

This is where float64 ends: each number is rounded once, when its layer is made.
"""

from __future__ import annotations

import itertools
import keyword
import operator as python_operators
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node

from reparam.algebra import ZEROS, AnyConv, AveragePool, ChannelAffine, Conv, ConvTranspose, Operator, Pad
from reparam.errors import RewriteError

if TYPE_CHECKING:
    from reparam.rewrite import Graph

_CONV_LAYERS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED_LAYERS = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_POOL_LAYERS = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}


class Affine(nn.Module):
    """``weight * x + bias`` with tensors that broadcast: a per-channel scale and shift that nothing absorbed.

    Attributes:
        weight: Shape ``(C, 1, ...)``.
        bias: Shape of ``weight``, or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = None if bias is None else nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        """``weight * x + bias``."""
        return x * self.weight if self.bias is None else torch.addcmul(self.bias, x, self.weight)


def kernels_of(operator: Operator) -> int:
    """Kernels that an operator launches once it is a layer."""
    match operator:
        case Conv():
            return 1 + (_padding_before(operator) is not None)
        case ChannelAffine():
            return 0 if operator.is_identity else 1
        case _:
            return 1


def _as_layer(operator: Operator) -> Operator:
    """The operator as torch's layers have it: a convolution that crops is a transposed one, where that adds no taps."""
    if not isinstance(operator, Conv) or operator.padding_mode != ZEROS or any(s != 1 for s in operator.stride):
        return operator
    crops = [(e - before, e - after) for (before, after), e in zip(operator.padding, operator.extent, strict=True)]
    fits = all(b >= 0 and 0 <= b - a < d for (b, a), d in zip(crops, operator.dilation, strict=True))
    return operator.as_transposed() if fits and _own_padding(operator) is None else operator


def _padding_before(operator: Operator) -> Pad | None:
    """The padding that has to go before the layer of an operator, which cannot have it itself."""
    if not isinstance(operator, Conv) or operator.has_plain_padding:
        return None
    conv = _as_layer(operator)
    if not isinstance(conv, Conv) or _own_padding(conv) is not None:
        return None
    return Pad(conv.padding, conv.padding_mode)


def _own_padding(conv: Conv) -> Any:
    """The ``padding`` argument with which a layer pads like ``conv``; None when a padding has to go before it."""
    if conv.has_plain_padding:
        return tuple(before for before, _ in conv.padding)
    same = all(
        stride == 1 and pad == (extent // 2, extent - extent // 2)
        for stride, pad, extent in zip(conv.stride, conv.padding, conv.extent, strict=True)
    )
    return "same" if same else None


def layer(operator: Operator, dtype: torch.dtype) -> nn.Module:
    """A torch.nn layer that computes ``operator``, but for a padding that it cannot have itself; see :func:`emit`.

    Its parameters are frozen and of type ``dtype``.
    """

    def cast(tensor: Tensor | None) -> nn.Parameter | None:
        return None if tensor is None else nn.Parameter(tensor.detach().to(dtype, copy=True), requires_grad=False)

    operator = _as_layer(operator)
    match operator:
        case Conv() if operator.dimensions == 0:
            dense = operator.regroup(1)
            made = _bare(nn.Linear, dense.in_channels, dense.out_channels, dense.bias is not None)
            made.weight, made.bias = cast(dense.kernel), cast(dense.bias)
        case Conv():
            padding = _own_padding(operator)
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
            made.weight, made.bias = cast(operator.kernel), cast(operator.bias)
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
    if isinstance(operator, Pad | AveragePool):
        return [_Called(operator)]
    padding = _padding_before(operator)
    return [*([] if padding is None else [_Called(padding)]), layer(operator, dtype)]


def _bare(cls: Any, *args: Any) -> Any:
    """A layer without memory or initial values for the weights that it is about to be given."""
    made: Any = _without_reset(cls)(*args, device="meta")
    made.__class__ = cls
    return made


@cache
def _without_reset(cls: Any) -> Any:
    return type(cls.__name__, (cls,), {"reset_parameters": lambda self: None})


def emit(graph: Graph, dtypes: dict[str, torch.dtype], default: torch.dtype) -> dict[str, Any]:
    """Replace the operators in a graph by layers, and name them.

    A layer takes the longest module path shared by what went into it; see :func:`_path`. Two calls of the same
    layers, fused in the same way, share one.

    Args:
        graph: Changed in place; afterwards it calls only modules, functions and methods.
        dtypes: Precision of the parameters of every module path.
        default: Precision where no parameters went in.

    Returns:
        Module or tensor for every name that the graph uses.
    """
    for node in graph.fx.nodes:
        _take_as_operator(graph, node)
    graph.fx.eliminate_dead_code(lambda node: node.op != "get_attr")
    used = {str(node.target): _lookup(graph, str(node.target)) for node in graph.fx.nodes if _has_name(node)}
    _rename_reserved(graph, used)
    names = _Names(graph, used)
    shared: dict[Any, str] = {}
    for node in list(graph.fx.nodes):
        operator = node.target
        if isinstance(operator, Pad):
            _replace(graph, node, _pad_before(graph, node, operator))
            continue
        if not isinstance(operator, Operator):
            continue
        number = _single_number(operator)
        if number is not None:
            with graph.fx.inserting_before(node):
                _replace(graph, node, graph.fx.call_function(number[0], (graph.source(node), number[1])))
            continue
        origins = node.meta.get("origins", frozenset())
        key = node.meta.get("calls") if origins else node
        path = shared.get(key)
        if path is None or not _computes(used[path], operator):
            # A norm may be more precise than the convolution before it, which reads what the model's input is.
            largest = max(sorted(origins & dtypes.keys()), key=lambda origin: names.sizes.get(origin, 0), default=None)
            dtype = node.meta.get("precision") or (default if largest is None else dtypes[largest])
            path = shared[key] = names.take(node)
            used[path] = layer(operator, dtype)
        source = graph.source(node)
        padding = _padding_before(operator)
        if padding is not None:
            source = _pad_before(graph, node, padding)
        with graph.fx.inserting_before(node):
            _replace(graph, node, graph.fx.call_module(path, (source,)))
    return used


def _take_as_operator(graph: Graph, node: Node) -> None:
    """A convolution that nothing fused with becomes a layer, too, where its model has none for it.

    That is where a function was called with a kernel, which may have been computed from parameters by a program that
    runs no longer.
    """
    from reparam.rewrite import calls, origins

    operator = graph.op(node) if not isinstance(node.target, Operator) else None
    if node.op != "call_function" or not isinstance(operator, AnyConv):
        return
    source = graph.source(node)
    node.meta.update(origins=origins(node), calls=calls(node), precision=operator.weight.dtype)
    node.op, node.target, node.args, node.kwargs = "call_function", operator, (source,), {}


def _single_number(operator: Operator) -> tuple[Any, float] | None:
    """The function and the number by which a uniform operator is plain arithmetic: ``2 * x``, ``x - 1``."""
    if not isinstance(operator, ChannelAffine) or operator.axis is not None:
        return None
    scale, shift = operator.scale.item(), 0.0 if operator.shift is None else operator.shift.item()
    if shift == 0.0:
        return python_operators.mul, scale
    return (python_operators.add, shift) if scale == 1.0 else None


def _has_name(node: Node) -> bool:
    return node.op in ("call_module", "get_attr")


def _rename_reserved(graph: Graph, used: dict[str, Any]) -> None:
    """Move what lies under a name that a graph module needs itself, or that is a keyword in the code that it runs."""
    for node in graph.fx.nodes:
        if _has_name(node) and (path := _permitted(str(node.target))) != node.target:
            used[path] = _lookup(graph, str(node.target))
            used.pop(str(node.target), None)
            node.target = path


def _permitted(path: str) -> str:
    """A path, with an underscore after each name that a graph module cannot have there: ``graph``, ``class``."""
    first, *others = path.split(".")
    taken = hasattr(torch.fx.GraphModule, first) or first in ("meta", "report") or keyword.iskeyword(first)
    return ".".join([first + "_" * taken, *(name + "_" * keyword.iskeyword(name) for name in others)])


def _lookup(graph: Graph, path: str) -> Any:
    owner, _, name = path.rpartition(".")
    return graph.modules[path] if path in graph.modules else getattr(graph.modules[owner], name)


def _computes(made: Any, operator: Operator) -> bool:
    """Whether a layer that was made is the one for ``operator``."""
    fresh = layer(operator, next((p.dtype for p in made.parameters()), torch.float32))
    return repr(fresh) == repr(made) and all(
        torch.equal(a, b) for a, b in zip(fresh.parameters(), made.parameters(), strict=True)
    )


def _pad_before(graph: Graph, node: Node, pad: Pad) -> Node:
    """A call of ``F.pad`` on the source of ``node``."""
    amounts = [amount for pair in reversed(pad.padding) for amount in pair]
    with graph.fx.inserting_before(node):
        if pad.mode != ZEROS:
            return graph.fx.call_function(F.pad, (graph.source(node), amounts, pad.mode))
        return graph.fx.call_function(F.pad, (graph.source(node), amounts), {"value": pad.value} if pad.value else {})


def _replace(graph: Graph, node: Node, replacement: Node) -> None:
    replacement.meta = dict(node.meta)
    node.replace_all_uses_with(replacement)
    graph.fx.erase_node(node)


class _Names:
    """Module paths for fused layers, and which of them are still busy with other things."""

    def __init__(self, graph: Graph, used: dict[str, Any]) -> None:
        self.graph = graph
        self.sizes: dict[str, int] = {}
        self.containers = {""}
        for path, module in graph.modules.items():
            self.sizes[path] = sum(
                parameter.numel() for parameter in module.parameters(recurse="parametrizations" in module._modules)
            )
            if getattr(type(module), "forward", None) in (nn.Sequential.forward, nn.Module.forward):
                self.containers.add(path)
        self.taken: set[str] = set()
        self.around: set[str] = set()
        for path in used:
            self._occupy(path)
        # Nodes that run in a module, or were made of something in it.
        self.inhabitants: dict[str, set[Node]] = {}
        # Fused nodes that were made of nothing but what lies in a module.
        self.homes: dict[str, set[Node]] = {}
        # Fused nodes that were made of anything in a module.
        self.tenants: dict[str, set[Node]] = {}
        for node in graph.fx.nodes:
            if node.op not in ("call_module", "call_function", "call_method"):
                continue
            origins = node.meta.get("origins", ())
            places = {str(node.target)} if node.op == "call_module" else {node.meta.get("scope", ""), *origins}
            for prefix in {prefix for path in places for prefix in _prefixes(path)}:
                self.inhabitants.setdefault(prefix, set()).add(node)
            for prefix in {prefix for path in origins for prefix in _prefixes(path)}:
                self.tenants.setdefault(prefix, set()).add(node)
            if origins and isinstance(node.target, AnyConv | ChannelAffine):
                for prefix in _prefixes(_common_prefix(sorted(origins))):
                    self.homes.setdefault(prefix, set()).add(node)

    def take(self, node: Node) -> str:
        """Where the layer of a fused node goes; the path is then taken.

        The longest path shared by the modules whose parameters went in; from there up, as long as the module around
        it does nothing else (a Sequential is a place for layers rather than a layer, and stays). Where that path is
        still busy, because the module goes on to do other things, the layer takes the place of the module inside it
        that gave it the most.
        """
        origins = sorted(node.meta.get("origins", ())) or [node.meta.get("scope", "")]
        common = _common_prefix(origins)
        while "." in common and self._is_all_that_is_left(common.rpartition(".")[0], node):
            common = common.rpartition(".")[0]
        main = self.main_origin(node)
        within = [prefix for prefix in _prefixes(main) if len(prefix) > len(common)]
        deeper = [prefix for prefix in within if prefix == main or self.tenants.get(prefix) == {node}]
        path = next((path for path in (common, *deeper) if path and self._is_free(path, node)), "")
        if not path:
            # Beside what is busy, as deep as possible.
            beside = [f"{prefix}_fused" for prefix in reversed(_prefixes(main))] or ["fused"]
            numbered = (f"{name}{number or ''}" for number in itertools.count() for name in beside)
            path = next(name for name in numbered if self._is_free(name, node))
        self._occupy(path)
        return path

    def main_origin(self, node: Node) -> str:
        """Of the modules whose parameters went into a node, the one that has the most."""
        origins: list[str] = sorted(node.meta.get("origins", ())) or [str(node.meta.get("scope", ""))]
        return max(origins, key=lambda path: self.sizes.get(path, 0))

    def _occupy(self, path: str) -> None:
        self.taken.add(path)
        self.around.update(_prefixes(path))

    def _is_all_that_is_left(self, path: str, node: Node) -> bool:
        return path not in self.containers and self.inhabitants.get(path) == {node}

    def _is_free(self, path: str, node: Node) -> bool:
        """Whether no other layer is at, below or above ``path``, and none will have to be."""
        busy = (
            _permitted(path) != path or path in self.around or any(prefix in self.taken for prefix in _prefixes(path))
        )
        return not busy and self.homes.get(path, set()) <= {node}


def _prefixes(path: str) -> list[str]:
    parts = path.split(".") if path else []
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _common_prefix(paths: list[str]) -> str:
    split = [path.split(".") for path in paths]
    shared = []
    for parts in zip(*split):  # noqa: B905 - up to the shortest
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)

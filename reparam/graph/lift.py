"""Graph node to operator: which linear operator is this?

One table says it for torch.nn layers, functions, tensor methods and Python operators. An entry is a function that
takes what the node calls (a module first, for a module) with its arguments, in which every constant is a tensor or a
number and every activation still a node. It returns the operator, or None when the call is not linear, or raises
:class:`~reparam.errors.AlgebraError` with the reason when it only looks as if it were. :func:`register` adds entries:

    @reparam.lifting.register(MyScale)
    def _(module, x):
        return ChannelAffine(module.gamma, None, axis=-3)
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node

from reparam.algebra import (
    AnyConv,
    AveragePool,
    ChannelAffine,
    Conv,
    ConvTranspose,
    Linear,
    Operator,
    Pad,
    Permute,
)
from reparam.errors import AlgebraError
from reparam.graph import facts
from reparam.graph.leaves import LIFTERS, carries_hooks, is_leaf, keeps, leaf_class

Lifter: TypeAlias = Callable[..., "Operator | Sum | None"]
Modules: TypeAlias = Mapping[str, nn.Module]


@dataclass(frozen=True)
class Sum:
    """``sum(coefficient * term)`` over activations.

    Attributes:
        terms: Pairs of a number and a node, in the order of the model's own additions.
    """

    terms: tuple[tuple[float, Node], ...]


@dataclass(frozen=True)
class Refusal:
    """A node that is no linear operator although its layer sounds like one; ``reason`` says why."""

    reason: str


def register(*targets: Any) -> Callable[[Lifter], Lifter]:
    """Teach the compiler what a layer class, a function or a tensor method computes.

    Args:
        targets: nn.Module classes, functions, or names of tensor methods. A class also stands for its subclasses,
            as long as they do not override what it computes.

    Returns:
        A decorator for the function that this module describes.
    """

    def decorate(lifter: Lifter) -> Lifter:
        for target in targets:
            LIFTERS[target] = lifter
        return lifter

    return decorate


def unregister(*targets: Any) -> None:
    """Take back :func:`register`."""
    for target in targets:
        LIFTERS.pop(target, None)


def lift(node: Node, modules: Modules) -> Operator | Sum | Refusal | None:
    """The operator that a node applies to its activation, a sum of activations, a refusal, or None.

    Args:
        node: A node of a graph, with the facts of :mod:`reparam.graph.facts`.
        modules: The module at every path that the graph's names refer to.
    """
    if isinstance(node.target, Operator):
        return node.target
    if facts.of(node).frozen is not None:
        return None
    try:
        match node.op:
            case "call_module":
                return _lift_module(node, modules[str(node.target)], modules)
            case "call_function" | "call_method":
                lifter = LIFTERS.get(node.target)
                if lifter is None:
                    return None
                return _call(lifter, resolve(node.args, modules), resolve(node.kwargs, modules))
    except AlgebraError as refusal:
        return Refusal(str(refusal))
    return None


def _lift_module(node: Node, module: nn.Module, modules: Modules) -> Operator | Sum | Refusal | None:
    cls = leaf_class(type(module))
    if cls is None or not is_leaf(module):
        return None
    lifter = next((LIFTERS[base] for base in cls.__mro__ if base in LIFTERS and keeps(cls, base)), None)
    if lifter is None:
        return None
    if carries_hooks(module):
        return Refusal("it carries hooks, which a fused kernel would drop")
    return _call(lifter, (module, *resolve(node.args, modules)), resolve(node.kwargs, modules))


def _call(lifter: Lifter, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Operator | Sum | None:
    """Call a table entry; arguments that it does not know (an ``out=``, say) mean that it is not that entry's call."""
    try:
        return lifter(*args, **kwargs)
    except TypeError:
        try:
            inspect.signature(lifter).bind(*args, **kwargs)
        except TypeError:
            return None
        raise


def resolve(argument: Any, modules: Modules) -> Any:
    """Constants by value, activations as nodes."""

    def value(item: Node) -> Any:
        if item.op != "get_attr":
            return item
        owner, _, name = str(item.target).rpartition(".")
        return getattr(modules[owner], name)

    return torch.fx.map_arg(argument, value)


# What the entries share.


def _ints(value: Any, count: int) -> tuple[int, ...]:
    """A number for every axis, or one for all."""
    numbers = tuple(value) if isinstance(value, (tuple, list, torch.Size)) else (value,)
    if not all(isinstance(number, int) for number in numbers):
        raise AlgebraError("its geometry depends on the input")
    return numbers * count if len(numbers) == 1 else numbers


def _is_constant(*values: Any) -> bool:
    return all(value is None or isinstance(value, Tensor) for value in values)


def _conv(
    weight: Tensor,
    bias: Tensor | None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
) -> Conv:
    """A convolution from the arguments of torch's own."""
    if weight.is_complex():
        raise AlgebraError("its weights are complex numbers")
    space = weight.dim() - 2
    dilation = _ints(dilation, space)
    (groups,) = _ints(groups, 1)
    pads: tuple[tuple[int, int], ...]
    if padding == "valid":
        pads = ((0, 0),) * space
    elif padding == "same":
        # torch puts the odd one after.
        totals = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        pads = tuple((total // 2, total - total // 2) for total in totals)
    else:
        pads = tuple((p, p) for p in _ints(padding, space))
    detached = None if bias is None else bias.detach()
    return Conv(weight.detach(), detached, _ints(stride, space), pads, dilation, groups, padding_mode)


def _transposed(
    weight: Tensor,
    bias: Tensor | None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> AnyConv:
    """A transposed convolution from the arguments of torch's own: a plain one where the stride is 1."""
    if weight.is_complex():
        raise AlgebraError("its weights are complex numbers")
    space = weight.dim() - 2
    stride, padding, output_padding, dilation = (
        _ints(value, space) for value in (stride, padding, output_padding, dilation)
    )
    (groups,) = _ints(groups, 1)
    transposed = ConvTranspose.of_torch(weight, bias, stride, padding, output_padding, groups, dilation)
    return transposed.as_conv() if all(s == 1 for s in stride) else transposed


def _norm(
    mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, axis: int
) -> ChannelAffine:
    """``(x - mean) / sqrt(variance + eps) * weight + bias``: inference of Ioffe and Szegedy 2015, arXiv 1502.03167."""
    scale = torch.rsqrt(variance.detach().double() + eps)
    if weight is not None:
        scale = scale * weight.detach()
    shift = -mean.detach() * scale
    return ChannelAffine(scale, shift if bias is None else shift + bias.detach(), axis)


def _norm_axis(cls: type, x: Any) -> int:
    """The channels' axis of a norm layer, counted from the end."""
    digit = cls.__name__[-2:-1]
    if digit in ("2", "3") or issubclass(cls, nn.modules.instancenorm._InstanceNorm):
        return -int(digit) - 1
    return _second_axis(x)


def _second_axis(x: Any) -> int:
    """Axis 1, counted from the end."""
    rank = facts.of(x).rank if isinstance(x, Node) else None
    if rank is None:
        raise AlgebraError("it works along axis 1 of an input of unknown rank; pass example_inputs")
    return 1 - int(rank)


# Layers.


@register(nn.Conv1d, nn.Conv2d, nn.Conv3d)
def _(module: nn.modules.conv._ConvNd, input: Any) -> Operator:
    return _conv(
        module.weight, module.bias, module.stride, module.padding, module.dilation, module.groups, module.padding_mode
    )


@register(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
def _(module: nn.modules.conv._ConvTransposeNd, input: Any, output_size: Any = None) -> Operator:
    output_padding = module.output_padding
    if output_size is not None:
        if any(s != 1 for s in module.stride):
            raise AlgebraError("output_size= makes its output padding depend on the size of its input")
        # There is one size that it may ask for.
        output_padding = (0,) * len(module.stride)
    return _transposed(
        module.weight, module.bias, module.stride, module.padding, output_padding, module.groups, module.dilation
    )


@register(nn.Linear)
def _(module: nn.Linear, input: Any) -> Operator:
    return Linear(module.weight.detach(), None if module.bias is None else module.bias.detach())


@register(
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm,
    nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d,
)  # fmt: skip
def _(module: nn.modules.batchnorm._NormBase, input: Any) -> Operator:
    if module.running_mean is None or module.running_var is None:
        raise AlgebraError("it has no running statistics and normalises with those of its input")
    if not module.track_running_stats and not isinstance(module, nn.modules.batchnorm._BatchNorm):
        raise AlgebraError("it normalises with the statistics of its input")
    axis = _norm_axis(leaf_class(type(module)) or type(module), input)
    return _norm(module.running_mean, module.running_var, module.weight, module.bias, module.eps, axis)


@register(nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
def _(module: nn.Module, input: Any) -> Operator:
    return ChannelAffine.uniform(1.0)


@register(nn.LeakyReLU)
def _(module: nn.LeakyReLU, input: Any) -> Operator | Sum | None:
    return _leaky_relu(input, module.negative_slope)


@register(F.leaky_relu)
def _leaky_relu(input: Any, negative_slope: Any = 0.01, inplace: bool = False) -> Operator | None:
    # A slope of 1 is no activation any more; VanillaNet (Chen et al., NeurIPS 2023) ends its training there.
    return ChannelAffine.uniform(1.0) if isinstance(negative_slope, int | float) and negative_slope == 1 else None


@register(nn.PReLU)
def _(module: nn.PReLU, input: Any) -> Operator | Sum | None:
    return _prelu(input, module.weight)


@register(F.prelu, torch.prelu)
def _prelu(input: Any, weight: Any) -> Operator | None:
    return ChannelAffine.uniform(1.0) if isinstance(weight, Tensor) and bool((weight == 1).all()) else None


@register(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
def _(module: Any, input: Any) -> Operator:
    space = {nn.AvgPool1d: 1, nn.AvgPool2d: 2, nn.AvgPool3d: 3}[leaf_class(type(module))]  # type: ignore[index]
    divisor = getattr(module, "divisor_override", None)
    return _average_pool(
        space, module.kernel_size, module.stride, module.padding, module.ceil_mode, module.count_include_pad, divisor
    )


def _average_pool(
    space: int, kernel_size: Any, stride: Any, padding: Any, ceil_mode: bool, include_pad: bool, divisor: int | None
) -> AveragePool:
    pads = _ints(padding, space)
    if ceil_mode:
        raise AlgebraError("ceil_mode makes its last windows smaller")
    if any(pads) and not include_pad and divisor is None:
        raise AlgebraError("count_include_pad=False divides by less at the border")
    kernel = _ints(kernel_size, space)
    return AveragePool(kernel, _ints(stride, space) if stride not in (None, ()) else kernel, pads, divisor)


@register(
    nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d,
    nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d,
    nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d,
    nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d,
)  # fmt: skip
def _(module: Any, input: Any) -> Operator | None:
    name = next(n for n in ("Zero", "Constant", "Reflection", "Replication", "Circular") if n in _name(module))
    mode = {"Zero": "constant", "Constant": "constant", "Reflection": "reflect", "Replication": "replicate"}
    return _pad(module.padding, mode.get(name, "circular"), getattr(module, "value", 0.0))


def _name(module: nn.Module) -> str:
    return str(getattr(leaf_class(type(module)), "__name__", ""))


def _pad(amounts: Any, mode: str, value: float | None) -> Pad:
    flat = _ints(amounts, 2)
    # torch counts the axes from the last to the first.
    pairs = tuple((flat[i], flat[i + 1]) for i in range(len(flat) - 2, -1, -2))
    return Pad(pairs, "zeros" if mode == "constant" else mode, float(value or 0.0))


@register(nn.ChannelShuffle)
def _(module: nn.ChannelShuffle, input: Any) -> Operator | Sum | None:
    return _channel_shuffle(input, module.groups)


@register(F.channel_shuffle, F.native_channel_shuffle)
def _channel_shuffle(input: Any, groups: Any) -> Operator | None:
    axis = _second_axis(input)
    count = _channels(input, axis)
    return None if count is None or type(groups) is not int else Permute.shuffle(count, groups, -axis - 1)


@register(nn.PixelShuffle)
def _(module: nn.PixelShuffle, input: Any) -> Operator | Sum | None:
    return _pixel_shuffle(input, module.upscale_factor)


@register(F.pixel_shuffle)
def _pixel_shuffle(input: Any, upscale_factor: Any) -> Operator | None:
    count = _channels(input, -3) if type(upscale_factor) is int else None
    return None if count is None else Permute(torch.arange(count), up=upscale_factor)


@register(nn.PixelUnshuffle)
def _(module: nn.PixelUnshuffle, input: Any) -> Operator | Sum | None:
    return _pixel_unshuffle(input, module.downscale_factor)


@register(F.pixel_unshuffle)
def _pixel_unshuffle(input: Any, downscale_factor: Any) -> Operator | None:
    count = _channels(input, -3) if type(downscale_factor) is int else None
    return None if count is None else Permute(torch.arange(count * downscale_factor**2), down=downscale_factor)


# Functions.


@register(F.conv1d, F.conv2d, F.conv3d)
def _(
    input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> Operator | None:
    if isinstance(input, Tensor) or not isinstance(weight, Tensor) or not _is_constant(bias):
        return None
    return _conv(weight, bias, stride, padding, dilation, groups)


@register(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
def _(
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Operator | None:
    if isinstance(input, Tensor) or not isinstance(weight, Tensor) or not _is_constant(bias):
        return None
    return _transposed(weight, bias, stride, padding, output_padding, groups, dilation)


@register(F.linear)
def _(input: Any, weight: Any, bias: Any = None) -> Operator | None:
    if isinstance(input, Tensor) or not isinstance(weight, Tensor) or weight.dim() != 2 or not _is_constant(bias):
        return None
    return Linear(weight.detach(), None if bias is None else bias.detach())


@register(torch.matmul, torch.mm, operator.matmul, "matmul", "mm")
def _(input: Any, other: Any) -> Operator | None:
    if not _is_linear_in(input) or not isinstance(other, Tensor) or other.dim() != 2 or other.is_complex():
        return None
    return Linear(other.detach().t(), None)


@register(torch.addmm)
def _(input: Any, mat1: Any, mat2: Any) -> Operator | None:
    # What decomposed programs have of a layer: bias + x W.
    if not _is_linear_in(mat1) or not isinstance(mat2, Tensor) or not isinstance(input, Tensor) or input.dim() != 1:
        return None
    return Linear(mat2.detach().t(), input.detach()) if len(input) == mat2.shape[1] else None


@register(F.batch_norm)
def _batch_norm(
    input: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Operator | None:
    if not _is_constant(weight, bias):
        return None
    if training is not False or not isinstance(running_mean, Tensor) or not isinstance(running_var, Tensor):
        raise AlgebraError("it has no running statistics and normalises with those of its input")
    return _norm(running_mean, running_var, weight, bias, eps, _second_axis(input))


@register(torch.batch_norm)
def _(
    input: Any,
    weight: Any,
    bias: Any,
    running_mean: Any,
    running_var: Any,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Operator | Sum | None:
    # The order of its arguments is not that of torch.nn.functional's.
    return _batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)


@register(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout, torch.dropout)
def _(input: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Operator | None:
    # torch's own function takes the mode third, too, under another name.
    return ChannelAffine.uniform(1.0) if training is False else None


def _pool_function(
    space: int,
    input: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Operator | None:
    return _average_pool(space, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)


for _space, _pool in enumerate((F.avg_pool1d, F.avg_pool2d, F.avg_pool3d), start=1):
    register(_pool)(partial(_pool_function, _space))


@register(F.pad, torch._C._nn.pad)
def _(input: Any, pad: Any, mode: str = "constant", value: float | None = None) -> Operator | None:
    return _pad(pad, mode, value) if isinstance(input, Node) else None


@register(operator.getitem)
def _(x: Any, index: Any) -> Operator | None:
    """Slices of the axes after the batch: a crop, a stride, or both."""
    rank = facts.of(x).rank if _is_linear_in(x) and facts.of(x).kind == "tensor" else None
    if rank is None:
        return None
    items = facts.indices(index, rank) or []
    slices = [item for item in items if isinstance(item, slice)]
    if not slices or len(slices) < len(items) or slices[0] != slice(None):
        return None
    crops: list[tuple[int, int]] = []
    for item in slices[1:]:
        start, stop = item.start or 0, item.stop or 0
        if type(start) is not int or type(stop) is not int or start < 0 or stop > 0 or item.stop == 0:
            return None  # what it leaves out depends on the size
        crops.append((-start, stop))
    steps = [item.step or 1 for item in slices[1:]]
    if all(step == 1 for step in steps):
        return Pad(tuple(crops))
    if crops[0] != (0, 0) or steps[0] != 1 or not all(type(step) is int and step > 0 for step in steps):
        return None
    if not any(map(any, crops)):
        return AveragePool((1,) * len(steps[1:]), tuple(steps[1:]), (0,) * len(steps[1:]))
    channels = _channels(x, -len(steps))
    if channels is None:
        return None
    weight = torch.ones(channels, 1, *[1] * len(steps[1:]), dtype=torch.float64)
    return Conv(weight, None, tuple(steps[1:]), tuple(crops[1:]), groups=channels)


# Arithmetic.


def _is_linear_in(x: Any) -> TypeGuard[Node]:
    """Whether arithmetic on ``x`` is arithmetic on an activation, and not on sizes or on what may be integers.

    An integer becomes a float on the way (``image / 255``), which no convolution can take in.
    """
    return isinstance(x, Node) and facts.of(x).kind != "other" and facts.of(x).floating is not False


def _number(value: Any) -> float | None:
    """A Python number, or a tensor that holds one and cannot change the shape or type of what it meets."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, Tensor) and value.dim() == 0 and not value.is_complex():
        return float(value)
    return None


def _factor(alpha: Any) -> float:
    if isinstance(alpha, Node):
        raise AlgebraError("its factor depends on the input")
    return float(alpha)


def _vector(constant: Tensor, x: Node) -> tuple[Tensor, int | None, bool]:
    """A constant that broadcasts along one axis: its values, the axis, and whether it may broadcast ``x``.

    Raises:
        AlgebraError: It varies along several axes, or adds axes to ``x``.
    """
    rank = facts.of(x).rank
    if not constant.is_floating_point():
        raise AlgebraError("the constant is not of floating-point numbers")
    shape = tuple(constant.shape)
    axes = [i - len(shape) for i, size in enumerate(shape) if size != 1]
    if len(axes) > 1:
        raise AlgebraError(f"a constant of shape {shape} differs from place to place")
    # (C, 1, 1) is the usual shape of a layer scale, and cannot add axes to anything that it fits.
    adds_axes = constant.shape[:1] == (1,) if rank is None else len(shape) > rank
    if len(shape) > 1 and adds_axes:
        raise AlgebraError("the constant may add axes to its input, whose rank is unknown; pass example_inputs")
    if not axes:
        return constant.reshape(1), None, False
    known = facts.of(x).shape
    channels = known[axes[0]] if known is not None and len(known) >= -axes[0] else _channels(x, axes[0])
    return constant.flatten(), axes[0], channels != shape[axes[0]]


def _channels(x: Node | None, axis: int) -> int | None:
    """Number of channels of a value along an axis, when the layer that made it shows it."""
    while x is not None:
        if (known := facts.of(x).channels) is not None:
            return known[0] if known[1] == axis else None
        source = x.args[0] if x.args and facts.keeps_shape(x) else None
        x = source if isinstance(source, Node) else None
    return None


def _add(x: Any, y: Any, sign: float) -> Operator | Sum | None:
    """``x + sign * y``."""
    if isinstance(x, Node) and isinstance(y, Node):
        if not _is_linear_in(x) or not _is_linear_in(y):
            return None
        return Sum(((1.0, x), (sign, y)))
    node, constant, of_node, of_constant = (x, y, 1.0, sign) if isinstance(x, Node) else (y, x, sign, 1.0)
    if not _is_linear_in(node):
        return None
    number = _number(constant)
    if number is not None:
        return ChannelAffine.uniform(of_node, of_constant * number)
    if not isinstance(constant, Tensor):
        return None
    values, axis, may_expand = _vector(constant.detach(), node)
    scale = torch.full_like(values, of_node, dtype=torch.float64)
    return ChannelAffine(scale, of_constant * values.double(), axis, may_expand)


def _multiply(x: Any, y: Any) -> Operator | Sum | None:
    node, constant = (x, y) if isinstance(x, Node) else (y, x)
    if not _is_linear_in(node) or isinstance(constant, Node):
        return None
    number = _number(constant)
    if number is not None:
        return ChannelAffine.uniform(number)
    if not isinstance(constant, Tensor):
        return None
    values, axis, may_expand = _vector(constant.detach(), node)
    return ChannelAffine(values, None, axis, may_expand)


@register(operator.add, operator.iadd, torch.add, "add", "add_")
def _(x: Any, y: Any, *, alpha: float = 1) -> Operator | Sum | None:
    return _add(x, y, _factor(alpha))


@register(operator.sub, operator.isub, torch.sub, torch.subtract, "sub", "sub_", "subtract")
def _(x: Any, y: Any, *, alpha: float = 1) -> Operator | Sum | None:
    return _add(x, y, -_factor(alpha))


@register(torch.rsub)
def _(x: Any, y: Any, *, alpha: float = 1) -> Operator | Sum | None:
    return _add(y, x, -_factor(alpha))


@register(operator.mul, operator.imul, torch.mul, torch.multiply, "mul", "mul_", "multiply")
def _(x: Any, y: Any) -> Operator | Sum | None:
    return _multiply(x, y)


@register(operator.truediv, operator.itruediv, torch.div, torch.divide, torch.true_divide, "div", "div_", "divide")
def _(x: Any, y: Any, *, rounding_mode: str | None = None) -> Operator | Sum | None:
    if isinstance(y, Node) or rounding_mode is not None or not isinstance(x, Node):
        return None
    if isinstance(y, Tensor):
        return _multiply(x, y.detach().double().reciprocal()) if y.is_floating_point() else None
    return ChannelAffine.uniform(1.0 / y) if _number(y) and _is_linear_in(x) else None


@register(operator.neg, torch.neg, torch.negative, "neg", "negative", "neg_")
def _(x: Any) -> Operator | None:
    return ChannelAffine.uniform(-1.0) if _is_linear_in(x) else None


@register(operator.pos, torch.positive, "positive")
def _(x: Any) -> Operator | None:
    return ChannelAffine.uniform(1.0) if _is_linear_in(x) else None


def _stacked(x: Any, dim: Any, keepdim: bool, dtype: Any, mean: bool) -> Sum | None:
    """``torch.stack([a, b, c]).sum(0)`` is the sum of a, b and c, all of one shape."""
    if not isinstance(x, Node) or x.target is not torch.stack or keepdim or dtype is not None or len(x.users) > 1:
        return None
    terms: Any = x.args[0]
    along = x.args[1] if len(x.args) > 1 else x.kwargs.get("dim", 0)
    dims: Sequence[Any] = dim if isinstance(dim, (tuple, list)) else (dim,)
    if list(dims) != [along] or not isinstance(terms, Iterable):
        return None
    terms = list(terms)
    if not all(isinstance(term, Node) and term.op != "get_attr" for term in terms):
        return None
    return Sum(tuple((1.0 / len(terms) if mean else 1.0, term) for term in terms))


@register(torch.sum, "sum")
def _(x: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Sum | None:
    return _stacked(x, dim, keepdim, dtype, mean=False)


@register(torch.mean, "mean")
def _(x: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Sum | None:
    return _stacked(x, dim, keepdim, dtype, mean=True)

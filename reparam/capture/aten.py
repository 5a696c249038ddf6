"""ATen's operators in the words of ``torch`` and ``torch.nn.functional``, so that all else reads one language only."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Node

Said: TypeAlias = tuple[str, Any, tuple[Any, ...], dict[str, Any]]

_CHECKS = frozenset(
    "_assert_tensor_metadata sym_constrain_range sym_constrain_range_for_size _assert_async _assert_scalar".split()
)


def is_check(target: Any) -> bool:
    """Whether an operator only checks what export has found out already."""
    return isinstance(target, OpOverload) and target.namespace == "aten" and name_of(target) in _CHECKS


def name_of(target: OpOverload) -> str:
    """Name of an operator without namespace and overload."""
    return str(target._schema.name).partition("::")[2]


def said(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any], rank: int | None) -> Said:
    """A call of an operator, as a call of the public function or method of ``torch`` that computes the same.

    Args:
        target: Any function. One that is not ATen's, or that torch has no public name for, stays what it is.
        args: Its positional arguments, activations as nodes.
        kwargs: Its other arguments.
        rank: Axes of its first argument where that is known; only a slice needs them.

    Returns:
        The kind of node, its target, and the arguments.
    """
    args, kwargs = tuple(args), dict(kwargs)
    same = ("call_function", target, args, kwargs)
    if target is operator.getitem:
        return _first_result(*args) or same
    if not isinstance(target, OpOverload) or target.namespace != "aten":
        return same
    name = name_of(target)
    match name:
        case "sym_size":
            return "call_method", "size", args, kwargs
        case "lift_fresh_copy" | "lift_fresh":
            return "call_function", torch.clone, args, kwargs
        case "slice":
            return _slice(args, rank) if rank is not None and not kwargs else same
        case "index" | "_unsafe_index" if len(args) == 2 and all(map(_is_index, args[1])):
            # torch.Tensor.index is something else.
            index = tuple(slice(None) if axis is None else axis for axis in args[1])
            return "call_function", operator.getitem, (args[0], index), {}
        case "index":
            return same
        case "convolution" if len(args) == 9:
            return _convolution(*args)
    if name.endswith("_") and hasattr(Tensor, name) and not name.endswith("__"):
        return "call_method", name, args, kwargs
    function = _function(name, target, len(args))
    if function is not None:
        return "call_function", function, args, kwargs
    if hasattr(Tensor, name) and not name.startswith("_") and args and isinstance(args[0], (Node, Tensor)):
        return "call_method", name, args, kwargs
    return same


def _slice(args: tuple[Any, ...], rank: int) -> Said:
    given: list[Any] = [*args, *(0, None, None, 1)[len(args) - 1 :]]
    source, axis, start, stop, step = given
    stop = None if isinstance(stop, int) and stop >= 2**62 else stop
    everything = (slice(None),) * (axis % rank)
    return "call_function", operator.getitem, (source, (*everything, slice(start, stop, step))), {}


def _is_index(axis: Any) -> bool:
    return axis is None or isinstance(axis, (Node, Tensor))


def _convolution(
    x: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, transposed: Any, growth: Any, groups: Any
) -> Said:
    """A convolution of any kind, as decomposed programs have it."""
    if not transposed:
        function = getattr(torch, f"conv{len(stride)}d")
        return "call_function", function, (x, weight, bias, stride, padding, dilation, groups), {}
    function = getattr(torch, f"conv_transpose{len(stride)}d")
    return "call_function", function, (x, weight, bias, stride, padding, growth, groups, dilation), {}


def _first_result(operation: Any, index: Any) -> Said | None:
    """What takes the first result of a decomposed norm, as the norm; the others, its statistics, are empty."""
    if not isinstance(operation, Node) or not isinstance(operation.target, OpOverload) or index != 0:
        return None
    if operation.target is not torch.ops.aten._native_batch_norm_legit_no_training.default or operation.kwargs:
        return None
    x, weight, bias, mean, variance, momentum, eps = operation.args
    return "call_function", torch.batch_norm, (x, weight, bias, mean, variance, False, momentum, eps, False), {}


def _function(name: str, overload: OpOverload, given: int) -> Any:
    """torch's own function with the arguments of an ATen operator."""
    function = getattr(torch, name, None)
    if inspect.isbuiltin(function) and not name.startswith("_"):
        return function
    functional = getattr(F, name, None)
    if inspect.isbuiltin(functional):
        return functional
    if functional is not None:
        names = [argument.name for argument in overload._schema.arguments[:given]]
        taken = list(inspect.signature(functional).parameters)[:given]
        if taken == ["input" if argument == "self" else argument for argument in names]:
            return functional
    return None

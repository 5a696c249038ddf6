"""Constants that meet activations where torch does not expect them.

While a model is traced, parameters are tensors and activations are proxies. Where a tensor and a proxy meet as
tensors, torch asks the proxy. Where the proxy stands for a number, as in ``token.expand(x.shape[0], -1, -1)``,
``torch.zeros(x.shape[0], 1)`` or ``F.interpolate(position, size=x.shape[2:])``, it does not ask, and fails. While
tracing, these calls look at their arguments first, and are recorded when there is a proxy among them.
"""

from __future__ import annotations

import builtins
import functools
import math
import operator
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.proxy import Proxy

_METHODS = """chunk expand flatten narrow new_empty new_full new_ones new_zeros permute repeat
repeat_interleave reshape roll select split sum tile to transpose unflatten unfold unsqueeze view""".split()
_FACTORIES = "arange empty eye full linspace ones rand randn scalar_tensor tensor zeros".split()
_FUNCTIONS: list[tuple[Any, str]] = [
    *((torch, name) for name in _FACTORIES),
    *((torch, name) for name in "broadcast_to narrow reshape roll tile unflatten".split()),
    *((F, name) for name in "adaptive_avg_pool1d adaptive_avg_pool2d interpolate pad".split()),
    # Arithmetic on sizes, such as that of TensorFlow's SAME padding.
    *((math, name) for name in "ceil floor prod sqrt trunc".split()),
    *((builtins, name) for name in ("max", "min")),
]
FACTORIES = frozenset(_FACTORIES)

# Records a call and returns its proxy; takes the kind of node, the target, and the arguments.
Record = Callable[[str, Any, tuple[Any, ...], dict[str, Any]], Any]


@contextmanager
def meeting_activations(record: Record) -> Iterator[None]:
    """Record calls on constants whose other arguments are activations.

    Args:
        record: Makes a node of the graph, as ``torch.fx.Tracer.create_proxy`` does.
    """
    # torch looks its own functions up once, and must not find ours.
    torch.overrides.get_overridable_functions()
    with ExitStack() as stack:
        for name in _METHODS:
            asking = _asking(record, "call_method", name, getattr(Tensor, name))
            stack.enter_context(_replaced(Tensor, name, asking))
        index = _asking(record, "call_function", operator.getitem, Tensor.__getitem__)
        stack.enter_context(_replaced(Tensor, "__getitem__", index))
        for owner, name in _FUNCTIONS:
            function = getattr(owner, name)
            stack.enter_context(_replaced(owner, name, _asking(record, "call_function", function, function)))
        yield


def is_python(function: Any) -> bool:
    """Whether a function is one of Python's own, which makes numbers of numbers."""
    return getattr(function, "__module__", None) in ("math", "builtins")


def _asking(record: Record, kind: str, target: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, unless there is an activation among its arguments that torch would not notice."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if has_activation(args) or has_activation(kwargs):
            return record(kind, target, args, kwargs)
        return function(*args, **kwargs)

    return call


def is_activation(value: Any) -> bool:
    """Whether a value is a proxy; asking for its class would be asking the tracer."""
    return issubclass(type(value), Proxy)


def has_activation(value: Any) -> bool:
    """Whether there is a proxy in nested tuples, lists, dicts and slices."""
    if isinstance(type(value), type) and is_activation(value):
        return True
    if type(value) is slice:
        return any(map(is_activation, (value.start, value.stop, value.step)))
    if isinstance(value, (tuple, list)):
        return any(map(has_activation, value))
    return isinstance(value, dict) and any(map(has_activation, value.values()))


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute for a while; what was inherited is inherited again."""
    own = name in vars(owner)
    before = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)

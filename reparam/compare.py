"""Two models on the same inputs: how far apart their outputs are, and whether that is rounding."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from reparam.errors import VerificationError
from reparam.report import Comparison

Call: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]

# Units in the last place of the largest magnitude on the way by which two orders of adding may differ.
_UNITS = 4

# What rounding may add up to over a whole network, relative to the largest output.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 5e-2, torch.bfloat16: 2e-1} | {
    torch.complex128: 1e-9,
    torch.complex64: 1e-4,
}


def verify(a: nn.Module, b: nn.Module, inputs: Any, *, tolerance: float | None = None) -> Comparison:
    """Run two models on the same inputs and compare everything that they return.

    Both run in eval mode, without gradients, and are left in the mode they were in.

    Args:
        a: The reference.
        b: What must agree with it.
        inputs: A tensor, a tuple of positional arguments, or a dict of keyword arguments.
        tolerance: Largest absolute difference allowed, relative to the largest magnitude in the reference's output.
            Left out: 1e-9 in float64, 1e-4 in float32, 5e-2 in float16, 2e-1 in bfloat16.

    Returns:
        What was measured.

    Raises:
        VerificationError: They disagree by more than the tolerance, or return different structures.
    """
    args, kwargs = as_call(inputs)
    return compare(run(a, args, kwargs), run(b, args, kwargs), tolerance)


def as_call(inputs: Any) -> Call:
    """Example inputs, as people write them, as arguments of a call."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, (tuple, list)):
        return tuple(inputs), {}
    return (inputs,), {}


def with_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Arguments with other tensors in the place of theirs; what is one tensor twice is one twice."""
    made: dict[int, Tensor] = {}

    def changed(x: Tensor) -> Tensor:
        if id(x) not in made:
            made[id(x)] = change(x)
        return made[id(x)]

    return torch.utils._pytree.tree_map_only(Tensor, changed, value)


def clones(value: Any) -> Any:
    """Arguments on copies of their tensors."""
    return with_tensors(value, torch.clone)


def run(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What a model returns in eval mode, on copies of the arguments; its own modes are put back."""
    in_training = [module for module in model.modules() if module.training]
    args, kwargs = clones((tuple(args), dict(kwargs)))
    try:
        for module in in_training:
            module.training = False
        with torch.no_grad():
            return model(*args, **kwargs)
    finally:
        for module in in_training:
            module.training = True


def compare(expected: Any, actual: Any, tolerance: float | None = None, *, scale: float = 0.0) -> Comparison:
    """Compare two outputs of any structure.

    Args:
        expected: The reference.
        actual: What must agree with it.
        tolerance: Allowed largest difference, relative to the largest magnitude in a reference tensor; that of its
            type when left out.
        scale: Largest magnitude on the way to the outputs, where known. Terms that cancel leave their rounding behind,
            and another one in every order: a few units in the last place of this magnitude are no difference.

    Raises:
        VerificationError: They disagree.
    """
    reference, structure = torch.utils._pytree.tree_flatten(_plain(expected))
    result, other = torch.utils._pytree.tree_flatten(_plain(actual))
    if structure != other:
        raise VerificationError(f"the models return different structures: {structure} and {other}")
    largest, allowed, tensors = 0.0, tolerance or 0.0, 0
    for x, y in zip(reference, result, strict=True):
        if not isinstance(x, Tensor) or not isinstance(y, Tensor):
            if type(x) is not type(y) or x != y:
                raise VerificationError(f"the models return different values: {x!r} and {y!r}")
            continue
        if x.shape != y.shape or x.dtype != y.dtype:
            raise VerificationError(
                f"the models return different tensors: {tuple(x.shape)} of {x.dtype} and {tuple(y.shape)} of {y.dtype}"
            )
        tensors += 1
        if not _is_rounding(x, y, scale):
            largest = max(largest, relative_error(x, y))
        if tolerance is None:
            allowed = max(allowed, TOLERANCES.get(x.dtype, 0.0))
    comparison = Comparison(largest, allowed, tensors)
    if not largest <= allowed:
        raise VerificationError(f"the models disagree: {comparison}", comparison)
    return comparison


def _plain(value: Any) -> Any:
    """A graph returns a plain dict where a model may have returned a subclass of one."""
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        items = [_plain(item) for item in value]
        return items if isinstance(value, list) else tuple(items)
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if callable(value) and not isinstance(value, nn.Module):
        return getattr(value, "__qualname__", type(value).__qualname__)  # two copies of a function are equal
    if hasattr(value, "__dict__") and not isinstance(value, (Tensor, nn.Module, type)):
        return {name: _plain(item) for name, item in vars(value).items()}
    return value


def _is_rounding(x: Tensor, y: Tensor, scale: float) -> bool:
    """Whether two tensors differ by no more than what rounding leaves of terms of some magnitude."""
    if not scale or not x.is_floating_point() or not x.numel():
        return False
    return float((x - y.to(x.device)).abs().max()) <= _UNITS * torch.finfo(x.dtype).eps * scale


class LargestMagnitude(TorchDispatchMode):
    """Notes the largest magnitude that any operation returns.

    Attributes:
        value: That magnitude so far.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.value = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.numel():
                self.value = max(self.value, magnitude_of(tensor))
        return result


def magnitude_of(tensor: Tensor) -> float:
    """The largest finite magnitude in a tensor."""
    largest = tensor.abs().max().item() if tensor.numel() else 0.0
    if math.isfinite(largest):
        return largest
    finite = torch.isfinite(tensor)
    return tensor[finite].abs().max().item() if finite.any() else 0.0


def relative_error(reference: Tensor, result: Tensor, magnitude: float = 0.0) -> float:
    """Largest absolute difference over the largest magnitude, or a given larger one; nan or inf must match in place."""
    if reference.numel() == 0:
        return 0.0
    x, y = reference.detach(), result.detach().to(reference.device)
    if x.is_complex():
        x, y = torch.view_as_real(x.resolve_conj()), torch.view_as_real(y.resolve_conj())
    x, y = x.double(), y.double()
    if x.shape == y.shape and math.isfinite(difference := (x - y).abs().max().item()):
        return _ratio(difference, max(magnitude, magnitude_of(x)))  # and so are all numbers in both
    finite = torch.isfinite(x)
    if not torch.equal(finite, torch.isfinite(y)) or not torch.equal(x[~finite].nan_to_num(), y[~finite].nan_to_num()):
        return float("inf")
    if not finite.any():
        return 0.0
    return _ratio((x[finite] - y[finite]).abs().max().item(), max(magnitude, magnitude_of(x)))


def _ratio(difference: float, scale: float) -> float:
    return difference / scale if scale > 0 else (0.0 if difference == 0 else float("inf"))

"""Example inputs, made for a model of one tensor that none were given for."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.fx
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from reparam.capture.copies import tensors_in
from reparam.capture.state import unchanged

Item = TypeVar("Item")

# Sizes that are tried, from small to large, by number of axes behind the channels. Batches are of two: one that does
# not broadcast, and is not taken for a setting.
_SIZES: dict[int, list[tuple[int, ...]]] = {
    -1: [(), (16,), (8, 8)],
    0: [()],
    1: [(64,), (16,), (256,)],
    2: [(64, 64), (32, 32), (224, 224), (128, 128), (256, 256), (384, 384), (28, 28), (16, 16), (8, 8)],
    3: [(16, 32, 32), (32, 64, 64), (8, 8, 8)],
}
_MOST = 40


def inputs_of(model: nn.Module) -> list[str]:
    """Names of the arguments that a call has to give; the first one alone where all may be left out."""
    parameters = [p for p in inspect.signature(model.forward).parameters.values() if p.kind is not p.VAR_KEYWORD]
    named = [p for p in parameters if p.kind is not p.VAR_POSITIONAL]
    required = [p.name for p in named if p.default is p.empty]
    return required or [p.name for p in named[:1]] or [p.name for p in parameters[:1]]


def guesses(model: nn.Module) -> Iterator[Tensor]:
    """Random inputs that a model might take: of the channels of its first layers, of several sizes."""
    tensors = [tensor for module in model.modules() for _, tensor in tensors_in(module)]
    floating = [tensor for tensor in tensors if tensor.is_floating_point() or tensor.is_complex()]
    like = next((tensor for tensor in floating if isinstance(tensor, nn.Parameter)), [*floating, torch.empty(0)][0])
    known, rank = _shape_known(model), _rank_known(model)
    shapes = itertools.chain([] if known is None else [known], _shapes(model, inputs_of(model)))
    fitting = (shape for shape in shapes if rank is None or len(shape) == rank)
    for shape in itertools.islice(_different(fitting), _MOST):
        generator = torch.Generator().manual_seed(0)
        yield torch.randn(
            shape, generator=generator, dtype=torch.complex128 if like.is_complex() else torch.float64
        ).to(like.device, like.dtype)


def _different(items: Iterable[Item]) -> Iterator[Item]:
    """Every item once, found out no earlier than it is asked for."""
    seen = set()
    for item in items:
        if item not in seen:
            seen.add(item)
            yield item


def _shapes(model: nn.Module, names: Sequence[str]) -> Iterator[tuple[int, ...]]:
    if next(_wanted(model), None) == (2, 3):
        yield 2, 3, 64, 64  # images: running the model shows whether it takes some
    first = _first_read(model, len(names))
    wanted: Iterator[tuple[int, int]] = itertools.islice(_different(_wanted(model)), 6)
    if first is None:
        wanted = iter([*wanted] or [(2, 3), (0, 3)])
    else:
        wanted = itertools.chain([first], (other for other in wanted if other[0] == first[0]))
    for axes, channels in wanted:
        for sizes in _SIZES[max(axes, -1)]:
            yield (2, channels, *sizes) if axes >= 0 else (2, *sizes, channels)


def _shape_known(model: nn.Module) -> tuple[int, ...] | None:
    """The shape of the input of a graph that was made for one, as that of an exported program."""
    graph = model.graph if isinstance(model, torch.fx.GraphModule) else None
    values = [node.meta.get("val") for node in graph.nodes if node.op == "placeholder"] if graph is not None else []
    shape = values[0].shape if len(values) == 1 and isinstance(values[0], Tensor) else None
    return None if shape is None else tuple(size if isinstance(size, int) else size.node.hint for size in shape)


def _rank_known(model: nn.Module) -> int | None:
    """Axes of the input that a model was compiled for before."""
    arguments = getattr(model, "meta", {}).get("arguments", ()) if isinstance(model, torch.fx.GraphModule) else ()
    ranks = {argument.kind[1] for argument in arguments if argument.kind[0] == "tensor"}
    return ranks.pop() if len(ranks) == 1 else None


class _FoundError(Exception):
    """The first layer was reached."""


class _FirstLayer(TorchFunctionMode):
    """Stops at the first layer that is called.

    Attributes:
        found: Axes behind the channels (-1 where the last one holds the features), channels that the layer wants, and
            channels that it was given.
    """

    found: tuple[int, int, int] | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = str(getattr(func, "__name__", ""))
        x, weight = [*args, *kwargs.values(), None, None][:2]
        if name.startswith("conv") and isinstance(weight, Tensor) and weight.dim() > 2:
            transposed = name.startswith("conv_transpose")
            groups = kwargs.get("groups", args[6 - transposed] if len(args) > 6 - transposed else 1)
            wanted = weight.shape[0] if transposed else weight.shape[1] * groups
            self.found = weight.dim() - 2, wanted, x.shape[1] if x.dim() > 1 else wanted
        elif name == "linear" and isinstance(weight, Tensor):
            self.found = -1, weight.shape[1], x.shape[-1]
        elif name == "batch_norm" and isinstance(weight, Tensor):
            self.found = x.dim() - 2, len(weight), x.shape[1]
        if self.found is not None:
            raise _FoundError
        return func(*args, **kwargs)


def _first_read(model: nn.Module, arguments: int) -> tuple[int, int] | None:
    """Axes and channels of the input, as the first layer reads it."""
    for shape in ((2, 3, 64, 64), (2, 3, 64), (2, 3, 16, 32, 32), (2, 64)):
        try:
            with unchanged(model), torch.no_grad(), _FirstLayer() as watched:
                model.forward(*(torch.zeros(shape) for _ in range(arguments)))
        except Exception:
            if watched.found is not None:
                axes, wanted, given = watched.found
                scale = wanted * (shape[1] if axes >= 0 else shape[-1])
                return axes, scale // given if given and scale % given == 0 else wanted
    return None


def _wanted(model: nn.Module) -> Iterator[tuple[int, int]]:
    """Axes behind the channels, and channels, that layers read; -1 axes where the last one holds the features."""
    for module in model.modules():
        name = type(module).__name__
        match module:
            case nn.modules.conv._ConvNd():
                yield module.weight.dim() - 2, module.in_channels
            case nn.BatchNorm1d():
                yield 1, module.num_features
                yield 0, module.num_features
            case nn.modules.batchnorm._NormBase():
                yield int(name[-2]) if name[-2:-1] in ("1", "2", "3") else 2, module.num_features
            case nn.Linear():
                yield -1, module.in_features
            case nn.LayerNorm():
                yield -1, int(module.normalized_shape[-1])
            case nn.GroupNorm():
                yield 2, module.num_channels
    for module in model.modules():
        for _, tensor in tensors_in(module):
            if tensor.dim() >= 3 and all(size == 1 for size in tensor.shape[-2:]):
                yield 2, max(tensor.shape)
            elif tensor.dim() >= 3:
                yield min(tensor.dim() - 2, 2), max(tensor.shape[:2])
            elif tensor.dim() == 1 and len(tensor) > 1:
                yield 2, len(tensor)
                yield -1, len(tensor)

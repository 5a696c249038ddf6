"""Models as exported programs, with the axes free that should be, and random inputs to try them on."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind

from reparam.errors import ExportError, reason
from reparam.targets.target import half as halved
from reparam.targets.target import quiet

LARGEST_BATCH = 8
LARGEST_GROWTH = 2
_AXES = {3: ("length",), 4: ("height", "width"), 5: ("depth", "height", "width")}


@dataclass(frozen=True)
class Axes:
    """Which axes of the inputs are free: the first one, and those that images are large along.

    Attributes:
        batch: Axis 0 of every input that is as long there as the first one is.
        size: Axes 2 and on of every floating-point input of rank 3 to 5.
        bounded: Whether a free axis has a largest size, for runtimes that plan their memory ahead: batches of
            :data:`LARGEST_BATCH`, and :data:`LARGEST_GROWTH` times the example's size.
    """

    batch: bool
    size: bool
    bounded: bool = False

    def of(self, inputs: tuple[Tensor, ...]) -> list[dict[int, str]]:
        """The names of the free axes of each input."""
        batch = inputs[0].shape[:1]
        return [
            ({0: "batch"} if self.batch and x.dim() and x.shape[:1] == batch else {})
            | (dict(enumerate(_AXES.get(x.dim(), ()), start=2)) if self.size and x.is_floating_point() else {})
            for x in inputs
        ]

    def examples(self, inputs: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
        """Random inputs of several sizes: batches of one and three, images twice as large."""
        batch = inputs[0].shape[0] if inputs[0].dim() else 1
        batches = (1, 3) if self.batch else (batch,)
        found = [self._sized(inputs, size, 1) for size in batches]
        return [*found, self._sized(inputs, batches[0], LARGEST_GROWTH)] if self.size else found

    def _sized(self, inputs: tuple[Tensor, ...], batch: int, factor: int) -> tuple[Tensor, ...]:
        shapes = [list(x.shape) for x in inputs]
        for shape, axes in zip(shapes, self.of(inputs), strict=True):
            for axis in axes:
                shape[axis] = batch if axis == 0 else factor * shape[axis]
        generator = torch.Generator().manual_seed(batch)
        return tuple(_random(x, shape, generator) for x, shape in zip(inputs, shapes, strict=True))

    def capture(self, model: nn.Module, inputs: tuple[Tensor, ...]) -> ExportedProgram:
        """Export a model with these axes free.

        Raises:
            ExportError: PyTorch cannot export it, or one of the axes turns out not to be free.
        """
        names = self.of(inputs)
        # A size of one would be taken for a constant.
        inputs = self._sized(inputs, 2, 1) if self.batch else inputs
        batch = Dim("batch", min=1, max=LARGEST_BATCH) if self.bounded else Dim("batch")
        # The sizes that a model takes may depend on each other, or be multiples of something, which AUTO finds out.
        size: Any = Dim.AUTO
        shapes: Any = tuple(
            {
                axis: batch if axis == 0 else size(max=LARGEST_GROWTH * x.shape[axis]) if self.bounded else size
                for axis in axes
            }
            for x, axes in zip(inputs, names, strict=True)
        )
        try:
            with quiet(), torch.no_grad():
                program = torch.export.export(model, inputs, dynamic_shapes=shapes if any(shapes) else None)
        except Exception as error:  # whatever the model's Python, or export itself, raises
            raise ExportError(
                f"torch.export cannot capture the model ({reason(error)}); export what reparam.compile made of it, or "
                "the part of it that computes on tensors alone"
            ) from error
        for value, axes in zip(input_shapes(program).values(), names, strict=True):
            for axis, name in axes.items():
                size = value[axis] if isinstance(value[axis], int) else value[axis].node.maybe_as_int()
                if size is not None:
                    raise ExportError(f"the model takes one {name} only, {size}")
        return program


def _random(value: Tensor, shape: list[int], generator: torch.Generator) -> Tensor:
    """Normal noise for floating-point inputs, the example's own rows for others."""
    if value.is_floating_point():
        return torch.randn(shape, generator=generator).to(value)
    return value[torch.arange(shape[0]) % value.shape[0]] if value.dim() else value


def input_shapes(program: ExportedProgram) -> dict[str, list[Any]]:
    """The shape of every input by its name; a free size is symbolic."""
    names = [spec.arg.name for spec in program.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT]
    values = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"}
    return {name: list(values[name].shape) for name in names}


def axis_names(program: ExportedProgram) -> dict[str, str]:
    """A name for every symbol in the shapes of a program's inputs, such as ``batch`` for ``s77``."""
    names: dict[str, str] = {}
    for shape in input_shapes(program).values():
        labels = ("batch", "channels", *_AXES.get(len(shape), ()))
        for axis, size in enumerate(shape):
            for symbol in () if isinstance(size, int) else size.node.expr.free_symbols:
                name = labels[axis] if axis < len(labels) else f"size_{axis}"
                taken = sum(other.split("_")[0] == name for other in names.values())
                names.setdefault(str(symbol), f"{name}_{taken + 1}" if taken else name)
    return names


def operators_of(program: ExportedProgram) -> Counter[str]:
    """How often a program calls each of ATen's operators."""
    calls = (node.target for node in program.graph.nodes if node.op == "call_function")
    return Counter(str(getattr(target, "overloadpacket", target)).removeprefix("aten.") for target in calls)


def in_order(model: nn.Module) -> nn.Module:
    """The model, or a copy, with every tensor laid out in the order of its axes, whatever PyTorch is quicker with.

    Raises:
        ExportError: The model cannot be copied.
    """
    if all(tensor.is_contiguous() for tensor in (*model.parameters(), *model.buffers())):
        return model
    model = _copied(model)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.contiguous()
    return model


def in_half(model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A copy of a model that computes in half precision, and its inputs.

    Raises:
        ExportError: The model cannot be copied.
    """
    return _copied(model).half(), tuple(map(halved, inputs))


def _copied(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:  # whatever a model's own copying raises
        raise ExportError(f"the model cannot be copied, as this export needs: {reason(error)}") from error

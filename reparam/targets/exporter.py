"""One way to every target: captured, written, run in the target's own runtime, compared, and only then put in place."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn
from torch.export import ExportedProgram

from reparam.atomic import atomic_writes
from reparam.compare import run
from reparam.deploy.model import with_plain_outputs
from reparam.errors import ExportError, ReparamError, VerificationError, reason
from reparam.report import Comparison
from reparam.targets.image import ImageInput
from reparam.targets.program import Axes, in_half, in_order, input_shapes
from reparam.targets.registry import target_of
from reparam.targets.target import Options, Target, Written, quiet

Progress = Callable[[int | None, int | None, str], object]


@dataclass(frozen=True)
class Exported:
    """What :func:`export` wrote.

    Attributes:
        path: The file, or the folder that is one.
        files: All files, ``path`` first.
        target: Name of the target, such as ``openvino``.
        runtime: What it was written for and compared in, with the version.
        precision: Of the weights, such as ``float16``.
        inputs: The shape of every input by its name; a free axis has a name instead of a size.
        operators: How often each operator occurs in the graph, under the target's own names.
        comparison: The model and the written one on the same random inputs; for Core ML, which runs on Apple's
            systems only, the weights of both.
        ran: Whether the written model was run for this comparison.
        details: What only this target has, such as the ``opset`` of ONNX.
    """

    path: Path
    files: tuple[Path, ...]
    target: str
    runtime: str
    precision: str
    inputs: dict[str, tuple[int | str, ...]]
    operators: dict[str, int]
    comparison: Comparison
    ran: bool = True
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def dynamic_batch(self) -> bool:
        """Whether it takes any batch size, or only that of the example inputs."""
        return any("batch" in shape for shape in self.inputs.values())

    @property
    def size(self) -> int:
        """Bytes in all files."""
        found = [item for path in self.files for item in ([path] if path.is_file() else path.rglob("*"))]
        return sum(item.stat().st_size for item in found if item.is_file())

    def __str__(self) -> str:
        compared = f"run in {self.runtime}" if self.ran else f"weights as {self.runtime} wrote them"
        return f"{self.path}: {self.target}, {self.precision}, {compared}: {self.comparison}"


def export(
    model: nn.Module,
    path: str | Path,
    example_inputs: Tensor | tuple[Tensor, ...],
    *,
    target: str | None = None,
    opset: int | None = None,
    dynamic_batch: bool | None = None,
    dynamic_size: bool = False,
    half: bool = False,
    image: ImageInput | None = None,
    tolerance: float | None = None,
    progress: Progress | None = None,
) -> Exported:
    """Write a model for a runtime: ONNX, OpenVINO, ExecuTorch, Core ML, ``torch.export`` or AOTInductor.

    What was written is run in the runtime itself on random inputs, of several sizes where these are free, and compared
    with the model. Only then the file appears; whatever fails leaves nothing behind, and an older file as it was.

    Args:
        model: Any module in eval mode, such as what :func:`reparam.compile` returned.
        path: Where to. The suffix says which target: ``.onnx``, ``.xml`` (with a ``.bin`` beside it), ``.pte``,
            ``.mlpackage``, ``.pt2``, or ``.aoti.pt2``.
        example_inputs: A tensor, or a tuple with one for every argument of ``forward``; batch axis first.
        target: Name of the target, where the suffix should not decide: ``aotinductor`` for a plain ``.pt2``.
        opset: Version of the ONNX operator set; None for the exporter's default.
        dynamic_batch: Whether axis 0 takes any size. Left out, it is tried, and the example's size is the only one
            where that fails; for ExecuTorch and Core ML, which pay for it, it is not tried.
        dynamic_size: Whether the axes after the channels take any size. That the model allows it is not for granted.
        half: Half precision: OpenVINO and Core ML store weights as such, and read float32; for all others the model
            computes in float16, and reads it.
        image: For Core ML: read an image, and normalise its pixels inside of the model.
        tolerance: Allowed largest difference, relative to the largest magnitude in the model's output. Left out: 1e-4
            in float32, and 5e-2 with ``half``.
        progress: Called with steps done, steps in all, and what is being done.

    Returns:
        What was written, and how exactly it agrees.

    Raises:
        ExportError: The target, or an option, is unknown; an optional package is missing, and the message has the
            command that installs it; the file cannot be written; or PyTorch or the target cannot express the model.
        VerificationError: The runtime computes something else.
    """
    path = Path(path)
    chosen = target_of(path, target)
    options = Options(opset, half, image, tolerance)
    _check_options(chosen, options)
    chosen.check_destination(path)
    chosen.require()
    inputs = _as_tensors(example_inputs)
    if model.training:
        raise ExportError("the model is in training mode; call its eval() first")
    if isinstance(model, torch.fx.GraphModule):
        model = with_plain_outputs(model)
    if image is not None:
        model = image.fold(model, inputs[0])
    job = _Job(chosen, model, path, inputs, options, progress or (lambda done, total, label: None))
    wanted = chosen.batch_by_default if dynamic_batch is None else dynamic_batch
    if wanted and dynamic_batch is None:
        with contextlib.suppress(ExportError):  # the batch of the example may do
            return job.run(Axes(True, dynamic_size, chosen.bounded))
        wanted = False
    return job.run(Axes(wanted, dynamic_size, chosen.bounded))


@dataclass(frozen=True)
class _Job:
    """One model on its way to one file."""

    target: Target
    model: nn.Module
    path: Path
    inputs: tuple[Tensor, ...]
    options: Options
    progress: Progress

    def run(self, axes: Axes) -> Exported:
        """Write it with these axes free."""
        model, inputs, batches = self.model, self.inputs, axes.examples(self.inputs)
        self.progress(0, 3, "capturing")
        for batch in batches:
            _check_takes(model, batch)
        if self.options.half and self.target.half == "model":
            model, inputs = in_half(model, inputs)
        if self.target.in_order:
            model = in_order(model)
        program = axes.capture(model, inputs)
        shapes = _named_shapes(program, axes, inputs)
        with atomic_writes(self.path, companions=self.target.companions) as path:
            self.progress(1, 3, f"writing for {self.target.title}")
            written = self._write(program, path)
            self.progress(2, 3, f"comparing in {self.target.title}")
            comparison = self._check(path, program, batches)
        self.progress(3, 3, "done")
        return Exported(
            self.path,
            self.target.files(self.path),
            self.target.name,
            self.target.version(),
            "float16" if self.options.half else _precision(self.model, self.inputs),
            shapes,
            dict(written.operators.most_common()),
            comparison,
            self.target.runs_here,
            written.details,
        )

    def _write(self, program: ExportedProgram, path: Path) -> Written:
        try:
            with quiet(), torch.no_grad():
                return self.target.write(program, path, self.options)
        except (ReparamError, OSError):
            raise
        except Exception as error:  # converters raise anything
            raise ExportError(f"{self.target.title} cannot express the model: {reason(error)}") from error

    def _check(self, path: Path, program: ExportedProgram, batches: list[tuple[Tensor, ...]]) -> Comparison:
        try:
            return self.target.check(path, self.model, program, batches, self.options)
        except VerificationError as error:
            raise VerificationError(
                f"{self.target.title} and PyTorch: {error}; nothing was written", error.comparison
            ) from error
        except ReparamError:
            raise
        except Exception as error:  # what PyTorch raises where a graph does not take the inputs after all
            raise ExportError(f"{self.target.title} cannot run the model: {reason(error)}") from error


def _check_takes(model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Refuse sizes that the model itself does not take; export may well believe that it does."""
    try:
        run(model, inputs, {})
    except Exception as error:  # whatever the model raises
        shapes = " and ".join("x".join(map(str, x.shape)) for x in inputs)
        raise ExportError(f"the model itself cannot be run on inputs of {shapes}: {reason(error)}") from error


def _check_options(target: Target, options: Options) -> None:
    for name in ("opset", "image"):
        if getattr(options, name) is not None and name not in target.options:
            raise ExportError(f"{target.title} has no option {name}; leave it out")


def _as_tensors(example_inputs: Any) -> tuple[Tensor, ...]:
    inputs = tuple(example_inputs) if isinstance(example_inputs, (tuple, list)) else (example_inputs,)
    if not inputs or not all(isinstance(value, Tensor) for value in inputs):
        kinds = ", ".join(type(value).__name__ for value in inputs) or "nothing"
        raise ExportError(f"example_inputs must be a tensor, or a tuple of tensors, not {kinds}")
    return inputs


def _named_shapes(program: ExportedProgram, axes: Axes, inputs: tuple[Tensor, ...]) -> dict[str, tuple[int | str, ...]]:
    return {
        name: tuple(named.get(axis, size) for axis, size in enumerate(shape))
        for (name, shape), named in zip(input_shapes(program).items(), axes.of(inputs), strict=True)
    }


def _precision(model: nn.Module, inputs: tuple[Tensor, ...]) -> str:
    tensors = (*model.parameters(), *model.buffers(), *inputs)
    return next((str(x.dtype).removeprefix("torch.") for x in tensors if x.is_floating_point()), "float32")

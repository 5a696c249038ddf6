"""Compiled models as ONNX: exported, checked, simplified, and compared with PyTorch in onnxruntime before written."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from reparam.errors import ExportError, VerificationError
from reparam.report import Comparison
from reparam.storage import atomic_write, check_destination
from reparam.verify import verify

_PACKAGES = ("onnx", "onnxscript", "onnxsim", "onnxruntime")


@dataclass(frozen=True)
class Exported:
    """What :func:`export_onnx` wrote.

    Attributes:
        path: The file.
        opset: Version of the ONNX operator set that it uses.
        nodes: Operators in its graph.
        dynamic_batch: Whether it takes any batch size, or only that of the example inputs.
        simplified: Whether onnxsim could simplify it.
        comparison: PyTorch and onnxruntime on the same random inputs.
    """

    path: Path
    opset: int
    nodes: int
    dynamic_batch: bool
    simplified: bool
    comparison: Comparison


class OnnxModel(nn.Module):
    """An ONNX model, run by onnxruntime on the CPU, called like the PyTorch model it was made from.

    It returns the list of its outputs; :class:`Flat` makes any model do so.

    Args:
        source: An ``.onnx`` file, or its bytes.

    Raises:
        ExportError: onnxruntime is not installed, or cannot load the model.
    """

    def __init__(self, source: str | Path | bytes) -> None:
        super().__init__()
        onnxruntime = _require("onnxruntime")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if not isinstance(source, bytes) and not Path(source).is_file():
            raise ExportError(f"{source}: no such file")
        data = source if isinstance(source, bytes) else str(source)
        try:
            self._session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's exceptions share no base but Exception
            name = "the exported model" if isinstance(source, bytes) else source
            raise ExportError(f"{name}: onnxruntime cannot load it: {str(error).splitlines()[0]}") from error

    @property
    def input_shape(self) -> tuple[int, ...] | None:
        """Shape of the first input without its batch axis, or None where it is not fixed."""
        shape = self._session.get_inputs()[0].shape[1:]
        return tuple(shape) if all(isinstance(size, int) for size in shape) else None

    @property
    def fixed_batch(self) -> int | None:
        """The only batch size that the model takes, or None where it takes any."""
        batch = self._session.get_inputs()[0].shape[0]
        return batch if isinstance(batch, int) else None

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        """Run the session.

        Raises:
            ExportError: onnxruntime refuses, such as for inputs of another shape.
        """
        names = [item.name for item in self._session.get_inputs()]
        feed = {name: value.detach().cpu().numpy() for name, value in zip(names, inputs, strict=True)}
        try:
            return [torch.from_numpy(value) for value in self._session.run(None, feed)]
        except Exception as error:
            raise ExportError(f"onnxruntime cannot run the model: {_reason(error)}") from error


class Flat(nn.Module):
    """A model whose outputs come as a list of tensors, whatever their structure: ONNX knows no other."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        """The model's output tensors, in order."""
        return [value for value in tree_leaves(self.model(*inputs)) if isinstance(value, Tensor)]


def export_onnx(
    model: nn.Module,
    path: str | Path,
    example_inputs: Tensor | tuple[Tensor, ...],
    *,
    opset: int | None = None,
    tolerance: float = 1e-4,
) -> Exported:
    """Write a model as ONNX, with a batch axis of any size where the model allows it.

    The file appears only after ``onnx.checker`` accepted the model, onnxsim simplified it, and onnxruntime computed
    the same outputs as PyTorch on random inputs of two batch sizes.

    Args:
        model: Any eval-mode module, such as what :func:`reparam.compile` returned.
        path: Where to.
        example_inputs: A tensor, or a tuple with one for every argument of ``forward``; batch axis first.
        opset: ONNX operator set version, None for the exporter's default.
        tolerance: Allowed largest difference, relative to the largest magnitude in the reference output.

    Raises:
        ExportError: An optional package is missing, or PyTorch cannot express the model in ONNX.
        VerificationError: onnxruntime computes something else.
    """
    path = Path(path)
    for package in _PACKAGES:
        _require(package)
    check_destination(path)
    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    with _quiet(), torch.no_grad():
        proto, dynamic = _to_onnx(model, inputs, opset)
        proto, simplified = _simplify(proto)
    data = _serialize(proto)
    batches = (1, 3) if dynamic else (inputs[0].shape[0],)
    comparison = _compare(model, OnnxModel(data), [_random_like(inputs, batch) for batch in batches], tolerance)
    with atomic_write(path) as temporary:
        temporary.write_bytes(data)
    version = next(item.version for item in proto.opset_import if item.domain in ("", "ai.onnx"))
    return Exported(path, version, len(proto.graph.node), dynamic, simplified, comparison)


def _to_onnx(model: nn.Module, inputs: tuple[Tensor, ...], opset: int | None) -> tuple[Any, bool]:
    """The model as a protobuf, and whether its batch axis is dynamic."""
    batch = torch.export.Dim("batch")
    attempts: list[tuple[tuple[Tensor, ...], Any]] = [
        (_random_like(inputs, 2), tuple({0: batch} for _ in inputs)),  # a batch of one would be taken for a constant
        (inputs, None),
    ]
    count = len(Flat(model)(*inputs))
    names = ["output"] if count == 1 else [f"output_{index}" for index in range(count)]
    for example, shapes in attempts:
        try:
            program = torch.onnx.export(
                model,
                example,
                dynamo=True,
                dynamic_shapes=shapes,
                opset_version=opset,
                output_names=names,
                verbose=False,
            )
        except Exception as error:  # the exporter raises anything
            failure = error
            continue
        assert program is not None
        # Where the model has one batch size only, the exporter fixes the axis without a word.
        first = [value.type.tensor_type.shape.dim[0] for value in program.model_proto.graph.input]
        dynamic = all(axis.HasField("dim_param") for axis in first)
        if dynamic or shapes is None:
            return program.model_proto, dynamic
    raise ExportError(f"PyTorch cannot express the model in ONNX: {_reason(failure)}") from failure


def _simplify(proto: Any) -> tuple[Any, bool]:
    """Check, simplify, and check again; what onnxsim cannot simplify is still a valid model."""
    import onnx
    import onnxsim

    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError) as error:
        raise ExportError(f"PyTorch exported an invalid ONNX model: {_reason(error)}") from error
    try:
        simplified, agrees = onnxsim.simplify(proto)
        onnx.checker.check_model(simplified, full_check=True)
    except Exception:  # onnxsim's C++ raises anything
        return proto, False
    return (simplified, True) if agrees else (proto, False)


def _serialize(proto: Any) -> bytes:
    try:
        return bytes(proto.SerializeToString())
    except ValueError as error:
        raise ExportError(
            f"the model is larger than the 2 GB that one .onnx file can hold ({_reason(error)})"
        ) from error


def _compare(model: nn.Module, exported: OnnxModel, batches: list[tuple[Tensor, ...]], tolerance: float) -> Comparison:
    try:
        found = [verify(Flat(model), exported, inputs, tolerance=tolerance) for inputs in batches]
    except VerificationError as error:
        raise VerificationError(f"onnxruntime and PyTorch: {error}; nothing was written", error.comparison) from error
    return max(found, key=lambda comparison: comparison.largest_error)


def _random_like(inputs: tuple[Tensor, ...], batch: int) -> tuple[Tensor, ...]:
    """Inputs of another batch size: normal noise for floating-point ones, the example's own rows for others."""
    generator = torch.Generator().manual_seed(batch)
    return tuple(
        torch.randn(batch, *value.shape[1:], generator=generator).to(value)
        if value.is_floating_point()
        else value[torch.arange(batch) % value.shape[0]]
        for value in inputs
    )


def _require(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ExportError(f'ONNX needs the package {package} ({error}): pip install "reparam[onnx]"') from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence what the exporters print, log and warn; what matters of it is raised."""
    previous = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        sink = io.StringIO()
        with contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)


def _reason(error: BaseException) -> str:
    """The first line of what went wrong underneath: the exporters wrap it several times."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" \t#=-")]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__

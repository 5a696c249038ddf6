"""Two ONNX models on the same random inputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx import reference
from onnx.reference.op_run import OpRun
from torch import Tensor

from reparam.compare import TOLERANCES, compare
from reparam.errors import ExportError, ReparamError, VerificationError
from reparam.onnx import shapes
from reparam.onnx.constants import DTYPES, to_numpy, to_torch
from reparam.report import Comparison
from reparam.targets.onnx import OnnxModel

Sizes: TypeAlias = dict[str, tuple[int, ...]]

BATCHES = (1, 3)
EXAMPLE_BATCH = 2
# Tried for free sizes that are no batch, such as those of images: the first that the model takes.
_FREE = (64, 224, 32, 256, 128, 16, 8, 1)


class BatchNormalization(OpRun):
    """Inference. The reference takes norms before operator set 14 for norms in training, unless told their momentum."""

    op_domain = ""

    def _run(self, x: Any, scale: Any, bias: Any, mean: Any, var: Any, epsilon: float = 1e-5, **_: Any) -> tuple[Any]:
        scale, bias, mean, var = (v.reshape(-1, *[1] * (x.ndim - 2)) for v in (scale, bias, mean, var))
        return ((scale * (x - mean) / np.sqrt(var + epsilon) + bias).astype(x.dtype),)


class Runner:
    """A model that can be run: in onnxruntime, or, where that has no kernels for it, in ONNX's reference.

    Args:
        source: A file, or its bytes.
        inputs: Names of its inputs.

    Attributes:
        name: What runs it.
        reason: Why that is not onnxruntime; empty when it is.

    Raises:
        ExportError: Neither can load it.
    """

    def __init__(self, source: Path | bytes, inputs: Sequence[str]) -> None:
        self.name, self.reason = "onnxruntime", ""
        self._inputs = inputs
        self._session: Any = None
        self._reference: Any = None
        try:
            self._session = OnnxModel(source)
        except ExportError as error:
            self.name, self.reason = "ONNX's reference implementation", str(error)
            try:
                proto = onnx.load_from_string(source) if isinstance(source, bytes) else onnx.load(source)
                old = any(of.domain in ("", "ai.onnx") and of.version < 14 for of in proto.opset_import)
                norms: list[type[OpRun]] = [BatchNormalization] if old else []
                self._reference = reference.ReferenceEvaluator(proto, new_ops=norms)
            except Exception:  # it raises whatever its operators do
                advice = "verify=False, or --no-verify, writes the result without comparing"
                raise ExportError(f"{error}; {advice}") from error

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """The outputs.

        Raises:
            ExportError: It does not run on these inputs.
        """
        if self._session is not None:
            found: list[Tensor] = self._session(*inputs)
            return found
        feed = {name: to_numpy(x) for name, x in zip(self._inputs, inputs, strict=True)}
        try:
            results = self._reference.run(None, feed)
        except Exception as error:
            raise ExportError(f"the model cannot be run: {type(error).__name__}: {error}") from error
        tensors = [to_torch(ir.tensor(np.asarray(result))) for result in results]
        return [tensor for tensor in tensors if tensor is not None]


def choose_sizes(model: ir.Model, input_size: Sequence[int] | None, reference: Runner | None) -> dict[int, Sizes]:
    """Sizes of all inputs for three batch sizes; the same where the batch is not free.

    Raises:
        ReparamError: The model does not run on any that were tried.
    """
    failure: Exception | None = None
    for free in _FREE:
        found = {batch: _bound(model, batch, free, input_size) for batch in (*BATCHES, EXAMPLE_BATCH)}
        if reference is None:
            return found
        try:
            reference(*_inputs(model, found[1], 1))
            return found
        except ExportError as error:
            failure = failure or error
        if found[1] == _bound(model, 1, free + 1, input_size):
            break  # there is nothing to choose
    raise ReparamError(
        f"the model does not run on random inputs of {_texts(found[1])}: {failure}; give the size of one input "
        "(input_size=, --input-size CxHxW), or write without comparing (verify=False, --no-verify)"
    ) from failure


def _texts(sizes: Sizes) -> str:
    return " and ".join("x".join(map(str, shape)) or "no axes" for shape in sizes.values())


def _bound(model: ir.Model, batch: int, free: int, input_size: Sequence[int] | None) -> Sizes:
    """Numbers for the sizes of all inputs; one with the name of a batch axis is a batch wherever it stands."""
    found: dict[str, list[int | str]] = {}
    for value in _required(model):
        found[str(value.name)] = shapes.symbols(value)
    bound: dict[str, int] = {}
    for dims in found.values():
        if dims and isinstance(dims[0], str):
            bound[dims[0]] = batch
    for dims in found.values():
        if input_size is not None and len(dims) == len(input_size) + 1:
            for size, given in zip(dims[1:], input_size, strict=True):
                if isinstance(size, str):
                    bound.setdefault(size, given)
                elif size != given:
                    raise ReparamError(f"an input size of {size} is fixed in the model, and cannot be {given}")
    return {name: tuple(d if isinstance(d, int) else bound.get(d, free) for d in dims) for name, dims in found.items()}


def _required(model: ir.Model) -> Iterator[ir.Value]:
    """The inputs that a caller has to give."""
    return (value for value in model.graph.inputs if not value.is_initializer())


def _inputs(model: ir.Model, sizes: Sizes, seed: int) -> list[Tensor]:
    """Random inputs: noise, or zeros and ones where the type is not of floating-point numbers."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for value in _required(model):
        dtype = None if value.dtype is None else DTYPES.get(value.dtype)
        shape = sizes[str(value.name)]
        if dtype is None or value.shape is None:
            raise ExportError(f"nothing random can be made for the input {value.name}")
        if dtype.is_floating_point:
            made.append(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
        else:
            made.append(torch.randint(0, 2, shape, generator=generator).to(dtype))
    return made


def compare_models(model: ir.Model, reference: Runner, fused: Runner, batches: Sequence[Sizes]) -> Comparison:
    """Both models on the same random inputs.

    Raises:
        VerificationError: They disagree.
    """
    found = []
    for seed, sizes in enumerate(batches, start=1):
        inputs = _inputs(model, sizes, seed)
        expected = reference(*inputs)
        again = reference(*inputs)
        try:
            compare(expected, again)
        except VerificationError as error:
            advice = "verify=False, or --no-verify, writes the result without comparing"
            raise VerificationError(f"the model's outputs differ from run to run; {advice}") from error
        try:
            # The precision of the model, also where it returns numbers of another.
            found.append(compare(expected, fused(*inputs), _tolerance(expected, inputs)))
        except VerificationError as error:
            raise VerificationError(f"in {fused.name}: {error}; nothing was written", error.comparison) from error
    return max(found, key=lambda comparison: comparison.largest_error)


def _tolerance(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> float | None:
    allowed = [TOLERANCES[x.dtype] for x in (*outputs, *inputs) if x.dtype in TOLERANCES]
    return max(allowed, default=None)


def input_names(model: ir.Model) -> list[str]:
    """The inputs that a caller has to give."""
    return [str(value.name) for value in _required(model)]

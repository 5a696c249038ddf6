"""ONNX: exported, checked, simplified, and run by onnxruntime."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from reparam.errors import ExportError, reason
from reparam.targets.program import axis_names
from reparam.targets.registry import register
from reparam.targets.target import Options, Target, Written, require


@register
class Onnx(Target):
    """The exchange format that most runtimes read: onnxruntime, TensorRT, and many more."""

    name = "onnx"
    title = "ONNX"
    suffix = ".onnx"
    extra = "onnx"
    packages = ("onnx", "onnxscript", "onnxsim", "onnxruntime")
    runtime = "onnxruntime"
    options = frozenset({"opset"})

    def write(self, program: ExportedProgram, path: Path, options: Options) -> Written:
        """Export the program, check it, simplify it, check it again, and write it."""
        count = len(program.graph_signature.user_outputs)
        exported = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=options.opset,
            output_names=["output"] if count == 1 else [f"output_{index}" for index in range(count)],
            verbose=False,
        )
        assert exported is not None
        proto, simplified = simplify(_renamed(exported.model_proto, axis_names(program)))
        path.write_bytes(_serialize(proto))
        opset = next(item.version for item in proto.opset_import if item.domain in ("", "ai.onnx"))
        operators = Counter(node.op_type for node in proto.graph.node)
        return Written(operators, {"opset": opset, "simplified": simplified})

    def load(self, path: Path) -> nn.Module:
        """The model in onnxruntime."""
        return OnnxModel(path)


class OnnxModel(nn.Module):
    """An ONNX model, run by onnxruntime on the CPU, called like the PyTorch model it was made from.

    It returns the list of its outputs.

    Args:
        source: An ``.onnx`` file, or its bytes.

    Raises:
        ExportError: onnxruntime is not installed, or cannot load the model.
    """

    def __init__(self, source: str | Path | bytes) -> None:
        super().__init__()
        onnxruntime = require("onnxruntime", Onnx.title, Onnx.extra)
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
            raise ExportError(f"onnxruntime cannot run the model: {reason(error)}") from error


def _renamed(proto: Any, names: dict[str, str]) -> Any:
    """Give the free axes names that say what they are, also inside of expressions such as ``2*s77``."""
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        for axis in value.type.tensor_type.shape.dim:
            if axis.HasField("dim_param"):
                axis.dim_param = re.sub(r"\w+", lambda found: names.get(found[0], found[0]), axis.dim_param)
    return proto


def simplify(proto: Any) -> tuple[Any, bool]:
    """Check, simplify, and check again; what onnxsim cannot simplify is still a valid model."""
    import onnx
    import onnxsim

    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError) as error:
        raise ExportError(f"PyTorch exported an invalid ONNX model: {reason(error)}") from error
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
        raise ExportError(f"the model is larger than the 2 GB that an .onnx file can hold ({reason(error)})") from error

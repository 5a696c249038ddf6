"""OpenVINO IR: ``.xml`` with the graph, ``.bin`` with the weights beside it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from reparam.errors import ExportError, reason
from reparam.targets.registry import register
from reparam.targets.target import Options, Target, Written, quiet, require

_BOOKKEEPING = ("Parameter", "Constant", "Result")


@register
class OpenVINO(Target):
    """Intel's runtime, for processors, integrated graphics and NPUs."""

    name = "openvino"
    title = "OpenVINO"
    suffix = ".xml"
    extra = "openvino"
    packages = ("openvino",)
    runtime = "openvino"
    companions = (".bin",)
    half = "writer"

    def write(self, program: ExportedProgram, path: Path, options: Options) -> Written:
        """Convert the program, and write its weights as they are, or in half precision."""
        import openvino

        model = openvino.convert_model(program)
        openvino.save_model(model, path, compress_to_fp16=options.half)
        operators = Counter(operation.get_type_name() for operation in model.get_ops())
        for name in _BOOKKEEPING:
            del operators[name]
        return Written(operators)

    def load(self, path: Path) -> nn.Module:
        """The model, compiled for the processor."""
        return OpenVINOModel(path)


class OpenVINOModel(nn.Module):
    """An OpenVINO model, run on the CPU in single precision, called like the PyTorch model it was made from.

    It returns the list of its outputs.

    Args:
        path: An ``.xml`` file, with its ``.bin`` beside it.

    Raises:
        ExportError: OpenVINO is not installed, or cannot load the model.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        openvino = require("openvino", OpenVINO.title, OpenVINO.extra)
        if not Path(path).is_file():
            raise ExportError(f"{path}: no such file")
        try:
            # Some processors would otherwise round to bfloat16, which the comparison is not about.
            self._compiled: Any = openvino.compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        except Exception as error:  # what comes out of its C++
            raise ExportError(f"{path}: OpenVINO cannot load it: {reason(error)}") from error

    @property
    def input_shape(self) -> tuple[int, ...] | None:
        """Shape of the first input without its batch axis, or None where it is not fixed."""
        shape = list(self._compiled.inputs[0].partial_shape)[1:]
        return None if any(size.is_dynamic for size in shape) else tuple(size.get_length() for size in shape)

    @property
    def fixed_batch(self) -> int | None:
        """The only batch size that the model takes, or None where it takes any."""
        batch = self._compiled.inputs[0].partial_shape[0]
        return None if batch.is_dynamic else int(batch.get_length())

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        """Run the model.

        Raises:
            ExportError: OpenVINO refuses, such as for inputs of another shape.
        """
        try:
            with quiet():
                result = self._compiled([value.detach().cpu().numpy() for value in inputs])
        except Exception as error:
            raise ExportError(f"OpenVINO cannot run the model: {reason(error)}") from error
        return [torch.from_numpy(result[index].copy()) for index in range(len(self._compiled.outputs))]

"""ExecuTorch: one ``.pte`` file for phones, with XNNPACK for everything that it knows."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from reparam.errors import ExportError, reason
from reparam.targets.program import operators_of
from reparam.targets.registry import register
from reparam.targets.target import Options, Target, Written, quiet, require
from reparam.targets.xnnpack import in_known_operators


@register
class ExecuTorch(Target):
    """Meta's runtime for Android, iOS and embedded systems.

    Its memory is planned as the file is written, for the largest inputs there may be: so the batch is fixed unless
    asked for, and free axes have an end.
    """

    name = "executorch"
    title = "ExecuTorch"
    suffix = ".pte"
    extra = "executorch"
    packages = ("executorch.exir", "executorch.backends.xnnpack.partition.xnnpack_partitioner")
    runtime = "executorch"
    batch_by_default = False
    bounded = True
    in_order = True

    def write(self, program: ExportedProgram, path: Path, options: Options) -> Written:
        """Lower the program to XNNPACK, and what that does not know to portable operators."""
        lowered = self.lower(program)
        calls = Counter(_name(node.target) for node in lowered.exported_program().graph.nodes if _is_call(node))
        program_file = lowered.to_executorch()
        path.write_bytes(program_file.buffer)
        delegates = calls.pop("executorch_call_delegate", 0)
        plan = program_file.executorch_program.execution_plan[0]
        return Written(
            operators_of(program),
            {
                "delegates": delegates,
                "portable_operators": dict(calls),
                "planned_bytes": sum(plan.non_const_buffer_sizes),
            },
        )

    def lower(self, program: ExportedProgram) -> Any:
        """The program for the edge, with the parts that XNNPACK runs."""
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        return to_edge_transform_and_lower(in_known_operators(program), partitioner=[XnnpackPartitioner()])

    def load(self, path: Path) -> nn.Module:
        """The program's ``forward``."""
        return ExecuTorchModel(path)


class ExecuTorchModel(nn.Module):
    """An ExecuTorch program, called like the PyTorch model it was made from. It returns the list of its outputs.

    Args:
        path: A ``.pte`` file.

    Raises:
        ExportError: ExecuTorch is not installed, or cannot load the program.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        runtime = require("executorch.runtime", ExecuTorch.title, ExecuTorch.extra)
        if not Path(path).is_file():
            raise ExportError(f"{path}: no such file")
        try:
            with quiet(), mute():
                self._program: Any = runtime.Runtime.get().load_program(Path(path).read_bytes())
                self._method: Any = self._program.load_method("forward")
        except Exception as error:  # what comes out of its C++
            raise ExportError(f"{path}: ExecuTorch cannot load it: {reason(error)}") from error

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of the first input without its batch axis; of the largest one where it may vary."""
        return tuple(self._method.metadata.input_tensor_meta(0).sizes())[1:]

    @property
    def fixed_batch(self) -> int:
        """The batch size that the program was planned for; it may take smaller ones."""
        return int(self._method.metadata.input_tensor_meta(0).sizes()[0])

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        """Run the program.

        Raises:
            ExportError: ExecuTorch refuses, such as for inputs of another shape.
        """
        try:
            with mute():
                outputs = self._method.execute([value.detach().contiguous() for value in inputs])
        except Exception as error:
            raise ExportError(f"ExecuTorch cannot run the model: {reason(error)}") from error
        return [value.clone() for value in outputs if isinstance(value, torch.Tensor)]


def _is_call(node: torch.fx.Node) -> bool:
    """Whether a node of a lowered graph is run by something."""
    return node.op == "call_function" and _name(node.target) not in ("getitem", "alloc")


def _name(target: Any) -> str:
    return str(getattr(target, "__name__", target)).removesuffix(".default")


@contextlib.contextmanager
def mute() -> Iterator[None]:
    """Without what the runtime's C++ has to say about the processor, which goes past Python's ``sys.stderr``."""
    saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)

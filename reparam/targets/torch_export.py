"""``torch.export``: the graph in ATen's operators with its weights, for PyTorch and for whatever reads it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.export import ExportedProgram

from reparam.errors import ExportError, reason
from reparam.targets.program import operators_of
from reparam.targets.registry import register
from reparam.targets.target import Options, Target, Written, quiet


@register
class TorchExport(Target):
    """PyTorch's own exchange format."""

    name = "torch-export"
    title = "torch.export"
    suffix = ".pt2"
    runs_code = True

    def write(self, program: ExportedProgram, path: Path, options: Options) -> Written:
        """Save the program."""
        torch.export.save(program, path)
        return Written(operators_of(program))

    def load(self, path: Path) -> nn.Module:
        """The program as a module. Reading a file may run code that is in it."""
        try:
            with quiet():
                return torch.export.load(path).module()
        except Exception as error:  # whatever reading a damaged archive raises
            raise ExportError(f"{path}: torch.export cannot load it: {reason(error)}") from error

"""AOTInductor: the graph compiled to machine code ahead of time, with its weights, for C++ without Python."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.export import ExportedProgram

from reparam.errors import ExportError, reason
from reparam.targets.program import operators_of
from reparam.targets.registry import register
from reparam.targets.target import Options, Target, Written, quiet


@register
class AotInductor(Target):
    """A package of machine code for this kind of processor, or GPU.

    It ends in ``.pt2`` like what ``torch.export`` saves; ours says ``.aoti.pt2``, so that the two can be told apart.
    """

    name = "aotinductor"
    title = "AOTInductor"
    suffix = ".aoti.pt2"
    runs_code = True

    def write(self, program: ExportedProgram, path: Path, options: Options) -> Written:
        """Generate C++ and compile it, which takes a compiler such as g++."""
        from torch._inductor import aoti_compile_and_package, config, exc

        # Export calls a free size two or more. The code itself runs for one, and is compared there.
        name = "check_lowerbound"
        configs = {f"aot_inductor.{name}": False} if hasattr(config.aot_inductor, name) else None
        try:
            aoti_compile_and_package(program, package_path=str(path), inductor_configs=configs)
        except exc.InvalidCxxCompiler as error:
            raise ExportError("AOTInductor needs a C++ compiler, such as g++; install one, or set CXX") from error
        return Written(operators_of(program))

    def load(self, path: Path) -> nn.Module:
        """The compiled model. Loading a file runs the machine code that is in it."""
        return AotInductorModel(path)


class AotInductorModel(nn.Module):
    """An AOTInductor package, called like the PyTorch model it was made from.

    Args:
        path: The package. Loading it runs the machine code in it.

    Raises:
        ExportError: It cannot be loaded, such as one that was compiled for another machine.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        from torch._inductor import aoti_load_package

        if not Path(path).is_file():
            raise ExportError(f"{path}: no such file")
        # The code asks at its first run. Otherwise it reads past the end of inputs that are too small.
        os.environ.setdefault("AOTI_RUNTIME_CHECK_INPUTS", "1")
        try:
            with quiet():
                self._runner: Any = aoti_load_package(str(path))
        except Exception as error:  # what the loader and the dynamic linker raise
            raise ExportError(f"{path}: AOTInductor cannot load it: {reason(error)}") from error

    def forward(self, *inputs: Tensor) -> Any:
        """Run the package.

        Raises:
            ExportError: It refuses, such as inputs of another shape.
        """
        try:
            return self._runner(*inputs)
        except Exception as error:
            raise ExportError(f"AOTInductor cannot run the model: {reason(error)}") from error

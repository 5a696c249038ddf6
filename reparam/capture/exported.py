"""Exported programs: modules of ATen's operators, recorded like any other."""

from __future__ import annotations

from torch import nn
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind

from reparam.capture.captured import Call, Capture
from reparam.capture.copies import private_copy
from reparam.capture.program import record
from reparam.errors import CaptureError, ReparamError


def read(program: ExportedProgram, call: Call | None = None) -> tuple[nn.Module, Capture]:
    """An exported program as a module, and its capture.

    Args:
        program: Made in eval mode.
        call: What to run it on; the example that it was exported with when left out.

    Raises:
        CaptureError: It has no example inputs, trains, or needs what no graph of ours can say.
    """
    if program.example_inputs is None:
        raise CaptureError("the exported program has no example inputs; export it again with them")
    if any(spec.kind is not OutputKind.USER_OUTPUT for spec in program.graph_signature.output_specs):
        raise CaptureError(
            "the exported program cannot be compiled: it changes its own tensors, or its inputs, as models in training "
            "do; export it in eval mode"
        )
    module = program.module()
    args, kwargs = program.example_inputs
    call = call or (tuple(args), dict(kwargs))
    try:
        captured = record(private_copy(module), call, sizes="example")
    except ReparamError as error:
        raise CaptureError(f"the exported program cannot be compiled: {error}") from error
    if not captured.traced:
        reason = captured.remarks[-1].message.removeprefix("kept as Python: ")
        if "writes to its own tensors" in reason:
            reason = "it writes to its own tensors, as models in training do; export it in eval mode"
        raise CaptureError(f"the exported program cannot be compiled: {reason}")
    return module, captured

"""The files and models that commands are given."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from reparam.cli.shell import Bar, shape_text
from reparam.errors import ReparamError, VerificationError

if TYPE_CHECKING:
    from torch import nn
    from torch.export import ExportedProgram

    from reparam.files.checkpoint import Checkpoint, Network


@dataclass(frozen=True)
class Reading:
    """How the user wants files to be read."""

    model: str | None
    shape: tuple[int, ...] | None
    unsafe: bool
    ema: bool


def read(path: Path, how: Reading) -> Checkpoint:
    """A checkpoint, whose values are numbers."""
    from reparam.files import checkpoint

    found = checkpoint.read(path, unsafe=how.unsafe, ema=how.ema)
    checkpoint.check_values(found)
    return found


def resolve(source: Checkpoint, how: Reading) -> Network:
    """The network that a checkpoint holds the weights of."""
    from reparam.files.checkpoint import resolve

    network = resolve(source, how.model)
    return network if how.shape is None else replace(network, input_shape=how.shape)


def deploy_metadata(path: Path, how: Reading) -> dict[str, Any] | None:
    """What is stored beside the model in a deploy file; None when the file is something else."""
    from reparam.errors import CheckpointError
    from reparam.files.deploy import read_metadata

    try:
        return read_metadata(path)
    except CheckpointError:
        if how.unsafe:  # then it may be a pickle, which no deploy file is
            return None
        raise


def open_both(paths: tuple[Path, Path], how: Reading) -> list[Network]:
    """Both files as models; one may be a bare state dict of the other's deploy form."""
    match [_open_or_error(path, how) for path in paths]:
        case [ReparamError() as error, ReparamError()]:
            raise error
        case [ReparamError() as error, other]:
            return [_as_deploy_form(paths[0], other, how, error), other]
        case [other, ReparamError() as error]:
            return [other, _as_deploy_form(paths[1], other, how, error)]
        case both:
            return both


def _open_or_error(path: Path, how: Reading) -> Any:
    try:
        return _open(path, how)
    except ReparamError as error:
        return error


def _open(path: Path, how: Reading) -> Network:
    from reparam.files import deploy
    from reparam.files.checkpoint import Network

    exported = _open_exported(path, how)
    if exported is not None:
        return Network(exported, path.name, getattr(exported, "input_shape", None))
    metadata = deploy_metadata(path, how)
    if metadata is not None:
        return Network(deploy.load(path), path.name, tuple(metadata.get("input_shape") or ()) or None)
    return resolve(read(path, how), how)


def _open_exported(path: Path, how: Reading) -> nn.Module | None:
    """A file that was written for a runtime, as a model; None for checkpoints and for what ``torch.export`` saved."""
    from reparam.errors import CheckpointError
    from reparam.targets import is_target, target_of

    if not is_target(path) or (path.suffix == ".pt2" and not _is_machine_code(path)):
        return None
    target = target_of(path, "aotinductor" if path.suffix == ".pt2" else None)
    if target.runs_code and not how.unsafe:
        raise CheckpointError(f"{path}: holds machine code; pass --unsafe-load only if you trust the source")
    target.require()
    return target.load(path)


def _is_machine_code(path: Path) -> bool:
    """Whether a ``.pt2`` file is AOTInductor's, which ends like those of ``torch.export``."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any("/data/aotinductor/" in f"/{name}" for name in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False  # which reading it as a checkpoint will say better


def compiled(source: Path | str, network: Network, inputs: Any, progress: Bar, **options: Any) -> nn.Module:
    """The deploy model of a network; what goes wrong says which file it was."""
    import reparam
    from reparam.errors import CaptureError

    try:
        return reparam.compile(network.model, inputs, progress=progress, **options)
    except VerificationError as error:
        raise VerificationError(f"{source}: {error}; nothing was written", error.comparison) from error
    except CaptureError as error:
        raise CaptureError(f"{source}: {error}") from error


def example_of(network: Network, how: Reading) -> Any:
    """Inputs to export a network with: one random tensor, or the tuple that a program was exported with.

    Raises:
        ReparamError: No shape is known, or the program takes keyword arguments.
    """
    from torch.export import ExportedProgram

    inputs = inputs_of(network, how)
    if inputs is None and isinstance(network.model, ExportedProgram) and network.model.example_inputs:
        args, kwargs = network.model.example_inputs
        if kwargs:
            raise ReparamError(f"{network.name}: was exported with keyword arguments, which no other format knows")
        return tuple(args)
    if inputs is None:
        ask_for_shape(network.name, "export")
    return inputs


def _as_deploy_form(path: Path, other: Network, how: Reading, failure: ReparamError) -> Network:
    """The weights in ``path`` as those of the compiled ``other``; raises ``failure`` when they are not."""
    import reparam
    from reparam.files import checkpoint

    try:
        deploy = reparam.compile(other.model, verify=False)  # the comparison comes next
        checkpoint.load_into(deploy, read(path, how))
    except ReparamError:
        raise failure from None
    return checkpoint.Network(deploy, path.name, other.input_shape)


def random_inputs(shape: tuple[int, ...] | None, batch: int = 1) -> Any:
    """Random inputs, the same at every run; None when no shape is known."""
    import torch

    if shape is None:
        return None
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0))


def inputs_of(network: Network, how: Reading) -> Any:
    """What to compile a network with: random inputs of its shape, or what an exported program was exported with."""
    from torch.export import ExportedProgram

    program = network.model
    if not isinstance(program, ExportedProgram):
        return random_inputs(network.input_shape)
    call: Any = program.example_inputs or ((), {})
    args, kwargs = call
    if how.shape is not None:  # the number of inputs, and their type, may be fixed
        first = next(value for value in (*args, *kwargs.values()) if hasattr(value, "dtype"))
        return random_inputs(how.shape, len(first)).to(first.dtype)
    return args[0] if len(args) == 1 and not kwargs else None  # compile knows the others


def runnable(model: nn.Module | ExportedProgram) -> nn.Module:
    """What can be called."""
    from torch import nn

    return model if isinstance(model, nn.Module) else model.module()


def shared_call(paths: tuple[Path, Path], sides: list[Network], how: Reading) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments that both models say they take: one random input, or what one of them was exported with."""
    from torch.export import ExportedProgram

    shape = how.shape
    for side in sides:
        if isinstance(side.model, ExportedProgram) and side.model.example_inputs is not None:
            args, kwargs = side.model.example_inputs
            return ((inputs_of(side, how),), {}) if shape else (args, kwargs)
    first, second = (side.input_shape for side in sides)
    if shape is None and first and second and first != second:
        raise VerificationError(
            f"{paths[0]} takes inputs of {shape_text(first)}, and {paths[1]} of {shape_text(second)}"
        )
    known = shape or first or second
    if known is None:
        ask_for_shape(f"{paths[0]} and {paths[1]}", "compare")
    batches = (getattr(side.model, "fixed_batch", None) for side in sides)  # an ONNX model may take one size only
    return (random_inputs(known, next(filter(None, batches), 2)),), {}


def parse_shape(text: str | None) -> tuple[int, ...] | None:
    """The shape that ``--input-size`` gives."""
    if text is None:
        return None
    sizes = text.replace(",", "x").lower().split("x")
    if not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise ReparamError(f"--input-size {text} is no shape such as 3x224x224")
    return tuple(map(int, sizes))


def ask_for_shape(name: str, purpose: str) -> NoReturn:
    """Fail for want of a shape."""
    raise ReparamError(f"{name}: give the shape of one input to {purpose} with, such as --input-size 3x224x224")


def about_input(path: Path, source: Checkpoint, network: Network) -> dict[str, Any]:
    """What a command was given, for its JSON."""
    shape = None if network.input_shape is None else list(network.input_shape)
    return {"input": str(path), "weights": ".".join(source.origin) or None, "model": network.name, "input_shape": shape}

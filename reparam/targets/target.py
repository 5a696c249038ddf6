"""What a target of an export is: how to write it, where it runs, and which options it knows."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import io
import logging
import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils._pytree import tree_leaves, tree_map_only

from reparam import atomic
from reparam.compare import TOLERANCES, compare, run
from reparam.errors import ExportError
from reparam.report import Comparison
from reparam.targets.image import ImageInput


@dataclass(frozen=True)
class Options:
    """What was asked for beyond the target's defaults; :func:`reparam.export` says what each is."""

    opset: int | None = None
    half: bool = False
    image: ImageInput | None = None
    tolerance: float | None = None


@dataclass(frozen=True)
class Written:
    """What a target says of the graph that it wrote.

    Attributes:
        operators: How often each operator occurs in it, under the target's own names.
        details: What only this target has, of JSON's types.
    """

    operators: Counter[str]
    details: dict[str, Any] = field(default_factory=dict)


class Flat(nn.Module):
    """A model whose outputs come as a list of tensors, whatever their structure: most runtimes know no other."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        """The model's output tensors, in order."""
        return [value for value in tree_leaves(self.model(*inputs)) if isinstance(value, Tensor)]


class Target(ABC):
    """A format, and the runtime that it is for.

    Attributes:
        name: What ``target=`` and ``--target`` call it.
        title: What people call it.
        suffix: What its files end in.
        extra: The extra of the package reparam that brings what it needs, or None where PyTorch is enough.
        packages: What has to be importable.
        runtime: The distribution whose version a result names.
        companions: Suffixes of the files that are written beside the one asked for.
        is_folder: Whether the result is a folder.
        batch_by_default: Whether any batch size is tried without being asked for.
        bounded: Whether a free axis needs a largest size.
        half: Whether half precision is computed by the model ("model"), or chosen as the file is written ("writer").
        in_order: Whether it takes weights in the order of their axes only, not as channels_last has them.
        runs_here: Whether its files can be run on any machine.
        runs_code: Whether loading a file runs what its author chose.
        options: The fields of :class:`Options` that it knows beside ``half`` and ``tolerance``.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    suffix: ClassVar[str]
    extra: ClassVar[str | None] = None
    packages: ClassVar[tuple[str, ...]] = ()
    runtime: ClassVar[str] = "torch"
    companions: ClassVar[tuple[str, ...]] = ()
    is_folder: ClassVar[bool] = False
    batch_by_default: ClassVar[bool] = True
    bounded: ClassVar[bool] = False
    half: ClassVar[Literal["model", "writer"]] = "model"
    in_order: ClassVar[bool] = False
    runs_here: ClassVar[bool] = True
    runs_code: ClassVar[bool] = False
    options: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def write(self, program: ExportedProgram, path: Path, options: Options) -> Written:
        """Write a program, and the companions of the file, into a folder that is nobody else's.

        Raises:
            Exception: Anything; :func:`reparam.export` makes one sentence of it.
        """

    @abstractmethod
    def load(self, path: Path) -> nn.Module:
        """What was written, called like the model that it was made from.

        Raises:
            ExportError: The file is missing or damaged, or cannot be run on this machine.
        """

    def check(
        self,
        path: Path,
        model: nn.Module,
        program: ExportedProgram,
        batches: Sequence[tuple[Tensor, ...]],
        options: Options,
    ) -> Comparison:
        """Compare what was written with the model, in the runtime itself.

        Args:
            path: What :meth:`write` wrote.
            model: The reference, in its own precision.
            program: What was written.
            batches: Inputs to run both on.
            options: As for :meth:`write`.

        Returns:
            The comparison with the largest error.

        Raises:
            ExportError: The runtime refuses the file, or one of the inputs.
            VerificationError: It computes something else.
        """
        runnable = Flat(self.load(path))
        found = [self._compare(Flat(model), runnable, inputs, options) for inputs in batches]
        return max(found, key=lambda comparison: comparison.largest_error)

    def _compare(
        self, model: nn.Module, runnable: nn.Module, inputs: tuple[Tensor, ...], options: Options
    ) -> Comparison:
        if not options.half:
            return compare(run(model, inputs, {}), run(runnable, inputs, {}), options.tolerance)
        # The reference has single precision, and sees what half precision makes of the inputs.
        rounded = tree_map_only(Tensor, half, inputs)
        expected = run(model, tree_map_only(Tensor, lambda x: x.float() if x.is_floating_point() else x, rounded), {})
        given = rounded if self.half == "model" else tuple(x.to(y.dtype) for x, y in zip(rounded, inputs, strict=True))
        actual = run(runnable, given, {})
        widened = [x.to(y.dtype) if x.is_floating_point() else x for x, y in zip(actual, expected, strict=True)]
        return compare(expected, widened, options.tolerance or TOLERANCES[torch.float16])

    def files(self, path: Path) -> tuple[Path, ...]:
        """Everything that is written for ``path``."""
        return (path, *(path.with_suffix(suffix) for suffix in self.companions))

    def version(self) -> str:
        """The runtime and its version, such as ``openvino 2026.4.1``."""
        return f"{self.runtime} {importlib.metadata.version(self.runtime)}"

    def require(self) -> None:
        """Import what the target needs.

        Raises:
            ExportError: Something is not installed; the message has the command that installs it.
        """
        for package in self.packages:
            require(package, self.title, self.extra)

    def check_destination(self, path: Path, *, never: tuple[Path, ...] = ()) -> None:
        """Refuse a path that cannot or must not be written, before any work is done for it.

        Args:
            path: The file to write; an older one of the same kind may be replaced.
            never: Files that must not be replaced.

        Raises:
            ExportError: As :func:`reparam.atomic.check_destination`; or ``path`` is a folder of another kind.
        """
        for file in self.files(path):
            atomic.check_destination(file, never=never, package=self.is_folder)


def half(value: Tensor) -> Tensor:
    """A floating-point tensor in half precision; any other as it is."""
    return value.half() if value.is_floating_point() else value


def require(package: str, title: str, extra: str | None) -> Any:
    """Import an optional package.

    Raises:
        ExportError: It is not installed; the message has the command that installs it.
    """
    try:
        with quiet():
            return importlib.import_module(package)
    except ImportError as error:
        raise ExportError(f'{title} needs the package {package} ({error}): pip install "reparam[{extra}]"') from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence what exporters print, log and warn; what matters of it is raised."""
    previous, handlers = logging.root.manager.disable, list(logging.root.handlers)
    logging.disable(logging.ERROR)
    try:
        sink = io.StringIO()
        with contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)
        logging.root.handlers[:] = handlers  # some packages install one of their own when they warn

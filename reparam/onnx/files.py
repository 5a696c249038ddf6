"""ONNX models in files: read without running anything, written completely or not at all."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from reparam.atomic import atomic_write, check_destination
from reparam.errors import CheckpointError, ExportError

_LIMIT = 2**31 - 2**24  # of one protobuf, with room for what is not weights


@dataclass(frozen=True)
class Source:
    """A model as it was given.

    Attributes:
        proto: Its graph; weights that lie in other files are not loaded.
        path: Its file, None for a model from memory.
        external: The files in which weights lie.
    """

    proto: onnx.ModelProto
    path: Path | None = None
    external: tuple[Path, ...] = ()

    @property
    def runnable(self) -> Path | bytes:
        """What onnxruntime takes."""
        return self.path if self.path is not None else bytes(self.proto.SerializeToString())

    def graph(self) -> ir.Model:
        """The model for editing; its weights stay where they are until they are asked for."""
        model = ir.from_proto(self.proto)
        assert isinstance(model, ir.Model)
        if self.path is not None:
            ir.external_data.set_base_dir(model.graph, self.path.parent)
        return model


def read(source: str | Path | onnx.ModelProto) -> Source:
    """Open a model.

    Raises:
        CheckpointError: The file, or one with its weights, is missing or damaged, or it is no ONNX model.
    """
    if isinstance(source, onnx.ModelProto):
        return Source(source)
    path = Path(source)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        proto = onnx.load(path, format="protobuf", load_external_data=False)
    except DecodeError as error:
        raise CheckpointError(f"{path}: is no ONNX model, or was cut short ({error})") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    if not proto.ir_version or not proto.HasField("graph"):
        raise CheckpointError(f"{path}: is no ONNX model")
    return Source(proto, path, _external(proto, path))


def _external(proto: onnx.ModelProto, path: Path) -> tuple[Path, ...]:
    """The files that hold weights, all of them there and long enough."""
    found: dict[Path, int] = {}
    for tensor in onnx.external_data_helper._get_all_tensors(proto):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            entry = {item.key: item.value for item in tensor.external_data}
            place = path.parent / entry.get("location", "")
            end = int(entry.get("offset", 0)) + int(entry.get("length", 0))
            found[place] = max(found.get(place, 0), end)
    for place, end in found.items():
        if not place.is_file():
            raise CheckpointError(f"{path}: its weights lie in {place}, which is missing")
        if place.stat().st_size < end:
            raise CheckpointError(f"{path}: its weights lie in {place}, which was cut short")
    return tuple(found)


@dataclass(frozen=True)
class Staged:
    """A model ready to be run, and then to be put in its place.

    Attributes:
        runnable: What onnxruntime takes: the bytes of the model, or a file with another beside it for the weights.
    """

    runnable: Path | bytes

    def publish(self, path: Path) -> None:
        """Put the model in its place, and its weights beside it."""
        if isinstance(self.runnable, bytes):
            with atomic_write(path) as temporary:
                temporary.write_bytes(self.runnable)
            return
        for file, place in ((_data(self.runnable), _data(path)), (self.runnable, path)):
            with atomic_write(place) as temporary:
                os.replace(file, temporary)


def _data(path: Path) -> Path:
    """Where the weights of a model lie that are not in its file."""
    return path.with_name(f"{path.name}.data")


def check(path: Path, source: Source) -> None:
    """Refuse a path that cannot be written, or is part of the input.

    Raises:
        ExportError: It cannot.
    """
    if path.suffix != ".onnx":
        raise ExportError(f"{path}: an ONNX model can only be written as ONNX; choose a name that ends in .onnx")
    never = source.external if source.path is None else (source.path, *source.external)
    check_destination(path, never=never)
    check_destination(_data(path), never=never)


@contextmanager
def staged(model: ir.Model, source: Source, path: Path | None) -> Iterator[Staged]:
    """A model, serialised: with its weights in another file where the source had it so, or one cannot hold them."""
    graphs = [model.graph, *model.graph.subgraphs()]
    tensors = [value.const_value for graph in graphs for value in graph.initializers.values()]
    size = sum(math.ceil(tensor.nbytes) for tensor in tensors if tensor is not None)
    if not source.external and size < _LIMIT:
        yield Staged(bytes(ir.to_proto(model).SerializeToString()))
        return
    folder = None if path is None else path.parent
    with tempfile.TemporaryDirectory(prefix=".reparam-", dir=folder) as temporary:
        file = Path(temporary) / (path.name if path is not None else "model.onnx")
        try:
            ir.save(model, file, external_data=_data(file).name)
        except OSError as error:
            raise ExportError(f"{path or file}: cannot be written: {error.strerror or error}") from error
        yield Staged(file)

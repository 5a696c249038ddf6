"""Deploy files: a compiled model as one file that needs no training code.

The file holds the compiled graph as data (:mod:`reparam.files.portable`) beside a plain state dict, so :func:`load`
rebuilds the model without the class it was compiled from, and without running anything that the file brought along.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.node import map_aggregate

from reparam.atomic import atomic_write
from reparam.errors import CheckpointError, ExportError, first_line
from reparam.files import portable
from reparam.files.checkpoint import DEPLOY_FORMAT, deploy_header, read_file

VERSION = 1
_CONSTANT = "constant:"  # in a safetensors file: the prefix of tensors that the model's state dict does not have


def save(model: nn.Module, path: str | Path, *, metadata: Mapping[str, Any] | None = None) -> None:
    """Write a compiled model to a deploy file that :func:`load` rebuilds it from.

    A ``.pth`` or ``.pt`` file is a ``torch.save`` of plain data, with an ordinary state dict under ``"state_dict"``; a
    ``.safetensors`` file is that state dict, with the graph in its header. The write is atomic.

    Args:
        model: What :func:`reparam.compile` returned. Its report is stored with it.
        path: Where to; the extension chooses the format.
        metadata: More to store, of JSON's types; :func:`read_metadata` returns it.

    Raises:
        ExportError: The extension is unknown, the model is no graph of PyTorch layers and functions, or ``path``
            cannot be written.
    """
    path = Path(path)
    if path.suffix not in (".pth", ".pt", ".safetensors"):
        raise ExportError(
            f"{path}: a deploy file is .pth, .pt or .safetensors, not {path.suffix or 'without extension'}"
        )
    if not isinstance(model, GraphModule):
        raise ExportError(
            f"a {type(model).__name__} is no single graph, so a file cannot rebuild it without its source code; write "
            ".onnx, or keep the weights alone with torch.save(model.state_dict(), ...)"
        )
    description, tensors = portable.describe(model)
    description["channels_last"] = [name for name, tensor in tensors.items() if _is_channels_last(tensor)]
    report = getattr(model, "report", None)
    about = {"report": report.to_dict()} if report is not None else {}
    graph = json.dumps(description, allow_nan=False)
    try:
        portable.rebuild(json.loads(graph), tensors)  # what cannot be read back must not be written
    except Exception as error:
        raise ExportError(f"the graph cannot be stored: {first_line(error)}; write .onnx instead") from error
    header = {
        "format": DEPLOY_FORMAT,
        "version": str(VERSION),
        "graph": graph,
        "metadata": json.dumps({**about, **(metadata or {})}),
    }
    transient = {name for name, kind in description["constants"].items() if kind == "transient"}
    with atomic_write(path) as temporary:
        if path.suffix == ".safetensors":
            _write_safetensors(temporary, header, tensors, transient)
        else:
            _write_pickle(temporary, header, tensors, transient)


def load(path: str | Path, *, device: str | torch.device = "cpu") -> GraphModule:
    """Rebuild a compiled model from a deploy file, in eval mode, its parameters frozen.

    Nothing in the file is executed: ``.pth`` is read with ``weights_only=True``, and the graph may only ask for
    PyTorch's own layers, tensor functions and tensor methods.

    Args:
        path: What :func:`save`, or ``reparam fuse``, wrote.
        device: Where to put the tensors.

    Raises:
        CheckpointError: The file is missing, truncated, of an unknown version, no deploy file, or asks for more than
            a deploy file may.
    """
    path = Path(path)
    header, tensors = _read(path)
    if header is None:
        raise CheckpointError(
            f"{path}: is a training checkpoint, not a deploy file; make one with reparam.save, or with reparam fuse"
        )
    try:
        description = json.loads(header["graph"])
        for name in description["channels_last"]:
            tensors[name] = tensors[name].contiguous(memory_format=torch.channels_last)
        model = portable.rebuild(description, tensors)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except Exception as error:  # what a damaged description makes Python raise, PyTorch's code generator included
        raise CheckpointError(f"{path}: its graph is damaged ({type(error).__name__}: {first_line(error)})") from error
    return _on(model, torch.device(device))


def read_metadata(path: str | Path) -> dict[str, Any] | None:
    """What :func:`save` stored beside the model, such as ``report``; None when the file is no deploy file.

    Raises:
        CheckpointError: The file cannot be read, or is of an unknown version.
    """
    header, _ = _read(Path(path))
    if header is None:
        return None
    try:
        return dict(json.loads(header.get("metadata", "{}")))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its metadata is damaged ({error})") from error


def _write_pickle(path: Path, header: dict[str, str], tensors: dict[str, Tensor], transient: set[str]) -> None:
    shared: dict[object, Tensor] = {}  # a tied tensor is written once, and tied again when read
    compact = {name: shared.setdefault(_identity(tensor), _compact(tensor)) for name, tensor in tensors.items()}
    payload = {
        **header,
        "state_dict": {name: tensor for name, tensor in compact.items() if name not in transient},
        "constants": {name: compact[name] for name in sorted(transient)},
    }
    try:
        torch.save(payload, path)
    except RuntimeError as error:  # PyTorch's own writer reports a full disk like this
        raise OSError(str(error).splitlines()[0]) from error


def _write_safetensors(path: Path, header: dict[str, str], tensors: dict[str, Tensor], transient: set[str]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    named = {(_CONSTANT if name in transient else "") + name: _compact(tensor) for name, tensor in tensors.items()}
    try:
        save_file(named, path, metadata=header)
    except SafetensorError as error:
        raise OSError(str(error)) from error


def _read(path: Path) -> tuple[Mapping[str, str] | None, dict[str, Tensor]]:
    """Header and tensors of a deploy file; no header when the file is some other checkpoint."""
    payload, strings = read_file(path)
    header = deploy_header(payload, strings)
    if header is None:
        return None, {}
    if str(header.get("version")) != str(VERSION):
        raise CheckpointError(
            f"{path}: has version {header.get('version')} of the deploy format, and this reparam reads {VERSION}; "
            "upgrade reparam"
        )
    if header is not payload:
        return header, {name.removeprefix(_CONSTANT): tensor for name, tensor in payload.items()}
    tensors: dict[str, Tensor] = {}
    for group in (header.get("state_dict"), header.get("constants")):
        if not isinstance(group, Mapping) or not all(map(torch.is_tensor, group.values())):
            raise CheckpointError(f"{path}: is a damaged deploy file: its weights are missing")
        tensors.update(group)
    return header, tensors


def _on(model: GraphModule, device: torch.device) -> GraphModule:
    """Move a model, and with it the devices that its graph names, such as where it makes a tensor of positions."""
    for node in model.graph.nodes:
        node.args, node.kwargs = map_aggregate(
            (node.args, node.kwargs), lambda value: device if isinstance(value, torch.device) else value
        )
    model.recompile()
    return model.to(device)


def _compact(tensor: Tensor) -> Tensor:
    """A copy with a storage of its own: a view would drag all of its storage into the file."""
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _identity(tensor: Tensor) -> object:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.numel() or id(tensor)


def _is_channels_last(tensor: Tensor) -> bool:
    """Kernels differ in the last bit by memory layout, so a file has to bring it back."""
    return tensor.dim() == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)

"""Checkpoints of all kinds: the weights in a file, and the network that they belong to.

A checkpoint is untrusted data. :func:`read` loads tensors and plain containers only, unless the caller asks for
unpickling by name, and everything that can be wrong with a file ends in one :class:`CheckpointError` sentence.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import pickle
import re
import sys
import warnings
import zipfile
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from reparam.errors import CheckpointError, ModelError, ReparamError, first_line
from reparam.models import registry
from reparam.models.registry import ModelEntry

# Where training scripts keep the weights in the dictionary that they save, most usual first.
WEIGHTS = ("state_dict", "model", "model_state_dict", "module", "net", "network", "params", "weights")
AVERAGED = ("model_ema", "ema", "state_dict_ema", "ema_state_dict", "ema_model", "params_ema")
DEPLOY_FORMAT = "reparam"
_ZIP = b"PK\x03\x04"
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the magic number that torch.save wrote before 1.6

# What torch.export.save writes, and what it wrote before 2.8; and what any archive of PyTorch 2 holds.
_PROGRAM = re.compile(r"[^/]+/models/model\.json|serialized_exported_program\.json")
_ARCHIVE = re.compile(r"[^/]+/archive_format")
_SHOWN = 3  # how many offending keys a message names


@dataclass(frozen=True)
class Checkpoint:
    """The weights in a file.

    Attributes:
        path: The file.
        state: Tensors by parameter name; wrappers and their prefixes are gone.
        origin: Keys that led to the weights, outermost first, such as ``("model_ema",)``.
        module: The network itself when the file is a pickled ``nn.Module`` or an exported program (only read when
            unpickling is allowed).
    """

    path: Path
    state: dict[str, Tensor]
    origin: tuple[str, ...] = ()
    module: nn.Module | ExportedProgram | None = None


@dataclass(frozen=True)
class Network:
    """A training-time network that carries a checkpoint's weights.

    Attributes:
        model: The network, in eval mode; or an exported program, which knows no modes.
        name: What it was recognised as, or what the caller called it.
        input_shape: Shape of one input without the batch axis, such as ``(3, 224, 224)``, or None when unknown.
    """

    model: nn.Module | ExportedProgram
    name: str
    input_shape: tuple[int, ...] | None


def read(path: str | Path, *, unsafe: bool = False, ema: bool = False) -> Checkpoint:
    """Read the weights in a ``.pth``, ``.pt``, ``.safetensors`` or ``.pt2`` file.

    The file may be a bare state dict or one nested under any of :data:`WEIGHTS` or :data:`AVERAGED`; the plain
    weights are taken unless only averaged ones are there. The format is recognised by content, not by extension.

    Args:
        path: The checkpoint.
        unsafe: Unpickle arbitrary Python objects, which runs whatever code the file's author chose. No exported
            program (``.pt2``) can be read without.
        ema: Take the averaged (EMA) weights; an error when there are none.

    Raises:
        CheckpointError: The file is missing, empty, truncated, no checkpoint, pickled code (without ``unsafe``), or
            holds no tensors.
    """
    path = Path(path)
    payload, header = read_file(path, unsafe=unsafe)
    if deploy_header(payload, header) is not None:
        raise CheckpointError(f"{path}: is a deploy file already; load it with reparam.load")
    found, origin = _unwrap(payload, path, ema)
    if ema and not set(origin) & set(AVERAGED):
        raise CheckpointError(f"{path}: holds no averaged (EMA) weights; leave out --ema")
    if isinstance(found, ExportedProgram):
        return Checkpoint(path, dict(found.state_dict), origin, found)
    module = found if isinstance(found, nn.Module) else None
    state = found.state_dict() if isinstance(found, nn.Module) else found
    return Checkpoint(path, strip_prefixes(state), origin, module)


def read_file(path: Path, *, unsafe: bool = False) -> tuple[Any, dict[str, str]]:
    """What a checkpoint file holds, as it is, and the strings in a safetensors file's header.

    Raises:
        CheckpointError: As :func:`read`.
    """
    if _is_safetensors(path):
        return _read_safetensors(path)
    members = _zip_members(path)
    if any(_PROGRAM.fullmatch(name) for name in members):
        return _read_program(path, unsafe), {}
    if any(_ARCHIVE.fullmatch(name) for name in members):
        raise CheckpointError(f"{path}: is a .pt2 archive, but holds no exported program")
    return _read_pickle(path, unsafe), {}


def deploy_header(payload: Any, header: Mapping[str, str]) -> Mapping[str, Any] | None:
    """The header by which :func:`reparam.save` marks a deploy file, from what :func:`read_file` returned."""
    candidate = header or payload
    if isinstance(candidate, Mapping) and candidate.get("format") == DEPLOY_FORMAT and "graph" in candidate:
        return candidate
    return None


def strip_prefixes(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Drop what ``DataParallel``, ``torch.compile`` and ``AveragedModel`` put around parameter names.

    ``_orig_mod.`` goes wherever it stands, ``module.`` only where every name begins with it.
    """
    return {short: state[name] for name, short in _short_names(state).items()}


def _short_names(names: Iterable[str]) -> dict[str, str]:
    """Each name without its wrappers' prefixes; ``AveragedModel``'s own counter has none, and is left out."""
    short = {name: name.replace("_orig_mod.", "") for name in names}
    while wrapped := {name: rest for name, rest in short.items() if rest != "n_averaged"}:
        if not all(rest.startswith("module.") for rest in wrapped.values()):
            break
        short = {name: rest.removeprefix("module.") for name, rest in wrapped.items()}
    return short


def check_values(checkpoint: Checkpoint) -> None:
    """Refuse weights that no network can use.

    A tensor of zeros and minus infinities is an attention mask, and fine.

    Raises:
        CheckpointError: A tensor is quantized, holds NaN or infinite values, or is a negative running variance.
    """
    state = checkpoint.state
    _refuse(checkpoint, "quantized tensors; fuse the floating-point model instead", _select(state, _is_quantized))
    _refuse(checkpoint, "NaN or infinite values; the training run diverged", _select(state, _is_not_finite))
    variances = {name: tensor for name, tensor in state.items() if name.split(".")[-1] == "running_var"}
    _refuse(
        checkpoint, "negative running variances; the file is damaged", _select(variances, lambda v: bool((v < 0).any()))
    )


def load_into(model: nn.Module, checkpoint: Checkpoint, *, name: str = "the model") -> None:
    """Copy a checkpoint's weights into ``model``, every key exactly once, in the model's own dtype.

    Wrapper prefixes on the model's side are looked through as well. ``num_batches_tracked`` may be missing: PyTorch
    did not write it before 0.4.1, and inference does not read it.

    Raises:
        CheckpointError: Keys are missing, unexpected, or of another shape; the message names the first few.
    """
    own = model.state_dict()
    full_names = {short: name for name, short in _short_names(own).items()}
    problem = mismatch({short: own[name] for short, name in full_names.items()}, checkpoint.state)
    if problem:
        raise CheckpointError(f"{checkpoint.path}: does not fit {name}: {problem}")
    model.load_state_dict({full_names[key]: tensor for key, tensor in checkpoint.state.items()}, strict=False)


def mismatch(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], *, extra: Container[str] = ()) -> str:
    """How ``found`` differs from ``expected`` in names and shapes, as part of a sentence; empty when it does not.

    Args:
        expected: The model's tensors.
        found: The file's.
        extra: Names that the file may have beyond the expected ones.
    """
    missing = [name for name in expected if name not in found and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in found if name not in expected and name not in extra]
    misshaped = [
        f"{name} ({_shape(tensor)} in the file, {_shape(expected[name])} in the model)"
        for name, tensor in found.items()
        if name in expected and tensor.shape != expected[name].shape
    ]
    parts = (("missing", missing), ("unexpected", unexpected), ("of another shape", misshaped))
    return "; ".join(f"{len(names)} {_plural('key', names)} {label}: {_some(names)}" for label, names in parts if names)


# --- Which network is it? -----------------------------------------------------------------------------------------


def resolve(checkpoint: Checkpoint, spec: str | None = None) -> Network:
    """Build the network that a checkpoint belongs to and load the weights into it.

    Args:
        checkpoint: What :func:`read` returned.
        spec: None to recognise the network from keys and shapes, the name of a known model, ``timm:NAME``, or
            ``package.module:factory``, which imports that module and calls the factory without arguments.

    Raises:
        ModelError: No known model fits, several do, or the one asked for cannot be built.
        CheckpointError: The weights do not fit the model.
    """
    if spec is None:
        network = _recognise(checkpoint)
    elif spec.startswith("timm:"):
        network = _from_timm(checkpoint, spec.removeprefix("timm:"))
    elif ":" in spec:
        network = _from_factory(checkpoint, spec)
    else:
        network = _known(checkpoint, spec)
    if isinstance(network.model, nn.Module):
        network.model.eval()
    return network


def build(spec: str) -> Network:
    """Build a network by name, in eval mode and with the weights that it is born with.

    Args:
        spec: As for :func:`resolve`.

    Raises:
        ModelError: No such model, or it cannot be built.
    """

    if spec.startswith("timm:"):
        name = spec.removeprefix("timm:")
        model = _create_timm(_timm_with(name), name, {})
        return Network(model.eval(), spec, _declared_shape(model))
    if ":" in spec:
        model = _call_factory(spec)
        return Network(model.eval(), spec, _declared_shape(model))
    entry = registry.entry(spec)
    return Network(entry.build().eval(), entry.name, entry.input_shape)


def _recognise(checkpoint: Checkpoint) -> Network:

    if isinstance(checkpoint.module, ExportedProgram):
        return Network(checkpoint.module, "an exported program", _example_shape(checkpoint.module))
    if checkpoint.module is not None:
        return Network(checkpoint.module, type(checkpoint.module).__name__, _declared_shape(checkpoint.module))
    matches = registry.recognise(checkpoint.state)
    if not matches:
        fused = not any(name.endswith("running_var") for name in checkpoint.state)
        raise ModelError(
            f"{checkpoint.path}: its {len(checkpoint.state)} keys ({_some(checkpoint.state)}) belong to no known "
            "model; "
            + ("it has no batch norms, so it may be fused already; otherwise " if fused else "")
            + "name the network with --model NAME, --model timm:NAME or --model package.module:factory"
        )
    if len(matches) > 1:
        names = ", ".join(entry.name for entry, _ in matches)
        raise ModelError(f"{checkpoint.path}: fits several known models ({names}); choose one with --model")
    return _build(checkpoint, *matches[0])


def _known(checkpoint: Checkpoint, name: str) -> Network:

    entry = registry.entry(name)
    try:
        return _build(checkpoint, entry, entry.options(checkpoint.state))
    except CheckpointError as error:
        others = " or ".join(other.name for other, _ in registry.recognise(checkpoint.state))
        reason = str(error).removeprefix(f"{checkpoint.path}: ")
        hint = f"; its keys and shapes are those of {others}" if others else ""
        raise CheckpointError(f"{checkpoint.path}: {reason}{hint}") from error


def _build(checkpoint: Checkpoint, entry: ModelEntry, options: dict[str, object]) -> Network:
    model = entry.build(**options)
    load_into(model, replace(checkpoint, state=entry.adapt(checkpoint.state)), name=entry.name)
    return Network(model, entry.name, _with_channels(entry.input_shape, options.get("in_channels")))


def _from_timm(checkpoint: Checkpoint, name: str) -> Network:
    timm = _timm_with(name)
    state = checkpoint.state
    config = dict(timm.models.get_pretrained_cfg(name).to_dict())
    options: dict[str, object] = {}
    heads = _first_shapes(state, config.get("classifier"))
    if config.get("classifier"):
        options["num_classes"] = heads[0] if heads else 0
    stem = _first_shapes(state, config.get("first_conv"))
    if stem and len(stem) > 2 and stem[1] != config.get("input_size", (stem[1],))[0]:
        options["in_chans"] = stem[1]
    model = _create_timm(timm, name, options)
    load_into(model, checkpoint, name=f"timm:{name}")
    return Network(model, f"timm:{name}", _with_channels(_declared_shape(model), options.get("in_chans")))


def _timm_with(name: str) -> Any:
    """The package timm, which has a model of this name."""
    timm = _import_timm()
    if not timm.is_model(name):
        near = timm.list_models(f"*{name.split('.')[0].split('_')[0]}*")
        hint = f"; near it are {_some(near)}" if near else ""
        raise ModelError(f"timm {timm.__version__} has no model {name!r}{hint}")
    return timm


def _create_timm(timm: Any, name: str, options: Mapping[str, object]) -> nn.Module:
    try:
        model: nn.Module = timm.create_model(name, pretrained=False, **options)
    except Exception as error:
        raise ModelError(f"timm could not build {name} with {dict(options)}: {first_line(error)}") from error
    return model


def _import_timm() -> Any:
    try:
        import timm
    except ImportError as error:
        raise ModelError(f"--model timm:NAME needs timm ({error}): pip install 'reparam[timm]'") from error
    except RuntimeError as error:
        # PyPI's torchvision registers its operators only beside the PyTorch build that it was compiled for.
        if "torchvision" not in str(error):
            raise
        raise ModelError(
            f"timm cannot be imported because torchvision was built for another PyTorch than {torch.__version__} "
            f"({first_line(error)}); install both from the same index, for example pip install --force-reinstall "
            "torch torchvision --index-url https://download.pytorch.org/whl/cpu"
        ) from error
    return timm


def _from_factory(checkpoint: Checkpoint, spec: str) -> Network:
    model = _call_factory(spec)
    load_into(model, checkpoint, name=spec)
    return Network(model, spec, _declared_shape(model))


def _call_factory(spec: str) -> nn.Module:
    try:
        model = import_attribute(spec)()
    except ReparamError:
        raise
    except Exception as error:
        raise ModelError(f"--model {spec} failed with {type(error).__name__}: {first_line(error)}") from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"--model {spec} returned a {type(model).__name__}, not a torch.nn.Module")
    return model


def import_attribute(spec: str) -> Any:
    """What ``package.module:name`` refers to; the current folder is importable.

    Raises:
        Exception: Whatever importing that module raises.
    """
    module_name, _, attribute = spec.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")  # a console script does not see the current folder, where the user's code is
    found: Any = importlib.import_module(module_name)
    for part in attribute.split("."):
        found = getattr(found, part)
    return found


def _declared_shape(model: nn.Module) -> tuple[int, ...] | None:
    """The input shape in the configuration that timm models carry, and models written after them."""
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    shape = config.get("input_size") if isinstance(config, Mapping) else None
    return tuple(shape) if shape else None


def _example_shape(program: ExportedProgram) -> tuple[int, ...] | None:
    """The input shape that a program was exported with, when it takes one tensor."""
    args, kwargs = program.example_inputs or ((), {})
    inputs = (*args, *kwargs.values())
    return tuple(inputs[0].shape[1:]) if len(inputs) == 1 and isinstance(inputs[0], Tensor) else None


def _with_channels(shape: tuple[int, ...] | None, channels: object) -> tuple[int, ...] | None:
    """``shape`` with the number of input channels that the checkpoint shows, where it shows one."""
    return (channels, *shape[1:]) if shape and isinstance(channels, int) else shape


def _first_shapes(state: Mapping[str, Tensor], names: str | Iterable[str] | None) -> tuple[int, ...]:
    """Shape of the weight of the first layer among ``names`` that the checkpoint has; empty when it has none."""
    for name in [names] if isinstance(names, str) else names or ():
        if f"{name}.weight" in state:
            return tuple(state[f"{name}.weight"].shape)
    return ()


# --- Files --------------------------------------------------------------------------------------------------------


def _is_safetensors(path: Path) -> bool:
    """Whether the file begins like a safetensors header, after refusing what is no file at all."""
    if path.is_dir():
        raise CheckpointError(f"{path}: is a folder, not a checkpoint file")
    try:
        with path.open("rb") as file:
            head = file.read(16)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    if not head:
        raise CheckpointError(f"{path}: is empty")
    pickled = head.startswith((_ZIP[:2], _LEGACY[:2]))
    return head[8:9] == b"{" or (path.suffix == ".safetensors" and not pickled)


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            # Copied, because kernels round differently on memory that is not aligned, as it is inside the file.
            return {name: file.get_tensor(name).clone() for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(f"{path}: is truncated or no safetensors file: {first_line(error)}") from error


def _zip_members(path: Path) -> list[str]:
    """Names of the files in a zip archive; none where the file is something else, or damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError):
        return []


def _read_program(path: Path, unsafe: bool) -> ExportedProgram:
    # torch.export.load is no weights_only reader. It unpickles what the archive says is pickled (tensor subclasses,
    # script and opaque objects, and example inputs that weights_only refuses), evaluates symbolic sizes as Python
    # (sympy.sympify), and loads the shared libraries that AOTInductor leaves.
    if not unsafe:
        raise CheckpointError(
            f"{path}: is an exported program, which torch.export.load may run code of; pass --unsafe-load only if you "
            "trust the source"
        )
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # it logs what it then raises
    try:
        # By an open file, since torch.export.load would judge a name by its ending.
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.load(file)
    except Exception as error:  # whatever torch makes of a damaged archive, or of one that another version wrote
        raise CheckpointError(
            f"{path}: its exported program cannot be read ({type(error).__name__}: {first_line(error)}); it is "
            f"damaged, or was written by another version of PyTorch than {torch.__version__}"
        ) from error
    finally:
        logging.disable(level)


def _read_pickle(path: Path, unsafe: bool) -> object:
    with path.open("rb") as file:
        head = file.read(len(_LEGACY))
    if not (head.startswith(_ZIP) or head == _LEGACY):
        raise CheckpointError(f"{path}: is not a checkpoint; expected a torch.save or safetensors file")
    if head.startswith(_ZIP) and not zipfile.is_zipfile(path):
        raise CheckpointError(f"{path}: {_why_not_read('')}")
    try:
        # By an open file, since torch.load would take a name for the format.
        with path.open("rb") as file, torch.serialization.safe_globals(_harmless_globals()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.load announces TorchScript archives, which are refused anyway
            payload: object = torch.load(file, map_location="cpu", weights_only=not unsafe)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path}: {_why_not_unpickled(str(error))}") from error
    except (ImportError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: was pickled with code that cannot be imported here ({first_line(error)}); run where that code "
            "is on PYTHONPATH, or save model.state_dict() instead"
        ) from error
    except (RuntimeError, EOFError, KeyError, ValueError, OSError) as error:
        raise CheckpointError(f"{path}: {_why_not_read(str(error))}") from error
    if isinstance(payload, torch.jit.ScriptModule):
        raise CheckpointError(f"{path}: {_why_not_read('TorchScript')}")
    return payload


def _harmless_globals() -> list[Any]:
    """Plain data that training scripts save beside the weights, and that PyTorch does not allow by itself."""
    try:
        import numpy
    except ImportError:
        return [argparse.Namespace]
    scalar = numpy.float64(0).__reduce__()[0]
    # A file knows this function by the name that it had in the numpy that wrote it.
    spellings = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    return [argparse.Namespace, numpy.dtype, *{type(numpy.dtype(code)) for code in "?bhilqBHILQefd"}, *spellings]


def _why_not_unpickled(message: str) -> str:
    found = re.search(r"GLOBAL (\S+)", message)
    if "GLOBAL" in message or "TorchScript" in message:
        what = f" ({found.group(1)})" if found else ""
        return f"contains pickled Python code{what}; pass --unsafe-load only if you trust the source"
    return "is damaged, or not a checkpoint: its pickle stream cannot be read"


def _why_not_read(message: str) -> str:
    if "TorchScript" in message:
        return "is a TorchScript archive, not a checkpoint; save the state_dict() of the network it was made from"
    if "central directory" in message or "not a ZIP archive" in message or "EOF" in message or not message:
        return "is truncated: the end of the file is missing"
    if "not in a subdirectory" in message or "data.pkl" in message:
        return "is a zip archive but not a checkpoint"
    return f"is damaged, or not a checkpoint: {message.splitlines()[0]}"


def _unwrap(node: object, path: Path, ema: bool, origin: tuple[str, ...] = ()) -> tuple[Any, tuple[str, ...]]:
    """Follow wrapper keys down to the mapping of tensors, or the module, inside."""
    if isinstance(node, (nn.Module, ExportedProgram)):
        return node, origin
    if not isinstance(node, Mapping):
        raise CheckpointError(f"{path}: holds a {type(node).__name__}, not a state dict")
    for key in (*AVERAGED, *WEIGHTS) if ema else (*WEIGHTS, *AVERAGED):
        if _holds_weights(node.get(key)):
            return _unwrap(node[key], path, ema, (*origin, key))
    tensors = {name: value for name, value in node.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if tensors:
        return tensors, origin
    others = [key for key, value in node.items() if _holds_weights(value)]
    if len(others) == 1:
        return _unwrap(node[others[0]], path, ema, (*origin, str(others[0])))
    if others:
        raise CheckpointError(f"{path}: holds several networks ({_some(others)}); save the one to fuse on its own")
    raise CheckpointError(f"{path}: holds no weights" + (f", only {_some(list(node))}" if node else ""))


def _holds_weights(value: object) -> bool:
    """Whether wrapper keys below ``value`` lead to tensors; an optimizer's state, keyed by number, does not."""
    if not isinstance(value, Mapping):
        return isinstance(value, nn.Module)
    return any(
        isinstance(key, str) and (isinstance(item, Tensor) or _holds_weights(item)) for key, item in value.items()
    )


# --- Words --------------------------------------------------------------------------------------------------------


def _select(state: Mapping[str, Tensor], bad: Callable[[Tensor], bool]) -> list[str]:
    return [name for name, tensor in state.items() if bad(tensor)]


def _is_quantized(tensor: Tensor) -> bool:
    return tensor.is_quantized


def _is_not_finite(tensor: Tensor) -> bool:
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return False
    wide = tensor.float() if tensor.element_size() == 1 else tensor  # isfinite does not know the 8-bit formats
    if bool(torch.isfinite(wide).all()):
        return False
    return not bool(((wide == 0) | (wide == float("-inf"))).all())


def _refuse(checkpoint: Checkpoint, what: str, names: list[str]) -> None:
    if names:
        count = f"{len(names)} {_plural('tensor', names)}"
        raise CheckpointError(f"{checkpoint.path}: {count} ({_some(names)}) with {what}")


def _some(names: Iterable[object]) -> str:
    words = [str(name) for name in names]
    return ", ".join(words[:_SHOWN]) + (", ..." if len(words) > _SHOWN else "")


def _plural(word: str, things: list[Any]) -> str:
    return word if len(things) == 1 else word + "s"


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"

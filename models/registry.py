"""The networks that reparam knows by name, and which of them a checkpoint belongs to.

A model file registers its builders here; nothing in this module knows any of them.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from reparam.errors import CheckpointError, ModelError, ReparamError

State = Mapping[str, Tensor]
BuilderT = TypeVar("BuilderT", bound=Callable[..., nn.Module])


@dataclass(frozen=True)
class ModelEntry:
    """A network that can be built by name.

    Attributes:
        name: What it is called here, such as ``repvit_m0_9``.
        build: Builds it in training form with random weights; takes the options as keywords.
        input_shape: Shape of one input, without the batch: ``(channels, height, width)``.
        description: One line about it.
        paper: Where it was published, with the arXiv number.
        options: Reads from a checkpoint the options of ``build`` that its shapes depend on. Raises
            ``CheckpointError`` when the checkpoint cannot be of this network.
        adapt: Renames a published checkpoint's keys to the network's own; leaves a state dict that has them alone.
    """

    name: str
    build: Callable[..., nn.Module]
    input_shape: tuple[int, ...]
    description: str
    paper: str
    options: Callable[[State], dict[str, object]]
    adapt: Callable[[State], dict[str, Tensor]]


T = TypeVar("T")


class Known(dict[str, T]):
    """What is known by name, in the order of registration.

    Args:
        kind: What it is, for errors.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def add(self, name: str, thing: T) -> None:
        """Make something known.

        Raises:
            ModelError: If the name is taken.
        """
        if name in self:
            raise ModelError(f"a {self.kind} named '{name}' is registered already: choose another name")
        self[name] = thing

    def find(self, name: str) -> T:
        """Look something up.

        Raises:
            ModelError: If there is none; the message lists the names that look like it, or else all.
        """
        if name in self:
            return self[name]
        spelled = re.sub(r"\W", "_", name.lower())  # RepViT-M0.9 is how the papers write it
        close = difflib.get_close_matches(spelled, self)
        advice = f"did you mean {' or '.join(close)}?" if close else f"known are {', '.join(self)}"
        raise ModelError(f"there is no {self.kind} named '{name}': {advice}")


_ENTRIES: Known[ModelEntry] = Known("model")


def _no_options(state: State) -> dict[str, object]:
    return {}


def register(
    name: str,
    *,
    input_shape: tuple[int, ...],
    description: str,
    paper: str,
    options: Callable[[State], dict[str, object]] = _no_options,
    adapt: Callable[[State], dict[str, Tensor]] = dict,
) -> Callable[[BuilderT], BuilderT]:
    """Decorate a builder to make it known under ``name``; see :class:`ModelEntry` for the arguments.

    Raises:
        ModelError: If the name is taken.
    """

    def decorate(build: BuilderT) -> BuilderT:
        _ENTRIES.add(name, ModelEntry(name, build, input_shape, description, paper, options, adapt))
        return build

    return decorate


def names() -> list[str]:
    """List every known model, in the order of registration."""
    return list(_ENTRIES)


def entry(name: str) -> ModelEntry:
    """Look a model up by name.

    Raises:
        ModelError: If there is none; the message lists the names that look like it.
    """
    return _ENTRIES.find(name)


def create(name: str, **options: object) -> nn.Module:
    """Build a model in training form, with random weights.

    Args:
        name: One of :func:`names`.
        **options: For the model's builder, such as ``num_classes``.

    Raises:
        ModelError: If there is no such model, or it has no such option.
    """
    build = entry(name).build
    signature = inspect.signature(build)
    try:
        signature.bind(**options)
    except TypeError as error:
        raise ModelError(f"cannot build '{name}': {error}; its options are {', '.join(signature.parameters)}") from None
    return build(**options)


def recognise(state: State) -> list[tuple[ModelEntry, dict[str, object]]]:
    """Find the known models whose parameters and buffers have exactly this checkpoint's names and shapes.

    Only a ``num_batches_tracked``, which inference does not read, may be missing. Models are built on the meta
    device, so nothing is allocated, and the values of the tensors are not read.

    Args:
        state: A state dict, under the model's own names or those of a published checkpoint.

    Returns:
        Every match, with the options to build it; after ``entry.build(**options)``, ``load_state_dict`` takes
        ``entry.adapt(state)``. Empty when no model fits.

    Raises:
        CheckpointError: If an item is not a tensor, so that this is no state dict.
    """
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                f"this is no state dict: its item {key!r} is a {type(value).__name__}, not a named tensor; training "
                "scripts keep the state dict under a key such as 'model' or 'state_dict'"
            )
    found = []
    for candidate in _ENTRIES.values():
        try:
            options = candidate.options(state)
            with torch.device("meta"):
                expected = candidate.build(**options).state_dict()
        except ReparamError:
            continue  # not this model's checkpoint, as its own reader says
        if _fits(candidate.adapt(state), expected):
            found.append((candidate, options))
    return found


def _fits(state: State, expected: State) -> bool:
    missing = expected.keys() - state.keys()
    return all(name.endswith("num_batches_tracked") for name in missing) and all(
        name in expected and expected[name].shape == tensor.shape for name, tensor in state.items()
    )

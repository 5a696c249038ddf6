"""Capturing a model: on example inputs, or on inputs that are made for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.fx import Graph

from reparam.capture import parameters
from reparam.capture.caches import forgotten, is_same
from reparam.capture.captured import Call, Capture
from reparam.capture.copies import private_copy, tensor_storages
from reparam.capture.examples import guesses, inputs_of
from reparam.capture.recording import Session
from reparam.capture.state import UnrecordableError
from reparam.errors import ReparamError
from reparam.graph.leaves import carries_hooks, is_leaf
from reparam.report import Remark


def capture(model: nn.Module, call: Call | None = None, *, sizes: str = "any") -> Capture:
    """Record the eval-mode function of a model, without changing the model.

    Args:
        model: Any module, in any mode, on any device.
        call: Positional and keyword arguments of a call; one is made up when left out.
        sizes: ``any``: a module that decides by sizes stays Python. ``example``: it is recorded as it decided.

    Raises:
        CaptureError: The model cannot be copied or has parameters without values.
        ReparamError: It does not run on the example inputs.
    """
    root = private_copy(model)
    parameters.settle(root)
    return record(root, call, sizes=sizes)


def capture_parts(
    model: nn.Module,
    entries: Sequence[tuple[str, Call | None]],
    *,
    sizes: str = "any",
    spans: Callable[[Capture], Iterable[str]],
) -> Capture:
    """Record parts of a model whose own Python stays.

    Of modules in one another, the innermost one is a part in which nothing is lost that can be fused in the outer one,
    so as much of the model as possible stays what it is.

    Args:
        model: As for :func:`capture`.
        entries: Methods of the model, and calls of them.
        sizes: As for :func:`capture`.
        spans: Paths of the modules in which a captured graph has something to fuse.
    """
    root = private_copy(model)
    parameters.settle(root)
    storages = tensor_storages(root.modules())
    known = [(name, call) for name, call in entries if call is not None]
    if not known:
        found = _guessed(root, storages, sizes)
        if found is None or found.call is None:
            return _without_example(root, storages, sizes)
        known = [(name, found.call) for name, _ in entries]
    with _explained():
        whole = _finished(Session(root, free=sizes == "any").record(known[0][1], entries=known), storages)
        wanted = {module for part in _all(whole.parts) for span in spans(part) if (module := _within(part, span))}
        again = private_copy(model)
        parameters.settle(again)
        places = dict(again.named_modules())
        only = frozenset(places[path] for path, module in root.named_modules() if module in wanted)
        session = Session(again, free=sizes == "any", only=only)
        return _finished(session.record(known[0][1], entries=known), tensor_storages(again.modules()) | storages)


def _all(parts: Mapping[str, Capture]) -> Iterator[Capture]:
    """Parts, and those in them."""
    for part in parts.values():
        yield from _all(part.parts)
        yield part


def _within(part: Capture, span: str) -> nn.Module | None:
    """The module at a path in a part, or the one around it that is called."""
    while span and not _is_callable(part.modules.get(span)):
        span = span.rpartition(".")[0]
    return part.modules.get(span)


def _is_callable(module: nn.Module | None) -> bool:
    return module is not None and not is_leaf(module) and type(module).forward is not nn.Module.forward


def record(root: nn.Module, call: Call | None = None, *, sizes: str = "any") -> Capture:
    """Record a module that may be changed and that is in eval mode; see :func:`capture`."""
    storages = tensor_storages(root.modules())
    if call is None:
        return _without_example(root, storages, sizes)
    with _explained():
        recorded = Session(root, free=sizes == "any").record(call)
        if recorded.by_size:
            # What it decided by may be what it remembers of earlier calls.
            with forgotten(root, call) as caches:
                if caches:
                    again = Session(root, free=sizes == "any").record(call)
                    recorded = again if is_same(again.output, recorded.output) else recorded
        return _finished(recorded, storages)


@contextmanager
def _explained() -> Iterator[None]:
    """Raise as a ReparamError that a model does not run."""
    try:
        yield
    except ReparamError:
        raise
    except (Exception, UnrecordableError) as error:
        raise ReparamError(f"the model does not run on the example inputs: {error}") from error


def _without_example(root: nn.Module, storages: frozenset[int], sizes: str) -> Capture:
    """Record on the first made-up input that the model takes; its parts by themselves where it takes none."""
    captured = _guessed(root, storages, sizes)
    if captured is not None:
        return captured
    names = ", ".join(inputs_of(root))
    said = f"no input could be made up for it ({names}): its parts were compiled by themselves; pass example_inputs"
    empty = Capture(
        root, Graph(), dict(root.named_modules()), storages, [Remark("capture", "Example", "", said)], False
    )
    empty.parts = dict(_parts(root, "", storages))
    return empty


def _guessed(root: nn.Module, storages: frozenset[int], sizes: str) -> Capture | None:
    names = inputs_of(root)
    for x in guesses(root) if names else ():
        # A name may stand for all positional arguments.
        call: Call = (tuple(x.clone() for _ in names), {})
        try:
            recorded = Session(root, free=sizes == "any", given=False).record(call)
        except (Exception, UnrecordableError):
            continue
        shape = "x".join(map(str, x.shape))
        said = f"no example inputs were given; made up: {' and '.join(names)} of {x.dtype}, {shape}"
        captured = _finished(recorded, storages)
        captured.remarks.insert(0, Remark("capture", "Example", "", said))
        return captured
    return None


def _parts(parent: nn.Module, path: str, storages: frozenset[int]) -> Iterator[tuple[str, Capture]]:
    """Modules in one that stays Python which run on inputs made for them."""
    for name, child in parent.named_children():
        where = f"{path}.{name}" if path else name
        if is_leaf(child) or carries_hooks(child) or isinstance(child, torch.jit.ScriptModule):
            continue
        is_called = type(child).forward is not nn.Module.forward
        captured = _guessed(child, storages, "any") if is_called else None
        if captured is not None and captured.traced:
            captured.remarks = captured.remarks[1:]
            yield where, captured
        else:
            yield from _parts(child, where, storages)


def _finished(recorded: Capture, storages: frozenset[int]) -> Capture:
    """What was recorded, with what the graph refers to in its place."""
    for name, value in recorded.made.items():
        if isinstance(value, nn.Module):
            recorded.root.add_module(name, value)
        else:
            recorded.root.__dict__[name] = value
    recorded.graph._tracer_cls = None
    recorded.storages = storages
    recorded.parts = {
        path: _finished(part, storages) for path, part in recorded.parts.items() if part.traced and part.alike
    }
    return recorded

"""What modules come to hold while they are recorded, whose doing that is, and whether it stays as it is."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from reparam.capture.caches import is_same
from reparam.capture.captured import Call, Capture
from reparam.capture.copies import OWN_DICTS
from reparam.capture.sizes import SYMBOLIC, hinted
from reparam.capture.state import Remembers, State, writes_undone
from reparam.capture.structures import leaves, mapped
from reparam.compare import clones

_NUMBERS = (bool, int, float, str)


class Changes:
    """What the modules of a private copy hold, other than when recording began.

    Attributes:
        state: What they held then.
        left: What they came to hold in their own calls.
        kept: Those that change as they did, since they are run as they are.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.modules, self.state = modules, State(modules)
        self.left: dict[nn.Module, State] = {}
        self.kept: set[nn.Module] = set()
        self.holders: dict[int, set[nn.Module]] = {}
        for module, contents in self.state.contents.items():
            for _, holder, _ in contents:
                self.holders.setdefault(id(holder), set()).add(module)

    def leave(self, module: nn.Module, kept: bool = False) -> None:
        """Take what a module has come to hold in its own call for what it holds from then on."""
        state = State(module.modules())
        self.left.update(dict.fromkeys(state.attributes, state))
        if kept:
            self.kept.update(state.attributes)

    def check(self, module: nn.Module, remembers: Remembers) -> None:
        """Refuse what a module has come to hold of the call that it was recorded in."""
        for part in module.modules():
            if part in self.state.attributes:
                self.left.get(part, self.state).check(part, remembers)

    def restore(self, module: nn.Module) -> None:
        """Put back what a module and those in it held before."""
        self.state.restore(part for part in module.modules() if part in self.state.attributes)
        for part in module.modules():
            self.left.pop(part, None)

    def set_around(self, module: nn.Module) -> str | None:
        """What a module holds, by name, that neither was there nor comes from its own calls."""
        for part in module.modules():
            state = self.left.get(part, self.state)
            for name in state.changes(part) if part in state.attributes else ("modules",):
                return name.lstrip("_")
        return None

    def left_behind(self, module: nn.Module) -> str | None:
        """A size or another number that a part came to hold."""
        for part in module.modules():
            before = self.state.attributes.get(part, {})
            for name, value in part.__dict__.items():
                if value is not before.get(name) and any(
                    isinstance(leaf, (*_NUMBERS, *SYMBOLIC)) for leaf in leaves(value)
                ):
                    return name
        return None

    def obstacle(self, module: nn.Module) -> str | None:
        """Why a part may not be taken for what it computes by itself: the Python around it has a say in that."""
        if (name := self.set_around(module)) is not None:
            return f"the Python around it sets its {name}"
        inner = set(module.modules())
        for part in inner:
            for name, holder, _ in self.state.contents[part]:
                if name not in OWN_DICTS and not self.holders[id(holder)] <= inner:
                    return f"it shares its {name} with the Python around it"
        return None

    def unstable(
        self, run: Callable[[], Any], larger: Callable[[], Any], graph: Callable[[], Any] | None
    ) -> dict[nn.Module, str]:
        """The modules that change, and compute or hold something else at a second call; and why.

        Args:
            run: Calls the model.
            larger: Calls it with larger inputs.
            graph: Computes what was recorded of it, if it is a graph.
        """
        changed = {module: names for module in self.modules if (names := [*self.state.changes(module)])}
        if not changed:
            return {}
        for module in self.modules:
            sizes = {k: v for k, v in module.__dict__.items() if any(isinstance(leaf, SYMBOLIC) for leaf in leaves(v))}
            module.__dict__.update({name: mapped(value, hinted) for name, value in sizes.items()})
        held = [(module, name, clones(_held(module, name))) for module, names in changed.items() for name in names]
        once, drawn = State(self.modules), torch.get_rng_state()
        expected = _outcome(run, self.modules)
        reasons = {
            module: f"it changes its own {name} at every call"
            for module, name, value in held
            if module not in self.kept and not _is_same(value, _held(module, name))
        }
        again = [clones(_held(module, name)) for module, name, _ in held]
        if graph is not None:
            once.restore(self.modules)
            torch.set_rng_state(drawn)
            if not is_same(expected, _outcome(graph, self.modules)):
                said = "it computes something else when it is called again"
                reasons |= dict.fromkeys(changed.keys() - self.kept or changed, said)
        once.restore(self.modules)
        if self.kept & changed.keys() and not isinstance(_outcome(larger, self.modules), Exception):
            # Nobody sees who reads a number that Python keeps.
            reasons |= {
                module: f"it may read the {name} of {type(module).__name__}, which is of a size"
                for (module, name, _), value in zip(held, again, strict=True)
                if module in self.kept and _numbers(value) != _numbers(_held(module, name))
            }  # fmt: skip
        return reasons


def _outcome(run: Callable[[], Any], modules: Sequence[nn.Module]) -> Any:
    try:
        with writes_undone(modules):
            return run()
    except Exception as error:
        return error


def _held(module: nn.Module, name: str) -> Any:
    found = next((values[name] for values in (module._buffers, module.__dict__) if name in values), None)
    return mapped(found, lambda leaf: leaf)


def _numbers(value: Any) -> list[Any]:
    return [leaf for leaf in leaves(value) if isinstance(leaf, _NUMBERS)]


def _is_same(a: Any, b: Any) -> bool:
    """Whether two values hold as much, and the same tensors and numbers."""
    return all(
        torch.equal(x, y) and x.dtype == y.dtype
        if isinstance(x, Tensor) and isinstance(y, Tensor)
        else type(x) is type(y) and (not isinstance(x, _NUMBERS) or x == y)
        for x, y in zip_longest(leaves(a), leaves(b), fillvalue=leaves)
    )


def replayed(recorded: Capture, call: Call) -> Any:
    """What a graph computes of a call."""
    args, kwargs = cloned(call)
    return Replay(recorded, inspect.signature(recorded.root.forward).bind(*args, **kwargs).arguments).run()


class Replay(torch.fx.Interpreter):
    """Runs a graph whose root does not hold yet what was made for it."""

    def __init__(self, recorded: Capture, given: dict[str, Any]) -> None:
        super().__init__(recorded.root, graph=recorded.graph)
        self.made, self.given = recorded.made, given

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        """An argument of the call."""
        return self.given.get(target.lstrip("*"), args[0] if args else {} if target.startswith("**") else ())

    def fetch_attr(self, target: str) -> Any:
        """A tensor or a module."""
        return self.made[target] if target in self.made else super().fetch_attr(target)


def cloned(call: Call) -> Call:
    """Arguments on copies of their tensors."""
    args, kwargs = clones((tuple(call[0]), dict(call[1])))
    return args, kwargs

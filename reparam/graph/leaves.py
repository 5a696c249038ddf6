"""Modules that are taken as a whole: torch.nn layers, and classes that were registered for lifting."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.fx import Node

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

# What computes the operator of a layer class, a function or a tensor method; filled by :mod:`reparam.graph.lift`.
LIFTERS: dict[Any, Callable[..., Any]] = {}


def is_leaf(module: nn.Module) -> bool:
    """Whether a module is taken as a whole instead of being traced: torch.nn layers and registered classes.

    A subclass counts while it computes what its base does, that is, while it overrides neither ``forward`` nor a
    helper that the base's ``forward`` may call.
    """
    return leaf_class(type(module)) is not None and "forward" not in module.__dict__


_LEAF_CLASSES: dict[type, type | None] = {}

# Private methods that have no say in what a layer computes.
_INERT = {"_load_from_state_dict", "_save_to_state_dict", "_get_name", "_register_load_state_dict_pre_hook",
          "_check_input_dim", "_version"}  # fmt: skip


def leaf_class(cls: type) -> type | None:
    """The torch.nn or registered class whose computation ``cls`` has kept."""
    if cls not in _LEAF_CLASSES or (_LEAF_CLASSES[cls] is None and cls in LIFTERS):
        _LEAF_CLASSES[cls] = next((base for base in cls.__mro__ if _is_known(base) and keeps(cls, base)), None)
    return _LEAF_CLASSES[cls]


def _is_known(base: type) -> bool:
    if base in LIFTERS:
        return True
    of_torch = base.__module__.startswith(("torch.nn.modules.", "torch.ao.nn."))
    containers = (nn.Module, nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
    return of_torch and base not in containers and "forward" in dir(base)


def keeps(cls: type, base: type) -> bool:
    """Whether ``cls`` inherits ``forward`` and the private helpers of ``base`` unchanged."""
    if cls is base:
        return True
    if cls.forward is not base.forward:  # type: ignore[attr-defined]
        return False
    helpers = {
        name
        for owner in base.__mro__
        if owner is not nn.Module and issubclass(owner, nn.Module)
        for name, value in vars(owner).items()
        if name.startswith("_") and not name.startswith("__") and callable(value) and name not in _INERT
    }
    return all(getattr(cls, name) is getattr(base, name) for name in helpers)


def is_opaque(node: Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a node calls Python that was not traced."""
    if node.op != "call_module":
        return False
    module = modules[str(node.target)]
    return not is_leaf(module) or carries_hooks(module)


def carries_hooks(module: nn.Module) -> bool:
    """Whether something runs beside a module's forward that a fused kernel would drop.

    Besides hooks, these are parametrizations that do more than compute numbers from numbers.
    """
    return "parametrizations" in module._modules or any(map(module.__dict__.get, HOOKS))

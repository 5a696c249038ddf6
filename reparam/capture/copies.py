"""Private copies: every Python object of a model copied, its tensors shared."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from reparam.errors import CaptureError

# All that ``nn.Module`` keeps of hooks that run when it is called.
ROOT_HOOKS = tuple(name for name in nn.Module().__dict__ if "forward" in name or "backward" in name)


def private_copy(model: nn.Module) -> nn.Module:
    """Copy every Python object of a model, share its tensors, and put the copy in eval mode.

    Raises:
        CaptureError: The model has parameters without values, or holds something that cannot be copied.
    """
    model = unwrapped(model)
    memo: dict[int, Any] = {}
    modules = list(model.modules())
    for module in modules:
        for name, tensor in tensors_in(module):
            if torch.nn.parameter.is_lazy(tensor):
                raise CaptureError(
                    f"{type(module).__name__}.{name} has no values yet; run the model once, or load a checkpoint"
                )
            memo.setdefault(id(tensor), _alias(tensor))
    wrappers = [module for module in modules if unwrapped(module) is not module]
    for module in wrappers:
        memo[id(module)] = Wrapper.__new__(Wrapper)
    left = [module for module in modules if id(module) not in memo]
    plain = [module for module in left if is_copied_plainly(type(module))]  # type: ignore[arg-type]
    for module in plain:
        memo[id(module)] = object.__new__(type(module))
    try:
        for module in reversed(plain):  # a graph module copies itself, with layers that must be complete by then
            # What ``module.compile()`` keeps would run the module itself.
            memo[id(module)].__dict__.update(
                {
                    name: value if type(value) in ATOMS else _copied(value, memo)
                    for name, value in module.__dict__.items()
                    if name != "_compiled_call_impl"
                }
            )
        for module in wrappers:
            memo[id(module)].wrap(module, copy.deepcopy(next(module.children()), memo))
        with warnings.catch_warnings():
            # torch's own tree specs, which exported programs carry, copy in a way that they call deprecated.
            warnings.simplefilter("ignore", FutureWarning)
            result: nn.Module = copy.deepcopy(model, memo)
    except Exception as error:
        raise CaptureError(
            f"{type(model).__name__} cannot be copied ({error}); pass a model that copy.deepcopy copies"
        ) from error
    _set_eval(result)
    return result


class Wrapper(nn.Module):
    """In the place of a wrapper inside a copy: what it wraps, under the name that the wrapper has for it."""

    def wrap(self, original: nn.Module, module: nn.Module) -> None:
        """Wrap ``module`` as ``original`` wraps its own, with the same hooks."""
        nn.Module.__init__(self)
        self.__dict__.update({name: copy.copy(original.__dict__[name]) for name in ROOT_HOOKS})
        self.name = next(iter(original._modules))
        self._modules[self.name] = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the wrapped module computes."""
        return self._modules[self.name](*args, **kwargs)  # type: ignore[misc]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # So does the wrapper of ``torch.compile``.
            return getattr(self.__dict__["_modules"][self.__dict__["name"]], name)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside wrappers that only change how it runs: data parallelism, ``torch.compile``."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(model, torch._dynamo.OptimizedModule) if "_orig_mod" in model._modules else False:
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


# What most attributes of a module are; looking for anything else is not worth the while.
_SIMPLE = frozenset([type(None), bool, int, float, str, tuple, dict, set, OrderedDict, torch.dtype, torch.device])
ATOMS = frozenset([type(None), bool, int, float, str, torch.dtype, torch.device])
_CONTAINERS = frozenset([dict, list, set, OrderedDict])


def tensors_in(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, buffers and plain tensor attributes."""
    for values in (module._parameters, module._buffers, module.__dict__):
        for name, value in values.items():
            if type(value) not in _SIMPLE and isinstance(value, Tensor):
                yield name, value


def _alias(tensor: Tensor) -> Tensor:
    """The same memory under a new tensor, of the same class of parameter or buffer."""
    alias = tensor.detach()
    return nn.Parameter(alias, requires_grad=False) if isinstance(tensor, nn.Parameter) else alias


@cache
def is_copied_plainly(cls: Any) -> bool:
    """Whether copying ``__dict__`` copies an instance: no method or slot says otherwise."""
    special = ("__deepcopy__", "__reduce__", "__reduce_ex__", "__getstate__", "__slots__", "__getnewargs__")
    own = [base for base in inspect.getmro(cls) if base not in (nn.Module, object)]
    return not any(name in base.__dict__ for base in own for name in special)


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    """``copy.deepcopy``, with a short way for what most attributes of a module are."""
    if type(value) in _CONTAINERS and not value:
        return memo.setdefault(id(value), type(value)())
    return copy.deepcopy(value, memo)


def in_eval_mode(model: nn.Module) -> nn.Module:
    """What to run for the eval-mode function: the model itself, unless it does more in ``eval()`` than set flags."""
    model = unwrapped(model)
    return private_copy(model) if _overrides_modes(model.modules()) else model


def _overrides_modes(modules: Iterable[nn.Module]) -> bool:
    plain = (nn.Module.train, nn.Module.eval)
    classes: set[Any] = set(map(type, modules))
    return any((cls.train, cls.eval) != plain for cls in classes)


def _set_eval(root: nn.Module) -> None:
    modules = list(root.modules())
    if _overrides_modes(modules):
        # A model may do more than flip flags here, such as merging weights in place: into its own memory.
        own_tensors(root, tensor_storages(modules))
        root.eval()
    for module in modules:
        module.__dict__["training"] = False
        if isinstance(module, torch.jit.ScriptModule):
            module.eval()
            for parameter in module.parameters():
                # Copied by an operation that autograd has recorded.
                parameter.detach_()


def tensor_storages(modules: Iterable[nn.Module]) -> frozenset[int]:
    """Identities of the memory that the tensors of some modules lie in."""
    return frozenset(storage_of(tensor) for module in modules for _, tensor in tensors_in(module))


def storage_of(tensor: Tensor) -> int:
    """Identity of the memory that a tensor lies in."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return id(tensor)


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """What two tensors share when they are the same numbers in the same memory, as copies of tied parameters are."""
    try:
        place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
    except (NotImplementedError, RuntimeError):
        return (id(tensor),)
    return place if place[0] else (id(tensor),)


OWN_DICTS = frozenset(name for name, value in nn.Module().__dict__.items() if isinstance(value, (dict, set)))


def own_tensors(root: nn.Module, shared: frozenset[int]) -> None:
    """Give a model its own memory wherever it lies in ``shared``, keeping ties between its tensors."""
    clones: dict[Any, Tensor] = {}

    def owned(value: Any) -> Any:
        if isinstance(value, Tensor) and storage_of(value) in shared:
            is_parameter = isinstance(value, nn.Parameter)
            key = (is_parameter, *_place(value))
            if key not in clones:
                clone = value.detach().clone()
                clones[key] = nn.Parameter(clone, value.requires_grad) if is_parameter else clone
            return clones[key]
        # Several modules may hold the same list or dict, and go on doing so.
        if type(value) is list:
            value[:] = map(owned, value)
        elif type(value) is dict:
            value.update({k: owned(v) for k, v in value.items()})
        return tuple(map(owned, value)) if type(value) is tuple else value

    for module in root.modules():
        if isinstance(module, torch.jit.ScriptModule):
            # Its copy has memory of its own.
            continue
        for values in (module._parameters, module._buffers, module.__dict__):
            # What torch keeps in dicts of its own (hooks, submodules) stays.
            found = {k: owned(v) for k, v in values.items() if type(v) not in ATOMS and k not in OWN_DICTS}
            values.update({k: v for k, v in found.items() if v is not values[k]})

"""nn.Module to graph: what a model computes, with activations traced and parameters run.

A parameter that ``forward`` reads stays a tensor. Whatever the model computes from parameters alone (a kernel that
is generated, standardised, masked or normalised) therefore runs once, while tracing, and reaches the graph as a
constant; no rule has to know how it was made.

A module that cannot be traced is recorded as one opaque leaf, innermost first, and tracing goes on. A trace is
trusted only as far as it is certain: asking whether an activation is a tensor, or how many axes it has, is answered
when it is known, and otherwise makes the module opaque. Modules that carry hooks, that write to their own
parameters or that draw random numbers without an activation are opaque, too, since running them once is not the
same as running them every time.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import operator
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import torch.fx
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.fx.proxy import Attribute, Proxy, TraceError
from torch.utils._python_dispatch import TorchDispatchMode

from reparam import aliasing, aten, facts
from reparam.constants import has_activation, meeting_activations
from reparam.errors import CaptureError, first_line
from reparam.report import Remark

# All that ``nn.Module`` keeps of hooks that run when it is called.
_ROOT_HOOKS = tuple(name for name in nn.Module().__dict__ if "forward" in name or "backward" in name)

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass
class Capture:
    """A traced model.

    Attributes:
        root: Private copy of the model in eval mode, whose modules and tensors the graph refers to. Its tensors
            share memory with the model's own.
        modules: Its modules by path, the root at the empty one.
        storages: Identities of the memory that its tensors, and the model's, lie in.
        graph: What ``root`` computes. Every node has ``meta["scope"]`` (module path that it ran in) and what
            :mod:`reparam.facts` knows.
        remarks: Which modules were left opaque, and why.
        traced: False when not even the root could be traced; ``graph`` then calls nothing.
    """

    root: nn.Module
    graph: Graph
    modules: dict[str, nn.Module]
    storages: frozenset[int]
    remarks: list[Remark] = field(default_factory=list)
    traced: bool = True


def capture(model: nn.Module, example_inputs: tuple[tuple[Any, ...], dict[str, Any]] | None = None) -> Capture:
    """Trace the eval-mode function of a model, without changing the model.

    Args:
        model: Any module, in any mode, on any device.
        example_inputs: Positional and keyword arguments of a call, or None. They tell which optional arguments
            are used and how many axes the inputs have; their values are not looked at.

    Raises:
        CaptureError: The model cannot be copied or has parameters without values.
    """
    from reparam import parameters

    root = private_copy(model)
    parameters.settle(root)
    return trace(root, example_inputs)


def trace(
    root: nn.Module,
    example_inputs: tuple[tuple[Any, ...], dict[str, Any]] | None = None,
    *,
    assume_tensor: bool = True,
) -> Capture:
    """Trace a module that may be changed and that is in eval mode; see :func:`capture`.

    Args:
        root: The module.
        example_inputs: As for :func:`capture`.
        assume_tensor: Whether the first argument of a model is a tensor where no example shows it; that of a part of
            a model may be anything.
    """
    modules = dict(root.named_modules())
    storages = tensor_storages(modules.values())
    state = State(modules.values())
    tracer = _Tracer(modules, example_inputs, state, assume_tensor)
    try:
        with torch.no_grad(), NoSideEffects(storages), _forward_only(), meeting_activations(tracer.call_on_constant):
            _move_forward_to_class(root)
            graph = tracer.trace(root, tracer.fixed_arguments(root))
            for module in modules.values():
                state.check(module)
    except Exception as error:
        remark = Remark("capture", "Trace", "", f"not traceable, kept as Python: {first_line(error)}")
        return Capture(root, Graph(), modules, storages, [*tracer.remarks, remark], traced=False)
    finally:
        # What a forward leaves behind on its module while being traced is of no use, and may be a proxy.
        state.restore(modules.values())
        root.__dict__.update(tracer.constants)
    graph.owning_module = None
    facts.settle_inputs(graph.nodes, modules)
    # A graph module is unpickled by tracing its code, for which torch's own tracer will do.
    graph._tracer_cls = None
    for node in graph.nodes:
        # Annotations may be strings or local names, which a pickle cannot import.
        node.type = None
    return Capture(root, graph, modules, storages, tracer.remarks)


# The private copy.


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
    for module in modules:
        if unwrapped(module) is not module:
            memo[id(module)] = Wrapper.__new__(Wrapper)
    left = [module for module in modules if id(module) not in memo]
    plain = [module for module in left if _copies_plainly(type(module))]  # type: ignore[arg-type]
    for module in plain:
        memo[id(module)] = object.__new__(type(module))
    try:
        for module in reversed(plain):  # a graph module copies itself, with layers that must be complete by then
            # What ``module.compile()`` keeps would run the module itself.
            attributes = {k: v for k, v in module.__dict__.items() if k != "_compiled_call_impl"}
            copied = {k: v if type(v) in ATOMS else _copied(v, memo) for k, v in attributes.items()}
            memo[id(module)].__dict__.update(copied)
        for module in modules:
            if unwrapped(module) is not module:
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
        self.__dict__.update({name: copy.copy(original.__dict__[name]) for name in _ROOT_HOOKS})
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
def _copies_plainly(cls: Any) -> bool:
    """Whether copying ``__dict__`` copies an instance: no method or slot says otherwise."""
    special = ("__deepcopy__", "__reduce__", "__reduce_ex__", "__getstate__", "__slots__", "__getnewargs__")
    own = [base for base in inspect.getmro(cls) if base not in (nn.Module, object)]
    return not any(name in base.__dict__ for base in own for name in special)


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    """``copy.deepcopy``, with a short way for what nearly every attribute of a module is."""
    cls = type(value)
    if cls in ATOMS or (cls is tuple and all(type(item) in ATOMS for item in value)):
        return value
    known = memo.get(id(value))
    if known is not None:
        return known
    if cls is dict:
        # Noted before it is filled, as several modules may hold it.
        copied: dict[Any, Any] = memo.setdefault(id(value), {})
        copied.update({k: _copied(v, memo) for k, v in value.items()})
        return copied
    if cls in (OrderedDict, set, list) and not value:
        return memo.setdefault(id(value), cls())
    return copy.deepcopy(value, memo)


def has_optional_arguments(model: nn.Module) -> bool:
    """Whether a call of a model may leave arguments out, or give as many as it likes."""
    parameters = list(inspect.signature(model.forward).parameters.values())
    return any(parameter.default is not parameter.empty or parameter.kind in _VARIADIC for parameter in parameters)


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
    return frozenset(_storage(tensor) for module in modules for _, tensor in tensors_in(module))


def _storage(tensor: Tensor) -> int:
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


_OWN_DICTS = frozenset(name for name, value in nn.Module().__dict__.items() if isinstance(value, (dict, set)))


def own_tensors(root: nn.Module, shared: frozenset[int]) -> None:
    """Give a model its own memory wherever it lies in ``shared``, keeping ties between its tensors."""
    clones: dict[Any, Tensor] = {}

    def owned(value: Any) -> Any:
        if isinstance(value, Tensor) and _storage(value) in shared:
            is_parameter = isinstance(value, nn.Parameter)
            key = (is_parameter, *_place(value))
            if key not in clones:
                clone = value.detach().clone()
                clones[key] = nn.Parameter(clone, value.requires_grad) if is_parameter else clone
            return clones[key]
        if type(value) in (list, tuple):
            return type(value)(owned(item) for item in value)
        return {k: owned(v) for k, v in value.items()} if type(value) is dict else value

    for module in root.modules():
        if isinstance(module, torch.jit.ScriptModule):
            # Its copy has memory of its own.
            continue
        for values in (module._parameters, module._buffers, module.__dict__):
            # What torch keeps in dicts of its own (hooks, submodules) stays.
            found = {k: owned(v) for k, v in values.items() if type(v) not in ATOMS and k not in _OWN_DICTS}
            values.update({k: v for k, v in found.items() if v is not values[k]})


class State:
    """What the forwards of some modules could change of them and find again at the next call."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.attributes = {module: dict(module.__dict__) for module in modules}
        self.contents = {
            module: {
                name: copy.copy(value)
                for name, value in attributes.items()
                if type(value) not in ATOMS and _may_change(name, value)
            }
            for module, attributes in self.attributes.items()
        }

    def check(self, module: nn.Module) -> None:
        """Raise TraceError when the module is not as it was. Constants made at the first use are no change."""
        contents, attributes = self.contents[module], module.__dict__
        for name, value in self.attributes[module].items():
            new = attributes.get(name)
            # Nearly always the same and no container: nothing to ask for.
            if (name in contents and self._grew(module, name)) if value is new else _differ(value, new):
                raise TraceError(f"it changes its own {name.lstrip('_')} at every call")

    def _grew(self, module: nn.Module, name: str) -> bool:
        """Whether a container holds other things than before, or has come to hold activations."""
        old, new = self.contents[module][name], module.__dict__[name]
        if same_items(old, new):
            return False
        old_items, new_items = _items(old), _items(new)
        changed = len(new_items) < len(old_items) or any(map(_differ, old_items, new_items))
        return changed or any(issubclass(type(item), Proxy) for item in new_items[len(old_items) :])

    def restore(self, modules: Iterable[nn.Module]) -> None:
        """Put back attributes, and what was in lists, dicts and sets."""
        for module in modules:
            attributes = self.attributes[module]
            for name, contents in self.contents[module].items():
                value = attributes[name]
                if not same_items(value, contents):
                    value.clear()
                    (value.extend if isinstance(value, list) else value.update)(contents)
            if list(module.__dict__) != list(attributes) or any(
                module.__dict__[name] is not value for name, value in attributes.items()
            ):
                module.__dict__.clear()
                module.__dict__.update(attributes)


def keeps_state(root: nn.Module, call: Callable[[], Any]) -> bool:
    """Whether a model comes out of a call other than it went in; what it makes at its first call does not count."""
    modules = list(root.modules())
    with unchanged(root):
        call()
        state = State(modules)
        call()
        return not all(
            module.__dict__.keys() == state.attributes[module].keys()
            and all(module.__dict__[name] is value for name, value in state.attributes[module].items())
            and all(same_items(module.__dict__[name], old) for name, old in state.contents[module].items())
            for module in modules
        )


@contextmanager
def unchanged(model: nn.Module, *, writes: bool = True) -> Iterator[None]:
    """Run a model for a look at it: without its own hooks, and with its state put back afterwards.

    Args:
        model: Any module.
        writes: Whether it may write to its own tensors.
    """
    modules = list(model.modules())
    state = State(modules)
    tensors = [tensor for module in modules for _, tensor in tensors_in(module)] if writes else []
    values = [(tensor, tensor.detach().clone()) for tensor in tensors]
    for name in _ROOT_HOOKS:
        model.__dict__[name] = OrderedDict()
    try:
        yield
    finally:
        state.restore(modules)
        with torch.no_grad():
            for tensor, value in values:
                if not torch.equal(tensor, value):
                    tensor.copy_(value)


def move_hooks(attributes: Mapping[str, Any], model: nn.Module) -> None:
    """Let what runs beside one model's forward run beside another's: the hooks among its attributes."""
    model.__dict__.update({name: attributes[name] for name in _ROOT_HOOKS})


# Where torch keeps hooks, which no forward touches.
_HOOK_DICTS = _OWN_DICTS - {"_parameters", "_buffers", "_modules"}


def _may_change(name: str, value: Any) -> bool:
    """Whether an attribute is a container that a forward might put something into."""
    return isinstance(value, (list, dict, set)) and name not in _HOOK_DICTS


def _items(container: Any) -> list[Any]:
    return [*container, *container.values()] if isinstance(container, dict) else list(container)


def same_items(a: Any, b: Any) -> bool:
    """Whether two containers hold the very same objects, in the same order."""
    return not a and not b if not a or not b else len(a) == len(b) and all(map(operator.is_, _items(a), _items(b)))


def _differ(old: Any, new: Any) -> bool:
    """Whether a value is another one than before, other than made at its first use."""
    if old is new:
        return False
    if old is None:
        return issubclass(type(new), Proxy)
    return type(old) is not type(new) or not isinstance(old, (bool, int, float, str, tuple)) or old != new


def _move_forward_to_class(root: nn.Module) -> None:
    """A ``forward`` that was set on the instance gets a class of its own, where the tracer looks for it."""
    patched = root.__dict__.get("forward")
    if patched is None:
        return
    if getattr(patched, "__self__", None) is not root:
        raise TraceError("its forward was replaced by a function of something else")
    cls = type(root)
    root.__class__ = type(cls.__name__, (cls,), {"forward": patched.__func__, "__module__": cls.__module__})


class _Context:
    """What the forward of an autograd function may tell its backward, which nobody asks."""

    needs_input_grad = ()
    save_for_backward = save_for_forward = mark_dirty = mark_non_differentiable = lambda self, *args: None
    set_materialize_grads = lambda self, value: None  # noqa: E731


@contextmanager
def _forward_only() -> Iterator[None]:
    """See through what only changes how gradients are computed: checkpoints, and autograd functions.

    torch's own ``Function.apply`` does not survive a proxy.
    """
    module: Any = torch.utils.checkpoint
    function: Any = torch.autograd.Function
    apply = function.__dict__["apply"]

    def forward(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if not any(issubclass(type(arg), Proxy) for arg in torch.utils._pytree.tree_leaves((args, kwargs))):
            return apply.__get__(None, cls)(*args, **kwargs)
        separate = cls.setup_context is not function.setup_context
        return cls.forward(*args, **kwargs) if separate else cls.forward(_Context(), *args, **kwargs)

    class Plain:
        @staticmethod
        def apply(function: Callable[..., Any], preserve: Any, *args: Any) -> Any:
            return function(*args)

    def nothing(*args: Any, **kwargs: Any) -> Iterator[None]:
        yield  # once before what is wrapped runs, and ends after it

    # Everybody has ``checkpoint`` under a name of their own; both its ways of working go through these.
    shims = {"CheckpointFunction": Plain, "_checkpoint_without_reentrant_generator": nothing}
    kept = {name: getattr(module, name) for name in shims if hasattr(module, name)}
    try:
        for name in kept:
            setattr(module, name, shims[name])
        function.apply = classmethod(forward)
        yield
    finally:
        function.apply = apply
        for name, value in kept.items():
            setattr(module, name, value)


class NoSideEffects(TorchDispatchMode):
    """Refuse to run, while tracing, what must run at every call: writes to the model's tensors, random numbers."""

    def __init__(self, storages: frozenset[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.storages = storages

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise TraceError(f"it draws random numbers ({func})")
        schema = func._schema
        if schema.is_mutable:
            named = {argument.name: value for argument, value in zip(schema.arguments, args)}  # noqa: B905
            named.update(kwargs or {})
            for argument in schema.arguments:
                value = named.get(argument.name)
                written = argument.alias_info is not None and argument.alias_info.is_write
                if written and isinstance(value, Tensor) and _storage(value) in self.storages:
                    raise TraceError(f"it writes to its own tensors ({func})")
        return func(*args, **(kwargs or {}))


# Tracing.


class _Value(Proxy):
    """An activation. Says that it is a tensor, and how many axes it has, when that is known."""

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        match self.node.meta.get("kind"):
            case "tensor":
                return Tensor
            case "unknown":
                raise TraceError("the type of an unknown value was asked for")
        return type(self)

    def __getattr__(self, name: str) -> Any:
        if name in ("_is_param", "_is_buffer"):
            return False
        rank = self.node.meta.get("rank")
        if name == "ndim" and rank is not None:
            return rank
        if name in ("dim", "ndimension") and rank is not None:
            return lambda: rank
        return _Device(self, name) if name == "device" else Attribute(self, name)


class _Device(Attribute):
    """Where an activation lies. Its type is known when all tensors of the model lie on devices of one type."""

    @property
    def type(self) -> Any:
        known = self.tracer.device_type  # type: ignore[attr-defined]
        return Attribute(self, "type") if known is None else known


def _in_place(name: str) -> Callable[[_Value, Any], Any]:
    """``x += y`` changes ``x`` for everybody who holds it, so it must not be traced as ``x = x + y``."""
    function = getattr(operator, name)

    def method(self: _Value, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "ipow", "iand", "ior", "ixor", "imod"):
    setattr(_Value, f"__{_name}__", _in_place(_name))


_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def _autocast() -> tuple[Any, ...]:
    """What automatic mixed precision does at the moment; a graph cannot say that it changes."""
    devices = ("cpu", "cuda")
    return tuple(torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) for device in devices)


class _Tracer(torch.fx.Tracer):
    """Proxies for activations, tensors for parameters, opaque leaves for what cannot be traced."""

    def __init__(
        self,
        modules: dict[str, nn.Module],
        example_inputs: tuple[tuple[Any, ...], dict[str, Any]] | None,
        state: State,
        assume_tensor: bool = True,
    ) -> None:
        super().__init__()
        self.assume_tensor = assume_tensor
        self.state = state
        self.autocast = _autocast()
        self.modules = modules
        self.example_inputs = example_inputs
        self.examples: dict[str, Any] = {}
        self.remarks: list[Remark] = []
        self.names: dict[int, str] = {}
        self.constants: dict[str, Tensor] = {}
        self.arguments: list[str] = []
        tensors = [tensor for module in modules.values() for _, tensor in tensors_in(module)]
        devices = {tensor.device.type for tensor in tensors}
        self.device_type = devices.pop() if len(devices) == 1 else None
        self.dtypes = {tensor.dtype for tensor in tensors}

    # Arguments of the root.

    def fixed_arguments(self, root: nn.Module) -> dict[str, Any]:
        """Arguments that keep their defaults: those that the example does not give, or, without one, all optional ones.

        A proxy in their place would answer ``mask is not None`` with yes.
        """
        signature = inspect.signature(type(root).forward)
        parameters = list(signature.parameters.values())[1:]
        self.arguments = [parameter.name for parameter in parameters if parameter.kind not in _VARIADIC]
        if self.example_inputs is not None:
            args, kwargs = self.example_inputs
            self.examples = signature.bind(root, *args, **kwargs).arguments
        fixed = {}
        for parameter in parameters:
            if parameter.default is parameter.empty:
                continue
            given = self.examples.get(parameter.name, parameter.default)
            if given is None or isinstance(given, (bool, int, float, str)):
                fixed[parameter.name] = given
        return fixed

    # Nodes.

    def create_node(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> Node:
        """Record a node with its scope and what is known of its value."""
        if _autocast() != self.autocast:
            raise TraceError("it changes the precision that operations run in (autocast)")
        fixed = kind == "placeholder" and not target.startswith("*") and target != self.arguments[0]
        if kind == "placeholder" and not target.startswith("*"):
            # torch.fx gives an argument that is fixed another name, under which nobody passes it.
            target = self.arguments.pop(0)
        if kind == "call_function":
            kind, target, args = _in_torch_words(target, args)
        node = super().create_node(kind, target, *args, **kwargs)
        node.meta["scope"] = self.scope.module_path
        if fixed:
            node.meta["kind"] = "other"
        elif kind == "placeholder" and not self.assume_tensor:
            node.meta["kind"] = "unknown"
        if kind == "placeholder" and str(target) in self.examples:
            facts.note_value(node, self.examples[str(target)])
        facts.note(node, self.modules[target] if kind == "call_module" else None)
        written = aliasing.written(node, self.modules)
        if written is not None and written.op == "get_attr":
            raise TraceError(f"it writes to its own tensors ({facts.target_name(node)})")
        return node

    def proxy(self, node: Node) -> Proxy:
        """An activation."""
        return _Value(node, self)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """A parameter is itself, not a proxy: what is computed from parameters alone runs now."""
        return attr_val

    def create_arg(self, a: Any) -> Any:
        """A tensor among the arguments is a constant of the graph, under its own name where it has one."""
        if isinstance(type(a), type) and issubclass(type(a), Proxy):
            return a.node
        if isinstance(a, Tensor):
            if not self.names:
                self.names = {
                    id(tensor): f"{path}.{name}" if path else name
                    for path, module in self.modules.items()
                    for name, tensor in tensors_in(module)
                }
            if id(a) not in self.names:
                numbered = (f"_constant{number}" for number in itertools.count())
                name = next(name for name in numbered if not hasattr(self.root, name))
                self.names[id(a)] = name
                self.constants[name] = self.root.__dict__[name] = a
            node = self.create_node("get_attr", self.names[id(a)], (), {})
            node.meta.update(rank=a.dim(), shape=tuple(a.shape))
            return node
        return super().create_arg(a)

    def call_on_constant(self, kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Record a call on a constant; moving it to where the activations are is no call, it is there already."""
        moved = [*args[1:], *kwargs.values()] if target == "to" and isinstance(args[0], Tensor) else []
        if moved and self.device_type is not None and all(_is_place(value, args[0], self.dtypes) for value in moved):
            return args[0]
        return self.create_proxy(kind, target, args, kwargs)

    # Modules.

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """A torch.nn layer, a subclass that computes the same, or a class that was registered for lifting."""
        from reparam.lift import is_leaf

        return is_leaf(m)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Trace through a module; when that fails, take back what was traced and record it as one leaf."""
        path = self.path_of_module(m)
        if type(m).__call__ is not nn.Module.__call__ and not isinstance(m, torch.fx.GraphModule):
            raise TraceError(f"{type(m).__name__} does more than its forward when it is called")
        if self.is_leaf_module(m, path) or carries_hooks(m):
            if not self.is_leaf_module(m, path):
                self.remarks.append(
                    Remark("capture", "Trace", path, f"{type(m).__name__} carries hooks, kept as it is")
                )
            return self._call_leaf(m, path, args, kwargs)
        if isinstance(m, torch.jit.ScriptModule):
            self.remarks.append(Remark("capture", "Trace", path, "a scripted module, kept as it is"))
            return self._call_leaf(m, path, args, kwargs)
        last = next(iter(reversed(self.graph.nodes)))
        stack = list(self.module_stack.items())
        remarks = len(self.remarks)
        try:
            result = super().call_module(m, forward, args, kwargs)
            self.state.check(m)
            return result
        except Exception as error:
            self.state.restore(m.modules())
            self.root.__dict__.update(self.constants)
            for node in reversed(self.graph.nodes):
                if node is last:
                    break
                self.graph.erase_node(node)
            self.module_stack.clear()
            self.module_stack.update(stack)
            del self.remarks[remarks:]
            reason = f"{type(m).__name__} is not traceable, kept as it is: {first_line(error)}"
            self.remarks.append(Remark("capture", "Trace", path, reason))
            return self._call_leaf(m, path, args, kwargs)

    def _call_leaf(self, m: nn.Module, path: str, args: Any, kwargs: Any) -> Any:
        if not carries_hooks(m) and not has_activation(args) and not has_activation(kwargs):
            return m.forward(*args, **kwargs)
        with torch.fx.proxy.ScopeContextManager(self.scope, torch.fx.proxy.Scope(path, type(m))):
            return self.create_proxy("call_module", path, args, kwargs)


def _in_torch_words(target: Any, args: tuple[Any, ...]) -> tuple[str, Any, tuple[Any, ...]]:
    """A call of an ATen operator as torch's own functions have it, as arguments of ``create_node``."""
    positional, named, *rest = args
    first = positional[0] if positional else None
    rank = first.meta.get("rank") if isinstance(first, Node) else None
    kind, target, positional, named = aten.said(target, positional, named, rank)
    return kind, target, (positional, named, *rest)


def _is_place(value: Any, constant: Tensor, dtypes: set[torch.dtype]) -> bool:
    """Whether a value is the device of an activation, or its type where everything has that of the constant."""
    if not issubclass(type(value), Attribute):
        return False
    same_type = constant.is_floating_point() and sum(dtype.is_floating_point for dtype in dtypes) == 1
    return value.attr == "device" or (value.attr == "dtype" and same_type)


def is_opaque(node: Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a node calls Python that was not traced, and of which nothing else is known."""
    from reparam.lift import is_leaf

    if node.op != "call_module" or "operator" in node.meta:
        return False
    module = modules[str(node.target)]
    return not is_leaf(module) or carries_hooks(module)


def carries_hooks(module: nn.Module) -> bool:
    """Whether something runs beside a module's forward that a fused kernel would drop.

    Besides hooks, these are parametrizations that do more than compute numbers from numbers.
    """
    return "parametrizations" in module._modules or any(map(module.__dict__.get, HOOKS))

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
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.fx.proxy import Attribute, Proxy, TraceError
from torch.utils._python_dispatch import TorchDispatchMode

from reparam import facts
from reparam.errors import CaptureError
from reparam.report import Remark

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass
class Capture:
    """A traced model.

    Attributes:
        root: Private copy of the model in eval mode, whose modules and tensors the graph refers to. Its tensors
            share memory with the model's own.
        graph: What ``root`` computes. Every node has ``meta["scope"]`` (module path that it ran in) and what
            :mod:`reparam.facts` knows.
        remarks: Which modules were left opaque, and why.
        traced: False when not even the root could be traced; ``graph`` then calls nothing.
    """

    root: nn.Module
    graph: Graph
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
    root = private_copy(model)
    return trace(root, example_inputs)


def trace(root: nn.Module, example_inputs: tuple[tuple[Any, ...], dict[str, Any]] | None = None) -> Capture:
    """Trace a module that may be changed and that is in eval mode; see :func:`capture`."""
    attributes = {module: dict(module.__dict__) for module in root.modules()}
    tracer = _Tracer(example_inputs)
    try:
        with torch.no_grad(), _NoSideEffects(root):
            graph = tracer.trace(_with_forward_in_class(root), tracer.fixed_arguments(root))
    except Exception as error:
        remark = Remark("capture", "Trace", "", f"not traceable, kept as Python: {_reason(error)}")
        return Capture(root, Graph(), [*tracer.remarks, remark], traced=False)
    finally:
        # What a forward leaves behind on its module while being traced is of no use, and may be a proxy.
        for module, values in attributes.items():
            constants = {k: v for k, v in module.__dict__.items() if module is root and k.startswith("_constant")}
            module.__dict__.clear()
            module.__dict__.update(values | constants)
    graph.owning_module = None
    return Capture(root, graph, tracer.remarks)


def _reason(error: Exception) -> str:
    """The first line of an error, for a remark."""
    text = str(error).strip().splitlines()
    return f"{text[0] if text else type(error).__name__}"


# The private copy.


def private_copy(model: nn.Module) -> nn.Module:
    """Copy every Python object of a model, share its tensors, and put the copy in eval mode.

    Raises:
        CaptureError: The model has parameters without values, or holds something that cannot be copied.
    """
    model = unwrapped(model)
    memo: dict[int, Any] = {}
    for module in model.modules():
        for name, tensor in _tensors(module):
            if isinstance(tensor, nn.parameter.UninitializedTensorMixin):
                raise CaptureError(
                    f"{type(module).__name__}.{name} has no values yet; run the model once, or load a checkpoint"
                )
            memo.setdefault(id(tensor), _alias(tensor))
    plain = [module for module in model.modules() if _copies_plainly(type(module))]
    for module in plain:
        memo[id(module)] = object.__new__(type(module))
    try:
        for module in plain:
            memo[id(module)].__dict__.update({k: _copied(v, memo) for k, v in module.__dict__.items()})
        result: nn.Module = copy.deepcopy(model, memo)
    except Exception as error:
        raise CaptureError(
            f"{type(model).__name__} cannot be copied ({error}); pass a model that copy.deepcopy copies"
        ) from error
    _set_eval(result)
    return result


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside wrappers that only change how it runs: data parallelism, ``torch.compile``."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(model, torch._dynamo.OptimizedModule) if "_orig_mod" in model._modules else False:
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, buffers and plain tensor attributes."""
    for values in (module._parameters, module._buffers, module.__dict__):
        yield from ((name, value) for name, value in values.items() if isinstance(value, Tensor))


def _alias(tensor: Tensor) -> Tensor:
    """The same memory under a new tensor, of the same class of parameter or buffer."""
    alias = tensor.detach()
    return nn.Parameter(alias, requires_grad=False) if isinstance(tensor, nn.Parameter) else alias


def _copies_plainly(cls: type) -> bool:
    """Whether copying ``__dict__`` copies an instance: no method or slot says otherwise."""
    special = ("__deepcopy__", "__reduce__", "__reduce_ex__", "__getstate__", "__slots__", "__getnewargs__")
    own = [base for base in cls.__mro__ if base not in (nn.Module, object)]
    return not any(name in base.__dict__ for base in own for name in special)


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    """``copy.deepcopy``, with a short way for what nearly every attribute of a module is."""
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device)):
        return value
    if type(value) is dict:
        return {k: _copied(v, memo) for k, v in value.items()}
    if isinstance(value, (nn.Module, Tensor)) and id(value) in memo:
        return memo[id(value)]
    if not value and type(value).__name__ in ("OrderedDict", "set", "list", "tuple"):
        return copy.copy(value)
    return copy.deepcopy(value, memo)


def _set_eval(root: nn.Module) -> None:
    overriding = any(
        type(module).train is not nn.Module.train or type(module).eval is not nn.Module.eval
        for module in root.modules()
    )
    if overriding:
        # A model may do more than flip flags here, such as merging weights in place: into its own memory.
        own_tensors(root, tensor_storages(root))
        root.eval()
    for module in root.modules():
        module.training = False


def tensor_storages(root: nn.Module) -> set[int]:
    """Identities of the memory that a model's tensors lie in."""
    return {_storage(tensor) for module in root.modules() for _, tensor in _tensors(module)}


def _storage(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return id(tensor)


def own_tensors(root: nn.Module, shared: set[int]) -> None:
    """Give a model its own memory wherever it lies in ``shared``, keeping ties between its tensors."""
    clones: dict[int, Tensor] = {}
    for module in root.modules():
        for values in (module._parameters, module._buffers, module.__dict__):
            for name, tensor in list(values.items()):
                if isinstance(tensor, Tensor) and _storage(tensor) in shared:
                    if id(tensor) not in clones:
                        clone = tensor.detach().clone()
                        is_parameter = isinstance(tensor, nn.Parameter)
                        clones[id(tensor)] = nn.Parameter(clone, tensor.requires_grad) if is_parameter else clone
                    values[name] = clones[id(tensor)]


def _with_forward_in_class(root: nn.Module) -> nn.Module:
    """A ``forward`` that was set on the instance is moved to a class of its own, where the tracer looks for it."""
    patched = root.__dict__.get("forward")
    if patched is None:
        return root
    if getattr(patched, "__self__", None) is not root:
        raise TraceError("its forward was replaced by a function of something else")
    cls = type(root)
    root.__class__ = type(cls.__name__, (cls,), {"forward": patched.__func__, "__module__": cls.__module__})
    return root


class _NoSideEffects(TorchDispatchMode):
    """Refuse to run, while tracing, what must run at every call: writes to the model's tensors, random numbers."""

    def __init__(self, root: nn.Module) -> None:
        super().__init__()
        self.storages = tensor_storages(root)

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
        rank = self.node.meta.get("rank")
        if name == "ndim" and rank is not None:
            return rank
        if name in ("dim", "ndimension") and rank is not None:
            return lambda: rank
        return Attribute(self, name)


def _in_place(name: str) -> Callable[[_Value, Any], Any]:
    """``x += y`` changes ``x`` for everybody who holds it, so it must not be traced as ``x = x + y``."""
    function = getattr(operator, name)

    def method(self: _Value, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "ipow", "iand", "ior", "ixor", "imod"):
    setattr(_Value, f"__{_name}__", _in_place(_name))


class _Tracer(torch.fx.Tracer):
    """Proxies for activations, tensors for parameters, opaque leaves for what cannot be traced."""

    def __init__(self, example_inputs: tuple[tuple[Any, ...], dict[str, Any]] | None) -> None:
        super().__init__()
        self.example_inputs = example_inputs
        self.examples: dict[str, Any] = {}
        self.remarks: list[Remark] = []
        self.modules: dict[str, nn.Module] = {}
        self.names: dict[int, str] = {}
        self.kept: list[Tensor] = []

    # Arguments of the root.

    def fixed_arguments(self, root: nn.Module) -> dict[str, Any]:
        """Arguments that keep their defaults: those that the example does not give, or, without one, all optional ones.

        A proxy in their place would answer ``mask is not None`` with yes.
        """
        self.modules = dict(root.named_modules())
        signature = inspect.signature(type(root).forward)
        parameters = list(signature.parameters.values())[1:]
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
        node = super().create_node(kind, target, *args, **kwargs)
        node.meta["scope"] = self.scope.module_path
        if kind == "placeholder" and str(target) in self.examples:
            facts.note_value(node, self.examples[str(target)])
        facts.note(node, self.modules[target] if kind == "call_module" else None)
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
                    for name, tensor in _tensors(module)
                }
            if id(a) not in self.names:
                name = f"_constant{len(self.kept)}"
                self.kept.append(a)
                self.names[id(a)] = name
                self.root.__dict__[name] = a
            node = self.create_node("get_attr", self.names[id(a)], (), {})
            node.meta.update(rank=a.dim(), shape=tuple(a.shape))
            return node
        return super().create_arg(a)

    # Modules.

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """A torch.nn layer, a subclass that computes the same, or a class that was registered for lifting."""
        from reparam.lift import is_leaf

        return is_leaf(m)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Trace through a module; when that fails, take back what was traced and record it as one leaf."""
        path = self.path_of_module(m)
        if self.is_leaf_module(m, path) or carries_hooks(m):
            if not self.is_leaf_module(m, path):
                self.remarks.append(
                    Remark("capture", "Trace", path, f"{type(m).__name__} carries hooks, kept as it is")
                )
            return self._call_leaf(m, path, args, kwargs)
        last = next(iter(reversed(self.graph.nodes)))
        stack = list(self.module_stack.items())
        remarks = len(self.remarks)
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception as error:
            for node in reversed(self.graph.nodes):
                if node is last:
                    break
                self.graph.erase_node(node)
            self.module_stack.clear()
            self.module_stack.update(stack)
            del self.remarks[remarks:]
            reason = f"{type(m).__name__} is not traceable, kept as it is: {_reason(error)}"
            self.remarks.append(Remark("capture", "Trace", path, reason))
            return self._call_leaf(m, path, args, kwargs)

    def _call_leaf(self, m: nn.Module, path: str, args: Any, kwargs: Any) -> Proxy:
        with torch.fx.proxy.ScopeContextManager(self.scope, torch.fx.proxy.Scope(path, type(m))):
            return self.create_proxy("call_module", path, args, kwargs)


def carries_hooks(module: nn.Module) -> bool:
    """Whether something runs beside a module's forward that a fused kernel would drop."""
    return any(getattr(module, name, None) for name in _HOOKS)

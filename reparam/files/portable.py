"""A compiled graph as plain data, and back.

:func:`describe` turns a ``torch.fx.GraphModule`` into numbers, strings, lists and dicts, ready for JSON;
:func:`rebuild` makes the module again from that description and its tensors. A description is untrusted input, and
``torch.fx`` turns a graph into Python source that it executes. So everything that reaches the graph is looked up in
an allowlist (functions, Tensor methods, attributes, layers) or checked to be a plain name or plain data; nothing is
imported, and no attribute is followed, because a description says so.
"""

from __future__ import annotations

import builtins
import functools
import inspect
import keyword
import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload, OpOverloadPacket
from torch.fx import Graph, GraphModule, Node
from torch.fx.graph import CodeGen
from torch.overrides import get_overridable_functions

from reparam.deploy.model import CompiledModel, with_plain_outputs
from reparam.errors import CheckpointError, ExportError
from reparam.files.checkpoint import mismatch
from reparam.graph.affine import Affine
from reparam.graph.aliasing import GELU_
from reparam.graph.conditions import Argument, select
from reparam.tuning.prepared import PREPARED

Data = Any  # what json.dumps takes: None, bool, int, float, str, list, dict


def describe(model: GraphModule) -> tuple[dict[str, Data], dict[str, Tensor]]:
    """Describe a graph module as plain data, and collect the tensors that it reads.

    Returns:
        The description (``name``, ``nodes``, ``layers``, ``constants``), and the tensors by name.

    Raises:
        ExportError: The graph calls something that is not a PyTorch layer, function or tensor method.
    """
    model = with_plain_outputs(model)
    graph = model.graph
    _refuse_hooks("", model)
    if type(graph._codegen) is not CodeGen:
        raise ExportError(f"the graph flattens its inputs ({type(graph._codegen).__name__}); {_INSTEAD}")
    layers: dict[str, Data] = {}
    constants: dict[str, Data] = {}
    tensors: dict[str, Tensor] = {}
    for node in graph.nodes:
        if node.op == "call_module" and node.target not in layers:
            layer = model.get_submodule(node.target)
            layers[node.target] = _describe_layer(node.target, layer)
            tensors |= {f"{node.target}.{name}": tensor for name, tensor in layer.state_dict().items()}
    for node in graph.nodes:
        if node.op == "get_attr" and node.target not in tensors:
            constants[node.target], tensors[node.target] = _describe_constant(model, node.target)
    nodes = [_describe_node(node) for node in graph.nodes]
    description = {"name": type(model).__name__, "nodes": nodes, "layers": layers, "constants": constants}
    description["arguments"] = [
        [argument.name, _as_data(argument.kind), argument.default] for argument in model.meta.get("arguments", ())
    ]
    return description, {name: tensor.detach() for name, tensor in tensors.items()}


def rebuild(description: Mapping[str, Data], tensors: Mapping[str, Tensor]) -> GraphModule:
    """Make the module that :func:`describe` described, in eval mode, its parameters frozen and not copied.

    Raises:
        CheckpointError: The description asks for anything that is not on the allowlists, or ``tensors`` are not what
            it needs. Where it is malformed, the exception is whatever Python raises then.
    """
    layers = {_path(path): _rebuild_layer(layer) for path, layer in description["layers"].items()}
    expected = {f"{path}.{name}": value for path, layer in layers.items() for name, value in layer.state_dict().items()}
    problem = mismatch(expected, tensors, extra=description["constants"])
    if problem:
        raise CheckpointError(f"its weights do not fit its graph: {problem}")
    for path, layer in layers.items():
        state = {name: tensors[f"{path}.{name}"] for name in layer.state_dict()}
        layer.requires_grad_(False).load_state_dict(state, strict=True, assign=True)
    root: dict[str, Any] = dict(layers)
    for path, kind in description["constants"].items():
        parameter = kind == "parameter"
        root[_path(path)] = nn.Parameter(tensors[path], requires_grad=False) if parameter else tensors[path]
    graph = _rebuild_graph(description["nodes"], root)
    model = CompiledModel(root, graph, _identifier(description["name"]))
    model.meta["arguments"] = tuple(
        Argument(str(name), _as_tuple(kind), _as_tuple(default))
        for name, kind, default in description.get("arguments", ())
    )
    for path, kind in description["constants"].items():
        if kind == "transient":  # the state dict of the original left this buffer out
            owner, _, name = path.rpartition(".")
            model.get_submodule(owner)._non_persistent_buffers_set.add(name)
    graph.lint()
    return model.eval()


def _as_data(kind: Any) -> Any:
    """What has to stay of an argument, as far as a file can say it."""
    if isinstance(kind, tuple):
        return [_as_data(item) for item in kind] if kind[:1] != ("constant",) or _is_data(kind[1]) else ["any"]
    return kind


def _is_data(value: Any) -> bool:
    return isinstance(value, (bool, int, str, type(None))) or (isinstance(value, float) and math.isfinite(value))


def _as_tuple(value: Any) -> Any:
    """Nested lists as tuples, which JSON does not have."""
    return tuple(map(_as_tuple, value)) if isinstance(value, list) else value


_INSTEAD = "write .onnx, or keep the weights alone with torch.save(model.state_dict(), ...)"


# --- Nodes --------------------------------------------------------------------------------------------------------


def _describe_node(node: Node) -> dict[str, Data]:
    target = node.target
    if node.op == "call_function":
        target = _function_name(node)
    elif node.op == "call_method" and target not in tensor_methods():
        raise ExportError(f"the graph calls the method {target!r} at {node.name}, which a file may not do; {_INSTEAD}")
    try:
        args, kwargs = _encode(tuple(node.args)), _encode(dict(node.kwargs))
    except TypeError as error:
        raise ExportError(f"the call {node.name} takes {error}, which is not plain data; {_INSTEAD}") from error
    return {"op": node.op, "name": node.name, "target": target, "args": args, "kwargs": kwargs}


def _function_name(node: Node) -> str:
    name = _function_names().get(node.target)
    if name is not None:
        return name
    if isinstance(node.target, OpOverload) and aten_operator(_operator_name(node.target)) is node.target:
        return _operator_name(node.target)
    called = getattr(node.target, "__qualname__", str(node.target))
    raise ExportError(f"the graph calls {called} at {node.name}, which is no PyTorch function; {_INSTEAD}")


def _rebuild_graph(descriptions: Iterable[Mapping[str, Data]], root: Mapping[str, Any]) -> Graph:
    graph = Graph()
    nodes: dict[str, Node] = {}
    for item in descriptions:
        args, kwargs = _decode(item["args"], nodes), _decode(item["kwargs"], nodes)
        for name in kwargs:
            _identifier(name)
        op = item["op"]
        target = _rebuild_target(op, item["target"], args, root)
        # fx makes a legal and unused variable name of whatever it is given here.
        nodes[item["name"]] = graph.create_node(op, target, args, kwargs, name=_identifier(item["name"]))
    if not nodes or next(reversed(graph.nodes)).op != "output":
        raise CheckpointError("its graph has no output")
    return graph


def _rebuild_target(op: str, target: str, args: tuple[Any, ...], root: Mapping[str, Any]) -> Any:
    match op:
        case "placeholder":
            _identifier(target.lstrip("*"))
            return target
        case "output":
            return "output"
        case "get_attr" if isinstance(root.get(target), Tensor) or _layer_tensor(target, root):
            return target
        case "call_module" if isinstance(root.get(target), nn.Module):
            return target
        case "call_method" if target in tensor_methods() and args and isinstance(args[0], Node):
            return target
        case "call_function" if target in functions():
            if target == "builtins.getattr" and not (len(args) == 2 and args[1] in _ATTRIBUTES):
                raise CheckpointError(f"reads the attribute {args[1:]}, which a deploy file may not")
            return functions()[target]
        case "call_function" if (operation := aten_operator(target)) is not None:
            return operation
    raise CheckpointError(f"asks for {op} {target!r}, which a deploy file may not")


def _layer_tensor(target: str, root: Mapping[str, Any]) -> bool:
    """Whether ``target`` is a tensor of one of the layers, read by itself."""
    layer, _, name = target.rpartition(".")
    return isinstance(root.get(layer), nn.Module) and name in root[layer].state_dict()


def _describe_constant(model: GraphModule, target: str) -> tuple[str, Tensor]:
    owner_path, _, name = target.rpartition(".")
    owner = model.get_submodule(owner_path)
    value = getattr(owner, name)
    if not isinstance(value, Tensor):
        raise ExportError(f"the graph reads {target}, a {type(value).__name__} and not a tensor; {_INSTEAD}")
    if isinstance(value, nn.Parameter):
        return "parameter", value
    persistent = name in owner._buffers and name not in owner._non_persistent_buffers_set
    return "buffer" if persistent else "transient", value


# --- Arguments ----------------------------------------------------------------------------------------------------
# JSON knows numbers, strings, None, booleans and lists. Anything else is a dict of one entry: {kind: content}.


def _encode(value: Any) -> Data:
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else {"float": str(value)}
        case Node():
            return {"node": value.name}
        case list():
            return [_encode(item) for item in value]
        case tuple():
            return {"tuple": [_encode(item) for item in value]}
        case dict():
            return {"dict": [[_encode(key), _encode(item)] for key, item in value.items()]}
        case slice():
            return {"slice": [_encode(item) for item in (value.start, value.stop, value.step)]}
        case torch.device():
            return {"device": str(value)}
        case torch.dtype() | torch.memory_format() | torch.layout():
            return {"torch": str(value).removeprefix("torch.")}
        case _ if value is ...:
            return {"ellipsis": None}
    raise TypeError(f"a {type(value).__name__}")


def _decode(value: Data, nodes: Mapping[str, Node]) -> Any:
    if isinstance(value, list):
        return [_decode(item, nodes) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    match kind:
        case "node":
            return nodes[content]
        case "float":
            return float(content)
        case "tuple":
            return tuple(_decode(item, nodes) for item in content)
        case "dict":
            return {_decode(key, nodes): _decode(item, nodes) for key, item in content}
        case "slice":
            return slice(*(_decode(item, nodes) for item in content))
        case "device":
            return torch.device(content)
        case "torch" if content in _torch_constants():
            return _torch_constants()[content]
        case "ellipsis":
            return ...
    raise CheckpointError(f"holds an argument of the unknown kind {kind!r}")


@functools.cache
def _torch_constants() -> dict[str, Any]:
    kinds = (torch.dtype, torch.memory_format, torch.layout)
    return {name: value for name, value in vars(torch).items() if isinstance(value, kinds)}


def _identifier(name: str) -> str:
    """``name`` if it can stand in generated code as a variable, and nothing else."""
    if not (isinstance(name, str) and name.isidentifier()) or keyword.iskeyword(name) or name == "self":
        raise CheckpointError(f"holds the illegal name {name!r}")
    return name


def _path(path: str) -> str:
    """``path`` if it can stand in generated code as a quoted module path; module names need not be identifiers."""
    if not re.fullmatch(r"[\w \-+/:]+(\.[\w \-+/:]+)*", path):
        raise CheckpointError(f"holds the illegal module path {path!r}")
    return path


# --- Layers -------------------------------------------------------------------------------------------------------


def _describe_layer(path: str, layer: nn.Module) -> dict[str, Data]:
    name = _layer_class_name(layer)
    if name is None:
        raise ExportError(
            f"{path} is a {type(layer).__module__}.{type(layer).__qualname__}, which a file cannot rebuild without its "
            f"source code; {_INSTEAD}"
        )
    _refuse_hooks(path, layer)
    cls = layer_classes()[name]
    try:
        description = {"class": name, "args": _encode(_constructor_arguments(cls, layer))}
        same = _same_layer(_rebuild_layer(description), layer)
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ExportError(f"the settings of {path} ({name}) cannot be stored: {error}; {_INSTEAD}") from error
    if not same:
        raise ExportError(f"{path} is a {name} that its constructor arguments do not describe; {_INSTEAD}")
    return description


def _refuse_hooks(path: str, module: nn.Module) -> None:
    if module._forward_hooks or module._forward_pre_hooks:
        raise ExportError(f"{path or 'the model'} carries forward hooks, which a file cannot store; remove them first")


def _layer_class_name(layer: nn.Module) -> str | None:
    """The allowed class that ``layer`` computes as: its own, or the base whose every method it inherits."""
    names = {cls: name for name, cls in layer_classes().items()}
    own = {name for name in vars(layer) if callable(getattr(type(layer), name, None))}  # a patched instance
    for cls in type(layer).__mro__:
        if cls in names:
            overridden = {name for name in own if hasattr(cls, name)} - _HARMLESS_OVERRIDES
            return None if overridden else names[cls]
        own |= vars(cls).keys()
    return None


_HARMLESS_OVERRIDES = {"__init__", "__doc__", "__module__", "__annotations__", "__repr__", "extra_repr"}
_HARMLESS_OVERRIDES |= {"__dict__", "__weakref__", "__firstlineno__", "__static_attributes__", "__constants__"}
_HARMLESS_OVERRIDES |= {"__parameters__", "__orig_bases__", "_version", "reset_parameters"}


def _constructor_arguments(cls: type[nn.Module], layer: nn.Module) -> dict[str, Any]:
    """Constructor arguments of ``layer``, read from its attributes: PyTorch's layers keep them under the same names."""
    arguments: dict[str, Any] = {}
    for name in _constructor_parameters(cls):
        derive = _DERIVED.get((cls, name))
        if derive is not None:
            arguments[name] = derive(layer)
        elif hasattr(layer, name):
            value = getattr(layer, name)
            # A bias is an argument as a flag and an attribute as a tensor, or None.
            arguments[name] = value is not None if name == "bias" and not isinstance(value, bool) else value
    return arguments


def _constructor_parameters(cls: type[nn.Module]) -> list[str]:
    """Names of the settings that a layer is constructed from; device, dtype and private ones are none."""
    if cls is Affine:
        return ["shape", "bias"]
    if issubclass(cls, nn.RNNBase):  # which hides its settings behind *args
        return [*_RECURRENT, *{nn.LSTM: ["proj_size"], nn.RNN: ["nonlinearity"]}.get(cls, [])]
    return [
        name
        for name, parameter in list(inspect.signature(cls.__init__).parameters.items())[1:]
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        and name not in ("device", "dtype")
        and not name.startswith("_")
    ]


_RECURRENT = ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional")

# Settings that a layer does not keep under the name of the argument.
_DERIVED: dict[tuple[type, str], Callable[[Any], Any]] = {
    (Affine, "shape"): lambda layer: tuple(layer.weight.shape),
    (nn.MultiheadAttention, "bias"): lambda layer: layer.in_proj_bias is not None,
    (nn.MultiheadAttention, "add_bias_kv"): lambda layer: layer.bias_k is not None,
    (nn.TransformerEncoderLayer, "d_model"): lambda layer: layer.self_attn.embed_dim,
    (nn.TransformerEncoderLayer, "nhead"): lambda layer: layer.self_attn.num_heads,
    (nn.TransformerEncoderLayer, "dim_feedforward"): lambda layer: layer.linear1.out_features,
    (nn.TransformerEncoderLayer, "dropout"): lambda layer: layer.dropout.p,
    (nn.TransformerEncoderLayer, "activation"): lambda layer: ["", "relu", "gelu"][layer.activation_relu_or_gelu],
    (nn.TransformerEncoderLayer, "layer_norm_eps"): lambda layer: layer.norm1.eps,
    (nn.TransformerEncoderLayer, "batch_first"): lambda layer: layer.self_attn.batch_first,
    (nn.TransformerEncoderLayer, "bias"): lambda layer: layer.linear1.bias is not None,
}


def _rebuild_layer(description: Mapping[str, Data]) -> nn.Module:
    """The layer on the meta device: no memory, and no time spent on initial weights."""
    name = description["class"]
    if name not in layer_classes():
        raise CheckpointError(f"asks for the layer {name!r}, which a deploy file may not")
    cls = layer_classes()[name]
    arguments = _decode(description["args"], {})
    if unknown := arguments.keys() - set(_constructor_parameters(cls)):
        raise CheckpointError(f"constructs {name} with the unknown argument {min(unknown)!r}")
    with torch.device("meta"):
        if cls is Affine:  # which takes its tensors themselves
            weight = torch.empty(arguments["shape"])
            arguments = {"weight": weight, "bias": torch.empty_like(weight) if arguments["bias"] else None}
        return cls(**arguments).eval()


def _same_layer(rebuilt: nn.Module, layer: nn.Module) -> bool:
    """Whether both have the same settings, buffers and parameters, values aside, all the way down."""
    old, new = layer.state_dict(), rebuilt.state_dict()
    if {key: old[key].shape for key in old} != {key: new[key].shape for key in new}:
        return False
    not_settings = {"_parameters", "_buffers", "_modules", "_flat_weights", "_flat_weight_refs", "training"}
    pairs = zip(rebuilt.modules(), layer.modules(), strict=True)
    return all(
        value == vars(theirs).get(key)
        for ours, theirs in pairs
        for key, value in vars(ours).items()
        if key not in not_settings and "hook" not in key
    )


# --- What a description may ask for -------------------------------------------------------------------------------


@functools.cache
def layer_classes() -> dict[str, type[nn.Module]]:
    """The layers a description may construct, by name: those of ``torch.nn`` that take plain data, and our own."""
    never = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict, nn.DataParallel)
    lazy = nn.modules.lazy.LazyModuleMixin
    own: tuple[type[nn.Module], ...] = (Affine, *PREPARED)
    return {f"reparam.{cls.__name__}": cls for cls in own} | {
        name: cls
        for name, cls in vars(nn).items()
        if isinstance(cls, type) and issubclass(cls, nn.Module) and cls is not nn.Module
        if not issubclass(cls, (*never, lazy)) and "Loss" not in name
    }


@functools.cache
def functions() -> dict[str, Callable[..., Any]]:
    """The functions a description may call, by dotted name: tensor functions, arithmetic, a few of Python's own."""
    found: dict[str, Callable[..., Any]] = {}
    overridable = {id(function) for group in get_overridable_functions().values() for function in group}
    for namespace in (torch, nn.functional, torch.linalg, torch.fft, torch.special, torch.functional):
        for name, function in vars(namespace).items():
            public = not name.startswith("_") and not isinstance(function, type) and callable(function)
            if public and (id(function) in overridable or name.removesuffix("_") in _ALSO.get(namespace.__name__, ())):
                found[f"{namespace.__name__}.{name}"] = function
    found |= {f"operator.{name}": getattr(operator, name) for name in sorted(_OPERATORS)}
    found |= {f"math.{name}": getattr(math, name) for name in ("ceil", "floor", "prod", "sqrt", "trunc")}
    found |= {f"builtins.{name}": getattr(builtins, name) for name in sorted(_BUILTINS)}
    found |= {f"torch.Tensor.{name}": getattr(Tensor, name) for name in sorted(tensor_methods())}
    found |= {"reparam.select": select, "torch._assert": torch._assert, "torch._C._nn.gelu_": GELU_}
    return found


def aten_operator(name: str) -> OpOverload | None:
    """The ATen operator that a description may call as ``aten.NAME.OVERLOAD``, or None.

    Exported programs hold operators that torch has no public function for. Allowed are those of the Core ATen IR, which
    is made of functions on tensors, and what ``torch.nn.functional`` is built on (``torch._C._nn``); none that writes
    to an argument, returns anything but tensors, takes anything but tensors and settings, or trusts its arguments
    because torch's own functions have checked them before.
    """
    found = re.fullmatch(r"aten\.([a-z0-9_]+)\.([A-Za-z0-9_]+)", name)
    packet = getattr(torch.ops.aten, found[1], None) if found else None
    if found is None or not isinstance(packet, OpOverloadPacket) or found[2] not in packet.overloads():
        return None
    operation: OpOverload = getattr(packet, found[2])
    known = torch.Tag.core in operation.tags or hasattr(torch._C._nn, found[1])
    if not known or operation._schema.is_mutable or _UNSAFE_OPERATORS.fullmatch(found[1]):
        return None
    arguments = (str(argument.type) for argument in operation._schema.arguments)
    results = (str(result.type) for result in operation._schema.returns)
    plain = all(map(_PLAIN_ARGUMENT.fullmatch, arguments)) and all(map(_TENSORS.fullmatch, results))
    return operation if plain else None


def _operator_name(operation: OpOverload) -> str:
    return f"{operation._schema.name.replace('::', '.')}.{operation._overloadname}"


@functools.cache
def _function_names() -> dict[object, str]:
    return {function: name for name, function in reversed(functions().items())}  # the first of several names wins


@functools.cache
def tensor_methods() -> frozenset[str]:
    """Methods of ``torch.Tensor`` a description may call: those that compute, none that reaches memory or Python."""
    overridable = {
        function.__name__ for function in get_overridable_functions()[Tensor] if hasattr(function, "__name__")
    }
    more = {"new_empty", "new_full", "new_ones", "new_zeros", "stride", "unflatten"}
    return frozenset(name for name in overridable | more if not name.startswith("_")) - _UNSAFE_METHODS


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_TENSORS = re.compile(r"Tensor|List\[Tensor\]")
_PLAIN_ARGUMENT = re.compile(r"(Optional\[)?(List\[)?(Optional\[)?(Tensor|int|float|bool|number|str|Device)\]*")
_UNSAFE_OPERATORS = re.compile(r"as_strided|empty_strided|_embedding_bag|_fft_\w+|_native_batch_norm_\w+|\w+_backward")
_UNSAFE_METHODS = _words("""
    apply_ map_ map2_ backward register_hook register_post_accumulate_grad_hook retain_grad requires_grad_ module_load
    set_ resize resize_ resize_as resize_as_ resize_as_sparse_ sparse_resize_ sparse_resize_and_clear_ storage
    storage_type untyped_storage data_ptr const_data_ptr share_memory_ pin_memory record_stream numpy tolist
""")
_ATTRIBUTES = _words("shape ndim dtype device layout T mT H mH real imag is_cuda values indices")
_BUILTINS = _words("abs bool float getattr int len max min round sum")
_OPERATORS = _words("""
    abs add and_ concat eq floordiv ge getitem gt iadd iand ifloordiv ilshift imatmul imod imul index inv invert ior
    ipow irshift isub itruediv ixor le lshift lt matmul mod mul ne neg not_ or_ pos pow rshift setitem sub truediv
    truth xor
""")

# Functions of tensors that PyTorch's list of overridable ones leaves out, by namespace; in-place forms included.
_ALSO = {
    "torch": _words("""
        arange broadcast_shapes empty eye full linspace ones scalar_tensor tril_indices triu_indices zeros celu dropout
        feature_dropout alpha_dropout relu rrelu selu sigmoid tanh threshold abs ceil clamp cos exp floor log neg
        reciprocal round rsqrt sin sqrt square tan trunc
    """),
    "torch.nn.functional": _words("""
        hardsigmoid hardswish sigmoid tanh upsample upsample_bilinear upsample_nearest celu elu hardtanh leaky_relu relu
        rrelu selu threshold
    """),
}

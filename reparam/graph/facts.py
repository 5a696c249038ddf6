"""What is known of a value before it is computed: whether it is a tensor, its rank, its channels.

Which axis a norm works along depends on the rank of its input: axis 1 of a 2-D tensor holds the features that a
matrix product made, axis 1 of a 3-D tensor does not. Who captures a graph writes down what it has seen: a recorded run
shows rank and type of every value, as Dynamo's tracing and ONNX's inference do. What is not known is None, and nothing
is rewritten on a guess.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import nn
from torch._ops import OpOverload, OpOverloadPacket
from torch.fx import Node

from reparam.graph import names
from reparam.graph.leaves import is_leaf

Kind: TypeAlias = Literal["tensor", "other", "unknown"]
_LAYERS = (nn.modules.conv._ConvNd, nn.Linear, nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)
_LAYER_FUNCTIONS = frozenset([*names.CONVOLUTIONS, *"linear batch_norm layer_norm group_norm".split()])
_METADATA_METHODS = frozenset("size dim ndimension numel stride is_floating_point element_size get_device".split())
_LIKE = frozenset("view_as reshape_as expand_as type_as".split())
_METADATA_ATTRIBUTES = frozenset("shape ndim dtype device is_cuda requires_grad layout is_sparse names".split())


@dataclass(frozen=True)
class Facts:
    """What is known of a node, and of its value. None is not known, or none.

    Attributes:
        scope: Path of the module that it ran in.
        kind: Whether its value is a tensor.
        rank: How many axes it has.
        shape: Its shape in the example.
        dtype: Its type in the example.
        floating: Whether it is of floating point.
        device: Where an input lies.
        example: The shape of a floating-point tensor, or a number, as any example would show it.
        channels: How many channels it has, and their axis counted from the end.
        axes: Where the axes of the node's first input go (:class:`reparam.graph.views.Axes`).
        layer: Whether a layer settles its channels.
        keeps_shape: Whether it has the shape of the node's first input.
        frozen: Why no rule may touch it.
        in_place: What the node called before it was made out of place.
        origins: Paths of the modules whose parameters went into it.
        calls: What it is made of, to tell two uses of the same layers from two different ones.
        around: The innermost module around all that a rewrite made it of.
        precision: The type that its layer computes in.
        made: Whether a reader of another format makes it, and knows its channels.
    """

    scope: str = ""
    kind: Kind | None = None
    rank: int | None = None
    shape: tuple[Any, ...] | None = None
    dtype: torch.dtype | None = None
    floating: bool | None = None
    device: torch.device | None = None
    example: Any = None
    channels: tuple[int, int] | None = None
    axes: Any = None
    layer: bool = False
    keeps_shape: bool | None = None
    frozen: str | None = None
    in_place: Any = None
    origins: frozenset[str] | None = None
    calls: tuple[str, ...] | None = None
    around: str | None = None
    precision: torch.dtype | None = None
    made: bool = False

    def only(self, *names: str) -> dict[str, Any]:
        """Some of it."""
        return {name: getattr(self, name) for name in names}


_NOTHING = Facts()


def of(node: Node) -> Facts:
    """What is known of a node."""
    found: Facts = node.meta.get("facts", _NOTHING)
    return found


def know(node: Node, **known: Any) -> None:
    """Write down more, or something else, of a node. Copies of a node share the record, so it is never changed."""
    made = object.__new__(Facts)
    made.__dict__.update(of(node).__dict__, **known)
    node.meta["facts"] = made


def target_name(node: Node) -> str:
    """Name of what a function or method node calls, without module, overload or trailing underscore.

    Empty for all other nodes, whose targets are names that a user has chosen, and for a function that is neither
    torch's nor Python's: its name says nothing about what it computes.
    """
    if node.op not in ("call_function", "call_method"):
        return ""
    packet = node.target.overloadpacket if isinstance(node.target, OpOverload) else node.target
    if isinstance(packet, OpOverloadPacket):
        # One of a library's own may be called as one of torch's is, and be something else.
        return str(packet._qualified_op_name).removeprefix("aten::").rstrip("_")
    if isinstance(node.target, str):
        return node.target.rstrip("_")
    owner = getattr(node.target, "__module__", None) or "torch"
    known = owner.partition(".")[0] in ("torch", "_operator", "operator", "builtins", "math")
    return str(getattr(node.target, "__name__", "")).rstrip("_") if known else ""


def reads_only_metadata(node: Node) -> bool:
    """Whether a node looks at the shape, type or place of its input, and not at its values."""
    if node.op == "call_method":
        return node.target in _METADATA_METHODS
    return node.op == "call_function" and node.target is getattr and node.args[1] in _METADATA_ATTRIBUTES


def reads_only_metadata_of(reader: Node, node: Node) -> bool:
    """Whether a node looks at the shape or type of one of its inputs, and not at its values."""
    if reads_only_metadata(reader):
        return True
    return target_name(reader) in _LIKE and len(reader.args) == 2 and reader.args[0] is not node


class Arguments:
    """A node's arguments, by position or by name."""

    def __init__(self, node: Node) -> None:
        self.node = node

    def get(self, position: int, name: str, default: Any) -> Any:
        """The argument at a position or of a name, or the default."""
        if len(self.node.args) > position:
            return self.node.args[position]
        # torch takes NumPy's name for an axis, too.
        return self.node.kwargs.get(name, self.node.kwargs.get("axis", default) if name == "dim" else default)

    def named(self, name: str) -> Any:
        """An argument that is given by its name, or None."""
        return self.node.kwargs.get(name)


def indices(index: Any, rank: int) -> list[int | slice | None] | None:
    """What is taken of a value with ``rank`` axes, the ellipsis written out: a number or a slice for every axis, in
    order, and None for every new one. None when an index is anything else.
    """
    items = list(index) if isinstance(index, tuple) else [index]
    if not all(item is None or item is Ellipsis or isinstance(item, slice) or type(item) is int for item in items):
        return None
    named = sum(item is not None and item is not Ellipsis for item in items)
    if Ellipsis not in items:
        items.append(Ellipsis)
    if items.count(Ellipsis) > 1 or named > rank:
        return None
    at = items.index(Ellipsis)
    items[at : at + 1] = [slice(None)] * (rank - named)
    return items


def channels_made(node: Node, module: nn.Module | None) -> tuple[int, int] | None:
    """Number of channels that a layer, or its function on constants, makes, and their axis counted from the end."""
    rank = of(node).rank
    match module:
        case nn.modules.conv._ConvNd():
            return module.out_channels, 1 - module.weight.dim()
        case nn.Linear():
            return module.out_features, -1
        case nn.modules.batchnorm._BatchNorm() if rank is not None:
            return module.num_features, 1 - rank
    arguments = Arguments(node)
    constant = arguments.get(1, "running_mean" if target_name(node) == "batch_norm" else "weight", None)
    shape = of(constant).shape if isinstance(constant, Node) and constant.op == "get_attr" else None
    match target_name(node), shape, arguments.get(6, "groups", 1):
        case (("conv1d" | "conv2d" | "conv3d"), (count, *_, _), _):
            return count, 1 - len(shape or ())
        case (("conv_transpose1d" | "conv_transpose2d" | "conv_transpose3d"), (_, count, *_), int(groups)):
            return count * groups, 1 - len(shape or ())
        case "linear", (count, _), _:
            return count, -1
        case "batch_norm", (count,), _ if rank is not None:
            return count, 1 - rank
    return None


def channels_read(node: Node, modules: Mapping[str, nn.Module]) -> tuple[int, int] | None:
    """Number of channels that a layer takes which reads a value, and their axis counted from the end."""
    for reader in node.users:
        module = modules[str(reader.target)] if reader.op == "call_module" and reader.args[:1] == (node,) else None
        if module is None or not is_leaf(module):
            continue
        if isinstance(module, nn.modules.conv._ConvNd):
            return module.in_channels, 1 - module.weight.dim()
        if isinstance(module, nn.Linear):
            return module.in_features, -1
    return None


def is_layer(node: Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a node applies weights."""
    if node.op == "call_module":
        return isinstance(modules[str(node.target)], _LAYERS)
    return target_name(node) in _LAYER_FUNCTIONS


def keeps_shape(node: Node) -> bool:
    """Whether a node is known to return its first input's shape."""
    known = of(node).keeps_shape
    if known is None:
        known = _is_found_to_keep_shape(node)
        know(node, keeps_shape=known)
    return known


def _is_found_to_keep_shape(node: Node) -> bool:
    name, first = target_name(node), node.args[0] if node.args else None
    if not name or "::" in name or not isinstance(first, Node) or of(first).kind == "other":
        return False
    if name in names.KEEP_SHAPE:
        return True
    others = [source for source in node.all_input_nodes if source is not first]
    if names.is_pointwise(name):
        return all(of(source).kind == "other" for source in others)
    return not others and names.keeps_shape(node.target, *node.args[1:], **node.kwargs)


def note(node: Node, module: nn.Module | None = None) -> None:
    """Write down what the target of a node tells of its value."""
    if module is not None and not is_leaf(module):
        return
    if (made := channels_made(node, module)) is not None:
        know(node, channels=made, layer=True)
    if module is not None:
        know(node, keeps_shape=names.layer_keeps_shape(module))


def note_example(node: Node, value: object) -> None:
    """Write down an example of a node's value: the shape of a tensor, and anything else as it is."""
    if isinstance(value, torch.Tensor):
        if value.is_floating_point():
            know(node, example=value.shape)
    elif isinstance(value, (int, float, torch.Size)):
        # A shape would be taken for that of a tensor.
        know(node, example=tuple(value) if isinstance(value, torch.Size) else value)


def note_value(node: Node, value: object) -> None:
    """Write down what an example shows of a node's value."""
    if isinstance(value, torch.Tensor):
        know(node, kind="tensor", rank=value.dim(), shape=tuple(value.shape))
        know(node, floating=value.is_floating_point(), dtype=value.dtype)
    else:
        # What a container holds is not known before it is taken out.
        know(node, kind="unknown" if isinstance(value, (dict, list, tuple)) else "other")

"""What is known of a value before it is computed: whether it is a tensor, its rank, its channels.

Which axis a norm works along depends on the rank of its input: axis 1 of a 2-D tensor holds the features that a
matrix product made, axis 1 of a 3-D tensor does not. Facts come from the operations themselves (a 2-d convolution
makes 4-D tensors), and from example inputs where there are some. What is not known is None, and nothing is
rewritten on a guess.

Convolutions are taken to read batches: ``(N, C, L)``, ``(N, C, H, W)``, ``(N, C, D, H, W)``.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import nn
from torch._ops import OpOverload
from torch.fx import Node

from reparam.graph.leaves import is_leaf

Kind: TypeAlias = Literal["tensor", "other", "unknown"]
_CONVS = {1: (nn.Conv1d, nn.ConvTranspose1d), 2: (nn.Conv2d, nn.ConvTranspose2d), 3: (nn.Conv3d, nn.ConvTranspose3d)}
_CONV_FUNCTIONS = {f"{name}{n}d": n + 2 for name in ("conv", "conv_transpose") for n in (1, 2, 3)}
FACTORIES = frozenset("arange empty eye full linspace ones rand randn scalar_tensor tensor zeros".split())

# What draws random numbers.
RANDOM = frozenset(
    """bernoulli bernoulli_ cauchy_ exponential_ geometric_ log_normal_ multinomial normal normal_ poisson rand
    rand_like randint randint_like randn randn_like random_ randperm rrelu uniform_""".split()
)

# torch.nn layers that do not return a single tensor.
_SEVERAL_OUTPUTS = (nn.RNNBase, nn.MultiheadAttention, nn.LSTMCell, nn.AdaptiveLogSoftmaxWithLoss)

# torch.nn layers whose output does not have the rank of their input.
_OTHER_RANK = (
    nn.Unflatten, nn.Fold, nn.Unfold, nn.Embedding, nn.EmbeddingBag, nn.Bilinear, nn.CosineSimilarity,
    nn.PairwiseDistance, nn.modules.loss._Loss,
)  # fmt: skip
_KEEP_RANK = frozenset(
    """abs adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool2d alpha_dropout avg_pool1d
    avg_pool2d avg_pool3d batch_norm bernoulli celu chunk clamp clip clone constant_pad_nd contiguous cos cumsum detach
    double dropout dropout2d dropout3d elu erf exp expm1 feature_dropout flip float gelu glu group_norm half hardsigmoid
    hardswish hardtanh instance_norm interpolate layer_norm leaky_relu linear local_response_norm log log1p log_softmax
    logsigmoid max_pool1d max_pool2d max_pool3d mish neg negative normalize pad pixel_shuffle pixel_unshuffle prelu
    reciprocal relu relu6 requires_grad_ rms_norm roll rrelu rsqrt selu sigmoid sign silu sin softmax softmin softplus
    softsign split split_with_sizes sqrt square swapaxes tanh threshold to transpose tril triu type type_as
    upsample""".split()
)
_KEEP_SHAPE = frozenset(
    """abs alpha_dropout batch_norm celu clamp clone contiguous detach dropout dropout2d elu exp gelu group_norm
    hardsigmoid hardswish hardtanh layer_norm leaky_relu log_softmax mish neg relu relu6 selu sigmoid silu softmax
    softplus tanh""".split()
)
_KEEP_SHAPE_MODULES = (
    nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Sigmoid, nn.Hardswish, nn.Hardsigmoid, nn.Tanh, nn.LeakyReLU, nn.PReLU,
    nn.ELU, nn.CELU, nn.SELU, nn.Mish, nn.Softmax, nn.Hardtanh, nn.Softplus, nn.Identity, nn.modules.dropout._DropoutNd,
    nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase,
)  # fmt: skip
ARITHMETIC = frozenset(
    """add sub subtract rsub mul multiply div divide truediv true_divide floordiv pow maximum minimum eq ne lt le gt ge
    iadd isub imul itruediv addcmul addcdiv where""".split()
)
_INTEGERS = frozenset(
    """argmax argmin argsort bincount bool bucketize byte count_nonzero eq ge gt int isfinite isinf isnan le logical_and
    logical_not logical_or long lt ne nonzero one_hot searchsorted short""".split()
)
CONVERSIONS = frozenset("bfloat16 double float half to type type_as".split())

# Methods of a tensor that return one, beside those above.
_TENSOR_METHODS = frozenset(
    """amax amin bmm expand expand_as
    flatten matmul mean movedim narrow permute repeat reshape reshape_as squeeze std sum
    unflatten unsqueeze var view view_as""".split()
)
_LAYERS = (nn.modules.conv._ConvNd, nn.Linear, nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)
_LAYER_FUNCTIONS = frozenset([*_CONV_FUNCTIONS, *"linear batch_norm layer_norm group_norm".split()])
_DIVISIONS = frozenset("truediv itruediv div divide true_divide".split())
_SEVERAL = frozenset("chunk split split_with_sizes unbind tensor_split topk sort".split())
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
    keeps_shape: bool = False
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


def is_python(function: Any) -> bool:
    """Whether a function is one of Python's own, which makes numbers of numbers."""
    return getattr(function, "__module__", None) in ("math", "builtins")


def target_name(node: Node) -> str:
    """Name of what a function or method node calls, without module, overload or trailing underscore.

    Empty for all other nodes, whose targets are names that a user has chosen, and for a function that is neither
    torch's nor Python's: its name says nothing about what it computes.
    """
    if node.op not in ("call_function", "call_method"):
        return ""
    if isinstance(node.target, OpOverload):
        # One of a library's own may be called as one of torch's is, and be something else.
        return node.target._schema.name.removeprefix("aten::").rstrip("_")
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


def kind(node: Node, module: nn.Module | None = None) -> Kind:
    """Whether the value of a node is a tensor.

    Args:
        node: A node of the graph; its inputs have their facts.
        module: The module that a ``call_module`` node calls.
    """
    if node.op in ("placeholder", "get_attr"):
        return "tensor"
    if node.op == "call_module":
        if not _is_leaf(module):
            return "unknown"
        return "other" if _has_several_outputs(module) else "tensor"
    name = target_name(node)
    if reads_only_metadata(node) or name in _SEVERAL:
        return "other"
    inputs = [(of(source).kind or "unknown") for source in node.all_input_nodes]
    if node.target is operator.getitem:
        source = node.args[0]
        if isinstance(source, Node) and target_name(source) in _SEVERAL:
            return "tensor"
        return "tensor" if inputs[:1] == ["tensor"] else "other" if inputs[:1] == ["other"] else "unknown"
    if name == "getattr":
        return "tensor" if node.args[1] in ("T", "mT", "data", "real") else "unknown"
    if name in _KEEP_RANK or name in ARITHMETIC or getattr(node.target, "__module__", None) == "_operator":
        # Arithmetic on sizes gives sizes, arithmetic with a tensor gives a tensor.
        if "tensor" in inputs:
            return "tensor"
        return "unknown" if "unknown" in inputs or not inputs else "other"
    if name in FACTORIES and node.op == "call_function":
        return "tensor"
    if node.op == "call_function" and is_python(node.target) and "tensor" not in inputs:
        return "other"
    makes_tensor = node.op == "call_function" or name in _TENSOR_METHODS
    return "tensor" if makes_tensor and "tensor" in inputs else "unknown"


def _is_leaf(module: nn.Module | None) -> bool:
    return module is not None and is_leaf(module)


def _has_several_outputs(module: nn.Module | None) -> bool:
    return isinstance(module, _SEVERAL_OUTPUTS) or bool(getattr(module, "return_indices", False))


def rank(node: Node, module: nn.Module | None = None) -> int | None:
    """Number of axes of a node's value, or None when it is not known.

    Args:
        node: A node of the graph; its inputs have their facts.
        module: The module that a ``call_module`` node calls.
    """
    first = node.args[0] if node.args else None
    known: int | None = of(first).rank if isinstance(first, Node) else None
    if node.op == "call_module":
        return _module_rank(module, known)
    if node.op not in ("call_function", "call_method"):
        return None
    name = target_name(node)
    if name in _CONV_FUNCTIONS:
        return _CONV_FUNCTIONS[name]
    if name in ARITHMETIC:
        ranks: list[Any] = [of(v).rank for v in node.all_input_nodes if of(v).kind != "other"]
        return None if None in ranks or not ranks else max(ranks)
    if name in _KEEP_RANK:
        return known
    arguments = Arguments(node)
    match name:
        case "flatten":
            return _flattened(known, arguments.get(1, "start_dim", 0), arguments.get(2, "end_dim", -1))
        case "mean" | "sum" | "amax" | "amin":
            return _reduced(known, arguments.get(1, "dim", None), arguments.get(2, "keepdim", False))
        case "std" | "var" if len(node.args) < 3:
            # Their third argument may be that of an older signature.
            return _reduced(known, arguments.get(1, "dim", None), arguments.get(2, "keepdim", False))
        case "view" | "reshape":
            shape: Any = node.args[1:]
            shape = shape[0] if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape
            return len(shape) if len(shape) > 1 or (shape and isinstance(shape[0], int)) else None
        case "expand" | "repeat" | "tile" if all(type(size) is int or isinstance(size, Node) for size in node.args[1:]):
            return len(node.args) - 1 if name != "tile" and len(node.args) > 2 else None
        case "reshape_as" | "view_as" | "expand_as" if len(node.args) > 1 and isinstance(node.args[1], Node):
            return of(node.args[1]).rank
        case "matmul" | "bmm" | "baddbmm":
            ranks = [of(source).rank for source in node.all_input_nodes]
            return None if None in ranks or min(ranks) < 2 else max(ranks)
        case "scaled_dot_product_attention":
            return known
        case "unflatten" if known is not None and isinstance(arguments.get(2, "sizes", None), (tuple, list)):
            return known + len(arguments.get(2, "sizes", ())) - 1
        case "permute":
            return known
        case "unsqueeze":
            return None if known is None else known + 1
        case "cat" | "concat" | "stack":
            items = first if isinstance(first, (tuple, list)) else ()
            ranks = [of(item).rank for item in items if isinstance(item, Node)]
            alike = next((own for own in ranks if own is not None), None)
            return None if alike is None else alike + (name == "stack")
        case "getitem":
            return _indexed(node, known)
    return None


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


def _conv_dimensions(module: nn.Module | None) -> int | None:
    """Along how many axes a layer convolves; None when it does not."""
    return next((dimensions for dimensions, classes in _CONVS.items() if isinstance(module, classes)), None)


def _module_rank(module: nn.Module | None, known: int | None) -> int | None:
    if (dimensions := _conv_dimensions(module)) is not None:
        return dimensions + 2
    if isinstance(module, nn.BatchNorm2d):
        return 4
    if isinstance(module, nn.BatchNorm3d):
        return 5
    if isinstance(module, nn.Flatten):
        return _flattened(known, module.start_dim, module.end_dim)
    if not _is_leaf(module) or isinstance(module, _OTHER_RANK) or _has_several_outputs(module):
        return None
    return known


def _flattened(known: int | None, start: Any, end: Any) -> int | None:
    if not isinstance(start, int) or not isinstance(end, int):
        return None
    if end == -1 and start >= 0:
        return start + 1 if known is None or known > start else known
    if known is None:
        return None
    return known - (end % known - start % known)


def _reduced(known: int | None, dims: Any, keep: Any) -> int | None:
    if known is None or keep:
        return known if keep is True else None
    if isinstance(dims, bool) or not isinstance(dims, (int, tuple, list, type(None))):
        return None
    if dims is None:
        return 0
    return known - (len(dims) if isinstance(dims, (tuple, list)) else 1)


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


def _indexed(node: Node, known: int | None) -> int | None:
    source, index = node.args
    if isinstance(source, Node) and target_name(source) in ("chunk", "split", "split_with_sizes", "tensor_split"):
        return known
    if known is None or not isinstance(source, Node) or of(source).kind != "tensor":
        return None
    items = indices(index, known)
    return None if items is None else sum(type(item) is not int for item in items)


def channels(module: nn.Module | None, rank: int | None) -> tuple[int, int] | None:
    """Number of channels that a layer makes, and their axis counted from the end."""
    if isinstance(module, nn.modules.conv._ConvNd) and (dimensions := _conv_dimensions(module)) is not None:
        return module.out_channels, -dimensions - 1
    if isinstance(module, nn.Linear):
        return module.out_features, -1
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and rank is not None:
        return module.num_features, 1 - rank
    return None


def channels_read(node: Node, modules: Mapping[str, nn.Module]) -> tuple[int, int] | None:
    """Number of channels that a layer takes which reads a value, and their axis counted from the end."""
    for reader in node.users:
        module = modules[str(reader.target)] if reader.op == "call_module" and reader.args[:1] == (node,) else None
        if not _is_leaf(module):
            continue
        if isinstance(module, nn.modules.conv._ConvNd) and (dimensions := _conv_dimensions(module)) is not None:
            return module.in_channels, -dimensions - 1
        if isinstance(module, nn.Linear):
            return module.in_features, -1
    return None


def is_floating(node: Node) -> bool:
    """Whether the value of a node may be of floating-point numbers; an integer times a float is no scaled integer."""
    name = target_name(node)
    if node.op == "call_module" or name in CONVERSIONS:
        return True
    tensors = [source for source in node.all_input_nodes if of(source).kind == "tensor"]
    return name not in _INTEGERS and (not tensors or any(of(source).floating is not False for source in tensors))


def settle_inputs(nodes: Iterable[Node], modules: Mapping[str, nn.Module]) -> None:
    """Decide how many axes inputs have, and which values may be of integers, where no run has shown it.

    An input that a convolution reads has the axes that convolutions read. Inputs are taken to be of floating-point
    numbers, with two exceptions: what arithmetic turns into indices, and images that are divided (``image / 255``)
    before any layer has read them.
    """
    nodes = list(nodes)
    settle_ranks(nodes, modules)
    live = _live(nodes)
    for node in nodes:
        if node.op == "placeholder" and of(node).dtype is None:
            divided = any(target_name(reader) in _DIVISIONS for reader in _readers(node, live, _is_sum))
            index = any(_looks_up(reader, modules) for reader in _readers(node, live, _is_arithmetic))
            read_by_layer = any(is_layer(reader, modules) for reader in node.users if reader in live)
            know(node, floating=read_by_layer or not (divided or index))
        elif node.op in ("call_function", "call_method") and of(node).dtype is None:
            know(node, floating=is_floating(node))


def is_layer(node: Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a node applies weights, which no integers have."""
    if node.op == "call_module":
        return isinstance(modules[str(node.target)], _LAYERS)
    return target_name(node) in _LAYER_FUNCTIONS


def settle_ranks(nodes: Iterable[Node], modules: Mapping[str, nn.Module]) -> None:
    """Ranks of values as their readers have them, and of what depends on them, where they were not known."""
    for node in nodes:
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        if of(node).rank is None and node.op.startswith("call"):
            know(node, rank=rank(node, module))
        if of(node).rank is None and of(node).kind != "other" and node.op != "get_attr":
            readers = [_rank_read(reader, modules) for reader in node.users if reader.args[:1] == (node,)]
            know(node, rank=next(filter(None, readers), None))


def _rank_read(reader: Node, modules: Mapping[str, nn.Module]) -> int | None:
    """The number of axes that a convolution, or a norm of images, reads."""
    if reader.op != "call_module":
        return _CONV_FUNCTIONS.get(target_name(reader)) if reader.op == "call_function" else None
    module = modules[str(reader.target)]
    norms = {nn.BatchNorm2d: 4, nn.BatchNorm3d: 5}
    if (dimensions := _conv_dimensions(module)) is not None:
        return dimensions + 2
    return next((rank for cls, rank in norms.items() if isinstance(module, cls)), None)


def _live(nodes: Iterable[Node]) -> set[Node]:
    """What the output depends on: a value that nobody uses says nothing about its inputs."""
    pending = [node for node in nodes if node.op == "output"]
    found = set(pending)
    while pending:
        for source in pending.pop().all_input_nodes:
            if source not in found:
                found.add(source)
                pending.append(source)
    return found


def _readers(node: Node, live: set[Node], through: Callable[[Node], bool]) -> set[Node]:
    """What reads a value, or what some operations alone have made of it."""
    found: set[Node] = set()
    pending = [node]
    while pending:
        readers = [reader for reader in pending.pop().users if reader in live and reader not in found]
        found.update(readers)
        pending += filter(through, readers)
    return found


def _is_arithmetic(node: Node) -> bool:
    return target_name(node) in ARITHMETIC


def _is_sum(node: Node) -> bool:
    """Whether a node adds activations: a sum of integers is one."""
    return target_name(node) in ("add", "iadd", "sub", "isub") and all(isinstance(arg, Node) for arg in node.args)


def _looks_up(node: Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a node takes indices."""
    if node.op == "call_module":
        return isinstance(modules[str(node.target)], (nn.Embedding, nn.EmbeddingBag))
    return target_name(node) in ("embedding", "embedding_bag", "one_hot")


def keeps_shape(node: Node) -> bool:
    """Whether a node is known to return its first input's shape."""
    return (node.op != "call_module" and target_name(node) in _KEEP_SHAPE) or of(node).keeps_shape


def note(node: Node, module: nn.Module | None = None) -> None:
    """Write down what is known of a node's value."""
    known = of(node)
    if known.kind is None:
        know(node, kind=kind(node, module))
    if known.rank is None:
        know(node, rank=rank(node, module))
    if known.floating is None:
        know(node, floating=is_floating(node))
    if module is not None:
        made = channels(module, of(node).rank) if _is_leaf(module) else None
        if made is not None:
            know(node, channels=made, layer=True)
        if isinstance(module, _KEEP_SHAPE_MODULES):
            know(node, keeps_shape=True)


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

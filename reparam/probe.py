"""Modules that cannot be read, but whose function is a convolution: found out by running them.

Python that writes to slices, asks for values or was scripted leaves no graph, and a graph may hold operations that the
algebra does not know. Such a module is still a function, and few numbers say which convolution it would have to be:
its answer to zeros is the bias, how its output grows with its input are stride and padding, and its answers to single
ones are the kernel. That is a conjecture. It is then held to the module's own answers in float64, at 1e-9, on every
size from the smallest on, on both sides of zero, over fifteen decades, in several batch sizes; anything that a module
does besides (writing to its input or to itself, drawing random numbers, returning something else) refutes it, too.

The order makes a module that is no convolution cheap: layers that are known not to be linear refute it before it is
run, and three small runs refute most others.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.utils._python_dispatch import TorchDispatchMode

from reparam import aliasing, capture, cost, facts, measure, verify, views
from reparam.algebra import ChannelAffine, Conv, Linear, Operator
from reparam.capture.modes import below
from reparam.emit import kernels_of
from reparam.errors import AlgebraError
from reparam.leaves import carries_hooks, is_leaf
from reparam.lift import lift, resolve
from reparam.report import Remark

# torch.nn layers that are linear in their input up to a constant, in eval mode.
_LINEAR = (
    nn.modules.conv._ConvNd, nn.Linear, nn.modules.batchnorm._BatchNorm, nn.Identity, nn.modules.dropout._DropoutNd,
    nn.modules.pooling._AvgPoolNd, nn.modules.padding._ConstantPadNd, nn.modules.padding._ReflectionPadNd,
    nn.modules.padding._ReplicationPadNd, nn.modules.padding._CircularPadNd, nn.Flatten, nn.Unflatten, nn.PixelShuffle,
    nn.PixelUnshuffle, nn.ChannelShuffle, nn.Upsample, nn.Fold, nn.Unfold,
)  # fmt: skip

_SIZES = (8, 16, 32, 64)
_LARGEST_STRIDE = 64
# Numbers in one batch of impulses, numbers in all of them, and multiply-adds over all of them.
_BATCH, _NUMBERS, _WORK = 2**21, 2**25, 10**10
_DECADES = (1e-6, 1e-3, 1.0, 1e3, 1e6, 1e9)
# An impulse's answer is the difference of two; what is smaller than this, relative to the largest, is rounding.
_NOISE = 1e-13


class RefutedError(Exception):
    """The module is no convolution, or cannot be shown to be one."""


@dataclass(frozen=True)
class Probed:
    """What a module turned out to be.

    Attributes:
        operator: The operator that it computes.
        kernels: Kernels that its own Python launches.
    """

    operator: Operator
    kernels: int


def probe(graph: Graph, modules: Mapping[str, nn.Module]) -> list[Remark]:
    """Find the opaque modules of a graph that are convolutions, and write the operators into ``meta["operator"]``.

    Args:
        graph: A traced graph with its facts. Nodes get more of them where they follow from what is found.
        modules: The module at every path that the graph's names refer to.

    Returns:
        A remark for every module that is one.
    """
    remarks: dict[str, Remark] = {}
    known: dict[Any, Probed | None] = {}
    world = list(modules.values())
    facts.settle_ranks(graph.nodes, modules)
    for node in graph.nodes:
        views.settle((node,), modules)
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        if module is None or is_leaf(module):
            if known and node.op.startswith("call"):
                _note_again(node, module)
            continue
        source = _only_activation(node)
        for read in () if source is None else _reads(source):
            key = node.target, read, str(node.args[1:]), str(node.kwargs)
            if key not in known:
                args, kwargs = resolve((node.args[1:], node.kwargs), modules)
                known[key] = _probed(module, args, kwargs, read, world)
            found = known[key]
            if found is not None:
                note(node, found, read.rank)
                message = f"{type(module).__name__} is {_words(found.operator)}: probed"
                remarks[str(node.target)] = Remark("capture", "Probe", str(node.target), message)
                break
    return [*remarks.values(), *collapse(graph, modules)]


# Operations that are linear in one input up to a constant, or move numbers about; those of the first set need a module
# around them that is a convolution, since the algebra cannot read them alone.
_UNREADABLE = frozenset(
    "unfold fold einsum matmul bmm mm tensordot roll gather index_select stack flip sum addmm baddbmm setitem".split()
)
_ALLOWED = _UNREADABLE | frozenset(
    """view reshape flatten unflatten permute transpose swapaxes movedim squeeze unsqueeze expand expand_as view_as
    chunk split split_with_sizes unbind narrow select getitem getattr size contiguous t cat concat add sub mul div
    truediv floordiv neg mod pad conv1d conv2d conv3d linear
    batch_norm avg_pool1d avg_pool2d avg_pool3d zeros_like clone
    to type_as float iadd isub imul itruediv multiply subtract dropout""".split()
)


def collapse(graph: Graph, modules: Mapping[str, nn.Module]) -> list[Remark]:
    """Replace what a module was traced to by a call of it, where that is a convolution that the algebra cannot read.

    The innermost such module is taken, and only where its operations launch more kernels than the convolution does.

    Args:
        graph: A traced graph with its facts, changed in place.
        modules: The module at every path that the graph's names refer to.

    Returns:
        A remark for every module that is one.
    """
    regions: dict[str, list[Node]] = {
        str(node.meta.get("scope", "")): []
        for node in graph.nodes
        if node.op in ("call_function", "call_method") and _is_unreadable(node, modules)
    }
    for node in graph.nodes if regions else ():
        if (node.op.startswith("call") and node.meta.get("kind") != "other") or facts.target_name(node) == "setitem":
            parts = str(node.meta.get("scope", "")).split(".")
            for length in range(1, len(parts) + 1):
                regions.get(".".join(parts[:length]), []).append(node)
    remarks = []
    for path in sorted(regions, key=lambda path: (-path.count("."), path)):
        region = [node for node in regions[path] if not node._erased]
        found = _collapsed(graph, path, region, modules) if path and region else None
        if found is not None:
            message = f"{type(modules[path]).__name__} is {_words(found.operator)}: probed"
            remarks.append(Remark("capture", "Probe", path, message))
    return remarks


def _is_unreadable(node: Node, modules: Mapping[str, nn.Module]) -> bool:
    return facts.target_name(node) in _UNREADABLE and lift(node, modules) is None


def _collapsed(graph: Graph, path: str, region: list[Node], modules: Mapping[str, nn.Module]) -> Probed | None:
    """The operator that a region is, which then stands in its place; None when it stays."""
    from reparam.rewrite import Graph as Rewritten

    inside = set(region)
    sources = {source for node in region for source in node.all_input_nodes} - inside
    activations = [
        source for source in sources
        if source.op != "get_attr" and source.meta.get("kind") != "other"
        and any(user in inside and not facts.reads_only_metadata_of(user, source) for user in source.users)
    ]  # fmt: skip
    outputs = [node for node in region if any(user not in inside for user in node.users)]
    homes = aliasing.memory(graph, modules)
    linear = all(
        (node.op == "call_module" or facts.target_name(node) in _ALLOWED)
        and ((changed := aliasing.written(node, modules)) is None or homes[changed] <= inside)
        for node in region
    )
    if not linear or len(activations) != 1 or len(outputs) != 1:
        return None
    (source,), (output,) = activations, outputs
    for read in _reads(source):
        found = _probed(modules[path], (), {}, read, list(modules.values()))
        if found is None or found.kernels <= kernels_of(found.operator):
            continue
        # Constants that were computed before are as exact as their type; the module itself was run in float64.
        types = {
            resolve(node, modules).dtype
            for node in sources
            if node.op == "get_attr" and "_constant" in str(node.target)
        }
        rounding = [8 * torch.finfo(dtype).eps for dtype in types if dtype.is_floating_point]
        tolerance = max(verify.CERTIFICATE_TOLERANCE, *rounding) if rounding else verify.CERTIFICATE_TOLERANCE
        for x in verify.random_inputs(found.operator, source):
            # The module may have been called with more than its input.
            values: dict[Node, Any] = {source: x} | _sizes(region, source, x)
            try:
                for node in region:  # in order, as some of it may be in place
                    verify.evaluate(Rewritten(graph, dict(modules)), node, values)
            except Exception:  # it takes no such sizes
                return None
            expected, actual = values[output], found.operator(x)
            if verify.relative_error(expected, actual) > tolerance:
                return None
        with graph.inserting_before(output):
            call = graph.call_module(path, (source,))
        call.meta.update({name: output.meta[name] for name in ("shape", "dtype") if name in output.meta}, scope=path)
        note(call, found, read.rank)
        output.replace_all_uses_with(call)
        for node in reversed(region):
            graph.erase_node(node)
        return found
    return None


def _sizes(region: list[Node], source: Node, x: Tensor) -> dict[Node, int]:
    """The sizes that a region reads, where its input is ``x``: the graph reads each where it is known first."""
    same = {views.size(source, axis): x.shape[axis] for axis in range(x.dim())}
    found: dict[Node, int] = {}
    pending = list(region)
    while pending:
        for read in pending.pop().all_input_nodes:
            if read.meta.get("kind") == "other" and read not in found:
                pending.append(read)
                if read.target == "size" and (read.args[0], read.args[1]) in same:
                    found[read] = same[read.args[0], read.args[1]]  # type: ignore[index]
    return found


def add_remarks(remarks: list[Remark], probed: list[Remark]) -> list[Remark]:
    """Remarks of the capture, where those of modules that were found out take the places of their own."""
    where = {remark.where for remark in probed}
    return [remark for remark in remarks if remark.where not in where or remark.rule != "Record"] + probed


def note(node: Node, found: Probed, rank: int) -> None:
    """Write what is known of a node's value, now that its module is known."""
    operator = found.operator
    node.meta.update(operator=operator, kernels=found.kernels, kind="tensor", rank=rank, floating=True)
    if isinstance(operator, Conv):
        node.meta["channels"] = operator.out_channels, operator.axis
    elif isinstance(operator, ChannelAffine) and operator.axis is not None:
        node.meta["channels"] = len(operator.scale), operator.axis


def _note_again(node: Node, module: nn.Module | None) -> None:
    if node.meta.get("kind") == "unknown":
        del node.meta["kind"]
    facts.note(node, module)


def _words(operator: Operator) -> str:
    match operator:
        case Conv(dimensions=0):
            return "a matrix product"
        case Conv():
            return "a convolution"
    return "a scale and a shift of every channel"


# What is known before running anything.


@dataclass(frozen=True)
class _Read:
    """What a module reads: rank, channels and their axis from the end, and the shape where an example shows it."""

    rank: int
    channels: int
    axis: int
    shape: tuple[int, ...] | None


def _only_activation(node: Node) -> Node | None:
    """The one activation that a node reads, once and as its first argument."""
    first = node.args[0] if node.args else None
    others: list[Node] = []
    torch.fx.map_arg((node.args[1:], node.kwargs), others.append)
    is_only = isinstance(first, Node) and first.op != "get_attr" and all(other.op == "get_attr" for other in others)
    return first if is_only else None  # type: ignore[return-value]


def _reads(source: Node) -> Iterator[_Read]:
    """Rank and channels of a value, when both are known; the channels' axis may be one of two."""
    if source.meta.get("kind") == "other" or not source.meta.get("floating", True):
        return
    rank, shape = source.meta.get("rank"), source.meta.get("shape")
    if rank is None or rank < 2:
        return
    for axis in (1 - rank, -1):
        channels = views.channels(source, axis)
        if channels is None and shape is not None and "channels" not in source.meta:
            channels = shape[axis]
        if channels is not None:
            yield _Read(rank, channels, axis, shape)


def _may_be_linear(module: nn.Module) -> bool:
    """Whether nothing that a module is made of is known not to be linear, or does more than its forward shows."""
    parts = list(module.modules())
    if any(carries_hooks(part) for part in parts):
        return False
    layers = [part for part in parts if is_leaf(part)]
    statistics = [part for part in layers if isinstance(part, nn.modules.batchnorm._NormBase)]
    return all(isinstance(layer, _LINEAR) for layer in layers) and all(
        norm.running_mean is not None for norm in statistics
    )


# Running a module as a function.


class _Subject:
    """A module as a function of one tensor: in float64, on a copy of the input, and without side effects."""

    def __init__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], world: Sequence[nn.Module] = ()
    ) -> None:
        self.module, self.args, self.kwargs = module, args, kwargs
        # A module may also know others, and change them.
        self.world = list({id(part): part for part in (*module.modules(), *world)}.values())
        self.state = capture.State(self.world)
        tensors = [tensor for part in module.modules() for _, tensor in capture.tensors_in(part)]
        floating = [tensor for tensor in tensors if tensor.is_floating_point()]
        self.device = tensors[0].device if tensors else torch.device("cpu")
        self.dtype = floating[0].dtype if floating else torch.get_default_dtype()
        self.function = verify.InDouble(module)
        own = capture.tensor_storages(self.world)
        self.guard = capture.NoSideEffects(own | self.function.storages)

    def __call__(self, x: Tensor) -> Tensor:
        """The module's answer; raises RefutedError where it does not give one, or does anything else."""
        return self._run(self.function, x)

    def in_its_own_precision(self, x: Tensor) -> Tensor:
        """The answer of the module itself, in its own precision."""
        return self._run(self.module, x.to(self.dtype))

    def _run(self, function: Callable[..., Any], x: Tensor) -> Tensor:
        given = x.clone()
        try:
            with torch.no_grad(), below(self.guard):
                y = function(given, *self.args, **self.kwargs)
        except (Exception, capture.UnrecordableError) as error:
            raise RefutedError(f"it does not run on {tuple(x.shape)}: {error}") from error
        if type(y) is not Tensor or y.is_meta:
            raise RefutedError("its output is not a tensor of numbers")
        if y.dtype != x.dtype or y.layout != torch.strided or y.device != x.device:
            raise RefutedError("its output is not a tensor like its input")
        if not torch.equal(given.nan_to_num(), x.nan_to_num()):
            raise RefutedError("it writes to its input")
        return y

    def check_state(self, x: Tensor) -> None:
        """A call like one before changes nothing: neither what the module holds nor what it answers."""
        self.restore()  # its first call may be another
        first = self(x)
        held = capture.State(self.world)
        self(-x)
        if not torch.equal(self(x), first):
            raise RefutedError("its answers to the same input differ")
        for part in self.world:
            if held.attributes[part].keys() != part.__dict__.keys():
                raise RefutedError("it remembers its calls")
            for name, value in held.attributes[part].items():
                new = part.__dict__[name]
                same = new is value or (type(new) is type(value) and type(value) in capture.ATOMS and new == value)
                contents = held.contents[part].get(name)
                if not same or (contents is not None and not capture.same_items(new, contents)):
                    raise RefutedError("it remembers its calls")

    def restore(self) -> None:
        """Leave all modules as they were."""
        self.state.restore(self.world)

    def cost(self, x: Tensor) -> tuple[int, int]:
        """Kernels and multiply-adds of one call."""
        counter = _Kernels()
        with below(counter), torch.no_grad():
            self.function(x.clone(), *self.args, **self.kwargs)
        return counter.kernels, measure.multiply_adds_of(self, (x,), {})  # type: ignore[arg-type]


_NO_KERNEL = ("empty", "new_empty", "_local_scalar", "_unsafe_view", "_reshape_alias", "lift_fresh")


class _Kernels(TorchDispatchMode):
    """Counts operations that write memory."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # The copy of the input is none of the module's.
        self.kernels = -1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aliases = [result.alias_info for result in func._schema.returns]
        views = any(alias is not None and not alias.is_write for alias in aliases)
        self.kernels += not views and not func.overloadpacket.__name__.startswith(_NO_KERNEL)
        return func(*args, **(kwargs or {}))


# From answers to a conjecture.


def _probed(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], read: _Read, world: Sequence[nn.Module] = ()
) -> Probed | None:
    """The operator that a module is, or None."""
    if not _may_be_linear(module):
        return None
    try:
        subject = _Subject(module, args, kwargs, world)
    except Exception:
        # It cannot be copied, or its device knows no float64.
        return None
    try:
        return identify(subject, read)
    except RefutedError:
        return None
    finally:
        subject.restore()


def identify(subject: _Subject, read: _Read) -> Probed:
    """The operator that a function is, and its own cost; raises RefutedError when it is none."""
    if read.axis == -1:
        return _identify_product(subject, read)
    space = read.rank - 2
    sizes = _first_sizes(subject, read, space)
    random = _Random(subject.device)
    x = random((1, read.channels, *sizes))
    bias = _refute_cheaply(subject, x)
    subject.check_state(x)
    geometry = [_stride_and_growth(subject, x.shape, axis + 2) for axis in range(space)]
    stride, growth = (tuple(pair[i] for pair in geometry) for i in range(2))
    kernel, first = _kernel(subject, read, sizes, stride, bias, random)
    conjecture = _as_conv(kernel, first, bias, stride, growth)
    operator = _confirmed(subject, conjecture, read, sizes, random)
    return _profitable(subject, operator, x)


class _Random:
    """Normal numbers in float64, the same in every compilation."""

    def __init__(self, device: torch.device) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.device = device

    def __call__(self, shape: Sequence[int]) -> Tensor:
        return torch.randn(tuple(shape), generator=self.generator, dtype=torch.float64).to(self.device)


def _first_sizes(subject: _Subject, read: _Read, space: int) -> tuple[int, ...]:
    """Small sizes, different on every axis, on which the module runs."""
    for size in _SIZES:
        sizes = tuple(size + axis for axis in range(space))
        if read.channels * math.prod(sizes) > _BATCH:
            break
        try:
            y = subject(torch.zeros(1, read.channels, *sizes, dtype=torch.float64, device=subject.device))
        except RefutedError:
            continue
        if y.dim() == read.rank and y.numel():
            return sizes
    raise RefutedError("it runs on no small input")


def _refute_cheaply(subject: _Subject, x: Tensor) -> Tensor:
    """The answer to zeros, when it is the same everywhere and on the line through the answers to ``x`` and ``-2x``."""
    zero, plus, minus = subject(torch.zeros_like(x)), subject(x), subject(-2 * x)
    if zero.dim() != x.dim() or zero.shape[0] != 1 or zero.shape != plus.shape or zero.shape != minus.shape:
        raise RefutedError("its output has other axes than its input")
    if not torch.isfinite(plus).all() or not torch.isfinite(zero).all():
        raise RefutedError("its output is not finite")
    bias = zero.flatten(2)[0, :, 0]
    scale = 1e-9 * (plus.abs().max() + zero.abs().max())
    spread = (zero.flatten(2) - bias[:, None]).abs().max()
    if spread > 1e-12 * bias.abs().max() or (2 * plus + minus - 3 * zero).abs().max() > scale:
        raise RefutedError("it is not linear")
    return bias


def _stride_and_growth(subject: _Subject, shape: Sequence[int], axis: int) -> tuple[int, int]:
    """Stride and growth of one axis: the output size is ``(input + growth - 1) // stride + 1``."""
    steps: list[tuple[int, int]] = []
    size, last = shape[axis], None
    while len(steps) < 2:
        if size > shape[axis] + 2 * _LARGEST_STRIDE:
            raise RefutedError("its output does not grow with its input")
        given = (*shape[:axis], size, *shape[axis + 1 :])
        made = subject(torch.zeros(given, dtype=torch.float64, device=subject.device)).shape[axis]
        if last is not None and made != last:
            if made != last + 1:
                raise RefutedError("its output grows faster than its input")
            steps.append((size, made))
        size, last = size + 1, made
    (first, output), (second, _) = steps
    stride = second - first
    return stride, (output - 1) * stride + 1 - first


def _impulses(
    subject: _Subject, vectors: Tensor, sizes: Sequence[int], stride: Sequence[int], bias: Tensor
) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """Answers to single positions that hold one of some vectors of channels, less the bias: for every phase.

    Args:
        subject: The function.
        vectors: Shape ``(V, C)``.
        sizes: Of the input.
        stride: Of the output; positions are neighbours in the middle of the input.
        bias: Shape ``(O,)``.

    Yields:
        A position, and answers of shape ``(V, O, *output)``.
    """
    chunk = max(1, _BATCH // (vectors.shape[1] * math.prod(sizes)))
    for phase in itertools.product(*(range(s) for s in stride)):
        position = tuple(size // 2 - s // 2 + p for size, s, p in zip(sizes, stride, phase, strict=True))
        answers = []
        for part in vectors.split(chunk):
            x = torch.zeros(*part.shape, *sizes, dtype=torch.float64, device=subject.device)
            x[_at(position)] = part
            y = subject(x)
            if y.shape[:2] != (len(part), len(bias)):
                raise RefutedError("its output has another batch or other channels")
            answers.append(y - bias.view(-1, *[1] * len(sizes)))
        yield position, torch.cat(answers)


def _kernel(
    subject: _Subject, read: _Read, sizes: tuple[int, ...], stride: tuple[int, ...], bias: Tensor, random: _Random
) -> tuple[Tensor, tuple[int, ...]]:
    """The dense kernel, and the offset of its first tap on every axis.

    All channels at once show which positions are read; then one at a time shows how.
    """
    vector = random((1, read.channels))
    while True:
        samples = math.prod(stride)
        if samples * read.channels * math.prod(sizes) > _NUMBERS or max(sizes) > 4 * _SIZES[-1]:
            raise RefutedError("it reads from too far away, or from nowhere")
        taps: list[set[int]] = [set() for _ in sizes]
        inside, largest = True, 0.0
        for position, answer in _impulses(subject, vector, sizes, stride, bias):
            largest = max(largest, answer.abs().max().item())
            for index in (answer[0].abs().amax(0) > _NOISE * (largest + bias.abs().max())).nonzero().tolist():
                for axis, output in enumerate(index):
                    taps[axis].add(position[axis] - stride[axis] * output)
                    inside &= 0 < output < answer.shape[2 + axis] - 1
        if inside and all(taps):
            break
        sizes = tuple(2 * size for size in sizes)
    x = torch.zeros(1, read.channels, *sizes, dtype=torch.float64, device=subject.device)
    samples *= read.channels
    if samples * read.channels * math.prod(sizes) > _NUMBERS or subject.cost(x)[1] * samples > _WORK:
        raise RefutedError("it is too large to be probed")
    # The bias is subtracted, so the answer should not be much smaller.
    amplitude = 2.0 ** max(0, math.ceil(math.log2(1e-300 + bias.abs().max().item() / largest)))
    first, last = tuple(map(min, taps)), tuple(map(max, taps))
    extent = [b - a + 1 for a, b in zip(first, last, strict=True)]
    kernel = torch.zeros(len(bias), read.channels, *extent, dtype=torch.float64, device=subject.device)
    vectors = amplitude * torch.eye(read.channels, dtype=torch.float64, device=subject.device)
    for position, answer in _impulses(subject, vectors, sizes, stride, bias):
        offsets = [
            [t for t in range(a, b + 1) if (p - t) % s == 0]
            for a, b, p, s in zip(first, last, position, stride, strict=True)
        ]
        outputs = [[(p - t) // s for t in ts] for ts, p, s in zip(offsets, position, stride, strict=True)]
        places = [[t - a for t in ts] for ts, a in zip(offsets, first, strict=True)]
        kernel[_at(_grid(places))] = answer[_at(_grid(outputs))].transpose(0, 1) / amplitude
    return kernel, first


def _at(index: Sequence[Any]) -> tuple[Any, ...]:
    """Index of the last axes."""
    return (..., *index)


def _grid(indices: Sequence[Sequence[int]]) -> tuple[Tensor, ...]:
    """Index of the positions whose coordinates come from lists."""
    return tuple(
        torch.tensor(index, dtype=torch.long).view([-1 if i == axis else 1 for i in range(len(indices))])
        for axis, index in enumerate(indices)
    )


def _cleaned(kernel: Tensor, bias: Tensor) -> tuple[Tensor, Tensor | None]:
    largest = kernel.abs().flatten(1).amax(1).view(-1, *[1] * (kernel.dim() - 1))
    kernel = torch.where(kernel.abs() <= _NOISE * largest, 0.0, kernel)
    if not kernel.any():
        raise RefutedError("it does not depend on its input")
    return kernel, bias if bias.any() else None


def _as_conv(
    kernel: Tensor, first: tuple[int, ...], bias: Tensor, stride: tuple[int, ...], growth: tuple[int, ...]
) -> Conv:
    """A dense kernel as the convolution with the most groups, the largest dilation and the fewest taps."""
    kernel, shift = _cleaned(kernel, bias)
    padding, dilation = [], []
    for axis in range(2, kernel.dim()):
        others = [other for other in range(kernel.dim()) if other != axis]
        taps = kernel.any(0, keepdim=True).sum(others).nonzero().flatten().tolist()
        step = reduce(math.gcd, (tap - taps[0] for tap in taps)) or 1
        kernel = kernel[(slice(None),) * axis + (slice(taps[0], taps[-1] + 1, step),)]
        start = first[axis - 2] + taps[0]
        padding.append((-start, growth[axis - 2] + start + taps[-1] - taps[0]))
        dilation.append(step)
    groups = _groups(kernel)
    rows, columns = kernel.shape[0] // groups, kernel.shape[1] // groups
    blocks = kernel.view(groups, rows, groups, columns, *kernel.shape[2:])
    weight = blocks.diagonal(dim1=0, dim2=2).movedim(-1, 0).reshape(-1, columns, *kernel.shape[2:])
    return Conv(weight, shift, stride, tuple(padding), tuple(dilation), groups)


def _groups(kernel: Tensor) -> int:
    """The largest number of groups for which a kernel is block-diagonal."""
    reads = kernel.flatten(2).any(2)
    common = math.gcd(*reads.shape)
    for groups in range(common, 1, -1):
        if common % groups == 0:
            blocks = reads.view(groups, reads.shape[0] // groups, groups, -1).any(3).any(1)
            if not (blocks & ~torch.eye(groups, dtype=torch.bool, device=blocks.device)).any():
                return groups
    return 1


# From a conjecture to an operator.


def _check(subject: _Subject, conv: Conv, bounds: Conv, x: Tensor) -> None:
    """Compare one answer, relative to what every channel's sum adds up over; where ``conv`` runs, it must, too."""
    try:
        expected = conv(x)
    except RuntimeError:
        return
    if not expected.numel():
        return
    _agree(subject(x), expected, _scale_of(bounds(x.abs()), conv))


def _scale_of(magnitudes: Tensor, conv: Conv) -> Tensor:
    """The largest sum of magnitudes of every channel of every sample."""
    space = tuple(range(magnitudes.dim() - conv.dimensions, magnitudes.dim()))
    return magnitudes.amax(space, keepdim=True) if space else magnitudes


def _agree(actual: Tensor, expected: Tensor, scale: Tensor) -> None:
    if actual.shape != expected.shape:
        raise RefutedError("its output has another shape")
    if not ((actual - expected).abs() <= verify.CERTIFICATE_TOLERANCE * scale).all():
        raise RefutedError("it is something else on some input")


def _check_decades(subject: _Subject, conv: Conv, x: Tensor) -> None:
    """Compare answers to inputs of many shapes and magnitudes; for the conjecture, the latter are but factors."""
    shape = [-1] + [1] * conv.dimensions
    bias = torch.zeros((), dtype=x.dtype, device=x.device) if conv.bias is None else conv.bias.view(shape)
    linear = replace(conv, bias=None)
    for pattern in _patterns(x[:1]):
        product, scale = linear(pattern), _scale_of(_bounds(linear)(pattern.abs()), conv)
        for decade in _DECADES:
            _agree(subject(decade * pattern), decade * product + bias, decade * scale + bias.abs())
    # All magnitudes beside one another.
    decades = torch.tensor(_DECADES, dtype=x.dtype, device=x.device).view(-1, *[1] * (x.dim() - 1))
    _check(subject, conv, _bounds(conv), decades * x[:1])


def _bounds(conv: Conv) -> Conv:
    """What the terms of every output add up to in magnitude, given the magnitudes of the input."""
    return replace(conv, weight=conv.weight.abs(), bias=None if conv.bias is None else conv.bias.abs())


def _patterns(x: Tensor) -> Iterator[Tensor]:
    """Inputs that a branch on signs, sums or zeros would tell from ``x``."""
    yield from (x, x.abs(), -x.abs(), torch.where(x > 1, x, 0.0), torch.ones_like(x), -torch.ones_like(x))
    corner = torch.zeros_like(x)
    corner[..., 0] = x[..., 0]
    yield corner


def _confirmed(subject: _Subject, conv: Conv, read: _Read, sizes: Sequence[int], random: _Random) -> Operator:
    """The operator of a conjecture that no input refutes, with the padding that it turns out to have."""
    x = random((2, read.channels, *sizes))
    for mode in ("zeros", "reflect", "replicate", "circular") if conv.pads else ("zeros",):
        try:
            candidate = replace(conv, padding_mode=mode)
            _check(subject, candidate, _bounds(candidate), x)
            break
        except (RefutedError, AlgebraError) as error:
            refuted = error
    else:
        raise RefutedError(str(refuted))
    bounds = _bounds(candidate)
    _check_decades(subject, candidate, x)
    for shape in _shapes(candidate, read, sizes):
        _check(subject, candidate, bounds, random(shape))
    _check_special(subject, candidate, x)
    _check_precision(subject, candidate, x)
    return _simplest(candidate)


def _shapes(conv: Conv, read: _Read, sizes: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Shapes from the smallest on: even and odd, square and not, every phase of the stride, long, and the real one."""
    least = [max(1, 1 - growth) for growth in conv.growth]
    for more in range(min(2 * max(conv.stride) + 6, 40)):
        yield (1, read.channels, *(n + more for n in least))
        yield (2, read.channels, *(n + more + axis % 2 for axis, n in enumerate(least)))
        yield (3, read.channels, *(n + more + (axis + 1) % 2 * 3 for axis, n in enumerate(least)))
    for size in (14, 28, 56):
        yield (1, read.channels, *[max(size, n) for n in least])
    for axis in range(len(least)):
        yield (1, read.channels, *(n + 1 if other != axis else n + 1021 for other, n in enumerate(least)))
    yield (33, read.channels, *(n + 1 for n in least))
    yield (5, read.channels, *(2 * n + 1 for n in sizes))
    if read.shape is not None and math.prod(read.shape) <= _NUMBERS:
        yield read.shape


def _check_special(subject: _Subject, conv: Conv, x: Tensor) -> None:
    """What is not a number must not become one, where it is read."""
    x = x.new_zeros(1, *x.shape[1 : x.dim() - conv.dimensions], *(8 + extent for extent in conv.extent))
    for value in (math.nan, math.inf):
        answer = subject(torch.full_like(x, value))
        reads = conv.weight.flatten(1).any(1)
        hidden = torch.isfinite(answer.movedim(1 if conv.dimensions else -1, 0).flatten(1)).all(1)
        if (hidden & reads).any():
            raise RefutedError("it hides what is not a number")


def _check_precision(subject: _Subject, conv: Conv, x: Tensor) -> None:
    """The module itself, in its own precision, computes the same, and in that precision."""
    given = x.to(subject.dtype)
    actual, expected = subject.in_its_own_precision(given).double(), conv(given.double())
    tolerance = verify.TOLERANCES.get(subject.dtype, 0.0)
    if not (actual - expected).abs().max() <= tolerance * _bounds(conv)(given.double().abs()).max():
        raise RefutedError("it is something else in its own precision")


def _simplest(conv: Conv) -> Operator:
    """A convolution, or the scale of every channel that it is."""
    if conv.groups == conv.in_channels == conv.out_channels and conv.dimensions and conv.is_pointwise:
        return _scale(conv.weight.flatten(), conv.bias, conv.axis)
    return conv


def _scale(scale: Tensor, shift: Tensor | None, axis: int) -> ChannelAffine:
    if shift is None and bool((scale == 1.0).all()):
        return ChannelAffine.uniform(1.0)
    return ChannelAffine(scale, shift, axis)


def _identify_product(subject: _Subject, read: _Read) -> Probed:
    """A matrix product on the last axis."""
    lead = tuple(range(2, 1 + read.rank))
    random = _Random(subject.device)
    x = random((*lead, read.channels))
    zero, plus, minus = subject(torch.zeros_like(x)), subject(x), subject(-2 * x)
    if any(y.shape[:-1] != x.shape[:-1] for y in (zero, plus, minus)):
        raise RefutedError("its output has other axes than its input")
    bias = zero.flatten(0, -2)[0]
    scale = 1e-9 * (plus.abs().max() + zero.abs().max())
    if (zero - bias).abs().max() > 1e-12 * bias.abs().max() or (2 * plus + minus - 3 * zero).abs().max() > scale:
        raise RefutedError("it is not linear")
    subject.check_state(x)
    if read.channels**2 > _NUMBERS:
        raise RefutedError("it is too large to be probed")
    largest = (plus - zero).abs().max().item()
    if not math.isfinite(largest) or largest == 0:
        raise RefutedError("it does not depend on its input")
    amplitude = 2.0 ** max(0, math.ceil(math.log2(1e-300 + bias.abs().max().item() / largest)))
    eye = torch.eye(read.channels, dtype=torch.float64, device=subject.device)
    answer = subject(amplitude * eye.view(-1, *[1] * (read.rank - 2), read.channels))
    weight, shift = _cleaned((answer.flatten(0, -2) - bias).T / amplitude, bias)
    linear = Linear(weight, shift)
    bounds = _bounds(linear)
    _check_decades(subject, linear, x)
    shapes = [tuple((size + axis * step) for axis in range(read.rank - 1)) for size in range(1, 8) for step in (0, 1)]
    shapes += [(1,) * axis + (1021,) + (1,) * (read.rank - 2 - axis) for axis in range(read.rank - 1)]
    if read.shape is not None and math.prod(read.shape) <= _NUMBERS:
        shapes.append(read.shape[:-1])
    for shape in shapes:
        _check(subject, linear, bounds, random((*shape, read.channels)))
    _check_special(subject, linear, x)
    _check_precision(subject, linear, x)
    diagonal = weight.shape[0] == weight.shape[1] and not (weight - weight.diagonal().diag()).any()
    operator = _scale(weight.diagonal(), shift, -1) if diagonal else linear
    return _profitable(subject, operator, x)


def _profitable(subject: _Subject, operator: Operator, x: Tensor) -> Probed:
    """Raise when the operator computes more than the module does and than the kernels are worth that it saves."""
    kernels, multiply_adds = subject.cost(x)
    if isinstance(operator, Conv):
        positions = operator(x).numel() / operator.out_channels
        saved = max(0, kernels - kernels_of(operator))
        if operator.multiply_adds > cost.limit(operator, multiply_adds / positions, saved):
            raise RefutedError("the convolution would compute more")
    return Probed(operator, kernels)

"""Certificates: each rewrite as it happens, and whole models on their inputs.

A rewrite is certified by running what it replaces with torch's own functions, in float64, on random input small
enough to be quick and large enough to reach every border; a right rule agrees to about 1e-13, so 1e-9 leaves no
room for a mistake at an edge. Whole models are compared in their own precision.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.utils._python_dispatch import TorchDispatchMode

from reparam.algebra import AnyConv, ChannelAffine, Conv, ConvTranspose, Operator, Pad
from reparam.errors import VerificationError, first_line
from reparam.report import Comparison

if TYPE_CHECKING:
    from reparam.rewrite import Apply, Graph, Rewrite, Slice

CERTIFICATE_TOLERANCE = 1e-9

# Units in the last place of the largest magnitude on the way by which two orders of adding may differ.
_UNITS = 4

# What rounding may add up to over a whole network, relative to the largest output.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 5e-2, torch.bfloat16: 2e-1} | {
    torch.complex128: 1e-9,
    torch.complex64: 1e-4,
}


# Rewrites.


class Uncertifiable(Exception):
    """A rewrite cannot be run by itself: nothing shows the shapes of what it reads."""


def certify(graph: Graph, rewrite: Rewrite, where: str, rule: str) -> float:
    """Check that a rewrite computes what it replaces.

    Returns:
        The largest relative error.

    Raises:
        VerificationError: It does not, by more than 1e-9 of the largest magnitude, or the two cannot even be run.
    """
    try:
        return _certify(graph, rewrite, where, rule)
    except (VerificationError, Uncertifiable):
        raise
    except Exception as error:
        raise VerificationError(
            f"{rule} at {where or 'the model'} cannot be certified ({error}); this is a defect of the rule, "
            "please report it"
        ) from error


def _certify(graph: Graph, rewrite: Rewrite, where: str, rule: str) -> float:
    from reparam.rewrite import Add, Slice, applies

    if rewrite.outputs:
        return _certify_together(graph, rewrite, where, rule)
    largest = 0.0
    for apply in applies(rewrite):
        for x in random_inputs(apply.operator, apply.source):
            terms = _evaluate_terms(graph, apply, x)
            actual = apply.operator.double()(x) if isinstance(apply.operator, AnyConv) else apply.operator(x)
            largest = max(largest, _check(actual, terms, where, rule))
    for node, value in rewrite.values:
        if isinstance(value, Slice):
            largest = max(largest, _check_slice(graph, node, value, where, rule))
            continue
        total = value if isinstance(value, Add) else Add(((1.0, value),))
        largest = max(largest, _check_addition(graph, node, total, where, rule))
    return largest


def _certify_together(graph: Graph, rewrite: Rewrite, where: str, rule: str) -> float:
    """Compare the outputs of a rewrite before and after, on random values of all that is read from outside."""
    largest = 0.0
    changed = dict(rewrite.values)
    for env in _environments(graph, rewrite):
        for node in rewrite.outputs:
            try:
                expected = evaluate(graph, node, dict(env))
            except Exception as error:
                raise Uncertifiable(
                    f"the shapes on the way are not known ({first_line(error)}); pass example_inputs"
                ) from error
            actual = evaluate(graph, node, dict(env), changed)
            largest = max(largest, _check(actual, [expected], where, rule))
    return largest


def _environments(graph: Graph, rewrite: Rewrite) -> Iterator[dict[Node, Any]]:
    """Random values for what a rewrite reads: of the shapes of an example, or of small ones when one value is read."""
    from reparam.rewrite import applies

    within = {node for node, _ in rewrite.values} | set(rewrite.through)
    outside = {
        source: None for node in within for source in node.all_input_nodes if source not in within
    }  # in a fixed order
    read = sorted(node for node in outside if node.op != "get_attr")
    generator = _generator()
    if all("example" in node.meta for node in read):
        yield {node: _like_example(node.meta["example"], generator) for node in read}
        return
    sources = {apply.source: apply.operator for apply in applies(rewrite)}
    tensors = [node for node in read if node.meta.get("kind") != "other"]
    if len(tensors) > 1 and len(sources) == 1:
        # What else is read may be made of that alone: queries and keys of the same projection.
        tensors = list(sources)
    if len(tensors) != 1:
        raise Uncertifiable("the shapes of what it reads are not known; pass example_inputs")
    # The norm itself, when the operators that take it in read something that it passed; any sizes will do for views.
    replaced = [graph.op(node) for node, _ in rewrite.values if tensors[0] in node.all_input_nodes]
    operators = [sources.get(tensors[0]), *replaced]
    operator = next((found for found in operators if isinstance(found, Operator)), Pad(()))
    for x in random_inputs(operator, tensors[0]):
        yield {tensors[0]: x}


def _like_example(example: Any, generator: torch.Generator) -> Any:
    if isinstance(example, torch.Size):
        return torch.randn(example, dtype=torch.float64, generator=generator)
    return example


def _generator() -> torch.Generator:
    """The same random numbers for every certificate: compilation is deterministic."""
    return torch.Generator().manual_seed(0)


def _evaluate_terms(graph: Graph, apply: Apply, x: Tensor) -> list[Tensor]:
    env: dict[Node, Any] = {apply.source: x}
    return [coefficient * evaluate(graph, term, env) for coefficient, term in apply.terms]


def _check_addition(graph: Graph, node: Node, value: Any, where: str, rule: str) -> float:
    """The sum itself, over random values in place of its terms."""
    leaves = [
        pair
        for coefficient, term in value.terms
        for pair in ([(coefficient, term)] if isinstance(term, Node) else [(coefficient * c, t) for c, t in term.terms])
    ]
    generator = _generator()
    operator = graph.op(node)
    # torch reflects and replicates the last axes of batches only.
    usual = len(operator.padding) + 2 if isinstance(operator, Pad) else 4
    shape = (2, 3, 4, 5, 6)[: node.meta.get("rank") or usual]
    env: dict[Node, Any] = {}
    for _, leaf in leaves:
        env.setdefault(leaf, torch.randn(shape, dtype=torch.float64, generator=generator))
    terms = [coefficient * env[leaf] for coefficient, leaf in leaves]
    return _check(evaluate(graph, node, dict(env)), terms, where, rule)


def _check_slice(graph: Graph, node: Node, value: Slice, where: str, rule: str) -> float:
    """Some channels of an operator, against the node that they stand for."""
    largest = 0.0
    operator = value.whole.operator
    assert isinstance(operator, AnyConv)
    for x in random_inputs(operator, value.whole.source):
        actual = operator.double()(x).narrow(value.axis, value.start, value.length)
        largest = max(largest, _check(actual, [evaluate(graph, node, {value.whole.source: x})], where, rule))
    return largest


def _check(actual: Tensor, terms: Sequence[Tensor], where: str, rule: str) -> float:
    """Compare a value with the sum that it should be, relative to the largest term: the sum itself may cancel out."""
    expected = functools.reduce(torch.add, terms)
    largest = max(_magnitude(term) for term in terms)
    if actual.shape != expected.shape:
        raise VerificationError(
            f"{rule} at {where or 'the model'} would change a shape from {tuple(expected.shape)} to "
            f"{tuple(actual.shape)}; this is a defect of the rule, please report it"
        )
    comparison = Comparison(relative_error(expected, actual, largest), CERTIFICATE_TOLERANCE, 1)
    if not comparison.largest_error <= comparison.tolerance:
        raise VerificationError(
            f"{rule} at {where or 'the model'} would change the result ({comparison}); this is a defect of the rule, "
            "please report it",
            comparison,
        )
    return comparison.largest_error


def random_inputs(operator: Operator, source: Node) -> Iterator[Tensor]:
    """Random float64 inputs of small, odd sizes that reach every border, and every phase of a stride."""
    generator = _generator()
    rank = source.meta.get("rank")
    match operator:
        case Conv() if operator.dimensions == 0:
            shapes = [(*(range(2, 2 + (rank or 2) - 1)), operator.in_channels)]
        case Conv():
            least = [
                max(extent + 1 - min(0, pad[0]) - min(0, pad[1]), *pad) + 2 * stride + 1 + axis
                for axis, (extent, pad, stride) in enumerate(
                    zip(operator.extent, operator.padding, operator.stride, strict=True)
                )
            ]
            phases = max(operator.stride)
            shapes = [(1, operator.in_channels, *(size + phase for size in least)) for phase in range(min(phases, 3))]
        case ConvTranspose():
            axes = list(zip(operator.growth, operator.extent, operator.stride, strict=True))
            # One position is enough for the smallest; in the larger one, an output is far from both borders.
            least = [1 + max(0, -(-growth // stride)) for growth, _, stride in axes]
            roomy = [
                n + 2 * (extent // stride + 1) + axis
                for axis, (n, (_, extent, stride)) in enumerate(zip(least, axes, strict=True))
            ]
            shapes = [(1, operator.in_channels, *sizes) for sizes in (least, roomy)]
        case ChannelAffine() if operator.axis is not None:
            rank = max(rank or 0, 1 - operator.axis)
            sizes = list(range(2, 2 + rank))
            sizes[operator.axis] = len(operator.scale)
            shapes = [tuple(sizes)]
        case ChannelAffine():
            # The same everywhere, also because it might be a norm of a single channel.
            shapes = [(2, 1, 3, 4, 5)[: rank or 4]]
        case _:
            shapes = [tuple(range(2, 2 + (rank or 4)))]
    for shape in shapes:
        x = torch.randn(shape, dtype=torch.float64, generator=generator)
        yield x.to(operator.weight.device if isinstance(operator, AnyConv) else _device(operator))


def _device(operator: Operator) -> torch.device:
    return operator.scale.device if isinstance(operator, ChannelAffine) else torch.device("cpu")


def evaluate(graph: Graph, node: Node, env: dict[Node, Any], changed: Mapping[Node, Any] | None = None) -> Any:
    """The value of a node in float64, with torch's own functions, given the values of some earlier nodes.

    ``changed`` has what takes the places of some nodes: another node, or an operator applied to one.
    """
    if node in env:
        return env[node]

    def value(item: Node) -> Any:
        return evaluate(graph, item, env, changed)

    instead = (changed or {}).get(node)
    if isinstance(instead, Node):
        env[node] = value(instead)
        return env[node]
    if instead is not None:
        operator = instead.operator.double() if isinstance(instead.operator, AnyConv) else instead.operator
        env[node] = operator(value(instead.source))
        return env[node]
    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), value)
    match node.op:
        case "placeholder":
            raise LookupError(f"the replacement leaves out what depends on the input {node.target}")
        case "get_attr":
            owner, _, name = str(node.target).rpartition(".")
            result = doubled(getattr(graph.modules[owner], name))
        case "call_module":
            result = InDouble(graph.modules[str(node.target)])(*args, **kwargs)
        case "call_method":
            result = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        case _:
            function: Any = node.target.double() if isinstance(node.target, AnyConv) else node.target
            result = function(*args, **kwargs)
    env[node] = result
    return result


class InDouble:
    """A module's forward with its parameters and buffers in float64."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        if isinstance(module, torch.jit.ScriptModule):
            # Its tensors cannot be exchanged for a call.
            with warnings.catch_warnings():
                # torch asks the copies, which are no leaves, for gradients.
                warnings.simplefilter("ignore")
                self.module = copy.deepcopy(module).double().eval()
        tensors = (*self.module.named_parameters(), *self.module.named_buffers())
        self.tensors = {name: doubled(tensor) for name, tensor in tensors}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output.

        Raises:
            VerificationError: It replaces one of its tensors by another.
        """
        if isinstance(self.module, torch.jit.ScriptModule):
            return self.module(*args, **kwargs)
        tensors = dict(self.tensors)
        result = torch.func.functional_call(self.module, tensors, args, kwargs)
        if any(tensors[name] is not tensor for name, tensor in self.tensors.items()):
            raise VerificationError(f"{type(self.module).__name__} replaces its own tensors")
        return result


def doubled(tensor: Tensor) -> Tensor:
    """The same numbers in float64; integers stay."""
    return tensor.detach().double() if tensor.is_floating_point() else tensor


# Whole models.


def verify(a: nn.Module, b: nn.Module, inputs: Any, *, tolerance: float | None = None) -> Comparison:
    """Run two models on the same inputs and compare everything that they return.

    Both run in eval mode, without gradients, and are left in the mode they were in.

    Args:
        a: The reference.
        b: What must agree with it.
        inputs: A tensor, a tuple of positional arguments, or a dict of keyword arguments.
        tolerance: Largest absolute difference allowed, relative to the largest magnitude in the reference's output.
            Left out: 1e-9 in float64, 1e-4 in float32, 5e-2 in float16, 2e-1 in bfloat16.

    Returns:
        What was measured.

    Raises:
        VerificationError: They disagree by more than the tolerance, or return different structures.
    """
    args, kwargs = as_call(inputs)
    return compare(run(a, args, kwargs), run(b, args, kwargs), tolerance)


def as_call(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Example inputs, as people write them, as arguments of a call."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, (tuple, list)):
        return tuple(inputs), {}
    return (inputs,), {}


def clones(value: Any) -> Any:
    """Arguments on copies of their tensors; what is one tensor twice is one copy twice."""
    made: dict[int, Tensor] = {}

    def clone(x: Tensor) -> Tensor:
        if id(x) not in made:
            made[id(x)] = x.clone()
        return made[id(x)]

    return torch.utils._pytree.tree_map_only(Tensor, clone, value)


def run(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What a model returns in eval mode, on copies of the arguments; its own modes are put back."""
    modes = {module: module.training for module in model.modules()}
    args, kwargs = clones((tuple(args), dict(kwargs)))
    try:
        for module in modes:
            module.training = False
        with torch.no_grad():
            return model(*args, **kwargs)
    finally:
        for module, training in modes.items():
            module.training = training


def compare(expected: Any, actual: Any, tolerance: float | None = None, *, scale: float = 0.0) -> Comparison:
    """Compare two outputs of any structure.

    Args:
        expected: The reference.
        actual: What must agree with it.
        tolerance: Allowed largest difference, relative to the largest magnitude in a reference tensor; that of its
            type when left out.
        scale: Largest magnitude on the way to the outputs, where known. Terms that cancel leave their rounding behind,
            and another one in every order: a few units in the last place of this magnitude are no difference.

    Raises:
        VerificationError: They disagree.
    """
    reference, structure = torch.utils._pytree.tree_flatten(_plain(expected))
    result, other = torch.utils._pytree.tree_flatten(_plain(actual))
    if structure != other:
        raise VerificationError(f"the models return different structures: {structure} and {other}")
    largest, allowed, tensors = 0.0, tolerance or 0.0, 0
    for x, y in zip(reference, result, strict=True):
        if not isinstance(x, Tensor) or not isinstance(y, Tensor):
            if type(x) is not type(y) or x != y:
                raise VerificationError(f"the models return different values: {x!r} and {y!r}")
            continue
        if x.shape != y.shape or x.dtype != y.dtype:
            raise VerificationError(
                f"the models return different tensors: {tuple(x.shape)} of {x.dtype} and {tuple(y.shape)} of {y.dtype}"
            )
        tensors += 1
        if not _is_rounding(x, y, scale):
            largest = max(largest, relative_error(x, y))
        if tolerance is None:
            allowed = max(allowed, TOLERANCES.get(x.dtype, 0.0))
    comparison = Comparison(largest, allowed, tensors)
    if not largest <= allowed:
        raise VerificationError(f"the models disagree: {comparison}", comparison)
    return comparison


def _plain(value: Any) -> Any:
    """A graph returns a plain dict where a model may have returned a subclass of one."""
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        items = [_plain(item) for item in value]
        return items if isinstance(value, list) else tuple(items)
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if callable(value) and not isinstance(value, nn.Module):
        return getattr(value, "__qualname__", type(value).__qualname__)  # two copies of a function are equal
    if hasattr(value, "__dict__") and not isinstance(value, (Tensor, nn.Module, type)):
        return {name: _plain(item) for name, item in vars(value).items()}
    return value


def _is_rounding(x: Tensor, y: Tensor, scale: float) -> bool:
    """Whether two tensors differ by no more than what rounding leaves of terms of some magnitude."""
    if not scale or not x.is_floating_point() or not x.numel():
        return False
    return float((x - y.to(x.device)).abs().max()) <= _UNITS * torch.finfo(x.dtype).eps * scale


class LargestMagnitude(TorchDispatchMode):
    """Notes the largest magnitude that any operation returns.

    Attributes:
        value: That magnitude so far.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.value = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.numel():
                self.value = max(self.value, _magnitude(tensor))
        return result


def _magnitude(tensor: Tensor) -> float:
    finite = torch.isfinite(tensor)
    return tensor[finite].abs().max().item() if finite.any() else 0.0


def relative_error(reference: Tensor, result: Tensor, magnitude: float = 0.0) -> float:
    """Largest absolute difference over the largest magnitude, or a given larger one; nan or inf must match in place."""
    if reference.numel() == 0:
        return 0.0
    x, y = reference.detach(), result.detach().to(reference.device)
    if x.is_complex():
        x, y = torch.view_as_real(x.resolve_conj()), torch.view_as_real(y.resolve_conj())
    x, y = x.double(), y.double()
    finite = torch.isfinite(x)
    if not torch.equal(finite, torch.isfinite(y)) or not torch.equal(x[~finite].nan_to_num(), y[~finite].nan_to_num()):
        return float("inf")
    if not finite.any():
        return 0.0
    scale = max(magnitude, _magnitude(x))
    difference = (x[finite] - y[finite]).abs().max().item()
    return difference / scale if scale > 0 else (0.0 if difference == 0 else float("inf"))

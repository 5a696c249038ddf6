"""Counts of what a graph launches: one counter, for the driver, the report and the page.

A kernel is an operation that makes new memory. A view launches none. Whether a reshape copies depends on how its input
lies in memory: it is taken to copy what was permuted, unless all axes that it merges lie one behind the other; what any
kernel has made is taken to be in order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
import torch.fx
import torch.nn.functional as F
from torch import nn
from torch.fx import Graph, Node
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from reparam.algebra import ChannelAffine, Conv, ConvTranspose, Operator
from reparam.graph import facts, names, views
from reparam.graph.affine import Affine
from reparam.graph.outputs import Rebuild
from reparam.modes import below
from reparam.report import Counts

_FREE_FUNCTIONS = names.DROPOUTS | names.row("getitem getattr type_as float _assert assert_is_none")
_RESHAPES = names.row("reshape reshape_as flatten ravel contiguous")
_PERMUTATIONS = names.PERMUTATIONS | names.row("movedim moveaxis")

# Kind of kernel of one call: a field of Counts, "other" for the rest, or None when nothing is launched.
Kinds: TypeAlias = "list[str]"
_KINDS = ("convolutions", "linears", "norms", "elementwise", "other")


def counts(kinds: Kinds, parameters: int, multiply_adds: int | None = None) -> Counts:
    """The kernels of one forward pass, by kind.

    Args:
        kinds: The kind of each.
        parameters: Number of parameters, to be passed on. Likewise ``multiply_adds``.
    """
    totals = {kind: kinds.count(kind) for kind in _KINDS if kind != "other"}
    return Counts(**totals, kernels=len(kinds), parameters=parameters, multiply_adds=multiply_adds)


def kinds_of(node: Node, modules: Mapping[str, Any], replaced: Mapping[nn.Module, Kinds] | None = None) -> list[str]:
    """What kinds of kernel a node launches, each as a field of Counts, or "other" for the rest.

    Args:
        node: A node of a graph.
        modules: The module for every target of a ``call_module`` node.
        replaced: As for :func:`kinds_inside`.
    """
    if isinstance(node.target, Operator):
        return _kinds_of_operator(node.target)
    if _reshapes(node, modules):
        return ["other"] if _copies(node, modules) else []
    if node.op == "call_module":
        module = modules[str(node.target)]
        kinds = kinds_inside(module, {} if replaced is None else replaced)
        known = type(module).__module__.startswith("torch.nn.") or isinstance(module, (Affine, Rebuild))
        return kinds if kinds or known else ["other"]
    if node.op not in ("call_function", "call_method") or facts.reads_only_metadata(node):
        return []
    name = facts.target_name(node)
    if name == "getitem" and _gathers(node.args[1]):
        return ["other"]
    if name in names.CONVOLUTIONS:
        return ["convolutions"]
    if name == "linear":
        return ["linears"]
    if name in names.NORMS:
        return ["norms"]
    if name in names.ARITHMETIC:
        return ["elementwise"] if facts.of(node).kind != "other" else []
    is_free = (
        name in _FREE_FUNCTIONS
        or (names.is_view(name) and node.target is not F.unfold)
        or facts.of(node).kind == "other"
    )
    return [] if is_free else ["other"]


def _kinds_of_operator(operator: Operator) -> Kinds:
    match operator:
        case Conv() | ConvTranspose():
            return ["convolutions" if operator.dimensions else "linears"] + ["other"] * (operator.kernels - 1)
        case ChannelAffine():
            return ["elementwise"]
    return ["other"] * operator.kernels


def _reshapes(node: Node, modules: Mapping[str, Any]) -> bool:
    """Whether a node is a view of its input, or a copy, depending on how that lies in memory."""
    if node.op == "call_module":
        return type(modules[str(node.target)]) is nn.Flatten
    return facts.target_name(node) in _RESHAPES and facts.of(node).kind != "other"


def _gathers(index: Any) -> bool:
    """Whether an index picks by the values of a tensor or list, instead of cutting out."""
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(part, list) or (isinstance(part, Node) and facts.of(part).kind == "tensor") for part in parts)


def _copies(node: Node, modules: Mapping[str, Any]) -> bool:
    """Whether a reshape has to copy, as far as the views before it show."""
    name, rank = facts.target_name(node), facts.of(node).rank
    source = node.args[0]
    start = facts.Arguments(node).get(1, "start_dim", 0) if name == "flatten" else None
    known = facts.of(source).rank if isinstance(source, Node) else None
    if start is not None and (start == -1 or (known or rank) == start + 1):
        return False  # of a single axis
    order = _order(source, modules)
    if order is None:
        return True
    if order == sorted(order):
        return False
    moved = views.axes(node)
    if moved is None or name == "contiguous":
        return True
    if moved.merged is None:
        return None in moved.to and moved.unmerged is None
    first, last, _ = moved.merged
    return order[first : last + 1] != list(range(order[first], order[first] + last + 1 - first))


def _order(value: Any, modules: Mapping[str, Any]) -> list[int] | None:
    """The axes of a value in the order in which they lie in memory; empty when they are in order, None if unknown."""
    name = facts.target_name(value) if isinstance(value, Node) else ""
    if not name or facts.of(value).kind == "other" or kinds_of(value, modules):
        return []
    before, moved = _order(value.args[0], modules), views.axes(value)
    if name in _PERMUTATIONS and moved is not None and before is not None:
        return [before[axis] if before else axis for axis in map(moved.to.index, range(moved.out_rank))]
    mixes = name in _PERMUTATIONS or name in ("expand", "expand_as", "getattr")
    return None if mixes or before != [] else []


def kinds_inside(module: nn.Module, replaced: Mapping[nn.Module, Kinds]) -> list[str]:
    """What a module launches, as far as its layers, and the graphs in it, show.

    Args:
        module: Any module; one that is used several times counts once.
        replaced: What is known of some modules in it.
    """
    kinds: list[str] = []
    seen: set[nn.Module] = set()
    pending = [module]
    while pending:
        inner = pending.pop()
        if inner in seen:
            continue
        seen.add(inner)
        if inner in replaced:
            kinds += replaced[inner]
        elif isinstance(graph := getattr(inner.__dict__.get("forward"), "compiled", inner), torch.fx.GraphModule):
            kinds += kinds_of_graph(graph.graph, dict(graph.named_modules()), replaced)
        else:
            kind = module_kind(inner)
            kinds += [kind] if kind else []
            pending.extend(inner.children())
    return kinds


def kinds_of_graph(
    graph: Graph, modules: Mapping[str, Any], replaced: Mapping[nn.Module, Kinds] | None = None
) -> Kinds:
    """What a graph launches; arguments as for :func:`kinds_of`."""
    return [kind for node in graph.nodes for kind in kinds_of(node, modules, replaced)]


def module_kind(module: nn.Module) -> str | None:
    """What kind of kernel a torch.nn layer launches, None when it launches none."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return "convolutions"
    if isinstance(module, nn.Linear):
        return "linears"
    if isinstance(module, names.NORM_LAYERS):
        return "norms"
    if isinstance(module, Affine):
        return "elementwise"
    is_layer = type(module).__module__.startswith("torch.nn.") and not list(module.children())
    return (
        "other"
        if is_layer and not isinstance(module, (*names.VIEW_LAYERS, Rebuild, nn.Sequential, nn.ModuleList))
        else None
    )


def parameters_of(model: nn.Module) -> int:
    """Numbers in a model's parameters; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def multiply_adds_of(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """Multiply-adds of the convolutions and matrix products in one call."""
    counter = _MultiplyAdds()
    with below(counter), torch.no_grad():
        model(*args, **kwargs)
    return counter.total


class _MultiplyAdds(TorchDispatchMode):
    """torch's own formulas, without its bookkeeping by module, which takes far longer than the model itself."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.total += int(formula(*args, **(kwargs or {}), out_val=result)) // 2
        return result

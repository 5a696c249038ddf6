"""Counts of what a graph launches."""

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

from reparam.graph import facts, names
from reparam.graph.affine import Affine
from reparam.graph.outputs import Rebuild
from reparam.modes import below
from reparam.report import Counts

_FREE_FUNCTIONS = names.DROPOUTS | names.row("getitem getattr type_as float _assert assert_is_none")

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
    if node.op == "call_module":
        module = modules[str(node.target)]
        kinds = kinds_inside(module, {} if replaced is None else replaced)
        known = type(module).__module__.startswith("torch.nn.") or isinstance(module, (Affine, Rebuild))
        return kinds if kinds or known else ["other"]
    if node.op not in ("call_function", "call_method") or facts.reads_only_metadata(node):
        return []
    name = facts.target_name(node)
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

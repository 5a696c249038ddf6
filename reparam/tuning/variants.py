"""The same graph, run differently: how feature maps lie in memory, and how layers are called.

Neither changes what is computed, which model gains by which differs from machine to machine, and
:mod:`reparam.tuning.latency` measures it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from reparam.graph import aliasing, facts
from reparam.tuning.prepared import activation_of, can_be_prepared, prepared


@dataclass(frozen=True)
class Variant:
    """How a graph is run.

    Attributes:
        channels_last: Whether the channels of a pixel lie side by side in memory, instead of the pixels of a channel.
        prepared: Whether layers that can be are :class:`reparam.prepared.Prepared`.
    """

    channels_last: bool = False
    prepared: bool = False

    def __str__(self) -> str:
        layout = "channels_last" if self.channels_last else "contiguous"
        return f"{layout}, prepared layers" if self.prepared else layout

    @property
    def memory_format(self) -> torch.memory_format:
        """Of feature maps and kernels."""
        return torch.channels_last if self.channels_last else torch.contiguous_format


def possible(model: nn.Module) -> list[Variant]:
    """The ways to run a model that differ for it, the plain one first."""
    found = [Variant()]
    if not isinstance(model, GraphModule):
        return found
    layers = list(model.modules())
    if any(isinstance(layer, nn.Conv2d) and layer.weight.dim() == 4 for layer in layers) and _owns_its_values(model):
        found.append(Variant(channels_last=True))
    if any(map(can_be_prepared, layers)):
        found += [Variant(variant.channels_last, prepared=True) for variant in found]
    return found


def _owns_its_values(model: GraphModule) -> bool:
    """Whether a copy of the inputs may take their place: nobody writes to them, nor returns them."""
    modules = dict(model.named_modules())
    return not aliasing.writes_to_inputs(model.graph, modules) and not aliasing.inputs_in_outputs(model.graph, modules)


def apply(variant: Variant, model: GraphModule, shapes: Mapping[str, torch.Size]) -> tuple[Graph, dict[str, Any]]:
    """The graph of a model, and the modules and tensors that it reads, to be run as a variant.

    Args:
        variant: How to run it.
        model: Not changed. Layers that need not change are shared with the result, and so are tensors.
        shapes: Shape of every input that is a floating-point tensor, by its name.

    Returns:
        What a graph module of the same class is made of.
    """
    graph = Graph()
    graph.output(graph.graph_copy(model.graph, {}))
    graph._codegen = model.graph._codegen
    used = {str(node.target): _lookup(model, str(node.target)) for node in graph.nodes if _has_name(node)}
    if variant.prepared:
        _prepare(graph, used)
    if variant.channels_last:
        _lay_out(graph, used, shapes)
    return graph, used


def layer(variant: Variant, made: nn.Module) -> nn.Module:
    """A layer as a variant would have it, without the activation behind it."""
    if variant.prepared:
        made = prepared(made) or made
    return _with_channels_last(made) if variant.channels_last else made


def _has_name(node: Node) -> bool:
    return node.op in ("call_module", "get_attr")


def _lookup(model: nn.Module, path: str) -> Any:
    owner, _, name = path.rpartition(".")
    return getattr(model.get_submodule(owner), name)


def _prepare(graph: Graph, used: dict[str, Any]) -> None:
    """Exchange layers for prepared ones, which take in the activation that alone reads them."""
    calls: dict[str, list[Node]] = {}
    for node in graph.nodes:
        if node.op == "call_module" and can_be_prepared(used[str(node.target)]):
            calls.setdefault(str(node.target), []).append(node)
    for path, nodes in calls.items():
        readers = [next(iter(node.users)) if len(node.users) == 1 else None for node in nodes]
        names = {None if reader is None else _activation(reader, used) for reader in readers}
        activation = names.pop() if len(names) == 1 else None
        used[path] = prepared(used[path], activation or "")
        if activation:
            for node, reader in zip(nodes, readers, strict=True):
                assert reader is not None
                reader.replace_all_uses_with(node)
                graph.erase_node(reader)
    for path in used.keys() - {str(node.target) for node in graph.nodes if _has_name(node)}:
        del used[path]


def _activation(node: Node, used: Mapping[str, Any]) -> str | None:
    return activation_of(node, used[str(node.target)] if node.op == "call_module" else None)


def _lay_out(graph: Graph, used: dict[str, Any], shapes: Mapping[str, torch.Size]) -> None:
    """Lay out images and kernels with the channels last, and let no view rely on where numbers lie."""
    for path, value in used.items():
        if isinstance(value, nn.Module):
            used[path] = _with_channels_last(value)
    for node in list(graph.nodes):
        if node.op == "placeholder" and len(shapes.get(str(node.target), ())) == 4:
            with graph.inserting_after(node):
                image = graph.call_method("contiguous", (node,), {"memory_format": torch.channels_last})
            image.meta = dict(node.meta)
            node.replace_all_uses_with(image, delete_user_cb=lambda user, image=image: user is not image)
        elif node.op == "call_method" and node.target in ("view", "view_as") and facts.of(node).frozen is None:
            node.target = str(node.target).replace("view", "reshape")


def _with_channels_last(layer: nn.Module) -> nn.Module:
    """A layer whose kernel lies with the channels last; the same one where it has none."""
    weight = getattr(layer, "weight", None)
    if not isinstance(layer, nn.Conv2d | nn.ConvTranspose2d) or not isinstance(weight, Tensor):
        return layer
    made = type(layer).__new__(type(layer))
    made.__dict__.update(layer.__dict__)
    made._parameters = dict(layer._parameters)
    kernel = weight.detach().contiguous(memory_format=torch.channels_last)
    made._parameters["weight"] = nn.Parameter(kernel, requires_grad=weight.requires_grad)
    return made

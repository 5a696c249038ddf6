"""``torch.compile(model, backend="reparam")``: fuse what Dynamo captured, and hand it on to another backend.

Dynamo reads any Python, in pieces: each graph between two breaks is compiled on its own. Parameters and buffers come as
inputs of these graphs and are frozen here. The result watches them: where one was changed in place or replaced, the
graph runs as Dynamo captured it, so it is never out of date. (Writing through ``tensor.data`` cannot be noticed.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from reparam import capture as capturing
from reparam.capture.folding import fold
from reparam.compiler import compile_captured
from reparam.errors import ReparamError
from reparam.graph import facts


def backend(
    graph: torch.fx.GraphModule, example_inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """A backend for ``torch.compile``, for inference.

    Graphs whose parameters need gradients are handed on as they are; run under ``torch.no_grad()``, or freeze them.

    Args:
        graph: What Dynamo captured.
        example_inputs: Its inputs, parameters and buffers among them.
        options: ``then``: the backend that gets the fused graph, by name; ``inductor`` when left out.

    Returns:
        A function with the inputs and outputs of the graph.

    Raises:
        ReparamError: There is an option that is not known.
    """
    unknown = set(options or {}) - {"then"}
    if unknown:
        raise ReparamError(f"the backend 'reparam' knows the option 'then' only, not {', '.join(sorted(unknown))}")
    following = torch._dynamo.lookup_backend((options or {}).get("then", "inductor"))
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    constants = {
        position: value
        for position, (node, value) in enumerate(zip(placeholders, example_inputs, strict=True))
        if isinstance(value, Tensor) and _is_static(node, value)
    }
    if not constants or (torch.is_grad_enabled() and any(value.requires_grad for value in constants.values())):
        return _handed_on(following, graph, example_inputs)
    fused = compile_captured(_captured(graph, placeholders, constants))
    rest = [position for position in range(len(placeholders)) if position not in constants]
    fast = following(fused, [example_inputs[position] for position in rest])
    watched = [(position, value, value._version) for position, value in constants.items()]
    slow: list[Callable[..., Any]] = []

    def run(*inputs: Any) -> Any:
        if all(inputs[position] is value and value._version == version for position, value, version in watched):
            return fast(*(inputs[position] for position in rest))
        if not slow:
            slow.append(_handed_on(following, graph, inputs))
        return slow[0](*inputs)

    return run


def _handed_on(following: Any, graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    function: Callable[..., Any] = following(graph, list(inputs))
    return function


def _is_static(node: torch.fx.Node, value: Tensor) -> bool:
    """Whether an input is a parameter or a buffer of the model."""
    return isinstance(value, nn.Parameter) or getattr(value, "_dynamo_static_input_type", None) is not None


def _captured(
    graph: torch.fx.GraphModule, placeholders: Sequence[torch.fx.Node], constants: Mapping[int, Tensor]
) -> capturing.Capture:
    """Dynamo's graph with its parameters as constants."""
    root = capturing.private_copy(graph)
    copied = torch.fx.Graph()
    values: dict[torch.fx.Node, torch.fx.Node] = {}
    given = {placeholders[position]: value for position, value in constants.items()}
    for node in graph.graph.nodes:
        if node in given:
            path = f"_{node.name.lower()}"
            root.register_buffer(path, given[node].detach())
            values[node] = made = copied.get_attr(path)
        else:
            values[node] = made = copied.node_copy(node, values.__getitem__)
        value = node.meta.get("example_value")
        made.meta = {}
        if isinstance(value, Tensor):
            facts.know(made, rank=value.dim(), kind="tensor", dtype=value.dtype)
            facts.know(made, floating=value.is_floating_point())
            if all(type(size) is int for size in value.shape):
                facts.know(made, shape=tuple(value.shape))
        elif value is not None:
            facts.know(made, kind="unknown" if isinstance(value, (tuple, list, dict)) else "other")
        facts.note(made, root.get_submodule(str(made.target)) if made.op == "call_module" else None)
    modules = dict(root.named_modules())
    storages = capturing.tensor_storages(modules.values())
    fold(copied, root, modules, storages)
    return capturing.Capture(root, copied, modules, storages)

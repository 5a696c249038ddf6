"""In-place operations made safe, before anything moves.

``x.relu_()`` changes ``x`` for everybody who reads it afterwards, under whatever name. Rewriting assumes values, so
every in-place operation becomes its out-of-place twin, and later readers of the value read the twin. That is right
when nobody reads the same memory under another name later: as a view of it, or as the tensor that it is a view of.
Where somebody does, everything that touches the memory is frozen and runs as it was written.

When the graph is final, activations are put in place wherever nobody can see it, for less memory has to be written.
"""

from __future__ import annotations

import copy
import inspect
import operator
from collections.abc import Iterable, Mapping, MutableMapping
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch._ops import OpOverload
from torch.fx import Graph, Node

from reparam.algebra import ChannelAffine, Operator
from reparam.graph import facts, names
from reparam.graph.leaves import carries_hooks, is_leaf

_OPERATORS = {
    getattr(operator, f"i{name}"): getattr(operator, name)
    for name in ("add", "sub", "mul", "truediv", "floordiv", "pow", "mod", "lshift", "rshift")
} | {operator.iand: operator.and_, operator.ior: operator.or_, operator.ixor: operator.xor}

# Why what the user has left out stays.
OUTSIDE = "it is outside of what where= selects"
_FROZEN = "its memory is changed in place under another name"

# Activations of one value that keep its type; gradients in place are those out of place.
_ACTIVATIONS = frozenset("relu relu6 gelu silu hardswish hardsigmoid mish".split())
GELU_ = torch._C._nn.gelu_  # type: ignore[attr-defined]  # without a name in torch.nn.functional
_OVERWRITING: dict[Any, Any] = {torch.relu: torch.relu_, F.gelu: GELU_}

# What makes new memory and does not need to keep it for its gradient, beside layers.
_FRESH = frozenset("add sub mul truediv iadd isub imul itruediv matmul".split())


def make_out_of_place(graph: Graph, modules: MutableMapping[str, nn.Module]) -> list[Node]:
    """Replace in-place operations by their twins, and freeze what cannot be.

    A node that :class:`Facts` says is frozen is not lifted. A node that was in place and no longer is has
    ``in_place`` there, what it called, so that it may be made so again when the graph is final.

    Args:
        graph: A traced graph, changed here.
        modules: The modules of its private root, by path; others take the places of layers with ``inplace=True`` here.

    Returns:
        The in-place nodes that were frozen.
    """
    order = {node: position for position, node in enumerate(graph.nodes)}
    # What memory a value may lie in, named by the nodes that made it, and who lies in it so far.
    memory: dict[Node, set[Node]] = {}
    residents: dict[Node, list[Node]] = {}
    settled: set[Node] = set()
    frozen: list[Node] = []
    touched: list[tuple[Node, set[Node]]] = []
    # A layer that is called twice is in place in both calls, also once the first has been made safe.
    writes = {node for node in graph.nodes if is_in_place(node, modules)}
    live = _live(graph, modules, writes)
    for node in graph.nodes:
        # Asked for only now: an earlier write may have put its own result in the place of what this one changes.
        changed = _changed(node) if node in writes else None
        if changed is not None:
            neighbours = {other for base in memory[changed] for other in residents[base]}
            same = _same_tensor(changed, modules)
            later = [
                reader
                for other in neighbours - same
                for reader in other.users
                if reader in live and order[reader] > order[node]
            ]
            target = node.target
            if not later and not _converts(node) and _take_out_of_place(node, modules):
                facts.know(node, in_place=target)
                settled.add(node)
                for other in same:
                    for reader in [reader for reader in other.users if order[reader] > order[node]]:
                        reader.replace_input_with(other, node)
            else:
                frozen.append(node)
                touched.append((node, neighbours))
        sources = _shared(node, modules) if node not in settled else []
        memory[node] = set().union(*(memory[source] for source in sources)) or {node}
        for base in memory[node]:
            residents.setdefault(base, []).append(node)
    _freeze(touched, memory, order, modules)
    _keep_in_place(frozen, modules)
    return frozen


def _freeze(
    touched: Iterable[tuple[Node, set[Node]]],
    memory: Mapping[Node, set[Node]],
    order: Mapping[Node, int],
    modules: Mapping[str, nn.Module],
) -> None:
    """Freeze what lies in memory that is written to, and who reads it before the last write."""
    last: dict[Node, int] = {}
    for write, neighbours in touched:
        for base in set().union(*(memory[other] for other in neighbours)):
            last[base] = max(last.get(base, 0), order[write])
    for _, neighbours in touched:
        for other in neighbours:
            facts.know(other, frozen=_FROZEN)
            settled = max(last[base] for base in memory[other])
            for reader in other.users:
                if order[reader] <= settled or _may_alias(reader, modules):
                    facts.know(reader, frozen=_FROZEN)


def memory(graph: Graph, modules: Mapping[str, nn.Module]) -> dict[Node, set[Node]]:
    """For every value, the nodes that may have made the memory that it lies in."""
    homes: dict[Node, set[Node]] = {}
    for node in graph.nodes:
        sources = node.all_input_nodes if node.op == "output" else _shared(node, modules)
        homes[node] = set().union(*(homes[source] for source in sources)) or {node}
    return homes


def _shared(node: Node, modules: Mapping[str, nn.Module]) -> list[Node]:
    """The values that the value of a node may share memory with."""
    if node.op != "call_module" and (changed := written(node, modules)) is not None:
        return [changed]
    return node.all_input_nodes if _may_alias(node, modules) else []


def behind(values: Iterable[Node], modules: Mapping[str, nn.Module]) -> set[Node]:
    """Some values, and all that may lie in their memory because they were made of them."""
    found, pending = set(values), list(values)
    while pending:
        value = pending.pop()
        new = {reader for reader in value.users if reader not in found and value in _shared(reader, modules)}
        found |= new
        pending += new
    return found


def sharing(value: Node, modules: Mapping[str, nn.Module]) -> set[Node]:
    """All values that may lie in the same memory as ``value``, which is one of them; a caller may pass one twice."""
    found, pending = {value}, [value]
    while pending:
        new = set(_shared(pending.pop(), modules)) - found
        found |= new
        pending += new
    if any(base.op == "placeholder" for base in found):
        found.update(node for node in value.graph.nodes if node.op == "placeholder")
    return behind(found, modules)


def is_view_of(node: Node, value: Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether ``node`` is certain to lie in the memory of ``value`` as that does, whatever it is."""
    while node is not value:
        if not (_returns_argument(node, modules) or facts.target_name(node) in names.VIEWS) or not node.args:
            return False
        node = node.args[0]  # type: ignore[assignment]
    return True


def writes_to_inputs(graph: Graph, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a call may change the tensors that it is given."""
    homes = memory(graph, modules)
    changed = [value for node in graph.nodes if (value := written(node, modules)) is not None]
    return any(base.op == "placeholder" for value in changed for base in homes[value])


def inputs_in_outputs(graph: Graph, modules: Mapping[str, nn.Module]) -> set[str]:
    """Names of the inputs that may share memory with an output, so that writing to one changes the other."""
    homes = memory(graph, modules)
    output = next(node for node in reversed(graph.nodes) if node.op == "output")
    return {str(base.target) for base in homes[output] if base.op == "placeholder"}


def _live(graph: Graph, modules: Mapping[str, nn.Module], writes: set[Node]) -> set[Node]:
    """Nodes that the output depends on, or that may do more than return a value.

    What is written counts when somebody that counts reads the memory later, under any name.
    """
    homes = memory(graph, modules)
    live: set[Node] = set()
    read: set[Node] = set()
    for node in reversed(graph.nodes):
        if node.op == "call_module":
            module = modules[str(node.target)]
            counts = not is_leaf(module) or carries_hooks(module)
        elif node in writes:
            counts = False
        else:
            counts = node.op not in ("call_function", "call_method", "get_attr") or node.is_impure()
        changed = _changed(node) if node in writes else None
        if changed is not None:
            counts = counts or not read.isdisjoint(homes[changed])
        if counts or not live.isdisjoint(node.users):
            live.add(node)
            read.update(*(homes[source] for source in node.all_input_nodes))
    return live


def _keep_in_place(frozen: Iterable[Node], modules: MutableMapping[str, nn.Module]) -> None:
    """Give calls that have to stay in place a layer of their own, where another call made theirs out-of-place."""
    for node in frozen:
        if node.op == "call_module" and not getattr(modules[str(node.target)], "inplace", True):
            path = f"{node.target}_in_place"
            modules[path] = modules[str(node.target)]
            _set_in_place(path, modules, True)
            node.target = path


def _set_in_place(path: str, modules: MutableMapping[str, nn.Module], value: bool) -> None:
    """Put a layer that is in place, or not, where another was: Python that is in no graph may call that one."""
    modules[path] = copy.copy(modules[path])
    modules[path].inplace = value  # type: ignore[assignment]


def written(node: Node, modules: Mapping[str, nn.Module]) -> Node | None:
    """The value that a node changes in place."""
    return _changed(node) if is_in_place(node, modules) else None


def _changed(node: Node) -> Node | None:
    """What an in-place node changes."""
    if isinstance(node.target, OpOverload):
        return next(iter(_arguments_written(node, node.target)), None)
    out = node.kwargs.get("out")
    changed = out if out is not None else node.args[0] if node.args else node.kwargs.get("input")
    return changed if isinstance(changed, Node) else None


def _arguments_written(node: Node, operator: OpOverload) -> list[Node]:
    """The values that an operator of torch's, or of a library's, says that it writes to."""
    arguments = operator._schema.arguments
    given = {argument.name: value for argument, value in zip(arguments, node.args, strict=False)} | node.kwargs
    names = [argument.name for argument in arguments if argument.alias_info and argument.alias_info.is_write]
    return [value for name in names if isinstance(value := given.get(name), Node)]


def is_in_place(node: Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a node changes its first input."""
    match node.op:
        case "call_module":
            return bool(getattr(modules[str(node.target)], "inplace", False))
        case "call_method":
            name = str(node.target)
            return name.endswith("_") and not name.endswith("__") and name != "requires_grad_"
        case "call_function":
            if isinstance(node.target, OpOverload):
                return bool(_arguments_written(node, node.target))
            if node.target in _OPERATORS:
                # ``+=`` on sizes is plain arithmetic.
                return facts.of(node.args[0]).kind != "other" if isinstance(node.args[0], Node) else False
            if node.kwargs.get("out") is not None or facts.target_name(node) == "setitem":
                return True
            name = getattr(node.target, "__name__", "")
            return (name.endswith("_") and not name.endswith("__")) or _inplace_argument(node) is True
    return False


def _converts(node: Node) -> bool:
    """Whether the result in place is known to be of another type than it would be out of place."""
    kinds = [
        facts.of(source).dtype or (source.name if facts.target_name(source) in names.CONVERSIONS else None)
        for source in node.all_input_nodes
    ]
    return any(kind != kinds[0] for kind in kinds[1:])


def _inplace_argument(node: Node) -> Any:
    position = _inplace_position(node.target)
    if position is None:
        return None
    return node.args[position] if len(node.args) > position else node.kwargs.get("inplace")


@cache
def _inplace_position(function: Any) -> int | None:
    """Where a function of torch.nn.functional takes ``inplace``."""
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return None
    return names.index("inplace") if "inplace" in names else None


def _take_out_of_place(node: Node, modules: MutableMapping[str, nn.Module]) -> bool:
    """Turn a node into its out-of-place twin; false, and nothing done, when it has none."""
    if node.op == "call_module":
        path = str(node.target)
        if not type(modules[path]).__module__.startswith("torch.nn"):
            return False
        _set_in_place(path, modules, False)
        return True
    if isinstance(node.target, OpOverload):
        return False
    if node.op == "call_method":
        twin: Any = str(node.target)[:-1]
        found = hasattr(torch.Tensor, twin)
    elif _inplace_argument(node) is True:
        position = _inplace_position(node.target)
        node.args = tuple(False if i == position else arg for i, arg in enumerate(node.args))
        node.kwargs = {name: value for name, value in node.kwargs.items() if name != "inplace"}
        return True
    else:
        name = getattr(node.target, "__name__", "")[:-1]
        twin = _OPERATORS.get(node.target) or getattr(torch, name, None) or getattr(F, name, None)
        found = twin is not None and node.kwargs.get("out") is None
    if found:
        node.target = twin
    return found


def _may_alias(node: Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a value may share memory with an input."""
    if isinstance(node.target, Operator):
        return isinstance(node.target, ChannelAffine) and node.target.is_identity
    match node.op:
        case "call_module":
            module = modules[str(node.target)]
            known = type(module).__module__.startswith("torch.nn")
            return not known or isinstance(module, names.VIEW_LAYERS) or bool(getattr(module, "inplace", False))
        case "call_function" | "call_method":
            if is_in_place(node, modules) or node.target in (getattr, operator.getitem):
                return not facts.reads_only_metadata(node)
            if isinstance(node.target, OpOverload):
                return any(result.alias_info is not None for result in node.target._schema.returns)
            return names.may_alias(facts.target_name(node))
    return False


def _same_tensor(node: Node, modules: Mapping[str, nn.Module]) -> set[Node]:
    """``node`` and the values that are the very same tensor under another name."""
    first = node
    while _returns_argument(first, modules):
        first = first.args[0]  # type: ignore[assignment]
    same, pending = {first}, [first]
    while pending:
        for reader in pending.pop().users:
            if reader not in same and _returns_argument(reader, modules) and reader.args[0] in same:
                same.add(reader)
                pending.append(reader)
    return same


def _returns_argument(node: Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a node returns its first argument itself."""
    if not node.args or not isinstance(node.args[0], Node):
        return False
    if node.op == "call_module":
        return isinstance(modules[str(node.target)], (nn.Identity, nn.modules.dropout._DropoutNd))
    return False


def work_in_place(graph: Graph, modules: MutableMapping[str, Any]) -> None:
    """Let activations, and what was in place before, overwrite their input where it is new memory for them alone.

    A feature map less is written, and its memory is not asked for. Gradients stay right: whatever made the memory does
    not need its result for them.

    Args:
        graph: The final graph, changed here.
        modules: What it calls and reads, by path; changed here.
    """
    calls: dict[str, list[Node]] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            calls.setdefault(str(node.target), []).append(node)
        elif facts.of(node).in_place is not None and _is_private(_first(node), modules):
            node.target = facts.of(node).in_place
        if facts.target_name(node) in _ACTIVATIONS and _is_private(_first(node), modules):
            _overwrite_input(node)
    for path, nodes in calls.items():
        if not all(_is_private(_first(node), modules) for node in nodes) or carries_hooks(modules[path]):
            continue
        if names.function_of(modules[path]) == "gelu":  # which has no in-place form, as its function has none
            for node in nodes:
                node.op, node.target = "call_function", GELU_
                how = modules[path].approximate
                node.kwargs = {} if how == "none" else {"approximate": how}
            del modules[path]
        elif names.function_of(modules[path]) in _ACTIVATIONS or all(
            facts.of(node).in_place is not None for node in nodes
        ):
            _set_in_place(path, modules, True)


def _first(node: Node) -> Any:
    return node.args[0] if node.args else None


def _is_private(value: Any, modules: Mapping[str, Any]) -> bool:
    """Whether a value lies in memory of its own, for one reader, and gradients do not need it."""
    if not isinstance(value, Node) or len(value.users) != 1 or facts.of(value).frozen is not None:
        return False
    if value.op == "call_module":
        module = modules[str(value.target)]
        return facts.is_layer(value, modules) and is_leaf(module) and not carries_hooks(module)
    is_fresh = facts.is_layer(value, modules) or facts.target_name(value) in _FRESH
    return is_fresh and value.kwargs.get("out") is None


def _overwrite_input(node: Node) -> None:
    """Turn a call of an activation that is a function into one in place, where there is such a form."""
    if node.op == "call_method":
        node.target = f"{facts.target_name(node)}_"
    elif (position := _inplace_position(node.target)) is not None:
        node.args = node.args[:position]
        node.kwargs = {**node.kwargs, "inplace": True}
    else:
        node.target = _OVERWRITING.get(node.target, node.target)

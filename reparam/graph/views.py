"""Where the axes of a value go: views, permutations, poolings, reductions.

A per-channel scale and shift moves through an operation when the channels' axis of its input is an axis of its output
(:mod:`reparam.rewrite.passage`), and the number of channels is known beyond it. Sizes are compared as symbols: the
batch size is whatever ``x.shape[0]`` is, and nothing here depends on the sizes of an example.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import nn
from torch.fx import Node

from reparam.algebra import Operator
from reparam.errors import AlgebraError
from reparam.graph import facts, names
from reparam.graph.leaves import carries_hooks, is_leaf
from reparam.graph.lift import lift

# A known number, an axis of a value (counted from the front), or None.
Size: TypeAlias = "int | tuple[Node, int] | None"
_REDUCTIONS = frozenset("mean amax amin".split())
_PRODUCTS = frozenset("matmul bmm einsum".split())


@dataclass(frozen=True)
class Axes:
    """An operation on one value that leaves some of its axes alone.

    Attributes:
        rank: Number of axes of the value, the node's first argument.
        out_rank: Number of axes of the result.
        to: For every axis of the source, the axis of the result that it becomes, index by index; None when it is
            mixed, merged, cut or gone.
        merged: The axes of the source, first and last, that become one axis of the result, and that axis; None
            when no axes are merged.
        unmerged: The axis of the source that becomes several axes of the result, and the first and last of these;
            None when there is none.
    """

    rank: int
    out_rank: int
    to: tuple[int | None, ...]
    merged: tuple[int, int, int] | None = None
    unmerged: tuple[int, int, int] | None = None

    def back(self, axis: int) -> int | None:
        """The axis of the source, counted from the end, for one of the result counted from the end."""
        position = axis + self.out_rank
        return self.to.index(position) - self.rank if position in self.to else None

    def forth(self, axis: int) -> int | None:
        """The axis of the result, counted from the end, for one of the source counted from the end."""
        position = self.to[axis + self.rank] if 0 <= axis + self.rank < self.rank else None
        return None if position is None else position - self.out_rank


@dataclass(frozen=True)
class Part:
    """A range of a value along an axis: by ``chunk``, ``split`` or ``unbind``, or by an index.

    Attributes:
        whole: The value that it is a part of.
        reader: The node that reads ``whole``: what separates it into several parts, or the part itself.
        axis: Along which axis of ``whole``, counted from the end.
        start: The part's first index.
        stop: The index behind its last one.
        total: How many ``whole`` has.
        is_slice: Whether the part still has the axis.
    """

    whole: Node
    reader: Node
    axis: int
    start: int
    stop: int
    total: int
    is_slice: bool

    def overlaps(self, other: Part) -> bool:
        """Whether two parts of the same value have anything in common, as far as is known."""
        return self.axis != other.axis or max(self.start, other.start) < min(self.stop, other.stop)


def settle(nodes: Iterable[Node], modules: Mapping[str, Any]) -> None:
    """Write down for every node where the ``axes`` of its first input go, and how many ``channels`` it has.

    Args:
        nodes: In the order in which they run; their ranks are as well known as they will be.
        modules: The module at every path.
    """
    for node in nodes:
        found = _axes(node, modules)
        if found is not None and facts.of(node).rank is None:
            facts.know(node, rank=found.out_rank)
        # An example may show that a squeeze does nothing, say.
        facts.know(node, axes=found if found is not None and facts.of(node).rank == found.out_rank else None)
        if facts.of(node).channels is None:
            known = _inherited_channels(node) or facts.channels_read(node, modules) or _permuted_channels(node, modules)
            if known is not None:
                facts.know(node, channels=known)


def axes(node: Node) -> Axes | None:
    """Where the axes of a node's first input go, or None when that is not known."""
    known: Axes | None = facts.of(node).axes
    return None if facts.of(node).frozen is not None else known


def multiplies(node: Node) -> bool:
    """Whether a node is a matrix product of several values, which is linear in each of them."""
    if node.op not in ("call_function", "call_method") or facts.of(node).frozen is not None or node.kwargs:
        return False
    factors = {argument for argument in node.args if isinstance(argument, Node)}
    return facts.target_name(node) in _PRODUCTS and len(factors) == len(node.all_input_nodes) > 1


def separates(node: Node) -> bool:
    """Whether a node separates a value into several."""
    return node.op in ("call_function", "call_method") and facts.target_name(node) in names.SEPARATIONS


def part(node: Node) -> Part | None:
    """What a node takes of another value; None when it is no part of one, or not known which."""
    if node.target is not operator.getitem or facts.of(node).frozen is not None or not isinstance(node.args[0], Node):
        return None
    reader = node.args[0] if separates(node.args[0]) else node
    whole = reader.args[0] if reader.args else None
    rank = facts.of(whole).rank if isinstance(whole, Node) else None
    if not isinstance(whole, Node) or rank is None or facts.of(reader).frozen is not None:
        return None
    if reader is node:
        return _indexed_part(node, whole, rank)
    name, arguments = facts.target_name(reader), facts.Arguments(reader)
    dim, index = arguments.get(1 if name == "unbind" else 2, "dim", 0), node.args[1]
    if type(dim) is not int or not -rank <= dim < rank or type(index) is not int:
        return None
    axis = dim % rank - rank
    lengths = _lengths(name, arguments, channels(whole, axis))
    if lengths is None or not -len(lengths) <= index < len(lengths):
        return None
    start = sum(lengths[: index % len(lengths)])
    return Part(whole, reader, axis, start, start + lengths[index], sum(lengths), name != "unbind")


def _indexed_part(node: Node, whole: Node, rank: int) -> Part | None:
    """What one number, or one slice without a step, takes."""
    items = facts.indices(node.args[1], rank) if facts.of(whole).kind == "tensor" else None
    cut = [i for i, item in enumerate(items or ()) if item != slice(None)]
    if items is None or len(cut) != 1 or len(items) != rank:
        return None
    axis, item = cut[0] - rank, items[cut[0]]
    total = channels(whole, axis)
    if total is None:
        return None
    if isinstance(item, int):
        return Part(whole, node, axis, item % total, item % total + 1, total, is_slice=False)
    assert item is not None
    if item.step not in (None, 1) or not all(bound is None or type(bound) is int for bound in (item.start, item.stop)):
        return None
    start, stop, _ = item.indices(total)
    return Part(whole, node, axis, start, max(start, stop), total, is_slice=True)


def _lengths(name: str, arguments: facts.Arguments, total: int | None) -> list[int] | None:
    """How long the parts are that ``total`` is separated into."""
    if name == "unbind":
        return None if total is None else [1] * total
    known = arguments.node.kwargs
    wanted = arguments.get(1, next((key for key in known if key.startswith(("split_size", "chunks"))), ""), None)
    if isinstance(wanted, (tuple, list)):
        return list(wanted) if all(type(length) is int for length in wanted) else None
    if total is None or type(wanted) is not int or wanted < 1:
        return None
    step = -(-total // wanted) if name == "chunk" else wanted
    return [min(step, total - start) for start in range(0, total, step)]


def concatenates(node: Node) -> bool:
    """Whether a node is a concatenation."""
    return node.op == "call_function" and facts.target_name(node) in ("cat", "concat", "concatenate")


def concatenation(node: Node) -> tuple[list[Node], int]:
    """The parts of a concatenation, and its axis counted from the end.

    Raises:
        AlgebraError: They are not known.
    """
    arguments, rank = facts.Arguments(node), facts.of(node).rank
    parts, dim = arguments.get(0, "tensors", None), arguments.get(1, "dim", 0)
    if not isinstance(parts, (tuple, list)) or not all(isinstance(part, Node) for part in parts):
        raise AlgebraError("what is concatenated is not known")
    if rank is None or type(dim) is not int or facts.of(node).frozen is not None:
        raise AlgebraError("the axis of a concatenation is not known")
    return list(parts), dim % rank - rank


def _inherited_channels(node: Node) -> tuple[int, int] | None:
    """The channels' number and axis where no layer makes them: a view, a pool, a sum, a concatenation."""
    name = facts.target_name(node)
    known = [facts.of(source).channels for source in node.all_input_nodes]
    if concatenates(node):
        try:
            parts, along = concatenation(node)
        except AlgebraError:
            return None
        counts = [channels(part, along) for part in parts]
        return None if None in counts else (sum(filter(None, counts)), along)
    if known and facts.keeps_shape(node):
        return known[0]
    if node.op.startswith("call") and names.is_pointwise(name):
        # More than one channel: whatever else is as long along that axis, counted from the end, or broadcasts.
        return next((own for own in known if own and own[0] > 1), None)
    if (found := part(node)) is not None and found.is_slice:
        return found.stop - found.start, found.axis
    moved = axes(node)
    if moved is not None:
        own = known[0]
        axis = None if own is None else moved.forth(own[1])
        return None if own is None or axis is None else (own[0], axis)
    return None


def _permuted_channels(node: Node, modules: Mapping[str, Any]) -> tuple[int, int] | None:
    """Those behind ``nn.PixelShuffle`` and its like."""
    called = type(modules[str(node.target)]).__name__ if node.op == "call_module" else facts.target_name(node)
    operator = lift(node, modules) if called.replace("_", "").lower().endswith("shuffle") else None
    return operator.makes if isinstance(operator, Operator) else None


def _axes(node: Node, modules: Mapping[str, Any]) -> Axes | None:
    source = node.args[0] if node.args else None
    if not isinstance(source, Node) or facts.of(node).frozen is not None:
        return None
    rank = facts.of(source).rank
    if rank is None:
        return None
    if isinstance(node.target, Operator):
        to = node.target.axes(rank)
        return None if to is None else Axes(rank, rank, to)
    if node.op == "call_module":
        return _of_module(node, modules[str(node.target)], source, rank)
    if node.op in ("call_function", "call_method"):
        return _of_function(node, source, rank)
    return None


def _of_module(node: Node, module: Any, source: Node, rank: int) -> Axes | None:
    if not is_leaf(module) or carries_hooks(module):
        return None
    match module:
        case nn.Flatten():
            return _flatten(rank, module.start_dim, module.end_dim)
        case nn.Unflatten(dim=int(dim)):
            return _unflatten(rank, dim, module.unflattened_size)
        case _ if type(module).__module__ == "torch.nn.modules.padding":
            return _pad(rank, module.padding)
    name, several = names.function_of(module), getattr(module, "return_indices", False)
    is_known = (name in names.POOLS or name in names.RESAMPLINGS) and not several
    return _keeps_first_two(rank, names.POOLS.get(name)) if is_known else None


def _of_function(node: Node, source: Node, rank: int) -> Axes | None:
    name, arguments = facts.target_name(node), facts.Arguments(node)
    if name in names.COPIES:
        return Axes(rank, rank, tuple(range(rank)))
    if name in names.POOLS:
        several = arguments.get(6, "return_indices", False)
        return None if several else _keeps_first_two(rank, names.POOLS[name])
    if name in names.RESAMPLINGS:
        return _keeps_first_two(rank)
    if name in names.RESHAPES:
        return _reshape(node, name, source, rank)
    if name in _REDUCTIONS and arguments.named("dtype") is None:
        return _reduce(rank, arguments.get(1, "dim", None), arguments.get(2, "keepdim", False))
    match name:
        case "pad" | "_pad":
            return _pad(rank, arguments.get(1, "pad", None))
        case "flatten":
            return _flatten(rank, arguments.get(1, "start_dim", 0), arguments.get(2, "end_dim", -1))
        case "unflatten":
            return _unflatten(rank, arguments.get(1, "dim", None), arguments.get(2, "sizes", None))
        case "transpose" | "swapaxes" | "swapdims":
            return _swap(rank, arguments.get(1, "dim0", None), arguments.get(2, "dim1", None))
        case "t":
            return _swap(rank, 0, 1) if rank == 2 else None
        case "permute":
            return _permute(rank, _flat(node.args[1:]) or arguments.named("dims"))
        case "unsqueeze":
            dim = arguments.get(1, "dim", None)
            if not isinstance(dim, int):
                return None
            at = dim % (rank + 1)
            return Axes(rank, rank + 1, tuple(i + (i >= at) for i in range(rank)))
        case "squeeze":
            return _squeeze(node, source, rank, arguments.get(1, "dim", None))
        case "getitem":
            return _index(source, rank, node.args[1])
        case "getattr" if node.args[1] in ("T", "mT") and rank >= 2:
            return _swap(rank, -2, -1) if rank == 2 or node.args[1] == "mT" else None
    return None


def _keeps_first_two(rank: int, space: int | None = None) -> Axes | None:
    """Poolings and resampling work on the axes after batch and channels; a pool also takes an input without batch."""
    if rank < 3 or space not in (None, rank - 2):
        return None
    return Axes(rank, rank, (0, 1, *[None] * (rank - 2)))


def _pad(rank: int, amounts: Any) -> Axes | None:
    """torch counts the axes from the last to the first; what is not padded stays."""
    amounts = amounts if isinstance(amounts, (tuple, list)) else None
    if amounts is None or not all(type(amount) is int for amount in amounts) or len(amounts) > 2 * rank:
        return None
    padded = {rank - 1 - i // 2 for i, amount in enumerate(amounts) if amount}
    return Axes(rank, rank, tuple(None if i in padded else i for i in range(rank)))


def _flat(values: Sequence[Any]) -> tuple[Any, ...]:
    """``(1, 2)`` for both ``f(1, 2)`` and ``f((1, 2))``."""
    return tuple(values[0]) if len(values) == 1 and isinstance(values[0], (tuple, list)) else tuple(values)


def _flatten(rank: int, start: Any, end: Any) -> Axes | None:
    if not isinstance(start, int) or not isinstance(end, int) or not rank:
        return None
    first, last = start % rank, end % rank
    to = tuple(i if i < first else i - (last - first) if i > last else None for i in range(rank))
    if first == last:
        return Axes(rank, rank, tuple(range(rank)))
    return Axes(rank, rank - (last - first), to, (first, last, first))


def _unflatten(rank: int, dim: Any, sizes: Any) -> Axes | None:
    if not isinstance(dim, int) or not isinstance(sizes, (tuple, list)):
        return None
    at, more = dim % rank, len(sizes) - 1
    to = tuple(i if i < at else i + more if i > at else None for i in range(rank))
    return Axes(rank, rank + more, to, unmerged=(at, at, at + more))


def _swap(rank: int, a: Any, b: Any) -> Axes | None:
    if not isinstance(a, int) or not isinstance(b, int):
        return None
    to = list(range(rank))
    to[a % rank], to[b % rank] = to[b % rank], to[a % rank]
    return Axes(rank, rank, tuple(to))


def _permute(rank: int, dims: Any) -> Axes | None:
    if not isinstance(dims, (tuple, list)) or len(dims) != rank or not all(isinstance(d, int) for d in dims):
        return None
    order = [d % rank for d in dims]
    return Axes(rank, rank, tuple(order.index(i) for i in range(rank)))


def _reduce(rank: int, dims: Any, keep: Any) -> Axes | None:
    gone = _positions(dims, rank)
    if not gone or not isinstance(keep, bool):
        # No axes stand for all of them.
        return None
    if keep:
        return Axes(rank, rank, tuple(None if i in gone else i for i in range(rank)))
    kept = [i for i in range(rank) if i not in gone]
    return Axes(rank, len(kept), tuple(kept.index(i) if i in kept else None for i in range(rank)))


def _positions(dims: Any, rank: int) -> set[int]:
    """Axes counted from the front; none of them when any is not known."""
    dims = dims if isinstance(dims, (tuple, list)) else (dims,)
    return {dim % rank for dim in dims} if rank and all(type(dim) is int for dim in dims) else set()


def _squeeze(node: Node, source: Node, rank: int, dims: Any) -> Axes | None:
    """torch squeezes an axis only when its size is one: it must be, or have been in an example."""
    gone = _positions(dims, rank)
    if facts.of(node).rank != rank - len(gone) and not all(_is_one(source, axis) for axis in gone):
        return None
    return _reduce(rank, dims, False)


def _is_one(node: Node, axis: int) -> bool:
    """Whether the size of an axis is one for every input: it was reduced before."""
    found = size(node, axis)
    if not isinstance(found, tuple):
        return found == 1
    made, axis = found
    name, arguments, rank = facts.target_name(made), facts.Arguments(made), facts.of(made).rank
    if rank is None or made.op not in ("call_function", "call_method"):
        return False
    if name in _REDUCTIONS and arguments.get(2, "keepdim", False) is True:
        return axis in _positions(arguments.get(1, "dim", None), rank)
    pools = name.startswith("adaptive_avg_pool") and rank == names.POOLS[name] + 2
    return pools and axis >= 2 and arguments.get(1, "output_size", None) in (1, (1,), (1, 1), (1, 1, 1))


def _index(source: Node, rank: int, index: Any) -> Axes | None:
    """Slices, numbers, None and the ellipsis; an axis that is cut or gone is no longer what it was."""
    items = facts.indices(index, rank)
    if facts.of(source).kind != "tensor" or items is None:
        return None
    to: list[int | None] = []
    position = 0
    for item in items:
        if item is not None:
            to.append(position if item == slice(None) else None)
        position += type(item) is not int
    return Axes(rank, position, tuple(to))


# Reshapes.


def _reshape(node: Node, name: str, source: Node, rank: int) -> Axes | None:
    """An axis stays what it is when as many numbers lie before it as before, or after it, and it is as long."""
    old = [size(source, axis) for axis in range(rank)]
    new = _new_sizes(node, name)
    if new is None:
        return None
    to: list[int | None] = [None] * rank
    start = 0
    while start < min(rank, len(new)) and _equal(old[start], new[start]):
        to[start] = start
        start += 1
    end = 0
    while end < min(rank, len(new)) - start and _equal(old[-1 - end], new[-1 - end]):
        to[rank - 1 - end] = len(new) - 1 - end
        end += 1
    left, made = rank - start - end, len(new) - start - end
    merged = (start, start + left - 1, start) if made == 1 and left > 1 else None
    unmerged = (start, start, start + made - 1) if left == 1 and made > 1 else None
    if left == made == 1:
        to[start] = start  # all others agree
    return Axes(rank, len(new), tuple(to), merged, unmerged)


def _equal(a: Size, b: Size) -> bool:
    return a is not None and a == b


def _new_sizes(node: Node, name: str) -> list[Size] | None:
    """The sizes that a reshape asks for; None for one that is worked out."""
    if name.endswith("_as"):
        other = node.args[1] if len(node.args) > 1 else node.kwargs.get("other")
        rank = facts.of(other).rank if isinstance(other, Node) else None
        return None if rank is None else [size(other, axis) for axis in range(rank)]  # type: ignore[arg-type]
    wanted = wanted_sizes(node)
    return None if wanted is None else [size_of(item) for item in wanted]


def wanted_sizes(node: Node) -> Sequence[Any] | None:
    """The arguments of a reshape that are sizes."""
    wanted = _flat(node.args[1:]) or node.kwargs.get("shape") or node.kwargs.get("size")
    if not isinstance(wanted, (tuple, list)):
        return None
    if len(wanted) == 1 and type(wanted[0]) is not int and not _is_size(wanted[0]):
        # A whole shape, or a type.
        return None
    return wanted


def _is_size(item: Any) -> bool:
    return isinstance(item, Node) and _read_size(item)[0] is not None


def size_of(item: Any) -> Size:
    """The size that an argument of a reshape stands for."""
    if isinstance(item, int):
        return item if item >= 0 else None
    if not isinstance(item, Node):
        return None
    value, axis = _read_size(item)
    rank = facts.of(value).rank if value is not None else None
    if value is None or rank is None or not -rank <= axis < rank:
        return None
    return size(value, axis % rank)


def _read_size(item: Node) -> tuple[Node | None, int]:
    """The value, and its axis, whose size a node is: ``x.shape[i]``, ``x.size(i)``, ``x.size()[i]``."""
    nothing = None, 0
    if item.op == "call_method" and item.target == "size" and len(item.args) == 2:
        return (item.args[0], item.args[1]) if type(item.args[1]) is int else nothing  # type: ignore[return-value]
    if item.target is not operator.getitem or type(item.args[1]) is not int or not isinstance(item.args[0], Node):
        return nothing
    shape = item.args[0]
    whole = shape.target is getattr and shape.args[1] == "shape"
    whole = whole or (shape.op == "call_method" and shape.target == "size" and len(shape.args) == 1)
    return (shape.args[0], item.args[1]) if whole else nothing  # type: ignore[return-value]


def size(node: Node, axis: int) -> Size:
    """The size of an axis, counted from the front: a number when a layer shows it, else the value it comes from."""
    while True:
        rank = facts.of(node).rank
        known = facts.of(node).channels
        if rank is not None and known is not None and known[1] + rank == axis:
            return int(known[0])
        source = node.args[0] if node.args and isinstance(node.args[0], Node) else None
        if source is None or rank is None or facts.of(source).rank is None:
            return node, axis
        if facts.keeps_shape(node) and facts.of(source).rank == rank:
            node = source
            continue
        moved = axes(node)
        if moved is not None:
            if axis not in moved.to:
                return _asked_for(node, moved, axis) or (node, axis)
            node, axis = source, moved.to.index(axis)
        elif (
            facts.of(node).layer
            and known is not None
            and facts.of(source).rank == rank
            and (axis == 0 or known[1] == -1)
        ):
            # A convolution keeps the batch, a matrix product all axes but the last.
            node = source
        else:
            return node, axis


def origins(node: Node, axis: int) -> list[tuple[Node, int]] | None:
    """The axes of its inputs that the size of a result's axis is computed from, beside numbers that it is given; None
    when that is not known, and it may be all of them."""
    moved, known, rank = axes(node), facts.of(node).channels, facts.of(node).rank
    name, sources = facts.target_name(node), node.all_input_nodes
    if rank is not None and (names.is_pointwise(name) or concatenates(node)):
        ranks = {source: facts.of(source).rank for source in sources if facts.of(source).kind != "other"}
        found = [(source, axis - rank + own) for source, own in ranks.items() if own is not None]
        return [item for item in found if item[1] >= 0] if len(found) == len(ranks) else None
    if moved is not None and moved.merged is not None and axis == moved.merged[2]:
        return [(sources[0], part) for part in range(moved.merged[0], moved.merged[1] + 1)]
    layer = facts.of(node).layer and known is not None and known[1] != -1 and axis > 1  # a convolution
    kept = moved is not None and moved.rank == moved.out_rank and all(to in (None, i) for i, to in enumerate(moved.to))
    return [(sources[0], axis)] if layer or (kept and name != "getitem" and name not in names.RESHAPES) else None


def _asked_for(node: Node, moved: Axes, axis: int) -> int | None:
    """The size of an axis that a reshape makes, where it is given as a number."""
    name, arguments = facts.target_name(node), facts.Arguments(node)
    if node.op == "call_module":
        return None
    if name == "unflatten" and moved.unmerged is not None:
        sizes: list[Any] = list(arguments.get(2, "sizes", ()))
        first = moved.unmerged[1]
    elif name in names.RESHAPES and not name.endswith("_as"):
        sizes, first = list(wanted_sizes(node) or ()), 0
    else:
        return None
    wanted = size_of(sizes[axis - first]) if 0 <= axis - first < len(sizes) else None
    return wanted if type(wanted) is int else None


def channels(node: Node, axis: int) -> int | None:
    """Number of channels of a value along an axis counted from the end, when the layer that made it shows it."""
    rank = facts.of(node).rank
    if rank is None:
        known = facts.of(node).channels
        return known[0] if known is not None and known[1] == axis else None
    found = size(node, axis + rank) if 0 <= axis + rank < rank else None
    return found if isinstance(found, int) else None

"""Layered drawings of small graphs: which box goes where, and the result as SVG."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise
from typing import TypeAlias

import torch.fx
from torch.fx import Node

from reparam.algebra import AnyConv, AveragePool, ChannelAffine, Conv, ConvTranspose, Pad
from reparam.graph import facts, measure
from reparam.graph.graph import Graph
from reparam.graph.lift import Sum

Point: TypeAlias = tuple[float, float]
Edge: TypeAlias = tuple[int, int]
_SWEEPS = 8  # over all rows, up and down: small graphs settle within a few
_STRAIGHT = 12  # how much more a chain wants to be straight than a fork to be even
_WIDTH, _HEIGHT, _ROW, _GAP, _LANE, _MARGIN = 124.0, 40.0, 66.0, 16.0, 12.0, 8.0  # pixels
_SIGNS = {"add": "+", "iadd": "+", "sub": "−", "isub": "−", "mul": "×", "imul": "×", "truediv": "÷", "div": "÷"}


@dataclass(frozen=True)
class Box:
    """A node of a drawing.

    Attributes:
        kind: ``value``, ``convolution``, ``norm``, ``sign`` (a sum or product, drawn as a circle), or ``other``.
        title: What it is, such as ``conv 3×3``.
        detail: Its numbers, such as ``48 → 96, stride 2``; may be empty.
    """

    kind: str
    title: str
    detail: str = ""


@dataclass(frozen=True)
class Diagram:
    """A graph to be drawn. Two that are equal look alike, and show the same structure.

    Attributes:
        boxes: The nodes, each after the nodes that it reads.
        edges: Pairs of positions in ``boxes``: one that is read, and its reader.
    """

    boxes: tuple[Box, ...]
    edges: tuple[Edge, ...]

    @property
    def calls(self) -> int:
        """How many boxes compute something."""
        return sum(box.kind != "value" for box in self.boxes)

    def __str__(self) -> str:
        """The graph in words, one sentence a box."""
        names = [f"{index + 1} {box.title} {box.detail}".rstrip() for index, box in enumerate(self.boxes)]
        sources = [[str(a + 1) for a, b in self.edges if b == index] for index in range(len(self.boxes))]
        return "; ".join(
            name + (f" reads {' and '.join(read)}" if read else "") for name, read in zip(names, sources, strict=True)
        )


# --- What to draw -------------------------------------------------------------------------------------------------


def diagram(nodes: Iterable[Node], graph: Graph) -> Diagram:
    """What some nodes of a graph compute: a box each, one for every value that they read from elsewhere, and outputs.

    Constants, sizes, and layers that do nothing in eval mode are left out.

    Args:
        nodes: Nodes of ``graph``, in its order.
        graph: A captured or compiled graph.
    """
    hidden = _hidden(graph)
    inside = [node for node in nodes if node not in hidden]
    shown = set(inside)
    boxes: list[Box] = []
    edges: list[Edge] = []
    place: dict[Node, int] = {}

    def position(node: Node) -> int:
        source = _behind_no_ops(node, graph)
        if source not in place:
            place[source] = len(boxes)
            boxes.append(
                box(source, graph) if source in shown and source.op != "placeholder" else Box("value", "input")
            )
        return place[source]

    for node in inside:
        if node.op == "placeholder" or _behind_no_ops(node, graph) is not node:
            continue
        sources = [position(source) for source in node.all_input_nodes if source not in hidden]
        edges += dict.fromkeys((source, position(node)) for source in sources)
        position(node)
    for node in inside:
        leaves = any(reader not in shown and (reader.op == "output" or reader not in hidden) for reader in node.users)
        if leaves and node.op != "placeholder" and _behind_no_ops(node, graph) in shown:
            output = (position(node), len(boxes))
            if output[0] not in {source for source, reader in edges if boxes[reader].title == "output"}:
                boxes.append(Box("value", "output"))
                edges.append(output)
    return Diagram(tuple(boxes), tuple(edges))


def diagram_of(model: torch.fx.GraphModule) -> Diagram:
    """A whole graph module as a diagram, whoever made it."""
    graph = Graph(model.graph, dict(model.named_modules()))
    return diagram([node for node in model.graph.nodes if node.op != "output"], graph)


def _hidden(graph: Graph) -> set[Node]:
    """Constants and sizes, and what is computed from them alone."""
    hidden: set[Node] = set()
    for node in graph.fx.nodes:
        from_hidden = node.op != "placeholder" and all(source in hidden for source in node.all_input_nodes)
        if node.op in ("get_attr", "output") or facts.reads_only_metadata(node) or from_hidden:
            hidden.add(node)
    return hidden


def _behind_no_ops(node: Node, graph: Graph) -> Node:
    while _is_no_op(node, graph):
        node = node.all_input_nodes[0]
    return node


def _is_no_op(node: Node, graph: Graph) -> bool:
    if node.op not in ("call_module", "call_function", "call_method") or len(node.all_input_nodes) != 1:
        return False
    operator = graph.op(node)
    return isinstance(operator, ChannelAffine) and operator.is_identity


def box(node: Node, graph: Graph) -> Box:
    """How a node is drawn."""
    module = graph.modules.get(str(node.target)) if node.op == "call_module" else None
    kind = next(iter(measure.kinds_of(node, graph.modules)), "") if module is None or not graph.is_opaque(node) else ""
    if kind == "norms":
        return Box("norm", _words(type(module).__name__ if module is not None else facts.target_name(node)))
    operator = graph.op(node)
    match operator:
        case Conv() if operator.dimensions == 0:
            return Box("convolution", "linear", f"{operator.in_channels} → {operator.out_channels}")
        case Conv() | ConvTranspose():
            return _convolution(operator)
        case AveragePool():
            return Box("other", f"average pool {'×'.join(map(str, operator.kernel_size))}")
        case Pad():
            return Box("other", "pad")
        case ChannelAffine():
            return Box("norm", "scale" if operator.shift is None else "scale and shift")
        case Sum() if facts.target_name(node) not in _SIGNS:
            return Box("sign", "+")
    if module is not None:
        return Box("other", type(module).__name__, "kept as Python" if graph.is_opaque(node) else "")
    name = facts.target_name(node)
    return Box("sign", _SIGNS[name]) if name in _SIGNS else Box("other", name)


def _convolution(operator: AnyConv) -> Box:
    size = "×".join(map(str, operator.kernel_size))
    depthwise = operator.groups == operator.in_channels == operator.out_channels > 1
    facts = [str(operator.in_channels) if depthwise else f"{operator.in_channels} → {operator.out_channels}"]
    if any(step != 1 for step in operator.stride):
        facts.append(f"stride {'×'.join(map(str, dict.fromkeys(operator.stride)))}")
    if any(step != 1 for step in operator.dilation):
        facts.append(f"dilation {'×'.join(map(str, dict.fromkeys(operator.dilation)))}")
    if operator.groups > 1 and not depthwise:
        facts.append(f"{operator.groups} groups")
    kind = "depthwise" if depthwise else "transposed" if isinstance(operator, ConvTranspose) else "conv"
    return Box("convolution", f"{kind} {size}", ", ".join(facts))


def _words(name: str) -> str:
    """``BatchNorm2d`` and ``batch_norm`` as ``batch norm``."""
    name = name.rstrip("123d") if name[-1:] == "d" else name
    spaced = "".join(" " + letter if letter.isupper() and before.islower() else letter
                     for before, letter in zip(" " + name, name, strict=False))  # fmt: skip
    return spaced.replace("_", " ").lower().strip()


# --- Where it goes ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """Where boxes lie, by their middles, and through which points the edges run; rows are one apart.

    Attributes:
        places: Of each box, across (in the unit of the widths) and down (in rows).
        edges: From the middle of the box that is read, through one point in each row between, to that of its reader.
    """

    places: tuple[Point, ...]
    edges: Mapping[Edge, Sequence[Point]]

    @property
    def rows(self) -> float:
        """The last row."""
        return max((row for _, row in self.places), default=0.0)


def arrange(diagram: Diagram, widths: Sequence[float], gap: float, lane: float) -> Layout:
    """Lay a graph out in rows, every box below what it reads; an edge over several rows has a lane of its own.

    The layered drawing of Sugiyama, Tagawa and Toda (1981), ordered by barycentres. Across, every row is placed as
    near to its neighbours as the order allows, by least squares (pool adjacent violators).

    Args:
        diagram: What to draw.
        widths: Of the boxes.
        gap: Between neighbours.
        lane: Width of what an edge needs where it passes a row.
    """
    rows = _Rows.of(diagram, widths, lane)
    rows.sort()
    x = rows.placed(gap)
    level = {item: float(index) for index, items in enumerate(rows.items) for item in items}
    return Layout(
        tuple((x[index], level[index]) for index in range(len(diagram.boxes))),
        {edge: [(x[item], level[item]) for item in path] for edge, path in rows.paths.items()},
    )


def _levels(diagram: Diagram) -> list[int]:
    """The row of each box: below all that it reads; what comes from outside right above its first reader."""
    level = [0] * len(diagram.boxes)
    for source, reader in sorted(diagram.edges, key=lambda edge: edge[1]):
        level[reader] = max(level[reader], level[source] + 1)
    read = {source for source, _ in diagram.edges} - {reader for _, reader in diagram.edges}
    for index in read:
        level[index] = min(level[reader] for source, reader in diagram.edges if source == index) - 1
    rank = {row: index for index, row in enumerate(sorted(set(level)))}
    return [rank[row] for row in level]


@dataclass
class _Rows:
    """Rows of items: boxes by their positions, and, as negative numbers, the lanes of edges that pass a row.

    Attributes:
        items: Of each row, from the left.
        width: Of each item.
        paths: The items that each edge runs through.
        above: What each item hangs from, in the row above.
        below: What hangs from it.
    """

    items: list[list[int]]
    width: dict[int, float]
    paths: dict[Edge, list[int]] = field(default_factory=dict)
    above: dict[int, list[int]] = field(default_factory=dict)
    below: dict[int, list[int]] = field(default_factory=dict)

    @classmethod
    def of(cls, diagram: Diagram, widths: Sequence[float], lane: float) -> _Rows:
        """All boxes in their rows, and a lane wherever an edge passes one."""
        level = _levels(diagram)
        rows = cls([[] for _ in range(max(level, default=-1) + 1)], dict(enumerate(widths)))
        for index, row in enumerate(level):
            rows.items[row].append(index)
        for source, reader in diagram.edges:
            path = [source]
            for row in range(level[source] + 1, level[reader]):
                path.append(-len(rows.width))
                rows.width[path[-1]] = lane
                rows.items[row].append(path[-1])
            rows.paths[source, reader] = [*path, reader]
            for upper, lower in pairwise([*path, reader]):
                rows.below.setdefault(upper, []).append(lower)
                rows.above.setdefault(lower, []).append(upper)
        return rows

    def sort(self) -> None:
        """Order every row by where its neighbours are in the next one, down and up again."""
        x = {item: float(position) for items in self.items for position, item in enumerate(items)}
        for sweep in range(_SWEEPS):
            neighbours, rows = (self.above, self.items) if sweep % 2 == 0 else (self.below, self.items[::-1])
            for items in rows:
                items.sort(key=lambda item: _mean([x[other] for other in neighbours.get(item, [])], x[item]))
                x.update((item, float(position)) for position, item in enumerate(items))

    def placed(self, gap: float) -> dict[int, float]:
        """Where each item lies across."""
        x: dict[int, float] = {}
        for items in self.items:
            x.update(_spread(items, dict.fromkeys(items, 0.0), self.width, gap))
        pulls = self._pulls()
        for sweep in range(16 * _SWEEPS):
            for items in self.items if sweep % 2 == 0 else self.items[::-1]:
                wanted = {item: _mean([x[other] for other in pulls.get(item, [])], x[item]) for item in items}
                x.update(_spread(items, wanted, self.width, gap))
        return x

    def _pulls(self) -> dict[int, list[int]]:
        """What draws each item to itself, the more often the straighter the line between the two should be."""
        found: dict[int, list[int]] = {}
        for source, readers in self.below.items():
            for reader in readers:
                alone = len(readers) == 1 and len(self.above[reader]) == 1
                times = _STRAIGHT if alone else 1
                found.setdefault(source, []).extend([reader] * times)
                found.setdefault(reader, []).extend([source] * times)
        return found


def _mean(values: Sequence[float], otherwise: float) -> float:
    return sum(values) / len(values) if values else otherwise


def _spread(
    items: Sequence[int], wanted: Mapping[int, float], width: Mapping[int, float], gap: float
) -> dict[int, float]:
    """The places nearest to those wanted, in squares, that keep the order and leave a gap between neighbours."""
    offsets = [0.0]
    for left, right in pairwise(items):
        offsets.append(offsets[-1] + (width[left] + width[right]) / 2 + gap)
    pools: list[tuple[float, int]] = []  # mean and size; neighbours that would overlap move as one
    for item, offset in zip(items, offsets, strict=True):
        mean, size = wanted[item] - offset, 1
        while pools and pools[-1][0] > mean:
            before, count = pools.pop()
            mean, size = (before * count + mean * size) / (count + size), count + size
        pools.append((mean, size))
    means = [mean for mean, size in pools for _ in range(size)]
    return {item: mean + offset for item, mean, offset in zip(items, means, offsets, strict=True)}


# --- As SVG -------------------------------------------------------------------------------------------------------


def svg(diagram: Diagram, name: str, title: str) -> str:
    """A diagram as an ``<svg>`` element for an HTML page, which styles it by the classes of its elements.

    Args:
        diagram: What to draw.
        name: A prefix for identifiers, unique in the page: letters, digits and hyphens.
        title: What screen readers call it; need not be escaped.
    """
    widths = [_HEIGHT if box.kind == "sign" else _width(box) for box in diagram.boxes]
    layout = arrange(diagram, widths, _GAP, _LANE)
    xs = [x for points in layout.edges.values() for x, _ in points]
    left = min([*xs, *(x - w / 2 for (x, _), w in zip(layout.places, widths, strict=True))], default=0.0) - _MARGIN
    right = max([*xs, *(x + w / 2 for (x, _), w in zip(layout.places, widths, strict=True))], default=0.0) + _MARGIN
    width, height = math.ceil(right - left), math.ceil(layout.rows * _ROW + _HEIGHT + 2 * _MARGIN)

    def at(point: Point) -> Point:
        return point[0] - left, point[1] * _ROW + _HEIGHT / 2 + _MARGIN

    parts = [_curve([at(point) for point in points]) for points in layout.edges.values()]
    parts += [_box(box, at(place), w) for box, place, w in zip(diagram.boxes, layout.places, widths, strict=True)]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="graph" role="img" aria-labelledby="{name}-t {name}-d" '
        f'viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
        f'<title id="{name}-t">{_escaped(title)}</title><desc id="{name}-d">{_escaped(str(diagram))}</desc>'
        + "".join(parts)
        + "</svg>"
    )


def printable(text: str) -> str:
    """A text without what no page can show, or what changes the order of letters; names may hold anything."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


def _escaped(text: str) -> str:
    return escape(printable(text))


def _width(box: Box) -> float:
    longest = max(len(box.title) * 7.2, len(box.detail) * 6.2)  # pixels a letter, at the sizes of the style sheet
    return max(_WIDTH if box.kind != "value" else 72.0, longest + 18)


def _box(box: Box, middle: Point, width: float) -> str:
    x, y = middle
    if box.kind == "sign":
        return (
            f'<g class="{box.kind}"><circle cx="{x:.1f}" cy="{y:.1f}" r="{_HEIGHT / 2:g}"/>'
            f'<text x="{x:.1f}" y="{y:.1f}">{_escaped(box.title)}</text></g>'
        )
    radius = _HEIGHT / 2 if box.kind == "value" else 6
    shape = (
        f'<rect x="{x - width / 2:.1f}" y="{y - _HEIGHT / 2:.1f}" width="{width:.1f}" height="{_HEIGHT:g}" '
        f'rx="{radius:g}"/>'
    )
    title_y, detail = y, ""
    if box.detail:
        title_y = y - 7
        detail = f'<text class="detail" x="{x:.1f}" y="{y + 9:.1f}">{_escaped(box.detail)}</text>'
    return f'<g class="{box.kind}">{shape}<text x="{x:.1f}" y="{title_y:.1f}">{_escaped(box.title)}</text>{detail}</g>'


def _curve(points: Sequence[Point]) -> str:
    """An arrow that leaves a box downwards, runs straight through every row between, and enters the next from above."""
    x, y = points[0]
    path = [f"M{x:.1f} {y + _HEIGHT / 2:.1f}"]
    previous = (x, y + _HEIGHT / 2)
    for index, (x, y) in enumerate(points[1:], start=1):
        end = y - _HEIGHT / 2 - (4 if index == len(points) - 1 else 0)
        bend = (previous[1] + end) / 2
        path.append(f"C{previous[0]:.1f} {bend:.1f} {x:.1f} {bend:.1f} {x:.1f} {end:.1f}")
        if index < len(points) - 1:
            path.append(f"V{y + _HEIGHT / 2:.1f}")
        previous = (x, y + _HEIGHT / 2)
    x, y = points[-1]
    tip = y - _HEIGHT / 2
    arrow = f'<path class="tip" d="M{x:.1f} {tip:.1f}l-4 -7h8z"/>'
    return f'<path class="edge" d="{"".join(path)}"/>{arrow}'

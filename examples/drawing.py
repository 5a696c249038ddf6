"""The demo's picture: a block as it was trained and as it is deployed, and how long the network takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path as FilePath
from typing import Any

import matplotlib as mpl

mpl.use("Agg")  # a picture in a file needs no display

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Patch
from matplotlib.path import Path
from torch import fx, nn

INK, FAINT, LINE = "#1f2933", "#7b8794", "#9aa5b1"
CONVOLUTION, NORM, SUM, VALUE = "#2f6fb0", "#d9822b", "#52606d", "#e4e7eb"
TRAINED, COMPILED = "#b8c4d0", CONVOLUTION
WIDTH, HEIGHT, COLUMN, GAP = 2.1, 0.64, 2.4, 2.6  # of a box; between columns and blocks; rows are one apart
ARROW = {"arrowstyle": "-|>", "color": INK, "lw": 2.2, "mutation_scale": 20}


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one inference of ``batch`` images: the quartiles over many rounds."""

    name: str
    batch: int
    low: float
    median: float
    high: float


@dataclass(frozen=True)
class Fact:
    """One line of the table of what changed, and what did not."""

    name: str
    before: str
    after: str


@dataclass(frozen=True)
class Layout:
    """Where each node of a graph is drawn, and through which points each of its edges runs, as (column, row)."""

    places: dict[fx.Node, tuple[float, float]]
    edges: dict[tuple[fx.Node, fx.Node], list[tuple[float, float]]]

    @property
    def rows(self) -> float:
        """The last row."""
        return max(row for _, row in self.places.values())


def arrange(graph: fx.Graph) -> Layout:
    """Lay ``graph`` out in rows, every node below its inputs; an edge over several rows has a lane of its own.

    This is the layered drawing of Sugiyama et al. (1981) without its search for the fewest crossings: in the blocks
    drawn here, the order in which the graph computes has none.
    """
    row: dict[fx.Node, int] = {}
    for node in graph.nodes:
        row[node] = max((row[source] + 1 for source in node.all_input_nodes), default=0)
    edges = [(source, node) for node in graph.nodes for source in node.all_input_nodes]

    # A lane is an edge's stand-in in each row that the edge passes, so that no box is drawn over it.
    rows: list[list[Any]] = [
        [node for node in graph.nodes if row[node] == index] for index in range(max(row.values()) + 1)
    ]
    for source, node in edges:
        for index in range(row[source] + 1, row[node]):
            rows[index].append((source, node))
    place = {
        (item, index): (position - (len(items) - 1) / 2, float(index))
        for index, items in enumerate(rows)
        for position, item in enumerate(items)
    }

    def points(source: fx.Node, node: fx.Node) -> list[tuple[float, float]]:
        lane = [place[(source, node), index] for index in range(row[source] + 1, row[node])]
        return [place[source, row[source]], *lane, place[node, row[node]]]

    return Layout({node: place[node, row[node]] for node in graph.nodes}, {edge: points(*edge) for edge in edges})


def label(node: fx.Node, root: nn.Module) -> tuple[str, str]:
    """Return a node's text and its colour."""
    match root.get_submodule(str(node.target)) if node.op == "call_module" else node.op:
        case nn.Conv2d() as conv:
            kind = " depthwise" if conv.groups == conv.in_channels > 1 else ""
            return "×".join(map(str, conv.kernel_size)) + kind + "\nconvolution", CONVOLUTION
        case nn.BatchNorm2d():
            return "batch norm", NORM
        case nn.Module() as module:
            return type(module).__name__, SUM
        case "placeholder" | "output":
            return {"placeholder": "input", "output": "output"}[node.op], VALUE
        case _:
            return "+" if "add" in node.name else node.name, SUM


def draw_block(axes: Axes, block: fx.GraphModule, title: str, left: float, rows: float) -> float:
    """Draw the graph of ``block`` right of ``left``, centred in a column of ``rows`` rows; return its right edge."""
    layout = arrange(block.graph)
    columns = [column for points in layout.edges.values() for column, _ in points]
    x0, y0 = left + WIDTH / 2 - min(columns) * COLUMN, (rows - layout.rows) / 2
    right = x0 + max(columns) * COLUMN + WIDTH / 2

    for (source, reader), points in layout.edges.items():
        line = [(x0 + column * COLUMN, y0 + row) for column, row in points]
        axes.add_patch(edge(line))
        if source.op == "placeholder" and label(reader, block)[0] == "+":
            axes.text(line[1][0] - 0.15, line[1][1], "identity", color=INK, ha="right", va="center", fontsize=11.5)
    for node, (column, row) in layout.places.items():
        text, colour = label(node, block)
        x, y = x0 + column * COLUMN, y0 + row
        axes.add_patch(box(x, y, text, colour))
        ink = INK if colour == VALUE else "white"
        axes.text(x, y, text, color=ink, ha="center", va="center", fontsize=11.5, linespacing=1.2, zorder=3)

    kernels = sum(node.op not in ("placeholder", "output") for node in block.graph.nodes)
    heading = f"{title}: {kernels} kernel" + ("s" if kernels > 1 else "")
    axes.text((left + right) / 2, -1.0, heading, color=INK, ha="center", va="center", fontsize=14)
    return right


def edge(points: Sequence[tuple[float, float]]) -> FancyArrowPatch:
    """An arrow from the box at the first point to the box at the last, through the lanes between."""
    vertices, codes = [(points[0][0], points[0][1] + HEIGHT / 2)], [Path.MOVETO]
    for x, y in points[1:]:
        before, bend = vertices[-1][0], (vertices[-1][1] + y - HEIGHT / 2) / 2
        vertices += [(before, bend), (x, bend), (x, y - HEIGHT / 2), (x, y + HEIGHT / 2)]
        codes += [Path.CURVE4] * 3 + [Path.LINETO]
    path = Path(vertices[:-1], codes[:-1])  # without the stretch inside the box where it ends
    return FancyArrowPatch(path=path, arrowstyle="-|>", mutation_scale=13, color=LINE, lw=1.7, zorder=1)


def box(x: float, y: float, text: str, colour: str) -> Patch:
    """The shape behind a node's text: a circle for a sum, rounded ends for a value, a box for a layer."""
    if text == "+":
        return Circle((x, y), HEIGHT / 2, facecolor=colour, lw=0, zorder=2)
    style = f"round,pad=0,rounding_size={HEIGHT / 2 if colour == VALUE else 0.1}"
    corner = (x - WIDTH / 2, y - HEIGHT / 2)
    return FancyBboxPatch(corner, WIDTH, HEIGHT, boxstyle=style, facecolor=colour, lw=0, zorder=2)


def draw_blocks(axes: Axes, trained: fx.GraphModule, compiled: fx.GraphModule) -> None:
    """Draw a block before and after, to one scale, with an arrow from one to the other."""
    rows = max(arrange(block.graph).rows for block in (trained, compiled))
    middle = draw_block(axes, trained, "A token mixer as trained", 0, rows)
    right = draw_block(axes, compiled, "and as deployed", middle + GAP, rows)
    axes.annotate("", (middle + GAP - 0.3, rows / 2), (middle + 0.3, rows / 2), arrowprops=ARROW)
    axes.text(
        middle + GAP / 2, rows / 2 - 0.35, "reparam.compile", color=INK, ha="center", fontsize=11.5, family="monospace"
    )
    axes.set(xlim=(0, right), ylim=(rows + HEIGHT / 2, -1.2), aspect="equal", anchor="W")
    axes.axis("off")


def draw_facts(axes: Axes, facts: Sequence[Fact]) -> None:
    """Write the facts as a table without lines."""
    axes.axis("off")
    axes.set(xlim=(0, 1), ylim=(len(facts) + 1.5, -0.5))
    axes.text(0, 0, "The whole network", color=INK, ha="left", va="center", fontsize=14)
    for x, heading in ((0.68, "trained"), (1.0, "compiled")):
        axes.text(x, 1, heading, color=FAINT, ha="right", va="center", fontsize=11.5)
    for row, fact in enumerate(facts, start=2):
        axes.text(0.0, row, fact.name, color=INK, ha="left", va="center", fontsize=11.5)
        axes.text(0.68, row, fact.before, color=INK, ha="right", va="center", fontsize=12)
        axes.text(1.0, row, fact.after, color=COMPILED, ha="right", va="center", fontsize=12, weight="bold")


def draw_latencies(axes: Axes, latencies: Sequence[Latency]) -> None:
    """Draw a bar a runner, each compiled one after its trained one: the median, with a whisker between quartiles."""
    names = [latency.name for latency in latencies]
    medians = [latency.median for latency in latencies]
    spread = [
        [latency.median - latency.low for latency in latencies],
        [latency.high - latency.median for latency in latencies],
    ]
    colours = [COMPILED if "compiled" in name else TRAINED for name in names]
    axes.barh(names, medians, xerr=spread, color=colours, height=0.62, ecolor=INK, error_kw={"lw": 1.2})
    for row, latency in enumerate(latencies):
        text = f"  {latency.median:.2f} ms"
        if "compiled" in latency.name:
            text += f", {latencies[row - 1].median / latency.median:.1f}× as fast"
        axes.text(latency.high, row, text, va="center", color=INK, fontsize=11)
    axes.set_xlim(0, max(latency.high for latency in latencies) * 1.22)
    axes.invert_yaxis()
    axes.tick_params(length=0, labelsize=11, labelcolor=INK)
    axes.xaxis.set_visible(False)
    axes.spines[:].set_visible(False)


def draw(
    path: FilePath,
    title: str,
    trained: fx.GraphModule,
    compiled: fx.GraphModule,
    facts: Sequence[Fact],
    latencies: Sequence[Latency],
) -> None:
    """Write the picture, 1600 pixels wide.

    Args:
        path: The PNG file to write.
        title: What the picture is of.
        trained: A block of the training-time network, traced.
        compiled: The same block after compilation, traced.
        facts: What to say about the whole network.
        latencies: What to draw as bars, the batch sizes one after the other.
    """
    figure = plt.figure(figsize=(16, 10.4), dpi=100, facecolor="white")
    figure.suptitle(title, x=0.035, y=0.965, ha="left", fontsize=21, weight="bold", color=INK)

    draw_blocks(figure.add_axes((0.035, 0.36, 0.62, 0.53)), trained, compiled)
    draw_facts(figure.add_axes((0.70, 0.43, 0.265, 0.48)), facts)

    batches = {batch: list(group) for batch, group in groupby(latencies, key=lambda latency: latency.batch)}
    for column, (batch, group) in enumerate(batches.items()):
        axes = figure.add_axes((0.17 + column * 0.49, 0.05, 0.305, 0.22))
        images = "one image" if batch == 1 else f"{batch} images"
        heading = f"Latency of {images}, one thread: median and quartiles"
        axes.set_title(heading, fontsize=14, color=INK, pad=8, loc="left", x=-0.44)
        draw_latencies(axes, group)
    figure.savefig(path)
    plt.close(figure)

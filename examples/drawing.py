"""The demo's picture: a block as it was trained and as it is deployed, and how long the network takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path as FilePath

import matplotlib as mpl

mpl.use("Agg")  # a picture in a file needs no display

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Patch
from matplotlib.path import Path
from torch import fx

from reparam.page.drawing import Diagram, Layout, arrange, diagram_of

INK, FAINT, LINE = "#1f2933", "#7b8794", "#9aa5b1"
COLOURS = {"convolution": "#2f6fb0", "norm": "#d9822b", "sign": "#52606d", "other": "#52606d", "value": "#e4e7eb"}
TRAINED, COMPILED = "#b8c4d0", COLOURS["convolution"]
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


def laid_out(block: fx.GraphModule) -> tuple[Diagram, Layout]:
    """What to draw of a block, and where, in the units of this picture."""
    diagram = diagram_of(block)
    widths = [HEIGHT if box.kind == "sign" else WIDTH for box in diagram.boxes]
    return diagram, arrange(diagram, widths, gap=COLUMN - WIDTH, lane=WIDTH / 2)


def draw_block(axes: Axes, block: fx.GraphModule, title: str, left: float, rows: float) -> float:
    """Draw the graph of ``block`` right of ``left``, centred in a column of ``rows`` rows; return its right edge."""
    diagram, layout = laid_out(block)
    across = [x for points in layout.edges.values() for x, _ in points]
    x0, y0 = left + WIDTH / 2 - min(across), (rows - layout.rows) / 2
    right = x0 + max(across) + WIDTH / 2

    for (source, reader), points in layout.edges.items():
        line = [(x0 + x, y0 + row) for x, row in points]
        axes.add_patch(edge(line))
        if diagram.boxes[source].title == "input" and diagram.boxes[reader].title == "+":
            axes.text(line[1][0] + 0.15, line[1][1], "identity", color=INK, ha="left", va="center", fontsize=11.5)
    for node, (column, row) in zip(diagram.boxes, layout.places, strict=True):
        x, y = x0 + column, y0 + row
        axes.add_patch(box(x, y, node.kind))
        ink = INK if node.kind == "value" else "white"
        text = "\n".join(filter(None, (node.title, node.detail)))
        axes.text(x, y, text, color=ink, ha="center", va="center", fontsize=11.5, linespacing=1.2, zorder=3)

    calls = diagram.calls
    heading = f"{title}: {calls} kernel" + ("s" if calls > 1 else "")
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


def box(x: float, y: float, kind: str) -> Patch:
    """The shape behind a box's text: a circle for a sum, rounded ends for a value, a box for a layer."""
    if kind == "sign":
        return Circle((x, y), HEIGHT / 2, facecolor=COLOURS[kind], lw=0, zorder=2)
    style = f"round,pad=0,rounding_size={HEIGHT / 2 if kind == 'value' else 0.1}"
    corner = (x - WIDTH / 2, y - HEIGHT / 2)
    return FancyBboxPatch(corner, WIDTH, HEIGHT, boxstyle=style, facecolor=COLOURS[kind], lw=0, zorder=2)


def draw_blocks(axes: Axes, trained: fx.GraphModule, compiled: fx.GraphModule) -> None:
    """Draw a block before and after, to one scale, with an arrow from one to the other."""
    rows = max(laid_out(block)[1].rows for block in (trained, compiled))
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

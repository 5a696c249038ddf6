"""A benchmark as a chart: a group of bars for each runtime, whiskers from quartile to quartile."""

from __future__ import annotations

from pathlib import Path

from reparam.atomic import atomic_write
from reparam.bench.racing import Benchmark
from reparam.errors import ReparamError

_FORMATS = (".png", ".svg", ".pdf")
_INK, _FAINT = "#22272e", "#8b949e"
_COLOURS = ("#b8bec6", "#e3a04f", "#2f6fb3", "#3d9970")  # distinct in grey, too, and to the colour-blind


def require(path: Path) -> None:
    """Make sure that a chart can be written, before hours are spent on measuring.

    Raises:
        ReparamError: matplotlib is missing, or cannot write files of this extension.
    """
    if path.suffix.lower() not in _FORMATS:
        raise ReparamError(f"{path}: a chart ends in {', '.join(_FORMATS)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ReparamError(f"a chart needs matplotlib ({error}): pip install matplotlib") from error


def draw(result: Benchmark, path: Path, title: str) -> None:
    """Write a chart of the median times, with quartiles; what was not timed says so in its place.

    Args:
        result: What was measured.
        path: Where to: ``.png``, ``.svg`` or ``.pdf``.
        title: What was measured, above the chart.

    Raises:
        ReparamError: matplotlib is missing, or cannot write files of this extension.
    """
    require(path)
    from matplotlib.figure import Figure  # no pyplot: nothing may open a window, or keep the figure alive

    runtimes = list(dict.fromkeys(row.runtime for row in result.rows))
    graphs = list(dict.fromkeys(row.graph for row in result.rows))
    times = {(row.graph, row.runtime): row.timing for row in result.rows}
    height = 0.8 / len(graphs)
    figure = Figure(figsize=(8, 1.6 + 0.36 * len(runtimes) * (len(graphs) + 0.7)), layout="constrained")
    axes = figure.add_subplot()
    for index, graph in enumerate(graphs):
        for place, runtime in enumerate(runtimes):
            y = place + (index - (len(graphs) - 1) / 2) * height
            time = times.get((graph, runtime))
            if time is None:
                axes.text(0, y, f"  {graph}: not timed", va="center", color=_FAINT, fontsize=8)
                continue
            spread = [[(time.median - time.low) * 1e3], [(time.high - time.median) * 1e3]]
            axes.barh(y, time.median * 1e3, height * 0.9, color=_COLOURS[index % len(_COLOURS)])
            axes.errorbar(time.median * 1e3, y, xerr=spread, color=_INK, capsize=2, linewidth=1)
            axes.text(time.high * 1e3, y, f"  {time.median * 1e3:.2f}", va="center", color=_INK, fontsize=8)
    _dress(axes, figure, result, title, runtimes, graphs)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=160, format=path.suffix[1:].lower())


def _dress(axes, figure, result: Benchmark, title: str, runtimes: list[str], graphs: list[str]) -> None:  # type: ignore[no-untyped-def]
    """Everything around the bars."""
    from matplotlib.patches import Patch

    axes.set_yticks(range(len(runtimes)), runtimes)
    axes.set_ylim(len(runtimes) - 0.4, -0.6)
    timed = [row.timing.high * 1e3 for row in result.rows if row.timing]
    axes.set_xlim(0, 1.12 * max(timed, default=1.0))
    axes.set_xlabel("ms for one inference: median, and whiskers from quartile to quartile")
    axes.set_title(f"{title}\n{result.conditions}", loc="left", color=_INK, fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    handles = [Patch(color=_COLOURS[i % len(_COLOURS)], label=graph) for i, graph in enumerate(graphs)]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(graphs), frameon=False)

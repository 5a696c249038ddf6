"""One self-contained HTML page about a compilation: drawings, counts, remarks, verification, latencies.

The page asks for nothing from anywhere, runs no script, and follows the reader's light or dark colours. Whatever it
says of a model is escaped: names of modules are untrusted.
"""

from __future__ import annotations

import datetime
import math
import platform
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.export
import torch.fx
from torch import nn
from torch.fx import Node

from reparam import capture as capturing
from reparam import timing
from reparam.atomic import atomic_write
from reparam.capture import exported
from reparam.compare import as_call
from reparam.deploy.model import graph_of
from reparam.errors import ReparamError, first_line
from reparam.graph import facts, measure
from reparam.graph.graph import Graph
from reparam.page import drawing
from reparam.page.drawing import Diagram
from reparam.report import Remark, Report

_LARGEST = 40  # boxes in one drawing, where a module can be drawn in parts
_TOO_LARGE = 150  # for any drawing
_FEWEST_ROUNDS, _MOST_ROUNDS = 5, 50  # of timing
_CHART_ROW = 72  # pixels


@dataclass(frozen=True)
class Block:
    """A module of which a network has one or several, all of one structure.

    Attributes:
        kind: Its class.
        paths: Where it is.
        before: What it computes in training form.
        after: What is left of it; empty where its parts went into layers elsewhere.
    """

    kind: str
    paths: tuple[str, ...]
    before: Diagram
    after: Diagram

    @property
    def changed(self) -> bool:
        """Whether compiling it made a difference."""
        return self.before != self.after


@dataclass(frozen=True)
class Latency:
    """A bar of a chart.

    Attributes:
        name: What was run.
        timing: Seconds.
        compiled: Whether it is a compiled graph.
    """

    name: str
    timing: timing.Timing
    compiled: bool


@dataclass(frozen=True)
class Chart:
    """Latencies that were measured in one run.

    Attributes:
        conditions: What was run how, such as ``1×3×224×224, 2 threads``.
        bars: One each; the others are compared with the first.
    """

    conditions: str
    bars: tuple[Latency, ...]


def write(
    path: str | Path,
    model: nn.Module | torch.export.ExportedProgram,
    compiled: nn.Module,
    example_inputs: Any = None,
    *,
    title: str | None = None,
    charts: Sequence[Chart] = (),
) -> None:
    """Write the page on a compilation, completely or not at all.

    Args:
        path: The ``.html`` file.
        model: The training-time model.
        compiled: What :func:`reparam.compile` made of it.
        example_inputs: As :func:`reparam.compile` was given.
        title: The heading; the model's class when left out.
        charts: Latencies to draw, from :func:`time` or :func:`chart_of`.

    Raises:
        ReparamError: ``compiled`` has no report.
        ExportError: ``path`` cannot be written.
    """
    text = render(model, compiled, example_inputs, title=title, charts=charts)
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def render(
    model: nn.Module | torch.export.ExportedProgram,
    compiled: nn.Module,
    example_inputs: Any = None,
    *,
    title: str | None = None,
    charts: Sequence[Chart] = (),
) -> str:
    """The page as text; arguments and errors as for :func:`write`."""
    from jinja2 import Environment, PackageLoader

    report = getattr(compiled, "report", None)
    if not isinstance(report, Report):
        raise ReparamError(f"a {type(compiled).__name__} has no report; give what reparam.compile returned")
    blocks = distinct_blocks(model, compiled, example_inputs)
    environment = Environment(
        loader=PackageLoader("reparam.page", "templates"),
        autoescape=True,
        finalize=lambda value: drawing.printable(value) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=_number, change=_change, plural=_plural)
    facts = _facts(model, report, example_inputs)
    return environment.get_template("report.html").render(
        title=title or facts["Class"],
        facts=facts,
        report=report,
        counts=_counts(report),
        blocks=[_drawn(block, f"block-{index}") for index, block in enumerate(blocks) if block.changed],
        unchanged=[block for block in blocks if not block.changed],
        remarks=[(kind, _grouped(r for r in report.remarks if r.kind == kind)) for kind in _KINDS],
        charts=[_drawn_chart(chart) for chart in charts if chart.bars],
    )


_KINDS = ("missed", "fused", "capture")


# --- Blocks -------------------------------------------------------------------------------------------------------


def distinct_blocks(
    model: nn.Module | torch.export.ExportedProgram, compiled: nn.Module, example_inputs: Any = None
) -> list[Block]:
    """The blocks that a network is made of, each structure once, in the order in which they run.

    A module is a block that computes something of its own, such as a sum of its branches, or has layers of its own,
    and is small enough to be drawn; a module that only calls others one after the other is drawn in parts. Two are
    the same where their classes are, and the drawings of both, before and after, with all channels and sizes.

    Args:
        model: The training-time model.
        compiled: What :func:`reparam.compile` made of it.
        example_inputs: As :func:`reparam.compile` was given.
    """
    found: dict[tuple[str, Diagram, Diagram], list[str]] = {}
    for prefix, before, after in _graphs(model, compiled, example_inputs):
        for part in _parts(before):
            was, is_now = (drawing.diagram(part.nodes(graph), graph) for graph in (before, after))
            if was.calls:
                where = ".".join(filter(None, (prefix, part.path)))
                found.setdefault((part.kind(before), was, is_now), []).append(where)
    return [Block(kind, tuple(paths), was, is_now) for (kind, was, is_now), paths in found.items()]


def _graphs(
    model: nn.Module | torch.export.ExportedProgram, compiled: nn.Module, example_inputs: Any
) -> Iterator[tuple[str, Graph, Graph]]:
    """Every graph in a compiled model under its path, before and after."""
    call = None if example_inputs is None else as_call(example_inputs)
    if isinstance(model, torch.export.ExportedProgram):
        captured = exported.read(model, call)[1]
    else:
        captured = capturing.capture(model, call)
    before = dict(_captures("", captured))
    for path, part in compiled.named_modules():
        graph = graph_of(part)
        if graph is not None and path in before:
            yield path, Graph(before[path].graph, before[path].modules), Graph(graph.graph, dict(graph.named_modules()))


def _captures(path: str, captured: capturing.Capture) -> Iterator[tuple[str, capturing.Capture]]:
    """A capture, and those of the parts in it, under their paths."""
    if captured.traced:
        yield path, captured
    for name, part in captured.parts.items():
        yield from _captures(f"{path}.{name}" if path else name, part)


@dataclass(frozen=True)
class _Part:
    """A module, without those inside of it that are drawn by themselves."""

    path: str
    without: tuple[str, ...] = ()

    def nodes(self, graph: Graph) -> list[Node]:
        """Its nodes, before or after."""
        return [
            node
            for node in graph.fx.nodes
            if node.op != "output"
            and _is_within(_scope(node), self.path)
            and not any(_is_within(_scope(node), other) for other in self.without)
        ]

    def kind(self, graph: Graph) -> str:
        """What the reader is told that it is."""
        name = type(graph.modules[self.path]).__name__
        return f"{name}, its own layers" if self.without else name


def _scope(node: Node) -> str:
    is_known = facts.of(node) != facts.Facts()
    return facts.of(node).scope if is_known or node.op != "call_module" else str(node.target)


def _is_within(path: str, outer: str) -> bool:
    return not outer or path == outer or path.startswith(outer + ".")


def _parts(graph: Graph, path: str = "") -> Iterator[_Part]:
    """What to draw in or below the module at ``path``, in the order in which it runs."""
    nodes = [node for node in _Part(path).nodes(graph) if measure.kinds_of(node, graph.modules)]
    sizes = Counter(_child(path, _scope(node)) for node in nodes)
    inner = tuple(child for child, size in sizes.items() if child is not None and size > 1)
    loose = [node for node in nodes if _child(path, _scope(node)) not in inner]
    composes = all(measure.kinds_of(node, graph.modules)[0] == "other" for node in loose)
    branches = any(sum(source.op != "get_attr" for source in node.all_input_nodes) > 1 for node in nodes)
    if not inner or (len(nodes) <= _LARGEST and not (composes and branches)):
        if nodes:
            yield _Part(path)
        return
    if not composes:
        yield _Part(path, inner)
    for child in inner:
        yield from _parts(graph, child)


def _child(path: str, scope: str) -> str | None:
    """The module directly inside of ``path`` that ``scope`` is, or lies in."""
    if scope == path:
        return None
    end = scope.find(".", len(path) + 1 if path else 0)
    return scope if end < 0 else scope[:end]


def _drawn(block: Block, name: str) -> dict[str, Any]:
    """A block as the template shows it."""
    from markupsafe import Markup

    def draw(diagram: Diagram, form: str) -> str | None:
        if not 0 < len(diagram.boxes) <= _TOO_LARGE:
            return None
        return drawing.svg(diagram, f"{name}-{form}", f"{block.kind}, {form} compiling")

    sides = {form: draw(diagram, form) for form, diagram in (("before", block.before), ("after", block.after))}
    return {"block": block, **{form: side and Markup(side) for form, side in sides.items()}}  # escaped by svg


# --- Words and numbers --------------------------------------------------------------------------------------------


def _facts(model: nn.Module | torch.export.ExportedProgram, report: Report, example_inputs: Any) -> dict[str, str]:
    """What the model is, and what it was compiled with."""
    from importlib.metadata import version

    plain = model if isinstance(model, torch.export.ExportedProgram) else capturing.unwrapped(model)
    facts = {"Class": f"{type(plain).__module__}.{type(plain).__qualname__}"}
    if example_inputs is not None:
        facts["Example inputs"] = _shapes(example_inputs)
    saved = report.before.kernels - report.after.kernels
    facts["Rewrites"] = f"{len(report.fused):,}, which save {saved:,} of {report.before.kernels:,} kernels"
    facts["Made with"] = f"reparam {version('reparam')}, torch {torch.__version__}, {platform.machine()}"
    facts["On"] = datetime.date.today().isoformat()
    return facts


def _shapes(example_inputs: Any) -> str:
    """The tensors of a call: ``1×3×224×224 float32``."""
    return ", ".join(
        f"{'×'.join(map(str, leaf.shape)) or 'one number'} {str(leaf.dtype).removeprefix('torch.')}"
        for leaf in torch.utils._pytree.tree_leaves(as_call(example_inputs))
        if isinstance(leaf, torch.Tensor)
    )


def _counts(report: Report) -> list[tuple[str, int, int]]:
    """Rows of the table of counts."""
    after = asdict(report.after)
    return [
        (name.replace("_", "-"), before, after[name])
        for name, before in asdict(report.before).items()
        if before is not None and (before or after[name])
    ]


def _grouped(remarks: Iterable[Remark]) -> list[tuple[str, list[tuple[str, list[str]]]]]:
    """Remarks as (rule, [(message, places)]), those that say the same of several places together."""
    rules: dict[str, dict[str, list[str]]] = {}
    for remark in remarks:
        rules.setdefault(remark.rule, {}).setdefault(remark.message, []).append(remark.where or "(model)")
    return [(rule, list(messages.items())) for rule, messages in rules.items()]


def _number(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"


def _change(before: int, after: int) -> str:
    """How much less or more, in per cent."""
    if not before or before == after:
        return ""
    change = (after - before) / before
    return f"{change:+.{0 if abs(change) >= 0.01 else 1}%}".replace("-", "−")


def _plural(count: int, word: str) -> str:
    return f"{count:,} {word}{'' if count == 1 else 's'}"


# --- Latencies ----------------------------------------------------------------------------------------------------


def time(
    model: nn.Module | torch.export.ExportedProgram,
    compiled: nn.Module,
    example_inputs: Any,
    *,
    seconds: float = 10.0,
) -> Chart:
    """Time the training graph against the compiled one on this machine, in eager mode, one call each in turns.

    Args:
        model: The training-time model; it is run in eval mode.
        compiled: What :func:`reparam.compile` made of it.
        example_inputs: What to run both on.
        seconds: About how long to measure: there are five rounds at least, and fifty at most.
    """
    args, kwargs = as_call(example_inputs)
    trained = model.module() if isinstance(model, torch.export.ExportedProgram) else capturing.private_copy(model)
    contestants = {
        "training graph, eager": lambda: trained(*args, **kwargs),
        "compiled graph, eager": lambda: compiled(*args, **kwargs),
    }
    with torch.inference_mode():
        measured = timing.measure(contestants, _MOST_ROUNDS, least=_FEWEST_ROUNDS, patience=seconds)
    conditions = f"{_shapes(example_inputs)}, {_plural(torch.get_num_threads(), 'thread')}, PyTorch"
    return Chart(conditions, tuple(Latency(name, it, "compiled" in name) for name, it in measured.items()))


def chart_of(benchmark: Any) -> Chart:
    """What ``reparam bench --json`` printed, as a chart.

    Args:
        benchmark: The JSON value; its ``rows`` have ``graph``, ``runtime`` and ``seconds``.

    Raises:
        ReparamError: It is something else.
    """
    try:
        bars = tuple(
            Latency(f"{row['graph']} graph, {row['runtime']}", _timing(row["seconds"]), "compiled" in row["graph"])
            for row in benchmark["rows"]
            if row["seconds"] is not None
        )
        conditions = f"{benchmark['model']}, {_plural(int(benchmark['threads']), 'thread')}"
        if benchmark.get("clock", "wall") != "wall":
            conditions += f", {benchmark['clock']} time"
    except (KeyError, TypeError, ValueError) as error:
        raise ReparamError(
            f"this is not what reparam bench --json prints ({type(error).__name__}: {first_line(error)})"
        ) from error
    return Chart(conditions, bars)


def _timing(seconds: Any) -> timing.Timing:
    found = timing.Timing(*(float(seconds[name]) for name in ("median", "low", "high")))
    if not 0 < found.low <= found.median <= found.high < math.inf:
        raise ValueError(f"{seconds} are no times")
    return found


def _drawn_chart(chart: Chart) -> dict[str, Any]:
    """A chart's geometry, across in per cent of its width, so that it fits every screen with letters of one size."""
    scale = 100 / max(bar.timing.high for bar in chart.bars)
    slowest = chart.bars[0].timing.median
    rows = [
        {
            "latency": bar,
            "y": index * _CHART_ROW,
            "text": f"{bar.timing.median * 1e3:.2f} ms ({bar.timing.low * 1e3:.2f} to {bar.timing.high * 1e3:.2f})",
            "ratio": f"{slowest / bar.timing.median:.2f}× as fast" if index else "",
            "median": bar.timing.median * scale,
            "low": bar.timing.low * scale,
            "high": bar.timing.high * scale,
        }
        for index, bar in enumerate(chart.bars)
    ]
    return {"conditions": chart.conditions, "rows": rows, "height": len(rows) * _CHART_ROW}

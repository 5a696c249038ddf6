"""Every architecture of timm: does it compile, to the same function, to no more than anybody else leaves?

    python benchmarks/zoo.py [--models PATTERN ...] [--jobs 2] [--check] [--json FILE] [--markdown FILE]

One model stands for each of timm's architecture files: the registered one with the fewest parameters. The list is made
by this script, and kept in zoo_models.json for as long as timm's version does not change. Each model runs in a process
of its own, so one that crashes or takes too long costs its row and no other.

Weights are random, statistics and affines lived-in. Images are the smallest that a model accepts and that leave a last
feature map with an inside and a border, else of the model's own size. The compiler sees one of them as its example;
outputs are compared on two others. What each way leaves over is counted in the operators that PyTorch dispatches.
"""

from __future__ import annotations

import fnmatch
import json
import multiprocessing
import multiprocessing.connection
import os
import platform
import re
import signal
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import reparam
from common import (
    console,
    count_calls,
    parser,
    relative_error,
    reparameterize_model,
    timm,
    training_model,
    write_json,
)

CHOICES = Path(__file__).with_name("zoo_models.json")
# Networks reduce by 32, as a rule: a last map of 3x3 is the smallest with an inside.
SIZES = (96, 128, 160, 192, 224, 256)
WRONG = 1e-4  # of the largest output, in float32
WRONG_IN_DOUBLE = 1e-9

PEERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "training graph": lambda model: model,
    "torch.fx": fuse,
    "timm": reparameterize_model,
}
NORM_LAYERS = {
    nn.modules.batchnorm._BatchNorm: "batch",
    nn.modules.instancenorm._InstanceNorm: "instance",
    nn.LayerNorm: "layer",
    nn.GroupNorm: "group",
    nn.RMSNorm: "rms",
    nn.LocalResponseNorm: "local response",
}
NORM_FUNCTIONS = ("batch_norm", "instance_norm", "layer_norm", "group_norm", "rms_norm", "local_response_norm")


@dataclass
class Outcome:
    """What one way left of a model, counted while it ran, or why it left nothing.

    Attributes:
        norms: Normalisations by kind.
        products: Convolutions and matrix products.
        elementwise: Arithmetic, activations not included.
        kernels: The three above and all others.
        error: Largest difference from the training graph's output, relative to that output's largest magnitude.
        failure: The error that the tool raised.
    """

    norms: dict[str, int] = field(default_factory=dict)
    products: int = 0
    elementwise: int = 0
    kernels: int = 0
    error: float = 0.0
    failure: str = ""

    @property
    def right(self) -> bool:
        return not self.failure and self.error < WRONG

    @property
    def norm_count(self) -> int:
        return sum(self.norms.values())


@dataclass
class Left:
    """A norm in the compiled model: its path, its kind, and what the report says about it."""

    where: str
    kind: str
    reasons: list[str]


@dataclass
class Row:
    """What became of one model.

    Attributes:
        file: timm's architecture file, or the name of the model where that was asked for.
        model: timm's name.
        parameters: How many it has.
        image: Channels, height, width.
        capture: ``traced``, ``partly opaque`` or ``untraced``.
        opaque: Modules that were kept as Python: their paths, and why.
        failure: Why there is no result.
        seconds: Processor time of ``reparam.compile``, all verification included.
        counts: The report's norms and kernels, before and after.
        error_in_double: Where float32 differs by more than is allowed: the difference when all is done in float64.
        ours: What the compiler left.
        peers: What the others left.
        left: Every norm that stayed.
    """

    file: str
    model: str = ""
    parameters: int = 0
    image: list[int] = field(default_factory=list)
    capture: str = ""
    opaque: dict[str, str] = field(default_factory=dict)
    failure: str = ""
    seconds: float = 0.0
    counts: dict[str, list[int]] = field(default_factory=dict)
    error_in_double: float | None = None
    ours: Outcome = field(default_factory=Outcome)
    peers: dict[str, Outcome] = field(default_factory=dict)
    left: list[Left] = field(default_factory=list)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Row:
        row = cls(**values)
        row.ours = Outcome(**values["ours"])
        row.peers = {name: Outcome(**outcome) for name, outcome in values["peers"].items()}
        row.left = [Left(**left) for left in values["left"]]
        return row

    @property
    def wrong(self) -> bool:
        if self.failure or self.ours.error < WRONG:
            return False
        return self.error_in_double is None or not self.error_in_double < WRONG_IN_DOUBLE

    @property
    def unexplained(self) -> list[Left]:
        return [left for left in self.left if not left.reasons]

    @property
    def miscounted(self) -> bool:
        """Whether the report counts more or fewer norms than really ran, before or after."""
        return self.counts["norms"] != [self.peers["training graph"].norm_count, self.ours.norm_count]

    @property
    def better_peers(self) -> list[str]:
        """Those who leave fewer norms, or fewer kernels, and the right output."""
        if self.failure:
            return []
        return [
            name
            for name, peer in self.peers.items()
            if peer.right and (peer.norm_count < self.ours.norm_count or peer.kernels < self.ours.kernels)
        ]


# One model, in a process of its own.


class _NormKinds(TorchDispatchMode):
    """Counts normalisations by kind.

    A batch norm that takes its own statistics is an instance norm, or the standardisation of a weight. PyTorch composes
    an RMS norm of arithmetic before it dispatches anything: there it cannot be seen, and only the report counts it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kinds: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        found = re.search(r"(batch|layer|group|rms)_norm", function.overloadpacket.__name__)
        if found:
            own_statistics = found[1] == "batch" and "no_training" not in str(function) and args[5] is True
            self.kinds["instance" if own_statistics else found[1]] += 1
        return function(*args, **(kwargs or {}))


def outcome(model: nn.Module, images: Tensor, expected: Any) -> tuple[Outcome, Any]:
    """Run a model once, count what it launches, and compare with ``expected`` if there is any; also its output."""
    outputs: list[Any] = []
    with _NormKinds() as norms:
        calls = count_calls(lambda x: outputs.append(model(x)), images)
    error = 0.0 if expected is None else difference(outputs[0], expected)
    products = calls["convolution"] + calls["linear"]
    kinds = dict(sorted(norms.kinds.items()))
    return Outcome(kinds, products, calls["elementwise"], calls["kernels"], error), outputs[0]


def difference(result: Any, reference: Any) -> float:
    """The largest relative error among all output tensors; infinite where numbers are none."""
    pairs = zip(tree_leaves(result), tree_leaves(reference), strict=True)
    errors = [relative_error(a, b) for a, b in pairs if isinstance(b, Tensor)]
    return max((error if error == error else float("inf") for error in errors), default=float("inf"))


def smallest(file: str) -> str:
    """timm's model of an architecture file with the fewest parameters, the first by name where several have."""
    with torch.device("meta"):
        sizes = {name: count_parameters(timm.create_model(name)) for name in timm.list_models(module=file)}
    return min(sizes, key=lambda name: (sizes[name], name))


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def smallest_image(name: str) -> list[int]:
    """Channels, height and width of the smallest image that a model accepts, or of its own where none is smaller."""
    channels, *own = timm.get_pretrained_cfg(name).input_size
    with torch.device("meta"), torch.no_grad():
        model = timm.create_model(name).eval()
        for size in SIZES:
            if size >= min(own):
                break
            try:
                model(torch.empty(2, channels, size, size))
            except Exception:  # whatever a model says to an image that it does not take
                continue
            return [channels, size, size]
    return [channels, *own]


def first_line(error: BaseException) -> str:
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}"


@torch.no_grad()
def examine(row: Row) -> None:
    """Fill a row in. Raises what the compiler raises."""
    row.model = row.model or smallest(row.file)
    row.image = smallest_image(row.model)
    torch.manual_seed(0)
    model, _ = training_model(row.model)
    row.parameters = count_parameters(model)
    generator = torch.Generator().manual_seed(1)
    example = torch.randn(1, *row.image, generator=generator)
    images = torch.randn(2, *row.image, generator=generator)

    row.peers["training graph"], expected = outcome(model, images, None)
    for name, tool in PEERS.items():
        if name != "training graph":
            try:
                row.peers[name], _ = outcome(tool(model).eval(), images, expected)
            except Exception as error:  # whatever a tool raises is its result
                row.peers[name] = Outcome(failure=first_line(error))

    start = time.process_time()
    compiled = reparam.compile(model, example, sizes="example")
    row.seconds = time.process_time() - start
    row.ours, _ = outcome(compiled, images, expected)
    if not row.ours.error < WRONG:
        model, images = model.double(), images.double()
        row.error_in_double = difference(
            reparam.compile(model, example.double(), sizes="example")(images), model(images)
        )
    report: reparam.Report = compiled.report  # type: ignore[assignment]
    row.counts = {name: [getattr(c, name) for c in (report.before, report.after)] for name in ("norms", "kernels")}
    row.opaque = {remark.where: remark.message for remark in capture_failures(report)}
    row.capture = "untraced" if "" in row.opaque else "partly opaque" if row.opaque else "traced"
    row.left = list(norms_left(compiled, report))


def capture_failures(report: reparam.Report) -> list[reparam.report.Remark]:
    return [remark for remark in report.remarks if remark.kind == "capture" and remark.rule == "Record"]


def norms_left(compiled: nn.Module, report: reparam.Report) -> Iterable[Left]:
    """Every norm of a compiled model, with what the report says about it, or about what it was left in."""
    said: dict[str, list[str]] = {}
    for remark in report.missed:
        said.setdefault(remark.where, []).append(f"{remark.message} [{remark.rule}]")
    opaque = {remark.where: remark.message for remark in capture_failures(report)}

    def reasons(path: str) -> list[str]:
        parts = path.split(".")
        around = [".".join(parts[:length]) for length in range(len(parts) + 1)]
        return said.get(path, []) + [f"not traced: {opaque[outer]}" for outer in around if outer in opaque]

    for path, module in compiled.named_modules():
        kind = next((kind for layer, kind in NORM_LAYERS.items() if isinstance(module, layer)), None)
        if kind is not None:
            yield Left(path, kind, reasons(path))
    if isinstance(compiled, torch.fx.GraphModule):
        graph = reparam.rules.Graph(compiled.graph, dict(compiled.named_modules()))
        for node in compiled.graph.nodes:
            name = getattr(node.target, "__name__", "")
            if node.op == "call_function" and name in NORM_FUNCTIONS:
                yield Left(graph.path(node), name.removesuffix("_norm").replace("_", " "), reasons(graph.path(node)))


def work(row: Row, result: Path) -> None:
    """Fill a row in, in a process of its own, and write it to a file."""
    with open(os.devnull, "w") as nowhere:  # what models print would get in between the lines of the progress bar
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    try:
        examine(row)
    except Exception as error:  # an error is a result
        row.failure = first_line(error)
    result.write_text(json.dumps(asdict(row)))


# All of them.


class _Task:
    """A model being examined in a process of its own; one that crashes or takes too long says so in its row.

    The process is a fork of this one, which has imported everything and has no other threads: PyTorch and timm take
    longer to import than most models take to be examined.
    """

    def __init__(self, row: Row, folder: str, limit: float) -> None:
        self.row = row
        self.limit = limit
        self.deadline = time.monotonic() + limit
        self.result = Path(folder, f"{row.file}.json")
        self.process = multiprocessing.get_context("fork").Process(target=work, args=(row, self.result), daemon=True)
        self.process.start()

    def finished(self) -> bool:
        """Whether it has ended, or been ended because its time was over."""
        late = time.monotonic() > self.deadline
        if self.process.is_alive() and not late:
            return False
        if self.process.is_alive():
            self.process.kill()
            self.row.failure = f"took more than {self.limit:.0f} s"
        self.process.join()
        if self.result.exists() and self.process.exitcode == 0:
            self.row = Row.from_dict(json.loads(self.result.read_text()))
        elif not self.row.failure:
            code = self.process.exitcode or 0
            how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
            self.row.failure = f"the process died of {how}"
        return True


def known_choices() -> dict[str, str]:
    """The smallest model of each file, as far as it is known for this version of timm."""
    if not CHOICES.exists():
        return {}
    kept = json.loads(CHOICES.read_text())
    models: dict[str, str] = kept["models"] if kept["timm"] == timm.__version__ else {}
    return models


def keep_choices(rows: Sequence[Row]) -> None:
    """Note the smallest models for the next run, after a run of all files in which all were found."""
    models = {row.file: row.model for row in rows if row.model}
    if sorted(models) == sorted(timm.list_modules()) and models != known_choices():
        CHOICES.write_text(json.dumps({"timm": timm.__version__, "models": models}, indent=2, sort_keys=True) + "\n")


def tasks(patterns: Sequence[str]) -> list[Row]:
    """A row for each file of timm that a pattern matches, and for each model where it matches no file."""
    files, choices = timm.list_modules(), known_choices()
    rows: dict[str, Row] = {}
    for pattern in patterns:
        matching = fnmatch.filter(files, pattern)
        if matching:
            rows |= {file: Row(file, choices.get(file, "")) for file in matching}
            continue
        models = fnmatch.filter(timm.list_models(), pattern)
        if not models:
            sys.exit(f"no architecture file and no model of timm is called {pattern}")
        rows |= {name: Row(name, name) for name in models}
    return [rows[name] for name in sorted(rows)]


def sweep(rows: Sequence[Row], jobs: int, limit: float) -> Iterator[Row]:
    """Examine all, some at a time; whichever is ready first comes first."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    waiting, running = deque(rows), list[_Task]()
    # It refreshes itself from another thread otherwise, and a process with threads is not to be forked.
    with Progress(*columns, console=console, auto_refresh=False) as progress, tempfile.TemporaryDirectory() as folder:
        bar = progress.add_task("timm", total=len(rows))
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(_Task(waiting.popleft(), folder, limit))
            multiprocessing.connection.wait([task.process.sentinel for task in running], timeout=1)
            finished = [task for task in running if task.finished()]
            running = [task for task in running if task not in finished]
            for row in [task.row for task in finished]:
                for problem in problems(row):
                    progress.console.print(f"{row.model or row.file}: {problem}", markup=False)
                progress.update(bar, advance=1, description=row.model or row.file)
                yield row
            progress.refresh()


# What it says.


def problems(row: Row) -> list[str]:
    """Each bar that a model misses."""
    if row.failure:
        return [f"does not compile: {row.failure}"]
    found = []
    if row.wrong:
        double = "" if row.error_in_double is None else f", in float64 by {row.error_in_double:.0e}"
        found.append(f"wrong by {row.ours.error:.0e}{double}")
    if row.unexplained:
        kinds = Counter(left.kind for left in row.unexplained)
        found.append("unexplained norms: " + ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())))
    for name in row.better_peers:
        peer = row.peers[name]
        found.append(
            f"{name} leaves {peer.norm_count} norms and {peer.kernels} kernels, "
            f"we leave {row.ours.norm_count} and {row.ours.kernels}"
        )
    return found


def summary(rows: Sequence[Row]) -> dict[str, str]:
    compiled = [row for row in rows if not row.failure]
    unexplained = sum(len(row.unexplained) for row in rows)
    left = sum(len(row.left) for row in rows)
    before = sum(row.peers["training graph"].norms.get("batch", 0) for row in compiled)
    after = sum(row.ours.norms.get("batch", 0) for row in compiled)
    return {
        "models compiled": f"{len(compiled)} of {len(rows)}",
        "wrong outputs": _named(row.model for row in rows if row.wrong),
        "unexplained norms": f"{unexplained} of the {left} that are left",
        "a peer leaves less": _named(row.model for row in rows if row.better_peers),
        "untraceable roots": _named(row.model for row in rows if row.capture == "untraced"),
        "partly opaque": _named(row.model for row in rows if row.capture == "partly opaque"),
        "report counts other norms than run": _named(row.model for row in compiled if row.miscounted),
        "batch norms run, before and after": f"{before} -> {after}",
    }


def _named(names: Iterable[str]) -> str:
    names = list(names)
    return f"{len(names)}: {', '.join(names)}" if names else "0"


def missed_bars(rows: Iterable[Row]) -> bool:
    return any(problems(row) for row in rows)


HEADER = ("file", "model", "image", "captured", *PEERS, "reparam", "difference", "seconds", "problems")


def cells(row: Row) -> list[str]:
    image = "x".join(map(str, row.image[1:]))
    counts = [_counts(row.peers.get(name)) for name in PEERS] + ["" if row.failure else _counts(row.ours)]
    error = "" if row.failure else f"{row.ours.error:.0e}"
    if row.error_in_double is not None:
        error += f" ({row.error_in_double:.0e} in float64)"
    seconds = f"{row.seconds:.1f}" if row.seconds else ""
    return [row.file, row.model, image, row.capture, *counts, error, seconds, "; ".join(problems(row))]


def _counts(outcome: Outcome | None) -> str:
    if outcome is None:
        return ""
    if outcome.failure:
        return f"fails: {outcome.failure.partition(':')[0]}"
    kinds = ", ".join(f"{count} {kind}" for kind, count in outcome.norms.items())
    wrong = "" if outcome.error < WRONG else f", differs by {outcome.error:.0e}"
    return f"{kinds or 'no norms'} / {outcome.kernels}{wrong}"


def reasons_given(rows: Iterable[Row]) -> dict[tuple[str, str], list[str]]:
    """Models by the reason why a kind of norm is left, without the names of layers; the most frequent first."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for left in row.left:
            for reason in left.reasons or ["(unexplained)"]:
                # Names of layers have digits, dots or underscores in them; reasons are made of words.
                anonymous = re.sub(r"\b[\w.]*(?:\w\.\w|\d|_)[\w.]*", "·", reason)
                found.setdefault((left.kind, anonymous), []).append(row.model)
    return dict(sorted(found.items(), key=lambda item: (-len(item[1]), item[0])))


def render(rows: Sequence[Row]) -> Table:
    table = Table(*HEADER, title="One model of each of timm's files", caption="norms run / all kernels, for two images")
    for row in rows:
        table.add_row(*cells(row), style="red" if problems(row) else None)
    return table


def markdown(rows: Sequence[Row], threads: int) -> str:
    versions = f"timm {timm.__version__}, torch {torch.__version__}, reparam {reparam.__version__}"
    machine = f"{processor()}, {os.cpu_count()} cores, {threads} thread(s) a model"
    lines = [
        "# One model of every timm architecture",
        "",
        f"Written by `benchmarks/zoo.py --markdown` on {date.today().isoformat()}: {versions}; {machine}.",
        "",
        f"{len(rows)} models: of each of timm's files that register any, the one with the fewest parameters. Weights",
        "are random, norm statistics and affines lived-in. Images are the smallest that a model accepts, from 96x96",
        "on, else of its own size. Cells say which norms were run and, after the stroke, how many kernels were",
        "launched in all, for two images that the compiler had not seen. Outputs are wrong that differ by more than",
        f"{WRONG:.0e} of the largest magnitude in float32, unless compiling and running in float64 shows less than",
        f"{WRONG_IN_DOUBLE:.0e}. Seconds are of the processor, for `reparam.compile` with all of its verification.",
        "A norm is unexplained when the report has no remark on it. Peers are the training graph itself, torch.fx's",
        "fuser and timm's `reparameterize_model`; one that fails or computes something else is not counted as better.",
        "Instance norms are batch norms that take their own statistics: the standardisation of a weight is one, too.",
        "An RMS norm runs as arithmetic, and only the report counts it.",
        "",
        *_table(("", ""), summary(rows).items()),
        "",
        *_table(HEADER, map(cells, rows)),
        "",
        "## Why norms are left",
        "",
        "As the report says; `·` stands for a layer.",
        "",
        *_table(
            ("kind", "reason", "norms", "models"),
            (
                (kind, reason, str(len(models)), ", ".join(sorted(set(models))))
                for (kind, reason), models in reasons_given(rows).items()
            ),
        ),
        "",
        "## What was kept as Python",
        "",
        *_table(
            ("model", "module", "reason"),
            ((row.model, where or "(model)", why) for row in rows for where, why in row.opaque.items()),
        ),
    ]
    return "\n".join(lines) + "\n"


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


def processor() -> str:
    information = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", information.read_text()) if information.exists() else []
    return str(names[0]) if names else platform.processor() or platform.machine()


def main() -> None:
    options = parser("Compile one model of every timm architecture.")
    options.add_argument(
        "--models", nargs="+", default=["*"], metavar="PATTERN", help="timm's files or models, such as 'rep*' (all)"
    )
    options.add_argument("--jobs", type=int, default=2, help="processes at a time (default: 2)")
    options.add_argument("--limit", type=float, default=600, help="seconds that one model may take (default: 600)")
    options.add_argument("--markdown", type=Path, metavar="FILE", help="also write a page about it")
    options.add_argument("--check", action="store_true", help="exit with status 1 if a bar is missed")
    arguments = options.parse_args()
    torch.set_num_threads(arguments.threads)
    rows: list[Row] = []
    for row in sweep(tasks(arguments.models), arguments.jobs, arguments.limit):
        rows = sorted([*rows, row], key=lambda row: row.file)
        write_json(arguments.json, [asdict(row) for row in rows])  # whatever is there when somebody loses patience
    keep_choices(rows)
    console.print(render(rows))
    for what, count in summary(rows).items():
        console.print(f"{what}: {count}", markup=False)
    if arguments.markdown:
        arguments.markdown.write_text(markdown(rows, arguments.threads))
    if arguments.check and missed_bars(rows):
        sys.exit(1)


if __name__ == "__main__":
    main()

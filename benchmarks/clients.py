"""Networks of packages that people install, unchanged: one graph of each? Right? Does its package take it?

    python benchmarks/clients.py [NAME ...] [--quick] [--jobs 1] [--limit 600] [--json FILE] [--markdown FILE]

A name chooses the networks and packages that it is part of. It runs in any Python: the packages are installed, pinned,
into an environment of their own (`.venv-clients`, or the folder that REPARAM_CLIENTS_ENV names), in which the script
starts again. Each network is compiled in a process of its own, so one that crashes or takes too long costs what is
left of its row.

Weights are random, affines lived-in, statistics those of some images. What is compared is compared in float64, on
images that the compiler has not seen, of the size of its example and of another size and batch. Seconds are of the
processor, in float32, on one thread.
"""

from __future__ import annotations

if __name__ == "__main__":
    import client_env

    client_env.enter()

import copy
import fnmatch
import inspect
import json
import logging
import multiprocessing
import multiprocessing.connection
import os
import re
import signal
import sys
import tempfile
import textwrap
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import nn

import reparam
from client_models import CLIENTS, Client, doubled, lived_in, numbers, run
from common import console, parser, write_json
from zoo import first_line, outcome, processor

ALLOWED = 1e-9  # of the largest magnitude of an output, in float64
PIPELINE_ALLOWED = 1e-3  # of the largest magnitude of an output, in float32


@dataclass
class Row:
    """What became of one network.

    Attributes:
        package: Whose it is.
        name: What the package calls it.
        parameters: How many it has.
        whole: Whether one graph is made of it when it may be tied to sizes.
        reasons: Why not, or what else was said about how it was read.
        norms: The report's, before and after, for each ``sizes``.
        kernels: The same of kernels.
        ran: Norms and kernels that PyTorch dispatched for one forward pass: of the network as it is, as its package
            deploys it, and compiled for any size.
        errors: Largest relative error in float64, by what was run.
        own: How far the network is from itself there when its weights are changed by an ulp or two, where that error is
            large: what picks among equal scores picks others, and what amplifies rounding amplifies that.
        seconds: Of compiling, and of one forward pass of the network as it is.
        types: Whether outputs have the types of the network's own, or which differ.
        pipelines: ``yes``, or what went wrong.
        problems: What was raised, by what was being done.
        failure: Why the row ends here: the process died, or took too long.
    """

    package: str
    name: str
    parameters: int = 0
    whole: bool | None = None
    reasons: list[str] = field(default_factory=list)
    norms: dict[str, list[int]] = field(default_factory=dict)
    kernels: dict[str, list[int]] = field(default_factory=dict)
    ran: dict[str, list[int]] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    own: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    types: str = ""
    pipelines: dict[str, str] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    failure: str = ""

    @property
    def good(self) -> bool:
        """Whether all that was tried works, be it in one graph or not."""
        fits = self.types == "equal" and all(result == "yes" for result in self.pipelines.values())
        return not self.failure and not self.problems and fits and not self.wrong

    @property
    def wrong(self) -> dict[str, float]:
        """The errors that are no rounding."""
        return {name: e for name, e in self.errors.items() if not e < max(ALLOWED, 4 * self.own.get(name, 0.0))}


# One network, in a process of its own.


def knows(option: str) -> bool:
    """Whether the compiler is new enough for an option; what needs it is left out otherwise."""
    return option in inspect.signature(reparam.compile).parameters


def examine(client: Client, quick: bool, row: Row, keep: Callable[[], None]) -> None:
    """Fill a row in; ``keep`` is called whenever there is more of it. Raises where there is no model."""

    @contextmanager
    def part(name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever a package or the compiler raises is a result
            row.problems[name] = first_line(error)
        keep()

    torch.manual_seed(0)
    model = lived_in(client)
    row.parameters = sum(parameter.numel() for parameter in model.parameters())
    with part("as it is"):
        in_single(client, model, row)
    with part("any size"):
        in_double(client, model, row)
    if quick:
        return
    if knows("sizes"):
        with part("size of the example"):
            of_example(client, model, row)
    if client.own is not None:
        with part("own conversion"):
            converted = client.own(copy.deepcopy(model)).eval()
            row.ran["own"] = launched(converted, client.inputs(1, client.size))
    for name in client.pipelines if knows("keep_python") else ():
        with part(name):
            row.pipelines[name] = in_pipeline(client, name, model)


def in_single(client: Client, model: nn.Module, row: Row) -> None:
    """Time compiling, count what runs, and compare types."""
    inputs = client.inputs(1, client.size)
    expected = run(model, inputs)  # the first pass of a process takes longer
    row.ran["as it is"] = launched(model, inputs)
    start = time.process_time()
    run(model, inputs)
    row.seconds["forward"] = time.process_time() - start
    start = time.process_time()
    result = reparam.compile(model, client.inputs(1, client.size))
    row.seconds["compile"] = time.process_time() - start
    row.ran["compiled"] = launched(result, inputs)
    row.types = different_types(run(result, inputs), expected) or "equal"


def in_double(client: Client, model: nn.Module, row: Row) -> None:
    """Compare, in float64, what works at any size; and what the report counts."""
    model = copy.deepcopy(model).double()
    result = reparam.compile(model, doubled(client.inputs(1, client.size)))
    counted(row, "any", result)
    row.whole, row.reasons = wholeness(result)  # until it is asked for the example's size
    for name, batch, size in (("same size", 2, client.size), ("other size", 3, client.second)):
        inputs = doubled(client.inputs(batch, size))
        hold(name, result, model, inputs, row)


def of_example(client: Client, model: nn.Module, row: Row) -> None:
    """Compare, in float64, what may be tied to the example's size, and say whether that is one graph."""
    model = copy.deepcopy(model).double()
    inputs = doubled(client.inputs(1, client.size))
    result = reparam.compile(model, inputs, sizes="example")
    counted(row, "example", result)
    row.whole, row.reasons = wholeness(result)
    other = torch.utils._pytree.tree_map(lambda x: x.flip(-1), inputs)
    hold("example", result, model, other, row)


def hold(name: str, result: nn.Module, model: nn.Module, inputs: Any, row: Row) -> None:
    """Compare what was compiled with the network; where they differ, the network with itself, rounded otherwise."""
    expected = run(model, inputs)
    row.errors[name] = error(run(result, inputs), expected)
    if row.errors[name] < ALLOWED:
        return
    others = []
    for units in (1, -1, 2):
        other = copy.deepcopy(model)
        for tensor in (*other.parameters(), *other.buffers()):
            if tensor.is_floating_point():
                tensor.data *= 1 + units * torch.finfo(tensor.dtype).eps
        others.append(error(run(other, inputs), expected))
    row.own[name] = max(others)


def in_pipeline(client: Client, name: str, model: nn.Module) -> str:
    """Run a pipeline of the package on the network as it is and on the compiled one, and say whether it does the same.

    The one is a copy, for pipelines change what they are given.
    """
    pipeline = client.pipelines[name]
    deploy = reparam.compile(model, client.inputs(1, client.size), keep_python=True)
    torch.manual_seed(0)
    expected = numbers(pipeline(copy.deepcopy(model)))
    torch.manual_seed(0)
    with torch.no_grad():
        found = numbers(pipeline(deploy))
    worst = error(found, expected)
    return "yes" if worst < PIPELINE_ALLOWED else f"runs, differs by {worst:.0e}"


def launched(model: nn.Module, inputs: Any) -> list[int]:
    """Norms and kernels of one forward pass, as PyTorch dispatches them."""
    counts, _ = outcome(lambda x: run(model, x), inputs, None)
    return [counts.norm_count, counts.kernels]


def counted(row: Row, sizes: str, result: nn.Module) -> None:
    report: reparam.Report = result.report
    row.norms[sizes] = [report.before.norms, report.after.norms]
    row.kernels[sizes] = [report.before.kernels, report.after.kernels]


def wholeness(result: nn.Module) -> tuple[bool, list[str]]:
    """Whether a compiled model is one graph with nothing in it that is kept as Python; what was said about it."""
    remarks = [remark for remark in result.report.remarks if remark.kind == "capture"]
    reasons = [f"{remark.where or '(model)'}: {remark.message}" for remark in remarks]
    if not isinstance(result, torch.fx.GraphModule):
        return False, reasons
    said = {remark.where for remark in remarks}
    called = {str(node.target) for node in result.graph.nodes if node.op == "call_module"}
    modules = dict(result.named_modules())
    opaque = [path for path in sorted(called) if path in said or not plain(modules[path])]
    silent = [f"{path}: {type(modules[path]).__name__} is called" for path in opaque if path not in said]
    return not opaque, reasons + silent


def plain(module: nn.Module) -> bool:
    """Whether a called module is a layer, and no Python that could do anything."""
    return type(module).__module__.startswith(("torch.nn.", "reparam."))


def error(found: Any, expected: Any) -> float:
    """The largest difference of any output, relative to its largest magnitude; infinite where there is no comparing."""
    pairs = list(zip(numbers(found), numbers(expected), strict=False))
    if len(numbers(found)) != len(numbers(expected)) or any(a.shape != b.shape for a, b in pairs):
        return float("inf")
    errors = [_error(a, b) for a, b in pairs if b.numel()]
    return max((value if value == value else float("inf") for value in errors), default=0.0)


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    magnitude = float(expected.abs().max())
    difference = float((found - expected).abs().max())
    return difference / magnitude if magnitude else difference


def different_types(found: Any, expected: Any, where: str = "") -> str:
    """The first place where outputs have another type or other keys, or an empty string."""
    place = where or "the output"
    if type(found) is not type(expected):
        return f"{place} is {type(found).__name__}, not {type(expected).__name__}"
    if isinstance(expected, torch.Tensor):
        return "" if found.dtype == expected.dtype else f"{place} is {found.dtype}, not {expected.dtype}"
    if isinstance(expected, Mapping):
        if list(found) != list(expected):
            return f"{place} has the keys {list(found)}, not {list(expected)}"
        parts: Iterable[Any] = expected
    elif isinstance(expected, list | tuple):
        if len(found) != len(expected):
            return f"{place} has {len(found)} parts, not {len(expected)}"
        parts = range(len(expected))
    else:
        return ""
    texts = (different_types(found[key], expected[key], f"{where}[{key!r}]") for key in parts)
    return next(filter(None, texts), "")


def work(client: Client, quick: bool, result: Path) -> None:
    """Fill a row in, in a process and a folder of its own, and write it to a file as it grows."""
    folder = result.with_suffix("")
    folder.mkdir()
    os.chdir(folder)  # exporters write where they are
    with open(os.devnull, "w") as nowhere:  # what packages print would get in between the lines of ours
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    row = Row(client.package, client.name)

    def keep() -> None:
        partial = result.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(row)))
        partial.replace(result)

    try:
        examine(client, quick, row, keep)
    except Exception as error:  # an error is a result
        row.failure = first_line(error)
    keep()


# All of them.


def sweep(clients: Sequence[Client], jobs: int, limit: float, quick: bool) -> Iterator[Row]:
    """Examine all, ``jobs`` at a time, each in a fork of this process: importing takes longer than most networks."""
    context = multiprocessing.get_context("fork")
    waiting, running = list(clients)[::-1], dict[Any, tuple[Client, Path, float]]()
    with tempfile.TemporaryDirectory() as folder:
        while waiting or running:
            while waiting and len(running) < jobs:
                client = waiting.pop()
                result = Path(folder, f"{CLIENTS.index(client) if client in CLIENTS else len(waiting)}.json")
                process = context.Process(target=work, args=(client, quick, result), daemon=True)
                process.start()
                running[process] = (client, result, time.monotonic() + limit)
            multiprocessing.connection.wait([process.sentinel for process in running], timeout=0.5)
            for process, (client, result, deadline) in list(running.items()):
                late = time.monotonic() > deadline
                if process.is_alive() and not late:
                    continue
                if process.is_alive():
                    process.kill()
                process.join()
                del running[process]
                yield ended(client, result, process.exitcode, f"took more than {limit:.0f} s" if late else "")


def ended(client: Client, result: Path, code: int, failure: str) -> Row:
    """The row of a process that has ended: as far as it came, and why it came no farther."""
    row = Row(**json.loads(result.read_text())) if result.exists() else Row(client.package, client.name)
    if code and not failure:
        how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        failure = f"the process died of {how}"
    row.failure = row.failure or (failure if code else "")
    return row


def chosen(names: Sequence[str]) -> list[Client]:
    """The networks that a name is part of the name or the package of; all without names."""
    if not names:
        return CLIENTS
    found = [
        client
        for client in CLIENTS
        if any(fnmatch.fnmatch(f"{client.package} {client.name}".lower(), f"*{name.lower()}*") for name in names)
    ]
    if not found:
        sys.exit(f"no network is called {' or '.join(names)}: {', '.join(client.name for client in CLIENTS)}")
    return found


# What it says.

HEADER = (
    "package", "network", "one graph", "norms", "kernels", "runs: as it is, its package's own, compiled",
    "error, same size", "error, other size", "compile / forward", "outputs", "pipelines", "problems",
)  # fmt: skip
SHORT = ("network", "graph", "norms", "kernels", "runs", "error", "other size", "seconds", "outputs", "pipelines")


def cells(row: Row) -> list[str]:
    whole = "" if row.whole is None else "yes" if row.whole else "no"
    ran = [f"{norms} / {kernels}" for norms, kernels in row.ran.values()]
    if len(ran) == 3:
        ran = [" / ".join(map(str, row.ran[way])) for way in ("as it is", "own", "compiled")]
    elif len(ran) == 2:
        ran.insert(1, "–")
    same = [name for name in ("same size", "example") if name in row.errors]
    seconds = " / ".join(f"{row.seconds[name]:.2f}" for name in ("compile", "forward") if name in row.seconds)
    pipelines = "; ".join(f"{name}: {result}" for name, result in row.pipelines.items())
    problems = [f"{name}: {what}" for name, what in row.problems.items()]
    return [
        row.package,
        row.name,
        whole,
        before_and_after(row.norms),
        before_and_after(row.kernels),
        ", ".join(ran),
        with_own(row, *same),
        with_own(row, *(["other size"] if "other size" in row.errors else [])),
        seconds,
        row.types,
        pipelines,
        "; ".join(filter(None, [row.failure, *problems])),
    ]


def with_own(row: Row, *names: str) -> str:
    """The largest of some errors, and how far the network is from itself where that is much."""
    if not names:
        return ""
    worst = max(names, key=lambda name: row.errors[name])
    own = f" (its own {row.own[worst]:.0e})" if worst in row.own else ""
    return f"{row.errors[worst]:.0e}{own}"


def remarkable(row: Row) -> list[str]:
    """What is not as it should be."""
    wrong = [f"wrong by {value:.0e}, {name}" for name, value in row.wrong.items()]
    types = [row.types] if row.types not in ("", "equal") else []
    pipelines = [f"{name}: {result}" for name, result in row.pipelines.items() if result != "yes"]
    parts = ["in parts"] if row.whole is False else []
    problems = [f"{name}: {what}" for name, what in row.problems.items()]
    return [*filter(None, [row.failure]), *problems, *parts, *wrong, *types, *pipelines]


def before_and_after(counts: Mapping[str, list[int]]) -> str:
    """Counts for any size; also those for the example's size where they are others."""
    texts = {sizes: " → ".join(map(str, pair)) for sizes, pair in counts.items()}
    any_size, example = texts.get("any", ""), texts.get("example", "")
    return any_size if example in ("", any_size) else f"{any_size} ({example})"


def summary(rows: Sequence[Row]) -> dict[str, str]:
    """What there is to say of all, and its numbers."""
    without = [row.name for row in rows if not row.whole]
    wrong = [row.name for row in rows if row.wrong]
    bad = [row.name for row in rows if not row.good]
    norms = [sum(row.norms["any"][i] for row in rows if "any" in row.norms) for i in (0, 1)]
    tried = [result for row in rows for result in row.pipelines.values()]
    return {
        "networks": str(len(rows)),
        "in one graph": f"{len(rows) - len(without)}",
        "not in one graph": named(without),
        "wrong outputs": named(wrong),
        "norms, before and after, at any size": " → ".join(map(str, norms)),
        "pipelines that give the same": f"{tried.count('yes')} of {len(tried)}",
        "with a problem of any kind": named(bad),
    }


def named(names: Sequence[str]) -> str:
    return f"{len(names)}: {', '.join(names)}" if names else "0"


def render(rows: Sequence[Row]) -> Table:
    """The same for a terminal, which is narrower: without what was printed already."""
    table = Table(
        *SHORT, title="Networks of other packages", caption="runs: norms / kernels; seconds: compile / forward"
    )
    for row in rows:
        _, *texts, _, _, _ = cells(row)
        yes = list(row.pipelines.values()).count("yes")
        pipelines = f"{yes} of {len(row.pipelines)}" if row.pipelines else ""
        outputs = row.types if row.types in ("", "equal") else "other types"
        table.add_row(*texts, outputs, pipelines, style=None if row.good else "red")
    return table


def markdown(rows: Sequence[Row], threads: int) -> str:
    """What docs/clients.md has below its text: where it was measured, the tables, and what was said."""
    packages = ", ".join(f"{name} {version(name)}" for name in dict.fromkeys(row.package for row in rows))
    said = Counter((row.name, generalised(reason)) for row in rows for reason in row.reasons)
    lines = [
        f"Written by `benchmarks/clients.py --markdown` on {date.today().isoformat()}: {packages},",
        f"torch {torch.__version__}, reparam {reparam.__version__}; {processor()}, {threads} thread(s).",
        "",
        *table(("", ""), summary(rows).items()),
        "",
        *table(HEADER, map(cells, rows)),
        "",
        "What the report says about how each was read; `·` stands for a layer.",
        "",
        *table(("network", "reason", "times"), ((name, why, str(times)) for (name, why), times in said.items())),
    ]
    return "\n".join(lines) + "\n"


def generalised(reason: str) -> str:
    """The beginning of a reason, with a dot in place of the module path that it begins with."""
    return textwrap.shorten(re.sub(r"^(?!\(model\))[^:\s]+:", "·:", reason), 200, placeholder=" …")


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines]


def main() -> None:
    options = parser("Compile networks of packages that people install.")
    options.add_argument("names", nargs="*", metavar="NAME", help="part of a network's or a package's name (all)")
    options.add_argument("--quick", action="store_true", help="only at any size; no pipelines, no own conversions")
    options.add_argument("--jobs", type=int, default=1, help="processes at a time (default: 1)")
    options.add_argument("--limit", type=float, default=600, help="seconds that one network may take (default: 600)")
    options.add_argument("--markdown", type=Path, metavar="FILE", help="also write the tables of docs/clients.md")
    arguments = options.parse_args()
    torch.set_num_threads(arguments.threads)
    for option in ("sizes", "keep_python"):
        if not knows(option):
            console.print(f"reparam.compile knows no {option}: what needs it is left out", markup=False)
    order = [client.name for client in CLIENTS]
    rows: list[Row] = []
    for row in sweep(chosen(arguments.names), arguments.jobs, arguments.limit, arguments.quick):
        console.print(f"{row.name}: {'; '.join(remarkable(row)) or 'good'}", markup=False)
        rows = sorted([*rows, row], key=lambda row: order.index(row.name))
        write_json(arguments.json, [asdict(row) for row in rows])  # whatever is there when somebody loses patience
    console.print(render(rows))
    for what, count in summary(rows).items():
        console.print(f"{what}: {count}", markup=False)
    if arguments.markdown:
        arguments.markdown.write_text(markdown(rows, arguments.threads))


if __name__ == "__main__":
    main()

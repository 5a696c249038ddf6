"""The promise, measured: no compiled graph is slower than timm's own deploy graph, wherever it runs.

    python benchmarks/deploy.py [--check] [--models NAME ...] [--threads 2] [--rounds 15] [--no-training] [--json FILE]

Twelve networks, one image of each network's own size, in PyTorch eager, ONNX Runtime, OpenVINO and ExecuTorch: as
trained, as timm deploys them and as reparam compiles them, all in turn within one process for each network. A ratio is
the median, over the rounds, of the ratio within a round: a slow moment falls on both sides of the fraction. Where the
machine has other things to do, `--clock processor --threads 1` counts the processor's time instead. The best
runtime of RepViT-M0.9 is also held against the matrix products that the machine managed in the same rounds.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from operator import itemgetter
from pathlib import Path
from typing import Any

from rich.progress import Progress
from rich.table import Table

import reparam
from common import console, parser, reparameterize_model, training_model, write_json
from reparam.bench import Benchmark, Settings, race

MODELS = """
    repvit_m0_9 repvit_m1_1 repvit_m2_3 repvgg_a0 mobileone_s0 mobileone_s1 mobileone_s4 fastvit_t8 fastvit_sa12
    repghostnet_100 ghostnetv3_100 levit_256
""".split()
RUNTIMES = ["eager", "onnxruntime", "openvino", "executorch"]

EACH = 1.03  # reparam over timm
MEANS = {"eager": 0.95}  # geometric mean over the networks; 1.00 elsewhere
MEAN_FOR_LATENCY = 0.80  # eager, optimize="latency"
NEAR_THE_LIMIT = ("repvit_m0_9", 0.75)  # of the matrix-product peak


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Time one network, in this process."""
    model, image = training_model(name)
    graphs = {"training": model} if options.training else {}
    graphs |= {
        "timm": reparameterize_model(model),
        "reparam": reparam.compile(model, image, verify=False),
    }
    failure = ""
    if "eager" in options.runtimes:
        try:
            graphs["latency"] = reparam.compile(model, image, optimize="latency", verify=False)
        except reparam.ReparamError as error:
            failure = str(error)
    settings = Settings(options.runtimes, options.threads, options.rounds, memory=False, clock=options.clock)
    result = race(graphs, (image,), settings, only={"latency": ("eager",)})
    return {**result.to_dict(), "ratios": ratios(result), "latency_failure": failure}


def ratios(result: Benchmark) -> dict[str, dict[str, Any]]:
    """By runtime: each graph's time over timm's, or what failed."""
    found: dict[str, dict[str, Any]] = {}
    for row in result.rows:
        ratio = result.ratio(row.runtime, row.graph, "timm")
        why = row.failure or f"timm: {result.row('timm', row.runtime).failure}"
        found.setdefault(row.runtime, {})[row.graph] = asdict(ratio) if ratio else why
    return found


def in_process_of_its_own(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Time one network where no other has left anything behind."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder, "answer.json")
        command = [sys.executable, __file__, "--one", name, "--json", str(answer), "--threads", str(options.threads)]
        command += ["--rounds", str(options.rounds), "--clock", options.clock, "--runtimes", *options.runtimes]
        command += ["--training" if options.training else "--no-training"]
        ran = subprocess.run(command, capture_output=True, text=True)
        if ran.returncode != 0:
            return {"failure": (ran.stderr.strip().splitlines() or [f"exit code {ran.returncode}"])[-1]}
        result: dict[str, Any] = json.loads(answer.read_text())["results"]
        return result


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values)) if values else math.nan


def medians(results: dict[str, Any], runtime: str, graph: str) -> list[float]:
    """The ratios of a graph to timm's in a runtime, for all networks that have one."""
    found = (result.get("ratios", {}).get(runtime, {}).get(graph) for result in results.values())
    return [ratio["median"] for ratio in found if isinstance(ratio, dict)]


def missed(results: dict[str, Any], runtimes: list[str]) -> Iterator[str]:
    """Say which bars are missed."""
    for name, result in results.items():
        if "failure" in result:
            yield f"{name}: {result['failure']}"
            continue
        for runtime in runtimes:
            match result["ratios"][runtime]["reparam"]:
                case {"median": median} if median <= EACH:
                    pass
                case {"median": median}:
                    yield f"{name} in {runtime}: {median:.3f} times timm's graph, allowed {EACH}"
                case failure:
                    yield f"{name} in {runtime}: {failure}"
    for runtime in runtimes:
        mean, allowed = geometric_mean(medians(results, runtime, "reparam")), MEANS.get(runtime, 1.0)
        if not mean <= allowed:
            yield f"geometric mean in {runtime}: {mean:.3f}, allowed {allowed:.2f}"
    if "eager" in runtimes:
        mean = geometric_mean(medians(results, "eager", "latency"))
        if not mean <= MEAN_FOR_LATENCY:
            reasons = {result.get("latency_failure") for result in results.values()} - {"", None}
            why = "".join(f"; {reason}" for reason in sorted(reasons))
            yield f"geometric mean in eager for latency: {mean:.3f}, allowed {MEAN_FOR_LATENCY:.2f}{why}"
    name, least = NEAR_THE_LIMIT
    if name in results and "failure" not in results[name]:
        fraction, runtime = nearest_to_peak(results[name])
        if not fraction >= least:
            yield f"{name}: {fraction:.0%} of the matrix-product peak, in {runtime}; at least {least:.0%} wanted"


def nearest_to_peak(result: dict[str, Any]) -> tuple[float, str]:
    """The largest fraction of the matrix-product peak that a compiled graph reaches, and where."""
    rows = (row for row in result["rows"] if row["graph"] in ("reparam", "latency") and row["of_peak"])
    return max(((row["of_peak"], row["runtime"]) for row in rows), key=itemgetter(0), default=(0.0, "any runtime"))


def columns(runtimes: list[str]) -> list[tuple[str, str]]:
    """What a row shows of a network: runtime and graph."""
    return [(runtime, "reparam") for runtime in runtimes] + [("eager", "latency")] * ("eager" in runtimes)


def lines(results: dict[str, Any], runtimes: list[str]) -> list[list[str]]:
    """The table's cells: milliseconds and ratios of each network, and the means."""
    rows = []
    for name, result in results.items():
        rows.append([name, *(cell(result, *column) for column in columns(runtimes))])
    means = (geometric_mean(medians(results, *column)) for column in columns(runtimes))
    return [*rows, ["geometric mean", *(f"{mean:.3f}" for mean in means)]]


def cell(result: dict[str, Any], runtime: str, graph: str) -> str:
    match result.get("ratios", {}).get(runtime, {}).get(graph):
        case {"median": median, "low": low, "high": high}:
            row = next(row for row in result["rows"] if (row["runtime"], row["graph"]) == (runtime, graph))
            return f"{row['seconds']['median'] * 1e3:.1f} ms, {median:.2f} ({low:.2f} to {high:.2f})"
        case None:
            return "-"
        case _:
            return "fails"


def main() -> None:
    options = parser("Time deploy graphs where they run.", MODELS)
    options.set_defaults(threads=2)
    options.add_argument("--rounds", type=int, default=15, help="interleaved repetitions (default: 15)")
    options.add_argument("--runtimes", nargs="+", default=RUNTIMES, choices=RUNTIMES, metavar="NAME")
    options.add_argument("--clock", choices=("wall", "processor"), default="wall", help="processor: for a busy machine")
    options.add_argument(
        "--training", action=argparse.BooleanOptionalAction, default=True, help="time the training graphs, too"
    )
    options.add_argument("--check", action="store_true", help="exit with status 1 if a bar is missed")
    options.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    options.add_argument("--one", metavar="NAME", help=argparse.SUPPRESS)  # what the processes of its own are asked
    arguments = options.parse_args()
    if arguments.one:
        write_json(arguments.json, measure(arguments.one, arguments))
        return
    results: dict[str, Any] = {}
    with Progress(console=console, transient=True) as progress:
        for name in progress.track(arguments.models, description="networks"):
            results[name] = in_process_of_its_own(name, arguments)
            write_json(arguments.json, results)  # a long run that is cut short keeps what it has
    report(results, arguments)


def report(results: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Print what was measured, and what is missed; with ``--check``, fail for it."""
    header = ["model", *(f"{runtime}, {graph}" for runtime, graph in columns(arguments.runtimes))]
    rows = lines(results, arguments.runtimes)
    if arguments.markdown:
        for row in (header, ["---"] * len(header), *rows):
            print("| " + " | ".join(row) + " |")
    else:
        title = f"One image, {arguments.threads} threads: median, and times timm's deploy graph (quartiles)"
        table = Table(*header, title=title)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    name, _ = NEAR_THE_LIMIT
    if name in results and "failure" not in results[name]:
        fraction, runtime = nearest_to_peak(results[name])
        peak = results[name]["peak_flops"] / 1e9
        print(f"{name} in {runtime}: {fraction:.0%} of the matrix-product peak of {peak:.0f} GFLOP/s")
    problems = list(missed(results, arguments.runtimes))
    for problem in problems:
        print("missed:", problem)
    if arguments.check and problems:
        sys.exit(1)


if __name__ == "__main__":
    main()

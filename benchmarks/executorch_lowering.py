"""What it saves in ExecuTorch to state a model in operators that XNNPACK knows, as reparam does.

    python benchmarks/executorch_lowering.py [--models NAME ...] [--threads 2] [--rounds 31] [--json FILE] [--markdown]

One image through the same compiled model, lowered both ways, in turn within one process. A ratio is the median, over
the rounds, of the ratio within a round. Beside it, the parts that XNNPACK runs and the portable operators in between.
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import to_edge_transform_and_lower
from rich.progress import Progress
from rich.table import Table
from torch.export import ExportedProgram

import reparam
from common import console, parser, relative_error, training_model, write_json
from reparam.bench import Settings
from reparam.bench.racing import Loader, sample, timer_for
from reparam.bench.runtimes import ExecuTorchRuntime, outputs
from reparam.targets.executorch import ExecuTorch
from reparam.targets.target import Options, quiet
from reparam.timing import summarise

MODELS = "repvit_m0_9 repghostnet_100 fastvit_sa12 levit_256 mobilevit_xxs vit_tiny_patch16_224".split()


class Recipe(ExecuTorch):
    """ExecuTorch's own way, as its documentation has it."""

    def lower(self, program: ExportedProgram) -> Any:
        """Lower the program as it is."""
        return to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])


def measure(name: str, settings: Settings) -> dict[str, Any]:
    """Time one network in both forms."""
    model, image = training_model(name)
    compiled = reparam.compile(model, image, verify=False)
    program = torch.export.export(compiled, (image,))
    loaders: dict[str, Loader] = {}
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for way, target in {"recipe": Recipe(), "reparam": ExecuTorch()}.items():
            path = Path(folder, f"{way}.pte")
            with quiet():
                details = target.write(program, path, Options()).details
            loaders[way] = partial(ExecuTorchRuntime().load, path, (image,), settings.threads)
            result[way] = {
                "delegates": details["delegates"],
                "portable_operators": details["portable_operators"],
                "error": relative_error(outputs(loaders[way]()())[0], compiled(image)),
            }
        seconds = sample([loaders], settings, timer_for("cpu"), lambda *told: None)
    for way, values in seconds.items():
        result[way]["seconds"] = asdict(summarise(values))
    ratios = [mine / theirs for mine, theirs in zip(seconds["reparam"], seconds["recipe"], strict=True)]
    return {**result, "ratio": asdict(summarise(ratios))}


def cells(name: str, result: dict[str, Any]) -> list[str]:
    """A row of the table."""
    ratio, ways = result["ratio"], []
    for way in ("recipe", "reparam"):
        found = result[way]
        portable = sum(found["portable_operators"].values())
        ways.append(f"{found['delegates']} / {portable} / {found['seconds']['median'] * 1e3:.1f}")
    return [name, *ways, f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"]


def main() -> None:
    options = parser("Time what ExecuTorch makes of a model.", MODELS)
    options.set_defaults(threads=2)
    options.add_argument("--rounds", type=int, default=31, help="interleaved repetitions (default: 31)")
    options.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    arguments = options.parse_args()
    settings = Settings(threads=arguments.threads, rounds=arguments.rounds)
    results: dict[str, Any] = {}
    with Progress(console=console, transient=True) as progress:
        for name in progress.track(arguments.models, description="networks"):
            results[name] = measure(name, settings)
            write_json(arguments.json, results)
    header = ["network", "ExecuTorch's recipe: parts / portable operators / ms", "reparam", "time"]
    rows = [cells(name, result) for name, result in results.items()]
    if arguments.markdown:
        for row in (header, ["---"] * len(header), *rows):
            print("| " + " | ".join(row) + " |")
        return
    table = Table(*header, title=f"One image, {arguments.threads} threads: medians, and their ratio (quartiles)")
    for row in rows:
        table.add_row(*row)
    console.print(table)


if __name__ == "__main__":
    main()

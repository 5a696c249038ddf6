"""How exactly every RepViT agrees with its compiled model in each runtime that it is exported to.

    python benchmarks/exports.py [--models NAME ...] [--targets NAME ...] [--half] [--markdown] [--check] [--json FILE]

The compiled network is exported, run in the runtime itself on random inputs, and compared with the compiled model:
the largest difference, relative to the largest output. Core ML runs on Apple's systems only, so its column compares
the weights, relative to the largest one of each layer.
`--check` fails where an export fails, or differs by more than 1e-4.
"""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.filesize import decimal
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

import reparam
from common import console, parser, randomise, write_json
from reparam.models import registry
from reparam.targets import TARGETS

MODELS = ["repvit_m0_6", "repvit_m0_9", "repvit_m1_0", "repvit_m1_1", "repvit_m1_5", "repvit_m2_3"]
BAR = 1e-4


@dataclass(frozen=True)
class Outcome:
    """One file, or why there is none."""

    error: float = 0.0
    size: int = 0  # bytes
    seconds: float = 0.0  # to capture, write, load, run and compare
    dynamic_batch: bool = False
    failure: str = ""

    def __str__(self) -> str:
        if self.failure:
            return f"fails: {self.failure}"
        return f"{self.error:.1e}, {decimal(self.size)}, {self.seconds:.0f} s"


def compiled(name: str) -> tuple[nn.Module, Tensor]:
    """The compiled network with lived-in statistics, and one image."""
    entry = registry.entry(name)
    torch.manual_seed(0)
    image = torch.randn(1, *entry.input_shape)
    return reparam.compile(randomise(entry.build()).eval(), image), image


def outcome(model: nn.Module, image: Tensor, target: str, half: bool) -> Outcome:
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        try:
            exported = reparam.export(model, Path(folder) / f"model{TARGETS[target].suffix}", image, half=half)
        except reparam.ReparamError as error:
            return Outcome(failure=str(error))
        seconds = time.perf_counter() - start
        return Outcome(exported.comparison.largest_error, exported.size, seconds, exported.dynamic_batch)


def render(results: dict[str, dict[str, Outcome]], targets: list[str], markdown: bool) -> Table | str:
    header = ["model", *(TARGETS[target].title for target in targets)]
    rows = [[name, *(str(found[target]) for target in targets if target in found)] for name, found in results.items()]
    if markdown:
        lines = [header, ["---"] * len(header), *rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)
    table = Table(*header, title="Largest relative error, size of the file, time to export and compare")
    for row in rows:
        table.add_row(*row)
    return table


def main() -> None:
    options = parser("Export every RepViT everywhere.", MODELS)
    options.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS), metavar="NAME")
    options.add_argument("--half", action="store_true", help="in half precision")
    options.add_argument("--markdown", action="store_true", help="print a Markdown table")
    options.add_argument("--check", action="store_true", help=f"fail where an error is above {BAR:.0e}")
    arguments = options.parse_args()
    torch.set_num_threads(arguments.threads)
    results: dict[str, dict[str, Outcome]] = {name: {} for name in arguments.models}
    with Progress(console=console, transient=True, disable=not sys.stdout.isatty()) as progress:
        task = progress.add_task("", total=len(arguments.models) * len(arguments.targets))
        for name in arguments.models:
            progress.update(task, description=f"{name}: compiling")
            model, image = compiled(name)
            for target in arguments.targets:
                progress.update(task, description=f"{name}: {TARGETS[target].title}")
                results[name][target] = outcome(model, image, target, arguments.half)
                progress.advance(task)
                found = {model: {label: asdict(item) for label, item in row.items()} for model, row in results.items()}
                write_json(arguments.json, found)
    table = render(results, arguments.targets, arguments.markdown)
    print(table) if isinstance(table, str) else console.print(table)
    failed = [
        f"{name}, {target}: {item}"
        for name, row in results.items()
        for target, item in row.items()
        if item.failure or not item.error <= BAR
    ]
    if arguments.check and failed:
        sys.exit("above the bar: " + "; ".join(failed))


if __name__ == "__main__":
    main()

"""RepViT on a GPU: the training graph against the compiled one, beside the throughput that the paper reports.

    python benchmarks/gpu.py [--models NAME ...] [--batch 1 256] [--rounds 20] [--json FILE]

float16, channels_last, times by CUDA events; PyTorch eager, torch.compile and CUDA graphs. Needs nothing but PyTorch.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import reparam
from reparam import models
from reparam.bench import Benchmark, bench

# Images per second on an RTX 3090 with batches of 256 (RepViT, arXiv:2307.09283).
PAPER = {"repvit_m0_9": 4817, "repvit_m1_0": 3910, "repvit_m1_5": 2151, "repvit_m2_3": 1184}
MODELS = ["repvit_m0_9", "repvit_m1_0", "repvit_m1_1", "repvit_m1_5", "repvit_m2_3"]


def measure(name: str, batch: int, options: argparse.Namespace) -> Benchmark:
    images = torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    return bench(models.create(name), images, device="cuda", half=True, rounds=options.rounds, memory=False)


def render(results: dict[tuple[str, int], Benchmark], table: Table) -> Table:
    for (name, batch), result in results.items():
        for row in result.rows:
            paper = f"{PAPER[name]:,}" if batch == 256 and name in PAPER else "-"
            ratio = result.ratio(row.runtime, row.graph, "training")
            if row.timing is None or ratio is None:
                table.add_row(name, str(batch), row.runtime, row.graph, row.failure)
                continue
            per_second, fraction = batch / row.timing.median, result.of_peak(row) or 0.0
            cells = (str(row.timing), f"{ratio.median:.2f}", f"{per_second:,.0f}", f"{fraction:.0%}", paper)
            table.add_row(name, str(batch), row.runtime, row.graph, *cells)
    return table


def main() -> None:
    options = argparse.ArgumentParser(description="Time RepViT on a GPU.")
    options.add_argument("--models", nargs="+", default=MODELS, choices=models.names(), metavar="NAME")
    options.add_argument("--batch", nargs="+", type=int, default=[1, 256], help="images per inference (default: 1 256)")
    options.add_argument("--rounds", type=int, default=20, help="interleaved repetitions (default: 20)")
    options.add_argument("--json", type=Path, metavar="FILE", help="also write the results here")
    arguments = options.parse_args()
    if not torch.cuda.is_available():
        sys.exit(f"this needs a CUDA device, and PyTorch {torch.__version__} finds none")
    # Piped into a file there is no terminal to ask for its width, and 80 columns would cut the table.
    console = Console() if sys.stdout.isatty() else Console(width=140)
    results: dict[tuple[str, int], Benchmark] = {}
    for name in arguments.models:
        for batch in arguments.batch:
            with console.status(f"{name}, batch {batch}"):
                results[name, batch] = measure(name, batch, arguments)
    title = f"{torch.cuda.get_device_name()}, float16, channels_last, reparam {reparam.__version__}"
    headings = ("model", "batch", "runtime", "graph", "time", "of training", "images/s", "of peak", "paper (RTX 3090)")
    console.print(render(results, Table(*headings, title=title)))
    if arguments.json is not None:
        found: list[dict[str, Any]] = [{"model": name, **result.to_dict()} for (name, _), result in results.items()]
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()

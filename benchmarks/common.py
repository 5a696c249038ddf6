"""What the benchmarks share: timm's models, what they are compared by, and interleaved timing."""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from support import count_calls as count_calls
from support import declare_torchvision_ops, randomise

sys.path.pop(0)  # or its folders tests/reparam and tests/models would be found when the packages are looked for
declare_torchvision_ops()

import timm  # noqa: E402  (needs the declarations, so whoever uses timm gets it from here)
from timm.utils.model import reparameterize_model as reparameterize_model  # noqa: E402

# Piped into a file or a CI log there is no terminal to ask for its width, and 80 columns would cut the tables.
console = Console() if sys.stdout.isatty() else Console(width=140)


def parser(description: str, models: list[str] | None = None) -> argparse.ArgumentParser:
    """Return a parser of the options that all benchmarks have; with ``models``, also of the models to run."""
    result = argparse.ArgumentParser(description=description)
    result.add_argument("--threads", type=int, default=1, help="CPU threads to compute with (default: 1)")
    result.add_argument("--json", type=Path, metavar="FILE", help="also write the results here")
    if models:
        result.add_argument("--models", nargs="+", default=models, metavar="NAME", help="timm's names")
    return result


def training_model(name: str) -> tuple[nn.Module, Tensor]:
    """Return timm's training-time ``name``, with statistics as after training, and one image, both float32."""
    model = randomise(timm.create_model(name, pretrained=False)).eval()
    size = timm.get_pretrained_cfg(name).input_size
    return model, torch.randn(1, *size, generator=torch.Generator().manual_seed(0))


def relative_error(result: Tensor, reference: Tensor) -> float:
    """Return the largest difference, relative to the largest magnitude in ``reference``."""
    return float((result - reference).abs().max() / reference.abs().max())


@dataclass(frozen=True)
class Timing:
    """Seconds: the median and the quartiles around it."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        unit, scale = ("s", 1) if self.median >= 1 else ("ms", 1e3)
        return f"{self.median * scale:.2f} {unit} ({self.low * scale:.2f} to {self.high * scale:.2f})"


def measure(
    contestants: Mapping[str, Callable[[], object]],
    rounds: int,
    warmups: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time each contestant once a round, so that a slow minute of the machine falls on all of them alike.

    Every other round runs backwards: nobody always follows the same neighbour.
    """
    for run in list(contestants.values()) * warmups:
        run()
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for index in range(rounds):
        for name in list(contestants) if index % 2 == 0 else reversed(list(contestants)):
            gc.collect()
            start = clock()
            contestants[name]()
            seconds[name].append(clock() - start)
    return {name: _summarise(values) for name, values in seconds.items()}


def _summarise(values: list[float]) -> Timing:
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return Timing(statistics.median(values), low, high)


def write_json(path: Path | None, results: Any) -> None:
    """Write ``results`` and where they were measured to ``path``, if one was asked for."""
    if path is not None:
        machine = {"torch": torch.__version__, "timm": timm.__version__, "threads": torch.get_num_threads()}
        path.write_text(json.dumps({"machine": machine, "results": results}, indent=2) + "\n")

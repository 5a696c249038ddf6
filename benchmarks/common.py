"""What the benchmarks share: timm's models, what they are compared by, and interleaved timing."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from reparam.timing import Timing as Timing
from reparam.timing import measure as measure

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


def cell(counts: Sequence[int], error: float, failure: str, allowed: float) -> str:
    """Return what a table says of one way: its counts, how wrong it is if it is, or why it failed."""
    if failure:
        return f"fails: {failure}"
    wrong = f" WRONG by {error:.0e}" if not error < allowed else ""
    return " / ".join(map(str, counts)) + wrong


def relative_error(result: Tensor, reference: Tensor) -> float:
    """Return the largest difference, relative to the largest magnitude in ``reference``."""
    return float((result - reference).abs().max() / reference.abs().max())


def write_json(path: Path | None, results: Any) -> None:
    """Write ``results`` and where they were measured to ``path``, if one was asked for."""
    if path is not None:
        machine = {"torch": torch.__version__, "timm": timm.__version__, "threads": torch.get_num_threads()}
        path.write_text(json.dumps({"machine": machine, "results": results}, indent=2) + "\n")

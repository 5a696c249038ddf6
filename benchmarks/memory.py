"""Memory that `reparam.compile` needs at its peak, in multiples of the model's weights, the model included.

    python benchmarks/memory.py [--check] [--model repvgg_b3] [--json FILE]

Each figure is from a process of its own: it compiles a small network first, so that code which is imported on the way
does not count; notes what is resident; builds the model; has the kernel forget the peak so far; compiles; and reads the
peak. Linux only, since nothing else keeps a peak that can be reset.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.filesize import decimal
from rich.table import Table
from torch import nn

import reparam
from common import console, parser, training_model, write_json
from reparam.bench.memory import forget_peak, resident

BAR = 2.5  # times the weights


def measure(name: str, verify: bool) -> dict[str, Any]:
    """Compile in this process, which has compiled no such model before."""
    small = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    reparam.compile(small, verify=verify)
    before = resident("VmRSS")
    model, _ = training_model(name)
    weights = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    forget_peak()
    compiled = reparam.compile(model, verify=verify)
    peak = resident("VmHWM") - before
    after = sum(value.numel() * value.element_size() for value in compiled.state_dict().values())
    return {"verify": verify, "weights": weights, "compiled": after, "peak": peak, "ratio": peak / weights}


def in_process_of_its_own(name: str, verify: bool) -> dict[str, Any]:
    command = [sys.executable, __file__, "--model", name, "--one", str(int(verify))]
    ran = subprocess.run(command, capture_output=True, text=True)
    if ran.returncode != 0:
        sys.exit(f"the process that compiles {name} failed: {ran.stderr}")
    result: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return result


def main() -> None:
    options = parser("Measure the memory of reparam.compile.")
    options.add_argument("--model", default="repvgg_b3", help="timm's name (default: repvgg_b3)")
    options.add_argument("--check", action="store_true", help="exit with status 1 if the bar is missed")
    options.add_argument("--one", type=int, choices=(0, 1), help=argparse.SUPPRESS)
    arguments = options.parse_args()
    if not Path("/proc/self/clear_refs").exists():
        sys.exit("peak memory is measured on Linux only")
    if arguments.one is not None:
        print(json.dumps(measure(arguments.model, bool(arguments.one))))
        return
    results = []
    for verify in (False, True):
        with console.status(f"compiling {arguments.model}, verify={verify}"):
            results.append(in_process_of_its_own(arguments.model, verify))
    table = Table("verify", "weights", "compiled weights", "peak", "times the weights", "bar", title=arguments.model)
    for result in results:
        sizes = (decimal(result[key]) for key in ("weights", "compiled", "peak"))
        table.add_row(str(result["verify"]), *sizes, f"{result['ratio']:.2f}", f"{BAR}")
    console.print(table)
    write_json(arguments.json, results)
    if arguments.check and any(result["ratio"] > BAR for result in results):
        sys.exit(1)


if __name__ == "__main__":
    main()

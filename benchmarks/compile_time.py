"""How long `reparam.compile` takes: against timm's own conversion, and as a network grows.

    python benchmarks/compile_time.py [--check] [--rounds 7] [--json FILE]

Verification is off, because timm's `reparameterize_model` does none. Times are of the processor, on one thread unless
asked otherwise, so that whatever else the machine does is not counted. Each ratio is between the medians of
interleaved runs in one process.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

import torch
import torch.fx
from rich.table import Table
from torch import Tensor, nn

import reparam
from common import Timing, console, measure, parser, reparameterize_model, training_model, write_json

SHORT, LONG = 100, 3000  # blocks
FEW, MANY = 1_000, 10_000  # nodes


@dataclass(frozen=True)
class Result:
    """One comparison: seconds of ours and of what it is measured by, and the ratio that must not be passed."""

    subject: str
    ours: Timing
    rival: str
    theirs: Timing
    ratio: float
    bar: float

    @property
    def met(self) -> bool:
        return self.ratio <= self.bar


class Block(nn.Module):
    """RepVGG's training-time block, small: what is timed is the compiler, not the arithmetic."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv3x3 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm3x3 = nn.BatchNorm2d(channels)
        self.conv1x1 = nn.Conv2d(channels, channels, 1, bias=False)
        self.norm1x1 = nn.BatchNorm2d(channels)
        self.norm = nn.BatchNorm2d(channels)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm3x3(self.conv3x3(x)) + self.norm1x1(self.conv1x1(x)) + self.norm(x))


def chain(blocks: int) -> nn.Module:
    return nn.Sequential(*(Block(4) for _ in range(blocks))).eval()


class Residual(nn.Module):
    """What most convolutional networks are made of: five nodes."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm, self.act = nn.BatchNorm2d(channels), nn.ReLU()
        self.last = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.last(self.act(self.norm(self.conv(x))))


class Viewed(nn.Module):
    """Norms behind views, parallel chains, a concatenation and a sum: seventeen nodes."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.left, self.right = nn.Conv2d(channels, half, 1), nn.Conv2d(channels, half, 1)
        self.left_norm, self.right_norm = nn.BatchNorm2d(half), nn.BatchNorm2d(half)
        self.tokens, self.act = nn.Linear(channels, channels), nn.GELU()
        self.flat_norm, self.norm = nn.BatchNorm1d(channels), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.cat([self.left_norm(self.left(x)), self.right_norm(self.right(x))], 1)
        flat = self.flat_norm(both.flatten(2))
        flat = self.tokens(flat.transpose(1, 2)).transpose(1, 2)
        return self.act(self.norm(flat.reshape(x.shape)) + x + both)


def network(block: type[nn.Module], nodes: int) -> nn.Module:
    """As many blocks as have so many nodes."""
    size = len(torch.fx.symbolic_trace(block(4)).graph.nodes) - 2
    return nn.Sequential(*(block(4) for _ in range(nodes // size))).eval()


def compile_unverified(model: nn.Module) -> nn.Module:
    return reparam.compile(model, verify=False)


def against_timm(name: str, bar: float, rounds: int) -> Result:
    model, _ = training_model(name)
    contestants: dict[str, Callable[[], object]] = {
        "reparam": partial(compile_unverified, model),
        "timm": partial(reparameterize_model, model),
    }
    times = measure(contestants, rounds, clock=time.process_time)
    ratio = times["reparam"].median / times["timm"].median
    return Result(name, times["reparam"], "timm", times["timm"], ratio, bar)


def per_node(block: type[nn.Module], bar: float, rounds: int) -> Result:
    """Compare the time of a large graph, per node, with that of a small one."""
    networks = {str(nodes): partial(compile_unverified, network(block, nodes)) for nodes in (FEW, MANY)}
    times = measure(networks, rounds, clock=time.process_time)
    large, small = times[str(MANY)], times[str(FEW)]
    ratio = (large.median / MANY) / (small.median / FEW)
    return Result(f"{MANY} nodes ({block.__name__}), per node", large, f"{FEW} nodes", small, ratio, bar)


def growth(bar: float, rounds: int) -> Result:
    """Compare the time of a long chain, per block, with that of a short one."""
    chains = {str(blocks): partial(compile_unverified, chain(blocks)) for blocks in (SHORT, LONG)}
    times = measure(chains, rounds, clock=time.process_time)
    long, short = times[str(LONG)], times[str(SHORT)]
    ratio = (long.median / LONG) / (short.median / SHORT)
    return Result(f"{LONG} RepVGG blocks, per block", long, f"{SHORT} blocks", short, ratio, bar)


def render(results: list[Result]) -> Table:
    columns = ("subject", "reparam", "compared with", "takes", "ratio", "bar", "met")
    table = Table(*columns, title="Compile time, processor seconds: median (quartiles)")
    for result in results:
        met = "[green]yes[/]" if result.met else "[red]no[/]"
        times = (str(result.ours), result.rival, str(result.theirs))
        table.add_row(result.subject, *times, f"{result.ratio:.2f}", f"{result.bar:.1f}", met)
    return table


def main() -> None:
    options = parser("Time reparam.compile.")
    options.add_argument("--rounds", type=int, default=7, help="interleaved repetitions (default: 7)")
    options.add_argument("--check", action="store_true", help="exit with status 1 if a bar is missed")
    arguments = options.parse_args()
    torch.set_num_threads(arguments.threads)
    comparisons = {
        "repvit_m2_3": partial(against_timm, "repvit_m2_3", 1.5, arguments.rounds),
        "repvgg_b3": partial(against_timm, "repvgg_b3", 1.0, arguments.rounds),
        "chains": partial(growth, 1.3, max(2, arguments.rounds // 2)),  # a long one takes a while
        "residual blocks": partial(per_node, Residual, 1.5, max(2, arguments.rounds // 2)),
        "views": partial(per_node, Viewed, 1.5, max(2, arguments.rounds // 2)),
    }
    results = []
    for name, compare in comparisons.items():
        with console.status(name):
            results.append(compare())
    console.print(render(results))
    write_json(arguments.json, [asdict(result) for result in results])
    if arguments.check and not all(result.met for result in results):
        sys.exit(1)


if __name__ == "__main__":
    main()

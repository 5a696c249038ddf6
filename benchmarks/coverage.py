"""How much of each timm model four ways of fusing leave over, counted in the kernels of one inference.

    python benchmarks/coverage.py [--models NAME ...] [--markdown] [--json FILE]

Every operator that PyTorch dispatches is counted, whatever Python it came from, so no tool is judged by its own
bookkeeping. Models are fused in float32, as they are shipped, and compared in float64: what then differs is the
rounding of the fused weights, about 1e-6 of the output, or a mistake.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

import reparam
from common import cell, console, count_calls, parser, relative_error, reparameterize_model, training_model, write_json

MODELS = [
    "repvit_m0_9",
    "repvit_m1_1",
    "repvit_m2_3",
    "repvgg_a0",
    "mobileone_s0",
    "fastvit_t8",
    "repghostnet_100",
    "ghostnetv3_100",
    "levit_256",
    "efficientvit_b0",
    "starnet_s1",
    "resnet18",
    "mobilenetv3_small_100",
    "efficientnet_b0",
    "convnext_atto",
]

WAYS: dict[str, Callable[[nn.Module, Tensor], nn.Module]] = {
    "training graph": lambda model, image: model,
    "torch.fx fuse": lambda model, image: fuse(model),
    "timm reparameterize": lambda model, image: reparameterize_model(model),
    "reparam.compile": lambda model, image: reparam.compile(model, image),
}

WRONG = 1e-4  # of the largest output


@dataclass(frozen=True)
class Outcome:
    """What one way made of one model, or why it made nothing."""

    products: int = 0  # convolutions and matrix products
    norms: int = 0
    elementwise: int = 0  # arithmetic, without activations
    kernels: int = 0  # the three above and all others
    error: float = 0.0
    failure: str = ""

    def __str__(self) -> str:
        counts = (self.products, self.norms, self.elementwise, self.kernels)
        return cell(counts, self.error, self.failure, WRONG)


@torch.no_grad()
def outcome(way: Callable[[nn.Module, Tensor], nn.Module], model: nn.Module, image: Tensor) -> Outcome:
    try:
        fused = way(copy.deepcopy(model), image).eval()
        calls = count_calls(fused, image)
        error = relative_error(fused.double()(image.double()), copy.deepcopy(model).double()(image.double()))
    except Exception as exception:  # whatever a tool raises is its result
        return Outcome(failure=f"{type(exception).__name__}: {str(exception).partition(chr(10))[0]}")
    products = calls["convolution"] + calls["linear"]
    return Outcome(products, calls["norm"], calls["elementwise"], calls["kernels"], error)


def render(results: dict[str, dict[str, Outcome]]) -> Table:
    caption = "convolutions and matrix products / norms / element-wise arithmetic / all kernels, for one image"
    table = Table("model", *WAYS, title="Kernels of one inference", caption=caption)
    for name, outcomes in results.items():
        cells = (
            f"[red]{cell}[/]" if "fails" in cell or "WRONG" in cell else cell for cell in map(str, outcomes.values())
        )
        table.add_row(name, *cells)
    return table


def markdown(results: dict[str, dict[str, Outcome]]) -> str:
    header = ["model", *WAYS, "difference of reparam's"]
    rows = [
        [name, *map(str, outcomes.values()), f"{outcomes['reparam.compile'].error:.0e}"]
        for name, outcomes in results.items()
    ]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])


def main() -> None:
    options = parser("Count the kernels that each way of fusing leaves.", MODELS)
    options.add_argument("--markdown", action="store_true", help="print a Markdown table")
    arguments = options.parse_args()
    torch.set_num_threads(arguments.threads)
    results: dict[str, dict[str, Outcome]] = {}
    for name in arguments.models:
        with console.status(name):
            model, image = training_model(name)
            results[name] = {label: outcome(way, model, image) for label, way in WAYS.items()}
    if arguments.markdown:
        print(markdown(results))
    else:
        console.print(render(results))
    write_json(
        arguments.json,
        {name: {label: asdict(o) for label, o in outcomes.items()} for name, outcomes in results.items()},
    )


if __name__ == "__main__":
    main()

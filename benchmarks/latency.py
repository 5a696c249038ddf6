"""Latency of each model as trained, as timm deploys it and as reparam compiles it, eager and in ONNX Runtime.

    python benchmarks/latency.py [--models NAME ...] [--threads 1] [--batch 1] [--rounds 30] [--json FILE]

All three models of a name are timed in turn, round after round. ONNX Runtime fuses convolutions with norms itself,
and PyTorch's exporter folds constants: its column shows what is left to gain after both.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import asdict
from functools import partial

import onnxruntime
import torch
from rich.table import Table
from torch import Tensor, nn

import reparam
from common import Timing, console, measure, parser, reparameterize_model, training_model, write_json

MODELS = ["repvit_m0_9", "repvit_m2_3", "repvgg_a0", "mobileone_s0", "fastvit_t8", "repghostnet_100"]
GRAPHS = ("training", "timm", "reparam")


def session(model: nn.Module, images: Tensor, threads: int) -> Callable[[], object]:
    """Return an inference of ``model`` on ``images`` in ONNX Runtime."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's, about PyTorch
        program = torch.onnx.export(model, (images,), dynamo=True, verbose=False)
    assert program is not None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    serialised = program.model_proto.SerializeToString()
    runtime = onnxruntime.InferenceSession(serialised, options, providers=["CPUExecutionProvider"])
    return partial(runtime.run, None, {runtime.get_inputs()[0].name: images.numpy()})


@torch.inference_mode()
def latencies(name: str, batch: int, rounds: int, threads: int) -> dict[str, Timing]:
    """Return the time of one inference by ``"<graph> <runtime>"``."""
    model, image = training_model(name)
    images = image.repeat(batch, 1, 1, 1)
    graphs = dict(zip(GRAPHS, (model, reparameterize_model(model), reparam.compile(model, image)), strict=True))
    contestants: dict[str, Callable[[], object]] = {}
    for label, graph in graphs.items():
        contestants[f"{label} eager"] = partial(graph, images)
        contestants[f"{label} onnxruntime"] = session(graph, images, threads)
    return measure(contestants, rounds, warmups=3)


def render(results: dict[str, dict[str, Timing]], batch: int, threads: int) -> Table:
    title = f"Latency of {batch} image(s), {threads} thread(s): median (quartiles)"
    table = Table("model", "runtime", *GRAPHS, "training / reparam", "timm / reparam", title=title)
    for name, times in results.items():
        for runtime in ("eager", "onnxruntime"):
            training, timm, ours = (times[f"{graph} {runtime}"] for graph in GRAPHS)
            gains = (f"{other.median / ours.median:.2f}x" for other in (training, timm))
            table.add_row(name, runtime, *map(str, (training, timm, ours)), *gains)
    return table


def main() -> None:
    options = parser("Time one inference.", MODELS)
    options.add_argument("--batch", type=int, default=1, help="images per inference (default: 1)")
    options.add_argument("--rounds", type=int, default=30, help="interleaved repetitions (default: 30)")
    arguments = options.parse_args()
    torch.set_num_threads(arguments.threads)
    results = {}
    for name in arguments.models:
        with console.status(name):
            results[name] = latencies(name, arguments.batch, arguments.rounds, arguments.threads)
    console.print(render(results, arguments.batch, arguments.threads))
    write_json(
        arguments.json,
        {name: {label: asdict(timing) for label, timing in times.items()} for name, times in results.items()},
    )


if __name__ == "__main__":
    main()

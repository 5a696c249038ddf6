"""How fast a model is where it runs: as trained, compiled, and as a peer deploys it, in every runtime at hand.

>>> from reparam.bench import bench
>>> result = bench(model, torch.randn(1, 3, 224, 224), threads=2)
>>> result.row("compiled", "onnxruntime").timing
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from reparam import compiler
from reparam.bench.racing import Benchmark, Progress, Row, Settings, race
from reparam.bench.runtimes import RUNTIMES, Runtime
from reparam.errors import ReparamError, reason

__all__ = ["RUNTIMES", "Benchmark", "Row", "Runtime", "Settings", "bench", "graphs_of", "race"]

Peer = Callable[[nn.Module], nn.Module]


def bench(
    model: nn.Module,
    inputs: Tensor | tuple[Tensor, ...],
    *,
    peer: Peer | None = None,
    optimize: Sequence[str] = ("size",),
    progress: Progress | None = None,
    **settings: Any,
) -> Benchmark:
    """Time a model as it is, compiled, and as somebody else deploys it.

    Args:
        model: A training-time module; it is not changed.
        inputs: What it is called with, on the CPU; a tensor, or a tuple with one for every argument.
        peer: Somebody else's conversion to compare with, such as ``timm.utils.model.reparameterize_model``.
        optimize: Objectives of :func:`reparam.compile`, each a graph of its own.
        progress: Is told steps done, steps in all, and what is being done.
        **settings: The fields of :class:`Settings`.

    Returns:
        The graphs ``"training"``, ``"peer"`` and ``"compiled"`` in every runtime.

    Raises:
        ReparamError: The model does not run on these inputs, does not compile, or the peer fails.
    """
    call = inputs if isinstance(inputs, tuple) else (inputs,)
    how = Settings(**settings)
    return race(graphs_of(model, call, peer=peer, optimize=optimize, progress=progress), call, how, progress)


def graphs_of(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    *,
    peer: Peer | None = None,
    optimize: Sequence[str] = ("size",),
    progress: Progress | None = None,
) -> dict[str, nn.Module]:
    """The graphs that :func:`bench` compares, in eval mode; arguments and errors as there."""
    tell = progress or (lambda done, total, label: None)
    training = copy.deepcopy(model).eval()
    graphs = {"training": training}
    if peer is not None:
        tell(None, None, "asking the peer")
        try:
            graphs["peer"] = peer(copy.deepcopy(training)).eval()
        except Exception as error:
            raise ReparamError(f"the peer's conversion failed: {reason(error)}") from error
    for objective in optimize:
        tell(None, None, f"compiling for {objective}")
        name = "compiled" if objective == optimize[0] else f"compiled ({objective})"
        # Nothing is verified here: every graph is compared in every runtime before it is timed.
        graphs[name] = compiler.compile(training, inputs, optimize=objective, verify=False)
    return graphs

"""What keeps the shape of its input is asked of torch itself: a scale behind any of it folds, without an example."""

from __future__ import annotations

import inspect
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import graph_of, model
from torch import Tensor, nn
from torch.overrides import get_overridable_functions

import reparam
from reparam.graph import facts

Called = Callable[[Tensor], Any]


class Skip(Exception):
    """Why a function is none that has to let a scale pass."""


def layers() -> Iterator[tuple[str, Called]]:
    """All layers of torch that need no arguments, and no input to be told their channels by."""
    for name, cls in inspect.getmembers(nn, inspect.isclass):
        if issubclass(cls, nn.Module) and not name.startswith("Lazy") and name not in ("Container", "NLLLoss2d"):
            try:
                yield name, cls().eval()
            except TypeError:
                continue


def functions(owner: Any) -> Iterator[tuple[str, Called]]:
    """All functions of a namespace that torch says may be called with a tensor."""
    for function in get_overridable_functions()[owner]:
        if not function.__name__.startswith("sym_"):  # of numbers
            yield function.__name__, function


def methods() -> Iterator[tuple[str, Called]]:
    """All methods of a tensor."""
    for name, _ in functions(Tensor):
        if not name.startswith("__"):
            yield name, lambda x, name=name: getattr(x, name)()


NAMESPACES = {
    "torch.nn": layers(),
    "torch.nn.functional": [*inspect.getmembers(F, inspect.isroutine)],
    "torch": functions(torch),
    "torch.Tensor": methods(),
}


def check_that_it_keeps_the_shape(call: Called) -> None:
    """Raise where a function of one value does not compute another value of the same kind."""
    torch.manual_seed(0)
    x = torch.rand(2, 3, 4, 5) * 8 - 4
    try:
        made, again = call(x.clone()), call(x.clone())
    except Exception as error:
        raise Skip("takes no image alone") from error
    if not isinstance(made, Tensor) or made.layout is not torch.strided or made.is_quantized:
        raise Skip("returns no plain tensor")
    if made.shape != x.shape:
        raise Skip("returns another shape")
    if made.dtype is not x.dtype:
        raise Skip("returns another type")
    if made.equal(x):
        raise Skip("returns what it is given")
    if not made.nan_to_num().equal(again.nan_to_num()):
        raise Skip("draws random numbers")


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.rand(8, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def scale_stays_behind(call: Called) -> bool:
    act = call if isinstance(call, nn.Module) else model(lambda self, x: call(x))
    net = nn.Sequential(nn.Conv2d(3, 8, 1), act, Scale(), nn.Conv2d(8, 4, 1)).eval()
    report = reparam.compile(net, verify=False).report
    return report.after.elementwise >= report.before.elementwise


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_a_scale_behind_what_keeps_the_shape_folds_without_an_example(namespace: str) -> None:
    skipped: dict[str, list[str]] = defaultdict(list)
    folded, stays = [], []
    for name, call in NAMESPACES[namespace]:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                check_that_it_keeps_the_shape(call)
                (stays if scale_stays_behind(call) else folded).append(name)
        except Skip as reason:
            skipped[str(reason)].append(name)
    for reason, skips in skipped.items():
        print(f"{reason}: {' '.join(skips)}")
    print("folded:", *folded)
    assert not stays, f"a scale stays behind {stays}"
    assert len(folded) > 15


@pytest.mark.parametrize(
    ("layer", "channels"),
    [
        (lambda self, x: F.conv2d(x, self.wide), (6, -3)),
        (lambda self, x: F.conv2d(x, self.wide * 2, padding=1), (6, -3)),
        (lambda self, x: F.conv_transpose2d(x, self.deep, groups=2), (4, -3)),
        (lambda self, x: F.linear(x, self.flat), (3, -1)),
        (lambda self, x: F.batch_norm(x, self.mean, self.mean), (8, -3)),
        (lambda self, x: F.conv2d(x, x[:, :, :1, :1]), None),
    ],
)
def test_a_function_on_constants_makes_as_many_channels_as_its_layer(layer: Any, channels: tuple[int, int]) -> None:
    tensors = {"wide": torch.ones(6, 8, 3, 3), "deep": torch.ones(8, 2, 1, 1), "flat": torch.ones(3, 5)}
    graph = graph_of(model(layer, **tensors, mean=torch.ones(8)), torch.ones(8, 8, 4, 5))
    made = facts.of(graph.fx.output_node().args[0])
    assert made.channels == channels
    assert made.layer == (channels is not None)

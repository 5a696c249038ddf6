"""While a model is compiled, torch, Python and the user's classes are what they are at any other time."""

from __future__ import annotations

import builtins
import functools
import math
import operator
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.fx
import torch.utils.checkpoint
from networks import model, normal
from torch import Tensor, nn

import reparam

X = normal(2, 3, 8, 8)
PLACES: dict[str, Any] = {
    "torch": torch,
    "torch.Tensor": Tensor,
    "TensorBase": torch._C.TensorBase,
    "torch.nn": nn,
    "torch.nn.functional": torch.nn.functional,
    "nn.Module": nn.Module,
    "nn.Sequential": nn.Sequential,
    "nn.Conv2d": nn.Conv2d,
    "nn.BatchNorm2d": nn.BatchNorm2d,
    "torch.utils.checkpoint": torch.utils.checkpoint,
    "torch.autograd.Function": torch.autograd.Function,
    "torch.overrides": torch.overrides,
    "torch.fx": torch.fx,
    "torch.SymInt": torch.SymInt,
    "torch.Size": torch.Size,
    "torch._C": torch._C,
    "builtins": builtins,
    "math": math,
    "operator": operator,
    "functools": functools,
}


class Block(nn.Module):
    """A class of the user's."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2] % 2 == 0:
            x = x * 2
        return self.norm(self.conv(x))


def everything() -> dict[tuple[str, str], Any]:
    """The identity of every attribute; a bound method is another object each time, but of the same function."""
    return dict(_attributes())


def _attributes() -> Iterator[tuple[tuple[str, str], Any]]:
    for place, holder in {**PLACES, "Block": Block}.items():
        for name, value in list(vars(holder).items()):
            if name not in ("_", "__warningregistry__"):
                yield (place, name), id(value)


def runs(forward: Callable[[Any, Tensor], Tensor]) -> tuple[nn.Module, list[Any]]:
    """A module that looks around from inside of its forward, and what it saw."""
    seen: list[Any] = []

    def looking(self: Any, x: Tensor) -> Tensor:
        seen.append(everything())
        y = forward(self, self.block(x))
        seen.append(everything())
        return y

    return model(looking, block=Block(), last=nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))), seen


FORWARDS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "a graph": lambda s, x: s.last(x).reshape(x.shape[0], -1),
    "a branch by size": lambda s, x: s.last(x) * (2 if x.shape[2] >= 8 else 3),
    "a branch by value": lambda s, x: s.last(x) if x.sum() < 1e9 else x,
    "a checkpoint": lambda s, x: torch.utils.checkpoint.checkpoint(s.last, x, use_reentrant=False),
    "a checkpoint of the old kind": lambda s, x: torch.utils.checkpoint.checkpoint(s.last, x, use_reentrant=True),
    "in place": lambda s, x: (x.add_(1), x.__setitem__((slice(None), 0), 0.0), s.last(x))[-1],
    "random numbers": lambda s, x: s.last(x) + torch.rand(3, 1, 1),
    "numbers of Python": lambda s, x: s.last(x) * math.sqrt(max(x.shape[2], 1)) + len(range(x.shape[3])),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("sizes", ["any", "example"])
@pytest.mark.parametrize("example", [X, None])
@pytest.mark.parametrize("name", FORWARDS)
def test_all_is_the_same_before_meanwhile_and_afterwards(name: str, example: Any, sizes: str) -> None:
    net, seen = runs(FORWARDS[name])
    net(X)  # what torch imports at the first use is there now
    reparam.compile(net, example, sizes=sizes)
    seen.clear()
    before = everything()
    reparam.compile(net, example, sizes=sizes)
    assert len(seen) >= 2
    for other in (*seen, everything()):
        assert {key: value for key, value in other.items() if before.get(key) != value} == {}
        assert before.keys() == other.keys()


def test_all_is_the_same_for_another_thread_meanwhile() -> None:
    plain: list[Any] = []

    def looks() -> None:
        plain.append((everything(), torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack()))

    def forward(self: Any, x: Tensor) -> Tensor:
        thread = threading.Thread(target=looks)
        thread.start()
        thread.join()
        return self.last(x)

    net, _ = runs(forward)
    reparam.compile(net, X)
    plain.clear()
    before = everything()
    reparam.compile(net, X)
    assert plain
    assert all(found == (before, 0, 0) for found in plain)


def test_the_model_itself_is_not_touched_meanwhile() -> None:
    """Its modules are what they were when seen from inside of the copy's forward."""
    held: list[Any] = []
    net, _ = runs(lambda s, x: (held.append(looked()), s.last(x))[1])

    def looked() -> Any:
        return [
            (name, id(value), len(value) if isinstance(value, dict) else 0)
            for module in net.modules()
            for name, value in vars(module).items()
        ]

    before = looked()
    reparam.compile(net, X)
    assert held
    assert all(found == before for found in [*held, looked()])


def test_it_would_be_noticed() -> None:
    before, original = everything(), nn.Module.__call__
    try:
        nn.Module.__call__ = lambda self, *args: original(self, *args)
        during = everything()
    finally:
        nn.Module.__call__ = original
    assert [key for key in before if during[key] != before[key]] == [("nn.Module", "__call__")]
    assert everything() == before

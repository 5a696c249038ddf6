"""What changes from call to call, who reads that, and what is put back; numbers in containers."""

from __future__ import annotations

import copy
import gc
import itertools
import random
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import assert_same, model, normal
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import reparam
from reparam.errors import ConditionError, VerificationError
from reparam.modes import below, modes_kept

X = normal(2, 3, 8, 8)


def net(forward: Callable[..., Any], **members: Any) -> nn.Module:
    """A module with a forward, and a convolution with a norm to use in it."""
    return model(forward, block=nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)), **members)


def counts() -> nn.Module:
    return model(lambda s, x: (setattr(s, "n", s.n + 1), x * 1)[1], n=0)


@pytest.mark.parametrize(
    ("forward", "inner"),
    [
        (lambda s, x: s.block(x) + s.inner(x).mean() * s.inner.n, counts),
        (lambda s, x: s.block(x) + s.inner(x).mean(), lambda: model(lambda s, x: s.c(x) * s.c.n, c=counts())),
        (
            lambda s, x: s.block(x) + s.inner(x).mean() * s.inner.c.n,
            lambda: model(lambda s, x: s.c(x) * 2, c=counts()),
        ),
    ],
    ids="parent inside grandparent".split(),
)
def test_who_reads_what_a_module_counts_stays_python(forward: Any, inner: Any) -> None:
    module = net(forward, inner=inner())
    compiled = reparam.compile(module, X)
    assert compiled.report.after.norms == 0
    for _ in range(3):
        assert_same(module, compiled, X)


@pytest.mark.parametrize(
    ("kept", "use"),
    [(itertools.count(1), next), (iter([1.0, 2.0, 3.0, 4.0, 5.0]), next), (random.Random(0), lambda r: r.random())],
    ids="count list random".split(),
)
def test_an_object_that_moves_on_is_state(kept: Any, use: Callable[[Any], float]) -> None:
    module = net(lambda s, x: s.block(x) * use(s.kept), kept=kept)
    twin = copy.deepcopy(module)
    compiled = reparam.compile(module, X)
    assert compiled.report.after.norms == 0
    for _ in range(3):
        assert_same(twin, compiled, X)


@pytest.mark.parametrize(
    ("first", "others"),
    [
        ((8, 8), [(5, 6), (16, 3)]),
        ({"size": [8, 8], "align": True}, [{"size": [4, 9], "align": True}]),
        (torch.Size([8, 8]), [torch.Size([5, 6])]),
    ],
    ids="tuple dict size".split(),
)
def test_numbers_in_containers_among_the_arguments_are_numbers_of_the_graph(first: Any, others: list[Any]) -> None:
    def forward(s: Any, x: Tensor, size: Any) -> Tensor:
        return F.interpolate(s.block(x), size=size["size"] if isinstance(size, dict) else size)

    module = net(forward)
    compiled = reparam.compile(module, (X, first))
    assert isinstance(compiled, torch.fx.GraphModule)
    for size in (first, *others):
        assert torch.allclose(module(X, size), compiled(X, size))
    with pytest.raises(ConditionError, match="compiled for size as a "):
        compiled(X, 8)


def test_a_decision_by_a_number_in_a_container_is_said_in_its_words() -> None:
    module = net(lambda s, x, size: s.block(x) * (2 if size[0] > 4 else 3))
    compiled = reparam.compile(module, (X, (8, 8)))
    assert torch.allclose(module(X, (5, 1)), compiled(X, (5, 1)))
    with pytest.raises(ConditionError, match=r"compiled for inputs where size\[0\] > 4"):
        compiled(X, (3, 8))


def test_what_a_module_takes_out_of_a_dict_is_put_back_when_it_is_run_as_python() -> None:
    def takes(s: Any, x: Tensor, options: dict[str, Any]) -> Tensor:
        return x * options.pop("scale") * (2 if x.sum() > 1e9 else 1)

    module = net(lambda s, x: s.block(x) + s.takes(x, {"scale": 2.0}).mean(), takes=model(takes))
    compiled = reparam.compile(module, X)
    assert compiled.report.after.norms == 0
    assert_same(module, compiled, X)


@pytest.mark.parametrize("height", [9, 5])
def test_parts_of_a_number_that_is_asked_for_are_as_many(height: int) -> None:
    module = net(lambda s, x: s.block(x) * len(torch.tensor_split(x, 4, 2)) * len(torch.hsplit(x, 3)))
    compiled = reparam.compile(module, normal(2, 3, 9, 8))
    assert compiled.report.after.norms == 0
    assert_same(module, compiled, normal(2, 3, height, 8))


@pytest.mark.parametrize(
    ("forward", "said"),
    [
        (
            lambda y: 2 if y.flatten(0, 1).shape[0] > 4 else 3,
            "flatten.shape[0] > 4, which comes of the batch size of x",
        ),
        (lambda y: 2 if y.shape[2] > 4 else 3, "what block.0 returns.shape[2] > 4, which comes of the height of x"),
    ],
)
def test_a_condition_says_which_sizes_of_the_inputs_it_comes_of(forward: Any, said: str) -> None:
    module = net(lambda s, x: s.block(x[:, :, 1:]) * forward(s.block(x)))
    compiled = reparam.compile(module, X, sizes="example")
    assert f"only for inputs where {said}" in [remark.message for remark in compiled.report.remarks]


def test_a_remark_on_a_part_in_a_part_has_its_path_once() -> None:
    asks = model(
        lambda s, x: s.norm(s.conv(x)) if x.sum() < 1e9 else x, conv=nn.Conv2d(4, 4, 1), norm=nn.GroupNorm(2, 4)
    )
    middle = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), model(lambda s, x: s.inner(x), inner=asks))
    module = model(lambda s, x: s.middle(x) if x.sum() < 1e9 else x, middle=middle)
    remarks = reparam.compile(module, X).report.remarks
    assert any(remark.where == "middle.2.inner" for remark in remarks)
    paths = {name for name, _ in module.named_modules()}
    assert all(remark.where in paths for remark in remarks if remark.kind == "capture")


def test_a_mode_that_is_left_late_takes_no_other_with_it(capsys: Any) -> None:
    """Python closes what an interrupt has left open when it collects it."""
    unraised: list[Any] = []
    held: list[Any] = []

    @modes_kept
    def interrupted() -> None:
        manager = below(TorchDispatchMode())
        manager.__enter__()
        held.append(manager)

    interrupted()
    hook, sys.unraisablehook = sys.unraisablehook, unraised.append
    try:
        held.clear()
        gc.collect()
    finally:
        sys.unraisablehook = hook
    assert unraised == []
    assert torch._C._len_torch_dispatch_stack() == 0


@pytest.mark.parametrize("options", [{}, {"sizes": "example"}, {"example_inputs": X}], ids=str)
def test_who_reads_a_size_that_python_keeps_stays_python(options: dict[str, Any]) -> None:
    """The part is kept as it is, since it asks for a value; nobody sees the one around it read a number."""

    def keeps(self: Any, x: Tensor) -> Tensor:
        self.size = tuple(x.shape[2:])
        return x[..., ::2, ::2] if x.sum() > 0 else x[..., 1::2, ::2]

    inner = model(lambda s, x: F.interpolate(s.part(x), size=s.part.size), part=model(keeps, size=None))
    module = net(lambda s, x: s.inner(s.block(x)), inner=inner)
    compiled = reparam.compile(module, **options)
    for x in (X, normal(1, 3, 12, 9)):
        assert_same(module, compiled, x)


def test_a_size_that_is_kept_where_nobody_sees_it_is_told() -> None:
    """In no module, and in nothing that one holds: the result is compared at another size, and refused."""
    kept = {}

    def keeps(self: Any, x: Tensor) -> Tensor:
        kept["size"] = tuple(x.shape[2:])
        return x[..., ::2, ::2] if x.sum() > 0 else x[..., 1::2, ::2]

    module = net(lambda s, x: F.interpolate(s.part(s.block(x)), size=kept["size"]), part=model(keeps))
    with pytest.raises(VerificationError):
        reparam.compile(module, X)


def test_a_decision_by_random_numbers_is_made_at_every_call() -> None:
    """They depend on nothing but a size, and are no constants for it."""

    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.block(x)
        return x * 2 if torch.bernoulli(torch.full_like(x[0, 0, 0], 0.5)).sum() >= 4 else x

    compiled = reparam.compile(net(forward), X, sizes="example")
    torch.manual_seed(0)
    assert len({compiled(X).sum().item() for _ in range(20)}) == 2

"""What recording a model promises, point by point.

PYTEST_DONT_REWRITE: an assert in a model has to be the model's own, not the code that pytest makes of it.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import enum
import functools
import io
import operator
import pickle
import sys
import threading
import warnings
import weakref
from collections import namedtuple
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from networks import assert_same, model, normal
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import reparam
from reparam.capture import capture, private_copy, record
from reparam.errors import ConditionError
from support import ModelOutput, Net, randomise

SIZES = ((2, 3, 8, 8), (1, 3, 8, 8), (3, 3, 9, 6), (2, 3, 7, 12))
X = normal(*SIZES[0])


class ConvNorm(nn.Module):
    def __init__(self, channels: int = 3, out: int = 4) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)).relu()


def net(forward: Callable[..., Any], **members: Any) -> nn.Module:
    """A module with a forward, and a block of convolution and norm to use in it."""
    return model(forward, block=ConvNorm(), **members)


def captured_remarks(compiled: nn.Module) -> list[str]:
    """What the report says of capturing, but for inputs that were made up and results that nobody reads."""
    kinds = ("Record", "Condition", "Inside", "Verify")
    return [remark.message for remark in compiled.report.remarks if remark.rule in kinds]


def targets(compiled: nn.Module) -> list[Any]:
    return [node.target for node in compiled.graph.nodes if node.op.startswith("call_") and node.op != "call_module"]


def assert_same_everywhere(module: nn.Module, compiled: nn.Module) -> None:
    for size in SIZES:
        assert_same(module, compiled, normal(*size))


def compiled_whole(module: nn.Module, example: Any = X, **options: Any) -> nn.Module:
    """Compile to one graph without norms, which computes the same at every size."""
    compiled = reparam.compile(module, example, **options)
    assert isinstance(compiled, torch.fx.GraphModule)
    assert (compiled.report.after.norms, captured_remarks(compiled)) == (0, [])
    assert_same_everywhere(module, compiled)
    return compiled


# 1. Only tensors come out of what is recorded.


@pytest.mark.parametrize(
    "forward",
    [
        lambda x: x if x.mean() > 0 else -x,
        lambda x: x * x.amax().item(),
        lambda x: x * max(x.mean((0, 2, 3)).tolist()),
        lambda x: x if torch.equal(x, x.relu()) else x.relu(),
        lambda x: x + 1 if torch.allclose(x, x.abs()) else x,
        lambda x: x * float(x.sum()),
        lambda x: x * int(x.sum()),
        lambda x: x + 1 if x.sum() in (0.0, 1.0) else x - 1,
        lambda x: x + torch.from_numpy(x.detach().numpy().clip(0)),
        lambda x: x * len(str(x)),
        lambda x: x * len(x[x > 0]),
        lambda x: x * len(torch.nonzero(x > 0)),
        lambda x: x * len(f"{x.sum():.1f}"),
        lambda x: x[:, :, [int(x.argmax()) % 2]],
        lambda x: x * ((x.sum() > 0 and 2) or 3),
    ],
)
def test_a_value_that_python_asks_for_keeps_the_innermost_module(forward: Callable[[Tensor], Tensor]) -> None:
    module = net(lambda s, x: s.block(x) + s.asks(x).mean(), asks=Net(lambda s, x: forward(x)))
    compiled = reparam.compile(module, X)
    assert isinstance(compiled, torch.fx.GraphModule)
    assert compiled.report.after.norms == 0
    (reason,) = captured_remarks(compiled)
    assert reason.startswith("Net is kept as it is: ")
    assert_same_everywhere(module, compiled)
    assert_same(module, compiled, -X)


@pytest.mark.parametrize(
    "forward",
    [
        lambda x: x * (2 if x.is_contiguous() else 3),
        lambda x: x * (2 if x.stride(1) > 1 else 3),
        lambda x: x * (2 if x.storage_offset() else 3),
        lambda x: x * (2 if x.data_ptr() % 1024 else 3),
        lambda x: x * (2 if x.is_contiguous(memory_format=torch.channels_last) else 3),
    ],
)
def test_how_an_image_lies_in_memory_is_no_part_of_a_graph(forward: Callable[[Tensor], Tensor]) -> None:
    module = net(lambda s, x: s.block(x) + s.asks(x).mean(), asks=Net(lambda s, x: forward(x)))
    compiled = reparam.compile(module, X)
    assert compiled.report.after.norms == 0
    for x in (X, X.to(memory_format=torch.channels_last), torch.cat([X, X])[2:], normal(2, 3, 8, 16)[..., ::2]):
        with torch.no_grad():
            assert torch.allclose(module(x), compiled(x))


def test_types_and_devices_are_asked_at_every_call() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        y = s.block(x)
        return y + torch.arange(y.shape[-1], dtype=y.dtype, device=y.device) + s.shift.to(y.dtype)

    module = net(forward, shift=nn.Parameter(torch.ones(())))
    compiled = compiled_whole(module)
    for change in (lambda m: m.float(), lambda m: m.bfloat16(), lambda m: m.to(memory_format=torch.channels_last)):
        changed, twin = change(copy.deepcopy(compiled)), change(copy.deepcopy(module))
        x = X.to(next(twin.parameters()).dtype)
        with torch.no_grad():
            expected, actual = twin(x), changed(x)
        assert actual.dtype == expected.dtype
        assert torch.allclose(expected.float(), actual.float(), rtol=0.1, atol=0.1)


def test_a_branch_by_type_is_a_condition() -> None:
    module = net(lambda s, x: s.block(x) * (2 if x.dtype == torch.float64 else 3))
    compiled = reparam.compile(module, X)
    assert compiled.report.after.norms == 0
    assert_same_everywhere(module, compiled)
    with pytest.raises(ConditionError, match=r"x is of torch\.float64"):
        compiled.float()(X.float())


# 2. In place.


@pytest.mark.parametrize(
    "forward",
    [
        lambda s, x: s.block(x).add_(1).mul_(2),
        lambda s, x: (y := s.block(x), y.__setitem__((..., 0), 2.0), y + 1)[-1],
        lambda s, x: (y := s.block(x), y.__setitem__((slice(None), 0), y[:, 1]), y)[-1],
        lambda s, x: (y := s.block(x), y[:, :2].mul_(3), y * 2)[-1],
        lambda s, x: (y := s.block(x), y.view(y.shape[0], -1).add_(1), y)[-1],
        lambda s, x: (y := s.block(x), [part.mul_(i) for i, part in enumerate(y.chunk(2, 1))], y)[-1],
        lambda s, x: (y := torch.zeros(2), s.block(x))[-1] + torch.add(x.mean(), y.sum(), out=y.sum()),
        lambda s, x: (y := s.block(x), z := y * 2, torch.add(y, 1, out=z), y + z)[-1],
        lambda s, x: (y := s.block(x), z := y, y := operator.iadd(y, 1), y + z)[-1],
        lambda s, x: (y := s.block(x), z := y.new_zeros(y.shape), z.copy_(y), z[:, 1:].neg_(), z)[-1],
        lambda s, x: (y := s.block(x), z := y.clone(), F.relu_(y - 1), F.relu(y, inplace=True), y + z)[-1],
        lambda s, x: s.block(x.mul_(2)) + x.mean(),
        lambda s, x: (y := s.block(x), y.masked_fill_(y < 0.5, 7), y)[-1],
        lambda s, x: (y := s.block(x), y.__setitem__(y < 0.5, 7.0), y)[-1],
    ],
)
def test_what_is_changed_in_place_has_changed_for_all_who_read_it(forward: Callable[..., Tensor]) -> None:
    module = net(forward)
    compiled = reparam.compile(module, X)
    assert isinstance(compiled, torch.fx.GraphModule)
    assert_same_everywhere(module, compiled)


def test_a_constant_that_is_written_to_begins_anew_at_every_call() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        y = torch.zeros(4, 1, 1, dtype=x.dtype)
        y += x.mean()
        y[0] = 5
        return s.block(x) + y

    compiled = compiled_whole(net(forward))
    assert torch.equal(compiled(X), compiled(X))


def test_an_item_of_a_constant_is_set_anew_at_every_call() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        y = torch.zeros(2, 4, 1, 1, dtype=x.dtype)
        y[0] = 1
        y[1] = x.mean()
        return s.block(x) * y[1] + y.sum(0)

    compiled_whole(net(forward))


# 3. Sizes.


@pytest.mark.parametrize(
    "forward",
    [
        lambda s, x: s.block(x).reshape(x.shape[0], 2, -1, x.shape[3]),
        lambda s, x: s.block(x) + torch.arange(x.shape[3]) / x.shape[2],
        lambda s, x: (y := s.block(x)).flatten(2).mT.reshape(y.size(0), -1, y.size(1)),
        lambda s, x: s.block(x)[:, :, : x.shape[2] // 2 + 1],
        lambda s, x: F.interpolate(s.block(F.avg_pool2d(x, 2)), size=x.shape[-2:]),
        lambda s, x: s.block(x) * (x.shape[2] * x.shape[3]) ** -0.5,
        lambda s, x: s.block(x) / x.numel() + x[0].nelement(),
        lambda s, x: s.block(x) + torch.full((x.size(2), 1), 1.0 / x.size(3)),
        lambda s, x: s.block(F.pad(x, (0, -x.shape[3] % 4, 0, x.shape[2] % 2))),
        lambda s, x: s.block(x).expand(2, *x.shape[:1], *[-1] * 3),
        lambda s, x: s.block(x).mean() * torch.ones(tuple(x.shape)[2:]),
        lambda s, x: s.block(x) * torch.tensor(1.0).expand(x.shape[2:]),
        lambda s, x: F.adaptive_avg_pool2d(s.block(x), (x.shape[2] // 2, 3)),
        lambda s, x: s.block(x) * torch.tensor([x.shape[2], x.shape[3]]).prod(),
    ],
)
def test_sizes_are_computed_at_every_call(forward: Callable[..., Tensor]) -> None:
    compiled_whole(net(forward))


@pytest.mark.parametrize(
    ("use", "said"),
    [
        (lambda size: {8: 2.0, 9: 3.0}[size], "the height of x is 8"),
        (lambda size: 2.0 if size in {8, 16} else 3.0, "the height of x is 8"),
        (lambda size: len({size, 8}), "the height of x is 8"),
        (lambda size: {"8": 2.0}.get(f"{size}", 3.0), "the height of x is 8"),
        (lambda size: {"08": 2.0}.get(f"{size:02}", 3.0), "the height of x is 8"),
        (lambda size: {"8": 2.0}.get(str(size), 3.0), "the height of x is 8"),
        (lambda size: {"08": 2.0}.get(format(size, "02"), 3.0), "the height of x is 8"),
        (lambda size: [1, 2, 3, 4, 5, 6, 7, 8, 9, 10][size], "the height of x is 8"),
        (lambda size: len(range(size)), "the height of x is 8"),
        (lambda size: len([1] * size), "the height of x is 8"),
        (lambda size: bin(size).count("1"), "the height of x is 8"),
        (lambda size: size.bit_length(), "the height of x is 8"),
        (lambda size: memory(size), "the height of x is 8"),
        (lambda size: 2 if size % 4 == 0 else 3, "the height of x is a multiple of 4"),
        (lambda size: 2 if size >= 8 else 3, "x.shape[2] >= 8"),
        (lambda size: 2 if not size % 3 else 3, "x.shape[2] % 3 is 2|the height of x is not a multiple of 3"),
        (lambda size: sum(1 for _ in range(0, size, 4)), "the height of x is 8"),
    ],
)
def test_what_cannot_stay_symbolic_is_a_condition(use: Callable[[int], float], said: str) -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        return s.block(x) * use(x.shape[2])

    module = net(forward)
    compiled = reparam.compile(module, X, sizes="example")
    assert isinstance(compiled, torch.fx.GraphModule)
    assert compiled.report.after.norms == 0
    (remark,) = captured_remarks(compiled)
    assert any(f"only for inputs where {words}" == remark for words in said.split("|"))
    assert_same(module, compiled, X)
    assert_same(module, compiled, normal(5, 3, 8, 11))
    with pytest.raises(ConditionError, match=r"compiled for inputs where .*; call it with such inputs, or compile"):
        compiled(normal(2, 3, 6, 8))
    # By default, the module that decides stays, and works at every size that the model works at.
    compiled = reparam.compile(module, X)
    assert compiled.report.after.norms == 0
    for height in (8, 9):
        assert_same(module, compiled, normal(2, 3, height, 8))


@functools.lru_cache
def memory(size: int) -> float:
    return size / 10


def test_sizes_that_a_model_returns_are_those_of_the_call() -> None:
    module = net(lambda s, x: (s.block(x), x.shape[2], {"sizes": [x.shape[0] * 2, x.shape], "ratio": x.shape[2] / 4}))
    compiled = reparam.compile(module, X)
    for batch, _, height, width in SIZES:
        _, second, third = compiled(normal(batch, 3, height, width))
        assert (second, third) == (height, {"sizes": [batch * 2, (batch, 3, height, width)], "ratio": height / 4})
        assert [type(value) for value in (second, third["ratio"], third["sizes"][1])] == [int, float, torch.Size]


def test_channels_that_a_layer_settles_are_plain_numbers() -> None:
    seen: list[Any] = []

    def forward(s: Any, x: Tensor) -> Tensor:
        y = s.block(x)
        seen.append(tuple(type(size) is int for size in y.shape))
        return y * (2 if y.shape[1] == 4 and {4: True}[y.size(1)] else 3)

    compiled_whole(net(forward))
    assert (False, True, False, False) in seen


def test_a_size_is_an_int_to_python_that_asks() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        height = x.shape[2]
        assert isinstance(height, int)
        assert not isinstance(height, (float, bool))
        assert isinstance(height / 2, float)
        assert isinstance(x.shape, torch.Size)
        return s.block(x) * (height / 2)

    compiled_whole(net(forward))


def test_an_exception_that_the_plain_run_does_not_raise_never_reaches_the_user() -> None:
    """A C extension may take no symbolic number."""
    import math

    def forward(s: Any, x: Tensor) -> Tensor:
        factors = bytes(x.shape[2:])  # wants plain ints
        return x * math.comb(factors[0], 2)

    module = net(lambda s, x: s.block(x) + s.asks(x).mean(), asks=Net(forward))
    compiled = reparam.compile(module, X)
    assert compiled.report.after.norms == 0
    assert_same_everywhere(module, compiled)


# 4. Conditions.


def test_a_condition_is_said_in_the_report_in_the_terms_of_the_inputs() -> None:
    module = net(lambda s, image: s.block(image) * (1 if image.shape[2] % 32 == 0 else 2))
    compiled = reparam.compile(module, normal(1, 3, 64, 8), sizes="example")
    assert captured_remarks(compiled) == ["only for inputs where the height of image is a multiple of 32"]
    assert "the height of image is a multiple of 32" in str(compiled.report)
    assert_same(module, compiled, normal(2, 3, 32, 9))
    with pytest.raises(ConditionError, match="the height of image is a multiple of 32; call it with such inputs, or"):
        compiled(normal(1, 3, 33, 8))


def test_what_the_model_demands_costs_nothing() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        assert x.shape[1] == 3
        assert x.shape[2] >= 4, f"{x.shape} is too small"
        torch._assert(x.shape[3] >= 4, "too narrow")
        if x.shape[2] > 1000 or x.shape[3] < 2:
            raise ValueError(f"{x.shape[2]} by {x.shape[3]}")
        return s.block(x)

    compiled = compiled_whole(net(forward))
    for size in ((1, 3, 2, 8), (1, 3, 8, 3), (1, 3, 1001, 4)):
        with pytest.raises((ConditionError, AssertionError)):
            compiled(normal(*size))


def test_a_decision_that_always_comes_out_alike_is_none() -> None:
    compiled_whole(net(lambda s, x: s.block(F.pad(x, (0, 0, 0, max(-x.shape[2] % 4, 0)))) if x.shape[2] > 0 else x))


def test_only_the_module_that_decides_stays_python() -> None:
    decides = model(lambda s, x: s.block(x) if x.shape[2] % 2 else s.block(x.flip(2)) * x.shape[2], block=ConvNorm(4))
    module = nn.Sequential(ConvNorm(), decides, ConvNorm(4)).double().eval()
    compiled = reparam.compile(randomise(module), X)
    assert isinstance(compiled, torch.fx.GraphModule)
    assert compiled.report.after.norms == 0
    assert [remark.where for remark in compiled.report.remarks if remark.rule == "Record"] == ["1"]
    assert_same_everywhere(module, compiled)


def test_a_number_that_is_checked_once_it_was_made_use_of_is_no_demand() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        number = operator.index(x.shape[3])
        if number < 0:
            raise ValueError
        return self.block(x) * number

    module = net(forward)
    assert_same_everywhere(module, reparam.compile(module, X))


def test_what_a_module_that_stays_decides_is_no_way_of_the_one_around_it() -> None:
    inner = model(lambda s, x: s.block(x) * (2 if x.shape[2] > 8 and x.sum() > 1e9 else 3), block=ConvNorm(3, 3))
    module = net(lambda s, x: s.block(s.inner(x)).reshape(len(x), -1), inner=inner)
    assert_same_everywhere(module, reparam.compile(module, X))


def test_indices_that_are_computed_are_integers() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        i = torch.arange(x.shape[2])
        return self.block(x)[:, :, (i + 1) * 2 - i - 2]

    compiled_whole(net(forward))


class SamePadding(nn.Module):
    """TensorFlow's: the layers of transformers' MobileNets decide by size how much they pad."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, out, 3, 2, bias=False), nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[-2:]
        rows = max(3 - 2, 0) if h % 2 == 0 else max(3 - h % 2, 0)
        columns = max(3 - 2, 0) if w % 2 == 0 else max(3 - w % 2, 0)
        padding = (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)
        return torch.relu(self.norm(self.conv(F.pad(x, padding))))


@pytest.mark.parametrize("example", [X, None])
@pytest.mark.parametrize("depth", [1, 2])
def test_a_part_that_pads_as_a_size_has_it(example: Any, depth: int) -> None:
    module = nn.Sequential(*[SamePadding(3 if i == 0 else 8, 8) for i in range(depth)])
    module = (module if depth > 1 else module[0]).double().eval()
    compiled = reparam.compile(randomise(module), example)
    assert compiled.report.after.norms == 0
    assert_same_everywhere(module, compiled)


@pytest.mark.parametrize("sizes", ["any", "example"])
@pytest.mark.parametrize("height", [8, 9])
def test_how_many_parts_there_are_is_a_condition(height: int, sizes: str) -> None:
    module = net(lambda s, x: torch.cat([part * i for i, part in enumerate(s.block(x).chunk(4, 2))], 2))
    compiled = reparam.compile(module, normal(2, 3, height, 8), sizes=sizes)
    assert compiled.report.after.norms == 0
    for other in (3, 8, 9, 10, 12):
        try:
            assert_same(module, compiled, normal(1, 3, other, 8))
        except ConditionError:
            assert (sizes, other == height) == ("example", False)


@pytest.mark.parametrize("height", [8, 10])
def test_an_error_that_the_model_catches_is_a_decision(height: int) -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        y = s.block(x)
        try:
            return y + y.reshape(x.shape[0], 2, -1, 5).sum()
        except RuntimeError:
            return y * 2

    module = net(forward)
    compiled = reparam.compile(module, normal(2, 3, height, 8))
    for other in (8, 10):
        assert_same(module, compiled, normal(2, 3, other, 8))


def test_a_decision_in_a_module_of_its_own_that_returns_a_class_of_its_own() -> None:
    class Images(list):
        pass

    decides = Net(lambda s, x: Images([x * (x.shape[2] // 9 or 7), -x]))
    outer = Net(lambda s, x: s.inner(x)[0] * 2, inner=decides)
    module = net(lambda s, x: (y := s.outer(s.block(x))) * (2 if y.shape[2] > 8 else 3), outer=outer)
    compiled = reparam.compile(module, X)
    assert compiled.report.after.norms == 0
    assert_same_everywhere(module, compiled)


def test_a_merged_weight_beside_a_decision() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        s.merged = s.last.weight * 2
        y = F.conv2d(s.block(x), s.merged, s.last.bias)
        return y * (y.shape[2] // 9 or 7)

    module = net(forward, last=nn.Conv2d(4, 4, 1), merged=None)
    assert_same_everywhere(module, reparam.compile(module, X))


# 5. What the example decides besides sizes.


class Optional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = ConvNorm()

    def forward(self, x: Tensor | None = None, mask: Tensor | None = None, flip: bool = False, how: str = "sum") -> Any:
        if x is None:
            raise ValueError("x has to be given")
        y = self.block(x)
        y = y.flip(-1) if flip else y
        y = y if mask is None else y * mask
        return y if how == "sum" else (y, y.mean())


@pytest.mark.parametrize("example", [None, X, {"x": X}])
def test_a_first_argument_may_be_optional(example: Any) -> None:
    compiled_whole(randomise(Optional().double()).eval(), example)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ({"mask": torch.ones(8)}, "mask as None, not a tensor"),
        ({"flip": True}, "flip as False, not True"),
        ({"how": "both"}, "how as 'sum', not 'both'"),
        ({"x": X[0]}, "x as a tensor of floating-point numbers with 4 axes, not a tensor .* with 3 axes"),
        ({"x": X.long()}, "x as a tensor of floating-point numbers"),
        ({"x": [X]}, "x as a tensor of .*, not a sequence of 1"),
        ({"x": None}, "x as a tensor of .*, not None"),
    ],
)
def test_another_call_than_the_recorded_kind_is_refused(call: dict[str, Any], said: str) -> None:
    compiled = reparam.compile(randomise(Optional().double()).eval(), X)
    with pytest.raises(ConditionError, match=f"compiled for {said}.*; call it with such inputs, or compile the model"):
        compiled(**{"x": X, **call})
    compiled(X, None, False, how="sum")


def test_flags_and_optional_arguments_that_the_example_gives_are_taken() -> None:
    module = randomise(Optional().double()).eval()
    compiled = reparam.compile(module, {"x": X, "mask": normal(8), "flip": True, "how": "both"})
    assert isinstance(compiled, torch.fx.GraphModule)
    given = {"mask": normal(1, seed=1), "flip": True, "how": "both"}
    for expected, actual in zip(module(X, **given), compiled(X, **given), strict=True):
        assert torch.allclose(expected, actual)
    with pytest.raises(ConditionError, match="compiled for mask as a tensor"):
        compiled(X, flip=True, how="both")


def test_numbers_among_the_arguments_are_numbers_of_the_graph() -> None:
    module = net(lambda s, x, scale, shift=1.0: s.block(x) * scale + shift)
    compiled = reparam.compile(module, (X, 2.0, 3.0))
    for scale in (2.0, 3.0, 4):
        assert torch.allclose(module(X, scale, 5), compiled(X, scale, 5))


def test_a_number_that_the_example_leaves_out_is_not_ignored_when_it_is_given() -> None:
    module = net(lambda s, x, shift=1.0: s.block(x) + shift)
    compiled = reparam.compile(module, X)
    assert torch.allclose(module(X), compiled(X))
    with pytest.raises(ConditionError, match=r"compiled for shift as 1\.0, not "):
        compiled(X, shift=5.0)


def test_a_branch_by_the_type_of_an_argument_is_the_recorded_one() -> None:
    def forward(s: Any, x: Any) -> Tensor:
        return s.block(x["image"]) if isinstance(x, dict) else s.block(x[0] if isinstance(x, (list, tuple)) else x)

    module = net(forward)
    for call in (X, [X], {"image": X}):
        compiled = reparam.compile(module, (call,))
        assert torch.allclose(module(call), compiled(call))
        for other in (X, [X], {"image": X}):
            if type(other) is not type(call):
                with pytest.raises(ConditionError, match="compiled for x as "):
                    compiled(other)


class Mode(enum.Enum):
    A = 1
    B = 2


class Settings:
    def __init__(self, scale: float) -> None:
        self.scale = scale


# What a call gives beside an image, something else, and what is made of it.
OTHERS: dict[str, tuple[Any, Any, Callable[..., Tensor]]] = {
    "number in a dict": ({"scale": 2.0}, {"scale": 3.0}, lambda y, o: y * o["scale"]),
    "number in a tuple": ((4, 4), (5, 6), lambda y, o: F.interpolate(y, o)),
    "int": (1, 2, lambda y, o: y[:, o]),
    "int or float": (2, 2.5, lambda y, o: y * (2 if isinstance(o, int) else 3)),
    "truth of a number": (1, 0, lambda y, o: y * (2 if o else 3)),
    "sign of a number": (1.0, -1.0, lambda y, o: y * (2 if o > 0 else 3)),
    "loop": (2, 3, lambda y, o: sum(y * i for i in range(o))),
    "flag": (True, False, lambda y, o: y * (2 if o else 3)),
    "text": ("ab", "abc", lambda y, o: y * len(o)),
    "type": (torch.float32, torch.float64, lambda y, o: y.to(o)),
    "enumeration": (Mode.A, Mode.B, lambda y, o: y * (2 if o is Mode.A else 3)),
    "object": (Settings(2.0), Settings(3.0), lambda y, o: y * o.scale),
    "slice": (slice(0, 3), slice(0, 4), lambda y, o: y[..., o]),
    "set": ({1}, {1, 2}, lambda y, o: y * len(o)),
    "function": (torch.sigmoid, torch.tanh, lambda y, o: o(y)),
    "module": (nn.Sigmoid(), nn.Tanh(), lambda y, o: o(y)),
    "order of keys": ({"a": X, "b": -X}, {"b": -X, "a": X}, lambda y, o: y + next(iter(o.values())).mean()),
    "tensor in an object": (Settings(X.mean()), Settings(X.sum()), lambda y, o: y * o.scale),
    "tensors in lists": ([X, {"b": X.mean()}], [X, {"b": X.sum()}], lambda y, o: y + o[1]["b"]),
    "gradients": (X, X.clone().requires_grad_(), lambda y, o: y * (2 if o.requires_grad else 3)),
    "parameter": (X, nn.Parameter(X), lambda y, o: y * (2 if isinstance(o, nn.Parameter) else 3)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_argument_is_taken_or_refused(name: str) -> None:
    first, second, function = OTHERS[name]
    module = net(lambda s, x, other: function(s.block(x), other))
    compiled = reparam.compile(module, (X, first))
    assert compiled.report.after.norms == 0
    with torch.no_grad():
        assert torch.allclose(module(X, first), compiled(X, first))
        expected = module(X, second)
        try:
            actual = compiled(X, second)
        except ConditionError:
            return
        assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
        assert torch.allclose(expected, actual)


def test_an_image_that_is_given_twice_is_the_same_image() -> None:
    module = net(lambda s, x, y: s.block(x) * (2 if x is y else 3))
    compiled = reparam.compile(module, (X, X))
    assert torch.allclose(module(X, X), compiled(X, X))
    with contextlib.suppress(ConditionError):
        assert torch.allclose(module(X, X.clone()), compiled(X, X.clone()))


class Stars(nn.Module):
    """Hands on to another method, and walks over all modules in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.block = ConvNorm()

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Tensor:
        if isinstance(x, dict):
            return self.loss(x, *args, **kwargs)
        return self.predict(x, *args, **kwargs)

    def predict(self, x: Tensor, profile: bool = False, visualize: bool = False) -> Tensor:
        return self.block(x)

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        return sum(p.norm() for m in self.modules() for p in m.parameters())


def returns_a_tuple_on_request(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        as_tuple = kwargs.pop("as_tuple", False)
        y = function(self, *args, **kwargs)
        return (y,) if as_tuple else y

    return wrapper


class Decorated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = ConvNorm(3, 3), ConvNorm()

    @returns_a_tuple_on_request
    def forward(self, pixel_values: Tensor, mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        if kwargs.get("output_hidden_states"):
            for module in self.modules():
                module.register_forward_hook(print)
        return self.b(self.a(pixel_values))


@pytest.mark.parametrize("example", [None, X])
@pytest.mark.parametrize("module", [Stars(), Decorated(), nn.Sequential(Decorated()), nn.Sequential(Stars())])
def test_stars_and_decorators_are_pythons_business(module: nn.Module, example: Any) -> None:
    module = randomise(copy.deepcopy(module).double()).eval()
    compiled = reparam.compile(module, example)
    assert isinstance(compiled, torch.fx.GraphModule)
    assert compiled.report.after.norms == 0
    assert_same_everywhere(module, compiled)


# 6. Without an example.


def test_what_was_made_up_is_said() -> None:
    compiled = reparam.compile(net(lambda s, x: s.block(x)))
    (remark,) = (remark.message for remark in compiled.report.remarks if remark.rule == "Example")
    assert remark.startswith("no example inputs were given; made up: x of torch.float64, 2x3x")
    with pytest.raises(ConditionError, match="compiled for x as a tensor of floating-point numbers with 4 axes"):
        compiled(X[0])


def test_an_example_of_one_image_does_not_pin_the_batch() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        y = s.block(x)
        batch, *_ = y.shape
        return y.reshape(batch, -1) + x.mean((1, 2, 3)).reshape(-1, 1) * torch.ones(x.shape[0], 1)

    compiled_whole(net(forward), X[:1])


def test_where_nothing_can_be_made_up_the_parts_are_compiled_and_an_example_is_asked_for() -> None:
    def forward(s: Any, batch: Any) -> Tensor:
        return s.block(batch["image"]) + s.block(batch["other"])

    module = net(forward)
    compiled = reparam.compile(module)
    assert compiled.report.after.norms == 0
    assert "pass example_inputs" in str(compiled.report)
    batch = {"image": X, "other": X + 1}
    assert torch.allclose(module(batch), compiled(batch))


def test_channels_that_were_made_up_decide_nothing() -> None:
    """No layer says how many channels there are."""
    module = model(lambda s, x: torch.cat([*x.chunk(4, 1)][::-1], 1) * x.shape[1] + x.mean())
    compiled = reparam.compile(module)
    for channels in (4, 8, 3):
        try:
            assert_same(module, compiled, normal(2, channels, 8, 8))
        except ConditionError:
            continue


# 7. State.


class CachesBySize(nn.Module):
    """The anchors of a detector, kept until an image of another size comes."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.shape, self.anchors = ConvNorm(), None, torch.zeros(0)

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(x)
        if self.shape != x.shape:
            self.shape, self.anchors = x.shape, torch.arange(x.shape[-1], dtype=x.dtype, device=x.device) / x.shape[-2]
        return y + self.anchors


class CachesInADict(CachesBySize):
    def __init__(self) -> None:
        super().__init__()
        self.anchors: Any = {}

    def forward(self, x: Tensor) -> Tensor:
        key = (x.shape[2], x.shape[3])
        if key not in self.anchors:
            self.anchors[key] = torch.linspace(0, 1, x.shape[3], dtype=x.dtype)
        return self.block(x) + self.anchors[key]


class CachesInABuffer(CachesBySize):
    def __init__(self) -> None:
        super().__init__()
        del self.anchors
        self.register_buffer("anchors", torch.zeros(0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.anchors.shape[-1:] != x.shape[-1:]:
            self.anchors = torch.arange(x.shape[-1], dtype=x.dtype)
        return self.block(x) + self.anchors


@pytest.mark.parametrize("already_run", [False, True])
@pytest.mark.parametrize("sizes", ["any", "example"])
@pytest.mark.parametrize("cls", [CachesBySize, CachesInADict, CachesInABuffer])
def test_what_is_cached_by_size_is_right_at_another(cls: Any, sizes: str, already_run: bool) -> None:
    module = randomise(cls()).double().eval()
    if already_run:
        module(X)
    before = dict(module.__dict__)
    compiled = reparam.compile(module, X, sizes=sizes)
    assert all(module.__dict__[name] is value for name, value in before.items())
    assert compiled.report.after.norms == 0
    for size in (*SIZES, SIZES[0]):
        try:
            assert_same(module, compiled, normal(*size))
        except ConditionError:
            assert (sizes, size == SIZES[0]) == ("example", False)


@pytest.mark.parametrize("already_run", [False, True])
def test_a_cache_by_size_becomes_part_of_the_graph(already_run: bool) -> None:
    module = randomise(CachesBySize()).double().eval()
    if already_run:
        module(X)
    compiled_whole(module)


class Merges(nn.Module):
    """Merges its weights anew at every call, and keeps the result."""

    def __init__(self, start: Any, as_buffer: bool) -> None:
        super().__init__()
        self.one, self.three = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 3, padding=1)
        if as_buffer:
            self.register_buffer("merged", start, persistent=False)
        else:
            self.merged = start

    def forward(self, x: Tensor) -> Tensor:
        self.merged = self.three.weight.detach() + F.pad(self.one.weight.detach(), (1, 1, 1, 1))
        return F.conv2d(x, self.merged, self.one.bias + self.three.bias, padding=1)


@pytest.mark.parametrize("start", [None, torch.zeros(4, 3, 3, 3), "a run"])
@pytest.mark.parametrize("as_buffer", [False, True])
@pytest.mark.parametrize("example", [None, X])
def test_weights_that_are_merged_at_every_call_are_merged_once(start: Any, as_buffer: bool, example: Any) -> None:
    merges = Merges(None if isinstance(start, str) else start, as_buffer).double()
    if isinstance(start, str):
        merges(X)
        merges.three.weight.data.mul_(2)  # trained since
    module = nn.Sequential(merges, nn.BatchNorm2d(4)).double().eval()
    compiled = reparam.compile(module, example)
    assert (compiled.report.after.norms, compiled.report.after.kernels) == (0, 1)
    assert_same_everywhere(module, compiled)


@pytest.mark.parametrize(
    "count",
    [
        lambda s, x: setattr(s, "calls", s.calls + 1),
        lambda s, x: s.seen.append(1),
        lambda s, x: s.tensors.append(torch.ones(())),
        lambda s, x: s.number.add_(1),
        lambda s, x: setattr(s, "number", s.number + 1),
        lambda s, x: s.named.update(n=s.named["n"] + 1),
        lambda s, x: s.named.update({len(s.named): 1}),
        lambda s, x: setattr(s, "last", x.mean() + s.last),
    ],
    ids="int list tensors write buffer dict key value".split(),
)
def test_what_counts_calls_goes_on_counting(count: Callable[..., Any]) -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        count(s, x)
        return x * (s.calls + len(s.seen) + len(s.tensors) + s.number + s.named["n"] + len(s.named) + s.last)

    counts = Net(forward, calls=0, seen=[], tensors=[], named={"n": 0}, last=0.0)
    counts.register_buffer("number", torch.zeros(()))
    module = net(lambda s, x: s.block(x) + s.counts(x).mean(), counts=counts)
    twin = copy.deepcopy(module)
    compiled = reparam.compile(module, X)
    assert compiled.report.after.norms == 0
    assert (counts.calls, counts.seen, counts.tensors, counts.number, counts.named) == (0, [], [], 0, {"n": 0})
    for _ in range(3):
        assert_same(twin, compiled, X)


class Sized(nn.Module):
    """Makes images of the size that the Python around it says."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.size = ConvNorm(), (8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(self.block(x), size=self.size)


def test_a_part_may_be_told_a_size() -> None:
    compiled_whole(model(lambda s, x: (setattr(s.part, "size", x.shape[2:]), s.part(x))[1], part=Sized()))


@pytest.mark.parametrize("name", ["pool", "norm", "block"])
def test_a_layer_that_the_model_sets_before_it_calls_it_is_called_by_the_model(name: str) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        self.pool.kernel_size, self.norm.eps, self.block.conv._parameters["weight"] = x.shape[2:], 0.5, self.weight
        return x * {"pool": self.pool, "norm": self.norm, "block": self.block}[name](x)

    module = net(forward, pool=nn.AvgPool2d(8), norm=nn.BatchNorm2d(3))
    module.block = ConvNorm(3, 3).double().eval()
    module.weight = module.block.conv.weight.detach() * 2
    assert_same_everywhere(module, reparam.compile(module, X))


@pytest.mark.parametrize("holder", [argparse.Namespace, SimpleNamespace, nn.Module, lambda: [[0]], lambda: None])
def test_a_number_that_is_kept_anywhere_is_kept(holder: Any) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        if self.held is None:
            self.held = SimpleNamespace()
        if isinstance(self.held, list):
            self.held[0][0] += 1
            return self.block(x) * self.held[0][0]
        self.held.last = getattr(self.held, "last", 0) + 1
        return self.block(x) * self.held.last

    module = net(forward, held=holder())
    compiled = reparam.compile(module, X)
    for _ in range(3):
        assert_same(module, compiled, X)


def test_modules_that_share_a_dict_share_it_when_compiled() -> None:
    held: dict[str, Any] = {}
    part = model(lambda s, x: s.block(x) + s.held["x"].mean(), block=ConvNorm(), held=held)
    module = model(lambda s, x: (s.held.update(x=x), s.part(x))[1], part=part, held=held)
    for options in ({}, {"keep_python": True}):
        assert_same_everywhere(module, reparam.compile(module, X, **options))


def test_a_layer_that_is_copied_is_the_copy() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        deep, shallow = copy.deepcopy(self.block), copy.copy(self.norm)
        deep.norm.eps, shallow.eps = 0.5, 1.0
        return self.block(x) + deep(x) + shallow(self.block(x))

    module = net(forward, norm=nn.BatchNorm2d(4))
    assert_same_everywhere(module, reparam.compile(module, X))


def test_a_value_that_another_module_reads_is_the_one_of_this_call() -> None:
    stores = Net(lambda s, x: (setattr(s, "last", x.mean()), x * 2)[1], last=None)
    module = net(lambda s, x: s.block(x) + s.stores(x).sum() + s.stores.last, stores=stores)
    compiled = reparam.compile(module, X)
    assert stores.last is None
    assert compiled.report.after.norms == 0
    assert_same_everywhere(module, compiled)


def test_attributes_of_the_root_are_kept() -> None:
    info = type("Info", (), {"channels": lambda self: [8]})()
    module = net(lambda s, x: s.block(x), stride=[8, 16], names={0: "cat"}, num_classes=8, feature_info=info)
    compiled = reparam.compile(module)
    assert (compiled.stride, compiled.names, compiled.num_classes) == ([8, 16], {0: "cat"}, 8)
    assert compiled.feature_info.channels() == [8]


# 8. Random numbers, writes to own tensors, autocast.


def test_attention_that_drops_nothing_out_draws_no_random_numbers() -> None:
    """The operator that computes it says that it may; the state of the generator says that it has not."""
    compiled = reparam.compile(net(lambda s, x: F.scaled_dot_product_attention(y := s.block(x), y, y)), X)
    assert compiled.report.comparison is not None


@pytest.mark.parametrize(
    "forward",
    [
        lambda s, x: s.block(x) + torch.rand(4, 1, 1),
        lambda s, x: s.block(x) + torch.rand_like(x).mean(),
        lambda s, x: s.block(x) + x.new_empty(4, 1, 1).normal_(),
        lambda s, x: F.dropout(s.block(x), 0.5, training=True),
        lambda s, x: s.block(x) * torch.bernoulli(torch.full((4, 1, 1), 0.5)),
        lambda s, x: s.block(x)[:, torch.randperm(4)],
        lambda s, x: s.block(x) + torch.zeros(4, 1, 1).uniform_(),
    ],
)
@pytest.mark.parametrize("example", [X, None])
def test_random_numbers_are_drawn_at_every_call(forward: Callable[..., Tensor], example: Any) -> None:
    module = net(forward)
    torch.manual_seed(1)  # few numbers may come out alike
    state = torch.get_rng_state()
    compiled = reparam.compile(module, example)
    assert compiled.report.after.norms == 0
    torch.set_rng_state(state)
    with torch.no_grad():
        expected = [module(X) for _ in range(3)]
        torch.set_rng_state(state)
        actual = [compiled(X) for _ in range(3)]
    assert all(torch.allclose(a, b) for a, b in zip(expected, actual, strict=True))
    assert not torch.allclose(actual[0], actual[1])


def test_writes_to_own_tensors_happen_at_every_call_and_not_while_compiling() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        s.mean.mul_(0.9).add_(x.mean(), alpha=0.1)
        s.weight.data[0] += 1
        return x * s.mean + s.weight

    writes = Net(forward, weight=nn.Parameter(torch.zeros(1)))
    writes.register_buffer("mean", torch.zeros(()))
    module = net(lambda s, x: s.block(x) + s.writes(x).mean(), writes=writes)
    writes.weight.data.zero_()
    compiled = reparam.compile(module, X)
    assert (writes.mean.item(), writes.weight.item()) == (0, 0)
    twin = copy.deepcopy(module)
    for _ in range(3):
        assert_same(twin, compiled, X)


def test_statistics_of_a_norm_in_training_are_not_touched_while_compiling() -> None:
    module = net(lambda s, x: F.batch_norm(s.block(x), s.mean, s.var, training=True))
    module.register_buffer("mean", torch.zeros(4).double())
    module.register_buffer("var", torch.ones(4).double())
    compiled = reparam.compile(module, X)
    assert (module.mean.tolist(), module.var.tolist()) == ([0.0] * 4, [1.0] * 4)
    assert torch.allclose(module(X), compiled(X))


def test_autocast_inside_of_a_forward_stays() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.mixed = ConvNorm(), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.block(x)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                z = self.mixed(y)
            with torch.autocast("cpu", enabled=False):
                return z.float() + self.mixed(y)

    module = randomise(Mixed()).eval()
    compiled = reparam.compile(module, X.float())
    assert compiled.report.after.norms == 0
    with torch.no_grad():
        expected, actual = module(X.float()), compiled(X.float())
    # The part in bfloat16 is rounded as before: exactly so where the block rounds alike.
    assert torch.allclose(expected, actual, rtol=2e-2, atol=2e-2)
    seen = copy.deepcopy(compiled)
    assert "autocast" in str(seen.report)


# 9. Outputs of any class.


@dataclasses.dataclass
class Out:
    logits: Any = None
    hidden: Any = None


@dataclasses.dataclass(frozen=True)
class FrozenOut:
    logits: Any = None
    hidden: Any = None


Named = namedtuple("Named", "logits hidden")


class Own:
    def __init__(self, logits: Any, hidden: Any) -> None:
        self.logits, self.hidden = logits, hidden


class Slots:
    __slots__ = ("hidden", "logits")

    def __init__(self, logits: Any, hidden: Any) -> None:
        self.logits, self.hidden = logits, hidden


class Tuple(tuple):
    def __new__(cls, logits: Any, hidden: Any) -> Tuple:
        return super().__new__(cls, (logits, hidden))

    def __getnewargs__(self) -> Any:
        return tuple(self)

    logits = property(operator.itemgetter(0))
    hidden = property(operator.itemgetter(1))


class Returns(nn.Module):
    def __init__(self, kind: Any, by_size: bool = False) -> None:
        super().__init__()
        self.kind, self.by_size, self.block = kind, by_size, ConvNorm()

    def forward(self, x: Tensor) -> Any:
        if self.by_size and x.shape[-1] % 4:
            x = F.pad(x, (0, 4 - x.shape[-1] % 4))
        y = self.block(x)
        return self.kind(y, (y.mean(), None, [x.shape[2]]))


KINDS = [Out, FrozenOut, ModelOutput, Named, Own, Tuple, lambda a, b: {"logits": a, "hidden": b}]


def again(compiled: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(compiled))


def saved(compiled: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(compiled, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("by_size", [False, True])
@pytest.mark.parametrize("example", [None, X])
@pytest.mark.parametrize("kind", KINDS[:-1])
def test_what_is_returned_is_of_the_same_class(kind: Any, example: Any, by_size: bool) -> None:
    module = randomise(Returns(kind, by_size)).double().eval()
    compiled = reparam.compile(module, example)
    assert compiled.report.after.norms == 0
    for result in (compiled, copy.deepcopy(compiled), again(compiled), saved(compiled)):
        for size in SIZES:
            x = normal(*size)
            with torch.no_grad():
                expected, actual = module(x), result(x)
            assert type(actual) is type(expected)
            assert torch.allclose(actual.logits, expected.logits)
            assert torch.allclose(actual.hidden[0], expected.hidden[0])
            assert actual.hidden[1:] == expected.hidden[1:] == (None, [size[2]])
            assert type(actual.hidden[2][0]) is int


def test_every_call_makes_an_output_of_its_own() -> None:
    compiled = reparam.compile(randomise(Returns(Own)).double().eval(), X)
    first, second = compiled(X), compiled(X + 1)
    assert first is not second
    assert first.hidden[2] is not second.hidden[2]
    assert not torch.allclose(first.logits, second.logits)


def test_a_class_with_slots_is_returned_too() -> None:
    module = randomise(Returns(Slots)).double().eval()
    compiled = reparam.compile(module, X)
    for size in SIZES:
        expected, actual = module(normal(*size)), compiled(normal(*size))
        assert type(actual) is Slots
        assert torch.allclose(actual.logits, expected.logits)


class Encoder(nn.Module):
    """Asks for a value, so that it is no graph, and leaves part of what it returns out."""

    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.kind, self.block = kind, ConvNorm(3, 3)

    def forward(self, x: Tensor) -> Any:
        y = self.block(x)
        if y.sum() > 1e9:
            y = y * 0
        return self.kind(y, None)


@pytest.mark.parametrize("options", [{}, {"verify": False}])
@pytest.mark.parametrize("example", [None, X])
@pytest.mark.parametrize("kind", [Out, Own, ModelOutput, Named, Slots])
def test_none_in_what_python_returns_is_none(kind: Any, example: Any, options: Any) -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        o = s.encoder(x)
        y = s.block(o.logits)
        return y if o.hidden is None else y * 2

    module = net(forward, encoder=Encoder(kind))
    compiled = reparam.compile(module, example, **options)
    assert compiled.report.after.norms == 0
    assert_same_everywhere(module, compiled)


@pytest.mark.parametrize("kind", [lambda y, n: (y, n), lambda y, n: [y, n]])
def test_none_in_a_sequence_that_python_returns_is_none(kind: Any) -> None:
    def forward(s: Any, x: Tensor, z: Tensor) -> Tensor:
        last, hidden = s.encoder(x + z)
        return s.block(last) if hidden is None else last

    module = net(forward, encoder=Encoder(kind))
    compiled = reparam.compile(module)
    assert compiled.report.after.norms == 0
    assert torch.allclose(module(X, X), compiled(X, X))


# 10. Hooks, scripted modules, wrappers, parametrizations, checkpoints, autograd functions.


def test_hooks_run_at_every_call_and_not_while_compiling() -> None:
    calls: list[str] = []
    module = nn.Sequential(ConvNorm(), ConvNorm(4), nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))).double()
    randomise(module).eval()
    module.register_forward_hook(lambda *_: calls.append("root"))
    module[1].register_forward_hook(lambda m, args, y: (calls.append("inner"), y * 2)[1])
    module[1].register_forward_pre_hook(lambda m, args: (args[0] + 1,))
    compiled = reparam.compile(module, X)
    calls.clear()
    assert_same_everywhere(module, compiled)
    assert calls == ["inner", "root"] * 2 * len(SIZES)
    assert compiled.report.after.norms == 1  # of the module that carries hooks


def test_hooks_that_a_forward_sets_are_set_once() -> None:
    """Recording starts again where something turns out to be opaque, from the model as it was."""

    class Collects(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.found, self.ready = nn.Sequential(ConvNorm(), ConvNorm(4)), [], False
            self.last = net(lambda s, x: s.seen.copy_(x.mean()))
            self.last.register_buffer("seen", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            if not self.ready:
                for layer in self.layers:
                    layer.register_forward_hook(lambda module, args, output: self.found.append(output))
                self.ready = True
            self.found.clear()
            self.last(self.layers(x))
            return torch.cat(self.found, 1)

    assert reparam.compile(Collects().double().eval(), X)(X).shape[1] == 8


def test_a_copy_of_what_was_compiled_has_the_hooks() -> None:
    module = net(lambda s, x: s.block(x))
    module.register_forward_hook(lambda module, args, output: output * 2)
    compiled = reparam.compile(module, X)
    for twin in (compiled, copy.copy(compiled), copy.deepcopy(compiled)):
        assert_same(module, twin, X)


def test_scripted_modules_stay_as_they_are() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()).double().eval())
    module = randomise(nn.Sequential(ConvNorm(), scripted, ConvNorm(4)).double()).eval()
    compiled = reparam.compile(module, X)
    assert compiled.report.after.norms == 0
    assert captured_remarks(compiled) == ["a scripted module, kept as it is"]
    assert_same_everywhere(module, compiled)


@torch.jit.script
def scripted_function(x: Tensor) -> Tensor:
    return x * 2 + x.mean()


def test_a_scripted_function_does_not_pass_unseen() -> None:
    module = net(lambda s, x: s.block(x) + s.inner(x).mean(), inner=Net(lambda s, x: scripted_function(x)))
    compiled = reparam.compile(module, X)
    assert compiled.report.after.norms == 0
    assert_same_everywhere(module, compiled)
    assert_same(module, compiled, X + 3)


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile, lambda m: torch.compile(nn.DataParallel(m))])
@pytest.mark.parametrize("inside", [False, True])
def test_wrappers_are_seen_through(wrap: Any, inside: bool) -> None:
    plain = randomise(nn.Sequential(ConvNorm(), ConvNorm(4)).double()).eval()
    wrapped = nn.Sequential(wrap(plain), nn.ReLU()).eval() if inside else wrap(plain)
    compiled = reparam.compile(wrapped, X)
    assert compiled.report.after.norms == 0
    assert_same_everywhere(nn.Sequential(plain, nn.ReLU()), compiled)


def test_a_module_that_compiles_itself_is_recorded() -> None:
    module = randomise(nn.Sequential(ConvNorm(), ConvNorm(4)).double()).eval()
    twin = copy.deepcopy(module)
    module[1].compile()
    compiled = reparam.compile(module, X)
    assert compiled.report.after.norms == 0
    assert_same_everywhere(twin, compiled)


@pytest.mark.parametrize("parametrize", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_parametrizations_are_computed_once(parametrize: Any) -> None:
    module = nn.Sequential(parametrize(nn.Conv2d(3, 4, 3, padding=1)), nn.BatchNorm2d(4)).double().eval()
    compiled = compiled_whole(module)
    assert compiled.report.after.kernels == 1


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("sequential", [False, True])
def test_checkpoints_are_seen_through(use_reentrant: bool, sequential: bool) -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        if sequential:
            y = torch.utils.checkpoint.checkpoint_sequential([s.block, s.last], 2, x, use_reentrant=use_reentrant)
        else:
            y = torch.utils.checkpoint.checkpoint(lambda x: s.last(s.block(x)), x, use_reentrant=use_reentrant)
        return y * 2

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled_whole(net(forward, last=ConvNorm(4, 4)))


class Swish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, scale: float) -> Tensor:
        return x * scale

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.scale = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad * ctx.scale, None


def test_autograd_functions_are_seen_through() -> None:
    compiled_whole(net(lambda s, x: Twice.apply(Swish.apply(s.block(x)), 2.0)))


def test_quantised_parts_run_as_they_are() -> None:
    class Fake(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = ConvNorm()

        def forward(self, x: Tensor) -> Tensor:
            return torch.fake_quantize_per_tensor_affine(self.block(x), 0.1, 0, -128, 127)

    module = randomise(Fake()).eval()
    compiled = reparam.compile(module, X.float())
    assert compiled.report.after.norms == 0
    with torch.no_grad():
        assert (module(X.float()) - compiled(X.float())).abs().max() < 0.11


# 11. Threads and interrupts.


def modes() -> tuple[Any, ...]:
    return (
        torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack(), torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"),
    )  # fmt: skip


def deep() -> nn.Module:
    asks = model(lambda s, x: s.block(x) if x.sum() < 1e9 else x, block=ConvNorm(4))
    layers = [ConvNorm(), *(ConvNorm(4) for _ in range(4)), asks, ConvNorm(4)]
    return randomise(nn.Sequential(*layers).double()).eval()


def test_threads_do_not_meet() -> None:
    """Eight compile, while one trains with checkpoints and one infers."""
    failures: list[str] = []
    done = threading.Event()

    def trains() -> None:
        block = randomise(ConvNorm().double())
        plain = copy.deepcopy(block)
        while not done.is_set():
            for module in (block, plain):
                module.zero_grad()
            torch.utils.checkpoint.checkpoint(block, X, use_reentrant=False).sum().backward()
            plain(X).sum().backward()
            for a, b in zip(block.parameters(), plain.parameters(), strict=True):
                if not torch.equal(a.grad, b.grad):
                    failures.append("other gradients")

    def infers() -> None:
        served = deep()
        with torch.no_grad():
            expected = served(X)
            while not done.is_set():
                if not torch.equal(served(X), expected):
                    failures.append("other numbers")

    def compiles() -> None:
        for _ in range(2):
            module = deep()
            compiled = reparam.compile(module, X)
            if compiled.report.after.norms:
                failures.append("norms stayed")
            for size in SIZES:
                assert_same(module, compiled, normal(*size))

    def noting(work: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            try:
                work()
            except BaseException as error:
                failures.append(f"{work.__name__}: {error!r}")

        return run

    before = modes()
    others = [threading.Thread(target=noting(work)) for work in (trains, infers)]
    compiling = [threading.Thread(target=noting(compiles)) for _ in range(8)]
    for thread in (*others, *compiling):
        thread.start()
    for thread in compiling:
        thread.join()
    done.set()
    for thread in others:
        thread.join()
    assert failures == []
    assert modes() == before


@pytest.fixture
def modes_put_back() -> Iterator[None]:
    """Should a test leave modes behind, others do not suffer."""
    _, dispatch, grad, *_ = modes()
    functions = [torch._C._get_function_stack_at(i) for i in range(torch._C._len_torch_function_stack())]
    yield
    while torch._C._len_torch_function_stack():
        torch._C._pop_torch_function_stack()
    for mode in functions:
        torch._C._push_on_torch_function_stack(mode)
    while torch._C._len_torch_dispatch_stack() > dispatch:
        torch._C._pop_torch_dispatch_stack(None)
    torch.set_grad_enabled(grad)


class Interrupting:
    """Counts calls of functions of torch and of ours, and raises a KeyboardInterrupt at one of them."""

    def __init__(self, at: int, names: frozenset[str]) -> None:
        self.left, self.names = at, names

    def __call__(self, frame: Any, event: str, arg: Any) -> None:
        if event != "call" or (self.names and frame.f_code.co_name not in self.names):
            return
        if str(frame.f_globals.get("__name__")).startswith(("reparam", "torch")):
            self.left -= 1
            if self.left == 0:
                sys.settrace(None)
                raise KeyboardInterrupt

    def __enter__(self) -> Interrupting:
        self.previous = sys.gettrace()
        sys.settrace(self)
        return self

    def __exit__(self, *_: Any) -> None:
        sys.settrace(self.previous)


@pytest.mark.usefixtures("modes_put_back")
@pytest.mark.parametrize("names", [frozenset(), frozenset(["__enter__", "__exit__", "_push_mode", "_pop_mode"])])
def test_an_interrupt_leaves_nothing_behind(names: frozenset[str]) -> None:
    module = deep()
    with torch.no_grad():
        expected = module(X)
    module.train()
    reparam.compile(module, X)  # what is only done once is done
    before, held = modes(), [dict(child.__dict__) for child in module.modules()]
    tensors = [tensor.clone() for tensor in module.state_dict().values()]
    with Interrupting(0, names) as counted:
        reparam.compile(module, X)
    generator = torch.Generator().manual_seed(0)
    arrived = 0
    for moment in torch.randint(1, -counted.left * 9 // 10, (60,), generator=generator).tolist():
        try:
            with Interrupting(moment, names):
                reparam.compile(module, X)
        except KeyboardInterrupt:  # Python drops one that comes while it finalises something
            arrived += 1
        assert modes() == before
        assert [dict(child.__dict__) for child in module.modules()] == held
    assert arrived >= 55
    assert all(map(torch.equal, tensors, module.state_dict().values()))
    module.eval()
    with torch.no_grad():
        assert torch.equal(module(X), expected)
    assert_same(module, reparam.compile(module, X), X)


# 12. Memory.


class Alive(TorchDispatchMode):
    """Counts the tensors that are alive at the same time."""

    def __init__(self) -> None:
        super().__init__()
        self.known: list[weakref.ref[Tensor]] = []
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.known += [weakref.ref(leaf) for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.known = [ref for ref in self.known if ref() is not None]
        self.most = max(self.most, len(self.known))
        return result


def test_recording_keeps_no_more_alive_than_a_run() -> None:
    layers = [layer for _ in range(50) for layer in (nn.Conv2d(3, 3, 3, padding=1), nn.Sigmoid())]
    chain = nn.Sequential(*layers, Net(lambda s, x: functools.reduce(lambda x, _: x * 2 + 1, range(50), x)))
    copied = private_copy(chain.double())
    with torch.no_grad(), Alive() as run:
        copied(X)
    with Alive() as recording:
        record(copied, ((X,), {}))
    assert run.most < 10
    assert recording.most <= run.most + 5


# 13. The graph's words.


def words(forward: Callable[[Tensor], Any]) -> list[tuple[Any, ...]]:
    graph = capture(Net(lambda s, x: forward(x)), ((normal(3, 3),), {})).graph
    return [(node.op, node.target, *node.args) for node in graph.nodes if node.op.startswith("call")]


@pytest.mark.parametrize(
    ("forward", "op", "target"),
    [
        (lambda x: x.relu(), "call_method", "relu"),
        (lambda x: x.relu_(), "call_method", "relu_"),
        (lambda x: Tensor.sigmoid(x), "call_method", "sigmoid"),
        (lambda x: x.view(9), "call_method", "view"),
        (lambda x: x.sum(0), "call_method", "sum"),
        (lambda x: torch.relu(x), "call_function", torch.relu),
        (lambda x: torch.sum(x, 0), "call_function", torch.sum),
        (lambda x: F.relu(x), "call_function", F.relu),
        (lambda x: F.interpolate(x[None], 4), "call_function", F.interpolate),
        (lambda x: torch.cat([x, x]), "call_function", torch.cat),
        (lambda x: torch.add(x, x), "call_function", torch.add),
        (lambda x: x + x, "call_function", operator.add),
        (lambda x: x.add(x), "call_function", operator.add),
        (lambda x: x - 1, "call_function", operator.sub),
        (lambda x: x * x, "call_function", operator.mul),
        (lambda x: x / 2, "call_function", operator.truediv),
        (lambda x: x // 2, "call_function", operator.floordiv),
        (lambda x: x**2, "call_function", operator.pow),
        (lambda x: x @ x, "call_function", operator.matmul),
        (lambda x: -x, "call_function", operator.neg),
        (lambda x: x > 0, "call_method", "gt"),
        (lambda x: x == x, "call_function", operator.eq),
        (lambda x: ~(x > 0), "call_function", operator.invert),
        (lambda x: (x > 0) & (x < 1), "call_function", operator.and_),
        (lambda x: x[0], "call_function", operator.getitem),
        (lambda x: x.__setitem__(0, 1), "call_function", operator.setitem),
        (lambda x: operator.iadd(x, 1), "call_function", operator.iadd),
        (lambda x: operator.imul(x, 2), "call_function", operator.imul),
        (lambda x: x.T, "call_function", getattr),
        (lambda x: Swish.apply(x), "call_function", torch.sigmoid),
    ],
)
def test_a_call_is_said_in_words_that_rules_know(forward: Any, op: str, target: Any) -> None:
    assert (op, target) in [word[:2] for word in words(forward)]


@pytest.mark.parametrize(
    ("forward", "target"),
    [
        (lambda x: 2 + x, operator.add),
        (lambda x: 2 - x, operator.sub),
        (lambda x: 2 * x, operator.mul),
        (lambda x: 2 / x, operator.truediv),
        (lambda x: 2 // x, operator.floordiv),
        (lambda x: 2 % x, operator.mod),
        (lambda x: 2**x, operator.pow),
    ],
)
def test_reflected_operators_are_operators(forward: Any, target: Any) -> None:
    net = Net(lambda s, x: forward(x))
    captured = capture(net, ((normal(3, 3),), {}))
    graph = torch.fx.GraphModule(captured.root, captured.graph)
    assert torch.equal(graph(normal(3, 3, seed=1)), net(normal(3, 3, seed=1)))
    (word,) = words(forward)
    assert word[:2] == ("call_function", target)
    assert word[2] == 2 or target in (operator.add, operator.mul)


@pytest.mark.parametrize("number", [0.1, 1])
def test_where_takes_a_number(number: float) -> None:
    compiled_whole(net(lambda s, x: torch.where(s.block(x) > 0.5, s.block(x), number)))
    compiled_whole(net(lambda s, x: torch.where(s.block(x) > 0.5, number, s.block(x))))

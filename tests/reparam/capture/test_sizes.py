"""Python that reads sizes: what stays dynamic, what is a condition, and what keeps a module as it is.

PYTEST_DONT_REWRITE: an assert in a model has to be the model's own, not the code that pytest makes of it.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import assert_same, model, normal
from torch import Tensor, nn

import reparam
from reparam.capture import capture
from reparam.compare import compare
from reparam.errors import ConditionError
from reparam.graph.conditions import check_call
from support import BlockNet, asserts, assigns, pads, randomise

FORWARDS = {
    "a token for every image": lambda s, x: torch.cat([s.token.expand(x.shape[0], -1, -1), x], 1),
    "a token, repeated": lambda s, x: torch.cat([s.token.repeat(x.size(0), 1, 1), x], 1),
    "a part of a table": lambda s, x: x + s.table[:, : x.shape[1]],
    "a table resampled": lambda s, x: x + F.interpolate(s.table.mT, size=x.shape[1], mode="linear").mT,
    "zeros": lambda s, x: torch.cat([torch.zeros(x.shape[0], 1, 4, dtype=x.dtype, device=x.device), x], 1),
    "new zeros": lambda s, x: torch.cat([s.token.new_zeros(x.shape[0], 1, 4), x], 1),
    "positions": lambda s, x: x + torch.arange(x.shape[1], device=x.device)[:, None],
    "moved to where the input is": lambda s, x: x * s.token.to(x.device).to(x.dtype),
}


@pytest.mark.parametrize("name", FORWARDS)
def test_what_depends_on_sizes_is_recorded_and_stays_dynamic(name):
    net = model(
        lambda s, x: s.norm(s.linear(FORWARDS[name](s, x)).mT).mT,
        linear=nn.Linear(4, 3),
        norm=nn.BatchNorm1d(3),
        token=nn.Parameter(torch.rand(1, 1, 4)),
        table=nn.Parameter(torch.rand(1, 9, 4)),
    )
    compiled = reparam.compile(net, normal(2, 5, 4))
    assert not [remark for remark in compiled.report.remarks if remark.kind == "capture"]
    assert compiled.report.after.norms == 0
    for batch, length in ((2, 5), (1, 3), (4, 9)):
        assert_same(net, compiled, normal(batch, length, 4))


def test_sizes_that_python_rounds_stay_dynamic():
    """TensorFlow's SAME padding, of which one side depends on the size."""

    def forward(self, x):
        amounts = []
        for size in (x.shape[3], x.shape[2]):
            total = max((math.ceil(size / 2) - 1) * 2 + 3 - size, 0)
            amounts += [total // 2, total - total // 2]
        return self.norm(self.conv(F.pad(x, amounts)))

    net = model(forward, conv=nn.Conv2d(3, 4, 3, stride=2), norm=nn.BatchNorm2d(4))
    compiled = reparam.compile(net)
    assert compiled.report.after.norms == 0
    for size in ((8, 9), (7, 10)):
        assert_same(net, compiled, normal(2, 3, *size))


def _raises(net: Any, x: Tensor) -> Tensor:
    if x.shape[2] < 4 or x.shape[-1] % 2:
        raise ValueError(f"an image of {x.shape[2]} by {x.shape[3]} is not what this is made for")
    return net.block(x)


def _tokens(net: Any, x: Tensor) -> Any:
    b, c, h, w = net.block(x).shape
    assert c == 4
    tokens = net.block(x).flatten(2).transpose(1, 2)
    tokens = net.head(tokens) * net.scale
    return {"map": tokens.transpose(1, 2).reshape(b, -1, h, w), "rest": [tokens.mean(1), (b, None)]}


@pytest.mark.parametrize("forward", [asserts, _raises, pads, assigns, _tokens])
def test_python_that_reads_sizes_becomes_a_graph(forward: Callable[..., Any]) -> None:
    model = randomise(BlockNet(forward)).double().eval()
    result = reparam.compile(model, torch.randn(2, 3, 9, 8, dtype=torch.float64))
    assert (result.report.before.norms > 0, result.report.after.norms) == (True, 0)
    assert isinstance(result, torch.fx.GraphModule)
    assert "block" in {path.partition(".")[0] for path, _ in result.named_modules()}
    for size in ((2, 3, 9, 8), (1, 3, 9, 8), (5, 3, 9, 8), (3, 3, 13, 6)):
        x = torch.randn(size, dtype=torch.float64)
        with torch.no_grad():
            compare(model(x), result(x), 1e-9)
            compare(model(x), copy.deepcopy(result)(x), 1e-9)


def _decides_by_batch(net: Any, x: Tensor) -> Tensor:
    return net.block(x) * (2 if x.shape[0] > 1 else 3)


def _decides_by_one_height(net: Any, x: Tensor) -> Tensor:
    y = net.block(x)
    if x.shape[2] == 5:
        return y.relu()
    return y


def _decides_by_height(net: Any, x: Tensor) -> Tensor:
    y = net.block(x)
    return y * 2 if x.shape[2] % 2 == 1 else y


@pytest.mark.parametrize(
    ("forward", "reason"),
    [(_decides_by_height, "x.shape[2] % 2 is 1"), (_decides_by_one_height, "the height of x is not 5")],
)
def test_a_module_that_decides_by_sizes_stays_and_its_parts_are_compiled(forward: Any, reason: str) -> None:
    model = randomise(BlockNet(forward)).double().eval()
    result = reparam.compile(model, torch.randn(2, 3, 9, 8, dtype=torch.float64))
    remarks = [remark.message for remark in result.report.remarks if remark.rule == "Record"]
    assert remarks == [f"kept as Python: it decides by sizes ({reason})"]
    assert result.report.after.norms == 0
    for size in ((1, 3, 9, 8), (2, 3, 9, 8), (3, 3, 9, 8), (1, 3, 8, 7), (2, 3, 5, 9)):
        x = torch.randn(size, dtype=torch.float64)
        with torch.no_grad():
            compare(model(x), result(x), 1e-9)


@pytest.mark.parametrize(
    ("forward", "said", "good", "bad"),
    [
        (_decides_by_batch, "x.shape[0] > 1", (5, 3, 8, 7), (1, 3, 9, 8)),
        (_decides_by_one_height, "the height of x is not 5", (2, 3, 6, 8), (2, 3, 5, 8)),
        (_decides_by_height, "x.shape[2] % 2 is 1", (1, 3, 7, 8), (2, 3, 8, 8)),
    ],
)
def test_a_decision_by_sizes_is_said_and_checked(forward: Any, said: str, good: Any, bad: Any) -> None:
    model = randomise(BlockNet(forward)).double().eval()
    result = reparam.compile(model, torch.randn(2, 3, 9, 8, dtype=torch.float64), sizes="example")
    assert isinstance(result, torch.fx.GraphModule)
    assert result.report.after.norms == 0
    (remark,) = [remark for remark in result.report.remarks if remark.kind == "capture"]
    assert (remark.rule, remark.where, remark.message) == ("Condition", "", f"only for inputs where {said}")
    with torch.no_grad():
        x = torch.randn(good, dtype=torch.float64)
        compare(model(x), result(x), 1e-9)
        with pytest.raises(ConditionError) as error:
            result(torch.randn(bad, dtype=torch.float64))
    assert f"compiled for inputs where {said}; " in str(error.value)


def _pads_by_the_size(net: Any, x: Tensor) -> Tensor:
    for _ in range(3):
        padding = [1] if x.shape[2] in {9: 1} else [int(x.shape[2]) % 2]
        x = net.same(F.max_pool2d(F.pad(x, (0, 0, *padding, 0)), 2) + 1).relu()
    return net.block(x)


def _several_views(net: Any, x: Tensor) -> Tensor:
    assert x.shape[2] == 9
    assert x.shape[3] == 8
    y = net.block(x)
    if len({y.shape[2]: 1, y.flatten(2).shape[2]: 2, y.mT.flatten(2).shape[2] // 2: 3}) == 3:
        return y
    return -y


@pytest.mark.parametrize(("forward", "said"), [(_pads_by_the_size, ["the height of x is 9"]), (_several_views, [])])
def test_what_follows_from_conditions_is_none(forward: Any, said: list[str]) -> None:
    model = BlockNet(forward)
    model.same = nn.Conv2d(3, 3, 3, padding=1)
    randomise(model).double().eval()
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    result = reparam.compile(model, x, sizes="example")
    assert [remark.message for remark in result.report.remarks if remark.kind == "capture"] == [
        f"only for inputs where {condition}" for condition in said
    ]
    with torch.no_grad():
        other = torch.randn(5, 3, 9, 8, dtype=torch.float64)
        compare(model(other), result(other), 1e-9)


@pytest.mark.parametrize("sizes", ["any", "example"])
def test_a_hook_may_make_a_value_of_another_size(sizes: str) -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        y = net.hooked(x)
        return net.block(y) * y.shape[3] * {y.shape[2]: 2}[y.shape[2]]

    model = BlockNet(forward)
    model.hooked = nn.ReLU()
    model.hooked.register_forward_hook(lambda module, args, output: output[..., 1:])
    randomise(model).double().eval()
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    result = reparam.compile(model, x, sizes=sizes)
    with torch.no_grad():
        compare(model(x), result(x), 1e-9)


def _positive(x: Tensor) -> Tensor:
    return x[x > 0]


LIBRARY = torch.library.Library("reparam_tests_sizes", "FRAGMENT")
LIBRARY.define("positive(Tensor x) -> Tensor")
LIBRARY.impl("positive", _positive, "CPU")


@pytest.mark.parametrize(
    "count",
    [
        lambda x: x.shape[3],
        lambda x: x[..., 1:].shape[3],
        lambda x: x.mT.shape[2],
        lambda x: x.flatten(1).shape[1],
        lambda x: x.reshape(-1, 3).shape[0],
        lambda x: x[0, :, 0].T[None, 1:, 0].shape[1],
        lambda x: torch.cat([x[0, 0], x[0, 1]], 1).shape[1],
        lambda x: (x + x[:1, :1, :1]).shape[3],
        lambda x: F.conv2d(x, torch.ones(1, 3, 1, 1, dtype=x.dtype)).shape[3],
        lambda x: torch.ops.reparam_tests_sizes.positive(x[0, 0, :, 0]).shape[0] * 0 + x.shape[0],
        lambda x: torch.ops.reparam_tests_sizes.positive(x[0, 0, :, 0]).shape[0],
        lambda x: x.repeat_interleave(1 + (x[0, 0, :, 0] > 0).long(), 2).shape[2],
    ],
)
def test_what_does_not_follow_is_still_a_condition(count: Callable[[Tensor], Any]) -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        assert x.shape[2] == 9
        return net.block(x) * {int(count(x)): 2.0}.get(count(x), 1.0) * int(count(x))

    model = randomise(BlockNet(forward)).double().eval()
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    result = reparam.compile(model, x, sizes="example")
    with torch.no_grad():
        for other in (torch.randn(3, 3, 9, 7, dtype=torch.float64), x.abs() + 1, -x.abs() - 1, torch.randn_like(x)):
            try:
                found = result(other)
            except ConditionError:
                continue
            compare(model(other), found, 1e-9)


def _masked(net: Any, x: Tensor) -> Tensor:
    mask = torch.ones(x.shape[0], x.shape[2], dtype=torch.bool)
    mask[:, 7:] = False
    return net.block(x) if mask.all() else net.block(x) * mask[:, None, :, None]


def _counted(net: Any, x: Tensor) -> Tensor:
    return net.block(x) * x.new_ones(x.shape[2]).sum().item() + int(torch.zeros_like(x[0, 0]).max())


def _compared(net: Any, x: Tensor) -> Tensor:
    ids = torch.arange(x.shape[3])
    return net.block(x) if torch.equal(ids, ids.flip(0)) or 7 in ids else net.block(x) + 1


@pytest.mark.parametrize("forward", [_masked, _counted, _compared])
def test_a_value_that_sizes_alone_make_is_theirs(forward: Callable[..., Any]) -> None:
    model = randomise(BlockNet(forward)).double().eval()
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    assert "asks for the value" in str(reparam.compile(model, x).report) or forward is _compared
    result = reparam.compile(model, x, sizes="example")
    assert isinstance(result, torch.fx.GraphModule)
    with torch.no_grad():
        other = torch.randn(2, 3, 9, 8, dtype=torch.float64)
        compare(model(other), result(other), 1e-9)
        for shape in ((2, 3, 6, 8), (2, 3, 9, 6), (1, 3, 9, 8)):
            other = torch.randn(shape, dtype=torch.float64)
            try:
                found = result(other)
            except ConditionError:
                continue
            compare(model(other), found, 1e-9)


def _filled(net: Any, x: Tensor) -> Tensor:
    room = torch.zeros(x.shape[0], 1)
    room[:, 0] = x.mean((1, 2, 3)) > 0
    return net.block(x) if room.all() else -net.block(x)


def _filled_by_a_view(net: Any, x: Tensor) -> Tensor:
    room = torch.zeros(x.shape[0], 1)
    room[0].copy_(x[0, 0, 0, :1])
    return net.block(x) if room.sum() > 0 else -net.block(x)


def _filled_elsewhere(net: Any, x: Tensor) -> Tensor:
    room = torch.zeros(x.shape[0], 1)
    net.fill(x, room)
    return net.block(x) if room.sum() > 0 else -net.block(x)


def _drawn(net: Any, x: Tensor) -> Tensor:
    return net.block(x) if torch.rand(x.shape[0]).sum() > 0 else -net.block(x)


class Filling(nn.Module):
    """Python that writes what it reads to what it is given."""

    def forward(self, x: Tensor, room: Tensor) -> None:
        room.fill_(x[0, 0, 0, 0].item())


@pytest.mark.parametrize("forward", [_filled, _filled_by_a_view, _filled_elsewhere, _drawn])
def test_a_value_that_is_more_than_sizes_is_asked_for_at_every_call(forward: Callable[..., Any]) -> None:
    model = BlockNet(forward)
    model.fill = Filling()
    randomise(model).double().eval()
    x = torch.rand(2, 3, 9, 8, dtype=torch.float64)
    result = reparam.compile(model, x, sizes="example")
    assert not isinstance(result, torch.fx.GraphModule)
    with torch.no_grad():
        for inputs in (x, -x):
            compare(model(inputs), result(inputs), 1e-9)


def test_what_is_written_to_memory_that_is_kept_is_of_the_call() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        if net.kept is None:
            net.kept = torch.zeros(x.shape[0], 1, 1, 1, dtype=x.dtype)
            net.kept[:] = x.mean((1, 2, 3), keepdim=True)
        return net.block(x) * net.kept

    model = BlockNet(forward)
    model.kept = None
    randomise(model).double().eval()
    x = torch.rand(2, 3, 9, 8, dtype=torch.float64)
    result = reparam.compile(model, x)
    with torch.no_grad():
        for inputs in (x, -x):
            compare(model(inputs), result(inputs), 1e-9)


def test_a_number_chosen_by_a_size_is_chosen_at_every_call() -> None:
    model = randomise(BlockNet(_decides_by_batch)).double().eval()
    result = reparam.compile(model, torch.randn(2, 3, 9, 8, dtype=torch.float64))
    assert not [remark for remark in result.report.remarks if remark.kind == "capture"]
    assert result.report.after.norms == 0
    for batch in (1, 2, 3):
        x = torch.randn(batch, 3, 9, 8, dtype=torch.float64)
        with torch.no_grad():
            compare(model(x), result(x), 1e-9)


@pytest.mark.parametrize(
    ("decides", "always"),
    [
        (lambda s: s == 5, False), (lambda s: s != 7, False), (lambda s: s - 20 < 0, False),
        (lambda s: s % 4 == 1, False), (lambda s: s // 2 > 2, False), (lambda s: 2 * s - 20 == 0, False),
        (lambda s: -s % 4 < 4, True),
        (lambda s: s + 1 > 1, True), (lambda s: s == -3, True), (lambda s: s % 4 != 4, True),
        (lambda s: (math.ceil(s / 2) - 1) * 2 + 3 - s >= 0, True), (lambda s: (s + 3) // 4 * 4 >= s, True),
    ],
)  # fmt: skip
def test_what_comes_out_alike_for_every_size_decides_nothing(decides: Any, always: bool) -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        y = net.block(x)
        if decides(x.shape[2]):
            y = y.relu()
        return y

    model = randomise(BlockNet(forward)).double().eval()
    result = reparam.compile(model, torch.randn(2, 3, 9, 8, dtype=torch.float64))
    assert isinstance(result, torch.fx.GraphModule) is always
    for height in (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 20, 21):
        x = torch.randn(1, 3, height, 4, dtype=torch.float64)
        with torch.no_grad():
            compare(model(x), result(x), 1e-9)


def test_what_a_model_demands_is_demanded_of_the_graph() -> None:
    model = randomise(BlockNet(_raises)).double().eval()
    result = reparam.compile(model, torch.randn(2, 3, 9, 8, dtype=torch.float64))
    assert not [remark for remark in result.report.remarks if remark.kind == "capture"]
    for size, words in (((2, 3, 3, 8), "x.shape[2] >= 4"), ((2, 3, 9, 7), "the width of x is a multiple of 2")):
        with pytest.raises(ConditionError) as error:
            result(torch.randn(size, dtype=torch.float64))
        assert f"compiled for inputs where {words}; " in str(error.value)


def test_arguments_keep_their_names_and_defaults() -> None:
    class Named(BlockNet):
        def forward(self, x: Any, *others: Tensor, mode: str = "sum", mask: Tensor | None = None, **more: Any) -> Any:
            assert x["image"].shape[1] == 3
            y = self.block(x["image"]) + self.block(others[1])
            return y if mask is None else y * mask + more["shift"]

    model = randomise(Named(lambda net, x: x)).double().eval()
    x, y, z = (torch.randn(2, 3, 5, 6, dtype=torch.float64) for _ in range(3))
    call = {"x": {"image": x}, "mask": torch.ones(6).double(), "shift": torch.ones(1).double()}
    captured = capture(model, (({"image": x}, y, z), {k: v for k, v in call.items() if k != "x"}))
    graph = torch.fx.GraphModule(captured.root, captured.graph)
    expected = model({"image": x}, y, z, mask=call["mask"], shift=call["shift"])
    compare(expected, graph({"image": x}, y, z, mask=call["mask"], shift=call["shift"]), 1e-12)
    given = {"mask": call["mask"], "shift": call["shift"]}
    check_call(captured.arguments, ({"image": x}, y, z), given)
    check_call(captured.arguments, ({"image": x}, y, z), given | {"mode": "sum"})
    with pytest.raises(ConditionError, match="compiled for mode as 'sum', not 'mean'"):
        check_call(captured.arguments, ({"image": x}, y, z), given | {"mode": "mean"})
    with pytest.raises(ConditionError, match=r"compiled for mask as a tensor of .* with 1 axes, not None"):
        check_call(captured.arguments, ({"image": x}, y, z), {"shift": call["shift"]})
    with pytest.raises(ConditionError, match=r"compiled for \*others as a sequence of 2: "):
        check_call(captured.arguments, ({"image": x}, y), given)


@dataclasses.dataclass
class Output:
    value: Tensor


def test_what_asks_for_values_is_compiled_by_parts() -> None:
    def forward(net: Any, x: Tensor) -> Any:
        return Output(net.block(x) if x.sum() < 1e12 else x)

    model = randomise(BlockNet(forward)).double().eval()
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    result = reparam.compile(model, x)
    assert result.report.after.norms == 0
    assert "kept as Python: it asks for the value of an activation (__bool__)" in str(result.report)
    assert type(result(x)) is Output
    compare(model(x).value, result(x).value, 1e-9)


def test_a_model_that_writes_to_its_buffers_goes_on_writing() -> None:
    class Counting(BlockNet):
        def __init__(self) -> None:
            super().__init__(lambda net, x: x)
            self.register_buffer("count", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            if len(x) == 0:
                return x
            self.count.add_(1)
            return self.block(x) + self.count

    model = randomise(Counting()).double().eval()
    model.count.zero_()
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    result = reparam.compile(model, x)
    assert (result.report.after.norms, model.count.item()) == (0, 0)
    with torch.no_grad():
        for _ in range(2):
            compare(model(x), result(x), 1e-9)

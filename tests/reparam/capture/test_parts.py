"""Inside of Python that is not recorded: what is compiled on its own there, and what its parents would miss."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import assert_same, model, normal
from torch import Tensor, nn

import reparam
from reparam.capture import private_copy
from reparam.compare import compare
from reparam.deploy.model import GraphForward
from reparam.errors import ConditionError
from support import Net, randomise


class Block(nn.Module):
    """Two branches with a norm each: one convolution when compiled."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.large, self.small = nn.Conv2d(channels, channels, 3, padding=1), nn.Conv2d(channels, channels, 1)
        self.norm, self.other = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.width = channels

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.large(x)) + self.other(self.small(x))

    def features(self, x: Tensor) -> Tensor:
        return self.norm(self.large(x))


class Parent(Net):
    """Python that asks for a value before anything else, and so is no graph."""

    def forward(self, x: Any, **more: Any) -> Any:
        if x.sum() > 1e12:
            return x
        return self.function(self, x, **more)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 7, 8, dtype=torch.float64)


def norms_left(model: nn.Module, *args: Tensor, example: bool, **kwargs: Any) -> int:
    """How many norms a compilation leaves; it must compute what the model computes."""
    randomise(model).double().eval()
    expected = model(*args, **kwargs)
    result = reparam.compile(model, args if example and not kwargs else None)
    with torch.no_grad():
        compare(expected, result(*args, **kwargs), 1e-9)
        compare(expected, copy.deepcopy(result)(*args, **kwargs), 1e-9)
    return result.report.after.norms


both = pytest.mark.parametrize("example", [True, False])


@both
def test_children_of_a_root_that_stays_are_compiled(example: bool, x: Tensor) -> None:
    model = Parent(lambda net, x: net.tail(net.block(x)), block=Block(), tail=nn.Sequential(Block(), nn.ReLU()))
    assert norms_left(model, x, example=example) == 0
    result: Any = reparam.compile(model, x if example else None)
    assert type(result) is Parent
    assert type(result.block) is Block
    assert isinstance(result.block.__dict__["forward"], GraphForward)
    # What is left of it can be seen, but is not what it was.
    assert [(name, type(child)) for name, child in result.block.named_children()] == [("large", nn.Conv2d)]
    with pytest.raises(AttributeError, match="'large' was fused with others"):
        result.block.large  # noqa: B018
    assert [remark.where for remark in result.report.remarks if remark.rule == "Inside"] == ["block", "tail"]
    blocks = {"block", "tail.0"}
    places = {f"{block}.{norm}" for block in blocks for norm in ("norm", "other")} | blocks
    assert {remark.where for remark in result.report.fused} == places
    assert (result.report.before.convolutions, result.report.after.convolutions) == (4, 2)
    assert (result.report.before.elementwise, result.report.after.elementwise) == (2, 0)
    assert result.report.after.parameters == sum(p.numel() for p in result.parameters()) == 2 * (3 * 3 * 9 + 3)


@both
def test_children_of_an_opaque_leaf_are_compiled(example: bool, x: Tensor) -> None:
    inner = Parent(lambda net, x: torch.relu(net.block(x)), block=Block())
    model = nn.Sequential(Block(), nn.Sequential(inner, nn.ReLU()), Block())
    assert norms_left(model, x, example=example) == 0
    report = reparam.compile(model, x if example else None).report
    assert (report.before.norms, report.after.norms, report.after.convolutions) == (6, 0, 3)
    assert "1.0.block" in {remark.where for remark in report.fused}


@both
def test_modules_that_stay_in_modules_that_stay(example: bool, x: Tensor) -> None:
    inner = Parent(lambda net, x: net.block(x), block=Block())
    model = Parent(lambda net, x: net.inner(net.first(x)), first=Block(), inner=inner)
    assert norms_left(model, x, example=example) == 0


# What parents may read.


def _reads_weight(net: Any, x: Tensor) -> Tensor:
    return net.block(x) * net.block.large.weight.mean()


def _calls_another_method(net: Any, x: Tensor) -> Tensor:
    return net.block.features(x) + net.block(x)


def _asks_for_an_attribute(net: Any, x: Tensor) -> Tensor:
    return net.block(x) if hasattr(net.block, "other") else x


def _computes_a_name(net: Any, x: Tensor) -> Tensor:
    return net.block(x) + getattr(net.block, "nor" + "mal"[:1]).weight.sum()


def _goes_through_modules(net: Any, x: Tensor) -> Tensor:
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            x = x + module.running_mean.view(-1, 1, 1)
    return net.block(x)


def _helper(block: Any, x: Tensor) -> Tensor:
    return F.conv2d(block(x), block.small.weight)


def _hands_on(net: Any, x: Tensor) -> Tensor:
    return _helper(net.block, x)


def _swaps_a_part(net: Any, x: Tensor) -> Tensor:
    net.block.norm.eps = 3.0 if x.sum() > 0 else 5.0
    return net.block(x)


@pytest.mark.parametrize(
    "forward",
    [
        _reads_weight, _calls_another_method, _asks_for_an_attribute, _computes_a_name, _goes_through_modules,
        _hands_on, _swaps_a_part,
    ],
)  # fmt: skip
@both
def test_a_child_whose_parts_are_read_stays(forward: Callable[..., Tensor], example: bool, x: Tensor) -> None:
    model = Parent(forward, block=Block())
    assert norms_left(model, x, example=example) == 2
    remarks = reparam.compile(model, x if example else None).report.remarks
    assert any(remark.where == "block" and "Block is kept as " in remark.message for remark in remarks)


def _reads_a_number(net: Any, x: Tensor) -> Tensor:
    return net.block(x) * net.block.width


def _asks_for_the_class(net: Any, x: Tensor) -> Tensor:
    return net.block(x) if isinstance(net.block, Block) and callable(net.block.features) else x


def _first_parameter(net: Any, x: Tensor) -> Tensor:
    return net.block(x.to(next(net.parameters()).dtype))


def _by_position(net: Any, x: Tensor) -> Tensor:
    return net.block(x=x)


def _twice(net: Any, x: Tensor) -> Tensor:
    return net.block(net.block(x)[:, :, 1:])


def _named(net: Any, x: Tensor) -> Tensor:
    return getattr(net, "bl" + "ock")(x)


@pytest.mark.parametrize(
    "forward", [_reads_a_number, _asks_for_the_class, _first_parameter, _by_position, _twice, _named]
)
@both
def test_a_child_that_is_only_called_is_replaced(forward: Callable[..., Tensor], example: bool, x: Tensor) -> None:
    assert norms_left(Parent(forward, block=Block()), x, example=example) == 0


def _iterated(net: Any, x: Tensor) -> Tensor:
    for block in net.blocks:
        x = block(x)
    return x * len(net.blocks)


def _indexed(net: Any, x: Tensor) -> Tensor:
    return net.blocks[1](net.blocks[0](x))


@pytest.mark.parametrize("forward", [_iterated, _indexed])
@pytest.mark.parametrize("container", [nn.ModuleList, lambda blocks: nn.Sequential(*blocks)])
@both
def test_containers_are_walked_into(
    container: Callable[..., nn.Module], forward: Callable[..., Tensor], example: bool, x: Tensor
) -> None:
    assert norms_left(Parent(forward, blocks=container([Block(), Block()])), x, example=example) == 0


@both
def test_a_shared_child_stays_shared(example: bool, x: Tensor) -> None:
    block = Block()
    model = Parent(lambda net, x: net.a(x) - net.b(x + 1), a=block, b=block)
    assert norms_left(model, x, example=example) == 0
    result = reparam.compile(model, x if example else None)
    assert result.a is result.b


def test_ties_between_children_are_kept() -> None:
    model = Parent(lambda net, x: net.b(net.a(x)), a=nn.Sequential(nn.Linear(3, 3), nn.Identity()), b=nn.Linear(3, 3))
    model.b.weight = model.a[0].weight
    report = reparam.compile(model).report
    assert report.before.parameters == report.after.parameters == 9 + 3 + 3


def test_children_in_a_dict_that_both_read_stay(x: Tensor) -> None:
    class Reader(Block):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.context.get("scale", 1.0)

    def forward(net: Any, x: Tensor) -> Tensor:
        net.block.context["scale"] = 2.0 if x.sum() > 0 else 3.0
        return net.block(x)

    block = Reader()
    block.context = {}
    model = Parent(forward, block=block)
    model.context = block.context
    twin = private_copy(model)
    assert twin.context is twin.block.context is not block.context
    assert norms_left(model, x, example=False) == 2


@both
def test_a_child_that_changes_its_input_stays(example: bool, x: Tensor) -> None:
    first = nn.Sequential(nn.ReLU(inplace=True), Block())

    def forward(net: Any, x: Tensor) -> Tensor:
        x = x * 2
        return net.first(x) + x

    # Its own children do not.
    assert norms_left(Parent(forward, first=first), x, example=example) == 0


@pytest.mark.parametrize("in_place", [False, True])
@both
def test_an_activation_that_others_call_too_stays_what_it_is(in_place: bool, example: bool, x: Tensor) -> None:
    act = nn.ReLU(inplace=in_place)

    def forward(net: Any, x: Tensor) -> Tensor:
        x = net.block(x) - 0.5
        return net.act(x) + x

    block = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), act)
    model = Parent(forward, block=block, act=act)
    assert norms_left(model, x, example=example) == 0
    result: Any = reparam.compile(model, x if example else None)
    assert (result.act.inplace, act.inplace) == (in_place, in_place)


@both
def test_a_child_whose_output_would_become_its_input_stays(example: bool, x: Tensor) -> None:
    class Scale(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x * 2) / 2

    def forward(net: Any, x: Tensor) -> Tensor:
        x = x + 0.5
        y = net.scale(x)
        y += 1
        return x - 3 * y

    norms_left(Parent(forward, scale=Scale()), x, example=example)


@both
def test_optional_arguments_of_a_child(example: bool, x: Tensor) -> None:
    class Masked(Block):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            return super().forward(x if mask is None else x * mask)

    model = Parent(lambda net, x: net.block(x, mask=x > 0), block=Masked())
    assert norms_left(model, x, example=example) == 0
    assert (
        norms_left(Parent(lambda net, x: net.block(x) + net.block(x, x > 0), block=Masked()), x, example=example) == 2
    )


def test_a_part_says_which_calls_it_was_compiled_for(x: Tensor) -> None:
    def forward(net: Any, x: Tensor, flat: bool = False) -> Tensor:
        return net.block(x[0] if flat else x)

    result = reparam.compile(randomise(Parent(forward, block=Block())).double(), x)
    assert result.report.after.norms == 0
    with pytest.raises(ConditionError, match="compiled for x as a tensor of floating-point numbers with 4 axes"):
        result(x, flat=True)


@both
def test_a_child_that_reads_a_list(example: bool, x: Tensor) -> None:
    class Neck(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = Block(), Block()

        def forward(self, maps: list[Tensor]) -> dict[str, Tensor]:
            first, second = maps[0], maps[1]
            return {"a": self.a(first), "b": self.b(second)}

    assert norms_left(Parent(lambda net, x: net.neck([x, x[:, :, 1:]]), neck=Neck()), x, example=example) == 0


@both
def test_hooks_of_a_child_run(example: bool, x: Tensor) -> None:
    block = Block()
    block.register_forward_hook(_double)
    model = Parent(lambda net, x: net.block(x), block=block)
    assert norms_left(model, x, example=example) == 2


def _double(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * 2


def test_a_scripted_child_stays_and_the_others_are_compiled(x: Tensor) -> None:
    scripted = torch.jit.script(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
    model = Parent(lambda net, x: net.block(net.scripted(x)), block=Block(), scripted=scripted)
    norms_left(model, x, example=True)
    result = reparam.compile(model, x)
    assert isinstance(result.scripted, torch.jit.ScriptModule)
    assert len(list(result.block.modules())) == 2


class Rep(nn.Module):
    """A block with a conversion of its own, as packages have them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)), nn.Conv2d(3, 3, 1)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv1(x) + self.conv2(x))

    def first(self, x: Tensor) -> Tensor:
        return self.conv1(x)

    def convert(self) -> None:
        self.conv2.weight.data *= self.conv1[1].weight.view(-1, 1, 1, 1)
        del self.conv1


class Package(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rep, self.features = Rep(), nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"x": self.features(self.rep(x))}

    def layers(self, x: Tensor) -> list[Tensor]:
        return [x := layer(x) for layer in self.features]

    def convert(self) -> None:
        for module in self.modules():
            if isinstance(module, Rep) and hasattr(module, "conv1"):
                module.convert()


def test_a_conversion_finds_nothing_left_to_convert(x: Tensor) -> None:
    model = randomise(Package()).double().eval()
    expected = model(x)
    result: Any = reparam.compile(model, x, keep_python=True)
    assert (type(result), type(result.rep), result.report.after.norms) == (Package, Rep, 0)
    for package in (result, copy.deepcopy(result)):
        package.convert()
        with torch.no_grad():
            compare(expected, package(x), 1e-9)
            compare(expected, torch.jit.trace(package, x, strict=False)(x), 1e-9)
            compare(expected, reparam.compile(package, x, keep_python=True)(x), 1e-9)
            compare(expected, reparam.compile(package, x)(x), 1e-9)


@pytest.mark.parametrize(
    "takes_apart",
    [
        lambda net, x: net.rep.first(x),
        lambda net, x: net.rep.convert(),
        lambda net, x: net.layers(x),
        lambda net, x: net.features[:2](x),
        lambda net, x: net.features[0](x),
        lambda net, x: setattr(net.features, "0", nn.Conv2d(3, 3, 1)),
        lambda net, x: setattr(net.rep, "act", nn.ReLU()),
        lambda net, x: delattr(net.rep, "act"),
    ],
)
def test_what_is_compiled_cannot_be_taken_apart(takes_apart: Callable[..., Any], x: Tensor) -> None:
    result: Any = reparam.compile(randomise(Package()).double(), x, keep_python=True)
    with pytest.raises(AttributeError, match=r"was fused with others|cannot be exchanged|has no attribute 'conv2'"):
        takes_apart(result, x)


class Pickled(Parent):
    def __init__(self) -> None:
        super().__init__(_reads_a_number, block=Block())


def test_it_can_be_pickled(x: Tensor) -> None:
    result = reparam.compile(randomise(Pickled()).double(), x)
    twin = pickle.loads(pickle.dumps(result))
    assert torch.equal(twin(x), result(x))
    assert twin.report == result.report
    assert twin.block.width == 3


@both
def test_the_argument_is_untouched(example: bool, x: Tensor) -> None:
    model = randomise(Parent(_iterated, blocks=nn.ModuleList([Block(), Block()]))).double().train()
    before = copy.deepcopy(model.state_dict())
    modules = list(model.modules())
    result = reparam.compile(model, x if example else None)
    assert list(model.modules()) == modules
    assert all(module.training and not module._forward_pre_hooks for module in modules)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    shared = {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in result.parameters()}
    assert not shared


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
@both
def test_parameter_programs_of_a_child_run_once(norm: Any, example: bool, x: Tensor) -> None:
    block = Block()
    norm(block.large)
    model = Parent(lambda net, x: net.block(x), block=block)
    assert norms_left(model, x, example=example) == 0
    result: Any = reparam.compile(model, x if example else None)
    assert result.report.after.convolutions == 1
    assert {name for name, _ in result.block.named_parameters()} == {"large.weight", "large.bias"}


class Keeping(nn.Module):
    """A convolution and its norm, and something that it makes anew at every call."""

    def __init__(self, make: Callable[[Any], Any]) -> None:
        super().__init__()
        self.conv, self.norm, self.make = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), make
        self.kept = [torch.ones(2, dtype=torch.float64)]

    def forward(self, x: Tensor) -> Tensor:
        self.kept = self.make(self.kept)
        return self.norm(self.conv(x)) * self.kept[0].sum()


@pytest.mark.parametrize(
    ("make", "left"),
    [(lambda kept: [kept[0] + 1], 1), (lambda kept: [kept[0] * 1], 0)],
    ids=["another one", "the same"],
)
@pytest.mark.parametrize("keep_python", [True, False])
def test_what_a_part_makes_anew_has_to_come_out_the_same(make: Any, left: int, keep_python: bool, x: Tensor) -> None:
    model = randomise(Parent(lambda net, x: net.part(x), part=Keeping(make))).double().eval()
    result = reparam.compile(model, x, keep_python=keep_python)
    assert result.report.after.norms == left
    for _ in range(3):
        compare(model(x), result(x), 1e-9)


class _Late(nn.Module):
    def forward(self, x):
        if not hasattr(self, "late"):
            self.late = nn.ReLU()
        return self.late(x)


class _Remembers(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.kept = nn.Conv2d(4, 4, 3, padding=1), {}

    def forward(self, x):
        x = self.conv(x)
        if x.shape[3] not in self.kept:
            self.kept[x.shape[3]] = torch.linspace(0, 1, x.shape[3])
        return x * self.kept[x.shape[3]]


class _Chunks(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(_Remembers(), _Late())

    def forward(self, x):
        return torch.cat([part * (i + 1) for i, part in enumerate(self.inner(x).chunk(4, 2))], 2)


def test_a_part_may_make_modules_at_its_first_call():
    """What was not there when recording began is no part."""
    model, x = _Chunks().eval(), torch.randn(1, 4, 12, 12)
    compiled = reparam.compile(model, x)
    for size in (12, 9):
        x = torch.randn(1, 4, size, size)
        torch.testing.assert_close(compiled(x), model(x))


class Taps(nn.ModuleDict):
    """What goes through all of its modules in a row, whichever they are."""

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        found = OrderedDict()
        for name, module in self.items():
            x = module(x)
            if name != "a":
                found[name] = x
        return found


def test_a_part_that_iterates_over_its_modules_returns_a_class_of_its_own() -> None:
    """Recording gives its copy a module that rebuilds outputs; the model that is held against has none."""
    taps = Taps({"a": nn.Conv2d(3, 4, 3), "b": nn.BatchNorm2d(4), "c": nn.ReLU()})
    module = model(lambda s, x: s.taps(x)["c"] * 2, taps=taps)
    x = normal(2, 3, 8, 8)
    compiled = reparam.compile(module, x, keep_python=True)
    assert_same(module, compiled, x)
    assert compiled.report.after.norms == 0

"""Networks on which a careless compiler returns another function, and what this one does with them.

Every model is compared in float64 with what it computes in eager mode, on several input sizes, to 1e-9; and every test
says what was fused, what was not, and which remark tells so.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import types
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import reparam
from reparam.compare import compare
from reparam.errors import ConditionError
from support import Net, randomise

SIZES = ((2, 3, 9, 7), (1, 3, 12, 5), (3, 3, 8, 8))


def conv(inputs: int = 3, outputs: int = 3, size: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, **{"padding": size // 2} | options)


class Untraceable(nn.Module):
    """Looks at numbers to decide what to do."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) if x.sum() > -1e12 else x


def eager(model: nn.Module) -> nn.Module:
    """The eval-mode function of a model, as PyTorch runs it."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        module.training = False
    return twin


def compiled(
    model: nn.Module,
    sizes: Sequence[Sequence[int]] = SIZES,
    *,
    convolutions: int | None = None,
    linears: int | None = None,
    norms: int | None = None,
    remark: str = "",
    calls: int = 1,
    example: bool = False,
) -> Any:
    """Compile in float64, compare with eager mode, and check the report's counts and remarks."""
    randomise(model).double()
    inputs = [torch.randn(*size, dtype=torch.float64) for size in sizes]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    result = reparam.compile(model, inputs[0] if example else None)
    # Without a certificate or a comparison to catch a mistake, it must still be right.
    unchecked = reparam.compile(model, inputs[0] if example else None, verify=False)
    for deployed in (result, unchecked):
        reference = eager(model)
        for x in inputs:
            for _ in range(calls):
                with torch.no_grad():
                    compare(reference(x.clone()), deployed(x.clone()), 1e-9)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items()), "the argument changed"
    assert modes == [module.training for module in model.modules()], "the argument's mode changed"
    after = result.report.after
    for name, expected in (("convolutions", convolutions), ("linears", linears), ("norms", norms)):
        assert expected is None or getattr(after, name) == expected, f"{name}: {result.report}"
    assert remark in "\n".join(str(r) for r in result.report.remarks if r.kind != "fused"), str(result.report)
    return result


# One layer, several uses.


def test_a_conv_called_twice_with_one_call_normed() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        return net.norm(net.conv(x)) + net.conv(x.relu())

    result = compiled(Net(forward, conv=conv(), norm=nn.BatchNorm2d(3)), convolutions=2, norms=0)
    # The two calls now have different weights, and neither has those of the other.
    assert len([m for m in result.modules() if isinstance(m, nn.Conv2d)]) == 2


def test_one_conv_read_by_two_norms() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        y = net.conv(x)
        return net.a(y).relu() * net.b(y).sigmoid()

    layers = {"conv": conv(), "a": nn.BatchNorm2d(3), "b": nn.BatchNorm2d(3)}
    compiled(Net(forward, **layers), convolutions=1, norms=2, remark="conv has 2 readers")


def test_an_output_used_by_the_norm_and_by_something_else() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        y = net.conv(x)
        return net.norm(y).relu() + y.abs()

    compiled(Net(forward, conv=conv(), norm=nn.BatchNorm2d(3)), norms=1, remark="conv has 2 readers")


def test_an_intermediate_value_that_is_also_returned() -> None:
    def forward(net: Net, x: Tensor) -> tuple[Tensor, Tensor]:
        y = net.conv(x)
        return y, net.norm(y)

    compiled(Net(forward, conv=conv(), norm=nn.BatchNorm2d(3)), norms=1, remark="2 readers")


def test_a_shared_block_is_fused_once_and_shared() -> None:
    block = nn.Sequential(conv(), nn.BatchNorm2d(3), nn.ReLU())
    result = compiled(Net(lambda net, x: net.block(net.block(x)), block=block), convolutions=2, norms=0)
    assert len([m for m in result.modules() if isinstance(m, nn.Conv2d)]) == 1


def test_tied_weights_with_different_norms_come_apart_and_without_stay_tied() -> None:
    def tied(forward: Callable[..., Any]) -> Net:
        net = Net(forward, a=conv(), b=conv(), norm=nn.BatchNorm2d(3), other=nn.BatchNorm2d(3))
        net.b.weight = net.a.weight
        return net

    compiled(tied(lambda net, x: net.norm(net.a(x)) + net.other(net.b(x.relu()))), convolutions=2, norms=0)
    plain = compiled(tied(lambda net, x: net.b(net.a(x).relu())), convolutions=2)
    weights = [m.weight for m in plain.modules() if isinstance(m, nn.Conv2d)]
    assert len(weights) == 2
    assert weights[0] is weights[1]


def test_a_sum_of_a_value_with_itself() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        y = net.conv(x)
        z = y + x
        return z + z

    compiled(Net(forward, conv=conv()), convolutions=1)


def test_an_in_place_relu_module_shared_by_many() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.act(net.norm(net.a(x)))
        return net.act(net.b(x) + net.act(x))

    net = Net(forward, a=conv(), b=conv(), norm=nn.BatchNorm2d(3), act=nn.ReLU(inplace=True))
    compiled(net, convolutions=2, norms=0)


@pytest.mark.parametrize("first", [True, False])
def test_a_shared_in_place_module_with_one_call_that_must_stay_in_place(first: bool) -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        if first:
            y = net.act(net.a(x))
        z = net.b(x)
        view = z.view(-1)
        net.act(z)
        if not first:
            y = net.act(net.a(x))
        return view.sum() + y

    compiled(Net(forward, a=conv(), b=conv(), act=nn.ReLU(inplace=True)))


# In-place operations and views.


def test_in_place_relu_on_a_value_that_is_read_later() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        y = net.norm(net.a(x))
        z = F.relu(y, inplace=True)
        return net.b(z) + y

    compiled(Net(forward, a=conv(), b=conv(), norm=nn.BatchNorm2d(3)), norms=0)


def test_in_place_addition_is_seen_under_every_name() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        y = net.a(x)
        alias = y
        y += net.b(x)
        return net.norm(alias) * y.sigmoid()

    compiled(Net(forward, a=conv(), b=conv(size=1), norm=nn.BatchNorm2d(3)))


def test_in_place_through_a_view() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        y = net.a(x)
        y[:, 1:].mul_(2)
        y.flatten(2).transpose(1, 2)[..., 0].add_(1)
        return net.norm(y)

    compiled(Net(forward, a=conv(), norm=nn.BatchNorm2d(3)))


def test_a_view_that_is_read_after_its_base_was_changed() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        y = net.norm(net.a(x))
        view = y.view(y.shape[0], -1)
        y.relu_()
        return view.sum(1)

    compiled(Net(forward, a=conv(), norm=nn.BatchNorm2d(3)))


def test_item_assignment() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        y = net.a(x)
        y[:, 0] = y[:, 1]
        return y

    inner = Net(forward, a=conv())
    outer = nn.Sequential(inner, conv(), nn.BatchNorm2d(3))
    result = compiled(outer, convolutions=2, norms=0)
    assert not [remark for remark in result.report.remarks if remark.rule == "Record"]


class Zeroes(nn.Module):
    """Changes its input in place, in Python that is no graph."""

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > -1e12:
            x.zero_()
        return x


def test_an_opaque_module_that_changes_a_term_of_a_sum_between_two_additions() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        y = x.sigmoid()
        partial = y + net.a(x)
        net.zeroes(y)
        return partial + net.b(x) + net.c(x)

    net = Net(forward, a=conv(), b=conv(size=1), c=conv(), zeroes=Zeroes())
    compiled(net, remark="zeroes: Zeroes is kept as it is: it asks for the value of an activation")


def test_a_dropout_in_eval_mode_before_an_opaque_module_that_writes() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        y = net.a(x)
        z = y * 1.0
        net.zeroes(z)
        return y + z

    compiled(Net(forward, a=conv(), zeroes=Zeroes()))


def test_in_place_addition_that_keeps_the_type_of_its_target() -> None:
    net = Net(lambda net, x: net.a(x).bfloat16().add_(x), a=conv()).float()
    x = torch.randn(SIZES[0])
    for verify in (True, False):
        result = reparam.compile(net, verify=verify)(x)
        assert result.dtype == torch.bfloat16
        assert torch.equal(result, net(x))


# Hooks.


def double_output(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return 2 * output


def double_input(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(2 * argument for argument in args)


@pytest.mark.parametrize("kind", ["forward", "forward_pre"])
@pytest.mark.parametrize(
    ("where", "norms", "remark"),
    [
        ("1.0", 1, "1.0: it carries hooks"),
        ("1.1", 1, "1.1: it carries hooks"),
        ("1", 1, "Sequential carries hooks"),
        ("", 0, ""),
    ],
)
def test_hooks_run_and_are_not_fused_away(kind: str, where: str, norms: int, remark: str) -> None:
    model = nn.Sequential(
        nn.Sequential(conv(), nn.BatchNorm2d(3)), nn.Sequential(conv(), nn.BatchNorm2d(3)), nn.Sigmoid()
    )
    calls = []

    def hook(*args: Any) -> Any:
        calls.append(where)
        return double_output(*args) if kind == "forward" else double_input(*args)

    getattr(model.get_submodule(where), f"register_{kind}_hook")(hook)
    result = compiled(model, convolutions=2, norms=norms, remark=remark)
    calls.clear()
    result(torch.randn(SIZES[0], dtype=torch.float64))
    assert calls == [where]


# Modes and statistics.


def test_a_model_in_training_mode_stays_there_and_its_statistics_are_untouched() -> None:
    model = nn.Sequential(conv(), nn.BatchNorm2d(3), nn.Dropout(0.5)).train()
    result = compiled(model, convolutions=1, norms=0)
    assert all(module.training for module in model.modules())
    assert not any(module.training for module in result.modules())
    assert model[1].num_batches_tracked == 0


def test_a_norm_without_running_statistics_stays() -> None:
    model = nn.Sequential(conv(), nn.BatchNorm2d(3, track_running_stats=False))
    compiled(model, norms=1, remark="1: it has no running statistics")


def test_a_functional_norm_with_batch_statistics_stays() -> None:
    net = Net(lambda net, x: F.batch_norm(net.a(x), None, None, training=True), a=conv())
    compiled(net, norms=1, remark="no running statistics")


def test_an_instance_norm_stays_unless_it_tracks() -> None:
    compiled(nn.Sequential(conv(), nn.InstanceNorm2d(3)), norms=1, remark="1: it has no running statistics")
    tracking = nn.Sequential(conv(), nn.InstanceNorm2d(3, affine=True, track_running_stats=True))
    compiled(tracking, norms=0)


def test_a_norm_with_nothing_linear_beside_it_says_so() -> None:
    model = nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3), nn.ReLU())
    compiled(model, norms=1, remark="1: nothing linear stands next to it")


def test_eval_may_return_none_and_train_may_be_overridden() -> None:
    class Odd(nn.Sequential):
        def train(self, mode: bool = True) -> None:  # type: ignore[override]
            super().train(mode)
            self.merged = not mode

        def eval(self) -> None:  # type: ignore[override]
            self.train(False)

    model = Odd(conv(), nn.BatchNorm2d(3))
    compiled(nn.Sequential(model, nn.ReLU()), convolutions=1, norms=0)


def test_train_that_merges_weights_in_place_does_not_reach_the_argument() -> None:
    class Merging(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.scale = conv(), nn.Parameter(torch.full((3, 1, 1, 1), 2.0))

        def train(self, mode: bool = True) -> Merging:
            if not mode and self.training:
                self.conv.weight.data.mul_(self.scale.data)
            return super().train(mode)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x)

    model = Merging()
    before = model.conv.weight.detach().clone()
    reparam.compile(model)
    assert torch.equal(model.conv.weight, before)


# Padding.


def test_a_norm_before_a_padded_conv_stays_and_before_an_unpadded_one_goes() -> None:
    compiled(nn.Sequential(nn.BatchNorm2d(3), conv()), norms=1, remark="shift before zero padding")
    compiled(nn.Sequential(nn.BatchNorm2d(3), conv(padding=0)), norms=0)


def test_a_biased_pointwise_before_a_padded_conv_stays() -> None:
    model = nn.Sequential(conv(3, 3, 1), conv(3, 3, 3))
    compiled(model, convolutions=2)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_other_paddings_take_a_norm_and_merge_with_their_own_kind_only(mode: str) -> None:
    compiled(nn.Sequential(conv(padding_mode=mode), nn.BatchNorm2d(3)), norms=0)
    compiled(nn.Sequential(nn.BatchNorm2d(3), conv(padding_mode=mode)), norms=0)
    own = Net(lambda net, x: net.a(x) + net.b(x), a=conv(padding_mode=mode), b=conv(padding_mode=mode))
    compiled(own, convolutions=1)
    mixed = Net(lambda net, x: net.a(x) + net.b(x), a=conv(padding_mode=mode), b=conv())
    compiled(mixed, convolutions=2, remark=f"{mode} and zeros padding do not merge")


# Broadcasting and rank.


def test_a_branch_with_one_channel_is_broadcast_and_not_merged() -> None:
    net = Net(lambda net, x: net.a(x) + net.b(x), a=conv(), b=conv(3, 1))
    compiled(net, convolutions=2, remark="the addition broadcasts")
    identity = Net(lambda net, x: net.a(x) + x, a=conv(1, 4))
    compiled(identity, [(2, 1, 7, 8)], convolutions=1)


def test_a_branch_of_one_pixel_is_broadcast_and_not_merged() -> None:
    net = Net(lambda net, x: net.a(x) + net.b(x.mean((2, 3), keepdim=True)), a=conv(size=1), b=conv(size=1))
    compiled(net, convolutions=2)


def test_a_smaller_output_is_not_merged() -> None:
    net = Net(lambda net, x: net.a(x) + net.b(x), a=conv(size=3, padding=0), b=conv(size=1, padding=0, stride=1))
    model = Net(lambda net, x: net.inner(x), inner=net)
    compiled(model, [(2, 3, 3, 3)], convolutions=2, remark="output sizes differ", example=True)


@pytest.mark.parametrize(("size", "norms"), [((4, 6), 0), ((2, 6, 5), 1)])
def test_linear_then_norm_depends_on_the_rank(size: tuple[int, ...], norms: int) -> None:
    channels = size[1]
    model = nn.Sequential(nn.Linear(size[-1], 6), nn.BatchNorm1d(channels))
    remark = "it works along axis -2, not along the channels' axis -1" if norms else ""
    compiled(model, [size], linears=1, norms=norms, example=True, remark=remark)
    # Without an example, one of two axes is made up, and the result is for such.
    if len(size) == 2:
        compiled(model, [size], linears=1, norms=0, remark="made up: input of torch.float64, 2x6")
    else:
        with pytest.raises(ConditionError, match=r"compiled for input as a tensor of .* with 2 axes, not .* 3 axes"):
            reparam.compile(model)(torch.randn(size, dtype=torch.float64))


def test_a_shape_of_an_absorbed_value_is_read_from_a_value_of_that_shape() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        a = net.a(x)
        height = a.shape[2]
        pixel = x.sigmoid().mean((2, 3), keepdim=True) * height
        return a + net.b(x) + pixel

    compiled(Net(forward, a=conv(), b=conv(size=1)), convolutions=1)

    def smaller(net: Net, x: Tensor) -> Tensor:
        pixel = x.mean((2, 3), keepdim=True)
        a = net.a(pixel)
        return (a + net.b(pixel) + x.sigmoid()) * a.shape[2]

    compiled(Net(smaller, a=conv(size=1), b=conv(size=1)), convolutions=1)


def test_ranks_after_reductions() -> None:
    norms = {"norm": nn.BatchNorm1d(3), "other": nn.BatchNorm1d(3)}
    mean = Net(lambda net, x: net.fc(net.norm(net.a(x).mean(axis=(2, 3)))), a=conv(), fc=nn.Linear(3, 4), **norms)
    compiled(mean, linears=1, norms=0)
    variance = Net(lambda net, x: net.other(net.norm(net.a(x).var(2, True))), a=nn.Conv1d(3, 3, 3), **norms)
    compiled(variance, [(4, 3, 9), (3, 3, 11)])
    pooled = Net(
        lambda net, x: net.other(net.norm(net.pool(net.a(x))[0])),
        a=nn.Conv1d(3, 3, 3),
        pool=nn.MaxPool1d(2, return_indices=True),
        **norms,
    )
    compiled(pooled, [(4, 3, 9), (2, 3, 11)])


# What models return and take.

Pair = collections.namedtuple("Pair", "features logits")


@dataclasses.dataclass
class Output:
    features: Tensor
    logits: Tensor


@pytest.mark.parametrize("make", [lambda a, b: {"a": a, "b": [b, None, 3]}, lambda a, b: (a, (b, "x")), Pair, Output])
def test_structures_of_outputs(make: Callable[..., Any]) -> None:
    net = Net(lambda net, x: make(net.norm(net.a(x)), x), a=conv(), norm=nn.BatchNorm2d(3))
    result = compiled(net, norms=0)
    output = result(torch.randn(SIZES[0], dtype=torch.float64))
    assert type(output) is type(net(torch.randn(SIZES[0], dtype=torch.float64)))


class Optional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = conv(), nn.BatchNorm2d(3)

    def forward(self, x: Tensor, mask: Tensor | None = None, scale: float = 2.0, *, both: bool = False) -> Any:
        y = self.norm(self.conv(x)) * scale
        if mask is not None:
            y = y * mask
        return (y, x) if both else y


@pytest.mark.parametrize(
    "call", [{}, {"mask": torch.rand(SIZES[0], dtype=torch.float64)}, {"scale": 3.0}, {"both": True}]
)
def test_optional_arguments_are_used_as_in_the_example(call: dict[str, Any]) -> None:
    model = randomise(Optional()).double().eval()
    x = torch.randn(SIZES[0], dtype=torch.float64)
    result = reparam.compile(model, {"x": x, **call})
    compare(model(x, **call), result(x=x, **call), 1e-9)
    assert result.report.after.norms == 0


def test_without_an_example_optional_arguments_keep_their_defaults() -> None:
    model = randomise(Optional()).double().eval()
    x = torch.randn(SIZES[0], dtype=torch.float64)
    result = reparam.compile(model)
    compare(model(x), result(x, mask=None, scale=2.0), 1e-9)
    with pytest.raises(ConditionError, match="compiled for mask as None, not a tensor"):
        result(x, mask=x)


def test_variable_arguments() -> None:
    class Variable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = conv(), nn.BatchNorm2d(3)

        def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
            return self.norm(self.conv(args[0]))

    compiled(Variable(), norms=0)


def test_tensor_checks_in_forward() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        y = net.a(x)
        if not isinstance(y, torch.Tensor) or y.ndim != 4 or y.dim() != 4 or not torch.is_tensor(y):
            raise TypeError(y)
        return net.norm(y)

    compiled(Net(forward, a=conv(), norm=nn.BatchNorm2d(3)), norms=0)


# What is no graph.


def test_a_module_that_asks_for_values_is_left_alone_and_named_and_the_rest_fuses() -> None:
    model = nn.Sequential(conv(), nn.BatchNorm2d(3), nn.Sequential(Untraceable(nn.ReLU()), conv()), nn.BatchNorm2d(3))
    compiled(model, convolutions=2, norms=0, remark="2.0: Untraceable is kept as it is: it asks for the value")


def test_control_flow_on_a_shape() -> None:
    class Resize(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.interpolate(x, size=(8, 8)) if x.shape[-1] > 8 else x

    model = nn.Sequential(conv(), nn.BatchNorm2d(3), Resize(), conv(), nn.BatchNorm2d(3))
    compiled(model, norms=0, remark="2: Resize is kept as it is: it decides by sizes (")


class Counting(nn.Module):
    """Counts its calls: as a number, as a buffer in place, as a new buffer, or as a running mean."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.number = 0
        self.conv = conv()
        self.register_buffer("count", torch.zeros(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        match self.how:
            case "number":
                self.number += 1
            case "in place":
                self.count += 1
            case "new":
                self.count = self.count + 1
            case "mean in place":
                self.count.add_(x.mean((0, 2, 3)).view(3, 1, 1))
            case "new mean":
                self.count = self.count + x.mean((0, 2, 3)).view(3, 1, 1)
        return self.conv(x) * (self.count + self.number)


@pytest.mark.parametrize("example", [True, False])
@pytest.mark.parametrize("how", ["number", "in place", "new", "mean in place", "new mean"])
def test_a_module_that_counts_its_calls_goes_on_counting(how: str, example: bool) -> None:
    model = nn.Sequential(Counting(how), conv(), nn.BatchNorm2d(3))
    result = compiled(model, norms=0, calls=3, example=example, remark="0: Counting is kept as it is: it ")
    assert result.get_submodule("0").how == how
    assert model[0].number == 0
    root = Counting(how)
    compiled(root, calls=3, example=example, remark="(model): kept as Python: it ")


def test_a_module_that_keeps_its_last_output_and_reads_it() -> None:
    class Streaming(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.last = conv(), None

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            self.last = y if self.last is None or self.last.shape != y.shape else y + self.last
            return self.last

    compiled(nn.Sequential(Streaming(), conv(), nn.BatchNorm2d(3)), norms=0, calls=3, remark="0: Streaming is kept")


def test_random_numbers_in_forward_are_drawn_at_every_call() -> None:
    class Noise(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.scale * torch.randn(3, 1, 1)

    model = nn.Sequential(conv(), nn.BatchNorm2d(3), Noise())
    result = reparam.compile(model, torch.randn(SIZES[0]))
    x = torch.randn(SIZES[0])
    assert not torch.equal(result(x), result(x))
    assert result.report.after.norms == 0
    assert result.report.comparison is None
    assert not [remark for remark in result.report.remarks if remark.rule == "Record"]
    assert any("draws random numbers; not compared" in remark.message for remark in result.report.remarks)
    torch.manual_seed(1)
    actual = result(x)
    torch.manual_seed(1)
    assert torch.allclose(actual, model.eval()(x), atol=1e-5)


def test_modules_in_a_plain_list() -> None:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = [conv(), nn.BatchNorm2d(3).eval()]

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    model = nn.Sequential(Listed(), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    result = reparam.compile(model)
    x = torch.randn(SIZES[0])
    assert torch.allclose(result(x), model.eval()(x), atol=1e-5)
    assert (result.report.after.convolutions, result.report.after.norms) == (1, 0)
    assert not [remark for remark in result.report.remarks if remark.rule == "Record"]
    assert {id(module) for module in model[0].layers}.isdisjoint(map(id, result.modules()))


def test_module_lists_and_dicts_are_traced_through() -> None:
    net = Net(
        lambda net, x: net.table["a-b"](net.table["norm"](net.layers[1](net.layers[0](x)))),
        layers=nn.ModuleList([conv(), conv()]),
        table=nn.ModuleDict({"norm": nn.BatchNorm2d(3), "a-b": conv()}),
    )
    compiled(net, convolutions=3, norms=0)


def test_autocast_inside_forward_is_kept() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = conv()

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.conv(x)

    model = nn.Sequential(Mixed(), nn.Conv2d(3, 3, 1).bfloat16(), nn.BatchNorm2d(3).bfloat16()).eval()
    x = torch.randn(SIZES[0])
    for verify in (True, False):
        result = reparam.compile(model, verify=verify)
        assert result(x).dtype == torch.bfloat16
        compare(model(x), result(x))
        assert "autocast" in str(result.report)
        assert result.report.after.norms == 0


def test_a_class_that_does_more_when_called() -> None:
    class Doubled(nn.Conv2d):
        def __call__(self, x: Tensor) -> Tensor:
            return super().__call__(x) * 2

    model = nn.Sequential(nn.Sequential(Doubled(3, 3, 3), nn.ReLU()), conv(), nn.BatchNorm2d(3))
    result = compiled(model, convolutions=2, norms=0)
    assert result.report.after.elementwise == 0


# Layers that are not what they seem.


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


class Doubling(nn.Conv2d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return 2 * super()._conv_forward(x, weight, bias)


class Plain(nn.Conv2d):
    def initialise(self) -> None:
        nn.init.zeros_(self.weight)


@pytest.mark.parametrize("cls", [Standardised, Doubling, Plain])
def test_subclasses_of_a_convolution(cls: type[nn.Conv2d]) -> None:
    compiled(nn.Sequential(cls(3, 3, 3), nn.BatchNorm2d(3)), convolutions=1, norms=0)


def test_a_torch_class_that_overrides_its_base_is_not_taken_for_it() -> None:
    import torch.ao.nn.qat
    import torch.ao.quantization

    config = torch.ao.quantization.get_default_qat_qconfig("fbgemm")
    model = nn.Sequential(torch.ao.nn.qat.Conv2d(3, 3, 3, qconfig=config), nn.BatchNorm2d(3)).eval()
    x = torch.randn(SIZES[0])
    reference = copy.deepcopy(model)
    result = reparam.compile(model, verify=False)
    compare(reference(x), result(x), 1e-6)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((3, 1, 1, 1), 2.0))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.scale


def test_a_parametrization_is_computed_once() -> None:
    layer = conv()
    nn.utils.parametrize.register_parametrization(layer, "weight", Scaled())
    result = compiled(nn.Sequential(layer, nn.BatchNorm2d(3)), convolutions=1, norms=0)
    assert type(result.get_submodule("0")) is nn.Conv2d


@pytest.mark.parametrize("wrap", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm])
def test_normalised_weights(wrap: Callable[[nn.Module], nn.Module]) -> None:
    compiled(nn.Sequential(wrap(conv()), nn.BatchNorm2d(3)), convolutions=1, norms=0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("wrap", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_weights_normalised_by_hooks_are_computed_once(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = nn.Sequential(wrap(conv()), nn.BatchNorm2d(3), conv(), nn.BatchNorm2d(3))
    model.eval()(torch.randn(SIZES[0]))
    # Only the norm's values: a hook computes the weight from others, which must fit one another.
    randomise(model[1])
    model.double()
    result = reparam.compile(model)
    x = torch.randn(SIZES[0], dtype=torch.float64)
    compare(model(x), result(x), 1e-9)
    assert result.report.after.kernels == 2
    assert sorted(result.get_submodule("0").state_dict()) == ["bias", "weight"]


def test_a_forward_patched_on_the_instance() -> None:
    model = nn.Sequential(conv(), nn.BatchNorm2d(3))
    model[0].forward = types.MethodType(lambda self, x: self._conv_forward(x, 2 * self.weight, self.bias), model[0])
    compiled(model, convolutions=1, norms=0)
    root = nn.Sequential(conv(), nn.BatchNorm2d(3))
    root.forward = types.MethodType(lambda self, x: self[1](self[0](x)).relu(), root)
    compiled(root, convolutions=1, norms=0)


def test_functional_layers_with_parameters_of_their_own() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 3, 3, 3))
            self.mask = nn.Buffer(torch.tensor([1.0, 0.0, 1.0]).view(1, 3, 1, 1))
            self.bias = nn.Parameter(torch.randn(4))
            self.fc = nn.Parameter(torch.randn(5, 4))
            self.register_buffer("mean", torch.randn(4))
            self.register_buffer("var", torch.rand(4) + 0.5)

        def forward(self, x: Tensor) -> Tensor:
            x = F.conv2d(F.pad(x, (1, 1, 1, 1)), self.weight * self.mask, self.bias)
            x = F.batch_norm(x, self.mean, self.var, self.bias, self.bias)
            x = F.avg_pool2d(x.relu(), 2).mean((2, 3))
            return F.batch_norm(
                F.linear(x, self.fc), torch.zeros_like(self.fc[:, 0]), torch.ones_like(self.fc[:, 0])
            ).sigmoid()

    result = reparam.compile(randomise(Functional()).double(), torch.randn(2, 3, 8, 8, dtype=torch.float64))
    assert result.report.after.convolutions == 1
    compiled(Functional(), convolutions=1, linears=1)


def test_both_functions_called_batch_norm() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        norm = net.norm
        x = net.a(x)
        return torch.batch_norm(
            x, norm.weight, norm.bias, norm.running_mean, norm.running_var, False, 0.1, norm.eps, False
        )

    compiled(Net(forward, a=conv(), norm=nn.BatchNorm2d(3)), norms=0)


def test_arguments_that_depend_on_the_input() -> None:
    net = Net(lambda net, x: F.conv2d(x, net.a.weight, groups=x.shape[1]), a=nn.Conv2d(3, 3, 3, groups=3))
    compiled(net, convolutions=1)
    compiled(Net(lambda net, x: torch.add(x, net.a(x), alpha=x.shape[0]), a=conv()), convolutions=1)


# Numbers of all kinds.


def test_integers_are_not_scaled_as_floats() -> None:
    compiled(Net(lambda net, x: torch.argmax(net.a(x), 1) * 2 + 1, a=conv()))
    net = Net(lambda net, x: net.a(x / 255), a=conv()).eval()
    image = torch.randint(0, 255, SIZES[0], dtype=torch.uint8)
    compare(net(image), reparam.compile(net, image)(image), 1e-5)
    kept = Net(lambda net, x: x * 1.0)
    assert reparam.compile(kept, image)(image).dtype == torch.float32


def test_scalars_keep_the_rank_and_the_type() -> None:
    compiled(Net(lambda net, x: net.a(x).mean() * 2 * 3 + 1, a=conv()))
    net = Net(lambda net, x: net.a(x).bfloat16() * 2 * 3, a=conv())
    assert reparam.compile(net)(torch.randn(SIZES[0])).dtype == torch.bfloat16


def test_complex_numbers() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        return F.conv2d(torch.fft.fft2(net.norm(net.a(x))), net.a.weight * 1j) * 2

    compiled(Net(forward, a=conv(), norm=nn.BatchNorm2d(3)), norms=0)


def test_complex_outputs_are_compared_whole() -> None:
    with pytest.raises(reparam.VerificationError):
        compare(torch.tensor([1 + 1j]), torch.tensor([1 + 2j]), 1e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_precision_is_kept_and_certificates_are_in_float64(dtype: torch.dtype) -> None:
    net = Net(lambda net, x: net.norm(net.a(x)) + net.b(x), a=conv(), b=conv(size=1), norm=nn.BatchNorm2d(3))
    randomise(net).to(dtype).eval()
    x = torch.randn(SIZES[0], dtype=dtype)
    result = reparam.compile(net, x)
    assert {parameter.dtype for parameter in result.parameters()} == {dtype}
    assert result(x).dtype == dtype
    assert 0 < result.report.largest_certificate_error < 1e-12
    compare(net(x), result(x))


def test_a_norm_that_is_more_precise_than_its_convolution() -> None:
    model = nn.Sequential(collections.OrderedDict(z=conv().bfloat16(), a=nn.BatchNorm2d(3))).eval()
    randomise(model)
    x = torch.randn(SIZES[0]).bfloat16()
    result = reparam.compile(model, verify=False)
    assert result.report.after.norms == 0
    assert result(x).dtype == model(x).dtype
    compare(model(x), result(x))


def test_empty_batches() -> None:
    model = nn.Sequential(conv(), nn.BatchNorm2d(3))
    compiled(model, [(0, 3, 8, 8), (2, 3, 8, 8)], norms=0)
    compiled(model, [(0, 3, 8, 8)], norms=0, example=True)


# What only changes how a model runs, or how its gradients are computed.


def _norm_block() -> nn.Sequential:
    return nn.Sequential(conv(padding=1), nn.BatchNorm2d(3), nn.ReLU())


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("example", [True, False])
def test_activation_checkpoints_are_seen_through(reentrant: bool, example: bool) -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = checkpoint(net.one, x, use_reentrant=reentrant)
        return checkpoint_sequential(net.two, 2, x, use_reentrant=reentrant)

    x = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    model = Net(forward, one=_norm_block(), two=nn.Sequential(_norm_block(), _norm_block()))
    model = randomise(model).double()
    result = reparam.compile(model, x if example else None)
    compare(eager(model)(x), result(x), 1e-9)
    assert result.report.after.norms == 0
    assert {remark.kind for remark in result.report.remarks if remark.rule != "Example"} == {"fused"}


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile, checkpoint_wrapper])
def test_wrappers_inside_a_model_are_seen_through(wrap: Callable[..., nn.Module]) -> None:
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    plain = randomise(nn.Sequential(_norm_block(), _norm_block())).double()
    model = nn.Sequential(plain[0], wrap(plain[1]))
    result = reparam.compile(model)
    compare(eager(plain)(x), result(x), 1e-9)
    assert result.report.after.norms == 0
    assert {remark.kind for remark in result.report.remarks if remark.rule != "Example"} == {"fused"}


def test_attributes_are_read_through_wrappers() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        return net.parallel(x) * net.parallel.module[1].eps + net.optimized(x) * net.optimized.get_submodule("1").eps

    x = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    block = randomise(_norm_block()).double().eval()
    optimized = torch.compile(block, backend="eager")
    result = reparam.compile(Net(forward, parallel=nn.DataParallel(block), optimized=optimized), x)
    compare(block(x) * block[1].eps * 2, result(x), 1e-9)
    assert result.report.after.norms == 0


class Squared(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        context.save_for_backward(x)
        context.mark_non_differentiable(x)
        return x * x

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return 2 * context.saved_tensors[0] * gradient


class Cubed(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * x * x

    @staticmethod
    def setup_context(context: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        context.save_for_backward(*inputs)


@pytest.mark.parametrize("function", [Squared, Cubed])
def test_autograd_functions_compute_what_their_forward_does(function: type[torch.autograd.Function]) -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        return function.apply(net.block(x)) * function.apply(torch.ones(1, dtype=x.dtype))

    compiled(Net(forward, block=_norm_block()), norms=0, example=True)

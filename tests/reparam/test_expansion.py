"""``expand``: the same function with more parameters, and ``compile`` as the way back."""

from __future__ import annotations

import copy
import functools

import pytest
import timm.models.resnet
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import random_tensor, seeds
from torch import Tensor, nn

import reparam
from reparam.errors import ModelError, ReparamError, VerificationError
from reparam.models import blocks
from support import count_calls, randomise

ANY_KERNEL = ("repvgg", "qarepvgg", "mobileone", "acnet", "orepa", "dbb")


class Small(nn.Module):
    """A plain CNN of the kind that people write: norms here, biases there, all kinds of padding."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 5, 2, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding="same", groups=8)
        )
        self.last = nn.Conv2d(8, 8, 3, padding=1)
        self.point = nn.Conv2d(8, 12, 1)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(self.stem(x))
        x = self.last(x).relu()
        return self.head(self.dropout(self.point(x).relu().mean((2, 3))))


def image(channels: int = 3, size: int = 19, batch: int = 4, seed: int = 0) -> Tensor:
    return random_tensor((batch, channels, size, size + 2), seed)


@pytest.fixture
def small() -> nn.Module:
    torch.manual_seed(0)
    return randomise(Small()).double()


def run(model: nn.Module, x: Tensor, *, training: bool = False) -> Tensor:
    """Without leaving a trace in the model."""
    torch.manual_seed(0)
    with torch.no_grad():
        return copy.deepcopy(model).train(training)(x)


def error(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {path: m.weight.shape for path, m in model.named_modules() if isinstance(m, nn.Conv2d)}


def blocks_of(model: nn.Module) -> list[str]:
    """The outermost ones."""
    paths = [path for path, module in model.named_modules() if isinstance(module, blocks.Block)]
    return [path for path in paths if not any(path.startswith(f"{other}.") for other in paths)]


# The same function, and the way back.


@pytest.mark.parametrize("name", ANY_KERNEL)
def test_the_same_function_with_more_parameters_and_back(small, name):
    expanded = reparam.expand(small, name)
    assert len(blocks_of(expanded)) == 5
    assert sum(p.numel() for p in expanded.parameters()) > sum(p.numel() for p in small.parameters())
    compiled = reparam.compile(expanded)
    for size in (19, 24):
        expected = run(small, image(size=size))
        assert error(run(expanded, image(size=size)), expected) < 1e-9
        assert error(run(compiled, image(size=size)), expected) < 1e-9
    plain = reparam.compile(small)
    assert shapes(compiled) == shapes(plain)
    assert count_calls(compiled, image()) == count_calls(plain, image())


def test_a_timm_residual_block_and_back():
    torch.manual_seed(0)
    shortcut = nn.Sequential(nn.Conv2d(6, 8, 1, 2, bias=False), nn.BatchNorm2d(8))
    block = randomise(timm.models.resnet.BasicBlock(6, 8, 2, shortcut)).double()
    expanded = reparam.expand(block, "mobileone", "conv?")
    assert blocks_of(expanded) == ["conv1", "conv2"]
    assert error(run(expanded, image(6)), run(block, image(6))) < 1e-9
    plain, compiled = reparam.compile(block), reparam.compile(expanded)
    assert shapes(compiled) == shapes(plain)
    assert count_calls(compiled, image(6)) == count_calls(plain, image(6))
    assert error(run(compiled, image(6)), run(block, image(6))) < 1e-9


@pytest.mark.parametrize("name", ANY_KERNEL)
@settings(max_examples=25)  # each compiles half a dozen times
@given(st.data(), seeds)
def test_any_convolution(name, data, seed):
    groups = data.draw(st.integers(1, 3), "groups")
    conv = nn.Conv2d(
        groups * data.draw(st.integers(1, 3), "columns"),
        groups * data.draw(st.integers(1, 3), "rows"),
        data.draw(st.tuples(st.integers(1, 4), st.integers(1, 4)), "kernel size"),
        data.draw(st.tuples(st.integers(1, 2), st.integers(1, 2)), "stride"),
        data.draw(st.tuples(st.integers(0, 3), st.integers(0, 3)), "padding"),
        1 if name == "dbb" else data.draw(st.integers(1, 2), "dilation"),
        groups,
        data.draw(st.booleans(), "bias"),
    ).double()
    expanded = reparam.expand(conv, name)
    x = image(conv.in_channels, 13, seed=seed)
    assert isinstance(expanded, blocks.Block)
    assert error(run(expanded, x), run(conv, x)) < 1e-9
    [left] = shapes(reparam.compile(expanded)).values()
    assert left == conv.weight.shape


@pytest.mark.parametrize(
    ("name", "kernel"), [("replk", 9), ("dilated", 7), ("ecb", 3), ("repmixer", 5), ("repvit", 3), ("repghost", 5)]
)
@pytest.mark.parametrize("bias", [True, False])
def test_blocks_for_some_convolutions(name, kernel, bias):
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 6, kernel, padding=kernel // 2, groups=1 if name == "ecb" else 6, bias=bias).double()
    expanded = reparam.expand(conv, name)
    assert error(run(expanded, image(6)), run(conv, image(6))) < 1e-9
    assert [*shapes(reparam.compile(expanded)).values()] == [conv.weight.shape]


def test_a_convolution_of_zeros():
    """Such as the last of a residual branch often is: everything in the block cancels."""
    conv = nn.Conv2d(4, 4, 3, padding=1)
    for parameter in conv.parameters():
        nn.init.zeros_(parameter)
    for name in ("mobileone", "qarepvgg"):
        expanded = reparam.expand(conv.double(), name)
        assert run(expanded, image(4)).abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_the_models_own_precision(small, dtype):
    model = small.to(dtype)
    expanded = reparam.expand(model)
    assert {p.dtype for p in expanded.parameters()} == {dtype}
    reference = run(model, image().to(dtype)).double()
    assert error(run(expanded, image().to(dtype)).double(), reference) < (1e-5 if dtype == torch.float32 else 0.2)


# Training mode.


@pytest.mark.parametrize("name", ANY_KERNEL)
def test_with_example_inputs_training_starts_from_the_same_function_too(small, name):
    batch = image(batch=6)
    expanded = reparam.expand(small, name, example_inputs=batch)
    assert error(run(expanded, batch), run(small, batch)) < 1e-9
    assert error(run(expanded, image(seed=5)), run(small, image(seed=5))) < 1e-9, "eval mode is exact on every input"
    assert error(run(expanded, batch, training=True), run(small, batch, training=True)) < 1e-9


def test_training_mode_statistics_do_not_depend_on_the_running_ones():
    """The batch is what training will see: also after norms of the model whose running statistics are others."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.BatchNorm2d(3), nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3)
    ).double()
    randomise(net)
    batch = 3 + 2 * image()
    expanded = reparam.expand(net, "mobileone", example_inputs=batch)
    assert error(run(expanded, batch, training=True), run(net, batch, training=True)) < 1e-9
    without = reparam.expand(net, "mobileone")
    assert error(run(without, batch, training=True), run(net, batch, training=True)) > 1e-2, "so it says in the docs"


def test_example_inputs_leave_no_trace(small):
    torch.manual_seed(3)
    reparam.expand(small, "repvgg")
    drawn = torch.get_rng_state()
    torch.manual_seed(3)
    expanded = reparam.expand(small, "repvgg", example_inputs=image())
    assert torch.equal(torch.get_rng_state(), drawn), "dropout in the batch drew no number of the caller's"
    assert torch.equal(expanded.stem[1].running_mean, small.stem[1].running_mean)
    assert not any(module._forward_pre_hooks for module in expanded.modules())


def test_an_expanded_model_trains(small):
    small.dropout = nn.Identity()
    expanded = reparam.expand(small, example_inputs=image()).train()
    optimizer = torch.optim.Adam(expanded.parameters(), 0.02)
    target, losses = torch.tensor([0, 1, 2, 3]), []
    for _ in range(20):
        loss = nn.functional.cross_entropy(expanded(image()), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert min(losses) < 0.8 * losses[0]
    compiled = reparam.compile(expanded)
    assert error(run(compiled, image()), run(expanded, image())) < 1e-9
    assert shapes(compiled) == shapes(reparam.compile(small))


# What is left as it was.


def test_the_argument_is_not_changed(small):
    state, modules = copy.deepcopy(small.state_dict()), dict(small.named_modules())
    reparam.expand(small, example_inputs=image())
    assert dict(small.named_modules()) == modules
    for key, tensor in small.state_dict().items():
        assert torch.equal(tensor, state[key]), key
    assert small.training


def test_mode_and_frozen_weights(small):
    small.eval()
    small.point.requires_grad_(False)
    expanded = reparam.expand(small, "repvgg")
    assert not any(module.training for module in expanded.modules())
    assert not any(p.requires_grad for p in expanded.point.parameters())
    assert all(p.requires_grad for p in expanded.last.parameters())


def test_the_same_seed_the_same_blocks(small):
    def state() -> dict[str, Tensor]:
        torch.manual_seed(11)
        return reparam.expand(small).state_dict()

    first, second = state(), state()
    assert all(torch.equal(first[key], second[key]) for key in first)


# Ties.


def test_a_module_at_two_places_stays_one():
    conv = nn.Conv2d(4, 4, 3, padding=1)
    net = nn.Sequential(conv, nn.ReLU(), conv).double()
    expanded = reparam.expand(net, "repvgg", "2")
    assert expanded[0] is expanded[2]
    assert isinstance(expanded[0], blocks.RepVGGBlock)
    assert error(run(expanded, image(4)), run(net, image(4))) < 1e-9
    compiled = reparam.compile(expanded)
    assert [*shapes(compiled).values()] == [conv.weight.shape], "one layer, called twice"
    assert count_calls(compiled, image(4))["convolution"] == 2


def test_convolutions_with_tied_tensors_become_one_block():
    net = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1)).double()
    net[2].weight, net[2].bias = net[0].weight, net[0].bias
    expanded = reparam.expand(net, "repvgg")
    assert expanded[0] is expanded[2]
    assert error(run(expanded, image(4)), run(net, image(4))) < 1e-9


def test_a_weight_that_is_tied_otherwise_is_refused():
    net = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=2, dilation=2), nn.Conv2d(4, 4, 1))
    net[1].weight = net[0].weight
    assert blocks_of(reparam.expand(net, "repvgg")) == ["2"]
    with pytest.raises(ReparamError, match="'0' cannot be expanded: its weights are tied to a Conv2d"):
        reparam.expand(net, "repvgg", "0")


# Which convolutions.


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (None, ["stem.0", "body.0", "body.2", "last", "point"]),
        ("body.*", ["body.0", "body.2"]),
        (["stem.0", "p*"], ["stem.0", "point"]),
        (lambda path, conv: conv.kernel_size == (3, 3) and conv.groups == 1, ["body.0", "last"]),
    ],
)
def test_where(small, where, expected):
    assert blocks_of(reparam.expand(small, "repvgg", where)) == expected


@pytest.mark.parametrize(
    ("where", "complaint"),
    [
        ("bodi.0", "matches none of the 5 convolutions: their paths are such as body.0"),
        (["body.0", "zzz"], "where='zzz' matches none"),
        (lambda path, conv: False, "true of none of the 5 convolutions"),
    ],
)
def test_where_nothing_is_selected(small, where, complaint):
    with pytest.raises(ReparamError, match=complaint):
        reparam.expand(small, "repvgg", where)


def test_a_model_without_convolutions():
    with pytest.raises(ReparamError, match="none of the model's 0 convolutions"):
        reparam.expand(nn.Linear(3, 3))
    with pytest.raises(ReparamError, match="has no nn"):
        reparam.expand(nn.Linear(3, 3), where="conv")


def test_what_a_block_cannot_stand_for_is_passed_over_unless_it_was_asked_for(small):
    assert blocks_of(reparam.expand(small, "repmixer")) == ["body.2"]
    with pytest.raises(ReparamError, match=r"'last' cannot be expanded: a RepMixer mixes positions only.*where="):
        reparam.expand(small, "repmixer", "last")
    with pytest.raises(ReparamError, match="none of the model's 5 convolutions can be expanded, such as 'stem"):
        reparam.expand(small, "replk")


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


def with_hook() -> nn.Module:
    conv = nn.Conv2d(3, 3, 3)
    conv.register_forward_hook(lambda module, args, output: output)
    return conv


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Standardised(3, 3, 3), "Standardised, has a forward of its own"),
        (with_hook, "hooks"),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 3)), "computed|hooks"),
        (lambda: nn.LazyConv2d(3, 3), "not there yet|hooks"),
        (lambda: nn.Conv2d(3, 3, 3, device="meta"), "no values"),
        (lambda: nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect"), "pads by reflect"),
        (lambda: nn.Conv2d(3, 3, 4, padding="same"), "one side more"),
    ],
)
def test_what_is_no_plain_convolution_is_left_alone(make, reason):
    net = nn.Sequential(make(), nn.Conv2d(3, 3, 3))
    assert blocks_of(reparam.expand(net, "repvgg")) == ["1"]
    with pytest.raises(ReparamError, match=f"'0' cannot be expanded: .*({reason})"):
        reparam.expand(net, "repvgg", "0")


def test_transposed_and_one_dimensional_convolutions_are_none_of_ours():
    net = nn.Sequential(nn.ConvTranspose2d(3, 3, 3), nn.Conv2d(3, 3, 3), nn.Conv1d(3, 3, 3))
    assert blocks_of(reparam.expand(net, "repvgg")) == ["1"]


# Blocks of one's own.


def test_a_block_with_options(small):
    expanded = reparam.expand(small, functools.partial(blocks.MobileOneBlock, branches=2), "last")
    assert len(expanded.last.branches) == 4


class Twin(nn.Module):
    """A block that knows nothing of ours: two convolutions, averaged."""

    def __init__(self, *shape: int, **geometry: int) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(*shape, **geometry), nn.Conv2d(*shape, **geometry, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return (self.one(x) + self.two(x)) / 2


def test_a_block_of_ones_own(small):
    expanded = reparam.expand(small, Twin)
    assert error(run(expanded, image()), run(small, image())) < 1e-9
    assert shapes(reparam.compile(expanded)) == shapes(reparam.compile(small))


class Fixed(nn.Module):
    """One convolution, but of parameters that do not enter its kernel one by one."""

    def __init__(self, columns: int, rows: int, size: tuple[int, int], **geometry: int) -> None:
        super().__init__()
        self.geometry = geometry
        self.low = nn.Parameter(torch.randn(rows, 1))
        self.rank = nn.Parameter(torch.randn(1, columns * size[0] * size[1] // geometry["groups"]))
        self.shape = (rows, -1, *size)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(x, (self.low @ self.rank).view(self.shape), **self.geometry)


def no_bias(*shape: int, **geometry: int) -> nn.Module:
    return nn.Conv2d(*shape, **geometry, bias=False)


def larger(columns: int, rows: int, size: tuple[int, int], **geometry: object) -> nn.Module:
    return nn.Conv2d(columns, rows, 5, **geometry | {"padding": 2})


def two(in_channels: int, out_channels: int, *shape: int, **geometry: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(in_channels, 4, 3), nn.ReLU(), nn.Conv2d(4, out_channels, *shape, **geometry))


def nonlinear(*shape: int, **geometry: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(*shape, **geometry), nn.ReLU())


@pytest.mark.parametrize(
    ("block", "complaint"),
    [
        ("mobileon", "did you mean mobileone?"),
        (3, "must be a block's name or a function"),
        (lambda *shape, **geometry: None, "a NoneType, not an nn.Module"),
        (Fixed, "cannot be given the convolution's weight: no parameter of shape"),
        (no_bias, "cannot be given the convolution's bias"),
        (larger, "compiles to conv2d.*5x5.*, and not to Conv2d"),
        (nonlinear, "is not one convolution; reparam.explain"),
        (two, "is not one convolution"),
    ],
)
def test_what_is_no_block(small, block, complaint):
    with pytest.raises(ReparamError, match=complaint):
        reparam.expand(small, block, "last")


def test_unknown_names_are_model_errors(small):
    with pytest.raises(ModelError, match="no block named"):
        reparam.expand(small, "vgg")


def test_a_padding_that_the_kernel_does_not_show_is_found():
    """Same taps, other border: only the output tells."""

    def reflecting(*shape: int, **geometry: int) -> nn.Module:
        return nn.Conv2d(*shape, **geometry, padding_mode="reflect")

    with pytest.raises(VerificationError, match="does not pad like the convolution"):
        reparam.expand(nn.Conv2d(3, 3, 3, padding=1), reflecting)


def test_only_modules_are_expanded():
    with pytest.raises(ReparamError, match="not dict"):
        reparam.expand({})


def test_a_model_that_cannot_be_copied():
    net = nn.Sequential(nn.Conv2d(3, 3, 3))
    net.cache = nn.Parameter(torch.ones(3)) * 2
    with pytest.raises(ReparamError, match="cannot be copied"):
        reparam.expand(net)


def test_example_inputs_that_do_not_fit(small):
    with pytest.raises(ReparamError, match="does not run on the example inputs"):
        reparam.expand(small, "repvgg", example_inputs=image(7))


class Prunes(nn.Module):
    """Asks what its layer is, as some networks do: another class, another function."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) * (2 if isinstance(self.conv, nn.Conv2d) else 3)


def test_the_whole_copy_is_compared():
    with pytest.raises(VerificationError, match="expanded model does not compute what the model computes"):
        reparam.expand(Prunes(), "repvgg", example_inputs=image().float())

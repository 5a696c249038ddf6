"""What a norm passes through on its way to the operators that take it in, and where it must not pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from networks import (
    SEPARATIONS,
    Attention,
    DataDependent,
    assert_same,
    assert_same_or_told,
    model,
    normal,
    one_and_a_half,
    reasons,
)
from torch import Tensor, nn

import reparam

BN1, BN2 = nn.BatchNorm1d, nn.BatchNorm2d


def scale(*shape: int) -> nn.Parameter:
    """A layer scale."""
    return nn.Parameter(torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.5)


def conv(channels: int = 3, out: int = 4, kernel: int = 1, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(channels, out, kernel, **options)


@dataclass
class Case:
    """A network with a norm or a scale in it.

    Attributes:
        forward: What it computes.
        members: Its layers, made afresh for every test.
        example: An input.
        others: Inputs of other sizes.
        left: Norms and element-wise operations that remain, besides the sum of two sources.
        guessed: Whether the same remains without an example.
    """

    forward: Callable[..., Any]
    members: Callable[[], dict[str, Any]]
    example: tuple[Tensor, ...] = (normal(2, 3, 4, 4),)
    others: list[tuple[Tensor, ...]] = field(default_factory=lambda: [(normal(1, 3, 5, 3),), (normal(5, 3, 3, 6),)])
    left: int = 0
    guessed: bool = True


def assert_case(case: Case) -> None:
    """The same function on every size, with and without an example, certified or not."""
    net = model(case.forward, **case.members())
    for example in (case.example, None):
        for verify in (True, False):
            compiled = reparam.compile(net, example, verify=verify)
            for inputs in (case.example, *case.others):
                assert_same(net, compiled, *inputs)
            if example is not None or case.guessed:
                after = compiled.report.after
                assert after.norms + after.elementwise == case.left, reasons(compiled)


def tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


FOLDED: dict[str, Case] = {
    "norm of tokens of a convolution": Case(
        lambda s, x: s.norm(tokens(s.conv(x)).transpose(1, 2)), lambda: {"conv": conv(), "norm": BN1(4)}
    ),
    "norm of pixels in a batch": Case(
        lambda s, x: s.norm(s.conv(x).permute(0, 2, 3, 1).reshape(-1, 4)), lambda: {"conv": conv(), "norm": BN1(4)}
    ),
    "a second norm behind a view": Case(
        lambda s, x: s.norm(s.inner(s.conv(x)).flatten(2)), lambda: {"conv": conv(), "inner": BN2(4), "norm": BN1(4)}
    ),
    "scale of NHWC": Case(
        lambda s, x: s.conv(x).permute(0, 2, 3, 1) * s.scale, lambda: {"conv": conv(), "scale": scale(4)}
    ),
    "scale of shape (C, 1, 1)": Case(lambda s, x: F.max_pool2d(s.conv(x), 2) * s.scale,
                                     lambda: {"conv": conv(), "scale": scale(4, 1, 1)}),
    "scale of shape (1, C, 1, 1)": Case(lambda s, x: F.max_pool2d(s.conv(x), 2) * s.scale,
                                        lambda: {"conv": conv(), "scale": scale(1, 4, 1, 1)}),
    "number": Case(lambda s, x: 2 * tokens(s.conv(x)) - 1, lambda: {"conv": conv()}),
    "norm of a linear layer, transposed": Case(
        lambda s, x: s.norm(s.fc(x).transpose(1, 2)),
        lambda: {"fc": nn.Linear(3, 4), "norm": BN1(4)},
        (normal(2, 5, 3),), [(normal(4, 4, 3),), (normal(1, 7, 3),)], guessed=False,
    ),
    "global mean": Case(lambda s, x: s.norm(s.conv(x).mean((2, 3))), lambda: {"conv": conv(), "norm": BN1(4)}),
    "global pool, flattened": Case(
        lambda s, x: s.norm(F.adaptive_avg_pool2d(s.conv(x), 1).flatten(1)), lambda: {"conv": conv(), "norm": BN1(4)}
    ),
    "global pool, squeezed": Case(
        lambda s, x: s.norm(F.adaptive_avg_pool2d(s.conv(x), 1).squeeze(-1).squeeze(-1)),
        lambda: {"conv": conv(), "norm": BN1(4)}, guessed=False,
    ),
    "kept mean, squeezed": Case(
        lambda s, x: s.norm(s.conv(x).mean((2, 3), keepdim=True).squeeze((2, 3))),
        lambda: {"conv": conv(), "norm": BN1(4)},
    ),
    "norm of a pool of an activation": Case(
        lambda s, x: s.norm(F.avg_pool2d(F.relu(s.conv(x)), 2)), lambda: {"conv": conv(), "norm": BN2(4)}
    ),
    "resampled": Case(
        lambda s, x: s.norm(F.interpolate(s.conv(x), scale_factor=2, mode="bilinear")),
        lambda: {"conv": conv(), "norm": BN2(4)},
    ),
    "reflected": Case(
        lambda s, x: s.norm(F.pad(s.conv(x), (1, 1, 1, 1), mode="reflect")), lambda: {"conv": conv(), "norm": BN2(4)}
    ),
    "two sources": Case(
        lambda s, x: s.norm(s.a(x) + s.b(F.relu(x))), lambda: {"a": conv(), "b": conv(), "norm": BN2(4)}, left=1
    ),
    "two sources, stacked": Case(
        lambda s, x: s.norm(torch.stack([s.a(x), s.b(F.relu(x))]).mean(0)),
        lambda: {"a": conv(), "b": conv(), "norm": BN2(4)},
    ),
    "a term twice": Case(
        lambda s, x: (lambda a: s.norm(2 * (a + a) + s.b(F.relu(x))))(s.a(x)),
        lambda: {"a": conv(), "b": conv(), "norm": BN2(4)}, left=1,
    ),
    "a term that is broadcast": Case(
        lambda s, x: s.norm(s.a(x) + s.b(x.mean((2, 3), keepdim=True))),
        lambda: {"a": conv(), "b": conv(), "norm": BN2(4)}, left=1,
    ),
    "unequal parts": Case(
        lambda s, x: s.norm(torch.cat([s.a(x), s.b(x)], 1)), lambda: {"a": conv(), "b": conv(3, 2), "norm": BN2(6)}
    ),
    "parts by name": Case(
        lambda s, x: s.norm(torch.cat(tensors=[s.a(x), s.b(x)], dim=1)),
        lambda: {"a": conv(), "b": conv(3, 2), "norm": BN2(6)}, guessed=False,
    ),
    "nested concatenations": Case(
        lambda s, x: s.norm(torch.cat([torch.cat([s.a(x), s.b(x)], -3), s.c(x)], 1)),
        lambda: {"a": conv(), "b": conv(3, 2), "c": conv(3, 1), "norm": BN2(7)},
    ),
    "concatenated along another axis": Case(
        lambda s, x: s.norm(torch.cat([s.a(x), s.b(x)], 3)), lambda: {"a": conv(), "b": conv(), "norm": BN2(4)}
    ),
    "a value beside itself along another axis": Case(
        lambda s, x: (lambda a: s.norm(torch.cat([a, a], 2)))(s.a(x)), lambda: {"a": conv(), "norm": BN2(4)}
    ),
    "before a head": Case(
        lambda s, x: s.fc(s.norm(F.relu(x)).mean((2, 3))), lambda: {"norm": BN2(3), "fc": nn.Linear(3, 5)}
    ),
    "before a pool and a head": Case(
        lambda s, x: s.fc(F.adaptive_avg_pool2d(s.norm(F.relu(x)), 2).flatten(1)),
        lambda: {"norm": BN2(3), "fc": nn.Linear(12, 5)},
    ),
    "before tokens": Case(
        lambda s, x: s.fc(tokens(s.norm(F.relu(x)))), lambda: {"norm": BN2(3), "fc": nn.Linear(3, 5)}
    ),
    "before NHWC that is flattened": Case(
        lambda s, x: s.fc(s.norm(F.relu(x)).permute(0, 2, 3, 1).flatten(1)),
        lambda: {"norm": BN2(3), "fc": nn.Linear(48, 5)}, others=[(normal(1, 3, 2, 8),)], guessed=False,
    ),
    "before a value beside itself": Case(
        lambda s, x: (lambda n: s.conv(torch.cat([n, n], 1)))(s.norm(F.relu(x))),
        lambda: {"norm": BN2(3), "conv": conv(6)},
    ),
    "beside a convolution": Case(
        lambda s, x: s.conv(torch.cat([s.norm(F.relu(x)), s.a(x)], 1)),
        lambda: {"norm": BN2(3), "a": conv(3, 2), "conv": conv(5)},
    ),
    # The norm made new memory, which its reader relied on.
    "a view of a transposed norm": Case(
        lambda s, x: s.norm(s.fc(x).transpose(1, 2)).view(x.shape[0], -1),
        lambda: {"fc": nn.Linear(3, 4), "norm": BN1(4)},
        (normal(2, 5, 3),), [(normal(3, 6, 3),)], guessed=False,
    ),
    "a view of an activation of a transposed norm": Case(
        lambda s, x: F.relu(s.norm(s.fc(x).transpose(1, 2))).view(x.shape[0], -1),
        lambda: {"fc": nn.Linear(3, 4), "norm": BN1(4)},
        (normal(2, 5, 3),), [(normal(3, 6, 3),)], guessed=False,
    ),
    "a view before a norm of a transposed value": Case(
        lambda s, x: s.fc(s.norm(x.transpose(1, 2)).view(x.shape[0], -1)),
        lambda: {"fc": nn.Linear(20, 4), "norm": BN1(4)},
        (normal(2, 5, 4),), [(normal(3, 5, 4),)], guessed=False,
    ),
    "in place on the way": Case(
        lambda s, x: s.norm(s.conv(x).mul_(2).add_(1).flatten(2)), lambda: {"conv": conv(), "norm": BN1(4)}
    ),
    "a function that is named like torch's": Case(
        lambda s, x: s.norm(flatten(s.conv(x), 2)), lambda: {"conv": conv(), "norm": BN1(4)}
    ),
    "a shape that is read on the way": Case(
        lambda s, x: (lambda y: s.norm(y.reshape(y.shape[0], y.shape[1], -1)))(s.conv(x)),
        lambda: {"conv": conv(), "norm": BN1(4)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDED)
def test_norm_goes(name):
    assert_case(FOLDED[name])


def flatten(x: Tensor, start: int) -> Tensor:
    """Not torch's."""
    return x.flatten(start) + 1


def cat(values: list[Tensor], axis: int) -> Tensor:
    """Not torch's."""
    return torch.cat(values, axis) ** 2


torch.fx.wrap("flatten")
torch.fx.wrap("cat")


def view_changed_by_python(self, x):
    x = self.norm(self.fc(x).transpose(1, 2))
    self.opaque(x.view(x.shape[0], -1))
    return x


def view_changed_in_place(self, x):
    x = F.relu(self.norm(self.fc(x).transpose(1, 2)))
    pixels = x.view(x.shape[0], -1)
    pixels.add_(1)
    return x, pixels


class OwnFlatten(nn.Flatten):
    """Flattens, and more, in Python that cannot be traced."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + (1.0 if float(input.sum()) < 1e9 else 0.0)


class OwnPool(nn.AvgPool2d):
    """Pools, and more, in Python that cannot be traced."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + (1.0 if float(input.sum()) < 1e9 else 0.0)


def hooked(layer: nn.Module) -> nn.Module:
    layer.register_forward_hook(one_and_a_half)
    return layer


def opaque_on_the_way(self, x):
    """A value that is read through a view, and changed in place before that."""
    x = F.relu(x)
    pixels = self.norm(x).flatten(2)
    changed = self.opaque(x)
    return self.conv(pixels), changed


def opaque_behind_a_view(self, x):
    """The same, changed under another name."""
    x = F.relu(x)
    pixels = self.norm(x.transpose(2, 3)).flatten(2)
    changed = self.opaque(x)
    return self.conv(pixels), changed


SQUARE = [(normal(1, 3, 4, 4),), (normal(4, 3, 4, 4),)]

REFUSED: dict[str, Case] = {
    # Sizes that are not what they seem.
    "a sum over a batch of one": Case(
        lambda s, x, y: s.norm((s.a(x) + s.b(y)).reshape(x.shape[0], 4, -1)),
        lambda: {"a": conv(), "b": conv(), "norm": BN1(4)},
        (normal(2, 3, 4, 4), normal(2, 3, 4, 4)), [(normal(1, 3, 4, 4), normal(4, 3, 4, 4))], left=2,
    ),
    "a mean over the batch": Case(
        lambda s, x: s.norm(s.conv(x).mean(0, keepdim=True).reshape(x.shape[0], 4, -1)),
        lambda: {"conv": conv(), "norm": BN1(4)}, (normal(1, 3, 4, 4),), [*SQUARE, (normal(2, 3, 4, 4),)], left=1,
    ),
    "a padded batch": Case(
        lambda s, x: s.norm(s.pad(s.conv(x)).reshape(x.shape[0], 4, -1)),
        lambda: {"conv": nn.Conv1d(3, 4, 1), "pad": nn.ConstantPad3d((0, 0, 0, 0, 1, 1), 0.0), "norm": BN1(4)},
        (normal(2, 3, 4),), [(normal(1, 3, 4),)], left=1,
    ),
    "channels split by a reshape of equal sizes": Case(
        lambda s, x: s.norm(s.conv(x).permute(2, 0, 1, 3).reshape(4, 4, 16)),
        lambda: {"conv": conv(4), "norm": BN1(4)}, (normal(4, 4, 4, 4),), [], left=1,
    ),
    "a shape as a whole": Case(
        lambda s, x: (lambda y: y.view(y.shape) * s.scale)(s.conv(x)),
        lambda: {"conv": conv(), "scale": scale(4)}, others=SQUARE, left=1, guessed=False,
    ),
    "a size as a whole": Case(
        lambda s, x: (lambda y: y.reshape(y.size()) * s.scale)(s.conv(x)),
        lambda: {"conv": conv(), "scale": scale(4)}, others=SQUARE, left=1, guessed=False,
    ),
    "a shape in parts": Case(
        lambda s, x: (lambda y: y.view((*y.shape[:2], -1)) * s.scale)(s.conv(x)),
        lambda: {"conv": conv(), "scale": scale(4)},
        (normal(2, 3, 2, 2),), [(normal(5, 3, 1, 4),)], left=1, guessed=False,
    ),
    "a mean over no axes, which is one over all": Case(
        lambda s, x: s.fc(x).mean(dim=()) * s.scale,
        lambda: {"fc": nn.Linear(3, 4), "scale": scale(4)}, (normal(2, 3),), [(normal(5, 3),)], left=1,
    ),
    "a squeeze that does nothing": Case(
        lambda s, x: s.conv(x).squeeze(-1) * s.scale,
        lambda: {"conv": conv(), "scale": scale(4, 1)}, others=[(normal(1, 3, 4, 7),), (normal(5, 3, 4, 2),)], left=1,
        guessed=False,
    ),
    # Pools of other dimensions take the channels for an axis of space.
    "a 2-d mean of three axes": Case(
        lambda s, x: s.norm(F.avg_pool2d(s.conv(x), (3, 3), 1, 1, count_include_pad=False)),
        lambda: {"conv": nn.Conv1d(3, 4, 1), "norm": BN1(4)}, (normal(2, 3, 6),), [(normal(1, 3, 5),)], left=1,
    ),
    "a 2-d mean of three axes, of one size": Case(
        lambda s, x: s.norm(F.avg_pool2d(s.conv(x), 3, 1, 1)),
        lambda: {"conv": nn.Conv1d(3, 4, 1), "norm": BN1(4)}, (normal(2, 3, 6),), [(normal(1, 3, 5),)], left=1,
    ),
    "a 2-d maximum of three axes": Case(
        lambda s, x: s.norm(F.max_pool2d(s.conv(x), 3, 1, 1)),
        lambda: {"conv": nn.Conv1d(3, 4, 1), "norm": BN1(4)}, (normal(2, 3, 6),), [(normal(1, 3, 5),)], left=1,
    ),
    "a 2-d pooling layer on three axes": Case(
        lambda s, x: s.norm(s.pool(s.conv(x))),
        lambda: {"conv": nn.Conv1d(3, 4, 1), "pool": nn.MaxPool2d(3, 1, 1), "norm": BN1(4)},
        (normal(2, 3, 6),), [(normal(1, 3, 5),)], left=1,
    ),
    # Numbers that a scale or a shift would not reach.
    "a scale of a padding with a number": Case(
        lambda s, x: F.pad(s.conv(x), (1, 1, 1, 1), value=1.5) * s.scale,
        lambda: {"conv": conv(), "scale": scale(4, 1, 1)}, left=1,
    ),
    "a scale before a padding with a number": Case(
        lambda s, x: s.conv(F.max_pool2d(F.pad(F.relu(x) * s.scale, (1, 1, 1, 1), value=1.5), 2)),
        lambda: {"conv": conv(), "scale": scale(3, 1, 1)}, left=1,
    ),
    "a scale of a padding layer": Case(
        lambda s, x: s.pad(s.conv(x)) * s.scale,
        lambda: {"conv": conv(), "pad": nn.ConstantPad2d(1, 1.5), "scale": scale(4, 1, 1)}, left=1,
    ),
    "a shift of a padding with zeros": Case(
        lambda s, x: s.norm(F.pad(s.conv(x), (1, 0, 0, 1))), lambda: {"conv": conv(), "norm": BN2(4)}, left=1
    ),
    "a negative scale of a maximum": Case(
        lambda s, x: F.max_pool2d(s.conv(x), 2) * -s.scale,
        lambda: {"conv": conv(), "scale": scale(4, 1, 1)}, left=1,
    ),
    "a minimum": Case(
        lambda s, x: s.norm(s.conv(x).amin((2, 3))), lambda: {"conv": conv(), "norm": BN1(4)}, left=1
    ),
    # Channels that are broadcast.
    "a scale that makes channels, of a pool": Case(
        lambda s, x: F.avg_pool2d(F.relu(x), 2) * s.scale,
        lambda: {"scale": scale(4, 1, 1)}, (normal(2, 1, 4, 4),), [(normal(3, 4, 5, 3),)], left=1, guessed=False,
    ),
    "a pool of one channel beside four": Case(
        lambda s, x: s.norm(s.conv(x) + s.pool(F.relu(x))),
        lambda: {"conv": conv(1, 4, 2, stride=2), "pool": nn.AvgPool2d(2), "norm": BN2(4)},
        (normal(2, 1, 4, 4),), [(normal(3, 1, 6, 2),)], left=2,
    ),
    "a layer of one channel beside four": Case(
        lambda s, x: s.norm(s.a(x) + s.b(F.relu(x))),
        lambda: {"a": conv(3, 4), "b": conv(3, 1), "norm": BN2(4)}, left=2,
    ),
    # Values that somebody else needs.
    "two readers": Case(
        lambda s, x: (lambda y: (s.norm(y), y))(s.conv(x).flatten(2)), lambda: {"conv": conv(), "norm": BN1(4)}, left=1
    ),
    "two readers of one source": Case(
        lambda s, x: (lambda a: (s.norm(a + s.b(F.relu(x))), a))(s.a(x)),
        lambda: {"a": conv(), "b": conv(), "norm": BN2(4)}, left=2,
    ),
    "read twice by one convolution": Case(
        lambda s, x: (lambda n: s.conv(torch.cat([F.avg_pool2d(n, 2), F.max_pool2d(n, 2)], 1)))(s.norm(F.relu(x))),
        lambda: {"norm": BN2(3), "conv": conv(6)}, left=1,
    ),
    "read twice by one convolution, in one shape": Case(
        lambda s, x: (lambda n: s.conv(torch.cat([n, n.clone()], 1)))(s.norm(F.relu(x))),
        lambda: {"norm": BN2(3), "conv": conv(6)}, left=1,
    ),
    "read twice by one convolution, every other column": Case(
        lambda s, x: (lambda n: s.conv(torch.cat([n[..., ::2], n[..., 1::2]], 1)))(s.norm(F.relu(x))),
        lambda: {"norm": BN2(3), "conv": conv(6)}, others=[(normal(3, 3, 5, 6),)], left=1,
    ),
    # Python that was not traced, or that a hook adds.
    "a hooked view": Case(
        lambda s, x: s.norm(s.flat(s.conv(x))),
        lambda: {"conv": conv(), "flat": hooked(nn.Flatten(2)), "norm": BN1(4)}, left=1,
    ),
    "a hooked pool": Case(
        lambda s, x: s.conv(s.pool(s.norm(F.relu(x)))),
        lambda: {"norm": BN2(3), "pool": hooked(nn.AvgPool2d(2)), "conv": conv()}, left=1,
    ),
    "a view of one's own": Case(
        lambda s, x: s.norm(s.flat(s.conv(x))), lambda: {"conv": conv(), "flat": OwnFlatten(2), "norm": BN1(4)}, left=1
    ),
    "a pool of one's own": Case(
        lambda s, x: s.norm(s.pool(s.conv(x))), lambda: {"conv": conv(), "pool": OwnPool(2), "norm": BN2(4)}, left=1
    ),
    "a function that is named like torch's": Case(
        lambda s, x: s.norm(cat([s.a(x), s.b(x)], 1)),
        lambda: {"a": conv(), "b": conv(3, 2), "norm": BN2(6)}, left=2,
    ),
    "a view of its memory, changed by Python": Case(
        view_changed_by_python,
        lambda: {"fc": nn.Linear(3, 4), "norm": BN1(4), "opaque": DataDependent(True)},
        (normal(2, 5, 3),), [(normal(3, 6, 3),)], left=1,
    ),
    "a view of its memory, changed in place": Case(
        view_changed_in_place,
        lambda: {"fc": nn.Linear(3, 4), "norm": BN1(4)}, (normal(2, 5, 3),), [(normal(3, 6, 3),)], left=2,
    ),
    "changed in place before it is read": Case(
        opaque_on_the_way,
        lambda: {"norm": BN2(3), "conv": nn.Conv1d(3, 4, 1), "opaque": DataDependent(True)}, left=1,
    ),
    "changed in place under another name": Case(
        opaque_behind_a_view,
        lambda: {"norm": BN2(3), "conv": nn.Conv1d(3, 4, 1), "opaque": DataDependent(True)}, left=1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_norm_stays(name):
    assert_case(REFUSED[name])


def test_pool_of_an_unbatched_input_before_a_convolution():
    """torch's 2-d pool takes three axes for channels and two of space, and so mixes a 1-d convolution's channels."""
    net = model(lambda s, x: s.conv(F.avg_pool2d(x, 3, 1, 1)), conv=nn.Conv1d(3, 4, 1))
    x = normal(2, 3, 6)
    for example in (x, None):
        assert_same(net, reparam.compile(net, example), x)


# Chains of passages.


@dataclass(frozen=True)
class Passage:
    """An operation on ``(N, C, H, W)`` with the channels at ``axis``, and where they are afterwards."""

    name: str
    apply: Callable[[Tensor, int], Tensor]
    moves: Callable[[int, int], int] = lambda axis, rank: axis
    ranks: tuple[int, ...] = (2, 3, 4)
    image: bool = False
    shift: bool = True
    negative: bool = True


def _kept(rank: int, axis: int) -> list[int]:
    return [i for i in range(1, rank) if i != axis]


PASSAGES = [
    Passage("reverse", lambda x, a: x.permute(0, *range(x.dim() - 1, 0, -1)), lambda a, r: r - a, (3, 4)),
    Passage("transpose", lambda x, a: x.transpose(1, -1), lambda a, r: {1: r - 1, r - 1: 1}.get(a, a), (3, 4)),
    Passage("last", lambda x, a: x.movedim(a, -1), lambda a, r: r - 1, (3,)),
    Passage("unsqueeze", lambda x, a: x.unsqueeze(1), lambda a, r: a + 1, (2, 3)),
    Passage("mean", lambda x, a: x.mean(_kept(x.dim(), a)[-1]), lambda a, r: a - (_kept(r, a)[-1] < a), (3, 4)),
    Passage("kept mean", lambda x, a: x.mean(_kept(x.dim(), a)[0], keepdim=True), ranks=(3, 4)),
    Passage("maximum", lambda x, a: x.amax(_kept(x.dim(), a)[-1], True), ranks=(3, 4), negative=False),
    Passage("slice", lambda x, a: x[(slice(None),) * _kept(x.dim(), a)[0] + (slice(0, 1),)], ranks=(3, 4)),
    Passage("number", lambda x, a: x[:, :, -1] if a == 1 else x[:, 0], lambda a, r: 1 if a == 1 else a - 1, (3, 4)),
    Passage("new axis", lambda x, a: x[:, None], lambda a, r: a + 1, (2, 3)),
    Passage("max pool", lambda x, a: F.max_pool2d(x, 3, 1, 1), ranks=(4,), image=True, negative=False),
    Passage("average pool", lambda x, a: F.avg_pool2d(x, 2, 1), ranks=(4,), image=True),
    Passage("border pool", lambda x, a: F.avg_pool2d(x, 3, 1, 1), ranks=(4,), image=True, shift=False),
    Passage("fair pool", lambda x, a: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False), ranks=(4,), image=True),
    Passage("adaptive", lambda x, a: F.adaptive_avg_pool2d(x, (2, 3)), ranks=(4,), image=True),
    Passage("resample", lambda x, a: F.interpolate(x, scale_factor=2, mode="nearest"), ranks=(4,), image=True),
    Passage("zeros", lambda x, a: F.pad(x, (1, 0, 0, 2)), ranks=(4,), image=True, shift=False),
    Passage("replicas", lambda x, a: F.pad(x, (1, 0, 0, 2), mode="replicate"), ranks=(4,), image=True),
    Passage("pixels", lambda x, a: x.flatten(2), ranks=(4,), image=True),
    Passage("beside itself", lambda x, a: torch.cat([x, x], 0)),
    Passage("contiguous", lambda x, a: x.contiguous()),
]  # fmt: skip


@dataclass(frozen=True)
class Chain:
    """Passages in a row, and the ranks and axes between them."""

    passages: tuple[Passage, ...]
    axis: int
    rank: int

    def __call__(self, x: Tensor) -> Tensor:
        axis = 1
        for passage in self.passages:
            rank = x.dim()
            x, axis = passage.apply(x, axis), passage.moves(axis, rank)
        return x


@st.composite
def chains(draw: st.DrawFn) -> Chain:
    """Passages that fit, beginning with an image."""
    passages: list[Passage] = []
    axis, x = 1, torch.zeros(SMALLEST)
    for _ in range(draw(st.integers(1, 4))):
        fitting = [p for p in PASSAGES if x.dim() in p.ranks and (not p.image or axis == 1)]
        passage = draw(st.sampled_from([p for p in fitting if _runs(p, x, axis)]))
        passages.append(passage)
        axis, x = passage.moves(axis, x.dim()), passage.apply(x, axis)
    return Chain(tuple(passages), axis, x.dim())


def _runs(passage: Passage, x: Tensor, axis: int) -> bool:
    """Whether a value is large enough."""
    try:
        return passage.apply(x, axis).numel() > 0
    except RuntimeError:
        return False


SMALLEST = (1, 1, 4, 4)
SIZES = st.sampled_from([(2, 4, 4), (4, 4, 4), (3, 5, 7), (1, 6, 4)])


@given(chains(), st.sampled_from((1, 2, 4)), SIZES, st.booleans(), st.booleans(), st.booleans())
def test_any_chain_behind_a_convolution(chain, channels, size, shifted, negative, with_example):
    """``affine(chain(conv(x)))`` equals the chain of one convolution, where every passage lets the affine pass."""
    scales = scale(channels, *[1] * (chain.rank - chain.axis - 1))
    scales = nn.Parameter(-scales if negative else scales)
    shifts = nn.Parameter(scale(*scales.shape) - 1) if shifted else None

    def forward(self, x):
        x = chain(self.conv(x)) * self.scale
        return x if self.shift is None else x + self.shift

    wanted = scales.detach().clone()
    net = model(forward, conv=conv(2, channels, 3, padding=1), scale=scales, shift=shifts)
    with torch.no_grad():
        net.scale.copy_(wanted)  # a model's parameters are random numbers of either sign
    batch, *space = size
    x = normal(batch, 2, *space)
    for verify in (False, True):
        compiled = reparam.compile(net, x if with_example else None, verify=verify)
        for other in (x, normal(3, 2, 6, 5), normal(1, 2, 5, 9)):
            assert_same(net, compiled, other)
    passable = all((p.shift or not shifted) and (p.negative or not negative) for p in chain.passages)
    if passable and with_example and all(p.name != "last" for p in chain.passages):
        assert compiled.report.after.elementwise == 0, [p.name for p in chain.passages]


@given(chains(), st.sampled_from((1, 2, 4)), SIZES, st.booleans(), st.booleans(), st.booleans())
def test_any_chain_before_a_linear_layer(chain, channels, size, shifted, negative, with_example):
    """``linear(chain(affine(x)))`` likewise, with the channels brought to the end."""
    scales = scale(channels, 1, 1)
    shifts = nn.Parameter(scale(channels, 1, 1) - 1) if shifted else None

    def forward(self, x):
        x = F.relu(x) * self.scale
        x = chain(x if self.shift is None else x + self.shift)
        return self.fc(x.transpose(chain.axis, -1))

    wanted = -scales.detach() if negative else scales.detach().clone()
    net = model(forward, fc=nn.Linear(channels, 3), scale=scales, shift=shifts)
    with torch.no_grad():
        net.scale.copy_(wanted)
    batch, *space = size
    x = normal(batch, channels, *space)
    for verify in (False, True):
        compiled = reparam.compile(net, x if with_example else None, verify=verify)
        for other in (x, normal(3, channels, 6, 5), normal(1, channels, 5, 9)):
            (assert_same if with_example else assert_same_or_told)(net, compiled, other)


# Parts of a value, and products.


@pytest.mark.parametrize("scaled", ["queries", "keys", "scores", "values"])
@pytest.mark.parametrize("separated", SEPARATIONS)
def test_the_scale_of_attention_goes_into_the_projection(separated, scaled):
    net = model(lambda s, x: s.attention(x), attention=Attention(6, 2, 3, separated, scaled, 3**-0.5))
    x = normal(2, 5, 6)
    compiled = reparam.compile(net, x)
    assert compiled.report.before.elementwise == 1
    assert compiled.report.after.elementwise == 0, reasons(compiled)
    for y in (x, normal(1, 5, 6), normal(3, 7, 6)):
        assert_same(net, compiled, y)
    assert_same(net, reparam.compile(net), x)


@given(st.data(), st.sampled_from((2, 3, 5, 6)), st.booleans())
def test_any_norm_of_any_part_goes_into_the_whole(data, channels, with_example):
    """Parts that have nothing in common, each with its norm, a number or neither, put together in any order."""
    bounds = sorted(data.draw(st.sets(st.integers(1, channels - 1), min_size=1, max_size=2)))
    edges = list(zip([0, *bounds], [*bounds, channels], strict=True))
    how = data.draw(st.sampled_from(("split", "slices", "chunk")))
    if how == "chunk":
        step = -(-channels // 2)
        edges = [(0, step), (step, channels)]
    does = [data.draw(st.sampled_from(("norm", "number", "nothing"))) for _ in edges]
    order = data.draw(st.permutations(range(len(edges))))

    def forward(self, x):
        x = self.conv(x)
        match how:
            case "split":
                parts = x.split([stop - start for start, stop in edges], 1)
            case "slices":
                parts = [x[:, start:stop] for start, stop in edges]
            case "chunk":
                parts = x.chunk(2, dim=-3)
        changed = []
        for index, what in enumerate(does):
            part = parts[index]
            changed.append(self.norms[index](part) if what == "norm" else part * -0.7 if what == "number" else part)
        return torch.cat([changed[index] for index in order], 1)

    norms = nn.ModuleList(BN2(stop - start) for start, stop in edges)
    net = model(forward, conv=conv(3, channels, 3), norms=norms)
    x = normal(2, 3, 6, 5)
    compiled = reparam.compile(net, x if with_example else None)
    assert_same(net, compiled, x)
    after = compiled.report.after
    assert (after.norms, after.elementwise) == (0, 0), reasons(compiled)


def _overlapping(s, x):
    x = s.conv(x)
    return 2 * x[:, :3], x[:, 2:]


def _whole_and_part(s, x):
    x = s.conv(x)
    return 2 * x[:, :3], x


def _along_another_axis(s, x):
    a, b = s.conv(x).chunk(2, 2)
    return s.norm(a), b


def _steps(s, x):
    x = s.conv(x)
    return 2 * x[:, ::2], x[:, 1::2]


def _square(s, x):
    x = s.conv(x)
    return (x @ x) * 2


def _shifted_product(s, x):
    return s.norm(s.conv(x) @ x[:, :1])


def _product_of_another(s, x):
    y = s.conv(x)
    return (y @ torch.relu(x[:, :1])) * 2, y


UNSCALED: dict[str, tuple[Callable[..., Any], str]] = {
    "parts that overlap": (_overlapping, "getitem reads of conv what getitem reads"),
    "a part of what is read as a whole": (_whole_and_part, "the output reads of conv what getitem reads"),
    "a norm of a part of a row": (_along_another_axis, "nothing linear stands next to it"),
    "every other channel": (_steps, "2 readers"),
    "a square": (_square, ""),
    "a norm of a product": (_shifted_product, "matmul lets a single number pass, which scales all of it"),
    "a factor that is read elsewhere": (_product_of_another, "2 readers"),
}


@pytest.mark.parametrize("name", UNSCALED)
def test_a_part_or_factor_that_is_not_alone_stays(name):
    forward, reason = UNSCALED[name]
    net = model(forward, conv=conv(3, 4, 1), norm=BN2(4))
    x = normal(2, 3, 4, 4)
    compiled = reparam.compile(net, x)
    assert_same(net, compiled, x)
    after = compiled.report.after
    assert after.norms + after.elementwise > 0
    assert reason in " ".join(reasons(compiled))


def test_a_number_on_a_product_goes_into_the_other_factor():
    net = model(lambda s, x: 3 * torch.einsum("bchw,bcwk->bchk", F.relu(x), s.conv(x)), conv=conv(3, 3, 1))
    x = normal(2, 3, 4, 4)
    compiled = reparam.compile(net, x)
    assert_same(net, compiled, x)
    assert (compiled.report.before.elementwise, compiled.report.after.elementwise) == (1, 0)

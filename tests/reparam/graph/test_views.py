"""Where axes go, against brute force: scaling an axis before an operation is scaling where it goes afterwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from networks import graph_of, model, normal, one_and_a_half
from torch import Tensor, nn
from torch.fx import Node

from reparam.graph import facts, views

Forward = Callable[[Any, Tensor], Tensor]


def distinct(shape: tuple[int, ...], axis: int) -> Tensor:
    """Distinct positive numbers along an axis, which even maxima let pass."""
    numbers = torch.arange(1, shape[axis] + 1, dtype=torch.float64) / 3 + 1
    return numbers.view([-1] + [1] * (len(shape) - 1 - axis))


def last_node(forward: Forward, x: Tensor, with_example: bool, **members: Any) -> tuple[Node, nn.Module]:
    """The node of the last operation on an image that a layer made, and the network."""
    net = model(forward, **members)
    graph = graph_of(net, x if with_example else None)
    (output,) = (node for node in graph.fx.nodes if node.op == "output")
    return output.args[0], net


def assert_axes(forward: Forward, x: Tensor, knows: dict[int, int] | None = None, **members: Any) -> None:
    """Every axis that is said to go somewhere goes there; ``knows`` are those that must be known to."""
    rank = x.dim()
    facts = {2: nn.BatchNorm1d, 3: nn.Conv1d, 4: nn.BatchNorm2d}[rank]
    for with_example in (True, False):
        layer = facts(x.shape[1], x.shape[1], 1) if facts is nn.Conv1d else facts(x.shape[1])
        made = {"layer": layer} | members
        node, net = last_node(lambda s, y: forward(s, s.layer(y)), x, with_example, **made)
        moved = views.axes(node)
        if moved is None:
            assert not knows or not with_example, "nothing is known"
            continue
        assert moved.rank == rank
        assert moved.out_rank == forward(net, x).dim()
        for axis, goes in enumerate(moved.to):
            if knows and with_example:
                assert goes == knows.get(axis), f"axis {axis} goes to {goes}"
            for seed in (1, 2):
                image = normal(*x.shape, seed=seed)
                before = forward(net, image * distinct(tuple(x.shape), axis))
                if goes is None:
                    continue
                after = forward(net, image)
                assert after.shape[goes] == x.shape[axis]
                torch.testing.assert_close(before, after * distinct(tuple(after.shape), goes))


IMAGE = normal(2, 3, 4, 5)
TOKENS = normal(2, 3, 4)
CUBE = normal(3, 3, 3, 3)

# What an operation on an image of rank 4 does to its axes.
OPERATIONS: dict[str, tuple[Forward, dict[int, int]]] = {
    "flatten": (lambda s, x: x.flatten(2), {0: 0, 1: 1}),
    "flatten the middle": (lambda s, x: torch.flatten(x, 1, 2), {0: 0, 3: 2}),
    "flatten by name": (lambda s, x: torch.flatten(x, start_dim=0, end_dim=-3), {2: 1, 3: 2}),
    "flatten nothing": (lambda s, x: x.flatten(1, 1), {0: 0, 1: 1, 2: 2, 3: 3}),
    "unflatten": (lambda s, x: x.unflatten(1, (1, 3)), {0: 0, 2: 3, 3: 4}),
    "unflatten from the end": (lambda s, x: x.unflatten(-1, (-1, 1)), {0: 0, 1: 1, 2: 2}),
    "view with sizes": (lambda s, x: x.view(x.size(0), x.shape[1], -1), {0: 0, 1: 1}),
    "view with a tuple": (lambda s, x: x.view((x.size()[0], 3, -1)), {0: 0, 1: 1}),
    "reshape": (lambda s, x: torch.reshape(x, (x.shape[0], -1)), {0: 0}),
    "reshape from the end": (lambda s, x: x.reshape(-1, x.shape[-2], x.shape[3]), {2: 1, 3: 2}),
    "reshape one axis": (lambda s, x: x.reshape(x.shape[0], 3, -1, x.shape[3]), {0: 0, 1: 1, 2: 2, 3: 3}),
    "reshape to the same": (lambda s, x: x.reshape_as(x), {0: 0, 1: 1, 2: 2, 3: 3}),
    "view of a whole shape": (lambda s, x: x.view(x.shape), {0: 0, 1: 1, 2: 2, 3: 3}),
    "reshape to a whole size": (lambda s, x: x.reshape(x.size()), {0: 0, 1: 1, 2: 2, 3: 3}),
    "view as": (lambda s, x: x.view_as(F.relu(x)), {0: 0, 1: 1, 2: 2, 3: 3}),
    "split channels": (lambda s, x: x.reshape(x.shape[0], 3, 1, x.shape[2], x.shape[3]), {0: 0, 1: 1, 2: 3, 3: 4}),
    "permute": (lambda s, x: x.permute(0, 2, 3, 1), {0: 0, 1: 3, 2: 1, 3: 2}),
    "permute with a list": (lambda s, x: torch.permute(x, [3, -2, 0, 1]), {0: 2, 1: 3, 2: 1, 3: 0}),
    "permute by name": (lambda s, x: x.permute(dims=(1, 0, 3, 2)), {0: 1, 1: 0, 2: 3, 3: 2}),
    "transpose": (lambda s, x: x.transpose(1, -1), {0: 0, 1: 3, 2: 2, 3: 1}),
    "transpose by name": (lambda s, x: torch.transpose(x, dim0=0, dim1=1), {0: 1, 1: 0, 2: 2, 3: 3}),
    "mT": (lambda s, x: x.mT, {0: 0, 1: 1, 2: 3, 3: 2}),
    "unsqueeze": (lambda s, x: x.unsqueeze(1), {0: 0, 1: 2, 2: 3, 3: 4}),
    "unsqueeze at the end": (lambda s, x: torch.unsqueeze(x, -1), {0: 0, 1: 1, 2: 2, 3: 3}),
    "mean": (lambda s, x: x.mean((2, 3)), {0: 0, 1: 1}),
    "kept mean": (lambda s, x: x.mean((-1, 0), keepdim=True), {1: 1, 2: 2}),
    "mean of one axis": (lambda s, x: torch.mean(x, 2), {0: 0, 1: 1, 3: 2}),
    "mean by NumPy's name": (lambda s, x: x.mean(axis=1), {0: 0, 2: 1, 3: 2}),
    "largest": (lambda s, x: x.amax(1, True), {0: 0, 2: 2, 3: 3}),
    "smallest": (lambda s, x: x.amin(dim=(1, 2)), {0: 0, 3: 1}),
    "max pool": (lambda s, x: F.max_pool2d(x, 3, 1, 1), {0: 0, 1: 1}),
    "average pool": (lambda s, x: F.avg_pool2d(x, 2), {0: 0, 1: 1}),
    "adaptive pool": (lambda s, x: F.adaptive_avg_pool2d(x, (3, 3)), {0: 0, 1: 1}),
    "adaptive maximum": (lambda s, x: F.adaptive_max_pool2d(x, 3), {0: 0, 1: 1}),
    "interpolate": (lambda s, x: F.interpolate(x, scale_factor=2, mode="bilinear"), {0: 0, 1: 1}),
    "pad": (lambda s, x: F.pad(x, (0, 0, 1, 2)), {0: 0, 1: 1, 3: 3}),
    "pad the channels": (lambda s, x: F.pad(x, (0, 0, 0, 0, 1, 0)), {0: 0, 2: 2, 3: 3}),
    "slice": (lambda s, x: x[:, :, 1:], {0: 0, 1: 1, 3: 3}),
    "number": (lambda s, x: x[:, 1], {0: 0, 2: 1, 3: 2}),
    "ellipsis": (lambda s, x: x[..., -1], {0: 0, 1: 1, 2: 2}),
    "new axis": (lambda s, x: x[:, None, ..., None], {0: 0, 1: 2, 2: 3, 3: 4}),
    "contiguous": (lambda s, x: x.contiguous(), {0: 0, 1: 1, 2: 2, 3: 3}),
    "clone": (lambda s, x: torch.clone(x), {0: 0, 1: 1, 2: 2, 3: 3}),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("x", [IMAGE, CUBE], ids=["image", "cube"])
def test_operation(name, x):
    forward, knows = OPERATIONS[name]
    assert_axes(forward, x, knows)


LAYERS: dict[str, tuple[nn.Module, dict[int, int]]] = {
    "Flatten": (nn.Flatten(), {0: 0}),
    "Flatten(0, 1)": (nn.Flatten(0, 1), {2: 1, 3: 2}),
    "Unflatten": (nn.Unflatten(1, (3, 1)), {0: 0, 2: 3, 3: 4}),
    "MaxPool2d": (nn.MaxPool2d(2), {0: 0, 1: 1}),
    "AvgPool2d": (nn.AvgPool2d(3, 1, 1), {0: 0, 1: 1}),
    "AdaptiveAvgPool2d": (nn.AdaptiveAvgPool2d(3), {0: 0, 1: 1}),
    "AdaptiveMaxPool2d": (nn.AdaptiveMaxPool2d(2), {0: 0, 1: 1}),
    "Upsample": (nn.Upsample(scale_factor=2), {0: 0, 1: 1}),
    "UpsamplingBilinear2d": (nn.UpsamplingBilinear2d(scale_factor=2), {0: 0, 1: 1}),
    "ZeroPad2d": (nn.ZeroPad2d((1, 1, 0, 0)), {0: 0, 1: 1, 2: 2}),
    "ReflectionPad2d": (nn.ReflectionPad2d(1), {0: 0, 1: 1}),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_layer(name):
    layer, knows = LAYERS[name]
    assert_axes(lambda s, x: s.op(x), IMAGE, knows, op=layer)


def test_squeezed_axes():
    """An axis is squeezed when it must have one element, or has in an example."""
    net = model(lambda s, x: s.conv(x).mean((2, 3), keepdim=True).squeeze(-1).squeeze(2), conv=nn.Conv2d(3, 4, 1))
    *_, first, second, _ = graph_of(net).fx.nodes
    assert views.axes(first).to == (0, 1, 2, None)
    assert views.axes(second).to == (0, 1, None)
    net = model(lambda s, x: s.conv(x).squeeze(3), conv=nn.Conv2d(3, 4, 1))
    for example, known in ((None, False), (normal(2, 3, 4, 1), True), (normal(2, 3, 4, 4), False)):
        *_, squeeze, _ = graph_with_shapes(net, example).fx.nodes
        assert (views.axes(squeeze) is not None) == known


def graph_with_shapes(net: nn.Module, example: Tensor | None):
    """A graph whose values have been seen on an example, where there is one."""
    graph = graph_of(net, example)
    if example is not None:
        values: dict[Node, Any] = {}
        with torch.no_grad():
            for node in graph.fx.nodes:
                match node.op:
                    case "placeholder":
                        values[node] = example
                    case "call_module":
                        values[node] = graph.modules[node.target](*(values[a] for a in node.args))
                    case "call_method":
                        first, *rest = node.args
                        values[node] = getattr(values[first], node.target)(*rest)
                    case _:
                        continue
                facts.know(node, rank=values[node].dim())
        views.settle(graph.fx.nodes, graph.modules)
    return graph


REFUSED: dict[str, Forward] = {
    "a view as another type": lambda s, x: x.view(torch.int64),
    "a mean over everything": lambda s, x: x.mean(),
    "a mean over no axes": lambda s, x: x.mean(dim=()),
    "a mean of another type": lambda s, x: x.mean(2, dtype=torch.float32),
    "a mean over a computed axis": lambda s, x: x.mean(x.dim() - x.shape[0]),
    "a squeeze of everything": lambda s, x: x.squeeze(),
    "a squeeze of a size that nothing shows": lambda s, x: x.squeeze(2),
    "a list of indices": lambda s, x: x[:, [0, 2]],
    "a mask": lambda s, x: x[x > 0],
    "a 1-d pool of images": lambda s, x: F.avg_pool3d(x, 1),
    "a pool with its indices": lambda s, x: F.max_pool2d(x, 2, return_indices=True)[0],
    "transposed altogether": lambda s, x: x.T,
    "an expansion": lambda s, x: x.expand(2, -1, -1, -1),
    "a roll": lambda s, x: x.roll(1, 1),
    "a sum": lambda s, x: x + x,
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_unknown(name):
    node, _ = last_node(lambda s, x: REFUSED[name](s, s.conv(x)), IMAGE, False, conv=nn.Conv2d(3, 3, 1))
    assert views.axes(node) is None


@pytest.mark.parametrize("pool", [nn.MaxPool2d(1), nn.AvgPool2d(1), nn.AdaptiveAvgPool2d(4)])
@pytest.mark.parametrize("with_example", [True, False])
def test_pool_of_another_dimension_takes_an_input_without_a_batch(pool, with_example):
    convolution = nn.Conv1d(3, 3, 1)
    node, _ = last_node(lambda s, x: s.pool(s.conv(x)), normal(2, 3, 4), with_example, conv=convolution, pool=pool)
    assert views.axes(node) is None


def test_pool_takes_the_channels_of_an_image_without_a_batch_for_one():
    x = normal(3, 4, 5)
    node, _ = last_node(lambda s, x: s.pool(s.conv(x)), x, True, conv=nn.Conv2d(3, 3, 1), pool=nn.MaxPool1d(2))
    assert views.axes(node).to == (0, 1, None)


def test_rank_that_is_not_known():
    net = model(lambda s, x: F.relu(x).flatten(1))
    graph = graph_of(net, IMAGE)
    for node in graph.fx.nodes:  # as in a graph that was not recorded
        facts.know(node, rank=None, axes=None)
    views.settle(graph.fx.nodes, graph.modules)
    (output,) = (node for node in graph.fx.nodes if node.op == "output")
    assert views.axes(output.args[0]) is None


def test_hooked_layer_is_no_view():
    layer = nn.Flatten()
    layer.register_forward_hook(one_and_a_half)
    node, _ = last_node(lambda s, x: s.op(s.conv(x)), IMAGE, True, conv=nn.Conv2d(3, 3, 1), op=layer)
    assert views.axes(node) is None


# Reshapes of any kind.


@given(st.data(), st.lists(st.sampled_from((1, 2, 3)), min_size=2, max_size=4), st.booleans())
def test_any_reshape(data, sizes, with_numbers):
    """Sizes as numbers, as what the input has, as -1: what is said to stay stays, on another batch and other sizes."""
    axes = list(range(len(sizes)))
    # Cut the axes into groups: each is kept, merged, or merged and split again.
    wanted: list[tuple[str, int]] = []
    position = 0
    free = True
    while position < len(axes):
        how = data.draw(st.sampled_from(("keep", "keep", "merge", "one")))
        if how == "one":
            wanted.append(("number", 1))
        if how == "merge" and free:
            position += data.draw(st.integers(1, len(axes) - position))
            wanted.append(("rest", -1))
            free = False
            continue
        wanted.append(("number", sizes[position]) if with_numbers and position == 1 else ("size", position))
        position += 1

    def forward(s: Any, x: Tensor) -> Tensor:
        return x.reshape([x.shape[number] if what == "size" else number for what, number in wanted])

    x = normal(*sizes)
    rank = {2: nn.Linear, 3: nn.Conv1d, 4: nn.Conv2d}[len(sizes)]
    layer = rank(sizes[1], sizes[1], 1) if len(sizes) > 2 else nn.Linear(sizes[1], sizes[1])
    node, net = last_node(lambda s, y: forward(s, s.layer(y)), x, True, layer=layer)
    moved = views.axes(node)
    if len(wanted) == 1:
        return
    assert moved is not None
    for others in (sizes, [5, *sizes[1:2], *(n + 2 for n in sizes[2:])]):
        image = normal(*others, seed=3)
        for axis, goes in enumerate(moved.to):
            if goes is not None:
                scaled = forward(net, image * distinct(tuple(others), axis))
                after = forward(net, image)
                torch.testing.assert_close(scaled, after * distinct(tuple(after.shape), goes))
        if moved.merged is not None:
            first, last, new = moved.merged
            assert forward(net, image).shape[new] == torch.Size(others)[first : last + 1].numel()


# Sizes.


def size_of(forward: Callable[..., Any], axis: int, example: Tensor | None = None, **members: Any) -> Any:
    """The size of an axis of what a network returns: a number, or the name of a value and its axis."""
    node, _ = last_node(forward, IMAGE if example is None else example, example is not None, **members)
    found = views.size(node, axis)
    return (found[0].name, found[1]) if isinstance(found, tuple) else found


def test_sizes_that_layers_show():
    layers = {"conv": nn.Conv2d(3, 8, 3, 2), "norm": nn.BatchNorm2d(8)}
    assert size_of(lambda s, x: s.conv(x), 1, **layers) == 8
    assert size_of(lambda s, x: F.relu(s.norm(s.conv(x))), 1, **layers) == 8
    assert size_of(lambda s, x: s.conv(x).permute(0, 2, 3, 1), 3, **layers) == 8
    assert size_of(lambda s, x: torch.cat([s.conv(x), s.conv(x)], 1), 1, **layers) == 16


@pytest.mark.parametrize(
    ("layer", "axis"), [(nn.Conv2d(6, 8, 3, groups=2), 1), (nn.ConvTranspose2d(6, 3, 2), 1), (nn.Linear(6, 2), 3)]
)
def test_sizes_that_readers_show(layer, axis):
    node, _ = last_node(lambda s, x: s.layer(torch.fft.fft(x).real), normal(2, 6, 4, 6), True, layer=layer)
    (read,) = node.all_input_nodes
    assert views.size(read, axis) == 6
    assert views.size(read, 2) == (read, 2)


def test_sizes_of_parts_and_of_what_broadcasts():
    layers = {"conv": nn.Conv2d(3, 8, 3), "factor": nn.Parameter(normal(1)), "row": nn.Parameter(normal(8, 1, 1))}
    assert size_of(lambda s, x: s.conv(x).split([3, 5], 1)[1], 1, **layers) == 5
    assert size_of(lambda s, x: s.conv(x)[:, 2:4].relu(), 1, **layers) == 2
    assert size_of(lambda s, x: s.conv(x) * s.factor, 1, **layers) == 8
    assert size_of(lambda s, x: s.row + s.conv(x), 1, **layers) == 8
    # One channel may be broadcast itself.
    assert size_of(lambda s, x: s.row + s.one(x), 1, one=nn.Conv2d(3, 1, 3), **layers) == ("add", 1)
    # A part of the height has as many channels as the whole.
    assert size_of(lambda s, x: s.conv(x)[:, :, 2:4], 1, **layers) == 8


def test_sizes_that_come_from_the_input():
    layers = {"conv": nn.Conv2d(3, 8, 3, 2), "other": nn.Conv2d(8, 8, 1)}
    assert size_of(lambda s, x: F.relu(s.conv(x)), 0, IMAGE, **layers) == ("x", 0)
    assert size_of(lambda s, x: s.conv(x).permute(3, 2, 1, 0), 3, IMAGE, **layers) == ("x", 0)
    # Not that of its first term, which may be one.
    assert size_of(lambda s, x: s.conv(x) + s.conv(x), 0, IMAGE, **layers) == ("add", 0)
    # Nor what was reduced.
    assert size_of(lambda s, x: s.conv(x).mean(0, keepdim=True), 0, IMAGE, **layers) == ("mean", 0)
    # The channels at the end say nothing about the axis where they were.
    assert size_of(lambda s, x: s.conv(x).permute(0, 2, 3, 1), 1, IMAGE, **layers) == ("conv", 2)


# Parts of a value.

PARTS: dict[str, tuple[Forward, tuple[int, int, int, int] | None]] = {
    "chunk": (lambda s, x: x.chunk(2, 1)[0], (-3, 0, 3, 5)),
    "last chunk": (lambda s, x: torch.chunk(x, chunks=2, dim=-3)[-1], (-3, 3, 5, 5)),
    "more chunks than there are": (lambda s, x: x.chunk(9, 1)[4], (-3, 4, 5, 5)),
    "split": (lambda s, x: x.split(2, dim=1)[2], (-3, 4, 5, 5)),
    "split with sizes": (lambda s, x: torch.split(x, [1, 3, 1], 1)[1], (-3, 1, 4, 5)),
    "split with sizes along the width": (lambda s, x: x.split([3, 1], -1)[0], (-1, 0, 3, 4)),
    "split with sizes by name": (lambda s, x: x.split_with_sizes(split_sizes=[2, 3], dim=1)[1], (-3, 2, 5, 5)),
    "unbind": (lambda s, x: x.unbind(1)[-2], (-3, 3, 4, 5)),
    "unbind by name": (lambda s, x: torch.unbind(x, dim=-3)[0], (-3, 0, 1, 5)),
    "a number": (lambda s, x: x[:, 2], (-3, 2, 3, 5)),
    "a number from the end": (lambda s, x: x[:, -1, ...], (-3, 4, 5, 5)),
    "a slice": (lambda s, x: x[:, 1:-1], (-3, 1, 4, 5)),
    "an empty slice": (lambda s, x: x[:, 3:2], (-3, 3, 3, 5)),
    "a slice beyond the end": (lambda s, x: x[:, 3:9], (-3, 3, 5, 5)),
    "a sum of sizes": (lambda s, x: x.unflatten(1, (1, 5))[:, :, 2:], (-3, 2, 5, 5)),
    "sizes of a reshape": (lambda s, x: x.reshape(x.shape[0], 5, 2, 6)[:, :, 1], (-2, 1, 2, 2)),
    "a slice of rows": (lambda s, x: x[:, :, 1:], None),
    "two slices": (lambda s, x: x[:, 1:, 1:], None),
    "a step": (lambda s, x: x[:, ::2], None),
    "a new axis": (lambda s, x: x[:, 1:, None], None),
    "all of it": (lambda s, x: x[:], None),
    "a split of an axis that no layer shows": (lambda s, x: x.split(2, 2)[0], None),
    "a tensor split": (lambda s, x: x.tensor_split(2, 1)[0], None),
}


@pytest.mark.parametrize("name", PARTS)
def test_part(name):
    forward, expected = PARTS[name]
    # What is written for this width runs on no other.
    with_example = name in ("split with sizes along the width", "sizes of a reshape")
    example = normal(2, 3, 3, 4)
    node, net = last_node(lambda s, x: forward(s, s.conv(x)), example, with_example, conv=nn.Conv2d(3, 5, 1))
    found = views.part(node)
    if expected is None:
        assert found is None
        return
    assert (found.axis, found.start, found.stop, found.total) == expected
    x = normal(2, 5, 3, 4)
    with torch.no_grad():
        part = forward(net, x)
        whole = x.unflatten(1, (1, 5)) if name == "a sum of sizes" else x
        whole = x.reshape(2, 5, 2, 6) if name == "sizes of a reshape" else whole
    taken = whole.narrow(found.axis, found.start, found.stop - found.start)
    assert torch.equal(part, taken if found.is_slice else taken.squeeze(found.axis))


def test_parts_that_have_something_in_common():
    net = model(lambda s, x: (s.conv(x)[:, :3], s.conv(x)[:, 2], s.conv(x)[:, 3:]), conv=nn.Conv2d(3, 5, 1))
    (output,) = (node for node in graph_of(net).fx.nodes if node.op == "output")
    first, second, third = (views.part(node) for node in output.args[0])
    assert first.overlaps(second)
    assert second.overlaps(first)
    assert not first.overlaps(third)
    assert not second.overlaps(third)


PRODUCTS: dict[str, tuple[Forward, bool]] = {
    "the operator": (lambda s, x: x @ s.conv(x), True),
    "the function": (lambda s, x: torch.matmul(x, s.conv(x)), True),
    "the method": (lambda s, x: x.matmul(s.conv(x)), True),
    "einsum": (lambda s, x: torch.einsum("bchw,bcvw->bchv", x, s.conv(x)), True),
    "element by element": (lambda s, x: x * s.conv(x), False),
    "a square": (lambda s, x: (lambda y: y @ y)(s.conv(x)), False),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_matrix_products(name):
    forward, is_product = PRODUCTS[name]
    node, _ = last_node(forward, CUBE, False, conv=nn.Conv2d(3, 3, 1))
    assert views.multiplies(node) == is_product

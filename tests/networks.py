"""Random small networks, and what the tests of the compiler say about them.

A network is a program: a list of :class:`Step`, each of which reads earlier values. Its ``repr`` can be pasted into
a test, so that a failure that Hypothesis found and shrank becomes a named regression test.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from strategies import divisors
from torch import Tensor, nn

import reparam
from reparam import capture, passes
from reparam.algebra import AveragePool, ChannelAffine, Conv, Operator
from reparam.compare import as_call
from reparam.errors import ConditionError
from reparam.graph import aliasing, views
from reparam.rewrite import driver
from support import randomise

TOLERANCE = 1e-9

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
POOL = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}
MAX_POOL_LAYER = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}
ADAPTIVE = {
    "mean": {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d},
    "max": {1: nn.AdaptiveMaxPool1d, 2: nn.AdaptiveMaxPool2d, 3: nn.AdaptiveMaxPool3d},
}
ADAPTIVE_FUNCTION = {
    "mean": {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d},
    "max": {1: F.adaptive_max_pool1d, 2: F.adaptive_max_pool2d, 3: F.adaptive_max_pool3d},
}
MAX_POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
F_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


# Helpers for tests of single rules.


def model(forward: Callable[..., Any], **members: Any) -> nn.Module:
    """A float64 module with the given members, lived-in statistics and ``forward(self, *inputs)``, in eval mode."""
    made: nn.Module = type("Model", (nn.Module,), {"forward": forward})()
    for name, member in members.items():
        setattr(made, name, member)
    return randomise(made.double()).eval()


def graph_of(module: nn.Module, example_inputs: Any = None) -> reparam.rules.Graph:
    """The graph of a module as the rules see it, before any rewrite."""
    captured = capture.capture(module, None if example_inputs is None else as_call(example_inputs))
    assert captured.traced, captured.remarks
    modules = dict(captured.root.named_modules())
    aliasing.make_out_of_place(captured.graph, modules)
    views.settle(captured.graph.nodes, modules)
    return reparam.rules.Graph(captured.graph, modules)


def rewritten(
    module: nn.Module, rules: Sequence[reparam.rules.Rule] | None = None, example_inputs: Any = None
) -> tuple[str, str]:
    """The graph as text before and after rewriting with ``rules``, every rewrite certified."""
    graph = graph_of(module, example_inputs)
    before = str(graph)
    driver.rewrite(graph, passes.default() if rules is None else rules)
    return before, str(graph)


def reasons(compiled: nn.Module) -> list[str]:
    """Why matches were refused."""
    return [remark.message for remark in compiled.report.missed]


def largest_error(expected: Any, actual: Any) -> float:
    """Largest difference relative to the largest magnitude (at least 1); inf when structure, shape or type differ."""
    a, structure = torch.utils._pytree.tree_flatten(expected)
    b, other = torch.utils._pytree.tree_flatten(actual)
    if structure != other or any((x.shape, x.dtype) != (y.shape, y.dtype) for x, y in zip(a, b, strict=True)):
        return math.inf
    errors = [((x - y).abs().max() / max(1.0, x.abs().max())).item() for x, y in zip(a, b, strict=True) if x.numel()]
    return max(errors, default=0.0)


def run(module: nn.Module, *inputs: Tensor) -> Any:
    """The output in eval mode, on copies of the inputs."""
    with torch.no_grad():
        return module(*(x.clone() for x in inputs))


def assert_same(module: nn.Module, compiled: nn.Module, *inputs: Tensor) -> None:
    """Both compute the same, in float64."""
    assert largest_error(run(module, *inputs), run(compiled, *inputs)) <= TOLERANCE


def assert_same_or_told(module: nn.Module, compiled: nn.Module, *inputs: Tensor) -> None:
    """As :func:`assert_same`; what was compiled on a made-up input may ask for its rank and its channels."""
    try:
        run(compiled, *inputs)
    except ConditionError:
        (made_up,) = (remark.message for remark in compiled.report.remarks if remark.rule == "Example")
        shapes = [tuple(map(int, shape.split("x"))) for shape in re.findall(r"\d+(?:x\d+)*$", made_up)]
        assert shapes, made_up
        assert not {(len(s), s[1:2]) for s in shapes} & {(x.dim(), tuple(x.shape[1:2])) for x in inputs}
        return
    assert_same(module, compiled, *inputs)


def assert_left(module: nn.Module, rules: Sequence[reparam.rules.Rule], why: Sequence[str], *inputs: Tensor) -> None:
    """The rules change nothing, the whole compiler gives these reasons, and its result computes the same."""
    before, after = rewritten(module, rules)
    assert before == after
    compiled = reparam.compile(module)
    assert reasons(compiled) == list(why)
    assert_same(module, compiled, *inputs)


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers in float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Modules that a compiler has to leave alone.


class DataDependent(nn.Module):
    """Cannot be traced: asks for a number. Optionally changes its input in place."""

    def __init__(self, in_place: bool = False) -> None:
        super().__init__()
        self.in_place = in_place

    def forward(self, x: Tensor) -> Tensor:
        factor = 2.0 if float(x.detach().sum()) > 0 else 0.5
        return x.mul_(factor) if self.in_place else x * factor


class Block(nn.Module):
    """A module of one's own around a layer, with a residual."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.gamma = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gamma * self.inner(x)


class ChannelsLast(nn.Module):
    """Brings the channels to the end, and back."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.movedim(1, -1)).movedim(-1, 1)


class Attention(nn.Module):
    """Softmax attention (Vaswani et al. 2017), with its scale in any of the places where networks have it.

    Args:
        channels: Features of a token.
        heads: How many heads.
        size: Features of a query, a key and a value.
        separated: How queries, keys and values are told apart: a key of :data:`SEPARATIONS`.
        scaled: What is scaled: ``queries``, ``keys``, ``scores`` or ``values``.
        factor: The scale.
    """

    def __init__(self, channels: int, heads: int, size: int, separated: str, scaled: str, factor: float) -> None:
        super().__init__()
        self.heads, self.size, self.factor = heads, size, factor
        self.separated, self.scaled = separated, scaled
        self.project = nn.Linear(channels, 3 * heads * size)

    def forward(self, x: Tensor) -> Tensor:
        batch, count, _ = x.shape
        query, key, value = SEPARATIONS[self.separated](self.project(x), batch, count, self.heads, self.size)
        query = query * self.factor if self.scaled == "queries" else query
        key = key / self.factor if self.scaled == "keys" else key
        scores = query @ key.transpose(-2, -1)
        scores = scores.mul(self.factor) if self.scaled == "scores" else scores
        mixed = scores.softmax(-1) @ value
        mixed = self.factor * mixed if self.scaled == "values" else mixed
        return mixed.transpose(1, 2).reshape(batch, count, -1)


def _heads(x: Tensor, batch: int, count: int, heads: int, size: int) -> Tensor:
    return x.reshape(batch, count, heads, size).transpose(1, 2)


def _by_unbind(x: Tensor, batch: int, count: int, heads: int, size: int) -> Any:
    return x.reshape(batch, count, 3, heads, size).permute(2, 0, 3, 1, 4).unbind(0)


def _by_numbers(x: Tensor, batch: int, count: int, heads: int, size: int) -> Any:
    x = x.reshape(batch, count, 3, heads, size).permute(2, 0, 3, 1, 4)
    return x[0], x[1], x[-1]


def _by_chunk(x: Tensor, batch: int, count: int, heads: int, size: int) -> Any:
    query, key, value = x.chunk(3, dim=-1)
    return [_heads(part, batch, count, heads, size) for part in (query, key, value)]


def _by_slices(x: Tensor, batch: int, count: int, heads: int, size: int) -> Any:
    step = heads * size
    parts = x[..., :step], x[:, :, step : 2 * step], x[..., -step:]
    return [_heads(part, batch, count, heads, size) for part in parts]


def _by_split(x: Tensor, batch: int, count: int, heads: int, size: int) -> Any:
    query, key, value = x.view(batch, count, heads, -1).split([size, size, size], dim=3)
    return query.permute(0, 2, 1, 3), key.permute(0, 2, 1, 3), value.permute(0, 2, 1, 3)


def _by_even_split(x: Tensor, batch: int, count: int, heads: int, size: int) -> Any:
    return torch.split(x.unflatten(-1, (heads, 3 * size)).transpose(1, 2), size, -1)


# Queries, keys and values of shape (batch, heads, count, size) from their projection.
SEPARATIONS: dict[str, Callable[[Tensor, int, int, int, int], Any]] = {
    "unbind": _by_unbind,
    "numbers": _by_numbers,
    "chunk": _by_chunk,
    "slices": _by_slices,
    "split": _by_split,
    "even split": _by_even_split,
}


def one_and_a_half(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    """A forward hook that changes the output."""
    return output * 1.5


# Programs.


@dataclass(frozen=True)
class Step:
    """One operation.

    Attributes:
        kind: A key of :data:`LAYERS` or :data:`FUNCTIONS`.
        reads: Indices of the values that it reads: the inputs first, then the output of every step.
        options: What the operation takes.
    """

    kind: str
    reads: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)


def _conv(o: dict[str, Any]) -> nn.Module:
    options = {k: v for k, v in o.items() if k in ("stride", "padding", "dilation", "groups", "bias", "padding_mode")}
    return CONV[len(o["kernel"])](o["channels"], o["out"], o["kernel"], **options)


def _transposed(o: dict[str, Any]) -> nn.Module:
    options = {k: o[k] for k in ("stride", "padding", "output_padding", "dilation", "groups", "bias")}
    return TRANSPOSED[len(o["kernel"])](o["channels"], o["out"], o["kernel"], **options)


def _conv_norm(o: dict[str, Any]) -> nn.Module:
    return nn.Sequential(_conv(o), NORM[len(o["kernel"])](o["out"]))


def _hooked(o: dict[str, Any]) -> nn.Module:
    layer = nn.BatchNorm1d(o["channels"]) if o["dimensions"] == 0 else NORM[o["dimensions"]](o["channels"])
    layer.register_forward_hook(one_and_a_half)
    return layer


def _norm(o: dict[str, Any]) -> nn.Module:
    return NORM[max(1, o["dimensions"])](o["channels"], affine=o.get("affine", True))


LAYERS: dict[str, Callable[[dict[str, Any]], nn.Module]] = {
    "conv": _conv,
    "conv_norm": _conv_norm,
    "transposed": _transposed,
    "conv_function": _conv,
    "norm": _norm,
    "norm_function": _norm,
    "norm_conv": lambda o: nn.Sequential(NORM[len(o["kernel"])](o["channels"]), _conv(o)),
    "block": lambda o: Block(_conv_norm(o)),
    "branches": lambda o: nn.ModuleList(LAYERS[kind](options) for kind, options in o["branches"]),
    "identity": lambda o: nn.Identity(),
    "dropout": lambda o: nn.Dropout(0.5, inplace=o.get("in_place", False)),
    "relu": lambda o: nn.ReLU(inplace=o.get("in_place", False)),
    "hardswish": lambda o: nn.Hardswish(inplace=o.get("in_place", False)),
    "linear": lambda o: nn.Linear(o["channels"], o["out"], o.get("bias", True)),
    "average_pool": lambda o: POOL[len(o["kernel"])](
        o["kernel"], o["stride"], o["padding"], count_include_pad=o["include"]
    ),
    "max_pool_layer": lambda o: MAX_POOL_LAYER[o["dimensions"]](3, 1, 1),
    "adaptive_layer": lambda o: ADAPTIVE[o["how"]][o["dimensions"]](o["size"]),
    "flatten_layer": lambda o: nn.Flatten(o["start"]),
    "upsample": lambda o: nn.Upsample(scale_factor=2, mode="nearest"),
    "pad_layer": lambda o: nn.ConstantPad2d(o["amounts"], o["value"]),
    "nested": lambda o: nn.Sequential(_conv_norm(o), nn.Sequential(nn.Dropout(), NORM[len(o["kernel"])](o["out"]))),
    "channels_last": lambda o: ChannelsLast(nn.Linear(o["channels"], o["out"], o["bias"])),
    "attention": lambda o: Attention(**o),
    "opaque": lambda o: DataDependent(o.get("in_place", False)),
    "hooked": _hooked,
}  # fmt: skip


def add_up(how: str, terms: Sequence[Tensor]) -> Tensor:
    match how:
        case "sum":
            return sum(terms)
        case "stack":
            return torch.stack(list(terms)).sum(0)
        case "mean":
            return torch.stack(list(terms), 1).mean(dim=1)
    total = terms[0]
    for term in terms[1:]:
        match how:
            case "add":
                total = total + term
            case "right":
                total = term + total
            case "sub":
                total = total - term
            case "alpha":
                total = torch.add(total, term, alpha=0.3)
            case "sub_alpha":
                total = torch.sub(term, total, alpha=2)
            case "in_place":
                total += term
            case "method":
                total = total.add_(term)
            case "scaled":
                total = 0.5 * (total + 3 * term)
            case _:
                raise AssertionError(how)
    return total


SUMS = ("sum", "stack", "mean", "add", "right", "sub", "alpha", "sub_alpha", "in_place", "method", "scaled")

SCALARS: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "mul": lambda x, c: x * c,
    "rmul": lambda x, c: c * x,
    "add": lambda x, c: x + c,
    "sub": lambda x, c: x - c,
    "rsub": lambda x, c: c - x,
    "div": lambda x, c: x / c,
    "mul_": lambda x, c: x.mul_(c),
    "method": lambda x, c: x.mul(c),
    "torch": lambda x, c: torch.sub(x, c),
}


def two_parts(o: dict[str, Any], _: Any, x: Tensor) -> Tensor:
    """Two parts of a value along an axis, one of them scaled, put together again in some order."""
    axis = o["axis"]
    parts: Any
    match o["how"]:
        case "chunk":
            parts = x.chunk(2, axis)
        case "split":
            parts = x.split([1, o["size"] - 1], dim=axis)
        case "unbind":
            parts = [part.unsqueeze(axis) for part in (x.unbind(axis)[0], x.unbind(axis)[1])]
        case "slices":
            parts = x[:, :1], x[:, 1:]
        case "overlapping":
            parts = x[:, :2], x[:, 1:]
        case "numbers":
            parts = x[:, 0:1], x[:, -1].unsqueeze(1)
    first, second = parts[0], parts[1]
    if o["scaled"] == 0:
        first = first * o["number"]
    else:
        second = second.mul(o["number"])
    return torch.cat([second, first] if o["swapped"] else [first, second], axis)


FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "sum": lambda o, p, *xs: add_up(o["how"], xs),
    "product": lambda o, p, x, y: x * y,
    "gate": lambda o, p, x: x * torch.sigmoid(x.mean(o["axes"], keepdim=True)),
    "number": lambda o, p, x: SCALARS[o["how"]](x, o["number"]),
    "constant": lambda o, p, x: SCALARS[o["how"]](x, p),
    "neg": lambda o, p, x: -x,
    "over_size": lambda o, p, x: x / x.shape[-1],
    "concat": lambda o, p, *xs: torch.cat(xs, 1),
    "half": lambda o, p, x: x[:, : o["channels"]],
    "chunk": lambda o, p, x: x.chunk(2, 1)[0],
    "two_parts": two_parts,
    "relu_function": lambda o, p, x: F.relu(x, inplace=o.get("in_place", False)),
    "relu_method": lambda o, p, x: x.relu_() if o.get("in_place", False) else x.relu(),
    "pad": lambda o, p, x: F.pad(x, o["amounts"], o["mode"], *([o["value"]] if o["mode"] == "constant" else [])),
    "max_pool": lambda o, p, x: MAX_POOL[o["dimensions"]](x, 3, stride=1, padding=1),
    "flatten": lambda o, p, x: x.flatten(2),
    "view": lambda o, p, x: x.view(x.size(0), x.size(1), -1),
    "pool_flatten": lambda o, p, x: x.mean(o["axes"]),
    "transpose": lambda o, p, x: x.transpose(1, -1),
    "permute": lambda o, p, x: x.permute(o["order"]),
    "tokens": lambda o, p, x: x.flatten(2).transpose(1, 2),
    "reduce": lambda o, p, x: getattr(x, o["how"])(o["axes"], keepdim=o["keep"]),
    "adaptive": lambda o, p, x: ADAPTIVE_FUNCTION[o["how"]][o["dimensions"]](x, o["size"]),
    "interpolate": lambda o, p, x: F.interpolate(x, scale_factor=2, mode=o["mode"]),
    "pooled_flatten": lambda o, p, x: ADAPTIVE_FUNCTION[o["how"]][o["dimensions"]](x, o["size"]).flatten(1),
    "and_back": lambda o, p, x: x.flatten(o["start"]).reshape(x.shape),
    "like": lambda o, p, x: x.flatten(1).view_as(x),
    "sizes": lambda o, p, x: x.reshape(x.shape[0], x.shape[1], -1),
    "channels_known": lambda o, p, x: x.reshape(-1, o["channels"], *([1] * o["more"])),
    "shuffle": lambda o, p, x: x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2),
    "split_and_back": lambda o, p, x: x.unflatten(1, (-1, 1)).flatten(1, 2),
    "added_axis": lambda o, p, x: x.unsqueeze(o["axis"]),
    "squeeze": lambda o, p, x: x.squeeze(o["axis"]),
    "crop": lambda o, p, x: x[..., 1:-1],
    "some": lambda o, p, x: x[:, :, :2],
    "first": lambda o, p, x: x[:, :, 0],
    "beside": lambda o, p, *xs: torch.cat(xs, o["axis"]),
    "detach": lambda o, p, x: x.detach(),
    "clone": lambda o, p, x: x.clone(),
}  # fmt: skip


class Network(nn.Module):
    """Runs a program.

    Args:
        channels: Channels of the input.
        steps: The program.
        outputs: Indices of the values that are returned.
        structure: ``tensor`` (the first of them), ``tuple``, ``list`` or ``dict``.
    """

    def __init__(
        self,
        channels: int,
        steps: Sequence[Step] = (),
        outputs: Sequence[int] = (-1,),
        structure: str = "tensor",
    ) -> None:
        super().__init__()
        self.channels = channels
        self.steps: list[Step] = []
        self.layers = nn.ModuleDict()
        self.constants = nn.ParameterDict()
        self.outputs = tuple(outputs)
        self.structure = structure
        for step in steps:
            self.append(step)

    def append(self, step: Step) -> None:
        """Add a step, and what it owns."""
        name = str(len(self.steps))
        with torch.random.fork_rng():
            torch.manual_seed(len(self.steps))
            if step.kind in LAYERS:
                self.layers[name] = randomise(LAYERS[step.kind](step.options).double(), len(self.steps))
            elif step.kind == "constant":
                self.constants[name] = nn.Parameter(torch.rand(step.options["shape"], dtype=torch.float64) + 0.5)
        self.steps.append(step)
        self.eval()

    def pop(self) -> None:
        """Take the last step back."""
        self.steps.pop()
        for owner in (self.layers, self.constants):
            if str(len(self.steps)) in owner:
                del owner[str(len(self.steps))]

    def execute(self, index: int, values: Sequence[Tensor]) -> Tensor:
        """The output of a step."""
        step = self.steps[index]
        xs = [values[i] for i in step.reads]
        if step.kind == "again":
            return self.layers[str(step.options["layer"])](*xs)
        if step.kind not in LAYERS:
            constant = self.constants[str(index)] if step.kind == "constant" else None
            return FUNCTIONS[step.kind](step.options, constant, *xs)
        layer = self.layers[str(index)]
        match step.kind:
            case "conv_function":
                geometry = (layer.stride, layer.padding, layer.dilation, layer.groups)
                return F_CONV[layer.weight.dim() - 2](*xs, layer.weight, layer.bias, *geometry)
            case "norm_function":
                return F.batch_norm(
                    *xs, layer.running_mean, layer.running_var, layer.weight, layer.bias, False, 0.1, layer.eps
                )
            case "branches":
                return add_up(step.options["how"], [branch(*xs) for branch in layer])
        return layer(*xs)

    def forward(self, x: Tensor) -> Any:
        return self._run([x])

    def _run(self, values: list[Tensor]) -> Any:
        for index in range(len(self.steps)):
            values.append(self.execute(index, values))
        outputs = [values[i] for i in self.outputs]
        match self.structure:
            case "tensor":
                return outputs[0]
            case "list":
                return outputs
            case "dict":
                return {f"out{i}": value for i, value in enumerate(outputs)}
        return tuple(outputs)

    def __repr__(self) -> str:
        steps = "".join(f"\n    {step!r}," for step in self.steps)
        return f"{type(self).__name__}({self.channels}, [{steps}\n], {self.outputs}, {self.structure!r})"


class TwoInputs(Network):
    """A program over two inputs, which are values 0 and 1."""

    def forward(self, x: Tensor, y: Tensor) -> Any:  # type: ignore[override]
        return self._run([x, y])


# Drawing them.

# Steps whose layer is not simply called.
NOT_SHARED = ("branches", "conv_function", "norm_function")

kernels = st.integers(1, 3)


@st.composite
def conv_options(draw: st.DrawFn, dimensions: int, channels: int, *, keep: bool | None = None) -> dict[str, Any]:
    """Geometry of a convolution on ``channels`` channels; ``keep`` asks for one that keeps the shape."""
    keep = draw(st.booleans()) if keep is None else keep
    axes = range(dimensions)
    out = channels if keep else draw(st.sampled_from((channels, 2 * channels, 2, 3)))
    kernel = tuple(draw(st.sampled_from((1, 3))) if keep else draw(kernels) for _ in axes)
    dilation = tuple(draw(st.sampled_from((1, 1, 2))) for _ in axes)
    options: dict[str, Any] = {
        "channels": channels,
        "out": out,
        "kernel": kernel,
        "dilation": dilation,
        "groups": draw(st.sampled_from(divisors(math.gcd(channels, out)))),
        "bias": draw(st.booleans()),
    }
    if keep:
        options["padding"] = tuple(d * (k - 1) // 2 for d, k in zip(dilation, kernel, strict=True))
    else:
        options["stride"] = tuple(draw(st.sampled_from((1, 1, 2))) for _ in axes)
        options["padding"] = tuple(draw(st.integers(0, 2)) for _ in axes)
        if draw(st.booleans()) and set(options["stride"]) == {1}:
            options["padding"] = "same"
    if draw(st.integers(0, 5)) == 0:
        options["padding_mode"] = draw(st.sampled_from(("reflect", "replicate", "circular")))
    return options


@st.composite
def transposed_options(draw: st.DrawFn, dimensions: int, channels: int) -> dict[str, Any]:
    """Geometry of a transposed convolution, often one that doubles the size."""
    out = draw(st.sampled_from((channels, channels, 2, 3)))
    options: dict[str, Any] = {
        "channels": channels,
        "out": out,
        "groups": draw(st.sampled_from(divisors(math.gcd(channels, out)))),
        "bias": draw(st.booleans()),
    }
    doubling = [(2, 2, 0, 0, 1), (4, 2, 1, 0, 1), (3, 2, 1, 1, 1)]
    others = [(3, 1, 1, 0, 1), (1, 1, 0, 0, 1), (3, 1, 2, 0, 2), (2, 1, 1, 1, 2), (2, 3, 0, 2, 1), (3, 2, 0, 0, 1)]
    axes = [draw(st.sampled_from(doubling) | st.sampled_from(others))] * dimensions
    names = ("kernel", "stride", "padding", "output_padding", "dilation")
    return options | dict(zip(names, map(tuple, zip(*axes, strict=True)), strict=True))


@st.composite
def branch_options(draw: st.DrawFn, dimensions: int, channels: int) -> dict[str, Any]:
    """Parallel branches that keep the shape, as reparameterised networks train them."""
    conv = conv_options(dimensions, channels, keep=True)
    kinds = st.one_of(
        st.tuples(st.sampled_from(("conv", "conv_norm", "norm_conv")), conv),
        st.just(("norm", {"dimensions": dimensions, "channels": channels})),
        st.just(("identity", {})),
    )
    return {"branches": draw(st.lists(kinds, min_size=2, max_size=4)), "how": draw(st.sampled_from(SUMS[:8]))}


@st.composite
def steps(draw: st.DrawFn, shapes: Sequence[Sequence[torch.Size]], owners: Sequence[int]) -> Step:
    """A step that reads some of the values whose shapes (one for each input size) are given."""
    reads = draw(st.integers(max(0, len(shapes) - 3), len(shapes) - 1) | st.integers(0, len(shapes) - 1))
    shape = shapes[reads][0]
    dimensions, channels = len(shape) - 2, shape[1]
    in_place = {"in_place": draw(st.booleans())}
    alike = [i for i, other in enumerate(shapes) if other == shapes[reads]]
    choices = [
        "sum",
        "sum",
        "number",
        "constant",
        "activation",
        "activation",
        "norm",
        "neg",
        "nothing",
        "opaque",
        "over_size",
    ]
    choices += ["again", "again"] * bool(owners)
    choices += ["concat", "part", "two_parts", "product", "broadcast", "broadcast", "reduce", "beside"]
    choices += ["view", "view", "view"]
    if dimensions >= 1:
        choices += ["conv", "conv", "conv", "conv_norm", "branches", "branches", "block", "pool", "pad", "gate", "head"]
        choices += ["norm_conv", "reshape", "transposed", "transposed"]
        choices += ["pool", "channels_last", "nested", "resize"]
    if dimensions <= 1 or all(s[-1] == shape[-1] for s in shapes[reads]):
        choices += ["linear"] * 3 + ["attention"] * 2 * (len(shape) == 3)
    match draw(st.sampled_from(choices)):
        case "sum":
            terms = draw(st.lists(st.sampled_from(alike), min_size=1, max_size=3))
            return Step("sum", (reads, *terms), {"how": draw(st.sampled_from(SUMS))})
        case "product":
            return Step("product", (reads, draw(st.sampled_from(alike))))
        case "number":
            how = draw(st.sampled_from(list(SCALARS)))
            return Step("number", (reads,), {"how": how, "number": draw(st.sampled_from((2, 0.5, -1.0, 1, 1.0, 0.3)))})
        case "constant":
            per_channel = (channels, *[1] * dimensions)
            last = (shape[-1],) if all(s[-1] == shape[-1] for s in shapes[reads]) else ()
            form = draw(st.sampled_from([(), (1,), per_channel, (1, *per_channel), last, (1,) * len(shape)]))
            how = draw(st.sampled_from(["mul", "rmul", "add", "sub", "rsub", "div", "mul_", "method"]))
            return Step("constant", (reads,), {"how": how, "shape": form})
        case "activation":
            kinds = ("relu", "hardswish", "relu_function", "relu_method")
            return Step(draw(st.sampled_from(kinds)), (reads,), in_place)
        case "norm":
            kind = draw(st.sampled_from(("norm", "norm", "norm_function", "hooked")))
            return Step(kind, (reads,), {"dimensions": dimensions, "channels": channels})
        case "nothing":
            kind = draw(st.sampled_from(("identity", "dropout", "detach", "clone")))
            return Step(kind, (reads,), in_place if kind == "dropout" else {})
        case "opaque":
            return Step("opaque", (reads,), in_place)
        case "again":
            return Step("again", (reads,), {"layer": draw(st.sampled_from(owners))})
        case "concat":
            around = [_around(size) for size in shapes[reads]]
            fitting = [i for i, sizes in enumerate(shapes) if [_around(size) for size in sizes] == around]
            return Step("concat", (reads, draw(st.sampled_from(fitting))))
        case "two_parts":
            how = draw(st.sampled_from(("chunk", "split", "unbind", "slices", "overlapping", "numbers")))
            axis = draw(st.integers(1, len(shape) - 1)) if how in ("chunk", "split", "unbind") else 1
            return Step("two_parts", (reads,), {
                "how": how,
                "axis": axis,
                "size": shape[axis],
                "scaled": draw(st.integers(0, 1)),
                "number": draw(st.sampled_from((2, -0.5))),
                "swapped": draw(st.booleans()),
            })  # fmt: skip
        case "part":
            return Step(draw(st.sampled_from(("half", "chunk"))), (reads,), {"channels": (channels + 1) // 2})
        case "conv":
            kind = draw(st.sampled_from(("conv", "conv", "conv_function")))
            options = draw(conv_options(dimensions, channels))
            if kind == "conv_function":
                options.pop("padding_mode", None)
            return Step(kind, (reads,), options)
        case "transposed":
            if math.prod(shape[2:]) > 300:
                return Step("max_pool", (reads,), {"dimensions": dimensions})
            return Step("transposed", (reads,), draw(transposed_options(dimensions, channels)))
        case "conv_norm" | "norm_conv" as kind:
            return Step(kind, (reads,), draw(conv_options(dimensions, channels)))
        case "block":
            return Step("block", (reads,), draw(conv_options(dimensions, channels, keep=True)))
        case "branches":
            return Step("branches", (reads,), draw(branch_options(dimensions, channels)))
        case "channels_last":
            options = {"channels": channels, "out": draw(st.integers(1, 4)), "bias": draw(st.booleans())}
            return Step("channels_last", (reads,), options)
        case "nested":
            return Step("nested", (reads,), draw(conv_options(dimensions, channels)))
        case "resize":
            if math.prod(shape[2:]) > 100 or draw(st.booleans()):
                size = draw(st.sampled_from((1, 1, 2)))
                options = {"how": draw(st.sampled_from(("mean", "max"))), "dimensions": dimensions, "size": size}
                return Step(draw(st.sampled_from(("adaptive_layer", "adaptive", "pooled_flatten"))), (reads,), options)
            if draw(st.booleans()):
                return Step("upsample", (reads,))
            modes = ("nearest", "linear" if dimensions == 1 else "bilinear")
            return Step("interpolate", (reads,), {"mode": draw(st.sampled_from(modes))})
        case "reduce":
            axes = draw(st.lists(st.integers(0, len(shape) - 1), min_size=1, max_size=2, unique=True))
            how = draw(st.sampled_from(("mean", "mean", "amax", "amin")))
            return Step("reduce", (reads,), {"how": how, "axes": axes, "keep": draw(st.booleans())})
        case "broadcast":
            fitting = [i for i, sizes in enumerate(shapes) if _broadcasts(sizes, shapes[reads])]
            terms = draw(st.permutations([reads, draw(st.sampled_from(fitting))]))
            return Step("sum", tuple(terms), {"how": draw(st.sampled_from(("sum", "add", "sub", "alpha", "scaled")))})
        case "beside":
            axis = draw(st.integers(-len(shape), len(shape) - 1))
            fitting = [i for i, sizes in enumerate(shapes) if _fit_beside(sizes, shapes[reads], axis)]
            others = draw(st.lists(st.sampled_from(fitting), max_size=2))
            return Step("beside", (reads, *others), {"axis": axis})
        case "view":
            return draw(views_of(reads, shape))
        case "pool":
            if draw(st.integers(0, 5)) == 0:
                return Step("max_pool_layer", (reads,), {"dimensions": draw(st.sampled_from((dimensions, 2)))})
            if draw(st.booleans()):
                return Step("max_pool", (reads,), {"dimensions": dimensions})
            kernel = draw(st.sampled_from((2, 3)))
            return Step("average_pool", (reads,), {
                "kernel": (kernel,) * dimensions,
                "stride": draw(st.sampled_from((1, 2))),
                "padding": draw(st.sampled_from((0, 1))),
                "include": draw(st.booleans()),
            })  # fmt: skip
        case "pad":
            amounts = [draw(st.integers(-1, 2)) for _ in range(2 * dimensions)]
            mode = draw(st.sampled_from(("constant", "constant", "reflect", "replicate", "circular")))
            value = draw(st.sampled_from((0.0, 0.0, 1.5)))
            return Step("pad", (reads,), {"amounts": amounts, "mode": mode, "value": value})
        case "neg" | "over_size" as kind:
            return Step(kind, (reads,))
        case "gate":
            return Step("gate", (reads,), {"axes": tuple(range(2, len(shape)))})
        case "head":
            return Step("pool_flatten", (reads,), {"axes": tuple(range(2, len(shape)))})
        case "reshape":
            return Step(draw(st.sampled_from(("flatten", "view", "transpose"))), (reads,))
        case "linear":
            options = {"channels": shape[-1], "out": draw(st.integers(1, 4)), "bias": draw(st.booleans())}
            return Step("linear", (reads,), options)
        case "attention":
            return Step("attention", (reads,), {
                "channels": shape[-1],
                "heads": draw(st.integers(1, 2)),
                "size": draw(st.integers(1, 3)),
                "separated": draw(st.sampled_from(list(SEPARATIONS))),
                "scaled": draw(st.sampled_from(("queries", "keys", "scores", "values"))),
                "factor": draw(st.sampled_from((0.5, -2.0))),
            })  # fmt: skip
    raise AssertionError


@st.composite
def views_of(draw: st.DrawFn, reads: int, shape: torch.Size) -> Step:
    """A view, a permutation or a slice of a value."""
    rank, channels = len(shape), shape[1]
    axis = draw(st.integers(1, rank - 1))
    simple = [
        "and_back",
        "like",
        "sizes",
        "shuffle",
        "split_and_back",
        "crop",
        "flatten_layer",
        "permute",
    ]
    # Three spatial axes are the most that layers have.
    simple += ["added_axis"] * (rank < 5)
    simple += ["squeeze", "channels_known"] + ["tokens", "some", "first"] * (rank > 2)
    kind = draw(st.sampled_from(simple))
    options: dict[str, dict[str, Any]] = {
        "and_back": {"start": axis},
        "flatten_layer": {"start": axis},
        "permute": {"order": (0, *draw(st.permutations(range(1, rank))))},
        "added_axis": {"axis": draw(st.sampled_from((1, 2, -1)))},
        "squeeze": {"axis": axis},
        "channels_known": {"channels": channels, "more": draw(st.integers(0, 2))},
    }
    return Step(kind, (reads,), options.get(kind, {}))


def _broadcasts(sizes: Sequence[torch.Size], others: Sequence[torch.Size]) -> bool:
    """Whether shapes broadcast to others."""
    try:
        return [torch.broadcast_shapes(a, b) for a, b in zip(sizes, others, strict=True)] == list(others)
    except RuntimeError:
        return False


def _fit_beside(sizes: Sequence[torch.Size], others: Sequence[torch.Size], axis: int) -> bool:
    """Whether values of these shapes can be concatenated along an axis."""
    if any(len(a) != len(b) for a, b in zip(sizes, others, strict=True)):
        return False
    axis %= len(others[0])
    return all(a[i] == b[i] for a, b in zip(sizes, others, strict=True) for i in range(len(a)) if i != axis)


def _around(shape: torch.Size) -> tuple[int, ...]:
    """A shape without its channels."""
    return (shape[0], *shape[2:])


def inputs_for(channels: int, dimensions: int) -> list[Tensor]:
    """Two batches of different sizes."""
    return [normal(2, channels, *(7, 8)[:dimensions], seed=1), normal(3, channels, *(9, 7)[:dimensions], seed=2)]


@st.composite
def networks(draw: st.DrawFn, length: int = 9) -> tuple[Network, list[tuple[Tensor, ...]]]:
    """A network and inputs of two sizes for it, a second input of which may be broadcast."""
    dimensions = draw(st.integers(1, 2))
    kind = draw(st.sampled_from((Network, Network, TwoInputs)))
    network = kind(draw(st.sampled_from((1, 2, 4))))
    firsts = inputs_for(network.channels, dimensions)
    inputs = [(x,) if kind is Network else (x, 1 - x.flip(0)) for x in firsts]
    if kind is TwoInputs and draw(st.booleans()):
        inputs[1] = (firsts[1], inputs[1][1][:1])
    runs = [[x.clone() for x in values] for values in inputs]
    for _ in range(draw(st.integers(1, length))):
        owners = [i for i, step in enumerate(network.steps) if step.kind in LAYERS and step.kind not in NOT_SHARED]
        shapes = [[values[i].shape for values in runs] for i in range(len(runs[0]))]
        step = draw(steps(shapes, owners))
        network.append(step)
        try:
            with torch.no_grad():
                # A step that does not fit (a kernel larger than its input, say) may have changed values in place.
                results = [network.execute(len(network.steps) - 1, copy.deepcopy(values)) for values in runs]
                ok = all(r.numel() and r.abs().max() < 1e4 and r.dim() >= 2 for r in results)
        except (RuntimeError, ValueError, IndexError):
            ok = False
        if not ok:
            network.pop()
            continue
        with torch.no_grad():
            for values in runs:
                values.append(network.execute(len(network.steps) - 1, values))
    last = len(runs[0]) - 1
    others = draw(st.lists(st.integers(0, last), max_size=2))
    network.outputs = (last, *others)
    network.structure = draw(st.sampled_from(("tensor", "tuple", "list", "dict")))
    return network, inputs


# Single layers and sums, for the tests of single rules.


def image(channels: int, dimensions: int, batch: int = 2) -> Tensor:
    """An input that is large enough for every drawn layer; features for dimension 0."""
    return normal(batch, channels, *(11, 10, 9)[:dimensions])


@st.composite
def layers(
    draw: st.DrawFn,
    dimensions: int,
    in_channels: int,
    out_channels: int | None = None,
    *,
    modes: Sequence[str] = ("zeros",),
) -> nn.Module:
    """Convolutions of any geometry that torch's layers have, even kernels too; nn.Linear for dimension 0."""
    if out_channels is None:
        out_channels = draw(st.sampled_from((1, 2, 3, 2 * in_channels, 3 * in_channels)))
    bias = draw(st.booleans())
    if dimensions == 0:
        return nn.Linear(in_channels, out_channels, bias)
    axes = range(dimensions)
    stride = tuple(draw(st.integers(1, 3)) for _ in axes)
    padding = tuple(draw(st.integers(0, 2)) for _ in axes)
    same = set(stride) == {1} and draw(st.booleans())
    return CONV[dimensions](
        in_channels,
        out_channels,
        tuple(draw(st.integers(1, 4)) for _ in axes),
        stride,
        "same" if same else padding,
        tuple(draw(st.integers(1, 2)) for _ in axes),
        draw(st.sampled_from(divisors(math.gcd(in_channels, out_channels)))),
        bias,
        draw(st.sampled_from(modes)),
    )


class Constant(nn.Module):
    """``scale * x + shift``, written as a model would write it."""

    def __init__(self, scale: Tensor, shift: Tensor | None) -> None:
        super().__init__()
        self.scale = nn.Parameter(scale)
        self.shift = None if shift is None else nn.Parameter(shift)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale if self.shift is None else self.shift + x * self.scale


class Functional(nn.Module):
    """A convolution as torch's functions, padded asymmetrically by ``F.pad``."""

    def __init__(self, conv: Conv) -> None:
        super().__init__()
        self.conv = conv
        # A grouped matrix product is written as a dense one.
        dense = conv.regroup(1) if conv.dimensions == 0 else conv
        self.weight = nn.Parameter(dense.double().weight.clone())
        self.bias = None if conv.bias is None else nn.Parameter(conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        conv = self.conv
        if conv.dimensions == 0:
            return F.linear(x, self.weight, self.bias)
        if any(amount for pair in conv.padding for amount in pair):
            flat = [amount for pair in reversed(conv.padding) for amount in pair]
            x = F.pad(x, flat, mode="constant" if conv.padding_mode == "zeros" else conv.padding_mode)
        convolve = F_CONV[conv.dimensions]
        return convolve(x, self.weight, self.bias, conv.stride, 0, conv.dilation, conv.groups)


def as_module(operator: Operator) -> nn.Module:
    """An operator of the algebra as torch code."""
    match operator:
        case Conv():
            return Functional(operator)
        case ChannelAffine(is_identity=True):
            return nn.Identity()
        case ChannelAffine():
            shape = [-1] + [1] * (0 if operator.axis is None else -operator.axis - 1)
            return Constant(operator.scale.view(shape), None if operator.shift is None else operator.shift.view(shape))
        case AveragePool(divisor=None) | AveragePool(dimensions=1):
            return POOL[operator.dimensions](operator.kernel_size, operator.stride, operator.padding)
        case AveragePool():
            pool = POOL[operator.dimensions]
            return pool(operator.kernel_size, operator.stride, operator.padding, divisor_override=operator.divisor)
    raise AssertionError(operator)


Plan: TypeAlias = "int | tuple[str, list[Plan]]"


class Tree(nn.Module):
    """A nested sum over branches that read the input, and over further inputs.

    Attributes:
        plan: The index of a branch (past the branches, of a further input), or how to combine several plans.
    """

    def __init__(self, branches: Sequence[nn.Module], plan: Plan) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.plan = plan

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self._run(self.plan, x, y)

    def _run(self, plan: Plan, x: Tensor, y: Tensor) -> Tensor:
        if isinstance(plan, int):
            # A branch is out of place, but the sum over it may not be.
            return self.branches[plan](x) if plan < len(self.branches) else torch.relu(y)
        how, children = plan
        values = [self._run(child, x, y) for child in children]
        if how == "neg":
            return -values[0]
        if how == "twice":
            return values[0] + values[0]
        return add_up(how, values)


@st.composite
def plans(draw: st.DrawFn, leaves: Sequence[int]) -> Plan:
    """A tree over all leaves, each read once."""
    hows = st.sampled_from([how for how in SUMS if how not in ("in_place", "method")])
    around = st.sampled_from((None, None, "neg", "twice"))

    def wrapped(plan: Plan) -> Plan:
        how = draw(around)
        return plan if how is None else (how, [plan])

    nodes: list[Plan] = [wrapped(leaf) for leaf in leaves]
    while len(nodes) > 1:
        take = draw(st.integers(2, len(nodes)))
        nodes = [wrapped((draw(hows), nodes[:take])), *nodes[take:]]
        nodes = draw(st.permutations(nodes))
    return nodes[0]

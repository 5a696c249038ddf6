"""``reparam.compile`` as its users know it: arguments, errors, reports, names, and what it leaves alone."""

from __future__ import annotations

import collections
import copy
import io
import json
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import reparam
from reparam.compare import compare
from reparam.errors import CaptureError, ConditionError, ReparamError, VerificationError
from support import count_calls, randomise


class Block(nn.Module):
    """RepVGG's block (Ding et al. 2021): a 3x3, a 1x1 and an identity, each with a norm."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.large = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels))
        self.small = nn.Sequential(nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels))
        self.identity = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.large(x) + self.small(x) + self.identity(x)


class Network(nn.Module):
    """A stem named as ResNet names it, two blocks, and a head with an opaque gate and a norm that has to stay."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(4)
        self.stages = nn.Sequential(Block(4), nn.ReLU(inplace=True), Block(4))
        self.late = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(self.bn1(self.conv1(x)).relu()).relu()
        return self.head(self.late(x).relu().mean((2, 3)))


@pytest.fixture
def model() -> Network:
    return randomise(Network()).double()  # type: ignore[return-value]


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 17, 14, dtype=torch.float64)


def agree(a: nn.Module, b: nn.Module, x: Tensor) -> None:
    a = copy.deepcopy(a).eval()
    with torch.no_grad():
        compare(a(x), b(x), 1e-9)


# What it returns.


def test_names_are_the_longest_common_paths(model: Network, x: Tensor) -> None:
    result = reparam.compile(model, x)
    layers = {path: type(m) for path, m in result.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    expected = dict.fromkeys(["conv1", "stages.0", "stages.2"], nn.Conv2d) | {"head": nn.Linear}
    assert layers == expected
    agree(model, result, x)
    assert set(result.state_dict()) >= {f"{path}.{name}" for path in expected for name in ("weight", "bias")}


def test_a_path_that_is_still_busy_is_not_taken() -> None:
    class Busy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.gate = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.conv(x)).relu()
            return y * self.gate(y.mean((2, 3))).sigmoid()[:, :, None, None]

    network = nn.Sequential(Busy(), Busy())
    randomise(network).double()
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    result = reparam.compile(network, x)
    layers = {path for path, m in result.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    assert layers == {"0.conv", "0.gate", "1.conv", "1.gate"}
    agree(network, result, x)


@pytest.mark.parametrize("name", ["graph", "code", "report", "meta", "recompile", "print_readable", "add_module_"])
def test_layers_whose_names_a_graph_module_needs(name: str) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            setattr(self, name, nn.Conv2d(3, 3, 3))
            self.norm, self.other = nn.BatchNorm2d(3), nn.PReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self._modules[name](x))

    class Unfused(Named):
        def forward(self, x: Tensor) -> Tensor:
            return self._modules[name](x).relu()

    for network in (Named(), Unfused()):
        randomise(network).double()
        x = torch.randn(2, 3, 7, 8, dtype=torch.float64)
        result = reparam.compile(network, x)
        agree(network, result, x)
        assert isinstance(result.report, reparam.Report)
        assert result.report.after.norms == 0


def test_in_place_layers_are_in_place_again(model: Network) -> None:
    result = reparam.compile(model)
    assert [m.inplace for m in result.modules() if isinstance(m, nn.ReLU)] == [True]


def test_weights_are_frozen_unless_they_are_to_be_trained(model: Network, x: Tensor) -> None:
    assert not any(parameter.requires_grad for parameter in reparam.compile(model).parameters())
    result = reparam.compile(model, trainable=True)
    result(x).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in result.parameters())


def test_compilation_is_deterministic(model: Network, x: Tensor) -> None:
    a, b = reparam.compile(model, x), reparam.compile(model, x)
    assert a.report == b.report
    assert list(a.state_dict()) == list(b.state_dict())
    assert all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_no_random_numbers_are_drawn(model: Network, x: Tensor) -> None:
    before = torch.get_rng_state()
    reparam.compile(model, x)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_compiled_model_compiles_to_itself(model: Network, x: Tensor) -> None:
    once = reparam.compile(model, x)
    twice = reparam.compile(once, x)
    assert twice.report.before == twice.report.after == once.report.after
    assert not twice.report.fused
    assert list(twice.state_dict()) == list(once.state_dict())
    assert torch.equal(once(x), twice(x))


def _pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def _saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, _pickled, _saved])
def test_copies_keep_output_report_and_state(how: Callable[[nn.Module], nn.Module], model: Network, x: Tensor) -> None:
    result = reparam.compile(model, x)
    twin = how(result)
    assert torch.equal(twin(x), result(x))
    assert twin.report == result.report
    assert set(twin.state_dict()) == set(result.state_dict())
    assert not any(module.training for module in twin.modules())
    assert not any(parameter.requires_grad for parameter in twin.parameters())
    assert torch.equal(how(twin)(x), result(x))


def test_a_model_that_cannot_be_traced_is_copied_too(x: Tensor) -> None:
    untraceable = reparam.compile(Untraceable().double(), x)
    twin = copy.deepcopy(untraceable)
    assert twin.report == untraceable.report
    assert torch.equal(twin(x), untraceable(x))


# What it leaves alone.


def test_the_argument_is_untouched(model: Network, x: Tensor) -> None:
    model.train()
    model.stages[0].eval()
    model.head.weight.requires_grad_(False)
    calls: list[str] = []
    model.conv1.register_forward_hook(lambda *_: calls.append("hook"))

    def fingerprint() -> list[Any]:
        tensors = [
            (name, id(t), t.data_ptr(), t.requires_grad, t.grad, t._version, t.tolist())
            for name, t in [*model.named_parameters(), *model.named_buffers()]
        ]
        attributes = [(set(m.__dict__), m.training, len(m._forward_hooks)) for m in model.modules()]
        return [*tensors, *attributes, type(model)]

    before = fingerprint()
    result = reparam.compile(model, x)
    reparam.explain(model)
    assert fingerprint() == before
    assert result.report.after.norms == 2


class Untraceable(nn.Module):
    """Holds tensors in every way that a module can, and looks at its input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.plain = torch.ones(4, 1, 1)
        self.listed = [self.conv.bias]
        self.table = {"scale": torch.ones(4, 1, 1), "nested": (self.conv.bias, [self.conv.bias])}

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > -1e12:
            x = self.conv(x) * self.plain * self.table["scale"] + self.listed[0].view(-1, 1, 1)
        return x + self.table["nested"][1][0].view(-1, 1, 1)


@pytest.mark.parametrize("make", [Network, Untraceable, lambda: nn.Sequential(nn.Conv2d(3, 4, 1), Untraceable())])
def test_no_memory_is_shared_with_the_argument(make: Callable[[], nn.Module], x: Tensor) -> None:
    network = make().double()
    if isinstance(network, nn.Sequential):
        network[0] = nn.Conv2d(3, 3, 1).double()
    result = reparam.compile(network, x)
    expected = result(x)
    reference = copy.deepcopy(network).eval()(x)
    with torch.no_grad():
        for module in network.modules():
            for tensor in [*module.parameters(False), *module.buffers(False)]:
                tensor.add_(1)
            if isinstance(module, Untraceable):
                module.plain.mul_(3)
                module.table["scale"].mul_(3)
    assert torch.equal(result(x), expected)
    fresh = copy.deepcopy(network)
    with torch.no_grad():
        for tensor in [*result.parameters(), *result.buffers()]:
            tensor.mul_(0)
    assert all(torch.equal(p, q) for p, q in zip(network.parameters(), fresh.parameters(), strict=True))
    compare(reference, expected, 1e-9)


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
def test_wrappers_are_seen_through(wrap: Callable[[nn.Module], nn.Module], model: Network, x: Tensor) -> None:
    result = reparam.compile(wrap(model))
    assert "conv1" in dict(result.named_modules())
    agree(model, result, x)


def test_a_model_compiled_in_place_and_a_scripted_part(model: Network, x: Tensor) -> None:
    model.stages.compile(backend="eager")
    result = reparam.compile(model)
    assert result.report.after.norms == 1
    scripted = nn.Sequential(torch.jit.script(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())), Network()).double()
    assert reparam.compile(scripted, x).report.after.norms == 1
    agree(scripted, reparam.compile(scripted), x)


# Its arguments.


@pytest.mark.parametrize("inputs", [lambda x: x, lambda x: (x,), lambda x: [x], lambda x: {"x": x}])
def test_example_inputs_may_be_a_tensor_a_tuple_or_a_dict(
    inputs: Callable[[Tensor], Any], model: Network, x: Tensor
) -> None:
    report = reparam.compile(model, inputs(x)).report
    assert report.comparison is not None
    assert report.comparison.largest_error < 1e-12


@pytest.mark.parametrize(
    "inputs",
    [torch.randn(2, 4, 8, 8).double(), (torch.randn(1), torch.randn(1)), {"y": torch.randn(1)}, "x", ()],
    ids=["channels", "too many", "unknown name", "no tensor", "none"],
)
def test_wrong_example_inputs_are_an_error(inputs: Any, model: Network) -> None:
    with pytest.raises(ReparamError, match="the model does not run on the example inputs: "):
        reparam.compile(model, inputs)


@pytest.mark.parametrize("thing", [None, {}, "model.pth", nn.Module, lambda x: x])
def test_what_is_no_module_is_an_error(thing: Any) -> None:
    with pytest.raises(ReparamError, match=r"compile takes an nn\.Module, not .*; load a checkpoint"):
        reparam.compile(thing)


@pytest.mark.parametrize("optimize", ["speed", "", None, 3])
def test_an_unknown_goal_is_an_error(optimize: Any, model: Network) -> None:
    with pytest.raises(ReparamError, match=r"optimize=.* is not known; use 'size'"):
        reparam.compile(model, optimize=optimize)


@pytest.mark.parametrize("passes", [["NormAfterLinear"], [reparam.passes.RemoveNoOp], [None]])
def test_passes_that_are_no_rules_are_an_error(passes: Any, model: Network) -> None:
    with pytest.raises(ReparamError, match=r"passes must be instances of reparam\.rules\.Rule, not "):
        reparam.compile(model, passes=passes)


def test_passes_are_all_that_is_applied(model: Network, x: Tensor) -> None:
    assert not reparam.compile(model, passes=[]).report.fused
    only = reparam.compile(model, passes=[reparam.passes.Compose("NormAfterLinear")]).report
    assert {remark.rule for remark in only.fused} == {"NormAfterLinear"}
    assert only.after.convolutions == only.before.convolutions == 5


def test_lazy_modules_without_values_are_an_error() -> None:
    with pytest.raises(CaptureError, match=r"LazyConv2d\.weight has no values yet; run the model once"):
        reparam.compile(nn.Sequential(nn.LazyConv2d(4, 3)))


def test_what_cannot_be_copied_is_an_error() -> None:
    class Stuck(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.generator = (i for i in range(3))

    with pytest.raises(CaptureError, match="Stuck cannot be copied"):
        reparam.compile(Stuck())


def test_progress_is_told(model: Network) -> None:
    steps: list[tuple[int, int, str]] = []
    reparam.compile(model, progress=lambda *step: steps.append(step))
    assert steps
    assert all(0 < done <= total and isinstance(label, str) for done, total, label in steps)
    assert [done for done, _, _ in steps] == sorted(done for done, _, _ in steps)


@pytest.mark.parametrize("verify", [True, False])
def test_verification_can_be_left_out(verify: bool, model: Network, x: Tensor) -> None:
    result = reparam.compile(model, x, verify=verify)
    agree(model, result, x)
    assert (result.report.certificates > 0) is verify
    assert (result.report.comparison is not None) is verify


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_branches_that_cancel_leave_rounding_and_no_complaint(dtype: torch.dtype) -> None:
    class Cancels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
            with torch.no_grad():
                self.c.weight.copy_(self.a.weight + self.b.weight)
                self.c.bias.copy_(self.a.bias + self.b.bias)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x) - self.c(x)

    model, x = Cancels().to(dtype).eval(), torch.randn(2, 3, 9, 9, dtype=dtype)
    compiled = reparam.compile(model, x)
    assert compiled.report.after.kernels == 1
    assert compiled(x).abs().max() < 1e-5


# Models that are a single thing.


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Conv2d(3, 4, 3), lambda: nn.BatchNorm2d(3), nn.Identity, nn.Sequential, nn.Dropout, nn.ReLU,
        lambda: nn.ZeroPad2d(1), lambda: nn.Linear(14, 3), lambda: nn.AvgPool2d(2),
    ],
)  # fmt: skip
@pytest.mark.parametrize("example", [True, False])
def test_roots_that_are_layers(make: Callable[[], nn.Module], example: bool, x: Tensor) -> None:
    network = randomise(make()).double()
    if isinstance(network, nn.Linear) and not example:
        x = x.flatten(0, 2)  # the input that is made up for it has two axes
    agree(network, reparam.compile(network, x if example else None), x)


def test_numbers_that_are_equal_on_paper_may_change_places() -> None:
    """Which of two equal numbers is the larger one is up to rounding."""

    class Choosing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.norm(self.conv(x.float().double()))  # whatever is changed in the last places of x is gone
            return torch.stack([y.sum(1), y.flip(1).sum(1)]).argmax(0).double(), y

    model = randomise(Choosing()).double().eval()
    x = torch.rand(2, 3, 24, 24, dtype=torch.float64)
    report = reparam.compile(model, x).report
    assert any("rounds so much" in remark.message for remark in report.remarks)


def test_a_model_without_parameters_computes_in_the_precision_of_its_input() -> None:
    class Normalised(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            mean, std = torch.as_tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], dtype=x.dtype)
            return (x - mean[:, None, None]) / std[:, None, None]

    model, x = Normalised(), torch.rand(2, 3, 8, 8, dtype=torch.float64)
    result = reparam.compile(model, x)
    assert result.report.after.kernels == 1
    compare(model(x), result(x), 1e-12)


def test_recurrent_and_attention_layers_are_left_alone() -> None:
    sequence = torch.randn(5, 2, 4)
    for network, args in ((nn.LSTM(4, 3), (sequence,)), (nn.MultiheadAttention(4, 2), (sequence,) * 3)):
        compare(network.eval()(*args), reparam.compile(network, args)(*args))


# The report.


def test_counts_and_multiply_adds_by_hand(model: Network, x: Tensor) -> None:
    report = reparam.compile(model, x).report
    before, after = report.before, report.after
    assert (before.convolutions, before.linears, before.norms) == (5, 1, 8)
    assert (after.convolutions, after.linears, after.norms) == (3, 1, 1)
    assert (before.elementwise, after.elementwise) == (4, 0)
    # Two images; a stem of 9 x 7 positions, and two blocks on them.
    positions = 2 * 9 * 7
    stem, head = positions * 4 * 3 * 9, 2 * 4 * 5
    assert before.multiply_adds == stem + 2 * positions * (4 * 4 * 9 + 4 * 4) + head
    assert after.multiply_adds == stem + 2 * positions * (4 * 4 * 9) + head
    assert before.parameters == sum(p.numel() for p in model.parameters())
    # A bias for every convolution that took a norm in; the late norm has a weight and a bias.
    assert after.parameters == 4 * 3 * 9 + 4 + 2 * (4 * 4 * 9 + 4) + 8 + 25


def test_kernels_are_what_torch_launches(model: Network, x: Tensor) -> None:
    result = reparam.compile(model, x)
    for network, counts in ((copy.deepcopy(model).eval(), result.report.before), (result, result.report.after)):
        calls = count_calls(network, x)
        assert calls["convolution"] == counts.convolutions
        assert calls["norm"] == counts.norms
        assert calls["linear"] == counts.linears
        assert calls["elementwise"] == counts.elementwise
        assert calls["kernels"] == counts.kernels


def test_every_norm_that_stays_has_a_remark(model: Network) -> None:
    report = reparam.compile(model).report
    assert [remark.where for remark in report.missed] == ["late"]
    assert {remark.kind for remark in report.fused} == {"fused"}
    assert len(report.fused) == report.certificates
    assert 0 < report.largest_certificate_error < 1e-12


def test_the_report_is_json_and_text(model: Network, x: Tensor) -> None:
    report = reparam.compile(model, x).report
    assert json.loads(json.dumps(report.to_dict()))["after"]["convolutions"] == 3
    assert "convolutions                5 ->              3" in str(report)
    assert "late" in str(report)


def test_explain_says_what_compile_would_do(model: Network, x: Tensor) -> None:
    dry, done = reparam.explain(model, x), reparam.compile(model, x).report
    assert (dry.before, dry.after, dry.remarks) == (done.before, done.after, done.remarks)


def test_tied_parameters_count_once() -> None:
    network = nn.Sequential(collections.OrderedDict(a=nn.Linear(3, 3), act=nn.ReLU(), b=nn.Linear(3, 3)))
    network.b.weight = network.a.weight
    report = reparam.compile(network).report
    assert report.before.parameters == report.after.parameters == 9 + 3 + 3


# What is still missing.


def test_a_norm_on_flattened_tokens_is_folded() -> None:
    class Tokens(nn.Module):
        """The linear layer of LeViT (Graham et al. 2021), whose norm sees tokens as a batch."""

        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(3, 4), nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.linear(x)
            return self.norm(x.flatten(0, 1)).reshape_as(x)

    network = randomise(Tokens()).double()
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    result = reparam.compile(network, x)
    agree(network, result, x)
    assert result.report.after.norms == 0


class Selects(nn.Module):
    """Returns the signs of inputs by the order of their scores, where rounding exchanges neighbours."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Sequential(nn.Conv2d(3, 1, 3, padding=1), nn.BatchNorm2d(1))

    def forward(self, x: Tensor) -> Tensor:
        best = self.score(x).flatten().topk(20000).indices
        return x[:, 0].sign().flatten()[best]


def test_what_another_thread_computes_is_no_constant():
    """Nobody sees it being made: the graph has other numbers than the model where the inputs have others."""

    class Threads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x):
            with ThreadPoolExecutor(2) as pool:
                return self.norm(self.conv(sum(pool.map(lambda k: x * k, [1, 2]))))

    for example in (None, torch.randn(2, 3, 8, 8)):
        with pytest.raises(VerificationError):
            reparam.compile(Threads().eval(), example)


@pytest.mark.parametrize("keep_python", [False, True])
def test_a_selection_that_rounding_changes_is_compared_in_double(keep_python: bool) -> None:
    torch.manual_seed(1)
    model, x = randomise(Selects()).eval(), torch.randn(1, 3, 256, 256)
    result: Any = reparam.compile(model, x, keep_python=keep_python)
    assert not torch.equal(result(x), model(x))  # or there is nothing to compare
    assert result.report.after.norms == 0
    assert (result.report.comparison.largest_error, result.report.comparison.tolerance) == (0.0, 1e-9)


def test_rounding_is_told_from_error_where_other_sizes_are_refused() -> None:
    """The part asks for a value, so the result is compared at another size, too, which it does not take."""

    class Checks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.isfinite().all() else x.nan_to_num()

    class AtOneSize(Selects):
        def __init__(self) -> None:
            super().__init__()
            self.checks = Checks()

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.checks(x)) * (1 if x.shape[3] < 300 else 2)

    torch.manual_seed(1)
    model, x = randomise(AtOneSize()).eval(), torch.randn(1, 3, 256, 256)
    result: Any = reparam.compile(model, x, sizes="example")
    assert not torch.equal(result(x), model(x))  # or there is nothing to compare
    assert result.report.after.norms == 0
    with pytest.raises(ConditionError):
        result(torch.randn(1, 3, 256, 512))


def test_a_selection_that_is_wrong_is_told_from_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    def finish(result: nn.Module, *args: Any) -> None:
        finished(result, *args)
        for parameter in result.parameters():
            if parameter.dtype == torch.float32:
                parameter += 1e-3

    finished = reparam.compiler._finish
    monkeypatch.setattr(reparam.compiler, "_finish", finish)
    torch.manual_seed(1)
    model, x = randomise(Selects()).eval(), torch.randn(1, 3, 256, 256)
    with pytest.raises(VerificationError):
        reparam.compile(model, x)

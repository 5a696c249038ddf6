"""Verification: whatever differs is found, and what agrees passes."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Node

import reparam
from reparam.algebra import Conv
from reparam.compare import compare
from reparam.errors import VerificationError


class Returns(nn.Module):
    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> Any:
        return self.value(x) if callable(self.value) else self.value


def test_agreement_is_measured() -> None:
    a, b = Returns(lambda x: (x, {"y": 2 * x})), Returns(lambda x: (x, {"y": 2 * x * (1 + 1e-6)}))
    comparison = reparam.verify(a, b, torch.ones(2, 3))
    assert comparison.outputs == 2
    assert comparison.tolerance == 1e-4
    assert comparison.largest_error == pytest.approx(1e-6, rel=0.1)
    assert str(comparison) == "largest relative error 9.5e-07 in 2 outputs (1e-04 allowed)"


def test_disagreement_raises_with_what_was_measured() -> None:
    with pytest.raises(VerificationError, match="the models disagree: largest relative error") as caught:
        reparam.verify(Returns(lambda x: x), Returns(lambda x: 1.01 * x), torch.ones(2))
    assert caught.value.comparison is not None
    assert caught.value.comparison.largest_error == pytest.approx(0.01, rel=1e-3)


def test_the_tolerance_is_the_callers() -> None:
    a, b = Returns(lambda x: x), Returns(lambda x: 1.01 * x)
    assert reparam.verify(a, b, torch.ones(2), tolerance=0.1).tolerance == 0.1
    with pytest.raises(VerificationError):
        reparam.verify(a, b, torch.ones(2), tolerance=0.001)
    with pytest.raises(VerificationError):
        reparam.verify(a, b, torch.ones(2), tolerance=0.0)
    assert reparam.verify(a, a, torch.ones(2), tolerance=0.0).largest_error == 0.0


def test_terms_that_cancel_leave_rounding() -> None:
    left, rounding, error = (torch.full((2,), 1e-9 + more, dtype=torch.float64) for more in (0.0, 1e-16, 1e-14))
    assert compare(left, rounding, scale=1.0).largest_error == 0.0
    for expected, actual, scale in [(left, rounding, 0.0), (left, rounding, 0.01), (left, error, 1.0)]:
        with pytest.raises(VerificationError):
            compare(expected, actual, scale=scale)


NAN, INF = float("nan"), float("inf")


@dataclasses.dataclass
class Output:
    x: Tensor
    name: str = ""


DIFFERENT = [
    (torch.ones(2), torch.ones(3)),
    (torch.ones(2), torch.ones(2, 1)),
    (torch.ones(2), torch.ones(2).double()),
    (torch.ones(2), [torch.ones(2)]),
    ((torch.ones(2),), (torch.ones(2), torch.ones(2))),
    ({"a": torch.ones(2)}, {"b": torch.ones(2)}),
    (torch.ones(2), None),
    (torch.ones(2), 1.0),
    ((torch.ones(2), 3), (torch.ones(2), 4)),
    ((torch.ones(2), 1), (torch.ones(2), True)),
    (torch.ones(2), torch.tensor([1.0, NAN])),
    (torch.tensor([1.0, NAN]), torch.ones(2)),
    (torch.tensor([1.0, NAN]), torch.tensor([1.0, INF])),
    (torch.tensor([1.0, INF]), torch.tensor([1.0, -INF])),
    (torch.tensor([NAN, 1.0]), torch.tensor([NAN, 2.0])),
    (torch.zeros(2), torch.tensor([0.0, 1e-30])),
    (torch.tensor([1, 2]), torch.tensor([1, 3])),
    (torch.tensor([True, False]), torch.tensor([True, True])),
    (torch.tensor([1 + 1j]), torch.tensor([1 + 2j])),
    (Output(torch.ones(2)), Output(torch.zeros(2))),
    (Output(torch.ones(2), "a"), Output(torch.ones(2), "b")),
]


@pytest.mark.parametrize(("a", "b"), DIFFERENT)
def test_every_difference_is_found(a: Any, b: Any) -> None:
    with pytest.raises(VerificationError):
        compare(a, b)
    compare(a, a)
    compare(b, b)


def test_structures_of_the_same_kind_are_equal() -> None:
    x = torch.ones(2)
    compare(OrderedDict(a=x), {"a": x})
    compare(torch.ones(0, 3), torch.ones(0, 3))
    assert compare([], []).outputs == 0


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-9), (torch.float32, 1e-4), (torch.float16, 5e-2), (torch.bfloat16, 2e-1),
     (torch.complex64, 1e-4), (torch.complex128, 1e-9)],
)  # fmt: skip
def test_the_tolerance_follows_the_precision(dtype: torch.dtype, tolerance: float) -> None:
    assert compare(torch.ones(2, dtype=dtype), torch.ones(2, dtype=dtype)).tolerance == tolerance


def test_modes_inputs_and_gradients_are_left_as_they_were() -> None:
    a, b = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(3).eval()), nn.Sequential(nn.Dropout(), nn.ReLU(inplace=True))
    b[1].eval()
    b.eval()
    x = torch.rand(2, 3)
    before = x.clone()
    reparam.verify(a, b, x, tolerance=1e-3)
    assert [m.training for m in a.modules()] == [True, True, False]
    assert [m.training for m in b.modules()] == [False, False, False]
    assert a[1].num_batches_tracked == 0
    assert torch.equal(x, before)
    failing = Returns(lambda x: x.no_such_thing()).train()
    with pytest.raises(AttributeError):
        reparam.verify(failing, failing, x)
    assert failing.training


@pytest.mark.parametrize("inputs", [torch.ones(2), (torch.ones(2),), [torch.ones(2)], {"x": torch.ones(2)}])
def test_inputs_as_people_write_them(inputs: Any) -> None:
    assert reparam.verify(nn.Identity(), nn.Identity(), inputs if not isinstance(inputs, dict) else (inputs["x"],))
    assert reparam.verify(Returns(lambda x: x), Returns(lambda x: x), inputs).outputs == 1


class Wrong(reparam.rules.Rule):
    """A rule that is wrong in a way of the test's choice."""

    def __init__(self, spoil: Any) -> None:
        self.spoil = spoil

    def rewrite(self, node: Node, graph: reparam.rules.Graph) -> Any:
        right = reparam.passes.Compose("NormAfterLinear").rewrite(node, graph)
        if not isinstance(right, reparam.rules.Rewrite):
            return right
        ((replaced, value),) = right.values
        spoiled = self.spoil(value.operator)
        return reparam.rules.Rewrite(((replaced, reparam.rules.Apply(spoiled, value.source, value.terms)),), "spoiled")


def _rounded(conv: Conv) -> Conv:
    return dataclasses.replace(conv, weight=conv.weight.to(torch.float32))


def _moved(conv: Conv) -> Conv:
    return dataclasses.replace(conv, padding=((2, 0), (1, 1)))


def _one_corner(conv: Conv) -> Conv:
    weight = conv.weight.clone()
    weight[0, 0, 0, 0] *= 1 + 1e-6
    return dataclasses.replace(conv, weight=weight)


def _larger(conv: Conv) -> Conv:
    return dataclasses.replace(conv, padding=((2, 2), (2, 2)))


@pytest.mark.parametrize("spoil", [_rounded, _moved, _one_corner, _larger])
def test_a_wrong_rule_is_caught_by_its_certificate(spoil: Any) -> None:
    torch.manual_seed(0)  # one corner must not be nearly zero
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)).double()
    with torch.no_grad():
        # Numbers that float32 does not have.
        model[0].weight.normal_()
        model[1].running_var.uniform_(0.5, 2)
    with pytest.raises(VerificationError, match=r"Wrong at 1 would change .* this is a defect of the rule"):
        reparam.compile(model, passes=[Wrong(spoil)])
    assert reparam.compile(model, passes=[Wrong(lambda conv: conv)]).report.certificates == 1

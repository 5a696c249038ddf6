"""Whole random networks, compiled: the same function, no more kernels, and nothing else touched.

What they found is kept below by name, as the programs that Hypothesis shrank it to.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import (
    TOLERANCE,
    Network,
    Step,
    assert_same,
    assert_same_or_told,
    inputs_for,
    largest_error,
    networks,
    run,
)
from torch import Tensor, nn

import reparam
from reparam.report import Counts

# ``REPARAM_FUZZ=5000 pytest tests/reparam/test_random_networks.py`` (or ``make fuzz``) is a long run.
NETWORKS = int(os.environ.get("REPARAM_FUZZ", "200"))

warnings.filterwarnings("ignore", message="Using padding='same' with even kernel lengths")


def snapshot(module: nn.Module) -> dict[str, object]:
    """Everything about a module that compiling it must not change."""
    state: dict[str, object] = {f"tensor {name}": tensor.clone() for name, tensor in module.state_dict().items()}
    state |= {f"memory {name}": tensor.data_ptr() for name, tensor in module.state_dict().items()}
    state |= {f"grad {name}": parameter.requires_grad for name, parameter in module.named_parameters()}
    for name, child in module.named_modules():
        hooks = tuple(child._forward_hooks.values())
        state[f"module {name}"] = (id(child), type(child), child.training, hooks, getattr(child, "inplace", None))
        state[f"attributes {name}"] = tuple(child.__dict__)
    return state


def same_snapshot(a: dict[str, object], b: dict[str, object]) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in zip(a.values(), b.values(), strict=True)
    )


def kernels(counts: Counts) -> tuple[int, ...]:
    return (counts.convolutions, counts.linears, counts.norms, counts.elementwise, counts.kernels, counts.parameters)


def check(
    network: nn.Module,
    inputs: Sequence[Tensor | tuple[Tensor, ...]],
    with_example: bool = False,
    training: bool = False,
) -> None:
    """Compile a network and compare everything that can be compared."""
    calls = [x if isinstance(x, tuple) else (x,) for x in inputs]
    example = calls[0] if with_example else None
    same = assert_same if with_example else assert_same_or_told
    network.train(training)
    before = snapshot(network)
    compiled = reparam.compile(network, example, verify=False)
    assert same_snapshot(before, snapshot(network)), "the argument was changed"
    network.eval()
    for x in calls:
        same(network, compiled, *x)
    report = compiled.report
    assert report.after.kernels <= report.before.kernels
    # A norm and an average pool may have become one convolution.
    assert report.after.convolutions + report.after.norms <= report.before.convolutions + report.before.norms
    assert not compiled.training
    assert not any(parameter.requires_grad for parameter in compiled.parameters())

    certified = reparam.compile(network, example)
    assert certified.report.certificates == len(certified.report.fused)
    for x in calls:
        same(network, certified, *x)
    # A rewrite through operations whose shapes nothing shows cannot be certified, and is not made then.
    if with_example or len(certified.report.fused) == len(report.fused):
        a, b = compiled.state_dict(), certified.state_dict()
        assert list(a) == list(b)
        assert all(torch.equal(a[name], b[name]) for name in a), "two compilations differ"

    again = reparam.compile(compiled, example, verify=False)
    assert kernels(again.report.after) == kernels(report.after)
    for x in calls:
        if not with_example and not (_takes(compiled, *x) and _takes(again, *x)):
            continue
        error = largest_error(run(compiled, *x), run(again, *x))
        assert error <= (TOLERANCE if again.report.fused else 0.0), "compiling twice changes numbers"


def _takes(compiled: nn.Module, *inputs: Tensor) -> bool:
    try:
        run(compiled, *inputs)
    except reparam.errors.ConditionError:
        return False
    return True


@settings(max_examples=NETWORKS)
@given(networks(), st.booleans(), st.booleans())
def test_random_network(drawn: tuple[Network, list[tuple[Tensor, ...]]], with_example: bool, training: bool) -> None:
    network, inputs = drawn
    check(network, inputs, with_example, training)


def test_a_network_prints_as_a_test():
    network = Network(2, [Step("relu", (0,), {"in_place": True}), Step("sum", (0, 1), {"how": "add"})], (2, 1), "dict")
    twin = eval(repr(network), {"Network": Network, "Step": Step})
    assert repr(twin) == repr(network)
    x = inputs_for(2, 2)[0]
    assert largest_error(run(network, x), run(twin, x)) == 0.0


def test_check_notices_a_wrong_result(monkeypatch):
    """The check itself can fail."""
    network = Network(2, [Step("norm", (0,), {"dimensions": 2, "channels": 2})])
    right = reparam.compile

    def wrong(*args, **kwargs):
        compiled = right(*args, **kwargs)
        with torch.no_grad():
            next(compiled.parameters()).mul_(1 + 1e-6)
        return compiled

    monkeypatch.setattr(reparam, "compile", wrong)
    with pytest.raises(AssertionError):
        check(network, inputs_for(2, 2))


# What random networks found.

NORM2 = {"dimensions": 2, "channels": 2}
REGRESSIONS: dict[str, tuple[int, Network]] = {
    # A layer whose output nobody reads kept its input's memory from being understood, until it was gone.
    "unused layer on a view of what is changed": (2, Network(1, [
        Step("and_back", (0,), {"start": 1}),
        Step("relu", (0,), {"in_place": True}),
        Step("sum", (0, 0), {"how": "sum"}),
        Step("relu", (1,), {"in_place": False}),
        Step("relu", (3,), {"in_place": False}),
    ], (5,))),
    # The certificate of a norm of a single channel, which is the same everywhere, ran it on three.
    "norm of a single channel": (2, Network(1, [
        Step("opaque", (0,)),
        Step("norm_function", (1,), {"dimensions": 2, "channels": 1}),
        Step("number", (2,), {"how": "mul", "number": 0.3}),
    ])),
    # The second of two writes to one name went to the value before the first.
    "two writes to one value": (2, Network(1, [
        Step("over_size", (0,)),
        Step("hardswish", (1,), {"in_place": True}),
        Step("again", (1,), {"layer": 1}),
        Step("neg", (1,)),
    ])),
    "three writes to one value": (1, Network(2, [
        Step("neg", (0,)),
        Step("relu_method", (1,), {"in_place": True}),
        Step("number", (1,), {"how": "mul_", "number": 0.5}),
        Step("sum", (1, 0), {"how": "in_place"}),
        Step("neg", (1,)),
    ])),
    # What a tensor method returns was taken for no tensor, and arithmetic on it with a size for a size.
    "method's result over a size": (1, Network(1, [
        Step("conv", (0,), {"channels": 1, "out": 1, "kernel": (1,), "bias": True}),
        Step("branches", (1,), {"branches": [("identity", {}), ("identity", {})], "how": "mean"}),
        Step("over_size", (2,)),
        Step("over_size", (3,)),
        Step("neg", (4,)),
        Step("number", (5,), {"how": "mul", "number": 0.3}),
    ])),
    # The certificate of a padding of unknown rank padded three axes as if they were four.
    "reflection by nothing": (1, Network(4, [
        Step("relu", (0,)),
        Step("pad", (1,), {"amounts": [0, 0], "mode": "reflect", "value": 0.0}),
    ])),
    # A reader that nobody reads froze the memory of a slice, until the second compilation.
    "unused reader of memory that is written to": (1, Network(1, [
        Step("some", (0,)),
        Step("relu_function", (1,), {"in_place": True}),
        Step("constant", (0,), {"how": "sub", "shape": (1,)}),
        Step("sum", (1, 1), {"how": "scaled"}),
    ])),
    # Merged branches did not call back the norm behind the view that reads them.
    "norm behind a view of branches": (2, Network(1, [
        Step("branches", (0,), {"how": "stack", "branches": [
            ("identity", {}),
            ("identity", {}),
            ("norm_conv", {"channels": 1, "out": 1, "kernel": (3, 3), "padding": (1, 1), "padding_mode": "reflect"}),
        ]}),
        Step("interpolate", (1,), {"mode": "nearest"}),
        Step("norm_conv", (2,), {"channels": 1, "out": 3, "kernel": (3, 1), "padding": (2, 1)}),
    ])),
    # A convolution by function did not say that its input is no image of bytes, which a division makes floats.
    "a division beside a convolution by function": (2, Network(1, [
        Step("number", (0,), {"how": "div", "number": 1}),
        Step("relu", (1,)),
        Step("conv_function", (0,), {"channels": 1, "out": 1, "kernel": (1, 1), "bias": False}),
    ], (3, 2))),
    # The division was of the sum in the second compilation, and so no more the one that makes bytes floats.
    "a division of what was changed in place": (1, Network(1, [
        Step("sum", (0, 0), {"how": "in_place"}),
        Step("over_size", (0,)),
        Step("sum", (2, 0), {"how": "sum"}),
    ])),
    # The division was of what had been changed in place, and not of the input, which might be an image of bytes.
    "a division of a changed input": (1, Network(1, [
        Step("relu", (0,), {"in_place": True}),
        Step("over_size", (0,)),
        Step("sum", (2, 1), {"how": "sum"}),
    ], (3,))),
    # What the sum of a stack reads had changed, and only the stack was looked at again.
    "a factor that moves through a sum of a stack": (1, Network(1, [
        Step("number", (0,), {"how": "mul", "number": 2}),
        Step("sum", (1, 1), {"how": "stack"}),
        Step("number", (2,), {"how": "mul", "number": 2}),
    ])),
    # The other name of memory that is written to was a view of a view, back in the shape of the value itself.
    "a view that is undone of what is changed": (1, Network(1, [
        Step("like", (0,)),
        Step("relu", (0,), {"in_place": True}),
        Step("sum", (1, 0), {"how": "sum"}),
    ])),
}  # fmt: skip


@pytest.mark.parametrize("with_example", [False, True])
@pytest.mark.parametrize("name", REGRESSIONS)
def test_regression(name: str, with_example: bool) -> None:
    dimensions, network = REGRESSIONS[name]
    check(copy.deepcopy(network), inputs_for(network.channels, dimensions), with_example)

"""Random modules with Python in them, compiled: they compute what they computed, at other sizes, too."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import TOLERANCE, normal
from python_networks import FORWARDS, OUTPUTS, STATEMENTS, made, module_of, python_networks
from torch import Tensor, nn

import reparam
from reparam.errors import ConditionError

# ``REPARAM_FUZZ=5000 pytest tests/reparam/capture/test_random_python.py`` is a long run.
NETWORKS = int(os.environ.get("REPARAM_FUZZ", "100"))

# Batch, height and width; a model is compiled on the first.
SHAPES = ((2, 9, 12), (1, 8, 8), (1, 9, 12), (2, 8, 8), (3, 12, 9), (2, 11, 15))


def assert_alike(expected: Any, actual: Any) -> None:
    """Two outputs are of the same classes and hold the same numbers."""
    assert type(expected) is type(actual)
    if isinstance(expected, Tensor):
        assert expected.shape == actual.shape
        assert expected.dtype == actual.dtype
        assert torch.allclose(expected, actual, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True)
        return
    if isinstance(expected, (int, float, str, type(None))):
        assert expected == actual
        return
    items = [vars(value) if hasattr(value, "__dict__") else {} for value in (expected, actual)]
    for held, value in zip(items, (expected, actual), strict=True):
        held |= dict(value if isinstance(value, dict) else enumerate(value) if isinstance(value, (tuple, list)) else ())
    assert list(items[0]) == list(items[1])
    for key, item in items[0].items():
        assert_alike(item, items[1][key])


def outcome(model: nn.Module, x: Tensor) -> Any:
    """What a model returns; the exception where it takes no such input."""
    try:
        with torch.no_grad():
            return model(x.clone())
    except Exception as error:
        return error


def held(model: nn.Module) -> list[Any]:
    """What the modules of a model hold: which objects, and how much is in them."""
    return [
        (name, id(value), list(value) if isinstance(value, (dict, list)) else None)
        for module in model.modules()
        for name, value in module.__dict__.items()
    ]


def check(source: str, sizes: str = "any", with_example: bool = True, shapes: Sequence[Any] = SHAPES) -> None:
    """Compile a module and compare the results."""
    net = made(source)
    images = [normal(batch, 4, height, width, seed=seed) for seed, (batch, height, width) in enumerate(shapes)]
    if isinstance(outcome(copy.deepcopy(net), images[0]), Exception):
        return
    before, tensors = held(net), {key: value.clone() for key, value in net.state_dict().items()}
    compiled = reparam.compile(net, images[0].clone() if with_example else None, sizes=sizes)
    assert held(net) == before
    assert all(torch.equal(value, tensors[key]) for key, value in net.state_dict().items())
    reference, result = copy.deepcopy(net), copy.deepcopy(compiled)
    for x, shape in zip(images, shapes, strict=True):
        expected, actual = outcome(reference, x), outcome(result, x)
        is_elsewhere = sizes == "example" and (shape != shapes[0] or not with_example)
        if isinstance(expected, Exception) or (is_elsewhere and isinstance(actual, ConditionError)):
            # What it was to remember of this call is not the same in both.
            reference, result = copy.deepcopy(net), copy.deepcopy(compiled)
            continue
        if isinstance(actual, Exception):
            raise actual
        assert_alike(expected, actual)


MODES = [("any", True), ("any", False), ("example", True), ("example", False)]


@pytest.mark.parametrize("statement", STATEMENTS)
def test_a_statement(statement: str) -> None:
    check(module_of(statement), "example")
    check(module_of(statement, inside=True))


@pytest.mark.parametrize("takes", FORWARDS)
@pytest.mark.parametrize("returns", OUTPUTS)
def test_a_signature_and_an_output(takes: str, returns: str) -> None:
    check(module_of("relu", takes, returns))
    check(module_of("branch by value", takes, returns, inside=True), with_example=False)


@settings(max_examples=NETWORKS)
@given(python_networks(), st.sampled_from(MODES))
def test_random_modules(source: str, mode: tuple[str, bool]) -> None:
    check(source, *mode, shapes=SHAPES[:4])

"""What the model itself returns, for the result of compiling to be held against."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
import torch.export
import torch.fx
from torch import Tensor, nn

from reparam import capture as capturing
from reparam.compare import TOLERANCES, Call, LargestMagnitude, compare, relative_error, run, with_tensors
from reparam.errors import ConditionError, ReparamError, VerificationError
from reparam.graph import measure
from reparam.graph.evaluate import doubled
from reparam.graph.leaves import is_opaque
from reparam.modes import below
from reparam.report import Comparison, Remark

# How much farther than its own rounding a result may be from a model.
_ROUNDINGS = 4.0


class Reference:
    """What the model itself returns on the example inputs, for the result to be compared with."""

    def __init__(
        self, model: nn.Module, captured: capturing.Capture, given: bool, verify: bool, methods: Sequence[str] = ()
    ) -> None:
        self.remarks: list[Remark] = []
        self.model, self.call, self.given = model, captured.call, given
        self.method = methods[0] if methods else "forward"
        self.verify = verify and captured.call is not None
        self.in_double: Callable[[], nn.Module] | None = None
        self.expected = captured.output
        self.calls: list[tuple[Call, Any]] = [] if self.call is None else [(self.call, self.expected)]
        self.multiply_adds: int | None = None
        # A recorded graph of torch.nn layers writes to nothing: recording would have failed.
        self.writes = not captured.traced or any(is_opaque(node, captured.modules) for node in captured.graph.nodes)
        if self.call is None:
            return
        if captured.draws and self.verify:
            self.remarks.append(Remark("capture", "Verify", "", "it draws random numbers; not compared"))
            self.verify = False
        # A copy: others may be using the model meanwhile. That which was recorded has modules that recording made.
        model = capturing.private_copy(model) if self.verify or given else model
        if self.verify:
            # Other numbers: what a graph took for a constant of the model's, and came from an input, is not the same.
            # And other sizes, where there is Python that could have kept one in a place where nobody saw it.
            others = [_mirrored(self.call), *([capturing.larger(self.call)] if self.writes else [])]
            for call in others:
                with contextlib.suppress(Exception):  # it may not take these, which the user has not asked for
                    self.calls.append((call, self._run(model, call)))
        if given:
            with capturing.unchanged(model, writes=self.writes):
                self.multiply_adds = measure.multiply_adds_of(Frozen(self._called(model)), *self.call)

    def _called(self, model: nn.Module) -> nn.Module:
        """A model as what the compared method of it computes."""
        return model if self.method == "forward" else Method(model, self.method)

    def compare(self, compiled: nn.Module) -> Comparison | None:
        """Compare the result with the model; raises VerificationError when they disagree."""
        if self.call is None or not self.verify:
            return None
        outputs = [(self.expected, self._run(compiled, self.call))]
        taken = self.calls[:1]
        for call, expected in self.calls[1:]:
            with contextlib.suppress(ConditionError):  # which other numbers and sizes may not meet
                outputs.append((expected, self._run(compiled, call)))
                taken.append((call, expected))
        self.calls = taken
        try:
            return _worst(compare(expected, actual) for expected, actual in outputs)
        except VerificationError as error:
            if self._differs_from_run_to_run():
                self.remarks.append(Remark("capture", "Verify", "", "its outputs differ from run to run; not compared"))
                return None
            comparison = (
                self._compare_twins(compiled)
                or self._compare_in_double(compiled)
                or self._compare_beside_terms(outputs)
            )
            if comparison is None:
                raise
            says = "the model itself rounds so much that its outputs say little; compared with that in mind"
            self.remarks.append(Remark("capture", "Verify", "", f"{says} ({error})"))
            return comparison

    def _run(self, model: nn.Module, call: Call) -> Any:
        """What a model returns, which is left as it was."""
        with capturing.unchanged(model, writes=self.writes):
            return run(self._called(model), *call)

    def _differs_from_run_to_run(self) -> bool:
        """Whether the model does not agree with itself."""
        model = capturing.private_copy(self.model)
        try:
            for call, expected in self.calls:
                compare(expected, self._run(model, call))
        except VerificationError:
            return True
        return False

    def _compare_beside_terms(self, outputs: Sequence[tuple[Any, Any]]) -> Comparison | None:
        """The comparison where terms may cancel, so that little but rounding is left; None when there is an error."""
        model, comparisons = capturing.in_eval_mode(self.model), []
        for (call, _), (expected, actual) in zip(self.calls, outputs, strict=True):
            largest = LargestMagnitude()
            with below(largest):
                self._run(model, call)
            try:
                comparisons.append(compare(expected, actual, scale=largest.value))
            except VerificationError:
                return None
        return _worst(comparisons)

    def _compare_twins(self, compiled: nn.Module) -> Comparison | None:
        """The comparison in float64 throughout, None where there is none that agrees.

        Where a model selects by its values, rounding the weights may be enough for another selection. So the model is
        compiled again, in float64. What comes out must agree with it, and be the result but for rounding.
        """
        if self.in_double is None:
            return None
        try:
            twin = self.in_double()
            return self._compare_exactly(twin) if _is_rounded(compiled, twin) else None
        except (ReparamError, RuntimeError, TypeError, ValueError):
            return None

    def _compare_in_double(self, compiled: nn.Module) -> Comparison | None:
        """The comparison that tells rounding from error, None when there is an error.

        The result, whose weights were rounded, must agree with the model when both are run in float64.
        """
        tolerance = max(TOLERANCES.get(tensor.dtype, 0.0) for tensor in _tensors_of(self.expected))
        try:
            exact = None if tolerance == TOLERANCES[torch.float64] else tolerance
            return self._compare_exactly(capturing.private_copy(compiled).double(), exact)
        except (ReparamError, RuntimeError, TypeError, ValueError):
            return None

    def _compare_exactly(self, compiled: nn.Module, tolerance: float | None = None) -> Comparison:
        """The comparison of the model and what was compiled, with everything in float64.

        Where no weight was rounded and there is no tolerance for it, the result must be about as far from the model as
        the model is from itself, rounded otherwise: what picks the largest of numbers that are equal on paper picks
        others then, and what amplifies rounding amplifies that.
        """
        model = capturing.private_copy(self.model).double()
        calls = [_double(call) for call, _ in self.calls]
        outputs = [(self._run(model, call), self._run(compiled, call)) for call in calls]
        try:
            return _worst(compare(expected, actual, tolerance) for expected, actual in outputs)
        except VerificationError:
            if tolerance is not None:
                raise
            amplified = [self._amplified(call, expected) for call, (expected, _) in zip(calls, outputs, strict=True)]
            allowed = min(_ROUNDINGS * max(amplified), 1.0)
            return _worst(compare(expected, actual, allowed) for expected, actual in outputs)

    def _amplified(self, call: Call, expected: Any) -> float:
        """How far the model is from itself in float64 when its numbers and its inputs are changed by an ulp or two."""
        largest = 0.0
        for units in (1, -1, 2):
            nudge = partial(_nudged, units * torch.finfo(torch.float64).eps)
            model = capturing.private_copy(self.model).double()
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.data = nudge(tensor.data)
            nudged = with_tensors(call, nudge)
            largest = max(largest, compare(expected, self._run(model, nudged), math.inf).largest_error)
        return largest

    def multiply_adds_of(self, compiled: nn.Module) -> int | None:
        """Multiply-adds of the result on the example inputs, None without them."""
        if self.multiply_adds is None or self.call is None:
            return None
        with capturing.unchanged(compiled, writes=self.writes):
            return measure.multiply_adds_of(Frozen(self._called(compiled)), *self.call)


def _worst(comparisons: Iterable[Comparison]) -> Comparison:
    return max(comparisons, key=lambda comparison: comparison.largest_error)


def _mirrored(call: Call) -> Call:
    """A call with other numbers, of which each is as good as before: tensors are reversed along their last axes."""
    return with_tensors(call, lambda tensor: tensor.flip(-1) if tensor.dim() else tensor)  # type: ignore[no-any-return]


def _double(value: Any) -> Any:
    return with_tensors(value, doubled)


def _is_rounded(model: nn.Module, exact: nn.Module) -> bool:
    """Whether a model has the layers of another one, and its numbers, rounded."""
    ours, theirs = model.state_dict(), exact.state_dict()
    return list(ours) == list(theirs) and all(
        x.shape == theirs[name].shape and relative_error(theirs[name], x) <= (_eps(x) if x.is_floating_point() else 0.0)
        for name, x in ours.items()
    )


def _eps(x: Tensor) -> float:
    return torch.finfo(x.dtype).eps


def _tensors_of(value: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _nudged(by: float, x: Tensor) -> Tensor:
    """A tensor whose numbers are a little larger."""
    return x * (1 + by) if x.is_floating_point() else x


class Method(nn.Module):
    """A model whose forward is another of its methods."""

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__()
        self.model, self.name = model, name

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the method returns."""
        return getattr(self.model, self.name)(*args, **kwargs)


class Frozen(nn.Module):
    """A model run in eval mode and left as it was."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "model", model)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output."""
        return run(self.model, args, kwargs)  # type: ignore[arg-type]

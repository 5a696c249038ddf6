"""``optimize="latency"``: what counting cannot tell is timed, on this machine and with the example inputs.

Three kinds of choice are timed. Rewrites that might not pay: a kernel that computes more than what it replaces, two
operators in a row, kernels that read the same value (:class:`Measured`, which is the
:class:`reparam.algebra.cost.Cost` that rules ask). How the graph is run (:mod:`reparam.tuning.variants`). And, at the
end, the whole result against the whole graph that ``optimize="size"`` gives, which is returned unless the other is
faster beyond doubt.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from reparam.algebra import AnyConv, Conv, Operator
from reparam.algebra.cost import Choice, Cost
from reparam.compare import Call, clones, compare, run
from reparam.deploy.layers import layers as layers_of
from reparam.deploy.model import CompiledModel
from reparam.errors import ReparamError, VerificationError, first_line
from reparam.graph.graph import Graph
from reparam.graph.text import text
from reparam.report import Remark
from reparam.timing import Duel, duel
from reparam.tuning import variants
from reparam.tuning.decisions import Decision, Decisions
from reparam.tuning.variants import Variant

Run: TypeAlias = Callable[[], object]

# One kernel that takes so many times the multiply-adds of several is not worth a look at the clock.
_HOPELESS = 4.0


@dataclass
class Judge:
    """Decides between two things by what was decided before, or else by timing them.

    Attributes:
        decisions: What was decided before; new decisions are added.
        duel: Times two things.
        progress: Called with what is being timed.
    """

    decisions: Decisions
    duel: Callable[[Run, Run], Duel] = field(default=lambda first, second: duel(first, second))
    progress: Callable[[str], None] = field(default=lambda label: None)

    def decide(self, key: str, options: Mapping[str, Callable[[], Run]], label: str) -> Decision:
        """Which of two options to take.

        Args:
            key: Describes the choice, the same wherever it is the same.
            options: Two, by name: what makes something that can be run. The first is taken when both are as fast.
            label: What is being timed, for a progress bar.

        Raises:
            ReparamError: What was decided before is none of the options.
        """
        known = self.decisions.get(key)
        if known is None:
            self.progress(label)
            first, second = options
            outcome = self.duel(options[first](), options[second]())
            known = Decision(second if outcome.winner == 1 else first, {first: outcome.first, second: outcome.second})
            self.decisions.add(key, known)
        if known.pick not in options:
            raise ReparamError(f"the decision on {key!r} is {known.pick!r}, which is none of {', '.join(options)}")
        return known


def against(decision: Decision, pick: str, other: str) -> str:
    """The times of two options, for a remark: ``0.31 ms against 0.44 ms``."""
    if not {pick, other} <= decision.seconds.keys():
        return "as decided before"
    chosen, left = decision.seconds[pick], decision.seconds[other]
    return f"{_time(chosen)} against {_time(left)}{', about as fast' if chosen > left else ''}"


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-4 else f"{seconds * 1e6:.1f} µs"


# Rewrites.


@dataclass
class Measured(Cost):
    """Decides by timing, where it is in doubt.

    Beyond doubt is a kernel that computes no more than the parallel branches that it replaces, and one that computes
    four times as much as what it replaces. Candidates are timed as the layers that they would be, in the model's
    precision, on its device, at the size that their input has in the example.

    Attributes:
        judge: Times, and knows what was timed before.
        variant: How the graph will be run.
        dtype: Precision of most of the model's parameters.
        device: Where these are.
        remarks: What was decided.
    """

    judge: Judge
    variant: Variant
    dtype: torch.dtype
    device: torch.device
    remarks: list[Remark] = field(default_factory=list)

    def too_costly(self, choice: Choice, where: str = "") -> str | None:
        """As :meth:`reparam.algebra.cost.Cost.too_costly`; the reason gives the times."""
        counted = super().too_costly(choice, where)
        if choice.shape is None or not _is_doubtful(choice):
            return counted
        one, apart = "1 kernel", f"{choice.kernels} kernels"
        candidates = _Candidates(choice, self.variant, self.dtype, self.device)
        options = {one: candidates.one, apart: candidates.apart}
        usual, other = (one, apart) if counted is None else (apart, one)
        decision = self.judge.decide(self._key(choice), {usual: options[usual], other: options[other]}, where)
        merged = decision.pick == one
        times = against(decision, decision.pick, apart if merged else one)
        remark = Remark("timed", "Latency", where, f"{'merged into' if merged else 'kept'} {decision.pick}: {times}")
        if remark not in self.remarks:
            self.remarks.append(remark)
        return None if merged else f"{apart} are no slower than one: {times}"

    def _key(self, choice: Choice) -> str:
        branches = [" after ".join(map(str, branch)) or "identity" for branch in choice.branches]
        what = f"{choice.join} of {', '.join(branches)}" if len(branches) > 1 else branches[0]
        circumstances = _circumstances([choice.shape], self.dtype, self.device)
        return f"{what} as {choice.merged}; {circumstances}; {self.variant}"


def _is_doubtful(choice: Choice) -> bool:
    """Whether counting does not settle a choice."""
    merged = choice.merged
    if choice.saved <= 0 or not isinstance(merged, AnyConv):
        return False
    growth = merged.multiply_adds / max(1.0, choice.apart)
    in_a_row = any(len(branch) > 1 for branch in choice.branches)
    return growth < _HOPELESS and (growth > 1.0 or in_a_row or choice.join == "several")


def _circumstances(shapes: Sequence[Any], dtype: torch.dtype, device: torch.device) -> str:
    """All but the operators that a time depends on, as far as it can be named."""
    sizes = ", ".join("x".join(map(str, shape)) for shape in shapes)
    threads = f" {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    return f"{sizes} {str(dtype).removeprefix('torch.')} {device.type}{threads}"


@dataclass(frozen=True)
class _Candidates:
    """Both sides of a choice, as something that can be run."""

    choice: Choice
    variant: Variant
    dtype: torch.dtype
    device: torch.device

    def one(self) -> Run:
        """The merged operator; slices of it are copied, which is about what reading them costs."""
        merged = self._row((self.choice.merged,))
        if self.choice.join != "several":
            return self._run(merged)
        assert isinstance(self.choice.merged, Conv)
        sizes = [branch[0].out_channels for branch in self.choice.branches if isinstance(branch[0], Conv)]
        axis = self.choice.merged.axis
        return self._run(lambda x: [self._laid_out(part) for part in merged(x).split(sizes, axis)])

    def apart(self) -> Run:
        """What the merged operator would replace."""
        branches = [self._row(branch) for branch in self.choice.branches]
        match self.choice.join:
            case "sum":
                return self._run(lambda x: sum((branch(x) for branch in branches[1:]), branches[0](x)))
            case "concatenation":
                assert isinstance(self.choice.merged, Conv)
                axis = self.choice.merged.axis
                return self._run(lambda x: torch.cat([branch(x) for branch in branches], axis))
            case "several":
                return self._run(lambda x: [branch(x) for branch in branches])

    def _row(self, operators: Sequence[Operator]) -> nn.Sequential:
        """Operators in a row, the last one first, as layers."""
        rows = [layers_of(_filled(operator), self.dtype) for operator in reversed(operators)]
        layers = [variants.layer(self.variant, made.to(self.device)) for row in rows for made in row]
        return nn.Sequential(*layers).eval()

    def _run(self, function: Callable[[Tensor], object]) -> Run:
        assert self.choice.shape is not None
        x = self._laid_out(torch.ones(self.choice.shape, dtype=self.dtype, device=self.device))
        return _without_gradients(lambda: function(x), self.device)

    def _laid_out(self, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=self.variant.memory_format) if x.dim() == 4 else x.contiguous()


def _filled(operator: Operator) -> Operator:
    """An operator with numbers that are quick to make; those of outlines are none, those of sums not yet added up."""
    if not isinstance(operator, AnyConv):
        return operator
    weight = torch.full(operator.weight.shape, 0.01)
    bias = None if operator.bias is None else weight.new_zeros(operator.out_channels)
    return replace(operator, weight=weight, bias=bias, gain=None, terms=())


def _without_gradients(function: Run, device: torch.device) -> Run:
    """Run something to its end, which a GPU reaches later than the call."""
    wait = None if device.type == "cpu" else getattr(torch, device.type).synchronize

    def run() -> None:
        with torch.no_grad():
            function()
            if wait is not None:
                wait()

    return run


# Whole models.


@dataclass
class Race:
    """Finds the fastest way to run a model on its example inputs.

    Attributes:
        judge: Times, and knows what was timed before.
        call: The arguments of the model.
        remarks: What was decided, and what could not be run.
    """

    judge: Judge
    call: Call
    remarks: list[Remark] = field(default_factory=list)

    def variant(self, model: nn.Module) -> tuple[Variant, nn.Module]:
        """The fastest way to run a model, and the model run so; the model itself when no other is faster."""
        first, *others = variants.possible(model)
        best, fastest = first, model
        expected = run(model, *self.call) if others else None
        for variant in others:
            made = self.run_as(variant, model, expected)
            if made is None:
                continue
            key = f"model {fingerprint(model)} as {variant} or {best}; {self._circumstances(model)}"
            options = {str(best): self._timed(fastest), str(variant): self._timed(made)}
            decision = self.judge.decide(key, options, f"{variant}")
            times = against(decision, *sorted(options, key=lambda name: name != decision.pick))
            self._note(
                f"{decision.pick} rather than {next(name for name in options if name != decision.pick)}: {times}"
            )
            if decision.pick == str(variant):
                best, fastest = variant, made
        return best, fastest

    def run_as(self, variant: Variant, model: nn.Module, expected: Any = None) -> nn.Module | None:
        """A model run as a variant, None (and a remark) where that fails or computes something else."""
        if variant == Variant():
            return model
        assert isinstance(model, CompiledModel)
        try:
            made = model.rebuilt(*variants.apply(variant, model, self._shapes(model)))
            compare(run(model, *self.call) if expected is None else expected, run(made, *self.call))
        except (RuntimeError, ValueError, VerificationError) as error:
            self.remarks.append(Remark("missed", "Latency", "", f"{variant}: {first_line(error)}"))
            return None
        return made

    def final(self, smallest: nn.Module, fastest: nn.Module, name: str) -> nn.Module:
        """The whole result against the whole graph of ``optimize="size"``, which stays when it is as fast."""
        key = f"model {name} or {fingerprint(smallest)}; {self._circumstances(smallest)}"
        options = {"size": self._timed(smallest), "latency": self._timed(fastest)}
        decision = self.judge.decide(key, options, "the whole model")
        other = "latency" if decision.pick == "size" else "size"
        self._note(f"the graph for {decision.pick}, as a whole: {against(decision, decision.pick, other)}")
        return fastest if decision.pick == "latency" else smallest

    def _note(self, message: str) -> None:
        self.remarks.append(Remark("timed", "Latency", "", message))

    def _timed(self, model: nn.Module) -> Callable[[], Run]:
        def start() -> Run:
            args, kwargs = clones(self.call)
            return _without_gradients(lambda: model(*args, **kwargs), device_of(model))

        return start

    def _circumstances(self, model: nn.Module) -> str:
        tensors = [leaf for leaf in torch.utils._pytree.tree_leaves(self.call) if isinstance(leaf, Tensor)]
        dtype = next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), torch.get_default_dtype())
        return _circumstances([tensor.shape for tensor in tensors], dtype, device_of(model))

    def _shapes(self, model: CompiledModel) -> dict[str, torch.Size]:
        """Shapes of the inputs that are floating-point tensors, by name."""
        args, kwargs = self.call
        names = [str(node.target) for node in model.graph.nodes if node.op == "placeholder"]
        values = {**dict(zip(names, args, strict=False)), **kwargs}
        return {k: v.shape for k, v in values.items() if isinstance(v, Tensor) and v.is_floating_point()}


def fingerprint(model: nn.Module) -> str:
    """A number for the structure of a model: its graph and its layers, not their weights."""
    if not isinstance(model, GraphModule):
        described = repr(model)
    else:
        modules = dict(model.named_modules())
        used = sorted({str(node.target) for node in model.graph.nodes if node.op == "call_module"})
        described = "\n".join([text(Graph(model.graph, modules)), *(f"{path} {modules[path]!r}" for path in used)])
    return hashlib.sha256(described.encode()).hexdigest()[:12]


def device_of(model: nn.Module) -> torch.device:
    """Where the first parameter of a model is."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def dtype_of(model: nn.Module) -> torch.dtype:
    """The precision that most parameters of a model have."""
    kinds = [parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()]
    return max(kinds, key=kinds.count) if kinds else torch.get_default_dtype()

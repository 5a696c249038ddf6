"""``compile``: capture, rewrite, emit, verify, in that order."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
import torch.fx
from torch import Tensor, nn

from reparam import aliasing, emit, facts, measure
from reparam import capture as capturing
from reparam import probe as probing
from reparam import rewrite as rewriting
from reparam import verify as verifying
from reparam.algebra import AnyConv
from reparam.errors import ReparamError, VerificationError
from reparam.report import Comparison, Counts, Remark, Report
from reparam.rewrite import Graph, Rule

Progress: TypeAlias = Callable[[int, int, str], None]
Call: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]


class CompiledModel(torch.fx.GraphModule):
    """A deploy graph: plain layers under the paths of the modules that they replaced.

    Attributes:
        report: What the compiler did.
    """

    @property
    def report(self) -> Report:
        """What the compiler did."""
        report: Report = self.meta["reparam"]
        return report

    def __copy__(self) -> CompiledModel:
        return self._like(CompiledModel(self, self.graph, type(self).__name__), self.__dict__)

    def __reduce__(self) -> tuple[Any, ...]:
        restore, arguments = super().__reduce__()
        return _restore, (restore, arguments)

    @staticmethod
    def _like(twin: CompiledModel, attributes: Mapping[str, Any]) -> CompiledModel:
        """Give a graph module of the same layers the rest of what a compiled model has."""
        twin.meta = attributes["meta"]
        capturing.move_hooks(attributes, twin)
        for module in twin.modules():
            module.training = False
        return twin


def _restore(restore: Callable[..., torch.fx.GraphModule], arguments: tuple[Any, ...]) -> CompiledModel:
    """A compiled model from its pickle: torch's own restoring gives a plain graph module."""
    plain = restore(*arguments)
    return CompiledModel._like(CompiledModel(plain, plain.graph, plain._get_name()), arguments[0])


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Without the garbage collector, which would walk all nodes again and again: what is made here is in use."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_collector_paused()
def compile(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    passes: Sequence[Rule] | None = None,
    optimize: str = "size",
    verify: bool = True,
    trainable: bool = False,
    progress: Progress | None = None,
) -> nn.Module:
    """Return the function that a model computes in eval mode, as the fewest, cheapest kernels.

    Args:
        model: Any training-time module, in any mode and floating-point type, on any device. It is not changed.
        example_inputs: A tensor, a tuple of positional or a dict of keyword arguments. They tell ranks and channels
            that the layers do not show, give multiply-adds for the report, and are what the whole model is verified
            on. The result is not tied to their sizes.
        passes: Rules to apply; :func:`reparam.passes.default` when left out.
        optimize: ``size``: every rewrite launches fewer kernels and computes at most slightly more.
        verify: Certify every rewrite in float64 as it happens, and compare the whole model on ``example_inputs`` (or,
            without them, on inputs guessed from the first layer, where that works).
        trainable: Leave the weights trainable, for fine-tuning the deploy graph. Frozen otherwise.
        progress: Called with steps done, steps in all, and the module path at work.

    Returns:
        A module in eval mode, with the same arguments and outputs, whose ``report`` says what was done.

    Raises:
        CaptureError: The model cannot be copied, or has parameters without values.
        VerificationError: The result would not compute what the model computes. Nothing is returned then.
        ReparamError: ``optimize`` or ``passes`` is not what it should be.
    """
    rules = _checked_rules(passes)
    if optimize != "size":
        raise ReparamError(f"optimize={optimize!r} is not known; use 'size'")
    if not isinstance(model, nn.Module):
        raise ReparamError(
            f"compile takes an nn.Module, not {type(model).__name__}; load a checkpoint into its model first"
        )
    call = None if example_inputs is None else verifying.as_call(example_inputs)
    captured = capturing.capture(model, call)
    reference = _Reference(model, captured, call, verify)
    if not captured.traced:
        return _untraced(captured, reference, trainable)
    modules = captured.modules
    captured.remarks = probing.add_remarks(captured.remarks, probing.probe(captured.graph, modules))
    aliasing.make_out_of_place(captured.graph, modules)
    graph = Graph(captured.graph, modules)
    before = measure.count(graph.fx, modules, measure.parameters_of(model), reference.multiply_adds)
    dtypes, default = _dtypes(modules)
    outcome = rewriting.rewrite(graph, rules, verify=verify, progress=progress)
    used = emit.emit(graph, dtypes, default)
    aliasing.restore_in_place(graph.fx, used)
    name = type(capturing.unwrapped(model)).__name__
    compiled = CompiledModel(used, graph.fx, name)
    _finish(compiled, captured.storages, trainable)
    capturing.move_hooks(captured.root.__dict__, compiled)
    comparison = reference.compare(compiled)
    after = measure.count(graph.fx, used, measure.parameters_of(compiled), reference.multiply_adds_of(compiled))
    compiled.meta["reparam"] = Report(
        before,
        after,
        (*captured.remarks, *reference.remarks, *outcome.remarks),
        outcome.certificates,
        outcome.largest_error,
        comparison,
    )
    return compiled


def explain(model: nn.Module, example_inputs: Any = None, *, passes: Sequence[Rule] | None = None) -> Report:
    """What :func:`compile` would do to a model, and why it would leave the rest; a dry run.

    Args:
        model: As for :func:`compile`. Likewise ``example_inputs`` and ``passes``.
    """
    report: Report = compile(model, example_inputs, passes=passes, verify=False).report  # type: ignore[assignment]
    return report


def _checked_rules(passes: Sequence[Rule] | None) -> Sequence[Rule]:
    if passes is None:
        from reparam.passes import default

        return default()
    for rule in passes:
        if not isinstance(rule, Rule):
            raise ReparamError(f"passes must be instances of reparam.Rule, not {rule!r}")
    return list(passes)


def _dtypes(modules: Mapping[str, nn.Module]) -> tuple[dict[str, torch.dtype], torch.dtype]:
    """Precision of every module's own parameters, and of most of them."""
    dtypes = {}
    for path, module in modules.items():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None and tensor.is_floating_point():
                dtypes[path] = tensor.dtype
                break
    kinds = list(dtypes.values())
    return dtypes, max(kinds, key=kinds.count) if kinds else torch.get_default_dtype()


def _finish(compiled: nn.Module, shared: frozenset[int], trainable: bool) -> None:
    """The result owns its memory, is in eval mode, and its weights are frozen unless they are to be trained."""
    capturing.own_tensors(compiled, shared)
    for module in compiled.modules():
        module.training = False
    for parameter in compiled.parameters():
        parameter.requires_grad_(trainable and parameter.is_floating_point())


def _untraced(captured: capturing.Capture, reference: _Reference, trainable: bool) -> nn.Module:
    root = captured.root
    _finish(root, captured.storages, trainable)
    comparison = reference.compare(root)
    kinds = [kind for module in root.modules() if (kind := measure.module_kind(module))]
    counts = Counts(
        **{kind: kinds.count(kind) for kind in measure._KINDS if kind != "other"},
        kernels=len(kinds),
        parameters=measure.parameters_of(root),
        multiply_adds=reference.multiply_adds,
    )
    report = Report(counts, counts, (*captured.remarks, *reference.remarks), comparison=comparison)
    object.__setattr__(root, "report", report)
    return root


def _is_opaque(node: torch.fx.Node, captured: capturing.Capture) -> bool:
    return Graph(captured.graph, captured.modules).is_opaque(node)


class _Reference:
    """What the model itself returns on the example inputs, for the graph and the result to be compared with."""

    def __init__(self, model: nn.Module, captured: capturing.Capture, call: Call | None, verify: bool) -> None:
        self.remarks: list[Remark] = []
        self.call = call
        self.given = call is not None
        self.verify = verify
        self.expected: Any = None
        self.multiply_adds: int | None = None
        # A traced graph of torch.nn layers writes to nothing: the trace would have failed.
        self.writes = not captured.traced or any(_is_opaque(node, captured) for node in captured.graph.nodes)
        if call is None and verify and captured.traced:
            self.call = _guess_call(captured)
        if self.call is None:
            return
        args, kwargs = self.call
        model = capturing.in_eval_mode(model)
        try:
            with capturing.unchanged(model, writes=self.writes):
                self.expected = verifying.run(model, args, kwargs)
                again = verifying.run(model, args, kwargs)
        except Exception as error:
            if self.given:
                raise ReparamError(f"the model does not run on the example inputs: {error}") from error
            self.call = None
            return
        if self.given:
            with capturing.unchanged(model, writes=self.writes):
                self.multiply_adds = measure.multiply_adds_of(_Frozen(model), args, kwargs)
        try:
            verifying.compare(self.expected, again)
        except VerificationError:
            self.remarks.append(Remark("capture", "Verify", "", "its outputs differ from run to run; not compared"))
            self.verify = False
        if captured.traced:
            self._note_shapes(captured)

    def _note_shapes(self, captured: capturing.Capture) -> None:
        """Run the traced graph, take the facts that it shows, and distrust a trace that computes something else."""
        assert self.call is not None
        interpreter = _Shapes(captured, note=self.given)
        names = [node.target for node in captured.graph.nodes if node.op == "placeholder"]
        try:
            with capturing.unchanged(captured.root, writes=self.writes):
                actual = interpreter.run(*interpreter.arguments(self.call, names))
            if self.verify:
                verifying.compare(self.expected, actual)
        except Exception as error:
            captured.traced = False
            reason = f"the traced graph does not compute what the model computes, kept as Python: {error}"
            captured.remarks.append(Remark("capture", "Trace", "", reason))

    def compare(self, compiled: nn.Module) -> Comparison | None:
        """Compare the result with the model; raises VerificationError when they disagree."""
        if self.call is None or not self.verify:
            return None
        with capturing.unchanged(compiled, writes=self.writes):
            actual = verifying.run(compiled, *self.call)
        return verifying.compare(self.expected, actual)

    def multiply_adds_of(self, compiled: nn.Module) -> int | None:
        """Multiply-adds of the result on the example inputs, None without them."""
        if self.multiply_adds is None or self.call is None:
            return None
        with capturing.unchanged(compiled, writes=self.writes):
            return measure.multiply_adds_of(_Frozen(compiled), *self.call)


class _Frozen(nn.Module):
    """A model run in eval mode and left as it was."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "model", model)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output."""
        return verifying.run(self.model, args, kwargs)  # type: ignore[arg-type]


class _Shapes(torch.fx.Interpreter):
    """Runs a traced graph, and notes what it shows of its values."""

    def __init__(self, captured: capturing.Capture, note: bool) -> None:
        super().__init__(captured.root, graph=captured.graph)
        self.note = note

    def arguments(self, call: Call, names: Sequence[Any]) -> list[Any]:
        """The values of the placeholders, by position or name, on copies of the tensors."""
        args, kwargs = torch.utils._pytree.tree_map_only(Tensor, torch.clone, call)
        named = dict(zip(names, args, strict=False)) | kwargs
        defaults = {node.target: node.args[0] for node in self.graph.nodes if node.op == "placeholder" and node.args}
        return [named[name] if name in named else defaults.get(name) for name in names]

    def run_node(self, n: torch.fx.Node) -> Any:
        """Run a node and note its value."""
        with torch.no_grad():
            value = super().run_node(n)
        if self.note:
            facts.note_value(n, value)
        return value


def _guess_call(captured: capturing.Capture) -> Call | None:
    """Inputs for a model that takes one tensor and reads it with a convolution or a matrix product."""
    graph = Graph(captured.graph, captured.modules)
    placeholders = [node for node in captured.graph.nodes if node.op == "placeholder" and not node.args]
    if len(placeholders) != 1:
        return None
    for reader in captured.graph.nodes:
        operator = graph.op(reader) if reader.op != "placeholder" else None
        if isinstance(operator, AnyConv) and graph.source(reader) is placeholders[0]:
            size = {0: (), 1: (64,), 2: (64, 64), 3: (16, 32, 32)}[operator.dimensions]
            generator = torch.Generator().manual_seed(0)
            x = torch.randn(2, operator.in_channels, *size, generator=generator, dtype=torch.float64)
            return (x.to(operator.weight.device, operator.weight.dtype),), {}
    return None

"""``compile``: capture, rewrite, emit, verify, in that order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial, reduce
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.export
import torch.fx
from torch import nn

from reparam import capture as capturing
from reparam.algebra.cost import Cost
from reparam.atomic import check_destination
from reparam.capture import exported
from reparam.compare import Call, as_call
from reparam.deploy import emit
from reparam.deploy.model import CompiledModel as CompiledModel
from reparam.deploy.model import install, keep_attributes
from reparam.errors import ReparamError
from reparam.graph import aliasing, facts, measure, views
from reparam.graph.graph import Graph
from reparam.modes import modes_kept
from reparam.passes import default
from reparam.reference import Reference, _double, _tensors_of
from reparam.report import Remark, Report
from reparam.rewrite import borders, driver
from reparam.rewrite.rule import Rule
from reparam.timing import collector_paused
from reparam.tuning import latency
from reparam.tuning.decisions import Decisions

Progress: TypeAlias = Callable[[int, int, str], None]


@modes_kept
@collector_paused()  # it would walk all nodes again and again, and what is made here is in use
def compile(
    model: nn.Module | torch.export.ExportedProgram,
    example_inputs: Any = None,
    *,
    passes: Sequence[Rule] | None = None,
    sizes: str = "any",
    keep_python: bool = False,
    methods: str | Sequence[str] = ("forward",),
    where: str | Sequence[str] | Callable[[str], bool] | None = None,
    optimize: str = "size",
    decisions: str | Path | Mapping[str, Any] | None = None,
    verify: bool = True,
    trainable: bool = False,
    progress: Progress | None = None,
) -> nn.Module:
    """Return the function that a model computes in eval mode, as the fewest, cheapest kernels.

    Args:
        model: Any training-time module, in any mode and floating-point type, on any device; or a program that
            ``torch.export.export`` made of one in eval mode, or the module of such a program. It is not changed.
        example_inputs: A tensor, a tuple of positional or a dict of keyword arguments: a call, which is recorded. What
            it shows besides sizes has to stay: which arguments are given, flags, how many axes tensors have. When left
            out, inputs are made up, which the report says; where the model takes none of them, only parts of it that
            take some are compiled.
        sizes: ``any``: the result works at every size that the model works at; a module whose Python takes other ways
            for other sizes stays Python, with its parts compiled. ``example``: everything is one graph, which says for
            which sizes it holds, and checks them at every call.
        keep_python: Return a copy of the model, of its class, with all its methods, attributes and hooks, in which
            every part that can be is compiled; of parts in one another, the innermost ones in which nothing is lost.
        methods: With ``keep_python``: what to run, to find the parts. ``example_inputs`` are a dict of each method's
            where there are several.
        where: What to compile: a predicate of module paths, or patterns of them, such as ``"stages.*"``, which select a
            module with all that is in it. What is outside is left exactly as it is.
        passes: Rules to apply; :func:`reparam.passes.default` when left out.
        optimize: ``size``: every rewrite launches fewer kernels and computes at most slightly more. ``latency``: what
            that leaves in doubt, and the layout in memory, is timed on this machine with ``example_inputs``, and the
            result is returned only if it is faster than that of ``size`` beyond doubt (:mod:`reparam.tuning.latency`).
            Its outputs may lie in memory differently (channels last), with the same values.
        decisions: For ``latency``: decisions to replay instead of timing. A path is read if there is such a file, and
            written with what was added; :class:`reparam.Decisions` are added to; a mapping, which
            :meth:`reparam.Decisions.to_dict` made, is only read.
        verify: Certify every rewrite in float64 as it happens, and compare the whole model on ``example_inputs`` (or,
            without them, on inputs guessed from the first layer, where that works).
        trainable: Leave the weights trainable, for fine-tuning the deploy graph. Frozen otherwise.
        progress: Called with steps done, steps in all, and the module path at work.

    Returns:
        A module in eval mode, with the same arguments and outputs, whose ``report`` says what was done. Called in
        another way than the example, it raises a ConditionError.

    Raises:
        CaptureError: The model cannot be copied, or has parameters without values.
        VerificationError: The result would not compute what the model computes. Nothing is returned then.
        ReparamError: ``optimize``, ``passes`` or ``decisions`` is not what it should be, or there is nothing to time
            with ``latency``.
    """
    entries = (methods,) if isinstance(methods, str) else tuple(methods)
    if entries != ("forward",) and not keep_python:
        raise ReparamError("a graph has no methods but its forward; methods= needs keep_python=True")
    options = _Options(
        _checked_rules(passes), verify, progress, sizes=sizes, methods=entries if keep_python else (),
        where=None if where is None else _selection(model, where),
    )  # fmt: skip
    if sizes not in ("any", "example"):
        raise ReparamError(f"sizes={sizes!r} is not known; use 'any' or 'example'")
    if optimize not in ("size", "latency"):
        raise ReparamError(f"optimize={optimize!r} is not known; use 'size' or 'latency'")
    if optimize == "size" and decisions is not None:
        raise ReparamError("decisions are about what is timed; they need optimize='latency'")
    if not isinstance(model, nn.Module | torch.export.ExportedProgram):
        raise ReparamError(
            f"compile takes an nn.Module, not {type(model).__name__}; load a checkpoint into its model first"
        )

    def build(options: _Options) -> _Built:
        return _build(model, example_inputs, options, trainable)

    if optimize == "size":
        return build(options).reported()
    return _compile_for_latency(build, options, decisions).reported()


@dataclass
class _Built:
    """A model, what it was compiled to, and what is known of both.

    Attributes:
        model: What was compiled.
        captured: Its graph, by now rewritten.
        reference: What it returns.
        result: What it was compiled to.
        work: What was done.
    """

    model: nn.Module
    captured: capturing.Capture
    reference: Reference
    result: nn.Module
    work: _Work

    def reported(self) -> nn.Module:
        """The result, compared with the model, and with a report."""
        reference, work, result = self.reference, self.work, self.result
        comparison = reference.compare(result)
        report = Report(
            measure.counts(work.before, measure.parameters_of(self.model), reference.multiply_adds),
            measure.counts(work.after, measure.parameters_of(result), reference.multiply_adds_of(result)),
            (*self.captured.remarks, *reference.remarks, *work.remarks),
            work.certificates,
            work.largest_error,
            comparison,
        )
        if isinstance(result, CompiledModel):
            result.meta["reparam"] = report
        else:
            object.__setattr__(result, "report", report)
        return result


def _build(
    model: nn.Module | torch.export.ExportedProgram, example_inputs: Any, options: _Options, trainable: bool
) -> _Built:
    """Capture a model and compile it."""
    if isinstance(model, torch.export.ExportedProgram):
        model, captured, reference = _read(model, example_inputs, options.verify)
    else:
        if options.methods:
            entries = _entries(capturing.unwrapped(model), options.methods, example_inputs)
            captured = capturing.capture_parts(
                model, entries, sizes=options.sizes, spans=lambda part: _spans(part, options)
            )
        else:
            call = None if example_inputs is None else as_call(example_inputs)
            captured = capturing.capture(model, call, sizes=options.sizes)
        reference = Reference(model, captured, example_inputs is not None, options.verify, options.methods)
        reference.in_double = partial(_in_double, model, example_inputs, options)
    result: nn.Module
    if captured.traced:
        result, work = _compile_graph(captured, options, type(capturing.unwrapped(model)).__name__)
        keep_attributes(result, captured.root)
    else:
        result, work = _compile_inside(captured, options)
    _finish(result, captured.storages, trainable)
    return _Built(model, captured, reference, result, work)


def _in_double(model: nn.Module, example_inputs: Any, options: _Options) -> nn.Module:
    """A model in float64, compiled in the same way."""
    quietly = replace(options, verify=False, progress=None)
    return _build(capturing.private_copy(model).double(), _double(example_inputs), quietly, False).result


def _compile_for_latency(
    build: Callable[[_Options], _Built], options: _Options, decisions: str | Path | Mapping[str, Any] | None
) -> _Built:
    """The graph of ``optimize="size"``, or, where it is faster, one whose doubtful rewrites and layout were timed."""

    known, path = _decisions(decisions)
    smallest = build(options)
    reference = smallest.reference
    if not reference.given or reference.call is None:
        raise ReparamError("optimize='latency' times the model on example_inputs; pass some")
    judge = latency.Judge(known)
    if options.progress is not None:
        tell = options.progress
        judge.progress = lambda label: tell(1, 1, f"timing {label or 'the model'}")
    race = latency.Race(judge, reference.call)
    variant, fastest = race.variant(smallest.result)
    cost = latency.Measured(
        judge, variant, latency.dtype_of(smallest.result), latency.device_of(smallest.result), race.remarks
    )
    measured = build(replace(options, cost=cost))
    chosen = smallest
    if latency.fingerprint(measured.result) != latency.fingerprint(smallest.result):
        name = latency.fingerprint(measured.result)
        chosen, fastest = measured, race.run_as(variant, measured.result) or measured.result
    else:
        name = latency.fingerprint(smallest.result)
    if fastest is not smallest.result:
        best = race.final(smallest.result, fastest, f"{name} as {variant}")
        chosen = smallest if best is smallest.result else replace(chosen, result=best)
    if path is not None:
        known.write(path)
    if isinstance(chosen.result, CompiledModel):
        chosen.work.after = measure.kinds_of_graph(chosen.result.graph, dict(chosen.result.named_modules()))
    chosen.work.remarks += race.remarks
    return chosen


def _decisions(given: str | Path | Mapping[str, Any] | None) -> tuple[Decisions, Path | None]:
    """Decisions, and where to write them."""

    match given:
        case None:
            return Decisions(), None
        case Decisions():
            return given, None
        case str() | Path():
            path = Path(given)
            check_destination(path)
            return Decisions.read(path) if path.exists() else Decisions(), path
        case Mapping():
            return Decisions.from_dict(given), None
    raise ReparamError(f"decisions are a path, reparam.Decisions or a mapping, not {type(given).__name__}")


def _read(
    program: torch.export.ExportedProgram, example_inputs: Any, verify: bool
) -> tuple[nn.Module, capturing.Capture, Reference]:
    """An exported program: as a module, captured, and what it returns."""
    call = None if example_inputs is None else as_call(example_inputs)
    model, captured = exported.read(program, call)
    return model, captured, Reference(model, captured, True, verify)


@dataclass(frozen=True)
class _Options:
    """How to compile, for a model and for every part of it that is compiled on its own."""

    rules: Sequence[Rule]
    verify: bool
    progress: Progress | None
    cost: Cost = field(default_factory=Cost)
    sizes: str = "any"
    methods: tuple[str, ...] = ()
    where: Callable[[str], bool] | None = None
    prefix: str = ""


@dataclass
class _Work:
    """What was done to a model or a part of it: kinds of kernels, and what the engine reported."""

    before: list[str]
    after: list[str]
    remarks: list[Remark]
    certificates: int = 0
    largest_error: float = 0.0
    parts: int = 0

    def with_parts(self, parts: _Parts) -> _Work:
        """This and the work on the parts."""
        for work in parts.works.values():
            self.remarks += work.remarks
            self.certificates += work.certificates
            self.largest_error = max(self.largest_error, work.largest_error)
        self.remarks += parts.remarks
        self.parts = len(parts.works)
        return self


def _rewritten(
    captured: capturing.Capture, options: _Options, replaced: Mapping[nn.Module, list[str]] | None = None
) -> tuple[Graph, driver.Outcome, list[str]]:
    """A captured graph after rewriting, what was done, and what it launched before."""
    modules = captured.modules
    selects = options.where or (lambda path: True)
    for node in captured.graph.nodes:
        where = str(node.target) if node.op == "call_module" else facts.of(node).scope
        if node.op.startswith("call") and not selects(".".join(filter(None, (options.prefix, where)))):
            facts.know(node, frozen=aliasing.OUTSIDE)
    views.settle(captured.graph.nodes, modules)
    before = measure.kinds_of_graph(captured.graph, modules, replaced)
    borders_read = borders.read(captured.graph, modules)
    aliasing.make_out_of_place(captured.graph, modules)
    views.settle(captured.graph.nodes, modules)
    graph = Graph(captured.graph, modules, options.cost)
    outcome = driver.rewrite(graph, options.rules, verify=options.verify, progress=options.progress)
    outcome.remarks[:0] = borders_read
    return graph, outcome, before


def _compile_graph(captured: capturing.Capture, options: _Options, name: str) -> tuple[CompiledModel, _Work]:
    """Rewrite what was traced, and compile what lies inside of its opaque leaves."""
    parts = _compile_parts(captured, options)
    graph, outcome, before = _rewritten(captured, options, parts.before)
    used = emit.emit(graph, *_dtypes(captured))
    aliasing.work_in_place(graph.fx, used)
    compiled = CompiledModel(used, graph.fx, name)
    compiled.meta["arguments"] = captured.arguments
    capturing.move_hooks(captured.root.__dict__, compiled)
    after = measure.kinds_of_graph(graph.fx, used)
    work = _Work(before, after, outcome.remarks, outcome.certificates, outcome.largest_error)
    return compiled, work.with_parts(parts)


def compile_captured(captured: capturing.Capture) -> CompiledModel:
    """Rewrite a graph that was captured elsewhere, with the default rules; its weights stay where they are."""
    options = _Options(_checked_rules(None), True, None)
    return _compile_graph(captured, options, "Fused")[0]


def _entries(model: nn.Module, methods: Sequence[str], example_inputs: Any) -> list[tuple[str, Call | None]]:
    """Methods, and calls of them."""
    for name in methods:
        if not callable(getattr(model, name, None)):
            raise ReparamError(f"{type(model).__name__} has no method {name!r}")
    if len(methods) == 1:
        return [(methods[0], None if example_inputs is None else as_call(example_inputs))]
    if not isinstance(example_inputs, Mapping) or set(example_inputs) != set(methods):
        raise ReparamError(f"methods={tuple(methods)!r} needs example_inputs as a dict with inputs for each of them")
    return [(name, as_call(example_inputs[name])) for name in methods]


def _selection(model: Any, where: str | Sequence[str] | Callable[[str], bool]) -> Callable[[str], bool]:
    """Whether a module path is selected; a pattern selects what is in a module, too.

    Raises:
        ReparamError: A pattern matches no module.
    """
    if callable(where):
        return where
    patterns = [where] if isinstance(where, str) else list(where)
    paths = [path for path, _ in model.named_modules()] if isinstance(model, nn.Module) else []
    for pattern in patterns:
        if not any(fnmatchcase(path, pattern) for path in paths):
            raise ReparamError(f"where={pattern!r} matches none of the {len(paths)} modules")

    def selects(path: str) -> bool:
        names = path.split(".")
        around = [".".join(names[:length]) for length in range(len(names) + 1)]
        return any(fnmatchcase(outer, pattern) for outer in around for pattern in patterns)

    return selects


def _spans(captured: capturing.Capture, options: _Options) -> set[str]:
    """Paths of the modules in which a captured graph has something to fuse; the graph is of no use afterwards."""
    plain = replace(options, verify=False, progress=None)
    return _rewritten(captured, plain)[1].spans


def _compile_inside(captured: capturing.Capture, options: _Options) -> tuple[nn.Module, _Work]:
    """Compile the parts of a model whose own Python stays."""
    root = captured.root
    parts = _compile_parts(captured, options)
    work = _Work(measure.kinds_inside(root, parts.before), measure.kinds_inside(root, {}), [])
    return root, work.with_parts(parts)


@dataclass
class _Parts:
    """What was compiled inside of Python that stays: the work on each module that computes by a graph now."""

    works: dict[nn.Module, _Work] = field(default_factory=dict)
    remarks: list[Remark] = field(default_factory=list)

    @property
    def before(self) -> dict[nn.Module, list[str]]:
        """What the parts launched before."""
        return {part: work.before for part, work in self.works.items()}


def _within(path: str, remark: Remark) -> Remark:
    """A remark on a part, as one on what it is a part of."""
    return replace(remark, where=".".join(filter(None, (path, remark.where))))


def _compile_parts(captured: capturing.Capture, options: _Options) -> _Parts:
    """Compile every part that was recorded by itself, and let its module compute by the result."""
    parts = _Parts()
    for path, part in captured.parts.items():
        aliased = aliasing.inputs_in_outputs(part.graph, part.modules)
        if aliasing.writes_to_inputs(part.graph, part.modules):
            parts.remarks.append(Remark("capture", "Inside", path, "kept as Python: it changes its inputs in place"))
            continue
        module = part.root
        prefix = ".".join(filter(None, (options.prefix, path)))
        compiled, work = _compile_graph(part, replace(options, prefix=prefix), type(module).__name__)
        if not aliasing.inputs_in_outputs(compiled.graph, dict(compiled.named_modules())) <= aliased:
            said = "kept as Python: its output would share memory with its input"
            parts.remarks.append(Remark("capture", "Inside", path, said))
            continue
        if work.before == work.after and not work.parts:
            parts.remarks += [_within(path, remark) for remark in work.remarks if remark.kind == "missed"]
            continue
        install(module, compiled)
        work.remarks[:0] = part.remarks
        work.remarks = [_within(path, remark) for remark in work.remarks]
        parts.works[module] = work
        parts.remarks.append(Remark("capture", "Inside", path, "compiled by itself: Python that stays calls it"))
    return parts


def explain(
    model: nn.Module | torch.export.ExportedProgram,
    example_inputs: Any = None,
    *,
    sizes: str = "any",
    passes: Sequence[Rule] | None = None,
) -> Report:
    """What :func:`compile` would do to a model, and why it would leave the rest; a dry run.

    Args:
        model: As for :func:`compile`. Likewise ``example_inputs``, ``sizes`` and ``passes``.
    """
    report: Report = compile(model, example_inputs, sizes=sizes, passes=passes, verify=False).report  # type: ignore[assignment]
    return report


def _checked_rules(passes: Sequence[Rule] | None) -> Sequence[Rule]:
    if passes is None:
        return default()
    for rule in passes:
        if not isinstance(rule, Rule):
            raise ReparamError(f"passes must be instances of reparam.rules.Rule, not {rule!r}")
    return list(passes)


def _dtypes(captured: capturing.Capture) -> tuple[dict[str, torch.dtype], torch.dtype]:
    """Precision of every module's own parameters, and of most of them; where there are none, of what is computed."""
    dtypes = {}
    for path, module in captured.modules.items():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None and tensor.is_floating_point():
                dtypes[path] = tensor.dtype
                break
    if kinds := list(dtypes.values()):
        return dtypes, max(kinds, key=kinds.count)
    held = [tensor for module in captured.modules.values() for _, tensor in capturing.tensors_in(module)]
    kinds = [x.dtype for x in (*held, *_tensors_of(captured.call)) if x.dim() and x.is_floating_point()]
    return dtypes, reduce(torch.promote_types, kinds) if kinds else torch.get_default_dtype()


def _finish(compiled: nn.Module, shared: frozenset[int], trainable: bool) -> None:
    """The result owns its memory, is in eval mode, and its weights are frozen unless they are to be trained."""
    capturing.own_tensors(compiled, shared)
    for module in compiled.modules():
        module.training = False
    for parameter in compiled.parameters():
        # That of a copied script is none of ours to change.
        if parameter.is_leaf:
            parameter.requires_grad_(trainable and parameter.is_floating_point())

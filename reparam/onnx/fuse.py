"""Fuse an ONNX graph: read, rewrite with the engine's rules, write back, compare in onnxruntime."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import onnx
import onnx_ir as ir

from reparam.onnx import files, shapes
from reparam.onnx.constants import DTYPES
from reparam.onnx.counts import counts
from reparam.onnx.read import UNDERSTOOD_FROM, Reader
from reparam.onnx.running import BATCHES, EXAMPLE_BATCH, Runner, choose_sizes, compare_models, input_names
from reparam.onnx.shapes import Known
from reparam.onnx.write import write
from reparam.passes import default
from reparam.report import Remark, Report
from reparam.rewrite.driver import Outcome, rewrite
from reparam.rewrite.rule import Rule

Progress: TypeAlias = Callable[[int, int, str], None]


@dataclass(frozen=True)
class FusedOnnx:
    """What :func:`fuse_onnx` made.

    Attributes:
        graph: The deploy graph, for ``onnx_ir``.
        report: What was done: counts before and after, remarks, certificates, the comparison in onnxruntime.
        path: Where it was written, None when it was not.
        opset: Version of the ONNX operator set that it uses.
        nodes: Operators in its graph, before and after.
    """

    graph: ir.Model
    report: Report
    path: Path | None
    opset: int
    nodes: tuple[int, int]

    @property
    def model(self) -> onnx.ModelProto:
        """The deploy graph as a protobuf."""
        proto = ir.to_proto(self.graph)
        assert isinstance(proto, onnx.ModelProto)
        return proto


def fuse_onnx(
    source: str | Path | onnx.ModelProto,
    path: str | Path | None = None,
    *,
    input_size: Sequence[int] | None = None,
    freeze_inputs: bool = False,
    passes: Sequence[Rule] | None = None,
    verify: bool = True,
    progress: Progress | None = None,
) -> FusedOnnx:
    """Fuse the exported training graph of a network, for those who have nothing else of it.

    The rules are those of :func:`reparam.compile`. What they do not understand stays as it is: unknown operators,
    other domains, quantised layers, bodies of loops. Opset, metadata, and the names, types and free axes of inputs and
    outputs are kept.

    Args:
        source: An ``.onnx`` file, or a model from memory. It is not changed.
        path: Where to write the result, ``.onnx``; weights go to ``PATH.data`` where the source had them outside of
            its file, or one file cannot hold them. Left out, nothing is written.
        input_size: Sizes of one input without its batch axis, where these are free. Left out, some are tried.
        freeze_inputs: Whether initializers that are also inputs, as in files of old exporters, are constants; they are
            inputs no more then.
        passes: Rules to apply; :func:`reparam.passes.default` when left out.
        verify: Certify every rewrite in float64, and compare the two models in onnxruntime, on random inputs of two
            batch sizes where the batch is free.
        progress: Called with steps done, steps in all, and the node at work.

    Raises:
        CheckpointError: The file is missing, damaged, or no ONNX model.
        ExportError: ``path`` cannot be written, or onnxruntime cannot load the model.
        VerificationError: The result would compute something else. Nothing is written then.
        ReparamError: The model does not run on inputs of the sizes that it declares.
    """
    given = files.read(source)
    destination = None if path is None else Path(path)
    if destination is not None:
        files.check(destination, given)
    model = given.graph()
    remarks = _settle_inputs(model, freeze_inputs)
    bare = shapes.skeleton(given.proto)
    reference = Runner(given.runnable, input_names(model)) if verify else None
    sizes = choose_sizes(model, input_size, reference)
    known = shapes.infer(bare, sizes[EXAMPLE_BATCH])
    before, nodes = counts(model, known), len(model.graph)
    outcome = _rewrite(model, known, _rules(passes), verify, progress)
    with files.staged(model, given, destination) as staged:
        comparison = None
        if reference is not None:
            remarks += [Remark("capture", "Verify", "", f"{reference.reason}; compared in {reference.name}")] * bool(
                reference.reason
            )
            batches = [sizes[batch] for batch in (BATCHES if sizes[1] != sizes[3] else BATCHES[:1])]
            fused = Runner(staged.runnable, input_names(model))
            comparison = compare_models(model, reference, fused, batches)
        after = counts(model, known | _types_after(model, known))
        report = Report(
            before, after, (*remarks, *outcome.remarks), outcome.certificates, outcome.largest_error, comparison
        )
        if destination is not None:
            staged.publish(destination)
    opset = model.graph.opset_imports.get("", 0)
    return FusedOnnx(model, report, destination, opset, (nodes, len(model.graph)))


def _rules(passes: Sequence[Rule] | None) -> Sequence[Rule]:

    return default() if passes is None else list(passes)


def _settle_inputs(model: ir.Model, freeze: bool) -> list[Remark]:
    """Take inputs that have values for constants when told so; remarks about what stands in the way of everything."""
    remarks = []
    graph = model.graph
    overridable = [value for value in graph.inputs if value.is_initializer()]
    if overridable and freeze:
        for value in overridable:
            graph.inputs.remove(value)
        model.ir_version = max(model.ir_version or 0, 4)  # before, every initializer had to be an input
    elif overridable:
        text = f"{len(overridable)} weights are inputs, too, which a caller may override, and stay as they are"
        advice = "freeze_inputs=True, or --freeze-inputs, makes them constants"
        remarks.append(Remark("capture", "Onnx", "", f"{text}; {advice}"))
    opset = graph.opset_imports.get("", 0)
    if opset < UNDERSTOOD_FROM:
        text = f"its operator set {opset} is older than {UNDERSTOOD_FROM}, nothing was rewritten"
        remarks.append(Remark("capture", "Onnx", "", f"{text}; onnx.version_converter brings it up to date"))
    return remarks


def _rewrite(
    model: ir.Model, known: Mapping[str, Known], rules: Sequence[Rule], verify: bool, progress: Progress | None
) -> Outcome:
    read = Reader(model, known).read()
    outcome = rewrite(read.graph, rules, verify=verify, progress=progress)
    outcome.remarks[:0] = read.remarks
    initializers = set(model.graph.initializers)
    write(model, read)
    if not set(model.graph.initializers) <= initializers:
        model.ir_version = max(model.ir_version or 0, 4)
    return outcome


def _types_after(model: ir.Model, known: Mapping[str, Known]) -> dict[str, Known]:
    """The types of new values."""
    values = [output for node in model.graph for output in node.outputs if output.name not in known]
    return {str(value.name): Known(None if value.dtype is None else DTYPES.get(value.dtype)) for value in values}

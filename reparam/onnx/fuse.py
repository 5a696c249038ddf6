"""Fuse an ONNX graph: read, rewrite with the engine's rules, write back, compare in onnxruntime."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import onnx
import onnx_ir as ir
import torch
from torch import Tensor

from reparam.errors import ExportError, ReparamError, VerificationError
from reparam.export import OnnxModel
from reparam.onnx import files, shapes
from reparam.onnx.constants import DTYPES, Constants
from reparam.onnx.counts import counts
from reparam.onnx.read import UNDERSTOOD_FROM, Reader
from reparam.onnx.shapes import Known
from reparam.onnx.write import write
from reparam.report import Comparison, Remark, Report
from reparam.rewrite import Outcome, Rule, rewrite
from reparam.verify import TOLERANCES, compare

Sizes: TypeAlias = dict[str, tuple[int, ...]]
Progress: TypeAlias = Callable[[int, int, str], None]

# Tried for free sizes that are no batch, such as those of images: the first that the model takes.
_FREE = (64, 224, 32, 256, 128, 16, 8, 1)
_BATCHES = (1, 3)
_EXAMPLE_BATCH = 2


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
    reference = OnnxModel(given.runnable) if verify else None
    sizes = _sizes(model, input_size, reference)
    known = shapes.infer(bare, sizes[_EXAMPLE_BATCH])
    before, nodes = counts(model, known), len(model.graph)
    outcome = _rewrite(model, known, _rules(passes), verify, progress)
    with files.staged(model, given, destination) as staged:
        comparison = None
        if reference is not None:
            batches = [sizes[batch] for batch in (_BATCHES if sizes[1] != sizes[3] else _BATCHES[:1])]
            comparison = _compare(model, reference, OnnxModel(staged.runnable), batches)
        after = counts(model, known | _types_after(model, known))
        report = Report(
            before, after, (*remarks, *outcome.remarks), outcome.certificates, outcome.largest_error, comparison
        )
        if destination is not None:
            staged.publish(destination)
    opset = model.graph.opset_imports.get("", 0)
    return FusedOnnx(model, report, destination, opset, (nodes, len(model.graph)))


def _rules(passes: Sequence[Rule] | None) -> Sequence[Rule]:
    from reparam.passes import default

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


# Running both.


def _sizes(model: ir.Model, input_size: Sequence[int] | None, reference: OnnxModel | None) -> dict[int, Sizes]:
    """Sizes of all inputs for three batch sizes; the same where the batch is not free.

    Raises:
        ReparamError: The model does not run on any that were tried.
    """
    failure: Exception | None = None
    for free in _FREE:
        found = {batch: _bound(model, batch, free, input_size) for batch in (*_BATCHES, _EXAMPLE_BATCH)}
        if reference is None:
            return found
        try:
            reference(*_inputs(model, found[1], 1))
            return found
        except ExportError as error:
            failure = failure or error
        if found[1] == _bound(model, 1, free + 1, input_size):
            break  # there is nothing to choose
    raise ReparamError(
        f"the model does not run on random inputs of {_texts(found[1])}: {failure}; give the size of one input "
        "(input_size=, --input-size CxHxW), or write without comparing (verify=False, --no-verify)"
    ) from failure


def _texts(sizes: Sizes) -> str:
    return " and ".join("x".join(map(str, shape)) or "no axes" for shape in sizes.values())


def _bound(model: ir.Model, batch: int, free: int, input_size: Sequence[int] | None) -> Sizes:
    """Numbers for the sizes of all inputs; one with the name of a batch axis is a batch wherever it stands."""
    found: dict[str, list[int | str]] = {}
    for value in _required(model):
        dims = [] if value.shape is None else [size if isinstance(size, int) else size.value for size in value.shape]
        found[str(value.name)] = shapes.symbols(dims, str(value.name))
    bound: dict[str, int] = {}
    for dims in found.values():
        if dims and isinstance(dims[0], str):
            bound[dims[0]] = batch
    for dims in found.values():
        if input_size is not None and len(dims) == len(input_size) + 1:
            for size, given in zip(dims[1:], input_size, strict=True):
                if isinstance(size, str):
                    bound.setdefault(size, given)
                elif size != given:
                    raise ReparamError(f"an input size of {size} is fixed in the model, and cannot be {given}")
    return {name: tuple(d if isinstance(d, int) else bound.get(d, free) for d in dims) for name, dims in found.items()}


def _required(model: ir.Model) -> Iterator[ir.Value]:
    """The inputs that a caller has to give."""
    return (value for value in model.graph.inputs if not value.is_initializer())


def _inputs(model: ir.Model, sizes: Sizes, seed: int) -> list[Tensor]:
    """Random inputs: noise, or zeros and ones where the type is not of floating-point numbers."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for value in _required(model):
        dtype = None if value.dtype is None else DTYPES.get(value.dtype)
        shape = sizes[str(value.name)]
        if dtype is None or value.shape is None:
            raise ExportError(f"nothing random can be made for the input {value.name}")
        if dtype.is_floating_point:
            made.append(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
        else:
            made.append(torch.randint(0, 2, shape, generator=generator).to(dtype))
    return made


def _compare(model: ir.Model, reference: OnnxModel, fused: OnnxModel, batches: Sequence[Sizes]) -> Comparison:
    """Both models on the same random inputs.

    Raises:
        VerificationError: They disagree.
    """
    found = []
    for seed, sizes in enumerate(batches, start=1):
        inputs = _inputs(model, sizes, seed)
        expected = reference(*inputs)
        again = reference(*inputs)
        try:
            compare(expected, again)
        except VerificationError as error:
            raise VerificationError("the model's outputs differ from run to run; verify=False, or --no-verify, writes it without comparing") from error
        try:
            # The precision of the model, also where it returns numbers of another.
            found.append(compare(expected, fused(*inputs), _tolerance(expected, inputs)))
        except VerificationError as error:
            raise VerificationError(f"in onnxruntime: {error}; nothing was written", error.comparison) from error
    return max(found, key=lambda comparison: comparison.largest_error)


def _tolerance(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> float | None:
    allowed = [TOLERANCES[x.dtype] for x in (*outputs, *inputs) if x.dtype in TOLERANCES]
    return max(allowed, default=None)

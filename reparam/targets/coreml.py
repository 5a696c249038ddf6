"""Core ML: an ``.mlpackage`` for Apple's systems. It runs nowhere else, so what was written is read back instead."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Node

from reparam.errors import ExportError, VerificationError
from reparam.report import Comparison
from reparam.targets.program import input_shapes
from reparam.targets.registry import register
from reparam.targets.target import Options, Target, Written, quiet, require

_LAYERS = ("conv", "conv_transpose", "linear")
_KINDS = {f"conv{n}d": "conv" for n in (1, 2, 3)} | {f"conv_transpose{n}d": "conv_transpose" for n in (1, 2, 3)}
_KINDS |= {"linear": "linear", "batch_norm": "batch_norm"}
_ROUNDING = 2.0**-11  # of half precision, relative to the largest weight; single precision is kept as it is


@register
class CoreML(Target):
    """Apple's runtime, for processors, graphics and the Neural Engine.

    The batch is fixed unless asked for: the Neural Engine takes fixed shapes.
    """

    name = "coreml"
    title = "Core ML"
    suffix = ".mlpackage"
    extra = "coreml"
    packages = ("coremltools",)
    runtime = "coremltools"
    is_folder = True
    batch_by_default = False
    half = "writer"
    options = frozenset({"image"})
    runs_here = False

    def write(self, program: ExportedProgram, path: Path, options: Options) -> Written:
        """Convert the program to an ML program (iOS 15, macOS 12 and later)."""
        import coremltools

        precision = coremltools.precision.FLOAT16 if options.half else coremltools.precision.FLOAT32
        model = coremltools.convert(
            program.run_decompositions({}),
            convert_to="mlprogram",
            compute_precision=precision,
            inputs=_image_inputs(program, options) if options.image else None,
            skip_model_load=True,
        )
        model.save(str(path))
        operators = operators_in(model)
        del operators["const"]
        return Written(operators)

    def load(self, path: Path) -> nn.Module:
        """Refuse: there is nothing here to run it on."""
        raise ExportError(f"{path}: Core ML models run on Apple's systems only, so they cannot be run here")

    def check(
        self,
        path: Path,
        model: nn.Module,
        program: ExportedProgram,
        batches: Sequence[tuple[Tensor, ...]],
        options: Options,
    ) -> Comparison:
        """Read the file back: as many layers as the model has, no norm more, and the same weights.

        Returns:
            The largest difference of a weight, relative to the largest one of its layer.

        Raises:
            VerificationError: There are other layers, or other weights.
        """
        coremltools = require("coremltools", self.title, self.extra)
        with quiet():
            package = coremltools.models.MLModel(str(path), skip_model_load=True)
            found, weights = operators_in(package), list(_weights(package))
        expected = Counter(map(_kind, program.graph.nodes))
        for kind in _LAYERS:
            if found[kind] != expected[kind]:
                raise VerificationError(f"the file has {found[kind]} operators {kind}, the model {expected[kind]}")
        if found["batch_norm"] > expected["batch_norm"]:
            raise VerificationError(f"the file has {found['batch_norm']} norms, the model {expected['batch_norm']}")
        tolerance = options.tolerance or (_ROUNDING if options.half else 1e-6)
        return _compare_weights(list(_parameters(program)), weights, tolerance)


def _image_inputs(program: ExportedProgram, options: Options) -> list[Any]:
    import coremltools

    assert options.image is not None
    (name, shape), *others = input_shapes(program).items()
    if others:
        raise ExportError("an image can be the input of a model with one input only")
    grey = len(options.image.mean) == 1
    layout = coremltools.colorlayout.GRAYSCALE if grey else getattr(coremltools.colorlayout, options.image.order)
    bias: Any = options.image.bias[0] if grey else options.image.bias
    sizes = [size if isinstance(size, int) else coremltools.RangeDim() for size in shape]
    return [
        coremltools.ImageType(
            name=name, shape=coremltools.Shape(sizes), scale=options.image.scale, bias=bias, color_layout=layout
        )
    ]


def operators_in(package: Any) -> Counter[str]:
    """How often each operator of Core ML occurs in a package."""
    function = package.get_spec().mlProgram.functions["main"]
    return Counter(operation.type for operation in function.block_specializations[function.opset].operations)


def _weights(package: Any) -> Iterator[Tensor]:
    """The kernels and biases in a package."""
    from coremltools.optimize.coreml import get_weights_metadata

    for constant in get_weights_metadata(package, weight_threshold=0).values():
        uses = [use for use in constant.child_ops if use.op_type in _LAYERS]
        if uses and constant.val.dtype.kind == "f":
            yield torch.from_numpy(constant.val).double()


def _kind(node: Node) -> str:
    """What Core ML calls the layer that a node is; empty for everything else."""
    return _KINDS.get(str(getattr(node.target, "overloadpacket", "")).removeprefix("aten."), "")


def _parameters(program: ExportedProgram) -> Iterator[Tensor]:
    """The kernels and biases of a program's layers."""
    signature = program.graph_signature
    paths = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    layers = [node for node in program.graph.nodes if _kind(node) in _LAYERS]
    for name in dict.fromkeys(source.name for node in layers for source in node.all_input_nodes):
        if name in paths:
            yield program.state_dict[paths[name]].detach().cpu().double()


def _compare_weights(expected: list[Tensor], found: list[Tensor], tolerance: float) -> Comparison:
    """Find every tensor among the written ones, which have lost their names and order; equal ones are written once."""
    largest, lost = 0.0, 0
    for tensor in expected:
        scale = tensor.abs().max().item() or 1.0
        closest = float("inf")
        for other in found:
            if other.shape == tensor.shape:
                closest = min(closest, (other - tensor).abs().max().item() / scale)
                if closest <= tolerance:
                    break
        lost += closest > tolerance
        largest = max(largest, closest)
    comparison = Comparison(largest, tolerance, len(expected))
    if lost:
        raise VerificationError(
            f"{lost} of {len(expected)} weights and biases are not in the file as in the model ({comparison}); "
            "Core ML folds norms and factors itself, so give it what reparam.compile returned",
            comparison,
        )
    return comparison

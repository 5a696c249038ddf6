"""Random ONNX graphs, before and after, in ONNX's own reference implementation and double precision."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnx_ir")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from onnx.reference import ReferenceEvaluator  # noqa: E402
from onnx.reference.op_run import OpRun  # noqa: E402

from reparam.onnx import fuse_onnx  # noqa: E402

Draw = Any
SIZE = 11


class Builder:
    """A graph that grows by one operator at a time; it knows the channels of what it has made, but no sizes."""

    def __init__(self, draw: Draw, opset: int) -> None:
        self.draw = draw
        self.opset = opset
        self.rng = np.random.default_rng(draw(st.integers(0, 2**16)))
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.count = 0

    def constant(self, array: Any, dtype: Any = np.float64) -> str:
        """An initializer, or a chain of nodes on one, as exporters that fold nothing leave them."""
        array = np.asarray(array, dtype)
        self.count += 1
        name = f"block.{self.count}.weight"
        chain = self.draw(st.sampled_from(["plain"] * 4 + ["identity", "node"]))
        if chain == "node":
            return self.add("Constant", [], value=numpy_helper.from_array(array))
        self.constants.append(numpy_helper.from_array(array, name))
        return self.add("Identity", [name]) if chain == "identity" else name

    def random(self, *shape: int) -> str:
        return self.constant(self.rng.standard_normal(shape))

    def add(self, op: str, inputs: list[str], outputs: int = 1, **attributes: Any) -> str:
        self.count += 1
        names = [f"value{self.count}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(op, inputs, names, name=f"{op}_{self.count}", **attributes))
        return names[0]

    def axes(self, op: str, x: str, axes: list[int], since: int, **attributes: Any) -> str:
        """An operator whose axes are an attribute, or from some operator set on an input."""
        if self.opset >= since:
            return self.add(op, [x, self.constant(axes, np.int64)], **attributes)
        return self.add(op, [x], axes=axes, **attributes)

    # Operators.

    def window(self, kernel: list[int], strided: bool = True, dilated: bool = True) -> dict[str, Any]:
        draw, space = self.draw, len(kernel)
        stride = [draw(st.integers(1, 2)) for _ in kernel] if strided else [1] * space
        dilation = [draw(st.integers(1, 2)) for _ in kernel] if dilated else [1] * space
        mode = draw(st.sampled_from(["pads", "pads", "none", "SAME_UPPER", "SAME_LOWER", "VALID"]))
        found: dict[str, Any] = {"strides": stride} if strided else {}
        if dilated:
            found["dilations"] = dilation
        if mode == "pads":
            found["pads"] = [draw(st.integers(0, k // 2)) for k in kernel * 2]
        elif mode.startswith("SAME"):
            found.pop("strides", None)
            found.pop("dilations", None)  # the reference does not know both
        if mode not in ("pads", "none"):
            found["auto_pad"] = mode
        return found

    def conv(self, x: str, c: int, out: int | None = None, **geometry: Any) -> tuple[str, int]:
        draw = self.draw
        groups = draw(st.sampled_from([g for g in (1, 2, 4) if c % g == 0]))
        out = groups * draw(st.integers(1, 2)) if out is None else out
        groups = groups if out % groups == 0 else 1
        kernel = geometry.pop("kernel", None) or [draw(st.integers(1, 3)), draw(st.integers(1, 3))]
        geometry = geometry or self.window(kernel)
        bias = [self.random(out)] if draw(st.booleans()) else []
        weight = self.random(out, c // groups, *kernel)
        return self.add("Conv", [x, weight, *bias], group=groups, **geometry), out

    def transposed(self, x: str, c: int) -> tuple[str, int]:
        draw = self.draw
        kernel, stride = [draw(st.integers(1, 3)) for _ in "hw"], [draw(st.integers(1, 2)) for _ in "hw"]
        pads = [draw(st.integers(0, k - 1)) for k in kernel * 2]
        out = draw(st.integers(1, 3))
        found = self.add(
            "ConvTranspose", [x, self.random(c, out, *kernel), self.random(out)], strides=stride, pads=pads
        )
        return found, out

    def norm(self, x: str, c: int) -> tuple[str, int]:
        parameters = [self.random(c), self.random(c), self.random(c), self.constant(self.rng.uniform(0.5, 1.5, c))]
        return self.add("BatchNormalization", [x, *parameters], epsilon=self.draw(st.sampled_from([1e-5, 1e-2]))), c

    def arithmetic(self, x: str, c: int) -> tuple[str, int]:
        op = self.draw(st.sampled_from(["Add", "Sub", "Mul", "Div"]))
        shape = self.draw(st.sampled_from([(), (1,), (c, 1, 1), (1, c, 1, 1)]))
        pair = [x, self.constant(self.rng.uniform(0.5, 1.5, shape))]
        swapped = op != "Div" and self.draw(st.booleans())
        return self.add(op, pair[::-1] if swapped else pair), c

    def branches(self, x: str, c: int) -> tuple[str, int]:
        """A block as networks are trained with: 3x3, 1x1 and identity, each with its norm, summed up."""
        three = self.norm(*self.conv(x, c, c, kernel=[3, 3], pads=[1, 1, 1, 1]))[0]
        one = self.norm(*self.conv(x, c, c, kernel=[1, 1], strides=[1, 1]))[0]
        identity = self.norm(x, c)[0]
        how = self.draw(st.sampled_from(["Add", "Sum", "Mean", "Sub", "Concat"]))
        if how in ("Sum", "Mean"):
            return self.add(how, [three, one, identity]), c
        if how == "Concat":
            return self.add(how, [three, one], axis=1), 2 * c
        return self.add(how, [self.add("Add", [three, one]), identity]), c

    def pad(self, x: str, c: int) -> tuple[str, int]:
        mode = self.draw(st.sampled_from(["constant", "constant", "reflect", "edge"]))
        amounts = [
            0,
            0,
            *(self.draw(st.integers(0, 2)) for _ in "hw"),
            0,
            0,
            *(self.draw(st.integers(0, 2)) for _ in "hw"),
        ]
        value = self.draw(st.sampled_from([0.0, 0.0, 1.5])) if mode == "constant" else 0.0
        if self.opset < 11:
            return self.add("Pad", [x], pads=amounts, mode=mode, value=value), c
        more = [self.constant(value)] if value else []
        return self.add("Pad", [x, self.constant(amounts, np.int64), *more], mode=mode), c

    def pool(self, x: str, c: int) -> tuple[str, int]:
        op = self.draw(st.sampled_from(["AveragePool", "AveragePool", "MaxPool"]))
        kernel = [self.draw(st.integers(1, 3)) for _ in "hw"]
        pads = [self.draw(st.integers(0, k // 2)) for k in kernel]
        more = {"count_include_pad": self.draw(st.integers(0, 1))} if op == "AveragePool" else {}
        stride = [self.draw(st.integers(1, 2)) for _ in "hw"]
        return self.add(op, [x], kernel_shape=kernel, strides=stride, pads=pads * 2, **more), c

    def plain(self, x: str, c: int) -> tuple[str, int]:
        return self.add(self.draw(st.sampled_from(["Identity", "Neg", "Relu", "Dropout"])), [x]), c

    def crop(self, x: str, c: int) -> tuple[str, int]:
        starts, ends = (
            [self.draw(st.integers(0, 1)) for _ in "hw"],
            [self.draw(st.sampled_from([-1, 2**62])) for _ in "hw"],
        )
        inputs = [x, *(self.constant(value, np.int64) for value in (starts, ends, [2, 3]))]
        return (self.add("Slice", inputs) if self.opset >= 10 else x), c

    # Ends.

    def flat(self, x: str, c: int) -> str:
        """A classifier: means, views, matrix products, norms of features."""
        draw = self.draw
        pooled = [
            lambda: self.add("Flatten", [self.add("GlobalAveragePool", [x])]),
            lambda: self.axes("ReduceMean", x, [2, 3], 18, keepdims=0),
            lambda: self.axes("Squeeze", self.add("GlobalAveragePool", [x]), [2, 3], 13),
            lambda: self.add("Reshape", [self.add("GlobalAveragePool", [x]), self.constant([0, -1], np.int64)]),
        ]
        features = draw(st.sampled_from(pooled))()
        if draw(st.booleans()):
            features = self.norm(features, c)[0]
        width = draw(st.integers(1, 3))
        turned = draw(st.integers(0, 1))
        weight = self.random(*((width, c) if turned else (c, width)))
        more = [self.random(*draw(st.sampled_from([(width,), (1, width), (1,)])))] if draw(st.booleans()) else []
        if self.opset < 11 and not more:
            more = [self.random(width)]
        match draw(st.sampled_from(["Gemm", "MatMul"])):
            case "Gemm":
                scales = {"alpha": draw(st.sampled_from([1.0, 0.5])), "beta": draw(st.sampled_from([1.0, 2.0]))}
                features = self.add("Gemm", [features, weight, *more], transB=turned, **scales)
            case _:
                features = self.add("MatMul", [features, self.random(c, width)])
                features = self.add("Add", [features, self.random(width)])
        return self.norm(features, width)[0] if draw(st.booleans()) else features

    def tokens(self, x: str, c: int) -> str:
        """Pixels as tokens: a reshape by the sizes of the input, a permutation, a matrix product."""
        sizes = self.add("Shape", [x])
        batch = self.add("Gather", [sizes, self.constant([0], np.int64)], axis=0)
        shape = self.add("Concat", [batch, self.constant([c, -1], np.int64)], axis=0)
        rows = self.add("Transpose", [self.add("Reshape", [x, shape])], perm=[0, 2, 1])
        return self.add("Add", [self.add("MatMul", [rows, self.random(c, 3)]), self.random(3)])


@st.composite
def models(draw: Draw) -> Any:
    opset = draw(st.sampled_from([9, 11, 13, 17, 21]))
    builder = Builder(draw, opset)
    c = draw(st.integers(1, 4))
    x, first = "x", c
    steps = [
        builder.conv, builder.conv, builder.norm, builder.norm, builder.arithmetic, builder.branches, builder.pad,
        builder.pool, builder.plain, builder.crop, builder.transposed,
    ]  # fmt: skip
    taps = []
    for _ in range(draw(st.integers(1, 6))):
        x, c = draw(st.sampled_from(steps))(x, c)
        if draw(st.integers(0, 9)) == 0:
            taps.append(x)
    end = draw(st.sampled_from(["image", "flat", "tokens"]))
    x = x if end == "image" else getattr(builder, end)(x, c)
    ranks = {x: [None] * {"image": 4, "flat": 2, "tokens": 3}[end]}
    outputs = [name for name in dict.fromkeys([*taps, x]) if name != "x"] or [builder.add("Identity", ["x"])]
    graph = helper.make_graph(
        builder.nodes,
        "random",
        [helper.make_tensor_value_info("x", TensorProto.DOUBLE, ["n", first, SIZE, SIZE])],
        [helper.make_tensor_value_info(name, TensorProto.DOUBLE, ranks.get(name, [None] * 4)) for name in outputs],
        builder.constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


class BatchNormalization(OpRun):
    """Inference: before operator set 14, the reference takes every norm for one that trains."""

    op_domain = ""

    def _run(self, x: Any, scale: Any, bias: Any, mean: Any, var: Any, epsilon: float = 1e-5, **_: Any) -> tuple[Any]:
        scale, bias, mean, var = (v.reshape(-1, *[1] * (x.ndim - 2)) for v in (scale, bias, mean, var))
        return (scale * (x - mean) / np.sqrt(var + epsilon) + bias,)


def run(model: Any, x: Any) -> list[Any]:
    return list(ReferenceEvaluator(model, new_ops=[BatchNormalization]).run(None, {"x": x}))


@given(models())
@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
def test_a_fused_graph_computes_the_same(model: Any) -> None:
    """Every operator that is understood, with every attribute, to 1e-9 in double precision."""
    x = np.random.default_rng(0).standard_normal(
        (2, model.graph.input[0].type.tensor_type.shape.dim[1].dim_value, SIZE, SIZE)
    )
    try:
        expected = run(model, x)
    except Exception:  # a window larger than what is left of the image
        event("does not run")
        return
    if any(value.size == 0 for value in expected):
        return
    before = model.SerializeToString()
    fused = fuse_onnx(model, verify=False)
    assert model.SerializeToString() == before
    onnx.checker.check_model(fused.model)
    assert [output.name for output in fused.model.graph.output] == [output.name for output in model.graph.output]
    for old, new in zip(expected, run(fused.model, x), strict=True):
        assert old.shape == new.shape
        np.testing.assert_allclose(new, old, rtol=0, atol=1e-9 * max(1.0, np.abs(old).max()))
    event(f"{len(fused.report.fused)} rewrites")

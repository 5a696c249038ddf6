"""Graphs by ``torch.export``, for models whose Python torch.fx cannot trace; and exported programs themselves.

Export runs a model on example inputs with symbolic sizes, so Python that depends on sizes becomes a graph, with guards
where it took a decision. The operators are ATen's; here they are said in the words of ``torch`` and
``torch.nn.functional`` again, so that everything after capture reads one language only.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import io
import logging
import operator
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
import torch.fx
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx import Graph, Node

from reparam import aliasing, aten, facts, parameters
from reparam.capture import Capture, keeps_state, private_copy, tensor_storages, unchanged
from reparam.constants import fold
from reparam.errors import CaptureError
from reparam.report import Remark
from reparam.verify import compare, run

# What the arguments of :class:`_Flat` are called in guards, without and with Dynamo.
_FLAT_NAMES = ("tensors", "flat_args")

_CONFIG: Any = torch.fx.experimental._config

Call: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]


class _Flat(nn.Module):
    """A model as a function of the tensors among its arguments; everything else about the call is fixed."""

    def __init__(self, model: nn.Module, call: Call) -> None:
        super().__init__()
        self.model = model
        leaves, self.spec = pytree.tree_flatten(call)
        self.fixed = [None if isinstance(leaf, Tensor) else (leaf,) for leaf in leaves]
        self.tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def forward(self, *tensors: Tensor) -> Any:
        given = iter(tensors)
        leaves = [next(given) if fixed is None else fixed[0] for fixed in self.fixed]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return self.model(*args, **kwargs)


def capture(model: nn.Module, call: Call) -> Capture:
    """Capture a model by exporting it.

    Every size is free that the model's Python leaves free. A graph that holds for some batch sizes only is none.

    Args:
        model: Any module in eval mode; it is copied, its tensors are not.
        call: Positional and keyword arguments of an example call.

    Raises:
        CaptureError: It cannot be exported, or not for every batch size; the message is the reason.
    """
    root = private_copy(model)
    parameters.settle(root)
    if keeps_state(root, lambda: run(root, *call)):
        # Which export would leave out without a word.
        raise CaptureError("it keeps something from one call to the next")
    flat = _Flat(root, call).eval()
    program, is_sure = _export(flat)
    builder = _Builder(root, program, prefix="model.")
    builder.inputs(call)
    captured = builder.finish()
    if not is_sure or builder.forbids_one:
        _check_batch_of_one(model, captured, call)
    return captured


def _check_batch_of_one(model: nn.Module, captured: Capture, call: Call) -> None:
    """Compare the graph with the model on the first of every batch.

    Raises:
        CaptureError: They disagree, or only one of them runs.
    """
    batch = next((leaf.shape[0] for leaf in pytree.tree_leaves(call) if isinstance(leaf, Tensor) and leaf.dim()), 0)
    args, kwargs = pytree.tree_map_only(Tensor, lambda x: x[:1] if x.shape[:1] == (batch,) else x, call)
    try:
        with unchanged(model):
            expected = run(model, args, kwargs)
    except Exception:  # the model itself takes no such batch
        return
    try:
        compare(expected, run(torch.fx.GraphModule(captured.root, captured.graph), args, kwargs))
    except Exception as error:
        raise CaptureError(f"its graph does not hold for a batch of one: {error}") from error


def read(program: ExportedProgram) -> tuple[nn.Module, Capture, Call]:
    """Capture an exported program.

    Returns:
        The program as a module, its capture, and the call that it was exported with.

    Raises:
        CaptureError: It has no example inputs, trains, or needs what no graph of ours can say.
    """
    if program.example_inputs is None:
        raise CaptureError("the exported program has no example inputs; export it again with them")
    module = program.module()
    args, kwargs = program.example_inputs
    root = private_copy(module)
    builder = _Builder(root, program)
    builder.inputs((tuple(args), dict(kwargs)))
    try:
        return module, builder.finish(batches=False), (tuple(args), dict(kwargs))
    except CaptureError as error:
        raise CaptureError(f"the exported program cannot be compiled: {error}") from error


def _export(flat: _Flat) -> tuple[ExportedProgram, bool]:
    """Export a model, and say whether export was told that sizes may be 0 or 1.

    It otherwise takes them to be impossible without a word; but not every model can be exported so. Dynamo, which is
    stricter about Python, comes last.
    """
    shapes = (tuple(dict.fromkeys(range(tensor.dim()), Dim.AUTO) for tensor in flat.tensors),)
    failures = []
    for is_sure, strict in ((True, False), (False, False), (False, True)):
        settings = _CONFIG.patch(backed_size_oblivious=is_sure)
        try:
            with torch.no_grad(), _silence(), settings:
                tensors = tuple(tensor.clone() for tensor in flat.tensors)
                return torch.export.export(flat, tensors, dynamic_shapes=shapes, strict=strict), is_sure
        except Exception as error:  # whatever the model's Python, or export itself, makes of symbolic sizes
            failures.append(next(iter(str(error).strip().splitlines()), type(error).__name__))
    raise CaptureError(f"it cannot be exported: {failures[0]}")


@contextmanager
def _silence() -> Iterator[None]:
    """Without what export has to say of a model that is then read in another way."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stderr(io.StringIO()),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


class _Builder:
    """Builds our graph of an exported program."""

    def __init__(self, root: nn.Module, program: ExportedProgram, prefix: str = "") -> None:
        self.root = root
        self.program = program
        self.prefix = prefix
        self.graph = Graph()
        self.modules = dict(root.named_modules())
        self.storages = tensor_storages(self.modules.values())
        self.remarks: list[Remark] = []
        self.tensors: list[Node] = []
        self.sources: dict[str, Node] = {}
        self.values: dict[Node, Any] = {}
        self.forbids_one = False

    def inputs(self, call: Call) -> None:
        """Placeholders under the names of the model's arguments, and the tensors in them in the order of export."""
        args, kwargs = call
        signature = inspect.signature(self.root.forward)
        given = signature.bind(*args, **kwargs).arguments
        places: dict[int, Node] = {}
        for name, parameter in signature.parameters.items():
            stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")  # type: ignore[call-overload]
            default = () if stars or parameter.default is parameter.empty else (parameter.default,)
            node = self._new("placeholder", stars + name, default)
            if name in given or not stars:
                self._open(node, given.get(name, parameter.default), places)
        leaves = [leaf for leaf in pytree.tree_leaves(call) if isinstance(leaf, Tensor)]
        self.tensors = [places[id(leaf)] for leaf in leaves]
        # What guards call them.
        self.sources = {
            f"L['{name}'][{index}]": node for index, node in enumerate(self.tensors) for name in _FLAT_NAMES
        }
        self.sources |= {f"L['{node.target}']": node for node in self.tensors if node.op == "placeholder"}

    def _open(self, node: Node, value: Any, places: dict[int, Node]) -> None:
        """Find the tensors in an argument; what is no tensor must be as it was."""
        if isinstance(value, Tensor):
            places[id(value)] = node
        elif isinstance(value, (tuple, list, dict)):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            for key, item in items:
                if pytree.tree_any(lambda leaf: isinstance(leaf, Tensor), item):
                    self._open(self._new("call_function", operator.getitem, (node, key)), item, places)
        elif value is None or isinstance(value, (bool, int, float, str)):
            node.meta["kind"] = "other"
            same = self._new("call_function", operator.is_ if value is None else operator.eq, (node, value))
            same.meta["kind"] = "other"
            self._new("call_function", torch._assert, (same, f"{node.target} was {value!r} when this was compiled"))
        else:
            raise CaptureError(f"its argument {node.target} is a {type(value).__name__}")

    def finish(self, batches: bool = True) -> Capture:
        """Everything after the inputs. The graph has to hold for batches of any size, unless told otherwise."""
        self._guards(batches)
        signature = self.program.graph_signature
        if any(spec.kind is not OutputKind.USER_OUTPUT for spec in signature.output_specs):
            raise CaptureError("it changes its own tensors, or its inputs")
        specs = {spec.arg.name: spec for spec in signature.input_specs}
        user = iter(self.tensors)
        for node in self.program.graph.nodes:
            match node.op:
                case "placeholder" if specs[node.name].kind is InputKind.USER_INPUT:
                    self.values[node] = next(user)
                case "placeholder":
                    if node.users:
                        self.values[node] = self._constant(specs[node.name])
                case "call_function":
                    self._call(node)
                case "output":
                    self._output(node)
                case _:
                    raise CaptureError(f"it needs {node.op} {node.target}")
        memory = aliasing.memory(self.graph, self.modules)
        for node in self.graph.nodes:
            changed = aliasing.written(node, self.modules)
            if changed is not None and any(base.op == "get_attr" for base in memory[changed]):
                raise CaptureError("it writes to its own tensors, as models in training do; export it in eval mode")
        fold(self.graph, self.root, self.modules, self.storages)
        return Capture(self.root, self.graph, self.modules, self.storages, self.remarks)

    def _new(self, op: str, target: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Node:
        node = self.graph.create_node(op, target, args, kwargs or {})
        node.meta["scope"] = ""
        facts.note(node)
        return node

    def _constant(self, spec: Any) -> Node:
        if spec.kind not in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
            raise CaptureError(f"it needs a {spec.kind.name}")
        path = str(spec.target)
        value: Any = self.program.constants.get(path)
        path = path.removeprefix(self.prefix)
        owner, _, name = path.rpartition(".")
        if owner not in self.modules or not isinstance(getattr(self.modules[owner], name, None), Tensor):
            if not isinstance(value, Tensor):
                raise CaptureError(f"it has no tensor {path}")
            path = f"_{path.replace('.', '_')}"
            self.root.__dict__[path] = value
        node = self._new("get_attr", path)
        owner, _, name = path.rpartition(".")
        tensor = getattr(self.modules[owner], name)
        node.meta.update(rank=tensor.dim(), shape=tuple(tensor.shape))
        return node

    def _call(self, node: Node) -> None:
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), self.values.__getitem__)
        target: Any = node.target
        if isinstance(target, torch._ops.HigherOrderOperator):
            raise CaptureError(f"it needs {target}")
        if aten.is_check(target):
            return
        rank = len(node.args[0].meta["val"].shape) if aten.is_slice(target) else None  # type: ignore[union-attr]
        op, target, args, kwargs = aten.said(target, args, kwargs, rank)
        made = self._new(op, target, tuple(args), dict(kwargs))
        made.meta["scope"] = self._scope(node)
        self.values[node] = made

    def _scope(self, node: Node) -> str:
        """Path of the innermost module that a node ran in."""
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        path = str(stack[-1][0]) if stack else ""
        # Later calls of a module are numbered.
        path = re.sub(r"@\d+", "", path.removeprefix("L['self'].")) + "."
        return path.removeprefix(self.prefix).rstrip(".")

    def _output(self, node: Node) -> None:
        leaves: Any = torch.fx.map_arg(node.args[0], self.values.__getitem__)
        value = pytree.tree_unflatten(list(leaves), self.program.call_spec.out_spec)
        if not _is_plain(value):
            raise CaptureError(f"it returns a {type(value).__name__}")
        self._new("output", "output", (value,))

    # Guards.

    def _guards(self, batches: bool) -> None:
        """Check, at every call, what export found that the graph depends on."""
        for text in getattr(self.program, "_guards_code", None) or []:
            guard = ast.parse(text.strip(), mode="eval").body
            axes = list(_sizes(guard))
            if batches and _forbids_one(guard):
                # Mostly export's own thoughts about strides; running a batch of one will tell.
                self.forbids_one = True
                continue
            if batches and any(axis == 0 for _, axis in axes) and not _is_same_size(guard):
                raise CaptureError(f"its graph holds for some batch sizes only ({self._readable(text)})")
            if _fixes_channels(guard):
                # What reads the input says so itself.
                continue
            said = self._readable(text)
            condition = self._value(guard)
            self._new("call_function", torch._assert, (condition, f"this was compiled for inputs where {said}"))
            self.remarks.append(Remark("capture", "Export", "", f"only for inputs where {said}"))

    def _readable(self, text: str) -> str:
        """A guard in the user's terms."""
        for source, node in self.sources.items():
            text = text.replace(source, node.name)
        return text.strip().replace(".size()", ".shape")

    def _value(self, expression: ast.expr) -> Any:
        """The node that computes a guard, or a part of one."""
        match expression:
            case ast.Constant(value=value):
                return value
            case ast.Compare(left=left, ops=[sign], comparators=[right]):
                return self._apply(_SIGNS[type(sign)], left, right)
            case ast.BinOp(left=left, op=sign, right=right):
                return self._apply(_SIGNS[type(sign)], left, right)
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int(value))):
                return -value
            case ast.Subscript() if (size := _size(expression)) is not None and size[0] in self.sources:
                return self._new("call_method", "size", (self.sources[size[0]], size[1]))
        raise CaptureError(f"its graph depends on {ast.unparse(expression)}")

    def _apply(self, function: Callable[..., Any], *operands: ast.expr) -> Node:
        node = self._new("call_function", function, tuple(map(self._value, operands)))
        node.meta["kind"] = "other"
        return node


_SIGNS: dict[Any, Callable[..., Any]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt,
    ast.GtE: operator.ge, ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow,
}  # fmt: skip


def _size(expression: ast.AST) -> tuple[str, int] | None:
    """Which input's size along which axis an expression such as ``L['tensors'][0].size()[1]`` is."""
    match expression:
        case ast.Subscript(
            value=ast.Call(func=ast.Attribute(value=source, attr="size")), slice=ast.Constant(value=int(axis))
        ):
            return ast.unparse(source), axis
    return None


def _sizes(expression: ast.AST) -> Iterable[tuple[str, int]]:
    return [size for part in ast.walk(expression) if (size := _size(part)) is not None]


def _is_same_size(guard: ast.expr) -> bool:
    """Whether a guard says that two sizes are the same, as those of batches that belong together are."""
    match guard:
        case ast.Compare(left=left, ops=[ast.Eq()], comparators=[right]):
            return _size(left) is not None and _size(right) is not None
    return False


def _forbids_one(guard: ast.expr) -> bool:
    """Whether a guard holds for all batches but those of one, or none."""
    match guard:
        case (
            ast.Compare(left=left, ops=[ast.NotEq()], comparators=[ast.Constant(value=0 | 1)])
            | ast.Compare(left=left, ops=[ast.Gt()], comparators=[ast.Constant(value=0 | 1)])
            | ast.Compare(left=ast.Constant(value=0 | 1), ops=[ast.Lt()], comparators=[left])
            | ast.Compare(left=left, ops=[ast.GtE()], comparators=[ast.Constant(value=1 | 2)])
        ):
            size = _size(left)
            return size is not None and size[1] == 0
    return False


def _fixes_channels(guard: ast.expr) -> bool:
    match guard:
        case ast.Compare(left=left, ops=[ast.Eq()], comparators=[ast.Constant()]):
            size = _size(left)
            return size is not None and size[1] == 1
    return False


def _is_plain(value: Any) -> bool:
    """Whether torch.fx returns a structure as it is."""
    if type(value) is dict:
        return all(map(_is_plain, value.values()))
    if isinstance(value, tuple) or type(value) is list:
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (Node, bool, int, float, str))

"""What compiling returns: a graph module with a report."""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from reparam import capture as capturing
from reparam.graph.conditions import check_call, explained
from reparam.graph.outputs import Rebuild
from reparam.report import Report


class CompiledModel(torch.fx.GraphModule):
    """A deploy graph: plain layers under the paths of the modules that they replaced.

    Attributes:
        report: What the compiler did.
    """

    # What TorchScript need not understand.
    __jit_unused_properties__ = [*torch.fx.GraphModule.__jit_unused_properties__, "report"]  # noqa: RUF012

    @property
    def report(self) -> Report:
        """What the compiler did; an AttributeError for a model that came from a file."""
        if "reparam" not in self.meta:
            raise AttributeError(f"{type(self).__name__} has no report: it was not compiled just now")
        report: Report = self.meta["reparam"]
        return report

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As of ``nn.Module``, for a call of the kind that was compiled.

        Raises:
            ConditionError: It is of another.
        """
        check_call(self.meta.get("arguments", ()), args, kwargs)
        with explained():
            return super().__call__(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        meta = self.__dict__.get("meta", {})
        if name in meta.get("attributes", ()):
            return meta["attributes"][name]
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            if name not in meta.get("lost", ()):
                raise
            raise AttributeError(
                f"the compiled graph has no {name!r}, which the model had; compile with keep_python=True for a copy of "
                "the model itself, with all its methods and attributes, in which every part that can be is compiled"
            ) from error

    def recompile(self) -> Any:
        """As of ``GraphModule``; what runs does the same as ``code``, but finds its layers sooner."""
        code = super().recompile()
        type(self).forward = _finding_layers_directly(type(self).forward, code.src, self.graph)
        return code

    def __copy__(self) -> CompiledModel:
        return self._like(CompiledModel(self, self.graph, type(self).__name__), self.__dict__)

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledModel:
        twin: CompiledModel = super().__deepcopy__(memo)  # type: ignore[assignment]
        # Those of a forward are not among what torch.fx copies.
        capturing.move_hooks(copy.deepcopy(self.__dict__, memo), twin)
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        restore, arguments = super().__reduce__()
        attributes = self.meta.get("attributes", {})
        portable = {name: value for name, value in attributes.items() if _is_plain(value)}
        return _restore, (restore, ({**arguments[0], "meta": {**self.meta, "attributes": portable}}, *arguments[1:]))

    def rebuilt(self, graph: torch.fx.Graph, used: Mapping[str, Any]) -> CompiledModel:
        """A model of another graph, with all that this one has beside its graph.

        Args:
            graph: What it runs.
            used: Module or tensor for every name that the graph uses.
        """
        attributes = {**self.__dict__, "meta": dict(self.meta)}
        return self._like(CompiledModel(dict(used), graph, type(self).__name__), attributes)

    @staticmethod
    def _like(twin: CompiledModel, attributes: Mapping[str, Any]) -> CompiledModel:
        """Give a graph module of the same layers the rest of what a compiled model has."""
        twin.meta = attributes["meta"]
        capturing.move_hooks(attributes, twin)
        for module in twin.modules():
            module.training = False
        return twin


def keep_attributes(compiled: CompiledModel, model: nn.Module) -> None:
    """Carry over what a model holds besides layers, tensors and hooks, and note what it had besides.

    Args:
        compiled: What the model was compiled to.
        model: A private copy of the model.
    """
    held = {key: value for key, value in vars(model).items() if key not in _OWN and not isinstance(value, Tensor)}
    compiled.meta["attributes"] = {k: v for k, v in held.items() if k != "forward" and not _holds_layers(v)}
    compiled.meta["lost"] = frozenset({*dir(type(model)), *held, *model._modules} - set(dir(torch.fx.GraphModule)))


_OWN = frozenset(nn.Module().__dict__)
_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)


def _is_plain(value: Any) -> bool:
    if type(value) is dict:
        return all(map(_is_plain, [*value, *value.values()]))
    return all(map(_is_plain, value)) if type(value) in (tuple, list, set) else type(value) in _PLAIN


def _holds_layers(value: Any, seen: tuple[int, ...] = ()) -> bool:
    """Whether a value holds a module, a tensor, or a function that might."""
    if _is_plain(value) or id(value) in seen:
        return False
    if isinstance(value, (nn.Module, Tensor)) or inspect.isroutine(value):
        return True
    inner = [*value, *value.values()] if isinstance(value, Mapping) else []
    inner += value if isinstance(value, (tuple, list, set, frozenset)) else []
    return any(_holds_layers(item, (*seen, id(value))) for item in [*inner, *getattr(value, "__dict__", {}).values()])


def _restore(restore: Callable[..., torch.fx.GraphModule], arguments: tuple[Any, ...]) -> CompiledModel:
    """A compiled model from its pickle: torch's own restoring gives a plain graph module."""
    plain = restore(*arguments)
    return CompiledModel._like(CompiledModel(plain, plain.graph, plain._get_name()), arguments[0])


def _finding_layers_directly(forward: Any, source: str, graph: torch.fx.Graph) -> Any:
    """A generated function that looks layers up in ``_modules``, where its source names attributes.

    ``self.stages.blocks.conv(x)`` calls ``nn.Module.__getattr__`` three times, which is several percent of the time of
    a small network. File name and lines stay those of the source, for tracebacks and for TorchScript, which reads it.

    Args:
        forward: What torch.fx generated.
        source: Its source.
        graph: What that was generated from.
    """
    pieces, end = [], 0
    for node in graph.nodes:
        if node.op == "call_module":
            named = f" = {_attributes(str(node.target))}("
            start = source.find(named, end)
            if start >= 0:
                pieces += [source[end:start], f" = {_lookups(str(node.target))}("]
                end = start + len(named)
    namespace = dict(forward.__globals__)
    code = compile("".join([*pieces, source[end:]]), forward.__code__.co_filename, "exec", dont_inherit=True)
    exec(code, namespace)
    return namespace[forward.__name__]


def _attributes(path: str) -> str:
    """How torch.fx writes the module at a path: ``getattr(self.stages, "0").conv``."""
    written = "self"
    for name in path.split("."):
        written = f"{written}.{name}" if name.isidentifier() else f'getattr({written}, "{name}")'
    return written


def _lookups(path: str) -> str:
    return "self" + "".join(f"._modules[{name!r}]" for name in path.split("."))


def install(module: nn.Module, compiled: CompiledModel) -> None:
    """Let a module compute what a graph computes, and be itself in all else: of its class, with its attributes.

    Args:
        module: Gets the layers of the graph in the place of its own, sealed.
        compiled: The graph.
    """
    own = set(module.modules())
    module.__dict__["forward"] = GraphForward(module, compiled)
    module.__dict__["_modules"] = _sealed(compiled, own)
    for name in ("_parameters", "_buffers"):
        module.__dict__[name] = compiled.__dict__[name]


def _sealed(holder: nn.Module, own: set[nn.Module]) -> Sealed:
    """The children of a graph, where those that the module had not can be seen, but not taken out by name."""
    children: dict[str, Any] = {}
    for name, child in holder._modules.items():
        if type(child) is nn.Module:  # where torch.fx holds layers
            container = nn.Module()
            container.training = False
            container.__dict__["_modules"] = _sealed(child, own)
            container.__dict__["_buffers"], container.__dict__["_parameters"] = child._buffers, child._parameters
            children[name] = container
        else:
            children[name] = child
    return Sealed(children, frozenset(name for name, child in children.items() if child not in own))


class Sealed(dict[str, Any]):
    """Modules by name. Those that compiling has made are no longer what a model's Python that asks for them expects.

    To Python they are not there, so a package's own conversion, which looks for layers that it knows, finds none that
    are left to convert. torch itself, which exports, draws and loads modules by their names, gets them. None can be put
    in the place of another: the graph would go on with the one that it has.

    Attributes:
        made: Their names.
    """

    def __init__(self, modules: Mapping[str, Any] = {}, made: frozenset[str] = frozenset()) -> None:
        super().__init__(modules)
        self.made = made

    def __getitem__(self, name: str) -> Any:
        if name in self.made and not _is_asked_by_torch():
            self._refuse(name)
        return super().__getitem__(name)

    def items(self) -> Any:
        """All, unless it is for the code of a model that goes through a sequence."""
        self._refuse_to_hand_on()
        return super().items()

    def values(self) -> Any:
        """The modules; likewise."""
        self._refuse_to_hand_on()
        return super().values()

    def __setitem__(self, name: str, module: Any) -> None:
        if name in self:
            raise AttributeError(f"{name!r} cannot be exchanged: this computes by a graph; do so before compiling")
        super().__setitem__(name, module)

    def __delitem__(self, name: str) -> None:
        self[name] = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Sealed, (dict(super().items()), self.made)

    def _refuse_to_hand_on(self) -> None:
        if self.made and sys._getframe(2).f_code in _HANDED_ON:
            self._refuse(min(self.made))

    def _refuse(self, name: str) -> None:
        said = f"{name!r} was fused with others, or replaced, when this was compiled, and is not what it was before"
        raise AttributeError(said)


# Where torch hands the children of a sequence to the code of a model.
_HANDED_ON = frozenset(getattr(nn.Sequential, name).__code__ for name in ("__getitem__", "__iter__", "__add__"))


def _is_asked_by_torch() -> bool:
    """Whether torch asks for a child of a module, and not the code of a model."""
    frame: FrameType | None = sys._getframe(2)
    if frame is not None and frame.f_code is nn.Module.__getattr__.__code__:
        frame = frame.f_back
    return frame is not None and str(frame.f_globals.get("__name__")).startswith("torch.")


class GraphForward:
    """The ``forward`` of one module, by a graph.

    Attributes:
        owner: The module.
        compiled: The graph, of whose layers the owner has those at the root, too.
    """

    def __init__(self, owner: nn.Module, compiled: CompiledModel) -> None:
        self.owner, self.compiled = owner, compiled

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the graph computes."""
        owner, compiled = self.owner.__dict__, self.compiled.__dict__
        if compiled["_buffers"] is not owner["_buffers"]:  # after copying
            compiled["_buffers"], compiled["_parameters"] = owner["_buffers"], owner["_parameters"]
        check_call(compiled["meta"].get("arguments", ()), args, kwargs)
        with explained():
            return self.compiled.forward(*args, **kwargs)


def with_plain_outputs(model: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """A model that returns dicts, lists and tuples where its graph rebuilds other classes: what no file can hold.

    Args:
        model: Any graph; itself where it rebuilds nothing.
    """
    rebuilt = [node for node in model.graph.nodes if node.op == "call_module" and _is_rebuild(model, node)]
    if not rebuilt:
        return model
    graph = torch.fx.Graph()
    values: dict[torch.fx.Node, Any] = {}
    for node in model.graph.nodes:
        if node in rebuilt:
            rebuild = model.get_submodule(str(node.target))
            assert isinstance(rebuild, Rebuild)
            values[node] = rebuild.plain([values[arg] for arg in node.args])
        elif node.op == "output":
            made = graph.output(
                values[node.args[0]] if node.args[0] in rebuilt else torch.fx.map_arg(node.args[0], values.get)
            )
            made.meta = dict(node.meta)
        else:
            values[node] = graph.node_copy(node, values.__getitem__)
    used = {str(n.target): _found(model, str(n.target)) for n in graph.nodes if n.op in ("call_module", "get_attr")}
    return model.rebuilt(graph, used) if isinstance(model, CompiledModel) else torch.fx.GraphModule(used, graph)


def _is_rebuild(model: nn.Module, node: torch.fx.Node) -> bool:
    return isinstance(model.get_submodule(str(node.target)), Rebuild)


def _found(owner: nn.Module, path: str) -> Any:
    value: Any = owner
    for name in path.split("."):
        value = getattr(value, name)
    return value


def graph_of(module: nn.Module) -> torch.fx.GraphModule | None:
    """The graph that a module computes by, None where it is Python."""
    forward = module.__dict__.get("forward")
    if isinstance(forward, GraphForward):
        return forward.compiled
    return module if isinstance(module, torch.fx.GraphModule) else None

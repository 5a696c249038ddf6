"""What compiling returns: a graph module with a report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.fx

from reparam import capture as capturing
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
        """What the compiler did."""
        report: Report = self.meta["reparam"]
        return report

    def __getattr__(self, name: str) -> Any:
        # Plain data of the module that this one took the place of, for parents that read it.
        kept = self.__dict__.get("meta", {}).get("attributes", {})
        return kept[name] if name in kept else super().__getattr__(name)

    def recompile(self) -> Any:
        """As of ``GraphModule``; what runs does the same as ``code``, but finds its layers sooner."""
        code = super().recompile()
        type(self).forward = _finding_layers_directly(type(self).forward, code.src, self.graph)
        return code

    def __copy__(self) -> CompiledModel:
        return self._like(CompiledModel(self, self.graph, type(self).__name__), self.__dict__)

    def __reduce__(self) -> tuple[Any, ...]:
        restore, arguments = super().__reduce__()
        return _restore, (restore, arguments)

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

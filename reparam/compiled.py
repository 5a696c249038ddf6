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

    @property
    def report(self) -> Report:
        """What the compiler did."""
        report: Report = self.meta["reparam"]
        return report

    def __getattr__(self, name: str) -> Any:
        # Plain data of the module that this one took the place of, for parents that read it.
        kept = self.__dict__.get("meta", {}).get("attributes", {})
        return kept[name] if name in kept else super().__getattr__(name)

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

"""Module paths for fused layers."""

from __future__ import annotations

import itertools
import keyword
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from reparam.algebra import AnyConv, ChannelAffine
from reparam.graph import facts
from reparam.graph.graph import Graph


def permitted(path: str) -> str:
    """A path, with an underscore after each name that a graph module cannot have there: ``graph``, ``class``."""
    first, *others = path.split(".")
    taken = hasattr(torch.fx.GraphModule, first) or first in ("meta", "report") or keyword.iskeyword(first)
    return ".".join([first + "_" * taken, *(name + "_" * keyword.iskeyword(name) for name in others)])


class Names:
    """Module paths for fused layers, and which of them are still busy with other things."""

    def __init__(self, graph: Graph, used: dict[str, Any]) -> None:
        self.graph = graph
        self.sizes: dict[str, int] = {}
        self.containers = {""}
        for path, module in graph.modules.items():
            self.sizes[path] = sum(
                parameter.numel() for parameter in module.parameters(recurse="parametrizations" in module._modules)
            )
            if getattr(type(module), "forward", None) in (nn.Sequential.forward, nn.Module.forward):
                self.containers.add(path)
        self.taken: set[str] = set()
        self.around: set[str] = set()
        for path in used:
            self._occupy(path)
        # Nodes that run in a module, or were made of something in it.
        self.inhabitants: dict[str, set[Node]] = {}
        # Fused nodes that were made of nothing but what lies in a module.
        self.homes: dict[str, set[Node]] = {}
        # Fused nodes that were made of anything in a module.
        self.tenants: dict[str, set[Node]] = {}
        for node in graph.fx.nodes:
            if node.op not in ("call_module", "call_function", "call_method"):
                continue
            origins = facts.of(node).origins or ()
            places = {str(node.target)} if node.op == "call_module" else {facts.of(node).scope, *origins}
            for prefix in {prefix for path in places for prefix in _prefixes(path)}:
                self.inhabitants.setdefault(prefix, set()).add(node)
            for prefix in {prefix for path in origins for prefix in _prefixes(path)}:
                self.tenants.setdefault(prefix, set()).add(node)
            if origins and isinstance(node.target, AnyConv | ChannelAffine):
                for prefix in _prefixes(_common_prefix(sorted(origins))):
                    self.homes.setdefault(prefix, set()).add(node)

    def take(self, node: Node) -> str:
        """Where the layer of a fused node goes; the path is then taken.

        The longest path shared by the modules whose parameters went in; from there up, as long as the module around
        it does nothing else (a Sequential is a place for layers rather than a layer, and stays). Where that path is
        still busy, because the module goes on to do other things, the layer takes the place of the module inside it
        that gave it the most.
        """
        origins = sorted(facts.of(node).origins or ()) or [facts.of(node).scope]
        common = _common_prefix(origins)
        while "." in common and self._is_all_that_is_left(common.rpartition(".")[0], node):
            common = common.rpartition(".")[0]
        main = self.main_origin(node)
        within = [prefix for prefix in _prefixes(main) if len(prefix) > len(common)]
        deeper = [prefix for prefix in within if prefix == main or self.tenants.get(prefix) == {node}]
        path = next((path for path in (common, *deeper) if path and self._is_free(path, node)), "")
        if not path:
            # Beside what is busy, as deep as possible.
            beside = [f"{prefix}_fused" for prefix in reversed(_prefixes(main))] or ["fused"]
            numbered = (f"{name}{number or ''}" for number in itertools.count() for name in beside)
            path = next(name for name in numbered if self._is_free(name, node))
        self._occupy(path)
        return path

    def main_origin(self, node: Node) -> str:
        """Of the modules whose parameters went into a node, the one that has the most."""
        origins: list[str] = sorted(facts.of(node).origins or ()) or [facts.of(node).scope]
        return max(origins, key=lambda path: self.sizes.get(path, 0))

    def _occupy(self, path: str) -> None:
        self.taken.add(path)
        self.around.update(_prefixes(path))

    def _is_all_that_is_left(self, path: str, node: Node) -> bool:
        return path not in self.containers and self.inhabitants.get(path) == {node}

    def _is_free(self, path: str, node: Node) -> bool:
        """Whether no other layer is at, below or above ``path``, and none will have to be."""
        busy = permitted(path) != path or path in self.around or any(prefix in self.taken for prefix in _prefixes(path))
        return not busy and self.homes.get(path, set()) <= {node}


def _prefixes(path: str) -> list[str]:
    parts = path.split(".") if path else []
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _common_prefix(paths: list[str]) -> str:
    split = [path.split(".") for path in paths]
    shared = []
    for parts in zip(*split):  # noqa: B905 - up to the shortest
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)

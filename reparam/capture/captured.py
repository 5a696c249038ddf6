"""What capturing gives: a recorded model, or a part of one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.fx import Graph, Node

from reparam.capture.sizes import Number
from reparam.compare import Call as Call
from reparam.graph.conditions import Argument
from reparam.report import Remark


@dataclass
class Capture:
    """A recorded model, or a part of one.

    Attributes:
        root: Private copy of the model in eval mode, whose modules and tensors the graph refers to. Its tensors
            share memory with the model's own.
        graph: What ``root`` computes. Every node has its scope (module path that it ran in) and what
            :mod:`reparam.graph.facts` knows. It calls nothing where the root stays Python.
        modules: Its modules by path, the root at the empty one.
        storages: Identities of the memory that its tensors, and the model's, lie in.
        remarks: Which modules were left opaque, and why; what the graph depends on.
        traced: Whether there is a graph.
        draws: Whether it drew random numbers.
        call: The call that was recorded, on copies of the tensors; None where there was none.
        output: What the model returned.
        outputs: What its methods returned, where the root stays Python.
        parts: Modules that were recorded by themselves, inside of Python that stays, by path.
        arguments: What has to stay the same of a call.
        alike: Whether all of its calls were of one kind.
        made: Tensors and modules that the graph refers to, which the root does not hold yet.
        by_size: Whether something was decided by sizes, or would have been.
        numbers: How the nodes that are numbers are computed.
        shapes: Of the values of nodes that are tensors.
    """

    root: nn.Module
    graph: Graph
    modules: dict[str, nn.Module]
    storages: frozenset[int] = frozenset()
    remarks: list[Remark] = field(default_factory=list)
    traced: bool = True
    draws: bool = False
    call: Call | None = None
    output: Any = None
    outputs: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, Capture] = field(default_factory=dict)
    arguments: tuple[Argument, ...] = ()
    alike: bool = True
    made: dict[str, Any] = field(default_factory=dict)
    by_size: bool = False
    numbers: dict[Node, Number] = field(default_factory=dict)
    shapes: dict[Node, Any] = field(default_factory=dict)

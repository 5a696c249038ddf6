"""A structural-reparameterization compiler: train with branches, deploy plain convolutions.

``deploy = reparam.compile(model)``, and ``print(deploy.report)`` for what was done to it.
"""

from reparam import errors, passes
from reparam.compare import verify
from reparam.compiler import compile, explain
from reparam.errors import ConditionError, ReparamError, VerificationError
from reparam.expansion import expand
from reparam.files.deploy import load, save
from reparam.graph import lift
from reparam.graph.graph import Graph
from reparam.report import Comparison, Counts, Remark, Report
from reparam.rewrite.rule import Add, Apply, Missed, Rewrite, Rule
from reparam.targets import Exported, ImageInput, export
from reparam.tuning.decisions import Decisions

__version__ = "0.1.0"

__all__ = [
    "Add",
    "Apply",
    "Comparison",
    "ConditionError",
    "Counts",
    "Decisions",
    "Exported",
    "Graph",
    "ImageInput",
    "Missed",
    "Remark",
    "ReparamError",
    "Report",
    "Rewrite",
    "Rule",
    "VerificationError",
    "algebra",
    "compile",
    "errors",
    "expand",
    "explain",
    "export",
    "lift",
    "load",
    "passes",
    "save",
    "verify",
]

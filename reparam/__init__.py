"""A structural-reparameterization compiler: train with branches, deploy plain convolutions.

``deploy = reparam.compile(model)``, and ``print(deploy.report)`` for what was done to it.
"""

from reparam import algebra, errors, lift, passes
from reparam.compiler import compile, explain
from reparam.decisions import Decisions
from reparam.errors import ConditionError, ReparamError, VerificationError
from reparam.expand import expand
from reparam.export import Exported, ImageInput, export
from reparam.report import Comparison, Counts, Remark, Report
from reparam.rewrite import Add, Apply, Graph, Missed, Rewrite, Rule
from reparam.storage import load, save
from reparam.verify import verify

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

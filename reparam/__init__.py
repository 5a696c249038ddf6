"""A structural-reparameterization compiler: train with branches, deploy plain convolutions.

``deploy = reparam.compile(model)``, and ``print(deploy.report)`` for what was done to it.
"""

from reparam import algebra, errors, lifting, passes, rules, targets
from reparam import moved as moved  # for pickles of older versions; not in __all__
from reparam.compare import verify
from reparam.compiler import compile, explain
from reparam.errors import ConditionError, ReparamError, VerificationError
from reparam.expansion import expand
from reparam.files.deploy import load, save
from reparam.report import Report
from reparam.targets import export
from reparam.tuning.decisions import Decisions

__version__ = "0.1.0"

__all__ = [
    "ConditionError",
    "Decisions",
    "ReparamError",
    "Report",
    "VerificationError",
    "algebra",
    "compile",
    "errors",
    "expand",
    "explain",
    "export",
    "lifting",
    "load",
    "passes",
    "rules",
    "save",
    "targets",
    "verify",
]

"""Modules under the names that pickles of older versions know them by."""

import sys

from reparam.deploy import model
from reparam.graph import affine, conditions, outputs
from reparam.tuning import prepared

sys.modules |= {
    "reparam.compiled": model,
    "reparam.conditions": conditions,
    "reparam.emit": affine,
    "reparam.outputs": outputs,
    "reparam.prepared": prepared,
}

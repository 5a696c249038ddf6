"""Where pickles that were written before the packages look for classes: the modules that these have moved to."""

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

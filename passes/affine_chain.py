"""``affine(affine(x)) -> affine(x)``: scalars, layer scales and norms in a row."""

from __future__ import annotations

from reparam.algebra import ChannelAffine
from reparam.passes.compose import Compose


class AffineAfterAffine(Compose):
    """``s·(s'·x + t') + t = (s·s')·x + (s·t' + t)``, along one axis."""

    outer = (ChannelAffine,)
    inner = (ChannelAffine,)

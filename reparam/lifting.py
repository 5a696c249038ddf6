"""How layers and functions of one's own become operators of the algebra: see :func:`register`."""

from reparam.graph.lift import Sum, register, unregister

__all__ = ["Sum", "register", "unregister"]

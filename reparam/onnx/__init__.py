"""ONNX graphs in, ONNX graphs out: :func:`fuse_onnx` rewrites an exported training graph with the engine's own rules."""

from reparam.onnx.fuse import FusedOnnx, fuse_onnx

__all__ = ["FusedOnnx", "fuse_onnx"]

"""ONNX graphs in, ONNX graphs out: :func:`fuse_onnx` rewrites an exported graph with the engine's own rules."""

from reparam.errors import ExportError

try:
    from reparam.onnx.fuse import FusedOnnx, fuse_onnx
except ImportError as error:
    raise ExportError(f'reading ONNX needs a package ({error}): pip install "reparam[onnx]"') from error

__all__ = ["FusedOnnx", "fuse_onnx"]

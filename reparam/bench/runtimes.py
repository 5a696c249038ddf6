"""The places where a model can run: how it gets there, and how it is called once it is.

Everything that knows a runtime's API is here, one class each, behind :class:`Runtime`. Threads are counted alike
everywhere, and nothing computes in less than the precision it was given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from reparam.errors import ExportError, ReparamError
from reparam.targets.executorch import ExecuTorch, mute
from reparam.targets.onnx import Onnx
from reparam.targets.openvino import OpenVINO
from reparam.targets.target import Options, Target, quiet

Inputs: TypeAlias = "tuple[Tensor, ...]"
Call: TypeAlias = Callable[[], Any]
Source: TypeAlias = "nn.Module | Path"


class Unavailable(ReparamError):
    """A runtime is not installed, or has no such device here; the message says how to get it."""


class Runtime(Protocol):
    """One way to run a model.

    Attributes:
        name: What it is called in tables and on the command line.
        devices: The types of device that it is measured on, of ``"cpu"`` and ``"cuda"``.
    """

    name: ClassVar[str]
    devices: ClassVar[tuple[str, ...]]

    def require(self) -> None:
        """Import what it needs, and do what it does once in a process.

        Raises:
            Unavailable: Something is missing.
        """

    def convert(self, model: nn.Module, inputs: Inputs, folder: Path) -> Source:
        """Bring a model into the runtime's form.

        Args:
            model: An eval-mode module.
            inputs: What it is called with; their sizes may become fixed.
            folder: An empty folder for files.

        Returns:
            What :meth:`load` takes: a file, or the model itself where PyTorch runs it.

        Raises:
            Exception: Whatever the runtime's own converter raises.
        """

    def load(self, source: Source, inputs: Inputs, threads: int) -> Call:
        """Prepare inferences.

        Args:
            source: What :meth:`convert` returned.
            inputs: What it is called with.
            threads: CPU threads to compute with.

        Returns:
            A function that runs one inference; :func:`outputs` reads what it returns.
        """


def outputs(result: Any) -> list[Tensor]:
    """The tensors that an inference returned, on the CPU, in order, whatever the runtime wraps them in."""
    return [torch.as_tensor(value).cpu() for value in tree_leaves(result)]


class Eager:
    """PyTorch, operator by operator."""

    name: ClassVar[str] = "eager"
    devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda")

    def require(self) -> None:
        """Nothing is missing."""

    def convert(self, model: nn.Module, inputs: Inputs, folder: Path) -> Source:
        """The model as it is."""
        return model

    def load(self, source: Source, inputs: Inputs, threads: int) -> Call:
        """A call of the module."""
        torch.set_num_threads(threads)
        return _without_gradients(_module(source), inputs)


class Inductor(Eager):
    """``torch.compile`` with its default backend, for inputs of one size."""

    name: ClassVar[str] = "torch.compile"

    def load(self, source: Source, inputs: Inputs, threads: int) -> Call:
        """A call of the compiled module; the first ones compile."""
        torch.set_num_threads(threads)
        return _without_gradients(torch.compile(_module(source), dynamic=False), inputs)


class CudaGraph(Eager):
    """PyTorch's kernels, recorded once and launched together."""

    name: ClassVar[str] = "cuda-graph"
    devices: ClassVar[tuple[str, ...]] = ("cuda",)

    def load(self, source: Source, inputs: Inputs, threads: int) -> Call:
        """Record one inference; a call replays it on the inputs it was recorded with."""
        run = _without_gradients(_module(source), inputs)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())  # a recording wants memory that was warmed up on its own stream
        with torch.cuda.stream(side):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = run()

        def replay() -> Any:
            graph.replay()
            return result

        return replay


class _Exported:
    """A runtime that reads the file of an export, written here without free axes."""

    name: ClassVar[str]
    devices: ClassVar[tuple[str, ...]] = ("cpu",)
    target: ClassVar[Target]

    def require(self) -> None:
        """Import the runtime, and what writes its files."""
        try:
            self.target.require()
        except ExportError as error:
            raise Unavailable(str(error)) from error

    def convert(self, model: nn.Module, inputs: Inputs, folder: Path) -> Source:
        """Write what ``torch.export`` captures."""
        path = folder / f"model{self.target.suffix}"
        with quiet(), torch.no_grad():
            self.target.write(torch.export.export(model, inputs), path, Options())
        return path


class OnnxRuntime(_Exported):
    """ONNX Runtime on the CPU, all of its graph optimisations on."""

    name: ClassVar[str] = "onnxruntime"
    target: ClassVar[Target] = Onnx()

    def load(self, source: Source, inputs: Inputs, threads: int) -> Call:
        """Open a session."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        # Its threads wait actively for the next inference: they would take the processor from whoever runs next.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        session = onnxruntime.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])
        feed = {item.name: value.numpy() for item, value in zip(session.get_inputs(), inputs, strict=True)}
        return lambda: session.run(None, feed)


class OpenVinoRuntime(_Exported):
    """OpenVINO on the CPU, for the least latency."""

    name: ClassVar[str] = "openvino"
    target: ClassVar[Target] = OpenVINO()

    def load(self, source: Source, inputs: Inputs, threads: int) -> Call:
        """Compile for the CPU, and open a request."""
        import openvino

        hints = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
        request = openvino.Core().compile_model(str(source), "CPU", hints).create_infer_request()
        feed = [value.numpy() for value in inputs]
        return lambda: request.infer(feed, share_inputs=True, share_outputs=True).to_tuple()


class ExecuTorchRuntime(_Exported):
    """ExecuTorch with XNNPACK, as on Android and iOS."""

    name: ClassVar[str] = "executorch"
    target: ClassVar[Target] = ExecuTorch()

    def load(self, source: Source, inputs: Inputs, threads: int) -> Call:
        """Load the program; its pool of threads is one for the process."""
        from executorch.extension.pybindings import portable_lib
        from executorch.runtime import Runtime as Executor

        with mute():
            portable_lib._unsafe_reset_threadpool(threads)
            method = Executor.get().load_program(source).load_method("forward")
        if method is None:
            raise ReparamError(f"{source}: holds no method forward")
        feed = list(inputs)
        return lambda: method.execute(feed)


RUNTIMES: dict[str, Runtime] = {
    runtime.name: runtime
    for runtime in (Eager(), Inductor(), CudaGraph(), OnnxRuntime(), OpenVinoRuntime(), ExecuTorchRuntime())
}  # fmt: skip


def choose(names: Sequence[str] | None, device: str) -> list[Runtime]:
    """Runtimes by name; all that are measured on a type of device when none is named.

    Raises:
        ReparamError: A name that is not known, or a runtime that is not measured on this device.
    """
    usable = [name for name, runtime in RUNTIMES.items() if device in runtime.devices]
    for name in names or ():
        if name not in usable:
            what = "is not measured" if name in RUNTIMES else "is not known"
            raise ReparamError(f"the runtime {name} {what} on {device}; choose from {', '.join(usable)}")
    return [RUNTIMES[name] for name in names or usable]


def _module(source: Source) -> nn.Module:
    assert isinstance(source, nn.Module)
    return source


def _without_gradients(function: Callable[..., Any], inputs: Inputs) -> Call:
    def run() -> Any:
        with torch.inference_mode():
            return function(*inputs)

    return run

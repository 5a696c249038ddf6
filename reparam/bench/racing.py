"""Several graphs of one model in several runtimes, checked first and then timed in turn."""

from __future__ import annotations

import contextlib
import copy
import importlib.metadata
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from reparam import timing
from reparam.bench.memory import peak_memory
from reparam.bench.peak import products, rate
from reparam.bench.runtimes import Call, Inputs, Runtime, Source, choose, outputs
from reparam.compare import TOLERANCES, compare
from reparam.errors import ReparamError, VerificationError, reason
from reparam.graph import measure
from reparam.timing import Timing

Progress: TypeAlias = Callable[["int | None", "int | None", str], None]
Loader: TypeAlias = Callable[[], Call]
Timer: TypeAlias = Callable[[Call], float]
KeyT = TypeVar("KeyT")

FEWEST_ROUNDS = 7
_ROUNDS_OF_A_LOADING = 4
_WARMUPS = 3
_TURN = 0.1  # seconds that are timed of each contestant in a round, on average, and at least one inference
_CUDA_TOLERANCE = 1e-2  # convolutions in float32 use TF32 there unless told otherwise
_CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
_PACKAGES = ("torch", "onnxruntime", "openvino", "executorch")


@dataclass(frozen=True)
class Row:
    """One graph in one runtime.

    Attributes:
        graph: Which graph of the model.
        runtime: Where it ran.
        seconds: Of one inference, once a round, in the order of the rounds; empty when it was not timed.
        multiply_adds: Of the convolutions and matrix products of the graph, for the whole batch.
        error: Largest difference from the reference graph in eager PyTorch, relative to its largest output.
        size: Bytes of the file, or of parameters and buffers where PyTorch runs the model itself.
        memory: Bytes that running it takes, see :func:`reparam.bench.memory.peak_memory`; None when not measured.
        failure: Why it was not timed; empty when it was.
        memory_failure: Why its memory could not be measured.
    """

    graph: str
    runtime: str
    seconds: tuple[float, ...] = ()
    multiply_adds: int = 0
    error: float | None = None
    size: int | None = None
    memory: int | None = None
    failure: str = ""
    memory_failure: str = ""

    @property
    def timing(self) -> Timing | None:
        """Median and quartiles of the rounds."""
        return timing.summarise(self.seconds) if self.seconds else None


@dataclass(frozen=True)
class Benchmark:
    """What was measured in one run.

    Attributes:
        rows: Every graph in every runtime; the first graph is the reference.
        products: Seconds of square matrix products, once a round, by the size of their matrices.
        about: The machine, versions and sizes.
    """

    rows: tuple[Row, ...]
    products: dict[int, tuple[float, ...]] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def conditions(self) -> str:
        """What was measured on what, in a line."""
        about = self.about
        inputs = " and ".join("x".join(map(str, shape)) for shape in about["inputs"])
        threads = f"{about['threads']} thread{'s' if about['threads'] > 1 else ''}"
        return f"{inputs}, {about['precision']}, {threads}, {about['processor']}, {about['clock']} time"

    def row(self, graph: str, runtime: str) -> Row:
        """The row of a graph in a runtime; a KeyError when it did not take part there."""
        return {(row.graph, row.runtime): row for row in self.rows}[graph, runtime]

    def ratio(self, runtime: str, graph: str, to: str) -> Timing | None:
        """Time of one graph over that of another in the same runtime, None when either was not timed there.

        It is the median (with quartiles) of the ratios within each round, not the ratio of the medians: a moment
        in which the machine is slow falls on both sides of a fraction, and cancels.
        """
        seconds = {row.graph: row.seconds for row in self.rows if row.runtime == runtime}
        ours, theirs = seconds.get(graph), seconds.get(to)
        return timing.summarise([a / b for a, b in zip(ours, theirs, strict=True)]) if ours and theirs else None

    @property
    def peak(self) -> float:
        """Operations per second of the fastest matrix product (median over the rounds), two for a multiply-add."""
        return max(rate(size**3, statistics.median(seconds)) for size, seconds in self.products.items())

    def of_peak(self, row: Row) -> float | None:
        """What fraction of the peak a row reaches, None when it was not timed."""
        return rate(row.multiply_adds, row.timing.median) / self.peak if row.timing else None

    def to_dict(self) -> dict[str, Any]:
        """The results as plain dicts, lists, numbers and strings, ready for ``json.dumps``."""
        reference = self.rows[0].graph
        return {
            **self.about,
            "peak_flops": self.peak,
            "products": {str(size): _statistics(seconds) for size, seconds in self.products.items()},
            "rows": [self._row_to_dict(row, reference) for row in self.rows],
        }

    def _row_to_dict(self, row: Row, reference: str) -> dict[str, Any]:
        ratio = self.ratio(row.runtime, row.graph, reference)
        return {
            "graph": row.graph,
            "runtime": row.runtime,
            "seconds": _statistics(row.seconds) if row.seconds else None,
            f"ratio_to_{reference}": ratio and ratio.median,
            "of_peak": self.of_peak(row),
            "multiply_adds": row.multiply_adds or None,
            "error": row.error,
            "size": row.size,
            "memory": row.memory,
            "failure": row.failure or None,
            "memory_failure": row.memory_failure or None,
        }


def _statistics(seconds: Sequence[float]) -> dict[str, float]:
    found = timing.summarise(seconds)
    return {"median": found.median, "low": found.low, "high": found.high, "rounds": len(seconds)}


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        runtimes: Names, see :data:`reparam.bench.runtimes.RUNTIMES`; None for all that the device has.
        threads: CPU threads, the same for all.
        rounds: How often each is timed; None to go on until ``min_time``.
        min_time: Seconds to measure for, and at least seven rounds.
        memory: Whether to measure memory too, which starts a process for each graph and runtime.
        device: ``"cpu"`` or ``"cuda"``.
        half: Compute in float16; on CUDA only. Tensors of rank 4 are channels_last there.
        clock: ``"wall"``, or ``"processor"`` to count the processor time of all threads instead. That is for a
            machine that has other things to do: with one thread it is what the wall clock would show on an idle one.
    """

    runtimes: Sequence[str] | None = None
    threads: int = 1
    rounds: int | None = None
    min_time: float = 20.0
    memory: bool = True
    device: str = "cpu"
    half: bool = False
    clock: str = "wall"

    def __post_init__(self) -> None:
        if self.device not in ("cpu", "cuda"):
            raise ReparamError(f"the device {self.device} is not known; choose from cpu, cuda")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ReparamError("this PyTorch finds no CUDA device; measure on the CPU with --device cpu")
        if self.half and self.device == "cpu":
            raise ReparamError("half precision is measured on CUDA only; add --device cuda")
        if self.clock not in _CLOCKS or (self.device == "cuda" and self.clock != "wall"):
            raise ReparamError(
                f"the clock {self.clock} is not known on {self.device}; choose from wall, processor (CPU)"
            )
        if self.threads < 1 or (self.rounds is not None and self.rounds < 1) or self.min_time < 0:
            raise ReparamError("threads and rounds begin at 1, and time at 0")
        choose(self.runtimes, self.device)

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in."""
        return torch.float16 if self.half else torch.float32

    @property
    def tolerance(self) -> float:
        """Error that is allowed, relative to the largest output."""
        if self.half:
            return TOLERANCES[torch.float16]
        return _CUDA_TOLERANCE if self.device == "cuda" else TOLERANCES[torch.float32]


def race(
    graphs: Mapping[str, nn.Module],
    inputs: Inputs,
    settings: Settings,
    progress: Progress | None = None,
    *,
    only: Mapping[str, Sequence[str]] | None = None,
) -> Benchmark:
    """Check and time graphs that compute the same.

    All are converted and compared with the first one, in eager PyTorch, before anything is timed; what fails or
    disagrees is reported and not timed. Then every runtime has its turn, round after round, in which the graphs
    alternate; and so have matrix products, which tell what the machine could do at that moment.

    Args:
        graphs: Eval-mode modules by what they are called, such as ``"training"``; the first is the reference.
        inputs: Tensors on the CPU that they are all called with.
        settings: How to measure.
        progress: Is told steps done, steps in all, and what is being done.
        only: Names of the runtimes of graphs that are not wanted in all of them.

    Raises:
        ReparamError: The reference itself does not run.
    """
    tell = progress or (lambda done, total, label: None)
    graphs, inputs = _placed(graphs, inputs, settings)
    entrants = [
        (runtime, name)
        for runtime in choose(settings.runtimes, settings.device)
        for name in graphs
        if runtime.name in (only or {}).get(name, (runtime.name,))
    ]
    with tempfile.TemporaryDirectory() as folder, _one_setting_of_threads(settings.threads):
        loaders, rows = _prepare(graphs, inputs, entrants, settings, Path(folder), tell)
        contests: list[dict[Any, Loader]] = [*loaders.values(), products(settings.device, settings.dtype)]
        seconds = sample(contests, settings, timer_for(settings.device, _CLOCKS[settings.clock]), tell)
    timed = [replace(row, seconds=tuple(seconds.get((row.graph, row.runtime), ()))) for row in rows]
    matrices = {size: tuple(values) for size, values in seconds.items() if isinstance(size, int)}
    return Benchmark(tuple(timed), matrices, _about(inputs, settings))


def _placed(graphs: Mapping[str, nn.Module], inputs: Inputs, settings: Settings) -> tuple[dict[str, nn.Module], Inputs]:
    """Everything on the device, in its memory format and precision; untouched on the CPU."""
    if settings.device == "cpu":
        return dict(graphs), inputs

    def place(thing: Any, rank: int) -> Any:
        layout = torch.channels_last if rank == 4 else torch.preserve_format
        return thing.to(settings.device, settings.dtype, memory_format=layout)

    return (
        {name: place(copy.deepcopy(graph), 4) for name, graph in graphs.items()},
        tuple(
            place(value, value.dim()) if value.is_floating_point() else value.to(settings.device) for value in inputs
        ),
    )


def _prepare(
    graphs: Mapping[str, nn.Module],
    inputs: Inputs,
    entrants: Sequence[tuple[Runtime, str]],
    settings: Settings,
    folder: Path,
    tell: Progress,
) -> tuple[dict[str, dict[Any, Loader]], list[Row]]:
    """Convert, load and check everything; what can be timed, by runtime, and a row for each."""
    loaders: dict[str, dict[Any, Loader]] = {}
    rows = []
    reference, *_ = graphs.values()
    try:
        with torch.inference_mode():
            expected = outputs(reference(*inputs))
    except Exception as error:
        raise ReparamError(f"the model does not run on these inputs: {reason(error)}") from error
    for done, (runtime, name) in enumerate(entrants):
        tell(done, len(entrants), f"preparing {name} for {runtime.name}")
        graph = graphs[name]
        row = Row(name, runtime.name, multiply_adds=measure.multiply_adds_of(graph, inputs, {}))
        place = folder / str(done)
        place.mkdir()
        try:
            runtime.require()
            source = runtime.convert(graph, inputs, place)
            load = partial(runtime.load, source, inputs, settings.threads)
            largest = _check(expected, outputs(load()()), settings.tolerance)
        except VerificationError as failure:
            rows.append(replace(row, failure=f"wrong, so not timed: {failure}"))
        except Exception as failure:
            rows.append(replace(row, failure=reason(failure)))
        else:
            loaders.setdefault(runtime.name, {})[name, runtime.name] = load
            row = replace(row, error=largest, size=_size(source))
            rows.append(_with_memory(row, runtime, source, inputs, settings) if settings.memory else row)
    return loaders, rows


def _check(expected: Sequence[Tensor], actual: Sequence[Tensor], tolerance: float) -> float:
    reference, result = ([value.float() for value in values] for values in (expected, actual))
    return compare(reference, result, tolerance).largest_error


def _size(source: Source) -> int:
    if isinstance(source, nn.Module):
        return sum(value.numel() * value.element_size() for value in source.state_dict().values())
    return sum(file.stat().st_size for file in source.parent.iterdir())  # weights may lie beside the graph


def _with_memory(row: Row, runtime: Runtime, source: Source, inputs: Inputs, settings: Settings) -> Row:
    try:
        return replace(row, memory=peak_memory(runtime, source, inputs, settings.threads))
    except ReparamError as error:
        return replace(row, memory_failure=str(error))


def timer_for(device: str, clock: Callable[[], float] = time.perf_counter) -> Timer:
    """What times an inference, after one that is not timed: others have used the caches since its last one."""

    watch = timing.stopwatch(clock)

    def on_cpu(call: Call) -> float:
        call()
        return watch(call)

    def on_cuda(call: Call) -> float:
        call()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(10):  # queued up, so that what is measured is not how fast Python asks
            call()
        end.record()
        end.synchronize()
        milliseconds: float = start.elapsed_time(end) / 10
        return milliseconds / 1e3

    return on_cuda if device == "cuda" else on_cpu


def sample(
    contests: Sequence[Mapping[KeyT, Loader]], settings: Settings, timer: Timer, tell: Progress
) -> dict[KeyT, list[float]]:
    """Seconds of every contestant of every contest, one number a round.

    All are loaded anew every few rounds, in another order: where in memory a program came to lie changes its time by
    a percent or so, which would pass for a difference between programs (Mytkowicz et al., "Producing Wrong Data
    Without Doing Anything Obviously Wrong!", ASPLOS 2009).
    """
    loaders = {key: load for contest in contests for key, load in contest.items()}
    seconds: dict[KeyT, list[float]] = {key: [] for key in loaders}
    calls: dict[KeyT, Call] = {}
    index = 0

    def turn(contest: Mapping[KeyT, Loader]) -> dict[KeyT, float]:
        return _alternate({key: calls[key] for key in contest}, timer, index)

    with contextlib.closing(timing.in_rounds(dict(enumerate(contests)), turn)) as rounds:
        started = time.perf_counter()
        while index < (settings.rounds or FEWEST_ROUNDS) or (
            not settings.rounds and time.perf_counter() - started < settings.min_time
        ):
            if index % _ROUNDS_OF_A_LOADING == 0:
                tell(index, settings.rounds, "loading")
                calls.clear()
                calls.update(_loaded(loaders, index // _ROUNDS_OF_A_LOADING))
            tell(index, settings.rounds, f"timing, round {index + 1}")
            for medians in next(rounds).values():
                for key, median in medians.items():
                    seconds[key].append(median)
            index += 1
    return seconds


def _loaded(loaders: Mapping[KeyT, Loader], index: int) -> dict[KeyT, Call]:
    """All contestants, warmed up."""
    calls = {key: loaders[key]() for key in timing.in_turn(loaders, index)}
    for call in [*calls.values()] * _WARMUPS:
        call()
    return calls


def _alternate(calls: Mapping[KeyT, Call], timer: Timer, index: int) -> dict[KeyT, float]:
    """Median seconds of those who are compared, of rounds of one inference each."""
    found: list[dict[KeyT, float]] = []
    for seconds in timing.in_rounds(calls, timer, index):
        found.append(seconds)
        if sum(sum(each.values()) for each in found) >= _TURN * len(calls):
            break
    return {key: statistics.median(each[key] for each in found) for key in calls}


def _about(inputs: Inputs, settings: Settings) -> dict[str, Any]:
    return {
        "processor": torch.cuda.get_device_name() if settings.device == "cuda" else _processor(),
        "device": settings.device,
        "threads": settings.threads,
        "clock": settings.clock,
        "precision": str(settings.dtype).removeprefix("torch."),
        "inputs": [list(value.shape) for value in inputs],
        "versions": {name: version for name in _PACKAGES if (version := _version(name))},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


@contextlib.contextmanager
def _one_setting_of_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)

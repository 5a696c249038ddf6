"""Benchmarks: who is timed, in which order, against what, and what is said of those who are not."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reparam.bench import RUNTIMES, Benchmark, Row, Settings, bench, graphs_of, plot, race
from reparam.bench.memory import peak_memory
from reparam.bench.racing import FEWEST_ROUNDS, sample, timer_for
from reparam.bench.runtimes import Eager, Inputs, Source, choose, outputs
from reparam.errors import ReparamError
from support import Net, randomise

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Branches(nn.Module):
    """Two branches and a norm: small, with something to fuse."""

    def __init__(self) -> None:
        super().__init__()
        self.three, self.one = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 1)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.three(x) + self.one(x)))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return randomise(Branches()).eval()


class Odd(Eager):
    """A runtime that goes wrong in a way of its own."""

    def __init__(self, name: str, load: Callable[[nn.Module, Inputs], Any]) -> None:
        self.name = name  # type: ignore[misc]
        self._load = load

    def load(self, source: Source, inputs: Inputs, threads: int) -> Callable[[], Any]:
        assert isinstance(source, nn.Module)
        return lambda: self._load(source, inputs)


# --- Sampling -----------------------------------------------------------------------------------------------------


def test_runtimes_have_their_turns_in_ever_new_orders_in_which_their_graphs_alternate() -> None:
    """So that a slow moment of the machine falls on those who are compared alike."""
    rounds: list[str] = []
    contests = [{name: lambda name=name: lambda: name for name in names} for names in ("ab", "cd")]

    def timer(call: Callable[[], object]) -> float:
        rounds[-1] += str(call())
        return {"a": 0.03, "b": 0.14}.get(rounds[-1][-1], 0.2)  # of a and b together, 200 ms are two each

    def told(done: int | None, total: int | None, label: str) -> None:
        rounds.extend([""] * label.startswith("timing"))

    sample(contests, Settings(rounds=20), timer, told)
    assert all(re.fullmatch("(ab|ba){2}(cd|dc)|(cd|dc)(ab|ba){2}", each) for each in rounds)
    for pair in ("ab", "cd"):
        orders = ["".join(name for name in each if name in pair) for each in rounds]
        assert len(set(orders)) > 1
    assert {each[0] in "ab" for each in rounds} == {True, False}


def test_what_counts_of_a_turn_is_the_median() -> None:
    seconds = iter([0.005, 0.001, 0.5])
    found = sample([{"a": lambda: lambda: None}], Settings(rounds=1), lambda call: next(seconds), lambda *told: None)
    assert found == {"a": [0.005]}  # 0.005 + 0.001 + 0.5 is a turn


def test_all_are_loaded_and_warmed_up_anew_every_few_rounds_in_ever_new_orders() -> None:
    """Where in memory a program came to lie makes it faster or slower than its copy next door."""
    loadings: list[list[str]] = []
    alive: list[str] = []

    class Program:
        def __init__(self, name: str) -> None:
            self.name = name
            if not alive:
                loadings.append([])
            alive.append(name)
            loadings[-1].append(f"load {name}")

        def __call__(self) -> None:
            loadings[-1].append(f"run {self.name}")

        def __del__(self) -> None:
            alive.remove(self.name)

    def timer(call: Callable[[], object]) -> float:
        loadings[-1].append("time")
        return 1.0

    contests = [{name: partial(Program, name)} for name in "ab"]
    sample(contests, Settings(rounds=40), timer, lambda *told: None)
    orders = [[f"load {a}", f"load {b}", *[f"run {a}", f"run {b}"] * 3, *["time"] * 8] for a, b in ("ab", "ba")]
    assert len(loadings) == 10
    assert all(loading in orders for loading in loadings)
    assert all(order in loadings for order in orders)


def test_without_a_number_of_rounds_there_are_at_least_seven() -> None:
    contests = [{"a": lambda: lambda: None}]
    seconds = sample(contests, Settings(min_time=0), lambda call: 1.0, lambda *told: None)
    assert len(seconds["a"]) == FEWEST_ROUNDS


def test_an_inference_is_timed_after_one_that_is_not() -> None:
    """The first one fetches weights into the caches that others used since."""
    now = [0.0]
    durations = iter([5.0, 0.01])

    def call() -> None:
        now[0] += next(durations)

    assert timer_for("cpu", clock=lambda: now[0])(call) == pytest.approx(0.01)


# --- Results ------------------------------------------------------------------------------------------------------


def measured(**seconds: tuple[float, ...]) -> Benchmark:
    rows = tuple(Row(graph, "eager", times, multiply_adds=500) for graph, times in seconds.items())
    return Benchmark(rows, {10: (2e-6, 2e-6), 20: (8e-6, 8e-6)})


def test_ratios_are_taken_within_rounds() -> None:
    """The machine was ten times slower in the second round, which says nothing about the two graphs."""
    result = measured(training=(2.0, 20.0, 2.0), compiled=(1.0, 10.0, 1.5))
    ratio = result.ratio("eager", "compiled", "training")
    assert ratio is not None
    assert (ratio.median, ratio.low, ratio.high) == (0.5, 0.5, 0.625)
    assert measured(training=(1.0,), compiled=()).ratio("eager", "compiled", "training") is None


def test_the_peak_is_that_of_the_fastest_product() -> None:
    result = measured(training=(1e-6, 1e-6), compiled=())
    assert result.peak == pytest.approx(2e9)  # 2 · 20³ operations in 8 microseconds; 2 · 10³ in 2 are half as many
    assert result.of_peak(result.row("training", "eager")) == pytest.approx(0.5)  # 2 · 500 in one microsecond
    assert result.of_peak(result.row("compiled", "eager")) is None


# --- Races --------------------------------------------------------------------------------------------------------


def test_bench_compares_the_model_with_what_it_becomes(model: nn.Module) -> None:
    told: list[str] = []
    result = bench(
        model,
        X,
        peer=lambda training: nn.Sequential(training),
        runtimes=["eager"],
        rounds=2,
        memory=False,
        progress=lambda done, total, label: told.append(label),
    )
    assert [row.graph for row in result.rows] == ["training", "peer", "compiled"]
    training, _, compiled = result.rows
    # Per pixel: 3x3 and 1x1 with 3 channels to 4, and the 3x3 alone.
    assert (training.multiply_adds, compiled.multiply_adds) == (2 * 64 * 12 * 10, 2 * 64 * 12 * 9)
    assert compiled.size == 4 * (4 * 27 + 4)
    assert compiled.error is not None
    assert 0 <= compiled.error < 1e-6
    assert all(len(row.seconds) == 2 and min(row.seconds) > 0 for row in result.rows)
    plain = json.loads(json.dumps(result.to_dict()))
    assert plain["threads"] == 1
    assert plain["inputs"] == [[2, 3, 8, 8]]
    assert plain["rows"][2]["seconds"]["rounds"] == 2
    assert plain["rows"][0]["ratio_to_training"] == 1.0
    assert plain["peak_flops"] > 0
    assert "timing, round 2" in told


@pytest.mark.parametrize("name", ["onnxruntime", "openvino", "executorch"])
def test_runtimes_compute_what_pytorch_computes(name: str, model: nn.Module) -> None:
    pytest.importorskip(name)
    result = bench(model, X, runtimes=[name], rounds=2, memory=False)
    for row in result.rows:
        assert row.failure == ""
        assert row.error is not None
        assert row.error < 1e-5
        assert row.size is not None
        assert row.size > 4 * (4 * 27 + 4)
        assert len(row.seconds) == 2


def test_what_fails_is_a_row_and_what_is_wrong_is_not_timed(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(module: nn.Module, inputs: Inputs) -> Any:
        raise RuntimeError("no kernel for this\nand a page of details") from ValueError("the reason")

    odd = (
        Odd("wrong", lambda module, inputs: module(*inputs) * 1.01),
        Odd("shapes", lambda module, inputs: module(*inputs)[:1]),
        Odd("fails", fails),
    )
    for runtime in odd:
        monkeypatch.setitem(RUNTIMES, runtime.name, runtime)
    monkeypatch.setitem(sys.modules, "openvino", None)  # as if it were not installed
    names = ["wrong", "openvino", "shapes", "fails", "eager"]
    result = race({"training": model}, (X,), Settings(names, rounds=2, memory=False))
    failures = {row.runtime: row.failure for row in result.rows}
    assert failures["wrong"].startswith("wrong, so not timed: the models disagree: largest relative error 1.0e-02")
    assert failures["shapes"].startswith("wrong, so not timed: the models return different tensors")
    assert failures["fails"] == "ValueError: the reason"
    assert failures["openvino"].endswith('pip install "reparam[openvino]"')
    assert {row.runtime for row in result.rows if row.timing} == {"eager"}
    assert failures["eager"] == ""


def test_a_graph_may_be_wanted_in_some_runtimes_only(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RUNTIMES, "again", Odd("again", lambda module, inputs: module(*inputs)))
    settings = Settings(["eager", "again"], rounds=2, memory=False)
    result = race({"a": model, "b": model}, (X,), settings, only={"b": ["again"]})
    assert [(row.runtime, row.graph) for row in result.rows] == [("eager", "a"), ("again", "a"), ("again", "b")]


def test_outputs_are_tensors_whatever_wraps_them() -> None:
    wrapped = {"a": torch.ones(2), "b": [torch.zeros(1).numpy(), (torch.ones(3),)]}
    assert [tuple(value.shape) for value in outputs(wrapped)] == [(2,), (1,), (3,)]


def test_a_model_that_does_not_run_is_an_error(model: nn.Module) -> None:
    with pytest.raises(ReparamError, match=r"the model does not run on these inputs: RuntimeError: .*channels"):
        race({"training": model}, (X[:, :1],), Settings(["eager"], rounds=2))


def test_a_peer_that_fails_is_an_error(model: nn.Module) -> None:
    def peer(training: nn.Module) -> nn.Module:
        raise AttributeError("no fuse")

    with pytest.raises(ReparamError, match="the peer's conversion failed: AttributeError: no fuse"):
        graphs_of(model, (X,), peer=peer)


def test_a_peer_may_change_what_it_is_given(model: nn.Module) -> None:
    def peer(training: nn.Module) -> nn.Module:
        training.three = nn.Identity()  # type: ignore[assignment]
        return training

    graphs = graphs_of(model, (X,), peer=peer)
    assert torch.equal(graphs["training"](X), model(X))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"runtimes": ["tensorrt"]}, r"tensorrt is not known on cpu; choose from eager, .*executorch"),
        ({"runtimes": ["cuda-graph"]}, r"cuda-graph is not measured on cpu; choose from eager"),
        ({"device": "tpu"}, r"the device tpu is not known; choose from cpu, cuda"),
        ({"half": True}, r"half precision is measured on CUDA only; add --device cuda"),
        ({"clock": "sun"}, r"the clock sun is not known on cpu; choose from wall, processor"),
        ({"rounds": 0}, r"threads and rounds begin at 1"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ReparamError, match=message):
        Settings(**settings)


def test_cuda_is_asked_for_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ReparamError, match="finds no CUDA device"):
        Settings(device="cuda")
    assert [runtime.name for runtime in choose(None, "cuda")] == ["eager", "torch.compile", "cuda-graph"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda(model: nn.Module) -> None:
    result = bench(model, X, device="cuda", half=True, rounds=2, memory=False)
    assert {(row.runtime, row.failure) for row in result.rows} == {
        (name, "") for name in ("eager", "torch.compile", "cuda-graph")
    }


# --- Memory -------------------------------------------------------------------------------------------------------

linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux keeps such a peak")


@linux
def test_memory_is_that_of_weights_and_activations() -> None:
    """64 MiB of weights; activations and what a matrix product needs beside them are next to nothing."""
    layers = nn.Sequential(*(nn.Linear(2048, 2048) for _ in range(4))).eval()
    weights = sum(parameter.numel() * 4 for parameter in layers.parameters())
    used = peak_memory(Eager(), layers, (torch.zeros(1, 2048),), threads=1)
    assert weights <= used + 2**20  # what is counted in whole pages, once in a while, may be late
    assert used < 1.7 * weights


@linux
def test_a_model_that_cannot_be_pickled_has_no_memory_and_is_timed_all_the_same() -> None:
    result = race({"training": Net(lambda net, x: x + 1).eval()}, (X,), Settings(["eager"], rounds=2))
    (row,) = result.rows
    assert row.memory is None
    assert row.memory_failure.startswith("the model cannot be handed to another process")
    assert len(row.seconds) == 2


# --- The chart ----------------------------------------------------------------------------------------------------


def chart() -> Benchmark:
    rows = [
        Row(graph, runtime, (1.0, 2.0)) for runtime in ("eager", "onnxruntime") for graph in ("training", "compiled")
    ]
    rows[-1] = Row("compiled", "onnxruntime", failure="no")
    about = {
        "inputs": [[1, 3, 8, 8]],
        "precision": "float32",
        "threads": 1,
        "processor": "a processor",
        "clock": "wall",
    }
    return Benchmark(tuple(rows), {10: (1.0, 1.0)}, about)


def test_the_chart_shows_every_row(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot.draw(chart(), tmp_path / "chart.svg", "net")
    assert (tmp_path / "chart.svg").read_text().count("<path") > 10
    plot.draw(chart(), tmp_path / "chart.png", "net")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.iterdir())) == 2


def test_charts_have_formats(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(ReparamError, match=r"a chart ends in \.png, \.svg, \.pdf"):
        plot.draw(chart(), tmp_path / "chart.gif", "net")


def test_a_chart_needs_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ReparamError, match="pip install matplotlib"):
        plot.require(Path("chart.png"))

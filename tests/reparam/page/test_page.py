"""The page on a compilation: what it says, that it needs nothing from anywhere, and that names cannot harm it."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import reparam
from reparam import models
from reparam.errors import ExportError, ReparamError
from reparam.page import page
from reparam.page.page import Chart, Latency
from reparam.timing import Timing
from support import Net, randomise

X = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
_VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """A parsed page; elements must nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.text += " "
        self.elements.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data

    def attributes(self, name: str) -> list[str | None]:
        return [attributes[name] for _, attributes in self.elements if name in attributes]


@pytest.fixture(scope="module")
def digits() -> tuple[nn.Module, nn.Module]:
    model = randomise(models.create("repvit_digits")).eval()
    return model, reparam.compile(model, X)


CHART = Chart(
    "some machine",
    (Latency("before", Timing(4e-3, 3e-3, 6e-3), False), Latency("after", Timing(2e-3, 1e-3, 3e-3), True)),
)


@pytest.fixture(scope="module")
def text(digits: tuple[nn.Module, nn.Module]) -> str:
    return page.render(*digits, X, title="Digits", charts=[CHART])


def test_it_says_what_was_done(text: str, digits: tuple[nn.Module, nn.Module]) -> None:
    words = " ".join(Page(text).text.split())
    report = digits[1].report
    assert "Digits" in words
    assert "reparam.models.repvit.RepViT" in words
    assert "2×1×8×8 float32" in words
    assert f"norms {report.before.norms} 0 −100%" in words
    assert f"parameters {report.before.parameters:,} {report.after.parameters:,}" in words
    assert f"{report.certificates} rewrites certified" in words
    assert str(report.comparison) in words
    for rule in {remark.rule for remark in report.remarks}:
        count = sum(remark.rule == rule for remark in report.fused)
        assert f"{rule} {count} remark" in words
    assert all(remark.message in words for remark in report.remarks)


def test_it_charts_latencies(text: str) -> None:
    assert "2.00 ms (1.00 to 3.00), 2.00× as fast" in Page(text).text
    widths = [
        attributes["width"]
        for tag, attributes in Page(text).elements
        if attributes.get("class") in ("trained", "compiled")
    ]
    assert widths == ["66.67%", "33.33%"], "of the longest whisker"


def test_it_needs_nothing_from_anywhere_and_runs_nothing(text: str) -> None:
    parsed = Page(text)
    assert not {tag for tag, _ in parsed.elements} & {"script", "link", "img", "iframe", "object", "image", "use"}
    assert not [name for _, attributes in parsed.elements for name in attributes if name.startswith("on")]
    assert not parsed.attributes("src") + parsed.attributes("href") + parsed.attributes("srcset")
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    assert "default-src 'none'" in text


def test_it_is_made_for_phones_screen_readers_and_the_night(text: str) -> None:
    parsed = Page(text)
    assert "width=device-width, initial-scale=1" in parsed.attributes("content")
    assert "prefers-color-scheme: dark" in text
    identifiers = parsed.attributes("id")
    assert len(identifiers) == len(set(identifiers))
    labels = " ".join(label or "" for label in parsed.attributes("aria-labelledby")).split()
    assert set(labels) <= set(identifiers)
    drawings = re.findall(r'<div class="scroll" tabindex="0">(<svg.*?</svg>)</div>', text, re.DOTALL)
    assert len(drawings) == sum(tag == "svg" for tag, _ in parsed.elements) - 1, (
        "all but the chart scroll by themselves"
    )
    for drawn in drawings:
        ET.fromstring(drawn)


def test_equal_blocks_are_one_and_others_are_not() -> None:
    class Mixer(nn.Module):
        def __init__(self, channels: int, kernel: int = 3) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(channels, channels, kernel, padding=kernel // 2), nn.BatchNorm2d(channels)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(x)) + x

    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU()),
        nn.Sequential(Mixer(4), Mixer(4), Mixer(4, 5)),
        nn.Sequential(Mixer(4), nn.Identity()),
    )
    blocks = page.distinct_blocks(randomise(model).eval(), reparam.compile(model, X), X)
    assert [(block.kind, block.paths) for block in blocks] == [
        ("Sequential", ("0",)),
        ("Mixer", ("1.0", "1.1", "2.0")),
        ("Mixer", ("1.2",)),
    ]
    assert [(block.before.calls, block.after.calls) for block in blocks] == [(3, 2), (3, 1), (3, 1)]
    assert all(block.changed for block in blocks)


def test_layers_between_blocks_are_drawn_too() -> None:
    blocks = nn.ModuleList([Net(lambda s, x: s.norm(x) + s.conv(x), norm=nn.BatchNorm2d(4), conv=nn.Conv2d(4, 4, 1))])
    model = Net(lambda s, x: s.blocks[0](s.stem(x)), stem=nn.Conv2d(1, 4, 3), blocks=blocks)
    model = nn.Sequential(model, nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), *(nn.ReLU() for _ in range(50)))
    found = page.distinct_blocks(model.eval(), reparam.compile(model), X)
    assert [block.kind for block in found] == ["Sequential, its own layers", "Net"]


def test_parts_of_what_cannot_be_traced_are_drawn() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.part(x) if x.sum() > 0 else self.part(-x)

    part = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3))
    model = Net(forward, part=part).eval()
    compiled = reparam.compile(model)
    (block,) = page.distinct_blocks(model, compiled)
    assert (block.paths, block.before.calls, block.after.calls) == (("part",), 2, 1)
    assert "kept as Python" in page.render(model, compiled)


def test_exported_programs_have_a_page() -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3)).eval()
    program = torch.export.export(model, (X,))
    (block,) = page.distinct_blocks(program, reparam.compile(program))
    assert (block.before.calls, block.after.calls) == (2, 1)


def test_names_of_modules_are_untrusted() -> None:
    hostile = "<script>alert(1)</script>'&amp;{{ 7*7 }}\x1b[0m\u202e"
    layer = type(hostile, (nn.Sequential,), {})
    model = nn.Sequential(nn.Conv2d(1, 2, 3))
    model.add_module(hostile, layer(nn.BatchNorm2d(2), nn.LayerNorm(6), nn.GroupNorm(1, 2)))
    text = page.render(
        model, reparam.compile(model, X), X, title=hostile + "\ud800", charts=[Chart(hostile, CHART.bars)]
    )
    parsed = Page(text)
    assert "script" not in {tag for tag, _ in parsed.elements}
    assert hostile.split("\x1b")[0] in parsed.text
    assert not set("\x1b\u202e\ud800") & set(text)
    text.encode()


def test_a_model_without_a_report_is_refused() -> None:
    with pytest.raises(ReparamError, match=r"Conv2d has no report; give what reparam\.compile returned"):
        page.render(nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1))


def test_writing_is_atomic(
    tmp_path: Path, digits: tuple[nn.Module, nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "page.html"
    page.write(target, *digits, X)
    written = target.read_text()
    assert written.startswith("<!doctype html>")
    monkeypatch.setattr(Path, "write_text", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(ExportError, match="No space left"):
        page.write(target, *digits, X)
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    assert target.read_text() == written


def test_timing_runs_both_and_changes_neither() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).train()
    statistics = model[1].running_mean.clone()
    chart = page.time(model, reparam.compile(model, X), X, seconds=0.1)
    assert [(bar.name, bar.compiled) for bar in chart.bars] == [
        ("training graph, eager", False),
        ("compiled graph, eager", True),
    ]
    assert all(0 < bar.timing.low <= bar.timing.median <= bar.timing.high for bar in chart.bars)
    assert "2×1×8×8 float32" in chart.conditions
    assert model.training
    assert torch.equal(model[1].running_mean, statistics)


BENCHMARK: dict[str, Any] = {
    "model": "m",
    "threads": 2,
    "rows": [
        {"graph": "training", "runtime": "eager", "seconds": {"median": 2.0, "low": 1.0, "high": 3.0}},
        {"graph": "compiled", "runtime": "openvino", "seconds": {"median": 1.0, "low": 1.0, "high": 1.0}},
        {"graph": "compiled", "runtime": "executorch", "seconds": None},
    ],
}


def test_a_benchmark_is_a_chart() -> None:
    chart = page.chart_of(BENCHMARK)
    assert chart.conditions == "m, 2 threads"
    assert page.chart_of({**BENCHMARK, "clock": "processor"}).conditions == "m, 2 threads, processor time"
    assert [(bar.name, bar.timing.median, bar.compiled) for bar in chart.bars] == [
        ("training graph, eager", 2.0, False),
        ("compiled graph, openvino", 1.0, True),
    ]


@pytest.mark.parametrize(
    "wrong",
    [
        [],
        {},
        {**BENCHMARK, "rows": [{"graph": "a", "runtime": "b", "seconds": {"median": 1.0, "low": 2.0, "high": 3.0}}]},
        {**BENCHMARK, "rows": [{"graph": "a", "runtime": "b", "seconds": {"median": 0.0, "low": 0.0, "high": 0.0}}]},
        {**BENCHMARK, "threads": "many"},
    ],
)
def test_other_json_is_no_benchmark(wrong: Any) -> None:
    with pytest.raises(ReparamError, match="this is not what reparam bench --json prints"):
        page.chart_of(wrong)

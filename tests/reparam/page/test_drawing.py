"""Drawings of graphs: what becomes a box, where it goes, and that the result is a picture for everybody."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from reparam.page import drawing
from reparam.page.drawing import Box, Diagram

SVG = "{http://www.w3.org/2000/svg}"


class Branches(nn.Module):
    """RepViT's token mixer, with what a drawing leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv3, self.norm3 = nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.BatchNorm2d(4)
        self.conv1, self.norm = nn.Conv2d(4, 4, 1, groups=4), nn.BatchNorm2d(4)
        self.identity, self.dropout = nn.Identity(), nn.Dropout()
        self.scale = nn.Parameter(torch.ones(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.norm3(self.conv3(x)) + self.conv1(x) + self.identity(x)) * self.scale
        return x.view(x.shape[0], -1)


@pytest.fixture(scope="module")
def branches() -> Diagram:
    return drawing.diagram_of(fx.symbolic_trace(Branches().eval()))


def test_a_drawing_shows_layers_sums_and_values(branches: Diagram) -> None:
    assert [(box.kind, box.title, box.detail) for box in branches.boxes] == [
        ("value", "input", ""),
        ("convolution", "depthwise 3×3", "4"),
        ("norm", "batch norm", ""),
        ("convolution", "depthwise 1×1", "4"),
        ("sign", "+", ""),
        ("sign", "+", ""),
        ("norm", "batch norm", ""),
        ("norm", "scale", ""),
        ("other", "view", ""),
        ("value", "output", ""),
    ]
    assert branches.calls == 8
    assert (0, 5) in branches.edges, "an identity is a line"
    assert "5 + reads 3 and 4" in str(branches)


@pytest.mark.parametrize(
    ("layer", "title", "detail"),
    [
        (nn.Conv2d(4, 6, 3, stride=2, groups=2), "conv 3×3", "4 → 6, stride 2, 2 groups"),
        (nn.Conv2d(4, 4, (1, 7), dilation=(1, 2)), "conv 1×7", "4 → 4, dilation 1×2"),
        (nn.ConvTranspose2d(4, 6, 2, stride=2), "transposed 2×2", "4 → 6, stride 2"),
        (nn.Linear(3, 5), "linear", "3 → 5"),
        (nn.AvgPool2d(3), "average pool 3×3", ""),
        (nn.LayerNorm(4), "layer norm", ""),
        (nn.GELU(), "GELU", ""),
        (nn.ZeroPad2d(1), "pad", ""),
    ],
)
def test_a_box_says_what_tells_layers_apart(layer: nn.Module, title: str, detail: str) -> None:
    box = drawing.diagram_of(fx.symbolic_trace(nn.Sequential(layer))).boxes[1]
    assert (box.title, box.detail) == (title, detail)


@st.composite
def diagrams(draw: st.DrawFn) -> Diagram:
    count = draw(st.integers(1, 12))
    edges = {
        (draw(st.integers(0, reader - 1)), reader) for reader in range(1, count) for _ in range(draw(st.integers(0, 3)))
    }
    return Diagram(tuple(Box("other", str(index)) for index in range(count)), tuple(sorted(edges)))


@given(diagrams(), st.data())
def test_every_box_is_below_what_it_reads_and_nothing_overlaps(diagram: Diagram, data: st.DataObject) -> None:
    widths = [data.draw(st.sampled_from([40.0, 120.0])) for _ in diagram.boxes]
    layout = drawing.arrange(diagram, widths, gap=10, lane=8)
    rows: dict[float, list[tuple[float, float]]] = {}
    for (x, row), width in zip(layout.places, widths, strict=True):
        rows.setdefault(row, []).append((x, width))
    for (source, reader), points in layout.edges.items():
        assert (points[0], points[-1]) == (layout.places[source], layout.places[reader])
        levels = [row for _, row in points]
        assert levels == list(range(int(levels[0]), int(levels[-1]) + 1)), "an edge goes down, row by row"
        for x, row in points[1:-1]:
            rows[row].append((x, 8.0))
    for items in rows.values():
        items.sort()
        for (x, width), (next_x, next_width) in pairwise(items):
            assert next_x - x >= (width + next_width) / 2 + 10 - 1e-6


def test_a_chain_is_straight(branches: Diagram) -> None:
    chain = Diagram(tuple(Box("other", str(index)) for index in range(4)), ((0, 1), (1, 2), (2, 3)))
    assert {x for x, _ in drawing.arrange(chain, [50, 100, 20, 80], 10, 8).places} == {0.0}


def test_the_svg_is_xml_with_a_title_and_a_description(branches: Diagram) -> None:
    root = ET.fromstring(drawing.svg(branches, "one", "A token mixer"))
    names = root.attrib["aria-labelledby"].split()
    labels = [root.find(f"{SVG}title"), root.find(f"{SVG}desc")]
    assert [label.attrib["id"] for label in labels] == names
    assert [label.text for label in labels] == ["A token mixer", str(branches)]
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert texts.count("batch norm") == 2
    assert len([path for path in root.iter(f"{SVG}path") if path.attrib["class"] == "edge"]) == len(branches.edges)
    width, height = (float(root.attrib[name]) for name in ("width", "height"))
    for rect in root.iter(f"{SVG}rect"):
        x, y, w, h = (float(rect.attrib[name]) for name in ("x", "y", "width", "height"))
        assert 0 <= x <= x + w <= width
        assert 0 <= y <= y + h <= height


def test_hostile_names_stay_text() -> None:
    hostile = '</text><script>alert("1")</script>\x00\u202e\ud800&'
    root = ET.fromstring(drawing.svg(Diagram((Box("other", hostile, hostile),), ()), "x", hostile))
    assert {child.tag for child in root.iter()} == {SVG + tag for tag in ("svg", "title", "desc", "g", "rect", "text")}
    assert root.find(f"{SVG}title").text == hostile[:-4] + "\ufffd\ufffd\ufffd&"


def test_an_empty_drawing_is_no_crash() -> None:
    ET.fromstring(drawing.svg(Diagram((), ()), "x", "nothing"))

"""The documentation's code: every Python block of a page runs, in order, and prints what the page says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import reparam
from reparam.targets import registry

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    "README.md",
    "docs/blocks.md",
    "docs/extending.md",
    "docs/how-it-works.md",
    "docs/index.md",
    "docs/not-fused.md",
    "docs/report.md",
]
# A Python block, and the text block right after it, which is what it prints.
_BLOCK = re.compile(r"^```python\n(?P<code>.*?)^```$(?:\s*^```text\n(?P<output>.*?)^```$)?", re.MULTILINE | re.DOTALL)


def run_blocks(page: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """Run the blocks of a page in one namespace, and compare what they print."""
    text = page.read_text()
    blocks = list(_BLOCK.finditer(text))
    assert blocks, f"{page} has no Python"
    namespace: dict[str, Any] = {"__name__": page.stem}
    for block in blocks:
        line = text.count("\n", 0, block.start("code"))
        # A traceback shows the page's own line.
        exec(compile("\n" * line + block["code"], str(page), "exec"), namespace)
        printed = capsys.readouterr().out
        if block["output"] is not None:
            assert printed == block["output"], f"{page.name}, line {line}"
    return namespace


@pytest.mark.parametrize("page", PAGES)
def test_a_page_runs(
    page: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if page == "README.md":
        pytest.importorskip("timm")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "TARGETS", dict(registry.TARGETS))  # what a page registers is its own
    torch.manual_seed(0)
    run_blocks(ROOT / page, capsys)


def test_a_page_that_is_wrong_is_noticed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```python\nprint(1)\n```\n\n```text\n2\n```\n")
    with pytest.raises(AssertionError, match=r"page\.md, line 1"):
        run_blocks(page, capsys)
    page.write_text("```python\na = 1\n```\n\nAnd then:\n\n```python\nprint(b)\n```\n")
    with pytest.raises(NameError):
        run_blocks(page, capsys)


def test_links_lead_somewhere() -> None:
    """Every relative link of a page is a file."""
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_file_has_a_room() -> None:
    """docs/architecture.md names every module of the compiler, and every rule."""
    architecture = (ROOT / "docs" / "architecture.md").read_text()
    engine = ("algebra", "capture", "deploy", "files", "graph", "page", "rewrite", "tuning")
    folders = [ROOT / "passes", ROOT / "reparam", *(ROOT / "reparam" / name for name in engine)]
    files = [path for folder in folders for path in folder.glob("[!_]*.py")]
    assert [path for path in files if f"`{path.stem}`" not in architecture and path.name not in architecture] == []
    rules = [rule.name for rule in reparam.passes.default()]
    assert [name for name in rules if name not in architecture] == []

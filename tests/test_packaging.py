"""What a wheel of this repository puts into site-packages."""

from __future__ import annotations

import email
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"reparam": "reparam", "passes": "reparam/passes", "models": "reparam/models"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """A wheel built from a copy, so that no stale `build/` takes part and the work tree stays as it is."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    built = subprocess.run([*command, "-w", "dist", "."], cwd=source, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (path,) = (source / "dist").glob("*.whl")
    return zipfile.ZipFile(path)


def metadata(wheel: zipfile.ZipFile, file: str) -> str:
    (name,) = (name for name in wheel.namelist() if re.fullmatch(rf"reparam-[^/]+\.dist-info/{file}", name))
    return wheel.read(name).decode()


def test_only_reparam_lands_in_site_packages(wheel: zipfile.ZipFile) -> None:
    top = {name.split("/")[0] for name in wheel.namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == {"reparam"}


def test_every_module_is_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    expected = {
        f"{target}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, target in FOLDERS.items()
        for path in (ROOT / folder).rglob("*.py")
    }
    packaged = {name for name in wheel.namelist() if name.endswith(".py")}
    assert {f"{target}/__init__.py" for target in FOLDERS.values()} <= packaged
    assert packaged == expected


def test_the_template_of_the_page_is_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    assert "reparam/page/templates/report.html" in wheel.namelist()


def test_is_typed_and_licensed(wheel: zipfile.ZipFile) -> None:
    assert "reparam/py.typed" in wheel.namelist()
    assert email.message_from_string(metadata(wheel, "METADATA"))["License-Expression"] == "Apache-2.0"
    assert "Apache License" in metadata(wheel, "licenses/LICENSE")


def test_offers_the_command_and_the_extras(wheel: zipfile.ZipFile) -> None:
    assert "reparam = reparam.cli:main" in metadata(wheel, "entry_points.txt")
    extras = email.message_from_string(metadata(wheel, "METADATA")).get_all("Provides-Extra")
    assert extras is not None
    targets = {"onnx", "openvino", "executorch", "coreml", "deploy"}
    assert set(extras) == {*targets, "bench", "demo", "timm", "docs", "test", "dev"}


def test_an_installed_copy_imports(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    """From the wheel alone: the work tree, where the editable install would find its files, is out of reach."""
    wheel.extractall(tmp_path)
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); "
        "import reparam, reparam.models, reparam.passes; "
        "print(*(module.__file__ for module in (reparam, reparam.models, reparam.passes)), sep='\\n')"
    )
    ran = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    expected = [tmp_path / target / "__init__.py" for target in ("reparam", "reparam/models", "reparam/passes")]
    assert [Path(line) for line in ran.stdout.splitlines()] == expected


def test_the_folder_above_a_clone_is_no_trap(tmp_path: Path) -> None:
    """There, the clone itself is a folder called reparam; an editable install has the package of that name."""
    (tmp_path / "reparam").symlink_to(ROOT)
    for program in (["-c", "import reparam; print(reparam.compile)"], ["-m", "reparam", "--help"]):
        run = subprocess.run([sys.executable, *program], cwd=tmp_path, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr

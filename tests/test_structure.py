"""The house: every package has a floor, imports go down, nothing goes in circles."""

import ast
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

import reparam

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"reparam": ROOT / "reparam", "reparam.passes": ROOT / "passes", "reparam.models": ROOT / "models"}

# Rooms, floor by floor: a room sees the floors below, and itself. Rooms of one floor do not know each other.
FLOORS = [
    "report",
    "errors timing modes",
    "atomic",
    "algebra models compare",
    "graph",
    "capture rewrite",
    "passes deploy reference",
    "tuning",
    "files",
    "compiler",
    "expansion dynamo page targets rules lifting",
    "onnx",
    "bench",
    "moved",
    "__init__",
    "cli",
    "__main__",
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms.split()}

# A command starts quickly: what it needs it imports when it is given.
LATE = {"cli"}


def source_files() -> dict[str, str]:
    """The source of every module, by its name as it is imported."""
    return {
        ".".join([package, *(part for part in path.relative_to(folder).with_suffix("").parts if part != "__init__")]): (
            path.read_text()
        )
        for package, folder in PACKAGES.items()
        for path in folder.rglob("*.py")
    }


@dataclass(frozen=True)
class Import:
    module: str
    name: str
    late: bool  # within a function
    for_types: bool  # never run


def imports_of(source: str) -> Iterator[Import]:
    def walk(node: ast.AST, late: bool, for_types: bool) -> Iterator[Import]:
        match node:
            case ast.ImportFrom(module=str() as module, names=names):
                yield from (Import(module, alias.name, late, for_types) for alias in names)
            case ast.Import(names=names):
                yield from (Import(alias.name, "", late, for_types) for alias in names)
        late |= isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        for_types |= isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, late, for_types)

    yield from walk(ast.parse(source), False, False)


def room(module: str) -> str:
    """The package of a module, or the module itself where it has no other."""
    return [*module.split("."), "__init__"][1]


def violations(sources: Mapping[str, str]) -> list[str]:
    """What is wrong with the imports of some modules, in a sentence each."""
    found = []
    runs: dict[str, set[str]] = {}
    for module, source in sources.items():
        for imported in imports_of(source):
            if imported.module.split(".")[0] != "reparam":
                continue
            inner = f"{imported.module}.{imported.name}"
            target = inner if inner in sources else imported.module
            here, there = room(module), room(target)
            if here not in FLOOR:
                found.append(f"{module} has no floor")
            elif here != there and FLOOR[there] >= FLOOR[here]:
                found.append(f"{module} climbs to {target}")
            if imported.late and here not in LATE:
                found.append(f"{module} imports {target} within a function")
            if not imported.for_types and target != module:
                runs.setdefault(module, set()).add(target)
    return found + [f"a circle through {module}" for module in runs if module in _reached(module, runs)]


def _reached(module: str, runs: Mapping[str, set[str]]) -> set[str]:
    found: set[str] = set()
    pending = list(runs.get(module, ()))
    while pending:
        target = pending.pop()
        if target not in found:
            found.add(target)
            pending += runs.get(target, ())
    return found


def test_imports_go_down():
    assert violations(source_files()) == []


@pytest.mark.parametrize(
    ("sources", "said"),
    [
        ({"reparam.graph.a": "from reparam.compiler import compile"}, "reparam.graph.a climbs to reparam.compiler"),
        ({"reparam.capture.a": "import reparam.rewrite.rule"}, "reparam.capture.a climbs to reparam.rewrite.rule"),
        (
            {"reparam.graph.a": "if TYPE_CHECKING:\n    from reparam.cli import main"},
            "reparam.graph.a climbs to reparam.cli",
        ),
        (
            {"reparam.graph.a": "def f():\n    from reparam.report import Remark"},
            "reparam.graph.a imports reparam.report within a function",
        ),
        ({"reparam.attic": "from reparam.report import Remark"}, "reparam.attic has no floor"),
        (
            {"reparam.graph.a": "from reparam.graph import b", "reparam.graph.b": "import reparam.graph.a"},
            "a circle through reparam.graph.a",
        ),
    ],
)
def test_each_kind_of_violation_is_found(sources, said):
    assert said in violations(sources)


def test_no_module_bears_the_name_of_a_public_function():
    functions = {name for name in reparam.__all__ if inspect.isfunction(getattr(reparam, name))}
    assert "compile" in functions
    assert functions.isdisjoint(module.rpartition(".")[2] for module in source_files() if module.count(".") == 1)

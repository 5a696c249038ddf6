"""The house: every package has a floor, imports go down, nothing goes in circles."""

import ast
import json
import pkgutil
import re
import subprocess
import sys
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


PUBLIC = "algebra bench cli compare dynamo errors lifting models onnx page passes rules targets".split()

# Imports modules in an order, each order in a process where nothing but torch is imported yet, and prints what is not
# the module that its name says, and what the public names are.
IMPORTS = """
import importlib, json, os, sys, torch
for order in json.loads(sys.argv[1]):
    if os.fork():
        assert os.wait()[1] == 0, order
        continue
    for name in order:
        importlib.import_module(name)
    for name in order:
        package, _, last = name.rpartition(".")
        if package and getattr(sys.modules[package], last) is not sys.modules[name]:
            print(name)
    import reparam
    print({name: type(getattr(reparam, name)).__name__ for name in reparam.__all__})
    sys.exit()
"""


def test_names_mean_the_same_in_any_order_of_imports():
    """No module bears the name of a public function, or hides one once it is imported."""
    modules = sorted(name for name in source_files() if name != "reparam.__main__")
    first = [[f"reparam.{name}"] for name in PUBLIC]
    orders = json.dumps([*first, modules, modules[::-1]])
    done = subprocess.run([sys.executable, "-c", IMPORTS, orders], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kinds = {name: type(getattr(reparam, name)).__name__ for name in reparam.__all__}
    assert done.stdout.splitlines() == [str(kinds)] * (len(first) + 2)
    assert kinds["compile"] == kinds["export"] == kinds["verify"] == "function"
    assert kinds["targets"] == kinds["rules"] == "module"


def test_references_lead_somewhere():
    """What a docstring, a comment or a page calls by its full name is there."""
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*"), *ROOT.glob("examples/*.py")]
    texts = source_files() | {str(page.relative_to(ROOT)): page.read_text() for page in pages if page.suffix != ".json"}
    written = {(name, dotted) for name, text in texts.items() for dotted in re.findall(r"\breparam(?:\.\w+)+", text)}
    in_files = "reparam.select"  # what deploy files call a function of ours
    assert sorted((name, dotted) for name, dotted in written if not is_there(dotted) and dotted != in_files) == []


def is_there(dotted: str) -> bool:
    """Whether a name is that of a module, or of an attribute of one, of a class, or of its instances."""
    try:
        pkgutil.resolve_name(dotted)
    except (ImportError, AttributeError):
        owner, _, last = dotted.rpartition(".")
        return bool(owner) and is_there(owner) and last in getattr(pkgutil.resolve_name(owner), "__annotations__", ())
    return True

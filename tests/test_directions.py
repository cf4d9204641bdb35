"""Packages form layers: an import, also one inside a function, only points down the list."""

import ast
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

import nestling

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "src" / "nestling"

# From top to bottom. A package may import those after it; names on one line import nothing of each other.
LAYERS = [
    ("cli",),
    ("bench",),
    ("tuning",),
    ("sessions",),
    ("generation",),
    ("training",),
    ("nested_system",),
    ("models",),
    ("layers",),
    ("cms",),
    ("optim",),
    ("memory",),
    ("ops",),
    ("utils", "schedule", "version"),
]
HEIGHT = {package: -depth for depth, row in enumerate(LAYERS) for package in row}

# The package itself lends its public names from below, when they are asked for: whoever imports one imports its home.
LENT = {name: home.split(".")[1] for home, names in nestling._HOMES.items() for name in names}


def package_of(file: Path) -> str:
    """`optim` for src/nestling/optim/m3.py, `schedule` for src/nestling/schedule.py."""
    return file.relative_to(LIBRARY).with_suffix("").parts[0]


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def called(node: ast.Call) -> str:
    """The last name of what is called."""
    return getattr(node.func, "attr", getattr(node.func, "id", ""))


def imported(code: str, module: str):
    """Yields (line, full name) of every import that runs, in functions too; `module` is where relative ones start."""
    waiting = [ast.parse(code)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            home = ".".join(module.split(".")[: -node.level]) if node.level else ""
            base = ".".join(part for part in (home, node.module) if part)
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and called(node).endswith("import_module"):
            # only a name written out can be read here: what a caller names may lie anywhere
            yield from ((node.lineno, a.value) for a in node.args[:1] if isinstance(a, ast.Constant))
        waiting.extend(node.orelse if is_type_checking(node) else ast.iter_child_nodes(node))


@cache
def imports_of(file: Path) -> list[tuple[int, str]]:
    parts = file.relative_to(LIBRARY.parent).with_suffix("").parts
    return list(imported(file.read_text(encoding="utf-8"), ".".join(parts)))


def library_imports():
    """(file:line, importing package, imported package) of every import inside the library, its own __init__ aside."""
    found = []
    for file in sorted(LIBRARY.rglob("*.py")):
        if file.parent == LIBRARY and file.stem in ("__init__", "__main__"):
            continue
        for line, name in imports_of(file):
            parts = name.split(".")
            if parts[0] == "nestling" and len(parts) > 1:
                place = f"{file.relative_to(ROOT)}:{line}"
                found.append((place, package_of(file), LENT.get(parts[1], parts[1])))
    return found


def upward(imports) -> list[str]:
    """What each import that does not point down says; a package may import itself."""
    return [f"{place}: {a} imports {b}" for place, a, b in imports if a != b and HEIGHT[a] <= HEIGHT[b]]


def test_every_package_has_its_layer():
    packages = {p.stem for p in LIBRARY.iterdir() if p.suffix == ".py" or any(p.glob("*.py"))}
    assert packages - {"__init__", "__main__"} == HEIGHT.keys()


def test_imports_point_down():
    found = library_imports()
    assert len(found) > 100
    assert upward(found) == []


def test_packages_form_no_cycle():
    below = defaultdict(set)
    for _, a, b in library_imports():
        below[a] |= {b} - {a}
    left = dict(below)
    while ready := [a for a, others in left.items() if not others & left.keys()]:
        for a in ready:
            del left[a]
    assert left == {}


def test_the_library_never_imports_the_laboratory_or_the_examples():
    """Only cli/laboratory.py finds the experiments, in a checkout, for `nestling eval` and `nestling demo`."""
    found = [
        f"{file.relative_to(ROOT)}:{line}: {name}"
        for file in sorted(LIBRARY.rglob("*.py"))
        for line, name in imports_of(file)
        if name.split(".")[0] in ("experiments", "examples", "tests") and file != LIBRARY / "cli" / "laboratory.py"
    ]
    assert found == []


@pytest.mark.parametrize(
    "code, names",
    [
        ("import nestling.cli as c", ["nestling.cli"]),
        ("def f():\n    from nestling.training import loop", ["nestling.training.loop"]),
        ("from ..training import loop", ["nestling.training.loop"]),
        ("from . import base", ["nestling.ops.base"]),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import nestling.cli", ["typing.TYPE_CHECKING"]),
        ("if TYPE_CHECKING:\n    pass\nelse:\n    import nestling.cli", ["nestling.cli"]),
        ("importlib.import_module('nestling.cli')", ["nestling.cli"]),
        ("importlib.import_module(name)", []),
    ],
)
def test_imports_are_read(code, names):
    assert [name for _, name in imported(code, "nestling.ops.chunk")] == names


def test_an_upward_import_is_found():
    assert upward([("ops/x.py:1", "ops", "training"), ("utils/y.py:2", "utils", "schedule")]) == [
        "ops/x.py:1: ops imports training", "utils/y.py:2: utils imports schedule",
    ]  # fmt: skip
    assert upward([("training/x.py:1", "training", "ops"), ("ops/x.py:1", "ops", "ops")]) == []

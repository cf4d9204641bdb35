"""Every place that the glossary names exists, and its rows are in order."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROWS = [line.split("|")[1:-1] for line in (ROOT / "docs" / "glossary.md").read_text().splitlines() if "`src/" in line]


def names(path: Path) -> set[str]:
    """Classes, functions and constants of a module."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
    return found


def test_every_place_exists():
    places = [place for row in ROWS for place in re.findall(r"`(src/[^`:]+):(\w+)`", row[2])]
    assert len(places) >= len(ROWS) > 30
    missing = [
        f"{file}:{name}" for file, name in places if not (ROOT / file).exists() or name not in names(ROOT / file)
    ]
    assert missing == []


def test_terms_are_in_order():
    terms = [row[0].strip().lower() for row in ROWS]
    assert terms == sorted(terms)

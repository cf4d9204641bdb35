"""Every "decision Dn" that code, tests or pages cite is a heading of docs/decisions.md."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PLACES = ("src", "experiments", "examples", "tests", "docs", "benchmarks")
SUFFIXES = (".py", ".md", ".cpp", ".h")


def cited() -> dict[str, list[str]]:
    """Which files cite a decision, by its name."""
    found: dict[str, list[str]] = {}
    for path in [p for place in PLACES for p in (ROOT / place).rglob("*") if p.suffix in SUFFIXES]:
        for name in re.findall(r"[Dd]ecisions? (D\d+)\b", path.read_text(encoding="utf-8")):
            found.setdefault(name, []).append(str(path.relative_to(ROOT)))
    return found


def test_every_decision_that_is_cited_is_written_down():
    headings = re.findall(r"^## (D\d+)  \S", (ROOT / "docs" / "decisions.md").read_text(encoding="utf-8"), re.M)
    assert headings == [f"D{n}" for n in range(1, len(headings) + 1)]
    missing = {name: files for name, files in cited().items() if name not in headings}
    assert missing == {}
    assert len(cited()) >= 10  # the pattern still finds them

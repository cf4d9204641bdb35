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
        for names in re.findall(r"[Dd]ecisions?\s+(D\d+(?:(?:,? and |, |-)D\d+)*)\b", path.read_text(encoding="utf-8")):
            for name in re.findall(r"D\d+", names):
                found.setdefault(name, []).append(str(path.relative_to(ROOT)))
    return found


def test_every_decision_that_is_cited_is_written_down():
    sections = re.split(r"^## ", (ROOT / "docs" / "decisions.md").read_text(encoding="utf-8"), flags=re.M)[1:]
    headings = [section.split()[0] for section in sections]
    assert [section.splitlines()[0] for section in sections if len(section.split("\n", 1)[1].strip()) < 40] == []
    assert headings == [f"D{n}" for n in range(1, len(headings) + 1)]
    missing = {name: files for name, files in cited().items() if name not in headings}
    assert missing == {}
    assert len(cited()) >= 10  # the pattern still finds them

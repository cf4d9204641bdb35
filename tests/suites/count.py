"""Counts of a run of the suites, from pytest's report: into results.json, and from there into the page."""

from __future__ import annotations

import json
import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

RESULTS = Path(__file__).with_name("results.json")
PAGE = Path(__file__).parents[2] / "docs" / "testing.md"
KINDS = ("passed", "listed", "skipped", "failed")


def counts(*reports: str | Path) -> dict[str, dict[str, int]]:
    """Of each class (or file without classes) how many tests passed, failed as listed, were skipped, failed."""
    found: dict[str, dict[str, str]] = {}
    for case in (case for report in reports for case in ElementTree.parse(report).iter("testcase")):
        parts = case.get("classname").removeprefix("tests.").removeprefix("suites.").split(".")
        name = "/".join(part.removeprefix("test_").removeprefix("Test") for part in parts)
        # a test stands there once more for each of its subtests that does not pass
        test = re.sub(r" [\[(<].*", "", case.get("name"))
        skipped = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            kind = "failed"
        elif skipped is not None:
            kind = "listed" if skipped.get("type") == "pytest.xfail" else "skipped"
        else:
            kind = "passed"
        kinds = found.setdefault(name, {})
        kinds[test] = max(kind, kinds.get(test, kind), key=("passed", "skipped", "listed", "failed").index)
    return {name: {kind: list(found[name].values()).count(kind) for kind in KINDS} for name in sorted(found)}


def table(results: dict) -> str:
    """The counts as a Markdown table."""
    rows = [f"| {name} | " + " | ".join(str(of[kind]) for kind in KINDS) + " |" for name, of in results.items()]
    return "\n".join([f"| suite | {' | '.join(KINDS)} |", "| --- |" + " ---: |" * len(KINDS), *rows])


def write(results: dict) -> None:
    """Keep the counts, and put them into the page between its marks."""
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    page = PAGE.read_text(encoding="utf-8")
    page = re.sub(r"(?<=<!-- suites -->\n\n).*?(?=\n\n<!-- end -->)", lambda _: table(results), page, flags=re.S)
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    write(found := counts(*sys.argv[1:]))
    print(table(found))

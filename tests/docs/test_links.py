"""Relative links of all pages lead to a file of the repository: as a reader of the repository follows them."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [
    p for pattern in ("docs/**/*.md", "experiments/**/*.md", "*.md", "benchmarks/*.md") for p in ROOT.glob(pattern)
]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    targets = [t for t in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) if ":" not in t]
    assert [t for t in targets if not (page.parent / t).exists()] == []

"""README stays short, and what it links to is there."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_readme_is_short_and_its_links_lead_somewhere():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 130
    targets = [t for t in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if "://" not in t]
    assert len(targets) > 15
    assert [t for t in targets if not (ROOT / t).exists()] == []


def test_one_click_from_readme_to_the_core_equation():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "(src/nestling/layers/titans_reference.py)" in text
    assert re.search(r"NL Eqs?\. .*88|NL Eqs\. 83-93", (ROOT / "src/nestling/layers/titans_reference.py").read_text())

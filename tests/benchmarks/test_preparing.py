import json
from pathlib import Path

from benchmarks.preparing import SETTINGS, WORKERS, tables

ROOT = Path(__file__).parents[2]


def test_the_page_shows_the_committed_figures():
    result = json.loads((ROOT / "benchmarks" / "results" / "preparing.json").read_text())
    page = (ROOT / "docs" / "training.md").read_text()
    assert [(row["tokenizer"], row["workers"]) for row in result["rows"]] == [(t, w) for t in SETTINGS for w in WORKERS]
    assert page.split("<!-- preparing -->")[1].split("<!-- end -->")[0].strip() == tables(result).strip()

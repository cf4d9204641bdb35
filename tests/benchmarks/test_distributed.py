import json
from pathlib import Path

from benchmarks.distributed import on_paper, tables

ROOT = Path(__file__).parents[2]


def test_the_page_shows_the_committed_figures():
    result = json.loads((ROOT / "benchmarks" / "results" / "distributed.json").read_text())
    page = (ROOT / "docs" / "distributed.md").read_text()
    assert page.split("<!-- distributed -->")[1].split("<!-- end -->")[0].strip() == tables(result)
    assert result["paper"] == on_paper()

import json
from pathlib import Path

from benchmarks.stages import ARMS, tables

ROOT = Path(__file__).parents[2]


def test_the_page_shows_the_committed_figures():
    result = json.loads((ROOT / "benchmarks" / "results" / "stages.json").read_text())
    page = (ROOT / "docs" / "training.md").read_text()
    assert {row["arm"] for row in result["rows"]} == {*ARMS}
    assert page.split("<!-- stages -->")[1].split("<!-- end -->")[0].strip() == tables(result).strip()

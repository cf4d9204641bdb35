"""Pages take their tables from committed results, never from a hand."""

from pathlib import Path

import pytest

from experiments.shared.show import main, update_page

ROOT = Path(__file__).parents[2]


def test_a_page_is_filled_again_and_again(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "table.md").write_text("| new |\n")
    page = tmp_path / "page.md"
    page.write_text("x\n<!-- experiment a -->\nold\n<!-- end -->\ny\n")
    for _ in range(2):
        main([str(page)], tmp_path)
    assert page.read_text() == "x\n<!-- experiment a -->\n\n| new |\n\n<!-- end -->\ny\n"


def test_an_unknown_experiment_is_named(tmp_path):
    with pytest.raises(ValueError, match="quality"):
        update_page("<!-- experiment quality -->\n<!-- end -->", tmp_path)


@pytest.mark.parametrize(
    "page", ["README.md", *(f"docs/experiments{name}.md" for name in ("", "_optimizers", "_continual"))]
)
def test_committed_pages_show_the_committed_results(page):
    text = (ROOT / page).read_text()
    assert update_page(text, ROOT / "experiments") == text

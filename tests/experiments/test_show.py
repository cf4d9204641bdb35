"""Pages take their tables from committed results, never from a hand."""

from pathlib import Path

import pytest

from experiments import catalog
from experiments.shared.show import VERDICTS, header, main, pages, update_page

ROOT = Path(__file__).parents[2]
QUESTIONS = {name: question for group in catalog.by_group().values() for name, question in group.items()}


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


def test_a_single_figure_is_the_cell_of_its_table(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "table.md").write_text(
        "| x | loss |\n| --- | ---: |\n| one | 1.5 ± 0.1 |\n\n| x | time |\n| --- | ---: |\n| one | 7 |\n| two | 8 |\n"
    )
    page = "| <!-- cell a; one; loss -->0<!-- end -->, <!-- cell a; two; time -->0<!-- end --> | kept |"
    filled = "| <!-- cell a; one; loss -->1.5 ± 0.1<!-- end -->, <!-- cell a; two; time -->8<!-- end --> | kept |"
    assert update_page(page, tmp_path) == filled == update_page(filled, tmp_path)
    for asked in ("a; two; loss", "a; three; time", "b; one; loss"):
        with pytest.raises(ValueError, match=asked):
            update_page(f"<!-- cell {asked} --><!-- end -->", tmp_path)


@pytest.mark.parametrize("page", pages(ROOT), ids=lambda path: str(path.relative_to(ROOT)))
def test_committed_pages_show_the_committed_results(page):
    text = page.read_text()
    assert update_page(text, ROOT / "experiments") == text


@pytest.mark.parametrize("name", QUESTIONS)
def test_every_experiment_has_a_page_that_says_what_it_asked_and_found(name):
    text = (ROOT / "experiments" / name / "README.md").read_text()
    found = header(text)
    assert found["Question"] == QUESTIONS[name]
    assert found["Verdict"] in VERDICTS
    assert found["Paper"]
    assert f"experiments/{name}/README.md\n" in (ROOT / "mkdocs.yml").read_text()
    for part in (f"```bash\nnestling eval {name}", f"<!-- experiment {name} -->", "](plot.png)", "\n## Limits\n"):
        assert part in text

"""The tour's cells run in order; the notebook and the page are made of the same cells."""

import importlib.util
import json
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def maker():
    spec = importlib.util.spec_from_file_location("make_tour", DOCS / "figures" / "make_tour.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_notebook_and_page_are_made_of_the_cells():
    make = maker()
    parts = make.cells((DOCS / "tour.py").read_text(encoding="utf-8"))
    assert (DOCS / "tour.ipynb").read_text(encoding="utf-8") == make.notebook(parts)
    assert (DOCS / "tour.md").read_text(encoding="utf-8") == make.page(parts)


def test_the_notebook_runs(capsys):
    cells = json.loads((DOCS / "tour.ipynb").read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert len(code) >= 12
    names: dict = {}
    for i, source in enumerate(code):
        exec(compile(source, f"tour cell {i}", "exec"), names)
    assert "nats per byte" in capsys.readouterr().out

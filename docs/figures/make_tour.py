"""Writes docs/tour.ipynb and docs/tour.md from docs/tour.py, whose cells begin with `# %%` (code) or `# %% [markdown]`.

python docs/figures/make_tour.py
"""

from __future__ import annotations

import json
from pathlib import Path

DOCS = Path(__file__).parents[1]


def cells(source: str) -> list[tuple[str, str]]:
    """("markdown" or "code", text) of each cell."""
    found = []
    for part in source.split("\n# %%")[1:]:
        head, _, body = part.partition("\n")
        body = body.strip("\n")
        if "markdown" in head:
            found.append(("markdown", "\n".join(line.removeprefix("#").removeprefix(" ") for line in body.split("\n"))))
        else:
            found.append(("code", body))
    return found


def notebook(parts: list[tuple[str, str]]) -> str:
    rows = []
    for i, (kind, text) in enumerate(parts):
        cell = {"cell_type": kind, "id": f"cell-{i}", "metadata": {}, "source": text.splitlines(keepends=True)}
        rows.append(cell | ({"execution_count": None, "outputs": []} if kind == "code" else {}))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    whole = {"cells": rows, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


def page(parts: list[tuple[str, str]]) -> str:
    return "\n\n".join(text if kind == "markdown" else f"```python\n{text}\n```" for kind, text in parts) + "\n"


if __name__ == "__main__":
    parts = cells((DOCS / "tour.py").read_text(encoding="utf-8"))
    (DOCS / "tour.ipynb").write_text(notebook(parts), encoding="utf-8")
    (DOCS / "tour.md").write_text(page(parts), encoding="utf-8")

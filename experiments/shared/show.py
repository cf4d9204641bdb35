"""Committed results on pages: `python -m experiments.shared.show` writes tables, single figures and the index anew."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from experiments import catalog
from experiments.shared.report import markdown
from nestling.utils.files import write_text

MARKER = re.compile(r"(<!-- experiment (\S+) -->\n).*?<!-- end -->", re.DOTALL)
CELL = re.compile(r"(<!-- cell ([^>]*?) -->).*?(<!-- end -->)")
INDEX = re.compile(r"(<!-- experiments -->\n).*?<!-- end -->", re.DOTALL)
PAGES = ("experiments.md", "evidence.md", "continual.md")
VERDICTS = ("holds", "holds in part", "does not hold", "cannot tell")


def update_page(page: str, experiments: Path, link: str = "../experiments") -> str:
    """The page with the text between `<!-- experiment NAME -->` and `<!-- end -->` taken from NAME/table.md, and
    between `<!-- experiments -->` and `<!-- end -->` a table of all experiments; within a line the text between
    `<!-- cell NAME; row; column -->` and `<!-- end -->` is that cell of NAME/table.md.

    Args:
        link: where the experiments are, seen from the page.

    Raises:
        ValueError: a marker names an experiment without a table, or a row or column that its table does not have.
    """

    def section(match: re.Match) -> str:
        table = experiments / match[2] / "table.md"
        if not table.is_file():
            raise ValueError(f"the page asks for experiment {match[2]!r}, but there is no {table}: run nestling eval")
        return f"{match[1]}\n{table.read_text().strip()}\n\n<!-- end -->"

    page = MARKER.sub(section, page)
    page = CELL.sub(lambda match: f"{match[1]}{cell(match[2], experiments)}{match[3]}", page)
    return INDEX.sub(lambda match: f"{match[1]}\n{index(experiments, link)}\n<!-- end -->", page)


def cell(asked: str, experiments: Path) -> str:
    """A figure of a table: `NAME; row; column`, the first that fits where NAME/table.md holds several tables.

    Raises:
        ValueError: there is no such table, row or column.
    """
    name, row, column = asked.split("; ")
    path = experiments / name / "table.md"
    header: list[str] = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        found = [part.strip() for part in line.strip("| ").split(" | ")]
        if not line.startswith("|"):
            header = []
        elif not header:
            header = found
        elif found[0] == row and column in header:
            return found[header.index(column)]
    raise ValueError(f"the page asks for {asked!r}, but {path} has no such row and column")


def index(experiments: Path, link: str) -> str:
    """A line for each experiment: question, where in the paper, verdict."""
    rows = []
    for group, found in catalog.by_group(experiments).items():
        for name, question in found.items():
            head = header((experiments / name / "README.md").read_text())
            rows.append([f"[{name}]({link}/{name}/README.md)", group, question, head["Paper"], head["Verdict"]])
    return markdown(["experiment", "about", "question", "in the paper", "verdict"], rows, left=5)


def header(readme: str) -> dict[str, str]:
    """What an experiment's README says first: its question, and in a word or two the place in the paper and verdict."""
    lines = re.findall(r"^- \*\*(\w+)\*\*(?: \((.*?)\))?: (.*)$", readme, re.MULTILINE)
    return {name: short or text for name, short, text in lines}


def pages(root: Path) -> list[Path]:
    """The pages that show results."""
    docs = [root / "docs" / name for name in PAGES]
    return [root / "README.md", *docs, *sorted(root.glob("experiments/*/README.md"))]


def main(paths: list[str], experiments: Path = Path("experiments")) -> None:
    """Fill these pages; without any, all of `pages`."""
    for path in map(Path, paths) if paths else pages(experiments.parent):
        write_text(path, update_page(path.read_text(), experiments))


if __name__ == "__main__":
    main(sys.argv[1:])

"""Committed results on a page: `python -m experiments.shared.show PAGE ...` writes its tables anew."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

from nestling.utils.files import write_text

MARKER = re.compile(r"(<!-- experiment (\S+) -->\n).*?<!-- end -->", re.DOTALL)


def update_page(page: str, experiments: Path) -> str:
    """The page with the text between `<!-- experiment NAME -->` and `<!-- end -->` taken from NAME/table.md.

    Raises:
        ValueError: a marker names an experiment without a table.
    """

    def section(match: re.Match) -> str:
        table = experiments / match[2] / "table.md"
        if not table.is_file():
            raise ValueError(f"the page asks for experiment {match[2]!r}, but there is no {table}: run nestling eval")
        return f"{match[1]}\n{table.read_text().strip()}\n\n<!-- end -->"

    return MARKER.sub(section, page)


def main(pages: list[str], experiments: Path = Path("experiments")) -> None:
    """Fill every page, and lay the plots of the experiments it names beside it in images/."""
    for name in pages:
        path = Path(name)
        text = path.read_text()
        write_text(path, update_page(text, experiments))
        for experiment in MARKER.findall(text):
            plot = experiments / experiment[1] / "plot.png"
            if plot.is_file() and (path.parent / "images").is_dir():
                shutil.copyfile(plot, path.parent / "images" / f"{experiment[1]}.png")


if __name__ == "__main__":
    main(sys.argv[1:])

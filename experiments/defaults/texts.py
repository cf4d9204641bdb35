"""The texts that are read: what each is, where it comes from, and how much of it."""

from __future__ import annotations

import csv
import functools
import gzip
import importlib.metadata
import json
import sysconfig
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
ROOM = 16  # characters taken for each token that is wanted


@dataclass(frozen=True)
class Source:
    """A text to read.

    Attributes:
        name: one word.  kind: prose, code, notes, tables or a language.
        place: "books/FILE" and "bible/LANGUAGE" in the data's folder; "clinc150" and "banking77" there, as tables;
            "python/FILE" of the standard library; "package/FILE" of an installed one; "readme/PACKAGE", as it is
            published; "notes/FILE" beside this module.
        start: share of the text to pass over first.  tokens: to read; fewer, where the text ends.
    """

    name: str
    kind: str
    place: str
    start: float
    tokens: int

    def text(self, data: Path, characters: int) -> str:
        """This many characters from `start` on, from the beginning of a line."""
        whole = _whole(self.place, str(data))
        begin = whole.find("\n", int(self.start * len(whole))) + 1 if self.start else 0
        return whole[begin : begin + characters]


@functools.lru_cache(maxsize=64)
def _whole(place: str, data: str) -> str:
    kind, _, name = place.partition("/")
    folder = Path(data)
    if kind == "bible":
        with gzip.open(folder / "bible" / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
            return "\n".join(json.loads(line)["src"] for line in file)
    if kind == "clinc150":
        rows = json.loads((folder / "clinc150" / "data_full.json").read_text(encoding="utf-8"))[name]
        return "".join(f"{intent}\t{text}\n" for text, intent in rows[:: 1 if len(rows) < 5000 else 7])
    if kind == "banking77":
        with open(folder / "banking77" / name, encoding="utf-8", newline="") as file:
            return "".join(f"| {number} | {category} | {' '.join(text.split())} |\n"
                           for number, (text, category) in enumerate(list(csv.reader(file))[1::40]))  # fmt: skip
    if kind == "readme":
        found = importlib.metadata.metadata(name)
        return found.get_payload() or found["Description"]  # type: ignore[return-value]
    roots = {"python": sysconfig.get_paths()["stdlib"], "package": sysconfig.get_paths()["purelib"], "notes": HERE}
    path = Path(roots[kind], place if kind == "notes" else name) if kind in roots else folder / place
    return path.read_text(encoding="utf-8")


# settings are chosen on these
DEVELOPMENT = (
    Source("allotment", "notes", "notes/development.txt", 0.0, 600),
    Source("pepys", "prose", "books/samuel-pepys--the-diary.txt", 0.4, 960),
    Source("tarfile", "code", "python/tarfile.py", 0.3, 960),
    Source("galela matthew", "galela", "bible/galela", 0.1, 768),
)
# and judged on these, from short to long
JUDGED = (
    Source("banking", "tables", "banking77/train.csv", 0.5, 200),
    Source("boiler", "notes", "notes/boiler.txt", 0.0, 600),
    Source("galela acts", "galela", "bible/galela", 0.6, 250),
    Source("bisect", "code", "python/bisect.py", 0.0, 300),
    Source("moby", "prose", "books/herman-melville--moby-dick.txt", 0.3, 350),
    Source("uma john", "uma", "bible/uma", 0.45, 400),
    Source("greenhouse", "notes", "notes/greenhouse.txt", 0.0, 600),
    Source("stocks", "tables", "package/matplotlib/mpl-data/sample_data/msft.csv", 0.0, 450),
    Source("typer", "notes", "readme/typer", 0.2, 500),
    Source("graphlib", "code", "python/graphlib.py", 0.0, 550),
    Source("cherokee", "cherokee", "bible/cherokee", 0.5, 600),
    Source("middlemarch", "prose", "books/george-eliot--middlemarch.txt", 0.5, 700),
    Source("intents", "tables", "clinc150/test", 0.2, 800),
    Source("galela luke", "galela", "bible/galela", 0.25, 900),
    Source("cosine", "code", "package/transformers/optimization.py", 0.1, 1000),
    Source("accelerate", "notes", "readme/accelerate", 0.0, 1200),
    Source("war", "prose", "books/leo-tolstoy--war-and-peace.txt", 0.6, 1500),
    Source("uma romans", "uma", "bible/uma", 0.7, 2000),
    Source("shutil", "code", "python/shutil.py", 0.1, 3000),
    Source("ahab", "prose", "books/herman-melville--moby-dick.txt", 0.6, 20000),
)
# those that every machine has: enough to see the experiment work
SMOKE = tuple(source for source in DEVELOPMENT if source.place.startswith(("notes/", "python/")))
SETS = {"judged": JUDGED, "development": DEVELOPMENT, "smoke": SMOKE}
# ordinary text that nobody reads, on which harm is measured
ELSEWHERE = {
    "development": (
        Source("dorothea", "prose", "books/george-eliot--middlemarch.txt", 0.1, 160),
        Source("shelve", "code", "python/shelve.py", 0.3, 160),
        Source("requests", "questions", "clinc150/val", 0.5, 160),
    ),
    "judged": (
        Source("chancery", "prose", "books/charles-dickens--bleak-house.txt", 0.3, 160),
        Source("textwrap", "code", "python/textwrap.py", 0.3, 160),
        Source("wishes", "questions", "clinc150/train", 0.7, 160),
    ),
    "smoke": (Source("shelve", "code", "python/shelve.py", 0.3, 160),),
}

"""Class-incremental streams of labelled texts: CLINC150 and Banking77, class group by class group."""

from __future__ import annotations

import csv
import functools
import hashlib
import json
import random
from dataclasses import dataclass
from pathlib import Path

from experiments.shared.data import find_data
from nestling.training.config import unknown

SOURCES = {
    "clinc150": (["data_full.json"], "get data_full.json of CLINC150 from github.com/clinc/oos-eval"),
    "banking77": (["train.csv", "test.csv"], "get train.csv and test.csv of Banking77 (PolyAI/banking77)"),
}
GROUPS = {"clinc150": 10, "banking77": 7, "letters": 2}
HELD_OUT = 20  # texts of each class of Banking77's training part that are kept for validation


@dataclass(frozen=True)
class Intents:
    """Texts by class: `train`, `val` and `test` are [class][text], `labels` the classes' names as text."""

    labels: list[str]
    train: list[list[str]]
    val: list[list[str]]
    test: list[list[str]]
    fingerprint: str


@dataclass(frozen=True)
class Example:
    """A labelled text; `label` is the class's index."""

    text: str
    label: int


@dataclass(frozen=True)
class ClassStream:
    """What arrives: groups of examples, the classes of each group, and the texts to test on."""

    labels: list[str]
    classes: list[list[int]]
    groups: list[list[Example]]
    tests: list[list[Example]]

    def seen(self, group: int) -> list[int]:
        """The classes of all groups up to this one."""
        return [c for classes in self.classes[: group + 1] for c in classes]


def find(folder: str | Path | None, name: str) -> Path:
    """The folder of a data set; `folder` holds the folders of all of them.

    Raises:
        ValueError: an unknown name, no folder, a missing file.
    """
    if name not in SOURCES:
        raise ValueError(unknown("data set", name, SOURCES))
    return find_data(Path(folder) / name if folder else None, name, *SOURCES[name])


@functools.lru_cache(maxsize=4)
def load(folder: str, name: str) -> Intents:
    """A data set from its folder ("letters" is made up, and needs none)."""
    if name == "letters":
        return letters()
    read = _clinc if name == "clinc150" else _banking
    parts = read(Path(folder))
    names = sorted({label for _, label in parts["train"]})
    texts = {part: [[t for t, label in rows if label == name] for name in names] for part, rows in parts.items()}
    digest = hashlib.sha256(json.dumps(texts, sort_keys=True).encode()).hexdigest()[:12]
    return Intents([n.replace("_", " ").rstrip("?").lower() for n in names], **texts, fingerprint=digest)


def _clinc(folder: Path) -> dict[str, list[tuple[str, str]]]:
    rows = json.loads((folder / "data_full.json").read_text(encoding="utf-8"))
    return {part: [(text, label) for text, label in rows[part]] for part in ("train", "val", "test")}


def _banking(folder: Path) -> dict[str, list[tuple[str, str]]]:
    def rows(part: str) -> list[tuple[str, str]]:
        with open(folder / f"{part}.csv", encoding="utf-8", newline="") as file:
            return [(" ".join(row["text"].split()), row["category"]) for row in csv.DictReader(file)]

    seen: dict[str, int] = {}
    parts = {"train": [], "val": [], "test": rows("test")}
    for text, label in rows("train"):
        seen[label] = seen.get(label, 0) + 1
        parts["val" if seen[label] <= HELD_OUT else "train"].append((text, label))
    return parts


def letters(classes: int = 6) -> Intents:
    """Made-up texts for a trial without data: each class has words of its own."""
    draw = random.Random(0)
    words = [["".join(draw.choices("abcdefghij", k=4)) for _ in range(4)] for _ in range(classes)]
    texts = [[" ".join(draw.choices(own, k=3)) for _ in range(12)] for own in words]
    names = [own[0] for own in words]
    return Intents(names, [t[:6] for t in texts], [t[6:8] for t in texts], [t[8:] for t in texts], "letters")


def draw(intents: Intents, groups: int, shots: int, tests: int, seed: int, part: str = "test") -> ClassStream:
    """The stream of a seed: an order of the classes, `shots` examples of each to learn from, `tests` to test on.

    Args:
        part: where the texts to test on come from, "test" or "val".
    """
    drawn = random.Random(seed)
    order = drawn.sample(range(len(intents.labels)), len(intents.labels))
    size = -(-len(order) // groups)
    classes = [order[at : at + size] for at in range(0, len(order), size)]

    def examples(texts: list[list[str]], of: list[int], number: int) -> list[Example]:
        found = [Example(t, c) for c in of for t in drawn.sample(texts[c], min(number, len(texts[c])))]
        return drawn.sample(found, len(found))

    groups_ = [examples(intents.train, of, shots) for of in classes]
    held_out = [examples(getattr(intents, part), of, tests) for of in classes]
    return ClassStream(intents.labels, classes, groups_, held_out)

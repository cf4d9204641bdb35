"""What is read: the beginnings of long texts, cut into documents, and the parts behind them that are asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from experiments.streams.texts import SMOKE, SMOKE_ELSEWHERE, whole

TEXTS = {
    "moby": "books/herman-melville--moby-dick.txt",
    "code": "python",
    "war": "books/leo-tolstoy--war-and-peace.txt",
    "pepys": "books/samuel-pepys--the-diary.txt",
    "galela": "bible/galela",
}
ELSEWHERE = "books/george-eliot--middlemarch.txt"
TRAINED = "books/charles-dickens--bleak-house.txt"  # what the model knows before it reads


@dataclass(frozen=True)
class Stream:
    """Documents in the order of reading, and what is asked: of the first text, and of one that nobody reads."""

    documents: list[Path]
    first: bytes
    elsewhere: bytes


def write(folder: Path, data: Path, smoke: bool, size: int, parts: int, passes: int, probe: int) -> Stream:
    """Write the documents: `parts` of the first `size` bytes of every text; `passes` times all of them, in order.

    Raises:
        ValueError: a text is too short.
    """
    places = SMOKE if smoke else TEXTS
    folder.mkdir(parents=True, exist_ok=True)
    documents, asked = [], []
    for name, place in places.items():
        content = _bytes(place, data, size + probe)
        asked.append(content[size:])
        for part in range(parts):
            path = folder / f"{name}-{part + 1}.txt"
            begin, end = (size * k // parts for k in (part, part + 1))
            path.write_text(content[begin:end].decode("utf-8", "ignore"), encoding="utf-8")
            documents.append(path)
    other = _bytes(next(iter(SMOKE_ELSEWHERE.values())) if smoke else ELSEWHERE, data, 2 * probe)
    return Stream(documents * passes, asked[0], other[probe:])


def _bytes(place: str, data: Path, count: int) -> bytes:
    content = whole(place, str(data)).encode()[:count]
    if len(content) < count:
        raise ValueError(f"{place} holds {len(content):,} bytes, and {count:,} are wanted: take a smaller size")
    return content

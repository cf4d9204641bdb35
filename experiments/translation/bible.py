"""Verse pairs of novel languages and English: read from files, split by book, as text to read or to complete."""

from __future__ import annotations

import functools
import gzip
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

SOURCE = (
    "verses as NAME.jsonl.gz with ref, book (40 to 66), src and en on each line, made of the bible-corpus by "
    "Christodoulopoulos and Steedman (CC0) and the King James Version"
)
Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class Verse:
    """A verse in a language and in English; `book` counts as in the Bible (40: Matthew, 66: Revelation)."""

    book: int
    source: str
    english: str


@functools.lru_cache(maxsize=4)
def load(path: str) -> tuple[Verse, ...]:
    """The verses of a file, in its order."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    try:
        return tuple(Verse(row["book"], row["src"].strip(), row["en"].strip()) for row in rows)
    except KeyError as error:
        raise ValueError(f"{Path(path).name} lacks {error}: it must hold {SOURCE}") from None


@dataclass(frozen=True)
class Pair:
    """A verse as tokens: "Galela: ...\\nEnglish:" and what follows; `text` is the English."""

    prompt: tuple[int, ...]
    target: tuple[int, ...]  # ends with the end of the line
    text: str

    def __len__(self) -> int:
        return len(self.prompt) + len(self.target)


def pair(language: str, verse: Verse, encode: Encode) -> Pair:
    """A verse as the model reads and completes it."""
    prompt = encode(f"{language.capitalize()}: {verse.source}\nEnglish:")
    return Pair(tuple(prompt), (*encode(f" {verse.english}"), *encode("\n")), verse.english)


def stream(pairs: Sequence[Pair], encode: Encode) -> list[int]:
    """Pairs one after the other, an empty line after each."""
    gap = encode("\n")
    return [token for p in pairs for token in (*p.prompt, *p.target, *gap)]


def draw(
    verses: Sequence[Verse], language: str, encode: Encode, count: int, longest: int, seed: int,
    books: Sequence[int] = (), without: Sequence[int] = (),
) -> list[Pair]:  # fmt: skip
    """`count` verses of at most `longest` tokens in random order, all of these books, or of any but others.

    Raises:
        ValueError: there are not as many.
    """
    chosen = [v for v in verses if (v.book in books if books else v.book not in without)]
    random.Random(seed).shuffle(chosen)
    found: list[Pair] = []
    for verse in chosen:
        if len(found) == count:
            break
        made = pair(language, verse, encode)
        if len(made) <= longest:
            found.append(made)
    if len(found) < count:
        raise ValueError(f"{language} has {len(found)} such verses of at most {longest} tokens, not {count}")
    return found

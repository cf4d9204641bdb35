"""Documents that are read again: short ones at once, and in sleep all of them, when the last was read.

A document of few tokens teaches little in one reading: it is read until it has made as many steps as a longer one. In
sleep sentences are in an order of their own: read in order, a sentence is half known from those in front of it; out of
order, it has to come from the levels.
"""

from __future__ import annotations

import io
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from nestling.sessions.check import sentences
from nestling.sessions.documents import Opener, Text
from nestling.training.texts import scan
from nestling.training.tokenizers import encode

TOGETHER = 5  # sentences of a paragraph
LEAST, MOST = 256, 8  # tokens that a document is read until, and readings of one of very few
BYTES = 16  # of a token, hardly ever more: a longer document is not tokenized to know that it is no short one


def shuffled(text: str, turn: int) -> str:
    """A text's sentences in an order of their own, the same for the same turn."""
    found = [part.strip() for part in sentences(text) if part.strip()]
    random.Random(turn).shuffle(found)
    return "\n\n".join(" ".join(found[at : at + TOGETHER]) for at in range(0, len(found), TOGETHER))


def with_readings(texts: list[Text], tokenizer: Any, least: int = LEAST) -> list[Text]:
    """The documents, and behind a short one itself again, until about `least` tokens of it were read.

    Raises:
        ValueError: `least` is negative.
    """
    if least < 0:
        raise ValueError(f"least must not be negative (0: every document is read once), not {least}")
    found = []
    for text in texts:
        found.append(text)
        if text.path is None or text.size > least * BYTES:
            continue
        with text.opened(text.path) as file:
            count = len(encode(tokenizer, file.read().decode("utf-8")))
        again = range(2, readings(count, least) + 1)
        found += [replace(text, name=f"{text.name}, reading {n}", again=text.name) for n in again]
    return found


def readings(count: int, least: int) -> int:
    """How often a document of so many tokens is read, until about `least` of them were."""
    return max(1, min(MOST, round(least / max(1, count))))


@dataclass(frozen=True)
class Shuffled:
    """Opens what another opener gives, its `shuffled`."""

    opened: Opener
    turn: int

    def __call__(self, path: Path) -> BinaryIO:
        with self.opened(path) as file:
            return io.BytesIO(shuffled(file.read().decode("utf-8"), self.turn).encode())


def with_sleep(texts: list[Text], turns: int) -> list[Text]:
    """The documents, and after the last all of them again, `turns` times.

    Raises:
        ValueError: turns are negative, or a pipe is among the documents: it cannot be read twice.
    """
    if turns < 0:
        raise ValueError(f"sleep must not be negative, not {turns}")
    if turns and any(text.path is None for text in texts):
        raise ValueError("what is read from a pipe cannot be read again in sleep: give files, or leave out --sleep")
    again = []
    for turn in range(1, turns + 1):
        for text in texts:
            opened = Shuffled(text.opened, turn)
            size, digest = scan(text.path, opened)
            name = f"{text.name}, again ({turn})"
            again.append(replace(text, name=name, size=size, digest=digest, opened=opened, again=name))
    return texts + [text for text in again if text.size]

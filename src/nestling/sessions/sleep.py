"""Sleep: when all documents were read, each is read again, its sentences in an order of their own.

Read in order, a sentence is half known from those in front of it; out of order, it has to come from the levels.
"""

from __future__ import annotations

import io
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from nestling.sessions.check import sentences
from nestling.sessions.documents import Opener, Text
from nestling.training.texts import scan

TOGETHER = 5  # sentences of a paragraph


def shuffled(text: str, turn: int) -> str:
    """A text's sentences in an order of their own, the same for the same turn."""
    found = [part.strip() for part in sentences(text) if part.strip()]
    random.Random(turn).shuffle(found)
    return "\n\n".join(" ".join(found[at : at + TOGETHER]) for at in range(0, len(found), TOGETHER))


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
            again.append(replace(text, name=f"{text.name}, again ({turn})", size=size, digest=digest, opened=opened))
    return texts + [text for text in again if text.size]

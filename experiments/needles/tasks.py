"""Needles in a haystack after RULER (arXiv 2404.06654), in bytes: each kind of text, and which of it is asked for."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
WORDS = [
    "acorn", "amber", "anchor", "apple", "badger", "basil", "beacon", "bottle", "bridge", "button", "candle", "canoe",
    "castle", "cedar", "clock", "comet", "copper", "cradle", "delta", "dragon", "eagle", "ember", "engine", "falcon",
    "fjord", "forest", "garden", "grove", "hammer", "harbor", "haven", "helmet", "island", "ivory", "jacket", "jewel",
    "karma", "kettle", "ladder", "lemon", "mango", "meadow", "mirror", "noble", "ocean", "oyster", "paddle", "pearl",
    "pepper", "pillow", "planet", "quarry", "quilt", "rabbit", "ribbon", "river", "saddle", "shovel", "slate",
    "spider", "statue", "tulip", "tunnel", "turtle", "umber", "valley", "velvet", "violin", "walnut", "willow",
    "window", "xenon", "yodel", "zebra",
]  # fmt: skip
LENGTHS = {"number": 7, "uuid": 36}  # bytes of a value


@dataclass(frozen=True)
class Task:
    """One kind of needles: so many `keys`, `values` for each, and `asked` of the keys."""

    haystack: str = "book"
    value: str = "number"
    keys: int = 1
    values: int = 1
    asked: int = 1

    @property
    def least(self) -> int:
        """Bytes that needles, question and answers never exceed."""
        word, value = max(map(len, WORDS)), LENGTHS[self.value]
        frame, count = len(f"The magic {self.value} of  is "), self.asked * self.values
        question = 1 + frame + self.asked * (word + 2) + count * (value + 2)
        return self.keys * self.values * (frame + word + value + 2) + question

    def draw(self, rng: random.Random, length: int, book: str) -> tuple[str, list[slice]]:
        """A text of `length` bytes that ends with the question's answer, and where its answers stand.

        Raises:
            ValueError: no room for the needles in so few bytes.
        """
        keys = rng.sample(WORDS, self.keys)
        found = {key: [_value(rng, self.value) for _ in range(self.values)] for key in keys}
        needles = [f"The magic {self.value} of {key} is {value}. " for key in keys for value in found[key]]
        rng.shuffle(needles)
        for key in keys:  # several values of a key are asked for in the order in which they stand
            found[key].sort(key=lambda value: next(i for i, needle in enumerate(needles) if f" {value}. " in needle))
        asked = rng.sample(keys, self.asked)
        question = f"\nThe magic {self.value} of {', '.join(asked)} is "
        answers = [value for key in asked for value in found[key]]
        end = question + ", ".join(answers)
        room = length - len(end) - sum(map(len, needles))
        if room < 0:
            raise ValueError(f"the needles and the question take {length - room} bytes: {length} are too few")
        straw = straw_of(rng, self.haystack, room, book)
        text = hide(rng, straw, needles) + end
        spans, at = [], length - len(end) + len(question)
        for answer in answers:
            spans.append(slice(at, at + len(answer)))
            at += len(answer) + 2
        return text, spans


def hide(rng: random.Random, straw: str, needles: list[str]) -> str:
    """The straw with the needles in their order, each in front of a sentence or at the very beginning."""
    starts = [i + 2 for i in range(len(straw) - 2) if straw[i] in ".!?" and straw[i + 1] == " "] or [0]
    places = sorted(rng.choice([0, *starts]) for _ in needles)
    parts = [straw[a:b] for a, b in zip([0, *places], [*places, len(straw)], strict=True)]
    return "".join(part + needle for part, needle in zip(parts, [*needles, ""], strict=True))


TASKS = {
    "single-1": Task("noise"),
    "single-2": Task(),
    "single-3": Task(value="uuid"),
    "multi-key": Task(keys=4),
    "multi-value": Task(values=4),
    "multi-query": Task(keys=4, asked=4),
}


def _value(rng: random.Random, kind: str) -> str:
    if kind == "number":
        return str(rng.randrange(10**6, 10**7))
    digits = f"{rng.getrandbits(128):032x}"
    return "-".join(digits[a:b] for a, b in ((0, 8), (8, 12), (12, 16), (16, 20), (20, 32)))


def straw_of(rng: random.Random, kind: str, room: int, book: str) -> str:
    """So many bytes of a book from a random place on, or of noise. ValueError if the book is shorter."""
    if kind == "noise":
        return (NOISE * (room // len(NOISE) + 1))[:room]
    if len(book) < room:
        raise ValueError(f"the book has {len(book)} bytes, and {room} are needed")
    at = rng.randrange(len(book) - room + 1)
    return book[at : at + room]


def batch(task: Task, rng: random.Random, count: int, length: int, book: str) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs and next bytes [B, T - 1], and which of these are of an answer: 0, or the answer's number from 1."""
    drawn = [task.draw(rng, length, book) for _ in range(count)]
    tokens = torch.tensor([list(text.encode("latin-1")) for text, _ in drawn])
    answers = torch.zeros_like(tokens)
    for row, (_, spans) in enumerate(drawn):
        for number, span in enumerate(spans, 1):
            answers[row, span] = number
    return tokens[:, :-1], tokens[:, 1:], answers[:, 1:]

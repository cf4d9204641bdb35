"""Needles in a haystack of book text with many keys: MK-NIAH of RULER (arXiv 2404.06654), from its published text."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import DynamicCache

from experiments.shared.continual.choice import weigh

NEEDLE = " One of the special magic numbers for {key} is: {number}."
QUESTION = (
    "\nWhat is the special magic number for {key} mentioned in the provided text?"
    " The special magic number for {key} mentioned in the provided text is"
)
DIGITS = 7
ADJECTIVES = [
    "amber", "ancient", "bitter", "brave", "calm", "clever", "cold", "crimson", "damp", "eager", "early", "fancy",
    "gentle", "golden", "grand", "grumpy", "hollow", "humble", "icy", "jolly", "keen", "late", "lively", "lonely",
    "loud", "lucky", "mellow", "misty", "narrow", "noble", "odd", "pale", "plain", "proud", "quick", "quiet", "rapid",
    "rough", "royal", "rusty", "shy", "silent", "silver", "sleepy", "smooth", "solid", "spicy", "steady", "stormy",
    "sunny", "swift", "tall", "tame", "tiny", "vivid", "warm", "wild", "wise", "young", "zesty",
]  # fmt: skip
NOUNS = [
    "acorn", "anchor", "apple", "badger", "barrel", "basket", "beacon", "bottle", "bridge", "button", "candle", "canoe",
    "castle", "cedar", "clock", "comet", "copper", "cradle", "dragon", "eagle", "engine", "falcon", "feather", "forest",
    "garden", "glacier", "hammer", "harbor", "helmet", "island", "jacket", "kettle", "ladder", "lantern", "lemon",
    "meadow", "mirror", "needle", "oyster", "paddle", "pepper", "pillow", "planet", "pocket", "quarry", "rabbit",
    "ribbon", "river", "saddle", "shovel", "spider", "statue", "tunnel", "turtle", "valley", "violin", "wagon",
    "walnut", "whistle", "window",
]  # fmt: skip


@dataclass(frozen=True)
class Needle:
    """A key with its number, and where its sentence lies in the haystack: tokens start..stop."""

    key: str
    number: str
    start: int
    stop: int


@dataclass(frozen=True)
class Haystack:
    """Tokens with needles among them."""

    ids: list[int]
    needles: list[Needle]

    @property
    def straw(self) -> list[bool]:
        """Of each token, whether it belongs to the book."""
        found = [True] * len(self.ids)
        for needle in self.needles:
            found[needle.start : needle.stop] = [False] * (needle.stop - needle.start)
        return found


def build(
    book: Sequence[int], length: int, places: Sequence[int], encode: Callable[[str], list[int]],
    ends: Callable[[int], bool], seed: int,
) -> Haystack:  # fmt: skip
    """A haystack of `length` tokens: a needle near each of `places`, after the end of a sentence.

    Args:
        book: tokens to hide them in, at least `length`.
        places: tokens in front of each needle, rising.
        ends: whether a token ends a sentence.
    """
    draw = random.Random(seed)
    keys = draw.sample([f"{a}-{n}" for a in ADJECTIVES for n in NOUNS], len(places))
    numbers = draw.sample(range(10 ** (DIGITS - 1), 10**DIGITS), len(places))
    ids: list[int] = []
    needles, at = [], 0
    for key, number, place in zip(keys, map(str, numbers), places, strict=True):
        sentence = encode(NEEDLE.format(key=key, number=number))
        stop = at + max(0, place - len(ids))
        while stop > at and not ends(book[stop - 1]):
            stop -= 1
        ids += book[at:stop]
        at = stop
        needles.append(Needle(key, number, len(ids), len(ids) + len(sentence)))
        ids += sentence
    ids += book[at : at + length - len(ids)]
    if len(ids) != length:
        raise ValueError(f"{len(places)} needles do not fit a haystack of {length} tokens and {len(book)} of text")
    return Haystack(ids, needles)


@dataclass(frozen=True)
class Answer:
    """To one needle's question.

    Attributes:
        exact: the greedy continuation is the number.
        chosen: the number is likelier than those of all other needles asked for.
        margin: log-probability of the number minus the mean of the others', in nats.
    """

    exact: bool
    chosen: bool
    margin: float


def encoder(tokenizer: Any) -> Callable[[str], list[int]]:
    """Text to token ids, with nothing added."""
    return lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]


def held(cache: DynamicCache) -> DynamicCache:
    """What attention still holds of a stream, for reading on without learning."""
    found = DynamicCache()
    found.layers = [copy.copy(layer) for layer in cache.layers]
    return found


def ask(
    model: nn.Module, needles: Sequence[Needle], context: DynamicCache | None, encode: Callable[[str], list[int]]
) -> list[Answer]:
    """Ask for each of these needles after what attention still holds, `context`; the model learns nothing.

    Needles in and beyond what attention holds are asked for apart: numbers in front of its eyes are likelier by that
    alone.
    """
    numbers, found = [encode(f" {n.number}") for n in needles], []
    for at, needle in enumerate(needles):
        likely, greedy = weigh(model, encode(QUESTION.format(key=needle.key)), numbers, context)
        right, others = likely[at], likely[:at] + likely[at + 1 :]
        found.append(Answer(greedy[at], right > max(others), right - sum(others) / len(others)))
    return found

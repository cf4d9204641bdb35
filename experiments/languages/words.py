"""The six formal languages of NL Table 5: words, and what may follow each of their letters.

As Bhattamishra et al. (2020) and Irie et al. (2023) set them: after every letter of a word a model names the *set* of
what may come next, the end of the word among it, and a word counts only if all its sets are right.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

END = "."
IGNORED = -1.0  # the target behind the end of a shorter word


@dataclass(frozen=True)
class Language:
    """`draw(random, low, high)` gives a word with a length between the two; `follow(word)` a set for each letter."""

    letters: str
    draw: Callable[[random.Random, int, int], str]
    follow: Callable[[str], Iterator[set[str]]]


def batch(language: Language, words: list[str]) -> tuple[Tensor, Tensor]:
    """Words as tokens [B, T], and what may follow as 0 or 1 [B, T, letters + 1], the end last; -1 beyond a word."""
    longest, classes = max(map(len, words)), language.letters + END
    tokens = torch.zeros(len(words), longest, dtype=torch.long)
    targets = torch.full((len(words), longest, len(classes)), IGNORED)
    for row, word in enumerate(words):
        tokens[row, : len(word)] = torch.tensor([language.letters.index(letter) for letter in word])
        allowed = [[float(c in found) for c in classes] for found in language.follow(word)]
        targets[row, : len(word)] = torch.tensor(allowed)
    return tokens, targets


def _bits(rng: random.Random, low: int, high: int) -> str:
    return "".join(rng.choices("01", k=rng.randint(low, high)))


def _even(word: str) -> Iterator[set[str]]:
    ones = 0
    for letter in word:
        ones += letter == "1"
        yield {"0", "1"} | ({END} if ones % 2 == 0 else set())


def _repeated(period: str) -> Language:
    """(period)*: the next letter is certain, the end may come after every whole period."""

    def draw(rng: random.Random, low: int, high: int) -> str:
        return period * rng.randint(-(-low // len(period)), high // len(period))

    def follow(word: str) -> Iterator[set[str]]:
        for read in range(1, len(word) + 1):
            yield {period[read % len(period)]} | ({END} if read % len(period) == 0 else set())

    return Language("".join(sorted(set(period))), draw, follow)


def _equal(letters: str) -> Language:
    """a^n b^n and its kind: while the first letter lasts the second may follow; from then on all is certain."""

    def draw(rng: random.Random, low: int, high: int) -> str:
        n = rng.randint(-(-low // len(letters)), high // len(letters))
        return "".join(letter * n for letter in letters)

    def follow(word: str) -> Iterator[set[str]]:
        n = len(word) // len(letters)
        for read in range(1, len(word) + 1):
            yield set(letters[:2]) if read <= n else {word[read] if read < len(word) else END}

    return Language(letters, draw, follow)


PAIRS = {")": "(", "]": "["}


def _shuffled(rng: random.Random, low: int, high: int) -> str:
    """Two kinds of brackets, each balanced for itself, mixed in any order."""
    length = 2 * rng.randint(-(-low // 2), high // 2)
    open_, word = {"(": 0, "[": 0}, ""
    while len(word) < length:
        depth = sum(open_.values())
        if depth < length - len(word) and (depth == 0 or rng.random() < 0.5):
            letter = rng.choice("([")
            open_[letter] += 1
        else:
            letter = rng.choice([close for close, kind in PAIRS.items() if open_[kind]])
            open_[PAIRS[letter]] -= 1
        word += letter
    return word


def _balanced(word: str) -> Iterator[set[str]]:
    open_ = {"(": 0, "[": 0}
    for letter in word:
        open_[PAIRS.get(letter, letter)] += 1 if letter in open_ else -1
        closing = {close for close, kind in PAIRS.items() if open_[kind]}
        yield {"(", "["} | (closing or {END})


LANGUAGES = {
    "parity": Language("01", _bits, _even),
    "(aa)*": _repeated("aa"),
    "(abab)*": _repeated("abab"),
    "a^n b^n": _equal("ab"),
    "a^n b^n c^n": _equal("abc"),
    "shuffle-2": Language("([)]", _shuffled, _balanced),
}

"""Okapi BM25: the passages of what was read that share most with a question, as a reader with a search box has them."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence

TERMS, LENGTH = 1.5, 0.75  # how soon a repeated word counts no more; how much long passages are held back


def words(text: str) -> list[str]:
    """The words of a text, in small letters."""
    return re.findall(r"\w+", text.lower())


def best(question: str, passages: Sequence[str], count: int) -> list[str]:
    """The `count` passages that BM25 ranks highest for a question, in the order in which they were read."""
    return [passages[i] for i in Index(passages).best(question, count)]


class Index:
    """The words of passages, which grow in number."""

    def __init__(self, passages: Iterable[str] = ()) -> None:
        self.sizes: list[int] = []  # in words
        self.holders: dict[str, dict[int, int]] = {}  # of each word: passages, and how often it is there
        for passage in passages:
            self.add(passage)

    def add(self, passage: str) -> None:
        """One more passage, which gets the next number."""
        bag = Counter(words(passage))
        for word, often in bag.items():
            self.holders.setdefault(word, {})[len(self.sizes)] = often
        self.sizes.append(sum(bag.values()))

    def best(self, question: str, count: int) -> list[int]:
        """The numbers of the `count` passages that rank highest, in the order in which they were read."""
        mean, scores = sum(self.sizes) / max(1, len(self.sizes)), dict.fromkeys(range(len(self.sizes)), 0.0)
        for word in sorted(set(words(question))):
            holders = self.holders.get(word, {})
            rarity = math.log(1 + (len(self.sizes) - len(holders) + 0.5) / (len(holders) + 0.5))
            for i, often in holders.items():
                size = TERMS * (1 - LENGTH + LENGTH * self.sizes[i] / mean)
                scores[i] += rarity * often * (TERMS + 1) / (often + size)
        return sorted(sorted(scores, key=lambda i: (-scores[i], i))[:count])

"""Okapi BM25: the passages of what was read that share most with a question, as a reader with a search box has them."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

TERMS, LENGTH = 1.5, 0.75  # how soon a repeated word counts no more; how much long passages are held back


def words(text: str) -> list[str]:
    """The words of a text, in small letters."""
    return re.findall(r"\w+", text.lower())


def best(question: str, passages: Sequence[str], count: int) -> list[str]:
    """The `count` passages that BM25 ranks highest for a question, in the order in which they were read."""
    bags = [Counter(words(passage)) for passage in passages]
    mean = sum(map(sum, (bag.values() for bag in bags))) / max(1, len(bags))
    scores = []
    for bag in bags:
        size, score = TERMS * (1 - LENGTH + LENGTH * sum(bag.values()) / mean), 0.0
        for word in set(words(question)):
            holders = sum(word in other for other in bags)
            rarity = math.log(1 + (len(bags) - holders + 0.5) / (holders + 0.5))
            score += rarity * bag[word] * (TERMS + 1) / (bag[word] + size)
        scores.append(score)
    top = sorted(range(len(passages)), key=lambda i: (-scores[i], i))[:count]
    return [passages[i] for i in sorted(top)]

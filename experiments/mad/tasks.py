"""The tasks of MAD (Poli et al. 2024, "Mechanistic Design and Scaling of Hybrid Architectures") at their base sizes."""

from __future__ import annotations

import functools
import random

import torch
from torch import Tensor

from experiments.shared.models.tasks import IGNORED, Task

Drawn = tuple[Tensor, Tensor]


def recall(count: int, generator: torch.Generator, *, length: int = 128, classes: int = 16) -> Drawn:
    """In-context recall: key, value, key, value, ...; keys come again, and a key seen before asks for its value.

    Keys are the lower half of the classes, values the upper one; each sequence has a mapping of its own.
    """
    keys = classes // 2
    mapping = torch.randint(keys, classes, (count, keys), generator=generator)
    key = torch.randint(keys, (count, length // 2), generator=generator)
    value = mapping.gather(1, key)
    seen = torch.tril(key[:, :, None] == key[:, None], diagonal=-1).any(-1)
    tokens = torch.stack([key, value], -1).flatten(1)
    targets = torch.full_like(tokens, IGNORED)
    targets[:, ::2] = torch.where(seen, value, IGNORED)
    return tokens, targets


def fuzzy(
    count: int, generator: torch.Generator, *, length: int = 128, classes: int = 16, whole: bool = False
) -> Drawn:
    """Fuzzy in-context recall: keys and values of one to three tokens; a key seen before asks for all of its value.

    A key's tokens differ from each other, and so do a value's, so where one ends is seen by what follows: the last
    class fills up at the front. `whole`: every key has three tokens, as in MAD's tests.
    """
    rng = random.Random(torch.randint(2**62, (), generator=generator).item())  # many small numbers
    half, filler = (classes - 1) // 2, classes - 1
    tokens = torch.full((count, length), filler)
    targets = torch.full_like(tokens, IGNORED)
    for row in range(count):
        words: list[int] = []
        asked: list[int] = []
        known: dict[tuple[int, ...], list[int]] = {}
        while True:
            # a key again in every second place, as with so many keys hardly one would come by itself
            if known and rng.random() < 0.5:
                key = rng.choice([*known])
            else:
                key = tuple(rng.sample(range(half), 3 if whole else rng.randint(1, 3)))
            old = key in known
            value = known.setdefault(key, rng.sample(range(half, 2 * half), rng.randint(1, 3)))
            if len(words) + len(key) + len(value) > length:
                break
            # the answer's first token is named at the key's last one
            asked += [IGNORED] * (len(key) - 1) + (value if old else [IGNORED] * len(value)) + [IGNORED]
            words += [*key, *value]
        tokens[row, length - len(words) :] = torch.tensor(words)
        targets[row, length - len(words) :] = torch.tensor(asked)
    return tokens, targets


def copying(count: int, generator: torch.Generator, *, length: int = 256, classes: int = 16, copied: int = 16) -> Drawn:
    """Selective copying: tokens strewn among blanks, then a sign, and blanks at which they are named in their order."""
    blank, sign = classes - 2, classes - 1
    strewn = length - copied - 1
    wanted = torch.randint(blank, (count, copied), generator=generator)
    places = torch.rand(count, strewn, generator=generator).argsort(1)[:, :copied].sort(1).values
    tokens = torch.full((count, length), blank).scatter(1, places, wanted)
    tokens[:, strewn] = sign
    targets = torch.full_like(tokens, IGNORED)
    targets[:, strewn + 1 :] = wanted
    return tokens, targets


def compression(count: int, generator: torch.Generator, *, length: int = 32, classes: int = 16) -> Drawn:
    """Compression: tokens and a sign, by whose output alone all of them are named again."""
    tokens = torch.randint(classes - 1, (count, length), generator=generator)
    tokens[:, -1] = classes - 1
    return tokens, tokens


@functools.cache
def _facts(classes: int, seed: int = 12345) -> Tensor:
    """The value of each key, the same in all sequences."""
    keys = (classes - 1) // 2
    return keys + torch.randperm(keys, generator=torch.Generator().manual_seed(seed))


def memorization(count: int, generator: torch.Generator, *, length: int = 32, classes: int = 256) -> Drawn:
    """Memorization: after a key a sign stands at the place of its value, which is the same in all sequences."""
    facts = _facts(classes)
    key = torch.randint(len(facts), (count, length // 2), generator=generator)
    tokens = torch.stack([key, torch.full_like(key, classes - 1)], -1).flatten(1)
    return tokens, torch.stack([torch.full_like(key, IGNORED), facts[key]], -1).flatten(1)


TASKS = {
    "compression": Task(16, compression, {"": compression}, compressed=True),
    "recall": Task(16, recall, {"": recall}, batch_size=16),
    "fuzzy recall": Task(16, fuzzy, {"": functools.partial(fuzzy, whole=True)}, batch_size=16),
    "selective copying": Task(16, copying, {"": copying}, batch_size=8),
    "memorization": Task(256, memorization, {"": memorization}),
}

"""Aliases: what a token stands for is said in the sequence, and changes in it."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from experiments.shared.models.tasks import IGNORED, Task

NAMES = KEYS = VALUES = 12  # of each, in this order


def aliases(count: int, generator: torch.Generator, *, things: int = 4, asked: str = "") -> tuple[Tensor, Tensor]:
    """Things are told of by names that were only just given to them, and asked for by their keys.

    First every thing is named (name, key), then told of (name, value), then asked for (key: its value). Then half of
    the things get other names, all are told of anew, and asked for. In each part in another order.

    Args:
        asked: "" for all questions, "first" or "drift" for those of the first or of the second half.

    Returns:
        Tokens [count, 9 things] and targets, -100 but at the keys asked for.
    """

    def drawn(of: int, number: int) -> Tensor:
        return torch.rand(count, of, generator=generator).argsort(1)[:, :number]

    names, key = drawn(NAMES, things + things // 2), NAMES + drawn(KEYS, things)
    first, later = names[:, :things], torch.cat([names[:, things:], names[:, things // 2 : things]], 1)
    tokens, targets = [], []
    for half, name, named in (("first", first, things), ("drift", later, things // 2)):
        value = NAMES + KEYS + torch.randint(VALUES, (count, things), generator=generator)
        for left, right, number in ((name, key, named), (name, value, things)):
            order = drawn(number, number)
            tokens.append(torch.stack([left.gather(1, order), right.gather(1, order)], -1).flatten(1))
        order = drawn(things, things)
        tokens.append(key.gather(1, order))
        answers = value.gather(1, order)
        told = torch.full((count, 2 * (named + things)), IGNORED)
        targets += [told, answers if asked in ("", half) else torch.full_like(answers, IGNORED)]
    return torch.cat(tokens, 1), torch.cat(targets, 1)


def some(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Of two or of four things: how it is done is found with few of them."""
    return aliases(count, generator, things=2 if torch.rand((), generator=generator) < 0.5 else 4)


TASKS = {
    "aliases": Task(
        NAMES + KEYS + VALUES, some, {half: functools.partial(aliases, asked=half) for half in ("first", "drift")}
    )
}

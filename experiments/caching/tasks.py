"""Pairs of key and value, more of them than a memory of one size holds, asked for beyond a window."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from experiments.choice.tasks import pairs
from experiments.shared.models.tasks import Task

KEYS = 128
TRAINED = (4, 8, 16, 32, 64)


def mixed(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A batch of one of the trained numbers of pairs."""
    number = TRAINED[int(torch.randint(len(TRAINED), (), generator=generator))]
    return pairs(count, number, KEYS, generator)


def asked(count: int, generator: torch.Generator, *, number: int) -> tuple[Tensor, Tensor]:
    """A batch of so many pairs."""
    return pairs(count, number, KEYS, generator)


TESTS = {str(number): functools.partial(asked, number=number) for number in (16, 64, 128)}
TASKS = {"pairs": Task(2 * KEYS, mixed, TESTS, batch_size=8)}

"""Two tasks that are drawn, not read: the parity of bits so far, and values asked for by their keys."""

from __future__ import annotations

import torch
from torch import Tensor

IGNORED = -100


def parity(count: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Bits [count, length], and after each of them whether their number is odd."""
    bits = torch.randint(2, (count, length), generator=generator)
    return bits, bits.cumsum(1) % 2


def pairs(count: int, number: int, keys: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Multi-query associative recall: `number` pairs (key, value), then every key again in another order.

    Returns:
        Tokens [count, 4 number]: keys below `keys`, values from there on; what follows a repeated key is its value.
        Targets: at each repeated key its value, elsewhere -100.
    """
    key = torch.rand(count, keys, generator=generator).argsort(1)[:, :number]
    value = torch.randint(keys, 2 * keys, (count, number), generator=generator)
    order = torch.rand(count, number, generator=generator).argsort(1)
    asked, answer = key.gather(1, order), value.gather(1, order)
    tokens = torch.cat([torch.stack([key, value], -1).flatten(1), torch.stack([asked, answer], -1).flatten(1)], 1)
    targets = torch.full_like(tokens, IGNORED)
    targets[:, 2 * number :: 2] = answer
    return tokens, targets

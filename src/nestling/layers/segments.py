"""Where chunks open and close when the sequences of a batch stand at different places of their streams."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Segment(NamedTuple):
    """Tokens start..stop of a call, inside which no chunk of any sequence opens or closes.

    fresh[g]: the chunk of group g opens with this segment, for every sequence.
    closes[g]: the chunk of group g is complete after it: False, True, or for which sequences ([B] bool).
    active: the sequences that still have tokens here ([B] bool), None for all.
    """

    start: int
    stop: int
    fresh: tuple[bool, ...]
    closes: tuple[bool | Tensor, ...]
    active: Tensor | None


def segments(positions: list[int], lengths: list[int], chunk_sizes: list[int]) -> list[Segment]:
    """Cut a call into segments.

    Args:
        positions: tokens each sequence has seen before the call.  lengths: tokens of each sequence in the call, from
            the front.  chunk_sizes: one for each group of memories.
    """
    total = max(lengths)
    cuts = {0, total, *lengths}
    for position in set(positions):
        for size in chunk_sizes:
            cuts.update(range(-position % size, total, size))
    found = []
    ordered = sorted(cuts)
    for start, stop in zip(ordered[:-1], ordered[1:], strict=True):
        active = [length >= stop for length in lengths]
        fresh, closes = [], []
        for size in chunk_sizes:
            fresh.append(all((p + start) % size == 0 for p, on in zip(positions, active, strict=True) if on))
            done = [on and (p + stop) % size == 0 for p, on in zip(positions, active, strict=True)]
            closes.append(done[0] if len(set(done)) == 1 else torch.tensor(done))
        found.append(Segment(start, stop, tuple(fresh), tuple(closes), None if all(active) else torch.tensor(active)))
    return found

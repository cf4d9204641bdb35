"""When an adaptive level updates: at the boundaries that surprise it most, as often as it was asked to.

A boundary's surprise is its signal over the signal's running mean. The level is due where that reaches a threshold,
which rises with every update and falls with every boundary passed over until the share of updates is the one wanted.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nestling.schedule import Level

MEMORY = 0.9  # of the running mean
GAIN = 0.3  # of the threshold's logarithm
PATIENCE = 4  # boundaries an update may be late, in units of those it waits for on average


class Surprise(NamedTuple):
    """What an adaptive level remembers of every stream, [B] each.

    mean: of the signal.  threshold: the surprise at which it is due.  waited: boundaries since the last update.
    tokens: in the gradient sums.  updates: so far.
    """

    mean: Tensor
    threshold: Tensor
    waited: Tensor
    tokens: Tensor
    updates: Tensor


def begin_surprise(level: Level, like: Tensor) -> Surprise | None:
    """Of streams [B] of which nothing is read yet; None for a level that updates at every boundary."""
    if level.surprise is None:
        return None
    zeros = torch.zeros_like(like)
    return Surprise(zeros, torch.ones_like(like), zeros, zeros, zeros)


def is_due(level: Level, before: Surprise, signal: Tensor) -> tuple[Tensor, Surprise]:
    """Which streams [B] update at this boundary, and the state after it. A signal that is not finite is no surprise."""
    with torch.no_grad():
        signal = torch.where(signal.isfinite(), signal, before.mean)
        mean = torch.where(before.mean > 0, before.mean, signal)
        waited = before.waited + 1
        due = (signal >= before.threshold * mean) | (waited >= PATIENCE / level.surprise)
        moved = due.to(signal.dtype)
        threshold = before.threshold * torch.exp(GAIN * (moved - level.surprise))
        keep = 1 - moved
        mean = torch.lerp(signal, mean, MEMORY)
        return due, Surprise(mean, threshold, waited * keep, before.tokens * keep, before.updates + moved)

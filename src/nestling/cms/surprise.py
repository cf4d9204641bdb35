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


class Pace(NamedTuple):
    """What an adaptive level remembers of every stream, [B] each.

    mean: of the signal.  threshold: the surprise at which it is due.  waited: boundaries since the last update.
    tokens: in the gradient sums.  updates: so far.
    """

    mean: Tensor
    threshold: Tensor
    waited: Tensor
    tokens: Tensor
    updates: Tensor


def begin_pace(level: Level, like: Tensor) -> Pace | None:
    """The pace of streams [B] of which nothing is read yet; None for a level that updates at every boundary."""
    if level.surprise is None:
        return None
    zeros = torch.zeros_like(like)
    return Pace(zeros, torch.ones_like(like), zeros, zeros, zeros)


def is_due(level: Level, pace: Pace, signal: Tensor) -> tuple[Tensor, Pace]:
    """Which streams [B] update at this boundary, and the pace behind it. A signal that is not finite is no surprise."""
    with torch.no_grad():
        signal = torch.where(signal.isfinite(), signal, pace.mean)
        mean = torch.where(pace.mean > 0, pace.mean, signal)
        waited = pace.waited + 1
        due = (signal >= pace.threshold * mean) | (waited >= PATIENCE / level.surprise)
        moved = due.to(signal.dtype)
        threshold = pace.threshold * torch.exp(GAIN * (moved - level.surprise))
        keep = 1 - moved
        mean = torch.lerp(signal, mean, MEMORY)
        return due, Pace(mean, threshold, waited * keep, pace.tokens * keep, pace.updates + moved)

"""What changes over a run: the learning rate, as a factor on its peak, and the length of the memories' chunks."""

from __future__ import annotations

import math

from nestling.training.config import ScheduleConfig


def lr_factor(step: int, steps: int, config: ScheduleConfig) -> float:
    """The factor for step `step` (from 0) of `steps`: linear warm-up, then cosine, stable-and-decay, or constant."""
    warmup = round(config.warmup * steps)
    if step < warmup:
        return (step + 1) / warmup
    if config.name == "constant":
        return 1.0
    if config.name == "cosine":
        done = (step - warmup) / max(1, steps - 1 - warmup)
        return config.final + (1 - config.final) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    decay = max(1, round(config.decay * steps))
    done = (step - (steps - 1 - decay)) / decay
    return 1 - (1 - config.final) * min(1.0, max(0.0, done))


def chunk_factor(step: int, steps: int, config: ScheduleConfig) -> int:
    """How many times as long as the model says the memories' chunks are at step `step` (from 0) of `steps`."""
    return config.chunk_factor if step < round(config.chunk_until * steps) else 1

"""What changes over a run: the learning rate, the length of the memories' chunks, and how far attention sees."""

from __future__ import annotations

import math
import random

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


def window_limit(step: int, steps: int, config: ScheduleConfig, seed: int) -> int | None:
    """The tokens that attention sees at most at step `step` (from 0) of `steps`, None for as many as the model says."""
    if config.short_window is None or step >= round(config.short_until * steps):
        return None
    return config.short_window if random.Random(f"window {seed} {step}").random() < config.short_share else None

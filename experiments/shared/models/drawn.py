"""A small model of a given size, trained on what is drawn anew in every step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from experiments.shared.work import Progress
from nestling.training.config import ScheduleConfig
from nestling.training.levels import shorter_windows
from nestling.training.schedules import window_limit


def train(
    model: nn.Module, steps: int, lr: float, warmup: int, loss_of: Callable[[], Tensor], progress: Progress | None,
    *, short_window: int | None = None, seed: int = 0,
) -> list[float]:  # fmt: skip
    """AdamW with a linear warm-up and a cosine to a twentieth; the loss of each step, from `loss_of()`.

    With a short window attention sees no more tokens in the steps that `nestling train` would draw for it.
    """
    windows = ScheduleConfig(short_window=short_window)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda i: min(1, (i + 1) / warmup) * (0.05 + 0.95 * (1 + math.cos(math.pi * i / steps)) / 2),
    )
    losses = []
    for step in range(steps):
        with shorter_windows(model, window_limit(step, steps, windows, seed)):
            loss = loss_of()
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        if progress:
            progress(step + 1, losses[-1])
    return losses


def beside(model: nn.Module, tensors: tuple[Tensor, ...]) -> list[Tensor]:
    """Tensors on the model's device; as they are if it has no parameters."""
    device = next((p.device for p in model.parameters()), None)
    return [t if device is None else t.to(device) for t in tensors]


def size(model: nn.Module) -> int:
    """Numbers of a model's parameters."""
    return sum(p.numel() for p in model.parameters())


def fitted(wanted: int, make: Callable[[int], Any], count: Callable[[Any], int], step: int) -> Any:
    """`make(n)` with the multiple n of `step` whose count is next to `wanted`.

    Raises:
        ValueError: it is more than 2% away.
    """
    low, high = step, 2 * step
    while count(make(high)) < wanted:
        low, high = high, 2 * high
    while high - low > step:
        middle = (low + high) // (2 * step) * step
        low, high = (middle, high) if count(make(middle)) < wanted else (low, middle)
    made = min((make(low), make(high)), key=lambda found: abs(count(found) - wanted))
    if abs(count(made) / wanted - 1) > 0.02:
        raise ValueError(f"no width gives {wanted:,} parameters; the next is {count(made):,}")
    return made

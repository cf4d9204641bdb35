"""A small model trained on what is drawn anew in every step."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from experiments.shared.work import Progress


def train(
    model: nn.Module, steps: int, lr: float, warmup: int, loss_of: Callable[[], Tensor], progress: Progress | None
) -> list[float]:
    """AdamW with a linear warm-up and a cosine to a twentieth; the loss of each step, from `loss_of()`."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda i: min(1, (i + 1) / warmup) * (0.05 + 0.95 * (1 + math.cos(math.pi * i / steps)) / 2),
    )
    losses = []
    for step in range(steps):
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


def size(model: nn.Module) -> int:
    """Numbers of a model's parameters."""
    return sum(p.numel() for p in model.parameters())

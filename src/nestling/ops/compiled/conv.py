"""`ops.conv`'s taps over a sequence, by the C++ library."""

from __future__ import annotations

import torch
from torch import Tensor

from nestling.ops.compiled import run


def forward(history: Tensor, weight: Tensor) -> Tensor:
    """y [B, T, D] of history [B, K - 1 + T, D] and weight [D, K]."""
    (batch, _, width), sizes = history.shape, _sizes(history, weight)
    y = history.new_empty(batch, sizes[0], width)
    run("conv_forward", history.dtype, sizes, ((history, weight.mT.contiguous()), (y,)), batch)
    return y


def backward(history: Tensor, weight: Tensor, g_y: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of history and weight."""
    batch, _, width = history.shape
    grads = torch.zeros_like(history), history.new_zeros(batch, weight.shape[1], width)
    given = (history, weight.mT.contiguous()), (g_y,), grads
    run("conv_backward", history.dtype, _sizes(history, weight), given, batch)
    return grads[0], grads[1].sum(0).mT


def _sizes(history: Tensor, weight: Tensor) -> tuple[int, int, int]:
    size = weight.shape[1]
    return history.shape[1] - size + 1, history.shape[2], size

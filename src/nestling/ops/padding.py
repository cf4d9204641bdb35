"""Sequences of unequal length in one batch: move the real tokens to the front, and back."""

from __future__ import annotations

import torch
from torch import Tensor


def pack(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Move each row's real tokens to the front, in order.

    Args:
        x: [B, T, D].  mask: [B, T] bool, True at real tokens (padding may stand anywhere).

    Returns:
        packed [B, T, D] (zeros after the last real token), order [B, T] (for `unpack`), lengths [B].
    """
    order = torch.argsort((~mask).to(torch.uint8), dim=1, stable=True)
    packed = x.masked_fill(~mask[..., None], 0).gather(1, order[..., None].expand_as(x))
    return packed, order, mask.sum(1)


def unpack(x: Tensor, order: Tensor) -> Tensor:
    """Undo `pack`: x [B, T, D] in packed order to the order of the original sequence."""
    return torch.zeros_like(x).scatter(1, order[..., None].expand_as(x), x)

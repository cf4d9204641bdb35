"""Rotary position embedding."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, positions: Tensor, theta: float = 10_000.0) -> Tensor:
    """Turn each pair (i, i + P/2) of a head's channels by the angle position * theta^(-2i/P).

    Args:
        x: [B, H, T, P], P even.  positions: [B, T], whole numbers.  theta: the base of the frequencies.

    Returns:
        [B, H, T, P] in x's dtype; the angles are computed in float32, or in float64 for float64 inputs.
    """
    half = x.shape[-1] // 2
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    angles = positions[:, None, :, None].to(dtype) * frequencies(half, theta, dtype, x.device)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x.split(half, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def frequencies(half: int, theta: float, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """theta^(-2i/P) of each pair, [P/2]."""
    return theta ** -(torch.arange(half, device=device, dtype=dtype) / half)

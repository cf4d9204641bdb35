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
    return turn(x, *angles_of(x, positions, theta))


def angles_of(x: Tensor, positions: Tensor, theta: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines by which `turn` turns what is at these positions, [B, 1, T, P/2]: queries and keys alike."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    angles = positions[:, None, :, None].to(dtype) * frequencies(x.shape[-1] // 2, theta, dtype, x.device)
    return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`rotate` by given angles."""
    a, b = x.split(x.shape[-1] // 2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def frequencies(half: int, theta: float, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """theta^(-2i/P) of each pair, [P/2]."""
    return theta ** -(torch.arange(half, device=device, dtype=dtype) / half)

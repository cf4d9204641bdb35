"""The short causal convolution as a module: what every sequence layer looks back with first."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nestling.ops.conv import short_convolution


class ShortConvolution(nn.Module):
    """Causal depth-wise convolution over the last `size` tokens.

    Args:
        dim: channels D.
        size: taps K.
        activation: "silu" or None, applied to the output.
    """

    def __init__(self, dim: int, size: int = 4, activation: str | None = None) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"size must be at least 1 tap; got {size} (a layer without a convolution has no module)")
        if activation not in (None, "silu"):
            raise ValueError(f"activation must be None or 'silu'; got {activation!r}")
        self.dim, self.size, self.activation = dim, size, activation
        self.weight = nn.Parameter(torch.empty(dim, size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every tap from U(-1/sqrt(K), 1/sqrt(K))."""
        bound = 1 / math.sqrt(self.size)
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, x: Tensor, state: Tensor | None = None, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x [B, T, D], state [B, K - 1, D] -> y [B, T, D] and the state after the last real token."""
        y, state = short_convolution(x, self.weight.to(x.dtype), state=state, mask=mask)
        return (F.silu(y) if self.activation == "silu" else y), state

    def extra_repr(self) -> str:
        return f"{self.dim}, size={self.size}, activation={self.activation}"

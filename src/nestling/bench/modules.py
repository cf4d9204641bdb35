"""What is measured: a sequence layer, and a softmax attention + MLP block as plain as it comes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestling.bench.settings import BenchSettings
from nestling.layers.mixers import build_mixer


class AttentionBlock(nn.Module):
    """Pre-norm causal softmax attention (torch's fused kernel), then a pre-norm GELU MLP of four times the width.

    Args:
        dim: width D.  heads: attention heads, a divisor of D.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.mlp_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, D] -> [B, T, D]."""
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


class Softmax(nn.Module):
    """Only the attention of `AttentionBlock`: projections and the fused kernel."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


def block(dim: int, heads: int, device: str) -> nn.Module:
    """An `AttentionBlock`, always with the same weights."""
    torch.manual_seed(0)
    return AttentionBlock(dim, heads).to(device)


def layer_of(settings: BenchSettings, name: str = "selfmod", **options) -> nn.Module:
    """A mixer of the benchmark's width and heads."""
    torch.manual_seed(0)
    return build_mixer(name, settings.dim, settings.heads, **options).to(settings.device)

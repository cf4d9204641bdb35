"""A small vision transformer: patches, learned positions, pre-norm blocks, the mean over patches, a linear head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)). `[B, T, D] -> [B, T, D]`."""

    def __init__(self, width: int, heads: int, expansion: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(width, expansion * width), nn.Linear(expansion * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        z = self.norm1(x)
        q, k, v = (
            layer(z).view(batch, tokens, self.heads, -1).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width)
        x = x + self.out(mixed)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class ViT(nn.Module):
    """Square grey images `[B, side, side]` to logits `[B, classes]`.

    Args:
        side, patch: of the image and of a patch, in pixels; `patch` divides `side`.
        width, layers, heads, expansion: of the transformer; heads divide the width.
        classes: outputs.
    """

    def __init__(
        self,
        side: int = 28,
        patch: int = 7,
        width: int = 64,
        layers: int = 4,
        heads: int = 4,
        expansion: int = 4,
        classes: int = 10,
    ) -> None:
        super().__init__()
        if side % patch or width % heads:
            raise ValueError(f"patch {patch} must divide side {side}, and heads {heads} must divide width {width}")
        self.patch = patch
        self.embed = nn.Linear(patch * patch, width)
        self.position = nn.Parameter(0.02 * torch.randn((side // patch) ** 2, width))
        self.blocks = nn.ModuleList(Block(width, heads, expansion) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)
        nn.init.normal_(self.head.weight, std=0.02)  # the first loss is about that of a blind guess

    def get_output_embeddings(self) -> nn.Linear:
        """The head, as transformers names it."""
        return self.head

    def forward(self, images: Tensor) -> Tensor:
        patches = images.unfold(1, self.patch, self.patch).unfold(2, self.patch, self.patch)
        x = self.embed(patches.flatten(1, 2).flatten(2)) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x.mean(1)))

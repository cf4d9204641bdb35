"""The continuum memory system as a layer: a chain of MLP blocks, one per level (NL Sec. 7, Eqs. 70-74)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nestling.cms.fast_linear import FastLinear
from nestling.schedule import Level, check_order

VARIANTS = ("sequential", "nested", "independent")
ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu, "tanh": torch.tanh}


class LevelBlock(nn.Module):
    """The MLP of one level, after its norm: down(act(gate(n)) * up(n)), or down(act(up(n))), n = norm(x).

    Args:
        dim: model width D.  intermediate_size: hidden width F.
        activation: a name of ACTIVATIONS.  gated: with the gate (as Llama) or without.
    """

    def __init__(
        self, dim: int, intermediate_size: int, activation: str = "silu", gated: bool = True, norm_eps: float = 1e-6
    ) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(dim, eps=norm_eps)
        self.gate_proj = FastLinear(dim, intermediate_size, bias=False) if gated else None
        self.up_proj = FastLinear(dim, intermediate_size, bias=False)
        self.down_proj = FastLinear(intermediate_size, dim, bias=False)
        self.activation = activation
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw each matrix from N(0, 1 / inputs); the norm starts at one."""
        for module in self.children():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=1 / math.sqrt(module.in_features))
            else:
                module.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, D] -> what the level adds to the residual stream, [B, T, D]."""
        n, act = self.norm(x), ACTIVATIONS[self.activation]
        hidden = act(self.up_proj(n)) if self.gate_proj is None else act(self.gate_proj(n)) * self.up_proj(n)
        return self.down_proj(hidden)


class ContinuumMemory(nn.Module):
    """A chain of MLP blocks, each with an update frequency of its own; with one level, the MLP of a Transformer.

    "sequential" (Eq. 73) and "nested" (Eq. 72): x <- x + block(x), the fastest level first; the two differ in what
    becomes of a level's weights at the end of the slower level's chunk, not in this forward (decision D12).
    "independent" (Eq. 74): x + sum_l a_l block_l(x) with learned a, 1 / levels at the start.

    The blocks' parameters are where every stream's levels begin. The outer loop trains them, slow levels at their own
    frequency (`nestling.Schedule`). This forward is the levels' forward and nothing more: what learns in a context is
    the `nestling.cms.Learner` over a whole model, whose loss it needs; it gives this same forward weights of each
    stream's own (W + D in its linear layers). So the layer has no state, and refuses one.

    Args:
        dim: model width D.
        levels: Levels, fastest first; None is one level that the outer loop trains.
        variant: how the levels' forwards combine.
        intermediate_size: hidden width of every block, or one per level; None is 4 * dim.
        activation, gated, norm_eps: of the blocks.

    Raises:
        ValueError: levels that do not form a chain, an unknown variant or activation, sizes out of range.
    """

    def __init__(
        self,
        dim: int,
        levels: Sequence[Level | dict[str, Any]] | None = None,
        variant: str = "sequential",
        *,
        intermediate_size: int | Sequence[int] | None = None,
        activation: str = "silu",
        gated: bool = True,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if dim < 1:
            raise ValueError(f"dim must be positive; got {dim}")
        if variant not in VARIANTS:
            raise ValueError(f"variant must be one of {', '.join(VARIANTS)}; got {variant!r}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}; got {activation!r}")
        self.dim, self.variant = dim, variant
        self.levels = check_order([Level()] if levels is None else levels)
        size = 4 * dim if intermediate_size is None else intermediate_size
        sizes = [size] * len(self.levels) if isinstance(size, int) else list(size)
        if len(sizes) != len(self.levels) or min(sizes) < 1:
            raise ValueError(
                f"intermediate_size must be one positive number or one per level ({len(sizes)} given); got {size}"
            )
        self.blocks = nn.ModuleList(LevelBlock(dim, n, activation, gated, norm_eps) for n in sizes)
        mixes = variant == "independent" and len(self.levels) > 1
        self.aggregate = nn.Parameter(torch.empty(len(self.levels))) if mixes else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Every block afresh, and the aggregation at the mean of the levels."""
        for block in self.blocks:
            block.reset_parameters()
        if self.aggregate is not None:
            nn.init.constant_(self.aggregate, 1 / len(self.levels))

    def level_parameters(self) -> dict[int, list[nn.Parameter]]:
        """Each level's own parameters (the aggregation belongs to none)."""
        return {i: list(block.parameters()) for i, block in enumerate(self.blocks)}

    def forward(self, x: Tensor, state: tuple | None = None) -> tuple[Tensor, tuple]:
        """x [B, T, D] -> y [B, T, D] with the residual added, and the state, which is empty."""
        if x.dim() != 3 or x.shape[-1] != self.dim:
            raise ValueError(f"x must be [B, T, {self.dim}]; got {tuple(x.shape)}")
        if state:
            raise ValueError(
                "state must be None or (): what levels learn in a context is the state of the model's learner"
            )
        if self.variant != "independent":
            for block in self.blocks:
                x = x + block(x)
            return x, ()
        outputs = [block(x) for block in self.blocks]
        if self.aggregate is None:
            return x + outputs[0], ()
        return x + sum(a * y for a, y in zip(self.aggregate.unbind(), outputs)), ()

    def extra_repr(self) -> str:
        sizes = ", ".join(str(level.chunk_size) for level in self.levels)
        return f"{self.dim}, chunk sizes=[{sizes}], variant={self.variant}"

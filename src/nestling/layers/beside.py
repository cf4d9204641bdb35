"""A memory and attention over a window side by side in one sequence layer."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from nestling.layers.attention import Attention, AttentionState
from nestling.layers.titans import SelfModifyingTitans
from nestling.layers.titans_state import TitansState


class BesideState(NamedTuple):
    """What the two carry over."""

    memory: TitansState
    attention: AttentionState

    @property
    def position(self) -> Tensor:
        """Real tokens seen so far, [B]."""
        return self.memory.position


class MemoryBesideAttention(nn.Module):
    """y = memory(x) + attention(x): what was long ago, and all of the window (Titans' "memory as a gate", added).

    Args:
        dim, num_heads: model width D; heads of the memory. With `erase_heads` "half" it has two at least, of the same
            width: one that erases and one that adds.
        attention_heads, attention_head_dim: heads of the attention and their channels; None: twice the memory's heads,
            or as many where their channels would be odd; dim / attention_heads channels.
        num_kv_heads, window, rope_theta, qk_norm: of the attention, as `Attention` has them.
        options: the memory's, the fields of `TitansConfig`.

    Call: as `SelfModifyingTitans`; the state is that of both.

    Raises:
        ValueError: as the two parts raise it.
    """

    def __init__(
        self, dim: int, num_heads: int, *, attention_heads: int | None = None, attention_head_dim: int | None = None,
        num_kv_heads: int | None = None, window: int = 256, rope_theta: float = 10_000.0, qk_norm: bool = False,
        **options: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        heads = max(2, num_heads) if options.get("erase_heads") == "half" else num_heads
        if heads > num_heads and options.get("head_dim") is None:
            options["head_dim"] = dim // num_heads
        self.memory = SelfModifyingTitans(dim, heads, **options)
        twice = 2 * num_heads if dim % (4 * num_heads) == 0 else num_heads  # rotary positions turn pairs of channels
        heads = twice if attention_heads is None else attention_heads
        self.attention = Attention(
            dim, heads, num_kv_heads=num_kv_heads, head_dim=attention_head_dim, window=window, rope_theta=rope_theta,
            qk_norm=qk_norm,
        )  # fmt: skip
        self.num_heads = num_heads
        self.reset_parameters()

    @property
    def outputs(self) -> tuple[nn.Linear, ...]:
        """The matrices that write into the residual stream."""
        return self.memory.out_proj, self.attention.out_proj

    def reset_parameters(self) -> None:
        """Each part by its own rule, the sum of the two as large as one."""
        for part in (self.memory, self.attention):
            part.reset_parameters()
            part.out_proj.weight.data.mul_(0.5**0.5)

    def forward(
        self, x: Tensor, state: BesideState | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, BesideState]:
        """x [B, T, D] and mask [B, T], True at real tokens -> y [B, T, D] and the state after x."""
        memory, attention = (None, None) if state is None else state
        remembered, memory = self.memory(x, memory, mask)
        attended, attention = self.attention(x, attention, mask)
        return remembered + attended, BesideState(memory, attention)

    def state_like(self, state: Any, batch_size: int) -> BesideState:
        """What the state of so many streams is made of, a Like in place of every tensor."""
        memory, attention = (None, None) if state is None else state
        parts = self.memory.state_like(memory, batch_size), self.attention.state_like(attention, batch_size)
        return BesideState(*parts)

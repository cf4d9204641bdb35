"""Softmax attention as a sequence layer: the non-parametric memory (NL Eqs. 62, 63)."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nestling.layers.convolution import ShortConvolution
from nestling.layers.one_token import attention_step, may_step
from nestling.layers.rotary import angles_of, turn
from nestling.utils.likeness import Like, activations, columns


class AttentionState(NamedTuple):
    """What attention carries over: every past key and value, or those of the window."""

    keys: Tensor  # [B, S, G, P], rotated
    values: Tensor  # [B, S, G, P]
    valid: Tensor  # [B, S] bool, False where a column is padding
    positions: Tensor  # [B, S], each key's position among the real tokens of its sequence
    tokens: Tensor  # [B], real tokens seen so far
    convolution: Tensor  # [B, conv_size - 1, D], or [B, 0, D] without a convolution


class Attention(nn.Module):
    """Causal softmax attention with rotary positions, grouped key-value heads and an optional window.

    Args:
        dim: model width D.
        num_heads: query heads H.
        num_kv_heads: key-value heads G, a divisor of H; None is H.
        head_dim: channels P per head (even); None is dim / num_heads.
        window: a token sees itself and the window - 1 tokens before it; None sees all of the past.
        rope_theta: base of the rotary frequencies.
        conv_size: taps of the short convolution in front of the projections; 0 leaves it out.
        output_gate: multiply the heads' outputs by silu of a projection, as the other sequence layers do.
        qk_norm: RMS-normalise each head's queries and keys.

    Raises:
        ValueError: sizes that do not divide, or are out of range.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        window: int | None = None,
        rope_theta: float = 10_000.0,
        conv_size: int = 4,
        output_gate: bool = True,
        qk_norm: bool = False,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        groups = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads < 1 or groups < 1 or num_heads % groups:
            raise ValueError(f"num_kv_heads ({groups}) must divide num_heads ({num_heads})")
        if head_dim is None and dim % num_heads:
            raise ValueError(f"num_heads ({num_heads}) must divide dim ({dim}), or give head_dim")
        size = dim // num_heads if head_dim is None else head_dim
        if size < 2 or size % 2:
            raise ValueError(f"head_dim must be even for rotary positions; got {size}")
        if window is not None and window < 1:
            raise ValueError(f"window must be at least 1 token, or None for all of the past; got {window}")
        if conv_size < 0:
            raise ValueError(f"conv_size must not be negative (0 leaves the convolution out); got {conv_size}")
        self.dim, self.num_heads, self.num_kv_heads, self.head_dim = dim, num_heads, groups, size
        self.window, self.rope_theta, self.conv_size = window, rope_theta, conv_size
        self.conv = ShortConvolution(dim, conv_size) if conv_size else None
        self.q_proj = nn.Linear(dim, num_heads * size, bias=False)
        self.k_proj = nn.Linear(dim, groups * size, bias=False)
        self.v_proj = nn.Linear(dim, groups * size, bias=False)
        self.out_proj = nn.Linear(num_heads * size, dim, bias=False)
        self.gate_proj = nn.Linear(dim, num_heads * size, bias=False) if output_gate else None
        self.q_norm = nn.RMSNorm(size, eps=norm_eps) if qk_norm else None
        self.k_norm = nn.RMSNorm(size, eps=norm_eps) if qk_norm else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw each matrix from N(0, 1 / inputs); norms start at one."""
        for module in self.children():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=1 / math.sqrt(module.in_features))
            else:
                module.reset_parameters()

    def forward(
        self, x: Tensor, state: AttentionState | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, AttentionState]:
        """Attend over the past and the input.

        Args:
            x: [B, T, D].  state: what an earlier call returned, or None.
            mask: [B, T] bool, True at real tokens; None where all are. No token attends to padding and padding takes
                no position; its own output means nothing.

        Returns:
            y [B, T, D] and the state after x.
        """
        self._check(x, state, mask)
        if state is not None and may_step(x) and (found := attention_step(self, x, state, mask)) is not None:
            return found
        batch, tokens, _ = x.shape
        mixed, convolution = x, x.new_zeros(batch, 0, self.dim)
        if self.conv is not None:
            mixed, convolution = self.conv(x, None if state is None else state.convolution, mask)
        q = self.q_proj(mixed).view(batch, tokens, self.num_heads, self.head_dim).transpose(1, 2)
        k = self.k_proj(mixed).view(batch, tokens, self.num_kv_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(mixed).view(batch, tokens, self.num_kv_heads, self.head_dim).transpose(1, 2)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)

        real = torch.ones(batch, tokens, dtype=torch.bool, device=x.device) if mask is None else mask
        seen = real.new_zeros(batch, dtype=torch.long) if state is None else state.tokens
        positions = seen[:, None] + (real.cumsum(1) - 1).clamp(min=0)
        angles = angles_of(q, positions, self.rope_theta)
        q, k = turn(q, *angles), turn(k, *angles)

        keys, values, valid, places = k, v, real, positions
        if state is not None:
            self._check_dtype(state, k)
            keys = torch.cat([state.keys.transpose(1, 2), k], 2)
            values = torch.cat([state.values.transpose(1, 2), v], 2)
            valid = torch.cat([state.valid, real], 1)
            places = torch.cat([state.positions, positions], 1)
        if state is None and mask is None and (self.window is None or tokens <= self.window):
            y = self._attend(q, keys, values, causal=True)
        elif state is None and mask is None and x.is_cuda:  # few launches; a CPU does better block by block
            y = self._windows(q, keys, values)
        else:
            past, size = places.shape[1] - tokens, tokens
            # padding may stand between a token and its window's first key: only without it is a window a slice
            if self.window is not None and mask is None:
                size = max(self.window, 128)
            blocks = []
            for start in range(0, tokens, size):
                stop = min(start + size, tokens)
                first = 0 if size == tokens or start < self.window else past + start - self.window + 1
                part = slice(first, past + stop)
                allowed = self._allowed(positions[:, start:stop], valid[:, part], places[:, part])
                blocks.append(self._attend(q[:, :, start:stop], keys[:, :, part], values[:, :, part], allowed))
            y = torch.cat(blocks, 2)
        y = y.transpose(1, 2).reshape(batch, tokens, self.num_heads * self.head_dim)
        if self.gate_proj is not None:
            y = y * F.silu(self.gate_proj(mixed))
        new = AttentionState(
            keys.transpose(1, 2), values.transpose(1, 2), valid, places, seen + real.sum(1), convolution
        )
        return self.out_proj(y), self._last(new, padded=mask is not None or state is not None)

    def state_like(self, state: Any, batch_size: int) -> AttentionState:
        """What the state of so many sequences is made of, a Like in place of every tensor; columns as in `state`."""
        count = columns(getattr(state, "keys", None), 1)
        if self.window is not None:
            count = min(count, self.window - 1)
        types = activations(self.k_proj.weight.dtype)
        heads, whole = Like((batch_size, count, self.num_kv_heads, self.head_dim), types), (torch.int64,)
        return AttentionState(
            heads, heads, Like((batch_size, count), (torch.bool,)), Like((batch_size, count), whole),
            Like((batch_size,), whole), Like((batch_size, max(self.conv_size - 1, 0), self.dim), types),
        )  # fmt: skip

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None = None, causal: bool = False) -> Tensor:
        """Softmax attention, each key-value head serving its group of query heads."""
        if (repeat := self.num_heads // self.num_kv_heads) > 1:
            k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, is_causal=causal)

    def _windows(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The window's attention without padding or a past: blocks of queries with the keys they see, in one call."""
        size, tokens = max(self.window, 128), q.shape[2]  # as many queries a block: of a small window, many see alike
        count = -(-tokens // size)

        def blocks(t: Tensor, before: int) -> Tensor:  # [B H, blocks, before + size, P]
            padded = F.pad(t, (0, 0, before, count * size - tokens)).flatten(0, 1)
            return padded.unfold(1, before + size, size).mT

        if (repeat := self.num_heads // self.num_kv_heads) > 1:
            k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
        at = torch.arange(size, device=q.device)[:, None]  # of a query, and of a key in front of the block or in it
        key = torch.arange(-self.window, size, device=q.device)
        first = torch.arange(count, device=q.device)[:, None, None] * size
        allowed = (key <= at) & (key > at - self.window) & (first + key >= 0)
        parts = blocks(q, 0), blocks(k, self.window), blocks(v, self.window)
        y = F.scaled_dot_product_attention(*parts, attn_mask=allowed)
        return y.flatten(1, 2)[:, :tokens].unflatten(0, q.shape[:2])

    def _allowed(self, positions: Tensor, valid: Tensor, places: Tensor) -> Tensor:
        """[B, 1, T, S]: the key is real, not in the future, inside the window (the last T keys are the queries')."""
        distance = positions[:, :, None] - places[:, None, :]
        allowed = valid[:, None, :] & (distance >= 0)
        if self.window is not None:
            allowed = allowed & (distance < self.window)
        # a padding token sees at least its own column: in some kernels a softmax over nothing is NaN
        tokens, columns = allowed.shape[1:]
        itself = torch.ones(tokens, columns, dtype=torch.bool, device=valid.device)
        itself = itself.tril(columns - tokens).triu(columns - tokens)
        return (allowed | itself)[:, None]

    def _last(self, state: AttentionState, padded: bool) -> AttentionState:
        """Drop what no later token can see: a window keeps the last window - 1 real tokens of each sequence."""
        if self.window is None or state.keys.shape[1] < self.window:
            return state
        if not padded:  # a copy: a view would keep all of them
            first = state.keys.shape[1] - self.window + 1
            keys, values, valid, positions = (t[:, first:].clone() for t in state[:4])
            return state._replace(keys=keys, values=values, valid=valid, positions=positions)
        # stable: the real columns move to the end in their order, so that padding is what falls out first
        order = state.valid.to(torch.uint8).argsort(dim=1, stable=True)[:, state.keys.shape[1] - self.window + 1 :]
        wide = order[:, :, None, None].expand(-1, -1, *state.keys.shape[2:])
        return state._replace(
            keys=state.keys.gather(1, wide),
            values=state.values.gather(1, wide),
            valid=state.valid.gather(1, order),
            positions=state.positions.gather(1, order),
        )

    def _check(self, x: Tensor, state: AttentionState | None, mask: Tensor | None) -> None:
        if x.dim() != 3 or x.shape[-1] != self.dim:
            raise ValueError(f"x must be [B, T, {self.dim}]; got {tuple(x.shape)}")
        if mask is not None and (mask.shape != x.shape[:2] or mask.dtype != torch.bool):
            raise ValueError(f"mask must be bool {tuple(x.shape[:2])} [B, T]; got {mask.dtype} {tuple(mask.shape)}")
        if state is None:
            return
        if not isinstance(state, AttentionState):
            raise ValueError(f"state must be an AttentionState from this layer; got {type(state).__name__}")
        batch, taps = x.shape[0], max(self.conv_size - 1, 0)
        if state.keys.shape[0] != batch:
            raise ValueError(
                f"state belongs to a batch of {state.keys.shape[0]} sequences, but x has {batch}; "
                "start from state=None or select the sequences of the state"
            )
        if state.keys.shape[2:] != (self.num_kv_heads, self.head_dim):
            raise ValueError(
                f"state has key heads {tuple(state.keys.shape[2:])}, but this layer needs "
                f"{(self.num_kv_heads, self.head_dim)}: it comes from another configuration"
            )
        if state.convolution.shape[1:] != (taps, self.dim):
            raise ValueError(
                f"state has a convolution buffer {tuple(state.convolution.shape[1:])}, but this layer needs "
                f"{(taps, self.dim)}: it comes from another configuration"
            )
        if self.window is not None and state.keys.shape[1] >= self.window:
            raise ValueError(
                f"state holds {state.keys.shape[1]} columns, but a window of {self.window} keeps at most "
                f"{self.window - 1}: it comes from another configuration"
            )

    @staticmethod
    def _check_dtype(state: AttentionState, keys: Tensor) -> None:
        if state.keys.dtype != keys.dtype:
            raise ValueError(
                f"state is {state.keys.dtype}, but this call computes keys in {keys.dtype}; "
                "continue under the dtype the state was made with, or convert it"
            )

    def extra_repr(self) -> str:
        return f"{self.dim}, heads={self.num_heads}, kv_heads={self.num_kv_heads}, window={self.window}"

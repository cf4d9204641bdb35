"""Memory caching (Behrouz et al. 2026, arXiv 2602.24281): what each stretch of a text wrote to a memory is kept.

A memory of a fixed size holds so many pairs, and what is far back fades. So of every stretch n of S tokens is kept, of
the running memory W, its decays alpha and the keys k,

    C_n = W_end - (prod alpha) W_start      what the stretch wrote; of a head that only adds, W begun anew with it
    m_n = sum k / S                         where to look for it

and a token reads the running memory and those of all complete stretches, each to the share that its query gives it:

    y_t = g_0 W_t q_t + sum_n g_n C_n q_t,      g = softmax(b, s sqrt(S) q_t.m_1, s sqrt(S) q_t.m_2, ...)

with two learned numbers a head, b and s (the paper's gated residual memory, its gate's query being the memory's own).
`titans_reference.Cache` is this token by token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nestling.layers.titans_groups import gates_of
from nestling.layers.titans_scan import Memories, MemoryScan


class CachedMemories(NamedTuple):
    """What a stream keeps of its stretches; every tensor begins with the batch dimension."""

    memories: Tensor  # C of each complete stretch, transposed, [B, H, N, i, o]: all of a head's are one matrix
    keys: Tensor  # m of each, [B, H, N, i]
    numbers: Tensor  # which stretch each is, ascending, -1 where a sequence has fewer than others: int64 [B, N]
    start: Tensor  # of the open stretch: W where it began, [B, H, o, i]
    decay: Tensor  # the product of its decays, [B, H]
    total: Tensor  # the sum of its keys, [B, H, i]

    @classmethod
    def begin(cls, weight: Tensor) -> CachedMemories:
        """Of a stream that begins with the main memory [B, H, o, i]."""
        batch, heads, outs, ins = weight.shape
        return cls(
            weight.new_zeros(batch, heads, 0, ins, outs), weight.new_zeros(batch, heads, 0, ins),
            torch.zeros(batch, 0, dtype=torch.int64, device=weight.device),
            weight, weight.new_ones(batch, heads), weight.new_zeros(batch, heads, ins),
        )  # fmt: skip

    def like(self, count: int) -> CachedMemories:
        """One of `Like`s in place of tensors with so many kept memories."""
        memories, keys, numbers = (
            replace(own, shape=(*own.shape[:dim], count, *own.shape[dim + 1 :]))
            for own, dim in zip(self[:3], (2, 2, 1), strict=True)
        )
        return self._replace(memories=memories, keys=keys, numbers=numbers)


@dataclass(frozen=True)
class CachedScan:
    """One call of a layer that keeps memories.

    Attributes:
        scan: of the running memory.
        scale, bias: the gate's s and b of every head, [H].
    """

    scan: MemoryScan
    scale: Tensor
    bias: Tensor

    def run(
        self, features: dict[str, Tensor], memories: Memories, cached: CachedMemories, positions: list[int],
        lengths: list[int],
    ) -> tuple[Tensor, Memories, CachedMemories]:  # fmt: skip
        """`MemoryScan.run`, with what is kept before and after the call."""
        config, every, longest = self.scan.config, self.scan.config.cache_every, max(lengths)
        ends = {end for p in set(positions) for end in range(-p % every, longest, every)}
        alpha, tokens = gates_of(config, features, self.scan.numbers).alpha, features["q"].shape[2]
        reads = []
        for begin, end in pairwise(sorted({0, longest, *ends})):
            part = {name: f[:, :, begin:end] for name, f in features.items()}
            seen = [p + min(n, begin) for p, n in zip(positions, lengths, strict=True)]
            here = [min(max(n - begin, 0), end - begin) for n in lengths]
            y, memories = self.scan.run(part, memories, seen, here)
            reads.append(self.mixed(y, part["q"], cached))
            cached = _noted(cached, part["k"], alpha[:, :, begin:end], here)
            complete = [(p + n) // every if n and (p + n) % every == 0 else 0 for p, n in zip(seen, here, strict=True)]
            if any(complete):
                cached = _closed(cached, memories[-1].now[0][-1], complete, every, config.cache_max)
        y = torch.cat(reads, 2) if reads else torch.zeros_like(features["q"])
        return F.pad(y, (0, 0, 0, tokens - y.shape[2])), memories, _ordered(cached)

    def mixed(self, y: Tensor, q: Tensor, cached: CachedMemories) -> Tensor:
        """Reads of the running memory [B, H, T, o], of tokens inside one stretch of every sequence, with all others."""
        count = cached.numbers.shape[1]
        if count == 0:
            return y
        near = q @ cached.keys.mT * self.scale[:, None, None]
        near = near.masked_fill((cached.numbers < 0)[:, None, None], -torch.inf)
        own = self.bias[:, None, None].expand(*near.shape[:-1], 1)
        own, share = torch.cat([own, near], -1).softmax(-1).split([1, count], -1)
        weighed = (share.unsqueeze(-1) * q.unsqueeze(-2)).flatten(-2)  # [B, H, T, N i]: all reads as one product
        return own * y + weighed @ cached.memories.flatten(2, 3)


def _noted(cached: CachedMemories, k: Tensor, alpha: Tensor, lengths: Sequence[int]) -> CachedMemories:
    """After tokens inside one stretch: keys [B, H, T, i] and decays [B, H, T], of each sequence the first so many."""
    if min(lengths) < k.shape[2]:
        real = torch.arange(k.shape[2], device=k.device) < torch.tensor(lengths, device=k.device)[:, None, None]
        k, alpha = k * real.unsqueeze(-1), alpha.masked_fill(~real, 1)
    return cached._replace(decay=cached.decay * alpha.prod(-1), total=cached.total + k.sum(2))


def _closed(
    cached: CachedMemories, weight: Tensor, complete: list[int], every: int, most: int | None
) -> CachedMemories:
    """Keep what the open stretch wrote and begin the next, in the sequences that have now so many, not 0."""
    count = torch.tensor(complete, device=weight.device)
    done = count > 0
    wrote = weight - cached.decay[..., None, None] * cached.start
    numbers = torch.cat([cached.numbers, count[:, None] - 1], 1)
    if most is not None:
        numbers = numbers.masked_fill(numbers < count[:, None] - most, -1)
    cached = CachedMemories(
        torch.cat([cached.memories, wrote.mT.unsqueeze(2)], 2),
        torch.cat([cached.keys, cached.total.unsqueeze(2) / every], 2),
        numbers,
        torch.where(done[:, None, None, None], weight, cached.start),
        cached.decay.masked_fill(done[:, None], 1),
        cached.total.masked_fill(done[:, None, None], 0),
    )
    return cached if most is None else _ordered(cached)


def _ordered(cached: CachedMemories) -> CachedMemories:
    """Without columns that no sequence needs; where some have fewer, zeros come first. So a state is what was read,
    not how it was cut into calls."""
    numbers = cached.numbers
    there = numbers >= 0
    if bool(there.all()):
        return cached
    order = numbers.argsort(dim=1, stable=True)[:, numbers.shape[1] - int(there.sum(1).max()) :]
    there, place = there.gather(1, order)[:, None, :, None], order[:, None, :, None]
    memories, keys = cached.memories.flatten(3), cached.keys
    return cached._replace(
        memories=(memories.take_along_dim(place, 2) * there).unflatten(3, cached.memories.shape[3:]),
        keys=keys.take_along_dim(place, 2) * there,
        numbers=numbers.gather(1, order),
    )

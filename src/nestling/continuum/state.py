"""What a stream has learned: differences of every level's weights, its open chunk, and where it stands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import DynamicCache

from nestling.continuum.inner import Slots, begin
from nestling.continuum.weights import FastLinear
from nestling.levels.schedule import Level


@dataclass(frozen=True)
class LevelState:
    """One level of a batch of streams; tensors are replaced, never written into, so a copy of the state is free.

    Attributes:
        deltas: difference from the shared weights, [B, o, i] for each linear layer.
        sums: gradients of the summed loss since the last update; empty for the fastest level, which never has to wait.
        slots: the inner optimiser's memory.
        written: norm of the last update of each stream [B], NaN where it was refused.
        count: tokens in `sums`.  updates: updates so far.
    """

    deltas: tuple[Tensor, ...]
    sums: tuple[Tensor, ...]
    slots: Slots
    written: Tensor
    count: int = 0
    updates: int = 0


@dataclass(frozen=True)
class StreamState:
    """The state of a batch of streams between calls.

    Attributes:
        levels: one LevelState per level that learns in the context, None for the others and before the first write.
        tokens: [B, n] of the fastest level's open chunk, n <= its size; its last target comes with the next token.
        start: the sequence layers' state at the open chunk's start (`Snapshot`).
        position: tokens read so far.
    """

    levels: tuple[LevelState | None, ...]
    tokens: Tensor
    start: Any
    position: int = 0

    def map(self, change: Callable[[Tensor], Tensor]) -> StreamState:
        """The state with every tensor changed, batch in front."""

        def changed(s: LevelState) -> LevelState:
            names = ("deltas", "sums", "slots", "written")
            return replace(s, **{n: tree_map_only(Tensor, change, getattr(s, n)) for n in names})

        levels = tuple(None if s is None else changed(s) for s in self.levels)
        start = None if self.start is None else self.start.map(change)
        return replace(self, levels=levels, tokens=change(self.tokens), start=start)

    @property
    def nbytes(self) -> int:
        """Bytes of what the levels hold (differences, gradient sums, optimiser memory)."""
        held = [(s.deltas, s.sums, s.slots, s.written) for s in self.levels if s is not None]
        return sum(t.numel() * t.element_size() for t in tree_leaves(held) if isinstance(t, Tensor))


def begin_level(level: Level, modules: Sequence[FastLinear], batch: int, fastest: bool) -> LevelState:
    """A level before its first update: differences of zero."""
    zeros = tuple(_zeros(m.weight, batch) for m in modules)
    return LevelState(zeros, () if fastest else zeros, begin(level, list(zeros)), zeros[0].new_zeros(batch))


def level_bytes(level: Level, modules: Sequence[FastLinear], batch: int, fastest: bool) -> int:
    """Bytes of a level's state, known before anything is allocated."""
    with torch.device("meta"):
        weights = [torch.empty(batch, *m.weight.shape, dtype=_dtype(m.weight)) for m in modules]
        sums = [] if fastest else weights
        tensors = tree_leaves((weights, sums, begin(level, weights), weights[0].new_zeros(batch)))
    return sum(t.numel() * t.element_size() for t in tensors)


def _dtype(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)


def _zeros(weight: Tensor, batch: int) -> Tensor:
    return torch.zeros(batch, *weight.shape, dtype=_dtype(weight), device=weight.device)


@dataclass(frozen=True)
class Snapshot:
    """A key-value cache as it was: its keys and values are never written into, so only a length is kept."""

    length: int

    def map(self, change: Callable[[Tensor], Tensor]) -> Snapshot:
        """Nothing to change: the cache itself is reordered."""
        return self

    @staticmethod
    def of(cache: DynamicCache) -> Snapshot:
        return Snapshot(cache.get_seq_length())

    def restore(self, cache: DynamicCache) -> DynamicCache:
        """A cache of the first `length` tokens of this one, by views."""
        parts = [(layer.keys[..., : self.length, :], layer.values[..., : self.length, :]) for layer in cache.layers]
        return DynamicCache(parts) if self.length else DynamicCache()

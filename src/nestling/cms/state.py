"""What a stream has learned: differences of every level's weights, its open chunk, and where it stands."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import register_dataclass, tree_leaves, tree_map_only

from nestling.cms.fast_linear import FastLinear
from nestling.cms.inner_optimizers import Slots, begin
from nestling.cms.surprise import Surprise, begin_surprise
from nestling.schedule import Level


@dataclass(frozen=True)
class LevelState:
    """One level of a batch of streams; tensors are replaced, never written into, so a copy of the state is free.

    Attributes:
        deltas: difference from the shared weights, [B, o, i] for each linear layer; of a rank its factor [B, o, r].
        sums: gradients of the summed loss since the last update; empty for a level that never has to wait.
        slots: the inner optimiser's memory.
        written: norm of the last update of each stream [B], NaN where it was refused.
        count: tokens in `sums`.  updates: boundaries so far (an adaptive level's own count is in `surprise`).
        norms: sums of |x|^2 that belong to `sums`, [B] for each layer ("dgd" only).
        refused: gradients of each stream [B] that were not finite, and were not learned from.
        surprise: of an adaptive level.
    """

    deltas: tuple[Tensor, ...]
    sums: tuple[Tensor, ...]
    slots: Slots
    written: Tensor
    refused: Tensor
    count: int = 0
    updates: int = 0
    norms: tuple[Tensor, ...] = ()
    surprise: Surprise | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> LevelState:
        """The level with every tensor changed."""
        return tree_map_only(Tensor, change, self)

    def recalled(self, other: LevelState | None) -> LevelState:
        """The level here with what another had learned, None: nothing. No gradient waits; counts go on."""
        empty = self.map(torch.zeros_like)
        learned = empty if other is None else other
        surprise = self.surprise and self.surprise._replace(tokens=empty.surprise.tokens)
        return replace(
            self, deltas=learned.deltas, slots=learned.slots, sums=empty.sums, norms=empty.norms, count=0,
            surprise=surprise,
        )  # fmt: skip


@dataclass(frozen=True)
class StreamState:
    """The state of a batch of streams between calls.

    Attributes:
        levels: one LevelState per level that learns in the context, None for the others and before the first write.
        tokens: [B, n] of the fastest level's open chunk, n <= its size; its last target comes with the next token.
        hidden: [B, n, D], what the blocks below all levels made of them; None where there are none.
        start: the state of the sequence layers at the open chunk's start, one mark for each block (see `backbones`).
        position: tokens read so far, by which boundaries are counted.
        dropped: tokens that were read too, but that boundaries do not count (`LevelsCache.forget_context`); below 0
            where chunks ended early and count as whole (`LearningMixin.finish`).
    """

    levels: tuple[LevelState | None, ...]
    tokens: Tensor
    hidden: Tensor | None
    start: Any
    position: int = 0
    dropped: int = 0

    def map(self, change: Callable[[Tensor], Tensor]) -> StreamState:
        """The state with every tensor changed, batch in front."""
        return tree_map_only(Tensor, change, self)

    @property
    def nbytes(self) -> int:
        """Bytes of what the levels hold (differences, gradient sums, optimiser memory)."""
        return sum(t.numel() * t.element_size() for t in tree_leaves(self.levels) if isinstance(t, Tensor))


for _state in (LevelState, StreamState):
    register_dataclass(_state)


def waits(level: Level, chunk_size: int) -> bool:
    """Whether a level's gradients are summed over several chunks of the fastest level."""
    return level.chunk_size > chunk_size or level.surprise is not None


def begin_level(
    level: Level, modules: Sequence[FastLinear], batch: int, chunk_size: int, device: Any = None
) -> LevelState:
    """A level before its first update, differences of zero; `chunk_size` is the fastest level's.

    device: where they are kept if the weights are on "meta": offloaded, away from their layer until it is called.
    """
    sizes = shapes(level, modules)
    zeros = tuple(_zeros(m.weight, batch, size, device) for m, size in zip(modules, sizes, strict=True))
    each = zeros[0].new_zeros(batch)
    slow = waits(level, chunk_size)
    norms = tuple(each for _ in zeros) if slow and level.optimizer == "dgd" else ()
    sums = zeros if slow else ()
    return LevelState(
        zeros, sums, begin(level, list(zeros)), each, each, norms=norms, surprise=begin_surprise(level, each)
    )


def shapes(level: Level, modules: Sequence[FastLinear]) -> list[tuple[int, int]]:
    """Of the matrices that a level learns for one stream."""
    return [(m.out_features, m.in_features if level.rank is None else level.rank) for m in modules]


def blank_level(level: Level, sizes: Iterable[tuple[int, int, torch.dtype]], batch: int, chunk_size: int) -> LevelState:
    """A level over layers of these outputs, inputs and types, with tensors of no content (on "meta")."""
    with torch.device("meta"):
        layers = [torch.nn.Linear(i, o, bias=False, dtype=dtype) for o, i, dtype in sizes]
        return begin_level(level, layers, batch, chunk_size)


def level_bytes(level: Level, modules: Sequence[FastLinear], batch: int, chunk_size: int) -> int:
    """Bytes of a level's state, known before anything is allocated."""
    sizes = [(m.out_features, m.in_features, m.weight.dtype) for m in modules]
    return StreamState((blank_level(level, sizes, batch, chunk_size),), torch.empty(0), None, None).nbytes


def _zeros(weight: Tensor, batch: int, shape: tuple[int, int], device: Any) -> Tensor:
    """float32 or wider: a small step on a bf16 weight would be lost."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    device = weight.device if device is None or not weight.is_meta else device
    return torch.zeros(batch, *shape, dtype=dtype, device=device)

"""Several steps for one chunk: the gradients of its parts are taken at the same weights, and each gets a step.

Products of few rows are slow: a pass over the weights serves 128 tokens as well as 64. What a step is made of stays the
64: a step by the spectral rule over twice the tokens would have to be twice as long, and harms more (decision D33).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from nestling.cms.inner_optimizers import squares, update
from nestling.cms.state import LevelState
from nestling.schedule import Level


def part_of(level: Level) -> int:
    """Tokens that a level takes a step for, where that is not its whole chunk; else 0."""
    return level.chunk_size // level.steps if level.steps > 1 else 0


def shared_out(delta: Tensor, part: int, tokens: int) -> Tensor:
    """What a level has learned [B, o, r], once for each part of a chunk's tokens: [B parts, o, r]."""
    return delta.repeat_interleave(-(-tokens // part), 0) if part else delta


def in_steps(level: Level, state: LevelState, sums: list[Tensor], sizes: list[Tensor]) -> LevelState:
    """The level after a step for each part of a chunk of `state.count` tokens, one after the other.

    Args:
        sums: the gradients of each part's factors, [B parts, o, r].  sizes: of the weights, for rules relative to them.
            A last part of fewer tokens gets the share of a step.
    """
    size, deltas, slots, refused = part_of(level), list(state.deltas), state.slots, state.refused
    each = [g.unflatten(0, (state.written.shape[0], -1)) for g in sums]
    for at in range(each[0].shape[1]):
        tokens = min(size, state.count - at * size)
        step = level if tokens == size else level.part(tokens / size)
        count = torch.full_like(state.written, tokens)
        deltas, slots, written = update(step, deltas, [g[:, at] for g in each], slots, count, sizes=sizes)
        refused = refused + written.isnan()
    with torch.no_grad():
        moved = squares([a - b for a, b in zip(deltas, state.deltas, strict=True)]).sqrt()
        moved = torch.where(refused > state.refused, torch.nan, moved)
    return replace(
        state, deltas=tuple(deltas), slots=slots, written=moved, refused=refused, count=0, updates=state.updates + 1
    )


def check_steps(levels: Sequence[Level], fast: Sequence[int], read: int) -> None:
    """Raise ValueError if a level takes several steps in another chunk than the `read` tokens that run at once."""
    for n in fast:
        if levels[n].steps > 1 and levels[n].chunk_size != read:
            raise ValueError(
                f"level {n} takes {levels[n].steps} steps in a chunk of {levels[n].chunk_size} tokens, but {read} are "
                "read at once (by a faster level, or the context): give it one step, or make its chunk the shortest"
            )

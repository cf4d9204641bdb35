"""The levels that a model gets when none are named (decision D20)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from nestling.schedule import Level

RANK, CHUNK, RATE, FADE = 16, 64, 0.04, 0.01


def default_levels(config: Any) -> list[Level]:
    """One level over the MLPs of all blocks: rank 16, one spectral step every 64 tokens.

    A step changes 4 % of the weights' mean singular value along each of the 16 features, whatever the model's scale;
    a hundredth of what was learned fades with each, so the difference never grows beyond four of them. Nothing is
    remembered but the factor itself.

    Args:
        config: of a Hugging Face model; a narrow one gets a smaller rank.
    """
    sides = [getattr(config, name, None) for name in ("hidden_size", "intermediate_size")]
    rank = min([RANK, *(side for side in sides if side)])
    limit = getattr(config, "context_length", None)  # of a Hope: levels as slow as it do not learn in a context
    chunk = min(CHUNK, max(1, limit // 2)) if limit else CHUNK
    return [Level(chunk, lr=RATE, optimizer="spectral", rank=rank, decay=FADE)]


def fast_levels(config: Any) -> list[Level]:
    """The default in chunks of twice the tokens, two steps in each: faster, and learns a little less (decision D33).

    Raises:
        ValueError: a Hope whose context is too short for such chunks.
    """
    (level,), limit = default_levels(config), getattr(config, "context_length", None)
    if limit and limit <= 2 * CHUNK:
        raise ValueError(f"chunks of {2 * CHUNK} tokens are as long as the context this Hope was trained on, "
                         f"{limit}: take its default levels")  # fmt: skip
    return [replace(level, chunk_size=2 * CHUNK, steps=2)]


def default_blocks(config: Any) -> list[int] | None:
    """The decoder blocks that learn: None for all."""
    return None

"""The arguments of a forward that learns: each has its effect, or is refused by name before anything is read."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

SCORING = ("num_items_in_batch", "shift_labels", "ignore_index")  # of the loss
PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
NAMES = (
    "input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds", "labels", "use_cache",
    "logits_to_keep", "next_tokens", "output_hidden_states", "output_attentions", "return_dict", *SCORING, *PACKING,
)  # fmt: skip


def check_spelling(kwargs: Mapping[str, Any]) -> None:
    """Raise TypeError for an argument that looks like a misspelt one."""
    for name in kwargs:
        if name not in NAMES and (near := difflib.get_close_matches(name, NAMES, n=1, cutoff=0.8)):
            raise TypeError(f"the model has no argument {name!r}: did you mean {near[0]}?")


def check_options(config: Any, kwargs: dict[str, Any]) -> None:
    """Raise for what a call asks and reading with levels does not give."""
    check_spelling(kwargs)
    for name in ("output_hidden_states", "output_attentions"):
        if kwargs.get(name, getattr(config, name, False)):
            raise ValueError(
                f"{name} is not kept while levels learn: set model.learning = False for it, or leave it out"
            )
    for name, value in kwargs.items():
        if name not in NAMES:
            raise TypeError(f"the model has no argument {name!r} while levels learn")
        if name in PACKING and value is not None:
            raise ValueError(
                f"{name}: rows of several packed texts cannot be read with levels: give each a row of its own"
            )


def check_positions(positions: Tensor | None, shape: torch.Size, seen: int) -> None:
    """Raise unless positions go on from the `seen` tokens of the cache, one by one: a stream counts its own."""
    if positions is None:
        return
    if positions.dim() != 2 or positions.shape[-1] != shape[1] or positions.shape[0] not in (1, shape[0]):
        raise ValueError(f"position_ids must be [B, T] = {tuple(shape)}; got {tuple(positions.shape)}")
    if not bool((positions == torch.arange(seen, seen + shape[1], device=positions.device)).all()):
        raise ValueError(
            f"position_ids must count up by one along each row, from {seen} here, while levels learn (a stream counts "
            "its own tokens): give every text a row of its own instead of packing several into one"
        )


def tokens_read(cache: Any) -> int:
    """Tokens that a cache's streams have read."""
    return 0 if cache is None else cache.get_seq_length()


def check_mask(mask: Tensor | None, shape: torch.Size, seen: int) -> None:
    """Raise unless an attention mask is [B, T], or [B, seen + T]."""
    if mask is None:
        return
    batch, tokens = shape
    if mask.dim() != 2 or mask.shape[0] != batch or mask.shape[1] not in (tokens, seen + tokens):
        raise ValueError(
            f"attention_mask must be [B, T] = {(batch, tokens)}, or cover the cache too, {(batch, seen + tokens)}; "
            f"got {tuple(mask.shape)}"
        )

"""Checks of a model's inputs, each with an error that says what to do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nestling.cms.arguments import check_spelling


def check_names(kwargs: dict[str, Any]) -> None:
    """Raise TypeError for an argument that looks like a misspelt one (others are the library's, and passed over).

    Raises:
        TypeError: a misspelt argument.  ValueError: attention maps are asked for, which no layer keeps.
    """
    if kwargs.get("output_attentions"):
        raise ValueError("output_attentions is not available: the sequence layers keep no attention maps")
    check_spelling(kwargs)


def check_ids(ids: Tensor, vocab_size: int, name: str = "input_ids", ignore: int | None = None) -> None:
    """Raise unless `ids` is [B, T] of whole numbers below `vocab_size` (or equal to `ignore`).

    On a GPU the check of the values runs there and fails the kernel stream, so that no call waits for it.
    """
    if ids.dim() != 2 or ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype == torch.bool:
        raise ValueError(f"{name} must be whole numbers [B, T]; got {ids.dtype} {tuple(ids.shape)}")
    if not ids.numel() or ids.device.type == "meta" or torch.compiler.is_compiling():
        return
    wrong = (ids < 0) | (ids >= vocab_size)
    if ignore is not None:
        wrong &= ids != ignore
    if ids.device.type == "cpu":
        if wrong.any():
            raise ValueError(
                f"{name} has the id {int(ids[wrong][0])}, but the vocabulary has {vocab_size} tokens "
                f"(0..{vocab_size - 1}): use the tokenizer the model was made for"
            )
    else:
        torch._assert_async(~wrong.any(), f"{name} has an id outside the vocabulary of {vocab_size} tokens")


def padding_mask(attention_mask: Tensor | None, batch: int, tokens: int, seen: int) -> Tensor | None:
    """The part of an attention mask that lies over this call's tokens.

    Args:
        attention_mask: [B, T] or [B, seen + T], nonzero at real tokens, or None.

    Returns:
        [B, T] bool, or None where every token is real.
    """
    if attention_mask is None:
        return None
    if attention_mask.shape not in ((batch, tokens), (batch, seen + tokens)):
        raise ValueError(
            f"attention_mask must be [B, T] = {(batch, tokens)}, or cover the cache too, {(batch, seen + tokens)}; "
            f"got {tuple(attention_mask.shape)}"
        )
    mask = attention_mask[:, attention_mask.shape[1] - tokens :].bool()
    if torch.compiler.is_compiling():
        return mask
    return None if bool(mask.all()) else mask


def check_positions(position_ids: Tensor | None, mask: Tensor | None) -> None:
    """Raise if positions start again inside a row: several texts packed in one row would read each other's state."""
    if position_ids is None or position_ids.dim() != 2 or position_ids.shape[1] < 2 or torch.compiler.is_compiling():
        return
    ahead = position_ids[:, 1:] - position_ids[:, :-1] == 1
    if mask is not None:
        ahead = ahead | ~(mask[:, 1:] & mask[:, :-1])
    if not bool(ahead.all()):
        raise ValueError(
            "position_ids must count up by one along each row (the state counts positions itself): "
            "give every text a row of its own, padded, instead of packing several into one"
        )

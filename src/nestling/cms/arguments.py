"""The arguments of a forward: each has its effect, or is refused by name before anything is read."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nestling.cms.rows import PACKING
from nestling.utils.transforms import is_transformed

SCORING = ("num_items_in_batch", "shift_labels", "ignore_index")  # of the loss
NAMES = (
    "input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds", "labels", "use_cache",
    "logits_to_keep", "next_tokens", "output_hidden_states", "output_attentions", "return_dict", *SCORING, *PACKING,
)  # fmt: skip


def check_spelling(kwargs: Mapping[str, Any]) -> None:
    """Raise TypeError for an argument that looks like a misspelt one."""
    for name in kwargs:
        if name not in NAMES and (near := difflib.get_close_matches(name, NAMES, n=1, cutoff=0.8)):
            raise TypeError(f"the model has no argument {name!r}: did you mean {near[0]}?")


def check_names(kwargs: Mapping[str, Any]) -> None:
    """Raise TypeError for an argument that would have no effect: one that nobody knows, or that asks for nothing."""
    check_spelling(kwargs)
    for name, value in kwargs.items():
        if name not in NAMES and value is not None:
            raise TypeError(f"the model has no argument {name!r}")


def check_whole(model: nn.Module) -> None:
    """Raise ValueError where weights are sharded now (FSDP2): levels take gradients in the middle of a forward."""
    if not (dist.is_available() and dist.is_initialized()):
        return  # nobody else could hold a part
    if any(type(parameter).__name__ == "DTensor" for parameter in model.parameters()):
        raise ValueError(
            "weights are sharded (FSDP2) where levels learn, which need them whole: fully_shard the model alone and "
            "not its blocks, and read through its forward; or set model.learning = False"
        )


def check_options(config: Any, kwargs: Mapping[str, Any], has_maps: bool) -> bool:
    """Whether a call asks for attention maps; raises for what it asks and reading with levels does not give."""
    check_names(kwargs)
    asked = bool(kwargs.get("output_attentions", getattr(config, "output_attentions", False)))
    if asked and not has_maps:
        raise ValueError("output_attentions is not available: the sequence layers keep no attention maps")
    return asked


def check_ids(ids: Tensor, vocab_size: int, name: str = "input_ids", ignore: int | None = None) -> Tensor:
    """Ids [B, T] as int64; raises unless they are whole numbers below `vocab_size` (or equal to `ignore`).

    On a GPU the check of the values runs there and fails the kernel stream, so that no call waits for it.
    """
    if ids.dim() != 2 or ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype == torch.bool:
        raise ValueError(f"{name} must be whole numbers [B, T]; got {ids.dtype} {tuple(ids.shape)}")
    ids = ids.long()
    if not ids.numel() or ids.device.type == "meta" or is_transformed():
        return ids
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
    return ids


@torch.no_grad()
def ids_of(embeds: Tensor, table: nn.Module, vocab_size: int) -> Tensor:
    """The tokens [B, T] whose embeddings these are bit for bit, [B, T, D]; -1 where one is no token's."""
    rows = table(torch.arange(vocab_size, device=embeds.device))
    if embeds.dim() != 3 or embeds.shape[-1] != rows.shape[-1] or embeds.dtype != rows.dtype:
        raise ValueError(f"inputs_embeds must be {rows.dtype} [B, T, {rows.shape[-1]}]; "
                         f"got {embeds.dtype} {tuple(embeds.shape)}")  # fmt: skip
    keys, order = _digests(rows).sort()
    ids = order[torch.searchsorted(keys, _digests(embeds)).clamp(max=vocab_size - 1)]
    return torch.where((rows[ids] == embeds).all(-1), ids, -1)


def _digests(rows: Tensor) -> Tensor:
    """A whole number for each row [..., D]: the sum of its bits by odd factors, in wrapping arithmetic, so exact."""
    bits = rows.detach().contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[rows.dtype.itemsize])
    factors = torch.arange(1, 2 * rows.shape[-1], 2, device=rows.device) * -0x61C8864680B583EB
    return torch.stack([(part.long() * of).sum(-1) for part, of in zip(bits.split(64, -1), factors.split(64))]).sum(0)


def check_found(ids: Tensor, real: Tensor | None) -> Tensor:
    """The ids that `ids_of` found, 0 at padding; raises where a real one was not found."""
    missing = (ids < 0) if real is None else (ids < 0) & real
    if bool(missing.any()):
        row, column = missing.nonzero()[0].tolist()
        raise ValueError(f"inputs_embeds is no token's embedding in row {row}, column {column}: a level learns by "
                         "predicting tokens (set model.learning = False for other inputs)")  # fmt: skip
    return ids.clamp(min=0)


def scoring(
    labels: Tensor | None, kwargs: Mapping[str, Any], shape: Sequence[int], vocab_size: int
) -> dict[str, Any] | None:
    """The arguments of the loss among those of a call [B, T], checked; None where no loss is asked for."""
    given = {name: kwargs[name] for name in SCORING if kwargs.get(name) is not None}
    given |= {} if labels is None else {"labels": labels}
    for name in {"labels", "shift_labels"} & given.keys():
        if tuple(given[name].shape) != tuple(shape):
            raise ValueError(f"{name} must be [B, T] = {tuple(shape)}; got {tuple(given[name].shape)}")
        given[name] = check_ids(given[name], vocab_size, name, given.get("ignore_index", -100))
    if "labels" not in given and "shift_labels" not in given:
        return None
    return {"labels": given.get("shift_labels")} | given | {"vocab_size": vocab_size}

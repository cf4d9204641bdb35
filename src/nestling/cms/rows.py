"""What the rows of a call hold: real tokens, padding, and texts one after another.

Padding stands anywhere in a row; it writes nothing and takes no position. A row in which positions begin again at 0 is
packed: it holds several texts, and each after the first begins anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
HIDDEN = -1e4  # what is added to a score that must not count: this or less


class Rows(NamedTuple):
    """The tokens of a call.

    Attributes:
        real: [B, T] bool, False at padding.
        text: [B, T], the number of a token's text in its row, from 0: the one that goes on from the cache.
        packed: whether any row holds more than one.
    """

    real: Tensor
    text: Tensor
    packed: bool = False

    def texts(self) -> Texts:
        """The texts of all rows, one after another."""
        device = self.real.device
        each = self.text[:, -1] + 1  # of every row, also one of nothing but padding
        first = each.cumsum(0) - each
        rows = torch.arange(len(each), device=device).repeat_interleave(each)
        number = torch.arange(len(rows), device=device) - first[rows]
        places = self.real.flatten().nonzero()[:, 0]
        counts = (self.text + first[:, None]).flatten()[places].bincount(minlength=len(rows))
        return Texts(rows, number == 0, number + 1 == each[rows], counts, places)


class Texts(NamedTuple):
    """N texts: the row of each [N], whether it goes on from the cache and whether it is its row's last [N], its number
    of tokens [N], and where all those tokens stand among the B T columns of the call, text by text."""

    rows: Tensor
    first: Tensor
    last: Tensor
    counts: Tensor
    places: Tensor


def rows_of(
    shape: Sequence[int],
    mask: Tensor | None,
    positions: Tensor | None,
    packing: Mapping[str, Any],
    seen: int,
    read: Sequence[int] | None = None,
) -> Rows | None:
    """What the rows of a call [B, T] hold; None where every token is real and each row goes on with one text.

    Args:
        mask: see `real_tokens`.  seen: columns of the cache.
        packing: keyword arguments, of which those in PACKING count.
        positions: [B, T] or [1, T] of the real tokens: they go on by one, or begin a text anew at 0.
        read: real tokens that each row has read; None leaves positions unchecked, but for where they begin again.

    Raises:
        ValueError: the name of what does not fit, and how it should look.
    """
    real = real_tokens(mask, shape, seen)
    if torch.compiler.is_compiling():
        return _compiled(shape, real, positions, packing)
    anew = _marks(packing, shape)
    if positions is not None:
        _check_shape(positions, shape)
        whole = real is None and read is not None and len(set(read)) == 1
        if not (whole and _counts_up(positions, read[0])):
            everything = positions.new_ones(tuple(shape), dtype=torch.bool) if real is None else real
            again = _begun_again(positions.expand(*shape), everything, seen, read)
            if anew is not None and bool((again & ~anew.to(again.device)).any()):
                raise ValueError(f"position_ids begin again where {' and '.join(_given(packing))} begin no text")
            anew = again if anew is None else anew
    if anew is not None and not bool(anew.any()):
        anew = None
    if anew is not None:
        real = torch.ones_like(anew) if real is None else real
        return Rows(real, anew.long().cumsum(1).to(real.device), packed=True)
    return None if real is None else Rows(real, torch.zeros_like(real, dtype=torch.long))


def real_tokens(mask: Tensor | None, shape: Sequence[int], seen: int) -> Tensor | None:
    """Which tokens of a call are real, [B, T] bool; None where all are.

    Args:
        mask: [B, T], or [B, seen + T]: True or 1 at real tokens, False or 0 at padding; or, in floating point, what is
            added to scores: 0 at real tokens, HIDDEN or less at padding.
    """
    if mask is None:
        return None
    batch, tokens = shape
    if mask.dim() != 2:
        raise ValueError(
            f"attention_mask says which columns are padding, [B, T] = {(batch, tokens)}; got {tuple(mask.shape)}. "
            "Which token sees which is no choice here: each sees its own text so far"
        )
    columns = mask.shape[1]
    if mask.shape[0] != batch or (columns != tokens and columns != seen + tokens):  # `in` is no guard of a compiler
        raise ValueError(
            f"attention_mask must be [B, T] = {(batch, tokens)}, or cover the cache too, {(batch, seen + tokens)}; "
            f"got {tuple(mask.shape)}"
        )
    if torch.compiler.is_compiling():
        if mask.is_floating_point():
            raise ValueError("attention_mask must be boolean or of whole numbers in a compiled model")
        return mask[:, mask.shape[1] - tokens :] != 0
    if bool((mask == 1).all()):
        return None
    found = booleans(mask)[:, mask.shape[1] - tokens :]
    return None if bool(found.all()) else found


def booleans(mask: Tensor) -> Tensor:
    """An attention mask of any type (see `real_tokens`) as True at real tokens."""
    if mask.is_floating_point() and bool((mask <= 0).all()):
        if not bool((mask < 0).any()):
            raise ValueError(
                f"attention_mask is {mask.dtype} and holds nothing but zeros: all padding, or nothing added to scores? "
                "Give booleans or whole numbers, 1 at real tokens"
            )
        known, found = (mask == 0) | (mask <= HIDDEN), mask == 0
    else:
        known, found = (mask == 0) | (mask == 1), mask == 1
    if not bool(known.all()):
        raise ValueError(
            f"attention_mask holds {mask[~known][0].item()}: it is 1 at real tokens and 0 at padding or, added to "
            f"scores, 0 and at most {HIDDEN:g}"
        )
    return found


def text_positions(rows: Rows) -> Tensor:
    """Positions [B, T] that count every text from 0 (rows without padding)."""
    columns = torch.arange(rows.text.shape[1], device=rows.text.device).expand_as(rows.text)
    begins = F.pad(rows.text[:, 1:] != rows.text[:, :-1], (1, 0))
    return columns - torch.where(begins, columns, 0).cummax(1).values


def _compiled(
    shape: Sequence[int], real: Tensor | None, positions: Tensor | None, packing: Mapping[str, Any]
) -> Rows | None:
    """`rows_of` without a look at values: packed rows are refused when the graph runs."""
    if names := _given(packing):
        raise ValueError(f"{names[0]} says that rows are packed, which a compiled model cannot read")
    if positions is not None and positions.dim() == 2:
        everything = positions.new_ones(tuple(shape), dtype=torch.bool) if real is None else real
        again = _begun_again(positions.expand(*shape), everything, 0, None)
        torch._assert_async(~again.any(), "position_ids begin again in a row: a compiled model cannot read packed rows")
    return None if real is None else Rows(real, torch.zeros_like(real, dtype=torch.long))


def _check_shape(positions: Tensor, shape: Sequence[int]) -> None:
    if positions.dim() != 2 or positions.shape[-1] != shape[1] or positions.shape[0] not in (1, shape[0]):
        raise ValueError(f"position_ids must be [B, T] = {tuple(shape)}; got {tuple(positions.shape)}")


def _counts_up(positions: Tensor, start: int) -> bool:
    return bool((positions == torch.arange(start, start + positions.shape[1], device=positions.device)).all())


def _begun_again(positions: Tensor, real: Tensor, seen: int, read: Sequence[int] | None) -> Tensor:
    """[B, T] bool: real tokens at which positions begin again; ValueError where they neither do so nor go on."""
    columns = torch.arange(positions.shape[1], device=positions.device)
    real = real.to(positions.device)
    latest = torch.where(real, columns, -1).cummax(1).values
    before = F.pad(latest[:, :-1], (1, 0), value=-1)  # the real token in front of each column, -1 for none
    after = real & (before >= 0)
    again = after & (positions == 0)
    if read is None:
        return again
    ahead = after & (positions - positions.gather(1, before.clamp(min=0)) == 1)
    starts = real & (before < 0)
    # at the tokens of the row, or at the columns with their padding: models see differences alone
    own = torch.tensor(list(read), device=positions.device)[:, None]
    fine = ~real | again | ahead | (starts & ((positions == own) | (positions == seen + columns)))
    if not bool(fine.all()):
        row, column = (~fine).nonzero()[0].tolist()
        where = f"row {row} has {int(positions[row, column])} at column {column}"
        wanted = f"go on at {read[row]}" if bool(starts[row, column]) else "go on by one"
        raise ValueError(
            f"position_ids must {wanted}, or begin a text anew at 0 inside a row: {where} (a state counts its own "
            "tokens: leave position_ids out, pad a prompt on its left (generate counts on from its last column, also "
            "where that is padding), or give every text a row of its own)"
        )
    return again


def _given(packing: Mapping[str, Any]) -> list[str]:
    return [name for name in PACKING if packing.get(name) is not None]


def _marks(packing: Mapping[str, Any], shape: Sequence[int]) -> Tensor | None:
    """[B, T] bool: columns at which `packing` begins a text after the first."""
    names = _given(packing)
    if not names:
        return None
    found = []
    if (index := packing.get("seq_idx")) is not None:
        if tuple(index.shape) != tuple(shape):
            raise ValueError(f"seq_idx must be [B, T] = {tuple(shape)}; got {tuple(index.shape)}")
        found.append(F.pad(index[:, 1:] != index[:, :-1], (1, 0)))
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        if (ends := packing.get(name)) is not None:
            ends = torch.as_tensor(ends)
            sizes = ends.diff() if ends.dim() == 1 else ends
            if shape[0] != 1 or sizes.dim() != 1 or ends[0] != 0 or ends[-1] != shape[1] or bool((sizes < 0).any()):
                raise ValueError(
                    f"{name} must rise from 0 to the {shape[1]} tokens of one row; got {ends.tolist()} for {shape[0]}"
                )
            mark = torch.zeros(1, shape[1] + 1, dtype=torch.bool, device=ends.device)
            mark[0, ends[1:].long()] = True
            found.append(mark[:, :-1])
            most = name.replace("cu_seq_lens", "max_length")
            longest = packing.get(most)
            if longest is not None and int(longest) != int(sizes.max()):
                raise ValueError(
                    f"{most} is {int(longest)}, but the longest text of {name} has {int(sizes.max())} tokens"
                )
    if not found:
        raise ValueError(f"{names[0]} says how long the longest text is: cu_seq_lens_q must say where texts begin")
    if any(not torch.equal(found[0], other.to(found[0].device)) for other in found[1:]):
        raise ValueError(f"{' and '.join(names)} begin texts at different columns")
    return found[0]

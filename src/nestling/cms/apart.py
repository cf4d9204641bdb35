"""Rows of a batch that stand at different places of their streams: each is read without its padding, as if alone.

Streams at one place are read together as far as the shortest goes, up to a boundary; since a stream may be cut
anywhere, the rest of each follows by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nestling.cms.backbones import HiddenStates
from nestling.cms.cache import LevelsCache, Place
from nestling.cms.learner import Learner
from nestling.cms.rows import Rows


class Text(NamedTuple):
    """A text of a call: its row, its tokens' columns [n], and whether it is the row's last."""

    row: int
    columns: Tensor
    last: bool


class Group(NamedTuple):
    """Texts at one place, the cache of their streams, and how many tokens of each are read."""

    texts: list[Text]
    cache: LevelsCache
    at: int

    def of(self, chosen: Sequence[int]) -> Group:
        """These of its texts."""
        return Group([self.texts[i] for i in chosen], self.cache.taken(chosen), self.at)


def read_apart(
    learner: Learner,
    cache: LevelsCache,
    ids: Tensor,
    rows: Rows | None,
    keep: int = 0,
    next_tokens: Tensor | None = None,
    recompute: bool = False,
    kept: HiddenStates | None = None,
    embeds: Tensor | None = None,
) -> Tensor:
    """Read the next tokens of streams wherever each stands, and let the cache hold them as they are afterwards.

    A text that begins inside a row begins a stream of its own; the row goes on with its last.

    Args:
        ids: [B, T].  rows: what is in them, None: real tokens only.  Others as in `Learner.read`.

    Returns:
        Logits [B, T or keep, V], zeros at padding; hidden states go into `kept`, zeros there too.
    """
    batch, tokens = ids.shape
    rows = Rows(torch.ones_like(ids, dtype=torch.bool), torch.zeros_like(ids)) if rows is None else rows
    first, found, finished = tokens - keep if keep else 0, [], []
    hidden: list[list[tuple[Tensor, Tensor]]] = [[] for _ in kept or ()]
    groups = _groups(cache, rows, batch)
    while groups:
        group = groups.pop()
        counts = [len(text.columns) - group.at for text in group.texts]
        known = [text.last and next_tokens is not None for text in group.texts]  # whether the next token is
        count, state = min(counts), group.cache.levels
        if len(set(zip(counts, known))) > 1:
            place = 0 if state is None else state.position
            whole = count - 1 - (place + count - 1) % learner.chunk_size  # to a boundary in front of some token of each
            if whole <= 0:
                least = min(zip(counts, known))
                short = [i for i, pair in enumerate(zip(counts, known)) if pair == least]
                groups += [group.of([i for i in range(len(counts)) if i not in short]), group.of(short)]
                continue
            count = whole
        at, end = group.at, group.at + count
        if count:
            where = torch.tensor([text.row for text in group.texts], device=ids.device)[:, None]
            columns = torch.stack([text.columns[at:end] for text in group.texts])
            if end < len(group.texts[0].columns):
                target = ids[where, torch.stack([text.columns[end : end + 1] for text in group.texts])]
            else:
                target = next_tokens[where[:, 0]] if known[0] else None
            wanted = int((columns >= first).sum(1).max())
            parts = None if kept is None else HiddenStates(len(kept) - 1)
            logits, group.cache.layers, group.cache.levels = learner.read(
                ids[where, columns], group.cache.layers, state, keep and max(wanted, 1), target, recompute, parts,
                None if embeds is None else embeds[where, columns],
            )  # fmt: skip
            for own, part in zip(hidden, parts or ()):
                own.append((where * tokens + columns, torch.cat(part, 1)))
            if wanted:
                found.append(((where * tokens + columns)[:, -wanted:], logits[:, -wanted:]))
        (groups if end < max(counts) + at else finished).append(Group(group.texts, group.cache, end))
    ends = [group.of([i for i, text in enumerate(group.texts) if text.last]) for group in finished]
    cache.place(sorted(Place(tuple(t.row for t in end.texts), end.cache) for end in ends if end.texts))
    model = learner.backbone.model
    for block, own in zip(kept or (), hidden):
        block.append(_together(own, model.lm_head.weight.new_zeros(1, model.config.hidden_size), ids, 0))
    return _together(found, model.lm_head.weight.new_zeros(1, model.config.vocab_size), ids, first)


def _groups(cache: LevelsCache, rows: Rows, batch: int) -> list[Group]:
    """The texts that go on from the cache, by place, and those that begin anew."""
    texts, tokens = rows.texts(), rows.real.shape[1]
    columns = (texts.places % tokens).split(texts.counts.tolist())
    every = [Text(*text) for text in zip(texts.rows.tolist(), columns, texts.last.tolist())]
    going = dict(zip(texts.rows[texts.first].tolist(), (t for t, first in zip(every, texts.first.tolist()) if first)))
    groups = [Group([going[row] for row in rows], held.fork(), 0) for rows, held in cache.places(batch)]
    new = [text for text, first in zip(every, texts.first.tolist()) if not first]
    return groups + ([Group(new, cache.fresh(), 0)] if new else [])


def _together(found: list[tuple[Tensor, Tensor]], nothing: Tensor, ids: Tensor, first: int) -> Tensor:
    """What was found at its places, `nothing` [1, N] elsewhere: [B, T - first, N] in the type of what was found."""
    index = torch.zeros(ids.numel(), dtype=torch.long, device=ids.device)
    parts, at = [nothing.to(found[0][1].dtype) if found else nothing], 1
    for places, values in found:
        index[places.flatten()] = torch.arange(at, at + places.numel(), device=ids.device)
        parts.append(values.flatten(0, 1))
        at += places.numel()
    index = index.view_as(ids)[:, first:]
    return torch.cat(parts).index_select(0, index.flatten()).view(*index.shape, -1)

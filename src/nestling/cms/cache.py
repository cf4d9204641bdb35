"""The cache of a model with levels: the sequence layers' state, and what the levels learned."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from nestling.cms.state import StreamState


class Place(NamedTuple):
    """The streams of a batch that stand at one place: their rows, and a cache of theirs."""

    rows: tuple[int, ...]
    cache: LevelsCache


class LevelsCache(DynamicCache):
    """A cache that also carries what the streams' levels have learned.

    Tensors are replaced, never written into: forks and snapshots share all that has not changed since.

    Attributes:
        levels: of streams that stand at one place; None before anything is read, and where `parts` hold them.
        parts: of streams that stand at different places (padding), those of one place together; else empty.
        columns: read so far, padding included.
    """

    layers: list[Any]
    levels: StreamState | None = None
    parts: tuple[Place, ...] = ()
    columns: int = 0
    snapshots: dict[str, LevelsCache] | None = None  # oldest first

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns read, padding too, also those that attention has let go."""
        return self.columns or super().get_seq_length(layer_idx)

    @property
    def nbytes(self) -> int:
        """Bytes of what the levels hold; known in advance by `model.state_bytes`."""
        own = 0 if self.levels is None else self.levels.nbytes
        return own + sum(place.cache.nbytes for place in self.parts)

    @property
    def streams(self) -> int:
        """Rows of the batch, 0 before anything is read."""
        return sum(len(place.rows) for place in self.places())

    def places(self, batch: int = 0) -> tuple[Place, ...]:
        """The streams by where they stand; `batch` rows if nothing is read yet."""
        count = batch if self.levels is None else self.levels.tokens.shape[0]
        return self.parts or (Place(tuple(range(count)), self),)

    def tokens_read(self, batch: int) -> list[int]:
        """Real tokens of each of the `batch` rows."""
        read = {}
        for rows, cache in self.places(batch):
            state = cache.levels
            read |= dict.fromkeys(rows, 0 if state is None else state.position + state.dropped)
        return [read[row] for row in range(batch)]

    def place(self, parts: Iterable[tuple[tuple[int, ...], LevelsCache]]) -> None:
        """Take over these streams (rows, and the cache of theirs) in place of those held."""
        self.parts = tuple(Place(*part) for part in parts)
        self.levels = None
        first = self.parts[0].cache
        if len(self.parts) == 1 and list(self.parts[0].rows) == list(range(len(self.parts[0].rows))):
            self.layers, self.levels, self.parts = first.layers, first.levels, ()
        else:
            self.layers = first.fresh().layers

    def advance(self, columns: int) -> None:
        """Count columns that were read."""
        self.columns += columns
        for _, cache in self.parts:
            cache.columns = self.columns

    def fresh(self) -> LevelsCache:
        """An empty cache with layers of the same kinds."""
        other = self.fork()
        other.reset()
        return other

    def taken(self, streams: Sequence[int]) -> LevelsCache:
        """A cache of these of the streams, in this order."""
        other = self.fork()
        if list(streams) != list(range(self.streams)):
            other.batch_select_indices(torch.tensor(list(streams), dtype=torch.long))
        return other

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Give each beam the state and levels of the beam it continues."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these streams."""
        self.snapshots = None  # of other streams than those now in the cache
        if self.parts:
            chosen = torch.arange(self.streams)[indices.cpu()].tolist()
            held = [([n for n, i in enumerate(chosen) if i in rows], rows, cache) for rows, cache in self.parts]
            return self.place(
                Place(tuple(new), cache.taken([rows.index(chosen[n]) for n in new])) for new, rows, cache in held if new
            )
        super().batch_select_indices(indices)
        if self.levels is not None:
            self.levels = self.levels.map(lambda t: t[indices.to(t.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each stream."""
        if self.parts:
            return self.batch_select_indices(torch.arange(self.streams).repeat_interleave(repeats))
        self.snapshots = None
        super().batch_repeat_interleave(repeats)
        if self.levels is not None:
            self.levels = self.levels.map(lambda t: t.repeat_interleave(repeats, 0))

    def reset(self, levels: Iterable[int] | None = None) -> None:
        """Forget everything; or only what these levels learned (0 is the fastest): they begin anew.

        Raises:
            ValueError: no such level, or one that learns nothing in the context.
        """
        if levels is None:
            super().reset()
            self.levels, self.parts, self.columns, self.snapshots = None, (), 0, None
            return
        chosen = list(levels)
        for _, cache in self.places():
            if (state := cache.levels) is None:
                continue
            count = len(state.levels)
            if wrong := [i for i in chosen if not 0 <= i < count]:
                raise ValueError(f"levels names level {wrong[0]}, but the cache has {count} (0 is the fastest)")
            kept = tuple(None if i in chosen else s for i, s in enumerate(state.levels))
            cache.levels = replace(state, levels=kept)

    def forget_context(self) -> None:
        """Let the sequence layers begin anew, as in front of an unrelated text; what the levels learned stays.

        The open chunk is dropped with them: its tokens were read, but are not learned from. Boundaries go on.
        """
        super().reset()
        for _, cache in self.parts:
            cache.forget_context()
        if (state := self.levels) is not None:
            size = state.tokens.shape[1]  # the next token opens a chunk
            self.levels = replace(state, tokens=state.tokens[:, :0], hidden=None, start=None,
                                  position=state.position - size, dropped=state.dropped + size)  # fmt: skip

    def crop(self, max_length: int) -> None:
        """What was learned cannot be unlearned token by token: only a crop that changes nothing is possible."""
        if max_length < 0 or max_length < self.get_seq_length():
            raise ValueError("a cache with levels cannot be cropped: fork it or take a snapshot before those tokens")

    def fork(self) -> LevelsCache:
        """A copy that goes its own way; tensors are shared, since none is ever written into."""
        other = copy.copy(self)
        other.layers = [copy.copy(layer) for layer in self.layers]
        other.parts = tuple(Place(rows, cache.fork()) for rows, cache in self.parts)
        other.snapshots = dict(self.snapshots) if self.snapshots else None
        return other

    def snapshot(self, name: str) -> None:
        """Keep this moment under a name, to go back to; a later one of the same name takes its place."""
        kept = self.fork()
        kept.snapshots = None
        self.snapshots = {k: v for k, v in (self.snapshots or {}).items() if k != name} | {name: kept}

    def rollback(self, to: str | int = 1) -> None:
        """Go back to a snapshot by its name, or to the n-th last (1: the newest); later snapshots are dropped.

        Raises:
            ValueError: no such snapshot.
        """
        names = list(self.snapshots or {})
        if isinstance(to, int) and not isinstance(to, bool):
            if not 1 <= to <= len(names):
                raise ValueError(f"rollback({to}) goes back further than there are snapshots ({len(names)})")
            to = names[-to]
        if to not in names:
            raise ValueError(f"there is no snapshot {to!r}; there are: {', '.join(map(repr, names)) or 'none'}")
        kept = self.snapshots[to].fork()
        self.layers, self.levels, self.parts, self.columns = kept.layers, kept.levels, kept.parts, kept.columns
        self.snapshots = {name: self.snapshots[name] for name in names[: names.index(to) + 1]}

    def recall(self, name: str | None) -> None:
        """Go on from here with what the levels had learned at a snapshot, None: with nothing learned.

        The context, the place in the stream and all snapshots stay. An open chunk is learned by the levels it is
        closed with: `model.finish` it before.

        Raises:
            ValueError: no such snapshot, or one of other streams.
        """
        if name is not None and name not in (self.snapshots or {}):
            names = ", ".join(map(repr, self.snapshots or ())) or "none"
            raise ValueError(f"there is no snapshot {name!r}; there are: {names}")
        kept = None if name is None else self.snapshots[name]
        if self.parts or (kept is not None and (kept.parts or kept.streams not in (0, self.streams))):
            raise ValueError("recall goes from streams at one place to the same streams at one place")
        if self.levels is None:  # nothing read yet, so no snapshot holds anything
            return
        then = (None,) * len(self.levels.levels) if kept is None or kept.levels is None else kept.levels.levels
        levels = zip(self.levels.levels, then, strict=True)
        self.levels = replace(self.levels, levels=tuple(now and now.recalled(old) for now, old in levels))


def fill(cache: DynamicCache, blocks: int) -> None:
    """Give an empty cache its layers."""
    while len(cache.layers) < blocks:
        cache.layers.append(DynamicLayer())


def check_plain(cache: object) -> None:
    """Raise ValueError for a cache whose levels would be passed over by a call that neither learns nor applies them."""
    if isinstance(cache, LevelsCache) and cache.streams:
        raise ValueError(
            "past_key_values holds what levels learned, which this call would pass over: `with model.adapted(cache)` "
            "applies it, and takes a cache of its own; past_key_values=None begins without"
        )

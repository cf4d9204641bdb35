"""The cache of a model with levels: the sequence layers' state, and what the levels learned."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from nestling.cms.state import StreamState


class LevelsCache(DynamicCache):
    """A cache that also carries what the streams' levels have learned (`levels`).

    Tensors are replaced, never written into: forks and snapshots share all that has not changed since.
    """

    levels: StreamState | None = None
    snapshots: dict[str, LevelsCache] | None = None  # oldest first

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens read, also those that attention has let go."""
        return super().get_seq_length(layer_idx) if self.levels is None else self.levels.position

    @property
    def nbytes(self) -> int:
        """Bytes of what the levels hold; known in advance by `model.state_bytes`."""
        return 0 if self.levels is None else self.levels.nbytes

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Give each beam the state and levels of the beam it continues."""
        super().reorder_cache(beam_idx)
        self._change(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these streams."""
        super().batch_select_indices(indices)
        self._change(lambda t: t.index_select(0, indices.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each stream."""
        super().batch_repeat_interleave(repeats)
        self._change(lambda t: t.repeat_interleave(repeats, 0))

    def reset(self, levels: Iterable[int] | None = None) -> None:
        """Forget everything; or only what these levels learned (0 is the fastest): they begin anew.

        Raises:
            ValueError: no such level, or one that learns nothing in the context.
        """
        if levels is None:
            super().reset()
            self.levels = self.snapshots = None
            return
        chosen = list(levels)
        if self.levels is None:
            return
        count = len(self.levels.levels)
        if wrong := [i for i in chosen if not 0 <= i < count]:
            raise ValueError(f"levels names level {wrong[0]}, but the cache has {count} (0 is the fastest)")
        kept = tuple(None if i in chosen else s for i, s in enumerate(self.levels.levels))
        self.levels = replace(self.levels, levels=kept)

    def forget_context(self) -> None:
        """Let the sequence layers begin anew, as in front of an unrelated text; what the levels learned stays.

        The open chunk is dropped with them: its tokens were read, but are not learned from. Boundaries go on.
        """
        super().reset()
        if self.levels is not None:
            size = self.levels.tokens.shape[1]
            position = self.levels.position - size  # the next token opens a chunk
            self.levels = replace(self.levels, tokens=self.levels.tokens[:, :0], hidden=None, start=None,
                                  position=position)  # fmt: skip

    def crop(self, max_length: int) -> None:
        """What was learned cannot be unlearned token by token: only a crop that changes nothing is possible."""
        if max_length < 0 or max_length < self.get_seq_length():
            raise ValueError("a cache with levels cannot be cropped: fork it or take a snapshot before those tokens")

    def fork(self) -> LevelsCache:
        """A copy that goes its own way; tensors are shared, since none is ever written into."""
        other = copy.copy(self)
        other.layers = [copy.copy(layer) for layer in self.layers]
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
        self.layers, self.levels = kept.layers, kept.levels
        self.snapshots = {name: self.snapshots[name] for name in names[: names.index(to) + 1]}

    def _change(self, change) -> None:
        self.snapshots = None  # of other streams than those now in the cache
        if self.levels is not None:
            self.levels = self.levels.map(change)


def fill(cache: DynamicCache, blocks: int) -> None:
    """Give an empty cache its layers."""
    while len(cache.layers) < blocks:
        cache.layers.append(DynamicLayer())

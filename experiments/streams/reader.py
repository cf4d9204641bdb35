"""Streams read in step by one model, with levels or without."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from experiments.shared.continual.streams import adapted, learner
from experiments.shared.continual.study import LearnerContender
from experiments.streams.remedies import Consolidation, Replay, nats
from nestling.cms.defaults import default_blocks, default_levels
from nestling.sessions.snapshots import FIRST

PIECE = 512  # tokens of one call
FISHER = 256  # tokens of a passage by which it is estimated what matters


def put(cache: Any, deltas: Iterable[Tensor]) -> None:
    """Let the one level in a cache have learned these differences."""
    state = cache.levels
    cache.levels = replace(state, levels=(replace(state.levels[0], deltas=tuple(deltas)),))


def with_deltas(cache: Any, deltas: Iterable[Tensor]) -> Any:
    """A copy of a cache with these differences."""
    cache = cache.fork()
    put(cache, deltas)
    return cache


class Slow:
    """A slow level over the layers of the fast one: an average of it, to which it fades in place of to nothing.

    With S the slow difference and B = S + F what the layers use, B <- B - fade (B - S) - step, and every `every` tokens
    S <- S + share (B - S): elastic averaging (NL Eq. 71 on the difference B - S).
    """

    def __init__(self, every: int, share: float, fade: float) -> None:
        self.every, self.share, self.fade = every, share, fade
        self.held: list[Tensor] = []

    def follow(self, cache: Any) -> None:
        """After one chunk of the fast level, which has faded to nothing: fade to S, and move S where it is due."""
        state = cache.levels
        used = [*state.levels[0].deltas]
        held = self.held or [torch.zeros_like(d) for d in used]
        used = torch._foreach_add(used, held, alpha=self.fade)
        if state.position % self.every == 0:
            held = torch._foreach_lerp(held, used, self.share)
        self.held = [*held]
        put(cache, used)

    def begin(self, cache: Any) -> None:
        """The fast level begins anew: S alone is used."""
        put(cache, self.held)

    @property
    def nbytes(self) -> int:
        """Of what it holds."""
        return sum(t.nbytes for t in self.held)


class Snapshots:
    """What the level of each stream had learned at the end of every text; a stream goes on with what predicts best.

    It is the choice of `nestling learn --snapshots`, of each stream for itself: nothing learned (without the advantage
    that it has there), or one of them, by the loss of the first tokens of a text in a fresh context.
    """

    def __init__(self) -> None:
        self.held: list[tuple[Tensor, ...]] = []  # of each text, then of the layers, [B, o, r]
        self.due = False  # whether a text has begun of which FIRST tokens were not read yet

    def keep(self, cache: Any) -> None:
        """A text has ended."""
        self.held.append(cache.levels.levels[0].deltas)
        self.due = True

    def losses(self, reader: Reader, rows: Tensor) -> Tensor:
        """Nats of rows [B, n] by every candidate in a fresh context, nothing learned first: [candidates, B, n]."""
        return torch.stack([reader.losses(rows, with_deltas(reader.cache, held)) for held in self._candidates()])

    def best(self, reader: Reader, rows: Tensor) -> tuple[Any, Tensor]:
        """The cache in which every stream's level is what predicts its row of the first tokens [B, n] best, and the
        losses of these [candidates, B, n]."""
        lost = self.losses(reader, rows)
        chosen, streams = lost.sum(2).argmin(0), torch.arange(len(rows))
        deltas = tuple(torch.stack(layer)[chosen, streams] for layer in zip(*self._candidates(), strict=True))
        return with_deltas(reader.cache, deltas), lost

    def recall(self, reader: Reader, rows: Tensor) -> None:
        """Go on with what is best for the first tokens of a text."""
        reader.cache, _ = self.best(reader, rows)
        self.due = False

    def _candidates(self) -> list[tuple[Tensor, ...]]:
        return [tuple(torch.zeros_like(d) for d in self.held[0]), *self.held]

    @property
    def nbytes(self) -> int:
        """Of what it holds."""
        return sum(t.nbytes for held in self.held for t in held)


class Reader:
    """Reads B streams a piece at a time; `context` tokens after which attention begins anew, `start` opens a text.

    Options: slow, share, sessions (a `Slow` level), snapshots, replay (tokens read again for each new one), ewc, fisher
    (strength and passages of a `Consolidation`).
    """

    def __init__(self, plain: nn.Module, contender: LearnerContender, context: int, start: int = 0) -> None:
        self.cache: Any = None
        self.slow: Slow | None = None
        self.snapshots = Snapshots() if contender.options.get("snapshots") else None
        self.replay = Replay() if contender.options.get("replay") else None
        self.held: Consolidation | None = None
        self.start, self.context = start, context
        self.options, self.piece, self.learns = contender.options, context, contender.method == "levels"
        if not self.learns:
            self.model = plain
            return
        default = default_levels(plain.config)[0].to_dict()
        levels = [default | level for level in contender.levels or [{}]]
        stack = {"context": context, "blocks": default_blocks(plain.config)} | contender.stack
        self.model = learner(plain, replace(contender, levels=levels, stack=stack))
        self.piece = min(PIECE, context)
        if "slow" in self.options:
            self.piece = levels[0]["chunk_size"]
            self.slow = Slow(self.options["slow"], self.options["share"], levels[0]["decay"])
        if "ewc" in self.options:
            self.piece, o = levels[0]["chunk_size"], self.options
            self.held = Consolidation(o["ewc"], o["fisher"], min(FISHER, context))

    @torch.no_grad()
    def read(self, row: Tensor) -> Tensor:
        """The loss of each token in nats [B, n] of row [B, n + 1], whose first token comes before them."""
        if self.held is not None:
            self.held.keep(row[:, 1:])
        if self.replay is not None:
            return torch.cat([self._again(row[:, at : at + self.context + 1])
                              for at in range(0, row.shape[1] - 1, self.context)], 1)  # fmt: skip
        if self.snapshots is not None and self.snapshots.due:  # the first tokens count as the levels stand
            head = self._read(row[:, : FIRST + 1])
            self.snapshots.recall(self, row[:, 1 : FIRST + 1])
            return torch.cat([head, self._read(row[:, FIRST:])], 1)
        return self._read(row)

    def _again(self, row: Tensor) -> Tensor:
        """Read a context's tokens, and as many of what was read before, `replay` times."""
        lost = self._read(row)
        self.replay.keep(row if not self.replay.rows else row[:, 1:])
        for _ in range(self.options["replay"]):
            self._read(self.replay.passage(row.shape[1] - 1))
        return lost

    def _read(self, row: Tensor) -> Tensor:
        losses = []
        for at in range(0, row.shape[1] - 1, self.piece):
            part = row[:, at : at + self.piece + 1]
            if self.learns:
                out = self.model(
                    part[:, :-1], past_key_values=self.cache, use_cache=True, next_tokens=part[:, 1:][:, -1:]
                )
                self.cache = out.past_key_values
                if self.slow is not None:
                    self.slow.follow(self.cache)
                if self.held is not None:
                    put(self.cache, self.held.pulled(self.cache.levels.levels[0].deltas))
            else:
                out = self.model(part[:, :-1], use_cache=False)
            losses.append(nats(out.logits, part[:, 1:]))
        return torch.cat(losses, 1)

    def end_part(self) -> None:
        """A text has ended: with sessions, the fast level begins anew."""
        if self.slow is not None and self.options.get("sessions"):
            self.slow.begin(self.cache)
        if self.held is not None:
            self.held.consolidate(self.model, self.cache.levels.levels[0].deltas)
        if self.snapshots is not None:
            self.snapshots.keep(self.cache)

    @torch.no_grad()
    def known(self, rows: Tensor) -> Tensor:
        """Nats [B, n] of rows in a fresh context, by what the streams have learned.

        Of snapshots the one that predicts the first tokens best answers the others; the first are answered by nothing
        learned, as the choice would otherwise see what it is asked.
        """
        if self.snapshots is None or not self.snapshots.held:
            return self.losses(rows, self.cache)
        best, first = self.snapshots.best(self, rows[:, :FIRST])
        return torch.cat([first[0], self.losses(rows, best)[:, FIRST:]], 1)

    @torch.no_grad()
    def losses(self, rows: Tensor, cache: Any) -> Tensor:
        """Nats [B, n] of rows in a fresh context, by what is in a cache; None: by no levels."""
        begun = torch.cat([torch.full_like(rows[:, :1], self.start), rows], 1)
        with adapted(self.model, cache) as model:
            return nats(model(begun[:, :-1], use_cache=False).logits, begun[:, 1:])

    @property
    def nbytes(self) -> int:
        """Of what is remembered of all streams, the context apart."""
        parts = (self.cache, self.slow, self.snapshots, self.replay, self.held)
        return sum(part.nbytes for part in parts if part is not None)

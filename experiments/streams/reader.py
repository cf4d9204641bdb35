"""Streams read in step by one model, with levels or without."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.shared.continual.streams import adapted, learner
from experiments.shared.continual.study import LearnerContender
from nestling.cms.defaults import default_blocks, default_levels

PIECE = 512  # tokens of one call


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
        self._put(cache, used)

    def begin(self, cache: Any) -> None:
        """The fast level begins anew: S alone is used."""
        self._put(cache, self.held)

    def _put(self, cache: Any, used: Any) -> None:
        state = cache.levels
        cache.levels = replace(state, levels=(replace(state.levels[0], deltas=tuple(used)),))

    @property
    def nbytes(self) -> int:
        """Of what it holds."""
        return sum(t.nbytes for t in self.held)


class Reader:
    """Reads B streams a piece at a time; `context` tokens after which attention begins anew."""

    def __init__(self, plain: nn.Module, contender: LearnerContender, context: int) -> None:
        self.cache: Any = None
        self.slow: Slow | None = None
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

    @torch.no_grad()
    def read(self, row: Tensor) -> Tensor:
        """The loss of each token in nats [B, n] of row [B, n + 1], whose first token comes before them."""
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
            else:
                out = self.model(part[:, :-1], use_cache=False)
            losses.append(nats(out.logits, part[:, 1:]))
        return torch.cat(losses, 1)

    def end_part(self) -> None:
        """A text has ended: with sessions, the fast level begins anew."""
        if self.slow is not None and self.options.get("sessions"):
            self.slow.begin(self.cache)

    @contextmanager
    def known(self) -> Iterator[nn.Module]:
        """Inside, the model answers row b by what stream b has learned, in a fresh context."""
        with adapted(self.model, self.cache) as model:
            yield model

    @property
    def nbytes(self) -> int:
        """Of what is remembered of all streams, the context apart."""
        return (0 if self.cache is None else self.cache.nbytes) + (0 if self.slow is None else self.slow.nbytes)


def nats(logits: Tensor, targets: Tensor) -> Tensor:
    """The loss of each target [B, n]."""
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none").view(targets.shape)

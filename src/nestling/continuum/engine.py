"""Reading a stream with levels that learn from it (NL Eq. 71 on the task loss, decisions D10-D12).

A stream is run chunk by chunk of the fastest level. Behind each chunk the gradient of its next-token losses is taken at
the weights it was read with and added to every level's sum; a level whose own chunk ends there steps with the mean. The
target of a chunk's last position is the first token of what follows: a chunk whose last target is not there yet stays
open in the state, so cutting a stream anywhere gives the same result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache

from nestling.continuum.inner import begin, update
from nestling.continuum.state import LevelState, Snapshot, StreamState, begin_level
from nestling.continuum.weights import FastLinear, applied, frozen
from nestling.levels.schedule import Level

VARIANTS = ("sequential", "nested")
META_GRADS = ("full", "first_order")

Forward = Callable[[Tensor, DynamicCache], Tensor]  # tokens [B, n] and the cache, which goes on -> logits [B, n, V]


@dataclass
class Learner:
    """Levels over the linear layers of a model.

    Attributes:
        levels: fastest first.  modules: the layers of each level.
        variant: "sequential", or "nested": behind each update of a level all faster ones begin anew (decision D12).
        meta_grad: how an outer loss is differentiated through the updates, "full" or "first_order" (decision D9).
    """

    levels: tuple[Level, ...]
    modules: tuple[tuple[FastLinear, ...], ...]
    variant: str = "sequential"
    meta_grad: str = "first_order"

    @property
    def fast(self) -> list[int]:
        """The levels that learn from the stream."""
        return [i for i, level in enumerate(self.levels) if level.chunk_size is not None and not level.frozen]

    @property
    def chunk_size(self) -> int:
        """Tokens between two boundaries."""
        return self.levels[self.fast[0]].chunk_size

    def start(self, tokens: Tensor) -> StreamState:
        """The state of streams of which nothing is read yet."""
        return StreamState((None,) * len(self.levels), tokens[:, :0], None)

    def read(
        self, model: nn.Module, forward: Forward, ids: Tensor, cache: DynamicCache, state: StreamState | None
    ) -> tuple[Tensor, StreamState]:
        """Logits [B, T, V] of the next T tokens and the state behind them; `cache` goes on in place."""
        state = self.start(ids) if state is None else state
        size, outer, at, logits = self.chunk_size, torch.is_grad_enabled(), 0, []
        while at < ids.shape[1]:
            if state.tokens.shape[1] == size:  # complete at last: here is the target of its last position
                past = state.start.restore(cache)
                _, state = self._learn(model, forward, state.tokens, ids[:, at : at + 1], past, state, outer)
                state = replace(state, tokens=ids[:, :0], start=None)
            count = min(size - state.tokens.shape[1], ids.shape[1] - at)
            piece, at = ids[:, at : at + count], at + count
            if count == size and at < ids.shape[1]:
                out, state = self._learn(model, forward, piece, ids[:, at : at + 1], cache, state, outer)
            else:
                opened = Snapshot.of(cache) if state.start is None else state.start
                with applied(*self._weights(state)):
                    out = forward(piece, cache)
                state = replace(state, tokens=torch.cat([state.tokens, piece], 1), start=opened)
            state = replace(state, position=state.position + count)
            logits.append(out)
        return torch.cat(logits, 1), state

    def _weights(self, state: StreamState) -> tuple[list[FastLinear], list[Tensor | None]]:
        modules = [m for i in self.fast for m in self.modules[i]]
        deltas: list[Tensor | None] = []
        for i in self.fast:
            level = state.levels[i]
            never = level is None or level.updates == 0
            deltas += [None] * len(self.modules[i]) if never else level.deltas
        return modules, deltas

    def _learn(self, model, forward, tokens, target, cache, state, outer) -> tuple[Tensor, StreamState]:
        """Run a whole chunk whose last target is there, and update the levels whose chunk ends with it."""
        graph = outer and self.meta_grad == "full"
        batch = tokens.shape[0]
        levels = [
            state.levels[i] or begin_level(self.levels[i], self.modules[i], batch, n == 0)
            for n, i in enumerate(self.fast)
        ]
        with torch.enable_grad(), _recorded(model, outer):
            used = [d if graph and d.requires_grad else d.detach().requires_grad_() for s in levels for d in s.deltas]
            with applied([m for i in self.fast for m in self.modules[i]], used), _attention(graph):
                logits = forward(tokens, cache)
            targets = torch.cat([tokens[:, 1:], target], 1)
            exact = logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32))
            loss = F.cross_entropy(exact, targets.flatten(), reduction="sum")
            grads = torch.autograd.grad(loss, used, create_graph=graph, retain_graph=outer)
            found, position = list(grads), state.position if state.tokens.shape[1] else state.position + tokens.shape[1]
            new: list[LevelState] = []
            for i, old in zip(self.fast, levels, strict=True):
                own, found = found[: len(old.deltas)], found[len(old.deltas) :]
                sums = tuple(a + g for a, g in zip(old.sums, own, strict=True)) if old.sums else tuple(own)
                new.append(self._step(i, replace(old, sums=sums, count=old.count + tokens.shape[1]), position))
            new = self._nest(new, position)
        if not outer:
            logits = logits.detach()
            for layer in cache.layers:
                layer.keys, layer.values = layer.keys.detach(), layer.values.detach()
        if not graph:
            new = [_detached(s) for s in new]
        every = list(state.levels)
        for i, s in zip(self.fast, new, strict=True):
            every[i] = s
        return logits, replace(state, levels=tuple(every))

    def _step(self, index: int, state: LevelState, position: int) -> LevelState:
        level = self.levels[index]
        if position % level.chunk_size:
            return state
        mean = [s / state.count for s in state.sums]
        deltas, slots, written = update(level, list(state.deltas), mean, state.slots)
        waits = level.chunk_size > self.chunk_size
        zeros = tuple(torch.zeros_like(s) for s in state.sums) if waits else ()
        return LevelState(tuple(deltas), zeros, slots, written, 0, state.updates + 1)

    def _nest(self, states: list[LevelState], position: int) -> list[LevelState]:
        """With the nested variant, levels faster than one that was just updated go back to their initial state."""
        if self.variant != "nested":
            return states
        due = [n for n, i in enumerate(self.fast) if position % self.levels[i].chunk_size == 0]
        fresh = list(states)
        for n in range(max(due, default=0)):
            zeros = tuple(torch.zeros_like(d) for d in states[n].deltas)
            fresh[n] = replace(states[n], deltas=zeros, slots=begin(self.levels[self.fast[n]], list(zeros)))
        return fresh


def _recorded(model: nn.Module, outer: bool):
    """Without an outer loss only what depends on fast weights is recorded for the gradient."""
    return torch.enable_grad() if outer else frozen(model)


def _attention(graph: bool):
    """Attention whose gradient can be differentiated again, where that is wanted."""
    return sdpa_kernel(SDPBackend.MATH) if graph else nullcontext()


def _detached(state: LevelState) -> LevelState:
    def cut(tensors):
        return tuple(t.detach() for t in tensors)

    slots = {name: [t.detach() for t in tensors] for name, tensors in state.slots.items()}
    return replace(state, deltas=cut(state.deltas), sums=cut(state.sums), slots=slots)


def plan(levels: Sequence[Level], blocks: int) -> list[list[int]]:
    """Which of `blocks` decoder blocks each level takes (placement "depth"): equal shares, the fastest level last."""
    share, rest = divmod(blocks, len(levels))
    sizes = [share + (n >= len(levels) - rest) for n in range(len(levels))]  # slowest first
    found, begin_at = [], 0
    for size in sizes:
        found.append(list(range(begin_at, begin_at + size)))
        begin_at += size
    return found[::-1]

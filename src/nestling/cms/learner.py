"""Reading a stream with levels that learn from it (NL Eq. 71 on the task loss, decisions D10-D12).

A stream is run chunk by chunk of the fastest level. After each chunk the gradient of its next-token losses is taken at
the weights it was read with and added to every level's sum; a level whose own chunk ends there steps with the mean. The
target of a chunk's last position is the first token of what follows: a chunk whose last target is not there yet stays
open in the state, so cutting a stream anywhere gives the same result. The blocks below all levels do not depend on what
is learned: they run over many chunks at once.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import islice
from threading import Lock

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from nestling.cms.anchor import Anchor, anchored
from nestling.cms.backbones import Backbone, HiddenStates, Layers
from nestling.cms.fast_linear import Delta, Factors, FastLinear, Seen, applied, features
from nestling.cms.inner_optimizers import begin, known_size, per_stream, squares, update
from nestling.cms.recompute import filled, recomputed
from nestling.cms.state import LevelState, StreamState, begin_level, waits
from nestling.cms.steps import check_steps, in_steps, part_of, shared_out
from nestling.cms.surprise import is_due
from nestling.schedule import Level
from nestling.utils.offload import brought

VARIANTS = ("sequential", "nested", "independent")
META_GRADS = ("full", "first_order", "none")
PIECE = 512  # tokens that the blocks below all levels run at once


@dataclass
class Learner:
    """Levels over the linear layers of a model.

    Attributes:
        levels: fastest first.  modules: the layers of each level.  backbone: the model in parts.
        first: the first decoder block that holds one of them.
        variant: "nested": after each update of a level all faster ones begin anew (decision D12). "sequential" and
            "independent" differ in the model's forward only.
        meta_grad: how an outer loss is differentiated (decision D9): "full", through the updates; "first_order", at
            the adapted weights; "none", the levels' initial states get no gradient at all.
        context: tokens after which the sequence layers begin anew, None for never.
        context_length: levels whose chunk is as long do not learn inside a context (decision D10).
        anchor: texts that reading leaves as they were (`nestling.cms.anchor`); without an outer loss only.
    """

    levels: tuple[Level, ...]
    modules: tuple[tuple[FastLinear, ...], ...]
    backbone: Backbone = field(repr=False)
    first: int = 0
    variant: str = "sequential"
    meta_grad: str = "first_order"
    context: int | None = None
    context_length: int | float = float("inf")
    anchor: Anchor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for n, (level, modules) in enumerate(zip(self.levels, self.modules)):
            for m in modules if level.rank else ():
                if level.rank > min(m.weight.shape):
                    raise ValueError(f"rank {level.rank} of level {n} is more than a layer of {m.out_features} x "
                                     f"{m.in_features} has: give it a smaller rank, or None")  # fmt: skip
        check_steps(self.levels, self.fast, self.chunk_size if self.fast else 0)

    @property
    def fast(self) -> list[int]:
        """The levels that learn from the stream: those in front of any that the outer loop trains at every step."""
        found = []
        for i, level in enumerate(self.levels):
            if level.chunk_size is None:
                break
            if not level.frozen and level.chunk_size < self.context_length:
                found.append(i)
        return found

    @property
    def chunk_size(self) -> int:
        """Tokens that run at once and give one gradient: the fastest level's chunk, or a shorter context."""
        size = self.levels[self.fast[0]].chunk_size
        return min(size, self.context) if self.context else size

    def start(self, tokens: Tensor) -> StreamState:
        """The state of streams of which nothing is read yet."""
        return StreamState((None,) * len(self.levels), tokens[:, :0], None, None)

    def read(
        self,
        ids: Tensor,
        layers: Layers,
        state: StreamState | None,
        keep: int = 0,
        next_tokens: Tensor | None = None,
        recompute: bool = False,
        kept: HiddenStates | None = None,
        embeds: Tensor | None = None,
    ) -> tuple[Tensor, Layers, StreamState]:
        """Read the next T tokens.

        Args:
            ids: [B, T].  layers: the cache's, of all blocks; they stay as they are.  keep: last logits wanted, 0: all.
            next_tokens: [B, 1], the token after `ids` if it is known: a whole chunk that ends here is learned at once.
            recompute: for an outer loss keep only the states between pieces of PIECE tokens, and compute each piece
                again in the backward pass (decision D9).
            kept: gets the hidden states of each token as it was read, a list for each block and one for the last norm;
                nothing is recomputed then.
            embeds: [B, T, D], the embeddings of `ids` where a caller has them.

        Returns:
            Logits [B, T or keep, V], the cache layers and the state after the tokens.
        """
        state = self.start(ids) if state is None else state
        if kept is not None or not (recompute and torch.is_grad_enabled()):
            return self._read(ids, layers, state, keep, next_tokens, kept, embeds)
        logits, at = [], 0
        parameters = [p for p in self.backbone.model.parameters() if p.requires_grad]
        while at < ids.shape[1]:
            stop = at + self._piece(state.position)
            target = ids[:, stop : stop + 1] if stop < ids.shape[1] else next_tokens
            own = None if embeds is None else embeds[:, at:stop]
            values = (ids[:, at:stop], [vars(layer) for layer in layers], state, target, own)
            out, kept, state = recomputed(functools.partial(self._again, layers), values, parameters)
            layers = [filled(layer, mine) for layer, mine in zip(layers, kept, strict=True)]
            logits.append(out)
            at = stop
        return torch.cat(logits, 1)[:, -keep:], layers, state

    def _again(self, like: Layers, values: tuple) -> tuple:
        """`_read` from values to values; `like` are cache layers of the right kinds."""
        ids, kept, state, next_tokens, embeds = values
        layers = [filled(layer, mine) for layer, mine in zip(like, kept, strict=True)]
        logits, layers, state = self._read(ids, layers, state, 0, next_tokens, None, embeds)
        return logits, [vars(layer) for layer in layers], state

    def _read(
        self, ids: Tensor, layers: Layers, state: StreamState, keep: int, next_tokens: Tensor | None,
        kept: HiddenStates | None = None, embeds: Tensor | None = None,
    ) -> tuple[Tensor, Layers, StreamState]:  # fmt: skip
        layers = [copy.copy(layer) for layer in layers]
        size, outer, at, logits = self.chunk_size, torch.is_grad_enabled(), 0, []
        ahead = None  # what the lower blocks made of the tokens that come next
        while at < ids.shape[1]:
            if state.tokens.shape[1] == size:  # complete at last: here is the target of its last position
                tail = self.restored(layers, state.start)
                _, _, state = self.learn(state.hidden, state.tokens, ids[:, at : at + 1], tail, state, outer)
                state = replace(state, tokens=ids[:, :0], hidden=None, start=None)
            if ahead is None:
                if self.context and state.position and state.position % self.context == 0:
                    layers = [self.backbone.restored(layer, None) for layer in layers]
                below = slice(at, at + self._piece(state.position))
                own = None if embeds is None else embeds[:, below]
                ahead = self._below(self.backbone.embed(ids[:, below], own), layers, kept)
            count = min(size - state.tokens.shape[1], ahead.shape[1])
            piece, hidden = ids[:, at : at + count], ahead[:, :count]
            ahead, at = (ahead[:, count:] if ahead.shape[1] > count else None), at + count
            target = ids[:, at : at + 1] if at < ids.shape[1] else next_tokens
            if count == size and target is not None:
                moved = replace(state, position=state.position + count)
                out, layers, state = self.learn(hidden, piece, target, layers, moved, outer, kept)
            else:
                start = self._marks(layers) if state.start is None else state.start
                with applied(*self.adapted(state), fixed=outer and self.meta_grad == "none"):
                    out = self.above(hidden, layers, kept)
                whole = hidden if state.hidden is None else torch.cat([state.hidden, hidden], 1)
                tokens = torch.cat([state.tokens, piece], 1)
                state = replace(state, tokens=tokens, hidden=whole, start=start, position=state.position + count)
            logits.append(out)
            while keep and sum(x.shape[1] for x in logits[1:]) >= keep:
                logits.pop(0)
        return torch.cat(logits, 1), layers, state

    def adapted(self, state: StreamState | None) -> tuple[list[FastLinear], list[Delta | None]]:
        """The layers of the levels that learn, and what each has learned, None for nothing yet."""
        modules = [m for i in self.fast for m in self.modules[i]]
        deltas: list[Delta | None] = []
        for i in self.fast:
            level = None if state is None else state.levels[i]
            never = level is None or level.updates == 0
            deltas += [None] * len(self.modules[i]) if never else self.differences(i, level.deltas)
        return modules, deltas

    def differences(self, index: int, learned: Sequence[Tensor], part: int = 0) -> list[Delta]:
        """What the matrices that a level learned add to its layers' weights: themselves, or B A; of each `part`."""
        rank = self.levels[index].rank
        if rank is None:
            return list(learned)
        sizes = [m.in_features for m in self.modules[index]]
        return [
            Factors(b, features(rank, size, n, b.dtype, b.device), part)
            for n, (b, size) in enumerate(zip(learned, sizes))
        ]

    def _piece(self, position: int) -> int:
        """Tokens to run below at once: whole chunks, up to where the sequence layers begin anew."""
        piece = max(1, PIECE // self.chunk_size) * self.chunk_size - position % self.chunk_size
        return min(piece, self.context - position % self.context) if self.context else piece

    def _below(self, first: Tensor, layers: Layers, kept: HiddenStates | None) -> Tensor:
        hidden = self.backbone.run(first, layers, 0, self.first, kept)
        if kept is not None:
            kept[0].append(first)
            if self.first:
                kept[self.first].append(hidden)
        return hidden

    def above(self, hidden: Tensor, layers: Layers, kept: HiddenStates | None = None) -> Tensor:
        with self._unrounded(hidden.device.type):
            hidden = self.backbone.run(hidden, layers, self.first, self.backbone.blocks, kept)
            return self.backbone.head(hidden, kept)

    def _unrounded(self, device: str) -> AbstractContextManager:
        """No autocast where levels learn: updates, and their derivative even more, enlarge what it rounds away.

        Weights of several types may need it: they keep it.
        """
        if not torch.is_autocast_enabled(device):
            return nullcontext()
        weights = (p for p in self.backbone.model.parameters() if p.is_floating_point())
        wide = all(p.dtype.itemsize >= 4 for p in weights)
        return torch.autocast(device, enabled=False) if wide else nullcontext()

    def _marks(self, layers: Layers) -> tuple:
        return tuple(self.backbone.mark(layer) for layer in layers[self.first :])

    def restored(self, layers: Layers, marks: tuple) -> Layers:
        """Cache layers with those of the blocks that learn as they were at their marks."""
        above = layers[self.first :]
        return layers[: self.first] + [self.backbone.restored(x, m) for x, m in zip(above, marks, strict=True)]

    def learn(
        self, hidden: Tensor, tokens: Tensor, target: Tensor, layers: Layers, state: StreamState, outer: bool,
        kept: HiddenStates | None = None,
    ) -> tuple[Tensor, Layers, StreamState]:  # fmt: skip
        """Run a whole chunk whose last target is there, and update the levels whose chunk ends with it.

        `state.position` is already after the chunk.
        """
        graph = outer and self.meta_grad == "full"
        levels = [
            state.levels[i]
            or begin_level(self.levels[i], self.modules[i], tokens.shape[0], self.chunk_size, tokens.device)
            for i in self.fast
        ]
        modules = [m for i in self.fast for m in self.modules[i]]
        size = [part_of(self.levels[i]) for i in self.fast]
        watched = any(self.levels[i].optimizer == "dgd" for i in self.fast)
        with torch.enable_grad():  # without an outer loss too: for the gradients of the fast weights alone
            # each chunk sees weights of its own: the gradient must not go back through what earlier chunks left behind
            held = [shared_out(d, n, tokens.shape[1]) for s, n in zip(levels, size) for d in s.deltas]
            used = [d.view_as(d) if graph and d.requires_grad else d.detach().requires_grad_() for d in held]
            fixed, parts = outer and self.meta_grad == "none", iter(used)
            deltas = [
                d
                for i, n in zip(self.fast, size)
                for d in self.differences(i, [*islice(parts, len(self.modules[i]))], n)
            ]
            with applied(modules, deltas, fixed=fixed, watched=watched) as call, _attention(graph):
                logits = self.above(hidden, layers, kept)
                seen = [call.seen.get(m) for m in modules]
            targets = torch.cat([tokens[:, 1:], target], 1)
            exact = logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32))
            losses = F.cross_entropy(exact, targets.flatten(), reduction="none").view(targets.shape)
            with torch.autocast(tokens.device.type, enabled=False):  # a backward pass has the types of its forward
                grads = torch.autograd.grad(losses.sum(), used, create_graph=graph, retain_graph=outer)
            if self.anchor is not None and not outer and any(s.updates for s in levels):
                at = state.position // self.chunk_size
                grads = anchored(self.anchor, self, grads, used, deltas, layers, at, tokens.shape[1])
        with torch.autocast(tokens.device.type, enabled=False), nullcontext() if graph else torch.no_grad():
            new, at = [], 0
            for i, old in zip(self.fast, levels, strict=True):
                own = slice(at, at + len(old.deltas))
                added = self._add(self.levels[i], old, list(grads[own]), seen[own], tokens.shape[1])
                new.append(self._step(i, *added, losses.mean(1), state.position))
                at = own.stop
            new = self._nest(new, state.position)
        if not outer:
            logits = logits.detach()
            if kept is not None:
                kept.detach_last()
            for layer in layers[self.first :]:
                self.backbone.detach(layer)
        if not graph:
            new = [s.map(lambda t: t.detach() if t.requires_grad else t) for s in new]
        every = list(state.levels)
        for i, s in zip(self.fast, new, strict=True):
            every[i] = s
        return logits, layers, replace(state, levels=tuple(every))

    def _add(
        self, level: Level, state: LevelState, grads: list[Tensor], seen: list[Seen | None], count: int
    ) -> tuple[LevelState, list[Tensor], list[Tensor]]:
        """Add a chunk's gradients to a level's; returns the sums of gradients and of |x|^2 too."""
        norms: list[Tensor] = []
        if level.optimizer == "dgd":
            grads = [g + level.erase * s.products for g, s in zip(grads, seen, strict=True)]
            norms = [s.norms for s in seen]
        if not waits(level, self.chunk_size):
            return replace(state, count=count), grads, norms
        refused, fine = state.refused, squares(grads).isfinite()
        if not bool(fine.all()):  # one bad chunk does not spoil the rest of a longer one
            grads = [torch.where(per_stream(fine), g, torch.zeros_like(g)) for g in grads]
            norms = [torch.where(fine, n, torch.zeros_like(n)) for n in norms]
            refused = refused + ~fine
        grads = [a + g for a, g in zip(state.sums, grads, strict=True)]
        norms = [a + n for a, n in zip(state.norms, norms, strict=True)]
        surprise = state.surprise
        if surprise is not None:
            surprise = surprise._replace(tokens=surprise.tokens + count)
        state = replace(state, sums=tuple(grads), norms=tuple(norms), refused=refused, count=state.count + count,
                        surprise=surprise)  # fmt: skip
        return state, grads, norms

    def _step(
        self, index: int, state: LevelState, sums: list[Tensor], norms: list[Tensor], loss: Tensor, position: int
    ) -> LevelState:
        """Update a level at its boundary, with the mean of what its chunk has summed up."""
        level, surprise, due = self.levels[index], state.surprise, None
        if position % level.chunk_size:
            return state
        if level.steps > 1:
            return in_steps(level, state, sums, self._sizes(index))
        if surprise is None and state.count < level.chunk_size:
            level = level.part(state.count / level.chunk_size)
        count = state.written.new_full(state.written.shape, state.count)
        if surprise is not None:
            count, size = surprise.tokens, squares(sums).sqrt() / surprise.tokens
            due, surprise = is_due(level, surprise, size if level.signal == "gradient" else loss)
        deltas, slots, written = update(
            level, list(state.deltas), sums, state.slots, count, norms, due, self._sizes(index)
        )

        def left(kept: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            """What stays in a sum: nothing, but for streams that did not step."""
            if due is None:
                return tuple(torch.zeros_like(t) for t in kept)
            return tuple(torch.where(due.view(-1, *[1] * (t.dim() - 1)), torch.zeros_like(t), t) for t in kept)

        return LevelState(
            tuple(deltas), left(state.sums), slots, written, state.refused + written.isnan(), 0, state.updates + 1,
            left(state.norms), surprise,
        )  # fmt: skip

    def _sizes(self, index: int) -> list[Tensor]:
        """Of the weights of a level's layers, for rules whose step is relative to them."""
        if self.levels[index].optimizer != "spectral":
            return []
        modules = self.modules[index]
        with brought(nn.ModuleList(modules)):
            return [known_size(m.weight) for m in modules]

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


_BEFORE: AbstractContextManager = nullcontext()
_TWICE, _LOCK = 0, Lock()  # threads whose attention must be differentiated twice


@contextmanager
def _attention(graph: bool) -> Iterator[None]:
    """Attention whose gradient can be differentiated again, where that is wanted.

    torch keeps the choice of kernel for the whole process: the first thread sets it and the last one puts it back.
    Others run the same kernel meanwhile, with the same values, but slower.
    """
    global _TWICE, _BEFORE
    if not graph:
        yield
        return
    with _LOCK:
        if not _TWICE:
            _BEFORE = sdpa_kernel(SDPBackend.MATH)
            _BEFORE.__enter__()
        _TWICE += 1
    try:
        yield
    finally:
        with _LOCK:
            _TWICE -= 1
            if not _TWICE:
                _BEFORE.__exit__(None, None, None)

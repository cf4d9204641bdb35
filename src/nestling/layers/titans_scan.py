"""The memories of a self-modifying Titans layer over one call: segment by segment, written to and read."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nestling.layers.segments import Segment, segments
from nestling.layers.titans_config import TitansConfig
from nestling.layers.titans_groups import Gates, MemoryGroup, Numbers, gates_of, groups_of, projected
from nestling.layers.titans_state import state_dtype
from nestling.memory.fused import fused_advance, is_fused
from nestling.memory.linear_chunks import advance_chunks, goes_by_chunks
from nestling.memory.rule import Anchor, Context, FastWeights, TokenFigures, advance, close_chunk, forward
from nestling.ops import compiled
from nestling.ops.chunk import decay_table

Observer = Callable[[TokenFigures, FastWeights, Gates], None]  # told of every segment of the main memory
PIECES = 8  # of `segment_size`: small ones stay in a CPU's caches, where chunks are taken at once each costs launches
Memories = tuple[FastWeights, ...]  # one for each group, [n, B, H, o, i]


@dataclass(frozen=True)
class MemoryScan:
    """One call of a layer.

    Attributes:
        numbers: of the layer.
        anchors: what the weights of every group decay towards.
        observe: called with the main memory's figures and weights after each segment, and the gates.
    """

    config: TitansConfig
    numbers: Numbers
    anchors: Sequence[Anchor]
    observe: Observer | None = None

    def run(
        self, features: dict[str, Tensor], memories: Memories, positions: list[int], lengths: list[int]
    ) -> tuple[Tensor, Memories]:
        """Reads [B, H, T, p] and the memories after the call.

        Args:
            features: static projections of the tokens, those of `feature_names`: [B, H, T, p] or [B, H, T].
            positions, lengths: tokens that each sequence has seen, and has here, from the front.
        """
        if max(lengths) == 0:  # nothing but padding
            read = features["q" if "q" in features else "x"]
            return torch.zeros_like(read), memories
        plan = segments(positions, lengths, [g.chunk_size for g in groups_of(self.config)])
        longest, size = max(lengths), self.config.segment_size
        recompute = size and torch.is_grad_enabled() and longest > size and self.observe is None
        whole = self.by_chunks and not compiled.is_available(*memories[-1].now)
        pieces = _pieces(plan, size if whole else max(1, size // PIECES)) if recompute else [plan]
        outputs = []
        for piece in pieces:
            if recompute:
                y, memories = checkpoint(
                    self.piece, piece, memories, features, use_reentrant=False, preserve_rng_state=False
                )  # fmt: skip
            else:
                y, memories = self.piece(piece, memories, features)
            outputs.append(y)
        missing = next(iter(features.values())).shape[2] - longest
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2)
        return (F.pad(y, (0, 0, 0, missing)) if missing else y), memories

    def piece(self, plan: list[Segment], memories: Memories, features: dict[str, Tensor]) -> tuple[Tensor, Memories]:
        """Some segments in a row."""
        reads = []
        # split at once: a slice's gradient would fill the whole length for every segment
        runs = _runs(plan, self.config.main_chunk_size) if self.by_chunks else [[s] for s in plan]
        sizes, begin, end = [run[-1].stop - run[0].start for run in runs], plan[0].start, plan[-1].stop
        whole = {name: f[:, :, begin:end] for name, f in features.items()}
        parts = {name: f.split(sizes, 2) for name, f in whole.items()}
        gates: list[Gates | None] = [None] * len(runs)
        if not self.config.adaptive:  # all gates at once: of a chunk they are a dozen small operations
            known = gates_of(self.config, whole, self.numbers)
            gates = [
                Gates(*cut) for cut in zip(*([None] * len(runs) if g is None else g.split(sizes, 2) for g in known))
            ]
        for i, run in enumerate(runs):
            part = {name: pieces[i] for name, pieces in parts.items()}
            step = self.chunks if len(run) > 1 else partial(self.segment, run[0])
            y, memories = step(memories, part, gates[i])
            reads.append(y)
        return torch.cat(reads, 2), memories

    @cached_property
    def by_chunks(self) -> bool:
        """Whether a chunk is an affine map of a matrix, see `ops.chunks`."""
        config, main = self.config, groups_of(self.config)[-1]
        plain = not (config.adaptive or config.momentum or self.anchors[-1] or self.observe)
        return plain and config.read != "chunk" and goes_by_chunks(main.architecture, config.rule)

    def chunks(self, memories: Memories, part: dict[str, Tensor], gates: Gates) -> tuple[Tensor, Memories]:
        """`segment` for whole chunks in a row, where `by_chunks`."""
        config, (fast,) = self.config, memories
        context = Context(part["k"], part["v"], gates.eta, gates.alpha, None, None, gates.erase)
        new, y = advance_chunks(
            config.rule, fast, context, chunk_size=config.main_chunk_size, queries=part["q"],
            after=config.read == "after", limit=_limit(config, fast.now[0]),
        )  # fmt: skip
        return y, (new,)

    def segment(
        self, segment: Segment, memories: Memories, part: dict[str, Tensor], gates: Gates | None = None
    ) -> tuple[Tensor, Memories]:
        """Project with the chunk's first weights, write to every memory, read the main one; no gates: they learn."""
        part = projected(self.config, part, memories)
        gates = gates_of(self.config, part, self.numbers) if gates is None else gates
        decays = decay_table(gates.alpha, gates.mu)
        context = Context(part["k"], part["v"], gates.eta, gates.alpha, gates.mu, decays)
        q, updated, y = part["q"], [], None
        for i, (group, fast) in enumerate(zip(groups_of(self.config), memories, strict=True)):
            main = group.names[-1] == "memory"
            running = main and self.config.read != "chunk"
            if main and not running:
                y = forward(group.architecture, tuple(w[-1] for w in fast.start), q)
            if main:
                own = context._replace(erase=gates.erase, first_rate=_factor(self.numbers.log_first_rate))
            else:
                factor = _factor(self.numbers.log_projection_rate)
                own = context if factor is None else context._replace(rate=gates.eta * factor)
            new, reads, figures = self.advance(
                group, fast, own, segment.fresh[i], q if running else None, self.anchors[i]
            )
            y = reads if running else y
            updated.append(self.close(new, fast, segment, i))
            if self.observe is not None and main:
                self.observe(figures, new, gates)
        return y, tuple(updated)

    def advance(
        self, group: MemoryGroup, fast: FastWeights, context: Context, fresh: bool, q: Tensor | None, anchor: Anchor
    ) -> tuple[FastWeights, Tensor | None, TokenFigures | None]:
        """Write one segment, by the hand-differentiated step where it applies."""
        own = context.erase is not None or context.first_rate is not None  # what the hand-written steps do not know
        rule = self.config.rule if own else self.config.projection_rule
        reading = dict(queries=q, after=self.config.read == "after", anchor=anchor)
        if fresh and not own and self.observe is None and is_fused(group.architecture, rule):
            return fused_advance(group.architecture, rule, fast, context, **reading)
        return advance(group.architecture, rule, fast, context, fresh=fresh, **reading)

    def close(self, new: FastWeights, old: FastWeights, segment: Segment, i: int) -> FastWeights:
        """Open the next chunk where this one is complete; keep the state of sequences that have ended."""
        device = new.now[0].device
        if segment.active is not None:
            on = segment.active.to(device).view(1, -1, 1, 1, 1)
            now = tuple(torch.where(on, a, b) for a, b in zip(new.now, old.now, strict=True))
            velocity = tuple(torch.where(on, a, b) for a, b in zip(new.velocity, old.velocity, strict=True))
            new = FastWeights(new.start, now, velocity)
        return closed(self.config, new, segment.closes[i])


def closed(config: TitansConfig, fast: FastWeights, closes: bool | Tensor) -> FastWeights:
    """Memories [n, B, ...] after a token that completes the chunk: of all sequences, of none, or of those in [B]."""
    if closes is False:
        return fast
    limits = tuple(_limit(config, w) for w in fast.now)
    rows = None if closes is True else closes.to(fast.now[0].device)
    return close_chunk(fast, rows, limits, config.rule.meta_grad)


def _runs(plan: list[Segment], size: int) -> list[list[Segment]]:
    """The segments, those in a row together that are whole chunks of every sequence."""
    found: list[list[Segment]] = []
    before = False
    for segment in plan:
        whole = segment.stop - segment.start == size and segment.active is None and segment.closes[0] is True
        if whole and before:
            found[-1].append(segment)
        else:
            found.append([segment])
        before = whole
    return found


def _limit(config: TitansConfig, weight: Tensor) -> float:
    """The bound on a weight's norm at a chunk's end."""
    return config.norm_limit * math.sqrt(weight.shape[-2] * weight.shape[-1])


def _pieces(plan: list[Segment], size: int) -> list[list[Segment]]:
    """MemoryGroup segments into pieces of about `size` tokens."""
    pieces, begin = [], None
    for segment in plan:
        if begin is None or segment.stop - begin > size:
            pieces.append([])
            begin = segment.start
        pieces[-1].append(segment)
    return pieces


def _factor(logarithm: Tensor | None) -> Tensor | None:
    """A factor on the rates of every head, [H, 1]; None is 1."""
    return None if logarithm is None else state_dtype(logarithm).exp()[:, None]


def swap(memories: tuple[FastWeights, ...]) -> tuple[FastWeights, ...]:
    """Between the state's layout [B, n, H, ...] and the scan's [n, B, H, ...], by views."""
    return tuple(FastWeights(*(tuple(w.transpose(0, 1) for w in part) for part in fast)) for fast in memories)

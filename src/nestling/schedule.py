"""Levels by token count, and the schedule that says which level is updated when (NL Sec. 7)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any

OPTIMIZERS = ("gd", "momentum", "adamw", "dgd", "m3", "spectral")
SIGNALS = ("gradient", "loss")


@dataclass(frozen=True)
class Level:
    """One memory level of a continuum memory: how often it is updated, and by which rule.

    Args:
        chunk_size: tokens between two updates, counted in the stream. An int; `math.inf` freezes the level; None ties
            it to the outer loop: it is trained at every outer step like any other weight (a Transformer's MLP).
        lr: step size of the updates inside a context; 0 freezes the level. A slow level's outer step takes the outer
            optimiser's learning rate.
        optimizer: the rule of the updates inside a context, on the mean next-token loss of the level's chunk: "gd",
            plain gradient descent, "momentum", "adamw", "dgd" (Delta Gradient Descent), "m3" or "spectral".
            "spectral" is steepest descent under the spectral norm, Muon without its momentum: the gradient with all its
            singular values made 1, times lr, times the root mean square of the singular values of the layer's weights.
            So lr is the part of the weights that a step changes, on every model, and nothing is remembered.
        momentum: of the optimiser's average of gradients (not for "gd", "dgd" and "spectral").
        clip: largest norm of a stream's gradient at an update, None for any.
        decay: part of what was learned in the context that each update forgets, in [0, 1].
        erase: "dgd" only: how much of what was learned in the context is erased along the inputs of the chunk.
        surprise: None updates at every boundary. A share in (0, 1) makes the level adaptive: it updates at about that
            share of its boundaries, those at which it is most surprised, and at the latest after 4 / surprise of them.
        rank: None learns a dense difference of each layer. A number keeps it as two factors, D = B A: A has that many
            orthonormal rows, drawn once and the same for every stream, and B, zero at first, is learned. A step of "gd"
            or "dgd" is the dense one, projected on these rows.
        signal: what surprise is measured by, against its running mean: the norm of the "gradient" since the last
            update, or the "loss" of the chunk.
        steps: parts of a chunk, of equal length, each of which gets a step of its own. The gradients of all of them are
            taken at once, at the weights of the chunk's start, so a chunk of 128 tokens in two steps costs less than
            two chunks of 64 and learns a little less. Of the fastest level, with a rank.

    Raises:
        ValueError, TypeError: a field outside its range or of another type.
    """

    chunk_size: int | float | None = None
    lr: float = 1e-2
    optimizer: str = "gd"
    momentum: float = 0.9
    clip: float | None = None
    decay: float = 0.0
    erase: float = 1.0
    surprise: float | None = None
    signal: str = "gradient"
    rank: int | None = None
    steps: int = 1

    def __post_init__(self) -> None:
        size = self.chunk_size
        if isinstance(size, float) and size.is_integer():
            object.__setattr__(self, "chunk_size", size := int(size))
        if size is not None and (isinstance(size, bool) or not (isinstance(size, int) or size == math.inf)):
            raise TypeError(f"chunk_size must be a whole number of tokens, math.inf or None; got {size!r}")
        if size is not None and size < 1:
            raise ValueError(f"chunk_size must be at least 1 token; got {size}")
        if isinstance(self.lr, bool) or not isinstance(self.lr, (int, float)):
            raise TypeError(f"lr must be a number; got {self.lr!r}")
        if not 0 <= self.lr < math.inf:
            raise ValueError(f"lr must be finite and not negative (0 freezes the level); got {self.lr}")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}; got {self.optimizer!r}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must lie in [0, 1); got {self.momentum}")
        if self.clip is not None and not 0 < self.clip < math.inf:
            raise ValueError(f"clip must be a positive norm, or None for none; got {self.clip}")
        if not 0 <= self.decay <= 1:
            raise ValueError(f"decay must lie in [0, 1]; got {self.decay}")
        if not 0 <= self.erase < math.inf:
            raise ValueError(f"erase must be finite and not negative; got {self.erase}")
        if self.surprise is not None and not 0 < self.surprise < 1:
            raise ValueError(f"surprise is a share of the boundaries in (0, 1), or None for all; got {self.surprise}")
        if self.rank is not None and (isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1):
            raise ValueError(f"rank must be a positive whole number, or None for a dense difference; got {self.rank!r}")
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"steps must be a positive whole number of steps for each chunk; got {self.steps!r}")
        if self.steps > 1:
            self._check_steps()
        if self.signal not in SIGNALS:
            raise ValueError(f"signal must be one of {', '.join(SIGNALS)}; got {self.signal!r}")

    def _check_steps(self) -> None:
        asked, size = f"steps={self.steps}", self.chunk_size
        if not isinstance(size, int) or size % self.steps:
            raise ValueError(f"{asked} must divide the chunk into equal parts, but chunk_size is {size}")
        if self.rank is None:
            raise ValueError(f"{asked} keeps a gradient for each step: give the level a rank, or one step")
        if self.optimizer == "dgd" or self.surprise is not None:
            other = "optimizer='dgd'" if self.optimizer == "dgd" else f"surprise={self.surprise}"
            raise ValueError(f"{asked} does not go with {other}, which looks at a chunk as a whole: give it one step")

    def __repr__(self) -> str:  # one step, the usual, goes without saying: results are filed by what a rule is called
        shown = [f for f in fields(self) if f.name != "steps" or self.steps > 1]
        return f"Level({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in shown)})"

    @property
    def frozen(self) -> bool:
        """Whether no update ever changes the level."""
        return self.lr == 0 or self.chunk_size == math.inf

    def part(self, share: float) -> Level:
        """The level whose step is this share of its own: of a chunk that holds fewer tokens."""
        return replace(self, lr=share * self.lr, decay=share * self.decay)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON types (an infinite chunk size becomes "inf")."""
        fields_ = {f.name: getattr(self, f.name) for f in fields(self)}
        return {**fields_, "chunk_size": "inf" if self.chunk_size == math.inf else self.chunk_size}

    @classmethod
    def from_dict(cls, values: Level | dict[str, Any]) -> Level:
        """The level described by `to_dict` (a Level is returned as it is)."""
        if isinstance(values, cls):
            return values
        if not isinstance(values, dict):
            raise TypeError(f"a level is a Level or a dict of its fields; got {values!r}")
        known = [f.name for f in fields(cls)]
        if unknown := [name for name in values if name not in known]:
            raise ValueError(f"a level has no field {', '.join(map(repr, unknown))}; its fields are {', '.join(known)}")
        values = dict(values)
        if values.get("chunk_size") == "inf":
            values["chunk_size"] = math.inf
        return cls(**values)


def check_order(levels: Iterable[Level | dict[str, Any]]) -> tuple[Level, ...]:
    """The levels of one chain, fastest first: rising chunk sizes, each a multiple of the one before.

    Raises:
        ValueError: no level, two levels of one frequency, another order, a chunk size that does not fit.
    """
    levels = tuple(Level.from_dict(level) for level in levels)
    if not levels:
        raise ValueError("levels is empty; give at least one Level (Level() is the MLP of a Transformer)")
    clocks = [level.chunk_size for level in levels]
    repeated = sorted({"None" if c is None else str(c) for c in clocks if clocks.count(c) > 1})
    if repeated:
        raise ValueError(f"two levels have chunk_size {', '.join(repeated)}: one frequency is one level, merge them")
    finite = [c for c in clocks if c is not None]
    for fast, slow in pairwise(finite):
        if slow < fast:
            raise ValueError(f"levels go from fast to slow, but chunk_size {slow} follows {fast}: sort them")
        if slow != math.inf and slow % fast:
            raise ValueError(f"chunk_size {slow} is not a multiple of the faster level's {fast}")
    return levels


class Schedule:
    """Which level is updated how and when, for one context length and one size of outer step.

    kind of a level    when                                   what it means
    "fast"             chunk_size < context_length            per-sequence weights, updated inside the context
    "outer"            chunk_size None or = tokens_per_step   an ordinary weight, trained at every outer step
    "slow"             chunk_size > tokens_per_step           shared weights, one outer step per chunk_size tokens
    "frozen"           chunk_size inf or lr 0                 never updated

    Boundaries are counted in the stream of tokens, not in calls: state carried over calls keeps the phase.

    Args:
        levels: Levels (or dicts of their fields), fastest first.
        context_length: tokens of one sequence.
        tokens_per_step: tokens of one outer step, over the whole batch and its accumulation.
        total_tokens: tokens of the run, if known: a level that would never be updated is then an error.

    Raises:
        ValueError: levels that do not form a chain, or that no update could ever reach on time.
    """

    def __init__(
        self,
        levels: Sequence[Level | dict[str, Any]],
        context_length: int,
        tokens_per_step: int,
        total_tokens: int | None = None,
    ) -> None:
        for name, value in (("context_length", context_length), ("tokens_per_step", tokens_per_step)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive whole number of tokens; got {value!r}")
        self.levels = check_order(levels)
        self.context_length, self.tokens_per_step, self.total_tokens = context_length, tokens_per_step, total_tokens
        self.kinds = tuple(self._kind(i, level) for i, level in enumerate(self.levels))
        chunks = [self.chunk_size(i) for i in range(len(self.levels))]
        for i, (fast, slow) in enumerate(pairwise(chunks)):
            if slow <= fast:
                raise ValueError(
                    f"level {i + 1} is updated every {slow} tokens and level {i} every {fast}: levels go from fast to "
                    f"slow, each with a frequency of its own (an outer step has {tokens_per_step} tokens)"
                )

    def _kind(self, index: int, level: Level) -> str:
        size = level.chunk_size
        if level.frozen:
            return "frozen"
        if size is None:
            return "outer"
        if size < self.context_length:
            return "fast"
        if size == self.tokens_per_step:
            return "outer"
        if size < self.tokens_per_step:
            raise ValueError(
                f"level {index} can never be updated every {size} tokens: that is no boundary inside a context of "
                f"{self.context_length} tokens, and one outer step has {self.tokens_per_step}. Give it a chunk_size "
                f"below {self.context_length}, at least {self.tokens_per_step}, or None (every outer step)"
            )
        if self.total_tokens is not None and size > self.total_tokens:
            raise ValueError(
                f"level {index} would never be updated: chunk_size {size} is more than the {self.total_tokens} tokens "
                "of the run. Train longer, make it smaller, or freeze it on purpose with math.inf"
            )
        return "slow"

    def chunk_size(self, index: int) -> int | float:
        """Tokens between two updates of a level (those of an outer step for one that the outer loop trains)."""
        size = self.levels[index].chunk_size
        return self.tokens_per_step if size is None else size

    def _of_kind(self, kind: str) -> tuple[int, ...]:
        return tuple(i for i, k in enumerate(self.kinds) if k == kind)

    @property
    def fast(self) -> tuple[int, ...]:
        """Indices of the levels updated inside a context."""
        return self._of_kind("fast")

    @property
    def slow(self) -> tuple[int, ...]:
        """Indices of the levels that the outer loop steps once per chunk_size tokens."""
        return self._of_kind("slow")

    @property
    def frozen(self) -> tuple[int, ...]:
        """Indices of the levels that are never updated."""
        return self._of_kind("frozen")

    @property
    def segment(self) -> int:
        """Tokens of a sequence that run at once (decision D11): the smallest fast chunk, else the whole context."""
        return self.chunk_size(self.fast[0]) if self.fast else self.context_length

    def due(self, tokens_before: int, tokens_after: int) -> tuple[int, ...]:
        """Indices of the levels with a boundary in (tokens_before, tokens_after] of the stream."""
        if not 0 <= tokens_before <= tokens_after:
            raise ValueError(f"tokens_before {tokens_before} and tokens_after {tokens_after} do not go forward")
        clock = {
            "fast": lambda i: tokens_after // self.chunk_size(i) > tokens_before // self.chunk_size(i),
            "outer": lambda i: tokens_after > tokens_before,
            "frozen": lambda i: False,
        }
        clock["slow"] = clock["fast"]
        return tuple(i for i, kind in enumerate(self.kinds) if clock[kind](i))

    def rows(self) -> list[dict[str, Any]]:
        """One dict per level: index, kind, chunk_size, updates, lr, optimizer (the table as data)."""
        per = {
            "fast": lambda c: f"{self.context_length // c} per sequence of {self.context_length} tokens",
            "outer": lambda c: "every outer step",
            "slow": lambda c: f"every {c / self.tokens_per_step:g} outer steps",
            "frozen": lambda c: "never",
        }
        return [
            {
                "level": i,
                "kind": kind,
                "chunk_size": self.chunk_size(i),
                "updates": per[kind](self.chunk_size(i)),
                "lr": level.lr,
                "optimizer": level.optimizer,
            }
            for i, (level, kind) in enumerate(zip(self.levels, self.kinds))
        ]

    def __str__(self) -> str:
        rows = [{key: str(value) for key, value in row.items()} for row in self.rows()]
        width = {key: max(len(key), *(len(row[key]) for row in rows)) for key in rows[0]}
        lines = ["  ".join(key.ljust(width[key]) for key in width)]
        lines += ["  ".join(row[key].ljust(width[key]) for key in width) for row in rows]
        return "\n".join(line.rstrip() for line in lines)

    def __repr__(self) -> str:
        return f"Schedule({self.context_length} tokens per context, {self.tokens_per_step} per outer step)\n{self}"

"""What a reading session keeps beside the model's state: where it is, and what was measured so far."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nestling.sessions.series import Series


@dataclass
class LevelCount:
    """One level over some stretch of the stream: updates, refused ones, and the norms written."""

    updates: int = 0
    refused: int = 0
    written: float = 0.0

    def add(self, updates: int, refused: int, written: float) -> None:
        """Count one call's changes."""
        self.updates += updates
        self.refused += refused
        self.written += written


@dataclass
class Open:
    """The document that is being read.

    Attributes:
        tokens: read so far, without the end-of-text token in front; `begun` once that one is read.
        nats, counted, bad: summed loss, its tokens, and tokens whose loss was not finite.
        probe: the ids that are scored before and after.  before, control: their log-probabilities.
        check: what is known of its held-out sentences, and elsewhere, without levels and before it is read.
        recalled: what the levels were put to before it (`nestling.sessions.snapshots`).
    """

    levels: list[LevelCount]
    probe: list[int] = field(default_factory=list)
    before: list[float] = field(default_factory=list)
    control: list[float] | None = None
    check: dict[str, Any] | None = None
    recalled: str | None = None
    began: int = 0
    begun: bool = False
    tokens: int = 0
    nats: float = 0.0
    counted: int = 0
    bad: int = 0
    seconds: float = 0.0


@dataclass
class Notes:
    """A session between two calls; JSON in and out.

    Attributes:
        session: its name, which a pipe's journal bears too.  settings: those that decide the result.
        texts: name, size and digest of each document.  document, offset, skip: where the next token is.
        tokens: read in this session.  rows: a dict for each document that was read to its end.
        held_out: one dict for each scoring of the held-out text.
    """

    session: str
    settings: dict[str, Any]
    texts: list[list[Any]]
    chunk_sizes: list[int]
    document: int = 0
    offset: int = 0
    skip: int = 0
    tokens: int = 0
    done: bool = False
    open: Open | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    held_out: list[dict[str, Any]] = field(default_factory=list)
    loss: Series = field(default_factory=Series)
    memory: Series = field(default_factory=Series)
    norms: list[Series] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Notes:
        """What `to_dict` gave."""
        notes = cls(**values)
        notes.loss, notes.memory = Series(**values["loss"]), Series(**values["memory"])
        notes.norms = [Series(**s) for s in values["norms"]]
        if values["open"] is not None:
            levels = [LevelCount(**c) for c in values["open"]["levels"]]
            notes.open = Open(**{**values["open"], "levels": levels})
        return notes

    def totals(self) -> list[dict[str, Any]]:
        """What every level did, over all documents."""
        rows = [row["levels"] for row in self.rows]
        return [
            {"chunk_size": size, **{name: sum(r[n][name] for r in rows) for name in ("updates", "refused", "written")}}
            for n, size in enumerate(self.chunk_sizes)
        ]

    def memory_halves(self) -> dict[str, float | None]:
        """The most memory this process held while it read each half of the tokens."""
        half = self.tokens / 2
        first, last = self.memory.largest(0, half), self.memory.largest(half, self.tokens + 1)
        return {"first_half": first, "last_half": last, "ratio": last / first if first and last else None}


def same_session(before: Notes, now: Notes, path: Path) -> bool:
    """Whether the session of a file is the one that is asked for, to be gone on with; False: a new one begins.

    Raises:
        ValueError: it was stopped in other texts, or with other settings.
    """
    same = before.texts == now.texts
    if before.done and not (same and all(digest for _, _, digest in now.texts)):
        return False  # what comes out of a pipe is new, too
    if not before.tokens and not same:
        return False
    where = f"{path} stopped in document {before.document + 1} of {len(before.texts)}"
    where = f"{path} has read these texts already" if before.done else where
    if not same:
        old, new = ({name: digest for name, _, digest in notes.texts} for notes in (before, now))
        names = [n for n in {**old, **new} if old.get(n, 0) != new.get(n, 0)]
        changed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        raise ValueError(
            f"{where}, and the texts have changed since ({changed or 'their order'}): put back what it was reading, "
            "choose another --state, or begin anew from what it has learned with --new-session"
        )
    if before.settings != now.settings:
        names = [n for n in now.settings if before.settings.get(n) != now.settings[n]]
        old = ", ".join(f"{n} {before.settings.get(n)}" for n in names)
        new = ", ".join(str(now.settings[n]) for n in names)
        raise ValueError(f"{where} with {old}, now given as {new}: give the same again, or --new-session")
    return True


def measured(nats: float, tokens: int, size: int) -> dict[str, float | None]:
    """A summed loss over `tokens` tokens, which are `size` bytes, per token and per byte; None where there is none."""
    if not tokens or not size or not math.isfinite(nats):
        return {"nats_per_token": None, "bits_per_byte": None}
    return {"nats_per_token": nats / tokens, "bits_per_byte": nats / math.log(2) / size}

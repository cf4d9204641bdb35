"""What a part of the benchmark returns."""

from __future__ import annotations

from dataclasses import dataclass, field

from nestling.bench.measure import Timing


@dataclass
class Table:
    """One part's figures: rows by column name, and what a reader should know about them."""

    title: str
    rows: list[dict]
    notes: list[str] = field(default_factory=list)


def compare(timing: Timing, name: str, base: str, tokens: int) -> dict:
    """Tokens per second of both and their ratio over the rounds."""
    low, high = timing.spread(name, base)
    return {
        "tokens/s": tokens / timing.median(name),
        f"{base} tokens/s": tokens / timing.median(base),
        "ratio": timing.ratio(name, base),
        "low": low,
        "high": high,
        "rounds": timing.rounds,
    }

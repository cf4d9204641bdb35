"""`streams` at twice the length, beside what else one could do with the same text: fine-tuning, replay, a search."""

from __future__ import annotations

from experiments.streams.experiment import DATA, ENTRIES, GROUP, levels, plan, plot, summarize, table, work
from experiments.streams.report import BASE, DEFAULT
from experiments.streams.study import BYTES, Streams
from experiments.shared.continual.study import LearnerContender

QUESTION = "Streams of 200,000 tokens: several levels, snapshots, fine-tuning, replay, EWC, retrieval or a long context?"

__all__ = ["DATA", "ENTRIES", "GROUP", "defaults", "plan", "plot", "summarize", "table", "work"]


def defaults() -> Streams:
    """The experiment's settings: the domains and what is asked are those of `streams`."""
    middle, share = {"chunk_size": 512}, 0.08
    return Streams(name="streams_200k", models=[BYTES], first=32_768, back=20_480, contenders=[
        LearnerContender(BASE, "none"),
        levels(DEFAULT),
        levels("2 levels", {}, middle),
        levels("slow average, sessions", slow=512, share=share, sessions=True),
        levels("one level, nothing fades", {"decay": 0.0}),
        levels("snapshots", snapshots=True),
        levels("snapshots, nothing fades", {"decay": 0.0}, snapshots=True),
    ])  # fmt: skip

"""`streams` at twice the length, beside what else one may do with the same text: tune, replay, consolidate, search."""

from __future__ import annotations

from typing import Any

from experiments.shared.continual.study import LearnerContender
from experiments.streams.experiment import DATA, ENTRIES, GROUP, levels, plan, plot, summarize, table, work
from experiments.streams.report import BASE, DEFAULT
from experiments.streams.study import BYTES, Streams

QUESTION = "Streams of 200,000 tokens: do levels or their snapshots beat fine-tuning, EWC, replay and a search?"

__all__ = ["DATA", "ENTRIES", "GROUP", "defaults", "plan", "plot", "summarize", "table", "work"]

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def defaults() -> Streams:
    """The experiment's settings: domains and questions of `streams`; rates were chosen on a tuning seed."""

    def tuned(name: str, lr: float, **options: Any) -> LearnerContender:
        level = {"rank": None, "optimizer": "adamw", "lr": lr, "decay": 0.0}
        return LearnerContender(name, "levels", [level], {"target_modules": PROJECTIONS}, options)

    def prompted(name: str, **options: int) -> LearnerContender:
        return LearnerContender(name, "prompted", [], {}, options)

    still = {"decay": 0.0}
    return Streams(name="streams_200k", models=[BYTES], seeds=[0, 1, 2], first=32_768, back=20_480, contenders=[
        LearnerContender(BASE, "none"),
        levels(DEFAULT),
        levels("one level, nothing fades", still),
        levels("slow average, sessions", slow=512, share=0.08, sessions=True),
        levels("snapshots, nothing fades", still, snapshots=True),
        levels("LoRA, replay", {"lr": 3e-3, "optimizer": "adamw"} | still, replay=1),
        tuned("fine-tuning", 3e-4),
        tuned("fine-tuning, EWC", 3e-4, ewc=1e4, fisher=16),
        levels("slow average, sessions, half as fast", slow=512, share=0.04, sessions=True),
        levels("2 levels", {}, {"chunk_size": 512}),
        levels("one level, rank 128, nothing fades", {"rank": 128, "lr": 0.01} | still),
        prompted("retrieval", piece=64, latest=192, passages=2, size=64),
        prompted("long context", piece=1024, latest=3072, passages=0, size=0),
        levels("snapshots", snapshots=True),
    ])  # fmt: skip

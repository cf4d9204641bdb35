"""Long streams of several domains and back to the first two: do several levels beat one?

Five domains one after the other (two novels, two languages that no model knows, code), then the first two again. Every
contender reads the same streams once. What it gains while it reads, what it still knows of each domain at the end, on
parts it never reads, and what it harms of ordinary text is compared with the same model without levels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments.shared.continual.study import LearnerContender
from experiments.shared.data import find_data
from experiments.shared.work import Row
from experiments.streams import report
from experiments.streams.study import Streams, StreamsJob, StreamsWork
from experiments.streams.texts import DOMAINS, ELSEWHERE
from nestling.cms.defaults import CHUNK, FADE, RANK, RATE

GROUP = "Continual learning"
QUESTION = "Streams of 100,000 tokens, domain after domain and back: do several levels beat one?"
ENTRIES = "found"

DATA = "a folder with `books` and `bible`; the experiment's README says where they come from"


def levels(name: str, *fields: dict[str, Any], **options: Any) -> LearnerContender:
    """A contender with levels. Fields of a level that are not named are those of the default (decision D20)."""
    return LearnerContender(name, "levels", list(fields), {}, options)


def defaults() -> Streams:
    """The experiment's settings."""
    middle, share = {"chunk_size": 512}, 0.08  # of .02, .08 and .3, on tuning seeds
    return Streams(contenders=[
        LearnerContender(report.BASE, "none"),
        levels(report.DEFAULT),
        levels("slow average, sessions", slow=512, share=share, sessions=True),
        levels("one level, nothing fades", {"decay": 0.0}),
        levels("snapshots", snapshots=True),
        levels("snapshots, nothing fades", {"decay": 0.0}, snapshots=True),
        levels("slow average", slow=512, share=share),
        levels("AdamW, rank 16", {"chunk_size": CHUNK, "lr": 3e-3, "optimizer": "adamw", "decay": 0.0}),
        levels("2 levels", {}, middle),
        levels("sessions", slow=512, share=0.0, sessions=True),
        levels("one level, ten times slower", {"lr": RATE / 10, "decay": FADE / 10}),
        levels("one level, twice the rank", {"rank": 2 * RANK}),
        levels("3 levels", {}, middle, {"chunk_size": 4096}),
    ])  # fmt: skip


def work(settings: Streams, data: str | Path | None, smoke: bool) -> StreamsWork:
    """What does the jobs."""
    files = [place for place in (DOMAINS | ELSEWHERE).values() if place.startswith("books/")]
    folder = None if smoke and data is None else find_data(data, ".", files, DATA)
    return StreamsWork(settings, folder)


def plan(settings: Streams, contenders: list[LearnerContender], row: Row) -> list[StreamsJob]:
    """Model by model, every contender."""
    return [StreamsJob(c.name, model) for model in settings.models for c in contenders]


def summarize(settings: Streams, contenders: list[LearnerContender], row: Row) -> dict[str, Any]:
    """Gains over the same model without levels, means and spreads over the streams."""
    found = []
    for model in settings.models:
        rows = {c.name: r for c in contenders if (r := row(StreamsJob(c.name, model)))}
        if report.BASE in rows and len(rows) > 1:
            found.append({"model": model, "contenders": report.of_model(rows, len(settings.places[0]), settings.sight)})
    facts = {k: getattr(settings, k) for k in ("first", "back", "context", "probe", "window", "seeds")}
    return {"experiment": "streams", **facts, "found": found}


table, plot = report.table, report.plot

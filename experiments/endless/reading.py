"""Reading in a process of its own, which can be killed: the product's session, and what is noted beside it."""

from __future__ import annotations

import json
import multiprocessing
import signal
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from experiments.shared.work import Progress
from nestling.generation import load_notes, load_state
from nestling.sessions import Session, Settings, find_texts, store
from nestling.sessions.scores import score
from nestling.sessions.snapshots import FIRST, recall_nearest
from nestling.utils.memory_use import resident_bytes

LOOK = 0.2  # seconds between two looks at the state
# the model and torch itself are there already: twenty starts cost nothing
PROCESSES = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Reading:
    """What a process reads, and where it keeps the state.

    Attributes:
        asked: name and bytes of the texts that are scored after each document.  stretch: chunks timed as one.
    """

    model: Any
    tokenizer: Any
    documents: list[Path]
    state: Path
    snapshots: int
    asked: dict[str, list[int]]
    stretch: int

    @property
    def log(self) -> Path:
        """Notes of all processes, lines of JSON."""
        return self.state.with_suffix(".jsonl")

    def session(self, show: Any = None) -> Session:
        """Where the state is, or at the beginning."""
        settings = Settings(probe=0, snapshots=self.snapshots)
        found = find_texts([str(path) for path in self.documents])
        return Session(self.model, self.tokenizer, found, self.state, settings, show=show)


class Notes:
    """Called after every chunk and document: times, memory, and what is known of the texts asked for."""

    def __init__(self, reading: Reading, progress: Progress | None) -> None:
        self.reading, self.progress = reading, progress
        self.times: list[float] = []
        # what a killed process noted: the first call of this one may be a document's end
        lines = reading.log.read_text().splitlines() if reading.log.exists() else []
        self.document = max((json.loads(line).get("document", 0) for line in lines), default=0)
        self.last = time.process_time()

    def __call__(self, session: Session) -> None:
        self.times.append(time.process_time() - self.last)
        notes = session.notes
        if notes.document > self.document and self.reading.asked:
            found = known(self.reading.model, session.cache, self.reading.tokenizer, self.reading.asked)
            self._write({"document": notes.document, **found})
        self.document = max(self.document, notes.document)
        if len(self.times) == self.reading.stretch:
            milliseconds = 1000 * statistics.median(self.times)
            self._write({"tokens": notes.tokens, "milliseconds": milliseconds, "memory": resident_bytes()})
            self.times = []
            if self.progress:
                self.progress(notes.tokens, notes.loss.points[-1][2])
        self.last = time.process_time()

    def _write(self, line: dict[str, Any]) -> None:
        with self.reading.log.open("a") as file:
            file.write(json.dumps(line) + "\n")


@torch.no_grad()
def known(model: Any, cache: Any, tokenizer: Any, asked: dict[str, list[int]]) -> dict[str, dict[str, float]]:
    """Bits per byte of texts in a fresh context: by the levels as they stand ("now"), and by the nearest snapshot
    ("best"), chosen by the first bytes, which count as without levels."""
    end, context, found = tokenizer.eos_token_id, model.learner.context, {}
    for name, ids in asked.items():
        now = score(model, cache, ids, end, context)
        best = score(model, None, ids, end, context)
        if cache is not None:
            nearest = cache.fork()
            recall_nearest(model, nearest, ids[:FIRST], end, context)
            best = torch.cat([best[:FIRST], score(model, nearest, ids, end, context)[FIRST:]])
        bits = (-logs.double().mean().item() / torch.tensor(2.0).log().item() for logs in (now, best))
        found[name] = dict(zip(("now", "best"), bits))
    return found


def read(reading: Reading, progress: Progress | None) -> dict[str, Any]:
    """Read to the end, in this process."""
    return reading.session(Notes(reading, progress)).run()


def killed(reading: Reading, tokens: int, seconds: float) -> dict[str, Any]:
    """Let a process read until its state says so many tokens, and some seconds more; kill it, and look at the state.

    Returns:
        seconds.  before, after: tokens read, by the state.  whole: whether it can be read, and nothing was lost.
    """
    before, stamp = _tokens(reading), store.stamp(reading.state)
    process = PROCESSES.Process(target=_child, args=(reading,), daemon=True)
    process.start()
    while process.is_alive() and (store.stamp(reading.state) == stamp or _tokens(reading) < tokens):
        process.join(LOOK)
    process.join(seconds)
    process.kill()
    process.join()
    if process.exitcode not in (0, -signal.SIGKILL):
        raise RuntimeError(f"a reading process ended with {process.exitcode} before it was killed")
    try:
        load_state(reading.state, reading.model)
        after = _tokens(reading)
    except ValueError:
        return {"seconds": seconds, "before": before, "after": None, "whole": False}
    return {"seconds": seconds, "before": before, "after": after, "whole": after >= before}


def _child(reading: Reading) -> None:
    torch.set_num_threads(1)
    read(reading, None)


def _tokens(reading: Reading) -> int:
    """Read so far, by the state; 0 where there is none."""
    return load_notes(reading.state)["reading"]["tokens"] if reading.state.exists() else 0

"""A model trained on short windows, and its loss on a held-out book by how much of it was read before."""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from dataclasses import dataclass
from typing import Any

import torch

from experiments.positions.reading import cut, streamed, whole
from experiments.shared.corpus import Texts
from experiments.shared.models.runs import TrainingWork, trained
from experiments.shared.models.study import TrainingJob, TrainingStudy
from experiments.shared.work import Progress, one_thread, versions
from nestling.training.batches import spread, windows

BITS = 0.6931471805599453  # nats of a bit; a token is a byte here


@dataclass
class Positions(TrainingStudy):
    """The training of all contenders, and how far beyond its windows they are read.

    Each contender has one rate (`lrs`), the one that `quality` found best for it.
    """

    name: str = "positions"
    test: bool = True
    times: int = 8  # a window that is read, in windows of the training
    read_windows: int = 32  # spread evenly over the book

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data.seq_len % 4:
            raise ValueError(f"data.seq_len ({self.data.seq_len}) must be a multiple of 4")

    @property
    def length(self) -> int:
        """Tokens of a window that is read."""
        return self.times * self.data.seq_len

    @property
    def edges(self) -> list[int]:
        """Edges of the stretches of a window whose losses are averaged: doubling beyond the trained length."""
        trained = self.data.seq_len
        inside = {trained // 32, trained // 8, trained // 2}
        return sorted({0, *inside, self.length, *(trained << i for i in range(self.times.bit_length()))})

    def smoke(self) -> Positions:
        return super().smoke().changed(times=2, read_windows=2)

    def fingerprint(self, job: TrainingJob, corpus: str) -> str:
        found = super().fingerprint(job, corpus)
        if job.kind == "train":
            return found
        return hashlib.sha256(json.dumps([found, self.times, self.read_windows]).encode()).hexdigest()[:12]


class PositionsWork(TrainingWork):
    """Trains as `quality` does; the test is the three readings of the held-out book."""

    experiment: Positions

    def __call__(self, job: TrainingJob, progress: Progress | None = None) -> dict[str, Any]:
        if job.kind == "train":
            return super().__call__(job, progress)
        with one_thread():
            row = read(self.experiment, job, self.texts, progress, self.device)
        head = {"kind": job.kind, "key": job.key, "fingerprint": self.fingerprint(job), "contender": job.contender}
        return head | {"lr": job.lr, "seed": job.seed, "precision": job.precision} | row | versions(self.device)


def read(settings: Positions, job: TrainingJob, texts: Texts, progress: Progress | None, device: str) -> dict[str, Any]:
    """Bits of every reading [W][stretches], and processor seconds of each."""
    book, length, context = texts.test, settings.length, settings.data.seq_len
    if len(book) <= length:
        raise ValueError(f"the held-out text has {len(book)} tokens, a window {length}: lower times ({settings.times})")
    starts = spread(book, length, settings.read_windows)
    losses, seconds, started = {}, {}, time.thread_time()
    with trained(settings, job, texts, progress, device) as model:
        model.eval()
        shown = windows(book, starts, length).to(device)
        begun = time.thread_time()
        for name, reading in {
            "whole": lambda: whole(model, shown),
            "cut": lambda: cut(model, shown, context, context // 4),
            "carried": lambda: streamed(model, book, starts, length, context),
        }.items():
            losses[name] = reading().double().cpu() / BITS
            seconds[name], begun = time.thread_time() - begun, time.thread_time()
    stretches = list(itertools.pairwise(settings.edges))
    bits = {name: torch.stack([f[:, a:b].mean(1) for a, b in stretches], 1) for name, f in losses.items()}
    return {
        "starts": starts,
        "bits": {name: [[round(v, 5) for v in window] for window in found.tolist()] for name, found in bits.items()},
        "bits_per_byte": float(losses["whole"].mean()),
        "reading_seconds": seconds,
        "seconds": time.thread_time() - started,
    }

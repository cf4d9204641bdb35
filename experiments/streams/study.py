"""The settings of the experiment with long streams, and the work of one run."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from experiments.defaults.small_models import BOOKS, trained
from experiments.shared.continual.pretrained import pretrained
from experiments.shared.continual.study import ContinualStudy, ContinualWork, LearnerContender
from experiments.shared.corpus import find_files
from experiments.shared.work import Job, Progress
from experiments.streams import texts
from experiments.streams.prompted import Prompted
from experiments.streams.reader import Reader
from nestling.cms.defaults import default_blocks, default_levels

SMOLLM2, BYTES = "smollm2-135m", "byte llama"


@dataclass
class Streams(ContinualStudy):
    """Sizes of the streams, in tokens, and of what is asked of them; each seed is a stream, all are read in step."""

    name: str = "streams"
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3])
    dtype: str = "float32"
    models: list[str] = field(default_factory=lambda: [SMOLLM2, BYTES])
    steps: int = 300  # of training of the byte model
    texts: str = "judged"  # or smoke
    first: int = 16_384  # of each of the five domains
    back: int = 8192  # of the first two, at the end
    context: int = 1024  # after which attention begins anew
    probe: int = 1024  # of every domain, never read
    window: int = 4096  # of which a loss is kept

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("first", "back", "window"):
            if getattr(self, name) % self.context:
                raise ValueError(f"{name} must be a multiple of context {self.context}, not {getattr(self, name)}")

    def methods(self) -> tuple[str, ...]:
        return ("none", "levels", "prompted")

    def smoke(self) -> Streams:
        chosen = [
            c for c in self.contenders if c.name in ("no levels", "default", "slow average, sessions", "snapshots")
        ]
        return replace(self, contenders=chosen, seeds=[0, 1], models=[BYTES], steps=3, texts="smoke", first=256,
                       back=128, context=128, probe=128, window=128)  # fmt: skip

    @property
    def places(self) -> tuple[dict[str, str], dict[str, str]]:
        """Where the domains come from, and the ordinary texts that nobody reads."""
        smoke = self.texts == "smoke"
        return (texts.SMOKE, texts.SMOKE_ELSEWHERE) if smoke else (texts.DOMAINS, texts.ELSEWHERE)

    @property
    def sight(self) -> int:
        """Windows of the stream until every domain was read once."""
        return len(self.places[0]) * math.ceil(self.first / self.window)

    def decisive(self, job: Any) -> dict[str, Any]:
        values = super().decisive(job) | {"seeds": self.seeds}
        elsewhere = ("models", "model", *(("steps",) if job.model != BYTES else ()))
        return {k: v for k, v in values.items() if k not in elsewhere}


@dataclass(frozen=True)
class StreamsJob(Job):
    """One contender reads all streams, as one model."""

    contender: str
    model: str = SMOLLM2
    kind: str = "run"

    @property
    def key(self) -> str:
        return f"{self.model}: {self.contender}"


class StreamsWork(ContinualWork):
    """Reads streams; `folder` holds the data, None for a smoke run, whose texts every machine has."""

    anywhere = True

    def __init__(self, settings: Streams, folder: Path | None) -> None:
        super().__init__(settings)
        self.folder = folder or Path()
        self.files = tuple([folder / "books" / name for name in BOOKS] if folder else find_files(None, smoke=True))

    def check(self, contenders: list[LearnerContender]) -> None:
        if SMOLLM2 in self.settings.models:
            pretrained(SMOLLM2, self.settings.dtype)

    def reads(self, job: StreamsJob) -> str:
        """The default's levels, which a contender does not name."""
        return str(default_levels(None)) + str(default_blocks(None)) + str(self.settings.places)

    def run(self, job: StreamsJob, progress: Progress | None) -> dict[str, Any]:
        settings, contender = self.settings, self.settings.contender(job.contender)
        plain, tokenizer = self._model(job.model)
        places, elsewhere = settings.places
        sizes = (settings.first, settings.back, settings.probe)
        streams = [texts.draw(places, self.folder, tokenizer, seed, sizes) for seed in settings.seeds]
        parts = [[d.first for d in ds] + [d.back for d in ds[:2]] for ds in streams]
        ids = torch.tensor([[tokenizer.eos_token_id, *(i for p in ps for i in p)] for ps in parts])
        probes = [torch.tensor([ds[k].probe for ds in streams]) for k in range(len(places))]
        others = [
            torch.tensor([texts.tokens(place, self.folder, tokenizer, 0.4, settings.probe)] * len(streams))
            for place in elsewhere.values()
        ]
        reader = (
            Prompted(plain, contender.options, tokenizer.decode, tokenizer.eos_token_id)
            if contender.method == "prompted"
            else Reader(plain, contender, settings.context, tokenizer.eos_token_id)
        )
        began, reading = time.perf_counter(), 0.0
        known, other, windows, at = [], [], [], 0

        def ask() -> None:
            known.append([self._bits(reader, tokenizer, p) for p in probes])
            other.append([self._bits(reader, tokenizer, p) for p in others])

        ask()
        for length in (len(p) for p in parts[0]):
            for start in range(at, at + length, settings.window):
                row, before = ids[:, start : min(start + settings.window, at + length) + 1], time.thread_time()
                lost = reader.read(row.to(self.device)).double().sum(1).tolist()
                reading += time.thread_time() - before
                windows.append([x / math.log(2) / texts.size(tokenizer, r[1:]) for x, r in zip(lost, row)])
                if progress:
                    progress(start, windows[-1][0])
            at += length
            reader.end_part()
            if reader.learns:
                ask()
        return {
            "tokens": ids.shape[1] - 1,
            "digest": texts.digest(places | elsewhere, self.folder),
            "domains": [[d.name for d in ds] for ds in streams],
            "windows": windows,  # [window][stream]
            "known": known,  # [time][domain, in the stream's order][stream]
            "other": other,  # [time][text][stream]
            "state_bytes": reader.nbytes // len(streams),
            "wall_seconds": time.perf_counter() - began,
            "reading_seconds": reading,  # of the processor, questions apart
        }

    def _model(self, name: str) -> tuple[nn.Module, Any]:
        found = (
            trained(name, self.settings.steps, self.files) if name == BYTES else pretrained(name, self.settings.dtype)
        )
        return found[0].to(self.device), found[1]

    def _bits(self, reader: Reader | Prompted, tokenizer: Any, rows: Tensor) -> list[float]:
        """Bits per byte of rows [B, n] in a fresh context, after an end-of-text token."""
        lost = reader.known(rows.to(self.device)).double().sum(1).tolist()
        return [x / math.log(2) / texts.size(tokenizer, r) for x, r in zip(lost, rows)]

    def result(self, row: dict[str, Any]) -> str:
        mean = sum(map(sum, row["windows"])) / sum(map(len, row["windows"]))
        return f"{mean:.3f} bits per byte of {row['tokens']:,} tokens"

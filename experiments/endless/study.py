"""The settings of the endless stream, and the work of one run: read, be killed, go on, and be asked."""

from __future__ import annotations

import json
import random
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from experiments.defaults.small_models import trained
from experiments.endless import texts
from experiments.endless.reading import Reading, killed, known, read
from experiments.shared.corpus import find_files
from experiments.shared.study import Contender, Study, StudyWork
from experiments.shared.work import Job, Progress
from nestling.cms import stack_levels
from nestling.cms.defaults import default_levels
from nestling.generation import load_state
from nestling.utils.files import write_text
from nestling.utils.places import cache_folder

FAMILY, WIDTH, LAYERS = "byte llama", 64, 2


@dataclass
class EndlessContender(Contender):
    """A reader: fields of its level that are not the default's, and how many snapshots it keeps."""

    level: dict[str, Any] = field(default_factory=dict)
    snapshots: int = 0


@dataclass
class Endless(Study):
    """Sizes in bytes, which are the model's tokens."""

    name: str = "endless"
    contenders: list[EndlessContender] = field(default_factory=list)
    texts: str = "all"  # or smoke
    steps: int = 300  # of the model's training
    size: int = 1_000_000  # of each text
    parts: int = 4  # documents that it is cut into
    passes: int = 2
    chunk: int = 1024  # of the level: longer than the default's, for speed
    context: int = 1024
    probe: int = 2048  # of the first text and of another, never read
    stretch: int = 50  # chunks whose time is kept as one median
    kills: int = 20
    longest: float = 2.0  # seconds that a process lives on, at most, when its place is reached
    short: int = 40_000  # bytes that are read with kills and without, to the same bits

    def smoke(self) -> Endless:
        return replace(self, contenders=self.contenders[:1], texts="smoke", steps=3, size=4096, parts=2, passes=1,
                       chunk=64, context=128, probe=256, stretch=20, kills=1, longest=0.3, short=2048)  # fmt: skip


@dataclass(frozen=True)
class EndlessJob(Job):
    """One contender reads the stream."""

    contender: str
    kind: str = "run"

    @property
    def key(self) -> str:
        return self.contender


class EndlessWork(StudyWork):
    """Reads; `folder` holds the data, None for a smoke run, whose texts every machine has.

    A run's state lies in the cache folder under its fingerprint: a run that is stopped goes on where it was.
    """

    def __init__(self, settings: Endless, folder: Path | None) -> None:
        super().__init__(settings)
        self.folder, self.smoke = folder or Path(), folder is None

    def reads(self, job: EndlessJob) -> str:
        """The default's level too, which a contender does not name."""
        return f"{texts.TEXTS} {default_levels(None)}"

    def run(self, job: EndlessJob, progress: Progress | None) -> dict[str, Any]:
        settings, contender = self.settings, self.settings.contender(job.contender)
        if not self.smoke:
            return self._run(cache_folder() / "endless" / self.fingerprint(job), settings, contender, progress)
        with tempfile.TemporaryDirectory() as folder:
            return self._run(Path(folder), settings, contender, progress)

    def _run(
        self, folder: Path, settings: Endless, contender: EndlessContender, progress: Progress | None
    ) -> dict[str, Any]:
        files = find_files(None, smoke=True) if self.smoke else [self.folder / texts.TRAINED]
        plain, tokenizer = trained(FAMILY, settings.steps, tuple(files), WIDTH, LAYERS)
        level = replace(default_levels(plain.config)[0], chunk_size=settings.chunk, **contender.level)
        model = stack_levels(plain, [level], context=settings.context)
        sizes = (settings.size, settings.parts, settings.passes, settings.probe)
        stream = texts.write(folder / "texts", self.folder, self.smoke, *sizes)
        asked = {"first": list(stream.first), "elsewhere": list(stream.elsewhere)}
        reading = Reading(model, tokenizer, stream.documents, folder / "reader.state", contender.snapshots, asked,
                          settings.stretch)  # fmt: skip
        kept = folder / "kills.json"
        kills = json.loads(kept.read_text()) if kept.exists() else []
        total, draw = settings.size * settings.passes * len(self._names(stream)), random.Random(0)
        for n in range(settings.kills):  # one in each of so many stretches of the stream
            place, seconds = int((n + draw.random()) / settings.kills * total), draw.random() * settings.longest
            if n >= len(kills):
                kills.append(killed(reading, place, seconds))
                write_text(kept, json.dumps(kills))
        result = read(reading, progress)
        lines = [json.loads(line) for line in reading.log.read_text().splitlines()]
        asks = {line["document"]: line for line in lines if "document" in line}  # of those read twice, the last
        return {
            "texts": self._names(stream),
            "tokens": result["tokens"], "not_finite": result["not_finite"], "memory": result["memory"],
            "state_bytes": result["state_bytes"] + sum(result["snapshots"].values()),
            "snapshots": list(result["snapshots"]),
            "recalled": [row.get("recalled") for row in result["documents"]],
            "kills": kills, "whole": sum(kill["whole"] for kill in kills),
            "same": self._same(folder / "short", reading, settings, draw),
            "stretches": [line for line in lines if "milliseconds" in line],
            "known": [{"document": 0} | known(model, None, tokenizer, asked), *(asks[n] for n in sorted(asks))],
        }  # fmt: skip

    def _names(self, stream: texts.Stream) -> list[str]:
        """Of the texts, in the order of reading."""
        return list(dict.fromkeys(path.stem.rsplit("-", 1)[0] for path in stream.documents))

    def _same(self, folder: Path, reading: Reading, settings: Endless, draw: random.Random) -> bool:
        """Whether two short documents read in one go and with three kills give the same bits."""
        folder.mkdir(exist_ok=True)
        paths, states = [], []
        for n, path in enumerate(reading.documents[:: settings.parts][:2]):
            paths.append(folder / f"{n}.txt")
            paths[-1].write_text(path.read_bytes()[: settings.short // 2].decode("utf-8", "ignore"), encoding="utf-8")
        for name in ("whole", "killed"):
            short = replace(reading, documents=paths, state=folder / f"{name}.state", asked={})
            for _ in range(3 if name == "killed" and not short.state.exists() else 0):
                killed(short, 0, draw.random() * settings.longest)
            read(short, None)
            states.append(load_state(short.state, reading.model))
        return all(torch.equal(a, b) for a, b in zip(*map(_tensors, states), strict=True))

    def result(self, row: dict[str, Any]) -> str:
        return f"{row['tokens']:,} tokens, {row['whole']} of {len(row['kills'])} kills left a whole state"


def _tensors(cache: Any) -> list[torch.Tensor]:
    held = [cache, *(cache.snapshots or {}).values()]
    return [t for c in held for t in tree_leaves(c.levels) if isinstance(t, torch.Tensor)]

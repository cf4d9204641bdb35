"""What a comparison of contenders over seeds is made of: settings, and the work around one job."""

from __future__ import annotations

import hashlib
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from experiments.shared.work import Progress, Work, one_thread, versions
from nestling.training.config import Settings


@dataclass
class Contender:
    """What is compared with others in an experiment; each family of experiments has a kind with fields of its own."""

    name: str


def check_names(contenders: Iterable[Contender]) -> None:
    """ValueError if two contenders share a name."""
    names = [c.name for c in contenders]
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise ValueError(f"contenders must have names of their own; {', '.join(twice)} occurs twice")


def without_stages(schedule: dict[str, Any]) -> dict[str, Any]:
    """A schedule's values as a fingerprint takes them: one stage is what all rows had before there were two."""
    one = schedule["chunk_factor"] == 1
    full = schedule["short_window"] is None
    left_out = [*(["chunk_"] if one else []), *(["short_"] if full else [])]
    return {k: v for k, v in schedule.items() if not k.startswith(tuple(left_out))}


@dataclass
class Study(Settings, ABC):
    """A comparison; `out` is its folder. Its kinds say what a contender is and add their numbers."""

    name: str = ""
    out: str = "."
    contenders: list[Any] = field(default_factory=list)  # each a `Contender`
    seeds: list[int] = field(default_factory=lambda: [0])

    def __post_init__(self) -> None:
        check_names(self.contenders)
        if not self.seeds:
            raise ValueError("seeds must hold at least one value")

    def contender(self, name: str) -> Any:
        """The contender of that name."""
        return next(c for c in self.contenders if c.name == name)

    def stored(self) -> dict[str, Any]:
        """What `config.json` keeps."""
        values = self.to_dict()
        values.pop("out")
        return values

    @abstractmethod
    def smoke(self) -> Self:
        """A version that takes seconds."""

    def decisive(self, job: Any) -> dict[str, Any]:
        """The settings that decide a job's result besides the contender and the job itself."""
        values = self.stored()
        for name in ("name", "contenders", "seeds"):
            values.pop(name)
        return values


class StudyWork(Work):
    """Does the jobs of a study; its kinds say how in `run`."""

    def __init__(self, settings: Study, data: str = "") -> None:
        self.settings, self.data = settings, data  # data: a fingerprint of what is read

    @abstractmethod
    def run(self, job: Any, progress: Progress | None) -> dict[str, Any]:
        """The figures of a job."""

    @abstractmethod
    def result(self, row: dict[str, Any]) -> str:
        """The one figure shown when a job ends."""

    def __call__(self, job: Any, progress: Progress | None = None) -> dict[str, Any]:
        started = time.thread_time()
        with one_thread():
            row = self.run(job, progress)
        head = {"kind": job.kind, "key": job.key, "fingerprint": self.fingerprint(job)}
        return head | asdict(job) | row | {"seconds": time.thread_time() - started} | versions(self.device)

    def reads(self, job: Any) -> str:
        """A fingerprint of the data that a job reads."""
        return self.data

    def compared(self, job: Any) -> dict[str, Any]:
        """The contender's fields that decide a job's result."""
        return asdict(self.settings.contender(job.contender))

    def fingerprint(self, job: Any) -> str:
        text = json.dumps([self.settings.decisive(job), self.compared(job), self.reads(job)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def describe(self, job: Any, row: dict[str, Any]) -> str:
        return f"{job.key}: {self.result(row)}, {row['seconds']:.0f} s"

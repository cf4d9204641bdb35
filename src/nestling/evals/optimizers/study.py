"""What the experiments with optimisers share: settings, jobs and the work around one."""

from __future__ import annotations

import hashlib
import json
import time
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from nestling.evals.work import Tell, one_thread, versions
from nestling.training.config import Settings, unknown


@dataclass
class Contender:
    """One optimiser of a comparison: its name in `nestling.evals.optimizers.contenders`, and options of its own."""

    name: str
    optimizer: str
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class Study(Settings, ABC):
    """An experiment with optimisers; `out` is its folder. Its kinds add their numbers."""

    name: str = ""
    out: str = "."
    contenders: list[Contender] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [0])

    def __post_init__(self) -> None:
        from nestling.evals.optimizers.contenders import BUILDERS

        names = [c.name for c in self.contenders]
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise ValueError(f"contenders must have names of their own; {', '.join(twice)} occurs twice")
        for contender in self.contenders:
            if contender.optimizer not in BUILDERS:
                raise ValueError(unknown("optimizer", contender.optimizer, BUILDERS))
        if not self.seeds:
            raise ValueError("seeds must hold at least one value")

    def contender(self, name: str) -> Contender:
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


class StudyWork(ABC):
    """Does the jobs of a study (`nestling.evals.work.Work`); its kinds say how in `run`."""

    def __init__(self, settings: Study, data: str = "") -> None:
        self.settings, self.data = settings, data  # data: a fingerprint of what is read

    @abstractmethod
    def run(self, job: Any, tell: Tell | None) -> dict[str, Any]:
        """The figures of a job."""

    @abstractmethod
    def result(self, row: dict[str, Any]) -> str:
        """The one figure shown when a job ends."""

    def __call__(self, job: Any, tell: Tell | None = None) -> dict[str, Any]:
        started = time.thread_time()
        with one_thread():
            row = self.run(job, tell)
        head = {"kind": job.kind, "key": job.key, "fingerprint": self.fingerprint(job)}
        return head | asdict(job) | row | {"seconds": time.thread_time() - started} | versions()

    def fingerprint(self, job: Any) -> str:
        contender = asdict(self.settings.contender(job.contender))
        text = json.dumps([self.settings.decisive(job), contender, self.data], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def told(self, job: Any, row: dict[str, Any]) -> str:
        return f"{job.key}: {self.result(row)}, {row['seconds']:.0f} s"

    def check(self, contenders: list[Contender]) -> None:
        """Every contender is built once, so that a wrong option is an error before the first run."""
        from nestling.evals.optimizers.contenders import check

        for contender in contenders:
            check(contender)

"""Which runs the experiment with classes calls for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from experiments.classes.small_models import OURS
from experiments.shared.continual.study import LearnerContender
from experiments.shared.work import Job, Row


@dataclass(frozen=True)
class ClassJob(Job):
    """One contender on one stream."""

    contender: str
    data: str
    seed: int
    kind: str = "run"

    @property
    def key(self) -> str:
        return f"{self.data} {self.contender} seed={self.seed}"


def plan(settings: Any, contenders: list[LearnerContender], row: Row) -> list[ClassJob]:
    """Every contender on every stream, seed by seed; a small model only where it has a source."""
    jobs = [ClassJob(c.name, d, s) for s in settings.seeds for d in settings.data for c in contenders]
    small = {c.name for c in contenders if c.options.get("model") in OURS}
    return [j for j in jobs if j.contender not in small or j.data in settings.sources]

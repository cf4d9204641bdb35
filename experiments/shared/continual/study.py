"""What the experiments with continual learners share: contenders, settings, jobs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

from experiments.shared.continual.pretrained import pretrained
from experiments.shared.study import Contender, Study, StudyWork
from experiments.shared.work import Job
from nestling.schedule import check_order
from nestling.training.config import unknown


@dataclass
class LearnerContender(Contender):
    """One way to learn from a stream.

    Attributes:
        method: how it learns; each experiment knows its own.
        levels: fields of the levels, fastest first; for fine-tuning, whose weights are the ones to tune.
        stack: other arguments of `stack_levels`: placement, blocks, width, ...
        options: of the method, e.g. the learning rate of fine-tuning.
    """

    method: str
    levels: list[dict[str, Any]] = field(default_factory=list)
    stack: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class ContinualStudy(Study, ABC):
    """An experiment with continual learners: `model` is what they start from, in `dtype`."""

    contenders: list[LearnerContender] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    model: str = "smollm2-135m"
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        super().__post_init__()
        for contender in self.contenders:
            if contender.method not in self.methods():
                raise ValueError(unknown("method", contender.method, self.methods()))
            if contender.levels:
                check_order(contender.levels)

    @abstractmethod
    def methods(self) -> tuple[str, ...]:
        """The names of the ways to learn."""


@dataclass(frozen=True)
class StreamJob(Job):
    """One contender on one seed; experiments with more parts subclass it and put them in front of the key."""

    contender: str
    seed: int
    kind: str = "run"

    @property
    def key(self) -> str:
        return f"{self.contender} seed={self.seed}"


class ContinualWork(StudyWork, ABC):
    """Does the jobs of an experiment with continual learners."""

    def check(self, contenders: list[LearnerContender]) -> None:
        """Settings checked themselves when they were made; a pre-trained model must be there."""
        if self.settings.model:
            pretrained(self.settings.model, self.settings.dtype)

"""What the experiments with optimisers share: settings, and the check of contenders."""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass, field

from experiments.shared.optimizers.contenders import BUILDERS, OptimizerContender, check
from experiments.shared.study import Study, StudyWork
from nestling.training.config import unknown


@dataclass
class OptimizerStudy(Study, ABC):
    """An experiment with optimisers."""

    contenders: list[OptimizerContender] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        for contender in self.contenders:
            if contender.optimizer not in BUILDERS:
                raise ValueError(unknown("optimizer", contender.optimizer, BUILDERS))


class OptimizerWork(StudyWork, ABC):
    """Does the jobs of an experiment with optimisers."""

    def check(self, contenders: list[OptimizerContender]) -> None:
        """Every contender is built once, so that a wrong option is an error before the first run."""
        for contender in contenders:
            check(contender)

"""What the experiments with optimisers share: which contenders there are."""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass, field
from typing import Any

from experiments.shared import study
from nestling.training.config import unknown


@dataclass
class Contender:
    """One optimiser of a comparison: its name in `experiments.shared.optimizers.contenders`, and options of its own."""

    name: str
    optimizer: str
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class Study(study.Study, ABC):
    """An experiment with optimisers."""

    contenders: list[Contender] = field(default_factory=list)

    def __post_init__(self) -> None:
        from experiments.shared.optimizers.contenders import BUILDERS

        super().__post_init__()
        for contender in self.contenders:
            if contender.optimizer not in BUILDERS:
                raise ValueError(unknown("optimizer", contender.optimizer, BUILDERS))


class StudyWork(study.StudyWork, ABC):
    """Does the jobs of an experiment with optimisers."""

    def check(self, contenders: list[Contender]) -> None:
        """Every contender is built once, so that a wrong option is an error before the first run."""
        from experiments.shared.optimizers.contenders import check

        for contender in contenders:
            check(contender)

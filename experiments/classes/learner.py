"""What every way to learn classes is: it reads groups of labelled texts, and answers."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from experiments.classes.constrain import Format
from experiments.classes.intents import Example
from experiments.shared.continual.study import LearnerContender


@dataclass
class Setup:
    """What a learner of classes starts from; `window` is what attention reaches, in tokens."""

    model: nn.Module
    form: Format
    window: int
    seed: int = 0
    batch: int = 64


class ClassLearner(ABC):
    """Learns from groups of labelled texts, and says to which of the seen classes a text belongs.

    Attributes:
        forwards, backwards: tokens run through the whole model while learning, forward and backward.
        parameters: numbers that learning changes.
    """

    def __init__(self, setup: Setup, contender: LearnerContender) -> None:
        self.setup, self.contender, self.options = setup, contender, contender.options
        self.forwards, self.backwards, self.parameters = 0.0, 0.0, 0
        self.draw = random.Random(setup.seed)

    @abstractmethod
    def learn(self, group: Sequence[Example]) -> None:
        """Read a group once."""

    @abstractmethod
    def answer(self, texts: Sequence[str], classes: Sequence[int]) -> dict[str, list[int]]:
        """The class of each text: as it comes ("plain") and with the classes' prior subtracted ("calibrated")."""

    def tokens(self, group: Sequence[Example]) -> list[int]:
        """A group as a stream."""
        return [token for e in group for token in self.setup.form.example(e.text, e.label)]

"""Search for an optimiser's settings on the user's own training, with optuna (`nestling tune`)."""

from nestling.tuning.objectives import Command, Failed, TrainingRun, load_callable
from nestling.tuning.space import DEFAULTS, Choice, Range, Space
from nestling.tuning.study import Outcome, tune

__all__ = [
    "DEFAULTS",
    "Choice",
    "Command",
    "Failed",
    "Outcome",
    "Range",
    "Space",
    "TrainingRun",
    "load_callable",
    "tune",
]

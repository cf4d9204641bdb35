"""Training: from text to a checkpoint."""

from nestling.training.config import (
    DataConfig,
    LoggingConfig,
    ModelConfig,
    OptimConfig,
    ScheduleConfig,
    TrainConfig,
)

__all__ = [
    "DataConfig",
    "LoggingConfig",
    "ModelConfig",
    "OptimConfig",
    "ScheduleConfig",
    "TrainConfig",
    "Trainer",
    "evaluate",
    "load_corpus",
    "train",
]


def __getattr__(name: str):
    """Bring in what needs torch only when it is asked for."""
    if name in ("Trainer", "train"):
        from nestling.training import loop

        return getattr(loop, name)
    if name == "load_corpus":
        from nestling.training.data import load_corpus

        return load_corpus
    if name == "evaluate":
        from nestling.training.evaluation import evaluate

        return evaluate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

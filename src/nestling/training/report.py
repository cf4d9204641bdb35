"""What a training run says: of every step, and at its end."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nestling.training.evaluation import Evaluation


@dataclass(frozen=True)
class Report:
    """One training step. `loss` in nats per token, `grad_norm` before clipping, `tokens` since the run began."""

    step: int
    tokens: int
    loss: float
    bits_per_byte: float
    lr: float
    grad_norm: float
    tokens_per_second: float
    skipped: bool
    slow_levels: tuple[int, ...]


@dataclass(frozen=True)
class Result:
    """How a run ended. `skipped` counts steps without a finite gradient; `evaluation` is None without held-out text and
    after an interruption."""

    step: int
    tokens: int
    evaluation: Evaluation | None
    checkpoint: Path
    seconds: float
    skipped: int
    interrupted: bool

    def to_dict(self, bins: int = 8) -> dict:
        """The result as JSON types."""
        values = {
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "skipped": self.skipped,
            "interrupted": self.interrupted,
            "checkpoint": str(self.checkpoint),
        }
        if self.evaluation is not None:
            values["loss"] = self.evaluation.loss
            values["bits_per_byte"] = self.evaluation.bits_per_byte
            values["loss_by_position"] = self.evaluation.binned(bins)
        return values

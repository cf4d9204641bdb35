"""How a session reads, and what is asked of its model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nestling.cms.learning_model import LearningMixin

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONTEXT = 2048


@dataclass(frozen=True)
class Settings:
    """How a session reads.

    Attributes:
        context: tokens after which attention begins anew; None: as the model says, else 2048 for a model with
            attention; 0: never.
        probe: tokens at each document's beginning that are scored before and after it, 0 for none.
        control: score them by the model as it was before it read anything, too.
        anchor: weight of the distance that texts of the model's own making may not go (`nestling.cms.anchor`), 0: none.
        check: score what is held out of each document (`nestling.sessions.check`), which `find_texts` must leave out.
        snapshots: how many documents' ends are kept and taken up again where they predict best
            (`nestling.sessions.snapshots`), 0: none.
        save_every: chunks between two checkpoints; 0: as often as costs a twentieth of the time.
    """

    context: int | None = None
    probe: int = 512
    control: bool = False
    check: bool = False
    save_every: int = 0
    anchor: float = 0.0
    snapshots: int = 0

    def __post_init__(self) -> None:
        for name in ("probe", "save_every", "snapshots"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, not {getattr(self, name)}")
        if not 0 <= self.anchor < math.inf:
            raise ValueError(f"anchor must be finite and not negative (0 for none), not {self.anchor}")


def check_model(model: PreTrainedModel) -> None:
    """Raise ValueError unless a model has levels that learn from what it reads."""
    if not isinstance(model, LearningMixin) or not model.learner.fast:
        raise ValueError(
            f"this {type(model).__name__} has no levels that learn while it reads: make one from a pre-trained model "
            "with nestling convert, or train a Hope model with cms_levels that have a chunk_size"
        )


def choose_context(model: PreTrainedModel, wanted: int | None) -> int | None:
    """Tokens after which attention begins anew, None for never.

    Raises:
        ValueError: no multiple of the fastest chunk, or longer than the model may see.
    """
    size, limit = model.learner.chunk_size, getattr(model.config, "max_position_embeddings", None)
    if wanted is None:
        if model.learner.context or "attention" not in getattr(model.config, "mixer_names", ["attention"]):
            return model.learner.context  # a recurrent state is bounded as it is
        return max(size, min(CONTEXT, limit or CONTEXT) // size * size)
    if wanted < 0 or wanted % size:
        raise ValueError(
            f"context {wanted} is no multiple of the fastest level's chunk_size {size}: take "
            f"{max(1, wanted // size) * size}, or 0 for never"
        )
    if limit and wanted > limit:
        raise ValueError(f"context {wanted} is longer than the model's max_position_embeddings {limit}: take less")
    return wanted or None

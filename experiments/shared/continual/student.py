"""A contender at work: its model, and what it has become by reading streams of one text after another."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from experiments.shared.continual.streams import adapted, finetune, learner, owned, pieces, read
from experiments.shared.continual.study import LearnerContender

FINE_TUNING = "fine-tuning"  # of the weights that the contender's levels own; of all weights if it has no levels


class Student:
    """Reads, and can be looked at in between.

    Args:
        context: tokens after which attention begins anew, tokens of a step of fine-tuning (unless the contender's
            options have a `step`), and tokens of a window, whose mean losses `read` returns.
    """

    def __init__(self, model: nn.Module, contender: LearnerContender, context: int) -> None:
        self.contender, self.context, self.model = contender, context, model
        if contender.method == FINE_TUNING or contender.levels:
            stack = contender.stack | ({"context": context} if contender.levels else {})
            self.model = learner(model, replace(contender, stack=stack))
        self.cache: Any = None
        self.optimizer: torch.optim.Optimizer | None = None
        self.read_so_far: list[int] = []

    def read(self, stream: Sequence[int]) -> list[float]:
        """Go on reading; the mean loss in nats of every window, at first sight."""
        ids, options = torch.tensor([list(stream)]), dict(self.contender.options)
        self.read_so_far += stream
        if self.contender.method == FINE_TUNING:
            step = options.pop("step", self.context)
            tuned = owned(self.model) if self.contender.levels else self.model.parameters()
            losses, self.optimizer = finetune(
                self.model, pieces(ids, step), parameters=tuned, optimizer=self.optimizer, **options
            )
            return [part.mean().item() for part in torch.tensor(losses).split(max(1, self.context // step))]
        reach = None if self.contender.levels else options.get("context", self.context)
        losses, self.cache = read(self.model, ids, self.cache, reach)
        return [part.mean().item() for part in losses[0].split(self.context)]

    def adapted(self, cache: Any = None) -> AbstractContextManager[nn.Module]:
        """Inside, the model knows what it has learned (or what is in this cache) and learns nothing more; what it read
        is out of its context."""
        return adapted(self.model, self.cache if cache is None else cache)

    @property
    def updates(self) -> list[float]:
        """Updates of each level so far."""
        levels = self.cache.levels.levels if self.contender.levels and self.cache is not None else ()
        return [0.0 if s is None else float(s.updates if s.surprise is None else s.surprise.updates[0]) for s in levels]

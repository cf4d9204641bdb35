"""Classifiers on what a model makes of a text; the model stays as it is."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from experiments.classes.intents import Example
from experiments.classes.learner import ClassLearner, Setup
from experiments.shared.continual.streams import pad_left
from experiments.shared.continual.study import LearnerContender


class Features(ClassLearner):
    """What the model makes of a text, the mean of its last hidden states; it stays as it is."""

    @torch.no_grad()
    def features(self, texts: Sequence[str]) -> Tensor:
        """[N, D], centred and scaled as the first texts."""
        found, order = torch.empty(0), sorted(range(len(texts)), key=lambda i: len(texts[i]))
        for at in range(0, len(order), self.setup.batch):
            part = order[at : at + self.setup.batch]
            ids, mask = pad_left([self.setup.form.encode(texts[i]) for i in part])
            where = (mask.cumsum(1) - 1).clamp_min(0)
            hidden = self.setup.model.base_model(ids, attention_mask=mask, position_ids=where, use_cache=False)[
                0
            ].float()
            pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
            found = found if len(found) else pooled.new_empty(len(texts), pooled.shape[1])
            found[part] = pooled
            self.forwards += int(mask.sum())
        if not hasattr(self, "scale"):
            self.shift, self.scale = found.mean(0), found.std(0) + 1e-6
        return (found - self.shift) / self.scale

    def answer(self, texts: Sequence[str], classes: Sequence[int]) -> dict[str, list[int]]:
        before = self.forwards  # of learning alone
        scores = self.scores(self.features(texts))[:, list(classes)]
        self.forwards = before
        found = [classes[i] for i in scores.argmax(-1).tolist()]
        return {"plain": found, "calibrated": found}

    @abstractmethod
    def scores(self, features: Tensor) -> Tensor:
        """[N, D] -> [N, all classes]."""


class LinearProbe(Features):
    """A linear classifier, one example after the other by SGD. Options: lr."""

    weight: Tensor | None = None

    def learn(self, group: Sequence[Example]) -> None:
        x, count = self.features([e.text for e in group]), len(self.setup.form.names)
        if self.weight is None:
            self.weight = torch.zeros(count, x.shape[1] + 1)
            self.parameters, self.met = self.weight.numel(), torch.zeros(count, dtype=torch.bool)
        self.met[[e.label for e in group]] = True
        for row, e in zip(_with_one(x), group):
            share = (self.weight @ row).masked_fill(~self.met, -torch.inf).softmax(-1)
            share[e.label] -= 1
            self.weight -= self.options["lr"] / row.square().sum() * torch.outer(share, row)

    def scores(self, features: Tensor) -> Tensor:
        return _with_one(features) @ self.weight.T


class ClassMeans(Features):
    """The nearest of the classes' means."""

    def __init__(self, setup: Setup, contender: LearnerContender) -> None:
        super().__init__(setup, contender)
        self.sums: Tensor | None = None

    def learn(self, group: Sequence[Example]) -> None:
        x, count = self.features([e.text for e in group]), len(self.setup.form.names)
        if self.sums is None:
            self.sums, self.counts = torch.zeros(count, x.shape[1]), torch.zeros(count, 1)
            self.parameters = self.sums.numel()
        labels = torch.tensor([e.label for e in group])
        self.sums.index_add_(0, labels, x)
        self.counts.index_add_(0, labels, torch.ones(len(labels), 1))

    def scores(self, features: Tensor) -> Tensor:
        return F.normalize(features, dim=1) @ F.normalize(self.sums / self.counts.clamp_min(1), dim=1).T


def _with_one(x: Tensor) -> Tensor:
    return torch.cat([x, x.new_ones(len(x), 1)], 1)

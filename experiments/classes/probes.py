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
from nestling.sessions.labels import ASK, Labels


class Exact(ClassLearner):
    """`nestling label`: an exact memory on what the model makes of a text; it stays as it is."""

    def __init__(self, setup: Setup, contender: LearnerContender) -> None:
        super().__init__(setup, contender)
        self.known = Labels(setup.model, setup.form.tokenizer)

    def learn(self, group: Sequence[Example]) -> None:
        self.known.learn([e.text for e in group], [str(e.label) for e in group])
        self.forwards += read(self.setup, [e.text for e in group])
        dim = self.known.memory.dim
        self.parameters = dim * (dim + 1) // 2 + len(self.known.names) * dim

    def answer(self, texts: Sequence[str], classes: Sequence[int]) -> dict[str, list[int]]:
        found = [int(answer.labels[0]) for answer in self.known.answer(texts)]
        return {"plain": found, "calibrated": found}


def read(setup: Setup, texts: Sequence[str]) -> int:
    """Tokens that the keys of `nestling label` take."""
    return sum(len(setup.form.encode(text)) + len(setup.form.encode(ASK)) for text in texts)


class Features(ClassLearner):
    """What the model makes of a text, the mean of its last hidden states; it stays as it is.

    Options: keys (its keys of `nestling label` instead).
    """

    def features(self, texts: Sequence[str]) -> Tensor:
        """[N, D], centred and scaled as the first texts."""
        if self.options.get("keys"):
            found = Labels(self.setup.model, self.setup.form.tokenizer).keys(texts).float()
            self.forwards += read(self.setup, texts)
        else:
            found = self.means(texts)
        if not hasattr(self, "scale"):
            self.shift, self.scale = found.mean(0), found.std(0) + 1e-6
        return (found - self.shift) / self.scale

    @torch.no_grad()
    def means(self, texts: Sequence[str]) -> Tensor:
        """[N, D]: the mean of the last hidden states."""
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
        return found

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

"""What keeps a learner from forgetting, besides levels: what it read is read again, or its weights are held back."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from experiments.shared.continual.streams import trained
from nestling.cms.fast_linear import applied

TOKEN_BYTES = 2  # of a token of a kept text


def nats(logits: Tensor, targets: Tensor) -> Tensor:
    """The loss of each target [B, n]."""
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none").view(targets.shape)


class Replay:
    """All that was read; passages of it, from anywhere alike, are read again between the new ones."""

    def __init__(self) -> None:
        self.rows: list[Tensor] = []  # [B, n] each
        self.draw = random.Random(0)

    def keep(self, row: Tensor) -> None:
        """Tokens [B, n] were read."""
        self.rows.append(row)

    def passage(self, count: int) -> Tensor:
        """`count` tokens and the one that comes before them, from one place in every stream: [B, count + 1]."""
        text = torch.cat(self.rows, 1)
        at = self.draw.randint(0, text.shape[1] - count - 1)
        return text[:, at : at + count + 1]

    @property
    def nbytes(self) -> int:
        """Of what it holds."""
        return sum(row.numel() for row in self.rows) * TOKEN_BYTES


class Consolidation:
    """Elastic weight consolidation of one dense level: what mattered to the texts before is held where it was.

    At a text's end the squared gradients of the difference D, means over passages of it, are added to F, and D* = D.
    After every step D <- (D + c F D*) / (1 + c F), an implicit step on the pull c/2 F (D - D*)^2, which no strength
    makes unstable.
    """

    def __init__(self, strength: float, passages: int, size: int) -> None:
        self.strength, self.passages, self.size = strength, passages, size
        self.text: list[Tensor] = []  # what was read of the text that goes on, [B, n] each
        self.fisher: list[Tensor] = []
        self.anchor: list[Tensor] = []
        self.draw = random.Random(0)

    def keep(self, row: Tensor) -> None:
        """Tokens [B, n] were read."""
        self.text.append(row)

    def pulled(self, deltas: tuple[Tensor, ...]) -> list[Tensor]:
        """The differences after a step of the level."""
        if not self.fisher:
            return [*deltas]
        parts = zip(deltas, self.fisher, self.anchor, strict=True)
        return [(d + self.strength * f * a) / (1 + self.strength * f) for d, f, a in parts]

    def consolidate(self, model: Any, deltas: tuple[Tensor, ...]) -> None:
        """A text has ended, of which the level has learned `deltas`."""
        modules = [m for level in model.learner.modules for m in level]
        tuned = [d.detach().clone().requires_grad_() for d in deltas]
        text, found = torch.cat(self.text, 1), [torch.zeros_like(d) for d in deltas]
        with applied(modules, tuned), trained(model, tuned), torch.enable_grad():
            for _ in range(self.passages):
                at = self.draw.randint(0, text.shape[1] - self.size - 1)
                row = text[:, at : at + self.size + 1]
                lost = nats(model(row[:, :-1], use_cache=False).logits, row[:, 1:]).mean(1).sum()
                for total, g in zip(found, torch.autograd.grad(lost, tuned), strict=True):
                    total.addcmul_(g, g, value=1 / self.passages)
        self.fisher = [f + g for f, g in zip(self.fisher, found)] if self.fisher else found
        self.anchor, self.text = [*deltas], []

    @property
    def nbytes(self) -> int:
        """Of what it holds."""
        return sum(t.nbytes for t in (*self.fisher, *self.anchor))

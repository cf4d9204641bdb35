"""Objectives an associative memory may learn by: each is the gradient of its loss at the memory's output."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Objective(Protocol):
    """A loss of a memory's prediction for a key, given the target."""

    uses_prediction: bool

    def error(self, prediction: Tensor | None, target: Tensor) -> Tensor:
        """Gradient of the loss at the prediction, [..., C, o]."""

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """The loss of each token, [..., C]."""


class L2:
    """1/2 |M(k) - v|^2: regression; DGD and the delta rule follow from it (NL Eqs. 56, 65, 88)."""

    uses_prediction = True

    def error(self, prediction, target):
        return prediction - target

    def loss(self, prediction, target):
        return 0.5 * (prediction - target).square().sum(-1)


class DotProduct:
    """-<M(k), v>: Hebbian, the objective of linear attention (NL Eqs. 14-18, 64)."""

    uses_prediction = False

    def error(self, prediction, target):
        return -target

    def loss(self, prediction, target):
        return -(prediction * target).sum(-1)


OBJECTIVES: dict[str, Objective] = {"l2": L2(), "dot": DotProduct()}

"""Preconditioners: maps P of gradients to a chosen coordinate system, each with its own memory (NL Eqs. 38-47).

`Diagonal` and `Outer` are the closed forms of App. B as running averages: the element-wise L2 memory with P = sqrt(H)
(RMSprop, Adam) and its outer-product version (full-matrix AdaGrad, one-sided Shampoo). `Orthogonal` is Muon's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from nestling.ops.orthogonalize import orthogonalize
from nestling.optim.closed_forms import matrix_power


class Preconditioner(Protocol):
    """P, with whatever it remembers in the optimiser's state."""

    def start(self, parameter: Tensor) -> dict[str, Tensor]:
        """Its state for a parameter."""

    def apply(self, state: dict[str, Tensor], gradient: Tensor) -> Tensor:
        """P g for g [o, n], after learning from it."""


def _zeros(parameter: Tensor, *shape: int) -> Tensor:
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    return torch.zeros(shape, dtype=dtype, device=parameter.device)


def _average(average: Tensor, count: Tensor, new: Tensor, beta: float, corrected: bool) -> Tensor:
    """Move a running average towards `new`; the average, without the bias of its start at zero."""
    average.mul_(beta).add_(new, alpha=1 - beta)
    count.add_(1)
    return average / (1 - beta**count) if corrected else average


@dataclass(frozen=True)
class Diagonal:
    """g / (sqrt(H) + eps), H a running average of squares: RMSprop's and Adam's denominator (NL Eqs. 101-105)."""

    beta: float = 0.999
    eps: float = 1e-8
    corrected: bool = True

    def start(self, parameter):
        return {"square": _zeros(parameter, *parameter.shape), "count": _zeros(parameter)}

    def apply(self, state, gradient):
        square = state["square"].view(gradient.shape)
        square = _average(square, state["count"], gradient.square(), self.beta, self.corrected)
        return gradient / square.sqrt().add_(self.eps)


@dataclass(frozen=True)
class Outer:
    """H^(-1/2) g or g H^(-1/2) on the smaller side of g, H a running average of g g^T or g^T g (NL Eqs. 106-111).

    Eigenvalues of H below eps times the largest count as that. It costs an eigendecomposition a step: for small layers.
    """

    beta: float = 0.99
    eps: float = 1e-8

    def start(self, parameter):
        rows = parameter.shape[0] if parameter.dim() > 1 else 1
        side = min(rows, parameter.numel() // max(rows, 1))
        return {"outer": _zeros(parameter, side, side), "count": _zeros(parameter)}

    def apply(self, state, gradient):
        wide = gradient.shape[0] <= gradient.shape[1]
        g = gradient if wide else gradient.mT
        h = _average(state["outer"], state["count"], g @ g.mT, self.beta, True)
        g = matrix_power(h, -0.5, self.eps) @ g
        return g if wide else g.mT


@dataclass(frozen=True)
class Orthogonal:
    """The nearest matrix with orthonormal rows or columns, by Newton-Schulz, scaled to a root mean square of 1 at most
    (NL Eqs. 42-44); a single row becomes its unit vector times the root of its length."""

    steps: int = 5

    def start(self, parameter):
        return {}

    def apply(self, state, gradient):
        return orthogonalize(gradient, self.steps) * math.sqrt(max(gradient.shape))


@dataclass(frozen=True)
class Map:
    """Any function of a gradient [o, n] that remembers nothing."""

    function: Callable[[Tensor], Tensor]

    def start(self, parameter):
        return {}

    def apply(self, state, gradient):
        return self.function(gradient)

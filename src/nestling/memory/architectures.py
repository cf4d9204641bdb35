"""Architectures of an associative memory, as functions of fast weights.

An architecture says what its linear layers are and how they are chained; it holds no parameters. `forward` is written
once over `linear(layer, x)`, so the same lines give the plain forward, the forward that records what the learning rule
needs, and the read of a state that changes at every token. Weights have any leading dimensions [..., o, i].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Linear = Callable[[int, Tensor], Tensor]


class Architecture(Protocol):
    """What the learning rule asks of a memory's architecture."""

    def shapes(self) -> list[tuple[int, int]]:
        """(o, i) of each linear layer, first layer first."""

    def initial(self) -> list[float]:
        """Standard deviation of each layer's initial weights, for inputs of norm 1."""

    def forward(self, z: Tensor, linear: Linear) -> Tensor:
        """Output for inputs z [..., C, i], where `linear(l, x)` is layer l's product with x."""

    def errors(self, weights: list[Tensor], products: list[Tensor], error: Tensor) -> list[Tensor]:
        """Gradient of the objective at each layer's product, from its gradient `error` at the output."""


@dataclass(frozen=True)
class LinearMemory:
    """M(z) = W z (NL Eqs. 64, 65, 93)."""

    inputs: int
    outputs: int

    def shapes(self):
        return [(self.outputs, self.inputs)]

    def initial(self):
        return [self.inputs**-0.5]

    def forward(self, z, linear):
        return linear(0, z)

    def errors(self, weights, products, error):
        return [error]


@dataclass(frozen=True)
class MLPMemory:
    """M(z) = z + W1 silu(W2 z), the residual optional (NL Eq. 89). Layer 0 is W2, layer 1 is W1.

    inner: the input is added before W1 instead, M(z) = W1 (z + silu(W2 z)): a linear memory with a deep key.
    """

    inputs: int
    outputs: int
    hidden: int
    residual: bool = True
    inner: bool = False

    def __post_init__(self):
        if self.inner and (self.residual or self.hidden != self.inputs):
            raise ValueError("an inner skip needs a hidden width of the input's, and no residual around it")

    def shapes(self):
        return [(self.hidden, self.inputs), (self.outputs, self.hidden)]

    def initial(self):
        if self.inner:  # near the linear memory
            return [0.1, self.hidden**-0.5]
        # pre-activations of order 1, and an output that begins small beside the residual
        return [1.0, 1.0 / self.hidden]

    def forward(self, z, linear):
        hidden = silu(linear(0, z))
        out = linear(1, z + hidden if self.inner else hidden)
        return z + out if self.residual else out

    def errors(self, weights, products, error):
        return [(error @ weights[1]) * silu_slope(products[0]), error]


class _SiluSlope(torch.autograd.Function):
    """silu'(a) in few passes; its own gradient is silu''(a)."""

    @staticmethod
    def forward(ctx, a):
        s = torch.sigmoid(a)
        ctx.save_for_backward(a)
        return torch.addcmul(s, a, s - s * s)

    @staticmethod
    def backward(ctx, grad):
        (a,) = ctx.saved_tensors
        s = torch.sigmoid(a)
        return grad * (s - s * s) * torch.addcmul(torch.full_like(a, 2.0), a, 1 - 2 * s)


silu = torch.nn.functional.silu
silu_slope = _SiluSlope.apply


def product(weight: Tensor, x: Tensor) -> Tensor:
    """W x for every token: weight [..., o, i], x [..., C, i] to [..., C, o]."""
    return x @ weight.transpose(-1, -2)


def plain(weights: list[Tensor]) -> Linear:
    """The `linear` of fixed weights."""
    return lambda layer, x: product(weights[layer], x)

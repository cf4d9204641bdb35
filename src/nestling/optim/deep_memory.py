"""Deep momentum: the memory of gradients is an MLP (NL Eq. 50)."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from nestling.optim.checks import check_number, check_whole
from nestling.optim.memories import SMALLEST, as_rows, rows_of, state_dtype


@dataclass(frozen=True)
class MLP:
    """m(u) = B + s W1 tanh(W2 u / s'), for each row of the gradient u [o, n]; B [o, n], W1 [n, h], W2 [h, n].

    s and s' are the root mean square row norms of the value P u and of the key u, so that rows enter with norm 1 and
    m(c u) = c m(u) for a memory filled by gradients scaled by c. B, the bias of the output, is what momentum is: for
    hidden = 0 nothing else is left. W1 and W2 are learned by the mean over rows, from W1 = 0 and a random W2, and decay
    towards that start (towards zero they would die together). With the dot product W1 W2 answer a gradient with past
    ones that resemble it.

    Attributes:
        hidden: h, width of the hidden layer.
        rate: size of a write into W1 and W2, beside one of B.
        seed: of W2's initial values, which depend on it and on the parameter's shape alone.
    """

    hidden: int = 16
    rate: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_whole("hidden", self.hidden, 0)
        check_number("rate", self.rate)

    def start(self, parameter):
        dtype, device = state_dtype(parameter), parameter.device
        state = {"momentum": torch.zeros(parameter.shape, dtype=dtype, device=device)}
        if not self.hidden:
            return state
        inputs = as_rows(parameter).shape[1]
        generator = torch.Generator().manual_seed(zlib.crc32(repr((self.seed, tuple(parameter.shape))).encode()))
        initial = torch.randn(self.hidden, inputs, generator=generator, dtype=dtype).to(device)
        out = torch.zeros(inputs, self.hidden, dtype=dtype, device=device)
        return state | {"out": out, "in": initial.clone(), "initial": initial}

    def write(self, state, key, value, objective, decay, rate):
        bias, scale = rows_of(state["momentum"]), row_norm(value)
        error = value / scale
        if not self.hidden:
            if objective.erase:
                error = error + objective.erase * bias / scale
                rate = rate * objective.step(1.0)
            bias.mul_(decay).sub_(rate * scale * error)
            return
        inputs, out = key / row_norm(key), state["out"]
        hidden, slope = self._hidden(state, inputs)
        if objective.erase:
            error = error + objective.erase * (bias / scale + hidden @ out.mT)
            # a bound of the largest eigenvalue of the tangent kernel: B's, W1's and W2's share
            rate = rate * objective.step(1.0 + hidden.square().sum(1).mean() + out.square().sum() / self.hidden)
        mean = rate * self.rate / max(len(key), 1)
        into = ((error @ out) * slope).mT @ inputs
        bias.mul_(decay).sub_(rate * scale * error)
        state["in"].sub_(state["initial"]).mul_(decay).sub_(mean * into).add_(state["initial"])
        out.mul_(decay).sub_(mean * (error.mT @ hidden))

    def read(self, state, key, value):
        bias = rows_of(state["momentum"])
        if not self.hidden:
            return bias
        hidden, _ = self._hidden(state, key / row_norm(key))
        return bias + row_norm(value) * (hidden @ state["out"].mT)

    def _hidden(self, state: dict[str, Tensor], inputs: Tensor) -> tuple[Tensor, Tensor]:
        """The hidden layer [o, h], of norm 1 at most, and its slope."""
        activation = torch.tanh(inputs @ state["in"].mT)
        size = 1 / math.sqrt(self.hidden)
        return activation * size, (1 - activation.square()) * size


def row_norm(matrix: Tensor) -> Tensor:
    """Root mean square of the norms of the rows, as a divisor: never 0."""
    return (torch.linalg.vector_norm(matrix) / math.sqrt(max(len(matrix), 1))).clamp(min=SMALLEST)

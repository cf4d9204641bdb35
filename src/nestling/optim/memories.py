"""A momentum is an associative memory of gradients (NL Sec. 4, App. C): one engine, whose settings are the optimisers.

At every step the memory m is shown a key, the gradient g, and takes one step of gradient descent on its own objective,
with decay alpha; what it then reads out moves the weights:

    m <- alpha m - rate * dL(m; phi(g), P g) / dm            W <- W + lr * sigma(m(g))

| choice | names here | equation |
|---|---|---|
| values | `preconditioner` P: none, or a map of gradients (`optim.preconditioners`) | NL Eq. 47 |
| objective L | `DotProduct` (Hebbian), `L2` (a delta rule: gradient-dependent decay) | NL Eqs. 33, 49 |
| architecture | `Matrix` (of the parameter's shape), `MLP` (`optim.deep_memory`) | NL Eq. 50 |
| keys | `features` phi | NL Eq. 51 |
| output | `output` sigma | NL Eq. 52 |

A gradient is seen as a matrix [o, n], a row for each output: a convolution's is flattened to [o, i * kh * kw], and a
vector or a scalar is one row [1, n]. Its rows are the keys: row r is stored under the value e_r, so a matrix memory
under the dot product holds the sum of the gradients themselves, which is momentum. Memories are at least float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from nestling.optim.checks import check_choice, check_fraction, check_number
from nestling.optim.preconditioners import Preconditioner

State = dict[str, Tensor]
SMALLEST = 1e-15  # norm below which a key is not brought to norm 1: squares of smaller entries leave float32


def as_rows(tensor: Tensor) -> Tensor:
    """A gradient or parameter of any shape as a matrix [o, n] of rows; a vector or scalar is one row."""
    return tensor.reshape(tensor.shape[0], -1) if tensor.dim() > 1 and tensor.numel() else tensor.reshape(1, -1)


def rows_of(memory: Tensor) -> Tensor:
    """`as_rows` to be written into: a view of a memory, which is contiguous (of anything else it raises)."""
    return memory.view(memory.shape[0] if memory.dim() > 1 and memory.numel() else 1, -1)


def state_dtype(parameter: Tensor) -> torch.dtype:
    """The type a memory is kept in: the parameter's, but at least float32."""
    return torch.promote_types(parameter.dtype, torch.float32)


def identity(gradient: Tensor) -> Tensor:
    return gradient


def unit(gradient: Tensor) -> Tensor:
    """g / |g| (Frobenius): a key that says where the gradient points and not how long it is."""
    return gradient / torch.linalg.vector_norm(gradient).clamp(min=SMALLEST)


FEATURES: dict[str, Callable[[Tensor], Tensor]] = {"identity": identity, "unit": unit}


@dataclass(frozen=True)
class DotProduct:
    """<m(k), v>, the Hebbian objective: its gradient is the value, whatever the memory already holds (NL Eq. 33)."""

    erase = 0.0

    def step(self, curvature: Tensor | float) -> float:
        """Size of a write, for the largest eigenvalue of the memory's tangent kernel at the keys."""
        return 1.0


@dataclass(frozen=True)
class L2:
    """erase/2 |m(k) + v / erase|^2, regression: what the memory reads for a key is erased before the write (NL Eq. 49).

    Attributes:
        erase: weight of the erasure, above 0; towards 0 this is `DotProduct`.
        literal: gradient descent as printed, stable only while erase |k|^2 < 1 + alpha. Otherwise the step is divided
            by 1 + erase |k|^2: for one key the exact minimiser (decision D1), and no expansion for any.
    """

    erase: float = 1.0
    literal: bool = False

    def __post_init__(self) -> None:
        check_number("erase", self.erase, above=True)

    def step(self, curvature: Tensor | float) -> Tensor | float:
        return 1.0 if self.literal else 1.0 / (1.0 + self.erase * curvature)


Objective = DotProduct | L2


class Architecture(Protocol):
    """What holds the memory. `state` is a dict of tensors; keys and values are [o, n]."""

    def start(self, parameter: Tensor) -> State:
        """An empty memory for a parameter."""

    def write(self, state: State, key: Tensor, value: Tensor, objective: Objective, decay: float, rate: float) -> None:
        """m <- decay m - rate dL(m; key, value)/dm, in place."""

    def read(self, state: State, key: Tensor, value: Tensor) -> Tensor:
        """m(key), [o, n]."""


@dataclass(frozen=True)
class Matrix:
    """m of the parameter's shape, one number for each weight; it is its own output, whatever the key (NL Eqs. 33, 49).

    L2:  m <- m (alpha I - e k^T k) - (e / erase) P k,  e = rate * erase / (1 + erase |k|^2); rows of k are keys.
    """

    def start(self, parameter):
        return {"momentum": torch.zeros(parameter.shape, dtype=state_dtype(parameter), device=parameter.device)}

    def write(self, state, key, value, objective, decay, rate):
        memory = rows_of(state["momentum"])
        if objective.erase:
            rate = rate * objective.step(key.square().sum())
            value = torch.add(value, recall(memory, key), alpha=objective.erase)
        memory.mul_(decay)
        memory.sub_(rate * value) if isinstance(rate, Tensor) else memory.add_(value, alpha=-rate)

    def read(self, state, key, value):
        return rows_of(state["momentum"])


def recall(memory: Tensor, key: Tensor) -> Tensor:
    """m k^T k: the part of a matrix memory [o, n] that answers to the rows of a key [o, n]; on the smaller side."""
    if memory.shape[0] <= memory.shape[1]:
        return (memory @ key.mT) @ key
    return memory @ (key.mT @ key)


@dataclass(frozen=True)
class GradientMemory:
    """A choice of memory: everything that makes one momentum differ from another.

    Attributes:
        decay: alpha in [0, 1), what the memory keeps of itself at a step.
        rate: size of a write: torch's 1 - dampening. 1 sums gradients, 1 - decay averages them.
        preconditioner: P, or None for the identity.
        objective: `DotProduct()` or `L2(erase)`.
        architecture: `Matrix()` or `deep_memory.MLP(...)`.
        features: phi, a name of `FEATURES` or a function of a gradient [o, n]. The norm that "unit" takes from the key
            is given back to the value, so the write P g keeps its size.
        output: sigma, a function of what is read, [o, n].
        nesterov: read the memory as it would stand after the same gradient came once more.
    """

    decay: float = 0.9
    rate: float = 1.0
    preconditioner: Preconditioner | None = None
    objective: Objective = field(default_factory=DotProduct)
    architecture: Architecture = field(default_factory=Matrix)
    features: str | Callable[[Tensor], Tensor] = "identity"
    output: Callable[[Tensor], Tensor] = identity
    nesterov: bool = False

    def __post_init__(self) -> None:
        check_fraction("decay", self.decay)
        check_number("rate", self.rate, above=True)
        if not callable(self.features):
            check_choice("features", self.features, FEATURES)

    def start(self, parameter: Tensor) -> State:
        """The empty memory of a parameter."""
        state = self.architecture.start(parameter)
        return state | (self.preconditioner.start(parameter) if self.preconditioner else {})

    def step(self, state: State, gradient: Tensor) -> Tensor:
        """Write a gradient and read the memory: the direction to add to the weights, in the gradient's shape."""
        rows = as_rows(gradient).to(state["momentum"].dtype)
        key = FEATURES.get(self.features, self.features)(rows)
        value = rows if self.features in ("identity", "unit") else key
        if self.preconditioner:
            value = self.preconditioner.apply(state, value)
        self.architecture.write(state, key, value, self.objective, self.decay, self.rate)
        read = self.architecture.read(state, key, value)
        if self.nesterov:
            read = (-self.rate * value).add(read, alpha=self.decay)
        return self.output(read).reshape(gradient.shape)

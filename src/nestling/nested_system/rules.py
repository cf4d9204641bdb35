"""What an optimiser is as memories: a rule for the weights, and the memories it keeps of their gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction

import torch
from torch import Tensor

Shapes = Callable[[Tensor], list[tuple[int, ...]]]


def like(parameter: Tensor) -> list[tuple[int, ...]]:
    """A state of the parameter's shape."""
    return [tuple(parameter.shape)]


def scalar(parameter: Tensor) -> list[tuple[int, ...]]:
    """A state of one number."""
    return [()]


@dataclass(frozen=True)
class OptimizerMemory:
    """A memory that an optimiser keeps for each parameter.

    Attributes:
        kind: such as "momentum".  keys, values, objective, retrieval, update: as in AssociativeMemory.
        states: keys of the optimiser's state and the shape each has for a parameter.
        dtype: the type of a state, from its name and the parameter's type; None is the parameter's own.
        watch: the states whose changes are its updates; () is all that are no counters.
        rate: updates per step.  steps: inner steps of its solver.
        reads: what it learns from: "gradient", "weights", or the kind of another memory.
        feeds: what takes its output: "weights", or the kind of another memory; "" for none.
        waits: its state at t needs that of `reads` at t.
        macs: multiply-adds of an update, per parameter.  work: the same for a whole parameter, where it is not linear.
    """

    kind: str
    update: str
    objective: str
    keys: str = "—"
    values: str = "g, the gradients"
    retrieval: str = ""
    states: dict[str, Shapes] = field(default_factory=dict)
    dtype: Callable[[str, torch.dtype], torch.dtype] | None = None
    watch: tuple[str, ...] = ()
    rate: Fraction | int = 1
    steps: int = 1
    reads: str = "gradient"
    feeds: str = "weights"
    waits: bool = True
    macs: int = 1
    work: Callable[[Tensor], int] | None = None
    solver: str = "gradient"
    rule: str = "gradient descent, one step"
    note: str = ""

    def dtype_of(self, state: str, parameter: torch.dtype) -> torch.dtype:
        """The type a state is kept in; a counter is float32."""
        if self.states.get(state) is scalar:
            return torch.float32
        return parameter if self.dtype is None else self.dtype(state, parameter)


def at_least_float32(state: str, parameter: torch.dtype) -> torch.dtype:
    """The type nestling's optimisers keep their memories in."""
    return torch.promote_types(parameter, torch.float32)


@dataclass(frozen=True)
class Rule:
    """How an optimiser updates the weights of a parameter group.

    Attributes:
        name: of the rule.  update: of the weights.  rate: the step size in words.
        memories: what it keeps.  macs: multiply-adds of the weights' own update, per parameter.
        objective: of the weights' problem where it is not the usual one.
        takes: which parameters of the group the rule is for; None is all.
        also: the rule of the others.
    """

    name: str
    update: str
    rate: str = ""
    memories: tuple[OptimizerMemory, ...] = ()
    macs: int = 1
    objective: str = ""
    takes: Callable[[Tensor], bool] | None = None
    also: Rule | None = None

    def of(self, parameter: Tensor) -> Rule:
        """The rule for one parameter."""
        if self.takes is None or self.takes(parameter) or self.also is None:
            return self
        return self.also.of(parameter)

"""Who trains what: every parameter's rule and frequency, from an optimiser, several, or a run's LevelOptimizers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nestling.nested_system.describe import description_of
from nestling.nested_system.frequency import EVERY_STEP, Frequency
from nestling.nested_system.reading.inventory import Inventory
from nestling.nested_system.rules import OptimizerMemory, Rule


@dataclass(frozen=True)
class Trained:
    """How one parameter is trained: by which optimiser (its index), by which rule, how often."""

    optimizer: int
    rule: Rule
    frequency: Frequency


@dataclass
class Training:
    """All that trains a model.

    Attributes:
        optimizers: in order.  parameters: by name, how each is trained.
        accumulation: backward passes per step.  schedulers: in words.
        foreign: parameters of an optimiser that the model does not have.
        summed: names of parameters whose gradients are summed over several steps (slow levels).
    """

    optimizers: list[torch.optim.Optimizer] = field(default_factory=list)
    parameters: dict[str, Trained] = field(default_factory=dict)
    accumulation: int = 1
    schedulers: list[str] = field(default_factory=list)
    foreign: list[int] = field(default_factory=list)
    summed: dict[str, Frequency] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The optimisers' names."""
        return " + ".join(dict.fromkeys(type(optimizer).__name__ for optimizer in self.optimizers))


def training_of(optimizer: Any, scheduler: Any, accumulation: int, inventory: Inventory) -> Training:
    """How every parameter is trained.

    Raises:
        TypeError: something that is no optimiser or scheduler.  ValueError: none of the parameters is the model's.
    """
    training = Training(accumulation=accumulation, schedulers=[_schedule(s) for s in _several(scheduler)])
    for one, frequency, summed in _optimizers(optimizer):
        index = len(training.optimizers)
        training.optimizers.append(one)
        foreign = 0
        for group in one.param_groups:
            rule = rule_of(one, group)
            for parameter in group["params"]:
                name = inventory.name_of(parameter)
                if name is None:
                    foreign += parameter.numel()
                elif parameter.requires_grad:
                    training.parameters[name] = Trained(index, rule.of(parameter), frequency)
                    if summed:
                        training.summed[name] = frequency
        if foreign:
            training.foreign.append(foreign)
        if foreign and not training.parameters:
            raise ValueError(
                f"{type(one).__name__} trains none of the model's parameters: was it made for another model?"
            )
    return training


def _several(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


def _optimizers(optimizer: Any) -> Iterator[tuple[torch.optim.Optimizer, Frequency, bool]]:
    for one in _several(optimizer):
        if isinstance(one, torch.optim.Optimizer):
            yield one, EVERY_STEP, False
        elif type(one).__name__ == "LevelOptimizers":  # a run's: slow levels have optimisers of their own
            for group in one.groups:
                frequency = EVERY_STEP if group.level is None else Frequency.every(one.schedule.chunk_size(group.level))
                for inner in group.optimizers:
                    yield inner, frequency, group.sums is not None
        else:
            hint = " (give an instance, not the class)" if isinstance(one, type) else ""
            raise TypeError(f"optimizer must be a torch.optim.Optimizer; got {one!r:.80}{hint}")


def _schedule(scheduler: Any) -> str:
    if not hasattr(scheduler, "step") or not hasattr(scheduler, "optimizer"):
        raise TypeError(f"scheduler must be a torch learning-rate scheduler; got {type(scheduler).__name__}")
    return type(scheduler).__name__


def rule_of(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> Rule:
    """The rule of a parameter group; of an optimiser that is not known, its state's names and nothing else."""
    description = description_of(optimizer)
    if description is not None:
        rule = description(optimizer, group)
        if not isinstance(rule, Rule):
            raise TypeError(f"the description of {type(optimizer).__name__} must return a Rule; got {rule!r:.60}")
        return rule
    names = {name for parameter in group["params"] for name in optimizer.state.get(parameter, {})}

    def shapes(name: str):
        def of(parameter: Tensor) -> list[tuple[int, ...]]:
            value = optimizer.state.get(parameter, {}).get(name)
            return [tuple(value.shape)] if isinstance(value, Tensor) else []

        return of

    unknown = OptimizerMemory(
        "unknown",
        "?",
        "?",
        keys="?",
        values="?",
        states={n: shapes(n) for n in sorted(names)},
        rule="",
        macs=0,
        solver="unknown",
        note="this optimiser has no description: see nestling.nested_system.describes",
    )
    return Rule(f"{type(optimizer).__name__} (unknown)", "?", "", (unknown,))

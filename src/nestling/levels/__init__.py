"""Levels of a nested system: how often each part of a model is updated, and any model seen as such a system.

The package is also a function: `nestling.levels(model, optimizer)` is `nestling.levels.read.levels`.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from nestling.levels.describe import Place, describes, describes_if
    from nestling.levels.formalism import (
        AssociativeMemory,
        ContextFlow,
        Cost,
        Solver,
        TensorSpec,
        Transfer,
    )
    from nestling.levels.frequency import Frequency
    from nestling.levels.rules import Inner, Rule
    from nestling.levels.schedule import Level, Schedule
    from nestling.levels.system import Finding, NestedLevel, NestedSystem

__all__ = [
    "AssociativeMemory", "ContextFlow", "Cost", "Finding", "Frequency", "Inner", "Level", "NestedLevel", "NestedSystem",
    "Place", "Rule", "Schedule", "Solver", "TensorSpec", "Transfer", "describes", "describes_if",
]  # fmt: skip

_HOMES = {
    "schedule": ("Level", "Schedule"),
    "frequency": ("Frequency",),
    "formalism": ("AssociativeMemory", "ContextFlow", "Cost", "Solver", "TensorSpec", "Transfer"),
    "system": ("Finding", "NestedLevel", "NestedSystem"),
    "describe": ("Place", "describes", "describes_if"),
    "rules": ("Inner", "Rule"),
}


class _Levels(ModuleType):
    """The module, callable, and lazy: the schedule alone needs none of the rest."""

    def __call__(
        self,
        model: nn.Module,
        optimizer: Any = None,
        *,
        scheduler: Any = None,
        average: nn.Module | None = None,
        accumulation: int = 1,
        tokens_per_step: int | None = None,
        context_length: int | None = None,
        measure: Any = None,
        steps: int = 3,
        loss: Any = None,
    ) -> NestedSystem:
        """The nested system of a model with its optimiser; `nestling.levels.read.levels` says what each argument is."""
        given = {name: value for name, value in locals().items() if name != "self"}
        from nestling.levels.read import levels

        return levels(**given)

    def __getattr__(self, name: str) -> Any:
        for home, names in _HOMES.items():
            if name in names:
                value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
                setattr(self, name, value)
                return value
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Levels

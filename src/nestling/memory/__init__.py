"""Associative memories: architectures, objectives, and the rule by which they learn in context."""

from nestling.memory.architectures import Architecture, LinearMemory, MLPMemory
from nestling.memory.objectives import OBJECTIVES, Objective
from nestling.memory.rule import FastWeights, UpdateRule

__all__ = ["OBJECTIVES", "Architecture", "FastWeights", "LinearMemory", "MLPMemory", "Objective", "UpdateRule"]

"""Associative memories: architectures, objectives, and the rule by which they learn in context."""

from nestling.memory.architectures import Architecture, LinearMemory, MLPMemory
from nestling.memory.exact import ExactMemory
from nestling.memory.objectives import OBJECTIVES, Objective
from nestling.memory.rule import FastWeights, UpdateRule

__all__ = [
    "OBJECTIVES",
    "Architecture",
    "ExactMemory",
    "FastWeights",
    "LinearMemory",
    "MLPMemory",
    "Objective",
    "UpdateRule",
]

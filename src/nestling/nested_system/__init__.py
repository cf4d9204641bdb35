"""Any model with its optimiser as nested associative memories: levels, frequencies, what flows between (NL Sec. 3)."""

from nestling.nested_system.formalism import AssociativeMemory, ContextFlow, Cost, Solver, TensorSpec, Transfer
from nestling.nested_system.frequency import Frequency
from nestling.nested_system.reading.describe import Place, describes, describes_if
from nestling.nested_system.reading.read import levels
from nestling.nested_system.rules import Inner, Rule
from nestling.nested_system.system import Finding, NestedLevel, NestedSystem

__all__ = [
    "AssociativeMemory", "ContextFlow", "Cost", "Finding", "Frequency", "Inner", "NestedLevel", "NestedSystem",
    "Place", "Rule", "Solver", "TensorSpec", "Transfer", "describes", "describes_if", "levels",
]  # fmt: skip

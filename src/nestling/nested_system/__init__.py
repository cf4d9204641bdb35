"""Any model with its optimiser as nested associative memories: levels, frequencies, what flows between (NL Sec. 3).

`levels` (analyze.py) reads a model into a `NestedSystem`. Imports point down this list:
    analyze       the entry: reading, then measuring on request
    measuring/    a few steps on a copy: does what was declared really happen?
    reading/      a model's modules and optimisers, put together as an ordered system
    descriptions/ what the modules and optimisers that are known are as memories
    describe      the register of descriptions, and the `Place` that is handed to one
    drawing/      a system as a table, a picture, a page (which `NestedSystem` imports when it is asked for one)
    system, rules, formalism, frequency, codec    the values all of these are made of
"""

from nestling.nested_system.analyze import levels
from nestling.nested_system.describe import Place, describes, describes_if
from nestling.nested_system.formalism import AssociativeMemory, ContextFlow, Cost, Solver, TensorSpec, Transfer
from nestling.nested_system.frequency import Frequency
from nestling.nested_system.rules import OptimizerMemory, Rule
from nestling.nested_system.system import Finding, NestedLevel, NestedSystem

__all__ = [
    "AssociativeMemory", "ContextFlow", "Cost", "Finding", "Frequency", "NestedLevel", "NestedSystem",
    "OptimizerMemory", "Place", "Rule", "Solver", "TensorSpec", "Transfer", "describes", "describes_if", "levels",
]  # fmt: skip

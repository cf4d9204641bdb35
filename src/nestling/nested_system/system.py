"""A nested system: levels in order, what flows between them, and what was found (NL Defs. 3, 4, 7).

`NestedSystem` prints and draws itself; it imports drawing/, which is made for it, only when asked to.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from nestling.nested_system import codec
from nestling.nested_system.formalism import AssociativeMemory, ContextFlow, Cost, Transfer
from nestling.nested_system.frequency import Frequency


@dataclass(frozen=True)
class NestedLevel:
    """The memories of one frequency that do not wait for one another (NL Def. 2); level 1 is the fastest."""

    index: int
    frequency: Frequency
    memories: tuple[AssociativeMemory, ...]

    @property
    def cost(self) -> Cost:
        """Of all its memories."""
        return sum((memory.cost for memory in self.memories), Cost())

    def __str__(self) -> str:
        return f"level {self.index}, {self.frequency}: {len(self.memories)} memories"


@dataclass(frozen=True)
class Finding:
    """Something worth a second look.

    Attributes:
        kind: "never moves", "another rate", "moves though frozen", "dropped", "unknown", "shared".
        memory: name of the memory.  message: one sentence.
    """

    kind: str
    memory: str
    message: str


@dataclass(frozen=True)
class Coverage:
    """How many tensors of a model and its optimiser are assigned to a memory that is known."""

    parameters: tuple[int, int]
    buffers: tuple[int, int]
    optimizer_states: tuple[int, int]
    unknown: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether nothing is unknown."""
        return not self.unknown and all(a == b for a, b in (self.parameters, self.buffers, self.optimizer_states))


@dataclass(frozen=True)
class NestedSystem:
    """A model with its optimiser as ordered levels of associative memories (NL Defs. 3, 4, 7).

    Attributes:
        title: of the model and the optimiser.
        levels: fastest first; a higher level has a lower frequency.
        flows: the contexts that are compressed.  transfers: who teaches whom.
        coverage: what was assigned, and what stayed unknown.
        findings: what a second look is worth.  notes: how the model was read.
        tokens_per_step: tokens of an outer step, None where not known.
        context_length: tokens of a context that costs are stated for.
    """

    title: str
    levels: tuple[NestedLevel, ...]
    flows: tuple[ContextFlow, ...] = ()
    transfers: tuple[Transfer, ...] = ()
    coverage: Coverage = Coverage((0, 0), (0, 0), (0, 0))
    findings: tuple[Finding, ...] = ()
    notes: tuple[str, ...] = ()
    tokens_per_step: int | None = None
    context_length: int = 1024

    @property
    def memories(self) -> tuple[AssociativeMemory, ...]:
        """All memories, fastest level first."""
        return tuple(memory for level in self.levels for memory in level.memories)

    @cached_property
    def _places(self) -> dict[str, tuple[int, AssociativeMemory]]:
        return {memory.name: (level.index, memory) for level in self.levels for memory in level.memories}

    def __getitem__(self, name: str) -> AssociativeMemory:
        """A memory by name."""
        if name not in self._places:
            raise KeyError(f"no memory {name!r}; there are {', '.join(list(self._places)[:8])}, ...")
        return self._places[name][1]

    def level_of(self, name: str) -> int:
        """The index of a memory's level."""
        self[name]
        return self._places[name][0]

    @property
    def associative(self) -> bool:
        """Whether every problem is known to be an associative memory: a nested system of them, NSAM (NL Def. 4)."""
        return not any(memory.unknown for memory in self.memories)

    @property
    def cost(self) -> Cost:
        """Of all levels."""
        return sum((level.cost for level in self.levels), Cost())

    def to_dict(self) -> dict[str, Any]:
        """JSON types only."""
        return codec.encode(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> NestedSystem:
        """The system `to_dict` wrote; ValueError names what does not belong."""
        return codec.decode(cls, values)

    def to_json(self, indent: int | None = None) -> str:
        """As text; `from_json` gives an equal system back."""
        return json.dumps(self.to_dict(), indent=indent, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> NestedSystem:
        """The system `to_json` wrote."""
        return cls.from_dict(json.loads(text))

    def table(self, **options: Any):
        """A rich table of the levels; see `nestling.nested_system.drawing.table.table`."""
        from nestling.nested_system.drawing.table import table

        return table(self, **options)

    def figure(self, path: Any = None, **options: Any) -> str:
        """Draw the levels; see `nestling.nested_system.drawing.figure.draw`."""
        from nestling.nested_system.drawing.figure import draw

        return draw(self, path, **options)

    def page(self, path: Any = None) -> str:
        """An interactive HTML page; see `nestling.nested_system.drawing.page.page`."""
        from nestling.nested_system.drawing.page import page

        return page(self, path)

    def __str__(self) -> str:
        from nestling.nested_system.drawing.table import text

        return text(self)

    def __repr__(self) -> str:
        return f"NestedSystem({self.title}: {len(self.levels)} levels, {len(self.memories)} memories)"

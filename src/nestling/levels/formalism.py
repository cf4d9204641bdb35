"""Nested learning as values: memories, levels, systems, and what flows between them (NL Sec. 3, Defs. 1-4, 6, 7).

Everything is immutable, prints itself, and goes to JSON and back unchanged.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from nestling.levels import codec
from nestling.levels.frequency import Frequency

TRANSFERS = {
    "parametric": "direct, parametric: the target's computation takes the source's parameters or output (NL Eqs. 24-26)",
    "non-parametric": "direct, non-parametric: the target reads the solution of a memory without parameters (NL Eq. 27)",
    "backpropagation": "one gradient flow through memories of different frequencies",
    "initialization": "the source is the learned initial state of the target (NL Eq. 28)",
    "generation": "the source generates the target's weights or its context: keys, values, gradients",
}
SOLVERS = ("gradient", "non-parametric", "none", "unknown")
LIFETIMES = ("model", "training", "context")
ROLES = ("parameter", "buffer", "state", "optimizer")


def _one_of(name: str, value: str, allowed) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of a memory, without its values.

    Attributes:
        name: as the model names it, or the optimiser's name for a state.
        shape, dtype: of the tensor (of one sequence's state for what learns in a context).
        bytes: what it takes.
        role: "parameter", "buffer", "state" (kept per sequence) or "optimizer".
        shared_with: the name under which the same tensor is already counted.
        counter: its changes are no updates of the memory (a step counter, a buffer that is not read yet).
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    role: str = "parameter"
    shared_with: str | None = None
    counter: bool = False

    def __post_init__(self) -> None:
        _one_of("role", self.role, ROLES)

    @property
    def numel(self) -> int:
        """Numbers it holds."""
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True)
class Solver:
    """How a memory's problem is solved (NL Defs. 1, 3, 6).

    Attributes:
        kind: "gradient" (steps on the objective), "non-parametric" (its solution is a function of the data, as softmax
            attention), "none" (nothing is learned any more) or "unknown".
        rule: the rule's name, such as "AdamW" or "delta gradient descent".
        rate: the step size in words.
        steps: inner steps per update.
    """

    kind: str = "gradient"
    rule: str = ""
    rate: str = ""
    steps: int = 1

    def __post_init__(self) -> None:
        _one_of("kind", self.kind, SOLVERS)

    def __str__(self) -> str:
        if self.kind in ("none", "unknown"):
            return "not learned" if self.kind == "none" else "unknown"
        return self.rule + (f", {self.steps} steps" if self.steps > 1 else "") + (f", {self.rate}" if self.rate else "")


@dataclass(frozen=True)
class Cost:
    """What a memory costs. Work is in multiply-adds, of products unless a memory has none.

    Attributes:
        parameters: learned numbers, shared ones counted where they first appear.
        state_bytes: bytes held: of the parameters, of a state per sequence, of optimiser state.
        read_macs, read_bytes: of answering one token (or patch, or output position), alone and token by token.
        write_macs, write_bytes: of learning from one token: a gradient and the error handed on, or an inner update.
        step_macs, step_bytes: of one update of the whole memory, on top of that.
    """

    parameters: int = 0
    state_bytes: int = 0
    read_macs: int = 0
    read_bytes: int = 0
    write_macs: int = 0
    write_bytes: int = 0
    step_macs: int = 0
    step_bytes: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, f) + getattr(other, f) for f in self.__dataclass_fields__))


@dataclass(frozen=True)
class Measured:
    """What a few steps did to a memory.

    Attributes:
        updates: times its numbers changed.  over: tokens or steps it was watched for.
        unit: "token" or "step".
        norm: mean Frobenius norm of a change.
    """

    updates: int
    over: int
    unit: str
    norm: float

    def __str__(self) -> str:
        return f"{self.updates} of {self.over} {self.unit}s, |Δ| {self.norm:.2g}"


@dataclass(frozen=True)
class AssociativeMemory:
    """An operator that maps keys to values, learned by an objective (NL Def. 1; 6 in its general form).

    Attributes:
        name: unique in its system; the module's name for the weights of a module.
        kind: what it is: "linear map", "softmax attention", "momentum", ... or "unknown".
        keys, values: what is associated.  objective: the loss of the inner problem.
        retrieval: how it is read.  update: how one update changes it.
        solver: gradient steps, non-parametric, none, unknown.
        frequency: updates per token or step; None only in a description, where the optimiser decides.
        context: name of the context flow it compresses.
        feasible: the set its parameters are chosen from (Theta of Def. 3).
        tensors: parameters, buffers and state.
        needs: names of memories whose state at time t it needs for its own (the order among equal frequencies).
        lifetime: how long it lasts: "model" (saved with it), "training" (dropped at its end), "context" (of a sequence).
        cost: see Cost.  measured: what a few steps did.  note: anything else worth knowing.
    """

    name: str
    kind: str
    keys: str
    values: str
    objective: str
    retrieval: str = ""
    update: str = ""
    solver: Solver = Solver()
    frequency: Frequency | None = None
    context: str = ""
    feasible: str = ""
    tensors: tuple[TensorSpec, ...] = ()
    needs: tuple[str, ...] = ()
    lifetime: str = "model"
    cost: Cost = Cost()
    measured: Measured | None = None
    note: str = ""

    def __post_init__(self) -> None:
        _one_of("lifetime", self.lifetime, LIFETIMES)
        if not self.name or not self.kind:
            raise ValueError(f"a memory has a name and a kind; got name={self.name!r}, kind={self.kind!r}")

    @property
    def unknown(self) -> bool:
        """Whether nothing is known of it but its tensors."""
        return self.kind == "unknown"

    def __str__(self) -> str:
        return f"{self.name} ({self.kind}): {self.keys} → {self.values}, updated {self.frequency}, {self.solver}"


@dataclass(frozen=True)
class ContextFlow:
    """The stream that memories compress: its elements, and what generates them."""

    name: str
    elements: str
    source: str

    def __str__(self) -> str:
        return f"{self.name}: {self.elements}, from {self.source}"


@dataclass(frozen=True)
class Transfer:
    """Knowledge going from one memory to another (NL Sec. 3.3).

    Attributes:
        source, target: names of memories.  kind: one of TRANSFERS.  what: what is handed over.
    """

    source: str
    target: str
    kind: str
    what: str = ""

    def __post_init__(self) -> None:
        _one_of("kind", self.kind, TRANSFERS)

    def __str__(self) -> str:
        return f"{self.source} → {self.target}: {self.kind}" + (f" ({self.what})" if self.what else "")


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
        """A rich table of the levels; see `nestling.levels.table.table`."""
        from nestling.levels.table import table

        return table(self, **options)

    def figure(self, path: Any = None, **options: Any) -> str:
        """Draw the levels; see `nestling.levels.figure.draw`."""
        from nestling.levels.figure import draw

        return draw(self, path, **options)

    def page(self, path: Any = None) -> str:
        """An interactive HTML page; see `nestling.levels.page.page`."""
        from nestling.levels.page import page

        return page(self, path)

    def __str__(self) -> str:
        from nestling.levels.table import text

        return text(self)

    def __repr__(self) -> str:
        return f"NestedSystem({self.title}: {len(self.levels)} levels, {len(self.memories)} memories)"

"""Nested learning as values: associative memories, and what flows between them (NL Sec. 3, Defs. 1, 2, 6).

Everything is immutable, prints itself, and goes to JSON and back unchanged.
"""

from __future__ import annotations

from dataclasses import dataclass

from nestling.nested_system.frequency import Frequency

TRANSFERS = {
    "parametric": "direct: the target's computation takes the source's parameters or output (NL Eqs. 24-26)",
    "non-parametric": "direct: the target reads the solution of a memory without parameters (NL Eq. 27)",
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
        lifetime: how long it lasts: "model" (saved with it), "training" (dropped at its end), "context".
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

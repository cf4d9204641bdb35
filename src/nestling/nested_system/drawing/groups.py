"""Memories that a reader sees as one: of one level, one kind and one place in the flow of knowledge."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass

from nestling.nested_system.formalism import AssociativeMemory, Cost
from nestling.nested_system.system import NestedSystem


@dataclass(frozen=True)
class ViewGroup:
    """Some memories of a level that differ only in where in the model they stand.

    Attributes:
        key: unique in the system.  level: index of the level.  kind: of the memories.
        members: their names among themselves, as short as they stay distinct ("q_proj", "k_proj").
        memories: all of them.
    """

    key: str
    level: int
    kind: str
    members: tuple[str, ...]
    memories: tuple[AssociativeMemory, ...]

    @property
    def cost(self) -> Cost:
        """Of all of them."""
        return sum((memory.cost for memory in self.memories), Cost())

    @property
    def first(self) -> AssociativeMemory:
        """The first one, for what they have in common."""
        return self.memories[0]


@dataclass(frozen=True)
class Link:
    """Transfers of one kind between two groups. `what` joins what is handed over; `count` is how many there are."""

    source: str
    target: str
    kind: str
    what: str
    count: int


def groups(system: NestedSystem, *, coarse: bool = False) -> tuple[list[ViewGroup], list[Link]]:
    """The groups of a system, fastest level first, and what goes on between them.

    Args:
        coarse: leave out how a memory is read, as a picture does.
    """
    kinds = {m.name: (system.level_of(m.name), m.kind) for m in system.memories}
    sides: dict[str, set[tuple]] = defaultdict(set)
    for t in system.transfers:
        # what an optimiser does with weights is the same for all of them and says nothing of their place
        if system[t.source].lifetime != "training" and system[t.target].lifetime != "training":
            sides[t.source].add(("to", t.kind, *kinds[t.target]))
            sides[t.target].add(("from", t.kind, *kinds[t.source]))
    found: dict[tuple, list[AssociativeMemory]] = defaultdict(list)
    for level in system.levels:
        for m in level.memories:
            how = m.solver.rule if coarse else (m.retrieval, m.update)
            found[level.index, m.kind, how, frozenset(sides[m.name])].append(m)
    made = [ViewGroup(f"g{i}", key[0], key[1], _members(ms), tuple(ms)) for i, (key, ms) in enumerate(found.items())]
    return made, _links(system, made)


def _members(memories: list[AssociativeMemory]) -> tuple[str, ...]:
    """Last parts of the names, without the numbers of layers; the last but one where the last says nothing."""
    names = []
    for memory in memories:
        if memory.lifetime == "training" and ": " in memory.name:  # an optimiser's: whose
            names += [n for n in [memory.name.split(": ")[0]] if n not in names]
            continue
        parts = [p for p in re.sub(r" \[.*", "", memory.name).split(".") if p]
        words = [p for p in parts if not p.isdigit()] or parts
        last = words[-1]
        if last in ("momentum", "attention", "weights", "running", "state", "sum") and len(words) > 1:
            last = f"{words[-2]}.{last}"
        elif last in ("blocks", "levels"):  # which of them is what tells one from another
            last = f"{last}.{parts[-1]}"
        if last not in names:
            names.append(last)
    return tuple(names)


def _links(system: NestedSystem, made: list[ViewGroup]) -> list[Link]:
    home = {memory.name: group.key for group in made for memory in group.memories}
    found: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for t in system.transfers:
        found[home[t.source], home[t.target], t.kind].append(t.what)
    return [
        Link(source, target, kind, ", ".join(dict.fromkeys(filter(None, whats))), len(whats))
        for (source, target, kind), whats in found.items()
        if source != target
    ]


def short(number: float) -> str:
    """A count with a magnitude: 1,234 as 1.23k."""
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= limit:
            return f"{number / limit:.3g}{unit}"
    return f"{number:.3g}" if number >= 1 or number == 0 else f"{number:.2g}"


def per_token(cost: Cost, rate: float | None) -> tuple[float, float]:
    """Multiply-adds and bytes of learning, per token; `rate` is updates per token, None where not known."""
    done = 0 if rate in (None, float("inf")) else float(rate)
    return cost.write_macs + done * cost.step_macs, cost.write_bytes + done * cost.step_bytes

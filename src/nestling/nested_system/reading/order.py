"""The order of Def. 2: levels by frequency, and among equal frequencies by who needs whose state."""

from __future__ import annotations

import math
from collections import defaultdict
from fractions import Fraction

from nestling.nested_system.formalism import AssociativeMemory
from nestling.nested_system.system import NestedLevel

Speed = tuple[int, Fraction]


def order(memories: list[AssociativeMemory], tokens_per_step: int | None = None) -> tuple[NestedLevel, ...]:
    """The levels of some memories, fastest first.

    A is faster than B if its frequency is higher, or if they are equal and B's state at t needs A's at t. What is
    equal and independent shares a level: what waits for nothing stands with others of its kind, else with most others.

    Args:
        tokens_per_step: compares frequencies per token with frequencies per step. Without it, what learns in a context
            counts as faster than a step, and a level of the continuum memory that outlasts a context as slower.

    Raises:
        ValueError: memories that need one another at one time.
    """
    speeds = {m.name: _speed(m, tokens_per_step) for m in memories}
    places = _together(memories, _depths({m.name: m.needs for m in memories}, speeds), speeds)
    groups: dict[tuple, list[AssociativeMemory]] = defaultdict(list)
    for memory in memories:
        groups[speeds[memory.name], places[memory.name]].append(memory)
    return tuple(
        NestedLevel(index, groups[key][0].frequency, tuple(groups[key]))
        for index, key in enumerate(sorted(groups, reverse=True), 1)
    )


def faster(a: AssociativeMemory, b: AssociativeMemory, tokens_per_step: int | None = None) -> bool:
    """Whether a is faster than b (NL Def. 2)."""
    x, y = (_speed(m, tokens_per_step) for m in (a, b))
    return x > y or (x == y and a.name in b.needs)


def _speed(memory: AssociativeMemory, tokens_per_step: int | None) -> Speed:
    """What frequencies are compared by: a rank, and the updates per unit among those of one rank."""
    frequency = memory.frequency
    if frequency.rate in (0, math.inf):
        return (-1 if frequency.rate == 0 else 3), Fraction(0)
    if tokens_per_step is not None:
        return 1, frequency.per_token(tokens_per_step)
    if frequency.unit == "step":
        return 1, frequency.rate
    return (2 if memory.lifetime == "context" else 0), frequency.rate


def _depths(needs: dict[str, tuple[str, ...]], speeds: dict[str, Speed]) -> dict[str, int]:
    """Longest chain, among equal speeds, from each memory to one that nothing waits for."""
    waiting: dict[str, list[str]] = defaultdict(list)
    for name, needed in needs.items():
        for one in needed:
            if speeds.get(one) == speeds[name]:
                waiting[one].append(name)
    depths: dict[str, int] = {}
    open_: set[str] = set()

    def depth(name: str) -> int:
        if name in open_:
            raise ValueError(f"{name} needs its own state at the same time, through {', '.join(sorted(open_))}")
        if name not in depths:
            open_.add(name)
            depths[name] = max((1 + depth(other) for other in waiting[name]), default=0)
            open_.discard(name)
        return depths[name]

    for name in needs:
        depth(name)
    return depths


def _together(memories: list[AssociativeMemory], depths: dict[str, int], speeds: dict[str, Speed]) -> dict[str, int]:
    """Depths with what is of one kind and speed on one level, where what it needs allows that.

    What needs nothing and is not needed stands where most of its speed do.
    """
    tied = {m.name for m in memories if any(speeds.get(n) == speeds[m.name] for n in m.needs)}
    tied |= {n for m in memories for n in m.needs if speeds.get(n) == speeds[m.name]}
    for m in memories:
        if m.name not in tied:
            around = [depths[n] for n in tied if speeds[n] == speeds[m.name]]
            depths[m.name] = max(sorted(set(around)), key=around.count, default=0)
    deepest: dict[tuple, int] = defaultdict(int)
    for m in memories:
        deepest[m.kind, speeds[m.name]] = max(deepest[m.kind, speeds[m.name]], depths[m.name])
    moved = dict(depths)
    for m in memories:
        target = deepest[m.kind, speeds[m.name]]
        if all(depths[n] > target for n in m.needs if speeds.get(n) == speeds[m.name]):
            moved[m.name] = target
    return moved

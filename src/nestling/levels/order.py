"""The order of Def. 2: levels by frequency, and among equal frequencies by who needs whose state."""

from __future__ import annotations

import math
from collections import defaultdict
from fractions import Fraction

from nestling.levels.formalism import AssociativeMemory
from nestling.levels.system import NestedLevel


def order(memories: list[AssociativeMemory], tokens_per_step: int | None = None) -> tuple[NestedLevel, ...]:
    """The levels of some memories, fastest first.

    A is faster than B if its frequency is higher, or if they are equal and B's state at t needs A's at t. What is
    equal and independent shares a level: the slowest it can be on, or that of others of its kind.

    Args:
        tokens_per_step: compares frequencies per token with frequencies per step. Without it, what learns in a context
            counts as faster than a step, and a level of the continuum memory that outlasts a context as slower.

    Raises:
        ValueError: memories that need one another at one time.
    """
    per_step = tokens_per_step or _between(memories)
    speeds = {m.name: m.frequency.per_token(per_step) for m in memories}
    places = _together(memories, _depths({m.name: m.needs for m in memories}, speeds), speeds)
    groups: dict[tuple, list[AssociativeMemory]] = defaultdict(list)
    for memory in memories:
        groups[(-speeds[memory.name], -places[memory.name])].append(memory)
    return tuple(
        NestedLevel(index, groups[key][0].frequency, tuple(groups[key])) for index, key in enumerate(sorted(groups), 1)
    )


def faster(a: AssociativeMemory, b: AssociativeMemory, tokens_per_step: int | None = None) -> bool:
    """Whether a is faster than b (NL Def. 2)."""
    per_step = tokens_per_step or _between([a, b])
    x, y = (m.frequency.per_token(per_step) for m in (a, b))
    return x > y or (x == y and a.name in b.needs)


def _between(memories: list[AssociativeMemory]) -> Fraction:
    """A length of a step longer than every period inside a context, and shorter than those that outlast one."""

    def periods(context: bool) -> list[Fraction]:
        chosen = [m.frequency for m in memories if (m.lifetime == "context") == context]
        return [1 / f.rate for f in chosen if f.unit == "token" and 0 < f.rate < math.inf]

    inside, outside = max(periods(True), default=Fraction(1)), min(periods(False), default=None)
    if outside is None or outside > 2 * inside:
        return 2 * inside
    return (inside + outside) / 2 if outside > inside else inside


def _depths(needs: dict[str, tuple[str, ...]], speeds: dict[str, Fraction | float]) -> dict[str, int]:
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


def _together(
    memories: list[AssociativeMemory], depths: dict[str, int], speeds: dict[str, Fraction | float]
) -> dict[str, int]:
    """Depths with what is of one kind and speed on one level, where what it needs allows that."""
    deepest: dict[tuple, int] = defaultdict(int)
    for m in memories:
        deepest[m.kind, speeds[m.name]] = max(deepest[m.kind, speeds[m.name]], depths[m.name])
    moved = dict(depths)
    for m in memories:
        target = deepest[m.kind, speeds[m.name]]
        if all(depths[n] > target for n in m.needs if speeds.get(n) == speeds[m.name]):
            moved[m.name] = target
    return moved

"""What of all that was learned a text is read with: the levels as they stand, a snapshot of them, or nothing.

A level forgets: what it learned of one document fades or is overwritten by the next ones. What it held at a document's
end is small, so it can be kept. Before another document is read, and before a question is answered, whatever predicts
its first tokens best takes the levels' place: the levels, a snapshot, or nothing learned.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nestling.sessions.scores import score

if TYPE_CHECKING:
    from nestling.cms.cache import LevelsCache

FIRST = 64  # tokens of a document by which it is chosen what reads it
AHEAD = 2.0  # nats by which what was learned has to predict them better than nothing learned does
NOTHING = ""  # learned


def nearest(
    model: Any, cache: LevelsCache, ids: list[int], start: int, context: int | None = None, nothing: bool = True,
    given: int = 0,
) -> str | None:  # fmt: skip
    """What the text that begins with `ids` is best read with, of all that the one stream in a cache ever knew.

    What was learned of other texts may predict this one worse than the model did before it read anything, so nothing
    learned is among the choices, and in doubt it is taken.

    Args:
        ids: scored in a fresh context, after the token `start`, without learning.
        context: after which attention begins anew.
        nothing: whether it may be that nothing was learned.
        given: so many of `ids` are read and not counted: a template is worse predicted whatever was learned.

    Returns:
        None: the levels as they stand; a snapshot's name; or `NOTHING`.
    """
    names: list[str | None] = [None, *(cache.snapshots or ()), *[NOTHING] * nothing]
    if not ids or len(names) == 1 or not cache.streams:
        return None
    losses = []
    for name in names:
        then = cache.fork()
        if name is not None:
            then.recall(name or None)
        found = -float(score(model, then, ids, start, context)[given:].double().sum())
        losses.append(found - AHEAD if name == NOTHING else found)
    return names[min(range(len(names)), key=losses.__getitem__)]


def recall_nearest(
    model: Any, cache: LevelsCache, ids: list[int], start: int, context: int | None = None, nothing: bool = True,
    given: int = 0,
) -> str | None:  # fmt: skip
    """Put the levels to what is `nearest` to a text, and return its name; the context and all snapshots stay."""
    best = nearest(model, cache, ids, start, context, nothing, given)
    if best is not None:
        cache.recall(best or None)
    return best


def keep(cache: LevelsCache, name: str, most: int) -> None:
    """Keep what the levels know at a document's end, in front of a new context.

    Of more than `most` snapshots the earlier of the two that are most alike goes: what went on from it knows the most
    of what it knew.
    """
    cache.forget_context()
    cache.snapshot(name)
    while len(cache.snapshots) > most:
        names = list(cache.snapshots)
        units = torch.stack([_direction(cache.snapshots[n]) for n in names])
        alike = (units @ units.T).tril(-1) - 2 * torch.ones(len(names), len(names)).triu()
        del cache.snapshots[names[int(alike.argmax()) % len(names)]]  # rows are the later ones


def _direction(cache: LevelsCache) -> Tensor:
    """What a stream has learned as one vector of length 1."""
    found = torch.cat([d.flatten() for s in cache.levels.levels if s is not None for d in s.deltas]).cpu()
    return found / found.norm().clamp_min(1e-30)

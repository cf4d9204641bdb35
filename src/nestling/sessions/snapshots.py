"""Snapshots of what the levels had learned at each document's end, taken up again where they predict best.

A level forgets: what it learned of one document fades or is overwritten by the next ones. What it held at a document's
end is small, so it is kept. Before another document is read, and before a question is answered, the snapshot that
predicts its first tokens best takes the levels' place, or nothing at all, where nothing learned predicts them best.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nestling.sessions.scores import score

if TYPE_CHECKING:
    from nestling.cms.cache import LevelsCache

FIRST = 64  # tokens of a document by which a snapshot is chosen
NOTHING = ""  # learned


def recall_nearest(
    model: Any, cache: LevelsCache, ids: list[int], start: int, context: int | None = None, nothing: bool = True
) -> str | None:
    """Put the levels of one stream to whatever predicts `ids` best; the context and all snapshots stay.

    Args:
        ids: scored in a fresh context, after the token `start`.  context: after which attention begins anew.
        nothing: whether it may be that nothing was learned.

    Returns:
        The snapshot's name, `NOTHING`, or None: the levels stay as they are.
    """
    names: list[str | None] = [None, *(cache.snapshots or ()), *[NOTHING] * nothing]
    losses = []
    for name in names:
        then = cache.fork()
        if name is not None:
            then.recall(name or None)
        losses.append(-float(score(model, then, ids, start, context).double().sum()))
    best = names[min(range(len(names)), key=losses.__getitem__)]
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

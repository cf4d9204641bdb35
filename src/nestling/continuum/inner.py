"""The optimisers of levels that learn inside a context: pure functions of gradients and state, one step per stream.

Every tensor has the batch of streams in front, and nothing is reduced over it: streams never mix.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nestling.levels.schedule import Level

Slots = dict[str, list[Tensor]]  # what an optimiser remembers of every weight
Step = Callable[[Level, list[Tensor], Slots], tuple[list[Tensor], Slots]]


def gd(level: Level, grads: list[Tensor], slots: Slots) -> tuple[list[Tensor], Slots]:
    """-lr g (NL Eq. 71)."""
    return [-level.lr * g for g in grads], slots


def momentum(level: Level, grads: list[Tensor], slots: Slots) -> tuple[list[Tensor], Slots]:
    """m <- beta m + g, step -lr m (NL Eq. 33)."""
    sums = [level.momentum * m + g for m, g in zip(slots["momentum"], grads, strict=True)]
    return [-level.lr * m for m in sums], {"momentum": sums}


def adamw(level: Level, grads: list[Tensor], slots: Slots) -> tuple[list[Tensor], Slots]:
    """Adam's direction with bias-corrected averages of g and g^2."""
    beta, beta2 = level.momentum, 0.999
    first = [torch.lerp(g, m, beta) for m, g in zip(slots["first"], grads, strict=True)]
    second = [beta2 * v + (1 - beta2) * g * g for v, g in zip(slots["second"], grads, strict=True)]
    count = [t + 1 for t in slots["count"]]
    steps = []
    for m, v, t in zip(first, second, count, strict=True):
        # inside the root, so that its slope is finite where a weight never had a gradient
        size = (v / (1 - beta2**t) + 1e-16).sqrt()
        steps.append(-level.lr * m / (1 - beta**t) / size)
    return steps, {"first": first, "second": second, "count": count}


OPTIMIZERS: dict[str, tuple[Step, tuple[str, ...]]] = {
    "gd": (gd, ()),
    "momentum": (momentum, ("momentum",)),
    "adamw": (adamw, ("first", "second", "count")),
}


def begin(level: Level, weights: list[Tensor]) -> Slots:
    """The empty memory of a level's optimiser for weights [B, o, i]."""
    _, names = OPTIMIZERS[level.optimizer]
    return {
        name: [w.new_zeros(w.shape[0], 1, 1) if name == "count" else torch.zeros_like(w) for w in weights]
        for name in names
    }


def update(level: Level, deltas: list[Tensor], grads: list[Tensor], slots: Slots) -> tuple[list[Tensor], Slots, Tensor]:
    """One step of a level: new deltas and slots, and the norm written for each stream [B] (NaN where it was refused).

    The gradient of a stream is clipped to norm `level.clip`; where it is not finite, nothing of that stream changes.
    """
    size = torch.stack([g.square().sum((-1, -2)) for g in grads]).sum(0)  # [B]
    fine = size.isfinite()
    grads = [torch.where(_wide(fine), g, torch.zeros_like(g)) for g in grads]
    if level.clip is not None:
        norm = torch.where(fine, size, torch.ones_like(size)).clamp_min(1e-24).sqrt()
        scale = _wide((level.clip / norm).clamp(max=1.0))
        grads = [g * scale for g in grads]
    steps, new = OPTIMIZERS[level.optimizer][0](level, grads, slots)
    moved = [(1 - level.decay) * d + s for d, s in zip(deltas, steps, strict=True)]
    written = torch.stack([(m - d).square().sum((-1, -2)) for m, d in zip(moved, deltas, strict=True)]).sum(0)
    keep = _wide(fine & written.isfinite())
    moved = [torch.where(keep, m, d) for m, d in zip(moved, deltas, strict=True)]
    new = {name: [torch.where(keep, a, b) for a, b in zip(new[name], slots[name], strict=True)] for name in slots}
    with torch.no_grad():
        report = torch.where(fine & written.isfinite(), written.clamp_min(0).sqrt(), torch.nan)
    return moved, new, report


def _wide(x: Tensor) -> Tensor:
    return x[:, None, None]

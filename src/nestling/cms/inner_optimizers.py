"""The optimisers of levels that learn inside a context: pure functions of gradients and state, one step per stream.

Every tensor has the batch of streams in front, and nothing is reduced over it: streams never mix.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nestling.ops.orthogonalize import orthogonalize
from nestling.optim.multiscale import RMS, TINY, rms
from nestling.schedule import Level

Slots = dict[str, list[Tensor]]  # what an optimiser remembers of every weight
Step = Callable[[Level, list[Tensor], Slots], tuple[list[Tensor], Slots]]  # what to go along, by -lr, and new slots

M3_BETA_V, M3_BETA_SLOW, M3_ALPHA, M3_PERIOD, M3_EPS = 0.999, 0.9, 0.25, 16, 0.05  # `nestling.optim.M3`'s defaults


def gd(level: Level, grads: list[Tensor], slots: Slots) -> tuple[list[Tensor], Slots]:
    """g (NL Eq. 71)."""
    return grads, slots


def momentum(level: Level, grads: list[Tensor], slots: Slots) -> tuple[list[Tensor], Slots]:
    """m <- beta m + g, along m (NL Eq. 33)."""
    sums = [torch.add(g, m, alpha=level.momentum) for m, g in zip(slots["momentum"], grads, strict=True)]
    return sums, {"momentum": sums}


def adamw(level: Level, grads: list[Tensor], slots: Slots) -> tuple[list[Tensor], Slots]:
    """Adam's direction with bias-corrected averages of g and g^2."""
    beta, beta2 = level.momentum, 0.999
    first = [torch.lerp(g, m, beta) for m, g in zip(slots["first"], grads, strict=True)]
    second = [torch.lerp(g * g, v, beta2) for v, g in zip(slots["second"], grads, strict=True)]
    count = [t + 1 for t in slots["count"]]
    along = []
    for m, v, t in zip(first, second, count, strict=True):
        # inside the root, so that its slope is finite where a weight never had a gradient
        size = (v / (1 - beta2**t) + 1e-16).sqrt()
        along.append(m / (1 - beta**t) / size)
    return along, {"first": first, "second": second, "count": count}


def m3(level: Level, grads: list[Tensor], slots: Slots) -> tuple[list[Tensor], Slots]:
    """A step of `nestling.optim.M3` with averages, look-ahead and matched size (NL Alg. 1), for every stream."""
    beta, found, along = level.momentum, {name: [] for name in slots}, []
    for g, m, v, slow, o, t in zip(grads, *(slots[n] for n in ("first", "second", "slow", "direction", "count"))):
        m = torch.lerp(g, m, beta)
        update = orthogonalize(torch.lerp(g, m, beta)) + M3_ALPHA * o
        v, t = M3_BETA_V * v + (1 - M3_BETA_V) * g * g, t + 1
        left = M3_BETA_V**t
        mean = v.mean((-2, -1), keepdim=True) / (1 - left)
        update = update / ((v + left * mean + TINY).sqrt() + M3_EPS * (mean + TINY).sqrt())
        along.append(RMS * update / rms(update))
        slow = torch.where((t - 1) % M3_PERIOD == 0, M3_BETA_SLOW * slow, slow) + (1 - M3_BETA_SLOW) / M3_PERIOD * g
        if bool((t % M3_PERIOD == 0).any()):
            o = torch.where(t % M3_PERIOD == 0, orthogonalize(slow), o)
        for name, value in zip(("first", "second", "slow", "direction", "count"), (m, v, slow, o, t)):
            found[name].append(value)
    return along, found


OPTIMIZERS: dict[str, tuple[Step, tuple[str, ...]]] = {
    "gd": (gd, ()),
    "momentum": (momentum, ("momentum",)),
    "adamw": (adamw, ("first", "second", "count")),
    "dgd": (gd, ()),  # gradient descent on another objective: see `delta_gradients`
    "m3": (m3, ("first", "second", "slow", "direction", "count")),
}


def delta_gradients(level: Level, grads: list[Tensor], norms: list[Tensor]) -> list[Tensor]:
    """What Delta Gradient Descent descends along (NL Eqs. 56, 57; decisions D1, D14).

    With D what a weight has learned and x its inputs, D+ = D - e (erase mean D x x^T + mean g),
    e = lr / (1 + lr erase mean |x|^2): it erases what it answers along the inputs, down to its initial state.

    Args:
        grads: of the loss plus erase/2 |D x|^2, [B, o, i].  norms: mean |x|^2, [B].
    """
    return [g / (1 + level.lr * level.erase * wide(n)) for g, n in zip(grads, norms, strict=True)]


def begin(level: Level, weights: list[Tensor]) -> Slots:
    """The empty memory of a level's optimiser for weights [B, o, i]."""
    _, names = OPTIMIZERS[level.optimizer]
    return {
        name: [w.new_zeros(w.shape[0], 1, 1) if name == "count" else torch.zeros_like(w) for w in weights]
        for name in names
    }


def update(
    level: Level, deltas: list[Tensor], sums: list[Tensor], slots: Slots, count: Tensor, norms: list[Tensor] = (),
    due: Tensor | None = None,
) -> tuple[list[Tensor], Slots, Tensor]:  # fmt: skip
    """One step of a level: new deltas and slots, and the norm written for each stream [B] (NaN where it was refused).

    The mean gradient of a stream is clipped to norm `level.clip`; where it is not finite, nothing of it changes.

    Args:
        sums: gradients summed over tokens, [B, o, i] each.  count: tokens of each stream, [B].
        norms: sums of |x|^2 of every weight's inputs, [B] each, for "dgd".
        due: [B] the streams that step, None for all; the others write nothing.
    """
    if level.optimizer == "dgd":
        sums = delta_gradients(level, sums, [n / count for n in norms])
    size = squares(sums)
    fine = size.isfinite()
    if not bool(fine.all()):
        sums = [torch.where(wide(fine), g, torch.zeros_like(g)) for g in sums]
    scale = 1 / count
    if level.clip is not None:
        norm = torch.where(fine, size, torch.ones_like(size)).clamp_min(1e-24).sqrt()
        scale = scale * (level.clip / (norm * scale)).clamp(max=1.0)
    if level.optimizer in ("gd", "dgd"):  # the scale goes into the step: a pass over the weights less
        along, new, rate = sums, slots, wide(-level.lr * scale)
    else:
        along, new = OPTIMIZERS[level.optimizer][0](level, [g * wide(scale) for g in sums], slots)
        rate = wide(torch.full_like(scale, -level.lr))
    kept = [(1 - level.decay) * d for d in deltas] if level.decay else deltas
    moved = [torch.addcmul(d, a, rate) for d, a in zip(kept, along, strict=True)]
    if level.decay:
        written = squares([m - d for m, d in zip(moved, deltas, strict=True)])
    else:
        written = (size if along is sums else squares(along)) * rate[:, 0, 0].square()
    fine = fine & written.isfinite()
    take = fine if due is None else fine & due
    if not bool(take.all()):  # a choice between equals changes nothing, and costs the size of the state
        keep = wide(take)
        moved = [torch.where(keep, m, d) for m, d in zip(moved, deltas, strict=True)]
        new = {name: [torch.where(keep, a, b) for a, b in zip(new[name], slots[name], strict=True)] for name in slots}
    with torch.no_grad():
        report = torch.where(fine, written.clamp_min(0).sqrt(), torch.nan)
        if due is not None:
            report = torch.where(due, report, torch.zeros_like(report))
    return moved, new, report


def squares(tensors: list[Tensor]) -> Tensor:
    """The squared norm of each stream's part, [B]."""
    if torch.is_grad_enabled():
        return torch.stack([t.square().sum((-1, -2)) for t in tensors]).sum(0)
    return torch.stack([torch.linalg.vector_norm(t, dim=(-2, -1)) for t in tensors]).square().sum(0)


def wide(x: Tensor) -> Tensor:
    """[B] -> [B, 1, 1]."""
    return x[:, None, None]

"""The optimisers of levels that learn inside a context: pure functions of gradients and state, one step per stream.

Every tensor has the batch of streams in front, and nothing is reduced over it: streams never mix.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from nestling.ops import orthogonalize
from nestling.optim.m3 import M3
from nestling.optim.m3_options import settings_of
from nestling.optim.multiscale import M3Settings, m3_reference
from nestling.schedule import Level

Slots = dict[str, list[Tensor]]  # what an optimiser remembers of every weight
Step = Callable[[Level, list[Tensor], Slots], tuple[list[Tensor], Slots]]  # what to go along, by -lr, and new slots

M3_SLOTS = {"m1": "first", "v": "second", "m2": "slow", "o2": "direction"}  # M3's names of its memories, and ours


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
    """The step of `nestling.optim.M3` by its definition, for every stream at its own step (NL Alg. 1)."""
    found, along = {name: [] for name in slots}, []
    for i, g in enumerate(grads):
        step = slots["count"][i] + 1
        state = {theirs: slots[ours][i] for theirs, ours in M3_SLOTS.items()}
        direction, new = m3_reference(g, state, m3_settings(g.shape[1:], level.momentum, g.dtype), step)
        along.append(direction)
        found["count"].append(step)
        for theirs, ours in M3_SLOTS.items():
            found[ours].append(new[theirs])
    return along, found


def spectral(level: Level, grads: list[Tensor], slots: Slots) -> tuple[list[Tensor], Slots]:
    """The gradient with its singular values made 1: steepest descent under the spectral norm."""
    places: dict[torch.Size, list[int]] = {}  # those of one shape go through the iteration together
    for i, g in enumerate(grads):
        places.setdefault(g.shape, []).append(i)
    along = list(grads)
    for same in places.values():
        together = torch.stack([grads[i] for i in same])
        for i, made in zip(same, orthogonalize(together, dtype=_exact(together.dtype)), strict=True):
            along[i] = made
    return along, slots


# of weights that do not change while streams are read: a pass over every one of them for each chunk is much
_SIZES: WeakIdKeyDictionary = WeakIdKeyDictionary()


def known_size(weight: Tensor) -> Tensor:
    """`mean_singular_value`, computed once for a weight that is as it was."""
    if weight.is_inference() or (torch.is_grad_enabled() and weight.requires_grad):
        return mean_singular_value(weight)
    now = (weight._version, weight.data_ptr(), weight.dtype, weight.device)
    found = _SIZES.get(weight)
    if found is None or found[0] != now:
        with torch.inference_mode(False), torch.no_grad():
            found = _SIZES[weight] = (now, mean_singular_value(weight))
    return found[1]


def mean_singular_value(weight: Tensor) -> Tensor:
    """The root mean square of a matrix's singular values; 1 for a matrix of zeros, which says nothing of its scale."""
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    size = torch.linalg.vector_norm(weight) / min(weight.shape) ** 0.5
    return torch.where(size > 0, size, torch.ones_like(size))


def _exact(dtype: torch.dtype) -> torch.dtype:
    """What levels orthogonalise in, on every device: bfloat16's rounding would grow from chunk to chunk."""
    return torch.promote_types(dtype, torch.float32)


@cache
def m3_settings(shape: torch.Size, beta: float, dtype: torch.dtype) -> M3Settings:
    """Those of `nestling.optim.M3` with the second moment of the gradient: saved levels go on as they were."""
    options = M3([torch.empty(1, 1)], betas=(beta, 0.999, 0.9), second_moment="gradient").defaults
    return settings_of(options | {"ns_dtype": _exact(dtype)}, shape, (), -2)


OPTIMIZERS: dict[str, tuple[Step, tuple[str, ...]]] = {
    "gd": (gd, ()),
    "momentum": (momentum, ("momentum",)),
    "adamw": (adamw, ("first", "second", "count")),
    "dgd": (gd, ()),  # gradient descent on another objective: see `delta_gradients`
    "m3": (m3, (*M3_SLOTS.values(), "count")),
    "spectral": (spectral, ()),
}


def delta_gradients(level: Level, grads: list[Tensor], norms: list[Tensor]) -> list[Tensor]:
    """What Delta Gradient Descent descends along (NL Eqs. 56, 57; decisions D1, D14).

    With D what a weight has learned and x its inputs, D+ = D - e (erase mean D x x^T + mean g),
    e = lr / (1 + lr erase mean |x|^2): it erases what it answers along the inputs, down to its initial state.

    Args:
        grads: of the loss plus erase/2 |D x|^2, [B, o, i].  norms: mean |x|^2, [B].
    """
    return [g / (1 + level.lr * level.erase * per_stream(n)) for g, n in zip(grads, norms, strict=True)]


def begin(level: Level, weights: list[Tensor]) -> Slots:
    """The empty memory of a level's optimiser for weights [B, o, i]."""
    _, names = OPTIMIZERS[level.optimizer]
    return {
        name: [w.new_zeros(w.shape[0], 1, 1) if name == "count" else torch.zeros_like(w) for w in weights]
        for name in names
    }


def update(
    level: Level, deltas: list[Tensor], sums: list[Tensor], slots: Slots, count: Tensor, norms: list[Tensor] = (),
    due: Tensor | None = None, sizes: list[Tensor] = (),
) -> tuple[list[Tensor], Slots, Tensor]:  # fmt: skip
    """One step of a level: new deltas and slots, and the norm written for each stream [B] (NaN where it was refused).

    The mean gradient of a stream is clipped to norm `level.clip`; where it is not finite, nothing of it changes.

    Args:
        sums: gradients summed over tokens, [B, o, i] each.  count: tokens of each stream, [B].
        norms: sums of |x|^2 of every weight's inputs, [B] each, for "dgd".
        due: [B] the streams that step, None for all; the others write nothing.
        sizes: of the weights, `mean_singular_value`, for "spectral".
    """
    if level.optimizer == "dgd":
        sums = delta_gradients(level, sums, [n / count for n in norms])
    size = squares(sums)
    fine = size.isfinite()
    if not bool(fine.all()):
        sums = [torch.where(per_stream(fine), g, torch.zeros_like(g)) for g in sums]
    scale = 1 / count
    if level.clip is not None:
        norm = torch.where(fine, size, torch.ones_like(size)).clamp_min(1e-24).sqrt()
        scale = scale * (level.clip / (norm * scale)).clamp(max=1.0)
    if level.optimizer in ("gd", "dgd"):  # the scale goes into the step: a pass over the weights less
        along, new, rate = sums, slots, per_stream(-level.lr * scale)
    else:
        along, new = OPTIMIZERS[level.optimizer][0](level, [g * per_stream(scale) for g in sums], slots)
        along = [a * s for a, s in zip(along, sizes, strict=True)] if sizes else along
        rate = per_stream(torch.full_like(scale, -level.lr))
    kept = [(1 - level.decay) * d for d in deltas] if level.decay else deltas
    moved = [torch.addcmul(d, a, rate) for d, a in zip(kept, along, strict=True)]
    if level.decay:
        written = squares([m - d for m, d in zip(moved, deltas, strict=True)])
    else:
        written = (size if along is sums else squares(along)) * rate[:, 0, 0].square()
    fine = fine & written.isfinite()
    take = fine if due is None else fine & due
    if not bool(take.all()):  # a choice between equals changes nothing, and costs the size of the state
        keep = per_stream(take)
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


def per_stream(x: Tensor) -> Tensor:
    """[B] -> [B, 1, 1]."""
    return x[:, None, None]
